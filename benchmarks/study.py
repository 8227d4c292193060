"""study.py: base, SFT, RePIC, RRG and their ablations, side by side in the toy world: the README's tables.

    python benchmarks/study.py --quick     # the four main rows, one seed, short runs: about 5 minutes on two CPU cores
    python benchmarks/study.py             # every row, seeds 0 to 4: hours; stop it whenever you like, it goes on where it was
    python benchmarks/study.py --tables    # run nothing: only the tables, claims and curves of what is in the CSV

A run is `rrg.py` with the flags of its row below and its defaults for the rest, then `evaluate.py`'s table of its adapter. Each finished run is
kept at once as one line of benchmarks/study.csv: all figures, and curves as means over twentieths of the run. Several processes may share the
file, each with --seeds of its own (on two cores two of them with OMP_NUM_THREADS=1 get more done than one with both).

Figures are mean ± standard deviation over the seeds. A claim is the difference of two rows, seed by seed; it holds if its mean lies more than one
standard deviation above 0.
"""
import argparse
import csv
import json
import pathlib
import re
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import evaluate  # noqa: E402
import grpo  # noqa: E402
import rrg  # noqa: E402

ROWS = {
    "base": None,
    "SFT": ["--method", "sft"],
    "RePIC": ["--method", "repic"],
    "RePIC without OCT": ["--method", "repic", "--without", "oct"],
    "RePIC without VLT": ["--method", "repic", "--without", "vlt"],
    "RePIC without ICT": ["--method", "repic", "--without", "ict"],
    "RePIC without length": ["--method", "repic", "--without", "length"],
    "RRG": [],
    "RRG, random negatives": ["--negatives", "random"],
    "RRG, easy positive": ["--positive", "easy"],
    "RRG, K = 2": ["--k", "2"],
    "RRG, K = 5": ["--k", "5"],
    "RRG, binary reward": ["--reward", "binary"],
    "RRG, ungated soft reward": ["--reward", "soft"],
    "RRG, no format term": ["--format-weight", "0"],
    "RRG, no KL": ["--beta", "0"],
    "RRG, G = 2": ["--samples", "2"],
    "RRG, G = 4": ["--samples", "4"],
    "RRG, G = 16": ["--samples", "16"],
    "RRG, listener trained along": ["--listener", "trained"],
}
MAIN = ("base", "SFT", "RePIC", "RRG")
GAMES = ("identification", "oracle", "leakage", "coverage", "parsed")
PARTS = ("seen", "unseen")
CURVES = ("reward", "kl", "oracle")
SUMMARY = [("caption F1", "seen", "captioning_f1"), ("unseen", "unseen", "captioning_f1"), ("recognition", "seen", "recognition_weighted"),
           ("unseen", "unseen", "recognition_weighted"), ("oracle", "seen", "oracle"), ("unseen", "unseen", "oracle"), ("early", "seen", "early"),
           ("leakage", "seen", "leakage"), ("2 names", "seen", "names_2_right_f1"), ("2 names, wrong", "seen", "names_2_wrong_f1")]  # of the main README
COLUMNS = {"caption F1": "captioning_f1", "recognition": "recognition_weighted", "VQA": "vqa", "leakage": "leakage", "oracle": "oracle",
           "1 name": "names_1_right_f1", "2 names": "names_2_right_f1", "2 names, retrieved": "names_2_retrieved_f1",
           "2 names, wrong": "names_2_wrong_f1", "4 names": "names_4_right_f1"}
