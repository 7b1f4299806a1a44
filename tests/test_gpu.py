"""What needs a CUDA device: the network's numbers, mixed precision, signals on the device, and the
whole road. Graphs: also test_graph.py."""
import json

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


def train(root, out, *more):
    post_train.main(arguments(root, out, "--device", "cuda", *more))
    return history(out)


def test_the_network_equals_the_plain_one(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    ours, plain = network.ecgfounder(7).cuda(), PlainNet1D(7).cuda()
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(4, 12, 5000, device="cuda")
    torch.testing.assert_close(ours(x), plain(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options, amp", [
    ([], "fp16"), (["--amp", "bf16"], "bf16"), (["--amp", "off"], "off"), (["--graph"], "fp16")])
def test_the_whole_road(demo_set, tmp_path, options, amp):
    out, scores = tmp_path / "run", tmp_path / "scores.json"
    lines = train(demo_set, out, *options)
    assert len(lines) == 8
    assert np.isfinite([line["train_loss"] for line in lines[:4]]).all()
    last = torch.load(out / "last.pt", weights_only=True)
    assert last["args"]["amp"] == amp and bool(last["scaler"]) == (amp == "fp16")
    evaluate.main([str(out / "best.pt"), "--json", str(scores), "--device", "cuda"])
    found, wanted = (json.loads(path.read_text()) for path in (scores, out / "test.json"))
    assert found["macro_auroc"] == pytest.approx(wanted["macro_auroc"], abs=1e-3)


@pytest.mark.parametrize("options", [[], ["--graph"]])
def test_killed_and_resumed_goes_on(demo_set, tmp_path, monkeypatch, options):
    """GPU sums are not bit for bit the same from run to run; the losses agree closely."""
    log = post_train.Run.log

    def killed_in_the_last_epoch(run, **line):
        log(run, **line)
        if len(run.history) == 4:
            raise KeyboardInterrupt

    whole = train(demo_set, tmp_path / "whole", *options)
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr(post_train, "SAVE_EVERY", -1)
        m.setattr(post_train.Run, "log", killed_in_the_last_epoch)
        train(demo_set, tmp_path / "cut", *options)
    last = torch.load(tmp_path / "cut" / "last.pt", weights_only=True)
    assert (last["stage"], last["epoch"]) == ("finetune", 1)
    resumed = train(demo_set, tmp_path / "cut", "--resume", *options)
    for a, b in zip(whole, resumed, strict=True):
        assert a.get("train_loss", 0) == pytest.approx(b.get("train_loss", 0), rel=1e-2)


def test_batches_from_the_gpu_and_from_the_disk_are_the_same(demo_set, monkeypatch):
    device = torch.device("cuda", 0)
    labels, signals = data.load_records(demo_set, "all71")
    labels = labels.take(slice(5, 40))
    there = post_train.make_split(signals, labels, device)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 1000))
    mapped = post_train.make_split(signals, labels, device)
    assert there.x.is_cuda and there.x.dtype == torch.float16 and mapped.x is signals
    for index in (np.array([3, 1]), np.array([30])):
        (x, y), (same_x, same_y) = there.batch(index), mapped.batch(index)
        assert x.is_cuda and y.is_cuda and torch.equal(x, same_x) and torch.equal(y, same_y)
        assert np.array_equal(x.cpu().numpy(), signals[labels.row[index]].astype(np.float32))
        assert np.array_equal(y.cpu().numpy(), labels.y[index])
