"""model.py: a Qwen2-VL that reads a prompt once and continues it many times.

A photo costs hundreds of tokens and a description thirty, and in every part of this program many
texts continue one photo. So there are two primitives, prefill and extend, and take between them:

    prefix = mllm.prefill(texts, photos)   read B prompts, and keep what attention needs of them
    branch = prefix.take(rows)             copies of its rows, one for each continuation
    hidden = mllm.extend(branch, ids)      continue each copy with tokens of its own

    who                 reads once a pass                      continues it with
    speaker             a photo and "Describe ..."             G descriptions, as it samples them
    policy, reference   a photo and "Describe ..."             the same G descriptions, scored
    listener            a photo and "Read this description:"   every description put to that photo

A copy is a plain index into a tensor, and autograd knows how to go back through it: the gradients
of all G continuations are summed into the one prefix. (DynamicCache detaches nothing and appends
by torch.cat, so keys and values stay in autograd's graph.) So log-probs and gradients are those of
the plain model, which reads every row from its beginning.

Where it departs from the RRG authors' research code and from what a checkpoint asks for:
1. There is no second model and no server. Where LoRA is off (lora.py), this network is the
   listener and the reference policy.
2. The vision tower is frozen, so a photo goes through it once, whatever is asked about it.
3. Sampling is plain: temperature 1, no top-k, top-p or penalties, whatever the checkpoint's own
   defaults say. (Qwen2-VL's say top_k 1, which makes all G samples the same.) So the distribution
   that is sampled is the one whose log-probs are trained.

Shapes: B prompts, N rows (continuations), P prompt tokens, T tokens that continue a prompt,
C tokens of an answer, V vocabulary, D width of the language model.
"""

import pathlib
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPModel,
    DynamicCache,
)

# The processors that work with Pillow alone: those that AutoImageProcessor loads want torchvision.
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import reward
from data import DataError, Photo, one_line_errors
from grpo import token_logps

FAMILIES = ("qwen2_vl", "qwen2_5_vl")
EXAMPLE = "Qwen/Qwen2-VL-2B-Instruct"  # a hub name, for messages
# What is raised where a checkpoint's files are missing, torn, or of another shape.
UNLOADABLE = (OSError, ValueError, RuntimeError, SafetensorError)
# These bound the memory and change no result.
FEATURES = 2**32  # bytes of photo features that are remembered, on the CPU: 2700 photos at 2B
ROWS = 128  # photos that are read, and texts that continue them, in one pass of the listener
LOGITS = 2**26  # logits that exist at once when answers are scored, in fp32 256 MB
COMPARING = "comparing photos and words"  # the title of that work
PICTURE = "<|picture|>"  # in the text of a Prompt: here is the next photo
# Qwen2-VL's chat layout, for base checkpoints, which come without one.
CHAT = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Prompt:
    """What a user shows and says: the photos, then the text.

    A text that says PICTURE, once for each photo, has the photos there instead.
    """

    photos: list[Photo]
    text: str


@dataclass
class Prefix:
    """B prompts that the model has read, ready to be continued."""

    cache: DynamicCache  # per layer keys and values [B, heads, P, head size]
    mask: torch.Tensor  # [B, P], 0 on padding
    position: torch.Tensor  # [B], of the next token; see `MLLM.prefill`
    last: torch.Tensor  # [B, D], the hidden state that predicts the next token

    def take(self, rows):
        """Copies of some rows, in any order and as often as wanted.   rows [N] -> Prefix of N rows

        Gradients of the copies flow back to this prefix. `MLLM.extend` grows what it continues, so
        take a copy of a prefix that is wanted again.
        """
        # DynamicCache(pairs) starts a cache from (keys, values), one pair for each layer.
        layers = [(layer.keys[rows], layer.values[rows]) for layer in self.cache.layers]
        return Prefix(DynamicCache(layers), self.mask[rows], self.position[rows], self.last[rows])


