"""Evaluation: every figure against one worked out by hand, and the tasks on a small toy world."""
import argparse
import dataclasses
import functools
import html.parser
import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

import data
import evaluate
import grpo
import reward
import rrg
import toy
from conftest import ROOT


# ----------------------------------------------------------------------------------------------------------- reading answers
@pytest.mark.parametrize("text, read", [
    ('{"Reasoning": "a red one", "Answer": "B"}', "B"),
    ('  {"Reasoning": " a ", "Answer": " b "}\n', "B"),
    ('```json\n{"Answer": "A"}\n```', "A"),
    ("", None), ("B", None), ("The answer is B.", None),
    ('Sure! {"Answer": "B"}', None), ('{"Answer": "B"} I am sure.', None),  # prose around it
    ('{"Answer": "A or B"}', None), ('{"Answer": "A, B"}', None), ('{"Answer": "A", "Answer": "B"}', None), ('{"Answer": ["A"]}', None),  # two letters
    ('{"Reasoning": "a red one", "Answer": "B', None), ('{"Reasoning": "a red one"', None),  # truncated
    ('{"Answer": "D"}', None), ('{"Answer": ""}', None), ('{"Answer": 1}', None), ("{}", None), ("[]", None), ('[["Answer", "A"]]', None),
    ("[" * 100_000, None), ("null", None), ('{"answer": "A"}', None), ('{"Reasoning": "x", "Letter": "A"}', None)])
def test_answers_are_read_strictly(text, read):
    row = evaluate.read_answer(text, Answer="ABC")
    assert (row and row["Answer"]) == read


def test_every_required_field_must_be_there():
    assert evaluate.read_answer('{"Answer": "A", "Caption": "<a> sits."}', Answer="AB", Caption=None) == {"Answer": "A", "Caption": "<a> sits."}
    assert evaluate.read_answer('{"Answer": "A", "Caption": " "}', Answer="AB", Caption=None) is None
    assert evaluate.read_answer('{"State": "no", "Location": "YES"}', State=("Yes", "No"), Location=("Yes", "No")) == {"State": "No", "Location": "Yes"}


# ------------------------------------------------------------------------------------------------------------------- figures
def test_retrieval_is_half_picture_half_words():
    image, text = torch.tensor([[0.9, 0.5, 0.7]]), torch.tensor([[0.0, 1.0, 0.8]])
    best, scores = evaluate.retrieve(image, text, 2)  # (1 + 0) / 2, (0 + 1) / 2, (.5 + .8) / 2
    assert torch.allclose(scores, torch.tensor([[0.5, 0.5, 0.65]])) and best.tolist() == [[2, 0]]  # of equals the first


def test_retrieval_where_all_are_alike():
    best, scores = evaluate.retrieve(torch.full((2, 3), 0.4), torch.full((2, 3), 0.1), 9)
    assert best.tolist() == [[0, 1, 2]] * 2 and not scores.any()


def test_recognition_by_hand():
    rows = [(True, True, True), (True, False, True), (True, None, True), (True, True, True),  # 2 of 4
            (False, False, True), (False, True, True), (False, None, True),  # inside the category 1 of 3
            (False, False, False), (False, False, False)]  # across 2 of 2
    assert evaluate.recognition_scores(rows) == pytest.approx({
        "recognition_positive": 2 / 4, "recognition_negative": 3 / 5, "recognition_weighted": 0.55,
        "recognition_inside": (1 / 2 + 1 / 3) / 2, "recognition_across": (1 / 2 + 1) / 2})
    assert set(evaluate.recognition_scores([]).values()) == {None}
    only_negatives = evaluate.recognition_scores([(False, False, True)])  # zero positives
    assert only_negatives["recognition_negative"] == 1 and only_negatives["recognition_weighted"] is None


