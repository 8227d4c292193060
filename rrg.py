"""rrg.py: the reinforced multimodal reference game. One multimodal LLM plays both sides; the listener's choice is the speaker's reward.

    1 mine a game   a target photo of somebody's own thing; a pool of K: a very different photo of it, and photos of look-alikes (data.py)
    2 speak         the model with LoRA on describes the target, G times
    3 listen        the same model with LoRA off says of each candidate, from the description alone, whether it fits
    4 reward        how much of the listener's belief is on the right candidate                                          (reward.py)
    5 advantage     how much better than its G siblings is each description                                              (grpo.py)
    6 update        make the better ones likelier, staying close to the model with LoRA off                              (grpo.py)

A claim about the background fails on the hard positive, a vague description fits the hard negatives too: what remains is what identifies.

`--method repic` trains by RePIC instead, the system that RRG is compared with: stages 1, 3 and 4 are then questions whose answers a rule can
verify (data.make_tasks, reward.py). `--method sft` is plain supervised fine-tuning of the same adapter on given captions, the other baseline.

    python rrg.py                                                        # the toy world, on a CPU, in a minute
    python rrg.py --model Qwen/Qwen2-VL-2B-Instruct --data my_photos/    # a real model and your photos, on one GPU
    python rrg.py --method repic                                         # another method: repic or sft
    torchrun --nproc_per_node=4 rrg.py --model ... --data ...            # several GPUs: each plays a share of every step's games
    python rrg.py --out runs/x --resume                                  # go on with a run that was stopped or killed

In a hurry? `Prefix`, `prefill`, `carry_on`, `sample`, `score` and `ask` are the model; `judge`, `play`, `update` and the loop in `train` are the
game. The rest is settings, logs and resuming.

Where it departs from the paper and its authors' research code:
1. Everything is "prefill once, continue many": a picture is encoded once per run, and each pass (sampling, reference, policy, listener)
   reads a prompt once and shares its keys and values among all continuations: the G answers, or every description put to a candidate.
2. The listener is this network with LoRA off, so there is no second model and no server; it is asked the same question only once (`ask`).
3. The vision tower is frozen (grpo.py, departure 2).
4. Sampling is plain: temperature 1, no top-k, top-p or penalties, whatever the checkpoint's own defaults say (Qwen2-VL's say top_k 1, which
   makes all G samples the same), so the distribution that is sampled is the one whose log-probabilities are trained.
5. RePIC's group is one prompt. (Its code shuffles on each GPU and draws wordings anew, so a group's answers are to different questions.)
6. SFT is the same update: one given answer a prompt, of advantage 1, without KL; its gradient is that of the cross-entropy.

Shapes: B prompts, G samples per prompt, N = B*G rows, K candidates, P prompt length, C completion length, T tokens that continue a prompt,
V vocabulary, D width of the language model.
"""
import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import random
import re
import shlex
import signal
import sys
import time
from dataclasses import dataclass

if int(os.environ.get("RANK", 0)):  # of several processes one draws progress bars; tqdm reads this when it is imported
    os.environ["TQDM_DISABLE"] = "1"

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, DynamicCache
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import data
import grpo
import reward
import toy
from data import KINDS

