"""The README's tables and pictures from the folders of finished runs, K seeds of each setting one
after the other.

    python tests/tools/figures.py --group 3 --table --differences runs/{baseline,both}-1-{0,1,2}
    python tests/tools/figures.py --group 3 --points points.png runs/{baseline,both}-{0.1,1}-{0,1,2}
    python tests/tools/figures.py --method method.png

Scores are of best.pt on fold 10 (predictions.npz, which evaluate.py writes). Table: mean and
standard deviation of the seeds; the gain over the first setting, with a star where the paired 95 %
interval leaves out 0. Differences: of the seeds' mean scores. Points: their mean and range.
"""
import argparse
import functools
import json
import re
import sys
from itertools import combinations
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import evaluate
import model as network
from data import InputError

INK, GREY, BLUE, ORANGE = "#333333", "#b9bec6", "#4c8fc4", "#e08a2e"
load_labels = functools.cache(data.load_labels)


def group_name(names):
    """The one name of a setting's runs, without the seed; all their names where there is none."""
    if len(set(names)) == 1:
        return names[0]
    first, *others = {re.sub(r"[-_. ]*(seed)?[-_. ]*\d+$", "", name) for name in names}
    return ", ".join(names) if others or not first else first


def settings_of(runs, size):
    """((name, folders of its seeds) of each setting): `size` consecutive runs."""
    if size < 1 or len(runs) % size:
        raise InputError(f"--group {size}: {len(runs)} runs do not come in groups of {size}; "
                         "wanted all seeds of each setting, one after the other")
    groups = [tuple(runs[i:i + size]) for i in range(0, len(runs), size)]
    names = [group_name([Path(run).resolve().name for run in group]) for group in groups]
    if len(set(names)) < len(names):
        names = [group[0] for group in groups]
    return tuple(zip(names, groups))


def read(run, name):
    """A run's metrics.jsonl as a list of dicts, or its test.json as one."""
    try:
        text = Path(run, name).read_text()
        if name == "metrics.jsonl":
            return [json.loads(line) for line in text.splitlines()]
        return json.loads(text)
    except (OSError, ValueError) as error:
        raise InputError(f"{run}/{name}: cannot be read ({type(error).__name__}); wanted the "
                         "folder of a finished run") from None


def final_scores(run):
    """Number of ECGs, macro AUROC and AUPRC on fold 10, as post_train.py left them."""
    test = read(run, "test.json")
    return np.array([test.get(key) for key in ("n", "macro_auroc", "macro_auprc")], float)


@functools.cache
def scores_of(settings):
    """The predictions of all runs -> (their classes, (L,) positives, [[evaluate.Scores of each
    seed] of each setting], [the mean Scores of each setting])."""
    runs = [run for _, group in settings for run in group]
    paths = [f"{run}/predictions.npz" for run in runs]
    m, _ = evaluate.matched(paths, [evaluate.load_predictions(path) for path in paths])
    scores = [evaluate.score(m["y_true"], prob, m["patient_id"]) for prob in m["y_prob"]]
    for run, s in zip(runs, scores):
        found = [len(m["y_true"]), *evaluate.macro(s.point)]
        if not np.allclose(found, final_scores(run), rtol=0, atol=1e-3):
            raise InputError(f"{run}/predictions.npz: its scores are not those of test.json; "
                             f"`python evaluate.py {run}/best.pt` predicts fold 10 again")
    size = len(settings[0][1])
    seeds = [scores[i:i + size] for i in range(0, len(scores), size)]
    means = [evaluate.Scores(*(np.mean(parts, axis=0) for parts in zip(*group))) for group in seeds]
    return m["classes"], m["y_true"].sum(0), seeds, means


def pairs_of(settings):
    """Paired differences of the settings' mean scores, those to the first setting first."""
    classes, _, _, means = scores_of(settings)
    return [{"a": settings[i][0], "b": settings[j][0],
             **evaluate.difference(means[i], means[j], classes)}
            for i, j in combinations(range(len(settings)), 2)]


def score_cells(scores):
    """Macro AUROC and AUPRC of a setting's seeds as text."""
    macros = np.array([evaluate.macro(s.point) for s in scores])
    if len(scores) == 1:
        return [f"{value:.3f}" for value in macros[0]]
    return [f"{m:.3f} ± {sd:.3f}" for m, sd in zip(macros.mean(0), macros.std(0, ddof=1))]


def gain_cell(pair):
    cells = []
    for m in evaluate.METRICS:
        low, high = pair[f"macro_{m}_diff_ci"]
        star = "" if low <= 0 <= high else "*"
        cells.append(f"{pair[f'macro_{m}_gain_percent']:+.1f}{star}")
    return " / ".join(cells)


