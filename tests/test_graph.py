"""A training step as a CUDA graph: on the CPU with a stand-in for graphs (tape.py), bit for bit; on
a GPU with real ones, closely."""
import warnings

import numpy as np
import pytest
import torch

import data
import model as network
import post_train
import tape

CPU = torch.device("cpu")
FINETUNE, BASELINE = (post_train.stages_of(post_train.parse(["--task", "all71", *more]), 8)[1]
                      for more in ([], ["--strategy", "baseline"]))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if request.param == "cpu":
        tape.install(monkeypatch)
        return CPU
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device("cuda", 0)


class Training:
    """A small network's, in float32 or mixed precision, by graphs or not."""

    def __init__(self, device, graphed, amp=None, scale=None, stage=FINETUNE, loud=1, first=3):
        torch.manual_seed(0)
        self.net = network.ecgfounder(5, drop_path=0.5, dropout=0.1, levels=((16, 1), (32, 2)))
        self.stage, self.amp = stage, amp
        self.optimizer = post_train.make_optimizer(stage, list(self.net.to(device).parameters()))
        self.scaler = torch.amp.GradScaler(device.type, init_scale=scale or 1.0, growth_interval=4,
                                           enabled=scale is not None)
        self.step = post_train.train_step
        if graphed:
            self.step = post_train.GraphedStep(self.optimizer, device, first)
        rng = np.random.default_rng(0)
        x = torch.from_numpy(loud * rng.normal(size=(64, 12, 320)).astype(np.float32)).to(device)
        y = torch.from_numpy((rng.random((64, 5)) < 0.3).astype(np.float32)).to(device)
        self.split = post_train.Split(x, np.arange(64), y)

    def epoch(self, seed, steps, rate=None):
        """The loss of an epoch whose dropout and drop path have this seed, with a new learning rate
        for every step, or always the same."""
        torch.manual_seed(seed)
        batches = [np.arange(8 * i, 8 * i + 8) for i in range(steps)]
        rates = [2.0 ** -(8 + i) if rate is None else rate for i in range(steps)]
        return post_train.train_epoch(self.net, self.optimizer, self.scaler, self.split, batches,
                                      rates, self.stage.clip, self.amp, self.step)

    def end(self):
        """What training has left: the scaler's state, and all numbers of network and optimizer."""
        state = self.optimizer.state_dict()["state"].values()
        numbers = [*self.net.parameters(), *(value for s in state for value in s.values())]
        return self.scaler.state_dict(), [x.detach().double().cpu() for x in numbers]


@pytest.mark.parametrize("options", [
    {}, {"stage": BASELINE}, {"amp": torch.bfloat16}, {"scale": 2.0**10},
    {"scale": 2.0**127, "loud": 300}], ids=["post", "baseline", "bf16", "scaler", "skips"])
def test_a_graph_takes_the_same_steps(device, options):
    """Over epochs of 2 steps (none recorded yet), 5, 4 and 6; some are skipped in replays, too."""
    ways = [Training(device, graphed, **options) for graphed in (False, True)]
    for seed, steps in enumerate((2, 5, 4, 6)):
        loss, graphed_loss = (way.epoch(seed, steps) for way in ways)
        assert graphed_loss == (loss if device == CPU else pytest.approx(loss, rel=1e-2))
    (scaler, numbers), (graphed_scaler, graphed_numbers) = (way.end() for way in ways)
    assert ways[1].step.graph is not None and scaler == graphed_scaler
    taken = {int(state["step"]) for state in ways[0].optimizer.state.values()}
    skipped, = {2 + 5 + 4 + 6 - n for n in taken}
    assert skipped > 3 if "loud" in options else not skipped    # after the three that are eager
    for a, b in zip(numbers, graphed_numbers, strict=True):
        assert torch.equal(a, b) if device == CPU else (a - b).norm() <= 0.05 * a.norm() + 1e-6


def test_a_graph_draws_anew_from_the_generators_seed(device):
    """With a learning rate of 0 the loss changes with the draws alone."""
    eager, graphed = (Training(device, way, loud=10) for way in (False, True))
    graphed.epoch(9, 4, 0.0)    # recorded
    before = [p.clone() for p in graphed.net.parameters()]
    losses = [graphed.epoch(seed, 1, 0.0) for seed in (1, 1, 2)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)
    assert losses[0] == pytest.approx(eager.epoch(1, 1, 0.0), rel=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, graphed.net.parameters()))
    graphed.epoch(1, 1)         # and with another rate they change
    assert not any(torch.equal(a, b) for a, b in zip(before, graphed.net.parameters()))


@pytest.mark.parametrize("fault", ["rates", "batch", "results", "first"])
def test_the_stand_in_shows_what_a_graph_would_break(monkeypatch, fault):
    """A rate baked in, a batch that is not copied, a result that the next replay overwrites, state
    that is made inside the recording."""
    tape.install(monkeypatch)
    eager, graphed = Training(CPU, False), Training(CPU, True, first=0 if fault == "first" else 3)
    call = post_train.GraphedStep.__call__

    def broken(self, *arguments):
        if fault == "batch" and self.graph is not None:
            self.x = self.x.clone()
        result = call(self, *arguments)
        return self.loss if fault == "results" and self.graph is not None else result

    monkeypatch.setattr(post_train.GraphedStep, "__call__", broken)
    if fault == "rates":
        for group in graphed.optimizer.param_groups:
            group["lr"] = 0.0
    losses, graphed_losses = ([way.epoch(seed, 5) for seed in (1, 2)] for way in (eager, graphed))
    assert losses != graphed_losses


def test_a_step_that_cannot_be_recorded_is_said(monkeypatch):
    """One that reads a number back."""
    tape.install(monkeypatch)
    clip, training = torch.nn.utils.clip_grad_norm_, Training(CPU, True)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        lambda parameters, norm: clip(parameters, norm, error_if_nonfinite=True))
    with pytest.raises(data.InputError, match="read back.*--graph"):
        training.epoch(0, 4)


@pytest.mark.gpu
def test_on_a_gpu():
    """fp16 with steps skipped at first; no replay waits for the GPU, and the graph needs less than
    twice the memory."""
    device, peaks, ends, losses = torch.device("cuda", 0), [], [], []
    for graphed in (False, True):
        training = Training(device, graphed, torch.float16, 2.0**30)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        losses.append([training.epoch(seed, 8) for seed in range(6)])
        peaks.append(torch.cuda.max_memory_reserved())
        ends.append(training.end()[0])
    assert ends[0] == ends[1] and ends[0]["scale"] < 2.0**25
    np.testing.assert_allclose(*losses, rtol=2e-2)
    assert peaks[1] < 2 * peaks[0] + 100 * 2**20
    waits = []
    for steps in (2, 8):
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            training.epoch(7, steps)
        torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing" in str(w.message) for w in caught))
    assert waits[0] == waits[1]
