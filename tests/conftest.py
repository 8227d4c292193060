"""What several tests need: the plain model, photos, two untrained checkpoints and the toy model."""

import pathlib
import sys

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

ROOT = pathlib.Path(__file__).parent.parent
# So that `python -m pytest` finds the scripts from anywhere.
sys.path.insert(0, str(ROOT / "toy-qwen2-vl"))
sys.path.insert(0, str(ROOT))

import make  # noqa: E402
import reward  # noqa: E402
import rrg  # noqa: E402
import run  # noqa: E402
import toy  # noqa: E402
from data import Photo  # noqa: E402
from model import MLLM, Prompt  # noqa: E402

TOY = run.fill_in(rrg.Config, {}, is_toy=True)  # the settings of the toy model


def prompts_about(photos):
    """The speaker's prompts about single photos."""
    return [Prompt([photo], reward.speaker_prompt(photo, "object")) for photo in photos]


def plain_row(mllm, prompt, ids=None):
    """A prompt, and an answer [C] to it, as one row of the plain model's input.

    -> (token ids [1, T], the inputs of its forward pass)
    """
    text = mllm.chat(len(prompt.photos), prompt.text)
    text = mllm.repeat_image_token(text, mllm.encode_photos(prompt.photos))
    row = torch.tensor([mllm.encode(text)])
    if ids is not None:
        row = torch.cat([row, ids[None]], 1)
    pictures = [photo.load() for photo in prompt.photos]
    inputs = dict(mllm.processor(images=pictures, return_tensors="pt"))
    inputs["mm_token_type_ids"] = (row == mllm.config.image_token_id).int()
    return row, inputs


def plain_logps(mllm, prompt, ids):
    """Log-probs [C] of one answer by the model's own forward pass: no cache, no shared prefix, no
    padding."""
    row, inputs = plain_row(mllm, prompt, ids)
    logps = mllm.model(input_ids=row, **inputs).logits[0].log_softmax(-1)  # [T, V]
    return logps[-len(ids) - 1 : -1].gather(1, ids[:, None]).squeeze(1)


def save_checkpoint(folder, model, tokenizer, patch_size, min_pixels, max_pixels):
    """Write a checkpoint folder as MLLM reads it."""
    processor = Qwen2VLImageProcessorPil(
        patch_size=patch_size,
        merge_size=2,
        temporal_patch_size=2,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
    )
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)


@pytest.fixture(scope="session", autouse=True)
def leave_the_repository(tmp_path_factory):
    """What goes to the working directory, such as runs/photos.json, stays out of the repository."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("here"))
        yield


@pytest.fixture(scope="session")
def toy_mllm():
    """The shipped toy model. It must stay as it is: a test that adds adapters loads another."""
    return MLLM(str(toy.FOLDER), TOY.max_pixels)


@pytest.fixture(autouse=True)
def forget_photos(request):
    """Photos of different toy worlds have the same names, by which the toy model remembers them."""
    yield
    if "toy_mllm" in request.fixturenames:
        request.getfixturevalue("toy_mllm").features.clear()


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory):
    """An untrained toy model whose checkpoint asks for sampling that makes all samples the same,
    as Qwen2-VL's own does."""
    folder = tmp_path_factory.mktemp("random")
    torch.manual_seed(0)
    tokenizer = make.new_tokenizer()
    model = make.new_model(tokenizer)
    model.generation_config.update(do_sample=True, top_k=1, top_p=0.001, temperature=0.01)
    save_checkpoint(folder, model, tokenizer, patch_size=8, min_pixels=1024, max_pixels=65536)
    return folder


@pytest.fixture
def random_mllm(random_folder):
    return MLLM(str(random_folder), 65536)


@pytest.fixture(scope="session")
def byte_folder(tmp_path_factory):
    """An untrained checkpoint that is no toy: it has Qwen2-VL's patch size, and a tokenizer that
    can spell anything, a byte a token."""
    folder = tmp_path_factory.mktemp("bytes")
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    settings = make.new_model(tokenizer).config.to_dict()
    settings["vision_config"]["patch_size"] = 14
    settings["text_config"]["max_position_embeddings"] = 8192
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**settings))
    save_checkpoint(folder, model, tokenizer, patch_size=14, min_pixels=3136, max_pixels=12544)
    return folder


def byte_tokenizer():
    """One token for each byte, for yes and no, and for the chat markers."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*letters, "ye", "yes", "no"])}
    core = Tokenizer(models.BPE(vocabulary, [("y", "e"), ("ye", "s"), ("n", "o")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    # All of the toy's markers but <unk>: there is no unknown word.
    core.add_special_tokens([token for token in make.SPECIAL if token != "<unk>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=make.new_tokenizer().chat_template,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
    )


@pytest.fixture(scope="session")
def photos():
    """Three photos of three sizes: 16, 24 and 12 image tokens."""
    noise = torch.Generator().manual_seed(0)
    photos = []
    for width, height in ((64, 64), (64, 96), (48, 64)):
        pixels = torch.randint(0, 255, (height, width, 3), generator=noise, dtype=torch.uint8)
        # `copy` of one picture: each call hands out its own.
        photos.append(Photo(f"{width}x{height}", Image.fromarray(pixels.numpy()).copy))
    return photos
