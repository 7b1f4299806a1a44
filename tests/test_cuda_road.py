"""The CUDA road on a machine without a GPU: fake tensors on "cuda:1" show crashes, wrong devices
and wrong types. They hold no numbers, and have no gradients in PyTorch's CPU build; what needs real
kernels stands in test_gpu.py."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses import fake_tensor

import evaluate
import model as network
import post_train

DEVICE = torch.device("cuda", 1)


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine that says to have two GPUs -> list of those that were made the current one."""
    current, said = [], {"is_available": True, "device_count": 2, "mem_get_info": (8e10, 8e10)}
    for name, value in said.items():
        monkeypatch.setattr(torch.cuda, name, lambda *a, value=value: value)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.fixture
def fake(two_gpus, monkeypatch):
    """Tensors may be made on DEVICE -> a small network there, and a list that fills as it runs:
    name of the module, device and type of its output."""
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda *a: None, raising=False)
    model, seen = network.ecgfounder(12, drop_path=0.5, levels=((16, 1), (32, 2))), []
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        for name, module in model.named_modules():
            module.register_forward_hook(
                lambda m, i, out, name=name: seen.append((name, out.device, out.dtype)))
            for key, p in module._parameters.items():
                there = torch.empty(p.shape, device=DEVICE)
                module._parameters[key] = torch.nn.Parameter(there, requires_grad=False)
        yield model, seen


def check(seen, amp):
    assert {device for _, device, _ in seen} == {DEVICE}
    assert {kind for name, _, kind in seen if name == "dense"} == {torch.float32}
    assert {kind for name, _, kind in seen if "conv" in name} == {amp or torch.float32}


@pytest.mark.parametrize("amp", [torch.float16, torch.bfloat16, None])
def test_an_epoch(fake, monkeypatch, amp):
    def backward(loss):
        assert loss.device == DEVICE and loss.dtype == torch.float32
        for p in model.parameters():
            p.grad = torch.zeros_like(p)

    (model, seen), copied = fake, []
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.Tensor, "item", lambda self: 0.5)
    monkeypatch.setattr(torch.Tensor, "__setitem__", lambda x, i, new: copied.append(new.shape))
    labels = SimpleNamespace(y=np.zeros((8, 12), np.uint8), row=np.arange(1, 9))
    split = post_train.make_split(np.zeros((9, 12, 5000), np.float16), labels, DEVICE)
    assert (split.x.device, split.x.dtype) == (DEVICE, torch.float16)
    assert copied == [split.x.shape] == [(8, 12, 5000)]
    stage = post_train.stages_of(post_train.parse(["--task", "all71"]), 1)[1]
    optimizer = post_train.make_optimizer(stage, parameters := list(model.parameters()))
    scaler = torch.amp.GradScaler("cuda", enabled=amp == torch.float16)
    batches = [np.arange(4), np.arange(4, 8)]
    post_train.train_epoch(model, optimizer, scaler, split, batches, [1e-3] * 2, 1.0, amp)
    check(seen, amp)
    states = [optimizer.state[p]["exp_avg"] for p in parameters]
    assert {state.device for state in states} == {DEVICE}


def test_inference(fake, monkeypatch):
    model, seen = fake
    monkeypatch.setattr(torch.Tensor, "cpu",
                        lambda self: SimpleNamespace(numpy=lambda: np.zeros(self.shape)))
    signals = np.zeros((300, 12, 320), np.float16)
    got = evaluate.infer(model.eval(), signals, np.arange(300), DEVICE, torch.float16)
    assert got.shape == (300, 12)
    check(seen, torch.float16)


@pytest.mark.parametrize("options, rank, index", [
    (["--device", "cuda:1"], None, 1), ([], None, 0), ([], "1", 1)])
def test_a_run_takes_its_gpu(two_gpus, demo_set, tmp_path, monkeypatch, options, rank, index):
    """That of its LOCAL_RANK, if it has one; training and test are left out."""
    seen, device = [], torch.device("cuda", index)
    for name in ("RANK", "LOCAL_RANK") * bool(rank):
        monkeypatch.setenv(name, rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("init_process_group", "barrier", "destroy_process_group"):
        monkeypatch.setattr(post_train.dist, name, lambda *kind: seen.extend(kind))
    for name in ("train", "finish"):
        monkeypatch.setattr(post_train, name, lambda args, *a: seen.append((args.amp, a[0])))
    post_train.main(["--task", "rhythm12", "--weights", "none", "--data", str(demo_set),
                     "--out", str(tmp_path / "run"), *options])
    assert two_gpus == [device]
    assert seen == (["nccl", ("fp16", device)] if rank else [("fp16", device)] * 2)
