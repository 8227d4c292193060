"""data.py: from folders of photos to games: a target, one hard positive, K - 1 hard negatives.

A *concept* is one physical object (this mug, not mugs) with several photos. A *game* shows one
of its photos, the target, to the speaker, and a pool of K photos to the listener:

    hard positive    the photo of the same concept that is *least* similar to the target. It has
                     little in common with it but the concept itself, so a claim about background
                     or pose fails on it
    hard negatives   photos of look-alikes: of the 8 most similar other concepts of its category
                     the most similar photo each, and of these the best K - 1. A vague description
                     fits them too

Layouts that `load_concepts` reads, told apart by the folders that the photos lie in:

    <root>/<concept>/*.jpg                               a folder of named things; MyVLM
    <root>/<category>/<concept>/*.jpg
    <root>/{train,test}/[<category>/]<concept>/*.jpg     Yo'LLaVA, PerVA; the photos of both
                                                         parts belong to the same concept
    <root>[/dataset]/<concept>/*.jpg with prompts_and_classes.txt
                                                         DreamBooth; the file gives categories
    <root>/<number>/*.jpg with *.npy                     ObjectsWithStateChange; the array gives
                                                         each number's category

What cannot be used is skipped, counted and reported. What reading a photo has shown is remembered
in runs/photos.json, so that a second start need not read the pixels of files that are as they were.

Where it departs from the RRG paper and its authors' research code:
1. Each game is drawn with a generator of its own, seeded by a text such as "game 0 mug/1.jpg" and
   never by Python's hash(): the same seed makes the same games on every machine, and adding or
   removing a photo leaves the random draws of all other games as they were.
2. If a category has too few concepts for K - 1 negatives, the pool is filled up from other
   categories, and the number of such games is reported.
3. Photos are compared by the model's own vision tower unless --embedder names a CLIP. (The
   research code takes openai/clip-vit-large-patch14-336.)
4. Without --train-concepts a fifth of the concepts, and of four categories or more some whole
   categories, are never trained on. (The research code trains on .65 of the concepts of categories
   with eight or more.)
5. A large JPEG is decoded at a half, a quarter or an eighth of its size, as long as its shorter
   side stays at least DETAIL pixels. That is more than a model is shown, and takes half the time;
   what it is shown differs a little from the whole picture made small.

Shapes: K photos in a pool, D width of the vectors that similarity is measured with.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import random
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import PIL
import torch
from huggingface_hub import snapshot_download
from PIL import Image, ImageOps
from tqdm import tqdm

from lora import write_json, write_text

try:
    import pillow_heif
except ImportError:  # not required: HEIC is read where it happens to be installed
    pillow_heif = None

# What photos are opened as, whatever they are called. (The MPO of some phones is a kind of JPEG.
# Other formats that Pillow knows, such as EPS, are read by starting other programs.)
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")
LONGEST = 200  # times as long as wide: the vision tower's own limit
# A JPEG is decoded no larger than needed: its shorter side stays at least this long. So no model
# looks at more pixels than DETAIL**2, the most that --max-pixels may ask for.
DETAIL = 1280
PHOTO_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff"}
HEIC_SUFFIXES = {".heic", ".heif", ".hif"}
HEIC_HEADS = {b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1"}  # bytes 4 to 11 of such a file
HEIC_ADVICE = "a HEIC picture; pip install pillow-heif, or save it as JPEG"
if pillow_heif is not None:
    pillow_heif.register_heif_opener()
    FORMATS += ("HEIF",)
    PHOTO_SUFFIXES |= HEIC_SUFFIXES
# What else phones and cameras make, which is reported.
VIDEO_SUFFIXES = {".mov", ".mp4", ".m4v", ".3gp", ".avi", ".mkv", ".webm"}
UNREAD_SUFFIXES = {".avif", ".gif", ".dng", ".cr2", ".cr3", ".nef", ".arw"}
NOT_CONCEPTS = {"laion", "negative_example"}  # unrelated photos that some benchmarks ship
# Categories that PerVA's folders abbreviate, in the words of the RRG authors' prompts.
CATEGORY_WORDS = {
    "veg": "vegetable",
    "decoration": "decoration object",
    "retail": "retail object",
    "tro_bag": "trolley bag",
}
WRAPPERS = {"dataset", "yollava-data", "perva-data"}  # folders that hold a whole benchmark
DRAWS = 1000  # of `pick_concepts`
POOL = 3  # concepts that are left to train on at least, if there are four
LFS_POINTER = b"version https://git-lfs"
NAMED = 12  # things that are named when a folder is reported
# What Pillow raises on files that are no pictures, or too large ones.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
# Pillow warns of pictures that are too large, and `read_photo` refuses them. (To make it raise the
# warning is no way out: photos are read in several threads, which share the filters of warnings.)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# The index of photos, in the working directory, and what it is true for: other programs may read
# other pixels.
INDEX = pathlib.Path("runs/photos.json")
READER = f"Pillow {PIL.__version__}, {' '.join(FORMATS)}, shorter side {DETAIL}"


class DataError(Exception):
    """Data that cannot be used; the message says what to do."""


@contextlib.contextmanager
def one_line_errors(message, *errors):
    """Turn these exceptions into a one-line `DataError` that starts with `message`."""
    try:
        yield
    except errors as error:
        raise DataError(f"{message}: {first_line(error)}") from error


def first_line(error):
    """What an exception says, in one line; its name if it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]


