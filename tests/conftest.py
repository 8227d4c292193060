import pathlib
import sys

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # so that a test's subprocesses and `python -m pytest` from elsewhere find the scripts

import data  # noqa: E402
import reward  # noqa: E402
import rrg  # noqa: E402
import toy  # noqa: E402


def asking(photos):
    """The speaker's prompts about single photos."""
    return [([photo], reward.SPEAK) for photo in photos]


@pytest.fixture(scope="session")
def toy_mllm():
    """The shipped toy model. It must stay as it is: whoever adds adapters loads another."""
    return rrg.MLLM(str(toy.FOLDER), rrg.TOY["max_pixels"])


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory):
    """An untrained toy model whose checkpoint asks for the sampling that ruins a rollout, as Qwen2-VL's own does."""
    folder = tmp_path_factory.mktemp("random")
    torch.manual_seed(0)
    tokenizer = toy.new_tokenizer()
    model = toy.new_model(tokenizer)
    model.generation_config.update(do_sample=True, top_k=1, top_p=0.001, temperature=0.01)
    for part in (model, tokenizer, toy.Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2, min_pixels=1024, max_pixels=65536)):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def byte_folder(tmp_path_factory):
    """An untrained checkpoint that is no toy: Qwen2-VL's patch size, and a tokenizer that can spell anything, a byte a token."""
    folder = tmp_path_factory.mktemp("bytes")
    torch.manual_seed(0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate([*letters, "ye", "yes", "no"])}
    core = Tokenizer(models.BPE(words, [("y", "e"), ("ye", "s"), ("n", "o")]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(toy.SPECIAL[:-1])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=toy.TEMPLATE, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    like = toy.new_model(tokenizer).config.to_dict()
    like["vision_config"]["patch_size"] = 14
    like["text_config"]["max_position_embeddings"] = 8192
    model = toy.Qwen2VLForConditionalGeneration(toy.Qwen2VLConfig(**like))
    for part in (model, tokenizer, toy.Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, temporal_patch_size=2, min_pixels=3136, max_pixels=12544)):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def random_mllm(random_folder):
    return rrg.MLLM(str(random_folder), 65536)


@pytest.fixture(scope="session")
def photos():
    """Three pictures of three sizes: 16, 24 and 12 image tokens."""
    noise = torch.Generator().manual_seed(0)
    picture = lambda w, h: Image.fromarray(torch.randint(0, 255, (h, w, 3), generator=noise, dtype=torch.uint8).numpy())
    return [data.Photo(f"{w}x{h}", lambda image=picture(w, h): image) for w, h in ((64, 64), (64, 96), (48, 64))]
