"""The tools of the README's experiment: its sets out of PTB-XL, and its pictures."""
import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

import data
import evaluate
import figures
import make_subset
import model as network
import post_train
from conftest import ROOT
from test_evaluate import made_up


def test_listing():
    with open(make_subset.LISTING, newline="") as f:
        rows = list(csv.DictReader(f))
    ids = {name: [int(r["ecg_id"]) for r in rows if r["set"] == name] for name in ("target", "pretrain")}
    assert [len(set(ids[name])) for name in ids] == [2831, 1268] and not set(ids["target"]) & set(ids["pretrain"])
    folds = [int(r["strat_fold"]) for r in rows if r["set"] == "target"]
    assert [sum(f <= 8 for f in folds), folds.count(9), folds.count(10)] == [2322, 330, 179]
    assert {r["strat_fold"] for r in rows if r["set"] == "pretrain"} == set("1234569") | {"10"}


@pytest.mark.real
def test_listing_is_of_the_real_records(real):
    with open(make_subset.LISTING, newline="") as f:
        want = {int(r["ecg_id"]): int(r["strat_fold"]) for r in csv.DictReader(f) if r["set"] == "target"}
    labels = data.load_labels(real, "all71")
    assert {i: f for i, f in zip(labels.ecg_id.tolist(), labels.fold.tolist()) if i in want} == want


