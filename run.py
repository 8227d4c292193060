"""run.py: a run: its settings and command line, its folder, its logs, how it goes on after it was
killed, its processes.

This is the plumbing of rrg.py and repic.py, and the command line of the other scripts. A run has a
folder:

    config.json     the command, the versions of what it ran with, every setting
    metrics.csv     a row a step; the script's METRICS says what each column is
    samples.jsonl   one game or task a step, with all its answers and what they earned
    adapter/        the adapters as they were saved last, in PEFT's format
    state.pt        all that --resume needs
    result.json     before and after, once the run is finished

Games and samples are seeded by the step, so nothing of a random generator has to be kept: a run
that was killed goes back to its last save, plays the steps since then again, and comes to the same
numbers. Each file is replaced whole (lora.write_atomically), so a kill never leaves half of one;
half a line of a log is cut off.

Several processes (torchrun) share the games of a step. Each computes its part, gradients are added
up (grpo.add_up), and the first process writes and speaks for all. Neither samples nor results
depend on how many there are.
"""

import argparse
import csv
import dataclasses
import functools
import json
import os
import pathlib
import platform
import re
import shlex
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

from data import DataError, one_line_errors
from lora import lora_state, save_adapter, write_atomically, write_json, write_text


# ------------------------------------------------------------------------------ several processes
def join_processes():
    """Meet the other processes, if torchrun has started several. The first one speaks for all."""
    if "WORLD_SIZE" not in os.environ:  # which torchrun sets
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        # Before anything is sent, or all processes would send from the first GPU.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend)
    rank, _ = ranks()
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
        draw_bar = tqdm.__init__

        def draw_no_bar(bar, *args, **settings):
            draw_bar(bar, *args, **(settings | {"disable": True}))

        tqdm.__init__ = draw_no_bar


