"""Macro AUROC and AUPRC on a test fold or a whole dataset, with 95 % intervals bootstrapped over
patients; comparison of models; prediction of single ECGs.

    python evaluate.py runs/x/best.pt                     # fold 10; writes runs/x/predictions.npz
    python evaluate.py runs/x/best.pt --fold 9 10 --out runs/x/folds9+10.npz --json scores.json
    python evaluate.py runs/x/best.pt --data georgia --task georgia.csv --fold all
    python evaluate.py A.npz B.npz runs/x/best.pt         # side by side, with paired differences
    python evaluate.py runs/x/best.pt --record path/to/record --plot ecg.png
    python evaluate.py runs/x/best.pt --record folder --out probabilities.csv

A checkpoint of post_train.py holds all that is needed: network, task, classes, leads,
preprocessing, data path. An .npz holds the predictions of any model: y_true and y_prob (N, L),
classes (L,), optionally ecg_id and patient_id (N,). Predictions are made in float32 (on a GPU with
PyTorch's defaults: TF32 convolutions where it has them). Needs data.py and model.py beside it.
"""
import argparse
import csv
import json
import os
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import data
import model as network
from data import InputError

METRICS = ("auroc", "auprc")
DRAWS = 1000        # of the bootstrap
DRAW_CHUNK = 2**22  # weights held at once, 32 MB
PICTURES = (".png", ".pdf", ".svg")
FEW = 10            # fewer positives give no threshold, and intervals that are too narrow
CHECKPOINT_LAYOUT = 2
CHECKPOINT = {"layout": int, "task": str, "classes": list, "leads": list, "preprocessing": str,
              "data": str, "args": dict}    # the fields that are needed
PREDICTIONS = {     # the arrays (the last two may be missing) and the NumPy kinds they may have
    "y_true": "biuf", "y_prob": "biuf", "classes": "biufU", "ecg_id": "biufU",
    "patient_id": "biufU"}


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

    With the records sorted by decreasing probability, A(i) and T(i) the weight of all and of the
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
    total, true = cumulative_sums(np.take(weights, order, axis=-1)), cumulative_sums(w)
    total_before, total_upto = total[..., first], total[..., last]                      # A', A
    true_before, true_upto = (true[..., np.searchsorted(positive, i)] for i in (first, last))
    p = true[..., -1]
    n = total[..., -1] - p
    false = (total_upto - true_upto + total_before - true_before) / 2
    precision = np.divide(true_upto, total_upto, out=np.zeros_like(w), where=total_upto > 0)
    with np.errstate(divide="ignore", invalid="ignore"):  # all weights of one kind may be zero: NaN
        auroc = (w * (n[..., None] - false)).sum(-1) / (p * n)
        return auroc, (w * precision).sum(-1) / p


def cumulative_sums(weights):
    """(..., N) -> (..., N + 1), the sums of the first 0 to N."""
    out = np.zeros((*weights.shape[:-1], weights.shape[-1] + 1))
    np.cumsum(weights, axis=-1, out=out[..., 1:])
    return out


def macro(values):
    """Mean over the defined classes along the last axis; NaN where none is defined."""
    with np.errstate(invalid="ignore"):  # 0 / 0
        return np.nansum(values, -1) / (~np.isnan(values)).sum(-1)


