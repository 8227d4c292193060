"""data.py: from folders of photos to games.

A *concept* is one physical thing (this mug, not mugs) with several photos. A *game* shows one of its photos, the target, to the speaker
and a pool of K candidates to the listener: one hard positive, the view of the same thing that looks least like the target, and K - 1
hard negatives, the most similar photos of the most similar other things. Because the positive shares nothing with the target but the
thing itself, a claim about the background or the pose fails on it; because the negatives look alike, a vague description fits them too.

Layouts that `load_concepts` reads, told apart by where the pictures lie:

    <root>/<concept>/*.jpg                            a folder of named things
    <root>/<category>/<concept>/*.jpg
    <root>/{train,test}/[<category>/]<concept>/*.jpg  the photos of both parts belong to the same concept
    <root>[/dataset]/<concept>/*.jpg with prompts_and_classes.txt    DreamBooth, whose class file gives the categories

Where it departs from the paper and its authors' research code:
1. Everything random is seeded by text, never by Python's hash(): the same seed makes the same games on every machine.
2. Where a category is too small for K - 1 negatives, other categories fill up, and the number of such games is reported.
3. Concepts are split, not photos: some concepts, and where there are four categories or more some whole categories, are never trained on.
"""
import pathlib
import random
import re
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import partial
from typing import Callable

import torch
from PIL import Image, ImageOps
from tqdm import tqdm

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
NOT_CONCEPTS = {"laion", "negative_example"}  # pools of unrelated negatives that some benchmarks ship beside the photos
LFS = b"version https://git-lfs"


class DataError(ValueError):
    """Data that cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Photo:
    """One picture of a concept: a name unique in the data set, how to open it, and in the toy world what is true of it, {kind: word}."""
    name: str
    open: Callable[[], Image.Image] = field(repr=False, compare=False)
    truth: dict | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Concept:
    name: str
    category: str
    photos: list[Photo] = field(repr=False)


@dataclass(frozen=True)
class Game:
    """The speaker describes `target`; the listener must find `pool[answer]` in the pool."""
    concept: str
    category: str
    target: Photo
    pool: list[Photo]
    answer: int


# ----------------------------------------------------------------------------------------------------------------- photos
def read_photo(path):
    """A photo as an RGB picture the right way up: EXIF rotation applied, transparency on white, palettes, CMYK and 16 bit converted."""
    with open(path, "rb") as file:
        if file.read(len(LFS)) == LFS:
            raise DataError(f"{path} is a Git-LFS pointer, not a picture: run 'git lfs pull' where it was cloned")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                image = image.point(lambda v: v / 256).convert("L")  # 16-bit grey
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")


def natural(path):
    """Sort key that puts 10.jpg after 9.jpg."""
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", str(path))]


def dreambooth_classes(root):
    """{concept: category} from DreamBooth's class file, or {} where there is none."""
    for file in (root / "prompts_and_classes.txt", root / "dataset" / "prompts_and_classes.txt"):
        if file.is_file():
            rows = [line.strip().split(",") for line in file.read_text().split("Prompts")[0].splitlines()]
            return {row[0]: row[1] for row in rows if len(row) == 2 and row[0] != "subject_name"}
    return {}


def load_concepts(root, log=print):
    """Read a folder of photos -> [Concept, ...] sorted by name, each with at least two readable photos.

    Every photo is opened once, so that a broken one is found now and not in the middle of training. Broken photos and concepts left
    with fewer than two are skipped, counted and reported through `log`. Raises DataError for a folder without pictures and for
    Git-LFS pointers.
    """
    root = pathlib.Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; --data wants one with a folder of photos for each thing")
    classes, found, broken = dreambooth_classes(root), defaultdict(list), []
    for path in tqdm(sorted(root.rglob("*"), key=natural), desc="reading photos", leave=False):
        parts = path.relative_to(root).parts
        if path.suffix.lower() not in PICTURES or any(part[0] == "." or part in NOT_CONCEPTS for part in parts):
            continue
        folders = [part for part in parts[:-1] if part != "all"]
        if folders and folders[0].rstrip("_") in ("train", "test") or folders[:1] == ["dataset"] and classes:
            folders = folders[1:]
        if not folders or len(folders) > 2:
            where = "too deep below" if folders else "beside"
            raise DataError(f"{path} lies {where} the concept folders; expected <concept>/photo or <category>/<concept>/photo")
        try:
            read_photo(path)
        except DataError:
            raise
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            broken.append(f"{path.relative_to(root)} ({error})")
            continue
        category = folders[0] if len(folders) == 2 else classes.get(folders[0], "object")
        found[category, folders[-1]].append(Photo(str(path.relative_to(root)), partial(read_photo, path)))
    lonely = [name for (_, name), photos in found.items() if len(photos) < 2]
    if broken:
        log(f"skipped {len(broken)} photos that cannot be read, such as {broken[0]}")
    if lonely:
        log(f"skipped {len(lonely)} concepts with one photo only, such as {lonely[0]}: the game needs a second view")
    twice = {name for name, count in Counter(name for _, name in found).items() if count > 1}
    concepts = [Concept(f"{category}/{name}" if name in twice else name, category, photos)
                for (category, name), photos in found.items() if len(photos) > 1]
    if not concepts:
        raise DataError(f"{root} has no concept with two readable photos; put the photos of each thing in a folder of its own")
    return sorted(concepts, key=lambda concept: natural(concept.name))