def ranks():
    """(the number of this process, how many there are): (0, 1) without torchrun."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def my_part(items):
    """This process's part of a list, in order; the lengths of all parts differ by one at most."""
    rank, world = ranks()
    return items[len(items) * rank // world : len(items) * (rank + 1) // world]


def gather(items):
    """The lists of all processes, one after the other."""
    _, world = ranks()
    if world == 1:
        return items
    parts = [None] * world
    dist.all_gather_object(parts, items)
    return sum(parts, [])


def draw_uniforms(max_tokens, rows, seed):
    """The random numbers that `rows` answers of this process are sampled by.

    -> [max_tokens, rows] in [0, 1)
    Each process draws for the rows of all and keeps its own, so that samples do not depend on the
    number of processes; and on the CPU, so that they do not depend on the device.
    """
    rank, world = ranks()
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(max_tokens, world * rows, generator=generator)
    return uniforms[:, rank * rows : (rank + 1) * rows]


# --------------------------------------------------------------------------------- command line
def option(
    default,
    text,
    *,
    toy=None,
    least=None,
    most=None,
    choices=None,
    metavar=None,
    positional=False,
):
    """A field of a dataclass that is also an option of the command line.

    default: of a real model; toy: of the toy model, where it needs another one
    text: the help; least, most: the smallest and the largest number allowed; positional: given
    without its name
    A bool becomes a switch; a list may be given several times.
    """
    metadata = {
        "help": text,
        "toy": toy,
        "least": least,
        "most": most,
        "choices": choices,
        "metavar": metavar,
        "positional": positional,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=list, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def flag(name):
    """A field's name as the command line spells it."""
    return "--" + name.replace("_", "-")


def add_option(parser, field):
    """Declare one field of a dataclass of options (see `option`)."""
    about = field.metadata
    how = {"help": about["help"], "default": argparse.SUPPRESS}
    if about["positional"]:
        parser.add_argument(field.name, nargs="?", metavar=about["metavar"], **how)
        return
    if field.type is bool:
        parser.add_argument(flag(field.name), action="store_true", **how)
        return
    if field.type is list:
        parser.add_argument(flag(field.name), action="append", metavar=about["metavar"], **how)
        return

    defaults = f"default {field.default}"
    if about["toy"] is not None:
        defaults += f"; toy model {about['toy']}"
    if field.default not in ("", None) and about["metavar"] is None:  # else the help says it
        how["help"] += f" ({defaults})"
    if about["choices"]:
        parser.add_argument(flag(field.name), choices=about["choices"], **how)
    else:
        metavar = about["metavar"] or field.type.__name__.upper()
        parser.add_argument(flag(field.name), type=field.type, metavar=metavar, **how)


def read_options(cls, doc, argv=None, resumable=False):
    """What was given on the command line, and nothing else.   -> {field name: value}

    cls: the dataclass whose fields are the options; doc: the script's docstring, of which --help
    shows all but the departures. resumable adds "resume": True where --resume is given.
    """
    usage = f"python {pathlib.Path(sys.argv[0]).name} [options]"
    for field in dataclasses.fields(cls):
        if field.metadata["positional"]:
            usage += f" [{field.metadata['metavar']}]"
    parser = argparse.ArgumentParser(
        usage=usage,
        description=doc.split("\nWhere it departs")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --step is not --steps
    )
    for field in dataclasses.fields(cls):
        add_option(parser, field)
    if resumable:
        parser.add_argument(
            "--resume",
            action="store_true",
            default=argparse.SUPPRESS,
            help="go on with the run in --out (default: the newest in runs/), with the settings it "
            "was started with",
        )
    return vars(parser.parse_args(argv))


def fill_in(cls, given, is_toy):
    """Add the defaults to what was given.   -> cls

    Raises DataError where a number is smaller or larger than it may be.
    """
    values = {}
    if is_toy:
        for field in dataclasses.fields(cls):
            if field.metadata["toy"] is not None:
                values[field.name] = field.metadata["toy"]
    for field in dataclasses.fields(cls):
        least = field.metadata["least"]
        most = field.metadata["most"]
        # "not >=" and not "<", since nan is neither.
        if least is not None and not given.get(field.name, least) >= least:
            raise DataError(f"{flag(field.name)} must be at least {least}")
        if most is not None and not given.get(field.name, most) <= most:
            raise DataError(f"{flag(field.name)} must be at most {most}")
    return cls(**(values | given))


def refuse_photos_without_model(given):
    """Raise DataError for --data without --model: the default model knows the toy world only."""
    if given.get("data") and "model" not in given:
        raise DataError(
            "--data wants a --model, such as --model Qwen/Qwen2-VL-2B-Instruct: the toy model, the "
            "default, knows the toy world only"
        )


def default_folder():
    """The folder of a new run: runs/DATE-TIME."""
    return time.strftime("runs/%Y%m%d-%H%M%S")


def newest_run():
    """The folder in runs/ of the run that was started last."""
    configs = pathlib.Path("runs").glob("*/config.json")
    newest = max(configs, key=os.path.getmtime, default=pathlib.Path("runs/none/config.json"))
    return str(newest.parent)


def load_json(file):
    """The content of a JSON file. Raises DataError if it cannot be read."""
    with one_line_errors(f"cannot read {file}", OSError, ValueError, RecursionError):
        return json.loads(pathlib.Path(file).read_text(encoding="utf-8"))


def run_record(adapter):
    """The config.json of the run that an adapter is of.   -> its content, {} if there is none"""
    file = pathlib.Path(adapter).parent / "config.json"
    return load_json(file) if file.is_file() else {}


def saved_settings(cls, folder):
    """The settings that the run in a folder was started with.   -> cls"""
    file = pathlib.Path(folder) / "config.json"
    message = f"{file} is of another version or script; give the --out of a run of this one"
    with one_line_errors(message, TypeError, KeyError):
        return cls(**load_json(file)["settings"])


def resumed_settings(cls, given):
    """The settings of the run to go on with, which what is given must not change.   -> cls

    Only --micro may change, which changes no result and helps after running out of memory, and
    --data, for photos that have moved (`Folder.restore` compares them).
    Raises DataError where there is nothing to resume or a setting differs.
    """
    folder = given.get("out") or newest_run()
    if not (pathlib.Path(folder) / "state.pt").is_file():
        raise DataError(f"nothing to resume: {folder} has no state.pt")
    settings = saved_settings(cls, folder)
    settings.out = folder
    settings.micro = max(1, given.get("micro", settings.micro))
    settings.data = given.get("data", settings.data)
    for name, now in given.items():
        was = getattr(settings, name)
        if was != now:
            raise DataError(
                f"--resume goes on with the run as it was: {flag(name)} was {was}, not {now}"
            )
    return settings


# ------------------------------------------------------------------------------------ the folder
@dataclass
class State:
    """Where a run is."""

    step: int  # steps that are done
    seconds: float  # of training
    before: dict  # the exam before training


def machine(device):
    """What a run runs on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def step_of(line):
    """The training step of a line of metrics.csv or samples.jsonl; 0 for a heading."""
    found = re.match(r'(?:\{"step": )?(\d+)', line)
    return int(found[1]) if found else 0


def what_changed(before, now):
    """How two sets of photos differ, in words, "" if they do not.   {name: hash of the pixels}"""
    both = before.keys() & now.keys()
    found = {
        "gone": sorted(before.keys() - now.keys()),
        "new": sorted(now.keys() - before.keys()),
        "changed": sorted(name for name in both if before[name] != now[name]),
    }
    words = [f"{len(names)} {how}, such as {names[0]}" for how, names in found.items() if names]
    return "; ".join(words)


def cut_log(file, step):
    """Leave of a log what was written up to a step; the rest is played again."""
    lines = []
    if file.exists():
        lines = file.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and step_of(line) <= step]
    write_text(file, "".join(kept))


class Folder:
    """The folder of a run (see the top). Only the first process writes.

    config: the settings, with `out`, `model` and `games`; method: what is trained, in a word;
    columns: the names of the columns of metrics.csv.
    """

    def __init__(self, config, method, columns, resume):
        rank, world = ranks()
        if config.games % world:
            raise DataError(f"--games {config.games} cannot be shared equally by {world} processes")
        self.path = pathlib.Path(config.out)
        if not resume and (self.path / "state.pt").exists():
            raise DataError(
                f"{self.path} holds a run already; add --resume to go on with it, or give another "
                "--out"
            )
        self.config = config
        self.method = method
        self.columns = columns
        self.writes = rank == 0
        if self.writes:
            self.path.mkdir(parents=True, exist_ok=True)
        self.bar = None
        self.photos = {}  # {name: hash of the pixels} of all that the run has

    def begin(self, device, split=None):
        """Write down what this run is, and begin its logs.   split: of its concepts, if any"""
        self.photos = {} if split is None else split.photo_hashes()
        if not self.writes:
            return
        record = {
            "command": shlex.join(["python", *sys.argv]),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "device": machine(device),
            "method": self.method,
            "settings": dataclasses.asdict(self.config),
            "concepts": None if split is None else split.names(),
        }
        write_json(self.path / "config.json", record)
        (self.path / "metrics.csv").write_text(",".join(self.columns) + "\n")
        (self.path / "samples.jsonl").write_text("")

    def save(self, state, model, optimizer):
        """Keep the adapters, and all that `restore` needs."""
        if not self.writes:
            return
        save_adapter(model, self.path / "adapter", base=self.config.model)
        content = dataclasses.asdict(state)
        content["lora"] = lora_state(model)
        content["optimizer"] = optimizer.state_dict()
        content["photos"] = self.photos
        write_atomically(self.path / "state.pt", functools.partial(torch.save, content))

    def restore(self, model, optimizer, split=None):
        """Put adapters and optimizer back as they were saved, and cut the logs there.   -> State

        split: of the concepts that there are now. Raises DataError for a state of another model, or
        of other photos, wherever they lie.
        """
        device = next(model.parameters()).device
        content = torch.load(self.path / "state.pt", map_location=device, weights_only=True)
        if content["lora"].keys() != lora_state(model).keys():
            raise DataError(
                f"{self.path}/state.pt is of another model; go on with the versions that "
                f"{self.path}/config.json names"
            )
        self.photos = {} if split is None else split.photo_hashes()
        changed = what_changed(content["photos"], self.photos)
        if changed:
            raise DataError(
                f"these are not the photos that {self.path} was begun with ({changed}); put them "
                "back, or begin anew with another --out"
            )
        model.load_state_dict(content["lora"], strict=False)
        optimizer.load_state_dict(content["optimizer"])
        if self.writes:
            cut_log(self.path / "metrics.csv", content["step"])
            cut_log(self.path / "samples.jsonl", content["step"])
        return State(content["step"], content["seconds"], content["before"])

    def steps(self, first):
        """The steps that are left, with a progress bar."""
        total = self.config.steps
        steps = range(first, total)
        self.bar = tqdm(steps, initial=first, total=total, desc="training", unit="step")
        return self.bar

    def log(self, metrics, example):
        """A row of metrics.csv, and an example {"step", ...} as a line of samples.jsonl.

        metrics {column: number} of this process's games; the row is the mean over all processes,
        whose games are equally many. A column that is missing stays empty.
        """
        of_processes = gather([metrics])
        row = {}
        for name in self.columns:
            if name in metrics:
                values = [of_process[name] for of_process in of_processes]
                row[name] = f"{sum(values) / len(values):.6g}"

        shown = [name for name in ("reward", "listener_accuracy", "nll", "kl") if name in metrics]
        self.bar.set_postfix({name: f"{float(row[name]):.3f}" for name in shown})
        if not self.writes:
            return
        with open(self.path / "metrics.csv", "a", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)
        with open(self.path / "samples.jsonl", "a") as file:
            file.write(json.dumps(example) + "\n")

    def finish(self, state, after, device):
        """Write result.json, with the exams before and after.   -> its content"""
        result = {
            "before": state.before["figures"],
            "after": after["figures"],
            "seed": self.config.seed,
            "steps": self.config.steps,
            "seconds": round(state.seconds, 1),
            "device": machine(device),
            "examples": {"before": state.before["examples"], "after": after["examples"]},
        }
        if self.writes:
            write_json(self.path / "result.json", result)
        return result


# ------------------------------------------------------------------------------------- a script
def main(program, resumable=False):
    """Run a script's `program()`. Every failure that is to be expected becomes one clear line.

    resumable: it is a training run, which --resume goes on with.
    """
    go_on = ""
    less_memory = "lower --max-pixels"
    if resumable:
        go_on = "; a run that has saved a state goes on with --resume, to the same numbers"
        less_memory = (
            "lower --micro to 1, which changes no result (also with --resume), else --max-pixels "
            "or --samples"
        )
    try:
        if resumable:
            join_processes()
        elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise DataError("torchrun is for training; start this script by itself")
        program()
    except (DataError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError:
        sys.exit(f"error: out of GPU memory; {less_memory}")
    except OSError as error:  # a full disk, a folder that may not be written
        sys.exit(f"error: {error}{go_on}")
    except KeyboardInterrupt:
        sys.exit(f"\nstopped{go_on}")
