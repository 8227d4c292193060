"""speed.py: one training step, ours and the usual way, timed phase by phase on the same games,
tokens and loss; and what each idea for speed brings.

    python benchmarks/speed.py                              # the toy model on this machine
    python benchmarks/speed.py --model DIR --image-tokens 256 --games 16 --max-tokens 96
                                                            # a real one, on a GPU
    python benchmarks/speed.py --grow growth.svg --json speed.json
                                                            # and how cost grows with each setting
    python benchmarks/speed.py --ideas                      # each idea for speed, with and without
    python benchmarks/speed.py --sharing                    # recognition: P photos x C descriptions

Ours: each picture is encoded once; each prompt is read once and continued by its G answers, in
sampling, reference and policy, and by every description put to a candidate. The usual way, as in
TRL and the authors' research code: `generate`, and plain forward passes, over B*G rows that each
carry their picture through the tower again; the listener is asked about one description and one
candidate at a time.

Both have the same sampled tokens and advantages after the rollout; that their losses and the
listener's beliefs agree is checked. Every answer is made --max-tokens long, so that both ways do
the same work. Each phase is timed --rounds times, in turn with the other way, after a first time
that does not count; the median is reported. Pictures count as new in every step, which for us they
are in the first pass over the games only.

Where TRL is installed (pip install "trl[peft]==1.16.0"), a step of its GRPOTrainer is timed as
well: the same games, adapters, loss and listener, answers as long, and the fastest settings that it
has without vLLM. Drawing the pictures and the optimizer's step are timed in none of the three.

Shapes: B games, G answers of each, N = B*G rows, K photos in a pool, C tokens of an answer.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import pathlib
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import data  # noqa: E402
import reward  # noqa: E402
import rrg  # noqa: E402
import run  # noqa: E402
import toy  # noqa: E402
from assistant import RECOGNITION  # noqa: E402
from data import Concept, Game, Photo, mine_games  # noqa: E402
from grpo import grpo_loss, token_logps  # noqa: E402
from lora import add_lora, lora_layers, lora_off, lora_state, remove_lora, write_json  # noqa: E402
from model import MLLM, ROWS, Completions, Prompt, chunks  # noqa: E402
from run import option  # noqa: E402

PHASES = ("encode", "rollout", "listen", "reference", "update")
MAX_PIXELS = 2**22  # more than any picture here has: none is shrunk


@dataclass
class Options:
    """Every option of this script."""

    model: str = option(str(toy.FOLDER), "checkpoint; default: the toy model", metavar="DIR")
    games: int = option(12, "B, games a step", least=1)
    samples: int = option(8, "G, answers a game", least=1)
    k: int = option(3, "K, pictures in a pool", least=2)
    image_tokens: int = option(16, "image tokens of a picture", least=1)
    max_tokens: int = option(40, "tokens of every answer; with --sharing at most", least=2)
    micro: int = option(4, "games in one pass with gradient, in both ways", least=1)
    rank: int = option(16, "rank of the adapters", least=1)
    rounds: int = option(3, "timed rounds", least=1)
    grow: str = option(
        "", "also: how our cost grows with G, K, picture size and games, drawn here", metavar="SVG"
    )
    ideas: bool = option(False, "instead: what each idea for speed brings")
    sharing: bool = option(False, "instead: recognition with and without shared prefixes")
    photos: int = option(10, "P, photos of --sharing", least=1)
    concepts: int = option(20, "C, described concepts of --sharing", least=1)
    json: str = option("", "write everything here", metavar="FILE")


# --------------------------------------------------------------------------------- the work to do
@dataclass
class Work:
    """A training step that is to be made: what all ways have in common."""

    mllm: MLLM
    options: Options
    games: list[Game]  # B
    prompts: list[Prompt]  # B, the speaker's
    photos: list[Photo]  # all that are in the games
    pairs: list[tuple]  # N * K, (photo, description) that the listener is asked about
    uniforms: torch.Tensor  # [C, N], the random numbers that we sample by
    answers: Completions  # N, that are learned from
    advantages: torch.Tensor  # [N]

    @property
    def micro_batches(self):
        """Slices of the N rows, whole games each."""
        size = self.options.micro * self.options.samples
        return [slice(first, first + size) for first in range(0, len(self.answers.ids), size)]


def drawn(photo):
    """The same photo, drawn now and only once, so that no drawing is timed."""
    photo = dataclasses.replace(photo, load=functools.cache(photo.load))
    photo.load()
    return photo


def make_games(mllm, options):
    """B games with pictures of the wanted size, each of one concept and the K - 1 that follow."""
    side = math.isqrt(options.image_tokens) * 2 * mllm.config.vision_config.patch_size
    per_category = max(4, math.ceil(options.games / 10))
    concepts = toy.world(0, side, concepts=per_category, photos=1)
    concepts = concepts[: max(options.games, options.k)]
    targets = [drawn(concept.photos[0]) for concept in concepts]
    others = [drawn(concept.photos[1]) for concept in concepts]

    games = []
    for i, concept in enumerate(concepts[: options.games]):
        pool = [others[(i + j) % len(others)] for j in range(options.k)]
        games.append(Game(concept.name, concept.category, targets[i], pool, positive=0))
    return games


def make_work(mllm, options):
    """Make games, and sample answers to them.   -> Work"""
    G = options.samples
    N = options.games * G
    games = make_games(mllm, options)
    prompts = rrg.speaker_prompts(games)
    uniforms = run.draw_uniforms(options.max_tokens, N, 0)  # [C, N]

    # The listener is not asked about the sampled answers, which may be malformed.
    colours = toy.ATTRIBUTES["colour"]
    pairs = []
    for row in range(N):
        game = games[row // G]
        colour = colours[row % len(colours)]
        text = f"A photo of a {game.category}. The {colour} one with a star badge."
        pairs += [(photo, text) for photo in game.pool]
    photos = [game.target for game in games] + [photo for photo, _ in pairs]

    return Work(
        mllm,
        options,
        games,
        prompts,
        photos=list(dict.fromkeys(photos)),
        pairs=pairs,
        uniforms=uniforms,
        answers=mllm.speak(prompts, G, options.max_tokens, uniforms),
        advantages=torch.linspace(-1, 1, N, device=mllm.device),
    )


# ---------------------------------------------------------------------------------- the two ways
class Way:
    """A way to make a step. Ways differ in `encode`, `rollout`, `listen` and `score`."""

    name = ""  # in tables and in --json

    def __init__(self, work):
        self.work = work
        self.mllm = work.mllm
        self.options = work.options

    def reference(self):
        """Log-probs of the answers with LoRA off.   -> [N, C]"""
        with torch.no_grad(), lora_off(self.mllm.model):
            return torch.cat([self.log_probs(rows) for rows in self.work.micro_batches])

    def update(self, reference):
        """The gradient of the loss.   reference [N, C] -> the loss"""
        answers = self.work.answers
        total = 0.0
        for rows in self.work.micro_batches:
            loss, _ = grpo_loss(
                self.log_probs(rows),
                answers.logps[rows],
                reference[rows],
                self.work.advantages[rows],
                answers.mask[rows],
                total=len(answers.ids),
            )
            loss.backward()
            total += loss.item()
        return total


class OurWay(Way):
    """Prefill once, continue many."""

    name = "ours"

    def encode(self):
        self.mllm.features.clear()
        self.mllm.encode_photos(self.work.photos)

    def rollout(self):
        work = self.work
        G = self.options.samples
        return self.mllm.speak(work.prompts, G, self.options.max_tokens, work.uniforms)

    def listen(self):
        """-> beliefs [N * K]"""
        with lora_off(self.mllm.model):
            return self.mllm.believe(self.work.pairs)

    def log_probs(self, rows):
        """Log-probs [rows, C] of the answers in these rows, with gradient."""
        G = self.options.samples
        prompts = self.work.prompts[rows.start // G : rows.stop // G]
        return self.mllm.log_probs(prompts, self.work.answers.ids[rows])


class UsualWay(Way):
    """Every row is read from its beginning, and its picture encoded for it."""

    name = "usual"

    def __init__(self, work):
        super().__init__(work)
        self.prompts = []  # N
        for prompt in work.prompts:
            self.prompts += [prompt] * self.options.samples

    def inputs(self, prompts):
        """What the model's own forward pass wants of N prompts, of one photo each."""
        mllm = self.mllm
        pictures = [prompt.photos[0].load() for prompt in prompts]
        pixels = mllm.processor(images=pictures, return_tensors="pt").to(mllm.device)
        grids = pixels["image_grid_thw"]  # [N, 3], in patches, of which 2 x 2 are a token
        counts = (grids.prod(-1) // 4).tolist()
        texts = []
        for prompt, count in zip(prompts, counts, strict=True):
            text = mllm.chat(1, prompt.text)
            texts.append(text.replace(mllm.image_token, mllm.image_token * count))
        ids, mask = mllm.pad(texts)  # [N, P], [N, P]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": (ids == mllm.config.image_token_id).int(),
            "pixel_values": pixels["pixel_values"].to(mllm.model.dtype),
            "image_grid_thw": grids,
        }

    def encode(self):
        """Nothing is kept: every pass encodes anew."""

    @torch.no_grad()
    def rollout(self):
        """-> ids [N, C]"""
        C = self.options.max_tokens
        torch.manual_seed(0)
        ids = []
        for rows in self.work.micro_batches:
            output = self.mllm.model.generate(
                **self.inputs(self.prompts[rows]),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                min_new_tokens=C,
                max_new_tokens=C,
            )
            ids.append(output[:, -C:])
        return torch.cat(ids)

    @torch.no_grad()
    def listen(self):
        """One description and one candidate at a time.   -> beliefs [N * K]"""
        mllm = self.mllm
        beliefs = []
        with lora_off(mllm.model):
            for photo, text in self.work.pairs:
                prompt = Prompt([photo], reward.LISTEN.replace("{text}", mllm.quote(text)))
                output = mllm.model(**self.inputs([prompt]), logits_to_keep=1)
                beliefs.append(reward.belief(output.logits[:, -1], mllm.yes, mllm.no))
        return torch.cat(beliefs).cpu()

    def log_probs(self, rows):
        """Log-probs [rows, C] of the answers in these rows, with gradient."""
        ids = self.work.answers.ids[rows]
        inputs = self.inputs(self.prompts[rows])
        of_answers = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": torch.zeros_like(ids).int(),
        }
        for name, extra in of_answers.items():
            inputs[name] = torch.cat([inputs[name], extra], 1)  # [rows, P + C]
        output = self.mllm.model(**inputs, logits_to_keep=ids.shape[1] + 1)
        return token_logps(output.logits[:, :-1], ids)


