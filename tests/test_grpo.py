"""The learner against numbers worked out by hand; no picture and no language model is in sight."""

import math

import pytest
import torch

import grpo

LOGP = torch.tensor(
    [
        [-1.0, -2.0, -0.5],
        [-0.7, -1.5, -3.0],
        [-2.2, -0.1, -1.1],
        [-0.9, -0.4, -2.0],
    ],
    dtype=torch.float64,
)
OLD = torch.tensor(
    [
        [-1.1, -1.9, -0.9],
        [-0.7, -1.8, -2.5],
        [-2.0, -0.3, -1.1],
        [-1.4, -0.4, -1.7],
    ],
    dtype=torch.float64,
)
REF = torch.tensor(
    [
        [-1.2, -2.1, -0.6],
        [-0.9, -1.4, -2.8],
        [-2.5, -0.2, -1.0],
        [-0.8, -0.6, -2.2],
    ],
    dtype=torch.float64,
)
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]])
REWARDS = torch.tensor([[0.9, 0.1], [0.6, 0.4]], dtype=torch.float64)
LOSSES = ("grpo", "dr_grpo", "dapo")
GOLDEN_LOSS = {"grpo": 0.12650197, "dr_grpo": -0.13695985, "dapo": -0.18261314}
GOLDEN_GRADIENT = {"grpo": 0.35233148, "dr_grpo": 0.19239419, "dapo": 0.25652558}  # its norm


def golden_loss(loss, logp=LOGP, rows=slice(None), total=None):
    """-> (loss, stats) of the batch above, or of some of its rows"""
    advantages = grpo.group_advantages(REWARDS).flatten()
    return grpo.grpo_loss(
        logp[rows],
        OLD[rows],
        REF[rows],
        advantages[rows],
        MASK[rows],
        eps_low=0.2,
        eps_high=0.28,
        beta=0.04,
        loss=loss,
        max_length=3,
        total=total,
    )


# ------------------------------------------------------------------------------ advantages and KL
def test_advantages():
    expected = torch.tensor([[0.706982, -0.706982], [0.706607, -0.706607]], dtype=torch.float64)
    assert torch.allclose(grpo.group_advantages(REWARDS), expected, atol=1e-6)


def test_equal_rewards_give_advantages_of_exactly_0():
    # 0.7 is not exact in fp32, and the mean of twelve of them differs from it.
    assert torch.equal(grpo.group_advantages(torch.full((2, 12), 0.7)), torch.zeros(2, 12))
    assert torch.equal(grpo.group_advantages(torch.full((1, 8), 0.01)), torch.zeros(1, 8))


def test_the_floor_keeps_noise_small():
    noise = torch.tensor([[0.500, 0.501]])
    assert grpo.group_advantages(noise).abs().max() > 0.6
    assert grpo.group_advantages(noise, std_floor=0.05).abs().max() < 0.02


def test_advantages_refuse_what_cannot_be_scored():
    with pytest.raises(ValueError, match="G >= 2"):
        grpo.group_advantages(torch.ones(3, 1))
    with pytest.raises(FloatingPointError, match="finite"):
        grpo.group_advantages(torch.tensor([[1.0, math.nan]]))


def test_k3():
    one = torch.tensor(-1.0)
    assert grpo.kl_k3(one, one) == 0
    # d = -1:   e^-1 + 1 - 1
    assert math.isclose(grpo.kl_k3(one, torch.tensor(-2.0)).item(), math.exp(-1), rel_tol=1e-6)
    assert (grpo.kl_k3(torch.randn(1000), torch.randn(1000)) >= 0).all()


def test_token_logps_are_fp32_log_softmax():
    logits = torch.randn(2, 5, 11).bfloat16()
    ids = torch.randint(11, (2, 5))
    every_logp = logits.float().log_softmax(-1)
    expected = every_logp.gather(-1, ids[..., None]).squeeze(-1)
    assert torch.allclose(grpo.token_logps(logits, ids), expected, atol=1e-6)


