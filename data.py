"""data.py: from folders of photos to games.

A *concept*, or thing, is one physical object (this mug, not mugs) with several photos. A *game* shows one of its photos, the target, to the speaker
and a pool of K candidates to the listener: one hard positive, the view of the same thing that looks least like the target, and K - 1
hard negatives, the most similar photos of the most similar other things. Because the positive has nothing in common with the target but
the thing itself, a claim about background or pose fails on it; because the negatives look alike, a vague description fits them too.

Layouts that `load_concepts` reads, told apart by the folders that the pictures lie in:

    <root>/<concept>/*.jpg                            a folder of named things, MyVLM, RePIC's copies of the benchmarks
    <root>/<category>/<concept>/*.jpg
    <root>/{train,test}/[<category>/]<concept>/*.jpg  Yo'LLaVA, PerVA; the photos of both parts belong to the same concept
    <root>[/dataset]/<concept>/*.jpg with prompts_and_classes.txt    DreamBooth, whose class file gives the categories
    <root>/<number>/*.jpg with *.npy                  ObjectsWithStateChange, whose array gives each number's category

and beside them, for evaluate.py: RAP's databases of descriptions (`read_database`), Yo'LLaVA's questions (`load_questions`), RAP's list of
recognition pairs (`load_pairs`), and photos of several named things at once (`load_queries`: RAP's <A>_and_<B>/ folders, RePIC's JSON).

Where it departs from the paper and its authors' research code:
1. Each random draw has a generator of its own, seeded by a text such as "game 0 mug/1.jpg" and never by Python's hash(): the same seed makes
   the same games on every machine, and a photo more or less changes no other draw.
2. If a category has too few concepts for K - 1 negatives, the pool is filled up from other categories, and the number of such games is reported.
3. Concepts are split, not photos: some concepts, and of four categories or more some whole categories, are never trained on.
"""
import contextlib
import hashlib
import json
import pathlib
import random
import re
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from PIL import Image, ImageOps
from tqdm import tqdm
from transformers import AutoTokenizer, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
NOT_CONCEPTS = {"laion", "negative_example"}  # pools of unrelated negatives that some benchmarks ship beside the photos
NOT_READ = {".heic", ".heif", ".avif", ".gif", ".dng"}  # what phones make and this program does not read
WRAPPERS = {"dataset", "yollava-data", "perva-data"}  # folders that hold a whole benchmark
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombWarning, Image.DecompressionBombError)  # what Pillow raises on bad pictures
LFS = b"version https://git-lfs"


class DataError(Exception):
    """Data that cannot be used; the message says what to do."""


@contextlib.contextmanager
def refusing(told, *errors):
    """In this block, or in a function so decorated, `errors` become one clear line: what is `told`, and the first line of what they say."""
    try:
        yield
    except errors as error:
        raise DataError(f"{told}: {(str(error).strip() or type(error).__name__).splitlines()[0]}") from error


@dataclass(frozen=True)
class Photo:
    """One picture. Its name, unique in the data set, is its identity: photos are compared and hashed by it, and so are the keys of caches."""
    name: str
    open: Callable[[], Image.Image] = field(repr=False, compare=False)  # reads the pixels, whenever they are wanted
    truth: dict | None = field(default=None, repr=False, compare=False)  # toy world only: what is true of it, {kind: word}
    part: str = field(default="", repr=False, compare=False)  # "train" or "test", in benchmarks that are split


@dataclass(frozen=True)
class Concept:
    name: str
    category: str
    photos: list[Photo] = field(repr=False)


@dataclass(frozen=True)
class Game:
    """The speaker describes `target`; the listener must find the hard positive, `pool[answer]`, in the pool."""
    concept: str
    category: str
    target: Photo
    pool: list[Photo]
    answer: int

    def record(self):
        """What the log keeps of it."""
        return dict(concept=self.concept, target=self.target.name, pool=[photo.name for photo in self.pool], answer=self.answer)


