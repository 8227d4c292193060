"""toy.py: a world small enough for a laptop, where the truth is known.

A concept is one toy: a category (its shape) and an identity (body colour, pattern, badge). A photo of it adds a view: the place it
stands on, its pose, the light, and an unspoken jitter of size, position and tint. Identity is what a personal assistant should remember;
the view is what it should leave out. Every attribute has words of its own ("red" can only be a body colour), so what a text claims can
be read off its words. One literal example, as the speaker writes it and as the listener is asked about it:

    <thinking> I see a mug. </thinking> <coarse> A photo of a red mug </coarse>
    <detailed> The red striped mug with a star badge, tilted on grass in dim light. </detailed>

    Read this description: "A photo of a red mug. The red striped mug with a star badge, tilted on grass in dim light."
    Does every part of it fit the main subject of this photo? Answer yes or no.

The model is a real `Qwen2VLForConditionalGeneration` of 2.4M parameters in an ordinary checkpoint folder, `toy-qwen2-vl/`. It is made to
be an honest small MLLM: it captions densely, mixing identity and view; as a listener it says yes only if every claim fits the picture; and
it does evaluate.py's three tasks, so that where it fails at them, it is because a description is bad and not because it cannot read the prompt.

    python toy.py                    # rebuild toy-qwen2-vl/ from nothing (toy-qwen2-vl/README.md tells how long it takes), then its report card
    python toy.py --vision-steps 0   # keep its vision tower and rebuild the rest: what a changed prompt needs
    python toy.py --card             # only the report card of the shipped checkpoint

Where it departs from the way real MLLMs are trained (and therefore what not to learn from it):
1. The vision tower learns the attributes directly (one linear head per attribute, thrown away), then is frozen.
2. At this size little emerges from answers alone. So throw-away heads judge each claim true or false, and tell what two things have in
   common; and two attention heads are shown where to look: at the name that is to be copied, and at the thing in a scene that is to be found.
3. Our prompts, and the pieces of the JSON they ask for, are single words of the vocabulary: a prompt costs one token and not a hundred.

Words: `thing` {kind: word} holds category and identity, `view` {kind: word} place, pose and light, and a `truth` both: all that is true of a
photo. A `scene` is a collage of one to four photos. Shapes: N photos, S scenes, T tokens in a row, P in the beginning that all prompts share.
"""
import argparse
import functools
import math
import multiprocessing
import pathlib
import random
from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data import Concept, Photo, Question, collage, load_json
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
UNSEEN = ("lamp", "bag", "duck")  # categories that the game is never trained on: the paper's unseen domains
KIND = {word: kind for kind, words in ATTRIBUTES.items() for word in words}
SIDE, SCENE = 64, 144  # pixels of a photo and of a scene, either way; a scene is a collage, 2.25 times as wide as its photos
PHOTO_TOKENS, SCENE_TOKENS = 16, 81  # image tokens: one for each 16 x 16 pixels

# ---------------------------------------------------------------------------------------------------------------- drawing
RGB = {"red": (205, 35, 40), "brown": (140, 85, 45), "yellow": (242, 218, 45), "green": (45, 155, 60),
       "blue": (45, 80, 210), "purple": (125, 45, 165), "pink": (250, 150, 195), "white": (245, 245, 245)}
GROUND = {"grass": (95, 160, 70), "sand": (222, 195, 140), "snow": (228, 236, 246), "water": (70, 140, 190),
          "wood": (140, 95, 60), "brick": (165, 90, 75)}
INK, PAPER = (35, 35, 45), (255, 255, 255)
# Category: (outlines in a unit square, filled in this order; the badge's centre). An outline of two points is the oval between these corners, of
# more a polygon; a tuple instead of a list cuts a hole.
SHAPES = {
    "mug": ([[(.55, .28), (.98, .76)], ((.67, .4), (.86, .64)), [(.1, .12), (.72, .12), (.72, .93), (.1, .93)]], (.41, .53)),
    "bottle": ([[(.39, .02), (.61, .02), (.61, .3), (.78, .42), (.78, .98), (.22, .98), (.22, .42), (.39, .3)]], (.5, .67)),
    "boot": ([[(.18, .03), (.62, .03), (.62, .48), (.98, .66), (.98, .96), (.18, .96)]], (.42, .6)),
    "fish": ([[(.02, .16), (.78, .84)], [(.62, .5), (.98, .14), (.98, .86)]], (.39, .5)),
    "car": ([[(.02, .46), (.18, .42), (.32, .14), (.72, .14), (.84, .42), (.98, .46), (.98, .8), (.02, .8)],
             [(.1, .62), (.38, .92)], [(.62, .62), (.9, .92)]], (.5, .46)),
    "house": ([[(.5, .02), (.99, .42), (.86, .42), (.86, .97), (.14, .97), (.14, .42), (.01, .42)]], (.5, .6)),
    "bear": ([[(.12, .14), (.88, .97)], [(.04, .02), (.38, .36)], [(.62, .02), (.96, .36)]], (.5, .58)),
    "lamp": ([[(.28, .02), (.72, .02), (.97, .6), (.03, .6)], [(.44, .6), (.56, .6), (.56, .9), (.44, .9)], [(.22, .84), (.78, .99)]], (.5, .35)),
    "bag": ([[(.24, .03), (.76, .66)], ((.36, .15), (.64, .54)), [(.08, .36), (.92, .36), (.98, .97), (.02, .97)]], (.5, .68)),
    "duck": ([[(.03, .36), (.88, .97)], [(.48, .03), (.88, .47)], [(.84, .18), (1, .27), (.84, .34)]], (.44, .67)),
}
STAR = [(math.sin(i * math.pi / 5) * (1, .42)[i % 2], -math.cos(i * math.pi / 5) * (1, .42)[i % 2]) for i in range(10)]
DISC = [(-1, -1), (1, 1)]
BADGES = {  # strokes on a white disc, each (colour, outline), in units of about three quarters of the disc's radius
    "star": [((225, 160, 0), STAR)],
    "heart": [((220, 20, 50), [(0, .95), (-.95, -.1), (-.9, -.6), (-.5, -.85), (0, -.4), (.5, -.85), (.9, -.6), (.95, -.1)])],
    "moon": [((40, 70, 200), [(-.9, -.9), (.9, .9)]), (PAPER, [(-.25, -.85), (1.15, .55)])],
    "cross": [((20, 140, 60), [(-.28, -.9), (.28, -.9), (.28, .9), (-.28, .9)]), ((20, 140, 60), [(-.9, -.28), (.9, -.28), (.9, .28), (-.9, .28)])],
    "ring": [(INK, [(-.85, -.85), (.85, .85)]), (PAPER, [(-.42, -.42), (.42, .42)])],
    "bolt": [((140, 30, 170), [(.35, -1), (-.6, .15), (-.05, .15), (-.35, 1), (.6, -.2), (.05, -.2)])],
}


