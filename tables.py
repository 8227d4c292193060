"""tables.py: a table that takes hours: its file, written row by row, and the time left for all of
it.

This is the plumbing of evaluate.py and naming.py, as run.py is that of training. Their file in
--out is written as soon as a row is done, and the same command takes up what is there:

    a table   is the same, if the settings that matter are the same and so are the photos; one of
              another command is never written over by accident
    a row     is done, if what speaks in it is the same: the weights of the model, and the files of
              the adapter or of the database

Rows that were done by a command with other adapters stay in the file.
"""

import contextlib
import hashlib
import json
import pathlib
import shlex
import sys
from collections import Counter

from tqdm import tqdm

import run
from data import DataError
from lora import write_json
from model import COMPARING

# How long things take, in beliefs of the listener. An answer is written token by token.
ANSWER = 8
BELIEF = 1


# ------------------------------------------------------------------------------------ what is same
def digest(content):
    """A hash of anything that JSON can hold."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def digest_of_files(path):
    """A hash of a file, or of the files that lie in a folder."""
    path = pathlib.Path(path)
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
    hashes = {}
    for file in files:
        with open(file, "rb") as content:
            hashes[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
    return digest(hashes)


def weights_of(model):
    """What the weights of a local checkpoint are known by: they are gigabytes, so they are not
    read once more.   -> {file: [size, time of change]}, empty for a name on the hub"""
    weights = {}
    for file in sorted(pathlib.Path(model).glob("*.safetensors")):
        about = file.stat()
        weights[file.name] = [about.st_size, about.st_mtime_ns]
    return weights


def speaker_of(mllm, model, path=""):
    """A hash of what speaks in a row: the model, and the adapter or the database in `path`."""
    files = digest_of_files(path) if path else ""
    return digest([weights_of(model), mllm.device.type, files])


def what_differs(before, now):
    """How two sets of settings differ, in words, "" if they do not.   {option: value}"""
    words = []
    for name in dict.fromkeys([*before, *now]):
        if before.get(name) != now.get(name):
            words.append(f"{run.flag(name)} was {before.get(name)!r}, not {now.get(name)!r}")
    return ", ".join(words)


# -------------------------------------------------------------------------------------- the file
class KeptTable:
    """The rows of a table, and the file in --out that they are kept in ("": none).

    settings {option: value}: what all rows are measured with
    replace: what is no table, or one of another command, is replaced; else it raises DataError
    """

    def __init__(self, out, settings, replace=False):
        self.out = out
        self.settings = json.loads(json.dumps(settings))  # as JSON has them
        self.replace = replace
        self.photos = ""  # a hash of all that rows are measured with
        self.facts = {}  # what else the file says
        self.speakers = {}  # {row: hash of what has spoken}
        self.rows = {}  # {row: its content}
        self.photos_in_file = ""
        if out and pathlib.Path(out).exists():
            self.take_up()

    def take_up(self):
        """Read the rows that the file has."""
        try:
            content = run.load_json(self.out)
        except DataError as error:
            self.begin_anew(f"is no table that can be read ({error})")
            return
        wanted = {"settings", "photos", "speakers", "rows"}
        if not isinstance(content, dict) or not wanted <= content.keys():
            self.begin_anew("is no table, or one of another version")
            return
        different = what_differs(content["settings"], self.settings)
        if different:
            self.begin_anew(f"is a table of other settings ({different})")
            return
        self.photos_in_file = content["photos"]
        self.speakers = content["speakers"]
        self.rows = content["rows"]

    def begin_anew(self, reason):
        """Forget what is in the file, if it may be replaced; else raise DataError."""
        if not self.replace:
            raise DataError(f"{self.out} {reason}; delete it, or give another --out")
        print(f"note: {self.out} {reason}; it is replaced")
        self.speakers = {}
        self.rows = {}

    def measure_with(self, photos, facts):
        """Say what rows are measured with, as anything that JSON can hold, and what else the file
        is to say. Raises DataError where the rows in the file were measured with other photos."""
        self.photos = digest(photos)
        self.facts = facts
        if self.photos_in_file not in ("", self.photos):
            self.begin_anew("was measured with other photos, or with another choice of them")

    def has(self, name, speaker):
        """Is this row done?   speaker: hash of what speaks in it (`speaker_of`)"""
        return name in self.rows and self.speakers[name] == speaker

    def add(self, name, speaker, row):
        """Keep a row that is done."""
        self.rows[name] = row
        self.speakers[name] = speaker
        if self.out:
            write_json(self.out, self.content(self.rows))

    def content(self, names):
        """The table, with these of its rows, in this order."""
        return {
            "settings": self.settings,
            "command": shlex.join(["python", *sys.argv]),
            **self.facts,
            "photos": self.photos,
            "speakers": self.speakers,
            "rows": {name: self.rows[name] for name in names},
        }


# ---------------------------------------------------------------------------------------- the bar
class Progress:
    """One bar over all that a table still has to do, with the row and the part that is running.

    plan {(row, part): its work, in beliefs}
    """

    def __init__(self, mllm, plan):
        self.mllm = mllm
        self.plan = Counter(plan)
        self.running = ""
        self.end = 0  # where the bar will be when the running part is done
        self.bar = tqdm(
            total=sum(plan.values()),
            desc="beginning",
            bar_format="{percentage:3.0f}% of all|{bar:20}| {elapsed}, {remaining} left: {desc}",
            smoothing=0,  # the mean speed: parts differ
            leave=False,
            disable=not plan,
        )

    def __enter__(self):
        self.mllm.on_done = self.done
        return self

    def __exit__(self, *error):
        self.mllm.on_done = None
        self.bar.close()

    @contextlib.contextmanager
    def part(self, row, part):
        """`with progress.part("base", "describing"):` this part of a row is running."""
        self.running = f"{row}, {part}"
        self.end = self.bar.n + self.plan[row, part]
        self.bar.set_description_str(self.running)
        yield
        # Equal prompts are answered once, so a part may end early.
        self.bar.update(self.end - self.bar.n)

    def done(self, title, count):
        """The model tells that so many answers or beliefs are done, of the work of this title."""
        size = BELIEF if title == COMPARING else ANSWER
        self.bar.set_description_str(f"{self.running}: {title}", refresh=False)
        self.bar.update(min(count * size, self.end - self.bar.n))

    def say(self, text):
        """Print a line above the bar."""
        self.bar.write(text)
