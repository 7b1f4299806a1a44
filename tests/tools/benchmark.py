"""Speed, measured side by side: the project against the obvious way (tests/tools/plain.py), in one
process, alternating.

    python tests/tools/benchmark.py                     # under 10 minutes on 2 CPU cores
    python tests/tools/benchmark.py --rows backbone depth-constant --rounds 9 --json speed.json
    python tests/tools/benchmark.py --device cuda --rows steps compiled resident schedule

A row of two ways first checks that they give the same numbers (`whole` and `resident` rest on other
rows for that), then times them in turn. A figure is the median over rounds; where the conditions
say that a part was timed, it is extrapolated from that. The data are made up: no time depends on
what they show.
"""
import argparse
import multiprocessing
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

TOOLS = Path(__file__).resolve().parent
TESTS, ROOT = TOOLS.parents[:2]
sys.path[:0] = map(str, (ROOT, TESTS, TOOLS))

import numpy as np
import pytest
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
FINETUNE = FINETUNE._replace(lr=1e-6)   # noise is not to change the network much


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


# ----------------------------------------------------------------------------------- rows: the data

def made_up_set(root, n):
    """Write a set of n records, 64 synthetic ones under many names; returns their paths."""
    make_demo(root, records=64)
    for i in range(1, (n + 63) // 64):
        Path(root, f"records500/{i:05d}").symlink_to("00000")
    names = [f"records500/{i // 64:05d}/{i % 64 + 1:05d}_hr" for i in range(n)]
    edit_csv(root / data.DATABASE, lambda rows: rows.extend(
        [{**rows[i % 64], "ecg_id": i + 1, "filename_hr": names[i]} for i in range(64, n)]))
    return [root / name for name in names]


def feed(args, n=256):
    paths = made_up_set(args.folder / "feed", n)
    signals = np.load(data.build_cache(args.folder / "feed").array, mmap_mode="r")
    index = np.split(np.random.default_rng(0).permutation(n), 4)
    first = [paths[i] for i in index[0]]
    ways = {"ours": lambda: [None for _ in data.batches(signals, index)],
            "obvious": lambda: list(map(plain.read_and_filter, first))}
    batch = next(data.batches(signals, index))
    agreement, t = same(batch, ways["obvious"](), 2e-2), side_by_side(ways, args.rounds)
    return row("feed one epoch", {**t, "obvious": 4 * t["obvious"]},
               f"batches of {n // 4}, float32", n, f"{agreement} (float16)", "100x")


def cache(args):
    """Building with two workers against one; and what one worker adds to reading and filtering."""
    root = args.folder / "cache"
    paths = made_up_set(root, 512)

    def build(workers):
        shutil.rmtree(root / "cache", ignore_errors=True)
        return data.build_cache(root, workers=workers).array

    assert build(1).read_bytes() == build(2).read_bytes()
    t = side_by_side({
        "ours": partial(build, 2), "obvious": partial(build, 1),
        "bare": lambda: [data.preprocess(*data.read_record(p)) for p in paths]}, 3, warm=0)
    conditions = f"512 records; 1 worker takes {t['obvious'] / t['bare']:.2f} of wfdb + scipy alone"
    return row("building the cache, 2 workers", t, conditions, 512, "same bytes", "1.8x; 1.1")


def labels(args):
    made_up_set(args.folder / "labels", 21799)
    t = side_by_side({task: partial(data.load_labels, args.folder / "labels", task)
                      for task in data.TASKS}, 3)
    return row("labels of 21,799 records", {"ours": max(t.values())}, "the slowest of six tasks",
               aim="< 1.5 s")


def help_(args):
    scripts = ("data.py", "model.py", "evaluate.py", "post_train.py")
    commands = {**{name: (ROOT / name, "--help") for name in scripts}, "": ("-c", "import torch")}
    t = side_by_side({name: partial(subprocess.check_output, [sys.executable, *words])
                      for name, words in commands.items()}, 5)
    slowest = max(scripts, key=t.get)
    conditions = f"{slowest} takes {t[slowest] / t['']:.2f} of `import torch`, {t['']:.3g} s"
    return row("--help of the slowest script", {"ours": t[slowest]}, conditions, aim="at most 1.3")


# ------------------------------------------------------------------------------ rows: single steps

def networks(drop_path=0.0, mode="constant", device="cpu"):
    """The project's network and the plain one with the same weights, ready to train."""
    torch.manual_seed(0)
    ours = network.ecgfounder(CLASSES, drop_path=drop_path, drop_path_mode=mode)
    rates = [block.drop_path for level in ours.stage_list for block in level.block_list]
    obvious = plain.PlainNet1D(CLASSES, drop_path_rates=rates)
    obvious.load_state_dict(ours.state_dict())
    return {"ours": ours.to(device).train(), "obvious": obvious.to(device).train()}


def passes(net, x, dtype=None):
    """Forward and backward; the gradients stay in the parameters."""
    net.zero_grad()
    with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
        logits = net(x).float()
    F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits)).backward()
    return logits.detach()


