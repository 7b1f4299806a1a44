"""Bad input ends with status 2 and one line that names the culprit and the remedy, and leaves
earlier files alone; unusual input works; hostile files run no code; properties of any input."""
import ast
import builtins
import os
import pickle
import re
import shlex
import shutil
import zipfile
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
RECORD = Path("data/records500/00000/00005_hr")  # the one that is spoilt, in row 6 of the table
HEA, DAT = RECORD.with_suffix(".hea"), RECORD.with_suffix(".dat")
WEIGHTS, BEST, LAST = Path("weights.pth"), Path("run/best.pt"), Path("run/last.pt")
NPZ, TEST, CACHE = Path("run/predictions.npz"), Path("run/test.json"), Path("data/cache")
STEM, BIAS = "first_conv.conv.bias", "dense.bias"
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
TRAIN, START = Script(post_train, SHORT), Script(post_train, f"{SHORT} --weights {WEIGHTS}")
FINISHED = Script(post_train, f"{SHORT} --out run --resume")
RESUME = FINISHED._replace(without=TEST)
BUILD, VERIFY = Script(data, "--data data", CACHE), Script(network, f"--weights {WEIGHTS}")
EVALUATE, SCORE = Script(evaluate, f"{BEST}"), Script(evaluate, f"{NPZ}")


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    """Data with its cache, a finished run and its predictions, and weights."""
    root = tmp_path_factory.mktemp("world")
    make_demo(root / "data", records=RECORDS)
    with pytest.MonkeyPatch.context() as m:
        small.shrink(m.setattr)
        m.chdir(root)
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


def folder(path):
    path.unlink()
    path.mkdir()


def cell(column, value, folds=()):
    """Another value of a column in row 6 of the table, or in the rows of some folds."""
    def change(rows):
        for row in [r for r in rows if int(r["strat_fold"]) in folds] or [rows[4]]:
            row[column] = value
    return lambda: edit_csv(DATABASE, change)


def without_column(path, column):
    return lambda: edit_csv(path, lambda rows: [row.pop(column) for row in rows])


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
        with np.load(NPZ) as z:
            arrays = {key: z[key] for key in z.files if changes.get(key, nothing) is not None}
        for key in changes.keys() & arrays.keys():
            arrays[key] = changes[key](arrays[key])
        np.savez(NPZ, **arrays)
    return put


def archive(content, end=""):
    with zipfile.ZipFile(NPZ, "w") as z:
        for name in ("y_true", "y_prob", "classes"):
            z.writestr(name + end, content)


DAMAGE = {
    "missing": Path.unlink, "a folder": folder, "empty": lambda path: path.write_bytes(b""),
    "HTML": lambda path: path.write_bytes(b"<!DOCTYPE html><html>404</html>"),
    "random bytes": lambda path: path.write_bytes(bytes(range(256)) * 40),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:path.stat().st_size // 2]),
}
UNREADABLE = f"{RECORD}, --skip-unreadable"
DAMAGED = [     # (script, file, what the line names)
    (TRAIN, DATABASE, f"fetch, {DATABASE}"), (TRAIN, STATEMENTS, f"fetch, {STATEMENTS.name}"),
    (BUILD, DAT, UNREADABLE), (BUILD, HEA, UNREADABLE), (RESUME, LAST, f"{LAST}, again"),
    (START, WEIGHTS, f"{WEIGHTS}, model.py --download"), (EVALUATE, BEST, f"{BEST}, train"),
    (VERIFY, WEIGHTS, f"{WEIGHTS}, model.py --download"), (SCORE, NPZ, f"{NPZ}, wanted"),
]
COLUMNS = {DATABASE: ["ecg_id", "patient_id", "scp_codes", "strat_fold", "filename_hr"],
           STATEMENTS: [""]}
