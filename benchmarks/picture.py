"""picture.py: one game of a finished run as a figure, with the six stages of the README.

    python rrg.py --out runs/x
    python benchmarks/picture.py runs/x --out assets/game.png

The photo that the speaker sees; what it said before training (LoRA off) and after; under each picture of the pool, how well the listener
thinks either description fits it, and what that pays. What was said and believed is read from the run's
result.json, the photos from where the run had them.
"""
import argparse
import json
import pathlib
import sys
import textwrap

import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import reward  # noqa: E402
import rrg  # noqa: E402

SIDE, GAP, LINE, TOP = 190, 16, 92, 52  # pixels: a photo, the space around it, the room for one description, the headings
RED, GREEN, GREY, BLACK = "#b3361e", "#1a7f37", "#57606a", "#24292f"


def figure(said, photos):
    """One game as a picture. said {"before": row, "after": row} of result.json's examples, photos {name: Photo}."""
    game, font, label = said["before"], ImageFont.load_default(15), ImageFont.load_default(14)
    width = GAP + (len(game["pool"]) + 1) * (SIDE + GAP) + GAP
    image = Image.new("RGB", (width, TOP + SIDE + LINE * len(said) + 30), "white")
    canvas = ImageDraw.Draw(image)
    canvas.text((GAP, 6), "1 mine a game", BLACK, font)
    for place, name in enumerate([game["target"], *game["pool"]]):
        x, same = GAP + place * (SIDE + GAP) + (GAP if place else 0), place - 1 == game["answer"]
        canvas.text((x, TOP - 22), "target" if not place else "hard positive: the same thing" if same else "hard negative: a look-alike", GREEN if same else GREY, label)
        picture = photos[name].open()
        image.paste(picture.resize((SIDE, SIDE), Image.NEAREST if picture.width < SIDE else Image.BICUBIC), (x, TOP))
        for line, (when, row) in enumerate(said.items()):
            y, answer, colour = TOP + SIDE + 10 + LINE * line, reward.parse(row["text"]), (RED, GREEN)[line]
            if not place:
                text = textwrap.fill(f"2 speak, {when}: {answer.detailed if answer else 'not parsed'}", 26)
                canvas.text((x, y), text, colour, font, spacing=3)
            elif row["rho"]:
                fits = row["rho"][place - 1]
                canvas.rectangle([x, y + 3, x + SIDE, y + 17], "#eaeef2")
                canvas.rectangle([x, y + 3, x + max(2, SIDE * fits), y + 17], colour)
                canvas.text((x, y + 22), f"3 listen: {fits:.0%} yes", BLACK, label)
                if same:
                    pay, _ = reward.listener_reward(torch.tensor([row["rho"]]), torch.tensor([game["answer"]]))
                    canvas.text((x, y + 42), f"4 reward {pay.item():.2f}", colour, font)
    canvas.text((GAP, image.height - 24), "5 advantage: better than its 7 siblings?   6 update: make such descriptions likelier", BLACK, font)
    return image


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=pathlib.Path, help="folder of a finished run of the game")
    parser.add_argument("--out", type=pathlib.Path, help="picture to write (default RUN/game.png)")
    parser.add_argument("--game", type=int, default=0, help="which of the games that result.json has, from 0 (default 0)")
    args = parser.parse_args()
    config = rrg.Config(**json.loads((args.run / "config.json").read_text())["settings"])
    concepts, _ = rrg.load_world(rrg.MLLM(config.model, config.max_pixels), config.data, config.seed)
    photos = {photo.name: photo for concept in concepts for photo in concept.photos}
    examples = json.loads((args.run / "result.json").read_text())["examples"]
    figure({when: rows[args.game] for when, rows in examples.items()}, photos).save(out := args.out or args.run / "game.png")
    print(f"wrote {out}")
