"""ideas.py: what each idea for speed brings, with and without it, in turn, in one run.

    python benchmarks/ideas.py --rounds 5

A line an idea: the part of a step that it touches, its time with and without, medians over the rounds, and whether it was kept. An idea that
makes a whole step less than a tenth faster, and costs clarity or memory, is dropped. The games are those of speed.py, with the toy model; ideas about a large
vocabulary are measured at Qwen2-VL's (152k words). Drawing pictures is not timed.
"""
import argparse
import pathlib
import statistics
import sys
import time
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import speed  # noqa: E402  (it finds the scripts of the folder above)

import grpo  # noqa: E402
import rrg  # noqa: E402
import toy  # noqa: E402

V, D = 151_936, 1536  # Qwen2-VL-2B's vocabulary and width


def kept_prefixes(mllm):
    """While this holds, a prompt that was read once is never read again."""
    memory, read = {}, mllm.prefill

    def prefill(texts, photos):
        key = tuple(texts), tuple(map(tuple, photos))
        memory[key] = memory.get(key) or read(texts, photos)
        return memory[key]

    return mock.patch.object(mllm, "prefill", prefill)


def sample_and_drop(mllm, prefix, most, generator):
    """rrg.MLLM.sample, but rows that have ended leave the batch as soon as a quarter of it has. -> tokens sampled"""
    hidden, rows, count, ids = prefix.last, torch.arange(len(prefix.last)), 0, None
    while count < most and len(rows):
        if ids is not None:
            hidden = mllm.carry_on(prefix, ids[:, None])[:, -1]
        cdf = mllm.model.lm_head(hidden).float().softmax(-1).cumsum(-1)
        ids = torch.searchsorted(cdf, torch.rand(len(rows), 1, generator=generator) * cdf[:, -1:]).squeeze(1)
        going, count = ~torch.isin(ids, mllm.ends), count + 1
        if going.sum() <= .75 * len(rows):
            rows, ids, prefix = rows[going], ids[going], prefix.take(going.nonzero().squeeze(1))
    return count


def fused(self, x):
    """LoRALinear.forward with its last product and sum as one addmm."""
    y = self.base(x)
    if not self.on:
        return y
    low = F.linear(x, self.lora_A.weight.to(x.dtype)) * (self.alpha / self.rank)
    return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), self.lora_B.weight.to(x.dtype).T).view_as(y)


def ideas(mllm, step):
    """Yields (idea, the part it touches, with it, without it, what became of it); with and without are functions to be timed."""
    G, most, ref, new = step.config.samples, step.config.max_tokens, step.reference(), lambda: torch.Generator().manual_seed(0)

    def under(patch, call):
        with patch:
            return call()

    def forgetting(call):
        mllm.features.clear()
        return call()

    yield "a picture's features are kept for the run", "listen", step.listen, lambda: forgetting(step.listen), "kept"
    yield ("all games of a step are sampled in one batch", "rollout", lambda: mllm.speak(step.prompts, G, most, new()),
           lambda: [mllm.speak([prompt], G, most, new()) for prompt in step.prompts], "kept")
    yield ("a prompt is read once for its G answers", "rollout", lambda: mllm.speak(step.prompts, G, most, new()),
           lambda: mllm.speak([prompt for prompt in step.prompts for _ in range(G)], 1, most, new()), "kept")
    memory = kept_prefixes(mllm)
    for part, call in (("listen", step.listen), ("reference", step.reference)):
        yield f"prefixes of the {part} pass are kept across steps", part, lambda call=call: under(memory, call), call, "dropped: 18 MB a photo at 2B"
    addmm = mock.patch.object(grpo.LoRALinear, "forward", fused)
    yield "LoRA's second product and sum are one addmm", "update", lambda: under(addmm, lambda: step.update(ref)), lambda: step.update(ref), "dropped"
    chances = torch.randn(128, V, generator=new()).softmax(-1)
    yield ("a token is drawn by searching the summed chances, 128 rows, 152k words", "one token",
           lambda: torch.searchsorted(chances.cumsum(-1), torch.rand(128, 1)), lambda: torch.multinomial(chances, 1), "kept")
    head, hidden = torch.randn(V, D, generator=new()) / 40, torch.randn(64, D, generator=new(), requires_grad=True)
    ids = torch.randint(V, (64,), generator=new())
    logps = lambda h, i: grpo.token_logps(F.linear(h, head), i)
    yield ("logits are made again in the backward pass (it saves memory, not time), 64 tokens, 152k words", "log-probs",
           lambda: checkpoint(logps, hidden, ids, use_reentrant=False).sum().backward(), lambda: logps(hidden, ids).sum().backward(), "kept")


def dropping(mllm, step):
    """The same for answers of their own lengths."""
    draws = lambda: torch.Generator().manual_seed(0)

    prefix = torch.no_grad()(lambda: mllm.read(step.prompts, step.config.samples))
    with_it = torch.no_grad()(lambda: sample_and_drop(mllm, prefix(), step.config.max_tokens, draws()))
    return ("answers that have ended leave the batch", "rollout", with_it, lambda: mllm.sample(prefix(), step.config.max_tokens, draws()), "dropped")


def compare(idea, rounds):
    """Time an idea -> its line of the table."""
    name, part, *ways, fate = idea
    seconds = [[], []]
    for lap in range(rounds + 1):
        for times, call in zip(seconds, ways):
            started = time.perf_counter()
            call()
            times += [time.perf_counter() - started] if lap else []
    a, b = map(statistics.median, seconds)
    return f"| {name} | {part} | {1000 * a:.0f} | {1000 * b:.0f} | {b / a:.2f} | {fate} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default 3)")
    args = parser.parse_args()
    mllm = rrg.MLLM(str(toy.FOLDER), 2 ** 22)
    ends, config = mllm.ends, rrg.Config(**rrg.TOY | dict(max_tokens=40, micro=4))
    games = speed.make_games(mllm, config.games, config.k, 16)
    natural = dropping(mllm, speed.Ours(mllm, games, config))
    torch.manual_seed(0)
    grpo.add_lora(mllm.model, config.rank, config.alpha)
    print(f"{rrg.machine(mllm.device)}; {config.games} games, G = {config.samples}, K = {config.k}, answers of 40 tokens\n")
    print("| idea | part of a step | with, ms | without, ms | ratio | |\n|---|---|---|---|---|---|")
    print(compare(natural, args.rounds), flush=True)
    mllm.ends = torch.tensor([-1])  # from here on nothing ends an answer: both ways do the same work
    for idea in ideas(mllm, speed.Ours(mllm, games, config)):
        print(compare(idea, args.rounds), flush=True)
