"""The table: every figure against one worked out by hand, and the tasks on a small toy world."""

import contextlib
import dataclasses
import json
import pathlib
import shutil

import pytest
from PIL import Image

import evaluate
import toy
from assistant import Entry, describe
from data import DataError, Photo
from evaluate import Choice, Judgement
from lora import add_lora, save_adapter
from model import MLLM
from protocols import Pair
from test_assistant import know_every_word, perfect_entry

WORLD = toy.world  # which some tests replace


# --------------------------------------------------------------------------------------- helpers
def small_world(seed=0, size=64, concepts=4, views=3):
    return WORLD(seed, size, concepts, views)


def shrink_world(monkeypatch, concepts):
    """Let the toy world have so many concepts of each category, with two photos each."""

    def world(seed, size):
        return WORLD(seed, size, concepts, views=2)

    monkeypatch.setattr(toy, "world", world)


def options_of(**given):
    return evaluate.fill_in_assistant(evaluate.Options, {"max_tokens": 64} | given)


def all_but_first(concepts):
    """All photos but the first of each concept."""
    tests = []
    for concept in concepts:
        tests += [evaluate.Test(photo, concept.name) for photo in concept.photos[1:]]
    return tests


def examine(mllm, concepts, entries, **given):
    """The figures of a toy world."""
    tests = all_but_first(concepts)
    questions = evaluate.toy_questions(tests, 0)
    return evaluate.examine(mllm, mllm, entries, tests, questions, [], options_of(**given))


def read_table(file):
    """The rows of a table's JSON."""
    return json.loads(file.read_text())["rows"]


# ----------------------------------------------------------------------------------- the figures
def judgements(*verdicts, shown, same_category):
    return [Judgement(shown, said_yes, same_category) for said_yes in verdicts]


def test_recognition_by_hand():
    rows = judgements(True, False, None, True, shown=True, same_category=True)  # 2 of 4
    rows += judgements(False, True, None, shown=False, same_category=True)  # 1 of 3
    rows += judgements(False, False, shown=False, same_category=False)  # 2 of 2
    assert evaluate.recognition_scores(rows) == pytest.approx(
        {
            "recognition_positive": 2 / 4,
            "recognition_negative": 3 / 5,
            "recognition_weighted": 0.55,
            "recognition_inside": (1 / 2 + 1 / 3) / 2,
            "recognition_across": (1 / 2 + 1) / 2,
        }
    )


def test_recognition_of_nothing_is_unknown():
    assert set(evaluate.recognition_scores([]).values()) == {None}
    only_negatives = judgements(False, shown=False, same_category=True)
    scores = evaluate.recognition_scores(only_negatives)
    assert scores["recognition_negative"] == 1
    assert scores["recognition_positive"] is None
    assert scores["recognition_weighted"] is None


def captioning(choices, tested=None):
    """(precision, recall, F1) of (right name, chosen name) pairs"""
    choices = [Choice(right, chosen) for right, chosen in choices]
    return tuple(evaluate.captioning_scores(choices, tested).values())


def test_captioning_by_hand():
    # a: chosen once, rightly, of two; b: once, wrongly; c is never right, but chosen: a class
    choices = [("a", "a"), ("a", "b"), ("b", None), ("b", "c")]
    precision = (1 + 0 + 0) / 3
    recall = (1 / 2 + 0 + 0) / 3
    f1 = (2 / 3 + 0 + 0) / 3
    assert captioning(choices) == pytest.approx((precision, recall, f1))

    # c is in the database, but no photo shows it
    precision = (1 + 0) / 2
    recall = (1 / 2 + 0) / 2
    f1 = (2 / 3 + 0) / 2
    assert captioning(choices, {"a", "b"}) == pytest.approx((precision, recall, f1))

    assert captioning([("a", "a"), ("b", "b")]) == (1, 1, 1)
    assert captioning([("a", None)]) == (0, 0, 0)
    assert captioning([]) == (None, None, None)


