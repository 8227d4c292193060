"""Folders of photos, broken ones too, become the games that the method asks for."""
import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

import data


def make(root, layout):
    """Pictures of one colour each, all different: copies of a picture would be left out."""
    for name in layout:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 8), tuple(hashlib.md5(name.encode()).digest()[:3])).save(path)
    return root


def shape(concepts):
    return {(concept.category, concept.name): [photo.name for photo in concept.photos] for concept in concepts}


@pytest.mark.parametrize("layout, expected", [
    (["mug/10.jpg", "mug/9.jpg", "dog/1.png", "dog/2.JPG"], {("object", "dog"): ["dog/1.png", "dog/2.JPG"], ("object", "mug"): ["mug/9.jpg", "mug/10.jpg"]}),
    (["pets/rex/1.jpg", "pets/rex/2.jpg", "pets/laion/9.jpg"], {("pets", "rex"): ["pets/rex/1.jpg", "pets/rex/2.jpg"]}),
    (["train/rex/1.jpg", "test/rex/1.jpg"], {("object", "rex"): ["test/rex/1.jpg", "train/rex/1.jpg"]}),
    (["train_/pets/rex/1.jpg", "test_/pets/rex/1.jpg"], {("pets", "rex"): ["test_/pets/rex/1.jpg", "train_/pets/rex/1.jpg"]}),
    (["train/all/rex/1.jpg", "train/all/rex/2.jpg", "train/all/rex/.x.jpg"], {("object", "rex"): ["train/all/rex/1.jpg", "train/all/rex/2.jpg"]}),
    (["yollava-data/train/bo/0.png", "yollava-data/test/bo/0.png"], {("object", "bo"): ["yollava-data/test/bo/0.png", "yollava-data/train/bo/0.png"]}),
    (["train/bag/abc/1.jpg", "test/bag/abc/1.jpg", "train/bag/abc/laion/3.jpg", "train/bag/laion/4.jpg", "negative_example/5.png"],
     {("bag", "abc"): ["test/bag/abc/1.jpg", "train/bag/abc/1.jpg"]}),
    (["a/x/1.jpg", "a/x/2.jpg", "b/x/1.jpg", "b/x/2.jpg"], {("a", "a/x"): ["a/x/1.jpg", "a/x/2.jpg"], ("b", "b/x"): ["b/x/1.jpg", "b/x/2.jpg"]}),
])
def test_layouts(tmp_path, layout, expected):
    assert shape(data.load_concepts(make(tmp_path, layout))) == expected


@pytest.mark.parametrize("inner", ["", "dataset/"])
def test_dreambooth_layout(tmp_path, inner):
    make(tmp_path, [f"{inner}{name}/0{i}.jpg" for name in ("dog", "dog2") for i in (0, 1)])
    (tmp_path / inner / "prompts_and_classes.txt").write_text("Classes\n\nsubject_name,class\ndog,dog\ndog2,dog\n\nPrompts\n\n'a, b'\n")
    assert [(c.category, c.name) for c in data.load_concepts(tmp_path)] == [("dog", "dog"), ("dog", "dog2")]


def test_broken_photos_and_lonely_concepts_are_counted(tmp_path):
    make(tmp_path, ["mug/1.jpg", "mug/2.jpg", "mug/3.jpg", "one/1.jpg", "cut/1.jpg", "cut/2.jpg"])
    (tmp_path / "mug/3.jpg").write_bytes(b"")
    (tmp_path / "cut/2.jpg").write_bytes((tmp_path / "cut/1.jpg").read_bytes()[:300])
    said = []
    assert shape(data.load_concepts(tmp_path, said.append)) == {("object", "mug"): ["mug/1.jpg", "mug/2.jpg"]}
    assert said[0].startswith("skipped photos that cannot be read: 2, such as") and said[1].startswith("skipped concepts with one photo only: 2, such as")