# RePIC's kinds of task (reward.py says what they are) and their shares in percent. How the first two share their 69 is not published.
KINDS = {"oct": 35.0, "vlt": 34.0, "single_ict": 26.0, "multi_ict": 5.0}


@dataclass(frozen=True)
class Task:
    """One of RePIC's questions: the pictures, then the text."""
    kind: str
    photos: list[Photo]
    text: str
    solution: object  # what the rule wants. oct: "yes" or "no"; vlt: (box, size of its picture), in pixels; ict: [names in angle brackets]
    things: list[tuple[str, Photo]] = field(repr=False)  # (name in angle brackets, photo) of each thing in the last picture

    def record(self):
        """What the log keeps of it."""
        return dict(kind=self.kind, photos=[photo.name for photo in self.photos], question=self.text, solution=self.solution)


def chunks(items, size, told=None):
    """The items of a list, up to `size` at a time; with a progress bar where it is `told` what is being done."""
    starts = range(0, len(items), size)
    for start in tqdm(starts, desc=told, leave=False) if told else starts:
        yield items[start:start + size]


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
                image = image.point(lambda v: v / 256).convert("L")  # 16-bit grey, which convert alone would clip at 255
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")


def fingerprint(picture):
    """A hash of size and pixels: the same for all copies of a picture, whatever their files are called."""
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).digest()


def paste(photos, boxes, size):
    """A grey square of `size` pixels with each photo cut to its box (x1, y1, x2, y2)."""
    canvas = Image.new("RGB", (size, size), (128, 128, 128))
    for photo, (x1, y1, x2, y2) in zip(photos, boxes):
        canvas.paste(ImageOps.fit(photo.open(), (x2 - x1, y2 - y1)), (x1, y1))
    return canvas


