"""Speed, measured side by side: the project against the obvious way (tests/plain.py), in one process, alternating.

    python tests/benchmark.py                          # all rows, under 10 minutes on 2 CPU cores
    python tests/benchmark.py --rows backbone depth-constant --rounds 9 --json speed.json
    python tests/benchmark.py --device cuda --rows steps resident schedule

Every row first checks that both ways give the same numbers, then times them in turn; the figure is the median over rounds.
The data are synthetic ECGs: 64 records, repeated as often as needed. No time depends on what the ECGs show.
"""
import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "tools")]

import numpy as np
import torch
import torch.nn.functional as F

import data
import evaluate
import model as network
import plain
import post_train
from make_demo import make_demo

CLASSES = 71


# ----------------------------------------------------------------------------------------------------------------- tools

def clock(function, device):
    """Seconds that `function` takes, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def side_by_side(ways, rounds, device=torch.device("cpu"), warm=1):
    """{name: function} -> {name: median seconds}, the functions called in turn in every round."""
    times = {name: [] for name in ways}
    for r in range(warm + rounds):
        for name, function in ways.items():
            seconds = clock(function, device)
            if r >= warm:
                times[name].append(seconds)
    return {name: float(np.median(t)) for name, t in times.items()}


def row(name, ours, obvious, unit, agreement, conditions, target=""):
    """One line of the table; ours and obvious are in the unit, or None."""
    return {"row": name, "ours": ours, "obvious": obvious, "unit": unit, "ratio": obvious / ours if obvious else None,
            "target": target, "agreement": agreement, "conditions": conditions}


def same(got, want, tolerance):
    """The largest difference, which must be within the tolerance."""
    worst = max(float((torch.as_tensor(a).float() - torch.as_tensor(b).float()).abs().max()) for a, b in zip(got, want, strict=True))
    assert worst <= tolerance, f"the two ways differ by {worst}"
    return f"{worst:.0e}"


def made_up_set(root, n, unique=64):
    """A set of n records: `unique` synthetic ones, named again and again by the csv."""
    import csv
    make_demo(root, records=min(n, unique))
    with open(root / "ptbxl_database.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    with open(root / "ptbxl_database.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows({**rows[i % len(rows)], "ecg_id": i + 1, "patient_id": i + 1} for i in range(n))
    return root


def cached(n):
    """Signals as the cache holds them, float16 (n, 12, 5000), and 0/1 targets."""
    rng = np.random.default_rng(0)
    signals = np.tile(rng.normal(size=(min(n, 64), 12, 5000)).astype(np.float16), (math.ceil(n / 64), 1, 1))[:n]
    return signals, torch.from_numpy((rng.random((n, CLASSES)) < 0.05).astype(np.float32))


def networks(drop_path=0.0, mode="constant", device="cpu"):
    """The project's network and the plain one with the same weights, ready to train."""
    torch.manual_seed(0)
    ours = network.ecgfounder(CLASSES, drop_path=drop_path, drop_path_mode=mode)
    rates = [block.drop_path for stage in ours.stage_list for block in stage.block_list]
    obvious = plain.PlainNet1D(CLASSES, drop_path_rates=rates)
    obvious.load_state_dict(ours.state_dict())
    return ours.to(device).train(), obvious.to(device).train()


def autocast(device, dtype):
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


def passes(net, x, y, dtype=None):
    """Forward and backward; the gradients stay in the parameters."""
    net.zero_grad()
    with autocast(x.device, dtype):
        logits = net(x)
    F.binary_cross_entropy_with_logits(logits.float(), y).backward()
    return logits


