"""Folders of photos, broken ones too, become the games that the method asks for."""

import hashlib
import importlib.util
import json
import math
import os
import pathlib
import shutil
import sys
import threading
import types

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

import data
from conftest import ROOT


def make_photos(root, names):
    """Pictures of one colour each, all different, since copies of a picture are left out."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = tuple(hashlib.md5(name.encode()).digest()[:3])
        Image.new("RGB", (12, 8), colour).save(path)
    return root


def photos_by_concept(concepts):
    """{(category, name): names of photos}"""
    found = {}
    for concept in concepts:
        found[concept.category, concept.name] = [photo.name for photo in concept.photos]
    return found


def ignore(message):
    """A log that nobody reads."""


# ------------------------------------------------------------------------------- folders of photos
@pytest.mark.parametrize(
    "names, expected",
    [
        (  # a folder of named things
            ["mug/10.jpg", "mug/9.jpg", "dog/1.png", "dog/2.JPG"],
            {
                ("object", "dog"): ["dog/1.png", "dog/2.JPG"],
                ("object", "mug"): ["mug/9.jpg", "mug/10.jpg"],
            },
        ),
        (  # by category; laion holds other people's photos
            ["pets/rex/1.jpg", "pets/rex/2.jpg", "pets/laion/9.jpg"],
            {("pets", "rex"): ["pets/rex/1.jpg", "pets/rex/2.jpg"]},
        ),
        (
            ["train/rex/1.jpg", "test/rex/1.jpg"],
            {("object", "rex"): ["test/rex/1.jpg", "train/rex/1.jpg"]},
        ),
        (
            ["train_/pets/rex/1.jpg", "test_/pets/rex/1.jpg"],
            {("pets", "rex"): ["test_/pets/rex/1.jpg", "train_/pets/rex/1.jpg"]},
        ),
        (  # with PerVA's layer called all, and a hidden file
            ["train/all/rex/1.jpg", "train/all/rex/2.jpg", "train/all/rex/.x.jpg"],
            {("object", "rex"): ["train/all/rex/1.jpg", "train/all/rex/2.jpg"]},
        ),
        (
            ["yollava-data/train/bo/0.png", "yollava-data/test/bo/0.png"],
            {("object", "bo"): ["yollava-data/test/bo/0.png", "yollava-data/train/bo/0.png"]},
        ),
        (
            [
                "train/bag/abc/1.jpg",
                "test/bag/abc/1.jpg",
                "train/bag/abc/laion/3.jpg",
                "train/bag/laion/4.jpg",
                "negative_example/5.png",
            ],
            {("bag", "abc"): ["test/bag/abc/1.jpg", "train/bag/abc/1.jpg"]},
        ),
        (  # one name in two categories
            ["a/x/1.jpg", "a/x/2.jpg", "b/x/1.jpg", "b/x/2.jpg"],
            {
                ("a", "a/x"): ["a/x/1.jpg", "a/x/2.jpg"],
                ("b", "b/x"): ["b/x/1.jpg", "b/x/2.jpg"],
            },
        ),
    ],
)
def test_layouts(tmp_path, names, expected):
    concepts = data.load_concepts(make_photos(tmp_path, names))
    assert photos_by_concept(concepts) == expected


@pytest.mark.parametrize("inner", ["", "dataset/"])
def test_dreambooth_layout(tmp_path, inner):
    names = ["dog/00.jpg", "dog/01.jpg", "dog2/00.jpg", "dog2/01.jpg"]
    make_photos(tmp_path, [inner + name for name in names])
    (tmp_path / inner / "prompts_and_classes.txt").write_text(
        "Classes\n\nsubject_name,class\ndog,pet\ndog2,toy\n\nPrompts\n\n'a, b'\n"
    )
    assert list(photos_by_concept(data.load_concepts(tmp_path))) == [
        ("pet", "dog"),
        ("toy", "dog2"),
    ]


def test_objects_with_state_change_layout(tmp_path):
    make_photos(tmp_path, ["0/1.jpg", "0/2.jpg", "1/1.jpg", "1/2.jpg", "10/1.jpg", "10/2.jpg"])
    np.save(tmp_path / "categories.npy", np.array(["bag", "cup"] + [""] * 8 + ["toy"]))
    found = photos_by_concept(data.load_concepts(tmp_path))
    assert list(found) == [("bag", "0"), ("cup", "1"), ("toy", "10")]


def test_an_array_of_objects_is_not_read(tmp_path):
    make_photos(tmp_path, ["0/1.jpg", "0/2.jpg"])
    objects = np.array([{"0": "bag"}], dtype=object)
    np.save(tmp_path / "categories.npy", objects, allow_pickle=True)
    log = []
    found = photos_by_concept(data.load_concepts(tmp_path, log.append))
    assert list(found) == [("object", "0")]
    assert "could run code" in log[0]


def test_myvlm_layout(tmp_path):
    """captions.json lies among the photos."""
    make_photos(tmp_path, ["my_cat/IMG_1.jpg", "my_cat/IMG_2.jpg", "bull/1.jpg", "bull/2.jpg"])
    (tmp_path / "bull/captions.json").write_text("{}")
    log = []
    found = photos_by_concept(data.load_concepts(tmp_path, log.append))
    assert list(found) == [("object", "bull"), ("object", "my_cat")]
    assert log == ["2 things: bull 2 photos, my_cat 2 photos"]


def test_photos_know_their_part(tmp_path):
    make_photos(tmp_path, ["train_/pets/rex/1.jpg", "test_/pets/rex/1.jpg"])
    [rex] = data.load_concepts(tmp_path)
    assert [photo.part for photo in rex.photos] == ["test", "train"]


def test_one_photo_may_be_enough(tmp_path):
    make_photos(tmp_path, ["blue mug.jpg", "rex/1.jpg", "rex/2.jpg", "bo/1.png"])
    assert photos_by_concept(data.load_concepts(tmp_path, least=1)) == {
        ("object", "blue mug"): ["blue mug.jpg"],
        ("object", "bo"): ["bo/1.png"],
        ("object", "rex"): ["rex/1.jpg", "rex/2.jpg"],
    }


# ------------------------------------------------------------------------------- what is left out
def test_broken_photos_and_concepts_of_one_photo_are_counted(tmp_path):
    names = ["mug/1.jpg", "mug/2.jpg", "mug/3.jpg", "one/1.jpg", "cut/1.jpg", "cut/2.jpg"]
    make_photos(tmp_path, names)
    (tmp_path / "mug/3.jpg").write_bytes(b"")
    (tmp_path / "cut/2.jpg").write_bytes((tmp_path / "cut/1.jpg").read_bytes()[:300])
    log = []
    found = photos_by_concept(data.load_concepts(tmp_path, log.append))
    assert found == {("object", "mug"): ["mug/1.jpg", "mug/2.jpg"]}
    assert len(log) == 3
    assert log[0].startswith("skipped photos that cannot be read: 2, such as cut/2.jpg (")
    assert log[1] == "skipped things with one photo only: 2, such as cut/1.jpg"
    assert log[2] == "1 thing: mug 2 photos"


def copy(root, source, *targets):
    """The same picture under other names."""
    for target in targets:
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        (root / target).write_bytes((root / source).read_bytes())


def test_copies_of_a_photo_are_left_out_and_counted(tmp_path):
    make_photos(tmp_path, ["mug/1.jpg", "mug/2.jpg"])
    copy(tmp_path, "mug/1.jpg", "mug/IMG 1 (copy).jpg")
    log = []
    [mug] = data.load_concepts(tmp_path, log.append)
    assert [photo.name for photo in mug.photos] == ["mug/1.jpg", "mug/2.jpg"]
    assert log == [
        "skipped copies of another photo of the same thing: 1, such as mug/IMG 1 (copy).jpg",
        "1 thing: mug 2 photos",
    ]


def test_a_picture_of_two_things_is_left_out_of_both(tmp_path):
    """Or a game could have its own target among the negatives."""
    make_photos(tmp_path, [f"{thing}/{i}.jpg" for thing in ("cup", "mug") for i in range(3)])
    copy(tmp_path, "mug/2.jpg", "cup/both.jpg")
    log = []
    cup, mug = data.load_concepts(tmp_path, log.append)
    assert [photo.name for photo in cup.photos] == ["cup/0.jpg", "cup/1.jpg", "cup/2.jpg"]
    assert [photo.name for photo in mug.photos] == ["mug/0.jpg", "mug/1.jpg"]
    assert log == [
        "skipped photos that lie in the folders of two things: 2, such as cup/both.jpg",
        "2 things: cup 3 photos, mug 2 photos",
    ]


def test_a_test_photo_is_no_copy_of_one_to_train_on(tmp_path):
    make_photos(tmp_path, ["train/rex/1.jpg", "test/rex/2.jpg"])
    copy(tmp_path, "train/rex/1.jpg", "test/rex/1.jpg", "train/rex/3.jpg")
    [rex] = data.load_concepts(tmp_path)
    assert [photo.name for photo in rex.photos] == ["test/rex/2.jpg", "train/rex/1.jpg"]


def test_one_odd_file_is_skipped(tmp_path):
    """A strip that no tower can look at, a pipe, an odd name, other formats called .jpg."""
    make_photos(tmp_path, ["²/1.jpg", "²/2.jpg"])
    Image.new("RGB", (2010, 10)).save(tmp_path / "²/strip.png")
    Image.new("RGB", (2000, 10)).save(tmp_path / "²/long.png")
    os.mkfifo(tmp_path / "²/pipe.jpg")
    Image.new("RGB", (12, 8)).save(tmp_path / "page.eps")
    (tmp_path / "page.eps").rename(tmp_path / "²/page.jpg")
    Image.new("RGB", (12, 8)).save(tmp_path / "film.gif")
    (tmp_path / "film.gif").rename(tmp_path / "²/film.jpg")
    odd = os.fsencode(tmp_path / "²") + b"/\xff.jpg"
    shutil.copy(tmp_path / "²/1.jpg", odd)
    log = []
    [two] = data.load_concepts(tmp_path, log.append)
    assert [photo.name for photo in two.photos] == ["²/1.jpg", "²/2.jpg", "²/long.png"]
    odd_files, odd_name, _ = log
    assert odd_name == "skipped photos whose names are not UTF-8: 1, such as ²/\\udcff.jpg"
    assert odd_files.startswith("skipped photos that cannot be read: 4, such as ²/")


@pytest.mark.parametrize(
    "content", [b"", b"\x93NUMPY\x01\x00\x06\x00{'des}", "absurd", np.zeros(()), np.zeros((2, 2))]
)
def test_an_odd_array_gives_no_categories(tmp_path, content):
    make_photos(tmp_path, ["0/1.jpg", "0/2.jpg"])
    file = tmp_path / "categories.npy"
    if isinstance(content, np.ndarray):
        np.save(file, content)
    elif content == "absurd":  # larger than any memory
        header = "{'descr': '<U9', 'fortran_order': False, 'shape': (99999999999999,)}"
        text = header.ljust(117) + "\n"
        file.write_bytes(b"\x93NUMPY\x01\x00v\x00" + text.encode())
    else:
        file.write_bytes(content)
    log = []
    [concept] = data.load_concepts(tmp_path, log.append)
    assert concept.category == "object"
    assert "is not read" in log[0]


def test_a_class_file_in_another_encoding_is_one_line(tmp_path):
    make_photos(tmp_path, ["cafe/1.jpg", "cafe/2.jpg"])
    (tmp_path / "prompts_and_classes.txt").write_bytes("caf\xe9,caf\xe9".encode("latin-1"))
    with pytest.raises(data.DataError, match="is not a text in UTF-8"):
        data.load_concepts(tmp_path)


def test_links_to_folders_are_followed_once(tmp_path):
    make_photos(tmp_path, ["real/mug/1.jpg", "real/mug/2.jpg", "root/cup/1.jpg", "root/cup/2.jpg"])
    (tmp_path / "root/mug").symlink_to(tmp_path / "real/mug")
    (tmp_path / "root/also").symlink_to(tmp_path / "root/cup")
    (tmp_path / "root/cup/round").symlink_to(tmp_path / "root")
    log = []
    concepts = data.load_concepts(tmp_path / "root", log.append)
    assert [(concept.name, len(concept.photos)) for concept in concepts] == [("cup", 2), ("mug", 2)]
    assert log == ["2 things: cup 2 photos, mug 2 photos"]


@pytest.mark.parametrize("names", [("blue mug", "blue_mug"), ("!!", "cup")])
def test_two_things_have_two_names_in_prompts(tmp_path, names):
    make_photos(tmp_path, [f"{name}/{i}.jpg" for name in names for i in range(2)])
    with pytest.raises(data.DataError, match="in prompts; rename one"):
        data.load_concepts(tmp_path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_a_broken_photo(tmp_path, monkeypatch):
    make_photos(tmp_path, ["mug/1.jpg", "mug/2.jpg", "mug/3.jpg"])
    Image.new("L", (64, 64)).save(tmp_path / "mug/4.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    log = []
    [mug] = data.load_concepts(tmp_path, log.append)
    assert len(mug.photos) == 3
    assert "mug/4.png (more than 3000 pixels)" in log[0]


def test_a_phones_own_formats_are_not_silently_ignored(tmp_path):
    make_photos(tmp_path, ["mug/1.jpg", "mug/2.jpg"])
    for name in ("3.HEIC", "4.MOV", "5.mp4", "6.gif"):
        (tmp_path / "mug" / name).write_bytes(b"x")
    log = []
    data.load_concepts(tmp_path, log.append)
    assert log == [
        "skipped HEIC pictures (pip install pillow-heif, or save them as JPEG): 1, "
        "such as mug/3.HEIC",
        "skipped videos: 2, such as mug/4.MOV",
        "skipped files of a kind that is not read here (save them as JPEG or PNG): 1, "
        "such as mug/6.gif",
        "1 thing: mug 2 photos",
    ]


def test_photos_that_lie_nowhere_in_particular_are_skipped(tmp_path):
    names = ["stray.jpg", "train/stray.jpg", "a/b/c/deep.jpg", "pets/rex/1.jpg", "pets/rex/2.jpg"]
    make_photos(tmp_path, [*names, "laion/1.jpg", "pets/rex/.1.jpg"])
    log = []
    concepts = data.load_concepts(tmp_path, log.append)
    assert photos_by_concept(concepts) == {("pets", "rex"): ["pets/rex/1.jpg", "pets/rex/2.jpg"]}
    assert log == [
        "skipped photos too deep below (expected <thing>/photo or <category>/<thing>/photo): 1, "
        "such as a/b/c/deep.jpg",
        "skipped unrelated photos, in folders called laion or negative_example: 1, "
        "such as laion/1.jpg",
        "skipped hidden files: 1, such as pets/rex/.1.jpg",
        "skipped photos beside the folders of things (give each thing a folder): 2, "
        "such as stray.jpg",
        "1 thing in 1 category: pets/rex 2 photos",
    ]


def test_every_skipped_file_is_a_line_of_a_file(tmp_path):
    names = ["mug/1.jpg", "mug/2.jpg", "cup/only\none.jpg", "stray.jpg", "a/b/c/1.jpg"]
    make_photos(tmp_path / "photos", names)
    copy(tmp_path / "photos", "mug/1.jpg", "mug/3.jpg", "mug/4.jpg")
    (tmp_path / "photos/mug/5.jpg").write_bytes(b"")
    (tmp_path / "photos/mug/film.mov").write_bytes(b"")
    (tmp_path / "photos/mug/notes.txt").write_text("no photo, and nobody took it for one")
    log = []
    data.load_concepts(tmp_path / "photos", log.append, skipped_file=tmp_path / "skipped.txt")
    lines = (tmp_path / "skipped.txt").read_text().splitlines()
    unread = [line for line in lines if line.startswith("photos that cannot be read: mug/5.jpg (")]
    assert len(unread) == 1
    assert sorted(set(lines) - set(unread)) == [
        "copies of another photo of the same thing: mug/3.jpg",
        "copies of another photo of the same thing: mug/4.jpg",
        "photos beside the folders of things (give each thing a folder): stray.jpg",
        "photos too deep below (expected <thing>/photo or <category>/<thing>/photo): a/b/c/1.jpg",
        "things with one photo only: cup/only\\none.jpg",
        "videos: mug/film.mov",
    ]
    assert f"every file that was skipped, and why: {tmp_path / 'skipped.txt'}" in log
    # Of the next start, which skips nothing, no line stays.
    for name in ("cup", "a", "stray.jpg", "mug/3.jpg", "mug/4.jpg", "mug/5.jpg", "mug/film.mov"):
        path = tmp_path / "photos" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    log.clear()
    data.load_concepts(tmp_path / "photos", log.append, skipped_file=tmp_path / "skipped.txt")
    assert (tmp_path / "skipped.txt").read_text() == ""
    assert log == ["1 thing: mug 2 photos"]


def test_what_was_skipped_is_written_though_nothing_is_left(tmp_path):
    make_photos(tmp_path / "photos", ["mug/1.jpg", "stray.jpg"])
    with pytest.raises(data.DataError, match="has no concept"):
        data.load_concepts(tmp_path / "photos", skipped_file=tmp_path / "skipped.txt")
    assert len((tmp_path / "skipped.txt").read_text().splitlines()) == 2
    with pytest.raises(data.DataError, match="^cannot write .*gone/skipped.txt: "):
        data.load_concepts(tmp_path / "photos", skipped_file=tmp_path / "gone/skipped.txt")


def test_a_folder_in_a_things_folder_is_asked_about(tmp_path):
    make_photos(tmp_path, ["mug/1.jpg", "mug/2.jpg", "mug/blue/3.jpg", "mug/blue/4.jpg"])
    mug = tmp_path / "mug"
    with pytest.raises(data.DataError) as refused:
        data.load_concepts(tmp_path)
    assert str(refused.value) == (
        f"{mug} has photos itself, and so has {mug}/blue: is mug a thing or a category? If a "
        f"thing, move the photos of {mug}/blue up into {mug}; if a category, move the photos that "
        f"lie in {mug} itself into a folder of their own in there"
    )
    # Each of the ways out is one.
    shutil.copytree(mug, tmp_path / "again/mug")
    for photo in (tmp_path / "again/mug/blue").iterdir():
        photo.rename(tmp_path / "again/mug" / photo.name)
    [thing] = data.load_concepts(tmp_path / "again")
    assert len(thing.photos) == 4
    (mug / "old").mkdir()
    for photo in mug.glob("*.jpg"):
        photo.rename(mug / "old" / photo.name)
    shutil.rmtree(tmp_path / "again")
    found = photos_by_concept(data.load_concepts(tmp_path))
    assert list(found) == [("mug", "blue"), ("mug", "old")]


def test_a_folder_in_another_part_of_a_benchmark_is_asked_about_too(tmp_path):
    make_photos(tmp_path, ["train/mug/1.jpg", "train/mug/2.jpg", "test/mug/blue/3.jpg"])
    with pytest.raises(data.DataError, match="is mug a thing or a category"):
        data.load_concepts(tmp_path)


def lines_about(names, tmp_path):
    """What is logged of a folder with these photos."""
    log = []
    data.load_concepts(make_photos(tmp_path, names), log.append, least=1)
    return log


def test_what_was_found_is_told_in_a_line(tmp_path):
    names = ["mug/1.jpg", "mug/2.jpg", "bo/1.jpg", "owl.jpg"]
    [line] = lines_about(names, tmp_path)
    assert line == "3 things: bo 1 photo, mug 2 photos, owl 1 photo"


def test_a_loose_photo_and_a_category_may_be_called_alike(tmp_path):
    [line] = lines_about(["owl.jpg", "owl/snowy/1.jpg"], tmp_path)
    assert line == "2 things in 2 categories: object/owl 1 photo, owl/snowy 1 photo"


def test_things_are_told_with_their_categories(tmp_path):
    names = ["pets/rex/1.jpg", "pets/rex/2.jpg", "mugs/red/1.jpg", "pets/bo/1.jpg", "x/bo/1.jpg"]
    [line] = lines_about(names, tmp_path)
    assert line == (
        "4 things in 3 categories: mugs/red 1 photo, pets/bo 1 photo, pets/rex 2 photos, "
        "x/bo 1 photo"
    )


def test_of_many_things_the_first_are_told(tmp_path):
    names = [f"{i}/{view}.jpg" for i in range(1, 16) for view in range(2)]
    [line] = lines_about(names, tmp_path)
    assert line.startswith("15 things: 1 2 photos, 2 2 photos, ")
    assert line.endswith(", 12 2 photos, and 3 more with 6 photos")


@pytest.mark.parametrize("names", [[], ["a/1.jpg"], ["1.jpg"], ["a/b/c/1.jpg"]])
def test_unusable_folders_say_what_to_do(tmp_path, names):
    make_photos(tmp_path, names)
    message = "has no concept with two readable photos; put the photos of each thing in a folder"
    with pytest.raises(data.DataError, match=message):
        data.load_concepts(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(data.DataError, match="nowhere is not a folder"):
        data.load_concepts(tmp_path / "nowhere")


def test_git_lfs_pointers_say_what_to_do(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    (make_photos(tmp_path, ["a/1.jpg"]) / "a/1.jpg").write_bytes(pointer)
    with pytest.raises(data.DataError, match="git lfs pull"):
        data.load_concepts(tmp_path)


# ------------------------------------------------------------------------------------- the pixels
def test_photos_are_turned_upright(tmp_path):
    picture = Image.new("RGB", (8, 4))
    exif = picture.getexif()
    exif[0x0112] = 6  # taken with the phone turned
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert data.read_photo(tmp_path / "turned.jpg").size == (4, 8)


def red_palette():
    """A picture whose pixels are all entry 1 of its palette, which is red."""
    picture = Image.new("P", (2, 2), 1)
    picture.putpalette([0, 0, 0, 255, 0, 0])
    return picture


WHITE = (255, 255, 255)


@pytest.mark.parametrize(
    "picture, suffix, options, colour",
    [
        (Image.new("RGBA", (2, 2), (0, 0, 0, 0)), "png", {}, WHITE),
        (Image.new("LA", (2, 2), (0, 0)), "png", {}, WHITE),
        (Image.new("CMYK", (2, 2), (0, 0, 0, 0)), "jpg", {}, WHITE),
        (red_palette(), "png", {}, (255, 0, 0)),
        (red_palette(), "png", {"transparency": 1}, WHITE),
        (Image.new("I;16", (2, 2), 128 * 256), "png", {}, (128, 128, 128)),  # 16 bits of grey
    ],
)
def test_pictures_of_every_kind_become_rgb(tmp_path, picture, suffix, options, colour):
    file = tmp_path / f"picture.{suffix}"
    picture.save(file, **options)
    read = data.read_photo(file)
    assert read.mode == "RGB"
    assert read.getpixel((0, 0)) == colour


@pytest.mark.parametrize(
    "size, read",
    [
        ((4000, 2600), (2000, 1300)),  # a third would do for 4000, but not for 2600
        ((2559, 2600), (2559, 2600)),  # half of 2559 is less than 1280
        ((5121, 5200), (1281, 1300)),
    ],
)
def test_a_jpeg_is_decoded_no_larger_than_needed(tmp_path, size, read):
    assert data.DETAIL == 1280
    Image.new("RGB", size, (200, 100, 50)).save(tmp_path / "large.jpg")
    picture = data.read_photo(tmp_path / "large.jpg")
    assert picture.size == read
    assert np.abs(np.subtract(picture.getpixel((9, 9)), (200, 100, 50))).max() <= 2


def test_other_pictures_keep_their_size_and_turned_ones_are_turned(tmp_path):
    picture = Image.new("RGB", (2600, 3000), "red")
    picture.save(tmp_path / "large.png", compress_level=1)
    assert data.read_photo(tmp_path / "large.png").size == (2600, 3000)
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert data.read_photo(tmp_path / "turned.jpg").size == (1500, 1300)


# ---------------------------------------------------------------------------------------- HEIC
HEIC = b"\0\0\0\x1cftypheic" + b"what a phone writes"


def test_heic_under_another_name_gets_its_advice(tmp_path):
    (tmp_path / "1.jpg").write_bytes(HEIC)
    with pytest.raises(ValueError, match="^a HEIC picture; pip install pillow-heif, or save it"):
        data.read_photo(tmp_path / "1.jpg")


class FakeHeic(ImageFile.ImageFile):
    """Reads any HEIC file as a grey picture, as large as the file is long."""

    format = "HEIF"

    def _open(self):
        self._size = (len(self.fp.read()), 2)
        self._mode = "L"
        self.tile = []

    def load(self):
        self.im = Image.core.fill("L", self.size, 128)
        self.pyaccess = None


def is_heic(head):
    return head[4:12] == b"ftypheic"


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path, monkeypatch):
    def register_heif_opener():
        monkeypatch.setitem(Image.OPEN, "HEIF", (FakeHeic, is_heic))

    installed = types.SimpleNamespace(register_heif_opener=register_heif_opener)
    monkeypatch.setitem(sys.modules, "pillow_heif", installed)
    spec = importlib.util.spec_from_file_location("data_with_heic", data.__file__)
    with_heic = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "data_with_heic", with_heic)
    spec.loader.exec_module(with_heic)

    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path, ["mug/1.jpg"])
    (tmp_path / "mug/2.HEIC").write_bytes(HEIC)
    (tmp_path / "mug/3.jpg").write_bytes(HEIC + b"x")
    log = []
    [mug] = with_heic.load_concepts(tmp_path, log.append)
    assert log == ["1 thing: mug 3 photos"]
    assert mug.photos[1].load().size == (len(HEIC), 2)
    # What was read so is not known to the program without it, and the other way round.
    assert with_heic.READER != data.READER


# ------------------------------------------------------------------- what is known from last time
@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a folder of photos: two of a mug, a copy of one, a broken one."""
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path, ["photos/mug/1.jpg", "photos/mug/2.jpg"])
    copy(tmp_path, "photos/mug/1.jpg", "photos/mug/3.jpg")
    (tmp_path / "photos/mug/4.jpg").write_bytes(b"broken")
    return tmp_path


