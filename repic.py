"""repic.py: RePIC and SFT, the two systems that RRG is compared with, by the same learner.

RePIC rewards only what a rule can verify. A task is a question about pictures; its answer is paid
by the rule of its kind:

    kind         one picture each, named          the last picture               the answer is paid
    oct          a concept                        it, or in half of the tasks    for the right one
                                                  another one                    of yes and no
    vlt          -                                a scene of it and 1 to 3 that  for a box that
                                                  look different                 overlaps its own
    single_ict   a concept                        it                             for its name
    multi_ict    a concept and 1 or 2 others      a scene of them                for each name

(object consistency, visual localization, identity consistency tuning). Things are called by names
that are drawn anew for each task: their folders' names could give the answer away. SFT is
supervised fine-tuning of the same adapters on given captions of the ict pictures.

    python repic.py                                                   # RePIC in the toy world
    python repic.py --sft truth                                       # SFT
    python repic.py --model Qwen/Qwen2-VL-2B-Instruct --data photos/  # 2 prompts x 1000 updates
    python repic.py --model ... --tasks tasks.json --images train/    # RePIC's own list of tasks
    python repic.py --out runs/x --resume                             # go on with a killed run

`diff rrg.py repic.py` shows what the two papers differ in: what is played (stage 1) and who pays
for it (stages 3 and 4). How RePIC is measured is in naming.py.

Source: RePIC (arXiv 2506.18369): section 3.2, appendices B.4 and D.3, and its code.

Where it departs from the paper and its research code:
1. A group is G answers to one prompt. (The code shuffles on each GPU and draws the end of a prompt
   anew, so the answers of a group are to different questions.)
2. Answers are read as they are meant. (The code found "no" in "know", read boxes of whole numbers
   only, compared boxes in pixels of two different sizes, and let a caption of several names pass
   that used them as pairs of tags.) An answer of several different boxes has none.
3. A caption of fewer than 100 characters earns nothing, nor does one with a name as a pair of tags:
   both rules are the code's. (The paper says 100 tokens and an extra reward, and nothing of tags.)
4. Boxes are asked for as the model that is loaded gives them. (The code has Qwen2.5-VL only, whose
   boxes are JSON in pixels; Qwen2-VL's are (x1,y1),(x2,y2) in thousandths.)
5. References are whole photos, a scene is a collage of such, and what vlt looks for is called by
   its category, or by the words of its folder's name. (The paper crops references out of the
   photographs that are asked about, adds synthetic pairs, and takes vlt's pictures and phrases
   from RefCOCO.)
6. How oct and vlt share their 69 % of the prompts is not published, nor how often oct's answer is
   yes. Here they have 35 and 34, half of oct's answers are yes, and half of the others are about
   look-alikes.
7. Wordings are our own and fewer: 2 for oct, 2 for vlt, 3 for ict. (The paper has 16, 11 and 26.)
8. Names come from a list of our own. (The paper draws them with Faker; its code has none.)
9. The learner is that of rrg.py: 10 steps of warm-up, no top-k, no dropout, no adapter on lm_head,
   photos of at most --max-pixels. (The script: no warm-up, top-k 50, dropout 0.05, an adapter on
   lm_head, shorter sides of 512 or 1024 pixels. AdamW and 256 tokens an answer are the same.)
   2000 prompts are the paper's. (The script goes twice through a list of 5000.)
10. SFT is the same update: one given answer a prompt, of advantage 1, without KL; its gradient is
   that of the cross-entropy. Its prompts are RePIC's own of ict, in their order. Its captions are
   the model's own, or the truth in the toy world. (The paper's SFT models learn 210,000 captions
   that larger models wrote.)
11. Of --tasks a part is held out for the exam. (The code trains on all of it.)

Shapes: B tasks, G answers to each, N = B*G rows, C tokens of an answer.
"""

import itertools
import json
import pathlib
import random
import re
import time
from dataclasses import dataclass, field
from functools import partial

import torch
from PIL import Image, ImageOps

import run
import toy
from data import (
    FORMATS,
    UNREADABLE,
    Concept,
    DataError,
    Photo,
    Split,
    one_line_errors,
    read_photo,
    tag,
)
from grpo import Batch, group_advantages, update
from lora import lora_off
from model import MLLM, PICTURE, Completions, Prompt
from rrg import (
    LEARNER_METRICS,
    LearnerConfig,
    answer_columns,
    learning_rate,
    load_world,
    new_learner,
    photos_of,
    picture_side,
    print_where,
    show_held_out,
    spread_out,
    summarise,
)
from run import option

# The kinds of tasks, and their shares in percent.
KINDS = {"oct": 35.0, "vlt": 34.0, "single_ict": 26.0, "multi_ict": 5.0}
METRICS = {
    "step": "training step, from 1",
    "reward": "what the task's rule pays",
    "parsed": "share of answers that the rule can read: yes or no, one box, a caption as long as "
    "it must be; empty with --sft, whose answers are given",
    "oct": "what the answers to oct tasks earned (oct_reward)",
    "vlt": "what the answers to vlt tasks earned (vlt_reward)",
    "single_ict": "what the answers to single_ict tasks earned (ict_reward)",
    "multi_ict": "what the answers to multi_ict tasks earned (ict_reward)",
    **LEARNER_METRICS,
    "nll": "minus the mean log-probability of an answer's tokens; of given answers SFT's loss",
}


