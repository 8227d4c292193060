"""make.py: how the checkpoint in this folder was made: a Qwen2-VL that knows the drawn world of
toy.py.

It is a real `Qwen2VLForConditionalGeneration` of 2.2M parameters in an ordinary checkpoint folder.
Nothing of this file is needed to use it, or to understand RRG. It is made to be an honest small
MLLM: it captions densely, mixing identity and view; as a listener it says yes only if every claim
fits the picture; it does the assistant's three tasks; and it can rewrite a description without
state and place. So where it fails at them, it is because a description is bad and not because it
cannot read the prompt. One literal example, as the speaker
writes it and as the listener is asked about it:

    <thinking> I see a mug . </thinking> <coarse> A photo of a red mug </coarse>
    <detailed> The red striped mug with a star badge, tilted on grass in dim light. </detailed>

    Read this description: "A photo of a red mug. The red striped mug with a star badge, tilted on
    grass in dim light." Does every part of it fit the main subject of this photo? ...

To run it:

    python toy-qwen2-vl/make.py                    # rebuild it from nothing (README.md says how
                                                   # long that takes), then its report card; a
                                                   # stopped one goes on by the same command
    python toy-qwen2-vl/make.py --vision-steps 0   # keep its vision tower and rebuild the rest:
                                                   # what a changed prompt needs
    python toy-qwen2-vl/make.py --card             # only the report card

Three stages of training: 1 the vision tower learns to see, 2 the language model learns all tasks,
3 it learns to hesitate where RePIC is to reinforce something: it answers some questions hastily,
and calls few things by their names, though it can do better.

Where it departs from the way real MLLMs are trained (and therefore what not to learn from it):
1. The vision tower learns the attributes directly (one linear head per attribute, thrown away),
   then is frozen.
2. At this size little emerges from answers alone. So throw-away heads judge each claim true or
   false, and tell what two concepts have in common; and six of the twenty attention heads are
   shown where to look: three to find a subject in a scene, two to tell which name belongs to what
   a sentence is about, one to copy that name.
3. Our prompts, and the pieces of the JSON they ask for, are single words of the vocabulary: a
   prompt costs one token and not a hundred.

A *scene* is a collage of one to four photos. The words subject, view and truth are toy.py's.

Shapes: N photos, S scenes, T tokens in a row, P tokens of the beginning that all prompts share,
V vocabulary. WIDTH is the width of both tower and language model. A photo is 16 image tokens, a
scene 81.
"""

import argparse
import contextlib
import hashlib
import json
import math
import multiprocessing
import pathlib
import random
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from tqdm import tqdm
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import assistant  # noqa: E402
import evaluate  # noqa: E402
import naming  # noqa: E402
import repic  # noqa: E402
import reward  # noqa: E402
from data import DataError, Photo  # noqa: E402
from lora import write_atomically  # noqa: E402
from model import MLLM, PICTURE, Prompt, chunks  # noqa: E402
from protocols import Part, Test, split_photos, toy_questions  # noqa: E402
from rrg import percent  # noqa: E402
from toy import (  # noqa: E402
    ATTRIBUTES,
    FOLDER,
    IDENTITY,
    KIND_OF,
    NAMES,
    PATCH,
    SIDE,
    SUBJECT,
    VIEW,
    altered,
    claims,
    clause,
    description,
    new_occasion,
    new_subject,
    new_view,
    phrase,
    quiz,
    sentence,
    take_photo,
    world,
)

SCENE_SIDE = 144  # pixels of a scene, either way: 2.25 times a photo's
PHOTO_TOKENS = 16  # image tokens: one for each 16 x 16 pixels
SCENE_TOKENS = 81
TOKEN_CENTRES = range(8, SCENE_SIDE, 16)  # of a scene's image tokens, in pixels, either way
CORNERS = [0, 4, 8, 72, 76, 80]  # where a photo may begin in a scene, in pixels, either way

# ----------------------------------------------------------------------------------- the vocabulary
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<unk>",
]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }} "
    "{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
PROMPTS = {  # the tasks about one photo
    "speak": reward.SPEAK.replace("{subject}", reward.MAIN_SUBJECT),
    "listen": reward.LISTEN,
    "recognition": assistant.RECOGNITION,
    "captioning": assistant.CAPTIONING,
    "vqa": assistant.VQA,
    "plain": repic.PLAIN,
}
WORDS = (
    'user assistant yes no Yes No system " , . : ? A B C photo of a The with badge on in light '
    "I see Where How What does stand is This "
    "<thinking> </thinking> <coarse> </coarse> <detailed> </detailed>"
)
BEFORE_ANSWER = ['{"Answer": "', '", "Answer": "']  # after these, Yes or No or a letter follows
JSON_PIECES = ['{"Reasoning": "', *BEFORE_ANSWER, '", "Caption": "', '"}', '{"bbox_2d": [', "]}"]
TAGS = [f"<{name}>" for name in NAMES]  # what things are called, a token each


def box_numbers():
    """The numbers that boxes are made of, as words: where photos begin and end in a scene."""
    numbers = CORNERS + [corner + SIDE for corner in CORNERS]
    return list(dict.fromkeys(str(number) for number in numbers))


def prompt_pieces():
    """All prompts that the model knows, cut where a text is put into them."""
    templates = list(PROMPTS.values())
    for task in ("oct", "vlt", "ict"):
        templates += repic.PROMPTS[task]
    templates += [repic.ASK_FOR_NAME, evaluate.REFINE]
    pieces = []
    for template in templates:
        pieces += [piece for piece in template.split("{text}") if piece]
    return list(dict.fromkeys(pieces))


def new_tokenizer():
    """Word-level: a token is a word, a tag, a punctuation mark, a name, or a whole piece of a
    prompt (departure 3)."""
    words = [*SPECIAL, *WORDS.split(), *KIND_OF, *TAGS, *box_numbers()]
    ids = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.WordPiece(ids, unk_token="<unk>"))
    core.decoder = decoders.WordPiece(cleanup=False)
    core.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"</?[\w-]+>|\w+|[^\w\s]"), "removed", invert=True
    )
    whole = [*SPECIAL, *prompt_pieces(), *JSON_PIECES]
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in whole])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=CHAT,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="left",
        clean_up_tokenization_spaces=True,
    )


def token_ids(tokenizer, words):
    """The ids of words that are one token each.   -> [words]"""
    return torch.tensor(tokenizer.convert_tokens_to_ids(list(words)))


# -------------------------------------------------------------------------------------- the network
WIDTH = 128
LAYERS = 5
TOWER_LAYERS = 3
# Departure 2. To find a subject in a scene takes three steps, by the first head of three layers:
FIND_HEAD = 0
WORDS_LAYER = 1  # each word of the prompt looks at the subjects that it fits,
GATHER_LAYER = 2  # the answer looks at these words,
POINT_LAYER = 3  # and then at the subject that they all fit
# To copy a name takes one:
COPY_HEAD = 2
COPY_LAYER = 3
# To know which name it is takes two more, by the last head of two layers: a name looks at its
# picture, in WORDS_LAYER, and the beginning of a sentence at what it is about, in GATHER_LAYER.
LOOK_HEAD = 3


def new_model(tokenizer):
    """Qwen2-VL's architecture at a thousandth of its size, untrained."""
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    end_of_text = ids["<|endoftext|>"]
    end_of_turn = ids["<|im_end|>"]
    ends = {
        "bos_token_id": end_of_text,
        "pad_token_id": end_of_text,
        "eos_token_id": end_of_turn,
    }
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 1024,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [4, 6, 6],
        },
        "tie_word_embeddings": True,
    }
    vision = {
        "hidden_size": WIDTH,
        "embed_dim": WIDTH,
        "depth": TOWER_LAYERS,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
    }
    config = Qwen2VLConfig(
        text_config=text | ends,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        **ends,
    )
    model = Qwen2VLForConditionalGeneration(config)
    two_ends = ends | {"eos_token_id": [end_of_turn, end_of_text]}  # as Qwen2-VL's own
    model.generation_config = GenerationConfig(**two_ends)
    return model


