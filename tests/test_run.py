"""A run: its options, its folder, how it goes on after it was killed, and several processes."""

import csv
import dataclasses
import functools
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

import lora
import repic
import rrg
import run
import toy
from conftest import ROOT
from data import Concept, DataError, Photo, Split
from run import option

# dapo, since its division by the tokens of all processes is the most to go wrong.
SMALL = "--steps 4 --games 4 --samples 4 --eval-games 5 --save-every 2 --loss dapo".split()


# ------------------------------------------------------------------- helpers, of other tests too
def shrink_world(monkeypatch):
    """Four concepts of each category and three photos of each, which takes a second to draw."""
    small = functools.partial(toy.world, concepts=4, occasions=3, photos=1)
    monkeypatch.setattr(toy, "world", small)


def play(out, *options):
    """A run of the game in this process.   -> the content of result.json"""
    config, resume = rrg.read_settings(["--out", str(out), *options])
    return rrg.train(config, resume)


def play_as_script(monkeypatch, *arguments):
    """`python rrg.py ARGUMENTS` in this process: failures end in SystemExit, as there."""
    monkeypatch.setattr(sys, "argv", ["rrg.py", *map(str, arguments)])
    run.main(rrg.main, resumable=True)


def start(*arguments):
    """`python ARGUMENTS` in a process of its own."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    """Wait for a process that must succeed.   -> what it printed"""
    printed, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    return printed


def read_metrics(folder):
    """The rows of metrics.csv as texts, without the wall time."""
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["seconds"]
    return rows


def read_result(folder):
    return json.loads((folder / "result.json").read_text())


def check_same_run(folder, other):
    """The two runs came to the same adapter, logs and results, to the byte."""
    for name in ("adapter/adapter_model.safetensors", "samples.jsonl"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()
    assert read_metrics(folder) == read_metrics(other)
    for when in ("before", "after", "examples"):
        assert read_result(folder)[when] == read_result(other)[when]


# ------------------------------------------------------------------------------- the whole script
@dataclass
class Run:
    folder: pathlib.Path
    printed: str


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """`python rrg.py`, four steps of it."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    printed = finish(start("rrg.py", "--out", folder, *SMALL))
    return Run(folder, printed)


def test_a_run_records_what_it_was(whole_run):
    config = json.loads((whole_run.folder / "config.json").read_text())
    assert config["command"].startswith("python rrg.py --out")
    assert config["method"] == "rrg"
    assert {"python", "torch", "transformers"} <= set(config["versions"])
    assert config["settings"]["lr"] == 5e-4  # the toy model's
    assert config["settings"]["steps"] == 4

    names = {path.name for path in whole_run.folder.iterdir()}
    assert names == {
        "adapter",
        "config.json",
        "metrics.csv",
        "result.json",
        "samples.jsonl",
        "state.previous.pt",
        "state.pt",
    }


def test_a_run_records_its_steps(whole_run):
    rows = read_metrics(whole_run.folder)
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert set(rows[0]) == set(rrg.METRICS) - {"seconds"}
    assert all(row[name] for row in rows for name in row)  # no cell is empty in the toy world

    lines = (whole_run.folder / "samples.jsonl").read_text().splitlines()
    games = [json.loads(line) for line in lines]
    assert [game["step"] for game in games] == [1, 2, 3, 4]
    assert {"concept", "target", "pool", "answer"} <= set(games[0])
    assert len(games[0]["samples"]) == 4
    assert {"text", "reward", "rho"} <= set(games[0]["samples"][0])


def test_a_run_records_its_result(whole_run):
    result = read_result(whole_run.folder)
    assert set(result) == {
        "before",
        "after",
        "seed",
        "steps",
        "seconds",
        "device",
        "examples",
    }
    figures = set(rrg.HELD_OUT)
    for when in ("before", "after"):
        assert set(result[when]) == figures | {"unseen"}
        assert set(result[when]["unseen"]) == figures
        assert all(0 <= result[when][name] <= 1 for name in figures)
    assert len(result["examples"]["after"]) == 5  # of six, since only five games are held out

    assert "identification" in whole_run.printed
    assert "before" in whole_run.printed
    assert whole_run.printed.count("the listener sees") == 3


