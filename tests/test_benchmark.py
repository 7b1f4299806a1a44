"""The benchmark's checks and table. No test depends on what it measures."""
import argparse
import json
import types

import pytest
import torch

import benchmark
import plain


def test_rows_table_and_json(tmp_path, capsys):
    path = tmp_path / "speed.json"
    benchmark.main(["--rows", "feed", "--rounds", "1", "--json", str(path)])
    out, found = capsys.readouterr().out, json.loads(path.read_text())
    feed = found["rows"][0]
    ours, obvious = feed["ours"], feed["obvious"]
    assert found["machine"] in out and f"torch {torch.__version__}" in out
    assert feed["row"] == "feed one epoch" and feed["ratio"] == pytest.approx(obvious / ours)
    assert f"| feed one epoch | {ours:.3g} | {obvious:.3g} | ms/ECG |" in out


@pytest.mark.parametrize("drop_path, mode", [(0.0, "constant"), (0.5, "constant"), (0.5, "linear")])
def test_both_networks_agree_where_they_draw_the_same_samples(drop_path, mode):
    nets = benchmark.networks(drop_path, mode)
    x, y = torch.randn(4, 12, 300), torch.zeros(4, benchmark.CLASSES)
    benchmark.gradients_agree(*nets, x, y)
    mask = plain.PlainBlock.mask(types.SimpleNamespace(drop_path=0.5), x)
    assert set(mask.unique().tolist()) <= {0.0, 2.0}
    with torch.no_grad():  # and a difference is found
        nets[1].first_conv.conv.weight[0, 0, 0] += 0.5
    with pytest.raises(AssertionError, match="differ by"):
        benchmark.gradients_agree(*nets, x, y)


def test_rows_for_a_gpu_run_on_a_cpu_too(tiny, monkeypatch, tmp_path):
    """With a small network and set, so that their code is known to run where there is no GPU."""
    def networks(drop_path=0.0, mode="constant", device="cpu"):
        return [benchmark.network.ecgfounder(benchmark.CLASSES, drop_path=drop_path)
                for _ in range(2)]

    monkeypatch.setattr(benchmark, "networks", networks)
    monkeypatch.setattr(benchmark, "product_rate", lambda *a: 100.0)
    monkeypatch.setattr(torch, "compile", lambda net: net)
    monkeypatch.setattr(torch, "float16", torch.bfloat16)  # which CPUs are fast at
    args = argparse.Namespace(device=torch.device("cpu"), rounds=1, batch=4)
    rows = [*benchmark.steps(args, tmp_path), benchmark.resident(args, tmp_path, n=32, size=16),
            benchmark.schedule(args, tmp_path, n=32, size=16)]
    assert len(rows) == 3 * 2 * 2 + 2 and all(r["ours"] > 0 for r in rows)
    benchmark.show(rows)


def test_memory_is_measured_in_a_process_of_its_own():
    assert benchmark.peak_memory(0.5, 0, 1) > 10
