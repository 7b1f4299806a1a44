"""Tables and pictures of README and RESULTS.md from the folders of finished runs, K seeds of each
setting, whose means are compared. Computes every interval anew, from predictions.npz.

    python tests/tools/figures.py --group 3 --table --differences runs/{baseline,post}-1-{0,1,2}
    python tests/tools/figures.py --points points.png runs/{baseline,post}-{0.1,1}-{0,1,2}
    python tests/tools/figures.py --method method.png
"""
import argparse
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import evaluate

INK, GREY, BLUE, ORANGE = "#333333", "#b9bec6", "#4c8fc4", "#e08a2e"


def scores_of(runs):
    """Folders of the same records' predictions -> their classes, the evaluate.Scores of each."""
    found = [evaluate.load_predictions(f"{run}/predictions.npz") for run in runs]
    classes = evaluate.shared_classes(runs, [[*p["classes"]] for p in found])
    found = [evaluate.in_order(run, p, found[0]["ecg_id"], classes) for run, p in zip(runs, found)]
    assert all((p["y_true"] == found[0]["y_true"]).all() for p in found), "the labels differ"
    return classes, list(map(evaluate.score, found))


def mean(seeds):
    """The mean Scores of several seeds: as their labels are the same, so is their factor."""
    point, slopes, factors = zip(*seeds)
    return evaluate.Scores(np.mean(point, 0), np.mean(slopes, 0), factors[0])


def table(settings):
    """Print the seeds' mean scores in Markdown, with 95 % intervals over the test patients, and the
    standard deviations of the seeds."""
    print("| run | AUROC | AUPRC | seeds |\n| --- | --- | --- | --- |")
    for name, seeds in settings.items():
        s, macros = mean(seeds), [evaluate.macro(seed.point) for seed in seeds]
        point = np.mean(macros, 0)
        ends = evaluate.interval(point, evaluate.half_width(s.slopes, s.factor))
        cells = ["{:.3f} ({:.3f} to {:.3f})".format(p, *e) for p, e in zip(point, ends)]
        if len(seeds) > 1:
            cells = [f"{cell} ± {sd:.3f}" for cell, sd in zip(cells, np.std(macros, 0, ddof=1))]
        print(f"| {name} | {' | '.join(cells)} | {len(seeds)} |")


def draw_points(figure, runs, scores):
    """Macro AUROC and AUPRC over the fraction of the training ECGs, a line for the runs that are
    named alike but for fraction and seed: <setting>-<frac>-<seed>."""
    lines = {}
    for run, s in zip(runs, scores):
        setting, frac, _ = run.rsplit("-", 2)
        line = lines.setdefault(Path(setting).name, {})
        line.setdefault(float(frac), []).append(evaluate.macro(s.point))
    for k, axis in enumerate(figure.subplots(1, 2)):
        for name, line in lines.items():
            x = sorted(line)
            seeds = [np.array(line[frac])[:, k] for frac in x]
            axis.plot(x, [*map(np.mean, seeds)], label=name, marker="o")
            axis.fill_between(x, [*map(np.min, seeds)], [*map(np.max, seeds)], alpha=0.15)
        axis.set(xscale="log", xlabel="fraction of the training ECGs", xticks=x, xticklabels=x,
                 ylabel=f"macro {('AUROC', 'AUPRC')[k]}, fold 10")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)


def draw_stage(axis, left, title, note, color, skipped):
    """One stage: ECG, a backbone of six blocks and a head, classes."""
    t = np.linspace(0, 1, 200)
    beat = sum(height * np.exp(-((t - x) / w) ** 2 / 2) for height, x, w in ((7, 0.2, 0.035),
               (-8, 0.38, 0.012), (46, 0.42, 0.014), (-15, 0.46, 0.014), (12, 0.7, 0.055)))
    axis.plot(left + 4 + 74 * t, 150 + beat, color=INK, linewidth=1.3)
    axis.annotate("", (left + 364, 150), (left + 82, 150), zorder=0, arrowprops={
        "arrowstyle": "-|>", "color": INK, "shrinkA": 0, "shrinkB": 0})
    for i, x in enumerate(range(left + 104, left + 356, 36)):
        height, face = (56, ORANGE) if i == 6 else (90, color)
        face, line = ("white", ":") if i in skipped else (face, "-")
        axis.add_patch(FancyBboxPatch((x, 150 - height / 2), 22, height, "round,pad=0,"
                                      "rounding_size=4", fc=face, ec=INK, ls=line))
        if i in skipped:
            axis.plot([x - 7, x + 29], [150, 150], color="white", linewidth=3, zorder=0.5)
            axis.plot([x - 7, x - 7, x + 29, x + 29], [150, 210, 210, 150], color=INK)
        axis.text(x + 5, 144, "❄" * (face == GREY), fontsize=13, color="white")
    for x, y, text, size in ((41, 102, "12-lead ECG", 9.5), (331, 102, "head", 9.5),
                             (205, 42, note, 10.5), (216, 268, title, 12.5)):
        axis.text(left + x, y, text, ha="center", fontsize=size, linespacing=1.4)
    axis.text(left + 370, 103, "NORM\nAFIB\nLVH\n...", fontsize=9.5, linespacing=1.85)


def draw_method(figure):
    """The two stages of post-training side by side, for the README."""
    axis = figure.add_subplot(xlim=(0, 900), ylim=(20, 290), frame_on=False, xticks=(), yticks=())
    draw_stage(axis, 8, "Stage 1: preview linear probing",
               "the backbone is frozen;\nonly the new head is trained", GREY, ())
    draw_stage(axis, 470, "Stage 2: fine-tuning with stochastic depth",
               "everything is trained, beginning with that head;\n"
               "at each step an ECG skips blocks at random", BLUE, (1, 4))
    axis.plot([450, 450], [30, 285], color=GREY, linewidth=1)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="*", help="folders of finished runs")
    add("--group", type=int, default=1, metavar="K", help="seeds of each setting (default: 1)")
    add("--table", action="store_true", help="print the settings' scores as a Markdown table")
    add("--differences", action="store_true", help="print the settings' paired differences")
    add("--points", metavar="FILE.png", help="draw the scores over the fraction trained on")
    add("--method", metavar="FILE.png", help="draw the method; takes no runs")
    args = parser.parse_args(argv)
    figure, settings = Figure(figsize=(9, 3), layout="constrained"), {}
    if args.method:
        draw_method(figure)
        return figure.savefig(args.method)
    with data.errors_in_one_line("figures.py"):
        classes, scores = scores_of(args.runs)
        for run, s in zip(args.runs, scores):
            name = run.rpartition("-")[0] if args.group > 1 else run
            settings.setdefault(name, []).append(s)
        if {*map(len, settings.values())} != {args.group}:
            raise data.InputError(f"--group {args.group}: wanted {args.group} seeds of each of "
                                  f"{', '.join(settings)}")
        if args.table:
            table(settings)
        for a, b in combinations(settings, 2) if args.differences else ():
            pair = evaluate.difference(mean(settings[a]), mean(settings[b]), classes)
            print(*evaluate.difference_lines({"a": a, "b": b, **pair}), sep="\n")
        if args.points:
            draw_points(figure, args.runs, scores)
            figure.savefig(args.points)


if __name__ == "__main__":
    main()