def test_a_killed_run_goes_on_to_the_same_bytes(whole_run, tmp_path):
    process = start("rrg.py", "--out", tmp_path, *SMALL)
    # Saved after step 2, killed after step 3.
    while not (tmp_path / "metrics.csv").exists() or len(read_metrics(tmp_path)) < 3:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.communicate()
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("4,0.1")  # half a row
    assert not (tmp_path / "result.json").exists()

    finish(start("rrg.py", "--out", tmp_path, "--resume"))
    check_same_run(tmp_path, whole_run.folder)


def check_nearly_same_run(folder, other):
    """The two runs differ only by rounding."""
    rows = read_metrics(folder)
    other_rows = read_metrics(other)
    assert len(rows) == len(other_rows)
    for row, other_row in zip(rows, other_rows, strict=True):
        for name in row:
            assert float(row[name]) == pytest.approx(float(other_row[name]), abs=1e-3), name

    tensors = load_file(folder / "adapter/adapter_model.safetensors")
    others = load_file(other / "adapter/adapter_model.safetensors")
    for name, tensor in tensors.items():
        assert torch.allclose(tensor, others[name], atol=1e-5)
    assert read_result(folder)["before"] == read_result(other)["before"]


def start_two(out, *options):
    """Two processes by torchrun, which meet through gloo where there is no GPU."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    return start(*torchrun, "rrg.py", "--out", out, *options)


def test_two_processes_play_the_run_of_one(whole_run, tmp_path):
    printed = finish(start_two(tmp_path, *SMALL))
    assert printed.count("held-out games") == 1  # only the first process speaks
    check_nearly_same_run(tmp_path, whole_run.folder)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["grpo", "dr_grpo"])
def test_two_processes_play_the_run_of_one_with_the_other_losses(loss, tmp_path):
    options = [*SMALL, "--loss", loss]
    finish(start("rrg.py", "--out", tmp_path / "one", *options))
    finish(start_two(tmp_path / "two", *options))
    check_nearly_same_run(tmp_path / "two", tmp_path / "one")


# ------------------------------------------------------------------------------------- going on
def test_ctrl_c_says_how_to_go_on_and_resume_comes_to_the_same_numbers(tmp_path, monkeypatch):
    shrink_world(monkeypatch)
    play(tmp_path / "whole", *SMALL)

    def games_until_ctrl_c(games, step, size, seed):
        if step == 3:
            signal.raise_signal(signal.SIGINT)
        return games_of_step(games, step, size, seed)

    games_of_step = rrg.games_of_step
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(rrg, "games_of_step", games_until_ctrl_c)
        with pytest.raises(SystemExit, match="stopped; .* goes on with --resume"):
            play_as_script(patch, "--out", stopped, *SMALL)
    assert len(read_metrics(stopped)) == 3
    state = torch.load(stopped / "state.pt", weights_only=True)
    assert state["step"] == 2  # so the third step is played again

    play(stopped, "--resume")
    check_same_run(stopped, tmp_path / "whole")


def test_a_run_that_is_finished_can_be_resumed_and_stays_what_it_is(tmp_path, monkeypatch):
    shrink_world(monkeypatch)
    options = "--steps 1 --games 2 --samples 2 --eval-games 2 --max-tokens 8".split()
    first = play(tmp_path, *options)
    assert play(tmp_path, "--resume") == first
    assert len(read_metrics(tmp_path)) == 1


def small_state(random_mllm):
    """Adapters on a model, and an optimizer that has made one step."""
    lora.add_lora(random_mllm.model, 2, 4)
    adapters = [p for p in random_mllm.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=0.1)
    sum(p.sum() for p in adapters).backward()
    optimizer.step()
    return optimizer


HEADING = "step,reward\n"


def test_logs_are_cut_to_whole_lines_up_to_the_last_save(tmp_path, capsys):
    log = tmp_path / "metrics.csv"
    log.write_text("step,reward\n1,0.5\n2,0.5\n3,0.5\n4,0.")
    run.cut_log(log, 3, HEADING)
    assert log.read_text() == "step,reward\n1,0.5\n2,0.5\n3,0.5\n"
    run.cut_log(log, 2, HEADING)
    assert log.read_text() == "step,reward\n1,0.5\n2,0.5\n"

    samples = tmp_path / "samples.jsonl"
    samples.write_text('{"step": 1}\n{"step": 2, "a": 1}\n{"step": 3}\n')
    run.cut_log(samples, 2)
    assert samples.read_text() == '{"step": 1}\n{"step": 2, "a": 1}\n'
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("lost", ["", "1,0.5\n2,0.5\n", "\n1,0.5\n\n2,0.5\n3,0"])
def test_a_log_without_its_heading_gets_it_back(lost, tmp_path):
    log = tmp_path / "metrics.csv"
    log.write_text(lost)
    run.cut_log(log, 2, HEADING)
    rows = "1,0.5\n2,0.5\n" if lost else ""
    assert log.read_text() == HEADING + rows


def test_rows_that_are_lost_are_spoken_of(tmp_path, capsys):
    run.cut_log(tmp_path / "missing.csv", 2, HEADING)  # which a power cut can lose
    assert (tmp_path / "missing.csv").read_text() == HEADING
    assert "missing.csv has lost 2 of 2 rows" in capsys.readouterr().out
    (tmp_path / "torn.csv").write_text("step,reward\n1,0.5\n3,0.5\n")
    run.cut_log(tmp_path / "torn.csv", 3, HEADING)
    assert "torn.csv has lost 1 of 3 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    [
        b"name,price\nmug,3\n",  # a table of something else
        b"step,reward\n1,0.5,7\n",
        b"1,0.5\nstep,loss\n",
        b"\xff\xfe\x00 not a text\n",
        b"<html>\n",
    ],
)
def test_a_metrics_csv_that_is_none_is_refused_and_stays(content, tmp_path):
    log = tmp_path / "metrics.csv"
    log.write_bytes(content)
    message = "metrics.csv is not the log of this run; move it away, then --resume begins it anew"
    with pytest.raises(DataError, match=message) as refusal:
        run.cut_log(log, 4, HEADING)
    assert "\n" not in str(refusal.value)
    assert log.read_bytes() == content


def test_a_samples_jsonl_that_is_none_is_refused(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"step": 1}\n{"photo": 1}\n')
    with pytest.raises(DataError, match="is not the log of this run"):
        run.cut_log(tmp_path / "samples.jsonl", 1)


def test_save_and_restore(random_mllm, tmp_path):
    optimizer = small_state(random_mllm)
    folder = run.Folder(rrg.Config(out=str(tmp_path)), "rrg", ["step"], resume=False)
    saved = run.State(step=4, seconds=1.5, before={"figures": {}})
    folder.begin(random_mllm.device)
    folder.save(saved, random_mllm.model, optimizer)

    state = lora.lora_state(random_mllm.model)
    before = {name: tensor.clone() for name, tensor in state.items()}
    optimizer.step()  # by the momentum alone
    assert not all(torch.equal(tensor, before[name]) for name, tensor in state.items())

    assert folder.restore(random_mllm.model, optimizer) == saved
    state = lora.lora_state(random_mllm.model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())


def test_what_changed_in_words():
    before = {"a": "1", "b": "2", "c": "3"}
    assert run.what_changed(before, dict(before)) == ""
    now = {"b": "2", "c": "4", "d": "5", "e": "6"}
    words = "1 gone, such as a; 2 new, such as d; 1 changed, such as c"
    assert run.what_changed(before, now) == words


def test_the_state_of_another_model_is_refused(random_mllm, tmp_path):
    optimizer = small_state(random_mllm)
    folder = run.Folder(rrg.Config(out=str(tmp_path)), "rrg", ["step"], resume=False)
    folder.save(run.State(4, 1.5, {}), random_mllm.model, optimizer)

    content = torch.load(tmp_path / "state.pt", weights_only=True)
    renamed = {f"renamed.{name}": tensor for name, tensor in content["lora"].items()}
    torch.save(content | {"lora": renamed}, tmp_path / "state.pt")
    with pytest.raises(DataError, match="is of another model"):
        folder.restore(random_mllm.model, optimizer)

    # Of the same layers, but wider.
    wider = {name: torch.zeros(3, *tensor.shape) for name, tensor in content["lora"].items()}
    torch.save(content | {"lora": wider}, tmp_path / "state.pt")
    with pytest.raises(DataError, match="is of another model"):
        folder.restore(random_mllm.model, optimizer)


@pytest.mark.parametrize("content", [b"", b"not a state\n", bytes(999), b"PK\3\4" + bytes(99)])
def test_a_state_that_is_none_is_refused_in_one_line(content, tmp_path):
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(DataError) as refusal:
        run.load_state(tmp_path)
    message = str(refusal.value)
    assert message.startswith(f"{tmp_path}/state.pt is torn, or not the state of a run of this ver")
    assert message.endswith(
        "to begin a new run, leave --resume out and give another --out, or none"
    )
    assert "\n" not in message


@pytest.mark.parametrize("content", [[1, 2], {"weights": torch.zeros(2)}, torch.zeros(2), 7])
def test_a_file_of_torchs_that_is_no_state_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(DataError, match="is torn, or not the state of a run of this version"):
        run.load_state(tmp_path)


def test_a_torn_state_says_how_to_go_back_and_the_run_comes_to_the_same_numbers(
    tmp_path, monkeypatch
):
    shrink_world(monkeypatch)
    options = "--steps 3 --games 2 --samples 2 --eval-games 2 --save-every 1 --max-tokens 8".split()
    whole = tmp_path / "whole"
    play(whole, *options)
    assert torch.load(whole / "state.previous.pt", weights_only=True)["step"] == 2

    out = tmp_path / "a run"  # with a space, which the command must quote
    shutil.copytree(whole, out)
    (out / "result.json").unlink()
    os.truncate(out / "state.pt", (out / "state.pt").stat().st_size // 2)
    with pytest.raises(DataError, match="state.pt is torn, or not the state of a run") as refusal:
        play(out, "--resume")
    message = str(refusal.value)
    assert "\n" not in message
    command = re.search("to go back to the save before it: (.*), then --resume again", message)[1]
    subprocess.run(shlex.split(command), check=True)
    play(out, "--resume")
    check_same_run(out, whole)


def test_a_state_of_another_run_is_refused(random_mllm, tmp_path):
    """Where a run lies and how its games are cut up do not matter."""
    optimizer = small_state(random_mllm)
    folder = run.Folder(rrg.Config(out=str(tmp_path)), "rrg", ["step"], resume=False)
    folder.begin(random_mllm.device)
    folder.save(run.State(4, 1.5, {}), random_mllm.model, optimizer)
    content = torch.load(tmp_path / "state.pt", weights_only=True)

    settings = content["settings"] | {"out": "elsewhere", "micro": 7, "data": "moved"}
    torch.save(content | {"settings": settings}, tmp_path / "state.pt")
    assert folder.restore(random_mllm.model, optimizer).step == 4
    torch.save(content | {"settings": settings | {"seed": 8}}, tmp_path / "state.pt")
    with pytest.raises(DataError, match="is of another run: --seed was 8, not 0"):
        folder.restore(random_mllm.model, optimizer)


def test_a_lost_state_says_how_to_go_on(tmp_path):
    write_run(tmp_path, dataclasses.asdict(rrg.Config()))
    os.rename(tmp_path / "state.pt", tmp_path / "state.previous.pt")
    with pytest.raises(DataError, match="has no state.pt; to go back to the save before it: mv "):
        run.resumed_settings(rrg.Config, {"out": str(tmp_path)})
    with pytest.raises(DataError, match="holds a run already"):
        run.Folder(rrg.Config(out=str(tmp_path)), "rrg", ["step"], resume=False)


def write_run(folder, settings):
    """A run folder that --resume finds."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.pt").write_text("")
    record = {"command": "python x.py --y", "settings": settings}
    (folder / "config.json").write_text(json.dumps(record))


