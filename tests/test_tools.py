"""The tools of the README's experiment, and the README's own commands and code."""
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

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
from helpers import ROOT, by_sklearn, edit_csv, predicted, read_csv

PAGES = ROOT / "README.md", ROOT / "tests" / "RESULTS.md"
README = "\n".join(page.read_text() for page in PAGES).replace("\\\n", " ")
README = README.replace("tests/tools/hz100.py ", "")     # before another script's command


def test_the_two_sets_share_out_ptbxl(demo, tmp_path, fails):
    edit_csv(demo / data.DATABASE, lambda rows: rows[0].update(patient_id="", strat_fold="7"))
    want = {"folds1-7": [], "folds8-10": [], "folds8-10-tenth": []}
    for row in read_csv(demo / data.DATABASE):
        i, fold = int(row["ecg_id"]), int(row["strat_fold"])
        patient = float(row["patient_id"] or -i)
        if fold > 7 and (fold != 9 or str(int(patient)).endswith("0")):
            want["folds8-10-tenth"].append((i, fold))
        if fold == 7:
            fold = {1: 9, 0: 10}[patient % 2]
            want["folds1-7"].append((i, fold))
        else:
            want["folds1-7" if fold < 7 else "folds8-10"].append((i, fold))
    data.build_cache(demo, workers=1)
    for name in want:
        make_subset.main([str(demo), name, str(tmp_path / name)])
        data.build_cache(tmp_path / name, workers=1)
        labels, signals = data.load_records(tmp_path / name, "all71")
        assert list(zip(labels.ecg_id.tolist(), labels.fold.tolist())) == want[name]
        _, whole = data.load_records(demo, "all71")  # a row for each record, as each has labels
        assert np.array_equal(signals[labels.row], whole[labels.ecg_id - 1])
    fails(make_subset.main, [demo, "folds1-7", tmp_path / "folds1-7"], tmp_path / "folds1-7")
    edit_csv(demo / data.DATABASE, lambda rows: [row.update(strat_fold="8") for row in rows])
    fails(make_subset.main, [demo, "folds1-7", tmp_path / "no"], data.DATABASE, "folds1-7")
    assert not (tmp_path / "no").exists()


FRACTIONS, CLASSES = {"a-0.25": 0.25, "a-1": 1.0}, ["a$b$c", "$\\frac$", "z"]


@pytest.fixture
def runs(tmp_path, demo_set):
    """(folders, labels, predictions): a-0.25-0 and a-0.25-1 are middling models, a-1-0 is a-0.25-0
    again and a-1-1 all but perfect."""
    rng = np.random.default_rng(0)
    y, prob = (rng.random((60, 3)) < 0.3).astype(int), rng.random((60, 3))
    probs = [prob, prob[::-1].copy(), prob, 0.8 * y + 0.1 * prob]
    folders = [tmp_path / f"{setting}-{seed}" for setting in FRACTIONS for seed in (0, 1)]
    for out, p in zip(folders, probs):
        out.mkdir()
        seed, frac = int(out.name[-1]), FRACTIONS[out.name[:-2]]
        stages = [("probe", 1, 0.5), *(("finetune", e, 1000 + seed) for e in (1, 2, 3)),
                  ("interpolate", 1, 100)]
        (out / "metrics.jsonl").write_text("".join(
            json.dumps({"stage": stage, "epoch": e, "seconds": seconds}) + "\n"
            for stage, e, seconds in stages))
        scores = dict(zip(("macro_auroc", "macro_auprc"), by_sklearn(y, p).mean(1).tolist()))
        evaluate.write_json(out / "test.json", {"n": 60, **scores})
        np.savez(out / "predictions.npz", y_true=y, y_prob=p, classes=CLASSES, ecg_id=np.arange(60))
        torch.save({"layout": evaluate.CHECKPOINT_LAYOUT, "state_dict": {"w": torch.zeros(1)},
                    "task": "all71", "classes": CLASSES, "leads": ["I"], "preprocessing": "raw",
                    "data": str(demo_set), "args": {"frac": frac}}, out / "best.pt")
    return list(map(str, folders)), y, probs


def rows_of(capsys, *argv):
    figures.main(list(argv))
    return [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in capsys.readouterr().out.splitlines()]


