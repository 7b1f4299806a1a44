"""The training loop: recipe, schedules, reproducibility, interruption, several processes."""
import math
import shutil
from itertools import product

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import data
import model as network
import post_train
from helpers import (arguments, assert_same_run, by_sklearn, edit_csv, history,
                     prefer_the_middle, states_kept, temporaries, weights)


def parse(*more):
    return post_train.parse(["--task", "all71", *map(str, more)])


def records_of(root, folds):
    """(signals, labels) of some folds in float32."""
    labels, signals = data.load_records(root, "rhythm12")
    rows = np.isin(labels.fold, folds)
    return signals[labels.row[rows]].astype(np.float32), labels.y[rows].astype(np.float32)


def script_validation(monkeypatch, *aurocs):
    """Let the validations of a run give these AUROCs."""
    scores = ({"val_loss": 1.0, "macro_auroc": value, "macro_auprc": 0.0} for value in aurocs)
    monkeypatch.setattr(post_train, "validate", lambda *a: next(scores))


@pytest.fixture
def run(tiny, tmp_path):
    """Train the small network in this process -> the run's folder."""
    def call(root, *more, out="run"):
        post_train.main(arguments(root, tmp_path / out, *more))
        return tmp_path / out
    return call


@pytest.mark.parametrize("strategy, probe_epochs, finetune, rest", [
    ("post", 2, (30, 5e-4, 1e-5, "cosine", "adamw", 0.05, 1.0), (0.5, 0.05, 32, True)),
    ("baseline", 0, (30, 1e-4, 0.0, "plateau", "adam", 1e-5, math.inf), (0, 0, 256, False))])
def test_the_recipes(strategy, probe_epochs, finetune, rest):
    args = parse("--strategy", strategy)
    probe = ("probe", probe_epochs, 1e-3, 0.0, "cosine", "adamw", 0.1, math.inf)
    assert post_train.stages_of(args, 100) == (probe, ("finetune", *finetune))
    assert rest == (args.drop_path, args.dropout, args.batch_size, args.interpolate)


@pytest.mark.parametrize("steps, epochs, n", [(1, 30, 30), (67, 30, 3), (544, 30, 1), (67, 0, 30)])
def test_a_preview_takes_about_200_steps(steps, epochs, n):
    assert post_train.stages_of(parse("--epochs", epochs), steps)[0].epochs == n


def test_schedules_and_optimizers():
    """AdamW spares vectors from weight decay."""
    post, plain = (post_train.stages_of(parse("--strategy", name), 10)[1]
                   for name in ("post", "baseline"))
    optimizer = torch.optim.SGD([torch.zeros(1)], 5e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300, 1e-5)
    for epoch, step in product(range(30), range(10)):
        rate = post_train.learning_rates(post, epoch, 10, [])[step]
        assert [rate] == pytest.approx(cosine.get_last_lr(), rel=1e-6)
        optimizer.step()
        cosine.step()
    aurocs = [0.8] + [0.9] * 12 + [0.91] + [0.9] * 11
    rates = [post_train.learning_rates(plain, n, 2, aurocs[:n])[1] for n in (0, 12, 13, 24, 25)]
    assert rates == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5, 1e-6])
    layer = torch.nn.Conv1d(3, 4, 5)
    for stage, decays in ((post, [[3, 0.05], [1, 0]]), (plain, [[3, 1, 1e-5]])):
        groups = post_train.make_optimizer(stage, [layer.weight, layer.bias]).param_groups
        assert [[*(p.dim() for p in g["params"]), g["weight_decay"]] for g in groups] == decays


def test_gradients_are_clipped_and_infinite_ones_skipped():
    model, norms = torch.nn.Linear(3, 2, bias=False), []
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *a: norms.append(model.weight.grad.norm().item()))
    split = post_train.Split(torch.full((8, 3), 9.0), np.arange(8), torch.ones(8, 2))
    for clip, scale in ((math.inf, 1), (0.01, 2.0**10), (0.01, 2.0**127)):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)    # in fp16
        post_train.train_epoch(model, optimizer, scaler, split, [np.arange(8)], [0.0], clip)
    # Six weights, each nine times (sigmoid(0) - 1) / 2, for the mean of two outputs.
    assert norms == pytest.approx([9 / 4 * math.sqrt(6), 0.01], rel=1e-3)
    assert scaler.get_scale() == 2.0**126       # halved


