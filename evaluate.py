"""evaluate.py: what descriptions are worth: a benchmark's photos put to the assistant, as a table.

Each concept's reference photos are described by a speaker: the model with an adapter, or "base",
the model as it came. The descriptions become a database, and the test photos are put to the
assistant that knows nothing else (assistant.py): it retrieves, captions, recognises and answers
questions. So the reader is the same in all rows of the table, and only the descriptions differ.

With --grounding the model is also measured as RePIC was, *with* its adapter on and from pictures
instead of descriptions: it sees reference photos with names, then a photo of one of these concepts,
or a scene of two or four. Do its captions use the names? With the right references, with those
that look most like what is in the picture, and with wrong ones (where fewer is better).

    python evaluate.py --adapter runs/x/adapter    # the toy world: a row for base, one for x
    python evaluate.py --model Qwen/Qwen2-VL-2B-Instruct --data photos/ --all
                                                   # any folder of photos (data.py has the layouts)
    python evaluate.py --database database.json    # descriptions that were written elsewhere

The result is a Markdown table on the screen and, with --out, JSON on disk. "seen" are test photos
of held-out concepts, whose categories rrg.py was trained on, looked up in a database of all
concepts of these categories; "unseen" the same for the categories that it never met. Columns:

    caption F1        of the chosen letter, with precision and recall: the mean over concepts
    name F1           does the caption call the concept by its name?
    recognition       the mean of positive (this is it) and negative (this is another one)
    inside, across    the same, with negatives of its own category only, of other categories only
    VQA               right answers to questions
    leakage           descriptions that mention state or place
    words             how long a description is
    ceiling           is the right one among the k retrieved? Captions cannot be better
    unparsed          answers that cannot be read, which are wrong as well

Next to the photos are read, where they are: Yo'LLaVA's questions (yollava-visual-qa.json) and
RAP's list of recognition pairs (recognition_test.json).

Where it departs from the papers and their research code (see assistant.py for the assistant):
1. Where the truth is not known, the model itself judges leakage. (The research code asks another
   language model.)
2. RePIC finds the things of a scene by a detector. Here scenes are collages (repic.py), so each
   photo of a collage is compared on its own with the reference photos.

Shapes: C concepts in the database, D width of the vectors that are compared.
"""

import dataclasses
import pathlib
import random
import re
import shlex
import sys
from collections import Counter
from dataclasses import dataclass, field

import run
import toy
from assistant import (
    YES_OR_NO,
    AssistantOptions,
    Entry,
    Question,
    adapt,
    answer_questions,
    caption,
    database,
    describe,
    fill_in_assistant,
    read_answer,
    read_database,
    recognise,
    retrieve,
)
from data import (
    Concept,
    DataError,
    Photo,
    find_folder,
    fingerprint,
    tag,
)
from lora import remove_lora, write_json
from model import MLLM, Clip, Prompt
from naming import GROUNDING, grounding, name_grounding
from protocols import Pair, PhotoSplit, load_pairs, load_questions, split_photos
from rrg import load_world, photos_of
from run import option

SCENES = 60  # pictures of one concept, as many of two and of four, for --grounding
LEAKAGE = (  # {text} is a quoted description
    "This is how somebody described a thing of theirs: {text}\n"
    "Does it mention a passing state of the thing, such as what it is doing, how it is placed, or "
    "that it is open, worn or folded? Does it mention a location, such as the background or what "
    "stands around? Judge strictly by its words. Answer only with JSON in this form:\n"
    '{"State": "Yes or No", "Location": "Yes or No"}'
)


# ------------------------------------------------------------------------------------ the figures
def mean(values):
    """The mean of a list, None of an empty one."""
    return sum(values) / len(values) if values else None


def midpoint(a, b):
    """The mean of two figures, None where one is not known."""
    return None if a is None or b is None else (a + b) / 2


@dataclass
class Judgement:
    """A photo and a description, and what the assistant made of the two."""

    shown: bool  # does the photo show the concept?
    said_yes: bool | None  # None where the answer cannot be read
    same_category: bool  # are the photo's concept and the described one of the same category?


def share_right(judgements):
    """How often the assistant was right. What cannot be read is wrong on either side."""
    return mean([judgement.said_yes is judgement.shown for judgement in judgements])


