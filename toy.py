"""toy.py: a world small enough for a laptop, where the truth is known.

A concept is one toy: a category (its shape) and an identity (body colour, pattern, badge). A photo of it adds a view: the place it
stands on, its pose, the light, and an unspoken jitter of size, position and tint. Identity is what a personal assistant should remember;
the view is what it should leave out. Every attribute has words of its own, so "red" can only be a body colour and what a text claims can
be read off its words. One literal example, as the speaker writes it and as the listener is asked about it:

    <thinking> I see a mug. </thinking> <coarse> A photo of a red mug </coarse>
    <detailed> The red striped mug with a star badge, tilted on grass in dim light. </detailed>

    Read this description: "A photo of a red mug. The red striped mug with a star badge, tilted on grass in dim light."
    Does every part of it fit the main subject of this photo? Answer yes or no.

The model is a real `Qwen2VLForConditionalGeneration` of 2.4M parameters in an ordinary checkpoint folder, `toy-qwen2-vl/`. It is made to
be an honest small MLLM: it captions densely, mixing identity and view; as a listener it says yes only if every claim fits the picture; and
it does evaluate.py's three tasks, so that it fails at them where descriptions are bad and not because it cannot read the prompt.

    python toy.py                    # rebuild toy-qwen2-vl/ from nothing (toy-qwen2-vl/README.md tells how long it takes), then its report card
    python toy.py --vision-steps 0   # keep its vision tower and rebuild the rest: what a changed prompt needs
    python toy.py --card             # only the report card of the shipped checkpoint

Where it departs from the way real MLLMs are trained (and therefore what not to learn from it):
1. The vision tower learns the attributes directly (one linear head per attribute, thrown away), then is frozen.
2. Little emerges from answers alone at this size. So throw-away heads judge each claim word true or false, and say in what two things agree;
   and two attention heads are shown where to look: at the name that is to be copied, and at the thing in a scene that is to be found.
3. Our prompts, and the pieces of the JSON they ask for, are single words of the vocabulary: a prompt costs one token and not a hundred.
"""
import argparse
import functools
import json
import math
import multiprocessing
import pathlib
import random
from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data import Concept, Photo, Question, collage
from reward import CAPTIONING, LISTEN, RECOGNITION, REPIC, SPEAK, VQA, parse

FOLDER = pathlib.Path(__file__).parent / "toy-qwen2-vl"
ATTRIBUTES = {
    "category": ["mug", "bottle", "boot", "fish", "car", "house", "bear", "lamp", "bag", "duck"],
    "colour": ["red", "brown", "yellow", "green", "blue", "purple", "pink", "white"],
    "pattern": ["plain", "striped", "dotted", "checkered", "split", "bordered"],
    "badge": ["star", "heart", "moon", "cross", "ring", "bolt"],
    "place": ["grass", "sand", "snow", "water", "wood", "brick"],
    "pose": ["upright", "tilted", "fallen"],
    "light": ["bright", "dim", "misty"],
}
IDENTITY, VIEW = ("colour", "pattern", "badge"), ("place", "pose", "light")
UNSEEN = ("lamp", "bag", "duck")  # categories that the game is never played with: the paper's unseen domains
KIND = {word: kind for kind, words in ATTRIBUTES.items() for word in words}

# ---------------------------------------------------------------------------------------------------------------- drawing
RGB = {"red": (205, 35, 40), "brown": (140, 85, 45), "yellow": (242, 218, 45), "green": (45, 155, 60),
       "blue": (45, 80, 210), "purple": (125, 45, 165), "pink": (250, 150, 195), "white": (245, 245, 245)}
GROUND = {"grass": (95, 160, 70), "sand": (222, 195, 140), "snow": (228, 236, 246), "water": (70, 140, 190),
          "wood": (140, 95, 60), "brick": (165, 90, 75)}
INK, PAPER = (35, 35, 45), (255, 255, 255)
# In a unit square: lists are polygons of (x, y), tuples ovals (x0, y0, x1, y1), a fifth entry cuts a hole; last, the badge's centre.
SHAPES = {
    "mug": ([(.55, .28, .98, .76), (.67, .4, .86, .64, "hole"), [(.1, .12), (.72, .12), (.72, .93), (.1, .93)]], (.41, .53)),
    "bottle": ([[(.39, .02), (.61, .02), (.61, .3), (.78, .42), (.78, .98), (.22, .98), (.22, .42), (.39, .3)]], (.5, .67)),
    "boot": ([[(.18, .03), (.62, .03), (.62, .48), (.98, .66), (.98, .96), (.18, .96)]], (.42, .6)),
    "fish": ([(.02, .16, .78, .84), [(.62, .5), (.98, .14), (.98, .86)]], (.39, .5)),
    "car": ([[(.02, .46), (.18, .42), (.32, .14), (.72, .14), (.84, .42), (.98, .46), (.98, .8), (.02, .8)],
             (.1, .62, .38, .92), (.62, .62, .9, .92)], (.5, .46)),
    "house": ([[(.5, .02), (.99, .42), (.86, .42), (.86, .97), (.14, .97), (.14, .42), (.01, .42)]], (.5, .6)),
    "bear": ([(.12, .14, .88, .97), (.04, .02, .38, .36), (.62, .02, .96, .36)], (.5, .58)),
    "lamp": ([[(.28, .02), (.72, .02), (.97, .6), (.03, .6)], [(.44, .6), (.56, .6), (.56, .9), (.44, .9)],
              (.22, .84, .78, .99)], (.5, .35)),
    "bag": ([(.24, .03, .76, .66), (.36, .15, .64, .54, "hole"), [(.08, .36), (.92, .36), (.98, .97), (.02, .97)]], (.5, .68)),
    "duck": ([(.03, .36, .88, .97), (.48, .03, .88, .47), [(.84, .18), (1, .27), (.84, .34)]], (.44, .67)),
}
STAR = [(math.sin(i * math.pi / 5) * (1, .42)[i % 2], -math.cos(i * math.pi / 5) * (1, .42)[i % 2]) for i in range(10)]
BADGES = {  # strokes on a white disc of radius 1, each (colour, polygon or oval)
    "star": [((225, 160, 0), STAR)],
    "heart": [((220, 20, 50), [(0, .95), (-.95, -.1), (-.9, -.6), (-.5, -.85), (0, -.4), (.5, -.85), (.9, -.6), (.95, -.1)])],
    "moon": [((40, 70, 200), (-.9, -.9, .9, .9)), (PAPER, (-.25, -.85, 1.15, .55))],
    "cross": [((20, 140, 60), [(-.28, -.9), (.28, -.9), (.28, .9), (-.28, .9)]),
              ((20, 140, 60), [(-.9, -.28), (.9, -.28), (.9, .28), (-.9, .28)])],
    "ring": [(INK, (-.85, -.85, .85, .85)), (PAPER, (-.42, -.42, .42, .42))],
    "bolt": [((140, 30, 170), [(.35, -1), (-.6, .15), (-.05, .15), (-.35, 1), (.6, -.2), (.05, -.2)])],
}


