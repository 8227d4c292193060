"""mutations.py: do the tests bite? Each of these small mistakes must make one of them fail.

    python tests/mutations.py              # every mistake, in a copy of the repository: minutes
    python tests/mutations.py lora rrg     # those of these files only

A mistake is an edit of one place in one file. It survives if all tests of the files named beside it
pass all the same; then a test is missing. An edit whose text is not there exactly once is an error:
the code has changed, and the mistake must be put anew.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass

from tqdm import tqdm

ROOT = pathlib.Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", "runs", ".venv", "*_cache", "__pycache__")


@dataclass(frozen=True)
class Mutation:
    """A mistake that somebody might make."""

    what: str  # in words
    file: str
    right: str  # text that is there once
    wrong: str  # what takes its place
    tests: str  # the test files that must notice


MUTATIONS = [
    # --- grpo.py
    Mutation(
        "advantages without the mean",
        "grpo.py",
        "centred = rewards - rewards.mean(-1, keepdim=True)",
        "centred = rewards",
        "grpo",
    ),
    Mutation(
        "no floor on the standard deviation",
        "grpo.py",
        ".clamp(min=std_floor)",
        ".clamp(min=0.0)",
        "grpo",
    ),
    Mutation(
        "the biased standard deviation",
        "grpo.py",
        "rewards.std(-1, keepdim=True)",
        "rewards.std(-1, keepdim=True, correction=0)",
        "grpo",
    ),
    Mutation(
        "equal rewards keep their rounding",
        "grpo.py",
        ".masked_fill(all_equal, 0.0)",
        "",
        "grpo",
    ),
    Mutation(
        "k3 of the other direction",
        "grpo.py",
        "    d = ref_logp - logp\n",
        "    d = logp - ref_logp\n",
        "grpo",
    ),
    Mutation(
        "the clip takes the optimistic side",
        "grpo.py",
        "surrogate = torch.min(",
        "surrogate = torch.max(",
        "grpo",
    ),
    Mutation(
        "eps_high is ignored",
        "grpo.py",
        "clamp(1 - eps_low, 1 + eps_high)",
        "clamp(1 - eps_low, 1 + eps_low)",
        "grpo",
    ),
    Mutation(
        "the penalty pays", "grpo.py", "per_token + beta * kl", "per_token - beta * kl", "grpo"
    ),
    Mutation(
        "what stands after the end of an answer counts",
        "grpo.py",
        "logp = logp.masked_fill(blank, 0.0)",
        "logp = logp.clone()",
        "grpo",
    ),
    Mutation(
        "an answer is averaged over all places",
        "grpo.py",
        "per_token.sum(-1) / mask.sum(-1).clamp(min=1)",
        "per_token.mean(-1)",
        "grpo",
    ),
    Mutation(
        "a micro-batch is divided by its own size",
        "grpo.py",
        "value = per_answer.sum() / (total or len(logp))",
        "value = per_answer.sum() / len(logp)",
        "grpo",
    ),
    Mutation(
        "the gradient is not clipped",
        "grpo.py",
        "clip_grad_norm_(parameters, 1.0)",
        "clip_grad_norm_(parameters, 1e9)",
        "grpo",
    ),
    Mutation(
        "a gradient that is not finite is stepped",
        "grpo.py",
        "if not math.isfinite(norm):",
        "if False:",
        "grpo",
    ),
    Mutation(
        "the gradient is kept for the next update",
        "grpo.py",
        "        optimizer.zero_grad()\n",
        "",
        "grpo",
    ),
    Mutation("a softmax in bf16", "grpo.py", "    logits = logits.float()\n", "", "grpo"),
    # --- lora.py
    Mutation(
        "LoRA's scale is alpha",
        "lora.py",
        "* (self.alpha / self.rank)  # [..., r]",
        "* self.alpha",
        "lora",
    ),
    Mutation(
        "B does not begin at zero",
        "lora.py",
        "nn.init.zeros_(self.lora_B.weight)",
        "nn.init.normal_(self.lora_B.weight)",
        "lora",
    ),
    Mutation(
        "a nested lora_off turns the adapters on again",
        "lora.py",
        "            layer.enabled = enabled\n",
        "            layer.enabled = True\n",
        "lora",
    ),
    Mutation(
        "lora_off(when=False) turns them off",
        "lora.py",
        "layer.enabled and not when",
        "False",
        "lora rrg",
    ),
    Mutation("the vision tower is adapted", "lora.py", " and TOWER not in name", "", "lora rrg"),
    Mutation(
        "an adapter with another bias is taken", "lora.py", '!= "none":', '== "nothing":', "lora"
    ),
    # --- reward.py
    Mutation(
        "a tie is a win",
        "reward.py",
        "picked_right = own > best_other",
        "picked_right = own >= best_other",
        "reward",
    ),
    Mutation(
        "a wrong pick is paid",
        "reward.py",
        "return share * picked_right, picked_right",
        "return share, picked_right",
        "reward rrg",
    ),
    Mutation(
        "text around an answer is allowed",
        "reward.py",
        "found = re.fullmatch(",
        "found = re.search(",
        "reward",
    ),
    Mutation(
        "a field that is empty is well formed",
        "reward.py",
        "if once and contents[0].strip():",
        "if once:",
        "reward",
    ),
    Mutation(
        "a coarse phrase of four words",
        "reward.py",
        "5 <= coarse_words",
        "4 <= coarse_words",
        "reward",
    ),
    Mutation(
        "a coarse phrase of seven words",
        "reward.py",
        "coarse_words <= 6",
        "coarse_words <= 7",
        "reward",
    ),
    Mutation(
        "a sentence of three words",
        "reward.py",
        "4 <= detailed_words",
        "3 <= detailed_words",
        "reward",
    ),
    Mutation(
        "a sentence of 41 words",
        "reward.py",
        "detailed_words <= 40",
        "detailed_words <= 41",
        "reward",
    ),
    Mutation("two sentences are one", "reward.py", "len(ends) == 1", "len(ends) <= 2", "reward"),
    Mutation(
        "a description can close its quotation marks",
        "reward.py",
        """    text = re.sub('["“”„«»`]', "'", text)\n""",
        "",
        "reward",
    ),
    # --- data.py
    Mutation(
        "no pre-selection of eight concepts",
        "data.py",
        "if other.category == concept.category][:8]",
        "if other.category == concept.category]",
        "data",
    ),
    Mutation(
        "what is missing comes from the least similar",
        "data.py",
        "for other in left_over[:missing]]",
        "for other in left_over[-missing:]]",
        "data",
    ),
    Mutation(
        "the hard positive is the most similar photo",
        "data.py",
        "chosen_positive = min(same_concept",
        "chosen_positive = max(same_concept",
        "data",
    ),
    Mutation(
        "the target may be its own positive",
        "data.py",
        "for photo in concept.photos if photo is not target]",
        "for photo in concept.photos]",
        "data",
    ),
    Mutation(
        "negatives of any category",
        "data.py",
        "for other in by_similarity if other.category == concept.category]",
        "for other in by_similarity]",
        "data",
    ),
    Mutation(
        "the pool is not shuffled",
        "data.py",
        "pool = rng.sample(candidates, k)",
        "pool = candidates",
        "data",
    ),
    Mutation(
        "every pass over the games has the same order",
        "data.py",
        'random.Random(f"epoch {seed} {epoch}")',
        'random.Random(f"epoch {seed}")',
        "data",
    ),
    Mutation(
        "a picture of two things is kept",
        "data.py",
        "if len(owners[photo.pixels]) > 1:",
        "if len(owners[photo.pixels]) > 2:",
        "data",
    ),
    Mutation(
        "a photo is opened as whatever it contains", "data.py", ", formats=FORMATS", "", "data"
    ),
    Mutation(
        "negatives of other categories are of the same",
        "data.py",
        "if other.category != concept.category]",
        "if other.category == concept.category]",
        "data",
    ),
    # --- model.py
    Mutation(
        "temperature 1 / 1.2",
        "model.py",
        "summed = logp.exp().cumsum(-1)",
        "summed = (1.2 * logp).softmax(-1).cumsum(-1)",
        "model",
    ),
    Mutation(
        "the token that ends an answer is not learned",
        "model.py",
        "            masks.append(~done)",
        "            masks.append(~(done | torch.isin(ids[-1], self.ends)))",
        "model",
    ),
    Mutation(
        "lower-case yes only",
        "model.py",
        'self.single_tokens("yes", "Yes", "YES", " yes", " Yes", " YES")',
        'self.single_tokens("yes")',
        "model",
    ),
    Mutation(
        "positions in one dimension",
        "model.py",
        "next_position = positions.amax((0, 2)) + 1",
        "next_position = mask.sum(1)",
        "model",
    ),
    Mutation(
        "log-probs of the next token but one",
        "model.py",
        "hidden = torch.cat([hidden, self.extend(prefix, ids[:, :-1])], 1)",
        "hidden = torch.cat([self.extend(prefix, ids[:, :-1]), hidden], 1)",
        "model",
    ),
    Mutation(
        "padding is attended to",
        "model.py",
        "prefix.mask = torch.cat([prefix.mask, mask], 1)",
        "prefix.mask = torch.cat([prefix.mask, torch.ones_like(mask)], 1)",
        "model",
    ),
    Mutation(
        "an end token is lost",
        "model.py",
        "        return sorted(ends - {None})",
        "        return sorted(ends - {None, self.tokenizer.unk_token_id})",
        "model",
    ),
    Mutation(
        "a description is not quoted for the listener",
        "model.py",
        "pairs = [(photo, self.quote(text)) for photo, text in pairs]",
        "pairs = list(pairs)",
        "model",
    ),
    # --- rrg.py
    Mutation(
        "exams are games of training concepts",
        "rrg.py",
        "for part in (split.test, split.unseen):",
        "for part in (split.train, split.unseen):",
        "rrg",
    ),
    Mutation("--reward is ignored", "rrg.py", "positive, config.reward)", "positive)", "rrg"),
    Mutation(
        "--listener is ignored",
        "rrg.py",
        'with lora_off(mllm.model, when=config.listener == "frozen"):\n        beliefs',
        "with lora_off(mllm.model):\n        beliefs",
        "rrg",
    ),
    Mutation(
        "the weight of the listener is ignored",
        "rrg.py",
        "config.listener_weight * listener",
        "listener",
        "rrg",
    ),
    Mutation(
        "the weight of the form is ignored", "rrg.py", "config.format_weight * form", "form", "rrg"
    ),
    Mutation(
        "the weight of the length is ignored",
        "rrg.py",
        "config.length_weight * length",
        "length",
        "rrg",
    ),
    Mutation("--beta is ignored", "rrg.py", "beta=config.beta,", "beta=0.04,", "rrg"),
    Mutation(
        "--std-floor is ignored", "rrg.py", "std_floor=config.std_floor", "std_floor=0.05", "rrg"
    ),
    Mutation("--eps-high is ignored", "rrg.py", "eps_high=config.eps_high", "eps_high=0.2", "rrg"),
    Mutation("--eps-low is ignored", "rrg.py", "eps_low=config.eps_low", "eps_low=0.2", "rrg"),
    Mutation("--mu is ignored", "rrg.py", "mu=config.mu,", "mu=1,", "rrg"),
    Mutation("--loss is ignored", "rrg.py", "loss=config.loss,", 'loss="grpo",', "rrg"),
    Mutation("--negatives is ignored", "rrg.py", "negatives=config.negatives,", "", "rrg"),
    Mutation("--positive is ignored", "rrg.py", "positive=config.positive,", "", "rrg"),
    Mutation(
        "the reference is the policy",
        "rrg.py",
        "with torch.no_grad(), lora_off(mllm.model):",
        "with torch.no_grad():",
        "rrg",
    ),
    Mutation(
        "the learning rate does not fall",
        "rrg.py",
        "return config.lr * min(warm_up, decay)",
        "return config.lr * min(warm_up, 1.0)",
        "rrg",
    ),
    Mutation(
        "seeds of steps collide",
        "rrg.py",
        "seed = config.seed * 1_000_003 + step",
        "seed = config.seed + step",
        "rrg",
    ),
    Mutation(
        "the optimizer's learning rate stays",
        "rrg.py",
        '        optimizer.param_groups[0]["lr"] = lr\n',
        "",
        "rrg run",
    ),
    Mutation(
        "every process plays all games",
        "rrg.py",
        "train_step(mllm, run.my_part(todays),",
        "train_step(mllm, todays,",
        "rrg run",
    ),
    # --- run.py
    Mutation(
        "samples depend on the number of processes",
        "run.py",
        "return uniforms[:, rank * rows : (rank + 1) * rows]",
        "return uniforms[:, :rows]",
        "run",
    ),
    Mutation(
        "--resume takes other photos",
        "run.py",
        "        if changed:\n",
        "        if False:\n",
        "rrg",
    ),
    Mutation(
        "a log is not cut where the state was saved",
        "run.py",
        "kept = [line for line in lines if step_of(line) <= step]",
        "kept = lines",
        "run",
    ),
    Mutation(
        "the state before the last one is not kept",
        "run.py",
        "        if last.exists():\n",
        "        if False:\n",
        "run",
    ),
    Mutation(
        "a torn state.pt is a traceback",
        "run.py",
        "except Exception as error:  # torch raises",
        "except KeyError as error:  # torch raises",
        "run",
    ),
    Mutation(
        "answers that nobody can read are not spoken of",
        "run.py",
        "if step == 1 and parsed < FEW:",
        "if False:",
        "run",
    ),
    # --- repic.py
    Mutation(
        "a name that is the thing's own",
        "repic.py",
        "free = [name for name in toy.NAMES if name.lower() not in in_use]",
        "free = [name for name in toy.NAMES if name.lower() in in_use] * 9",
        "repic",
    ),
    Mutation(
        "boxes of Qwen2-VL are read as pixels",
        "repic.py",
        'if mllm.config.model_type == "qwen2_vl" and not is_toy:',
        "if False:",
        "repic",
    ),
    Mutation(
        "no least length of captions",
        "repic.py",
        "if not answer.strip() or len(answer) < min_chars:",
        "if not answer.strip():",
        "repic",
    ),
    Mutation(
        "--without length is ignored",
        "repic.py",
        'return 0 if config.without == "length" else config.min_chars',
        "return config.min_chars",
        "repic",
    ),
    Mutation(
        "a name as a pair of tags is paid", "repic.py", 'name[0] == "<" and ', "False and ", "repic"
    ),
    Mutation(
        '"know" is no', "repic.py", r'r"\b(yes|no)\b", answer', 'r"(yes|no)", answer', "repic"
    ),
    Mutation("an IoU of .4 is enough", "repic.py", ">= 0.5)", ">= 0.4)", "repic"),
    Mutation(
        "SFT's captions are said with LoRA on",
        "repic.py",
        "        with lora_off(mllm.model):\n            return mllm.greedy(prompts, config",
        "        if True:\n            return mllm.greedy(prompts, config",
        "repic",
    ),
    Mutation(
        "SFT's teacher is not asked for the names",
        "repic.py",
        'Prompt(task.photos, f"{task.text} {ASK_FOR_NAME}") for',
        "Prompt(task.photos, task.text) for",
        "repic",
    ),
    Mutation(
        "what is left out is refilled",
        "repic.py",
        "shares, kept = shares_of_kinds(config), kept_kinds(config)",
        "shares, kept = dict.fromkeys(kept_kinds(config), 1.0), kept_kinds(config)",
        "repic",
    ),
    Mutation(
        "each reference has the next one's name",
        "repic.py",
        'shown = [f"{PICTURE}This is {name}.\\n" for name in names]',
        'shown = [f"This is {name}.\\n{PICTURE}" for name in names]',
        "repic",
    ),
    Mutation(
        "SFT learns with the advantages of its rewards",
        "repic.py",
        "advantages = torch.ones(N)",
        "advantages = rewards.float()",
        "repic",
    ),
    Mutation(
        "what a list holds out is trained on",
        "repic.py",
        "return Tasks(tasks[:count], tasks[count:], [], None)",
        "return Tasks(tasks, tasks[count:], [], None)",
        "repic",
    ),
    # --- assistant.py
    Mutation(
        "letters by rank",
        "assistant.py",
        "return rng.sample(entries, len(entries))",
        "return list(entries)",
        "assistant",
    ),
    Mutation(
        "a stranger's thing is named",
        "assistant.py",
        "if fits_one(beliefs, options.threshold):",
        "if True:",
        "assistant",
    ),
    Mutation(
        "a caption may contradict its letter",
        "assistant.py",
        "contradicts = row is not None and calls_another(row, order)",
        "contradicts = False",
        "assistant",
    ),
    Mutation(
        "text around the JSON is allowed",
        "assistant.py",
        'fenced = re.fullmatch(r"\\s*```(?:json)?\\s*(\\{.*\\})\\s*```\\s*", text, re.DOTALL)',
        'fenced = re.search(r"(\\{.*\\})", text, re.DOTALL)',
        "assistant",
    ),
    Mutation(
        "retrieval by the picture alone",
        "assistant.py",
        "return (rescale(picture) + rescale(words)) / 2",
        "return rescale(picture)",
        "assistant",
    ),
    Mutation(
        "a picture of the same name will do",
        "assistant.py",
        "for first in range(max(1, len(parts) - 1)):",
        "for first in range(len(parts)):",
        "assistant",
    ),
    # --- protocols.py and evaluate.py
    Mutation(
        "a photo that was described is a test",
        "protocols.py",
        "return PhotoSplit(order[:kept][:references], order[kept:])",
        "return PhotoSplit(order[:kept][:references], order)",
        "protocols",
    ),
    Mutation(
        "tests of PerVA are described",
        "protocols.py",
        'others = [photo for photo in concept.photos if photo.part != "test"]',
        "others = concept.photos",
        "protocols",
    ),
    Mutation(
        "what a run trained on is tested",
        "protocols.py",
        "            split = split_of_run(concepts, split, options.adapter)\n",
        "            pass\n",
        "protocols evaluate",
    ),
    Mutation(
        "the adapter stays on while another row is read",
        "evaluate.py",
        '        figures[part_name] |= row.grounding.get(part_name, {}) | {"reader": row.reader}\n'
        "    remove_lora(mllm.model)\n",
        '        figures[part_name] |= row.grounding.get(part_name, {}) | {"reader": row.reader}\n',
        "evaluate",
    ),
    Mutation(
        "the adapter stays on while descriptions are read",
        "evaluate.py",
        "for record in records]\n    remove_lora(mllm.model)\n    return row",
        "for record in records]\n    return row",
        "evaluate",
    ),
    Mutation(
        "retrieval with the adapter on",
        "evaluate.py",
        "    with lora_off(mllm.model):\n        for lookup",
        "    if True:\n        for lookup",
        "evaluate",
    ),
    Mutation(
        "RePIC's rows are read by the base model",
        "evaluate.py",
        'return options.reader or ("adapter" if own else "base")',
        'return options.reader or "base"',
        "evaluate",
    ),
    Mutation(
        "what cannot be read is half right",
        "evaluate.py",
        "judgement.said_yes is judgement.shown for",
        "(judgement.said_yes or False) is judgement.shown for",
        "evaluate",
    ),
    Mutation(
        "F1 is the mean over photos",
        "evaluate.py",
        "    names = actual.keys() | picked.keys()\n",
        "    names = actual.keys()\n",
        "evaluate",
    ),
    Mutation(
        "by category: one database",
        "evaluate.py",
        "look_up_together(entries, tests, protocol_of(options).by_category)",
        "look_up_together(entries, tests, False)",
        "evaluate",
    ),
    # --- naming.py
    Mutation(
        "wrong references show what is in the picture",
        "naming.py",
        "if each.name not in in_picture[query.photo]]",
        "]",
        "naming",
    ),
    Mutation(
        "a trained model is asked for the name",
        "naming.py",
        "    if zero_shot:\n",
        "    if True:\n",
        "naming",
    ),
    Mutation(
        "any name makes a miss",
        "naming.py",
        "if there - set(names):",
        "if there:",
        "naming",
    ),
    Mutation(
        "a name is matched by being there",
        "naming.py",
        "holds.append(toy.tells_truth(sentence, photo.truth))",
        "holds.append(True)",
        "naming",
    ),
    Mutation(
        "speakers of the game are not asked for names",
        "naming.py",
        'return name != "base" and run.run_record(name).get("method") != "rrg"',
        'return name != "base"',
        "naming",
    ),
    # --- toy.py
    Mutation(
        "each photo is an occasion of its own",
        "toy.py",
        "album.append(take_photo(title, subject, occasion, rng, size, part))",
        "album.append(take_photo(title, subject, new_occasion(rng), rng, size, part))",
        "toy",
    ),
    Mutation(
        "photos to test with are of the first occasion, too",
        "toy.py",
        'part = "train" if number == 0 else "test"',
        'part = "test" if number == 0 else "train"',
        "toy",
    ),
    # --- make.py
    Mutation(
        "a stage depends on whether the one before it was taken up",
        "toy-qwen2-vl/make.py",
        "    torch.manual_seed(number)\n",
        "",
        "make",
    ),
    Mutation(
        "a tower whose image tokens need not know their subject",
        "toy-qwen2-vl/make.py",
        "            if step >= self.steps // 3:\n",
        "            if step >= self.steps:\n",
        "make",
    ),
    Mutation(
        "a name decides a caption, but not what stands in its place",
        "toy-qwen2-vl/make.py",
        "    return is_first | is_later\n",
        "    return (is_first | is_later) & torch.isin(rows.labels, token_ids(tokenizer, TAGS))\n",
        "make",
    ),
    Mutation(
        "a wrong reference is named",
        "toy-qwen2-vl/make.py",
        "        else:\n            reference = rng.randrange(len(dataset.photos))",
        "        else:\n            name_of[subject.photo] = name\n"
        "            reference = rng.randrange(len(dataset.photos))",
        "make",
    ),
]


def survives(mutation, copy):
    """Make the mistake in the copy and run its tests.   -> do they all pass?"""
    file = copy / mutation.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutation.right) != 1:
        count = text.count(mutation.right)
        sys.exit(f"{mutation.file} has the text of {mutation.what!r} {count} times, not once")
    file.write_text(text.replace(mutation.right, mutation.wrong), encoding="utf-8")
    try:
        tests = [f"tests/test_{name}.py" for name in mutation.tests.split()]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(command, cwd=copy, capture_output=True)
    finally:
        file.write_text(text, encoding="utf-8")
    if done.returncode not in (0, 1):  # neither passed nor failed, such as an error in a test file
        print(done.stdout.decode()[-2000:])
    return done.returncode == 0


def main():
    wanted = [f"{name.removesuffix('.py')}.py" for name in sys.argv[1:]]
    mutations = MUTATIONS
    if wanted:
        mutations = [m for m in MUTATIONS if pathlib.Path(m.file).name in wanted]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        for mutation in tqdm(mutations, desc="mistakes"):
            if survives(mutation, copy):
                survivors.append(mutation)
                tqdm.write(f"survives: {mutation.file}: {mutation.what}")
    print(f"{len(mutations)} mistakes, of which {len(survivors)} survive")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
