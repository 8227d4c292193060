"""report.py: a finished run as one page: `python report.py [RUN]`; several runs side by side:
`python report.py RUN RUN`.

The page of a run is RUN/report.html: one file that any browser opens, without scripts and without
anything from elsewhere.

    Results    what the exams of the run found, then what its descriptions are worth (evaluate.py)
    Games      six held-out games, in which the reader is the listener first, or six held-out tasks
    Curves     some columns of metrics.csv, step by step
    Groups     all answers to one training photo, what they earned and their advantages

    python report.py                     # the newest run in runs/
    python report.py runs/x              # this one
    python report.py runs/x --grounding  # options of evaluate.py change the table
    python report.py runs/a runs/b       # what differs, and the tables and curves of both

The table is of the run's own model, photos and seed, unless options say otherwise, and goes to
RUN/table.json, too.

The page of several runs lies beside the folder of the first one, as runs/a-and-b.html. It is made
in a moment, of what lies in their folders: the tables of the assistant are those in RUN/table.json,
so they are there if each run has a page of its own.
"""

import base64
import csv
import dataclasses
import html
import io
import itertools
import json
import math
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
    label: str = ""  # what the run is called beside others

    @property
    def name(self):
        return self.folder.resolve().name


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


def mined_photos(mllm, finished):
    """The pictures that a run met, by mining them again.   -> {name: Photo}"""
    photos = {}
    if finished.method == "rrg":
        games = rrg.mine(mllm, finished.config)
        for game in games.train + games.seen:
            for photo in [game.target, *game.pool]:
                photos[photo.name] = photo
    else:
        tasks = repic.mine(mllm, finished.config)
        for task in tasks.train + tasks.seen:
            for photo in task.photos:
                photos[photo.name] = photo
    return photos


def photos_are_there(finished):
    """A context in which a picture that is not there becomes one clear line."""
    world = finished.config.data or "the toy world"
    message = f"{world} is not what it was when {finished.folder} was trained; it lacks"
    return one_line_errors(message, KeyError)


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
h1 { line-height: 1.2 }
h2 { margin-top: 2.5rem }
h3 { font-size: 1rem; margin-bottom: .3rem }
p, blockquote, dl { max-width: 46rem }
pre { white-space: pre-wrap }
blockquote { font-size: 1.15rem; margin: 1rem 0; padding-left: 1rem; border-left: 3px solid }
dfn, summary { font-weight: bold }
dfn { font-style: normal }
summary { cursor: pointer; padding: .4rem 0 }
details { margin: .5rem 0 }
article { border-top: 1px solid; padding: .5rem 0 1rem }

/* pictures side by side, as many as there is room for */
.pictures { display: flex; flex-wrap: wrap; gap: .6rem }
.pictures > figure { flex: 1 1 6rem; max-width: 15rem }
figure { margin: 0 }
img, meter { width: 100% }

/* the pictures of a group of answers stand beside them, on a phone above them */
.group { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start }
.group > .pictures { flex: 0 1 12rem }
.group > table { flex: 1 1 20rem }
@media (max-width: 40rem) { .group > .pictures { flex: 1 1 100% } }

/* two curves a line where there is room for two that can be read */
.charts {
  display: grid;
  gap: 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
}
.charts > figure > svg { width: 100% }
svg text { fill: CanvasText; font: 15px system-ui, sans-serif }
svg path { stroke: CanvasText }
@media (max-width: 40rem) { svg text { font-size: 18px } }

/* a table of all figures, if it is too wide, scrolls on its own, not the page */
section { overflow-x: auto }
table {
  border-collapse: collapse;
  font-variant-numeric: tabular-nums;
  overflow-wrap: normal;
}
th, td { padding: .3rem .6rem; border-bottom: 1px solid; text-align: right; font-weight: normal }
thead th, td.picked { font-weight: bold }
section th:first-child { text-align: left; min-width: 8rem; overflow-wrap: anywhere }

