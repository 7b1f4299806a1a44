"""The training loop: recipe, schedules, reproducibility, interruption, several processes."""
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import evaluate
import model as network
import post_train
from helpers import (ROOT, TESTS, arguments, assert_same_run, by_sklearn, edit_csv, history,
                     predicted, prefer_the_middle, states_kept, temporaries, weights)

CPU = torch.device("cpu")
FILES = {"metrics.jsonl", "probe.pt", "best.pt", "last.pt", "test.json"}
SHORT = "--probe-epochs", "0", "--epochs", "1"


def parse(*more):
    return post_train.parse(["--task", "all71", *map(str, more)])


FINETUNE = post_train.stages_of(parse(), 100)[1]
BASELINE = post_train.stages_of(parse("--strategy", "baseline"), 100)[1]


def checkpoint(out, name):
    return torch.load(out / f"{name}.pt", weights_only=True)


def assert_equal(a, b, atol=0):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def records_of(root, folds):
    """Signals and labels of some folds, by pandas' road: no Split."""
    labels, signals = data.load_records(root, "rhythm12")
    rows = np.isin(labels.fold, folds)
    return signals[labels.row[rows]].astype(np.float32), labels.y[rows].astype(np.float32)


@pytest.fixture
def run(tiny, monkeypatch, tmp_path, capsys):
    """Train the small network in this process -> the run's folder; run.out is what it printed."""
    def call(root, *more, out=None):
        out = out or tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        capsys.readouterr()
        post_train.main(arguments(root, out, *more))
        call.out = capsys.readouterr().out
        return out
    return call


@pytest.fixture
def scripted(monkeypatch):
    """Let the validations of a run give these AUROCs."""
    def call(*aurocs):
        scores = ({"val_loss": 1.0, "macro_auroc": value, "macro_auprc": 0.0} for value in aurocs)
        monkeypatch.setattr(post_train, "validate", lambda *a: next(scores))
    return call


# ------------------------------------------------------------------------------------------- recipe

def test_the_recipes():
    def recipe(*more):
        args = parse(*more)
        rest = args.drop_path, args.drop_path_mode, args.dropout, args.batch_size, args.interpolate
        return *post_train.stages_of(args, 100), rest, args.out

    probe = ("probe", 2, 1e-3, 0.0, "cosine", "adamw", 0.1, math.inf)
    assert recipe() == (
        probe, ("finetune", 30, 5e-4, 1e-5, "cosine", "adamw", 0.05, 1.0),
        (0.5, "constant", 0.05, 32, True), "runs/all71-frac1-post-seed0")
    assert recipe("--strategy", "baseline", "--frac", 0.1, "--seed", 3) == (
        ("probe", 0, *probe[2:]), ("finetune", 30, 1e-4, 0.0, "plateau", "adam", 1e-5, math.inf),
        (0, "constant", 0, 256, False), "runs/all71-frac0.1-baseline-seed3")
    given = ("--probe-epochs 7 --probe-lr 2 --probe-weight-decay 3 --epochs 8 --lr 4 --final-lr 1 "
             "--schedule plateau --optimizer adam --weight-decay 5 --clip 6 --drop-path 0.1 "
             "--drop-path-mode linear --dropout 0.2 --batch-size 9 --no-interpolate --out x")
    assert recipe(*given.split()) == (
        ("probe", 7, 2.0, 0.0, "cosine", "adamw", 3.0, math.inf),
        ("finetune", 8, 4.0, 1.0, "plateau", "adam", 5.0, 6.0), (0.1, "linear", 0.2, 9, False), "x")


@pytest.mark.parametrize("steps, more, epochs", [
    (1, "", 30), (6, "", 30), (20, "", 10), (67, "", 3), (544, "", 1), (67, "--epochs 0", 30),
    (67, "--probe-epochs 7", 7), (67, "--strategy baseline", 0)])
def test_length_of_the_preview(steps, more, epochs):
    assert post_train.stages_of(parse(*more.split()), steps)[0].epochs == epochs


