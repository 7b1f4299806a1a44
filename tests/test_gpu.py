"""What needs a CUDA device: mixed precision, signals on the device or pinned, compile, and the
whole road."""
import json
import warnings

import numpy as np
import pytest
import torch

import data
import evaluate
import model as network
import post_train
from helpers import arguments, history
from plain import PlainNet1D

pytestmark = pytest.mark.gpu


def train(demo, out, *more):
    post_train.main(arguments(demo, out, "--device", "cuda", *more))
    return out


def test_the_network_equals_the_plain_one(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    ours, plain = network.ecgfounder(7).cuda(), PlainNet1D(7).cuda()
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(4, 12, 5000, device="cuda")
    torch.testing.assert_close(ours(x), plain(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options, amp", [
    ([], "fp16"), (["--amp", "bf16"], "bf16"), (["--amp", "off"], "off"),
    (["--compile"], "fp16")])
def test_the_whole_road(demo_set, tmp_path, options, amp):
    out, scores = train(demo_set, tmp_path / "run", *options), tmp_path / "scores.json"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["stage"] != "interpolate"]
    assert len(epochs) == 4 and len(lines) == 8 and epochs[-1]["peak_memory_mb"] > 100
    assert all(np.isfinite(line["train_loss"]) for line in epochs)
    last = torch.load(out / "last.pt", weights_only=True)
    assert last["args"]["amp"] == amp and bool(last["scaler"]) == (amp == "fp16")
    evaluate.main([str(out / "best.pt"), "--json", str(scores), "--device", "cuda"])
    got, want = (json.loads(path.read_text()) for path in (scores, out / "test.json"))
    assert got["macro_auroc"] == pytest.approx(want["macro_auroc"], abs=1e-3)


def test_killed_and_resumed_goes_on(demo_set, tmp_path, monkeypatch):
    """GPU sums are not bit for bit the same from run to run; the losses agree closely."""
    write_history, whole, cut = post_train.write_history, tmp_path / "whole", tmp_path / "cut"

    def killed_after_three(run):
        write_history(run)
        if len(run.history) == 3:
            raise KeyboardInterrupt

    train(demo_set, whole)
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr(post_train, "write_history", killed_after_three)
        train(demo_set, cut)
    assert len(history(cut)) == 3
    train(demo_set, cut, "--resume")
    assert len(history(cut)) == len(history(whole)) == 8
    for a, b in zip(history(whole)[:4], history(cut)):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-2)


@pytest.mark.parametrize("resident", [True, False])
def test_no_step_waits_for_the_gpu(tiny, resident):
    """The waits of an epoch do not grow with its steps (below the 16 between two checks)."""
    device = torch.device("cuda", 0)
    signals, y = np.zeros((48, 12, 320), np.float16), torch.zeros(48, 5, device=device)
    array = torch.from_numpy(signals).to(device) if resident else signals
    split = post_train.Split(array, np.arange(48), y)
    model = network.ecgfounder(5, drop_path=0.5).to(device)
    stage = post_train.stages_of(post_train.parse(["--task", "all71"]))[1]
    optimizer, scaler = post_train.make_optimizer(stage, [model]), torch.amp.GradScaler("cuda")
    waits = []
    for steps in (1, 4, 12):  # the first: what happens once
        index = np.split(np.arange(4 * steps), steps)
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            post_train.train_epoch(model, optimizer, scaler, split, index, [1e-3] * steps, 1.0,
                                   torch.float16)
        torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing" in str(w.message) for w in caught))
    assert waits[1] == waits[2]


def test_resident_and_pinned_batches_are_the_same(demo_set, monkeypatch):
    device = torch.device("cuda", 0)
    labels, signals = data.load_records(demo_set, "all71")
    split = post_train.Split(signals, labels.row[5:40], torch.zeros(35, 1))
    resident, there, _ = post_train.on_device(split, device)
    assert isinstance(resident, torch.Tensor) and resident.is_cuda
    assert resident.dtype == torch.float16 and resident.shape == (35, 12, 5000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 1000))
    disk, same, _ = post_train.on_device(split, device)
    assert disk is signals and same is split.rows
    index = [np.array([3, 1]), np.array([30])]
    a, b = (list(data.batches(array, (of[i] for i in index), device))
            for array, of in ((resident, there), (disk, same)))
    for x, y in zip(a, b):
        assert x.is_cuda and y.is_cuda and torch.equal(x, y)
    assert len(a) == len(b) == 2
