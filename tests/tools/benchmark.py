"""Speed, measured side by side: the project against the obvious way (tests/tools/plain.py), in one
process, alternating.

    python tests/tools/benchmark.py                     # under 10 minutes on 2 CPU cores
    python tests/tools/benchmark.py --rows backbone depth-constant --rounds 9 --json speed.json
    python tests/tools/benchmark.py --device cuda --rows steps resident schedule

Every row first checks that both ways give the same numbers, then times them in turn; the figure is
the median over rounds. The data are synthetic ECGs: 64 records, repeated as often as needed. No
time depends on what the ECGs show.
"""
import argparse
import itertools
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tracemalloc
from functools import partial
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


# -------------------------------------------------------------------------------------------- tools

def side_by_side(ways, rounds, device=torch.device("cpu"), warm=1):
    """{name: function} -> {name: median seconds}, the functions called in turn in every round, the
    device's work included."""
    times = {name: [] for name in ways}
    for _ in range(warm + rounds):
        for name, function in ways.items():
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(seconds[warm:])) for name, seconds in times.items()}


def ms(times, n):
    """Milliseconds an ECG, where n ECGs took these times: ours, and where there is one, the obvious
    way's."""
    return [times[way] / n * 1e3 if way in times else None for way in ("ours", "obvious")]


def row(name, figures, conditions, unit="ms/ECG", agreement="", target=""):
    """One line of the table; figures: our way's and the obvious way's (or None) in the unit."""
    ours, obvious = figures
    return {"row": name, "ours": ours, "obvious": obvious, "unit": unit,
            "ratio": obvious / ours if obvious else None,
            "target": target, "agreement": agreement, "conditions": conditions}


def same(got, want, tolerance):
    """The largest difference, which must be within the tolerance."""
    worst = max(float((torch.as_tensor(a) - torch.as_tensor(b)).abs().max())
                for a, b in zip(got, want, strict=True))
    assert worst <= tolerance, f"the two ways differ by {worst}"
    return f"{worst:.0e}"


def fresh_process(code):
    """The numbers that Python code prints in a process of its own."""
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(TOOLS)!r}]\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


def peak_rss():
    """Megabytes this process has held at its peak. (getrusage would count those of the process that
    started it.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def product_rate(device, dtype=torch.float32):
    """Measured GFLOP/s of a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / side_by_side({"mm": lambda: a @ b}, 9, device, 3)["mm"] / 1e9


def made_up_set(root, n, unique=64):
    """Write a set of n records, `unique` synthetic ones that the csv names again and again; returns
    their paths."""
    make_demo(root, records=min(n, unique))

    def repeat(rows):
        rows[:] = [{**rows[i % len(rows)], "ecg_id": i + 1, "patient_id": i + 1} for i in range(n)]

    edit_csv(root / data.DATABASE, repeat)
    return [root / f"records500/00000/{i % unique + 1:05d}_hr" for i in range(n)]


def cached(root):
    """The set's cache, which is built where it is missing: float16 (N, 12, 5000)."""
    data.build_cache(root)
    return np.load(data.cache_files(root, "filter").array, mmap_mode="r")


def made_up_split(n, device="cpu"):
    """Noise in the place of a cache's signals, with random targets."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(min(n, 64), 12, 5000)).astype(np.float16)
    y = torch.from_numpy((rng.random((n, CLASSES)) < 0.05).astype(np.float32)).to(device)
    signals = np.tile(noise, (math.ceil(n / 64), 1, 1))[:n]
    return post_train.Split(signals, np.arange(n), y)


def made_up_batch(args):
    x = torch.randn(args.batch, 12, 5000, device=args.device)
    return x, torch.zeros(args.batch, CLASSES, device=args.device)


def networks(drop_path=0.0, mode="constant", device="cpu"):
    """The project's network and the plain one with the same weights, ready to train."""
    torch.manual_seed(0)
    ours = network.ecgfounder(CLASSES, drop_path=drop_path, drop_path_mode=mode)
    rates = [block.drop_path for level in ours.stage_list for block in level.block_list]
    obvious = plain.PlainNet1D(CLASSES, drop_path_rates=rates)
    obvious.load_state_dict(ours.state_dict())
    return ours.to(device).train(), obvious.to(device).train()


