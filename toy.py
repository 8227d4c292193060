"""toy.py: a drawn world in which the truth is known, and the oracle that knows it.

A concept is one toy: a category (its shape) and an identity (body colour, pattern, badge). A
photo of it adds a view (the place it stands on, its pose, the light) and a jitter of size,
position, angle and tint that no word stands for. Identity is what a personal assistant should
remember; the view is what it should leave out.

Photos come in albums, as people take them: each concept has two *occasions* of three photos each,
and the photos of one occasion share its view. So two photos of the same thing may have everything
in common, or little but the thing itself: another occasion has another place, pose or light, mostly
two or all three of them (82 %). Only such a photo, the hard positive, tells identity from view. A
benchmark's references are of the first occasion, its tests of the other.

Every attribute has words of its own ("red" can only be a body colour), so what a text claims can
be read off its words and compared with what is true of a photo:

    truth         category mug, colour red, pattern striped, badge star,
                  place grass, pose tilted, light dim
    description   A photo of a red mug. The red striped mug with a heart badge, tilted on grass.

    claims        red, mug, red, striped, mug, heart, tilted, grass
    oracle        False: the badge is a star
    leaks         True: it mentions pose and place
    coverage      1: it names colour, pattern and badge, right or wrong

No model judges here, and nothing of this is ever a reward: it only measures. The world costs no
download and about a second to draw. The checkpoint that sees it is toy-qwen2-vl/.

Words: an attribute is a `kind` and a `word` of that kind. A `subject` {kind: word} holds the
category and the identity of a concept, a `view` {kind: word} place, pose and light, and a `truth`
both: all that is true of one photo.

To have things of your own that the toy model can see, draw a folder of toys:

    python toy.py --photos my_toys    # things/, new photos of them in new/, and what to do next
"""

import json
import math
import pathlib
import random
import shlex
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps

import run
from data import Concept, DataError, Photo, one_line_errors
from reward import Description
from run import option

FOLDER = pathlib.Path(__file__).parent / "toy-qwen2-vl"  # the checkpoint that knows this world
ATTRIBUTES = {
    "category": ["mug", "bottle", "boot", "fish", "car", "house", "bear", "lamp", "bag", "duck"],
    "colour": ["red", "brown", "yellow", "green", "blue", "purple", "pink", "white"],
    "pattern": ["plain", "striped", "dotted", "checkered", "split", "bordered"],
    "badge": ["star", "heart", "moon", "cross", "ring", "bolt"],
    "place": ["grass", "sand", "snow", "water", "wood", "brick"],
    "pose": ["upright", "tilted", "fallen"],
    "light": ["bright", "dim", "misty"],
}
IDENTITY = ("colour", "pattern", "badge")
SUBJECT = ("category", *IDENTITY)
VIEW = ("place", "pose", "light")
KIND_OF = {word: kind for kind, words in ATTRIBUTES.items() for word in words}
UNSEEN = ("lamp", "bag", "duck")  # no game trains on them: the paper's unseen domains
# What things are called, no two of a world alike: a name tells nothing about its thing. All names
# that the checkpoint can spell, in angle brackets one token each.
NAMES = (
    "Abel Ada Aiko Alma Amir Anouk Arjun Asta Ayla Bao Bela Bilal Birte Bodo Bruno Carlo Chidi "
    "Chloe Clio Cora Cyril Dalia Dario Deniz Dina Dmitri Edda Efua Eino Elif Emeka Enzo Esra Ewa "
    "Fatou Felix Fiona Flora Fritz Gita Goran Greta Gus Hana Hassan Henk Hugo Ida Igor Imani Ines "
    "Ivo Jana Jarl Jomo Jonas Juan Juno Kaito Kamal Karin Kira Kofi Lars Leila Levi Linh Luca Luz "
    "Lwazi Maja Malik Marta Mateo Mei Milan Mina Mirko Musa Nadia Naoko Nell Nils Noa Nuria Ola "
    "Olga Omar Otis Otto Pavel Petra Pia Pola Quinn Quynh Rafa Rania Ravi Romy Rosa Ruben Sami "
    "Sanna Selma Sofia Soren Stina Suri Tara Taras Tariq Thandi Timo Tomas Tove Ugo Uma Umar Ursa "
    "Vera Viggo Viktor Wanda Wei Wim Xenia Yara Yoko Yuki Yusuf Zara Zeno Zoe Zola"
).split()
SIDE = 64  # pixels of a photo, either way
PATCH = 8  # pixels of one of the checkpoint's vision patches; those of real ones are 14