# --------------------------------------------------------------------------------------- the loss
@pytest.mark.parametrize("loss", LOSSES)
def test_golden_loss_and_gradient(loss):
    logp = LOGP.clone().requires_grad_()
    value, stats = golden_loss(loss, logp)
    value.backward()
    assert math.isclose(value.item(), GOLDEN_LOSS[loss], abs_tol=1e-7)
    assert math.isclose(logp.grad.norm().item(), GOLDEN_GRADIENT[loss], abs_tol=1e-7)
    assert math.isclose(stats["kl"], 0.01203386, abs_tol=1e-7)
    assert math.isclose(stats["clip_high"], 1 / 9, abs_tol=1e-7)
    assert stats["clip_low"] == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_of_micro_batches_add_up(loss):
    total = {"grpo": 4, "dr_grpo": 4, "dapo": 9}[loss]  # answers, or tokens
    added = 0.0
    for rows in (slice(0, 1), slice(1, 3), slice(3, 4)):
        part, _ = golden_loss(loss, rows=rows, total=total)
        added += part.item()
    whole, _ = golden_loss(loss)
    assert math.isclose(added, whole.item(), abs_tol=1e-12)


def padded(x, value):
    """x [4, C] -> [4, C + 5]"""
    return torch.cat([x, torch.full((4, 5), value, dtype=x.dtype)], 1)


@pytest.mark.parametrize("loss", LOSSES)
def test_padding_changes_nothing(loss):
    value, _ = grpo.grpo_loss(
        padded(LOGP, 7),
        padded(OLD, 7),
        padded(REF, 7),
        grpo.group_advantages(REWARDS).flatten(),
        padded(MASK, 0),
        eps_high=0.28,
        loss=loss,
        max_length=3,
    )
    unpadded, _ = golden_loss(loss)
    assert math.isclose(value.item(), unpadded.item(), abs_tol=1e-12)