CELLS = {       # (column, what is wanted): bad values
    ("ecg_id", "whole"): ["x7", "inf"], ("patient_id", "whole"): ["Smith"],
    ("strat_fold", "whole"): ["1.5", ""], ("strat_fold", "1 to 10"): ["0", "11"],
    ("filename_hr", "inside"): ["", "/etc/passwd", "records500/../../../secret"],
    ("scp_codes", "scp_statements.csv"): ["{'XYZ': 100.0}"],
    ("scp_codes", "dict"): [
        "['NORM']", "{'NORM': 100.0", "[" * 100_000, "__import__('os').mkdir('canary')",
        "{'NORM': __import__('os').mkdir('canary')}", "{**__import__('os').environ}",
        "{x: 1 for x in [__import__('os').mkdir('canary')]}", "exec('canary')",
        "{'NORM': 1}; __import__('os').mkdir('canary')"],
}
SPOILED = {     # (script, what the line names): {what it names, too: [what was done]}
    (TRAIN, f"{DATABASE}, fetch"): {
        "row 2": [changed(DATABASE, lambda b: b[:b.index(b'"{') + 9]),
                  changed(DATABASE, lambda b: b.replace(b"1_hr\r\n", b"1_hr,1\r\n", 1))],
        "UTF-8": [changed(DATABASE, lambda b: b.decode().encode("utf-16")),
                  changed(DATABASE, lambda b: b.replace(b"NORM", b"\xc4"))],
        "rows": [changed(DATABASE, lambda b: b.splitlines(True)[0])],
        "field": [cell("report", "x" * 2**20)],
        "ecg_id 3": [cell("ecg_id", "3")],
    },
    (TRAIN, "data, all71, ten folds"): {
        "folds 1-8": [cell("strat_fold", 9, range(1, 9))],
        "fold 9": [cell("strat_fold", 8, [9])],
        "fold 10": [cell("strat_fold", 8, [10])],
    },
    (TRAIN._replace(arguments=f"{SHORT} --out run"), "run, another --out"): {
        "--resume": [nothing, LAST.unlink]},
    (BUILD, UNREADABLE): {
        "wanted": [changed(DAT, lambda b: b[:-1])],
        "lead": [record(SIGNAL[:11], NAMES[:11]),
                 changed(HEA, lambda b: re.sub(rb" 0 \w+\n", b"\n", b))],
        "0 Hz": [changed(HEA, lambda b: b.replace(b"12 500", b"12 0"))],
        "0.01 Hz": [changed(HEA, lambda b: b.replace(b"12 500", b"12 0.01"))],
        "0.1 s": [record(np.ones((12, 50)))],
        "'mmHg', mV": [record(SIGNAL, units="mmHg")],
        "10000 mV": [record(np.full((12, 5000), 100.0), units="V", gain=100)],
    },
    (BUILD, CACHE): {"remove": [lambda: CACHE.write_text("mine")]},
    (START, f"{WEIGHTS}, wanted"): {
        f"missing (first: {STEM}), unexpected (first: bias)": [
            lambda: torch.save({"state_dict": torch.nn.Linear(3, 2).state_dict()}, WEIGHTS)],
        f"missing (first: {STEM}), unexpected (first: offset)": [
            resaved(WEIGHTS, {STEM: None, "offset": torch.zeros(16)})],
        "first_conv.conv.weight (16, 1, 16), (16, 12, 16), 12 leads": [
            resaved(WEIGHTS, {"first_conv.conv.weight": torch.zeros(16, 1, 16)})],
        STEM: [resaved(WEIGHTS, {STEM: torch.full((16,), torch.nan)})],
        "`state_dict`": [lambda: torch.save({"model": {}}, WEIGHTS)],
    },
    (VERIFY, f"{WEIGHTS}, wanted"): {
        "`state_dict`": [lambda: torch.save([1, 2], WEIGHTS), resaved(WEIGHTS, {STEM: "x"})],
        "dense.weight": [resaved(WEIGHTS, {"dense.weight": None})],
        BIAS: [resaved(WEIGHTS, {BIAS: None})],
    },
    (RESUME, LAST): {
        "another --out": [partial(shutil.copy, BEST, LAST)],
        "train first": [partial(shutil.copy, WEIGHTS, LAST)],
    },
    (EVALUATE, BEST): {
        "layout 99, train again": [resaved(BEST, layout=99)],
        "70 classes": [resaved(BEST, classes=lambda old: old[1:])],
        "0AVB, data": [resaved(BEST, classes=lambda old: ["0AVB", *old[1:]])],
        "order, data": [resaved(BEST, classes=lambda old: old[::-1])],
        "classes": [resaved(BEST, classes=7), resaved(BEST, classes=list(range(71)))],
        "train first": [partial(shutil.copy, WEIGHTS, BEST)],
        "unexpected (first: 7)": [resaved(BEST, {7: torch.zeros(1)})],
        "`state_dict`": [resaved(BEST, {BIAS: torch.zeros(71).to_sparse()}),
                         resaved(BEST, {BIAS: torch.zeros(71, device="meta")})],
    },
    (EVALUATE, "one of"): {"'wavelet', filter": [resaved(BEST, preprocessing="wavelet")],
                           "'all72', did you mean all71": [resaved(BEST, task="all72")]},
    (EVALUATE, DATABASE): {"--data": [lambda: shutil.move("data", "moved")]},
    (SCORE, f"{NPZ}, wanted"): {
        ".npz": [partial(archive, b"x"), predictions(classes=lambda old: old.astype(object))],
        "'y_prob'": [predictions(y_prob=None)],
        "y_prob, [0, 1]": [predictions(y_prob=lambda p: np.where(p == p[0, 0], np.nan, p)),
                           predictions(y_prob=lambda p: p * 20 - 10)],
        "y_prob, (N, L)": [predictions(y_prob=lambda p: p[1:]),
                           predictions(y_prob=np.ravel, y_true=np.ravel),
                           predictions(y_prob=lambda p: p[:0], y_true=lambda y: y[:0]),
                           predictions(y_prob=lambda p: p.astype(str))],
        "y_true, 0 and 1": [predictions(y_true=lambda y: y * 2)],
        "classes": [predictions(classes=lambda old: [*old[1:], old[1]])],
        "patient_id, (N": [predictions(patient_id=lambda i: i[1:])],
        "ecg_id": [predictions(ecg_id=lambda i: np.zeros(len(i), [("a", int, 2)]))],
    },
    (Script(evaluate, f"{NPZ} {NPZ}"), "run, wanted"): {
        "ecg_id, nan": [predictions(ecg_id=lambda i: np.where(i == i[0], np.nan, i))]},
}
OPTIONS = {     # script: {options: what the line names}
    TRAIN: {
        "--data elsewhere": "elsewhere/ptbxl_database.csv, data.py --download",
        "--task diagnostics44": "'diagnostics44', did you mean diagnostic44",
        "--frac 0": "fraction, is 0, 0 < ", "--frac -0.1": "fraction, -0.1, 0 < ",
        "--frac 1.01": "fraction, 1.01, <= 1", "--frac nan": "fraction, nan, 0 < ",
        "--epochs -1": "--epochs, -1, at least 0", "--epochs 0 --probe-epochs 0": "give one",
        "--batch-size 0": "--batch-size, is 0, at least 1", "--lr nan": "--lr, nan, above 0",
        "--probe-lr 0": "--probe-lr, is 0, above 0", "--drop-path 1": "--drop-path, is 1, < 1",
        "--dropout -0.1": "--dropout, -0.1, 0 <=", "--layer-decay 0": "--layer-decay, is 0, 0 <",
        "--seed -3": "--seed, -3, 0 to 2^32", "--device tpu9": "'tpu9', cpu, cuda",
        "--device cuda:77": "cuda:77, --device cpu", "--out weights.pth": "weights.pth, --out",
        "--out weights.pth/run": "weights.pth/run, --out", "--out /proc/run": "/proc/run, --out",
    },
    RESUME: {
        "--lr 0.01 --seed 4": "--lr, 0.0005, 0.01, --seed, 4, another --out",
        "--task form19": "--task, all71, form19, another --out",
    },
    BUILD: {
        "--workers 0": "--workers, is 0, at least 1",
        "--download --url 'http://host/a b'": "http://host/a b, --url",
        "--download --url http://127.0.0.1:9/x": "127.0.0.1:9, --url",
    },
    VERIFY: {"--download --url http://127.0.0.1:9/x": "127.0.0.1:9, --url"},
    EVALUATE: {
        "--json run/best.pt": "run/best.pt, overwritten, another file",
        "run/predictions.npz": "run/predictions.npz, overwritten, --out",
        "run/last.pt": "run/predictions.npz, overwritten, --out",
        "--json data": "data:, wanted a file", "--out run": "run:, wanted a file",
        "--json no/s.json": "no/s.json, folder", "--out no/p.npz": "no/p.npz, folder",
        "--fold 11": "fold 11, --fold", "--batch-size 0": "--batch-size, is 0, at least 1",
        "--device mps": "'mps', cpu, cuda", "--device cuda:77": "cuda:77, --device cpu",
        "--record nowhere/1": "nowhere/1, .hea", "--record x --plot ecg.doc": "ecg.doc, .png",
        "--record x --json y": "--json, --record, leave it out", "--plot x.png": "--plot, --record",
    },
    SCORE: {"--skip-unreadable": "--skip-unreadable, leave it out", "--fold 9": "--fold, leave"},
}