def test_batches_and_seeds_of_an_epoch(monkeypatch):
    whole, shares = post_train.epoch_batches(103, 10, 5), []
    assert [len(i) for i in whole] == [10] * 10 and len(set(np.concatenate(whole))) == 100
    assert [sorted(i) for i in post_train.epoch_batches(7, 32, 0)] == [list(range(7))]
    for rank in "01":
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        shares.append(post_train.epoch_batches(103, 11, 5))     # by ten, as eleven is odd
    for both, a, b in zip(whole, *shares, strict=True):
        assert {*both} == {*a} | {*b} and len(a) == len(b) == 5
    each = list(product(range(3), ("probe", "finetune"), range(30), range(3)))
    assert len({post_train.epoch_seed(*key) for key in each}) == len(each)


def test_every_score_is_that_of_fold_9(undisturbed, demo_set, tiny):
    """Of the weights that were kept, and of those mixed by hand."""
    lines, model, wanted = history(undisturbed), network.ecgfounder(12).eval(), []
    begin, finish = weights(undisturbed, "probe.pt"), weights(undisturbed)
    mixed = [{key: (1 - share) * begin[key] + share * finish[key] for key in begin}
             for share in (0, 0.25, 0.5, 0.75)]
    x, y = records_of(demo_set, 9)
    for state in (begin, finish, *mixed):
        model.load_state_dict(state)
        prob = torch.sigmoid(model(torch.from_numpy(x)).detach().double()).numpy()
        loss = -np.log(np.where(y == 1, prob, 1 - prob)).mean()
        wanted.append([loss, *np.nanmean(by_sklearn(y, prob), axis=1)])
    wanted = np.array(wanted)
    wanted[2:, 1] = 0, 1.5, 2, 1    # as `undisturbed` prefers the middle
    found = [[line[key] for key in ("val_loss", "macro_auroc", "macro_auprc")]
             for line in (max(lines[:2], key=lambda line: line["macro_auroc"]), *lines[3:])]
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    best, labels = (network.read_checkpoint(undisturbed / "best.pt"),
                    data.load_labels(demo_set, "rhythm12"))
    assert_close(best["state_dict"], mixed[2], atol=1e-6, rtol=0)
    assert best["positives"] == y.sum(0).tolist() and best["classes"] == labels.classes


def test_what_is_saved(run, demo_set, monkeypatch):
    """The first of equals is the best; it and the last wait for the end, as no minute passes."""
    def recorded(run, name, **fields):
        saved.append((name, fields["epoch"]))
        save(run, name, **fields)

    saved, save = [], post_train.Run.save
    monkeypatch.setattr(post_train.Run, "save", recorded)
    monkeypatch.setattr(post_train, "SAVE_EVERY", 3600)
    script_validation(monkeypatch, 0.9, 0.8, 0.5, 0.7, 0.7, 0.6)
    run(demo_set, "--epochs", 4, "--no-interpolate")
    assert saved == [("probe.pt", 1), ("best.pt", 2), ("last.pt", 4)]