# ---------------------------------------------------------------------------------------- timing
def now(mllm):
    """The time in seconds, when the GPU has done all that it was asked to do."""
    if mllm.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Timed:
    """What a call returned, and what it took."""

    result: object
    seconds: float
    peak: float  # GiB of GPU memory; 0 without a GPU


def timed(mllm, call):
    """Make a call.   -> Timed"""
    on_gpu = mllm.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    started = now(mllm)
    result = call()
    seconds = now(mllm) - started
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    return Timed(result, seconds, peak)


def make_step(way):
    """Make one step, without the optimizer's.   -> {phase: Timed}"""
    mllm = way.mllm
    phases = {
        "encode": timed(mllm, way.encode),
        "rollout": timed(mllm, way.rollout),
        "listen": timed(mllm, way.listen),
        "reference": timed(mllm, way.reference),
    }
    update = functools.partial(way.update, phases["reference"].result)
    phases["update"] = timed(mllm, update)
    mllm.model.zero_grad()
    return phases


def check_agreement(ours, usual, exact):
    """Raise AssertionError if two ways differ by more than `exact`.   both {phase: Timed}"""
    for phase in ("listen", "reference", "update"):
        a = torch.as_tensor(ours[phase].result).float().cpu()
        b = torch.as_tensor(usual[phase].result).float().cpu()
        worst = (a - b).abs().max()
        assert worst <= exact, f"the two ways do not agree in {phase}: {worst:.2e}"


