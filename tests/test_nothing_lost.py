"""Nothing lost, nothing silent: runs are killed at any moment and input is spoiled in any way, many times, by seed.

The kills are slow and left out by default: python -m pytest -m slow -k killed -s
"""
import io
import json
import os
import pathlib
import random
import re
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import evaluate
import grpo
import reward
import rrg
import toy
from conftest import ROOT
from test_grpo import Block, trained_block

KILLS = 50


# ------------------------------------------------------------------------------------------------------------------ killed
def child(out, plan):
    """One start of a short run on a small world, in a process of its own; `plan` ("write", n) dies at the n-th move of a file into place,
    ("half", n) while the n-th file is being written."""
    world = toy.world
    toy.world = lambda seed, size: world(seed, size, 4, 3)
    count, replace, write = Counter(), os.replace, grpo.write_atomically
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)

    def counted(*paths):
        count["write"] += 1
        if plan == ["write", count["write"]]:
            die()
        replace(*paths)

    def halved(path, do):
        def half(temporary):
            count["half"] += 1
            do(temporary)
            if plan == ["half", count["half"]]:
                os.truncate(temporary, temporary.stat().st_size // 2)
                die()
        write(path, half)

    os.replace, grpo.write_atomically = counted, halved
    begin = ["--steps", "5", "--games", "3", "--samples", "4", "--eval-games", "4", "--save-every", "1"]
    torch.set_num_threads(1)
    rrg.train(*rrg.settings(["--out", str(out), *(["--resume"] if (pathlib.Path(out) / "state.pt").exists() else begin)]))


def whole(out):
    """Every file of a run that is there at all can be read, and nothing unfinished lies where somebody would take it for whole."""
    for file in out.rglob("*"):
        if file.name.startswith(".") or not file.is_file():
            continue
        if file.suffix == ".json":
            json.loads(file.read_text())
        if file.suffix == ".safetensors":
            load_file(file)
        if file.suffix == ".pt":
            torch.load(file, weights_only=True)


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_goes_on_to_the_same_bytes(tmp_path):
    start = lambda out, plan: subprocess.Popen(
        [sys.executable, __file__, str(out), json.dumps(plan)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"})
    began = time.time()
    process = start(tmp_path / "whole", [])
    assert process.wait() == 0, process.stderr.read()
    length, rng, how, runs = time.time() - began, random.Random(0), Counter(), 0
    while how.total() < KILLS:
        out, runs = tmp_path / f"killed-{runs}", runs + 1
        while not (out / "result.json").exists():
            plan = rng.choice([[], [], ["write", rng.randint(1, 6)], ["half", rng.randint(1, 6)]]) if how.total() < KILLS else []
            process = start(out, plan)
            try:
                code = process.wait(rng.uniform(length / 3, length) if not plan and how.total() < KILLS else None)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
            assert code in (0, -signal.SIGKILL), process.stderr.read()
            if code:
                last = len((out / "metrics.csv").read_text().splitlines()) - 1 if (out / "metrics.csv").exists() else -1
                how[plan[0] if plan else "at a moment, set up" if last < 0 else "at a moment, training"] += 1
            whole(out)
        for name in ("adapter/adapter_model.safetensors", "samples.jsonl"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        seconds = re.compile(r",[^,]*$", re.M)
        assert seconds.sub("", (out / "metrics.csv").read_text()) == seconds.sub("", (tmp_path / "whole" / "metrics.csv").read_text())
    print(f"\n{how.total()} kills in {runs} runs, {dict(how)}: each went on to the same adapter, samples and metrics")


# --------------------------------------------------------------------------------------------------------------- bad input
def picture_bytes(kind, width=40):
    file = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").resize((width, 32)).save(file, kind)
    return file.getvalue()


GOOD = {"png": picture_bytes("PNG"), "jpg": picture_bytes("JPEG"), "webp": picture_bytes("WEBP"), "bmp": picture_bytes("BMP")}
NAMES = ["blue mug", "Tasse à café", "杯子", "a\nb", "<mug>", "mug.jpg", "{}", "'", '"', "C:\\mug", "-rf", "x" * 120, "mug  ", "%s", "train"]


def spoil(content, rng):
    """One way in which a picture file goes bad, or stays good."""
    cut = rng.randrange(1, len(content))
    return rng.choice([
        lambda: b"", lambda: content[:cut], lambda: content[:8], lambda: b"\0" * len(content), lambda: rng.randbytes(200), lambda: content + b"trailing",
        lambda: content[:cut] + rng.randbytes(20) + content[cut + 20:], lambda: b"<html>404</html>", lambda: content,
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n" if rng.random() < 0.2 else content])()


def test_photos_spoiled_in_any_way_are_counted_or_refused(tmp_path):
    """200 folders. Each picture file is loaded, reported as skipped, or the folder is refused with one line."""
    outcomes = Counter()
    for case in range(200):
        rng, root, said = random.Random(f"photos {case}"), tmp_path / str(case), []
        for name in rng.sample(NAMES, 3):
            for view in range(rng.choice([1, 2, 3])):
                path = root / rng.choice(["", "", "cups/"]) / name / f"{rng.choice(NAMES[:5])} {view}.{rng.choice([*GOOD, 'PNG', 'tiff'])}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(spoil(picture_bytes(rng.choice(["PNG", "JPEG", "WEBP", "BMP"]), rng.randint(40, 99)), rng))
        if rng.random() < 0.3:
            (root / "loop").symlink_to(root, target_is_directory=True)
        if rng.random() < 0.2:
            (root / "stray.png").write_bytes(GOOD["png"])
        try:
            concepts = data.load_concepts(root, said.append)
        except data.DataError as error:
            outcomes["refused"] += 1
            assert str(error)
            continue
        photos = [photo for concept in concepts for photo in concept.photos]
        assert all(photo.open().mode == "RGB" for photo in photos) and all(len(concept.photos) >= 2 for concept in concepts)
        assert len({photo.name for photo in photos}) == len(photos) and len({concept.name for concept in concepts}) == len(concepts)
        skipped = sum(int(line.split(": ")[1].split(",")[0]) for line in said if line.startswith("skipped "))  # broken, copies and lonely ones
        files = [path for path in root.rglob("*") if path.is_file() and path.suffix.lower() in data.PICTURES]
        assert len(files) == len(photos) + skipped
        outcomes["loaded"] += 1
    assert outcomes["loaded"] > 20 and outcomes["refused"] > 20, outcomes


def broken(value, rng):
    """A JSON value with one thing in it changed, taken away or of another kind."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        return {k: v for k, v in value.items() if k != key} if rng.random() < 0.4 else value | {key: broken(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        return value[:i] + value[i + 1:] if rng.random() < 0.4 else value[:i] + [broken(value[i], rng)] + value[i + 1:]
    return rng.choice([None, 7, -1.5, True, "", "text", [], {}, [None], {"a": []}, "../../etc/passwd"])


ITEM = {"question": "What is <sks> doing?", "options": {"A": "Sitting", "B": "Running"}, "correct_answer": "B"}
DATABASE = {"concept_dict": {"<bo>": {"name": "bo", "image": "bo/1.png", "info": {"general": "A dog.", "category": "dog"}, "category": "dog"},
                             "<mam>": {"name": "mam", "image": ["mam/1.png", "mam/2.png"], "info": "A cat."}},
            "path_to_concept": {"bo/1.png": "<bo>", "mam/1.png": "<mam>"}}


@pytest.mark.parametrize("name, content, read", [
    ("database.json", DATABASE, lambda root, concepts: data.read_database(root)),
    ("yollava-visual-qa.json", {"bo": {"x/bo/1.png": ITEM}, "mam": {"x/mam/2.png": ITEM}}, lambda root, concepts: data.load_questions(root, concepts, lambda _: None)),
    ("recognition_test.json", [dict(image="x/bo/1.png", concept="<bo>", correct_answer=True)], data.load_pairs),
    ("queries.json", {"bo/1.png": ["<bo>", "<mam>"], "mam/1.png": [["<bo>"], ["<mam>"]]}, lambda root, concepts: data.load_queries(root / "queries.json"))])
def test_json_spoiled_in_any_way_is_read_or_refused(tmp_path, name, content, read):
    """4 x 60 files, each with one to three things wrong."""
    for thing, picture in zip(("bo/1", "bo/2", "mam/1", "mam/2"), GOOD.values()):
        (tmp_path / thing).parent.mkdir(exist_ok=True)
        (tmp_path / f"{thing}.png").write_bytes(picture)
    concepts, outcomes = data.load_concepts(tmp_path), Counter()
    for case in range(60):
        rng, bad = random.Random(f"{name} {case}"), content
        for _ in range(rng.randint(1, 3)):
            bad = broken(bad, rng)
        text = json.dumps(bad)
        (tmp_path / name).write_text(text[:rng.randrange(len(text))] if rng.random() < 0.1 else text)
        try:
            read(tmp_path, concepts)
            outcomes["read"] += 1
        except data.DataError as error:
            assert str(error)
            outcomes["refused"] += 1
    assert outcomes["refused"] > 5, outcomes


def test_adapters_spoiled_in_any_way_load_whole_or_not_at_all(tmp_path):
    """80 adapters. One that is refused has changed nothing."""
    model, _ = trained_block()
    grpo.save_adapter(model, tmp_path / "good")
    config, tensors = json.loads((tmp_path / "good/adapter_config.json").read_text()), load_file(tmp_path / "good/adapter_model.safetensors")
    want, outcomes = grpo.lora_state(model), Counter()
    for case in range(80):
        rng, folder = random.Random(f"adapter {case}"), tmp_path / str(case)
        folder.mkdir()
        bad, parts, key = dict(config), dict(tensors), rng.choice(list(tensors))
        for change in rng.sample([
                lambda: bad.pop(rng.choice(list(bad))), lambda: bad.update(r=rng.choice([0, -1, 3, "4", None, 10 ** 9])), lambda: bad.update(lora_alpha=rng.choice([None, "x", 0])),
                lambda: bad.update(peft_type="IA3"), lambda: bad.update(use_dora=True), lambda: parts.pop(key), lambda: parts.update({key: parts[key][:1]}),
                lambda: parts.update({key: parts[key].T.contiguous()}), lambda: parts.update({key: parts[key].flatten()}), lambda: parts.update({key + ".x": parts[key]}),
                lambda: parts.update({key.replace("q_proj", "visual"): parts.pop(key)}), lambda: parts.clear(), lambda: None], rng.choice([1, 1, 2])):
            if parts and (key in parts or "parts" not in str(change)):
                change()
        (folder / "adapter_config.json").write_text(rng.choice([json.dumps(bad)] * 6 + ["", "[]", "{"]))
        save_file({k: v.clone().contiguous() for k, v in parts.items()}, folder / "adapter_model.safetensors")
        if rng.random() < 0.15:
            content = (folder / "adapter_model.safetensors").read_bytes()
            (folder / "adapter_model.safetensors").write_bytes(content[:rng.randrange(len(content))])
        fresh = Block()
        before = {k: v.clone() for k, v in fresh.state_dict().items()}
        try:
            grpo.load_adapter(fresh, folder)
            outcomes["loaded"] += 1
            assert all(torch.equal(value, want[name]) for name, value in grpo.lora_state(fresh).items()) and grpo.lora_state(fresh).keys() == want.keys()
        except ValueError as error:
            outcomes["refused"] += 1
            assert str(folder) in str(error)
            assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items() if k in before)
    assert outcomes["loaded"] > 3 and outcomes["refused"] > 30, outcomes


PIECES = ["<thinking>", "</thinking>", "<coarse>", "</coarse>", "<detailed>", "</detailed>", "<|im_end|>", "<|im_start|>", "<|image_pad|>", '"', "“", "”", "'", "\n", "{", "}",
          "\\", "yes", "A photo of a mug", "The mug.", "<", ">", "|", "[1,2,3,4]", "[", "-1", "</s>", "\0", "é", "杯", '{"Answer": "A"}', "```json", " "]


def test_answers_of_any_kind_are_read_or_refused_and_never_escape_their_quotation_marks():
    """500 answers made of tags, quotation marks and chat markers."""
    markers = ["<|im_end|>", "<|im_start|>", "<|image_pad|>", "</s>"]
    for case in range(500):
        rng = random.Random(f"answer {case}")
        text = "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 30)))
        parsed, quoted = reward.parse(text), reward.quoted(text, markers)
        assert parsed is None or "<" not in parsed.text
        assert quoted[0] == quoted[-1] == '"' and not re.search(r'["<>|\n“”]', quoted[1:-1]) and not any(marker in quoted for marker in markers)
        assert 0 <= reward.format_reward(text) <= 1 and reward.oct_reward(text, "yes") in (0, 1) and reward.ict_reward(text, ["<mug>"], 0) in (0, 1)
        assert reward.vlt_reward(text, (1, 2, 3, 4), (9, 9), (9, 9)) in (0, 1)
        row = evaluate.read_answer(text, Answer="AB")
        assert row is None or row["Answer"] in "AB"


# --------------------------------------------------------------------------------------------------- what a machine runs into
def test_a_full_disk_is_one_clear_line(tmp_path):
    """Files may not grow beyond 300 kB here: the adapter fits, the state of the optimizer does not."""
    limited = "import resource, runpy, sys, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)); " \
              "sys.argv = sys.argv[1:]; runpy.run_path('rrg.py', run_name='__main__')"
    options = ["--out", str(tmp_path / "x"), "--steps", "1", "--games", "2", "--samples", "2", "--eval-games", "1"]
    done = subprocess.run([sys.executable, "-c", limited, "rrg.py", *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and "cannot write" in done.stderr
    assert not (tmp_path / "x/state.pt").exists()


def test_out_of_memory_is_one_clear_line_and_the_run_goes_on(tmp_path, monkeypatch):
    """What a GPU raises in the third step's backward pass, raised here by hand; --resume then goes on from the last save."""
    loss, calls = grpo.grpo_loss, Counter()

    def full(*inputs, **settings):
        calls["loss"] += 1
        if calls["loss"] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return loss(*inputs, **settings)

    small = "--steps 4 --games 2 --samples 2 --eval-games 2 --save-every 1 --max-tokens 8".split()
    monkeypatch.setattr(grpo, "grpo_loss", full)
    monkeypatch.setattr(toy, "world", lambda seed, size, world=toy.world: world(seed, size, 4, 2))
    monkeypatch.setattr(sys, "argv", ["rrg.py", "--out", str(tmp_path / "x"), *small])
    with pytest.raises(SystemExit, match="^error: out of GPU memory; lower --micro"):
        runpy.run_path(str(ROOT / "rrg.py"), run_name="__main__")
    assert torch.load(tmp_path / "x/state.pt", weights_only=True)["step"] == 2
    monkeypatch.setattr(sys, "argv", ["rrg.py", "--out", str(tmp_path / "x"), "--resume", "--micro", "1"])
    runpy.run_path(str(ROOT / "rrg.py"), run_name="__main__")
    assert (tmp_path / "x/result.json").is_file()


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    done = subprocess.run([sys.executable, "rrg.py", "--out", str(tmp_path / "file/x")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and done.stderr.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("what", ["listener", "loss"])
def test_a_number_that_is_not_one_stops_the_run_before_the_update(tmp_path, monkeypatch, what):
    world = toy.world
    monkeypatch.setattr(toy, "world", lambda seed, size: world(seed, size, 4, 3))
    if what == "listener":
        monkeypatch.setattr(reward, "belief", lambda logits, yes, no: torch.full((len(logits),), torch.nan))
    else:
        loss = grpo.grpo_loss
        monkeypatch.setattr(grpo, "grpo_loss", lambda *a, **k: (loss(*a, **k)[0] * torch.nan, {"kl": 0.0, "clip_high": 0.0, "clip_low": 0.0}))
    options = ["--out", str(tmp_path / "x"), "--steps", "2", "--games", "2", "--samples", "2", "--eval-games", "2"]
    with pytest.raises(FloatingPointError):
        rrg.train(*rrg.settings(options))
    if what == "loss":
        state = torch.load(tmp_path / "x/state.pt", weights_only=True)
        assert state["step"] == 0 and all(value.isfinite().all() for value in state["lora"].values())


def test_nothing_is_run_from_data():
    """No pickle, and no code that comes with a checkpoint."""
    for script in ROOT.glob("*.py"):
        text = script.read_text()
        assert "trust_remote_code" not in text and "pickle" not in text.replace("allow_pickle=False", "")
        assert text.count("torch.load(") == text.count("weights_only=True")


if __name__ == "__main__":
    child(sys.argv[1], json.loads(sys.argv[2]))