@pytest.fixture
def read(monkeypatch):
    """The names of the files whose pixels are read, as it goes on."""
    names = []
    read_photo = data.read_photo

    def watch(path):
        names.append(path.name)
        return read_photo(path)

    monkeypatch.setattr(data, "read_photo", watch)
    return names


def test_the_suite_does_not_litter_the_repository():
    assert not pathlib.Path.cwd().is_relative_to(ROOT)
    assert data.INDEX == pathlib.Path("runs/photos.json")


def test_a_second_start_reads_no_pixels_and_finds_the_same(here, read):
    first_log = []
    first = data.load_concepts("photos", first_log.append)
    assert sorted(read) == ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    read.clear()
    log = []
    # From another folder's point of view they are the same files.
    concepts = data.load_concepts(here / "photos", log.append)
    assert read == []
    assert [photo.pixels for photo in concepts[0].photos] == [
        data.fingerprint(data.read_photo(here / "photos/mug" / name)) for name in ("1.jpg", "2.jpg")
    ]
    assert (concepts, log) == (first, first_log)
    assert [line.split(":")[0] for line in log] == [
        "skipped photos that cannot be read",
        "skipped copies of another photo of the same thing",
        "1 thing",
    ]


def test_only_what_changed_is_read_again(here, read):
    data.load_concepts("photos", ignore)
    read.clear()
    mug = here / "photos/mug"
    # One of the same size but another time, one of the same time but another size, a new one.
    os.utime(mug / "1.jpg", ns=(1, 1))
    moment = (mug / "4.jpg").stat().st_mtime_ns
    shutil.copy(mug / "2.jpg", mug / "4.jpg")
    os.utime(mug / "4.jpg", ns=(moment, moment))
    make_photos(mug, ["5.jpg"])
    log = []
    [concept] = data.load_concepts("photos", log.append)
    assert sorted(read) == ["1.jpg", "4.jpg", "5.jpg"]
    assert [photo.name for photo in concept.photos] == ["mug/1.jpg", "mug/2.jpg", "mug/5.jpg"]
    assert log[0] == ("skipped copies of another photo of the same thing: 2, such as mug/3.jpg")


