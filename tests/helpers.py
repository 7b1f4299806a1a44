"""What several test files use."""
import csv
import itertools
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

import model as network
import post_train

TESTS = Path(__file__).parent
ROOT = TESTS.parent
TIMINGS = ("seconds", "ecgs_per_second", "peak_memory_mb")


def read_csv(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def write_csv(path, rows):
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def edit_csv(path, change):
    """Rewrite a csv file after `change`, which gets its rows as a list of dicts."""
    rows = read_csv(path)
    change(rows)
    write_csv(path, rows)


def write_record(path, signal, names, fs=500, units="mV", gain=1000):
    """Write (leads, n) as a WFDB record at `path` (without extension), which is returned."""
    import wfdb
    n, path = len(names), Path(path)
    wfdb.wrsamp(path.name, fs=fs, units=[units] * n, sig_name=list(names),
                p_signal=np.asarray(signal, float).T, fmt=["16"] * n, adc_gain=[gain] * n,
                baseline=[0] * n, write_dir=str(path.parent))
    return path


def arguments(root, out, *more):
    """Those of post_train.py for a short run of both stages."""
    options = ("--task rhythm12 --weights none --probe-epochs 2 --epochs 2 --batch-size 16 "
               "--device cpu")
    return ["--data", str(root), "--out", str(out), *options.split(), *map(str, more)]


def prefer_the_middle(monkeypatch):
    """Interpolations that beat every epoch: the second, and still more the third of the four."""
    save_best = post_train.save_best

    def preferring(run):
        line = run.history[-1]
        if line["stage"] == "interpolate":
            line["macro_auroc"] = (0.0, 1.5, 2.0, 1.0)[line["epoch"] - 1]
        save_best(run)

    monkeypatch.setattr(post_train, "save_best", preferring)


def history(out):
    """A run's metrics.jsonl without what differs from time to time."""
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    return [{key: v for key, v in line.items() if key not in TIMINGS} for line in lines]


def weights(out, name="last.pt"):
    return torch.load(Path(out, name), weights_only=True)["state_dict"]


def by_sklearn(y, prob, weight=None):
    """Scores (2, L), NaN for classes without weight on either side."""
    scores, w = np.full((2, y.shape[1]), np.nan), np.ones(len(y)) if weight is None else weight
    for c in range(y.shape[1]):
        if w[y[:, c] == 1].sum() > 0 and w[y[:, c] == 0].sum() > 0:
            scores[0, c] = roc_auc_score(y[:, c], prob[:, c], sample_weight=weight)
            scores[1, c] = average_precision_score(y[:, c], prob[:, c], sample_weight=weight)
    return scores


def predicted(path, x):
    """A checkpoint's probabilities (N, L) for signals (N, leads, n), by its network alone."""
    checkpoint = torch.load(path, weights_only=True)
    model = network.ecgfounder(len(checkpoint["classes"]), len(checkpoint["leads"])).eval()
    model.load_state_dict(checkpoint["state_dict"])
    with torch.inference_mode():
        return torch.sigmoid(model(torch.from_numpy(x))).numpy()


def assert_same_run(a, b):
    assert history(a) == history(b)
    for name in ("best.pt", "last.pt"):
        for key, value in weights(a, name).items():
            assert torch.equal(value, weights(b, name)[key]), (name, key)
    assert Path(a, "test.json").read_text() == Path(b, "test.json").read_text()


def content(folder):
    """Name -> bytes of its files."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


def temporaries(folder):
    """The files that are being written there."""
    return [p for p in Path(folder).rglob(".[0-9]*") if p.is_file()]


@contextmanager
def states_kept(folder, to, *calls):
    """Copy `folder` to the folders 1, 2 ... of `to`, as a kill would leave it before each of these
    calls of the module os; what is being written is there by half."""
    numbers = itertools.count(1)

    def keeping(call):
        def keep_and_call(*args):
            if Path(folder).exists():
                state = shutil.copytree(folder, Path(to, str(next(numbers))))
                for path in temporaries(state):
                    os.truncate(path, path.stat().st_size // 2)
            return call(*args)
        return keep_and_call

    with pytest.MonkeyPatch.context() as m:
        for name in calls:
            m.setattr(os, name, keeping(getattr(os, name)))
        yield
