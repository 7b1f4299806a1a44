"""Kills, signals, full disks, many processes at once, long use: nothing is lost and nothing is half written.

The short version runs with the other tests; the long one is `python -m pytest -m campaign tests` (8 minutes on 2 idle cores).
"""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import evaluate
import model as network
import post_train
from conftest import ROOT, TESTS
from make_demo import make_demo
from test_post_train import arguments, assert_same_run, history

LONG = pytest.mark.campaign
TRAINING = ("--probe-epochs", "2", "--epochs", "2")


def at_moment(listing, kill_at, folder, script, *argv):
    """Run a script up to a moment; returns its exit status and what it wrote to stderr."""
    command = [sys.executable, str(TESTS / "moments.py"), str(listing), str(kill_at), str(folder), script, *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done.returncode, done.stderr


def spread(total, n):
    """n moments, from the first to the last."""
    return sorted({1 + round(i * (total - 1) / max(1, n - 1)) for i in range(n)})


def temporaries(folder):
    return [p for p in Path(folder).rglob(".*") if p.is_file() and p.name != ".lock"]


# ------------------------------------------------------------------------------------------------------------------ kills

@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """160 records, that is five chunks, without a cache."""
    root = tmp_path_factory.mktemp("records")
    make_demo(root, records=160)
    return root


@pytest.fixture(scope="module")
def cached(records, tmp_path_factory):
    """Name -> bytes of an undisturbed build's files."""
    root = Path(shutil.copytree(records, tmp_path_factory.mktemp("cached") / "set", copy_function=os.link))
    data.build_cache(root, workers=1)
    return {p.name: p.read_bytes() for p in (root / "cache").iterdir() if p.name != ".lock"}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=LONG)])
