"""Speed: the project against the obvious way (plain.py), which gives the same numbers, in turn, on
made-up ECGs. A figure is the median over rounds of all that a user waits for.

    python tests/tools/benchmark.py                     # some ten minutes on 2 CPU cores
    python tests/tools/benchmark.py --device cuda --rows steps resident
"""
import argparse
import contextlib
import shutil
import sys
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import patch

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (2, 0)]

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, roc_auc_score

import data
import evaluate
import model as network
import plain
import post_train
from make_demo import make_demo


def row(title, function, ours, obvious, rounds, n=1):
    """Call `function` of our and of the obvious way in turn; print both median times in ms for each
    of n ECGs."""
    times = []
    for way in [ours, obvious] * rounds:
        start = time.perf_counter()
        function(way)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        times.append(1e3 / n * (time.perf_counter() - start))
    a, b = np.median(np.reshape(times, (rounds, 2)), axis=0)
    print(f"| {title} | {a:,.3g} | {b:,.3g} | {b / a:.3g}x |", flush=True)


class Anew:
    """In the place of an array: what `function` makes of the indices, whenever it is needed."""

    def __init__(self, function):
        self.function = function

    def __getitem__(self, rows):
        return self.function(rows)


def signals(args):
    n = len(args.labels.row)

    def build():
        shutil.rmtree(args.root / "cache", ignore_errors=True)
        return data.load_records(args.root, "rhythm12", workers=2)[1]

    def epoch(x):
        split = post_train.Split(x, args.labels.row, torch.zeros(n, 1))
        return [split.batch(index)[0] for index in post_train.epoch_batches(n, 32, 0)]

    row("cache, 2 workers", lambda way: way(), build,
        lambda: args.records[args.labels.row], args.rounds, n)
    row("signals of an epoch", epoch, build(), args.records, args.rounds, n)


def step(args, drop_path=0.0, mode="constant", dtype="float32", batch=32):
    """Forward and backward of both networks, with the same weights and dropped branches."""
    x = torch.randn(batch, 12, 5000, device=args.device)
    ours, obvious = (make(71, 12, drop_path, mode).to(args.device)
                     for make in (network.ecgfounder, plain.PlainNet1D))
    obvious.load_state_dict(ours.state_dict())

    def passes(net):
        torch.manual_seed(0)
        net.zero_grad()
        with torch.autocast(args.device.type, getattr(torch, dtype), enabled=dtype != "float32"):
            logits = net(x).float()
        F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits)).backward()
        return [logits.detach(), *(p.grad for p in net.parameters())]

    title = f"step of {batch}, drop path {drop_path} {mode}, {dtype}"
    row(title, passes, ours, obvious, args.rounds, batch)


def steps(args, batches=(32, 256)):
    for batch, dtype, rate in product(batches, ("float32", "float16", "bfloat16"), (0.0, 0.5)):
        step(args, rate, dtype=dtype, batch=batch)


def resident(args, n=4096, size=256):
    """An epoch of fine-tuning in fp16, from signals on the device and in the host's memory."""
    x, y = torch.zeros(n, 12, 5000).half(), torch.zeros(n, 71, device=args.device)
    net = network.ecgfounder(71, drop_path=0.5).to(args.device)
    optimizer, scaler = torch.optim.AdamW(net.parameters()), torch.amp.GradScaler(args.device.type)
    index = post_train.epoch_batches(n, size, 0)

    def epoch(signals):
        split, rates = post_train.Split(signals, np.arange(n), y), [1e-7] * len(index)
        return post_train.train_epoch(net, optimizer, scaler, split, index, rates, amp=x.dtype)

    row("epoch, signals on the device", epoch, x.to(args.device), x.numpy(), args.rounds, n)


def training(options, args):
    """A whole command, from the building of the cache to the scores of fold 10; plainly with the
    other network, signals and features being made anew whenever they are needed."""
    def features(net, split, amp):
        forward = torch.no_grad()(net.eval().forward_features)
        return split._replace(x=Anew(lambda rows: forward(torch.from_numpy(split.x[rows])).numpy()))

    def train(changes):
        shutil.rmtree(args.root / "cache", ignore_errors=True)
        out = tempfile.mkdtemp(dir=args.root)
        with contextlib.ExitStack() as stack:
            for change in [contextlib.redirect_stdout(sys.stderr), *changes]:
                stack.enter_context(change)
            post_train.main(f"--data {args.root} --task rhythm12 --frac 0.5 --weights none "
                            f"--device cpu --out {out} {options}".split())
        return out

    plainly = (patch.object(data, "load_records", lambda *_, **__: (args.labels, args.records)),
               patch.object(network, "ecgfounder", plain.PlainNet1D),
               patch.object(post_train, "extract_features", features))
    row(f"post_train.py {options}, 51 ECGs", train, (), plainly, 1)


def scores(args):
    """A test fold's macro scores, ours with their intervals."""
    def ours(p):
        return evaluate.report(evaluate.score(p), p)

    def obvious(p):
        return [np.mean([*map(metric, p["y_true"].T, p["y_prob"].T)])
                for metric in (roc_auc_score, average_precision_score)]

    y, prob = np.random.default_rng(0).random((2, 2198, 71))
    p = {"y_true": y < 0.03, "y_prob": prob, "classes": range(71)}
    row("scores of 71 classes", lambda way: way(p), ours, obvious, args.rounds)


ROWS = {
    "signals": signals, "scores": scores, "backbone": step,
    "depth-constant": partial(step, drop_path=0.5),
    "depth-linear": partial(step, drop_path=0.5, mode="linear"),
    "bf16": partial(step, drop_path=0.5, dtype="bfloat16"),
    "probe": partial(training, "--epochs 0"),
    "whole": partial(training, "--probe-epochs 10 --epochs 10"),
    "steps": steps, "resident": resident}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS)[:-2],
                        help="default: all but the last two, which are for a GPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", type=evaluate.pick_device, default="cpu")
    args = parser.parse_args(argv)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n\n"
          "| milliseconds (per ECG) | ours | plain | ratio |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        args.root = Path(folder)
        make_demo(args.root, 128)
        args.labels = data.load_labels(args.root, "rhythm12")
        paths = [args.root / record for record in args.labels.record]
        args.records = Anew(lambda rows: np.stack([plain.read_and_filter(paths[i]) for i in rows]))
        for name in args.rows:
            ROWS[name](args)


if __name__ == "__main__":
    main()