def case(script, words, spoil=nothing, options="", name=""):
    name = f"{script.module.__name__}: {name or options or words}"
    return pytest.param(script, options, spoil, words.split(", "), id=name)


CASES = [
    *(case(script, words, partial(damage, path), name=f"{path.name} {kind}")
      for script, path, words in DAMAGED for kind, damage in DAMAGE.items()
      if (path, kind) != (LAST, "missing")),  # as then --resume starts anew
    *(case(TRAIN, f"{path}, {column!r}, --download", without_column(path, column))
      for path, columns in COLUMNS.items() for column in columns),
    *(case(TRAIN, f"{DATABASE}, row 6, {column}, {value[:40]!r}, {wanted}", cell(column, value))
      for (column, wanted), values in CELLS.items() for value in values),
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
    assert re.search(r"wanted|fetch|make|remove|train|did you mean|give|name|--\w", line), line
    after = snapshot()
    assert before.items() <= after.items(), "an earlier file was touched"
    left = [path for path in after if re.match(r"\.\d+\.", Path(path).name)]
    assert not left, "a temporary file was left"
    assert not Path("canary").exists(), "scp_codes were run as code"


# -------------------------------------------------------------------------------------- what works

def crlf_and_bom():
    for path in (DATABASE, STATEMENTS):
        lines = path.read_bytes().splitlines()
        path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines) + b"\r\n")