@dataclass
class Cost:
    """What a step takes."""

    seconds: dict[str, float]  # {phase: median}
    peak: float | None  # GiB of GPU memory

    @property
    def step(self):
        return sum(self.seconds.values())


def measure(ways, rounds):
    """Time steps of one or two ways, in turn, and check that two agree.   -> {name: Cost}"""
    steps = {way.name: [] for way in ways}  # of each way a list of {phase: Timed}
    for _ in range(rounds + 1):
        for way in ways:
            steps[way.name].append(make_step(way))
    if len(ways) == 2:
        ours, usual = steps.values()
        is_precise = ways[0].mllm.model.dtype == torch.float32
        check_agreement(ours[-1], usual[-1], exact=1e-4 if is_precise else 5e-2)

    costs = {}
    for name, of_way in steps.items():
        seconds = {}
        peak = 0.0
        for phase in PHASES:
            times = [step[phase].seconds for step in of_way[1:]]  # the first one warms up
            seconds[phase] = statistics.median(times)
            peak = max([peak] + [step[phase].peak for step in of_way])
        costs[name] = Cost(seconds, peak or None)
    return costs


# ----------------------------------------------------------------------------------- the floor
def fastest(mllm, call):
    """The shortest of five times that a call takes, in seconds."""
    return min(timed(mllm, call).seconds for _ in range(5))


def flops_per_second(mllm):
    """By a large matrix product."""
    size = 2048
    matrix = torch.randn(size, size, device=mllm.device).to(mllm.model.dtype)
    return 2 * size**3 / fastest(mllm, functools.partial(torch.matmul, matrix, matrix))


def bytes_per_second(mllm):
    """By a large copy, which reads and writes."""
    block = torch.empty(2**26, device=mllm.device)
    return 2 * block.numel() * block.element_size() / fastest(mllm, block.clone)


def count_weights(module):
    return sum(p.numel() for p in module.parameters())


def floor(work):
    """Seconds that our step cannot do without on this machine.   -> {phase: seconds}

    That is its FLOPs, two a weight and token, at the speed of a large matrix product. In the
    rollout every token also has to read the weights, at the speed of a copy; the larger of the
    two counts.
    """
    mllm = work.mllm
    C = work.options.max_tokens
    flops = flops_per_second(mllm)

    # Weights. Looking up an embedding costs nothing; only tokens that are sampled or judged need
    # the head.
    tower = count_weights(mllm.model.model.visual)
    layers = count_weights(mllm.decoder) - mllm.decoder.embed_tokens.weight.numel()
    head = mllm.model.lm_head.weight.numel()

    # Tokens: of a picture; of the speaker's prompt; of the listener's, which is read up to the
    # description once a candidate, and from there on once a question.
    [encoded] = mllm.encode_photos(work.photos[:1])
    image = len(encoded.features)
    prompt = image + len(mllm.encode(work.prompts[0].text))
    before, after = reward.LISTEN.split("{text}")
    beginning = image + len(mllm.encode(before))
    rest = len(mllm.encode(mllm.quote(work.pairs[0][1]) + after))
    candidates = len({photo for photo, _ in work.pairs})
    questions = len(set(work.pairs))

    # FLOPs.
    read = 2 * layers * len(work.games) * prompt
    write = 2 * (layers + head) * len(work.answers.ids) * C
    listen = 2 * (layers * (candidates * beginning + questions * rest) + head * questions)
    weight_bytes = (layers + head) * mllm.model.lm_head.weight.element_size()
    return {
        "encode": 2 * tower * 4 * image * len(work.photos) / flops,  # 4 patches a token
        "rollout": max((read + write) / flops, C * weight_bytes / bytes_per_second(mllm)),
        "listen": listen / flops,
        "reference": (read + write) / flops,
        "update": 2 * (read + write) / flops,
    }


