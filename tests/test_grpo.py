"""The learner against numbers worked out by hand, and against PEFT where it is installed."""
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import grpo

LOGP = torch.tensor([[-1.0, -2.0, -0.5], [-0.7, -1.5, -3.0], [-2.2, -0.1, -1.1], [-0.9, -0.4, -2.0]], dtype=torch.float64)
OLD = torch.tensor([[-1.1, -1.9, -0.9], [-0.7, -1.8, -2.5], [-2.0, -0.3, -1.1], [-1.4, -0.4, -1.7]], dtype=torch.float64)
REF = torch.tensor([[-1.2, -2.1, -0.6], [-0.9, -1.4, -2.8], [-2.5, -0.2, -1.0], [-0.8, -0.6, -2.2]], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]])
REWARDS = torch.tensor([[0.9, 0.1], [0.6, 0.4]], dtype=torch.float64)
GOLDEN = {"grpo": (0.12650197, 0.35233148), "dapo": (-0.18261314, 0.25652558), "dr_grpo": (-0.13695985, 0.19239419)}  # loss, |gradient|


def golden_loss(loss, rows=slice(None), logp=None, **extra):
    advantages = grpo.group_advantages(REWARDS).flatten()
    logp = LOGP if logp is None else logp
    return grpo.grpo_loss(logp[rows], OLD[rows], REF[rows], advantages[rows], MASK[rows], eps_low=0.2, eps_high=0.28, beta=0.04, loss=loss, max_length=3, **extra)


def test_advantages():
    got = grpo.group_advantages(REWARDS)
    assert torch.allclose(got, torch.tensor([[0.706982, -0.706982], [0.706607, -0.706607]], dtype=torch.float64), atol=1e-6)
    assert torch.equal(grpo.group_advantages(torch.full((2, 12), 0.7)), torch.zeros(2, 12))  # 0.7 is not exact in fp32; its mean differs from it
    assert torch.equal(grpo.group_advantages(torch.full((1, 8), 0.01)), torch.zeros(1, 8))
    noise = torch.tensor([[0.500, 0.501]])
    assert grpo.group_advantages(noise).abs().max() > 0.6  # without a floor, noise of a thousandth looks like a lesson
    assert grpo.group_advantages(noise, std_floor=0.05).abs().max() < 0.02


def test_advantages_refuse_what_cannot_be_scored():
    with pytest.raises(ValueError, match="G >= 2"):
        grpo.group_advantages(torch.ones(3, 1))
    with pytest.raises(FloatingPointError, match="finite"):
        grpo.group_advantages(torch.tensor([[1.0, math.nan]]))


def test_k3():
    assert grpo.kl_k3(torch.tensor(-1.0), torch.tensor(-1.0)) == 0
    assert math.isclose(grpo.kl_k3(torch.tensor(-1.0), torch.tensor(-2.0)).item(), math.exp(-1), rel_tol=1e-6)  # e^-1 + 1 - 1
    assert (grpo.kl_k3(torch.randn(1000), torch.randn(1000)) >= 0).all()


@pytest.mark.parametrize("loss", GOLDEN)
def test_golden_loss_and_gradient(loss):
    logp = LOGP.clone().requires_grad_()
    value, stats = golden_loss(loss, logp=logp)
    value.backward()
    assert math.isclose(value.item(), GOLDEN[loss][0], abs_tol=1e-7)
    assert math.isclose(logp.grad.norm().item(), GOLDEN[loss][1], abs_tol=1e-7)
    assert math.isclose(stats["kl"], 0.01203386, abs_tol=1e-7)
    assert math.isclose(stats["clip_high"], 1 / 9, abs_tol=1e-7) and stats["clip_low"] == 0


@pytest.mark.parametrize("loss", GOLDEN)
def test_micro_batches_add_up_to_the_batch(loss):
    total = {"dapo": int(MASK.sum())}.get(loss, 4)
    parts = sum(golden_loss(loss, rows, total=total)[0] for rows in (slice(0, 1), slice(1, 3), slice(3, 4)))
    assert math.isclose(parts.item(), golden_loss(loss)[0].item(), abs_tol=1e-12)


@pytest.mark.parametrize("loss", GOLDEN)
def test_padding_changes_nothing(loss):
    wide = lambda x: torch.cat([x, torch.full((4, 5), 7, dtype=x.dtype)], 1)
    advantages = grpo.group_advantages(REWARDS).flatten()
    mask = torch.cat([MASK, torch.zeros(4, 5, dtype=MASK.dtype)], 1)
    padded, _ = grpo.grpo_loss(wide(LOGP), wide(OLD), wide(REF), advantages, mask, eps_low=0.2, eps_high=0.28, beta=0.04, loss=loss, max_length=3)
    assert math.isclose(padded.item(), golden_loss(loss)[0].item(), abs_tol=1e-12)


@pytest.mark.parametrize("A, ratio, objective, slope", [
    (1, 0.5, 0.5, -0.5), (1, 1.0, 1.0, -1.0), (1, 1.5, 1.2, 0.0), (-1, 0.5, -0.8, 0.0), (-1, 1.0, -1.0, 1.0), (-1, 1.5, -1.5, 1.5)])
def test_clip(A, ratio, objective, slope):
    """PPO's clip for both signs of the advantage; slope is d(-objective) / d log ratio."""
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    loss, _ = grpo.grpo_loss(logp, zero, logp.detach(), torch.tensor([A], dtype=torch.float64), torch.ones(1, 1), beta=0.0)
    loss.backward()
    assert math.isclose(-loss.item(), objective, abs_tol=1e-9) and math.isclose(logp.grad.item(), slope, abs_tol=1e-9)


