"""Macro AUROC and AUPRC on a test fold or a whole dataset, with 95 % intervals over patients;
comparison of models; prediction of single ECGs.

    python evaluate.py runs/x/best.pt                     # fold 10; writes runs/x/predictions.npz
    python evaluate.py runs/x/best.pt --data georgia --task georgia.csv --fold all
    python evaluate.py A.npz B.npz runs/x/best.pt         # side by side, with paired differences
    python evaluate.py runs/x/best.pt --record path/to/record --plot ecg.png

A checkpoint of post_train.py holds all that is needed: network, task, classes, leads,
preprocessing, data path. An .npz holds the predictions of any model: y_true and y_prob (N, L),
classes (L,), patient_id and, to be compared, ecg_id (N,). Needs data.py and model.py beside it.
"""
import argparse
import csv
import glob
import io
import json
import re
from collections import Counter, namedtuple
from contextlib import suppress
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import torch
from scipy.special import expit, logit, stdtrit
from tqdm import tqdm

import data
import model as network
from data import InputError

FEW = 10            # fewer positives on fold 9 give no threshold
# point (2, L): AUROC and AUPRC of the classes; slopes (2, patients): of their means; see `score`
Scores = namedtuple("Scores", "point slopes factor")


def auroc_auprc(y_true, y_prob):
    """Area under the ROC curve and average precision of each class, as scikit-learn's, and their
    slopes: how much they change per unit of weight of each record, less the mean over the records
    of its kind (positive or negative), so that the two kinds keep their weights. y_true (N, L) of 0
    and 1, y_prob (N, L) -> (2, L), (2, N, L); NaN where a class has no positive or no negative.

    With the records sorted by decreasing probability, A and T the number of all and of the positive
    records down to the end of a record's group of ties, A' and T' the same before that group, and P
    and N the number of positives and negatives:
        AUROC = mean over the positives of 1 - ((A - T) + (A' - T')) / 2 / N, the negatives below
              = mean over the negatives of (T + T') / 2 / P, the positives above
        average precision = mean over the positives of T / A; a record adds to the A of each
        positive that is not above it, a positive to its T, too"""
    y_true, y_prob = np.asarray(y_true, bool), np.asarray(y_prob, np.float64)
    areas, slopes = np.full((2, y_true.shape[1]), np.nan), np.full((2, *y_true.shape), np.nan)
    for c in np.flatnonzero(y_true.any(0) & ~y_true.all(0)):
        order = np.argsort(-y_prob[:, c], kind="stable")
        score, y = -y_prob[order, c], y_true[order, c]
        first, last = (np.searchsorted(score, score, side) for side in ("left", "right"))  # A', A
        true = np.append(0, np.cumsum(y))
        before, upto, p, n = true[first], true[last], true[-1], len(y) - true[-1]          # T', T
        below, precision = n - (last - upto + first - before) / 2, upto / last
        areas[:, c] = below[y].sum() / (p * n), precision[y].sum() / p
        # Sums over the positives that are not above a record.
        gain, loss = (np.cumsum((y * x)[::-1])[::-1][first] for x in (1 / last, precision / last))
        change = np.stack([np.where(y, below, (upto + before) / 2) / (p * n),
                           (y * (precision + gain) - loss) / p])
        means = (change[:, kind].mean(1)[:, None] for kind in (y, ~y))
        slopes[:, order, c] = change - np.where(y, *means)
    return areas, slopes


def macro(values):
    """Mean over the defined classes along the last axis; NaN where none is defined."""
    with np.errstate(invalid="ignore"):     # 0 / 0
        return np.nansum(values, -1) / (~np.isnan(values)).sum(-1)


