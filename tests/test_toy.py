"""The drawn world: it is the same every time, and the truth can be read off the words."""

import pathlib
import random
import shlex
import subprocess
import sys

import pytest
import torch

import rrg
import toy
from conftest import ROOT
from data import (
    DataError,
    Game,
    Photo,
    fingerprint,
    load_concepts,
    read_photo,
    split_concepts,
    tag,
)
from reward import Description, speaker_prompt

MUG = {
    "category": "mug",
    "colour": "red",
    "pattern": "striped",
    "badge": "star",
    "place": "grass",
    "pose": "tilted",
    "light": "dim",
}
ALL_KINDS = (*toy.IDENTITY, *toy.VIEW)


def other_word(kind):
    """A word of this kind that is not true of MUG."""
    others = [word for word in toy.ATTRIBUTES[kind] if word != MUG[kind]]
    return others[0]


# ----------------------------------------------------------------------------------------- words
def test_every_attribute_has_words_of_its_own():
    words = []
    for of_kind in toy.ATTRIBUTES.values():
        words += of_kind
    assert len(words) == len(set(words)) == len(toy.KIND_OF)
    assert set(toy.ATTRIBUTES) == {*toy.SUBJECT, *toy.VIEW}


def test_a_sentence_says_what_it_is_to_say():
    coarse, detailed = toy.sentence(MUG, ALL_KINDS)
    assert coarse == "A photo of a red mug"
    assert detailed == "The red striped mug with a star badge, tilted on grass in dim light."
    assert toy.description(MUG, ALL_KINDS) == f"{coarse}. {detailed}"
    assert toy.sentence(MUG, []) == ("A photo of a mug", "The mug.")
    assert toy.sentence(MUG, ["light"]) == ("A photo of a mug", "The mug, in dim light.")
    assert toy.phrase(MUG) == "red striped mug with a star badge"
    assert toy.phrase(MUG, ["colour"]) == "red mug"
    assert toy.clause("<mug-1>", MUG) == "<mug-1> is tilted on grass in dim light."
    assert toy.clause("The red mug", MUG, short=True) == "The red mug is on grass."


@pytest.mark.parametrize("kind", toy.VIEW)
def test_a_quiz_has_one_right_option(kind):
    answers = set()
    for seed in range(20):
        quiz = toy.quiz(MUG, kind, random.Random(seed))
        assert "{}" in quiz.text
        right = [letter for letter, text in quiz.options.items() if toy.oracle(text, MUG)]
        assert right == [quiz.answer]
        answers.add(quiz.answer)
    assert answers == {"A", "B"}


def test_altered_changes_exactly_the_given_kinds():
    rng = random.Random(0)
    for _ in range(50):
        kinds = rng.sample(list(MUG), rng.randint(0, 7))
        altered = toy.altered(MUG, kinds, rng)
        assert {kind for kind in MUG if altered[kind] != MUG[kind]} == set(kinds)
    assert MUG["colour"] == "red"  # the original stays as it was


# ---------------------------------------------------------------------------------------- oracle
def test_oracle_checks_every_claim():
    text = toy.description(MUG, ALL_KINDS)
    assert toy.oracle(text, MUG)
    for kind in toy.ATTRIBUTES:
        lie = MUG | {kind: other_word(kind)}
        assert not toy.oracle(toy.description(lie, ALL_KINDS), MUG)
    assert toy.oracle("", MUG)  # no words fit everything


def test_claims_leaks_and_coverage_are_read_off_the_words():
    _, detailed = toy.sentence(MUG, ALL_KINDS)
    assert len(toy.claims(detailed)) == 7
    assert toy.claims("A BLUE mug, Fallen.") == [
        ("colour", "blue"),
        ("category", "mug"),
        ("pose", "fallen"),
    ]
    assert toy.leaks(detailed)
    assert not toy.leaks("The mug.")
    assert toy.coverage(detailed) == 1
    assert toy.coverage("The red mug.") == 1 / 3
    assert toy.coverage("The red and blue mug.") == 1 / 3
    assert toy.coverage("") == 0


def mug_photo(name, **changes):
    return Photo(name, load=None, truth=MUG | changes)