def test_table(runs, capsys):
    folders, y, probs = runs
    scores = np.mean([by_sklearn(y, p) for p in probs], 2).reshape(2, 2, 2)  # setting, seed, metric
    cells = [[f"{v.mean():.3f} ± {v.std(ddof=1):.3f}" for v in setting.T] for setting in scores]
    base, better = scores.mean(1)
    gain = " / ".join(f"{g:+.1f}*" for g in 100 * (better - base) / base)
    rows = rows_of(capsys, "--group", "2", "--table", *folders)
    assert rows[0] == ["run", "AUROC", "AUPRC", "gain, %", "seeds", "seconds of epochs"]
    assert rows[2] == ["a-0.25", *cells[0], "", "2", "3,102"]  # seconds of all stages
    assert rows[3:] == [["a-1", *cells[1], gain, "2", "3,102"]]

    # One seed has no deviation, equal models no star.
    first, second = rows_of(capsys, "--table", folders[0], folders[2])[2:]
    a = [f"{v:.3f}" for v in by_sklearn(y, probs[0]).mean(1)]
    assert first[:4] == ["a-0.25-0", *a, ""] and second[:4] == ["a-1-0", *a, "+0.0 / +0.0"]


def test_differences_of_settings_are_those_of_their_means(runs, capsys):
    folders, y, probs = runs
    weights = np.random.default_rng(0).exponential(size=(evaluate.DRAWS, 60))  # as bootstrap draws
    draws = np.array([evaluate.macro(np.array(evaluate.auroc_auprc(y, p, weights))) for p in probs])
    point = np.mean([by_sklearn(y, p)[0] for p in probs[2:]])
    point -= np.mean([by_sklearn(y, p)[0] for p in probs[:2]])
    ends = np.percentile(draws[2:].mean(0)[0] - draws[:2].mean(0)[0], (97.5, 2.5))
    low, high = point + (point - ends)
    figures.main(["--group", "2", "--differences", *folders])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a-1 - a-0.25"
    assert lines[1].startswith(f"  AUROC {point:+.4f}  95 % interval {low:+.4f} to {high:+.4f}")


def test_pictures(runs, monkeypatch, demo_set):
    folders, drawn = runs[0], {}
    monkeypatch.setattr(evaluate, "save_picture",
                        lambda figure, path, dpi: drawn.update({path: figure.axes}))
    figures.main(["--group", "2", "--classes", "k.png", "--points", "p.png", *folders])
    assert [len(axis.containers) for axis in drawn["k.png"]] == [2, 2]
    with monkeypatch.context() as m:
        fewest = int(runs[1].sum(0).min())
        m.setattr(evaluate, "FEW", fewest + 1)  # that class gets no interval
        figures.main(["--group", "2", "--classes", "few.png", *folders])
    for name, without in (("k.png", 0), ("few.png", (runs[1].sum(0) == fewest).sum())):
        for axis in drawn[name]:
            bars = axis.containers[0].lines[2][0].get_segments()
            assert [len(bar) for bar in bars].count(0) == without
    n = sum(int(row["strat_fold"]) <= 8 for row in read_csv(demo_set / data.DATABASE))
    scores = np.mean([by_sklearn(runs[1], p) for p in runs[2]], 2)
    for k, axis in enumerate(drawn["p.png"]):
        line, = axis.lines
        assert line.get_label() == "a" and axis.get_xscale() == "log"
        assert line.get_xdata().tolist() == [int(n / 4 + 0.5), n]
        assert line.get_ydata() == pytest.approx(scores[:, k].reshape(2, 2).mean(1))
    figures.main(["--points", "p.png", *folders])
    assert [line.get_label() for line in drawn["p.png"][0].lines] == ["a-0", "a-1"]


def test_files_of_pictures(runs, tmp_path):
    """Names that matplotlib would take for formulas, too; the method's picture wants no runs."""
    import matplotlib.pyplot as plt
    from matplotlib.image import imread
    open_before = plt.get_fignums()
    shutil.copytree(runs[0][0], tmp_path / "_x$y$")
    figures.main(["--classes", str(tmp_path / "k.svg"), str(tmp_path / "_x$y$")])
    text = (tmp_path / "k.svg").read_text()
    assert all(f"<!-- {name} (" in text for name in [*CLASSES, "_x$y$"])
    figures.main(["--method", str(tmp_path / "m.png")])
    height, width, _ = imread(tmp_path / "m.png").shape
    assert plt.get_fignums() == open_before
    assert 800 < width < 1000 and 250 < height < 350


