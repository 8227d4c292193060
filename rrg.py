"""rrg.py: the reinforced multimodal reference game: one model is both speaker and listener.

    1 mine       a target photo and a pool of K: another photo of the same concept, the hard
                 positive, and K - 1 photos of look-alikes, the hard negatives         (data.py)
    2 speak      the model, LoRA on, describes the target G times                      (model.py)
    3 listen     the model, LoRA off, says of each photo in the pool, from the description alone,
                 whether it fits                                                       (model.py)
    4 reward     how much of the listener's belief is on the right photo, and its form (reward.py)
    5 advantage  how much better a description is than its G - 1 siblings              (grpo.py)
    6 update     make the better ones likelier, close to the model without LoRA        (grpo.py)

A claim about the background fails on the hard positive, which was most likely taken elsewhere; a
vague description fits the hard negatives too. What remains is what identifies.

    python rrg.py                                                   # toy world, CPU, one minute
    python rrg.py --model Qwen/Qwen2-VL-2B-Instruct --data photos/  # real photos, one GPU
    python rrg.py --out runs/x --resume                             # go on with a killed run
    torchrun --nproc_per_node=4 rrg.py --model ... --data ...       # several GPUs share the games

Read `train_step` first: it is the six stages. `train` is the loop around it.

Source: RRG, Personalizing MLLMs via Reinforced Multimodal Reference Game (ECCV 2026), which these
files call the paper, and its authors' research code.

Where it departs from them:
1. Everything is "prefill once, continue many" (model.py).
2. The listener is this network with LoRA off, and is asked each question once a step.
3. The vision tower is frozen (lora.py).
4. Sampling is plain: temperature 1, nothing cut off (model.py).
5. How it is learned is not published (learning rate, beta, G, epochs), so it is as in a published
   system of the kind: LoRA of rank 64 and alpha 128, lr 1e-5, beta 0.04, G 8. (benchmarks/README.md
   has a table of all settings with their sources. The research code's runs are called alpha 1024.)
6. An answer may take 256 tokens. (The research code lets a description take 128.)

Shapes: B games, G descriptions of each, N = B*G rows, K photos in a pool, C tokens of the longest
answer.
"""

import random
import shlex
import time
from dataclasses import dataclass

import torch

import run
import toy
from data import (
    DETAIL,
    Concept,
    DataError,
    Game,
    Split,
    games_of_step,
    load_concepts,
    mine_games,
    pick_concepts,
    split_concepts,
)
from grpo import Batch, group_advantages, update
from lora import add_lora, lora_off
from model import MLLM, Clip, Prompt
from reward import format_reward, length_reward, listener_reward, parse, speaker_prompt
from run import option


# ---------------------------------------------------------------------------------- the settings
# Each field is an option of the command line: option(default, help, toy=the default for the toy
# model, least=the smallest number allowed).
@dataclass
class LearnerConfig:
    """What is trained, on what, and how: the settings that repic.py shares."""

    # --- what is trained, on what ---
    model: str = option(
        str(toy.FOLDER),
        "checkpoint: a folder, or a hub name such as Qwen/Qwen2-VL-2B-Instruct; default: the toy",
        metavar="DIR",
    )
    data: str = option(
        "",
        "folder of photos, a folder for each thing (data.py has the layouts), or a hub dataset "
        "such as google/dreambooth; default: the toy world",
        metavar="DIR",
    )
    train_concepts: str = option(
        "",
        "train on these and hold out all others: a file with a name a line, or how many to draw, "
        "so that their photos are about a thousand; default: a fifth is held out, and of four "
        "categories or more some whole ones",
        metavar="N|FILE",
    )
    out: str = option("", "run folder; default: runs/DATE-TIME", metavar="DIR")
    seed: int = option(
        0, "seed of splits, games, initial adapters and samples", least=0, most=2**32 - 1
    )
    # --- how much ---
    steps: int = option(125, "training steps", toy=60, least=1)
    games: int = option(16, "B, games or prompts a step", toy=12, least=1)
    samples: int = option(8, "G, answers to each", least=2)
    max_tokens: int = option(256, "longest possible answer, in tokens", toy=56, least=1, most=2**15)
    # --- the learner ---
    lr: float = option(
        1e-5, "learning rate, reached after the warm-up; falls to 0", toy=5e-4, least=0, most=1
    )
    warmup: int = option(10, "steps of warm-up", least=0)
    mu: int = option(1, "updates on each batch; the clip works from the second on", least=1)
    beta: float = option(0.04, "weight of the KL to the model without LoRA", least=0, most=1e3)
    eps_low: float = option(0.2, "clip the probability ratio at 1 - eps_low", least=0, most=1)
    eps_high: float = option(0.2, "clip the probability ratio at 1 + eps_high", least=0, most=1e3)
    loss: str = option(
        "grpo", "how tokens are averaged (grpo.py)", choices=("grpo", "dr_grpo", "dapo")
    )
    std_floor: float = option(
        0.05, "a group's standard deviation is taken to be at least this", least=0, most=1
    )
    rank: int = option(64, "rank of the LoRA adapters", toy=16, least=1, most=2**12)
    alpha: int = option(128, "scale of the adapters: the update is alpha/rank B A", toy=32, least=1)
    # --- memory: micro changes no result ---
    micro: int = option(
        1, "games in one backward pass; raise it if there is memory", toy=12, least=1
    )
    max_pixels: int = option(
        401408,
        "photos are shrunk to this; 401408 is 512 image tokens",
        toy=20736,
        least=784,
        most=DETAIL**2,
    )
    # --- measuring and saving ---
    eval_games: int = option(
        100,
        "games, or tasks of a kind, with things kept for the test, and as many with things of "
        "categories that are never trained on",
        least=1,
    )
    save_every: int = option(25, "steps between two saves of the state", least=1)