def passes(net, x, y, dtype=None):
    """Forward and backward; the gradients stay in the parameters."""
    net.zero_grad()
    with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
        logits = net(x)
    F.binary_cross_entropy_with_logits(logits.float(), y).backward()
    return logits


def gradients_agree(ours, obvious, x, y, tolerance=1e-5):
    """Logits and gradients of both networks, where stochastic depth draws the same samples."""
    def same_draw(block, x):
        n, kept = len(x), network.Block.kept(block, len(x))
        chosen = torch.randperm(n, device=x.device)[:kept] if kept < n else torch.arange(n)
        return x.new_zeros(n, 1, 1).index_fill_(0, chosen.to(x.device), n / kept)

    results = []
    with mock.patch.object(plain.PlainBlock, "mask", same_draw):
        for net in (ours, obvious):
            torch.manual_seed(1)
            logits = passes(net, x, y)
            results.append([logits.detach(), *(p.grad.clone() for p in net.parameters())])
    return same(*results, tolerance)


def peak_memory(drop_path, which, batch):
    """Megabytes that forward and backward of a fresh process add at their peak."""
    return fresh_process(f"""
import benchmark as b, torch
net = b.networks({drop_path})[{which}]
x, y = torch.randn({batch}, 12, 5000), torch.zeros({batch}, b.CLASSES)
before = b.peak_rss()
b.passes(net, x, y)
print(b.peak_rss() - before)""")[0]


