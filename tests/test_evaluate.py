"""The table: every figure against one worked out by hand, and the tasks on a small toy world."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
from collections import Counter

import pytest
import torch
from PIL import Image

import evaluate
import protocols
import toy
from assistant import LETTERS, Caption, Entry, Retrieved, Verdict, describe
from data import Concept, DataError, Photo
from evaluate import Choice, Judgement
from lora import add_lora, lora_layers, save_adapter
from model import MLLM, Prompt
from protocols import Benchmark, Pair, Part, load_benchmark, toy_questions
from test_assistant import know_every_word, perfect_entry
from test_data import make_photos

WORLD = toy.world  # which some tests replace


# --------------------------------------------------------------------------------------- helpers
def small_world(seed=0, size=64, concepts=4, views=3):
    return WORLD(seed, size, concepts, views, photos=1)


def shrink_world(monkeypatch, concepts):
    """Let the toy world have so many concepts of each category, with two photos each."""

    def world(seed, size):
        return WORLD(seed, size, concepts, photos=1)

    monkeypatch.setattr(toy, "world", world)


def options_of(**given):
    return evaluate.fill_in_assistant(evaluate.Options, {"max_tokens": 64} | given)


def all_but_first(concepts):
    """All photos but the first of each concept."""
    tests = []
    for concept in concepts:
        tests += [protocols.Test(photo, concept.name) for photo in concept.photos[1:]]
    return tests


def examine(mllm, concepts, entries, **given):
    """What comes of a toy world.   -> evaluate.Examined"""
    tests = all_but_first(concepts)
    questions = toy_questions(tests, 0)
    return evaluate.examine(mllm, mllm, entries, tests, questions, [], options_of(**given))


def read_table(file):
    """The rows of a table's JSON."""
    return json.loads(file.read_text())["rows"]


def know_any_text(text):
    """In the place of MLLM.knows."""
    return True


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


def test_own_things_found_and_strangers_refused_by_hand():
    """At .5 two of three are found. One has no other thing beside it, and so is never a stranger;
    of the others one is refused."""
    beliefs = evaluate.Beliefs(
        retrieved=[[0.9, 0.1], [0.2, 0.4], [0.1, 0.5]], others=[[0.1, 0.3], [0.8, 0.2], []]
    )
    scores = evaluate.stranger_scores(beliefs, 0.5)
    assert scores == {"own_found": 2 / 3, "strangers_refused": 1 / 2}
    nobody = evaluate.Beliefs([[0.9]], [[]])
    assert evaluate.stranger_scores(nobody, 0.5)["strangers_refused"] is None


def test_a_stranger_is_put_to_what_is_most_like_it(monkeypatch):
    """The k that would be retrieved if its own thing were not there."""
    entries = [Entry(name, "cup", [], "A cup.") for name in "abcd"]

    def retrieve(embedder, photos, entries, k):
        found = [Retrieved(entry, 0.0, 0.0, 0.0) for entry in entries]
        return [found[:k], found[::-1][:k]]

    monkeypatch.setattr(evaluate, "retrieve", retrieve)
    tests = [protocols.Test(Photo(name, None), "a") for name in ("1", "2")]
    lookup = evaluate.Lookup(entries, tests)
    first, second = evaluate.find_candidates(None, lookup, options_of(k=2))
    assert names_of(first.retrieved) == ["a", "b"]
    assert names_of(first.others) == ["b", "c"]
    assert names_of(second.retrieved) == names_of(second.others) == ["d", "c"]

    _, second = evaluate.find_candidates(None, lookup, options_of(k=2, skip_retrieval=True))
    assert names_of(second.retrieved) == ["d", "a"]
    assert names_of(second.others) == ["d", "c"]


def names_of(entries):
    return [entry.name for entry in entries]


# ------------------------------------------------------------------------- a small toy world
@pytest.fixture(scope="module")
def concepts():
    return small_world(seed=5, concepts=3)


@pytest.fixture(scope="module")
def examined(toy_mllm, concepts):
    """What comes of descriptions that are written from the truth."""
    return examine(toy_mllm, concepts, [perfect_entry(concept) for concept in concepts])


@pytest.fixture(scope="module")
def right(examined):
    """Its figures."""
    return examined.figures


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
    figures = examine(toy_mllm, concepts, wrong, skip_retrieval=True).figures
    assert figures["recognition_positive"] < 0.1
    assert figures["captioning_recall"] < 0.6
    assert figures["retrieval_ceiling"] == 1
    assert figures["vqa"] >= 0.9


