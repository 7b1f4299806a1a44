"""Speed, side by side: the project against the obvious way (plain.py), in one process, in turn, on
made-up ECGs. A figure is the median over rounds of all that a user waits for.

    python tests/tools/benchmark.py                     # some ten minutes on 2 CPU cores
    python tests/tools/benchmark.py --rows backbone depth-constant --rounds 9
    python tests/tools/benchmark.py --device cuda --rows steps resident
"""
import argparse
import contextlib
import json
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

SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16


def row(title, ours, obvious, tolerance, rounds, n=None):
    """Call two functions in turn and print their median times in seconds, or in ms for each of n
    ECGs, the ratio, and the largest relative difference of what they return, which must be within
    the tolerance."""
    times, results, differ = [], [], 0.0
    for way in [ours, obvious] * rounds:
        torch.manual_seed(1)
        start = time.perf_counter()
        results = [*results[-1:], way()]
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    for pair in zip(*results, strict=True):
        a, b = (torch.as_tensor(x, dtype=torch.double).cpu() for x in pair)
        differ = max(differ, float((a - b).abs().max() / b.abs().max()))
    assert differ <= tolerance, f"{title}: the two ways differ by {differ}"
    a, b = np.median(np.reshape(times, (rounds, 2)), axis=0) * (1e3 / n if n else 1)
    unit = "ms/ECG" if n else "s"
    print(f"| {title} | {a:.3g} | {b:.3g} | {unit} | {b / a:.3g}x | {differ:.0e} |", flush=True)


class Records:
    """In the place of a cache: records are read and filtered whenever they are needed."""

    def __init__(self, root, labels):
        self.paths = [root / record for record in labels.record]

    def __getitem__(self, rows):
        return np.stack([plain.read_and_filter(self.paths[i]) for i in rows])


class Features:
    """In the place of an array: features are computed whenever they are needed."""

    def __init__(self, net, split):
        self.net, self.signals = net.eval(), split.x

    def __getitem__(self, rows):
        with torch.no_grad():
            return self.net.forward_features(torch.from_numpy(self.signals[rows])).numpy()


@cache
def made_up_set(root, n=128):
    make_demo(root, n)
    labels = data.load_labels(root, "rhythm12")
    return labels, Records(root, labels)


def signals(args):
    """Building the cache, against reading and filtering; an epoch's batches from each."""
    labels, records = made_up_set(args.root)
    n = len(labels.row)

    def build():
        shutil.rmtree(args.root / "cache", ignore_errors=True)
        return np.array(data.load_records(args.root, "rhythm12", workers=2)[1])

    def epoch(x):
        split = post_train.Split(x, labels.row, torch.zeros(n, 1))
        return [split.batch(index)[0] for index in post_train.epoch_batches(n, 32, 0)]

    row("building the cache, 2 workers", build, lambda: records[labels.row], 1e-2, args.rounds, n)
    cached = data.load_records(args.root, "rhythm12")[1]
    row("an epoch's signals", partial(epoch, cached), partial(epoch, records), 1e-2, args.rounds, n)


def step(title, args, drop_path=0.0, mode="constant", batch=32, dtypes=(SINGLE, SINGLE)):
    """Forward and backward of the project's network and of the plain one, with the same weights and
    dropped branches, each in its precision."""
    x = torch.randn(batch, 12, 5000, device=args.device)
    ours, obvious = nets = [make(71, 12, drop_path, mode).to(args.device)
                            for make in (network.ecgfounder, plain.PlainNet1D)]
    obvious.load_state_dict(ours.state_dict())

    def passes(net, dtype):
        net.zero_grad()
        with torch.autocast(args.device.type, dtype, enabled=dtype != SINGLE):
            logits = net(x).float()
        F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits)).backward()
        return [logits.detach(), *(p.grad for p in net.parameters())]

    row(f"{title}, batch {batch}", *map(partial, [passes] * 2, nets, dtypes),
        0.05 if dtypes == (SINGLE, SINGLE) else 0.3, args.rounds, batch)


