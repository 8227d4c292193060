"""grpo.py: the learner. Group-relative policy optimization (GRPO) and low-rank adapters (LoRA), as pure functions of tensors.

This file knows nothing about pictures, games or prompts. From log-probabilities and rewards it makes a loss; to a model it adds a few
trainable matrices. Read `group_advantages`, `kl_k3` and `grpo_loss`: they are the whole algorithm, which needs no value network, because
the mean reward of the other answers to the same prompt is the baseline.

Sources: GRPO (DeepSeekMath, arXiv 2402.03300, eq. 3-4), PPO's clip (1707.06347, eq. 7), the k3 estimator (Schulman 2020,
joschu.net/blog/kl-approx.html), Dr. GRPO (2503.20783), DAPO (2503.14476), LoRA (2106.09685, section 4.1).

Where it departs from them:
1. The standard deviation of a group has a floor. Rewards here are made of probabilities, so G equally good answers differ a little, by
   0.01 say, and (r - mean) / std would blow that noise up to advantages of +-1. A group whose rewards are all equal gets exactly 0.
2. Adapters sit on the language model only, without dropout: the vision tower is frozen so that a picture is encoded once, and dropout
   would make the policy that is trained differ from the one that was sampled.

Shapes: B prompts, G samples per prompt, N = B*G sequences, C completion (answer) length, V vocabulary. (In the part on LoRA, A, B and r are its own
paper's letters: the two matrices of an adapter and their rank.)
"""
import contextlib
import json
import math
import os
import pathlib
import re

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # the seven of each decoder layer