def test_probing_on_features_equals_running_the_whole_network(run, demo_set, monkeypatch):
    """And fine-tuning, here at a rate of nearly 0, begins with the probe's best epoch."""
    script_validation(monkeypatch, 0.5, 0.9, 0.9, 0.1)
    out = run(demo_set, "--probe-epochs", 3, "--dropout", 0, "--epochs", 1, "--lr", 1e-30,
              "--no-interpolate")
    x, y = map(torch.from_numpy, records_of(demo_set, range(1, 9)))
    torch.manual_seed(0)
    model = network.ecgfounder(12).eval()
    bias = {"params": [model.dense.bias], "weight_decay": 0}
    optimizer = torch.optim.AdamW([{"params": [model.dense.weight]}, bias], weight_decay=0.1)
    for epoch, step in product(range(2), range(3)):     # 49 records: three whole batches
        order = np.random.RandomState(post_train.epoch_seed(0, "probe", epoch)).permutation(len(x))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 + math.cos(math.pi * (epoch + step / 3) / 3)) / 2
        index = order[16 * step:16 * step + 16]
        torch.nn.BCEWithLogitsLoss()(model(x[index]), y[index]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_close(weights(out, "probe.pt"), model.state_dict(), atol=1e-5, rtol=0)
    assert_close(weights(out), weights(out, "probe.pt"), atol=0, rtol=0)


def test_strategies_and_options_reach_the_network(run, demo_set, monkeypatch):
    more = "--probe-epochs", 0, "--epochs", 1, "--frac", 0.35, "--strategy"
    built, build, clips, train = [], network.ecgfounder, [], post_train.train_epoch
    monkeypatch.setattr(network, "ecgfounder", lambda *a: built.append(a) or build(*a))
    monkeypatch.setattr(post_train, "train_epoch", lambda *a: clips.append(a[6]) or train(*a))
    run(demo_set, *more, "post", "--drop-path-mode", "linear", "--drop-path", 0.8, "--dropout", 0.3)
    (exact,), (fast,) = (history(run(demo_set, *more, "baseline", "--amp", amp, out=amp))
                         for amp in ("off", "bf16"))
    assert built[::2] == [(12, 12, 0.8, "linear", 0.3), *[(12, 12, 0, "constant", 0)] * 2]
    assert clips == [1.0, math.inf, math.inf] and exact["lr"] == 1e-4
    assert exact["train_loss"] != fast["train_loss"] == pytest.approx(exact["train_loss"], rel=0.05)


def test_from_weights_come_all_but_an_unrelated_head(undisturbed, demo_set, tiny, capsys):
    """A head drawn from the seed alone would be the one that the features grew up with. Another
    preprocessing is said."""
    def begin(path, seed, how="filter"):
        args = parse("--weights", path, "--seed", seed, "--preprocess", how)
        args.leads = data.LEADS
        return post_train.Run(args, labels, labels, torch.device("cpu")).model.state_dict()

    labels, best = data.load_labels(demo_set, "rhythm12"), undisturbed / "best.pt"
    states = [begin("none", 0), weights(undisturbed, "best.pt"), begin(best, 0), begin(best, 1),
              begin(undisturbed / "probe.pt", 0)]
    assert all(torch.equal(states[1][k], states[3][k]) for k in states[1] if k[:5] != "dense")
    found = torch.corrcoef(torch.stack([state["dense.weight"].flatten() for state in states]))
    assert found[0, 1] > 0.5 and found.triu(1)[:, 2:].abs().max() < 0.25
    assert "trained with" not in capsys.readouterr().out
    begin(best, 0, "raw")
    assert f"{best} was trained with --preprocess filter" in capsys.readouterr().out


def test_fold_10_is_touched_by_nothing_before_the_end(run, demo, undisturbed, monkeypatch):
    """Other labels and other signals in fold 10 change test.json, and nothing else of the run."""
    def change(rows):
        for i, row in enumerate(rows):
            if row["strat_fold"] == "10":
                row["scp_codes"] = ("{'PACE': 0.0}", "{'AFLT': 0.0}")[i % 2]
                signals[i] = signals[i, :, ::-1]

    signals = np.load(next(demo.glob("cache/*.npy")), mmap_mode="r+")
    edit_csv(demo / data.DATABASE, change)
    prefer_the_middle(monkeypatch)
    out, result = run(demo), (undisturbed / "test.json").read_text()
    assert (out / "test.json").read_text() != result
    (out / "test.json").write_text(result)
    assert_same_run(out, undisturbed)


def test_every_epoch_draws_anew(tiny, demo_set, tmp_path, monkeypatch):
    """The seeds of the initialization and of four epochs."""
    seeds, manual_seed = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or manual_seed(seed))
    post_train.main(arguments(demo_set, tmp_path))
    assert len(seeds) == len({*seeds}) == 5


def test_killed_at_any_moment(run, demo, undisturbed, tmp_path, monkeypatch, capsys):
    """Before any change of its folder, and resumed with data elsewhere: the bits of a run that
    saves less often."""
    def resume(state, name):
        out = shutil.copytree(state, tmp_path / name)
        begun = (out / "last.pt").exists()
        run(tmp_path / "moved", "--resume", out=name)
        assert ("resumed after epoch" in capsys.readouterr().out) is begun
        assert_same_run(out, undisturbed)

    prefer_the_middle(monkeypatch)
    monkeypatch.setattr(post_train, "SAVE_EVERY", -1)
    with states_kept(tmp_path / "run", tmp_path / "states") as states:
        run(demo)
    demo.rename(tmp_path / "moved")
    written = [path.name.split(".")[1] for state in states for path in temporaries(state)]
    assert written[:6] == ["metrics", "metrics", "probe", "metrics", "best", "last"]
    with states_kept(tmp_path / "4", tmp_path / "later") as later:
        resume(states.pop(4), "4")
    for k, state in enumerate([*states, later[3]]):
        resume(state, f"from {k}")


@pytest.mark.real
def test_it_learns_from_real_records(run, real):
    more = "--task", "superclass5", "--frac", 0.1, "--drop-path", 0, "--lr", 0.003
    lines = [line for line in history(run(real, *more, "--epochs", 6)) if line["stage"] != "probe"]
    assert lines[5]["train_loss"] < lines[0]["train_loss"]
    assert max(line["macro_auroc"] for line in lines[:6]) > 0.6