def gradients_agree(ours, obvious, x, y, tolerance=1e-5):
    """Logits and gradients of both networks, where stochastic depth draws the same samples."""
    def fixed_mask(block, x):
        kept = max(1, math.floor((1 - block.drop_path) * len(x) + 0.5))
        mask = torch.ones(len(x), 1, 1, device=x.device)
        if kept < len(x):
            mask = torch.zeros_like(mask)
            mask[torch.randperm(len(x), device=x.device)[:kept]] = len(x) / kept
        return mask

    bernoulli, plain.PlainBlock.mask = plain.PlainBlock.mask, fixed_mask
    try:
        results = []
        for net in (ours, obvious):
            torch.manual_seed(1)
            logits = passes(net, x, y)
            results.append([logits.detach(), *(p.grad.clone() for p in net.parameters())])
    finally:
        plain.PlainBlock.mask = bernoulli
    return same(*results, tolerance)


def peak_rss():
    """Megabytes this process has held at its peak. (getrusage would count those of the process that started it.)"""
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024


def peak_memory(drop_path, which, batch):
    """Megabytes that forward and backward of a fresh process add at their peak."""
    code = (f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
            "import benchmark as b, torch\n"
            f"net = b.networks({drop_path})[{which}]\n"
            f"x, y = torch.randn({batch}, 12, 5000), torch.zeros({batch}, b.CLASSES)\n"
            "before = b.peak_rss()\n"
            "b.passes(net, x, y)\n"
            "print(b.peak_rss() - before)")
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def product_rate(device, dtype=torch.float32, n=2048):
    """Measured GFLOP/s of a large matrix product."""
    n = 8192 if device.type == "cuda" else n
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / side_by_side({"mm": lambda: a @ b}, 9, device, 3)["mm"] / 1e9


# ------------------------------------------------------------------------------------------------------------------ rows

def feed(args, folder):
    root = made_up_set(folder / "feed", 256)
    data.build_cache(root)
    signals, rows = data.load_cache(root).signals, np.random.default_rng(0).permutation(256)
    paths = [root / f"records500/00000/{i % 64 + 1:05d}_hr" for i in range(256)]
    index = [rows[i:i + 64] for i in range(0, 256, 64)]
    agreement = same([next(data.batches(signals, [rows[:4]]))], [np.stack([plain.read_and_filter(paths[i]) for i in rows[:4]])], 2e-2)
    t = side_by_side({"ours": lambda: [None for _ in data.batches(signals, index)],
                      "obvious": lambda: [plain.read_and_filter(paths[i]) for i in rows[:64]]}, args.rounds)
    return row("feed one epoch", t["ours"] / 256 * 1e3, t["obvious"] / 64 * 1e3, "ms/ECG", f"{agreement} (float16)", "batches of 64, float32", "100x")