def make_game(name, positive, pool):
    return Game(name, "mug", target=mug_photo(f"{name}/target"), pool=pool, positive=positive)


def test_truth_columns_say_what_is_true_of_each_description():
    # The pools: in both games the positive is the mug, once on snow and once where it was.
    games = [
        make_game("a", 1, [mug_photo("a/0", badge="moon"), mug_photo("a/1", place="snow")]),
        make_game("b", 0, [mug_photo("b/0"), mug_photo("b/1", colour="blue")]),
    ]
    texts = [
        "The red mug with a star badge.",  # a: fits the positive only
        "The red mug.",  # a: fits both
        "The blue mug.",  # a: fits none
        None,
        "The red mug, on grass.",  # b: fits the positive only, and leaks
        "The blue mug.",  # b: fits the other photo only
        "The striped mug.",  # b: fits both
        None,
    ]
    descriptions = []
    for text in texts:
        descriptions.append(Description("A photo of a mug", text) if text else None)

    columns = toy.truth_columns(games, descriptions)
    assert list(columns) == ["oracle", "leakage", "coverage"]
    for column in columns.values():
        assert column.dtype == torch.float64
    assert columns["oracle"].tolist() == [1, 0, 0, 0, 1, 0, 0, 0]
    assert columns["leakage"].tolist() == [0, 0, 0, 0, 1, 0, 0, 0]
    third = 1 / 3
    assert columns["coverage"].tolist() == [2 / 3, third, third, 0, third, third, third, 0]


def test_truth_columns_are_left_out_where_nothing_is_known():
    unknown = Photo("x", load=None)
    game = Game("mug", "mug", target=unknown, pool=[unknown, unknown], positive=0)
    assert toy.truth_columns([game], [Description("A photo of a mug", "The mug."), None]) == {}


# --------------------------------------------------------------------------------------- drawing
def test_every_attribute_changes_the_picture():
    rng = random.Random(0)
    occasion = toy.new_occasion(rng)
    jitter = toy.new_jitter(occasion, rng)
    truth = toy.new_subject(rng) | occasion.view
    for kind, words in toy.ATTRIBUTES.items():
        if kind == "pose":  # which is drawn by the jitter's angle
            continue
        pictures = set()
        for word in words:
            pictures.add(toy.draw(truth | {kind: word}, jitter).tobytes())
        assert len(pictures) == len(words), kind
    assert toy.draw(truth, jitter).tobytes() == toy.draw(truth, jitter).tobytes()
    assert toy.draw(truth, jitter, 224).size == (224, 224)


def test_a_hole_shows_what_is_behind_it():
    silhouette = toy.draw_silhouette(toy.SHAPES["mug"], 100)
    assert silhouette.getpixel((76, 52)) == 0  # inside the handle
    assert silhouette.getpixel((92, 52)) == 255  # the handle
    assert silhouette.getpixel((40, 52)) == 255  # the body
    assert silhouette.getpixel((2, 2)) == 0


def test_the_pose_is_an_angle():
    for seed in range(100):
        rng = random.Random(seed)
        occasion = toy.new_occasion(rng)
        jitter = toy.new_jitter(occasion, rng)
        assert abs(jitter.angle - occasion.side * toy.ANGLE[occasion.view["pose"]]) <= 8


# --------------------------------------------------------------------------------------- the world
def subject_of(concept):
    truth = concept.photos[0].truth
    return {kind: truth[kind] for kind in toy.SUBJECT}


def differences(subject, other):
    return sum(subject[kind] != other[kind] for kind in toy.SUBJECT)


def test_the_world_is_seeded():
    first = toy.world(3)
    again = toy.world(3)
    for concept, other in zip(first, again, strict=True):
        assert concept.name == other.name
        for photo, copy in zip(concept.photos, other.photos, strict=True):
            assert photo.name == copy.name
            assert photo.truth == copy.truth
    assert first[5].photos[2].load().tobytes() == again[5].photos[2].load().tobytes()
    assert [subject_of(concept) for concept in toy.world(4)] != [subject_of(c) for c in first]


