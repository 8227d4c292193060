"""What the README says is so: its commands run, its tables are the study's, its line counts are right."""
import ast
import functools
import io
import re
import runpy
import shlex
import subprocess
import sys
import tokenize

import pytest

import data
import evaluate
import rrg
import toy
from conftest import ROOT

TEXT = (ROOT / "README.md").read_text()
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "benchmarks/README.md", "toy-qwen2-vl/README.md")}
COMMANDS = {name: [line.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
            for name, text in PAGES.items()}
SCRIPTS = ["rrg.py", "grpo.py", "reward.py", "data.py", "evaluate.py", "toy.py"]
HERE = ("pip install -r requirements.txt", "python -m pytest", "python -m pytest -m slow")  # whoever runs this test has run the first two
SMALL = {"rrg.py": "--steps 2 --games 2 --samples 2 --max-tokens 8 --eval-games 2 --max-pixels 12544", "evaluate.py": "--max-tokens 4 --max-pixels 12544"}


# --------------------------------------------------------------------------------------------------------------- commands
@pytest.fixture
def newcomer(tmp_path, monkeypatch, byte_folder):
    """A folder with somebody's photos, a hub that is a local folder, and a toy world with fewer things."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "world", functools.partial(toy.world, concepts=4, views=2))
    for root in ("my_photos", "hub"):
        for concept in toy.world(1)[:6]:
            for number, photo in enumerate(concept.photos):
                (folder := tmp_path / root / concept.name).mkdir(parents=True, exist_ok=True)
                photo.open().save(folder / f"IMG {number}.jpg")
    (tmp_path / "photo.jpg").write_bytes((tmp_path / "my_photos/mug-1/IMG 1.jpg").read_bytes())
    monkeypatch.setattr(data, "snapshot_download", lambda name, repo_type: str(tmp_path / "hub"))
    return str(byte_folder)


def execute(command, model):
    """Run a command of the page in this process, with few steps and short answers, and a small model in the place of the hub's."""
    program, script, *words = shlex.split(command.replace("Qwen/Qwen2-VL-2B-Instruct", model))
    if program == "torchrun":  # two processes are started by tests/test_rrg.py
        program, script, *words = program, words[0], *words[1:]
        return rrg.settings(words)
    small = [] if "--resume" in words else shlex.split(SMALL[script])
    return rrg.train(*rrg.settings(words + small)) if script == "rrg.py" else evaluate.main(evaluate.settings(words + small))


def test_its_commands_run_one_after_the_other(newcomer, capsys, tmp_path):
    """As a newcomer types them, in one folder."""
    asked = [command for command in COMMANDS["README.md"] if command not in HERE]
    assert asked[:2] == ["python rrg.py", "python evaluate.py --report"] and COMMANDS["README.md"][:2] == ["pip install -r requirements.txt", "python rrg.py"]
    for command in asked:
        execute(command, newcomer)
    said = capsys.readouterr().out
    assert "because it chose" in said or "No caption" in said
    assert (tmp_path / "runs/mine/adapter/adapter_model.safetensors").exists() and (tmp_path / "dreambooth.json").exists()
    assert len(list(tmp_path.glob("runs/*/report.html"))) == 1


@pytest.mark.parametrize("command", re.findall(r"`(python rrg\.py[^`]+)`", TEXT.split("## Exercises")[1].split("\n## ")[0]))
def test_its_exercises_run(newcomer, command):
    result = execute(command, newcomer)
    assert result["after"]["oracle"] is not None


def test_the_real_models_defaults_are_the_papers():
    for command in COMMANDS["README.md"]:
        if command.startswith("python rrg.py --model Qwen"):
            config, _ = rrg.settings(shlex.split(command)[2:])
            assert (config.lr, config.rank, config.alpha, config.samples, config.k, config.beta) == (1e-5, 64, 128, 8, 3, 0.04)
            assert config.steps * config.games == 500 * 4


@pytest.mark.slow
@pytest.mark.parametrize("command", [
    "benchmarks/speed.py --rounds 1 --games 4 --max-tokens 8 --grow {}/growth.svg", "benchmarks/ideas.py --rounds 1", "benchmarks/sharing.py --rounds 1",
    "benchmarks/memory.py", "toy.py --pictures 400 --vision-steps 2 --language-steps 2 --out {}/toy", "toy.py --card"])
def test_the_other_pages_commands_run(command, tmp_path):
    """The study, which takes hours, is run by hand; `--tables` below."""
    done = subprocess.run([sys.executable, *command.format(tmp_path).split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = {line.split()[1] for page in COMMANDS.values() for line in page if line.startswith("python ") and line.split()[1].endswith(".py")}
    assert command.split()[0] in names


@pytest.mark.parametrize("script", ["rrg.py", "evaluate.py", "toy.py", *(f"benchmarks/{path.name}" for path in sorted((ROOT / "benchmarks").glob("*.py")))])
def test_help_teaches(script, monkeypatch, capsys):
    """It shows the commands, and says of every option what it is."""
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    said = capsys.readouterr().out
    assert end.value.code == 0 and "python " + script in said
    assert not re.findall(r"^  --\S+(?: [A-Z]+)?\n(?! {20})", said, re.M), "an option without a word of help"


# ------------------------------------------------------------------------------------------------------------ tables, files
def test_its_tables_are_the_studys():
    """Every table that `study.py --tables` prints of the CSV beside it stands on one of the two pages, to the digit."""
    done = subprocess.run([sys.executable, "benchmarks/study.py", "--tables"], cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("|", "RRG: "))]
    there = {line for page in PAGES.values() for line in page.splitlines()}
    assert done.returncode == 0 and len(lines) > 60
    assert not [line for line in lines if line not in there]


def code_lines(path):
    """The numbers of the lines that hold code: no comments, docstrings or blanks."""
    tree, lines, silent = ast.parse(path.read_text()), set(), (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        lines |= set(range(token.start[0], token.end[0] + 1)) if token.type not in (*silent, tokenize.ENDMARKER) else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def test_its_line_counts_are_right():
    counts = {name: int(count) for name, count in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", TEXT, re.M)}
    assert counts == {name: len(code_lines(ROOT / name)) for name in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS)
def test_functions_are_short(script):
    """40 lines of code at most; the training loop, 80."""
    lines = code_lines(ROOT / script)
    for node in ast.walk(ast.parse((ROOT / script).read_text())):
        if isinstance(node, ast.FunctionDef):
            count = len(lines & set(range(node.lineno, node.end_lineno + 1)))
            assert count <= (80 if (script, node.name) == ("rrg.py", "train") else 40), f"{node.name} has {count}"


@pytest.mark.parametrize("name", PAGES)
def test_files_and_links_exist(name):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", PAGES[name]):
        assert ((ROOT / name).parent / link).exists(), link


def test_ci_runs_the_readmes_command():
    assert "README.md" in (ROOT / ".ci/run").read_text() and TEXT.count("\npython -m pytest\n") == 1


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_left_to_fill_in(name):
    assert "@@" not in PAGES[name] and "{{" not in PAGES[name]
