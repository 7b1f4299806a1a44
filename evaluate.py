"""Macro AUROC and AUPRC on PTB-XL's test fold, with 95 % intervals over patients; models compared; one ECG predicted.

    python evaluate.py runs/x/best.pt                     # fold 10; writes runs/x/predictions.npz
    python evaluate.py runs/x/best.pt --fold 9 10 --out runs/x/folds9+10.npz --json scores.json
    python evaluate.py predictions.npz                    # of any model: y_true (N, L), y_prob (N, L), classes (L,)
    python evaluate.py A.npz B.npz runs/x/best.pt --plot models.png   # side by side, with paired differences
    python evaluate.py runs/a-*/best.pt runs/b-*/best.pt --group 3     # three seeds of each of two settings
    python evaluate.py runs/x/best.pt --record path/to/record --plot ecg.png

A checkpoint of post_train.py holds all that is needed: network, task, classes, preprocessing, data path. Predictions are
made in float32 (on a GPU with PyTorch's defaults: TF32 convolutions where it has them). Needs data.py and model.py beside it.
"""
import argparse
import json
import os
import re
import sys
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import data
import model as network
from data import InputError

CHECKPOINT_LAYOUT = 1
CHECKPOINT = {"layout": int, "task": str, "classes": list, "preprocessing": str, "data": str, "args": dict}  # what one says of itself
DRAWS = 1000        # of the bootstrap
DRAW_CHUNK = 2**22  # weights held at once, 32 MB
METRICS = ("auroc", "auprc")
PREDICTIONS = {"y_true": "bfiu", "y_prob": "bfiu", "classes": "USiu", "ecg_id": "USiuf", "patient_id": "USiuf"}  # arrays: NumPy's kinds of type


# ---------------------------------------------------------------------------------------------------------------- metric

def auroc_auprc(y_true, y_prob, weight=None):
    """Per-class area under the ROC curve and average precision: y_true (N, L) of 0 and 1, y_prob (N, L) -> two arrays (L,).

    NaN where a class has no positive or no negative. weight: (N,) sample weights, or (D, N) for D weightings at once; then
    the results are (D, L). Equal to scikit-learn's roc_auc_score and average_precision_score, ties and weights included.

    With the records sorted by falling probability, A(i) and T(i) the weight of all and of the positive records down to the
    end of i's group of ties, A'(i) and T'(i) the same before that group, and P and N the positive and negative weight:
        AUROC = sum over positives of w_i (N - ((A - T) + (A' - T')) / 2) / (P N)        average precision = sum of w_i T / A / P
    so one sort and one cumulative sum per class serve every weighting.
    """
    y, prob = np.asarray(y_true, bool), np.asarray(y_prob, np.float64)
    weights = np.ones((1, len(y))) if weight is None else np.atleast_2d(np.asarray(weight, np.float64))
    auroc, auprc = np.full((2, len(weights), y.shape[1]), np.nan)
    for c in range(y.shape[1]):
        order = np.argsort(-prob[:, c], kind="stable")
        score, positive = -prob[order, c], np.flatnonzero(y[order, c])
        if not 0 < len(positive) < len(y):
            continue
        first, last = (np.searchsorted(score, score[positive], side) for side in ("left", "right"))  # its group of ties
        w = np.take(weights, order[positive], axis=1)                          # (D, positives)
        total = np.zeros((len(weights), len(y) + 1))
        np.cumsum(np.take(weights, order, axis=1), axis=1, out=total[:, 1:])
        true = np.zeros((len(weights), len(positive) + 1))
        np.cumsum(w, axis=1, out=true[:, 1:])
        below, upto = (total[:, i] for i in (first, last))                     # A', A
        true_below, true_upto = (true[:, np.searchsorted(positive, i)] for i in (first, last))  # T', T
        p = true[:, -1]
        n = total[:, -1] - p
        false = (upto - true_upto + below - true_below) / 2
        precision = np.divide(true_upto, upto, out=np.zeros_like(upto), where=upto > 0)
        with np.errstate(divide="ignore", invalid="ignore"):                   # all weights of one kind may be zero: NaN
            auroc[:, c] = (w * (n[:, None] - false)).sum(1) / (p * n)
            auprc[:, c] = (w * precision).sum(1) / p
    return (auroc[0], auprc[0]) if weight is None or np.ndim(weight) == 1 else (auroc, auprc)


