"""Which photos are described and tested, and what benchmarks ask about them."""

import json

import pytest

import protocols
from data import Concept, DataError, Photo, load_concepts
from protocols import Pair
from test_data import make_photos


# ------------------------------------------------------------------------- what is measured with
def test_references_are_drawn_by_the_seed(tmp_path):
    """MyVLM's protocol: 4 references, 5 seeds, the rest are tests."""
    make_photos(tmp_path, [f"bull/IMG_{i}.jpg" for i in range(9)])
    [concept] = load_concepts(tmp_path)
    splits = [protocols.split_photos(concept, 4, seed) for seed in range(5)]
    drawn = set()
    for split in splits:
        assert len(split.references) == 4
        assert len(split.tests) == 5
        assert {*split.references, *split.tests} == set(concept.photos)
        drawn.add(tuple(photo.name for photo in split.references))
    assert len(drawn) == 5
    assert splits[2] == protocols.split_photos(concept, 4, 2)


@pytest.mark.parametrize(
    "train, test, loose, references, expected",
    [
        (0, 0, 4, 5, (3, 1)),  # DreamBooth has concepts of 4: one photo is left for the test
        (0, 0, 2, 1, (1, 1)),
        (0, 0, 1, 1, (1, 0)),
        (8, 3, 0, 5, (5, 3)),  # PerVA
        (2, 3, 0, 5, (2, 3)),  # three of its concepts have fewer
        (0, 3, 0, 1, (1, 2)),  # RePIC's copies have tests only
    ],
)
def test_references_and_tests(train, test, loose, references, expected):
    photos = []
    for part, count in (("train", train), ("test", test), ("", loose)):
        photos += [Photo(f"{part}/rex/{i}.jpg", None, part=part) for i in range(count)]
    split = protocols.split_photos(Concept("rex", "dog", photos), references, 0)
    assert (len(split.references), len(split.tests)) == expected
    assert not set(split.references) & set(split.tests)
    if train:
        assert {photo.part for photo in split.references} == {"train"}
        assert {photo.part for photo in split.tests} == {"test"}


ITEM = {
    "question": "What is <sks> doing?",
    "options": {"A": "Sitting", "B": "Running"},
    "correct_answer": "B",
}
RAP_ITEM = {
    "question": "Is sks asks a {real} cat?",
    "option": {"A": "Yes", "B": "No"},
    "correct_answer": "A",
}
BO = "./yollava-data/test/bo/1.png"
MAM = "./yollava-data/test/mam/1.png"
GONE = "./yollava-data/test/mam/9.png"


@pytest.fixture
def yollava(tmp_path):
    """A folder with photos of two concepts, each with a photo of one name in both parts."""
    names = []
    for part in ("train", "test"):
        names += [f"yollava-data/{part}/{name}/1.png" for name in ("bo", "mam")]
    return make_photos(tmp_path / "root", names)


@pytest.mark.parametrize(
    "content",
    [
        {"bo": {BO: ITEM}, "mam": {MAM: RAP_ITEM, GONE: ITEM}},
        {BO: ITEM, MAM: RAP_ITEM, GONE: ITEM},
        [
            ITEM | {"image": "data/test/bo/1.png"},
            RAP_ITEM | {"image": "x/mam/1.png"},
            ITEM | {"image": "x/mam/9.png"},
        ],
    ],
)
@pytest.mark.parametrize("place", ["", "yollava-data/", "../"])
def test_yollava_questions(yollava, content, place):
    (yollava / place / "yollava-visual-qa.json").write_text(json.dumps(content))
    log = []
    bo, mam = protocols.load_questions(yollava, load_concepts(yollava), log.append)
    assert (bo.concept, bo.photo.part, bo.answer) == ("bo", "test", "B")
    assert bo.text == "What is {} doing?"
    assert bo.options == ITEM["options"]
    assert mam.text.format("<mam>") == "Is <mam> asks a (real) cat?"
    assert mam.options == {"A": "Yes", "B": "No"}
    assert log == [f"left out 1 of 3 questions: their pictures are not in {yollava}"]


def test_no_questions(tmp_path):
    assert protocols.load_questions(tmp_path, []) == []
    assert protocols.load_pairs(tmp_path, []) == []


@pytest.mark.parametrize(
    "content, message", [("{", "cannot read"), ('[{"image": 3}]', "is not in the form")]
)
def test_questions_in_another_form(tmp_path, content, message):
    (tmp_path / "yollava-visual-qa.json").write_text(content)
    with pytest.raises(DataError, match=message):
        protocols.load_questions(tmp_path, [])


def test_rap_recognition_is_filtered_by_the_correct_answer(tmp_path):
    names = []
    for part in ("train", "test"):
        names += [f"{part}/{name}/4.png" for name in ("bo", "mam")]
    make_photos(tmp_path, names)
    row = {
        "image": "benchmark_data/yollava-data/test/bo/4.png",
        "concept": "bo",
        "type": "positive",
        "correct_answer": True,
    }
    rows = [
        row,
        row | {"type": "negative"},
        row | {"concept": "<mam>", "type": "negative", "correct_answer": False},
        row | {"image": "x/test/no/1.png"},
    ]
    (tmp_path / "recognition_test.json").write_text(json.dumps(rows))
    concepts = load_concepts(tmp_path)
    [photo] = [photo for photo in concepts[0].photos if photo.part == "test"]
    pairs = protocols.load_pairs(tmp_path, concepts)
    assert pairs == [Pair(photo, "bo", True), Pair(photo, "mam", False)]