def test_what_was_said_is_recorded(examined, concepts):
    """Each caption with what was retrieved for it, each verdict, each answer, as it stands."""
    by_task = {}
    for record in examined.records:
        by_task.setdefault(record["task"], []).append(record)
    counts = {task: len(records) for task, records in by_task.items()}
    assert counts == {"caption": 60, "recognition": 1800, "question": 180, "leakage": 30}

    for record in by_task["caption"]:
        assert set(record["letters"]) == set(record["retrieved"]) == set(record["beliefs"])
        assert len(record["retrieved"]) == len(record["beliefs_as_stranger"]) == 3
        assert record["shows"] not in record["beliefs_as_stranger"]
        if record["chosen"]:
            assert json.loads(record["answer"])["Answer"].strip() == record["letter"]
            assert record["letters"][record["chosen"]] == record["letter"]
            assert record["caption"] in record["answer"]
    chosen = [record["chosen"] == record["shows"] for record in by_task["caption"]]
    assert sum(chosen) / 60 == pytest.approx(examined.figures["captioning_recall"])

    right = [record["said"] is True for record in by_task["recognition"] if record["right"]]
    assert sum(right) / len(right) == examined.figures["recognition_positive"]
    first = by_task["recognition"][0]
    assert first["photo"] == concepts[0].photos[1].name
    assert first["description_of"] == concepts[0].name
    assert json.loads(first["answer"])["Answer"].strip() == ("Yes" if first["said"] else "No")

    assert sum(record["is_right"] is True for record in by_task["question"]) / 180 >= 0.9
    assert {record["leaks"] for record in by_task["leakage"]} == {False}
    assert by_task["leakage"][0]["description"].startswith("A photo of a ")


def test_the_toy_model_finds_its_own_and_refuses_strangers(right):
    assert right["own_found"] > 0.8
    assert right["strangers_refused"] > 0.5


def test_counts(right):
    counts = dict(right["counts"])
    for task, answers in (("captions", 60), ("recognition", 1800), ("vqa", 180)):
        unparsed = counts.pop(f"unparsed_{task}")
        assert unparsed <= answers / 50, task
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
    concepts = toy.world(11, 64, 12, photos=1)
    entries = [perfect_entry(concept) for concept in concepts]
    figures = examine(toy_mllm, concepts, entries).figures
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

    def recognise(mllm, pairs, max_tokens, show_reference):
        asked.extend(pairs)
        return [Verdict(True, "Yes."), Verdict(None, "Well.")]

    monkeypatch.setattr(evaluate, "recognise", recognise)
    about = evaluate.pairs_about(pairs, entries, tests)
    assert about == pairs[:2]
    found = evaluate.judge(toy_mllm, entries, tests, about, options_of())
    assert asked == [(first, entries[0]), (second, entries[2])]
    same = concepts[1].category == concepts[2].category
    assert found == [Judgement(True, True, True, "Yes."), Judgement(False, None, same, "Well.")]


@pytest.mark.parametrize("wanted", [False, True])
def test_a_reference_photo_is_shown_in_two_tasks_where_it_is_wanted(wanted, toy_mllm, monkeypatch):
    concepts = small_world(concepts=1, views=2)[:2]
    entries = [perfect_entry(concept) for concept in concepts]
    shown = []

    def recognise(mllm, pairs, max_tokens, show_reference):
        shown.append(show_reference)
        return [Verdict(True, "")] * len(pairs)

    def answer_questions(mllm, questions, entry_of, max_tokens, show_reference):
        shown.append(show_reference)
        return [Verdict(True, "")] * len(questions)

    monkeypatch.setattr(evaluate, "recognise", recognise)
    monkeypatch.setattr(evaluate, "answer_questions", answer_questions)
    examine(toy_mllm, concepts, entries, show_reference=wanted)
    assert shown == [wanted, wanted]


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

    figures = examine(random_mllm, concepts, entries, max_tokens=4).figures
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
    monkeypatch.setattr(toy_mllm, "knows", know_any_text)
    verdicts = evaluate.leakage(toy_mllm, entries, 32)
    assert [verdict.value for verdict in verdicts] == [True, False, None]
    assert verdicts[2].answer == "Well."
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
    assert list(content) == ["settings", "command", "device", "photos", "speakers", "rows"]
    assert content["settings"]["seed"] == 0
    assert not {"adapter", "database", "data", "out"} & content["settings"].keys()
    base, refined, bare = content["rows"].values()
    assert list(content["rows"]) == ["base", "refined", str(base_table / "adapter")]
    assert base == bare != refined


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
    assert "| recognition | all pairs | positive | negative | across |" in printed
    assert printed.count("| base |") == printed.count("| refined |") == 2
    assert printed.count("|  | caption F1 | precision |") == 2
    assert printed.count("\nseen categories: 2 test photos of 2 concepts") == 1
    assert "1 right" not in printed