def gradients_agree(nets, x):
    """Logits and gradients of both networks, where stochastic depth draws the same samples."""
    def same_draw(block, x):
        n, kept = len(x), network.Block.kept(block, len(x))
        chosen = torch.randperm(n, device=x.device)[:kept] if kept < n else torch.arange(n)
        return x.new_zeros(n, 1, 1).index_fill_(0, chosen.to(x.device), n / kept)

    results = []
    with pytest.MonkeyPatch.context() as m:
        m.setattr(plain.PlainBlock, "mask", same_draw)
        m.setattr(torch.backends.cudnn, "allow_tf32", False)
        for net in nets.values():
            torch.manual_seed(1)
            results.append([passes(net, x), *(p.grad.clone() for p in net.parameters())])
    return same(*results, tolerance=1e-5 if x.device.type == "cpu" else 1e-4)


def floor_of(net, x, dtype):
    """(GFLOP of a step for one ECG, three forward passes; measured GFLOP/s of a matrix product)."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x[:8])
    n = 8192 if x.device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=x.device, dtype=dtype) for _ in range(2))
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True  # as it is for convolutions by default
    seconds = side_by_side({"product": lambda: a @ b}, 9, warm=3)["product"]
    matmul.allow_tf32 = before
    return 3 * counter.get_total_flops() / len(x[:8]) / 1e9, 2 * n**3 / seconds / 1e9


def peak_memory(way, drop_path, batch):
    """Megabytes that a step adds to the most this process, a fresh one, has held."""
    def peak():  # getrusage would count the memory of the process that started this one
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    net, x = networks(drop_path)[way], torch.randn(batch, 12, 5000)
    before = peak()
    passes(net, x)
    return peak() - before


def step(title, args, aim="", drop_path=0.0, mode="constant", dtype=None, compiled=False,
         memory=False):
    """Forward and backward of both networks, and how close ours comes to its floor."""
    nets = networks(drop_path, mode, args.device)
    x = torch.randn(args.batch, 12, 5000, device=args.device)
    agreement, (gflop, rate) = gradients_agree(nets, x[:4]), floor_of(nets["ours"], x, dtype)
    if compiled:
        torch._dynamo.reset()  # else the shapes of an earlier network's graph count as variable
        nets["ours"] = torch.compile(nets["ours"])
    t = side_by_side({way: partial(passes, net, x, dtype) for way, net in nets.items()},
                     args.rounds)
    conditions = (f"batch {args.batch}, {PRECISION[dtype]}; floor {gflop / rate * 1e3:.3g} ms: "
                  f"{gflop:.2f} GFLOP an ECG at the matrix product's {rate:,.0f} GFLOP/s; "
                  f"{args.batch * gflop / rate / t['ours']:.0%} of it reached")
    peaks = []
    if args.device.type == "cuda":
        for net in nets.values():
            net.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            passes(net, x, dtype)
            peaks.append((torch.cuda.max_memory_allocated() - before) / 2**20)
    elif memory:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            peaks = [pool.apply(peak_memory, (way, drop_path, args.batch)) for way in nets]
    if peaks:
        conditions += "; peak memory {:,.0f} MB against {:,.0f} MB".format(*peaks)
    return row(title, t, conditions, args.batch, agreement, aim)


def steps(title, args, dtypes, compiled):
    """A step in several precisions, without and with stochastic depth."""
    rows = []
    for p, dtype, c in product((0.0, 0.5), dtypes, compiled):
        name = f"{title}, drop path {p}, {PRECISION[dtype]}{', --compile' * c}"
        aim = "2x" * (p > 0 and dtype == torch.float16)
        rows.append(step(name, args, aim, p, dtype=dtype, compiled=c))
    return rows


# ------------------------------------------------------------------------ rows: training and scores

def made_up_split(n, device="cpu"):
    """Noise in the place of a cache's signals, with random targets."""
    rng = np.random.default_rng(0)
    signals = np.resize(rng.normal(size=(64, 12, 5000)).astype(np.float16), (n, 12, 5000))
    y = torch.from_numpy((rng.random((n, CLASSES)) < 0.05).astype(np.float32))
    return post_train.Split(signals, np.arange(n), y.to(device))


