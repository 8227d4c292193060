"""grpo.py: GRPO on tensors: from the rewards of sibling answers to a step of the optimizer.

Nothing here knows of pictures, games or prompts. Four functions are the algorithm:

    group_advantages   how much better is an answer than its siblings, the other answers to the
                       same prompt? Their mean reward is the baseline, so no value network is
                       needed
    kl_k3              how far has the policy moved from the model it started as?
    grpo_loss          make the better answers likelier, not too much at once, and stay close
    update             the optimizer steps on one batch of answers

With one update per batch (mu = 1) the policy that is trained is the policy that sampled the
answers. Their ratio is 1 but for rounding, and the surrogate is about -mean A, which is 0. Its
gradient is not: at ratio 1 the gradient of ratio * A is A times the gradient of log pi, which makes
the answers that are better than their siblings likelier. The clip has work to do only from the
second update on.

Sources: GRPO (DeepSeekMath, arXiv 2402.03300, eq. 3-4), PPO's clip (1707.06347, eq. 7), the k3
estimator (Schulman 2020, joschu.net/blog/kl-approx.html), Dr. GRPO (2503.20783), DAPO
(2503.14476).

Where it departs from them:
1. The standard deviation of a group has a floor. Rewards here are made of probabilities, so G
   equally good answers differ a little, by 0.01 say, and (r - mean) / std would blow that noise
   up to advantages of +-1. A group whose rewards are all equal gets exactly 0.

Shapes: B prompts, G answers to each, N = B*G answers, C tokens of an answer, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist


def group_advantages(rewards, *, std_floor=0.0):
    """How much better is each answer than its siblings?   rewards [B, G] -> advantages [B, G]

        A_i = (r_i - mean r) / (std r + 1e-4)                     (DeepSeekMath, section 4.1.2)

    The std is the unbiased one (n - 1), never taken smaller than `std_floor`.
    Raises ValueError on a group of one, which has no siblings, and FloatingPointError on a
    reward that is not a finite number.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        shape = list(rewards.shape)
        raise ValueError(
            f"advantages need rewards [B, G] with G >= 2 answers a prompt, not {shape}"
        )
    if not rewards.isfinite().all():
        raise FloatingPointError("a reward is not a finite number; scoring must have failed")

    centred = rewards - rewards.mean(-1, keepdim=True)  # [B, G]
    std = rewards.std(-1, keepdim=True).clamp(min=std_floor)  # [B, 1]
    # With eight rewards of 0.7, r - mean r is 6e-8 in fp32, not 0, and Adam, which divides by the
    # gradient's own size, could make a step of it. So such groups are set to 0.
    all_equal = rewards.amax(-1, keepdim=True) == rewards.amin(-1, keepdim=True)  # [B, 1]
    return (centred / (std + 1e-4)).masked_fill(all_equal, 0.0)  # [B, G]


def token_logps(logits, ids):
    """log pi(id | all before it), the softmax in fp32.   logits [..., V], ids [...] -> [...]"""
    # In bf16 a sum over V is off by hundredths of a nat, and a ratio is the exp of a difference
    # of two of these.
    logits = logits.float()
    return logits.gather(-1, ids[..., None]).squeeze(-1) - logits.logsumexp(-1)


def kl_k3(logp, ref_logp):
    """Schulman's k3 estimate of KL(policy || reference) per token.   [...] -> [...]

        k3 = exp(d) - d - 1    with d = ref_logp - logp            (DeepSeekMath, eq. 4)

    It is never negative. (Plain -d has the same mean, but is often negative and varies more.)
    As a loss it pulls the policy towards the reference, as it should, but by the gradient of the
    other divergence, KL(reference || policy):

        grad k3 = (1 - ref / pi) grad log pi
        E_pi[grad k3] = E_pi[grad log pi] - E_ref[grad log pi] = 0 - E_ref[grad log pi]
    """
    d = ref_logp - logp
    return d.exp() - d - 1


