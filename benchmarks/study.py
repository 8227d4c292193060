"""study.py: base, SFT, RePIC, RRG and their ablations, side by side in the toy world: the tables of
README.md and benchmarks/README.md.

    python benchmarks/study.py --quick     # the main rows, one seed, short runs: 5 minutes
    python benchmarks/study.py             # every row, seeds 0 to 4: hours
    python benchmarks/study.py --tables    # run nothing: the tables, claims and curves of the CSV

A run is the command of its row (ROWS below), with the toy model's settings for the rest, and then
the table that evaluate.py makes of its adapter. Names in captions (--grounding) are measured for
the main rows and for RePIC's, since the game's variants are not taught any. RePIC's and SFT's rows
are read with their own adapters, and once more by the model without, as "base reads". The row
"base, refined" is the model as it came, which rewrites its own descriptions without state and
place. (The toy model was taught that prompt when it was made; no row learns it.)

Each finished run is kept at once as a line of benchmarks/study.csv: all figures, and curves as
means over twentieths of the run. So the study can be stopped at any time, and goes on where it was.
Several processes may share the file, each with --seeds of its own. (On two cores two of them with
OMP_NUM_THREADS=1 get more done than one with both.)

How fast a run of the game learns is told by the oracle, which is never trained on: "steps to 90 %"
is the first step at which it has accepted nine in ten of the sampled answers of the last five steps
(of a run that never gets there, all its steps), and "area" the mean over all steps. Both are of the
row's own games, so they compare rows that play the same ones. "plain" is the share of captions of
single photos, asked for without any names, all of whose claims hold.

Figures are mean ± standard deviation over the seeds. Recognition is that among look-alikes of a
category (evaluate.py). A claim is the difference of two rows, seed by seed; it holds if its mean
lies more than one standard deviation above 0. ("As well as", "keeps" and the like: if it lies no
more than one below 0.) Who makes it stands beside it.
"""

import argparse
import csv
import dataclasses
import itertools
import pathlib
import re
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass

import torch

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import evaluate  # noqa: E402
import naming  # noqa: E402
import repic  # noqa: E402
import rrg  # noqa: E402
import run  # noqa: E402
import toy  # noqa: E402
from assistant import Entry, adapt, without_tags  # noqa: E402
from data import DataError  # noqa: E402
from lora import remove_lora  # noqa: E402
from model import MLLM, Prompt  # noqa: E402
from reward import Description  # noqa: E402


# ------------------------------------------------------------------------------- what is compared
@dataclass(frozen=True)
class Row:
    """What is trained."""

    name: str
    command: str  # a script and its options; "" for the model as it came


@dataclass(frozen=True)
class Column:
    """A figure of a table."""

    title: str
    figure: str  # as evaluate.py calls it, or of `game_figures` or `speed_figures`
    part: str = "seen"  # of which categories, where the table is not of one part anyway
    is_share: bool = True  # and so a percentage


@dataclass(frozen=True)
class Claim:
    """What is claimed: that a figure of one row is higher than that of another."""

    text: str
    higher: str  # the name of a row
    lower: str
    figure: str
    source: str = "ours"  # who says so
    at_least: bool = False  # it may also be as high