def test_descriptions_that_were_written_down_are_worth_the_same(base_table, tmp_path, monkeypatch):
    database = base_table / "table-base-database.json"
    remembered = json.loads(database.read_text())
    assert len(remembered["concept_dict"]) == 20
    name = WORLD(0, concepts=2)[0].name
    assert remembered["path_to_concept"][f"mug/{name}/1"] == f"<{name}>"
    assert remembered["concept_dict"][f"<{name}>"]["info"].startswith("A photo of a")

    shrink_world(monkeypatch, concepts=2)
    out = tmp_path / "again.json"
    evaluate.main(["--database", str(database), "--out", str(out)])
    rows = read_table(out)
    assert list(rows) == ["base", "refined", str(database)]
    base = read_table(base_table / "table.json")["base"]
    assert rows["base"] == rows[str(database)] == base


def test_a_database_must_describe_every_concept(tmp_path):
    (tmp_path / "x.json").write_text('{"concept_dict": {"<bo>": {"info": "A dog."}}}')
    concepts = small_world(concepts=1)
    with pytest.raises(DataError, match="describes 1 concepts, but not 10 of the 10 here"):
        evaluate.database_row(str(tmp_path / "x.json"), concepts)


def test_a_database_has_the_categories_that_are_known_here(tmp_path):
    """Look-alikes are those of a category, whatever a database calls it or does not."""
    make_photos(tmp_path, ["bo.png"])
    (tmp_path / "x.json").write_text('{"concept_dict": {"<bo>": {"image": "bo.png"}}}')
    row = evaluate.database_row(str(tmp_path / "x.json"), [Concept("bo", "dog", [])])
    assert [entry.category for entry in row.entries] == ["dog"]


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
        return evaluate.Examined({"counts": {}}, records=[])

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


def test_an_adapter_that_met_what_is_tested_is_noted(tmp_path, capsys):
    adapter = tmp_path / "adapter"
    bo, rex = Concept("bo", "dog", []), Concept("rex", "dog", [])
    parts = {"seen": Part([bo, rex], [rex]), "unseen": Part([], [])}
    benchmark = Benchmark(None, [bo, rex], {}, parts, [], [])

    evaluate.warn_of_other_split(adapter, benchmark)  # no run
    for record in (
        {"model_type": "some model's own"},
        {"concepts": None},
        {"concepts": {"train": ["bo", "mam"], "test": ["rex"], "unseen": []}},
    ):
        (tmp_path / "config.json").write_text(json.dumps(record))
        evaluate.warn_of_other_split(adapter, benchmark)
    assert not capsys.readouterr().out

    parts["unseen"].tested.append(bo)
    evaluate.warn_of_other_split(adapter, benchmark)
    expected = (
        "was trained on 1 concepts of the names that this table tests, such as bo; give --seed"
    )
    assert expected in capsys.readouterr().out

    # Of real photos an adapter should say what it was trained on.
    benchmark.root = tmp_path
    evaluate.warn_of_other_split(tmp_path / "elsewhere/adapter", benchmark)
    assert "does not say which concepts it was trained on" in capsys.readouterr().out


# ------------------------------------------------------------------------ what is kept goes on
def run_again(folder, *more):
    """The command of `base_table`, perhaps with more options."""
    command = ["--adapter", str(folder / "adapter"), "--out", str(folder / "table.json")]
    with pytest.MonkeyPatch.context() as patch:
        shrink_world(patch, concepts=2)
        evaluate.main([*command, *more])


@pytest.fixture
def done_table(base_table, tmp_path):
    """A copy of the folder of `base_table`, which a test may change."""
    for file in base_table.glob("table*"):
        shutil.copy(file, tmp_path)
    shutil.copytree(base_table / "adapter", tmp_path / "adapter")
    old = str(base_table / "adapter")
    for name in ("table.json", "table-answers.jsonl"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text.replace(old, str(tmp_path / "adapter")))
    return tmp_path


def forbid(name, monkeypatch):
    """This function of evaluate.py must not be called."""

    def called(*arguments):
        raise AssertionError(f"{name} was called")

    monkeypatch.setattr(evaluate, name, called)