CLAIMS = [  # what is claimed, the row that should be higher, the other one, of what
    ("RRG beats RePIC in recognition", "RRG", "RePIC", "recognition_weighted"),
    ("RRG beats RePIC in captioning", "RRG", "RePIC", "captioning_f1"),
    ("RePIC beats base in recognition", "RePIC", "base", "recognition_weighted"),
    ("RePIC beats base in captioning", "RePIC", "base", "captioning_f1"),
    ("RePIC beats SFT in naming two things", "RePIC", "SFT", "names_2_right_f1"),
    ("SFT beats base in naming two things", "SFT", "base", "names_2_right_f1"),
    ("SFT falls for wrong references more than base", "SFT", "base", "names_2_wrong_f1"),
    ("SFT falls for wrong references more than RePIC", "SFT", "RePIC", "names_2_wrong_f1"),
    ("hard negatives beat random ones in hard games", "RRG", "RRG, random negatives", "oracle"),
    ("hard negatives beat random ones in recognition", "RRG", "RRG, random negatives", "recognition_weighted"),
    ("the soft-gated reward is at least as good as the binary one", "RRG", "RRG, binary reward", "oracle"),
    ("RRG leaks less than base", "base", "RRG", "leakage"),
    ("RRG leaks less than SFT", "SFT", "RRG", "leakage"),
    ("RRG leaks less than RePIC", "RePIC", "RRG", "leakage"),
    ("the soft-gated reward learns faster than the binary one (early)", "RRG", "RRG, binary reward", "early"),
    ("a hard positive leads to better games than an easy one", "RRG", "RRG, easy positive", "oracle"),
    ("eight answers a game teach faster than two (early)", "RRG", "RRG, G = 2", "early"),
    ("eight answers a game lead to better games than two", "RRG", "RRG, G = 2", "oracle"),
    ("eight teach faster than four (early)", "RRG", "RRG, G = 4", "early"),
    ("sixteen teach faster than eight (early)", "RRG, G = 16", "RRG", "early"),
    ("a frozen listener teaches faster than one that is trained along (early)", "RRG", "RRG, listener trained along", "early"),
    ("a frozen listener leads to better games", "RRG", "RRG, listener trained along", "oracle"),
    ("RePIC names less without ICT", "RePIC", "RePIC without ICT", "names_1_right_f1"),
]


