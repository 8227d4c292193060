"""RePIC's measure: names in captions."""

import json
import re

import pytest
import torch

import evaluate
import naming
import toy
from data import Concept, DataError, Photo, load_concepts
from lora import add_lora, lora_layers, save_adapter
from model import MLLM, PICTURE
from naming import PROTOCOLS, Reference
from protocols import Part, PhotoSplit
from repic import ASK_FOR_NAME, PROMPTS, introduce
from test_data import make_photos
from test_evaluate import no_figures, options_of, read_table, shrink_world, small_world

QUESTIONS = [  # the paper's Table A.3
    "Give a personalized caption of this image.",
    "Give a caption of the image.",
    "Can you provide a personalized caption for this photo?",
    "Provide a caption of the given image.",
]


# ------------------------------------------------------------------------------- how it is measured
def test_name_grounding_by_hand():
    rows = [
        (["<bo>"], "A dog."),  # nothing
        (["<bo>"], "This is <bo>, a dog."),  # a hit
        (["<bo>"], "(Bo) sleeps"),  # a hit, if case does not count
        (["<bo>"], "<mam> sleeps."),  # a miss: another name
        (["<bo>"], "<bo>'s nose"),  # nothing: not the word
        (["<mam>"], "mam and bo"),  # a hit: an extra name next to a hit is not punished
    ]
    expected = {"precision": 3 / 4, "recall": 3 / 6, "f1": 0.6}
    assert naming.name_grounding(rows) == pytest.approx(expected)
    expected = {"precision": 2 / 3, "recall": 2 / 6, "f1": 4 / 9}
    assert naming.name_grounding(rows, case_sensitive=True) == pytest.approx(expected)


def test_name_grounding_of_pairs_by_hand():
    rows = [
        (["<A_dog>", "<G_cat>"], "A_dog meets <G_cat>!"),  # two hits
        (["<A_dog>", "<G_cat>"], "<A_dog> is alone"),  # a hit and nothing
        (["H", "T"], "<G_cat> and H"),  # a hit, and a miss: a cat that does not belong there
    ]
    expected = {"precision": 4 / 5, "recall": 4 / 6, "f1": 8 / 11}
    assert naming.name_grounding(rows, case_sensitive=True) == pytest.approx(expected)
    nothing = {"precision": 0, "recall": 0, "f1": 0}
    assert naming.name_grounding([]) == nothing
    assert naming.name_grounding([(["a"], "")]) == nothing


def test_names_in_brackets_by_hand():
    rows = [
        (["Iron Man", "Thor"], "<iron man>'s suit, and Thor."),  # the first, if case does not count
        (["Thor"], "**<Thor>**"),  # there
    ]
    assert naming.recall_in_brackets(rows) == pytest.approx(2 / 3)
    assert naming.recall_in_brackets(rows, case_sensitive=True) == pytest.approx(1 / 3)
    assert naming.recall_in_brackets([]) == 0


MUG = {"category": "mug", "colour": "red", "pattern": "striped", "badge": "star"}
HOUSE = {"category": "house", "colour": "blue", "pattern": "plain", "badge": "heart"}


@pytest.mark.parametrize(
    ("caption", "matched"),
    [
        ("<Ada> is a red mug. <Bo> is a blue house.", 1),
        ("<Bo> is a red mug. <Ada> is a blue house.", 0),
        ("<Ada> is a red mug. <Bo> is a blue mug.", 1 / 2),
        (
            "<Ada> is a red mug. <Carl> is a blue house.",
            1,
        ),  # what is not shown is another measure's
        ("<Ada> <Bo>.", 0),  # a sentence that says nothing is no match
        ("A red mug and a blue house.", None),
    ],
)
def test_whether_a_name_stands_with_its_own_thing(caption, matched):
    shows = {"Ada": Photo("a", load=None, truth=MUG), "Bo": Photo("b", load=None, truth=HOUSE)}
    scene = naming.Scene(Photo("scene", load=None), {}, shows)
    assert naming.share_matched([scene], [caption]) == matched


def test_of_photos_whose_truth_is_not_known_no_names_are_matched():
    scene = naming.Scene(Photo("scene", load=None), {}, {"Ada": Photo("a", load=None)})
    assert naming.share_matched([scene], ["<Ada> is a red mug."]) is None


