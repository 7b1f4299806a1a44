"""Bad input: every case ends with status 2 and one line that names the culprit and the remedy, and leaves earlier files alone.

The cases marked WORKS must simply work. Then hostile files, which run no code and reach nothing outside their folder, and
properties that hold for any input (hypothesis).
"""
import ast
import builtins
import csv
import io
import os
import pickle
import re
import shutil
import sys
import zipfile
from hashlib import sha256
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import data
import evaluate
import model as network
import post_train
import tiny as small
from make_demo import NAMES, make_demo

RECORDS = 24


def train_arguments(w, *more):
    return ["--data", w.data, "--task", "all71", "--weights", "none", "--probe-epochs", 1, "--epochs", 1, "--batch-size", 8, "--device", "cpu",
            "--out", w.root / "new", *more]


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    """A folder with all that a user may have: data with its cache, a finished run and its predictions, and weights."""
    root = tmp_path_factory.mktemp("world")
    make_demo(root / "data", records=RECORDS)
    with pytest.MonkeyPatch.context() as m:
        small.shrink(m.setattr)
        w = SimpleNamespace(root=root, data=root / "data")
        post_train.main([str(a) for a in train_arguments(w, "--out", root / "run")])
        evaluate.main([str(root / "run" / "best.pt"), "--json", str(root / "run" / "scores.json")])
        torch.manual_seed(1)
        torch.save({"state_dict": network.ecgfounder(150).state_dict()}, root / "weights.pth")
    return root


@pytest.fixture
def world(pristine, tmp_path, tiny, monkeypatch):
    """A copy of it that a case may spoil."""
    root = tmp_path / "world"
    shutil.copytree(pristine, root)
    monkeypatch.chdir(root)
    w = SimpleNamespace(root=root, data=root / "data", run=root / "run", best=root / "run" / "best.pt", last=root / "run" / "last.pt",
                        npz=root / "run" / "predictions.npz", weights=root / "weights.pth", hea=root / "data/records500/00000/00005_hr.hea",
                        dat=root / "data/records500/00000/00005_hr.dat", database=root / "data/ptbxl_database.csv",
                        statements=root / "data/scp_statements.csv")
    checkpoint = torch.load(w.best, weights_only=True)
    torch.save({**checkpoint, "data": str(w.data)}, w.best)
    return w


def snapshot(root):
    return {str(p.relative_to(root)): sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file() and p.name != ".lock"}


# What a case does to the world.

def nothing(w):
    pass


def remove(name):
    return lambda w: getattr(w, name).unlink()


def write(name, content):
    return lambda w: getattr(w, name).write_bytes(content)


def change_bytes(name, change):
    return lambda w: getattr(w, name).write_bytes(change(getattr(w, name).read_bytes()))