def test_loss_names_its_mistakes():
    with pytest.raises(ValueError, match="max_length"):
        grpo.grpo_loss(LOGP, OLD, REF, REWARDS.flatten(), MASK, loss="dr_grpo")
    with pytest.raises(ValueError, match="unknown loss"):
        golden_loss("ppo")


def test_token_logps_are_fp32_log_softmax():
    logits, ids = torch.randn(2, 5, 11).bfloat16(), torch.randint(11, (2, 5))
    expected = logits.float().log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    assert torch.allclose(grpo.token_logps(logits, ids), expected, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------------- LoRA
class Block(nn.Module):
    """Names as in Qwen2-VL: a language model, and a tower that must be left alone."""

    def __init__(self):
        super().__init__()
        layer = lambda: nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(6, 6), "o_proj": nn.Linear(6, 6, bias=False)})})
        self.model = nn.ModuleDict({"language_model": nn.ModuleDict({"layers": nn.ModuleList([layer(), layer()])}),
                                    "visual": nn.ModuleDict({"up_proj": nn.Linear(6, 6)})})
        self.lm_head = nn.Linear(6, 9)

    def forward(self, x):
        for layer in self.model["language_model"]["layers"]:
            x = x + layer["self_attn"]["o_proj"](layer["self_attn"]["q_proj"](x).tanh())
        return self.lm_head(x)


NAMES = [f"model.language_model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qo"]
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def trained_block(steps=3):
    torch.manual_seed(0)
    model = Block()
    names = grpo.add_lora(model, 2, 4)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return model, names


def test_lora_starts_as_the_base_and_only_it_learns():
    torch.manual_seed(0)
    model = Block()
    base, before = model(X), {k: v.clone() for k, v in model.state_dict().items()}
    assert grpo.add_lora(model, 2, 4) == NAMES
    assert torch.equal(model(X), base)  # bit for bit: B is zero
    model(X).sum().backward()
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {f"{name}.lora_{part}.weight" for name in NAMES for part in "AB"}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == learning
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    model, _ = trained_block()
    assert all(torch.equal(v, before[k.replace(".base.", ".")]) for k, v in model.state_dict().items() if "lora" not in k)
    assert not torch.equal(model(X), base)
    with grpo.lora_off(model), grpo.lora_off(model):
        assert torch.equal(model(X), base)
    assert not torch.equal(model(X), base)


def test_lora_off_survives_an_exception():
    model, _ = trained_block()
    learned = model(X)
    with pytest.raises(KeyError), grpo.lora_off(model):
        raise KeyError
    assert torch.equal(model(X), learned)


def test_lora_computes_in_the_dtype_of_its_input_and_keeps_fp32():
    layer = grpo.LoRALinear(nn.Linear(6, 6).bfloat16(), 2, 4)
    layer(X.bfloat16()).sum().backward()
    assert layer(X.bfloat16()).dtype == torch.bfloat16 and layer.lora_B.weight.grad.dtype == torch.float32


def test_merge_equals_unmerged():
    model, _ = trained_block()
    learned = model(X)
    merged = grpo.merge_lora(model)
    assert not grpo.lora_layers(merged) and torch.allclose(merged(X), learned, atol=1e-6)


def test_adapter_round_trip_and_old_layout(tmp_path):
    model, _ = trained_block()
    grpo.save_adapter(model, tmp_path / "a", base="some/model")
    torch.manual_seed(0)
    fresh = Block()
    grpo.load_adapter(fresh, tmp_path / "a")
    assert torch.equal(fresh(X), model(X))
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert set(tensors) == {f"base_model.model.{name}.lora_{part}.weight" for name in NAMES for part in "AB"}
    save_file({k.replace("language_model.", ""): v for k, v in tensors.items()}, tmp_path / "a" / "adapter_model.safetensors")
    torch.manual_seed(0)
    old = Block()
    grpo.load_adapter(old, tmp_path / "a")  # PEFT loads this layout as a silent no-op
    assert torch.equal(old(X), model(X))


@pytest.mark.parametrize("spoil, message", [
    (lambda config, tensors: config.update(use_dora=True), "use_dora"),
    (lambda config, tensors: config.update(peft_type="IA3"), "IA3"),
    (lambda config, tensors: tensors.pop(next(iter(tensors))), "missing or unexpected"),
    (lambda config, tensors: tensors.update({"base_model.model.lm_tail.lora_A.weight": torch.zeros(2, 6)}), "does not have, such as lm_tail"),
    (lambda config, tensors: tensors.update({"base_model.model.model.visual.up_proj.lora_A.weight": torch.zeros(2, 6)}), "visual"),
    (lambda config, tensors: tensors.update({k: v[:1] for k, v in tensors.items() if "lora_A" in k}), r"is \[1, 6\], not of rank 2"),
])
def test_load_refuses_what_it_would_not_reproduce(tmp_path, spoil, message):
    model, _ = trained_block()
    grpo.save_adapter(model, tmp_path)
    config, tensors = json.loads((tmp_path / "adapter_config.json").read_text()), load_file(tmp_path / "adapter_model.safetensors")
    spoil(config, tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        grpo.load_adapter(Block(), tmp_path)


def test_write_atomically_leaves_the_old_file_when_writing_fails(tmp_path):
    file = tmp_path / "x"
    file.write_text("old")

    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError):
        grpo.write_atomically(file, fail)
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