ROWS = [
    Row("base", ""),
    Row("base, refined", ""),
    Row("SFT on the truth", "repic.py --sft truth"),
    Row("SFT on base", "repic.py --sft base"),
    Row("RePIC", "repic.py"),
    Row("RePIC without OCT", "repic.py --without oct"),
    Row("RePIC without VLT", "repic.py --without vlt"),
    Row("RePIC without ICT", "repic.py --without ict"),
    Row("RePIC without multi-ICT", "repic.py --without multi_ict"),
    Row("RePIC without length", "repic.py --without length"),
    Row("RePIC, too much ICT", "repic.py --mix 12,11,65,12"),
    Row("RRG", "rrg.py"),
    Row("RRG, easy positive", "rrg.py --positive easy"),
    Row("RRG, random negatives", "rrg.py --negatives random"),
    Row("RRG, no length term", "rrg.py --length-weight 0"),
    Row(
        "RRG, negatives of other categories, no length term",
        "rrg.py --negatives other --length-weight 0",
    ),
    Row("RRG, K = 2", "rrg.py --k 2"),
    Row("RRG, K = 5", "rrg.py --k 5"),
    Row("RRG, binary reward", "rrg.py --reward binary"),
    Row("RRG, ungated soft reward", "rrg.py --reward soft"),
    Row("RRG, no format term", "rrg.py --format-weight 0"),
    Row("RRG, no KL", "rrg.py --beta 0"),
    Row("RRG, G = 2", "rrg.py --samples 2"),
    Row("RRG, G = 4", "rrg.py --samples 4"),
    Row("RRG, G = 16", "rrg.py --samples 16"),
    Row("RRG, listener trained along", "rrg.py --listener trained"),
]
REFINED = "base, refined"
MAIN = ("base", REFINED, "SFT on the truth", "SFT on base", "RePIC", "RRG")
# More options of --quick. SFT meets a third of RePIC's prompts, so it takes a third of the steps.
QUICK = {
    "SFT on the truth": ["--steps", "10"],
    "SFT on base": ["--steps", "10"],
    "RePIC": ["--steps", "30"],
    "RRG": ["--steps", "30"],
}
PARTS = ("seen", "unseen")
CURVES = ("reward", "kl", "oracle")  # columns of metrics.csv
GAMES = tuple(rrg.HELD_OUT)  # what rrg.py measures in held-out games
TASKS = tuple(repic.KINDS)  # what repic.py measures in held-out tasks
READ = ("captioning_f1", "recognition_inside", "vqa")  # figures that depend on who reads
NAMED = ("precision", "recall", "f1", "matched", "characters")  # figures of names in captions

# The table of README.md, of the rows in MAIN: seen and unseen categories in one cell.
FIRST = [
    Column("caption F1", "captioning_f1"),
    Column("recognition", "recognition_inside"),
    Column("leakage", "leakage"),
    Column("oracle", "oracle"),
    Column("2 names", "names_2_right_f1"),
]
# All rows in short.
SUMMARY = [
    Column("caption F1", "captioning_f1"),
    Column("unseen", "captioning_f1", "unseen"),
    Column("recognition", "recognition_inside"),
    Column("unseen", "recognition_inside", "unseen"),
    Column("oracle", "oracle"),
    Column("unseen", "oracle", "unseen"),
    Column("area", "area"),
    Column("steps to 90 %", "steps_to_90", is_share=False),
    Column("leakage", "leakage"),
    Column("2 names", "names_2_right_f1"),
    Column("2 names, wrong", "names_2_wrong_f1"),
]
# The two tables of all rows, of seen and of unseen categories.
COLUMNS = [
    Column("caption F1", "captioning_f1"),
    Column("base reads", "base_reader_captioning_f1"),
    Column("recognition", "recognition_inside"),
    Column("base reads", "base_reader_recognition_inside"),
    Column("VQA", "vqa"),
    Column("leakage", "leakage"),
    Column("words", "words", is_share=False),
    Column("oracle", "oracle"),
    Column("plain", "plain"),
    Column("1 name", "names_1_right_f1"),
    Column("1 name, wrong", "names_1_wrong_f1"),
    Column("2 names", "names_2_right_f1"),
    Column("retrieved", "names_2_retrieved_f1"),
    Column("wrong", "names_2_wrong_f1"),
    Column("matched", "names_2_right_matched"),
    Column("characters", "names_2_right_characters", is_share=False),
    Column("4 names", "names_4_right_f1"),
    Column("wrong", "names_4_wrong_f1"),
    Column("matched", "names_4_right_matched"),
]
ABSTRACT = "RRG, abstract"
NOTE = "third-party note on RRG"
TABLE_2 = "RePIC, Table 2"
TABLE_3 = "RePIC, Table 3 (not on DreamBooth)"
TABLE_4 = "RePIC, Table 4"
TRUTH = "SFT on the truth"
OTHER_CATEGORIES = "RRG, negatives of other categories, no length term"
# Who says what of RRG against another row; what is not here is ours.
SOURCES = {
    ("base", "recognition"): NOTE,
    ("base", "captioning"): NOTE,
    ("base", "questions"): NOTE,
    ("base", "leakage"): ABSTRACT,
    ("RePIC", "recognition"): ABSTRACT,
    ("RePIC", "captioning"): ABSTRACT,
}


