"""evaluate.py: what descriptions are worth: a benchmark's photos put to the assistant, as a table.

Each concept's reference photos are described by a speaker: the model with an adapter, or "base",
the model as it came. The descriptions become a database, and the test photos are put to the
assistant that knows nothing else (assistant.py): it retrieves, captions, recognises and answers
questions. What it is asked is the same in all rows of the table:

    base        what the model as it came describes
    refined     the same descriptions, which it has rewritten without state and place: a baseline
                that has learned nothing (the toy model cannot do it)
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

The result is a Markdown table on the screen. With --out table.json a row is kept there as soon as
it is done, and the same command goes on with those that are missing; with one --adapter more it
measures that row only. Beside it come the descriptions of each row, table-ROW-database.json, and
all that was retrieved and said, a line of JSON each, in table-answers.jsonl: where much is
unparsed, look there. table-skipped.txt lists the photos that were not read.

"seen" are test photos of held-out concepts, whose categories rrg.py was trained on, looked up in a
database of all concepts of these categories; "unseen" the same for the categories that it never
met. With --all or --train-concepts there is one part, "all". Columns:

    caption F1            of the chosen letter, with precision and recall: the mean over concepts
    name F1               does the caption call the concept by its name?
    recognition           among look-alikes: the mean of positive (this is it) and negative (this is
                          another one), with negatives of the photo's own category only, as the RRG
                          authors' code has it for PerVA (recognition_inside in JSON; where no
                          category is known, it is of all pairs)
    all pairs             the same with all negatives (recognition_weighted), then its two halves
    across                the same with negatives of other categories only
    VQA                   right answers to questions
    leakage               descriptions that mention state or place ("-" of photos with the toy
                          model, which is no judge of them)
    words                 how long a description is
    ceiling               is the right one among the k retrieved? Captions cannot be better
    unparsed              answers that cannot be read, which are wrong as well
    own found             photos of which the listener believes that one of the k retrieved
                          descriptions fits (--threshold); else it shows "none of your things"
    strangers refused     the same photos, with their own description left out of the database:
                          photos of which it believes that none of the k fits

Where it departs from the papers and their research code (see assistant.py for the assistant, and
protocols.py for what it is asked about):
1. An answer that cannot be read is wrong, and no class of its own in F1. (In the research code
   whatever was answered wrongly is one.)
2. The model itself writes the row `refined`, and where the truth is not known it judges leakage.
   (The research code asks another language model for both.)
3. RePIC's and SFT's rows are read with their own adapters. (How the paper's were is not known.)
4. Whether a photo shows none of the things is measured beside the rest and changes none of it.
   (The paper's photos all show a known thing.)

Shapes: C concepts in the database, D width of the vectors that are compared.
"""

import dataclasses
import json
import pathlib
import re
from collections import Counter
from dataclasses import dataclass, field

import run
import toy
from assistant import (
    CAPTIONING,
    RECOGNITION,
    VQA,
    YES_OR_NO,
    AssistantOptions,
    Caption,
    Entry,
    K,
    Question,
    Verdict,
    adapt,
    answer_questions,
    believe,
    caption,
    database,
    describe,
    fill_in_assistant,
    fits_one,
    read_answer,
    read_database,
    recognise,
    retrieve,
)
from data import DataError, find_folder, tag
from lora import lora_off, remove_lora, write_json, write_text
from model import MLLM, Clip, Prompt
from naming import (
    GROUNDING,
    check_adapters,
    check_given_once,
    grounding,
    grounding_work,
    name_grounding,
    taught_names,
)
from protocols import (
    PROTOCOLS,
    Pair,
    Test,
    all_pairs,
    choose_tests,
    load_benchmark,
    protocol_of,
    protocol_settings,
    thing_names,
    toy_questions,
)
from rrg import photos_of
from run import option
from tables import ANSWER, BELIEF, KeptTable, Progress, speaker_of

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
    answer: str = ""  # as it stands


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
def knows(mllm, template):
    """Does the model know the words of a question about {text}? The toy model knows few."""
    return mllm.knows(template.replace("{text}", ""))


