"""What needs a CUDA device: mixed precision, signals on the device or pinned, compile, and the whole road."""
import json

import numpy as np
import pytest
import torch

import data
import evaluate
import model as network
import post_train
from plain import PlainNet1D
from test_post_train import arguments, history

pytestmark = pytest.mark.gpu


def on_gpu(demo, out, *more):
    return [a if a != "cpu" else "cuda" for a in arguments(demo, out, *more)]


def test_the_network_equals_the_plain_one(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    ours, plain = network.ecgfounder(7).cuda(), PlainNet1D(7).cuda()
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(4, 12, 5000, device="cuda")
    torch.testing.assert_close(ours(x), plain(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("amp", ["fp16", "bf16", "off"])
def test_the_whole_road(demo_set, tmp_path, amp, capsys):
    post_train.main(on_gpu(demo_set, tmp_path / "run", "--amp", amp))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(np.isfinite(line["train_loss"]) for line in lines) and lines[-1]["peak_memory_mb"] > 100
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert saved["args"]["amp"] == amp and bool(saved["scaler"]) == (amp == "fp16")
    evaluate.main([str(tmp_path / "run" / "best.pt"), "--json", str(tmp_path / "s.json"), "--device", "cuda"])
    got, want = json.loads((tmp_path / "s.json").read_text()), json.loads((tmp_path / "run" / "test.json").read_text())
    assert got["macro_auroc"] == pytest.approx(want["macro_auroc"], abs=1e-3)


def test_fp16_is_the_default(demo_set, tmp_path):
    post_train.main(on_gpu(demo_set, tmp_path / "run", "--epochs", "1", "--probe-epochs", "0"))
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["args"]["amp"] == "fp16"


def test_killed_and_resumed_goes_on(demo_set, tmp_path, monkeypatch):
    """GPU sums are not bit for bit the same from run to run; the losses agree closely."""
    post_train.main(on_gpu(demo_set, tmp_path / "whole"))
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        real = post_train.write_history
        m.setattr(post_train, "write_history", lambda out, h: (real(out, h), post_train.stop(2, None) if len(h) == 3 else None))
        post_train.main(on_gpu(demo_set, tmp_path / "cut"))
    post_train.main(on_gpu(demo_set, tmp_path / "cut", "--resume"))
    for a, b in zip(history(tmp_path / "whole"), history(tmp_path / "cut")):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-2)


def test_resident_and_pinned_batches_are_the_same(demo_set, monkeypatch):
    signals, rows, device = data.load_cache(demo_set).signals, np.arange(5, 40), torch.device("cuda", 0)
    split = post_train.Split(signals, rows, torch.zeros(35, 1))
    resident, there, _ = post_train.on_device(split, device)
    assert isinstance(resident, torch.Tensor) and resident.is_cuda and resident.dtype == torch.float16
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 1000))
    disk, same, _ = post_train.on_device(split, device)
    assert disk is signals and same is rows
    index = [np.array([3, 1]), np.array([30])]
    for a, b in zip(data.batches(resident, (there[i] for i in index), device), data.batches(disk, (same[i] for i in index), device)):
        assert a.is_cuda and b.is_cuda and torch.equal(a, b)


def test_compile(demo_set, tmp_path):
    post_train.main(on_gpu(demo_set, tmp_path / "run", "--compile", "--epochs", "1", "--probe-epochs", "0"))
    assert set(torch.load(tmp_path / "run" / "best.pt", weights_only=True)["state_dict"]) == set(network.ecgfounder(12).state_dict())


def test_out_of_memory_names_a_batch_to_try(demo_set, tmp_path, monkeypatch, capsys):
    def full(self, x):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(network.ECGFounder, "forward", full)
    with pytest.raises(SystemExit) as stop:
        post_train.main(on_gpu(demo_set, tmp_path / "run"))
    assert stop.value.code == 1 and "--batch-size 8 may fit" in capsys.readouterr().err
