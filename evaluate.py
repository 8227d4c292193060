"""evaluate.py: describe, remember, retrieve, then recognise, caption and answer: what the descriptions are worth to a personal assistant.

    describe   each concept's reference photos are described by the speaker (the model with an adapter, or "base": without)
    remember   the descriptions become a database in RAP's JSON: all that the assistant will know of these things
    retrieve   for a new photo, the k concepts whose reference photos and descriptions are most like it
    then three tasks, all by the model *without* adapter, reading nothing but the new photo and the database:
    recognise  photo + one description -> is it that very thing? For every test photo and every concept.
    caption    photo + the k lettered descriptions -> the right letter, and a caption that calls the thing by its name
    answer     photo + the right description + a question with two options -> the right option

and with --grounding, as RePIC is measured, by the model *with* its adapter, from pictures instead of descriptions:
    ground     reference photos with names + a photo of one of these things, or a scene of two or four -> do captions use the names? With
               the right references, with those that are most like the things in the picture, and with wrong ones (fewer is better)

    python evaluate.py --adapter runs/x/adapter                                        # the toy world: one row for base, one for the run
    python evaluate.py --model Qwen/Qwen2-VL-2B-Instruct --data perva-data/ --all      # any folder of photos (data.py lists the layouts)
    python evaluate.py --model ... --photos my_things/ --query photo.jpg               # ask about one picture
    python evaluate.py --report runs/x                                                 # a finished run and its table as one page, report.html

The result is a Markdown table on the screen and, with --out, JSON on disk. "seen" are test photos of held-out concepts, whose categories
rrg.py was trained on, looked up in a database of all concepts of these categories; "unseen" the same for the categories it never met. Columns:

    caption F1     of the letter that was chosen, with its precision and recall: the mean over things
    name F1        does the caption call the thing by its name
    recognition    the mean of positive (this is it) and negative (this is another one); inside, across: with negatives of its own category
                   only, of other categories only
    VQA, leakage   right answers; descriptions that mention state or place. words: how long a description is
    ceiling        is the right thing among the k retrieved: captions cannot be better. unparsed: answers that cannot be read

Where it departs from the paper and its authors' research code:
1. The model's own features are the default in retrieval: photos by the frozen tower, texts by the listener's belief; --embedder takes a CLIP.
2. Candidates are lettered in random order. (By rank, "A" would be a good guess.)
3. Answers are parsed strictly, and what cannot be read is wrong *and* counted as unparsed; it is never guessed.
4. Recognition and questions show the query photo only, as the paper's prompt says. (The research code shows a reference photo as well.)
5. Where the truth is not known, the leakage judge is the model itself (the research code: another language model).
6. RePIC finds the things of a scene by a detector. Here scenes are collages (data.py), so each thing's own photo is put to retrieval.

Shapes: P photos, C concepts in the database, k retrieved candidates, D width of the vectors that are compared.
"""
import argparse
import base64
import csv
import html
import io
import itertools
import json
import pathlib
import random
import re
import shlex
import sys
from collections import Counter
from dataclasses import replace
from functools import partial

import torch

import data
import grpo
import reward
import rrg
import toy
from data import tag

REFERENCES = list(itertools.product((1, 2, 4), ("right", "retrieved", "wrong")))  # of --grounding: things in the picture, how references are chosen
SCENES = 60  # pictures of one thing, as many of two and of four; each is captioned with right, with retrieved and with wrong references
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LEAKAGE = ("This is how somebody described a thing of theirs: ",
           "\nDoes it mention a passing state of the thing, such as what it is doing, how it is placed, or that it is open, worn or folded? Does it "
           "mention a location, such as the background or what stands around? Judge strictly by its words. Answer only with JSON in this form:\n"
           '{"State": "Yes or No", "Location": "Yes or No"}')