def leakage(mllm, entries, max_tokens):
    """Do descriptions mention state or place?   -> [Verdict], one an entry

    Exact in the toy world. Elsewhere the model without adapter is the judge, and it judges the
    words alone, without a picture. Empty if it does not know the words of the question.
    """
    photos = [photo for entry in entries for photo in entry.photos]
    if all(photo.truth for photo in photos):
        return [Verdict(toy.leaks(entry.text), "") for entry in entries]
    if not knows(mllm, LEAKAGE):
        return []

    prompts = []
    for entry in entries:
        prompts.append(Prompt([], LEAKAGE.replace("{text}", mllm.quote(entry.text))))
    verdicts = []
    for answer in mllm.greedy(prompts, max_tokens, "judging leakage"):
        row = read_answer(answer, State=YES_OR_NO, Location=YES_OR_NO)
        value = None if row is None else "Yes" in (row["State"], row["Location"])
        verdicts.append(Verdict(value, answer))
    return verdicts


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


@dataclass
class Candidates:
    """The entries that a test photo is put to."""

    retrieved: list[Entry]  # k, best first: it is captioned with them
    others: list[Entry]  # the k without its own, as if that were not in the database


def find_candidates(embedder, lookup, options):
    """What each test photo is put to.   -> [Candidates] * tests

    With --skip-retrieval the right one is always retrieved, in the place of the last.
    """
    photos = [test.photo for test in lookup.tests]
    entry_of = {entry.name: entry for entry in lookup.entries}
    # One more than k, for `others`.
    retrieved = retrieve(embedder, photos, lookup.entries, options.k + 1)
    candidates = []
    for test, found in zip(lookup.tests, retrieved, strict=True):
        entries = [each.entry for each in found]
        right = entry_of[test.concept]
        of_photo = entries[: options.k]
        if options.skip_retrieval and right not in of_photo:
            of_photo[-1] = right
        others = [entry for entry in entries if entry.name != right.name]
        candidates.append(Candidates(of_photo, others[: options.k]))
    return candidates


@dataclass
class Beliefs:
    """How far the listener believes in the candidates of the tests."""

    retrieved: list[list[float]]  # [k] * tests
    others: list[list[float]]  # [k] * tests; k is 0 where there is no other entry


def believe_candidates(mllm, tests, candidates):
    """-> Beliefs in the candidates [Candidates] of the tests"""
    photos = [test.photo for test in tests]
    retrieved = believe(mllm, photos, [each.retrieved for each in candidates])
    others = believe(mllm, photos, [each.others for each in candidates])
    return Beliefs(retrieved, others)


def stranger_scores(beliefs, threshold):
    """How often own things are found, and strangers refused.   -> {figure: fraction}

    A photo becomes a stranger's where its own entry is left out of the database, and that is hard:
    its look-alikes stay.
    """
    found = [fits_one(of_photo, threshold) for of_photo in beliefs.retrieved]
    refused = [not fits_one(of_photo, threshold) for of_photo in beliefs.others if of_photo]
    return {"own_found": mean(found), "strangers_refused": mean(refused)}


def pairs_about(pairs, entries, tests):
    """Those pairs that are about photos of `tests` and entries that there are."""
    names = {entry.name for entry in entries}
    photos = {test.photo for test in tests}
    return [pair for pair in pairs if pair.photo in photos and pair.concept in names]


def judge(mllm, entries, tests, pairs, options):
    """Put test photos to descriptions: those of `pairs_about`.   -> [Judgement] * pairs"""
    entry_of = {entry.name: entry for entry in entries}
    shows = {test.photo: test.concept for test in tests}  # the name of what a photo shows
    described = [(pair.photo, entry_of[pair.concept]) for pair in pairs]
    verdicts = recognise(mllm, described, options.max_tokens, options.show_reference)

    judgements = []
    for pair, verdict in zip(pairs, verdicts, strict=True):
        photo_shows = entry_of[shows[pair.photo]]
        same_category = entry_of[pair.concept].category == photo_shows.category
        judgements.append(Judgement(pair.shown, verdict.value, same_category, verdict.answer))
    return judgements