def test_the_world_has_the_size_that_is_wanted():
    world = toy.world(0, size=32, concepts=3, photos=1)
    assert len(world) == 3 * len(toy.ATTRIBUTES["category"])
    names = set()
    for concept in world:
        assert len(concept.photos) == 2
        assert concept.photos[0].load().size == (32, 32)
        assert all(photo.truth["category"] == concept.category for photo in concept.photos)
        names |= {photo.name for photo in concept.photos}
    assert len(names) == 2 * len(world)
    assert set(toy.UNSEEN) < {concept.category for concept in world}


def view_of(photo):
    return {kind: photo.truth[kind] for kind in toy.VIEW}


def test_an_album_has_two_occasions():
    """Three photos in the same place, pose and light, and three in others."""
    for concept in toy.world(5):
        views = [view_of(photo) for photo in concept.photos]
        assert views[0] == views[1] == views[2]
        assert views[3] == views[4] == views[5]
        assert views[0] != views[3]
        assert [photo.part for photo in concept.photos] == ["train"] * 3 + ["test"] * 3
        assert len({photo.load().tobytes() for photo in concept.photos}) == 6
    assert [len(concept.photos) for concept in toy.world(5, occasions=3, photos=2)] == [6] * 120


def test_names_are_given_to_one_thing_each():
    for seed in range(5):
        names = [concept.name for concept in toy.world(seed)]
        assert len(set(names)) == 120
        assert set(names) < set(toy.NAMES)
    # They tell nothing: another world mostly gives them to other categories.
    category_of = {concept.name: concept.category for concept in toy.world(0)}
    same = [category_of[c.name] == c.category for c in toy.world(1) if c.name in category_of]
    assert len(same) > 90
    assert sum(same) < 20


def test_the_world_is_fresh_and_full_of_look_alikes():
    subjects = [subject_of(concept) for concept in toy.world(3)]
    assert len({tuple(subject.values()) for subject in subjects}) == len(subjects)
    assert all(toy.is_fresh(subject) for subject in subjects)

    nearest = []
    for subject in subjects:
        distances = []
        for other in subjects:
            if other is not subject and other["category"] == subject["category"]:
                distances.append(differences(subject, other))
        nearest.append(min(distances))
    # Most differ from another one in a single attribute.
    assert nearest.count(1) > 0.6 * len(nearest)


def test_a_quarter_of_all_subjects_is_fresh():
    rng = random.Random(0)
    fresh = 0
    for _ in range(2000):
        subject = {kind: rng.choice(toy.ATTRIBUTES[kind]) for kind in toy.SUBJECT}
        fresh += toy.is_fresh(subject)
    assert 0.2 < fresh / 2000 < 0.3
    for wanted in (True, False):
        assert toy.is_fresh(toy.new_subject(rng, fresh=wanted)) == wanted


# ---------------------------------------------------------------------------------- the checkpoint
def test_a_toy_model_is_known_by_its_patches(tmp_path):
    assert toy.is_toy(toy.FOLDER)
    assert not toy.is_toy(tmp_path)  # nothing there
    config = tmp_path / "config.json"
    config.write_text('{"vision_config": {"patch_size": 14}}')
    assert not toy.is_toy(tmp_path)
    config.write_text("{")
    with pytest.raises(DataError, match="cannot read"):
        toy.is_toy(tmp_path)


def test_the_checkpoint_is_small_and_ordinary():
    weights = toy.FOLDER / "model.safetensors"
    assert weights.stat().st_size < 10e6
    assert not list(toy.FOLDER.glob("*.bin"))


# ---------------------------------------------------------------------- a folder of toys, to try
def draw_toys(folder, capsys):
    """python toy.py --photos FOLDER.   -> the commands that it says come next"""
    toy.main(["--photos", str(folder)])
    lines = capsys.readouterr().out.splitlines()
    return [shlex.split(line) for line in lines if line.startswith("  python ")]


def test_toys_are_drawn_as_a_folder_of_things_and_new_photos(tmp_path, capsys, toy_mllm):
    draw_toys(tmp_path / "my_toys", capsys)
    things = load_concepts(tmp_path / "my_toys/things")
    assert len(things) == 12
    for thing in things:
        assert len(thing.photos) == 4
        # What a reader of these folders asks is what the toy model knows.
        assert toy_mllm.knows(speaker_prompt(thing.photos[0], thing.category))
        assert toy_mllm.knows(tag(thing.name))
    known = {photo.pixels for thing in things for photo in thing.photos}

    new = sorted((tmp_path / "my_toys/new").iterdir())
    names = {thing.name for thing in things}
    assert {file.stem for file in new} == names | {"stranger"}
    for file in new:
        picture = read_photo(file)
        assert picture.size == (toy.SIDE, toy.SIDE)
        assert fingerprint(picture) not in known


