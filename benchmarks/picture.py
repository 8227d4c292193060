"""picture.py: games of finished runs as figures, for the README.

    python rrg.py --out runs/hard
    python benchmarks/picture.py runs/hard --out assets/game.png

One run: one game in its six stages. It shows the photo that the speaker sees; what the speaker
said before training (LoRA off) and after; and under each photo of the pool how well the listener
thinks either description fits it, and what that pays. What was said and believed is read from the
run's result.json, the photos from where the run had them.

    python rrg.py --positive easy --out runs/easy
    python benchmarks/picture.py runs/hard runs/easy --out assets/positives.png

Two runs, of which the second was trained with the easy positive: the same game once more, with what
either of them says. The target's easy positive stands beside the pool, and the listener is asked
about it, too.
"""

import argparse
import pathlib
import sys
import textwrap
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import rrg  # noqa: E402
import run  # noqa: E402
from data import DataError, Photo, mine_games  # noqa: E402
from model import MLLM  # noqa: E402
from reward import listener_reward, parse  # noqa: E402

# Lengths in pixels, from above: headings, photos, a line for each description, a footer.
TOP = 52  # room for the headings
SIDE = 190  # of a photo
LINE = 110  # room for one description
FOOTER = 30
GAP = 16  # the space around a photo

RED = "#b3361e"
GREEN = "#1a7f37"
GREY = "#57606a"
LIGHT_GREY = "#eaeef2"
BLACK = "#24292f"

FONT = ImageFont.load_default(15)
SMALL_FONT = ImageFont.load_default(14)


@dataclass(frozen=True)
class Shown:
    """A photo of the figure."""

    photo: Photo
    heading: str
    colour: str
    in_pool: bool = True
    is_positive: bool = False


@dataclass(frozen=True)
class Said:
    """What a speaker said of the target, and how far the listener believed it."""

    when: str
    colour: str
    text: str
    beliefs: list[float] | None  # one for each photo Shown; None of a malformed answer


def draw_photo(image, shown, x):
    """A photo and its heading, with its left edge at x."""
    ImageDraw.Draw(image).text((x, TOP - 22), shown.heading, shown.colour, SMALL_FONT)
    picture = shown.photo.load()
    # The few pixels of a toy photo stay squares.
    how = Image.NEAREST if picture.width < SIDE else Image.BICUBIC
    image.paste(picture.resize((SIDE, SIDE), how), (x, TOP))


def draw_description(canvas, said, x, y):
    """What the speaker said, in lines of 26 characters."""
    description = parse(said.text)
    words = description.detailed if description else "not parsed"
    text = textwrap.fill(f"2 speak, {said.when}: {words}", 26)
    canvas.text((x, y), text, said.colour, FONT, spacing=3)


def draw_belief(canvas, said, belief, x, y):
    """How far the listener believes that the description fits this photo, as a bar and in words."""
    canvas.rectangle([x, y + 3, x + SIDE, y + 17], LIGHT_GREY)
    canvas.rectangle([x, y + 3, x + max(2, SIDE * belief), y + 17], said.colour)
    canvas.text((x, y + 22), f"3 listen: {belief:.2%} yes", BLACK, SMALL_FONT)


def reward_of(said, photos):
    """What the listener pays for it in the game whose pool the photos show."""
    beliefs = []
    for shown, belief in zip(photos, said.beliefs, strict=True):
        if not shown.in_pool:
            continue
        if shown.is_positive:
            positive = len(beliefs)
        beliefs.append(belief)
    pay, _ = listener_reward(torch.tensor([beliefs]), torch.tensor([positive]))
    return pay.item()


def draw_game(target, photos, answers, footer):
    """One game as a picture.   target Photo; photos [Shown, ...]; answers [Said, ...]"""
    width = GAP + (len(photos) + 1) * (SIDE + GAP) + GAP
    height = TOP + SIDE + LINE * len(answers) + FOOTER
    image = Image.new("RGB", (width, height), "white")
    canvas = ImageDraw.Draw(image)
    canvas.text((GAP, 6), "1 mine a game", BLACK, FONT)

    # On the left the target; then, after a wider gap, the other photos.
    draw_photo(image, Shown(target, "target", GREY), GAP)
    left_edges = []
    for place, shown in enumerate(photos):
        left_edges.append(GAP + (place + 1) * (SIDE + GAP) + GAP)
        draw_photo(image, shown, left_edges[place])

    # What was said of the target, and under each photo what the listener believed.
    for number, said in enumerate(answers):
        y = TOP + SIDE + 10 + LINE * number
        draw_description(canvas, said, GAP, y)
        if said.beliefs is None:
            continue
        for shown, belief, x in zip(photos, said.beliefs, left_edges, strict=True):
            draw_belief(canvas, said, belief, x, y)
            if shown.is_positive:
                pay = reward_of(said, photos)
                canvas.text((x, y + 42), f"4 reward {pay:.2f}", said.colour, FONT)

    canvas.text((GAP, height - 24), footer, BLACK, FONT)
    return image