def claims_of_rrg_against(other):
    """In five figures.   -> [Claim, ...]"""
    claims = []
    for what, figure in (("recognition", "recognition_inside"), ("captioning", "captioning_f1")):
        source = SOURCES.get((other, what), "ours")
        claims.append(Claim(f"RRG beats {other} in {what}", "RRG", other, figure, source))

    text = f"RRG answers questions as well as {other}"
    source = SOURCES.get((other, "questions"), "ours")
    claims.append(Claim(text, "RRG", other, "vqa", source, at_least=True))
    source = SOURCES.get((other, "leakage"), "ours")
    claims.append(Claim(f"RRG leaks less than {other}", other, "RRG", "leakage", source))
    claims.append(Claim(f"RRG beats {other} in hard games (oracle)", "RRG", other, "oracle"))
    return claims


CLAIMS = [
    # RRG against the others
    *claims_of_rrg_against("base"),
    *claims_of_rrg_against(REFINED),
    *claims_of_rrg_against(TRUTH),
    *claims_of_rrg_against("SFT on base"),
    *claims_of_rrg_against("RePIC"),
    Claim("RRG keeps plain captions true", "RRG", "base", "plain", at_least=True),
    Claim("RRG keeps naming two things", "RRG", "base", "names_2_right_f1", at_least=True),
    # the game
    Claim(
        "a hard positive leads to better games than an easy one",
        "RRG",
        "RRG, easy positive",
        "oracle",
    ),
    Claim(
        "a hard positive leads to less leakage than an easy one",
        "RRG, easy positive",
        "RRG",
        "leakage",
    ),
    Claim(
        "a hard positive leads to better captioning than an easy one",
        "RRG",
        "RRG, easy positive",
        "captioning_f1",
    ),
    Claim(
        "a hard positive leads to better recognition than an easy one",
        "RRG",
        "RRG, easy positive",
        "recognition_inside",
    ),
    Claim(
        "hard negatives beat random ones in hard games", "RRG", "RRG, random negatives", "oracle"
    ),
    Claim(
        "hard negatives beat those of other categories in hard games",
        "RRG, no length term",
        OTHER_CATEGORIES,
        "oracle",
    ),
    Claim(
        "hard negatives beat those of other categories in recognition",
        "RRG, no length term",
        OTHER_CATEGORIES,
        "recognition_inside",
    ),
    Claim(
        "the soft-gated reward is at least as good as the binary one",
        "RRG",
        "RRG, binary reward",
        "oracle",
        NOTE,
        at_least=True,
    ),
    Claim(
        "the soft-gated reward learns faster than the binary one (area)",
        "RRG",
        "RRG, binary reward",
        "area",
    ),
    Claim(
        "the soft-gated reward learns faster than the ungated one (area)",
        "RRG",
        "RRG, ungated soft reward",
        "area",
    ),
    Claim("a pool of three leads to better games than one of two", "RRG", "RRG, K = 2", "oracle"),
    Claim("a pool of five leads to better games than one of three", "RRG, K = 5", "RRG", "oracle"),
    Claim(
        "learning is as fast with the KL penalty (area)", "RRG", "RRG, no KL", "area", at_least=True
    ),
    Claim("the KL penalty keeps plain captions truer", "RRG", "RRG, no KL", "plain"),
    Claim("eight answers a game teach faster than two (area)", "RRG", "RRG, G = 2", "area"),
    Claim("eight answers a game lead to better games than two", "RRG", "RRG, G = 2", "oracle"),
    Claim("eight teach faster than four (area)", "RRG", "RRG, G = 4", "area"),
    Claim("sixteen teach faster than eight (area)", "RRG, G = 16", "RRG", "area"),
    Claim(
        "a frozen listener teaches faster than one that is trained along (area)",
        "RRG",
        "RRG, listener trained along",
        "area",
    ),
    Claim(
        "a frozen listener leads to better games", "RRG", "RRG, listener trained along", "oracle"
    ),
    # RePIC
    Claim("RePIC beats base in recognition", "RePIC", "base", "recognition_inside"),
    Claim("RePIC beats base in captioning", "RePIC", "base", "captioning_f1"),
    Claim("RePIC beats base in naming two things", "RePIC", "base", "names_2_right_f1", TABLE_2),
    Claim("RePIC beats base in naming four things", "RePIC", "base", "names_4_right_f1", TABLE_2),
    Claim(
        "RePIC beats SFT on the truth in naming two things",
        "RePIC",
        TRUTH,
        "names_2_right_f1",
        TABLE_2,
    ),
    Claim(
        "RePIC beats SFT on base in naming two things", "RePIC", "SFT on base", "names_2_right_f1"
    ),
    Claim(
        "RePIC beats SFT on base in naming four things", "RePIC", "SFT on base", "names_4_right_f1"
    ),
    Claim(
        "SFT on the truth beats base in naming two things",
        TRUTH,
        "base",
        "names_2_right_f1",
        TABLE_2,
    ),
    Claim(
        "SFT on the truth falls for a wrong reference more than base",
        TRUTH,
        "base",
        "names_1_wrong_f1",
        TABLE_3,
    ),
    Claim(
        "SFT on the truth falls for a wrong reference more than RePIC",
        TRUTH,
        "RePIC",
        "names_1_wrong_f1",
        TABLE_3,
    ),
    Claim("RePIC keeps plain captions true", "RePIC", "base", "plain", at_least=True),
    Claim(
        "RePIC names two things less without OCT",
        "RePIC",
        "RePIC without OCT",
        "names_2_right_f1",
        TABLE_4,
    ),
    Claim(
        "RePIC names two things less without VLT",
        "RePIC",
        "RePIC without VLT",
        "names_2_right_f1",
        TABLE_4,
    ),
    Claim(
        "RePIC names two things less without ICT",
        "RePIC",
        "RePIC without ICT",
        "names_2_right_f1",
        TABLE_4,
    ),
    Claim(
        "RePIC names two things less without length",
        "RePIC",
        "RePIC without length",
        "names_2_right_f1",
        TABLE_4,
    ),
    Claim(
        "RePIC names two things less without multi-ICT",
        "RePIC",
        "RePIC without multi-ICT",
        "names_2_right_recall",
        "RePIC, Table A.2",
    ),
    Claim(
        "without OCT RePIC falls for two wrong references more",
        "RePIC without OCT",
        "RePIC",
        "names_2_wrong_f1",
    ),
    Claim(
        "too much ICT makes RePIC fail in naming two things",
        "RePIC",
        "RePIC, too much ICT",
        "names_2_right_f1",
        "RePIC, Figure A.10 c",
    ),
]


