"""Kills, full disks, Ctrl-C, a process that fails alone: nothing is lost or half written."""
import math
import os
import signal
import subprocess
import sys

import pytest

import model as network
import post_train
from helpers import ROOT, TESTS, arguments, assert_same_run, content, temporaries
from processes import end, start


def test_a_killed_build_starts_over(uncached, demo_set):
    """By SIGKILL, before its array has its name; what is left of it goes an hour later."""
    words = "data.py", "--data", uncached, "--workers", 2
    end(start(*words, kill_at=2), -signal.SIGKILL)
    os.utime(*temporaries(uncached), (0, 0))
    end(start(*words))
    assert content(uncached / "cache") == content(demo_set / "cache")


def test_a_killed_training_goes_on_and_a_full_disk_says_so(demo_set, tmp_path):
    """SIGKILL before best.pt has its name, then no room for last.pt, which holds the most."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    words, others = (("post_train.py", *arguments(demo_set, path)) for path in (out, whole))
    undisturbed = start(*others)
    end(start(*words, kill_at=6), -signal.SIGKILL)
    assert ["best.pt" in path.name for path in temporaries(out)] == [True]
    room = 2 * (out / "probe.pt").stat().st_size
    line, = end(start(*words, "--resume", largest_file=room), 2)
    assert all(word in line for word in ("last.pt", "make room", "--resume"))
    assert {path.name for path in out.glob("*.pt")} == {"probe.pt", "best.pt"}
    end(undisturbed)
    end(start(*words, "--resume"))
    assert_same_run(out, whole)


def test_a_full_disk_keeps_earlier_predictions(demo_set, undisturbed, tmp_path):
    out = tmp_path / "predictions.npz"
    out.write_bytes(b"earlier")
    line, = end(start("evaluate.py", undisturbed / "best.pt", "--out", out, largest_file=100), 2)
    assert out.name in line and "make room" in line
    assert content(tmp_path) == {out.name: b"earlier"}


@pytest.mark.parametrize("number, left", [(1, set()), (3, {"metrics.jsonl", "probe.pt"})])
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
    assert len(passes) == number and passes[-1] is (number == 3)
    assert {path.name for path in tmp_path.iterdir()} == left


def test_a_loss_that_is_not_finite_stops_the_run(tiny, demo_set, tmp_path, monkeypatch, fails):
    monkeypatch.setattr(network.ECGFounder, "head", lambda self, x: self.dense(x) * math.inf)
    fails(post_train.main, arguments(demo_set, tmp_path), "finetune epoch 1", "--lr", "--amp")
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "probe.pt"}


def test_a_process_that_fails_alone_says_why_and_ends_the_others(demo_set, tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()    # in the way of what the first process writes
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         TESTS / "tiny.py", "post_train.py", *arguments(demo_set, tmp_path, "--resume")],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    said = [line for line in done.stderr.splitlines() if "post_train.py: " in line]
    assert done.returncode and len(said) == 1 and "is a directory" in said[0], done.stderr
    assert done.stdout.count("records to train") == 1   # one speaks