def steps(args, batches=(32, 256)):
    for batch, rate, dtype in product(batches, (0.0, 0.5), (SINGLE, HALF, BRAIN)):
        step(f"{dtype}, drop path {rate}", args, rate, "constant", batch, (dtype, dtype))


def resident(args, n=4096, size=256):
    """An epoch of fine-tuning in fp16, from signals on the device and in the host's memory."""
    x, y = torch.zeros(n, 12, 5000, dtype=HALF), torch.zeros(n, 71, device=args.device)
    net = network.ecgfounder(71, drop_path=0.5).to(args.device)
    optimizer, scaler = torch.optim.AdamW(net.parameters()), torch.amp.GradScaler(args.device.type)
    index = post_train.epoch_batches(n, size, 0)

    def epoch(signals):
        split = post_train.Split(signals, np.arange(n), y)
        return [post_train.train_epoch(net, optimizer, scaler, split, index, [1e-7] * len(index),
                                       amp=HALF)]

    row("an epoch, signals on the device", partial(epoch, x.to(args.device)),
        partial(epoch, x.numpy()), 1e-2, args.rounds, n)


def training(title, options, args):
    """A whole command on 51 ECGs, from the building of the cache to the scores of fold 10; plainly
    with the plain network, Records and Features."""
    known = made_up_set(args.root)      # Labels, Records

    def losses():
        shutil.rmtree(args.root / "cache", ignore_errors=True)
        out = tempfile.mkdtemp(dir=args.root)
        argv = (f"--data {args.root} --task rhythm12 --frac 0.5 --weights none --device cpu "
                f"--out {out} {options}")
        with contextlib.redirect_stdout(sys.stderr):
            post_train.main(argv.split())
        lines = map(json.loads, Path(out, "metrics.jsonl").read_text().splitlines())
        return [line["val_loss"] for line in lines if line["stage"] == "probe"]

    def plainly():
        with (patch.object(data, "load_records", lambda *args, **options: known),
              patch.object(network, "ecgfounder", plain.PlainNet1D),
              patch.object(post_train, "extract_features", lambda net, split, amp:
                           split._replace(x=Features(net, split)))):
            return losses()

    row(title, losses, plainly, 0.01, 1)


def scores(args, n=2198):
    rng, classes = np.random.default_rng(0), range(71)
    y, prob = rng.random((n, 71)) < 0.03, rng.random((n, 71))
    p = {"y_true": y, "y_prob": prob, "classes": classes}

    def ours():
        report = evaluate.report(evaluate.score(p), p)
        return report["macro_auroc"], report["macro_auprc"]

    def obvious():
        return [np.mean([score(y[:, c], prob[:, c]) for c in classes])
                for score in (roc_auc_score, average_precision_score)]

    row("scores of 71 classes, ours with intervals", ours, obvious, 1e-9, args.rounds)


ROWS = {
    "signals": signals, "scores": scores, "backbone": partial(step, "backbone"),
    "depth-constant": partial(step, "stochastic depth 0.5", drop_path=0.5),
    "depth-linear": partial(step, "stochastic depth to 0.5", drop_path=0.5, mode="linear"),
    "bf16": partial(step, "bf16, plain in float32", dtypes=(BRAIN, SINGLE)),
    "probe": partial(training, "probe of 30 epochs, 51 ECGs", "--epochs 0"),
    "whole": partial(training, "10 and 10 epochs, 51 ECGs", "--probe-epochs 10 --epochs 10"),
    "steps": steps, "resident": resident}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS)[:-2],
                        help="default: all but the last two, which are for a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", type=evaluate.pick_device, default="cpu")
    args = parser.parse_args(argv)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n\n"
          "| row | ours | plain | unit | ratio | differ |\n| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        args.root = Path(folder)
        for name in args.rows:
            ROWS[name](args)


if __name__ == "__main__":
    main()
