"""Speed, measured side by side: the project against the obvious way (plain.py), in one process,
alternating, on made-up ECGs. A figure is the median over rounds of all that a user waits for.

    python tests/tools/benchmark.py                     # some ten minutes on 2 CPU cores
    python tests/tools/benchmark.py --rows backbone whole --rounds 9
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
    """Call two functions in turn -> the cells of a row: median times in seconds, or in ms for each
    of n ECGs, and by how much the results differ, relative to the largest. Raises AssertionError
    where that is more than the tolerance."""
    times, results, worst = [], [], 0.0
    for way in [ours, obvious] * rounds:
        torch.manual_seed(1)
        start = time.perf_counter()
        results = [*results[-1:], way()]
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    for pair in zip(*results, strict=True):
        a, b = (torch.as_tensor(x).double().cpu() for x in pair)
        worst = max(worst, float((a - b).abs().max() / b.abs().max()))
    assert worst <= tolerance, f"{title}: the two ways differ by {worst}"
    a, b = np.median(np.reshape(times, (rounds, 2)), axis=0) * (1e3 / n if n else 1)
    return title, f"{a:.3g}", f"{b:.3g}", "ms/ECG" if n else "s", f"{b / a:.3g}x", f"{worst:.0e}"


# ----------------------------------------------------------------------------- data, single steps

class Records:
    """In the place of a cache: records that are read and filtered whenever they are needed."""

    def __init__(self, root, labels):
        self.paths = [root / record for record in labels.record]

    def __getitem__(self, rows):
        return np.stack([plain.read_and_filter(self.paths[i]) for i in rows])


def made_up_set(args, n):
    """(folder of a set of n ECGs, their Labels, Records, a function that builds their cache)."""
    root = args.folder / f"set-{n}"
    if not root.exists():
        make_demo(root, n)
    labels = data.load_labels(root, "rhythm12")

    def build():
        shutil.rmtree(root / "cache", ignore_errors=True)
        path, _ = data.build_cache(root, labels.record, workers=2)
        return np.load(path, mmap_mode="c")

    return root, labels, Records(root, labels), build


def cache(args, n=256):
    _, _, records, build = made_up_set(args, n)
    title = f"preprocessing of {n} ECGs, 2 workers"
    return row(title, build, lambda: records[range(n)], 1e-2, args.rounds, n)


def feed(args, n=64):
    _, labels, records, build = made_up_set(args, n)
    index = post_train.epoch_batches(n, 32, 0)

    def epoch(x):
        split = post_train.Split(x, labels.row, torch.zeros(n, 1))
        return [split.batch(i)[0] for i in index]

    ways = partial(epoch, build()), partial(epoch, records)
    return row("signals of an epoch", *ways, 1e-2, args.rounds, n)


def networks(drop_path=0.0, mode="constant", device="cpu"):
    """The project's network and the plain one with the same weights."""
    torch.manual_seed(0)
    ours = network.ecgfounder(71, drop_path=drop_path, drop_path_mode=mode)
    rates = [block.drop_path for level in ours.stage_list for block in level.block_list]
    obvious = plain.PlainNet1D(71, drop_path_rates=rates)
    obvious.load_state_dict(ours.state_dict())
    return ours.to(device), obvious.to(device)


def step(title, args, drop_path=0.0, mode="constant", batch=32, dtypes=(None, None)):
    """Forward and backward of both networks, which skip the same branches."""
    x = torch.randn(batch, 12, 5000, device=args.device)

    def passes(net, dtype):
        net.zero_grad()
        with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
            logits = net(x).float()
        F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits)).backward()
        return [logits.detach(), *(p.grad for p in net.parameters())]

    ways = map(partial, [passes] * 2, networks(drop_path, mode, args.device), dtypes)
    tolerance = 0.1 if any(dtypes) else 1e-3
    return row(f"{title}, batch {batch}", *ways, tolerance, args.rounds, batch)


def steps(args, batches=(32, 256)):
    return [step(f"step in {PRECISION[dtype]}, drop path {p}", args, p, "constant", batch, [dtype] * 2)
            for batch, p, dtype in product(batches, (0.0, 0.5), PRECISION)]


# ------------------------------------------------------------------------------ training, scoring