# ----------------------------------------------------------------------------------- the types
@dataclass(frozen=True)
class Photo:
    """One picture. Its name, unique in the data set, is its identity: photos are compared and
    hashed by it, and so are the keys of caches."""

    name: str
    load: Callable[[], Image.Image] = field(repr=False, compare=False)  # reads the pixels
    truth: dict | None = field(default=None, repr=False, compare=False)  # toy world only
    # "train" or "test" of a benchmark that comes in two parts; evaluate.py minds it.
    part: str = field(default="", repr=False, compare=False)
    # A hash of size and pixels, by which copies are found; "" of what was drawn by a seed.
    pixels: str = field(default="", repr=False, compare=False)
    # False: a scene that is never met again, so that its features need not be remembered.
    kept: bool = field(default=True, repr=False, compare=False)


@dataclass(frozen=True)
class Concept:
    """One physical object and its photos."""

    name: str
    category: str
    photos: list[Photo] = field(repr=False)


@dataclass(frozen=True)
class Game:
    """The speaker describes `target`; the listener must find the hard positive in the pool."""

    concept: str
    category: str
    target: Photo
    pool: list[Photo]  # K
    positive: int  # the place of the hard positive in the pool

    def record(self):
        """What logs and reports keep of a game."""
        return {
            "concept": self.concept,
            "target": self.target.name,
            "pool": [photo.name for photo in self.pool],
            "answer": self.positive,  # the right one in the pool
        }


@dataclass(frozen=True)
class Split:
    """Concepts to train on, to test on, and those of categories that are never trained on."""

    train: list[Concept]
    test: list[Concept]
    unseen: list[Concept]

    def names(self):
        """{part: names of its concepts}, which a run's config.json keeps."""
        return {
            "train": [concept.name for concept in self.train],
            "test": [concept.name for concept in self.test],
            "unseen": [concept.name for concept in self.unseen],
        }

    def photo_hashes(self):
        """{photo name: hash of its pixels} of all concepts, by which --resume knows them again."""
        hashes = {}
        for concept in self.train + self.test + self.unseen:
            hashes |= {photo.name: photo.pixels for photo in concept.photos}
        return hashes


# ---------------------------------------------------------------------------------- reading photos
def read_photo(path):
    """A photo as an RGB picture the right way up.

    EXIF rotation is applied, transparency is put on white; palettes, CMYK and 16 bit are
    converted; a large JPEG is made smaller (departure 5). Raises DataError for a Git-LFS pointer
    and one of UNREADABLE for what is no picture that the model can look at.
    """
    with open(path, "rb") as file:
        head = file.read(len(LFS_POINTER))
    if head == LFS_POINTER:
        raise DataError(
            f"{path} is a Git-LFS pointer, not a picture: run 'git lfs pull' where it was cloned"
        )
    if "HEIF" not in FORMATS and head[4:12] in HEIC_HEADS:
        raise ValueError(HEIC_ADVICE)

    with Image.open(path, formats=FORMATS) as image:
        if max(image.size) > LONGEST * min(image.size):
            raise ValueError(f"more than {LONGEST} times as long as wide")
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"more than {Image.MAX_IMAGE_PIXELS} pixels")
        image.draft(None, (DETAIL, DETAIL))  # of a JPEG; others stay as they are
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey, which convert alone would clip at 255
            image = image.point(lambda value: value / 256).convert("L")
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")


