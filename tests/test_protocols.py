"""Which photos are described and tested, and what benchmarks ask about them."""

import json

import pytest

import evaluate
import protocols
import toy
from data import Concept, DataError, Photo, Split, load_concepts
from protocols import Pair
from test_data import make_photos


# ------------------------------------------------------------------------------ photos of concepts
def loose_photos(count):
    return [Photo(f"rex/{i}.jpg", None) for i in range(count)]


def test_references_are_drawn_by_the_seed():
    """Of 9 photos 5 are kept from the tests, and 2 of these are described."""
    concept = Concept("rex", "dog", loose_photos(9))
    splits = [protocols.split_photos(concept, 2, 5, seed) for seed in range(5)]
    drawn = set()
    for split in splits:
        assert len(split.references) == 2
        assert len(split.tests) == 4
        assert not set(split.references) & set(split.tests)
        drawn.add(tuple(photo.name for photo in split.references))
    assert len(drawn) == 5
    assert splits[2] == protocols.split_photos(concept, 2, 5, 2)

    # Who is described changes nothing of the tests.
    assert protocols.split_photos(concept, 1, 5, 2).tests == splits[2].tests
    assert protocols.split_photos(concept, 1, 5, 2).references == splits[2].references[:1]


@pytest.mark.parametrize(
    "train, test, loose, references, kept, expected",
    [
        (0, 0, 10, 1, 5, (1, 5)),  # MyVLM
        (0, 0, 5, 1, 5, (1, 1)),  # 4 are kept, since one is left for the test
        (0, 0, 4, 1, 1, (1, 3)),  # DreamBooth has concepts of 4
        (0, 0, 4, 5, 5, (3, 1)),
        (0, 0, 2, 1, 1, (1, 1)),
        (0, 0, 1, 1, 1, (1, 0)),
        (8, 3, 0, 1, 5, (1, 3)),  # PerVA
        (8, 3, 0, 5, 5, (5, 3)),
        (2, 3, 0, 5, 5, (2, 3)),  # three of its concepts have fewer
        (0, 3, 0, 1, 1, (1, 2)),  # RePIC's copies have tests only
    ],
)
def test_references_and_tests(train, test, loose, references, kept, expected):
    photos = loose_photos(loose)
    for part, count in (("train", train), ("test", test)):
        photos += [Photo(f"{part}/rex/{i}.jpg", None, part=part) for i in range(count)]
    split = protocols.split_photos(Concept("rex", "dog", photos), references, kept, 0)
    assert (len(split.references), len(split.tests)) == expected
    assert not set(split.references) & set(split.tests)
    if train:
        assert {photo.part for photo in split.references} == {"train"}
        assert {photo.part for photo in split.tests} == {"test"}


# ----------------------------------------------------------------------------------- the protocols
def settings(**given):
    given = protocols.protocol_settings(given.get("protocol", "")) | given
    return evaluate.fill_in_assistant(evaluate.Options, given)


def names(concepts):
    return {concept.name for concept in concepts}


@pytest.fixture
def myvlm(tmp_path):
    """A folder as MyVLM's: six things with seven photos each."""
    things = ("bull", "cat", "cup", "owl", "pig", "rex")
    photos = []
    for thing in things:
        photos += [f"{thing}/{i}.jpg" for i in range(7)]
    return make_photos(tmp_path, photos)


@pytest.mark.parametrize(
    "given, references, tests",
    [
        ({"protocol": "myvlm"}, 1, 2),
        ({"protocol": "myvlm", "references": 3}, 3, 2),
        ({"protocol": "myvlm", "references": 6}, 6, 1),
        ({"protocol": "dreambooth"}, 1, 6),
        ({}, 1, 6),
        ({"references": 4}, 4, 3),
    ],
)
def test_how_many_photos_are_described_and_tested(myvlm, given, references, tests):
    benchmark = protocols.load_benchmark(None, settings(data=str(myvlm), all=True, **given))
    for split in benchmark.splits.values():
        assert (len(split.references), len(split.tests)) == (references, tests)


def test_the_parts_of_a_table(myvlm):
    """Two as rrg.py splits them, or one of all, or one of all that were not trained on."""
    everything = names(load_concepts(myvlm))
    benchmark = protocols.load_benchmark(None, settings(data=str(myvlm)))
    assert list(benchmark.parts) == ["seen", "unseen"]
    assert names(benchmark.parts["seen"].known) == everything  # all are of the category "object"
    assert len(benchmark.parts["seen"].tested) == 1

    benchmark = protocols.load_benchmark(None, settings(data=str(myvlm), all=True))
    assert list(benchmark.parts) == ["all"]
    assert names(benchmark.parts["all"].known) == everything
    assert names(benchmark.parts["all"].tested) == everything

    run = myvlm.parent / "run"
    run.mkdir(exist_ok=True)
    parts = {"train": ["bull", "owl"], "test": ["cat", "cup", "pig"], "unseen": ["rex"]}
    (run / "config.json").write_text(json.dumps({"concepts": parts}))
    options = settings(data=str(myvlm), adapter=[str(run / "adapter")])
    benchmark = protocols.load_benchmark(None, options)
    assert names(benchmark.parts["seen"].tested) == {"cat", "cup", "pig"}
    assert names(benchmark.parts["unseen"].tested) == {"rex"}

    (myvlm / "trained.txt").write_text("owl\ncat\n")
    trained = str(myvlm / "trained.txt")
    benchmark = protocols.load_benchmark(None, settings(data=str(myvlm), train_concepts=trained))
    assert list(benchmark.parts) == ["all"]
    others = {"bull", "cup", "pig", "rex"}
    assert names(benchmark.parts["all"].known) == others
    assert names(benchmark.parts["all"].tested) == others
    assert names(benchmark.concepts) == benchmark.splits.keys() == others

    with pytest.raises(DataError, match="none is left to test"):
        protocols.load_benchmark(None, settings(data=str(myvlm), train_concepts="6"))
    options = settings(data=str(myvlm), train_concepts=trained, all=True)
    assert names(protocols.load_benchmark(None, options).concepts) == everything


