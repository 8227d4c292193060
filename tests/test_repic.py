"""RePIC and SFT: what is asked, what a rule pays, and that they train by the same learner."""

import csv
import json
import math
import re
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

import lora
import repic
import toy
from conftest import ROOT, plain_logps
from data import Concept, DataError, Photo, tag
from model import MLLM, Prompt


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
    world = toy.world(0, concepts=3, views=3)
    return repic.make_tasks(world, {kind: 1.0}, count, toy.SIDE, 0)


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
    tasks = repic.make_tasks(concepts, {"oct": 1.0}, 200, 64, 3)
    owner = owners(concepts)
    yes = 0
    look_alikes = 0
    for task in tasks:
        first, second = task.photos
        same = owner[first.name] is owner[second.name]
        assert task.solution == ("yes" if same else "no")
        assert first != second
        assert tag(owner[first.name].name) in task.text
        yes += same
        look_alikes += not same and owner[first.name].category == owner[second.name].category
    assert 80 < yes < 120
    assert 0.5 < look_alikes / (200 - yes) < 0.9
    assert len({re.sub("<.*?>", "", task.text) for task in tasks}) == 2  # both wordings


def test_localization_asks_for_one_box(concepts):
    owner = owners(concepts)
    for task in repic.make_tasks(concepts, {"vlt": 1.0}, 60, 64, 3):
        [scene] = task.photos
        box, size = task.solution
        assert size == scene.load().size
        # What is looked for is there once.
        wanted = [
            named.photo
            for named in task.shown
            if repic.phrase_for(owner[named.photo.name]) in task.text
        ]
        [photo] = wanted
        assert scene.load().crop(box).getpixel((5, 5)) == photo.load().getpixel((0, 0))


@pytest.mark.parametrize("kind, counts", [("single_ict", {1}), ("multi_ict", {2, 3})])
def test_identity_consistency_names_one_picture_each(concepts, kind, counts):
    owner = owners(concepts)
    tasks = repic.make_tasks(concepts, {kind: 1.0}, 60, 64, 3)
    assert {len(task.solution) for task in tasks} == counts
    for task in tasks:
        *references, _ = task.photos
        assert [tag(owner[photo.name].name) for photo in references] == task.solution
        assert ", ".join(task.solution) in task.text
        assert {named.name for named in task.shown} == set(task.solution)
        assert not {named.photo for named in task.shown} & set(references)
        for named in task.shown:
            assert tag(owner[named.photo.name].name) == named.name


def test_tasks_come_in_their_shares_and_are_seeded():
    concepts = [painted(f"mug {i}", "mug") for i in range(4)]
    tasks = repic.make_tasks(concepts, repic.KINDS, 1000, 64, 0)
    kinds = [task.kind for task in tasks]
    for kind, share in repic.KINDS.items():
        assert abs(kinds.count(kind) - 10 * share) < 45
    assert sum(repic.KINDS.values()) == 100
    assert tasks == repic.make_tasks(concepts, repic.KINDS, 1000, 64, 0)
    assert tasks != repic.make_tasks(concepts, repic.KINDS, 1000, 64, 1)
    with pytest.raises(DataError, match="two concepts"):
        repic.make_tasks(concepts[:1], repic.KINDS, 1, 64, 0)


def test_shares_follow_the_options():
    config, _ = repic.read_settings(["--mix", "1,2,3,4"])
    assert list(repic.shares_of_kinds(config).values()) == [1, 2, 3, 4]
    config, _ = repic.read_settings(["--mix", "1,2,3,4", "--without", "ict"])
    assert list(repic.shares_of_kinds(config).values()) == [1, 2, 0, 0]
    config, _ = repic.read_settings(["--sft"])
    assert list(repic.shares_of_kinds(config).values()) == [0, 0, 26, 5]
    assert (config.samples, config.beta) == (1, 0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--mix", "1,2,3"], "--mix wants the shares of oct, vlt, single_ict, multi_ict"),
        (["--mix", "1,0,0,0", "--without", "oct"], "may not all be 0"),
        (["--sft", "--beta", "0.1"], "leave out --samples and --beta"),
        (["--sft", "--samples", "4"], "leave out --samples and --beta"),
        (["--samples", "1"], "--samples must be at least 2"),
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
    ],
)
def test_boxes_are_read_with_decimals_and_spaces(answer, box):
    """RePIC's code read whole numbers only, and none after a space."""
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
    config = repic.Config(sft=True, samples=1, beta=0.0, micro=1, min_chars=30)
    metrics, example = repic.train_step(mllm, tasks, optimizer, 0, config)
    captions = repic.given_captions(mllm, tasks, 0)
    assert example["samples"][0]["text"] == captions[0]
    assert metrics["reward"] == 1  # the given captions use every name
    assert metrics["kl"] > 0.01  # against LoRA off; its weight is 0

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


def test_sft_learns_what_the_model_says_of_real_photos(random_mllm, concepts, monkeypatch):
    def greedy(prompts, max_tokens):
        return [f"a picture of {prompt.photos[0].name}" for prompt in prompts]

    monkeypatch.setattr(random_mllm, "greedy", greedy)
    [task] = repic.make_tasks(concepts, {"multi_ict": 1.0}, 1, 64, 3)
    [caption] = repic.given_captions(random_mllm, [task], 32)
    parts = [f"{named.name}: a picture of {named.photo.name}" for named in task.shown]
    assert caption == " ".join(parts)


# --------------------------------------------------------------------------------------- the runs
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
        pytest.param(("--sft",), 1, marks=pytest.mark.slow),
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