def fingerprint(picture):
    """A hash of size and pixels: the same for all copies of a picture, whatever their files are
    called. (A large JPEG saved again as a PNG is no such copy: it is read at another size.)"""
    found = hashlib.sha256(repr(picture.size).encode())
    found.update(picture.tobytes())
    return found.hexdigest()


def natural(path):
    """Sort key that puts 10.jpg after 9.jpg."""
    parts = re.split(r"(\d+)", str(path))
    return [int(part) if part.isdecimal() else part.lower() for part in parts]


# ------------------------------------------------------------------ what reading them has shown
@dataclass(frozen=True)
class Reading:
    """What came of reading a file, when it had this size and this time of change."""

    size: int  # bytes
    changed: int  # nanoseconds
    pixels: str  # hash, or "" of a file that cannot be read
    problem: str  # why it cannot be read, or ""

    def is_of(self, path):
        """Whether the file is as it was."""
        status = os.stat(path)
        return (self.size, self.changed) == (status.st_size, status.st_mtime_ns)


def try_photo(path):
    """Read a photo for its hash.   -> Reading"""
    size = -1
    changed = -1
    try:
        status = os.stat(path)
        size = status.st_size
        changed = status.st_mtime_ns
        return Reading(size, changed, fingerprint(read_photo(path)), problem="")
    except UNREADABLE as error:
        # An error of the system's, such as a permission that is missing, may be mended without a
        # change of the file. So the next start must try it again.
        if getattr(error, "errno", None) is not None:
            changed = -1
        return Reading(size, changed, pixels="", problem=first_line(error))


def load_index():
    """What is known of photos that were read before.   -> {absolute path: Reading}

    Raises DataError where the index was damaged, or made by another program.
    """
    if not INDEX.exists():
        return {}
    errors = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
    with one_line_errors(f"{INDEX} cannot be used and is made anew", *errors):
        content = json.loads(INDEX.read_text(encoding="utf-8"))
        if content["reader"] != READER:
            raise ValueError("it was made with other versions of the programs that read photos")
        index = {}
        for path, entry in content["photos"].items():
            reading = Reading(**entry)
            kinds = [type(value) for value in vars(reading).values()]
            if kinds != [int, int, str, str] or bool(reading.pixels) == bool(reading.problem):
                raise ValueError(f"the entry of {path}")
            index[path] = reading
        return index


def save_index(root, readings, log):
    """Add readings {path: Reading} to the index, and drop files below `root` that are gone."""
    index = {}
    with contextlib.suppress(DataError):
        index = load_index()  # anew: another process may have added to it
    for path, reading in readings.items():
        index[os.path.abspath(path)] = reading

    below = os.path.join(os.path.abspath(root), "")
    entries = {}
    for path, reading in index.items():
        if not path.startswith(below) or os.path.lexists(path):
            entries[path] = vars(reading)
    try:
        INDEX.parent.mkdir(parents=True, exist_ok=True)
        write_json(INDEX, {"reader": READER, "photos": entries})
    except OSError as error:
        log(f"cannot write {INDEX}, so the next start reads all photos: {first_line(error)}")


def read_photos(root, paths, log):
    """Read photos for their hashes, but not the pixels of those that are known from the index.

    On all cores: threads will do, since Pillow and hashlib work outside of Python's lock. What was
    read is kept even if a Git-LFS pointer or Ctrl-C ends it.   -> {path: Reading}
    """
    try:
        index = load_index()
    except DataError as error:
        log(str(error))
        index = {}

    readings = {}
    new = []
    for path in paths:
        known = index.get(os.path.abspath(path))
        if known is not None and known.is_of(path):
            readings[path] = known
        else:
            new.append(path)
    if not new:
        return readings

    threads = ThreadPoolExecutor(os.cpu_count())
    tried = threads.map(try_photo, new)
    try:
        for path in tqdm(new, desc="reading photos", unit="photo", leave=False):
            readings[path] = next(tried)
    finally:
        threads.shutdown(cancel_futures=True)
        save_index(root, readings, log)
    return readings


# ------------------------------------------------------------------- from a folder to concepts
def find_folder(root):
    """--data as a folder: the folder itself, or the local copy of a hub dataset of folders."""
    if pathlib.Path(root).is_dir():
        return pathlib.Path(root)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(root)):
        raise DataError(
            f"{root} is not a folder; wanted: one with a folder of photos for each thing, or the "
            "name of a hub dataset"
        )
    message = f"{root} is not a folder here, and as a dataset on the hub"
    with one_line_errors(message, OSError, ValueError):
        return pathlib.Path(snapshot_download(str(root), repo_type="dataset"))


