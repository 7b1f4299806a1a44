"""Speed on made-up ECGs: the project against the obvious way (plain.py), or one way of training
against another, with the same numbers, in turn: medians over rounds of all that a user waits for.

    python tests/tools/benchmark.py                     # some ten minutes on 2 CPU cores
    python tests/tools/benchmark.py --device cuda --rows graphs floor runs
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
from unittest.mock import patch

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (2, 0)]

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

import data
import evaluate
import model as network
import plain
import post_train
from make_demo import make_demo


def row(title, function, ours, other, rounds, n=1):
    """Call `function` of our and of the other way in turn; print both median times in ms for each
    of n ECGs or steps -> what it returned."""
    results, times = [], []
    for way in [ours, other] * rounds:
        start = time.perf_counter()
        results.append(function(way))
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / n)
    show(title, times)
    return results


def show(title, seconds):
    a, b = (float(f"{1e3 * s:.3g}") for s in np.median(np.reshape(seconds, (-1, 2)), axis=0))
    print(f"| {title} | {a:,g} | {b:,g} | {b / a:.3g}x |", flush=True)


class Anew(partial):
    """In the place of an array: what a function makes of the indices, whenever it is needed."""
    __getitem__ = partial.__call__


def signals(args):
    rows, n = args.labels.row, len(args.labels.row)

    def build():
        shutil.rmtree(args.root / "cache", ignore_errors=True)
        return data.load_records(args.root, "rhythm12", workers=2)[1]

    def epoch(x):
        split = post_train.Split(x, rows, torch.zeros(n, 1))
        return [split.batch(index)[0] for index in post_train.epoch_batches(n, 32, 0)]

    row("cache, 2 workers", lambda way: way(), build, partial(args.records, rows), args.rounds, n)
    row("signals of an epoch", epoch, build(), args.records, args.rounds, n)


def trainer(args, batch, amp, drop_path, mode, steps, graph=False, resident=True, lean=True):
    """A function that trains for an epoch of `steps`, and their step; by then one epoch is over.
    resident: signals on the device, not in the host's memory; lean: our network, not plain.py's."""
    torch.manual_seed(0)
    net = (network.ecgfounder if lean else plain.PlainNet1D)(71, 12, drop_path, mode, 0.05)
    n, stage = batch * steps, post_train.stages_of(post_train.parse(["--task", "all71"]), steps)[1]
    adam = post_train.make_optimizer(stage, list(net.to(args.device).parameters()))
    scaler = torch.amp.GradScaler(args.device.type, enabled=amp == "fp16")
    step = post_train.GraphedStep(adam, args.device) if graph else post_train.train_step
    x = torch.randn(n, 12, 5000, device=args.device).half()
    y = (torch.rand(n, 71, device=args.device) < 0.03).float()
    split = post_train.Split(x if resident else x.cpu().numpy(), np.arange(n), y)

    def epoch():
        torch.manual_seed(0)
        batches, rates = post_train.epoch_batches(n, batch, 0), [2**-13] * steps
        loss = post_train.train_epoch(net, adam, scaler, split, batches, rates, stage.clip,
                                      post_train.AMP[amp], step)
        return [torch.tensor(loss), *net.parameters(), *(s["exp_avg"] for s in adam.state.values())]

    epoch()
    return epoch, step


def whole_steps(args, batch=32, amp="off", drop_path=0.0, mode="constant", steps=1, option="lean"):
    """Whole training steps with and without an option of `trainer`."""
    ways = [trainer(args, batch, amp, drop_path, mode, steps, **{option: value})
            for value in (True, False)]
    row(f"whole step of {batch}, amp {amp}, drop path {drop_path} {mode}: {option}, or not",
        lambda way: way[0](), *ways, args.rounds, steps)


def floor(args, batch, amp, drop_path, steps, piece=10**9):
    """A replay alone, and copies of 1 GB, each read and written: as many bytes as it moves."""
    epoch, step = trainer(args, batch, amp, drop_path, "constant", steps, graph=True)
    gb = 2.02 + batch * (0.119 if drop_path else 0.173)     # counted on the kernels' true shapes
    source, target = torch.empty(2, piece, dtype=torch.uint8, device=args.device)
    row(f"step of {batch}, amp {amp}, drop path {drop_path}: replay, floor of {gb:.3g} GB moved",
        lambda calls: [call() for call in calls], [step.graph.replay] * steps,
        [partial(target.copy_, source)] * round(steps * gb / 2), args.rounds, steps)


def each(function, args, batches=(32, 256), amps=post_train.AMP, steps=20, **options):
    for kind in product(batches, amps, (0.5, 0.0)):
        function(args, *kind, steps=steps, **options)


def run(args, changes, options):
    """post_train.py under these patches, where no cache is -> the run's folder."""
    shutil.rmtree(args.root / "cache", ignore_errors=True)
    out = tempfile.mkdtemp(dir=args.root)
    with contextlib.ExitStack() as stack:
        for change in [contextlib.redirect_stdout(sys.stderr), *changes]:
            stack.enter_context(change)
        post_train.main(f"--weights none --out {out} {options}".split())
    return out