def grpo_loss(
    logp,
    old_logp,
    ref_logp,
    advantages,
    mask,
    *,
    eps_low=0.2,
    eps_high=0.2,
    beta=0.04,
    loss="grpo",
    max_length=None,
    total=None,
):
    """The clipped surrogate with a KL penalty, to be minimised.   -> (loss, stats)

        ratio_t = pi(o_t) / pi_old(o_t)    of token o_t: the policy that is trained, and the one
                                           that sampled the answer
        l_t = -min(ratio_t A, clip(ratio_t, 1 - eps_low, 1 + eps_high) A) + beta k3_t

    averaged over tokens. The named variants differ only in how:

        "grpo"     mean over an answer's tokens, then over answers: a token of a long answer
                   weighs less                                          (DeepSeekMath, eq. 3)
        "dr_grpo"  sum / (answers x max_length): every token weighs the same, whatever the
                   answers' lengths                                     (Dr. GRPO)
        "dapo"     sum / all tokens of the batch: every token of this batch weighs the same
                                                                        (DAPO)

    logp, old_logp, ref_logp [N, C]; advantages [N]; mask [N, C], 1 up to and including the token
    that ends the answer. old_logp None: the answers were not sampled but given, and the ratio is 1,
    so that the gradient is that of the log-likelihood. ref_logp None: no penalty, beta must be 0.
    total: where this is a micro-batch, how many answers the whole batch has (for "dapo": how many
    tokens), to divide by that. The losses of the micro-batches then add up to the loss of the
    batch, and so do their gradients.
    stats, tensors []: "kl", mean k3 per token, if there is a reference; "clip_high" and "clip_low",
    the share of tokens whose gradient the clip has cut.
    """
    # What stands after the end of an answer may be anything. It is blanked, since a product with
    # the mask would not do: 0 * inf is not 0.
    blank = ~mask.bool()  # [N, C]
    mask = mask.to(logp.dtype)  # [N, C]
    logp = logp.masked_fill(blank, 0.0)
    old_logp = logp.detach() if old_logp is None else old_logp.masked_fill(blank, 0.0)
    advantages = advantages[:, None]  # [N, 1]
    ratio = (logp - old_logp).exp()  # [N, C]
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)  # [N, C]

    # min takes the pessimistic side for either sign of A. Once a token has become likelier (A > 0)
    # or less likely (A < 0) by more than eps, the clipped term is the smaller one, and it is
    # constant: nothing more is gained by going further from the policy that sampled.
    surrogate = torch.min(ratio * advantages, clipped * advantages)  # [N, C]
    per_token = -surrogate  # [N, C]
    stats = {}
    if ref_logp is not None:
        kl = kl_k3(logp, ref_logp.masked_fill(blank, 0.0))  # [N, C]
        per_token = per_token + beta * kl
        stats["kl"] = masked_mean(kl, mask)
    elif beta:
        raise ValueError(f"a KL penalty of weight {beta} needs the reference: give ref_logp")
    per_token = per_token * mask  # [N, C]

    if loss == "grpo":
        per_answer = per_token.sum(-1) / mask.sum(-1).clamp(min=1)  # [N]
        value = per_answer.sum() / (total or len(logp))
    elif loss == "dr_grpo":
        if not max_length:
            raise ValueError(
                'loss "dr_grpo" divides by the longest possible answer: give max_length'
            )
        value = per_token.sum() / ((total or len(logp)) * max_length)
    elif loss == "dapo":
        value = per_token.sum() / (total or mask.sum().clamp(min=1))
    else:
        raise ValueError(f'unknown loss "{loss}": grpo, dr_grpo or dapo')

    # The clip has cut the gradient where min took the constant.
    cut_high = (ratio > 1 + eps_high) & (advantages > 0)  # [N, C]
    cut_low = (ratio < 1 - eps_low) & (advantages < 0)  # [N, C]
    stats["clip_high"] = masked_mean(cut_high, mask)
    stats["clip_low"] = masked_mean(cut_low, mask)
    return value, stats