@pytest.mark.parametrize("runs, size, want", [
    (["a-seed0", "a-seed1"], 2, ["a"]), (["run_1", "run_2"], 2, ["run"]), (["x"], 1, ["x"]),
    (["xresnet1d101"], 1, ["xresnet1d101"]), (["x-0.5-0", "x-0.5-1"], 2, ["x-0.5"]),
    (["a", "b"], 2, ["a, b"]), (["a-0", "a-1", "b-0"], 3, ["a-0, a-1, b-0"]),
    (["0", "1"], 2, ["0, 1"]), (["run1", "run2"], 2, ["run"]), (["a12", "b/a12"], 2, ["a12"]),
    (["net-50-0", "net-50-1", "net-101-0", "net-101-1"], 2, ["net-50", "net-101"]),
    (["net-0", "net-1", "net-2", "net-3"], 2, ["net-0", "net-2"])])  # else of one name
def test_names_of_settings(runs, size, want):
    assert [name for name, _ in figures.settings_of(runs, size)] == want


@pytest.mark.parametrize("spoil, options, words", [
    (lambda run: (run / "metrics.jsonl").unlink(), "--table", ["a-0.25-0/metrics.jsonl"]),
    (lambda run: (run / "predictions.npz").unlink(), "--table", ["a-0.25-0/predictions.npz"]),
    (lambda run: shutil.copy(run.parent / "a-1-1" / "predictions.npz", run), "--classes c.png",
     ["a-0.25-0/predictions.npz", "test.json", "evaluate.py"]),
    (lambda run: (run / "test.json").unlink(), "--differences", ["a-0.25-0/test.json"]),
    (lambda run: (run / "best.pt").unlink(), "--points c.png", ["a-0.25-0/best.pt"]),
    (lambda run: None, "--table --group 3", ["--group 3"]),
    (lambda run: None, "--table --group 0", ["--group 0"]),
    (lambda run: None, "--points c.xyz", ["c.xyz", ".png"]),
    (lambda run: None, "--method c.png", ["--table"]),
    (lambda run: None, "", ["--table"])])
def test_what_cannot_be_drawn(runs, fails, spoil, options, words):
    spoil(Path(runs[0][0]))
    fails(figures.main, ["--group", "2", *options.split(), *runs[0]], *words)


def test_experiment(tmp_path, monkeypatch, capsys):
    """Each row trains what it is named after; what is done is left out; a failure ends it."""
    calls, done = [], SimpleNamespace(returncode=0)
    monkeypatch.setattr(experiment.subprocess, "run", lambda words: calls.append(words) or done)
    argv = ["--data", "d", "--weights", "none", "--fracs", "1", "0.1", "--seeds", "3", "4",
            "--out", str(tmp_path), "--rows"]
    experiment.main([*argv, *experiment.ROWS, "--", "--amp", "bf16"])
    trained = [post_train.parse(words[2:]) for words in calls[::2]]
    assert len(trained) == 2 * 2 * len(experiment.ROWS)
    for args, predict in zip(trained, calls[1::2]):
        post_train.check(args)
        row, frac, seed = Path(args.out).name.rsplit("-", 2)
        assert predict[2] == f"{args.out}/best.pt" and args.amp == "bf16" and args.resume
        assert (args.frac, args.seed, args.strategy == "baseline") == (
            float(frac), int(seed), row == "baseline")
        assert args.epochs == (0 if "probe" in row else {1: 15, 0.1: 30}[args.frac])
        assert bool(args.probe_epochs) == (row not in ("baseline", "drop-path", "schedule"))
        assert (args.drop_path > 0) == (row not in ("baseline", "preview", "schedule"))
    (tmp_path / "post-1-3").mkdir()
    (tmp_path / "post-1-3" / "predictions.npz").touch()
    calls.clear()
    capsys.readouterr()
    experiment.main([*argv, "post", "--dry-run"])
    assert not calls and len(capsys.readouterr().out.splitlines()) == 3
    done.returncode = 1
    with pytest.raises(SystemExit, match="post-0.1-3 has failed"):
        experiment.main([*argv, "post"])
    assert len(calls) == 1
    done.returncode = 0
    experiment.main([*argv, "post", "--hz100", "--", "--epochs", "3"])
    assert post_train.parse(calls[-2][3:]).epochs == 3
    assert all(words[1].endswith("hz100.py") for words in calls[1:])
    assert {words[2] for words in calls[1:]} == {"post_train.py", "evaluate.py"}