/* a headline table: what a figure means stands in a line of its own, so that numbers have room */
table.headline { width: 100%; max-width: 46rem; table-layout: fixed; overflow-wrap: anywhere }
.headline th, .headline td { padding: .2rem .3rem .2rem 0; text-align: left }
.headline td { vertical-align: top }
.headline th[scope=rowgroup] { padding-top: .8rem; border-bottom: 0 }
"""


class Html(str):
    """Text that is HTML already, and so is not escaped."""


def element(name, /, *inside, **attributes):
    """<name attribute="...">inside</name>.   -> Html

    Text that is not Html is escaped. An underscore in the name of an attribute stands for a
    hyphen, one at its end for nothing (class_ is class); an attribute may be called `name`, too.
    With nothing inside there is no end tag, as of <img>.
    """
    start = name
    for key, value in attributes.items():
        attribute = key.removesuffix("_").replace("_", "-")
        start += f' {attribute}="{html.escape(str(value))}"'
    if not inside:
        return Html(f"<{start}>")

    content = ""
    for part in inside:
        content += part if isinstance(part, Html) else html.escape(part)
    return Html(f"<{start}>{content}</{name}>")


def prose(text):
    """A paragraph; a term between stars is one that it explains."""
    parts = []
    for number, part in enumerate(text.split("*")):
        parts.append(element("dfn", part) if number % 2 else part)
    return element("p", *parts)


def folded(summary, *inside):
    """What opens on a click."""
    return element("details", element("summary", summary), *inside)


def grid(title, lines):
    """A table that may be wide.   lines: [[cell, ...], ...], the heading first"""
    heading, *body = lines
    rows = [element("tr", *(element("th", cell, scope="col") for cell in heading))]
    for name, *cells in body:
        head = element("th", name, scope="row")
        rows.append(element("tr", head, *(element("td", cell) for cell in cells)))
    # With a tabindex, a keyboard can scroll it, too.
    return element(
        "section",
        element("h3", title),
        element("table", element("thead", rows[0]), element("tbody", *rows[1:])),
        aria_label=title,
        tabindex=0,
    )


@dataclass
class Figure:
    """A figure of a headline table, with what it means."""

    name: str
    meaning: str  # in words
    lines: list[tuple]  # (label, [cell, ...]), a cell a column; labels may all be empty


def headline(parts, columns, figures):
    """A table that fits on a phone: above the numbers of a figure stands what it means.

    parts: [title, ...], each over the same `columns`, if there is more than one; figures [Figure]
    """
    labels = any(label for figure in figures for label, _ in figure.lines)
    corner = [element("td", "")] if labels else []
    width = len(parts) * len(columns) + len(corner)

    head = []
    if any(parts):
        over = (element("th", part, scope="colgroup", colspan=len(columns)) for part in parts)
        head.append(element("tr", *corner, *over))
    names = (element("th", column, scope="col") for column in columns * len(parts))
    head.append(element("tr", *corner, *names))

    bodies = []
    for figure in figures:
        about = [element("dfn", figure.name), f": {figure.meaning}"]
        rows = [element("tr", element("th", *about, scope="rowgroup", colspan=width))]
        for label, cells in figure.lines:
            row = [element("th", label, scope="row")] if labels else []
            for text in cells:
                row.append(text if isinstance(text, Html) else element("td", text))
            rows.append(element("tr", *row))
        bodies.append(element("tbody", *rows))
    return element("table", element("thead", *head), *bodies, class_="headline")


def photo_figure(photo, caption):
    """A photo, kept within the page, and what is said below it."""
    picture = photo.load()
    picture.thumbnail((320, 320))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    pixels = base64.b64encode(file.getvalue()).decode()

    image = element("img", src=f"data:image/jpeg;base64,{pixels}", alt=caption)
    return element("figure", image, element("figcaption", caption))


def pictures_of(captions, photos):
    """Photos side by side.   captions [(name of a photo, what is said below it), ...]"""
    figures = [photo_figure(photos[name], caption) for name, caption in captions]
    return element("div", *figures, class_="pictures")


# ------------------------------------------------------------------------------------- what it is
TITLES = {
    "rrg": "A reference game, before and after training",
    "repic": "RePIC: questions whose answers a rule can check, before and after training",
    "sft": "SFT: captions learned from given ones, before and after training",
}
# {shown}: one run, or the names of several; {k} and {samples}: the run's settings.
GAME_EXPLAINED = (
    "{shown} of RRG, a game that a model which reads pictures and text plays with itself. As the "
    "*speaker* it sees one photo, the *target*, and describes it. As the *listener* it reads the "
    "description and sees {k} other photos, the *pool*, one by one, and says of each whether the "
    "description fits. One of them, the *hard positive*, shows the same thing as the target; the "
    "others, the *hard negatives*, show look-alikes. What the listener makes of a description is "
    "the speaker's *reward*."
)
KINDS_EXPLAINED = (
    "There are four kinds: *oct*, object consistency (is the thing of the first picture in the "
    "second, too?); *vlt*, visual localization (where in the picture is it?); *single_ict* and "
    "*multi_ict*, identity consistency (a caption of one thing, or of two or three, that calls "
    "them by the names which pictures before it gave)."
)
TASKS_EXPLAINED = (
    "{shown} of RePIC. A model which reads pictures and text answers *tasks*, questions about "
    "photos of somebody's things, and a rule that knows the right answer says what an answer "
    f"earns, its *reward*. {KINDS_EXPLAINED}"
)
SFT_EXPLAINED = (
    "{shown} of *SFT*, supervised fine-tuning. A model which reads pictures and text learns given "
    "captions, in which things are called by names that pictures before them gave. It is examined "
    f"by RePIC's *tasks*, questions whose answers a rule can check. {KINDS_EXPLAINED}"
)
ADAPTER_EXPLAINED = (
    "What is trained is an *adapter* (LoRA): small matrices beside the model's own weights, which "
    "stay as they are. With the adapter off it is the model as it came, the *base*."
)
GRPO_EXPLAINED = (
    "To each prompt {samples} answers are sampled, a *group*, and those that earn more than the "
    "others are made likelier (*GRPO*); a penalty, weighted by --beta, holds the model close to "
    "the base (*KL*, a measure of how far two distributions are apart). A *step* is one such "
    "update."
)
EXAM_EXPLAINED = (
    "What is learned is measured by *held-out* {played}, about things that the run was never "
    "trained on. Of *seen categories*: other things of these categories, such as other mugs, were "
    "trained on; of *unseen categories*: none were. *Before* is the base, *after* the model with "
    "the trained adapter."
)
OF_GAMES = EXAM_EXPLAINED.replace("{played}", "games")
OF_TASKS = EXAM_EXPLAINED.replace("{played}", "tasks")
INTRODUCTIONS = {
    "rrg": [GAME_EXPLAINED, f"{ADAPTER_EXPLAINED} {GRPO_EXPLAINED}", OF_GAMES],
    "repic": [TASKS_EXPLAINED, f"{ADAPTER_EXPLAINED} {GRPO_EXPLAINED}", OF_TASKS],
    "sft": [SFT_EXPLAINED, f"{ADAPTER_EXPLAINED} A *step* is one update of it.", OF_TASKS],
}


def introduction(finished, shown="This page shows one training run"):
    """What kind of run this is, in words.   shown: how it begins -> [paragraph, ...]"""
    config = finished.config
    paragraphs = []
    for text in INTRODUCTIONS[finished.method]:
        text = text.replace("{shown}", shown).replace("{samples}", str(config.samples))
        if finished.method == "rrg":
            text = text.replace("{k}", str(config.k))
        paragraphs.append(prose(text))
    return paragraphs


def settings_of(finished):
    """The settings but for the folder.   -> {name: (value, default, what it is)}"""
    is_toy = toy.is_toy(finished.config.model)
    settings = {}
    for field in dataclasses.fields(finished.config):
        default = field.default
        if is_toy and field.metadata["toy"] is not None:
            default = field.metadata["toy"]
        if field.name != "out":
            value = getattr(finished.config, field.name)
            settings[field.name] = (value, default, field.metadata["help"])
    return settings


def shown_value(value):
    """A setting's value as text."""
    return "(none)" if value == "" else str(value)