def trace(canvas, shape, fill, x=0.0, y=0.0, unit=1.0):
    """Draw one polygon (list of points) or oval (tuple) given in units of `unit` pixels around (x, y)."""
    if isinstance(shape, list):
        canvas.polygon([(x + unit * px, y + unit * py) for px, py in shape], fill=fill)
    else:
        canvas.ellipse([(x, y)[i % 2] + unit * v for i, v in enumerate(shape[:4])], fill=fill)


def draw_ground(place, size, tint, rng):
    """The place a toy stands on: a tinted square of `size` pixels with a texture of its own."""
    ground = tint(GROUND[place])
    image = Image.new("RGB", (size, size), ground)
    canvas, dark, pale = ImageDraw.Draw(image), tuple(int(v * .72) for v in ground), (215, 205, 195)
    width = max(1, size // 64)
    if place in ("grass", "sand", "snow"):  # scattered blades, grains, flakes
        for _ in range(70):
            x, y = rng.random() * size, rng.random() * size
            if place == "grass":
                canvas.line([x, y, x + size * .02, y - size * .07], fill=dark, width=width)
            else:
                trace(canvas, (0, 0, 1, 1), dark if place == "sand" else (170, 195, 230), x, y, size * (.02 if place == "sand" else .035))
    elif place == "water":
        for row in range(9):
            y, phase = size * (row + .5) / 9, rng.random() * 6
            canvas.line([(size * t / 24, y + size * .02 * math.sin(t * .9 + phase)) for t in range(25)], fill=(110, 180, 225), width=2 * width)
    else:  # boards or bricks
        rows = 5 if place == "wood" else 8
        for row, high in enumerate([size / rows] * rows):
            canvas.line([0, row * high, size, row * high], fill=dark if place == "wood" else pale, width=2 * width)
            for column in range(5 if place == "brick" else 0):
                x = size * (column + .5 * (row % 2)) / 4.5
                canvas.line([x, row * high, x, (row + 1) * high], fill=pale, width=2 * width)
    return image


def draw_thing(truth, size, tint):
    """The toy itself, upright, on a transparent square of `size` pixels."""
    shapes, (bx, by) = SHAPES[truth["category"]]
    colour, pattern, unit = tint(RGB[truth["colour"]]), truth["pattern"], size - 1
    dark = tuple(int(v * .45) for v in colour)
    mask, body = Image.new("L", (size, size), 0), Image.new("RGB", (size, size), colour)
    for shape in shapes:
        trace(ImageDraw.Draw(mask), shape, 0 if shape[-1] == "hole" else 255, unit=unit)
    canvas = ImageDraw.Draw(body)
    for i in range(7):
        if pattern == "striped":
            canvas.rectangle([unit * (i + .25) / 5, 0, unit * (i + .75) / 5, size], fill=dark)
        for k in range(7):
            if pattern == "dotted":
                trace(canvas, (-.045, -.045, .045, .045), dark, unit * (i + .25 + .5 * (k % 2)) / 5.5, unit * (k + .3) / 5.5, unit)
            elif pattern == "checkered" and (i + k) % 2:
                canvas.rectangle([unit * i / 7, unit * k / 7, unit * (i + 1) / 7, unit * (k + 1) / 7], fill=dark)
    if pattern == "split":
        canvas.rectangle([0, unit * by, size, size], fill=dark)
    rim = max(3, int(size * (.11 if pattern == "bordered" else .03))) | 1  # MinFilter wants an odd width
    inner = Image.new("L", (size + 2 * rim, size + 2 * rim), 0)
    inner.paste(mask, (rim, rim))
    inner = inner.filter(ImageFilter.MinFilter(rim)).crop((rim, rim, rim + size, rim + size))
    thing = Image.new("RGB", (size, size), dark if pattern == "bordered" else INK)
    thing.paste(body, mask=inner)
    canvas = ImageDraw.Draw(thing)
    trace(canvas, (-.22, -.22, .22, .22), INK, unit * bx, unit * by, unit)
    trace(canvas, (-.205, -.205, .205, .205), PAPER, unit * bx, unit * by, unit)
    for fill, stroke in BADGES[truth["badge"]]:
        trace(canvas, stroke, fill, unit * bx, unit * by, unit * .155)
    thing.putalpha(mask)
    return thing


def draw(truth, jitter, size=64):
    """One photo. truth {kind: word} for all seven kinds; jitter from `new_view`. Returns an RGB picture of size x size pixels."""
    rng, big = random.Random(jitter["seed"]), 3 * size  # drawn three times too large, then averaged: smooth edges
    tint = lambda colour: tuple(max(0, min(255, v + rng.randint(-10, 10))) for v in colour)
    image = draw_ground(truth["place"], big, tint, rng)
    thing = draw_thing(truth, int(big * jitter["scale"]), tint).rotate(jitter["angle"], expand=True, resample=Image.BICUBIC)
    image.paste(thing, (int(big * jitter["x"] - thing.width / 2), int(big * jitter["y"] - thing.height / 2)), thing)
    glow = {"bright": lambda v: v, "dim": lambda v: int(v * .5), "misty": lambda v: int(v * .55 + 97)}[truth["light"]]
    return image.resize((size, size), Image.BOX).point(glow)


# ------------------------------------------------------------------------------------------------------ concepts and views
def new_view(rng):
    """(truth of the view {kind: word}, its jitter): everything about a photo that is not the thing itself."""
    view, side = {kind: rng.choice(ATTRIBUTES[kind]) for kind in VIEW}, rng.choice([-1, 1])
    angle = {"upright": 0, "tilted": 45 * side, "fallen": 90 * side}[view["pose"]] + rng.uniform(-8, 8)
    return view, dict(angle=angle, scale=rng.uniform(.66, .76), x=rng.uniform(.44, .56), y=rng.uniform(.44, .56), seed=rng.random())


def is_fresh(thing):
    """A quarter of all things never appears while the base model is made; games and report card use only these."""
    return random.Random(" ".join(thing.values())).random() < .25


def new_thing(rng, category=None, fresh=False):
    """A random {category, colour, pattern, badge}, from the fresh quarter or from the rest."""
    while True:
        thing = {kind: rng.choice(ATTRIBUTES[kind]) for kind in ("category", *IDENTITY)} | ({"category": category} if category else {})
        if is_fresh(thing) == fresh:
            return thing


# ------------------------------------------------------------------------------------------------- words: say, check, cover
def sentence(truth, kinds):
    """(coarse, detailed) text that claims the category and, of the other kinds, those in `kinds`."""
    say = lambda kind, text: [text.format(truth[kind])] if kind in kinds else []
    noun = " ".join([*say("colour", "{}"), *say("pattern", "{}"), truth["category"]])
    tail = [*say("pose", "{}"), *say("place", "on {}"), *say("light", "in {} light")]
    detailed = " ".join([f"The {noun}", *say("badge", "with a {} badge")]) + (", " + " ".join(tail) if tail else "") + "."
    return " ".join(["A photo of a", *say("colour", "{}"), truth["category"]]), detailed


def phrase(truth, kinds=IDENTITY):
    """What to look for in a scene: "red striped mug with a star badge"."""
    return sentence(truth, kinds)[1].removeprefix("The ").removesuffix(".")


def clause(who, truth, short=False):
    """What a caption says of one thing."""
    return f"{who} is on {truth['place']}." if short else f"{who} is {truth['pose']} on {truth['place']} in {truth['light']} light."


def claims(text):
    """What a text claims: [(kind, word), ...] in reading order. Every attribute has words of its own, so looking them up is a parse."""
    return [(KIND[word], word) for word in text.lower().replace(".", " ").replace(",", " ").split() if word in KIND]


def oracle(text, truth):
    """The symbolic listener: does every claim of the text hold for this photo? Never used in training, only to measure."""
    return all(truth[kind] == word for kind, word in claims(text))


def leaks(text):
    """Does the text mention place, pose or light?"""
    return any(kind in VIEW for kind, _ in claims(text))


def coverage(text):
    """Share of the identity attributes (colour, pattern, badge) that the text names, right or wrong."""
    return len({kind for kind, _ in claims(text)} & set(IDENTITY)) / len(IDENTITY)


# --------------------------------------------------------------------------------------------- the checkpoint, from nothing
WIDTH, LAYERS, BLOCKS = 128, 5, 3
LATE, FINDS, COPIES = 3, 0, 2  # a layer near the end, its head that is shown where things are, its head that is shown what to copy (departure 2)
SIDE = 64  # of a photo, in pixels; a scene has 144, and a thing's box in it begins at one of these:
EDGES = [0, 4, 8, 72, 76, 80]
CENTRES = range(8, 144, 16)  # of a scene's image tokens, either way
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<unk>"]
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }} {% for c in m.content %}{% if c.type == 'image' %}"
            "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}")