def test_resume_keeps_the_settings(tmp_path):
    write_run(tmp_path, dataclasses.asdict(rrg.Config(out="elsewhere", lr=5e-4)))
    same = {"out": str(tmp_path), "lr": 5e-4}
    assert run.resumed_settings(rrg.Config, same).lr == 5e-4
    # The folder may have been moved, and micro changes no result.
    moved = run.resumed_settings(rrg.Config, {"out": str(tmp_path), "micro": 3, "data": "b"})
    assert moved.out == str(tmp_path)
    assert (moved.micro, moved.data) == (3, "b")
    with pytest.raises(DataError, match="--micro must be at least 1"):
        run.resumed_settings(rrg.Config, {"out": str(tmp_path), "micro": 0})
    with pytest.raises(DataError, match="as it was: --lr was 0.0005, not 1.0"):
        run.resumed_settings(rrg.Config, {"out": str(tmp_path), "lr": 1.0})


SETTINGS = dataclasses.asdict(rrg.Config())
EARLIER = {name: value for name, value in SETTINGS.items() if name != "train_games"}


@pytest.mark.parametrize(
    "settings, wrong",
    [
        (dataclasses.asdict(repic.Config()), "--embedder is missing or unknown"),
        (SETTINGS | {"min_chars": 100}, "--min-chars is missing or unknown"),
        (EARLIER, "--train-games is missing or unknown"),
        (SETTINGS | {"lr": "fast"}, "--lr is 'fast'"),
        (SETTINGS | {"steps": None}, "--steps is None"),
        (["lr"], "there are no settings in it"),
        ("lr", "there are no settings in it"),
        (None, "there are no settings in it"),
    ],
)
def test_settings_of_another_script_or_version_are_refused(settings, wrong, tmp_path):
    """With what to do: go on with what began the run."""
    write_run(tmp_path, settings)
    with pytest.raises(DataError) as refusal:
        run.resumed_settings(rrg.Config, {"out": str(tmp_path)})
    assert str(refusal.value) == (
        f"{tmp_path}/config.json is of another version or script ({wrong}; it was begun by: python "
        "x.py --y); go on with that one, or begin anew with another --out"
    )


