"""The training loop: recipe, schedules, reproducibility, interruption, several processes."""
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import evaluate
import model as network
import post_train
from helpers import (ROOT, TESTS, arguments, assert_same_run, edit_csv, history,
                     prefer_the_middle, states_kept, weights, write_csv)

NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)
SHORT = "--probe-epochs", "0", "--epochs", "1"
ONE_PROBE = "--probe-epochs", "1", "--epochs", "0"


def parse(*more):
    return post_train.parse(["--task", "all71", *more])


FINETUNE = post_train.stages_of(parse())[1]
BASELINE = post_train.stages_of(parse("--strategy", "baseline"))[1]


def checkpoint(out, name):
    return torch.load(out / f"{name}.pt", weights_only=True)


def best_of_probe(lines):
    """The epoch, from 1, of the probe's first line with the best AUROC."""
    aurocs = [line["macro_auroc"] for line in lines if line["stage"] == "probe"]
    return 1 + aurocs.index(max(aurocs))


@pytest.fixture
def run(tiny, monkeypatch, tmp_path, capsys):
    """Train the small network in this process -> the run's folder; run.out is what it printed."""
    def call(demo, *more, out=None):
        out = out or tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        capsys.readouterr()
        post_train.main(arguments(demo, out, *more))
        call.out = capsys.readouterr().out
        return out
    prefer_the_middle(monkeypatch)
    return call


# ------------------------------------------------------------------------------------------- recipe

def test_the_published_recipes():
    def recipe(*more):
        args = parse(*more)
        rest = args.drop_path, args.drop_path_mode, args.dropout, args.batch_size, args.interpolate
        return post_train.stages_of(args), rest, args.out

    probe = ("probe", 30, 1e-3, 0.0, "cosine", "adamw", 0.1, None, 1.0)
    finetune = ("finetune", 30, 5e-4, 1e-5, "cosine", "adamw", 0.05, 1.0, 1.0)
    official = ("finetune", 30, 1e-4, 0.0, "plateau", "adam", 1e-5, None, 1.0)
    assert recipe() == ((probe, finetune), (0.5, "constant", 0.05, 32, True),
                        "runs/all71-frac1-post-seed0")
    assert recipe("--strategy", "baseline", "--frac", "0.1", "--seed", "3") == (
        (("probe", 0, *probe[2:]), official), (0, "constant", 0, 256, False),
        "runs/all71-frac0.1-baseline-seed3")
    given = ("--probe-epochs 7 --probe-lr 2 --epochs 8 --lr 3 --layer-decay 0.4 --drop-path 0.1 "
             "--drop-path-mode linear --dropout 0.2 --batch-size 9 --no-interpolate --out x")
    assert recipe(*given.split()) == (
        (("probe", 7, 2.0, *probe[3:]), ("finetune", 8, 3.0, *finetune[3:8], 0.4)),
        (0.1, "linear", 0.2, 9, False), "x")


@pytest.mark.parametrize("steps, more, epochs", [
    (1, "", 30), (6, "", 30), (20, "", 10), (67, "", 3), (544, "", 1), (67, "--epochs 0", 30),
    (67, "--probe-epochs 7", 7), (67, "--strategy baseline", 0)])
def test_length_of_the_preview(steps, more, epochs):
    assert post_train.stages_of(parse(*more.split()), steps)[0].epochs == epochs


def test_every_option_explains_itself(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    others = ("task frac data preprocess weights out seed strategy drop_path_mode amp device "
              "resume compile skip_unreadable").split()
    table = [key for key, setting in post_train.RECIPE.items() if setting.help]
    assert all(f" --{option.replace('_', '-')}" in text for option in others + table)
    assert "(default: 0.5, community; with --strategy baseline 0.0, official)" in text
    assert text.count(", community") >= 4 and text.count("default: ") >= 15
    assert post_train.SOURCES in text


def test_cosine_is_torchs():
    for lr, final in ((5e-3, 0.0), (5e-4, 1e-5)):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr)
        reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40, final)
        stage = FINETUNE._replace(lr=lr, final_lr=final, epochs=4)
        rates = [post_train.learning_rates(stage, epoch, 10, []) for epoch in range(4)]
        for rate in np.concatenate(rates):
            assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6, abs=1e-12)
            optimizer.step()
            reference.step()