def probe(args, folder, n=64, epochs=30, timed=2):
    signals, y = cached(n)
    ours, obvious = networks()
    index = [np.arange(i, i + 32) for i in range(0, n, 32)]
    stage = post_train.stages_of(post_train.parse(["--task", "all71"]))[0]
    start = {k: v.clone() for k, v in ours.dense.state_dict().items()}

    def train(head, inputs, count, forward):
        head.load_state_dict(start)
        optimizer = post_train.make_optimizer(stage, [head])
        scaler = torch.amp.GradScaler(enabled=False)
        for _ in range(count):
            post_train.train_epoch(forward, optimizer, scaler, post_train.Split(*inputs, y), index, [5e-3] * len(index))
        return head.weight.detach().clone()

    class Frozen(torch.nn.Module):  # the obvious way: the backbone in every epoch
        def __init__(self, net):
            super().__init__()
            self.backbone, self.head = [net.eval()], net.dense

        def forward(self, x):
            with torch.no_grad():
                features = self.backbone[0].forward_features(x)
            return self.head(features)

    def features():
        return torch.from_numpy(evaluate.infer(ours.eval().forward_features, signals, np.arange(n), "cpu", 32)), np.arange(n)

    def ours_all(count):
        return train(ours.dense, features(), count, ours.dense)

    def obvious_all():
        return train(obvious.dense, (signals, np.arange(n)), timed, Frozen(obvious))

    agreement = same([ours_all(timed)], [obvious_all()], 1e-5)
    t = side_by_side({"ours": lambda: ours_all(epochs), "obvious": obvious_all}, max(3, args.rounds // 2), warm=0)
    return row("probe stage, 30 epochs", t["ours"], t["obvious"] * epochs / timed, "s", agreement,
               f"{n} ECGs, batch 32, float32; the obvious way timed for {timed} epochs, extrapolated", "20x")


def backbone(args, folder):
    return step_row(args, "backbone, forward + backward", 0.0, "constant", None, "1.3x")


def depth_constant(args, folder):
    result = step_row(args, "stochastic depth, constant 0.5", 0.5, "constant", None, "1.6x, less memory")
    if args.device.type == "cpu":
        memory = [peak_memory(0.5, which, args.batch) for which in (0, 1)]
        result["conditions"] += f"; peak memory {memory[0]:,.0f} MB against {memory[1]:,.0f} MB"
        result["peak_memory_mb"] = memory
    return result


def depth_linear(args, folder):
    return step_row(args, "stochastic depth, linear to 0.5", 0.5, "linear", None, "1.2x")


def step_row(args, name, drop_path, mode, dtype, target):
    ours, obvious = networks(drop_path, mode, args.device)
    x, y = torch.randn(args.batch, 12, 5000, device=args.device), torch.zeros(args.batch, CLASSES, device=args.device)
    agreement = gradients_agree(ours, obvious, x[:4], y[:4], 1e-5 if args.device.type == "cpu" else 1e-2)
    t = side_by_side({"ours": lambda: passes(ours, x, y, dtype), "obvious": lambda: passes(obvious, x, y, dtype)}, args.rounds, args.device)
    return row(name, *(t[k] / args.batch * 1e3 for k in ("ours", "obvious")), "ms/ECG", agreement, f"batch {args.batch}, {dtype_name(dtype)}", target)


def dtype_name(dtype):
    return {None: "float32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


def bf16(args, folder):
    """A whole training step of the method, optimizer included, in bf16 against float32."""
    signals, y = cached(args.batch)
    steps, losses = {}, {}
    for name, dtype in (("ours", torch.bfloat16), ("obvious", None)):
        net = networks(0.5)[0]
        stage = post_train.stages_of(post_train.parse(["--task", "all71"]))[1]
        steps[name] = lambda net=net, dtype=dtype, optimizer=post_train.make_optimizer(stage, [net]): post_train.train_epoch(
            net, optimizer, torch.amp.GradScaler(enabled=False), post_train.Split(signals, np.arange(args.batch), y), [np.arange(args.batch)],
            [1e-6], 1.0, dtype)
        torch.manual_seed(1)
        losses[name] = steps[name]()[0]
    t = side_by_side(steps, args.rounds)
    return row("bf16 autocast, training step", *(t[k] / args.batch * 1e3 for k in ("ours", "obvious")), "ms/ECG",
               same([losses["ours"]], [losses["obvious"]], 1e-2) + " (loss)", f"batch {args.batch}, drop path 0.5, AdamW; against our own float32", "1.4x with bf16 units")


def bootstrap(args, folder, n=2203, draws=1000, timed=2):
    rng = np.random.default_rng(0)
    y = (rng.random((n, CLASSES)) < 0.03).astype(np.uint8)
    y[0] = 1
    prob = rng.random((n, CLASSES), dtype=np.float32)
    weights = np.random.default_rng(0).exponential(size=(draws, n))[:timed]
    ours = evaluate.bootstrap(y, prob, draws=draws)
    agreement = same([evaluate.macro(ours[:timed])], [plain.bootstrap(y, prob, weights)], 1e-9)
    t = side_by_side({"ours": lambda: evaluate.bootstrap(y, prob, draws=draws), "obvious": lambda: plain.bootstrap(y, prob, weights)}, 3, warm=0)
    import tracemalloc
    tracemalloc.start()
    evaluate.bootstrap(y[:, :3], prob[:, :3], draws=draws)  # holds one class at a time
    memory = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return row("bootstrap, 1,000 draws", t["ours"], t["obvious"] * draws / timed, "s", agreement,
               f"{CLASSES} classes, {n:,} records, peak {memory:,.0f} MB; scikit-learn timed for {timed} draws, extrapolated", "30x, < 5 s, < 1 GB")


def cache(args, folder, n=512):
    """Building with two workers against one; and what one worker adds to reading and filtering."""
    root = made_up_set(folder / "cache", n)
    paths = [root / f"records500/00000/{i % 64 + 1:05d}_hr" for i in range(n)]

    def build(workers):
        for path in (root / "cache").glob("*"):
            path.unlink()
        data.build_cache(root, workers=workers)

    build(1)
    one = (root / "cache" / "filter.npy").read_bytes()
    build(2)
    assert one == (root / "cache" / "filter.npy").read_bytes()
    t = side_by_side({"ours": lambda: build(2), "obvious": lambda: build(1),
                      "bare": lambda: [data.preprocess(*data.read_record(p)) for p in paths]}, 3, warm=0)
    return row("building the cache, 2 workers", *(t[k] / n * 1e3 for k in ("ours", "obvious")), "ms/ECG", "same bytes",
               f"{n} records; one worker takes {t['obvious'] / t['bare']:.2f} of wfdb read + scipy filters alone", "1.8x; 1.1")


def whole(args, folder, dtype=None, n=256, timed=64):
    """Probe 30 + fine-tune 30 epochs on 256 ECGs, by all our ways against all the plain ones (float32)."""
    root = made_up_set(folder / "whole", timed)
    data.build_cache(root)
    signals, paths = data.load_cache(root).signals, [root / f"records500/00000/{i % 64 + 1:05d}_hr" for i in range(timed)]
    y = cached(timed)[1]
    ours, obvious = networks(0.5)
    probe_stage, stage = post_train.stages_of(post_train.parse(["--task", "all71"]))
    index = [np.arange(timed)]
    optimizers = {net: post_train.make_optimizer(stage, [net]) for net in (ours, obvious)}
    heads = {net: post_train.make_optimizer(probe_stage, [net.dense]) for net in (ours, obvious)}
    common = dict(scaler=torch.amp.GradScaler(enabled=False), index=index, rates=[1e-6] * len(index))

    def ours_features():
        found = evaluate.infer(ours.eval().forward_features, signals, np.arange(timed), "cpu", 64, dtype)
        return post_train.Split(torch.from_numpy(found), np.arange(timed), y)

    def ours_epoch():
        post_train.train_epoch(ours, optimizers[ours], split=post_train.Split(signals, np.arange(timed), y), clip=1.0, amp=dtype, **common)

    def obvious_epoch(training):
        for i in index:
            x = torch.from_numpy(np.stack([plain.read_and_filter(paths[k]) for k in i]))
            optimizer = (optimizers if training else heads)[obvious]
            with nullcontext() if training else torch.no_grad():
                features = obvious.train(training).forward_features(x)
            loss = F.binary_cross_entropy_with_logits(obvious.dense(features), y[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    features = ours_features()
    t = side_by_side({
        "features": ours_features,
        "probe": lambda: post_train.train_epoch(ours.dense, heads[ours], split=features, **common),
        "finetune": ours_epoch, "obvious probe": lambda: obvious_epoch(False), "obvious finetune": lambda: obvious_epoch(True)}, max(3, args.rounds // 2))
    scale = n / timed
    return row(f"whole run, probe 30 + fine-tune 30, {dtype_name(dtype)}", scale * (t["features"] + 30 * t["probe"] + 30 * t["finetune"]),
               scale * 30 * (t["obvious probe"] + t["obvious finetune"]), "s", "by the rows above",
               f"{n} ECGs, batch {timed}, drop path 0.5; against the plain ways in float32; one epoch of {timed} ECGs timed, extrapolated", "4x" if dtype is None else "6x")


def whole_bf16(args, folder):
    return whole(args, folder / "bf16", torch.bfloat16)


def labels(args, folder):
    root = made_up_set(folder / "labels", 21799, unique=8)
    assert len(data.load_labels(root, "all71").y) == 21799
    t = side_by_side({task: lambda task=task: data.load_labels(root, task) for task in data.TASKS}, 3)
    return row("labels of 21,799 records", max(t.values()), None, "s", "", "the slowest of six tasks", "< 1.5 s")


def help_(args, folder):
    call = lambda *words: subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, check=True, cwd=ROOT)
    scripts = ("data.py", "model.py", "evaluate.py", "post_train.py")
    t = side_by_side({**{s: lambda s=s: call(s, "--help") for s in scripts}, "torch": lambda: call("-c", "import torch")}, 5)
    slowest = max(scripts, key=t.get)
    return row("--help of the slowest script", t[slowest], None, "s", "", f"{slowest} takes {t[slowest] / t['torch']:.2f} of `import torch`, {t['torch']:.3g} s", "at most 1.3")


def floor(args, folder):
    """How close a training step is to its floor: its operations over the measured rate of the matrix product."""
    results = []
    for drop_path in (0.0, 0.5):
        for dtype in (None, torch.bfloat16):
            ours = networks(drop_path, device=args.device)[0]
            x, y = torch.randn(args.batch, 12, 5000, device=args.device), torch.zeros(args.batch, CLASSES, device=args.device)
            from torch.utils.flop_counter import FlopCounterMode
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                ours(x[:8])
            gflop = 3 * counter.get_total_flops() / 8 / 1e9  # the backward pass takes twice the forward's
            rate = product_rate(args.device, dtype or torch.float32)
            seconds = side_by_side({"step": lambda: passes(ours, x, y, dtype)}, args.rounds, args.device)["step"] / args.batch
            results.append(row(f"step against its floor, drop path {drop_path}, {dtype_name(dtype)}", seconds * 1e3, None, "ms/ECG", "",
                               f"floor {gflop / rate * 1e3:.1f} ms: {gflop:.2f} GFLOP an ECG at the matrix product's {rate:,.0f} GFLOP/s; "
                               f"{gflop / rate / seconds:.0%} of it reached"))
    return results


def scale(args, folder):
    """Time per ECG must not grow with the set: building the cache and an epoch of the features' loop and of training."""
    results = []
    for n in (500, 1000, 2000):
        root = made_up_set(folder / f"scale{n}", n)
        code = (f"import sys, time, resource; sys.path.insert(0, {str(ROOT)!r}); import data\nimport wfdb, scipy.signal, scipy.ndimage, tqdm\n"
                f"t = time.perf_counter(); data.build_cache({str(root)!r}, workers=2); print(time.perf_counter() - t)\n"
                "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)")
        seconds, memory = map(float, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
        results.append(row(f"cache of {n:,}", seconds / n * 1e3, None, "ms/ECG", "", f"2 workers, peak {memory:,.0f} MB each", "flat"))
    net = networks(0.5)[0]
    stage = post_train.stages_of(post_train.parse(["--task", "all71"]))[1]
    optimizer = post_train.make_optimizer(stage, [net])
    for n in (500, 1000, 2000):
        signals, y = data.load_cache(folder / f"scale{n}").signals, torch.zeros(n, CLASSES)
        index = post_train.epoch_batches(n, 32, 0, 0, 1)
        t = side_by_side({"epoch": lambda: post_train.train_epoch(net, optimizer, torch.amp.GradScaler(enabled=False), post_train.Split(signals, np.arange(n), y),
                                                                  index, [1e-6] * len(index), 1.0, torch.bfloat16)}, 1, warm=0)
        results.append(row(f"training epoch of {n:,}", t["epoch"] / (len(index) * 32) * 1e3, None, "ms/ECG", "", "bf16, batch 32, drop path 0.5, from the memory map", "flat"))
    return results


def ranks(args, folder):
    """Two processes of one thread against one process of one thread, in ECGs per second of fine-tuning."""
    root = made_up_set(folder / "ranks", 96)
    data.build_cache(root)
    rates = {1: [], 2: []}
    for r in range(3):
        for n in rates:
            out = folder / f"ranks{r}-{n}"
            subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), str(ROOT / "post_train.py"), "--data", str(root),
                            "--task", "all71", "--weights", "none", "--probe-epochs", "0", "--epochs", "2", "--batch-size", "32", "--device", "cpu", "--out", str(out)],
                           check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            rates[n].append(json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["ecgs_per_second"])
    one, two = np.median(rates[1]), np.median(rates[2])
    return row("torchrun, 2 processes of 1 thread", 1e3 / two, 1e3 / one, "ms/ECG", "by the tests", f"against 1 process of 1 thread: {two:.1f} and {one:.1f} ECGs/s; batch 32", "1.6x")


def steps(args, folder):
    """Training steps on this device in every precision, eager and compiled, against the plain network."""
    results, device = [], args.device
    x, y = torch.randn(args.batch, 12, 5000, device=device), torch.zeros(args.batch, CLASSES, device=device)
    for dtype in (None, torch.float16, torch.bfloat16):
        rate = product_rate(device, dtype or torch.float32)
        for drop_path in (0.0, 0.5):
            ours, obvious = networks(drop_path, device=device)
            ways = {"ours": ours, "compiled": torch.compile(ours), "obvious": obvious}
            memory = {}
            for name, net in ways.items():
                passes(net, x, y, dtype)
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                    passes(net, x, y, dtype)
                    memory[name] = torch.cuda.max_memory_allocated(device) / 2**20
            t = side_by_side({name: lambda net=net: passes(net, x, y, dtype) for name, net in ways.items()}, args.rounds, device)
            gflop = 3 * 2.34 * (1 if not drop_path else 0.5)
            for name in ("ours", "compiled"):
                seconds = t[name] / args.batch
                results.append(row(f"step, {dtype_name(dtype)}, drop path {drop_path}{', --compile' if name == 'compiled' else ''}", seconds * 1e3,
                                   t["obvious"] / args.batch * 1e3, "ms/ECG", "", f"batch {args.batch}, {1 / seconds:,.0f} ECGs/s, "
                                   f"{gflop / seconds / rate:.0%} of the matrix product's {rate:,.0f} GFLOP/s, peak {memory.get(name, 0):,.0f} MB "
                                   f"(plain {memory.get('obvious', 0):,.0f})", "2x" if dtype == torch.float16 and drop_path else ""))
    return results


def resident(args, folder, n=4096):
    """An epoch from signals on the device against pinned host batches, and against the same steps without any data to fetch."""
    signals, y = cached(n)
    net = networks(0.5, device=args.device)[0]
    stage = post_train.stages_of(post_train.parse(["--task", "all71"]))[1]
    optimizer, scaler = post_train.make_optimizer(stage, [net]), torch.amp.GradScaler(args.device.type)
    index = post_train.epoch_batches(n, 256, 0, 0, 1)
    sources = {"ours": (torch.from_numpy(signals).to(args.device), np.arange(n)), "obvious": (signals, np.arange(n)),
               "no data": (torch.from_numpy(signals[:256]).to(args.device), np.arange(n) % 256)}
    t = side_by_side({name: lambda s=s: post_train.train_epoch(net, optimizer, scaler, post_train.Split(*s, y.to(args.device)), index, [1e-6] * len(index), 1.0,
                                                               torch.float16) for name, s in sources.items()}, 3, args.device)
    return row("epoch, signals on the device", t["ours"] / n * 1e3, t["obvious"] / n * 1e3, "ms/ECG", "", f"against pinned host batches; {t['no data'] / t['ours']:.3f} "
               "of the time is needed without any data to fetch", "no step waits")


def schedule(args, folder, n=17418):
    """The default schedule at PTB-XL's size on made-up signals: features once, a probe epoch, a fine-tuning epoch, extrapolated to 30 each."""
    signals, y = cached(n)
    y = y.to(args.device)
    net = networks(0.5, device=args.device)[0]
    probe_stage, stage = post_train.stages_of(post_train.parse(["--task", "all71"]))
    split = post_train.on_device(post_train.Split(signals, np.arange(n), y), args.device)
    index = post_train.epoch_batches(n, 256, 0, 0, 1)
    scaler = torch.amp.GradScaler(args.device.type)
    epoch = lambda net, stage, split, amp: post_train.train_epoch(net, post_train.make_optimizer(stage, [net]), scaler, split, index,
                                                                  [1e-6] * len(index), 1.0, amp)
    features = lambda: evaluate.infer(net.eval().forward_features, split.array, split.rows, args.device, 256, torch.float16)
    kept = post_train.Split(torch.from_numpy(features()).to(args.device), np.arange(n), y)
    t = side_by_side({"features": features, "probe": lambda: epoch(net.dense, probe_stage, kept, None), "finetune": lambda: epoch(net, stage, split, torch.float16)}, 2, args.device)
    total = t["features"] + 30 * t["probe"] + 30 * t["finetune"]
    return row("default schedule, 17,418 ECGs", total / 60, None, "min", "", f"features {t['features']:.1f} s, probe epoch {t['probe']:.2f} s, "
               f"fine-tuning epoch {t['finetune']:.1f} s; fp16, batch 256; one epoch of each timed, extrapolated", "minutes")


CPU_ROWS = {"feed": feed, "probe": probe, "backbone": backbone, "depth-constant": depth_constant, "depth-linear": depth_linear, "bf16": bf16,
            "bootstrap": bootstrap, "cache": cache, "whole": whole, "whole-bf16": whole_bf16, "labels": labels, "help": help_, "floor": floor}
MORE_ROWS = {"scale": scale, "ranks": ranks, "steps": steps, "resident": resident, "schedule": schedule}  # when asked for


def machine(device):
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        name = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), name)
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return f"{name}{gpu}, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"


def show(results):
    """The table, in Markdown."""
    number = lambda x: "" if x is None else f"{x:.3g}"
    lines = ["| row | ours | the obvious way | unit | ratio | aim | same within | conditions |", "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for r in results:
        ratio = "" if r["ratio"] is None else f"{r['ratio']:.2f}x" if r["ratio"] < 10 else f"{r['ratio']:.0f}x"
        lines.append(f"| {r['row']} | {number(r['ours'])} | {number(r['obvious'])} | {r['unit']} | {ratio} | {r['target']} | {r['agreement']} | {r['conditions']} |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", nargs="+", choices=[*CPU_ROWS, *MORE_ROWS], default=list(CPU_ROWS), help="default: all but scale, ranks, steps, resident, schedule")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32, help="ECGs in a timed step (default: 32)")
    parser.add_argument("--device", type=evaluate.pick_device, default="cpu")
    parser.add_argument("--json", metavar="FILE", help="also write the table as data")
    args = parser.parse_args(argv)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.rows:
            found = {**CPU_ROWS, **MORE_ROWS}[name](args, Path(folder))
            results += found if isinstance(found, list) else [found]
            print(f"{name} done", file=sys.stderr, flush=True)
    about = machine(args.device)
    print(f"{about}\n\n{show(results)}")
    if args.json:
        evaluate.write_json(args.json, {"machine": about, "rows": results})


if __name__ == "__main__":
    main()