@dataclass
class Config(LearnerConfig):
    """Every setting of a run of the game; each is an option of the command line."""

    # --- the game and what it pays ---
    k: int = option(3, "K, photos in a pool: a hard positive and K - 1 hard negatives", least=2)
    train_games: int = option(
        0, "train on so many of the mined games, drawn by the seed; 0: on all of them", least=0
    )
    negatives: str = option(
        "hard",
        "look-alikes, any photos of other things, or any of things of other categories",
        choices=("hard", "random", "other"),
    )
    positive: str = option(
        "hard", "the least or the most similar other photo", choices=("hard", "easy")
    )
    embedder: str = option(
        "",
        "CLIP that measures similarity, such as openai/clip-vit-large-patch14-336; default: the "
        "model's own vision tower",
        metavar="CLIP",
    )
    reward: str = option(
        "soft_gated",
        "how the listener's choice pays (reward.py)",
        choices=("soft_gated", "binary", "soft"),
    )
    listener: str = option(
        "frozen", "the model with LoRA off, or as it is trained", choices=("frozen", "trained")
    )
    listener_weight: float = option(1.0, "weight of the listener's reward", least=0, most=1)
    format_weight: float = option(1.0, "weight of the format reward", toy=0.2, least=0, most=1)
    length_weight: float = option(0.1, "weight of the length reward", least=0, most=1)


def read_settings(argv=None):
    """The command line.   -> (Config, whether to go on with a run)"""
    given = run.read_options(Config, __doc__, argv, resumable=True)
    if given.pop("resume", False):
        return run.resumed_settings(Config, given), True
    run.refuse_photos_without_model(given)
    config = run.fill_in(Config, given, toy.is_toy(given.get("model", toy.FOLDER)))
    config.out = config.out or run.default_folder()
    if not config.listener_weight and not config.format_weight and not config.length_weight:
        raise DataError("one of the weights of the rewards must be above 0, or nothing is learned")
    return config, False


# Columns of metrics.csv, in words; all are means over the answers of the step unless they say
# otherwise. The first table is about the learner, and repic.py shares it.
LEARNER_METRICS = {
    "nll": "minus the mean log-probability of an answer's tokens: an estimate of the entropy",
    "kl": "k3 estimate of KL(speaker || the model with LoRA off), per token; empty with --beta 0, "
    "where nobody asks for it",
    "clip_fraction": "share of tokens whose gradient the clip has cut; 0 with one update per step",
    "zero_std_groups": "share of games whose answers all earned the same: no advantage, only KL",
    "distinct": "share of different texts among the G answers of a game",
    "completion_length": "tokens an answer",
    "grad_norm": "norm of the gradient before it is clipped to 1",
    "lr": "learning rate",
    "seconds": "wall time of the step",
}
METRICS = {
    "step": "training step, from 1",
    "reward": "weighted sum of the three rewards below",
    "listener_reward": "what the listener's choice pays",
    "format_reward": "0.34 + 0.33 + 0.33 for the well-formed fields",
    "length_reward": "1/3 for a coarse phrase, 2/3 for a detailed sentence of the right length",
    "listener_accuracy": "share of answers from which the listener picks the hard positive; "
    "malformed ones count as wrong",
    "parsed": "share of answers that are well formed",
    "oracle": "toy only: share of answers whose every claim holds for the hard positive and for "
    "none of the negatives; never trained on",
    "leakage": "toy only: share of answers that mention place, pose or light",
    **LEARNER_METRICS,
}
# What result.json calls the means of some columns of `score` over greedy answers in held-out games.
HELD_OUT = {
    "identification": "listener_accuracy",
    "oracle": "oracle",
    "leakage": "leakage",
    "coverage": "coverage",  # toy only: share of colour, pattern and badge that is named
    "parsed": "parsed",
}


