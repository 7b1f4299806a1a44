"""The tables and pictures of README and RESULTS.md from the folders of finished runs, K seeds of
each setting. It computes every interval anew, from predictions.npz.

    python tests/tools/figures.py --group 3 --table --differences runs/{baseline,post}-1-{0,1,2}
    python tests/tools/figures.py --group 3 --points points.png runs/{baseline,post}-{0.1,1}-{0,1,2}
    python tests/tools/figures.py --method method.png

Scores are of best.pt on fold 10. Table: the seeds' mean, with its 95 % interval over the test
patients, and their standard deviation. Differences: of the seeds' means. Points: mean and range.
"""
import argparse
import json
import os
import re
import sys
from itertools import combinations
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import evaluate
import model as network

INK, GREY, BLUE, ORANGE = "#333333", "#b9bec6", "#4c8fc4", "#e08a2e"


def settings_of(runs, size):
    """{name of each setting: folders of its seeds}. A setting's name is a path that all its runs
    share but for the number at the end; with a size of 1 each run is a setting."""
    parent, seed = os.path.commonpath([Path(run).absolute().parent for run in runs or "."]), ""
    if size > 1:
        seed = r"-(seed)?\d+$"
    names, settings = [re.sub(seed, "", os.path.relpath(run, parent)) for run in runs], {}
    for name, run in zip(names, runs):
        settings.setdefault(name, []).append(Path(run))
    if {*map(len, settings.values())} != {size}:
        raise data.InputError(f"--group {size}: {len(runs)} runs of {', '.join(settings)}; wanted "
                              f"{size} of each setting")
    return settings


def scores_of(settings):
    """The predictions of all runs -> (their classes, {setting: evaluate.Scores of each seed})."""
    runs = [run for group in settings.values() for run in group]
    found = [evaluate.load_predictions(run / "predictions.npz") for run in runs]
    classes, first, scores = evaluate.shared_classes(runs, [[*p["classes"]] for p in found]), {}, {}
    for run, p in zip(runs, found):
        p = evaluate.in_order(run, p, found[0]["ecg_id"], classes)
        first = first or p
        if (p["y_true"] != first["y_true"]).any():
            raise data.InputError(f"{run}: its labels are not those of {runs[0]}")
        scores[run] = evaluate.score({**p, "patient_id": first["patient_id"]})
    return classes, {name: [scores[run] for run in group] for name, group in settings.items()}


def mean(seeds):
    """The mean Scores of several seeds: as their labels are the same, so is their factor."""
    point, slopes, factors = zip(*seeds)
    return evaluate.Scores(np.mean(point, 0), np.mean(slopes, 0), factors[0])


def table(settings, scores):
    """The settings' scores as lines of a Markdown table."""
    rows = [["run", "AUROC", "AUPRC", "seeds", "seconds of epochs"], ["---"] * 5]
    for name, seeds in scores.items():
        s, macros = mean(seeds), np.array([evaluate.macro(seed.point) for seed in seeds])
        point = macros.mean(0)
        ends = evaluate.interval(point, evaluate.half_width(s.slopes, s.factor))
        cells = ["{:.3f} ({:.3f} to {:.3f})".format(p, *e) for p, e in zip(point, ends)]
        if len(seeds) > 1:
            cells = [f"{cell} ± {sd:.3f}" for cell, sd in zip(cells, macros.std(0, ddof=1))]
        lines = [line for run in settings[name]
                 for line in (run / "metrics.jsonl").read_text().splitlines()]
        seconds = sum(json.loads(line)["seconds"] for line in lines) / len(seeds)
        rows.append([name, *cells, str(len(seeds)), f"{seconds:,.0f}"])
    return [f"| {' | '.join(row)} |" for row in rows]


def differences(classes, scores):
    """Paired differences of the settings' mean scores as lines."""
    return [line for a, b in combinations(scores, 2) for line in evaluate.difference_lines(
        {"a": a, "b": b, **evaluate.difference(mean(scores[a]), mean(scores[b]), classes)})]


def draw_points(figure, settings, scores):
    """Macro AUROC and AUPRC over the number of training ECGs, a line for the settings that differ
    in that alone: their runs are named <setting>-<frac>-<seed>."""
    lines, sizes = {}, {}
    for name, seeds in scores.items():
        trained = network.read_checkpoint(settings[name][0] / "best.pt")
        frac, labels = trained["args"]["frac"], data.load_labels(trained["data"], trained["task"])
        train = np.flatnonzero(np.isin(labels.fold, data.TRAIN_FOLDS))
        n = len(data.subset(train, frac, 0))
        line, sizes[n] = re.sub(rf"-(frac)?{frac:g}(?=-|$)", "", name), f"{n:,}"
        lines.setdefault(line, {})[n] = [evaluate.macro(seed.point) for seed in seeds]
    for k, axis in enumerate(figure.subplots(1, 2)):
        for name, points in lines.items():
            x = sorted(points)
            seeds = np.array([points[n] for n in x])[:, :, k]   # (sizes, seeds)
            axis.plot(x, seeds.mean(1), label=name, marker="o")
            axis.fill_between(x, seeds.min(1), seeds.max(1), alpha=0.15)
        axis.grid(alpha=0.3)
        axis.set(xscale="log", xlabel="training ECGs",
                 ylabel=f"macro {('AUROC', 'AUPRC')[k]}, fold 10")
        axis.set_xticks(list(sizes), list(sizes.values()))
        axis.minorticks_off()
    figure.axes[0].legend(frameon=False, fontsize="small")


