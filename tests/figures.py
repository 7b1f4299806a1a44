"""Draw the README's pictures from the folders of finished runs, K seeds of each setting one after the other.

    python tests/figures.py --group 3 --curves tests/figures/curves.png --classes tests/figures/classes.png runs/a-0 runs/a-1 runs/a-2 runs/b-0 ...

curves: metrics.jsonl's losses and validation scores over the epochs of fine-tuning, the mean of the seeds in their range.
classes: evaluate.py's picture of each class, of predictions.npz.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import evaluate

PANELS = {"train_loss": "training loss", "val_loss": "validation loss", "macro_auroc": "validation macro AUROC", "macro_auprc": "validation macro AUPRC"}


def draw_curves(path, runs, group):
    """runs: folders with metrics.jsonl, whose stage `finetune` is drawn; settings without one are left out."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, layout="constrained")
    for i in range(0, len(runs), group):
        seeds = [[line for line in map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines()) if line["stage"] == "finetune"]
                 for run in runs[i:i + group]]
        if not seeds[0]:
            continue
        name = evaluate.group_name([Path(run).resolve().name for run in runs[i:i + group]])
        for axis, (key, label) in zip(axes.flat, PANELS.items()):
            values = np.array([[line[key] for line in seed] for seed in seeds], float)
            epochs = np.arange(1, values.shape[1] + 1)
            axis.plot(epochs, values.mean(0), label=name)
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
    parser.add_argument("--group", type=int, default=1, help="seeds of each setting")
    parser.add_argument("--curves", metavar="FILE.png")
    parser.add_argument("--classes", metavar="FILE.png")
    args = parser.parse_args(argv)
    if args.curves:
        draw_curves(args.curves, args.runs, args.group)
    if args.classes:
        evaluate.main([f"{run}/predictions.npz" for run in args.runs] + ["--group", str(args.group), "--plot", args.classes])


if __name__ == "__main__":
    main()