# ------------------------------------------------------------------------------------------------------------------- GRPO
def group_advantages(rewards, *, std_floor=0.0):
    """How much better is each answer than its siblings, the other answers to the same prompt?

        A_i = (r_i - mean r) / (std r + 1e-4)                                                  (DeepSeekMath, section 4.1.2)

    rewards [B, G], one row per prompt, G >= 2 -> advantages [B, G]. The std is the unbiased one (n - 1), never taken smaller than
    `std_floor`. Raises ValueError on a group of one (it has no siblings) and FloatingPointError on a reward that is not a finite number.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"advantages need rewards [B, G] with G >= 2 answers per prompt, not {list(rewards.shape)}")
    if not rewards.isfinite().all():
        raise FloatingPointError("a reward is not a finite number; scoring must have failed")
    centred = rewards - rewards.mean(-1, keepdim=True)  # [B, G]
    std = rewards.std(-1, keepdim=True).clamp(min=std_floor)  # [B, 1]
    # Eight times 0.7 minus their mean is 6e-8 in fp32, not 0, and Adam, which divides by the gradient's own size, could make a step of it.
    equal = rewards.amax(-1, keepdim=True) == rewards.amin(-1, keepdim=True)  # [B, 1]
    return (centred / (std + 1e-4)).masked_fill(equal, 0.0)  # [B, G]


def token_logps(logits, ids):
    """log pi(id | everything before it), in fp32.   logits [..., V] that predict ids [...] -> [...]"""
    logits = logits.float()  # in bf16 a sum over V is off by hundredths of a nat, and the ratio is the exp of a difference of two of these
    return logits.gather(-1, ids[..., None]).squeeze(-1) - logits.logsumexp(-1)


def kl_k3(logp, ref_logp):
    """Schulman's k3 estimate of KL(policy || reference) per token:   exp(d) - d - 1 with d = ref_logp - logp.   Never negative.

    (Plain -d has the same mean, but is often negative and varies more.) As a loss its gradient is that of KL(reference || policy), not of
    KL(policy || reference), whose value it estimates. The paper uses it so, and so do we.
    """
    d = ref_logp - logp
    return d.exp() - d - 1


def grpo_loss(logp, old_logp, ref_logp, advantages, mask, *, eps_low=0.2, eps_high=0.2, beta=0.04,
              loss="grpo", max_length=None, total=None):
    """The clipped surrogate with a KL penalty, to be minimised.

        ratio_t = pi(o_t) / pi_old(o_t)        of token o_t: the policy that is trained, and the one that sampled the answer
        l_t     = -min(ratio_t A, clip(ratio_t, 1 - eps_low, 1 + eps_high) A) + beta k3_t

    averaged over tokens. The named variants differ only in how:
        "grpo"     mean over a sequence's tokens, then over sequences: a token of a long answer weighs less      (DeepSeekMath, eq. 3)
        "dr_grpo"  sum / (sequences x max_length): every token weighs the same, whatever the answers' lengths    (Dr. GRPO)
        "dapo"     sum / all tokens of the batch: every token of this batch weighs the same                      (DAPO)

    logp, old_logp, ref_logp, mask [N, C] (mask 1 up to and including the first end of text); advantages [N].
    `total`: when a batch is split into micro-batches, what the whole batch would divide by: its number of sequences (for "dapo", of
    tokens). The losses of the micro-batches then add up to the loss of the batch, and so do their gradients.
    Returns (loss, stats): `kl` mean k3 per token; `clip_high`, `clip_low` share of tokens whose gradient the clip has cut.

    With one update per batch of samples (mu = 1) the ratio is 1 but for rounding, and so the loss is about -mean A, which is 0. Its
    gradient is not: at ratio 1 the gradient of ratio A is A times that of log pi, which makes the answers that are better than their
    group likelier. The clip acts only from the second update (mu > 1) on.
    """
    mask = mask.to(logp.dtype)
    ratio = (logp - old_logp).exp()  # [N, C]
    A = advantages[:, None]  # [N, 1]
    # min takes the pessimistic side for either sign of A: once an answer has become likelier (A > 0) or less likely (A < 0) by more than
    # eps, the clipped term is the smaller one, and it is constant, so nothing more is gained by going further from the sampling policy.
    surrogate = torch.min(ratio * A, ratio.clamp(1 - eps_low, 1 + eps_high) * A)  # [N, C]
    kl = kl_k3(logp, ref_logp)  # [N, C]
    per_token = (-surrogate + beta * kl) * mask  # [N, C]
    if loss == "grpo":
        value = (per_token.sum(-1) / mask.sum(-1).clamp(min=1)).sum() / (total or len(logp))
    elif loss == "dr_grpo":
        if not max_length:
            raise ValueError('loss "dr_grpo" divides by the longest possible answer: give max_length')
        value = per_token.sum() / ((total or len(logp)) * max_length)
    elif loss == "dapo":
        value = per_token.sum() / (total or mask.sum().clamp(min=1))
    else:
        raise ValueError(f'unknown loss "{loss}": grpo, dr_grpo or dapo')
    mean = lambda x: ((x * mask).sum() / mask.sum().clamp(min=1)).item()
    # The clip has cut where min took the constant.
    return value, {"kl": mean(kl), "clip_high": mean((ratio > 1 + eps_high) & (A > 0)), "clip_low": mean((ratio < 1 - eps_low) & (A < 0))}


# ------------------------------------------------------------------------------------------------------------------- LoRA
class LoRALinear(nn.Module):
    """y = W x + (alpha / r) B A x   with W frozen, A [r, in] random and B [out, r] zero, so that training starts from W x (LoRA, 4.1).

    alpha / r keeps the size of the update when r changes.
    A and B are kept in fp32 whatever W is: a step of 1e-5 on a bf16 number is mostly rounded away.
    """

    def __init__(self, base, rank, alpha):
        super().__init__()
        new = lambda i, o: nn.Linear(i, o, bias=False, device=base.weight.device, dtype=torch.float32)
        self.base, self.lora_A, self.lora_B = base, new(base.in_features, rank), new(rank, base.out_features)
        self.rank, self.alpha, self.on = rank, alpha, True
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))  # as PEFT does
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):  # [..., in]
        y = self.base(x)  # [..., out]
        if self.on:  # cast at each use: what the optimizer steps stays in fp32, and the gradient flows back through the cast
            low = F.linear(x, self.lora_A.weight.to(x.dtype)) * (self.alpha / self.rank)  # [..., r]
            y = y + F.linear(low, self.lora_B.weight.to(x.dtype))  # [..., out]
        return y


def lora_layers(model):
    """{dotted name: LoRALinear} of a model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def add_lora(model, rank, alpha, *, names=None):
    """Freeze the model and wrap linear layers of its language model: the seven projections of each layer, or just `names`.

    Returns the dotted names of the wrapped layers. Raises ValueError where there is nothing to wrap or adapters are there already.
    """
    if lora_layers(model):
        raise ValueError("the model has adapters already; merge_lora(model) first")
    if names is None:
        names = [name for name, module in model.named_modules()
                 if isinstance(module, nn.Linear) and name.split(".")[-1] in LINEARS and "visual" not in name]  # departure 2
    if not names:
        raise ValueError(f"no layer to adapt: the model has none of {', '.join(LINEARS)}")
    model.requires_grad_(False)
    for name in names:
        model.set_submodule(name, LoRALinear(model.get_submodule(name), rank, alpha))
    return names


@contextlib.contextmanager
def lora_off(model):
    """Inside this block the model is what it was before training: the reference policy, and the listener."""
    before = {layer: layer.on for layer in lora_layers(model).values()}  # put back as they were, since blocks may be nested
    try:
        for layer in before:
            layer.on = False
        yield
    finally:
        for layer, on in before.items():
            layer.on = on


def merge_lora(model):
    """Fold every adapter into its weight, W + (alpha / r) B A, and take the wrapper away: a plain model for export.

    In bf16 a small update is mostly rounded away, so merge only to export, never to sample faster during training.
    """
    for layer in lora_layers(model).values():
        with torch.no_grad():
            delta = (layer.alpha / layer.rank) * layer.lora_B.weight @ layer.lora_A.weight  # [out, in]
            layer.base.weight.copy_(layer.base.weight.float() + delta)
    return remove_lora(model)


