"""The training loop: stages, schedules, promises of reproducibility, interruption, several processes."""
import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import evaluate
import model as network
import post_train
from conftest import ROOT, TESTS

KEYS = ["stage", "epoch", "lr", "train_loss", "val_loss", "macro_auroc", "macro_auprc", "seconds", "ecgs_per_second", "peak_memory_mb"]
TIMINGS = ("seconds", "ecgs_per_second", "peak_memory_mb")


def arguments(demo, out, *more):
    return [str(a) for a in ("--data", demo, "--task", "rhythm12", "--weights", "none", "--probe-epochs", "2", "--epochs", "2", "--batch-size", "16",
                             "--device", "cpu", "--out", out, *more)]


def history(out):
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def weights(out, name="last.pt"):
    return torch.load(Path(out, name), weights_only=True)["state_dict"]


def assert_same_run(a, b):
    assert history(a) == history(b)
    for name in ("best.pt", "last.pt"):
        for key, value in weights(a, name).items():
            assert torch.equal(value, weights(b, name)[key]), (name, key)
    assert Path(a, "test.json").read_text() == Path(b, "test.json").read_text()


@pytest.fixture
def run(tiny, tmp_path, capsys):
    """Train in-process with the small network -> the run's folder; what it printed is in run.out."""
    def call(demo, *more, out=None):
        out = Path(out or tmp_path / f"run{len(list(tmp_path.glob('run*')))}")
        capsys.readouterr()
        post_train.main(arguments(demo, out, *more))
        call.out = capsys.readouterr().out
        return out
    return call


# -------------------------------------------------------------------------------------------------------------- schedules

def test_cosine_of_both_stages():
    probe, finetune = post_train.stages_of(post_train.parse(["--task", "all71"]))
    at = post_train.learning_rate
    np.testing.assert_allclose([at(probe, p, []) for p in (0, 0.5, 1)], [5e-3, 2.5e-3, 0], atol=1e-12)
    np.testing.assert_allclose([at(finetune, p, []) for p in (0, 0.5, 1)], [5e-4, (5e-4 + 1e-5) / 2, 1e-5], atol=1e-12)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=5e-4)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40, eta_min=1e-5)
    for step in range(40):
        assert at(finetune, step / 40, []) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("seed", range(5))
def test_plateau_is_torchs(seed):
    baseline = post_train.stages_of(post_train.parse(["--task", "all71", "--strategy", "baseline"]))[1]
    rng = np.random.default_rng(seed)
    aurocs = (0.8 + 0.01 * np.minimum(np.arange(45), 15) + rng.normal(0, 0.003, 45)).round(4).tolist()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.1, patience=10)
    rates = []
    for epoch in range(len(aurocs)):
        rates.append(post_train.learning_rate(baseline, 0, aurocs[:epoch]))
        assert rates[-1] == pytest.approx(optimizer.param_groups[0]["lr"])
        reference.step(aurocs[epoch])
    assert min(rates) < 1e-4  # it did come down


def test_interpolation_tries_the_line_and_keeps_the_best(run, demo):
    """Against weights mixed by hand and scored by evaluate.py."""
    out = run(demo, "--lr", "0.01", "--interpolate")
    lines = [line for line in history(out) if line["stage"] == "interpolate"]
    assert [line["share"] for line in lines] == list(post_train.SHARES) == [0, 0.25, 0.5, 0.75]
    probe, last = weights(out, "probe.pt"), weights(out)
    labels, cache = data.load_labels(demo, "rhythm12"), data.load_cache(demo)
    labels, rows = data.align(labels, cache)
    val, model = labels.fold == 9, network.ecgfounder(12).eval()
    for line in lines:
        share = line["share"]
        model.load_state_dict({key: (1 - share) * probe[key] + share * last[key] for key in last})
        with torch.no_grad():
            logits = model(torch.from_numpy(cache.signals[rows[val]]).float())
        got = np.nanmean(evaluate.auroc_auprc(labels.y[val], logits.numpy()), axis=1)
        np.testing.assert_allclose([line["macro_auroc"], line["macro_auprc"]], got, atol=1e-6)
    best = torch.load(out / "best.pt", weights_only=True)
    candidates = [line for line in history(out) if line["stage"] != "probe"]
    winner = max(candidates, key=lambda line: line["macro_auroc"])
    assert (best["stage"], best["epoch"]) == (winner["stage"], winner["epoch"])
    if winner["stage"] == "interpolate":
        mixed = {key: torch.lerp(probe[key], value, winner["share"]) for key, value in last.items()}
        assert best["share"] == winner["share"]
        assert all(torch.equal(value, mixed[key]) for key, value in best["state_dict"].items())