@pytest.mark.parametrize(
    "advantage, ratio, objective, slope",
    [
        (1, 0.5, 0.5, -0.5),
        (1, 1.0, 1.0, -1.0),
        (1, 1.5, 1.2, 0.0),
        (-1, 0.5, -0.8, 0.0),
        (-1, 1.0, -1.0, 1.0),
        (-1, 1.5, -1.5, 1.5),
    ],
)
def test_clip(advantage, ratio, objective, slope):
    """PPO's clip for both signs of the advantage; slope is d(-objective) / d log ratio."""
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    loss, _ = grpo.grpo_loss(logp, zero, logp.detach(), advantages, torch.ones(1, 1), beta=0.0)
    loss.backward()
    assert math.isclose(-loss.item(), objective, abs_tol=1e-9)
    assert math.isclose(logp.grad.item(), slope, abs_tol=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("junk", [math.inf, -math.inf, math.nan, 1e30])
def test_what_stands_after_the_end_of_an_answer_does_not_count(loss, junk):
    """Neither in the loss nor in its gradient, which would be nan of a mere product with 0."""
    blank = MASK == 0
    logp = LOGP.masked_fill(blank, junk).requires_grad_()
    old = OLD.masked_fill(blank, -junk)
    reference = REF.masked_fill(blank, junk)
    advantages = grpo.group_advantages(REWARDS).flatten()
    value, stats = grpo.grpo_loss(
        logp, old, reference, advantages, MASK, eps_high=0.28, loss=loss, max_length=3
    )
    assert value.item() == pytest.approx(GOLDEN_LOSS[loss], abs=1e-8)
    assert all(math.isfinite(figure) for figure in stats.values())
    value.backward()
    assert logp.grad.norm().item() == pytest.approx(GOLDEN_GRADIENT[loss], abs=1e-8)
    assert (logp.grad[blank] == 0).all()


def test_given_answers_have_the_gradient_of_the_log_likelihood():
    """Also where the policy has moved since: there is no sampling policy, so nothing is clipped."""
    logp = LOGP.clone().requires_grad_()
    ones = torch.ones(4, dtype=torch.float64)
    value, stats = grpo.grpo_loss(logp, None, None, ones, MASK, beta=0.0)
    value.backward()
    per_answer = 1 / (4 * MASK.sum(1, keepdim=True).double())
    assert torch.allclose(logp.grad, -per_answer * MASK)
    assert stats == {"clip_high": 0.0, "clip_low": 0.0}


def test_without_a_reference_there_is_no_penalty():
    advantages = grpo.group_advantages(REWARDS).flatten()
    with_it, _ = grpo.grpo_loss(LOGP, OLD, REF, advantages, MASK, beta=0.0)
    without, stats = grpo.grpo_loss(LOGP, OLD, None, advantages, MASK, beta=0.0)
    assert with_it == without
    assert "kl" not in stats
    with pytest.raises(ValueError, match="needs the reference"):
        grpo.grpo_loss(LOGP, OLD, None, advantages, MASK, beta=0.04)


def test_loss_names_its_mistakes():
    with pytest.raises(ValueError, match="max_length"):
        grpo.grpo_loss(LOGP, OLD, REF, REWARDS.flatten(), MASK, loss="dr_grpo")
    with pytest.raises(ValueError, match="unknown loss"):
        golden_loss("ppo")


# ------------------------------------------------------------------------------------- the update
class Policy:
    """A linear layer that answers: 6 answers of 4 tokens from 5 words. The simplest policy."""

    lengths = (4, 2, 3, 1, 4, 2)

    def __init__(self, lr=0.5):
        noise = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(6, 4, 3, generator=noise, dtype=torch.float64)  # [N, C, D]
        self.ids = torch.randint(5, (6, 4), generator=noise)  # [N, C]
        self.advantages = torch.linspace(-0.9, 0.9, 6, dtype=torch.float64)  # [N]
        self.mask = torch.arange(4) < torch.tensor(self.lengths)[:, None]  # [N, C]

        self.layer = torch.nn.Linear(3, 5, bias=False, dtype=torch.float64)
        weight = torch.randn(5, 3, generator=noise, dtype=torch.float64)
        self.layer.weight.data.copy_(weight)
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=lr)

        old = self.logps(slice(None)).detach()
        reference = old + 0.3 * torch.randn(6, 4, generator=noise, dtype=torch.float64)
        self.batch = grpo.Batch(self.ids, self.mask, old, reference, self.advantages)

    def logps(self, rows):
        every_logp = self.layer(self.inputs[rows]).log_softmax(-1)  # [rows, C, V]
        return every_logp.gather(-1, self.ids[rows][..., None]).squeeze(-1)

    def update(self, slices=(slice(0, 6),), **settings):
        settings = {"max_length": 4} | settings
        return grpo.update(self.logps, self.batch, slices, self.optimizer, **settings)

    @property
    def weight(self):
        return self.layer.weight.detach().clone()


