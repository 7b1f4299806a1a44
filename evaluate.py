"""Macro AUROC and AUPRC on PTB-XL's test fold, with 95 % intervals over patients; models compared;
one ECG predicted.

    python evaluate.py runs/x/best.pt                     # fold 10; writes runs/x/predictions.npz
    python evaluate.py runs/x/best.pt --fold 9 10 --out runs/x/folds9+10.npz --json scores.json
    python evaluate.py predictions.npz                    # of any model: y_true and y_prob (N, L),
                                                          # classes (L,)
    python evaluate.py A.npz B.npz runs/x/best.pt         # side by side, with paired differences
    python evaluate.py runs/x/best.pt --record path/to/record --plot ecg.png

A checkpoint of post_train.py holds all that is needed: network, task, classes, preprocessing, data
path. Predictions are made in float32 (on a GPU with PyTorch's defaults: TF32 convolutions where it
has them). Needs data.py and model.py beside it.
"""
import argparse
import json
import os
import sys
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import data
import model as network
from data import InputError

METRICS = ("auroc", "auprc")
DRAWS = 1000        # of the bootstrap
DRAW_CHUNK = 2**22  # weights held at once, 32 MB
CHECKPOINT_LAYOUT = 1
CHECKPOINT = {"layout": int, "task": str, "classes": list, "preprocessing": str, "data": str,
              "args": dict}  # what one says of itself
PREDICTIONS = {     # the arrays (the last two may be missing) and the NumPy kinds they may have
    "y_true": "biuf", "y_prob": "biuf", "classes": "biufUS", "ecg_id": "biufUS",
    "patient_id": "biufUS"}


# ------------------------------------------------------------------------------------------- metric

def auroc_auprc(y_true, y_prob, weight=None):
    """Per-class area under the ROC curve and average precision: y_true (N, L) of 0 and 1, y_prob
    (N, L) -> two arrays (L,).

    NaN where a class has no positive or no negative. weight: (N,) sample weights, or (D, N) for D
    weightings at once; then the results are (D, L). Equal to scikit-learn's roc_auc_score and
    average_precision_score, ties and weights included.
    """
    y, prob = np.asarray(y_true, bool), np.asarray(y_prob, np.float64)
    weights = np.ones(len(y)) if weight is None else np.asarray(weight, np.float64)
    areas = np.full((2, *weights.shape[:-1], y.shape[1]), np.nan)
    for c in range(y.shape[1]):
        if y[:, c].any() and not y[:, c].all():
            areas[..., c] = class_areas(y[:, c], prob[:, c], weights)
    return areas[0], areas[1]


def class_areas(y, prob, weights):
    """AUROC and average precision of one class: y (N,) bool, prob (N,), weights (..., N) -> two
    arrays (...).

    With the records sorted by falling probability, A(i) and T(i) the weight of all and of the
    positive records down to the end of i's group of ties, A'(i) and T'(i) the same before that
    group, and P and N the positive and negative weight:
        AUROC = sum over the positives of w_i (N - ((A - T) + (A' - T')) / 2) / (P N)
        average precision = sum over the positives of w_i T / A / P
    so one sort and one cumulative sum serve every weighting.
    """
    order = np.argsort(-prob, kind="stable")
    score, positive = -prob[order], np.flatnonzero(y[order])
    first, last = (np.searchsorted(score, score[positive], side) for side in ("left", "right"))
    w = np.take(weights, order[positive], axis=-1)
    total, true = cumulated(np.take(weights, order, axis=-1)), cumulated(w)
    total_before, total_upto = total[..., first], total[..., last]                      # A', A
    true_before, true_upto = (true[..., np.searchsorted(positive, i)] for i in (first, last))
    p = true[..., -1]
    n = total[..., -1] - p
    false = (total_upto - true_upto + total_before - true_before) / 2
    precision = np.divide(true_upto, total_upto, out=np.zeros_like(w), where=total_upto > 0)
    with np.errstate(divide="ignore", invalid="ignore"):  # all weights of one kind may be zero: NaN
        auroc = (w * (n[..., None] - false)).sum(-1) / (p * n)
        return auroc, (w * precision).sum(-1) / p