@pytest.mark.parametrize("seed", range(5))
def test_plateau_is_torchs(seed):
    noise = np.random.default_rng(seed).normal(0, 0.003, 45)
    aurocs = (0.8 + 0.01 * np.minimum(np.arange(45), 15) + noise).round(4).tolist()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", 0.1, patience=10)
    for epoch, auroc in enumerate(aurocs):
        rate, same = post_train.learning_rates(BASELINE, epoch, 2, aurocs[:epoch])
        assert rate == same == pytest.approx(optimizer.param_groups[0]["lr"])
        reference.step(auroc)
    assert rate < 1e-4  # it did come down
    flat = [0.9] * 12  # no improvement
    rates = [post_train.learning_rates(BASELINE, n, 1, flat[:n]) for n in (11, 12)]
    assert rates == [[1e-4], [pytest.approx(1e-5)]]


def test_optimizers():
    """Layers further from the head train more slowly; AdamW spares vectors from weight decay."""
    model = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(4)))
    split = post_train.Split(torch.randn(8, 3), np.arange(8), torch.ones(8, 3))
    for kind, stage, decays in ((torch.optim.AdamW, FINETUNE, [0.05, 0] * 4),
                                (torch.optim.Adam, BASELINE, [1e-5] * 8)):
        optimizer = post_train.make_optimizer(stage._replace(layer_decay=0.5), list(model))
        assert type(optimizer) is kind
        post_train.train_epoch(model, optimizer, NO_SCALER, split, [np.arange(8)], [0.8])
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        found = [groups[id(p)] for p in model.parameters()]  # of each layer weight and bias
        assert [group["weight_decay"] for group in found] == decays
        assert [group["lr"] for group in found] == [0.1, 0.1, 0.2, 0.2, 0.4, 0.4, 0.8, 0.8]
        assert sum(len(group["params"]) for group in optimizer.param_groups) == 8


def test_the_gradient_norm_is_clipped():
    model, norms = torch.nn.Linear(3, 2), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *a: norms.append(
        torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()))
    split = post_train.Split(torch.ones(4, 3) * 9, np.arange(4), torch.ones(4, 2))
    for clip in (None, 0.01):
        post_train.train_epoch(model, optimizer, NO_SCALER, split, [np.arange(4)], [0.0], clip)
    assert norms[0] > 0.1 and norms[1] == pytest.approx(0.01, rel=1e-3)


def test_gradient_scaler_skips_and_counts_infinite_steps():
    """The fp16 path on the CPU: torch's scaler works there too."""
    model = torch.nn.Linear(3, 2)
    before, optimizer = model.weight.detach().clone(), post_train.make_optimizer(FINETUNE, [model])
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38)  # the first scaled gradients overflow
    split = post_train.Split(torch.randn(8, 3) * 1000, np.arange(8), torch.ones(8, 2))
    loss, skipped = post_train.train_epoch(model, optimizer, scaler, split, [np.arange(8)] * 3,
                                           [1e-3] * 3, clip=1.0)
    assert skipped >= 1 and math.isfinite(loss) and scaler.get_scale() < 3e38
    assert torch.equal(model.weight, before) == (skipped == 3)


def test_batches_and_seeds_of_an_epoch():
    index = post_train.epoch_batches(103, 10, 5, 0, 1)
    assert [len(i) for i in index] == [10] * 10 and len(set(np.concatenate(index))) == 100
    shares = [post_train.epoch_batches(103, 10, 5, rank, 2) for rank in range(2)]
    for whole, a, b in zip(index, *shares):
        assert set(whole) == set(a) | set(b) and len(a) == len(b) == 5
    assert len(post_train.epoch_batches(7, 7, 0, 0, 1)) == 1
    of_each = itertools.product(range(3), ("probe", "finetune"), range(30), range(3))
    assert len({post_train.epoch_seed(*key) for key in of_each}) == 3 * 2 * 30 * 3