def test_the_same_command_measures_nothing_twice(done_table, monkeypatch, capsys):
    before = (done_table / "table.json").read_text()
    forbid("describe", monkeypatch)
    forbid("examine", monkeypatch)
    run_again(done_table)
    assert (done_table / "table.json").read_text() == before
    printed = capsys.readouterr().out
    assert f"base: done before, in {done_table}/table.json" in printed
    assert printed.count("| base |") == 2


def test_an_interrupted_table_goes_on(done_table, monkeypatch, capsys):
    """As soon as a row is done it is kept, and only the adapter's is left to measure."""
    for name in ("table.json", "table-answers.jsonl", "table-base-database.json"):
        (done_table / name).unlink()
    examined = []  # the databases

    def examine(mllm, embedder, entries, *rest):
        examined.append(entries)
        if len(examined) == 5:  # of each row there are two parts, this is the adapter's first
            raise KeyboardInterrupt
        return evaluate.Examined(no_figures().figures, [{"task": "caption"}])

    monkeypatch.setattr(evaluate, "examine", examine)
    with pytest.raises(KeyboardInterrupt):
        run_again(done_table)
    assert "the same command goes on: the rows that are done are in" in capsys.readouterr().out
    assert list(read_table(done_table / "table.json")) == ["base", "refined"]
    lines = (done_table / "table-answers.jsonl").read_text().splitlines()
    said = [(json.loads(line)["row"], json.loads(line)["part"]) for line in lines]
    assert said == [(row, part) for row in ("base", "refined") for part in ("seen", "unseen")]
    assert (done_table / "table-base-database.json").exists()

    run_again(done_table)
    assert len(examined) == 5 + 2
    rows = read_table(done_table / "table.json")
    assert list(rows) == ["base", "refined", str(done_table / "adapter")]
    assert len((done_table / "table-answers.jsonl").read_text().splitlines()) == 6


def test_a_row_is_measured_anew_if_its_adapter_has_changed(done_table, monkeypatch):
    mllm = MLLM(str(toy.FOLDER), 4096)
    add_lora(mllm.model, 4, 4)
    save_adapter(mllm.model, done_table / "adapter")
    described = []

    def describe_nothing(mllm, concepts, max_tokens):
        described.append(has_adapter_on(mllm))
        return [Entry(each.name, each.category, each.photos, "") for each in concepts]

    monkeypatch.setattr(evaluate, "describe", describe_nothing)
    monkeypatch.setattr(evaluate, "examine", no_figures)
    base = read_table(done_table / "table.json")["base"]
    run_again(done_table)
    rows = read_table(done_table / "table.json")
    assert described == [True]
    assert rows["base"] == base
    assert rows[str(done_table / "adapter")]["seen"]["captioning_f1"] == 0


def test_a_table_of_another_command_is_noticed_before_the_model_is_loaded(done_table, monkeypatch):
    monkeypatch.setattr(evaluate, "MLLM", None)
    message = "table.json is a table of other settings .--k was 3, not 4.; delete it, or give"
    with pytest.raises(DataError, match=message):
        run_again(done_table, "--k", "4")
    (done_table / "table.json").write_text("{")
    with pytest.raises(DataError, match="is no table that can be read"):
        run_again(done_table)


