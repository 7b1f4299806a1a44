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
from functools import partial
from itertools import product
from pathlib import Path

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

PRECISION = {None: "float32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def row(title, ours, obvious, tolerance, rounds, n=None):
    """Call two functions in turn -> a row's cells: median times in seconds, or in ms for each of n
    ECGs, their ratio, and the largest relative difference of the results, which must be within the
    tolerance."""
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
    return title, f"{a:.3g}", f"{b:.3g}", "ms/ECG" if n else "s", f"{b / a:.3g}x", f"{differ:.0e}"


class Records:
    """In the place of a cache: records that are read and filtered whenever they are needed."""

    def __init__(self, root, labels):
        self.paths = [root / record for record in labels.record]

    def __getitem__(self, rows):
        return np.stack([plain.read_and_filter(self.paths[i]) for i in rows])


def made_up_set(args, n):
    """(folder of a set of n ECGs, their Labels, Records)."""
    root = args.folder / f"set-{n}"
    if not root.exists():
        make_demo(root, n)
    labels = data.load_labels(root, "rhythm12")
    return root, labels, Records(root, labels)


def cached(root):
    """The set's signals from a new cache."""
    shutil.rmtree(root / "cache", ignore_errors=True)
    return data.load_records(root, "rhythm12", workers=2)[1]


def cache(args, n=256):
    root, _, records = made_up_set(args, n)
    ways = (lambda: np.array(cached(root))), (lambda: records[range(n)])
    return row("building the cache, 2 workers", *ways, 1e-2, args.rounds, n)


def feed(args, n=64):
    root, labels, records = made_up_set(args, n)
    index, y = post_train.epoch_batches(n, 32, 0), torch.zeros(n, 1)
    splits = [post_train.Split(x, labels.row, y) for x in (cached(root), records)]
    ways = [lambda split=split: [split.batch(i)[0] for i in index] for split in splits]
    return row("an epoch's signals", *ways, 1e-2, args.rounds, n)


def step(title, args, drop_path=0.0, mode="constant", batch=32, dtypes=(None, None)):
    """Forward and backward of the project's network and of the plain one, with the same weights and
    dropped branches, each in its precision."""
    def passes(net, dtype):
        net.zero_grad()
        with torch.autocast(args.device.type, dtype, enabled=dtype is not None):
            logits = net(x).float()
        F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits)).backward()
        return [logits.detach(), *(p.grad for p in net.parameters())]

    x = torch.randn(batch, 12, 5000, device=args.device)
    ours = network.ecgfounder(71, drop_path=drop_path, drop_path_mode=mode)
    rates = [block.drop_path for level in ours.stage_list for block in level.block_list]
    obvious = plain.PlainNet1D(71, drop_path_rates=rates)
    obvious.load_state_dict(ours.state_dict())
    ways = map(partial, [passes] * 2, (ours.to(args.device), obvious.to(args.device)), dtypes)
    tolerance = 0.2 if any(dtypes) or args.device.type == "cuda" else 1e-3
    return row(f"{title}, batch {batch}", *ways, tolerance, args.rounds, batch)


def steps(args, batches=(32, 256)):
    return [step(f"{PRECISION[dtype]}, drop path {p}", args, p, "constant", batch, (dtype, dtype))
            for batch, p, dtype in product(batches, (0.0, 0.5), PRECISION)]


def resident(args, n=4096, size=256):
    """An epoch of fine-tuning in fp16, from signals on the device and in the host's memory."""
    x = torch.randn(size, 12, 5000).half().repeat(n // size, 1, 1)
    y, net = torch.zeros(n, 71), network.ecgfounder(71, drop_path=0.5).to(args.device)
    optimizer, scaler = torch.optim.AdamW(net.parameters()), torch.amp.GradScaler(args.device.type)
    index = post_train.epoch_batches(n, size, 0)

    def epoch(signals):
        split = post_train.Split(signals, np.arange(n), y.to(args.device))
        return [post_train.train_epoch(net, optimizer, scaler, split, index, [1e-7] * len(index),
                                       amp=torch.float16)]

    ways = partial(epoch, x.to(args.device)), partial(epoch, x.numpy())
    return row("an epoch, signals on the device", *ways, 1e-2, args.rounds, n)


def train_plainly(labels, records, argv):
    """post_train.py with the plain network, whose backbone runs in the probe's epochs, too, on
    records that are read and filtered in every epoch."""
    args, cpu = post_train.parse(argv), torch.device("cpu")
    args.leads, args.amp = list(data.LEADS), "off"
    chosen = post_train.choose_records(args, labels)
    splits = [post_train.Split(records, part.row, torch.from_numpy(part.y).float())
              for part in chosen]
    run = post_train.Run(args, *chosen, cpu)
    net = plain.PlainNet1D(len(labels.classes), drop_path_rates=[args.drop_path] * 20)
    net.load_state_dict(run.model.state_dict())
    run.model = net
    for stage in post_train.stages_of(args, 1):
        net.requires_grad_(stage.name == "finetune").dense.requires_grad_(True)
        for states in post_train.epochs(run, stage, net, *splits, None):
            pass
        run.save("best.pt", run.history[-1], **states)
    post_train.finish(args, cpu, labels, records)


def training(title, options, args, n=64):
    """A whole command, from the building of the cache to the scores of fold 10."""
    root, labels, records = made_up_set(args, n)
    argv = (f"--data {root} --task rhythm12 --weights none --dropout 0 --no-interpolate "
            f"--device cpu {options} --out").split()

    def losses(train):
        shutil.rmtree(root / "cache", ignore_errors=True)
        out = tempfile.mkdtemp(dir=args.folder)
        with contextlib.redirect_stdout(sys.stderr):
            train([*argv, out])
        lines = map(json.loads, Path(out, "metrics.jsonl").read_text().splitlines())
        return [line["val_loss"] for line in lines if line["stage"] == "probe"]

    ways = post_train.main, partial(train_plainly, labels, records)
    return row(title, *(partial(losses, way) for way in ways), 0.1, 1)


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

    return row("scores of 71 classes, ours with intervals", ours, obvious, 1e-9, args.rounds)


ROWS = {
    "feed": feed, "cache": cache, "scores": scores,
    "backbone": partial(step, "backbone"),
    "depth-constant": partial(step, "stochastic depth 0.5", drop_path=0.5),
    "depth-linear": partial(step, "stochastic depth to 0.5", drop_path=0.5, mode="linear"),
    "bf16": partial(step, "bf16, plain in float32", dtypes=(torch.bfloat16, None)),
    "probe": partial(training, "64 ECGs: probe of 30 epochs", "--probe-epochs 30 --epochs 0 "
                     "--drop-path 0"),
    "whole": partial(training, "64 ECGs: 10 and 10 epochs", "--probe-epochs 10 --epochs 10"),
    "steps": steps, "resident": resident}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS)[:-2],
                        help="default: all but the last two, which are for a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", type=evaluate.pick_device, default="cpu")
    args = parser.parse_args(argv)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, numpy {np.__version__}\n\n"
          "| row | ours | plain | unit | ratio | differ by |\n| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        for name in args.rows:
            found = ROWS[name](args)
            for cells in found if isinstance(found, list) else [found]:
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
