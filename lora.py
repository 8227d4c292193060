"""lora.py: LoRA by hand: a trainable low-rank update beside a frozen linear layer, and its file,
in PEFT's format.

    y = W x + (alpha / r) B A x        W [out, in] frozen, A [r, in], B [out, r]      (LoRA, 4.1)

With the adapters on, the network is the policy that is trained. With them off (`lora_off`) it is
the network as it came: neither the reference policy of GRPO nor the listener, which judges the
answers in rrg.py, needs a copy of it.

Source: LoRA (arXiv 2106.09685, section 4.1); the file format is that of PEFT 0.19.

Where it departs from them:
1. Adapters sit on the seven projections of each layer of the language model only. The vision
   tower is frozen, so that a picture is encoded once, and lm_head has no adapter. (The
   research code adapts every linear layer, also the tower's.)
2. There is no dropout, which would make the policy that is trained differ from the one that was
   sampled.

Shapes: r rank, `in` and `out` the widths of the linear layer that is adapted.
"""

import contextlib
import json
import math
import os
import pathlib

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOWER = "visual"  # the vision tower of Qwen2-VL, whose layers partly have the same names


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable update beside it.

    A is random and B is zero, so that training starts from W x. alpha / r keeps the size of the
    update when r changes. A and B are fp32 whatever W is: a step of 1e-5 on a bf16 number is
    mostly rounded away.
    """

    def __init__(self, base, rank, alpha):
        super().__init__()
        fp32 = {"device": base.weight.device, "dtype": torch.float32}
        self.base = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **fp32)  # weight [r, in]
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, **fp32)  # weight [out, r]
        self.rank = rank
        self.alpha = alpha
        self.enabled = True
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))  # as PEFT does
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):  # [..., in]
        y = self.base(x)  # [..., out]
        if not self.enabled:
            return y
        # Cast at each use: what the optimizer steps stays in fp32, and the gradient flows back
        # through the cast.
        low = F.linear(x, self.lora_A.weight.to(x.dtype)) * (self.alpha / self.rank)  # [..., r]
        return y + F.linear(low, self.lora_B.weight.to(x.dtype))  # [..., out]


def lora_layers(model):
    """{dotted name: LoRALinear} of a model."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            layers[name] = module
    return layers


def language_linears(model):
    """{dotted name: nn.Linear} of a model's language model.

    Where `x` has an adapter already, its frozen base, `x.base`, is listed as `x`. `load_adapter`
    wants it so: it checks a new adapter before it takes the one that is there off.
    """
    linears = {}
    for name, module in model.named_modules():
        is_part_of_adapter = name.endswith((".lora_A", ".lora_B"))
        if isinstance(module, nn.Linear) and TOWER not in name and not is_part_of_adapter:
            linears[name.removesuffix(".base")] = module
    return linears


def add_lora(model, rank, alpha, *, names=None):
    """Freeze the model and adapt linear layers: the seven projections, or just `names`.

    -> dotted names of the adapted layers
    Raises ValueError where there is nothing to adapt, or where adapters are there already.
    """
    if lora_layers(model):
        raise ValueError("the model has adapters already; merge_lora(model) first")
    if names is None:
        linears = language_linears(model)
        names = [name for name in linears if name.split(".")[-1] in PROJECTIONS]
    if not names:
        raise ValueError(f"no layer to adapt: the model has none of {', '.join(PROJECTIONS)}")

    model.requires_grad_(False)
    for name in names:
        model.set_submodule(name, LoRALinear(model.get_submodule(name), rank, alpha))
    return names


@contextlib.contextmanager
def lora_off(model, when=True):
    """Inside this block the model is as it came: the reference policy, and the listener.

    when=False leaves the adapters as they are.
    """
    layers = list(lora_layers(model).values())
    before = [layer.enabled for layer in layers]  # put back as they were: blocks may be nested
    try:
        for layer in layers:
            layer.enabled = layer.enabled and not when
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def merge_lora(model):
    """Fold every adapter into its weight, W + (alpha / r) B A.   -> a plain model, for export

    In bf16 a small update is mostly rounded away, so never merge to sample faster in training.
    """
    with torch.no_grad():
        for layer in lora_layers(model).values():
            product = layer.lora_B.weight @ layer.lora_A.weight  # [out, in]
            merged = layer.base.weight.float() + (layer.alpha / layer.rank) * product
            layer.base.weight.copy_(merged)
    return remove_lora(model)


def remove_lora(model):
    """Take every adapter off and forget it.   -> the model that `add_lora` was given"""
    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.base)
    return model


def lora_state(model):
    """{"<layer>.lora_A.weight": tensor, ...}: all that training changes.

    These are views, not copies: tensor.copy_(...) writes into the model.
    """
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if ".lora_" in name}


# -------------------------------------------------------------------------------- files, whole ones
def write_atomically(path, write):
    """Call `write(temporary path)`, then move the result into place.

    Whoever reads `path` sees the old file or the new one, whole. Raises OSError if it cannot be
    written, whichever exception the writing library raises itself.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # else the new name could be an empty file after a power cut
        os.replace(temporary, path)
    except (RuntimeError, SafetensorError) as error:  # a full disk, in torch's and its words
        first_line = str(error).splitlines()[0]
        raise OSError(f"cannot write {path}: {first_line}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """`text` as a file, whole or not at all."""

    def write(temporary):
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def write_json(path, content):
    """`content` as JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=1))