# ------------------------------------------------------------------------------------------ a run
def train_row(row, seed, more, folder):
    """Run the row's command with `more` options, or go on with a run that was stopped."""
    if (folder / "result.json").exists():
        return
    script, *of_row = shlex.split(row.command)
    command = [sys.executable, ROOT / script, "--out", folder]
    if (folder / "state.pt").exists():
        command += ["--resume"]
    else:
        command += [*of_row, "--seed", str(seed), *more]
    subprocess.run(command, check=True)


def run_figures(result):
    """What the run itself measured, before and after.   -> {column of the CSV: value}"""
    names = [name for name in result["before"] if name != "unseen"]
    figures = {}
    for when in ("before", "after"):
        for name in names:
            figures[f"seen_{name}_{when}"] = result[when][name]
            figures[f"unseen_{name}_{when}"] = result[when]["unseen"][name]
    return figures


def log_of(folder):
    """The rows of a run's metrics.csv.   -> [{column: text}, ...]"""
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def speed_figures(log):
    """How fast a run of the game has learned, by the oracle (see the top).

    log: rows of metrics.csv -> {column of the CSV: value}, empty for a run of another kind
    """
    if not log[0].get("oracle"):
        return {}
    accepted = [float(step["oracle"]) for step in log]
    steps_to_90 = len(accepted)
    for end in range(5, len(accepted) + 1):
        if statistics.mean(accepted[end - 5 : end]) >= 0.9:
            steps_to_90 = end
            break
    return {"seen_steps_to_90": steps_to_90, "seen_area": statistics.mean(accepted)}