# -------------------------------------------------------------------------------------------- a run

def test_a_preview_has_about_200_steps(tiny, demo_set, tmp_path):
    """Of 49 steps an epoch; the run goes on with the same arguments."""
    out = tmp_path / "run"
    argv = arguments(demo_set, out, "--batch-size", "1", "--epochs", "1", "--no-interpolate")
    at = argv.index("--probe-epochs")
    argv = argv[:at] + argv[at + 2:]
    post_train.main(argv)
    (out / "test.json").unlink()
    post_train.main([*argv, "--resume"])
    assert [line["stage"] for line in history(out)] == ["probe"] * 4 + ["finetune"]


def test_a_run_leaves_what_it_promises(run, demo_set, undisturbed):
    out = run(demo_set, "--resume")  # nothing to go on from: it begins anew
    assert_same_run(out, undisturbed)
    assert {p.name for p in out.iterdir()} == {".lock", *post_train.OUTPUTS}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    always = {"stage", "epoch", "val_loss", "macro_auroc", "macro_auprc", "seconds"}
    epochs = {*always, "lr", "train_loss", "ecgs_per_second"}
    assert [set(line) for line in lines] == [epochs] * 4 + [{*always, "share"}] * 4
    assert [f"{line['stage']} {line['epoch']}" for line in lines[:4]] == [
        "probe 1", "probe 2", "finetune 1", "finetune 2"]
    assert lines[0]["lr"] == 1e-3 and lines[2]["lr"] == 5e-4
    assert all(line["seconds"] > 0 for line in lines)
    assert all(line["ecgs_per_second"] > 0 for line in lines[:4])

    best, last, probe = (checkpoint(out, name) for name in ("best", "last", "probe"))
    labels = data.load_labels(demo_set, "rhythm12")
    said = [best[key] for key in ("task", "classes", "leads", "preprocessing", "data")]
    assert said == ["rhythm12", labels.classes, list(data.LEADS), "filter", str(demo_set.resolve())]
    assert best["args"]["drop_path"] == 0.5 and best["args"]["amp"] == "off"
    assert set(best["versions"]) == {"torch", "numpy", "scipy", "wfdb"}
    assert set(last) - set(best) == {"optimizer", "scaler"}
    assert set(best) - set(probe) == {"thresholds", "positives"}
    assert last["history"] == lines[:4] and probe["history"] == lines[:best_of_probe(lines)]

    scores = json.loads((out / "test.json").read_text())
    train, val, test = (np.isin(labels.fold, k).sum() for k in (range(1, 9), 9, 10))
    assert scores["n"] == test and f"best.pt on fold 10  {scores['macro_auroc']:.4f}" in run.out
    assert f"{train} records to train and {val} to validate on, batch 16, random " in run.out


def test_scores_are_those_of_fold_9_and_the_best_is_kept(undisturbed, demo_set, tiny):
    """Against weights mixed by hand and scored by evaluate.py."""
    lines, shares = history(undisturbed), [0, 0.25, 0.5, 0.75]
    assert [line["share"] for line in lines[4:]] == shares
    probe, last = weights(undisturbed, "probe.pt"), weights(undisturbed)
    mixed = [{key: (1 - s) * probe[key] + s * last[key] for key in last} for s in shares]
    labels, signals = data.load_records(demo_set, "rhythm12")
    val, model = labels.take(labels.fold == 9), network.ecgfounder(12).eval()
    x, y = torch.from_numpy(signals[val.row]).float(), torch.from_numpy(val.y).float()
    of_probe = lines[best_of_probe(lines) - 1]
    for line, state in zip([of_probe, *lines[3:]], [probe, last, *mixed], strict=True):
        model.load_state_dict(state)
        logits = model(x).detach()
        auroc, auprc = np.nanmean(evaluate.auroc_auprc(y, logits), axis=1)
        wanted = [F.binary_cross_entropy_with_logits(logits, y), auprc, auroc]
        found = [line["val_loss"], line["macro_auprc"], line["macro_auroc"]]
        n = 2 if "share" in line else 3  # interpolations' AUROCs are made to be preferred
        np.testing.assert_allclose(found[:n], wanted[:n], atol=1e-6)
    best = checkpoint(undisturbed, "best")
    assert (best["stage"], best["epoch"], best["history"][-1]["share"]) == ("interpolate", 3, 0.5)
    for key, value in best["state_dict"].items():
        torch.testing.assert_close(value, mixed[2][key], atol=1e-6, rtol=0)