# ---------------------------------------------------------------------------------- stage 1: mine
@dataclass
class Games:
    """Games to train on, and games held out: of seen categories, of categories never seen."""

    train: list[Game]
    seen: list[Game]
    unseen: list[Game]
    split: Split  # the concepts that they are about


def picture_side(mllm):
    """Pixels of a toy picture: as the toy's tower wants them, or 8 x 8 tokens of a real tower."""
    patch = mllm.config.vision_config.patch_size
    if patch == toy.PATCH:
        return toy.SIDE
    return 8 * 2 * patch  # a token is two by two patches


def load_world(mllm, folder, seed, train_concepts="", skipped_file=None):
    """The concepts in a folder of photos, or of the toy world where there is none.

    train_concepts: as --train-concepts; "" leaves the choice to `split_concepts`
    skipped_file: where to list the files that are skipped
    -> ([Concept, ...], Split)
    """
    unseen = None
    if folder:
        concepts = load_concepts(folder, skipped_file=skipped_file)
    else:
        concepts = toy.world(seed, picture_side(mllm))
        unseen = toy.UNSEEN
    if not train_concepts:
        return concepts, split_concepts(concepts, seed, unseen)

    chosen = pick_concepts(concepts, train_concepts, seed)
    names = {concept.name for concept in chosen}
    others = [concept for concept in concepts if concept.name not in names]
    return concepts, Split(train=chosen, test=others, unseen=[])


def photos_of(concepts: list[Concept]):
    """All photos of some concepts."""
    return [photo for concept in concepts for photo in concept.photos]


def mine(mllm, config):
    """Stage 1: from photos to games.   -> Games

    Raises DataError where there are fewer things to train on than photos in a pool.
    """
    embedder = Clip(config.embedder, mllm.device) if config.embedder else mllm
    skipped = run.skipped_file(config.out)
    concepts, split = load_world(mllm, config.data, config.seed, config.train_concepts, skipped)
    if len(split.train) < config.k:
        raise DataError(
            f"--k {config.k} needs {config.k} things to train on, and here are {len(split.train)} "
            f"({len(concepts)} things, of which {len(concepts) - len(split.train)} kept for the "
            "test); add photos of more things, or lower --k"
        )
    vectors = embedder.embed(photos_of(concepts))  # {photo name: [D]}

    train = mine_games(
        split.train,
        vectors,
        config.k,
        config.seed,
        negatives=config.negatives,
        positive=config.positive,
    )
    if 0 < config.train_games < len(train):
        train = random.Random(f"train games {config.seed}").sample(train, config.train_games)

    # What is learned is always measured in hard games. Every other concept may be a rival there,
    # since those that are held out are few.
    held_out = []
    for part in (split.test, split.unseen):
        games = mine_games(part, vectors, config.k, config.seed, rivals=concepts)
        rng = random.Random(f"held out {config.seed}")
        held_out.append(rng.sample(games, min(len(games), config.eval_games)))
    seen, unseen = held_out
    counts = {"train": len(train), "seen": len(seen), "unseen": len(unseen)}
    run.print_split(split, counts, "games")
    return Games(train, seen, unseen, split)


# ---------------------------------------------------------------------------- stages 2 to 4, a step
def speaker_prompts(games):
    """Stage 2: what the speaker sees and is asked.   -> [Prompt] * B"""
    return [Prompt([game.target], speaker_prompt(game.target, game.category)) for game in games]