# ------------------------------------------------------------------------- what is measured with
def test_toy_questions_ask_for_what_a_good_description_leaves_out():
    tests = all_but_first(small_world())
    questions = evaluate.toy_questions(tests, 0)
    assert len(questions) == 3 * len(tests)
    assert {question.answer for question in questions} == {"A", "B"}
    for question in questions:
        wrong = "B" if question.answer == "A" else "A"
        [(kind, word)] = toy.claims(question.options[question.answer])
        [(_, other)] = toy.claims(question.options[wrong])
        assert kind in toy.VIEW
        assert question.photo.truth[kind] == word
        assert other != word
    assert questions == evaluate.toy_questions(tests, 0)
    assert questions != evaluate.toy_questions(tests, 1)


# ------------------------------------------------------------------------- a small toy world
@pytest.fixture(scope="module")
def concepts():
    return small_world(seed=5, concepts=3)


@pytest.fixture(scope="module")
def right(toy_mllm, concepts):
    """The figures with descriptions written from the truth."""
    return examine(toy_mllm, concepts, [perfect_entry(concept) for concept in concepts])


def test_the_toy_model_can_read_the_prompts(right):
    for figure in ("recognition_weighted", "captioning_f1", "vqa", "name_f1", "retrieval_ceiling"):
        assert right[figure] >= 0.95, figure
    assert right["unparsed"] < 0.01
    assert right["leakage"] == 0


def test_the_toy_model_believes_the_descriptions(toy_mllm, concepts):
    """With descriptions of another category it fails, but for what can be seen in the photo."""
    entries = [perfect_entry(concept) for concept in concepts]
    wrong = []
    for i, entry in enumerate(entries):
        wrong.append(dataclasses.replace(entry, text=entries[i - 3].text))
    figures = examine(toy_mllm, concepts, wrong, skip_retrieval=True)
    assert figures["recognition_positive"] < 0.1
    assert figures["captioning_recall"] < 0.6
    assert figures["retrieval_ceiling"] == 1
    assert figures["vqa"] >= 0.9


def test_counts(right):
    counts = dict(right["counts"])
    for task in ("captions", "recognition", "vqa"):
        assert counts.pop(f"unparsed_{task}") <= 2
    assert counts == {
        "concepts": 30,
        "database": 30,
        "photos": 60,
        "pairs": 1800,
        "questions": 180,
        "unparsed_leakage": 0,
        "malformed_descriptions": 0,
    }


@pytest.mark.slow
def test_the_toy_model_can_read_the_prompts_in_full(toy_mllm):
    concepts = toy.world(11, 64, 12, 2)
    figures = examine(toy_mllm, concepts, [perfect_entry(concept) for concept in concepts])
    print(figures)
    for figure in ("recognition_weighted", "captioning_f1", "vqa"):
        assert figures[figure] >= 0.95, figure


def test_a_benchmarks_own_pairs_count_where_they_are_about_the_tests(toy_mllm, monkeypatch):
    concepts = small_world(concepts=2, views=2)[:4]
    entries = [perfect_entry(concept) for concept in concepts]
    tests = all_but_first(concepts[:2])
    first, second = [test.photo for test in tests]
    pairs = [
        Pair(first, concepts[0].name, True),
        Pair(second, concepts[2].name, False),
        Pair(concepts[3].photos[1], concepts[3].name, True),  # this photo is no test
        Pair(first, "somebody", False),  # this one is not in the database
    ]
    asked = []

    def recognise(mllm, pairs, max_tokens):
        asked.extend(pairs)
        return [True, None]

    monkeypatch.setattr(evaluate, "recognise", recognise)
    found = evaluate.judge(toy_mllm, entries, tests, pairs, 64)
    assert asked == [(first, entries[0]), (second, entries[2])]
    same = concepts[1].category == concepts[2].category
    assert found == [Judgement(True, True, True), Judgement(False, None, same)]