def test_everything_that_was_said_is_beside_the_table(base_table):
    """A line of JSON each, which says of which row and part it is."""
    lines = (base_table / "table-answers.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    counts = Counter((record["row"], record["part"], record["task"]) for record in records)
    rows = read_table(base_table / "table.json")
    for name, parts in rows.items():
        for part, figures in parts.items():
            expected = figures["counts"]
            assert counts[name, part, "caption"] == expected["photos"]
            assert counts[name, part, "recognition"] == expected["pairs"]
            assert counts[name, part, "question"] == expected["questions"]
            assert counts[name, part, "leakage"] == expected["database"]
    assert len({record["row"] for record in records}) == 3


def test_answers_of_other_rows_stay(tmp_path):
    file = tmp_path / "t-answers.jsonl"
    evaluate.save_answers(file, "base", [{"task": "caption", "answer": "\u2028 first"}], ["base"])
    evaluate.save_answers(file, "bas", [{"task": "caption", "answer": "x"}], ["base", "bas"])
    evaluate.save_answers(file, "base", [{"task": "caption", "answer": "2"}], ["base", "bas"])
    records = [json.loads(line) for line in file.read_text().splitlines()]
    said = [(record["row"], record["answer"]) for record in records]
    assert said == [("bas", "x"), ("base", "2")]


# -------------------------------------------------------------------------- what is checked first
def test_what_is_cheap_is_checked_before_a_photo_is_read(byte_folder, tmp_path, monkeypatch):
    """Whatever is wrong with adapters and databases, with --out and with words."""
    monkeypatch.setattr(evaluate, "load_benchmark", None)  # which reads photos
    photos = make_photos(tmp_path / "p", ["bo/1.png", "bo/2.png", "mam/1.png", "mam/2.png"])
    (tmp_path / "file").write_text("")
    mllm = MLLM(str(toy.FOLDER), 4096)
    add_lora(mllm.model, 2, 4)
    save_adapter(mllm.model, tmp_path / "toy/adapter")
    wide = MLLM(str(byte_folder), 4096)
    wide.model.model.language_model.layers[0].mlp.up_proj = torch.nn.Linear(96, 3)
    add_lora(wide.model, 2, 4)
    save_adapter(wide.model, tmp_path / "wide/adapter")
    gone = {"concept_dict": {"<bo>": {"image": "p/bo/9.png", "info": "A dog."}}}
    (tmp_path / "gone.json").write_text(json.dumps(gone))

    real = ["--model", str(byte_folder), "--data", str(photos), "--all"]
    for command, message in (
        ([*real, "--adapter", str(tmp_path / "toy")], "give its adapter, .*/toy/adapter"),
        ([*real, "--adapter", str(tmp_path / "wide/adapter")], "does not fit"),
        ([*real, "--adapter", "x", "--adapter", "x/"], "--adapter x/ is given twice"),
        ([*real, "--database", str(tmp_path / "gone.json")], "p/bo/9.png, which is not there"),
        ([*real, "--database", str(tmp_path / "file")], "cannot read .*file"),
        ([*real, "--out", str(tmp_path)], "cannot write"),
        ([*real, "--out", str(tmp_path / "file/t.json")], "cannot write"),
        (["--data", str(photos), "--all"], "this model does not know every word of '<bo>'"),
        (["--train-concepts", "gone.txt"], "wants a number or a file, and gone.txt is not there"),
    ):
        with pytest.raises(DataError, match=message):
            evaluate.main(command)


def test_a_folder_for_the_table_is_made(base_table, tmp_path, monkeypatch):
    shrink_world(monkeypatch, concepts=2)
    monkeypatch.setattr(evaluate, "examine", no_figures)
    out = tmp_path / "not/there/t.json"
    evaluate.main(["--max-tokens", "3", "--out", str(out)])
    assert list(read_table(out)) == ["base", "refined"]


def test_the_work_of_a_table_is_known_at_its_start(toy_mllm, monkeypatch):
    """Of base 20 descriptions; of each row in one part 2 photos, put to 14 descriptions, in the
    other 6, put to 6; 3 questions a photo. An answer counts as 8 beliefs; of these there are one
    for each photo and description, and 2 x 2 for each photo, of its candidates."""
    shrink_world(monkeypatch, concepts=2)
    options = options_of(k=2, max_pixels=4096, database=["x.json"])
    benchmark = load_benchmark(toy_mllm, options)
    protocols.choose_tests(benchmark, [])
    plan = evaluate.plan_rows(["base", "x.json"], toy_mllm, toy_mllm, benchmark, options)
    seen = (2 + 2 * 14 + 2 * 3) * 8 + 2 * 14 + 2 * 4
    unseen = (6 + 6 * 6 + 6 * 3) * 8 + 6 * 6 + 6 * 4
    assert plan == {
        ("base", "describing"): 20 * 8,
        ("base", "seen categories"): seen,
        ("base", "unseen categories"): unseen,
        ("x.json", "seen categories"): seen,
        ("x.json", "unseen categories"): unseen,
    }

    # With a CLIP that compares them there are the candidates' only; --grounding asks for 60
    # captions with each kind of references, of one thing and of two: there are no four to test.
    options = options_of(k=2, grounding=True)
    plan = evaluate.plan_rows(["base"], toy_mllm, "a CLIP", benchmark, options)
    assert plan["base", "seen categories"] == seen - 2 * 14
    assert plan["base", "names, seen categories"] == 2 * 3 * 60 * 8


# --------------------------------------------------------------------- a folder of toy pictures
def save_toys(root, concepts):
    """A folder of photos of toys."""
    for concept in concepts:
        for number, photo in enumerate(concept.photos):
            file = root / concept.name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            photo.load().save(file)
    return root


def test_the_toy_model_is_no_judge_of_a_folder_of_toys(tmp_path, capsys):
    """Which is known at the start: the column is "-"."""
    root = save_toys(tmp_path / "toys", small_world(concepts=1, views=2)[:4])
    out = tmp_path / "t.json"
    evaluate.main(["--data", str(root), "--all", "--max-pixels", "4096", "--out", str(out)])
    rows = read_table(out)
    assert list(rows) == ["base", "refined"]
    assert rows["base"]["all"]["leakage"] is None
    assert rows["base"]["all"]["captioning_f1"] > 0
    printed = capsys.readouterr().out
    beginning, table = printed.split("evaluating base")
    assert "no column `leakage`: the toy model does not know that prompt" in beginning
    heading, _, *cells = [line.split(" | ") for line in table.splitlines() if line.startswith("|")]
    assert [row[heading.index("leakage")] for row in cells] == ["-", "-"]


# -------------------------------------------------------------------------------- a published row
PERVA = ["mug/aaa", "mug/bbb", "bowl/ccc", "bowl/ddd", "bowl/eee"]


@pytest.fixture
def perva(tmp_path):
    """A folder as PerVA's: two mugs and three bowls, with two photos each in both parts."""
    names = []
    for concept in PERVA:
        for part in ("train", "test"):
            names += [f"perva-data/{part}/{concept}/{number}.jpg" for number in (1, 2)]
    return make_photos(tmp_path / "root", names)


@pytest.fixture
def simple_reader(monkeypatch):
    """In the place of the assistant: the first k entries are retrieved, of which the last is
    chosen; aaa and ccc are recognised in every photo."""

    def retrieve(embedder, photos, entries, k):
        found = [Retrieved(entry, 0.0, 0.0, 0.0) for entry in entries]
        return [found[:k]] * len(photos)

    def caption(mllm, photos, candidates, max_tokens, seed):
        captions = []
        for of_photo in candidates:
            letter = LETTERS[len(of_photo) - 1]
            captions.append(Caption(of_photo, {"Answer": letter, "Caption": "It."}, ""))
        return captions

    def recognise(mllm, pairs, max_tokens, show_reference):
        return [Verdict(entry.name in ("aaa", "ccc"), "") for _, entry in pairs]

    monkeypatch.setattr(evaluate, "retrieve", retrieve)
    monkeypatch.setattr(evaluate, "caption", caption)
    monkeypatch.setattr(evaluate, "recognise", recognise)


def perva_figures(mllm, root, **given):
    """The figures of the one part of a PerVA."""
    given = protocols.protocol_settings(given.get("protocol", "")) | given
    options = options_of(data=str(root), all=True, **given)
    benchmark = load_benchmark(mllm, options)
    protocols.choose_tests(benchmark, [])
    assert list(benchmark.parts) == ["all"]
    entries = []
    for concept in benchmark.concepts:
        photos = benchmark.splits[concept.name].references
        assert len(photos) == options.references
        assert {photo.part for photo in photos} == {"train"}
        entries.append(Entry(concept.name, concept.category, photos, "A thing."))
    tests = benchmark.parts["all"].tests
    return evaluate.examine(mllm, mllm, entries, tests, [], [], options).figures


def no_leaks(mllm, entries, max_tokens):
    return []


def test_by_category_figures_are_pooled(perva, simple_reader, random_mllm, monkeypatch):
    """PerVA's protocol. With a database for each category bbb and eee are always chosen; in one
    database of all it is ccc."""
    monkeypatch.setattr(evaluate, "leakage", no_leaks)
    figures = perva_figures(random_mllm, perva, protocol="perva")
    f1_bbb = 2 * 2 / (2 + 4)  # picked for all 4 photos of mugs, of which 2 are right
    f1_eee = 2 * 2 / (2 + 6)
    assert figures["captioning_f1"] == pytest.approx((f1_bbb + f1_eee) / 5)
    assert figures["retrieval_ceiling"] == 1
    assert figures["recognition_positive"] == 4 / 10
    # Of 16 negatives aaa is taken for bbb twice, and ccc for ddd and eee four times.
    assert figures["recognition_negative"] == 10 / 16
    assert figures["recognition_inside"] == figures["recognition_weighted"]
    assert figures["recognition_inside"] == pytest.approx((4 / 10 + 10 / 16) / 2)
    assert figures["recognition_across"] is None
    assert figures["counts"]["pairs"] == 4 * 2 + 6 * 3
    assert figures["counts"]["database"] == 5

    figures = perva_figures(random_mllm, perva)
    assert figures["captioning_f1"] == pytest.approx(2 * 2 / (2 + 10) / 5)
    assert figures["retrieval_ceiling"] == 6 / 10
    assert figures["recognition_negative"] == 24 / 40
    assert figures["recognition_inside"] == pytest.approx((4 / 10 + 10 / 16) / 2)
    assert figures["recognition_across"] == pytest.approx((4 / 10 + 14 / 24) / 2)
    assert figures["counts"]["pairs"] == 10 * 5


def no_figures(*arguments):
    """Stands for `examine` where what comes of it is of no interest."""
    counts = dict.fromkeys(("photos", "concepts", "database", "pairs", "questions"), 0)
    figures = dict.fromkeys(evaluate.COLUMNS | evaluate.STRANGERS, 0.0) | {"counts": counts}
    return evaluate.Examined(figures, records=[])


def test_refined_descriptions_are_a_row_after_base(perva, byte_folder, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "examine", no_figures)
    command = ["--model", str(byte_folder), "--data", str(perva), "--all", "--max-tokens", "3"]
    out = perva / "t.json"
    evaluate.main([*command, "--max-pixels", "12544", "--out", str(out)])
    rows = read_table(out)
    assert list(rows) == ["base", "refined"]
    assert list(rows["refined"]) == ["all"]
    printed = capsys.readouterr().out
    assert printed.count("| refined |") == 1
    assert "\nall together: 0 test photos" in printed


def test_the_protocol_is_said(perva, byte_folder, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "examine", no_figures)
    monkeypatch.setattr(evaluate, "Clip", FakeClip)
    command = ["--model", str(byte_folder), "--data", str(perva), "--protocol", "perva"]
    out = perva / "t.json"
    more = ["--train-concepts", "2", "--max-tokens", "3", "--max-pixels", "12544"]
    evaluate.main([*command, *more, "--seed", "42", "--out", str(out)])
    assert json.loads(out.read_text())["settings"]["protocol"] == "perva"
    printed = capsys.readouterr().out
    assert "--protocol perva: a database for each category; photos of a concept desc" in printed
    assert "described: 1; kept from the tests, if the folder is not split: 5; seeds: 23" in printed
    remembered = json.loads((perva / "t-refined-database.json").read_text())
    assert len(remembered["concept_dict"]) == 3


class FakeClip:
    def __init__(self, name, device):
        assert name == "openai/clip-vit-large-patch14-336"


# ------------------------------------------------------------------------------- the refined row
def test_refining_reads_words_alone(toy_mllm, monkeypatch):
    entries = []
    for name, text in (("a", 'A mug "Bo" on grass.'), ("b", "A mug."), ("c", "A cup.")):
        entries.append(Entry(name, "cup", [Photo(name, None)], text, malformed=True))
    asked = []

    def greedy(prompts, max_tokens, progress):
        asked.extend(prompts)
        return ['"A mug\n called Bo."', " ", "A cup."]

    monkeypatch.setattr(toy_mllm, "greedy", greedy)
    refined = evaluate.refine(toy_mllm, entries, 32)
    assert [entry.text for entry in refined] == ["A mug called Bo.", "", "A cup."]
    assert [entry.malformed for entry in refined] == [False, True, False]
    assert [entry.photos for entry in refined] == [entry.photos for entry in entries]
    quoted = "\"A mug 'Bo' on grass.\""
    assert asked[0] == Prompt([], evaluate.REFINE.replace("{text}", quoted))
    assert asked[0].text.startswith(f"This is how somebody described a thing of theirs: {quoted}\n")


# --------------------------------------------------------------------------------------- who reads
def has_adapter_on(mllm):
    return any(layer.enabled for layer in lora_layers(mllm.model).values())


@pytest.mark.parametrize(
    "method, reader, read_with_it",
    [
        ("repic", "", True),
        ("sft", "", True),
        ("rrg", "", False),
        (None, "", False),
        ("repic", "base", False),
        ("rrg", "adapter", True),
    ],
)
def test_who_reads(method, reader, read_with_it, toy_adapter, tmp_path, monkeypatch):
    """An adapter is on while it describes, and while its row is read if it is the reader; never in
    retrieval, nor for the judge of leakage."""
    shrink_world(monkeypatch, concepts=2)
    shutil.copytree(toy_adapter, tmp_path / "adapter")
    if method:
        (tmp_path / "config.json").write_text(json.dumps({"method": method}))
    mllm = MLLM(str(toy.FOLDER), 4096)
    on = {}  # {task: whether an adapter was on, each time}

    def watch(name):
        task = getattr(evaluate, name)

        def watched(*arguments):
            on.setdefault(name, []).append(has_adapter_on(mllm))
            return task(*arguments)

        monkeypatch.setattr(evaluate, name, watched)

    reading = ("caption", "recognise", "answer_questions")
    for name in ("describe", "retrieve", "leakage", *reading):
        watch(name)
    options = options_of(reader=reader, max_tokens=3)
    rows = evaluate.table(mllm, mllm, options, ["base", str(tmp_path / "adapter")])["rows"]

    assert on["describe"] == [False, True]
    for name in reading:  # base, refined and the adapter, of seen and of unseen categories
        assert on[name] == [False] * 4 + [read_with_it] * 2
    assert on["retrieve"] == on["leakage"] == [False] * 6
    assert not lora_layers(mllm.model)

    base, _, adapter = rows.values()
    assert base["seen"]["reader"] == "base"
    assert adapter["unseen"]["reader"] == ("adapter" if read_with_it else "base")
    _, lines = next(evaluate.tables(rows))
    assert lines[3][0] == str(tmp_path / "adapter") + ", read with it" * read_with_it


@pytest.fixture(scope="module")
def toy_adapter(tmp_path_factory):
    """An adapter of the toy model whose B is large."""
    folder = tmp_path_factory.mktemp("large") / "adapter"
    mllm = MLLM(str(toy.FOLDER), 4096)
    add_lora(mllm.model, 2, 4)
    for layer in lora_layers(mllm.model).values():
        layer.lora_B.weight.data += 1.0
    save_adapter(mllm.model, folder)
    return folder


def test_names_in_captions_are_asked_with_the_rows_own_descriptions(
    toy_adapter, monkeypatch, tmp_path
):
    shrink_world(monkeypatch, concepts=2)
    monkeypatch.setattr(evaluate, "examine", no_figures)
    asked = []

    def grounding(mllm, embedder, part, splits, info, zero_shot, options):
        asked.append((info, zero_shot, has_adapter_on(mllm)))
        return {"names_1_right_f1": 0.5}, [{"caption": "<bo> sits."}]

    monkeypatch.setattr(evaluate, "grounding", grounding)
    mllm = MLLM(str(toy.FOLDER), 4096)
    options = options_of(grounding=True, max_tokens=3, out=str(tmp_path / "t.json"))
    rows = evaluate.table(mllm, mllm, options, ["base", str(toy_adapter)])["rows"]
    assert [row[1:] for row in asked] == [(True, False)] * 2 + [(False, True)] * 2
    assert rows["base"]["unseen"]["names_1_right_f1"] == 0.5
    written = json.loads((tmp_path / "t-base-database.json").read_text())["concept_dict"]
    texts = {name.strip("<>"): item["info"] for name, item in written.items()}
    assert asked[0][0] == asked[1][0] == texts
    assert asked[2][0] != texts


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


def test_a_protocol_sets_what_is_not_given():
    command = ["--data", "x", "--model", "y", "--all", "--protocol", "myvlm"]
    options = evaluate.read_settings(command)
    assert (options.references, options.k, options.seed) == (1, 3, 23)
    assert evaluate.read_settings([*command, "--seed", "42"]).seed == 42
    assert options.embedder == "openai/clip-vit-large-patch14-336"
    options = evaluate.read_settings([*command, "--references", "2", "--embedder", ""])
    assert (options.references, options.embedder) == (2, "")
    assert evaluate.read_settings(["--data", "x", "--model", "y"]).embedder == ""


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--protocol", "perva", "--all"], "--protocol is about a benchmark's photos: give"),
        (["--protocol", "perva", "--data", "x"], "--protocol wants --all or, of concepts that"),
        (["--all", "--train-concepts", "3"], "--all tests every concept, --train-concepts all"),
        (["--show-reference"], "--show-reference wants a real --model"),
        (["--grounding", "--data", "x"], "--grounding of --data wants a real --model"),
        (["--reader", "adapter"], "--reader is about the rows of adapters: give --adapter"),
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
        (["--adapter", "nowhere"], "nowhere is not a folder; wanted: the adapter of a run"),
        (["--database", "nowhere.json"], "cannot read"),
        (["--data", "nowhere"], "is not a folder"),
        (["--k", "20"], "--k 20 is more than the 7 things that there are"),
    ],
)
def test_errors_are_one_line(arguments, message, monkeypatch):
    shrink_world(monkeypatch, concepts=1)
    with pytest.raises(DataError, match=message):
        evaluate.main(arguments)
