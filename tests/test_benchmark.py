"""The benchmark's checks and table. No test depends on what it measures."""
import argparse
import copy
import functools
import json
import types

import pytest
import torch

import benchmark
import plain

SMALL = argparse.Namespace(device=torch.device("cpu"), rounds=1, batch=4)


def test_rows_table_and_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(benchmark.ROWS, "feed", functools.partial(benchmark.feed, n=64))
    path = tmp_path / "speed.json"
    benchmark.main(["--rows", "feed", "--rounds", "1", "--json", str(path)])
    out, found = capsys.readouterr().out, json.loads(path.read_text())
    feed = found["rows"][0]
    ours, obvious = feed["ours"], feed["obvious"]
    assert found["machine"] in out and f"torch {torch.__version__}" in out
    assert feed["row"] == "feed one epoch" and feed["ratio"] == pytest.approx(obvious / ours)
    assert f"| feed one epoch | {ours:.3g} | {obvious:.3g} | ms/ECG | {feed['ratio']:.3g}x" in out


@pytest.mark.parametrize("drop_path, mode", [(0.0, "constant"), (0.5, "constant"), (0.5, "linear")])
def test_both_networks_agree_where_they_draw_the_same_samples(drop_path, mode):
    nets, x = benchmark.networks(drop_path, mode), torch.randn(4, 12, 300)
    benchmark.gradients_agree(nets, x)
    for (name, p), q in zip(nets["ours"].named_parameters(), nets["obvious"].parameters()):
        assert 0 < q.grad.norm() and (p.grad - q.grad).norm() <= 1e-4 * q.grad.norm(), name
    mask = plain.PlainBlock.mask(types.SimpleNamespace(drop_path=0.5), x)
    assert set(mask.unique().tolist()) <= {0.0, 2.0}
    with torch.no_grad():  # and a difference is found
        nets["obvious"].first_conv.conv.weight[0, 0, 0] += 0.5
    with pytest.raises(AssertionError, match="differ by"):
        benchmark.gradients_agree(nets, x)


def test_rows_for_a_gpu_run_on_a_cpu_too(tiny, monkeypatch):
    """With a small network and set, so that their code is known to run where there is no GPU."""
    def networks(drop_path=0.0, mode="constant", device="cpu"):
        net = benchmark.network.ecgfounder(benchmark.CLASSES, drop_path=drop_path)
        return {"ours": net, "obvious": copy.deepcopy(net)}

    monkeypatch.setattr(benchmark, "networks", networks)
    monkeypatch.setattr(benchmark, "floor_of", lambda *a: (1.0, 100.0))
    monkeypatch.setattr(torch, "compile", lambda net: net)
    monkeypatch.setattr(torch, "float16", torch.bfloat16)  # which CPUs are fast at
    rows = [*benchmark.steps("step", SMALL, (torch.float16,), (False, True)),
            benchmark.resident(SMALL, n=16, size=8), benchmark.schedule(SMALL, n=16, size=8)]
    assert len({r["row"] for r in rows}) == 2 * 2 + 2 and all(r["ours"] > 0 for r in rows)
    benchmark.show(rows)
