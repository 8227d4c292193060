"""RePIC and SFT: what is asked, what a rule pays, and that they train by the same learner."""

import contextlib
import csv
import functools
import json
import math
import random
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2VLConfig

import lora
import repic
import report
import toy
from conftest import ROOT, plain_logps
from data import Concept, DataError, Photo, tag
from model import MLLM, PICTURE, Prompt


def painted(name, category, views=3):
    """A concept whose photos are squares of one colour, so that they are found in a scene again."""
    hue = sum(map(ord, name)) * 37
    photos = []
    for view in range(views):
        picture = Image.new("RGB", (40 + view, 32), (hue % 255, 40 * view, hue // 255 % 255))
        photos.append(Photo(f"{name}/{view}", picture.copy))
    return Concept(name, category, photos)


def owners(concepts):
    """{photo name: Concept}."""
    return {photo.name: concept for concept in concepts for photo in concept.photos}


@pytest.fixture
def concepts():
    mugs = [painted(f"mug {i}", "mug") for i in range(3)]
    return mugs + [painted(f"dog {i}", "dog") for i in range(3)]


def toy_tasks(kind, count):
    """Tasks of one kind in the toy world."""
    world = toy.world(0, concepts=3, occasions=3, photos=1)
    return repic.make_tasks(world, {kind: 1.0}, count, toy.SIDE, "pixels", 0)


def real_tasks(concepts, kind, count, unit="pixels"):
    """Tasks of one kind about photos of no toy world."""
    return repic.make_tasks(concepts, {kind: 1.0}, count, 64, unit, 3)


def names_in(text):
    """The names in angle brackets in a text, without the brackets."""
    return re.findall(r"<([\w-]+)>", text)


# ------------------------------------------------------------------------------------- the scenes
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_scenes_show_each_photo_in_its_box(count):
    photos = [painted(name, "mug").photos[1] for name in "abcd"[:count]]
    scene, boxes = repic.collage(photos, 64, 5)
    picture = scene.load()
    assert picture.size == (144, 144)
    assert len(set(boxes)) == count
    for photo, box in zip(photos, boxes, strict=True):
        left, top, right, bottom = box
        assert (right - left, bottom - top) == (64, 64)
        assert 0 <= left and right <= 144 and 0 <= top and bottom <= 144
        assert picture.crop(box).getcolors() == [(64 * 64, photo.load().getpixel((0, 0)))]
    grey = sum(n for n, colour in picture.getcolors() if colour == (128, 128, 128))
    assert grey == 144**2 - count * 64**2


def test_scenes_are_seeded_and_named_by_what_is_where():
    photos = [painted(name, "mug").photos[1] for name in "abcd"]
    scene, _ = repic.collage(photos, 64, 5)
    again, _ = repic.collage(photos, 64, 5)
    other, _ = repic.collage(photos, 64, 6)
    assert scene == again != other


# -------------------------------------------------------------------------------------- the tasks
def test_object_consistency_asks_about_the_same_concept_or_another(concepts):
    tasks = real_tasks(concepts, "oct", 200)
    owner = owners(concepts)
    yes = 0
    look_alikes = 0
    for task in tasks:
        first, second = task.photos
        same = owner[first.name] is owner[second.name]
        assert task.solution == ("yes" if same else "no")
        assert first != second
        [name] = names_in(task.text)
        assert name in toy.NAMES
        yes += same
        look_alikes += not same and owner[first.name].category == owner[second.name].category
    assert 80 < yes < 120
    assert 0.5 < look_alikes / (200 - yes) < 0.9
    assert len({re.sub("<.*?>", "", task.text) for task in tasks}) == 2  # both wordings


def test_localization_asks_for_one_box(concepts):
    owner = owners(concepts)
    for task in real_tasks(concepts, "vlt", 60):
        [scene] = task.photos
        box, size = task.solution
        assert size == scene.load().size
        shown = [owner[place.split(" at ")[0]] for place in scene.name.split("; ")]
        # What is looked for is there once.
        [wanted] = [concept for concept in shown if repic.phrase_for(concept) in task.text]
        colours = [photo.load().getpixel((0, 0)) for photo in wanted.photos]
        assert scene.load().crop(box).getpixel((5, 5)) in colours
        assert not names_in(task.text)


@pytest.mark.parametrize("kind, counts", [("single_ict", {1}), ("multi_ict", {2, 3})])
def test_identity_consistency_names_one_picture_each(concepts, kind, counts):
    owner = owners(concepts)
    tasks = real_tasks(concepts, kind, 60)
    assert {len(task.solution) for task in tasks} == counts
    for task in tasks:
        *references, _ = task.photos
        assert len(references) == len(task.solution)
        assert [tag(name) for name in names_in(task.text)] == task.solution
        # After each reference's picture comes its name, and the last picture has none.
        for place, after in enumerate(task.text.split(PICTURE)[1:]):
            assert [tag(name) for name in names_in(after)] == task.solution[place : place + 1]
        assert task.text.count(PICTURE) == len(task.photos)
        assert {named.name for named in task.shown} == set(task.solution)
        assert not {named.photo for named in task.shown} & set(references)
        # In the last picture a name belongs to what it belongs to among the references.
        named_by = dict(zip(task.solution, references, strict=True))
        for named in task.shown:
            assert owner[named_by[named.name].name] is owner[named.photo.name]


def test_what_a_scene_shows_is_told_as_one_reads():
    lower, right, left = [repic.Named(name, None) for name in ("lower", "right", "left")]
    boxes = [(4, 72, 68, 136), (76, 8, 140, 72), (0, 4, 64, 68)]
    assert repic.row_by_row([lower, right, left], boxes, 64) == [left, right, lower]


# -------------------------------------------------------------------------------------- the names
def test_names_are_short_words_enough_for_a_world():
    names = toy.NAMES
    assert len(set(names)) == len(names) == 135
    for name in names:
        assert name.isascii() and name.isalpha() and len(name) <= 7


@pytest.mark.parametrize("kind", ["oct", "single_ict", "multi_ict"])
def test_each_task_draws_its_own_names(concepts, kind):
    tasks = real_tasks(concepts, kind, 300)
    of_tasks = [names_in(task.text) for task in tasks]
    for task, names in zip(tasks, of_tasks, strict=True):
        assert len(set(names)) == len(names)  # no name for two things
        assert set(names) <= set(toy.NAMES)
        assert not any(tag(concept.name) in task.text for concept in concepts)
    everywhere = {name for names in of_tasks for name in names}
    assert len(everywhere) > 85
    assert of_tasks == [names_in(task.text) for task in real_tasks(concepts, kind, 300)]


def test_nothing_is_called_by_its_own_name():
    """Nor by that of another thing: of a hundred names all but these three are drawn."""
    concepts = [painted("aiko", "person"), painted("people/Alma", "person")]
    others = [painted("bela", "person")]
    drawn = set()
    for seed in range(500):
        drawn |= set(repic.draw_names(concepts, others, random.Random(seed)))
    in_use = {"<Aiko>", "<Alma>", "<Bela>"}
    assert drawn == {f"<{name}>" for name in toy.NAMES} - in_use


def test_the_toy_world_uses_names_that_its_model_can_spell():
    everywhere = set()
    for task in toy_tasks("multi_ict", 100):
        names = names_in(task.text)
        assert set(names) <= set(toy.NAMES)
        assert len(set(names)) == len(names)
        assert not set(names) & {photo.name.split("/")[1] for photo in task.photos[:-1]}
        everywhere |= set(names)
    assert len(everywhere) > 90


def test_tasks_come_in_their_shares_and_are_seeded():
    concepts = [painted(f"mug {i}", "mug") for i in range(4)]
    tasks = repic.make_tasks(concepts, repic.KINDS, 1000, 64, "pixels", 0)
    kinds = [task.kind for task in tasks]
    for kind, share in repic.KINDS.items():
        assert abs(kinds.count(kind) - 10 * share) < 45
    assert sum(repic.KINDS.values()) == 100
    assert tasks == repic.make_tasks(concepts, repic.KINDS, 1000, 64, "pixels", 0)
    assert tasks != repic.make_tasks(concepts, repic.KINDS, 1000, 64, "pixels", 1)
    with pytest.raises(DataError, match="two things or more to train on, but there are 1; "):
        repic.make_tasks(concepts[:1], repic.KINDS, 1, 64, "pixels", 0)


def test_shares_follow_the_options():
    config, _ = repic.read_settings(["--mix", "1,2,3,4"])
    assert list(repic.shares_of_kinds(config).values()) == [1, 2, 3, 4]
    config, _ = repic.read_settings(["--mix", "1,2,3,4", "--without", "ict"])
    assert list(repic.shares_of_kinds(config).values()) == [1, 2, 3, 4]
    assert repic.kept_kinds(config) == ["oct", "vlt"]
    config, _ = repic.read_settings(["--without", "multi_ict"])
    assert repic.kept_kinds(config) == ["oct", "vlt", "single_ict"]
    config, _ = repic.read_settings(["--sft", "truth"])
    assert repic.kept_kinds(config) == ["single_ict", "multi_ict"]
    assert (config.samples, config.beta) == (1, 0)


def test_who_learns_fewer_kinds_takes_fewer_steps():
    """About 31 % of 170 steps, if none are asked for; a given list of tasks has no shares."""
    config, _ = repic.read_settings(["--sft", "truth"])
    assert abs(config.steps - 53) <= 3
    config, _ = repic.read_settings(["--without", "ict"])
    assert abs(config.steps - 117) <= 3
    config, _ = repic.read_settings(["--sft", "base", "--steps", "9"])
    assert config.steps == 9
    config, _ = repic.read_settings(["--sft", "truth", "--mix", "99,1,0,0.0001"])
    assert config.steps == 1  # not 0


def test_who_learns_fewer_kinds_learns_from_the_same_prompts(concepts):
    """All of them, but for the last ones, which do not fill a step."""
    config, _ = repic.read_settings([])
    everything = repic.make_tasks(concepts, repic.KINDS, 170 * 12, 64, "pixels", 0)
    for arguments in (["--sft", "truth"], ["--without", "oct"], ["--without", "multi_ict"]):
        config, _ = repic.read_settings(arguments)
        kept = repic.kept_kinds(config)
        wanted = [task for task in everything if task.kind in kept]
        count = config.steps * config.games
        assert len(wanted) - 12 < count <= len(wanted)
        tasks = repic.make_tasks(concepts, repic.KINDS, count, 64, "pixels", 0, kept)
        assert tasks == wanted[:count]


def test_what_is_left_out_of_a_run_is_not_refilled(toy_mllm, monkeypatch):
    monkeypatch.setattr(toy, "world", functools.partial(toy.world, concepts=2, photos=1))
    options = {"games": 4, "eval_games": 1, "train_concepts": "20"}
    everything = repic.mine(toy_mllm, repic.Config(steps=20, **options)).train
    captions = [task.text for task in everything if task.kind.endswith("ict")]
    alone = repic.mine(toy_mllm, repic.Config(steps=2, sft="truth", **options)).train
    assert [task.text for task in alone] == captions[:8]


def test_tasks_come_in_order_and_again():
    assert repic.tasks_of_step("abcde", 0, 2) == ["a", "b"]
    assert repic.tasks_of_step("abcde", 2, 2) == ["e", "a"]


def test_a_real_model_has_repics_schedule():
    """2 prompts a step and 1000 steps; the toy model keeps its own."""
    config, _ = repic.read_settings(["--model", "Qwen/Qwen2-VL-2B-Instruct"])
    assert (config.games, config.steps, config.samples) == (2, 1000, 8)
    config, _ = repic.read_settings([])
    assert (config.games, config.steps) == (12, 170)


LIST = ["--model", "m", "--tasks", "tasks.json", "--images", "train"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--mix", "1,2,3"], "--mix wants the shares of oct, vlt, single_ict, multi_ict"),
        (["--mix", "1,0,0,0", "--without", "oct"], "may not all be 0"),
        (["--sft", "truth", "--data", "x", "--model", "m"], "nobody knows the truth about photos"),
        (["--sft", "truth", "--beta", "0.1"], "leave out --beta"),
        (["--sft", "truth", "--samples", "4"], "leave out --samples"),
        (["--sft", "truth", "--std-floor", "0.1"], "leave out --std-floor"),
        (["--sft", "truth", "--eps-high", "0.1"], "leave out --eps-high"),
        (["--sft", "truth", "--without", "ict"], "leave out --without"),
        (["--without", "length", "--min-chars", "9"], "leave out --min-chars"),
        (["--min-chars", "-1"], "--min-chars must be at least 0"),
        (["--mix", "1,2,3,-1"], "--mix wants the shares"),
        (["--model", "m", "--tasks", "no.json", "--images", "."], "--tasks no.json is not a file"),
        (["--model", "m", "--tasks", __file__, "--images", "no"], "--images no is not a folder"),
        (["--samples", "1"], "--samples must be at least 2"),
        (["--data", "photos"], "--data wants a --model"),
        (["--images", "train"], "give --tasks FILE, too"),
        (["--model", "m", "--tasks", "tasks.json"], "--tasks wants --images"),
        (["--tasks", __file__, "--images", "."], "--tasks wants a --model"),
        ([*LIST, "--data", "photos"], "leave out --data"),
        ([*LIST, "--train-concepts", "3"], "leave out --train-concepts"),
        ([*LIST, "--sft", "truth"], "no captions: leave out --sft"),
        ([*LIST, "--mix", "1,1,1,1"], "leave out --mix"),
    ],
)
def test_settings_that_make_no_sense(arguments, message):
    with pytest.raises(DataError, match=message):
        repic.read_settings(arguments)


# -------------------------------------------------------------------------------------- the rules
@pytest.mark.parametrize(
    "answer, yes, no",
    [
        ("yes", 1, 0),
        ("No.", 0, 1),
        ("The answer is YES!", 1, 0),
        ("", 0, 0),
        ("I cannot know", 0, 0),
        ("another note", 0, 0),
        ("yesterday", 0, 0),
        ("I know it: yes", 1, 0),
        ("yes and no", 0, 0),
        ("no, no", 0, 1),
        ("**Yes**", 1, 0),
    ],
)
def test_object_consistency_counts_words_only(answer, yes, no):
    """RePIC's code found "no" in know, cannot and another."""
    assert repic.oct_reward(answer, "yes") == yes
    assert repic.oct_reward(answer, "no") == no


@pytest.mark.parametrize(
    "answer, box",
    [
        ("[1,2,3,4]", (1, 2, 3, 4)),
        ("[ 1.5 , 2 , 3.25 , 4 ]", (1.5, 2, 3.25, 4)),
        ('{"bbox_2d": [10, 20, 30, 40]}', (10, 20, 30, 40)),
        ('```json\n[{"bbox_2d": [-1, 0, 3, 4], "label": "mug"}]\n```', (-1, 0, 3, 4)),
        ("[1, 2, 3]", None),
        ("1, 2, 3, 4", None),
        ("[x1, y1, x2, y2]", None),
        ("[1,2,3,4] or [1,2,3,5]", None),
        ("[1,2,3,4], yes [1, 2, 3, 4]", (1, 2, 3, 4)),
        ("[1.,2,3,4]", None),
        ("", None),
        ("(1,2),(3,4)", (1, 2, 3, 4)),
        ("<|box_start|>(1,2),(3,4)<|box_end|>", (1, 2, 3, 4)),
        (
            "<|object_ref_start|>mug<|object_ref_end|><|box_start|>(104,20),(530,999)<|box_end|>",
            (104, 20, 530, 999),
        ),
        ("( 1.5 , 2 ) , (3 , 4.25)", (1.5, 2, 3, 4.25)),
        ("[(1, 2), (3, 4)]", (1, 2, 3, 4)),
        ("(1,2),(3,4) is [1, 2, 3, 4]", (1, 2, 3, 4)),
        ("(1,2),(3,4) and (1,2),(3,5)", None),
        ("(1,2),(3,4) or [1, 2, 3, 5]", None),
        ("(1,2)", None),
        ("(1,2,3,4)", None),
        ("(x1,y1),(x2,y2)", None),
    ],
)
def test_boxes_are_read_in_both_forms(answer, box):
    """With decimals and spaces: RePIC's code read whole numbers only, and none after a space."""
    assert repic.read_box(answer) == box


@pytest.mark.parametrize(
    "a, b, expected",
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1),
        ((0, 0, 2, 2), (2, 0, 4, 2), 0),
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7),
        ((0, 0, 10, 10), (9, 0, 19, 10), 10 / 190),  # one pixel wide: RePIC's code counted none
        ((2, 2, 0, 0), (0, 0, 2, 2), 0),  # inside out
        ((1, 1, 1, 1), (0, 0, 2, 2), 0),  # empty
        ((0, 0, 0.5, 0.5), (0, 0, 0.5, 0.25), 0.5),
    ],
)
def test_iou_by_hand(a, b, expected):
    assert math.isclose(repic.iou(a, b), expected)
    assert math.isclose(repic.iou(b, a), expected)


