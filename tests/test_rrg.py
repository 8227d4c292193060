"""The game: the two primitives equal the plain model, runs resume to the same numbers, and playing teaches."""
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import data
import grpo
import reward
import rrg
import toy
from conftest import ROOT, asking


def plain_logps(mllm, photo, ids, *more, text=reward.SPEAK):
    """Log-probs of one answer by the model's own forward pass: no cache, no shared prefix, no padding. `more` photos follow the first."""
    head, *rest = mllm.chat(photo, *more, text).split(mllm.image_token)
    prompt = head + "".join(mllm.image_token * len(features) + part for (features, _), part in zip(mllm.look([photo, *more]), rest))
    prompt = torch.tensor(mllm.encode(prompt))
    row = torch.cat([prompt, ids])[None]
    pixels = mllm.processor(images=[picture.open() for picture in (photo, *more)], return_tensors="pt")
    logits = mllm.model(input_ids=row, mm_token_type_ids=(row == mllm.config.image_token_id).int(), **pixels).logits[0]
    return logits.log_softmax(-1)[len(prompt) - 1:-1].gather(1, ids[:, None]).squeeze(1)


def test_sampling_scoring_and_the_plain_model_agree(random_mllm, photos):
    """Three picture sizes, so left padding; G = 4, so shared prefixes."""
    answers = random_mllm.speak(asking(photos), samples=4, max_tokens=12, generator=torch.Generator().manual_seed(1))
    scored = random_mllm.score(asking(photos), answers.ids)
    mask = answers.mask
    assert mask.shape == (12, answers.ids.shape[1]) and torch.allclose(scored[mask], answers.logps[mask], atol=1e-5)
    # the plain model cannot read an answer in which an untrained model happened to write an image marker; ours can
    readable = [row for row in range(12) if random_mllm.config.image_token_id not in answers.ids[row]]
    assert {row // 4 for row in readable} == {0, 1, 2}
    for row in readable:
        ids = answers.ids[row][mask[row]]
        assert torch.allclose(plain_logps(random_mllm, photos[row // 4], ids), answers.logps[row][mask[row]], atol=1e-5)


def test_several_pictures_in_a_prompt_are_read_as_the_plain_model_reads_them(random_mllm, photos):
    """One, two and three pictures of different sizes in one batch, each before its text."""
    groups = [photos[:1], photos[1:], [photos[2], photos[0], photos[1]]]
    texts = [reward.SPEAK, "".join(reward.LISTEN), "red mug"]
    ids = torch.randint(8, 70, (6, 5))
    scored = random_mllm.score(list(zip(groups, texts)), ids)
    for row in range(6):
        group = groups[row // 2]
        assert torch.allclose(plain_logps(random_mllm, group[0], ids[row], *group[1:], text=texts[row // 2]), scored[row], atol=1e-5)


def test_qwen25_vl_plays_too(tmp_path, photos):
    """Its other vision tower and positions go through the same code."""
    torch.manual_seed(0)
    tokenizer, like = toy.new_tokenizer(), toy.new_model(toy.new_tokenizer()).config
    marks = {k: getattr(like, k) for k in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")}
    vision = dict(depth=2, hidden_size=64, intermediate_size=96, num_heads=2, out_hidden_size=toy.WIDTH, patch_size=8, spatial_merge_size=2,
                  window_size=32, fullatt_block_indexes=[1])
    text = like.text_config.to_dict() | {"model_type": "qwen2_5_vl_text"}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **marks))
    model.generation_config.eos_token_id = like.text_config.eos_token_id
    for part in (model, tokenizer, toy.Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2, min_pixels=1024, max_pixels=65536)):
        part.save_pretrained(tmp_path)
    mllm = rrg.MLLM(str(tmp_path), 65536)
    assert not any("visual" in name for name in grpo.add_lora(mllm.model, 2, 4))  # its tower has layers of the same names
    ids = torch.randint(8, 70, (3, 6))
    scored = mllm.score(asking(photos), ids)
    for row in range(3):
        assert torch.allclose(plain_logps(mllm, photos[row], ids[row]), scored[row], atol=1e-5)


def test_gradients_through_the_shared_prefix_equal_the_plain_ones(random_mllm, photos):
    torch.manual_seed(0)
    grpo.add_lora(random_mllm.model, 4, 8)
    for layer in grpo.lora_layers(random_mllm.model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    ids = torch.randint(8, 70, (6, 5))
    weights = torch.randn(6, 5)

    def gradients(logps):
        random_mllm.model.zero_grad()
        (logps * weights).sum().backward()
        return torch.cat([p.grad.flatten() for p in random_mllm.model.parameters() if p.requires_grad])

    shared = gradients(random_mllm.score(asking(photos), ids))
    plain = gradients(torch.stack([plain_logps(random_mllm, photos[row // 2], ids[row]) for row in range(6)]))
    one_by_one = gradients(torch.cat([random_mllm.score(asking(photos[i:i + 1]), ids[2 * i:2 * i + 2]) for i in range(3)]))
    assert torch.allclose(shared, plain, atol=1e-4 * plain.abs().max()) and torch.allclose(shared, one_by_one, atol=1e-4 * plain.abs().max())


def test_answers_end_at_either_end_of_text(random_mllm, photos):
    ends = random_mllm.ends.tolist()
    assert len(ends) == 2
    answers = random_mllm.speak(asking(photos), samples=40, max_tokens=40, generator=torch.Generator().manual_seed(0))
    seen = set()
    for ids, mask, text in zip(answers.ids.tolist(), answers.mask.tolist(), answers.texts):
        stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        assert mask == [i <= stop for i in range(len(ids))]  # up to and including the first end
        assert not any(random_mllm.tokenizer.decode([end]) in text for end in ends)
        seen |= {ids[stop]} if stop < len(ids) else set()
    assert seen == set(ends)


def test_samples_differ_whatever_the_checkpoint_asks_for(random_mllm, photos):
    assert random_mllm.model.generation_config.top_k == 1
    texts = random_mllm.speak(asking(photos[:1]), samples=8, max_tokens=10, generator=torch.Generator().manual_seed(0)).texts
    assert len(set(texts)) == 8
    assert texts == random_mllm.speak(asking(photos[:1]), samples=8, max_tokens=10, generator=torch.Generator().manual_seed(0)).texts
    assert len(set(random_mllm.speak(asking(photos[:1]), samples=3, max_tokens=10).texts)) == 1  # greedy


def test_sampling_follows_the_models_own_distribution(random_mllm, photos):
    prefix = random_mllm.prefill([random_mllm.chat(photos[0], reward.SPEAK)], [photos[:1]])
    chance = random_mllm.model.lm_head(prefix.last)[0].softmax(-1)
    tokens = random_mllm.sample(prefix.take(torch.zeros(4000, dtype=torch.long)), 1, torch.Generator().manual_seed(0)).ids[:, 0]
    assert (torch.bincount(tokens, minlength=len(chance)) / 4000 - chance).abs().max() < 0.03


# --------------------------------------------------------------------------------------------------------------- listener
def test_questions_of_any_length_are_answered_as_if_alone(random_mllm, photos):
    """Left padding between the shared prefix and the answer changes nothing: the same log-probs as the plain model's."""
    prompt = reward.LISTEN
    texts = ["red", "A photo of a red mug with a star badge on grass", "The mug , tilted on sand in dim light ."]
    pairs = [(photo, text) for photo in photos for text in texts]
    seen = {}
    for chunk, prefix in random_mllm.ask(prompt, pairs):
        assert chunk and not prefix.mask.all()  # photos of three sizes and texts of three lengths
        seen |= zip(chunk, zip(prefix.last, random_mllm.sample(prefix, 6).texts))
    assert set(seen) == set(pairs)
    for photo, text in pairs:
        (chunk, prefix), = random_mllm.ask(prompt, [(photo, text)])
        last, answer = seen[photo, text]
        assert prefix.mask.all() and torch.allclose(prefix.last[0], last, atol=1e-5) and random_mllm.sample(prefix, 6).texts == [answer]
    assert random_mllm.reply(prompt, pairs, 6) == [seen[pair][1] for pair in pairs]


def test_listening_is_the_same_in_any_company(toy_mllm, photos):
    """rho does not depend on what else is asked at the same time: padding, order, repeats, chunks."""
    pairs = [(photo, text) for photo in photos for text in ("A photo of a red mug. The red mug.", "A photo of a bag. The dotted bag with a star badge, on sand.")]
    alone = torch.cat([toy_mllm.listen([pair]) for pair in pairs])
    assert torch.allclose(toy_mllm.listen(pairs + pairs[:1]), torch.cat([alone, alone[:1]]), atol=1e-5)
    assert (alone > 0).all() and (alone < 1).all()


def test_listening_reads_the_first_answer_token_of_the_plain_model(toy_mllm, photos):
    text = "A photo of a red mug. The red mug."
    (features, _), = toy_mllm.look(photos[:1])
    prompt = toy_mllm.chat(None, reward.LISTEN[0], f'"{text}"', reward.LISTEN[1]).replace(toy_mllm.image_token, toy_mllm.image_token * len(features))
    row = torch.tensor([toy_mllm.encode(prompt)])
    pixels = toy_mllm.processor(images=[photos[0].open()], return_tensors="pt")
    logits = toy_mllm.model(input_ids=row, mm_token_type_ids=(row == toy_mllm.config.image_token_id).int(), **pixels).logits[0, -1]
    yes, no = (logits[toy_mllm.encode(word)[0]] for word in ("yes", "no"))
    assert torch.allclose(toy_mllm.listen([(photos[0], text)])[0], torch.sigmoid(yes - no), atol=1e-5)


def test_the_listener_is_the_model_with_lora_off(random_folder, photos):
    mllm = rrg.MLLM(str(random_folder), 65536)
    before = mllm.listen([(photos[0], "A photo of a mug. The mug.")])
    grpo.add_lora(mllm.model, 4, 8)
    for layer in grpo.lora_layers(mllm.model).values():
        torch.nn.init.normal_(layer.lora_B.weight)
    assert torch.equal(mllm.listen([(photos[0], "A photo of a mug. The mug.")]), before)
    assert not torch.equal(mllm.listen([(photos[0], "A photo of a mug. The mug.")], frozen=False), before)  # --listener trained


def test_a_failing_listener_raises(toy_mllm, monkeypatch):
    game = game_of(toy.world(0))
    monkeypatch.setattr(toy_mllm, "listen", lambda pairs, frozen: torch.full((len(pairs),), torch.nan))
    with pytest.raises(FloatingPointError, match="scoring has failed"):
        rrg.judge(toy_mllm, [game], ["<thinking> a </thinking> <coarse> A photo of a mug </coarse> <detailed> The mug. </detailed>"], rrg.Config())


def test_what_cannot_be_parsed_is_never_shown_to_the_listener(toy_mllm, monkeypatch):
    monkeypatch.setattr(toy_mllm, "listen", lambda pairs, frozen: pytest.fail("the listener was asked"))
    row, = rrg.judge(toy_mllm, [game_of(toy.world(0))], ["The mug."], rrg.Config())
    assert row["reward"] == row["listener_reward"] == row["parsed"] == 0 and row["rho"] is None


# -------------------------------------------------------------------------------------------------------- RePIC and SFT
def make_tasks(kind, count=12, concepts=None):
    concepts = concepts or toy.world(0, concepts=3, views=3)
    return data.make_tasks(concepts, {kind: 1.0}, count, reward.REPIC, rrg.phrase, toy.SIDE, 0)


def test_each_task_is_paid_by_its_own_rule(toy_mllm):
    pay = lambda task, *texts, **how: [row["reward"] for row in rrg.verify(toy_mllm, [task], texts, rrg.Config(min_chars=30, **how))]
    task = make_tasks("oct", 1)[0]
    assert pay(task, task.solution, "know", "yes no") == [1, 0, 0]
    task = make_tasks("vlt", 1)[0]
    (x1, y1, x2, y2), size = task.solution
    assert size == (144, 144) == task.photos[0].open().size == toy_mllm.size(task.photos[0])
    assert pay(task, f"[{x1}, {y1}, {x2}, {y2}]", f"[{x1}, {y1}, {x2}, {y1 + 20}]") == [1, 0]
    task = make_tasks("multi_ict", 1)[0]
    named = " ".join(f"{name} is here and nowhere else." for name in task.solution)
    assert pay(task, named, task.solution[0], named.replace(task.solution[0], "it")) == pytest.approx([1, 0, 1 - 1 / len(task.solution)])
    assert pay(task, task.solution[0], without="length") == [1 / len(task.solution)]
    row, = rrg.verify(toy_mllm, [task], [named], rrg.Config(min_chars=30))
    assert row == {"text": named, "reward": 1.0, "multi_ict": 1.0}


def test_boxes_are_mapped_through_the_resize_the_model_saw(toy_mllm, random_mllm):
    task = make_tasks("vlt", 1)[0]
    assert random_mllm.size(task.photos[0]) == (144, 144)
    small = rrg.MLLM(str(toy.FOLDER), 72 * 72)  # a processor that halves the scene: to 64 pixels, since sides are multiples of 16
    assert small.size(task.photos[0]) == (64, 64)
    box = [v * 64 / 144 for v in task.solution[0]]
    assert rrg.verify(small, [task], [str(box)], rrg.Config())[0]["reward"] == 1


def test_the_answers_of_a_group_are_to_one_prompt(random_mllm):
    """RePIC's code shuffled its data on every GPU and drew a wording for every answer."""
    config = rrg.Config(method="repic", samples=4, max_tokens=8, micro=2)
    tasks, asked, speak = make_tasks("single_ict", 3), [], random_mllm.speak
    random_mllm.speak = lambda prompts, samples, *rest: (asked.append((prompts, samples)), speak(prompts, samples, *rest))[1]
    answers, ref, advantages, rows = rrg.play(random_mllm, tasks, 0, config)
    assert asked == [([(task.photos, task.text) for task in tasks], 4)] and len(rows) == 12 == len(advantages)
    assert all("single_ict" in row for row in rows) and torch.allclose(ref[answers.mask], answers.logps[answers.mask], atol=1e-4)


def test_sft_is_cross_entropy(random_folder):
    """The update of given answers with advantage 1 has the gradient of the plain cross-entropy, each caption weighing the same."""
    mllm = rrg.MLLM(str(random_folder), 65536)
    torch.manual_seed(0)
    grpo.add_lora(mllm.model, 4, 8)
    for layer in grpo.lora_layers(mllm.model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    parameters = [p for p in mllm.model.parameters() if p.requires_grad]
    tasks = [make_tasks("multi_ict", 1)[0], make_tasks("single_ict", 1)[0]]
    config = rrg.Config(method="sft", micro=1, min_chars=30, **rrg.SFT)
    answers, ref, advantages, rows = rrg.play(mllm, tasks, 0, config)
    assert answers.texts == rrg.given_captions(mllm, tasks, 0) and all(row["reward"] == 1 for row in rows)  # the given captions use every name
    assert all(mllm.tokenizer.decode(ids[mask]).endswith("<|im_end|>") for ids, mask in zip(answers.ids, answers.mask))

    class Keep(torch.optim.SGD):
        def step(self):
            self.kept = torch.cat([p.grad.flatten() for p in parameters])

    optimizer = Keep(parameters, lr=0.0)
    log = rrg.update(mllm, tasks, answers, ref, advantages, optimizer, config)
    mllm.model.zero_grad()
    loss = -sum(plain_logps(mllm, task.photos[0], ids[mask], *task.photos[1:], text=task.text).mean() for task, ids, mask in zip(tasks, answers.ids, answers.mask)) / 2
    loss.backward()
    plain = torch.cat([p.grad.flatten() for p in parameters])
    assert torch.allclose(optimizer.kept / optimizer.kept.norm(), plain / plain.norm(), atol=1e-4) and log["kl"] > 0.01  # against LoRA off; its weight is 0


def game_of(concepts):
    a, b, c = concepts[:3]
    return data.Game(a.name, a.category, a.photos[0], [b.photos[0], a.photos[1], c.photos[0]], 1)


# ------------------------------------------------------------------------------------------------------------------- runs
def small(out, *extra):
    return ["--out", str(out), "--steps", "4", "--games", "3", "--samples", "4", "--eval-games", "6", "--save-every", "2", *extra]


def run(*arguments, **how):
    done = subprocess.run([sys.executable, "rrg.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, **how)
    return done


def rows(folder):
    with open(folder / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = run(*small(out))
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_a_run_records_itself(whole_run):
    out, said = whole_run
    result = json.loads((out / "result.json").read_text())
    parts = {"identification", "oracle", "leakage", "coverage", "parsed"}
    for when in ("before", "after"):
        assert set(result[when]) == parts | {"unseen"} and set(result[when]["unseen"]) == parts
        assert all(0 <= result[when][part] <= 1 for part in parts)
    assert set(result) == {"before", "after", "examples", "seed", "steps", "seconds", "device"} and result["steps"] == 4
    config = json.loads((out / "config.json").read_text())
    assert config["command"].startswith("python rrg.py --out") and config["settings"]["lr"] == rrg.TOY["lr"] and "torch" in config["versions"]
    table = rows(out)
    assert {"step", "reward", "listener_accuracy", "parsed", "kl", "clip_fraction", "zero_std_groups", "completion_length", "grad_norm", "lr"} <= set(table[0])
    assert [row["step"] for row in table] == ["1", "2", "3", "4"] and set(table[0]) == set(rrg.METRICS) - {"seconds"}
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 and len(samples[0]["samples"]) == 4 and {"text", "reward", "rho"} <= set(samples[0]["samples"][0])
    assert {path.name for path in out.iterdir()} == {"adapter", "config.json", "metrics.csv", "result.json", "samples.jsonl", "state.pt"}
    assert "identification" in said and "before" in said and said.count("the listener sees") == 3


def same_adapter(a, b):
    return (a / "adapter/adapter_model.safetensors").read_bytes() == (b / "adapter/adapter_model.safetensors").read_bytes()


def test_the_same_seed_gives_the_same_run_and_a_killed_one_resumes_to_it(whole_run, tmp_path):
    whole, out = whole_run[0], tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "rrg.py", *small(out)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "metrics.csv").exists() or len(rows(out)) < 3:  # saved after step 2, killed after step 3
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    with open(out / "metrics.csv", "a") as file:
        file.write("4,0.1")  # and a row is half written
    assert not (out / "result.json").exists()
    done = run("--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert rows(out) == rows(whole) and same_adapter(out, whole)
    assert (out / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    results = [json.loads((folder / "result.json").read_text()) for folder in (out, whole)]
    assert results[0]["before"] == results[1]["before"] and results[0]["after"] == results[1]["after"]


def test_what_a_power_cut_left_of_the_logs_is_cut_to_whole_lines_and_a_state_of_another_model_is_refused(random_mllm, tmp_path):
    grpo.add_lora(random_mllm.model, 2, 4)
    try:
        optimizer = torch.optim.AdamW([p for p in random_mllm.model.parameters() if p.requires_grad])
        (tmp_path / "metrics.csv").write_text("step,reward\n1,0.5\n2,0.5\n3,0.")  # the third row is half there, the fourth and samples.jsonl are not
        rrg.save(tmp_path, random_mllm, optimizer, rrg.Config(), step=4, seconds=1.0, before={})
        assert rrg.restore(tmp_path, random_mllm, optimizer) == {"step": 4, "seconds": 1.0, "before": {}}
        assert (tmp_path / "metrics.csv").read_text() == "step,reward\n1,0.5\n2,0.5\n" and (tmp_path / "samples.jsonl").read_text() == ""
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        state["lora"] = {f"renamed.{name}": value for name, value in state["lora"].items()}
        torch.save(state, tmp_path / "state.pt")
        with pytest.raises(data.DataError, match="is of another model"):
            rrg.restore(tmp_path, random_mllm, optimizer)
    finally:
        grpo.remove_lora(random_mllm.model)


def test_a_prompt_wants_a_marker_for_each_picture(random_mllm, photos):
    with pytest.raises(ValueError, match="one image marker for each"):
        random_mllm.prefill([random_mllm.chat(None, "Hello")], [photos[:2]])


def test_ctrl_c_saves_first(whole_run, tmp_path):
    out = tmp_path / "stopped"
    process = subprocess.Popen([sys.executable, "rrg.py", *small(out, "--save-every", "100")], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (out / "metrics.csv").exists() or len(rows(out)) < 1:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    assert "and saved; go on with: python rrg.py --out" in process.communicate()[1] and process.returncode == 1
    assert torch.load(out / "state.pt", weights_only=True)["step"] == len(rows(out)) < 4
    assert run("--out", out, "--resume").returncode == 0
    assert rows(out) == rows(whole_run[0]) and same_adapter(out, whole_run[0])


@pytest.mark.parametrize("method", ["repic", pytest.param("sft", marks=pytest.mark.slow)])
def test_other_methods_run_and_resume_alike(method, tmp_path):
    whole, half = tmp_path / "whole", tmp_path / "half"
    options = ["--method", method, "--steps", "4", "--games", "4", "--eval-games", "2", "--save-every", "2", "--mix", "1,1,1,1"]
    options += ["--samples", "4"] if method == "repic" else []
    done = run("--out", whole, *options)
    assert done.returncode == 0, done.stderr
    result, kinds = json.loads((whole / "result.json").read_text()), {"oct", "vlt", "single_ict", "multi_ict"}
    for when in ("before", "after"):
        assert set(result[when]) == kinds | {"unseen"} and all(0 <= result[when][kind] <= 1 for kind in kinds)
    assert all(kind in done.stdout for kind in kinds) and "before" in done.stdout
    record = json.loads((whole / "samples.jsonl").read_text().splitlines()[0])
    assert record["kind"] in kinds and len(record["samples"]) == (4 if method == "repic" else 1)
    half.mkdir()
    process = subprocess.Popen([sys.executable, "rrg.py", "--out", str(half), *options], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (half / "metrics.csv").exists() or len(rows(half)) < 3:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert run("--out", half, "--resume").returncode == 0
    assert rows(half) == rows(whole) and same_adapter(half, whole)


@pytest.mark.parametrize("loss", [pytest.param("grpo", marks=pytest.mark.slow), "dapo"])
def test_two_processes_play_the_run_of_one(tmp_path, loss):
    """torchrun with gloo: games are shared, gradients added up; the same samples, and the same adapter but for rounding."""
    options = ["--steps", "2", "--games", "4", "--samples", "4", "--eval-games", "5", "--loss", loss]
    assert run("--out", tmp_path / "one", *options).returncode == 0
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "rrg.py", "--out", str(tmp_path / "two"), *options],
                          cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("held-out games") == 1  # one process tells
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(one) == len(two) == 2 and all(abs(float(a[key]) - float(b[key])) < 1e-4 for a, b in zip(one, two) for key in a if a[key])
    a, b = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    assert results[0]["before"] == results[1]["before"]


def test_games_that_cannot_be_shared_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rrg, "ranks", lambda: (0, 5))
    with pytest.raises(data.DataError, match="--games 12 cannot be shared equally by 5 processes"):
        rrg.train(*rrg.settings(["--out", str(tmp_path / "x")]))


def test_several_updates_a_batch_really_clip(tmp_path):
    out = tmp_path / "mu"
    assert run(*small(out, "--mu", "4", "--lr", "0.02", "--warmup", "0", "--steps", "2", "--loss", "dapo")).returncode == 0
    assert any(float(row["clip_fraction"]) > 0 for row in rows(out))


def test_micro_batches_do_not_change_the_run(whole_run, tmp_path):
    assert run(*small(tmp_path / "m", "--micro", "1")).returncode == 0
    for a, b in zip(rows(tmp_path / "m"), rows(whole_run[0])):
        assert abs(float(a["reward"]) - float(b["reward"])) < 1e-4 and abs(float(a["grad_norm"]) - float(b["grad_norm"])) < 1e-3


@pytest.mark.parametrize("arguments, message", [
    (["--samples", "1"], "--samples must be at least 2"),
    (["--reward", "best"], "invalid choice"),
    (["--method", "repic", "--mix", "1,2,3"], "--mix wants the shares of oct, vlt, single_ict, multi_ict"),
    (["--method", "repic", "--mix", "1,0,0,0", "--without", "oct"], "not all that are left may be 0"),
    (["--method", "sft", "--beta", "0.1"], "leave out --samples and --beta"),
    (["--resume", "--out", "nowhere"], "nothing to resume: nowhere has no state.pt"),
    (["--data", "nowhere"], "error: nowhere is not a folder"),
    (["--model", "nowhere/at-all"], "error: cannot load the model nowhere/at-all"),
])
def test_bad_input_gets_one_clear_line(arguments, message, tmp_path):
    where = [] if "--out" in arguments else ["--out", tmp_path / "x"]
    done = run(*arguments, *where, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode and message in done.stderr and "Traceback" not in done.stderr


def test_resume_keeps_the_settings(whole_run):
    done = run("--out", whole_run[0], "--resume", "--lr", "1")
    assert done.returncode and "--resume goes on with the run as it was: --lr was 0.0005, not 1.0" in done.stderr
    done = run(*small(whole_run[0]))
    assert done.returncode and "holds a run already; add --resume" in done.stderr


def test_another_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    done = run("--model", tmp_path, "--out", tmp_path / "x")
    assert done.returncode and "is a bert; this program plays with Qwen2-VL" in done.stderr


def test_real_photos_with_several_sizes(tmp_path, random_folder):
    """--model and --data with pictures of two shapes: everything is written, and what only a toy knows is null."""
    for concept in range(6):
        for view in range(3):
            picture = toy.world(concept, 96)[concept].photos[view].open()
            path = tmp_path / "photos" / f"thing {concept}" / f"{view}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            (picture if view else picture.crop((0, 16, 96, 80))).save(path)
    done = run("--model", random_folder, "--data", tmp_path / "photos", *small(tmp_path / "out", "--max-pixels", "16384", "--steps", "2", "--max-tokens", "8"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["after"]["oracle"] is None and result["after"]["identification"] is not None and result["after"]["unseen"] is None


def test_a_checkpoint_without_a_chat_template_gets_qwens(random_folder, tmp_path):
    shutil.copytree(random_folder, tmp_path / "bare")
    (tmp_path / "bare/chat_template.jinja").unlink()
    text = rrg.MLLM(str(tmp_path / "bare"), 4096).chat(None, "Hello")
    assert text == ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
                    "<|vision_start|><|image_pad|><|vision_end|>Hello<|im_end|>\n<|im_start|>assistant\n")


def test_the_adapter_loads_in_peft_and_answers_the_same(whole_run, toy_mllm, photos):
    peft = pytest.importorskip("peft", reason="pip install peft to compare with it")
    base = AutoModelForImageTextToText.from_pretrained(toy.FOLDER, dtype=torch.float32).eval()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(base, whole_run[0] / "adapter")
    assert not any("adapter keys" in str(warning.message) for warning in warned)  # how PEFT reports missing and unexpected ones
    ours = rrg.MLLM(str(toy.FOLDER), 65536)
    grpo.load_adapter(ours.model, whole_run[0] / "adapter")
    ids = torch.randint(8, 70, (1, 12))
    assert torch.allclose(theirs(input_ids=ids).logits, ours.model(input_ids=ids).logits, atol=1e-5)
    with theirs.disable_adapter(), grpo.lora_off(ours.model):
        assert torch.allclose(theirs(input_ids=ids).logits, ours.model(input_ids=ids).logits, atol=1e-5)
    assert not torch.allclose(theirs(input_ids=ids).logits, toy_mllm.model(input_ids=ids).logits, atol=1e-5)


def test_playing_teaches(tmp_path):
    """Forty short steps already raise the reward and drive the background out of the descriptions."""
    out = tmp_path / "learns"
    done = run("--out", out, "--steps", "40", "--games", "8", "--eval-games", "30", "--lr", "1e-3", "--seed", "1")
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "result.json").read_text())
    assert result["after"]["leakage"] < result["before"]["leakage"] - 0.3
    assert result["after"]["identification"] > result["before"]["identification"] + 0.1


@pytest.mark.slow
def test_the_default_run_keeps_its_promise(tmp_path):
    out = tmp_path / "default"
    done = run("--out", out)
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "result.json").read_text())
    before, after = result["before"], result["after"]
    assert after["oracle"] >= max(0.8, before["oracle"] + 0.5) and after["coverage"] >= 0.85 and after["parsed"] >= 0.99
    assert after["leakage"] <= 0.03 and before["leakage"] > 0.5
    assert after["unseen"]["oracle"] - before["unseen"]["oracle"] >= 0.8 * (after["oracle"] - before["oracle"])
    oracle = [float(row["oracle"]) for row in rows(out)]
    size = len(oracle) // 5
    fifths = [sum(oracle[i:i + size]) / size for i in range(0, 5 * size, size)]
    assert fifths[-1] >= max(fifths) - 0.05
