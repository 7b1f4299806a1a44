"""The metric against scikit-learn, the intervals, predictions, and the tool."""
import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

import data
import evaluate
import model as network


@st.composite
def scored(draw):
    """Labels and probabilities with many ties, and weights of which some are zero."""
    n, classes = draw(st.integers(2, 40)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    y = rng.random((n, classes)) < draw(st.floats(0, 1))
    prob = np.round(rng.random((n, classes)), draw(st.integers(0, 3)))
    return y.astype(int), prob, np.where(rng.random(n) < 0.2, 0, rng.exponential(size=n))


def by_sklearn(y, prob, weight=None):
    scores = np.full((2, y.shape[1]), np.nan)
    for c in range(y.shape[1]):
        if 0 < y[:, c].sum() < len(y):
            scores[0, c] = roc_auc_score(y[:, c], prob[:, c], sample_weight=weight)
            scores[1, c] = average_precision_score(y[:, c], prob[:, c], sample_weight=weight)
    return scores


@given(scored())
def test_equal_to_scikit_learn(case):
    y, prob, _ = case
    np.testing.assert_allclose(evaluate.auroc_auprc(y, prob), by_sklearn(y, prob), atol=1e-12)


@given(scored())
def test_equal_to_scikit_learn_with_weights(case):
    y, prob, weight = case
    got = np.array(evaluate.auroc_auprc(y, prob, weight))
    for c in range(y.shape[1]):
        if weight[y[:, c] == 1].sum() > 0 and weight[y[:, c] == 0].sum() > 0:
            np.testing.assert_allclose(got[:, c:c + 1], by_sklearn(y[:, c:c + 1], prob[:, c:c + 1], weight), atol=1e-12)
        else:
            assert np.isnan(got[0, c])
    both = np.array(evaluate.auroc_auprc(y, prob, np.stack([weight, np.ones(len(y))])))  # several weightings at once
    assert both.shape == (2, 2, y.shape[1])
    np.testing.assert_allclose(both[:, 0], got, atol=1e-12)
    np.testing.assert_allclose(both[:, 1], evaluate.auroc_auprc(y, prob), atol=1e-12)


@given(scored())
def test_monotone_maps_change_nothing_and_the_complement_mirrors(case):
    y, prob, _ = case
    np.testing.assert_allclose(evaluate.auroc_auprc(y, prob), evaluate.auroc_auprc(y, prob**3 / 2), atol=1e-12)
    np.testing.assert_allclose(evaluate.auroc_auprc(y, prob)[0], evaluate.auroc_auprc(1 - y, 1 - prob)[0], atol=1e-12)


def test_by_hand():
    """Scores .9 .8 .7 .6 with labels 1 0 1 0: three of four pairs are in order; precisions 1 and 2/3 at the positives."""
    auroc, auprc = evaluate.auroc_auprc([[1], [0], [1], [0]], [[0.9], [0.8], [0.7], [0.6]])
    assert auroc == [0.75] and auprc == pytest.approx([5 / 6])


@pytest.mark.parametrize("dtype", [np.uint8, bool, np.int64, np.float16])
def test_predictions_of_any_numeric_type(dtype):
    y, prob = np.array([[1], [0], [1], [0]]), np.array([[1], [0], [0], [0]])
    np.testing.assert_allclose(evaluate.auroc_auprc(y.astype(dtype), prob.astype(dtype)), by_sklearn(y, prob))


def test_undefined_classes_do_not_count():
    y = np.array([[1, 0, 1], [0, 0, 1], [1, 0, 1]])
    scores = evaluate.report(y, np.array([[0.9, 0.5, 0.5], [0.1, 0.5, 0.5], [0.8, 0.5, 0.5]]), ["a", "b", "c"])
    assert scores["undefined"] == ["b", "c"] and scores["macro_auroc"] == 1.0
    assert scores["per_class"] == {"a": {"positives": 2, "auroc": 1.0, "auprc": 1.0}, "b": {"positives": 0, "auroc": None, "auprc": None},
                                   "c": {"positives": 3, "auroc": None, "auprc": None}}
    nothing = evaluate.report(y[:, 1:2], np.full((3, 1), 0.5), ["b"])
    assert nothing["macro_auroc"] is None and nothing["macro_auroc_ci"] == [None, None]
    json.dumps([scores, nothing], allow_nan=False)
    assert "undefined here, not counted: b, c" in "\n".join(evaluate.summary(scores))


def made_up(n, classes, seed=0, prevalence=0.05):
    rng = np.random.default_rng(seed)
    y = (rng.random((n, classes)) < prevalence).astype(int)
    y[0] = 1
    return y, 1 / (1 + np.exp(-(rng.normal(size=(n, classes)) + y - 2)))


def test_bootstrap_equals_scikit_learn_draw_by_draw():
    y, prob = made_up(80, 3)
    patient = np.arange(80) // 2 + 1000
    got = evaluate.bootstrap(y, prob, patient, draws=5, seed=3)
    weights = np.random.default_rng(3).exponential(size=(5, 40))
    want = [by_sklearn(y, prob, w[np.arange(80) // 2]).mean(1) for w in weights]  # one weight a patient
    np.testing.assert_allclose(got, want, atol=1e-12)
    assert np.array_equal(got, evaluate.bootstrap(y, prob, patient, draws=5, seed=3))


def test_chunks_of_draws_change_nothing(monkeypatch):
    y, prob = made_up(60, 2)
    whole = evaluate.bootstrap(y, prob, draws=20)
    monkeypatch.setattr(evaluate, "DRAW_CHUNK", 200)
    np.testing.assert_array_equal(whole, evaluate.bootstrap(y, prob, draws=20))


def test_interval_covers_as_the_normal_one_does():
    """For one class of many records the interval's width is DeLong's: compare with the spread over fresh samples."""
    scores = [evaluate.auroc_auprc(*made_up(600, 1, seed, 0.3))[0][0] for seed in range(300)]
    low, high = evaluate.report(*made_up(600, 1, 1, 0.3), ["a"])["macro_auroc_ci"]
    assert (high - low) / 2 == pytest.approx(1.96 * np.std(scores), rel=0.15)


def test_rare_classes_stay_defined_and_unbiased():
    y, prob = made_up(400, 5, prevalence=0.0)  # one positive each: drawing with replacement would lose a third of them
    scores = evaluate.report(y, prob, list("abcde"))
    assert scores["undefined"] == [] and np.isfinite(scores["macro_auprc_ci"]).all()
    assert abs(scores["bootstrap_bias"]["macro_auroc"]) < 0.01


def test_bootstrap_of_the_whole_test_fold_is_small():
    import tracemalloc
    y, prob = made_up(2203, 4)
    tracemalloc.start()
    evaluate.report(y, prob, list("abcd"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e8  # it holds one class at a time, so 71 classes take no more


# ------------------------------------------------------------------------------------------------------------------- tool

@pytest.fixture
def checkpoint(tiny, demo, tmp_path):
    """A checkpoint as post_train.py writes it, of the small network."""
    import post_train
    out = tmp_path / "run"
    post_train.main(["--data", str(demo), "--task", "rhythm12", "--weights", "none", "--epochs", "1", "--probe-epochs", "1", "--batch-size", "16",
                     "--out", str(out)])
    return out / "best.pt"


def test_a_checkpoint_alone_is_enough(checkpoint, demo, tmp_path, capsys):
    capsys.readouterr()
    evaluate.main([str(checkpoint), "--json", str(tmp_path / "s.json")])
    out = capsys.readouterr().out
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores == json.loads((checkpoint.parent / "test.json").read_text())
    z = np.load(checkpoint.parent / "predictions.npz", allow_pickle=False)
    assert set(z.files) == {"ecg_id", "patient_id", "classes", "y_true", "y_prob"}
    labels = data.load_labels(demo, "rhythm12")
    assert z["ecg_id"].tolist() == labels.ecg_id[labels.fold == 10].tolist() and z["classes"].tolist() == labels.classes
    # Once more from the recordings, without the project's cache, batches or metric.
    model = network.ecgfounder(12).eval()
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    x = np.stack([data.preprocess(*data.read_record(demo / f"records500/00000/{i:05d}_hr")) for i in z["ecg_id"]])
    with torch.no_grad():
        prob = torch.sigmoid(model(torch.from_numpy(x))).numpy()
    np.testing.assert_allclose(z["y_prob"], prob, atol=2e-3)  # the cache is float16
    assert scores["n"] == len(x) and f"{len(x)} records" in out
    defined = [i for i in range(12) if 0 < z["y_true"][:, i].sum() < len(x)]
    want = np.mean([roc_auc_score(z["y_true"][:, i], z["y_prob"][:, i]) for i in defined])
    assert scores["macro_auroc"] == pytest.approx(want) and f"macro AUROC {want:.4f}" in out
    low, high = scores["macro_auroc_ci"]
    assert low <= scores["macro_auroc"] <= high
    assert all(name in out for name in labels.classes)


def test_folds_out_and_data(checkpoint, demo, tmp_path, capsys):
    moved = tmp_path / "elsewhere"
    shutil.move(demo, moved)
    evaluate.main([str(checkpoint), "--fold", "9", "10", "--data", str(moved), "--out", str(tmp_path / "run-frac0.1-p")])
    labels = data.load_labels(moved, "rhythm12")
    assert np.load(tmp_path / "run-frac0.1-p.npz")["ecg_id"].tolist() == labels.ecg_id[labels.fold >= 9].tolist()


def test_predictions_of_any_model(tmp_path, capsys, fails):
    y, prob = made_up(50, 3)
    np.savez(tmp_path / "other.npz", y_true=y, y_prob=prob, classes=np.array(["a", "b", "c"]))
    evaluate.main([str(tmp_path / "other.npz"), "--json", str(tmp_path / "s.json")])
    assert json.loads((tmp_path / "s.json").read_text())["macro_auprc"] == pytest.approx(by_sklearn(y, prob)[1].mean())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.npz", "s.json"]


def test_one_record_equals_the_prediction_through_the_cache(checkpoint, demo, tmp_path, capsys):
    evaluate.main([str(checkpoint), "--fold", *map(str, range(1, 11)), "--out", str(tmp_path / "p.npz")])
    z = np.load(tmp_path / "p.npz")
    capsys.readouterr()
    record = demo / "records500" / "00000" / "00011_hr"
    for name in (record, f"{record}.hea"):
        evaluate.main([str(checkpoint), "--record", str(name), "--plot", str(tmp_path / "ecg.png")])
        got = {line.split()[0]: float(line.split()[1]) for line in capsys.readouterr().out.splitlines()}
        want = dict(zip(z["classes"].tolist(), z["y_prob"][z["ecg_id"].tolist().index(11)]))
        assert list(got) == sorted(want, key=want.get, reverse=True)[:5]
        assert all(abs(got[c] - want[c]) < 6e-5 for c in got)  # printed with four digits
    picture = (tmp_path / "ecg.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 50_000


def test_a_record_of_another_rate(checkpoint, tmp_path, capsys):
    from make_demo import NAMES
    import wfdb
    signal = np.random.default_rng(0).normal(size=(2000, 12))
    wfdb.wrsamp("slow", fs=250, units=["uV"] * 12, sig_name=NAMES, p_signal=signal * 1000, fmt=["16"] * 12, write_dir=str(tmp_path))
    capsys.readouterr()
    evaluate.main([str(checkpoint), "--record", str(tmp_path / "slow")])
    assert len(capsys.readouterr().out.splitlines()) == 5