def known_categories(root, log):
    """{concept name: category} from DreamBooth's class file or ObjectsWithStateChange's array.

    Empty where there is neither.
    """
    for file in (root / "prompts_and_classes.txt", root / "dataset/prompts_and_classes.txt"):
        if file.is_file():
            return read_classes(file)
    for file in sorted(root.glob("*.npy")):
        try:
            words = np.load(file, allow_pickle=False)
        except (ValueError, EOFError, OSError, MemoryError):
            words = None
        if words is None or words.ndim != 1 or words.dtype.kind != "U":
            log(
                f"{file} is not read, since it is no plain list of words (Python objects could run "
                'code): every category is "object"'
            )
            continue
        return {str(number): str(word) for number, word in enumerate(words)}
    return {}


def read_classes(file):
    """DreamBooth's prompts_and_classes.txt: "subject_name,class", then a line such as "dog2,dog"
    for each concept, until the word Prompts.   -> {concept name: category}"""
    with one_line_errors(f"{file} is not a text in UTF-8", OSError, ValueError):
        text = file.read_text(encoding="utf-8")
    categories = {}
    for line in text.split("Prompts")[0].splitlines():
        row = line.strip().split(",")
        if len(row) == 2 and row[0] != "subject_name":
            categories[row[0]] = row[1]
    return categories


@dataclass
class Place:
    """What the folders of a photo say of it."""

    folders: list[str]  # [concept] or [category, concept]; [] of a loose photo, in the root itself
    part: str  # "train", "test" or ""


def parse_folders(path, root):
    """Read a photo's Place off its path.   -> Place, whose folders may be too few or too many"""
    # PerVA has a layer of folders called "all".
    folders = [folder for folder in path.relative_to(root).parts[:-1] if folder != "all"]
    if len(folders) > 1 and folders[0] in WRAPPERS:
        folders = folders[1:]

    part = ""
    if folders and folders[0].rstrip("_") in ("train", "test"):  # some are called train_, test_
        part = folders[0].rstrip("_")
        folders = folders[1:]
    return Place(folders, part)


def refuse_ambiguous_folders(places):
    """Raise DataError where a folder has photos itself and in a folder inside.

    places {path: Place}
    """
    outer_folders = {}  # {name of a folder with photos: that folder}
    for path, place in places.items():
        if len(place.folders) == 1:
            outer_folders[place.folders[0]] = path.parent
    for path, place in places.items():
        if len(place.folders) == 2 and place.folders[0] in outer_folders:
            name = place.folders[0]
            outer = outer_folders[name]
            inner = path.parent
            raise DataError(
                f"{outer} has photos itself, and so has {inner}: is {name} a thing or a category? "
                f"If a thing, move the photos of {inner} up into {outer}; if a category, move the "
                f"photos that lie in {outer} itself into a folder of their own in there"
            )


def reason_to_skip(path, root):
    """Why a file is left out, by its path alone: what the log calls such files, or ""."""
    name = path.relative_to(root)
    parts = name.parts
    suffix = path.suffix.lower()
    if any(part.startswith(".") for part in parts):
        return "hidden files"
    if any(part in NOT_CONCEPTS for part in parts):
        return "unrelated photos, in folders called " + " or ".join(sorted(NOT_CONCEPTS))
    if suffix in VIDEO_SUFFIXES:
        return "videos"
    if suffix in UNREAD_SUFFIXES:
        return "files of a kind that is not read here (save them as JPEG or PNG)"
    if suffix in HEIC_SUFFIXES and suffix not in PHOTO_SUFFIXES:
        return "HEIC pictures (pip install pillow-heif, or save them as JPEG)"
    try:
        str(name).encode("utf-8")
    except UnicodeEncodeError:  # it could not be written into any record
        return "photos whose names are not UTF-8"
    return ""


