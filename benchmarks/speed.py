"""speed.py: one training step, ours and the usual way, timed phase by phase in one run, on the same games, tokens and loss.

    python benchmarks/speed.py                                   # the toy model on this machine
    python benchmarks/speed.py --model DIR --image-tokens 256 --games 16 --max-tokens 96      # a real one, on a GPU: 256 image tokens a picture
    python benchmarks/speed.py --grow growth.svg --json speed.json     # how cost grows with G, K, picture size and games a step

Ours: each picture is encoded once; each prompt is read once and continued by its G answers, in sampling, reference and policy, and by every
description put to a candidate. The usual way, as in TRL and the authors' research code: `generate`, and plain forward passes, over B x G rows
that each carry their picture through the tower again; the listener asked one description and one candidate at a time.

Both get the same sampled tokens and rewards after the rollout; that their losses and the listener's answers agree is checked. Every answer
is made --max-tokens long (no end of text), so that both ways do the same work. Each phase is timed --rounds times after a first one that does
not count; the median is reported. Pictures count as new in every step, which they are for us only in the first epoch.

Where TRL is installed (pip install "trl[peft]==1.16.0"), a step of its GRPOTrainer is timed as well: the same games, adapters, loss and listener,
answers as long, and the fastest settings that it has without vLLM. Drawing the pictures and the optimiser's step are timed in none of the three.
"""
import argparse
import dataclasses
import functools
import importlib.util
import math
import pathlib
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import torch  # noqa: E402
import transformers  # noqa: E402

import data  # noqa: E402
import grpo  # noqa: E402
import reward  # noqa: E402
import rrg  # noqa: E402
import toy  # noqa: E402

PHASES = ("encode", "rollout", "listen", "reference", "update")