def gflop_per_ecg(net, x):
    """Operations of a training step; the backward pass takes twice the forward's."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x[:8])
    return 3 * counter.get_total_flops() / len(x[:8]) / 1e9


def method():
    """The two stages of the method: probe and fine-tuning."""
    return post_train.stages_of(post_train.parse(["--task", "all71"]))


def epoch_of(net, stage, split, index, amp=None, rate=1e-6):
    """A function that trains `net` for an epoch and returns its mean loss."""
    optimizer, rates = post_train.make_optimizer(stage, [net]), [rate] * len(index)
    scaler = torch.amp.GradScaler(split.y.device.type, enabled=amp == torch.float16)
    return lambda: post_train.train_epoch(net, optimizer, scaler, split, index, rates, stage.clip,
                                          amp)[0]


def features_of(net, split, size, amp=None):
    infer, backbone, device = evaluate.infer, net.eval().forward_features, split.y.device
    x = torch.from_numpy(infer(backbone, split.array, split.rows, device, size, amp)).to(device)
    return post_train.Split(x, np.arange(len(x)), split.y)


def parts_of_a_run(net, split, index, amp):
    """{name: function}: the features, which are made once, and an epoch of each stage."""
    features = partial(features_of, net, split, len(index[0]), amp)
    probe_stage, finetune = method()
    return {"features": features, "probe": epoch_of(net.dense, probe_stage, features(), index),
            "finetune": epoch_of(net, finetune, split, index, amp)}


def whole_run(times):
    return times["features"] + 30 * times["probe"] + 30 * times["finetune"]


# ----------------------------------------------------------------------------------- rows: the data

def feed(args, folder):
    paths, order = made_up_set(folder / "feed", 256), np.random.default_rng(0).permutation(256)
    signals, index = cached(folder / "feed"), np.split(order, 4)

    def read(rows):
        return [plain.read_and_filter(paths[i]) for i in rows]

    agreement = same(next(data.batches(signals, [order[:4]])), read(order[:4]), 2e-2)
    t = side_by_side({"ours": lambda: [None for _ in data.batches(signals, index)],
                      "obvious": lambda: read(index[0])}, args.rounds)
    figures = t["ours"] / 256 * 1e3, t["obvious"] / 64 * 1e3
    return row("feed one epoch", figures, "batches of 64, float32",
               agreement=f"{agreement} (float16)", target="100x")


def cache(args, folder, n=512):
    """Building with two workers against one; and what one worker adds to reading and filtering."""
    root = folder / "cache"
    paths, array = made_up_set(root, n), data.cache_files(root, "filter").array

    def build(workers):
        shutil.rmtree(root / "cache", ignore_errors=True)
        data.build_cache(root, workers=workers)

    build(1)
    one = array.read_bytes()
    build(2)
    assert one == array.read_bytes()
    t = side_by_side({
        "ours": lambda: build(2), "obvious": lambda: build(1),
        "bare": lambda: [data.preprocess(*data.read_record(p)) for p in paths]}, 3, warm=0)
    conditions = (f"{n} records; one worker takes {t['obvious'] / t['bare']:.2f} of wfdb read + "
                  "scipy filters alone")
    return row("building the cache, 2 workers", ms(t, n), conditions, agreement="same bytes",
               target="1.8x; 1.1")


def labels(args, folder):
    root = folder / "labels"
    made_up_set(root, 21799, unique=8)
    assert len(data.load_labels(root, "all71").y) == 21799
    t = side_by_side({task: partial(data.load_labels, root, task) for task in data.TASKS}, 3)
    return row("labels of 21,799 records", (max(t.values()), None), "the slowest of six tasks", "s",
               target="< 1.5 s")


def help_(args, folder):
    def call(*words):
        subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, check=True, cwd=ROOT)

    scripts = ("data.py", "model.py", "evaluate.py", "post_train.py")
    ways = {script: partial(call, script, "--help") for script in scripts}
    t = side_by_side({**ways, "torch": partial(call, "-c", "import torch")}, 5)
    slowest = max(scripts, key=t.get)
    conditions = (f"{slowest} takes {t[slowest] / t['torch']:.2f} of `import torch`, "
                  f"{t['torch']:.3g} s")
    return row("--help of the slowest script", (t[slowest], None), conditions, "s",
               target="at most 1.3")


# ------------------------------------------------------------------------ rows: training and scores

def probe(args, folder, n=64, epochs=30, timed=2):
    split, (ours, obvious) = made_up_split(n), networks()
    start = {key: value.clone() for key, value in ours.dense.state_dict().items()}
    obvious.requires_grad_(False).dense.requires_grad_(True)  # its backbone runs in every epoch

    def train(net, head, split, count):
        head.load_state_dict(start)
        index = np.split(np.arange(n), n // 32)
        epoch = epoch_of(net, method()[0], split, index, rate=5e-3)
        for _ in range(count):
            epoch()
        return head.weight.detach().clone()

    def our_way(count):
        return train(ours.dense, ours.dense, features_of(ours, split, 32), count)

    def obvious_way():
        return train(obvious, obvious.dense, split, timed)

    agreement = same([our_way(timed)], [obvious_way()], 1e-5)
    t = side_by_side({"ours": lambda: our_way(epochs), "obvious": obvious_way},
                     max(3, args.rounds // 2), warm=0)
    conditions = (f"{n} ECGs, batch 32, float32; the obvious way timed for {timed} epochs, "
                  "extrapolated")
    figures = t["ours"], t["obvious"] * epochs / timed
    return row("probe stage, 30 epochs", figures, conditions, "s", agreement, "20x")


def step(args, folder, name, target, drop_path=0.0, mode="constant"):
    """Forward and backward of both networks in float32."""
    (ours, obvious), (x, y) = networks(drop_path, mode, args.device), made_up_batch(args)
    tolerance = 1e-5 if args.device.type == "cpu" else 1e-2
    agreement = gradients_agree(ours, obvious, x[:4], y[:4], tolerance)
    t = side_by_side({"ours": lambda: passes(ours, x, y), "obvious": lambda: passes(obvious, x, y)},
                     args.rounds, args.device)
    return row(name, ms(t, args.batch), f"batch {args.batch}, float32", agreement=agreement,
               target=target)


def depth_constant(args, folder):
    name, target = "stochastic depth, constant 0.5", "1.6x, less memory"
    result = step(args, folder, name, target, 0.5)
    if args.device.type == "cpu":
        ours, obvious = (peak_memory(0.5, which, args.batch) for which in (0, 1))
        result["conditions"] += f"; peak memory {ours:,.0f} MB against {obvious:,.0f} MB"
        result["peak_memory_mb"] = [ours, obvious]
    return result


def bf16(args, folder):
    """A whole training step of the method, optimizer included, in bf16 against float32."""
    split, steps, losses = made_up_split(args.batch), {}, []
    for name, amp in (("ours", torch.bfloat16), ("obvious", None)):
        steps[name] = epoch_of(networks(0.5)[0], method()[1], split, [split.rows], amp)
        torch.manual_seed(1)
        losses.append([steps[name]()])
    agreement, t = same(*losses, 1e-2), side_by_side(steps, args.rounds)
    conditions = f"batch {args.batch}, drop path 0.5, AdamW; against our own float32"
    return row("bf16 autocast, training step", ms(t, args.batch), conditions,
               agreement=f"{agreement} (loss)", target="1.4x with bf16 units")


def bootstrap(args, folder, n=2203, draws=1000, timed=2):
    rng = np.random.default_rng(0)
    y = (rng.random((n, CLASSES)) < 0.03).astype(np.uint8)
    y[0] = 1
    prob = rng.random((n, CLASSES), dtype=np.float32)
    weights = np.random.default_rng(0).exponential(size=(draws, n))[:timed]
    ours = partial(evaluate.bootstrap, y, prob, draws=draws)
    obvious = partial(plain.bootstrap, y, prob, weights)
    agreement = same([evaluate.macro(ours()[:timed])], [obvious()], 1e-9)
    t = side_by_side({"ours": ours, "obvious": obvious}, 3, warm=0)
    tracemalloc.start()
    evaluate.bootstrap(y[:, :3], prob[:, :3], draws=draws)  # holds one class at a time
    memory = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    conditions = (f"{CLASSES} classes, {n:,} records, peak {memory:,.0f} MB; scikit-learn timed "
                  f"for {timed} draws, extrapolated")
    figures = t["ours"], t["obvious"] * draws / timed
    return row("bootstrap, 1,000 draws", figures, conditions, "s", agreement, "30x, < 5 s, < 1 GB")


def plain_epoch(net, stage, layer, paths, y):
    """A function that trains the plain network's `layer` for an epoch of one batch, all by the
    obvious ways."""
    optimizer, training = post_train.make_optimizer(stage, [layer]), layer is net

    def epoch():
        x = torch.from_numpy(np.stack([plain.read_and_filter(path) for path in paths]))
        with torch.set_grad_enabled(training):
            features = net.train(training).forward_features(x)
        loss = F.binary_cross_entropy_with_logits(net.dense(features), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return epoch


def whole(args, folder, amp=None, n=256, timed=64):
    """Probe 30 + fine-tune 30 epochs on 256 ECGs, by all our ways against all the plain ones
    (float32)."""
    root, (ours, obvious), (probe_stage, finetune) = folder / "whole", networks(0.5), method()
    paths = made_up_set(root, timed)
    split = made_up_split(timed)._replace(array=cached(root))
    t = side_by_side({
        **parts_of_a_run(ours, split, [split.rows], amp),
        "plain probe": plain_epoch(obvious, probe_stage, obvious.dense, paths, split.y),
        "plain finetune": plain_epoch(obvious, finetune, obvious, paths, split.y)},
        max(3, args.rounds // 2))
    conditions = (f"{n} ECGs, batch {timed}, drop path 0.5; against the plain ways in float32; one "
                  f"epoch of {timed} ECGs timed, extrapolated")
    obvious_way = 30 * (t["plain probe"] + t["plain finetune"])
    return row(f"whole run, probe 30 + fine-tune 30, {PRECISION[amp]}",
               (n / timed * whole_run(t), n / timed * obvious_way), conditions, "s",
               "by the rows above", "4x" if amp is None else "6x")


def floor(args, folder):
    """How close a training step is to its floor: its operations over the measured rate of the
    matrix product."""
    results = []
    for drop_path, dtype in itertools.product((0.0, 0.5), (None, torch.bfloat16)):
        net, (x, y) = networks(drop_path, device=args.device)[0], made_up_batch(args)
        gflop, rate = gflop_per_ecg(net, x), product_rate(args.device, dtype or torch.float32)
        ways = {"ours": partial(passes, net, x, y, dtype)}
        figures = ms(side_by_side(ways, args.rounds, args.device), args.batch)
        least = gflop / rate * 1e3
        results.append(row(
            f"step against its floor, drop path {drop_path}, {PRECISION[dtype]}", figures,
            f"floor {least:.1f} ms: {gflop:.2f} GFLOP an ECG at the matrix product's "
            f"{rate:,.0f} GFLOP/s; {least / figures[0]:.0%} of it reached"))
    return results


# ----------------------------------------------------------------------------- rows: when asked for

def scale(args, folder, sizes=(500, 1000, 2000)):
    """Time per ECG must not grow with the set: building the cache and an epoch of training."""
    results, net = [], networks(0.5)[0]
    for n in sizes:
        root = folder / f"scale{n}"
        made_up_set(root, n)
        seconds, memory = fresh_process(f"""