def epoch_of(net, stage, split, index, amp=None):
    """A function that trains `net` for an epoch and returns its mean loss."""
    optimizer, rates = post_train.make_optimizer(stage, [net]), [stage.lr] * len(index)
    scaler = torch.amp.GradScaler(split.y.device.type, enabled=amp == torch.float16)
    return lambda: post_train.train_epoch(net, optimizer, scaler, split, index, rates, stage.clip,
                                          amp)[0]


def our_parts(net, split, index, amp=None):
    """{name: function}: the features, which are made once, and an epoch of each stage."""
    def features():
        backbone, device = net.eval().forward_features, split.y.device
        x = evaluate.infer(backbone, split.array, split.rows, device, len(index[0]), amp)
        return split._replace(array=torch.from_numpy(x).to(device), rows=np.arange(len(x)))

    return {"features": features, "probe": epoch_of(net.dense, PROBE, features(), index),
            "finetune": epoch_of(net, FINETUNE, split, index, amp)}


def probe(args):
    split, index, nets = made_up_split(64), np.split(np.arange(64), 2), networks()
    nets["obvious"].requires_grad_(False).dense.requires_grad_(True)
    plain_epoch = epoch_of(nets["obvious"], PROBE, split, index)  # its backbone runs, too
    features, epoch, _ = our_parts(nets["ours"], split, index).values()
    epoch()
    plain_epoch()
    agreement = same(*([net.dense.weight.detach()] for net in nets.values()), 1e-5)
    t = side_by_side({"ours": lambda: [features(), *(epoch() for _ in range(30))],
                      "obvious": plain_epoch}, 3)
    return row("probe stage, 30 epochs", {**t, "obvious": 30 * t["obvious"]},
               "64 ECGs, batch 32, float32; one epoch of the obvious way timed",
               agreement=agreement, aim="20x")


def bf16(args):
    """A whole training step of the method, optimizer included, in bf16 against float32."""
    split, ways, losses = made_up_split(args.batch), {}, []
    for name, amp in (("ours", torch.bfloat16), ("obvious", None)):
        ways[name] = epoch_of(networks(0.5)["ours"], FINETUNE, split, [split.rows], amp)
        torch.manual_seed(1)
        losses.append([ways[name]()])
    agreement, t = same(*losses, 1e-2), side_by_side(ways, args.rounds)
    conditions = f"batch {args.batch}, drop path 0.5, AdamW; against our own float32"
    return row("bf16 autocast, training step", t, conditions, args.batch, f"{agreement} (loss)",
               "1.4x with bf16 units")


def whole(args, amp, aim):
    """Both stages by all our ways against all the plain ones (float32)."""
    root, noise = args.folder / f"whole-{PRECISION[amp]}", made_up_split(64)
    paths, index = made_up_set(root, 64), [noise.rows]
    cached = noise._replace(array=np.load(data.build_cache(root).array, mmap_mode="r"))
    nets, frozen = networks(0.5), networks()["obvious"]
    frozen.requires_grad_(False).dense.requires_grad_(True)
    t = side_by_side({**our_parts(nets["ours"], cached, index, amp),
                      "read": lambda: list(map(plain.read_and_filter, paths)),
                      "plain probe": epoch_of(frozen, PROBE, noise, index),
                      "plain finetune": epoch_of(nets["obvious"], FINETUNE, noise, index)}, 3)
    times = {"ours": 4 * (t["features"] + 30 * (t["probe"] + t["finetune"])),
             "obvious": 4 * 30 * (2 * t["read"] + t["plain probe"] + t["plain finetune"])}
    conditions = "256 ECGs, batch 64, drop path 0.5; plain ways in float32; one epoch of 64 timed"
    return row(f"whole run, probe 30 + fine-tune 30, {PRECISION[amp]}", times, conditions,
               agreement="by the rows above", aim=aim)


def bootstrap(args):
    rng, n = np.random.default_rng(0), 2203
    y = (rng.random((n, CLASSES)) < 0.03).astype(np.uint8)
    prob = rng.random((n, CLASSES), dtype=np.float32)
    weights = np.random.default_rng(0).exponential(size=(2, n))
    ours, obvious = partial(evaluate.bootstrap, y, prob), partial(plain.bootstrap, y, prob, weights)
    agreement = same([evaluate.macro(ours()[:2])], [obvious()], 1e-9)
    t = side_by_side({"ours": ours, "obvious": obvious}, 3, warm=0)
    tracemalloc.start()
    evaluate.bootstrap(y[:, :3], prob[:, :3])  # holds one class at a time
    memory = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    conditions = (f"{CLASSES} classes, {n:,} records, peak {memory:,.0f} MB; 2 draws of "
                  "scikit-learn's timed")
    return row("bootstrap, 1,000 draws", {**t, "obvious": t["obvious"] * evaluate.DRAWS / 2},
               conditions, agreement=agreement, aim="30x, < 5 s, < 1 GB")