@pytest.mark.parametrize("epochs, wanted", [
    ("4", ["probe.pt", "probe.pt", "best.pt", "best.pt", "", "", "", "best.pt"]),
    ("0", ["probe.pt best.pt", "probe.pt best.pt"])])
def test_the_best_is_of_fine_tuning_where_there_is_any(monkeypatch, epochs, wanted):
    """And of the earliest of equals."""
    aurocs = {"probe": (0.8, 0.9), "finetune": (0.5, 0.7, 0.7, 0.6), "interpolate": (0.7, 0.8)}
    lines = [{"stage": stage, "epoch": i, "macro_auroc": value}
             for stage, values in aurocs.items() for i, value in enumerate(values, 1)]
    args = parse("--probe-epochs", "2", "--epochs", epochs)
    for i, names in enumerate(wanted, 1):
        saved = []
        monkeypatch.setattr(post_train, "save", lambda run, name: saved.append(name))
        post_train.save_best(SimpleNamespace(args=args, rank=0, history=lines[:i]))
        assert saved == names.split()


def test_probing_on_features_equals_running_the_backbone_in_every_epoch(run, demo_set):
    out = run(demo_set, "--epochs", "0", "--probe-epochs", "3", "--dropout", "0")
    assert len(history(out)) == 3  # without fine-tuning there is nothing to interpolate
    labels, signals = data.load_records(demo_set, "rhythm12")
    train = labels.take(labels.fold <= 8)
    x, y = torch.from_numpy(signals[train.row]).float(), torch.from_numpy(train.y).float()
    torch.manual_seed(0)
    model = network.ecgfounder(12).eval()
    bias = {"params": [model.dense.bias], "weight_decay": 0}
    optimizer = torch.optim.AdamW([{"params": [model.dense.weight]}, bias], weight_decay=0.1)
    for epoch in range(3):
        seed = post_train.epoch_seed(0, "probe", epoch)
        order = np.random.RandomState(seed).permutation(len(x))
        for step in range(3):  # 49 records: three whole batches
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (1 + math.cos(math.pi * (epoch + step / 3) / 3)) / 2
            index = order[16 * step:16 * step + 16]
            F.binary_cross_entropy_with_logits(model(x[index]), y[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
    for key, value in weights(out).items():
        torch.testing.assert_close(value, model.state_dict()[key], atol=1e-5, rtol=0)


def test_fine_tuning_begins_with_the_probes_best_epoch(run, demo_set, undisturbed):
    """At a rate of nearly 0 it stays there; else it changes every tensor."""
    out = run(demo_set, "--lr", "1e-30")
    probe, tuned = checkpoint(out, "probe"), weights(undisturbed)
    assert probe["epoch"] == best_of_probe(history(out)) < 2  # so that the last is another
    for key, value in weights(out).items():
        assert torch.equal(value, probe["state_dict"][key]), key
        assert not torch.equal(value, tuned[key]), key


def test_baseline_and_ablations(run, demo, monkeypatch):
    built, build, clips, train = [], network.ecgfounder, [], post_train.train_epoch
    monkeypatch.setattr(network, "ecgfounder", lambda *a: built.append(a) or build(*a))
    monkeypatch.setattr(post_train, "train_epoch", lambda *a: clips.append(a[6]) or train(*a))
    out = run(demo, "--strategy", "baseline", *SHORT)
    assert [(line["stage"], line["lr"]) for line in history(out)] == [("finetune", 1e-4)]
    assert checkpoint(out, "last")["optimizer"]["param_groups"][0]["weight_decay"] == 1e-5
    assert built[0] == (12, 12, 0, "constant", 0)
    built.clear()
    out = run(demo, "--drop-path-mode", "linear", "--drop-path", "0.8", "--dropout", "0.3",
              "--preprocess", "raw", *SHORT)
    assert built[0] == (12, 12, 0.8, "linear", 0.3)
    assert clips == [None, 1.0]
    assert checkpoint(out, "best")["preprocessing"] == "raw"
    assert data.find_cache(demo, how="raw")[0].array.exists()


def test_from_weights_come_all_but_an_unrelated_head(run, demo_set, undisturbed):
    """A head drawn from the seed alone would be the one that the features grew up with."""
    options = "--weights", undisturbed / "best.pt", *ONE_PROBE, "--probe-lr", "1e-30"
    again, same, other = (run(demo_set, *options, "--seed", seed) for seed in (0, 0, 1))
    assert history(again) == history(same) != history(other)
    before, after = weights(undisturbed, "best.pt"), weights(other)
    assert all(torch.equal(before[key], after[key]) for key in before if key[:5] != "dense")
    torch.manual_seed(0)
    heads = [network.ecgfounder(12).dense.weight.detach(), before["dense.weight"],
             *(weights(out)["dense.weight"] for out in (again, other))]
    correlation = torch.corrcoef(torch.stack([head.flatten() for head in heads]))
    assert correlation[0, 1] > 0.5 and correlation.triu(1)[:, 2:].abs().max() < 0.25


def test_unreadable_records_are_left_out_on_request(run, uncached, tmp_path, monkeypatch, fails):
    labels, demo = data.load_labels(uncached, "rhythm12"), uncached
    for fold in (1, 10):
        ecg_id = labels.ecg_id[labels.fold == fold][0]
        (demo / f"records500/00000/{ecg_id:05d}_hr.dat").unlink()
    fails(post_train.main, arguments(demo, tmp_path / "run"), "2 records", "--skip-unreadable")
    out, scores = run(demo, "--skip-unreadable", *ONE_PROBE), tmp_path / "scores.json"
    assert f"{(labels.fold <= 8).sum() - 1} records to train" in run.out
    assert "2 of 60 records cannot be read and are left out" in run.out
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--data", "demo"]):  # the checkpoint remembers
        evaluate.main([str(out / "best.pt"), "--json", str(scores), *more])
    demo.rename("moved")
    (out / "test.json").unlink()
    run("moved", "--skip-unreadable", *ONE_PROBE, "--resume", out=out)
    for path in (scores, out / "test.json"):
        assert json.loads(path.read_text())["n"] == (labels.fold == 10).sum() - 1


def test_weights_that_have_seen_the_test_are_said(run, undisturbed, demo, tmp_path):
    """The records of an own table are dealt to folds anew."""
    labels, table = data.load_labels(demo, "rhythm12"), tmp_path / "own.csv"
    write_csv(table, [{"record": name, "other": i % 2} for i, name in enumerate(labels.record)])
    weights, fold = str(undisturbed / "best.pt"), data.load_labels(demo, table).fold
    run(demo, "--weights", weights, *ONE_PROBE)
    assert "optimistic" not in run.out
    out = run(demo, "--weights", weights, "--task", str(table), *ONE_PROBE)
    both = {*labels.record[labels.fold < 9], *labels.record[fold < 9]}
    assert checkpoint(out, "best")["trained_on"] == sorted(both)
    for k in (9, 10):
        n = ((fold == k) & (labels.fold < 9)).sum()
        told = f"{n} records of fold {k} are of patients in the training data of {weights}"
        assert n and told in run.out


@pytest.mark.parametrize("option, error", [(("--amp", "bf16"), 0.05), (("--compile",), 1e-4)])
def test_faster_it_trains_nearly_the_same(run, demo_set, monkeypatch, option, error):
    """Compiled: traced by Dynamo, without a C++ compiler's minute."""
    compiled, compile = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or compile(
        net, backend="aot_eager"))
    more = *SHORT, "--drop-path", "0", "--dropout", "0"
    plain, fast = run(demo_set, *more), run(demo_set, *more, *option)
    a, b = (history(out)[0]["train_loss"] for out in (plain, fast))
    assert a == pytest.approx(b, rel=error)
    assert a != b if "--amp" in option else len(compiled) == 1
    assert weights(plain).keys() == weights(fast).keys()


def test_fold_10_is_touched_by_nothing_before_the_end(run, uncached, undisturbed):
    """Other labels and other signals in fold 10 change test.json, and nothing else of the run."""
    def change(rows):
        for row in rows:
            if row["strat_fold"] == "10":
                row["scp_codes"] = ("{'PACE': 0.0}", "{'AFLT': 0.0}")[int(row["ecg_id"]) % 2]
                signal_file = uncached / f"{row['filename_hr']}.dat"
                signal_file.write_bytes(signal_file.read_bytes()[::-1])

    edit_csv(uncached / data.DATABASE, change)
    out = run(uncached)
    assert (out / "test.json").read_text() != (undisturbed / "test.json").read_text()
    shutil.copy(undisturbed / "test.json", out)
    assert_same_run(out, undisturbed)


# -------------------------------------------------------------------------------- what is found out

def test_a_non_finite_loss_stops_the_run(tiny, demo_set, tmp_path, monkeypatch, fails):
    forward, steps = network.ECGFounder.forward, itertools.count(1)
    monkeypatch.setattr(
        network.ECGFounder, "forward",
        lambda self, x: forward(self, x) * (torch.inf if self.training and next(steps) == 2 else 1))
    fails(post_train.main, arguments(demo_set, tmp_path), "step 2 of 3", "--amp bf16", status=1)
    last = checkpoint(tmp_path, "last")
    assert (last["stage"], last["epoch"]) == ("probe", 2)


def test_out_of_memory_names_what_to_change(tiny, demo_set, tmp_path, monkeypatch, fails):
    full = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr(network.ECGFounder, "forward", full)
    argv = arguments(demo_set, tmp_path, *SHORT)
    fails(post_train.main, argv, "batch of 16", "--batch-size", status=1)


@pytest.mark.parametrize("part, method, fault", [
    (network.SameConv1d, "forward",  # channels in the wrong order, as a faulty kernel leaves them
     lambda self, y: y.flip(1) if y.dtype == torch.bfloat16 and self.conv.groups == 1 else y),
    (network.ECGFounder, "forward_features",
     lambda self, y: y / (not torch.is_autocast_enabled("cpu")))])
def test_a_machine_that_computes_wrongly_is_found_out(tiny, demo_set, tmp_path, monkeypatch, fails,
                                                      part, method, fault):
    right, out = getattr(part, method), tmp_path / "run"
    monkeypatch.setattr(part, method, lambda self, x: fault(self, right(self, x)))
    argv = arguments(demo_set, out, *SHORT)
    fails(post_train.main, [*argv, "--amp", "bf16"], "bfloat16", "--amp off")
    assert [path.name for path in out.iterdir()] == [".lock"]
    post_train.main([*argv, "--amp", "off"])


# ------------------------------------------------------------------------------- killed and resumed

def test_killed_at_any_moment_and_resumed(run, demo_set, undisturbed, tmp_path):
    """Before any change of its folder, and of some once more in what goes on: the same bits."""
    states = sorted((undisturbed.parent / "states").iterdir(), key=lambda path: int(path.name))
    assert len(states) > 15

    def resume(state, later):
        out = shutil.copytree(state, tmp_path / "run", dirs_exist_ok=True)
        for path in out.glob("[a-z]*.pt"):
            assert ("optimizer" in network.read_checkpoint(path)) == (path.name == "last.pt")
        lines = history(out) if (out / "metrics.jsonl").exists() else []
        assert lines == history(undisturbed)[:len(lines)]
        told = "random initialization"
        if (out / "last.pt").exists():
            last = checkpoint(out, "last")
            told = f"resumed after {last['stage']} epoch {last['epoch']}"
        with states_kept(out, later, "replace"):
            run(demo_set, "--resume", out=out)
        assert told in run.out
        assert_same_run(out, undisturbed)
        assert {p.name for p in out.iterdir()} == {".lock", *post_train.OUTPUTS}
        shutil.rmtree(out)

    for k, state in enumerate(states):
        resume(state, tmp_path / f"{k}")
        if k % 4 == 0:
            resume(tmp_path / f"{k}" / "2", tmp_path / f"{k} again")


def test_a_resume_wants_the_same_arguments_and_processes(run, demo, undisturbed, tmp_path, fails):
    """The data set itself may have moved: `demo` is another folder than that of the run."""
    out = shutil.copytree(undisturbed, tmp_path / "run")
    argv = [*arguments(demo, out), "--resume"]
    fails(post_train.main, [*argv, "--epochs", "9"], "--epochs was 2, now 9")  # though finished
    (out / "test.json").unlink()
    last = checkpoint(out, "last")
    torch.save(last | {"processes": 2}, out / "last.pt")  # other batches, other random numbers
    fails(post_train.main, argv, "last.pt", "processes differ")
    torch.save(last, out / "last.pt")
    run(demo, "--resume", out=out)
    assert_same_run(out, undisturbed)


def test_one_process_at_a_time_trains_in_a_folder(tiny, demo_set, tmp_path, fails):
    argv = arguments(demo_set, tmp_path / "run", *ONE_PROBE)
    (tmp_path / "run").mkdir()
    with data.locked(tmp_path / "run", post_train.OUTPUTS):
        fails(post_train.main, argv, "another process", "--out")
    post_train.main(argv)


# -------------------------------------------------------------------------------- several processes

NO_CHANCE = "--drop-path", "0", "--dropout", "0", "--batch-size", "12"


def with_two_processes(argv):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         TESTS / "tiny.py", "post_train.py", *argv], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240)