# ---------------------------------------------------------------------------------- the settings
@dataclass
class Config(LearnerConfig):
    """Every setting of a run; each is an option of the command line."""

    # RePIC's schedule: 2000 prompts.
    steps: int = option(
        1000,
        "training steps; by default fewer with --sft and --without, since the prompts that they "
        "leave out are not refilled",
        toy=170,
        least=1,
    )
    games: int = option(2, "B, prompts a step", toy=12, least=1)
    sft: str = option(
        "",
        "supervised fine-tuning on given captions, in RePIC's place: on what the model as it came "
        "writes when it is asked for the names, or in the toy world on the truth",
        choices=("base", "truth"),
    )
    mix: str = option("35,34,26,5", f"the shares of {', '.join(KINDS)}")
    min_chars: int = option(100, "a caption of fewer characters earns nothing", toy=30, least=0)
    without: str = option(
        "none",
        "leave out a task, or the least length of captions",
        choices=("none", "oct", "vlt", "ict", "multi_ict", "length"),
    )
    tasks: str = option(
        "",
        "train on a list of tasks in RePIC's form, JSON or JSON lines, in the place of --data",
        metavar="FILE",
    )
    images: str = option("", "the folder that the pictures of --tasks are in", metavar="DIR")


def read_settings(argv=None):
    """The command line.   -> (Config, whether to go on with a run)"""
    given = run.read_options(Config, __doc__, argv, resumable=True)
    if given.pop("resume", False):
        return run.resumed_settings(Config, given), True
    run.refuse_photos_without_model(given)
    check_list_options(given)
    config = run.fill_in(Config, given, toy.is_toy(given.get("model", toy.FOLDER)))
    config.out = config.out or run.default_folder()

    check_combinations(given)
    if config.sft:  # one given answer a prompt, and no reference
        config.samples = 1
        config.beta = 0.0
    share = r"\d+(\.\d+)?"
    if not re.fullmatch(rf"({share},){{3}}{share}", config.mix):
        raise DataError(f"--mix wants the shares of {', '.join(KINDS)}, such as {Config.mix}")
    if not any(shares_of_kinds(config)[kind] for kind in kept_kinds(config)):
        raise DataError("--mix: the shares that are left may not all be 0")
    if "steps" not in given and not config.tasks:
        config.steps = steps_that_are_left(config)
    return config, False


def check_combinations(given):
    """Raise DataError for options that would have no effect beside another one."""
    for name in ("samples", "beta", "std_floor", "eps_low", "eps_high", "without"):
        if given.get("sft") and name in given:
            raise DataError(
                "--sft learns one given answer a prompt, without a penalty and without a ratio "
                f"to clip: leave out {run.flag(name)}"
            )
    if given.get("sft") == "truth" and given.get("data"):
        raise DataError("--sft truth: nobody knows the truth about photos; give --sft base")
    if given.get("without") == "length" and "min_chars" in given:
        raise DataError("--without length leaves the least length out: leave out --min-chars")


def check_list_options(given):
    """Raise DataError for --tasks without what it needs, or with what it has itself."""
    if not given.get("tasks"):
        if given.get("images"):
            raise DataError("--images are the pictures of --tasks: give --tasks FILE, too")
        return
    if not given.get("images"):
        raise DataError("--tasks wants --images, the folder that its pictures are in")
    if "model" not in given:
        raise DataError(
            "--tasks wants a --model, such as --model Qwen/Qwen2-VL-2B-Instruct: the toy model, "
            "the default, knows the toy world only"
        )
    for name in ("data", "train_concepts", "mix", "sft"):
        if name in given:
            raise DataError(
                f"--tasks has pictures, questions and right answers of its own, and no captions: "
                f"leave out {run.flag(name)}"
            )
    if not pathlib.Path(given["tasks"]).is_file():
        raise DataError(f"--tasks {given['tasks']} is not a file")
    if not pathlib.Path(given["images"]).is_dir():
        raise DataError(f"--images {given['images']} is not a folder")


def task_family(kind):
    """single_ict and multi_ict are both ict: they share their wordings and their rule."""
    return kind.split("_")[-1]


def shares_of_kinds(config):
    """{kind: its share of the prompts}, as --mix says."""
    return dict(zip(KINDS, map(float, config.mix.split(",")), strict=True))


def kept_kinds(config):
    """The kinds that are learned: those that --without leaves; SFT has captions only."""
    left_out = ("oct", "vlt") if config.sft else (config.without,)
    return [kind for kind in KINDS if kind not in left_out and task_family(kind) not in left_out]


def draw_kinds(shares, seed):
    """The kinds of the tasks of a whole mix, one after the other, without end."""
    rng = random.Random(f"kinds {seed}")
    while True:
        [kind] = rng.choices(list(shares), list(shares.values()))
        yield kind