def test_cache_killed_at_many_moments(records, cached, tmp_path, workers, kills, record_property):
    def build(name, kill_at, fresh=True):
        root = tmp_path / name
        if fresh:
            shutil.copytree(records, root, copy_function=os.link)
        return root / "cache", at_moment(tmp_path / "list", kill_at, root, "data.py", "--data", root, "--workers", workers)[0]

    assert build("whole", 0)[1] == 0
    total = len(json.loads((tmp_path / "list").read_text()))
    moments = spread(total, kills + 2)[1:-1]  # the first and the last are before and after the work
    for k in moments:
        folder, status = build(f"at{k}", k)
        assert status == -signal.SIGKILL
        for name in ("filter.npy", "filter.json"):
            assert not (folder / name).exists() or (folder / name).read_bytes() == cached[name], "half a file under its final name"
        folder, status = build(f"at{k}", 0, fresh=False)
        assert status == 0 and {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"} == cached
        shutil.rmtree(folder.parent)
    assert len(moments) == kills
    record_property("kills", kills)


@pytest.fixture(scope="module")
def whole_run(demo_set, tmp_path_factory):
    """An undisturbed run and the names of its moments."""
    folder = tmp_path_factory.mktemp("whole")
    status, errors = at_moment(folder / "list", 0, folder / "run", "post_train.py", *arguments(demo_set, folder / "run", *TRAINING))
    assert status == 0, errors
    return folder / "run", json.loads((folder / "list").read_text())


def moments_of_training(names, kills):
    """Moments over the whole run; among them all that must be: probe, epoch, validation, both checkpoints half written, renaming."""
    first = {name: names.index(name) + 1 for name in ("half of best.pt", "open .lock", "training ECGFounder")}
    last = {name: len(names) - names[::-1].index(name) for name in ("half of last.pt", "training Block", "inference Block")}
    probe = [i + 1 for i, name in enumerate(names) if name == "training Sequential"]
    renamed = [i + 1 for i, name in enumerate(names) if name.startswith("os.rename")]
    must = [probe[-1], *first.values(), *last.values(), renamed[0], renamed[-1], renamed[len(renamed) // 2]]
    return must[::4] if kills < len(must) else sorted({*must, *spread(len(names), kills + 3 - len(must))[1:-1]})


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=LONG)])
def test_training_killed_at_many_moments(demo_set, whole_run, tmp_path, kills, record_property):
    """Killed, resumed and killed again early in that, and resumed: equal to the undisturbed run, weights bit for bit."""
    undisturbed, names = whole_run
    moments = moments_of_training(names, kills)
    for k in moments:
        out = tmp_path / f"at{k}"
        call = arguments(demo_set, out, *TRAINING)
        assert at_moment(tmp_path / "list", k, out, "post_train.py", *call)[0] == -signal.SIGKILL
        check_what_is_left(out, undisturbed)
        status, _ = at_moment(tmp_path / "list", 1 + k // 3, out, "post_train.py", *call, "--resume")
        assert status == -signal.SIGKILL or status == 0 and k > len(names) // 2  # near its end little is left to be killed in
        check_what_is_left(out, undisturbed)
        status, errors = at_moment(tmp_path / "list", 0, out, "post_train.py", *call, "--resume")
        assert status == 0, errors
        assert_same_run(out, undisturbed)
        assert not temporaries(out)
        shutil.rmtree(out)
    assert len(moments) >= kills
    record_property("kills", 2 * len(moments))


def check_what_is_left(out, undisturbed):
    """Of a killed run: whole checkpoints, and the first lines of the undisturbed run's history."""
    for name in ("best.pt", "last.pt"):
        if (out / name).exists():
            network.read_checkpoint(out / name)
    if (out / "metrics.jsonl").exists():
        lines = history(out)
        assert lines == history(undisturbed)[:len(lines)]


PHASES = {  # of a run with two batches of features and three steps an epoch, by the passes so far: was the network in training?
    "features": lambda passes: passes == [False],
    "the first step": lambda passes: sum(passes) == 1,
    "a later epoch": lambda passes: sum(passes) == 4,
    "validation": lambda passes: passes[-2:] == [True, False],
}


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("phase", PHASES)
def test_signals_end_the_run_within_a_step(tiny, demo_set, tmp_path, monkeypatch, capsys, number, status, phase):
    """As a scheduler's preemption or Ctrl-C: sent during a pass of the network."""
    passes, sent, forward = [], [], network.ECGFounder.forward_features

    def signalled(self, x):
        passes.append(self.training)
        if not sent and PHASES[phase](passes):
            sent.append(len(passes))
            os.kill(os.getpid(), number)
        return forward(self, x)

    monkeypatch.setattr(network.ECGFounder, "forward_features", signalled)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        post_train.main(arguments(demo_set, tmp_path / "run", *TRAINING))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == status and "--resume goes on" in error and "Traceback" not in error
    assert sent == [len(passes)] and signal.getsignal(number) is before and not temporaries(tmp_path / "run")


# -------------------------------------------------------------------------------------------------------------- full disks

@contextmanager
def small_disk(folder, size):
    """A file system of `size` bytes at `folder`, where mounting is allowed."""
    folder.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def go_on(out, demo_set, undisturbed):
    post_train.main(arguments(demo_set, out, *TRAINING, "--resume"))
    assert_same_run(out, undisturbed)


@pytest.fixture(scope="module")
def undisturbed(whole_run):
    return whole_run[0]


@pytest.fixture
def one_thread():
    """As the processes that this file starts: sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_full_disk_keeps_the_checkpoints(tiny, one_thread, demo_set, undisturbed, tmp_path, fails):
    """Room for the probe's last.pt and for fine-tuning's best.pt, not for the last.pt after it."""
    size = (undisturbed / "last.pt").stat().st_size
    with small_disk(tmp_path / "disk", size + (undisturbed / "best.pt").stat().st_size):
        out = tmp_path / "disk" / "run"
        fails(post_train.main, arguments(demo_set, out, *TRAINING), "cannot be written", "make room", "--resume")
        assert evaluate.load_checkpoint(out / "last.pt")[1]["stage"] == "probe" and not temporaries(out)
        check_what_is_left(out, undisturbed)
        shutil.copytree(out, tmp_path / "roomy")
    go_on(tmp_path / "roomy", demo_set, undisturbed)


def test_a_limit_of_file_size_keeps_the_checkpoints(demo_set, undisturbed, tmp_path):
    """The same where nothing can be mounted: no file may grow to the size of fine-tuning's last.pt."""
    limit = (undisturbed / "last.pt").stat().st_size - 1000
    out = tmp_path / "run"
    command = [sys.executable, str(TESTS / "tiny.py"), "post_train.py", *arguments(demo_set, out, *TRAINING)]
    run = lambda *more, **options: subprocess.run([*command, *more], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)
    done = run(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode == 2 and "last.pt: cannot be written" in done.stderr and len([x for x in done.stderr.splitlines() if "%|" not in x and x]) == 1
    assert network.read_checkpoint(out / "last.pt")["stage"] == "probe"
    assert not temporaries(out)
    assert run("--resume").returncode == 0
    assert_same_run(out, undisturbed)


def test_a_full_disk_stops_the_cache_before_any_work(demo, monkeypatch, fails):
    shutil.rmtree(demo / "cache")
    monkeypatch.setattr(data, "prepare", lambda *a: pytest.fail("work was wasted"))
    with small_disk(demo / "cache", 2**20):
        fails(data.main, ["--data", demo], "filter.npy", "No space left", "0.0072 GB", "make room")
        assert [p.name for p in (demo / "cache").iterdir()] == [".lock"]
    monkeypatch.undo()
    data.build_cache(demo, workers=1)


def test_a_full_disk_keeps_earlier_predictions(tiny, demo_set, undisturbed, tmp_path, fails):
    with small_disk(tmp_path / "disk", (undisturbed / "best.pt").stat().st_size + 8192):
        shutil.copy(undisturbed / "best.pt", tmp_path / "disk")
        (tmp_path / "disk" / "predictions.npz").write_bytes(b"earlier")
        fails(evaluate.main, [tmp_path / "disk" / "best.pt", "--data", demo_set, "--fold", *range(1, 11)], "predictions.npz", "no space left", "make room")
        assert (tmp_path / "disk" / "predictions.npz").read_bytes() == b"earlier" and not temporaries(tmp_path / "disk")


# -------------------------------------------------------------------------------------------------------------------- load

def test_five_processes_on_one_folder(demo, undisturbed, tmp_path):
    """Two trainings, two evaluations and a cache build begin at once where there is no cache yet."""
    shutil.rmtree(demo / "cache")
    script = lambda name, *argv: [sys.executable, str(TESTS / "tiny.py"), name, *map(str, argv)]
    commands = [script("post_train.py", *arguments(demo, tmp_path / f"run{i}", *TRAINING)) for i in range(2)]
    commands += [script("evaluate.py", undisturbed / "best.pt", "--data", demo, "--out", tmp_path / f"p{i}.npz") for i in range(2)]
    commands += [script("data.py", "--data", demo)]
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}) for c in commands]
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    for i in range(2):
        assert_same_run(tmp_path / f"run{i}", undisturbed)
        with np.load(tmp_path / f"p{i}.npz") as z:
            scores = evaluate.report(evaluate.score(z["y_true"], z["y_prob"], z["patient_id"]), z["y_true"], z["classes"].tolist())
        assert scores == json.loads((undisturbed / "test.json").read_text())
    assert sorted(p.name for p in (demo / "cache").iterdir()) == [".lock", "filter.json", "filter.npy"]