def collage(photos, side, seed):
    """A scene of one to four photos, each cut to a square of `side` pixels, in different cells of a two by two grid, a little off its lines.

    -> (Photo of 2.25 `side` pixels, for each photo its box (x1, y1, x2, y2) in these pixels). So any folder of photos has boxes and
    pictures of several known things.
    """
    rng, gap = random.Random(f"collage {seed} {[photo.name for photo in photos]}"), side // 16
    # From cell to cell it is side + 2 gap, within a cell up to 2 gap more: 2 side + 4 gap, which is 2.25 side with a gap of side / 16.
    cells = rng.sample([(x, y) for y in (0, side + 2 * gap) for x in (0, side + 2 * gap)], len(photos))
    corners = [(x + gap * rng.randrange(3), y + gap * rng.randrange(3)) for x, y in cells]
    boxes = [(x, y, x + side, y + side) for x, y in corners]
    # The name is the identity of a photo, so it says what is where.
    name = "; ".join(f"{photo.name} at {x},{y}" for photo, (x, y) in zip(photos, corners))
    return Photo(name, partial(paste, photos, boxes, 9 * side // 4)), boxes


def natural(path):
    """Sort key that puts 10.jpg after 9.jpg."""
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", str(path))]


def fetch(root):
    """--data as a folder: the folder itself, or the local copy of a hub dataset that is distributed as folders of pictures."""
    if pathlib.Path(root).is_dir():
        return pathlib.Path(root)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(root)):
        raise DataError(f"{root} is not a folder; wanted: one with a folder of photos for each thing, or the name of a hub dataset")
    with refusing(f"{root} is not a folder here, and as a dataset on the hub", OSError, ValueError):
        return pathlib.Path(snapshot_download(str(root), repo_type="dataset"))


def known_categories(root, log):
    """{concept: category} from DreamBooth's class file or ObjectsWithStateChange's array; {} where there is neither."""
    for file in [*root.glob("prompts_and_classes.txt"), *root.glob("dataset/prompts_and_classes.txt")]:
        # "subject_name,class" and a line such as "dog2,dog" for each, until the word Prompts
        rows = [line.strip().split(",") for line in file.read_text().split("Prompts")[0].splitlines()]
        return {row[0]: row[1] for row in rows if len(row) == 2 and row[0] != "subject_name"}
    for file in sorted(root.glob("*.npy")):
        try:
            return {str(number): str(word) for number, word in enumerate(np.load(file, allow_pickle=False))}
        except ValueError:
            log(f"{file} holds Python objects, which could run code when read; it is left alone and every category is \"object\"")
    return {}


def parse_folders(path, root, loose):
    """What a picture's folders say of it -> ([concept] or [category, concept], part). `loose`: one in the root itself is named by its file."""
    folders, part = [folder for folder in path.relative_to(root).parts[:-1] if folder != "all"], ""  # PerVA has a layer called "all"
    if len(folders) > 1 and folders[0] in WRAPPERS:
        folders = folders[1:]
    if folders and folders[0].rstrip("_") in ("train", "test"):  # some are published as train_ and test_
        folders, part = folders[1:], folders[0].rstrip("_")
    folders = [path.stem] if loose and not folders else folders
    if not 1 <= len(folders) <= 2:
        where = "too deep below" if folders else "beside"
        raise DataError(f"{path} lies {where} the concept folders; expected <concept>/photo or <category>/<concept>/photo")
    return folders, part


def load_concepts(root, log=print, least=2):
    """Read a folder of photos -> [Concept, ...] sorted by name, each with at least `least` readable photos.

    Every photo is opened once, so that a broken one is found now and not in the middle of training. Broken photos, copies of another photo
    of the same concept and concepts left with too few are skipped, counted and reported through `log`. If one photo is enough (`least` 1),
    one that lies in the root itself is a concept named as its file. Raises DataError for a folder without pictures and for Git-LFS pointers.
    """
    root = fetch(root)
    classes, found, skipped = known_categories(root, log), defaultdict(dict), defaultdict(list)  # found: (category, name) -> {identity: Photo}
    for path in tqdm(sorted(root.rglob("*"), key=natural), desc="reading photos", leave=False):
        name = path.relative_to(root)
        if path.suffix.lower() in NOT_READ:
            skipped["files of a kind that is not read here (save them as JPEG or PNG)"].append(name)
        if path.suffix.lower() not in PICTURES or path.is_dir() or any(part[0] == "." or part in NOT_CONCEPTS for part in name.parts):
            continue
        folders, part = parse_folders(path, root, loose=least == 1)
        try:
            identity = part, fingerprint(read_photo(path))  # a Git-LFS pointer is a DataError and stops here: there will be more of them
        except UNREADABLE as error:
            skipped["photos that cannot be read"].append(f"{name} ({error})")
            continue
        photos = found[folders[0] if len(folders) == 2 else classes.get(folders[0], "object"), folders[-1]]
        if identity in photos:
            skipped["copies of another photo of the same thing"].append(name)
        else:
            photos[identity] = Photo(str(name), partial(read_photo, path), part=part)
    skipped["concepts with one photo only"] = [name for (_, name), photos in found.items() if len(photos) < least]
    for what, some in skipped.items():
        if some:
            log(f"skipped {what}: {len(some)}, such as {some[0]}")
    names = [name for _, name in found]  # in two categories the same one is ambiguous
    concepts = [Concept(f"{category}/{name}" if names.count(name) > 1 else name, category, list(photos.values()))
                for (category, name), photos in found.items() if len(photos) >= least]
    if not concepts:
        some = "two readable photos" if least == 2 else "a readable photo"
        raise DataError(f"{root} has no concept with {some}; put the photos of each thing in a folder of its own")
    return sorted(concepts, key=lambda concept: natural(concept.name))


# ----------------------------------------------------------------------------- for evaluation: splits, questions, descriptions
def split_photos(concept, references, seed):
    """-> (reference photos, test photos). With parts: references are drawn from "train", and all of "test" are tests. Without (or if all
    are "test"): what is not drawn as a reference is a test, of which a concept of two photos or more always keeps one."""
    pool = [photo for photo in concept.photos if photo.part != "test"] or concept.photos
    tests = [photo for photo in concept.photos if photo.part == "test"] if pool is not concept.photos else []
    order = random.Random(f"references {seed} {concept.name}").sample(pool, len(pool))
    most = references if tests else max(1, min(references, len(pool) - 1))
    return order[:most], tests or order[most:]


def find_photo(path, source):
    """The photo that the JSON file `source` names by a path, perhaps of another machine: as it stands, or the longest tail of it that exists
    in the file's folder or the two above. Raises DataError where there is none."""
    parts = pathlib.PurePosixPath(str(path).replace("\\", "/")).parts
    tails = [pathlib.Path(*parts[i:]) for i in range(len(parts)) if parts[i] != "/"]
    for file in (pathlib.Path(path), *(folder / tail for tail in tails for folder in source.parents[:3])):
        if file.is_file():
            return Photo(str(file), partial(read_photo, file))
    raise DataError(f"{source} names the picture {path}, which is not there")


def load_json(file):
    with refusing(f"cannot read {file}", OSError, ValueError):
        return json.loads(pathlib.Path(file).read_text(encoding="utf-8"))


def published(what):
    """Decorates what takes apart somebody else's JSON: whatever goes wrong in it becomes one clear error."""
    return refusing(f"{what} is not in the form it is published in; missing or odd", KeyError, TypeError, AttributeError, IndexError, ValueError)


def beside(root, name):
    """A benchmark's JSON, which lies in its folder or next to it; None where there is none."""
    root = fetch(root)
    places = [folder / name for folder in (root, *(root / wrapper for wrapper in sorted(WRAPPERS)), root.parent)]
    return next((load_json(file) for file in places if file.is_file()), None)


def shelf(concepts):
    """{(concept name, file name): photo}, by which benchmarks' JSON finds pictures; of two of one name the test photo."""
    photos = [((concept.name, pathlib.PurePosixPath(photo.name).name), photo) for concept in concepts for photo in concept.photos]
    return dict(sorted(photos, key=lambda item: item[1].part == "test"))  # of equal keys a dict keeps the last


@dataclass(frozen=True)
class Question:
    """A two-option question about a photo of a concept; `text` has {} where the concept's name goes."""
    concept: str
    photo: Photo
    text: str
    options: dict
    answer: str


@published("yollava-visual-qa.json")
def load_questions(root, concepts, log=print):
    """Yo'LLaVA's yollava-visual-qa.json in or beside the folder -> [Question]; [] where there is none.

    It comes nested, {concept: {path: question}}, or flat, {path: question}, or as a list of questions that name their image.
    """
    content = beside(root, "yollava-visual-qa.json") or {}
    groups = content.values() if isinstance(content, dict) and not any("question" in group for group in content.values()) else [content]
    rows = [pair for group in groups for pair in (group.items() if isinstance(group, dict) else [(item["image"], item) for item in group])]
    known, questions = shelf(concepts), []
    for path, item in rows:
        *_, folder, name = ("", *pathlib.PurePosixPath(path).parts)  # "" in case there is no folder
        options = item.get("options") or item.get("option")
        if (folder, name) in known and options:
            text = re.sub(r"<sks>|\bsks\b", "{}", item["question"].replace("{", "(").replace("}", ")"))  # {} is for the name alone
            questions.append(Question(folder, known[folder, name], text, options, item["correct_answer"]))
    if len(questions) < len(rows):
        log(f"left out {len(rows) - len(questions)} of {len(rows)} questions: their pictures are not in {root}")
    return questions


@published("recognition_test.json")
def load_pairs(root, concepts):
    """RAP's recognition_test.json in or beside the folder -> {(photo, concept name): whether the photo shows it}; {} where there is none.

    Only `correct_answer` is to be trusted: 333 rows whose other fields call them negative show the concept itself.
    """
    known = shelf(concepts)
    return {(known[place], row["concept"].strip("<>")): bool(row["correct_answer"]) for row in beside(root, "recognition_test.json") or []
            if (place := pathlib.PurePosixPath(row["image"]).parts[-2:]) in known}


@published("the list of pictures of several things")
def load_queries(path):
    """Photos that show several things, with their names: RePIC's {path: [names]} or {path: [[names], ...]} JSON, or RAP's folders
    <A>_and_<B>/ -> [(Photo, [names])]. Raises DataError where a picture that the JSON names cannot be found."""
    path = pathlib.Path(path)
    if path.is_dir():
        pictures = sorted((file for file in path.rglob("*_and_*/*") if file.suffix.lower() in PICTURES), key=natural)
        return [(Photo(str(file.relative_to(path)), partial(read_photo, file)), file.parent.name.split("_and_")) for file in pictures]
    rows = [(image, group) for image, names in load_json(path).items() for group in (names if names and isinstance(names[0], list) else [names])]
    return [(find_photo(image, path), [name.strip("<>") for name in group]) for image, group in rows]


@dataclass(frozen=True)
class Entry(Concept):
    """What is remembered of a concept: a description, and of its photos those that the description was written from."""
    text: str
    malformed: bool = False  # is the description in another form than was asked for?


def prose(info):
    """The text of a database's `info`, which is a string, a list, or a dictionary of parts (its category is not part of the text)."""
    if isinstance(info, dict):
        info = [part for key, part in info.items() if key != "category"]
    return " ".join(filter(None, map(prose, info))) if isinstance(info, list) else str(info or "").strip()


@published("the database of descriptions")
def read_database(path, photos=()):
    """A database in RAP's JSON, by file or folder -> [Entry]. Pictures are those of `photos` by their names, else files; paths of
    another machine are found by their ends. A concept without `info` has an empty description. Raises DataError for anything else
    than such a database, and for pictures that are not there."""
    path = pathlib.Path(path)
    if path.is_dir():
        path = next((path / name for name in ("database_mod.json", "database.json") if (path / name).is_file()), path / "database.json")
    content = load_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("concept_dict"), dict):
        raise DataError(f"{path} is not a database of descriptions: it has no \"concept_dict\"")
    entries, known = [], {photo.name: photo for photo in photos}
    for marker, item in content["concept_dict"].items():
        images = item.get("image") or [image for image, owner in content.get("path_to_concept", {}).items() if owner == marker]
        images = images if isinstance(images, list) else [images]
        category = item.get("category") or (item["info"].get("category") if isinstance(item.get("info"), dict) else "")
        shown = [known.get(image) or find_photo(image, path) for image in images]
        entries.append(Entry(marker.strip("<>"), category or "object", shown, prose(item.get("info"))))
    return entries


