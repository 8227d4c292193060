"""run.py: a run: its settings and command line, its folder, its logs, how it goes on after it was
killed, its processes.

This is the plumbing of rrg.py and repic.py, and the command line of the other scripts. A run has a
folder:

    config.json         the command, the versions of what it ran with, every setting
    skipped.txt         the files in the folder of photos that were not read, and why
    metrics.csv         a row a step; the script's METRICS says what each column is
    samples.jsonl       one game or task a step, with all its answers and what they earned
    adapter/            the adapters as they were saved last, in PEFT's format
    state.pt            all that --resume needs
    state.previous.pt   the state before that one, to go back to
    result.json         before and after, once the run is finished

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
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

from data import DataError, find_folder, one_line_errors, plural
from lora import lora_state, save_adapter, write_atomically, write_json, write_text

FEW = 0.05  # share of answers: where fewer can be read, something is wrong
UNREAD_STEPS = 10  # steps in a row after which a run stops if no answer could be read
MAY_CHANGE = ("out", "micro", "data")  # settings that --resume may find changed
STATE = {"step", "seconds", "before", "unread", "lora", "optimizer", "photos", "settings"}


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
        count = "*" if field.type is list else "?"
        parser.add_argument(field.name, nargs=count, metavar=about["metavar"], **how)
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
            dots = " ..." if field.type is list else ""
            usage += f" [{field.metadata['metavar']}{dots}]"
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


def check_numbers(cls, given):
    """Raise DataError where a number is smaller or larger than it may be.

    given {field name: value}, of all fields of `cls` or of some
    """
    for field in dataclasses.fields(cls):
        least = field.metadata["least"]
        most = field.metadata["most"]
        # "not >=" and not "<", since nan is neither.
        if least is not None and not given.get(field.name, least) >= least:
            raise DataError(f"{flag(field.name)} must be at least {least}")
        if most is not None and not given.get(field.name, most) <= most:
            raise DataError(f"{flag(field.name)} must be at most {most}")


def fill_in(cls, given, is_toy):
    """Add the defaults to what was given.   -> cls

    Raises DataError where a number is smaller or larger than it may be.
    """
    values = {}
    if is_toy:
        for field in dataclasses.fields(cls):
            if field.metadata["toy"] is not None:
                values[field.name] = field.metadata["toy"]
    check_numbers(cls, given)
    return cls(**(values | given))


def refuse_photos_without_model(given):
    """Raise DataError for --data without --model: the default model knows the toy world only."""
    if given.get("data") and "model" not in given:
        command = shlex.join(["python", *sys.argv, "--model", "Qwen/Qwen2-VL-2B-Instruct"])
        raise DataError(
            "--data wants a --model: the toy model, the default, knows the toy world only. You "
            f"probably want: {command}"
        )


def check_data(folder):
    """Raise DataError where --data leads to no photos, before a model is loaded."""
    try:
        find_folder(folder)
    except DataError as error:
        raise DataError(
            f"{error}. (Where photos have moved, --data DIR gives their new place, also with "
            "--resume.)"
        ) from error


def default_folder():
    """The folder of a new run: runs/DATE-TIME."""
    return time.strftime("runs/%Y%m%d-%H%M%S")


def skipped_file(out):
    """Where the run in a folder lists the photos that it skips.

    -> the file; None where this process does not write, or where there is no such folder
    """
    rank, _ = ranks()
    if rank > 0 or not pathlib.Path(out).is_dir():
        return None
    return pathlib.Path(out) / "skipped.txt"


def newest_run():
    """The folder in runs/ of the run that was started last."""
    configs = pathlib.Path("runs").glob("*/config.json")
    newest = max(configs, key=os.path.getmtime, default=pathlib.Path("runs/none/config.json"))
    return str(newest.parent)


def output_file(path):
    """Make sure that a file can be written, before the work begins whose outcome it is to hold.

    -> its path
    Its folder is made; a file that is there stays as it is. Raises DataError where it cannot be
    written: a folder of that name, a file in the place of its folder, no permission.
    """
    path = pathlib.Path(path)
    with one_line_errors(f"cannot write {path}, so choose another place for it", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        open(path, "ab").close()
        if is_new:
            path.unlink()
        # Files are replaced by others that are written beside them (lora.write_atomically).
        tempfile.TemporaryFile(dir=path.parent).close()
    return path


def load_json(file):
    """The content of a JSON file. Raises DataError if it cannot be read."""
    with one_line_errors(f"cannot read {file}", OSError, ValueError, RecursionError):
        return json.loads(pathlib.Path(file).read_text(encoding="utf-8"))


def run_record(adapter):
    """The config.json of the run that an adapter is of.   -> its content, {} if there is none"""
    file = pathlib.Path(adapter).parent / "config.json"
    return load_json(file) if file.is_file() else {}


def saved_settings(cls, folder):
    """The settings that the run in a folder was started with.   -> cls

    Raises DataError for a config.json that cannot be read, or is of another version or script.
    """
    file = pathlib.Path(folder) / "config.json"
    record = load_json(file)
    wrong = wrong_setting(cls, record)
    if wrong:
        command = record.get("command", "-") if isinstance(record, dict) else "-"
        raise DataError(
            f"{file} is of another version or script ({wrong}; it was begun by: {command}); go on "
            "with that one, or begin anew with another --out"
        )
    return cls(**record["settings"])


def wrong_setting(cls, record):
    """What keeps the content of a config.json from being one of `cls`, in words; "" if nothing."""
    settings = record.get("settings") if isinstance(record, dict) else None
    if not isinstance(settings, dict):
        return "there are no settings in it"
    types = {field.name: field.type for field in dataclasses.fields(cls)}
    unexpected = sorted(settings.keys() ^ types.keys())  # what only one of the two has
    if unexpected:
        return f"{flag(unexpected[0])} is missing or unknown"
    for name, value in settings.items():
        wanted = (int, float) if types[name] is float else types[name]
        if not isinstance(value, wanted):
            return f"{flag(name)} is {value!r}"
    return ""


def resumed_settings(cls, given):
    """The settings of the run to go on with, which what is given must not change.   -> cls

    Only --micro may change, which changes no result and helps after running out of memory, and
    --data, for photos that have moved (`Folder.restore` compares them).
    Raises DataError where there is nothing to resume or a setting differs.
    """
    folder = given.get("out") or newest_run()
    if not (pathlib.Path(folder) / "state.pt").is_file():
        raise DataError(f"nothing to resume: {folder} has no state.pt; {way_back(folder)}")
    check_numbers(cls, given)
    settings = saved_settings(cls, folder)
    settings.out = folder
    settings.micro = given.get("micro", settings.micro)
    settings.data = given.get("data", settings.data)
    for name, now in given.items():
        was = getattr(settings, name)
        if was != now:
            raise DataError(
                f"--resume goes on with the run as it was: {flag(name)} was {was}, not {now}"
            )
    return settings


def way_back(folder):
    """What to do where the state.pt of a run is lost or spoiled, in words."""
    state = pathlib.Path(folder) / "state.pt"
    previous = pathlib.Path(folder) / "state.previous.pt"
    if not previous.is_file():
        return "to begin a new run, leave --resume out and give another --out, or none"
    command = shlex.join(["mv", str(previous), str(state)])
    return f"to go back to the save before it: {command}, then --resume again"


def print_split(split, mined, what):
    """Say what is trained on, and what is kept for the test.

    split: of the concepts; mined {"train", "seen", "unseen": number}: how many games or tasks,
    which `what` calls by their name, there are of each part
    """
    kept = len(split.test) + len(split.unseen)
    is_kept = "1 is" if kept == 1 else f"{kept or 'none'} are"
    text = (
        f"{len(split.train) + kept} things, of which {is_kept} kept for the test: "
        f"{len(split.train)} to train on ({mined['train']} {what}), "
        f"{len(split.test)} held out ({mined['seen']} {what})"
    )
    if split.unseen:
        text += f", {len(split.unseen)} of categories held out whole ({mined['unseen']} {what})"
    print(text)


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
    return f"{platform.machine()} CPU, {plural(torch.get_num_threads(), 'thread')}"


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


def cut_log(file, step, heading=""):
    """Leave of a log what was written up to a step; the rest is played again.

    heading: its first line, if it has one, which is written anew where it is lost
    Rows that are lost are spoken of. Raises DataError for a file that is not the log of a run.
    """
    message = f"{file} is not the log of this run; move it away, then --resume begins it anew"
    text = ""
    if file.exists():
        with one_line_errors(message, OSError, ValueError):
            text = file.read_text(encoding="utf-8")
    # The last line may be half a one.
    whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    lines = [line for line in whole if line.strip() and line != heading]
    for line in lines:
        if step_of(line) == 0 or (heading and line.count(",") != heading.count(",")):
            raise DataError(f"{message}: {line[:80]!r}")

    kept = [line for line in lines if step_of(line) <= step]
    if len(kept) < step:
        print(f"{file} has lost {step - len(kept)} of {step} rows; the run goes on without them")
    write_text(file, heading + "".join(kept))


def load_state(folder):
    """The state.pt of a run, on the CPU.   -> its content, with all that is in STATE

    Raises DataError for a file that is torn, empty or something else.
    """
    file = pathlib.Path(folder) / "state.pt"
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        missing = STATE - content.keys()
        if missing:
            raise ValueError(f"no {min(missing)} in it")
    except Exception as error:  # torch raises a dozen kinds on what is no state, or half of one
        why = (str(error).splitlines() or [""])[0][:80]
        raise DataError(
            f"{file} is torn, or not the state of a run of this version ({type(error).__name__}: "
            f"{why}); {way_back(folder)}"
        ) from error
    return content


def shapes_of(tensors):
    """{name: shape} of {name: tensor}."""
    return {name: tensor.shape for name, tensor in tensors.items()}


class Folder:
    """The folder of a run (see the top). Only the first process writes.

    config: the settings, with `out`, `data`, `model` and `games`; method: what is trained, in a
    word; columns: the names of the columns of metrics.csv.
    Raises DataError, before anything is read, for what is not there or cannot be written.
    """

    def __init__(self, config, method, columns, resume):
        rank, world = ranks()
        if config.games % world:
            raise DataError(f"--games {config.games} cannot be shared equally by {world} processes")
        self.path = pathlib.Path(config.out)
        if not resume and any(self.path.glob("state.*")):
            raise DataError(
                f"{self.path} holds a run already; add --resume to go on with it, or give another "
                "--out"
            )
        if config.data:
            check_data(config.data)
        self.config = config
        self.method = method
        self.columns = columns
        self.heading = ",".join(columns) + "\n"  # of metrics.csv
        self.writes = rank == 0
        if self.writes:
            output_file(self.path / "config.json")
        self.bar = None
        self.photos = {}  # {name: hash of the pixels} of all that the run has
        self.unread = 0  # steps in a row, up to now, of which no answer could be read

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
        (self.path / "metrics.csv").write_text(self.heading)
        (self.path / "samples.jsonl").write_text("")

    def save(self, state, model, optimizer):
        """Keep the adapters, and all that `restore` needs; and the state before this one."""
        if not self.writes:
            return
        save_adapter(model, self.path / "adapter", base=self.config.model)
        content = dataclasses.asdict(state)
        content["unread"] = self.unread
        content["lora"] = lora_state(model)
        content["optimizer"] = optimizer.state_dict()
        content["photos"] = self.photos
        content["settings"] = dataclasses.asdict(self.config)
        last = self.path / "state.pt"
        if last.exists():
            # A copy: were it moved, a kill right now would leave no state.pt.
            previous = self.path / "state.previous.pt"
            write_atomically(previous, functools.partial(shutil.copyfile, last))
        write_atomically(last, functools.partial(torch.save, content))

    def restore(self, model, optimizer, split=None):
        """Put adapters and optimizer back as they were saved, and cut the logs there.   -> State

        split: of the concepts that there are now. Raises DataError for a state that cannot be
        read, of other settings, of another model, or of other photos, wherever they lie.
        """
        content = load_state(self.path)
        for name, now in dataclasses.asdict(self.config).items():
            was = content["settings"].get(name)
            if name not in MAY_CHANGE and was != now:
                raise DataError(
                    f"{self.path}/state.pt is of another run: {flag(name)} was {was}, not {now}; "
                    f"{way_back(self.path)}"
                )
        if shapes_of(content["lora"]) != shapes_of(lora_state(model)):
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
        self.unread = content["unread"]
        if self.writes:
            cut_log(self.path / "metrics.csv", content["step"], self.heading)
            cut_log(self.path / "samples.jsonl", content["step"])
            self.record_data()
        return State(content["step"], content["seconds"], content["before"])

    def record_data(self):
        """Write down where the photos lie now, for the next --resume and for report.py."""
        record = load_json(self.path / "config.json")
        if record["settings"]["data"] != self.config.data:
            record["settings"]["data"] = self.config.data
            write_json(self.path / "config.json", record)

    def steps(self, first):
        """The steps that are left, with a progress bar."""
        total = self.config.steps
        steps = range(first, total)
        self.bar = tqdm(steps, initial=first, total=total, desc="training", unit="step")
        return self.bar

    def log(self, metrics, example):
        """A row of metrics.csv, and an example {"step", ...} as a line of samples.jsonl.

        metrics {column: number} of this process's games; the row is the mean over all processes,
        whose games are equally many. A column that is missing stays empty. See `watch`, too.
        """
        of_processes = gather([metrics])
        row = {}
        for name in self.columns:
            if name in metrics:
                values = [of_process[name] for of_process in of_processes]
                row[name] = f"{sum(values) / len(values):.6g}"

        shown = [name for name in ("reward", "listener_accuracy", "nll", "kl") if name in metrics]
        self.bar.set_postfix({name: f"{float(row[name]):.3f}" for name in shown})
        if self.writes:
            with open(self.path / "metrics.csv", "a", newline="") as file:
                csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)
            with open(self.path / "samples.jsonl", "a") as file:
                file.write(json.dumps(example) + "\n")
        if "parsed" in row:
            self.watch(int(row["step"]), float(row["parsed"]), example["samples"])

    def watch(self, step, parsed, samples):
        """Say so if hardly any answer of the first step could be read.

        parsed: the share of a step's answers that could be; samples: some, as samples.jsonl has
        them. Raises DataError after UNREAD_STEPS steps of which none could be read.
        """
        unread = [row["text"][:300] for row in samples if not row["parsed"]]
        example = f", such as {unread[0]!r}" if unread else ""
        what_helps = (
            "answers may need more room (--max-tokens) or a model that follows instructions "
            "(--model Qwen/Qwen2-VL-2B-Instruct)"
        )
        if step == 1 and parsed < FEW:
            tqdm.write(
                f"hardly any answer of the first step could be read ({parsed:.1%}){example}: "
                f"{what_helps}"
            )
        self.unread = self.unread + 1 if parsed == 0 else 0
        if self.unread >= UNREAD_STEPS:
            raise DataError(
                f"no answer of {UNREAD_STEPS} steps in a row could be read{example}; begin anew: "
                f"{what_helps}"
            )

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