def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def predict_many(checkpoint, records, n, plots, tmp_path):
    """Memory in MB after each of n predictions."""
    sizes = []
    for i in range(n):
        plot = ["--plot", str(tmp_path / "ecg.png")] if i % plots == 0 else []
        evaluate.main([str(checkpoint), "--record", str(records[i % len(records)]), "--device", "cpu", *plot])
        sizes.append(resident_mb())
    return sizes


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_repeated_predictions_keep_their_memory(tiny, demo_set, undisturbed, tmp_path, capsys):
    """Four pictures between the windows; one that is kept takes 60 MB. The least of a window leaves out buffers that come and go."""
    sizes = predict_many(undisturbed / "best.pt", sorted(demo_set.rglob("*_hr.hea")), 24, 4, tmp_path)
    assert min(sizes[20:]) - min(sizes[4:8]) < 30, sizes[::4]


@LONG
@pytest.mark.real
def test_200_predictions_on_real_records_keep_their_memory(real, tmp_path, capsys, record_property):
    """The whole network, random real records."""
    labels = data.load_labels(real, "rhythm12")
    model = network.ecgfounder(12)
    torch.save({"layout": evaluate.CHECKPOINT_LAYOUT, "state_dict": model.state_dict(), "task": "rhythm12", "classes": labels.classes,
                "preprocessing": "filter", "data": str(real), "args": {}}, tmp_path / "best.pt")
    chosen = np.random.default_rng(0).choice(labels.ecg_id, 200, replace=False)
    records = [real / f"records500/{i // 1000 * 1000:05d}/{i:05d}_hr" for i in chosen]
    sizes = predict_many(tmp_path / "best.pt", records, 200, 10, tmp_path)
    record_property("MB after 20, 100 and 200 predictions", [round(sizes[i]) for i in (19, 99, 199)])
    assert sizes[199] - sizes[19] < 60, sizes[::20]
