"""The model: what is read once and continued many times equals the plain model, row by row."""

import json
import shutil
import sys
import threading
from dataclasses import dataclass

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from conftest import ROOT, plain_logps, plain_row, prompts_about, save_checkpoint

sys.path.insert(0, str(ROOT / "benchmarks"))

import lora  # noqa: E402
import make  # noqa: E402
import memory  # noqa: E402
import model  # noqa: E402
import repic  # noqa: E402
import reward  # noqa: E402
from data import DataError, Photo  # noqa: E402
from model import MLLM, PICTURE, Clip, Prompt, chunks  # noqa: E402


def uniforms(max_tokens, rows, seed=0):
    """Random numbers to sample by.   -> [max_tokens, rows]"""
    return torch.rand(max_tokens, rows, generator=torch.Generator().manual_seed(seed))


def random_ids(rows, tokens):
    """Answers of ordinary words, the same at every call.   -> [rows, tokens]"""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(8, 70, (rows, tokens), generator=generator)


# ---------------------------------------------------------------------------- the two primitives
def test_sampling_scoring_and_the_plain_model_agree(random_mllm, photos):
    """Three picture sizes, so left padding; four answers each, so shared prefixes."""
    prompts = prompts_about(photos)
    answers = random_mllm.speak(prompts, samples=4, max_tokens=12, uniforms=uniforms(12, 12, 1))
    scored = random_mllm.log_probs(prompts, answers.ids)
    assert answers.mask.shape == answers.ids.shape == scored.shape
    assert torch.allclose(scored[answers.mask], answers.logps[answers.mask], atol=1e-5)

    compared = set()
    for row in range(12):
        ids = answers.ids[row][answers.mask[row]]
        # An untrained model may write an image marker, which the plain model takes for a photo.
        if random_mllm.config.image_token_id in ids:
            continue
        logps = plain_logps(random_mllm, prompts[row // 4], ids)
        assert torch.allclose(logps, answers.logps[row][answers.mask[row]], atol=1e-5)
        compared.add(row // 4)
    assert compared == {0, 1, 2}


def test_several_photos_in_a_prompt_are_read_as_the_plain_model_reads_them(random_mllm, photos):
    """One, two and three photos of different sizes in one batch, each before its text."""
    small, tall, narrow = photos
    prompts = [
        Prompt([small], reward.speaker_prompt(small, "object")),
        Prompt([tall, narrow], reward.LISTEN.replace("{text}", "")),
        Prompt([narrow, small, tall], "red mug"),
    ]
    ids = random_ids(6, 5)
    scored = random_mllm.log_probs(prompts, ids)
    for row in range(6):
        logps = plain_logps(random_mllm, prompts[row // 2], ids[row])
        assert torch.allclose(logps, scored[row], atol=1e-5)


def test_photos_may_stand_within_the_text(random_mllm, photos):
    small, tall, _ = photos
    words = f"mug {PICTURE}red {PICTURE}? yes"
    chat = random_mllm.chat(2, words)
    marker = random_mllm.image_token
    picture = f"<|vision_start|>{marker}<|vision_end|>"
    assert f"mug {picture}red {picture}? yes" in chat
    assert random_mllm.chat(2, "red") == random_mllm.chat(2, f"{PICTURE}{PICTURE}red")

    prompt = Prompt([small, tall], words)
    ids = random_ids(1, 5)
    [scored] = random_mllm.log_probs([prompt], ids)
    assert torch.allclose(plain_logps(random_mllm, prompt, ids[0]), scored, atol=1e-5)


def test_text_alone_can_be_read(toy_mllm):
    texts = [
        "<|im_start|>user yes<|im_end|>",
        "<|im_start|>user A photo of a red mug<|im_end|>",
    ]
    prefix = toy_mllm.prefill(texts, [[], []])
    for row, text in enumerate(texts):
        ids = torch.tensor([toy_mllm.encode(text)])
        plain = toy_mllm.model.model(input_ids=ids).last_hidden_state[:, -1]
        assert torch.allclose(prefix.last[row], plain, atol=1e-4)


def new_qwen25_vl(tokenizer):
    """A tiny Qwen2.5-VL, untrained, with the toy's language model."""
    toy_config = make.new_model(tokenizer).config
    text = toy_config.text_config.to_dict() | {"model_type": "qwen2_5_vl_text"}
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 2,
        "out_hidden_size": toy_config.text_config.hidden_size,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "window_size": 32,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=toy_config.image_token_id,
        video_token_id=toy_config.video_token_id,
        vision_start_token_id=toy_config.vision_start_token_id,
        vision_end_token_id=toy_config.vision_end_token_id,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def test_qwen25_vl_plays_too(tmp_path, photos):
    """Its other vision tower and positions go through the same code."""
    torch.manual_seed(0)
    tokenizer = make.new_tokenizer()
    model = new_qwen25_vl(tokenizer)
    save_checkpoint(tmp_path, model, tokenizer, patch_size=8, min_pixels=1024, max_pixels=65536)
    mllm = MLLM(str(tmp_path), 65536)
    # Its tower has layers of the same names as the language model.
    assert not [name for name in lora.add_lora(mllm.model, 2, 4) if "visual" in name]

    prompts = prompts_about(photos)
    ids = random_ids(3, 6)
    scored = mllm.log_probs(prompts, ids)
    for row in range(3):
        logps = plain_logps(mllm, prompts[row], ids[row])
        assert torch.allclose(logps, scored[row], atol=1e-5)


def test_gradients_through_the_shared_prefix_equal_the_plain_ones(random_mllm, photos):
    torch.manual_seed(0)
    lora.add_lora(random_mllm.model, 4, 8)
    for layer in lora.lora_layers(random_mllm.model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    prompts = prompts_about(photos)
    ids = random_ids(6, 5)
    weights = torch.randn(6, 5)

    def gradient(logps):
        """-> the gradient of all adapters as one vector"""
        random_mllm.model.zero_grad()
        (logps * weights).sum().backward()
        adapters = [p for p in random_mllm.model.parameters() if p.requires_grad]
        return torch.cat([p.grad.flatten() for p in adapters])

    plain = []
    for row in range(6):
        plain.append(plain_logps(random_mllm, prompts[row // 2], ids[row]))
    plain = gradient(torch.stack(plain))

    one_by_one = []
    for i in range(3):
        rows = slice(2 * i, 2 * i + 2)
        one_by_one.append(random_mllm.log_probs(prompts[i : i + 1], ids[rows]))
    one_by_one = gradient(torch.cat(one_by_one))

    shared = gradient(random_mllm.log_probs(prompts, ids))
    tolerance = 1e-4 * plain.abs().max().item()
    assert torch.allclose(shared, plain, atol=tolerance)
    assert torch.allclose(shared, one_by_one, atol=tolerance)


def test_a_prefix_is_left_as_it_was_by_its_copies(random_mllm, photos):
    [prompt] = prompts_about(photos[:1])
    prefix = random_mllm.prefill_prompts([prompt], copies=1)
    position = prefix.position.clone()
    ids = random_ids(2, 3)
    rows = torch.tensor([0, 0])
    first = random_mllm.extend(prefix.take(rows), ids)
    again = random_mllm.extend(prefix.take(rows), ids)
    assert torch.equal(first, again)
    assert torch.equal(prefix.position, position)
    assert prefix.cache.get_seq_length() == prefix.mask.shape[1]


# --------------------------------------------------------------------------------------- sampling
def test_answers_end_at_any_of_the_end_tokens(random_mllm, photos):
    ends = random_mllm.ends.tolist()
    assert len(ends) == 2
    answers = random_mllm.speak(
        prompts_about(photos), samples=40, max_tokens=40, uniforms=uniforms(40, 120)
    )
    found = set()
    for ids, mask, text in zip(answers.ids.tolist(), answers.mask, answers.texts, strict=True):
        places = [place for place, token in enumerate(ids) if token in ends]
        length = len(ids)
        if places:
            length = places[0] + 1  # up to and including the first end
            found.add(ids[places[0]])
        assert mask.tolist() == [place < length for place in range(len(ids))]
        for end in ends:
            assert random_mllm.tokenizer.decode([end]) not in text
    assert found == set(ends)


def test_no_end_token_is_lost(byte_folder, tmp_path):
    """Also where the end of text is the tokenizer's unknown word, as Qwen2's is by default."""
    shutil.copytree(byte_folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["unk_token"] = "<|endoftext|>"
    file.write_text(json.dumps(config))
    ids = AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids(
        ["<|endoftext|>", "<|im_end|>"]
    )
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    mllm = MLLM(str(tmp_path), 12544)
    assert mllm.tokenizer.unk_token_id == ids[0]
    assert mllm.ends.tolist() == sorted(ids)


def test_a_checkpoint_of_another_format_is_one_line(random_folder, tmp_path):
    """Weights in pickles could run code when they are read."""
    shutil.copytree(random_folder, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(DataError, match="cannot load the model .*model.safetensors"):
        MLLM(str(tmp_path), 12544)


def test_nothing_is_computed_beyond_the_longest_answer(random_mllm, photos):
    prompts = prompts_about(photos[:2])
    ids = random_ids(4, 6)
    mask = torch.ones(4, 6).bool()
    mask[:, 4:] = False
    mask[1, 2:] = False
    whole = random_mllm.log_probs(prompts, ids)
    cut = random_mllm.log_probs(prompts, ids, mask)
    assert torch.allclose(cut[mask], whole[mask], atol=1e-6)
    assert cut.shape == whole.shape
    assert (cut[:, 4:] == 0).all()


def test_samples_differ_whatever_the_checkpoint_asks_for(random_mllm, photos):
    assert random_mllm.model.generation_config.top_k == 1
    prompts = prompts_about(photos[:1])
    texts = random_mllm.speak(prompts, 8, 10, uniforms(10, 8)).texts
    assert len(set(texts)) == 8
    assert random_mllm.speak(prompts, 8, 10, uniforms(10, 8)).texts == texts
    assert random_mllm.speak(prompts, 8, 10, uniforms(10, 8, seed=1)).texts != texts


def test_without_random_numbers_answers_are_greedy(random_mllm, photos):
    prompts = prompts_about(photos)
    answers = random_mllm.speak(prompts, samples=2, max_tokens=6)
    assert answers.texts[0::2] == answers.texts[1::2] == random_mllm.greedy(prompts, 6)
    row, inputs = plain_row(random_mllm, prompts[0])
    likeliest = random_mllm.model(input_ids=row, **inputs).logits[0, -1].argmax()
    assert answers.ids[0, 0] == likeliest


def test_sampling_follows_the_models_own_distribution(random_mllm, photos):
    """Evenly spread numbers draw each token as often as its probability says."""
    prefix = random_mllm.prefill_prompts(prompts_about(photos[:1]), copies=4000)
    prefix.last = 3 * prefix.last  # some words are far more likely than others
    expected = random_mllm.model.lm_head(prefix.last[0]).softmax(-1)  # [V]
    assert expected.max() > 10 / len(expected)
    even = (torch.arange(4000) + 0.5)[None] / 4000  # [1, 4000]
    tokens = random_mllm.sample(prefix, 1, even).ids[:, 0]
    share = torch.bincount(tokens, minlength=len(expected)) / 4000
    assert (share - expected).abs().max() < 1 / 4000


def test_the_largest_random_number_draws_a_token_too(random_mllm, photos):
    """The sum of all probabilities is often a little less than 1; nothing lies beyond its end."""
    largest = torch.full((20, 3), 1 - 2**-24)
    answers = random_mllm.speak(prompts_about(photos), max_tokens=20, uniforms=largest)
    assert answers.ids.max() < random_mllm.model.lm_head.out_features
    assert answers.logps[answers.mask].isfinite().all()


# --------------------------------------------------------------------------------------- listening
@dataclass
class Read:
    """What the model made of one pair of a photo and a text."""

    last: torch.Tensor  # [D]
    answer: str


def read_pairs(mllm, pairs):
    """-> {pair: Read}"""
    found = {}
    for some_pairs, prefix in mllm.prefill_pairs(reward.LISTEN, pairs):
        lasts = prefix.last
        texts = mllm.sample(prefix, 6).texts
        for pair, last, text in zip(some_pairs, lasts, texts, strict=True):
            assert pair not in found
            found[pair] = Read(last, text)
    return found


def test_pairs_of_any_length_are_answered_as_if_alone(random_mllm, photos):
    """Padding between the shared prefix and the answer changes nothing."""
    texts = [
        "red",
        "A photo of a red mug with a star badge on grass",
        "The mug , tilted on sand in dim light .",
    ]
    pairs = [(photo, text) for photo in photos for text in texts]
    # A pair that comes twice is read once.
    together = read_pairs(random_mllm, pairs + pairs[:1])
    assert set(together) == set(pairs)
    for pair in pairs:
        [alone] = read_pairs(random_mllm, [pair]).values()
        assert torch.allclose(together[pair].last, alone.last, atol=1e-5)
        assert together[pair].answer == alone.answer

    expected = [together[pair].answer for pair in pairs]
    assert random_mllm.answer(reward.LISTEN, pairs, 6) == expected


def test_pairs_are_padded_together_and_not_alone(random_mllm, photos):
    pairs = [(photo, text) for photo in photos for text in ("red", "A photo of a red mug")]
    [(some_pairs, together)] = random_mllm.prefill_pairs(reward.LISTEN, pairs)
    assert len(some_pairs) == 6 and not together.mask.all()
    [(_, alone)] = random_mllm.prefill_pairs(reward.LISTEN, pairs[:1])
    assert alone.mask.all()


def test_beliefs_are_the_same_in_any_company(toy_mllm, photos, monkeypatch):
    """They do not depend on what else is asked: padding, order, repeats, size of a batch."""
    texts = [
        "A photo of a red mug. The red mug.",
        "A photo of a bag. The dotted bag with a star badge, on sand.",
    ]
    pairs = [(photo, text) for photo in photos for text in texts]
    alone = torch.cat([toy_mllm.believe([pair]) for pair in pairs])
    assert ((alone > 0) & (alone < 1)).all()

    together = toy_mllm.believe(pairs + pairs[:1])
    assert torch.allclose(together, torch.cat([alone, alone[:1]]), atol=1e-5)
    assert torch.allclose(toy_mllm.believe(pairs[::-1]), alone.flip(0), atol=1e-5)
    assert torch.allclose(toy_mllm.compare(photos, texts), alone.view(3, 2), atol=1e-5)
    monkeypatch.setattr("model.ROWS", 2)
    assert torch.allclose(toy_mllm.believe(pairs), alone, atol=1e-5)


def test_belief_is_in_the_first_answer_token_of_the_plain_model(toy_mllm, photos):
    text = "A photo of a red mug. The red mug."
    prompt = Prompt(photos[:1], reward.LISTEN.replace("{text}", f'"{text}"'))
    row, inputs = plain_row(toy_mllm, prompt)
    logits = toy_mllm.model(input_ids=row, **inputs).logits[0, -1]  # [V]
    [yes] = toy_mllm.encode("yes")
    [no] = toy_mllm.encode("no")
    [belief] = toy_mllm.believe([(photos[0], text)])
    assert torch.allclose(belief, torch.sigmoid(logits[yes] - logits[no]), atol=1e-5)


def test_the_listener_is_the_model_with_lora_off(random_mllm, photos):
    pairs = [(photos[0], "A photo of a mug. The mug.")]
    before = random_mllm.believe(pairs)
    lora.add_lora(random_mllm.model, 4, 8)
    for layer in lora.lora_layers(random_mllm.model).values():
        torch.nn.init.normal_(layer.lora_B.weight)
    assert not torch.equal(random_mllm.believe(pairs), before)
    with lora.lora_off(random_mllm.model):
        assert torch.equal(random_mllm.believe(pairs), before)


# --------------------------------------------------------------------------------- words and photos
def test_every_single_token_spelling_of_yes_and_no_counts(toy_mllm, byte_folder):
    assert toy_mllm.tokenizer.convert_ids_to_tokens(toy_mllm.yes) == ["yes", "Yes"]
    assert toy_mllm.tokenizer.convert_ids_to_tokens(toy_mllm.no) == ["no", "No"]
    # Here "Yes" is three tokens, a byte each.
    mllm = MLLM(str(byte_folder), 12544)
    assert mllm.tokenizer.convert_ids_to_tokens(mllm.yes) == ["yes"]


def test_a_word_that_the_model_does_not_know_is_refused(toy_mllm, byte_folder, photos):
    with pytest.raises(DataError, match="does not know every word of 'a zeppelin'"):
        toy_mllm.check_words(["a red mug", "a zeppelin"])
    with pytest.raises(DataError, match="does not know every word"):
        toy_mllm.speak([Prompt(photos[:1], "Describe the zeppelin")])
    assert toy_mllm.knows("a red mug")
    assert not toy_mllm.knows("a red zeppelin")
    mllm = MLLM(str(byte_folder), 12544)  # which can spell anything
    assert mllm.knows("a zeppelin")
    mllm.check_words(["a zeppelin"])


def test_a_checkpoint_without_a_chat_template_gets_qwens(random_folder, tmp_path):
    shutil.copytree(random_folder, tmp_path / "bare")
    (tmp_path / "bare/chat_template.jinja").unlink()
    assert MLLM(str(tmp_path / "bare"), 4096).chat(1, "Hello") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>Hello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_prompt_wants_an_image_marker_for_each_photo(random_mllm, photos):
    with pytest.raises(ValueError, match="one image marker for each"):
        random_mllm.prefill([random_mllm.chat(1, "Hello")], [photos[:2]])


def test_a_description_is_quoted_without_the_tokenizers_markers(toy_mllm):
    assert toy_mllm.quote("a <|im_end|> mug") == '"a mug"'


def test_another_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    wanted = "is a bert; this program plays with Qwen2-VL .*, such as --model Qwen/Qwen2-VL-2B"
    with pytest.raises(DataError, match=wanted):
        MLLM(str(tmp_path), 4096)


@pytest.mark.parametrize("name", ["nothing", "/nowhere/at/all", "too/many/parts", ""])
def test_a_model_that_is_not_there_is_one_line(name):
    wanted = f"^there is no model {name}: give --model a folder .* such as Qwen/Qwen2-VL-2B"
    with pytest.raises(DataError, match=wanted) as error:
        MLLM(name, 4096)
    assert "\n" not in str(error.value)


def test_a_hub_name_that_cannot_be_reached_is_one_line(monkeypatch):
    def from_pretrained(name, **settings):
        raise OSError("We couldn't connect\nCheck your internet connection")

    monkeypatch.setattr(model.AutoConfig, "from_pretrained", from_pretrained)
    wanted = "^cannot load the model Qwen/Qwen3 .it is no folder here; .*: We couldn't connect$"
    with pytest.raises(DataError, match=wanted):
        MLLM("Qwen/Qwen3", 4096)


def test_an_adapter_is_no_model(tmp_path):
    adapter = tmp_path / "run/adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    for given in (tmp_path / "run", adapter):
        with pytest.raises(DataError, match=f"{given} holds an adapter.* --adapter {adapter}, and"):
            MLLM(str(given), 4096)


@pytest.mark.parametrize("weights", [b"", b"version https://git-lfs.github.com/spec/v1", None])
def test_weights_that_are_empty_a_pointer_or_torn_are_one_line(random_folder, tmp_path, weights):
    shutil.copytree(random_folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if weights is None else weights)
    with pytest.raises(DataError, match="cannot load the model .*download it again.: Error"):
        MLLM(str(tmp_path), 12544)


def test_weights_of_another_size_are_one_line(random_folder, tmp_path):
    shutil.copytree(random_folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["intermediate_size"] = 64
    file.write_text(json.dumps(config))
    with pytest.raises(DataError, match="cannot load the model"):
        MLLM(str(tmp_path), 12544)


def test_the_size_of_a_picture_is_that_which_the_model_sees(random_folder):
    mllm = MLLM(str(random_folder), 4096)
    small = Photo("small", Image.new("RGB", (48, 64)).copy)
    large = Photo("large", Image.new("RGB", (240, 480)).copy)
    assert mllm.picture_size(small) == (48, 64)
    width, height = mllm.picture_size(large)
    assert width * height <= 4096
    assert width % 16 == height % 16 == 0  # whole image tokens


def count_encoded(mllm, monkeypatch):
    """A list that gets, at each pass of the vision tower, the number of its photos."""
    encoded = []
    tower = mllm.model.model.get_image_features

    def count(pixels, grids):
        encoded.append(len(grids))
        return tower(pixels, grids)

    monkeypatch.setattr(mllm.model.model, "get_image_features", count)
    return encoded


def test_a_photo_is_encoded_once(random_mllm, photos, monkeypatch):
    encoded = count_encoded(random_mllm, monkeypatch)
    random_mllm.speak(prompts_about(photos + photos), max_tokens=2)
    random_mllm.believe([(photo, "red mug") for photo in photos])
    assert sum(encoded) == 3


def test_features_are_kept_on_the_cpu_and_not_without_bound(random_mllm, photos, monkeypatch):
    """Room for two: the one that was wanted last stays."""
    small, tall, narrow = photos
    random_mllm.features.clear()
    sizes = [encoded.features.nbytes for encoded in random_mllm.encode_photos(photos)]
    assert all(encoded.features.device.type == "cpu" for encoded in random_mllm.features.values())
    random_mllm.features.clear()
    monkeypatch.setattr(model, "FEATURES", sizes[0] + sizes[2])
    before = random_mllm.encode_photos([small, tall])
    random_mllm.encode_photos([small])
    random_mllm.encode_photos([narrow])
    assert list(random_mllm.features) == [small, narrow]
    # What was forgotten is looked at again, also where not all of a batch has room.
    again = random_mllm.encode_photos([tall, small, narrow])
    assert torch.equal(again[0].features, before[1].features)
    assert torch.equal(again[1].features, before[0].features)
    monkeypatch.undo()
    random_mllm.features.clear()


def test_photos_are_read_at_the_same_time(random_mllm):
    """Neither can be read before the other is begun."""
    both = threading.Barrier(2, timeout=10)

    def load():
        both.wait()
        return Image.new("RGB", (64, 64))

    assert len(random_mllm.encode_photos([Photo("one", load), Photo("other", load)])) == 2


def remembered_bytes(mllm):
    return sum(encoded.features.nbytes for encoded in mllm.features.values())


def test_what_is_remembered_of_many_photos_has_a_bound(random_mllm, monkeypatch):
    """A hundred photos of 4 x 4 image tokens, and room for twenty."""
    random_mllm.features.clear()
    bound = 20 * 16 * make.WIDTH * 4  # fp32
    monkeypatch.setattr(model, "FEATURES", bound)
    photos = []
    for number in range(100):
        photos.append(Photo(f"many/{number}", Image.new("RGB", (64, 64), (number, 0, 0)).copy))
    most = 0
    for some_photos in chunks(photos, 10):
        random_mllm.embed(some_photos)
        most = max(most, remembered_bytes(random_mllm))
    assert most == bound
    assert list(random_mllm.features) == photos[-20:]
    # More photos than there is room for can be read at once, and are not all remembered.
    assert len(random_mllm.encode_photos(photos)) == 100
    assert remembered_bytes(random_mllm) == bound
    random_mllm.features.clear()


def test_scenes_are_forgotten_and_their_photos_are_not(random_mllm, photos, monkeypatch):
    """RePIC makes a collage for each task: encoded once in its step, and gone in the next."""
    random_mllm.features.clear()
    encoded = count_encoded(random_mllm, monkeypatch)
    for step in range(5):
        scene, _ = repic.collage(photos, 32, step)
        prompts = [Prompt([photo, scene], "red mug") for photo in photos]
        random_mllm.speak(prompts, max_tokens=2)
        random_mllm.log_probs(prompts[:1], random_ids(1, 2))
        random_mllm.log_probs(prompts[1:], random_ids(2, 2))
        assert set(random_mllm.features) == {*photos, scene}
    assert sum(encoded) == len(photos) + 5


def test_the_memory_that_is_counted_is_what_tensors_take(toy_mllm, photos):
    """benchmarks/memory.py, at the sizes of the toy model; which has fp32 here, counted is bf16."""
    text = toy_mllm.config.text_config
    sizes = memory.Sizes(
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        image_tokens=16,
    )
    [encoded] = toy_mllm.encode_photos(photos[:1])
    assert 2 * memory.photo_bytes(sizes) == encoded.features.nbytes

    prefix = toy_mllm.prefill_prompts(prompts_about(photos), copies=2)
    taken = 0
    for layer in prefix.cache.layers:
        taken += layer.keys.nbytes + layer.values.nbytes
    rows, tokens = prefix.mask.shape
    assert 2 * memory.cache_bytes(sizes, rows, tokens) == taken


def test_the_memory_of_photos_at_full_size(capsys):
    """512 image tokens of width 1536 in bf16; and 28 layers of two heads of 128, keys and values,
    in bf16, are 28672 bytes a token."""
    sizes = memory.Sizes()
    assert memory.photo_bytes(sizes) == 1_572_864
    # 16 prompts of 640 tokens, 128 continued by 256; 128 prompts, and as many continued.
    assert memory.speaking_bytes(sizes) == 28672 * (16 * 640 + 128 * 896)
    features = 128 * 1_572_864
    assert memory.listening_bytes(sizes) == features + 28672 * 128 * (640 + 896)
    memory.show_photos(sizes)
    assert "1.57 MB each, at most 4.3 GB, which is 2730 photos" in capsys.readouterr().out


def test_features_are_taken_off_the_device_that_made_them(random_mllm, monkeypatch):
    """The meta device stands for a GPU: nothing can be copied from it, and the try is an error."""
    tower = random_mllm.model.model.get_image_features

    def elsewhere(pixels, grids):
        output = tower(pixels, grids)
        output.pooler_output = [features.to("meta") for features in output.pooler_output]
        return output

    monkeypatch.setattr(random_mllm.model.model, "get_image_features", elsewhere)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
        random_mllm.encode_photos([Photo("far", Image.new("RGB", (64, 64)).copy)])


def test_the_model_measures_similarity(random_mllm, photos):
    vectors = random_mllm.embed(photos)
    assert list(vectors) == [photo.name for photo in photos]
    for vector in vectors.values():
        assert vector.norm().item() == pytest.approx(1)


def test_chunks_are_all_items_in_order():
    assert list(chunks([1, 2, 3, 4, 5], 2)) == [[1, 2], [3, 4], [5]]
    assert list(chunks([], 2)) == []


# -------------------------------------------------------------------------------------------- CLIP
@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP of the real architecture with random weights, which knows three words."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    vocabulary = {"<unk>": 0, "<end>": 1, "a": 2, "red": 3, "mug": 4}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="<end>", pad_token="<end>"
    )

    size = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {"vocab_size": 5, "eos_token_id": 1, "max_position_embeddings": 77}
    vision = {"image_size": 8, "patch_size": 4}
    config = CLIPConfig(text_config=size | text, vision_config=size | vision, projection_dim=8)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}
    )
    for part in (CLIPModel(config), tokenizer, processor):
        part.save_pretrained(folder)
    return folder


def test_any_clip_measures_similarity(clip_folder, photos):
    """Of photos with photos, and of photos with words."""
    clip = Clip(str(clip_folder), "cpu")
    vectors = clip.embed(photos)
    assert list(vectors) == [photo.name for photo in photos]
    for vector in vectors.values():
        assert vector.norm().item() == pytest.approx(1, abs=1e-5)

    together = clip.compare(photos, ["a red mug", "mug " * 200])
    assert together.shape == (3, 2)
    assert together.abs().max() <= 1 + 1e-5
    assert len(set(together.flatten().tolist())) == 6
    alone = clip.compare(photos[1:2], ["a red mug"])
    assert torch.allclose(together[1, 0], alone[0, 0], atol=1e-5)


def test_a_clip_that_cannot_be_loaded_is_one_line(tmp_path):
    with pytest.raises(DataError, match="cannot load the CLIP model"):
        Clip(str(tmp_path / "nothing"), "cpu")