@dataclass
class Asked:
    """What the reader is asked in a part."""

    tests: list[Test]
    candidates: list[Candidates]  # of the tests
    pairs: list[Pair]  # to recognise
    questions: list[Question]


@dataclass
class Answers:
    """What the reader answered."""

    captions: list[Caption]  # of the tests
    judgements: list[Judgement]  # of the pairs
    hits: list[Verdict]  # of the questions: was the right option chosen?


def ask_reader(mllm, entries, asked, options):
    """Put the three tasks to the model as it is now.   -> Answers"""
    photos = [test.photo for test in asked.tests]
    retrieved = [each.retrieved for each in asked.candidates]
    captions = caption(mllm, photos, retrieved, options.max_tokens, options.seed)
    judgements = judge(mllm, entries, asked.tests, asked.pairs, options)
    entry_of = {entry.name: entry for entry in entries}
    hits = answer_questions(
        mllm, asked.questions, entry_of, options.max_tokens, options.show_reference
    )
    return Answers(captions, judgements, hits)


@dataclass
class Examined:
    """What came of one part of the table."""

    figures: dict  # {figure: fraction, None where it is not known; "counts": {what: number}}
    records: list[dict]  # what was said, as the file of answers keeps it


def examine(mllm, embedder, entries, tests, questions, pairs, options):
    """All figures of one part of the table: tests put to a database.   -> Examined

    The model reads as it is now; retrieval, the listener and the judge of leakage are without
    adapter in every row.
    entries [Entry]: the database; tests [Test], at least one
    questions [Question], pairs [Pair]: the benchmark's own, of which those count that are about
    the tests. Without pairs each photo is put to each entry that it is looked up among.
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
        beliefs = believe_candidates(mllm, tests, candidates)
        leaks = leakage(mllm, entries, options.max_tokens)

    pairs = pairs_about(pairs or every_pair, entries, tests)
    # About tests only: a photo that was described is no question.
    photos = {test.photo for test in tests}
    questions = [question for question in questions if question.photo in photos]
    asked = Asked(tests, candidates, pairs, questions)
    answers = ask_reader(mllm, entries, asked, options)
    figures = figures_of(asked, answers, leaks)
    figures |= stranger_scores(beliefs, options.threshold)
    figures["words"] = mean([len(entry.text.split()) for entry in entries])
    figures["counts"]["database"] = len(entries)
    figures["counts"]["malformed_descriptions"] = sum(entry.malformed for entry in entries)
    return Examined(figures, records_of(asked, answers, beliefs, entries, leaks))


def figures_of(asked, answers, leaks):
    """The figures that answers are worth.   leaks [Verdict]: of the descriptions

    -> {figure: fraction, None where it is not known; "counts": {what: number}}
    """
    choices = []
    named = []  # (the name that belongs there, the caption), for `name_grounding`
    found = []  # is the right entry among those that were retrieved?
    for test, of_test, captioned in zip(
        asked.tests, asked.candidates, answers.captions, strict=True
    ):
        chosen = captioned.chosen.name if captioned.chosen else None
        choices.append(Choice(test.concept, chosen))
        named.append(([tag(test.concept)], captioned.text))
        found.append(test.concept in [entry.name for entry in of_test.retrieved])

    # What could not be read, in all three tasks.
    chosen = [choice.chosen for choice in choices]
    verdicts = [judgement.said_yes for judgement in answers.judgements]
    hits = [verdict.value for verdict in answers.hits]
    unparsed = [answer is None for answer in chosen + verdicts + hits]

    names = {test.concept for test in asked.tests}
    called = {f"name_{figure}": value for figure, value in name_grounding(named).items()}
    return {
        **captioning_scores(choices, names),
        **called,
        **recognition_scores(answers.judgements),
        "vqa": mean([hit is True for hit in hits]),
        "leakage": mean([verdict.value for verdict in leaks if verdict.value is not None]),
        "retrieval_ceiling": mean(found),
        "unparsed": mean(unparsed),
        "counts": {
            "concepts": len(names),
            "photos": len(asked.tests),
            "pairs": len(verdicts),
            "questions": len(hits),
            "unparsed_captions": chosen.count(None),
            "unparsed_recognition": verdicts.count(None),
            "unparsed_vqa": hits.count(None),
            "unparsed_leakage": [verdict.value for verdict in leaks].count(None),
        },
    }


# ------------------------------------------------------------------------------ what was said
def records_of(asked, answers, beliefs, entries, leaks):
    """All that was said in a part, a record an answer.   -> [{"task", ...}]

    What could not be read is None.
    """
    records = []
    for place, (test, captioned) in enumerate(zip(asked.tests, answers.captions, strict=True)):
        of_test = asked.candidates[place]
        record = caption_record(test, captioned, of_test.retrieved)
        record["beliefs"] = rounded(of_test.retrieved, beliefs.retrieved[place])
        record["beliefs_as_stranger"] = rounded(of_test.others, beliefs.others[place])
        records.append(record)
    for pair, judgement in zip(asked.pairs, answers.judgements, strict=True):
        records.append(recognition_record(pair, judgement))
    for question, verdict in zip(asked.questions, answers.hits, strict=True):
        records.append(question_record(question, verdict))
    judged = entries if leaks else []
    for entry, verdict in zip(judged, leaks, strict=True):
        records.append(leakage_record(entry, verdict))
    return records


def caption_record(test, captioned, retrieved):
    """What was retrieved for a test photo, and the caption that came of it."""
    letter_of = {entry.name: captioned.letter(entry) for entry in captioned.candidates}
    chosen = captioned.chosen.name if captioned.chosen else None
    return {
        "task": "caption",
        "photo": test.photo.name,
        "shows": test.concept,
        "retrieved": [entry.name for entry in retrieved],
        "letters": letter_of,
        "answer": captioned.answer,
        "letter": letter_of.get(chosen),
        "chosen": chosen,
        "caption": captioned.text,
        "contradicts_itself": captioned.contradicts,
    }


def recognition_record(pair, judgement):
    """Whether a photo was taken for what a description is of."""
    return {
        "task": "recognition",
        "photo": pair.photo.name,
        "description_of": pair.concept,
        "right": pair.shown,
        "answer": judgement.answer,
        "said": judgement.said_yes,
    }


def question_record(question, verdict):
    """A question, and what was answered."""
    return {
        "task": "question",
        "photo": question.photo.name,
        "shows": question.concept,
        "question": question.text,
        "options": question.options,
        "right": question.answer,
        "answer": verdict.answer,
        "is_right": verdict.value,
    }


def leakage_record(entry, verdict):
    """A description, and whether it mentions state or place. The toy's oracle has no words."""
    return {
        "task": "leakage",
        "description_of": entry.name,
        "description": entry.text,
        "answer": verdict.answer,
        "leaks": verdict.value,
    }