def recognition_scores(judgements):
    """Accuracies of judgements.   -> {figure: fraction}, None where there is nothing to count

    weighted = (positive + negative) / 2, so that the many negatives do not drown the positives;
    inside and across keep the negatives of the photo's own category, and of the others.
    """
    positives = [judgement for judgement in judgements if judgement.shown]
    negatives = [judgement for judgement in judgements if not judgement.shown]
    inside = [judgement for judgement in negatives if judgement.same_category]
    across = [judgement for judgement in negatives if not judgement.same_category]

    right = share_right(positives)
    return {
        "recognition_positive": right,
        "recognition_negative": share_right(negatives),
        "recognition_weighted": midpoint(right, share_right(negatives)),
        "recognition_inside": midpoint(right, share_right(inside)),
        "recognition_across": midpoint(right, share_right(across)),
    }


@dataclass
class Choice:
    """Which concept a photo shows, and which one was chosen."""

    right: str  # a name
    chosen: str | None  # None where the answer cannot be read


def captioning_scores(choices, tested=None):
    """Precision, recall and F1 of choices, each the mean over concepts. 0 / 0 is 0.

    As the RRG authors count: a concept that is only ever chosen wrongly is a class too, of
    precision 0. Their databases hold tested concepts only. Where there are others to be chosen,
    `tested` says which names are classes; to choose another one is still wrong.
    """
    hits = Counter(choice.right for choice in choices if choice.right == choice.chosen)
    actual = Counter(choice.right for choice in choices)
    picked = Counter(choice.chosen for choice in choices if choice.chosen is not None)
    names = actual.keys() | picked.keys()
    if tested:
        names = names & tested

    precision = []
    recall = []
    f1 = []
    for name in sorted(names):  # in order: sums of floats depend on it
        precision.append(hits[name] / max(1, picked[name]))
        recall.append(hits[name] / max(1, actual[name]))
        f1.append(2 * hits[name] / (actual[name] + picked[name]))
    return {
        "captioning_precision": mean(precision),
        "captioning_recall": mean(recall),
        "captioning_f1": mean(f1),
    }


# ------------------------------------------------------------------------- what is measured with
@dataclass(frozen=True)
class Test:
    """A photo that is put to the assistant, and the name of the concept it shows."""

    photo: Photo
    concept: str


def toy_questions(tests, seed):
    """Where, how and in what light is it? Three questions about each test photo.   -> [Question]

    No good description answers them: they are answered by looking.
    """
    questions = []
    for test in tests:
        rng = random.Random(f"questions {seed} {test.photo.name}")
        for kind in toy.VIEW:
            quiz = toy.quiz(test.photo.truth, kind, rng)
            questions.append(
                Question(test.concept, test.photo, quiz.text, quiz.options, quiz.answer)
            )
    return questions


@dataclass
class Part:
    """One part of the table: concepts of categories that are seen in training, or unseen."""

    known: list[Concept]  # those in the database
    tested: list[Concept]  # those whose photos are put to the assistant
    tests: list[Test] = field(default_factory=list)


@dataclass
class Benchmark:
    """All that speakers and databases are measured with."""

    root: pathlib.Path | None  # the folder of photos; None: the toy world
    concepts: list[Concept]
    splits: dict[str, PhotoSplit]  # {concept name: its photos}
    parts: dict[str, Part]  # "seen" and "unseen"
    questions: list[Question]  # the benchmark's own
    pairs: list[Pair]  # the benchmark's own


def load_benchmark(mllm, options):
    """The photos in --data, or the toy world, and what comes with them.   -> Benchmark"""
    root = find_folder(options.data) if options.data else None
    concepts, split = load_world(mllm, root, options.seed)

    splits = {}
    for concept in concepts:
        splits[concept.name] = split_photos(concept, options.references, options.seed)
    seen = split.train + split.test
    tested = seen if options.all else split.test
    parts = {"seen": Part(seen, tested), "unseen": Part(split.unseen, split.unseen)}

    questions = []
    pairs = []
    if root:
        questions = load_questions(root, concepts)
        pairs = load_pairs(root, concepts)
    return Benchmark(root, concepts, splits, parts, questions, pairs)


def choose_tests(benchmark, used):
    """Fill in the tests of each part. used: the photos that databases were written from.

    Those are no tests, nor are copies of them: RAP's databases keep pictures of their own.
    """
    fingerprints = {fingerprint(photo.load()) for photo in used}
    for part in benchmark.parts.values():
        part.tests = []
        for concept in part.tested:
            photos = benchmark.splits[concept.name].tests
            if fingerprints:
                photos = [p for p in photos if fingerprint(p.load()) not in fingerprints]
            part.tests += [Test(photo, concept.name) for photo in photos]


