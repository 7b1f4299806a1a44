"""Bad input ends with status 2 and one line that names the culprit and the remedy, and leaves
earlier files alone; hostile files run no code."""
import os
import pickle
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import data
import evaluate
import model as network
import post_train
import tiny as small
from helpers import edit_csv
from make_demo import make_demo

# The tests run in a folder with all that a user may have, to which every path is relative.
DATABASE, STATEMENTS = Path("data/ptbxl_database.csv"), Path("data/scp_statements.csv")
TABLE = Path("own.csv")     # of the same records and folds, with classes of its own
RECORD = Path("data/records500/00000/00005_hr")     # the spoilt one, in row 6 of both tables
HEA, DAT = RECORD.with_suffix(".hea"), RECORD.with_suffix(".dat")
WEIGHTS, BEST, LAST, NPZ = map(Path, ("weights.pth", "run/best.pt", "run/last.pt", "run/p.npz"))
STEM, BIAS = "first_conv.conv.weight", "dense.bias"

SHORT = ("post_train --data data --weights none --probe-epochs 1 --epochs 1 --batch-size 8 "
         "--preprocess raw --device cpu")
TRAIN, OWN = f"{SHORT} --task all71 --out new", f"{SHORT} --task {TABLE} --out new"
START, RESUME = f"{TRAIN} --weights {WEIGHTS}", f"{SHORT} --task all71 --out run --resume"
BUILD, VERIFY = "data --data data --preprocess zscore", f"model --weights {WEIGHTS}"
EVALUATE, READ = f"evaluate {BEST}", f"evaluate {BEST} --record {RECORD}"
SCORE = f"evaluate {NPZ}"


