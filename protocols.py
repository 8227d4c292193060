"""protocols.py: what is measured with on each benchmark: which concepts and photos are described,
which are tested, and which questions and pairs come with them.

`evaluate.py --protocol NAME` does as the RRG authors' research code does on that benchmark.
PROTOCOLS is the table of it, each row with its source:

    python evaluate.py --protocol perva --train-concepts 30 --data perva-data/ --model ...
    python evaluate.py --protocol yollava --all --data yollava-data/ --model ...

Next to the photos are read, where they are: Yo'LLaVA's questions (yollava-visual-qa.json) and
RAP's list of recognition pairs (recognition_test.json).

Where it departs from the papers and their research code:
1. All draws have generators of their own (random.Random of a text with the seed), so that the same
   seed gives the same photos on every machine, but not those that the authors drew.
2. A concept of two photos or more has a test: of 5 photos 4 are kept from the tests, not all.
3. Without --protocol all kept photos are described and there is one database. Without --all and
   --train-concepts a concept of a seen category is looked up among those that were trained on, too.
4. DreamBooth has no published split: here one photo is described and all others are tests. (RePIC
   tests all photos, and describes one of its own for each thing: naming.py.)
"""

import pathlib
import random
import re
from collections import Counter
from dataclasses import dataclass, field

import run
import toy
from assistant import Question, published_form
from data import (
    WRAPPERS,
    Concept,
    DataError,
    Found,
    Photo,
    Split,
    find_folder,
    find_photos,
    fingerprint,
)
from rrg import load_world


# ----------------------------------------------------------------------------------- the protocols
@dataclass(frozen=True)
class Protocol:
    """What is done with a benchmark's photos. The defaults are the RRG authors' research code's."""

    kept: int = 5  # photos of a concept that are no tests, where the folder is not split
    described: int = 1  # so many of these, drawn by the seed (--references)
    by_category: bool = False  # databases, retrieval and pairs to recognise within a category
    k: int = 3  # descriptions that are retrieved for a photo
    embedder: str = "openai/clip-vit-large-patch14-336"  # what retrieves them
    seed: int = 23
    seeds: str = "23, their default, and 42"
    # 5 kept: its 01 catalog; 1 described: dataset.py; k and how it retrieves: personalize.py
    source: str = "the RRG authors' research code"


PROTOCOLS = {
    # The folders of PerVA and of Yo'LLaVA are split. By category, figures are pooled over all of
    # them: F1 is the mean over all concepts, recognition is of all pairs.
    "perva": Protocol(by_category=True),
    "myvlm": Protocol(),
    "yollava": Protocol(),
    "dreambooth": Protocol(
        kept=1, seed=0, seeds="none published", source="ours, as no split is published"
    ),
}


def protocol_settings(name):
    """The options that a protocol sets where they are not given.   -> {field: value}"""
    if not name:
        return {}
    protocol = PROTOCOLS[name]
    return {
        "references": protocol.described,
        "k": protocol.k,
        "embedder": protocol.embedder,
        "seed": protocol.seed,
    }


def protocol_of(options):
    """What --protocol asks for, or what is done without it.   -> Protocol"""
    if options.protocol:
        return PROTOCOLS[options.protocol]
    return Protocol(kept=options.references)


# ------------------------------------------------------------------------------ photos of concepts
@dataclass
class PhotoSplit:
    """The photos of a concept."""

    references: list[Photo]  # to be described
    tests: list[Photo]


def split_photos(concept, references, kept, seed):
    """Draw `references` photos of a concept, which are described, and its tests.   -> PhotoSplit

    Where the benchmark is split: references come from "train", and all of "test" are tests. Where
    it is not, or has only "test": `kept` photos are drawn, references are some of these and tests
    are all others. A concept of two photos or more always has a test.
    """
    tests = [photo for photo in concept.photos if photo.part == "test"]
    others = [photo for photo in concept.photos if photo.part != "test"]
    rng = random.Random(f"references {seed} {concept.name}")
    if tests and others:
        order = rng.sample(others, len(others))
        return PhotoSplit(order[:references], tests)

    order = rng.sample(concept.photos, len(concept.photos))
    kept = max(1, min(kept, len(order) - 1))
    return PhotoSplit(order[:kept][:references], order[kept:])