@pytest.mark.parametrize(
    "answer, seen, expected",
    [
        ("[0, 0, 40, 20]", (100, 100), 1),  # an IoU of exactly one half
        ("[0, 0, 40, 19]", (100, 100), 0),
        ("nowhere", (100, 100), 0),
        ("[0, 0, 80, 40]", (200, 100), 1),
        ("[0, 0, 80, 40]", (100, 100), 1),
        ("[0, 0, 80, 80]", (100, 100), 0),
        ("[0, 0, 80, 80]", (200, 200), 1),  # RePIC's code compared it unscaled
        ("[40, 40, 0, 0]", (100, 100), 0),
    ],
)
def test_localization_needs_half_an_overlap_in_the_pixels_the_model_saw(answer, seen, expected):
    assert repic.vlt_reward(answer, (0, 0, 40, 40), (100, 100), seen) == expected


def test_identity_consistency_counts_names():
    caption = "<bo> stands beside <mia> on a meadow."
    assert repic.ict_reward(caption, ["<bo>"], 30) == 1
    assert repic.ict_reward(caption, ["<bo>", "<mia>", "<x>"], 30) == pytest.approx(2 / 3)
    assert repic.ict_reward(caption, ["<Bo>"], 0) == 0
    assert repic.ict_reward("bo is here", ["<bo>"], 0) == 0
    assert repic.ict_reward("<bo-1>", ["<bo>"], 0) == 0
    # Exactly long enough passes.
    assert repic.ict_reward(caption, ["<bo>"], len(caption)) == 1
    assert repic.ict_reward(caption, ["<bo>"], len(caption) + 1) == 0
    # Names as pairs of tags: RePIC's code paid them where there are several names.
    assert repic.ict_reward("<bo> a dog </bo> and <mia>", ["<bo>", "<mia>"], 0) == 0
    assert repic.ict_reward("<bo> a dog </bo>", ["<bo>"], 0) == 0
    # A list of tasks may have names without brackets.
    assert repic.ict_reward("bo is here", ["bo"], 0) == 1


