"""evaluate.py: what descriptions are worth: a benchmark's photos put to the assistant, as a table.

Each concept's reference photos are described by a speaker: the model with an adapter, or "base",
the model as it came. The descriptions become a database, and the test photos are put to the
assistant that knows nothing else (assistant.py): it retrieves, captions, recognises and answers
questions. What it is asked is the same in all rows of the table:

    base        what the model as it came describes
    refined     the same descriptions, which it has rewritten without state and place: a baseline
                that has learned nothing (not in the toy world, whose model cannot)
    an adapter  what the model describes with it, and reads with it too where it is RePIC's or
                SFT's, which were made for that; all other rows are read without (--reader)
    a database  descriptions that were written elsewhere

With --grounding the model is also measured as RePIC was (naming.py), with its adapter on: do
captions use the names that reference photos give?

    python evaluate.py --adapter runs/x/adapter    # the toy world: a row for base, one for x
    python evaluate.py --model Qwen/Qwen2-VL-2B-Instruct --data photos/ --all
                                                   # any folder of photos (data.py has the layouts)
    python evaluate.py --protocol perva --train-concepts 30 --data perva-data/ --model ...
                                                   # as published rows were measured (protocols.py)
    python evaluate.py --database database.json    # descriptions that were written elsewhere

The result is a Markdown table on the screen and, with --out, JSON on disk. "seen" are test photos
of held-out concepts, whose categories rrg.py was trained on, looked up in a database of all
concepts of these categories; "unseen" the same for the categories that it never met. With --all or
--train-concepts there is one part, "all". Columns:

    caption F1            of the chosen letter, with precision and recall: the mean over concepts
    name F1               does the caption call the concept by its name?
    recognition           among look-alikes: the mean of positive (this is it) and negative (this is
                          another one), with negatives of the photo's own category only, as the RRG
                          authors' code has it for PerVA (recognition_inside in JSON; where no
                          category is known, it is of all pairs)
    all pairs             the same with all negatives (recognition_weighted), then its two halves
    across                the same with negatives of other categories only
    VQA                   right answers to questions
    leakage               descriptions that mention state or place
    words                 how long a description is
    ceiling               is the right one among the k retrieved? Captions cannot be better
    unparsed              answers that cannot be read, which are wrong as well

Where it departs from the papers and their research code (see assistant.py for the assistant, and
protocols.py for what it is asked about):
1. An answer that cannot be read is wrong, and no class of its own in F1. (In the research code
   whatever was answered wrongly is one.)
2. Where the truth is not known, the model itself judges leakage, and writes the row `refined`.
   (The research code asks another language model for both.)
3. RePIC's and SFT's rows are read with their own adapters. (How the paper's were is not known.)

Shapes: C concepts in the database, D width of the vectors that are compared.
"""

import dataclasses
import pathlib
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
from data import DataError, tag
from lora import lora_off, remove_lora, write_json
from model import MLLM, Clip, Prompt
from naming import GROUNDING, grounding, name_grounding
from protocols import (
    PROTOCOLS,
    Test,
    all_pairs,
    choose_tests,
    load_benchmark,
    protocol_of,
    protocol_settings,
    toy_questions,
)
from rrg import photos_of
from run import option