def database(entries, root=""):
    """RAP's JSON of a database: {"concept_dict": {tag: ...}, "path_to_concept": {picture: tag}}, pictures named from `root` on."""
    tags = {f"<{entry.name}>": entry for entry in entries}
    paths = {tag: [str(pathlib.Path(root) / photo.name) for photo in entry.photos] for tag, entry in tags.items()}
    return {"concept_dict": {tag: dict(name=entry.name, image=paths[tag][0] if len(paths[tag]) == 1 else paths[tag], info=entry.text,
                                       category=entry.category) for tag, entry in tags.items()},
            "path_to_concept": {path: tag for tag in tags for path in paths[tag]}}


class Clip:
    """A CLIP model to measure similarity with, by the same two methods as rrg.MLLM, which is the default."""

    def __init__(self, name, device):
        with refusing(f"cannot load the CLIP model {name}", OSError, ValueError):
            self.model = CLIPModel.from_pretrained(name).to(device).eval()
            self.processor, self.tokenizer = CLIPImageProcessorPil.from_pretrained(name), AutoTokenizer.from_pretrained(name)

    @torch.no_grad()
    def embed(self, photos):
        """{photo name: unit vector [D]}."""
        out = {}
        for batch in chunks(photos, 32, "CLIP looks at the photos"):
            pixels = self.processor(images=[photo.open() for photo in batch], return_tensors="pt")["pixel_values"]
            vectors = self.model.get_image_features(pixel_values=pixels.to(self.model.device)).pooler_output
            out |= zip([photo.name for photo in batch], F.normalize(vectors, dim=-1).cpu())
        return out

    @torch.no_grad()
    def compare(self, photos, texts):
        """Cosine similarity [P, T] of photos and texts; CLIP reads the first 77 tokens of a text."""
        rows = self.tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt").to(self.model.device)
        texts = F.normalize(self.model.get_text_features(**rows).pooler_output, dim=-1).cpu()  # [T, D]
        images = self.embed(photos)
        return torch.stack([images[photo.name] for photo in photos]) @ texts.T