def test_captioning_by_hand():
    # a: chosen once, rightly, of two; b: once, wrongly; c is never right, but chosen: a class of its own
    rows = [("a", "a"), ("a", "b"), ("b", None), ("b", "c")]
    assert evaluate.captioning_scores(rows) == pytest.approx({
        "captioning_precision": (1 + 0 + 0) / 3, "captioning_recall": (1 / 2 + 0 + 0) / 3, "captioning_f1": (2 / 3 + 0 + 0) / 3})
    assert evaluate.captioning_scores(rows, {"a", "b"}) == pytest.approx({  # c is a distractor of the database that no photo shows
        "captioning_precision": (1 + 0) / 2, "captioning_recall": (1 / 2 + 0) / 2, "captioning_f1": (2 / 3 + 0) / 2})
    assert evaluate.captioning_scores([("a", "a"), ("b", "b")])["captioning_f1"] == 1
    assert evaluate.captioning_scores([("a", None)]) == {"captioning_precision": 0, "captioning_recall": 0, "captioning_f1": 0}
    assert evaluate.captioning_scores([])["captioning_f1"] is None


def test_name_grounding_by_hand():
    rows = [(["<bo>"], "A dog."),  # nothing
            (["<bo>"], "This is <bo>, a dog."),  # hit
            (["<bo>"], "(Bo) sleeps"),  # hit, if case does not count
            (["<bo>"], "<mam> sleeps."),  # miss: another name
            (["<bo>"], "<bo>'s nose"),  # nothing: not the word
            (["<mam>"], "mam and bo")]  # hit: an extra name next to a hit is not punished
    assert evaluate.name_grounding(rows) == pytest.approx({"precision": 3 / 4, "recall": 3 / 6, "f1": 0.6})
    assert evaluate.name_grounding(rows, case_sensitive=True) == pytest.approx({"precision": 2 / 3, "recall": 2 / 6, "f1": 4 / 9})
    pairs = [(["<A_dog>", "<G_cat>"], "A_dog meets <G_cat>!"), (["<A_dog>", "<G_cat>"], "<A_dog> is alone"), (["H", "T"], "<G_cat> and H")]
    # 2 hits; 1 hit and nothing; 1 hit and a miss, because a cat that does not belong there is named
    assert evaluate.name_grounding(pairs, case_sensitive=True) == pytest.approx({"precision": 4 / 5, "recall": 4 / 6, "f1": 8 / 11})
    assert evaluate.name_grounding([]) == evaluate.name_grounding([(["a"], "")]) == {"precision": 0, "recall": 0, "f1": 0}


def test_names_become_one_word():
    assert [evaluate.tag(name) for name in ("bo", "my blue mug", "cups/mug-1", "Ärger", "a.b (2)")] == ["<bo>", "<my_blue_mug>", "<cups_mug-1>", "<Ärger>", "<a_b_2>"]


# ------------------------------------------------------------------------------------------------------------ the toy world
OPTIONS = dict(k=3, seed=0, max_tokens=64, skip_retrieval=False, references=1, data="", adapter=[], database=[], all=False, out="")


world = toy.world  # which some tests replace


def small_world(seed=0, size=64, concepts=4, views=3):
    return world(seed, size, concepts, views)


def perfect(concept):
    photo = concept.photos[0]
    return data.Entry(concept.name, concept.category, [photo], ". ".join(toy.sentence(photo.truth, toy.IDENTITY)))


def examine(mllm, concepts, entries, **options):
    tests = [(photo, concept.name) for concept in concepts for photo in concept.photos[1:]]
    return evaluate.examine(mllm, mllm, entries, tests, toy.questions(tests, 0), {}, argparse.Namespace(**OPTIONS | options))


@pytest.fixture(scope="module")
def figures(toy_mllm):
    concepts = small_world(seed=5, concepts=3)
    entries = [perfect(concept) for concept in concepts]
    wrong = [data.Entry(e.name, e.category, e.photos, entries[i - 3].text) for i, e in enumerate(entries)]  # each has another category's description
    return examine(toy_mllm, concepts, entries), examine(toy_mllm, concepts, wrong, skip_retrieval=True)


