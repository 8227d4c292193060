"""The game at the full size of Qwen2-VL-2B, with random weights and two answers of eight tokens.

Slow, and left out by default: python -m pytest -m slow -k full_size -s
It makes a checkpoint of 4.4 GB and deletes it; it is skipped where memory or disk is short.
"""

import csv
import itertools
import pathlib
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration

import assistant
import make
import reward
import rrg
import toy
from conftest import save_checkpoint
from reward import Description

MEMORY = 16e9  # bytes; the run itself was measured to take 13.7e9
DISK = 12e9
# Qwen2-VL-2B's own sizes.
TEXT = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [16, 24, 24],
    },
    "tie_word_embeddings": True,
}
VISION = {
    "depth": 32,
    "embed_dim": 1280,
    "num_heads": 16,
    "hidden_size": 1536,
    "patch_size": 14,
}


def bytes_of(file, name):
    """A figure such as MemAvailable that Linux tells in kB; None where there is no such file."""
    if not pathlib.Path(file).is_file():
        return None
    for line in pathlib.Path(file).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    return None


def skip_where_short(folder):
    available = bytes_of("/proc/meminfo", "MemAvailable")
    if available is None:
        pytest.skip("how much memory is available can only be read on Linux")
    if available < MEMORY:
        pytest.skip(f"{MEMORY / 1e9:.0f} GB of memory are wanted, {available / 1e9:.1f} are there")
    free = shutil.disk_usage(folder).free
    if free < DISK:
        pytest.skip(f"{DISK / 1e9:.0f} GB of disk are wanted, {free / 1e9:.1f} are free")


def new_tokenizer():
    """A byte-level BPE, as Qwen2's is: here a token is about a word of the prompts."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        # All of the toy's markers but <unk>: there is no unknown word.
        special_tokens=[token for token in make.SPECIAL if token != "<unk>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [reward.SPEAK, reward.LISTEN, assistant.RECOGNITION, assistant.CAPTIONING, "yes no"]
    core.train_from_iterator(texts * 2, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )


@pytest.fixture
def full_size_folder(tmp_path):
    """A checkpoint of Qwen2-VL-2B's shape with random weights, in bf16 as it is distributed."""
    skip_where_short(tmp_path)
    tokenizer = new_tokenizer()
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = Qwen2VLConfig(
        text_config=TEXT | ends,
        vision_config=VISION,
        tie_word_embeddings=True,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        **ends,
    )
    folder = tmp_path / "full-size"
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Qwen2VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(usual)
    assert 2.2e9 < sum(p.numel() for p in model.parameters()) < 2.3e9
    save_checkpoint(folder, model, tokenizer, patch_size=14, min_pixels=3136, max_pixels=50176)
    del model
    yield folder
    shutil.rmtree(folder)


def draw_photos(folder):
    """Three things with two photos each, of 8 by 8 image tokens."""
    for concept in toy.world(0, size=224, concepts=1, photos=1)[:3]:
        (folder / concept.name).mkdir(parents=True)
        for number, photo in enumerate(concept.photos):
            photo.load().save(folder / concept.name / f"{number}.png")


@pytest.mark.slow
def test_the_game_at_full_size(full_size_folder, tmp_path, monkeypatch):
    """End to end: mined, spoken, listened to, rewarded, learned, measured and saved."""
    draw_photos(tmp_path / "photos")
    # What random weights say is no description, so each answer is taken for one of these, and the
    # listener has something to read.
    mugs = itertools.cycle(["The red mug.", "The blue striped mug."])

    def parse(answer):
        return Description("A photo of a mug", next(mugs))

    monkeypatch.setattr(rrg, "parse", parse)
    settings = (
        f"--model {full_size_folder} --data {tmp_path / 'photos'} --out {tmp_path / 'run'} "
        "--k 2 --games 1 --samples 2 --max-tokens 8 --steps 1 --warmup 0 --eval-games 1 "
        # The share of the listener's belief, whoever is picked: it differs between two answers.
        "--reward soft"
    )
    monkeypatch.setattr("sys.argv", ["rrg.py", *settings.split()])
    started = time.time()
    rrg.main()
    seconds = time.time() - started

    peak = bytes_of("/proc/self/status", "VmHWM")
    [row] = csv.DictReader((tmp_path / "run/metrics.csv").open())
    print(f"{seconds:.0f} s, of which the step {row['seconds']}; peak {peak / 1e9:.1f} GB")
    assert float(row["completion_length"]) <= 8
    assert float(row["zero_std_groups"]) == 0
    assert (tmp_path / "run/result.json").is_file()
    weights = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    learned = [name for name, weight in weights.items() if "lora_B" in name and weight.any()]
    assert len(learned) == 28 * 7
    assert peak < MEMORY