class Found:
    """What is found in a folder of photos: photos by concept, and what had to be skipped."""

    def __init__(self):
        self.photos = defaultdict(list)  # {(category, concept name): [Photo]}
        self.skipped = defaultdict(list)  # {kind, in words: [file name, perhaps with a reason]}

    def leave_out_copies(self):
        """Of the copies of a picture keep one; none where they are of different concepts.

        A picture of two concepts would be target and negative at once. Of copies in the two parts
        of a benchmark that in "train" stays: a test should not be a copy of what was described.
        """
        owners = defaultdict(set)  # {pixels: concepts}
        in_train = set()  # pixels
        for concept, photos in self.photos.items():
            for photo in photos:
                owners[photo.pixels].add(concept)
                if photo.part == "train":
                    in_train.add(photo.pixels)

        for concept, photos in self.photos.items():
            kept = {}  # {pixels: Photo}
            for photo in photos:
                if len(owners[photo.pixels]) > 1:
                    self.skipped["photos that lie in the folders of two things"].append(photo.name)
                elif photo.pixels in kept or (photo.part == "test" and photo.pixels in in_train):
                    self.skipped["copies of another photo of the same thing"].append(photo.name)
                else:
                    kept[photo.pixels] = photo
            self.photos[concept] = list(kept.values())

    def concepts(self, least):
        """-> [Concept, ...] sorted by name, of those with at least `least` photos.

        Raises DataError where prompts would have no name for a concept, or one for two.
        """
        count = Counter(name for _, name in self.photos)
        concepts = []
        names = {}  # {name in prompts: name}
        for (category, name), photos in self.photos.items():
            if count[name] > 1:  # in two categories the same name is ambiguous
                name = f"{category}/{name}"
            if len(photos) < least:
                continue
            other = names.setdefault(tag(name), name)
            if other != name or tag(name) == "<>":
                raise DataError(
                    f"the folders {other} and {name} would both be called {tag(name)} in prompts; "
                    "rename one, with letters or digits"
                )
            concepts.append(Concept(name, category, photos))
        return sorted(concepts, key=lambda concept: natural(concept.name))

    def report(self, least, log, skipped_file):
        """Say what was skipped, and how much of it; each file goes into skipped_file, if given."""
        for photos in self.photos.values():
            if len(photos) < least:
                alone = [photo.name for photo in photos]
                self.skipped["things with one photo only"] += alone

        lines = []
        for kind, names in self.skipped.items():
            if names:
                log(f"skipped {kind}: {len(names)}, such as {printable(names[0])}")
                lines += [f"{kind}: {printable(name)}\n" for name in names]
        if skipped_file is None:
            return
        with one_line_errors(f"cannot write {skipped_file}", OSError):
            write_text(skipped_file, "".join(lines))
        if lines:
            log(f"every file that was skipped, and why: {skipped_file}")


def printable(name):
    """A file name in one line that any terminal can show.

    Of one that is not UTF-8 the bytes are spelled.
    """
    return str(name).encode("utf-8", "backslashreplace").decode("utf-8").replace("\n", "\\n")


def files_below(root):
    """All files below a folder, and below what its links lead to, in natural order.   -> [Path]

    No folder is entered twice: of one that is there itself and through a link, the link is left.
    """
    paths = []
    entered = set()
    waiting = [root]
    while waiting:
        for folder, folders, names in os.walk(waiting.pop(0)):
            if os.path.realpath(folder) in entered:
                folders.clear()
                continue
            entered.add(os.path.realpath(folder))
            paths += [pathlib.Path(folder, name) for name in names]
            below = [pathlib.Path(folder, name) for name in sorted(folders)]
            waiting += [path for path in below if path.is_symlink()]
    return sorted(paths, key=natural)


def find_photos(root, found, allow_loose):
    """Where the photos below a folder lie. What is no photo of a thing is added to found.skipped.

    -> {path: Place} in natural order
    """
    places = {}
    known = PHOTO_SUFFIXES | HEIC_SUFFIXES | VIDEO_SUFFIXES | UNREAD_SUFFIXES
    for path in files_below(root):
        if path.suffix.lower() not in known:
            continue
        name = path.relative_to(root)
        kind = reason_to_skip(path, root)
        if kind:
            found.skipped[kind].append(name)
            continue
        place = parse_folders(path, root)
        if not place.folders and not allow_loose:
            kind = "photos beside the folders of things (give each thing a folder)"
            found.skipped[kind].append(name)
        elif len(place.folders) > 2:
            kind = "photos too deep below (expected <thing>/photo or <category>/<thing>/photo)"
            found.skipped[kind].append(name)
        elif not path.is_file():  # a pipe would be waited for
            found.skipped["photos that cannot be read"].append(f"{name} (not a file)")
        else:
            places[path] = place
    refuse_ambiguous_folders(places)
    return places


