"""Bad input ends with status 2 and one line that names the culprit and the remedy, and leaves
earlier files alone; unusual input works; hostile files run no code."""
import builtins
import os
import pickle
import re
import shlex
import shutil
import zipfile
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import data
import evaluate
import model as network
import post_train
import tiny as small
from helpers import edit_csv, write_record
from make_demo import NAMES, make_demo

RECORDS = 24
# The tests run in a folder with all that a user may have, to which every path is relative.
DATABASE, STATEMENTS = Path("data/ptbxl_database.csv"), Path("data/scp_statements.csv")
TABLE = Path("own.csv")     # of the same records and folds, with classes of its own
RECORD = Path("data/records500/00000/00005_hr")     # the spoilt one, in row 6 of both tables
HEA, DAT = RECORD.with_suffix(".hea"), RECORD.with_suffix(".dat")
WEIGHTS, BEST, LAST = Path("weights.pth"), Path("run/best.pt"), Path("run/last.pt")
NPZ, TEST, CACHE = Path("run/predictions.npz"), Path("run/test.json"), Path("data/cache")
STEM, BIAS = "first_conv.conv.weight", "dense.bias"
DEEP, GATE = "stage_list.1.block_list.1.conv2.conv.weight", "stage_list.0.block_list.0.se_fc1.bias"
SIGNAL = np.random.default_rng(0).normal(0, 0.4, (12, 5000))


class Script(NamedTuple):
    module: object
    arguments: str
    without: Path = Path("nothing")     # removed first, so that there is something to do

    def prepare(self, options=""):
        if self.without.is_dir():
            shutil.rmtree(self.without)
        self.without.unlink(missing_ok=True)
        return shlex.split(f"{self.arguments} {options}")


SHORT = ("--data data --task all71 --weights none --probe-epochs 1 --epochs 1 --batch-size 8 "
         "--device cpu --out new ")
TRAIN, OWN = Script(post_train, SHORT), Script(post_train, f"{SHORT} --task {TABLE}")
START, CUT = (Script(post_train, f"{SHORT} --weights {path}") for path in (WEIGHTS, BEST))
RESUME = Script(post_train, f"{SHORT} --out run --resume", TEST)
BUILD, VERIFY = Script(data, "--data data", CACHE), Script(network, f"--weights {WEIGHTS}")
EVALUATE, SCORE = Script(evaluate, f"{BEST}"), Script(evaluate, f"{NPZ}")