ORDER = [7, 3, 11, 0, 5, 9, 1, 10, 2, 8, 4, 6]
SAME_SIGNAL = {
    "15 leads": record(np.vstack([SIGNAL, SIGNAL[:3]]), [*NAMES, "vx", "vy", "vz"]),
    "other order and case": record(SIGNAL[ORDER], [NAMES[i].lower() for i in ORDER]),
    "unit uV": record(SIGNAL * 1000, units="uV", gain=1),
}
WORKS = [       # (script, options, what is unusual, what is printed)
    *((BUILD, "", spoil, f"{RECORDS} records") for spoil in (
        *SAME_SIGNAL.values(), record(np.zeros((12, 5000))), record(SIGNAL[:, :1000], fs=100),
        record(np.hstack([SIGNAL, SIGNAL]), fs=1000), changed(DAT, lambda b: b + b"12"),
        record(np.where(np.arange(5000) % 50 == 7, np.nan, SIGNAL)))),
    (BUILD, "--skip-unreadable", DAT.unlink, f"{RECORDS - 1} records"),
    (TRAIN, "", crlf_and_bom, "test fold 10"),
    (TRAIN, "", cell("patient_id", ""), "test fold 10"),
    (TRAIN, "--task rhythm12", cell("scp_codes", "{'SR': 0.0}", [9]), "AUROC -"),
    (TRAIN, "--batch-size 4096", nothing, "(not 4096)"),
    (TRAIN, "--frac 0.1", nothing, "2 records to train"),
    (TRAIN, "--resume", nothing, "test fold 10"),
    (TRAIN, f"--weights {BEST} --task form19", nothing, "test fold 10"),
    (START, "", resaved(WEIGHTS, {"dense.weight": None, BIAS: None}), "test fold 10"),
    (START, "", lambda: torch.save(torch.load(WEIGHTS)["state_dict"], WEIGHTS), "test fold 10"),
    (FINISHED, "", nothing, "finished"),
    (EVALUATE, "", nothing, "undefined here, not counted: "),
    (SCORE, "", predictions(ecg_id=None, patient_id=None), "macro AUROC"),
    (SCORE, "", predictions(classes=lambda old: old.astype("S")), "NORM  "),
    (SCORE, "", predictions(y_true=lambda old: old.astype(bool),
                            y_prob=lambda old: old.astype(np.float16)), "macro AUROC"),
]


