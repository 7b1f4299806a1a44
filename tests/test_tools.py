"""The tools of the experiments, and the commands and code of the pages."""
import re
import runpy
import shlex
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import data
import evaluate
import experiment
import figures
import make_subset
import model as network
import post_train
from helpers import ROOT, TESTS, by_sklearn, predicted, read_csv

PAGES = (ROOT / "README.md").read_text() + (TESTS / "RESULTS.md").read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds each of a-0.1 and a-1, of 60 records of 30 patients -> (folders, y, y_prob)."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("runs")
    y, folders, probs = (rng.random((60, 3)) < 0.3).astype(int), [], []
    for i, name in enumerate(("a-0.1-0", "a-0.1-1", "a-1-0", "a-1-1")):
        folders.append(root / name)
        folders[-1].mkdir()
        probs.append(1 / (1 + np.exp(-(rng.normal(size=y.shape) + (1 + i / 2) * y - 2))))
        np.savez(folders[-1] / "predictions.npz", y_true=y, y_prob=probs[-1], ecg_id=np.arange(60),
                 classes=["x", "y", "z"], patient_id=np.arange(60) // 2)
    return list(map(str, folders)), y, probs


def test_table_and_differences_are_of_the_seeds_means(runs, capsys):
    folders, y, probs = runs
    figures.main(["--group", "2", "--table", "--differences", *folders])
    lines = capsys.readouterr().out.splitlines()
    macros = np.array([by_sklearn(y, prob).mean(1) for prob in probs]).reshape(2, 2, 2)
    for line, seeds in zip(lines[2:4], macros, strict=True):
        for cell, values in zip(line.split("|")[2:4], seeds.T):
            assert cell.startswith(f" {values.mean():.3f} (")
            assert cell.endswith(f"± {values.std(ddof=1):.3f} ")
    scores = [evaluate.score({"y_true": y, "y_prob": p, "patient_id": np.arange(60) // 2})
              for p in probs]
    slopes = (scores[2].slopes + scores[3].slopes - scores[0].slopes - scores[1].slopes) / 2
    half = evaluate.half_width(slopes, scores[0].factor)[0]
    diff = (macros[1].mean(0) - macros[0].mean(0))[0]
    assert lines[5].startswith(f"  AUROC {diff:+.4f} ({diff - half:+.4f} to {diff + half:+.4f}), ")


def test_pictures(runs, tmp_path, monkeypatch, fails):
    drawn, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: drawn.append(self) or savefig(
        self, *a, **k))
    figures.main(["--points", str(tmp_path / "p.png"), *runs[0]])
    macros = np.array([by_sklearn(runs[1], prob).mean(1) for prob in runs[2]])
    for k, axis in enumerate(drawn[0].axes):
        line, = axis.lines
        np.testing.assert_allclose(line.get_ydata(), macros[:, k].reshape(2, 2).mean(1))
    figures.main(["--method", str(tmp_path / "m.png")])
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    fails(figures.main, ["--group", 3, "--table", *runs[0]], "--group 3")


def test_experiment(tmp_path, monkeypatch):
    """Each row trains what it is named after; what is done is left out; a failure ends it."""
    calls, done = [], SimpleNamespace(returncode=0)
    monkeypatch.setattr(experiment.subprocess, "run", lambda words: calls.append(words) or done)
    argv = ["--data", "d", "--weights", "none", "--fracs", "1", "0.1", "--out", str(tmp_path)]
    experiment.main([*argv, "--rows", *experiment.ROWS, "--", "--amp", "bf16"])
    trained = [post_train.parse(list(map(str, words[2:]))) for words in calls[::2]]
    assert len(trained) == 2 * len(experiment.ROWS)
    for args in trained:
        post_train.check(args)
        row, frac, _ = args.out.rsplit("/")[-1].rsplit("-", 2)
        assert (args.frac, args.strategy == "baseline", args.amp) == (
            float(frac), row == "baseline", "bf16")
        assert args.epochs == (0 if "probe" in row else {1: 15, 0.1: 30}[args.frac])
        assert (args.drop_path > 0) == (row not in ("baseline", "preview", "schedule"))
    (tmp_path / "post-1-0").mkdir()
    (tmp_path / "post-1-0" / "predictions.npz").touch()
    calls.clear()
    done.returncode = 1
    with pytest.raises(SystemExit, match="post-0.1-0 has failed"):
        experiment.main([*argv, "--rows", "post"])
    assert len(calls) == 1


def test_a_network_at_100_hz(demo_set, tmp_path):
    """Its predictions are those of its weights on every fifth sample."""
    out, tool = tmp_path / "run", [sys.executable, TESTS / "tools" / "hz100.py"]
    train = (f"post_train.py --data {demo_set} --task rhythm12 --weights none --probe-epochs 1 "
             f"--epochs 0 --device cpu --frac 0.2 --out {out}")
    for command in (train, f"evaluate.py {out}/best.pt --device cpu"):
        subprocess.run([*tool, *command.split()], check=True, capture_output=True)
    found, labels = np.load(out / "predictions.npz"), data.load_labels(demo_set, "rhythm12")
    test = labels.take(labels.fold == 10)
    signals = data.load_records(demo_set, "all71")[1][test.row].astype(np.float32)
    np.testing.assert_allclose(found["y_prob"], predicted(out / "best.pt", signals[..., ::5]),
                               atol=1e-6)


def test_subsets_share_out_ptbxl(demo_set, tmp_path):
    rows, sets = read_csv(demo_set / data.DATABASE), {}
    for name in make_subset.SETS:
        make_subset.main(demo_set, name, tmp_path / name)
        sets[name] = data.load_labels(tmp_path / name, "all71", unlabelled=True)
        data.read_record(tmp_path / name / sets[name].record[0])
    assert sorted([*sets["folds1-7"].ecg_id, *sets["folds8-10"].ecg_id]) == [
        int(row["ecg_id"]) for row in rows]
    for labels, i in ((sets["folds1-7"], k) for k in range(len(sets["folds1-7"].fold))):
        old = int(rows[labels.ecg_id[i] - 1]["strat_fold"])
        assert labels.fold[i] == (old if old < 7 else 10 - labels.patient_id[i] % 2)
    tenth = sets["folds8-10-tenth"]
    assert not (tenth.patient_id[tenth.fold == 9] % 10).any()


def test_the_readmes_code_runs(demo_set, tmp_path, monkeypatch):
    (tmp_path / "ptbxl").symlink_to(demo_set)
    (tmp_path / "checkpoints").mkdir()
    founder = network.ecgfounder(150)
    torch.save({"state_dict": founder.state_dict()}, tmp_path / network.OFFICIAL)
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", PAGES, re.S)[1]
    found = {}
    exec(code.replace("path/to/record", str(demo_set / "records500/00000/00001_hr")), found)
    assert found["logits"].shape == (1, 5)
    with torch.inference_mode():
        torch.testing.assert_close(found["features"], founder.eval().forward_features(found["x"]))
    x, y = next(iter(torch.utils.data.DataLoader(found["ECGs"](), batch_size=4)))
    assert x.dtype == y.dtype == torch.float32 and x.shape == (4, 12, 5000) and y.shape == (4, 71)


def test_the_pages_commands_are_understood(monkeypatch, capsys, tmp_path):
    """Training commands by the parser, the options of the others by --help."""
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"python ([\w/]+\.py)([^`\n#&|;>]*)", PAGES)
    training = [words for script, words in commands
                if script == "post_train.py" and "--task" in words]
    assert len(training) >= 3
    for words in training:
        words = re.sub(r"\$[A-Z]|\.\.\.", "", words)     # options in a variable, or left out
        words = re.sub(r"\$\{?\w+\}?", "1", words)
        post_train.parse(shlex.split(words))
    for script in sorted({script for script, _ in commands}):
        assert (ROOT / script).exists(), script
    for script in ("data.py", "model.py", "evaluate.py", "post_train.py", "tests/tools/figures.py"):
        asked = {option for name, words in commands if name == script
                 for option in re.findall(r"(?<!\S)--[a-z-]+", words)}
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert asked <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out)), script