def listen(mllm, games, descriptions):
    """Stage 3: the listener's belief in each photo of the pool.   -> [N, K]

    descriptions: N of them, G in a row for each game; None where an answer was malformed. Nobody
    is asked about those: their rows stay 0, which the reward pays with 0.
    """
    per_game = len(descriptions) // len(games)
    beliefs = torch.zeros(len(descriptions), len(games[0].pool))  # [N, K]
    questions = []  # (photo, text)
    places = []  # (row, candidate) of each question
    for row, description in enumerate(descriptions):
        if description is None:
            continue
        for candidate, photo in enumerate(games[row // per_game].pool):
            questions.append((photo, description.text))
            places.append((row, candidate))
    for place, belief in zip(places, mllm.believe(questions), strict=True):
        beliefs[place] = belief
    return beliefs


def score(games, texts, descriptions, beliefs, config):
    """Stage 4: what each of N answers earned, and how.   -> {column: float64 [N]}

    texts, descriptions: N, G in a row for each game; beliefs [N, K] from `listen`. In the toy world
    there are columns of what is true of the descriptions, too.
    """
    per_game = len(texts) // len(games)
    positive = torch.tensor([game.positive for game in games])  # [B]
    positive = positive.repeat_interleave(per_game)  # [N]
    listener, picked_right = listener_reward(beliefs, positive, config.reward)

    # In double precision, so that what is logged are exact means; stage 5 works in single.
    listener = listener.double()
    form = torch.tensor([format_reward(text) for text in texts], dtype=torch.float64)
    lengths = [length_reward(description) for description in descriptions]
    length = torch.tensor(lengths, dtype=torch.float64)
    parsed = torch.tensor([description is not None for description in descriptions]).double()
    reward = (
        config.listener_weight * listener
        + config.format_weight * form
        + config.length_weight * length
    )
    columns = {
        "listener_reward": listener,
        "format_reward": form,
        "length_reward": length,
        "listener_accuracy": picked_right.double(),
        "parsed": parsed,
        "reward": reward,
    }
    return columns | toy.truth_columns(games, descriptions)  # which are measured, never paid


def train_step(mllm, games, optimizer, step, config):
    """Play B games and learn from them.   -> (metrics, the first game with its answers)"""
    G = config.samples
    N = len(games) * G

    # 1. Mine. The games were mined before training; the speaker sees a target only.
    prompts = speaker_prompts(games)

    # 2. Speak, with LoRA on.
    seed = config.seed * 1_000_003 + step  # no other pair of seed and step has this number
    # N counts this process's rows. draw_uniforms draws for all processes and returns these N.
    uniforms = run.draw_uniforms(config.max_tokens, N, seed)  # [max_tokens, N]
    answers = mllm.speak(prompts, G, config.max_tokens, uniforms)  # N rows, G in a row a game
    descriptions = [parse(text) for text in answers.texts]  # None: a malformed answer

    # 3. Listen, with LoRA off, so that the two cannot agree on a code of their own.
    with lora_off(mllm.model, when=config.listener == "frozen"):
        beliefs = listen(mllm, games, descriptions)  # [N, K]

    # 4. Reward. By default a wrong pick pays nothing, a right one its share of all belief.
    scores = score(games, answers.texts, descriptions, beliefs, config)  # {column: [N]}

    # 5. Advantage. The siblings are the baseline.
    rewards = scores["reward"].float().view(-1, G)  # [B, G]
    advantages = group_advantages(rewards, std_floor=config.std_floor).flatten()  # [N]

    # 6. Update. The reference policy is the same network with LoRA off.
    def logps(rows):
        """Log-probs [n, C] of the answers in the slice `rows`, under the model as it is now."""
        return mllm.log_probs(
            prompts[rows.start // G : rows.stop // G], answers.ids[rows], answers.mask[rows]
        )

    # Micro-batches are whole games, so that a prompt is read once. (The last may reach beyond N,
    # where slices end by themselves.)
    size = config.micro * G
    micro_batches = [slice(first, first + size) for first in range(0, N, size)]
    reference = None
    if config.beta > 0:
        with torch.no_grad(), lora_off(mllm.model):
            reference = torch.cat([logps(rows) for rows in micro_batches])  # [N, C]
    batch = Batch(
        ids=answers.ids,
        mask=answers.mask,
        old_logps=answers.logps,
        ref_logps=reference,
        advantages=advantages.to(mllm.device),
    )
    metrics = update(
        logps,
        batch,
        micro_batches,
        optimizer,
        mu=config.mu,
        eps_low=config.eps_low,
        eps_high=config.eps_high,
        beta=config.beta,
        loss=config.loss,
        max_length=config.max_tokens,
    )

    scores |= answer_columns(answers.mask, answers.logps)
    rows = answer_rows(answers.texts[:G], scores, beliefs)
    metrics |= summarise(scores, answers.texts, G)
    return metrics, games[0].record() | {"samples": rows}


# ----------------------------------------------------------------------------- what is written down
def answer_columns(mask, logps):
    """Length and entropy of sampled answers.   mask, logps [N, C] -> {column: float64 [N]}"""
    lengths = mask.sum(1)  # [N]
    nll = -(logps * mask).sum(1) / lengths  # [N]
    return {"nll": nll.double().cpu(), "completion_length": lengths.double().cpu()}


def answer_rows(texts, scores, beliefs):
    """The first answers as samples.jsonl and result.json keep them.   -> [{"text", "rho", ...}]

    texts: of as many answers as are wanted; scores {column: [N]}; beliefs [N, K], of which a
    malformed answer has none
    """
    rows = []
    for i, text in enumerate(texts):
        rho = beliefs[i].tolist() if scores["parsed"][i] else None
        row = {"text": text, "rho": rho}
        for name, column in scores.items():
            row[name] = column[i].item()
        rows.append(row)
    return rows


def summarise(scores, texts, samples):
    """The means of a step's columns, and how the G answers of a game differ.   -> {column: float}

    Of this process's answers; `run.Folder.log` takes the mean over all processes.

    scores {column: [N]}; texts: N, `samples` in a row a game
    """
    metrics = {name: column.mean().item() for name, column in scores.items()}

    rewards = scores["reward"].float().view(-1, samples)  # [B, G], as the advantages see them
    all_equal = rewards.amax(1) == rewards.amin(1)  # [B]
    metrics["zero_std_groups"] = all_equal.double().mean().item()

    different = 0
    for first in range(0, len(texts), samples):
        different += len(set(texts[first : first + samples]))
    metrics["distinct"] = different / len(texts)
    return metrics


# -------------------------------------------------------------------------------------- the exam
def play_greedily(mllm, games, config):
    """One greedy description in each held-out game.   -> rows as in `answer_rows`, in their order

    Each process plays its part.
    """
    games = run.my_part(games)
    rows = []
    if games:
        prompts = speaker_prompts(games)
        texts = mllm.greedy(prompts, config.max_tokens, "playing held-out games")
        descriptions = [parse(text) for text in texts]
        with lora_off(mllm.model, when=config.listener == "frozen"):
            beliefs = listen(mllm, games, descriptions)
        rows = answer_rows(texts, score(games, texts, descriptions, beliefs, config), beliefs)
    return run.gather(rows)


def held_out_figures(rows):
    """The figures of result.json; None for those that only the toy world knows."""
    figures = {}
    for figure, column in HELD_OUT.items():
        figures[figure] = None
        if rows and column in rows[0]:
            figures[figure] = sum(row[column] for row in rows) / len(rows)
    return figures


def spread_out(kinds, count):
    """Places of `count` items, of which each kind comes once before any comes again."""
    first_of_kind = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    others = [i for i in range(len(kinds)) if i not in first_of_kind]
    return (first_of_kind + others)[:count]


def exam(mllm, games, config):
    """Play the held-out games.   -> {"figures", "examples"}

    figures {name: fraction, ..., "unseen": the same of unseen categories}; examples: six games of
    seen ones, each with the description and the listener's beliefs. In result.json "before" and
    "after" hold the figures of the two exams, and "examples" is {"before": [...], "after": [...]}.
    """
    rows = play_greedily(mllm, games.seen, config)
    figures = held_out_figures(rows)
    figures["unseen"] = None
    if games.unseen:
        figures["unseen"] = held_out_figures(play_greedily(mllm, games.unseen, config))

    examples = []
    for i in spread_out([game.category for game in games.seen], 6):
        said = {"text": rows[i]["text"], "rho": rows[i]["rho"]}
        examples.append(games.seen[i].record() | said)
    return {"figures": figures, "examples": examples}


# -------------------------------------------------------------------------------------- the loop
def learning_rate(step, config):
    """Linear warm-up to lr, then linear decay towards 0."""
    warm_up = (step + 1) / max(1, config.warmup)
    decay = (config.steps - step) / max(1, config.steps - config.warmup)
    return config.lr * min(warm_up, decay)


def new_learner(mllm, config):
    """Put adapters on the model.   -> the optimizer that trains them"""
    torch.manual_seed(config.seed)  # so that adapters start alike in all processes, on any data
    wrapped = add_lora(mllm.model, config.rank, config.alpha)
    adapters = [p for p in mllm.model.parameters() if p.requires_grad]

    total = sum(p.numel() for p in mllm.model.parameters())
    trained = sum(p.numel() for p in adapters)
    print(
        f"{config.model} on {mllm.device}: {total / 1e6:.1f}M parameters, {trained / 1e6:.2f}M of "
        f"them in adapters on {len(wrapped)} layers; run folder {config.out}"
    )
    # No weight decay: what holds the adapters back is the KL.
    return torch.optim.AdamW(adapters, lr=config.lr, weight_decay=0.0)


def train(config, resume=False):
    """The whole run: mine, measure, train, measure again.   -> the content of result.json"""
    folder = run.Folder(config, "rrg", list(METRICS), resume)
    mllm = MLLM(config.model, config.max_pixels)
    games = mine(mllm, config)
    optimizer = new_learner(mllm, config)

    if resume:
        state = folder.restore(mllm.model, optimizer, games.split)
    else:  # every lora_B is still 0, so this measures the model as it came
        state = run.State(step=0, seconds=0.0, before=exam(mllm, games, config))
        folder.begin(mllm.device, games.split)
        folder.save(state, mllm.model, optimizer)

    for step in folder.steps(state.step):
        started = time.time()
        lr = learning_rate(step, config)
        optimizer.param_groups[0]["lr"] = lr

        todays = games_of_step(games.train, step, config.games, config.seed)
        metrics, example = train_step(mllm, run.my_part(todays), optimizer, step, config)

        seconds = time.time() - started
        state.step = step + 1
        state.seconds += seconds
        metrics |= {"step": state.step, "lr": lr, "seconds": seconds}
        folder.log(metrics, {"step": state.step} | example)
        if state.step % config.save_every == 0 or state.step == config.steps:
            folder.save(state, mllm.model, optimizer)

    result = folder.finish(state, exam(mllm, games, config), mllm.device)
    show(result)
    print_where(result, config.out)
    return result


# ----------------------------------------------------------------------------------- the outcome
def percent(value):
    """A fraction in words; "-" for None."""
    return "-" if value is None else f"{value:.1%}"


def held_out_table(result):
    """What the exams found: [[name, before, after, both of unseen categories], ...] as texts.

    Figures that are not known are left out.
    """
    parts = [
        result["before"],
        result["after"],
        result["before"]["unseen"] or {},
        result["after"]["unseen"] or {},
    ]
    lines = []
    for name, value in result["before"].items():
        if name != "unseen" and value is not None:
            lines.append([name, *(percent(part.get(name)) for part in parts)])
    return lines


def show_held_out(result):
    """Print the table of the exams."""
    print(f"\n{'held-out games':16}{'seen categories':>22}{'unseen categories':>24}")
    print(f"{'':16}{'before':>12}{'after':>10}{'before':>14}{'after':>10}")
    for name, *cells in held_out_table(result):
        print("{:16}{:>12}{:>10}{:>14}{:>10}".format(name, *cells))


def show_beliefs(row):
    """The listener's beliefs in words, that in the hard positive starred."""
    if row["rho"] is None:
        return "malformed"
    words = []
    for place, rho in enumerate(row["rho"]):
        star = "*" if place == row["answer"] else ""
        words.append(f"{star}{rho:.2f}")
    return " ".join(words)


def show(result):
    """Print before and after side by side, and three held-out games."""
    show_held_out(result)
    examples = result["examples"]
    for before, after in list(zip(examples["before"], examples["after"], strict=True))[:3]:
        print(f"\n{before['target']} (the listener sees {', '.join(before['pool'])})")
        for when, row in (("before", before), ("after", after)):
            description = parse(row["text"])
            text = description.text if description else row["text"][:300]
            print(f"  {when:7}{text!r}  [{show_beliefs(row)}]")


def print_where(result, out, has_page=True):
    """Print what lies in the run folder, and what to do next."""
    print(
        f"\n{result['seconds']:.0f} s of training. In {out}/: metrics.csv, samples.jsonl, "
        "result.json, and the speaker in adapter/"
    )
    if has_page:
        command = shlex.join(["python", "report.py", str(out)])
        print(f"To see what its descriptions are worth, as one page: {command}")


def main():
    config, resume = read_settings()
    train(config, resume)


if __name__ == "__main__":
    run.main(main, resumable=True)