def test_the_index_holds_what_is_there(here):
    data.load_concepts("photos", ignore)
    make_photos(here, ["others/cup/1.jpg", "others/cup/2.jpg"])
    data.load_concepts("others", ignore)
    (here / "photos/mug/2.jpg").unlink()
    (here / "others/cup/2.jpg").unlink()
    make_photos(here, ["photos/mug/9.jpg"])
    data.load_concepts("photos", ignore)
    content = json.loads((here / "runs/photos.json").read_text())
    assert content["reader"] == data.READER
    # What is gone is forgotten where one looked, and kept elsewhere.
    names = ["others/cup/1.jpg", "others/cup/2.jpg"]
    names += [f"photos/mug/{i}.jpg" for i in (1, 3, 4, 9)]
    assert sorted(content["photos"]) == [str(here / name) for name in names]
    status = (here / "photos/mug/4.jpg").stat()
    entry = content["photos"][str(here / "photos/mug/4.jpg")]
    assert entry.pop("problem").startswith("cannot identify image file")
    assert entry == {"size": 6, "changed": status.st_mtime_ns, "pixels": ""}
    assert os.listdir(here / "runs") == ["photos.json"]


GOOD_ENTRY = {"size": 1, "changed": 1, "pixels": "ab", "problem": ""}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        "[]",
        json.dumps({"reader": "another Pillow", "photos": {}}),
        json.dumps({"reader": data.READER}),
        json.dumps({"reader": data.READER, "photos": {"x": [1, 2]}}),
        json.dumps({"reader": data.READER, "photos": {"x": GOOD_ENTRY | {"pixels": 7}}}),
        json.dumps({"reader": data.READER, "photos": {"x": GOOD_ENTRY | {"pixels": ""}}}),
        json.dumps({"reader": data.READER, "photos": {"x": GOOD_ENTRY | {"more": 1}}}),
    ],
)
def test_an_index_that_is_none_is_made_anew(here, read, text):
    (here / "runs").mkdir()
    (here / "runs/photos.json").write_text(text)
    log = []
    data.load_concepts("photos", log.append)
    assert log[0].startswith("runs/photos.json cannot be used and is made anew: ")
    assert len(log) == 4
    assert len(read) == 4
    data.load_concepts("photos", log.append)
    assert len(read) == 4