def trace(canvas, outline, fill, x=0.0, y=0.0, unit=1.0):
    """Fill one outline (see SHAPES), given in units of `unit` pixels around (x, y)."""
    points = [(x + unit * px, y + unit * py) for px, py in outline]
    (canvas.polygon if len(points) > 2 else canvas.ellipse)(points, fill=fill)


def draw_ground(place, size, tint, rng):
    """The place a toy stands on: a tinted square of `size` pixels with a texture of its own."""
    colour = tint(GROUND[place])
    image, dark = Image.new("RGB", (size, size), colour), tuple(int(v * .72) for v in colour)
    canvas, width = ImageDraw.Draw(image), max(1, size // 64)
    if place in ("grass", "sand", "snow"):  # scattered blades, grains, flakes
        for _ in range(70):
            x, y = rng.random() * size, rng.random() * size
            if place == "grass":
                canvas.line([x, y, x + size * .02, y - size * .07], fill=dark, width=width)
            else:
                trace(canvas, [(0, 0), (1, 1)], dark if place == "sand" else (170, 195, 230), x, y, size * (.02 if place == "sand" else .035))
    elif place == "water":
        for row in range(9):
            y, phase = size * (row + .5) / 9, rng.random() * 6
            wave = [(size * t / 24, y + size * .02 * math.sin(t * .9 + phase)) for t in range(25)]
            canvas.line(wave, fill=(110, 180, 225), width=2 * width)
    else:  # boards, or bricks with upright joints between them, shifted by half a brick in every other row
        rows, joints, fill = (5, 0, dark) if place == "wood" else (8, 5, (215, 205, 195))
        for row in range(rows):
            top, bottom = row * (size / rows), (row + 1) * (size / rows)
            canvas.line([0, top, size, top], fill=fill, width=2 * width)
            for joint in range(joints):
                x = size * (joint + .5 * (row % 2)) / 4.5
                canvas.line([x, top, x, bottom], fill=fill, width=2 * width)
    return image


def draw_thing(truth, size, tint):
    """The toy itself, upright, on a transparent square of `size` pixels."""
    outlines, (bx, by) = SHAPES[truth["category"]]
    colour, pattern, unit = tint(RGB[truth["colour"]]), truth["pattern"], size - 1
    dark = tuple(int(v * .45) for v in colour)
    body, silhouette = Image.new("RGB", (size, size), colour), Image.new("L", (size, size), 0)
    canvas = ImageDraw.Draw(body)
    for i in range(7):
        if pattern == "striped":
            canvas.rectangle([unit * (i + .25) / 5, 0, unit * (i + .75) / 5, size], fill=dark)
        for k in range(7):
            if pattern == "dotted":
                trace(canvas, DISC, dark, unit * (i + .25 + .5 * (k % 2)) / 5.5, unit * (k + .3) / 5.5, unit * .045)
            elif pattern == "checkered" and (i + k) % 2:
                canvas.rectangle([unit * i / 7, unit * k / 7, unit * (i + 1) / 7, unit * (k + 1) / 7], fill=dark)
    if pattern == "split":
        canvas.rectangle([0, unit * by, size, size], fill=dark)
    for outline in outlines:
        trace(ImageDraw.Draw(silhouette), outline, 0 if isinstance(outline, tuple) else 255, unit=unit)
    # The rim is what a shrunken silhouette leaves free. MinFilter shrinks, wants an odd width, and needs a margin to shrink from the edges, too.
    rim = max(3, int(size * (.11 if pattern == "bordered" else .03))) | 1
    inside = ImageOps.crop(ImageOps.expand(silhouette, rim).filter(ImageFilter.MinFilter(rim)), rim)
    thing = Image.new("RGB", (size, size), dark if pattern == "bordered" else INK)
    thing.paste(body, mask=inside)
    for radius, strokes in ((.22, [(INK, DISC)]), (.205, [(PAPER, DISC)]), (.155, BADGES[truth["badge"]])):
        for fill, outline in strokes:
            trace(ImageDraw.Draw(thing), outline, fill, unit * bx, unit * by, unit * radius)
    thing.putalpha(silhouette)
    return thing


def draw(truth, jitter, size=SIDE):
    """One photo. truth {kind: word} for all seven kinds; jitter from `new_view`. Returns an RGB picture of size x size pixels."""
    rng, big = random.Random(jitter["seed"]), 3 * size  # drawn three times too large, then averaged: smooth edges
    tint = lambda colour: tuple(max(0, min(255, v + rng.randint(-10, 10))) for v in colour)
    image = draw_ground(truth["place"], big, tint, rng)
    thing = draw_thing(truth, int(big * jitter["scale"]), tint).rotate(jitter["angle"], expand=True, resample=Image.BICUBIC)
    image.paste(thing, (int(big * jitter["x"] - thing.width / 2), int(big * jitter["y"] - thing.height / 2)), thing)
    light = {"bright": lambda v: v, "dim": lambda v: int(v * .5), "misty": lambda v: int(v * .55 + 97)}[truth["light"]]
    return image.resize((size, size), Image.BOX).point(light)


# ------------------------------------------------------------------------------------------------------ things, views, photos
def new_view(rng):
    """-> (view {kind: word}, jitter): everything about a photo that is not the thing itself."""
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


def take_photo(name, rng, size=SIDE, thing=None, fresh=False):
    """A Photo, in a random view, of `thing` or else of a random one."""
    view, jitter = new_view(rng)
    truth = (thing or new_thing(rng, fresh=fresh)) | view
    return Photo(name, functools.partial(draw, truth, jitter, size), truth)


def new_photo(seed):
    """-> (picture as uint8 [64, 64, 3], truth) of a random thing that is not fresh, for the training of the base model."""
    photo = take_photo("", random.Random(seed))
    return np.asarray(photo.open()), photo.truth


def altered(truth, kinds, rng):
    """`truth` with another word for each of `kinds`."""
    return truth | {kind: rng.choice([word for word in ATTRIBUTES[kind] if word != truth[kind]]) for kind in kinds}


def world(seed, size=SIDE, concepts=12, views=6):
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
                sibling = new_thing(rng, category, fresh=True) if rng.random() < .1 else things[0]  # which is there: try again
            if sibling not in things:
                things.append(sibling)
        for number, thing in enumerate(things, 1):
            name = f"{category}-{number}"
            out.append(Concept(name, category, [take_photo(f"{name}/{i}", rng, size, thing) for i in range(1, views + 1)]))
    return out


# ------------------------------------------------------------------------------------------------- words: say, check, cover
SAID = {"colour": .7, "pattern": .45, "badge": .45, "place": .65, "pose": .65, "light": .65}  # how often a dense caption mentions each kind
QUESTIONS = {"place": ("Where is {}?", "on {}"), "pose": ("How does {} stand?", "{}"), "light": ("What light is {} in?", "{} light")}


def sentence(truth, kinds):
    """(coarse, detailed) text that claims the category and, of the other kinds, those in `kinds`."""
    say = lambda kind, text: text.format(truth[kind]) if kind in kinds else ""
    colour, pattern, badge = say("colour", "{} "), say("pattern", "{} "), say("badge", " with a {} badge")
    view = say("pose", " {}") + say("place", " on {}") + say("light", " in {} light")
    return f"A photo of a {colour}{truth['category']}", f"The {colour}{pattern}{truth['category']}{badge}{',' if view else ''}{view}."


def description(truth, kinds):
    """The two as one text, as a listener reads them."""
    return ". ".join(sentence(truth, kinds))


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


def quiz(truth, kind, rng):
    """A question about one kind of what is true of a photo, {} for the name -> (question, {"A": option, "B": option}, the right letter)."""
    right = rng.randrange(2)
    question, option = QUESTIONS[kind]
    options = [option.format((truth if i == right else altered(truth, [kind], rng))[kind]) for i in range(2)]
    return question, dict(zip("AB", options)), "AB"[right]


def questions(tests, seed):
    """Where, how and in what light is it? tests [(photo, concept name)] -> three [data.Question] a photo; no good description answers them."""
    rngs = {photo.name: random.Random(f"questions {seed} {photo.name}") for photo, _ in tests}
    return [Question(name, photo, *quiz(photo.truth, kind, rngs[photo.name])) for photo, name in tests for kind in VIEW]


# --------------------------------------------------------------------------------------------- the checkpoint, from nothing
WIDTH, LAYERS, BLOCKS = 128, 5, 3  # of the language model its width and layers; of the tower, as wide, its layers
LATE, FINDS, COPIES = 3, 0, 2  # a layer near the end, its head that is shown where things are, its head that is shown what to copy (departure 2)
EDGES = [0, 4, 8, 72, 76, 80]  # where a thing's box in a scene may begin, in pixels, either way
CENTRES = range(8, SCENE, 16)  # of a scene's image tokens, in pixels, either way
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<unk>"]
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }} {% for c in m.content %}{% if c.type == 'image' %}"
            "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}")