def load_concepts(root, log=print, least=2, skipped_file=None):
    """Read a folder of photos.   -> [Concept, ...] sorted by name, each with `least` photos or more

    Every photo is read once, so that a broken one is found now and not in the middle of training;
    what that showed is known to the next start (`read_photos`). Photos that cannot be read or lie
    nowhere in particular, copies (see `Found.leave_out_copies`), and concepts left with too few are
    skipped, counted and reported through `log`, and each file, with the reason, is a line of
    skipped_file, if given. If one photo is enough (least=1), a photo in the root itself is a
    concept named as its file. Raises DataError for a folder without concepts, for a concept's
    folder with photos in a folder inside, and for Git-LFS pointers.
    """
    root = find_folder(root)
    categories = known_categories(root, log)
    found = Found()
    places = find_photos(root, found, allow_loose=least == 1)
    readings = read_photos(root, places, log)
    for path, place in places.items():
        name = path.relative_to(root)
        reading = readings[path]
        if reading.problem:
            found.skipped["photos that cannot be read"].append(f"{name} ({reading.problem})")
            continue

        concept = place.folders[-1] if place.folders else path.stem
        category = categories.get(concept, "object")
        if len(place.folders) == 2:
            category = CATEGORY_WORDS.get(place.folders[0], place.folders[0])
        load = partial(read_photo, path)
        photo = Photo(str(name), load, part=place.part, pixels=reading.pixels)
        found.photos[category, concept].append(photo)

    found.leave_out_copies()
    found.report(least, log, skipped_file)
    concepts = found.concepts(least)
    if not concepts:
        wanted = "two readable photos" if least == 2 else "a readable photo"
        raise DataError(
            f"{root} has no concept with {wanted}; put the photos of each thing in a folder of "
            "its own"
        )
    log(in_a_line(concepts))
    return concepts


def in_a_line(concepts):
    """What was found: "3 things: bo 4 photos, mug 6 photos, rex 2 photos".

    With the categories, if there are any, and in their order; of many things, the first are named.
    """
    parts = []
    title = plural(len(concepts), "thing")
    categories = {concept.category for concept in concepts}
    if categories == {"object"}:
        in_order = concepts
    else:
        in_order = sorted(concepts, key=lambda concept: natural(concept.category))
        title += f" in {len(categories)} categories" if len(categories) > 1 else " in 1 category"
    for concept in in_order[:NAMED]:
        name = concept.name
        if categories != {"object"} and not name.startswith(f"{concept.category}/"):
            name = f"{concept.category}/{name}"
        parts.append(f"{printable(name)} {plural(len(concept.photos), 'photo')}")
    if len(concepts) > NAMED:
        others = sum(len(concept.photos) for concept in in_order[NAMED:])
        parts.append(f"and {len(concepts) - NAMED} more with {plural(others, 'photo')}")
    return f"{title}: {', '.join(parts)}"


def plural(count, word):
    """-> "1 photo", "2 photos" """
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def tag(name):
    """A concept's name as prompts and captions write it: one word in angle brackets.

    Letters, digits, - and what is not ASCII, such as an emoji, stay; the rest becomes _.
    """
    words = " ".join(name.split())
    return "<" + re.sub(r"[^\w\-\u00a1-\U0010ffff]+", "_", words).strip("_") + ">"


