"""Speed, measured side by side: the project against the obvious way (tests/tools/plain.py), in one
process, alternating.

    python tests/tools/benchmark.py                     # under 10 minutes on 2 CPU cores
    python tests/tools/benchmark.py --rows backbone depth-constant --rounds 9 --json speed.json
    python tests/tools/benchmark.py --device cuda --rows steps resident schedule

A row of two ways first checks that they give the same numbers (`whole` rests on the other rows for
that, `resident` on the tests), then times them in turn; the figure is the median over rounds. The
data are made up, noise or synthetic ECGs: no time depends on what they show.
"""
import argparse
import multiprocessing
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tracemalloc
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

TOOLS = Path(__file__).resolve().parent
TESTS, ROOT = TOOLS.parents[:2]
sys.path[:0] = map(str, (ROOT, TESTS, TOOLS))

import numpy as np
import torch
import torch.nn.functional as F

import data
import evaluate
import model as network
import plain
import post_train
from helpers import edit_csv
from make_demo import make_demo

CLASSES = 71
PRECISION = {None: "float32", torch.float16: "fp16", torch.bfloat16: "bf16"}
PROBE, FINETUNE = post_train.stages_of(post_train.parse(["--task", "all71"]))


def side_by_side(ways, rounds, warm=1):
    """{name: function} -> {name: median seconds}, the functions called in turn in every round."""
    times = {name: [] for name in ways}
    for _ in range(warm + rounds):
        for name, function in ways.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(seconds[warm:])) for name, seconds in times.items()}


def row(title, times, conditions, n=None, agreement="", aim=""):
    """One line of the table. times: the seconds of "ours" and, where there is one, of "obvious"; n:
    how many ECGs took them, None to show seconds."""
    unit, scale = ("ms/ECG", 1e3 / n) if n else ("s", 1.0)
    ours, obvious = (times[way] * scale if way in times else None for way in ("ours", "obvious"))
    return {"row": title, "ours": ours, "obvious": obvious, "unit": unit,
            "ratio": obvious / ours if obvious else None,
            "aim": aim, "same within": agreement, "conditions": conditions}


def same(got, want, tolerance):
    """The largest difference, which must be within the tolerance."""
    worst = max(float((torch.as_tensor(a) - torch.as_tensor(b)).abs().max())
                for a, b in zip(got, want, strict=True))
    assert worst <= tolerance, f"the two ways differ by {worst}"
    return f"{worst:.0e}"


# --------------------------------------------------------------------------------------------- data

class Unread:
    """A set's signals, read and filtered whenever they are asked for: the obvious way."""

    def __init__(self, root):
        self.paths = evaluate.find_records([root])

    def __getitem__(self, rows):
        return np.stack([plain.read_and_filter(self.paths[i]) for i in rows])


def made_up_set(root, n):
    """The signals of n synthetic ECGs: the cache's, and unread."""
    make_demo(root, records=n)
    return np.load(data.build_cache(root).array, mmap_mode="r"), Unread(root)


def made_up_split(n, device="cpu"):
    """Noise in the place of a cache's signals, with random targets."""
    rng = np.random.default_rng(0)
    signals = np.resize(rng.normal(size=(64, 12, 5000)).astype(np.float16), (n, 12, 5000))
    y = torch.from_numpy((rng.random((n, CLASSES)) < 0.05).astype(np.float32))
    return post_train.Split(signals, np.arange(n), y.to(device))


def feed(args, folder):
    signals, unread = made_up_set(folder / "feed", 256)
    index = np.split(np.random.default_rng(0).permutation(256), 4)
    few = index[0][:4]
    agreement = same(next(data.batches(signals, [few])), unread[few], 2e-2)
    t = side_by_side({"ours": lambda: [None for _ in data.batches(signals, index)],
                      "obvious": lambda: unread[index[0]]}, args.rounds)
    times = {**t, "obvious": t["obvious"] * len(index)}
    return row("feed one epoch", times, "batches of 64, float32", 256, f"{agreement} (float16)",
               "100x")


def cache(args, folder):
    """Building with two workers against one; and what one worker adds to reading and filtering."""
    root = folder / "cache"
    make_demo(root, records=512)

    def build(workers):
        shutil.rmtree(root / "cache", ignore_errors=True)
        return data.build_cache(root, workers=workers).array

    def bare():
        return [data.preprocess(*data.read_record(p)) for p in evaluate.find_records([root])]

    assert build(1).read_bytes() == build(2).read_bytes()
    t = side_by_side({"ours": partial(build, 2), "obvious": partial(build, 1), "bare": bare}, 3,
                     warm=0)
    conditions = (f"512 records; one worker takes {t['obvious'] / t['bare']:.2f} of wfdb read + "
                  "scipy filters alone")
    return row("building the cache, 2 workers", t, conditions, 512, "same bytes", "1.8x; 1.1")