def test_descriptions_that_are_not_in_form_are_counted(random_mllm):
    """An untrained model babbles: what it says is remembered as it stands, its answers are
    unparsed, and nothing is guessed."""
    concepts = small_world(concepts=1, views=2)
    references = []
    for concept in concepts:
        references.append(dataclasses.replace(concept, photos=concept.photos[:1]))
    entries = describe(random_mllm, references, 8)
    assert all(entry.malformed for entry in entries)
    assert not any("<coarse>" in entry.text for entry in entries)

    figures = examine(random_mllm, concepts, entries, max_tokens=4)
    assert figures["counts"]["malformed_descriptions"] == len(concepts)
    assert figures["unparsed"] == 1
    for figure in ("captioning_f1", "recognition_weighted", "vqa"):
        assert figures[figure] == 0


def test_the_judge_of_leakage_reads_words_alone(toy_mllm, monkeypatch):
    photo = Photo("real", Image.new("RGB", (64, 64)).copy)
    entries = []
    for name, text in (("a", "A mug on grass."), ("b", "A mug."), ("c", "A mug?")):
        entries.append(Entry(name, "cup", [photo], text))
    asked = []

    def greedy(prompts, max_tokens, progress):
        asked.extend(prompts)
        return [
            '{"State": "No", "Location": "Yes"}',
            '{"State": "No", "Location": "No"}',
            "Well.",
        ]

    monkeypatch.setattr(toy_mllm, "greedy", greedy)
    assert evaluate.leakage(toy_mllm, entries, 32) == evaluate.Leakage(share=0.5, unparsed=1)
    assert [prompt.photos for prompt in asked] == [[], [], []]
    assert '"A mug on grass."\nDoes it mention' in asked[0].text


# -------------------------------------------------------------------------------------- the table
@pytest.fixture(scope="module")
def base_table(tmp_path_factory):
    """The table of a small world with an adapter whose B is 0.   -> its folder

    The folder holds adapter/, table.json, and in printed.txt what was printed.
    """
    folder = tmp_path_factory.mktemp("table")
    mllm = MLLM(str(toy.FOLDER), 4096)
    add_lora(mllm.model, 2, 4)
    save_adapter(mllm.model, folder / "adapter")
    command = ["--adapter", str(folder / "adapter"), "--out", str(folder / "table.json")]
    with pytest.MonkeyPatch.context() as patch, open(folder / "printed.txt", "w") as file:
        shrink_world(patch, concepts=2)
        with contextlib.redirect_stdout(file):
            evaluate.main(command)
    return folder


def test_a_bare_adapter_gives_the_row_of_base(base_table):
    content = json.loads((base_table / "table.json").read_text())
    assert list(content) == ["seed", "command", "device", "rows"]
    assert content["seed"] == 0
    base, bare = content["rows"].values()
    assert list(content["rows"]) == ["base", str(base_table / "adapter")]
    assert base == bare


def test_the_json_of_a_table(base_table):
    base = read_table(base_table / "table.json")["base"]
    figures = {
        *("captioning_f1", "captioning_precision", "captioning_recall"),
        *("recognition_positive", "recognition_negative", "recognition_weighted"),
        *("vqa", "leakage", "retrieval_ceiling", "unparsed"),
    }
    for part in ("seen", "unseen"):
        for figure in figures:
            assert 0 <= base[part][figure] <= 1
    assert base["seen"]["counts"]["concepts"] == 2
    assert base["seen"]["counts"]["database"] == 14
    assert base["unseen"]["counts"]["database"] == 6


def test_a_table_is_printed_as_markdown(base_table):
    printed = (base_table / "printed.txt").read_text()
    assert "evaluating base" in printed
    assert printed.count("| base |") == 2
    assert printed.count("|  | caption F1 | precision |") == 2
    assert printed.count("\nseen categories: 2 test photos of 2 concepts") == 1
    assert "1 right" not in printed


def test_descriptions_that_were_written_down_are_worth_the_same(base_table, tmp_path, monkeypatch):
    database = base_table / "table-base-database.json"
    remembered = json.loads(database.read_text())
    assert len(remembered["concept_dict"]) == 20
    assert remembered["path_to_concept"]["mug-1/1"] == "<mug-1>"
    assert remembered["concept_dict"]["<mug-1>"]["info"].startswith("A photo of a")

    shrink_world(monkeypatch, concepts=2)
    out = tmp_path / "again.json"
    evaluate.main(["--database", str(database), "--out", str(out)])
    rows = read_table(out)
    assert list(rows) == ["base", str(database)]
    base = read_table(base_table / "table.json")["base"]
    assert rows["base"] == rows[str(database)] == base


