"""Speed, side by side: the project against the obvious way (plain.py), in turn, on made-up ECGs. A
figure is the median over rounds of all that a user waits for; both ways give the same numbers
(test_benchmark.py).

    python tests/tools/benchmark.py                     # some ten minutes on 2 CPU cores
    python tests/tools/benchmark.py --rows backbone depth-constant --rounds 9
    python tests/tools/benchmark.py --device cuda --rows steps resident
"""
import argparse
import contextlib
import shutil
import sys
import tempfile
import time
from functools import cache, partial
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


def row(title, ours, obvious, rounds, n=1):
    """Call two functions in turn and print their median times in ms for each of n ECGs."""
    times = []
    for way in [ours, obvious] * rounds:
        start = time.perf_counter()
        way()
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


@cache
def made_up_set(root, n=128):
    """(Labels, their records, read and filtered anew)."""
    make_demo(root, n)
    labels = data.load_labels(root, "rhythm12")
    paths = [root / record for record in labels.record]
    return labels, Anew(lambda rows: np.stack([plain.read_and_filter(paths[i]) for i in rows]))


def signals(args):
    labels, records = made_up_set(args.root)
    n = len(labels.row)

    def build():
        shutil.rmtree(args.root / "cache", ignore_errors=True)
        return data.load_records(args.root, "rhythm12", workers=2)[1]

    def epoch(x):
        split = post_train.Split(x, labels.row, torch.zeros(n, 1))
        return [split.batch(index)[0] for index in post_train.epoch_batches(n, 32, 0)]

    row("building the cache, 2 workers", build, lambda: records[labels.row], args.rounds, n)
    row("an epoch's signals", partial(epoch, build()), partial(epoch, records), args.rounds, n)


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

    row(f"step of {batch}, drop path {drop_path} {mode}, {dtype}", partial(passes, ours),
        partial(passes, obvious), args.rounds, batch)


def steps(args, batches=(32, 256)):
    for batch, dtype, rate in product(batches, ("float32", "float16", "bfloat16"), (0.0, 0.5)):
        step(args, rate, dtype=dtype, batch=batch)


def resident(args, n=4096, size=256):
    """An epoch of fine-tuning in fp16, from signals on the device and in the host's memory."""
    x, y = np.zeros((n, 12, 5000), np.float16), torch.zeros(n, 71, device=args.device)
    net = network.ecgfounder(71, drop_path=0.5).to(args.device)
    optimizer, scaler = torch.optim.AdamW(net.parameters()), torch.amp.GradScaler(args.device.type)
    batches = post_train.epoch_batches(n, size, 0)

    def epoch(x):
        split, rates = post_train.Split(x, np.arange(n), y), [1e-7] * len(batches)
        return [post_train.train_epoch(net, optimizer, scaler, split, batches, rates,
                                       amp=torch.float16)]

    on_device = torch.from_numpy(x).to(args.device)
    row("an epoch, signals on the device", partial(epoch, on_device), partial(epoch, x),
        args.rounds, n)


def training(options, args):
    """A whole command on 51 ECGs, from the building of the cache to the scores of fold 10; plainly
    with the other network, signals and features being made anew whenever they are needed."""
    known = made_up_set(args.root)

    def ours():
        shutil.rmtree(args.root / "cache", ignore_errors=True)
        out = tempfile.mkdtemp(dir=args.root)
        argv = (f"--data {args.root} --task rhythm12 --frac 0.5 --weights none --device cpu "
                f"--out {out} {options}")
        with contextlib.redirect_stdout(sys.stderr):
            post_train.main(argv.split())
        return out

    def features(net, split, amp):
        forward = torch.no_grad()(net.eval().forward_features)
        return split._replace(x=Anew(lambda rows: forward(torch.from_numpy(split.x[rows])).numpy()))

    def obvious():
        with (patch.object(data, "load_records", lambda *args, **options: known),
              patch.object(network, "ecgfounder", plain.PlainNet1D),
              patch.object(post_train, "extract_features", features)):
            return ours()

    row(f"post_train.py {options}, 51 ECGs", ours, obvious, 1)


def scores(args, n=2198):
    """A test fold's macro scores, ours with their intervals."""
    rng, classes = np.random.default_rng(0), range(71)
    y, prob = rng.random((n, 71)) < 0.03, rng.random((n, 71))
    p = {"y_true": y, "y_prob": prob, "classes": classes}

    def ours():
        report = evaluate.report(evaluate.score(p), p)
        return report["macro_auroc"], report["macro_auprc"]

    def obvious():
        return [np.mean([score(y[:, c], prob[:, c]) for c in classes])
                for score in (roc_auc_score, average_precision_score)]

    row(f"scores of {n} ECGs", ours, obvious, args.rounds)


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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", type=evaluate.pick_device, default="cpu")
    args = parser.parse_args(argv)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n\n"
          "| milliseconds, per ECG | ours | the obvious way | ratio |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        args.root = Path(folder)
        for name in args.rows:
            ROWS[name](args)


if __name__ == "__main__":
    main()