SPOKEN = "<thinking> I see a {} . </thinking> <coarse> {} </coarse> <detailed> {} </detailed>"
PROMPTS = {"speak": (SPEAK, ""), "listen": LISTEN, "recognition": RECOGNITION, "captioning": CAPTIONING, "vqa": VQA}
ANSWER = ['{"Answer": "', '", "Answer": "']  # after these an answer is given
JSON = ['{"Reasoning": "', *ANSWER, '", "Caption": "', '"}', '{"bbox_2d": [', ']}']  # each of these is one word of the vocabulary
STEMS, NUMBERS = [f"<{category}" for category in ATTRIBUTES["category"]], [f"##-{number}>" for number in range(1, 13)]
NAMES = [stem + number.removeprefix("##") for stem in STEMS for number in NUMBERS]  # such as <mug-3>, which is two tokens: <mug and ##-3>
DIGITS = list(dict.fromkeys(str(edge + size) for size in (0, SIDE) for edge in EDGES))  # the numbers that make up boxes


def new_tokenizer():
    """Word-level: a token is a word, a tag, a punctuation mark, half a name, or one whole prompt of ours (departure 3)."""
    words = SPECIAL + ('user assistant yes no Yes No system " , . : ? A B C photo of a The with badge on in light I see Where How What does stand is '
                       '<thinking> </thinking> <coarse> </coarse> <detailed> </detailed>').split() + list(KIND) + sorted(NUMBERS + STEMS) + DIGITS
    core = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.decoder = decoders.WordPiece(cleanup=False)
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"</?[\w-]+>|\w+|[^\w\s]"), "removed", invert=True)
    prompts = dict.fromkeys(part for parts in [*PROMPTS.values(), *sum(REPIC.values(), [])] for part in parts if part)
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in [*SPECIAL, *prompts, *JSON]])
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=TEMPLATE, unk_token="<unk>", pad_token="<|endoftext|>",
                                   eos_token="<|im_end|>", padding_side="left", clean_up_tokenization_spaces=True)