# ------------------------------------------------------------------------------------------- TRL
class Processor(transformers.Qwen2VLProcessor):
    """What TRL reads prompts and pictures with: Qwen2-VL's own, but for the part for videos, which
    would need torchvision."""

    def __init__(self, image_processor, tokenizer):
        super().__init__(image_processor, tokenizer, chat_template=tokenizer.chat_template)


class Clock:
    """Notes how long calls of methods take."""

    def __init__(self, mllm):
        self.mllm = mllm
        self.seconds = defaultdict(list)  # {phase: one entry a call}

    def watch(self, phase, owner, method):
        """From now on each call of this method counts as `phase`."""
        call = getattr(owner, method)

        def clocked(*args, **kwargs):
            started = now(self.mllm)
            result = call(*args, **kwargs)
            self.seconds[phase].append(now(self.mllm) - started)
            return result

        setattr(owner, method, clocked)


class TrlReward:
    """The game's reward, as TRL calls it.

    The listener is asked about the same descriptions as in the other ways, so that it has as much
    to do. Made when the model has no adapters, which is how it has to listen.
    """

    def __init__(self, usual):
        self.usual = usual
        self.frozen = usual.listen()  # [N * K]
        positive = [game.positive for game in usual.work.games]  # B
        self.positive = torch.tensor(positive).repeat_interleave(usual.options.samples)  # [N]
        self.trainer = None  # set when there is one

    def pay(self, completion_ids, **_):
        lengths = {len(ids) for ids in completion_ids}
        assert lengths == {self.usual.options.max_tokens}, "TRL's answers have another length"
        with self.trainer.model.disable_adapter():
            beliefs = self.usual.listen()  # [N * K]
        assert torch.allclose(beliefs, self.frozen, atol=1e-2), "TRL's listener answers otherwise"
        beliefs = beliefs.view(len(self.positive), -1)  # [N, K]
        rewards, _ = reward.listener_reward(beliefs, self.positive)
        return rewards.tolist()


def trl_settings(usual, rounds, folder):
    """A step of B games as TRL's settings.   -> trl.GRPOConfig"""
    import trl

    options = usual.options
    on_gpu = usual.mllm.device.type == "cuda"
    # All parts of its step have the same size, so this is the largest one up to --micro.
    fitting = [n for n in range(1, options.micro + 1) if options.games % n == 0]
    micro = max(fitting)
    return trl.GRPOConfig(
        folder,
        max_steps=rounds + 1,
        shuffle_dataset=False,
        # Answers: plain sampling, and no end of text before their full length.
        num_generations=options.samples,
        max_completion_length=options.max_tokens,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        generation_kwargs={"min_new_tokens": options.max_tokens},
        # All rows of a step are sampled at once and updated on once, in parts: so no pass for the
        # old log-probs is needed.
        per_device_train_batch_size=micro * options.samples,
        gradient_accumulation_steps=options.games // micro,
        num_iterations=1,
        # The loss of grpo.py.
        beta=0.04,
        loss_type="grpo",
        scale_rewards="group",
        use_bias_correction_kl=False,
        # Speed. Checkpointing is on by default, and slower.
        bf16=on_gpu,
        use_cpu=not on_gpu,
        gradient_checkpointing=False,
        # Nothing is printed or written.
        report_to="none",
        logging_strategy="no",
        log_multimodal=False,
        disable_tqdm=True,
        save_strategy="no",
    )


def new_trl_trainer(usual, settings, steps):
    """TRL's trainer of the usual way's games, in the place of our adapters.   -> trl.GRPOTrainer"""
    import datasets
    import peft
    import trl

    mllm = usual.mllm
    layers = lora_layers(mllm.model)
    layer = next(iter(layers.values()))
    adapters = peft.LoraConfig(r=layer.rank, lora_alpha=layer.alpha, target_modules=list(layers))
    size = sum(tensor.numel() for tensor in lora_state(mllm.model).values())
    remove_lora(mllm.model)

    rows = []
    for prompt in usual.work.prompts:
        message = {"role": "user", "content": prompt.text}
        rows.append({"prompt": [message], "image": prompt.photos[0].load()})
    payer = TrlReward(usual)
    trainer = trl.GRPOTrainer(
        mllm.model,
        payer.pay,
        processing_class=Processor(mllm.processor, mllm.tokenizer),
        train_dataset=datasets.Dataset.from_list(rows * steps),
        peft_config=adapters,
        args=settings,
    )
    payer.trainer = trainer
    trainer.remove_callback(transformers.PrinterCallback)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert trained == size, f"TRL trains {trained} parameters and not {size}"
    return trainer