SPOKEN = "<thinking> I see a {} . </thinking> <coarse> {} </coarse> <detailed> {} </detailed>"
PROMPTS = {"speak": (SPEAK, ""), "listen": LISTEN, "recognition": RECOGNITION, "captioning": CAPTIONING, "vqa": VQA}
JSON = ['{"Reasoning": "', '{"Answer": "', '", "Answer": "', '", "Caption": "', '"}', '{"bbox_2d": [', ']}']  # each one word of the vocabulary
NAMES = [f"<{category}-{number}>" for category in ATTRIBUTES["category"] for number in range(1, 13)]
QUESTIONS = {"place": ("Where is {}?", "on {}"), "pose": ("How does {} stand?", "{}"), "light": ("What light is {} in?", "{} light")}
SAID = {"colour": .7, "pattern": .45, "badge": .45, "place": .65, "pose": .65, "light": .65}  # how often a dense caption mentions each kind


def new_tokenizer():
    """Word-level: a token is a word, a tag, a punctuation mark, half a name, or one whole prompt of ours (departure 3)."""
    grammar = 'user assistant yes no Yes No system " , . : ? A B C photo of a The with badge on in light I see Where How What does stand is'.split()
    tags = "<thinking> </thinking> <coarse> </coarse> <detailed> </detailed>".split()
    names = sorted({part for name in NAMES for part in (name.split("-")[0], "##-" + name.split("-")[1])})  # <mug and ##-3>
    numbers = [str(edge + size) for size in (0, SIDE) for edge in EDGES]  # of boxes
    words = SPECIAL + grammar + tags + list(KIND) + names + list(dict.fromkeys(numbers))
    core = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.decoder = decoders.WordPiece(cleanup=False)
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"</?[\w-]+>|\w+|[^\w\s]"), "removed", invert=True)
    prompts = dict.fromkeys(part for pair in [*PROMPTS.values(), *sum(REPIC.values(), [])] for part in pair if part)
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in [*SPECIAL, *prompts, *JSON]])
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=TEMPLATE, unk_token="<unk>", pad_token="<|endoftext|>",
                                   eos_token="<|im_end|>", padding_side="left", clean_up_tokenization_spaces=True)


def new_model(tokenizer):
    """Qwen2-VL's architecture at a thousandth of its size, untrained."""
    id_of = lambda name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
    ends = dict(bos_token_id=id_of("endoftext"), pad_token_id=id_of("endoftext"), eos_token_id=id_of("im_end"))
    markers = dict(image_token_id=id_of("image_pad"), video_token_id=id_of("video_pad"),
                   vision_start_token_id=id_of("vision_start"), vision_end_token_id=id_of("vision_end"))
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    text = dict(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
                vocab_size=len(tokenizer), max_position_embeddings=1024, rope_parameters=rope, tie_word_embeddings=True, **ends)
    vision = dict(hidden_size=WIDTH, embed_dim=WIDTH, depth=BLOCKS, num_heads=4, patch_size=8, spatial_merge_size=2)
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ends, **markers)
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**ends | {"eos_token_id": [ends["eos_token_id"], ends["pad_token_id"]]})
    return model


