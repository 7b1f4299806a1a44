"""Kills, full disks, Ctrl-C, a process that fails alone: nothing is lost or half written."""
import math
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch

import data
import evaluate
import model as network
import post_train
from helpers import (ROOT, TESTS, arguments, assert_same_run, content, history, temporaries,
                     weights)


KILLED = """
import os, runpy, signal, sys
sys.path.insert(0, "tests")
import tiny
calls, fsync, at, sys.argv = [], os.fsync, int(sys.argv[1]), sys.argv[2:]
def fsync_and_perhaps_end(descriptor):
    fsync(descriptor)
    calls.append(descriptor)
    if len(calls) == at:
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = fsync_and_perhaps_end
tiny.shrink()
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def killed(at, *words):
    """Run a script that does not come back from its call number `at` of os.fsync."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(at), *map(str, words)], cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL


def test_a_killed_build_starts_over(uncached, demo_set):
    """By SIGKILL, before its array has its name; what is left of it goes an hour later."""
    killed(2, "data.py", "--data", uncached, "--workers", 2)
    left = temporaries(uncached)
    assert left
    for path in left:
        os.utime(path, (0, 0))
    data.main(["--data", str(uncached)])
    assert content(uncached / "cache") == content(demo_set / "cache")


def test_a_killed_training_goes_on(tiny, demo_set, undisturbed, tmp_path, monkeypatch):
    """By SIGKILL, before last.pt has its name: it equals one that was never interrupted."""
    one, other = tmp_path / "one", tmp_path / "other"
    killed(7, "post_train.py", *arguments(demo_set, one))
    assert ["last.pt" in path.name for path in temporaries(one)] == [True]
    for out in (one, other):
        post_train.main([*arguments(demo_set, out), "--resume"])
    assert_same_run(one, other)


def test_a_full_disk_is_said_and_costs_no_earlier_file(tiny, demo_set, undisturbed, tmp_path,
                                                       fails):
    """There is no room for last.pt, which holds the most, nor for predictions."""
    out, earlier = tmp_path / "run", tmp_path / "predictions.npz"
    evaluation, limits = [undisturbed / "best.pt", "--out", earlier], resource.RLIMIT_FSIZE
    usual, room = resource.getrlimit(limits), 2 * (undisturbed / "probe.pt").stat().st_size
    earlier.write_bytes(b"earlier")
    try:
        resource.setrlimit(limits, (room, usual[1]))
        fails(post_train.main, arguments(demo_set, out), "last.pt", "too large")
        resource.setrlimit(limits, (100, usual[1]))
        fails(evaluate.main, evaluation, "predictions.npz", "too large")
    finally:
        resource.setrlimit(limits, usual)
    assert content(out).keys() == {"metrics.jsonl", "probe.pt", "best.pt"}
    assert earlier.read_bytes() == b"earlier" and not temporaries(tmp_path)


@pytest.mark.parametrize("number, left", [(1, {"metrics.jsonl"}),
                                          (3, {"metrics.jsonl", "probe.pt"})])
def test_ctrl_c_ends_the_run_at_once(tiny, demo_set, tmp_path, monkeypatch, fails, number, left):
    """Pressed in a pass of the network, the first one or the first step of fine-tuning."""
    passes, forward = [], network.ECGFounder.forward_features

    def interrupted(self, x):
        passes.append(self.training)
        if len(passes) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, x)

    monkeypatch.setattr(network.ECGFounder, "forward_features", interrupted)
    fails(post_train.main, arguments(demo_set, tmp_path), "--resume", status=130)
    assert passes == [False, False, True][:number] and content(tmp_path).keys() == left


def test_a_loss_that_is_not_finite_stops_the_run(tiny, demo_set, tmp_path, monkeypatch, fails):
    monkeypatch.setattr(network.ECGFounder, "head", lambda self, x: self.dense(x) * math.inf)
    fails(post_train.main, arguments(demo_set, tmp_path), "finetune epoch 1", "--lr", "--amp")
    assert content(tmp_path).keys() == {"metrics.jsonl", "probe.pt"}


def torchrun(argv):
    """Two processes of post_train.py with the small network -> what they have said."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         TESTS / "tiny.py", "post_train.py", *argv],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_two_processes_equal_one(tiny, demo_set, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    more = "--drop-path", 0, "--dropout", 0, "--batch-size", 12
    done = torchrun(arguments(demo_set, two, *more))
    assert done.stdout.count("records to train") == 1, done.stderr      # one speaks
    post_train.main(arguments(demo_set, one, *more))
    for a, b in zip(history(one), history(two), strict=True):
        assert a.pop("stage") == b.pop("stage") and a == pytest.approx(b, rel=0, abs=1e-5)
    torch.testing.assert_close(weights(one), weights(two), atol=1e-5, rtol=0)


def test_a_process_that_fails_alone_says_why_and_ends_the_others(demo_set, tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()    # in the way of what the first process writes
    done = torchrun(arguments(demo_set, tmp_path, "--resume"))
    said = [line for line in done.stderr.splitlines() if "post_train.py: " in line]
    assert done.returncode and len(said) == 1 and "Is a directory" in said[0], done.stderr


def test_a_run_begun_while_another_loads_is_not_mixed_with_it(tiny, demo_set, tmp_path,
                                                              monkeypatch, fails):
    def load_while_another_trains(*args, **options):
        monkeypatch.setattr(data, "load_records", load)
        post_train.main(arguments(demo_set, tmp_path))
        before.update(content(tmp_path))
        return load(*args, **options)

    load, before = data.load_records, {}
    monkeypatch.setattr(data, "load_records", load_while_another_trains)
    fails(post_train.main, arguments(demo_set, tmp_path, "--lr", 0.01), "metrics.jsonl", "exists")
    assert content(tmp_path) == before