def split_concepts(concepts, seed, unseen=None):
    """Split concepts, not photos (departure 4).   -> Split

    unseen: whole categories that are never trained on; by default, of four categories or more, a
    sixth of them, at least one, if enough concepts are left for a pool. Of the other concepts a
    fifth, at least one, is kept for testing. (Our fractions.)
    """
    rng = random.Random(f"split {seed}")
    categories = sorted({concept.category for concept in concepts})
    if unseen is None:
        unseen = []
        if len(categories) >= 4:
            unseen = rng.sample(categories, max(1, len(categories) // 6))
        seen = [concept for concept in concepts if concept.category not in unseen]
        if len(seen) - max(1, len(seen) // 5) < POOL:
            unseen = []
    shuffled = rng.sample(concepts, len(concepts))

    # Order by rounds: the first concept of every category, then the second of every one, and so
    # on. The end of this list is the test set. Of three mugs, two cups and two toys it is
    #     cup mug toy   cup mug toy   mug
    # so a mug is tested first, since there are most of them, then a toy, then another mug.
    dealt = Counter()
    rounds = []  # (round, category, concept)
    for concept in shuffled:
        if concept.category not in unseen:
            rounds.append((dealt[concept.category], concept.category, concept))
            dealt[concept.category] += 1
    rounds.sort(key=lambda entry: entry[:2])
    in_order = [concept for _, _, concept in rounds]

    tests = max(1, len(in_order) // 5)
    return Split(
        train=in_order[:-tests],
        test=in_order[-tests:],
        unseen=[concept for concept in concepts if concept.category in unseen],
    )


def pick_concepts(concepts, wanted, seed):
    """The concepts that --train-concepts asks for.   -> [Concept, ...] in the order of `concepts`

    wanted: a number, or a file with a name a line. So many are drawn that their photos are about
    a thousand: of many draws the one that comes nearest is taken, as the RRG authors draw PerVA's
    30. Raises DataError for a number that is too large, and for names that are not there.
    """
    if not wanted.isdecimal():
        with one_line_errors(f"--train-concepts wants a number or a file; {wanted}", OSError):
            lines = pathlib.Path(wanted).read_text(encoding="utf-8").splitlines()
        names = {line.strip() for line in lines if line.strip()}
    elif 1 <= int(wanted) <= len(concepts):
        rng = random.Random(f"train concepts {seed}")
        draws = [rng.sample(concepts, int(wanted)) for _ in range(DRAWS)]
        best = min(draws, key=photos_off_a_thousand)
        names = {concept.name for concept in best}
    else:
        raise DataError(f"--train-concepts {wanted}: there are {len(concepts)} concepts here")

    missing = sorted(names - {concept.name for concept in concepts})
    if missing:
        raise DataError(
            f"{wanted} names {len(missing)} concepts that are not in the data, such as {missing[0]}"
        )
    return [concept for concept in concepts if concept.name in names]


def photos_off_a_thousand(concepts):
    """How far the number of all their photos is from 1000."""
    return abs(1000 - sum(len(concept.photos) for concept in concepts))


# --------------------------------------------------------------------------- stage 1: mine games
class Similarity:
    """Similarity to one target photo: of a photo the cosine, which for unit vectors is the dot
    product; of a concept the mean cosine of its photos."""

    def __init__(self, to_photo, to_concept):
        self.to_photo = to_photo  # {photo name: float}
        self.to_concept = to_concept  # {concept name: float}

    def of_photo(self, photo):
        return self.to_photo[photo.name]

    def of_concept(self, concept):
        return self.to_concept[concept.name]

    def best_photo(self, concept):
        return max(concept.photos, key=self.of_photo)


class Similarities:
    """Similarity to any target, among all photos of some concepts.

    vectors {photo name: unit vector [D]}; the vector of a concept is the mean of its photos'.
    """

    def __init__(self, concepts, vectors):
        self.vectors = vectors
        photo_vectors = {}
        concept_vectors = {}
        for concept in concepts:
            of_concept = {photo.name: vectors[photo.name] for photo in concept.photos}
            photo_vectors |= of_concept
            concept_vectors[concept.name] = torch.stack(list(of_concept.values())).mean(0)
        self.photo_names = list(photo_vectors)
        self.concept_names = list(concept_vectors)
        self.of_photos = torch.stack(list(photo_vectors.values()))  # [photos, D]
        self.of_concepts = torch.stack(list(concept_vectors.values()))  # [concepts, D]

    def to_targets(self, targets):
        """All at once, since thousands of single dot products are slow.   -> [Similarity] * T"""
        of_targets = torch.stack([self.vectors[target.name] for target in targets])  # [T, D]
        to_photos = (of_targets @ self.of_photos.T).tolist()  # T lists, one number a photo
        to_concepts = (of_targets @ self.of_concepts.T).tolist()
        rows = []
        for to_photo, to_concept in zip(to_photos, to_concepts, strict=True):
            to_photo = dict(zip(self.photo_names, to_photo, strict=True))
            to_concept = dict(zip(self.concept_names, to_concept, strict=True))
            rows.append(Similarity(to_photo, to_concept))
        return rows


def hard_negatives(concept, others, similarity, count):
    """The most similar photos of the most similar other concepts, of its category if it can be.

    -> (count photos, whether the 8 most similar of its category were too few)
    """
    by_similarity = sorted(others, key=similarity.of_concept, reverse=True)
    same_category = [other for other in by_similarity if other.category == concept.category][:8]
    photos = [similarity.best_photo(other) for other in same_category]
    photos = sorted(photos, key=similarity.of_photo, reverse=True)[:count]

    # What is missing comes from those left over: of other categories, and of its own beyond the 8
    # where more than 8 are wanted.
    missing = count - len(photos)
    if missing == 0:
        return photos, False
    left_over = [other for other in by_similarity if other not in same_category]
    return photos + [similarity.best_photo(other) for other in left_over[:missing]], True


def of_other_categories(concept, others, count):
    """The others that are not of the concept's category. Raises DataError for fewer than count."""
    elsewhere = [other for other in others if other.category != concept.category]
    if len(elsewhere) < count:
        raise DataError(
            f"--negatives other wants {count} things that are no {concept.category}, here are only "
            f"{len(elsewhere)}; give things of more categories"
        )
    return elsewhere


def random_negatives(others, count, rng):
    """Any photos of any of these concepts, of which there are `count` or more.   -> count photos"""
    return [rng.choice(other.photos) for other in rng.sample(others, count)]


def mine_games(
    concepts,
    vectors,
    k,
    seed,
    *,
    rivals=None,
    negatives="hard",
    positive="hard",
    log=print,
):
    """Stage 1: one game for every photo of `concepts`.   -> [Game, ...]

        hard positive    the photo of the same concept least similar to the target
                         ("easy": the most similar one)
        hard negatives   of the 8 most similar other concepts of its category the most similar
                         photo each, and of these the best k - 1
                         ("random": any photos of any other concepts;
                         "other": of any concepts of other categories)

    vectors {photo name: unit vector [D]}; the vector of a concept is the mean of its photos'.
    rivals: the concepts that negatives come from, by default `concepts`. A category with fewer
    than k - 1 other concepts is filled up from other categories, which is reported through `log`.
    Raises DataError if there are fewer than k concepts in all, or, for "other", fewer than k - 1 of
    other categories.
    """
    rivals = rivals or concepts
    if len({concept.name for concept in rivals}) < k:
        raise DataError(
            f"a pool of K={k} photos needs {k} concepts, here are only {len(rivals)}; add some or "
            "lower --k"
        )
    similarities = Similarities(concepts + rivals, vectors)
    games = []
    filled_up = 0
    for concept in concepts:
        others = [rival for rival in rivals if rival.name != concept.name]
        to_targets = similarities.to_targets(concept.photos)
        for target, similarity in zip(concept.photos, to_targets, strict=True):
            rng = random.Random(f"game {seed} {target.name}")

            # The positive: another photo of the same concept.
            same_concept = [photo for photo in concept.photos if photo is not target]
            if positive == "hard":
                chosen_positive = min(same_concept, key=similarity.of_photo)
            else:
                chosen_positive = max(same_concept, key=similarity.of_photo)

            # The negatives: photos of other concepts.
            if negatives == "hard":
                chosen, filled = hard_negatives(concept, others, similarity, k - 1)
                filled_up += filled
            elif negatives == "random":
                chosen = random_negatives(others, k - 1, rng)
            else:
                elsewhere = of_other_categories(concept, others, k - 1)
                chosen = random_negatives(elsewhere, k - 1, rng)

            # The pool, shuffled, so that the place in it tells nothing.
            candidates = [chosen_positive, *chosen]
            pool = rng.sample(candidates, k)
            games.append(
                Game(concept.name, concept.category, target, pool, pool.index(chosen_positive))
            )
    if filled_up:
        log(
            f"{filled_up} of {len(games)} games take negatives from other categories: theirs has "
            f"fewer than {k - 1} other concepts"
        )
    return games


def games_of_step(games, step, size, seed):
    """The `size` games of training step `step`, counted from 0.   -> [Game] * size

    Every epoch, a pass over all games, has a fresh order. It follows from step and seed alone, so
    a run that goes on after a stop has nothing to restore.
    """
    chosen = []
    orders = {}  # {epoch: all games in the order of that pass}
    for place in range(step * size, (step + 1) * size):
        epoch, place_in_epoch = divmod(place, len(games))
        if epoch not in orders:
            rng = random.Random(f"epoch {seed} {epoch}")
            orders[epoch] = rng.sample(games, len(games))
        chosen.append(orders[epoch][place_in_epoch])
    return chosen
