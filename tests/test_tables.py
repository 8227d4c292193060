"""A table goes on where it was interrupted, is never mixed with another one, and says how long it
takes."""

import json
import os
from collections import Counter
from functools import partial

import pytest

import model
import tables
import toy
from assistant import VQA
from conftest import prompts_about
from data import DataError
from model import COMPARING
from tables import ANSWER, KeptTable, Progress

SETTINGS = {"seed": 0, "k": 3, "embedder": ""}


def kept_table(file, photos="these", rows=("base", "x")):
    """A table in a file, with these rows."""
    kept = KeptTable(str(file), SETTINGS)
    kept.measure_with(photos, {"device": "a laptop"})
    for name in rows:
        kept.add(name, f"speaker of {name}", {"all": {"f1": 0.1, "vqa": None}})
    return file


# -------------------------------------------------------------------------------------- the file
def test_a_row_is_kept_as_soon_as_it_is_done(tmp_path):
    kept = KeptTable(str(tmp_path / "t.json"), SETTINGS)
    kept.measure_with(["bo/1.jpg", "hash"], {"device": "a laptop"})
    kept.add("base", "speaker", {"all": {"f1": 0.1}})
    content = json.loads((tmp_path / "t.json").read_text())
    assert content["rows"] == {"base": {"all": {"f1": 0.1}}}
    assert content["settings"] == SETTINGS
    assert content["device"] == "a laptop"

    kept.add("x", "speaker", {})
    assert list(json.loads((tmp_path / "t.json").read_text())["rows"]) == ["base", "x"]
    assert list(kept.content(["x"])["rows"]) == ["x"]


def test_the_same_table_is_taken_up(tmp_path):
    file = kept_table(tmp_path / "t.json")
    kept = KeptTable(str(file), dict(SETTINGS))
    kept.measure_with("these", {})
    assert kept.has("base", "speaker of base")
    assert not kept.has("base", "another speaker")  # its adapter was trained anew
    assert not kept.has("y", "speaker of y")
    assert kept.content(["base"])["rows"]["base"] == {"all": {"f1": 0.1, "vqa": None}}

    # A row that this command does not ask for stays.
    kept.add("y", "speaker of y", {})
    assert list(json.loads(file.read_text())["rows"]) == ["base", "x", "y"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "t.json is no table that can be read .*; delete it, or give another --out"),
        ("", "is no table that can be read"),
        ("[1]", "t.json is no table, or one of another version; delete it"),
        ('{"rows": {}}', "is no table, or one of another version"),
    ],
)
def test_what_is_no_table_is_not_written_over(tmp_path, capsys, content, message):
    file = tmp_path / "t.json"
    file.write_text(content)
    with pytest.raises(DataError, match=message):
        KeptTable(str(file), SETTINGS)
    assert file.read_text() == content

    kept = KeptTable(str(file), SETTINGS, replace=True)
    assert "; it is replaced" in capsys.readouterr().out
    assert kept.rows == {}


def test_a_table_of_other_settings_is_not_written_over(tmp_path, capsys):
    file = kept_table(tmp_path / "t.json")
    others = SETTINGS | {"seed": 1, "embedder": "clip"}
    message = "is a table of other settings .--seed was 0, not 1, --embedder was '', not 'clip'"
    with pytest.raises(DataError, match=message):
        KeptTable(str(file), others)

    kept = KeptTable(str(file), others, replace=True)
    assert not kept.has("base", "speaker of base")
    assert "--seed was 0, not 1" in capsys.readouterr().out


def test_a_table_of_other_photos_is_not_written_over(tmp_path):
    file = kept_table(tmp_path / "t.json")
    kept = KeptTable(str(file), SETTINGS)
    with pytest.raises(DataError, match="was measured with other photos, or with another choice"):
        kept.measure_with("others", {})

    kept = KeptTable(str(file), SETTINGS, replace=True)
    kept.measure_with("others", {})
    assert not kept.has("base", "speaker of base")


def test_without_a_file_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = KeptTable("", SETTINGS)
    kept.measure_with("these", {})
    kept.add("base", "speaker", {})
    assert list(kept.content(["base"])["rows"]) == ["base"]
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------- what is same
class Cpu:
    """The device of a model that is nowhere."""

    class device:
        type = "cpu"


def test_a_speaker_is_known_by_its_files(tmp_path):
    model = tmp_path / "model"
    adapter = tmp_path / "adapter"
    for folder, name in ((model, "model.safetensors"), (adapter, "adapter_model.safetensors")):
        folder.mkdir()
        (folder / name).write_text("weights")
    base = tables.speaker_of(Cpu, str(model))
    adapted = tables.speaker_of(Cpu, str(model), str(adapter))
    assert base != adapted
    assert adapted == tables.speaker_of(Cpu, str(model), str(adapter))

    (adapter / "adapter_model.safetensors").write_text("WEIGHTS")  # as many bytes
    retrained = tables.speaker_of(Cpu, str(model), str(adapter))
    assert retrained != adapted
    assert tables.speaker_of(Cpu, str(model)) == base

    os.utime(model / "model.safetensors", ns=(1, 1))  # was made anew
    assert tables.speaker_of(Cpu, str(model)) != base


# ---------------------------------------------------------------------------------------- the bar
def test_one_bar_is_over_everything():
    """It knows the work of all rows, moves as the model says what is done, and never too far."""
    mllm = Cpu()
    plan = {("base", "describing"): 3 * ANSWER, ("x", "describing"): 2 * ANSWER + 5}
    with Progress(mllm, plan) as progress:
        assert progress.bar.total == 5 * ANSWER + 5
        with progress.part("base", "describing"):
            mllm.on_done("describing", 2)
            assert progress.bar.n == 2 * ANSWER
            assert progress.bar.desc == "base, describing: describing"
            mllm.on_done("describing", 9)
            assert progress.bar.n == 3 * ANSWER
        with progress.part("base", "unforeseen"):
            mllm.on_done("describing", 9)
            assert progress.bar.n == 3 * ANSWER
        with progress.part("x", "describing"):
            mllm.on_done(COMPARING, 5)  # beliefs are quicker than answers
            assert progress.bar.n == 3 * ANSWER + 5
        # Equal prompts are answered once, so that a part may end early.
        assert progress.bar.n == 5 * ANSWER + 5
    assert mllm.on_done is None


def test_the_model_tells_what_is_done(toy_mllm, monkeypatch):
    """Every answer and every belief, and draws no bar of its own."""
    photos = [photo for concept in toy.world(0, 64, 2, 1, 1) for photo in concept.photos]
    told = Counter()

    def on_done(title, count):
        told[title] += count

    monkeypatch.setattr(toy_mllm, "on_done", on_done)
    monkeypatch.setattr(model, "tqdm", partial(quiet_bar, tqdm=model.tqdm))
    toy_mllm.compare(photos, ["A mug.", "A red mug."])
    toy_mllm.embed(photos)
    toy_mllm.answer(VQA, [(photos[0], "a"), (photos[0], "a"), (photos[1], "b")], 2, "answering")
    toy_mllm.greedy(prompts_about(photos)[:5], 2, "describing")
    assert told == {COMPARING: 40, "answering": 2, "describing": 5}


def quiet_bar(*arguments, tqdm, disable, **settings):
    """tqdm, which must not draw."""
    assert disable
    return tqdm(*arguments, disable=True, **settings)