# ------------------------------------------------------------------------- rules, tasks and model
def paid(mllm, task, *texts, **settings):
    """What answers to a task earn."""
    config = repic.Config(min_chars=30, **settings)
    return repic.score(mllm, [task], list(texts), config).tolist()


def test_each_task_is_paid_by_its_own_rule(toy_mllm):
    [task] = toy_tasks("oct", 1)
    assert paid(toy_mllm, task, task.solution, "know", "yes no") == [1, 0, 0]

    [task] = toy_tasks("vlt", 1)
    (left, top, right, bottom), size = task.solution
    assert size == (144, 144) == task.photos[0].load().size == toy_mllm.picture_size(task.photos[0])
    exact = f"[{left}, {top}, {right}, {bottom}]"
    too_flat = f"[{left}, {top}, {right}, {top + 20}]"
    assert paid(toy_mllm, task, exact, too_flat) == [1, 0]

    [task] = toy_tasks("multi_ict", 1)
    all_names = " ".join(f"{name} is here and nowhere else." for name in task.solution)
    one_less = all_names.replace(task.solution[0], "it")
    earned = paid(toy_mllm, task, all_names, task.solution[0], one_less)
    assert earned == pytest.approx([1, 0, 1 - 1 / len(task.solution)])
    assert paid(toy_mllm, task, task.solution[0], without="length") == [1 / len(task.solution)]