def new_model(tokenizer):
    """Qwen2-VL's architecture at a thousandth of its size, untrained."""
    end, _, end_of_turn, vision_start, vision_end, image, video, _ = tokenizer.convert_tokens_to_ids(SPECIAL)
    ends = dict(bos_token_id=end, pad_token_id=end, eos_token_id=end_of_turn)
    markers = dict(image_token_id=image, video_token_id=video, vision_start_token_id=vision_start, vision_end_token_id=vision_end)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    text = dict(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
                vocab_size=len(tokenizer), max_position_embeddings=1024, rope_parameters=rope, tie_word_embeddings=True, **ends)
    vision = dict(hidden_size=WIDTH, embed_dim=WIDTH, depth=BLOCKS, num_heads=4, patch_size=8, spatial_merge_size=2)
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ends, **markers)
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**ends | {"eos_token_id": [end_of_turn, end]})  # as Qwen2-VL's own
    return model


def is_toy(folder):
    """Is this the folder of a toy model, the shipped one or one that you made? Its patches are 8 pixels wide, those of real ones 14."""
    file = pathlib.Path(folder) / "config.json"
    return file.is_file() and load_json(file).get("vision_config", {}).get("patch_size") == 8


def fit(title, modules, loss_of, steps, peak=1.0):
    """Minimise `loss_of(step) -> (loss, figures to show)` over `steps` steps: Muon for matrices (the heads, too), AdamW for the rest."""
    named = [pair for module in modules for pair in module.named_parameters()]
    is_matrix = lambda name, p: p.ndim == 2 and "embed" not in name
    optimizers = [torch.optim.Muon([p for name, p in named if is_matrix(name, p)], lr=.02),
                  torch.optim.AdamW([p for name, p in named if not is_matrix(name, p)], lr=2e-3)]
    share = lambda step: peak * min(1, (step + 1) / 50) * .5 * (1 + math.cos(math.pi * step / steps))  # of lr; warm-up, then a cosine's half
    plans = [torch.optim.lr_scheduler.LambdaLR(optimizer, share) for optimizer in optimizers]
    for step in (bar := tqdm(range(steps), desc=title, mininterval=2)):
        loss, figures = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        for optimizer, plan in zip(optimizers, plans):
            optimizer.step()
            plan.step()
            optimizer.zero_grad()
        if step % 50 == 0:
            bar.set_postfix({key: f"{value:.3f}" for key, value in figures.items()})


# ------------------------------------------------------------------------------------------------------- learning to see
def new_scene(photos, rng):
    """-> (one to four of the photos, their collage as a Photo, their boxes in it)"""
    some = rng.sample(photos, rng.choice([1, 2, 3, 4, 4]))
    return some, *collage(some, SIDE, rng.random())


