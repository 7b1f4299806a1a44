"""Kills, Ctrl-C, full disks, many processes at once, long use: nothing is lost or half written.

The short version runs with the other tests; `python -m pytest -m campaign tests` is the long one.
"""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import data
import evaluate
import model as network
import post_train
from helpers import ROOT, TESTS, assert_same_run, history
from make_demo import make_demo

LONG = pytest.mark.campaign
PROCESS = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT,
           "env": {**os.environ, "OMP_NUM_THREADS": "1"}}


def arguments(root, out, *more):
    options = ("--task rhythm12 --weights none --probe-epochs 2 --epochs 2 --interpolate "
               "--batch-size 16 --device cpu")
    return ["--data", str(root), "--out", str(out), *options.split(), *more]


def command(*words):
    """The command line of a script of tests/."""
    return [sys.executable, *map(str, (TESTS / words[0], *words[1:]))]


def at_moment(listing, kill_at, folder, *words):
    """Run a script up to a moment; returns its exit status and what it wrote to stderr, which its
    workers hold open: they have to end, too."""
    call = command("moments.py", listing, kill_at, folder, *words)
    process = subprocess.Popen(call, start_new_session=True, **PROCESS)
    try:
        _, errors = process.communicate(timeout=300)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, errors


def spread(total, n):
    """n moments, evenly between the first and the last."""
    return {1 + round(i * (total - 1) / (n + 1)) for i in range(1, n + 1)}


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


def temporaries(folder):
    return [p for p in Path(folder).rglob(".*") if p.is_file() and p.name != ".lock"]


# -------------------------------------------------------------------------------------------- kills

@pytest.fixture(scope="module")
def whole_build(tmp_path_factory):
    """A set of three chunks, the folder of its undisturbed cache, the names of the moments."""
    folder = tmp_path_factory.mktemp("records")
    make_demo(folder / "set", records=96)
    call = ("data.py", "--data", folder / "set", "--workers", 1)
    status, errors = at_moment(folder / "list", 0, folder, *call)
    assert status == 0, errors
    (folder / "set" / "cache").rename(folder / "cache")
    return folder / "set", folder / "cache", json.loads((folder / "list").read_text())


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=LONG)])
def test_cache_killed_at_many_moments(whole_build, tmp_path, workers, kills):
    """Built again, it has the bytes of an undisturbed one."""
    records, whole, names = whole_build
    cache, moments = data.find_cache(records)[0], spread(len(names), kills)
    if workers == 1:
        moments |= {names.index(f"os.rename {p.name}") + 1 for p in (cache.plan, cache.part)}
    for k in moments:
        root = Path(shutil.copytree(records, tmp_path / f"at{k}", copy_function=os.link))
        call = (root, "data.py", "--data", root, "--workers", workers)
        assert at_moment(tmp_path / "list", k, *call)[0] == -signal.SIGKILL
        check_what_is_left_of_a_build(root, whole)
        status, errors = at_moment(tmp_path / "list", 0, *call)
        assert status == 0 and content(root / "cache") == content(whole), errors
        shutil.rmtree(root)


def check_what_is_left_of_a_build(root, whole):
    """No half file under its final name, and marks on nothing but whole rows."""
    cache = data.find_cache(root)[0]
    for path in filter(Path.exists, (cache.array, cache.plan)):
        assert path.read_bytes() == (whole / path.name).read_bytes()
    found = cache.open((96, 12, 5000), cache.part)
    if found:
        signals, marks = found
        assert np.array_equal(signals[marks], np.load(whole / cache.array.name)[marks])


@pytest.fixture(scope="module")
def whole_run(demo_set, tmp_path_factory):
    """An undisturbed run and the names of its moments."""
    folder = tmp_path_factory.mktemp("whole")
    call = arguments(demo_set, folder / "run")
    status, errors = at_moment(folder / "list", 0, folder / "run", "post_train.py", *call)
    assert status == 0, errors
    return folder / "run", json.loads((folder / "list").read_text())


@pytest.fixture(scope="module")
def undisturbed(whole_run):
    return whole_run[0]