def score(p):
    """Predictions (a dict of y_true, y_prob and patient_id) -> Scores. Where patients are unknown
    every record is one.

    factor: where n patients have a class (or have not, if these are fewer) and s^2 is the variance
    between them, the class adds s^2 / n to the variance, but only s^2 (n - 1) / n^2 to the squared
    slopes: half of it if n = 2, nothing if n = 1. What these lack is taken from the others."""
    y, patient_id = np.asarray(p["y_true"], bool), p.get("patient_id")
    people, patient = np.unique(np.arange(len(y)) if patient_id is None else patient_id,
                                return_inverse=True)

    def of_patients(values):    # sums, (N, ...) -> (patients, ...)
        sums = np.zeros((len(people), *values.shape[1:]))
        np.add.at(sums, patient, values)
        return sums

    areas, slopes = auroc_auprc(y, p["y_prob"])
    n = np.minimum(*((of_patients(kind) > 0).sum(0) for kind in (y, ~y)))
    n = n[n > 0]
    factor = (1 / n).sum() / max(((n - 1) / n**2).sum(), 1e-12)     # huge if all n are 1
    return Scores(areas, of_patients(macro(slopes).T).T, factor)


def half_width(slopes, factor):
    """Half a 95 % interval: slopes (..., patients) -> (...), by Student's t with as many degrees of
    freedom as patients effectively make up the variance. It is of the score expected on other
    patients, as many with each class: for AUPRC that is above the score of unlimited patients."""
    squares, fourth = (slopes**2).sum(-1), (slopes**4).sum(-1)
    freedom = np.maximum(squares**2 / np.maximum(fourth, 1e-300), 1)
    return stdtrit(freedom, 0.975) * np.sqrt(factor * squares)


def interval(point, half):
    """point -/+ half on the logit scale, which keeps it in [0, 1]: (2,), (2,) -> (2, 2). NaN where
    the score is perfect, or no patient changes it: of these no other score can be told."""
    inside = point * (1 - point)
    step = np.divide(half, inside, out=np.full(2, np.nan), where=(inside > 0) & (half > 1e-6))
    return expit(logit(point)[:, None] + step[:, None] * [-1, 1])


def best_thresholds(y_true, y_prob):
    """Each class's threshold (probabilities >= it are positive) with the best F1 = 2 TP /
    (predicted + positives): (N, L), (N, L) -> (L,), NaN without positives or negatives."""
    y, falling = np.asarray(y_true, bool), -np.asarray(y_prob, np.float64)
    thresholds = np.full(y.shape[1], np.nan)
    for c in np.flatnonzero(y.any(0) & ~y.all(0)):
        score, positive = np.sort(falling[:, c]), np.sort(falling[y[:, c], c])
        predicted, true = (np.searchsorted(some, score, "right") for some in (score, positive))
        thresholds[c] = -score[(2 * true / (predicted + len(positive))).argmax()]
    return thresholds


def report(scores, p):
    """Scores of the predictions `p` as plain data, NaN where undefined."""
    point = macro(scores.point)
    ends = interval(point, half_width(scores.slopes, scores.factor)).tolist()
    columns = zip(map(str, p["classes"]), p["y_true"].sum(0).tolist(), *scores.point.tolist())
    per_class = {name: {"positives": n, "auroc": a, "auprc": b} for name, n, a, b in columns}
    return {"n": len(p["y_true"]), "macro_auroc": point[0].item(), "macro_auprc": point[1].item(),
            "macro_auroc_ci": ends[0], "macro_auprc_ci": ends[1], "per_class": per_class,
            "undefined": [name for name, of in per_class.items() if np.isnan(of["auroc"])]}


