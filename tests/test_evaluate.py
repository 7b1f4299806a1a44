"""The metric against scikit-learn, the intervals, predictions, comparisons, and the tool."""
import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import data
import evaluate
from helpers import by_sklearn, predicted, write_csv


@st.composite
def scored(draw):
    """Labels and probabilities with many ties, and weights of which some are zero."""
    n, classes = draw(st.integers(2, 40)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    y = rng.random((n, classes)) < draw(st.floats(0, 1))
    prob = np.round(rng.random((n, classes)), draw(st.integers(0, 3)))
    return y.astype(int), prob, np.where(rng.random(n) < 0.2, 0, rng.exponential(size=n))


def made_up(n, classes, seed=0, prevalence=0.05):
    rng = np.random.default_rng(seed)
    y = (rng.random((n, classes)) < prevalence).astype(int)
    y[0] = 1
    return y, 1 / (1 + np.exp(-(rng.normal(size=(n, classes)) + y - 2)))


@given(scored())
def test_equal_to_scikit_learn(case):
    """Unweighted, weighted, and with several weightings at once."""
    y, prob, weight = case
    plain, one = (np.array(evaluate.auroc_auprc(y, prob, w)) for w in (None, weight))
    np.testing.assert_allclose(plain, by_sklearn(y, prob), atol=1e-12)
    want = by_sklearn(y, prob, weight)
    defined = ~np.isnan(want[0])
    np.testing.assert_allclose(one[:, defined], want[:, defined], atol=1e-12)
    assert np.isnan(one[0, ~defined]).all()
    both = np.array(evaluate.auroc_auprc(y, prob, np.stack([weight, np.ones(len(y))])))
    np.testing.assert_allclose(both, np.stack([one, plain], axis=1), atol=1e-12)


@pytest.mark.parametrize("dtype", [np.uint8, bool, np.int64, np.float16, np.float64])
def test_by_hand(dtype):
    """Labels 1 0 1 0. Scores .9 .8 .7 .6: three of four pairs are in order, precisions 1 and 2/3 at
    the positives. Scores 1 0 0 0: a tie counts half."""
    y = np.array([[1], [0], [1], [0]])
    auroc, auprc = evaluate.auroc_auprc(y, [[0.9], [0.8], [0.7], [0.6]])
    assert auroc == [0.75] and auprc == pytest.approx([5 / 6])
    auroc, auprc = evaluate.auroc_auprc(y.astype(dtype), np.eye(4)[:, :1].astype(dtype))
    assert auroc == [0.75] and auprc == pytest.approx([0.5 * (1 + 2 / 4)])


def test_undefined_classes_do_not_count():
    y, half = np.array([[1, 0, 1], [0, 0, 1], [1, 0, 1]]), np.full((3, 1), 0.5)
    prob = np.hstack([[[0.9], [0.1], [0.8]], half, half])
    scores = evaluate.report(evaluate.score(y, prob), y, ["a", "b", "c"])
    assert scores["undefined"] == ["b", "c"] and scores["macro_auroc"] == 1.0
    assert scores["per_class"] == {"a": {"positives": 2, "auroc": 1.0, "auprc": 1.0},
                                   "b": {"positives": 0, "auroc": None, "auprc": None},
                                   "c": {"positives": 3, "auroc": None, "auprc": None}}
    nothing = evaluate.report(evaluate.score(y[:, 1:2], half), y[:, 1:2], ["b"])
    assert nothing["macro_auroc"] is None and nothing["macro_auroc_ci"] == [None, None]
    json.dumps([scores, nothing], allow_nan=False)
    assert evaluate.model_lines([{"name": "m", **scores}])[-1].endswith(": b, c")


def test_bootstrap_equals_scikit_learn_draw_by_draw(monkeypatch):
    y, prob = made_up(80, 3)
    patient = np.arange(80) // 2
    got = evaluate.bootstrap(y, prob, patient + 1000, draws=5, seed=3)
    weights = np.random.default_rng(3).exponential(size=(5, 40))  # one weight a patient
    np.testing.assert_allclose(got, [by_sklearn(y, prob, w[patient]) for w in weights], atol=1e-12)
    at_once, areas = [], evaluate.auroc_auprc
    monkeypatch.setattr(evaluate, "auroc_auprc",
                        lambda y, prob, w: at_once.append(len(w)) or areas(y, prob, w))
    monkeypatch.setattr(evaluate, "DRAW_CHUNK", 200)  # weights, so that memory is bounded
    assert np.array_equal(got, evaluate.bootstrap(y, prob, patient + 1000, draws=5, seed=3))
    assert at_once == [2, 2, 1]


def test_interval_covers_as_the_normal_one_does():
    """For one class of many records the width is DeLong's: that of the spread over new samples."""
    fresh = [evaluate.auroc_auprc(*made_up(600, 1, seed, 0.3))[0][0] for seed in range(300)]
    y, prob = made_up(600, 1, 1, 0.3)
    low, high = evaluate.report(evaluate.score(y, prob), y, ["a"])["macro_auroc_ci"]
    assert (high - low) / 2 == pytest.approx(1.96 * np.std(fresh), rel=0.15)


def test_differences_are_paired_by_the_weights_of_the_patients():
    """Once more by scikit-learn, both models under one weighting at a time."""
    y, prob = made_up(60, 2, prevalence=0.3)
    other = np.clip(prob + np.random.default_rng(9).normal(0, 0.1, prob.shape), 0, 1)
    patient = np.arange(60) // 2
    weights = np.random.default_rng(0).exponential(size=(50, 30))[:, patient]
    want = [by_sklearn(y, other, w).mean(1) - by_sklearn(y, prob, w).mean(1) for w in weights]
    a, b = (evaluate.Scores(np.stack(evaluate.auroc_auprc(y, p)),
                            evaluate.bootstrap(y, p, patient, draws=50)) for p in (prob, other))
    got = evaluate.difference(a, b, ["x", "y"])
    point = by_sklearn(y, other).mean(1) - by_sklearn(y, prob).mean(1)
    ends = (point - (np.percentile(want, (97.5, 2.5), axis=0) - point)).T
    np.testing.assert_allclose([got[f"macro_{m}_diff_ci"] for m in evaluate.METRICS], ends,
                               atol=1e-12)


def test_intervals_hold_the_true_score():
    """In how many of 100 fresh samples with 12 rare classes: mirrored, and the draws' percentiles
    themselves, which lie too high for AUPRC."""
    true = np.mean([evaluate.auroc_auprc(*made_up(40_000, 12, seed, 0.03)) for seed in range(3)], 0)
    true, held, by_percentiles = true.mean(1), np.zeros(2), np.zeros(2)
    for seed in range(100):
        y, prob = made_up(400, 12, seed, 0.03)
        point = evaluate.macro(np.stack(evaluate.auroc_auprc(y, prob)))
        draws = evaluate.macro(evaluate.bootstrap(y, prob, draws=100, seed=seed))
        low, high = evaluate.interval(point, draws).T
        held += (low <= true) & (true <= high)
        low, high = np.percentile(draws, (2.5, 97.5), axis=0)
        by_percentiles += (low <= true) & (true <= high)
    assert held == pytest.approx([90, 86], abs=3)
    assert by_percentiles == pytest.approx([90, 11], abs=3)


# ------------------------------------------------------------------------------- a checkpoint

@pytest.fixture
def checkpoint(tiny, undisturbed, tmp_path):
    """best.pt in a copy of a finished run's folder."""
    return shutil.copytree(undisturbed, tmp_path / "run") / "best.pt"


def test_other_folds_go_to_a_file_of_their_own(checkpoint, demo_set, tmp_path, capsys):
    """And records that trained the model are said, wherever and in whatever table they stand."""
    labels, other = data.load_labels(demo_set, "rhythm12"), tmp_path / "set"
    shutil.copytree(demo_set, other)
    table, rows = tmp_path / "own.csv", zip(labels.record, labels.y[:, 0])
    write_csv(table, [{"record": name, labels.classes[0]: y} for name, y in rows])
    dealt = data.load_labels(demo_set, table).fold == 10  # anew
    own, folder = ["--task", str(table), "--data", str(other)], checkpoint.parent
    for more, n in ((["--fold", "1", "--task", "all71"], (labels.fold == 1).sum()),
                    (["--fold", "8", "9"], (labels.fold == 8).sum()), (["--fold", "9", "10"], 0),
                    (own, (dealt & (labels.fold < 9)).sum())):
        evaluate.main([str(checkpoint), *more])
        said = f"{n} of these records are of patients in the training data of {checkpoint}: "
        said = said in capsys.readouterr().out
        assert said is bool(n) and (n or more[-1] == "10")
    found = np.load(folder / "predictions-8-9.npz")["ecg_id"].tolist()
    assert found == labels.ecg_id[np.isin(labels.fold, (8, 9))].tolist()
    assert not (folder / "predictions.npz").exists()


def test_predictions_score_as_their_checkpoint_does(checkpoint, demo, tmp_path):
    """Where no patient is known, too."""
    labels, table, files = data.load_labels(demo, "rhythm12"), tmp_path / "own.csv", []
    rows = zip(labels.record, labels.y[:, 0])
    write_csv(table, [{"record": name, labels.classes[0]: y} for name, y in rows])
    out = tmp_path / "own.npz"
    own = ["--data", demo, "--task", table, "--fold", "all", "--out", out]
    for argv in ([checkpoint, *own], [out]):
        files.append(tmp_path / f"{len(files)}.json")
        evaluate.main(list(map(str, [*argv, "--json", files[-1]])))
    assert files[0].read_text() == files[1].read_text()


def test_a_checkpoint_alone_is_enough(checkpoint, demo_set, tmp_path, capsys):
    evaluate.main([str(checkpoint), "--json", str(tmp_path / "s.json")])
    out, scores = capsys.readouterr().out, json.loads((tmp_path / "s.json").read_text())
    assert scores == json.loads((checkpoint.parent / "test.json").read_text())
    z = np.load(checkpoint.parent / "predictions.npz", allow_pickle=False)
    assert z.files == ["ecg_id", "patient_id", "classes", "y_true", "y_prob"]
    labels = data.load_labels(demo_set, "rhythm12")
    assert z["ecg_id"].tolist() == labels.ecg_id[labels.fold == 10].tolist()
    assert z["classes"].tolist() == labels.classes
    # Once more from the recordings, without the project's cache, batches or metric.
    paths = [demo_set / f"records500/00000/{i:05d}_hr" for i in z["ecg_id"]]
    x = np.stack([data.preprocess(*data.read_record(path)) for path in paths])
    prob = predicted(checkpoint, x)
    np.testing.assert_allclose(z["y_prob"], prob, atol=2e-3)  # the cache is float16
    want = np.nanmean(by_sklearn(z["y_true"], z["y_prob"]), axis=1)
    low, high = scores["macro_auroc_ci"]
    assert scores["n"] == len(x) and low <= scores["macro_auroc"] <= high
    assert [scores["macro_auroc"], scores["macro_auprc"]] == pytest.approx(want)
    few = ((z["y_true"].sum(0) > 0) & (z["y_true"].sum(0) < 10)).sum()
    words = [f"{len(x)} records", f"run        {want[0]:.4f}", *labels.classes,
             f"{few} of 12 classes have fewer than 10 positives"]
    assert all(word in out for word in words)

    evaluate.main([str(checkpoint), "--record", f"{paths[0]}.dat"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    likely = dict(zip(labels.classes, z["y_prob"][0]))
    assert [line[0] for line in lines[:5]] == sorted(likely, key=likely.get, reverse=True)[:5]
    assert all(abs(float(p) - likely[name]) < 6e-5 for name, p, *_ in lines)  # of four digits


def test_large_logits_do_not_tie():
    logits = np.array([-30, 0, 17, 18, 25, 30], np.float32)
    prob = evaluate.probabilities(logits)
    assert prob.dtype == np.float64 and (np.diff(prob) > 0).all()
    np.testing.assert_allclose(prob, 1 / (1 + np.exp(-logits.astype(float))), rtol=1e-12)


def test_where_memory_is_short_smaller_batches_are_tried():
    """A function that fails above five ECGs, and one that always does."""
    tried = []

    def function(x):
        tried.append(len(x))
        if len(x) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x.mean(-1)

    signals = np.random.default_rng(0).normal(size=(40, 2, 8)).astype(np.float16)
    got = evaluate.infer(function, signals, np.arange(3, 40), "cpu", 16)
    np.testing.assert_allclose(got, signals[3:].astype(np.float32).mean(-1), atol=1e-6)
    assert tried[:3] == [16, 8, 4] and sum(tried[2:]) == 37
    with pytest.raises(torch.OutOfMemoryError):
        evaluate.infer(lambda x: function(torch.zeros(6)), signals, np.arange(3), "cpu", 16)


# ------------------------------------------------------------------------------- comparison

@pytest.fixture
def models(tmp_path):
    """The folder of four models' predictions of the same 60 records of 30 patients and 3 classes,
    each but the first in an order of its own; b does not know the patients."""
    y, _ = made_up(60, 3, prevalence=0.3)
    for m, name in enumerate("abcd"):
        rng = np.random.default_rng(m)
        prob = 1 / (1 + np.exp(-(rng.normal(size=y.shape) + (1 + m / 2) * y - 2)))
        rows, columns = np.arange(60), np.arange(3)
        if name != "a":
            rows, columns = rng.permutation(60), rng.permutation(3)
        np.savez(tmp_path / f"{name}.npz", y_true=y[rows][:, columns], ecg_id=rows + 1000,
                 y_prob=prob[rows][:, columns], classes=np.array(["x", "y", "z"])[columns])
        if name != "b":
            change(tmp_path, name, name, patient_id=rows // 2 * 3)
    return tmp_path


def change(models, name, other, **arrays):
    """Save the predictions `name` as `other` with these arrays; None: without them."""
    with np.load(models / f"{name}.npz") as z:
        found = {key: z[key] for key in z.files} | arrays
    np.savez(models / f"{other}.npz", **{k: v for k, v in found.items() if v is not None})


def compared(models, *names):
    files = [str(models / name) for name in names]
    evaluate.main([*files, "--json", str(models / "s.json")])
    return json.loads((models / "s.json").read_text())


def test_models_side_by_side(models, capsys):
    out, macros = compared(models, "a.npz", "b.npz", "c.npz"), ("macro_auroc", "macro_auprc")
    text, by_name = capsys.readouterr().out, {m["name"]: m for m in out["models"]}
    assert list(by_name) == ["a", "b", "c"]
    for name, m in by_name.items():  # as each alone, but that b alone does not know the patients
        alone = compared(models, f"{name}.npz")
        with np.load(models / f"{name}.npz") as z:
            assert [alone[k] for k in macros] == pytest.approx(
                by_sklearn(z["y_true"], z["y_prob"]).mean(1))
        known = [] if name == "b" else [f"{k}_ci" for k in macros]
        for key in ("n", *macros, *known):
            assert m[key] == pytest.approx(alone[key])
        for c, scores in alone["per_class"].items():
            assert m["per_class"][c] == pytest.approx(scores)
    assert [(p["a"], p["b"]) for p in out["pairs"]] == [("a", "b"), ("a", "c"), ("b", "c")]
    for p in out["pairs"]:
        a, b = by_name[p["a"]], by_name[p["b"]]
        for k in macros:
            assert p[f"{k}_diff"] == pytest.approx(b[k] - a[k])
            assert p[f"{k}_gain_percent"] == pytest.approx(100 * (b[k] - a[k]) / a[k])
            assert p[f"{k}_diff_ci"][0] <= p[f"{k}_diff"] <= p[f"{k}_diff_ci"][1]
        for c, d in p["classes"].items():
            difference = b["per_class"][c]["auroc"] - a["per_class"][c]["auroc"]
            assert d["auroc_diff"] == pytest.approx(difference)
    gain = f"{out['pairs'][1]['macro_auroc_gain_percent']:+.1f} %"
    assert all(word in text for word in ("60 records", "c - a", gain))


def test_unknown_patients_are_each_their_own(models):
    """NaN, as pandas reads PTB-XL's patient_id, empty names, and other marks of a missing one."""
    change(models, "a", "nan", patient_id=np.full(60, np.nan))
    change(models, "a", "none", patient_id=None)
    nan, none = compared(models, "nan.npz"), compared(models, "none.npz")
    assert nan == none and np.ptp(nan["macro_auroc_ci"]) > 0.05
    for mark in ("", "None", -1):
        change(models, "a", "marked", patient_id=np.array([mark] * 60))
        found = evaluate.load_predictions(models / "marked.npz")["patient_id"]
        assert len(np.unique(found)) == 60
    change(models, "a", "half", patient_id=np.where(np.arange(60) < 30, np.nan, np.arange(60) // 2))
    assert len(np.unique(evaluate.load_predictions(models / "half.npz")["patient_id"])) == 45


@pytest.mark.parametrize("arrays, words", [
    ({"ecg_id": None}, ["ecg_id"]), ({"ecg_id": np.arange(60) // 2}, ["ecg_id", "twice"]),
    ({"ecg_id": np.arange(60) + 1001}, ["ecg_id", "lacks 1", "1 others", "1000"]),
    ({"y_true": np.ones((60, 3), int)}, ["same labels", "ecg_id 10"])])
def test_what_does_not_match_is_named(models, fails, arrays, words):
    change(models, "a", "o", **arrays)
    line = fails(evaluate.main, [models / "a.npz", models / "o.npz"], "wanted", *words)
    assert line.startswith("evaluate.py: o")


def test_classes_are_matched_by_name(models, capsys):
    """A class that one of the files lacks is named and left out; none in common is an error."""
    change(models, "a", "o", classes=np.array(["x", "w", "z"]))
    out, alone = compared(models, "a.npz", "o.npz"), compared(models, "a.npz")
    assert "classes left out: y of a; w of o" in capsys.readouterr().out
    assert list(out["models"][1]["per_class"]) == ["x", "z"]
    assert out["models"][1]["per_class"]["z"] == alone["per_class"]["z"]
    assert out["pairs"][0]["macro_auroc_diff"] == 0


def test_a_checkpoint_against_its_own_predictions(checkpoint, tmp_path, capsys):
    evaluate.main([str(checkpoint), "--out", str(tmp_path / "other.npz")])
    capsys.readouterr()
    result = compared(tmp_path, "run/best.pt", "other.npz")
    assert capsys.readouterr().out.count("+0.0000  95 % interval +0.0000 to +0.0000  +0.0 %") == 2
    assert [model["name"] for model in result["models"]] == ["run", "other"]
    values = [v for key, v in result["pairs"][0].items() if key.startswith("macro")]
    assert np.hstack(values).tolist() == [0.0] * 8  # exactly