import resource, time
import data, wfdb, scipy.signal, scipy.ndimage, tqdm
start = time.perf_counter()
data.build_cache({str(root)!r}, workers=2)
print(time.perf_counter() - start)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)""")
        results.append(row(f"cache of {n:,}", ms({"ours": seconds}, n),
                           f"2 workers, peak {memory:,.0f} MB each", target="flat"))
    for n in sizes:
        signals, y = cached(folder / f"scale{n}"), torch.zeros(n, CLASSES)
        split = post_train.Split(signals, np.arange(n), y)
        index = post_train.epoch_batches(n, 32, 0, 0, 1)
        ways = {"ours": epoch_of(net, method()[1], split, index, torch.bfloat16)}
        figures = ms(side_by_side(ways, 1, warm=0), len(index) * 32)
        results.append(row(f"training epoch of {n:,}", figures, "bf16, batch 32, drop path 0.5, "
                           "from the memory map", target="flat"))
    return results


def ranks(args, folder, rounds=3):
    """Two processes of one thread against one process of one thread, in ECGs per second of
    fine-tuning."""
    root, rates = folder / "ranks", {1: [], 2: []}
    made_up_set(root, 96)
    data.build_cache(root)
    options = ("--task all71 --weights none --probe-epochs 0 --epochs 2 --batch-size 32 "
               "--device cpu").split()
    for r, n in itertools.product(range(rounds), rates):
        out = folder / f"ranks{r}-{n}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc_per_node", n, ROOT / "post_train.py", "--data", root, "--out", out]
        subprocess.run([*map(str, command), *options], check=True, capture_output=True,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})
        last = (out / "metrics.jsonl").read_text().splitlines()[-1]
        rates[n].append(json.loads(last)["ecgs_per_second"])
    one, two = np.median(rates[1]), np.median(rates[2])
    conditions = f"against 1 process of 1 thread: {two:.1f} and {one:.1f} ECGs/s; batch 32"
    return row("torchrun, 2 processes of 1 thread", (1e3 / two, 1e3 / one), conditions,
               agreement="by the tests", target="1.6x")


def peak_of_step(net, x, y, dtype):
    """Megabytes that a step takes on a GPU at its peak; 0 elsewhere. The network has then been
    compiled, too."""
    passes(net, x, y, dtype)
    if x.device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(x.device)
    passes(net, x, y, dtype)
    return torch.cuda.max_memory_allocated(x.device) / 2**20


def steps(args, folder):
    """Training steps on this device in every precision, eager and compiled, against the plain
    network."""
    results, (x, y) = [], made_up_batch(args)
    dtypes = (None, torch.float16, torch.bfloat16)
    rates = {dtype: product_rate(args.device, dtype or torch.float32) for dtype in dtypes}
    for dtype, drop_path in itertools.product(dtypes, (0.0, 0.5)):
        ours, obvious = networks(drop_path, device=args.device)
        gflop = gflop_per_ecg(ours, x)
        nets = {"": ours, ", --compile": torch.compile(ours), "obvious": obvious}
        memory = {name: peak_of_step(net, x, y, dtype) for name, net in nets.items()}
        t = side_by_side({name: partial(passes, net, x, y, dtype) for name, net in nets.items()},
                         args.rounds, args.device)
        for name in ("", ", --compile"):
            figures = ms({"ours": t[name], "obvious": t["obvious"]}, args.batch)
            speed = args.batch / t[name]
            results.append(row(
                f"step, {PRECISION[dtype]}, drop path {drop_path}{name}", figures,
                f"batch {args.batch}, {speed:,.0f} ECGs/s, {gflop * speed / rates[dtype]:.0%} of "
                f"the matrix product's {rates[dtype]:,.0f} GFLOP/s, peak {memory[name]:,.0f} MB "
                f"(plain {memory['obvious']:,.0f})",
                target="2x" if dtype == torch.float16 and drop_path else ""))
    return results


def resident(args, folder, n=4096, size=256):
    """An epoch from signals on the device against pinned host batches, and against the same steps
    without any data to fetch."""
    host, net = made_up_split(n, args.device), networks(0.5, device=args.device)[0]
    signals, index = torch.from_numpy(host.array), post_train.epoch_batches(n, size, 0, 0, 1)
    splits = {"ours": host._replace(array=signals.to(args.device)), "obvious": host,
              "no data": host._replace(array=signals[:size].to(args.device), rows=host.rows % size)}
    t = side_by_side({name: epoch_of(net, method()[1], split, index, torch.float16)
                      for name, split in splits.items()}, 3, args.device)
    conditions = (f"against pinned host batches; {t['no data'] / t['ours']:.3f} of the time is "
                  "needed without any data to fetch")
    return row("epoch, signals on the device", ms(t, n), conditions, target="no step waits")


def schedule(args, folder, n=17418, size=256):
    """The default schedule at PTB-XL's size on made-up signals: features once, a probe epoch, a
    fine-tuning epoch, extrapolated to 30 each."""
    split = post_train.on_device(made_up_split(n, args.device), args.device)
    net, index = networks(0.5, device=args.device)[0], post_train.epoch_batches(n, size, 0, 0, 1)
    t = side_by_side(parts_of_a_run(net, split, index, torch.float16), 2, args.device)
    conditions = (f"features {t['features']:.1f} s, probe epoch {t['probe']:.2f} s, fine-tuning "
                  f"epoch {t['finetune']:.1f} s; fp16, batch {size}; one epoch of each timed, "
                  "extrapolated")
    return row("default schedule, 17,418 ECGs", (whole_run(t) / 60, None), conditions, "min",
               target="minutes")


CPU_ROWS = {
    "feed": feed, "probe": probe,
    "backbone": partial(step, name="backbone, forward + backward", target="1.3x"),
    "depth-constant": depth_constant,
    "depth-linear": partial(step, name="stochastic depth, linear to 0.5", target="1.2x",
                            drop_path=0.5, mode="linear"),
    "bf16": bf16, "bootstrap": bootstrap, "cache": cache, "whole": whole,
    "whole-bf16": partial(whole, amp=torch.bfloat16), "labels": labels, "help": help_,
    "floor": floor}
MORE_ROWS = {"scale": scale, "ranks": ranks, "steps": steps, "resident": resident,
             "schedule": schedule}  # when asked for


# ------------------------------------------------------------------------------------- command line

def machine(device):
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        name = "".join(re.findall(r"model name\s*: (.*)", info.read_text())[:1]) or name
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return (f"{name}{gpu}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
            f"torch {torch.__version__}, numpy {np.__version__}")


def show(results):
    """The table, in Markdown."""
    def number(x):
        return "" if x is None else f"{x:.3g}"

    lines = ["| row | ours | the obvious way | unit | ratio | aim | same within | conditions |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for r in results:
        ratio = r["ratio"] or 0
        times = f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x"
        cells = (r["row"], number(r["ours"]), number(r["obvious"]), r["unit"],
                 times if ratio else "", r["target"], r["agreement"], r["conditions"])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    add, rows = parser.add_argument, CPU_ROWS | MORE_ROWS
    add("--rows", nargs="+", choices=list(rows), default=list(CPU_ROWS),
        help=f"default: all but {', '.join(MORE_ROWS)}")
    add("--rounds", type=int, default=5)
    add("--batch", type=int, default=32, help="ECGs in a timed step (default: 32)")
    add("--device", type=evaluate.pick_device, default="cpu")
    add("--json", metavar="FILE", help="also write the table as data")
    args = parser.parse_args(argv)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.rows:
            found = rows[name](args, Path(folder))
            results += found if isinstance(found, list) else [found]
            print(f"{name} done", file=sys.stderr, flush=True)
    about = machine(args.device)
    print(f"{about}\n\n{show(results)}")
    if args.json:
        evaluate.write_json(args.json, {"machine": about, "rows": results})


if __name__ == "__main__":
    main()