# ------------------------------------------------------------------ the adapter in PEFT's format
PEFT_PREFIX = "base_model.model."  # how every key of PEFT begins
# Settings of PEFT's that leave what an adapter computes as it is. Any other that is set makes it an
# adapter of another kind.
HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",  # which layers are adapted can be seen from the tensors
    "inference_mode",
    "lora_alpha",
    "lora_dropout",  # which works in training only
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
# How A and B may have begun. Other ways (PiSSA, OLoRA, CorDA, LoftQ) changed W, too.
BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")


def save_adapter(model, folder, base=""):
    """Write the adapters as PEFT does, so that PEFT and vLLM load them.

    -> folder/adapter_model.safetensors and folder/adapter_config.json, which names `base`, the
    model that they belong to. Raises ValueError where there are no adapters.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("nothing to save: the model has no adapters")
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    tensors = {}
    for name, tensor in lora_state(model).items():
        tensors[PEFT_PREFIX + name] = tensor.cpu().contiguous()

    def write_tensors(path):
        save_file(tensors, path, metadata={"format": "pt"})

    first = next(iter(layers.values()))  # all have one rank and one alpha
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": first.rank,
        "lora_alpha": first.alpha,
        "target_modules": sorted({name.split(".")[-1] for name in layers}),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    write_atomically(folder / "adapter_model.safetensors", write_tensors)
    write_json(folder / "adapter_config.json", config)


def read_adapter_config(folder):
    """-> (rank, alpha) of a PEFT adapter. Raises ValueError on a kind not implemented here."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder} is not an adapter folder that can be read: {error}") from error

    if not isinstance(config, dict):
        raise ValueError(f"{folder} cannot be read: adapter_config.json is not an object")
    rank = config.get("r")
    alpha = config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{folder} cannot be read: adapter_config.json has no whole r above 0")
    if not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise ValueError(f"{folder} cannot be read: adapter_config.json has no lora_alpha above 0")

    different = []
    if config.get("peft_type") != "LORA":
        different.append(f"peft_type {config.get('peft_type')}")
    if config.pop("bias", "none") != "none":
        different.append("bias")
    if config.pop("init_lora_weights", True) not in BEGINNINGS:
        different.append("init_lora_weights")
    different += [name for name, value in config.items() if value and name not in HARMLESS]
    if different:
        kinds = ", ".join(different)
        raise ValueError(f"{folder} is an adapter of a kind not implemented here ({kinds})")
    return rank, alpha


def check_fit(folder, model, tensors, rank):
    """Raise ValueError where an adapter's tensors do not belong to this model, whole and exactly.

    tensors {"<layer>.lora_A.weight": tensor, ...}: the file's, without PEFT_PREFIX
    -> names of the layers
    """
    # A key as it is now, and as it was:
    #     base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight
    #     base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
    if any(name.startswith("model.layers.") for name in tensors):
        raise ValueError(
            f"{folder} has the key layout of transformers before 4.52; to convert it, rename "
            'every key\'s "model.model.layers." to "model.model.language_model.layers."'
        )
    # Each layer once, in the order of the file.
    names = list(dict.fromkeys(key.rsplit(".lora_", 1)[0] for key in tensors))
    if not names:
        raise ValueError(f"{folder} holds no adapter: its adapter_model.safetensors is empty")

    linears = language_linears(model)
    unknown = [name for name in names if name not in linears]
    if unknown:
        raise ValueError(
            f"{folder} adapts {len(unknown)} layers that this model's language model does not "
            f"have, such as {unknown[0]}"
        )

    shapes = {}
    for name in names:
        shapes[f"{name}.lora_A.weight"] = [rank, linears[name].in_features]
        shapes[f"{name}.lora_B.weight"] = [linears[name].out_features, rank]
    odd = sorted(shapes.keys() ^ tensors.keys())  # what only one of the two has
    if odd:
        raise ValueError(
            f"{folder} does not fit: {len(odd)} tensors missing or unexpected, such as {odd[0]}"
        )
    for key, shape in shapes.items():
        found = list(tensors[key].shape)
        if found != shape:
            raise ValueError(
                f"{folder} does not fit: {key} is {found}, not of rank {rank}, {shape}"
            )
    return names


def find_adapter(folder):
    """An adapter's folder, as a path. Raises ValueError that says where it is if it is not here."""
    folder = pathlib.Path(folder)
    if folder.is_dir() and not (folder / "adapter_config.json").exists():
        if (folder / "adapter/adapter_config.json").is_file():
            raise ValueError(f"{folder} is the folder of a run; give its adapter, {folder}/adapter")
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder; wanted: the adapter of a run, runs/NAME/adapter, which "
            "'python rrg.py' makes"
        )
    return folder


def load_adapter(model, folder):
    """Put a PEFT LoRA adapter on the model, in the place of adapters that it has already.

    Raises ValueError, saying what is wrong, on anything it would not reproduce exactly: other
    adapter kinds, layers outside the language model, missing, unknown or wrongly shaped tensors.
    Nothing of the model has been changed then.
    """
    folder = find_adapter(folder)
    rank, alpha = read_adapter_config(folder)
    try:
        stored = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} is not an adapter folder that can be read: {error}") from error
    tensors = {key.removeprefix(PEFT_PREFIX): value for key, value in stored.items()}

    names = check_fit(folder, model, tensors, rank)
    add_lora(remove_lora(model), rank, alpha, names=names)
    model.load_state_dict(tensors, strict=False)