def figures(row, seed, steps, folder):
    """Run one row with one seed -> {column of the CSV: value}."""
    line, models = {"row": row, "seed": seed, "steps": steps}, ["base"]
    options = evaluate.settings(["--seed", str(seed), "--grounding"])
    if ROWS[row] is not None:
        if not (folder / "result.json").exists():
            begin = ["--seed", str(seed), "--steps", str(steps), *ROWS[row]]
            subprocess.run([sys.executable, ROOT / "rrg.py", "--out", folder, *(["--resume"] if (folder / "state.pt").exists() else begin)], check=True)
        result, models = json.loads((folder / "result.json").read_text()), [str(folder / "adapter")]
        line["seconds"] = result["seconds"]
        for when in ("before", "after"):
            for part, games in zip(PARTS, (result[when], result[when]["unseen"])):
                line |= {f"{part}_{name}_{when}": value for name, value in games.items() if name != "unseen"}
        with open(folder / "metrics.csv") as file:
            log = list(csv.DictReader(file))
        for name in CURVES if log[0]["oracle"] else CURVES[:2]:
            twentieths = [[float(r[name]) for r in log[i * len(log) // 20:(i + 1) * len(log) // 20]] for i in range(20)]
            line[f"{name}_curve"] = " ".join(f"{statistics.mean(values):.4g}" for values in twentieths if values)
    mllm = rrg.MLLM(options.model, options.max_pixels)
    table = evaluate.table(mllm, mllm, options, models)["rows"][models[0]]
    for part in PARTS:
        line |= {f"{part}_{name}": value for name, value in table[part].items() if name != "counts"}
    return line | oracle(mllm, models[0], line, seed)


def oracle(mllm, speaker, line, seed):
    """Share of hard held-out games that the greedy descriptions win by the truth. Rows that play the game measured it; the others'
    speakers, an adapter or "base", are put to the same games."""
    if "seen_oracle_after" in line:
        return {f"{part}_oracle": line[f"{part}_oracle_after"] for part in PARTS}
    config = rrg.settings(["--seed", str(seed)])[0]
    games = rrg.set_up(config, mllm)[1:]
    if speaker != "base":
        evaluate.adapt(mllm, speaker)
    found = {f"{part}_oracle": rrg.measure(mllm, some, config)[0]["oracle"] for part, some in zip(PARTS, games)}
    grpo.remove_lora(mllm.model)
    return found


def read(file):
    """-> {(row, seed, steps): line}"""
    if not file.exists():
        return {}
    with open(file, newline="") as lines:
        rows = {(line["row"], int(line["seed"]), int(line["steps"])): line for line in csv.DictReader(lines)}
    for line in rows.values():  # how soon it learns: what the oracle accepts, in its own games, of the answers sampled in the first half
        line["seen_early"] = str(statistics.mean(map(float, curve[:10]))) if (curve := line["oracle_curve"].split()) else ""
    return rows


def keep(file, line):
    """Append one line; the first run that is kept writes the heading, which has room for every method."""
    names = ["row", "seed", "steps", "seconds", *(f"{name}_curve" for name in CURVES)]
    names += [f"{part}_{name}_{when}" for part in PARTS for when in ("before", "after") for name in (*GAMES, *rrg.KINDS)]
    names += [f"{part}_{name}" for part in PARTS
              for name in [*evaluate.COLUMNS, "oracle", *(key.replace("f1", f) for key in evaluate.GROUNDING for f in ("precision", "recall", "f1"))]]
    new = not file.exists()
    with open(file, "a", newline="") as lines:
        table = csv.DictWriter(lines, names, extrasaction="ignore")
        if new:
            table.writeheader()
        table.writerow({name: f"{value:.5g}" if isinstance(value, float) else value for name, value in line.items()})


def spread(values, form="{:.1%}"):
    """Mean ± standard deviation over the seeds; "-" for none."""
    return f"{form.format(statistics.mean(values))} ± {form.replace('+', '').format(statistics.stdev(values) if len(values) > 1 else 0)}" if values else "-"


def show(title, columns, rows):
    """Print a Markdown table: rows {name: cells}."""
    print(f"\n| {title} | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")


def report(lines, steps):
    """Print the tables and the claims -> {row: [line of each seed]}."""
    runs = {row: [line for (name, _, length), line in sorted(lines.items(), key=lambda item: item[0][1]) if name == row and length == steps] for row in ROWS}
    runs = {row: some for row, some in runs.items() if some}
    values = lambda row, key: {line["seed"]: float(line[key]) for line in runs.get(row, ()) if line.get(key)}
    means = lambda row, key, form="{:.1%}": spread(list(values(row, key).values()), form)

    def gaps(high, low, key):
        a, b = values(high, key), values(low, key)
        return [a[seed] - b[seed] for seed in a if seed in b]

    percent = lambda row, key: spread([100 * value for value in values(row, key).values()], "{:.1f}")
    show("%", [title for title, _, _ in SUMMARY], {row: [percent(row, f"{part}_{key}") for _, part, key in SUMMARY] for row in runs})
    for row, names in (("RRG", GAMES), ("RePIC", rrg.KINDS)):
        show(f"{row}, held out", ["before", "after", "before, unseen categories", "after, unseen categories"],
             {name: [means(row, f"{part}_{name}_{when}") for part in PARTS for when in ("before", "after")] for name in names})
    tasks = {}
    for key in evaluate.COLUMNS:
        form = "{:.1f}" if key == "words" else "{:.1%}"
        tasks[key.replace("_", " ")] = sum([[means("base", f"{part}_{key}", form), means("RRG", f"{part}_{key}", form),
                                             spread(gaps("RRG", "base", f"{part}_{key}"), form.replace(":", ":+"))] for part in PARTS], [])
    show("", ["base", "RRG", "gain", "base, unseen categories", "RRG, unseen categories", "gain, unseen categories"], tasks)
    for part in PARTS:
        show(f"{part} categories", ["seeds", *COLUMNS],
             {row: [str(len(some)), *(means(row, f"{part}_{key}") for key in COLUMNS.values())] for row, some in runs.items()})
    claims = {}
    for text, high, low, key in CLAIMS:
        claims[text] = []
        for part in PARTS:
            gap = gaps(high, low, f"{part}_{key}")
            above = len(gap) > 1 and statistics.mean(gap) > (-1 if "at least" in text else 1) * statistics.stdev(gap)
            claims[text] += [spread(gap, "{:+.1%}"), "" if len(gap) < 2 else "holds" if above else "does **not** hold"]
    show("claim", ["difference, seen categories", "", "difference, unseen categories", ""], claims)
    fifths = [[statistics.mean(curve[i:i + 4]) for i in range(0, 20, 4)] for line in runs.get("RRG", ())
              if len(curve := [float(value) for value in line["oracle_curve"].split()]) == 20]
    if fifths:
        print(f"\nRRG: the oracle accepts of the *sampled* descriptions, by fifths of training, "
              f"{', '.join(spread(five) for five in zip(*fifths))}; the last fifth lies at most {max(max(five) - five[-1] for five in fifths):.1%} below the "
              "best of its run")
    return runs


def curves(runs, file):
    """Reward and KL of the methods that sample, mean and standard deviation over the seeds, as SVG."""
    colours, parts = {"RRG": "#c0392b", "RePIC": "#2471a3"}, []
    for panel, name in enumerate(("reward", "kl")):
        data = {row: list(zip(*[map(float, line[f"{name}_curve"].split()) for line in runs[row]])) for row in colours if row in runs}
        top = max([max(map(max, points)) for points in data.values()], default=1)
        x = lambda i: 60 + 400 * panel + 320 * i / 19
        y = lambda value: 230 - 190 * value / top
        title = {"reward": "reward of sampled answers", "kl": "KL to the frozen model, per token"}[name]
        parts.append(f'<text x="{x(0)}" y="24" font-weight="bold">{title}</text><path d="M{x(0)} 40V230H{x(19)}" fill="none" stroke="#888"/>'
                     f'<text x="{x(0) - 8}" y="45" text-anchor="end">{top:.2g}</text><text x="{x(0) - 8}" y="234" text-anchor="end">0</text>'
                     f'<text x="{x(19)}" y="250" text-anchor="end">end of training</text>')
        for place, (row, points) in enumerate(data.items()):
            middle = [statistics.mean(values) for values in points]
            off = [statistics.stdev(values) if len(values) > 1 else 0 for values in points]
            edge = [(i, m + s) for i, (m, s) in enumerate(zip(middle, off))] + [(i, m - s) for i, (m, s) in reversed(list(enumerate(zip(middle, off))))]
            line = lambda pairs: " ".join(f"{x(i):.1f},{y(value):.1f}" for i, value in pairs)
            parts.append(f'<polygon points="{line(edge)}" fill="{colours[row]}" opacity="0.2"/><polyline points="{line(enumerate(middle))}" fill="none" '
                         f'stroke="{colours[row]}" stroke-width="2"/><text x="{x(2) + 70 * place}" y="250" fill="{colours[row]}">{row}</text>')
    file.write_text('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 262" font-family="sans-serif" font-size="13">'
                    f'<rect width="820" height="262" fill="white"/>{"".join(parts)}</svg>\n')


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the main rows, seed 0, 30 steps; kept in runs/study-quick.csv")
    parser.add_argument("--tables", action="store_true", help="run nothing, only print the tables")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds to run (default 0 1 2 3 4)")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help="rows to run (default: all): " + "; ".join(ROWS))
    args = parser.parse_args()
    file, steps = (ROOT / "runs" / "study-quick.csv", 30) if args.quick else (ROOT / "benchmarks" / "study.csv", rrg.TOY["steps"])
    file.parent.mkdir(exist_ok=True)
    wanted = [(row, seed) for seed in ([0] if args.quick else args.seeds) for row in (MAIN if args.quick else args.rows)]
    for row, seed in [] if args.tables else wanted:
        if (row, seed, steps) not in read(file):
            print(f"\n=== {row}, seed {seed}", flush=True)
            slug = re.sub(r"\W+", "-", row.lower())
            keep(file, figures(row, seed, steps, ROOT / "runs" / "study" / f"{slug}-{seed}-{steps}"))
    print(f"\n{steps} steps a run; {rrg.machine(rrg.torch.device('cpu'))}")
    runs = report(read(file), steps)
    if not args.quick:
        curves(runs, ROOT / "assets" / "curves.svg")