def test_a_network_at_100_hz(tiny, demo_set, tmp_path, monkeypatch):
    """Its predictions are those of its weights on every fifth sample, and not on all."""
    out = tmp_path / "run"
    train = (f"post_train.py --data {demo_set} --task rhythm12 --weights none --probe-epochs 1 "
             f"--epochs 1 --device cpu --out {out}")
    for command in (train, f"evaluate.py {out}/best.pt --device cpu"):
        with monkeypatch.context() as m:
            m.setattr(sys, "argv", ["hz100.py"])
            m.setattr(data, "load_records", data.load_records)  # put back afterwards
            hz100.main(command.split())
    found = np.load(out / "predictions.npz")
    labels = data.load_labels(demo_set, "rhythm12")
    test = labels.take(labels.fold == 10)
    signals = np.load(data.find_cache(demo_set)[0].array)[test.row].astype(np.float32)
    probs = [predicted(out / "best.pt", x) for x in (signals[..., ::5], signals)]
    np.testing.assert_allclose(found["y_prob"], probs[0], atol=1e-6)
    assert np.abs(found["y_prob"] - probs[1]).max() > 1e-3
    score = json.loads((out / "test.json").read_text())["macro_auroc"]
    assert score == pytest.approx(np.nanmean(evaluate.auroc_auprc(test.y, probs[0])[0]), abs=1e-9)


def test_the_readmes_way_to_use_the_network(demo_set, tmp_path, monkeypatch):
    (tmp_path / "ptbxl").symlink_to(demo_set)
    founder = network.ecgfounder(150)
    (tmp_path / "checkpoints").mkdir()
    torch.save({"state_dict": founder.state_dict()}, tmp_path / network.OFFICIAL)
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    record = str(demo_set / "records500/00000/00001_hr")
    exec(code.replace("path/to/record", record), found := {})
    assert found["logits"].shape == (1, 5) and found["features"].shape == (1, 1024)
    with torch.inference_mode():
        torch.testing.assert_close(found["features"], founder.eval().forward_features(found["x"]))
    assert len(found["train"]) == (data.load_labels(demo_set, "all71").fold <= 8).sum()


def test_the_readmes_training_commands_are_understood(tmp_path, monkeypatch):
    """With its variables, and with the options of its tables' rows."""
    values = {"T": "all71", "F": "0.1", **dict(re.findall(r'^(\w)="(.*)"$', README, re.M))}
    commands = re.findall(r"python post_train\.py ([^`\n#&;|]*)", README)
    rows = re.findall(r"^\|[^|]*\| (`--.*) \|$", README, re.M)
    commands += [f"$R {options}" for row in rows for options in re.findall(r"`(--[^`]*)`", row)]
    monkeypatch.chdir(tmp_path)
    commands = [c for c in commands if "--task" in c or "$R" in c]
    assert len(commands) >= 10
    for command in commands:
        command = re.sub(r"\$\{?(\w+)\}?", lambda m: values.get(m[1], "1"), command)
        post_train.check(post_train.parse([*shlex.split(command), "--weights", "none"]))


def test_the_readmes_other_commands_name_what_is_there(monkeypatch, capsys):
    asked = {}
    for script, options in re.findall(r"python ([\w/]+\.py)([^`\n#&|;]*)", README):
        own = options.split(" -- ")[0]  # what follows is another script's
        asked.setdefault(script, set()).update(re.findall(r"(?<!\S)--[a-z-]+", own))
    tools = ("figures", "make_subset", "make_demo", "benchmark", "experiment")
    assert {f"tests/tools/{name}.py" for name in tools} <= set(asked)
    assert {"data.py", "model.py", "evaluate.py"} <= set(asked)
    for script, options in asked.items():
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert options <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out)), script