def test_boxes_are_mapped_through_the_resize_the_model_saw(toy_mllm):
    [task] = toy_tasks("vlt", 1)
    # A processor that halves the scene: to 64 pixels, since sides are multiples of 16.
    small = MLLM(str(toy.FOLDER), 72 * 72)
    assert small.picture_size(task.photos[0]) == (64, 64)
    box, _ = task.solution
    assert paid(small, task, str([edge * 64 / 144 for edge in box])) == [1]


QWEN2 = Qwen2VLConfig()
QWEN25 = Qwen2_5_VLConfig()


def seeing(config, width, height):
    """The two things that boxes depend on: the model's family, and the size it resized to."""

    def picture_size(photo):
        return width, height

    return SimpleNamespace(config=config, picture_size=picture_size)


@pytest.mark.parametrize(
    "config, answer, expected",
    [
        # The box is (20, 40, 60, 80) in a picture of 200 x 100 pixels, seen as 112 x 56.
        (QWEN2, "(100,400),(300,800)", 1),
        (QWEN2, "<|box_start|>(100,400),(300,800)<|box_end|>", 1),
        (QWEN2, '{"bbox_2d": [100, 400, 300, 800]}', 1),
        (QWEN2, "[11, 22, 34, 45]", 0),
        (QWEN2, "[20, 40, 60, 80]", 0),
        (QWEN25, "[11, 22, 34, 45]", 1),
        (QWEN25, "(11.2,22.4),(33.6,44.8)", 1),
        (QWEN25, "(100,400),(300,800)", 0),
        (QWEN25, "[20, 40, 60, 80]", 0),
        # The upper half of the box: an IoU of exactly one half, and a little less.
        (QWEN2, "(100,400),(300,600)", 1),
        (QWEN2, "(100,400),(300,599.5)", 0),
        (QWEN25, "[11.2, 22.4, 33.6, 33.6]", 1),
        (QWEN25, "[11.2, 22.4, 33.6, 33.5]", 0),
        # Inside out.
        (QWEN2, "(300,800),(100,400)", 0),
        (QWEN2, "(300,400),(100,800)", 0),
    ],
)
def test_boxes_count_as_the_family_of_the_model_gives_them(config, answer, expected):
    photo = Photo("scene", Image.new("RGB", (200, 100)).copy)
    task = repic.Task("vlt", [photo], "Where?", ((20, 40, 60, 80), (200, 100)))
    assert paid(seeing(config, 112, 56), task, answer) == [expected]