@pytest.mark.parametrize("lr, final", [(5e-3, 0.0), (5e-4, 1e-5)])
def test_cosine_is_torchs(lr, final):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40, final)
    stage, wanted = FINETUNE._replace(lr=lr, final_lr=final, epochs=4), []
    for _ in range(40):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    found = [post_train.learning_rates(stage, epoch, 10, []) for epoch in range(4)]
    np.testing.assert_allclose(np.concatenate(found), wanted, rtol=1e-6, atol=1e-12)


def test_plateau_divides_by_ten_after_more_than_ten_epochs_without_a_gain():
    """Against the rule by hand; torch's scheduler needs a gain of 0.01 %, too."""
    aurocs = [0.8, 0.81, 0.82] + [0.81] * 11 + [0.82005] + [0.81] * 10 + [0.9] * 12
    rate, best, bad = 1e-4, 0.0, 0
    for epoch, auroc in enumerate(aurocs):
        found = post_train.learning_rates(BASELINE, epoch, 2, aurocs[:epoch])
        assert found == pytest.approx([rate] * 2)
        best, bad = (auroc, 0) if auroc > best * 1.0001 else (best, bad + 1)
        rate, bad = (rate / 10, 0) if bad > 10 else (rate, bad)
    assert rate == pytest.approx(1e-6)


def test_adamw_spares_vectors_from_weight_decay():
    layer = torch.nn.Conv1d(3, 4, 5)
    groups = post_train.make_optimizer(FINETUNE, [layer.weight, layer.bias]).param_groups
    assert [(g["params"][0].shape, g["weight_decay"]) for g in groups] == [
        ((4, 3, 5), 0.05), ((4,), 0.0)]
    adam = post_train.make_optimizer(BASELINE, [layer.weight, layer.bias])
    assert type(adam) is torch.optim.Adam
    assert [(len(g["params"]), g["weight_decay"]) for g in adam.param_groups] == [(2, 1e-5)]


def epoch_of(optimizer, model, scale=1.0, scaler=None, clip=math.inf, steps=1):
    """The mean loss of an epoch of a linear model with inputs of this size."""
    torch.manual_seed(1)
    split = post_train.Split(scale * torch.randn(8, 3), np.arange(8), torch.ones(8, 2))
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    batches, rates = [np.arange(8)] * steps, [1e-3] * steps
    return post_train.train_epoch(model, optimizer, scaler, split, batches, rates, clip)


@pytest.mark.parametrize("clip, wanted", [(math.inf, None), (0.01, 0.01), (1e6, None)])
def test_the_gradient_norm_is_clipped(clip, wanted):
    model, norms = torch.nn.Linear(3, 2), []
    torch.manual_seed(1)
    before = F.binary_cross_entropy_with_logits(model(9 * torch.randn(8, 3)), torch.ones(8, 2))
    whole = torch.cat([g.flatten() for g in torch.autograd.grad(before, model.parameters())]).norm()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *a: norms.append(
        torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()))
    epoch_of(optimizer, model, scale=9, clip=clip)
    assert whole > 0.1 and norms == [pytest.approx(wanted or whole.item(), rel=1e-3)]


def test_steps_with_infinite_gradients_are_skipped():
    """The fp16 road on a CPU: torch's scaler works there, too."""
    model, scaler = torch.nn.Linear(3, 2), torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before, optimizer = model.weight.detach().clone(), post_train.make_optimizer(
        FINETUNE, list(model.parameters()))
    assert math.isfinite(epoch_of(optimizer, model, 1e3, scaler, clip=1.0))
    assert scaler.get_scale() == 2.0**126 and torch.equal(model.weight, before)
    epoch_of(optimizer, model, 1e3, scaler, clip=1.0, steps=40)
    assert model.weight.isfinite().all() and not torch.equal(model.weight, before)