def macro(values):
    """Mean over the defined classes along the last axis; NaN where none is defined."""
    defined = ~np.isnan(values)
    count = defined.sum(-1)
    return np.where(count > 0, np.where(defined, values, 0).sum(-1) / np.maximum(count, 1), np.nan)


def bootstrap(y_true, y_prob, patient_id=None, draws=DRAWS, seed=0):
    """AUROC and AUPRC of every class under `draws` Bayesian bootstrap weightings (Rubin 1981) of the patients: (draws, 2, L).

    Every patient (every record where patients are unknown) gets one Exp(1) weight a draw. No weight is zero, so that every
    class stays defined; drawing with replacement would lose the rare classes' positives. One seed gives the same patients
    the same weights whatever the model, so that differences of two models' draws are paired.
    """
    _, patient = np.unique(np.arange(len(y_true)) if patient_id is None else patient_id, return_inverse=True)
    rng, chunks = np.random.default_rng(seed), []
    step = max(1, DRAW_CHUNK // max(1, len(y_true)))
    for start in range(0, draws, step):
        weight = rng.exponential(size=(min(step, draws - start), patient.max(initial=-1) + 1))[:, patient]
        chunks.append(np.stack(auroc_auprc(y_true, y_prob, weight), axis=1))
    return np.concatenate(chunks)


class Scores(NamedTuple):
    """AUROC and AUPRC of each class, and the same under each draw of the bootstrap; of one model, or the mean of several."""
    point: np.ndarray   # (2, L)
    draws: np.ndarray   # (D, 2, L)


def score(y_true, y_prob, patient_id=None):
    return Scores(np.stack(auroc_auprc(y_true, y_prob)), bootstrap(y_true, y_prob, patient_id))


def numbers(values):
    """An array as nested lists of floats, None where undefined."""
    return [numbers(v) for v in values] if np.ndim(values) else None if np.isnan(values) else float(values)


def interval(draws):
    """95 % intervals over the first axis, the draws: (D, ...) -> (..., 2)."""
    return np.moveaxis(np.percentile(draws, (2.5, 97.5), axis=0), 0, -1)


def report(scores, y_true, classes):
    """Scores as plain data: macro AUROC and AUPRC with 95 % intervals, per class, undefined classes; None if undefined."""
    point, draws = macro(scores.point), macro(scores.draws)
    ci = interval(draws)
    return {
        "n": len(y_true),
        "macro_auroc": numbers(point[0]), "macro_auprc": numbers(point[1]), "macro_auroc_ci": numbers(ci[0]), "macro_auprc_ci": numbers(ci[1]),
        "bootstrap_bias": dict(zip(("macro_auroc", "macro_auprc"), numbers(draws.mean(0) - point))),
        "per_class": {name: {"positives": int(positives), "auroc": numbers(a), "auprc": numbers(p)}
                      for name, positives, a, p in zip(classes, np.sum(y_true, axis=0), *scores.point)},
        "undefined": [name for name, a in zip(classes, scores.point[0]) if np.isnan(a)],
    }


def difference(a, b, classes, top=5):
    """How model b differs from model a (Scores of the same records), b - a, as plain data; intervals are paired.

    The gain is relative to a, in percent. classes: those that differ most, by the larger of the two differences.
    """
    base, point, ci = macro(a.point), macro(b.point) - macro(a.point), interval(macro(b.draws) - macro(a.draws))
    gain = np.divide(100 * point, base, out=np.full(2, np.nan), where=base > 0)
    per_class = b.point - a.point
    most = [i for i in np.argsort(-np.abs(per_class).max(0), kind="stable") if not np.isnan(per_class[0, i])][:top]  # NaNs come last
    out = {}
    for i, name in enumerate(METRICS):
        out |= {f"macro_{name}_diff": numbers(point[i]), f"macro_{name}_diff_ci": numbers(ci[i]),
                f"macro_{name}_gain_percent": numbers(gain[i])}
    return out | {"classes": {classes[i]: {f"{name}_diff": numbers(per_class[k, i]) for k, name in enumerate(METRICS)} for i in most}}


def group_name(names):
    """The one name of a setting's runs, without the seed; all their names where these are not of one setting."""
    if len(set(names)) == 1:
        return names[0]
    first, *others = {re.sub(r"[-_. ]*(seed)?[-_. ]*\d+$", "", name) for name in names}
    return first if first and not others else ", ".join(names)


def grouped(names, scores, size):
    """Runs of `size` consecutive models, the seeds of one setting -> their names, the Scores of each group's mean, and plain data."""
    means, groups = [], []
    for i in range(0, len(names), size):
        files, members = names[i:i + size], scores[i:i + size]
        means.append(Scores(*(np.mean(parts, axis=0) for parts in zip(*members))))
        macros = np.array([macro(s.point) for s in members])
        sd = macros.std(0, ddof=1) if size > 1 else np.full(2, np.nan)
        groups.append({"name": group_name(files), "files": files} | {
            f"macro_{metric}_{kind}": numbers(v[k]) for k, metric in enumerate(METRICS) for kind, v in (("mean", macros.mean(0)), ("sd", sd))})
    if len({g["name"] for g in groups}) < len(groups):
        groups = [g | {"name": g["files"][0]} for g in groups]
    return [g["name"] for g in groups], means, groups


def show(score):
    return "     -" if score is None else f"{score:6.4f}"


def side_by_side(reports):
    """Models' macro scores with intervals as lines to print."""
    width = max(len(r["name"]) for r in reports)
    lines = [f"{'':{width}}  AUROC  95 % interval    AUPRC  95 % interval"]
    for r in reports:
        columns = [f"{show(r[f'macro_{m}'])} {show(r[f'macro_{m}_ci'][0])} to {show(r[f'macro_{m}_ci'][1])}" for m in METRICS]
        lines.append(f"{r['name']:{width}} {'  '.join(columns)}")
    return lines


def differences(pairs):
    """What `difference` says of each pair as lines to print."""
    lines = []
    for p in pairs:
        lines.append(f"{p['b']} - {p['a']}")
        for m in METRICS:
            diff, (low, high), gain = (p[f"macro_{m}_{key}"] for key in ("diff", "diff_ci", "gain_percent"))
            if diff is not None:
                lines.append(f"  {m.upper()} {diff:+.4f}  95 % interval {low:+.4f} to {high:+.4f}{'' if gain is None else f'  {gain:+.1f} %'}")
        most = ", ".join(f"{c} {d['auroc_diff']:+.2f} {d['auprc_diff']:+.2f}" for c, d in p["classes"].items())
        lines += [f"  most (AUROC, AUPRC): {most}"] if most else []
    return lines


def group_lines(groups):
    width, size = max(len(g["name"]) for g in groups), len(groups[0]["files"])
    lines = [f"{'mean and standard deviation of ' + str(size):{width}}"]
    for g in groups:
        lines.append(f"{g['name']:{width}} " + "  ".join(
            f"macro {m.upper()} {show(g[f'macro_{m}_mean'])} sd {show(g[f'macro_{m}_sd'])}" for m in METRICS))
    return lines


def summary(result):
    """A report's macro scores as lines to print."""
    lines = [f"{result['n']:,} records"]
    for name in METRICS:
        low, high = result[f"macro_{name}_ci"]
        lines.append(f"macro {name.upper()} {show(result[f'macro_{name}'])}  95 % interval {show(low)} to {show(high)}")
    return lines + undefined(result)


def undefined(result):
    return [f"undefined here, not counted: {', '.join(result['undefined'])}"] if result["undefined"] else []


def table(result):
    """A report's classes as lines to print."""
    width = max(map(len, [*result["per_class"], "class"]))
    return [f"{'class':{width}} positives  AUROC  AUPRC"] + [
        f"{name:{width}} {s['positives']:9,} {show(s['auroc'])} {show(s['auprc'])}" for name, s in result["per_class"].items()]


# ----------------------------------------------------------------------------------------------------------- predictions

def infer(function, signals, rows, device, batch_size=64, amp=None):
    """`function` of every batch of `signals[rows]` without gradients -> float32 (n, ...) on the CPU.

    signals: see data.batches. amp: None for float32, or the dtype of autocast. Where a GPU's memory is too small for a
    batch, smaller ones are tried.
    """
    parts = [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]
    try:
        with torch.inference_mode(), torch.autocast(torch.device(device).type, amp, enabled=amp is not None):
            outputs = [function(x).float() for x in data.batches(signals, parts, device)]
        return torch.cat(outputs).cpu().numpy()
    except torch.OutOfMemoryError:
        if batch_size == 1:
            raise
    return infer(function, signals, rows, device, batch_size // 2, amp)  # out here the failed batch is freed


def probabilities(logits):
    """Logits -> probabilities in float64: float32's sigmoid makes all logits above 17 equal."""
    return torch.sigmoid(torch.from_numpy(logits).double()).numpy()


def pick_device(name):
    """The device asked for, or where none is: a GPU if there is one, else the CPU. Raises InputError if it is not there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is unknown; wanted cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device}: this machine shows {torch.cuda.device_count()} CUDA devices; --device cpu runs anywhere")
    return device


def load_checkpoint(path, device="cpu"):
    """A checkpoint of post_train.py -> (network in eval mode, the checkpoint's dict)."""
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file; `python post_train.py` writes checkpoints to runs/")
    checkpoint = network.read_checkpoint(path)
    lacking = [key for key, kind in CHECKPOINT.items() if not isinstance(checkpoint.get(key), kind)]
    lacking += ["classes"] if not lacking and not all(isinstance(c, str) for c in checkpoint["classes"]) else []
    if lacking:
        raise InputError(f"{path}: does not say its {lacking[0]}; wanted a checkpoint of post_train.py (weights for it to start "
                         "from are no model of a task yet: train first)")
    if checkpoint["layout"] != CHECKPOINT_LAYOUT:
        raise InputError(f"{path}: is of checkpoint layout {checkpoint['layout']}, this is layout {CHECKPOINT_LAYOUT}; "
                         "use the files it was trained with, or train again")
    model = network.ecgfounder(len(checkpoint["classes"]))
    network.load_state(model, checkpoint["state_dict"], path, head=True)
    return model.to(device).eval(), checkpoint


def predict_folds(path, folds, root=None, device="cpu", batch_size=64, skip_unreadable=False):
    """Predict the records of `folds` with a checkpoint -> dict of arrays: ecg_id, patient_id, classes, y_true, y_prob."""
    model, checkpoint = load_checkpoint(path, device)
    root, how = root or checkpoint["data"], checkpoint["preprocessing"]
    labels = data.load_labels(root, checkpoint["task"])
    if labels.classes != checkpoint["classes"]:
        other = sorted(set(labels.classes) ^ set(checkpoint["classes"]))
        raise InputError(f"{path}: its {len(checkpoint['classes'])} classes are not the {len(labels.classes)} of {root} "
                         f"(first difference: {(other or ['their order'])[0]}); wanted the data it was trained for")
    data.build_cache(root, how, skip_unreadable=skip_unreadable or checkpoint["args"].get("skip_unreadable", False))
    cache = data.load_cache(root, how)
    labels, rows = data.align(labels, cache)
    chosen = np.isin(labels.fold, folds)
    if not chosen.any():
        raise InputError(f"{root}: holds no record of {checkpoint['task']} in fold {', '.join(map(str, folds))}; see --fold and --data")
    logits = infer(model, cache.signals, rows[chosen], device, batch_size)
    return {"ecg_id": labels.ecg_id[chosen], "patient_id": labels.patient_id[chosen], "classes": np.array(labels.classes),
            "y_true": labels.y[chosen], "y_prob": probabilities(logits)}


def load_predictions(path):
    """Predictions of any model from an .npz -> the dict that predict_folds gives; ecg_id and patient_id may be None."""
    try:
        with np.load(path, allow_pickle=False) as z:
            found = {key: z[key] for key in z.files if key in PREDICTIONS}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; wanted a checkpoint or predictions.npz") from None
    except Exception as error:  # NumPy and zipfile raise many types; object arrays are refused here, unread
        raise InputError(f"{path}: cannot be read as predictions ({' '.join(str(error).split())[:200]}); wanted an .npz of plain arrays") from None
    lacking = [key for key in ("y_true", "y_prob", "classes") if key not in found]
    if lacking:
        raise InputError(f"{path}: has no array {lacking[0]!r}; wanted y_true (N, L), y_prob (N, L) and classes (L,)")
    for key, array in found.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in PREDICTIONS[key]:
            raise InputError(f"{path}: {key} is of type {getattr(array, 'dtype', 'bytes')}; wanted {'numbers' if key in ('y_true', 'y_prob') else 'numbers or text'}")
    y, p, classes = found["y_true"], found["y_prob"], [c.decode("utf-8", "replace") if isinstance(c, bytes) else str(c) for c in found["classes"].ravel()]
    if y.ndim != 2 or y.shape != p.shape or len(classes) != y.shape[1] or len(set(classes)) < len(classes) or not y.size:
        raise InputError(f"{path}: y_true {y.shape}, y_prob {p.shape} and {len(set(classes))} classes; wanted (N, L), (N, L) and L")
    if not np.isin(y, (0, 1)).all():
        raise InputError(f"{path}: y_true holds other values than 0 and 1; wanted a 1 for each class a record has")
    if not (np.isfinite(p).all() and (p >= 0).all() and (p <= 1).all()):
        raise InputError(f"{path}: y_prob holds values that are no probabilities; wanted finite ones in [0, 1]")
    found["classes"], found["y_true"] = np.array(classes), y.astype(np.uint8)
    for key in ("ecg_id", "patient_id"):
        if found.setdefault(key, None) is not None and found[key].shape != y.shape[:1]:
            raise InputError(f"{path}: {key} has shape {found[key].shape}; wanted ({len(y)},)")
    if (patient := found["patient_id"]) is not None and patient.dtype.kind == "f":  # as pandas reads PTB-XL's
        found["patient_id"] = np.where(np.isfinite(patient), patient, np.arange(len(y)) - len(y))  # unknown: a patient of its own
    return found


def write_json(path, value):
    data.write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n"))


def predict_record(path, record, device="cpu", plot=None, top=5):
    """Predict one WFDB record, of any set and rate -> lines with the most probable classes; the ECG on its grid to `plot`."""
    record = str(record)
    record = record[:-4] if record.endswith((".hea", ".dat")) else record
    model, checkpoint = load_checkpoint(path, device)
    signal = data.prepare(record, checkpoint["preprocessing"])
    prob = probabilities(infer(model, signal[None], np.array([0]), device))[0]
    if plot:
        plot_record(record, plot)
    best = np.argsort(-prob, kind="stable")[:top]
    return [f"{checkpoint['classes'][i]:8} {prob[i]:.4f}" for i in best]


def plot_record(record, path):
    """The first 10 s of a record on ECG paper (25 mm/s and 10 mm/mV lines), drawn by wfdb, to a picture file."""
    import matplotlib
    matplotlib.use("Agg")
    import wfdb
    signal, fs = data.read_record(record)
    figure = wfdb.plot_items(signal=np.nan_to_num(signal[:, :int(10 * fs)]).T.astype(float), fs=fs, sig_name=list(data.LEADS),
                             sig_units=["mV"] * len(data.LEADS), time_units="seconds", ecg_grids="all", figsize=(16, 22),
                             title=Path(record).name, return_fig=True)
    save_picture(figure, path, 80)


def plot_models(path, names, scores, classes, positives):
    """Every defined class's AUROC and AUPRC with 95 % intervals, all models (lists of names and of Scores) in one picture."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    order = np.argsort(np.mean([s.point[0] for s in scores], axis=0), kind="stable")
    order = [i for i in order if not np.isnan(scores[0].point[0, i])]
    height = np.arange(len(order))
    figure, axes = plt.subplots(1, 2, sharey=True, figsize=(9, 1.5 + 0.06 * len(order) * (2 + len(scores))), layout="constrained")
    for k, (axis, metric) in enumerate(zip(axes, METRICS)):
        for m, (name, s) in enumerate(zip(names, scores)):
            x, ci = s.point[k, order], interval(s.draws[:, k, order])
            reach = np.maximum(0, [x - ci[:, 0], ci[:, 1] - x])
            axis.errorbar(x, height + 0.7 * ((len(scores) - 1) / 2 - m) / len(scores), xerr=reach, fmt="o", markersize=3, linewidth=1)
        text = [f"{name} (macro {macro(s.point)[k]:.3f})" for name, s in zip(names, scores)]
        labels = [f"{classes[i]} ({positives[i]})" for i in order]
        axis.set(xlabel=metric.upper(), ylim=(-0.7, len(order) - 0.3), yticks=height, yticklabels=[as_text(label) for label in labels])
        axis.grid(alpha=0.3)
        axis.legend(axis.containers, [as_text(t) for t in text], loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize="small")
    save_picture(figure, path, 120)


def as_text(name):
    return name.replace("$", r"\$")  # no formula to matplotlib


def save_picture(figure, path, dpi):
    import matplotlib.pyplot as plt
    plt.close(figure)  # pyplot would keep it
    data.write_atomically(path, lambda temporary: figure.savefig(temporary, format=Path(path).suffix.lstrip("."), dpi=dpi, bbox_inches="tight"))


# ------------------------------------------------------------------------------------------------------------ comparison

def matched(names, models):
    """Several models' predictions over the records and classes of the first: ecg_id, patient_id, classes, y_true, [y_prob].

    Records are matched by ecg_id, classes by name, in whatever order they come. Raises InputError saying what does not match.
    """
    first, probs = models[0], []
    patient_id = first["patient_id"]
    for name, p in zip(names, models):
        places = []
        for key, what in (("ecg_id", "record"), ("classes", "class")):
            if p[key] is None:
                raise InputError(f"{name}: has no {key}; wanted an array (N,), by which records are matched")
            mine, wanted = p[key].tolist(), first[key].tolist()
            if len(set(mine)) < len(mine):
                raise InputError(f"{name}: holds a {what} twice; wanted each once")
            if other := sorted(set(mine) ^ set(wanted), key=str):
                lacks, more = len(set(wanted) - set(mine)), len(set(mine) - set(wanted))
                raise InputError(f"{name}: of {names[0]}'s {len(wanted)} {key} it lacks {lacks}, and it has {more} others "
                                 f"(first difference: {what} {other[0]}); wanted the same")
            place = {value: i for i, value in enumerate(mine)}
            places.append([place[value] for value in wanted])
        y = p["y_true"][np.ix_(*places)]
        if len(unlike := np.argwhere(y != first["y_true"])):
            i, c = unlike[0]
            raise InputError(f"{name}: {first['classes'][c]} of ecg_id {first['ecg_id'][i]} is {y[i, c]}, in {names[0]} "
                             f"{first['y_true'][i, c]}; wanted the same labels")
        if patient_id is None and p["patient_id"] is not None:
            patient_id = p["patient_id"][places[0]]
        probs.append(p["y_prob"][np.ix_(*places)])
    return {"classes": first["classes"].tolist(), "patient_id": patient_id, "y_true": first["y_true"], "y_prob": probs}


def names_of(paths):
    """A short name for each file: its own, or its folder's where its own says nothing; whole paths where those would not differ."""
    paths = [Path(p) for p in paths]
    names = [p.resolve().parent.name if p.stem in ("best", "last", "predictions") else p.stem for p in paths]
    return names if len(set(names)) == len(set(paths)) else [str(p) for p in paths]


def compare(paths, models, group):
    """Reports, pairs and (with `group`) groups of several models as plain data; names and Scores to draw; lines to print."""
    names = names_of(paths)
    m = matched(names, models)
    scores = [score(m["y_true"], prob, m["patient_id"]) for prob in m["y_prob"]]
    reports = [{"name": name, **report(s, m["y_true"], m["classes"])} for name, s in zip(names, scores)]

    def pairs(names, scores):
        return [{"a": names[i], "b": names[j], **difference(scores[i], scores[j], m["classes"])} for i, j in combinations(range(len(names)), 2)]

    result = {"models": reports, "pairs": pairs(names, scores)}
    lines = [f"{reports[0]['n']:,} records", *undefined(reports[0]), "", *side_by_side(reports), ""]
    shown = result["pairs"]
    if group:
        names, scores, result["groups"] = grouped(names, scores, group)
        shown = result["group_pairs"] = pairs(names, scores)
        lines += [*group_lines(result["groups"]), ""]
    return result, names, scores, lines + differences(shown)


def output_of(model, out):
    """Where a checkpoint's predictions go."""
    path = Path(out or Path(model).with_name("predictions.npz"))
    return path if path.suffix == ".npz" or path.is_dir() else path.with_name(f"{path.name}.npz")


def check_picture(path):
    if Path(path).suffix not in (".png", ".pdf", ".svg"):
        raise InputError(f"{path}: no picture can be written under this name; wanted .png, .pdf or .svg")


def check(args):
    """Raise InputError for options that do not go together, before anything is read or written."""
    checkpoints = [path for path in args.models if not path.endswith(".npz")]
    given = [f"--{key.replace('_', '-')}" for key in ("fold", "data", "out", "json", "group", "skip_unreadable") if getattr(args, key) not in (None, False)]
    without_meaning = given if args.record else [name for name in given if not checkpoints and name not in ("--json", "--group")]
    if without_meaning:
        raise InputError(f"{without_meaning[0]} has no meaning {'with --record' if args.record else 'for predictions'}; leave it out")
    if len(args.models) > 1 and (args.record or args.out):
        raise InputError(f"{'--record' if args.record else '--out'} goes with one FILE, {len(args.models)} were given; give one")
    if args.group is not None and (args.group < 1 or len(args.models) % args.group or len(args.models) < 2):
        raise InputError(f"--group {args.group}: {len(args.models)} files do not come in runs of {args.group}; wanted all seeds of each setting, one after the other")
    if args.plot:
        check_picture(args.plot)
    for path in args.models:
        if not os.path.isfile(path):
            raise InputError(f"{path}: no such file; wanted a checkpoint (`python post_train.py` writes them to runs/) or predictions (.npz)")
    outputs = [] if args.record else [output_of(path, args.out) for path in dict.fromkeys(checkpoints)]
    taken = {Path(path).resolve() for path in args.models}
    for path in outputs + [Path(path) for path in (args.json, args.plot) if path]:
        if path.is_dir():
            raise InputError(f"{path}: is a folder; name a file in it")
        if not path.parent.is_dir():
            raise InputError(f"{path}: there is no folder {path.parent}; make it first")
        if path.resolve() in taken:
            raise InputError(f"{path}: would be overwritten; name another file, or score each checkpoint alone with its own --out and compare those")
        taken.add(path.resolve())
    if args.batch_size < 1:
        raise InputError(f"--batch-size is {args.batch_size}; wanted at least 1")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", metavar="FILE", nargs="+", help="checkpoints of post_train.py, or predictions (.npz) of any model; several are compared")
    parser.add_argument("--fold", type=int, nargs="+", metavar="K", help="folds to predict (default: 10, the test fold)")
    parser.add_argument("--data", help="PTB-XL's folder (default: where the checkpoint was trained)")
    parser.add_argument("--out", help="where to write the predictions (default: predictions.npz beside the checkpoint)")
    parser.add_argument("--json", metavar="FILE", help="also write the scores as JSON")
    parser.add_argument("--group", type=int, metavar="K", help="each K consecutive files are the seeds of one setting: mean and standard deviation")
    parser.add_argument("--record", metavar="PATH", help="predict this one WFDB record (path without extension) instead")
    parser.add_argument("--plot", metavar="FILE.png", help="draw each class's AUROC and AUPRC; with --record: the ECG")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    parser.add_argument("--batch-size", type=int, default=64, help="ECGs at once (default: 64)")
    parser.add_argument("--skip-unreadable", action="store_true", help="leave out records that cannot be read")
    args = parser.parse_args(argv)
    try:
        check(args)
        device = pick_device(args.device)
        if args.record:
            print("\n".join(predict_record(args.models[0], args.record, device, args.plot)))
            return
        models = [load_predictions(path) if path.endswith(".npz") else None for path in args.models]  # what is quick to fail comes first
        for i, path in enumerate(args.models):
            if models[i] is None:
                models[i] = predict_folds(path, args.fold or [data.TEST_FOLD], args.data, device, args.batch_size, args.skip_unreadable)
                data.write_atomically(output_of(path, args.out), lambda temporary: np.savez(temporary, **models[i]))
        if len(models) > 1:
            result, names, scores, lines = compare(args.models, models, args.group)
        else:
            p, names = models[0], names_of(args.models)
            scores = [score(p["y_true"], p["y_prob"], p["patient_id"])]
            result = report(scores[0], p["y_true"], p["classes"].tolist())
            lines = [*summary(result), "", *table(result)]
        print("\n".join(lines), flush=True)
        if args.json:
            write_json(args.json, result)
        if args.plot:
            plot_models(args.plot, names, scores, models[0]["classes"].tolist(), models[0]["y_true"].sum(0))
    except (InputError, network.WeightsError, OSError) as error:
        sys.stderr.write(f"evaluate.py: {data.line_of(error)}\n")
        sys.exit(2)
    except torch.OutOfMemoryError:
        sys.stderr.write("evaluate.py: the GPU's memory is too small for one ECG; end what else runs there, or try --device cpu\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("evaluate.py: interrupted; nothing is half written\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
