"""What the pages say is so: their commands run, their tables are the study's, their links exist."""

import functools
import json
import re
import runpy
import shlex
import subprocess
import sys

import pytest

import data
import toy
from conftest import ROOT

PAGES = {}
for page in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "toy-qwen2-vl/README.md"):
    PAGES[page] = (ROOT / page).read_text()
README = PAGES["README.md"]


def commands_of(text):
    """The lines of a page's shell blocks, without comments."""
    commands = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        commands += [line.split("#")[0].strip() for line in block.splitlines()]
    return [command for command in commands if command]


# Whoever runs this test has run these, or runs them now.
NOT_HERE = ("pip install -r requirements.txt", "python -m pytest", "python -m pytest -m slow")
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
SCRIPTS = [name for name in SCRIPTS if 'if __name__ == "__main__"' in (ROOT / name).read_text()]
# Few steps and short answers.
SMALL_RUN = "--steps 2 --games 2 --samples 2 --max-tokens 8 --eval-games 2 --max-pixels 12544"
SMALL = {
    "rrg.py": SMALL_RUN,
    "repic.py": SMALL_RUN,
    "evaluate.py": "--max-tokens 4 --max-pixels 12544",
    "assistant.py": "--max-tokens 4 --max-pixels 12544",
    "report.py": "--max-tokens 4",
    "toy.py": "",
}


# --------------------------------------------------------------------------------------- commands
@pytest.fixture
def newcomer(tmp_path, monkeypatch, byte_folder):
    """A folder with somebody's photos, a hub that is a local folder, and a toy world with fewer
    concepts.   -> the model that stands in for the hub's"""
    monkeypatch.chdir(tmp_path)
    for root in ("my_photos", "hub"):
        for concept in toy.world(1)[:6]:
            folder = tmp_path / root / concept.name
            folder.mkdir(parents=True)
            for number, photo in enumerate(concept.photos):
                photo.load().save(folder / f"IMG {number}.jpg")
    content = (tmp_path / "my_photos" / toy.world(1)[0].name / "IMG 1.jpg").read_bytes()
    (tmp_path / "photo.jpg").write_bytes(content)

    monkeypatch.setattr(toy, "world", functools.partial(toy.world, concepts=4, photos=1))

    def snapshot_download(name, repo_type):
        return str(tmp_path / "hub")

    monkeypatch.setattr(data, "snapshot_download", snapshot_download)
    return str(byte_folder)


def execute(command, model, monkeypatch):
    """Run a command of a page in this process, with a small model in the place of the hub's."""
    program, script, *words = shlex.split(command.replace("Qwen/Qwen2-VL-2B-Instruct", model))
    assert program == "python"
    words += shlex.split(SMALL[script])
    monkeypatch.setattr(sys, "argv", [script, *words])
    runpy.run_path(str(ROOT / script), run_name="__main__")


def test_its_commands_run_one_after_the_other(newcomer, capsys, tmp_path, monkeypatch):
    """As a newcomer types them, in one folder."""
    commands = commands_of(README)
    assert commands[:3] == ["pip install -r requirements.txt", "python rrg.py", "python report.py"]
    for command in commands:
        if command not in NOT_HERE:
            execute(command, newcomer, monkeypatch)
    printed = capsys.readouterr().out
    outcomes = ("because it chose", "None of your things", "No caption")
    assert any(outcome in printed for outcome in outcomes)
    assert (tmp_path / "runs/mine/adapter/adapter_model.safetensors").exists()
    assert (tmp_path / "table.json").exists()
    assert len(list(tmp_path.glob("runs/*/report.html"))) == 1


def exercises():
    section = README.split("## Exercises")[1].split("\n## ")[0]
    return re.findall(r"`(python [^`]+)`", section)


@pytest.mark.parametrize("command", exercises())
def test_its_exercises_run(newcomer, command, tmp_path, monkeypatch):
    execute(command, newcomer, monkeypatch)
    [file] = tmp_path.glob("runs/*/result.json")
    assert json.loads(file.read_text())["after"]["oracle"] is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "benchmarks/speed.py --rounds 1 --games 4 --max-tokens 8 --grow {}/growth.svg",
        "benchmarks/speed.py --ideas --rounds 1 --games 4 --max-tokens 8",
        "benchmarks/speed.py --sharing --rounds 1 --max-tokens 8",
        "benchmarks/memory.py",
        "toy-qwen2-vl/make.py --pictures 400 --vision-steps 2 --language-steps 2 --out {}/toy",
        "toy-qwen2-vl/make.py --card",
    ],
)
def test_the_other_pages_commands_run(command, tmp_path):
    """The study, which takes hours, is run by hand; its tables are tested below."""
    arguments = command.format(tmp_path).split()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert any(f"python {arguments[0]}" in text for text in PAGES.values())


def all_scripts():
    benchmarks = sorted((ROOT / "benchmarks").glob("*.py"))
    return [*SCRIPTS, "toy-qwen2-vl/make.py", *(f"benchmarks/{path.name}" for path in benchmarks)]


@pytest.mark.parametrize("script", all_scripts())
def test_help_teaches(script, monkeypatch, capsys):
    """It says what the script does, shows a command, and says of every option what it is."""
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    printed = capsys.readouterr().out
    assert end.value.code == 0
    name = script.split("/")[-1]
    description = printed.split("\n\n")[1]
    assert description.startswith(f"{name}: ")
    assert f"python {script}" in printed
    without_help = re.findall(r"^  --\S+(?: [A-Z]+)?\n(?! {20})", printed, re.M)
    assert not without_help


# ---------------------------------------------------------------------------------- tables, files
def test_the_tables_are_the_studys():
    """Each table that `study.py --tables` prints of study.csv stands on a page, to the digit."""
    command = [sys.executable, "benchmarks/study.py", "--tables"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = [line for line in done.stdout.splitlines() if line.startswith(("|", "RRG: "))]
    assert len(printed) > 60
    on_pages = {line for text in PAGES.values() for line in text.splitlines()}
    assert not [line for line in printed if line not in on_pages]


@pytest.mark.parametrize("page", PAGES)
def test_files_and_links_exist(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", PAGES[page]):
        assert ((ROOT / page).parent / link).exists(), link


def test_files_that_are_named_exist():
    for text in PAGES.values():
        for name in re.findall(r"`([\w/-]+\.(?:py|csv|svg|png))`", text):
            places = (ROOT, ROOT / "benchmarks", ROOT / "tests", ROOT / "toy-qwen2-vl")
            written_by_a_run = name in ("metrics.csv",)
            assert written_by_a_run or any((place / name).exists() for place in places), name


def test_readme_names_every_script():
    for script in SCRIPTS:
        assert f"`{script}`" in README, script


def test_ci_runs_the_readmes_command():
    assert "README.md" in (ROOT / ".ci/run").read_text()
    assert README.count("\npython -m pytest\n") == 1


@pytest.mark.parametrize("page", PAGES)
def test_nothing_is_left_to_fill_in(page):
    assert "@" not in PAGES[page]
    assert "{{" not in PAGES[page]