# ------------------------------------------------------------------------------------------------------------- pure functions
def read_answer(text, **fields):
    """An answer's JSON object -> {field: text}, or None unless the answer is that object and nothing else (a ``` fence is allowed).

    `fields`: the names that must be there, each with the values it may have (in any case), or None for any text.
    """
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(\{.*\})\s*```\s*", text, re.DOTALL)
    try:
        # Pairs and not a dictionary, which would hide that a field is there twice. An object becomes a tuple, so a list can be told from it.
        pairs = json.loads(fenced[1] if fenced else text, object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        return None
    if not isinstance(pairs, tuple) or len(dict(pairs)) < len(pairs):
        return None
    row = {name: value.strip() for name, value in pairs if isinstance(value, str)}
    for name, allowed in fields.items():
        spelled = {value.lower(): value for value in allowed or [row.get(name, "")]}
        row[name] = spelled.get(row.get(name, "").lower())
    return row if all(row[name] for name in fields) else None


def retrieve(image, text, k):
    """Similarities [P, C] of photos to the concepts' reference photos and descriptions -> (the k best concepts [P, k], best first; scores
    [P, C]). The two live on different scales, so each is rescaled to 0 to 1 over the concepts, then they are averaged. Of equals the first
    in the database wins."""
    scale = lambda x: (x - x.amin(1, keepdim=True)) / (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)).clamp(min=1e-12)
    scores = (scale(image) + scale(text)) / 2  # [P, C]
    return scores.argsort(dim=1, descending=True, stable=True)[:, :k], scores


def recognition_scores(rows):
    """rows (does the photo show it: bool, answered yes: bool or None if unparsed, of the same category: bool) -> accuracies.

    weighted = (positive + negative) / 2, so that the many negatives do not drown the positives; inside and across keep the negatives
    of the photo's own category, and of the others. What is unparsed is wrong on either side. None where there is nothing to count.
    """
    positive = rrg.mean([said is True for same, said, _ in rows if same])
    negative = lambda which: rrg.mean([said is False for same, said, kin in rows if not same and kin in which])  # which: of the category, or not
    mean = lambda other: None if positive is None or other is None else (positive + other) / 2
    return {"recognition_positive": positive, "recognition_negative": negative((True, False)), "recognition_weighted": mean(negative((True, False))),
            "recognition_inside": mean(negative((True,))), "recognition_across": mean(negative((False,)))}


def captioning_scores(rows, tested=None):
    """rows (right name, chosen name or None if unparsed) -> precision, recall, F1, each the mean over concepts. 0 / 0 is 0.

    As the RRG authors count: a concept that is only ever chosen wrongly is a class too, and of precision 0. Their databases hold tested
    concepts only. Where there are others to be chosen, `tested` says which names are classes; to choose another one is still wrong.
    """
    hits = Counter(right for right, chosen in rows if right == chosen)
    actual, picked = Counter(right for right, _ in rows), Counter(name for _, name in rows if name is not None)
    names = actual.keys() | picked.keys()
    names = sorted(names & tested if tested else names)  # in order: sums of floats depend on it
    return {"captioning_precision": rrg.mean([hits[name] / max(1, picked[name]) for name in names]),
            "captioning_recall": rrg.mean([hits[name] / max(1, actual[name]) for name in names]),
            "captioning_f1": rrg.mean([2 * hits[name] / (actual[name] + picked[name]) for name in names])}  # of precision and recall


def name_grounding(rows, case_sensitive=False):
    """Do captions call things by their names? rows (names that belong there, caption) -> {"precision", "recall", "f1"}.

    The rule of RAP and RePIC. A caption's words are split at white space and stripped of .,!?;:()[]{}"'- at both ends; a name is there if
    a word equals it, bare or as <name>. If <bo> belongs in a caption, one that says <bo> is a hit, one that does not, but says a name of
    these rows that does not belong there, is a miss, and one without any name is neither: it only lowers the recall.
        precision = hits / (hits + misses)        recall = hits / names that belong
    RePIC's tables of two concepts are case-sensitive, those of one and four are not.
    """
    case = str if case_sensitive else str.lower
    rows = [([case(name).removeprefix("<").removesuffix(">") for name in names], case(caption)) for names, caption in rows]
    pool, hits, misses = {name for names, _ in rows for name in names}, 0, 0
    for names, caption in rows:
        words = {word.strip(".,!?;:()[]{}\"'-") for word in caption.replace("</s>", "").split()}
        there = {name for name in pool if words & {name, f"<{name}>"}}
        right = sum(name in there for name in names)
        hits += right
        misses += len(names) - right if there - set(names) else 0
    slots = sum(len(names) for names, _ in rows)
    precision, recall = hits / max(1, hits + misses), hits / max(1, slots)
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / max(1e-12, precision + recall)}


# --------------------------------------------------------------------------------------------------------- describe, remember
def describe(mllm, concepts, max_tokens):
    """-> [Entry] of the concepts, whose photos are all described by the speaker, which is the model as it is now, greedy.

    A malformed description is remembered, too, only without its tags: an assistant has to live with what was said.
    """
    photos = [photo for concept in concepts for photo in concept.photos]
    said = dict(zip(photos, mllm.tell([([photo], reward.SPEAK) for photo in photos], max_tokens, "describing")))
    plain = lambda text: description.text if (description := reward.parse(text)) else " ".join(re.sub(r"</?\w+>", " ", text).split())
    return [data.Entry(concept.name, concept.category, concept.photos, " ".join(plain(said[photo]) for photo in concept.photos),
                       malformed=not all(reward.parse(said[photo]) for photo in concept.photos)) for concept in concepts]


def leakage(mllm, entries, max_tokens):
    """-> (share of descriptions that mention state or location, None if no verdict can be read; verdicts that cannot be read).

    Exact in the toy world. Elsewhere the model without adapter is the judge, and judges the words alone, without a picture.
    """
    if all(photo.truth for entry in entries for photo in entry.photos):
        return rrg.mean([toy.leaks(entry.text) for entry in entries]), 0
    answers = mllm.tell([([], LEAKAGE[0] + mllm.quote(entry.text) + LEAKAGE[1]) for entry in entries], max_tokens, "judging leakage")
    verdicts = [read_answer(answer, State=("Yes", "No"), Location=("Yes", "No")) for answer in answers]
    return rrg.mean(["Yes" in (row["State"], row["Location"]) for row in verdicts if row]), verdicts.count(None)


# -------------------------------------------------------------------------------------------------------------- the three tasks
def similarity(embedder, photos, entries):
    """-> image and text similarity [P, C] of photos and entries. Several reference photos count by the mean of their vectors."""
    if bare := [entry.name for entry in entries if not entry.photos]:
        raise data.DataError(f"the database has no picture of {bare[0]}, so photos cannot be compared with it")
    vectors = embedder.embed([*photos, *(photo for entry in entries for photo in entry.photos)])
    memory = torch.stack([torch.stack([vectors[photo.name] for photo in entry.photos]).mean(0) for entry in entries])  # [C, D]
    return torch.stack([vectors[photo.name] for photo in photos]) @ memory.T, embedder.compare(photos, [entry.text for entry in entries])


def caption(mllm, photos, candidates, max_tokens, seed):
    """candidates: a list of entries for each photo -> [(the entries in the order of their letters, the answer as read or None, its text), ...]."""
    orders = [random.Random(f"letters {seed} {photo.name}").sample(some, len(some)) for photo, some in zip(photos, candidates)]
    lines = ["\n".join(f"{letter}. {mllm.quote(entry.text)} is {tag(entry.name)}" for letter, entry in zip(LETTERS, order)) for order in orders]
    texts = mllm.reply(reward.CAPTIONING, list(zip(photos, lines)), max_tokens, "captioning")
    return [(order, read_answer(text, Answer=LETTERS[:len(order)], Caption=None), text) for order, text in zip(orders, texts)]


def recognise(mllm, pairs, max_tokens):
    """pairs [(photo, entry)] -> [whether the photo shows the thing, None where the answer cannot be read]."""
    texts = mllm.reply(reward.RECOGNITION, [(photo, mllm.quote(entry.text)) for photo, entry in pairs], max_tokens, "recognition")
    rows = [read_answer(text, Answer=("Yes", "No")) for text in texts]
    return [row and row["Answer"] == "Yes" for row in rows]  # None stays None


def answer(mllm, questions, known, max_tokens):
    """questions [data.Question], known {name: entry} -> [whether the answer is right, None where it cannot be read]."""
    asked = [(q.photo, "\n".join([f"{tag(q.concept)}: {mllm.quote(known[q.concept].text)}", q.text.format(tag(q.concept)),
                                  *(f"{letter}. {option}" for letter, option in q.options.items())])) for q in questions]
    rows = [read_answer(text, Answer=tuple(q.options)) for q, text in zip(questions, mllm.reply(reward.VQA, asked, max_tokens, "answering"))]
    return [row and row["Answer"] == q.answer for q, row in zip(questions, rows)]


def grounding(mllm, embedder, known, tested, split, options):
    """Does the model as it is now call things by their names in captions, given reference photos? -> {names_N_HOW_precision, ..._recall,
    ..._f1} for N things in the picture and right, retrieved or wrong references; None where there are too few concepts.

    `known` and `tested` are concepts, `split` {concept name: (reference photos, test photos)}. A wrong reference shows a thing that is
    not in the picture; its name counts, and should not be there. (RePIC, tables 1 to 3)
    """
    figures, reference = {}, {concept.name: split[concept.name][0][0] for concept in known}  # the first reference photo of each
    vectors = embedder.embed([*reference.values(), *(photo for concept in tested for photo in split[concept.name][1])])
    memory = torch.stack([vectors[photo.name] for photo in reference.values()])  # [C, D]
    for many, how in REFERENCES:
        prompts, expected, enough = [], [], len(tested) >= many and len(known) >= 2 * many
        for number in range(SCENES if enough else 0):
            rng = random.Random(f"scene {options.seed} {many} {number}")
            names = [concept.name for concept in rng.sample(tested, many)]
            photos, others = [rng.choice(split[name][1]) for name in names], rng.sample([name for name in reference if name not in names], many)
            nearest = dict.fromkeys(list(reference)[(memory @ vectors[photo.name]).argmax()] for photo in photos)  # two may have the same one
            given = {"right": names, "retrieved": nearest, "wrong": others}[how]
            picture = photos[0] if many == 1 else data.collage(photos, rrg.side(mllm), number)[0]
            before, after = reward.REPIC["ict"][number % 3]  # the three wordings in turn
            prompts.append(([*(reference[name] for name in given), picture], before + ", ".join(map(tag, given)) + after))
            expected.append([tag(name) for name in (others if how == "wrong" else names)])
        captions = mllm.tell(prompts, options.max_tokens, "calling by name")
        for key, value in name_grounding(zip(expected, captions), case_sensitive=many == 2).items():
            figures[f"names_{many}_{how}_{key}"] = value if enough else None
    return figures


def examine(mllm, embedder, entries, tests, questions, pairs, options):
    """All figures of one part of the table: `tests` [(photo, concept name)] put to the database `entries`. Fractions, None where unknown.

    `questions` [data.Question] and `pairs` {(photo, concept name): is it} are the benchmark's own, of which those count that are about the
    tests, or questions of the toy world and nothing: then each photo is put to each entry.
    """
    known, shown, (photos, names) = {entry.name: entry for entry in entries}, dict(tests), zip(*tests)
    best, _ = retrieve(*similarity(embedder, photos, entries), options.k)  # [P, k]
    candidates = [[entries[i] for i in row] for row in best.tolist()]
    if options.skip_retrieval:  # the right one instead of the last
        candidates = [some if known[name] in some else [*some[:-1], known[name]] for name, some in zip(names, candidates)]
    captions = caption(mllm, photos, candidates, options.max_tokens, options.seed)
    chosen = [row and order[LETTERS.index(row["Answer"])].name for order, row, _ in captions]
    called = name_grounding([([tag(name)], row["Caption"] if row else "") for name, (_, row, _) in zip(names, captions)])
    pairs = pairs or {(photo, entry.name): entry.name == name for photo, name in tests for entry in entries}
    pairs = {(photo, name): same for (photo, name), same in pairs.items() if photo in shown and name in known}
    said = recognise(mllm, [(photo, known[name]) for photo, name in pairs], options.max_tokens)
    kin = [known[name].category == known[shown[photo]].category for photo, name in pairs]
    right = answer(mllm, [q for q in questions if q.concept in names], known, options.max_tokens)
    leaked, unjudged = leakage(mllm, entries, options.max_tokens)
    return {
        **captioning_scores(list(zip(names, chosen)), set(names)),
        **{f"name_{key}": value for key, value in called.items()},
        **recognition_scores(list(zip(pairs.values(), said, kin))),
        "vqa": rrg.mean([hit is True for hit in right]), "leakage": leaked, "words": rrg.mean([len(entry.text.split()) for entry in entries]),
        "retrieval_ceiling": rrg.mean([known[name] in some for name, some in zip(names, candidates)]),
        "unparsed": rrg.mean([hit is None for hit in [*chosen, *said, *right]]),
        "counts": {"concepts": len(set(names)), "database": len(entries), "photos": len(photos), "pairs": len(pairs), "questions": len(right),
                   "unparsed_captions": chosen.count(None), "unparsed_recognition": said.count(None), "unparsed_vqa": right.count(None),
                   "unparsed_leakage": unjudged, "malformed_descriptions": sum(entry.malformed for entry in entries)},
    }


# ------------------------------------------------------------------------------------------------------------------- the table
COLUMNS = {"captioning_f1": "caption F1", "captioning_precision": "precision", "captioning_recall": "recall", "name_f1": "name F1",
           "recognition_weighted": "recognition", "recognition_positive": "positive", "recognition_negative": "negative",
           "recognition_inside": "inside", "recognition_across": "across", "vqa": "VQA", "leakage": "leakage", "words": "words",
           "retrieval_ceiling": "ceiling", "unparsed": "unparsed"}
GROUNDING = {f"names_{many}_{how}_f1": f"{many} {'name' if many == 1 else 'names'}, {how}" for many, how in REFERENCES}


def tables(rows):
    """What a table looks like to people: yields (title, [the lines' cells, the heading first]), for seen and for unseen categories."""
    cell = lambda key, value: "-" if value is None else f"{value:.1f}" if key == "words" else f"{value:.1%}"
    lines = lambda columns, some: [["", *columns.values()], *([name, *(cell(key, row.get(key)) for key in columns)] for name, row in some.items())]
    for part in ("seen", "unseen"):
        if some := {name: row[part] for name, row in rows.items() if row[part]}:
            counts = next(iter(some.values()))["counts"]
            told = "{photos} test photos of {concepts} concepts, {database} in the database, {pairs} pairs to recognise, {questions} questions"
            yield f"{part} categories: {told.format(**counts)}", lines(COLUMNS, some)
            if any(GROUNDING.keys() & row.keys() for row in some.values()):
                yield "names in captions (F1), by how many things there are and which references are given", lines(GROUNDING, some)


def show(rows):
    """Print the rows as Markdown."""
    for title, (heading, *lines) in tables(rows):
        print(f"\n{title}\n\n| {' | '.join(heading)} |\n{'|---' * len(heading)}|")
        print("\n".join(f"| {' | '.join(line)} |" for line in lines))


def recall(file, concepts, photos):
    """A database made elsewhere -> the [Entry] of each of `concepts`. Raises DataError where it does not describe one."""
    entries = {entry.name: entry for entry in data.read_database(file, photos)}
    if missing := [concept.name for concept in concepts if concept.name not in entries]:
        raise data.DataError(f"{file} describes {len(entries)} concepts, but not {len(missing)} of the {len(concepts)} here, such as {missing[0]}")
    return [entries[concept.name] for concept in concepts]


def table(mllm, embedder, options, models):
    """One row for each of `models`, adapters or "base", and one for each database -> the content of --out."""
    root = data.fetch(options.data) if options.data else ""
    concepts, (train, test, unseen) = rrg.load_world(mllm, root, options.seed)
    for adapter in options.adapter:
        warn_of_other_split(adapter, options)
    seen = train + test
    held = {"seen": (seen, seen if options.all else test), "unseen": (unseen, unseen)}  # part: (concepts in the database, those tested)
    split = {concept.name: data.split_photos(concept, options.references, options.seed) for concept in concepts}
    asked, pairs = (data.load_questions(root, concepts), data.load_pairs(root, concepts)) if root else ([], {})
    photos = [photo for concept in concepts for photo in concept.photos]
    mllm.look(photos, progress=True)
    mllm.check(tag(concept.name) for concept in concepts)
    remembered, grounded = {file: recall(file, concepts, photos) for file in options.database}, {}  # {row: entries}, {(row, part): figures}
    # What a database was written from is no test, nor is a copy of it: RAP's databases keep pictures of their own.
    used = {data.fingerprint(photo.open()) for entries in remembered.values() for entry in entries for photo in entry.photos}
    tests = {part: [(photo, concept.name) for concept in tested for photo in split[concept.name][1]
                    if not used or data.fingerprint(photo.open()) not in used] for part, (_, tested) in held.items()}
    for name in models:  # all that is said with an adapter on comes first; what reads it, below, is the model without
        adapt(mllm, name)
        remembered[name] = describe(mllm, [replace(concept, photos=split[concept.name][0]) for concept in concepts], options.max_tokens)
        grounded |= {(name, part): grounding(mllm, embedder, *some, split, options) for part, some in held.items() if some[1] and options.grounding}
        grpo.remove_lora(mllm.model)
    result = {"seed": options.seed, "command": shlex.join(["python", *sys.argv]), "device": rrg.machine(mllm.device), "rows": {}}
    for name in [*models, *options.database]:
        result["rows"][name] = row = {"seen": None, "unseen": None}
        print(f"evaluating {name}")
        for part, (known, _) in held.items():
            if tests[part]:
                entries = [entry for entry in remembered[name] if entry.name in {concept.name for concept in known}]
                questions = asked if root else toy.questions(tests[part], options.seed)
                row[part] = examine(mllm, embedder, entries, tests[part], questions, pairs, options) | grounded.get((name, part), {})
        if options.out:
            grpo.write_json(options.out, result)  # and the descriptions beside it:
            file, slug = pathlib.Path(options.out), re.sub(r"[^\w-]+", "-", name).strip("-")
            grpo.write_json(file.with_name(f"{file.stem}-{slug}-database.json"), data.database(remembered[name], root))
    return result


def adapt(mllm, adapter):
    """Put an adapter on; "base" is none."""
    if adapter != "base":
        with data.refusing("cannot put the adapter on", ValueError):
            grpo.load_adapter(mllm.model, adapter)


def warn_of_other_split(adapter, options):
    """Print a note if an adapter's run had other held-out concepts than this table."""
    record = pathlib.Path(adapter).parent / "config.json"
    run = data.load_json(record).get("settings") if record.is_file() else None
    if run and (run["seed"], pathlib.Path(run["data"])) != (options.seed, pathlib.Path(options.data)):
        print(f"note: {adapter} was trained with --seed {run['seed']} --data {run['data'] or '(the toy world)'}, so it may have met concepts "
              "that this table holds out")


# ------------------------------------------------------------------------------------------------------- ask about one picture
def ask(mllm, embedder, options):
    """Describe the things in --photos (or read them from --database), then say which of them the --query photo shows, and why."""
    query = data.Photo(f"query {options.query}", partial(data.read_photo, options.query))
    with data.refusing(f"cannot read the picture {options.query}", *data.UNREADABLE):
        query.open()
    if options.database:
        entries = data.read_database(options.database[0])
    else:
        adapt(mllm, *options.adapter or ["base"])
        things = [replace(concept, photos=concept.photos[:options.references]) for concept in data.load_concepts(options.photos, least=1)]
        entries = describe(mllm, things, options.max_tokens)
        grpo.remove_lora(mllm.model)
        if malformed := sum(entry.malformed for entry in entries):
            print(f"{malformed} descriptions are not in the form that was asked for")
    if options.out:
        grpo.write_json(options.out, data.database(entries, data.fetch(options.photos) if options.photos else ""))
    elif not options.database:
        print("(to ask again without describing your things again: add --out things.json now, then give --database things.json for --photos)")
    mllm.check(tag(entry.name) for entry in entries)
    image, text = similarity(embedder, [query], entries)
    best, scores = retrieve(image, text, options.k)
    [(order, row, said)] = caption(mllm, [query], [[entries[i] for i in best[0]]], options.max_tokens, options.seed)
    if row:
        print(f"\n{row['Caption']}\n\nbecause it chose {row['Answer']}" + (f": {row['Reasoning']}" if row.get("Reasoning") else ""))
    else:
        print(f"\nNo caption: the model's answer is not the JSON that was asked for, and is not guessed at. It said: {said!r}\n")
    print(f"the {len(order)} most similar of {len(entries)} things, by a score: half picture, half words, each rescaled to 0 to 1 over all things")
    for i in best[0].tolist():
        letter = LETTERS[order.index(entries[i])]
        print(f"  {'*' if row and row['Answer'] == letter else ' '}{letter}  {entries[i].name}  {scores[0, i]:.2f} "
              f"(as measured: picture {image[0, i]:.3f}, words {text[0, i]:.3f})  {entries[i].text}")


# ---------------------------------------------------------------------------------------------------------- a run as a page
CURVES = ("reward", "listener_accuracy", "kl", "leakage", *data.KINDS, "nll")  # of metrics.csv; those that the run has
HEAD = """<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><style>:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:64rem;margin:auto;padding:1rem;overflow-wrap:anywhere}
div{display:flex;flex-wrap:wrap;gap:1rem}figure{flex:1 1 10rem;max-width:15rem;margin:0}img,svg,meter{width:100%}svg{color:#2f7fc1}label{display:block}
section{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;overflow-wrap:normal}
th,td{padding:.3rem .6rem;border-bottom:1px solid;text-align:right}th:first-child{text-align:left;min-width:10rem;overflow-wrap:anywhere}
article{border-top:1px solid;padding:1rem 0}h2{margin-top:2.5rem}h3{font-size:1rem}pre{white-space:pre-wrap}</style>"""


class Html(str):
    """Text that is HTML already."""


def element(name, *inside, **attributes):
    """<name attribute="...">inside</name> as Html; text that is not Html is escaped. With nothing inside there is no end tag, as of <img>."""
    given = "".join(f' {key.replace("_", "-")}="{html.escape(str(value))}"' for key, value in attributes.items())
    content = "".join(part if isinstance(part, Html) else html.escape(part) for part in inside)
    return Html(f"<{name}{given}>{content}</{name}>" if inside else f"<{name}{given}>")


def chart(name, log):
    """A column of metrics.csv as SVG: its values faint, the mean of the last tenth of them bold."""
    steps, values = zip(*((int(row["step"]), float(row[name])) for row in log if row[name]))
    top, window = max(values), max(1, len(values) // 10)
    smooth = [rrg.mean(values[max(0, i - window):i]) for i in range(1, len(values) + 1)]
    line = lambda ys: " ".join(f"{300 * x / len(log):.1f},{100 - 90 * max(0, y) / (top or 1):.1f}" for x, y in zip(steps, ys))  # on 300 x 100
    told = f"{name.replace('_', ' ')}: {values[0]:.3g} at step {steps[0]}, {values[-1]:.3g} at step {steps[-1]}, at most {top:.3g}"
    drawn = Html(f'<svg viewBox="-2 0 304 104" fill="none" stroke="currentColor" role="img" aria-label="{told}"><path d="M0 0V100H300"/>'
                 f'<polyline points="{line(values)}" opacity=".4"/><polyline points="{line(smooth)}" stroke-width="3"/></svg>')
    return element("figure", drawn, element("figcaption", told, element("br"), element("small", rrg.METRICS[name])))


def grid(title, lines):
    """A table as HTML: [the lines' cells, the heading first]. One that is too wide scrolls on its own."""
    head, *body = lines
    rows = [element("tr", *(element("th", cell, scope="col") for cell in head))]
    rows += [element("tr", element("th", first, scope="row"), *(element("td", cell) for cell in rest)) for first, *rest in body]
    return element("section", element("h3", title), element("table", *rows), aria_label=title, tabindex=0)


def figure(photo, told, *more):
    """A photo within the page, what it is, and `more`."""
    image, file, told = photo.open(), io.BytesIO(), f"{photo.name}: {told}"
    image.thumbnail((320, 320))
    image.save(file, "JPEG", quality=90)
    pixels = base64.b64encode(file.getvalue()).decode()
    return element("figure", element("img", src=f"data:image/jpeg;base64,{pixels}", alt=told), element("figcaption", told), *more)


def example(rows, photos):
    """One held-out game or task, {"before": row, "after": row} of result.json. In games of the toy world words that leak are marked."""
    game, said = rows["before"], []
    truth_known = "pool" in game and photos[game["target"]].truth
    if "pool" in game:
        shown = [figure(photos[game["target"]], "target, what the speaker sees")]
        for i, name in enumerate(game["pool"]):
            beliefs = {when: row["rho"][i] for when, row in rows.items() if row["rho"]}
            bars = [element("label", f"{when}: {rho:.0%} yes", element("meter", "", value=rho)) for when, rho in beliefs.items()]
            shown.append(figure(photos[name], "hard positive: the same thing" if i == game["answer"] else "a look-alike", *bars))
    else:
        shown = [figure(photos[name], f"picture {i}") for i, name in enumerate(game["photos"], 1)]
        said.append(element("p", f"{game['question']} ({game['kind']}; right: {game['solution']})"))
    for when, row in rows.items():
        description = reward.parse(row["text"])
        words = re.split(r"\b", description.text if description else row["text"])
        title = when if description or "pool" not in game else f"{when} (not parsed)"
        said.append(element("p", element("b", title), " ", *(element("mark", word) if truth_known and toy.leaks(word) else word for word in words)))
    return element("article", element("div", *shown), *said)


def group(logged, std_floor):
    """A line of samples.jsonl, one game of a training step: its G answers, what they earned, and how much better than its siblings each is."""
    rewards = [row["reward"] for row in logged["samples"]]
    advantages = grpo.group_advantages(torch.tensor([rewards]), std_floor=std_floor)[0].tolist()
    lines = [[row["text"], f"{pay:.3f}", f"{A:+.2f}"] for row, pay, A in zip(logged["samples"], rewards, advantages)]
    return grid(f"step {logged['step']}: the answers about {logged.get('target') or logged['question']}", [["answer", "reward", "advantage"], *lines])


def album(mllm, folder, options):
    """{name: Photo} of what a finished run was examined with."""
    config = rrg.Config(**data.load_json(folder / "config.json")["settings"])
    photos = {photo.name: photo for game in rrg.set_up(config, mllm)[1] for photo in rrg.pictures(game)}
    if (options.data, options.seed) != (config.data, config.seed):
        mllm.features.clear()  # the table shows other photos, which may have the same names
    return photos


def page(folder, photos, rows):
    """A finished run, the `photos` of its held-out games and the `rows` of its table as one HTML page without anything from elsewhere."""
    record, result = data.load_json(folder / "config.json"), data.load_json(folder / "result.json")
    log = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    config, title = rrg.Config(**record["settings"]), folder.resolve().name
    parts = {
        "Results": [grid("held out", [("", "before", "after", "before, unseen categories", "after, unseen categories"), *rrg.held_out(result)]),
                    *(grid(*some) for some in tables(rows))],
        "Curves": [element("p", "Each step faint, the mean of the last tenth of the steps bold."),
                   element("div", *(chart(name, log) for name in CURVES if any(row.get(name) for row in log)))],
        "Games": [element("p", "Held out from training, answered greedily. Below a candidate: how far the listener believes that the words fit. "
                               "In games of the toy world marked words tell of place, pose or light, which the next photo will not share.")]}
    with data.refusing(f"{config.data or 'the toy world'} is not what it was when {folder} was trained; it lacks", KeyError):
        parts["Games"] += [example(dict(zip(result["examples"], pair)), photos) for pair in zip(*result["examples"].values())]
    if config.method != "sft":
        parts["Groups"] = [element("p", "What the advantages are made of: all answers of one game, at the first step and at the last."),
                           *(group(logged, config.std_floor) for logged in samples[:1] + samples[1:][-1:])]
    body = [inside for name, part in parts.items() for inside in (element("h2", name, id=name), *part)]
    links = [link for name in parts for link in (element("a", name, href=f"#{name}"), " ")]
    told = f"{config.method} · {result['steps']} steps in {result['seconds']:.0f} s on {result['device']}"
    return "<!doctype html>" + element("html", Html(HEAD), element("title", title), element("main", element("h1", title), element("p", told), element(
        "pre", record["command"]), element("nav", *links), *body), lang="en")


def options_of_run(folder):
    """A finished run's own options for its table. Raises DataError if the folder holds no such run."""
    if not (folder / "result.json").is_file():
        raise data.DataError(f"{folder} holds no finished run; to finish one: python rrg.py --out {folder} --resume")
    own = data.load_json(folder / "config.json")["settings"]
    return {"adapter": [str(folder / "adapter")], "out": str(folder / "table.json"),
            **{name: own[name] for name in ("model", "data", "seed", "embedder", "max_pixels")}}


def settings(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, several = partial(parser.add_argument, default=""), partial(parser.add_argument, action="append", default=[])
    number, switch = partial(parser.add_argument, type=int, metavar="INT"), partial(parser.add_argument, action="store_true")
    add("--model", default=str(toy.FOLDER), metavar="DIR", help="a folder or hub name such as Qwen/Qwen2-VL-2B-Instruct; default: the toy model")
    several("--adapter", metavar="DIR", help="a run's adapter/, or any PEFT LoRA: a row of the table; may be given several times")
    add("--data", metavar="DIR", help="folder of photos or hub dataset such as google/dreambooth; default: the toy world")
    several("--database", metavar="FILE", help="descriptions in RAP's JSON: a row of the table (several times), or with --query all that is known")
    add("--photos", metavar="DIR", help="with --query: your things, a photo or a folder of photos each, named as they are called")
    add("--query", metavar="FILE", help="ask about this one picture")
    number("--references", default=1, help="photos described of each concept (default 1; published: MyVLM 4, PerVA 5); one is left for the test")
    number("--k", default=3, help="descriptions retrieved for a photo (default 3)")
    switch("--skip-retrieval", help="the right concept is always among the k")
    add("--embedder", metavar="CLIP", help="CLIP that retrieves, such as openai/clip-vit-large-patch14-336; default: the model itself")
    switch("--grounding", help="also RePIC's measure: names in captions of pictures of one, two and four things, from reference photos")
    switch("--all", help="test every concept, also those that rrg.py trains on: for photos that no adapter here was trained on")
    number("--seed", default=0, help="seed of splits, references and letters: give the run's, if it was not 0 (default 0; published: MyVLM 0 to 4)")
    number("--max-tokens", default=128, help="longest description or answer, in tokens (default 128)")
    number("--max-pixels", help=f"photos are shrunk to this many pixels at most (default {rrg.Config.max_pixels}; toy model {rrg.TOY['max_pixels']})")
    add("--out", metavar="FILE", help="write the table here as JSON and each row's database beside it; with --query: the database")
    add("--report", nargs="?", type=pathlib.Path, const=pathlib.Path(rrg.newest_run()), default=None, metavar="RUN",
        help="a finished run (default: the newest in runs/): its table, curves, games and descriptions as one page, RUN/report.html "
             "(model, data and seed are the run's, the table goes to RUN/table.json too)")
    options = parser.parse_args(argv)
    if options.report:
        parser.set_defaults(**options_of_run(options.report))
        options = parser.parse_args(argv)
    if options.report and options.query:
        parser.error("--report is about a run, --query about one picture: give one of them")
    if options.photos and not options.query or options.query and not (options.photos or options.database):
        parser.error("--query and --photos go together (or --query and --database)")
    if options.query and len(options.adapter) + len(options.database) > 1:
        parser.error("with --query give one --adapter or one --database at most")
    if options.references < 1 or not 2 <= options.k <= len(LETTERS) or options.max_tokens < 1:
        parser.error("--references and --max-tokens must be at least 1, --k from 2 to 26")
    options.max_pixels = options.max_pixels or (rrg.TOY["max_pixels"] if toy.is_toy(options.model) else rrg.Config.max_pixels)
    return options


def main(options):
    mllm = rrg.MLLM(options.model, options.max_pixels)
    embedder = data.Clip(options.embedder, mllm.device) if options.embedder else mllm
    if options.query:
        return ask(mllm, embedder, options)
    photos = album(mllm, options.report, options) if options.report else {}  # first: if the run's data have moved, it is noticed before the work
    rows = table(mllm, embedder, options, ["base", *options.adapter])["rows"]
    show(rows)
    if options.report:
        content, file = page(options.report, photos, rows), options.report / "report.html"
        grpo.write_atomically(file, lambda path: path.write_text(content, encoding="utf-8"))
        print(f"\nwrote {file}, which any browser opens")


if __name__ == "__main__":
    try:
        main(settings())
    except data.DataError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped")