def steps_that_are_left(config):
    """How many steps of kept prompts there are among those of `config.steps` steps: 1 or more."""
    whole_mix = draw_kinds(shares_of_kinds(config), config.seed)
    kinds = list(itertools.islice(whole_mix, config.steps * config.games))
    kept = sum(kinds.count(kind) for kind in kept_kinds(config))
    return max(1, kept // config.games)


# ---------------------------------------------------------------------------------- what is asked
YES_OR_NO = "Your final answer must be either yes or no, with no additional output."
BOX_FORM = {  # of each unit of `box_unit`
    "pixels": 'For bounding box coordinates, answer in JSON format: {"bbox_2d": [x1, y1, x2, y2]}',
    "thousandths": "For bounding box coordinates, answer in the form (x1,y1),(x2,y2), in "
    "thousandths of the picture's width and height.",
}
# Each kind of task in several wordings, of which a prompt gets one. Pictures come first, then the
# text; those of ict have their names between them. single_ict and multi_ict share theirs.
PROMPTS = {
    "oct": [  # {text} is a name in angle brackets
        "The first picture shows {text}. Is that very thing in the second picture, too? "
        + YES_OR_NO,
        "You see {text} in the first picture. Can you find the same one in the second picture? "
        "Answer with yes or no only.",
    ],
    "vlt": [  # {text} is a phrase such as "red mug"
        "Where in this picture is the {text}? Return its bounding box as JSON: "
        '{"bbox_2d": [x1, y1, x2, y2]}',
        "Locate the {text} in this picture. " + BOX_FORM["pixels"],
    ],
    "ict": [  # {text} is all pictures, those of one thing each with its name (`introduce`)
        "{text}Give a caption of the last picture.",
        "{text}Give a personalized caption of the last picture, calling what you know by its name.",
        "{text}Describe the last picture in detail, without repeating what was said here.",
    ],
}
# vlt, where the model gives boxes in thousandths.
VLT_IN_THOUSANDTHS = [
    "Where in this picture is the {text}? Return its bounding box as (x1,y1),(x2,y2), in "
    "thousandths of width and height.",
    "Locate the {text} in this picture. " + BOX_FORM["thousandths"],
]
# What the tasks of a list are asked for besides (--tasks).
ICT_ENDINGS = [
    "Use the given names in the caption.",
    "Do not repeat what was said here.",
    "",
    "",
    "",
]


PLAIN = "Give a caption of this picture."  # of one photo, without any names
# Stands after a question to the model as it came, word for word as in the code.
ASK_FOR_NAME = "Output the final answer including its name."


def box_unit(mllm):
    """What the boxes of the model that is loaded count: "thousandths" of width and height, or
    "pixels" of the picture as it saw it."""
    is_toy = mllm.config.vision_config.patch_size == toy.PATCH
    if mllm.config.model_type == "qwen2_vl" and not is_toy:
        return "thousandths"
    return "pixels"


def introduce(template, names):
    """A wording of ict, with each reference picture followed by its name, and the last picture.

    names: in angle brackets
    """
    shown = [f"{PICTURE}This is {name}.\n" for name in names]
    return template.replace("{text}", "".join(shown) + PICTURE)


def wordings(kind, unit):
    """The wordings of a kind of task.   unit: see `box_unit`"""
    if kind == "vlt" and unit == "thousandths":
        return VLT_IN_THOUSANDTHS
    return PROMPTS[task_family(kind)]


# ------------------------------------------------------------------------------------------ scenes
def paste(photos, boxes, size):
    """A grey square of `size` pixels with each photo cut to its box (left, top, right, bottom)."""
    canvas = Image.new("RGB", (size, size), (128, 128, 128))
    for photo, (left, top, right, bottom) in zip(photos, boxes, strict=True):
        canvas.paste(ImageOps.fit(photo.load(), (right - left, bottom - top)), (left, top))
    return canvas


def collage_size(side):
    """Pixels of a collage, either way, of photos of `side` pixels."""
    return 9 * side // 4


def collage(photos, side, seed):
    """A scene of one to four photos, so that any folder of photos has boxes and pictures of
    several known concepts.

    Each photo is cut to a square of `side` pixels, in different cells of a two by two grid, a
    little off its lines.
    -> (Photo of 2.25 `side` pixels, for each photo its box (left, top, right, bottom) in it)
    """
    rng = random.Random(f"collage {seed} {[photo.name for photo in photos]}")
    gap = side // 16
    # From cell to cell it is side + 2 gap, within a cell up to 2 gap more: 2 side + 4 gap in all,
    # which is 2.25 side with a gap of side / 16.
    far = side + 2 * gap
    cells = rng.sample([(0, 0), (far, 0), (0, far), (far, far)], len(photos))
    corners = []
    for x, y in cells:
        left = x + gap * rng.randrange(3)
        top = y + gap * rng.randrange(3)
        corners.append((left, top))
    boxes = [(left, top, left + side, top + side) for left, top in corners]

    places = []  # the name is the identity of a photo, so it says what is where
    for photo, (left, top) in zip(photos, corners, strict=True):
        places.append(f"{photo.name} at {left},{top}")
    draw = partial(paste, photos, boxes, collage_size(side))
    # Never met again, so it is not remembered beyond its step.
    return Photo("; ".join(places), draw, kept=False), boxes


# -------------------------------------------------------------------------------- stage 1: tasks
@dataclass(frozen=True)
class Named:
    """What a concept is called in a task, in angle brackets, and a photo of it."""

    name: str
    photo: Photo


@dataclass(frozen=True)
class Task:
    """One of RePIC's questions: the pictures, then the text."""

    kind: str
    photos: list[Photo]
    text: str
    # What the rule wants. oct: "yes" or "no"; vlt: (box, size of its picture), in pixels;
    # ict: [names in angle brackets]
    solution: object
    # ict: what the last picture shows, as one reads. (A list of tasks does not say it.)
    shown: list[Named] = field(default_factory=list, repr=False)

    def record(self):
        """What logs and reports keep of a task."""
        return {
            "kind": self.kind,
            "photos": [photo.name for photo in self.photos],
            "question": self.text,
            "solution": self.solution,
        }


def phrase_for(concept):
    """What a concept is called by somebody who does not know its name: what it looks like in the
    toy world, else its category."""
    truth = concept.photos[0].truth
    if truth:
        return toy.phrase(truth)
    if concept.category != "object":
        return re.sub(r"[\W_]+", " ", concept.category).strip()
    return re.sub(r"[\W\d_]+", " ", concept.name).strip()  # "blue_mug2": "blue mug"


@dataclass
class Views:
    """Two photos of one concept."""

    named: Photo  # shown with its name
    shown: Photo  # in the last picture


def draw_views(concepts, rng):
    """{concept name: Views}. For a concept that comes twice the last draw counts."""
    views = {}
    for concept in concepts:
        named, shown = rng.sample(concept.photos, 2)
        views[concept.name] = Views(named, shown)
    return views


def draw_names(concepts, others, rng):
    """What some concepts are called in a task: a random name each, which is not their own.

    others: all other concepts, whose names are not drawn either. In the toy world they are: its
    model can spell no others.   -> names in angle brackets
    """
    avoided = concepts if concepts[0].photos[0].truth else concepts + others
    in_use = {concept.name.split("/")[-1].lower() for concept in avoided}
    free = [name for name in toy.NAMES if name.lower() not in in_use]
    return [tag(name) for name in rng.sample(free, len(concepts))]


def row_by_row(named, boxes, side):
    """What a collage shows, as one reads: the upper row first.   named: as the boxes"""
    placed = []  # (in the lower row?, left edge, Named)
    for one, (left, top, _, _) in zip(named, boxes, strict=True):
        placed.append((top >= side, left, one))
    placed.sort(key=lambda entry: entry[:2])
    return [one for _, _, one in placed]


@dataclass
class Draw:
    """What a task is made from."""

    concept: Concept  # the one that is asked about
    others: list[Concept]  # all others, in random order
    template: str  # one of the wordings
    side: int  # pixels of a photo in a scene
    seed: str  # of the collage
    rng: random.Random


def make_oct_task(draw):
    """Is the concept of the first picture in the second, too?"""
    concept = draw.concept
    shown = concept
    solution = "yes"
    if draw.rng.random() < 0.5:  # another one, in half of these tasks of the same category
        look_alikes = [other for other in draw.others if other.category == concept.category]
        shown = draw.rng.choice([draw.others, look_alikes or draw.others])[0]
        solution = "no"
    views = draw_views([concept, shown], draw.rng)
    [name] = draw_names([concept], draw.others, draw.rng)
    return Task(
        kind="oct",
        photos=[views[concept.name].named, views[shown.name].shown],
        text=draw.template.replace("{text}", name),
        solution=solution,
    )


def make_vlt_task(draw):
    """Where in this picture is the ...?"""
    wanted = phrase_for(draw.concept)
    # Another concept that the same phrase fits would be a second right answer.
    different = [other for other in draw.others if phrase_for(other) != wanted]
    concepts = [draw.concept, *different[: draw.rng.choice([1, 2, 3, 3])]]
    views = draw_views(concepts, draw.rng)
    shown = [views[concept.name].shown for concept in concepts]
    scene, boxes = collage(shown, draw.side, draw.seed)
    size = collage_size(draw.side)
    return Task(
        kind="vlt",
        photos=[scene],
        text=draw.template.replace("{text}", wanted),
        solution=(boxes[0], (size, size)),
    )


def make_single_ict_task(draw):
    """A caption of another picture of one concept."""
    concept = draw.concept
    views = draw_views([concept, concept], draw.rng)[concept.name]
    [name] = draw_names([concept], draw.others, draw.rng)
    return Task(
        kind="single_ict",
        photos=[views.named, views.shown],
        text=introduce(draw.template, [name]),
        solution=[name],
        shown=[Named(name, views.shown)],
    )


def make_multi_ict_task(draw):
    """A caption of a scene of two or three concepts."""
    concepts = [draw.concept, *draw.others[: draw.rng.choice([1, 2])]]
    views = draw_views(concepts + concepts, draw.rng)
    names = draw_names(concepts, draw.others, draw.rng)
    references = [views[concept.name].named for concept in concepts]
    shown = [views[concept.name].shown for concept in concepts]
    scene, boxes = collage(shown, draw.side, draw.seed)
    named = [Named(name, photo) for name, photo in zip(names, shown, strict=True)]
    return Task(
        kind="multi_ict",
        photos=[*references, scene],
        text=introduce(draw.template, names),
        solution=names,
        shown=row_by_row(named, boxes, draw.side),
    )


MAKERS = {
    "oct": make_oct_task,
    "vlt": make_vlt_task,
    "single_ict": make_single_ict_task,
    "multi_ict": make_multi_ict_task,
}


def make_tasks(concepts, shares, count, side, unit, seed, kept=tuple(KINDS)):
    """`count` tasks about some concepts, of kinds drawn by their shares.   -> [Task, ...]

    shares {kind: weight}; side: pixels of a photo in a scene; unit: of boxes, see `box_unit`
    kept: tasks of other kinds are drawn, too, but left out: whoever learns fewer kinds gets the
        same tasks of these kinds, in the same order
    Each task has one wording, so that all answers of its group answer the same. Raises DataError
    for fewer than two concepts.
    """
    if len(concepts) < 2:
        raise DataError(
            f"RePIC's tasks need two things or more to train on, but there are {len(concepts)}; "
            "others are kept for the test, so add photos of more things"
        )
    tasks = []
    for number, kind in enumerate(draw_kinds(shares, seed)):
        if len(tasks) == count:
            return tasks
        if kind not in kept:
            continue
        rng = random.Random(f"task {seed} {number}")
        concept, *others = rng.sample(concepts, len(concepts))
        template = rng.choice(wordings(kind, unit))
        draw = Draw(concept, others, template, side, f"{seed} {number}", rng)
        tasks.append(MAKERS[kind](draw))


# -------------------------------------------------------------- stage 1, too: a given list of tasks
ORIENTATION = 0x0112  # an EXIF tag; from 5 on the picture lies on its side
KIND_OF_METHOD = {
    "yes_no": "oct",
    "iou": "vlt",
    "yes_no_name": "single_ict",
    "yes_no_name_multi": "multi_ict",
}


def read_records(file):
    """The records of a list of tasks, which is JSON, or JSON lines if it is called .jsonl."""
    records = []
    if not file.endswith(".jsonl"):
        records = run.load_json(file)
    else:
        with one_line_errors(f"cannot read {file}", OSError, ValueError, RecursionError):
            lines = pathlib.Path(file).read_text(encoding="utf-8").split("\n")
            records = [json.loads(line) for line in lines if line.strip()]
    if not isinstance(records, list) or not records:
        raise DataError(f"{file} holds no list of tasks")
    return records


def want(is_there, what):
    """Raise ValueError unless a record has what is wanted."""
    if not is_there:
        raise ValueError(f"wanted: {what}")


def texts_in(value):
    """One text or a list of texts, as a list; empty if it is anything else."""
    texts = value if isinstance(value, list) else [value]
    are_texts = all(isinstance(text, str) and text for text in texts)
    return texts if are_texts else []


def read_solution(kind, solution, size):
    """A record's solution as that of a Task.   size: of the picture. Raises ValueError"""
    if kind == "oct":
        words = set(re.findall(r"\b(yes|no)\b", str(solution).lower()))
        want(len(words) == 1, "yes or no as its solution")
        return words.pop()
    if kind == "vlt":
        numbers = solution if isinstance(solution, list) else []
        are_numbers = all(type(number) in (int, float) for number in numbers)
        is_box = len(numbers) == 4 and are_numbers and area(numbers) > 0
        want(is_box, "a box [x1, y1, x2, y2] as its solution")
        return tuple(numbers), size
    names = texts_in(solution)
    want(names, "a name or a list of names as its solution")
    return names


def read_task(record, folder, unit, rng):
    """A record of a list as a Task, whose boxes are in pixels of the picture, the right way up.

    Raises one of UNREADABLE for a record in another form and for a picture that is not there.
    """
    want(isinstance(record, dict), "an object with image, problem and solution")
    method = str(record.get("accu_reward_method", "iou"))  # RePIC's code has this default, too
    want(method in KIND_OF_METHOD, f"one of {', '.join(KIND_OF_METHOD)} as its accu_reward_method")
    kind = KIND_OF_METHOD[method]
    names = texts_in(record.get("image"))
    want(names, "the path of its image, or a list of paths")
    problem = record.get("problem")
    want(isinstance(problem, str), "a text as its problem")

    photos = []
    size = None
    for name in names:
        path = pathlib.Path(folder, name)
        want(path.is_file(), f"the picture {path}, which is not there")
        with Image.open(path, formats=FORMATS) as picture:  # reads no pixels yet
            size = picture.size
            if picture.getexif().get(ORIENTATION, 1) >= 5:  # the model sees it turned
                size = size[::-1]
        photos.append(Photo(name, partial(read_photo, path)))

    endings = {"oct": YES_OR_NO, "vlt": BOX_FORM[unit]}
    ending = endings.get(kind) or rng.choice(ICT_ENDINGS)
    problem = problem.replace("<image>", "")  # pictures come first
    problem = re.sub(r"<\|[^|]*\|>", " ", problem).strip()  # no marker of a chat
    text = f"{problem} {ending}".strip()
    return Task(kind, photos, text, read_solution(kind, record.get("solution"), size))


def load_tasks(config, unit):
    """The tasks of --tasks.   -> [Task, ...] in the order of the file

    The ending of a prompt is drawn by the task's seed. Raises DataError for a record in another
    form, and for a picture that is not there or cannot be read.
    """
    tasks = []
    for number, record in enumerate(read_records(config.tasks), start=1):
        rng = random.Random(f"ending {config.seed} {number}")
        with one_line_errors(f"record {number} of {config.tasks}", *UNREADABLE):
            tasks.append(read_task(record, config.images, unit, rng))
    return tasks


# ------------------------------------------------------------------------------- stage 1, in whole
@dataclass
class Tasks:
    """Tasks to train on, and tasks about concepts held out: of seen and of unseen categories."""

    train: list[Task]
    seen: list[Task]
    unseen: list[Task]
    split: Split | None  # the concepts that they are about; a list of tasks does not say


def held_out_tasks(concepts, config, side, unit):
    """As many tasks of each kind, for the exam; none about fewer than two concepts."""
    tasks = []
    if len(concepts) >= 2:
        for kind in KINDS:
            seed = f"held out {config.seed} {kind}"
            tasks += make_tasks(concepts, {kind: 1.0}, config.eval_games, side, unit, seed)
    return tasks


def mine_list(config, unit):
    """Stage 1 with --tasks: its tasks, shuffled, of which the last are for the exam.   -> Tasks

    Those are at most a fifth, and at most --eval-games. Their pictures may be in others, too.
    Raises DataError where --without leaves none.
    """
    kept = kept_kinds(config)
    tasks = [task for task in load_tasks(config, unit) if task.kind in kept]
    if not tasks:
        raise DataError(f"{config.tasks} holds no tasks but those that --without leaves out")
    random.Random(f"list {config.seed}").shuffle(tasks)
    count = len(tasks) - min(config.eval_games, len(tasks) // 5)
    print(
        f"{len(tasks)} tasks, of which {len(tasks) - count} kept for the test: {count} to train on"
    )
    return Tasks(tasks[:count], tasks[count:], [], None)


def tasks_of_step(tasks, step, size):
    """The `size` tasks of training step `step`, counted from 0, in order, again and again."""
    return [tasks[place % len(tasks)] for place in range(step * size, (step + 1) * size)]


def mine(mllm, config):
    """Stage 1: from photos to tasks.   -> Tasks"""
    unit = box_unit(mllm)
    if config.tasks:
        return mine_list(config, unit)

    skipped = run.skipped_file(config.out)
    concepts, split = load_world(mllm, config.data, config.seed, config.train_concepts, skipped)
    mllm.embed(photos_of(concepts))  # so that the tower has seen them, always in the same batches
    side = picture_side(mllm)
    count = config.steps * config.games  # so each is met once
    shares, kept = shares_of_kinds(config), kept_kinds(config)
    train = make_tasks(split.train, shares, count, side, unit, config.seed, kept)
    seen = held_out_tasks(split.test, config, side, unit)
    unseen = held_out_tasks(split.unseen, config, side, unit)
    counts = {"train": len(train), "seen": len(seen), "unseen": len(unseen)}
    run.print_split(split, counts, "tasks")
    return Tasks(train, seen, unseen, split)


# --------------------------------------------------------- stages 3 and 4: what a rule can verify
def read_yes_or_no(answer):
    """Which of the words yes and no an answer contains; None for none and for both."""
    found = set(re.findall(r"\b(yes|no)\b", answer.lower()))
    return found.pop() if len(found) == 1 else None


def oct_reward(answer, solution):
    """1 if of the words yes and no the answer contains `solution` only.   (equation 2)"""
    return float(read_yes_or_no(answer) == solution)


def read_box(answer):
    """The box that an answer gives as [x1, y1, x2, y2] or as (x1,y1),(x2,y2), whatever is around.

    -> (left, top, right, bottom), or None for no box or several different ones
    """
    number = r"\s*(-?\d+(?:\.\d+)?)\s*"
    pair = f"{number},{number}"
    found = re.findall(rf"\[{pair},{pair}\]", answer)
    found += re.findall(rf"\({pair}\)\s*,\s*\({pair}\)", answer)
    boxes = {tuple(map(float, box)) for box in found}
    return boxes.pop() if len(boxes) == 1 else None


def far_corner(mllm, photo):
    """The lower right corner of a photo in the coordinates of the model's boxes.   -> (x, y)"""
    if box_unit(mllm) == "thousandths":
        return 1000, 1000
    return mllm.picture_size(photo)


def area(box):
    """Of a box (left, top, right, bottom); 0 where it is empty or inside out."""
    left, top, right, bottom = box
    return max(0, right - left) * max(0, bottom - top)


def iou(a, b):
    """Intersection over union of two boxes (left, top, right, bottom), as areas of the plane."""
    overlap = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = area(a) + area(b) - overlap
    return overlap / union if overlap else 0.0


def vlt_reward(answer, box, size, corner):
    """1 if the answer's box overlaps `box` with an IoU of at least 0.5.   (equation 3)

    box: in pixels of a picture of `size` (width, height), whose lower right corner is `corner` in
    the coordinates of the answer (`far_corner`).
    """
    found = read_box(answer)
    if found is None:
        return 0.0
    left, top, right, bottom = found
    mapped = (
        left * size[0] / corner[0],
        top * size[1] / corner[1],
        right * size[0] / corner[0],
        bottom * size[1] / corner[1],
    )
    return float(iou(mapped, box) >= 0.5)


def is_caption(answer, names, min_chars):
    """Is it as long as it must be, and uses no name as a pair of tags, <name>...</name>?"""
    if not answer.strip() or len(answer) < min_chars:
        return False
    return not any(name[0] == "<" and name.replace("<", "</") in answer for name in names)


def ict_reward(answer, names, min_chars):
    """The share of `names`, mostly "<name>", that a caption uses, letter by letter.

    0 for what is no caption, `is_caption`.   (equations 4 and 5, and departure 3)
    """
    if not is_caption(answer, names, min_chars):
        return 0.0
    return sum(name in answer for name in names) / len(names)


def task_reward(task, answer, corner, min_chars):
    """What an answer earns, by the rule of the task's kind. corner: see `vlt_reward`."""
    if task.kind == "oct":
        return oct_reward(answer, task.solution)
    if task.kind == "vlt":
        box, size = task.solution
        return vlt_reward(answer, box, size, corner)
    return ict_reward(answer, task.solution, min_chars)


def can_be_read(task, answer, min_chars):
    """Is there something in an answer that the rule of the task's kind could pay?"""
    if task.kind == "oct":
        return read_yes_or_no(answer) is not None
    if task.kind == "vlt":
        return read_box(answer) is not None
    return is_caption(answer, task.solution, min_chars)


def least_length(config):
    """The fewest characters of a caption that may earn something."""
    return 0 if config.without == "length" else config.min_chars


def parsed(tasks, texts, config):
    """Which of N answers, equally many to each task, could be read.   -> float64 [N], 0 or 1"""
    per_task = len(texts) // len(tasks)
    min_chars = least_length(config)
    read = [can_be_read(tasks[i // per_task], text, min_chars) for i, text in enumerate(texts)]
    return torch.tensor(read, dtype=torch.float64)


def score(mllm, tasks, texts, config):
    """Stage 4: what each of N answers earned, equally many to each task.   -> float64 [N]"""
    per_task = len(texts) // len(tasks)
    min_chars = least_length(config)
    rewards = []
    for row, text in enumerate(texts):
        task = tasks[row // per_task]
        corner = far_corner(mllm, task.photos[-1])
        rewards.append(task_reward(task, text, corner, min_chars))
    return torch.tensor(rewards, dtype=torch.float64)


def means_by_kind(kinds, rewards):
    """{kind: mean reward} of the kinds that are there.   kinds and rewards: N each"""
    means = {}
    for kind in KINDS:
        earned = [reward for other, reward in zip(kinds, rewards, strict=True) if other == kind]
        if earned:
            means[kind] = sum(earned) / len(earned)
    return means


# --------------------------------------------------------------------------- SFT's given answers
def given_captions(mllm, tasks, config):
    """The captions that SFT learns, of the tasks' last pictures.   -> texts [B]

    The truth, or what the model with LoRA off writes when it is asked for the names: what one has
    without a stronger model.
    """
    if config.sft == "base":
        prompts = [Prompt(task.photos, f"{task.text} {ASK_FOR_NAME}") for task in tasks]
        with lora_off(mllm.model):
            return mllm.greedy(prompts, config.max_tokens)

    captions = []
    for task in tasks:
        clauses = [toy.clause(named.name, named.photo.truth) for named in task.shown]
        captions.append(" ".join(clauses))
    return captions


def as_completions(mllm, texts):
    """Given texts in the form of sampled ones.   -> Completions, whose log-probs are not known"""
    mllm.check_words(texts)
    # Padding goes to the right: like sampled answers these begin at place 0 and are masked after
    # their end.
    ids, mask = mllm.pad([text + mllm.tokenizer.eos_token for text in texts], "right")
    return Completions(ids, mask.bool(), None, texts)


# ---------------------------------------------------------------------------------------- a step
def train_step(mllm, tasks, optimizer, step, config):
    """Answer B tasks and learn from them.   -> (metrics, the first task with its answers)"""
    G = config.samples
    N = len(tasks) * G
    # Micro-batches are whole tasks, so that a prompt is read once. (The last may reach beyond N,
    # where slices end by themselves.)
    size = config.micro * G
    micro_batches = [slice(first, first + size) for first in range(0, N, size)]

    # 1. Mine. The tasks were made before training.
    prompts = [Prompt(task.photos, task.text) for task in tasks]

    def logps(rows):
        """Log-probs [n, C] of the answers in the slice `rows`, under the model as it is now."""
        latest = mllm.log_probs(
            prompts[rows.start // G : rows.stop // G], answers.ids[rows], answers.mask[rows]
        )
        if config.sft:
            given_logps[rows] = latest.detach()
        return latest

    # 2. Speak, with LoRA on. SFT is given its answers (departure 10), whose log-probs are known
    # when they are learned.
    if config.sft:
        captions = given_captions(mllm, tasks, config)
        answers = as_completions(mllm, captions)
        given_logps = torch.zeros(answers.ids.shape, device=mllm.device)  # [N, C]
    else:
        seed = config.seed * 1_000_003 + step  # of no other step of any seed
        uniforms = run.draw_uniforms(config.max_tokens, N, seed)  # [max_tokens, N]
        answers = mllm.speak(prompts, G, config.max_tokens, uniforms)

    # 3 and 4. Nobody listens: a rule reads the answer and knows the solution.
    rewards = score(mllm, tasks, answers.texts, config)  # [N]

    # 5. Advantage. The siblings are the baseline; a given answer has none.
    if config.sft:
        advantages = torch.ones(N)
    else:
        grouped = rewards.float().view(-1, G)  # [B, G]
        advantages = group_advantages(grouped, std_floor=config.std_floor).flatten()  # [N]

    # 6. Update. The reference policy is the same network with LoRA off.
    reference = None
    if config.beta > 0:
        with torch.no_grad(), lora_off(mllm.model):
            reference = torch.cat([logps(rows) for rows in micro_batches])  # [N, C]
    batch = Batch(
        ids=answers.ids,
        mask=answers.mask,
        old_logps=answers.logps,
        ref_logps=reference,
        advantages=advantages.to(mllm.device),
    )
    metrics = update(
        logps,
        batch,
        micro_batches,
        optimizer,
        mu=config.mu,
        eps_low=config.eps_low,
        eps_high=config.eps_high,
        beta=config.beta,
        loss=config.loss,
        max_length=config.max_tokens,
    )

    answer_logps = given_logps if config.sft else answers.logps
    scores = {"reward": rewards} | answer_columns(answers.mask, answer_logps)
    if not config.sft:  # whose answers are given
        scores["parsed"] = parsed(tasks, answers.texts, config)
    rows = answer_rows(tasks[0], answers.texts[:G], scores)
    metrics |= summarise(scores, answers.texts, G)
    # Kinds are not shared equally among processes, so their means are taken over all.
    kinds = run.gather([task.kind for task in tasks for _ in range(G)])
    metrics |= means_by_kind(kinds, run.gather(rewards.tolist()))
    return metrics, tasks[0].record() | {"samples": rows}


def answer_rows(task, texts, scores):
    """The answers to one task as samples.jsonl keeps them. scores {column: [N]}, its rows first."""
    rows = []
    for i, text in enumerate(texts):
        row = {"text": text}
        for name, column in scores.items():
            row[name] = column[i].item()
            if name == "reward":
                row[task.kind] = row[name]
        rows.append(row)
    return rows


# -------------------------------------------------------------------------------------- the exam
@dataclass
class Answered:
    """Greedy answers to held-out tasks, and what they earned."""

    texts: list[str]
    rewards: list[float]


def answer_greedily(mllm, tasks, config):
    """One greedy answer to each held-out task.   -> Answered"""
    tasks = run.my_part(tasks)
    texts = []
    rewards = []
    if tasks:
        prompts = [Prompt(task.photos, task.text) for task in tasks]
        texts = mllm.greedy(prompts, config.max_tokens, "answering held-out tasks")
        rewards = score(mllm, tasks, texts, config).tolist()
    return Answered(run.gather(texts), run.gather(rewards))


def held_out_figures(tasks, answered):
    """{kind: mean reward}, None for a kind without tasks."""
    kinds = [task.kind for task in tasks]
    return dict.fromkeys(KINDS) | means_by_kind(kinds, answered.rewards)


def exam(mllm, tasks, config):
    """Answer the held-out tasks.   -> {"figures": for result.json, "examples": six tasks}"""
    answered = answer_greedily(mllm, tasks.seen, config)
    figures = held_out_figures(tasks.seen, answered)
    figures["unseen"] = None
    if tasks.unseen:
        unseen = answer_greedily(mllm, tasks.unseen, config)
        figures["unseen"] = held_out_figures(tasks.unseen, unseen)

    examples = []
    for i in spread_out([task.kind for task in tasks.seen], 6):
        examples.append(tasks.seen[i].record() | {"text": answered.texts[i]})
    return {"figures": figures, "examples": examples}


# -------------------------------------------------------------------------------------- the loop
def train(config, resume=False):
    """The whole run: mine, measure, train, measure again.   -> the content of result.json"""
    method = "sft" if config.sft else "repic"
    folder = run.Folder(config, method, list(METRICS), resume)
    mllm = MLLM(config.model, config.max_pixels)
    tasks = mine(mllm, config)
    optimizer = new_learner(mllm, config)

    if resume:
        state = folder.restore(mllm.model, optimizer, tasks.split)
    else:  # every lora_B is still 0, so this measures the model as it came
        state = run.State(step=0, seconds=0.0, before=exam(mllm, tasks, config))
        folder.begin(mllm.device, tasks.split)
        folder.save(state, mllm.model, optimizer)

    for step in folder.steps(state.step):
        started = time.time()
        lr = learning_rate(step, config)
        optimizer.param_groups[0]["lr"] = lr

        todays = tasks_of_step(tasks.train, step, config.games)
        todays = run.my_part(todays)
        metrics, example = train_step(mllm, todays, optimizer, step, config)

        seconds = time.time() - started
        state.step = step + 1
        state.seconds += seconds
        metrics |= {"step": state.step, "lr": lr, "seconds": seconds}
        folder.log(metrics, {"step": state.step} | example)
        if state.step % config.save_every == 0 or state.step == config.steps:
            folder.save(state, mllm.model, optimizer)

    result = folder.finish(state, exam(mllm, tasks, config), mllm.device)
    show(result)
    print_where(result, config.out, has_page=not config.tasks)
    return result


def show(result):
    """Print before and after side by side, and three held-out tasks."""
    show_held_out(result)
    examples = result["examples"]
    for before, after in list(zip(examples["before"], examples["after"], strict=True))[:3]:
        print(f"\n{before['question']!r} of {' + '.join(before['photos'])}")
        for when, row in (("before", before), ("after", after)):
            print(f"  {when:7}{row['text'][:300]!r}")


def main():
    config, resume = read_settings()
    train(config, resume)


if __name__ == "__main__":
    run.main(main, resumable=True)