def test_interpolation_wins_on_request_alone(run, demo, monkeypatch):
    """Made to: a validation that prefers the half-way point; and killed before the test, resumed as it was."""
    real = post_train.validate

    def prefer_the_middle(function, split, device, amp):
        loss, auroc, auprc = real(function, split, device, amp)
        probe = out / "probe.pt"
        if probe.exists() and isinstance(function, network.ECGFounder) and (out / "last.pt").exists():
            start, end = weights(out, "probe.pt")["dense.weight"], weights(out)["dense.weight"]
            if torch.equal(function.dense.weight, torch.lerp(start, end, 0.5)):
                return loss, 2.0, auprc
            if torch.equal(function.dense.weight, torch.lerp(start, end, 0.25)):
                raise post_train.NonFinite("the validation loss is nan")
        return loss, auroc, auprc

    class Killed(BaseException):
        pass

    def kill(*a):
        raise Killed

    out = demo / "run"
    monkeypatch.setattr(post_train, "validate", prefer_the_middle)
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(evaluate, "predict_folds", kill)
        run(demo, "--interpolate", out=out)
    before, best = history(out), torch.load(out / "best.pt", weights_only=True)
    assert [line["share"] for line in before[4:]] == [0, 0.5, 0.75] and best["share"] == 0.5
    run(demo, "--interpolate", "--resume", out=out)
    assert history(out) == before and (out / "test.json").exists()
    again = torch.load(out / "best.pt", weights_only=True)
    assert all(torch.equal(v, again["state_dict"][k]) for k, v in best["state_dict"].items())


@pytest.mark.parametrize("more", [["--strategy", "baseline"], ["--probe-epochs", "0"], ["--epochs", "0"]])
def test_interpolation_needs_both_ends(tiny, demo, tmp_path, fails, more):
    argv = arguments(demo, tmp_path / "run") if "--strategy" not in more else [
        "--data", str(demo), "--task", "rhythm12", "--weights", "none", "--out", str(tmp_path / "run")]
    fails(post_train.main, [*argv, *more, "--interpolate"], "--interpolate", "--probe-epochs")


def test_undefined_scores_are_no_improvement():
    assert post_train.plateaus([0.9] + [None] * 11) == 1


def test_stage_table():
    """The recipes, as the README gives them."""
    parse = post_train.parse
    post, base = parse(["--task", "all71"]), parse(["--task", "all71", "--strategy", "baseline"])
    assert (post.probe_epochs, post.epochs, post.drop_path, post.drop_path_mode, post.dropout, post.batch_size) == (30, 30, 0.5, "constant", 0.05, 256)
    assert (base.probe_epochs, base.epochs, base.drop_path, base.dropout, base.lr) == (0, 30, 0, 0, 1e-4)
    probe, finetune = post_train.stages_of(post)
    assert (probe.optimizer, probe.weight_decay, probe.clip) == ("adamw", 0.1, None)
    assert (finetune.optimizer, finetune.weight_decay, finetune.clip) == ("adamw", 0.05, 1.0)
    official = post_train.stages_of(base)[1]
    assert (official.optimizer, official.weight_decay, official.clip, official.schedule) == ("adam", 1e-5, None, "plateau")
    assert parse(["--task", "all71", "--strategy", "baseline", "--drop-path", "0.2"]).drop_path == 0.2
    assert post.out == "runs/all71-frac1-post-seed0"
    assert parse(["--task", "form19", "--frac", "0.1", "--seed", "3", "--strategy", "baseline"]).out == "runs/form19-frac0.1-baseline-seed3"


def test_optimizers(tiny):
    model = network.ecgfounder(4)
    probe, finetune = post_train.stages_of(post_train.parse(["--task", "all71"]))
    optimizer = post_train.make_optimizer(finetune, [model])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [{p.dim() == 1 for p in g["params"]} for g in optimizer.param_groups] == [{False}, {True}]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.05, 0.0]
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    baseline = post_train.stages_of(post_train.parse(["--task", "all71", "--strategy", "baseline"]))[1]
    coupled = post_train.make_optimizer(baseline, [model])
    assert type(coupled) is torch.optim.Adam
    assert [g["weight_decay"] for g in coupled.param_groups] == [1e-5]