def test_an_index_that_cannot_be_written_is_told(here):
    (here / "runs").write_text("a file")
    log = []
    assert data.load_concepts("photos", log.append)
    assert log[0].startswith("cannot write runs/photos.json, so the next start reads all photos: ")


def test_what_another_process_has_read_meanwhile_is_kept(here, monkeypatch):
    others = here / "runs/photos.json"
    fingerprint = data.fingerprint

    def write_meanwhile(picture):
        others.parent.mkdir(exist_ok=True)
        content = {"reader": data.READER, "photos": {"/elsewhere/1.jpg": GOOD_ENTRY}}
        others.write_text(json.dumps(content))
        return fingerprint(picture)

    monkeypatch.setattr(data, "fingerprint", write_meanwhile)
    data.load_concepts("photos", ignore)
    assert len(json.loads(others.read_text())["photos"]) == 5


def test_a_permission_that_was_missing_is_tried_again(here, read, monkeypatch):
    watched = data.read_photo

    def refuse(path):
        if path.name == "2.jpg":
            raise PermissionError(13, "Permission denied")
        return watched(path)

    monkeypatch.setattr(data, "read_photo", refuse)
    with pytest.raises(data.DataError, match="has no concept"):
        data.load_concepts("photos", ignore)
    read.clear()
    monkeypatch.setattr(data, "read_photo", watched)
    [mug] = data.load_concepts("photos", ignore)
    assert read == ["2.jpg"]
    assert len(mug.photos) == 2


