"""seeds.py: the README's tables. Runs the default command with seeds 0 to 4, and evaluate.py on each run's adapter, and prints mean and
standard deviation over the seeds as Markdown.

    python benchmarks/seeds.py                     # the five runs go to runs/seed-0 ... runs/seed-4; finished ones are not run again
    python benchmarks/seeds.py --seeds 0 1 --out somewhere -- --k 5     # what follows -- goes to rrg.py

The second table is evaluate.py's: base, RRG, and what RRG gains, seed by seed. Besides what each run measures on held-out games it reports the stability of training: on the share of sampled answers that the
symbolic oracle accepts, averaged over fifths of the run, how far the last fifth lies below the best.
"""
import argparse
import csv
import json
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
TASKS = ("captioning_f1", "captioning_precision", "captioning_recall", "name_f1", "recognition_weighted", "recognition_positive",
         "recognition_negative", "recognition_inside", "recognition_across", "vqa", "leakage", "words", "retrieval_ceiling", "unparsed")
NAMES = ("identification", "oracle", "leakage", "coverage", "parsed")


def fifths(folder, column):
    """Means of a column of metrics.csv over the five fifths of a run."""
    with open(folder / "metrics.csv") as file:
        values = [float(row[column]) for row in csv.DictReader(file)]
    size = len(values) // 5
    return [statistics.mean(values[i * size:(i + 1) * size]) for i in range(5)]


def spread(values, form="{:.1%}"):
    """Mean ± standard deviation over the seeds."""
    return f"{form.format(statistics.mean(values))} ± {form.replace('+', '').format(statistics.stdev(values) if len(values) > 1 else 0)}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs"), help="folder of the runs (default runs)")
    parser.add_argument("options", nargs="*", help="options for rrg.py, after --")
    args = parser.parse_args()
    results, tables, folders = [], [], [args.out / f"seed-{seed}" for seed in args.seeds]
    for seed, folder in zip(args.seeds, folders):
        if not (folder / "result.json").exists():
            resume = ["--resume"] if (folder / "state.pt").exists() else ["--seed", str(seed), *args.options]
            subprocess.run([sys.executable, ROOT / "rrg.py", "--out", folder, *resume], check=True)
        results.append(json.loads((folder / "result.json").read_text()))
        if not (folder / "table.json").exists():
            model = json.loads((folder / "config.json").read_text())["settings"]["model"]
            subprocess.run([sys.executable, ROOT / "evaluate.py", "--model", model, "--seed", str(seed), "--adapter", folder / "adapter",
                            "--out", folder / "table.json"], check=True)
        tables.append(list(json.loads((folder / "table.json").read_text())["rows"].values()))
    print("| held-out games | before | after | before, unseen categories | after, unseen categories |\n|---|---|---|---|---|")
    for name in NAMES:
        parts = [[r["before"] for r in results], [r["after"] for r in results], [r["before"]["unseen"] for r in results], [r["after"]["unseen"] for r in results]]
        print(f"| {name} | " + " | ".join(spread([part[name] for part in column]) for column in parts) + " |")
    shares = [fifths(folder, "oracle") for folder in folders]
    drop = max(max(five) - five[-1] for five in shares)
    print(f"\nseeds {args.seeds}, {results[0]['device']}; training {spread([r['seconds'] for r in results], '{:.0f}')} s\n"
          f"oracle share of sampled answers by fifths of training: {', '.join(spread(five) for five in zip(*shares))}; "
          f"the last fifth lies at most {drop:.1%} below the best of its run")
    print("\n| | base | RRG | gain | base, unseen categories | RRG, unseen categories | gain, unseen categories |\n|---|---|---|---|---|---|---|")
    for name in TASKS:
        form = "{:.1f}" if name == "words" else "{:.1%}"
        cells = []
        for part in ("seen", "unseen"):
            base, ours = ([rows[i][part][name] for rows in tables] for i in (0, 1))
            cells += [spread(base, form), spread(ours, form), spread([b - a for a, b in zip(base, ours)], form.replace(":", ":+"))]
        print(f"| {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