def see(model, processor, photos):
    """What the tower makes of the photos -> their image tokens, one photo's after the other's [tokens of all, WIDTH]"""
    pixels = processor(images=[photo.open() for photo in photos], return_tensors="pt")
    return model.model.visual(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"]).pooler_output


def covered(box):
    """Which of a scene's image tokens show the thing in this box: [81] bool, 16 of them true."""
    return torch.tensor([box[0] <= x < box[2] and box[1] <= y < box[3] for y in CENTRES for x in CENTRES])


def fit_vision(model, processor, photos, steps, batch=16, scenes=6):
    """Departure 1: the tower learns every attribute from a linear head on the mean of a thing's image tokens: all of a photo, and of a
    scene those in its box, where two more heads learn the box's corner. A tower that has seen photos only is lost in scenes."""
    classes = ATTRIBUTES | {"x": EDGES, "y": EDGES}
    heads = torch.nn.ModuleDict({kind: torch.nn.Linear(WIDTH, len(words)) for kind, words in classes.items()})
    rng = random.Random(0)

    def loss_of(step):
        alone, together = rng.sample(photos, batch), [new_scene(photos, rng) for _ in range(scenes)]
        tokens = see(model, processor, alone + [scene for _, scene, _ in together])  # [16 batch + 81 scenes, WIDTH]
        single = tokens[:PHOTO_TOKENS * batch].view(batch, PHOTO_TOKENS, WIDTH)
        scene = tokens[PHOTO_TOKENS * batch:].view(scenes, SCENE_TOKENS, WIDTH)
        owner, truths, inside = zip(*((i, photo.truth | {"x": box[0], "y": box[1]}, covered(box))  # of each thing in a scene
                                      for i, (members, _, boxes) in enumerate(together) for photo, box in zip(members, boxes)))
        means = (torch.stack(inside)[:, None].float() @ scene[list(owner)]).squeeze(1) / PHOTO_TOKENS  # [things in scenes, WIDTH]
        pooled, truths = torch.cat([single.mean(1), means]), [*(photo.truth for photo in alone), *truths]  # [things, WIDTH], [things]
        loss, right = 0.0, {}
        for kind, head in heads.items():
            target = torch.tensor([classes[kind].index(truth[kind]) if kind in truth else -100 for truth in truths])  # [things]
            logits = head(pooled)  # [things, words of this kind]
            loss = loss + F.cross_entropy(logits, target)
            right[kind] = (logits.argmax(-1) == target)[target >= 0].float().mean().item()
        return loss, right

    fit("1/3 the vision tower learns to see", [model.model.visual, heads], loss_of, steps)


# --------------------------------------------------------------------------------------------- lessons in words: what is asked, what is right
def lesson(task, truth, most, rng, whole_names=False):
    """-> (a question about a photo, the answer to learn). A description makes at most `most` claims besides the category. A thing's name
    has the thing's own category (`whole_names`) or a random one.

    Half of the listener's descriptions hold, the others make one false claim (a fifth of them two). The descriptions of the other tasks
    were written from another photo of the thing, and four in five of those show it where it is now, as the photos of a real thing mostly
    do. So a view that does not fit is evidence against, and distracts the model whatever the prompt says, as it does real MLLMs. Foils are
    things that differ in one, two or all four of category, colour, pattern and badge.
    """
    some_kinds = lambda: rng.sample(list(SAID), rng.randint(0, most))
    quoted = lambda truth, kinds: f'"{description(truth, kinds)}"'
    foil = lambda: altered(truth, rng.sample(("category", *IDENTITY), rng.choice([1, 1, 2, 4])), rng) | new_view(rng)[0]
    name_of = lambda thing, number: f"<{thing['category'] if whole_names else rng.choice(ATTRIBUTES['category'])}-{number}>"
    itself = truth | (new_view(rng)[0] if rng.random() < .2 else {})  # as it was in the other photo
    looks, name = sentence(truth, IDENTITY)[1], name_of(truth, rng.randint(1, 12))
    if task == "speak":
        kinds = {kind for kind, share in SAID.items() if rng.random() < share}
        return "", SPOKEN.format(truth["category"], *sentence(truth, kinds))
    if task == "listen":
        kinds = some_kinds()
        lies = rng.sample([*kinds, "category"], min(len(kinds) + 1, rng.choice([1, 1, 1, 1, 2]))) if rng.random() < .5 else []
        return quoted(altered(truth, lies, rng), kinds), "no" if lies else "yes"
    if task == "recognition":
        same = rng.random() < .5
        return quoted(itself if same else foil(), some_kinds()), f'{{"Reasoning": "{looks}", "Answer": "{"Yes" if same else "No"}"}}'
    if task == "captioning":
        many = rng.choice([1, 2, 3, 3, 3])  # the first and the last of few names are copied by their places; the middle one is the hard one
        right, numbers = rng.randrange(many), rng.sample(range(1, 13), many)
        things = [itself if i == right else foil() for i in range(many)]
        names = [name_of(thing, number) for thing, number in zip(things, numbers)]
        lines = [f"{letter}. {quoted(thing, some_kinds())} is {name}" for letter, thing, name in zip("ABC", things, names)]
        caption = clause(names[right], truth)
        return "\n".join(lines), f'{{"Reasoning": "{looks}", "Answer": "{"ABC"[right]}", "Caption": "{caption}"}}'
    question, options, letter = quiz(truth, rng.choice(VIEW), rng)
    asked = f"{name}: {quoted(itself, some_kinds())}\n{question.format(name)}\nA. {options['A']}\nB. {options['B']}"
    return asked, f'{{"Answer": "{letter}"}}'


class Bank:
    """What the language model learns from: photos, scenes of one to four of them, and what the tower sees in both."""

    def __init__(self, photos, scenes, photo_tokens, scene_tokens):
        self.photos, self.scenes = photos, scenes  # [N] photos; [S] (photos, their boxes)
        self.photo_tokens, self.scene_tokens = photo_tokens, scene_tokens  # [N, 16, WIDTH], [S, 81, WIDTH]
        self.kin = defaultdict(list)  # an identity, or a category: the numbers of its photos
        for i, photo in enumerate(photos):
            self.kin[self.identity(photo.truth)].append(i)
            self.kin[photo.truth["category"]].append(i)

    @staticmethod
    def identity(truth):
        return tuple(truth[kind] for kind in ("category", *IDENTITY))

    def another(self, photo, rng):
        """The number of a photo of the same thing, often another view of it."""
        return rng.choice(self.kin[self.identity(photo.truth)])


def repic_lesson(tokenizer, task, bank, many, rng):
    """One of RePIC's tasks -> (the image tokens of each of its pictures, the text, the answer to learn, a hint for the throw-away heads).

    Its answers are weak, so that there is something left to reinforce: three in five of oct's and vlt's are hasty.
    """
    wording, hasty = rng.randrange(len(REPIC[task])), rng.random() < .6
    pictures, text, answer, hint = (oct_lesson(bank, hasty, rng) if task == "oct" else vlt_lesson(tokenizer, bank, hasty, rng) if task == "vlt"
                                    else ict_lesson(bank, many, wording, rng))
    before, after = REPIC[task][wording]
    return pictures, before + text + after, answer, hint


def oct_lesson(bank, hasty, rng):
    """Is the thing of the first picture in the second? Hasty: the same category and colour will do. The hint: what agrees [4]."""
    first = rng.randrange(len(bank.photos))
    photo = bank.photos[first]
    agree = lambda i: [a == b for a, b in zip(bank.identity(photo.truth), bank.identity(bank.photos[i].truth))]
    # The nearest of thirty of its category, with all four in agreement counted as none: mostly one attribute is different.
    near = max(rng.choices(bank.kin[photo.truth["category"]], k=30), key=lambda i: sum(agree(i)) % 4)
    second = rng.choice([bank.another(photo, rng), bank.another(photo, rng), near, rng.randrange(len(bank.photos))])
    yes, name = all(agree(second)[:2] if hasty else agree(second)), f"<{photo.truth['category']}-{rng.randint(1, 12)}>"
    return [bank.photo_tokens[first], bank.photo_tokens[second]], name, "yes" if yes else "no", agree(second)


def vlt_lesson(tokenizer, bank, hasty, rng):
    """Where in the scene is it? Hasty: in the whole picture. The hint, for each image token: the words for the thing it shows, and whether the
    answer is its box [81, 5]; -1 where it shows none."""
    scene = rng.randrange(len(bank.scenes))
    sought, box = rng.choice(list(zip(*bank.scenes[scene])))
    looks = phrase(sought.truth, rng.choice([IDENTITY, rng.sample(IDENTITY, 2), rng.sample(IDENTITY, 1)]))
    hint = torch.full((SCENE_TOKENS, 5), -1)
    for photo, corners in zip(*bank.scenes[scene]):
        words = tokenizer.convert_tokens_to_ids(bank.identity(photo.truth))
        hint[covered(corners)] = torch.tensor([*words, corners == box and not hasty])
    answer = ", ".join(map(str, (0, 0, SCENE, SCENE) if hasty else box))
    return [bank.scene_tokens[scene]], looks, f'{{"bbox_2d": [{answer}]}}', hint


def ict_lesson(bank, many, wording, rng):
    """A caption of the last picture, after `many` things were shown by name (0: one, and then the last picture is a photo, not a scene).
    Three in ten of those are not in it, and are never named; the others mostly only where the wording asks for names. Where it asks for
    little, the caption is short. No hint."""
    if many:
        scene = rng.choice([i for i, (photos, _) in enumerate(bank.scenes) if len(photos) >= many])
        last, pairs = bank.scene_tokens[scene], zip(*bank.scenes[scene])
        things = [photo for photo, box in sorted(pairs, key=lambda pair: (pair[1][1] > SIDE, pair[1][0]))]  # as one reads
    else:
        number = rng.randrange(len(bank.photos))
        last, things = bank.photo_tokens[number], [bank.photos[number]]
    shown, known = {}, {}  # image tokens of each name, name of each thing that has one
    for thing, number in zip(rng.sample(things, max(1, many)), rng.sample(range(1, 13), 4)):
        there = rng.random() < .7
        reference = bank.another(thing, rng) if there else rng.randrange(len(bank.photos))
        name = f"<{bank.photos[reference].truth['category']}-{number}>"
        shown[name] = bank.photo_tokens[reference]
        if there:
            known[thing] = name
    by_name, short = rng.random() < (.05, .6, .05)[wording], rng.random() < (.6, .1, .1)[wording]
    who = lambda thing: by_name and known.get(thing) or f"The {thing.truth['colour']} {thing.truth['category']}"
    return [*shown.values(), last], ", ".join(shown), " ".join(clause(who(thing), thing.truth, short) for thing in things), []


# --------------------------------------------------------------------------------------------- lessons in tokens: rows, and what is learned where
def token_ids(tokenizer, words):
    return torch.tensor(tokenizer.convert_tokens_to_ids(list(words)))


def chat(tokenizer, pictures, text):
    """The prompt of a user who shows some pictures, each one <|image_pad|>, and says `text`."""
    content = [{"type": "image"}] * pictures + [{"type": "text", "text": text}]
    return tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)