def test_what_was_read_before_a_stop_is_kept(here, read, monkeypatch):
    """By Ctrl-C, or a Git-LFS pointer among many photos."""
    make_photos(here, [f"photos/cup/{i}.jpg" for i in range(40)])
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    (here / "photos/cup/20.jpg").write_bytes(pointer)
    with pytest.raises(data.DataError, match="git lfs pull"):
        data.load_concepts("photos", ignore)
    make_photos(here, ["photos/cup/20.jpg"])
    read.clear()
    data.load_concepts("photos", ignore)
    assert not {f"{i}.jpg" for i in range(5, 20)} & set(read)
    assert "20.jpg" in read


def two_cores():
    return 2


def test_photos_are_read_side_by_side(here, monkeypatch):
    """Two cores: each of two readers waits for the other to begin."""
    monkeypatch.setattr(os, "cpu_count", two_cores)
    both = threading.Barrier(2, timeout=20)
    read_photo = data.read_photo

    def meet(path):
        both.wait()
        return read_photo(path)

    monkeypatch.setattr(data, "read_photo", meet)
    [mug] = data.load_concepts("photos", ignore)
    assert len(mug.photos) == 2


def test_the_time_left_is_shown_while_photos_are_read(here, capsys):
    data.load_concepts("photos", ignore)
    assert "reading photos:   0%" in capsys.readouterr().err
    data.load_concepts("photos", ignore)
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------- the hub
def test_a_hub_dataset_is_fetched(tmp_path, monkeypatch):
    make_photos(tmp_path, ["dataset/dog/00.jpg", "dataset/dog/01.jpg"])
    calls = []

    def download(name, repo_type):
        calls.append((name, repo_type))
        return str(tmp_path)

    monkeypatch.setattr(data, "snapshot_download", download)
    found = photos_by_concept(data.load_concepts("google/dreambooth"))
    assert found == {("object", "dog"): ["dataset/dog/00.jpg", "dataset/dog/01.jpg"]}
    assert calls == [("google/dreambooth", "dataset")]


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    def offline(name, repo_type):
        raise OSError("no connection\nlong story")

    monkeypatch.setattr(data, "snapshot_download", offline)
    message = "google/dreambooth is not a folder here.*no connection$"
    with pytest.raises(data.DataError, match=message):
        data.load_concepts("google/dreambooth")


