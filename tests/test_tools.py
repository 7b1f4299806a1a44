"""The tools of the experiments, and the commands and code of the pages."""
import re
import runpy
import shlex
import sys

import numpy as np
import pytest
import torch

import data
import evaluate
import experiment
import figures
import hz100
import make_subset
import model as network
import post_train
from helpers import ROOT, TESTS, arguments, by_sklearn, predicted, read_csv

PAGES = (ROOT / "README.md").read_text() + (TESTS / "RESULTS.md").read_text()


def test_table_and_differences_are_of_the_seeds_means(tmp_path, capsys):
    """Of two seeds each of a-0.1 and a-1, on 60 records of 30 patients."""
    rng, probs, patient = np.random.default_rng(0), [], np.arange(60) // 2
    y = (rng.random((60, 3)) < 0.3).astype(int)
    folders = [tmp_path / name for name in ("a-0.1-0", "a-0.1-1", "a-1-0", "a-1-1")]
    for i, folder in enumerate(folders):
        folder.mkdir()
        probs.append(1 / (1 + np.exp(-(rng.normal(size=y.shape) + (1 + i / 2) * y - 2))))
        np.savez(folder / "predictions.npz", y_true=y, y_prob=probs[-1], ecg_id=np.arange(60),
                 classes=["x", "y", "z"], patient_id=patient)
    figures.main(["--group", "2", "--table", "--differences", *map(str, folders)])
    lines = capsys.readouterr().out.splitlines()
    macros = np.array([by_sklearn(y, prob).mean(1) for prob in probs]).reshape(2, 2, 2)
    for line, seeds in zip(lines[2:4], macros, strict=True):
        for cell, values in zip(line.split("|")[2:4], seeds.T):
            assert cell.startswith(f" {values.mean():.3f} (")
            assert cell.endswith(f"± {values.std(ddof=1):.3f} ")
    scores = [evaluate.score({"y_true": y, "y_prob": p, "patient_id": patient}) for p in probs]
    slopes = (scores[2].slopes + scores[3].slopes - scores[0].slopes - scores[1].slopes) / 2
    half = evaluate.half_width(slopes, scores[0].factor)[0]
    diff = (macros[1].mean(0) - macros[0].mean(0))[0]
    assert lines[5].startswith(f"  AUROC {diff:+.4f} ({diff - half:+.4f} to {diff + half:+.4f}), ")


def test_an_experiments_rows_train_what_they_are_named_after(tmp_path, capsys):
    experiment.main(["--data", "d", "--weights", "none", "--fracs", "1", "0.1", "--dry-run",
                     "--out", str(tmp_path), "--", "--amp", "bf16"])
    commands = re.findall(r"^python post_train.py (.*)", capsys.readouterr().out, re.MULTILINE)
    assert len(commands) == 2 * len(experiment.ROWS)
    for args in map(post_train.parse, map(str.split, commands)):
        row, frac, _ = args.out.rsplit("/")[-1].rsplit("-", 2)
        assert (args.frac, args.strategy == "baseline", args.amp) == (
            float(frac), row == "baseline", "bf16")
        assert args.epochs == (0 if "probe" in row else {1: 15, 0.1: 30}[args.frac])
        assert (args.drop_path > 0) == (row not in ("baseline", "preview", "schedule"))


def test_a_network_at_100_hz(tiny, demo_set, tmp_path, monkeypatch):
    """Its predictions are those of its weights on every fifth sample."""
    labels, signals = data.load_records(demo_set, "rhythm12")
    test = labels.row[labels.fold == 10]
    monkeypatch.setattr(data, "load_records", hz100.load_thinned)
    post_train.main(arguments(demo_set, tmp_path, "--epochs", 0))
    evaluate.main([str(tmp_path / "best.pt")])
    want = predicted(tmp_path / "best.pt", signals[test][..., ::5].astype(np.float32))
    np.testing.assert_allclose(np.load(tmp_path / "predictions.npz")["y_prob"], want, atol=1e-6)


def test_subsets_share_out_ptbxl(demo_set, tmp_path):
    rows, sets = read_csv(demo_set / data.DATABASE), {}
    for name in make_subset.SETS:
        make_subset.main(demo_set, name, tmp_path / name)
        sets[name] = data.load_labels(tmp_path / name, "all71", unlabelled=True)
        data.read_record(tmp_path / name / sets[name].record[0])
    first, rest, tenth = sets.values()
    assert sorted([*first.ecg_id, *rest.ecg_id]) == [int(row["ecg_id"]) for row in rows]
    for ecg_id, patient, fold in zip(first.ecg_id, first.patient_id, first.fold):
        old = int(rows[ecg_id - 1]["strat_fold"])
        assert fold == (old if old < 7 else 10 - patient % 2)
    assert not (tenth.patient_id[tenth.fold == 9] % 10).any()


def test_the_readmes_code_runs(demo_set, tmp_path, monkeypatch):
    (tmp_path / "ptbxl").symlink_to(demo_set)
    (tmp_path / "checkpoints").mkdir()
    founder = network.ecgfounder(150)
    torch.save({"state_dict": founder.state_dict()}, tmp_path / network.OFFICIAL)
    monkeypatch.chdir(tmp_path)
    code = re.search(r"## Copying.*?```python\n(.*?)```", PAGES, re.S)[1]
    found = {}
    exec(code.replace("path/to/record", str(demo_set / "records500/00000/00001_hr")), found)
    assert found["logits"].shape == (1, 5)
    with torch.inference_mode():
        torch.testing.assert_close(found["features"], founder.eval().forward_features(found["x"]))
    x, y = next(iter(torch.utils.data.DataLoader(found["ECGs"](), batch_size=4)))
    assert x.dtype == y.dtype == torch.float32 and x.shape == (4, 12, 5000) and y.shape == (4, 71)


def test_the_pages_commands_are_understood(monkeypatch, capsys):
    """Training commands by the parser, the options of the others by --help."""
    commands = re.findall(r"python ([\w/]+\.py)([^`\n#&|;>]*)", PAGES)
    for words in (words for script, words in commands if script == "post_train.py"):
        if "--task" in words:       # with options left out, and variables
            words = re.sub(r"\$[A-Z]|\.\.\.", "", words)
            post_train.parse(shlex.split(re.sub(r"\$\{?\w+\}?", "1", words)))
    for script in ("data.py", "model.py", "evaluate.py", "post_train.py", "tests/tools/figures.py"):
        asked = re.findall(r"(?<!\S)--[a-z-]+", " ".join(w for s, w in commands if s == script))
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert {*asked} <= {*re.findall(r"--[a-z-]+", capsys.readouterr().out)}, script