# ---------------------------------------------------------------------- what the assistant makes
@dataclass
class Leakage:
    """How much descriptions mention state or place."""

    share: float | None  # of descriptions; None if no verdict can be read
    unparsed: int  # verdicts that cannot be read


def leakage(mllm, entries, max_tokens):
    """How many descriptions mention state or place?   -> Leakage

    Exact in the toy world. Elsewhere the model without adapter is the judge, and it judges the
    words alone, without a picture.
    """
    photos = [photo for entry in entries for photo in entry.photos]
    if all(photo.truth for photo in photos):
        return Leakage(mean([toy.leaks(entry.text) for entry in entries]), 0)

    prompts = []
    for entry in entries:
        prompts.append(Prompt([], LEAKAGE.replace("{text}", mllm.quote(entry.text))))
    leaked = []
    unparsed = 0
    for answer in mllm.greedy(prompts, max_tokens, "judging leakage"):
        verdict = read_answer(answer, State=YES_OR_NO, Location=YES_OR_NO)
        if verdict is None:
            unparsed += 1
        else:
            leaked.append("Yes" in (verdict["State"], verdict["Location"]))
    return Leakage(mean(leaked), unparsed)


def find_candidates(embedder, entries, tests, options):
    """The k entries that each test photo is captioned with.   -> [[Entry] * k] * tests

    With --skip-retrieval the right one is always among them, in the place of the last.
    """
    photos = [test.photo for test in tests]
    entry_of = {entry.name: entry for entry in entries}
    candidates = []
    for test, retrieved in zip(tests, retrieve(embedder, photos, entries, options.k), strict=True):
        of_photo = [found.entry for found in retrieved]
        right = entry_of[test.concept]
        if options.skip_retrieval and right not in of_photo:
            of_photo[-1] = right
        candidates.append(of_photo)
    return candidates


def all_pairs(tests, entries):
    """Each test photo with each entry.   -> [Pair]"""
    pairs = []
    for test in tests:
        for entry in entries:
            pairs.append(Pair(test.photo, entry.name, shown=entry.name == test.concept))
    return pairs


def judge(mllm, entries, tests, pairs, max_tokens):
    """Put test photos to descriptions, in those `pairs` that are about them.   -> [Judgement]"""
    entry_of = {entry.name: entry for entry in entries}
    shows = {test.photo: test.concept for test in tests}  # the name of what a photo shows
    pairs = [pair for pair in pairs if pair.photo in shows and pair.concept in entry_of]
    described = [(pair.photo, entry_of[pair.concept]) for pair in pairs]
    verdicts = recognise(mllm, described, max_tokens)

    judgements = []
    for pair, said_yes in zip(pairs, verdicts, strict=True):
        photo_shows = entry_of[shows[pair.photo]]
        same_category = entry_of[pair.concept].category == photo_shows.category
        judgements.append(Judgement(pair.shown, said_yes, same_category))
    return judgements


def examine(mllm, embedder, entries, tests, questions, pairs, options):
    """All figures of one part of the table: tests put to a database.

    entries [Entry]: the database; tests [Test], at least one
    questions [Question], pairs [Pair]: the benchmark's own, of which those count that are about
    the tests. Without pairs each photo is put to each entry.
    -> {figure: fraction, None where it is not known; "counts": {what: number}}
    """
    names = [test.concept for test in tests]
    entry_of = {entry.name: entry for entry in entries}

    # Retrieve and caption.
    candidates = find_candidates(embedder, entries, tests, options)
    photos = [test.photo for test in tests]
    captions = caption(mllm, photos, candidates, options.max_tokens, options.seed)
    choices = []
    named = []  # (the name that belongs there, the caption), for `name_grounding`
    found = []  # is the right entry among the candidates?
    for name, of_photo, captioned in zip(names, candidates, captions, strict=True):
        chosen = captioned.chosen.name if captioned.chosen else None
        choices.append(Choice(name, chosen))
        named.append(([tag(name)], captioned.text))
        found.append(entry_of[name] in of_photo)

    # Recognise.
    judgements = judge(mllm, entries, tests, pairs or all_pairs(tests, entries), options.max_tokens)

    # Answer questions.
    questions = [question for question in questions if question.concept in names]
    hits = answer_questions(mllm, questions, entry_of, options.max_tokens)

    # The descriptions themselves.
    leaked = leakage(mllm, entries, options.max_tokens)
    lengths = [len(entry.text.split()) for entry in entries]

    # What could not be read, in all three tasks.
    answers = [choice.chosen for choice in choices]
    verdicts = [judgement.said_yes for judgement in judgements]
    unparsed = [answer is None for answer in answers + verdicts + hits]

    called = {f"name_{figure}": value for figure, value in name_grounding(named).items()}
    return {
        **captioning_scores(choices, set(names)),
        **called,
        **recognition_scores(judgements),
        "vqa": mean([hit is True for hit in hits]),
        "leakage": leaked.share,
        "words": mean(lengths),
        "retrieval_ceiling": mean(found),
        "unparsed": mean(unparsed),
        "counts": {
            "concepts": len(set(names)),
            "database": len(entries),
            "photos": len(tests),
            "pairs": len(judgements),
            "questions": len(hits),
            "unparsed_captions": answers.count(None),
            "unparsed_recognition": verdicts.count(None),
            "unparsed_vqa": hits.count(None),
            "unparsed_leakage": leaked.unparsed,
            "malformed_descriptions": sum(entry.malformed for entry in entries),
        },
    }


