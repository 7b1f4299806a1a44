"""Kills, Ctrl-C, full disks, many processes at once, long use: nothing is lost or half written.

The short version runs with the other tests; `python -m pytest -m campaign tests` is the long one.
"""
import json
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import data
import evaluate
import model as network
import post_train
from helpers import assert_same_run, history
from make_demo import make_demo
from processes import end, start

LONG = pytest.mark.campaign


def arguments(root, out, *more):
    options = ("--task rhythm12 --weights none --probe-epochs 2 --epochs 2 --interpolate "
               "--batch-size 16 --device cpu")
    return ["--data", str(root), "--out", str(out), *options.split(), *more]


def killed(at, folder, *words):
    """Run a script up to the moment `at` of `folder`, 0: to the end, when the names of all are
    written; returns whether it was killed."""
    status, errors = end(*start(*words, moment=(f"{folder}.list", at, str(folder))))
    assert status in (0, -signal.SIGKILL), errors
    return status != 0


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


def temporaries(folder):
    return [p for p in Path(folder).rglob(".*") if p.is_file() and p.name != ".lock"]


# -------------------------------------------------------------------------------------------- kills

@pytest.fixture(scope="module")
def whole_build(tmp_path_factory):
    """A set of three chunks with its undisturbed cache."""
    root = tmp_path_factory.mktemp("records") / "set"
    make_demo(root, records=96)
    assert not killed(0, root, "data.py", "--data", root, "--workers", 1)
    return root


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=LONG)])
def test_cache_killed_at_many_moments(whole_build, tmp_path, workers, kills):
    """Built again, it has the bytes of an undisturbed one."""
    names = json.loads(Path(f"{whole_build}.list").read_text())
    whole = data.find_cache(whole_build)[0]
    moments = {len(names) * i // (kills + 1) for i in range(1, kills + 1)}
    if workers == 1:
        moments |= {names.index(f"os.rename {p.name}") + 1 for p in (whole.plan, whole.part)}
    for k in moments:
        root = Path(shutil.copytree(whole_build, tmp_path / f"at{k}", copy_function=os.link,
                                    ignore=shutil.ignore_patterns("cache")))
        call = (root, "data.py", "--data", root, "--workers", workers)
        assert killed(k, *call)
        check_what_is_left_of_a_build(*data.find_cache(root), whole)
        assert not killed(0, *call)
        assert content(root / "cache") == content(whole_build / "cache")
        shutil.rmtree(root)


def check_what_is_left_of_a_build(left, plan, whole):
    """No half file under its final name, and marks on nothing but whole rows."""
    for path, other in ((left.array, whole.array), (left.plan, whole.plan)):
        assert not path.exists() or path.read_bytes() == other.read_bytes()
    found = left.open(plan, left.part)
    if found:
        signals, marks = found
        assert np.array_equal(signals[marks], np.load(whole.array)[marks])


@pytest.fixture(scope="module")
def undisturbed(demo_set, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert not killed(0, out, "post_train.py", *arguments(demo_set, out))
    return out


def moments_of_training(names, kills):
    """Moments over the whole run, the first of them those that must be."""
    first = {name: names.index(name) + 1 for name in set(names)}
    last = {name: len(names) - names[::-1].index(name) for name in set(names)}
    renamed = [i for i, name in enumerate(names, 1) if name.startswith("os.rename")]
    must = [first["half of probe.pt"], last["half of last.pt"], last["half of best.pt"],
            last["training Sequential"], first["open .lock"], first["training ECGFounder"],
            last["open probe.pt"] + 60, last["inference Block"], *renamed[::5]]
    n = kills - len(must)
    return {*must[:kills], *(len(names) * i // (n + 1) for i in range(1, n + 1))}


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=LONG)])
def test_training_killed_at_many_moments(demo_set, undisturbed, tmp_path, kills):
    """Killed, resumed and killed again early in that, and resumed: equal to the undisturbed run,
    weights bit for bit."""
    names = json.loads(Path(f"{undisturbed}.list").read_text())
    for k in moments_of_training(names, kills):
        out = tmp_path / f"at{k}"
        call = (out, "post_train.py", *arguments(demo_set, out))
        assert killed(k, *call)
        check_what_is_left_of_a_run(out, undisturbed)
        near_its_end = k > len(names) // 2  # little is left to be killed in
        assert killed(1 + k // 3, *call, "--resume") or near_its_end
        check_what_is_left_of_a_run(out, undisturbed)
        assert not killed(0, *call, "--resume")
        assert_same_run(out, undisturbed)
        thresholds = [network.read_checkpoint(run / "best.pt")["thresholds"]
                      for run in (out, undisturbed)]
        np.testing.assert_array_equal(*thresholds)
        assert not temporaries(out)
        shutil.rmtree(out)


def check_what_is_left_of_a_run(out, undisturbed):
    """Whole checkpoints, and the first lines of the undisturbed run's history."""
    for path in out.glob("[a-z]*.pt"):
        network.read_checkpoint(path)
    if (out / "metrics.jsonl").exists():
        lines = history(out)
        assert lines == history(undisturbed)[:len(lines)]


@pytest.mark.parametrize("number, training, kept", [
    (1, False, None), (3, True, ("probe", 2)), (6, False, ("probe", 2)),
    (7, True, ("finetune", 1))], ids=["features", "first step", "validation", "later epoch"])
def test_ctrl_c_ends_the_run_within_a_step(tiny, demo_set, tmp_path, monkeypatch, capsys, number,
                                           training, kept):
    """Pressed during a pass of the network; kept: the epoch of last.pt."""
    passes, forward = [], network.ECGFounder.forward_features

    def interrupted(self, x):
        passes.append(self.training)
        if len(passes) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, x)

    monkeypatch.setattr(network.ECGFounder, "forward_features", interrupted)
    with pytest.raises(SystemExit) as stop:
        post_train.main(arguments(demo_set, tmp_path))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 130 and "--resume" in error and "Traceback" not in error
    assert len(passes) == number and passes[-1] is training and not temporaries(tmp_path)
    last = [network.read_checkpoint(path) for path in tmp_path.glob("last.pt")]
    assert [(c["stage"], c["epoch"]) for c in last] == [kept] * (kept is not None)


# --------------------------------------------------------------------------------------- full disks

def error_where_files_cannot_grow(limit, *words):
    """Run a script where no file can have more than `limit` bytes, as on a full disk."""
    status, errors = end(*start(*words, largest_file=limit))
    lines = [line for line in errors if line and "%|" not in line]
    assert status == 2 and len(lines) == 1 and "make room" in lines[0], errors
    return lines[0]


def test_a_full_disk_keeps_the_checkpoints(demo_set, undisturbed, tmp_path):
    """There is no room for the last.pt of fine-tuning."""
    limit, call = (undisturbed / "last.pt").stat().st_size - 1000, arguments(demo_set, tmp_path)
    error = error_where_files_cannot_grow(limit, "post_train.py", *call)
    assert "last.pt: cannot be written" in error and "--resume" in error
    assert network.read_checkpoint(tmp_path / "last.pt")["stage"] == "probe"
    assert not temporaries(tmp_path)
    status, errors = end(*start("post_train.py", *call, "--resume"))
    assert status == 0, errors
    assert_same_run(tmp_path, undisturbed)


def test_a_full_disk_keeps_earlier_predictions(demo_set, undisturbed, tmp_path):
    out = tmp_path / "predictions.npz"
    out.write_bytes(b"earlier")
    call = (undisturbed / "best.pt", "--data", demo_set, "--out", out)
    assert out.name in error_where_files_cannot_grow(100, "evaluate.py", *call)
    assert content(tmp_path) == {out.name: b"earlier"}


def test_a_disk_that_fills_up_keeps_what_is_cached(demo, demo_set, monkeypatch, fails):
    """It looked large enough, and has room for one chunk."""
    folder, cache = demo / "cache", data.find_cache(demo)[0]
    shutil.rmtree(folder)
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
        fails(data.main, ["--data", demo, "--workers", 1], "no space left", "make room", "again")
        assert np.load(cache.marks).sum() == data.CHUNK and not cache.array.exists()
        subprocess.run(["mount", "-o", "remount,size=20m", str(folder)], check=True)
        data.build_cache(demo, workers=1)
        assert content(folder) == content(demo_set / "cache")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


# --------------------------------------------------------------------------------------------- load

def test_five_processes_on_one_folder(demo, demo_set, undisturbed, tmp_path):
    """Two trainings, two evaluations and a cache build begin at once where there is no cache."""
    shutil.rmtree(demo / "cache")
    calls = [("data.py", "--data", demo)]
    for i in range(2):
        prediction = ("--out", tmp_path / f"p{i}.npz", "--json", tmp_path / f"p{i}.json")
        calls += [("evaluate.py", undisturbed / "best.pt", "--data", demo, *prediction),
                  ("post_train.py", *arguments(demo, tmp_path / f"run{i}"))]
    for started in [start(*call) for call in calls]:
        status, errors = end(*started)
        assert status == 0, errors
    for i in range(2):
        assert_same_run(tmp_path / f"run{i}", undisturbed)
        scores = (tmp_path / f"p{i}.json").read_text()
        assert scores == (undisturbed / "test.json").read_text()
    assert content(demo / "cache") == content(demo_set / "cache")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("n", [12, pytest.param(60, marks=LONG)])
def test_repeated_predictions_keep_their_memory(tiny, demo_set, undisturbed, tmp_path, n):
    """Every fourth draws a picture; one that is kept takes 60 MB. The least of a window leaves out
    buffers that come and go."""
    records, sizes = sorted(demo_set.rglob("*_hr.hea")), []
    for i in range(n):
        picture = ["--plot", tmp_path / "ecg.png"] if i % 4 == 0 else []
        argv = [undisturbed / "best.pt", "--record", records[i % len(records)], *picture]
        evaluate.main([str(word) for word in argv])
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        sizes.append(pages * resource.getpagesize() / 2**20)
    assert min(sizes[-4:]) - min(sizes[4:8]) < 30, sizes