def test_batches_and_seeds_of_an_epoch(monkeypatch):
    whole = post_train.epoch_batches(103, 10, 5)
    assert [len(i) for i in whole] == [10] * 10 and len(set(np.concatenate(whole))) == 100
    assert not np.array_equal(whole, post_train.epoch_batches(103, 10, 6))
    assert [sorted(i) for i in post_train.epoch_batches(7, 32, 0)] == [list(range(7))]
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        shares.append(post_train.epoch_batches(103, 10, 5))
        assert [len(i) for i in post_train.epoch_batches(103, 11, 5)] == [5] * 10
    for both, a, b in zip(whole, *shares, strict=True):
        assert {*both} == {*a} | {*b} and len(a) == len(b) == 5
    each = list(itertools.product(range(3), ("probe", "finetune"), range(30), range(3)))
    assert len({post_train.epoch_seed(*key) for key in each}) == len(each)


# -------------------------------------------------------------------------------------------- a run

def test_a_run_leaves_what_it_promises(undisturbed, demo_set, tiny):
    assert {path.name for path in undisturbed.iterdir()} == FILES
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").open()]
    always = {"stage", "epoch", "val_loss", "macro_auroc", "macro_auprc", "seconds"}
    assert [set(line) for line in lines] == (
        [always | {"lr", "train_loss"}] * 4 + [always | {"share"}] * 4)
    assert [(line["stage"], line["epoch"], line["lr"]) for line in lines[:4]] == [
        ("probe", 1, 1e-3), ("probe", 2, 5e-4), ("finetune", 1, 5e-4),
        ("finetune", 2, pytest.approx((5e-4 + 1e-5) / 2))]

    best, last, probe = (checkpoint(undisturbed, name) for name in ("best", "last", "probe"))
    (x, y), labels = records_of(demo_set, 10), data.load_labels(demo_set, "rhythm12")
    said = [best[key] for key in ("task", "classes", "leads", "preprocessing", "data")]
    assert said == ["rhythm12", labels.classes, list(data.LEADS), "filter", str(demo_set)]
    assert (best["args"]["drop_path"], best["args"]["amp"]) == (0.5, "off")
    assert set(best["versions"]) == {"torch", "numpy", "scipy", "wfdb"}
    assert set(last) - set(best) == {"optimizer", "scaler"}
    assert set(best) - set(probe) == {"thresholds", "positives"} and len(best["thresholds"]) == 12
    assert best["positives"] == labels.y[labels.fold == 9].sum(0).tolist()
    assert last["history"] == lines[:4] and probe["history"] == lines[:2]

    result = json.loads((undisturbed / "test.json").read_text())
    wanted = np.nanmean(by_sklearn(y, predicted(undisturbed / "best.pt", x)), axis=1)
    assert (result["n"], result["macro_auroc"], result["macro_auprc"]) == (
        len(y), *pytest.approx(wanted, abs=1e-6))


def test_every_score_is_that_of_fold_9(undisturbed, demo_set, tiny):
    """Of the weights that are kept, and of those mixed by hand."""
    lines, shares = history(undisturbed), [0, 0.25, 0.5, 0.75]
    probe, last, best = (checkpoint(undisturbed, name) for name in ("probe", "last", "best"))
    aurocs = [line["macro_auroc"] for line in lines[:2]]
    assert probe["epoch"] == 1 + aurocs.index(max(aurocs))
    start, end = probe["state_dict"], last["state_dict"]
    mixed = [{key: (1 - s) * start[key] + s * end[key] for key in end} for s in shares]
    (x, y), model = records_of(demo_set, 9), network.ecgfounder(12).eval()
    of_probe = lines[probe["epoch"] - 1]
    for line, state in zip([of_probe, *lines[3:]], [start, end, *mixed], strict=True):
        model.load_state_dict(state)
        prob = torch.sigmoid(model(torch.from_numpy(x)).detach().double()).numpy()
        auroc, auprc = np.nanmean(by_sklearn(y, prob), axis=1)
        loss = -np.log(np.where(y == 1, prob, 1 - prob)).mean()
        assert [line["val_loss"], line["macro_auprc"]] == pytest.approx([loss, auprc], abs=1e-6)
        if "share" not in line:     # the interpolations' are made to be preferred
            assert line["macro_auroc"] == pytest.approx(auroc, abs=1e-6)
    assert [line["share"] for line in lines[4:]] == shares
    assert (best["stage"], best["epoch"], best["share"]) == ("interpolate", 3, 0.5)
    assert_equal(best["state_dict"], mixed[2], atol=1e-6)