# -------------------------------------------------------------------------------------- the table
COLUMNS = {
    "captioning_f1": "caption F1",
    "captioning_precision": "precision",
    "captioning_recall": "recall",
    "name_f1": "name F1",
    "recognition_weighted": "recognition",
    "recognition_positive": "positive",
    "recognition_negative": "negative",
    "recognition_inside": "inside",
    "recognition_across": "across",
    "vqa": "VQA",
    "leakage": "leakage",
    "words": "words",
    "retrieval_ceiling": "ceiling",
    "unparsed": "unparsed",
}

TITLE = (
    "{photos} test photos of {concepts} concepts, {database} in the database, "
    "{pairs} pairs to recognise, {questions} questions"
)
GROUNDING_TITLE = (
    "names in captions (F1), by how many things there are and which references are given"
)


@dataclass
class Row:
    """A row of the table."""

    name: str  # an adapter, "base", or the file of a database
    entries: list[Entry]  # the descriptions, of all concepts
    grounding: dict[str, dict] = field(default_factory=dict)  # {part: figures}


def speaker_row(mllm, embedder, name, benchmark, options):
    """All that is done with an adapter on: describe, and with --grounding caption.   -> Row"""
    adapt(mllm, name)
    concepts = []
    for concept in benchmark.concepts:
        references = benchmark.splits[concept.name].references
        concepts.append(dataclasses.replace(concept, photos=references))
    row = Row(name, describe(mllm, concepts, options.max_tokens))

    for part_name, part in benchmark.parts.items():
        if options.grounding and part.tested:
            figures = grounding(mllm, embedder, part, benchmark.splits, options)
            row.grounding[part_name] = figures
    remove_lora(mllm.model)
    return row


def database_row(file, concepts):
    """Descriptions that were written elsewhere.   -> Row

    Raises DataError where a concept is not described.
    """
    described = {entry.name: entry for entry in read_database(file, photos_of(concepts))}
    missing = [concept.name for concept in concepts if concept.name not in described]
    if missing:
        raise DataError(
            f"{file} describes {len(described)} concepts, but not {len(missing)} of the "
            f"{len(concepts)} here, such as {missing[0]}"
        )
    return Row(file, [described[concept.name] for concept in concepts])


def reader_figures(mllm, embedder, row, benchmark, options):
    """Put all tests to one row's descriptions.   -> {part: figures, None without tests}"""
    figures = {}
    for part_name, part in benchmark.parts.items():
        figures[part_name] = None
        if not part.tests:
            continue
        known = {concept.name for concept in part.known}
        entries = [entry for entry in row.entries if entry.name in known]
        questions = benchmark.questions
        if benchmark.root is None:
            questions = toy_questions(part.tests, options.seed)
        figures[part_name] = examine(
            mllm, embedder, entries, part.tests, questions, benchmark.pairs, options
        )
        figures[part_name] |= row.grounding.get(part_name, {})
    return figures


def save_row(result, row, root, out):
    """Write the table so far, and a row's descriptions next to it."""
    write_json(out, result)
    file = pathlib.Path(out)
    slug = re.sub(r"[^\w-]+", "-", row.name).strip("-")
    content = database(row.entries, root or "")
    write_json(file.with_name(f"{file.stem}-{slug}-database.json"), content)