@pytest.mark.parametrize(
    ("method", "taught"), [("rrg", False), ("repic", True), ("sft", True), (None, True)]
)
def test_who_was_taught_to_say_names(method, taught, tmp_path):
    """An adapter without a run, such as a published one, was."""
    assert not naming.taught_names("base")
    if method:
        (tmp_path / "config.json").write_text(json.dumps({"method": method}))
    assert naming.taught_names(str(tmp_path / "adapter")) == taught


# ------------------------------------------------------------------------------ names in captions
class Parrot:
    """A caption writer that says every name it is given, and remembers what it was asked."""

    def __init__(self):
        self.prompts = []

    def greedy(self, prompts, max_tokens, progress):
        self.prompts += prompts
        texts = [prompt.text.replace(PICTURE, "") for prompt in prompts]
        return [" ".join(re.findall(r"<[\w-]+>", text)) for text in texts]


@pytest.fixture(scope="module")
def parroted(toy_mllm):
    """What a parrot scores, and what it was asked.   -> (figures, concepts, [Prompt])"""
    concepts = small_world(seed=7, concepts=3)
    splits = {}
    for concept in concepts:
        splits[concept.name] = PhotoSplit(concept.photos[:1], concept.photos[1:])
    part = Part(known=concepts, tested=concepts[:10])
    parrot = Parrot()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_mllm, "greedy", parrot.greedy)
        figures, _ = naming.grounding(
            toy_mllm,
            toy_mllm,
            part,
            splits,
            {concepts[0].name: "A mug."},
            zero_shot=True,
            options=options_of(),
        )
    return figures, concepts, parrot.prompts


def test_a_parrot_is_perfect_with_right_references_and_falls_for_wrong_ones(parroted):
    figures, _, _ = parroted
    for count in (1, 2, 4):
        assert figures[f"names_{count}_right_f1"] == 1
        assert figures[f"names_{count}_wrong_f1"] == 1
        assert 0 < figures[f"names_{count}_retrieved_f1"] <= 1
        assert figures[f"names_{count}_right_recall_in_brackets"] == 1