def difference(a, b, classes, top=5):
    """How model b differs from model a (Scores of the same records), b - a, as plain data, with
    paired intervals, the gain in percent of a, and the `top` classes that differ most."""
    base, diff = macro(a.point), macro(b.point) - macro(a.point)
    half = half_width(b.slopes - a.slopes, a.factor)
    ends = np.stack([diff - half, diff + half], 1).tolist()
    gain = (100 * diff / np.where(base > 0, base, np.nan)).tolist()
    auroc, auprc = b.point - a.point
    order = np.argsort(-np.maximum(abs(auroc), abs(auprc)), kind="stable")  # NaNs come last
    return {"macro_auroc_diff": diff[0].item(), "macro_auroc_diff_ci": ends[0],
            "macro_auroc_gain_percent": gain[0], "macro_auprc_diff": diff[1].item(),
            "macro_auprc_diff_ci": ends[1], "macro_auprc_gain_percent": gain[1],
            "classes": {classes[i]: {"auroc_diff": auroc[i], "auprc_diff": auprc[i]}
                        for i in order[:top] if not np.isnan(auroc[i])}}


def with_interval(result, key, sign=""):
    value, (low, high) = result[key], result[f"{key}_ci"]
    return f"{value:{sign}.4f} ({low:{sign}.4f} to {high:{sign}.4f})"


def macro_line(name, result):
    auroc, auprc = (with_interval(result, f"macro_{area}") for area in ("auroc", "auprc"))
    few = f" ({len(result['undefined'])} classes undefined)" * bool(result["undefined"])
    return f"{name}: {result['n']:,} records, macro AUROC {auroc}, AUPRC {auprc}{few}"


def difference_lines(pair):
    auroc, auprc = (with_interval(pair, f"macro_{area}_diff", "+") for area in ("auroc", "auprc"))
    most = [f"{name} {d['auroc_diff']:+.2f} {d['auprc_diff']:+.2f}"
            for name, d in pair["classes"].items()]
    return [f"{pair['b']} - {pair['a']}",
            f"  AUROC {auroc}, {pair['macro_auroc_gain_percent']:+.1f} %",
            f"  AUPRC {auprc}, {pair['macro_auprc_gain_percent']:+.1f} %",
            f"  largest (AUROC, AUPRC): {', '.join(most)}"]


def write_json(path, value):
    value = json.loads(json.dumps(value), parse_constant=lambda nan: None)     # NaN becomes null
    with data.whole_file(path) as f:
        f.write((json.dumps(value, indent=1) + "\n").encode())


def take(x, rows, device):
    """x[rows] in float32 on the device, without waiting for it; x: an array or a tensor there."""
    if isinstance(x, torch.Tensor):
        return x.index_select(0, torch.from_numpy(rows).to(device, non_blocking=True)).float()
    return torch.from_numpy(x[rows]).to(device, non_blocking=True).float()


def infer(forward, x, rows, device, amp=None):
    """`forward` of x[rows] in batches, without gradients -> float32 (n, ...). amp: the dtype of
    autocast, or None for float32."""
    device = torch.device(device)
    size = 256 if device.type == "cuda" else 64
    with torch.inference_mode(), torch.autocast(device.type, amp, enabled=amp is not None):
        starts = range(0, max(1, len(rows)), size)
        parts = [forward(take(x, rows[i:i + size], device)) for i in starts]
        return torch.cat(parts).float().cpu().numpy()


def probabilities(logits):
    """Logits -> probabilities in float64: float32's sigmoid makes all logits above 17 equal."""
    return torch.sigmoid(torch.from_numpy(logits).double()).numpy()