def test_a_database_must_describe_every_concept(tmp_path):
    (tmp_path / "x.json").write_text('{"concept_dict": {"<bo>": {"info": "A dog."}}}')
    concepts = small_world(concepts=1)
    with pytest.raises(DataError, match="describes 1 concepts, but not 10 of the 10 here"):
        evaluate.database_row(str(tmp_path / "x.json"), concepts)


@pytest.mark.parametrize("where", ["p", "copies"])
def test_what_a_database_was_written_from_is_no_test(where, random_folder, tmp_path, monkeypatch):
    """Photos that a database of descriptions names are left out of the tests, whichever of them
    this table's own references are; so are copies, which a database often keeps of its own."""
    entries = {}
    for concept in small_world(concepts=2, views=3)[:6]:
        folder = tmp_path / "p" / concept.name
        folder.mkdir(parents=True)
        for number, photo in enumerate(concept.photos):
            photo.load().save(folder / f"{number}.png")
        images = [f"elsewhere/p/{concept.name}/{number}.png" for number in (0, 1)]
        entries[f"<{concept.name}>"] = {"name": concept.name, "image": images, "info": "red mug"}
    shutil.copytree(tmp_path / "p", tmp_path / "copies/p")
    database = tmp_path / where / "database.json"
    database.write_text(json.dumps({"concept_dict": entries}))

    tested = set()

    def examine(mllm, embedder, entries, tests, *rest):
        tested.update(pathlib.Path(test.photo.name).name for test in tests)
        return {"counts": {}}

    monkeypatch.setattr(evaluate, "examine", examine)
    mllm = MLLM(str(random_folder), 4096)
    monkeypatch.setattr(MLLM, "check_words", know_every_word)
    options = options_of(
        model=str(random_folder),
        data=str(tmp_path / "p"),
        all=True,
        max_tokens=4,
        database=[str(database)],
    )
    evaluate.table(mllm, mllm, options, ["base"])
    assert tested == {"2.png"}


def test_an_adapter_that_met_other_concepts_is_noted(tmp_path, capsys):
    adapter = tmp_path / "adapter"
    evaluate.warn_of_other_split(adapter, options_of())
    (tmp_path / "config.json").write_text('{"model_type": "some model\'s own"}')
    evaluate.warn_of_other_split(adapter, options_of())
    (tmp_path / "config.json").write_text('{"settings": {"seed": 3, "data": ""}}')
    evaluate.warn_of_other_split(adapter, options_of(seed=3))
    assert not capsys.readouterr().out

    evaluate.warn_of_other_split(adapter, options_of())
    assert "--seed 3 --data (the toy world), so it may have met" in capsys.readouterr().out


# ------------------------------------------------------------------------------ the command line
def test_options_are_read(tmp_path):
    options = evaluate.read_settings(
        ["--adapter", "a", "--adapter", "b", "--database", "c", "--all", "--skip-retrieval"]
    )
    assert options.adapter == ["a", "b"]
    assert options.database == ["c"]
    assert options.all
    assert options.skip_retrieval
    assert not options.grounding
    assert options.max_pixels == 20736
    assert evaluate.read_settings(["--model", str(tmp_path)]).max_pixels == 401408


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--k", "1"], "--k must be at least 2"),
        (["--k", "27"], "--k must be at most 26"),
        (["--references", "0"], "--references must be at least 1"),
        (["--max-tokens", "0"], "--max-tokens must be at least 1"),
    ],
)
def test_a_command_that_makes_no_sense(arguments, message):
    with pytest.raises(DataError, match=message):
        evaluate.read_settings(arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--adapter", "nowhere"], "is not an adapter folder"),
        (["--database", "nowhere.json"], "cannot read"),
        (["--data", "nowhere"], "is not a folder"),
    ],
)
def test_errors_are_one_line(arguments, message, monkeypatch):
    shrink_world(monkeypatch, concepts=1)
    with pytest.raises(DataError, match=message):
        evaluate.main(arguments)