def measure_trl(usual, rounds):
    """Steps of TRL's GRPOTrainer.   -> Cost, whose phases are without "encode" and with "step"

    It takes the model over for good: the adapters are PEFT's from now on.
    """
    clock = Clock(usual.mllm)
    with tempfile.TemporaryDirectory() as folder:
        settings = trl_settings(usual, rounds, folder)
        trainer = new_trl_trainer(usual, settings, rounds + 1)
        # A training step contains the preparation, and that the rollout, the listener and the
        # reference.
        clock.watch("step", trainer, "training_step")
        clock.watch("prepare", trainer, "_prepare_inputs")
        clock.watch("rollout", trainer, "_generate")
        clock.watch("listen", trainer, "_calculate_rewards")
        peak = timed(usual.mllm, trainer.train).peak

    times = {}  # {phase: [rounds]}
    for phase, seconds in clock.seconds.items():
        of_steps = torch.tensor(seconds).view(rounds + 1, -1).sum(1)  # its parts added up
        times[phase] = of_steps[1:]  # the first one warms up
    prepare = times.pop("prepare")
    times["reference"] = prepare - times["rollout"] - times["listen"]
    times["update"] = times["step"] - prepare
    seconds = {}
    for phase in (*PHASES[1:], "step"):
        seconds[phase] = statistics.median(times[phase].tolist())
    return Cost(seconds, peak or None)


# ---------------------------------------------------------------------------------------- a step
def compare_costs(ours, usual):
    """How many times longer the usual way takes.   -> {phase or "step": ratio}"""
    ratios = {}
    for phase in PHASES[1:]:  # the usual way encodes in the other phases
        ratios[phase] = usual.seconds[phase] / ours.seconds[phase]
    ratios["step"] = usual.step / ours.step
    return ratios


def print_step(ours, usual, least, tokens):
    """Print the table of a step.

    least {phase: seconds}: the floor; tokens: how many are sampled in a step
    """
    ratios = compare_costs(ours, usual)
    ours_seconds = ours.seconds | {"step": ours.step}
    usual_seconds = usual.seconds | {"step": usual.step}
    least = least | {"step": sum(least.values())}
    print("| phase | ours, s | usual, s | ratio | floor, s |\n|---|---|---|---|---|")
    for phase, seconds in ours_seconds.items():
        ratio = f"{ratios[phase]:.1f}" if phase in ratios else "-"
        print(
            f"| {phase} | {seconds:.3f} | {usual_seconds[phase]:.3f} | {ratio} "
            f"| {least[phase]:.3f} |"
        )

    ours_rate = tokens / ours.seconds["rollout"]
    usual_rate = tokens / usual.seconds["rollout"]
    print(f"\n{ours_rate:.0f} tokens sampled a second, usual {usual_rate:.0f}")
    if ours.peak:
        print(f"peak memory {ours.peak:.1f} GiB, usual {usual.peak:.1f}")


@dataclass
class Growth:
    """What our step takes with one setting at a time."""

    setting: str  # the option's name
    value: int
    step: float  # seconds
    answer: float  # milliseconds an answer
    peak: float | None  # GiB


def grow(mllm, options):
    """How our step grows with one setting at a time.   -> [Growth]"""
    values = {
        "samples": (2, 4, 8, 16, 32),
        "k": (2, 3, 5, 9),
        "image_tokens": (16, 64, 144),
        "games": (4, 8, 16, 32),
    }
    if options.image_tokens >= 64:
        values["image_tokens"] = (64, 256, 1024)

    growths = []
    print("\n| | | step, s | an answer, ms | peak, GiB |\n|---|---|---|---|---|")
    for setting, of_setting in values.items():
        for value in of_setting:
            changed = dataclasses.replace(options, **{setting: value})
            mllm.features.clear()
            cost = measure([OurWay(make_work(mllm, changed))], options.rounds)["ours"]
            answer = 1000 * cost.step / (changed.games * changed.samples)
            peak = f"{cost.peak:.1f}" if cost.peak else "-"
            growths.append(Growth(setting, value, cost.step, answer, cost.peak))
            print(f"| {setting} | {value} | {cost.step:.2f} | {answer:.1f} | {peak} |", flush=True)
    return growths


def draw_growth(growths, file):
    """Milliseconds an answer as bars, a panel a setting, all to one scale, as an SVG file."""
    titles = {
        "samples": "G, answers a game",
        "k": "K, pictures in a pool",
        "image_tokens": "image tokens a picture",
        "games": "games a step",
    }
    highest = max(growth.answer for growth in growths)
    width = 230 * len(titles) + 20
    drawn = ""
    for panel, (setting, title) in enumerate(titles.items()):
        left = 20 + 230 * panel
        drawn += (
            f'<text x="{left}" y="22" font-weight="bold">{title}</text>'
            f'<path d="M{left} 170H{left + 200}" stroke="#888"/>'
        )
        bars = [growth for growth in growths if growth.setting == setting]
        for place, bar in enumerate(bars):
            x = left + 6 + 39 * place
            height = 110 * bar.answer / highest
            top = 170 - height
            drawn += (
                f'<rect x="{x}" y="{top:.1f}" width="30" height="{height:.1f}" fill="#2471a3"/>'
                f'<text x="{x + 15}" y="{top - 6:.1f}" text-anchor="middle">{bar.answer:.1f}</text>'
                f'<text x="{x + 15}" y="188" text-anchor="middle">{bar.value}</text>'
            )
    pathlib.Path(file).write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 200" '
        'font-family="sans-serif" font-size="13">'
        f'<rect width="{width}" height="200" fill="white"/>{drawn}</svg>\n'
    )