def settings_list(settings):
    """Settings as a list of terms.   settings: as of `settings_of`"""
    entries = []
    for name, (value, _, meaning) in settings.items():
        entries.append(element("dt", element("code", f"{run.flag(name)} {shown_value(value)}")))
        entries.append(element("dd", meaning))
    return element("dl", *entries)


def settings_part(finished):
    """What the run was, in words, then its settings."""
    config = finished.config
    result = finished.result
    photos = f"the photos in {config.data}"
    if not config.data:
        photos = "the toy world, whose things are drawn, so that the truth about them is known"
    played = {"rrg": "games", "repic": "tasks", "sft": "captions"}[finished.method]
    facts = (
        f"The run {finished.name}: {result['steps']} steps of {config.games} {played} in "
        f"{result['seconds']:.0f} s on {result['device']}, with {photos}; "
        f"model {config.model}, seed {config.seed}."
    )

    settings = settings_of(finished)
    changed = {}
    for name, (value, default, meaning) in settings.items():
        if value != default and name not in ("model", "data", "seed"):
            changed[name] = (value, default, meaning)
    parts = [element("p", facts), element("pre", finished.command)]
    if changed:
        parts += [element("p", "Settings that are not at their defaults:"), settings_list(changed)]
    else:
        parts.append(element("p", "All other settings are at their defaults."))
    parts.append(folded(f"All {len(settings)} settings", settings_list(settings)))
    return parts


# ---------------------------------------------------------------------------------------- Results
EXAM = {  # the figures of result.json
    "identification": "the listener picks the hard positive, from the description alone.",
    "oracle": "every claim of the description holds for the hard positive and for none of the "
    "hard negatives: an exact check, which only the toy world allows.",
    "leakage": "the description mentions place, pose or light, which the thing does not keep.",
    "coverage": "how much of the three that tell toy things apart, colour, pattern and badge, is "
    "named.",
    "parsed": "the answer has the form that was asked for, so that it can be read.",
    "oct": "right answers, yes or no.",
    "vlt": "boxes that overlap the right one by at least half of what both cover.",
    "single_ict": "captions that use the name.",
    "multi_ict": "the share of the names that captions use.",
}
ASSISTANT_EXPLAINED = (
    "Here the descriptions become the memory of an *assistant* that knows these things by nothing "
    "else. {what}Before: the base describes; after: the model with the trained adapter{reader}."
)
TESTED = (  # {part} of seen categories, ...
    "{part}: {photos} photos of {concepts} things, looked up among {database} descriptions, "
    "{pairs} pairs of a photo and a description to recognise, {questions} questions. "
)
FULL_EXPLAINED = (
    "A line for each speaker: the base, the run's adapter, and what else was asked for. A "
    "*concept* is one thing, the *database* all descriptions that a photo is looked up among."
)
ASSISTANT = {  # the figures of evaluate.py that are shown first
    "captioning_f1": "the assistant looks up the descriptions that suit a photo best and chooses "
    "one for its caption. The balance of precision (how often a chosen name is right) and recall "
    "(how often the right name is chosen), the mean over things.",
    "recognition_inside": "does this photo show the very thing that is described, or a look-alike "
    "of its category? The mean of how often either is said rightly; 50 % is chance.",
    "vqa": "visual question answering: right answers to questions about photos of the things.",
    "leakage": "descriptions that mention a passing state or place.",
}


def exam_table(runs):
    """What the exams of some runs found: a line a run."""
    parts = ["seen categories"]
    if any(finished.result["before"]["unseen"] for finished in runs):
        parts.append("unseen categories")
    found = []  # {name: [before, after, both of unseen categories]} of each run
    for finished in runs:
        lines = rrg.held_out_table(finished.result)
        found.append({name: cells[: 2 * len(parts)] for name, *cells in lines})

    figures = []
    for name, meaning in EXAM.items():
        lines = []
        for finished, cells_of in zip(runs, found, strict=True):
            if name in cells_of:
                lines.append((finished.label, cells_of[name]))
        if lines:
            figures.append(Figure(name, meaning, lines))
    return headline(parts, ["before", "after"], figures)