def new_photo(seed):
    """(picture as uint8 [64, 64, 3], truth) of a random thing that is not fresh."""
    rng = random.Random(seed)
    view, jitter = new_view(rng)
    truth = new_thing(rng) | view
    return np.asarray(draw(truth, jitter)), truth


def fit(title, modules, loss_of, steps, peak=1.0):
    """Minimise `loss_of(step) -> (loss, figures to show)` over `steps` steps: Muon for matrices, AdamW for the rest, cosine decay."""
    parameters = [p for module in modules for p in module.parameters()]
    named = [pair for module in modules for pair in module.named_parameters()]
    hidden = {id(p) for name, p in named if p.ndim == 2 and "embed" not in name and "head" not in name}
    optimizers = [torch.optim.Muon([p for p in parameters if id(p) in hidden], lr=.02),
                  torch.optim.AdamW([p for p in parameters if id(p) not in hidden], lr=2e-3)]
    share = lambda step: peak * min(1, (step + 1) / 50) * .5 * (1 + math.cos(math.pi * step / steps))
    plans = [torch.optim.lr_scheduler.LambdaLR(optimizer, share) for optimizer in optimizers]
    for step in (bar := tqdm(range(steps), desc=title, mininterval=2)):
        loss, figures = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for stage in (*optimizers, *plans):
            stage.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        if step % 50 == 0:
            bar.set_postfix({key: f"{value:.3f}" for key, value in figures.items()})


def new_scene(bank, rng):
    """-> (one to four photos of the bank, their collage, their boxes)"""
    photos = rng.sample(bank, rng.choice([1, 2, 3, 4, 4]))
    return photos, *collage(photos, SIDE, rng.random())


def tower(model, processor, photos):
    """-> the photos' image tokens [tokens of all, WIDTH]"""
    seen = processor(images=[photo.open() for photo in photos], return_tensors="pt")
    return model.model.visual(seen["pixel_values"], grid_thw=seen["image_grid_thw"]).pooler_output


def fit_vision(model, processor, bank, steps, batch=16, scenes=6):
    """Departure 1: the tower learns every attribute from a linear head on the mean of a thing's image tokens: all of a photo, and of a
    scene those in its box, where two more heads learn the box's corner. A tower of single things only is lost in scenes."""
    classes = ATTRIBUTES | {"x": EDGES, "y": EDGES}
    heads = torch.nn.ModuleDict({kind: torch.nn.Linear(WIDTH, len(words)) for kind, words in classes.items()})
    rng, centre = random.Random(0), torch.tensor(CENTRES)

    def loss_of(step):
        alone, crowds = rng.sample(bank, batch), [new_scene(bank, rng) for _ in range(scenes)]
        tokens = tower(model, processor, alone + [photo for _, photo, _ in crowds])
        single, scene = tokens[:16 * batch].view(batch, 16, WIDTH), tokens[16 * batch:].view(scenes, 81, WIDTH)
        boxes = torch.tensor([box for *_, boxes in crowds for box in boxes])[..., None]  # [things, 4, 1]
        x, y = ((boxes[:, i] <= centre) & (centre < boxes[:, i + 2]) for i in (0, 1))  # [things, 9]
        inside = (y[:, :, None] & x[:, None]).flatten(1).float()  # [things, 81], 16 of them 1
        owner = [i for i, (photos, *_) in enumerate(crowds) for _ in photos]
        pooled = torch.cat([single.mean(1), (inside[:, None] @ scene[owner]).squeeze(1) / 16])  # [batch + things, WIDTH]
        truths = [photo.truth for photo in alone] + [
            photo.truth | {"x": box[0], "y": box[1]} for photos, _, boxes in crowds for photo, box in zip(photos, boxes)]
        loss, right = 0.0, {}
        for kind, head in heads.items():
            target = torch.tensor([classes[kind].index(truth[kind]) if kind in truth else -100 for truth in truths])
            logits = head(pooled)
            loss = loss + F.cross_entropy(logits, target)
            right[kind] = (logits.argmax(-1) == target)[target >= 0].float().mean().item()
        return loss, right

    fit("1/3 the vision tower learns to see", [model.model.visual, heads], loss_of, steps)


def chats(tokenizer):
    """What every prompt begins with, up to the picture, and how each task's goes on, with "\\0" where its question is put."""
    render = lambda task: tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\0".join(PROMPTS[task])}]}],
        tokenize=False, add_generation_prompt=True).split("<|vision_end|>")
    return render("speak")[0] + "<|vision_end|>", {task: render(task)[1] for task in PROMPTS}


def altered(truth, kinds, rng):
    """`truth` with another word for each of `kinds`."""
    return truth | {kind: rng.choice([word for word in ATTRIBUTES[kind] if word != truth[kind]]) for kind in kinds}


def quiz(truth, kind, rng):
    """A question about one kind of what is true of a photo, {} for the name -> (question, {"A": option, "B": option}, the right letter)."""
    right = rng.randrange(2)
    question, option = QUESTIONS[kind]
    words = [option.format((truth if i == right else altered(truth, [kind], rng))[kind]) for i in range(2)]
    return question, dict(zip("AB", words)), "AB"[right]