def draw_stage(axis, left, title, note, color, skipped):
    """One stage, 440 wide: ECG, a backbone of six blocks, head, classes."""
    from matplotlib.patches import FancyBboxPatch

    def box(x, height, color, edge=INK, style="-"):
        axis.add_patch(FancyBboxPatch((x, 150 - height / 2), 22, height, "round,pad=0,"
                                      "rounding_size=4", fc=color, ec=edge, ls=style))

    def arrow(start, end):
        axis.annotate("", (end, 150), (start, 150), arrowprops={
            "arrowstyle": "-|>", "color": INK, "mutation_scale": 9, "shrinkA": 0, "shrinkB": 0})

    t, waves = np.linspace(0, 1, 200), ((7, 0.2, 0.035), (-8, 0.38, 0.012), (46, 0.42, 0.014),
                                        (-15, 0.46, 0.014), (12, 0.7, 0.055))   # of a made-up beat
    beat = sum(a * np.exp(-((t - c) / w) ** 2 / 2) for a, c, w in waves)
    axis.plot(left + 4 + 74 * t, 150 + beat, color=INK, linewidth=1.3)
    arrow(left + 82, left + 104)
    for i in range(6):
        x = left + 104 + 36 * i
        if i in skipped:
            box(x, 90, "white", "#8a9099", (0, (3, 2)))
            axis.plot([x - 14, x - 7, x - 7, x + 29, x + 29], [150, 150, 210, 210, 150], color=INK,
                      linewidth=1.2)
        else:
            box(x, 90, color)
        if i + 1 not in skipped:
            arrow(x + 29 if i in skipped else x + 22, x + 36)
        if color == GREY:
            axis.text(x + 11, 150, "❄", ha="center", va="center", fontsize=13, color="white")
    box(left + 320, 56, ORANGE)
    arrow(left + 342, left + 364)
    for x, y, text, size in ((41, 102, "12-lead ECG", 9.5), (331, 102, "head", 9.5),
                             (205, 42, note, 10.5)):
        axis.text(left + x, y, text, ha="center", fontsize=size, linespacing=1.4)
    axis.text(left + 216, 268, title, ha="center", fontsize=12.5, weight="bold")
    axis.text(left + 370, 103, "NORM\nAFIB\nLVH\n...", fontsize=9.5, linespacing=1.85)


def draw_method(figure):
    """The two stages of post-training side by side, for the README."""
    axis = figure.subplots()
    axis.set(xlim=(0, 900), ylim=(20, 290))
    axis.set_axis_off()
    draw_stage(axis, 8, "Stage 1: preview linear probing",
               "the backbone is frozen;\nonly the new head is trained", GREY, ())
    draw_stage(axis, 470, "Stage 2: fine-tuning with stochastic depth",
               "everything is trained, beginning with that head;\n"
               "at each step an ECG skips blocks at random", BLUE, (1, 4))
    axis.plot([450, 450], [30, 285], color=GREY, linewidth=1)


def picture(path, height, draw, *of):
    """Write what `draw` draws on a figure, 9 inches wide."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, height), layout="constrained")
    draw(figure, *of)
    with data.whole_file(path) as f:
        figure.savefig(f, format=Path(path).suffix[1:], dpi=100)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="*", help="folders of finished runs")
    add("--group", type=int, default=1, metavar="K", help="seeds of each setting (default: 1)")
    add("--table", action="store_true", help="print the settings' scores as a Markdown table")
    add("--differences", action="store_true", help="print the settings' paired differences")
    add("--points", metavar="FILE.png", help="draw the scores over the number of training ECGs")
    add("--method", metavar="FILE.png", help="draw the method; takes no runs")
    args = parser.parse_args(argv)
    with data.errors_in_one_line("figures.py", network.WeightsError):
        if args.method:
            picture(args.method, 3, draw_method)
            return
        settings = settings_of(args.runs, args.group)
        classes, scores = scores_of(settings)
        if args.table:
            print(*table(settings, scores), sep="\n")
        if args.differences:
            print(*differences(classes, scores), sep="\n")
        if args.points:
            picture(args.points, 3.6, draw_points, settings, scores)


if __name__ == "__main__":
    main()