def rounded(entries, beliefs):
    """{name of an entry: belief to four digits}"""
    names = [entry.name for entry in entries]
    return {name: round(belief, 4) for name, belief in zip(names, beliefs, strict=True)}


def beside(out, name):
    """A file beside the table: t.json, "answers.jsonl" -> t-answers.jsonl."""
    file = pathlib.Path(out)
    return file.with_name(f"{file.stem}-{name}")


def row_prefix(name):
    """How each line of a row begins in the file of answers."""
    return json.dumps({"row": name})[:-1] + ","


def save_answers(file, name, records, others):
    """Write a row's records as lines of JSON. Lines of the rows `others` stay."""
    prefixes = tuple(row_prefix(other) for other in others if other != name)
    lines = []
    if file.exists():
        old = file.read_text(encoding="utf-8", errors="replace").split("\n")
        lines = [line for line in old if line.startswith(prefixes)]
    lines += [json.dumps({"row": name} | record) for record in records]
    write_text(file, "".join(line + "\n" for line in lines))


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
# The assistant can say "none of your things": how well that would do here.
STRANGERS = {"own_found": "own found", "strangers_refused": "strangers refused"}

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
    records: list[dict] = field(default_factory=list)  # what was said in --grounding


def reader_of(name, options):
    """Who reads what a speaker has described: "base", or "adapter", the speaker's own."""
    if name == "base":
        return "base"
    own = run.run_record(name).get("method") in ("repic", "sft")
    return options.reader or ("adapter" if own else "base")