@pytest.mark.parametrize("script, options, spoil, printed", WORKS)
def test_unusual_input_that_works(world, capsys, script, options, spoil, printed):
    arguments = script.prepare(options)
    spoil()
    script.module.main(arguments)
    assert printed in capsys.readouterr().out


@pytest.mark.parametrize("name", SAME_SIGNAL)
def test_other_leads_order_case_and_unit_change_nothing(world, name):
    SAME_SIGNAL[name]()
    np.testing.assert_allclose(data.read_record(RECORD)[0], SIGNAL, atol=6e-4)


# ----------------------------------------------------------------------------------- hostile files

class Trick:
    """An object whose pickle calls `function(*arguments)` when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


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


FORMS = {
    "zip": torch.save,
    "legacy": partial(torch.save, _use_new_zipfile_serialization=False),
    "pickle": lambda value, path: path.write_bytes(pickle.dumps(value)),
}


def test_the_tricks_work_where_nothing_guards(tmp_path):
    for i, trick in enumerate(tricks(tmp_path / "canary")):
        try:
            pickle.loads(pickle.dumps(trick))
        except Exception:
            pass
        (tmp_path / "canary").rmdir()


@pytest.mark.parametrize("save", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("script, path", [
    (VERIFY, WEIGHTS), (START, WEIGHTS), (RESUME, LAST), (EVALUATE, BEST)],
    ids=["model --weights", "post_train --weights", "post_train --resume", "evaluate"])
def test_a_checkpoint_that_would_run_code_is_refused(world, tmp_path, fails, script, path, save):
    good, canary = torch.load(path, weights_only=True), tmp_path / "canary"
    for trick in tricks(canary):
        path.unlink()
        save({**good, "val_auroc": trick}, path)
        fails(script.module.main, script.prepare(), path.name, "again")
        assert not canary.exists(), trick


@pytest.mark.parametrize("place", [
    lambda value: predictions(y_prob=lambda old: value)(),
    lambda value: predictions(classes=lambda old: value)(),
    lambda value: NPZ.write_bytes(pickle.dumps(value)),
    lambda value: archive(pickle.dumps(value)),
    lambda value: archive(pickle.dumps(value), ".npy"),
], ids=["y_prob", "classes", "the archive", "its members", "its arrays"])
def test_predictions_that_would_run_code_are_refused(world, tmp_path, fails, place):
    canary, good = tmp_path / "canary", NPZ.read_bytes()
    for trick in tricks(canary):
        NPZ.write_bytes(good)
        place(np.array([trick, None], object))
        fails(evaluate.main, SCORE.prepare(), NPZ, "wanted")
        assert not canary.exists(), trick


# -------------------------------------------------------------------------------------- properties

PATIENT = settings(suppress_health_check=[
    HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
# Python 3.10 neither writes nor reads a zero byte as csv; the fuzzed bytes below hold some.
TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=20)
CELL = st.one_of(
    TEXT, st.integers().map(str), st.floats().map(str),
    st.sampled_from(["", "1", "10", "1e400", "{'NORM': 1}", "{'NORM': [[]]}", "{()}"]),
    st.dictionaries(st.one_of(TEXT, st.just("NORM")), st.floats(), max_size=2).map(str))


@PATIENT
@given(st.dictionaries(st.sampled_from([*COLUMNS[DATABASE], "report"]), CELL, min_size=1),
       st.sampled_from(list(data.TASKS)))
def test_a_fuzzed_row_is_read_or_refused(pristine, tmp_path, cells, task):
    path = tmp_path / DATABASE.name
    shutil.copy(pristine / DATABASE, path)
    shutil.copy(pristine / STATEMENTS, tmp_path)
    edit_csv(path, lambda rows: rows[2].update(cells))
    try:
        labels = data.load_labels(tmp_path, task)
        data.plan_cache(tmp_path, "filter")
    except data.InputError as error:
        assert str(error).count("\n") == 0 and str(path) in str(error)
        return
    # What was accepted means something.
    rows, ids = data.read_database(tmp_path)
    assert ((1 <= labels.fold) & (labels.fold <= 10)).all() and labels.y.any(1).all()
    there = np.sum(labels.ecg_id == ids[2])
    assert there <= 1
    if "class" not in task:  # the classes are the statements
        assert there == any(c in ast.literal_eval(rows[2]["scp_codes"]) for c in labels.classes)


def check_record(path):
    signal, fs = data.read_record(path.with_suffix(""))
    assert signal.shape[0] == 12 and signal.dtype == np.float32 and fs > 0


@pytest.mark.parametrize("name, read", [
    (DATABASE, lambda path: data.load_labels(path.parent, "all71")),
    (HEA, check_record), (WEIGHTS, network.read_checkpoint), (NPZ, evaluate.load_predictions)],
    ids=lambda value: getattr(value, "name", ""))
@PATIENT
@given(junk=st.binary(max_size=400), where=st.floats(0, 1))
def test_fuzzed_bytes_are_read_or_refused(pristine, tmp_path, name, read, junk, where):
    whole = (pristine / name).read_bytes()
    at, path = int(where * len(whole)), tmp_path / name.name
    path.write_bytes(whole[:at] + junk + whole[at + len(junk):])
    for other in (STATEMENTS, DAT):
        shutil.copy(pristine / other, tmp_path)
    try:
        read(path)
    except (data.InputError, network.WeightsError) as error:
        assert str(path.with_suffix("")) in str(error)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), samples=st.integers(201, 7000), missing=st.floats(0, 1),
       size=st.sampled_from([1e-12, 1e-3, 1, 100, 1e4]), how=st.sampled_from(data.PREPROCESSING),
       fs=st.sampled_from([500, 499.5, 400]))
def test_preprocessing_gives_finite_signals_of_one_shape(seed, samples, size, missing, how, fs):
    rng = np.random.default_rng(seed)
    absent = rng.random((12, samples)) < missing
    x = np.where(absent, np.nan, rng.uniform(-size, size, (12, samples)))
    out = data.preprocess(x, fs, how)
    assert out.shape == (12, 5000) and out.dtype == np.float32
    assert np.isfinite(out.astype(np.float16)).all()