def test_boxes_are_asked_for_as_the_model_gives_them(toy_mllm, byte_folder, concepts):
    units = [repic.box_unit(seeing(config, 1, 1)) for config in (QWEN2, QWEN25)]
    assert units == ["thousandths", "pixels"]
    assert repic.box_unit(toy_mllm) == "pixels"  # a Qwen2-VL, too, but it was taught pixels
    assert repic.box_unit(MLLM(str(byte_folder), 12544)) == "thousandths"

    for task in real_tasks(concepts, "vlt", 20, "thousandths"):
        assert "(x1,y1),(x2,y2), in thousandths of" in task.text and "bbox" not in task.text
    for task in real_tasks(concepts, "vlt", 20, "pixels"):
        assert '{"bbox_2d": [x1, y1, x2, y2]}' in task.text and "thousandths" not in task.text
    # Nothing else depends on it.
    shares = {"oct": 1.0, "vlt": 1.0}
    in_pixels = repic.make_tasks(concepts, shares, 30, 64, "pixels", 0)
    in_thousandths = repic.make_tasks(concepts, shares, 30, 64, "thousandths", 0)
    for one, other in zip(in_pixels, in_thousandths, strict=True):
        assert (one.kind, one.photos, one.solution) == (other.kind, other.photos, other.solution)


def test_means_by_kind():
    means = repic.means_by_kind(["oct", "oct", "vlt"], [1.0, 0.0, 0.5])
    assert means == {"oct": 0.5, "vlt": 0.5}


