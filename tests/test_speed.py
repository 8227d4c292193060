"""benchmarks/speed.py times the ways to a training step on the same work, and stops where the work is not the same."""
import json
import subprocess
import sys

import pytest

from conftest import ROOT


def test_a_step_of_trl_is_timed_beside_ours(tmp_path):
    for name in ("trl", "peft"):
        pytest.importorskip(name, reason='pip install "trl[peft]==1.16.0" to compare with it')
    command = "benchmarks/speed.py --games 3 --micro 2 --samples 2 --max-tokens 8 --rounds 1 --json".split()
    done = subprocess.run([sys.executable, *command, tmp_path / "speed.json"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "TRL's GRPOTrainer" in done.stdout, done.stderr
    kept = json.loads((tmp_path / "speed.json").read_text())
    assert kept["ratio"]["step_trl"] > 0 and set(kept["seconds"]["trl"]) == {"rollout", "listen", "reference", "update", "step"}