def is_toy(folder):
    """Is this the checkpoint of a toy model, the shipped one or one that you made?

    It is recognised by the width of its patches. Raises DataError on a broken config.json.
    """
    file = pathlib.Path(folder) / "config.json"
    if not file.is_file():
        return False
    with one_line_errors(f"cannot read {file}", OSError, ValueError):
        config = json.loads(file.read_text(encoding="utf-8"))
    return config.get("vision_config", {}).get("patch_size") == PATCH


# ------------------------------------------------------------------------------ shapes and colours
RGB = {
    "red": (205, 35, 40),
    "brown": (140, 85, 45),
    "yellow": (242, 218, 45),
    "green": (45, 155, 60),
    "blue": (45, 80, 210),
    "purple": (125, 45, 165),
    "pink": (250, 150, 195),
    "white": (245, 245, 245),
}
GROUND = {
    "grass": (95, 160, 70),
    "sand": (222, 195, 140),
    "snow": (228, 236, 246),
    "water": (70, 140, 190),
    "wood": (140, 95, 60),
    "brick": (165, 90, 75),
}
LIGHT = {"bright": (1.0, 0), "dim": (0.5, 0), "misty": (0.55, 97)}  # (contrast, brightness)
ANGLE = {"upright": 0, "tilted": 45, "fallen": 90}  # degrees, to either side
INK = (35, 35, 45)
PAPER = (255, 255, 255)
FLAKE = (170, 195, 230)
WAVE = (110, 180, 225)
MORTAR = (215, 205, 195)


@dataclass(frozen=True)
class Outline:
    """A closed line, to be filled. x grows to the right, y downwards."""

    form: str  # "oval" or "polygon"
    points: list  # two corners of the box around the oval, or the corners of the polygon
    is_hole: bool = False  # what it encloses is cut out


def oval(left, top, right, bottom):
    return Outline("oval", [(left, top), (right, bottom)])


def oval_hole(left, top, right, bottom):
    return Outline("oval", [(left, top), (right, bottom)], is_hole=True)


def rectangle(left, top, right, bottom):
    return polygon((left, top), (right, top), (right, bottom), (left, bottom))


def polygon(*corners):
    return Outline("polygon", list(corners))


@dataclass(frozen=True)
class Shape:
    """What a category looks like, in a unit square."""

    badge: tuple[float, float]  # where the centre of the badge is
    outlines: list[Outline]  # filled or cut out in this order


