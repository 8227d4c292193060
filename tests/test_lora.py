"""Adapters: what they compute, and their file; against PEFT where that is installed."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText

import lora
import toy


class Layer(nn.Module):
    """A residual layer with two of the seven projections."""

    def __init__(self):
        super().__init__()
        self.self_attn = nn.ModuleDict(
            {"q_proj": nn.Linear(6, 6), "o_proj": nn.Linear(6, 6, bias=False)}
        )

    def forward(self, x):
        hidden = self.self_attn["q_proj"](x).tanh()
        return x + self.self_attn["o_proj"](hidden)


class Block(nn.Module):
    """Names as in Qwen2-VL: a language model, and a tower that must be left alone."""

    def __init__(self):
        super().__init__()
        language_model = nn.ModuleDict({"layers": nn.ModuleList([Layer(), Layer()])})
        tower = nn.ModuleDict({"up_proj": nn.Linear(6, 6)})
        self.model = nn.ModuleDict({"language_model": language_model, "visual": tower})
        self.lm_head = nn.Linear(6, 9)

    def forward(self, x):
        for layer in self.model["language_model"]["layers"]:
            x = layer(x)
        return self.lm_head(x)


NAMES = [
    "model.language_model.layers.0.self_attn.q_proj",
    "model.language_model.layers.0.self_attn.o_proj",
    "model.language_model.layers.1.self_attn.q_proj",
    "model.language_model.layers.1.self_attn.o_proj",
]
PARTS = ("lora_A.weight", "lora_B.weight")
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def new_block():
    """An untrained block, the same at every call."""
    torch.manual_seed(0)
    return Block()


def trained_block():
    """A block with adapters of rank 2 that have learned something."""
    model = new_block()
    lora.add_lora(model, 2, 4)
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(adapters, lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return model


def randomize(model):
    """Give every adapter of a model an update that is not zero."""
    for layer in lora.lora_layers(model).values():
        nn.init.normal_(layer.lora_B.weight, std=0.1)


# ------------------------------------------------------------------------------------- the layers
def test_a_layer_computes_the_formula():
    layer = lora.LoRALinear(nn.Linear(6, 4), rank=2, alpha=6)
    nn.init.normal_(layer.lora_B.weight)
    A = layer.lora_A.weight
    B = layer.lora_B.weight
    assert torch.allclose(layer(X), layer.base(X) + (6 / 2) * X @ A.T @ B.T, atol=1e-6)


def test_the_projections_of_the_language_model_are_adapted():
    model = new_block()
    assert lora.add_lora(model, 2, 4) == NAMES
    assert list(lora.lora_layers(model)) == NAMES


def test_lora_starts_as_the_base():
    model = new_block()
    base = model(X)
    lora.add_lora(model, 2, 4)
    assert torch.equal(model(X), base)  # bit for bit: B is zero


def test_only_the_adapters_learn():
    model = new_block()
    lora.add_lora(model, 2, 4)
    model(X).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == with_gradient == set(lora.lora_state(model))
    assert len(trained) == len(NAMES) * len(PARTS)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)

    before = new_block().state_dict()
    for name, tensor in trained_block().state_dict().items():
        if name not in trained:
            assert torch.equal(tensor, before[name.replace(".base.", ".")])


def test_lora_off_is_the_base_and_may_be_nested():
    base = new_block()(X)
    model = trained_block()
    learned = model(X)
    assert not torch.equal(learned, base)
    with lora.lora_off(model):
        with lora.lora_off(model):
            assert torch.equal(model(X), base)
        assert torch.equal(model(X), base)
    assert torch.equal(model(X), learned)


def test_lora_off_only_when_it_is_wanted():
    model = trained_block()
    learned = model(X)
    with lora.lora_off(model, when=False):
        assert torch.equal(model(X), learned)
    with lora.lora_off(model), lora.lora_off(model, when=False):
        assert not torch.equal(model(X), learned)


def test_lora_off_survives_an_exception():
    model = trained_block()
    learned = model(X)
    with pytest.raises(KeyError), lora.lora_off(model):
        raise KeyError
    assert torch.equal(model(X), learned)


def test_lora_computes_in_the_dtype_of_its_input_and_keeps_fp32():
    layer = lora.LoRALinear(nn.Linear(6, 6).bfloat16(), 2, 4)
    y = layer(X.bfloat16())
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.lora_B.weight.grad.dtype == torch.float32


def test_merge_equals_unmerged():
    model = trained_block()
    learned = model(X)
    merged = lora.merge_lora(model)
    assert not lora.lora_layers(merged)
    assert torch.allclose(merged(X), learned, atol=1e-6)


def test_remove_gives_the_base_back():
    removed = lora.remove_lora(trained_block())
    assert not lora.lora_layers(removed)
    assert torch.equal(removed(X), new_block()(X))


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(ValueError, match="has adapters already"):
        lora.add_lora(trained_block(), 2, 4)
    with pytest.raises(ValueError, match="no layer to adapt"):
        lora.add_lora(nn.Linear(2, 2), 2, 4)


# --------------------------------------------------------------------------------------- the file
def test_adapter_round_trip(tmp_path):
    model = trained_block()
    lora.save_adapter(model, tmp_path / "a", base="some/model")
    loaded = new_block()
    lora.load_adapter(loaded, tmp_path / "a")
    assert torch.equal(loaded(X), model(X))

    lora.save_adapter(loaded, tmp_path / "b", base="some/model")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_file_is_pefts(tmp_path):
    lora.save_adapter(trained_block(), tmp_path, base="some/model")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    keys = set()
    for name in NAMES:
        keys |= {f"base_model.model.{name}.{part}" for part in PARTS}
    assert set(tensors) == keys
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == "some/model"
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    assert config["target_modules"] == ["o_proj", "q_proj"]


def test_a_model_without_adapters_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="nothing to save"):
        lora.save_adapter(new_block(), tmp_path)


def test_an_adapter_takes_the_place_of_another(tmp_path):
    model = trained_block()
    lora.save_adapter(model, tmp_path)
    other = new_block()
    lora.add_lora(other, 3, 3)
    randomize(other)
    lora.load_adapter(other, tmp_path)
    assert torch.equal(other(X), model(X))


def rename_to_an_earlier_layout(config, tensors):
    """Keys as transformers before 4.52 had them; PEFT loads them as a silent no-op."""
    for key in list(tensors):
        tensors[key.replace("language_model.", "")] = tensors.pop(key)


def use_dora(config, tensors):
    config["use_dora"] = True


def be_another_kind(config, tensors):
    config["peft_type"] = "IA3"


def train_biases(config, tensors):
    config["bias"] = "all"


def forget_the_rank(config, tensors):
    del config["r"]


def lose_a_tensor(config, tensors):
    del tensors[next(iter(tensors))]


def lose_all_tensors(config, tensors):
    tensors.clear()


def adapt_an_unknown_layer(config, tensors):
    tensors["base_model.model.lm_tail.lora_A.weight"] = torch.zeros(2, 6)


def adapt_the_tower(config, tensors):
    tensors["base_model.model.model.visual.up_proj.lora_A.weight"] = torch.zeros(2, 6)


def have_another_rank(config, tensors):
    for key, tensor in tensors.items():
        if "lora_A" in key:
            tensors[key] = tensor[:1].contiguous()


def halve_the_rank(config, tensors):
    config["r"] = 1.0


def have_no_bound(config, tensors):
    config["lora_alpha"] = float("inf")


def change_the_weights_too(config, tensors):
    config["init_lora_weights"] = "pissa_niter_16"


def wait_for_an_invocation(config, tensors):
    config["alora_invocation_tokens"] = [7]


def come_from_the_future(config, tensors):
    config["use_tomorrow"] = True


@pytest.mark.parametrize(
    "spoil, message",
    [
        (use_dora, "use_dora"),
        (be_another_kind, "IA3"),
        (train_biases, r"\(bias\)"),
        (forget_the_rank, "has no whole r above 0"),
        (halve_the_rank, "has no whole r above 0"),
        (have_no_bound, "has no lora_alpha above 0"),
        (change_the_weights_too, "init_lora_weights"),
        (wait_for_an_invocation, "alora_invocation_tokens"),
        (come_from_the_future, "use_tomorrow"),
        (lose_a_tensor, "missing or unexpected"),
        (lose_all_tensors, "holds no adapter"),
        (adapt_an_unknown_layer, "does not have, such as lm_tail"),
        (adapt_the_tower, "visual"),
        (have_another_rank, r"is \[1, 6\], not of rank 2"),
        (rename_to_an_earlier_layout, "before 4.52; to convert it, rename"),
    ],
)
def test_load_refuses_what_it_would_not_reproduce(tmp_path, spoil, message):
    lora.save_adapter(trained_block(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    spoil(config, tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")

    model = trained_block()
    before = model(X)
    with pytest.raises(ValueError, match=message):
        lora.load_adapter(model, tmp_path)
    assert torch.equal(model(X), before)


def test_the_conversion_that_the_message_names_works(tmp_path):
    model = trained_block()
    lora.save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    rename_to_an_earlier_layout({}, tensors)
    save_file(tensors, file)
    loaded = new_block()
    with pytest.raises(ValueError) as error:
        lora.load_adapter(loaded, tmp_path)

    # "... rename every key's "model.model.layers." to "model.model.language_model.layers.""
    _, earlier, _, now, _ = str(error.value).split('"')
    save_file({key.replace(earlier, now): value for key, value in tensors.items()}, file)
    lora.load_adapter(loaded, tmp_path)
    assert torch.equal(loaded(X), model(X))


def test_a_run_in_the_place_of_its_adapter_is_refused_with_its_adapter(tmp_path):
    lora.save_adapter(trained_block(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="is the folder of a run; give its adapter, ") as error:
        lora.load_adapter(new_block(), tmp_path)
    lora.load_adapter(new_block(), str(error.value).split("adapter, ")[1])  # which works


def test_an_adapter_that_is_not_there_says_where_adapters_are(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("nowhere", "file"):
        with pytest.raises(ValueError, match="is not a folder; wanted: .* runs/NAME/adapter"):
            lora.load_adapter(new_block(), tmp_path / name)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not an adapter folder that can be read"):
        lora.load_adapter(new_block(), tmp_path)


# ------------------------------------------------------------------------------------------- PEFT
@pytest.fixture(scope="module")
def toy_adapter(tmp_path_factory):
    """An adapter of the toy model that changes what it says, as a folder."""
    folder = tmp_path_factory.mktemp("adapter")
    model = load_toy()
    torch.manual_seed(0)
    lora.add_lora(model, 4, 8)
    randomize(model)
    lora.save_adapter(model, folder, base=toy.FOLDER)
    return folder


def load_toy():
    return AutoModelForImageTextToText.from_pretrained(toy.FOLDER, dtype=torch.float32).eval()


def test_the_adapter_loads_in_peft_and_answers_the_same(toy_adapter):
    peft = pytest.importorskip("peft", reason="pip install peft to compare with it")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(load_toy(), toy_adapter)
    # In these words PEFT reports keys that are missing or unexpected.
    assert not any("adapter keys" in str(warning.message) for warning in caught)
    ours = load_toy()
    lora.load_adapter(ours, toy_adapter)

    ids = torch.randint(8, 70, (1, 12))
    base = load_toy()(input_ids=ids).logits
    logits = ours(input_ids=ids).logits
    assert torch.allclose(theirs(input_ids=ids).logits, logits, atol=1e-5)
    assert not torch.allclose(logits, base, atol=1e-5)
    with theirs.disable_adapter(), lora.lora_off(ours):
        assert torch.allclose(theirs(input_ids=ids).logits, base, atol=1e-5)
        assert torch.equal(ours(input_ids=ids).logits, base)


# ------------------------------------------------------------------------------------ whole files
def test_writing_that_fails_leaves_the_earlier_file(tmp_path):
    file = tmp_path / "x"
    file.write_text("earlier")

    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        lora.write_atomically(file, fail)
    assert file.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [file]


def test_torchs_word_for_a_full_disk_is_an_oserror(tmp_path):
    def fail(path):
        raise RuntimeError("PytorchStreamWriter failed\nand a long story")

    with pytest.raises(OSError, match="cannot write .*x: PytorchStreamWriter failed$"):
        lora.write_atomically(tmp_path / "x", fail)
    assert list(tmp_path.iterdir()) == []


def test_text_and_json_are_written_whole(tmp_path):
    lora.write_text(tmp_path / "text", "Tasse à café\n")
    assert (tmp_path / "text").read_text(encoding="utf-8") == "Tasse à café\n"
    lora.write_json(tmp_path / "json", {"a": [1, None]})
    assert json.loads((tmp_path / "json").read_text()) == {"a": [1, None]}
    with pytest.raises(TypeError):
        lora.write_json(tmp_path / "json", object())
    assert json.loads((tmp_path / "json").read_text()) == {"a": [1, None]}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["json", "text"]