@dataclass
class Completions:
    """N answers of at most C tokens, and the same as texts."""

    ids: torch.Tensor  # [N, C]
    mask: torch.Tensor  # [N, C], true up to and including the token that ends the answer
    logps: torch.Tensor | None  # [N, C], log-probs at the time of sampling; None: not sampled
    texts: list[str]  # N


@dataclass
class EncodedPhoto:
    """A photo as the vision tower sees it, on the CPU: of thousands of photos a step wants few."""

    features: torch.Tensor  # [image tokens, D]
    grid: torch.Tensor  # [3]: time (1), height and width, in patches


def chunks(items, size, progress=None):
    """The items of a list, up to `size` at a time; with a progress bar if it is given a title."""
    starts = range(0, len(items), size)
    for start in tqdm(starts, desc=progress, leave=False, disable=progress is None):
        yield items[start : start + size]


def load_pictures(photos):
    """The pictures of some photos, read on all cores: Pillow decodes outside of Python's lock."""

    def load(photo):
        return photo.load()

    with ThreadPoolExecutor() as threads:
        return list(threads.map(load, photos))


def check_name(name):
    """Raise DataError, with the next step, for a --model that can be none."""
    folder = pathlib.Path(name)
    is_folder = bool(name) and folder.is_dir()
    for adapter in (folder, folder / "adapter"):
        if (adapter / "adapter_config.json").is_file():
            raise DataError(
                f"{name} holds an adapter, not a model: give it to assistant.py or evaluate.py as "
                f"--adapter {adapter}, and as --model what it was trained on"
            )
    if not is_folder and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise DataError(
            f"there is no model {name}: give --model a folder with a checkpoint, or a hub name "
            f"such as {EXAMPLE}"
        )


def loading_errors(what, name):
    """`with loading_errors("model", name):` whatever is wrong with its files is one line."""
    advice = "it is no folder here; a name on the hub wants the network the first time"
    if pathlib.Path(name).is_dir():
        advice = "if a file is missing, torn or a Git-LFS pointer, download it again"
    return one_line_errors(f"cannot load the {what} {name} ({advice})", *UNLOADABLE)