def table(settings):
    """The settings' scores as lines of a Markdown table; a star: the gain's interval over the test
    patients, for these seeds, leaves out 0."""
    rows = [["run", "AUROC", "AUPRC", "gain, %", "seeds", "seconds of epochs"], ["---"] * 6]
    gains = ["", *map(gain_cell, pairs_of(settings))]
    for (name, runs), scores, gain in zip(settings, scores_of(settings)[2], gains):
        seconds = np.mean([sum(line["seconds"] for line in read(run, "metrics.jsonl"))
                           for run in runs])
        rows.append([name, *score_cells(scores), gain, str(len(runs)), f"{seconds:,.0f}"])
    return [f"| {' | '.join(row)} |" for row in rows]


def new_figure(*shape, **options):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rc("text", parse_math=False)  # names may hold a $
    return plt.subplots(*shape, layout="constrained", **options)


def draw_classes(path, settings):
    """Every defined class's AUROC and AUPRC of each setting, with 95 % intervals where it has not
    too few positives for them."""
    classes, positives, _, means = scores_of(settings)
    count = len(means)
    order = np.argsort(np.mean([s.point[0] for s in means], axis=0), kind="stable")
    order = [i for i in order if not np.isnan(means[0].point[0, i])]
    places, tall = np.arange(len(order)), 1.5 + 0.06 * len(order) * (2 + count)
    ticks = [f"{classes[i]} ({positives[i]})" for i in order]
    figure, axes = new_figure(1, 2, sharey=True, figsize=(9, tall))
    for k, (axis, metric) in enumerate(zip(axes, evaluate.METRICS)):
        for m, s in enumerate(means):
            x = s.point[k, order]
            ci = np.clip(evaluate.interval(x, s.draws[:, k, order]), 0, 1)
            reach = np.maximum(0, [x - ci[:, 0], ci[:, 1] - x])
            reach[:, np.array(positives)[order] < evaluate.FEW] = np.nan
            y = places + 0.7 * ((count - 1) / 2 - m) / count
            axis.errorbar(x, y, xerr=reach, fmt="o", markersize=3, linewidth=1)
        names = [f"{name} (macro {evaluate.macro(s.point)[k]:.3f})"
                 for (name, _), s in zip(settings, means)]
        axis.set(xlabel=metric.upper(), ylim=(-0.7, len(order) - 0.3))
        axis.set_yticks(places, ticks)
        axis.grid(alpha=0.3)
        axis.legend(axis.containers, names, loc="lower left", bbox_to_anchor=(0, 1),
                    frameon=False, fontsize="small")
    evaluate.save_picture(figure, path, dpi=120)


def training_size(run):
    """(number of training ECGs, their fraction), of which best.pt tells."""
    checkpoint = evaluate.load_checkpoint(Path(run, "best.pt"))
    labels, frac = load_labels(checkpoint["data"], checkpoint["task"]), checkpoint["args"]["frac"]
    return len(data.subset(np.flatnonzero(np.isin(labels.fold, data.TRAIN_FOLDS)), frac, 0)), frac


def draw_points(path, settings):
    """Macro AUROC and AUPRC over the number of training ECGs, a line for the settings that differ
    in that alone: their runs are named <setting>-<frac>-<seed>."""
    lines = {}
    for name, runs in settings:
        for run in runs:
            n, frac = training_size(run)
            line = re.sub(rf"(.*)-(frac)?{re.escape(f'{frac:g}')}(\.0)?(?=-|$)", r"\1", name)
            lines.setdefault(line, {}).setdefault(n, []).append(final_scores(run)[1:])
    sizes = sorted({n for points in lines.values() for n in points})
    figure, axes = new_figure(1, 2, figsize=(9, 3.6))
    for k, (axis, metric) in enumerate(zip(axes, evaluate.METRICS)):
        for name, points in lines.items():
            x = sorted(points)
            seeds = [np.array(points[n])[:, k] for n in x]
            line, = axis.plot(x, list(map(np.mean, seeds)), label=name, marker="o")
            axis.fill_between(x, list(map(np.min, seeds)), list(map(np.max, seeds)), alpha=0.15,
                              color=line.get_color())
        axis.grid(alpha=0.3)
        axis.set(xscale="log", xlabel="training ECGs", ylabel=f"macro {metric.upper()}, fold 10")
        axis.set_xticks(sizes, [f"{n:,}" for n in sizes])
        axis.minorticks_off()
    axes[0].legend(frameon=False, fontsize="small")
    evaluate.save_picture(figure, path, dpi=110)


def arrow(axis, start, end):
    axis.annotate("", end, start, arrowprops={
        "arrowstyle": "-|>", "color": INK, "mutation_scale": 9, "shrinkA": 0, "shrinkB": 0})