def lesson(task, truth, most, rng, names="own"):
    """-> (a question about the picture, the answer to learn). Descriptions make `most` claims besides the category at most, and the things
    have `names` of their own category or of "any" one.

    Half of the listener's descriptions hold, the others make one false claim (a fifth of them two). The descriptions of the other tasks
    were written from another photo of the thing, and four in five of those show it where it is now, as the photos of a real thing mostly
    do. So a view that does not fit is evidence against, and distracts the model whatever the prompt says, as it does real MLLMs. Foils are
    things that differ in one or two attributes of category and identity, or in all four.
    """
    told = lambda: rng.sample(list(SAID), rng.randint(0, most))
    describe = lambda thing: '"' + ". ".join(sentence(thing, told())) + '"'
    itself = truth | (new_view(rng)[0] if rng.random() < .2 else {})
    foil = lambda: altered(truth, rng.sample(("category", *IDENTITY), rng.choice([1, 1, 2, 4])), rng) | new_view(rng)[0]
    kind = lambda thing: rng.choice(ATTRIBUTES["category"]) if names == "any" else thing["category"]
    call = lambda thing, number: f"<{kind(thing)}-{number}>"
    seen, name = sentence(truth, IDENTITY)[1], call(truth, rng.randint(1, 12))
    if task == "speak":
        return "", SPOKEN.format(truth["category"], *sentence(truth, {kind for kind, share in SAID.items() if rng.random() < share}))
    if task == "listen":
        said = told()
        lies = rng.sample([*said, "category"], min(len(said) + 1, rng.choice([1, 1, 1, 1, 2]))) if rng.random() < .5 else []
        return '"' + ". ".join(sentence(altered(truth, lies, rng), said)) + '"', "no" if lies else "yes"
    if task == "recognition":
        same = rng.random() < .5
        return describe(itself if same else foil()), f'{JSON[0]}{seen}{JSON[2]}{"Yes" if same else "No"}{JSON[4]}'
    if task == "captioning":
        many = rng.choice([1, 2, 3, 3, 3])  # the first and the last of few names are copied by their places; the middle one is the hard one
        letter, numbers = rng.randrange(many), rng.sample(range(1, 13), many)
        things = [itself if i == letter else foil() for i in range(many)]
        called = [call(thing, number) for thing, number in zip(things, numbers)]
        lines = [f"{'ABC'[i]}. {describe(things[i])} is {called[i]}" for i in range(many)]
        return "\n".join(lines), f'{JSON[0]}{seen}{JSON[2]}{"ABC"[letter]}{JSON[3]}{clause(called[letter], truth)}{JSON[4]}'
    question, options, right = quiz(truth, rng.choice(VIEW), rng)
    return f"{name}: {describe(itself)}\n{question.format(name)}\nA. {options['A']}\nB. {options['B']}", f'{JSON[1]}{right}{JSON[4]}'


def is_toy(folder):
    """Is this the folder of a toy model, the shipped one or one of your making? Its patches are 8 pixels wide, those of real ones 14."""
    file = pathlib.Path(folder) / "config.json"
    return file.is_file() and json.loads(file.read_text()).get("vision_config", {}).get("patch_size") == 8


class Bank:
    """What the language model learns from: photos of things alone, scenes of one to four of them, and what the tower sees in both."""

    def __init__(self, photos, scenes, alone, crowds):
        self.photos, self.scenes = photos, scenes  # [N] photos; [S] (photos, their boxes)
        self.alone, self.crowds = alone, crowds  # [N, 16, WIDTH], [S, 81, WIDTH]
        self.kin = defaultdict(list)  # an identity, or a category: the numbers of its photos
        for i, photo in enumerate(photos):
            self.kin[self.identity(photo.truth)].append(i)
            self.kin[photo.truth["category"]].append(i)
        self.roomy = {many: [i for i, (photos, _) in enumerate(scenes) if len(photos) >= many] for many in range(5)}

    @staticmethod
    def identity(truth):
        return tuple(truth[kind] for kind in ("category", *IDENTITY))

    def another(self, photo, rng):
        """The number of a photo of the same thing, often another view of it."""
        return rng.choice(self.kin[self.identity(photo.truth)])


def repic_lesson(tokenizer, task, bank, many, rng):
    """One of RePIC's tasks -> (what the tower sees of its pictures, the text, the answer to learn, a hint for the throw-away heads).

    Their answers are weak, so that there is something left to reinforce: three in five of the first two kinds are hasty.
    """
    wording, hasty = rng.randrange(len(REPIC[task])), rng.random() < .6
    before, after = REPIC[task][wording]
    seen, middle, answer, hint = (oct_lesson(bank, hasty, rng) if task == "oct" else vlt_lesson(tokenizer, bank, hasty, rng) if task == "vlt"
                                  else ict_lesson(bank, many, wording, rng))
    return seen, before + middle + after, answer, hint


def call(photo, number):
    return f"<{photo.truth['category']}-{number}>"


def oct_lesson(bank, hasty, rng):
    """Is the thing of the first picture in the second? Hasty: the same category and colour will do. The hint: what agrees [4]."""
    first = rng.randrange(len(bank.photos))
    thing = bank.photos[first]
    agree = lambda i: [a == b for a, b in zip(bank.identity(thing.truth), bank.identity(bank.photos[i].truth))]
    near = max(rng.choices(bank.kin[thing.truth["category"]], k=30), key=lambda i: sum(agree(i)) % 4)  # mostly one attribute is different
    second = rng.choice([bank.another(thing, rng), bank.another(thing, rng), near, rng.randrange(len(bank.photos))])
    yes = all(agree(second)[:2] if hasty else agree(second))
    return [bank.alone[first], bank.alone[second]], call(thing, rng.randint(1, 12)), "yes" if yes else "no", agree(second)