# ------------------------------------------------------------------------- what is measured with
@dataclass(frozen=True)
class Test:
    """A photo that is put to the assistant, and the name of the concept it shows."""

    photo: Photo
    concept: str


@dataclass(frozen=True)
class Pair:
    """A photo that is put to one description."""

    photo: Photo
    concept: str  # the name of the one that is described
    shown: bool  # does the photo show it?


@dataclass
class Part:
    """One part of the table: concepts that are looked up together, unless it is by category."""

    known: list[Concept]  # those in the database
    tested: list[Concept]  # those whose photos are put to the assistant
    tests: list[Test] = field(default_factory=list)


@dataclass
class Benchmark:
    """All that speakers and databases are measured with."""

    root: pathlib.Path | None  # the folder of photos; None: the toy world
    concepts: list[Concept]  # of all parts
    splits: dict[str, PhotoSplit]  # {concept name: its photos}
    parts: dict[str, Part]  # "seen" and "unseen", or "all"
    questions: list[Question]  # the benchmark's own
    pairs: list[Pair]  # the benchmark's own

    def content(self):
        """All of it as JSON can hold it, with the hash of each photo: two that are equal measure
        the same."""
        concepts = []
        for concept in self.concepts:
            references = self.splits[concept.name].references
            photos = [[photo.name, photo.pixels] for photo in references]
            concepts.append([concept.name, concept.category, photos])
        parts = {}
        for name, part in self.parts.items():
            known = [concept.name for concept in part.known]
            tests = [[test.concept, test.photo.name, test.photo.pixels] for test in part.tests]
            parts[name] = [known, tests]
        questions = []
        for each in self.questions:
            questions.append([each.concept, each.photo.name, each.text, each.options, each.answer])
        pairs = [[pair.concept, pair.photo.name, pair.shown] for pair in self.pairs]
        return [concepts, parts, questions, pairs]


def thing_names(root):
    """The names of the things in a folder of photos, as its folders tell: no photo is read."""
    places = find_photos(root, Found(), allow_loose=False)
    photos = Counter(place.folders[-1] for place in places.values())
    return [name for name, count in photos.items() if count > 1]


def load_benchmark(mllm, options, skipped_file=None):
    """The photos in --data, or the toy world, and what comes with them.   -> Benchmark

    skipped_file: where to list the files that are skipped
    """
    root = find_folder(options.data) if options.data else None
    concepts, split = load_world(mllm, root, options.seed, options.train_concepts, skipped_file)
    if options.all:
        tested = concepts
        parts = {"all": Part(concepts, concepts)}
    elif options.train_concepts:
        tested = split.test
        if not tested:
            raise DataError("--train-concepts names all concepts, so that none is left to test")
        parts = {"all": Part(split.test, split.test)}
    else:
        tested = concepts
        if root:
            split = split_of_run(concepts, split, options.adapter)
        parts = {
            "seen": Part(split.train + split.test, split.test),
            "unseen": Part(split.unseen, split.unseen),
        }

    kept = max(protocol_of(options).kept, options.references)
    splits = {}
    for concept in tested:
        splits[concept.name] = split_photos(concept, options.references, kept, options.seed)
    questions = []
    pairs = []
    if root:
        questions = load_questions(root, concepts)
        pairs = load_pairs(root, concepts)
    return Benchmark(root, tested, splits, parts, questions, pairs)


def split_of_run(concepts, split, adapters):
    """The parts that an adapter's run had, by its config.json: the first one's that has any.

    A folder that has grown or shrunk since would be split otherwise, and what was trained on would
    be tested. Concepts that have come since are tests. `split` itself if no run knows the concepts.
    -> Split
    """
    of_name = {concept.name: concept for concept in concepts}
    for adapter in adapters:
        names = run.run_record(adapter).get("concepts")
        if not names or not of_name.keys() & names["train"]:
            continue
        train = [of_name[name] for name in names["train"] if name in of_name]
        unseen = [of_name[name] for name in names["unseen"] if name in of_name]
        others = of_name.keys() - {*names["train"], *names["unseen"]}
        return Split(train, [of_name[name] for name in sorted(others)], unseen)
    return split


