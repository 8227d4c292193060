"""The README's commands are the program's commands."""
import re
import shlex
import subprocess
import sys

import pytest

import evaluate
import rrg
from conftest import ROOT

TEXT = (ROOT / "README.md").read_text()
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.splitlines()]


def test_the_readme_shows_the_commands_it_should():
    assert COMMANDS[:2] == ["pip install -r requirements.txt", "python rrg.py"] and "python -m pytest" in COMMANDS


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python rrg.py") and "--resume" not in c])
def test_training_commands_are_understood(command):
    config, resume = rrg.settings(shlex.split(command)[2:])
    assert not resume and config.out
    if "Qwen" in command:
        assert (config.lr, config.rank, config.alpha, config.samples, config.k, config.beta) == (1e-5, 64, 128, 8, 3, 0.04)  # as the README says


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python evaluate.py")])
def test_evaluation_commands_are_understood(command):
    assert evaluate.settings(shlex.split(command)[2:]).k == 3


@pytest.mark.parametrize("script", ["rrg.py", "evaluate.py", "toy.py", "benchmarks/picture.py", "benchmarks/sharing.py",
                                    "benchmarks/study.py", "benchmarks/speed.py"])
def test_help_teaches(script):
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "python " + script in done.stdout


def test_its_tables_are_the_studys():
    """Every table that `study.py --report` prints of the CSV beside it stands in the README, to the digit."""
    done = subprocess.run([sys.executable, "benchmarks/study.py", "--report"], cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("|", "RRG: "))]
    assert done.returncode == 0 and len(lines) > 60
    assert not [line for line in lines if line not in TEXT.splitlines()]


def test_files_and_links_exist():
    for name in re.findall(r"\]\((?!http)([^)]+)\)|^\| `([^`]+)`", TEXT, re.M):
        assert (ROOT / (name[0] or name[1])).exists(), name


def test_ci_runs_the_readmes_command():
    assert "README.md" in (ROOT / ".ci/run").read_text() and TEXT.count("\npython -m pytest\n") == 1


def test_nothing_is_left_to_fill_in():
    assert "@@" not in TEXT