def make_games(mllm, count, k, tokens):
    """`count` games of `k` pictures of `tokens` image tokens each."""
    side = int(math.isqrt(tokens)) * 2 * mllm.config.vision_config.patch_size
    concepts = toy.world(0, side, concepts=max(4, -(-count // 10)), views=2)[:max(count, k)]
    for concept in concepts:  # each picture is drawn once, in the round that does not count: else drawing is what is timed
        concept.photos[:] = [dataclasses.replace(photo, open=functools.cache(photo.open)) for photo in concept.photos]
    return [data.Game(c.name, c.category, c.photos[0], [c.photos[1], *(concepts[(i + j) % len(concepts)].photos[1] for j in range(1, k))], 0)
            for i, c in enumerate(concepts[:count])]


class Step:
    """What both ways share: the games, the sampled answers, the rewards."""

    def __init__(self, mllm, games, config):
        self.mllm, self.games, self.config = mllm, games, config
        self.prompts = [rrg.speaker_prompt(game) for game in games]
        self.photos = list(dict.fromkeys([game.target for game in games] + [photo for game in games for photo in game.pool]))
        self.answers = mllm.speak(self.prompts, config.samples, config.max_tokens, self.generator())
        text = lambda i: f"A photo of a {games[i // config.samples].category}. The {toy.ATTRIBUTES['colour'][i % 8]} one with a star badge."
        self.pairs = [(photo, text(i)) for i in range(len(self.answers.ids)) for photo in games[i // config.samples].pool]
        self.advantages = torch.linspace(-1, 1, len(self.answers.ids), device=mllm.device)

    def generator(self):
        return torch.Generator(self.mllm.device).manual_seed(0)

    def loss(self, logps, rows, ref):
        """The summed loss of some rows; `rows` a slice of all N."""
        mask, old = self.answers.mask[rows], self.answers.logps[rows]
        return grpo.grpo_loss(logps, old, ref[rows], self.advantages[rows], mask, total=len(self.answers.ids))[0]


class Ours(Step):
    def encode(self):
        self.mllm.features.clear()
        self.mllm.look(self.photos)

    def rollout(self):
        return self.mllm.speak(self.prompts, self.config.samples, self.config.max_tokens, self.generator())

    def listen(self):
        return self.mllm.listen(self.pairs)

    @torch.no_grad()
    def reference(self):
        with grpo.lora_off(self.mllm.model):
            return torch.cat([self.mllm.score(*part) for part in rrg.micro_batches(self.games, self.config, self.answers.ids)])

    def update(self, ref):
        total, start = 0.0, 0
        for prompts, ids in rrg.micro_batches(self.games, self.config, self.answers.ids):
            loss = self.loss(self.mllm.score(prompts, ids), slice(start, start + len(ids)), ref)
            loss.backward()
            total, start = total + loss.item(), start + len(ids)
        return total


class Usual(Step):
    def rows(self, games):
        """The plain model's inputs for the prompts of some games, G times each."""
        mllm, photos = self.mllm, [game.target for game in games for _ in range(self.config.samples)]
        pixels = mllm.processor(images=[photo.open() for photo in photos], return_tensors="pt").to(mllm.device)
        counts = (pixels["image_grid_thw"].prod(-1) // 4).tolist()
        texts = [mllm.chat(photo, reward.SPEAK).replace(mllm.image_token, mllm.image_token * count) for photo, count in zip(photos, counts)]
        batch = mllm.tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt").to(mllm.device)
        return dict(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], pixel_values=pixels["pixel_values"].to(mllm.model.dtype),
                    image_grid_thw=pixels["image_grid_thw"], mm_token_type_ids=(batch["input_ids"] == mllm.config.image_token_id).int())

    def parts(self):
        for start in range(0, len(self.games), self.config.micro):
            games = self.games[start:start + self.config.micro]
            yield games, slice(start * self.config.samples, (start + len(games)) * self.config.samples)

    def encode(self):
        """Nothing is kept: every pass encodes anew."""

    @torch.no_grad()
    def rollout(self):
        most = self.config.max_tokens
        torch.manual_seed(0)
        return torch.cat([self.mllm.model.generate(**self.rows(games), do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0,
                                                   min_new_tokens=most, max_new_tokens=most)[:, -most:] for games, _ in self.parts()])

    @torch.no_grad()
    def listen(self):
        """One description and one candidate at a time."""
        rho, mllm = [], self.mllm
        with grpo.lora_off(mllm.model):
            for photo, text in self.pairs:
                prompt = mllm.chat(photo, reward.LISTEN[0] + mllm.quote(text) + reward.LISTEN[1])
                pixels = mllm.processor(images=[photo.open()], return_tensors="pt").to(mllm.device)
                ids = torch.tensor([mllm.encode(prompt.replace(mllm.image_token, mllm.image_token * (pixels["image_grid_thw"].prod().item() // 4)))], device=mllm.device)
                logits = mllm.model(input_ids=ids, pixel_values=pixels["pixel_values"].to(mllm.model.dtype), image_grid_thw=pixels["image_grid_thw"],
                                    mm_token_type_ids=(ids == mllm.config.image_token_id).int(), logits_to_keep=1).logits[:, -1]
                rho += reward.belief(logits, mllm.yes, mllm.no).tolist()
        return torch.tensor(rho)

    def score(self, games, rows):
        inputs, ids = self.rows(games), self.answers.ids[rows]
        for name, extra in (("input_ids", ids), ("attention_mask", torch.ones_like(ids)), ("mm_token_type_ids", torch.zeros_like(ids).int())):
            inputs[name] = torch.cat([inputs[name], extra], 1)
        logits = self.mllm.model(**inputs, logits_to_keep=ids.shape[1] + 1).logits[:, :-1]  # [rows, C, V]
        return grpo.token_logps(logits, ids)

    @torch.no_grad()
    def reference(self):
        with grpo.lora_off(self.mllm.model):
            return torch.cat([self.score(*part) for part in self.parts()])

    def update(self, ref):
        total = 0.0
        for games, rows in self.parts():
            loss = self.loss(self.score(games, rows), rows, ref)
            loss.backward()
            total += loss.item()
        return total


def now(mllm):
    """The time in seconds, when the GPU has done all that it was asked to do."""
    if mllm.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(mllm, call):
    """-> (result, seconds, peak GiB on a GPU, else None)"""
    cuda = mllm.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    started = now(mllm)
    result = call()
    return result, now(mllm) - started, torch.cuda.max_memory_allocated() / 2 ** 30 if cuda else None


def measure(mllm, ways, rounds):
    """Run the ways in turn -> {way: {phase: median seconds}}, {way: peak GiB or None}; checks that they agree."""
    seconds, peak, said = {way: {phase: [] for phase in PHASES} for way in ways}, dict.fromkeys(ways), {}
    for lap in range(rounds + 1):
        for name, way in ways.items():
            ref = None
            for phase in PHASES:
                result, took, memory = timed(mllm, (lambda: way.update(ref)) if phase == "update" else getattr(way, phase))
                if phase == "reference":
                    ref = result
                said[name, phase] = result
                mllm.model.zero_grad()
                if lap:
                    seconds[name][phase].append(took)
                if memory:
                    peak[name] = max(peak[name] or 0, memory)
    if len(ways) == 2:
        exact = 1e-4 if mllm.model.dtype == torch.float32 else 5e-2
        for phase in ("listen", "reference", "update"):
            a, b = (torch.as_tensor(said[name, phase]).float().cpu() for name in ways)
            assert torch.allclose(a, b, atol=exact), f"the two ways do not agree in {phase}: {(a - b).abs().max():.2e}"
    return {name: {phase: statistics.median(values) for phase, values in phases.items()} for name, phases in seconds.items()}, peak


class Processor(transformers.Qwen2VLProcessor):
    """What TRL reads prompts and pictures with: Qwen2-VL's own, but for the part for videos, which would need torchvision."""

    def __init__(self, image_processor, tokenizer):
        super().__init__(image_processor, tokenizer, chat_template=tokenizer.chat_template)


def measure_trl(usual, rounds):
    """Steps of TRL's GRPOTrainer on the games of `usual`, paid by its listener -> {phase or "step": median seconds}, peak GiB or None.
    It takes the model over for good: the adapters are PEFT's from now on."""
    import datasets
    import peft
    import trl

    mllm, games, config, cuda = usual.mllm, usual.games, usual.config, usual.mllm.device.type == "cuda"
    names, size = list(grpo.lora_layers(mllm.model)), sum(tensor.numel() for tensor in grpo.lora_state(mllm.model).values())
    rank, alpha = next((layer.rank, layer.alpha) for layer in grpo.lora_layers(mllm.model).values())
    grpo.remove_lora(mllm.model)
    frozen = usual.listen()
    micro = max(n for n in range(1, config.micro + 1) if len(games) % n == 0)  # its parts of a step are all of one size
    answer = torch.tensor([game.answer for game in games for _ in range(config.samples)])
    prompts = [dict(prompt=[dict(role="user", content=text)], image=photo.open()) for [photo], text in usual.prompts]
    spent = {phase: [] for phase in ("step", "prepare", "rollout", "listen")}

    def pay(completion_ids, **_):
        """The game's reward. The listener is asked about the same descriptions as in the other two ways, so that it has as much to do."""
        assert {len(ids) for ids in completion_ids} == {config.max_tokens}, "TRL's answers have another length"
        with trainer.model.disable_adapter():
            rho = usual.listen()
        assert torch.allclose(rho, frozen, atol=1e-2), "TRL's listener answers otherwise"
        return reward.listener_reward(rho.view(-1, config.k), answer)[0].tolist()

    def clocked(phase, call):
        def run(*args, **kwargs):
            started = now(mllm)
            result = call(*args, **kwargs)
            spent[phase].append(now(mllm) - started)
            return result
        return run

    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.GRPOTrainer(
            mllm.model, pay, processing_class=Processor(mllm.processor, mllm.tokenizer),
            train_dataset=datasets.Dataset.from_list(prompts * (rounds + 1)),
            peft_config=peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=names),
            args=trl.GRPOConfig(
                folder, max_steps=rounds + 1, shuffle_dataset=False,
                num_generations=config.samples, max_completion_length=config.max_tokens,
                temperature=1.0, top_k=0, top_p=1.0, generation_kwargs=dict(min_new_tokens=config.max_tokens),  # which forbids every end of text
                # All rows of a step are sampled at once and updated on once, in parts: so no pass for the old log-probabilities is needed.
                per_device_train_batch_size=micro * config.samples, gradient_accumulation_steps=len(games) // micro, num_iterations=1,
                beta=config.beta, loss_type="grpo", scale_rewards="group", use_bias_correction_kl=False,  # grpo.py's loss
                bf16=cuda, use_cpu=not cuda, gradient_checkpointing=False,  # it is on by default, which is slower
                report_to="none", logging_strategy="no", log_multimodal=False, disable_tqdm=True, save_strategy="no"))
        trainer.remove_callback(transformers.PrinterCallback)
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        assert trained == size, f"TRL trains {trained} parameters and not {size}"
        for phase, name in dict(step="training_step", prepare="_prepare_inputs", rollout="_generate", listen="_calculate_rewards").items():
            setattr(trainer, name, clocked(phase, getattr(trainer, name)))
        _, _, peak = timed(mllm, trainer.train)
    # One entry for each part of a step. "step" contains "prepare", which contains the rollout, the listener and the reference.
    spent = {phase: torch.tensor(values).view(rounds + 1, -1).sum(1)[1:] for phase, values in spent.items()}  # [rounds]
    spent |= dict(reference=spent["prepare"] - spent["rollout"] - spent["listen"], update=spent["step"] - spent["prepare"])
    return {phase: statistics.median(spent[phase].tolist()) for phase in (*PHASES[1:], "step")}, peak


def floor(mllm, step):
    """Seconds that our step cannot do without on this machine: the larger of its FLOPs at the speed of a large matrix product, and, in the
    rollout, the weights that each token's step must read at the speed of a copy. -> {phase: seconds}"""
    size, config = 2048, step.config
    a, dtype = torch.randn(size, size, device=mllm.device), mllm.model.dtype
    a = a.to(dtype)
    flops = 2 * size ** 3 / min(timed(mllm, lambda: a @ a)[1] for _ in range(5))
    big = torch.empty(2 ** 26, device=mllm.device)
    bandwidth = 2 * big.numel() * 4 / min(timed(mllm, big.clone)[1] for _ in range(5))
    head = mllm.model.lm_head.weight.numel()  # which only tokens that are sampled or judged need; looking up an embedding costs nothing
    layers = sum(p.numel() for p in mllm.decoder.parameters()) - mllm.decoder.embed_tokens.weight.numel()
    tower = sum(p.numel() for p in mllm.model.model.visual.parameters())
    image = len(mllm.look(step.photos[:1])[0][0])
    rows, distinct = len(step.answers.ids), len(set(step.pairs))
    prompt, listened = image + len(mllm.encode(reward.SPEAK)), len({photo for photo, _ in step.pairs})
    tail = len(mllm.encode(reward.quoted(step.pairs[0][1]) + reward.LISTEN[1]))
    read = 2 * layers * len(step.games) * prompt  # FLOPs of reading the prompts once
    write = 2 * (layers + head) * rows * config.max_tokens
    return {"encode": 2 * tower * 4 * image * len(step.photos) / flops,
            "rollout": max((read + write) / flops, config.max_tokens * (layers + head) * a.element_size() / bandwidth),
            "listen": 2 * (layers * (listened * (image + len(mllm.encode(reward.LISTEN[0]))) + distinct * tail) + head * distinct) / flops,
            "reference": (read + write) / flops, "update": 2 * (read + write) / flops}


def report(seconds, peak, least, tokens):
    """Print the table of one setting -> what --json keeps."""
    ours, usual = seconds["ours"], seconds.get("usual")
    ratio = {}
    print("| phase | ours, s | usual, s | ratio | floor, s |\n|---|---|---|---|---|")
    for phase in (*PHASES, "step"):
        total = lambda times: sum(times.values()) if phase == "step" else times[phase]
        mine, theirs = total(ours), total(usual)
        ratio[phase] = theirs / mine if mine > 0 else None
        print(f"| {phase} | {mine:.3f} | {theirs:.3f} | {'-' if phase == 'encode' else f'{theirs / mine:.1f}'} | {total(least):.3f} |")
    print(f"\n{tokens / ours['rollout']:.0f} tokens sampled a second, usual {tokens / usual['rollout']:.0f}"
          + (f"; peak memory {peak['ours']:.1f} GiB, usual {peak['usual']:.1f}" if peak["ours"] else ""))
    return dict(seconds=seconds, peak_gib=peak, floor=least, ratio={name: value for name, value in ratio.items() if name != "encode"})


def grow(mllm, args, base):
    """How our step grows with one setting at a time -> rows [(setting, value, seconds a step, milliseconds an answer, peak GiB)]."""
    rows = []
    print("\n| | | step, s | an answer, ms | peak, GiB |\n|---|---|---|---|---|")
    for name, values in (("samples", (2, 4, 8, 16, 32)), ("k", (2, 3, 5, 9)), ("tokens", (64, 256, 1024) if args.image_tokens >= 64 else (16, 64, 144)), ("games", (4, 8, 16, 32))):
        for value in values:
            some = dict(games=args.games, k=args.k, tokens=args.image_tokens, samples=args.samples) | {name: value}
            config = rrg.dataclasses.replace(base, samples=some["samples"], k=some["k"], games=some["games"])
            mllm.features.clear()
            seconds, peak = measure(mllm, {"ours": Ours(mllm, make_games(mllm, some["games"], some["k"], some["tokens"]), config)}, args.rounds)
            step = sum(seconds["ours"].values())
            rows.append((name, value, step, 1000 * step / (some["games"] * some["samples"]), peak["ours"]))
            print(f"| {name} | {value} | {step:.2f} | {rows[-1][3]:.1f} | {'-' if peak['ours'] is None else format(peak['ours'], '.1f')} |", flush=True)
    return rows


def plot(rows, file):
    """The growth table as bars: milliseconds an answer, one panel a setting, all to one scale."""
    names, top, parts = list(dict.fromkeys(row[0] for row in rows)), max(row[3] for row in rows), []
    titles = {"samples": "G, answers a game", "k": "K, pictures in a pool", "tokens": "image tokens a picture", "games": "games a step"}
    for panel, name in enumerate(names):
        left = 20 + 230 * panel
        parts.append(f'<text x="{left}" y="22" font-weight="bold">{titles[name]}</text><path d="M{left} 170H{left + 200}" stroke="#888"/>')
        for place, (_, value, _, spent, _) in enumerate(row for row in rows if row[0] == name):
            x, high = left + 6 + 39 * place, 110 * spent / top
            parts.append(f'<rect x="{x}" y="{170 - high:.1f}" width="30" height="{high:.1f}" fill="#2471a3"/>'
                         f'<text x="{x + 15}" y="{164 - high:.1f}" text-anchor="middle">{spent:.1f}</text><text x="{x + 15}" y="188" text-anchor="middle">{value}</text>')
    file.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {230 * len(names) + 20} 200" font-family="sans-serif" font-size="13">'
                    f'<rect width="{230 * len(names) + 20}" height="200" fill="white"/>{"".join(parts)}</svg>\n')


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(toy.FOLDER), help="checkpoint (default: the toy model)")
    parser.add_argument("--games", type=int, default=12, help="B, games a step (default 12)")
    parser.add_argument("--samples", type=int, default=8, help="G, answers a game (default 8)")
    parser.add_argument("--k", type=int, default=3, help="K, pictures in a pool (default 3)")
    parser.add_argument("--image-tokens", type=int, default=16, help="image tokens of a picture (default 16, the toy model's)")
    parser.add_argument("--max-tokens", type=int, default=40, help="tokens of every answer (default 40)")
    parser.add_argument("--micro", type=int, default=4, help="games that go through a pass with gradient at once, in both ways (default 4)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapters (default 16)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default 3)")
    parser.add_argument("--grow", type=pathlib.Path, metavar="FILE", help="also: how our cost grows with G, K, picture size and games; drawn to this SVG file")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write everything here")
    args = parser.parse_args()
    mllm = rrg.MLLM(args.model, 2 ** 22)
    mllm.ends = torch.tensor([-1], device=mllm.device)  # nothing ends an answer
    torch.manual_seed(0)
    grpo.add_lora(mllm.model, args.rank, 2 * args.rank)
    for layer in grpo.lora_layers(mllm.model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.01)
    config = rrg.Config(games=args.games, samples=args.samples, k=args.k, micro=args.micro, max_tokens=args.max_tokens)
    games = make_games(mllm, args.games, args.k, args.image_tokens)
    print(f"{args.model}, {rrg.machine(mllm.device)}: {args.games} games, G = {args.samples}, K = {args.k}, {args.image_tokens} image tokens, answers of {args.max_tokens} tokens\n")
    ways = {"ours": Ours(mllm, games, config)}
    ways["usual"] = Usual(mllm, games, config)
    ways["usual"].answers = ways["ours"].answers  # the same tokens
    seconds, peak = measure(mllm, ways, args.rounds)
    kept = report(seconds, peak, floor(mllm, ways["ours"]), args.games * args.samples * args.max_tokens)
    if args.grow:
        kept["growth"] = grow(mllm, args, config)
        plot(kept["growth"], args.grow)
    if missing := [name for name in ("trl", "peft") if not importlib.util.find_spec(name)]:
        print(f'\nTRL: skipped, {" and ".join(missing)} not installed (pip install "trl[peft]==1.16.0")')
    else:
        trl_seconds, trl_peak = measure_trl(ways["usual"], args.rounds)  # last, because it takes the model over
        kept["seconds"]["trl"], kept["peak_gib"]["trl"] = trl_seconds, trl_peak
        kept["ratio"]["step_trl"] = trl_seconds["step"] / sum(seconds["ours"].values())
        print("\nTRL's GRPOTrainer, s: " + ", ".join(f"{phase} {value:.3f}" for phase, value in trl_seconds.items())
              + f"; {kept['ratio']['step_trl']:.1f} times ours" + (f"; peak memory {trl_peak:.1f} GiB" if trl_peak else ""))
    if args.json:
        grpo.write_json(args.json, kept | {"device": rrg.machine(mllm.device), "arguments": {name: str(value) for name, value in vars(args).items()}})