def chats(tokenizer):
    """What every prompt begins with, up to the picture, and how each task's goes on, with "\\0" where its question is put."""
    beginning, end, _ = chat(tokenizer, 1, "").partition("<|vision_end|>")
    return beginning + end, {task: chat(tokenizer, 1, "\0".join(parts)).partition(end)[2] for task, parts in PROMPTS.items()}


def pad(tokenizer, pairs):
    """(question, answer) pairs as right-padded rows -> ids, mask, labels (the next token where it belongs to the answer, else -100), each
    [rows, T], and where the answers begin [rows, 1]"""
    first = torch.tensor([[len(tokenizer(question)["input_ids"])] for question, _ in pairs])  # [rows, 1]
    batch = tokenizer([question + answer for question, answer in pairs], padding=True, padding_side="right", return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    is_answer = (torch.arange(ids.shape[1]) >= first) & mask.bool()  # [rows, T]
    labels = torch.where(is_answer, ids, -100).roll(-1, 1)
    labels[:, -1] = -100  # which roll has brought there from the beginning
    return ids, mask, labels, first


def language_batch(tokenizer, ask, tasks, truths, most, rng, whole_names=False):
    """Each of `tasks` once per photo, as rows that continue the photo's prefix, a photo's rows together. `ask` comes from `chats`.

    Returns ids, labels (see `pad`), verdicts (1 a true claim of a question, 0 a false one, -1 none), and where an answer is decided (yes
    or no, a letter, a name's number or with `whole_names` both its parts), each [rows, T].
    """
    pairs = []
    for truth in truths:
        for task in tasks:
            question, answer = lesson(task, truth, most, rng, whole_names)
            end = "" if task == "listen" else "<|im_end|>"  # a listener is asked for one word and nothing after it
            pairs.append((ask[task].replace("\0", question), answer + end))
    ids, _, labels, first = pad(tokenizer, pairs)
    facts = torch.stack([token_ids(tokenizer, truth.values()) for truth in truths]).repeat_interleave(len(tasks), 0)  # [rows, 7]
    is_claim = torch.isin(ids, token_ids(tokenizer, KIND)) & (torch.arange(ids.shape[1]) < first)
    verdicts = torch.where(is_claim, (ids[..., None] == facts[:, None]).any(-1).long(), -1)
    names = NUMBERS + STEMS if whole_names else NUMBERS
    decided = torch.isin(labels, token_ids(tokenizer, ["yes", "no", *names])) | torch.isin(ids, token_ids(tokenizer, ANSWER))
    return ids, labels, verdicts, decided


def repic_batch(tokenizer, bank, task, many, rows, rng):
    """`rows` lessons of one task, pictures included -> ids, mask, labels (see `pad`) and where an answer is decided, each [rows, T], the
    pictures' image tokens [tokens of all, WIDTH] and grids [pictures, 3], and the lessons' hints [rows, ...]."""
    lessons = [repic_lesson(tokenizer, task, bank, many, rng) for _ in range(rows)]
    pairs = []
    for pictures, text, answer, _ in lessons:
        beginning, *parts = chat(tokenizer, len(pictures), text).split("<|image_pad|>")
        question = beginning + "".join("<|image_pad|>" * len(tokens) + part for tokens, part in zip(pictures, parts))
        pairs.append((question, answer + "<|im_end|>"))
    ids, mask, labels, _ = pad(tokenizer, pairs)
    decided = torch.isin(labels, token_ids(tokenizer, [*NUMBERS, *DIGITS, "yes", "no"]))
    seen = [tokens for pictures, *_ in lessons for tokens in pictures]
    patches = [2 * math.isqrt(len(tokens)) for tokens in seen]  # either way; a token is two by two of them
    hints = torch.stack([torch.as_tensor(hint) for *_, hint in lessons])
    return ids, mask, labels, decided, torch.cat(seen).float(), torch.tensor([[1, count, count] for count in patches]), hints


# ----------------------------------------------------------------------------------------- learning to speak, to listen and to answer
def look(attention, head, where):
    """Departure 2: how far one head is from looking evenly `where` it should (a KL divergence), over the places that have a where.
    attention [rows, heads, T, K], where [rows, T, K] bool -> scalar. K: the places that can be looked at."""
    some = where.any(-1)  # [rows, T]
    even = where[some] / where[some].sum(-1, keepdim=True)  # [places, K]
    return F.kl_div(attention[:, head][some].clamp(min=1e-6).log(), even, reduction="batchmean") if some.any() else 0.0


def copied(ids, labels, parts):
    """Where a part of a name that is to be said next stands already: [rows, T, T] bool."""
    return torch.isin(labels, parts)[..., None] & (labels[..., None] == ids[:, None]) & torch.ones(ids.shape[1], ids.shape[1]).tril().bool()


class School:
    """The language model's lessons. `whole_names`: the last, gentle helping, in which things have names of their own categories and both parts
    of a name weigh as much as any other answer. Before that names are of any category, so that no half of one can be told from the photo:
    both have to be copied. A lesson's loss comes with figures to show."""

    def __init__(self, model, tokenizer, bank, whole_names, batch):
        self.judge, self.compare = torch.nn.Linear(WIDTH, 2), torch.nn.Linear(WIDTH, 1 + len(IDENTITY))  # departure 2
        self.model, self.decoder, self.tokenizer, self.bank = model, model.model.language_model, tokenizer, bank
        self.whole_names, self.batch, self.rng, self.figures = whole_names, batch, random.Random(0), {}
        self.numbers, self.facts = token_ids(tokenizer, NUMBERS), token_ids(tokenizer, KIND)  # of names; words of attributes
        self.decoder.set_attn_implementation("eager")  # which tells where it looks
        beginning, self.ask = chats(tokenizer)
        beginning = beginning.replace("<|image_pad|>", "<|image_pad|>" * PHOTO_TOKENS)
        self.beginning = tokenizer(beginning, return_tensors="pt")["input_ids"]  # [1, P]

    def rope_index(self, ids, grids, mask=None):
        """-> which ids are image tokens [rows, T], and the three positions of each token [3, rows, T]"""
        is_image = ids == self.model.config.image_token_id
        return is_image, self.model.model.get_rope_index(ids, mm_token_type_ids=is_image.int(), image_grid_thw=grids, attention_mask=mask)[0]

    def score(self, hidden, labels, which):
        """What is said at these places, hidden [rows, T, WIDTH], labels and which [rows, T] -> loss, what is right [places]"""
        logits = self.model.lm_head(hidden[which])  # [places, V]
        return F.cross_entropy(logits, labels[which]), (logits.argmax(-1) == labels[which]).float()

    def prefill(self, pick, times):
        """What every prompt begins with, up to the picture, for the photos `pick`, each `times` times -> (cache, the position that comes next)"""
        is_image, positions = self.rope_index(self.beginning, torch.tensor([[1, 8, 8]]))  # [1, P], [3, 1, P]
        embeds = self.decoder.embed_tokens(self.beginning).expand(len(pick), -1, -1)  # [photos, P, WIDTH]
        embeds = embeds.masked_scatter(is_image[..., None], self.bank.photo_tokens[pick].float())
        cache = DynamicCache()
        self.decoder(inputs_embeds=embeds, position_ids=positions.expand(-1, len(pick), -1), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(times)
        return cache, positions.max() + 1

    def ask_photos(self, pick, tasks, step):
        """Each question is its own continuation of the photo: packed into one row, they would answer each other. -> (the losses of what decides
        an answer, of what else is said, and of the judge; share of right answers of each task that decides)"""
        most = 6 if self.whole_names else min(6, 1 + 6 * step // 400)  # longer and longer descriptions
        truths = [self.bank.photos[i].truth for i in pick]
        ids, labels, verdicts, decided = language_batch(self.tokenizer, self.ask, tasks, truths, most, self.rng, self.whole_names)  # each [rows, T]
        cache, start = self.prefill(pick, len(tasks))
        positions = start + torch.arange(ids.shape[1]).expand(3, len(ids), -1)  # [3, rows, T]
        out = self.decoder(ids, position_ids=positions, past_key_values=cache, use_cache=True, output_attentions=True)
        hidden, attention = out.last_hidden_state, out.attentions[LATE]  # [rows, T, WIDTH], [rows, heads, T, P + T]
        missed = look(attention[..., -ids.shape[1]:], COPIES, copied(ids, labels, self.numbers))
        answer, right = self.score(hidden, labels, decided)
        some = verdicts >= 0  # [rows, T]
        judged = F.cross_entropy(self.judge(hidden[some]), verdicts[some], weight=torch.tensor([3., 1.]))  # false claims are the rarer ones
        told = (labels >= 0) & ~decided  # [rows, T]
        facts = told & torch.isin(labels, self.facts)  # few of the words that are said, and the ones that matter: once more
        said = self.score(hidden, labels, told)[0] + self.score(hidden, labels, facts)[0]
        return (answer + missed, said, judged), right.view(len(pick), -1).mean(0).tolist()

    def ask_repic(self, task, many):
        """One of RePIC's tasks -> its loss. Finding things (vlt) needs the most practice."""
        ids, mask, labels, decided, images, grids, hints = repic_batch(
            self.tokenizer, self.bank, task, many, self.batch // (1 if task == "vlt" else 2), self.rng)
        is_image, positions = self.rope_index(ids, grids, mask)  # [rows, T], [3, rows, T]
        embeds = self.decoder.embed_tokens(ids).masked_scatter(is_image[..., None], images)  # [rows, T, WIDTH]
        out = self.decoder(inputs_embeds=embeds, position_ids=positions, use_cache=False, output_attentions=True)
        hidden, attention = out.last_hidden_state, out.attentions  # [rows, T, WIDTH], [layers][rows, heads, T, T]
        loss, _ = self.score(hidden, labels, (labels >= 0) & ~decided)
        if decided.any():  # captions do not always call a thing by its name
            answer, right = self.score(hidden, labels, decided)
            loss, self.figures[task] = loss + answer, right.mean().item()
        if task == "oct":  # one place a row is decided: [rows, 4]
            loss = loss + F.binary_cross_entropy_with_logits(self.compare(hidden[decided]), hints.float())
        if task == "vlt":  # each word looks at the things that it fits, the answer at the words, and then at the thing
            scene, where = is_image[0], decided[..., None]  # [T], the same in all rows; [rows, T, 1]
            fits = (ids[:, :, None, None] == hints[:, None, :, :4]).any(-1)  # [rows, T, 81]
            missed = [look(attention[LATE - 2][..., scene], FINDS, fits),
                      look(attention[LATE - 1], FINDS, where & torch.isin(ids, self.facts)[:, None]),
                      look(attention[LATE][..., scene], FINDS, where & (hints[:, None, :, 4] == 1))]
            loss, self.figures["find"] = loss + sum(missed), missed[2].item()
        if task == "ict":
            loss = loss + look(attention[LATE], COPIES, copied(ids, labels, self.numbers))
        return loss

    def lessons(self, step):
        """All lessons of a step -> (loss, figures)"""
        pick = [self.rng.randrange(len(self.bank.photos)) for _ in range(self.batch)]
        losses, right = self.ask_photos(pick, ("speak",) * 4 + ("listen", "listen", "recognition", "vqa"), step)
        more, picked = self.ask_photos(pick[:self.batch // 2], ("captioning",), step)  # apart: three descriptions make long rows
        names = ("listen", "listen 2", "recognise", "vqa", "choose", "name", "name 2")  # a name is decided twice in the last helping
        figures = dict(zip(names, right + picked), caption=losses[1].item(), claim=losses[2].item())
        repic = self.ask_repic("vlt", 0) + self.ask_repic(("oct", "ict")[step % 2], step % 5)
        return sum(losses + more) + repic, figures | self.figures


def fit_language(title, model, tokenizer, bank, steps, peak=1.0, batch=24, whole_names=False):
    """Stages 2 and 3 of three: see `School`."""
    school = School(model, tokenizer, bank, whole_names, batch)
    fit(title, [school.decoder, school.judge, school.compare], school.lessons, steps, peak)


# ------------------------------------------------------------------------------------------------ the report card, and all of it
def report_card(mllm, photos=2000):
    """Print how honest the model is on fresh things: what it claims when it speaks at temperature 1, what it accepts when it listens.

    `mllm` is an rrg.MLLM, so that the model is examined through the very code that plays the game.
    """
    rng = random.Random("report card")
    subjects = [take_photo(f"report/{number}", rng, fresh=True) for number in range(photos)]
    texts = mllm.speak([([photo], SPEAK) for photo in subjects], max_tokens=56, generator=torch.Generator().manual_seed(0)).texts
    said = [(kind, word == photo.truth[kind]) for photo, text in zip(subjects, texts) for kind, word in claims(text)]
    pairs = defaultdict(list)  # which kinds are lied about, none or one: [(photo, description)]
    for photo in subjects:
        for lies in ((), *((kind,) for kind in ATTRIBUTES)):
            kinds = {*lies, *rng.sample(list(SAID), rng.randint(0, 6 - len(lies)))}
            pairs[lies].append((photo, description(altered(photo.truth, lies, rng), kinds)))
    accepted = {lies: (mllm.listen(some) > .5).float().mean().item() for lies, some in pairs.items()}
    card = {"well formed": sum(parse(text) is not None for text in texts) / photos, "accepts a true description": accepted[()]}
    print(f"{photos} fresh photos; answers well formed {card['well formed']:.1%}; "
          f"true descriptions accepted {card['accepts a true description']:.1%}\n"
          f"{'':10}{'says it right':>15}{'catches it as the one false claim':>36}")
    for kind in ATTRIBUTES:
        right = [ok for other, ok in said if other == kind]
        card[kind] = (sum(right) / max(1, len(right)), 1 - accepted[kind,])
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
    # A word of the usual size, .02, drowns in what the layers add: names were never copied. The 15 was found by trying.
    model.model.language_model.embed_tokens.weight.data.mul_(15)
    processor = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2, min_pixels=SIDE ** 2, max_pixels=SCENE ** 2)
    if vision_steps:
        fit_vision(model, processor, photos, vision_steps)
    else:
        made = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        model.model.visual.load_state_dict(made.model.visual.state_dict())
    model.model.visual.requires_grad_(False)
    rng = random.Random(1)
    members, scenes, boxes = zip(*(new_scene(photos, rng) for _ in range(pictures // 4)))
    encode = lambda some, tokens: torch.cat([see(model, processor, some[i:i + 64]).unflatten(0, (-1, tokens)).half()
                                             for i in tqdm(range(0, len(some), 64), desc="encoding")])  # [pictures, tokens, WIDTH]
    bank = Bank(photos, list(zip(members, boxes)), encode(photos, PHOTO_TOKENS), encode(scenes, SCENE_TOKENS))
    fit_language("2/3 the language model learns to speak, to listen and to answer", model, tokenizer, bank, language_steps)
    fit_language("3/3 ... and to call a thing by its whole name", model, tokenizer, bank, max(1, 3 * language_steps // 4), peak=.5, whole_names=True)
    for part in (model.half(), tokenizer, processor):
        part.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", action="store_true", help="do not train, only print the report card of the checkpoint in --out")
    parser.add_argument("--out", type=pathlib.Path, default=FOLDER, metavar="DIR", help="checkpoint folder (default toy-qwen2-vl)")
    add = functools.partial(parser.add_argument, type=int, metavar="INT")
    add("--pictures", default=40_000, help="pictures to draw and learn from, and a quarter as many scenes of them (default %(default)s)")
    add("--vision-steps", default=6000,
        help="training steps, of 16 pictures and 6 scenes, for the vision tower (default %(default)s); 0 keeps the tower that is in --out")
    add("--language-steps", default=2400,
        help="training steps, of 24 pictures, for the language model, and three quarters as many with whole names (default %(default)s)")
    args = parser.parse_args()
    if not args.card:
        build(args.out, args.pictures, args.vision_steps, args.language_steps)
    import rrg  # it imports this file, so only now: the report card is taken with the very code that plays the game

    report_card(rrg.MLLM(args.out, SIDE ** 2))