@pytest.fixture
def learner(random_folder):
    """An untrained model with adapters that already do something, and an optimizer of theirs that
    keeps the gradient and makes no step."""
    mllm = MLLM(str(random_folder), 65536)
    torch.manual_seed(0)
    lora.add_lora(mllm.model, 4, 8)
    for layer in lora.lora_layers(mllm.model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    adapters = [p for p in mllm.model.parameters() if p.requires_grad]

    class Keep(torch.optim.SGD):
        def step(self):
            self.gradient = torch.cat([p.grad.flatten() for p in adapters])

    return mllm, Keep(adapters, lr=0.0)


CAPTION = "<Mia> and <Bo> stand in a street."  # 33 characters


@pytest.mark.parametrize(
    "kind, answer, expected",
    [
        ("oct", "Yes.", 1),
        ("oct", "No, it is another one.", 1),  # wrong, but it can be read
        ("oct", "yes or no", 0),
        ("oct", "I know.", 0),
        ("oct", "", 0),
        ("vlt", "It is at [1, 2, 3, 4].", 1),
        ("vlt", "(1,2),(3,4)", 1),
        ("vlt", "[1, 2, 3, 4] or [5, 6, 7, 8]", 0),
        ("vlt", "on the left", 0),
        ("multi_ict", CAPTION, 1),
        ("multi_ict", CAPTION.replace("<Mia>", "A girl"), 1),  # not every name, but a caption
        ("multi_ict", CAPTION[:29], 0),
        ("multi_ict", CAPTION.replace("<Bo>", "<Bo></Bo>"), 0),
        ("single_ict", CAPTION, 1),
        ("single_ict", "<Mia>", 0),
    ],
)
def test_which_answers_can_be_read(kind, answer, expected):
    solutions = {
        "oct": "yes",
        "vlt": ((1, 2, 3, 4), (9, 9)),
        "multi_ict": ["<Mia>", "<Bo>"],
        "single_ict": ["<Mia>"],
    }
    task = repic.Task(kind, [], "", solutions[kind])
    config = repic.Config(min_chars=30)
    other = repic.Task("oct", [], "", "no")
    shares = repic.parsed([other, task], ["", "no", answer, ""], config)
    assert shares.tolist() == [0, 1, expected, 0]


def test_a_caption_of_any_length_can_be_read_without_the_rule_for_it():
    task = repic.Task("single_ict", [], "", ["<Mia>"])
    config = repic.Config(min_chars=30, without="length")
    assert repic.parsed([task], ["<Mia>", " "], config).tolist() == [1, 0]


def test_the_answers_of_a_group_are_to_one_prompt(learner, monkeypatch):
    """RePIC's code shuffled its data on every GPU and drew a wording for every answer."""
    mllm, optimizer = learner
    tasks = toy_tasks("single_ict", 3)
    spoken_to = []
    speak = mllm.speak

    def listening_speak(prompts, samples, *rest):
        spoken_to.append((prompts, samples))
        return speak(prompts, samples, *rest)

    monkeypatch.setattr(mllm, "speak", listening_speak)
    config = repic.Config(samples=4, max_tokens=8, micro=2)
    metrics, example = repic.train_step(mllm, tasks, optimizer, 0, config)
    assert spoken_to == [([Prompt(task.photos, task.text) for task in tasks], 4)]
    assert len(example["samples"]) == 4
    assert set(example["samples"][0]) == {
        "text",
        "reward",
        "parsed",
        "single_ict",
        "nll",
        "completion_length",
    }
    assert "single_ict" in metrics and "oct" not in metrics
    assert set(metrics) <= set(repic.METRICS)


def test_sft_is_cross_entropy(learner):
    """Its update has the gradient of the plain cross-entropy, each caption weighing the same."""
    mllm, optimizer = learner
    tasks = toy_tasks("multi_ict", 1) + toy_tasks("single_ict", 1)
    config = repic.Config(sft="truth", samples=1, beta=0.0, micro=1, min_chars=30)
    metrics, example = repic.train_step(mllm, tasks, optimizer, 0, config)
    captions = repic.given_captions(mllm, tasks, config)
    assert example["samples"][0]["text"] == captions[0]
    assert metrics["reward"] == 1  # the given captions use every name
    assert "parsed" not in metrics  # nothing was sampled
    assert "kl" not in metrics  # its weight is 0

    mllm.model.zero_grad()
    answers = repic.as_completions(mllm, captions)
    losses = []
    for task, ids, mask in zip(tasks, answers.ids, answers.mask, strict=True):
        assert mllm.tokenizer.decode(ids[mask]).endswith("<|im_end|>")
        logps = plain_logps(mllm, Prompt(task.photos, task.text), ids[mask])
        losses.append(-logps.mean())
    (sum(losses) / len(losses)).backward()
    adapters = optimizer.param_groups[0]["params"]
    plain = torch.cat([p.grad.flatten() for p in adapters])
    ours = optimizer.gradient
    assert torch.allclose(ours / ours.norm(), plain / plain.norm(), atol=1e-4)
    # The loss is read from the same pass.
    assert metrics["nll"] == pytest.approx((sum(losses) / len(losses)).item(), abs=1e-4)


def test_sft_scores_its_answers_once(learner, monkeypatch):
    """There is no sampling policy and no reference, and so no pass for them."""
    mllm, optimizer = learner
    passes = []
    log_probs = mllm.log_probs

    def count(*given):
        passes.append(torch.is_grad_enabled())
        return log_probs(*given)

    monkeypatch.setattr(mllm, "log_probs", count)
    tasks = toy_tasks("single_ict", 3)
    config = repic.Config(sft="truth", samples=1, beta=0.0, micro=2, mu=2, min_chars=10_000)
    metrics, _ = repic.train_step(mllm, tasks, optimizer, 0, config)
    # It learns its answers whatever RePIC's rules would pay: these are too short.
    assert metrics["reward"] == 0
    assert metrics["grad_norm"] > 0
    assert passes == [True] * 4  # two micro-batches, twice
    assert metrics["clip_fraction"] == 0


def test_sft_learns_what_base_says_when_it_is_asked_for_the_names(
    random_mllm, concepts, monkeypatch
):
    """With LoRA off."""
    switches = []

    @contextlib.contextmanager
    def lora_off(model):
        switches.append("off")
        yield
        switches.append("on")

    monkeypatch.setattr(repic, "lora_off", lora_off)

    def greedy(prompts, max_tokens):
        assert switches == ["off"]
        assert max_tokens == 32
        return [f"{len(prompt.photos)} pictures; {prompt.text}" for prompt in prompts]

    monkeypatch.setattr(random_mllm, "greedy", greedy)
    [task] = real_tasks(concepts, "multi_ict", 1)
    config = repic.Config(sft="base", max_tokens=32)
    [caption] = repic.given_captions(random_mllm, [task], config)
    assert caption == (
        f"{len(task.photos)} pictures; {task.text} Output the final answer including its name."
    )


# ------------------------------------------------------------------------------- a list of tasks
OCT = {
    "image": ["crops/cat.png", "street.jpg"],
    "problem": "Is <Mia> of the first image in the second image?",
    "solution": "Yes",
    "accu_reward_method": "yes_no",
}
VLT = {
    "image": "street.jpg",
    "problem": "<image>Give the box of the left dog.",
    "solution": [20, 10, 60, 30],
    "accu_reward_method": "iou",
}
SINGLE = {
    "image": ["crops/cat.png", "street.jpg"],
    "problem": "The first image is <Mia>. Describe the second image.",
    "solution": "<Mia>",
    "accu_reward_method": "yes_no_name",
}
MULTI = {
    "image": ["crops/cat.png", "crops/dog.png", "street.jpg"],
    "problem": "The images show <Mia>, <Bo>. Describe the last image.",
    "solution": ["<Mia>", "<Bo>"],
    "accu_reward_method": "yes_no_name_multi",
}


@pytest.fixture
def images(tmp_path):
    """A folder of pictures of three sizes."""
    folder = tmp_path / "train"
    (folder / "crops").mkdir(parents=True)
    Image.new("RGB", (30, 40), "red").save(folder / "crops/cat.png")
    Image.new("RGB", (40, 40), "blue").save(folder / "crops/dog.png")
    Image.new("RGB", (100, 50), "grey").save(folder / "street.jpg")
    return folder


def write_list(images, records, lines=False):
    """A list of tasks beside the pictures, as JSON or JSON lines.   -> the settings to read it"""
    file = images.parent / ("tasks.jsonl" if lines else "tasks.json")
    text = json.dumps(records)
    if lines:
        text = "\n".join(json.dumps(record) for record in records) + "\n"
    file.write_text(text)
    return repic.Config(tasks=str(file), images=str(images))


@pytest.mark.parametrize("lines", [False, True])
def test_a_list_of_tasks_is_read_as_it_is_distributed(images, lines):
    config = write_list(images, [OCT, VLT, SINGLE, MULTI], lines)
    oct_task, vlt_task, single, multi = repic.load_tasks(config, "thousandths")
    kinds = [task.kind for task in (oct_task, vlt_task, single, multi)]
    assert kinds == ["oct", "vlt", "single_ict", "multi_ict"]

    assert oct_task.solution == "yes"
    assert oct_task.text == (
        "Is <Mia> of the first image in the second image? "
        "Your final answer must be either yes or no, with no additional output."
    )
    assert [photo.load().size for photo in oct_task.photos] == [(30, 40), (100, 50)]

    assert vlt_task.solution == ((20, 10, 60, 30), (100, 50))
    assert vlt_task.text == (
        "Give the box of the left dog. For bounding box coordinates, answer in the form "
        "(x1,y1),(x2,y2), in thousandths of the picture's width and height."
    )
    _, vlt_in_pixels, _, _ = repic.load_tasks(config, "pixels")
    assert vlt_in_pixels.text.endswith('answer in JSON format: {"bbox_2d": [x1, y1, x2, y2]}')

    assert single.solution == ["<Mia>"]
    assert multi.solution == ["<Mia>", "<Bo>"]
    assert [photo.name for photo in multi.photos] == MULTI["image"]
    assert multi.text.startswith(MULTI["problem"])


def test_perfect_answers_to_a_list_earn_all(images):
    config = write_list(images, [OCT, VLT, SINGLE, MULTI])
    tasks = repic.load_tasks(config, "thousandths")
    caption = "<Mia> and <Bo> stand in a street and wait for the bus."
    answers = ["yes", "(200,200),(600,600)", caption, caption]
    mllm = seeing(QWEN2, 112, 56)
    earned = [paid(mllm, *pair) for pair in zip(tasks, answers, strict=True)]
    assert earned == [[1], [1], [1], [1]]


def test_the_ending_of_a_caption_task_is_drawn_once(images):
    config = write_list(images, [SINGLE] * 500)
    tasks = repic.load_tasks(config, "pixels")
    endings = [task.text.removeprefix(SINGLE["problem"]).strip() for task in tasks]
    assert 70 < endings.count("Use the given names in the caption.") < 130
    assert 70 < endings.count("Do not repeat what was said here.") < 130
    assert 260 < endings.count("") < 340
    assert tasks == repic.load_tasks(config, "pixels")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image": "nowhere.jpg"}, "nowhere.jpg, which is not there"),
        ({"image": "../tasks.json"}, "cannot identify image file"),
        ({"image": []}, "the path of its image"),
        ({"image": 5}, "the path of its image"),
        ({"problem": None}, "a text as its problem"),
        ({"accu_reward_method": "bleu"}, "one of yes_no, iou, yes_no_name, yes_no_name_multi"),
        ({"accu_reward_method": ["iou"]}, "as its accu_reward_method"),
        ({"solution": "somewhere"}, "a box"),
        ({"solution": [1, 2, 3]}, "a box"),
        ({"solution": [1, 2, "3", 4]}, "a box"),
        ({"solution": [60, 10, 20, 30]}, "a box"),
        ({"accu_reward_method": "yes_no"}, "yes or no"),
        ({"accu_reward_method": "yes_no", "solution": "yes or no"}, "yes or no"),
        ({"accu_reward_method": "yes_no_name", "solution": ""}, "a name"),
        ({"accu_reward_method": "yes_no_name_multi"}, "a name or a list of names"),
    ],
)
def test_an_odd_record_is_named(images, change, message):
    config = write_list(images, [OCT, VLT | change])
    with pytest.raises(DataError, match=f"record 2 of .*tasks.json: .*{message}") as caught:
        repic.load_tasks(config, "pixels")
    assert "\n" not in str(caught.value)


