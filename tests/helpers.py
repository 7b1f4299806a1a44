"""What several test files use."""
import csv
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

import evaluate
import post_train

TESTS = Path(__file__).parent
ROOT = TESTS.parent


def read_csv(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def write_csv(path, rows):
    """Rows are dicts with the same keys in the same order."""
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows([rows[0], *(row.values() for row in rows)])


def edit_csv(path, change):
    """Rewrite a csv file after `change`, which gets its rows as a list of dicts."""
    rows = read_csv(path)
    change(rows)
    write_csv(path, rows)


def write_record(path, signal, names, fs=500, units="mV", gain=1000):
    """Write (leads, n) as a WFDB record at `path` (without extension), which is returned."""
    import wfdb
    n, path = len(names), Path(path)
    wfdb.wrsamp(path.name, fs, [units] * n, list(names), np.asarray(signal, float).T,
                fmt=["16"] * n, adc_gain=[gain] * n, baseline=[0] * n, write_dir=str(path.parent))
    return path


def arguments(root, out, *more):
    """Those of post_train.py for a short run of both stages."""
    options = ("--task rhythm12 --weights none --probe-epochs 2 --epochs 2 --batch-size 16 "
               "--device cpu")
    return ["--data", str(root), "--out", str(out), *options.split(), *map(str, more)]


def prefer_the_middle(monkeypatch):
    """Interpolations that beat every epoch: the second, and still more the third of the four."""
    log = post_train.Run.log

    def preferring(run, **line):
        if line["stage"] == "interpolate":
            line["macro_auroc"] = (0.0, 1.5, 2.0, 1.0)[line["epoch"] - 1]
        log(run, **line)

    monkeypatch.setattr(post_train.Run, "log", preferring)


def history(out):
    """A run's metrics.jsonl without what differs from time to time."""
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def weights(out, name="last.pt"):
    return torch.load(Path(out, name), weights_only=True)["state_dict"]


def assert_same_run(a, b):
    assert history(a) == history(b)
    for name in ("best.pt", "last.pt"):
        torch.testing.assert_close(weights(a, name), weights(b, name), rtol=0, atol=0)
    assert Path(a, "test.json").read_text() == Path(b, "test.json").read_text()


def by_sklearn(y, prob, weight=None):
    """AUROC and AUPRC (2, L); NaN for a class without positives or negatives."""
    scores = np.full((2, y.shape[1]), np.nan)
    for c in np.flatnonzero((y == 1).any(0) & (y == 0).any(0)):
        scores[:, c] = [metric(y[:, c], prob[:, c], sample_weight=weight)
                        for metric in (roc_auc_score, average_precision_score)]
    return scores


def predicted(path, x):
    """A checkpoint's probabilities (N, L) for signals (N, leads, n), by its network alone."""
    with torch.inference_mode():
        return torch.sigmoid(evaluate.load_model(path)[1](torch.from_numpy(x))).numpy()


def content(folder):
    """Name -> bytes of its files."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def temporaries(folder):
    """The files that are being written there, .<name>.<random>.part."""
    return [*Path(folder).rglob(".*.part")]


@contextmanager
def states_kept(folder, to):
    """Copy `folder` to the folders 1, 2 ... of `to`, as a kill would leave it before each call of
    os.replace; gives the list of the copies."""
    states, replace = [], os.replace

    def keep_and_replace(*args):
        states.append(shutil.copytree(folder, Path(to, str(len(states) + 1))))
        replace(*args)

    with patch.object(os, "replace", keep_and_replace):
        yield states