def masked_mean(x, mask):
    """Mean of the entries of x [N, C] where mask [N, C] is 1.   -> tensor []"""
    return (x.detach() * mask).sum() / mask.sum().clamp(min=1)


# ------------------------------------------------------------------------------------- the update
@dataclass
class Batch:
    """N answers of at most C tokens, and what is learned from them."""

    ids: torch.Tensor  # [N, C]
    mask: torch.Tensor  # [N, C], true up to and including the token that ends the answer
    old_logps: torch.Tensor | None  # [N, C], log-probs when it was sampled; None: it was not
    ref_logps: torch.Tensor | None  # [N, C], log-probs under the reference; None: there is none
    advantages: torch.Tensor  # [N]

    def part(self, rows):
        """The answers in a slice.   -> Batch"""
        old = None if self.old_logps is None else self.old_logps[rows]
        reference = None if self.ref_logps is None else self.ref_logps[rows]
        return Batch(self.ids[rows], self.mask[rows], old, reference, self.advantages[rows])


def add_up(tensors):
    """Sum tensors over all processes of torchrun, in place; of one process they stay as they are.

    Any tensors will do: gradients, counts, means.
    """
    if dist.is_initialized():
        flat = torch.nn.utils.parameters_to_vector(tensors)  # so that one message is enough
        dist.all_reduce(flat)
        torch.nn.utils.vector_to_parameters(flat, tensors)  # sets the .data of each tensor


def update(
    logps,
    batch,
    slices,
    optimizer,
    *,
    mu=1,
    eps_low=0.2,
    eps_high=0.2,
    beta=0.04,
    loss="grpo",
    max_length=None,
):
    """`mu` optimizer steps on one batch, each summed over micro-batches.

    logps(rows): log-probs [n, C] of the n answers in `rows`, a slice of the N, under the policy as
    it is now, with gradient
    slices: the micro-batches, which together are all N answers
    -> {"clip_fraction" and, if there is a reference, "kl": means per token; "grad_norm": before it
        is clipped to 1}

    Each loss is divided by the total of *all* micro-batches and processes. So gradients simply
    add up, and but for rounding neither the size of a micro-batch nor the number of processes
    changes the result. Raises FloatingPointError, before the step is made, on a gradient that is
    not finite.
    """
    counts = torch.tensor([batch.mask.sum(), len(batch.ids)], dtype=torch.float64)
    counts = counts.to(batch.mask.device)
    add_up([counts])
    tokens, answers = counts.tolist()
    total = tokens if loss == "dapo" else answers

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    means = torch.zeros(2, device=batch.mask.device)  # kl and clip_fraction
    grad_norm = 0.0
    for _ in range(mu):
        for rows in slices:
            part = batch.part(rows)
            micro_loss, stats = grpo_loss(
                logps(rows),
                part.old_logps,
                part.ref_logps,
                part.advantages,
                part.mask,
                eps_low=eps_low,
                eps_high=eps_high,
                beta=beta,
                loss=loss,
                max_length=max_length,
                total=total,
            )
            micro_loss.backward()
            # Weighted by its share of all tokens and updates, each micro-batch's mean adds up to
            # the mean over all of them.
            share = part.mask.sum() / tokens / mu
            clip_fraction = stats["clip_high"] + stats["clip_low"]
            kl = stats.get("kl", torch.zeros_like(clip_fraction))
            means += share * torch.stack([kl, clip_fraction])

        add_up([p.grad for p in parameters])
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
        if not math.isfinite(norm):  # before the step: the parameters are still good
            raise FloatingPointError("the gradient is not finite; start anew with a lower --lr")
        grad_norm += norm / mu
        optimizer.step()
        optimizer.zero_grad()

    add_up([means])
    kl, clip_fraction = means.tolist()
    metrics = {"clip_fraction": clip_fraction, "grad_norm": grad_norm}
    if batch.ref_logps is not None:
        metrics["kl"] = kl
    return metrics
