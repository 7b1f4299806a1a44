"""The metric against scikit-learn; intervals against DeLong's, sums done by hand and a simulation;
predictions, comparisons, and the ECG sheet."""
import json
import shutil

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings, strategies as st
from matplotlib.figure import Figure

import data
import evaluate
from helpers import by_sklearn, predicted, write_record

MACROS, DIFFS = ["macro_auroc", "macro_auprc"], ["macro_auroc_diff", "macro_auprc_diff"]
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def made_up(n, classes=3, seed=0, prevalence=0.3, digits=9, effect=1.0):
    """Labels and probabilities, with ties if they have few digits."""
    rng = np.random.default_rng(seed)
    y = (rng.random((n, classes)) < prevalence).astype(int)
    return y, np.round(1 / (1 + np.exp(-rng.normal(size=y.shape) - effect * y)), digits)


def scores_of(y, prob, patient_id=None):
    return evaluate.score({"y_true": y, "y_prob": prob, "patient_id": patient_id})


CASES = st.builds(made_up, st.integers(2, 15), st.integers(1, 3), st.integers(0, 999),
                  st.floats(0, 1), st.integers(0, 3))


@given(CASES)
def test_scores_equal_scikit_learns(case):
    np.testing.assert_allclose(evaluate.auroc_auprc(*case)[0], by_sklearn(*case), atol=1e-12)


def test_undefined_classes_do_not_count_and_a_perfect_score_has_no_interval():
    y, prob = np.array([[1, 0, 1], [0, 0, 1]]), np.array([[0.9] * 3, [0.1] * 3])
    some = evaluate.report(scores_of(y, prob), {"y_true": y, "classes": "abc"})
    assert some["undefined"] == ["b", "c"] and some["macro_auroc"] == some["macro_auprc"] == 1.0
    assert np.isnan([some["per_class"]["c"]["auroc"], *some["macro_auroc_ci"]]).all()
    assert "2 classes undefined" in evaluate.macro_line("m", some)
    none = evaluate.report(scores_of(y[:, 1:], prob[:, 1:]), {"y_true": y[:, 1:], "classes": "bc"})
    assert np.isnan([none["macro_auroc"], none["macro_auprc"]]).all()
    # No patient changes the AUROC; where both positives are of one patient, neither score.
    y, prob = np.array([[1], [0], [1], [0]]), np.array([[0.9], [0.8], [0.2], [0.1]])
    for patient_id, undefined in ([0, 0, 1, 1], [1, 0]), ([0, 1, 0, 1], [1, 1]):
        p = {"y_true": y, "y_prob": prob, "patient_id": patient_id, "classes": "a"}
        found = evaluate.report(evaluate.score(p), p)
        ends = [found["macro_auroc_ci"], found["macro_auprc_ci"]]
        assert np.isnan(ends).any(1).tolist() == np.isnan(ends).all(1).tolist() == undefined


# ---------------------------------------------------------------------------------------- intervals

def slopes_by_sklearn(y, prob, step=1e-5):
    """Central differences of scikit-learn's scores by the weight of each record, less the mean over
    the records of its kind: (N, L) -> (2, N, L)."""
    up, down = (np.stack([by_sklearn(y, prob, 1 + change) for change in sign * np.eye(len(y))], 1)
                for sign in (step, -step))
    slopes = (up - down) / (2 * step)
    for kind in (y == 0, y == 1):
        slopes -= kind * (slopes * kind).sum(1, keepdims=True) / np.maximum(kind.sum(0), 1)
    return slopes


@settings(max_examples=10)
@given(CASES)
def test_slopes_equal_differences_of_scikit_learn(case):
    found = evaluate.auroc_auprc(*case)[1]
    np.testing.assert_allclose(found, slopes_by_sklearn(*case), atol=1e-7)


@pytest.mark.parametrize("negatives", [50, 80, 500])
def test_the_variance_of_auroc_is_delongs(negatives):
    y, prob = np.repeat([1, 0], (50, negatives)), made_up(50 + negatives, 1, digits=2)[1][:, 0]
    order = np.sign(prob[:50, None] - prob[50:]) / 2 + 0.5      # of all pairs, a tie counts half
    delong = order.mean(1).var(ddof=1) / 50 + order.mean(0).var(ddof=1) / negatives
    found = scores_of(y[:, None], prob[:, None])
    assert found.factor * (found.slopes[0]**2).sum() == pytest.approx(delong, rel=0.01)