def test_the_toy_model_can_read_the_prompts(figures):
    """With descriptions written from the truth it does the tasks, and with wrong ones it does not."""
    right, wrong = figures
    assert right["recognition_weighted"] >= 0.95 and right["captioning_f1"] >= 0.95 and right["vqa"] >= 0.95 and right["name_f1"] >= 0.95
    assert right["unparsed"] < 0.01 and right["leakage"] == 0 and right["retrieval_ceiling"] >= 0.95
    assert wrong["recognition_positive"] < 0.1 and wrong["captioning_recall"] < 0.6 and wrong["retrieval_ceiling"] == 1
    assert wrong["vqa"] >= 0.9  # which is in the photo, not in the description


def test_counts(figures):
    right, _ = figures
    assert right["counts"] | {"unparsed_captions": 0, "unparsed_recognition": 0, "unparsed_vqa": 0} == {
        "concepts": 30, "database": 30, "photos": 60, "pairs": 1800, "questions": 180,
        "unparsed_captions": 0, "unparsed_recognition": 0, "unparsed_vqa": 0, "unparsed_leakage": 0, "malformed_descriptions": 0}


@pytest.mark.slow
def test_the_toy_model_can_read_the_prompts_in_full(toy_mllm):
    concepts = toy.world(11, 64, 12, 2)
    right = examine(toy_mllm, concepts, [perfect(concept) for concept in concepts])
    print(right)
    assert right["recognition_weighted"] >= 0.95 and right["captioning_f1"] >= 0.95 and right["vqa"] >= 0.95


def test_recognition_in_any_company(toy_mllm):
    """Padding, order and chunks change nothing, and each photo is encoded once however many descriptions are put to it."""
    concepts = small_world(seed=6, concepts=1, views=2)
    entries = [perfect(concept) for concept in concepts]
    entries[0] = data.Entry(entries[0].name, "mug", entries[0].photos, "A photo of a mug. The mug.")  # of another length
    pairs = [(concept.photos[1], entry) for concept in concepts for entry in entries]
    encoded, tower = [], toy_mllm.model.model.get_image_features
    toy_mllm.features = {}
    toy_mllm.model.model.get_image_features = lambda pixels, grid: (encoded.append(len(grid)), tower(pixels, grid))[1]
    try:
        together = evaluate.recognise(toy_mllm, pairs, 64)
    finally:
        del toy_mllm.model.model.get_image_features
    assert sum(encoded) == len(concepts)
    assert together == [evaluate.recognise(toy_mllm, [pair], 64)[0] for pair in pairs]
    assert set(together) == {True, False}


def test_a_bare_adapter_gives_the_row_of_base(tmp_path, monkeypatch, capsys):
    """The whole command: the shape of the JSON, the databases beside it, and an adapter whose B is 0 is the base model."""
    monkeypatch.setattr(toy, "world", lambda seed, size: small_world(seed, size, concepts=2, views=2))
    mllm = rrg.MLLM(str(toy.FOLDER), 4096)
    grpo.add_lora(mllm.model, 2, 4)
    grpo.save_adapter(mllm.model, tmp_path / "adapter")
    out = tmp_path / "table.json"
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--adapter", str(tmp_path / "adapter"), "--out", str(out)])
    evaluate.main(evaluate.settings())
    result = json.loads(out.read_text())
    assert result["seed"] == 0 and list(result["rows"]) == ["base", str(tmp_path / "adapter")]
    base, bare = result["rows"].values()
    assert base == bare
    needed = {"captioning_f1", "captioning_precision", "captioning_recall", "recognition_positive", "recognition_negative", "recognition_weighted",
              "vqa", "leakage", "retrieval_ceiling", "unparsed"}
    for part in ("seen", "unseen"):
        assert needed <= base[part].keys() and all(0 <= base[part][key] <= 1 for key in needed)
    assert (base["seen"]["counts"]["concepts"], base["seen"]["counts"]["database"], base["unseen"]["counts"]["database"]) == (2, 14, 6)
    table = capsys.readouterr().out
    assert table.count("| base |") == 2 and table.count("caption F1") == 2 and "1 right" not in table
    remembered = json.loads((tmp_path / "table-base-database.json").read_text())
    assert len(remembered["concept_dict"]) == 20 and remembered["path_to_concept"]["mug-1/1"] == "<mug-1>"
    assert remembered["concept_dict"]["<mug-1>"]["info"].startswith("A photo of a")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--database", str(tmp_path / "table-base-database.json"), "--out", str(out)])
    evaluate.main(evaluate.settings())  # descriptions that were written down are worth the same
    again = json.loads(out.read_text())["rows"]
    assert again["base"] == base and list(again.values())[1] == base