LEAKAGE = (  # {text} is a quoted description
    "This is how somebody described a thing of theirs: {text}\n"
    "Does it mention a passing state of the thing, such as what it is doing, how it is placed, or "
    "that it is open, worn or folded? Does it mention a location, such as the background or what "
    "stands around? Judge strictly by its words. Answer only with JSON in this form:\n"
    '{"State": "Yes or No", "Location": "Yes or No"}'
)
REFINE = (  # {text} is a quoted description
    "This is how somebody described a thing of theirs: {text}\n"
    "Write it again without any passing state of the thing, such as what it is doing, how it is "
    "placed, or that it is open, worn or folded, and without any location, such as the background "
    "or what stands around. Keep everything else as it is. Answer only with the description."
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


def refine(mllm, entries, max_tokens):
    """Descriptions, rewritten by the model without state and place.   -> [Entry]

    An empty answer is a malformed description.
    """
    prompts = []
    for entry in entries:
        prompts.append(Prompt([], REFINE.replace("{text}", mllm.quote(entry.text))))
    refined = []
    answers = mllm.greedy(prompts, max_tokens, "refining")
    for entry, answer in zip(entries, answers, strict=True):
        text = " ".join(answer.split()).strip('"')  # it was given between quotation marks
        refined.append(dataclasses.replace(entry, text=text, malformed=not text))
    return refined


@dataclass
class Lookup:
    """Entries that are looked up together, and the tests that are put to them."""

    entries: list[Entry]
    tests: list[Test]


def look_up_together(entries, tests, by_category):
    """All at once, or each category on its own.   -> [Lookup]"""
    if not by_category:
        return [Lookup(entries, tests)]
    category_of = {entry.name: entry.category for entry in entries}
    lookups = []
    for category in dict.fromkeys(category_of.values()):
        of_category = [entry for entry in entries if entry.category == category]
        about = [test for test in tests if category_of[test.concept] == category]
        if about:
            lookups.append(Lookup(of_category, about))
    return lookups


def find_candidates(embedder, lookup, options):
    """The k entries that each test photo is captioned with.   -> [[Entry] * k] * tests

    With --skip-retrieval the right one is always among them, in the place of the last.
    """
    photos = [test.photo for test in lookup.tests]
    entry_of = {entry.name: entry for entry in lookup.entries}
    retrieved = retrieve(embedder, photos, lookup.entries, options.k)
    candidates = []
    for test, found in zip(lookup.tests, retrieved, strict=True):
        of_photo = [each.entry for each in found]
        right = entry_of[test.concept]
        if options.skip_retrieval and right not in of_photo:
            of_photo[-1] = right
        candidates.append(of_photo)
    return candidates


def judge(mllm, entries, tests, pairs, options):
    """Put test photos to descriptions, in those `pairs` that are about them.   -> [Judgement]"""
    entry_of = {entry.name: entry for entry in entries}
    shows = {test.photo: test.concept for test in tests}  # the name of what a photo shows
    pairs = [pair for pair in pairs if pair.photo in shows and pair.concept in entry_of]
    described = [(pair.photo, entry_of[pair.concept]) for pair in pairs]
    verdicts = recognise(mllm, described, options.max_tokens, options.show_reference)

    judgements = []
    for pair, said_yes in zip(pairs, verdicts, strict=True):
        photo_shows = entry_of[shows[pair.photo]]
        same_category = entry_of[pair.concept].category == photo_shows.category
        judgements.append(Judgement(pair.shown, said_yes, same_category))
    return judgements


@dataclass
class Answers:
    """What the reader made of the tests of a part."""

    choices: list[Choice]
    named: list[tuple]  # (the name that belongs there, the caption), for `name_grounding`
    judgements: list[Judgement]
    hits: list[bool | None]  # was the right option chosen? None where it cannot be read


def ask_reader(mllm, entries, tests, candidates, questions, pairs, options):
    """Put the three tasks to the model as it is now.   -> Answers

    candidates [[Entry] * k] * tests; the others as in `examine`
    """
    photos = [test.photo for test in tests]
    captions = caption(mllm, photos, candidates, options.max_tokens, options.seed)
    choices = []
    named = []
    for test, captioned in zip(tests, captions, strict=True):
        chosen = captioned.chosen.name if captioned.chosen else None
        choices.append(Choice(test.concept, chosen))
        named.append(([tag(test.concept)], captioned.text))

    judgements = judge(mllm, entries, tests, pairs, options)

    entry_of = {entry.name: entry for entry in entries}
    # About tests only: a photo that was described is no question.
    photos = {test.photo for test in tests}
    questions = [question for question in questions if question.photo in photos]
    hits = answer_questions(mllm, questions, entry_of, options.max_tokens, options.show_reference)
    return Answers(choices, named, judgements, hits)


def examine(mllm, embedder, entries, tests, questions, pairs, options):
    """All figures of one part of the table: tests put to a database.

    The model reads as it is now; retrieval and the judge of leakage are without adapter in every
    row.
    entries [Entry]: the database; tests [Test], at least one
    questions [Question], pairs [Pair]: the benchmark's own, of which those count that are about
    the tests. Without pairs each photo is put to each entry that it is looked up among.
    -> {figure: fraction, None where it is not known; "counts": {what: number}}
    """
    lookups = look_up_together(entries, tests, protocol_of(options).by_category)
    tests = []  # in the order of the lookups
    candidates = []
    every_pair = []
    with lora_off(mllm.model):
        for lookup in lookups:
            tests += lookup.tests
            candidates += find_candidates(embedder, lookup, options)
            every_pair += all_pairs(lookup.tests, lookup.entries)
        leaked = leakage(mllm, entries, options.max_tokens)
    found = []  # is the right entry among the candidates?
    for test, of_photo in zip(tests, candidates, strict=True):
        found.append(test.concept in [entry.name for entry in of_photo])

    pairs = pairs or every_pair
    answers = ask_reader(mllm, entries, tests, candidates, questions, pairs, options)

    # What could not be read, in all three tasks.
    chosen = [choice.chosen for choice in answers.choices]
    verdicts = [judgement.said_yes for judgement in answers.judgements]
    unparsed = [answer is None for answer in chosen + verdicts + answers.hits]

    names = {test.concept for test in tests}
    called = {f"name_{figure}": value for figure, value in name_grounding(answers.named).items()}
    return {
        **captioning_scores(answers.choices, names),
        **called,
        **recognition_scores(answers.judgements),
        "vqa": mean([hit is True for hit in answers.hits]),
        "leakage": leaked.share,
        "words": mean([len(entry.text.split()) for entry in entries]),
        "retrieval_ceiling": mean(found),
        "unparsed": mean(unparsed),
        "counts": {
            "concepts": len(names),
            "database": len(entries),
            "photos": len(tests),
            "pairs": len(verdicts),
            "questions": len(answers.hits),
            "unparsed_captions": chosen.count(None),
            "unparsed_recognition": verdicts.count(None),
            "unparsed_vqa": answers.hits.count(None),
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
    "recognition_inside": "recognition",
    "recognition_weighted": "all pairs",
    "recognition_positive": "positive",
    "recognition_negative": "negative",
    "recognition_across": "across",
    "vqa": "VQA",
    "leakage": "leakage",
    "words": "words",
    "retrieval_ceiling": "ceiling",
    "unparsed": "unparsed",
}

PARTS = {"seen": "seen categories", "unseen": "unseen categories", "all": "all together"}
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

    name: str  # "base", "refined", an adapter, or the file of a database
    entries: list[Entry]  # the descriptions, of all concepts
    reader: str = "base"  # or "adapter": the row's own
    grounding: dict[str, dict] = field(default_factory=dict)  # {part: figures}


def reader_of(name, options):
    """Who reads what a speaker has described: "base", or "adapter", the speaker's own."""
    if name == "base":
        return "base"
    own = run.run_record(name).get("method") in ("repic", "sft")
    return options.reader or ("adapter" if own else "base")


def speaker_row(mllm, embedder, name, benchmark, options):
    """Describe, and with --grounding caption, with an adapter on.   -> Row"""
    adapt(mllm, name)
    concepts = []
    for concept in benchmark.concepts:
        references = benchmark.splits[concept.name].references
        concepts.append(dataclasses.replace(concept, photos=references))
    row = Row(name, describe(mllm, concepts, options.max_tokens), reader_of(name, options))

    info = {entry.name: entry.text for entry in row.entries}
    zero_shot = name == "base"
    for part_name, part in benchmark.parts.items():
        if options.grounding and part.tested:
            row.grounding[part_name] = grounding(
                mllm, embedder, part, benchmark.splits, info, zero_shot, options
            )
    remove_lora(mllm.model)
    return row


def speaker_rows(mllm, embedder, models, benchmark, options):
    """A row for each of `models`, and after "base" one of its refined descriptions.   -> [Row]"""
    rows = []
    for name in models:
        row = speaker_row(mllm, embedder, name, benchmark, options)
        rows.append(row)
        if name == "base" and toy.is_toy(options.model):
            print("no row `refined`: the toy model does not know that prompt")
        elif name == "base":
            rows.append(Row("refined", refine(mllm, row.entries, options.max_tokens)))
    return rows


def database_row(file, concepts, root=None):
    """Descriptions that were written elsewhere, with the categories that are known here.   -> Row

    Raises DataError where a concept is not described.
    """
    entries = read_database(file, photos_of(concepts), root)
    described = {entry.name: entry for entry in entries}
    missing = [concept.name for concept in concepts if concept.name not in described]
    if missing:
        raise DataError(
            f"{file} describes {len(described)} concepts, but not {len(missing)} of the "
            f"{len(concepts)} here, such as {missing[0]}"
        )
    entries = []
    for concept in concepts:
        entry = described[concept.name]
        entries.append(dataclasses.replace(entry, category=concept.category))
    return Row(file, entries)


def reader_figures(mllm, embedder, row, benchmark, options):
    """Put all tests to one row's descriptions.   -> {part: figures, None without tests}"""
    figures = {}
    if row.reader == "adapter":
        adapt(mllm, row.name)
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
        figures[part_name] |= row.grounding.get(part_name, {}) | {"reader": row.reader}
    remove_lora(mllm.model)
    return figures


def save_row(result, row, root, out):
    """Write the table so far, and a row's descriptions next to it."""
    write_json(out, result)
    file = pathlib.Path(out)
    slug = re.sub(r"[^\w-]+", "-", row.name).strip("-")
    content = database(row.entries, root or "")
    write_json(file.with_name(f"{file.stem}-{slug}-database.json"), content)


def table(mllm, embedder, options, models):
    """A row for each of `models`, adapters or "base", and for each database; after base: refined.

    embedder: the MLLM, or a Clip -> the content of --out, whose "rows" are {name: {part: figures}}
    """
    if options.protocol:
        show_protocol(options)
    benchmark = load_benchmark(mllm, options)
    for adapter in options.adapter:
        warn_of_other_split(adapter, benchmark)
    mllm.check_words(tag(concept.name) for concept in benchmark.concepts)

    # Databases come first, since one that does not fit should be noticed before the work.
    databases = [
        database_row(file, benchmark.concepts, benchmark.root) for file in options.database
    ]
    used = []
    for row in databases:
        used += photos_of(row.entries)
    choose_tests(benchmark, used)

    rows = speaker_rows(mllm, embedder, models, benchmark, options)

    result = {
        "seed": options.seed,
        "protocol": options.protocol,
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


def warn_of_other_split(adapter, benchmark):
    """Print a note if an adapter's run was trained on concepts that this table tests.

    They are known by their names, which tell of another toy world's as well.
    """
    trained = (run.run_record(adapter).get("concepts") or {}).get("train", [])
    tested = set()
    for part in benchmark.parts.values():
        tested |= {concept.name for concept in part.tested}
    met = sorted(tested.intersection(trained))
    if met:
        print(
            f"note: {adapter} was trained on {len(met)} concepts of the names that this table "
            f"tests, such as {met[0]}; give --seed and --train-concepts as its run had them"
        )
    if not trained and benchmark.root and adapter != "base":
        print(f"note: {adapter} does not say which concepts it was trained on; some may be tested")


def show_protocol(options):
    """Print what --protocol stands for here."""
    protocol = PROTOCOLS[options.protocol]
    databases = "a database for each category" if protocol.by_category else "one database"
    print(
        f"--protocol {options.protocol}: {databases}; photos of a concept described: "
        f"{options.references}; kept from the tests, if the folder is not split: {protocol.kept}; "
        f"seeds: {protocol.seeds}, here {options.seed} (source: {protocol.source})"
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

    Yields (title, lines), for each part; the first line is the heading. A row that its own adapter
    has read says so.
    """
    for part, title in PARTS.items():
        of_part = {}
        for name, row in rows.items():
            figures = row.get(part)
            if figures:
                own = ", read with it" if figures["reader"] == "adapter" else ""
                of_part[name + own] = figures
        if not of_part:
            continue
        counts = next(iter(of_part.values()))["counts"]
        yield f"{title}: {TITLE.format(**counts)}", lines_of(COLUMNS, of_part)
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
    protocol: str = option(
        "",
        "measure as the published rows of this benchmark were: sets --references, --k and "
        "--embedder where they are not given, how many photos are kept from the tests, and whether "
        "each category has a database of its own (protocols.py)",
        choices=tuple(PROTOCOLS),
    )
    all: bool = option(
        False,
        "test every concept, also those that rrg.py trains on, with one database of all: for "
        "photos that no adapter here was trained on",
    )
    train_concepts: str = option(
        "",
        "what rrg.py was given: all other concepts are tested, with one database of them",
        metavar="N|FILE",
    )
    reader: str = option(
        "",
        "who reads in an adapter's row: the model without it, or with it; default: with it for "
        "RePIC and SFT, else without",
        choices=("base", "adapter"),
    )
    show_reference: bool = option(
        False,
        "in recognition and questions show the first reference photo beside the description",
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


def fill_in(cls, own, given):
    """All options of a table.   -> cls

    What is given counts before what --protocol sets, and that before the script's `own` defaults.
    Raises DataError for what cannot be had together.
    """
    of_protocol = protocol_settings(given.get("protocol", ""))
    if "seed" in own:  # a run's concepts are split by its own seed
        of_protocol.pop("seed", None)
    settings = own | of_protocol | given
    options = fill_in_assistant(cls, settings)
    if options.protocol and not options.data:
        raise DataError("--protocol is about a benchmark's photos: give --data")
    if options.show_reference and toy.is_toy(options.model):
        raise DataError(
            "--show-reference wants a real --model: the toy model was never shown two photos there"
        )
    return options


def read_settings(argv=None):
    """The command line.   -> Options. Raises DataError for what cannot be had together."""
    given = run.read_options(Options, __doc__, argv)
    which = [name for name in ("all", "train_concepts") if given.get(name)]
    if len(which) == 2:
        raise DataError("--all tests every concept, --train-concepts all others: give one of them")
    if given.get("protocol") and not which:
        raise DataError(
            "--protocol wants --all or, of concepts that a run was trained on, --train-concepts as "
            "the run had it"
        )
    return fill_in(Options, {}, given)


def main(argv=None):
    options = read_settings(argv)
    mllm = MLLM(options.model, options.max_pixels)
    embedder = Clip(options.embedder, mllm.device) if options.embedder else mllm
    result = table(mllm, embedder, options, ["base", *options.adapter])
    show(result["rows"])


if __name__ == "__main__":
    run.main(main)