def test_a_record_may_leave_its_method_out(images):
    """RePIC's code takes it for a box."""
    without = {key: value for key, value in VLT.items() if key != "accu_reward_method"}
    [task] = repic.load_tasks(write_list(images, [without]), "pixels")
    assert task.kind == "vlt"


@pytest.mark.parametrize("content", ["{}", "[]", "[1", '"a"', ""])
def test_a_file_that_is_no_list_of_tasks(images, content):
    config = write_list(images, [])
    (images.parent / "tasks.json").write_text(content)
    with pytest.raises(DataError, match=r"tasks\.json"):
        repic.load_tasks(config, "pixels")
    with pytest.raises(DataError, match="record 1 of .*: wanted: an object"):
        repic.load_tasks(write_list(images, ["text"]), "pixels")


@pytest.mark.parametrize("tasks, eval_games, held_out", [(20, 100, 4), (20, 3, 3), (4, 100, 0)])
def test_the_end_of_a_shuffled_list_is_held_out(images, tasks, eval_games, held_out):
    records = [VLT | {"problem": f"Find thing {number}."} for number in range(tasks)]
    config = write_list(images, records)
    config.eval_games = eval_games
    mined = repic.mine(seeing(QWEN2, 112, 56), config)
    assert (len(mined.seen), mined.unseen, mined.split) == (held_out, [], None)
    texts = [task.text for task in mined.train + mined.seen]
    assert len(set(texts)) == tasks  # each is in one part
    in_order = [task.text for task in repic.load_tasks(config, "thousandths")]
    assert texts != in_order and sorted(texts) == sorted(in_order)
    config.seed = 1
    other = repic.mine(seeing(QWEN2, 112, 56), config)
    assert texts != [task.text for task in other.train + other.seen]