def speaker_row(mllm, embedder, name, benchmark, options, progress):
    """Describe, and with --grounding caption, with an adapter on.   -> Row"""
    adapt(mllm, name)
    row = Row(name, describe_references(mllm, name, benchmark, options, progress))
    row.reader = reader_of(name, options)
    info = {entry.name: entry.text for entry in row.entries}
    zero_shot = not taught_names(name)
    for part_name, part in benchmark.parts.items():
        if not options.grounding or not part.tested:
            continue
        with progress.part(name, f"names, {PARTS[part_name]}"):
            figures, records = grounding(
                mllm, embedder, part, benchmark.splits, info, zero_shot, options
            )
        row.grounding[part_name] = figures
        row.records += [{"part": part_name, "task": "names"} | record for record in records]
    remove_lora(mllm.model)
    return row


def describe_references(mllm, name, benchmark, options, progress):
    """The descriptions of all concepts, by the model as it is now.   -> [Entry]"""
    concepts = []
    for concept in benchmark.concepts:
        references = benchmark.splits[concept.name].references
        concepts.append(dataclasses.replace(concept, photos=references))
    with progress.part(name, "describing"):
        return describe(mllm, concepts, options.max_tokens)


def refined_row(mllm, of_base, benchmark, options, progress):
    """What base has described, rewritten without state and place.   -> Row

    of_base [Entry]: None where base's row was done before; then it describes again, in the same
    words.
    """
    if of_base is None:
        of_base = describe_references(mllm, "refined", benchmark, options, progress)
    with progress.part("refined", "rewriting"):
        return Row("refined", refine(mllm, of_base, options.max_tokens))


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


def reader_figures(mllm, embedder, row, benchmark, options, progress):
    """Put all tests to one row's descriptions, and keep what was said in `row.records`.

    -> {part: figures, None without tests}
    """
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
        with progress.part(row.name, PARTS[part_name]):
            examined = examine(
                mllm, embedder, entries, part.tests, questions, benchmark.pairs, options
            )
        row.records += [{"part": part_name} | record for record in examined.records]
        figures[part_name] = examined.figures
        figures[part_name] |= row.grounding.get(part_name, {}) | {"reader": row.reader}
    remove_lora(mllm.model)
    return figures


def save_row(kept, row, speaker, figures, root):
    """Keep a row in the table, and beside it what was described and what was said."""
    if kept.out:
        slug = re.sub(r"[^\w-]+", "-", row.name).strip("-")
        content = database(row.entries, root or "")
        write_json(beside(kept.out, f"{slug}-database.json"), content)
        save_answers(beside(kept.out, "answers.jsonl"), row.name, row.records, kept.rows)
    kept.add(row.name, speaker, figures)


def settings_of(options):
    """What all rows of a table are measured with.   -> {option: value}

    Its photos count by their pixels, wherever they lie.
    """
    names = [option.name for option in dataclasses.fields(Options)]
    elsewhere = ("adapter", "database", "data", "out")
    return {name: getattr(options, name) for name in names if name not in elsewhere}