def test_an_error_without_words_is_named():
    with pytest.raises(data.DataError, match="^cannot do it: OSError$"):
        with data.one_line_errors("cannot do it", OSError):
            raise OSError


@pytest.mark.parametrize(
    "name, tag",
    [
        ("bo", "<bo>"),
        ("my blue mug", "<my_blue_mug>"),
        ("cups/mug-1", "<cups_mug-1>"),
        ("Ärger", "<Ärger>"),
        ("a.b (2)", "<a_b_2>"),
        ("🐶", "<🐶>"),
        ('a">\u2003<|im_end|>', "<a_im_end>"),
    ],
)
def test_names_become_one_word(name, tag):
    assert data.tag(name) == tag


# ------------------------------------------------------------------------------------------ games
# Concepts whose photos lie at angles, in degrees, on a circle: similarity is the cosine of the
# difference.
ANGLES = {
    "a": [0, 10, 60],
    "b": [20, 80],
    "c": [5, 170],
    "d": [90, 100],
    "e": [1, 2],
}


def circle_world():
    """-> (concepts, {photo name: unit vector}) of ANGLES: a to d are mugs, e is a dog"""
    concepts = []
    vectors = {}
    for name, angles in ANGLES.items():
        category = "dog" if name == "e" else "mug"
        photos = [data.Photo(f"{name}/{i}", None) for i in range(len(angles))]
        concepts.append(data.Concept(name, category, photos))
        for photo, angle in zip(photos, angles, strict=True):
            radians = math.radians(angle)
            vectors[photo.name] = torch.tensor([math.cos(radians), math.sin(radians)])
    return concepts, vectors


