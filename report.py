"""report.py: a finished run as one page: `python report.py [RUN]`.

The page is RUN/report.html, one file that any browser opens, without scripts and without anything
from elsewhere:

    Results    what the exams of the run found, then its table (evaluate.py)
    Curves     some columns of metrics.csv, step by step
    Games      six held-out games or tasks, with the answers before and after training
    Groups     all answers of one training game, what they earned and their advantages

    python report.py                     # the newest run in runs/
    python report.py runs/x              # this one
    python report.py runs/x --grounding  # options of evaluate.py change the table

The table is of the run's own model, photos and seed, unless options say otherwise, and goes to
RUN/table.json, too.
"""

import base64
import csv
import html
import io
import json
import pathlib
import re
import shlex
from dataclasses import dataclass

import torch

import evaluate
import repic
import rrg
import run
import toy
from data import DataError, one_line_errors
from grpo import group_advantages
from lora import write_text
from model import MLLM, Clip
from reward import parse
from run import option


# ---------------------------------------------------------------------------------- a finished run
@dataclass
class FinishedRun:
    """What the folder of a finished run holds (see run.py)."""

    folder: pathlib.Path
    method: str  # "rrg", "repic" or "sft"
    command: str
    config: rrg.LearnerConfig
    result: dict  # result.json
    log: list[dict]  # the rows of metrics.csv, {column: text}
    samples: list[dict]  # the lines of samples.jsonl


def read_run(folder):
    """Read a run's folder.   -> FinishedRun. Raises DataError if it holds no finished run."""
    folder = pathlib.Path(folder)
    record = {}
    if (folder / "config.json").is_file():
        record = run.load_json(folder / "config.json")
    method = record.get("method", "rrg")
    script = "rrg.py" if method == "rrg" else "repic.py"
    if not (folder / "result.json").is_file():
        raise DataError(
            f"{folder} holds no finished run; to finish one: "
            f"python {script} --out {shlex.quote(str(folder))} --resume"
        )

    if method == "rrg":
        config = run.saved_settings(rrg.Config, folder)
    else:
        config = run.saved_settings(repic.Config, folder)
        if config.tasks:
            raise DataError(
                f"{folder} was trained on a list of tasks, of which there is no page; naming.py "
                "measures its adapter"
            )
    with one_line_errors(f"{folder} is not a run's folder that can be read", OSError, ValueError):
        log = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
        lines = (folder / "samples.jsonl").read_text().splitlines()
        samples = [json.loads(line) for line in lines]
    result = run.load_json(folder / "result.json")
    return FinishedRun(folder, method, record["command"], config, result, log, samples)


def exam_photos(mllm, finished):
    """The pictures that a run was examined with, by mining them again.   -> {name: Photo}"""
    photos = {}
    if finished.method == "rrg":
        for game in rrg.mine(mllm, finished.config).seen:
            for photo in [game.target, *game.pool]:
                photos[photo.name] = photo
    else:
        for task in repic.mine(mllm, finished.config).seen:
            for photo in task.photos:
                photos[photo.name] = photo
    return photos


# ------------------------------------------------------------------------------------------- HTML
STYLE = """
:root { color-scheme: light dark }
body {
  font: 16px/1.5 system-ui, sans-serif;
  max-width: 64rem;
  margin: auto;
  padding: 1rem;
  overflow-wrap: anywhere;
}
h2 { margin-top: 2.5rem }
h3 { font-size: 1rem }
pre { white-space: pre-wrap }

/* pictures and curves side by side, as many as there is room for */
div { display: flex; flex-wrap: wrap; gap: 1rem }
figure { flex: 1 1 10rem; max-width: 15rem; margin: 0 }
img, svg, meter { width: 100% }
svg { color: #2f7fc1 }
label { display: block }
article { border-top: 1px solid; padding: 1rem 0 }

/* a table that is too wide scrolls on its own, not the page */
section { overflow-x: auto }
table {
  border-collapse: collapse;
  font-variant-numeric: tabular-nums;
  overflow-wrap: normal;
}
th, td { padding: .3rem .6rem; border-bottom: 1px solid; text-align: right }
th:first-child { text-align: left; min-width: 10rem; overflow-wrap: anywhere }
"""


