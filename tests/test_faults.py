"""Kills, Ctrl-C, full disks, many processes at once, long use: nothing is lost or half written.

What a kill may leave at any other moment: test_post_train.py and test_data.py.
"""
import os
import shutil
import signal
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest

import data
import model as network
import post_train
from helpers import arguments, assert_same_run, content, temporaries
from processes import end, start


# ----------------------------------------------------------------------------- kills and interrupts

@pytest.fixture(scope="module")
def undisturbed(demo_set, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    end(start("post_train.py", *arguments(demo_set, out)))
    return out


def test_a_killed_build_and_its_workers_end(uncached, demo_set):
    """By SIGKILL, after the bytes of a chunk and before its marks."""
    words = "data.py", "--data", uncached, "--workers", 2
    end(start(*words, kill_at=2), -signal.SIGKILL)
    assert not np.load(data.find_cache(uncached)[0].marks).any()
    end(start(*words))
    assert content(uncached / "cache") == content(demo_set / "cache")


@pytest.mark.parametrize("number, training, kept", [
    (1, False, None), (3, True, ("probe", 2)), (6, False, ("probe", 2)),
    (7, True, ("finetune", 1))], ids=["features", "first step", "validation", "later epoch"])
def test_ctrl_c_ends_the_run_within_a_step(tiny, demo_set, tmp_path, monkeypatch, fails, number,
                                           training, kept):
    """Pressed during a pass of the network; kept: the epoch of last.pt."""
    passes, forward = [], network.ECGFounder.forward_features

    def interrupted(self, x):
        passes.append(self.training)
        if len(passes) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, x)

    monkeypatch.setattr(network.ECGFounder, "forward_features", interrupted)
    fails(post_train.main, arguments(demo_set, tmp_path), "--resume", status=130)
    assert len(passes) == number and passes[-1] is training and not temporaries(tmp_path)
    last = [network.read_checkpoint(path) for path in tmp_path.glob("last.pt")]
    assert [(c["stage"], c["epoch"]) for c in last] == [kept] * (kept is not None)


# --------------------------------------------------------------------------------------- full disks

def error_where_files_cannot_grow(limit, *words):
    """Run a script where no file can have more than `limit` bytes, as on a full disk."""
    errors = end(start(*words, largest_file=limit), 2)
    lines = [line for line in errors if line and "%|" not in line]
    assert len(lines) == 1 and "make room" in lines[0], errors
    return lines[0]


def test_kills_and_a_full_disk_keep_the_checkpoints(demo_set, undisturbed, tmp_path):
    """SIGKILL in fine-tuning and early in what goes on, then no room for last.pt."""
    words = "post_train.py", *arguments(demo_set, tmp_path)
    for kill_at, more in ((9, []), (3, ["--resume"])):
        end(start(*words, *more, kill_at=kill_at), -signal.SIGKILL)
        assert temporaries(tmp_path)
    limit = (undisturbed / "last.pt").stat().st_size - 1000
    error = error_where_files_cannot_grow(limit, *words, "--resume")
    assert "last.pt: cannot be written" in error and "--resume" in error
    assert network.read_checkpoint(tmp_path / "last.pt")["stage"] == "finetune"
    end(start(*words, "--resume"))
    assert_same_run(tmp_path, undisturbed)
    assert not temporaries(tmp_path)


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


def test_five_processes_on_one_folder(uncached, demo_set, undisturbed, tmp_path):
    """Two trainings, two evaluations and a cache build begin at once where there is no cache."""
    calls = [("data.py", "--data", uncached)]
    for i in range(2):
        prediction = ("--out", tmp_path / f"p{i}.npz", "--json", tmp_path / f"p{i}.json")
        calls += [("evaluate.py", undisturbed / "best.pt", "--data", uncached, *prediction),
                  ("post_train.py", *arguments(uncached, tmp_path / f"run{i}"))]
    for started in [start(*call) for call in calls]:
        end(started)
    for i in range(2):
        assert_same_run(tmp_path / f"run{i}", undisturbed)
        scores = (tmp_path / f"p{i}.json").read_text()
        assert scores == (undisturbed / "test.json").read_text()
    assert content(uncached / "cache") == content(demo_set / "cache")