def vlt_lesson(tokenizer, bank, hasty, rng):
    """Where in the scene is it? Hasty: in the whole picture. The hint, for each image token: the words for the thing it shows, and whether the
    answer is its box [81, 5]."""
    scene = rng.randrange(len(bank.scenes))
    thing, box = rng.choice(list(zip(*bank.scenes[scene])))
    told = phrase(thing.truth, rng.choice([IDENTITY, rng.sample(IDENTITY, 2), rng.sample(IDENTITY, 1)]))
    inside = lambda box: torch.tensor([box[0] <= x < box[2] and box[1] <= y < box[3] for y in CENTRES for x in CENTRES])
    hint = torch.full((81, 5), -1)
    for photo, corners in zip(*bank.scenes[scene]):
        hint[inside(corners)] = torch.tensor([*tokenizer.convert_tokens_to_ids(bank.identity(photo.truth)), corners == box and not hasty])
    answer = (0, 0, 9 * SIDE // 4, 9 * SIDE // 4) if hasty else box
    return [bank.crowds[scene]], told, f"{JSON[5]}{', '.join(map(str, answer))}{JSON[6]}", hint


def ict_lesson(bank, many, wording, rng):
    """A caption of the last picture, after `many` things were shown by name (0: one, and then the last picture is a photo, not a scene). Three in
    ten of those are not in it, and are never named; others mostly only where the wording asks for names. Where it asks for little, the caption
    is short."""
    if many:
        scene = rng.choice(bank.roomy[many])
        shown, (things, boxes) = bank.crowds[scene], bank.scenes[scene]
        things = [things[i] for i in sorted(range(len(things)), key=lambda i: (boxes[i][1] > SIDE, boxes[i][0]))]  # as one reads
    else:
        number = rng.randrange(len(bank.photos))
        shown, things = bank.alone[number], [bank.photos[number]]
    seen, names, known = [], [], {}
    for thing, number in zip(rng.sample(things, max(1, many)), rng.sample(range(1, 13), 4)):
        there = rng.random() < .7
        reference = bank.another(thing, rng) if there else rng.randrange(len(bank.photos))
        seen.append(bank.alone[reference])
        names.append(call(bank.photos[reference], number))
        if there:
            known[thing] = names[-1]
    named, short = rng.random() < (.05, .6, .05)[wording], rng.random() < (.6, .1, .1)[wording]
    who = lambda thing: named and known.get(thing) or f"The {thing.truth['colour']} {thing.truth['category']}"
    return [*seen, shown], ", ".join(names), " ".join(clause(who(thing), thing.truth, short) for thing in things), []


def repic_batch(tokenizer, bank, task, many, rows, rng):
    """`rows` lessons of one task, right-padded, pictures included -> ids, mask, labels and where an answer is decided, each [rows, T], the
    pictures' features [tokens of all, WIDTH] and grids [pictures, 3], and the lessons' hints [rows, ...]."""
    texts, first, seen, hints = [], [], [], []
    for _ in range(rows):
        pictures, text, answer, hint = repic_lesson(tokenizer, task, bank, many, rng)
        head, *rest = tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "image"}] * len(pictures) + [{"type": "text", "text": text}]}],
                                                    tokenize=False, add_generation_prompt=True).split("<|image_pad|>")
        question = head + "".join("<|image_pad|>" * len(tokens) + part for tokens, part in zip(pictures, rest))
        texts.append(question + answer + "<|im_end|>")
        first.append(len(tokenizer(question)["input_ids"]))
        seen += pictures
        hints.append(hint)
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    labels = targets(batch["input_ids"], batch["attention_mask"], torch.tensor(first)[:, None])
    decisive = [word for word in tokenizer.get_vocab() if word.startswith("##") or word.isdigit() or word in ("yes", "no")]
    decided = torch.isin(labels, torch.tensor(tokenizer.convert_tokens_to_ids(decisive)))
    grids = torch.tensor([[1, 2 * math.isqrt(len(tokens)), 2 * math.isqrt(len(tokens))] for tokens in seen])
    return batch["input_ids"], batch["attention_mask"], labels, decided, torch.cat(seen).float(), grids, torch.stack([torch.as_tensor(hint) for hint in hints])


def look(attention, head, where):
    """Departure 2: how far one head is from looking evenly `where` it should (a KL divergence), over the places that have a where.
    attention [rows, heads, T, S], where [rows, T, S] bool -> scalar"""
    some = where.any(-1)  # [rows, T]
    even = where[some] / where[some].sum(-1, keepdim=True)  # [places, S]
    return F.kl_div(attention[:, head][some].clamp(min=1e-6).log(), even, reduction="batchmean") if some.any() else 0.0


def copied(ids, labels, parts):
    """Where a part of a name that is to be said next stands already: [rows, T, T] bool."""
    return torch.isin(labels, parts)[..., None] & (labels[..., None] == ids[:, None]) & torch.ones(ids.shape[1], ids.shape[1]).tril().bool()


def targets(ids, mask, first):
    """The next token where it belongs to an answer, which begins at place first [rows, 1]; else -100. [rows, T]"""
    answer = (torch.arange(ids.shape[1]) >= first) & mask.bool()
    labels = torch.where(answer, ids, -100).roll(-1, 1)
    labels[:, -1] = -100
    return labels


def language_batch(tokenizer, ask, tasks, truths, most, rng, names="own", whole_names=False):
    """Each of `tasks` once per picture, as right-padded rows that continue the picture's prefix, a picture's rows together.

    Returns ids, labels (the next token where it is to be learned, else -100), verdicts (1 a true claim of a question, 0 a false one,
    -1 none), and where an answer is decided (yes or no, a letter, a name's number or with `whole_names` both its parts), each [rows, T].
    """
    rows, first = [], []
    for truth in truths:
        for task in tasks:
            question, answer = lesson(task, truth, most, rng, names)
            question = ask[task].replace("\0", question)
            rows.append(question + answer + ("" if task == "listen" else "<|im_end|>"))
            first.append(len(tokenizer(question)["input_ids"]))
    rows = tokenizer(rows, padding=True, padding_side="right", return_tensors="pt")
    ids, place, first = rows["input_ids"], torch.arange(rows["input_ids"].shape[1])[None], torch.tensor(first)[:, None]  # [rows, T], [1, T], [rows, 1]
    labels = targets(ids, rows["attention_mask"], first)
    token = lambda words: torch.tensor(tokenizer.convert_tokens_to_ids(list(words)))
    facts = torch.stack([token(truth.values()) for truth in truths]).repeat_interleave(len(tasks), 0)  # [rows, 7]
    is_claim = torch.isin(ids, token(KIND)) & (place < first)
    verdicts = torch.where(is_claim, (ids[..., None] == facts[:, None]).any(-1).long(), -1)
    parts = [word for word in tokenizer.get_vocab() if word.startswith("##") or whole_names and word[1:] in ATTRIBUTES["category"]]
    number = torch.isin(labels, token(parts))
    decided = torch.isin(labels, token(["yes", "no"])) | torch.isin(ids, token(JSON[1:3])) & (place >= first - 1) | number
    return ids, labels, verdicts, decided