class Html(str):
    """Text that is HTML already, and so is not escaped."""


def element(name, /, *inside, **attributes):
    """<name attribute="...">inside</name>.   -> Html

    Text that is not Html is escaped. An underscore in the name of an attribute stands for a
    hyphen, and an attribute may be called `name`, too. With nothing inside there is no end tag, as
    of <img>.
    """
    start = name
    for key, value in attributes.items():
        start += f' {key.replace("_", "-")}="{html.escape(str(value))}"'
    if not inside:
        return Html(f"<{start}>")

    content = ""
    for part in inside:
        content += part if isinstance(part, Html) else html.escape(part)
    return Html(f"<{start}>{content}</{name}>")


def grid(title, lines):
    """A table.   lines: [[cell, ...], ...], the heading first"""
    heading, *body = lines
    rows = [element("tr", *(element("th", cell, scope="col") for cell in heading))]
    for name, *cells in body:
        head = element("th", name, scope="row")
        rows.append(element("tr", head, *(element("td", cell) for cell in cells)))
    # With a tabindex, a keyboard can scroll it, too.
    return element(
        "section",
        element("h3", title),
        element("table", *rows),
        aria_label=title,
        tabindex=0,
    )


def photo_figure(photo, label, bars=()):
    """A photo, kept within the page, with its name and label and the bars below it."""
    picture = photo.load()
    picture.thumbnail((320, 320))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    pixels = base64.b64encode(file.getvalue()).decode()

    caption = f"{photo.name}: {label}"
    image = element("img", src=f"data:image/jpeg;base64,{pixels}", alt=caption)
    return element("figure", image, element("figcaption", caption), *bars)


# ---------------------------------------------------------------------------------------- Results
def results_section(finished, rows):
    """What the exams found, and the run's table.   rows: those of evaluate.table"""
    heading = ["", "before", "after", "before, unseen categories", "after, unseen categories"]
    parts = [grid("held out", [heading, *rrg.held_out_table(finished.result)])]
    for title, lines in evaluate.tables(rows):
        parts.append(grid(title, lines))
    return parts


# ----------------------------------------------------------------------------------------- Curves
# Columns of metrics.csv; those are drawn that the run has.
CURVES = ("reward", "listener_accuracy", "kl", "leakage", *repic.KINDS, "nll")
# A chart has a size in units of its own, in which the largest value is a little below the edge.
WIDTH = 300
HEIGHT = 100
LARGEST = 90


def running_means(values, window):
    """The mean of up to `window` values that end with each one.   values [S] -> [S]"""
    means = []
    for end in range(1, len(values) + 1):
        last = values[max(0, end - window) : end]
        means.append(sum(last) / len(last))
    return means


def points(steps, values, last_step, top):
    """A line from value to value as SVG wants it: "x,y x,y ...", with y from above."""
    words = []
    for step, value in zip(steps, values, strict=True):
        x = WIDTH * step / last_step
        y = HEIGHT - LARGEST * max(0, value) / (top or 1)  # a column may be all zeros
        words.append(f"{x:.1f},{y:.1f}")
    return " ".join(words)