def test_kinds_of_a_list_may_be_left_out(images):
    config = write_list(images, [OCT, VLT, SINGLE, MULTI] * 2)
    config.without = "ict"
    mined = repic.mine(seeing(QWEN2, 112, 56), config)
    assert sorted(task.kind for task in mined.train) == ["oct", "oct", "vlt", "vlt"]
    config = write_list(images, [VLT])
    config.without = "vlt"
    with pytest.raises(DataError, match="but those that --without leaves out"):
        repic.mine(seeing(QWEN2, 112, 56), config)


LIST_RUN = "--steps 2 --games 2 --samples 2 --max-tokens 4 --rank 2 --max-pixels 12544".split()


@pytest.mark.parametrize("records", [[OCT, VLT, SINGLE, MULTI] * 3, [OCT, VLT]])
def test_a_run_on_a_list(images, records, byte_folder, tmp_path, monkeypatch, capsys):
    """Of the shorter one no task is held out."""
    write_list(images, records)
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", str(byte_folder), "--tasks", "tasks.json", "--images", "train"]
    result = repic.train(*repic.read_settings([*arguments, *LIST_RUN, "--out", "run"]))
    held_out = len(records) // 5
    shown = capsys.readouterr().out
    assert f"{len(records)} tasks, of which {held_out} kept for the test: " in shown
    # There is no page of such a run, and none is spoken of.
    assert "report.py" not in shown
    with pytest.raises(DataError, match="naming.py measures its adapter"):
        report.read_run("run")
    for when in ("before", "after"):
        figures = result[when]
        assert figures.pop("unseen") is None
        known = [value for value in figures.values() if value is not None]
        assert (known == []) == (held_out == 0)
        assert all(0 <= value <= 1 for value in known)
    assert len(result["examples"]["after"]) == held_out
    assert len((tmp_path / "run/samples.jsonl").read_text().splitlines()) == 2


# --------------------------------------------------------------------------------------- the runs
def test_an_exam_without_held_out_concepts(toy_mllm, monkeypatch, capsys):
    monkeypatch.setattr(toy, "world", functools.partial(toy.world, concepts=2, photos=1))
    config = repic.Config(steps=1, games=4, eval_games=3, train_concepts="20", max_tokens=8)
    tasks = repic.mine(toy_mllm, config)
    assert (len(tasks.train), tasks.seen, tasks.unseen) == (4, [], [])
    assert len(tasks.split.train) == 20
    assert "0 held out (0 tasks)" in capsys.readouterr().out
    taken = repic.exam(toy_mllm, tasks, config)
    assert taken == {"figures": dict.fromkeys([*repic.KINDS, "unseen"]), "examples": []}


def run_repic(*arguments):
    command = [sys.executable, "repic.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def rows_without_seconds(folder):
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["seconds"]
    return rows


SMALL = ("--steps", "4", "--games", "4", "--eval-games", "2", "--save-every", "2")


@pytest.mark.parametrize(
    "options, samples",
    [
        (("--mix", "1,1,1,1", "--samples", "4"), 4),
        pytest.param(("--sft", "truth"), 1, marks=pytest.mark.slow),
    ],
)
def test_a_run_records_itself_and_a_killed_one_resumes_to_it(options, samples, tmp_path):
    whole = tmp_path / "whole"
    done = run_repic("--out", whole, *SMALL, *options)
    assert done.returncode == 0, done.stderr
    result = json.loads((whole / "result.json").read_text())
    for when in ("before", "after"):
        assert set(result[when]) == {*repic.KINDS, "unseen"}
        assert all(0 <= result[when][kind] <= 1 for kind in repic.KINDS)
    assert all(kind in done.stdout for kind in repic.KINDS)
    first = json.loads((whole / "samples.jsonl").read_text().splitlines()[0])
    assert first["kind"] in repic.KINDS
    assert len(first["samples"]) == samples

    # Killed after step 3, saved after step 2.
    killed = tmp_path / "killed"
    killed.mkdir()
    command = [sys.executable, "repic.py", "--out", str(killed), *SMALL, *options]
    silent = subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=ROOT, stdout=silent, stderr=silent)
    while not (killed / "metrics.csv").exists() or len(rows_without_seconds(killed)) < 3:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    done = run_repic("--out", killed, "--resume")
    assert done.returncode == 0, done.stderr
    assert rows_without_seconds(killed) == rows_without_seconds(whole)
    for name in ("samples.jsonl", "adapter/adapter_model.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