def curves_of(log):
    """The means of columns of metrics.csv over twentieths of the run.   -> {column: numbers}"""
    curves = {}
    for name in CURVES:
        if not log[0].get(name):  # only a run of the game has an oracle
            continue
        means = []
        for i in range(20):
            twentieth = log[i * len(log) // 20 : (i + 1) * len(log) // 20]
            if twentieth:  # a run of fewer than 20 steps has less
                means.append(statistics.mean(float(step[name]) for step in twentieth))
        curves[f"{name}_curve"] = " ".join(f"{mean:.4g}" for mean in means)
    return curves


def game_figures(mllm, speaker, seed, refined=False):
    """Of the held-out games: how many greedy descriptions win by the truth, and how many captions
    of their targets, asked for without any names, tell the truth.

    speaker: an adapter or "base"; refined: its descriptions are written again by the model as it
    came -> {column of the CSV: value}
    """
    config, _ = rrg.read_settings(["--seed", str(seed)])
    games = rrg.mine(mllm, config)
    figures = {}
    for part, of_part in (("seen", games.seen), ("unseen", games.unseen)):
        adapt(mllm, speaker)
        rows = rrg.play_greedily(mllm, of_part, config)
        captions = mllm.greedy([Prompt([game.target], repic.PLAIN) for game in of_part])
        remove_lora(mllm.model)
        texts = [without_tags(row["text"]) for row in rows]
        if refined:
            texts = refine(mllm, texts)
        descriptions = [Description(text, "") for text in texts]
        accepted = toy.truth_columns(of_part, descriptions)["oracle"]
        figures[f"{part}_oracle"] = accepted.mean().item()
        targets = [game.target for game in of_part]
        true = 0
        for caption, target in zip(captions, targets, strict=True):
            true += toy.tells_truth(caption, target.truth)
        figures[f"{part}_plain"] = true / len(targets)
    return figures


def refine(mllm, texts):
    """Descriptions, written again without state and place.   -> texts"""
    entries = [Entry("", "", [], text) for text in texts]
    return [entry.text for entry in evaluate.refine(mllm, entries, 128)]


def table_figures(mllm, options, speaker, name):
    """The row called so in evaluate.py's table of a speaker.   -> {part and figure: value}"""
    of_parts = evaluate.table(mllm, mllm, options, [speaker])["rows"][name]
    figures = {}
    for part in PARTS:
        for name in of_parts[part].keys() - {"counts", "reader"}:
            figures[f"{part}_{name}"] = of_parts[part][name]
    return figures


def measure_row(row, seed, more, folder):
    """Train one row with one seed and `more` options, and measure it.

    -> its line: {column of the CSV: value}
    """
    line = {"row": row.name, "seed": seed}
    speaker = "base"
    if row.command:
        train_row(row, seed, more, folder)
        speaker = str(folder / "adapter")
        result = run.load_json(folder / "result.json")
        line["steps"] = result["steps"]
        line["seconds"] = result["seconds"]
        line |= run_figures(result)
        log = log_of(folder)
        line |= curves_of(log) | speed_figures(log)

    # What the descriptions are worth to the assistant, and names in captions.
    options = evaluate.read_settings(["--seed", str(seed)])
    has_own_names = row.name in MAIN and row.name != REFINED
    about_names = has_own_names or row.command.startswith("repic.py")
    options = dataclasses.replace(options, grounding=about_names)
    mllm = MLLM(options.model, options.max_pixels)
    of_table = "refined" if row.name == REFINED else speaker
    line |= table_figures(mllm, options, speaker, of_table)
    if evaluate.reader_of(speaker, options) == "adapter":
        options = dataclasses.replace(options, reader="base", grounding=False)
        figures = table_figures(mllm, options, speaker, of_table)
        for part, name in itertools.product(PARTS, READ):
            line[f"{part}_base_reader_{name}"] = figures[f"{part}_{name}"]

    return line | game_figures(mllm, speaker, seed, refined=row.name == REFINED)


# ---------------------------------------------------------------------------------------- the CSV
@dataclass(frozen=True)
class Run:
    """What a line of the CSV is about."""

    row: str
    seed: int


def csv_columns():
    """The heading of the CSV, which has room for the figures of every method."""
    columns = ["row", "seed", "steps", "seconds"]
    columns += [f"{name}_curve" for name in CURVES]
    for part in PARTS:
        for when in ("before", "after"):
            columns += [f"{part}_{name}_{when}" for name in GAMES + TASKS]
    for part in PARTS:
        columns += [f"{part}_{name}" for name in evaluate.COLUMNS]
        columns += [f"{part}_base_reader_{name}" for name in READ]
        columns += [f"{part}_oracle", f"{part}_plain"]
        for name in naming.GROUNDING:  # "names_1_right_f1" and so on
            stem = name.removesuffix("f1")
            columns += [f"{part}_{stem}{figure}" for figure in NAMED]
    return columns + ["seen_steps_to_90", "seen_area"]


def read_lines(file):
    """The lines of the CSV.   -> {Run: {column: text}}, empty if there is no file"""
    if not file.exists():
        return {}
    lines = {}
    with open(file, newline="") as rows:
        for line in csv.DictReader(rows):
            lines[Run(line["row"], int(line["seed"]))] = line
    return lines


def numbers(curve):
    """A curve of the CSV as numbers."""
    return [float(value) for value in curve.split()]


def check_heading(file):
    """Raise DataError for a CSV that lines of this version do not fit into."""
    if not file.exists():
        return
    with open(file, newline="") as rows:
        heading = next(csv.reader(rows), None)
    if heading != csv_columns():
        raise DataError(f"{file} has other columns than are measured now; move it away")


def append_line(file, line):
    """Append a line to the CSV; the first one writes the heading."""
    is_new = not file.exists()
    texts = {}
    for name, value in line.items():
        texts[name] = f"{value:.5g}" if isinstance(value, float) else value
    with open(file, "a", newline="") as rows:
        writer = csv.DictWriter(rows, csv_columns(), extrasaction="ignore")
        if is_new:
            writer.writeheader()
        writer.writerow(texts)


def run_missing(file, names, seeds, more):
    """Run those rows, by their names, that the CSV has no line of yet.

    more {row name: more options of its command}, for the rows that have any
    """
    check_heading(file)
    rows = [row for row in ROWS if row.name in names]
    for seed in seeds:
        for row in rows:
            if Run(row.name, seed) in read_lines(file):
                continue
            print(f"\n=== {row.name}, seed {seed}", flush=True)
            slug = re.sub(r"\W+", "-", row.name.lower())
            folder = ROOT / "runs" / file.stem / f"{slug}-{seed}"
            append_line(file, measure_row(row, seed, more.get(row.name, []), folder))


class Study:
    """The lines of all runs."""

    def __init__(self, lines):
        self.lines = {}  # {row name: {seed: line}}, in the order of ROWS and of the seeds
        for row in ROWS:
            runs = [kept for kept in lines if kept.row == row.name]
            runs.sort(key=lambda kept: kept.seed)
            if runs:
                self.lines[row.name] = {kept.seed: lines[kept] for kept in runs}

    def values(self, row, figure):
        """{seed: value} of a row's figure ("seen_oracle", ...), where it is known."""
        values = {}
        for seed, line in self.lines.get(row, {}).items():
            if line.get(figure):
                values[seed] = float(line[figure])
        return values

    def mean_text(self, row, figure, form=".1%"):
        """Mean ± standard deviation of a row's figure, in words."""
        return spread(list(self.values(row, figure).values()), form)

    def gaps(self, higher, lower, figure):
        """How much higher a figure is in one row than in another, seed by seed."""
        a = self.values(higher, figure)
        b = self.values(lower, figure)
        return [a[seed] - b[seed] for seed in a if seed in b]

    def curves(self, row, name):
        """The curves of a row's runs, each as numbers."""
        return [numbers(line[f"{name}_curve"]) for line in self.lines.get(row, {}).values()]


# ------------------------------------------------------------------------------------- the tables
def deviation(values):
    """Standard deviation over the seeds; 0 of a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0


def spread(values, form=".1%"):
    """Mean ± standard deviation in words; "-" where there is nothing."""
    if not values:
        return "-"
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {format(deviation(values), form.replace('+', ''))}"


def print_table(title, columns, rows):
    """Print Markdown.   columns: titles; rows {name: cells}"""
    print(f"\n| {title} | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")


def print_first(study):
    """The main rows, as README.md shows them."""
    rows = {}
    for row in MAIN:
        rows[row] = []
        for column in FIRST:
            parts = []
            for part in PARTS:
                values = study.values(row, f"{part}_{column.figure}").values()
                parts.append(spread([100 * value for value in values], ".1f"))
            rows[row].append(" / ".join(parts))
    print_table("%, seen / unseen", [column.title for column in FIRST], rows)


def print_summary(study):
    """All rows, in short."""
    rows = {}
    for row in study.lines:
        rows[row] = []
        for column in SUMMARY:
            values = study.values(row, f"{column.part}_{column.figure}").values()
            unit = 100 if column.is_share else 1
            rows[row].append(spread([unit * value for value in values], ".1f"))
    print_table("%", [column.title for column in SUMMARY], rows)


def print_held_out(study, row, names):
    """What a row's runs measured themselves, before and after."""
    columns = ["before", "after", "before, unseen categories", "after, unseen categories"]
    rows = {}
    for name in names:
        rows[name] = []
        for part in PARTS:
            for when in ("before", "after"):
                rows[name].append(study.mean_text(row, f"{part}_{name}_{when}"))
    print_table(f"{row}, held out", columns, rows)


def print_gains(study):
    """What the assistant does with the descriptions of base and of RRG."""
    seen = ["base", "RRG", "gain"]
    unseen = [f"{title}, unseen categories" for title in seen]
    rows = {}
    for name in evaluate.COLUMNS:
        form = ".1f" if name == "words" else ".1%"
        cells = []
        for part in PARTS:
            figure = f"{part}_{name}"
            cells.append(study.mean_text("base", figure, form))
            cells.append(study.mean_text("RRG", figure, form))
            cells.append(spread(study.gaps("RRG", "base", figure), "+" + form))
        rows[name.replace("_", " ")] = cells
    print_table("", seen + unseen, rows)


def print_all_rows(study, part):
    """Everything side by side, of seen or of unseen categories."""
    rows = {}
    for row, lines in study.lines.items():
        rows[row] = [str(len(lines))]
        for column in COLUMNS:
            form = ".1%" if column.is_share else ".0f"
            rows[row].append(study.mean_text(row, f"{part}_{column.figure}", form))
    titles = [column.title for column in COLUMNS]
    print_table(f"{part} categories", ["seeds", *titles], rows)


def verdict(claim, gaps):
    """Does a claim hold, by its differences?   -> words, "" of fewer than two"""
    if len(gaps) < 2:
        return ""
    mean, margin = statistics.mean(gaps), statistics.stdev(gaps)
    holds = mean >= -margin if claim.at_least else mean > margin
    return "holds" if holds else "does **not** hold"


def print_claims(study):
    rows = {}
    for claim in CLAIMS:
        rows[claim.text] = [claim.source]
        for part in PARTS:
            gaps = study.gaps(claim.higher, claim.lower, f"{part}_{claim.figure}")
            rows[claim.text] += [spread(gaps, "+.1%"), verdict(claim, gaps)]
    columns = ["source", "difference, seen categories", "", "difference, unseen categories", ""]
    print_table("claim", columns, rows)


def print_fifths(study):
    """How RRG's oracle goes up, and that it does not come down again."""
    runs = []
    for curve in study.curves("RRG", "oracle"):
        if len(curve) == 20:
            runs.append([statistics.mean(curve[i : i + 4]) for i in range(0, 20, 4)])
    if not runs:
        return
    words = [spread(fifth) for fifth in zip(*runs, strict=True)]
    drop = max(max(fifths) - fifths[-1] for fifths in runs)
    print(
        "\nRRG: the oracle accepts of the *sampled* descriptions, by fifths of training, "
        f"{', '.join(words)}; the last fifth lies at most {drop:.1%} below the best of its run"
    )


def print_tables(study):
    print_first(study)
    print_summary(study)
    print_held_out(study, "RRG", GAMES)
    print_held_out(study, "RePIC", TASKS)
    print_gains(study)
    for part in PARTS:
        print_all_rows(study, part)
    print_claims(study)
    print_fifths(study)


# ------------------------------------------------------------------------------------- the curves
COLOURS = {"RRG": "#c0392b", "RePIC": "#2471a3"}  # the methods that sample
PANELS = {"reward": "reward of sampled answers", "kl": "KL to the frozen model, per token"}


class Panel:
    """One curve of the methods that sample, mean and standard deviation over the seeds, as SVG.

    number: its place in the picture, from the left
    """

    def __init__(self, study, name, number):
        self.title = PANELS[name]
        self.left = 60 + 400 * number
        self.points = {}  # {row: a list of 20, each of one value a seed}
        for row in COLOURS:
            if row in study.lines:
                self.points[row] = list(zip(*study.curves(row, name), strict=False))
        highest = []
        for points in self.points.values():
            highest += [max(values) for values in points]
        self.top = max(highest, default=1)

    def x(self, i):
        """Of the i-th twentieth of a run."""
        return self.left + 320 * i / 19

    def y(self, value):
        return 230 - 190 * value / self.top

    def path(self, values, places):
        """Points of a line, "x,y x,y ..."."""
        pairs = zip(places, values, strict=True)
        return " ".join(f"{self.x(i):.1f},{self.y(value):.1f}" for i, value in pairs)

    def axes(self):
        left = self.x(0)
        right = self.x(19)
        return (
            f'<text x="{left}" y="24" font-weight="bold">{self.title}</text>'
            f'<path d="M{left} 40V230H{right}" fill="none" stroke="#888"/>'
            f'<text x="{left - 8}" y="45" text-anchor="end">{self.top:.2g}</text>'
            f'<text x="{left - 8}" y="234" text-anchor="end">0</text>'
            f'<text x="{right}" y="250" text-anchor="end">end of training</text>'
        )

    def curve(self, row, number):
        """A row's mean, and its standard deviation as a band; `number` places its name below."""
        means = [statistics.mean(values) for values in self.points[row]]
        deviations = [deviation(values) for values in self.points[row]]
        upper = [mean + off for mean, off in zip(means, deviations, strict=True)]
        lower = [mean - off for mean, off in zip(means, deviations, strict=True)]

        places = list(range(len(means)))
        there = self.path(upper, places)
        back = self.path(reversed(lower), reversed(places))
        colour = COLOURS[row]
        return (
            f'<polygon points="{there} {back}" fill="{colour}" opacity="0.2"/>'
            f'<polyline points="{self.path(means, places)}" fill="none" stroke="{colour}" '
            f'stroke-width="2"/>'
            f'<text x="{self.x(2) + 70 * number}" y="250" fill="{colour}">{row}</text>'
        )


def draw_curves(study, file):
    """Reward and KL over training, as an SVG file."""
    drawn = ""
    for number, name in enumerate(PANELS):
        panel = Panel(study, name, number)
        drawn += panel.axes()
        for place, row in enumerate(panel.points):
            drawn += panel.curve(row, place)
    file.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 262" font-family="sans-serif" '
        'font-size="13">'
        f'<rect width="820" height="262" fill="white"/>{drawn}</svg>\n'
    )


# ------------------------------------------------------------------------------- the command line
def read_arguments():
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the main rows, seed 0, 30 steps each; kept in runs/study-quick.csv",
    )
    parser.add_argument("--tables", action="store_true", help="run nothing, only print the tables")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2, 3, 4],
        help="seeds to run (default 0 1 2 3 4)",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=names,
        default=names,
        metavar="ROW",
        help="rows to run (default: all): " + "; ".join(names),
    )
    return parser.parse_args()


def main():
    args = read_arguments()
    more_options = {}
    file = ROOT / "benchmarks" / "study.csv"
    if args.quick:
        more_options = QUICK
        file = ROOT / "runs" / "study-quick.csv"
        args.seeds = [0]
        args.rows = MAIN
    file.parent.mkdir(exist_ok=True)

    if not args.tables:
        run_missing(file, args.rows, args.seeds, more_options)

    print(f"\n{run.machine(torch.device('cpu'))}")
    study = Study(read_lines(file))
    print_tables(study)
    if not args.quick:
        draw_curves(study, ROOT / "assets" / "curves.svg")


if __name__ == "__main__":
    run.main(main)
