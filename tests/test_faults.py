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
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch

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
def test_cache_killed_at_many_moments(whole_build, tmp_path, workers, kills, record_property):
    """No half file under its final name, marks on nothing but whole rows; built again, the bytes
    are those of an undisturbed build."""
    records, whole, names = whole_build
    moments, cache = spread(len(names), kills), data.find_cache(records)[0]
    if workers == 1:
        moments |= {names.index(f"os.rename {p.name}") + 1 for p in (cache.plan, cache.part)}
    for k in moments:
        root = Path(shutil.copytree(records, tmp_path / f"at{k}", copy_function=os.link))
        call = (root, "data.py", "--data", root, "--workers", workers)
        assert at_moment(tmp_path / "list", k, *call)[0] == -signal.SIGKILL
        left, cache = content(root / "cache"), data.find_cache(root)[0]
        for path in (cache.array, cache.plan):
            assert left.get(path.name, b"") in (b"", (whole / path.name).read_bytes())
        found = cache.open((96, 12, 5000), cache.part)
        if found:
            signals, marks = found
            np.testing.assert_array_equal(signals[marks], np.load(whole / cache.array.name)[marks])
        status, errors = at_moment(tmp_path / "list", 0, *call)
        assert status == 0 and content(root / "cache") == content(whole), errors
        shutil.rmtree(root)
    record_property("kills", len(moments))


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
    """Moments over the whole run, among them all that must be."""
    first = {name: names.index(name) + 1 for name in set(names)}
    last = {name: len(names) - names[::-1].index(name) for name in set(names)}
    renamed = [i for i, name in enumerate(names, 1) if name.startswith("os.rename")]
    interpolation = last["open probe.pt"]
    must = [last["training Sequential"], first["half of best.pt"], first["half of probe.pt"],
            first["open .lock"], last["half of last.pt"], first["training ECGFounder"],
            last["training Block"], interpolation, last["half of best.pt"], interpolation + 60,
            last["inference Block"], renamed[0], renamed[len(renamed) // 2], renamed[-1]]
    return {*must[::4]} if kills < len(must) else {*must, *spread(len(names), kills - len(must))}


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=LONG)])
def test_training_killed_at_many_moments(demo_set, whole_run, tmp_path, kills, record_property):
    """Killed, resumed and killed again early in that, and resumed: equal to the undisturbed run,
    weights bit for bit."""
    undisturbed, names = whole_run
    moments = moments_of_training(names, kills)
    thresholds = network.read_checkpoint(undisturbed / "best.pt")["thresholds"]
    for k in moments:
        out = tmp_path / f"at{k}"
        call = (out, "post_train.py", *arguments(demo_set, out))
        assert at_moment(tmp_path / "list", k, *call)[0] == -signal.SIGKILL
        check_what_is_left_of_a_run(out, undisturbed)
        status, _ = at_moment(tmp_path / "list", 1 + k // 3, *call, "--resume")
        near_its_end = k > len(names) // 2  # little is left to be killed in
        assert status == -signal.SIGKILL or near_its_end and status == 0
        check_what_is_left_of_a_run(out, undisturbed)
        status, errors = at_moment(tmp_path / "list", 0, *call, "--resume")
        assert status == 0, errors
        assert_same_run(out, undisturbed)
        found = network.read_checkpoint(out / "best.pt")["thresholds"]
        np.testing.assert_array_equal(found, thresholds)
        assert not temporaries(out)
        shutil.rmtree(out)
    assert len(moments) >= kills
    record_property("kills", 2 * len(moments))


def check_what_is_left_of_a_run(out, undisturbed):
    """Whole checkpoints, and the first lines of the undisturbed run's history."""
    for path in out.glob("[a-z]*.pt"):
        network.read_checkpoint(path)
    if (out / "metrics.jsonl").exists():
        lines = history(out)
        assert lines == history(undisturbed)[:len(lines)]


PHASES = {  # by the passes of the network so far: was it in training? An epoch has three steps.
    "features": (lambda passes: passes == [False], None),
    "the first step": (lambda passes: sum(passes) == 1, ("probe", 2)),
    "validation": (lambda passes: passes[-2:] == [True, False], ("probe", 2)),
    "a later epoch": (lambda passes: sum(passes) == 4, ("finetune", 1)),
}


@pytest.mark.parametrize("during, done", PHASES.values(), ids=PHASES)
def test_ctrl_c_ends_the_run_within_a_step(tiny, demo_set, tmp_path, monkeypatch, capsys, during,
                                           done):
    """done: the epoch that last.pt keeps."""
    passes, sent, forward = [], [], network.ECGFounder.forward_features

    def interrupted(self, x):
        passes.append(self.training)
        if not sent and during(passes):
            sent.append(len(passes))
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, x)

    monkeypatch.setattr(network.ECGFounder, "forward_features", interrupted)
    with pytest.raises(SystemExit) as stop:
        post_train.main(arguments(demo_set, tmp_path / "run"))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 130 and "--resume" in error and "Traceback" not in error
    assert sent == [len(passes)] and not temporaries(tmp_path / "run")
    last = tmp_path / "run" / "last.pt"
    kept = network.read_checkpoint(last) if done else {}
    assert last.exists() == bool(done) and (not done or (kept["stage"], kept["epoch"]) == done)


# --------------------------------------------------------------------------------------- full disks