def test_a_subset_reads_as_ptbxl(demo, tmp_path):
    (tmp_path / "list.csv").write_text("ecg_id,set,strat_fold\n7,target,9\n3,target,1\n5,pretrain,2\n60,target,10\n")
    make_subset.make_subset(demo, "target", tmp_path / "part", tmp_path / "list.csv")
    data.build_cache(tmp_path / "part", workers=1)
    labels, cache, whole = data.load_labels(tmp_path / "part", "all71"), data.load_cache(tmp_path / "part"), data.load_cache(demo)
    assert labels.ecg_id.tolist() == [3, 7, 60] and labels.fold.tolist() == [1, 9, 10]
    for ecg_id in (3, 7, 60):
        assert np.array_equal(cache.signals[cache.row[ecg_id]], whole.signals[whole.row[ecg_id]])
    with pytest.raises(data.InputError, match="lacks [0-9]+ of the 2831"):
        make_subset.make_subset(demo, "target", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.fixture
def four_runs(tmp_path):
    """Folders a-0, a-1 (middling models) and b-0, b-1 (b-0 is a-0 again; b-1 all but perfect), and what they hold."""
    y, prob = made_up(60, 3, prevalence=0.3)
    probs = {"a-0": prob, "a-1": prob[::-1].copy(), "b-0": prob, "b-1": 0.8 * y + 0.1 * prob}
    for run, p in probs.items():
        (tmp_path / run).mkdir()
        lines = [{"stage": "probe", "epoch": 1, "seconds": 0.5} | dict.fromkeys(figures.PANELS, 9.0)] + [
            {"stage": "finetune", "epoch": e, "seconds": 1000 + int(run[-1])} | {k: e + int(run[-1]) for k in figures.PANELS} for e in (1, 2, 3)]
        (tmp_path / run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        scores = [float(f(y, p, average="macro")) for f in (roc_auc_score, average_precision_score)]
        (tmp_path / run / "test.json").write_text(json.dumps({"n": 60} | dict(zip(("macro_auroc", "macro_auprc"), scores))))
        np.savez(tmp_path / run / "predictions.npz", y_true=y, y_prob=p, classes=np.array(["x", "y", "z"]), ecg_id=np.arange(60))
    return [str(tmp_path / run) for run in probs], y, probs


def test_pictures(four_runs, monkeypatch):
    import matplotlib.pyplot as plt
    drawn = {}
    monkeypatch.setattr(evaluate, "save_picture", lambda figure, path, dpi: (plt.close(figure), drawn.update({path: figure})))
    figures.main(["--group", "2", "--curves", "c.png", "--classes", "k.png", *four_runs[0]])
    axis = drawn["c.png"].axes[2]
    assert [line.get_label() for line in axis.lines] == ["a", "b"] and axis.lines[0].get_ydata().tolist() == [1.5, 2.5, 3.5]
    assert len(drawn["k.png"].axes) == 2 and len(drawn["k.png"].axes[0].containers) == 2
    figures.main(["--classes", "one.png", four_runs[0][0]])
    assert len(drawn["one.png"].axes[0].containers) == 1


def test_the_table(four_runs, capsys):
    runs, y, probs = four_runs
    want = {run: (roc_auc_score(y, p, average="macro"), average_precision_score(y, p, average="macro")) for run, p in probs.items()}

    def cells(of):
        pair = np.array([want[run] for run in of])
        return [f"{v.mean():.3f} ± {v.std(ddof=1):.3f}" for v in pair.T], pair.mean(0)
    figures.main(["--group", "2", "--table", *runs])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    (first, base), (second, better) = cells(["a-0", "a-1"]), cells(["b-0", "b-1"])
    gain = 100 * (better - base) / base
    assert rows[0] == ["run", "AUROC", "AUPRC", "gain, %", "seeds", "seconds"]
    assert rows[2:] == [["a", *first, "", "2", "3,002"], ["b", *second, f"{gain[0]:+.1f}* / {gain[1]:+.1f}*", "2", "3,002"]]

    shutil.copy(f"{runs[3]}/predictions.npz", f"{runs[0]}/last.npz")
    shutil.copy(f"{runs[0]}/predictions.npz", f"{runs[2]}/last.npz")
    figures.main(["--table", runs[0], runs[2]])                      # one seed: no deviation; equal models: no star
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    a, perfect = ([f"{v:.3f}" for v in want[run]] for run in ("a-0", "b-1"))
    assert rows[2][:7] == ["a-0", *a, "", *perfect, ""]
    assert rows[3][:4] == ["b-0", *a, "+0.0 / +0.0"] and rows[3][4:6] == a and rows[3][6].count("*") == 2 and rows[3][6].startswith("-")


@pytest.mark.parametrize("spoil, options, word", [
    (lambda run: (run / "metrics.jsonl").unlink(), ["--curves", "c.png"], "metrics.jsonl"),
    (lambda run: (run / "metrics.jsonl").write_text('{"stage": "finetune", "epoch": 1}\n'), ["--curves", "c.png"], r"\[1, 3\] epochs"),
    (lambda run: (run / "predictions.npz").unlink(), ["--table"], "predictions.npz: no such file"),
    (lambda run: None, ["--table", "--group", "3"], "groups of 3"),
    (lambda run: None, ["--curves", "c.xyz"], "c.xyz: no picture"),
    (lambda run: shutil.copy(run.parent / "b-1" / "predictions.npz", run), ["--table"], "a-0/predictions.npz: its scores are not those of test.json"),
    (lambda run: (run / "test.json").unlink(), ["--table"], "a-0/predictions.npz: its scores are not"),
])
def test_folders_that_are_no_finished_runs(four_runs, capsys, spoil, options, word):
    spoil(Path(four_runs[0][0]))
    with pytest.raises(SystemExit) as stop:
        figures.main(["--group", "2", *options, *four_runs[0]])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and re.search(word, error)


def test_the_readmes_way_to_score_another_model(demo, tmp_path, monkeypatch, capsys):
    code = re.search(r"```python\n(import numpy as np, data\n.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    (tmp_path / "ptbxl").symlink_to(demo)
    monkeypatch.chdir(tmp_path)
    labels = data.load_labels(demo, "all71")
    truth = dict(zip(labels.ecg_id.tolist(), labels.y))
    exec(code, {"predict": lambda ids: np.stack([0.2 + 0.6 * truth[i] for i in ids.tolist()])})
    evaluate.main(["other.npz"])
    assert "macro AUROC 1.0000" in capsys.readouterr().out


def test_the_readmes_way_to_use_the_network(demo_set, tmp_path, monkeypatch):
    code = re.search(r"```python\n(import torch, model\n.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    founder = network.ecgfounder(150)
    (tmp_path / "checkpoints").mkdir()
    torch.save({"state_dict": founder.state_dict()}, tmp_path / "checkpoints" / "12_lead_ECGFounder.pth")
    monkeypatch.chdir(tmp_path)
    exec(code.replace("path/to/record", str(demo_set / "records500/00000/00001_hr")), found := {})
    assert found["logits"].shape == (1, 5) and found["features"].shape == (1, 1024)
    with torch.inference_mode():
        torch.testing.assert_close(found["features"], founder.eval().forward_features(found["x"]))


def test_the_readmes_commands_are_understood(tmp_path, monkeypatch):
    """Every training command of the README, and its rows with their options."""
    text = (ROOT / "README.md").read_text()
    variables = {"$T": "all71", "$F": "0.1", "$S": "0", "$R": re.search(r'^R="(.*)"$', text, re.M)[1], "$W": re.search(r'^W="(.*)"$', text, re.M)[1]}
    commands = re.findall(r"python post_train\.py ([^`\n#&]*)", text)
    commands += [f"$R --seed 0 {options}" for options in re.findall(r"^\|.*\| `(--[^`]*)` \| `", text, re.M)]
    commands = [c for c in commands if "--task" in c or "$R" in c]
    assert len(commands) >= 30
    monkeypatch.chdir(tmp_path)
    for command in commands:
        for name, value in variables.items():
            command = command.replace(name, value)
        post_train.check(post_train.parse([*shlex.split(command), "--weights", "none"]))


def test_the_readmes_other_commands_name_what_is_there():
    asked = {}
    for script, options in re.findall(r"python ((?:tests/)?\w+\.py)([^`\n#&|;]*)", (ROOT / "README.md").read_text()):
        asked.setdefault(script, set()).update(re.findall(r"(?<!\S)--[a-z-]+", options))
    assert {"data.py", "model.py", "evaluate.py", "tests/figures.py", "tests/make_subset.py", "tests/make_demo.py", "tests/benchmark.py"} <= set(asked)
    for script, options in asked.items():
        known = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True).stdout
        assert options <= set(re.findall(r"--[a-z-]+", known)), script
