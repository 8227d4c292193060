"""picture.py: one game of a finished run as a figure, with the six stages of the README.

    python rrg.py --out runs/x
    python benchmarks/picture.py runs/x --out assets/game.png

It shows the photo that the speaker sees; what the speaker said before training (LoRA off) and
after; and under each photo of the pool how well the listener thinks either description fits it,
and what that pays. What was said and believed is read from the run's result.json, the photos from
where the run had them.
"""

import argparse
import pathlib
import sys
import textwrap

import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import rrg  # noqa: E402
import run  # noqa: E402
from model import MLLM  # noqa: E402
from reward import listener_reward, parse  # noqa: E402

# Lengths in pixels, from above: headings, photos, a line for each description, a footer.
TOP = 52  # room for the headings
SIDE = 190  # of a photo
LINE = 92  # room for one description
FOOTER = 30
GAP = 16  # the space around a photo

RED = "#b3361e"
GREEN = "#1a7f37"
GREY = "#57606a"
LIGHT_GREY = "#eaeef2"
BLACK = "#24292f"
COLOURS = {"before": RED, "after": GREEN}

FONT = ImageFont.load_default(15)
SMALL_FONT = ImageFont.load_default(14)


def draw_photo(image, photo, heading, colour, x):
    """A photo and its heading, with its left edge at x."""
    ImageDraw.Draw(image).text((x, TOP - 22), heading, colour, SMALL_FONT)
    picture = photo.load()
    # The few pixels of a toy photo stay squares.
    how = Image.NEAREST if picture.width < SIDE else Image.BICUBIC
    image.paste(picture.resize((SIDE, SIDE), how), (x, TOP))


def draw_description(canvas, when, row, x, y):
    """What the speaker said, in lines of 26 characters."""
    description = parse(row["text"])
    words = description.detailed if description else "not parsed"
    text = textwrap.fill(f"2 speak, {when}: {words}", 26)
    canvas.text((x, y), text, COLOURS[when], FONT, spacing=3)


def draw_belief(canvas, when, belief, x, y):
    """How far the listener believes that the description fits this photo, as a bar and in words."""
    canvas.rectangle([x, y + 3, x + SIDE, y + 17], LIGHT_GREY)
    canvas.rectangle([x, y + 3, x + max(2, SIDE * belief), y + 17], COLOURS[when])
    canvas.text((x, y + 22), f"3 listen: {belief:.0%} yes", BLACK, SMALL_FONT)


def draw_reward(canvas, when, row, x, y):
    """What the description earns, under the hard positive."""
    beliefs = torch.tensor([row["rho"]])  # [1, K]
    positive = torch.tensor([row["answer"]])  # [1]
    pay, _ = listener_reward(beliefs, positive)
    canvas.text((x, y + 42), f"4 reward {pay.item():.2f}", COLOURS[when], FONT)


def draw_game(answers, photos):
    """One game as a picture.

    answers {"before": row, "after": row} of an example in result.json; photos {name: Photo}
    """
    game = answers["before"]  # the rows differ in text and beliefs only
    width = GAP + (len(game["pool"]) + 1) * (SIDE + GAP) + GAP
    height = TOP + SIDE + LINE * len(answers) + FOOTER
    image = Image.new("RGB", (width, height), "white")
    canvas = ImageDraw.Draw(image)
    line_tops = {}  # {"before" or "after": y}
    for number, when in enumerate(answers):
        line_tops[when] = TOP + SIDE + 10 + LINE * number

    # On the left the target, and what was said of it.
    canvas.text((GAP, 6), "1 mine a game", BLACK, FONT)
    draw_photo(image, photos[game["target"]], "target", GREY, GAP)
    for when, row in answers.items():
        draw_description(canvas, when, row, GAP, line_tops[when])

    # Then, after a wider gap, the pool, and what the listener believed.
    for place, name in enumerate(game["pool"]):
        x = GAP + (place + 1) * (SIDE + GAP) + GAP
        is_positive = place == game["answer"]
        heading = "hard negative: a look-alike"
        colour = GREY
        if is_positive:
            heading = "hard positive: the same thing"
            colour = GREEN
        draw_photo(image, photos[name], heading, colour, x)
        for when, row in answers.items():
            if row["rho"] is None:  # a malformed answer, which nobody is asked about
                continue
            draw_belief(canvas, when, row["rho"][place], x, line_tops[when])
            if is_positive:
                draw_reward(canvas, when, row, x, line_tops[when])

    footer = "5 advantage: better than its 7 siblings?   6 update: make such descriptions likelier"
    canvas.text((GAP, height - 24), footer, BLACK, FONT)
    return image


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=pathlib.Path, help="folder of a finished run of the game")
    parser.add_argument("--out", type=pathlib.Path, help="picture to write (default RUN/game.png)")
    parser.add_argument(
        "--game",
        type=int,
        default=0,
        help="which of the games that result.json has, from 0 (default 0)",
    )
    args = parser.parse_args()

    config = run.saved_settings(rrg.Config, args.run)
    mllm = MLLM(config.model, config.max_pixels)
    concepts, _ = rrg.load_world(mllm, config.data, config.seed)
    photos = {photo.name: photo for photo in rrg.photos_of(concepts)}

    examples = run.load_json(args.run / "result.json")["examples"]
    answers = {when: games[args.game] for when, games in examples.items()}
    out = args.out or args.run / "game.png"
    draw_game(answers, photos).save(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    run.main(main)