def test_a_config_that_is_no_object_is_refused(tmp_path):
    write_run(tmp_path, SETTINGS)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(DataError, match="config.json is of another version or script"):
        run.resumed_settings(rrg.Config, {"out": str(tmp_path)})


def test_the_settings_of_every_method_are_read_again(tmp_path):
    """Also SFT's, which has one answer a prompt."""
    for number, arguments in enumerate([["--sft", "truth"], ["--without", "oct"], []]):
        config, _ = repic.read_settings(arguments)
        out = tmp_path / str(number)
        write_run(out, dataclasses.asdict(config))
        again, resume = repic.read_settings(["--resume", "--out", str(out)])
        assert (again, resume) == (dataclasses.replace(config, out=str(out)), True)


def test_a_config_that_cannot_be_read_is_refused(tmp_path):
    write_run(tmp_path, {})
    for content in ("{", "[" * 100_000):  # half a file, and one that is too deep
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(DataError, match="cannot read .*config.json"):
            run.resumed_settings(rrg.Config, {"out": str(tmp_path)})


def test_resume_without_a_folder_takes_the_newest_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = "nothing to resume: runs/none has no state.pt; to begin a new run, leave --resume out"
    with pytest.raises(DataError, match=message):
        run.resumed_settings(rrg.Config, {})
    for age, name in ((100, "b"), (0, "a"), (200, "c")):
        write_run(tmp_path / "runs" / name, SETTINGS)
        moment = time.time() - age
        os.utime(tmp_path / "runs" / name / "config.json", (moment, moment))
    assert run.newest_run() == "runs/a"
    assert run.resumed_settings(rrg.Config, {}).out == "runs/a"


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    write_run(tmp_path, {})
    with pytest.raises(DataError, match="holds a run already; add --resume"):
        run.Folder(rrg.Config(out=str(tmp_path)), "rrg", ["step"], resume=False)