def choose_tests(benchmark, used):
    """Fill in the tests of each part. used: the photos that databases were written from.

    Those are no tests, nor are copies of them: RAP's databases keep pictures of their own.
    """
    hashes = {pixels_of(photo) for photo in used}
    for part in benchmark.parts.values():
        part.tests = []
        for concept in part.tested:
            photos = benchmark.splits[concept.name].tests
            if hashes:
                photos = [photo for photo in photos if pixels_of(photo) not in hashes]
            part.tests += [Test(photo, concept.name) for photo in photos]


def pixels_of(photo):
    """The hash of a photo's pixels, by which copies are found."""
    return photo.pixels or fingerprint(photo.load())


# ----------------------------------------------------------------------------- pairs and questions
def all_pairs(tests, entries):
    """Each test photo with each entry.   -> [Pair]"""
    pairs = []
    for test in tests:
        for entry in entries:
            pairs.append(Pair(test.photo, entry.name, shown=entry.name == test.concept))
    return pairs


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


def find_json(root, name):
    """A benchmark's JSON file in its folder or next to it.   -> its content, None if absent"""
    root = find_folder(root)
    folders = [root]
    folders += [root / wrapper for wrapper in sorted(WRAPPERS)]
    folders.append(root.parent)
    for folder in folders:
        if (folder / name).is_file():
            return run.load_json(folder / name)
    return None


def by_file_name(concepts):
    """{(concept name, file name): Photo}: how a benchmark's JSON names its photos.

    Of two photos of one file name it is the test photo.
    """
    photos = {}
    for concept in concepts:
        for photo in concept.photos:
            key = (concept.name, pathlib.PurePosixPath(photo.name).name)
            other = photos.get(key)
            if other is None or other.part != "test" or photo.part == "test":
                photos[key] = photo
    return photos


def place_of(path):
    """The folder and the file name at the end of a path: how `by_file_name` calls a photo."""
    path = pathlib.PurePosixPath(path)
    return (path.parent.name, path.name)


def question_items(content):
    """The items of Yo'LLaVA's question file.   -> [(path of the photo, item), ...]

    It comes nested, {concept: {path: item}}, or flat, {path: item}, or as a list of items that
    name their image.
    """
    if not isinstance(content, dict):
        return [(item["image"], item) for item in content]
    is_flat = any("question" in item for item in content.values())
    if is_flat:
        return list(content.items())
    items = []
    for group in content.values():
        if isinstance(group, dict):
            items += group.items()
        else:
            items += [(item["image"], item) for item in group]
    return items


def load_questions(root, concepts, log=print):
    """Yo'LLaVA's yollava-visual-qa.json in the folder or next to it.   -> [Question]

    Empty where there is none. Questions about photos that are not there are left out, and counted
    through `log`. Raises DataError for JSON in another form.
    """
    photos = by_file_name(concepts)
    questions = []
    content = find_json(root, "yollava-visual-qa.json") or {}
    with published_form("yollava-visual-qa.json"):
        items = question_items(content)
        for path, item in items:
            place = place_of(path)
            options = item.get("options") or item.get("option")
            if place not in photos or not options:
                continue
            concept, _ = place
            # {} is for the name alone.
            text = item["question"].replace("{", "(").replace("}", ")")
            text = re.sub(r"<sks>|\bsks\b", "{}", text)
            right = item["correct_answer"]
            questions.append(Question(concept, photos[place], text, options, right))

    left_out = len(items) - len(questions)
    if left_out:
        log(f"left out {left_out} of {len(items)} questions: their pictures are not in {root}")
    return questions


def load_pairs(root, concepts):
    """RAP's recognition_test.json in the folder or next to it.   -> [Pair], empty if absent

    Only its `correct_answer` is to be trusted: 333 rows whose other fields call them negative show
    the concept itself. Raises DataError for JSON in another form.
    """
    photos = by_file_name(concepts)
    labels = {}  # {(photo, concept name): does the photo show it?}; the last of two rows counts
    content = find_json(root, "recognition_test.json") or []
    with published_form("recognition_test.json"):
        for row in content:
            place = place_of(row["image"])
            if place in photos:
                name = row["concept"].strip("<>")
                labels[photos[place], name] = bool(row["correct_answer"])
    return [Pair(photo, name, shown) for (photo, name), shown in labels.items()]