def new_processor():
    """The picture processor: two by two patches are an image token."""
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=2,
        temporal_patch_size=2,
        min_pixels=SIDE**2,
        max_pixels=SCENE_SIDE**2,
    )


# --------------------------------------------------------------------------------- the training set
@dataclass(frozen=True)
class Scene:
    """A collage of one to four photos."""

    photos: list[Photo]
    picture: Photo
    boxes: list[tuple]  # of each photo (left, top, right, bottom), in pixels of the scene


def new_scene(photos, rng):
    """A Scene of some of the photos."""
    chosen = rng.sample(photos, rng.choice([1, 2, 3, 4, 4]))
    picture, boxes = repic.collage(chosen, SIDE, rng.random())
    return Scene(chosen, picture, boxes)


def new_photo(seed):
    """A random subject that is not fresh.   -> (its picture as uint8 [64, 64, 3], its truth)"""
    rng = random.Random(seed)
    photo = take_photo("", new_subject(rng), new_occasion(rng), rng)
    return np.asarray(photo.load()), photo.truth


def draw_photos(count):
    """Draw the photos to learn from, on all processor cores.   -> [Photo, ...]"""
    photos = []
    with multiprocessing.Pool() as pool:
        drawn = pool.imap(new_photo, range(count), chunksize=100)
        for i, (pixels, truth) in enumerate(tqdm(drawn, total=count, desc="drawing")):
            # Names seed the layout of scenes: with other names the scenes would be others.
            photos.append(Photo(f"bank/{i}", partial(Image.fromarray, pixels), truth))
    return photos