def test_intervals_equal_sums_by_hand():
    """Of a model and its difference from another, with two records of most patients."""
    (y, a), (_, b), patient = made_up(17), made_up(17, effect=2.0), np.append(np.arange(16) // 2, 0)
    n = [min(len({*patient[y[:, c] == kind]}) for kind in (0, 1)) for c in range(3)]
    factor = sum(1 / k for k in n) / sum((k - 1) / k**2 for k in n)

    def half(slopes):
        sums = np.stack([slopes[:, patient == who].sum(1) for who in range(8)], 1)
        freedom = (sums**2).sum(1)**2 / (sums**4).sum(1)
        return scipy.stats.t.ppf(0.975, freedom) * np.sqrt(factor * (sums**2).sum(1))

    p, of_b = by_sklearn(y, b).mean(1), slopes_by_sklearn(y, b).mean(2)
    diff, of_diff = p - by_sklearn(y, a).mean(1), of_b - slopes_by_sklearn(y, a).mean(2)
    scores = [scores_of(y, prob, patient) for prob in (a, b)]
    found = evaluate.report(scores[1], {"y_true": y, "classes": "xyz"})
    found |= evaluate.difference(*scores, "xyz")
    for i in (0, 1):
        step = half(of_b)[i] / p[i] / (1 - p[i])
        logits = scipy.special.logit([found[MACROS[i]], *found[f"{MACROS[i]}_ci"]])
        assert logits == pytest.approx(logits[0] + step * np.array([0, -1, 1]))
        ends = diff[i] - half(of_diff)[i], diff[i] + half(of_diff)[i]
        assert found[f"{DIFFS[i]}_ci"] == pytest.approx(ends)


@pytest.mark.parametrize("counts, held", [([2, 3, 4, 6, 8, 12, 20, 30], [0.97, 0.97, 0.96, 0.975]),
                                          ([60, 80, 100, 120], [0.96, 0.97, 0.95, 0.96])])
def test_intervals_hold_the_expected_score(counts, held):
    """In which part of 400 test sets of 300 patients with so many positives: of AUROC and AUPRC the
    mean over all these sets, and that of their differences between two models."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(400):
        y = np.stack([rng.permutation(300) < count for count in counts], 1)
        shared, noise = 0.8 * rng.normal(size=y.shape), 0.6 * rng.normal(size=(2, *y.shape))
        a, b = (scores_of(y, shared + noise[i] + (1.2 + 0.3 * i) * y) for i in (0, 1))
        found = evaluate.report(b, {"y_true": y, "classes": counts})
        found |= evaluate.difference(a, b, counts)
        rows.append([[found[key], *found[f"{key}_ci"]] for key in MACROS + DIFFS])
    point, low, high = np.moveaxis(rows, 2, 0)
    found = ((low <= point.mean(0)) & (point.mean(0) <= high)).mean(0)
    assert found == pytest.approx(held, abs=0.006) and found.min() > 0.93 and found.max() < 0.99


# -------------------------------------------------------------------------------------- predictions

@pytest.fixture
def checkpoint(tiny, undisturbed, tmp_path):
    """best.pt in a copy of a finished run's folder."""
    return shutil.copytree(undisturbed, tmp_path / "run") / "best.pt"


@pytest.fixture
def evaluated(tmp_path):
    """Calls evaluate.py and returns the scores that it writes."""
    def call(*argv):
        evaluate.main([*map(str, argv), "--json", str(tmp_path / "scores.json")])
        return json.loads((tmp_path / "scores.json").read_text())
    return call


def test_a_checkpoint_alone_is_enough(checkpoint, evaluated, demo_set, capsys):
    """Its scores, once more from the recordings, without the cache, the batches or the metric."""
    scores, z = evaluated(checkpoint), np.load(checkpoint.with_name("predictions.npz"))
    out, labels = capsys.readouterr().out, data.load_labels(demo_set, "rhythm12")
    assert scores == json.loads(checkpoint.with_name("test.json").read_text())
    assert z["ecg_id"].tolist() == labels.ecg_id[labels.fold == 10].tolist()
    assert z["classes"].tolist() == labels.classes
    paths = [demo_set / f"records500/00000/{i:05d}_hr" for i in z["ecg_id"]]
    x = np.stack([data.preprocess(*data.read_record(path)) for path in paths])
    np.testing.assert_allclose(z["y_prob"], predicted(checkpoint, x), atol=2e-3)    # float16 cache
    want = np.nanmean(by_sklearn(z["y_true"], z["y_prob"]), axis=1)
    assert [scores[key] for key in MACROS] == pytest.approx(want)
    assert f"AUROC {want[0]:.4f}" in out and f"AUPRC {want[1]:.4f}" in out


def test_inference_in_batches():
    """And large logits, whose probabilities in float32 would tie."""
    signals = np.random.default_rng(0).normal(size=(200, 2, 8)).astype(np.float16)
    rows, logits = np.arange(199, 1, -1), np.array([-30.0, 0, 17, 18, 25, 30])
    found = evaluate.infer(lambda x: x.mean(-1) / (len(x) <= 64), signals, rows, "cpu")
    np.testing.assert_allclose(found, signals[rows].astype(np.float32).mean(-1), atol=1e-6)
    found, want = evaluate.probabilities(np.float32(logits)), 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(found, want, rtol=1e-14)


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Three models' predictions of the same 60 records of 30 patients and 3 classes, each but the
    first in an order of its own; b does not know the patients."""
    monkeypatch.chdir(tmp_path)
    for m, name in enumerate("abc"):
        rng, (y, prob) = np.random.default_rng(m), made_up(60, effect=1 + m / 2)
        rows, columns = (rng.permutation(n) if m else np.arange(n) for n in (60, 3))
        known = {} if name == "b" else {"patient_id": rows // 2}
        np.savez(name, y_true=y[rows][:, columns], y_prob=prob[rows][:, columns],
                 ecg_id=rows + 1000, classes=np.array(["x", "y", "z"])[columns], **known)


def test_models_side_by_side(models, evaluated, fails):
    """Each as alone, but that b alone does not know the patients; of the same records only."""
    result = evaluated("a.npz", "b.npz", "c.npz")
    assert [pair["a"][0] + pair["b"][0] for pair in result["pairs"]] == ["ab", "ac", "bc"]
    for model, known in zip(result["models"], (True, False, True)):
        alone, z = evaluated(model["name"]), np.load(model["name"])
        assert model["per_class"] == alone["per_class"]
        assert (model["macro_auroc_ci"] == pytest.approx(alone["macro_auroc_ci"])) is known
        want = by_sklearn(z["y_true"], z["y_prob"]).mean(1)
        assert [model[key] for key in MACROS] == pytest.approx(want)
    (a, _, c), pair = result["models"], result["pairs"][1]
    for key in MACROS:
        assert pair[f"{key}_diff"] == pytest.approx(c[key] - a[key])
        assert pair[f"{key}_gain_percent"] == pytest.approx(100 * (c[key] - a[key]) / a[key])
    z = np.load("a.npz")
    for key, array, word in (("ecg_id", z["ecg_id"] + 1, "wanted the records"),
                             ("y_true", 1 - z["y_true"], "another label")):
        np.savez("o.npz", **{**z, key: array})
        fails(evaluate.main, ["a.npz", "o.npz"], "o.npz", word)


def test_unknown_patients_are_each_their_own(models, evaluated):
    """NaN, as pandas reads PTB-XL's patient_id, empty names, and other marks of a missing one."""
    found, own = [], {key: array for key, array in np.load("a.npz").items() if key != "patient_id"}
    for marks in (range(60), [np.nan] * 60, [""] * 60, ["None"] * 60, [-1] * 60):
        np.savez("marked.npz", **own, patient_id=np.array(marks))
        found.append(evaluated("marked.npz"))
    np.savez("marked.npz", **own)
    assert evaluated("a.npz") != evaluated("marked.npz") and found == [evaluated("marked.npz")] * 5


def test_the_sheet_has_one_scale_and_square_millimetres(tmp_path, monkeypatch):
    """25 mm/s and 10 mm/mV: 10 of 12 s of a normal, a flat and a large lead."""
    figures, sizes = [], np.array([[0.2], [0], [30]])      # of these 2, 2 and 8 mV are drawn
    signal = sizes * np.random.default_rng(0).uniform(-1, 1, (3, 3000))
    path = write_record(tmp_path / "ecg", signal, ["I", "II", "V1"], fs=250)
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    evaluate.plot_record(path, ["I", "II", "V1"], "caption", tmp_path / "ecg.png")
    figure, axis, box = figures[0], figures[0].axes[0], figures[0].axes[0].get_position()
    assert axis.get_xlim() == (0, 10) and axis.get_ylim() == pytest.approx((-12, 0))
    assert 25.4 * figure.get_size_inches() * box.size == pytest.approx([250, 120])
    assert np.diff(axis.xaxis.minor.locator()) == pytest.approx(0.04)
    assert np.diff(axis.yaxis.minor.locator()) == pytest.approx(-0.1)
    for line, lead, zero in zip(axis.lines, signal[:, :2500], (-1, -3, -8), strict=True):
        x, y = line.get_data()
        assert np.array_equal(x, np.arange(2500) / 250) and np.ptp(y - lead) < 0.002
        assert np.median(y) == pytest.approx(zero)