# ------------------------------------------------------------------------------------------------------------------ games
def split_concepts(concepts, seed, unseen=None):
    """-> (train, test, unseen) lists of concepts. `unseen` names whole categories never trained on; by default, of four categories or
    more, a sixth of them (at least one). Of the other concepts a fifth (at least one) is kept for testing. (Our choice: no split is published.)"""
    rng = random.Random(f"split {seed}")
    categories = sorted({concept.category for concept in concepts})
    if unseen is None:
        unseen = rng.sample(categories, max(1, len(categories) // 6)) if len(categories) >= 4 else []
    known = [concept for concept in rng.sample(concepts, len(concepts)) if concept.category not in unseen]
    # Deal the concepts out in rounds, one of each category a round (its turn: how many of its category come before it). The last ones dealt
    # are the test set, so that it has something of every category that has concepts to spare.
    turn = {concept.name: sum(other.category == concept.category for other in known[:i]) for i, concept in enumerate(known)}
    turns = sorted(known, key=lambda concept: (turn[concept.name], concept.category))
    test = max(1, len(turns) // 5)
    return turns[:-test], turns[-test:], [concept for concept in concepts if concept.category in unseen]


def mine_games(concepts, embeddings, k, seed, *, rivals=None, negatives="hard", positive="hard", log=print):
    """Stage 1: one game for every photo of `concepts`, whose negatives come from the concepts `rivals` (by default the same ones).

        hard positive    the view of the same concept least similar to the target                      ("easy": the most similar one)
        hard negatives   of the 8 most similar other concepts of its category the most similar photo
                         each, and of these the best k - 1                                   ("random": any photos of any other concepts)

    embeddings {photo name: unit vector [D]}; similarity is the cosine, here a dot product, and that of a concept the one of its photos' mean.
    A category with fewer than k - 1 other concepts is filled up from the most similar ones of other categories, which is reported.
    Raises DataError if there are fewer than k concepts in all.
    """
    rivals = rivals or concepts
    if len({concept.name for concept in rivals}) < k:
        raise DataError(f"a pool of K={k} pictures needs {k} concepts, here are only {len(rivals)}; add some or lower --k")
    mean = {concept.name: torch.stack([embeddings[photo.name] for photo in concept.photos]).mean(0) for concept in rivals}
    games, borrowed = [], 0
    for concept in concepts:
        for target in concept.photos:
            rng = random.Random(f"game {seed} {target.name}")
            similarity = lambda vector: float(embeddings[target.name] @ vector)
            near = lambda photo: similarity(embeddings[photo.name])
            nearest = lambda rival: max(rival.photos, key=near)
            views = sorted((photo for photo in concept.photos if photo is not target), key=near)  # the least similar first
            others = [rival for rival in rivals if rival.name != concept.name]
            if negatives == "random":
                chosen = [rng.choice(rival.photos) for rival in rng.sample(others, k - 1)]
            else:
                others.sort(key=lambda rival: similarity(mean[rival.name]), reverse=True)
                kin = [rival for rival in others if rival.category == concept.category][:8]
                strangers = [rival for rival in others if rival not in kin]
                chosen = sorted(map(nearest, kin), key=near, reverse=True)[:k - 1]
                borrowed += len(chosen) < k - 1
                chosen += map(nearest, strangers[:k - 1 - len(chosen)])
            candidates = [views[0 if positive == "hard" else -1], *chosen]
            order = rng.sample(range(k), k)  # shuffled, so that the place in the pool tells nothing
            pool = [candidates[i] for i in order]
            games.append(Game(concept.name, concept.category, target, pool, answer=order.index(0)))  # candidates[0] is the positive
    if borrowed:
        log(f"{borrowed} of {len(games)} games take negatives from other categories: theirs has fewer than {k - 1} other concepts")
    return games


def tag(name):
    """A concept's name as prompts and captions write it: one word in angle brackets."""
    return "<" + re.sub(r"[^\w-]+", "_", name).strip("_") + ">"


def make_tasks(concepts, shares, count, prompts, phrase, side, seed):
    """`count` of RePIC's tasks about `concepts`, of kinds drawn by their `shares` {kind: weight} -> [Task].

    `prompts` {"oct" | "vlt" | "ict": [(before, after)]}, of which each task gets one, so that all answers of a group answer the same.
    `phrase(concept)` says what to look for in a scene. The paper crops things out of photographs; here a scene is a collage of whole photos
    of `side` pixels each (`collage`). Raises DataError for fewer than two concepts.

        kind         one picture each, named        the last picture                                  solution
        oct          the thing                      it, or in half of the tasks another one           "yes", or "no"
        vlt          -                              a scene of it and 1 to 3 that look different      its box
        single_ict   the thing                      it                                                its name
        multi_ict    the thing and 1 or 2 others    a scene of them                                   their names
    """
    if len(concepts) < 2:
        raise DataError("RePIC's tasks need two concepts or more")
    kinds, tasks = random.Random(f"kinds {seed}").choices(list(shares), list(shares.values()), k=count), []
    for number, kind in enumerate(kinds):
        rng = random.Random(f"task {seed} {number}")
        concept, *others = rng.sample(concepts, len(concepts))
        before, after = rng.choice(prompts[kind.split("_")[-1]])  # single_ict and multi_ict share theirs
        named = shown = [concept]
        if kind == "multi_ict":
            named = shown = [concept, *others[:rng.choice([1, 2])]]
        elif kind == "vlt":  # another thing that the same phrase fits would be a second right answer
            named, shown = [], [concept, *[other for other in others if phrase(other) != phrase(concept)][:rng.choice([1, 2, 3, 3])]]
        elif kind == "oct" and rng.random() < 0.5:  # half of the others are of the same category
            kin = [other for other in others if other.category == concept.category] or others
            shown = [rng.choice([others, kin])[0]]
        views = {other.name: rng.sample(other.photos, 2) for other in [*named, *shown]}  # one to be named, another to be shown
        names, things = [tag(other.name) for other in named], [(tag(other.name), views[other.name][1]) for other in shown]
        scene, boxes = collage([photo for _, photo in things], side, f"{seed} {number}")
        last = scene if kind in ("vlt", "multi_ict") else things[0][1]
        solution = names
        if kind == "oct":
            solution = "yes" if shown is named else "no"
        elif kind == "vlt":
            solution = (boxes[0], (9 * side // 4,) * 2)  # the side of a collage
        in_order = sorted(zip(boxes, things), key=lambda pair: (pair[0][1] >= side, pair[0][0]))  # as one reads: the upper row first
        text = before + (", ".join(names) or phrase(concept)) + after
        tasks.append(Task(kind, [views[other.name][0] for other in named] + [last], text, solution, [thing for _, thing in in_order]))
    return tasks


def games_of_step(games, step, size, seed):
    """The `size` games of training step `step` (from 0), in a fresh order every pass. It follows from step and seed alone, so a run that goes
    on after a stop has nothing to restore. -> [Game] * size"""
    places = [divmod(place, len(games)) for place in range(step * size, (step + 1) * size)]  # (pass, place in its order)
    order = {epoch: random.Random(f"epoch {seed} {epoch}").sample(games, len(games)) for epoch in {epoch for epoch, _ in places}}
    return [order[epoch][i] for epoch, i in places]