def box(axis, x, height, color, **style):
    from matplotlib.patches import FancyBboxPatch
    axis.add_patch(FancyBboxPatch((x, 150 - height / 2), 22, height,
                                  "round,pad=0,rounding_size=4", facecolor=color,
                                  **{"edgecolor": INK} | style))


def draw_stage(axis, left, title, color, skipped, note):
    """One stage, 440 wide: ECG, a backbone of six blocks, head, classes."""
    axis.text(left + 216, 268, title, ha="center", fontsize=12.5, weight="bold")
    t = np.linspace(0, 1, 200)
    waves = ((7, 0.2, 0.035), (-8, 0.38, 0.012), (46, 0.42, 0.014), (-15, 0.46, 0.014),
             (12, 0.7, 0.055))  # of a made-up beat
    beat = sum(a * np.exp(-((t - c) / w) ** 2 / 2) for a, c, w in waves)
    axis.plot(left + 4 + 74 * t, 150 + beat, color=INK, linewidth=1.3)
    axis.text(left + 41, 102, "12-lead ECG", ha="center", fontsize=9.5)
    arrow(axis, (left + 82, 150), (left + 104, 150))
    for i in range(6):
        x = left + 104 + 36 * i
        if i in skipped:
            box(axis, x, 90, "white", edgecolor="#8a9099", linestyle=(0, (3, 2)))
            axis.plot([x - 14, x - 7, x - 7, x + 29, x + 29], [150, 150, 210, 210, 150], color=INK,
                      linewidth=1.2)
            arrow(axis, (x + 29, 150), (x + 36, 150))
            continue
        box(axis, x, 90, color)
        if i + 1 not in skipped:
            arrow(axis, (x + 22, 150), (x + 36, 150))
        if color == GREY:
            axis.text(x + 11, 150, "❄", ha="center", va="center", fontsize=13, color="white")
    axis.text(left + 205, 84, note, ha="center", va="top", fontsize=10.5, linespacing=1.4)
    box(axis, left + 320, 56, ORANGE)
    axis.text(left + 331, 102, "head", ha="center", fontsize=9.5)
    arrow(axis, (left + 342, 150), (left + 364, 150))
    for i, name in enumerate(("NORM", "AFIB", "LVH", "...")):
        axis.text(left + 370, 184 - 24 * i, name, va="center", fontsize=9.5)


def draw_method(path):
    """The two stages of post-training side by side, for the README."""
    figure, axis = new_figure(figsize=(9, 3))
    axis.set(xlim=(0, 900), ylim=(20, 290))
    axis.set_axis_off()
    draw_stage(axis, 8, "Stage 1: preview linear probing", GREY, (),
               "the backbone is frozen;\nonly the new head is trained")
    draw_stage(axis, 470, "Stage 2: fine-tuning with stochastic depth", BLUE, (1, 4),
               "everything is trained, beginning with that head;\n"
               "at each step an ECG skips blocks at random")
    axis.plot([450, 450], [30, 285], color=GREY, linewidth=1)
    evaluate.save_picture(figure, path, dpi=100)


def run(args):
    """Draw what the arguments ask for -> lines to print."""
    for path in filter(None, (args.classes, args.points, args.method)):
        if Path(path).suffix not in evaluate.PICTURES:
            raise InputError(f"{path}: no picture can be written under this name; wanted "
                             f"{' or '.join(evaluate.PICTURES)}")
    of_runs = args.table or args.differences or args.classes or args.points
    if bool(args.runs) != bool(of_runs) or not (of_runs or args.method):
        raise InputError("wanted RUN and --table, --differences, --classes or --points; or "
                         "--method alone")
    settings, lines = settings_of(args.runs, args.group), []
    if args.method:
        draw_method(args.method)
    if args.table:
        lines += table(settings)
    if args.differences:
        lines += evaluate.difference_lines(pairs_of(settings))
    if args.classes:
        draw_classes(args.classes, settings)
    if args.points:
        draw_points(args.points, settings)
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="*", help="folders of finished runs")
    add("--group", type=int, default=1, metavar="K", help="seeds of each setting (default: 1)")
    add("--table", action="store_true", help="print the settings' scores as a Markdown table")
    add("--differences", action="store_true", help="print the settings' paired differences")
    add("--classes", metavar="FILE.png", help="draw each class's scores")
    add("--points", metavar="FILE.png", help="draw the scores over the number of training ECGs")
    add("--method", metavar="FILE.png", help="draw the method; takes no runs")
    args = parser.parse_args(argv)
    try:
        for line in run(args):
            print(line)
    except (InputError, network.WeightsError, OSError) as error:
        sys.stderr.write(f"figures.py: {data.line_of(error)}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