def make_own(rows):
    rows[:] = [{"record": row["filename_hr"], "ecg_id": row["ecg_id"], "fold": row["strat_fold"],
                "NORM": i % 2, "other": i % 3 // 2} for i, row in enumerate(rows)]


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    """Data with its cache, a finished run and its predictions, and weights."""
    root = tmp_path_factory.mktemp("world")
    make_demo(root / "data", records=RECORDS)
    with pytest.MonkeyPatch.context() as m:
        small.shrink(m.setattr)
        m.chdir(root)
        shutil.copy(DATABASE, TABLE)
        edit_csv(TABLE, make_own)
        post_train.main(TRAIN.prepare("--out run"))
        evaluate.main(EVALUATE.prepare())
        resaved(BEST, data="data")()
        torch.manual_seed(1)
        torch.save({"state_dict": network.ecgfounder(150).state_dict()}, WEIGHTS)
    return root


@pytest.fixture
def world(pristine, tmp_path, tiny, monkeypatch):
    """A copy of it that a test may spoil, as the current folder."""
    monkeypatch.chdir(shutil.copytree(pristine, tmp_path / "world"))


def snapshot():
    files = [path for path in Path().rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path): sha256(path.read_bytes()).hexdigest() for path in files}


# ---------------------------------------------------------------------------- what spoils the world

def nothing():
    pass


def changed(path, change):
    return lambda: path.write_bytes(change(path.read_bytes()))


def cell(column, value, folds=(), table=DATABASE):
    """Another value of a column in row 6 of a table, or in the rows of some folds."""
    def change(rows):
        fold = "fold" if table == TABLE else "strat_fold"
        for row in [r for r in rows if r[fold] in folds] or [rows[4]]:
            row[column] = value
    return lambda: edit_csv(table, change)


def without_columns(path, *columns):
    return lambda: edit_csv(path, lambda rows: [row.pop(c) for row in rows for c in columns])


def record(signal, names=NAMES, **details):
    return lambda: write_record(RECORD, signal, names, **details)


def resaved(path, state=(), **fields):
    """A checkpoint with other tensors and fields; functions change the old ones, None: without."""
    def put():
        checkpoint = torch.load(path, weights_only=True)
        for content, changes in ((checkpoint, fields), (checkpoint["state_dict"], dict(state))):
            for key, value in changes.items():
                content[key] = value(content[key]) if callable(value) else value
                if value is None:
                    del content[key]
        torch.save(checkpoint, path)
    return put


def predictions(**changes):
    """predictions.npz with arrays that are functions of the old ones; None: without them."""
    def put():
        arrays = dict(np.load(NPZ))
        for key, change in changes.items():
            old = arrays.pop(key)
            if change:
                arrays[key] = change(old)
        np.savez(NPZ, **arrays)
    return put


def archive(content, end=""):
    with zipfile.ZipFile(NPZ, "w") as z:
        for name in ("y_true", "y_prob", "classes"):
            z.writestr(name + end, content)


DAMAGE = {
    "missing": None, "empty": lambda old: b"", "truncated": lambda old: old[:len(old) // 2],
    "HTML": lambda old: b"<!DOCTYPE html><html>404</html>",
    "random bytes": lambda old: bytes(range(256)) * 40,
}
UNREADABLE = f"{RECORD}, --skip-unreadable"
DAMAGED = [     # (script, file, what the line names)
    (TRAIN, DATABASE, f"fetch, {DATABASE}"), (TRAIN, STATEMENTS, f"fetch, {STATEMENTS.name}"),
    (BUILD, DAT, UNREADABLE), (BUILD, HEA, UNREADABLE), (RESUME, LAST, f"{LAST}, again"),
    (START, WEIGHTS, f"{WEIGHTS}, model.py --download"), (EVALUATE, BEST, f"{BEST}, train"),
    (VERIFY, WEIGHTS, f"{WEIGHTS}, model.py --download"), (SCORE, NPZ, f"{NPZ}, wanted"),
    (OWN, TABLE, TABLE.name),
]
COLUMNS = [*((DATABASE, column) for column in data.PTBXL_COLUMNS), (STATEMENTS, ""),
           (TABLE, "record")]
FOLDS, PATHS = ["0", "11", "1.5", ""], ["", "/etc/passwd", "records500/../../../secret"]
CELLS = {       # (table, column, what is wanted): bad values
    (DATABASE, "strat_fold", "1 to 10"): FOLDS, (TABLE, "fold", "1 to 10"): FOLDS,
    (DATABASE, "filename_hr", "inside"): PATHS, (TABLE, "record", "inside"): PATHS,
    (DATABASE, "ecg_id", "an id"): [""], (TABLE, "other", "0 or 1"): ["2", "", "-1", "yes", "0.5"],
    (DATABASE, "scp_codes", "scp_statements.csv"): ["{'XYZ': 100.0}"],
    (DATABASE, "scp_codes", "dict"): [
        "['NORM']", "{'NORM': 100.0", "[" * 100_000, "exec('canary')",
        "__import__('os').mkdir('canary')", "{'NORM': __import__('os').mkdir('canary')}",
        "{x: 1 for x in [__import__('os').mkdir('canary')]}"],
}
SPOILED = {     # (script, what the line names): {what it names, too: [what was done]}
    (TRAIN, f"{DATABASE}, fetch"): {
        "row 2": [changed(DATABASE, lambda b: b.replace(b"1_hr\r\n", b"1_hr,1\r\n", 1))],
        "UTF-8": [changed(DATABASE, lambda b: b.replace(b"NORM", b"\xc4"))],
        "rows": [changed(DATABASE, lambda b: b.splitlines(True)[0])],
        "field": [cell("report", "x" * 2**20)],
    },
    (OWN, f"{TABLE}, wanted"): {
        "no class, record, column of 0 and 1": [without_columns(TABLE, "NORM", "other")],
        "a column name twice": [changed(TABLE, lambda b: b.replace(b"other", b"NORM"))],
        "ecg_id 3 appears twice": [cell("ecg_id", "3", table=TABLE)],
        "00006_hr appears twice": [
            cell("record", str(RECORD)[5:].replace("5_", "6_"), table=TABLE)],
        "in fold 9, 9 to validate": [cell("fold", "8", ["9"], TABLE)],
    },
    (TRAIN, "data: no record of all71, wanted folds 1-8 to train"): {
        "in folds 1-8": [cell("strat_fold", "9", "12345678")]},
    (TRAIN._replace(arguments=f"{SHORT} --task rhythm12"), "data: no class, wanted"): {
        "fold 9, positives": [cell("scp_codes", "{'SR': 0.0}", ["9"])]},
    (TRAIN._replace(arguments=f"{SHORT} --preprocess raw --skip-unreadable"), "data: none"): {
        f"{RECORDS} records, .unreadable.csv": [partial(shutil.rmtree, "data/records500")]},
    (Script(post_train, f"{SHORT} --out run"), "run, another --out"): {
        "--resume": [nothing, LAST.unlink]},
    (BUILD, UNREADABLE): {
        f"{DAT}: no such file": [DAT.unlink],
        "lead, --leads": [record(SIGNAL[:11], NAMES[:11])],
        "0 Hz": [changed(HEA, lambda b: b.replace(b"12 500", b"12 0"))],
        "'mmHg', mV": [record(SIGNAL, units="mmHg")],
    },
    (BUILD, CACHE): {"remove": [lambda: CACHE.write_text("mine")]},
    (START, f"{WEIGHTS}, wanted"): {
        f"1 missing (first: {DEEP}); 1 unexpected (first: other)": [
            resaved(WEIGHTS, {DEEP: None, "other": torch.zeros(1)})],
        "missing (first: first_bn.": [resaved(WEIGHTS, {"first_bn.bias": torch.ones(1)})],
        f"{GATE} (3,), wanted (8,)": [resaved(WEIGHTS, {GATE: torch.zeros(3)})],
        f"{GATE} is not finite": [resaved(WEIGHTS, {GATE: torch.full((8,), torch.nan)})],
    },
    (CUT._replace(arguments=f"{CUT.arguments} --leads II"), f"{BEST}"): {
        "has leads I;, wanted II, --leads": [
            resaved(BEST, {STEM: torch.zeros(16, 1, 16)}, leads=["I"])]},
    (START._replace(arguments=f"{START.arguments} --leads I,II,V1"), f"{WEIGHTS}, wanted"): {
        "does not name its 2 leads, --leads": [resaved(WEIGHTS, {STEM: torch.zeros(16, 2, 16)})]},
    (VERIFY, f"{WEIGHTS}, wanted"): {
        f"1 missing (first: {BIAS})": [resaved(WEIGHTS, {BIAS: None})],
        "`state_dict`": [lambda: torch.save([1, 2], WEIGHTS), resaved(WEIGHTS, {STEM: "x"}),
                         lambda: torch.save({"state_dict": {}}, WEIGHTS)],
    },
    (RESUME, "run: holds a run already, another --out"): {"last.pt": [LAST.unlink]},
    (RESUME, f"{LAST}"): {
        "no optimizer, another --out": [partial(shutil.copy, BEST, LAST)],
        "train first": [partial(shutil.copy, WEIGHTS, LAST)],
        "records differ, give the same": [cell("scp_codes", "{'IMI': 100.0}"),
                                          cell("strat_fold", "9")],
    },
    (EVALUATE, f"{BEST}"): {
        "layout 1, train again": [resaved(BEST, layout=1)],
        "70 classes": [resaved(BEST, classes=lambda old: old[1:])],
        "no class in common, all71, wanted": [
            resaved(BEST, classes=lambda old: [name.lower() for name in old])],
        "its classes": [resaved(BEST, classes=7), resaved(BEST, classes=list(range(71)))],
        "its leads": [resaved(BEST, leads=None), resaved(BEST, leads=[1])],
        "train first": [partial(shutil.copy, WEIGHTS, BEST)],
        "`state_dict`": [resaved(BEST, {BIAS: torch.zeros(71).to_sparse()}),
                         resaved(BEST, {BIAS: torch.zeros(71, device="meta")})],
    },
    (EVALUATE, f"{DATABASE}"): {"--data": [lambda: shutil.move("data", "moved")]},
    (Script(evaluate, f"{BEST} --task {TABLE}"), "no class in common, wanted"): {
        f"{TABLE} has AF, {BEST} has 1AVB": [changed(TABLE, lambda b: b.replace(b"NORM", b"AF"))]},
    (Script(evaluate, f"{BEST} --record empty"), "empty: holds no, wanted"): {
        ".hea": [Path("empty").mkdir]},
    (SCORE, f"{NPZ}, wanted"): {
        ".npz": [partial(archive, b"x"), predictions(classes=lambda old: old.astype(object))],
        "'y_prob'": [predictions(y_prob=None)],
        "y_prob, [0, 1]": [predictions(y_prob=lambda p: np.where(p == p[0, 0], np.nan, p)),
                           predictions(y_prob=lambda p: p * 20 - 10)],
        "y_prob, (N, L)": [predictions(y_prob=lambda p: p[1:])],
        "y_true, 0 and 1": [predictions(y_true=lambda y: y * 2)],
        "classes": [predictions(classes=lambda old: [*old[1:], old[1]])],
    },
}
OPTIONS = {     # script: {options: what the line names}
    TRAIN: {
        "--data elsewhere": "elsewhere/ptbxl_database.csv, data.py --download",
        "--task diagnostics44": "'diagnostics44', did you mean diagnostic44, .csv",
        "--leads I,IV": "--leads, 'IV', wanted, aVR", "--leads ''": "--leads, wanted, aVR",
        "--frac 0": "fraction, is 0, 0 < ", "--frac 1.01": "fraction, 1.01, <= 1",
        "--epochs -1": "--epochs, -1, at least 0", "--probe-epochs -1": "--probe-epochs, -1",
        "--epochs 0 --probe-epochs 0": "give one", "--batch-size 0": "--batch-size, 0, at least 1",
        "--lr nan": "--lr, nan, above 0", "--probe-lr 0": "--probe-lr, is 0, above 0",
        "--drop-path 1": "--drop-path, is 1, < 1", "--dropout -0.1": "--dropout, -0.1, 0 <=",
        "--layer-decay 0": "--layer-decay, is 0, 0 <", "--seed -3": "--seed, -3, 0 to 2^32",
        "--device tpu9": "'tpu9', cpu, cuda", "--device cuda:77": "cuda:77, --device cpu",
        "--out weights.pth": "weights.pth, --out", "--out /proc/run": "/proc/run, --out",
    },
    RESUME: {
        "--lr 0.01 --seed 4": "--lr was 0.0005, now 0.01, --seed was 0, now 4, another --out",
        "--task form19 --leads II": "--task, all71, form19, --leads, 'II', another --out",
    },
    BUILD: {
        "--workers 0": "--workers, is 0, at least 1", "--leads X": "--leads, 'X', wanted",
        "--download --url 'http://host/a b'": "http://host/a b, --url",
        f"--data nowhere --task {TABLE}": "nowhere: no such folder, --data",
    },
    VERIFY: {"--download --url http://127.0.0.1:9/x": "127.0.0.1:9, --url"},
    EVALUATE: {
        "--json run/best.pt": "run/best.pt, .json", "--json no/s.json": "no/s.json, folder",
        "--out no/p.npz": "no/p.npz, folder", "--out p.csv": "p.csv, .npz",
        "--fold 11": "--fold 11, 1 to 10", "--fold 1.5": "1.5, or all", "--fold all 9": "all, 10",
        "--task none.csv": "none.csv, wanted", "--device mps": "'mps', cpu, cuda",
        "--record nowhere/1": "nowhere/1, .hea", "--record x --plot ecg.doc": "ecg.doc, .png",
        "--record x --out p.npz": "p.npz, .csv", "--record x --json y.json": "--json, --record",
        "--record data --plot x.png": f"--plot, {RECORDS}, give one",
        "--plot x.png": "--plot, --record", "run/last.pt --out p.npz": "--out, several, leave",
    },
    SCORE: {
        "--skip-unreadable": "--skip-unreadable, leave it out", "--fold 9": "--fold, leave",
        "--record x": "--record, leave", "--out p.npz": "--out, leave",
    },
}


def case(script, words, spoil=nothing, options="", name=""):
    name = f"{script.module.__name__}: {name or options or words}"
    return pytest.param(script, options, spoil, words.split(", "), id=name)


CASES = [
    *(case(script, words, changed(path, damage) if damage else path.unlink, name=f"{path} {kind}")
      for script, path, words in DAMAGED for kind, damage in DAMAGE.items()
      if (path, kind) != (LAST, "missing")),
    *(case(OWN if path == TABLE else TRAIN, f"{path}, {column!r}, wanted",
           without_columns(path, column)) for path, column in COLUMNS),
    *(case(OWN if path == TABLE else TRAIN, f"{path}, row 6, {column}, {value[:40]!r}, {wanted}",
           cell(column, value, table=path))
      for (path, column, wanted), values in CELLS.items() for value in values),
    *(case(script, f"{culprit}, {words}", spoil) for (script, culprit), table in SPOILED.items()
      for words, spoils in table.items() for spoil in spoils),
    *(case(script, words, options=options) for script, table in OPTIONS.items()
      for options, words in table.items()),
]


@pytest.mark.parametrize("script, options, spoil, words", CASES)
def test_bad_input(world, fails, script, options, spoil, words):
    arguments = script.prepare(options)
    spoil()
    before = snapshot()
    line = fails(script.module.main, arguments, *words)
    assert line.startswith(f"{script.module.__name__}.py: ") and len(line) < 600
    assert "Errno" not in line or "urlopen" in line
    told = line.partition(": ")[2]
    assert re.search(r"wanted|fetch|make|remove|train|did you mean|give|name|--\w", told), line
    after = snapshot()
    assert before.items() <= after.items(), "an earlier file was touched"
    left = [path for path in after if re.match(r"\.\d+\.", Path(path).name)]
    assert not left, "a temporary file was left"
    assert not Path("canary").exists(), "scp_codes were run as code"


# -------------------------------------------------------------------------------------- what works

WORKS = [       # (script, options, what is unusual, what is printed)
    (TRAIN, "--batch-size 4096", nothing, "(not 4096)"),
    (TRAIN, "--frac 0.1", nothing, "2 records to train"),
    (CUT, "--task form19", nothing, f"8 records to train and 2 to validate on, batch 8, {BEST}"),
    (CUT, "--leads V1,I", resaved(BEST, layout=1, leads=None), f"{BEST} without 10 of its leads"),
    (START, "", lambda: torch.save(torch.load(WEIGHTS)["state_dict"], WEIGHTS), f", {WEIGHTS}, "),
    (START, "--leads II,V1", resaved(WEIGHTS, {STEM: torch.zeros(16, 2, 16)}), f", {WEIGHTS}, "),
    (RESUME._replace(without=NPZ), "", nothing, "run: this run is finished"),
    (EVALUATE, "", resaved(BEST, classes=lambda old: ["0AVB", *old[1:]]),
     f"classes left out: 1AVB of all71; 0AVB of {BEST}"),
    (SCORE, "", predictions(ecg_id=None, patient_id=None), "2 records "),
]


@pytest.mark.parametrize("script, options, spoil, printed", WORKS)
def test_unusual_input_that_works(world, capsys, script, options, spoil, printed):
    arguments = script.prepare(options)
    spoil()
    script.module.main(arguments)
    assert printed in capsys.readouterr().out


# ----------------------------------------------------------------------------------- hostile files

class Trick:
    """An object whose pickle calls `function(*arguments)` when it is loaded."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def tricks(canary):
    """Ways to make the folder `canary` when a pickle is loaded."""
    canary = str(canary)
    shell, code = f"mkdir {canary}", f"__import__('os').mkdir({canary!r})"
    mkdir = Trick(os.mkdir, canary)
    return [
        mkdir, Trick(os.system, shell), Trick(builtins.eval, code), Trick(builtins.exec, code),
        Trick(getattr, Trick(builtins.__import__, "os"), mkdir),
        Trick(torch.utils.collect_env.run, shell), Trick(np.testing.measure, code),
        np.array([mkdir, None], object)]


def test_the_tricks_work_where_nothing_guards(tmp_path):
    for trick in tricks(tmp_path / "canary"):
        with suppress(Exception):
            pickle.loads(pickle.dumps(trick))
        (tmp_path / "canary").rmdir()


def pickled(value, path):
    path.write_bytes(pickle.dumps(value))


def in_checkpoint(save):
    return lambda trick, path: save({**torch.load(path, weights_only=True), "x": trick}, path)


LEGACY = partial(torch.save, _use_new_zipfile_serialization=False)
HOSTILE = [     # (script, its file, how a trick gets into that)
    *((script, path, in_checkpoint(save)) for save in (torch.save, LEGACY, pickled)
      for script, path in ((VERIFY, WEIGHTS), (START, WEIGHTS), (RESUME, LAST), (EVALUATE, BEST))),
    *((SCORE, NPZ, put) for put in (
        pickled, lambda trick, path: archive(pickle.dumps(trick)),
        lambda trick, path: archive(pickle.dumps(trick), ".npy"),
        lambda trick, path: predictions(y_prob=lambda old: np.array([trick, None], object))())),
]


@pytest.mark.parametrize("script, path, put", HOSTILE)
def test_a_file_that_would_run_code_is_refused(world, tmp_path, fails, script, path, put):
    canary, good = tmp_path / "canary", path.read_bytes()
    for trick in tricks(canary):
        path.write_bytes(good)
        put(trick, path)
        fails(script.module.main, script.prepare(), path.name, "wanted" if path == NPZ else "again")
        assert not canary.exists(), trick


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(name=st.sampled_from([DATABASE, STATEMENTS, TABLE, HEA]), junk=st.binary(max_size=400),
       where=st.floats(0, 1))
def test_fuzzed_tables_and_headers_are_read_or_refused(pristine, tmp_path, name, junk, where):
    for path in (DATABASE, STATEMENTS, TABLE, HEA, DAT):
        shutil.copy(pristine / path, tmp_path)
    spoilt, own, whole = tmp_path / name.name, tmp_path / TABLE, (pristine / name).read_bytes()
    at = int(where * len(whole))
    spoilt.write_bytes(whole[:at] + junk + whole[at + len(junk):])
    try:
        for labels in (data.load_labels(tmp_path, "all71"), data.load_labels(tmp_path, own)):
            assert np.isin(labels.fold, range(1, 11)).all() and np.isin(labels.y, (0, 1)).all()
        assert len(data.read_record(tmp_path / RECORD.name)[0]) == 12
    except data.InputError as error:
        assert spoilt.stem in str(error) and "\n" not in str(error)