def resident(args, n=4096, size=256):
    """An epoch from signals on the device, from pinned host batches, and with no data to fetch."""
    host, net = made_up_split(n, args.device), networks(0.5, device=args.device)["ours"]
    signals, index = torch.from_numpy(host.array), post_train.epoch_batches(n, size, 0, 0, 1)
    splits = {"ours": host._replace(array=signals.to(args.device)), "obvious": host,
              "no data": host._replace(array=signals[:size].to(args.device), rows=host.rows % size)}
    t = side_by_side({name: epoch_of(net, FINETUNE, split, index, torch.float16)
                      for name, split in splits.items()}, 3)
    least = t["no data"] / t["ours"]
    conditions = f"against pinned host batches; with no data to fetch {least:.3f} of our time"
    return row("epoch, signals on the device", t, conditions, n, aim="no step waits")


def schedule(args, n=17418, size=256):
    """Probe 30 + fine-tune 30 at PTB-XL's size."""
    split = post_train.on_device(made_up_split(n, args.device), args.device)
    net, index = networks(0.5, device=args.device), post_train.epoch_batches(n, size, 0, 0, 1)
    t = side_by_side(our_parts(net["ours"], split, index, torch.float16), 2)
    conditions = (f"fp16, batch {size}; features {t['features']:.1f} s, one epoch of each timed: "
                  f"probe {t['probe']:.2f} s, fine-tuning {t['finetune']:.1f} s")
    times = {"ours": t["features"] + 30 * (t["probe"] + t["finetune"])}
    return row("probe 30 + fine-tune 30, 17,418 ECGs", times, conditions, aim="minutes")


# ------------------------------------------------------------------------------------- command line

ROWS = {
    "feed": feed, "probe": probe,
    "backbone": partial(step, "backbone, forward + backward", aim="1.3x"),
    "depth-constant": partial(step, "stochastic depth, constant 0.5", drop_path=0.5, memory=True,
                              aim="1.6x, less memory"),
    "depth-linear": partial(step, "stochastic depth, linear to 0.5", drop_path=0.5, mode="linear",
                            aim="1.2x"),
    "bf16": bf16, "bootstrap": bootstrap, "cache": cache,
    "whole": partial(whole, amp=None, aim="4x"),
    "whole-bf16": partial(whole, amp=torch.bfloat16, aim="6x"),
    "labels": labels, "help": help_,
    "floor": partial(steps, "step against its floor", dtypes=(None, torch.bfloat16), compiled=[0]),
    "steps": partial(steps, "step", dtypes=PRECISION, compiled=[0]),
    "compiled": partial(steps, "step", dtypes=(torch.float16,), compiled=[1]),
    "resident": resident, "schedule": schedule}


def show(results):
    """The table, in Markdown."""
    lines = ["| row | ours | the obvious way | unit | ratio | aim | same within | conditions |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for r in results:
        cells = {key: f"{v:.3g}" if isinstance(v, float) else v or "" for key, v in r.items()}
        cells["ratio"] += "x" * bool(cells["ratio"])
        lines.append(f"| {' | '.join(cells.values())} |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    add = parser.add_argument
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS)[:-4],
        help="default: all but the last four, which are for a GPU")
    add("--rounds", type=int, default=5)
    add("--batch", type=int, default=32, help="ECGs in a timed step (default: 32)")
    add("--device", type=post_train.pick_device, default="cpu")
    add("--json", metavar="FILE", help="also write the table as data")
    args = parser.parse_args(argv)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        for name in args.rows:
            found = ROWS[name](args)
            results += found if isinstance(found, list) else [found]
            print(f"{name} done", file=sys.stderr, flush=True)
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text())[:1] if info.exists() else []
    if args.device.type == "cuda":
        names.append(torch.cuda.get_device_name())
    about = (f"{', '.join(names)}, {torch.get_num_threads()} threads, Python "
             f"{sys.version.split()[0]}, torch {torch.__version__}, numpy {np.__version__}")
    print(f"{about}\n\n{show(results)}")
    if args.json:
        evaluate.write_json(args.json, {"machine": about, "rows": results})


if __name__ == "__main__":
    main()