def remove_lora(model):
    """Take every adapter off and forget it: the model that `add_lora` was given."""
    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.base)
    return model


# ------------------------------------------------------------------------------------- the adapter on disk, in PEFT's format
PEFT_PREFIX = "base_model.model."
UNSUPPORTED = ("use_rslora", "use_dora", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform")


def write_atomically(path, write):
    """Call `write(temporary path)`, then move the result into place: whoever reads `path` sees the old file or the new one, whole.

    Raises OSError if it cannot be written, whichever exception the writing library raises itself.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # else the new name could point to an empty file after a power cut
        os.replace(temporary, path)
    except (RuntimeError, SafetensorError) as error:  # a full disk, as torch and safetensors tell it
        raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    """`content` as JSON, whole or not at all."""
    write_atomically(path, lambda file: file.write_text(json.dumps(content, indent=1)))


def lora_state(model):
    """{"<layer>.lora_A.weight": tensor, ...}: all that training changes. Views, not copies: tensor.copy_(...) writes into the model."""
    return {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}


def save_adapter(model, folder, base=""):
    """Write the adapters as PEFT does (adapter_model.safetensors, adapter_config.json), so that PEFT and vLLM load them."""
    folder, layers = pathlib.Path(folder), lora_layers(model)
    if not layers:
        raise ValueError("nothing to save: the model has no adapters")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {PEFT_PREFIX + key: value.cpu().contiguous() for key, value in lora_state(model).items()}
    first = next(iter(layers.values()))
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(base), r=first.rank, lora_alpha=first.alpha,
                  target_modules=sorted({name.split(".")[-1] for name in layers}), lora_dropout=0.0, bias="none", inference_mode=True,
                  fan_in_fan_out=False, init_lora_weights=True, use_rslora=False, use_dora=False, modules_to_save=None,
                  rank_pattern={}, alpha_pattern={})
    write_atomically(folder / "adapter_model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    write_json(folder / "adapter_config.json", config)


def load_adapter(model, folder):
    """Read a PEFT LoRA adapter into the model, wrapping the layers it names. It takes the place of adapters that the model has already.

    Also reads the key layout of transformers before 4.52 (no `language_model` in the names), which PEFT itself would load as a silent
    no-op. Raises ValueError, saying what is wrong, on anything it would not reproduce exactly: other adapter kinds, parts outside
    the language model, missing, unknown or wrongly shaped tensors.
    """
    folder = pathlib.Path(folder)
    try:
        config, stored = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} is not an adapter folder that can be read: {error}") from error
    if not isinstance(config, dict) or not all(isinstance(config.get(key), (int, float)) and config[key] > 0 for key in ("r", "lora_alpha")):
        raise ValueError(f"{folder} cannot be read: adapter_config.json has no r and lora_alpha above 0")
    wrong = [name for name in UNSUPPORTED if config.get(name)]
    wrong += [f"{key} {config.get(key)}" for key, usual in (("peft_type", "LORA"), ("bias", "none")) if config.get(key, "none") != usual]
    if wrong:
        raise ValueError(f"{folder} is an adapter of a kind not implemented here ({', '.join(wrong)})")
    tensors = {key.removeprefix(PEFT_PREFIX): value for key, value in stored.items()}
    tensors = {re.sub(r"^model\.layers\.", "model.language_model.layers.", key): value for key, value in tensors.items()}  # transformers before 4.52
    names = list(dict.fromkeys(key.rsplit(".lora_", 1)[0] for key in tensors))  # each layer once, in the file's order
    if not names:
        raise ValueError(f"{folder} holds no adapter: its adapter_model.safetensors is empty")
    linears = {name.removesuffix(".base"): module for name, module in model.named_modules() if isinstance(module, nn.Linear) and "visual" not in name}
    if unknown := [name for name in names if name not in linears]:
        raise ValueError(f"{folder} adapts {len(unknown)} layers that this model's language model does not have, such as {unknown[0]}")
    shapes = {f"{name}.lora_A.weight": [config["r"], linears[name].in_features] for name in names}
    shapes |= {f"{name}.lora_B.weight": [linears[name].out_features, config["r"]] for name in names}
    if odd := sorted(shapes.keys() ^ tensors.keys()):  # what only one of the two has
        raise ValueError(f"{folder} does not fit: {len(odd)} tensors missing or unexpected, such as {odd[0]}")
    if odd := [key for key in shapes if list(tensors[key].shape) != shapes[key]]:
        raise ValueError(f"{folder} does not fit: {odd[0]} is {list(tensors[odd[0]].shape)}, not of rank {config['r']}, {shapes[odd[0]]}")
    add_lora(remove_lora(model), config["r"], config["lora_alpha"], names=names)
    model.load_state_dict(tensors, strict=False)
