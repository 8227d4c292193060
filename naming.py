"""naming.py: how RePIC is measured: do captions call things by the names that they were given?

The model sees reference photos with names, then a photo of one of these concepts, or a scene of two
or four, and writes a caption. It is measured *with* its adapter on.

Shapes: C concepts in the database, D width of the vectors that are compared.
"""

import pathlib
import random
from dataclasses import dataclass
from functools import partial

import torch

import run
from assistant import find_photo, published_form
from data import PHOTO_SUFFIXES, Photo, natural, read_photo, tag
from model import Prompt
from repic import PROMPTS, collage
from rrg import picture_side

SCENES = 60  # pictures of one concept, as many of two and of four, for --grounding


# ------------------------------------------------------------------------- how RePIC is measured
def words_of(caption):
    """The words of a caption, split at white space and without punctuation at either end."""
    words = caption.replace("</s>", "").split()
    return {word.strip(".,!?;:()[]{}\"'-") for word in words}


def name_grounding(rows, case_sensitive=False):
    """Do captions call things by their names? The rule of RAP and RePIC.

    rows [(names that belong there, caption), ...] -> {"precision", "recall", "f1"}

    A name is there if a word equals it, bare or as <name>. If <bo> belongs in a caption, one that
    says <bo> is a hit; one that does not, but says a name of these rows that does not belong
    there, is a miss; one without any name is neither and only lowers the recall.

        precision = hits / (hits + misses)        recall = hits / names that belong

    RePIC's tables of two concepts are case-sensitive, those of one and four are not.
    """
    captions = []  # (names that belong there, without brackets, the caption)
    for names, caption in rows:
        if not case_sensitive:
            names = [name.lower() for name in names]
            caption = caption.lower()
        bare = [name.removeprefix("<").removesuffix(">") for name in names]
        captions.append((bare, caption))
    all_names = {name for names, _ in captions for name in names}

    hits = 0
    misses = 0
    slots = 0  # names that belong
    for names, caption in captions:
        words = words_of(caption)
        there = {name for name in all_names if name in words or f"<{name}>" in words}
        right = sum(name in there for name in names)
        hits += right
        slots += len(names)
        if there - set(names):  # a name that does not belong there
            misses += len(names) - right

    precision = hits / max(1, hits + misses)
    recall = hits / max(1, slots)
    f1 = 2 * precision * recall / max(1e-12, precision + recall)
    return {"precision": precision, "recall": recall, "f1": f1}


@dataclass(frozen=True)
class Query:
    """A photo of several concepts, and their names."""

    photo: Photo
    names: list[str]


def queries_in_folders(root):
    """RAP's folders <A>_and_<B>/ of photos.   -> [Query]"""
    queries = []
    for file in sorted(root.rglob("*_and_*/*"), key=natural):
        if file.suffix.lower() in PHOTO_SUFFIXES:
            photo = Photo(str(file.relative_to(root)), partial(read_photo, file))
            queries.append(Query(photo, file.parent.name.split("_and_")))
    return queries


