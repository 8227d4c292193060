"""Nothing lost, nothing silent: runs are killed at any moment and input is spoiled in any way, many
times, by seed.

The kills are slow and left out by default: python -m pytest -m slow -k killed -s
"""

import dataclasses
import io
import json
import math
import os
import pathlib
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import assistant
import data
import grpo
import lora
import naming
import protocols
import repic
import reward
import rrg
import run
from conftest import ROOT
from data import DataError
from test_lora import new_block, trained_block
from test_run import check_same_run, play, play_as_script, read_metrics, shrink_world

# ----------------------------------------------------------------------------------------- killed
KILLS = 50
KILLED_RUN = "--steps 5 --games 3 --samples 4 --eval-games 4 --save-every 1".split()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_move(number):
    """Be killed when the n-th file is about to be moved into place."""
    replace = os.replace
    moves = Counter()

    def counted(source, target):
        moves["all"] += 1
        if moves["all"] == number:
            die()
        replace(source, target)

    os.replace = counted


def die_half_written(number):
    """Be killed when half of the n-th file is written."""
    write_atomically = lora.write_atomically
    files = Counter()

    def halved(path, write):
        def write_half(temporary):
            files["all"] += 1
            write(temporary)
            if files["all"] == number:
                os.truncate(temporary, temporary.stat().st_size // 2)
                die()

        write_atomically(path, write_half)

    lora.write_atomically = halved
    run.write_atomically = halved


def child(out, plan, number):
    """One start of a short run on a small world, in a process of its own (see the end)."""
    if plan == "move":
        die_at_move(number)
    if plan == "half":
        die_half_written(number)
    torch.set_num_threads(1)
    can_resume = (pathlib.Path(out) / "state.pt").exists()
    options = ["--resume"] if can_resume else KILLED_RUN
    with pytest.MonkeyPatch.context() as patch:
        shrink_world(patch)
        play(out, *options)


def start_child(out, plan="none", number=0):
    paths = f"{ROOT}:{ROOT / 'toy-qwen2-vl'}:{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"
    return subprocess.Popen(
        [sys.executable, __file__, str(out), plan, str(number)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )


def check_files(out):
    """Each file that is there at all can be read, but for unfinished ones, whose names begin with
    a dot."""
    for file in out.rglob("*"):
        if file.name.startswith("."):
            continue
        if file.suffix == ".json":
            json.loads(file.read_text())
        if file.suffix == ".safetensors":
            load_file(file)
        if file.suffix == ".pt":
            torch.load(file, weights_only=True)


def start_and_kill(out, length, rng):
    """Start a run, or go on with it, and try to kill it: half of the times at any moment, else at
    a file.   -> how it was killed, or "" if it came to its end first

    length: seconds that a whole run takes
    """
    plan = rng.choice(["moment", "moment", "move", "half"])
    process = start_child(out, plan, rng.randint(1, 6))
    limit = rng.uniform(length / 3, length) if plan == "moment" else None
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    assert code in (0, -signal.SIGKILL), process.stderr.read()
    process.stderr.close()
    if code == 0:
        return ""
    if plan == "moment" and not (out / "metrics.csv").exists():
        return "at a moment, before training"
    return {"moment": "at a moment", "move": "before a move", "half": "in half a file"}[plan]


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_goes_on_to_the_same_bytes(tmp_path):
    whole = tmp_path / "whole"
    began = time.time()
    process = start_child(whole)
    assert process.wait() == 0, process.stderr.read()
    length = time.time() - began

    rng = random.Random(0)
    kills = Counter()
    runs = 0
    while kills.total() < KILLS:
        out = tmp_path / f"killed-{runs}"
        runs += 1
        while not (out / "result.json").exists():
            how = start_and_kill(out, length, rng)
            if how:
                kills[how] += 1
            check_files(out)
        check_same_run(out, whole)
    print(f"\n{kills.total()} kills in {runs} runs, each of which came to the same bytes: {kills}")


# ----------------------------------------------------------------------------------------- photos
NAMES = [
    "blue mug",
    "Tasse à café",
    "杯子",
    "a\nb",
    "<mug>",
    "mug.jpg",
    "{}",
    "'",
    '"',
    "C:\\mug",
    "-rf",
    "x" * 120,
    "mug  ",
    "%s",
    "train",
]
KINDS = ["PNG", "JPEG", "WEBP", "BMP"]
SUFFIXES = ["png", "jpg", "webp", "bmp", "PNG", "tiff"]
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


def picture_bytes(kind, width=40):
    """A picture file of that kind; pictures of different widths are different."""
    file = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").resize((width, 32)).save(file, kind)
    return file.getvalue()


def spoil(content, rng):
    """A picture file that went bad in one way or another, or stayed good."""
    cut = rng.randrange(1, len(content))
    pointer = LFS_POINTER if rng.random() < 0.2 else content  # one refuses the whole folder
    return rng.choice(
        [
            content,
            pointer,
            content + b"trailing",
            content[:cut],
            content[:cut] + rng.randbytes(20) + content[cut + 20 :],
            content[:8],
            bytes(len(content)),
            rng.randbytes(200),
            b"<html>404</html>",
            b"",
        ]
    )


def make_spoiled_folder(root, rng):
    """Three concepts with odd names and one to three photos each, in which anything is wrong."""
    for name in rng.sample(NAMES, 3):
        for view in range(rng.choice([1, 2, 3])):
            file = f"{rng.choice(NAMES[:5])} {view}.{rng.choice(SUFFIXES)}"
            path = root / rng.choice(["", "", "cups/"]) / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = picture_bytes(rng.choice(KINDS), rng.randint(40, 240))
            path.write_bytes(spoil(picture, rng))
    if rng.random() < 0.3:
        (root / "loop").symlink_to(root, target_is_directory=True)
    if rng.random() < 0.2:
        (root / "stray.png").write_bytes(picture_bytes("PNG"))


def is_picture(path):
    return path.is_file() and path.suffix.lower() in data.PHOTO_SUFFIXES


def check_loaded(root, concepts, messages):
    """Each picture file is a photo of a concept, or is counted among what was skipped."""
    photos = [photo for concept in concepts for photo in concept.photos]
    assert all(photo.load().mode == "RGB" for photo in photos)
    assert all(len(concept.photos) >= 2 for concept in concepts)
    assert len({photo.name for photo in photos}) == len(photos)
    assert len({concept.name for concept in concepts}) == len(concepts)

    skipped = 0
    for message in messages:
        found = re.search(r"^skipped .*?: (\d+), such as", message)
        skipped += int(found[1]) if found else 0
    files = [path for path in root.rglob("*") if is_picture(path)]
    assert len(files) == len(photos) + skipped


def test_photos_spoiled_in_any_way_are_counted_or_refused(tmp_path):
    """200 folders, each of which is loaded or refused with one message."""
    outcomes = Counter()
    for case in range(200):
        rng = random.Random(f"photos {case}")
        root = tmp_path / str(case)
        make_spoiled_folder(root, rng)
        messages = []
        try:
            concepts = data.load_concepts(root, messages.append)
        except DataError as error:
            assert str(error)
            outcomes["refused"] += 1
            continue
        check_loaded(root, concepts, messages)
        outcomes["loaded"] += 1
    assert outcomes["loaded"] > 20, outcomes
    assert outcomes["refused"] > 20, outcomes


# ------------------------------------------------------------------------------------------- JSON
def broken(value, rng):
    """A JSON value with one thing in it changed, taken away or of another kind."""
    inside = isinstance(value, (dict, list)) and value and rng.random() < 0.8
    if not inside:
        return rng.choice(
            [None, 7, -1.5, True, "", "text", [], {}, [None], {"a": []}, "../../etc/passwd"]
        )
    changed = value.copy()
    place = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    if rng.random() < 0.4:
        del changed[place]
    else:
        changed[place] = broken(value[place], rng)
    return changed


QUESTION = {
    "question": "What is <sks> doing?",
    "options": {"A": "Sitting", "B": "Running"},
    "correct_answer": "B",
}
QUESTIONS = {"bo": {"x/bo/1.png": QUESTION}, "mam": {"x/mam/2.png": QUESTION}}
PAIRS = [{"image": "x/bo/1.png", "concept": "<bo>", "correct_answer": True}]
DATABASE = {
    "concept_dict": {
        "<bo>": {
            "name": "bo",
            "image": "bo/1.png",
            "info": {"general": "A dog.", "category": "dog"},
            "category": "dog",
        },
        "<mam>": {"name": "mam", "image": ["mam/1.png", "mam/2.png"], "info": "A cat."},
    },
    "path_to_concept": {"bo/1.png": "<bo>", "mam/1.png": "<mam>"},
}
QUERIES = {"bo/1.png": ["<bo>", "<mam>"], "mam/1.png": [["<bo>"], ["<mam>"]]}


def read_json(name, root, concepts):
    """Read a published JSON file by its reader."""
    if name == "database.json":
        return assistant.read_database(root)
    if name == "yollava-visual-qa.json":
        return protocols.load_questions(root, concepts, log=print)
    if name == "recognition_test.json":
        return protocols.load_pairs(root, concepts)
    return naming.load_queries(root / name)


@pytest.mark.parametrize(
    "name, content",
    [
        ("database.json", DATABASE),
        ("yollava-visual-qa.json", QUESTIONS),
        ("recognition_test.json", PAIRS),
        ("queries.json", QUERIES),
    ],
)
def test_json_spoiled_in_any_way_is_read_or_refused(name, content, tmp_path):
    """60 files of each kind, each with one to three things wrong, and some cut off."""
    for width, photo in enumerate(("bo/1.png", "bo/2.png", "mam/1.png", "mam/2.png"), 40):
        (tmp_path / photo).parent.mkdir(exist_ok=True)
        (tmp_path / photo).write_bytes(picture_bytes("PNG", width))
    concepts = data.load_concepts(tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    assert read_json(name, tmp_path, concepts)

    outcomes = Counter()
    for case in range(60):
        rng = random.Random(f"{name} {case}")
        spoiled = content
        for _ in range(rng.randint(1, 3)):
            spoiled = broken(spoiled, rng)
        text = json.dumps(spoiled)
        if rng.random() < 0.1:
            text = text[: rng.randrange(len(text))]
        (tmp_path / name).write_text(text)
        try:
            read_json(name, tmp_path, concepts)
            outcomes["read"] += 1
        except DataError as error:
            assert str(error)
            outcomes["refused"] += 1
    assert outcomes["refused"] > 5, outcomes


# --------------------------------------------------------------------------------- a run's files
def small_state_file(path):
    """A state.pt as a run has it, but for its size.   -> its bytes"""
    lora_tensors = {f"layer {i}": torch.full((3, 4), float(i)) for i in range(4)}
    content = dict.fromkeys(run.STATE, 7) | {"lora": lora_tensors, "optimizer": {"state": {}}}
    torch.save(content, path)
    return path.read_bytes()


def test_a_state_spoiled_in_any_way_is_read_or_refused(tmp_path):
    """300 of them: cut off, overwritten in places, or something else."""
    file = tmp_path / "state.pt"
    good = small_state_file(file)
    outcomes = Counter()
    for case in range(300):
        rng = random.Random(f"state {case}")
        file.write_bytes(spoil(good, rng))
        try:
            assert run.load_state(tmp_path).keys() == run.STATE
            outcomes["read"] += 1
        except DataError as error:
            assert "\n" not in str(error)
            assert "to begin a new run, leave --resume out" in str(error)
            outcomes["refused"] += 1
    assert outcomes["refused"] > 150, outcomes
    assert outcomes["read"] > 20, outcomes


def test_logs_spoiled_in_any_way_are_mended_or_refused(tmp_path):
    """A log that is mended has its heading, whole rows and nothing else; a refused one stays."""
    heading = "step,reward,kl\n"
    rows = [f"{step},0.5,0.25\n" for step in range(1, 9)]
    good = (heading + "".join(rows)).encode()
    file = tmp_path / "metrics.csv"
    outcomes = Counter()
    for case in range(200):
        rng = random.Random(f"log {case}")
        spoiled = spoil(good, rng)
        file.write_bytes(spoiled)
        try:
            run.cut_log(file, 6, heading)
        except DataError as error:
            assert "\n" not in str(error)
            assert file.read_bytes() == spoiled
            outcomes["refused"] += 1
            continue
        first, *others = file.read_text().splitlines(keepends=True)
        assert first == heading
        assert all(re.fullmatch(r"[1-6],.*,.*\n", line) for line in others)
        outcomes["mended"] += 1
    assert outcomes["refused"] > 30, outcomes
    assert outcomes["mended"] > 30, outcomes


def test_a_config_spoiled_in_any_way_is_read_or_refused(tmp_path):
    settings = dataclasses.asdict(rrg.Config(out=str(tmp_path)))
    good = {"command": "python rrg.py", "settings": settings}
    (tmp_path / "state.pt").write_bytes(b"")
    outcomes = Counter()
    for case in range(200):
        rng = random.Random(f"config {case}")
        text = json.dumps(broken(good, rng))
        if rng.random() < 0.2:
            text = text[: rng.randrange(len(text))]
        (tmp_path / "config.json").write_text(text)
        try:
            run.resumed_settings(rrg.Config, {"out": str(tmp_path)})
            outcomes["read"] += 1
        except DataError as error:
            assert str(tmp_path / "config.json") in str(error)
            assert "\n" not in str(error)
            outcomes["refused"] += 1
    assert outcomes["refused"] > 60, outcomes
    assert outcomes["read"] > 20, outcomes


# --------------------------------------------------------------------------------------- adapters
def drop_setting(config, tensors, rng):
    del config[rng.choice(list(config))]


def change_rank(config, tensors, rng):
    config["r"] = rng.choice([0, -1, 3, "4", None, 10**9])


def change_alpha(config, tensors, rng):
    config["lora_alpha"] = rng.choice([None, "x", 0])


def change_kind(config, tensors, rng):
    config["peft_type"] = "IA3"


def add_dora(config, tensors, rng):
    config["use_dora"] = True


def drop_tensor(config, tensors, rng):
    del tensors[rng.choice(list(tensors))]


def cut_tensor(config, tensors, rng):
    name = rng.choice(list(tensors))
    tensors[name] = tensors[name][:1]


def turn_tensor(config, tensors, rng):
    name = rng.choice(list(tensors))
    tensors[name] = tensors[name].T


def flatten_tensor(config, tensors, rng):
    name = rng.choice(list(tensors))
    tensors[name] = tensors[name].flatten()


def add_tensor(config, tensors, rng):
    name = rng.choice(list(tensors))
    tensors[name + ".x"] = tensors[name]


def adapt_tower(config, tensors, rng):
    name = rng.choice(list(tensors))
    tensors[name.replace("language_model", "visual")] = tensors.pop(name)


def use_early_keys(config, tensors, rng):
    """The key layout of transformers before 4.52."""
    for name in list(tensors):
        tensors[name.replace("language_model.layers", "layers")] = tensors.pop(name)


def leave_alone(config, tensors, rng):
    pass


CHANGES = [
    drop_setting,
    change_rank,
    change_alpha,
    change_kind,
    add_dora,
    drop_tensor,
    cut_tensor,
    turn_tensor,
    flatten_tensor,
    add_tensor,
    adapt_tower,
    use_early_keys,
    leave_alone,
]


def write_adapter(folder, config, tensors, rng):
    """Its two files, of which either may be broken as a file."""
    folder.mkdir()
    text = rng.choice([json.dumps(config)] * 6 + ["", "[]", "{"])
    (folder / "adapter_config.json").write_text(text)
    copies = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    file = folder / "adapter_model.safetensors"
    save_file(copies, file)
    if rng.random() < 0.15:
        content = file.read_bytes()
        file.write_bytes(content[: rng.randrange(len(content))])


def same_tensors(state, other):
    if state.keys() != other.keys():
        return False
    return all(torch.equal(tensor, other[name]) for name, tensor in state.items())


def test_adapters_spoiled_in_any_way_load_whole_or_not_at_all(tmp_path):
    """80 adapters. One that is refused has changed nothing."""
    good = trained_block()
    lora.save_adapter(good, tmp_path / "good")
    config = json.loads((tmp_path / "good/adapter_config.json").read_text())
    tensors = load_file(tmp_path / "good/adapter_model.safetensors")

    outcomes = Counter()
    for case in range(80):
        rng = random.Random(f"adapter {case}")
        folder = tmp_path / str(case)
        bad_config = dict(config)
        bad_tensors = dict(tensors)
        for change in rng.sample(CHANGES, rng.choice([1, 1, 2])):
            change(bad_config, bad_tensors, rng)
        if rng.random() < 0.05:  # last, since the other changes want a tensor to change
            bad_tensors.clear()
        write_adapter(folder, bad_config, bad_tensors, rng)

        model = new_block()
        try:
            lora.load_adapter(model, folder)
        except ValueError as error:
            assert str(folder) in str(error)
            assert same_tensors(model.state_dict(), new_block().state_dict())
            outcomes["refused"] += 1
            continue
        assert same_tensors(lora.lora_state(model), lora.lora_state(good))
        outcomes["loaded"] += 1
    assert outcomes["loaded"] > 3, outcomes
    assert outcomes["refused"] > 30, outcomes


def test_the_early_key_layout_is_refused_with_the_way_out(tmp_path):
    lora.save_adapter(trained_block(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    use_early_keys({}, tensors, random.Random(0))
    save_file(tensors, file)
    with pytest.raises(ValueError, match="transformers before 4.52; to convert it, rename"):
        lora.load_adapter(new_block(), tmp_path)


# ---------------------------------------------------------------------------------------- answers
MARKERS = ["<|im_end|>", "<|im_start|>", "<|image_pad|>", "</s>"]
TAGS = ["<thinking>", "</thinking>", "<coarse>", "</coarse>", "<detailed>", "</detailed>"]
WORDS = ["yes", "no", "A photo of a mug", "The mug.", "<mug>", "[1,2,3,4]", "[1, 2, 3, 1e9]", "é"]
JSON_PARTS = ["{", "}", '{"Answer": "A"}', "```json", "```", "[", "-1", "\\", "杯"]
SIGNS = ['"', "“", "”", "'", "\n", "<", ">", "|", "\0", " "]
PIECES = MARKERS + TAGS + WORDS + JSON_PARTS + SIGNS


def test_answers_of_any_kind_are_read_or_refused():
    """500 answers made of tags, quotation marks and chat markers."""
    for case in range(500):
        rng = random.Random(f"answer {case}")
        text = "".join(rng.choices(PIECES, k=rng.randint(0, 30)))

        description = reward.parse(text)
        assert description is None or "<" not in description.text
        assert 0 <= reward.format_reward(text) <= 1
        assert 0 <= reward.length_reward(description) <= 1

        assert repic.oct_reward(text, "yes") in (0, 1)
        assert repic.vlt_reward(text, (1, 2, 3, 4), (9, 9), (9, 9)) in (0, 1)
        assert repic.ict_reward(text, ["<mug>", "<cup>"], 0) in (0, 0.5)
        row = assistant.read_answer(text, Answer="AB")
        assert row is None or row["Answer"] in ("A", "B")


def test_no_text_escapes_its_quotation_marks():
    for case in range(500):
        rng = random.Random(f"quoted {case}")
        text = "".join(rng.choices(PIECES, k=rng.randint(0, 30)))
        quoted = reward.quoted(text, MARKERS)
        assert quoted[0] == quoted[-1] == '"'
        assert not re.search(r'["<>|\n“”]', quoted[1:-1])
        assert not any(marker in quoted for marker in MARKERS)


# ------------------------------------------------------------------------- what a machine runs into
TINY = "--steps 4 --games 2 --samples 2 --eval-games 2 --save-every 1 --max-tokens 8".split()


def fails_with_one_line(monkeypatch, *arguments):
    """`python rrg.py ARGUMENTS` must fail.   -> the message"""
    with pytest.raises(SystemExit) as stop:
        play_as_script(monkeypatch, *arguments)
    message = stop.value.code
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


def saved_step(folder):
    """The step of the last save, which must be whole."""
    state = torch.load(folder / "state.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state["lora"].values())
    return state["step"]


@pytest.fixture
def small_files():
    """No file may grow beyond 1.5 MB here: adapters fit, the state of the optimizer does not."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_clear_line_and_the_last_save_stays_good(
    tmp_path, monkeypatch, small_files
):
    shrink_world(monkeypatch)
    message = fails_with_one_line(monkeypatch, "--out", tmp_path, *TINY)
    assert f"cannot write {tmp_path}/state.pt" in message
    assert "goes on with --resume" in message
    assert saved_step(tmp_path) == 0  # before the optimizer had a state
    assert not list(tmp_path.glob(".*"))  # no half-written file is left


def test_out_of_memory_is_one_clear_line_and_the_run_goes_on(tmp_path, monkeypatch):
    """What a GPU raises in the third step, raised by hand; --resume goes on from the last save."""
    grpo_loss = grpo.grpo_loss
    calls = Counter()

    def grpo_loss_until_full(*tensors, **settings):
        calls["all"] += 1
        if calls["all"] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return grpo_loss(*tensors, **settings)

    shrink_world(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(grpo, "grpo_loss", grpo_loss_until_full)
        message = fails_with_one_line(patch, "--out", tmp_path, *TINY)
    assert message.startswith("error: out of GPU memory; lower --micro")
    assert saved_step(tmp_path) == 2
    before = read_metrics(tmp_path)

    play(tmp_path, "--resume", "--micro", "1")
    assert saved_step(tmp_path) == 4
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert rows[:2] == before


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    message = fails_with_one_line(monkeypatch, "--out", tmp_path / "file/x")
    assert "Not a directory" in message


def test_a_belief_that_is_not_a_number_stops_the_run(tmp_path, monkeypatch):
    def belief(logits, yes, no):
        return torch.full((len(logits),), math.nan)

    shrink_world(monkeypatch)
    monkeypatch.setattr(reward, "belief", belief)
    message = fails_with_one_line(monkeypatch, "--out", tmp_path, *TINY, "--max-tokens", "48")
    assert "scoring has failed" in message


def test_a_gradient_that_is_not_a_number_stops_the_run_before_the_update(tmp_path, monkeypatch):
    grpo_loss = grpo.grpo_loss

    def grpo_loss_not_finite(*tensors, **settings):
        loss, stats = grpo_loss(*tensors, **settings)
        return loss * math.nan, stats

    shrink_world(monkeypatch)
    monkeypatch.setattr(grpo, "grpo_loss", grpo_loss_not_finite)
    message = fails_with_one_line(monkeypatch, "--out", tmp_path, *TINY)
    assert "the gradient is not finite; start anew with a lower --lr" in message
    assert saved_step(tmp_path) == 0


if __name__ == "__main__":
    out, plan, number = sys.argv[1:]
    child(out, plan, int(number))