def prepare_training(mllm, options):
    """Put adapters on that change something, and let nothing end an answer."""
    torch.manual_seed(0)
    add_lora(mllm.model, options.rank, 2 * options.rank)
    for layer in lora_layers(mllm.model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.01)
    mllm.ends = torch.tensor([-1], device=mllm.device)


def compare_step(mllm, options):
    """Time a step in all ways, and print the tables.   -> what --json keeps"""
    print(
        f"{options.model}, {run.machine(mllm.device)}: {options.games} games, "
        f"G = {options.samples}, K = {options.k}, {options.image_tokens} image tokens, answers of "
        f"{options.max_tokens} tokens\n"
    )
    prepare_training(mllm, options)
    work = make_work(mllm, options)
    usual = UsualWay(work)
    costs = measure([OurWay(work), usual], options.rounds)
    least = floor(work)
    tokens = len(work.answers.ids) * options.max_tokens
    print_step(costs["ours"], costs["usual"], least, tokens)
    ratios = compare_costs(costs["ours"], costs["usual"])

    kept = {}
    if options.grow:
        growths = grow(mllm, options)
        draw_growth(growths, options.grow)
        kept["growth"] = [dataclasses.astuple(growth) for growth in growths]

    missing = [name for name in ("trl", "peft") if not importlib.util.find_spec(name)]
    if missing:
        words = " and ".join(missing)
        print(f'\nTRL: skipped, {words} not installed (pip install "trl[peft]==1.16.0")')
    else:
        cost = measure_trl(usual, options.rounds)  # last, because it takes the model over
        costs["trl"] = cost
        ratios["step_trl"] = cost.seconds["step"] / costs["ours"].step
        phases = [f"{phase} {seconds:.3f}" for phase, seconds in cost.seconds.items()]
        print(f"\nTRL's GRPOTrainer, s: {', '.join(phases)}; {ratios['step_trl']:.1f} times ours")
        if cost.peak:
            print(f"peak memory {cost.peak:.1f} GiB")
    return kept | {
        "seconds": {name: cost.seconds for name, cost in costs.items()},
        "peak_gib": {name: cost.peak for name, cost in costs.items()},
        "floor": least,
        "ratio": ratios,
    }


# --------------------------------------------------------------------------------------- the ideas
# An idea that makes a whole step less than a tenth faster, and costs clarity or memory, is dropped.
VOCABULARY = 151_936  # Qwen2-VL-2B's; the toy model's is too small to learn from
WIDTH = 1536  # likewise


@dataclass
class Idea:
    """An idea for speed."""

    text: str
    part: str  # of a step, that it touches
    outcome: str  # kept or dropped
    with_it: Callable
    without: Callable


def idea_of_leaving(way):
    """For answers that end where they end."""
    mllm = way.mllm
    uniforms = way.work.uniforms  # [C, N]

    def draw(hidden, numbers):
        """A token for each row, as MLLM.sample draws it.   [rows, D], [rows] -> ids [rows]"""
        summed = mllm.model.lm_head(hidden).float().softmax(-1).cumsum(-1)  # [rows, V]
        return torch.searchsorted(summed, numbers[:, None] * summed[:, -1:]).squeeze(1)

    @torch.no_grad()
    def with_it():
        prefix = mllm.prefill_prompts(way.work.prompts, way.options.samples)
        rows = torch.arange(len(prefix.last), device=mllm.device)  # those that are left
        ids = draw(prefix.last, uniforms[0])
        done = torch.isin(ids, mllm.ends)  # which of these have ended
        for numbers in uniforms[1:]:
            if done.all():
                break
            if done.sum() >= 0.25 * len(done):  # not sooner, since to copy the others costs time
                left = (~done).nonzero().squeeze(1)
                prefix = prefix.take(left)
                rows = rows[left]
                ids = ids[left]
                done = done[left]
            hidden = mllm.extend(prefix, ids[:, None])[:, -1]  # [rows, D]
            ids = draw(hidden, numbers[rows])
            done = done | torch.isin(ids, mllm.ends)

    text = "answers that have ended leave the batch"
    return Idea(text, "rollout", "dropped", with_it, way.rollout)


def idea_of_features(way):
    def without():
        way.mllm.features.clear()
        way.listen()

    return Idea("a picture's features are kept for the run", "listen", "kept", way.listen, without)


def idea_of_batches(way):
    G = way.options.samples

    def without():
        for number, prompt in enumerate(way.work.prompts):
            uniforms = way.work.uniforms[:, number * G : (number + 1) * G]
            way.mllm.speak([prompt], G, way.options.max_tokens, uniforms)

    text = "all games of a step are sampled in one batch"
    return Idea(text, "rollout", "kept", way.rollout, without)


def idea_of_prefixes(way):
    prompts = UsualWay(way.work).prompts  # N, G times each

    def without():
        way.mllm.speak(prompts, 1, way.options.max_tokens, way.work.uniforms)

    return Idea("a prompt is read once for its G answers", "rollout", "kept", way.rollout, without)


class KeptPrefixes:
    """In the place of MLLM.prefill: what was read once is never read again."""

    def __init__(self, prefill):
        self.read = prefill
        self.prefixes = {}

    def prefill(self, texts, photos):
        key = (tuple(texts), tuple(tuple(of_prompt) for of_prompt in photos))
        if key not in self.prefixes:
            self.prefixes[key] = self.read(texts, photos)
        return self.prefixes[key]