def test_grounding_gives_the_references_it_says(toy_mllm, monkeypatch):
    """Right, retrieved and wrong references, by a caption writer that uses every name it is given."""
    concepts = toy.world(7, concepts=3, views=3)
    split = {concept.name: (concept.photos[:1], concept.photos[1:]) for concept in concepts}
    asked = []

    def parrot(prompts, most, progress):
        asked.extend(prompts)
        return [" ".join(re.findall(r"<[\w-]+>", text)) for _, text in prompts]

    monkeypatch.setattr(toy_mllm, "tell", parrot)
    row = evaluate.grounding(toy_mllm, toy_mllm, concepts, concepts[:10], split, argparse.Namespace(**OPTIONS))
    for many in (1, 2, 4):
        assert row[f"names_{many}_right_f1"] == row[f"names_{many}_wrong_f1"] == 1  # a parrot is perfect with right ones, and falls for wrong ones
        assert 0 < row[f"names_{many}_retrieved_f1"] <= 1
    owner = {photo.name: concept.name for concept in concepts for photo in concept.photos}
    per_kind = [asked[i:i + evaluate.SCENES] for i in range(0, len(asked), evaluate.SCENES)]
    assert len(per_kind) == 9
    for (many, how), prompts in zip([(m, h) for m in (1, 2, 4) for h in ("right", "retrieved", "wrong")], per_kind):
        for photos, text in prompts:
            *references, query = photos
            shown = {owner[part.split(" at ")[0]] for part in query.name.split("; ")}
            assert len(shown) == many and all(photo in split[owner[photo.name]][0] for photo in references)
            named = re.findall(r"<([\w-]+)>", text)
            assert named == [owner[photo.name] for photo in references]  # each name stands for its picture, in order
            if how != "retrieved":
                assert len(named) == many and (set(named) == shown if how == "right" else not set(named) & shown)
    assert {text.split(": ")[1].split(".\n")[1] for _, text in asked} == {after.split(".\n")[1] for _, after in reward.REPIC["ict"]}


def test_grounding_is_a_second_table(random_folder, tmp_path, monkeypatch, capsys):
    """The whole command with an untrained model: figures where there are enough concepts, none where there are not."""
    monkeypatch.setattr(toy, "world", lambda seed, size: small_world(seed, size, concepts=2, views=2))
    monkeypatch.setattr(evaluate, "SCENES", 2)
    monkeypatch.setattr(evaluate, "examine", lambda *rest: {key: 0.0 for key in evaluate.COLUMNS} | {"counts": dict.fromkeys(
        ("photos", "concepts", "database", "pairs", "questions"), 0)})
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model", str(random_folder), "--grounding", "--max-tokens", "6", "--out", str(tmp_path / "t.json")])
    evaluate.main(evaluate.settings())
    row = json.loads((tmp_path / "t.json").read_text())["rows"]["base"]
    assert row["seen"]["names_1_right_f1"] == row["unseen"]["names_2_wrong_f1"] == 0 and row["seen"]["names_4_right_f1"] is None  # two held-out concepts
    assert capsys.readouterr().out.count("| 1 name, right |") == 2


