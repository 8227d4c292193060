"""protocols.py: what a benchmark's authors measure with: which photos are described, which are
tested, and which questions and pairs come with them.
"""

import pathlib
import random
import re
from dataclasses import dataclass

import run
from assistant import Question, published_form
from data import WRAPPERS, Photo, find_folder


@dataclass
class PhotoSplit:
    """The photos of a concept."""

    references: list[Photo]  # to be described
    tests: list[Photo]


def split_photos(concept, references, seed):
    """Draw `references` photos of a concept to be described; others are tests.   -> PhotoSplit

    Where the benchmark is split: references come from "train", and all of "test" are tests. Where
    it is not, or has only "test": what is not drawn is a test, and a concept of two photos or
    more always keeps one.
    """
    tests = [photo for photo in concept.photos if photo.part == "test"]
    others = [photo for photo in concept.photos if photo.part != "test"]
    rng = random.Random(f"references {seed} {concept.name}")
    if tests and others:
        order = rng.sample(others, len(others))
        return PhotoSplit(order[:references], tests)

    order = rng.sample(concept.photos, len(concept.photos))
    count = max(1, min(references, len(order) - 1))
    return PhotoSplit(order[:count], order[count:])


@dataclass(frozen=True)
class Pair:
    """A photo that is put to one description."""

    photo: Photo
    concept: str  # the name of the one that is described
    shown: bool  # does the photo show it?


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