def test_a_process_that_fails_alone_says_why_and_ends_the_others(demo_set, tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()  # in the way of what the first process writes
    done = with_two_processes(arguments(demo_set, tmp_path))
    said = [line for line in done.stderr.splitlines() if "post_train.py: " in line]
    assert done.returncode and len(said) == 1, done.stderr
    assert said[0].endswith("metrics.jsonl: is a directory")


def test_two_processes_equal_one(tiny, demo_set, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    done = with_two_processes(arguments(demo_set, two, *NO_CHANCE))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finetune 1/2") == 1  # rank 0 alone speaks
    post_train.main(arguments(demo_set, one, *NO_CHANCE))
    for a, b in zip(history(one), history(two), strict=True):
        assert a.pop("stage") == b.pop("stage") and a == pytest.approx(b, rel=0, abs=1e-5)
    for key, value in weights(one).items():
        torch.testing.assert_close(value, weights(two)[key], atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------- the whole

def test_the_whole_road_with_the_whole_network(demo_set, tmp_path, capsys):
    """30.7 M parameters, both stages, then evaluate.py: on 12 synthetic records."""
    short = "--frac", "0.25", "--probe-epochs", "1", "--epochs", "1", "--no-interpolate"
    post_train.main(arguments(demo_set, tmp_path, *short))
    size = sum(value.numel() for value in weights(tmp_path).values())
    assert size == 30_752_646 - 150 * 1025 + 12 * 1025
    capsys.readouterr()
    evaluate.main([str(tmp_path / "best.pt")])
    assert "6 records" in capsys.readouterr().out


@pytest.mark.real
def test_it_learns_from_real_records(run, real):
    out = run(real, "--task", "superclass5", "--frac", "0.1", "--epochs", "6", "--drop-path", "0",
              "--lr", "0.003")
    lines = [line for line in history(out) if line["stage"] == "finetune"]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert max(line["macro_auroc"] for line in lines) > 0.6