SHAPES = {
    "mug": Shape(
        badge=(0.41, 0.53),
        outlines=[
            oval(0.55, 0.28, 0.98, 0.76),
            oval_hole(0.67, 0.4, 0.86, 0.64),
            rectangle(0.1, 0.12, 0.72, 0.93),
        ],
    ),
    "bottle": Shape(
        badge=(0.5, 0.67),
        outlines=[
            polygon(
                (0.39, 0.02),
                (0.61, 0.02),
                (0.61, 0.3),
                (0.78, 0.42),
                (0.78, 0.98),
                (0.22, 0.98),
                (0.22, 0.42),
                (0.39, 0.3),
            )
        ],
    ),
    "boot": Shape(
        badge=(0.42, 0.6),
        outlines=[
            polygon(
                (0.18, 0.03),
                (0.62, 0.03),
                (0.62, 0.48),
                (0.98, 0.66),
                (0.98, 0.96),
                (0.18, 0.96),
            )
        ],
    ),
    "fish": Shape(
        badge=(0.39, 0.5),
        outlines=[
            oval(0.02, 0.16, 0.78, 0.84),
            polygon((0.62, 0.5), (0.98, 0.14), (0.98, 0.86)),
        ],
    ),
    "car": Shape(
        badge=(0.5, 0.46),
        outlines=[
            polygon(
                (0.02, 0.46),
                (0.18, 0.42),
                (0.32, 0.14),
                (0.72, 0.14),
                (0.84, 0.42),
                (0.98, 0.46),
                (0.98, 0.8),
                (0.02, 0.8),
            ),
            oval(0.1, 0.62, 0.38, 0.92),
            oval(0.62, 0.62, 0.9, 0.92),
        ],
    ),
    "house": Shape(
        badge=(0.5, 0.6),
        outlines=[
            polygon(
                (0.5, 0.02),
                (0.99, 0.42),
                (0.86, 0.42),
                (0.86, 0.97),
                (0.14, 0.97),
                (0.14, 0.42),
                (0.01, 0.42),
            )
        ],
    ),
    "bear": Shape(
        badge=(0.5, 0.58),
        outlines=[
            oval(0.12, 0.14, 0.88, 0.97),
            oval(0.04, 0.02, 0.38, 0.36),
            oval(0.62, 0.02, 0.96, 0.36),
        ],
    ),
    "lamp": Shape(
        badge=(0.5, 0.35),
        outlines=[
            polygon((0.28, 0.02), (0.72, 0.02), (0.97, 0.6), (0.03, 0.6)),
            rectangle(0.44, 0.6, 0.56, 0.9),
            oval(0.22, 0.84, 0.78, 0.99),
        ],
    ),
    "bag": Shape(
        badge=(0.5, 0.68),
        outlines=[
            oval(0.24, 0.03, 0.76, 0.66),
            oval_hole(0.36, 0.15, 0.64, 0.54),
            polygon((0.08, 0.36), (0.92, 0.36), (0.98, 0.97), (0.02, 0.97)),
        ],
    ),
    "duck": Shape(
        badge=(0.44, 0.67),
        outlines=[
            oval(0.03, 0.36, 0.88, 0.97),
            oval(0.48, 0.03, 0.88, 0.47),
            polygon((0.84, 0.18), (1, 0.27), (0.84, 0.34)),
        ],
    ),
}


def star():
    """A star of five points: ten corners, every other one nearer to the centre."""
    corners = []
    for corner in range(10):
        radius = 1 if corner % 2 == 0 else 0.42
        angle = corner * math.pi / 5
        corners.append((math.sin(angle) * radius, -math.cos(angle) * radius))
    return polygon(*corners)


@dataclass(frozen=True)
class Stroke:
    """One filled outline of a badge. (0, 0) is its centre; 1 is three quarters of its radius."""

    colour: tuple[int, int, int]
    outline: Outline


DISC = oval(-1, -1, 1, 1)
BADGES = {
    "star": [Stroke((225, 160, 0), star())],
    "heart": [
        Stroke(
            (220, 20, 50),
            polygon(
                (0, 0.95),
                (-0.95, -0.1),
                (-0.9, -0.6),
                (-0.5, -0.85),
                (0, -0.4),
                (0.5, -0.85),
                (0.9, -0.6),
                (0.95, -0.1),
            ),
        )
    ],
    "moon": [
        Stroke((40, 70, 200), oval(-0.9, -0.9, 0.9, 0.9)),
        Stroke(PAPER, oval(-0.25, -0.85, 1.15, 0.55)),
    ],
    "cross": [
        Stroke((20, 140, 60), rectangle(-0.28, -0.9, 0.28, 0.9)),
        Stroke((20, 140, 60), rectangle(-0.9, -0.28, 0.9, 0.28)),
    ],
    "ring": [
        Stroke(INK, oval(-0.85, -0.85, 0.85, 0.85)),
        Stroke(PAPER, oval(-0.42, -0.42, 0.42, 0.42)),
    ],
    "bolt": [
        Stroke(
            (140, 30, 170),
            polygon(
                (0.35, -1),
                (-0.6, 0.15),
                (-0.05, 0.15),
                (-0.35, 1),
                (0.6, -0.2),
                (0.05, -0.2),
            ),
        )
    ],
}


