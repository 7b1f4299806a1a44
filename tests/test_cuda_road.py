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
TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine that says to have two GPUs -> list of those that were made the current one."""
    current = []
    for name, value in (("is_available", True), ("device_count", 2), ("mem_get_info", (8e10, 8e10)),
                        ("is_bf16_supported", True), ("is_current_stream_capturing", False)):
        monkeypatch.setattr(torch.cuda, name, lambda *a, value=value, **more: value)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.fixture
def fake(two_gpus, monkeypatch):
    """Tensors may be made on DEVICE -> a small network there, and a list that fills as it runs:
    name of the module, device and type of its output."""
    stand_ins = {   # for what needs CUDA itself
        "__getitem__": lambda x, i: x.narrow(0, 0, i.stop), "item": lambda x: 0.5,
        "cpu": lambda x: SimpleNamespace(numpy=lambda: np.zeros(x.shape))}
    model, seen = network.ecgfounder(12, drop_path=0.5, levels=((16, 1), (32, 2))), []
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda *a: None, raising=False)
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.Tensor, name, stand_in)
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        for name, module in model.named_modules():
            module.register_forward_hook(
                lambda m, i, out, name=name: seen.append((name, out.device, out.dtype)))
            for key, p in module._parameters.items():
                there = torch.empty(p.shape, device=DEVICE)
                module._parameters[key] = torch.nn.Parameter(there, requires_grad=False)
        yield model, seen


@pytest.mark.parametrize("amp", [torch.float16, torch.bfloat16, None])
def test_an_epoch_and_inference(fake, monkeypatch, amp):
    def backward(loss):
        assert loss.device == DEVICE and loss.dtype == torch.float32
        for p in parameters:
            p.grad = torch.zeros_like(p)

    (model, seen), parameters = fake, list(fake[0].parameters())
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    labels = SimpleNamespace(y=np.zeros((8, 12), np.uint8), row=np.arange(1, 9))
    split = post_train.make_split(np.zeros((9, 12, 5000), np.float16), labels, DEVICE)
    assert (split.x.device, split.x.dtype, split.x.shape) == (DEVICE, torch.float16, (8, 12, 5000))
    optimizer = torch.optim.AdamW(parameters, fused=True)
    scaler = torch.amp.GradScaler("cuda", enabled=amp == torch.float16)
    post_train.train_epoch(model, optimizer, scaler, split, [np.arange(4)], [1e-3], 1.0, amp)
    rows, signals = np.arange(300), np.zeros((300, 12, 320), np.float16)
    assert evaluate.infer(model.eval(), signals, rows, DEVICE, amp).shape == (300, 12)
    assert {out[1:] for out in seen if out[0] == "dense"} == {(DEVICE, torch.float32)}
    assert {out[1:] for out in seen if "conv" in out[0]} == {(DEVICE, amp or torch.float32)}
    assert {optimizer.state[p]["exp_avg"].device for p in parameters} == {DEVICE}


@pytest.mark.parametrize("options, variables, index", [
    (["--device", "cuda:1"], {}, 1), ([], {}, 0), ([], TORCHRUN, 1)])
def test_a_run_takes_its_gpu(two_gpus, demo_set, tmp_path, monkeypatch, options, variables, index):
    """That of its LOCAL_RANK, if it has one; training and test are left out."""
    seen, device = [], torch.device("cuda", index)
    for item in variables.items():
        monkeypatch.setenv(*item)
    for name in ("init_process_group", "barrier", "destroy_process_group"):
        monkeypatch.setattr(post_train.dist, name, lambda *kind: seen.extend(kind))
    for name in ("train", "finish"):
        monkeypatch.setattr(post_train, name, lambda args, *a: seen.append((args.amp, a[0])))
    post_train.main(["--task", "rhythm12", "--weights", "none", "--data", str(demo_set), *options,
                     "--out", str(tmp_path)])
    assert two_gpus == [device]
    assert seen == (["nccl", ("fp16", device)] if variables else [("fp16", device)] * 2)


def test_torchrun_starts_more_processes_than_gpus(two_gpus, fails, tmp_path, monkeypatch):
    for key, value in {**TORCHRUN, "RANK": "2", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(key, value)
    argv = ["--task", "rhythm12", "--weights", "none", "--out", tmp_path]
    fails(post_train.main, argv, "cuda:2", "cpu, cuda, cuda:0, cuda:1")
    assert not two_gpus