@pytest.mark.parametrize("where", ["p", "copies"])
def test_what_a_database_was_written_from_is_no_test(where, random_folder, tmp_path, monkeypatch):
    """Photos that a database of descriptions names are left out of the tests, whichever of them this table's own references are; so are
    copies, which a database often keeps of its own."""
    for concept in small_world(concepts=2, views=3)[:6]:
        for number, photo in enumerate(concept.photos):
            (tmp_path / "p" / concept.name).mkdir(parents=True, exist_ok=True)
            photo.open().save(tmp_path / "p" / concept.name / f"{number}.png")
    names = sorted(folder.name for folder in (tmp_path / "p").iterdir())
    entries = {f"<{name}>": {"name": name, "image": [f"elsewhere/p/{name}/{number}.png" for number in (0, 1)], "info": "red mug"} for name in names}
    shutil.copytree(tmp_path / "p", tmp_path / "copies/p")
    folder = tmp_path / where
    (folder / "database.json").write_text(json.dumps({"concept_dict": entries}))
    asked = []
    monkeypatch.setattr(evaluate, "examine", lambda mllm, embedder, entries, tests, *rest: (asked.extend(tests), {"counts": {}})[1])
    mllm = rrg.MLLM(str(random_folder), 4096)
    options = evaluate.settings(["--model", str(random_folder), "--data", str(tmp_path / "p"), "--all", "--max-tokens", "4",
                                 "--database", str(folder / "database.json")])
    monkeypatch.setattr(mllm, "check", lambda texts: None)  # the toy's tokenizer does not know these names
    evaluate.table(mllm, mllm, options, ["base"])
    assert asked and {pathlib.Path(photo.name).name for photo, _ in asked} == {"2.png"}


def test_descriptions_that_are_not_in_form_are_counted(random_mllm):
    """An untrained model babbles: what it says is remembered as it stands, its answers are unparsed, and nothing is guessed."""
    concepts = small_world(concepts=1, views=2)
    entries = evaluate.describe(random_mllm, [dataclasses.replace(concept, photos=concept.photos[:1]) for concept in concepts], 8)
    assert all(entry.malformed for entry in entries) and not any("<coarse>" in entry.text for entry in entries)
    row = examine(random_mllm, concepts, entries, max_tokens=4)
    assert row["counts"]["malformed_descriptions"] == len(concepts)
    assert row["unparsed"] == 1 and row["captioning_f1"] == row["recognition_weighted"] == row["vqa"] == 0


def test_the_judge_of_leakage_reads_words_alone(toy_mllm, monkeypatch):
    photo = data.Photo("real", lambda: Image.new("RGB", (64, 64)))
    entries = [data.Entry(name, "cup", [photo], text) for name, text in (("a", "A mug on grass."), ("b", "A mug."), ("c", "A mug?"))]
    verdicts = iter(['{"State": "No", "Location": "Yes"}', '{"State": "No", "Location": "No"}', "Well."])
    prompts = []
    monkeypatch.setattr(toy_mllm, "tell", lambda asked, most, progress: (prompts.extend(asked), list(verdicts))[1])
    assert evaluate.leakage(toy_mllm, entries, 32) == (0.5, 1)
    assert [photos for photos, _ in prompts] == [[], [], []] and "A mug on grass." in prompts[0][1]


def test_text_alone_can_be_read(toy_mllm):
    prefix = toy_mllm.prefill(["<|im_start|>user yes<|im_end|>", "<|im_start|>user A photo of a red mug<|im_end|>"], [[], []])
    ids = torch.tensor([toy_mllm.encode("<|im_start|>user yes<|im_end|>")])
    plain = toy_mllm.model.model(input_ids=ids).last_hidden_state[:, -1]
    assert torch.allclose(prefix.last[:1], plain, atol=1e-4)