def idea_of_keeping(way, part, call):
    """Of what is read in a part of the step, which `call` makes."""
    kept = KeptPrefixes(way.mllm.prefill)

    def with_it():
        with mock.patch.object(way.mllm, "prefill", kept.prefill):
            call()

    text = f"prefixes of the {part} pass are kept across steps"
    return Idea(text, part, "dropped: 18 MB a photo at 2B", with_it, call)


def idea_of_searching(device):
    chances = torch.randn(128, VOCABULARY, device=device).softmax(-1)

    def with_it():
        torch.searchsorted(chances.cumsum(-1), torch.rand(128, 1, device=device))

    def without():
        torch.multinomial(chances, 1)

    text = "a token is drawn by searching the summed chances, 128 rows, 152k words"
    return Idea(text, "one token", "kept", with_it, without)


def idea_of_logits(device):
    head = torch.randn(VOCABULARY, WIDTH, device=device) / 40
    hidden = torch.randn(64, WIDTH, device=device, requires_grad=True)
    ids = torch.randint(VOCABULARY, (64,), device=device)

    def logps(hidden, ids):
        return token_logps(F.linear(hidden, head), ids)

    def with_it():
        checkpoint(logps, hidden, ids, use_reentrant=False).sum().backward()

    def without():
        logps(hidden, ids).sum().backward()

    text = (
        "logits are made again in the backward pass (it saves memory, not time), 64 tokens, 152k "
        "words"
    )
    return Idea(text, "log-probs", "kept", with_it, without)


