"""picture.py: held-out games of a finished run, as people see them.

    python benchmarks/picture.py runs/study/rrg-0-60 --out assets/game.png --games 1

For each game: the photo that the speaker sees; what it said before training (LoRA off) and after; and, under each picture of the pool,
how well the listener thinks either description fits it.
"""
import argparse
import json
import pathlib
import sys
import textwrap

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import grpo  # noqa: E402
import reward  # noqa: E402
import rrg  # noqa: E402

SIDE, GAP, LINE = 190, 16, 84  # pixels: a photo, the space around it, the room for one description
RED, GREEN, GREY = "#b3361e", "#1a7f37", "#57606a"


def panel(game, said, k):
    """One game as a picture. said: [(when, colour, the row of rrg.judge), ...]."""
    font, label = ImageFont.load_default(15), ImageFont.load_default(14)
    image = Image.new("RGB", (GAP + (k + 1) * (SIDE + GAP) + GAP, 40 + SIDE + LINE * len(said)), "white")
    canvas = ImageDraw.Draw(image)
    for place, photo in enumerate([game.target, *game.pool]):
        x = GAP + place * (SIDE + GAP) + (GAP if place else 0)
        title = "the speaker sees" if not place else "the same thing" if place - 1 == game.answer else "a look-alike"
        canvas.text((x, 6), title, GREEN if place - 1 == game.answer else GREY, label)
        picture = photo.open()
        image.paste(picture.resize((SIDE, SIDE), Image.NEAREST if picture.width < SIDE else Image.BICUBIC), (x, 28))
        for line, (when, colour, row) in enumerate(said):
            y, answer = 28 + SIDE + 10 + LINE * line, reward.parse(row["text"])
            if not place:
                canvas.text((x, y), textwrap.fill(f"{when}: {answer.detailed if answer else 'not parsed'}", 26), colour, font, spacing=3)
            elif row["rho"]:
                fits = row["rho"][place - 1]
                canvas.rectangle([x, y + 3, x + SIDE, y + 17], "#eaeef2")
                canvas.rectangle([x, y + 3, x + max(2, SIDE * fits), y + 17], colour)
                canvas.text((x, y + 22), f"listener, {when}: {fits:.0%}", "#24292f", label)
    return image


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=pathlib.Path, help="folder of a finished run")
    parser.add_argument("--out", type=pathlib.Path, help="picture to write (default RUN/games.png)")
    parser.add_argument("--games", type=int, default=3, help="how many games to draw, 1 to 3 (default 3)")
    args = parser.parse_args()
    config = rrg.Config(**json.loads((args.run / "config.json").read_text())["settings"])
    mllm = rrg.MLLM(config.model, config.max_pixels)
    _, seen, _ = rrg.set_up(config, mllm)
    games = [seen[i] for i in rrg.showcase(seen)][:args.games]
    grpo.load_adapter(mllm.model, args.run / "adapter")
    after = rrg.measure(mllm, games, config)[1]
    with grpo.lora_off(mllm.model):
        before = rrg.measure(mllm, games, config)[1]
    panels = [panel(game, [("before", RED, old), ("after", GREEN, new)], config.k) for game, old, new in zip(games, before, after)]
    sheet = Image.new("RGB", (panels[0].width, sum(part.height for part in panels)), "white")
    for i, part in enumerate(panels):
        sheet.paste(part, (0, i * part.height))
    sheet.save(out := args.out or args.run / "games.png")
    print(f"wrote {out}")