def table(mllm, embedder, options, models):
    """A row for each of `models`, adapters or "base", and for each database.

    embedder: the MLLM, or a Clip -> the content of --out, whose "rows" are {name: {part: figures}}
    """
    for adapter in options.adapter:
        warn_of_other_split(adapter, options)
    benchmark = load_benchmark(mllm, options)
    photos = photos_of(benchmark.concepts)
    mllm.encode_photos(photos, "looking at the photos")
    mllm.check_words(tag(concept.name) for concept in benchmark.concepts)

    # Databases come first, since one that does not fit should be noticed before the work.
    databases = [database_row(file, benchmark.concepts) for file in options.database]
    used = []
    for row in databases:
        used += photos_of(row.entries)
    choose_tests(benchmark, used)

    # What is done with an adapter on comes before what reads it, the model without.
    rows = [speaker_row(mllm, embedder, name, benchmark, options) for name in models]

    result = {
        "seed": options.seed,
        "command": shlex.join(["python", *sys.argv]),
        "device": run.machine(mllm.device),
        "rows": {},
    }
    for row in rows + databases:
        print(f"evaluating {row.name}")
        result["rows"][row.name] = reader_figures(mllm, embedder, row, benchmark, options)
        if options.out:
            save_row(result, row, benchmark.root, options.out)
    return result


def warn_of_other_split(adapter, options):
    """Print a note if an adapter's run held out other concepts than this table."""
    record = pathlib.Path(adapter).parent / "config.json"
    if not record.is_file():
        return
    settings = run.load_json(record).get("settings")
    if not settings:
        return
    same_seed = settings["seed"] == options.seed
    same_data = pathlib.Path(settings["data"]) == pathlib.Path(options.data)
    if not (same_seed and same_data):
        print(
            f"note: {adapter} was trained with --seed {settings['seed']} --data "
            f"{settings['data'] or '(the toy world)'}, so it may have met concepts that this table "
            "holds out"
        )


def cell(figure, value):
    """One figure in words."""
    if value is None:
        return "-"
    return f"{value:.1f}" if figure == "words" else f"{value:.1%}"


def lines_of(columns, rows):
    """Some columns as texts: the heading, then a line a row.   rows {name: figures}"""
    lines = [["", *columns.values()]]
    for name, figures in rows.items():
        cells = [cell(figure, figures.get(figure)) for figure in columns]
        lines.append([name, *cells])
    return lines


def tables(rows):
    """The rows as people read them.   rows {name: {part: figures}}

    Yields (title, lines), for seen and for unseen categories; the first line is the heading.
    """
    for part in ("seen", "unseen"):
        of_part = {name: row[part] for name, row in rows.items() if row[part]}
        if not of_part:
            continue
        counts = next(iter(of_part.values()))["counts"]
        yield f"{part} categories: {TITLE.format(**counts)}", lines_of(COLUMNS, of_part)
        if any(GROUNDING.keys() & figures.keys() for figures in of_part.values()):
            yield GROUNDING_TITLE, lines_of(GROUNDING, of_part)


def show(rows):
    """Print the rows as Markdown."""
    for title, (heading, *lines) in tables(rows):
        print(f"\n{title}\n")
        print(f"| {' | '.join(heading)} |")
        print("|---" * len(heading) + "|")
        for line in lines:
            print(f"| {' | '.join(line)} |")


# ------------------------------------------------------------------------------- the command line
@dataclass
class Options(AssistantOptions):
    """Every option of this script."""

    adapter: list = option(
        [],
        "a run's adapter/, or any PEFT LoRA: a row of the table; may be given several times",
        metavar="DIR",
    )
    database: list = option(
        [],
        "descriptions in RAP's JSON: a row of the table; may be given several times",
        metavar="FILE",
    )
    data: str = option(
        "",
        "folder of photos, or a hub dataset such as google/dreambooth; default: the toy world",
        metavar="DIR",
    )
    all: bool = option(
        False,
        "test every concept, also those that rrg.py trains on: for photos that no adapter here "
        "was trained on",
    )
    skip_retrieval: bool = option(False, "the right concept is always among the k")
    grounding: bool = option(
        False,
        "also RePIC's measure: names in captions of pictures of one, two and four concepts, from "
        "reference photos",
    )
    out: str = option(
        "",
        "write the table here as JSON, and each row's descriptions next to it",
        metavar="FILE",
    )


def read_settings(argv=None):
    """The command line.   -> Options"""
    return fill_in_assistant(Options, run.read_options(Options, __doc__, argv))


def main(argv=None):
    options = read_settings(argv)
    mllm = MLLM(options.model, options.max_pixels)
    embedder = Clip(options.embedder, mllm.device) if options.embedder else mllm
    result = table(mllm, embedder, options, ["base", *options.adapter])
    show(result["rows"])


if __name__ == "__main__":
    run.main(main)