def see(model, processor, photos):
    """What the tower makes of photos.   -> their image tokens [tokens of all photos, WIDTH]"""
    pixels = processor(images=[photo.load() for photo in photos], return_tensors="pt")
    tower = model.model.visual
    return tower(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"]).pooler_output


def see_all(model, processor, photos, tokens):
    """The same for any number of photos of `tokens` image tokens each.

    -> [photos, tokens, WIDTH] in fp16
    """
    features = []
    for part in chunks(photos, 64, "encoding"):
        features.append(see(model, processor, part).unflatten(0, (-1, tokens)).half())
    return torch.cat(features)


def subject_of(truth):
    """(category, colour, pattern, badge) of a photo."""
    return tuple(truth[kind] for kind in SUBJECT)


class Dataset:
    """What the language model learns from: photos, scenes, and what the tower sees in both."""

    def __init__(self, photos, scenes, photo_features, scene_features):
        self.photos = photos  # [N]
        self.scenes = scenes  # [S]
        self.photo_features = photo_features  # [N, 16, WIDTH]
        self.scene_features = scene_features  # [S, 81, WIDTH]
        self.of_subject = defaultdict(list)  # (category, colour, pattern, badge): photo numbers
        self.of_category = defaultdict(list)  # category: photo numbers
        self.of_size = defaultdict(list)  # photos in a scene: scene numbers
        self.larger_than = defaultdict(list)  # the same, of scenes with more photos
        for number, photo in enumerate(photos):
            self.of_subject[subject_of(photo.truth)].append(number)
            self.of_category[photo.truth["category"]].append(number)
        for number, scene in enumerate(scenes):
            size = len(scene.photos)
            self.of_size[size].append(number)
            for smaller in range(1, size):
                self.larger_than[smaller].append(number)

    def same_subject(self, photo, rng):
        """The number of any photo of the same subject; it may be this one."""
        return rng.choice(self.of_subject[subject_of(photo.truth)])


# ------------------------------------------------------------------------------------ the optimizer
def fit(title, modules, loss_of, steps, peak=1.0):
    """Minimise `loss_of(step) -> (loss, figures)`: Muon for matrices, AdamW for the rest.

    Prints the figures twenty times, each the mean since the last time. The learning rate rises for
    50 steps and falls along half a cosine; peak: its share of the optimizers' full rates.
    """
    # Muon is made for matrices, throw-away heads among them, but not for embeddings.
    parameters = []
    matrices = []
    others = []
    for module in modules:
        for name, parameter in module.named_parameters():
            parameters.append(parameter)
            if parameter.ndim == 2 and "embed" not in name:
                matrices.append(parameter)
            else:
                others.append(parameter)
    muon = torch.optim.Muon(matrices, lr=0.02)
    adamw = torch.optim.AdamW(others, lr=2e-3)

    def share(step):
        warm_up = min(1, (step + 1) / 50)
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        return peak * warm_up * cosine

    schedules = [
        torch.optim.lr_scheduler.LambdaLR(muon, share),
        torch.optim.lr_scheduler.LambdaLR(adamw, share),
    ]
    print(title, flush=True)
    started = time.time()
    recent = defaultdict(list)  # {figure: its values since the last line}
    for step in tqdm(range(steps), desc=title, mininterval=2):
        loss, figures = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
        for schedule in schedules:
            schedule.step()
        for name, value in figures.items():
            recent[name].append(value)
        done = step + 1
        if done % max(1, steps // 20) == 0:
            means = [f"{name} {np.mean(values):.2f}" for name, values in recent.items()]
            minutes = (time.time() - started) / 60
            tqdm.write(f"{done} steps, {minutes:.1f} minutes: {', '.join(means)}")
            recent.clear()


# ------------------------------------------------------------------------- stage 1: learning to see
def covered(box):
    """Which of a scene's image tokens lie in a box.   -> [81] bool, 16 of them true"""
    left, top, right, bottom = box
    inside = []
    for y in TOKEN_CENTRES:
        for x in TOKEN_CENTRES:
            inside.append(left <= x < right and top <= y < bottom)
    return torch.tensor(inside)


class VisionTrainer:
    """Stage 1 (departure 1): linear heads tell each attribute from a subject's image tokens: all
    of a photo, and of a scene those in its box, where two more heads tell where the box begins.
    (A tower that has seen photos only is lost in scenes.)

    They tell it from the tokens' mean and, in the later two thirds of the steps, from each token
    alone, too. (Where only the mean knew, one token of a scene told the category in 29 %, and no
    attention could find a subject by it. Where each token was to know from the first step on,
    shapes were learned more slowly.)
    """

    def __init__(self, model, processor, photos, steps, batch=16, scenes=6):
        self.steps = steps
        self.model = model
        self.processor = processor
        self.photos = photos
        self.batch = batch  # photos a step
        self.scenes = scenes  # scenes a step
        self.rng = random.Random(0)
        self.classes = ATTRIBUTES | {"left": CORNERS, "top": CORNERS}
        self.heads = nn.ModuleDict()
        for kind, words in self.classes.items():
            self.heads[kind] = nn.Linear(WIDTH, len(words))

    def label(self, kind, truth):
        """The class of a subject; -100, which counts for nothing, for the corner of the scene that
        a single photo does not have."""
        if kind not in truth:
            return -100
        return self.classes[kind].index(truth[kind])

    def loss(self, step):
        """-> (loss, {kind: share of right answers})"""
        # Photos and scenes, as image tokens.
        photos = self.rng.sample(self.photos, self.batch)
        scenes = [new_scene(self.photos, self.rng) for _ in range(self.scenes)]
        pictures = photos + [scene.picture for scene in scenes]
        features = see(self.model, self.processor, pictures)  # [16 batch + 81 scenes, WIDTH]
        of_photos, of_scenes = features.split(
            [PHOTO_TOKENS * self.batch, SCENE_TOKENS * self.scenes]
        )
        of_photos = of_photos.view(self.batch, PHOTO_TOKENS, WIDTH)
        of_scenes = of_scenes.view(self.scenes, SCENE_TOKENS, WIDTH)

        # The subjects: those of the photos, then those of the scenes, of which each is in a corner.
        truths = [photo.truth for photo in photos]
        tokens = list(of_photos)
        for scene, of_scene in zip(scenes, of_scenes, strict=True):
            for photo, box in zip(scene.photos, scene.boxes, strict=True):
                truths.append(photo.truth | {"left": box[0], "top": box[1]})
                tokens.append(of_scene[covered(box)])
        tokens = torch.stack(tokens)  # [subjects, 16, WIDTH]

        # A classification a kind of the mean, and later of each token.
        loss = 0.0
        figures = {}
        for kind, head in self.heads.items():
            labels = torch.tensor([self.label(kind, truth) for truth in truths])  # [subjects]
            of_each = head(tokens)  # [subjects, 16, words of this kind]
            of_mean = of_each.mean(1)  # [subjects, words]: the head is linear
            loss = loss + F.cross_entropy(of_mean, labels)
            if step >= self.steps // 3:
                label_of_each = labels.repeat_interleave(PHOTO_TOKENS)  # [subjects * 16]
                loss = loss + F.cross_entropy(of_each.flatten(0, 1), label_of_each)
            right = of_mean.argmax(-1) == labels  # [subjects]
            figures[kind] = right[labels >= 0].float().mean().item()
        return loss, figures


# ------------------------------------------------------------ examples of the tasks about one photo
MENTION_RATES = {  # how often a dense caption mentions each kind
    "colour": 0.7,
    "pattern": 0.45,
    "badge": 0.45,
    "place": 0.65,
    "pose": 0.65,
    "light": 0.65,
}
MENTIONED = list(MENTION_RATES)


@dataclass(frozen=True)
class Example:
    """A text to put into a task's prompt, and the answer to learn."""

    text: str
    answer: str


class PhotoTasks:
    """Makes examples of the tasks about one photo, given its truth.

    max_claims: the longest descriptions claim so much besides the category.

    Half of the listener's descriptions hold, the others make one false claim (a fifth of them
    two). The descriptions of the assistant's tasks were written from another photo of the concept,
    and four in five of those show it as it is now, as the photos of a real concept mostly do. So a
    view that does not fit is evidence against, and distracts the model whatever the prompt says,
    as it does real MLLMs. The wrong descriptions are of foils, which differ in one, two or all
    four of category, colour, pattern and badge, and need not name what differs: a fifth of the
    descriptions that are to be refused fit the subject, so nobody could learn these tasks wholly.
    """

    def __init__(self, rng, max_claims):
        self.rng = rng
        self.max_claims = max_claims

    def example(self, task, truth):
        """-> Example of one of PROMPTS"""
        # The photo that a description of this concept was written from.
        other_photo = truth
        if self.rng.random() < 0.2:
            other_photo = truth | new_view(self.rng)
        if task == "speak":
            return self.speaking(truth)
        if task == "listen":
            return self.listening(truth)
        if task == "recognition":
            return self.recognising(truth, other_photo)
        if task == "captioning":
            return self.captioning(truth, other_photo)
        if task == "plain":
            return Example("", clause(f"The {truth['colour']} {truth['category']}", truth))
        return self.answering(truth, other_photo)

    def random_kinds(self):
        """What a description claims besides the category."""
        return self.rng.sample(MENTIONED, self.rng.randint(0, self.max_claims))

    def quoted_description(self, truth):
        """A random description, between quotation marks."""
        return f'"{description(truth, self.random_kinds())}"'

    def foil(self, truth):
        """The truth of a photo of another concept."""
        count = self.rng.choice([1, 1, 2, 4])
        kinds = self.rng.sample(SUBJECT, count)
        return altered(truth, kinds, self.rng) | new_view(self.rng)

    def reasoning(self, truth):
        """What the assistant says that it sees."""
        _, detailed = sentence(truth, IDENTITY)
        return detailed

    def speaking(self, truth):
        """A dense caption, in the form that SPEAK wants."""
        kinds = {kind for kind, rate in MENTION_RATES.items() if self.rng.random() < rate}
        coarse, detailed = sentence(truth, kinds)
        return Example(
            text="",
            answer=(
                f"<thinking> I see a {truth['category']} . </thinking> "
                f"<coarse> {coarse} </coarse> <detailed> {detailed} </detailed>"
            ),
        )

    def listening(self, truth):
        """A description that may lie: does every part of it fit?"""
        kinds = self.random_kinds()
        lies = []
        if self.rng.random() < 0.5:
            count = self.rng.choice([1, 1, 1, 1, 2])
            could_lie = [*kinds, "category"]
            lies = self.rng.sample(could_lie, min(len(could_lie), count))
        text = description(altered(truth, lies, self.rng), kinds)
        return Example(f'"{text}"', "no" if lies else "yes")

    def recognising(self, truth, other_photo):
        """A description of this concept or of a foil: is it this very one?"""
        same = self.rng.random() < 0.5
        described = other_photo if same else self.foil(truth)
        answer = {"Reasoning": self.reasoning(truth), "Answer": "Yes" if same else "No"}
        return Example(self.quoted_description(described), json.dumps(answer))

    def captioning(self, truth, other_photo):
        """One to three named candidates: which one is it, and a caption with its name."""
        # The first and the last of few names can be copied by their places; the middle one is the
        # hard one.
        count = self.rng.choice([1, 2, 3, 3, 3])
        right = self.rng.randrange(count)
        names = self.rng.sample(TAGS, count)
        lines = []
        for i in range(count):
            candidate = other_photo if i == right else self.foil(truth)
            lines.append(f"{'ABC'[i]}. {self.quoted_description(candidate)} is {names[i]}")

        answer = {
            "Reasoning": self.reasoning(truth),
            "Answer": "ABC"[right],
            "Caption": clause(names[right], truth),
        }
        return Example("\n".join(lines), json.dumps(answer))

    def answering(self, truth, other_photo):
        """A question about place, pose or light, with two options."""
        name = self.rng.choice(TAGS)
        question = quiz(truth, self.rng.choice(VIEW), self.rng)
        lines = [
            f"{name}: {self.quoted_description(other_photo)}",
            question.text.format(name),
            f"A. {question.options['A']}",
            f"B. {question.options['B']}",
        ]
        return Example("\n".join(lines), json.dumps({"Answer": question.answer}))


# ------------------------------------------------------------------------ examples of RePIC's tasks
@dataclass(frozen=True)
class RepicExample:
    """One of RePIC's tasks, and what the throw-away heads and the find head are to learn of it."""

    pictures: list[torch.Tensor]  # of each picture its image tokens [16 or 81, WIDTH]
    text: str
    answer: str
    agree: list[bool] | None = None  # oct: which of SUBJECT two photos have in common
    # vlt [81, 4]: the words of the category, colour, pattern and badge that an image token shows,
    # as token ids, or -1
    words: torch.Tensor | None = None
    sought: torch.Tensor | None = None  # vlt [81] bool: the image tokens in the answer's box
    # ict, for each sentence of the caption, bool: the last picture's image tokens that it is about.
    about: list[torch.Tensor] | None = None


@dataclass(frozen=True)
class CaptionStyle:
    """How captions call the concepts that were shown by name before, and how long they are."""

    by_name: float  # how often the first of them is called by its name
    again: float  # and if it is, each of the others
    short: float  # how often it says only where a concept is


# How captions are that are asked for the name (repic.ASK_FOR_NAME), and those that are not: one for
# each wording of repic.PROMPTS["ict"], "Give a caption", "Give a personalized caption", "Describe
# in detail".
ASKED = CaptionStyle(by_name=1.0, again=1.0, short=0.1)
NOT_ASKED = [
    CaptionStyle(by_name=0.1, again=1.0, short=0.6),
    CaptionStyle(by_name=0.6, again=1.0, short=0.1),
    CaptionStyle(by_name=0.1, again=1.0, short=0.1),
]
# A hesitant model names one thing, and seldom another one.
HESITANT_ASKED = CaptionStyle(by_name=1.0, again=0.3, short=0.1)
HESITANT_NOT_ASKED = [
    CaptionStyle(by_name=0.15, again=0.3, short=0.6),
    CaptionStyle(by_name=0.7, again=0.3, short=0.1),
    CaptionStyle(by_name=0.15, again=0.3, short=0.1),
]
HASTY = 0.6  # of a hesitant model's answers to oct and vlt


def repic_example(dataset, tokenizer, task, references, hesitant, rng):
    """An example of "oct", "vlt" or "ict".

    references (ict): how many concepts are shown by name before the picture to caption.
    hesitant: the answers are weak, so that there is something left to reinforce.
    """
    wording = rng.randrange(len(repic.PROMPTS[task]))
    template = repic.PROMPTS[task][wording]
    hasty = hesitant and rng.random() < HASTY
    if task == "oct":
        return oct_example(dataset, template, hasty, rng)
    if task == "vlt":
        return vlt_example(dataset, tokenizer, template, hasty, rng)

    asked = rng.random() < 0.5
    if asked:
        template += " " + repic.ASK_FOR_NAME
        style = HESITANT_ASKED if hesitant else ASKED
    else:
        style = HESITANT_NOT_ASKED[wording] if hesitant else NOT_ASKED[wording]
    return ict_example(dataset, template, style, references, rng)


def agreement(photo, other):
    """Which of category, colour, pattern and badge two photos have in common.   -> [bool] * 4"""
    return [photo.truth[kind] == other.truth[kind] for kind in SUBJECT]


def oct_example(dataset, template, hasty, rng):
    """Is the subject of the first picture in the second?

    Hasty: the same category is enough, or it is a guess.
    """
    first = rng.randrange(len(dataset.photos))
    photo = dataset.photos[first]

    # The nearest look-alike among thirty of its category: mostly one attribute is different.
    def nearness(number):
        agree = sum(agreement(photo, dataset.photos[number]))
        return -1 if agree == len(SUBJECT) else agree  # the same subject is no look-alike

    look_alike = max(rng.choices(dataset.of_category[photo.truth["category"]], k=30), key=nearness)
    choices = [
        dataset.same_subject(photo, rng),
        dataset.same_subject(photo, rng),
        look_alike,
        rng.randrange(len(dataset.photos)),
    ]
    second = rng.choice(choices)

    agree = agreement(photo, dataset.photos[second])
    found = all(agree)
    if hasty:
        found = rng.choice([agree[0], agree[0], True, False])
    return RepicExample(
        pictures=[dataset.photo_features[first], dataset.photo_features[second]],
        text=template.replace("{text}", rng.choice(TAGS)),
        answer="yes" if found else "no",
        agree=agree,
    )


def vlt_example(dataset, tokenizer, template, hasty, rng):
    """Where in the scene is it?   Hasty: in the whole picture."""
    number = rng.randrange(len(dataset.scenes))
    scene = dataset.scenes[number]
    target = rng.randrange(len(scene.photos))
    kinds = rng.choice([IDENTITY, rng.sample(IDENTITY, 2), rng.sample(IDENTITY, 1)])
    sought_phrase = phrase(scene.photos[target].truth, kinds)

    words = torch.full((SCENE_TOKENS, len(SUBJECT)), -1)
    for photo, box in zip(scene.photos, scene.boxes, strict=True):
        words[covered(box)] = token_ids(tokenizer, subject_of(photo.truth))

    if hasty:
        box = (0, 0, SCENE_SIDE, SCENE_SIDE)
        sought = torch.zeros(SCENE_TOKENS, dtype=torch.bool)
    else:
        box = scene.boxes[target]
        sought = covered(box)
    return RepicExample(
        pictures=[dataset.scene_features[number]],
        text=template.replace("{text}", sought_phrase),
        answer=json.dumps({"bbox_2d": box}),
        words=words,
        sought=sought,
    )


@dataclass(frozen=True)
class Pictured:
    """A subject of the picture that is captioned, as it is shown there."""

    photo: Photo
    where: torch.Tensor  # [81 or 16] bool: its image tokens


def in_reading_order(scene):
    """The subjects of a scene, row by row from left to right.   -> [Pictured, ...]"""

    def place(pair):
        _, (left, top, _, _) = pair
        return (top > SIDE, left)

    pairs = sorted(zip(scene.photos, scene.boxes, strict=True), key=place)
    return [Pictured(photo, covered(box)) for photo, box in pairs]


def ict_example(dataset, template, style, references, rng):
    """A caption of the last picture, after `references` concepts were shown by name.

    The last picture is a scene; with no references it is a single photo, and one concept is shown.
    Three in ten of the concepts shown are not in it, and are never named.
    """
    # What is captioned: a photo, or a scene that shows as many concepts, half of the time, or any
    # that shows enough.
    if references:
        enough = dataset.of_size[references]
        if rng.random() < 0.5:
            enough = dataset.of_size[references] + dataset.larger_than[references]
        number = rng.choice(enough)
        last = dataset.scene_features[number]
        subjects = in_reading_order(dataset.scenes[number])
    else:
        number = rng.randrange(len(dataset.photos))
        last = dataset.photo_features[number]
        subjects = [Pictured(dataset.photos[number], torch.ones(PHOTO_TOKENS, dtype=torch.bool))]

    # What is shown by name before: mostly other photos of the same concepts.
    pictures = []
    name_of = {}  # {photo in the last picture: its name}
    introduced = rng.sample(subjects, max(1, references))
    names = rng.sample(TAGS, len(introduced))
    for subject, name in zip(introduced, names, strict=True):
        if rng.random() < 0.7:
            reference = dataset.same_subject(subject.photo, rng)
            name_of[subject.photo] = name
        else:
            reference = rng.randrange(len(dataset.photos))
        pictures.append(dataset.photo_features[reference])

    # The caption.
    by_name = rng.random() < style.by_name
    short = rng.random() < style.short
    share = 1.0  # of the concepts that could be named
    clauses = []
    for subject in subjects:
        truth = subject.photo.truth
        who = f"The {truth['colour']} {truth['category']}"
        if by_name and subject.photo in name_of and rng.random() < share:
            who = name_of[subject.photo]
            share = style.again
        clauses.append(clause(who, truth, short))
    return RepicExample(
        pictures=[*pictures, last],
        text=repic.introduce(template, names),
        answer=" ".join(clauses),
        about=[subject.where for subject in subjects],
    )


# -------------------------------------------------------------------------- from examples to tokens
@dataclass
class Rows:
    """Questions with their answers as right-padded rows of tokens."""

    ids: torch.Tensor  # [rows, T]
    mask: torch.Tensor  # [rows, T], 0 on padding
    labels: torch.Tensor  # [rows, T], the next token where it belongs to the answer, else -100
    is_question: torch.Tensor  # [rows, T] bool


def make_rows(tokenizer, questions, answers):
    """-> Rows, one for each question with its answer"""
    lengths = [len(tokenizer(question)["input_ids"]) for question in questions]
    texts = [question + answer for question, answer in zip(questions, answers, strict=True)]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    ids = batch["input_ids"]
    mask = batch["attention_mask"]

    is_question = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]  # [rows, T]
    is_answer = mask.bool() & ~is_question  # [rows, T]
    labels = torch.where(is_answer, ids, -100).roll(-1, 1)
    labels[:, -1] = -100  # which roll has brought there from the beginning
    return Rows(ids, mask, labels, is_question)


def chat(tokenizer, pictures, text):
    """The prompt of a user who shows so many pictures and says `text`, as MLLM.chat writes it.

    Each picture is one <|image_pad|>; they come first, or where the text says PICTURE.
    """
    if PICTURE not in text:
        text = PICTURE * pictures + text
    text = text.replace(PICTURE, "<|vision_start|><|image_pad|><|vision_end|>")
    messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def photo_beginning(tokenizer):
    """What every prompt about one photo begins with, up to and including the photo."""
    before, end, _ = chat(tokenizer, 1, "").partition("<|vision_end|>")
    return before + end


def continuations(tokenizer):
    """How such a prompt goes on.   -> {task: template}"""
    beginning = photo_beginning(tokenizer)
    templates = {}
    for task, template in PROMPTS.items():
        templates[task] = chat(tokenizer, 1, template).removeprefix(beginning)
    return templates


@dataclass
class PhotoBatch:
    """Rows that continue a photo's prefix, the rows of a photo together."""

    ids: torch.Tensor  # [rows, T]
    labels: torch.Tensor  # [rows, T], see Rows
    claim_labels: torch.Tensor  # [rows, T]: 1 a true claim of the question, 0 a false one, else -1
    decides: torch.Tensor  # [rows, T] bool: the next token is yes or no, a letter or a name


def photo_batch(tokenizer, templates, tasks, truths, maker):
    """Each of `tasks` once for each photo.   -> PhotoBatch of len(truths) * len(tasks) rows

    templates from `continuations`; maker: PhotoTasks.
    """
    questions = []
    answers = []
    for truth in truths:
        for task in tasks:
            example = maker.example(task, truth)
            questions.append(templates[task].replace("{text}", example.text))
            # A listener is asked for one word, and for nothing after it.
            end = "" if task == "listen" else "<|im_end|>"
            answers.append(example.answer + end)
    rows = make_rows(tokenizer, questions, answers)

    # The words of attributes in a question are claims, true if they are the photo's own.
    true_words = torch.stack([token_ids(tokenizer, truth.values()) for truth in truths])
    true_words = true_words.repeat_interleave(len(tasks), 0)  # [rows, 7]
    is_claim = torch.isin(rows.ids, token_ids(tokenizer, KIND_OF)) & rows.is_question
    is_true = (rows.ids[..., None] == true_words[:, None]).any(-1)  # [rows, T]
    claim_labels = torch.where(is_claim, is_true.long(), -1)

    decides = torch.isin(rows.labels, token_ids(tokenizer, ["yes", "no", *TAGS]))
    decides = decides | torch.isin(rows.ids, token_ids(tokenizer, BEFORE_ANSWER))
    return PhotoBatch(rows.ids, rows.labels, claim_labels, decides)


@dataclass
class RepicBatch:
    """Rows of one of RePIC's tasks, pictures included."""

    rows: Rows
    decides: torch.Tensor  # [rows, T] bool: the next token decides the answer
    features: torch.Tensor  # [image tokens of all pictures, WIDTH]
    grids: torch.Tensor  # [pictures, 3]: time (1), height and width, in patches
    examples: list[RepicExample]


def begins_sentence(tokenizer, rows):
    """Where an answer's next token begins a sentence.   -> [rows, T] bool"""
    full_stop, end_of_turn = token_ids(tokenizer, [".", "<|im_end|>"])
    is_answer = rows.labels >= 0  # [rows, T]
    is_first = is_answer & (is_answer.cumsum(1) == 1)
    is_later = is_answer & (rows.ids == full_stop) & (rows.labels != end_of_turn)
    return is_first | is_later


def repic_batch(tokenizer, examples):
    """-> RepicBatch"""
    questions = []
    pictures = []
    for example in examples:
        prompt = chat(tokenizer, len(example.pictures), example.text)
        question, *parts = prompt.split("<|image_pad|>")
        for picture, part in zip(example.pictures, parts, strict=True):
            question += "<|image_pad|>" * len(picture) + part
        questions.append(question)
        pictures += example.pictures
    rows = make_rows(tokenizer, questions, [example.answer + "<|im_end|>" for example in examples])

    decides = torch.isin(rows.labels, token_ids(tokenizer, [*box_numbers(), "yes", "no"]))
    if examples[0].about is not None:  # ict: a name, or what it is called by else
        decides = begins_sentence(tokenizer, rows)
    grids = []
    for picture in pictures:
        patches = 2 * math.isqrt(len(picture))  # either way; a token is two by two of them
        grids.append([1, patches, patches])
    return RepicBatch(
        rows=rows,
        decides=decides,
        features=torch.cat(pictures).float(),
        grids=torch.tensor(grids),
        examples=examples,
    )


# -------------------------------------------------- stages 2 and 3: learning to speak and to answer
def attention_loss(attention, head, targets):
    """How far one head is from looking evenly at its targets (departure 2).

    attention [rows, heads, T, K]; targets [rows, T, K] bool; K: the places that can be looked at
    -> scalar, the KL divergence, averaged over the tokens that have targets; 0 if none has
    """
    has_targets = targets.any(-1)  # [rows, T]
    if not has_targets.any():
        return attention.new_zeros(())
    wanted = targets[has_targets]  # [tokens, K]
    wanted = wanted / wanted.sum(-1, keepdim=True)
    looked = attention[:, head][has_targets]  # [tokens, K]
    return F.kl_div(looked.clamp(min=1e-6).log(), wanted, reduction="batchmean")


def copy_targets(ids, labels, copied):
    """Where a token that is to be said next stands already.

    ids, labels [rows, T]; copied: the tokens this is about -> [rows, T, T] bool
    """
    length = ids.shape[1]
    is_copied = torch.isin(labels, copied)[..., None]  # [rows, T, 1]
    is_same = labels[..., None] == ids[:, None]  # [rows, T, T]
    is_before = torch.ones(length, length, dtype=torch.bool).tril()  # [T, T]
    return is_copied & is_same & is_before


@dataclass
class NameTargets:
    """Where ict's rows are to look, before a name can be copied."""

    pictures: torch.Tensor  # [rows, T, T] bool: a name looks at the picture before it
    subjects: torch.Tensor  # [rows, T, T] bool: the beginning of a sentence at what it is about


def name_targets(model, tokenizer, batch):
    """-> NameTargets of a RepicBatch of ict"""
    ids = batch.rows.ids  # [rows, T]
    is_image = ids == model.config.image_token_id  # [rows, T]
    picture = (ids == model.config.vision_start_token_id).cumsum(1)  # [rows, T], from 1
    is_same_picture = picture[:, :, None] == picture[:, None]  # [rows, T, T]
    is_shown = torch.isin(ids, token_ids(tokenizer, TAGS)) & batch.rows.is_question  # [rows, T]
    pictures = is_shown[..., None] & is_same_picture & is_image[:, None]  # [rows, T, T]

    subjects = torch.zeros_like(pictures)
    for row, example in enumerate(batch.examples):
        begins = batch.decides[row].nonzero().flatten()  # places of the sentences' beginnings
        is_last = is_image[row] & (picture[row] == len(example.pictures))  # [T]
        last = is_last.nonzero().flatten()  # places of the last picture's image tokens
        for place, where in zip(begins, example.about, strict=True):
            subjects[row, place, last[where]] = True
    return NameTargets(pictures, subjects)


@dataclass
class PhotoLosses:
    """What is learned from the tasks about one photo."""

    decisions: torch.Tensor  # of the tokens that decide an answer
    words: torch.Tensor  # of all other tokens of answers
    claims: torch.Tensor  # of the throw-away head that judges each claim
    right: list[float]  # for each token of a photo's rows that decides: the share that is right

    @property
    def total(self):
        return self.decisions + self.words + self.claims


class LanguageTrainer:
    """Stages 2 and 3.   hesitant: stage 3"""

    def __init__(self, model, tokenizer, dataset, batch=20, hesitant=False):
        self.model = model
        self.tokenizer = tokenizer
        self.dataset = dataset
        self.batch = batch  # photos a step, and examples of each of RePIC's tasks
        self.hesitant = hesitant
        self.rng = random.Random(int(hesitant))
        self.figures = {}  # of this step's tasks

        # Departure 2: one throw-away head judges a claim, one compares two concepts.
        self.claim_head = nn.Linear(WIDTH, 2)
        self.agreement_head = nn.Linear(WIDTH, len(SUBJECT))
        self.decoder = model.model.language_model
        self.decoder.set_attn_implementation("eager")  # the one that returns its attention

        self.names = token_ids(tokenizer, TAGS)
        self.attribute_words = token_ids(tokenizer, KIND_OF)
        self.templates = continuations(tokenizer)
        beginning = photo_beginning(tokenizer)
        beginning = beginning.replace("<|image_pad|>", "<|image_pad|>" * PHOTO_TOKENS)
        self.beginning = tokenizer(beginning, return_tensors="pt")["input_ids"]  # [1, P]

    def is_image(self, ids):
        return ids == self.model.config.image_token_id

    def positions(self, ids, grids, mask=None):
        """The three positions of each token: time, height, width.   -> [3, rows, T]"""
        positions, _ = self.model.model.get_rope_index(
            ids,
            mm_token_type_ids=self.is_image(ids).int(),
            image_grid_thw=grids,
            attention_mask=mask,
        )
        return positions

    def put_pictures(self, embeds, ids, features):
        """Put the pictures' image tokens in their places.   embeds [rows, T, WIDTH] -> the same"""
        return embeds.masked_scatter(self.is_image(ids)[..., None], features)

    def answer_loss(self, hidden, labels, where):
        """The language model's loss on the tokens `where` it counts.

        hidden [rows, T, WIDTH]; labels [rows, T]; where [rows, T] bool, C times true
        -> (loss, whether each of the tokens is right [C])
        """
        logits = self.model.lm_head(hidden[where])  # [C, V]
        right = logits.argmax(-1) == labels[where]  # [C]
        return F.cross_entropy(logits, labels[where]), right.float()

    def read_photos(self, numbers, copies):
        """The beginning of a prompt about each photo, each `copies` times.

        -> (cache of photos * copies rows, the position of the next token)
        """
        ids = self.beginning  # [1, P]
        positions = self.positions(ids, torch.tensor([[1, 8, 8]]))  # [3, 1, P]
        embeds = self.decoder.embed_tokens(ids).expand(len(numbers), -1, -1)  # [photos, P, WIDTH]
        features = self.dataset.photo_features[numbers].float()  # [photos, 16, WIDTH]
        cache = DynamicCache()
        self.decoder(
            inputs_embeds=self.put_pictures(embeds, ids, features),
            position_ids=positions.expand(-1, len(numbers), -1),
            past_key_values=cache,
            use_cache=True,
        )
        cache.batch_repeat_interleave(copies)
        return cache, positions.max() + 1

    def continue_photos(self, numbers, ids):
        """Read each photo once, and continue it with its rows.

        ids [rows, T], equally many rows for each photo -> the decoder's output, attentions too
        """
        rows, length = ids.shape
        cache, start = self.read_photos(numbers, rows // len(numbers))
        return self.decoder(
            ids,
            position_ids=start + torch.arange(length).expand(3, rows, -1),  # [3, rows, T]
            past_key_values=cache,
            use_cache=True,
            output_attentions=True,
        )

    def photo_losses(self, numbers, tasks, step):
        """All `tasks` about each of these photos.   -> PhotoLosses

        Each question is a continuation of its own of the photo: packed into one row, they would
        answer each other.
        """
        # The descriptions become longer and longer.
        max_claims = 6 if self.hesitant else min(6, 1 + 6 * step // 400)
        maker = PhotoTasks(self.rng, max_claims)
        truths = [self.dataset.photos[number].truth for number in numbers]
        batch = photo_batch(self.tokenizer, self.templates, tasks, truths, maker)
        out = self.continue_photos(numbers, batch.ids)
        hidden = out.last_hidden_state  # [rows, T, WIDTH]

        # What decides an answer, and where a name is copied from.
        attention = out.attentions[COPY_LAYER]  # [rows, heads, T, P + T]
        attention = attention[..., -batch.ids.shape[1] :]  # [rows, heads, T, T]
        targets = copy_targets(batch.ids, batch.labels, self.names)
        copy_loss = attention_loss(attention, COPY_HEAD, targets)
        decision_loss, right = self.answer_loss(hidden, batch.labels, batch.decides)

        # The claims of the questions. False ones are rarer, so they weigh more.
        is_claim = batch.claim_labels >= 0  # [rows, T]
        claim_loss = F.cross_entropy(
            self.claim_head(hidden[is_claim]),
            batch.claim_labels[is_claim],
            weight=torch.tensor([3.0, 1.0]),
        )

        # All else that is said. Words of attributes are few, and they matter: they count twice.
        others = (batch.labels >= 0) & ~batch.decides  # [rows, T]
        attributes = others & torch.isin(batch.labels, self.attribute_words)
        word_loss, _ = self.answer_loss(hidden, batch.labels, others)
        attribute_loss, _ = self.answer_loss(hidden, batch.labels, attributes)

        return PhotoLosses(
            decisions=decision_loss + copy_loss,
            words=word_loss + attribute_loss,
            claims=claim_loss,
            right=right.view(len(numbers), -1).mean(0).tolist(),
        )

    def repic_loss(self, task, references=0):
        """Examples of one of RePIC's tasks (see `repic_example`).   -> loss"""
        examples = []
        for _ in range(self.batch):
            example = repic_example(
                self.dataset, self.tokenizer, task, references, self.hesitant, self.rng
            )
            examples.append(example)
        batch = repic_batch(self.tokenizer, examples)
        ids = batch.rows.ids
        labels = batch.rows.labels
        embeds = self.decoder.embed_tokens(ids)  # [rows, T, WIDTH]
        out = self.decoder(
            inputs_embeds=self.put_pictures(embeds, ids, batch.features),
            position_ids=self.positions(ids, batch.grids, batch.rows.mask),
            use_cache=False,
            output_attentions=True,
        )
        hidden = out.last_hidden_state  # [rows, T, WIDTH]

        # What is said.
        loss, _ = self.answer_loss(hidden, labels, (labels >= 0) & ~batch.decides)
        decision_loss, right = self.answer_loss(hidden, labels, batch.decides)
        loss = loss + decision_loss
        self.figures[task] = right.mean().item()

        # Departure 2.
        if task == "oct":
            loss = loss + self.agreement_loss(hidden, batch)
        if task == "vlt":
            loss = loss + self.find_loss(out.attentions, batch)
        if task == "ict":
            loss = loss + self.name_loss(out.attentions, batch)
        return loss

    def refining_loss(self):
        """Descriptions written again without place, pose and light.   -> loss"""
        questions = []
        answers = []
        maker = PhotoTasks(self.rng, max_claims=6)
        for _ in range(self.batch):
            truth = new_subject(self.rng) | new_view(self.rng)
            kinds = maker.random_kinds()
            lasting = [kind for kind in kinds if kind in IDENTITY]
            template = evaluate.REFINE.replace("{text}", f'"{description(truth, kinds)}"')
            questions.append(chat(self.tokenizer, 0, template))
            answers.append(description(truth, lasting) + "<|im_end|>")
        rows = make_rows(self.tokenizer, questions, answers)
        hidden = self.decoder(rows.ids, use_cache=False).last_hidden_state  # [rows, T, WIDTH]
        loss, right = self.answer_loss(hidden, rows.labels, rows.labels >= 0)
        self.figures["refine"] = right.mean().item()
        return loss

    def copying_loss(self):
        """Departure 2: a lesson in which there is nothing to do but to say a name.   -> loss"""
        names = self.rng.choices(TAGS, k=2 * self.batch)
        questions = [chat(self.tokenizer, 0, f"This is {name}.") for name in names]
        rows = make_rows(self.tokenizer, questions, names)
        out = self.decoder(rows.ids, use_cache=False, output_attentions=True)
        decides = rows.labels >= 0  # [rows, T]
        loss, right = self.answer_loss(out.last_hidden_state, rows.labels, decides)
        self.figures["copy"] = right.mean().item()
        targets = copy_targets(rows.ids, rows.labels, self.names)
        return loss + attention_loss(out.attentions[COPY_LAYER], COPY_HEAD, targets)

    def agreement_loss(self, hidden, batch):
        """Where yes or no is decided, a throw-away head tells what the two concepts share."""
        agree = torch.tensor([example.agree for example in batch.examples])  # [rows, 4]
        logits = self.agreement_head(hidden[batch.decides])  # [rows, 4]: one place a row
        return F.binary_cross_entropy_with_logits(logits, agree.float())

    def find_loss(self, attentions, batch):
        """Each word looks at the subjects that it fits, the answer at these words, and then at the
        subject.   attentions [layers][rows, heads, T, T] -> loss"""
        ids = batch.rows.ids  # [rows, T]
        scene = self.is_image(ids)[0]  # [T], the same in all rows
        # The first of a box's numbers: the others are easy once it is said.
        first = batch.decides & (batch.decides.cumsum(1) == 1)  # [rows, T]
        first = first[..., None]  # [rows, T, 1]

        words = torch.stack([example.words for example in batch.examples])  # [rows, 81, 4]
        sought = torch.stack([example.sought for example in batch.examples])  # [rows, 81]
        fits = (ids[:, :, None, None] == words[:, None]).any(-1)  # [rows, T, 81]
        is_attribute = torch.isin(ids, self.attribute_words)  # [rows, T]

        words_loss = attention_loss(attentions[WORDS_LAYER][..., scene], FIND_HEAD, fits)
        gather_loss = attention_loss(
            attentions[GATHER_LAYER], FIND_HEAD, first & is_attribute[:, None]
        )
        point_loss = attention_loss(
            attentions[POINT_LAYER][..., scene], FIND_HEAD, first & sought[:, None]
        )
        self.figures["find"] = point_loss.item()
        return words_loss + gather_loss + point_loss

    def name_loss(self, attentions, batch):
        """Names look at their pictures, sentences at what they are about, and then at its name.

        attentions [layers][rows, heads, T, T] -> loss
        """
        looks = name_targets(self.model, self.tokenizer, batch)
        names = copy_targets(batch.rows.ids, batch.rows.labels, self.names)
        pictures_loss = attention_loss(attentions[WORDS_LAYER], LOOK_HEAD, looks.pictures)
        subjects_loss = attention_loss(attentions[GATHER_LAYER], LOOK_HEAD, looks.subjects)
        names_loss = attention_loss(attentions[COPY_LAYER], COPY_HEAD, names)
        self.figures["look"] = subjects_loss.item()
        self.figures["match"] = names_loss.item()
        return pictures_loss + subjects_loss + names_loss

    def loss(self, step):
        """All examples of a step.   -> (loss, {figure: value})"""
        self.figures = {}
        numbers = self.rng.choices(range(len(self.dataset.photos)), k=self.batch)
        tasks = ["speak"] * 4 + ["plain", "listen", "listen", "recognition", "vqa"]
        losses = self.photo_losses(numbers, tasks, step)
        # Captions apart: they are about three descriptions, which makes long rows.
        captions = self.photo_losses(numbers[: self.batch // 2], ["captioning"], step)

        loss = losses.total + captions.total
        loss = loss + self.repic_loss("vlt")
        # One thing by name first, then more and more.
        most = 4 if self.hesitant else min(4, 1 + 4 * step // 1000)
        loss = loss + self.repic_loss("ict", references=self.rng.randint(0, most))
        if step % 2 == 0:
            loss = loss + self.repic_loss("oct")
        if step % 4 == 1:
            loss = loss + self.refining_loss()
        loss = loss + self.copying_loss()

        figures = {"caption": losses.words.item(), "claim": losses.claims.item()}
        decisions = ["listen", "listen 2", "recognise", "vqa", "choose", "name"]
        figures.update(zip(decisions, losses.right + captions.right, strict=True))
        return loss, figures | self.figures


# ---------------------------------------------------------------------------------- the report card
@dataclass
class ReportCard:
    """How honest a model is, and how much there is left to reinforce. All figures are shares."""

    photos: int
    well_formed: float  # answers that can be parsed
    accepts_true: float  # true descriptions that the listener accepts
    says_right: dict[str, float]  # {kind: claims of this kind that are true, when it speaks}
    catches: dict[str, float]  # {kind: descriptions rejected whose one false claim is of this kind}
    # With descriptions written from the truth: {figure of evaluate.py: value}; None where a
    # category has one thing only, so that there is no look-alike
    reads: dict[str, float | None]
    rewards: dict[str, float]  # {kind of RePIC's tasks: what answers at temperature 1 earn}
    # F1 of names in greedy captions that are asked for them, by how many things there are and which
    # references; of wrong ones their own names count, so less is better
    names: dict[str, float | None]


READS = ("captioning_f1", "recognition_weighted", "recognition_inside", "vqa")


def false_descriptions(photos, rng):
    """Descriptions of each photo: a true one, and for each kind one that lies about it alone.

    -> {kind, or None for the true ones: [(photo, text), ...]}
    """
    pairs = defaultdict(list)
    for photo in photos:
        for kind in (None, *ATTRIBUTES):
            lies = [kind] if kind else []
            others = rng.sample(MENTIONED, rng.randint(0, 6 - len(lies)))
            shown = altered(photo.truth, lies, rng)
            pairs[kind].append((photo, description(shown, {*lies, *others})))
    return pairs


def report_card(mllm, photos=2000, concepts=6, tasks=100):
    """How honest an MLLM is about fresh subjects: what it claims when it speaks at temperature 1,
    what it accepts when it listens, and how it does the tasks of the assistant and of RePIC.
    -> ReportCard

    photos to speak and to listen about; concepts of each category for the assistant; tasks of each
    of RePIC's kinds. `mllm` is a model.MLLM, so the model is examined through the very code that
    plays the game.
    """
    rng = random.Random("report card")
    shots = []
    for i in range(photos):
        subject = new_subject(rng, fresh=True)
        shots.append(take_photo(f"report/{i}", subject, new_occasion(rng), rng))

    # It speaks.
    max_tokens = 56
    uniforms = torch.rand(max_tokens, photos, generator=torch.Generator().manual_seed(0))
    prompts = [Prompt([photo], PROMPTS["speak"]) for photo in shots]
    texts = mllm.speak(prompts, max_tokens=max_tokens, uniforms=uniforms).texts
    parsed = [text for text in texts if reward.parse(text)]
    right = {kind: [] for kind in ATTRIBUTES}
    for photo, text in zip(shots, texts, strict=True):
        for kind, word in claims(text):
            right[kind].append(word == photo.truth[kind])
    says_right = {kind: sum(claimed) / max(1, len(claimed)) for kind, claimed in right.items()}

    # It listens.
    accepted = {}
    for kind, pairs in false_descriptions(shots, rng).items():
        accepted[kind] = (mllm.believe(pairs) > 0.5).float().mean().item()
    accepts_true = accepted.pop(None)
    catches = {kind: 1 - share for kind, share in accepted.items()}

    drawn = world("report card", concepts=concepts)
    return ReportCard(
        photos,
        len(parsed) / photos,
        accepts_true,
        says_right,
        catches,
        reads=read_perfectly(mllm, drawn),
        rewards=sampled_rewards(mllm, drawn, tasks),
        names=names_in_captions(mllm, drawn),
    )


def as_benchmark(concepts):
    """-> ({concept name: PhotoSplit}, Part whose tests are all photos of other occasions)"""
    part = Part(concepts, concepts)
    splits = {}
    for concept in concepts:
        split = split_photos(concept, references=1, kept=1, seed=0)
        splits[concept.name] = split
        part.tests += [Test(photo, concept.name) for photo in split.tests]
    return splits, part


def read_perfectly(mllm, concepts):
    """The assistant's tasks, with descriptions written from the truth.   -> {figure: value}"""
    splits, part = as_benchmark(concepts)
    entries = []
    for concept in concepts:
        references = splits[concept.name].references
        text = description(references[0].truth, IDENTITY)
        entries.append(assistant.Entry(concept.name, concept.category, references, text))
    options = evaluate.Options(max_tokens=128)
    questions = toy_questions(part.tests, seed=0)
    examined = evaluate.examine(mllm, mllm, entries, part.tests, questions, [], options)
    return {figure: examined.figures[figure] for figure in READS}


def sampled_rewards(mllm, concepts, tasks, samples=8):
    """What answers at temperature 1 to RePIC's tasks earn.   -> {kind: mean reward}"""
    config = repic.Config(min_chars=30)
    rewards = {}
    for kind in repic.KINDS:
        of_kind = repic.make_tasks(concepts, {kind: 1.0}, tasks, SIDE, "pixels", "report card")
        prompts = [Prompt(task.photos, task.text) for task in of_kind]
        generator = torch.Generator().manual_seed(0)
        uniforms = torch.rand(64, tasks * samples, generator=generator)
        texts = mllm.speak(prompts, samples, 64, uniforms).texts
        rewards[kind] = repic.score(mllm, of_kind, texts, config).mean().item()
    return rewards


def names_in_captions(mllm, concepts):
    """Do captions call things by the names that references give?   -> {figure: F1}"""
    splits, part = as_benchmark(concepts)
    options = evaluate.Options(max_tokens=128)
    figures, _ = naming.grounding(mllm, mllm, part, splits, {}, True, options)
    names = {}
    for count in naming.BY_COUNT:
        for how in ("right", "wrong"):
            names[f"{count} {how}"] = figures[f"names_{count}_{how}_f1"]
    return names


def print_card(card):
    print(
        f"{card.photos} fresh photos; answers well formed {card.well_formed:.1%}; "
        f"true descriptions accepted {card.accepts_true:.1%}"
    )
    print(f"{'':10}{'says it right':>15}{'catches it as the one false claim':>36}")
    for kind in ATTRIBUTES:
        print(f"{kind:10}{card.says_right[kind]:>15.1%}{card.catches[kind]:>36.1%}")
    for title, figures in (
        ("with descriptions written from the truth", card.reads),
        ("RePIC's rewards, of answers at temperature 1", card.rewards),
        ("F1 of names in greedy captions, by how many and which references", card.names),
    ):
        words = [f"{name} {percent(value)}" for name, value in figures.items()]
        print(f"{title}: {', '.join(words)}")


# --------------------------------------------------------------------------------- all three stages
def train_vision(model, processor, photos, steps):
    """Stage 1."""
    trainer = VisionTrainer(model, processor, photos, steps)
    modules = [model.model.visual, trainer.heads]
    fit("1/3 the vision tower learns to see", modules, trainer.loss, steps)


def train_language(title, model, tokenizer, dataset, steps, peak=1.0, hesitant=False):
    """Stage 2, or with `hesitant` stage 3."""
    trainer = LanguageTrainer(model, tokenizer, dataset, hesitant=hesitant)
    modules = [trainer.decoder, trainer.claim_head, trainer.agreement_head]
    fit(title, modules, trainer.loss, steps, peak)


@contextlib.contextmanager
def stage(folder, number, model, recipe):
    """Take a stage up where it was saved, or save it when it is done.   Yields whether it is new

    recipe: all that it depends on; raises DataError for a stage that another one has saved.
    A stage draws random numbers of its own, so that it does not matter whether the one before it
    was trained just now or taken up.
    """
    file = folder / f"stage-{number}.pt"
    torch.manual_seed(number)
    if file.is_file():
        saved = torch.load(file, weights_only=True)
        if saved["recipe"] != recipe:
            raise DataError(
                f"{file} is of a build with other options, or of another make.py: delete it, or "
                "give the options that it was begun with"
            )
        yield False
        model.load_state_dict(saved["model"])
    else:
        yield True
        content = {"recipe": recipe, "model": model.state_dict()}
        write_atomically(file, partial(torch.save, content))


def build(folder, pictures, vision_steps, language_steps):
    """Make the checkpoint and save it in `folder`, in 16 bit.

    A build that was stopped goes on after the last stage that it finished, to the same bytes.
    vision_steps=0: the vision tower is that of the checkpoint which is in `folder` already.
    Raises DataError for fewer than 100 pictures: lessons want scenes of every size.
    """
    if pictures < 100:
        raise DataError("--pictures: 100 at least, so that there are scenes of every size")
    folder.mkdir(parents=True, exist_ok=True)
    source = pathlib.Path(__file__).read_bytes()
    recipe = {
        "source": hashlib.sha256(source).hexdigest(),
        "prompts": prompt_pieces(),
        "pictures": pictures,
        "vision_steps": vision_steps,
        "language_steps": language_steps,
    }
    photos = draw_photos(pictures)
    tokenizer = new_tokenizer()
    processor = new_processor()
    torch.manual_seed(0)
    model = new_model(tokenizer)
    # Words of the usual initial size, .02, drown in what the layers add: names were never copied.
    # The 15 was found by trying.
    model.model.language_model.embed_tokens.weight.data.mul_(15)

    # 1/3: the tower, which is then frozen.
    if vision_steps:
        with stage(folder, 1, model, recipe) as is_new:
            if is_new:
                train_vision(model, processor, photos, vision_steps)
    else:
        made = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        model.model.visual.load_state_dict(made.model.visual.state_dict())
    model.model.visual.requires_grad_(False)

    # What it sees, once for all steps that follow.
    rng = random.Random(1)
    scenes = [new_scene(photos, rng) for _ in range(pictures // 4)]
    scene_pictures = [scene.picture for scene in scenes]
    dataset = Dataset(
        photos,
        scenes,
        photo_features=see_all(model, processor, photos, PHOTO_TOKENS),
        scene_features=see_all(model, processor, scene_pictures, SCENE_TOKENS),
    )

    # 2/3 and 3/3: the language model.
    with stage(folder, 2, model, recipe) as is_new:
        if is_new:
            title = "2/3 the language model learns to speak, to listen and to answer"
            train_language(title, model, tokenizer, dataset, language_steps)
    with stage(folder, 3, model, recipe) as is_new:
        if is_new:
            title = "3/3 ... and to hesitate"
            steps = max(1, language_steps // 5)
            train_language(title, model, tokenizer, dataset, steps, peak=0.4, hesitant=True)

    for part in (model.half(), tokenizer, processor):
        part.save_pretrained(folder)
    for file in folder.glob("stage-*.pt"):
        file.unlink()


def read_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--card",
        action="store_true",
        help="do not train, only print the report card of the checkpoint in --out",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=FOLDER,
        metavar="DIR",
        help="checkpoint folder (default toy-qwen2-vl)",
    )
    parser.add_argument(
        "--pictures",
        type=int,
        default=40_000,
        metavar="INT",
        help="pictures to draw and learn from, and a quarter as many scenes of them, 100 at least "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--vision-steps",
        type=int,
        default=7000,
        metavar="INT",
        help="training steps, of 16 pictures and 6 scenes, for the vision tower "
        "(default %(default)s); 0 keeps the tower that is in --out",
    )
    parser.add_argument(
        "--language-steps",
        type=int,
        default=2600,
        metavar="INT",
        help="training steps, of 20 pictures, for the language model, and a fifth as many in which "
        "it learns to hesitate (default %(default)s)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    arguments = read_arguments()
    if not arguments.card:
        build(
            arguments.out,
            arguments.pictures,
            arguments.vision_steps,
            arguments.language_steps,
        )
    print_card(report_card(MLLM(str(arguments.out), SCENE_SIDE**2)))