def test_update_equals_a_step_worked_out_by_hand():
    """Two words, two answers of one token, equally likely: p = 1/2.

    The gradient of log p(own word) is (1/2, -1/2) for the first answer, (-1/2, 1/2) for the
    second. With A = 1 and -1 the gradient of the loss is minus their mean: (-1/2, 1/2).
    """
    layer = torch.nn.Linear(1, 2, bias=False)
    layer.weight.data.zero_()
    ids = torch.tensor([[0], [1]])

    def logps(rows):
        return grpo.token_logps(layer(torch.ones(2, 1, 1))[rows], ids[rows])

    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    old = logps(slice(None)).detach()
    batch = grpo.Batch(ids, torch.ones(2, 1, dtype=bool), old, old, torch.tensor([1.0, -1.0]))
    figures = grpo.update(logps, batch, [slice(0, 2)], optimizer)
    assert torch.allclose(layer.weight.flatten(), torch.tensor([0.05, -0.05]))
    assert figures == pytest.approx({"kl": 0, "clip_fraction": 0, "grad_norm": math.sqrt(0.5)})

    # A gradient longer than 1, here (-2, 2), is shortened to 1 and reported as it was.
    layer.weight.data.zero_()
    batch.advantages = batch.advantages * 4
    figures = grpo.update(logps, batch, [slice(0, 2)], optimizer)
    shortened = 0.1 * math.sqrt(0.5)
    assert torch.allclose(layer.weight.flatten(), torch.tensor([shortened, -shortened]))
    assert figures["grad_norm"] == pytest.approx(math.sqrt(8))


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_weighs_tokens_as_it_says(loss):
    """At ratio 1, without KL, a step goes along A times the weight of a token times grad log p."""
    policy = Policy(lr=1.0)
    lengths = policy.mask.sum(1, keepdim=True).double()  # [N, 1]
    weights = {
        "grpo": 1 / (6 * lengths),
        "dr_grpo": torch.full((6, 1), 1 / (6 * 4)).double(),
        "dapo": torch.full((6, 1), 1 / 16).double(),  # 16 tokens in all
    }
    weighted = policy.advantages[:, None] * weights[loss] * policy.mask  # [N, C]
    objective = (weighted * policy.logps(slice(None))).sum()
    [gradient] = torch.autograd.grad(objective, policy.layer.weight)
    assert gradient.norm() < 1, "or the step would be shortened"

    before = policy.weight
    policy.update(loss=loss, beta=0.0)
    assert torch.allclose(policy.weight, before + gradient, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_change_nothing(loss):
    whole = Policy()
    figures = whole.update(loss=loss, mu=2)
    parts = Policy()
    of_parts = parts.update([slice(0, 1), slice(1, 4), slice(4, 6)], loss=loss, mu=2)
    assert torch.allclose(parts.weight, whole.weight, atol=1e-12)
    assert of_parts == pytest.approx(figures, abs=1e-6)


def test_figures_are_means_per_token():
    policy = Policy()
    batch = policy.batch
    kl = grpo.kl_k3(batch.old_logps, batch.ref_logps)[batch.mask].mean().item()
    figures = policy.update([slice(0, 2), slice(2, 6)])
    assert figures["kl"] == pytest.approx(kl, abs=1e-6)
    assert figures["clip_fraction"] == 0


def test_given_answers_are_learned_without_clip_and_without_reference():
    """Three updates are three steps of plain maximum likelihood."""
    policy = Policy(lr=0.1)
    policy.batch = grpo.Batch(policy.ids, policy.mask, None, None, torch.ones(6).double())
    figures = policy.update(mu=3, beta=0.0)
    assert set(figures) == {"clip_fraction", "grad_norm"}
    assert figures["clip_fraction"] == 0

    plain = Policy(lr=0.1)
    for _ in range(3):
        per_answer = (plain.logps(slice(None)) * plain.mask).sum(1) / plain.mask.sum(1)
        (-per_answer.mean()).backward()
        torch.nn.utils.clip_grad_norm_(plain.layer.parameters(), 1.0)
        plain.optimizer.step()
        plain.optimizer.zero_grad()
    assert torch.allclose(policy.weight, plain.weight)


def test_mu_updates_are_mu_single_ones_with_the_same_old_logps():
    at_once = Policy(lr=5.0)
    figures = at_once.update(mu=3)
    one_by_one = Policy(lr=5.0)
    singles = [one_by_one.update() for _ in range(3)]
    assert torch.allclose(at_once.weight, one_by_one.weight, atol=1e-12)
    for name, value in figures.items():
        mean = sum(single[name] for single in singles) / 3
        assert value == pytest.approx(mean, abs=1e-6), name


def test_the_clip_works_from_the_second_update_on():
    assert Policy(lr=5.0).update(mu=1)["clip_fraction"] == 0
    assert Policy(lr=5.0).update(mu=4)["clip_fraction"] > 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("mu", [1, 2])
def test_a_gradient_that_is_not_finite_stops_before_the_step(value, mu):
    policy = Policy()
    policy.batch.advantages[3] = value
    before = policy.weight
    with pytest.raises(FloatingPointError, match="not finite"):
        policy.update([slice(0, 3), slice(3, 6)], mu=mu)
    assert torch.equal(policy.weight, before)


def test_one_process_has_its_own_sums():
    tensors = [torch.ones(2), torch.zeros(3)]
    grpo.add_up(tensors)
    assert torch.equal(tensors[0], torch.ones(2)) and torch.equal(tensors[1], torch.zeros(3))