def own_row(finished, rows):
    """The row of the run's own adapter.   rows: of evaluate.table -> {part: figures}, {} if none"""
    for name, row in rows.items():
        path = pathlib.Path(name)
        if path.name == "adapter" and path.parent.name == finished.folder.name:
            return row
    return {}


def assistant_table(runs, tables):
    """What the assistant could do with the descriptions of some runs: a line a run.

    tables: for each run the rows of evaluate.table, {} if it has none
    """
    pairs = []  # the rows of the base and of the run itself
    for finished, rows in zip(runs, tables, strict=True):
        pairs.append([rows.get("base", {}), own_row(finished, rows)])
    parts = []  # "seen", "unseen" or "all", where a run has figures of it
    for part in evaluate.PARTS:
        if any(own.get(part) for _, own in pairs):
            parts.append(part)

    figures = []
    for name, meaning in ASSISTANT.items():
        lines = []
        for finished, pair in zip(runs, pairs, strict=True):
            cells = []
            for part, row in itertools.product(parts, pair):
                cells.append(evaluate.cell(name, (row.get(part) or {}).get(name)))
            if set(cells) != {"-"}:
                lines.append((finished.label, cells))
        if lines:
            figures.append(Figure(evaluate.COLUMNS[name], meaning, lines))
    titles = [evaluate.PARTS[part] for part in parts]
    return headline(titles, ["before", "after"], figures)


def columns_explained():
    """What the columns of evaluate.py are, as its docstring says it."""
    text = evaluate.__doc__.split("Columns:\n")[1].split("\nWhere it departs")[0]
    entries = []
    # A name, a gap, and what it means, up to the next name.
    for name, meaning in re.findall(r"^ {4}(\S.*?) {2,}(\S.*?)(?=^ {4}\S|\Z)", text, re.M | re.S):
        entries.append(element("dt", element("b", name)))
        entries.append(element("dd", " ".join(meaning.split())))
    return element("dl", *entries)


def results_section(finished, rows):
    """What the exams found, and what the descriptions are worth.   rows: of evaluate.table"""
    played = "games" if finished.method == "rrg" else "tasks"
    tested = ""
    reader = ""
    for part, figures in own_row(finished, rows).items():
        if figures:
            title = evaluate.PARTS[part].capitalize()
            tested += TESTED.format(part=title, **figures["counts"])
            if figures["reader"] == "adapter":
                reader = ", with which the assistant reads, too"
    about = ASSISTANT_EXPLAINED.replace("{what}", tested).replace("{reader}", reader)

    full = [grid(title, lines) for title, lines in evaluate.tables(rows)]
    return [
        element("h3", f"Held-out {played}"),
        exam_table([finished]),
        element("h3", "What the descriptions are worth"),
        prose(about),
        assistant_table([finished], [rows]),
        folded("All figures of the assistant", prose(FULL_EXPLAINED), columns_explained(), *full),
    ]


# ------------------------------------------------------------------------------------------ Games
LISTEN_FIRST = (
    "Be the listener first. Each description is of a target that you do not see yet: which photo "
    "of the pool shows the same thing? Then open the game. The listener's *belief* in a photo is "
    "how sure it is that every part of the description fits, P(yes) / (P(yes) + P(no)). A *share* "
    "is that belief divided by the beliefs in all photos of the pool. It *picks* the photo in "
    "which it believes most."
)
MARKS_EXPLAINED = "Marked words tell of place, pose or light, which the other photo does not share."
ANSWER_FIRST = (
    "Answer for yourself first, then open the task: the right answer, what the base answered "
    "(before) and what the trained model answers (after)."
)


def shares_of(beliefs):
    """Each belief's share of the total; 0 where nothing is believed."""
    total = sum(beliefs)
    return [belief / total if total else 0.0 for belief in beliefs]


@dataclass
class Pick:
    """The photo of a pool that the listener picks."""

    place: int
    share: float  # of all belief
    right: bool


def pick_of(beliefs, positive):
    """The listener picks the photo in which it believes most.   -> Pick, None for a tie

    beliefs: of the photos of a pool; positive: the place of the hard positive
    """
    largest = max(beliefs)
    if beliefs.count(largest) > 1:  # no win, as in reward.py
        return None
    place = beliefs.index(largest)
    return Pick(place, shares_of(beliefs)[place], place == positive)


def pick_in_words(beliefs, positive):
    """Was the listener right, and with which share?   beliefs: None for a malformed answer"""
    if beliefs is None:
        return "malformed"
    pick = pick_of(beliefs, positive)
    if pick is None:
        return "a tie"
    verdict = "right" if pick.right else "wrong"
    return f"{verdict}, {pick.share:.1%}"


def marked(text):
    """A text of the toy world, with the words marked that leak."""
    parts = []
    for word in re.split(r"\b", text):
        parts.append(element("mark", word) if toy.leaks(word) else word)
    return parts


def description_in(text):
    """What others read of an answer; of a malformed one, which nobody reads, all of it."""
    description = parse(text)
    if description is None:
        return f"(malformed) {text.strip() or 'no words at all'}"
    return description.text