def test_layers_further_from_the_head_train_more_slowly():
    """With SGD in AdamW's place the first step of each parameter is its own rate times its gradient."""
    model = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(4)))
    stage = post_train.stages_of(post_train.parse(["--task", "all71", "--layer-decay", "0.5"]))[1]
    groups = post_train.make_optimizer(stage, list(model)).param_groups
    optimizer = torch.optim.SGD([{"params": g["params"], "scale": g["scale"]} for g in groups], lr=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    gradients = []
    optimizer.register_step_pre_hook(lambda *a: gradients.extend(p.grad.clone() for p in model.parameters()))
    split = post_train.Split(torch.randn(8, 3), np.arange(8), torch.ones(8, 3))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    post_train.train_epoch(model, optimizer, scaler, split, [np.arange(8)], [0.8])
    rates = [rate for rate in (0.1, 0.2, 0.4, 0.8) for _ in ("weight", "bias")]
    for p, old, gradient, rate in zip(model.parameters(), before, gradients, rates):
        torch.testing.assert_close(p.detach(), old - rate * gradient)


def test_batches_of_an_epoch():
    index = post_train.epoch_batches(103, 10, 5, 0, 1)
    assert [len(i) for i in index] == [10] * 10 and len(set(np.concatenate(index))) == 100
    shares = [post_train.epoch_batches(103, 10, 5, rank, 2) for rank in range(2)]
    for whole, a, b in zip(index, *shares):
        assert set(whole) == set(a) | set(b) and len(a) == len(b) == 5
    assert len(post_train.epoch_batches(7, 7, 0, 0, 1)) == 1


def test_every_epoch_has_its_own_seed():
    seeds = {post_train.epoch_seed(s, stage, e, r) for s in range(3) for stage in ("probe", "finetune") for e in range(30) for r in range(3)}
    assert len(seeds) == 3 * 2 * 30 * 3


# -------------------------------------------------------------------------------------------------------------------- run

def test_a_run_leaves_what_it_promises(run, demo):
    out = run(demo, "--interpolate")
    assert sorted(p.name for p in out.iterdir()) == [".lock", "best.pt", "last.pt", "metrics.jsonl", "probe.pt", "test.json"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines, tried = lines[:4], lines[4:]
    assert all(list(line) == KEYS for line in lines)
    assert len(tried) == 4 and all(set(line) == set(KEYS[:2] + KEYS[4:8] + ["share"]) for line in tried)
    assert [(line["stage"], line["epoch"]) for line in lines] == [("probe", 1), ("probe", 2), ("finetune", 1), ("finetune", 2)]
    assert all(line["seconds"] > 0 and line["ecgs_per_second"] > 0 and line["peak_memory_mb"] > 10 for line in lines)
    assert lines[0]["lr"] == 5e-3 and lines[2]["lr"] == 5e-4
    best = torch.load(out / "best.pt", weights_only=True)
    winner = max(lines[2:] + tried, key=lambda line: line["macro_auroc"])
    assert (best["stage"], best["epoch"]) == (winner["stage"], winner["epoch"])
    labels = data.load_labels(demo, "rhythm12")
    assert best["classes"] == labels.classes and best["task"] == "rhythm12" and best["preprocessing"] == "filter"
    assert best["data"] == str(demo.resolve()) and best["args"]["drop_path"] == 0.5 and best["args"]["amp"] == "off"
    assert set(best["versions"]) == {"torch", "numpy", "scipy", "wfdb"} and "optimizer" not in best
    assert best["history"] == (lines + tried)[:len(best["history"])]
    assert set(torch.load(out / "last.pt", weights_only=True)) - set(best) == {"optimizer", "scaler"}
    probe = torch.load(out / "probe.pt", weights_only=True)
    assert (probe["stage"], probe["epoch"]) == ("probe", 2) and "optimizer" not in probe
    scores = json.loads((out / "test.json").read_text())
    assert scores["n"] == int((labels.fold == 10).sum()) and f"macro AUROC {scores['macro_auroc']:.4f}" in run.out
    train, val = int((labels.fold <= 8).sum()), int((labels.fold == 9).sum())
    assert f"{train} records to train and {val} to validate on, batch 16, " in run.out and "random initialization" in run.out


def test_metrics_are_those_of_fold_9(run, demo):
    out = run(demo)
    labels, cache = data.load_labels(demo, "rhythm12"), data.load_cache(demo)
    labels, rows = data.align(labels, cache)
    val = labels.fold == 9
    model = network.ecgfounder(12).eval()
    model.load_state_dict(weights(out))
    with torch.no_grad():
        logits = model(torch.from_numpy(cache.signals[rows[val]]).float())
    line = history(out)[3]
    assert line["val_loss"] == pytest.approx(torch.nn.functional.binary_cross_entropy_with_logits(
        logits, torch.from_numpy(labels.y[val]).float()).item(), abs=1e-6)
    assert line["macro_auroc"] == pytest.approx(np.nanmean(evaluate.auroc_auprc(labels.y[val], logits.numpy())[0]))


def test_probing_on_features_equals_running_the_backbone_in_every_epoch(run, demo):
    out = run(demo, "--epochs", "0", "--probe-epochs", "3", "--dropout", "0")
    labels, rows = data.align(data.load_labels(demo, "rhythm12"), data.load_cache(demo))
    train = np.isin(labels.fold, range(1, 9))
    x, y = torch.from_numpy(data.load_cache(demo).signals[rows[train]]).float(), torch.from_numpy(labels.y[train]).float()
    torch.manual_seed(0)
    model = network.ecgfounder(12).eval()
    optimizer = torch.optim.AdamW([{"params": [model.dense.weight]}, {"params": [model.dense.bias], "weight_decay": 0}], weight_decay=0.1)
    for epoch in range(3):
        order = np.random.RandomState(post_train.epoch_seed(0, "probe", epoch)).permutation(len(x))
        for step in range(3):
            for group in optimizer.param_groups:
                group["lr"] = 5e-3 * (1 + math.cos(math.pi * (epoch + step / 3) / 3)) / 2
            index = order[16 * step:16 * step + 16]  # 49 records: three whole batches
            loss = torch.nn.functional.binary_cross_entropy_with_logits(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for key, value in weights(out).items():
        torch.testing.assert_close(value, model.state_dict()[key], atol=1e-5, rtol=0)


def test_the_probe_leaves_the_backbone_and_fine_tuning_changes_it_all(run, demo):
    torch.manual_seed(0)
    start = network.ecgfounder(12).state_dict()
    probed, tuned = weights(run(demo, "--epochs", "0")), weights(run(demo))
    for key in start:
        assert torch.equal(start[key], probed[key]) == (not key.startswith("dense.")), key
        assert not torch.equal(probed[key], tuned[key]), key


def test_the_best_of_the_probe_counts_only_without_fine_tuning(run, demo):
    assert torch.load(run(demo, "--epochs", "0") / "best.pt", weights_only=True)["stage"] == "probe"
    stages = post_train.stages_of(post_train.parse(["--task", "all71"]))
    lines = [{"stage": "probe", "macro_auroc": 0.9}, {"stage": "finetune", "macro_auroc": 0.5}, {"stage": "finetune", "macro_auroc": 0.7},
             {"stage": "finetune", "macro_auroc": 0.7}, {"stage": "finetune", "macro_auroc": None}]
    assert [post_train.best_epoch(lines[:n], stages) for n in range(1, 6)] == [None, 1, 2, 2, 2]  # the earliest of equals


def test_baseline_and_ablations_run(run, demo):
    out = run(demo, "--strategy", "baseline", "--probe-epochs", "0")
    assert [line["stage"] for line in history(out)] == ["finetune"] * 2 and history(out)[0]["lr"] == 1e-4
    saved = torch.load(out / "last.pt", weights_only=True)
    assert saved["args"]["drop_path"] == 0 and {g["weight_decay"] for g in saved["optimizer"]["param_groups"]} == {1e-5}
    linear = run(demo, "--drop-path-mode", "linear", "--drop-path", "0.8", "--probe-epochs", "0", "--preprocess", "raw")
    assert torch.load(linear / "best.pt", weights_only=True)["preprocessing"] == "raw" and (demo / "cache" / "raw.npy").exists()


def test_training_starts_from_weights(run, demo, tmp_path):
    first = run(demo, "--seed", "5")
    again = run(demo, "--weights", first / "best.pt", "--epochs", "0", "--task", "diagnostic44")  # our checkpoint, another task
    a, b = weights(first, "best.pt"), weights(again)
    assert all(torch.equal(a[key], b[key]) for key in a if not key.startswith("dense.")) and b["dense.bias"].shape == (44,)


def test_a_new_head_is_unrelated_to_that_of_the_pretraining(run, demo, monkeypatch):
    """One seed, one task, so that a head drawn from the seed alone would be the one that the features grew up with."""
    first, heads, real = run(demo, "--seed", "0"), [], post_train.train_epoch

    def seen(net, *rest):
        heads.append(net[1].weight.detach().flatten().clone())
        return real(net, *rest)

    monkeypatch.setattr(post_train, "train_epoch", seen)
    for seed in (0, 0, 1):
        run(demo, "--seed", str(seed), "--weights", first / "best.pt", "--epochs", "0", "--probe-epochs", "1")
    again, same, other = heads
    torch.manual_seed(0)
    drawn = network.ecgfounder(12).dense.weight.detach().flatten()
    grown = weights(first, "best.pt")["dense.weight"].flatten()
    assert torch.equal(again, same) and torch.corrcoef(torch.stack([drawn, grown]))[0, 1] > 0.5
    assert torch.corrcoef(torch.stack([drawn, grown, again, other])).triu(1)[:, 2:].abs().max() < 0.25


def test_the_fraction_acts_on_the_training_folds_alone(run, demo):
    run(demo, "--frac", "0.25", "--probe-epochs", "1", "--epochs", "0")
    assert "12 records to train and 5 to validate on, batch 12 (not 16)" in run.out


def test_unreadable_records_are_left_out_on_request(run, demo, tmp_path, fails):
    shutil.rmtree(demo / "cache")
    labels = data.load_labels(demo, "rhythm12")
    for fold in (1, 10):
        (demo / f"records500/00000/{labels.ecg_id[labels.fold == fold][0]:05d}_hr.dat").unlink()
    fails(post_train.main, arguments(demo, tmp_path / "run"), "2 records cannot be read", "--skip-unreadable")
    out = run(demo, "--skip-unreadable")
    assert f"{(labels.fold <= 8).sum() - 1} records to train" in run.out
    evaluate.main([str(out / "best.pt"), "--json", str(tmp_path / "s.json")])  # the checkpoint remembers
    assert json.loads((tmp_path / "s.json").read_text())["n"] == (labels.fold == 10).sum() - 1


def test_bf16_on_request(run, demo):
    out = run(demo, "--amp", "bf16")
    a, b = history(out)[3], history(run(demo))[3]
    assert a["train_loss"] != b["train_loss"] and a["train_loss"] == pytest.approx(b["train_loss"], rel=0.05)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_it_trains_the_same(run, demo):
    a, b = (run(demo, "--probe-epochs", "0", "--epochs", "1", "--drop-path", "0", "--dropout", "0", *more) for more in ((), ("--compile",)))
    assert history(a)[0]["train_loss"] == pytest.approx(history(b)[0]["train_loss"], rel=1e-4)
    assert weights(a).keys() == weights(b).keys()


def test_two_runs_of_one_seed_are_equal_and_of_two_are_not(run, demo):
    a, b, c = run(demo), run(demo), run(demo, "--seed", "1")
    assert_same_run(a, b)
    assert history(a) != history(c)


def test_fold_10_is_touched_by_nothing_before_the_end(run, demo, tmp_path):
    """Other labels and other signals in fold 10 change test.json, and nothing else of the run."""
    changed = tmp_path / "changed"
    shutil.copytree(demo, changed)
    shutil.rmtree(changed / "cache")
    with open(changed / "ptbxl_database.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    for row in rows:
        if row["strat_fold"] == "10":
            row["scp_codes"] = "{'NORM': 100.0, 'PACE': 0.0}" if int(row["ecg_id"]) % 2 else "{'IMI': 100.0, 'AFLT': 0.0}"
            path = changed / f"{row['filename_hr']}.dat"
            path.write_bytes(np.random.default_rng(0).integers(-900, 900, path.stat().st_size // 2).astype("<i2").tobytes())
    with open(changed / "ptbxl_database.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    a, b = run(demo), run(changed)
    assert history(a) == history(b)
    for name in ("best.pt", "last.pt"):
        assert all(torch.equal(v, weights(b, name)[k]) for k, v in weights(a, name).items())
    assert (a / "test.json").read_text() != (b / "test.json").read_text()


# ------------------------------------------------------------------------------------------------------ killed and resumed

def tiny_run(demo, out, *more, **options):
    """A process of its own that trains the small network."""
    command = [sys.executable, str(TESTS / "tiny.py"), "post_train.py", *arguments(demo, out, *more)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, **options)


@pytest.fixture(scope="module")
def undisturbed(demo_set, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    process = tiny_run(demo_set, out)
    assert process.communicate()[0] and process.returncode == 0
    return out


@pytest.mark.parametrize("moment", ["save best", "save last", "after probe 1", "in finetune 2", "test"])
def test_killed_at_a_moment_and_resumed(run, demo_set, undisturbed, tmp_path, monkeypatch, moment):
    """Ends as by SIGKILL (nothing after that point runs), in-process so that the moment is exact; then --resume."""
    class Killed(BaseException):
        pass

    def kill(*a, **k):
        raise Killed

    out, real_save, real_train = tmp_path / "run", post_train.save, post_train.train_epoch
    calls = []
    with monkeypatch.context() as m:
        if moment.startswith("save"):
            m.setattr(post_train, "save", lambda path, c: kill() if path.name == moment.split()[1] + ".pt" and c["stage"] == "finetune" else real_save(path, c))
        elif moment == "test":
            m.setattr(evaluate, "predict_folds", kill)
        else:
            epochs_before = 1 if moment == "after probe 1" else 3
            m.setattr(post_train, "train_epoch", lambda *a: kill() if len(calls) == epochs_before else (calls.append(1), real_train(*a))[1])
        with pytest.raises(Killed):
            run(demo_set, out=out)
    run(demo_set, "--resume", out=out)
    assert "going on after" in run.out
    assert_same_run(out, undisturbed)
    run(demo_set, "--resume", out=out)
    assert "finished" in run.out


def test_last_names_the_epoch_of_best_at_every_moment(run, demo, monkeypatch):
    real, seen = post_train.save, []

    def save(path, checkpoint):
        real(path, checkpoint)
        last = torch.load(path.with_name("last.pt"), weights_only=True)
        if path.with_name("best.pt").exists():
            best = torch.load(path.with_name("best.pt"), weights_only=True)
            assert best["history"] == last["history"][:len(best["history"])]
            assert "optimizer" not in best and "scaler" not in best
        seen.append(path.name)

    monkeypatch.setattr(post_train, "save", save)
    run(demo)
    assert seen[:5] == ["last.pt", "last.pt", "probe.pt", "last.pt", "best.pt"]


def test_a_kill_between_the_two_files_loses_no_best(run, demo_set, undisturbed, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def save(path, checkpoint):
        if path.name == "best.pt":
            raise Killed
        real(path, checkpoint)

    out, real = tmp_path / "run", post_train.save
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(post_train, "save", save)
        run(demo_set, out=out)
    assert not (out / "best.pt").exists() and weights(out)
    run(demo_set, "--resume", out=out)
    assert_same_run(out, undisturbed)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals(demo_set, undisturbed, tmp_path, number, status):
    out = tmp_path / "run"
    process = tiny_run(demo_set, out, "--epochs", "2")
    deadline = time.time() + 120
    while not (out / "last.pt").exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    errors = process.communicate()[1]
    assert process.returncode == status
    assert "--resume" in errors and "Traceback" not in errors and len(errors.strip().splitlines()) == 1
    assert not [p for p in out.iterdir() if p.name.startswith(".") and p.name != ".lock"]
    torch.load(out / "last.pt", weights_only=True)
    process = tiny_run(demo_set, out, "--resume")
    assert "going on after" in process.communicate()[0]
    assert_same_run(out, undisturbed)


def test_resume_without_a_run_starts_anew(run, demo):
    out = run(demo, "--resume")
    assert "no last.pt to go on from, starting anew" in run.out and len(history(out)) == 4


def test_one_process_at_a_time_trains_in_a_folder(tiny, demo_set, tmp_path, fails):
    (tmp_path / "run").mkdir()
    with data.locked(tmp_path / "run", post_train.OUTPUTS):
        fails(post_train.main, arguments(demo_set, tmp_path / "run"), "another process is training there")
    post_train.main(arguments(demo_set, tmp_path / "run"))


def test_a_moved_data_set_does_not_stop_a_resume(run, demo, tmp_path):
    out = run(demo)
    (out / "test.json").unlink()
    run(Path(shutil.move(demo, tmp_path / "moved")), "--resume", out=out)
    assert (out / "test.json").exists()


def test_other_records_stop_a_resume(run, demo, fails):
    out = run(demo)
    (out / "test.json").unlink()
    table = demo / data.TABLES[0]
    text = table.read_text()
    assert ",1,records100/" in text and ",9,records100/" in text
    table.write_text(text.replace(",1,records100/", ",9,records100/", 1))  # a training record goes to the validation fold
    fails(post_train.main, [*arguments(demo, out), "--resume"], "other records", "--data")
    table.write_text(text)
    run(demo, "--resume", out=out)
    assert (out / "test.json").exists()


def test_a_finished_run_does_not_take_other_arguments(run, demo_set, fails):
    out = run(demo_set)
    fails(post_train.main, [*arguments(demo_set, out), "--epochs", "9", "--resume"], "--epochs was 2, now 9")


def test_a_non_finite_loss_stops_the_run(run, demo, monkeypatch, capsys):
    out = run(demo, "--epochs", "1")
    with monkeypatch.context() as m, pytest.raises(SystemExit) as stop:
        forward = network.ECGFounder.forward
        m.setattr(network.ECGFounder, "forward", lambda self, x: forward(self, x) * (torch.inf if self.training else 1))
        run(demo, "--epochs", "1", out=out.parent / "bad")
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "finetune epoch 1" in error and "step 1 of 3" in error and "--amp bf16" in error
    last = torch.load(out.parent / "bad" / "last.pt", weights_only=True)
    assert last["stage"] == "probe" and last["epoch"] == 2


@pytest.mark.parametrize("amp, wrong", [("bf16", torch.bfloat16), ("bf16", None), ("off", None)])
def test_a_machine_that_computes_wrongly_is_found_out(tiny, demo, tmp_path, monkeypatch, fails, amp, wrong):
    """A convolution whose channels come in the wrong order in low precision, as a faulty kernel might leave them."""
    forward = network.SameConv1d.forward

    def faulty(self, x):
        out = forward(self, x)
        return out.flip(1) if out.dtype == wrong and self.conv.in_channels == 12 else out

    monkeypatch.setattr(network.SameConv1d, "forward", faulty)
    argv = arguments(demo, tmp_path / "run", "--amp", amp)
    if wrong:
        fails(post_train.main, argv, "wrongly in bfloat16", "--amp off")
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    else:
        post_train.main(argv)


def test_features_that_are_not_finite_are_found_out(tiny, demo, tmp_path, monkeypatch, fails):
    forward = network.ECGFounder.forward_features
    monkeypatch.setattr(network.ECGFounder, "forward_features",
                        lambda self, x: forward(self, x) / (not torch.is_autocast_enabled("cpu")))
    fails(post_train.main, arguments(demo, tmp_path / "run", "--amp", "bf16"), "wrongly in bfloat16")


def test_peak_memory_is_counted_in_the_systems_unit(monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3 * 2**20))
    for platform, megabytes in (("linux", 3 * 2**10), ("darwin", 3)):
        monkeypatch.setattr(sys, "platform", platform)
        assert post_train.peak_memory_mb(torch.device("cpu")) == megabytes


def test_without_posix_modules_it_imports_and_says_what_it_lacks(demo_set, tmp_path):
    """As on Windows."""
    code = ("import sys; sys.modules['fcntl'] = sys.modules['resource'] = None\n"
            "import post_train; post_train.main(sys.argv[1:])")
    done = subprocess.run([sys.executable, "-c", code, *arguments(demo_set, tmp_path / "run")], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and "Linux or macOS" in done.stderr and "WSL" in done.stderr
    assert done.stderr.count("\n") == 1


def test_gradient_scaler_skips_and_counts_infinite_steps():
    """The fp16 path on the CPU: torch's scaler works there too."""
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    stage = post_train.stages_of(post_train.parse(["--task", "all71"]))[1]
    optimizer = post_train.make_optimizer(stage, [model])
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38)  # the first scaled gradients overflow
    split = post_train.Split(torch.randn(8, 3) * 1000, np.arange(8), torch.ones(8, 2))
    loss, skipped = post_train.train_epoch(model, optimizer, scaler, split, [np.arange(8)] * 3, [1e-3] * 3, clip=1.0)
    assert skipped >= 1 and math.isfinite(loss) and scaler.get_scale() < 3e38
    assert not torch.equal(model.weight, before) if skipped < 3 else torch.equal(model.weight, before)


def test_the_gradient_norm_is_clipped():
    model = torch.nn.Linear(3, 2)
    seen = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *a: seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()))
    for clip in (None, 0.01):
        split = post_train.Split(torch.ones(4, 3) * 9, np.arange(4), torch.ones(4, 2))
        post_train.train_epoch(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), split, [np.arange(4)], [0.0], clip)
    assert seen[0] > 0.1 and seen[1] == pytest.approx(0.01, rel=1e-3)


# --------------------------------------------------------------------------------------------------------- several devices

def torchrun(n, demo, out, *more, script=TESTS / "tiny.py"):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), str(script), "post_train.py",
               *arguments(demo, out, "--drop-path", "0", "--dropout", "0", "--batch-size", "12", *more)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_equal_one(demo_set, tmp_path):
    out = torchrun(2, demo_set, tmp_path / "two")
    torchrun(1, demo_set, tmp_path / "one")
    assert out.count("finetune 1/2") == 1  # rank 0 alone speaks
    for a, b in zip(history(tmp_path / "one"), history(tmp_path / "two")):
        assert a.keys() == b.keys() and all(x == y or x == pytest.approx(y, abs=1e-5) for x, y in zip(a.values(), b.values()))
    for key, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(value, weights(tmp_path / "two")[key], atol=1e-5, rtol=0)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_no_thread_of_a_process_group_outlives_the_run(demo_set, tmp_path):
    """Such a thread may still hold a tensor while the interpreter goes down, which aborts the process (pytorch/pytorch#179291)."""
    script = tmp_path / "threads.py"
    script.write_text(f"""import os, runpy, sys, time
import torch.distributed as dist
def threads():
    return set(os.listdir("/proc/self/task"))
init, destroy, started = dist.init_process_group, dist.destroy_process_group, set()
def initialize(backend):
    before = threads()
    init(backend)
    started.update(threads() - before)
def counting():
    destroy()
    deadline = time.monotonic() + 5  # the kernel lists a joined thread a moment longer
    while started & threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    with open({str(tmp_path)!r} + "/gloo" + os.environ["RANK"], "w") as f:
        print(len(started), len(started & threads()), file=f)
dist.init_process_group, dist.destroy_process_group = initialize, counting
sys.path.insert(0, {str(TESTS)!r})
sys.argv[0] = {str(TESTS / "tiny.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
""")
    torchrun(2, demo_set, tmp_path / "run", script=script)
    for rank in range(2):
        before, after = (tmp_path / f"gloo{rank}").read_text().split()
        assert int(before) >= 1 and int(after) == 0


# ------------------------------------------------------------------------------------------------------------ the options

def test_every_option_explains_itself(capsys):
    with pytest.raises(SystemExit):
        post_train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option in ("--task --frac --data --preprocess --weights --out --seed --strategy --probe-epochs --epochs --batch-size --probe-lr --lr --drop-path "
                   "--drop-path-mode --dropout --amp --device --resume --compile --skip-unreadable").split():
        assert f" {option} " in text
    assert text.count("community-derived") >= 6 and text.count("default: ") >= 15


# ------------------------------------------------------------------------------------------------------- the whole network

def test_the_whole_road_with_the_whole_network(demo_set, tmp_path, capsys):
    """30.7 M parameters, both stages, then evaluate.py: on 12 synthetic records."""
    post_train.main(arguments(demo_set, tmp_path / "run", "--frac", "0.25", "--probe-epochs", "1", "--epochs", "1"))
    assert sum(v.numel() for v in weights(tmp_path / "run").values()) == 30_752_646 - 150 * 1025 + 12 * 1025
    capsys.readouterr()
    evaluate.main([str(tmp_path / "run" / "best.pt")])
    assert "6 records" in capsys.readouterr().out


@pytest.mark.real
def test_it_learns_from_real_records(tiny, real, tmp_path):
    """The small network on a tenth of the real records: the loss falls and the ranking is better than chance."""
    post_train.main(["--data", str(real), "--task", "superclass5", "--weights", "none", "--frac", "0.1", "--probe-epochs", "2", "--epochs", "6", "--drop-path", "0",
                     "--batch-size", "16", "--lr", "0.003", "--device", "cpu", "--out", str(tmp_path / "run")])
    lines = [line for line in history(tmp_path / "run") if line["stage"] == "finetune"]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"] and max(line["macro_auroc"] for line in lines) > 0.6