@contextmanager
def small_disk(folder, size):
    """A file system of `size` bytes at `folder`, where mounting is allowed."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_where_files_cannot_grow_the_checkpoints_are_kept(demo_set, undisturbed, tmp_path):
    """As on a full disk: there is no room for the last.pt of fine-tuning."""
    limit, out = (undisturbed / "last.pt").stat().st_size - 1000, tmp_path / "run"
    call = command("tiny.py", "post_train.py", *arguments(demo_set, out))
    limited = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    done = subprocess.run(call, preexec_fn=limited, **PROCESS)
    lines = [line for line in done.stderr.splitlines() if line and "%|" not in line]
    assert done.returncode == 2 and len(lines) == 1
    assert all(word in lines[0] for word in ("last.pt", "cannot be written", "room", "--resume"))
    assert network.read_checkpoint(out / "last.pt")["stage"] == "probe" and not temporaries(out)
    check_what_is_left_of_a_run(out, undisturbed)
    assert subprocess.run([*call, "--resume"], **PROCESS).returncode == 0
    assert_same_run(out, undisturbed)


def test_a_disk_that_others_fill_keeps_what_is_cached(demo, demo_set, monkeypatch, fails):
    """It fills while the second chunk is read."""
    shutil.rmtree(demo / "cache")
    load_windows, filler, read = data.load_windows, demo / "cache" / "filler", []

    def load(*details):
        read.append(details)
        if len(read) == 40:
            with pytest.raises(OSError), open(filler, "wb", 0) as f:
                while True:
                    f.write(bytes(2**16))
        return load_windows(*details)

    monkeypatch.setattr(data, "load_windows", load)
    with small_disk(demo / "cache", 2**23):
        words = ("no space left", "make room", "run the same command again")
        fails(data.main, ["--data", demo, "--workers", 1], *words)
        assert len(read) == 60 and not data.find_cache(demo)[0].array.exists()
        filler.unlink()
        data.build_cache(demo, workers=1)
        assert len(read) == 60 + 28 and content(demo / "cache") == content(demo_set / "cache")


def test_a_full_disk_keeps_earlier_predictions(tiny, demo_set, undisturbed, tmp_path, fails):
    disk = tmp_path / "disk"
    with small_disk(disk, (undisturbed / "best.pt").stat().st_size + 8192):
        shutil.copy(undisturbed / "best.pt", disk)
        out = disk / "predictions.npz"
        out.write_bytes(b"earlier")
        argv = [disk / "best.pt", "--data", demo_set, "--fold", "all", "--out", out]
        fails(evaluate.main, argv, out.name, "no space left", "make room")
        assert out.read_bytes() == b"earlier" and not temporaries(disk)


# --------------------------------------------------------------------------------------------- load

def test_five_processes_on_one_folder(demo, demo_set, undisturbed, tmp_path):
    """Two trainings, two evaluations and a cache build begin at once where there is no cache."""
    shutil.rmtree(demo / "cache")
    calls = [command("tiny.py", "data.py", "--data", demo)]
    for i in range(2):
        argv = (undisturbed / "best.pt", "--data", demo, "--out", tmp_path / f"p{i}.npz")
        calls.append(command("tiny.py", "evaluate.py", *argv))
        argv = arguments(demo, tmp_path / f"run{i}")
        calls.append(command("tiny.py", "post_train.py", *argv))
    for process in [subprocess.Popen(call, **PROCESS) for call in calls]:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    for i in range(2):
        assert_same_run(tmp_path / f"run{i}", undisturbed)
        p = evaluate.load_predictions(tmp_path / f"p{i}.npz")
        scores = evaluate.score(p["y_true"], p["y_prob"], p["patient_id"])
        result = evaluate.report(scores, p["y_true"], p["classes"].tolist())
        assert result == json.loads((undisturbed / "test.json").read_text())
    assert content(demo / "cache") == content(demo_set / "cache")


def memory_of_predictions(checkpoint, records, n, plots, tmp_path):
    """Memory in MB after each of n predictions, every `plots`th of which draws a picture."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("memory is read from /proc")
    sizes = []
    for i in range(n):
        argv = [checkpoint, "--record", records[i % len(records)], "--device", "cpu"]
        if i % plots == 0:
            argv += ["--plot", tmp_path / "ecg.png"]
        evaluate.main(list(map(str, argv)))
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        sizes.append(pages * resource.getpagesize() / 2**20)
    return sizes


def test_repeated_predictions_keep_their_memory(tiny, demo_set, undisturbed, tmp_path):
    """Two pictures between the windows; one that is kept takes 60 MB. The least of a window leaves
    out buffers that come and go."""
    records = sorted(demo_set.rglob("*_hr.hea"))
    sizes = memory_of_predictions(undisturbed / "best.pt", records, 16, 4, tmp_path)
    assert min(sizes[12:]) - min(sizes[4:8]) < 30, sizes


@LONG
@pytest.mark.real
def test_200_predictions_on_real_records_keep_their_memory(real, tmp_path, record_property):
    """The whole network, random real records."""
    labels, model = data.load_labels(real, "rhythm12"), network.ecgfounder(12)
    torch.save({"layout": evaluate.CHECKPOINT_LAYOUT, "state_dict": model.state_dict(),
                "task": "rhythm12", "classes": labels.classes, "leads": list(data.LEADS),
                "preprocessing": "filter", "data": str(real), "args": {}}, tmp_path / "best.pt")
    chosen = np.random.default_rng(0).choice(labels.row, 200, replace=False)
    records = [real / data.read_table(real, "rhythm12").records[i] for i in chosen]
    sizes = memory_of_predictions(tmp_path / "best.pt", records, 200, 10, tmp_path)
    record_property("MB after 20, 100 and 200 predictions", [sizes[i] for i in (19, 99, 199)])
    assert sizes[199] - sizes[19] < 60, sizes[::20]
