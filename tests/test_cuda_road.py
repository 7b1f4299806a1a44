"""The CUDA road on a machine without a GPU: fake tensors on "cuda:1" show crashes, wrong devices
and wrong types.

Fake tensors know shapes, types and devices and hold no numbers. PyTorch's CPU build has no backward
for them, so gradients are set by hand here; what needs real kernels stands in test_gpu.py.
"""
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch._subclasses import fake_tensor

import data
import evaluate
import model as network
import post_train

DEVICE = torch.device("cuda", 1)


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine that says to have two GPUs -> list of those that were made the current one."""
    current = []
    said = {"is_available": True, "device_count": 2, "mem_get_info": (80e9, 80e9),
            "is_bf16_supported": True, "is_current_stream_capturing": False}
    for name, value in said.items():
        monkeypatch.setattr(torch.cuda, name, lambda *a, value=value, **k: value)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.fixture
def fake(two_gpus, monkeypatch):
    """Tensors may be made on DEVICE; what would read their numbers gets zeros -> list of the sizes
    of what was pinned."""
    pinned = []
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda *a: None, raising=False)
    for name, zero in (("__float__", 0.0), ("__int__", 0), ("item", 0.0)):
        monkeypatch.setattr(torch.Tensor, name, lambda self, zero=zero: zero, raising=False)
    monkeypatch.setattr(post_train, "check_finite", lambda *a: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(len(self)) or self)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        yield pinned


def watched(model):
    """The model on DEVICE, and a list that fills as it runs: (name of the module, device and type
    of its output)."""
    seen = []
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda m, i, out, name=name: seen.append((name, out.device, out.dtype)))
        for key, p in module._parameters.items():
            there = torch.empty(p.shape, device=DEVICE)
            module._parameters[key] = torch.nn.Parameter(there, requires_grad=False)
    return model, seen


def check(seen, amp):
    assert {device for _, device, _ in seen} == {DEVICE}
    assert {kind for name, _, kind in seen if name == "dense"} == {torch.float32}
    assert {kind for name, _, kind in seen if "conv" in name} == {amp or torch.float32}


@pytest.mark.parametrize("amp", [torch.float16, torch.bfloat16, None])
def test_an_epoch(fake, monkeypatch, amp):
    model, seen = watched(network.ecgfounder(12, drop_path=0.5, dropout=0.05))

    def backward(loss):
        assert loss.device == DEVICE and loss.dtype == torch.float32
        for p in model.parameters():
            p.grad = torch.zeros_like(p)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    signals = np.zeros((9, 12, 5000), np.float16)
    split = post_train.Split(signals, np.arange(1, 9), torch.zeros(8, 12, device=DEVICE))
    split = post_train.on_device(split, DEVICE)
    assert split.array.device == DEVICE and split.array.dtype == torch.float16
    assert split.array.shape == (8, 12, 5000) and split.rows.tolist() == list(range(8))
    stage = post_train.stages_of(post_train.parse(["--task", "all71"]))[1]
    optimizer = post_train.make_optimizer(stage, [model])
    scaler = torch.amp.GradScaler("cuda", enabled=amp == torch.float16)
    index = [np.arange(4), np.arange(4, 8)]
    post_train.train_epoch(model, optimizer, scaler, split, index, [1e-3] * 2, 1.0, amp)
    check(seen, amp)
    assert fake == [4] * 4  # row numbers, of signals and labels: no copy waits for the GPU
    assert all(p.device == DEVICE for p in model.parameters())
    assert all(state["exp_avg"].device == DEVICE for state in optimizer.state.values())


class AtOnce(nullcontext):
    """A pool without threads, as fake tensors live in one."""

    def __init__(self, workers):
        super().__init__(self)

    def submit(self, function, *arguments):
        result = function(*arguments)
        return SimpleNamespace(result=lambda: result)


def test_inference(fake, monkeypatch):
    """What is predicted on a GPU, from pinned batches, comes back as numbers on the CPU."""
    model, seen = watched(network.ecgfounder(12).eval())
    monkeypatch.setattr(data, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(torch.Tensor, "cpu",
                        lambda self: SimpleNamespace(numpy=lambda: np.zeros(self.shape)))
    signals = np.zeros((5, 12, 5000), np.float16)
    got = evaluate.infer(model, signals, np.arange(5), DEVICE, 2, torch.float16)
    assert got.shape == (5, 12) and fake == [2, 2, 1]
    check(seen, torch.float16)


@pytest.mark.parametrize("options, rank, index", [
    (["--device", "cuda:1"], None, 1), (["--device", "cuda"], None, 0), ([], None, 0),
    ([], "1", 1)])
def test_a_run_takes_its_gpu(two_gpus, demo_set, tmp_path, monkeypatch, options, rank, index):
    """From the options to the training and to the test fold, which are left out here."""
    def predict_folds(path, folds, root, task, device, skip_unreadable):
        seen.append((*folds, device))
        y = np.eye(2, dtype=int)
        return {"y_true": y, "y_prob": y, "patient_id": None, "classes": np.array(["a", "b"])}, None

    seen, device = [], torch.device("cuda", index)
    if rank:
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
    for name in ("barrier", "destroy_process_group"):
        monkeypatch.setattr(post_train.dist, name, lambda: None)
    monkeypatch.setattr(post_train.dist, "init_process_group", seen.append)
    monkeypatch.setattr(post_train, "train", lambda args, *where: seen.extend([args.amp, *where]))
    monkeypatch.setattr(evaluate, "predict_folds", predict_folds)
    monkeypatch.setattr(evaluate, "load_checkpoint", lambda path: {})
    post_train.post_train(post_train.parse([
        "--task", "rhythm12", "--weights", "none", "--data", str(demo_set),
        "--out", str(tmp_path / "run"), *options]))
    assert two_gpus == [device]
    alone = ["fp16", device, 0, 1, (9, device), (10, device)]
    assert seen == (["nccl", "fp16", device, 1, 2] if rank else alone)


def test_a_process_that_fails_does_not_wait_for_the_others(monkeypatch, capsys):
    """All processes end an NCCL group together: one that has failed ends without."""
    ended = Mock()
    group = SimpleNamespace(init_process_group=lambda kind: None, is_initialized=lambda: True)
    monkeypatch.setattr(post_train, "dist", group)  # without a way to end it
    monkeypatch.setattr(post_train, "train", Mock(side_effect=data.InputError("alone")))
    monkeypatch.setattr(post_train, "post_train",
                        lambda args: post_train.train_in_group(args, DEVICE, 1, 2))
    monkeypatch.setattr(post_train.os, "_exit", ended)
    with pytest.raises(SystemExit):  # as that came back here
        post_train.main(["--task", "rhythm12"])
    ended.assert_called_once_with(2)
    assert capsys.readouterr().err == "post_train.py: alone\n"