def belief_table(answers):
    """Belief and share of each photo of the pool, before and after.

    answers {"before": row, "after": row} of result.json
    """
    game = answers["before"]  # the rows differ in text and beliefs only
    figures = []
    for place, name in enumerate(game["pool"]):
        role = "the hard positive" if place == game["answer"] else "a hard negative"
        cells = []
        for row in answers.values():
            beliefs = row["rho"]
            if beliefs is None:
                cells += ["-", "-"]
                continue
            share = shares_of(beliefs)[place]
            pick = pick_of(beliefs, game["answer"])
            kind = "picked" if pick and place == pick.place else "other"
            bar = element("meter", "", value=f"{share:.3f}")
            cells.append(f"{beliefs[place]:.6f}")
            cells.append(element("td", f"{share:.1%}", element("br"), bar, class_=kind))
        figures.append(Figure(f"photo {place + 1}", f"{name}, {role}", [("", cells)]))
    return headline(list(answers), ["belief", "share"], figures)


def outcome_in_words(beliefs, positive):
    """What the listener made of a description, as a sentence.   beliefs: None if malformed"""
    if beliefs is None:
        return "The answer is malformed, so the listener was not asked."
    pick = pick_of(beliefs, positive)
    if pick is None:
        return "The listener believes equally in several photos, so it picks none."
    verdict = "right" if pick.right else "wrong"
    place = pick.place + 1
    return f"The listener picks photo {place}, with {pick.share:.1%} of all belief: {verdict}."


def said_in_game(when, row, is_toy):
    """What was said of the target, and what the listener picked.   row: of result.json"""
    text = description_in(row["text"])
    words = marked(text) if is_toy else [text]
    outcome = outcome_in_words(row["rho"], row["answer"])
    return element("p", element("b", when), ": ", *words, element("br"), outcome)


def game_article(number, answers, photos):
    """One held-out game: description and pool; folded, the target and what the listener made of it.

    answers {"before": row, "after": row} of result.json
    """
    game = answers["after"]
    # No names here: they would say which photo is right.
    pool = [(name, f"photo {place}") for place, name in enumerate(game["pool"], 1)]
    target = game["target"]
    is_toy = photos[target].truth is not None
    said = [said_in_game(when, row, is_toy) for when, row in answers.items()]
    return element(
        "article",
        element("h3", f"Game {number}"),
        element("blockquote", description_in(game["text"])),
        pictures_of(pool, photos),
        folded(
            "Who was meant, and what the listener believed",
            pictures_of([(target, f"{target}, the target")], photos),
            *said,
            belief_table(answers),
        ),
    )


def solution_in_words(task):
    """The right answer to a task of result.json or samples.jsonl."""
    solution = task["solution"]
    if task["kind"] == "vlt":
        (left, top, right, bottom), (width, height) = solution
        return (
            f"the box from ({left}, {top}) to ({right}, {bottom}) in a picture of {width} x "
            f"{height} pixels"
        )
    return solution if isinstance(solution, str) else "a caption with " + " and ".join(solution)


def task_pictures(task, photos):
    """The pictures of a task, by their numbers: names could give the answer away."""
    captions = [(name, f"picture {number}") for number, name in enumerate(task["photos"], 1)]
    return pictures_of(captions, photos)


def task_article(number, answers, photos):
    """One held-out task of RePIC's: its pictures and question; folded, the answers.

    answers {"before": row, "after": row} of result.json
    """
    task = answers["before"]  # the rows differ in answer only
    paragraphs = [element("p", f"right: {solution_in_words(task)}")]
    for when, row in answers.items():
        paragraphs.append(element("p", element("b", when), ": ", row["text"]))
    return element(
        "article",
        element("h3", f"Task {number} ({task['kind']})"),
        task_pictures(task, photos),
        element("blockquote", task["question"]),
        folded("What is right, and what was answered", *paragraphs),
    )


def games_section(finished, photos):
    """The held-out games or tasks that result.json keeps."""
    article = game_article if finished.method == "rrg" else task_article
    examples = finished.result["examples"]
    articles = []
    with photos_are_there(finished):
        pairs = zip(examples["before"], examples["after"], strict=True)
        for number, (before, after) in enumerate(pairs, 1):
            articles.append(article(number, {"before": before, "after": after}, photos))
    explained = LISTEN_FIRST if finished.method == "rrg" else ANSWER_FIRST
    if finished.method == "rrg" and not finished.config.data:
        explained += " " + MARKS_EXPLAINED
    return [prose(explained), *articles]


# ----------------------------------------------------------------------------------------- Curves
CURVES_EXPLAINED = (
    "Of the answers that were sampled while the model was trained: each step thin, the mean of the "
    "last tenth of the steps thick."
)
# Columns of metrics.csv, of which those are drawn that a run has, and what they are.
CURVES = {
    "reward": "what an answer earns.",
    "listener_accuracy": "descriptions from which the listener picks the hard positive.",
    "oracle": "descriptions whose every claim holds for the hard positive and for none of the "
    "hard negatives.",
    "leakage": "descriptions that mention place, pose or light.",
    "oct": "answers to oct tasks that are right.",
    "vlt": "answers to vlt tasks that are right.",
    "single_ict": "captions in single_ict tasks that use the name.",
    "multi_ict": "names that captions in multi_ict tasks use.",
    "zero_std_groups": "groups whose answers all earned the same (their standard deviation is 0), "
    "so that there is nothing to learn from.",
    "kl": "how far the trained model is from the base, per token.",
    "nll": "minus the mean log-probability of an answer's tokens: how undecided the model is; of "
    "given answers, what SFT lowers.",
}
IN_PERCENT = set(CURVES) - {"reward", "kl", "nll"}
OF_SFT = ("nll",)  # whose answers are given, so that nothing is earned
# The area of a chart in units of its own, and the room around it for the numbers.
WIDTH = 400
HEIGHT = 200
LEFT = 60
RIGHT = 12
ABOVE = 12
BELOW = 28
# Of the lines of several runs; each is legible on white and on black.
COLOURS = ("#2f7fc1", "#d0660c", "#2e9150", "#a860cc", "#c2455c")
DASHES = ("none", "9 5", "2 4")