def moments_of_training(names, kills):
    """Moments over the whole run, the first of them those that must be."""
    first = {name: names.index(name) + 1 for name in set(names)}
    last = {name: len(names) - names[::-1].index(name) for name in set(names)}
    renamed = [i for i, name in enumerate(names, 1) if name.startswith("os.rename")]
    must = [first["half of probe.pt"], last["half of last.pt"], last["half of best.pt"],
            last["training Sequential"], first["half of best.pt"], first["open .lock"],
            first["training ECGFounder"], last["training Block"], last["open probe.pt"],
            last["open probe.pt"] + 60, last["inference Block"], renamed[0],
            renamed[len(renamed) // 2], renamed[-1]]
    return {*must[:kills], *spread(len(names), kills - len(must))}


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=LONG)])
def test_training_killed_at_many_moments(demo_set, whole_run, tmp_path, kills):
    """Killed, resumed and killed again early in that, and resumed: equal to the undisturbed run,
    weights bit for bit."""
    undisturbed, names = whole_run
    for k in moments_of_training(names, kills):
        out = tmp_path / f"at{k}"
        call = (out, "post_train.py", *arguments(demo_set, out))
        assert at_moment(tmp_path / "list", k, *call)[0] == -signal.SIGKILL
        check_what_is_left_of_a_run(out, undisturbed)
        status, _ = at_moment(tmp_path / "list", 1 + k // 3, *call, "--resume")
        near_its_end = k > len(names) // 2  # little is left to be killed in
        assert status == -signal.SIGKILL or near_its_end and status == 0
        check_what_is_left_of_a_run(out, undisturbed)
        status, errors = at_moment(tmp_path / "list", 0, *call, "--resume")
        assert status == 0 and not temporaries(out), errors
        assert_same_run(out, undisturbed)
        thresholds = [network.read_checkpoint(run / "best.pt")["thresholds"]
                      for run in (out, undisturbed)]
        np.testing.assert_array_equal(*thresholds)
        shutil.rmtree(out)


def check_what_is_left_of_a_run(out, undisturbed):
    """Whole checkpoints, and the first lines of the undisturbed run's history."""
    for path in out.glob("[a-z]*.pt"):
        network.read_checkpoint(path)
    if (out / "metrics.jsonl").exists():
        lines = history(out)
        assert lines == history(undisturbed)[:len(lines)]


PHASES = {  # by the passes of the network so far, in training or not; and the epoch that is kept
    "features": (lambda passes: passes == [False], None),
    "the first of three steps": (lambda passes: sum(passes) == 1, ("probe", 2)),
    "validation": (lambda passes: passes[-2:] == [True, False], ("probe", 2)),
    "a later epoch": (lambda passes: sum(passes) == 4, ("finetune", 1)),
}


@pytest.mark.parametrize("when, kept", PHASES.values(), ids=PHASES)
def test_ctrl_c_ends_the_run_within_a_step(tiny, demo_set, tmp_path, monkeypatch, capsys, when,
                                           kept):
    passes, sent, forward = [], [], network.ECGFounder.forward_features

    def interrupted(self, x):
        passes.append(self.training)
        if not sent and when(passes):
            sent.append(len(passes))
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, x)

    monkeypatch.setattr(network.ECGFounder, "forward_features", interrupted)
    with pytest.raises(SystemExit) as stop:
        post_train.main(arguments(demo_set, tmp_path))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 130 and "--resume" in error and "Traceback" not in error
    assert sent == [len(passes)] and not temporaries(tmp_path)
    last = [network.read_checkpoint(path) for path in tmp_path.glob("last.pt")]
    assert [(c["stage"], c["epoch"]) for c in last] == [kept] * (kept is not None)


# --------------------------------------------------------------------------------------- full disks

def error_where_files_cannot_grow(limit, *words):
    """Run a script where no file can have more than `limit` bytes, as on a full disk."""
    limited = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    done = subprocess.run(command("tiny.py", *words), preexec_fn=limited, **PROCESS)
    lines = [line for line in done.stderr.splitlines() if line and "%|" not in line]
    assert done.returncode == 2 and len(lines) == 1 and "make room" in lines[0], done.stderr
    return lines[0]


def test_a_full_disk_keeps_the_checkpoints(demo_set, undisturbed, tmp_path):
    """There is no room for the last.pt of fine-tuning."""
    limit, call = (undisturbed / "last.pt").stat().st_size - 1000, arguments(demo_set, tmp_path)
    error = error_where_files_cannot_grow(limit, "post_train.py", *call)
    assert "last.pt: cannot be written" in error and "--resume" in error
    assert network.read_checkpoint(tmp_path / "last.pt")["stage"] == "probe"
    assert not temporaries(tmp_path)
    again = subprocess.run(command("tiny.py", "post_train.py", *call, "--resume"), **PROCESS)
    assert again.returncode == 0, again.stderr
    assert_same_run(tmp_path, undisturbed)


def test_a_full_disk_keeps_earlier_predictions(demo_set, undisturbed, tmp_path):
    out = tmp_path / "predictions.npz"
    out.write_bytes(b"earlier")
    call = (undisturbed / "best.pt", "--data", demo_set, "--out", out)
    assert out.name in error_where_files_cannot_grow(100, "evaluate.py", *call)
    assert content(tmp_path) == {out.name: b"earlier"}


def test_a_disk_that_others_fill_keeps_what_is_cached(demo, demo_set, monkeypatch, fails):
    """It fills while the second chunk is read."""
    folder, load_windows, read = demo / "cache", data.load_windows, []
    shutil.rmtree(folder)
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")

    def load(*details):
        read.append(details)
        if len(read) == 40:
            with pytest.raises(OSError), open(folder / "filler", "wb", 0) as f:
                while True:
                    f.write(bytes(2**16))
        return load_windows(*details)

    monkeypatch.setattr(data, "load_windows", load)
    try:
        fails(data.main, ["--data", demo, "--workers", 1], "no space left", "make room", "again")
        assert len(read) == 60 and not data.find_cache(demo)[0].array.exists()
        (folder / "filler").unlink()
        data.build_cache(demo, workers=1)
        assert len(read) == 60 + 28 and content(folder) == content(demo_set / "cache")
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
    for process in [subprocess.Popen(command("tiny.py", *call), **PROCESS) for call in calls]:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    for i in range(2):
        assert_same_run(tmp_path / f"run{i}", undisturbed)
        scores = (tmp_path / f"p{i}.json").read_text()
        assert scores == (undisturbed / "test.json").read_text()
    assert content(demo / "cache") == content(demo_set / "cache")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("n", [16, pytest.param(200, marks=LONG)])
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