def test_copies_of_a_photo_are_left_out_and_counted(tmp_path):
    """Two names for one picture of a thing are one view of it; in a benchmark's train and test parts, or of two things, they stay."""
    make(tmp_path, ["mug/1.jpg", "mug/2.jpg", "dog/1.jpg", "dog/2.jpg"])
    (tmp_path / "mug/IMG 1 (copy).jpg").write_bytes((tmp_path / "mug/1.jpg").read_bytes())
    (tmp_path / "dog/3.jpg").write_bytes((tmp_path / "mug/1.jpg").read_bytes())
    said = []
    assert [len(concept.photos) for concept in data.load_concepts(tmp_path, said.append)] == [3, 2]
    assert said == ["skipped copies of another photo of the same thing: 1, such as mug/IMG 1 (copy).jpg"]


def test_a_decompression_bomb_is_a_broken_photo(tmp_path, monkeypatch):
    make(tmp_path, ["mug/1.jpg", "mug/2.jpg", "mug/3.jpg"])
    Image.new("L", (64, 64)).save(tmp_path / "mug/4.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    said = []
    assert len(data.load_concepts(tmp_path, said.append)[0].photos) == 3 and "mug/4.png" in said[0]


@pytest.mark.parametrize("prepare, message", [
    (lambda root: None, "has no concept with two readable photos"),
    (lambda root: root.rmdir(), "is not a folder"),
    (lambda root: make(root, ["1.jpg"]), "lies beside the concept folders"),
    (lambda root: make(root, ["a/b/c/1.jpg"]), "too deep below"),
    (lambda root: make(root, ["a/1.jpg"]) / "a" / "1.jpg", "no concept"),
    (lambda root: (make(root, ["a/1.jpg"]) / "a" / "1.jpg").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
])
def test_unusable_folders_say_what_to_do(tmp_path, prepare, message):
    prepare(tmp_path)
    with pytest.raises(data.DataError, match=message):
        data.load_concepts(tmp_path)


def test_pictures_of_every_kind_become_upright_rgb(tmp_path):
    def reads(image, name, **how):
        image.save(tmp_path / name, **how)
        got = data.read_photo(tmp_path / name)
        assert got.mode == "RGB"
        return got

    portrait = Image.new("RGB", (8, 4))
    exif = portrait.getexif()
    exif[0x0112] = 6  # taken with the phone turned
    assert reads(portrait, "turned.jpg", exif=exif).size == (4, 8)
    assert reads(Image.new("RGBA", (2, 2), (0, 0, 0, 0)), "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert reads(Image.new("LA", (2, 2), (0, 0)), "clear grey.png").getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert reads(palette, "palette.png").getpixel((0, 0)) == (255, 0, 0)
    assert reads(palette, "clear palette.png", transparency=1).getpixel((0, 0)) == (255, 255, 255)
    assert reads(Image.new("CMYK", (2, 2), (0, 0, 0, 0)), "print.jpg").getpixel((0, 0)) == (255, 255, 255)
    assert abs(reads(Image.new("I;16", (2, 2), 128 * 256), "deep.png").getpixel((0, 0))[0] - 128) <= 1


# ------------------------------------------------------------------------------------------------------------------ games
def line_world(spec):
    """Concepts whose photos lie at given angles (degrees) on a circle: similarity is the cosine of the difference."""
    concepts = [data.Concept(name, category, [data.Photo(f"{name}/{i}", None) for i in range(len(angles))]) for name, category, angles in spec]
    angles = {photo.name: angle for (_, _, all_), concept in zip(spec, concepts) for angle, photo in zip(all_, concept.photos)}
    return concepts, {name: torch.tensor([torch.tensor(a / 57.29578).cos(), torch.tensor(a / 57.29578).sin()]) for name, a in angles.items()}


SPEC = [("a", "mug", [0, 10, 60]), ("b", "mug", [20, 80]), ("c", "mug", [5, 170]), ("d", "mug", [90, 100]), ("e", "dog", [1, 2])]


def test_hard_games_are_what_the_method_says():
    concepts, embeddings = line_world(SPEC)
    game = next(g for g in data.mine_games(concepts, embeddings, 3, 0) if g.target.name == "a/0")
    names = [photo.name for photo in game.pool]
    assert names[game.answer] == "a/2"  # the least similar other view
    assert set(names) - {"a/2"} == {"c/0", "b/0"}  # the two most similar photos of other mugs; the dog at 1 degree is closer, but no mug
    easy = next(g for g in data.mine_games(concepts, embeddings, 3, 0, positive="easy") if g.target.name == "a/0")
    assert easy.pool[easy.answer].name == "a/1"
    loose = data.mine_games(concepts, embeddings, 3, 0, negatives="random")
    assert any("e" in photo.name for g in loose if g.category == "mug" for photo in g.pool)
    assert all(len({photo.name.split("/")[0] for photo in g.pool}) == 3 for g in loose)


def test_small_categories_borrow_negatives_and_say_so():
    concepts, embeddings = line_world(SPEC)
    said = []
    games = data.mine_games(concepts, embeddings, 3, 0, log=said.append)
    assert all(len(game.pool) == 3 and game.pool[game.answer].name.split("/")[0] == game.concept for game in games)
    assert said == ["2 of 11 games take negatives from other categories: theirs has fewer than 2 other concepts"]
    with pytest.raises(data.DataError, match="K=6 pictures needs 6 concepts"):
        data.mine_games(concepts, embeddings, 6, 0)


def test_same_seed_same_games():
    concepts, embeddings = line_world(SPEC)
    games = data.mine_games(concepts, embeddings, 3, 7)
    assert games == data.mine_games(concepts, embeddings, 3, 7)
    places = [game.answer for seed in range(30) for game in data.mine_games(concepts, embeddings, 3, seed)]
    assert all(places.count(i) > len(places) / 5 for i in range(3))  # the right answer is everywhere in the pool
    assert [g.target.name for g in games[:3]] == ["a/0", "a/1", "a/2"] and [g.answer for g in games[:6]] == [0, 2, 1, 1, 1, 1]  # on every machine


def painted(name, category, views=3):
    """A concept whose photos are squares of one colour, so that they can be found in a scene again."""
    hue = sum(map(ord, name)) * 37
    picture = lambda i: Image.new("RGB", (40 + i, 32), (hue % 255, 40 * i, hue // 255 % 255))
    return data.Concept(name, category, [data.Photo(f"{name}/{i}", lambda i=i: picture(i)) for i in range(views)])


def test_scenes_show_each_photo_in_its_box():
    photos = [painted(name, "mug").photos[1] for name in "abcd"]
    for many in (1, 2, 3, 4):
        scene, boxes = data.collage(photos[:many], 64, 5)
        picture = scene.open()
        assert picture.size == (144, 144) and len(set(boxes)) == many and scene == data.collage(photos[:many], 64, 5)[0]
        for photo, (x1, y1, x2, y2) in zip(photos, boxes):
            assert (x2 - x1, y2 - y1) == (64, 64) and 0 <= x1 and x2 <= 144 and 0 <= y1 and y2 <= 144
            assert picture.crop((x1, y1, x2, y2)).getcolors() == [(64 * 64, photo.open().getpixel((0, 0)))]
        assert picture.getcolors()[0][0] >= 0 and sum(n for n, colour in picture.getcolors() if colour == (128, 128, 128)) == 144 ** 2 - many * 64 ** 2
    assert data.collage(photos, 64, 5)[0].name != data.collage(photos, 64, 6)[0].name  # the name says what is where


PROMPTS = {"oct": [("O(", ")"), ("o(", ")")], "vlt": [("V(", ")")], "ict": [("I(", ")")]}


def test_tasks_are_what_repic_asks():
    concepts = [painted(f"{category} {i}", category) for category in ("mug", "dog") for i in range(3)]
    make = lambda shares, count=200: data.make_tasks(concepts, shares, count, PROMPTS, lambda c: c.category, 64, 3)
    owner = {photo.name: concept for concept in concepts for photo in concept.photos}
    tasks = make({"oct": 1})
    same = [owner[a.name] is owner[b.name] for a, b in (task.photos for task in tasks)]
    assert [task.solution for task in tasks] == ["yes" if s else "no" for s in same] and 80 < sum(same) < 120
    kin = [owner[a.name].category == owner[b.name].category for (a, b), s in zip((task.photos for task in tasks), same) if not s]
    assert 0.5 < sum(kin) / len(kin) < 0.9 and all(task.photos[0] != task.photos[1] for task in tasks)
    assert {task.text[:2] for task in tasks} == {"O(", "o("} and all(task.text[2:-1] == data.tag(owner[task.photos[0].name].name) for task in tasks)
    for task in make({"vlt": 1}, 60):
        box, size = task.solution
        assert size == task.photos[0].open().size and len(task.photos) == 1
        target, = [photo for _, photo in task.things if task.text == f"V({owner[photo.name].category})"]  # what is looked for is there once
        assert task.photos[0].open().crop(box).getpixel((5, 5)) == target.open().getpixel((0, 0))
    for kind, sizes in (("single_ict", {1}), ("multi_ict", {2, 3})):
        tasks = make({kind: 1}, 60)
        assert {len(task.solution) for task in tasks} == sizes
        for task in tasks:
            *references, scene = task.photos
            assert [data.tag(owner[photo.name].name) for photo in references] == task.solution and task.text == f"I({', '.join(task.solution)})"
            assert {name for name, _ in task.things} == set(task.solution) and not {photo for _, photo in task.things} & set(references)
            assert all(data.tag(owner[photo.name].name) == name for name, photo in task.things)


def test_tasks_come_in_their_shares_and_are_seeded():
    concepts = [painted(f"mug {i}", "mug") for i in range(4)]
    make = lambda seed, shares=data.KINDS: data.make_tasks(concepts, shares, 1000, PROMPTS, lambda c: c.name, 64, seed)
    kinds = [task.kind for task in make(0)]
    assert all(abs(kinds.count(kind) - 10 * share) < 45 for kind, share in data.KINDS.items()) and sum(data.KINDS.values()) == 100
    assert make(0) == make(0) != make(1) and not {"oct", "multi_ict"} & {task.kind for task in make(0, data.KINDS | {"oct": 0, "multi_ict": 0})}
    with pytest.raises(data.DataError, match="two concepts"):
        data.make_tasks(concepts[:1], data.KINDS, 1, PROMPTS, lambda c: c.name, 64, 0)


def test_splits_are_by_concept_and_seeded():
    concepts = [data.Concept(f"{category}{i}", category, []) for category in "abcdef" for i in range(5)]
    train, test, unseen = data.split_concepts(concepts, 0)
    names = [{concept.name for concept in part} for part in (train, test, unseen)]
    assert sum(map(len, names)) == 30 and not names[0] & names[1] and len(test) == 5 and len({c.category for c in test}) == 5
    assert len({c.category for c in unseen}) == 1 and not {c.category for c in unseen} & {c.category for c in train + test}
    assert data.split_concepts(concepts, 0) == (train, test, unseen) != data.split_concepts(concepts, 1)
    assert data.split_concepts(concepts[:10], 0)[2] == []  # of two categories none can be spared
    assert {c.category for c in data.split_concepts(concepts, 0, ["a", "b"])[2]} == {"a", "b"}


def test_every_pass_shuffles_and_every_step_is_known():
    games = list(range(10))
    first, second = ([game for step in steps for game in data.games_of_step(games, step, 4, 3)] for steps in (range(5), range(5)))
    assert first == second and sorted(first[:10]) == sorted(first[10:20]) == games and first[:10] != first[10:20]


# ------------------------------------------------------------------------------------------------------- for evaluation
def test_photos_know_their_part(tmp_path):
    concept, = data.load_concepts(make(tmp_path, ["train_/pets/rex/1.jpg", "test_/pets/rex/1.jpg"]))
    assert [(photo.name.split("/")[0], photo.part) for photo in concept.photos] == [("test_", "test"), ("train_", "train")]


def test_objects_with_state_change(tmp_path):
    make(tmp_path, [f"{number}/{i}.jpg" for number in (0, 1, 10) for i in (1, 2)])
    np.save(tmp_path / "categories.npy", np.array(["bag", "cup"] + [""] * 8 + ["toy"]))
    assert [(c.name, c.category) for c in data.load_concepts(tmp_path)] == [("0", "bag"), ("1", "cup"), ("10", "toy")]
    np.save(tmp_path / "categories.npy", np.array([{"0": "bag"}], dtype=object), allow_pickle=True)
    said = []
    assert {c.category for c in data.load_concepts(tmp_path, said.append)} == {"object"} and "could run code" in said[0]


def test_myvlm_and_its_captions(tmp_path):
    """captions.json lies among the photos; 4 references, 5 seeds, the rest are tests."""
    make(tmp_path, [f"{name}/IMG_{i}.jpg" for name in ("my_cat", "bull") for i in range(9)])
    (tmp_path / "bull/captions.json").write_text("{}")
    concepts = data.load_concepts(tmp_path)
    splits = [data.split_photos(concepts[0], 4, seed) for seed in range(5)]
    assert all(len(a) == 4 and len(b) == 5 and {*a, *b} == {*concepts[0].photos} for a, b in splits)
    assert len({tuple(photo.name for photo in a) for a, _ in splits}) == 5
    assert splits[2] == data.split_photos(concepts[0], 4, 2)


@pytest.mark.parametrize("layout, references, expected", [
    ([f"rex/{i}.jpg" for i in range(4)], 5, (3, 1)),  # DreamBooth has concepts of 4: one photo is left for the test
    (["rex/1.jpg", "rex/2.jpg"], 1, (1, 1)),
    ([f"train/rex/{i}.jpg" for i in range(8)] + [f"test/rex/{i}.jpg" for i in range(3)], 5, (5, 3)),  # PerVA
    ([f"train/rex/{i}.jpg" for i in range(2)] + [f"test/rex/{i}.jpg" for i in range(3)], 5, (2, 3)),  # three of its concepts have fewer
    ([f"test/rex/{i}.jpg" for i in range(3)], 1, (1, 2)),  # RePIC's copies have tests only
])
def test_references_and_tests(tmp_path, layout, references, expected):
    concept, = data.load_concepts(make(tmp_path, layout))
    a, b = data.split_photos(concept, references, 0)
    assert (len(a), len(b)) == expected and not {*a} & {*b}
    assert "train/rex/0.jpg" not in layout or {photo.part for photo in a} == {"train"} and {photo.part for photo in b} == {"test"}


def test_things_of_one_photo_and_loose_photos_when_one_is_enough(tmp_path):
    make(tmp_path, ["blue mug.jpg", "rex/1.jpg", "rex/2.jpg", "bo/1.png"])
    assert shape(data.load_concepts(tmp_path, least=1)) == {
        ("object", "blue mug"): ["blue mug.jpg"], ("object", "bo"): ["bo/1.png"], ("object", "rex"): ["rex/1.jpg", "rex/2.jpg"]}


def test_a_phones_own_formats_are_not_silently_ignored(tmp_path):
    make(tmp_path, ["mug/1.jpg", "mug/2.jpg"])
    (tmp_path / "mug/3.HEIC").write_bytes(b"x")
    said = []
    data.load_concepts(tmp_path, said.append)
    assert said == ["skipped files of a kind that is not read here (save them as JPEG or PNG): 1, such as mug/3.HEIC"]


def test_a_hub_dataset_is_fetched(tmp_path, monkeypatch):
    make(tmp_path / "local", ["dataset/dog/00.jpg", "dataset/dog/01.jpg"])
    asked = []
    monkeypatch.setattr(data, "snapshot_download", lambda name, repo_type: (asked.append((name, repo_type)), str(tmp_path / "local"))[1])
    assert shape(data.load_concepts("google/dreambooth")) == {("object", "dog"): ["dataset/dog/00.jpg", "dataset/dog/01.jpg"]}
    assert asked == [("google/dreambooth", "dataset")]

    def offline(name, repo_type):
        raise OSError("no connection\nlong story")

    monkeypatch.setattr(data, "snapshot_download", offline)
    with pytest.raises(data.DataError, match="google/dreambooth is not a folder here.*no connection$"):
        data.load_concepts("google/dreambooth")


ITEM = {"question": "What is <sks> doing?", "options": {"A": "Sitting", "B": "Running"}, "correct_answer": "B"}
RAP_ITEM = {"question": "Is sks asks a {real} cat?", "option": {"A": "Yes", "B": "No"}, "correct_answer": "A"}


@pytest.mark.parametrize("content", [
    {"bo": {"./yollava-data/test/bo/1.png": ITEM}, "mam": {"./yollava-data/test/mam/1.png": RAP_ITEM, "./yollava-data/test/mam/9.png": ITEM}},
    {"./yollava-data/test/bo/1.png": ITEM, "./yollava-data/test/mam/1.png": RAP_ITEM, "./yollava-data/test/mam/9.png": ITEM},
    [ITEM | {"image": "data/test/bo/1.png"}, RAP_ITEM | {"image": "x/mam/1.png"}, ITEM | {"image": "x/mam/9.png"}]])
@pytest.mark.parametrize("place", ["", "yollava-data/", "../"])
def test_yollava_questions(tmp_path, content, place):
    root = make(tmp_path / "r", [f"yollava-data/{part}/{name}/1.png" for part in ("train", "test") for name in ("bo", "mam")])
    (root / place / "yollava-visual-qa.json").write_text(json.dumps(content))
    said = []
    bo, mam = data.load_questions(root, data.load_concepts(root), said.append)
    assert (bo.concept, bo.photo.part, bo.text, bo.options, bo.answer) == ("bo", "test", "What is {} doing?", ITEM["options"], "B")
    assert mam.text.format("<mam>") == "Is <mam> asks a (real) cat?" and mam.options == {"A": "Yes", "B": "No"}
    assert said == [f"left out 1 of 3 questions: their pictures are not in {root}"]


def test_no_questions(tmp_path):
    assert data.load_questions(tmp_path, []) == [] and data.load_pairs(tmp_path, []) == {}
    (tmp_path / "yollava-visual-qa.json").write_text("{")
    with pytest.raises(data.DataError, match="cannot read"):
        data.load_questions(tmp_path, [])


def test_rap_recognition_is_filtered_by_the_correct_answer(tmp_path):
    root = make(tmp_path, [f"{part}/{name}/4.png" for part in ("train", "test") for name in ("bo", "mam")])
    row = dict(image="benchmark_data/yollava-data/test/bo/4.png", concept="bo", type="positive", correct_answer=True)
    rows = [row, row | {"type": "negative"}, row | {"concept": "mam", "type": "negative", "correct_answer": False}, row | {"image": "x/test/no/1.png"}]
    (root / "recognition_test.json").write_text(json.dumps(rows))
    pairs = data.load_pairs(root, data.load_concepts(root))
    assert {(photo.name, name): label for (photo, name), label in pairs.items()} == {("test/bo/4.png", "bo"): True, ("test/bo/4.png", "mam"): False}


def test_pictures_of_two_things(tmp_path):
    make(tmp_path, [f"query-image-2-concepts/Bull_dog_and_Baby_Q/Bull_dog_and_Baby_Q_{i}.jpg" for i in (10, 9)])
    queries = data.load_queries(tmp_path / "query-image-2-concepts")
    assert [(photo.name.split("_")[-1], names) for photo, names in queries] == [("9.jpg", ["Bull_dog", "Baby_Q"]), ("10.jpg", ["Bull_dog", "Baby_Q"])]
    assert queries[0][0].open().size == (12, 8)


def test_repic_layout_and_queries(tmp_path):
    root = make(tmp_path, ["data/myvlm_data/bull/bull_1.jpg", "data/myvlm_data/bull/bull_2.jpg", "data/group photo_1.jpg"])
    assert shape(data.load_concepts(root / "data/myvlm_data")) == {("object", "bull"): ["bull/bull_1.jpg", "bull/bull_2.jpg"]}
    (root / "data/query_tot").mkdir()
    file = root / "data/query_tot/myvlm_query_templates.json"
    file.write_text(json.dumps({"./data/myvlm_data/bull/bull_1.jpg": ["<bull>"], "data/group photo_1.jpg": [["a", "b c"], ["<d>", "e"]]}))
    queries = data.load_queries(file)
    assert [names for _, names in queries] == [["bull"], ["a", "b c"], ["d", "e"]] and queries[2][0].open().size == (12, 8)
    file.write_text('{"gone.jpg": ["a"]}')
    with pytest.raises(data.DataError, match="gone.jpg, which is not there"):
        data.load_queries(file)


def test_databases_of_every_shape(tmp_path):
    make(tmp_path, ["db/bo.png", "db/mam.png", "db/all/rex.png", "db/x y.png"])
    (tmp_path / "db/database.json").write_text(json.dumps({
        "concept_dict": {
            "<bo>": {"name": "bo", "image": "example_database/bo.png", "info": "<bo> is a dog.", "category": "dog"},
            "<mam>": {"name": "mam", "image": ["/leonardo/scratch/someone/db/mam.png", "bo.png"], "info": ["A cat.", "Grey."]},
            "rex": {"name": "rex", "image": str(tmp_path / "db/all/rex.png"), "category": "",
                    "info": {"category": "toy", "general": "A toy", "distinct features": ["one eye", "two tails"]}},
            "<fancy boot>": {"name": "fancy boot", "info": ""}},
        "path_to_concept": {"C:\\photos\\x y.png": "<fancy boot>"}}))
    entries = data.read_database(tmp_path / "db")
    assert [(e.name, e.category, e.text, [photo.name.rsplit("/", 1)[1] for photo in e.photos]) for e in entries] == [
        ("bo", "dog", "<bo> is a dog.", ["bo.png"]), ("mam", "object", "A cat. Grey.", ["mam.png", "bo.png"]),
        ("rex", "toy", "A toy one eye two tails", ["rex.png"]), ("fancy boot", "object", "", ["x y.png"])]
    assert all(photo.open().size == (12, 8) for e in entries for photo in e.photos)
    (tmp_path / "again.json").write_text(json.dumps(data.database(entries)))
    assert [(e.name, e.category, e.text) for e in data.read_database(tmp_path / "again.json")] == [(e.name, e.category, e.text) for e in entries]
    (tmp_path / "db/database_mod.json").write_text('{"concept_dict": {"<a>": {"image": "gone.png"}}}')  # RePIC's name for the one that counts
    with pytest.raises(data.DataError, match="gone.png, which is not there"):
        data.read_database(tmp_path / "db")


@pytest.mark.parametrize("content", ["[]", "{}", '{"concept_dict": []}', "{"])
def test_what_is_not_a_database(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(data.DataError, match="x.json"):
        data.read_database(tmp_path / "x.json")


def test_any_clip_measures_similarity(tmp_path):
    """A CLIP of the real shape with random weights: picture with picture and picture with words."""
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", "<end>", "a", "red", "mug"])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>", pad_token="<end>")
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = CLIPModel(CLIPConfig(text_config=size | dict(vocab_size=5, eos_token_id=1, max_position_embeddings=77), projection_dim=8,
                                 vision_config=size | dict(image_size=8, patch_size=4)))
    processor = data.CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    for part in (model, tokenizer, processor):
        part.save_pretrained(tmp_path / "clip")
    clip = data.Clip(str(tmp_path / "clip"), "cpu")
    photos = [concept.photos[0] for concept in data.load_concepts(make(tmp_path / "p", ["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"]))]
    vectors = clip.embed(photos)
    assert list(vectors) == ["a/1.jpg", "b/1.jpg"] and all(abs(vector.norm() - 1) < 1e-5 for vector in vectors.values())
    together = clip.compare(photos, ["a red mug", "mug " * 200])
    assert together.shape == (2, 2) and torch.allclose(together[1, 0], clip.compare(photos[1:], ["a red mug"])[0, 0], atol=1e-5)
    assert together.abs().max() <= 1 and together[0, 0] != together[1, 0] != together[1, 1]
    with pytest.raises(data.DataError, match="cannot load the CLIP model"):
        data.Clip(str(tmp_path / "nothing"), "cpu")