def load_queries(path):
    """Photos that show several concepts, in the two forms they are published in.   -> [Query]

    A folder of RAP's <A>_and_<B>/ folders, or RePIC's JSON, {path: [name, ...]} or
    {path: [[name, ...], ...]}. Raises DataError for JSON in another form, and for a picture that
    it names and that cannot be found.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        return queries_in_folders(path)
    content = run.load_json(path)
    queries = []
    with published_form("the list of pictures of several things"):
        for image, names in content.items():
            groups = names if names and isinstance(names[0], list) else [names]
            for group in groups:
                bare = [name.strip("<>") for name in group]
                queries.append(Query(find_photo(image, path), bare))
    return queries


# ------------------------------------------------------------------ names in captions (--grounding)
COUNTS = (1, 2, 4)  # concepts in the picture
REFERENCES = ("right", "retrieved", "wrong")  # how reference photos are chosen


@dataclass
class NamingTest:
    """A picture of one concept or several, to be captioned with their names."""

    picture: Photo
    photos: list[Photo]  # those it is made of, one of each concept
    names: list[str]  # of what is in it
    others: list[str]  # as many names of what is not in it


def draw_naming_test(part, splits, count, number, side, seed):
    """Picture `number` of `count` concepts; one of several is a collage.   -> NamingTest"""
    rng = random.Random(f"scene {seed} {count} {number}")
    names = [concept.name for concept in rng.sample(part.tested, count)]
    photos = [rng.choice(splits[name].tests) for name in names]
    absent = [concept.name for concept in part.known if concept.name not in names]
    others = rng.sample(absent, count)
    picture = photos[0]
    if count > 1:
        picture, _ = collage(photos, side, number)
    return NamingTest(picture, photos, names, others)


class ReferencePhotos:
    """The first reference photo of each known concept, and which of them look like a photo."""

    def __init__(self, embedder, part, splits):
        self.photos = {}  # {concept name: Photo}
        for concept in part.known:
            self.photos[concept.name] = splits[concept.name].references[0]
        tests = []
        for concept in part.tested:
            tests += splits[concept.name].tests
        self.vectors = embedder.embed([*self.photos.values(), *tests])  # {photo name: [D]}
        of_references = [self.vectors[photo.name] for photo in self.photos.values()]
        self.memory = torch.stack(of_references)  # [C, D]

    def most_alike(self, photo):
        """The name of the concept whose reference photo is most like a test photo."""
        similarities = self.memory @ self.vectors[photo.name]  # [C]
        return list(self.photos)[similarities.argmax()]

    def chosen(self, test, how):
        """The names of the references that a picture is captioned with."""
        if how == "right":
            return test.names
        if how == "wrong":
            return test.others
        names = [self.most_alike(photo) for photo in test.photos]
        return list(dict.fromkeys(names))  # two photos may have the same one


def naming_scores(mllm, tests, references, how, max_tokens):
    """Do captions call concepts by the names that reference photos gave them?

    A wrong reference shows a concept that is not in the picture: its name counts, and should not
    be there. Each picture has one of the three wordings, in turn.
    -> {"precision", "recall", "f1"}
    """
    prompts = []
    expected = []
    for number, test in enumerate(tests):
        names = references.chosen(test, how)
        template = PROMPTS["ict"][number % len(PROMPTS["ict"])]
        text = template.replace("{text}", ", ".join(tag(name) for name in names))
        photos = [references.photos[name] for name in names]
        prompts.append(Prompt([*photos, test.picture], text))
        belong = test.others if how == "wrong" else test.names
        expected.append([tag(name) for name in belong])
    captions = mllm.greedy(prompts, max_tokens, "calling by name")

    # Of two names RePIC counts them case-sensitively, of one and of four not.
    is_pair = len(tests[0].names) == 2
    return name_grounding(list(zip(expected, captions, strict=True)), case_sensitive=is_pair)


def grounding(mllm, embedder, part, splits, options):
    """Does the model, as it is now, call concepts by their names?   (RePIC, tables 1 to 3)

    -> {"names_<count>_<references>_<figure>": fraction}, None where there are too few concepts
    """
    references = ReferencePhotos(embedder, part, splits)
    side = picture_side(mllm)
    figures = {}
    for count in COUNTS:
        tests = []
        if len(part.tested) >= count and len(part.known) >= 2 * count:
            for number in range(SCENES):
                tests.append(draw_naming_test(part, splits, count, number, side, options.seed))
        for how in REFERENCES:
            scores = dict.fromkeys(("precision", "recall", "f1"))
            if tests:
                scores = naming_scores(mllm, tests, references, how, options.max_tokens)
            for figure, value in scores.items():
                figures[f"names_{count}_{how}_{figure}"] = value
    return figures


def grounding_columns():
    """{figure: how the table calls it}"""
    columns = {}
    for count in COUNTS:
        noun = "name" if count == 1 else "names"
        for how in REFERENCES:
            columns[f"names_{count}_{how}_f1"] = f"{count} {noun}, {how}"
    return columns


GROUNDING = grounding_columns()