def training(options, args):
    """A whole command, from the building of the cache to the scores of fold 10; plainly with the
    other network, signals and features being made anew whenever they are needed."""
    command = f"--data {args.root} --task rhythm12 --frac 0.5 --device cpu {options}"
    plainly = (patch.object(data, "load_records", lambda *_, **__: (args.labels, args.records)),
               patch.object(network, "ecgfounder", plain.PlainNet1D),
               patch.object(post_train, "extract_features", lambda net, split, amp: split._replace(
                   x=Anew(evaluate.infer, net.eval().forward_features, split.x, device="cpu"))))
    row(f"post_train.py {options}, 51 ECGs", lambda changes: run(args, changes, command), (),
        plainly, 1)


def runs(args, sizes=(17418, 2183, 2198)):
    """Whole runs with a graph and without, the cache being there, on a tenth and on all of a set
    with as many ECGs as PTB-XL's folds 1-8, 9 and 10: the made-up ones, again and again."""
    ids, (labels, few) = np.arange(sum(sizes)), data.load_records(args.root, "all71", workers=2)
    labels = labels.take(ids % len(few))._replace(ecg_id=ids, row=ids, patient_id=ids,
                                                  fold=np.repeat([1, 9, 10], sizes))
    cached = labels, np.resize(few, (len(ids), *few.shape[1:]))
    changes = [patch.object(data, "load_records", lambda *_, **__: cached)]
    for frac in (0.1, 1):
        options = f"--task all71 --frac {frac} --epochs 2 --device {args.device}"
        outs = row(f"{frac * sizes[0]:,.0f} ECGs, post_train.py {options}: --graph, or not",
                   partial(run, args, changes), f"{options} --graph", options, args.rounds)
        logs = [Path(out, "metrics.jsonl").read_text().splitlines() for out in outs]
        show("its last epoch, with validation",
             [json.loads(lines[-1 - len(post_train.SHARES)])["seconds"] for lines in logs])


def scores(args):
    """A test fold's macro scores, ours with their intervals."""
    y, prob = np.random.default_rng(0).random((2, 2198, 71))
    p = {"y_true": y < 0.03, "y_prob": prob, "classes": range(71)}
    row("scores of 71 classes", lambda way: way(), lambda: evaluate.report(evaluate.score(p), p),
        lambda: [np.mean([*map(metric, p["y_true"].T, prob.T)])
                 for metric in (roc_auc_score, average_precision_score)], args.rounds)


ROWS = {
    "signals": signals, "scores": scores, "probe": partial(training, "--epochs 0"),
    "whole": partial(training, "--probe-epochs 10 --epochs 10"), "backbone": whole_steps,
    "depth-constant": partial(whole_steps, drop_path=0.5),
    "depth-linear": partial(whole_steps, drop_path=0.5, mode="linear"),
    "bf16": partial(whole_steps, drop_path=0.5, amp="bf16"),
    "steps": partial(each, whole_steps), "graphs": partial(each, whole_steps, option="graph"),
    "floor": partial(each, floor, amps=["fp16"]), "runs": runs,
    "resident": partial(each, whole_steps, option="resident", batches=[256], amps=["fp16"])}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS)[:-5],
                        help="default: all but the last five, which are for a GPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", type=evaluate.pick_device, default="cpu")
    args = parser.parse_args(argv)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, GPUs {gpus}\n\n"
          "| ms an ECG, a whole step or a run | ours | other | ratio |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        args.root = Path(folder)
        make_demo(args.root, 128)
        args.labels = data.load_labels(args.root, "rhythm12")
        paths = [args.root / record for record in args.labels.record]
        args.records = Anew(lambda rows: np.stack([plain.read_and_filter(paths[i]) for i in rows]))
        for name in args.rows:
            ROWS[name](args)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