def row_names(models, databases):
    """The rows of a table in their order: refined comes after base."""
    names = []
    for name in models:
        names.append(name)
        if name == "base":
            names.append("refined")
    return names + databases


def plan_rows(names, mllm, embedder, benchmark, options):
    """How much there is to do.   -> {(row, part): work, in beliefs}"""
    photos = sum(len(benchmark.splits[each.name].references) for each in benchmark.concepts)
    plan = {}
    for name in names:
        is_speaker = name != "refined" and name not in options.database
        if is_speaker:
            plan[name, "describing"] = photos * ANSWER
        if name == "refined":
            plan[name, "rewriting"] = len(benchmark.concepts) * ANSWER
        for part_name, part in benchmark.parts.items():
            if is_speaker and options.grounding and part.tested:
                plan[name, f"names, {PARTS[part_name]}"] = grounding_work(part) * ANSWER
            if part.tests:
                answers, beliefs = part_work(mllm, embedder, part, benchmark, options)
                plan[name, PARTS[part_name]] = answers * ANSWER + beliefs * BELIEF
    return plan


def part_work(mllm, embedder, part, benchmark, options):
    """How much one part of a row is.   -> (answers, beliefs)"""
    tests = len(part.tests)
    to_compare = 0
    for lookup in look_up_together(part.known, part.tests, protocol_of(options).by_category):
        to_compare += len(lookup.tests) * len(lookup.entries)
    pairs = to_compare
    if benchmark.pairs:
        pairs = len(pairs_about(benchmark.pairs, part.known, part.tests))
    if benchmark.root is None:
        questions = tests * len(toy.VIEW)
    else:
        photos = {test.photo for test in part.tests}
        questions = sum(question.photo in photos for question in benchmark.questions)
    answers = tests + pairs + questions
    if benchmark.root and knows(mllm, LEAKAGE):
        answers += len(part.known)

    beliefs = tests * 2 * options.k
    if embedder is mllm:
        beliefs += to_compare
    return answers, beliefs


def table(mllm, embedder, options, models, replace=False):
    """A row for each of `models`, adapters or "base", and for each database; after base: refined.

    Rows that --out has already are taken from there. embedder: the MLLM, or a Clip; replace: a
    table of another command in --out is replaced, else it raises DataError
    -> the content of --out, whose "rows" are {name: {part: figures}}
    """
    kept = KeptTable(options.out, settings_of(options), replace)
    check_model(mllm, models, options)
    if options.protocol:
        show_protocol(options)
    skipped = beside(options.out, "skipped.txt") if options.out else None
    benchmark = load_benchmark(mllm, options, skipped)
    for adapter in options.adapter:
        warn_of_other_split(adapter, benchmark)
    databases = load_databases(mllm, benchmark, options)
    say_what_is_tested(mllm, benchmark)
    kept.measure_with(benchmark.content(), {"device": run.machine(mllm.device)})

    names = row_names(models, options.database)
    speakers = {}
    missing = []
    for name in names:
        path = "" if name in ("base", "refined") else name
        speakers[name] = speaker_of(mllm, options.model, path)
        if kept.has(name, speakers[name]):
            print(f"{name}: done before, in {options.out}")
        else:
            missing.append(name)

    of_base = None
    plan = plan_rows(missing, mllm, embedder, benchmark, options)
    with Progress(mllm, plan) as progress:
        for name in missing:
            progress.say(f"evaluating {name}")
            if name in databases:
                row = databases[name]
            elif name == "refined":
                row = refined_row(mllm, of_base, benchmark, options, progress)
            else:
                row = speaker_row(mllm, embedder, name, benchmark, options, progress)
            if name == "base":
                of_base = row.entries
            figures = reader_figures(mllm, embedder, row, benchmark, options, progress)
            save_row(kept, row, speakers[name], figures, benchmark.root)
    return kept.content(names)