def resident(args, n=4096, size=256):
    """An epoch of fine-tuning from signals on the device, and from signals in the host's memory."""
    x, ways = np.zeros((n, 12, 5000), np.float16), []
    y, index = torch.zeros(n, 71, device=args.device), post_train.epoch_batches(n, size, 0)
    for signals in (torch.from_numpy(x).to(args.device), x):
        net, _ = networks(0.5, device=args.device)
        ways.append(lambda net=net, split=post_train.Split(signals, np.arange(n), y): [
            post_train.train_epoch(net, optimizer...)])
    return row("epoch, signals on the device against the host's", *ways, 1e-2, args.rounds, n)


def train_plainly(labels, records, argv):
    """post_train.py with the plain network, for which records are read and filtered in every epoch;
    in the probe, too, the whole network runs."""
    args, cpu = post_train.parse(argv), torch.device("cpu")
    args.leads, args.amp = list(data.LEADS), "off"
    chosen = post_train.choose_records(args, labels)
    splits = [post_train.Split(records, part.row, torch.from_numpy(part.y).float())
              for part in chosen]
    run, (probe, finetune) = post_train.Run(args, *chosen, cpu), post_train.stages_of(args, 1)
    frozen, net = (plain.PlainNet1D(len(labels.classes), drop_path_rates=[p] * 20)
                   for p in (0.0, args.drop_path))
    for plain_net in (frozen, net):
        plain_net.load_state_dict(run.model.state_dict())
    run.model, frozen.requires_grad_(False).dense = net, net.dense

    list(post_train.epochs(run, probe, frozen, *splits, None))
    for name in ("probe.pt", "best.pt"):
        run.save(name, run.history[-1])
    for states in post_train.epochs(run, finetune, net, *splits, None):
        run.save("last.pt", run.history[-1], **states)
        if run.is_best("finetune"):
            run.save("best.pt", run.history[-1])
    post_train.finish(args, cpu, labels, records)


def training(title, options, args, n=64):
    """A whole command, from the building of the cache to the scores of fold 10."""
    root, labels, records, _ = made_up_set(args, n)
    argv = (f"--data {root} --task rhythm12 --weights none --dropout 0 --no-interpolate "
            f"--device cpu {options} --out").split()

    def run(train):
        shutil.rmtree(root / "cache", ignore_errors=True)
        out = Path(tempfile.mkdtemp(dir=args.folder))
        with contextlib.redirect_stdout(sys.stderr):
            train([*argv, str(out)])
        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        return [line["val_loss"] for line in lines if line["stage"] == "probe"]

    ways = partial(run, post_train.main), partial(run, partial(train_plainly, labels, records))
    return row(f"{title}, {n} ECGs", *ways, 1e-2, 1)


def scores(args, n=2198):
    rng = np.random.default_rng(0)
    y, prob, classes = rng.random((n, 71)) < 0.03, rng.random((n, 71)), range(71)
    p = {"y_true": y, "y_prob": prob, "classes": classes}

    def ours():
        report = evaluate.report(evaluate.score(p), p)
        return report["macro_auroc"], report["macro_auprc"]

    def obvious():
        return [np.mean([score(y[:, c], prob[:, c]) for c in classes])
                for score in (roc_auc_score, average_precision_score)]

    title = f"scores of {n:,} ECGs and 71 classes, ours with intervals"
    return row(title, ours, obvious, 1e-9, args.rounds)


# ------------------------------------------------------------------------------------ command line

ROWS = {
    "feed": feed, "cache": cache, "scores": scores,
    "backbone": partial(step, "forward + backward"),
    "depth-constant": partial(step, "stochastic depth of 0.5", drop_path=0.5),
    "depth-linear": partial(step, "stochastic depth linear to 0.5", drop_path=0.5, mode="linear"),
    "bf16": partial(step, "the first in bf16, the plain network in float32", drop_path=0.5, dtypes=(torch.bfloat16, None)),
    "probe": partial(training, "a linear probe of 30 epochs", "--probe-epochs 30 --epochs 0"),
    "whole": partial(training, "both stages, 10 epochs each", "--probe-epochs 10 --epochs 10"),
    "steps": steps, "resident": resident}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS)[:-2],
                        help="default: all but the last two, which are for a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", type=evaluate.pick_device, default="cpu")
    args = parser.parse_args(argv)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, numpy {np.__version__}\n")
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        for name in args.rows:
            found = ROWS[name](args)
            lines += found if isinstance(found[0], list) else [found]
    for line in lines:
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()