def change_rows(change, name="database", row=4):
    """Edit one row (as a dict) of a table; None: all of them."""
    def edit(w):
        path = getattr(w, name)
        with open(path, newline="") as f:
            rows = list(csv.DictReader(f))
        for r in rows if row is None else [rows[row]]:
            change(r)
        with open(path, "w", newline="") as f:
            writer = csv.DictWriter(f, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return edit


def set_field(**fields):
    return change_rows(lambda r: r.update(fields))


def drop_column(column, name="database"):
    return change_rows(lambda r: r.pop(column), name, None)


def folder_in_place_of(name):
    def put(w):
        getattr(w, name).unlink()
        getattr(w, name).mkdir()
    return put


def move_fold(old, new):
    return change_rows(lambda r: r.update(strat_fold=new) if r["strat_fold"] in old else None, row=None)


def uncached(change):
    def both(w):
        shutil.rmtree(w.data / "cache")
        change(w)
    return both


def record(signal=None, fs=500, names=NAMES, units="mV", gain=1000):
    """Write record 5 anew."""
    def put(w):
        import wfdb
        x = np.random.default_rng(0).normal(0, 0.4, (5000, len(names))) if signal is None else signal
        n = len(names)
        wfdb.wrsamp("00005_hr", fs=fs, units=[units] * n, sig_name=list(names), p_signal=x, fmt=["16"] * n, adc_gain=[gain] * n, baseline=[0] * n,
                    write_dir=str(w.hea.parent))
    return uncached(put)


def header(old, new):
    return uncached(lambda w: w.hea.write_text(re.sub(old, new, w.hea.read_text(), count=1)))


def resave(name, change):
    """A checkpoint with other content."""
    def put(w):
        checkpoint = torch.load(getattr(w, name), weights_only=True)
        checkpoint["state_dict"] = dict(checkpoint["state_dict"])
        change(checkpoint)
        torch.save(checkpoint, getattr(w, name))
    return put


def in_state(change):
    return resave("weights", lambda c: change(c["state_dict"]))


def predictions(**arrays):
    """predictions.npz with some arrays replaced (by a function of the old one) or, None, removed."""
    def put(w):
        with np.load(w.npz) as z:
            old = {key: z[key] for key in z.files}
        for key, change in arrays.items():
            old[key] = None if change is None else change(old[key])
        np.savez(w.npz, **{key: value for key, value in old.items() if value is not None})
    return put


def one_nan(p):
    p = p.copy()
    p[0, 0] = np.nan
    return p


TRAIN, CACHE = (post_train, train_arguments), (data, lambda w, *more: ["--data", w.data, *more])
NETWORK = (network, lambda w, *more: ["--weights", w.weights, *more])
EVALUATE = (evaluate, lambda w, *more: [w.best, *more])
SCORE = (evaluate, lambda w, *more: [w.npz, *more])
START = (post_train, lambda w, *more: train_arguments(w, "--weights", w.weights, *more))
RESUME = (post_train, lambda w, *more: train_arguments(w, "--out", w.run, "--resume", *more))


def unfinished(change=nothing):
    """The run not yet tested, so that --resume has something to do."""
    def both(w):
        (w.run / "test.json").unlink()
        change(w)
    return both


CASES = {
    # ---- the tables
    "database missing": (remove("database"), TRAIN, [], ["ptbxl_database.csv", "no such file", "data.py --download"]),
    "database empty": (write("database", b""), TRAIN, [], ["ptbxl_database.csv", "no column", "--download"]),
    "database with a header alone": (change_bytes("database", lambda b: b.splitlines(True)[0]), TRAIN, [], ["ptbxl_database.csv", "has no rows", "fetch it again"]),
    "database cut in the middle of a row": (change_bytes("database", lambda b: b[:len(b) // 2]), TRAIN, [], ["ptbxl_database.csv", "row 1", "fields", "fetch"]),
    "database cut inside quotes": (change_bytes("database", lambda b: b[:b.index(b'"{') + 9]), TRAIN, [], ["ptbxl_database.csv", "row 2", "fetch"]),
    "database without ecg_id": (drop_column("ecg_id"), TRAIN, [], ["no column 'ecg_id'", "--download"]),
    "database without scp_codes": (drop_column("scp_codes"), TRAIN, [], ["no column 'scp_codes'", "--download"]),
    "database without strat_fold": (drop_column("strat_fold"), TRAIN, [], ["no column 'strat_fold'", "--download"]),
    "database without patient_id": (drop_column("patient_id"), TRAIN, [], ["no column 'patient_id'", "--download"]),
    "database without filename_hr": (drop_column("filename_hr"), CACHE, [], ["no column 'filename_hr'", "--download"]),
    "database in UTF-16": (change_bytes("database", lambda b: b.decode().encode("utf-16")), TRAIN, [], ["ptbxl_database.csv", "UTF-8", "fetch it again"]),
    "database in Latin-1": (change_bytes("database", lambda b: b.replace(b"NORM", "Ä".encode("latin-1"))), TRAIN, [], ["ptbxl_database.csv", "UTF-8", "fetch"]),
    "database of random bytes": (write("database", bytes(range(256)) * 40), TRAIN, [], ["ptbxl_database.csv", "fetch"]),
    "database with a field of a megabyte": (set_field(report="x" * 2**20), TRAIN, [], ["ptbxl_database.csv", "field larger", "fetch"]),
    "a folder in its place": (folder_in_place_of("database"), TRAIN, [], ["ptbxl_database.csv", "--download"]),
    "a row with too many fields": (change_bytes("database", lambda b: b.replace(b"00001_hr\r\n", b"00001_hr,1\r\n")), TRAIN, [], ["row 2", "fields"]),
    "ecg_id twice": (set_field(ecg_id="3"), TRAIN, [], ["ecg_id 3 stands twice", "fetch"]),
    "ecg_id no number": (set_field(ecg_id="x7"), TRAIN, [], ["row 6", "ecg_id is 'x7'", "whole number"]),
    "ecg_id infinite": (set_field(ecg_id="inf"), TRAIN, [], ["row 6", "ecg_id is 'inf'", "whole number"]),
    "patient_id no number": (set_field(patient_id="Smith"), TRAIN, [], ["row 6", "patient_id is 'Smith'", "whole number"]),
    "strat_fold 0": (set_field(strat_fold="0"), TRAIN, [], ["row 6", "strat_fold is 0", "1 to 10"]),
    "strat_fold 11": (set_field(strat_fold="11"), TRAIN, [], ["row 6", "strat_fold is 11", "1 to 10"]),
    "strat_fold 1.5": (set_field(strat_fold="1.5"), TRAIN, [], ["row 6", "strat_fold is '1.5'", "whole number"]),
    "strat_fold empty": (set_field(strat_fold=""), TRAIN, [], ["row 6", "strat_fold is ''", "whole number"]),
    "scp_codes no dict": (set_field(scp_codes="['NORM']"), TRAIN, [], ["row 6", "scp_codes is", "wanted a dict"]),
    "scp_codes cut": (set_field(scp_codes="{'NORM': 100.0"), TRAIN, [], ["row 6", "scp_codes is", "wanted a dict"]),
    "scp_codes a million brackets": (set_field(scp_codes="[" * 100_000), TRAIN, [], ["row 6", "scp_codes is", "wanted a dict"]),
    "scp_codes with a code of no statement": (set_field(scp_codes="{'XYZ': 100.0}"), TRAIN, [], ["row 6", "'XYZ'", "scp_statements.csv", "fetch"]),
    "statements missing": (remove("statements"), TRAIN, [], ["scp_statements.csv", "no such file", "--download"]),
    "statements empty": (write("statements", b""), TRAIN, [], ["scp_statements.csv", "no column", "--download"]),
    "statements without diagnostic_class": (drop_column("diagnostic_class", "statements"), TRAIN, [], ["no column 'diagnostic_class'", "--download"]),
    "no training fold": (move_fold("12345678", "9"), TRAIN, [], ["no record of all71 in folds 1-8", "ten folds"]),
    "no validation fold": (move_fold(["9"], "8"), TRAIN, [], ["no record of all71 in fold 9", "ten folds"]),
    "no test fold": (move_fold(["10"], "8"), TRAIN, [], ["no record of all71 in fold 10", "ten folds"]),
    "data folder missing": (nothing, TRAIN, ["--data", "elsewhere"], ["elsewhere/ptbxl_database.csv", "no such file", "data.py --download"]),
    # ---- records
    "record missing": (uncached(remove("dat")), CACHE, [], ["00005_hr", "cannot be read", "--skip-unreadable"]),
    "header missing": (uncached(remove("hea")), CACHE, [], ["00005_hr", "cannot be read", "--skip-unreadable"]),
    "record of zero bytes": (uncached(write("dat", b"")), CACHE, [], ["00005_hr", "cannot be read", "--skip-unreadable"]),
    "record of odd length": (uncached(change_bytes("dat", lambda b: b[:-1])), CACHE, [], ["00005_hr", "cannot be read", "--skip-unreadable"]),
    "record truncated": (uncached(change_bytes("dat", lambda b: b[:48_000])), CACHE, [], ["00005_hr", "cannot be read", "--skip-unreadable"]),
    "header empty": (uncached(write("hea", b"")), CACHE, [], ["00005_hr", "cannot be read", "--skip-unreadable"]),
    "header of random bytes": (uncached(write("hea", bytes(range(256)))), CACHE, [], ["00005_hr", "cannot be read", "--skip-unreadable"]),
    "header without lead names": (uncached(change_bytes("hea", lambda b: re.sub(rb" 0 \w+\n", b"\n", b))), CACHE, [], ["00005_hr", "1 record", "--skip-unreadable"]),
    "11 leads": (record(names=NAMES[:11]), CACHE, [], ["00005_hr", "has no lead V6", "--skip-unreadable"]),
    "sampling rate 0": (header(r"12 500 5000", "12 0 5000"), CACHE, [], ["00005_hr", "0 Hz", "--skip-unreadable"]),
    "a tenth of a second": (record(np.ones((50, 12))), CACHE, [], ["00005_hr", "0.1 s long", "--skip-unreadable"]),
    "unit mmHg": (record(units="mmHg"), CACHE, [], ["00005_hr", "mmHg", "no voltage", "--skip-unreadable"]),
    "an ECG of kilovolts": (record(np.full((5000, 12), 100.0), units="V", gain=100), CACHE, ["--preprocess", "raw"], ["00005_hr", "beyond 10000 mV", "--skip-unreadable"]),
    "file name absolute": (set_field(filename_hr="/etc/passwd"), CACHE, [], ["filename_hr is '/etc/passwd'", "inside"]),
    "file name outside": (set_field(filename_hr="records500/../../../secret"), CACHE, [], ["filename_hr is", "inside"]),
    "file name empty": (set_field(filename_hr=""), TRAIN, [], ["filename_hr is ''", "inside"]),
    "workers 0": (nothing, CACHE, ["--workers", "0"], ["--workers is 0", "at least 1"]),
    "a rate of a hundredth of a hertz": (header(r"12 500 5000", "12 0.01 5000"), CACHE, [], ["00005_hr", "0.01 Hz", "--skip-unreadable"]),
    "an address of no kind": (nothing, CACHE, ["--download", "--url", "http://host/a b"], ["http://host/a b", "cannot be fetched", "--url"]),
    "cache in the way": (uncached(lambda w: (w.data / "cache").write_text("mine")), CACHE, [], ["cache", "remove"]),
    # ---- options of training
    "task misspelt": (nothing, TRAIN, ["--task", "diagnostics44"], ["'diagnostics44'", "did you mean diagnostic44"]),
    "frac 0": (nothing, TRAIN, ["--frac", "0"], ["fraction is 0", "0 < fraction <= 1"]),
    "frac negative": (nothing, TRAIN, ["--frac", "-0.1"], ["fraction is -0.1", "0 < fraction <= 1"]),
    "frac above 1": (nothing, TRAIN, ["--frac", "1.01"], ["fraction is 1.01", "0 < fraction <= 1"]),
    "frac nan": (nothing, TRAIN, ["--frac", "nan"], ["fraction is nan", "0 < fraction <= 1"]),
    "epochs negative": (nothing, TRAIN, ["--epochs", "-1"], ["--epochs is -1", "at least 0"]),
    "nothing to train": (nothing, TRAIN, ["--epochs", "0", "--probe-epochs", "0"], ["--epochs 0", "--probe-epochs 0", "give one"]),
    "batch of 0": (nothing, TRAIN, ["--batch-size", "0"], ["--batch-size is 0", "at least 1"]),
    "learning rate nan": (nothing, TRAIN, ["--lr", "nan"], ["--lr is nan", "above 0"]),
    "learning rate of the probe 0": (nothing, TRAIN, ["--probe-lr", "0"], ["--probe-lr is 0", "above 0"]),
    "drop path 1": (nothing, TRAIN, ["--drop-path", "1"], ["--drop-path is 1", "0 <= p < 1"]),
    "dropout negative": (nothing, TRAIN, ["--dropout", "-0.1"], ["--dropout is -0.1", "0 <= p < 1"]),
    "seed negative": (nothing, TRAIN, ["--seed", "-3"], ["--seed is -3", "0 to 2^32"]),
    "CUDA where there is none": (nothing, TRAIN, ["--device", "cuda:77"], ["cuda:77", "CUDA devices", "--device cpu"]),
    "an unknown device": (nothing, TRAIN, ["--device", "tpu9"], ["'tpu9'", "wanted cpu, cuda"]),
    "output folder is a file": (nothing, TRAIN, ["--out", "weights.pth"], ["weights.pth", "another --out"]),
    "output folder under a file": (nothing, TRAIN, ["--out", "weights.pth/run"], ["weights.pth/run", "another --out"]),
    "output folder that cannot be made": (nothing, TRAIN, ["--out", "/proc/run"], ["/proc/run", "cannot be made", "another --out"]),
    "output folder of a finished run, its last.pt removed": (remove("last"), TRAIN, ["--out", "run"], ["run", "holds a run already", "another --out"]),
    "output folder of a finished run": (nothing, TRAIN, ["--out", "run"], ["run", "holds a run already", "--resume"]),
    # ---- weights
    "weights missing": (remove("weights"), START, [], ["weights.pth", "no such file", "model.py --download", "--weights none"]),
    "weights a folder": (folder_in_place_of("weights"), START, [], ["weights.pth", "model.py --download"]),
    "weights empty": (write("weights", b""), START, [], ["weights.pth", "again"]),
    "weights an HTML page": (write("weights", b"<!DOCTYPE html><html>404</html>"), START, [], ["weights.pth", "fetch", "--download"]),
    "weights truncated": (change_bytes("weights", lambda b: b[:len(b) // 2]), START, [], ["weights.pth", "damaged", "fetch"]),
    "weights of another network": (lambda w: torch.save({"state_dict": torch.nn.Linear(3, 2).state_dict()}, w.weights), START, [],
                                   ["weights.pth", "missing keys (first: dense.bias)", "unexpected keys (first: bias)", "wanted ECGFounder"]),
    "weights of one lead": (in_state(lambda s: s.update({"first_conv.conv.weight": torch.zeros(16, 1, 16)})), START, [],
                            ["first_conv.conv.weight (16, 1, 16)", "wanted ECGFounder's network with 12 leads"]),
    "weights with a key renamed": (in_state(lambda s: s.update({"first_conv.conv.offset": s.pop("first_conv.conv.bias")})), START, [],
                                   ["missing key (first: first_conv.conv.bias)", "unexpected key (first: first_conv.conv.offset)"]),
    "weights without a head": (in_state(lambda s: s.pop("dense.bias")), START, [], ["missing key (first: dense.bias)", "wanted"]),
    "weights with a NaN": (in_state(lambda s: s["first_conv.conv.bias"].fill_(torch.nan)), START, [], ["first_conv.conv.bias is not finite", "wanted"]),
    "weights without a state_dict": (lambda w: torch.save({"model": {}}, w.weights), START, [], ["weights.pth", "no `state_dict`", "wanted"]),
    "weights a list": (lambda w: torch.save([1, 2], w.weights), NETWORK, [], ["weights.pth", "no `state_dict`", "wanted"]),
    "weights with text among the tensors": (in_state(lambda s: s.update({"first_conv.conv.bias": "x"})), NETWORK, [], ["no `state_dict` of tensors", "wanted"]),
    "weights missing, to verify": (remove("weights"), NETWORK, [], ["weights.pth", "no such file", "model.py --download"]),
    "weights an HTML page, to verify": (write("weights", b"<html>404</html>"), NETWORK, [], ["weights.pth", "fetch", "--download"]),
    "weights from no server": (nothing, (network, lambda w: ["--download", "--url", "http://127.0.0.1:9/x"]), [], ["127.0.0.1:9", "cannot be fetched", "--url"]),
    "data from no server": (nothing, CACHE, ["--download", "--url", "http://127.0.0.1:9/x"], ["127.0.0.1:9", "cannot be fetched", "--url"]),
    "weights random bytes, to verify": (write("weights", bytes(range(256)) * 9), NETWORK, [], ["weights.pth", "fetch", "--download"]),
    # ---- runs to go on with
    "resumed with other options": (unfinished(), RESUME, ["--lr", "0.01", "--seed", "4"], ["--lr was 0.0005, now 0.01", "--seed was 0, now 4", "another --out"]),
    "resumed with another task": (unfinished(), RESUME, ["--task", "form19"], ["--task was all71, now form19", "another --out"]),
    "resumed from a truncated last.pt": (unfinished(change_bytes("last", lambda b: b[:3000])), RESUME, [], ["last.pt", "damaged", "again"]),
    "resumed from a best.pt": (unfinished(lambda w: shutil.copy(w.best, w.last)), RESUME, [], ["last.pt", "optimizer", "wanted"]),
    "resumed from the weights": (unfinished(lambda w: shutil.copy(w.weights, w.last)), RESUME, [], ["last.pt", "does not say its layout"]),
    # ---- checkpoints to evaluate
    "checkpoint missing": (remove("best"), EVALUATE, [], ["best.pt", "no such file", "post_train.py"]),
    "checkpoint a folder": (nothing, (evaluate, lambda w: [w.run]), [], ["run", "wanted a checkpoint"]),
    "checkpoint truncated": (change_bytes("best", lambda b: b[:5000]), EVALUATE, [], ["best.pt", "damaged", "again"]),
    "checkpoint of another layout": (resave("best", lambda c: c.update(layout=99)), EVALUATE, [], ["best.pt", "layout 99", "train again"]),
    "checkpoint with a class too few": (resave("best", lambda c: c["classes"].pop()), EVALUATE, [], ["best.pt", "wanted", "70 classes"]),
    "checkpoint with a class of other data": (resave("best", lambda c: c["classes"].__setitem__(3, "ZZZ")), EVALUATE, [], ["best.pt", "first difference", "wanted"]),
    "checkpoint with classes in another order": (resave("best", lambda c: c["classes"].reverse()), EVALUATE, [], ["best.pt", "their order", "wanted"]),
    "checkpoint with classes of no text": (resave("best", lambda c: c.update(classes=7)), EVALUATE, [], ["best.pt", "classes", "wanted"]),
    "checkpoint of an unknown preprocessing": (resave("best", lambda c: c.update(preprocessing="wavelet")), EVALUATE, [], ["'wavelet'", "wanted one of filter"]),
    "checkpoint of an unknown task": (resave("best", lambda c: c.update(task="all72")), EVALUATE, [], ["'all72'", "did you mean all71"]),
    "weights in place of a checkpoint": (nothing, (evaluate, lambda w: [w.weights]), [], ["weights.pth", "does not say its layout", "train first"]),
    "checkpoint with numbers for classes": (resave("best", lambda c: c.update(classes=list(range(71)))), EVALUATE, [], ["best.pt", "classes", "wanted"]),
    "checkpoint with a number for a key": (resave("best", lambda c: c["state_dict"].update({7: torch.zeros(1)})), EVALUATE, [], ["best.pt", "no `state_dict`", "wanted"]),
    "checkpoint with a sparse tensor": (resave("best", lambda c: c["state_dict"].update({"dense.bias": torch.zeros(71).to_sparse()})), EVALUATE, [],
                                        ["best.pt", "no `state_dict`", "wanted"]),
    "checkpoint without data in a tensor": (resave("best", lambda c: c["state_dict"].update({"dense.bias": torch.zeros(71, device="meta")})), EVALUATE, [],
                                            ["best.pt", "wanted"]),
    "predictions over the checkpoint": (nothing, EVALUATE, ["--json", "run/best.pt"], ["run/best.pt", "would be overwritten", "another file"]),
    "predictions over those compared": (nothing, (evaluate, lambda w: [w.best, w.npz]), [], ["predictions.npz", "would be overwritten", "--out"]),
    "two checkpoints of one folder": (nothing, (evaluate, lambda w: [w.best, w.last]), [], ["predictions.npz", "would be overwritten", "--out"]),
    "scores into a folder": (nothing, EVALUATE, ["--json", "."], ["is a folder", "name a file"]),
    "output into a folder": (nothing, EVALUATE, ["--out", "run"], ["is a folder", "name a file"]),
    "another device": (nothing, EVALUATE, ["--device", "mps"], ["'mps'", "wanted cpu, cuda"]),
    "data moved": (lambda w: shutil.move(w.data, w.root / "moved"), EVALUATE, [], ["data/ptbxl_database.csv", "--data"]),
    "fold 11": (nothing, EVALUATE, ["--fold", "11"], ["fold 11", "see --fold"]),
    "output in no folder": (nothing, EVALUATE, ["--out", "no/p.npz"], ["no/p.npz", "no folder no", "make it first"]),
    "scores in no folder": (nothing, EVALUATE, ["--json", "no/s.json"], ["no/s.json", "no folder no", "make it first"]),
    "batch of 0 to evaluate": (nothing, EVALUATE, ["--batch-size", "0"], ["--batch-size is 0", "at least 1"]),
    "CUDA to evaluate where there is none": (nothing, EVALUATE, ["--device", "cuda:77"], ["cuda:77", "--device cpu"]),
    "no such record": (nothing, EVALUATE, ["--record", "nowhere/1"], ["nowhere/1", "cannot be read as a WFDB record"]),
    "a picture of no kind": (nothing, EVALUATE, ["--record", "data/records500/00000/00005_hr", "--plot", "ecg.doc"], ["ecg.doc", "wanted .png"]),
    "options at odds": (nothing, EVALUATE, ["--record", "x", "--json", "y"], ["--json has no meaning with --record", "leave it out"]),
    # ---- predictions
    "predictions missing": (remove("npz"), SCORE, [], ["predictions.npz", "no such file", "wanted"]),
    "predictions no archive": (write("npz", b"y_true,y_prob\n1,0.5\n"), SCORE, [], ["predictions.npz", "cannot be read", "wanted an .npz"]),
    "predictions truncated": (change_bytes("npz", lambda b: b[:len(b) // 2]), SCORE, [], ["predictions.npz", "cannot be read", "wanted an .npz"]),
    "predictions without y_prob": (predictions(y_prob=None), SCORE, [], ["predictions.npz", "no array 'y_prob'", "wanted"]),
    "predictions with NaN": (predictions(y_prob=one_nan), SCORE, [], ["predictions.npz", "no probabilities", "in [0, 1]"]),
    "predictions that are logits": (predictions(y_prob=lambda p: p * 20 - 10), SCORE, [], ["predictions.npz", "no probabilities", "in [0, 1]"]),
    "predictions of unequal shapes": (predictions(y_prob=lambda p: p[:-1]), SCORE, [], ["predictions.npz", "y_prob (", "wanted (N, L)"]),
    "predictions of one dimension": (predictions(y_prob=np.ravel, y_true=np.ravel), SCORE, [], ["predictions.npz", "wanted (N, L)"]),
    "predictions of no record": (predictions(y_prob=lambda p: p[:0], y_true=lambda y: y[:0]), SCORE, [], ["predictions.npz", "wanted (N, L)"]),
    "predictions as text": (predictions(y_prob=lambda p: p.astype(str)), SCORE, [], ["predictions.npz", "of type <U", "wanted numbers"]),
    "predictions with object arrays": (predictions(classes=lambda c: c.astype(object)), SCORE, [], ["predictions.npz", "wanted an .npz of plain arrays"]),
    "predictions with a class twice": (predictions(classes=lambda c: np.append(c[:-1], c[0])), SCORE, [], ["predictions.npz", "70 classes", "wanted"]),
    "predictions with labels of 2": (predictions(y_true=lambda y: y * 2), SCORE, [], ["predictions.npz", "y_true", "other values than 0 and 1"]),
    "predictions with too few patients": (predictions(patient_id=lambda i: i[:-1]), SCORE, [], ["predictions.npz", "patient_id has shape", "wanted"]),
    "predictions with NaN for an ecg_id, compared": (predictions(ecg_id=lambda i: np.where(i == i[0], np.nan, i)), (evaluate, lambda w: [w.npz, w.npz]), [], ["record nan", "wanted the same"]),
    "predictions of bytes in the archive": (lambda w: zipfile.ZipFile(w.npz, "w").writestr("y_true", b"x") or [zipfile.ZipFile(w.npz, "a").writestr(n, b"x") for n in ("y_prob", "classes")],
                                            SCORE, [], ["predictions.npz", "wanted"]),
    "predictions with structured ids": (predictions(ecg_id=lambda i: np.zeros(len(i), [("a", int, 2)])), SCORE, [], ["predictions.npz", "ecg_id is of type", "wanted"]),
    "unreadable predictions skipped": (nothing, SCORE, ["--skip-unreadable"], ["--skip-unreadable has no meaning for predictions", "leave it out"]),
    "a fold of predictions": (nothing, SCORE, ["--fold", "9"], ["--fold has no meaning for predictions", "leave it out"]),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(world, fails, name):
    spoil, (script, arguments), more, words = CASES[name]
    spoil(world)
    before = snapshot(world.root)
    line = fails(script.main, [*arguments(world), *more], *words)
    assert line.startswith(f"{script.__name__}.py: ") and len(line) < 600 and ("Errno" not in line or "urlopen" in line)
    assert re.search(r"wanted|fetch|make|remove|train|did you mean|give|name|--\w", line), f"no remedy: {line}"
    after = snapshot(world.root)
    assert {path: after.get(path) for path in before} == before, "an earlier file was touched"
    assert not [path for path in after if re.match(r"\.\d+\.", path.rpartition("/")[2])], "a temporary file was left"


# ------------------------------------------------------------------------------------------------------------- what works

def crlf_and_bom(w):
    for path in (w.database, w.statements):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))


SIGNAL = np.random.default_rng(0).normal(0, 0.4, (5000, 12))
ORDER = [7, 3, 11, 0, 5, 9, 1, 10, 2, 8, 4, 6]
WITH_NAN = np.where(np.arange(5000)[:, None] % 50 == 7, np.nan, SIGNAL)
WORKS = {
    "Windows line ends and a byte order mark": (crlf_and_bom, TRAIN, [], "test fold 10"),
    "15 leads": (record(np.hstack([SIGNAL, SIGNAL[:, :3]]), names=NAMES + ["vx", "vy", "vz"]), CACHE, [], f"{RECORDS} records"),
    "leads in another order and case": (record(SIGNAL[:, ORDER], names=[NAMES[i].lower() for i in ORDER]), CACHE, [], f"{RECORDS} records"),
    "unit uV": (record(SIGNAL * 1000, units="uV", gain=1), CACHE, [], f"{RECORDS} records"),
    "100 Hz": (record(SIGNAL[:1000], fs=100), CACHE, [], f"{RECORDS} records"),
    "1000 Hz": (record(np.vstack([SIGNAL, SIGNAL]), fs=1000), CACHE, [], f"{RECORDS} records"),
    "samples missing": (record(WITH_NAN), CACHE, [], f"{RECORDS} records"),
    "a flat record": (record(np.zeros((5000, 12))), CACHE, [], f"{RECORDS} records"),
    "a longer file than its header says": (uncached(change_bytes("dat", lambda b: b + b"12")), CACHE, [], f"{RECORDS} records"),
    "a batch larger than the set": (nothing, TRAIN, ["--batch-size", "4096"], "(not 4096)"),
    "a test fold without positives of most classes": (nothing, EVALUATE, [], "undefined here, not counted: "),
    "a validation fold without a positive of any class of rhythm but one": (change_rows(
        lambda r: r.update(scp_codes="{'SR': 0.0}") if r["strat_fold"] == "9" else None, row=None), TRAIN, ["--task", "rhythm12"], "AUROC -"),
    "a training subset without positives of most classes": (nothing, TRAIN, ["--frac", "0.1"], "2 records to train"),
    "an unreadable record left out": (uncached(remove("dat")), CACHE, ["--skip-unreadable"], f"{RECORDS - 1} records"),
    "an empty patient_id": (set_field(patient_id=""), TRAIN, [], "test fold 10"),
    "resume where there is no run": (nothing, TRAIN, ["--resume"], "starting anew"),
    "resume of a finished run": (nothing, RESUME, [], "finished"),
    "predictions without ids": (predictions(ecg_id=None, patient_id=None), SCORE, [], "macro AUROC"),
    "predictions with classes as bytes": (predictions(classes=lambda c: c.astype("S")), SCORE, [], "NORM  "),
    "predictions of bool and float16": (predictions(y_true=lambda y: y.astype(bool), y_prob=lambda p: p.astype(np.float16)), SCORE, [], "macro AUROC"),
    "weights of another task": (nothing, (post_train, lambda w: train_arguments(w, "--weights", w.best, "--task", "form19")), [], "test fold 10"),
}


@pytest.mark.parametrize("name", WORKS)
def test_unusual_input_that_works(world, capsys, name):
    spoil, (script, arguments), more, words = WORKS[name]
    spoil(world)
    script.main([str(a) for a in [*arguments(world), *more]])
    assert words in capsys.readouterr().out


def test_unusual_records_give_the_right_signal(world):
    """Other leads, order, case and unit change nothing of what is read."""
    want = SIGNAL.T
    for name in ("15 leads", "leads in another order and case", "unit uV"):
        (world.data / "cache").mkdir(exist_ok=True)
        WORKS[name][0](world)
        np.testing.assert_allclose(data.read_record(world.hea.with_suffix(""))[0], want, atol=6e-4)


# ---------------------------------------------------------------------------------------------------------- hostile files

class Trick:
    """An object whose pickle calls `function(*arguments)` when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def object_array(canary):
    array = np.empty(1, object)
    array[0] = Trick(os.mkdir, canary)
    return array


TRICKS = {
    "os.system": lambda canary: Trick(os.system, f"mkdir {canary}"),
    "os.mkdir": lambda canary: Trick(os.mkdir, canary),
    "builtins.eval": lambda canary: Trick(builtins.eval, f"__import__('os').mkdir({canary!r})"),
    "builtins.exec": lambda canary: Trick(builtins.exec, f"import os; os.mkdir({canary!r})"),
    "builtins.getattr": lambda canary: Trick(getattr, Trick(builtins.__import__, "os"), Trick(os.mkdir, canary)),
    "a function of torch's own": lambda canary: Trick(torch.utils.collect_env.run, f"mkdir {canary}"),
    "a function of NumPy's own": lambda canary: Trick(np.testing.measure, f"__import__('os').mkdir({canary!r})"),
    "a NumPy object array": object_array,
}
FORMS = {
    "zip": lambda value, path: torch.save(value, path),
    "legacy": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    "pickle": lambda value, path: path.write_bytes(pickle.dumps(value)),
}
DOORS = {"model.py --weights": NETWORK + ("weights",), "post_train.py --weights": START + ("weights",), "post_train.py --resume": RESUME + ("last",),
         "evaluate.py": EVALUATE + ("best",)}


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


@pytest.mark.parametrize("trick", TRICKS)
def test_the_traps_work_where_nothing_guards(canary, trick):
    try:
        pickle.loads(pickle.dumps(TRICKS[trick](str(canary))))
    except Exception:
        pass
    assert canary.exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("trick", TRICKS)
def test_a_checkpoint_that_would_run_code_is_refused(world, canary, fails, trick, door, form):
    script, arguments, name = DOORS[door]
    (world.run / "test.json").unlink()
    path = getattr(world, name)
    good = torch.load(path, weights_only=True)
    path.unlink()
    FORMS[form]({**good, "val_auroc": TRICKS[trick](str(canary))}, path)
    fails(script.main, arguments(world), path.name, "refused", "again")
    assert not canary.exists()


@pytest.mark.parametrize("place", ["y_prob", "classes", "a pickle in place of the archive", "pickles in the archive", "pickles in the archive as arrays"])
@pytest.mark.parametrize("trick", TRICKS)
def test_predictions_that_would_run_code_are_refused(world, canary, fails, trick, place):
    hostile = np.array([TRICKS[trick](str(canary)), None], object)
    if place in ("y_prob", "classes"):
        predictions(**{place: lambda old: hostile})(world)
    elif place == "a pickle in place of the archive":
        world.npz.write_bytes(pickle.dumps(hostile))
    else:
        with zipfile.ZipFile(world.npz, "w") as z:
            for name in ("y_prob", "y_true", "classes"):
                z.writestr(name + (".npy" if place.endswith("as arrays") else ""), pickle.dumps(hostile))
    fails(evaluate.main, [world.npz], "predictions.npz", "wanted")
    assert not canary.exists()


@pytest.mark.parametrize("text", ["__import__('os').mkdir('canary')", "{'NORM': __import__('os').mkdir('canary')}", "{**__import__('os').environ}",
                                  "{x: 1 for x in [__import__('os').mkdir('canary')]}", "exec('canary')", "{'NORM': 1}; __import__('os').mkdir('canary')"])
def test_scp_codes_are_read_as_a_literal_only(world, fails, text):
    set_field(scp_codes=text)(world)
    fails(post_train.main, train_arguments(world), "row 6", "wanted a dict")
    assert not list(world.root.rglob("canary"))


# ------------------------------------------------------------------------------------------------------------- properties

PATIENT = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
CELL = st.one_of(st.text(max_size=20), st.integers().map(str), st.floats().map(str), st.sampled_from(["", "1", "10", "1e400", "{'NORM': 1}", "{'NORM': [[]]}", "{()}"]),
                 st.dictionaries(st.one_of(st.text(max_size=3), st.just("NORM")), st.floats(), max_size=2).map(str))


@PATIENT
@given(cells=st.dictionaries(st.sampled_from(["ecg_id", "patient_id", "scp_codes", "strat_fold", "filename_hr", "report"]), CELL, min_size=1), task=st.sampled_from(data.TASKS))
def test_a_fuzzed_row_is_read_or_refused(pristine, tmp_path, cells, task):
    with open(pristine / "data" / "ptbxl_database.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    if sys.version_info < (3, 11):  # whose csv module neither writes nor reads a zero byte
        cells = {key: value.replace("\0", "") for key, value in cells.items()}
    rows[2].update(cells)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    (tmp_path / "ptbxl_database.csv").write_bytes(text.getvalue().encode("utf-8", "surrogatepass"))
    shutil.copy(pristine / "data" / "scp_statements.csv", tmp_path)
    try:
        labels = data.load_labels(tmp_path, task)
        data.source_of(tmp_path, "filter")
    except data.InputError as error:
        assert str(error).count("\n") == 0 and "ptbxl_database.csv" in str(error)
    else:  # what was accepted means something
        assert ((1 <= labels.fold) & (labels.fold <= 10)).all() and labels.y.any(1).all()
        changed = labels.ecg_id == int(float(rows[2]["ecg_id"]))
        codes = ast.literal_eval(rows[2]["scp_codes"])
        assert changed.sum() == any(code in codes for code in labels.classes) if task == "rhythm12" else changed.sum() <= 1


@PATIENT
@given(st.binary(max_size=400), st.floats(0, 1))
def test_fuzzed_bytes_of_a_table_are_read_or_refused(pristine, tmp_path, junk, where):
    whole = (pristine / "data" / "ptbxl_database.csv").read_bytes()
    at = int(where * len(whole))
    (tmp_path / "ptbxl_database.csv").write_bytes(whole[:at] + junk + whole[at + len(junk):])
    shutil.copy(pristine / "data" / "scp_statements.csv", tmp_path)
    try:
        data.load_labels(tmp_path, "all71")
    except data.InputError as error:
        assert "ptbxl_database.csv" in str(error)


@PATIENT
@given(st.binary(min_size=1, max_size=8), st.floats(0, 1), st.sampled_from(["weights.pth", "run/predictions.npz"]))
def test_fuzzed_bytes_of_an_archive_are_read_or_refused(pristine, tmp_path, junk, where, name):
    whole = (pristine / name).read_bytes()
    at = int(where * (len(whole) - len(junk)))
    path = tmp_path / name.rpartition("/")[2]
    path.write_bytes(whole[:at] + junk + whole[at + len(junk):])
    try:
        evaluate.load_predictions(path) if name.endswith("npz") else network.read_checkpoint(path)
    except (data.InputError, network.WeightsError) as error:
        assert path.name in str(error)


@PATIENT
@given(st.binary(max_size=60), st.floats(0, 1))
def test_fuzzed_headers_are_read_or_refused(pristine, tmp_path, junk, where):
    folder = pristine / "data/records500/00000"
    whole = (folder / "00005_hr.hea").read_bytes()
    at = int(where * len(whole))
    (tmp_path / "00005_hr.hea").write_bytes(whole[:at] + junk + whole[at + len(junk):])
    shutil.copy(folder / "00005_hr.dat", tmp_path)
    try:
        signal, fs = data.read_record(tmp_path / "00005_hr")
        assert signal.shape[0] == 12 and signal.dtype == np.float32 and fs > 0
    except data.InputError as error:
        assert "00005_hr" in str(error)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), samples=st.integers(201, 7000), size=st.sampled_from([1e-12, 1e-3, 1, 100, 1e4]), missing=st.floats(0, 1),
       how=st.sampled_from(data.PREPROCESSING), fs=st.sampled_from([500, 499.5, 400]))
def test_preprocessing_gives_finite_signals_of_one_shape(seed, samples, size, missing, how, fs):
    rng = np.random.default_rng(seed)
    x = np.where(rng.random((12, samples)) < missing, np.nan, rng.uniform(-size, size, (12, samples)))
    out = data.preprocess(x, fs, how)
    assert out.shape == (12, 5000) and out.dtype == np.float32 and np.isfinite(out).all() and np.isfinite(out.astype(np.float16)).all()