def bootstrap(y_true, y_prob, patient_id=None, draws=DRAWS, seed=0):
    """AUROC and AUPRC of every class under `draws` Bayesian bootstrap weightings (Rubin 1981) of
    the patients: (draws, 2, L).

    Every patient (every record where patients are unknown) gets one Exp(1) weight per draw. No
    weight is zero, so that every class stays defined; drawing with replacement would lose the rare
    classes' positives. One seed gives the same patients the same weights whatever the model, so
    that differences of two models' draws are paired.
    """
    if patient_id is None:
        patient_id = np.arange(len(y_true))
    people, patient = np.unique(patient_id, return_inverse=True)
    rng, chunks, step = np.random.default_rng(seed), [], max(1, DRAW_CHUNK // max(1, len(y_true)))
    starts = range(0, draws, step)
    for start in tqdm(starts, "bootstrap", leave=False, disable=None if starts[1:] else True):
        weight = rng.exponential(size=(min(step, draws - start), len(people)))[:, patient]
        chunks.append(np.stack(auroc_auprc(y_true, y_prob, weight), axis=1))
    return np.concatenate(chunks)


class Scores(NamedTuple):
    """AUROC and AUPRC of each class, and the same under each draw of the bootstrap."""
    point: np.ndarray   # (2, L)
    draws: np.ndarray   # (D, 2, L)


def score(y_true, y_prob, patient_id=None):
    return Scores(np.stack(auroc_auprc(y_true, y_prob)), bootstrap(y_true, y_prob, patient_id))


def interval(point, draws):
    """95 % intervals by the basic bootstrap (Davison and Hinkley 1997): (...), (D, ...) ->
    (..., 2).

    The draws are mirrored about the point estimate: their bias against it estimates its bias
    against the truth. With few positives average precision is biased upwards, the draws more so.
    """
    low, high = np.percentile(draws, (2.5, 97.5), axis=0)
    return np.stack([2 * point - high, 2 * point - low], axis=-1)


def best_thresholds(y_true, y_prob):
    """Each class's threshold (probabilities >= it are positive) with the best F1 =
    2 TP / (predicted + positives): (N, L), (N, L) -> (L,), NaN without positives or negatives."""
    y, prob = np.asarray(y_true, bool), np.asarray(y_prob, np.float64)
    thresholds, predicted = np.full(y.shape[1], np.nan), np.arange(1, len(y) + 1)
    for c in np.flatnonzero(y.any(0) & ~y.all(0)):
        order = np.argsort(-prob[:, c], kind="stable")
        score, true = prob[order, c], np.cumsum(y[order, c])
        f1 = 2 * true / (predicted + true[-1])
        f1[:-1][score[:-1] == score[1:]] = 0  # no threshold separates equal probabilities
        thresholds[c] = score[f1.argmax()]
    return thresholds


# ------------------------------------------------------------------------------------------ reports

def plain(values):
    """An array as nested lists of floats, None where undefined."""
    return np.where(np.isnan(values), None, values).tolist()


def report(scores, y_true, classes):
    """Scores as plain data: macro AUROC and AUPRC with 95 % intervals, per class, undefined
    classes; None if undefined."""
    point, draws = macro(scores.point), macro(scores.draws)
    ci = np.clip(interval(point, draws), 0, 1)
    auroc, auprc = plain(scores.point)
    return {
        "n": len(y_true),
        **{f"macro_{m}": value for m, value in zip(METRICS, plain(point))},
        **{f"macro_{m}_ci": ends for m, ends in zip(METRICS, plain(ci))},
        "per_class": {name: {"positives": n, "auroc": a, "auprc": p} for name, n, a, p
                      in zip(classes, np.sum(y_true, 0).tolist(), auroc, auprc)},
        "undefined": [name for name, a in zip(classes, auroc) if a is None],
    }


def difference(a, b, classes, top=5):
    """How model b differs from model a (Scores of the same records), b - a, as plain data;
    intervals are paired.

    The gain is relative to a, in percent. classes: the `top` that differ most, by the larger of
    the two differences.
    """
    base, point = macro(a.point), macro(b.point) - macro(a.point)
    ci = interval(point, macro(b.draws) - macro(a.draws))
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


def model_lines(reports):
    """Macro scores with intervals of models on the same records, as lines to print."""
    title = f"{reports[0]['n']:,} records"
    width = max(len(title), *(len(r["name"]) for r in reports))
    lines = [f"{title:{width}}   AUROC  95 % interval     AUPRC  95 % interval"]
    for r in reports:
        columns = []
        for m in METRICS:
            low, high = map(digits, r[f"macro_{m}_ci"])
            columns.append(f"{digits(r[f'macro_{m}'])} {low} to {high}")
        lines.append(f"{r['name']:{width}}  {'  '.join(columns)}")
    few = [name for name, s in reports[0]["per_class"].items() if 0 < s["positives"] < FEW]
    if few:
        lines.append(f"{len(few)} of {len(reports[0]['per_class'])} classes have fewer than {FEW} "
                     "positives: the intervals are too narrow")
    undefined = reports[0]["undefined"]
    if undefined:
        lines.append(f"no positives or no negatives, not counted: {', '.join(undefined)}")
    return lines


def class_lines(result):
    """A report's classes as lines to print."""
    width = max(map(len, [*result["per_class"], "class"]))
    lines = [f"{name:{width}} {s['positives']:9,} {digits(s['auroc'])} {digits(s['auprc'])}"
             for name, s in result["per_class"].items()]
    return [f"{'class':{width}} positives  AUROC  AUPRC", *lines]


def difference_lines(pairs):
    """What `difference` says of each pair as lines to print."""
    lines = []
    for pair in pairs:
        lines.append(f"{pair['b']} - {pair['a']}")
        for m in METRICS:
            diff, ci, gain = (pair[f"macro_{m}_{k}"] for k in ("diff", "diff_ci", "gain_percent"))
            if diff is None:
                continue
            line = f"  {m.upper()} {diff:+.4f}  95 % interval {ci[0]:+.4f} to {ci[1]:+.4f}"
            lines.append(line if gain is None else f"{line}  {gain:+.1f} %")
        most = [f"{name} {d['auroc_diff']:+.2f} {d['auprc_diff']:+.2f}"
                for name, d in pair["classes"].items()]
        if most:
            lines.append(f"  largest (AUROC, AUPRC): {', '.join(most)}")
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
            return np.concatenate([function(x).float().cpu().numpy()
                                   for x in data.batches(signals, parts, device)])
    except torch.OutOfMemoryError:
        if batch_size == 1:
            raise
    return infer(function, signals, rows, device, batch_size // 2, amp)  # the failed one is freed


def probabilities(logits):
    """Logits -> probabilities in float64: float32's sigmoid makes all logits above 17 equal."""
    return torch.sigmoid(torch.from_numpy(logits).double()).numpy()


def pick_device(name):
    """The requested device; by default a GPU if there is one, else the CPU. Raises InputError if it
    is not available."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is unknown; wanted cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device}: PyTorch sees {torch.cuda.device_count()} CUDA devices "
                         "here; --device cpu runs anywhere")
    return device


def load_checkpoint(path):
    """The dict of a checkpoint of post_train.py; `load_model` makes a network from it."""
    checkpoint = network.read_checkpoint(path)
    if checkpoint.get("layout", CHECKPOINT_LAYOUT) != CHECKPOINT_LAYOUT:
        raise InputError(f"{path}: has checkpoint layout {checkpoint['layout']}, wanted "
                         f"{CHECKPOINT_LAYOUT}; use the scripts that trained it, or train again")
    lacking = [key for key, kind in CHECKPOINT.items() if not isinstance(checkpoint.get(key), kind)]
    lacking += [key for key in ("classes", "leads") if key not in lacking
                and not all(isinstance(name, str) for name in checkpoint[key])]
    if lacking:
        raise InputError(f"{path}: does not state its {lacking[0]}; wanted a checkpoint of "
                         "post_train.py (the official weights are not yet a model of a task: train "
                         "first)")
    return checkpoint


def load_model(checkpoint, path, device="cpu"):
    """The network of a checkpoint that was read from `path`, in eval mode."""
    model = network.ecgfounder(len(checkpoint["classes"]), len(checkpoint["leads"]))
    network.load_state(model, checkpoint["state_dict"], path, head=True)
    return model.to(device).eval()


def shared_classes(names, classes):
    """The classes that all lists have, in the order of the first, and a line that names the others
    (None where there are none). names: whose lists they are. Raises InputError if none is shared.
    """
    shared = [c for c in classes[0] if all(c in others for others in classes)]
    if not shared:
        firsts = ", ".join(f"{name} has {some[0]}" for name, some in zip(names, classes))
        raise InputError(f"no class in common ({firsts}, ...); wanted the same names for the same "
                         "classes")
    others = [[c for c in some if c not in shared] for some in classes]
    said = [f"{', '.join(some)} of {name}" for name, some in zip(names, others) if some]
    return shared, f"classes left out: {'; '.join(said)}" if said else None


def predict_folds(path, folds, root=None, task=None, device="cpu", skip_unreadable=False):
    """Predict the records of `folds` with a checkpoint -> (dict of arrays: ecg_id, patient_id,
    classes, y_true, y_prob, features (N, 1024); lines to print on classes left out, on records
    left out, and on patients it was trained on).

    root, task: of another dataset than the one it was trained on; classes are matched by name.
    """
    checkpoint = load_checkpoint(path)
    model = load_model(checkpoint, path, device)
    root, task = root or checkpoint["data"], task or checkpoint["task"]
    made = task, checkpoint["preprocessing"], checkpoint["leads"]
    same_folder = os.path.abspath(root) == os.path.abspath(checkpoint["data"])
    skip = skip_unreadable or same_folder and checkpoint["args"].get("skip_unreadable", False)
    classes = data.load_labels(root, task).classes, checkpoint["classes"]
    shared, note = shared_classes((Path(task).name, str(path)), classes)
    cache = data.build_cache(root, *made, skip_unreadable=skip)
    labels, signals = data.load_records(root, *made)
    trained = labels.of_patients(checkpoint.get("trained_on", []))
    chosen = np.isin(labels.fold, folds)
    seen, labels = trained[chosen].sum(), labels.take(chosen)
    if not len(labels.row):
        raise InputError(f"{root}: holds no record of {task} in fold "
                         f"{', '.join(map(str, folds))}; see --fold, --task and --data")
    in_table, in_model = ([some.index(c) for c in shared] for some in classes)
    lines = [line for line in (note, cache.left_out()) if line]
    if seen:
        lines.append(f"{seen:,} of these records are of patients in the training data of {path}: "
                     "its scores on them are optimistic")
    features = infer(model.forward_features, signals, labels.row, device)
    logits = infer(model.head, torch.from_numpy(features).to(device), np.arange(len(features)),
                   device)
    return {"ecg_id": labels.ecg_id, "patient_id": labels.patient_id, "classes": np.array(shared),
            "y_true": labels.y[:, in_table], "y_prob": probabilities(logits)[:, in_model],
            "features": features}, lines


def load_predictions(path):
    """Predictions of any model from an .npz -> predict_folds' dict without features; ecg_id and
    patient_id may be None. Nothing is unpickled."""
    wanted = ("wanted an .npz of y_true and y_prob (N, L), classes (L,), optionally ecg_id and "
              "patient_id (N,)")
    try:
        with np.load(path, allow_pickle=False) as z:
            found = {key: z[key] for key in PREDICTIONS if key in z.files}
        y, prob, classes = (found[key] for key in ("y_true", "y_prob", "classes"))
        (n, n_classes), ecg_id, patient_id = y.shape, found.get("ecg_id"), found.get("patient_id")
    except Exception as error:  # NumPy and zipfile raise many types; object arrays are refused here
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise InputError(f"{path}: cannot be read as predictions ({reason}); {wanted}") from None
    fits = prob.shape == y.shape and classes.shape == (n_classes,) and n * n_classes > 0
    fits &= all(array is None or array.shape == (n,) for array in (ecg_id, patient_id))
    fits &= all(array.dtype.kind in PREDICTIONS[key] for key, array in found.items())
    if not fits or len(set(classes.tolist())) < n_classes:
        shapes = ", ".join(f"{key} {array.dtype} {array.shape}" for key, array in found.items())
        raise InputError(f"{path}: its arrays do not fit together, or a class appears twice "
                         f"({shapes}); {wanted}")
    if not np.isin(y, (0, 1)).all() or not ((prob >= 0) & (prob <= 1)).all():
        raise InputError(f"{path}: y_true holds values other than 0 and 1, or y_prob values that "
                         "are no probabilities; wanted 0 and 1, and finite values in [0, 1]")
    if patient_id is not None:
        unknown = np.array([data.is_unknown(patient) for patient in patient_id])
        if len(np.unique(patient_id[unknown].astype(str))) < unknown.sum():
            patient_id = np.where(unknown, np.arange(n) - n, patient_id)  # each is its own
    return {"ecg_id": ecg_id, "patient_id": patient_id, "classes": classes.astype(str),
            "y_true": y.astype(np.uint8), "y_prob": prob.astype(np.float64)}


# --------------------------------------------------------------------------------------- comparison

def matched(names, models):
    """Several models' predictions over the records of the first and the classes that all have ->
    (dict of patient_id, classes, y_true, [y_prob]; a line on classes left out, or None).

    Records are matched by ecg_id, classes by name, in whatever order they come. Raises InputError
    saying what does not match.
    """
    lists, patient_id, labels, probs = [m["classes"].tolist() for m in models], None, [], []
    shared, note = shared_classes(names, lists)
    for name, model, classes in zip(names, models, lists):
        rows = match(name, names[0], model["ecg_id"], models[0]["ecg_id"])
        places = np.ix_(rows, [classes.index(c) for c in shared])
        labels.append(model["y_true"][places])
        probs.append(model["y_prob"][places])
        unlike = np.argwhere(labels[-1] != labels[0])
        if len(unlike):
            i, c = unlike[0]
            raise InputError(f"{name}: {shared[c]} of ecg_id {models[0]['ecg_id'][i]} is "
                             f"{labels[-1][i, c]}, but {labels[0][i, c]} in {names[0]}; wanted the "
                             "same labels")
        if patient_id is None and model["patient_id"] is not None:
            patient_id = model["patient_id"][rows]
    return {"classes": shared, "patient_id": patient_id, "y_true": labels[0],
            "y_prob": probs}, note


def match(name, other, mine, wanted):
    """The positions of the `wanted` ecg_ids in `mine`, those of the model `name`."""
    if mine is None or wanted is None:
        raise InputError(f"{name} and {other}: not both have ecg_id; wanted it, to match records")
    mine, wanted = mine.tolist(), wanted.tolist()
    place = {value: i for i, value in enumerate(mine)}
    if len(place) < len(mine):
        raise InputError(f"{name}: holds an ecg_id twice; wanted each once")
    differ = sorted(place.keys() ^ set(wanted), key=str)
    if differ:
        lacks = len(set(wanted) - place.keys())
        raise InputError(f"{name}: of {other}'s {len(wanted)} ecg_ids it lacks {lacks}, and it has "
                         f"{len(differ) - lacks} others (first difference: {differ[0]}); wanted "
                         "the same")
    return [place[value] for value in wanted]


def names_of(paths):
    """A short name for each file: its own, or its folder's if its own is generic; full paths if
    those would not be unique."""
    paths = [Path(p) for p in paths]
    common = ("best", "last", "probe", "predictions")
    names = [p.resolve().parent.name if p.stem in common else p.stem for p in paths]
    return names if len(set(names)) == len(set(paths)) else [str(p) for p in paths]


def compare(names, models):
    """Several models' predictions -> (reports and paired differences as plain data; a line on
    classes left out, or None)."""
    m, note = matched(names, models)
    scores = [score(m["y_true"], prob, m["patient_id"]) for prob in m["y_prob"]]
    reports = [{"name": name, **report(s, m["y_true"], m["classes"])}
               for name, s in zip(names, scores)]
    pairs = [{"a": names[i], "b": names[j], **difference(scores[i], scores[j], m["classes"])}
             for i, j in combinations(range(len(names)), 2)]
    return {"models": reports, "pairs": pairs}, note


# ------------------------------------------------------------------------------------- single ECGs

class Prediction(NamedTuple):
    record: str
    windows: int        # of 10 s, over which the probabilities are averaged
    prob: np.ndarray    # (L,)


def predict_records(checkpoint, path, records, device="cpu"):
    """Predict WFDB records of any source, sampling rate and length with a checkpoint that was read
    from `path` -> ([Prediction of each that can be read], [why the others cannot])."""
    model, found, unreadable = load_model(checkpoint, path, device), [], []
    for record in tqdm(records, "predict", unit="record", disable=None if records[1:] else True):
        try:
            signals = data.load_windows(record, checkpoint["preprocessing"], checkpoint["leads"])
        except InputError as error:
            unreadable.append(str(error))
            continue
        prob = probabilities(infer(model, signals, np.arange(len(signals)), device)).mean(0)
        found.append(Prediction(str(record), len(signals), prob))
    return found, unreadable


def find_records(paths):
    """WFDB records by their paths, with or without an extension, and all those in folders."""
    records = []
    for path in map(Path, paths):
        if path.is_dir():
            files = (Path(folder, name) for folder, _, names in os.walk(path, followlinks=True)
                     for name in names)
            records += sorted(file.with_suffix("") for file in files if file.suffix == ".hea")
        else:
            records.append(Path(data.strip_extension(path)))
    if not records:
        raise InputError(f"{', '.join(map(str, paths))}: holds no WFDB record; wanted .hea headers "
                         "and their signal files")
    return list(dict.fromkeys(records))  # a record's .hea and .dat are one


def thresholds_of(checkpoint):
    """The thresholds (L,); NaN where one is unknown or rests on fewer than FEW positives of fold
    9."""
    n = len(checkpoint["classes"])
    known = checkpoint.get("thresholds"), checkpoint.get("positives")
    for values in known:
        fits = isinstance(values, list) and len(values) == n
        if not fits or not all(isinstance(value, int | float) for value in values):
            return np.full(n, np.nan)
    return np.where(np.array(known[1]) < FEW, np.nan, known[0])


def record_lines(checkpoint, prediction, top=5):
    """The most probable classes and all that reach their threshold, as lines to print."""
    classes, prob, limits = checkpoint["classes"], prediction.prob, thresholds_of(checkpoint)
    width = max(map(len, [*classes, "class"]))
    lines = [f"{'class':{width}}  probability  threshold"]
    for rank, i in enumerate(np.argsort(-prob, kind="stable")):
        above = prob[i] >= limits[i]
        if rank < top or above:
            line = f"{classes[i]:{width}}  {prob[i]:11.4f}  {digits(plain(limits[i])):>9}"
            lines.append(f"{line}  above" if above else line)
    if prediction.windows > 1:
        lines.append(f"mean of {prediction.windows} windows of 10 s")
    return lines


def write_table(path, checkpoint, predictions):
    """A csv of predictions, a row for each record."""
    classes, thresholds = np.array(checkpoint["classes"]), thresholds_of(checkpoint)
    with open(path, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["record", "windows", "above_threshold", *classes])
        for p in predictions:
            above = ";".join(classes[p.prob >= thresholds])
            writer.writerow([p.record, p.windows, above, *(f"{v:.6g}" for v in p.prob)])


def plot_record(record, leads, path):
    """Plot the first 10 s of a record on an ECG grid (25 mm/s, 10 mm/mV), drawn by wfdb, to an
    image file."""
    import matplotlib
    matplotlib.use("Agg")
    import wfdb
    signal, fs = data.read_record(record, leads)
    signal = np.stack([data.fill_gaps(lead) for lead in signal[:, :int(10 * fs)].astype(float)]).T
    # A signal in the wrong unit would get so many grid lines that wfdb draws for hours.
    grids = "all" if np.ptp(signal, axis=0).max() < 50 else []
    figure = wfdb.plot_items(
        signal=signal, fs=fs, sig_name=list(leads), sig_units=["mV"] * len(leads),
        time_units="seconds", ecg_grids=grids, figsize=(16, 1 + 1.75 * len(leads)),
        title=Path(record).name, return_fig=True)
    save_picture(figure, path, dpi=80)


def save_picture(figure, path, dpi):
    import matplotlib.pyplot as plt
    plt.close(figure)  # pyplot would keep it
    kind = Path(path).suffix.lstrip(".")
    data.write_atomically(path, lambda temporary: figure.savefig(
        temporary, format=kind, dpi=dpi, bbox_inches="tight"))


# ------------------------------------------------------------------------------------- command line

def output_of(args, path):
    """Where the predictions of a checkpoint go."""
    parts = [] if Path(path).stem == "best" else [Path(path).stem]
    parts += [Path(args.data).resolve().name] if args.data else []
    parts += [Path(args.task).stem] if args.task else []
    name = "-".join(["predictions", *parts, *(args.fold or [])])
    return args.out or Path(path).with_name(f"{name}.npz")


def check(args):
    """Raise InputError for options that do not go together, before anything is read or written."""
    only_npz = all(path.endswith(".npz") for path in args.models)
    predicting = ("fold", "data", "task", "skip_unreadable", "features")
    senseless = (("with --record", args.record, (*predicting, "json")),
                 ("for predictions", only_npz, (*predicting, "record", "out")),
                 ("without --record", not args.record, ("plot",)),
                 ("with several files", len(args.models) > 1, ("record", "out")))
    for when, true, keys in senseless:
        given = [key.replace("_", "-") for key in keys if true and getattr(args, key)]
        if given:
            raise InputError(f"--{given[0]} has no meaning {when}; leave it out")
    endings = {"json": [".json"], "plot": PICTURES, "out": [".csv" if args.record else ".npz"]}
    for key, allowed in endings.items():
        given = getattr(args, key)
        path = Path(given or "")
        if given and (path.suffix not in allowed or not path.parent.is_dir() or path.is_dir()):
            raise InputError(f"--{key} {path}: cannot be written; wanted a name that ends in "
                             f"{' or '.join(allowed)} in an existing folder")
    for path in args.models:
        if not os.path.isfile(path):
            raise InputError(f"{path}: no such file; wanted a checkpoint, such as best.pt of a run "
                             "(`python post_train.py` writes them to runs/), or predictions (.npz)")


def folds_of(args):
    """The folds asked for, 1 to 10. Raises InputError for others."""
    folds = list(map(str, range(1, 11)))
    asked = folds if args.fold == ["all"] else args.fold or [str(data.TEST_FOLD)]
    wrong = [fold for fold in asked if fold not in folds]
    if wrong:
        raise InputError(f"--fold {wrong[0]}: no such fold; wanted 1 to 10, or all by itself")
    return list(map(int, asked))


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    add = parser.add_argument
    add("models", metavar="FILE", nargs="+",
        help="checkpoints of post_train.py, or predictions (.npz) of any model; several are "
             "compared")
    add("--fold", nargs="+", metavar="K", help="folds, or all (default: 10, the test fold)")
    add("--data", help="folder of the dataset (default: the one the checkpoint was trained on)")
    add("--task", metavar="TASK",
        help="a task or .csv table other than the checkpoint's; classes are matched by name")
    add("--out", help="where to write the predictions (default: predictions.npz, with --fold 9 "
                      "predictions-9.npz, beside the checkpoint)")
    add("--features", action="store_true",
        help="write the network's features (N, 1024) with the predictions")
    add("--json", metavar="FILE", help="also write the scores as JSON")
    add("--record", metavar="PATH", nargs="+",
        help="predict these WFDB records, or all in a folder, instead; several go to a csv (--out, "
             "by default records.csv beside the checkpoint)")
    add("--plot", metavar="FILE.png", help="with one --record: draw the ECG")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    add("--skip-unreadable", action="store_true", help="leave out records that cannot be read")
    return parser.parse_args(argv), parser


def run(args):
    """What the arguments ask for -> lines to print."""
    check(args)
    device, folds = pick_device(args.device), folds_of(args)
    if args.record:
        return run_records(args, device)
    models, notes = {}, []
    # .npz files come first, as they are quick to read and to check.
    for path in sorted(args.models, key=lambda path: not path.endswith(".npz")):
        if path.endswith(".npz"):
            models[path] = load_predictions(path)
            continue
        found, lines = predict_folds(path, folds, args.data, args.task, device,
                                     args.skip_unreadable)
        models[path] = {k: v for k, v in found.items() if k != "features" or args.features}
        out = output_of(args, path)
        data.write_atomically(out, lambda temporary: np.savez(temporary, **models[path]))
        notes += [*lines, f"{out}: predictions of {len(found['y_true']):,} records"]
    names, models = names_of(args.models), [models[path] for path in args.models]
    if len(models) == 1:
        m = models[0]
        scores = score(m["y_true"], m["y_prob"], m["patient_id"])
        result = report(scores, m["y_true"], m["classes"].tolist())
        lines = [*model_lines([{"name": names[0], **result}]), "", *class_lines(result)]
    else:
        result, note = compare(names, models)
        notes.append(note)
        lines = [*model_lines(result["models"]), "", *difference_lines(result["pairs"])]
    if args.json:
        write_json(args.json, result)
    return [*filter(None, notes), *lines]


def run_records(args, device):
    """Predict single ECGs -> lines to print."""
    path, records = args.models[0], find_records(args.record)
    checkpoint = load_checkpoint(path)
    if args.plot and len(records) > 1:
        raise InputError(f"--plot draws one record, {len(records)} were given; give one")
    found, unreadable = predict_records(checkpoint, path, records, device)
    if unreadable and not found:
        raise InputError(unreadable[0])
    if args.plot:
        plot_record(records[0], checkpoint["leads"], args.plot)
    if len(records) == 1 and not args.out:
        return record_lines(checkpoint, found[0])
    out = Path(args.out or Path(path).with_name("records.csv"))
    data.write_atomically(out, lambda temporary: write_table(temporary, checkpoint, found))
    if unreadable:
        raise InputError(f"{unreadable[0]}; {len(unreadable)} of {len(records)} records cannot be "
                         f"read, the others are in {out}")
    return [f"{out}: {len(found):,} records, {len(checkpoint['classes'])} classes"]


def main(argv=None):
    args, parser = parse(argv)
    try:
        print("\n".join(run(args)))
    except (InputError, network.WeightsError, OSError) as error:
        parser.exit(2, f"evaluate.py: {data.line_of(error)}\n")
    except torch.OutOfMemoryError:
        parser.exit(2, "evaluate.py: the GPU's memory is too small for one ECG; end other "
                       "programs on it, or try --device cpu\n")
    except KeyboardInterrupt:
        parser.exit(130, "evaluate.py: interrupted; no file is half-written\n")


if __name__ == "__main__":
    main()