# ------------------------------------------------------------------------------------------------------------------ games
def split_concepts(concepts, seed, unseen=None):
    """-> (train, test, unseen) lists of concepts. `unseen` names whole categories never trained on; by default, of four categories or
    more, a sixth of them (at least one). Of the other concepts a fifth (at least one) is kept for testing."""
    rng = random.Random(f"split {seed}")
    categories = sorted({concept.category for concept in concepts})
    if unseen is None:
        unseen = rng.sample(categories, max(1, len(categories) // 6)) if len(categories) >= 4 else []
    known = defaultdict(list)
    for concept in rng.sample(concepts, len(concepts)):
        if concept.category not in unseen:
            known[concept.category].append(concept)
    # Take turns through the categories; the last turns are the test set, so that it has a bit of every category that has concepts to spare.
    most = max(map(len, known.values()), default=0)
    turns = [concept for turn in range(most) for _, group in sorted(known.items()) for concept in group[turn:turn + 1]]
    test = max(1, len(turns) // 5)
    return turns[:-test], turns[-test:], [concept for concept in concepts if concept.category in unseen]


def mine_games(concepts, embeddings, k, seed, *, pool=None, negatives="hard", positive="hard", log=print):
    """One game for every photo of `concepts`, whose distractors come from the concepts in `pool` (by default the same ones).

    embeddings {photo name: unit vector [D]}. Hard positive: the view of the same concept least similar to the target ("easy": the most
    similar). Hard negatives: rank the other concepts by the similarity of their mean to the target, same category first; of each of
    the first 8 take its photo most similar to the target; keep the k - 1 most similar ("random": any photos of any other concepts).
    Raises DataError when there are fewer than k concepts in all; reports games whose category is too small for k - 1 negatives.
    """
    pool = pool or concepts
    if len({concept.name for concept in pool}) < k:
        raise DataError(f"a pool of K={k} pictures needs {k} concepts, here are only {len(pool)}; add some or lower --k")
    mean = {concept.name: torch.stack([embeddings[photo.name] for photo in concept.photos]).mean(0) for concept in pool}
    games, borrowed = [], 0
    for concept in concepts:
        for target in concept.photos:
            rng = random.Random(f"game {seed} {target.name}")
            like = lambda vector: float(embeddings[target.name] @ vector)  # noqa: E731
            near = lambda photo: like(embeddings[photo.name])  # noqa: E731
            views = sorted((photo for photo in concept.photos if photo is not target), key=near)
            other = [rival for rival in pool if rival.name != concept.name]
            if negatives == "random":
                foils = [rng.choice(rival.photos) for rival in rng.sample(other, k - 1)]
            else:
                other.sort(key=lambda rival: -like(mean[rival.name]))
                kin = [rival for rival in other if rival.category == concept.category][:8]
                borrowed += len(kin) < k - 1
                foils = sorted((max(rival.photos, key=near) for rival in kin), key=near, reverse=True)[:k - 1]
                foils += [max(rival.photos, key=near) for rival in other if rival not in kin][:k - 1 - len(foils)]
            candidates = [views[0 if positive == "hard" else -1], *foils]
            order = rng.sample(range(k), k)
            games.append(Game(concept.name, concept.category, target, [candidates[i] for i in order], order.index(0)))
    if borrowed:
        log(f"{borrowed} of {len(games)} games take negatives from other categories: theirs has fewer than {k - 1} other concepts")
    return games


def games_of_step(games, step, size, seed):
    """The `size` games of training step `step` (from 0): a fresh shuffle every pass, and no state to save. -> [Game] * size"""
    order, picked = {}, []
    for place in range(step * size, (step + 1) * size):
        epoch, i = divmod(place, len(games))
        if epoch not in order:
            order[epoch] = random.Random(f"epoch {seed} {epoch}").sample(range(len(games)), len(games))
        picked.append(games[order[epoch][i]])
    return picked
