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
    scores = evaluate.report(evaluate.score(y, np.array([[0.9, 0.5, 0.5], [0.1, 0.5, 0.5], [0.8, 0.5, 0.5]])), y, ["a", "b", "c"])
    assert scores["undefined"] == ["b", "c"] and scores["macro_auroc"] == 1.0
    assert scores["per_class"] == {"a": {"positives": 2, "auroc": 1.0, "auprc": 1.0}, "b": {"positives": 0, "auroc": None, "auprc": None},
                                   "c": {"positives": 3, "auroc": None, "auprc": None}}
    nothing = evaluate.report(evaluate.score(y[:, 1:2], np.full((3, 1), 0.5)), y[:, 1:2], ["b"])
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
    want = [by_sklearn(y, prob, w[np.arange(80) // 2]) for w in weights]  # one weight a patient
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
    y, prob = made_up(600, 1, 1, 0.3)
    low, high = evaluate.report(evaluate.score(y, prob), y, ["a"])["macro_auroc_ci"]
    assert (high - low) / 2 == pytest.approx(1.96 * np.std(scores), rel=0.15)


def test_rare_classes_stay_defined_and_unbiased():
    y, prob = made_up(400, 5, prevalence=0.0)  # one positive each: drawing with replacement would lose a third of them
    scores = evaluate.report(evaluate.score(y, prob), y, list("abcde"))
    assert scores["undefined"] == [] and np.isfinite(scores["macro_auprc_ci"]).all()
    assert abs(scores["bootstrap_bias"]["macro_auroc"]) < 0.01


def test_bootstrap_of_the_whole_test_fold_is_small():
    import tracemalloc
    y, prob = made_up(2203, 4)
    tracemalloc.start()
    evaluate.report(evaluate.score(y, prob), y, list("abcd"))
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


# ------------------------------------------------------------------------------------------------------------- comparison

@pytest.fixture
def models(tmp_path):
    """Files of four models' predictions for the same 60 records of 40 patients and 3 classes, each in its own order."""
    y, _ = made_up(60, 3, prevalence=0.3)
    for m, name in enumerate("abcd"):
        rng = np.random.default_rng(m)
        prob = 1 / (1 + np.exp(-(rng.normal(size=y.shape) + (1 + m / 2) * y - 2)))
        rows, columns = (np.arange(60), np.arange(3)) if name == "a" else (rng.permutation(60), rng.permutation(3))
        np.savez(tmp_path / f"{name}.npz", y_true=y[rows][:, columns], y_prob=prob[rows][:, columns], classes=np.array(["x", "y", "z"])[columns],
                 ecg_id=rows + 1000, **({"patient_id": rows // 2 * 3} if name != "b" else {}))
    return tmp_path


def compared(models, *argv):
    evaluate.main([str(models / f"{a}.npz") if a in "abcde" else a for a in argv] + ["--json", str(models / "s.json")])
    return json.loads((models / "s.json").read_text())


def test_models_side_by_side(models, capsys):
    out = compared(models, "a", "b", "c")
    assert [m["name"] for m in out["models"]] == ["a", "b", "c"] and [(p["a"], p["b"]) for p in out["pairs"]] == [("a", "b"), ("a", "c"), ("b", "c")]
    for m in out["models"]:  # as each alone, but that b alone does not know the patients
        alone = compared(models, m["name"])
        for key in ("n", "macro_auroc", "macro_auprc", *(["macro_auroc_ci", "macro_auprc_ci"] if m["name"] != "b" else [])):
            assert m[key] == pytest.approx(alone[key])
        assert {c: s["auroc"] for c, s in m["per_class"].items()} == pytest.approx({c: s["auroc"] for c, s in alone["per_class"].items()})
    by_name = {m["name"]: m for m in out["models"]}
    for p in out["pairs"]:
        for k in ("macro_auroc", "macro_auprc"):
            a, b = by_name[p["a"]][k], by_name[p["b"]][k]
            assert p[f"{k}_diff"] == pytest.approx(b - a) and p[f"{k}_gain_percent"] == pytest.approx(100 * (b - a) / a)
            assert p[f"{k}_diff_ci"][0] <= p[f"{k}_diff"] <= p[f"{k}_diff_ci"][1]
        for c, d in p["classes"].items():
            assert d["auroc_diff"] == pytest.approx(by_name[p["b"]]["per_class"][c]["auroc"] - by_name[p["a"]]["per_class"][c]["auroc"])
    text = capsys.readouterr().out
    assert "60 records" in text and "c - a" in text and f"{out['pairs'][1]['macro_auroc_gain_percent']:+.1f} %" in text


def test_differences_are_paired_by_the_weights_of_the_patients():
    """The interval of a difference, once more by scikit-learn: both models under one weighting at a time."""
    y, prob = made_up(60, 2, prevalence=0.3)
    other = np.clip(prob + np.random.default_rng(9).normal(0, 0.1, prob.shape), 0, 1)
    patient = np.arange(60) // 2
    weights = np.random.default_rng(0).exponential(size=(50, 30))[:, patient]
    want = [by_sklearn(y, other, w).mean(1) - by_sklearn(y, prob, w).mean(1) for w in weights]
    a, b = (evaluate.Scores(np.stack(evaluate.auroc_auprc(y, p)), evaluate.bootstrap(y, p, patient, draws=50)) for p in (prob, other))
    got = evaluate.difference(a, b, ["x", "y"])
    np.testing.assert_allclose([got["macro_auroc_diff_ci"], got["macro_auprc_diff_ci"]], np.percentile(want, (2.5, 97.5), axis=0).T, atol=1e-12)
    unpaired = np.subtract(*np.percentile(evaluate.macro(b.draws)[:, 0] - evaluate.macro(a.draws)[::-1, 0], (97.5, 2.5)))
    assert np.subtract(*got["macro_auroc_diff_ci"][::-1]) < 0.8 * unpaired  # the same patients in both: narrower


def test_a_model_against_itself_is_exactly_zero(models):
    for argv in (("a", "a"), ("a", "a", "--group", "1")):
        out = compared(models, *argv)
        for pair in out["pairs"] + out.get("group_pairs", []):
            assert {k: v for k, v in pair.items() if k.startswith("macro")} == {
                f"macro_{m}_{k}": v for m in ("auroc", "auprc") for k, v in (("diff", 0), ("diff_ci", [0, 0]), ("gain_percent", 0))}


def test_order_of_records_and_classes_does_not_matter(models):
    with np.load(models / "d.npz") as z:
        rows, columns = np.argsort(z["ecg_id"]), np.argsort(z["classes"])
        np.savez(models / "e.npz", y_true=z["y_true"][rows][:, columns], y_prob=z["y_prob"][rows][:, columns], classes=z["classes"][columns],
                 ecg_id=z["ecg_id"][rows], patient_id=z["patient_id"][rows])
    pairs = compared(models, "a", "d", "e")["pairs"]
    assert pairs[0] | {"b": "e"} == pairs[1] and pairs[2]["macro_auroc_diff"] == 0


def test_groups_of_seeds(models, capsys):
    for name, new in zip("abcd", ("first-seed0", "first-seed1", "second-seed0", "second-seed1")):
        shutil.copy(models / f"{name}.npz", models / f"{new}.npz")
    out = compared(models, *(str(models / f"{g}-seed{s}.npz") for g in ("first", "second") for s in (0, 1)), "--group", "2")
    aurocs = [m["macro_auroc"] for m in out["models"]]
    for g, values in zip(out["groups"], (aurocs[:2], aurocs[2:])):
        assert g["macro_auroc_mean"] == pytest.approx(np.mean(values)) and g["macro_auroc_sd"] == pytest.approx(abs(values[1] - values[0]) / 2**0.5)
    assert "mean and standard deviation of 2" in capsys.readouterr().out
    assert [g["name"] for g in out["groups"]] == ["first", "second"] and len(out["pairs"]) == 6
    assert out["group_pairs"][0]["macro_auroc_diff"] == pytest.approx(np.mean(aurocs[2:]) - np.mean(aurocs[:2]))
    low, high = out["group_pairs"][0]["macro_auroc_diff_ci"]
    assert low <= out["group_pairs"][0]["macro_auroc_diff"] <= high


def changed(models, **change):
    with np.load(models / "a.npz") as z:
        np.savez(models / "o.npz", **{k: v for k, v in ({k: z[k] for k in z.files} | change).items() if v is not None})


@pytest.mark.parametrize("change, words", [
    ({"ecg_id": None}, "o.npz: has no ecg_id"), ({"ecg_id": np.arange(60) + 1001}, "it lacks 1, and it has 1 others (first difference: record 1000)"),
    ({"ecg_id": np.arange(60) // 2}, "holds a record twice"), ({"classes": np.array(["x", "y", "w"])}, "(first difference: class w)"),
    ({"y_true": np.ones((60, 3), int)}, "wanted the same labels"),
])
def test_what_does_not_match_is_named(models, fails, change, words):
    changed(models, **change)
    line = fails(evaluate.main, [models / "a.npz", models / "o.npz"], words.removeprefix("o.npz: "))
    assert "o" in line.split(": ")[1] and "wanted" in line


@pytest.mark.parametrize("argv, words", [
    (["a", "b", "c", "--group", "2"], "do not come in runs of 2"), (["a", "--group", "1"], "--group 1"), (["a", "b", "--group", "0"], "--group 0"),
    (["a", "b", "--out", "x.npz"], "--out has no meaning for predictions"), (["a", "b", "--record", "x"], "--record goes with one FILE"),
    (["a", "b", "--plot", "x.gif"], "wanted .png"), (["a", "b", "--plot", "no/x.png"], "no folder"),
])
def test_wrong_calls_of_the_comparison(models, fails, argv, words):
    fails(evaluate.main, [models / f"{a}.npz" if len(a) == 1 and a in "abc" else a for a in argv], words)


def test_checkpoints_are_compared_with_predictions(checkpoint, capsys):
    evaluate.main([str(checkpoint)])
    shutil.copy(checkpoint.parent / "predictions.npz", checkpoint.parent / "other.npz")
    capsys.readouterr()
    evaluate.main([str(checkpoint), str(checkpoint.parent / "other.npz")])
    text = capsys.readouterr().out
    assert "run   " in text and "other - run\n  AUROC +0.0000  95 % interval +0.0000 to +0.0000  +0.0 %" in text


def test_picture_of_models(models, tmp_path):
    import matplotlib.pyplot as plt
    from matplotlib.image import imread
    compared(models, "a", "b", "--plot", str(tmp_path / "m.png"))
    compared(models, "a", "--plot", str(tmp_path / "one.svg"))
    assert imread(tmp_path / "m.png").shape[1] > 800 and (tmp_path / "one.svg").read_text().startswith("<?xml")
    text = (tmp_path / "one.svg").read_text()
    assert text.count("<!-- ") > 10 and all(f"<!-- {c} (" in text for c in "xyz") and "<!-- a (macro " in text
    assert not plt.get_fignums()


def test_unknown_patients_are_each_their_own(models):
    """As pandas reads PTB-XL's patient_id: NaN where it is unknown."""
    changed(models, patient_id=np.full(60, np.nan))
    lone = compared(models, str(models / "o.npz"))
    changed(models, patient_id=None)
    assert lone == compared(models, str(models / "o.npz")) and lone["macro_auroc_ci"][1] - lone["macro_auroc_ci"][0] > 0.05
    changed(models, patient_id=np.where(np.arange(60) < 30, np.nan, np.arange(60) // 2))
    assert len(np.unique(evaluate.load_predictions(models / "o.npz")["patient_id"])) == 45


@pytest.mark.parametrize("names, want", [
    (["a-seed0", "a-seed1"], "a"), (["run_1", "run_2"], "run"), (["xresnet1d101"], "xresnet1d101"), (["x-drop-path-0.5-0", "x-drop-path-0.5-1"], "x-drop-path-0.5"),
    (["classes-0", "classes-1"], "classes"), (["a-seed10", "a-seed11"], "a"), (["a", "b"], "a, b"), (["a-0", "a-1", "b-0"], "a-0, a-1, b-0"), (["0", "1"], "0, 1"), (["run1", "run2"], "run"), (["rhythm12", "rhythm12"], "rhythm12"),
])
def test_names_of_groups(names, want):
    assert evaluate.group_name(names) == want


def test_groups_of_one_name_keep_their_files_names():
    s = evaluate.Scores(np.ones((2, 1)), np.ones((3, 2, 1)))
    assert evaluate.grouped(["net-50-0", "net-50-1", "net-101-0", "net-101-1"], [s] * 4, 2)[0] == ["net-50", "net-101"]
    assert evaluate.grouped(["net-0", "net-1", "net-2", "net-3"], [s] * 4, 2)[0] == ["net-0", "net-2"]


def test_names_that_matplotlib_would_take_for_formulas(models, tmp_path):
    shutil.copy(models / "a.npz", models / "_x$y$.npz")
    changed(models, classes=np.array(["a$b$c", "$\\frac$", "z"]))
    evaluate.main([str(models / "o.npz"), "--plot", str(tmp_path / "classes.svg")])
    evaluate.main([str(models / "_x$y$.npz"), "--plot", str(tmp_path / "name.svg")])
    assert "<!-- _x$y$ (macro" in (tmp_path / "name.svg").read_text() and "<!-- a$b$c (" in (tmp_path / "classes.svg").read_text()


def test_interrupted(models, monkeypatch, capsys):
    def interrupt(*a):
        raise KeyboardInterrupt
    monkeypatch.setattr(evaluate, "score", interrupt)
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(models / "a.npz")])
    assert stop.value.code == 130 and capsys.readouterr().err.count("\n") == 1
