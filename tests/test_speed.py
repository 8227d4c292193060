"""benchmarks/speed.py times ways to make a training step on the same work, and stops where the work
is not the same."""

import json
import subprocess
import sys

import pytest
import torch

from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import run  # noqa: E402
import speed  # noqa: E402
from model import MLLM  # noqa: E402

SMALL = "--games 3 --micro 2 --samples 2 --max-tokens 8 --rounds 1"


@pytest.fixture(scope="module")
def work():
    """Three games, in two micro-batches of different sizes."""
    small = {"games": 3, "micro": 2, "samples": 2, "max_tokens": 8}
    options = run.fill_in(speed.Options, small, is_toy=False)
    mllm = MLLM(options.model, speed.MAX_PIXELS)
    speed.prepare_training(mllm, options)
    return speed.make_work(mllm, options)


def gradient_of(way, reference):
    """-> all gradients of an update [parameters]"""
    way.mllm.model.zero_grad()
    way.update(reference)
    gradients = [p.grad.flatten() for p in way.mllm.model.parameters() if p.requires_grad]
    way.mllm.model.zero_grad()
    return torch.cat(gradients)


def run_speed(options, tmp_path):
    """Run the script with --json.   -> (what it printed, what it kept)"""
    file = tmp_path / "speed.json"
    command = [sys.executable, "benchmarks/speed.py", *options.split(), "--json", file]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(file.read_text())


# ---------------------------------------------------------------------------------- the same work
def test_all_answers_have_the_same_length(work):
    assert work.answers.mask.all()
    assert work.answers.ids.shape == (6, 8)
    usual = speed.UsualWay(work)
    assert usual.rollout().shape == (6, 8)


def test_both_ways_come_to_the_same(work):
    ours = speed.OurWay(work)
    usual = speed.UsualWay(work)
    beliefs = ours.listen()  # [N * K]
    assert beliefs.shape == (18,)
    assert torch.allclose(beliefs, usual.listen(), atol=1e-5)

    reference = ours.reference()  # [N, C]
    assert torch.allclose(reference, usual.reference(), atol=1e-5)
    changed = (reference - work.answers.logps).abs().max()
    assert changed > 1e-5  # the adapters change something

    gradient = gradient_of(ours, reference)
    assert gradient.norm() > 0
    assert torch.allclose(gradient, gradient_of(usual, reference), atol=1e-6)


def test_a_step_is_timed_by_phases(work):
    costs = speed.measure([speed.OurWay(work), speed.UsualWay(work)], rounds=1)
    assert set(costs) == {"ours", "usual"}
    for cost in costs.values():
        assert tuple(cost.seconds) == speed.PHASES
        assert cost.step == sum(cost.seconds.values())


def test_ways_that_differ_are_noticed(work):
    step = speed.make_step(speed.OurWay(work))
    speed.check_agreement(step, step, exact=1e-4)
    off = speed.Timed(step["update"].result + 0.01, seconds=1.0, peak=0.0)
    with pytest.raises(AssertionError, match="do not agree in update"):
        speed.check_agreement(step, step | {"update": off}, exact=1e-4)


# ------------------------------------------------------------------------------------- the tables
def test_a_step_of_trl_is_timed_as_well(tmp_path):
    for name in ("trl", "peft"):
        pytest.importorskip(name, reason='pip install "trl[peft]==1.16.0" to compare with it')
    printed, kept = run_speed(SMALL, tmp_path)
    assert "TRL's GRPOTrainer" in printed
    assert kept["ratio"]["step_trl"] > 0
    phases = {"rollout", "listen", "reference", "update", "step"}
    assert set(kept["seconds"]["trl"]) == phases


@pytest.mark.slow
def test_growth_is_measured_and_drawn(tmp_path):
    picture = tmp_path / "growth.svg"
    printed, kept = run_speed(f"{SMALL} --grow {picture}", tmp_path)
    assert "| phase | ours, s | usual, s | ratio | floor, s |" in printed
    keys = {"seconds", "peak_gib", "floor", "ratio", "growth", "device", "arguments"}
    assert set(kept) == keys
    assert picture.read_text().count('fill="#2471a3"') == len(kept["growth"]) == 16


@pytest.mark.slow
def test_ideas_are_measured(tmp_path):
    printed, kept = run_speed(f"{SMALL} --ideas", tmp_path)
    assert "| idea | part of a step | with, ms | without, ms | ratio | |" in printed
    assert len(kept["ideas"]) == 11
    for idea in kept["ideas"]:
        assert f"| {idea['idea']} |" in printed


@pytest.mark.slow
def test_sharing_changes_no_answer(tmp_path):
    options = "--sharing --photos 2 --concepts 3 --rounds 1 --max-tokens 32"
    printed, kept = run_speed(options, tmp_path)
    assert "2 photos x 3 descriptions = 6 pairs" in printed
    ways = kept["sharing"]
    assert set(ways) == {"ours", "batched", "one by one"}
    assert all(way["same"] == 1 for way in ways.values())