def cumulated(weights):
    """(..., N) -> (..., N + 1), the sums of the first 0 to N."""
    out = np.zeros((*weights.shape[:-1], weights.shape[-1] + 1))
    np.cumsum(weights, axis=-1, out=out[..., 1:])
    return out


def macro(values):
    """Mean over the defined classes along the last axis; NaN where none is defined."""
    defined = ~np.isnan(values)
    total, count = np.where(defined, values, 0).sum(-1), defined.sum(-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def bootstrap(y_true, y_prob, patient_id=None, draws=DRAWS, seed=0):
    """AUROC and AUPRC of every class under `draws` Bayesian bootstrap weightings (Rubin 1981) of
    the patients: (draws, 2, L).

    Every patient (every record where patients are unknown) gets one Exp(1) weight a draw. No weight
    is zero, so that every class stays defined; drawing with replacement would lose the rare
    classes' positives. One seed gives the same patients the same weights whatever the model, so
    that differences of two models' draws are paired.
    """
    if patient_id is None:
        patient_id = np.arange(len(y_true))
    _, patient = np.unique(patient_id, return_inverse=True)
    rng, chunks = np.random.default_rng(seed), []
    n_patients, step = patient.max(initial=-1) + 1, max(1, DRAW_CHUNK // max(1, len(y_true)))
    for start in range(0, draws, step):
        weight = rng.exponential(size=(min(step, draws - start), n_patients))[:, patient]
        chunks.append(np.stack(auroc_auprc(y_true, y_prob, weight), axis=1))
    return np.concatenate(chunks)


class Scores(NamedTuple):
    """AUROC and AUPRC of each class, and the same under each draw of the bootstrap."""
    point: np.ndarray   # (2, L)
    draws: np.ndarray   # (D, 2, L)


def score(y_true, y_prob, patient_id=None):
    return Scores(np.stack(auroc_auprc(y_true, y_prob)), bootstrap(y_true, y_prob, patient_id))


def interval(draws):
    """95 % intervals over the first axis, the draws: (D, ...) -> (..., 2)."""
    return np.moveaxis(np.percentile(draws, (2.5, 97.5), axis=0), 0, -1)


# ------------------------------------------------------------------------------------------ reports

def plain(values):
    """An array as nested lists of floats, None where undefined."""
    if np.ndim(values):
        return [plain(v) for v in values]
    return None if np.isnan(values) else float(values)


def report(scores, y_true, classes):
    """Scores as plain data: macro AUROC and AUPRC with 95 % intervals, per class, undefined
    classes; None if undefined."""
    point, draws = macro(scores.point), macro(scores.draws)
    ci, bias = interval(draws), draws.mean(0) - point
    names = [f"macro_{metric}" for metric in METRICS]
    auroc, auprc = map(plain, scores.point)
    positives = np.sum(y_true, axis=0).tolist()
    return {
        "n": len(y_true),
        **dict(zip(names, plain(point))),
        **{f"{name}_ci": plain(ends) for name, ends in zip(names, ci)},
        "bootstrap_bias": dict(zip(names, plain(bias))),
        "per_class": {name: {"positives": n, "auroc": a, "auprc": p}
                      for name, n, a, p in zip(classes, positives, auroc, auprc)},
        "undefined": [name for name, a in zip(classes, auroc) if a is None],
    }


def difference(a, b, classes, top=5):
    """How model b differs from model a (Scores of the same records), b - a, as plain data;
    intervals are paired.

    The gain is relative to a, in percent. classes: the `top` that differ most, by the larger of
    the two differences.
    """
    base, point = macro(a.point), macro(b.point) - macro(a.point)
    ci = interval(macro(b.draws) - macro(a.draws))
    gain = np.divide(100 * point, base, out=np.full(2, np.nan), where=base > 0)
    out = {}
    for i, name in enumerate(METRICS):
        out |= {f"macro_{name}_diff": plain(point[i]), f"macro_{name}_diff_ci": plain(ci[i]),
                f"macro_{name}_gain_percent": plain(gain[i])}
    per_class = b.point - a.point
    order = np.argsort(-np.abs(per_class).max(0), kind="stable")  # NaNs come last
    most = [i for i in order if not np.isnan(per_class[0, i])][:top]
    out["classes"] = {classes[i]: {f"{name}_diff": plain(per_class[k, i])
                                   for k, name in enumerate(METRICS)} for i in most}
    return out


def digits(value):
    return "     -" if value is None else f"{value:6.4f}"


def summary_lines(result):
    """A report's macro scores as lines to print."""
    lines = [f"{result['n']:,} records"]
    for name in METRICS:
        low, high = map(digits, result[f"macro_{name}_ci"])
        lines.append(f"macro {name.upper()} {digits(result[f'macro_{name}'])}  "
                     f"95 % interval {low} to {high}")
    return lines + undefined_lines(result)


def undefined_lines(result):
    names = result["undefined"]
    return [f"undefined here, not counted: {', '.join(names)}"] if names else []


def class_lines(result):
    """A report's classes as lines to print."""
    width = max(map(len, [*result["per_class"], "class"]))
    lines = [f"{'class':{width}} positives  AUROC  AUPRC"]
    for name, s in result["per_class"].items():
        scores = f"{digits(s['auroc'])} {digits(s['auprc'])}"
        lines.append(f"{name:{width}} {s['positives']:9,} {scores}")
    return lines


def model_lines(reports):
    """Models' macro scores with intervals, side by side, as lines to print."""
    width = max(len(r["name"]) for r in reports)
    lines = [f"{'':{width}}  AUROC  95 % interval    AUPRC  95 % interval"]
    for r in reports:
        columns = []
        for m in METRICS:
            low, high = map(digits, r[f"macro_{m}_ci"])
            columns.append(f"{digits(r[f'macro_{m}'])} {low} to {high}")
        lines.append(f"{r['name']:{width}} {'  '.join(columns)}")
    return lines


def difference_lines(pairs):
    """What `difference` says of each pair as lines to print."""
    lines = []
    for pair in pairs:
        lines.append(f"{pair['b']} - {pair['a']}")
        for m in METRICS:
            keys = (f"macro_{m}_{key}" for key in ("diff", "diff_ci", "gain_percent"))
            diff, ci, gain = (pair[key] for key in keys)
            if diff is None:
                continue
            line = f"  {m.upper()} {diff:+.4f}  95 % interval {ci[0]:+.4f} to {ci[1]:+.4f}"
            lines.append(line if gain is None else f"{line}  {gain:+.1f} %")
        most = [f"{name} {d['auroc_diff']:+.2f} {d['auprc_diff']:+.2f}"
                for name, d in pair["classes"].items()]
        if most:
            lines.append(f"  most (AUROC, AUPRC): {', '.join(most)}")
    return lines


def write_json(path, value):
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    data.write_atomically(path, lambda temporary: temporary.write_text(text))


# -------------------------------------------------------------------------------------- predictions

def infer(function, signals, rows, device, batch_size=64, amp=None):
    """`function` of every batch of `signals[rows]` without gradients -> float32 (n, ...) on the
    CPU.

    signals: see data.batches. amp: None for float32, or the dtype of autocast. Where a GPU's memory
    is too small for a batch, smaller ones are tried.
    """
    parts = [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]
    autocast = torch.autocast(torch.device(device).type, amp, enabled=amp is not None)
    try:
        with torch.inference_mode(), autocast:
            outputs = [function(x).float() for x in data.batches(signals, parts, device)]
        return torch.cat(outputs).cpu().numpy()
    except torch.OutOfMemoryError:
        if batch_size == 1:
            raise
    return infer(function, signals, rows, device, batch_size // 2, amp)  # the failed one is freed


def probabilities(logits):
    """Logits -> probabilities in float64: float32's sigmoid makes all logits above 17 equal."""
    return torch.sigmoid(torch.from_numpy(logits).double()).numpy()


def pick_device(name):
    """The device asked for, or where none is: a GPU if there is one, else the CPU. Raises
    InputError if it is not there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is unknown; wanted cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device}: this machine shows {torch.cuda.device_count()} CUDA "
                         "devices; --device cpu runs anywhere")
    return device


def load_checkpoint(path):
    """The dict of a checkpoint of post_train.py; `load_model` makes a network of it."""
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file; `python post_train.py` writes checkpoints to "
                         "runs/")
    checkpoint = network.read_checkpoint(path)
    lacking = [key for key, kind in CHECKPOINT.items() if not isinstance(checkpoint.get(key), kind)]
    if not lacking and not all(isinstance(name, str) for name in checkpoint["classes"]):
        lacking = ["classes"]
    if lacking:
        raise InputError(f"{path}: does not say its {lacking[0]}; wanted a checkpoint of "
                         "post_train.py (the official weights are no model of a task yet: train "
                         "first)")
    if checkpoint["layout"] != CHECKPOINT_LAYOUT:
        raise InputError(f"{path}: is of checkpoint layout {checkpoint['layout']}, this is layout "
                         f"{CHECKPOINT_LAYOUT}; use the files it was trained with, or train again")
    return checkpoint


def load_model(checkpoint, path, device="cpu"):
    """The network of a checkpoint that was read from `path`, in eval mode."""
    model = network.ecgfounder(len(checkpoint["classes"]))
    network.load_state(model, checkpoint["state_dict"], path, head=True)
    return model.to(device).eval()


def predict_folds(path, folds, root=None, device="cpu", batch_size=64, skip_unreadable=False):
    """Predict the records of `folds` with a checkpoint -> dict of arrays: ecg_id, patient_id,
    classes, y_true, y_prob."""
    checkpoint = load_checkpoint(path)
    model = load_model(checkpoint, path, device)
    root, how = root or checkpoint["data"], checkpoint["preprocessing"]
    skip = skip_unreadable or checkpoint["args"].get("skip_unreadable", False)
    data.build_cache(root, how, skip_unreadable=skip)
    labels, signals, rows = data.load_records(root, checkpoint["task"], how)
    if labels.classes != checkpoint["classes"]:
        other = sorted(set(labels.classes) ^ set(checkpoint["classes"])) or ["their order"]
        raise InputError(f"{path}: its {len(checkpoint['classes'])} classes are not the "
                         f"{len(labels.classes)} of {root} (first difference: {other[0]}); wanted "
                         "the data it was trained for")
    chosen = np.isin(labels.fold, folds)
    if not chosen.any():
        raise InputError(f"{root}: holds no record of {checkpoint['task']} in fold "
                         f"{', '.join(map(str, folds))}; see --fold and --data")
    logits = infer(model, signals, rows[chosen], device, batch_size)
    return {"ecg_id": labels.ecg_id[chosen], "patient_id": labels.patient_id[chosen],
            "classes": np.array(labels.classes), "y_true": labels.y[chosen],
            "y_prob": probabilities(logits)}


def load_predictions(path):
    """Predictions of any model from an .npz -> the dict that predict_folds gives; ecg_id and
    patient_id may be None. Nothing is unpickled."""
    wanted = ("wanted an .npz of y_true and y_prob (N, L), classes (L,), and perhaps ecg_id and "
              "patient_id (N,)")
    try:
        with np.load(path, allow_pickle=False) as z:
            found = {key: z[key] for key in PREDICTIONS if key in z.files}
        for key, array in found.items():
            if array.dtype.kind == "S":
                found[key] = np.char.decode(array, "utf-8", "replace")
        y, p, classes = (found[key] for key in ("y_true", "y_prob", "classes"))
        (n, n_classes), ids = y.shape, [found.get(key) for key in ("ecg_id", "patient_id")]
        fits = p.shape == y.shape and classes.shape == (n_classes,) and n * n_classes > 0
        fits &= all(array is None or array.shape == (n,) for array in ids)
        fits &= all(array.dtype.kind in PREDICTIONS[key] for key, array in found.items())
        fits &= len(set(classes.tolist())) == n_classes
    except Exception as error:  # NumPy and zipfile raise many types; object arrays are refused here
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise InputError(f"{path}: cannot be read as predictions ({reason}); {wanted}") from None
    if not fits:
        shapes = ", ".join(f"{key} {array.dtype} {array.shape}" for key, array in found.items())
        raise InputError(f"{path}: its arrays do not fit together, or a class stands twice "
                         f"({shapes}); {wanted}")
    if not np.isin(y, (0, 1)).all():
        raise InputError(f"{path}: y_true holds other values than 0 and 1; wanted a 1 for each "
                         "class a record has")
    if not ((p >= 0) & (p <= 1)).all():
        raise InputError(f"{path}: y_prob holds values that are no probabilities; wanted finite "
                         "ones in [0, 1]")
    ecg_id, patient_id = ids
    if patient_id is not None and patient_id.dtype.kind == "f":  # as pandas reads PTB-XL's
        unknown = np.arange(n) - n  # each a patient of its own
        patient_id = np.where(np.isfinite(patient_id), patient_id, unknown)
    return {"ecg_id": ecg_id, "patient_id": patient_id, "classes": classes.astype(str),
            "y_true": y.astype(np.uint8), "y_prob": p.astype(np.float64)}


# --------------------------------------------------------------------------------------- comparison

def matched(names, models):
    """Several models' predictions over the records and classes of the first: patient_id, classes,
    y_true, [y_prob].

    Records are matched by ecg_id, classes by name, in whatever order they come. Raises InputError
    saying what does not match.
    """
    first, patient_id, probs = models[0], models[0]["patient_id"], []
    for name, model in zip(names, models):
        places = np.ix_(*(match(name, names[0], key, model[key], first[key])
                          for key in ("ecg_id", "classes")))
        y = model["y_true"][places]
        unlike = np.argwhere(y != first["y_true"])
        if len(unlike):
            i, c = unlike[0]
            raise InputError(f"{name}: {first['classes'][c]} of ecg_id {first['ecg_id'][i]} is "
                             f"{y[i, c]}, in {names[0]} {first['y_true'][i, c]}; wanted the same "
                             "labels")
        if patient_id is None and model["patient_id"] is not None:
            patient_id = model["patient_id"][places[0].ravel()]
        probs.append(model["y_prob"][places])
    return {"classes": first["classes"].tolist(), "patient_id": patient_id,
            "y_true": first["y_true"], "y_prob": probs}


def match(name, other, key, mine, wanted):
    """Where in the array `mine` of the model `name` the values `wanted` stand."""
    if mine is None or wanted is None:
        raise InputError(f"{name} and {other}: not both have {key}; wanted it, to match records by")
    mine, wanted = mine.tolist(), wanted.tolist()
    place = {value: i for i, value in enumerate(mine)}
    if len(place) < len(mine):
        raise InputError(f"{name}: holds a value of {key} twice; wanted each once")
    differ = sorted(place.keys() ^ set(wanted), key=str)
    if differ:
        lacks = len(set(wanted) - place.keys())
        raise InputError(f"{name}: of {other}'s {len(wanted)} {key} it lacks {lacks}, and it has "
                         f"{len(differ) - lacks} others (first difference: {differ[0]}); wanted "
                         "the same")
    return [place[value] for value in wanted]


def names_of(paths):
    """A short name for each file: its own, or its folder's where its own says nothing; whole paths
    where those would not differ."""
    paths = [Path(p) for p in paths]
    common = ("best", "last", "probe", "predictions")
    names = [p.resolve().parent.name if p.stem in common else p.stem for p in paths]
    return names if len(set(names)) == len(set(paths)) else [str(p) for p in paths]


def compare(names, models):
    """Several models' predictions -> (Scores of each, reports and paired differences as plain
    data)."""
    m = matched(names, models)
    scores = [score(m["y_true"], prob, m["patient_id"]) for prob in m["y_prob"]]
    reports = [{"name": name, **report(s, m["y_true"], m["classes"])}
               for name, s in zip(names, scores)]
    pairs = [{"a": names[i], "b": names[j], **difference(scores[i], scores[j], m["classes"])}
             for i, j in combinations(range(len(names)), 2)]
    return scores, {"models": reports, "pairs": pairs}


# --------------------------------------------------------------------------------------- one record

def predict_record(path, record, device="cpu", top=5):
    """Predict one WFDB record, of any set and rate -> lines with the most probable classes."""
    checkpoint = load_checkpoint(path)
    model = load_model(checkpoint, path, device)
    signal = data.load_signal(record, checkpoint["preprocessing"])
    prob = probabilities(infer(model, signal[None], np.array([0]), device))[0]
    best = np.argsort(-prob, kind="stable")[:top]
    return [f"{checkpoint['classes'][i]:8} {prob[i]:.4f}" for i in best]


def plot_record(record, path):
    """The first 10 s of a record on ECG paper (25 mm/s and 10 mm/mV lines), drawn by wfdb, to a
    picture file."""
    import matplotlib
    matplotlib.use("Agg")
    import wfdb
    signal, fs = data.read_record(record)
    signal = np.stack([data.fill_gaps(lead) for lead in signal[:, :int(10 * fs)].astype(float)]).T
    figure = wfdb.plot_items(
        signal=signal, fs=fs, sig_name=list(data.LEADS), sig_units=["mV"] * len(data.LEADS),
        time_units="seconds", ecg_grids="all", figsize=(16, 22), title=Path(record).name,
        return_fig=True)
    save_picture(figure, path, dpi=80)


def save_picture(figure, path, dpi):
    import matplotlib.pyplot as plt
    plt.close(figure)  # pyplot would keep it
    kind = Path(path).suffix.lstrip(".")
    data.write_atomically(path, lambda temporary: figure.savefig(
        temporary, format=kind, dpi=dpi, bbox_inches="tight"))


# ------------------------------------------------------------------------------------- command line

def output_of(model, out, folds):
    """Where a checkpoint's predictions of `folds` (None: of the test fold) go."""
    name = "-".join(["predictions", *map(str, folds or [])])
    path = Path(out or Path(model).with_name(f"{name}.npz"))
    return path if path.suffix == ".npz" or path.is_dir() else path.with_name(f"{path.name}.npz")


def check_picture(path):
    if Path(path).suffix not in (".png", ".pdf", ".svg"):
        raise InputError(f"{path}: no picture can be written under this name; wanted .png, .pdf or "
                         ".svg")


def check(args):
    """Raise InputError for options that do not go together, before anything is read or written."""
    checkpoints = [path for path in args.models if not path.endswith(".npz")]
    given = [key for key in ("fold", "data", "out", "skip_unreadable", "json")
             if getattr(args, key) not in (None, False)]
    for key in given:
        if args.record or not checkpoints and key != "json":
            what = "with --record" if args.record else "for predictions"
            raise InputError(f"--{key.replace('_', '-')} has no meaning {what}; leave it out")
    for key in ("record", "out"):
        if len(args.models) > 1 and getattr(args, key):
            raise InputError(f"--{key} goes with one FILE, {len(args.models)} were given; give one")
    if args.plot and not args.record:
        raise InputError("--plot draws a --record; tests/tools/figures.py draws models' scores")
    if args.plot:
        check_picture(args.plot)
    for path in args.models:
        if not os.path.isfile(path):
            raise InputError(f"{path}: no such file; wanted a checkpoint (`python post_train.py` "
                             "writes them to runs/) or predictions (.npz)")
    if args.batch_size < 1:
        raise InputError(f"--batch-size is {args.batch_size}; wanted at least 1")
    outputs = [Path(path) for path in (args.json, args.plot) if path]
    if not args.record:
        outputs += [output_of(path, args.out, args.fold) for path in dict.fromkeys(checkpoints)]
    taken = {Path(path).resolve() for path in args.models}
    for path in outputs:
        if path.is_dir() or not path.parent.is_dir():
            raise InputError(f"{path}: cannot be written; wanted a file in a folder that is there")
        if path.resolve() in taken:
            raise InputError(f"{path}: would be overwritten; name another file, or score each "
                             "checkpoint alone with its own --out and compare those")
        taken.add(path.resolve())


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    add = parser.add_argument
    add("models", metavar="FILE", nargs="+",
        help="checkpoints of post_train.py, or predictions (.npz) of any model; several are "
             "compared")
    add("--fold", type=int, nargs="+", metavar="K",
        help="folds to predict (default: 10, the test fold)")
    add("--data", help="PTB-XL's folder (default: where the checkpoint was trained)")
    add("--out",
        help="where to write the predictions (default: predictions.npz, with --fold 9 "
             "predictions-9.npz, beside the checkpoint)")
    add("--json", metavar="FILE", help="also write the scores as JSON")
    add("--record", metavar="PATH",
        help="predict this one WFDB record (path without extension) instead")
    add("--plot", metavar="FILE.png", help="with --record: draw the ECG")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    add("--batch-size", type=int, default=64, help="ECGs at once (default: 64)")
    add("--skip-unreadable", action="store_true", help="leave out records that cannot be read")
    args = parser.parse_args(argv)
    if args.record:
        args.record = args.record.removesuffix(".hea").removesuffix(".dat")
    return args


def run(args):
    """What the arguments ask for -> lines to print."""
    check(args)
    device, models = pick_device(args.device), {}
    if args.record:
        lines = predict_record(args.models[0], args.record, device)
        if args.plot:
            plot_record(args.record, args.plot)
        return lines
    # Predictions come first, as they are quick to read and to find fault with.
    for path in sorted(args.models, key=lambda path: not path.endswith(".npz")):
        if path.endswith(".npz"):
            models[path] = load_predictions(path)
        else:
            models[path] = predict_folds(path, args.fold or [data.TEST_FOLD], args.data, device,
                                         args.batch_size, args.skip_unreadable)
            data.write_atomically(output_of(path, args.out, args.fold),
                                  lambda temporary: np.savez(temporary, **models[path]))
    models = [models[path] for path in args.models]
    if len(models) == 1:
        m = models[0]
        scores = score(m["y_true"], m["y_prob"], m["patient_id"])
        result = report(scores, m["y_true"], m["classes"].tolist())
        lines = [*summary_lines(result), "", *class_lines(result)]
    else:
        _, result = compare(names_of(args.models), models)
        reports = result["models"]
        lines = [f"{reports[0]['n']:,} records", *undefined_lines(reports[0]), "",
                 *model_lines(reports), "", *difference_lines(result["pairs"])]
    if args.json:
        write_json(args.json, result)
    return lines


def main(argv=None):
    args = parse(argv)
    try:
        print("\n".join(run(args)))
    except (InputError, network.WeightsError, OSError) as error:
        sys.stderr.write(f"evaluate.py: {data.line_of(error)}\n")
        sys.exit(2)
    except torch.OutOfMemoryError:
        sys.stderr.write("evaluate.py: the GPU's memory is too small for one ECG; end what else "
                         "runs there, or try --device cpu\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("evaluate.py: interrupted; nothing is half written\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