# Qwen2-VL's layout, for base checkpoints, which come without one
CHAT = ("{% for m in messages %}"
        "{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
ROWS = 128  # continuations in one forward pass without gradient: bounds the memory, changes no result
LOGITS = 2 ** 26  # logits that exist at once (in fp32 256 MB): likewise


# ------------------------------------------------------------------------------------------------------- several processes
def ranks():
    """(the number of this process, how many there are): (0, 1) unless torchrun has started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(rows):
    """The lists of all processes, one after the other."""
    parts = [rows] * ranks()[1]
    if len(parts) > 1:
        dist.all_gather_object(parts, rows)
    return sum(parts, [])


def my_part(items):
    """This process's part of a list or tensor, in order. The lengths of all parts differ by one at most."""
    rank, world = ranks()
    return items[len(items) * rank // world:len(items) * (rank + 1) // world]


def add_up(tensors):
    """Replace tensors by their sums over all processes, in one message. Sums, not means: losses are divided by the count of all (`update`)."""
    if ranks()[1] > 1:
        flat = torch.nn.utils.parameters_to_vector(tensors)
        dist.all_reduce(flat)
        torch.nn.utils.vector_to_parameters(flat, tensors)


# ---------------------------------------------------------------------------- the model: two primitives, prefill and carry_on
@dataclass
class Prefix:
    """B prompts that the model has read, ready to be continued."""
    cache: DynamicCache  # per layer keys and values [B, heads, P, head size]
    mask: torch.Tensor  # [B, P], 0 on padding
    position: torch.Tensor  # [B], of the next token. Not P: padding does not count, and a picture of h x w tokens moves it on by max(h, w)
    last: torch.Tensor  # [B, D], the hidden state that predicts the next token

    def take(self, index):
        """The prefix of row `index[n]` for each continuation n: copies of what was computed once, through which gradients flow back to it."""
        cache = DynamicCache([(layer.keys[index], layer.values[index]) for layer in self.cache.layers])
        return Prefix(cache, self.mask[index], self.position[index], self.last[index])


@dataclass
class Answers:
    """N answers of at most C tokens, and the same as texts."""
    ids: torch.Tensor  # [N, C]
    mask: torch.Tensor  # [N, C], true up to and including the token that ends the answer
    logps: torch.Tensor | None  # [N, C], log-probs at the time of sampling
    texts: list


class MLLM:
    """A Qwen2-VL (or 2.5-VL) by hub name or folder, its tokenizer and its picture processor, and what the game needs of them."""

    def __init__(self, name, max_pixels):
        self.device = torch.device(f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu")
        with data.refusing(f"cannot load the model {name}", OSError, ValueError):
            config = AutoConfig.from_pretrained(name)
            if config.model_type not in ("qwen2_vl", "qwen2_5_vl"):
                raise data.DataError(f"{name} is a {config.model_type}; this program plays with Qwen2-VL and Qwen2.5-VL checkpoints")
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.processor = Qwen2VLImageProcessorPil.from_pretrained(name, max_pixels=max_pixels)
            dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
            # eval() for good: dropout would make the policy that is trained differ from the one that was sampled.
            self.model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype).to(self.device).eval()
        self.model.requires_grad_(False)
        self.decoder, self.config = self.model.model.language_model, self.model.config
        self.tokenizer.chat_template = self.tokenizer.chat_template or CHAT
        ends = self.model.generation_config.eos_token_id  # one id, a list, or None; Qwen2-VL-Instruct has two
        ends = {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id, self.tokenizer.convert_tokens_to_ids("<|im_end|>")}
        self.ends = torch.tensor(sorted(ends - {None, self.tokenizer.unk_token_id}), device=self.device)  # any of them ends an answer
        self.image_token = self.tokenizer.convert_ids_to_tokens(self.config.image_token_id)
        markers = [str(token) for token in self.tokenizer.added_tokens_decoder.values()]
        self.quote = lambda text: reward.quoted(text, markers)  # a description as it is put to a reader
        # yes, Yes and YES, each with and without a space before it, where that is a single token
        spellings = lambda word: [self.encode(space + spelled) for spelled in (word, word.title(), word.upper()) for space in ("", " ")]
        single = lambda word: sorted({ids[0] for ids in spellings(word) if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id})
        self.yes, self.no = single("yes"), single("no")
        if not self.yes or not self.no:
            raise data.DataError(f"{name} has no single token for yes or no, so it cannot be asked")
        self.features = {}  # photo -> (features [tokens, D], grid [3])

    def encode(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def check(self, texts):
        """Raise DataError on the first text with a word that the model does not know, as the toy model knows few: it would be read as nothing."""
        for text in texts:
            if self.tokenizer.unk_token_id in self.encode(text):  # None of a real model, whose tokenizer can spell anything
                raise data.DataError(f"this model does not know every word of {text[-200:]!r}. The toy model knows the toy world only: "
                                     "for real things give a real --model; after a change of prompts rebuild it with python toy.py")

    def pad(self, texts, side="left"):
        """Texts as one batch -> (token ids [N, T], mask [N, T], 0 on padding). On the left, the default, every row ends at place -1, so that what
        continues it follows without a gap."""
        rows = self.tokenizer(texts, add_special_tokens=False, padding=True, padding_side=side, return_tensors="pt").to(self.device)
        return rows["input_ids"], rows["attention_mask"]

    def chat(self, *content):
        """A user's message as the model reads it. Content: str for text, anything else for a picture."""
        parts = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in content]
        return self.tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True)

    @torch.no_grad()
    def look(self, photos, progress=False):
        """[(features [tokens, D], grid [3]), ...] of the photos. The tower is frozen: each is encoded once and remembered."""
        new = [photo for photo in dict.fromkeys(photos) if photo not in self.features]
        for batch in data.chunks(new, 16, "looking at the photos" if progress else None):
            pixels = self.processor(images=[photo.open() for photo in batch], return_tensors="pt").to(self.device)
            features = self.model.model.get_image_features(pixels["pixel_values"], pixels["image_grid_thw"]).pooler_output  # ([tokens, D], ...)
            self.features |= zip(batch, zip(features, pixels["image_grid_thw"]))
        return [self.features[photo] for photo in photos]

    def size(self, photo):
        """(width, height) in pixels of a photo as the model sees it."""
        [(_, grid)] = self.look([photo])  # (time, height, width), in patches
        return tuple((grid[[2, 1]] * self.config.vision_config.patch_size).tolist())

    def embed(self, photos):
        """{photo name: unit vector [D]}, the mean of the tower's features: what similarity is measured with."""
        return {photo.name: F.normalize(features.float().mean(0), dim=0).cpu() for photo, (features, _) in zip(photos, self.look(photos))}

    def prefill(self, texts, photos):
        """Read B prompts once. texts [B] with an image marker for each picture, photos [B] lists of the pictures -> Prefix."""
        if any(text.count(self.image_token) != len(group) for text, group in zip(texts, photos)):
            raise ValueError("a prompt wants one image marker for each of its pictures")
        views = self.look([photo for group in photos for photo in group])
        sizes = iter([len(features) for features, _ in views])
        # One marker per picture becomes one marker per image token: "<image>Describe" -> 16 x "<image>", "Describe".
        texts = [re.sub(re.escape(self.image_token), lambda marker: marker[0] * next(sizes), text) for text in texts]
        self.check(set(texts))
        ids, mask = self.pad(texts)  # [B, P], [B, P]
        is_image = ids == self.config.image_token_id
        embeds, grids = self.decoder.embed_tokens(ids), None  # [B, P, D]
        if views:  # the features of all pictures take the places of their markers, in the order of reading
            embeds = embeds.masked_scatter(is_image[..., None], torch.cat([features for features, _ in views]).to(embeds.dtype))
            grids = torch.stack([grid for _, grid in views])  # [pictures, 3]
        # Positions are always given: without them transformers silently counts in one dimension or reuses those of the last call.
        positions, _ = self.model.model.get_rope_index(  # [3, B, P]
            ids, mm_token_type_ids=is_image.int(), image_grid_thw=grids, attention_mask=mask)
        # The decoder alone, without lm_head: nobody wants V logits for each of the prompt's tokens.
        out = self.decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=DynamicCache())
        position = positions.amax((0, 2)) + 1  # [B], one past the largest on any of the axes time, height and width
        return Prefix(out.past_key_values, mask, position, out.last_hidden_state[:, -1])

    def carry_on(self, prefix, ids, mask=None):
        """Continue each row of a prefix with tokens ids [N, T] -> hidden states [N, T, D]. mask [N, T] says which are real (None: all).

        The prefix itself grows by T places (cache, mask, position); what `last` should be now is left to the caller.
        """
        mask = torch.ones_like(ids) if mask is None else mask
        positions = prefix.position[:, None] + mask.cumsum(1) - 1  # [N, T], along all three axes; padding repeats one, but nothing attends to it
        prefix.mask, prefix.position = torch.cat([prefix.mask, mask], 1), prefix.position + mask.sum(1)  # [N, P + T], [N]
        return self.decoder(input_ids=ids, attention_mask=prefix.mask, position_ids=positions, past_key_values=prefix.cache).last_hidden_state

    # ------------------------------------------------------------------------------------------- what the players do with them
    # speak    samples of answers to prompts                        the speaker, in training
    # tell     greedy answers to any number of prompts              the speaker, in evaluation
    # score    log-probs of given answers                           policy and reference
    # ask      texts put to photos: prefixes about to answer        shared by the last two:
    # listen     the belief, read off the first token's logits      the listener
    # reply      the greedy answers                                 the assistant of evaluate.py
    @torch.no_grad()
    def sample(self, prefix, max_tokens, generator=None):
        """Sample one answer of at most `max_tokens` tokens for each row of a prefix, at temperature 1; greedily where there is no generator."""
        hidden, done, steps = prefix.last, torch.zeros(len(prefix.last), dtype=torch.bool, device=self.device), []  # [N, D], [N]
        while len(steps) < max_tokens and not done.all():
            if steps:
                hidden = self.carry_on(prefix, ids[:, None])[:, -1]  # [N, D]
            logp = self.model.lm_head(hidden).float().log_softmax(-1)  # [N, V]
            if generator is None:
                token = logp.argmax(-1, keepdim=True)  # [N, 1]
            else:  # the token at which the summed probabilities pass a uniform number; multinomial would draw V numbers a row
                cdf = logp.exp().cumsum(-1)  # [N, V]; its end is not quite 1, hence the product below
                # Each process draws for the rows of all and keeps its own: samples do not depend on the number of processes.
                draw = my_part(torch.rand(len(cdf) * ranks()[1], 1, generator=generator, device=self.device))  # [N, 1]
                token = torch.searchsorted(cdf, draw * cdf[:, -1:])  # [N, 1]
            ids = torch.where(done, self.ends[0], token.squeeze(1))  # [N]
            steps.append((ids, ~done, logp.gather(1, token).squeeze(1)))  # before `done` changes, since the token that ends an answer is learned too
            done = done | torch.isin(ids, self.ends)
        ids, mask, logps = (torch.stack(column, 1) for column in zip(*steps))  # [N, C]
        texts = [self.tokenizer.decode(row[kept & ~torch.isin(row, self.ends)]) for row, kept in zip(ids, mask)]
        return Answers(ids, mask, logps, texts)

    def read(self, prompts, times):
        """Read each of B prompts (photos, text) once -> the Prefix of B * times rows, a prompt's together."""
        prefix = self.prefill([self.chat(*photos, text) for photos, text in prompts], [photos for photos, _ in prompts])
        return prefix.take(torch.arange(len(prompts), device=self.device).repeat_interleave(times))

    @torch.no_grad()
    def speak(self, prompts, samples=1, max_tokens=128, generator=None):
        """Stage 2: answer each of B prompts (photos, text) `samples` times -> Answers, whose row b * samples + g is answer g to prompt b."""
        return self.sample(self.read(prompts, samples), max_tokens, generator)

    def tell(self, prompts, max_tokens=128, progress=None):
        """The greedy answers to any number of prompts (photos, text) -> texts."""
        return [text for part in data.chunks(prompts, 32, progress) for text in self.speak(part, max_tokens=max_tokens).texts]

    def as_answers(self, texts):
        """Given texts in the form of sampled ones -> Answers, whose log-probs are yet to be scored."""
        self.check(texts)
        # Padding goes to the right: like sampled answers these begin at place 0 and are masked after their end.
        ids, mask = self.pad([text + self.tokenizer.eos_token for text in texts], "right")
        return Answers(ids, mask.bool(), None, texts)

    def score(self, prompts, ids):
        """Log-probs [N, C] of answers ids [N, C] under the model as it is now, with gradient where LoRA is on; N a multiple of B prompts."""
        prefix = self.read(prompts, len(ids) // len(prompts))
        # What predicts token t is the state before it: for the first the prompt's last one, for the others those of ids[:, :-1]. No mask is
        # needed, since what comes after the end of an answer is not seen by anything before it, and the loss leaves it out.
        hidden = prefix.last[:, None]  # [N, 1, D]
        if ids.shape[1] > 1:
            hidden = torch.cat([hidden, self.carry_on(prefix, ids[:, :-1])], 1)  # [N, C, D]
        # Logits [N, C, V] would be the largest tensor of all by far. So they are made a few rows at a time, and again in the backward pass.
        logps = lambda h, i: grpo.token_logps(self.model.lm_head(h), i)  # [rows, D], [rows] -> [rows]
        at_once = max(1, LOGITS // self.model.lm_head.out_features)
        parts = zip(hidden.flatten(0, 1).split(at_once), ids.flatten().split(at_once))
        return torch.cat([checkpoint(logps, h, i, use_reentrant=False) for h, i in parts]).view_as(ids)

    @torch.no_grad()
    def ask(self, prompt, pairs):
        """Ask about photos: pairs [(photo, text)], whose text stands between the two parts of a prompt (before, after).

        Yields (some of the distinct pairs, the Prefix of their rows, about to answer), until each pair has had its turn.
        """
        # The chat is cut where the texts go: its head, the same for all, is read once per photo; text and tail are read per pair.
        head, tail = self.chat(None, prompt[0], "\0", prompt[1]).split("\0")
        self.check([tail])
        distinct = sorted(dict.fromkeys(pairs), key=lambda pair: len(pair[1]))  # by length, so that there is little padding
        for photos in data.chunks(list(dict.fromkeys(photo for photo, _ in pairs)), ROWS):
            prefix = self.prefill([head] * len(photos), [[photo] for photo in photos])
            row_of = {photo: row for row, photo in enumerate(photos)}
            for chunk in data.chunks([pair for pair in distinct if pair[0] in row_of], ROWS):
                branch = prefix.take(torch.tensor([row_of[photo] for photo, _ in chunk], device=self.device))  # a copy: the next chunk wants it again
                branch.last = self.carry_on(branch, *self.pad([text + tail for _, text in chunk]))[:, -1]  # [N, D]
                yield chunk, branch

    def listen(self, pairs, frozen=True):
        """Stage 3: does the description fit the photo? pairs [(photo, text)] -> rho [len(pairs)] on the CPU. `frozen`: with LoRA off."""
        pairs, rho = [(photo, self.quote(text)) for photo, text in pairs], {}
        with grpo.lora_off(self.model) if frozen else contextlib.nullcontext():
            for chunk, prefix in self.ask(reward.LISTEN, pairs):
                rho |= zip(chunk, reward.belief(self.model.lm_head(prefix.last), self.yes, self.no).tolist())
        return torch.tensor([rho[pair] for pair in pairs])

    def reply(self, prompt, pairs, max_tokens=128, progress=None):
        """The greedy answers to `prompt`, of at most `max_tokens` tokens, for pairs [(photo, text)] -> texts [len(pairs)]."""
        texts = {}
        with tqdm(total=len(set(pairs)), desc=progress, leave=False, disable=not progress) as bar:
            for chunk, prefix in self.ask(prompt, pairs):
                texts |= zip(chunk, self.sample(prefix, max_tokens).texts)
                bar.update(len(chunk))
        return [texts[pair] for pair in pairs]

    def compare(self, photos, texts):
        """Similarity of photos and texts [photos, texts]: the listener's belief, a strong measure of it (as in VQAScore, ECCV 2024)."""
        parts = data.chunks(photos, 16, "comparing photos and words")
        return torch.cat([self.listen([(photo, text) for photo in part for text in texts]) for part in parts]).view(-1, len(texts))


# ------------------------------------------------------------------------------------------------------------ the settings
def flag(default, help, **extra):
    return dataclasses.field(default=default, metadata={"help": help, **extra})


@dataclass
class Config:
    """Every setting of a run; each field is a flag of the command line. The defaults are the paper's, for a real model."""
    # what is trained, on what
    model: str = flag(str(toy.FOLDER), "checkpoint: a folder or a hub name such as Qwen/Qwen2-VL-2B-Instruct; default: the toy model", metavar="DIR")
    data: str = flag("", "folder of photos, one folder a thing (data.py lists the layouts), or hub dataset such as google/dreambooth; "
                         "default: toy pictures", metavar="DIR")
    out: str = flag("", "run folder; default: runs/DATE-TIME", metavar="DIR")
    method: str = flag("rrg", "how to learn: by the game, by RePIC's tasks, or from given captions", choices=("rrg", "repic", "sft"))
    seed: int = flag(0, "seed of splits, games, initial adapters and samples")
    # how much
    steps: int = flag(125, "training steps; 125 steps of 16 games are the paper's 500 games x 4 epochs")
    games: int = flag(16, "games (prompts) a step")
    samples: int = flag(8, "G, descriptions sampled for each target")
    # the game and what it pays
    k: int = flag(3, "K, pictures in a pool: one hard positive and K - 1 hard negatives")
    embedder: str = flag("", "CLIP that measures similarity, such as openai/clip-vit-large-patch14-336; default: the model's own vision tower",
                         metavar="CLIP")
    negatives: str = flag("hard", "which negatives: look-alikes, or any photos of other things", choices=("hard", "random"))
    positive: str = flag("hard", "which other view of the target's concept is in the pool: the least or most similar", choices=("hard", "easy"))
    reward: str = flag("soft_gated", "how the listener's choice pays", choices=("soft_gated", "binary", "soft"))
    listener: str = flag("frozen", "who listens: the model with LoRA off, or as it is trained", choices=("frozen", "trained"))
    listener_weight: float = flag(1.0, "weight of the listener's reward (0 to 1)")
    format_weight: float = flag(1.0, "weight of the format reward (0 to 1)")
    length_weight: float = flag(0.1, "weight of the length reward (0 to 1)")
    # RePIC's tasks
    mix: str = flag(",".join(map("{:g}".format, KINDS.values())), f"repic: the shares of {', '.join(KINDS)}")
    min_chars: int = flag(100, "repic: a caption shorter than this many characters earns nothing")
    without: str = flag("none", "repic: leave out a task, or the least length of captions", choices=("none", "oct", "vlt", "ict", "length"))
    # the learner
    lr: float = flag(1e-5, "learning rate, reached after the warm-up, then falling linearly to 0")
    warmup: int = flag(10, "steps of warm-up")
    mu: int = flag(1, "updates on each batch of samples; the clip works from the second on")
    beta: float = flag(0.04, "weight of the KL penalty that keeps the speaker near the model it started from")
    eps_low: float = flag(0.2, "clip the probability ratio at 1 - eps_low")
    eps_high: float = flag(0.2, "clip the probability ratio at 1 + eps_high")
    loss: str = flag("grpo", "how tokens are averaged (grpo.py)", choices=("grpo", "dr_grpo", "dapo"))
    std_floor: float = flag(0.05, "a group's standard deviation is taken to be at least this, so that noise is not amplified")
    rank: int = flag(64, "rank of the LoRA adapters")
    alpha: int = flag(128, "scale of the LoRA adapters; the update is alpha/rank B A")
    # sizes, which decide the memory; and measuring
    max_tokens: int = flag(128, "longest description, in tokens")
    max_pixels: int = flag(401408, "photos are shrunk to at most this many pixels (401408 = 512 image tokens)")
    micro: int = flag(1, "games that go through the backward pass at once: raise it where there is memory to spare; it changes no result")
    eval_games: int = flag(100, "held-out games, or tasks of each kind, before and after, of seen and of unseen categories each")
    save_every: int = flag(25, "steps between two saves of the resumable state")


# What the toy model needs instead
TOY = dict(steps=60, games=12, micro=12, lr=5e-4, rank=16, alpha=32, format_weight=0.2, max_tokens=56, max_pixels=20736, min_chars=30)
SFT = dict(samples=1, beta=0.0)  # it learns one given answer a prompt, and has no reference


def newest_run():
    """The folder in runs/ of the run that was started last."""
    return str(max(pathlib.Path("runs").glob("*/config.json"), key=os.path.getmtime, default=pathlib.Path("runs/none")).parent)


def settings(argv=None):
    """The command line -> (Config, resume). The toy model has a few defaults of its own; --resume takes over the settings of the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in dataclasses.fields(Config):
        how = {"metavar": None if "choices" in option.metadata else option.type.__name__.upper()} | option.metadata
        if "metavar" not in option.metadata:  # the help of those that have one tells the default itself
            how["help"] += f" (default {option.default}" + (f"; toy model {TOY[option.name]})" if option.name in TOY else ")")
        parser.add_argument("--" + option.name.replace("_", "-"), type=option.type, default=argparse.SUPPRESS, **how)
    parser.add_argument("--resume", action="store_true",
                        help="go on with the run in --out (default: the newest in runs/) with the settings it was started with")
    given = vars(parser.parse_args(argv))
    if not given.pop("resume"):
        usual = (TOY if toy.is_toy(given.get("model", toy.FOLDER)) else {}) | (SFT if given.get("method") == "sft" else {})
        config = Config(**usual | given)  # what is given wins
        config.out = config.out or time.strftime("runs/%Y%m%d-%H%M%S")
        for name in ("samples", "k", "steps", "games", "mu", "micro", "max_tokens", "save_every", "eval_games", "rank"):
            least = 2 if name in ("samples", "k") and config.method != "sft" else 1
            if getattr(config, name) < least:
                parser.error(f"--{name.replace('_', '-')} must be at least {least}")
        if config.method == "sft" and (config.samples, config.beta) != (1, 0):
            parser.error("--method sft learns one given answer a prompt, without a penalty: leave out --samples and --beta")
        if not re.fullmatch(r"(\d+(\.\d+)?,){3}\d+(\.\d+)?", config.mix) or not any(shares(config).values()):
            parser.error(f"--mix wants the shares of {', '.join(KINDS)}, such as {Config.mix}; not all that are left may be 0")
        return config, False
    out = given.get("out") or newest_run()
    if not (pathlib.Path(out) / "state.pt").is_file():
        parser.error(f"nothing to resume: {out} has no state.pt")
    saved = data.load_json(pathlib.Path(out) / "config.json")["settings"] | {"out": out}
    saved |= {"micro": given.get("micro", saved["micro"])}  # which changes no result, and helps after running out of memory
    if other := [name for name, value in given.items() if saved[name] != value]:
        was, now = saved[other[0]], given[other[0]]
        parser.error(f"--resume goes on with the run as it was: --{other[0].replace('_', '-')} was {was}, not {now}")
    return Config(**saved), True


def shares(config):
    """{kind of task: its share}: of RePIC as --mix and --without say; SFT has the captions only."""
    leave = {"sft": ("oct", "vlt"), "repic": (config.without,)}.get(config.method, ())
    return {kind: 0.0 if kind.split("_")[-1] in leave else float(share) for kind, share in zip(KINDS, config.mix.split(","))}


# ---------------------------------------------------------------------------------------------------------------- the game
METRICS = {  # the columns of metrics.csv, in words; all are means over the answers of the step unless they say otherwise
    "step": "training step, from 1",
    "reward": "of the game: weighted sum of the three rewards below; of RePIC: the task's",
    "listener_reward": "what the listener's choice pays",
    "format_reward": "0.34 + 0.33 + 0.33 for the well-formed fields",
    "length_reward": "1/3 for the coarse phrase, 2/3 for the detailed sentence having the length that was asked for",
    "listener_accuracy": "share of answers from which the listener picks the hard positive; unparsed ones count as wrong",
    "parsed": "share of answers that are well formed",
    "oracle": "toy only: share of answers whose every claim holds for the hard positive and for none of the negatives; never trained on",
    "leakage": "toy only: share of answers that mention place, pose or light",
    **{kind: f"RePIC only: what the answers to {kind} tasks earned (reward.{kind.split('_')[-1]}_reward)" for kind in KINDS},
    "nll": "minus the mean log-probability of the answers' tokens: of sampled answers an estimate of the entropy, of given ones SFT's loss",
    "kl": "k3 estimate of KL(speaker || the model with LoRA off), per token",
    "clip_fraction": "share of tokens whose gradient the clip has cut; 0 with one update per step",
    "zero_std_groups": "share of games whose answers all earned the same, and so teach nothing",
    "distinct": "share of different texts among the G answers of a game",
    "completion_length": "tokens an answer",
    "grad_norm": "norm of the gradient before it is clipped to 1",
    "lr": "learning rate",
    "seconds": "wall time of the step",
}


# What result.json calls the means of these columns over greedy answers in held-out games
HELD_OUT = dict(identification="listener_accuracy", oracle="oracle", leakage="leakage", coverage="coverage", parsed="parsed")


def judge(mllm, games, texts, config):
    """Stages 3 and 4 for `texts`, equally many per game, in the order of `games`.

    Returns N rows of {text, reward, rho (None if unparsed), listener_accuracy, ...}: what each earned, and how.
    """
    games = [game for game in games for _ in range(len(texts) // len(games))]  # [N]: each game once per text
    descriptions = [reward.parse(text) for text in texts]
    asked = [(photo, description.text) for game, description in zip(games, descriptions) if description for photo in game.pool]
    rho = iter(mllm.listen(asked, config.listener == "frozen").view(-1, len(games[0].pool)) if asked else [])  # [those that parsed, K]
    rows = []
    for game, text, description in zip(games, texts, descriptions):
        row = dict(text=text, rho=None, listener_reward=0.0, format_reward=reward.format_reward(text), length_reward=0.0,
                   listener_accuracy=0.0, parsed=float(bool(description)))
        if description:
            belief = next(rho)  # [K]
            pay, right = reward.listener_reward(belief[None], torch.tensor([game.answer]), config.reward)  # a batch of one
            row |= dict(rho=belief.tolist(), listener_reward=pay.item(), length_reward=reward.length_reward(description),
                        listener_accuracy=float(right))
        row["reward"] = sum(getattr(config, f"{part}_weight") * row[f"{part}_reward"] for part in ("listener", "format", "length"))
        if game.target.truth:  # the toy world: only to measure, never a reward
            said = description.text if description else ""
            fits = [toy.oracle(said, photo.truth) for photo in game.pool]
            # The oracle wants words that fit the positive and nothing else. (No words fit everything.)
            row |= dict(oracle=float(fits[game.answer] and sum(fits) == 1), leakage=float(toy.leaks(said)), coverage=toy.coverage(said))
        rows.append(row)
    return rows


def verify(mllm, tasks, texts, config):
    """RePIC's stages 3 and 4, as `judge`: rows of {text, reward, and the reward again by the name of the task's kind: a column for each}."""
    tasks, rows = [task for task in tasks for _ in range(len(texts) // len(tasks))], []  # [N]
    for task, text in zip(tasks, texts):
        if task.kind == "oct":
            pay = reward.oct_reward(text, task.solution)
        elif task.kind == "vlt":
            pay = reward.vlt_reward(text, *task.solution, seen=mllm.size(task.photos[-1]))
        else:
            pay = reward.ict_reward(text, task.solution, 0 if config.without == "length" else config.min_chars)
        rows.append({"text": text, "reward": pay, task.kind: pay})
    return rows


def speaker_prompt(game):
    """A game, or one of RePIC's tasks, as the speaker is asked -> (photos, text)."""
    return ([game.target], reward.SPEAK) if isinstance(game, data.Game) else (game.photos, game.text)


def pictures(game):
    """All photos of a game, or of one of RePIC's tasks."""
    return [game.target, *game.pool] if isinstance(game, data.Game) else game.photos


def mean(values):
    """The mean of a list, None of an empty one."""
    return sum(values) / len(values) if values else None


@torch.no_grad()
def play(mllm, games, step, config):
    """Stages 2 to 5 -> (answers, their reference log-probs [N, C], advantages [N], rows for the log)."""
    # In the micro-batches of the update, so that the memory is bounded alike.
    score = lambda ids: torch.cat([mllm.score(*part) for part in micro_batches(games, config, ids)])
    if config.method == "sft":
        answers = mllm.as_answers(given_captions(mllm, games, config.max_tokens))
        answers.logps = score(answers.ids)  # [N, C]
    else:
        generator = torch.Generator(mllm.device).manual_seed(config.seed * 1_000_003 + step)  # no two (seed, step) alike
        answers = mllm.speak([speaker_prompt(game) for game in games], config.samples, config.max_tokens, generator)
    with grpo.lora_off(mllm.model):
        ref_logps = score(answers.ids)  # [N, C]
    rows = (judge if config.method == "rrg" else verify)(mllm, games, answers.texts, config)
    for row, logps, mask in zip(rows, answers.logps, answers.mask):
        row |= dict(nll=-logps[mask].mean().item(), completion_length=mask.sum().item())
    if config.method == "sft":
        return answers, ref_logps, torch.ones(len(games), device=mllm.device), rows  # advantages of 1: departure 6
    rewards = torch.tensor([row["reward"] for row in rows], device=mllm.device).view(-1, config.samples)  # [B, G]
    return answers, ref_logps, grpo.group_advantages(rewards, std_floor=config.std_floor).flatten(), rows


def given_captions(mllm, tasks, max_tokens):
    """The captions that SFT learns of the tasks' last pictures: in the toy world the truth, elsewhere what the model with LoRA off says of
    each photo in at most `max_tokens` tokens, with the name before it."""
    photos = list(dict.fromkeys(photo for task in tasks for _, photo in task.things))
    if photos[0].truth:
        return [" ".join(toy.clause(name, photo.truth) for name, photo in task.things) for task in tasks]
    with grpo.lora_off(mllm.model):
        said = dict(zip(photos, mllm.tell([([photo], "Give a caption of this picture.") for photo in photos], max_tokens)))
    return [" ".join(f"{name}: {said[photo]}" for name, photo in task.things) for task in tasks]


def micro_batches(games, config, *tensors):
    """(prompts, the rows of each tensor [N, ...] that belong to them), `config.micro` games at a time."""
    prompts = data.chunks([speaker_prompt(game) for game in games], config.micro)
    return zip(prompts, *(tensor.split(config.micro * config.samples) for tensor in tensors))


def update(mllm, games, answers, ref_logps, advantages, optimizer, config):
    """Stage 6: `mu` updates on one batch of answers -> means of the loss's stats and the norm of the gradient."""
    tokens = sum(gather([answers.mask.sum().item()]))  # of all processes, as is the total
    # Every loss is divided by the total of all processes and micro-batches. So gradients are simply added up, and what comes out is what one
    # process with all the games would get.
    total = tokens if config.loss == "dapo" else len(answers.ids) * ranks()[1]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    log, grad_norm = torch.zeros(2, device=mllm.device), 0.0  # kl and clip_fraction
    for _ in range(config.mu):
        for prompts, ids, mask, old, ref, A in micro_batches(games, config, answers.ids, answers.mask, answers.logps, ref_logps, advantages):
            logps = mllm.score(prompts, ids)  # [micro * G, C], the one pass with gradients
            loss, stats = grpo.grpo_loss(logps, old, ref, A, mask, eps_low=config.eps_low, eps_high=config.eps_high, beta=config.beta,
                                         loss=config.loss, max_length=config.max_tokens, total=total)
            loss.backward()
            weight = mask.sum() / tokens / config.mu  # this micro-batch's share of all tokens and updates
            log += weight * torch.tensor([stats["kl"], stats["clip_high"] + stats["clip_low"]], device=mllm.device)
        add_up([p.grad for p in parameters])
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        grad_norm += norm.item() / config.mu
        if not norm.isfinite():  # before the step, so that the adapters that were saved last stay good
            raise FloatingPointError("the gradient is not finite; start anew with a lower --lr")
        optimizer.step()
        optimizer.zero_grad()
    add_up([log])
    return dict(kl=log[0].item(), clip_fraction=log[1].item(), grad_norm=grad_norm)


def measure(mllm, games, config):
    """Greedy answers in held-out games or tasks -> (figures as fractions, None where unknown; the rows they are means of)."""
    games = my_part(games)
    texts = mllm.tell([speaker_prompt(game) for game in games], config.max_tokens, "playing held-out games")
    rows = gather((judge if config.method == "rrg" else verify)(mllm, games, texts, config) if games else [])
    names = HELD_OUT if config.method == "rrg" else {kind: kind for kind in KINDS}
    return {name: mean([row[key] for row in rows if key in row]) for name, key in names.items()}, rows  # only the toy world knows all of them


# ----------------------------------------------------------------------------------------------------------------- the run
def load_world(mllm, folder, seed):
    """-> (the concepts in a folder of photos, or of the toy world where there is none; their split: to train on, held out, of unseen categories)."""
    concepts, unseen = (data.load_concepts(folder), None) if folder else (toy.world(seed, side(mllm)), toy.UNSEEN)
    return concepts, data.split_concepts(concepts, seed, unseen)


def side(mllm):
    """Pixels of a toy picture, and of a photo in a scene: as the toy's tower knows them, or 8 x 8 image tokens of a real one."""
    return toy.SIDE if mllm.config.vision_config.patch_size == 8 else 224  # only the toy has patches of 8 pixels


def phrase(concept):
    """What a thing is called by somebody who does not know its name: what it looks like in the toy world, else its category."""
    if truth := concept.photos[0].truth:
        return toy.phrase(truth)
    return concept.category if concept.category != "object" else re.sub(r"[\W\d_]+", " ", concept.name).strip()  # "blue_mug2": "blue mug"


def set_up(config, mllm):
    """Stage 1: concepts, splits and games -> (training games, held-out games of seen categories, of unseen ones)."""
    concepts, (known, *held_out) = load_world(mllm, config.data, config.seed)  # held_out: of seen and of unseen categories
    photos = [photo for concept in concepts for photo in concept.photos]
    mllm.look(photos, progress=True)
    if config.method == "rrg":
        embeddings = (data.Clip(config.embedder, mllm.device) if config.embedder else mllm).embed(photos)
        train = data.mine_games(known, embeddings, config.k, config.seed, negatives=config.negatives, positive=config.positive)
        # Always measured in hard games, in which every other concept may be a rival, since those that are held out are few.
        exams = [data.mine_games(part, embeddings, config.k, config.seed, rivals=concepts) for part in held_out]
        exams = [random.Random(f"held out {config.seed}").sample(games, min(len(games), config.eval_games)) for games in exams]
    else:
        make = lambda part, shares, count, seed: data.make_tasks(part, shares, count, reward.REPIC, phrase, side(mllm), seed)
        train = make(known, shares(config), config.steps * config.games, config.seed)  # each is met once
        exams = [sum([make(part, {kind: 1.0}, config.eval_games, f"held out {config.seed} {kind}") for kind in KINDS], []) if len(part) > 1 else []
                 for part in held_out]
    print(f"{len(concepts)} concepts: {len(known)} to train on ({len(train)} games), {len(held_out[0])} held out ({len(exams[0])} games), "
          f"{len(held_out[1])} of unseen categories ({len(exams[1])} games)")
    return train, *exams


def exam(mllm, seen, unseen, config):
    """-> {"figures": the part of result.json, "examples": what is said in six held-out games, of different categories or kinds first}."""
    figures, rows = measure(mllm, seen, config)
    figures["unseen"] = measure(mllm, unseen, config)[0] if unseen else None
    kinds = [game.category if isinstance(game, data.Game) else game.kind for game in seen]
    places = sorted(range(len(seen)), key=lambda i: i != kinds.index(kinds[i]))[:6]  # the first of each kind, then the others
    return {"figures": figures, "examples": [seen[i].record() | {"text": rows[i]["text"], "rho": rows[i].get("rho")} for i in places]}


def save(out, mllm, optimizer, config, **rest):
    """The adapter, and all that `--resume` needs. Games and samples are seeded by the step, so no generator has to be kept."""
    grpo.save_adapter(mllm.model, out / "adapter", base=config.model)
    state = rest | {"lora": grpo.lora_state(mllm.model), "optimizer": optimizer.state_dict()}
    grpo.write_atomically(out / "state.pt", lambda path: torch.save(state, path))


def restore(out, mllm, optimizer):
    """Put adapters and optimizer back as they were saved, cut the logs there -> {"step", "seconds", "before"} of the saved run."""
    state = torch.load(out / "state.pt", map_location=mllm.device, weights_only=True)
    if state["lora"].keys() != grpo.lora_state(mllm.model).keys():
        raise data.DataError(f"{out}/state.pt is of another model; go on with the versions that {out}/config.json names")
    mllm.model.load_state_dict(state["lora"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    step_of = lambda line: int((re.match(r'(?:\{"step": )?(\d+)', line) or [0, 0])[1])  # a line of either log begins with it; of the heading 0
    for log in ("metrics.csv", "samples.jsonl") if ranks()[0] == 0 else ():
        lines = (out / log).read_text().splitlines(True) if (out / log).exists() else []
        kept = "".join(line for line in lines if line.endswith("\n") and step_of(line) <= state["step"])  # the rest is played again
        grpo.write_atomically(out / log, lambda path: path.write_text(kept))
    return {name: state[name] for name in ("step", "seconds", "before")}


def open_run(out, mllm, config):
    """Write down what this run is, and begin its logs."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    record = dict(command=shlex.join(["python", *sys.argv]), versions=versions, device=machine(mllm.device), settings=dataclasses.asdict(config))
    grpo.write_json(out / "config.json", record)
    (out / "metrics.csv").write_text(",".join(METRICS) + "\n")
    (out / "samples.jsonl").write_text("")


def summary(rows, samples):
    """The figures of a step's rows, `samples` a game, as METRICS defines them."""
    groups = [rows[i:i + samples] for i in range(0, len(rows), samples)]
    distinct = lambda key: [len({row[key] for row in group}) for group in groups]
    return {key: mean(column) for key in METRICS if (column := [row[key] for row in rows if key in row])} | dict(
        zero_std_groups=distinct("reward").count(1) / len(groups), distinct=sum(distinct("text")) / len(rows))


def train(config, resume):
    """The whole run: set up, measure, train, measure again, write result.json. Returns what result.json holds."""
    out, (rank, world) = pathlib.Path(config.out), ranks()
    if config.games % world:
        raise data.DataError(f"--games {config.games} cannot be shared equally by {world} processes")
    if not resume and (out / "state.pt").exists():
        raise data.DataError(f"{out} holds a run already; add --resume to go on with it, or give another --out")
    out.mkdir(parents=True, exist_ok=True)
    mllm = MLLM(config.model, config.max_pixels)
    training, seen, unseen = set_up(config, mllm)
    torch.manual_seed(config.seed)  # here, so that the adapters start alike in all processes and whatever the data
    wrapped = grpo.add_lora(mllm.model, config.rank, config.alpha)
    parameters = [p for p in mllm.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0)  # what holds the adapters back is the KL
    print(f"{config.model} on {mllm.device}: {sum(p.numel() for p in mllm.model.parameters()) / 1e6:.1f}M parameters, "
          f"{sum(p.numel() for p in parameters) / 1e6:.2f}M of them in adapters on {len(wrapped)} layers; run folder {out}")
    if resume:
        state = restore(out, mllm, optimizer)
    else:
        state = dict(step=0, seconds=0.0, before=exam(mllm, seen, unseen, config))  # B is 0 still: the model as it came
        if rank == 0:
            open_run(out, mllm, config)
            save(out, mllm, optimizer, config, **state)
    stopped = []  # Ctrl-C ends the step and saves; a second one ends at once
    signal.signal(signal.SIGINT, lambda *_: (stopped.append(True), signal.signal(signal.SIGINT, signal.default_int_handler)))
    log_file = lambda name: out / name if rank == 0 else os.devnull  # only the first process writes
    with open(log_file("metrics.csv"), "a") as metrics, open(log_file("samples.jsonl"), "a") as samples:
        bar = tqdm(range(state["step"], config.steps), initial=state["step"], total=config.steps, desc="training", unit="step")
        for step in bar:
            started = time.time()
            # linear warm-up to lr, then linear decay towards 0
            lr = config.lr * min((step + 1) / max(1, config.warmup), (config.steps - step) / max(1, config.steps - config.warmup))
            optimizer.param_groups[0]["lr"] = lr
            games = my_part(data.games_of_step(training, step, config.games, config.seed))  # stage 1
            answers, ref_logps, advantages, rows = play(mllm, games, step, config)  # stages 2 to 5
            log = update(mllm, games, answers, ref_logps, advantages, optimizer, config)  # stage 6
            rows = gather(rows)
            log |= summary(rows, config.samples) | dict(step=step + 1, lr=lr, seconds=time.time() - started)
            state |= dict(step=step + 1, seconds=state["seconds"] + log["seconds"])
            print(*(f"{log[key]:.6g}" if key in log else "" for key in METRICS), sep=",", file=metrics, flush=True)
            one_game = dict(step=step + 1, **games[0].record(), samples=rows[:config.samples])  # with all its texts
            print(json.dumps(one_game), file=samples, flush=True)
            bar.set_postfix({key: f"{log[key]:.3f}" for key in ("reward", "listener_accuracy", "nll", "kl") if key in log})
            stop = any(gather([bool(stopped)]))  # in all processes after the same step: one that waits for the others would wait for ever
            if rank == 0 and (stop or (step + 1) % config.save_every == 0 or step + 1 == config.steps):
                save(out, mllm, optimizer, config, **state)
            if stop:
                gather([])  # until the first process has saved: torchrun ends all of them when one exits
                bar.close()
                sys.exit(f"\nstopped after step {step + 1} and saved; go on with: python rrg.py --out {out} --resume")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before, after = state["before"], exam(mllm, seen, unseen, config)
    result = dict(before=before["figures"], after=after["figures"], seed=config.seed, steps=config.steps, seconds=round(state["seconds"], 1),
                  device=machine(mllm.device), examples={"before": before["examples"], "after": after["examples"]})
    if rank == 0:
        grpo.write_json(out / "result.json", result)
    show(result, out)
    print(f"What the descriptions are worth to an assistant, as a table and as a page: {shlex.join(['python', 'evaluate.py', '--report', str(out)])}")
    return result


# ------------------------------------------------------------------------------------------------------------- the outcome
def machine(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def held_out(result):
    """The lines of the table of held-out games: (name, before, after, and both of unseen categories), without what only a toy knows."""
    columns = [result["before"], result["after"], result["before"]["unseen"] or {}, result["after"]["unseen"] or {}]
    percent = lambda value: "-" if value is None else f"{value:.1%}"
    return [(name, *(percent(part.get(name)) for part in columns)) for name, value in columns[0].items() if name != "unseen" and value is not None]


def show(result, out):
    """Print before and after side by side, and three held-out games."""
    print(f"\n{'held-out games':16}{'seen categories':>22}{'unseen categories':>24}\n{'':16}{'before':>12}{'after':>10}{'before':>14}{'after':>10}")
    for line in held_out(result):
        print("{:16}{:>12}{:>10}{:>14}{:>10}".format(*line))
    for rows in list(zip(*result["examples"].values()))[:3]:
        game = rows[0]
        print(f"\n{game['target']} (the listener sees {', '.join(game['pool'])})" if "pool" in game else
              f"\n{game['question']!r} of {' + '.join(game['photos'])}")
        for when, row in zip(("before", "after"), rows):
            text = description.text if (description := reward.parse(row["text"])) else row["text"][:300]
            belief = " ".join(f"{'*' if i == game['answer'] else ''}{rho:.2f}" for i, rho in enumerate(row["rho"] or [])) or "not parsed"
            print(f"  {when:7}{text!r}" + (f"  [{belief}]" if "pool" in game else ""))
    print(f"\n{result['seconds']:.0f} s of training. In {out}/: metrics.csv, samples.jsonl, result.json, and the speaker in adapter/")


if __name__ == "__main__":
    try:
        if "WORLD_SIZE" in os.environ:  # set by torchrun
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # before anything is sent, or all processes would send from the first GPU
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
            if ranks()[0]:  # one of them is enough to tell what goes on
                sys.stdout = open(os.devnull, "w")
        train(*settings())
    except (data.DataError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError:
        sys.exit("error: out of GPU memory; lower --micro to 1, which changes no result (a run that has saved a state goes on with --resume "
                 "--micro 1), else --max-pixels or --samples")
    except OSError as error:  # a full disk, a folder that may not be written
        sys.exit(f"error: {error}; a run that has saved a state goes on with --resume")
    except KeyboardInterrupt:
        sys.exit("\nstopped; a run that has saved a state goes on with --resume")
