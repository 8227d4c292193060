"""Folders of photos, broken ones too, become the games that the method asks for."""
import pytest
import torch
from PIL import Image

import data


def make(root, layout, colour=(10, 20, 30)):
    for name in layout:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 8), colour).save(path)
    return root


def shape(concepts):
    return {(concept.category, concept.name): [photo.name for photo in concept.photos] for concept in concepts}


@pytest.mark.parametrize("layout, expected", [
    (["mug/10.jpg", "mug/9.jpg", "dog/1.png", "dog/2.JPG"], {("object", "dog"): ["dog/1.png", "dog/2.JPG"], ("object", "mug"): ["mug/9.jpg", "mug/10.jpg"]}),
    (["pets/rex/1.jpg", "pets/rex/2.jpg", "pets/laion/9.jpg"], {("pets", "rex"): ["pets/rex/1.jpg", "pets/rex/2.jpg"]}),
    (["train/rex/1.jpg", "test/rex/1.jpg"], {("object", "rex"): ["test/rex/1.jpg", "train/rex/1.jpg"]}),
    (["train_/pets/rex/1.jpg", "test_/pets/rex/1.jpg"], {("pets", "rex"): ["test_/pets/rex/1.jpg", "train_/pets/rex/1.jpg"]}),
    (["train/all/rex/1.jpg", "train/all/rex/2.jpg", "train/all/rex/.x.jpg"], {("object", "rex"): ["train/all/rex/1.jpg", "train/all/rex/2.jpg"]}),
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
    assert said[0].startswith("skipped 2 photos that cannot be read") and said[1].startswith("skipped 2 concepts with one photo only")


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