@pytest.mark.parametrize("save_every, wanted", [
    (-1, "probe 1, best 1, last 1, best 2, last 2, last 3, last 4, best i2"),
    (3600, "probe 1, best 2, last 4, best i2")])
def test_what_is_saved_and_how_long_it_takes(tiny, demo_set, tmp_path, monkeypatch, scripted,
                                             save_every, wanted):
    """The first of equals is the best. Saving takes 100 s on this clock, and all else nothing."""
    def slow_save(run, name, line, *states, **more):
        mark = "i" * (line["stage"] == "interpolate")
        saved.append(f"{name.removesuffix('.pt')} {mark}{line['epoch']}")
        now.append(now[-1] + 100)
        save(run, name, line, *states, **more)

    saved, now, save = [], [0], post_train.Run.save
    scripted(0.9, 0.8, *(0.5, 0.7, 0.7, 0.6), *(0.7, 0.8, 0.8, 0.6))
    monkeypatch.setattr(post_train.Run, "save", slow_save)
    monkeypatch.setattr(post_train, "time", SimpleNamespace(perf_counter=lambda: now[-1]))
    monkeypatch.setattr(post_train, "SAVE_EVERY", save_every)
    post_train.main(arguments(demo_set, tmp_path, "--epochs", 4))
    assert ", ".join(saved) == wanted
    seconds = [json.loads(line)["seconds"] for line in (tmp_path / "metrics.jsonl").open()]
    of_fine_tuning = [100, 200, 200, 100, 100] if save_every < 0 else [100, 0, 0, 0, 200]
    assert seconds == [0, 0, *of_fine_tuning, 0, 100, 0]


