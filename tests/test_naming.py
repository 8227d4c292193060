"""RePIC's measure: names in captions."""

import json
import re

import pytest

import evaluate
import naming
from data import DataError, load_concepts
from evaluate import Part
from protocols import PhotoSplit
from repic import PROMPTS
from test_data import make_photos
from test_evaluate import options_of, read_table, shrink_world, small_world


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


# ------------------------------------------------------------------------------ names in captions
class Parrot:
    """A caption writer that says every name it is given, and remembers what it was asked."""

    def __init__(self):
        self.prompts = []

    def greedy(self, prompts, max_tokens, progress):
        self.prompts += prompts
        return [" ".join(re.findall(r"<[\w-]+>", prompt.text)) for prompt in prompts]


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
        figures = naming.grounding(toy_mllm, toy_mllm, part, splits, options_of())
    return figures, concepts, parrot.prompts


def test_a_parrot_is_perfect_with_right_references_and_falls_for_wrong_ones(parroted):
    figures, _, _ = parroted
    for count in (1, 2, 4):
        assert figures[f"names_{count}_right_f1"] == 1
        assert figures[f"names_{count}_wrong_f1"] == 1
        assert 0 < figures[f"names_{count}_retrieved_f1"] <= 1


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


def test_grounding_asks_in_every_wording(parroted):
    _, _, prompts = parroted
    asked = {prompt.text.split(".\n")[1] for prompt in prompts}
    assert asked == {template.split(".\n")[1] for template in PROMPTS["ict"]}


def no_figures(*arguments):
    """Stands for `examine` where only --grounding is of interest."""
    counts = dict.fromkeys(("photos", "concepts", "database", "pairs", "questions"), 0)
    return dict.fromkeys(evaluate.COLUMNS, 0.0) | {"counts": counts}


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