class MLLM:
    """A Qwen2-VL (or 2.5-VL), its tokenizer and its picture processor.

    name: a folder or a hub name. Photos are shrunk to at most `max_pixels`. Raises DataError if
    it cannot be loaded, is of another family, or has no single token for yes and for no.

    To play with another family, change what depends on this one: its photo features
    (`encode_photos`), its positions (`prefill`) and its photo marker (`image_token`).
    """

    def __init__(self, name, max_pixels):
        self.device = torch.device("cpu")
        dtype = torch.float32
        if torch.cuda.is_available():
            self.device = torch.device(f"cuda:{torch.cuda.current_device()}")
            dtype = torch.bfloat16

        check_name(name)
        with loading_errors("model", name):
            # No code that comes with a checkpoint is run, and no pickle is read.
            family = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
            if family not in FAMILIES:
                raise DataError(
                    f"{name} is a {family}; this program plays with Qwen2-VL and Qwen2.5-VL "
                    f"checkpoints, such as --model {EXAMPLE}"
                )
            self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            self.processor = Qwen2VLImageProcessorPil.from_pretrained(name, max_pixels=max_pixels)
            model = AutoModelForImageTextToText.from_pretrained(
                name, dtype=dtype, trust_remote_code=False, use_safetensors=True
            )
        # eval() for good: dropout would make the policy that is trained differ from the one that
        # was sampled.
        self.model = model.to(self.device).eval()
        self.model.requires_grad_(False)
        self.decoder = self.model.model.language_model
        self.config = self.model.config

        self.tokenizer.chat_template = self.tokenizer.chat_template or CHAT
        self.image_token = self.tokenizer.convert_ids_to_tokens(self.config.image_token_id)
        # Any of these ends an answer; Qwen2-VL-Instruct has two.
        self.ends = torch.tensor(self.end_tokens(), device=self.device)
        self.yes = self.single_tokens("yes", "Yes", "YES", " yes", " Yes", " YES")
        self.no = self.single_tokens("no", "No", "NO", " no", " No", " NO")
        if not self.yes or not self.no:
            raise DataError(f"{name} has no single token for yes or no, so it cannot listen")
        self.unknown = self.tokenizer.unk_token_id  # None if the tokenizer can spell anything
        self.markers = [str(token) for token in self.tokenizer.added_tokens_decoder.values()]
        self.features = {}  # {Photo: EncodedPhoto}, the one that was wanted last at the end
        # Told (title, how many) as work goes on, in the place of bars: one bar over many calls.
        self.on_done = None

    def bar_title(self, title):
        """The title of a progress bar; None, for no bar, where `on_done` is told instead."""
        return None if self.on_done is not None else title

    def tell(self, title, count):
        """Tell `on_done`, if there is one, that so much of the work of this title is done."""
        if self.on_done is not None and title is not None:
            self.on_done(title, count)

    # ----------------------------------------------------------------------------------- words
    def encode(self, text):
        """-> token ids of a text, without any that the tokenizer would add by itself"""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def end_tokens(self):
        """-> sorted ids of the tokens that end an answer"""
        ends = self.model.generation_config.eos_token_id  # an id, a list of ids, or None
        if not isinstance(ends, list):
            ends = [ends]
        ends = {*ends, self.tokenizer.eos_token_id}
        end_of_turn = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        if end_of_turn != self.tokenizer.unk_token_id:  # which a word gets that is not there
            ends.add(end_of_turn)
        return sorted(ends - {None})

    def single_tokens(self, *spellings):
        """-> sorted ids of those spellings that this tokenizer has as one token"""
        found = set()
        for spelling in spellings:
            ids = self.encode(spelling)
            if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id:
                found.add(ids[0])
        return sorted(found)

    def knows(self, text):
        """Does the model know every word of a text?

        Real tokenizers can spell anything; the toy model knows few words, and would read any other
        as nothing.
        """
        return self.unknown is None or self.unknown not in self.encode(text)

    def check_words(self, texts):
        """Raise DataError if there is a text of which the model does not know every word."""
        for text in texts:
            if not self.knows(text):
                raise DataError(
                    f"this model does not know every word of {text[-200:]!r}. The toy model knows "
                    "the toy world only: for real things give a real --model; after a change of "
                    "prompts rebuild it with python toy-qwen2-vl/make.py"
                )

    def quote(self, text):
        """A description as it is put to a reader (reward.quoted)."""
        return reward.quoted(text, self.markers)

    def pad(self, texts, side="left"):
        """Texts as one batch.   -> (token ids [N, T], mask [N, T], 0 on padding)

        On the left, the default, every row ends at place -1, so that what continues it follows
        without a gap.
        """
        rows = self.tokenizer(
            texts,
            add_special_tokens=False,
            padding=True,
            padding_side=side,
            return_tensors="pt",
        ).to(self.device)
        return rows["input_ids"], rows["attention_mask"]

    def chat(self, pictures, text):
        """A user's message in the model's own layout, with `pictures` image markers.

        They come before the text, or where the text says PICTURE.
        """
        if PICTURE not in text:
            text = PICTURE * pictures + text
        first, *others = text.split(PICTURE)
        content = [{"type": "text", "text": first}] if first else []
        for part in others:
            content.append({"type": "image"})
            if part:
                content.append({"type": "text", "text": part})
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )

    # ---------------------------------------------------------------------------------- photos
    @torch.no_grad()
    def encode_photos(self, photos, progress=None):
        """What the vision tower makes of photos.   -> [EncodedPhoto, ...]

        The tower is frozen: each photo is encoded once and remembered, as long as there is room. A
        scene that is never met again (Photo.kept) is remembered until the next new photos come,
        which is as long as its step lasts.
        """
        encoded = {}  # {Photo: EncodedPhoto}
        new = []
        for photo in dict.fromkeys(photos):
            if photo in self.features:
                encoded[photo] = self.features.pop(photo)
            else:
                new.append(photo)
        for batch in chunks(new, 16, progress):
            pictures = load_pictures(batch)
            inputs = self.processor(images=pictures, return_tensors="pt").to(self.device)
            grids = inputs["image_grid_thw"]  # [photos, 3]
            output = self.model.model.get_image_features(inputs["pixel_values"], grids)
            features = output.pooler_output  # a tuple: for each photo [image tokens, D]
            for photo, of_photo, grid in zip(batch, features, grids, strict=True):
                encoded[photo] = EncodedPhoto(of_photo.cpu(), grid.cpu())

        if new:
            self.forget_scenes()
        self.features |= encoded  # at the end
        if new:
            self.forget_oldest()
        return [encoded[photo] for photo in photos]

    def forget_scenes(self):
        """Forget the scenes of the step before: each is made for one task."""
        for photo in list(self.features):
            if not photo.kept:
                del self.features[photo]

    def forget_oldest(self):
        """Forget those photos that were not wanted for longest, until the others have room."""
        size = sum(encoded.features.nbytes for encoded in self.features.values())
        for photo in list(self.features):
            if size <= FEATURES:
                break
            size -= self.features.pop(photo).features.nbytes

    def picture_size(self, photo):
        """-> (width, height) in pixels of a photo as the model sees it, resized"""
        [encoded] = self.encode_photos([photo])
        _, height, width = encoded.grid.tolist()
        patch = self.config.vision_config.patch_size
        return width * patch, height * patch

    def embed(self, photos):
        """{photo name: unit vector [D]}, the mean of the tower's features: for similarity."""
        vectors = {}
        for batch in chunks(photos, 16, self.bar_title("looking at the photos")):
            for photo, encoded in zip(batch, self.encode_photos(batch), strict=True):
                mean = encoded.features.float().mean(0)  # [D]
                vectors[photo.name] = F.normalize(mean, dim=0)
        return vectors

    def repeat_image_token(self, text, encoded):
        """One marker per photo becomes one per image token: "<image>Hi" -> "<image><image>Hi"."""
        head, *rest = text.split(self.image_token)
        if len(rest) != len(encoded):
            raise ValueError("a prompt wants one image marker for each of its photos")
        for photo, part in zip(encoded, rest, strict=True):
            head += self.image_token * len(photo.features) + part
        return head

    # ---------------------------------------------------------------------- the two primitives
    def prefill(self, texts, photos):
        """Read B prompts once.   -> Prefix

        texts [B]: in the layout of `chat`, with an image marker for each photo
        photos [B]: the list of photos of each prompt, which may be empty
        """
        # All photos together, in the order of reading.
        in_order = self.encode_photos([photo for of_prompt in photos for photo in of_prompt])

        # Words: token ids, in which a photo takes as many places as it has image tokens.
        long_texts = []
        first = 0
        for text, of_prompt in zip(texts, photos, strict=True):
            of_text = in_order[first : first + len(of_prompt)]
            first += len(of_prompt)
            long_texts.append(self.repeat_image_token(text, of_text))
        self.check_words(set(long_texts))
        ids, mask = self.pad(long_texts)  # [B, P], [B, P]
        is_image = ids == self.config.image_token_id  # [B, P]
        embeds = self.decoder.embed_tokens(ids)  # [B, P, D]

        # Photos: their features take the places of the markers.
        grids = None
        if in_order:
            features = torch.cat([photo.features for photo in in_order])  # [image tokens, D]
            features = features.to(self.device, embeds.dtype)
            embeds = embeds.masked_scatter(is_image[..., None], features)
            grids = torch.stack([photo.grid for photo in in_order])  # [photos, 3]
            grids = grids.to(self.device)

        # Positions have three axes, time, height and width. A word at place t is at (t, t, t); a
        # photo of 2 x 3 tokens after it takes (t+1, t+1..t+2, t+1..t+3), and the next word is at
        # t+4, one past the largest. They are always given: without them transformers silently
        # counts in one dimension or reuses those of the last call.
        positions, _ = self.model.model.get_rope_index(  # [3, B, P]: time, height, width
            ids, mm_token_type_ids=is_image.int(), image_grid_thw=grids, attention_mask=mask
        )
        # The decoder alone, without lm_head: nobody wants V logits for each token of a prompt.
        out = self.decoder(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=DynamicCache(),
        )
        next_position = positions.amax((0, 2)) + 1  # [B], one past the largest on any axis
        return Prefix(out.past_key_values, mask, next_position, out.last_hidden_state[:, -1])

    def extend(self, prefix, ids, mask=None):
        """Continue each row of a prefix with tokens.   ids [N, T] -> hidden states [N, T, D]

        mask [N, T] says which tokens are real (None: all). The prefix itself grows by T places
        (cache, mask, position); `last` stays what it was, the caller knows which state it wants.
        """
        if mask is None:
            mask = torch.ones_like(ids)
        # Words: one position for all three axes; the decoder spreads [N, T] over them. On padding
        # the position before is repeated, but nothing attends to it.
        positions = prefix.position[:, None] + mask.cumsum(1) - 1  # [N, T]
        prefix.mask = torch.cat([prefix.mask, mask], 1)  # [N, P + T]
        prefix.position = prefix.position + mask.sum(1)  # [N]
        return self.decoder(
            input_ids=ids,
            attention_mask=prefix.mask,
            position_ids=positions,
            past_key_values=prefix.cache,
        ).last_hidden_state

    # ------------------------------------------------------------- one prompt, several answers
    def prefill_prompts(self, prompts, copies):
        """Read each of B prompts once.   -> Prefix of B * copies rows, a prompt's together"""
        texts = [self.chat(len(prompt.photos), prompt.text) for prompt in prompts]
        prefix = self.prefill(texts, [prompt.photos for prompt in prompts])
        rows = torch.arange(len(prompts), device=self.device)  # [B]
        return prefix.take(rows.repeat_interleave(copies))

    @torch.no_grad()
    def sample(self, prefix, max_tokens, uniforms=None):
        """One answer of at most `max_tokens` tokens for each row of a prefix.   -> Completions

        At temperature 1, by uniforms [max_tokens, N]: random numbers in [0, 1), one for each token
        that may be drawn. The caller draws them, so that an answer does not depend on how many
        processes share the games. Without them greedily. The prefix grows on the way.
        """
        if uniforms is not None:
            uniforms = uniforms.to(self.device)
        hidden = prefix.last  # [N, D]
        done = torch.zeros(len(hidden), dtype=torch.bool, device=self.device)  # [N]
        ids = []  # of each step [N]
        masks = []  # of each step [N]
        logps = []  # of each step [N]
        for step in range(max_tokens):
            if step > 0:
                hidden = self.extend(prefix, ids[-1][:, None])[:, -1]  # [N, D]
            logp = self.model.lm_head(hidden).float().log_softmax(-1)  # [N, V]
            if uniforms is None:
                token = logp.argmax(-1, keepdim=True)  # [N, 1]
            else:
                # The token at which the summed probabilities pass the uniform number.
                # (torch.multinomial would draw V numbers a row.) The sum's end is not quite 1.
                summed = logp.exp().cumsum(-1)  # [N, V]
                token = torch.searchsorted(summed, uniforms[step][:, None] * summed[:, -1:])

            ids.append(torch.where(done, self.ends[0], token.squeeze(1)))
            masks.append(~done)  # before `done` changes: the token that ends an answer is learned
            logps.append(logp.gather(1, token).squeeze(1))
            done = done | torch.isin(ids[-1], self.ends)
            if done.all():
                break

        ids = torch.stack(ids, 1)  # [N, C]
        mask = torch.stack(masks, 1)  # [N, C]
        is_word = (mask & ~torch.isin(ids, self.ends)).cpu()
        texts = []
        for row, kept in zip(ids.cpu(), is_word, strict=True):
            texts.append(self.tokenizer.decode(row[kept]))
        return Completions(ids, mask, torch.stack(logps, 1), texts)

    @torch.no_grad()
    def speak(self, prompts, samples=1, max_tokens=128, uniforms=None):
        """Answer each of B prompts `samples` times.   -> Completions of N = B * samples rows

        Row b * samples + g is answer g to prompt b. uniforms [max_tokens, N] as in `sample`.
        """
        return self.sample(self.prefill_prompts(prompts, samples), max_tokens, uniforms)

    def greedy(self, prompts, max_tokens=128, progress=None):
        """The greedy answers to any number of prompts.   -> texts"""
        texts = []
        for part in chunks(prompts, 32, self.bar_title(progress)):
            texts += self.speak(part, max_tokens=max_tokens).texts
            self.tell(progress, len(part))
        return texts

    def log_probs(self, prompts, ids, mask=None):
        """Log-probs of given answers under the model as it is now, with gradient.

        B prompts, ids [N, C] with N a multiple of B, a prompt's answers together; mask [N, C], true
        up to the end of an answer, after which log-probs mean nothing (None: it never ends)
        -> [N, C]
        """
        prefix = self.prefill_prompts(prompts, len(ids) // len(prompts))
        width = ids.shape[1]
        if mask is not None:  # nothing is computed beyond the longest of these answers
            ids = ids[:, : mask.sum(1).max()]
        # What predicts a token is the state before it: for the first one the prompt's last, for
        # the others those of ids[:, :-1]. The mask hides no token: what follows the end of an
        # answer is not seen by anything before it, and the loss leaves it out.
        hidden = prefix.last[:, None]  # [N, 1, D]
        if ids.shape[1] > 1:
            hidden = torch.cat([hidden, self.extend(prefix, ids[:, :-1])], 1)  # [N, C, D]

        def logps_of(hidden, ids):
            return token_logps(self.model.lm_head(hidden), ids)

        # Logits [N, C, V] would be the largest tensor of all by far. So they are made for a few
        # tokens at a time, and made again in the backward pass.
        tokens = max(1, LOGITS // self.model.lm_head.out_features)
        hidden_parts = hidden.flatten(0, 1).split(tokens)  # of each part [tokens, D]
        ids_parts = ids.flatten().split(tokens)  # of each part [tokens]
        logps = []
        for hidden_part, ids_part in zip(hidden_parts, ids_parts, strict=True):
            logps.append(checkpoint(logps_of, hidden_part, ids_part, use_reentrant=False))
        return F.pad(torch.cat(logps).view_as(ids), (0, width - ids.shape[1]))

    # --------------------------------------------------------------- one photo, several texts
    @torch.no_grad()  # which holds inside this generator only, not in what uses it
    def prefill_pairs(self, template, pairs):
        """Put texts to photos: pairs [(photo, text), ...], a text in the place of {text}.

        Yields (distinct pairs, a Prefix with one row a pair) until every pair has had its turn. The
        Prefix's `last` is the state that predicts the first token of the answer. With one photo,
        two texts and the listener's template:

            "<image>Read this description:"             read once, for the photo
            "a red mug. Does every part of it fit?"     continues a copy of it
            "a blue mug. Does every part of it fit?"    continues another copy
        """
        head, tail = self.chat(1, template).split("{text}")
        self.check_words([tail])
        # By length, so that there is little padding.
        distinct = sorted(dict.fromkeys(pairs), key=lambda pair: len(pair[1]))
        place = {pair: i for i, pair in enumerate(distinct)}
        about = {photo: [] for photo, _ in pairs}  # {photo: its pairs}
        for pair in distinct:
            about[pair[0]].append(pair)
        for some_photos in chunks(list(about), ROWS):
            prefix = self.prefill([head] * len(some_photos), [[photo] for photo in some_photos])
            row_of = {photo: row for row, photo in enumerate(some_photos)}
            about_them = []
            for photo in some_photos:
                about_them += about[photo]
            about_them.sort(key=place.get)
            for some_pairs in chunks(about_them, ROWS):
                rows = [row_of[photo] for photo, _ in some_pairs]
                # A copy, since the next pairs want the prefix again.
                branch = prefix.take(torch.tensor(rows, device=self.device))
                # Padding on the left lies between prefix and text: masked, it takes no position.
                ids, mask = self.pad([text + tail for _, text in some_pairs])
                branch.last = self.extend(branch, ids, mask)[:, -1]  # [N, D]
                yield some_pairs, branch

    @torch.no_grad()
    def believe(self, pairs):
        """Stage 3, the listener: does the description fit the photo?   -> beliefs [pairs], CPU

        pairs [(photo, description), ...]. The model listens as it is now: to ask the frozen one,
        switch LoRA off around it.
        """
        pairs = [(photo, self.quote(text)) for photo, text in pairs]
        beliefs = {}  # {pair: float}
        for some_pairs, prefix in self.prefill_pairs(reward.LISTEN, pairs):
            logits = self.model.lm_head(prefix.last)  # [N, V]
            values = reward.belief(logits, self.yes, self.no).tolist()
            beliefs.update(zip(some_pairs, values, strict=True))
        return torch.tensor([beliefs[pair] for pair in pairs])

    def answer(self, template, pairs, max_tokens=128, progress=None):
        """The greedy answers to a template, for pairs [(photo, text), ...].   -> texts [pairs]"""
        answers = {}  # {pair: text}
        total = len(set(pairs))
        title = self.bar_title(progress)
        with tqdm(total=total, desc=title, leave=False, disable=title is None) as bar:
            for some_pairs, prefix in self.prefill_pairs(template, pairs):
                texts = self.sample(prefix, max_tokens).texts
                answers.update(zip(some_pairs, texts, strict=True))
                bar.update(len(some_pairs))
                self.tell(progress, len(some_pairs))
        return [answers[pair] for pair in pairs]

    def compare(self, photos, texts):
        """How well each text fits each photo: the listener's belief, a strong measure of it (as in
        VQAScore, ECCV 2024).   -> [photos, texts]"""
        rows = []
        for some_photos in chunks(photos, 16, self.bar_title(COMPARING)):
            pairs = [(photo, text) for photo in some_photos for text in texts]
            rows.append(self.believe(pairs).view(-1, len(texts)))
            self.tell(COMPARING, len(pairs))
        return torch.cat(rows)


class Clip:
    """A CLIP that measures similarity: `embed` and `compare`, as MLLM has them, in its place."""

    def __init__(self, name, device):
        with loading_errors("CLIP model", name):
            self.model = CLIPModel.from_pretrained(name).to(device).eval()
            self.processor = CLIPImageProcessorPil.from_pretrained(name)
            self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)

    @torch.no_grad()
    def embed(self, photos):
        """{photo name: unit vector [D]}."""
        vectors = {}
        for batch in chunks(photos, 32, "CLIP looks at the photos"):
            pictures = load_pictures(batch)
            pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
            output = self.model.get_image_features(pixel_values=pixels.to(self.model.device))
            unit = F.normalize(output.pooler_output, dim=-1).cpu()  # [photos, D]
            names = [photo.name for photo in batch]
            vectors.update(zip(names, unit, strict=True))
        return vectors

    @torch.no_grad()
    def compare(self, photos, texts):
        """Cosine similarity [photos, texts]; CLIP reads the first 77 tokens of a text."""
        rows = self.tokenizer(
            texts, padding=True, truncation=True, max_length=77, return_tensors="pt"
        ).to(self.model.device)
        output = self.model.get_text_features(**rows)
        of_texts = F.normalize(output.pooler_output, dim=-1).cpu()  # [texts, D]
        vectors = self.embed(photos)
        of_photos = torch.stack([vectors[photo.name] for photo in photos])  # [photos, D]
        return of_photos @ of_texts.T
