"""The two ways that the benchmark times give the same numbers. No test depends on a time."""
from functools import partial
from shutil import copytree
from unittest.mock import patch

import torch

import benchmark
import tape
from tiny import LEVELS


def compare(title, function, *ways):
    found = outs = list(map(function, ways[:2]))
    if "replay" in title:           # and copies
        return
    if "post_train" in title:       # the folders of two runs
        found = [torch.load(f"{out}/best.pt")["state_dict"].values() for out in found]
    if "scores" in title:
        found[0] = found[0]["macro_auroc"], found[0]["macro_auprc"]
    tolerance = {"scores of 71 classes": 1e-9}.get(title, 0.3 if "16" in title else 0.01)
    if "or not" in title and "lean" not in title:   # bit for bit
        tolerance = 0
    for pair in zip(*found, strict=True):
        a, b = (torch.as_tensor(x + 0, dtype=torch.double) for x in pair)
        assert (a - b).abs().max() <= tolerance * b.abs().max(), title
    return outs


def test_both_ways_agree(tiny, demo_set, monkeypatch):
    tape.install(monkeypatch)
    small = {name: partial(benchmark.ROWS[name], batches=[4], steps=5)
             for name in ("steps", "graphs", "floor", "resident")}
    rows = {**benchmark.ROWS, **small, "floor": partial(small["floor"], piece=9),
            "runs": partial(benchmark.runs, sizes=(20, 9, 9)),
            "whole": partial(benchmark.training, "--probe-epochs 1 --epochs 1 --frac 0.2")}
    run = benchmark.run     # on the CPU post_train.py refuses --graph
    with patch("plain.LEVELS", LEVELS), patch.multiple(benchmark, row=compare, ROWS=rows,
            run=lambda *args: run(*args[:-1], args[-1].replace("--graph", "")),
            make_demo=lambda root, n: copytree(demo_set, root, dirs_exist_ok=True)):
        benchmark.main(["--rows", "signals", "scores", "depth-linear", "whole", *list(rows)[-5:]])