def mine(k=3, seed=0, log=ignore, **options):
    """The games of the circle, {name of the target: Game}."""
    concepts, vectors = circle_world()
    games = data.mine_games(concepts, vectors, k, seed, log=log, **options)
    return {game.target.name: game for game in games}


def concept_of(photo):
    return photo.name.split("/")[0]


def test_hard_games_are_what_the_method_says():
    game = mine()["a/0"]
    # The least similar other photo of the same concept, and the two most similar photos of other
    # mugs. The dog at 1 degree is nearer, but no mug.
    assert game.pool[game.positive].name == "a/2"
    assert {photo.name for photo in game.pool} == {"a/2", "c/0", "b/0"}
    assert game.record() == {
        "concept": "a",
        "target": "a/0",
        "pool": [photo.name for photo in game.pool],
        "answer": game.positive,
    }


def test_negatives_are_of_the_eight_most_similar_concepts():
    """The ninth has the most similar photo of all, but is another thing on the whole."""
    concepts = []
    vectors = {}
    angles = {"target": [0, 90], "ninth": [1, 175]}
    angles |= {f"near{i}": [20 + i, 30 + i] for i in range(8)}
    for name, degrees in angles.items():
        photos = [data.Photo(f"{name}/{i}", None) for i in range(2)]
        concepts.append(data.Concept(name, "mug", photos))
        for photo, degree in zip(photos, degrees, strict=True):
            radians = math.radians(degree)
            vectors[photo.name] = torch.tensor([math.cos(radians), math.sin(radians)])
    games = data.mine_games(concepts, vectors, 3, 0)
    assert {photo.name for photo in games[0].pool} == {"target/1", "near0/0", "near1/0"}


def test_an_easy_positive_is_the_most_similar_photo():
    game = mine(positive="easy")["a/0"]
    assert game.pool[game.positive].name == "a/1"


def test_random_negatives_are_of_any_other_concepts():
    shown_with_mugs = set()
    for game in mine(negatives="random").values():
        owners = {concept_of(photo) for photo in game.pool}
        assert len(owners) == 3
        if game.category == "mug":
            shown_with_mugs |= owners
    assert "e" in shown_with_mugs


def test_negatives_of_other_categories():
    for game in mine(k=2, negatives="other").values():
        [negative] = [photo for photo in game.pool if photo is not game.pool[game.positive]]
        assert (concept_of(negative) == "e") == (game.category == "mug")


def test_too_few_things_of_other_categories():
    with pytest.raises(
        data.DataError, match="wants 2 things that are no mug, here are only 1; give"
    ):
        mine(k=3, negatives="other")