def labels(args, folder, n=21799):
    root = folder / "labels"
    make_demo(root, records=64)
    edit_csv(root / data.DATABASE, lambda rows: rows.extend(
        {**rows[i % 64], "ecg_id": i, "filename_hr": i} for i in range(65, n + 1)))
    assert len(data.load_labels(root, "all71").y) == n
    t = side_by_side({task: partial(data.load_labels, root, task) for task in data.TASKS}, 3)
    return row(f"labels of {n:,} records", {"ours": max(t.values())}, "the slowest of six tasks",
               aim="< 1.5 s")


def help_(args, folder):
    scripts = ("data.py", "model.py", "evaluate.py", "post_train.py")
    commands = {**{name: (ROOT / name, "--help") for name in scripts}, "": ("-c", "import torch")}
    t = side_by_side({name: partial(subprocess.check_output, [sys.executable, *words])
                      for name, words in commands.items()}, 5)
    slowest = max(scripts, key=t.get)
    conditions = f"{slowest} takes {t[slowest] / t['']:.2f} of `import torch`, {t['']:.3g} s"
    return row("--help of the slowest script", {"ours": t[slowest]}, conditions, aim="at most 1.3")


# -------------------------------------------------------------------------------- forward, backward

def networks(drop_path=0.0, mode="constant", device="cpu"):
    """The project's network and the plain one with the same weights, ready to train."""
    torch.manual_seed(0)
    ours = network.ecgfounder(CLASSES, drop_path=drop_path, drop_path_mode=mode)
    rates = [block.drop_path for level in ours.stage_list for block in level.block_list]
    obvious = plain.PlainNet1D(CLASSES, drop_path_rates=rates)
    obvious.load_state_dict(ours.state_dict())
    return ours.to(device).train(), obvious.to(device).train()


def passes(net, x, dtype=None):
    """Forward and backward; the gradients stay in the parameters."""
    net.zero_grad()
    with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
        logits = net(x).float()
    F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits)).backward()
    return logits.detach()


def gradients_agree(ours, obvious, x):
    """Logits and gradients of both networks, where stochastic depth draws the same samples."""
    def same_draw(block, x):
        n, kept = len(x), network.Block.kept(block, len(x))
        chosen = torch.randperm(n, device=x.device)[:kept] if kept < n else torch.arange(n)
        return x.new_zeros(n, 1, 1).index_fill_(0, chosen.to(x.device), n / kept)

    results = []
    with mock.patch.object(plain.PlainBlock, "mask", same_draw):
        for net in (ours, obvious):
            torch.manual_seed(1)
            results.append([passes(net, x), *(p.grad.clone() for p in net.parameters())])
    return same(*results, tolerance=1e-5 if x.device.type == "cpu" else 1e-2)


def step(args, folder, title, aim="", drop_path=0.0, mode="constant", dtype=None, compiled=False,
         memory=False):
    """Forward and backward of both networks, and how close ours comes to its floor: its operations
    over the measured rate of the matrix product."""
    ours, obvious = networks(drop_path, mode, args.device)
    x = torch.randn(args.batch, 12, 5000, device=args.device)
    agreement = gradients_agree(ours, obvious, x[:4])
    gflop, rate = gflop_per_ecg(ours, x[:8]), product_rate(args.device, dtype)
    ours = torch.compile(ours) if compiled else ours
    t = side_by_side({"ours": partial(passes, ours, x, dtype),
                      "obvious": partial(passes, obvious, x, dtype)}, args.rounds)
    reached = args.batch * gflop / rate / t["ours"]
    conditions = (f"batch {args.batch}, {PRECISION[dtype]}; {reached:.0%} of the floor, {gflop:.2f} "
                  f"GFLOP an ECG at the matrix product's {rate:,.0f} GFLOP/s")
    if args.device.type == "cuda":
        peaks = [peak_on_gpu(net, x, dtype) for net in (ours, obvious)]
        conditions += "; peak memory {:,.0f} MB against {:,.0f} MB".format(*peaks)
    elif memory:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            asked = [(drop_path, which, args.batch) for which in (0, 1)]
            peaks = pool.starmap(peak_memory, asked, chunksize=1)
    return row(title, t, conditions, args.batch, agreement, aim)