# ------------------------------------------------------------------- what is checked, what is said
def check_files(options):
    """What can be checked before a model is loaded. Raises DataError."""
    if options.out:
        run.output_file(options.out)
        run.output_file(beside(options.out, "answers.jsonl"))
    check_adapters(options.adapter)
    check_given_once("--database", options.database)
    trained = options.train_concepts
    if trained and not trained.isdecimal() and not pathlib.Path(trained).is_file():
        raise DataError(f"--train-concepts wants a number or a file, and {trained} is not there")
    root = find_folder(options.data) if options.data else None
    for file in options.database:
        if root:
            read_database(file, (), root)
        else:
            run.load_json(file)


def check_model(mllm, models, options):
    """What can be checked before a photo is read. Raises DataError for an adapter that does not
    fit, and for words that the model does not know."""
    for name in models:
        adapt(mllm, name)
        remove_lora(mllm.model)
    mllm.check_words(each.replace("{text}", "") for each in (RECOGNITION, CAPTIONING, VQA))
    if options.data:
        mllm.check_words(tag(name) for name in thing_names(find_folder(options.data)))


def load_databases(mllm, benchmark, options):
    """What was described elsewhere, and with that the tests: its photos are none.

    Raises DataError where something does not fit.   -> {file: Row}
    """
    mllm.check_words(tag(concept.name) for concept in benchmark.concepts)
    rows = {}
    used = []
    for file in options.database:
        rows[file] = database_row(file, benchmark.concepts, benchmark.root)
        used += photos_of(rows[file].entries)
    choose_tests(benchmark, used)

    tested = [part for part in benchmark.parts.values() if part.tests]
    if not tested:
        raise DataError(
            "no photo is left to test: give things of two photos or more, of which the databases "
            "have not described all"
        )
    most = max(len(part.known) for part in tested)
    if options.k > max(most, K):
        raise DataError(f"--k {options.k} is more than the {most} things that there are")
    return rows


def say_what_is_tested(mllm, benchmark):
    """Print how many things and photos are tested, and which column there cannot be."""
    for name, part in benchmark.parts.items():
        if part.known:
            print(
                f"{PARTS[name]}: {len(part.tested)} of {len(part.known)} things are tested, by "
                f"{len(part.tests)} photos"
            )
    if benchmark.root and not knows(mllm, LEAKAGE):
        print("no column `leakage`: the toy model does not know that prompt, and so is no judge")


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
        yield f"{title}: {TITLE.format(**counts)}", lines_of(COLUMNS | STRANGERS, of_part)
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
    if options.grounding and options.data and toy.is_toy(options.model):
        raise DataError(
            "--grounding of --data wants a real --model: the toy model knows its prompts in the "
            "toy world only"
        )
    return options


def read_settings(argv=None):
    """The command line.   -> Options. Raises DataError for what cannot be had together."""
    given = run.read_options(Options, __doc__, argv)
    which = [name for name in ("all", "train_concepts") if given.get(name)]
    if len(which) == 2:
        raise DataError("--all tests every concept, --train-concepts all others: give one of them")
    if given.get("reader") and not given.get("adapter"):
        raise DataError("--reader is about the rows of adapters: give --adapter runs/NAME/adapter")
    if given.get("protocol") and not which:
        raise DataError(
            "--protocol wants --all or, of concepts that a run was trained on, --train-concepts as "
            "the run had it"
        )
    return fill_in(Options, {}, given)


def main(argv=None):
    options = read_settings(argv)
    check_files(options)
    if options.out:
        KeptTable(options.out, settings_of(options))  # one of other settings is noticed now
    mllm = MLLM(options.model, options.max_pixels)
    embedder = Clip(options.embedder, mllm.device) if options.embedder else mllm
    try:
        result = table(mllm, embedder, options, ["base", *options.adapter])
    except KeyboardInterrupt:
        if options.out:
            print(f"\nthe same command goes on: the rows that are done are in {options.out}")
        raise
    show(result["rows"])


if __name__ == "__main__":
    run.main(main)