def running_means(values, window):
    """The mean of up to `window` values that end with each one.   values [S] -> [S]"""
    means = []
    for end in range(1, len(values) + 1):
        last = values[max(0, end - window) : end]
        means.append(sum(last) / len(last))
    return means


def round_top(largest):
    """The end of an axis: 1, 1.5, 2, 3, 4, 6, 8 or 10 of a power of ten, not below `largest`."""
    if largest <= 0:
        return 1.0  # a column may be all zeros
    power = 10.0 ** math.floor(math.log10(largest))
    return next(power * end for end in (1, 1.5, 2, 3, 4, 6, 8, 10) if power * end >= largest)


def points(steps, values, last_step, top):
    """A line from value to value as SVG wants it: "x,y x,y ...", with y from above."""
    words = []
    for step, value in zip(steps, values, strict=True):
        x = WIDTH * step / last_step
        y = HEIGHT - HEIGHT * max(0, value) / top
        words.append(f"{x:.1f},{y:.1f}")
    return " ".join(words)


@dataclass
class Curve:
    """A column of one run's metrics.csv, where it has values."""

    label: str  # of the run
    steps: list[int]
    values: list[float]


def read_curve(finished, name):
    """A column of metrics.csv.   -> Curve, None if the run has no values of it"""
    if finished.method == "sft" and name not in OF_SFT:
        return None
    steps = []
    values = []
    for row in finished.log:
        if row.get(name):
            steps.append(int(row["step"]))
            values.append(float(row[name]))
    return Curve(finished.label, steps, values) if steps else None