def pool_of(game, photos):
    """The pool of a game that result.json has.   -> [Shown, ...]"""
    shown = []
    for place, name in enumerate(game["pool"]):
        if place == game["answer"]:
            heading = "hard positive: the same thing"
            shown.append(Shown(photos[name], heading, GREEN, is_positive=True))
        else:
            shown.append(Shown(photos[name], "hard negative: a look-alike", GREY))
    return shown


def one_run(games, photos, samples):
    """What the figure of one run shows.

    games {"before" or "after": a game of result.json}; photos {name: Photo}; samples: G
    -> as of `draw_game`
    """
    game = games["before"]  # they differ in text and beliefs only
    answers = []
    for when, colour in (("before", RED), ("after", GREEN)):
        answers.append(Said(when, colour, games[when]["text"], games[when]["rho"]))
    footer = (
        f"5 advantage: better than its {samples - 1} siblings?   "
        "6 update: make such descriptions likelier"
    )
    return photos[game["target"]], pool_of(game, photos), answers, footer


def two_runs(hard, easy, mllm, concepts, seed):
    """What the figure of two runs shows, which were trained with either positive.

    hard, easy {"before" or "after": the same game of their result.json} -> as of `draw_game`
    """
    photos = {photo.name: photo for photo in rrg.photos_of(concepts)}
    game = hard["before"]
    if (game["target"], game["pool"]) != (easy["before"]["target"], easy["before"]["pool"]):
        raise DataError("these runs hold out other games; give both the same --seed and --data")

    # The easy positive that training would have chosen.
    concept = next(concept for concept in concepts if concept.name == game["concept"])
    vectors = mllm.embed(rrg.photos_of(concepts))
    k = len(game["pool"])
    games = mine_games([concept], vectors, k, seed, rivals=concepts, positive="easy")
    easy_game = next(mined for mined in games if mined.target.name == game["target"])
    easy_positive = easy_game.pool[easy_game.positive]
    heading = "easy positive: the same thing"
    shown = [Shown(easy_positive, heading, GREY, in_pool=False), *pool_of(game, photos)]

    answers = []
    for when, colour, said in (
        ("before", GREY, hard["before"]),
        ("easy positive", RED, easy["after"]),
        ("hard positive", GREEN, hard["after"]),
    ):
        beliefs = said["rho"]
        if beliefs is not None:
            description = parse(said["text"]).text
            beliefs = [mllm.believe([(easy_positive, description)]).item(), *beliefs]
        answers.append(Said(when, colour, said["text"], beliefs))
    footer = (
        "Trained with the easy positive, the speaker goes on saying where a thing stands: in its "
        "games that is true of the right photo."
    )
    return photos[game["target"]], shown, answers, footer


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs",
        type=pathlib.Path,
        nargs="+",
        metavar="RUN",
        help="folder of a finished run of the game; a second one was trained with --positive easy",
    )
    parser.add_argument(
        "--out", type=pathlib.Path, help="picture to write (default game.png in the first folder)"
    )
    parser.add_argument(
        "--game",
        type=int,
        default=0,
        help="which of the games that result.json has, from 0 (default 0)",
    )
    args = parser.parse_args()
    if len(args.runs) > 2:
        parser.error("one run, or two")

    config = run.saved_settings(rrg.Config, args.runs[0])
    mllm = MLLM(config.model, config.max_pixels)
    concepts, _ = rrg.load_world(mllm, config.data, config.seed)
    of_runs = []
    for folder, positive in zip(args.runs, ("hard", "easy"), strict=False):
        trained_with = run.saved_settings(rrg.Config, folder).positive
        if len(args.runs) == 2 and trained_with != positive:
            raise DataError(
                f"{folder} was trained with the {trained_with} positive: give the run with the "
                "hard one first, then that with the easy one"
            )
        examples = run.load_json(folder / "result.json")["examples"]
        of_runs.append({when: games[args.game] for when, games in examples.items()})

    if len(of_runs) == 1:
        photos = {photo.name: photo for photo in rrg.photos_of(concepts)}
        drawing = one_run(of_runs[0], photos, config.samples)
    else:
        drawing = two_runs(*of_runs, mllm, concepts, config.seed)
    out = args.out or args.runs[0] / "game.png"
    draw_game(*drawing).save(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    run.main(main)