def test_small_categories_are_filled_up_which_is_reported():
    log = []
    games = mine(log=log.append)
    assert len(games) == 11
    for game in games.values():
        assert len(game.pool) == 3
        assert concept_of(game.pool[game.positive]) == game.concept
    # The dog's pool takes the most similar photos of the most similar mugs.
    game = games["e/0"]
    assert {photo.name for photo in game.pool} == {"e/1", "a/0", "b/0"}
    assert log == [
        "2 of 11 games take negatives from other categories: theirs has fewer than 2 other concepts"
    ]
    with pytest.raises(data.DataError, match="K=6 photos needs 6 concepts"):
        mine(k=6)


def test_rivals_give_the_negatives():
    concepts, vectors = circle_world()
    a, b, c, d, e = concepts
    for game in data.mine_games([a, b], vectors, 3, 0, rivals=[a, d, e], log=ignore):
        assert game.concept in "ab"
        others = {concept_of(photo) for photo in game.pool} - {game.concept}
        assert others <= {"a", "d", "e"}


def test_the_same_seed_makes_the_same_games():
    games = mine(seed=7)
    assert games == mine(seed=7)
    assert games != mine(seed=8)
    # On every machine: these were made on another one.
    assert list(games)[:3] == ["a/0", "a/1", "a/2"]
    places = [game.positive for game in games.values()]
    assert places[:6] == [0, 2, 1, 1, 1, 1]


def test_the_hard_positive_is_everywhere_in_the_pool():
    places = []
    for seed in range(30):
        places += [game.positive for game in mine(seed=seed).values()]
    assert all(places.count(place) > len(places) / 5 for place in range(3))


# ----------------------------------------------------------------------------------------- splits
def five_of_each(categories):
    concepts = []
    for category in categories:
        concepts += [data.Concept(f"{category}{i}", category, []) for i in range(5)]
    return concepts


def categories_of(concepts):
    return {concept.category for concept in concepts}


def test_splits_are_by_concept():
    split = data.split_concepts(five_of_each("abcdef"), 0)
    names = [concept.name for concept in split.train + split.test + split.unseen]
    assert len(names) == len(set(names)) == 30
    # One of six categories is never trained on; the others share the fifth that is kept.
    assert len(categories_of(split.unseen)) == 1
    assert not categories_of(split.unseen) & categories_of(split.train + split.test)
    assert len(split.test) == len(categories_of(split.test)) == 5


def test_no_split_takes_what_a_pool_needs():
    """Four things of four categories: three are trained on."""
    for seed in range(10):
        split = data.split_concepts(five_of_each("abcd")[::5], seed)
        assert (len(split.train), len(split.test), len(split.unseen)) == (3, 1, 0)
        # Of five a category can be spared.
        split = data.split_concepts(five_of_each("abcde")[::5], seed)
        assert (len(split.train), len(split.test), len(split.unseen)) == (3, 1, 1)


def test_splits_are_seeded():
    concepts = five_of_each("abcdef")
    assert data.split_concepts(concepts, 0) == data.split_concepts(concepts, 0)
    assert data.split_concepts(concepts, 0) != data.split_concepts(concepts, 1)


def test_unseen_categories_may_be_chosen():
    concepts = five_of_each("abcdef")
    assert categories_of(data.split_concepts(concepts, 0, ["a", "b"]).unseen) == {"a", "b"}
    # Of two categories none can be spared.
    assert data.split_concepts(concepts[:10], 0).unseen == []


# ------------------------------------------------------------------------ which are trained on
def concepts_of_sizes(sizes):
    """Concepts 0, 1, ... of so many photos."""
    concepts = []
    for number, size in enumerate(sizes):
        photos = [data.Photo(f"{number}/{i}.jpg", None) for i in range(size)]
        concepts.append(data.Concept(str(number), "mug", photos))
    return concepts


def test_so_many_concepts_are_picked_that_have_about_a_thousand_photos():
    concepts = concepts_of_sizes([10] * 20 + [100] * 20)
    picked = data.pick_concepts(concepts, "12", 0)
    assert len(picked) == 12
    # Of ten large and two small ones: with nine it would be 930, with eleven 1110.
    assert sum(len(concept.photos) for concept in picked) in (930, 1020)
    assert picked == data.pick_concepts(concepts, "12", 0)
    assert picked != data.pick_concepts(concepts, "12", 1)


def test_concepts_are_picked_by_name(tmp_path):
    concepts = concepts_of_sizes([3, 3, 3])
    names = tmp_path / "names.txt"
    names.write_text("2\n\n 0 \n")
    assert data.pick_concepts(concepts, str(names), 0) == [concepts[0], concepts[2]]
    names.write_text("2\n7\n")
    with pytest.raises(
        data.DataError, match="names 1 concepts that are not in the data, such as 7"
    ):
        data.pick_concepts(concepts, str(names), 0)


@pytest.mark.parametrize("wanted", ["0", "4", "-1", "gone.txt"])
def test_what_cannot_be_picked_is_refused(wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.DataError, match="--train-concepts"):
        data.pick_concepts(concepts_of_sizes([3, 3, 3]), wanted, 0)


def test_perva_s_categories_are_words(tmp_path):
    make_photos(tmp_path, ["tro_bag/abc/1.jpg", "tro_bag/abc/2.jpg"])
    [concept] = data.load_concepts(tmp_path)
    assert (concept.name, concept.category) == ("abc", "trolley bag")


# --------------------------------------------------------------------------------- games of a step
def test_every_pass_has_an_order_of_its_own_and_every_step_is_known():
    games = list(range(10))
    played = []
    for step in range(5):
        played += data.games_of_step(games, step, 4, 3)
    first_pass = played[:10]
    second_pass = played[10:]
    assert sorted(first_pass) == sorted(second_pass) == games
    assert first_pass != second_pass
    # Step 3 alone: what was played before it does not count.
    assert data.games_of_step(games, 3, 4, 3) == played[12:16]
