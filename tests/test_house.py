"""What keeps the house as it is: who imports whom, where RePIC is spoken of, and how code looks."""

import ast
import re

import pytest

from conftest import ROOT

# Each script imports exactly these others, which stand above it: so there is no circle. The paper,
# grpo to rrg, needs nothing of what stands below it.
IMPORTS = {
    "grpo": "",
    "lora": "",
    "reward": "",
    "data": "lora",
    "model": "data grpo reward",
    "run": "data lora",
    "toy": "data reward run",
    "rrg": "data grpo lora model reward run toy",
    "repic": "data grpo lora model rrg run toy",
    "tables": "data lora model run",
    "assistant": "data lora model reward run toy",
    "protocols": "assistant data rrg run toy",
    "naming": "assistant data lora model repic rrg run tables toy",
    "evaluate": "assistant data lora model naming protocols rrg run tables toy",
    "report": "data evaluate grpo lora model repic reward rrg run toy",
}
OPTIONAL = {"datasets", "peft", "trl"}  # what a benchmark compares with, where it is installed
PAPER = ("grpo", "lora", "reward", "data", "model", "rrg")
SCRIPTS = sorted(ROOT.glob("*.py"))
PROGRAMS = SCRIPTS + sorted(ROOT.glob("toy-qwen2-vl/*.py")) + sorted(ROOT.glob("benchmarks/*.py"))
FILES = PROGRAMS + sorted(ROOT.glob("tests/*.py"))


def file_name(path):
    return str(path.relative_to(ROOT))


def every_file(files):
    """Run a test once for each of these files."""
    return pytest.mark.parametrize("path", files, ids=file_name)


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree):
    """-> names of the modules that are imported anywhere in a file"""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def functions(tree):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


# -------------------------------------------------------------------------------- who imports whom
def test_every_script_has_its_place():
    assert {path.stem for path in SCRIPTS} == set(IMPORTS)


@every_file(SCRIPTS)
def test_a_script_imports_what_stands_above_it(path):
    local = {file.stem for file in FILES}
    found = imports(parse(path)) & local
    assert found == set(IMPORTS[path.stem].split())
    order = list(IMPORTS)
    above = set(order[: order.index(path.stem)])
    assert found <= above


@every_file(FILES)
def test_nothing_is_imported_inside_a_function(path):
    for function in functions(parse(path)):
        assert imports(function) <= OPTIONAL, function.name


@pytest.mark.parametrize("script", PAPER)
def test_the_paper_does_not_speak_of_what_it_is_compared_with(script):
    text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    # rrg.py may name the script that shares its settings.
    allowed = text.replace("repic.py shares", "") if script == "rrg" else text
    assert not re.findall(r"RePIC|repic|\bSFT\b|\bHTML\b", allowed)


# ----------------------------------------------------------------------------------- how code looks
def code_lines(function, lines):
    """How many lines of a function are code: no docstring, comment or blank line."""
    first = function.body[0]
    docstring = set()
    if ast.get_docstring(function) is not None:
        docstring = set(range(first.lineno, first.end_lineno + 1))
    count = 0
    for number in range(function.lineno, function.end_lineno + 1):
        line = lines[number - 1].strip()
        if line and not line.startswith("#") and number not in docstring:
            count += 1
    return count


@every_file(FILES)
def test_functions_are_short(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    for function in functions(parse(path)):
        assert code_lines(function, lines) <= 60, function.name


@every_file(FILES)
def test_lines_are_short(path):
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        assert len(line) <= 100, f"line {number}"


# ---------------------------------------------------------------------------------------- safety
@every_file(PROGRAMS)
def test_nothing_is_run_from_data(path):
    """No pickle, and no code that comes with a checkpoint."""
    text = path.read_text(encoding="utf-8")
    assert "trust_remote_code" not in text.replace("trust_remote_code=False", "")
    assert "pickle" not in text.replace("allow_pickle=False", "").replace("no pickle", "")
    for node in ast.walk(parse(path)):
        call = ast.unparse(node)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert "weights_only=True" in call, f"line {node.lineno}"
        if isinstance(node, ast.Call) and re.match(r"Auto\w+\.from_pretrained", call):
            assert "trust_remote_code=False" in call, f"line {node.lineno}"
