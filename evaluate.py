"""Macro AUROC and AUPRC on PTB-XL's test fold, with 95 % intervals over patients; or the prediction for one ECG.

    python evaluate.py runs/x/best.pt                     # fold 10; writes runs/x/predictions.npz
    python evaluate.py runs/x/best.pt --fold 9 10 --json scores.json
    python evaluate.py predictions.npz                    # of any model: y_true (N, L), y_prob (N, L), classes (L,)
    python evaluate.py runs/x/best.pt --record path/to/record --plot ecg.png

A checkpoint of post_train.py holds all that is needed: network, task, classes, preprocessing, data path. Predictions are
made in float32 (on a GPU with PyTorch's defaults: TF32 convolutions where it has them). Needs data.py and model.py beside it.
"""
import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

import data
import model as network
from data import InputError

CHECKPOINT_LAYOUT = 1
CHECKPOINT = {"layout": int, "task": str, "classes": list, "preprocessing": str, "data": str, "args": dict}  # what one says of itself
DRAWS = 1000        # of the bootstrap
DRAW_CHUNK = 2**22  # weights held at once, 32 MB


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
    """Macro AUROC and AUPRC under `draws` Bayesian bootstrap weightings (Rubin 1981) of the patients: (draws, 2).

    Every patient (every record where patients are unknown) gets one Exp(1) weight a draw. No weight is zero, so that every
    class stays defined; drawing with replacement would lose the rare classes' positives.
    """
    _, patient = np.unique(np.arange(len(y_true)) if patient_id is None else patient_id, return_inverse=True)
    rng, chunks = np.random.default_rng(seed), []
    step = max(1, DRAW_CHUNK // max(1, len(y_true)))
    for start in range(0, draws, step):
        weight = rng.exponential(size=(min(step, draws - start), patient.max(initial=-1) + 1))[:, patient]
        chunks.append(np.stack([macro(m) for m in auroc_auprc(y_true, y_prob, weight)], axis=-1))
    return np.concatenate(chunks)


def report(y_true, y_prob, classes, patient_id=None):
    """The scores as plain data: macro AUROC and AUPRC with 95 % intervals, per class, undefined classes; None if undefined."""
    auroc, auprc = auroc_auprc(y_true, y_prob)
    point = np.array([macro(auroc), macro(auprc)])
    scores = bootstrap(y_true, y_prob, patient_id)
    low, high = np.percentile(scores, (2.5, 97.5), axis=0)
    value = lambda x: None if np.isnan(x) else float(x)
    return {
        "n": len(y_true),
        "macro_auroc": value(point[0]), "macro_auprc": value(point[1]),
        "macro_auroc_ci": [value(low[0]), value(high[0])], "macro_auprc_ci": [value(low[1]), value(high[1])],
        "bootstrap_bias": dict(zip(("macro_auroc", "macro_auprc"), map(value, scores.mean(0) - point))),
        "per_class": {name: {"positives": int(positives), "auroc": value(a), "auprc": value(p)}
                      for name, positives, a, p in zip(classes, np.sum(y_true, axis=0), auroc, auprc)},
        "undefined": [name for name, a in zip(classes, auroc) if np.isnan(a)],
    }


def show(score):
    return "     -" if score is None else f"{score:6.4f}"


def summary(scores):
    """A report's macro scores as lines to print."""
    lines = [f"{scores['n']:,} records"]
    for name in ("auroc", "auprc"):
        low, high = scores[f"macro_{name}_ci"]
        lines.append(f"macro {name.upper()} {show(scores[f'macro_{name}'])}  95 % interval {show(low)} to {show(high)}")
    if scores["undefined"]:
        lines.append(f"undefined here, not counted: {', '.join(scores['undefined'])}")
    return lines


def table(scores):
    """A report's classes as lines to print."""
    width = max(map(len, [*scores["per_class"], "class"]))
    return [f"{'class':{width}} positives  AUROC  AUPRC"] + [
        f"{name:{width}} {s['positives']:9,} {show(s['auroc'])} {show(s['auprc'])}" for name, s in scores["per_class"].items()]


# ----------------------------------------------------------------------------------------------------------- predictions

def infer(function, signals, rows, device, batch_size=64, amp=None):
    """`function` of every batch of `signals[rows]` without gradients -> float32 (n, ...) on the CPU.

    signals: see data.batches. amp: None for float32, or the dtype of autocast.
    """
    parts = [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]
    with torch.inference_mode(), torch.autocast(torch.device(device).type, amp, enabled=amp is not None):
        outputs = [function(x).float() for x in data.batches(signals, parts, device)]
    return torch.cat(outputs).cpu().numpy()


def probabilities(logits):
    return torch.sigmoid(torch.from_numpy(logits)).numpy()


def pick_device(name):
    """The device asked for, or where none is: a GPU if there is one, else the CPU. Raises InputError if it is not there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise InputError(f"device {name!r} is unknown; wanted cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device}: this machine shows {torch.cuda.device_count()} CUDA devices; --device cpu runs anywhere")
    return device


def load_checkpoint(path, device="cpu"):
    """A checkpoint of post_train.py -> (network in eval mode, the checkpoint's dict)."""
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file; `python post_train.py` writes checkpoints to runs/")
    checkpoint = network.read_checkpoint(path)
    lacking = [key for key, kind in CHECKPOINT.items() if not isinstance(checkpoint.get(key), kind)]
    if lacking:
        raise InputError(f"{path}: does not say its {lacking[0]}; wanted a checkpoint of post_train.py (weights for it to start "
                         "from are no model of a task yet: train first)")
    if checkpoint["layout"] != CHECKPOINT_LAYOUT:
        raise InputError(f"{path}: is of checkpoint layout {checkpoint['layout']}, this is layout {CHECKPOINT_LAYOUT}; "
                         "use the files it was trained with, or train again")
    model = network.ecgfounder(len(checkpoint["classes"]))
    network.load_pretrained(model, path, head=True)
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
            found = {key: z[key] for key in z.files if key in ("ecg_id", "patient_id", "classes", "y_true", "y_prob")}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; wanted a checkpoint or predictions.npz") from None
    except Exception as error:  # NumPy and zipfile raise many types; object arrays are refused here, unread
        raise InputError(f"{path}: cannot be read as predictions ({error}); wanted an .npz of plain arrays") from None
    lacking = [key for key in ("y_true", "y_prob", "classes") if key not in found]
    if lacking:
        raise InputError(f"{path}: has no array {lacking[0]!r}; wanted y_true (N, L), y_prob (N, L) and classes (L,)")
    y, p, classes = found["y_true"], found["y_prob"], [str(c) for c in found["classes"].ravel()]
    if y.ndim != 2 or y.shape != p.shape or len(classes) != y.shape[1] or len(set(classes)) < len(classes) or not y.size:
        raise InputError(f"{path}: y_true {y.shape}, y_prob {p.shape} and {len(set(classes))} classes; wanted (N, L), (N, L) and L")
    if y.dtype.kind not in "bfiu" or p.dtype.kind not in "bfiu":
        raise InputError(f"{path}: y_true is of type {y.dtype} and y_prob of type {p.dtype}; wanted numbers")
    if not np.isin(y, (0, 1)).all():
        raise InputError(f"{path}: y_true holds other values than 0 and 1; wanted a 1 for each class a record has")
    if not (np.isfinite(p).all() and (p >= 0).all() and (p <= 1).all()):
        raise InputError(f"{path}: y_prob holds values that are no probabilities; wanted finite ones in [0, 1]")
    found["classes"] = np.array(classes)
    for key in ("ecg_id", "patient_id"):
        if found.setdefault(key, None) is not None and found[key].shape != y.shape[:1]:
            raise InputError(f"{path}: {key} has shape {found[key].shape}; wanted ({len(y)},)")
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
    import matplotlib.pyplot as plt
    import wfdb
    signal, fs = data.read_record(record)
    figure = wfdb.plot_items(signal=np.nan_to_num(signal[:, :int(10 * fs)]).T.astype(float), fs=fs, sig_name=list(data.LEADS),
                             sig_units=["mV"] * len(data.LEADS), time_units="seconds", ecg_grids="all", figsize=(16, 22),
                             title=Path(record).name, return_fig=True)
    suffix = Path(path).suffix.lstrip(".") or "png"
    plt.close(figure)  # pyplot would keep it
    if suffix not in figure.canvas.get_supported_filetypes():
        raise InputError(f"{path}: no picture can be written as .{suffix}; wanted .png, .pdf or .svg")
    data.write_atomically(path, lambda temporary: figure.savefig(temporary, format=suffix, dpi=80, bbox_inches="tight"))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", metavar="FILE", help="a checkpoint of post_train.py, or predictions (.npz) of any model")
    parser.add_argument("--fold", type=int, nargs="+", metavar="K", help="folds to predict (default: 10, the test fold)")
    parser.add_argument("--data", help="PTB-XL's folder (default: where the checkpoint was trained)")
    parser.add_argument("--out", help="where to write the predictions (default: predictions.npz beside the checkpoint)")
    parser.add_argument("--json", metavar="FILE", help="also write the scores as JSON")
    parser.add_argument("--record", metavar="PATH", help="predict this one WFDB record (path without extension) instead")
    parser.add_argument("--plot", metavar="FILE.png", help="with --record: draw the ECG")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    parser.add_argument("--batch-size", type=int, default=64, help="ECGs at once (default: 64)")
    parser.add_argument("--skip-unreadable", action="store_true", help="leave out records that cannot be read")
    args = parser.parse_args(argv)
    try:
        if args.plot and not args.record:
            raise InputError("--plot draws the ECG of --record PATH; give both")
        given = [name for name in ("--fold", "--data", "--out", "--json") if getattr(args, name[2:]) is not None]
        if given and (args.record or (args.model.endswith(".npz") and given != ["--json"])):
            raise InputError(f"{given[0]} has no meaning {'with --record' if args.record else 'for predictions'}; leave it out")
        out = Path(args.out or Path(args.model).with_name("predictions.npz"))
        out = out if out.suffix == ".npz" else out.with_name(f"{out.name}.npz")
        for path in (out, Path(args.json or out)):
            if not path.parent.is_dir():
                raise InputError(f"{path}: there is no folder {path.parent}; make it first")
        if args.batch_size < 1:
            raise InputError(f"--batch-size is {args.batch_size}; wanted at least 1")
        device = pick_device(args.device)
        if args.record:
            print("\n".join(predict_record(args.model, args.record, device, args.plot)))
            return
        if args.model.endswith(".npz"):
            predictions = load_predictions(args.model)
        else:
            predictions = predict_folds(args.model, args.fold or [data.TEST_FOLD], args.data, device, args.batch_size, args.skip_unreadable)
            data.write_atomically(out, lambda path: np.savez(path, **predictions))
        scores = report(predictions["y_true"], predictions["y_prob"], predictions["classes"].tolist(), predictions["patient_id"])
        if args.json:
            write_json(args.json, scores)
        print("\n".join([*summary(scores), "", *table(scores)]))
    except (InputError, network.WeightsError, OSError) as error:
        sys.stderr.write(f"evaluate.py: {data.line_of(error)}\n")
        sys.exit(2)
    except torch.OutOfMemoryError:
        sys.stderr.write(f"evaluate.py: the GPU's memory is too small for {args.batch_size} ECGs; try --batch-size {max(1, args.batch_size // 2)}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