def make_own(rows):
    rows[:] = [{"record": row["filename_hr"], "ecg_id": row["ecg_id"], "fold": row["strat_fold"],
                "NORM": i % 2, "other": i % 3 // 2} for i, row in enumerate(rows)]


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    """Data with its cache, a run before its last step, its predictions, and weights."""
    root = tmp_path_factory.mktemp("world")
    make_demo(root / "data", records=24)
    with pytest.MonkeyPatch.context() as m:
        small.shrink(m.setattr)
        m.chdir(root)
        shutil.copy(DATABASE, TABLE)
        edit_csv(TABLE, make_own)
        post_train.main(shlex.split(TRAIN)[1:] + ["--out", "run"])
        Path("run/test.json").unlink()
        resaved(BEST, data="data")()
        evaluate.main([str(BEST), "--out", str(NPZ)])
        torch.save({"state_dict": network.ecgfounder(150).state_dict()}, WEIGHTS)
    return root


@pytest.fixture
def world(pristine, tmp_path, tiny, monkeypatch):
    """A copy of it that a test may spoil, as the current folder."""
    monkeypatch.chdir(shutil.copytree(pristine, tmp_path / "world"))


def snapshot():
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def refused(fails, command, *words):
    """There is one line, with these words; no file is changed, none half-written, no code run."""
    (script, *argv), before = shlex.split(command), snapshot()
    line, after = fails(sys.modules[script].main, argv, *words), snapshot()
    assert line.startswith(f"{script}.py: ") and len(line) < 1000
    assert "weights_only" not in line   # torch's advice
    assert before.items() <= after.items() and not Path("canary").exists()
    assert not [path for path in after if path.name.startswith(".")]


def changed(path, change):
    return lambda: path.write_bytes(change(path.read_bytes()))


def cell(path, column, value):
    """Another value of a column in row 6 of a table."""
    return lambda: edit_csv(path, lambda rows: rows[4].update({column: value}))


def resaved(path, tensors=(), **fields):
    """A checkpoint with other tensors and fields."""
    def put():
        checkpoint = {**torch.load(path, weights_only=True), **fields}
        checkpoint["state_dict"].update(tensors)
        torch.save(checkpoint, path)
    return put


def predicted_nan():
    p = dict(np.load(NPZ))
    np.savez(NPZ, **{**p, "y_prob": np.where(p["y_prob"] == p["y_prob"].max(), np.nan, 0.5)})


def classes_as_objects():
    p = dict(np.load(NPZ))
    np.savez(NPZ, **{**p, "classes": p["classes"].astype(object)})


DAMAGE = {"missing": None, "empty": lambda old: b"", "HTML": lambda old: b"<!DOCTYPE html>404",
          "truncated": lambda old: old[:len(old) // 2], "noise": lambda old: bytes(range(256)) * 9}
DAMAGED = [     # (command, file, what the line names)
    (TRAIN, DATABASE, f"{DATABASE}"), (TRAIN, STATEMENTS, STATEMENTS.name),
    (OWN, TABLE, TABLE.name), (BUILD, DAT, f"{RECORD}, --skip-unreadable"),
    (READ, HEA, f"{RECORD}"), (RESUME, LAST, f"{LAST}, train"), (SCORE, NPZ, f"{NPZ}"),
    (START, WEIGHTS, f"{WEIGHTS}, model.py --download"), (EVALUATE, BEST, f"{BEST}, train"),
]
CELLS = [       # (table, column, bad values, what else the line names)
    (DATABASE, "strat_fold", ["0", "1.5", ""], "row 6, 1-8 (train)"),
    (DATABASE, "filename_hr", ["/etc/passwd", "../secret"], "inside"),
    (TABLE, "other", ["2", ""], "row 6, 0 or 1"), (TABLE, "ecg_id", ["6"], "2 rows"),
    (DATABASE, "scp_codes", ["{'XYZ': 100.0}", "{'NORM': 100.0", "[" * 100_000,
                             "{'NORM': __import__('os').mkdir('canary')}"], "row 6, statements of"),
]
SPOILED = [     # (command, what the line names, what spoils)
    (OWN, f"{TABLE}, 'record'", changed(TABLE, lambda old: old.replace(b"record", b"path", 1))),
    (OWN, f"{TABLE}, utf-8, wanted", changed(TABLE, lambda old: old.replace(b"other", b"\xe9"))),
    (READ, f"{RECORD}, mmhg, mV", changed(HEA, lambda old: old.replace(b"/mV", b"/mmHg"))),
    (START, f"{WEIGHTS}, {STEM}, [3, 12, 1]", resaved(WEIGHTS, {STEM: torch.zeros(3, 12, 1)})),
    (START, f"{WEIGHTS}, no ECGFounder", resaved(WEIGHTS, {STEM: torch.zeros(3)})),
    (VERIFY, f"{WEIGHTS}, not finite", resaved(WEIGHTS, {BIAS: torch.full((150,), torch.nan)})),
    (RESUME, f"{LAST}, records was, same", cell(DATABASE, "scp_codes", "{'IMI': 100.0}")),
    (EVALUATE, f"{BEST}, not yet a model", partial(shutil.copy, WEIGHTS, BEST)),
    (SCORE, f"{NPZ}, 0 to 1", predicted_nan), (SCORE, f"{NPZ}, astype(str)", classes_as_objects),
]
OPTIONS = [     # (command, what the line names)
    (f"{TRAIN} --data elsewhere", f"elsewhere/{DATABASE.name}, data.py --download"),
    (f"{TRAIN} --leads I,IV", "--leads, IV, aVR"), (f"{TRAIN} --lr nan", "--lr is nan"),
    (f"{TRAIN} --graph", "--graph: wanted one GPU"),
    (f"{TRAIN} --drop-path 1", "--drop-path is 1"), (f"{TRAIN} --seed 4294967296", "--seed is 4"),
    (f"{TRAIN} --out run", "run, holds a run, --resume"),
    (f"{SCORE} --fold 9", "--fold, checkpoints"), (f"{READ} --fold 9", "--fold, not with --rec"),
    (f"{RESUME} --lr 0.01 --seed 4", "lr was 0.0005, now 0.01, seed was 0, another --out"),
]
CASES = [
    *((command, words, changed(path, damage) if damage else path.unlink)
      for command, path, words in DAMAGED for kind, damage in DAMAGE.items()
      if (path, kind) != (LAST, "missing")),    # it starts over
    *((OWN if path == TABLE else TRAIN, f"{path}, {column}, {value[:20]}, {words}",
       cell(path, column, value)) for path, column, values, words in CELLS for value in values),
    *SPOILED, *((command, words, Path("empty").mkdir) for command, words in OPTIONS),
]


@pytest.mark.parametrize("command, words, spoil", CASES, ids=[words[-60:] for _, words, _ in CASES])
def test_bad_input(world, fails, command, words, spoil):
    spoil()
    refused(fails, command, *words.split(", "))


def test_a_full_gpu(world, fails, monkeypatch):
    """Another run may fill it."""
    def infer(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nSee the documentation")
    monkeypatch.setattr(evaluate, "infer", infer)
    for command in (EVALUATE, READ, TRAIN):
        refused(fails, command, "CUDA out of memory. See")


def test_a_mistyped_task_leaves_no_folder(world, fails):
    refused(fails, f"{TRAIN} --task rythm12", "rythm12", "rhythm12")
    assert not Path("new").exists()


class Trick:
    """An object whose pickle calls `function(*arguments)` when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


TRICKS = [Trick(os.mkdir, "canary"), Trick(np.testing.measure, "os.mkdir('canary')"),
          Trick(torch.utils.collect_env.run, "mkdir canary"), np.array([Trick(os.mkdir, "canary")])]


def test_the_tricks_work_where_nothing_guards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for trick in TRICKS:
        pickle.loads(pickle.dumps(trick))
        Path("canary").rmdir()


def in_checkpoint(trick, path):
    torch.save({**torch.load(path), "x": trick}, path)


def as_array(trick, path):
    np.savez(path, **{**np.load(path), "y_prob": np.array([trick], object)})


HOSTILE = [     # (command, its file, how a trick gets into that)
    (VERIFY, WEIGHTS, in_checkpoint), (START, WEIGHTS, in_checkpoint),
    (RESUME, LAST, in_checkpoint), (EVALUATE, BEST, in_checkpoint), (SCORE, NPZ, as_array),
    *((command, path, lambda trick, path: path.write_bytes(pickle.dumps(trick)))
      for command, path in ((VERIFY, WEIGHTS), (SCORE, NPZ))),
]


@pytest.mark.parametrize("command, path, put", HOSTILE)
def test_a_file_that_would_run_code_is_refused(world, fails, command, path, put):
    good = path.read_bytes()
    for trick in TRICKS:
        path.write_bytes(good)
        put(trick, path)
        refused(fails, command, path)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([DATABASE, STATEMENTS, TABLE, HEA]), st.binary(max_size=99), st.floats(0, 1))
def test_fuzzed_tables_and_headers_are_read_or_refused(pristine, tmp_path, name, junk, where):
    for path in (DATABASE, STATEMENTS, TABLE, HEA, DAT):
        shutil.copy(pristine / path, tmp_path)
    old, at = (pristine / name).read_bytes(), int(where * (pristine / name).stat().st_size)
    (tmp_path / name.name).write_bytes(old[:at] + junk + old[at + len(junk):])
    try:
        for task in ("all71", tmp_path / TABLE):
            labels = data.load_labels(tmp_path, task)
            assert np.isin(labels.fold, range(1, 11)).all() and np.isin(labels.y, (0, 1)).all()
        signal, _ = next(data.load_windows(tmp_path / RECORD.name, "raw"))
        assert signal.shape == (12, 5000)
    except data.InputError as error:
        assert name.stem in str(error) and "\n" not in str(error)