def test_probing_on_features_equals_running_the_backbone_in_every_epoch(run, demo_set, scripted):
    """And fine-tuning, here at a rate of nearly 0, begins with the probe's best epoch."""
    scripted(0.5, 0.9, 0.9, 0.1)
    out = run(demo_set, "--probe-epochs", 3, "--dropout", 0, "--epochs", 1, "--lr", 1e-30,
              "--no-interpolate")
    x, y = map(torch.from_numpy, records_of(demo_set, range(1, 9)))
    torch.manual_seed(0)
    model = network.ecgfounder(12).eval()
    bias = {"params": [model.dense.bias], "weight_decay": 0}
    optimizer = torch.optim.AdamW([{"params": [model.dense.weight]}, bias], weight_decay=0.1)
    for epoch in range(2):
        seed = post_train.epoch_seed(0, "probe", epoch)
        order = np.random.RandomState(seed).permutation(len(x))
        for step in range(3):       # 49 records: three whole batches
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (1 + math.cos(math.pi * (epoch + step / 3) / 3)) / 2
            index = order[16 * step:16 * step + 16]
            F.binary_cross_entropy_with_logits(model(x[index]), y[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(weights(out, "probe.pt"), model.state_dict(), atol=1e-5)
    assert_equal(weights(out), weights(out, "probe.pt"))


def test_fine_tuning_changes_every_tensor(undisturbed):
    probe, last = weights(undisturbed, "probe.pt"), weights(undisturbed)
    assert not any(torch.equal(probe[key], last[key]) for key in probe)


def test_baseline_and_ablations_reach_the_network(run, demo_set, monkeypatch):
    built, build, clips, train = [], network.ecgfounder, [], post_train.train_epoch
    monkeypatch.setattr(network, "ecgfounder", lambda *a: built.append(a) or build(*a))
    monkeypatch.setattr(post_train, "train_epoch", lambda *a: clips.append(a[6]) or train(*a))
    out = run(demo_set, "--strategy", "baseline", *SHORT)
    assert [(line["stage"], line["lr"]) for line in history(out)] == [("finetune", 1e-4)]
    assert checkpoint(out, "last")["optimizer"]["param_groups"][0]["weight_decay"] == 1e-5
    run(demo_set, "--drop-path-mode", "linear", "--drop-path", 0.8, "--dropout", 0.3, *SHORT)
    assert [a for a in built if len(a) > 2] == [(12, 12, 0, "constant", 0),
                                                (12, 12, 0.8, "linear", 0.3)]
    assert clips == [math.inf, 1.0]


def test_from_weights_come_all_but_an_unrelated_head(undisturbed, demo_set, tiny):
    """A head drawn from the seed alone would be the one that the features grew up with."""
    def start(path, seed):
        args = parse("--weights", path, "--seed", seed, "--amp", "off")
        args.leads = list(data.LEADS)
        return post_train.Run(args, labels, labels, CPU).model.state_dict()

    labels, path = data.load_labels(demo_set, "rhythm12"), undisturbed / "best.pt"
    again, same, other = (start(path, seed) for seed in (0, 0, 1))
    assert_equal(again, same)
    before = weights(undisturbed, "best.pt")
    assert all(torch.equal(before[key], other[key]) for key in before if key[:5] != "dense")
    heads = [state["dense.weight"].flatten() for state in (start("none", 0), before, again, other)]
    correlation = torch.corrcoef(torch.stack(heads))
    assert correlation[0, 1] > 0.5 and correlation.triu(1)[:, 2:].abs().max() < 0.25


def test_bfloat16_trains_nearly_the_same(run, demo_set):
    more = *SHORT, "--drop-path", 0, "--dropout", 0
    exact, fast = (history(run(demo_set, *more, "--amp", amp))[0] for amp in ("off", "bf16"))
    assert exact["train_loss"] != fast["train_loss"] == pytest.approx(exact["train_loss"], rel=0.05)


def test_fold_10_is_touched_by_nothing_before_the_end(run, demo, undisturbed, monkeypatch):
    """Other labels and other signals in fold 10 change test.json, and nothing else of the run."""
    def change(rows):
        for row in rows:
            if row["strat_fold"] == "10":
                row["scp_codes"] = ("{'PACE': 0.0}", "{'AFLT': 0.0}")[int(row["ecg_id"]) % 2]

    rows = data.load_labels(demo, "rhythm12").take(slice(None))
    signals = np.load(next(demo.glob("cache/*.npy")), mmap_mode="r+")
    tested = rows.row[rows.fold == 10]
    signals[tested] = signals[tested][..., ::-1]
    edit_csv(demo / data.DATABASE, change)
    prefer_the_middle(monkeypatch)
    out = run(demo)
    assert (out / "test.json").read_text() != (undisturbed / "test.json").read_text()
    shutil.copy(undisturbed / "test.json", out)
    assert_same_run(out, undisturbed)


@pytest.mark.parametrize("training", [True, False])
def test_a_loss_that_is_not_finite_stops_the_run(tiny, demo_set, tmp_path, monkeypatch, fails,
                                                 training):
    forward = network.ECGFounder.forward
    monkeypatch.setattr(network.ECGFounder, "forward", lambda self, x: forward(self, x) * (
        math.inf if self.training is training else 1))
    fails(post_train.main, arguments(demo_set, tmp_path, "--probe-epochs", 0), "finetune epoch 1",
          "--lr", "--amp bf16")
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------------------------- killed and resumed

def test_killed_at_any_moment_and_resumed(run, demo_set, undisturbed, tmp_path, monkeypatch):
    """Before any change of its folder, and of some once more in what goes on: the same bits."""
    def resume(state, later):
        out = shutil.copytree(state, tmp_path / "run", dirs_exist_ok=True)
        said, = ([f"resumed after finetune epoch {checkpoint(out, 'last')['epoch']}"]
                 if (out / "last.pt").exists() else
                 ["resumed after probe epoch 2" if (out / "probe.pt").exists() else "random init"])
        with states_kept(out, later):
            run(demo_set, "--resume", out=out)
        assert said in run.out
        assert_same_run(out, undisturbed)
        shutil.rmtree(out)

    prefer_the_middle(monkeypatch)
    monkeypatch.setattr(post_train, "SAVE_EVERY", -1)
    with states_kept(tmp_path / "whole", tmp_path / "states") as states:
        run(demo_set, out=tmp_path / "whole")