def chart(name, log, meaning):
    """A column of metrics.csv as SVG: its values faint, the mean of the last tenth of them bold."""
    steps = []
    values = []
    for row in log:
        if row[name]:
            steps.append(int(row["step"]))
            values.append(float(row[name]))
    top = max(values)
    means = running_means(values, max(1, len(values) // 10))
    caption = (
        f"{name.replace('_', ' ')}: {values[0]:.3g} at step {steps[0]}, "
        f"{values[-1]:.3g} at step {steps[-1]}, at most {top:.3g}"
    )

    # Elements of SVG need an end tag, so these have an empty text inside.
    axes = element("path", "", d=f"M0 0V{HEIGHT}H{WIDTH}")
    faint = element("polyline", "", points=points(steps, values, len(log), top), opacity=".4")
    bold = element("polyline", "", points=points(steps, means, len(log), top), stroke_width=3)
    drawing = element(
        "svg",
        axes,
        faint,
        bold,
        viewBox=f"-2 0 {WIDTH + 4} {HEIGHT + 4}",  # with room for the thickness of the lines
        fill="none",
        stroke="currentColor",
        role="img",
        aria_label=caption,
    )
    legend = element("figcaption", caption, element("br"), element("small", meaning))
    return element("figure", drawing, legend)


def curves_section(finished):
    """The curves that the run has."""
    meanings = rrg.METRICS if finished.method == "rrg" else repic.METRICS
    charts = []
    for name in CURVES:
        if any(row.get(name) for row in finished.log):
            charts.append(chart(name, finished.log, meanings[name]))
    explanation = "Each step faint, the mean of the last tenth of the steps bold."
    return [element("p", explanation), element("div", *charts)]


# ------------------------------------------------------------------------------------------ Games
GAMES_EXPLAINED = (
    "Held out from training, answered greedily. Below a candidate: how far the listener believes "
    "that the words fit. In games of the toy world marked words tell of place, pose or light, "
    "which the next photo will not share."
)


def belief_bars(answers, place):
    """How far the listener believed in a place of the pool, before and after."""
    bars = []
    for when, row in answers.items():
        if row["rho"] is not None:  # a malformed answer is not shown to the listener
            rho = row["rho"][place]
            bar = element("meter", "", value=rho)
            bars.append(element("label", f"{when}: {rho:.0%} yes", bar))
    return bars


def marked(text):
    """A text of the toy world, with the words marked that leak."""
    parts = []
    for word in re.split(r"\b", text):
        parts.append(element("mark", word) if toy.leaks(word) else word)
    return parts


def game_article(answers, photos):
    """One held-out game: the target, the pool with the listener's beliefs, and what was said.

    answers {"before": row, "after": row} of result.json
    """
    game = answers["before"]  # the rows differ in answer and beliefs only
    target = photos[game["target"]]
    figures = [photo_figure(target, "target, what the speaker sees")]
    for place, name in enumerate(game["pool"]):
        label = "a look-alike"
        if place == game["answer"]:
            label = "hard positive: the same thing"
        figures.append(photo_figure(photos[name], label, belief_bars(answers, place)))

    paragraphs = []
    for when, row in answers.items():
        title = when
        text = row["text"]
        description = parse(text)
        if description is None:
            title += " (not parsed)"
        else:
            text = description.text
        words = marked(text) if target.truth else [text]
        paragraphs.append(element("p", element("b", title), " ", *words))
    return element("article", element("div", *figures), *paragraphs)


def task_article(answers, photos):
    """One held-out task of RePIC's: its pictures, the question and the answers.

    answers {"before": row, "after": row} of result.json
    """
    task = answers["before"]  # the rows differ in answer only
    figures = []
    for number, name in enumerate(task["photos"], 1):
        figures.append(photo_figure(photos[name], f"picture {number}"))

    question = f"{task['question']} ({task['kind']}; right: {task['solution']})"
    paragraphs = [element("p", question)]
    for when, row in answers.items():
        paragraphs.append(element("p", element("b", when), " ", row["text"]))
    return element("article", element("div", *figures), *paragraphs)


def games_section(finished, photos):
    """The held-out games or tasks that result.json keeps."""
    world = finished.config.data or "the toy world"
    message = f"{world} is not what it was when {finished.folder} was trained; it lacks"
    examples = finished.result["examples"]
    articles = []
    with one_line_errors(message, KeyError):
        for before, after in zip(examples["before"], examples["after"], strict=True):
            answers = {"before": before, "after": after}
            if finished.method == "rrg":
                articles.append(game_article(answers, photos))
            else:
                articles.append(task_article(answers, photos))
    return [element("p", GAMES_EXPLAINED), *articles]


# ----------------------------------------------------------------------------------------- Groups
def group_table(logged, std_floor):
    """One training game: its G answers, what they earned, how much better than its siblings each
    is.   logged: a line of samples.jsonl"""
    rewards = [row["reward"] for row in logged["samples"]]  # G
    advantages = group_advantages(torch.tensor([rewards]), std_floor=std_floor)  # [1, G]
    lines = [["answer", "reward", "advantage"]]
    for row, advantage in zip(logged["samples"], advantages[0].tolist(), strict=True):
        lines.append([row["text"], f"{row['reward']:.3f}", f"{advantage:+.2f}"])

    subject = logged["target"] if "target" in logged else logged["question"]
    return grid(f"step {logged['step']}: the answers about {subject}", lines)


def groups_section(finished):
    """The groups of the first step and of the last."""
    chosen = finished.samples[:1]
    if len(finished.samples) > 1:
        chosen.append(finished.samples[-1])
    explanation = (
        "What the advantages are made of: all answers of one game, at the first step and at the "
        "last."
    )
    tables = [group_table(logged, finished.config.std_floor) for logged in chosen]
    return [element("p", explanation), *tables]


# --------------------------------------------------------------------------------------- the page
def page(finished, photos, rows):
    """The whole page as text.

    photos {name: Photo} of the exam; rows: those of evaluate.table. Raises DataError where a
    photo of the exam is missing.
    """
    sections = {
        "Results": results_section(finished, rows),
        "Curves": curves_section(finished),
        "Games": games_section(finished, photos),
    }
    if finished.method != "sft":  # which has one answer a prompt
        sections["Groups"] = groups_section(finished)

    links = []
    body = []
    for name, content in sections.items():
        links += [element("a", name, href=f"#{name}"), " "]
        body += [element("h2", name, id=name), *content]

    result = finished.result
    title = finished.folder.resolve().name
    facts = (
        f"{finished.method} · {result['steps']} steps in {result['seconds']:.0f} s on "
        f"{result['device']}"
    )
    return "<!doctype html>" + element(
        "html",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width,initial-scale=1"),
        element("title", title),
        element("style", Html(STYLE)),
        element(
            "main",
            element("h1", title),
            element("p", facts),
            element("pre", finished.command),
            element("nav", *links),
            *body,
        ),
        lang="en",
    )


# ------------------------------------------------------------------------------- the command line
@dataclass
class Options(evaluate.Options):
    """The options of evaluate.py, and which run."""

    run: str = option(
        "", "folder of a finished run; default: the newest in runs/", metavar="RUN", positional=True
    )


def read_settings(argv=None):
    """The command line.   -> (Options, FinishedRun)

    What is not given is as the run had it. Raises DataError if there is no finished run.
    """
    given = run.read_options(Options, __doc__, argv)
    folder = given.get("run") or run.newest_run()
    finished = read_run(folder)
    config = finished.config
    own = {
        "run": folder,
        "model": config.model,
        "data": config.data,
        "seed": config.seed,
        "train_concepts": config.train_concepts,
        "max_pixels": config.max_pixels,
        "out": str(finished.folder / "table.json"),
    }
    if finished.method == "rrg":
        own["embedder"] = config.embedder
    options = evaluate.fill_in(Options, own, given)
    options.adapter = [str(finished.folder / "adapter"), *options.adapter]
    return options, finished


def main(argv=None):
    options, finished = read_settings(argv)
    mllm = MLLM(options.model, options.max_pixels)
    embedder = Clip(options.embedder, mllm.device) if options.embedder else mllm

    # First of all, so that photos which have moved are noticed before the work.
    photos = exam_photos(mllm, finished)
    if (options.data, options.seed) != (finished.config.data, finished.config.seed):
        mllm.features.clear()  # the table shows other photos, which may have the same names

    rows = evaluate.table(mllm, embedder, options, ["base", *options.adapter])["rows"]
    evaluate.show(rows)
    file = finished.folder / "report.html"
    write_text(file, page(finished, photos, rows))
    print(f"\nwrote {file}, which any browser opens")


if __name__ == "__main__":
    run.main(main)