def test_a_default_run_never_trains_on_these_toys(tmp_path, capsys):
    """And the stranger is none of them, though of the category of some."""
    draw_toys(tmp_path, capsys)
    split = split_concepts(toy.world(0), 0, toy.UNSEEN)
    trained_on = {tuple(subject_of(concept).values()) for concept in split.train}
    of_picture = {}  # {hash of a photo: subject}
    for concept in toy.world(0):
        for photo in concept.photos:
            of_picture[fingerprint(photo.load())] = tuple(subject_of(concept).values())

    subjects = set()
    for file in tmp_path.glob("things/*/*.png"):
        subjects.add(of_picture[fingerprint(read_photo(file))])
    assert len(subjects) == 12
    assert {subject[0] for subject in subjects} == set(toy.UNSEEN)
    assert not subjects & trained_on
    stranger = of_picture[fingerprint(read_photo(tmp_path / "new/stranger.png"))]
    assert stranger not in subjects | trained_on
    assert stranger[0] in toy.UNSEEN


def test_a_new_photo_is_called_by_its_thing(tmp_path, capsys):
    draw_toys(tmp_path, capsys)
    files = [tmp_path / f"new/{concept.name}.png" for concept in toy.world(0)]
    assert sum(file.is_file() for file in files) == 12
    for concept, file in zip(toy.world(0), files, strict=True):
        if file.is_file():
            assert fingerprint(read_photo(file)) == fingerprint(concept.photos[-1].load())


def test_the_commands_that_come_next_are_understood(tmp_path, capsys, monkeypatch):
    """Also in a folder whose name has a space."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / toy.FOLDER.name).symlink_to(toy.FOLDER)
    commands = draw_toys("my toys", capsys)
    scripts = [script for _, script, *_ in commands]
    assert scripts == ["assistant.py", "rrg.py", "assistant.py", "assistant.py", "rrg.py"]
    assert pathlib.Path(commands[0][-1]).is_file()
    assert pathlib.Path(commands[3][-1]).name == "stranger.png"
    for _, script, *options in commands:
        if script == "rrg.py":
            config, _ = rrg.read_settings(options)
            assert toy.is_toy(config.model)
            continue
        assert pathlib.Path(options[options.index("--photos") + 1]).is_dir()
        assert pathlib.Path(options[-1]).is_file()
        assert set(options[:-1:2]) <= {"--adapter", "--photos"}
    assert commands[1][-1] + "/adapter" == commands[2][3]


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine.jpg").write_bytes(b"mine")
    for given in (tmp_path, tmp_path / "mine.jpg"):
        with pytest.raises(DataError, match="is not empty; give --photos a folder that is new"):
            toy.main(["--photos", str(given)])
    assert [file.name for file in tmp_path.iterdir()] == ["mine.jpg"]
    with pytest.raises(DataError, match="give a folder to draw in: python toy.py --photos"):
        toy.main([])


@pytest.mark.slow
def test_the_demo_goes_from_nothing_to_the_right_name(tmp_path):
    """All that toy.py says comes next, and what its text says of it."""
    (tmp_path / toy.FOLDER.name).symlink_to(toy.FOLDER)
    commands = [["python", "toy.py", "--photos", "my_toys"]]
    printed = []
    for _, script, *options in commands:
        done = subprocess.run(
            [sys.executable, ROOT / script, *options], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-500:]
        printed.append(done.stdout)
        if script == "toy.py":
            lines = [line.strip() for line in done.stdout.splitlines()]
            commands += [shlex.split(line) for line in lines if line.startswith("python ")][:-1]
    _, base, _, adapter, stranger = printed
    name = pathlib.Path(commands[1][-1]).stem
    assert f"<{name}>" not in base
    assert f"<{name}>" in adapter
    assert "none of your things" in stranger.lower()