# ------------------------------------------------------------------------------------------------------ ask about one picture
@pytest.fixture
def things(tmp_path):
    """A folder of four named toys, two as folders and two as single photos, and a new photo of one of them."""
    for i, concept in enumerate(toy.world(4, 64, 1, 2)[:4]):
        inside = i < 2
        path = tmp_path / "things" / (f"{concept.name}/1.png" if inside else f"{concept.name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        concept.photos[0].open().save(path)
        if i == 1:
            concept.photos[1].open().save(tmp_path / "new.png")
            name = concept.name
    return tmp_path, name


def test_asking_about_one_picture(things, monkeypatch, capsys):
    folder, name = things
    command = ["evaluate.py", "--photos", str(folder / "things"), "--query", str(folder / "new.png"), "--out", str(folder / "db.json")]
    monkeypatch.setattr(sys, "argv", command)
    evaluate.main(evaluate.settings())
    said = capsys.readouterr().out
    assert f"<{name}> is" in said and "because it chose" in said and "of 4 things" in said
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--database", str(folder / "db.json"), "--query", str(folder / "new.png")])
    evaluate.main(evaluate.settings())
    assert capsys.readouterr().out.split("because")[1] == said.split("because")[1]


@pytest.mark.parametrize("arguments, message", [
    (["--query", "x.png"], "go together"), (["--photos", "things"], "go together"), (["--k", "1"], "--k from 2"), (["--references", "0"], "at least 1"),
    (["--query", "x", "--photos", "y", "--adapter", "a", "--adapter", "b"], "one --adapter")])
def test_a_command_that_makes_no_sense(arguments, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.settings(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [
    (["--query", "nowhere.png", "--photos", "things"], "cannot read the picture"), (["--adapter", "nowhere"], "is not an adapter folder"),
    (["--database", "nowhere.json"], "cannot read"), (["--data", "nowhere"], "is not a folder")])
def test_errors_are_one_line(arguments, message, monkeypatch):
    monkeypatch.setattr(toy, "world", lambda seed, size: small_world(seed, size, concepts=1, views=2))
    with pytest.raises(data.DataError, match=message):
        evaluate.main(evaluate.settings(arguments))


def test_a_trained_runs_held_out_concepts_are_minded(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "some model\'s own"}')
    evaluate.warn_of_other_split(tmp_path / "adapter", argparse.Namespace(seed=0, data=""))
    (tmp_path / "config.json").write_text('{"settings": {"seed": 3, "data": ""}}')
    evaluate.warn_of_other_split(tmp_path / "adapter", argparse.Namespace(seed=3, data=""))
    assert not capsys.readouterr().out
    evaluate.warn_of_other_split(tmp_path / "adapter", argparse.Namespace(seed=0, data=""))
    assert "may have met" in capsys.readouterr().out


def test_toy_questions_ask_for_what_a_good_description_leaves_out():
    tests = [(photo, concept.name) for concept in small_world() for photo in concept.photos]
    questions = toy.questions(tests, 0)
    assert len(questions) == 3 * len(tests) and {q.answer for q in questions} == {"A", "B"}
    for q in questions:
        (kind, word), = toy.claims(q.options[q.answer])
        assert q.photo.truth[kind] == word and kind in toy.VIEW
        (_, other), = toy.claims(q.options["AB".replace(q.answer, "")])
        assert other != word
    assert questions == toy.questions(tests, 0) != toy.questions(tests, 1)


def test_nothing_imports_evaluate():
    assert not [path.name for path in ROOT.glob("*.py") if "import evaluate" in path.read_text()]


# ---------------------------------------------------------------------------------------------------------- a run as a page
class Reader(html.parser.HTMLParser):
    """Reads a page as a strict person would: tags that are open, and all tags with their attributes."""
    open, tags, text = (), (), ""

    def handle_starttag(self, tag, attributes):
        self.tags += ((tag, dict(attributes)),)
        self.open += (tag,) if tag not in ("meta", "img", "br", "path", "polyline") else ()

    def handle_startendtag(self, tag, attributes):
        self.tags += ((tag, dict(attributes)),)

    def handle_endtag(self, tag):
        assert self.open[-1] == tag, f"</{tag}> within <{self.open[-1]}>"
        self.open = self.open[:-1]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module", params=["rrg", "repic", "sft"])
def page(request, tmp_path_factory):
    """The page of a short run of each method, made by the command itself."""
    out = tmp_path_factory.mktemp("page") / f"a run {'of_a_long_name' * 8}"  # which is in the command that the page shows
    small = ["--steps", "2", "--games", "2", "--eval-games", "7", *([] if request.param == "sft" else ["--samples", "3"])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "world", functools.partial(toy.world, concepts=5, views=2))
        arguments = ["--method", request.param, "--out", str(out), *small]
        patch.setattr("sys.argv", ["rrg.py", *arguments])
        rrg.train(*rrg.settings(arguments))
        evaluate.main(evaluate.settings(["--report", str(out), "--max-tokens", "8"]))
    return request.param, out / "report.html"


def test_the_page_of_a_run_is_whole_and_needs_nothing_else(page):
    method, file = page
    reader, text = Reader(), file.read_text()
    reader.feed(text)
    assert set(reader.open) <= {"html"} and reader.tags[0][0] == "html" and reader.tags[0][1]["lang"] == "en"
    links = [attributes.get("src", "") + attributes.get("href", "") for _, attributes in reader.tags]
    assert not [link for link in links if link and not link.startswith(("data:image/jpeg;base64,", "#"))] and "http" not in text
    assert all(attributes["alt"] for tag, attributes in reader.tags if tag == "img")
    assert all(attributes["aria-label"] for tag, attributes in reader.tags if tag == "svg")
    assert ("viewport" in text and "color-scheme:light dark" in text) and all(f'id="{part}"' in text for part in ("Results", "Curves", "Games"))
    curves = {"rrg": {"reward", "listener accuracy", "kl", "leakage", "nll"}, "sft": {"nll"}}.get(method, {"reward", "kl", "nll"})
    assert curves <= {attributes["aria-label"].split(":")[0] for tag, attributes in reader.tags if tag == "svg"}
    assert json.loads((file.parent / "table.json").read_text())["rows"].keys() == {"base", str(file.parent / "adapter")}
    assert ("before" in reader.text and "after" in reader.text) and "caption F1" in reader.text and "Held out from training" in reader.text
    if method == "rrg":
        marked = [text.split("<")[0] for text in text.split("<mark>")[1:]]
        assert marked and all(toy.leaks(word) for word in marked) and reader.text.count("target, what the speaker sees") == 6
        assert reader.text.count("% yes") + 3 * reader.text.count("not parsed") >= 6 * 3 * 2 and "advantage" in reader.text


@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_the_page_without_scrolling_sideways(page, width, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium is installed")
    probe = tmp_path / "probe.html"  # a headless window is at least 500 pixels wide, a frame is as wide as it is told to be
    script = "let d=f.contentDocument;document.title=[d.documentElement.scrollWidth,d.querySelectorAll('h2').length,[...d.images].every(i=>i.naturalWidth)].join()"
    quoted = page[1].read_text().replace("&", "&amp;").replace('"', "&quot;")
    probe.write_text(f'<iframe id="f" width="{width}" height="3000" srcdoc="{quoted}" onload="{script}"></iframe>')
    done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", probe.as_uri()], capture_output=True, text=True, timeout=120)
    sideways, sections, pictures = re.search(r"<title>(.*?)</title>", done.stdout)[1].split(",")
    assert int(sideways) <= width and int(sections) >= 3 and pictures == "true"


@pytest.mark.parametrize("page", ["rrg"], indirect=True)
def test_a_report_beside_a_table_of_another_seed_shows_the_runs_own_photos(page, monkeypatch):
    monkeypatch.setattr(toy, "world", functools.partial(toy.world, concepts=5, views=2))
    before = re.findall(r"data:image/jpeg;base64,[^\"]+", page[1].read_text())
    evaluate.main(evaluate.settings(["--report", str(page[1].parent), "--max-tokens", "8", "--seed", "1"]))
    assert before and re.findall(r"data:image/jpeg;base64,[^\"]+", page[1].read_text()) == before
    assert json.loads((page[1].parent / "table.json").read_text())["seed"] == 1


def test_a_report_wants_a_finished_run(tmp_path):
    with pytest.raises(data.DataError, match="holds no finished run; to finish one: python rrg.py --out .* --resume"):
        evaluate.settings(["--report", str(tmp_path)])