def pick_device(name):
    """The requested device; by default a GPU if there is one, else the CPU."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = ["cpu", *["cuda"] * bool(gpus), *(f"cuda:{i}" for i in range(gpus))]
    if name and name not in known:
        raise InputError(f"--device {name}: there are {', '.join(known)}")
    return torch.device(name or ("cuda" if gpus else "cpu"))


def load_model(path, device="cpu"):
    """A checkpoint of post_train.py -> (its dict, its network in eval mode)."""
    checkpoint = network.read_checkpoint(path)
    if not {"classes", "leads", "preprocessing"} <= checkpoint.keys():
        raise InputError(f"{path}: names no classes, leads or preprocessing: not yet a model")
    model = network.ecgfounder(len(checkpoint["classes"]), len(checkpoint["leads"]))
    network.load_state(model, checkpoint["state_dict"], path)
    return checkpoint, model.to(device).eval()


def predict(checkpoint, model, labels, signals, device):
    """Predict records -> dict of arrays: ecg_id, patient_id, classes (those that labels and
    checkpoint share, by name), y_true, y_prob, features (N, 1024)."""
    shared = [c for c in labels.classes if c in checkpoint["classes"]]
    features = infer(model.forward_features, signals, labels.row, device)
    logits = infer(model.head, features, np.arange(len(features)), device)
    return {"ecg_id": labels.ecg_id, "patient_id": labels.patient_id, "classes": np.array(shared),
            "y_true": labels.y[:, [labels.classes.index(c) for c in shared]],
            "y_prob": probabilities(logits)[:, [checkpoint["classes"].index(c) for c in shared]],
            "features": features}


def predictions_of(path, args, device):
    """What an .npz holds, or a checkpoint predicts and writes to one -> dict, see `predict`."""
    if path.endswith(".npz"):
        return load_predictions(path)
    checkpoint, model = load_model(path, device)
    root, task = args.data or checkpoint["data"], args.task or checkpoint["task"]
    skip = args.skip_unreadable or checkpoint.get("args", {}).get("skip_unreadable", False)
    labels, signals = data.load_records(root, task, checkpoint["preprocessing"],
                                        checkpoint["leads"], skip_unreadable=skip)
    shared_classes([Path(task).name, path], [labels.classes, checkpoint["classes"]])
    folds = args.fold or [str(data.TEST_FOLD)]
    labels = labels.take(np.isin(labels.fold.astype(str), folds) | ("all" in folds))
    if not len(labels.row):
        raise InputError(f"{root}: has no record of {task} in fold {', '.join(folds)}; see --fold")
    p = predict(checkpoint, model, labels, signals, device)
    if not args.features:
        del p["features"]
    # Whole paths: two datasets may end alike.
    given = [Path(path).stem, args.data, args.task and args.task.removesuffix(".csv"), *args.fold]
    name = re.sub(r"[/\\:]+", "-", "/".join(["predictions", *filter(None, given)]))
    out = args.out or Path(path).with_name(f"{name.replace('-best', '', 1)}.npz")
    with data.whole_file(out) as f:
        np.savez(f, **p)
    print(f"{out}: predictions of {len(p['y_true']):,} records")
    return p


def shared_classes(names, lists):
    """The classes that all lists have, in the order of the first; prints those left out."""
    shared = [c for c in lists[0] if all(c in classes for classes in lists)]
    if not shared:
        raise InputError(f"{' and '.join(names)}: no class in common; wanted the same names")
    for name, classes in zip(names, lists):
        if len(classes) > len(shared):
            print(f"classes left out of {name}:", *(c for c in classes if c not in shared))
    return shared


def load_predictions(path):
    """Predictions of any model from an .npz, as the top of this file says -> dict. Nothing is
    unpickled. Without ecg_id all are -1; each unknown patient has a negative number of its own."""
    try:
        with np.load(path, allow_pickle=False) as z:
            n = len(z["y_true"])
            p = {"ecg_id": np.full(n, -1), "patient_id": np.full(n, -1), **z}
        p |= {"classes": p["classes"].astype(str), "y_prob": p["y_prob"].astype(float)}
        shapes = [p[key].shape for key in ("y_true", "y_prob", "ecg_id", "patient_id")]
        table = n, len({*p["classes"].tolist()})
        good = np.isin(p["y_true"], (0, 1)).all() and (abs(p["y_prob"] - 0.5) <= 0.5).all()
        if not (n and good and shapes == [table, table, (n,), (n,)]):
            raise ValueError(f"shapes {shapes}")
    except Exception as error:  # NumPy and zipfile raise many types; object arrays are refused here
        raise InputError(f"{path}: cannot be read as predictions ({error}); wanted y_true (N, L) "
                         "of 0 and 1, y_prob (N, L) from 0 to 1, classes (L,), each once "
                         "(text: array.astype(str))") from None
    unknown = list(map(data.is_unknown, p["patient_id"]))
    return {**p, "y_true": p["y_true"].astype(np.uint8),
            "patient_id": np.where(unknown, np.arange(n) - n, p["patient_id"])}


def in_order(name, p, ecg_id, classes):
    """The predictions of the model `name` for these records and classes, in this order."""
    place = {value: i for i, value in enumerate(p["ecg_id"].tolist())}
    if len(place) < len(p["ecg_id"]) or place.keys() != {*ecg_id.tolist()}:
        raise InputError(f"{name}: wanted the records of the first file, each once, by ecg_id")
    rows, columns = [place[value] for value in ecg_id.tolist()], p["classes"].tolist()
    at = np.ix_(rows, [columns.index(c) for c in classes])
    return {"y_true": p["y_true"][at], "y_prob": p["y_prob"][at], "classes": classes,
            "patient_id": p["patient_id"][rows]}


def compare(names, models):
    """Several models' predictions, in whatever order -> reports and paired differences as plain
    data, over the records of the first and the classes that all have."""
    ecg_id, shared = models[0]["ecg_id"], shared_classes(names, [[*p["classes"]] for p in models])
    models = [in_order(name, p, ecg_id, shared) for name, p in zip(names, models)]
    for name, p in zip(names, models):
        differ = np.argwhere(p["y_true"] != models[0]["y_true"])
        if len(differ):
            raise InputError(f"{name}: has another label of {shared[differ[0][1]]} for ecg_id "
                             f"{ecg_id[differ[0][0]]} than {names[0]}")
    # A file without patients has one for each record, so the fewest are those that are known.
    patients = min((p["patient_id"] for p in models), key=lambda ids: len(np.unique(ids)))
    scores = [score({**p, "patient_id": patients}) for p in models]
    reports = map(report, scores, models)
    return {"models": [{"name": name, **result} for name, result in zip(names, reports)],
            "pairs": [{"a": names[i], "b": names[j], **difference(scores[i], scores[j], shared)}
                      for i, j in combinations(range(len(names)), 2)]}


def find_records(paths):
    """WFDB records by their paths, all in folders but a Mac's leftovers and others' segments."""
    files = []
    for path in paths:
        inside = sorted(glob.glob("**/*.hea", root_dir=path, recursive=True))
        inside = [Path(path, name) for name in inside if "__MACOSX" not in name]
        files += inside if Path(path).is_dir() else [Path(path)]
    if not files:
        raise InputError(f"{', '.join(paths)}: holds no .hea header of a WFDB record")
    records, segments = dict.fromkeys(map(data.strip_extension, files)), set()
    for record in records:      # a .hea and its .dat are one
        with suppress(Exception):   # what cannot be read is said later
            segments |= {path for path, *_ in data.read_header(record).segments}
    return [record for record in records if Path(record) not in segments]


def predict_record(checkpoint, model, record, device):
    """(mean probabilities (L,) over a record's windows of 10 s, their number, notes in words).
    Raises InputError for a record that cannot be used."""
    windows = data.load_windows(record, checkpoint["preprocessing"], checkpoint["leads"])
    total, n, lacking = 0, 0, []
    while batch := [*islice(windows, 64)]:      # a day's recording does not fit in memory
        signals, notes = zip(*batch)
        prob = infer(model, np.stack(signals), np.arange(len(signals)), device)
        total, n = total + probabilities(prob).sum(0), n + len(signals)
        lacking += [note["lacking"] for note in notes if note["lacking"]]
    windows, derived = notes[0]["windows"], notes[0]["derived"]
    said = [f"{windows - n} of {windows} windows have no signal"] * (n < windows)
    gaps = Counter(lacking).most_common(3)
    said += [f"{times} of {windows} windows lack {what}" for what, times in gaps]
    said += [f"{derived} derived from I and II"] * bool(derived)
    return total / n, n, "; ".join(said)


def record_lines(classes, limits, prob, top=5):
    """The most probable classes and all that reach their threshold, as lines to print."""
    width, above = max(map(len, [*classes, "class"])), np.where(prob >= limits, "  above", "")
    shown = [i for rank, i in enumerate(np.argsort(-prob, kind="stable")) if rank < top or above[i]]
    return [f"{'class':{width}}  probability  threshold", *(
        f"{classes[i]:{width}}  {prob[i]:11.4f}  {limits[i]:9.4f}{above[i]}" for i in shown)]


def plot_record(record, leads, caption, path):
    """Draw the first 10 s of a record as one sheet of ECG paper, 25 mm/s and 10 mm/mV, with small
    squares of 0.04 s and 0.1 mV, to an image file."""
    from matplotlib.figure import Figure
    signal, fs = data.read_record(record, leads, seconds=10)
    signal = np.stack([data.fill_gaps(lead) for lead in signal.astype(float)])
    signal -= np.median(signal, axis=1, keepdims=True)
    # 2 mV of paper for each lead, more where its waves are large (up to 8, for wrong units).
    room = np.clip(np.abs(signal).max(1), 1, 4).round(1)
    zero, height = room - 2 * np.cumsum(room), 2 * room.sum()       # mV
    size = np.array([262, 10 * height + 22])    # mm
    figure = Figure(size / 25.4)
    axis = figure.add_axes((*[6, 4] / size, *[250, 10 * height] / size))
    for lead, samples, y in zip(leads, signal, zero):
        axis.plot(np.arange(len(samples)) / fs, samples + y, color="black", linewidth=0.7)
        axis.text(0.05, y + 0.4, lead, weight="bold", fontsize=9)
    axis.set(xlim=(0, 10), ylim=(-height, 0))
    for which, squares in (("minor", 1), ("major", 5)):
        axis.set_xticks(np.arange(0, 10.001, 0.04 * squares), [], minor=which == "minor")
        axis.set_yticks(-np.arange(0, height + 0.001, 0.1 * squares), [], minor=which == "minor")
        axis.grid(which=which, color="#f0a8a8", linewidth=0.2 + 0.1 * squares)
    axis.tick_params(which="both", length=0)
    name = Path(record).name.encode(errors="replace").decode()  # it may have bytes beyond UTF-8
    title = f"{name}    25 mm/s, 10 mm/mV\n{caption}"
    figure.text(*[6, size[1] - 3] / size, title, va="top", parse_math=False)
    with data.whole_file(path) as f:
        figure.savefig(f, format=Path(path).suffix.lstrip("."), dpi=120)


def run(args, device):
    """Score or compare models."""
    found = [predictions_of(path, args, device) for path in args.models]
    if len(found) == 1:
        result = report(score(found[0]), found[0])
        width = max(map(len, [*result["per_class"], "class"]))
        print(macro_line(args.models[0], result), "",
              f"{'class':{width}} positives  AUROC  AUPRC", sep="\n")
        for name, of in result["per_class"].items():
            print(f"{name:{width}} {of['positives']:9,} {of['auroc']:6.4f} {of['auprc']:6.4f}")
    else:
        result = compare(args.models, found)
        print(*(macro_line(model["name"], model) for model in result["models"]), "",
              *(line for pair in result["pairs"] for line in difference_lines(pair)), sep="\n")
    if args.json:
        write_json(args.json, result)


def run_records(args, device):
    """Predict single ECGs of any source, sampling rate and length, by windows of 10 s."""
    path, records, rows, unusable = args.models[0], find_records(args.record), [], []
    if args.plot and len(records) > 1:
        raise InputError(f"--plot draws one record, {len(records)} were given")
    checkpoint, model = load_model(path, device)
    classes = np.array(checkpoint["classes"])
    # No thresholds that are unknown or rest on few positives of fold 9.
    few = np.less(checkpoint.get("positives", 0), FEW)
    limits = np.where(few, np.nan, checkpoint.get("thresholds", [np.nan] * len(classes)))
    for record in tqdm(records, "predict", unit="record", disable=None if records[1:] else True):
        try:
            prob, n, notes = predict_record(checkpoint, model, record, device)
            above = ";".join(classes[prob >= limits])
            rows.append([record, n, notes, above, *(f"{value:.6g}" for value in prob)])
        except InputError as error:
            unusable.append(error)
    if not rows:
        raise unusable[0]
    if len(records) == 1:
        print(*record_lines(classes, limits, prob), f"mean of {n} windows of 10 s",
              *[notes] * bool(notes), sep="\n")
    if args.plot:
        best = np.argsort(-prob, kind="stable")[:5]
        caption = ",  ".join(f"{classes[i]} {prob[i]:.4f}" for i in best)
        plot_record(records[0], checkpoint["leads"], caption, args.plot)
    if len(records) > 1 or args.out:
        out, text = args.out or Path(path).with_name("records.csv"), io.StringIO()
        csv.writer(text).writerow(["record", "windows", "notes", "above_threshold", *classes])
        csv.writer(text).writerows(rows)
        with data.whole_file(out) as f:
            f.write(text.getvalue().encode(errors="surrogateescape"))   # names that are not UTF-8
        print(f"{out}: {len(rows):,} records, {sum(bool(row[2]) for row in rows):,} with notes")
    if unusable:
        raise InputError(f"{unusable[0]}; {out} lacks {len(unusable)} of {len(records)} records")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    add = parser.add_argument
    add("models", metavar="FILE", nargs="+", help="checkpoints or .npz files; several are compared")
    add("--fold", nargs="+", metavar="K", choices=[*map(str, range(1, 11)), "all"], default=[],
        help="folds, or all (default: 10, the test fold)")
    add("--data", help="folder of the dataset (default: the one the checkpoint was trained on)")
    add("--task", help="a task or .csv table other than the checkpoint's; classes match by name")
    add("--out", help="what to write (default: beside FILE predictions.npz, or records.csv)")
    add("--features", action="store_true", help="write the network's features (N, 1024), too")
    add("--json", metavar="FILE", help="also write the scores as JSON")
    add("--record", metavar="PATH", nargs="+", help="predict these WFDB records or folders instead")
    add("--plot", metavar="FILE.png", help="with one --record: draw the ECG")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    add("--skip-unreadable", action="store_true", help="leave out records that cannot be used")
    args = parser.parse_args(argv)
    with data.errors_in_one_line("evaluate.py", network.WeightsError, torch.OutOfMemoryError):
        # What would else be found out after the work.
        table = [".csv"] if args.record else [".npz"]
        for path, ends in (args.out, table), (args.json, [".json"]), (args.plot, [".png", ".pdf"]):
            if path and (Path(path).suffix not in ends or not Path(path).parent.is_dir()):
                raise InputError(f"{path}: wanted a {' or '.join(ends)} file in an existing folder")
        several, chosen = len(args.models) > 1, args.fold or args.data or args.task or args.features
        if several and (args.out or args.record) or args.plot and not args.record:
            raise InputError("--out, --record: with one FILE; --plot: with --record")
        if args.record and (chosen or args.json):
            raise InputError("--fold, --data, --task, --features, --json: not with --record")
        if (chosen or args.out) and all(path.endswith(".npz") for path in args.models):
            raise InputError("--fold, --data, --task, --features, --out: of checkpoints, not .npz")
        (run_records if args.record else run)(args, pick_device(args.device))


if __name__ == "__main__":
    main()