def test_every_protocol_says_where_it_is_from():
    assert set(protocols.PROTOCOLS) == {"perva", "myvlm", "yollava", "dreambooth"}
    by_category = [name for name, row in protocols.PROTOCOLS.items() if row.by_category]
    assert by_category == ["perva"]
    assert all(row.source and row.seeds for row in protocols.PROTOCOLS.values())


# ------------------------------------------------------------------------------ pairs and questions
def test_toy_questions_ask_for_what_a_good_description_leaves_out():
    tests = []
    for concept in toy.world(0, 64, 4, 3, 1):
        tests += [protocols.Test(photo, concept.name) for photo in concept.photos[1:]]
    questions = protocols.toy_questions(tests, 0)
    assert len(questions) == 3 * len(tests)
    assert {question.answer for question in questions} == {"A", "B"}
    for question in questions:
        wrong = "B" if question.answer == "A" else "A"
        [(kind, word)] = toy.claims(question.options[question.answer])
        [(_, other)] = toy.claims(question.options[wrong])
        assert kind in toy.VIEW
        assert question.photo.truth[kind] == word
        assert other != word
    assert questions == protocols.toy_questions(tests, 0)
    assert questions != protocols.toy_questions(tests, 1)


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


# -------------------------------------------------------------------------- what a run held out
def test_what_a_run_held_out_stays_held_out(tmp_path):
    """Also where a concept has gone since, and another one has come."""
    concepts = [Concept(name, "dog", []) for name in ("ana", "bo", "mam", "new", "rex", "tom")]
    by_folder = Split(concepts[:4], concepts[4:], [])
    parts = {"train": ["tom", "ana", "gone"], "test": ["bo"], "unseen": ["rex", "lost"]}
    (tmp_path / "mine").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "mine/config.json").write_text(json.dumps({"concepts": parts}))
    of_others = {"train": ["x"], "test": [], "unseen": []}
    (tmp_path / "other/config.json").write_text(json.dumps({"concepts": of_others}))
    adapters = [str(tmp_path / run / "adapter") for run in ("nowhere", "other", "mine")]

    split = protocols.split_of_run(concepts, by_folder, adapters)
    assert split.names() == {
        "train": ["tom", "ana"],
        "test": ["bo", "mam", "new"],
        "unseen": ["rex"],
    }
    assert protocols.split_of_run(concepts, by_folder, adapters[:2]) is by_folder


# ----------------------------------------------------------------------------- what is the same
def test_names_are_known_before_a_photo_is_read(tmp_path):
    """Files that are no pictures will do. A thing of one photo only is none."""
    for name in (
        "train/bo/1.jpg",
        "test/bo/1.jpg",
        "dogs/rex/1.jpg",
        "dogs/rex/2.jpg",
        "mam/1.jpg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("no picture")
    assert sorted(protocols.thing_names(tmp_path)) == ["bo", "rex"]


def test_two_benchmarks_are_the_same_if_their_photos_are(myvlm):
    """And if the same ones are described and tested."""

    def content(**given):
        benchmark = protocols.load_benchmark(None, settings(data=str(myvlm), all=True, **given))
        protocols.choose_tests(benchmark, [])
        return json.dumps(benchmark.content())

    first = content()
    assert first == content()
    assert first != content(seed=1)  # which draws other references
    assert first != content(references=2)
    make_photos(myvlm, ["new.jpg"])
    (myvlm / "owl/3.jpg").write_bytes((myvlm / "new.jpg").read_bytes())
    assert first != content()


def test_copies_are_found_by_the_hash_that_is_known():
    """A photo of a folder is not read once more."""
    known = Photo("bo/1.jpg", None, pixels="abc")
    copy = Photo("bo/2.jpg", None, pixels="abc")
    other = Photo("bo/3.jpg", None, pixels="def")
    bo = Concept("bo", "dog", [known, copy, other])
    splits = {"bo": protocols.PhotoSplit([], [copy, other])}
    part = protocols.Part([bo], [bo])
    benchmark = protocols.Benchmark(None, [bo], splits, {"all": part}, [], [])
    protocols.choose_tests(benchmark, [known])
    assert part.tests == [protocols.Test(other, "bo")]