def test_grounding_gives_the_references_it_says(parroted):
    _, concepts, prompts = parroted
    owner = {}  # {photo name: concept name}
    for concept in concepts:
        owner.update(dict.fromkeys([photo.name for photo in concept.photos], concept.name))
    first_photos = [concept.photos[0] for concept in concepts]

    kinds = []  # (concepts in the picture, how references are chosen), in the order of prompts
    for count in (1, 2, 4):
        kinds += [(count, how) for how in ("right", "retrieved", "wrong")]
    assert len(prompts) == len(kinds) * naming.SCENES
    for number, prompt in enumerate(prompts):
        count, how = kinds[number // naming.SCENES]
        *references, picture = prompt.photos
        shown = {owner[part.split(" at ")[0]] for part in picture.name.split("; ")}
        assert len(shown) == count
        assert all(photo in first_photos for photo in references)

        named = re.findall(r"<([\w-]+)>", prompt.text)
        assert named == [owner[photo.name] for photo in references]  # in order
        if how == "right":
            assert len(named) == count
            assert set(named) == shown
        if how == "wrong":
            assert len(named) == count
            assert not set(named) & shown


def test_grounding_asks_the_toy_model_in_the_wordings_that_it_knows(parroted):
    """In turn, with the names and nothing else."""
    _, _, prompts = parroted
    for number, prompt in enumerate(prompts):
        names = re.findall(r"<[A-Z]\w+>", prompt.text)
        template = PROMPTS["ict"][number % naming.SCENES % 3]
        assert prompt.text == f"{introduce(template, names)} {ASK_FOR_NAME}"


def test_grounding_asks_a_real_model_in_repics_layout(byte_folder, monkeypatch):
    """With the description of each reference, and for the name where nobody has taught it."""
    mllm = MLLM(str(byte_folder), 3136)
    concepts = []
    for concept in small_world(seed=7, concepts=1):
        photos = [Photo(photo.name, photo.load) for photo in concept.photos]
        concepts.append(Concept(concept.name, concept.category, photos))
    splits = {}
    for concept in concepts:
        splits[concept.name] = PhotoSplit(concept.photos[:1], concept.photos[1:])
    info = {concept.name: f"A {concept.category}." for concept in concepts}
    monkeypatch.setattr(naming, "SCENES", 5)
    part = Part(known=concepts, tested=concepts)

    texts = {}
    for zero_shot in (True, False):
        parrot = Parrot()
        monkeypatch.setattr(mllm, "greedy", parrot.greedy)
        naming.grounding(mllm, mllm, part, splits, info, zero_shot, options_of())
        texts[zero_shot] = [prompt.text for prompt in parrot.prompts]
    ending = " Output the final answer including its name."
    assert texts[True] == [text + ending for text in texts[False]]

    pairs = texts[False][3 * 5 : 4 * 5]  # of two concepts, the right references
    for number, text in enumerate(pairs):
        _, first, second, query = text.split(PICTURE)
        for place, line in ((1, first), (2, second)):
            name = re.search(r"<([\w-]+)>", line)[1]
            assert line == f'{place}. Name: <{name}>, Info: "{info[name]}"\n'
        assert query == f"This is the query image. {QUESTIONS[number % 4]}"


def test_grounding_is_a_second_table(random_folder, tmp_path, monkeypatch, capsys):
    """The whole command with an untrained model: figures where there are enough concepts, none
    where there are not."""
    shrink_world(monkeypatch, concepts=2)
    monkeypatch.setattr(naming, "SCENES", 2)
    monkeypatch.setattr(evaluate, "examine", no_figures)
    out = tmp_path / "t.json"
    command = ["--model", str(random_folder), "--grounding", "--max-tokens", "6"]
    evaluate.main([*command, "--out", str(out)])
    row = read_table(out)["base"]
    assert row["seen"]["names_1_right_f1"] == 0
    assert row["unseen"]["names_2_wrong_f1"] == 0
    assert row["seen"]["names_4_right_f1"] is None  # there are two held-out concepts
    assert capsys.readouterr().out.count("| 1 name, right |") == 2


# ------------------------------------------------------------------- photos of several concepts
def test_pictures_of_two_concepts_in_folders(tmp_path):
    folder = "query-image-2-concepts/Bull_dog_and_Baby_Q"
    make_photos(tmp_path, [f"{folder}/Bull_dog_and_Baby_Q_{i}.jpg" for i in (10, 9)])
    queries = naming.load_queries(tmp_path / "query-image-2-concepts")
    assert [query.photo.name.split("_")[-1] for query in queries] == ["9.jpg", "10.jpg"]
    assert all(query.names == ["Bull_dog", "Baby_Q"] for query in queries)
    assert queries[0].photo.load().size == (12, 8)


def test_pictures_of_several_concepts_in_repics_json(tmp_path):
    """Its paths begin at another folder than the file's."""
    bulls = ["data/myvlm_data/bull/bull_1.jpg", "data/myvlm_data/bull/bull_2.jpg"]
    make_photos(tmp_path, [*bulls, "data/group photo_1.jpg"])
    [concept] = load_concepts(tmp_path / "data/myvlm_data")
    assert [photo.name for photo in concept.photos] == ["bull/bull_1.jpg", "bull/bull_2.jpg"]

    (tmp_path / "data/query_tot").mkdir()
    file = tmp_path / "data/query_tot/myvlm_query_templates.json"
    content = {
        "./data/myvlm_data/bull/bull_1.jpg": ["<bull>"],
        "data/group photo_1.jpg": [["a", "b c"], ["<d>", "e"]],
    }
    file.write_text(json.dumps(content))
    queries = naming.load_queries(file)
    assert [query.names for query in queries] == [["bull"], ["a", "b c"], ["d", "e"]]
    assert queries[2].photo.load().size == (12, 8)

    file.write_text('{"gone.jpg": ["a"]}')
    with pytest.raises(DataError, match="gone.jpg, which is not there"):
        naming.load_queries(file)


# ------------------------------------------------------------------------------------ the command
INFO = {"<Bingo>": "<Bingo> is an orange toy.", "<Bluey>": 'A "blue" toy.', "<Bond>": ""}


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def make_database(root, items):
    """A database in RePIC's layout.   items {marker: {"info": ..., "name": ...}} -> its folder"""
    folder = "data/database_tot/database_some"
    content = {"concept_dict": {}, "path_to_concept": {}}
    for marker, item in items.items():
        image = f"./{folder}/{marker.strip('<>')}.jpg"
        make_photos(root, [image])
        rest = {"name": marker.strip("<>"), "image": image, "category": "toy"}
        content["concept_dict"][marker] = rest | item
        content["path_to_concept"][image] = marker
    write_json(root / folder / "database_mod.json", content)
    write_json(root / folder / "database.json", {"concept_dict": {"<gone>": {"image": "no.jpg"}}})
    return root / folder


@pytest.fixture
def pairs(tmp_path):
    """Two things in a picture, four in the database.   -> the command's options"""
    items = {marker: {"info": info} for marker, info in INFO.items()}
    database = make_database(tmp_path, items | {"<Bull_dog>": {"info": "A dog."}})
    folder = "data/query-image-2-concepts/Bluey_and_Bingo/Bluey_and_Bingo"
    make_photos(tmp_path, [f"{folder}_{number}.jpg" for number in (1, 2, 10)])
    queries = tmp_path / "data/query-image-2-concepts"
    options = ["--protocol", "two", "--queries", str(queries), "--database", str(database)]
    return [*options, "--max-tokens", "3", "--max-pixels", "3136", "--embedder", ""]


def run_command(monkeypatch, options, model):
    """naming.py with a parrot in the model's place, so that captions are known.   -> [Prompt]"""
    parrot = Parrot()

    def greedy(mllm, *given):
        return parrot.greedy(*given)

    monkeypatch.setattr(MLLM, "greedy", greedy)
    naming.main(["--model", str(model), *options])
    return parrot.prompts


def test_the_command_from_end_to_end(byte_folder, pairs, tmp_path, monkeypatch, capsys):
    """With an untrained model: of each kind of references its captions are kept."""
    out = tmp_path / "names.json"
    naming.main(["--model", str(byte_folder), *pairs, "--out", str(out)])
    result = json.loads(out.read_text())
    assert (result["protocol"], result["k"], result["queries"]) == ("two", 2, 3)
    [row] = result["rows"].values()
    assert list(row) == ["right", "retrieved", "wrong"]
    for figures in row.values():
        captions = figures["captions"]
        pictures = [caption["picture"].split("_")[-1] for caption in captions]
        assert pictures == ["1.jpg", "2.jpg", "10.jpg"]
        lengths = [len(caption["caption"]) for caption in captions]
        assert figures["characters"] == pytest.approx(sum(lengths) / 3)
        assert figures["recall"] == figures["f1"] == 0

    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3
    assert lines[2].startswith("| base | right | 0.0% |")


def test_right_references_come_in_the_order_of_the_database(byte_folder, pairs, monkeypatch):
    """The pictures call their things Bluey and Bingo, the database has Bingo first. It is asked in
    RePIC's layout, and what is known of a thing cannot break out of it."""
    prompts = run_command(monkeypatch, pairs, byte_folder)
    first = prompts[0]
    introduction, *parts = first.text.split(PICTURE)
    assert "caption" in introduction and introduction.endswith("\n")
    assert parts == [
        '1. Name: <Bingo>, Info: "Bingo is an orange toy."\n',
        "2. Name: <Bluey>, Info: \"A 'blue' toy.\"\n",
        f"This is the query image. {QUESTIONS[0]} Output the final answer including its name.",
    ]
    names = [photo.name.split("/")[-1] for photo in first.photos]
    assert names == ["Bingo.jpg", "Bluey.jpg", "Bluey_and_Bingo_1.jpg"]
    for number, prompt in enumerate(prompts[:3]):
        assert f"{QUESTIONS[number]} Output" in prompt.text


def test_wrong_references_are_not_in_the_picture(byte_folder, pairs, tmp_path, monkeypatch):
    """A parrot falls for both of them. Of one nothing is known."""
    out = tmp_path / "names.json"
    prompts = run_command(monkeypatch, [*pairs, "--out", str(out)], byte_folder)
    wrong = json.loads(out.read_text())["rows"]["base"]["wrong"]
    assert wrong["recall"] == wrong["precision"] == 1
    for caption, prompt in zip(wrong["captions"], prompts[6:], strict=True):
        assert caption["references"] == caption["names"] == ["Bond", "Bull_dog"]
        assert caption["prompt"] == prompt.text
        assert caption["caption"] == "<Bond> <Bull_dog>"
        words = f"{PICTURE}1. Name: <Bond>\n{PICTURE}2. Name: <Bull_dog>, Info"
        assert words in prompt.text


def test_an_adapter_is_on_and_not_asked_for_the_name(byte_folder, pairs, tmp_path, monkeypatch):
    mllm = MLLM(str(byte_folder), 3136)
    add_lora(mllm.model, 2, 4)
    save_adapter(mllm.model, tmp_path / "adapter")
    is_on = []
    asked = []
    written = []
    out = tmp_path / "names.json"

    def greedy(mllm, prompts, max_tokens, progress):
        is_on.append(bool(lora_layers(mllm.model)))
        asked.append(all("including its name" in prompt.text for prompt in prompts))
        written.append(list(json.loads(out.read_text())["rows"]) if out.exists() else [])
        return ["<Bluey>"] * len(prompts)

    monkeypatch.setattr(MLLM, "greedy", greedy)
    adapter = str(tmp_path / "adapter")
    naming.main(["--model", str(byte_folder), *pairs, "--adapter", adapter, "--out", str(out)])
    assert is_on == [False] * 3 + [True] * 3
    assert asked == [True] * 3 + [False] * 3
    assert written == [[]] * 3 + [["base"]] * 3  # a row as soon as it is done
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == ["base", adapter]
    right = rows[adapter]["right"]
    assert (right["precision"], right["recall"], right["characters"]) == (1, 0.5, 7)

    # The same command goes on, which asks nothing; and it has noticed what there is first of all.
    asked.clear()
    command = ["--model", str(byte_folder), *pairs, "--adapter", adapter, "--out", str(out)]
    naming.main(command)
    assert not asked
    assert json.loads(out.read_text())["rows"] == rows
    [picture] = tmp_path.rglob("Bluey_and_Bingo_10.jpg")
    picture.write_bytes((picture.parent / "Bluey_and_Bingo_1.jpg").read_bytes())
    with pytest.raises(DataError, match="was measured with other photos"):
        naming.main(command)
    with pytest.raises(DataError, match="other settings .*--seed was 0, not 1"):
        naming.main(["--model", "nowhere", *pairs, "--seed", "1", "--out", str(out)])


def test_four_things_are_called_as_the_database_shows_them(byte_folder, tmp_path, monkeypatch):
    """The name that counts is another one, so the rule finds one of four names, brackets all."""
    shown = {
        "<thor>": "Thor",
        "<ironman>": "Iron Man",
        "<black widow>": "Black Widow",
        "<mr.krab>": "Mr.Krabs",
    }
    others = {f"<{name}>": name for name in ("hulk", "sandy", "gary", "pearl", "kim", "moon")}
    items = {marker: {"info": "", "name": name} for marker, name in (shown | others).items()}
    database = make_database(tmp_path, items)
    make_photos(tmp_path / "data", ["query-image-4-concepts/group photo_a.jpg"])
    names = list(shown)[::-1]  # not in the order of the database
    queries = tmp_path / "data/query_tot/4_concept_query_templates.json"
    picture = "./data/query-image-4-concepts/group photo_a.jpg"
    write_json(queries, {picture: [names, [*names[1:], "<hulk>"]]})

    out = tmp_path / "names.json"
    options = ["--protocol", "four", "--queries", str(queries), "--database", str(database)]
    asked = []

    def greedy(mllm, prompts, max_tokens, progress):
        asked.append(prompts)
        return ["**<Iron Man>**, <mr.krabs>, <Black Widow> and <Thor>.", "<Pearl>"]

    monkeypatch.setattr(MLLM, "greedy", greedy)
    options += ["--max-pixels", "3136", "--embedder", "", "--out", str(out)]
    naming.main(["--model", str(byte_folder), *options])
    result = json.loads(out.read_text())
    row = result["rows"]["base"]
    assert re.findall("Name: (.*)\n", asked[0][0].text) == [f"<{name}>" for name in shown.values()]
    assert row["right"]["recall"] == 1 / 8
    assert row["right"]["recall_in_brackets"] == 4 / 8

    # Four are retrieved. Each query names some of the five things in the picture, so the other five
    # are wrong references of both.
    assert result["k"] == 4
    for caption in row["retrieved"]["captions"]:
        assert len(set(caption["references"])) == 4
    for caption in row["wrong"]["captions"]:
        assert len(caption["references"]) == 4
        assert set(caption["references"]) <= {"sandy", "gary", "pearl", "kim", "moon"}


class Colours:
    """An embedder that compares pictures by the place of their name in a list."""

    def __init__(self, order):
        self.order = order

    def embed(self, photos):
        vectors = {}
        for photo in photos:
            angle = torch.tensor(self.order.index(photo.name) * 0.3)
            vectors[photo.name] = torch.stack([angle.cos(), angle.sin()])
        return vectors


def test_what_is_retrieved_looks_most_like_the_picture():
    """Best first, and the ceiling counts what is found."""
    order = ["c", "query 1", "a", "b", "d", "query 2"]
    photos = {name: Photo(name, load=None) for name in order}
    references = [Reference(name, "toy", [photos[name]], "", shown=name) for name in "abcd"]
    queries = [naming.Query(photos["query 1"], ["a"]), naming.Query(photos["query 2"], ["c"])]
    scenes = naming.scenes_of(Colours(order), queries, references, k=2, seed=0)
    found = []
    for scene in scenes:
        found.append([reference.name for reference in scene.references["retrieved"]])
    assert sorted(found[0]) == ["a", "c"]  # both are as near
    assert found[1] == ["d", "b"]

    class Silent:
        def greedy(self, prompts, max_tokens, progress):
            return [""] * len(prompts)

        def quote(self, text):
            return f'"{text}"'

    for how, ceiling in (("right", 1), ("retrieved", 1 / 2), ("wrong", 1)):
        figures, _ = naming.measure(Silent(), scenes, how, False, False, 3)
        assert figures["ceiling"] == ceiling


def test_protocols_are_those_of_the_papers_tables():
    counts = {name: (each.concepts, each.k) for name, each in PROTOCOLS.items()}
    assert counts == {
        "myvlm": (1, 2),
        "yollava": (1, 2),
        "dreambooth": (1, 2),
        "two": (2, 2),
        "four": (4, 4),
    }
    assert [name for name, each in PROTOCOLS.items() if each.case_sensitive] == ["two"]


def change(options, **given):
    """The options with other values."""
    changed = list(options)
    for name, value in given.items():
        changed[changed.index(f"--{name}") + 1] = str(value)
    return changed


def test_what_does_not_belong_together_is_refused(pairs, tmp_path):
    """In one line, before a model is loaded."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "run/adapter").mkdir(parents=True)
    (tmp_path / "run/adapter/adapter_config.json").write_text("{}")
    other = make_database(tmp_path / "other", {"<Bluey>": {"info": ""}})
    for options, message in (
        (pairs[2:], "give --protocol"),
        (change(pairs, protocol="four"), "--protocol four is for pictures of 4, but .* 2 names"),
        (change(pairs, queries=tmp_path / "empty"), "empty has no pictures"),
        (change(pairs, database=other), "does not have Bingo, which is in .*_1.jpg"),
        (change(pairs, database=tmp_path / "empty"), "cannot read .*database_mod.json"),
        ([*pairs, "--k", "5"], "--k 5 is more than the 4 things in"),
        ([*pairs, "--adapter", "runs/none"], "runs/none is not a folder; wanted: the adapter of"),
        ([*pairs, "--adapter", str(tmp_path / "run")], "give its adapter, .*run/adapter"),
        ([*pairs, "--adapter", "x", "--adapter", "./x"], "--adapter ./x is given twice"),
        ([*pairs, "--out", str(tmp_path)], "cannot write"),
    ):
        with pytest.raises(DataError, match=message):
            naming.main(["--model", "none", *options])


def test_a_model_that_does_not_know_the_words_is_refused_before_a_picture_is_read(
    pairs, monkeypatch
):
    monkeypatch.setattr(naming, "table", None)
    with pytest.raises(DataError, match="this model does not know every word of .*captions"):
        naming.main(["--model", str(toy.FOLDER), *pairs])


def test_a_picture_of_everything_has_no_wrong_references(byte_folder, pairs, tmp_path):
    items = {marker: {"info": ""} for marker in ("<Bluey>", "<Bingo>")}
    database = make_database(tmp_path / "small", items)
    with pytest.raises(DataError, match="shows everything in the database"):
        naming.main(["--model", str(byte_folder), *change(pairs, database=database)])