def axes(last_step, top, in_percent):
    """The two axes of a chart, with their numbers."""
    parts = [element("path", "", d=f"M0 0V{HEIGHT}H{WIDTH}")]
    for share in (0, 0.5, 1):
        y = HEIGHT - HEIGHT * share
        number = f"{top * share:.0%}" if in_percent else f"{top * share:g}"
        parts.append(element("path", "", d=f"M0 {y:g}H{WIDTH}", opacity=0.25))
        parts.append(element("text", number, x=-6, y=y + 5, text_anchor="end"))
    for step in sorted({0, last_step // 2, last_step}):
        at_the_end = step == last_step
        place = {"x": WIDTH * step / last_step, "y": HEIGHT + 20}
        text = f"step {step}" if at_the_end else str(step)
        parts.append(element("text", text, **place, text_anchor="end" if at_the_end else "middle"))
    return parts


def in_words(curve, in_percent):
    """The means over both halves of a curve, and where it ends."""
    half = (len(curve.values) + 1) // 2
    first = sum(curve.values[:half]) / half
    later = curve.values[half:] or curve.values
    second = sum(later) / len(later)
    numbers = []
    for value in (first, second, curve.values[-1]):
        numbers.append(f"{value:.1%}" if in_percent else f"{value:.3g}")
    label = f"{curve.label}: " if curve.label else ""
    return (
        f"{label}{numbers[0]} in the first half of the steps, {numbers[1]} in the second, "
        f"{numbers[2]} at step {curve.steps[-1]}"
    )


def line_style(number):
    """How the line of a run is drawn."""
    return {
        "stroke": COLOURS[number % len(COLOURS)],
        "stroke_dasharray": DASHES[number % len(DASHES)],
    }


def chart(name, curves):
    """A column of metrics.csv of one run or of several, as SVG.

    curves [Curve or None]: None for a run that has no values of it
    """
    in_percent = name in IN_PERCENT
    drawn = [(number, curve) for number, curve in enumerate(curves) if curve]
    last_step = max(curve.steps[-1] for _, curve in drawn)
    largest = max(max(curve.values) for _, curve in drawn)
    top = 1.0 if in_percent else round_top(largest)

    lines = axes(last_step, top, in_percent)
    words = []
    for number, curve in drawn:
        style = line_style(number)
        means = running_means(curve.values, max(1, len(curve.values) // 10))
        thin = points(curve.steps, curve.values, last_step, top)
        thick = points(curve.steps, means, last_step, top)
        lines.append(element("polyline", "", points=thin, opacity=0.5, **style))
        lines.append(element("polyline", "", points=thick, stroke_width=3, **style))
        words.append(in_words(curve, in_percent))

    title = name.replace("_", " ").replace("zero std", "zero-std")
    drawing = element(
        "svg",
        *lines,
        viewBox=f"{-LEFT} {-ABOVE} {LEFT + WIDTH + RIGHT} {ABOVE + HEIGHT + BELOW}",
        fill="none",
        role="img",
        aria_label=f"{title}: {'; '.join(words)}",
    )
    meaning = element("p", element("b", title), f": {CURVES[name]}")
    numbers = []
    for (number, _), text in zip(drawn, words, strict=True):
        key = [line_sample(number), " "] if len(curves) > 1 else []
        numbers += [*key, text, element("br")]
    return element("figure", meaning, drawing, element("figcaption", *numbers))


def line_sample(number):
    """A piece of the line of a run, for a legend."""
    line = element("polyline", "", points="0,5 40,5", stroke_width=3, **line_style(number))
    return element("svg", line, width=40, height=10, fill="none", aria_label="its line")


def curves_part(runs):
    """The curves that the runs have."""
    charts = []
    for name in CURVES:
        curves = [read_curve(finished, name) for finished in runs]
        if any(curves):
            charts.append(chart(name, curves))
    return [element("p", CURVES_EXPLAINED), element("div", *charts, class_="charts")]


# ----------------------------------------------------------------------------------------- Groups
GROUPS_EXPLAINED = (
    "All answers to one prompt, as the model wrote them. An answer's *advantage* is how far its "
    "reward lies above the mean of its group, in standard deviations: those above 0 are made "
    "likelier, those below 0 less likely; where all earned the same, all are 0. Here are a group "
    "of the first step and one of the last."
)
LISTENER_EXPLAINED = (
    "Beside them: was the listener right, and how large is the share of the photo that it picked?"
)


def group_article(logged, std_floor, photos):
    """One training prompt: its pictures, its G answers, what they earned, and how much better than
    its siblings each is.   logged: a line of samples.jsonl"""
    rewards = [row["reward"] for row in logged["samples"]]  # G
    advantages = group_advantages(torch.tensor([rewards]), std_floor=std_floor)  # [1, G]
    is_game = "target" in logged
    columns = ["reward", "advantage"]
    if is_game:
        columns.append("listener")
        pictures = pictures_of([(logged["target"], f"{logged['target']}, the target")], photos)
        title = f"Step {logged['step']}: descriptions of {logged['target']}"
    else:
        pictures = task_pictures(logged, photos)
        title = f"Step {logged['step']}: answers to {logged['question']!r}"

    figures = []
    for number, row in enumerate(logged["samples"], 1):
        cells = [f"{row['reward']:.3f}", f"{advantages[0, number - 1]:+.2f}"]
        if is_game:
            cells.append(pick_in_words(row["rho"], logged["answer"]))
        figures.append(Figure(f"answer {number}", row["text"], [("", cells)]))
    parts = [element("h3", title)]
    if not is_game:
        parts.append(element("p", f"right: {solution_in_words(logged)}"))
    answers = element("div", pictures, headline([""], columns, figures), class_="group")
    return element("article", *parts, answers)


def groups_section(finished, photos):
    """The groups of the first step and of the last."""
    chosen = finished.samples[:1]
    if len(finished.samples) > 1:
        chosen.append(finished.samples[-1])
    with photos_are_there(finished):
        groups = [group_article(logged, finished.config.std_floor, photos) for logged in chosen]
    explained = GROUPS_EXPLAINED
    if finished.method == "rrg":
        explained += " " + LISTENER_EXPLAINED
    return [prose(explained), *groups]


# -------------------------------------------------------------------------------------- the pages
def document(title, name, opening, sections):
    """A whole page as text.

    title: in words; name: of what it shows; opening [Html]; sections {heading: [Html, ...]}
    """
    links = []
    body = []
    for heading, content in sections.items():
        place = heading.replace(" ", "-")
        links += [element("a", heading, href=f"#{place}"), " "]
        body += [element("h2", heading, id=place), *content]
    return "<!doctype html>" + element(
        "html",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width,initial-scale=1"),
        element("title", f"{name}: {title}"),
        element("style", Html(STYLE)),
        element("main", element("h1", title), *opening, element("nav", *links), *body),
        lang="en",
    )


def page(finished, photos, rows):
    """The page of a run.

    photos {name: Photo} that it met; rows: those of evaluate.table. Raises DataError where a photo
    that is shown is missing.
    """
    sections = {
        "Results": results_section(finished, rows),
        "Games" if finished.method == "rrg" else "Tasks": games_section(finished, photos),
        "Curves": curves_part([finished]),
    }
    if finished.method != "sft":  # which has one answer a prompt
        sections["Groups"] = groups_section(finished, photos)
    opening = introduction(finished) + settings_part(finished)
    return document(TITLES[finished.method], finished.name, opening, sections)


# ----------------------------------------------------------------------------------- several runs
# Settings that decide which games or tasks a run is examined by.
OTHER_GAMES = {"method", "seed", "data", "train_concepts", "eval_games"}
DIFFERENCES_EXPLAINED = (
    "So they are examined by different games or tasks, too: part of what differs in the results is "
    "chance."
)


def read_runs(folders):
    """Read several runs and call them by what tells them apart.   -> [FinishedRun]

    Raises DataError for the same run twice.
    """
    runs = [read_run(folder) for folder in folders]
    places = [finished.folder.resolve() for finished in runs]
    if len(set(places)) < len(places):
        raise DataError("the same run was given twice: give the folders of different ones")
    names = [finished.name for finished in runs]
    for finished in runs:
        unique = names.count(finished.name) == 1
        finished.label = finished.name if unique else str(finished.folder)
    return runs


def saved_table(finished):
    """The rows of RUN/table.json.   -> as of evaluate.table; {} where the run's own is missing"""
    file = finished.folder / "table.json"
    if not file.is_file():
        return {}
    message = f"{file} is no table; to make it anew: {page_command(finished)}"
    with one_line_errors(message, KeyError, TypeError):
        rows = run.load_json(file)["rows"]
    return rows if own_row(finished, rows) else {}


def page_command(finished):
    """The command that makes the page of a run, and its table."""
    return shlex.join(["python", "report.py", str(finished.folder)])


def differences_part(runs):
    """The settings in which the runs differ, of those that all of them have."""
    settings = [settings_of(finished) for finished in runs]
    meanings = {"method": "what is trained: RRG's game, RePIC's tasks, or SFT's captions"}
    values = {"method": [finished.method for finished in runs]}
    for number, of_run in enumerate(settings):
        for name, (value, _, meaning) in of_run.items():
            meanings[name] = meaning
            values.setdefault(name, [None] * len(runs))[number] = shown_value(value)

    differing = []
    figures = []
    for name, of_runs in values.items():
        if None in of_runs or len(set(of_runs)) == 1:
            continue
        differing.append(name)
        figures.append(Figure(name.replace("_", " "), meanings[name], [("", of_runs)]))
    parts = [element("p", "All settings are the same.")]
    if figures:
        parts = [headline([""], [finished.label for finished in runs], figures)]
    if OTHER_GAMES.intersection(differing):
        parts.append(element("p", DIFFERENCES_EXPLAINED))
    commands = [element("pre", finished.command) for finished in runs]
    return [*parts, folded("The commands", *commands)]


def compared_results(runs, tables):
    """The headline tables of several runs, a line a run.   tables: as of `assistant_table`"""
    methods = {finished.method for finished in runs}
    played = "games" if methods == {"rrg"} else "games or tasks"
    parts = [
        element("h3", f"Held-out {played}"),
        exam_table(runs),
        element("h3", "What the descriptions are worth"),
    ]
    if any(tables):
        about = ASSISTANT_EXPLAINED.replace("{what}", "").replace("{reader}", "")
        parts += [prose(about), assistant_table(runs, tables)]
    for finished, rows in zip(runs, tables, strict=True):
        if not rows:
            missing = f"No table of {finished.label} yet; this makes it: {page_command(finished)}"
            parts.append(element("p", missing))
    return parts


def comparison(runs):
    """The page of several runs."""
    of_method = {}
    for finished in runs:
        of_method.setdefault(finished.method, []).append(finished)
    opening = []
    for alike in of_method.values():
        names = " and ".join(finished.label for finished in alike)
        what = "training runs" if len(alike) > 1 else "a training run"
        for paragraph in introduction(alike[0], f"{names}: {what}"):
            if paragraph not in opening:
                opening.append(paragraph)

    tables = [saved_table(finished) for finished in runs]
    sections = {
        "What differs": differences_part(runs),
        "Results": compared_results(runs, tables),
        "Curves": curves_part(runs),
    }
    name = " and ".join(finished.label for finished in runs)
    return document(f"{len(runs)} runs compared", name, opening, sections)


def comparison_file(runs):
    """Where the page of several runs goes: beside the folder of the first.   -> path"""
    names = "-and-".join(finished.name for finished in runs)
    # A file's name has room for 255 bytes.
    return runs[0].folder.resolve().parent / f"{names[:200]}.html"


# ------------------------------------------------------------------------------- the command line
@dataclass
class Options(evaluate.Options):
    """The options of evaluate.py, and which runs."""

    runs: list = option(
        [],
        "folder of a finished run, or of several to compare; default: the newest in runs/",
        metavar="RUN",
        positional=True,
    )


def read_settings(argv=None):
    """The command line.   -> (Options, [FinishedRun, ...])

    What is not given is as the run had it. Raises DataError where there is no finished run, and for
    options beside several runs, which change nothing there.
    """
    given = run.read_options(Options, __doc__, argv)
    folders = given.get("runs") or [run.newest_run()]
    if len(folders) > 1:
        beside = [run.flag(name) for name in given if name != "runs"]
        if beside:
            raise DataError(
                f"{beside[0]} changes the table of one run; several are compared by the tables "
                f"that they have: python report.py {shlex.quote(folders[0])} {beside[0]} ..."
            )
        return Options(runs=folders), read_runs(folders)

    finished = read_run(folders[0])
    config = finished.config
    own = {
        "runs": folders,
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
    return options, [finished]


def make_page(finished, options):
    """Measure a run's descriptions.   -> its page as text"""
    evaluate.check_files(options)
    mllm = MLLM(options.model, options.max_pixels)
    embedder = Clip(options.embedder, mllm.device) if options.embedder else mllm

    # First of all, so that photos which have moved are noticed before the work.
    photos = mined_photos(mllm, finished)
    if (options.data, options.seed) != (finished.config.data, finished.config.seed):
        mllm.features.clear()  # the table shows other photos, which may have the same names

    models = ["base", *options.adapter]
    rows = evaluate.table(mllm, embedder, options, models, replace=True)["rows"]
    evaluate.show(rows)
    return page(finished, photos, rows)


def main(argv=None):
    options, runs = read_settings(argv)
    if len(runs) > 1:
        file = run.output_file(comparison_file(runs))
        text = comparison(runs)
    else:
        file = run.output_file(runs[0].folder / "report.html")
        text = make_page(runs[0], options)
    write_text(file, text)
    print(f"\nwrote {file}, which any browser opens")


if __name__ == "__main__":
    run.main(main)