# --------------------------------------------------------------------------------------- options
@dataclass
class Options:
    """One option of each kind."""

    photo: str = option("", "the photo", metavar="PHOTO", positional=True)
    size: int = option(8, "how large", toy=2, least=1)
    rate: float = option(0.5, "how fast")
    loss: str = option("grpo", "which loss", choices=("grpo", "dapo"))
    folder: str = option("", "where to", metavar="DIR")
    top_k: int = option(3, "how many", least=1)
    quiet: bool = option(False, "say nothing")
    adapter: list = option([], "may be given several times", metavar="DIR")


DOC = """script.py: one line that says what it does.

    python script.py                    # how to run it

Where it departs from the paper:
1. This is not shown.
"""


def read(*arguments):
    return run.read_options(Options, DOC, list(arguments))


def test_only_what_was_given_is_read():
    assert read() == {}
    assert read("me.jpg") == {"photo": "me.jpg"}
    assert read("--size", "3", "--rate", "1e-3") == {"size": 3, "rate": 0.001}
    assert read("--top-k", "1", "--quiet") == {"top_k": 1, "quiet": True}
    assert read("--adapter", "a", "--adapter", "b") == {"adapter": ["a", "b"]}
    assert read("--loss", "dapo", "--folder", "") == {"loss": "dapo", "folder": ""}


