"""The figures of the README are drawn from finished runs."""

import sys

import pytest
from PIL import Image

import rrg
import run
import toy
from conftest import ROOT
from data import DataError

sys.path.insert(0, str(ROOT / "benchmarks"))

import picture  # noqa: E402

WIDTH = 16 + 4 * 206 + 16  # the target and three photos


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of three runs of one step: with the hard positive, with the easy one, and with
    the easy one and another seed."""
    root = tmp_path_factory.mktemp("runs")
    short = ["--steps", "1", "--games", "1", "--samples", "2", "--eval-games", "6"]
    for name, options in (
        ("hard", []),
        ("easy", ["--positive", "easy"]),
        ("other", ["--seed", "1", "--positive", "easy"]),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["rrg.py", "--out", str(root / name), *short, *options])
            rrg.main()
    return root


def draw(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["picture.py", *map(str, arguments)])
    picture.main()


def test_one_run_is_drawn_as_six_stages(runs, monkeypatch):
    draw(monkeypatch, runs / "hard")
    with Image.open(runs / "hard/game.png") as image:
        assert image.size == (WIDTH, 52 + 190 + 2 * 110 + 30)


def test_two_runs_are_drawn_with_the_easy_positive(runs, monkeypatch, tmp_path):
    draw(monkeypatch, runs / "hard", runs / "easy", "--out", tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (WIDTH + 206, 52 + 190 + 3 * 110 + 30)


def test_the_easy_positive_is_of_the_targets_occasion(runs, toy_mllm):
    """It is shown beside the pool, and the listener is asked about it, too."""
    of_runs = []
    for name in ("hard", "easy"):
        examples = run.load_json(runs / name / "result.json")["examples"]
        of_runs.append({when: games[0] for when, games in examples.items()})
    concepts, _ = rrg.load_world(toy_mllm, "", 0)
    target, shown, answers, _ = picture.two_runs(*of_runs, toy_mllm, concepts, 0)
    easy, *pool = shown
    [hard] = [photo for photo in pool if photo.is_positive]
    assert not easy.in_pool
    assert easy.photo.truth == target.truth
    for kind in toy.SUBJECT:
        assert hard.photo.truth[kind] == target.truth[kind]
    assert hard.photo.truth != target.truth
    assert [said.when for said in answers] == ["before", "easy positive", "hard positive"]
    assert all(len(said.beliefs) == 4 for said in answers if said.beliefs)


def test_runs_in_the_other_order_are_refused(runs, monkeypatch):
    with pytest.raises(DataError, match="was trained with the easy positive: give the run with"):
        draw(monkeypatch, runs / "easy", runs / "hard")


def test_runs_of_other_games_are_refused(runs, monkeypatch):
    with pytest.raises(DataError, match="give both the same --seed and --data"):
        draw(monkeypatch, runs / "hard", runs / "other")


def test_the_reward_is_that_of_the_pool():
    """The easy positive, which the listener believes in, is no part of the game."""
    photos = [
        picture.Shown(None, "", "", in_pool=False),
        picture.Shown(None, "", ""),
        picture.Shown(None, "", "", is_positive=True),
    ]
    said = picture.Said("after", "", "", [1.0, 0.2, 0.6])
    assert picture.reward_of(said, photos) == pytest.approx(0.75)