def idea_of_cutting(way):
    """Answers of all lengths from a quarter of the longest on, one game in each micro-batch."""
    G = way.options.samples
    ids = way.work.answers.ids
    longest = ids.shape[1]
    spread = torch.linspace(longest / 4, longest, len(ids) // G)  # of each game
    lengths = spread.repeat_interleave(G).to(ids.device)  # [N]
    mask = torch.arange(longest, device=ids.device) < lengths[:, None]  # [N, C]

    @torch.no_grad()
    def score(mask):
        for number, prompt in enumerate(way.work.prompts):
            rows = slice(number * G, (number + 1) * G)
            way.mllm.log_probs([prompt], ids[rows], mask[rows])

    def with_it():
        score(mask)

    def without():
        score(torch.ones_like(mask))

    text = "a micro-batch is scored up to its longest answer, where lengths spread from 1/4 on"
    return Idea(text, "reference", "kept", with_it, without)


@contextlib.contextmanager
def folded(model):
    """Inside this block each weight is W + (alpha / r) B A, and comes back as it was."""
    layers = [layer for layer in lora_layers(model).values() if layer.enabled]
    weights = [layer.base.weight.clone() for layer in layers]
    with torch.no_grad():
        for layer in layers:
            product = layer.lora_B.weight @ layer.lora_A.weight
            layer.base.weight += (layer.alpha / layer.rank) * product
    with lora_off(model):
        yield
    for layer, weight in zip(layers, weights, strict=True):
        layer.base.weight.data.copy_(weight)


def idea_of_folding(way):
    def with_it():
        with folded(way.mllm.model):
            way.rollout()

    text = "adapters are folded into their weights while answers are sampled, in fp32"
    outcome = "dropped: all adapted weights twice in memory"
    return Idea(text, "rollout", outcome, with_it, way.rollout)


def idea_of_matrices():
    """500 photos of 100 concepts, vectors of 1536 numbers."""
    noise = torch.Generator().manual_seed(0)
    concepts = []
    vectors = {}
    for number in range(100):
        photos = [Photo(f"{number}/{i}", None) for i in range(5)]
        concepts.append(Concept(str(number), "mug", photos))
        for photo in photos:
            vectors[photo.name] = F.normalize(torch.randn(1536, generator=noise), dim=0)

    def with_it():
        mine_games(concepts, vectors, 3, 0)

    def without():
        with mock.patch.object(data.Similarities, "to_targets", dot_products):
            mine_games(concepts, vectors, 3, 0)

    text = "games are mined by matrix products, not by single dot products, 500 photos"
    return Idea(text, "mining", "kept", with_it, without)


def dot_products(similarities, targets):
    """In the place of Similarities.to_targets: one product for each pair."""
    rows = []
    for target in targets:
        vector = similarities.vectors[target.name]
        to_photo = {}
        for name, other in zip(similarities.photo_names, similarities.of_photos, strict=True):
            to_photo[name] = float(vector @ other)
        to_concept = {}
        for name, other in zip(similarities.concept_names, similarities.of_concepts, strict=True):
            to_concept[name] = float(vector @ other)
        rows.append(data.Similarity(to_photo, to_concept))
    return rows


def compare_idea(mllm, idea, rounds):
    """Time an idea with and without, in turn, and print its line.   -> what --json keeps of it"""
    with_it = []
    without = []
    for _ in range(rounds + 1):
        with_it.append(timed(mllm, idea.with_it).seconds)
        without.append(timed(mllm, idea.without).seconds)
    a = statistics.median(with_it[1:])
    b = statistics.median(without[1:])
    print(
        f"| {idea.text} | {idea.part} | {1000 * a:.0f} | {1000 * b:.0f} | {b / a:.2f} "
        f"| {idea.outcome} |",
        flush=True,
    )
    return {"idea": idea.text, "with": a, "without": b, "outcome": idea.outcome}


def compare_ideas(mllm, options):
    """Time each idea, and print the table.   -> what --json keeps"""
    print(
        f"{run.machine(mllm.device)}; {options.games} games, G = {options.samples}, "
        f"K = {options.k}, answers of {options.max_tokens} tokens\n"
    )
    print("| idea | part of a step | with, ms | without, ms | ratio | |\n|---|---|---|---|---|---|")
    leaving = idea_of_leaving(OurWay(make_work(mllm, options)))
    kept = [compare_idea(mllm, leaving, options.rounds)]

    prepare_training(mllm, options)  # from here on all answers have the same length
    way = OurWay(make_work(mllm, options))
    ideas = [
        idea_of_features(way),
        idea_of_batches(way),
        idea_of_prefixes(way),
        idea_of_keeping(way, "listen", way.listen),
        idea_of_keeping(way, "reference", way.reference),
        idea_of_cutting(way),
        idea_of_folding(way),
        idea_of_searching(mllm.device),
        idea_of_logits(mllm.device),
        idea_of_matrices(),
    ]
    kept += [compare_idea(mllm, idea, options.rounds) for idea in ideas]
    return {"ideas": kept}


# ------------------------------------------------------------------------ sharing in recognition
# Three ways to put photos to descriptions: pairs [(photo, quoted description), ...] -> texts
def recognise_shared(mllm, pairs, max_tokens):
    """A photo is encoded and read once, and all descriptions continue it."""
    mllm.features.clear()
    return mllm.answer(RECOGNITION, pairs, max_tokens)


def recognise_batched(mllm, pairs, max_tokens):
    """Every pair is a prompt of its own, and its picture is encoded for it."""
    mllm.features.clear()
    prompts = []
    for number, (photo, text) in enumerate(pairs):
        as_new = Photo(f"copy {number}", photo.load)
        prompts.append(Prompt([as_new], RECOGNITION.replace("{text}", text)))
    texts = []
    for part in chunks(prompts, ROWS):
        texts += mllm.speak(part, max_tokens=max_tokens).texts
    return texts


def recognise_one_by_one(mllm, pairs, max_tokens):
    texts = []
    for pair in pairs:
        texts += recognise_shared(mllm, [pair], max_tokens)
    return texts


RECOGNISERS = {
    "ours": recognise_shared,
    "batched": recognise_batched,
    "one by one": recognise_one_by_one,
}


def photos_and_descriptions(mllm, options):
    """Each of P photos with each of C descriptions.   -> [(photo, quoted description), ...]"""
    concepts, _ = rrg.load_world(mllm, "", seed=0)
    concepts = concepts[::3][: options.concepts]
    photos = rrg.photos_of([dataclasses.replace(c, photos=c.photos[1:]) for c in concepts])
    photos = [drawn(photo) for photo in photos[::2][: options.photos]]
    pairs = []
    for photo in photos:
        for concept in concepts:
            text = toy.description(concept.photos[0].truth, toy.IDENTITY)
            pairs.append((photo, mllm.quote(text)))
    return pairs


def compare_sharing(mllm, options):
    """Time recognition in three ways, and print the table.   -> what --json keeps"""
    pairs = photos_and_descriptions(mllm, options)
    seconds = {name: [] for name in RECOGNISERS}
    answers = {}
    for _ in range(options.rounds):
        for name, recognise in RECOGNISERS.items():
            call = functools.partial(recognise, mllm, pairs, options.max_tokens)
            done = timed(mllm, call)
            answers[name] = done.result
            seconds[name].append(done.seconds)

    photos = len({photo for photo, _ in pairs})
    print(
        f"{photos} photos x {len(pairs) // photos} descriptions = {len(pairs)} pairs, "
        f"{options.model} on {run.machine(mllm.device)}, median of {options.rounds}"
    )
    print(
        "| way | pictures encoded | seconds | against ours | same answers |\n|---|---|---|---|---|"
    )
    kept = {}
    for name in RECOGNISERS:
        encoded = photos if name == "ours" else len(pairs)
        median = statistics.median(seconds[name])
        ratio = median / statistics.median(seconds["ours"])
        same = [a == b for a, b in zip(answers["ours"], answers[name], strict=True)]
        agreement = statistics.mean(same)
        print(f"| {name} | {encoded} | {median:.1f} | {ratio:.1f} x | {agreement:.1%} |")
        kept[name] = {"seconds": median, "ratio": ratio, "same": agreement}
    return {"sharing": kept}


def main():
    options = run.fill_in(Options, run.read_options(Options, __doc__), is_toy=False)
    mllm = MLLM(options.model, MAX_PIXELS)
    if options.ideas:
        kept = compare_ideas(mllm, options)
    elif options.sharing:
        kept = compare_sharing(mllm, options)
    else:
        kept = compare_step(mllm, options)

    if options.json:
        arguments = {name: str(value) for name, value in vars(options).items()}
        about = {"device": run.machine(mllm.device), "arguments": arguments}
        write_json(options.json, kept | about)


if __name__ == "__main__":
    run.main(main)