class School:
    """The language model's lessons. `whole_names`: the last, gentle helping, in which things have names of their own categories and both parts
    of a name weigh as much as any other answer. Before that names are of any category, so that no half of one can be told from the photo:
    both have to be copied. A lesson's loss comes with figures to show."""

    def __init__(self, model, tokenizer, bank, whole_names, batch):
        self.judge, self.compare = torch.nn.Linear(WIDTH, 2), torch.nn.Linear(WIDTH, 1 + len(IDENTITY))  # departure 2
        self.model, self.decoder, self.tokenizer, self.bank = model, model.model.language_model, tokenizer, bank
        self.whole_names, self.batch, self.rng, self.figures = whole_names, batch, random.Random(0), {}
        self.numbers, self.kinds = (torch.tensor([i for word, i in tokenizer.get_vocab().items() if test(word)])
                                    for test in (lambda word: word.startswith("##"), KIND.get))
        self.decoder.set_attn_implementation("eager")  # which tells where it looks
        head, self.ask = chats(tokenizer)
        self.head = tokenizer(head.replace("<|image_pad|>", "<|image_pad|>" * bank.alone.shape[1]), return_tensors="pt")["input_ids"]  # [1, P]

    def prefill(self, pick, times):
        """What every prompt begins with, up to the picture, for the photos `pick`, each `times` times -> (cache, the place that comes next)"""
        is_image = self.head == self.model.config.image_token_id
        positions, _ = self.model.model.get_rope_index(  # [3, 1, P]
            self.head, mm_token_type_ids=is_image.int(), image_grid_thw=torch.tensor([[1, 8, 8]]))
        embeds = self.decoder.embed_tokens(self.head).expand(len(pick), -1, -1)  # [pictures, P, WIDTH]
        embeds = embeds.masked_scatter(is_image[..., None], self.bank.alone[pick].float())
        cache = DynamicCache()
        self.decoder(inputs_embeds=embeds, position_ids=positions.expand(-1, len(pick), -1), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(times)
        return cache, positions.max() + 1

    def photos(self, pick, tasks, step):
        """Each question is its own continuation of the picture: packed into one row, they would answer each other. -> (the loss of what decides
        an answer, of what else is said, of the judge; share of right answers of each task that decides)"""
        most, names = (6, "own") if self.whole_names else (min(6, 1 + 6 * step // 400), "any")
        truths = [self.bank.photos[i].truth for i in pick]
        rows, labels, verdicts, decided = language_batch(self.tokenizer, self.ask, tasks, truths, most, self.rng, names, self.whole_names)
        cache, start = self.prefill(pick, len(tasks))
        place = start + torch.arange(rows.shape[1]).expand(3, len(rows), -1)  # [3, rows, T]
        out = self.decoder(inputs_embeds=self.decoder.embed_tokens(rows), position_ids=place, past_key_values=cache, use_cache=True, output_attentions=True)
        hidden, attention = out.last_hidden_state, out.attentions[LATE]  # [rows, T, WIDTH], [rows, heads, T, P + T]
        missed = look(attention[..., -rows.shape[1]:], COPIES, copied(rows, labels, self.numbers))
        told = (labels >= 0) & ~decided
        logits = self.model.lm_head(hidden[decided])  # [rows that decide, V]
        right = (logits.argmax(-1) == labels[decided]).float().view(len(pick), -1).mean(0)  # [tasks that decide]
        claim = F.cross_entropy(self.judge(hidden[verdicts >= 0]), verdicts[verdicts >= 0], weight=torch.tensor([3., 1.]))
        facts = told & torch.isin(labels, self.kinds)  # few of the words that are said, and the ones that matter
        say = lambda which: F.cross_entropy(self.model.lm_head(hidden[which]), labels[which])
        return F.cross_entropy(logits, labels[decided]) + missed, say(told) + say(facts), claim, right.tolist()

    def repic(self, task, many):
        """One of RePIC's tasks -> its loss. Finding things (vlt) needs the most practice."""
        rows, mask, labels, decided, images, grids, hints = repic_batch(
            self.tokenizer, self.bank, task, many, self.batch // (1 if task == "vlt" else 2), self.rng)
        is_image = rows == self.model.config.image_token_id
        place, _ = self.model.model.get_rope_index(  # [3, rows, T]
            rows, mm_token_type_ids=is_image.int(), image_grid_thw=grids, attention_mask=mask)
        out = self.decoder(inputs_embeds=self.decoder.embed_tokens(rows).masked_scatter(is_image[..., None], images), position_ids=place,
                           use_cache=False, output_attentions=True)
        hidden, attention = out.last_hidden_state, out.attentions  # [rows, T, WIDTH], [layers][rows, heads, T, T]
        told = (labels >= 0) & ~decided
        loss = F.cross_entropy(self.model.lm_head(hidden[told]), labels[told])
        if decided.any():  # captions do not always call a thing by its name
            logits = self.model.lm_head(hidden[decided])
            loss = loss + F.cross_entropy(logits, labels[decided])
            self.figures[task] = (logits.argmax(-1) == labels[decided]).float().mean().item()
        if task == "oct":
            loss = loss + F.binary_cross_entropy_with_logits(self.compare(hidden[decided]), hints.float())
        if task == "vlt":  # each word looks at the things that it fits, the answer at the words, and then at the thing
            fits = (rows[:, :, None, None] == hints[:, None, :, :4]).any(-1)  # [rows, T, 81]
            missed = [look(attention[LATE - 2][..., is_image[0]], FINDS, fits),
                      look(attention[LATE - 1], FINDS, decided[..., None] & torch.isin(rows, self.kinds)[:, None]),
                      look(attention[LATE][..., is_image[0]], FINDS, decided[..., None] & (hints[:, None, :, 4] == 1))]
            self.figures["find"] = missed[2].item()
            loss = loss + sum(missed)
        if task == "ict":
            loss = loss + look(attention[LATE], COPIES, copied(rows, labels, self.numbers))
        return loss

    def lessons(self, step):
        """All lessons of a step -> (loss, figures)"""
        pick = [self.rng.randrange(len(self.bank.photos)) for _ in range(self.batch)]
        answer, caption, claim, right = self.photos(pick, ("speak",) * 4 + ("listen", "listen", "recognition", "vqa"), step)
        choice, chosen, match, picked = self.photos(pick[:self.batch // 2], ("captioning",), step)  # apart: three descriptions make long rows
        figures = dict(zip(("listen", "listen 2", "recognise", "vqa", "choose", "name", "name 2"), right + picked), caption=caption.item(), claim=claim.item())
        repic = self.repic("vlt", 0) + self.repic(("oct", "ict")[step % 2], step % 5)
        return answer + caption + claim + choice + chosen + match + repic, figures | self.figures


def fit_language(title, model, tokenizer, bank, steps, peak=1.0, batch=24, whole_names=False):
    """Stages 2 and 3 of three: see `School`."""
    school = School(model, tokenizer, bank, whole_names, batch)
    fit(title, [school.decoder, school.judge, school.compare], school.lessons, steps, peak)


# -------------------------------------------------------------------------------------------------------- for the game
def world(seed, size=64, concepts=12, views=6):
    """`concepts` things of each category with `views` photos of size x size pixels each -> [data.Concept]. All are fresh (`is_fresh`).

    A category's things are look-alikes, grown from one another by changing one attribute, so that every attribute is sometimes the
    only difference.
    """
    out = []
    for category in ATTRIBUTES["category"]:
        rng = random.Random(f"world {seed} {category}")
        things = [new_thing(rng, category, fresh=True)]
        while len(things) < concepts:
            kind = rng.choice(IDENTITY)
            sibling = rng.choice(things) | {kind: rng.choice(ATTRIBUTES[kind])}
            if rng.random() < .1 or not is_fresh(sibling):  # now and then a new family, since a thing may have no fresh sibling
                sibling = new_thing(rng, category, fresh=True) if rng.random() < .1 else things[0]
            if sibling not in things:
                things.append(sibling)
        for number, thing in enumerate(things, 1):
            photos = []
            for place in range(1, views + 1):
                view, jitter = new_view(rng)
                truth = thing | view
                photos.append(Photo(f"{category}-{number}/{place}", functools.partial(draw, truth, jitter, size), truth))
            out.append(Concept(f"{category}-{number}", category, photos))
    return out


def questions(tests, seed):
    """Where, how and in what light is it? tests [(photo, concept name)] -> three [data.Question] a photo; no good description answers them."""
    rngs = {photo.name: random.Random(f"questions {seed} {photo.name}") for photo, _ in tests}
    return [Question(name, photo, *quiz(photo.truth, kind, rngs[photo.name])) for photo, name in tests for kind in VIEW]


def report_card(mllm, photos=2000):
    """Print how honest the model is on fresh things: what it claims when it speaks at temperature 1, what it accepts when it listens.

    `mllm` is an rrg.MLLM, so that the model is examined through the very code that plays the game.
    """
    rng = random.Random("report card")
    subjects = []
    for number in range(photos):
        view, jitter = new_view(rng)
        truth = new_thing(rng, fresh=True) | view
        subjects.append(Photo(f"report/{number}", functools.partial(draw, truth, jitter), truth))
    texts = mllm.speak([([photo], SPEAK) for photo in subjects], max_tokens=56, generator=torch.Generator().manual_seed(0)).texts
    said = [(kind, word == photo.truth[kind]) for photo, text in zip(subjects, texts) for kind, word in claims(text)]
    true, false = [], {kind: [] for kind in ATTRIBUTES}
    for photo in subjects:
        told = rng.sample(list(SAID), rng.randint(0, 6))
        true.append((photo, ". ".join(sentence(photo.truth, told))))
        for kind in ATTRIBUTES:
            told = {kind, *rng.sample(list(SAID), rng.randint(0, 5))}
            lie = photo.truth | {kind: rng.choice([word for word in ATTRIBUTES[kind] if word != photo.truth[kind]])}
            false[kind].append((photo, ". ".join(sentence(lie, told))))
    accepts = lambda pairs: (mllm.listen(pairs) > .5).float().mean().item()
    card = {"well formed": sum(parse(text) is not None for text in texts) / photos, "accepts a true description": accepts(true)}
    print(f"{photos} fresh photos; answers well formed {card['well formed']:.1%}; "
          f"true descriptions accepted {card['accepts a true description']:.1%}\n"
          f"{'':10}{'says it right':>15}{'catches it as the one false claim':>36}")
    for kind in ATTRIBUTES:
        right = [ok for k, ok in said if k == kind]
        card[kind] = (sum(right) / max(1, len(right)), 1 - accepts(false[kind]))
        print(f"{kind:10}{card[kind][0]:>15.1%}{card[kind][1]:>36.1%}")
    return card


def build(folder, pictures, vision_steps, language_steps):
    """Draw the pictures, train the tower, freeze it, train the language model, and save an ordinary checkpoint folder in 16 bit."""
    torch.manual_seed(0)
    with multiprocessing.Pool() as pool:
        drawn = list(tqdm(pool.imap(new_photo, range(pictures), chunksize=100), total=pictures, desc="drawing"))
    photos = [Photo(f"bank/{i}", functools.partial(Image.fromarray, picture), truth) for i, (picture, truth) in enumerate(drawn)]
    tokenizer = new_tokenizer()
    model = new_model(tokenizer)
    model.model.language_model.embed_tokens.weight.data.mul_(15)  # a word of size .02 drowns in what the layers add: names were never copied
    processor = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2, min_pixels=SIDE ** 2, max_pixels=(9 * SIDE // 4) ** 2)
    if vision_steps:
        fit_vision(model, processor, photos, vision_steps)
    else:
        made = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        model.model.visual.load_state_dict(made.model.visual.state_dict())
    model.model.visual.requires_grad_(False)
    rng = random.Random(1)
    scenes = [new_scene(photos, rng) for _ in range(pictures // 4)]
    encode = lambda some, tokens: torch.cat([tower(model, processor, some[i:i + 64]).unflatten(0, (-1, tokens)).half()
                                             for i in tqdm(range(0, len(some), 64), desc="encoding")])  # [pictures, tokens, WIDTH]
    taught = model, tokenizer, Bank(photos, [(things, boxes) for things, _, boxes in scenes], encode(photos, 16),
                                    encode([scene for _, scene, _ in scenes], 81))
    fit_language("2/3 the language model learns to speak, to listen and to answer", *taught, language_steps)
    fit_language("3/3 ... and to call a thing by its whole name", *taught, max(1, 3 * language_steps // 4), peak=.5, whole_names=True)
    for part in (model.half(), tokenizer, processor):
        part.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", action="store_true", help="do not train, only print the report card of the checkpoint in --out")
    parser.add_argument("--out", type=pathlib.Path, default=FOLDER, metavar="DIR", help="checkpoint folder (default toy-qwen2-vl)")
    parser.add_argument("--pictures", type=int, default=40_000, metavar="INT", help="pictures to draw and learn from, and a quarter as many scenes of them (default 40000)")
    parser.add_argument("--vision-steps", type=int, default=6000, metavar="INT",
                        help="training steps, of 16 pictures and 6 scenes, for the vision tower (default 6000); 0 keeps the tower that is in --out")
    parser.add_argument("--language-steps", type=int, default=2400, metavar="INT",
                        help="training steps, of 24 pictures, for the language model, and three quarters as many with whole names (default 2400)")
    args = parser.parse_args()
    if not args.card:
        build(args.out, args.pictures, args.vision_steps, args.language_steps)
    import rrg  # it imports this file, so only now: the report card is taken with the very code that plays the game

    report_card(rrg.MLLM(args.out, SIDE ** 2))
