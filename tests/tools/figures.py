"""The README's table and pictures from the folders of finished runs, K seeds of each setting one after the other.

    python tests/figures.py --group 3 --table --curves curves.png runs/a-0 runs/a-1 runs/a-2 runs/b-0 ...
    python tests/figures.py --classes classes.png runs/a runs/b

table: macro scores on fold 10 (predictions.npz) and, where every run has a last.npz, of that too; mean and standard deviation over
the seeds; the gain over the first setting, with a star where the paired 95 % interval leaves out 0; seconds of training, the mean.
curves: metrics.jsonl's losses and validation scores over the epochs of fine-tuning, the mean of the seeds in their range.
classes: evaluate.py's picture of each class, of predictions.npz.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import evaluate
from data import InputError

PANELS = {"train_loss": "training loss", "val_loss": "validation loss", "macro_auroc": "validation macro AUROC", "macro_auprc": "validation macro AUPRC"}


def history(run):
    """A run's metrics.jsonl -> its lines as dicts. Raises InputError where that cannot be read."""
    try:
        return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{run}: has no metrics.jsonl that can be read ({type(error).__name__}); wanted the folder of a finished run") from None


def check_scores(path, model):
    """Raise InputError if predictions.npz is not best.pt's of fold 10, whose scores the run left in test.json."""
    try:
        test = json.loads(Path(path).with_name("test.json").read_text())
        same = test["n"] == model["n"] and all(math.isclose(test[f"macro_{m}"], model[f"macro_{m}"], abs_tol=1e-3) for m in evaluate.METRICS)
    except (OSError, ValueError, TypeError, KeyError):
        same = False
    if not same:
        raise InputError(f"{path}: its scores are not those of test.json; `python evaluate.py {Path(path).with_name('best.pt')}` predicts fold 10 again")


def score_cells(runs, group, name):
    """AUROC, AUPRC and gain of each setting from the runs' predictions `name`, as text."""
    paths = [f"{run}/{name}" for run in runs]
    result = evaluate.compare(paths, [evaluate.load_predictions(path) for path in paths], group)[0]
    if name == "predictions.npz":
        for path, model in zip(paths, result["models"]):
            check_scores(path, model)
    against_first = [None, *result["group_pairs"]]  # the pairs of the first setting come first
    for g, pair in zip(result["groups"], against_first):
        scores, gains = [], []
        for m in evaluate.METRICS:
            mean, sd = g[f"macro_{m}_mean"], g[f"macro_{m}_sd"]
            scores.append(f"{mean:.3f}" if sd is None else f"{mean:.3f} ± {sd:.3f}")
            if pair:
                low, high = pair[f"macro_{m}_diff_ci"]
                gains.append(f"{pair[f'macro_{m}_gain_percent']:+.1f}{'' if low <= 0 <= high else '*'}")
        yield [*scores, " / ".join(gains)]


def table(runs, group):
    """The settings' scores as lines of a Markdown table; the first setting is the one the gains are relative to."""
    names = ["predictions.npz"] + ["last.npz"] * all(Path(run, "last.npz").exists() for run in runs)
    heads = ["AUROC", "AUPRC", "gain, %", "AUROC, last", "AUPRC, last", "gain, %, last"][:3 * len(names)]
    cells = [sum(parts, []) for parts in zip(*(score_cells(runs, group, name) for name in names))]
    rows = [["run", *heads, "seeds", "seconds"], ["---"] * (len(heads) + 3)]
    for i, cell in zip(range(0, len(runs), group), cells):
        seeds = runs[i:i + group]
        seconds = np.mean([sum(line["seconds"] for line in history(run)) for run in seeds])
        rows.append([evaluate.group_name([Path(run).name for run in seeds]), *cell, str(group), f"{seconds:,.0f}"])
    return [f"| {' | '.join(row)} |" for row in rows]


def draw_curves(path, runs, group):
    """runs: folders with metrics.jsonl, whose stage `finetune` is drawn; settings without one are left out."""
    settings = []
    for i in range(0, len(runs), group):
        seeds = [[line for line in history(run) if line["stage"] == "finetune"] for run in runs[i:i + group]]
        if len({len(seed) for seed in seeds}) > 1:
            raise InputError(f"{', '.join(runs[i:i + group])}: have {[len(seed) for seed in seeds]} epochs of fine-tuning; "
                             "wanted the same number for the seeds of one setting")
        if seeds[0]:
            settings.append((evaluate.group_name([Path(run).name for run in runs[i:i + group]]), seeds))
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, layout="constrained")
    for name, seeds in settings:
        for axis, (key, label) in zip(axes.flat, PANELS.items()):
            values = np.array([[line[key] for line in seed] for seed in seeds], float)
            epochs = np.arange(1, values.shape[1] + 1)
            axis.plot(epochs, values.mean(0), label=evaluate.as_text(name))
            axis.fill_between(epochs, values.min(0), values.max(0), alpha=0.15)
            axis.set(ylabel=label)
            axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set(xlabel="epoch of fine-tuning")
    axes[0, 0].legend(frameon=False, fontsize="small")
    evaluate.save_picture(figure, path, 110)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of finished runs")
    parser.add_argument("--group", type=int, default=1, metavar="K", help="seeds of each setting (default: 1)")
    parser.add_argument("--table", action="store_true", help="print the settings' scores as a Markdown table")
    parser.add_argument("--curves", metavar="FILE.png")
    parser.add_argument("--classes", metavar="FILE.png")
    args = parser.parse_args(argv)
    try:
        if args.group < 1 or len(args.runs) % args.group:
            raise InputError(f"--group {args.group}: {len(args.runs)} runs do not come in groups of {args.group}; wanted all seeds of each setting, one after the other")
        for picture in filter(None, (args.curves, args.classes)):
            evaluate.check_picture(picture)
        if args.table:
            print("\n".join(table(args.runs, args.group)))
        if args.curves:
            draw_curves(args.curves, args.runs, args.group)
    except (InputError, OSError) as error:
        sys.stderr.write(f"figures.py: {data.line_of(error)}\n")
        sys.exit(2)
    if args.classes:
        group = ["--group", str(args.group)] if args.group > 1 else []
        evaluate.main([f"{run}/predictions.npz" for run in args.runs] + [*group, "--plot", args.classes])


if __name__ == "__main__":
    main()