# ------------------------------------------------------------------------------------------ drawing
def fill(canvas, outline, colour, x=0.0, y=0.0, unit=1.0):
    """Fill an outline whose origin is at (x, y) and whose 1 is `unit` pixels long."""
    points = [(x + unit * px, y + unit * py) for px, py in outline.points]
    if outline.form == "oval":
        canvas.ellipse(points, fill=colour)
    else:
        canvas.polygon(points, fill=colour)


def darker(colour, share):
    return tuple(int(value * share) for value in colour)


def tinted(colour, rng):
    """The colour, each channel a little off: no two photos have exactly the same red."""
    shifted = [value + rng.randint(-10, 10) for value in colour]
    return tuple(max(0, min(255, value)) for value in shifted)


def draw_scattered(canvas, place, size, colour, rng):
    """Blades of grass, grains of sand or flakes of snow, anywhere."""
    grain = oval(0, 0, 1, 1)
    for _ in range(70):
        x = rng.random() * size
        y = rng.random() * size
        if place == "grass":
            tip = (x + size * 0.02, y - size * 0.07)
            canvas.line([(x, y), tip], fill=colour, width=max(1, size // 64))
        elif place == "sand":
            fill(canvas, grain, colour, x, y, size * 0.02)
        else:
            fill(canvas, grain, FLAKE, x, y, size * 0.035)


def draw_waves(canvas, size, rng):
    """Nine wavy lines, each of 24 pieces, one below the other."""
    for wave in range(9):
        middle = size * (wave + 0.5) / 9
        phase = rng.random() * 6
        points = []
        for i in range(25):
            y = middle + size * 0.02 * math.sin(i * 0.9 + phase)
            points.append((size * i / 24, y))
        canvas.line(points, fill=WAVE, width=2 * max(1, size // 64))


def draw_courses(canvas, size, colour, courses, joints):
    """Boards, or rows of bricks, which have upright joints between them, shifted by half a brick
    in every other row."""
    width = 2 * max(1, size // 64)
    height = size / courses
    for course in range(courses):
        top = course * height
        bottom = (course + 1) * height
        canvas.line([0, top, size, top], fill=colour, width=width)
        shift = 0.5 * (course % 2)
        for joint in range(joints):
            x = size * (joint + shift) / 4.5
            canvas.line([x, top, x, bottom], fill=colour, width=width)


def draw_ground(place, size, rng):
    """The place a toy stands on: a tinted square of `size` pixels with a texture of its own."""
    colour = tinted(GROUND[place], rng)
    dark = darker(colour, 0.72)
    image = Image.new("RGB", (size, size), colour)
    canvas = ImageDraw.Draw(image)
    if place == "water":
        draw_waves(canvas, size, rng)
    elif place == "wood":
        draw_courses(canvas, size, dark, courses=5, joints=0)
    elif place == "brick":
        draw_courses(canvas, size, MORTAR, courses=8, joints=5)
    else:
        draw_scattered(canvas, place, size, dark, rng)
    return image


def draw_pattern(canvas, pattern, size, colour, badge_y):
    """The pattern, all over a square of `size` pixels: the silhouette cuts the toy out of it."""
    last = size - 1  # the last pixel, which is 1 in the unit square

    if pattern == "striped":  # five stripes, as wide as the gaps between them
        for stripe in range(5):
            left = last * (stripe + 0.25) / 5
            right = last * (stripe + 0.75) / 5
            canvas.rectangle([left, 0, right, size], fill=colour)

    if pattern == "dotted":  # 5.5 dots to a side, shifted by half a gap in every other row
        for row in range(6):
            shift = 0.5 * (row % 2)
            y = last * (row + 0.3) / 5.5
            for column in range(6):
                x = last * (column + 0.25 + shift) / 5.5
                fill(canvas, DISC, colour, x, y, last * 0.045)

    if pattern == "checkered":  # seven by seven squares, every other one
        for row in range(7):
            for column in range((row + 1) % 2, 7, 2):
                left = last * column / 7
                top = last * row / 7
                right = last * (column + 1) / 7
                bottom = last * (row + 1) / 7
                canvas.rectangle([left, top, right, bottom], fill=colour)

    if pattern == "split":  # below the badge's centre
        canvas.rectangle([0, last * badge_y, size, size], fill=colour)


def draw_silhouette(shape, size):
    """White where the toy is, black elsewhere."""
    silhouette = Image.new("L", (size, size), 0)
    canvas = ImageDraw.Draw(silhouette)
    for outline in shape.outlines:
        brightness = 0 if outline.is_hole else 255
        fill(canvas, outline, brightness, unit=size - 1)
    return silhouette


def without_rim(silhouette, width):
    """The silhouette, shrunk by half of `width` pixels all around."""
    # MinFilter shrinks, wants an odd width, and needs a margin to shrink from the edges, too.
    width = width | 1
    shrunk = ImageOps.expand(silhouette, width).filter(ImageFilter.MinFilter(width))
    return ImageOps.crop(shrunk, width)


def draw_subject(truth, size, rng):
    """The toy itself, upright, on a transparent square of `size` pixels."""
    shape = SHAPES[truth["category"]]
    badge_x, badge_y = shape.badge
    colour = tinted(RGB[truth["colour"]], rng)
    dark = darker(colour, 0.45)

    # The body, and around it a rim: a broad dark one is the pattern "bordered".
    body = Image.new("RGB", (size, size), colour)
    draw_pattern(ImageDraw.Draw(body), truth["pattern"], size, dark, badge_y)
    silhouette = draw_silhouette(shape, size)
    if truth["pattern"] == "bordered":
        rim = max(3, int(size * 0.11))
        cutout = Image.new("RGB", (size, size), dark)
    else:
        rim = max(3, int(size * 0.03))
        cutout = Image.new("RGB", (size, size), INK)
    cutout.paste(body, mask=without_rim(silhouette, rim))

    # The badge, on a white disc with a line around it.
    canvas = ImageDraw.Draw(cutout)
    last = size - 1
    x = last * badge_x
    y = last * badge_y
    fill(canvas, DISC, INK, x, y, last * 0.22)
    fill(canvas, DISC, PAPER, x, y, last * 0.205)
    for stroke in BADGES[truth["badge"]]:
        fill(canvas, stroke.outline, stroke.colour, x, y, last * 0.155)

    cutout.putalpha(silhouette)
    return cutout


@dataclass(frozen=True)
class Jitter:
    """What differs between two photos of the same truth."""

    angle: float  # degrees
    scale: float  # the toy's size, as a share of the photo's
    x: float  # of its centre, as a share of the photo's size
    y: float
    seed: float  # of tints and textures


def draw(truth, jitter, size=SIDE):
    """One photo.   truth {kind: word} of all seven kinds -> RGB picture of size x size pixels"""
    rng = random.Random(jitter.seed)
    # Three times too large, and averaged at the end: that makes smooth edges.
    large = 3 * size
    image = draw_ground(truth["place"], large, rng)

    cutout = draw_subject(truth, int(large * jitter.scale), rng)
    cutout = cutout.rotate(jitter.angle, expand=True, resample=Image.BICUBIC)
    left = int(large * jitter.x - cutout.width / 2)
    top = int(large * jitter.y - cutout.height / 2)
    image.paste(cutout, (left, top), mask=cutout)

    contrast, brightness = LIGHT[truth["light"]]
    lit = [int(contrast * value + brightness) for value in range(256)]
    return image.resize((size, size), Image.BOX).point(lit * 3)


# ----------------------------------------------------------------- subjects, albums, photos, worlds
@dataclass(frozen=True)
class Occasion:
    """What the photos that are taken at one time and place have in common."""

    view: dict[str, str]  # {kind: word} of VIEW
    side: int  # -1 or 1: where a toy that does not stand upright leans to


def new_view(rng):
    """A random {kind: word} of VIEW."""
    return {kind: rng.choice(ATTRIBUTES[kind]) for kind in VIEW}


def new_occasion(rng):
    return Occasion(new_view(rng), rng.choice([-1, 1]))


def new_jitter(occasion, rng):
    """What differs between the photos of an occasion."""
    return Jitter(
        angle=ANGLE[occasion.view["pose"]] * occasion.side + rng.uniform(-8, 8),
        scale=rng.uniform(0.66, 0.76),
        x=rng.uniform(0.44, 0.56),
        y=rng.uniform(0.44, 0.56),
        seed=rng.random(),
    )


def new_occasions(count, rng):
    """Occasions of which no two have the same view.   -> [Occasion] * count"""
    occasions = []
    while len(occasions) < count:
        occasion = new_occasion(rng)
        if occasion.view not in [other.view for other in occasions]:
            occasions.append(occasion)
    return occasions


def is_fresh(subject):
    """A quarter of all subjects is never pictured while the base model is made; only descriptions
    that are to be refused may speak of one. Games and the report card use only these."""
    return random.Random(" ".join(subject.values())).random() < 0.25


def new_subject(rng, category=None, fresh=False):
    """A random {category, colour, pattern, badge}, from the fresh quarter or from the rest."""
    while True:
        subject = {kind: rng.choice(ATTRIBUTES[kind]) for kind in SUBJECT}
        if category:
            subject["category"] = category
        if is_fresh(subject) == fresh:
            return subject


def take_photo(name, subject, occasion, rng, size=SIDE, part=""):
    """A Photo of a subject {kind: word} on an occasion.   part: as of data.Photo"""
    truth = subject | occasion.view
    return Photo(name, partial(draw, truth, new_jitter(occasion, rng), size), truth, part)


def altered(truth, kinds, rng):
    """`truth` with another word for each of `kinds`."""
    changed = dict(truth)
    for kind in kinds:
        others = [word for word in ATTRIBUTES[kind] if word != truth[kind]]
        changed[kind] = rng.choice(others)
    return changed


def look_alikes(category, count, rng):
    """`count` fresh subjects of a category, grown from one another by changing one attribute, so
    that every attribute is sometimes the only difference."""
    subjects = [new_subject(rng, category, fresh=True)]
    while len(subjects) < count:
        kind = rng.choice(IDENTITY)
        subject = rng.choice(subjects) | {kind: rng.choice(ATTRIBUTES[kind])}
        rejected = rng.random() < 0.1 or not is_fresh(subject)
        if rejected and rng.random() >= 0.1:
            continue
        if rejected:  # now and then a new family: this one may have no fresh look-alike left
            subject = new_subject(rng, category, fresh=True)
        if subject not in subjects:
            subjects.append(subject)
    return subjects


def take_album(name, subject, occasions, photos, rng, size=SIDE):
    """Photos of a subject: `photos` on each of `occasions`.   -> [Photo, ...], called NAME/1, ...

    Those of the first occasion are "train", to be described, and the others "test".
    """
    album = []
    for number, occasion in enumerate(new_occasions(occasions, rng)):
        part = "train" if number == 0 else "test"
        for _ in range(photos):
            title = f"{name}/{len(album) + 1}"
            album.append(take_photo(title, subject, occasion, rng, size, part))
    return album


def world(seed, size=SIDE, concepts=12, occasions=2, photos=3):
    """The default data set.   -> [data.Concept, ...]

    `concepts` concepts of each category, look-alikes of one another and all fresh, with an album
    of `photos` photos on each of `occasions`, of size x size pixels each. Names are drawn, up to
    twelve a category. Photos are drawn when they are loaded.
    """
    names = random.Random(f"names {seed}").sample(NAMES, len(ATTRIBUTES["category"]) * concepts)
    everything = []
    for category in ATTRIBUTES["category"]:
        rng = random.Random(f"world {seed} {category}")
        for subject in look_alikes(category, concepts, rng):
            name = names.pop()
            album = take_album(f"{category}/{name}", subject, occasions, photos, rng, size)
            everything.append(Concept(name, category, album))
    return everything


# -------------------------------------------------------------------------------------------- words
def sentence(truth, kinds):
    """A description that claims the category and, of the other kinds, those in `kinds`.

    -> (coarse, detailed), such as ("A photo of a red mug", "The red mug, tilted on grass.")
    """
    colour = f"{truth['colour']} " if "colour" in kinds else ""
    pattern = f"{truth['pattern']} " if "pattern" in kinds else ""
    badge = f" with a {truth['badge']} badge" if "badge" in kinds else ""

    view = ""
    if "pose" in kinds:
        view += f" {truth['pose']}"
    if "place" in kinds:
        view += f" on {truth['place']}"
    if "light" in kinds:
        view += f" in {truth['light']} light"
    if view:
        view = "," + view

    coarse = f"A photo of a {colour}{truth['category']}"
    detailed = f"The {colour}{pattern}{truth['category']}{badge}{view}."
    return coarse, detailed


def description(truth, kinds):
    """The same as one text, as a listener reads it."""
    coarse, detailed = sentence(truth, kinds)
    return Description(coarse, detailed).text


def phrase(truth, kinds=IDENTITY):
    """What to look for in a scene: "red striped mug with a star badge"."""
    _, detailed = sentence(truth, kinds)
    return detailed.removeprefix("The ").removesuffix(".")


def clause(who, truth, short=False):
    """What a caption says of one concept, which it calls `who`."""
    if short:
        return f"{who} is on {truth['place']}."
    return f"{who} is {truth['pose']} on {truth['place']} in {truth['light']} light."


QUESTIONS = {  # kind: (the question, an option), {} stands for the name and for the word
    "place": ("Where is {}?", "on {}"),
    "pose": ("How does {} stand?", "{}"),
    "light": ("What light is {} in?", "{} light"),
}


@dataclass(frozen=True)
class Quiz:
    """A question about a photo with two options; {} in it stands for the concept's name."""

    text: str
    options: dict[str, str]  # {"A": text, "B": text}
    answer: str  # the letter of the right one


def quiz(truth, kind, rng):
    """A question about place, pose or light, which no good description answers.   -> Quiz"""
    text, wording = QUESTIONS[kind]
    answer = "AB"[rng.randrange(2)]
    wrong = altered(truth, [kind], rng)
    options = {}
    for letter in "AB":
        shown = truth if letter == answer else wrong
        options[letter] = wording.format(shown[kind])
    return Quiz(text, options, answer)


# ------------------------------------------------------------------------------------------- oracle
def claims(text):
    """What a text claims: [(kind, word), ...] in reading order.

    Every attribute has words of its own, so looking the words up is a parse.
    """
    words = text.lower().replace(".", " ").replace(",", " ").split()
    return [(KIND_OF[word], word) for word in words if word in KIND_OF]


def oracle(text, truth):
    """The symbolic listener: does every claim of the text hold for this photo?"""
    return all(truth[kind] == word for kind, word in claims(text))


def tells_truth(text, truth):
    """Does the text claim anything of this photo, and does all of it hold?"""
    return bool(claims(text)) and oracle(text, truth)


def leaks(text):
    """Does the text mention place, pose or light?"""
    return any(kind in VIEW for kind, _ in claims(text))


def coverage(text):
    """The share of the identity (colour, pattern, badge) that the text names, right or wrong."""
    named = {kind for kind, _ in claims(text)}
    return len(named.intersection(IDENTITY)) / len(IDENTITY)


def truth_columns(games, descriptions):
    """What is true of descriptions: measured, never paid.

    B games; N = B * G descriptions (None for a malformed answer), G in a row for each game
    -> each column float64 [N]; without columns, {}, for games of photos whose truth is not known

        oracle     1 if the description fits the hard positive and no other photo of the pool
        leakage    1 if it mentions place, pose or light
        coverage   the share of the identity that it names

    A malformed answer counts as no words: they fit every photo and name nothing, so 0, 0, 0.
    """
    if not any(game.target.truth for game in games):
        return {}
    samples = len(descriptions) // len(games)  # G

    columns = {"oracle": [], "leakage": [], "coverage": []}
    for row, spoken in enumerate(descriptions):
        game = games[row // samples]
        text = spoken.text if spoken else ""
        fits = [oracle(text, photo.truth) for photo in game.pool]
        fits_positive_only = fits[game.positive] and sum(fits) == 1
        columns["oracle"].append(float(fits_positive_only))
        columns["leakage"].append(float(leaks(text)))
        columns["coverage"].append(coverage(text))
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}


# ----------------------------------------------------------------------- a folder of toys, to try
THINGS = 4  # of each unseen category: look-alikes, easily taken for one another
# Photos of each that are in things/: the three of the first occasion, and one of the other, so that
# rrg.py --data has hard positives. The last one of all, which is of the other occasion, is new.
PER_THING = 4

NEXT = """\
{count} toys, {each} photos each, are in {folder}/things. In {folder}/new are a new photo of each,
called by its name, and stranger.png, of a toy that looks like them and is none of them. All are of
categories that python rrg.py never trains on.

Ask the model as it came. It describes a photo, with pose and place, rather than the toy, so it
finds none of your things here, or the wrong one:

  python assistant.py --photos {folder}/things {folder}/new/{name}.png

Train an adapter on other toys (a minute), let it describe these, and ask again. It says the name
and why; of the stranger it says that it is none of them:

  python rrg.py --out runs/toy
  python assistant.py --adapter runs/toy/adapter --photos {folder}/things {folder}/new/{name}.png
  python assistant.py --adapter runs/toy/adapter --photos {folder}/things {folder}/new/stranger.png

Or train on these things themselves, as you would on your own photos:

  python rrg.py --model {model} --data {folder}/things"""


@dataclass
class Options:
    """Every option of this script."""

    photos: str = option("", "draw here; a folder that is new or empty", metavar="DIR")


def toys_of(category):
    """Look-alikes that a run of seed 0 holds out.   -> [Concept, ...]"""
    return [concept for concept in world(seed=0) if concept.category == category]


def save_photo(photo, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    photo.load().save(file)


def draw_folder(folder):
    """Draw things/<name>/1.png and so on, new/<name>.png and new/stranger.png.

    No folders of categories: the toy model is asked about "the main subject" only.
    -> [Concept, ...] that are in things/
    """
    things = []
    for category in UNSEEN:
        things += toys_of(category)[:THINGS]
    for thing in things:
        for number, photo in enumerate(thing.photos[:PER_THING], 1):
            save_photo(photo, folder / "things" / thing.name / f"{number}.png")
        save_photo(thing.photos[-1], folder / "new" / f"{thing.name}.png")
    stranger = toys_of(UNSEEN[0])[THINGS]
    save_photo(stranger.photos[-1], folder / "new" / "stranger.png")
    return things


def main(argv=None):
    options = Options(**run.read_options(Options, __doc__, argv))
    if not options.photos:
        raise DataError("give a folder to draw in: python toy.py --photos my_toys")
    folder = pathlib.Path(options.photos)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise DataError(f"{folder} is not empty; give --photos a folder that is new or empty")
    things = draw_folder(folder)
    shown = shlex.quote(str(folder))
    print(
        NEXT.format(
            count=len(things),
            each=PER_THING,
            folder=shown,
            name=things[0].name,
            model=FOLDER.name,
        )
    )


if __name__ == "__main__":
    run.main(main)