def test_a_positional_option_may_be_given_several_times(capsys, monkeypatch):
    @dataclass
    class Runs:
        runs: list = option([], "the folders of runs", metavar="RUN", positional=True)

    assert run.read_options(Runs, DOC, []) == {}
    assert run.read_options(Runs, DOC, ["a", "b"]) == {"runs": ["a", "b"]}
    assert run.fill_in(Runs, {}, is_toy=False).runs == []
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit):
        run.read_options(Runs, DOC, ["--help"])
    assert capsys.readouterr().out.startswith("usage: python script.py [options] [RUN ...]\n")


@pytest.mark.parametrize("script", ["rrg.py", "repic.py"])
def test_a_usage_error_shows_the_usage_in_one_line(script, capsys, monkeypatch):
    cls = rrg.Config if script == "rrg.py" else repic.Config
    monkeypatch.setattr(sys, "argv", [script, "--step", "3"])
    with pytest.raises(SystemExit):
        run.read_options(cls, DOC, resumable=True)
    assert capsys.readouterr().err.splitlines() == [
        f"usage: python {script} [options]",
        f"{script}: error: unrecognized arguments: --step 3",
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--loss", "best"], "invalid choice"),
        (["--size", "large"], "invalid int value"),
        (["--resume"], "unrecognized arguments"),  # of a script that has no runs
        (["one.jpg", "two.jpg"], "unrecognized arguments"),
        (["--siz", "3"], "unrecognized arguments"),  # options are not abbreviated
    ],
)
def test_a_wrong_option_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        read(*arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_resume_is_an_option_of_runs_only():
    assert run.read_options(Options, DOC, [], resumable=True) == {}
    assert run.read_options(Options, DOC, ["--resume"], resumable=True) == {"resume": True}


def test_defaults_are_filled_in():
    real = run.fill_in(Options, {}, is_toy=False)
    assert real == Options()
    assert real.size == 8
    assert run.fill_in(Options, {}, is_toy=True).size == 2
    assert run.fill_in(Options, {"size": 5}, is_toy=True).size == 5
    real.adapter.append("mine")
    assert run.fill_in(Options, {}, is_toy=False).adapter == []  # each has a list of its own


def test_numbers_have_a_least_value():
    assert run.fill_in(Options, {"top_k": 1}, is_toy=False).top_k == 1
    with pytest.raises(DataError, match="^--top-k must be at least 1$"):
        run.fill_in(Options, {"top_k": 0}, is_toy=False)


def test_help_says_what_the_script_does_and_shows_the_defaults(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/script.py"])
    with pytest.raises(SystemExit) as stop:
        read("--help")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    usage, description, *_ = shown.split("\n\n")
    assert usage == "usage: python script.py [options] [PHOTO]"
    assert description == "script.py: one line that says what it does."
    assert "This is not shown" not in shown

    words = " ".join(shown.split())
    assert "--size INT how large (default 8; toy model 2)" in words
    assert "--rate FLOAT how fast (default 0.5)" in words
    assert "--loss {grpo,dapo} which loss (default grpo)" in words
    assert "--folder DIR where to --top-k" in words  # an empty default is explained in the help
    assert "--quiet say nothing --adapter DIR" in words
    assert "PHOTO the photo" in words


# ----------------------------------------------------------------------------- several processes
def pretend(monkeypatch, rank, world):
    """Be process `rank` of `world`."""
    monkeypatch.setattr(run, "ranks", lambda: (rank, world))


def test_one_process_is_the_first_of_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert run.ranks() == (0, 1)
    assert run.my_part([1, 2, 3]) == [1, 2, 3]
    assert run.gather([1, 2, 3]) == [1, 2, 3]
    run.join_processes()  # without torchrun there is nobody to meet
    assert run.ranks() == (0, 1)


@pytest.mark.parametrize("count", [0, 1, 4, 7])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_parts_are_the_whole_list_in_order(count, world, monkeypatch):
    parts = []
    for rank in range(world):
        pretend(monkeypatch, rank, world)
        parts.append(run.my_part(list(range(count))))
    assert sum(parts, []) == list(range(count))
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1


def test_samples_do_not_depend_on_the_number_of_processes(monkeypatch):
    whole = run.draw_uniforms(5, 12, 7)
    assert whole.shape == (5, 12)
    assert whole.min() >= 0
    assert whole.max() < 1
    for world in (2, 3, 4):
        parts = []
        for rank in range(world):
            pretend(monkeypatch, rank, world)
            parts.append(run.draw_uniforms(5, 12 // world, 7))
        assert torch.equal(torch.cat(parts, 1), whole)

    pretend(monkeypatch, 0, 1)
    assert torch.equal(run.draw_uniforms(5, 12, 7), whole)
    assert not torch.equal(run.draw_uniforms(5, 12, 8), whole)


def log_one_step(folder, columns, metrics):
    """Log a single step.   -> its row in metrics.csv"""
    log = run.Folder(rrg.Config(out=str(folder), steps=1), "rrg", columns, resume=False)
    log.begin(torch.device("cpu"))
    for _ in log.steps(0):
        log.log(metrics, {"step": 1})
    [row] = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    return row


def test_a_row_has_the_columns_and_nothing_else(tmp_path):
    row = log_one_step(tmp_path, ["step", "oracle", "kl"], {"step": 1, "kl": 1 / 3, "coverage": 1})
    assert row == {"step": "1", "oracle": "", "kl": "0.333333"}


def test_a_row_is_the_mean_over_all_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "gather", lambda items: items + [{"step": 1, "reward": 0.25}])
    row = log_one_step(tmp_path, ["step", "reward"], {"step": 1, "reward": 0.75})
    assert row == {"step": "1", "reward": "0.5"}


# ----------------------------------------------------------------------- answers that nobody reads
def log_steps(folder, parsed, begin=True):
    """Log steps with these shares of answers that could be read.   -> the Folder"""
    columns = ["step", "parsed"]
    config = rrg.Config(out=str(folder), steps=len(parsed))
    log = run.Folder(config, "rrg", columns, resume=False)
    log.begin(torch.device("cpu"))
    for step in log.steps(0):
        answers = [{"text": "A red mug.", "parsed": 1.0}, {"text": "I see\na mug", "parsed": 0.0}]
        log.log({"step": step + 1, "parsed": parsed[step]}, {"step": step, "samples": answers})
    return log


def test_a_first_step_of_which_hardly_an_answer_can_be_read_says_so(tmp_path, capsys):
    log_steps(tmp_path / "a", [0.0499, 0, 0])
    shown = capsys.readouterr().out
    assert shown.count("hardly any answer of the first step could be read (5.0%)") == 1
    assert "such as 'I see\\na mug'" in shown
    assert "--max-tokens" in shown and "Instruct" in shown
    log_steps(tmp_path / "b", [0.05, 0, 0])  # at first it is enough
    assert "hardly" not in capsys.readouterr().out


def test_ten_steps_in_a_row_without_an_answer_that_can_be_read_stop_a_run(tmp_path):
    log_steps(tmp_path / "nine", [0.0] * 9)
    log_steps(tmp_path / "broken", [0.0] * 9 + [0.01] + [0.0] * 9)
    with pytest.raises(DataError, match="no answer of 10 steps in a row .*'I see.*--max-tokens"):
        log_steps(tmp_path / "ten", [0.5] + [0.0] * 20)
    rows = (tmp_path / "ten/metrics.csv").read_text().splitlines()
    assert rows[-1] == "11,0"


def test_a_run_that_goes_on_still_knows_for_how_long_nothing_could_be_read(
    random_folder, tmp_path, monkeypatch
):
    """Two tokens are no description. Of twelve steps the state of the eighth is saved."""
    shrink_world(monkeypatch)
    options = "--steps 12 --games 2 --samples 2 --eval-games 1 --max-tokens 2 --save-every 4"
    arguments = ["--model", str(random_folder), *options.split()]
    with pytest.raises(DataError, match="no answer of 10 steps in a row could be read"):
        play(tmp_path, *arguments)
    assert len(read_metrics(tmp_path)) == 10
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 8
    with pytest.raises(DataError, match="no answer of 10 steps in a row could be read"):
        play(tmp_path, "--resume")
    assert len(read_metrics(tmp_path)) == 10


# ---------------------------------------------------------------------------- what a run has found
def things(*names):
    return [Concept(name, "object", [Photo(f"{name}/1", None)]) for name in names]


def test_what_is_held_out_is_said_in_words(capsys):
    split = Split(train=things("a", "b"), test=things("c"), unseen=[])
    run.print_split(split, {"train": 12, "seen": 6, "unseen": 0}, "games")
    split = Split(train=things("a", "b"), test=[], unseen=[])
    run.print_split(split, {"train": 3, "seen": 0, "unseen": 0}, "tasks")
    split = Split(train=things("a", "b"), test=things("c"), unseen=things("d", "e"))
    run.print_split(split, {"train": 9, "seen": 2, "unseen": 5}, "games")
    assert capsys.readouterr().out.splitlines() == [
        "3 things, of which 1 is kept for the test: 2 to train on (12 games), 1 held out (6 games)",
        "2 things, of which none are kept for the test: 2 to train on (3 tasks), 0 held out "
        "(0 tasks)",
        "5 things, of which 3 are kept for the test: 2 to train on (9 games), 1 held out (2 games),"
        " 2 of categories held out whole (5 games)",
    ]


def test_the_list_of_skipped_files_is_in_the_run_folder(tmp_path, monkeypatch):
    assert run.skipped_file(tmp_path) == tmp_path / "skipped.txt"
    assert run.skipped_file(tmp_path / "nowhere") is None
    pretend(monkeypatch, 1, 2)
    assert run.skipped_file(tmp_path) is None


# --------------------------------------------------------------------------- where output can go
def test_a_file_that_can_be_written_is_left_as_it_is(tmp_path):
    new = run.output_file(str(tmp_path / "a/b/new.json"))
    assert new == tmp_path / "a/b/new.json"
    assert list(new.parent.iterdir()) == []
    new.write_text("kept")
    run.output_file(new)
    assert new.read_text() == "kept"
    assert list(new.parent.iterdir()) == [new]


def test_a_file_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file/x.json", tmp_path / ("x" * 300)):
        with pytest.raises(
            DataError, match="cannot write .* so choose another place for it: "
        ) as e:
            run.output_file(place)
        assert "\n" not in str(e.value)

    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    # A folder that may not be written. (Whoever runs the tests may be allowed to write anywhere.)
    monkeypatch.setattr(run.tempfile, "TemporaryFile", refuse)
    with pytest.raises(DataError, match="cannot write .*y.json, .*Permission denied"):
        run.output_file(tmp_path / "y.json")


def test_a_run_folder_that_cannot_be_made_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(rrg, "MLLM", None)  # would fail
    for out in (tmp_path / "file", tmp_path / "file/x"):
        with pytest.raises(DataError, match="cannot write .*config.json"):
            play(out)


def test_photos_that_are_not_there_are_missed_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(rrg, "MLLM", None)
    with pytest.raises(DataError, match=r"/nowhere is not a folder; .*--data DIR .*--resume"):
        play(tmp_path, "--data", str(tmp_path / "nowhere"), "--model", str(toy.FOLDER))


# ------------------------------------------------------------------------------ several processes
def test_games_that_cannot_be_shared_are_refused(tmp_path, monkeypatch):
    pretend(monkeypatch, 0, 5)
    with pytest.raises(DataError, match="--games 12 cannot be shared equally by 5 processes"):
        play(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_only_the_first_process_writes(random_mllm, tmp_path, monkeypatch):
    optimizer = small_state(random_mllm)
    pretend(monkeypatch, 1, 2)
    monkeypatch.setattr(run, "gather", list)  # there is nobody to meet
    folder = run.Folder(rrg.Config(out=str(tmp_path), steps=1), "rrg", ["step"], resume=False)
    folder.begin(random_mllm.device)
    for _ in folder.steps(0):
        folder.log({"step": 1}, {"step": 1})
    state = run.State(1, 0.0, {"figures": {}, "examples": []})
    folder.save(state, random_mllm.model, optimizer)
    folder.finish(state, state.before, random_mllm.device)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------- a script
GO_ON = "; a run that has saved a state goes on with --resume, to the same numbers"


@pytest.mark.parametrize(
    "error, message",
    [
        (DataError("no photos"), "error: no photos"),
        (FloatingPointError("the gradient is not finite"), "error: the gradient is not finite"),
        (OSError("disk full"), "error: disk full" + GO_ON),
        (KeyboardInterrupt(), "\nstopped" + GO_ON),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB."),
            "error: out of GPU memory; lower --micro to 1, which changes no result (also with "
            "--resume), else --max-pixels or --samples",
        ),
    ],
)
def test_an_expected_failure_is_one_line(error, message):
    def program():
        raise error

    with pytest.raises(SystemExit) as stop:
        run.main(program, resumable=True)
    assert stop.value.code == message


def test_only_a_training_run_goes_on_with_resume():
    def program():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run.main(program)
    assert stop.value.code == "\nstopped"


def test_a_bug_keeps_its_traceback():
    def program():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        run.main(program)


def test_the_machine_in_words():
    assert "CPU" in run.machine(torch.device("cpu"))
