"""Sets of one's own: tables, fewer leads, other sets, thresholds, long records, features."""
import argparse
import hashlib
import json
import re
import shlex
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import evaluate
import model as network
import post_train
from helpers import ROOT, predicted, read_csv, weights, write_csv, write_record
from make_demo import NAMES

N = 40
RNG = np.random.default_rng(0)
CLASSES = ["fast", "AFIB", "noise"]     # in no order
UNKNOWN = ["", "nan", "NaN", "NA", "N/A", "<NA>", "None", "null", "-1", "-1.0"]


def ecg(fast, samples, fs, rng):
    """Beats of 1 mV on all leads, 60 or 120 a minute -> (12, samples) in millivolts."""
    t = np.arange(samples) / fs
    period = 0.5 if fast else 1.0
    beat = np.exp(-((t % period - 0.2) / 0.02) ** 2)
    return np.outer(np.linspace(0.5, 1.5, 12), beat) + rng.normal(0, 0.02, (12, samples))


@pytest.fixture(scope="module")
def clinic_set(tmp_path_factory):
    """40 records at 257 Hz in microvolts, leads in another order, and clinic.csv beside them."""
    root, order, rows = tmp_path_factory.mktemp("clinic"), RNG.permutation(12), []
    (root / "ecg").mkdir()
    for i in range(N):
        fast = i % 2
        signal = 1000 * ecg(fast, 2570, 257, RNG)[order]
        write_record(root / f"ecg/r{i}", signal, [NAMES[k] for k in order], 257, "uV", 1)
        rows.append({"record": f"ecg/r{i}", "patient_id": f"p{i // 2}", "fold": i // 4 + 1,
                     "fast": fast, "AFIB": i % 3 // 2, "noise": i % 4 // 2})
    write_csv(root / "clinic.csv", rows)
    data.build_cache(root, root / "clinic.csv", workers=1)
    return root


@pytest.fixture
def clinic(clinic_set, tmp_path, monkeypatch):
    """A copy, as the current folder."""
    monkeypatch.chdir(shutil.copytree(clinic_set, tmp_path / "clinic"))


def train(*more):
    post_train.main(["--data", ".", "--task", "clinic.csv", "--weights", "none", "--batch-size",
                     "8", "--probe-epochs", "2", "--epochs", "2", "--device", "cpu", "--out",
                     "run", *more])


# ------------------------------------------------------------------------------------------- tables

def test_a_table_becomes_labels(clinic):
    labels, rows = data.load_labels(".", "clinic.csv"), read_csv("clinic.csv")
    assert labels.classes == CLASSES and labels.ecg_id.tolist() == [r["record"] for r in rows]
    assert labels.patient_id.tolist() == [r["patient_id"] for r in rows]
    assert labels.y.tolist() == [[int(row[name]) for name in CLASSES] for row in rows]
    assert labels.fold.tolist() == [int(row["fold"]) for row in rows]
    numbered = [{"ecg_id": 100 - i, **row, "patient_id": UNKNOWN[i % len(UNKNOWN)]}
                for i, row in enumerate(rows)]
    write_csv("numbered.csv", [row | {"fast": f"{row['fast']}.0"} for row in numbered])
    again = data.load_labels(".", "numbered.csv")
    assert again.ecg_id.tolist() == list(range(100, 60, -1)) and np.array_equal(again.y, labels.y)
    assert len(set(again.patient_id.tolist())) == N  # unknown patients are each their own


def test_whole_patients_are_dealt_to_folds_by_a_hash(clinic):
    """The same on every machine and in every order; CRC-32 of "123456789" is 0xcbf43926."""
    rows = [{k: v for k, v in row.items() if k != "fold"} for row in read_csv("clinic.csv")]
    for row, patient in zip(rows, ("", " 7.0", "123456789", "None")):
        row["patient_id"] = patient
    write_csv("dealt.csv", rows)
    write_csv("lone.csv", [{"record": row["record"], "AFIB": row["AFIB"]} for row in rows])
    records = [row["record"] for row in rows]
    patients = ["ecg/r0", "7", "123456789", "ecg/r3", *(f"p{i // 2}" for i in range(4, N))]
    for table, names in (("dealt.csv", patients), ("lone.csv", records)):
        folds = data.load_labels(".", table).fold.tolist()
        assert folds == [zlib.crc32(name.encode()) % 10 + 1 for name in names]
        assert folds[2] == 0xcbf43926 % 10 + 1 or table == "lone.csv"


def test_names_of_columns(clinic):
    """Spaces around them and in cells do not count, nor do the records' endings, a byte order mark
    and the line ends of Windows; True is 1. A column without a name, as pandas writes its index,
    is said."""
    text = open("clinic.csv").read()
    with open("spaced.csv", "w", encoding="utf-8-sig", newline="\r\n") as f:
        f.write(text.replace("fold", " fold ", 1).replace(",", ", "))
    assert data.load_labels(".", "spaced.csv").classes == CLASSES
    ended = [row | {"record": f"{row['record']}.hea", "AFIB": str(row["AFIB"] == "1"),
                    "fast": str(row["fast"] == "1").upper()} for row in read_csv("clinic.csv")]
    write_csv("ended.csv", ended)
    for name in ("spaced.csv", "ended.csv"):
        table, plain = data.read_table(".", name), data.read_table(".", "clinic.csv")
        assert table.records == plain.records and list(table.ecg_id) == list(plain.ecg_id)
    assert np.array_equal(*(data.load_labels(".", f"{n}.csv").y for n in ("ended", "clinic")))
    with open("indexed.csv", "w") as f:
        f.writelines(f"{i or ''},{line}" for i, line in enumerate(text.splitlines(True)))
    with pytest.raises(data.InputError, match="column 1 has no name.*index=False"):
        data.load_labels(".", "indexed.csv")


def test_patients_who_have_a_record_among_some(clinic):
    """Those in training alone are said to be shared: a fraction may leave them out."""
    labels = data.load_labels(".", "clinic.csv")
    assert np.flatnonzero(labels.of_patients(["ecg/r4", "ecg/r39", "none"])).tolist() == [
        4, 5, 38, 39]
    assert not labels.of_patients([]).any()
    labels.patient_id[[0, 39]] = "both"
    of_fold = {name: np.flatnonzero(np.isin(labels.fold, folds)) for name, folds in (
        ("folds 1-8", range(1, 9)), ("fold 9", [9]), ("fold 10", [10]))}
    args = argparse.Namespace(task="clinic.csv", weights="none")
    trains = of_fold["folds 1-8"], of_fold["folds 1-8"][1:]
    whole, part = (post_train.notes_on(args, labels, train, of_fold, labels.record[train])
                   for train in trains)  # as in a run that goes on
    assert [note[:10] for note in whole if "patients" in note] == ["1 patients"]
    assert not [note for note in part if "patients" in note]


def test_two_tables_over_one_folder_do_not_disturb_each_other(clinic):
    first = data.find_cache(".", "clinic.csv")[0].array
    before = first.read_bytes()
    rows = read_csv("clinic.csv")
    write_csv("half.csv", rows[::-2])
    write_csv("relabelled.csv", [row | {"fast": "0"} for row in rows])
    data.build_cache(".", "half.csv", workers=1)
    labels, signals = data.load_records(".", "half.csv")
    assert first.read_bytes() == before and len(signals) == 20
    whole = np.load(first, mmap_mode="r")
    assert np.array_equal(signals[labels.row], whole[::-2])
    assert data.find_cache(".", "relabelled.csv")[0].array == first  # the records are the same


def test_from_a_table_to_scores(clinic, tiny, capsys):
    """It lacks a class in training, and has a patient on both sides."""
    rows = read_csv("clinic.csv")
    for row in rows[:36]:
        row["AFIB"] = "0"
    rows[39]["patient_id"] = rows[36]["patient_id"] = "p0"
    write_csv("clinic.csv", rows)
    train()
    out = capsys.readouterr().out
    for said in ("32 records to train and 4 to validate", "3 classes: fast, AFIB, noise",
                 "no training record has AFIB", "no validation record has AFIB",
                 "1 patients are in more than one"):
        assert said in out
    assert torch.load("run/best.pt", weights_only=True)["classes"] == CLASSES
    assert json.load(open("run/test.json"))["n"] == 4
    args = post_train.parse(["--task", "some/clinic.csv"])
    assert args.out == "runs/clinic-frac1-post-seed0"


def test_the_readmes_example(clinic, tiny, capsys):
    """A table like its own, and its three commands, which train, score and predict."""
    readme = (ROOT / "README.md").read_text()
    Path("clinic/some").mkdir(parents=True)
    for i in range(N):
        write_record(f"clinic/some/r{i}", data.read_record(f"ecg/r{i}")[0], NAMES, 257)
    shutil.copy("clinic/some/r0.hea", "clinic/some/record.hea")
    table = re.search(r"```\n(record,.*\n)(.*\n)+?```", readme)
    Path("shown.csv").write_text(table[0].replace("```\n", "").replace("```", ""))
    shown = data.load_labels(".", "shown.csv")
    assert shown.classes == ["AFIB"] and shown.y.tolist() == [[1], [0], [0]]
    rows = [f"some/r{i},{i // 2},{i % 2}\n" for i in range(N)]
    Path("clinic.csv").write_text(table[1] + "".join(rows))
    commands = [line for line in readme.splitlines() if re.match("python .*clinic", line)]
    assert len(commands) == 3
    for command in commands:
        script, *words = shlex.split(command, comments=True)[1:]
        if script == "post_train.py":
            words += shlex.split("--weights none --epochs 1 --probe-epochs 1 --batch-size 8")
        {"post_train.py": post_train, "evaluate.py": evaluate}[script].main(words)
    out = capsys.readouterr().out
    assert "best.pt on fold 10" in out and "clinic-frac1-post-seed0  " in out
    picture = Path("ecg.png").read_bytes()
    assert out.splitlines()[-1].startswith("AFIB ")
    assert picture.startswith(b"\x89PNG") and len(picture) > 50_000


# -------------------------------------------------------------------------------------------- leads

def test_names_of_leads():
    assert data.parse_leads("v1, ii,V1") == ("II", "V1") and network.LEADS == data.LEADS


@pytest.mark.parametrize("leads", [("I",), ("II", "V1", "V5")])
def test_a_cut_network_is_the_whole_one_with_zeros(tmp_path, leads):
    torch.manual_seed(0)
    whole, cut = network.ecgfounder(4), network.ecgfounder(4, len(leads))
    torch.save({"state_dict": whole.state_dict()}, tmp_path / "w.pth")
    left_out = network.load_pretrained(cut, tmp_path / "w.pth", head=True, leads=leads)
    x, index = torch.zeros(2, 12, 640), [data.LEADS.index(lead) for lead in leads]
    x[:, index] = torch.randn(2, len(leads), 640)
    assert left_out == 12 - len(leads)
    with torch.no_grad():
        torch.testing.assert_close(cut.eval()(x[:, index]), whole.eval()(x), atol=1e-6, rtol=1e-5)


def test_the_one_lead_release_is_fetched_and_its_hash_printed(tiny, tmp_path, monkeypatch, capsys):
    """Not compared, as none is known; a damaged file is fetched again."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": network.ecgfounder(150, 1).state_dict()}, "release.pth")
    Path("checkpoints").mkdir()
    Path(network.OFFICIAL_ONE_LEAD).write_bytes(b"damaged")
    network.main(["--download", "--leads", "1", "--url", Path("release.pth").resolve().as_uri()])
    out, digest = capsys.readouterr().out, hashlib.sha256(Path("release.pth").read_bytes())
    assert "1_lead_ECGFounder.pth: " in out and "; 1 leads, 150 classes" in out
    assert f"sha256 {digest.hexdigest()}: not the known" in out
    train_on = network.ecgfounder(2, 1)
    assert network.load_pretrained(train_on, network.OFFICIAL_ONE_LEAD, leads=("I",)) == 0
    with pytest.raises(network.WeightsError, match="has leads I; wanted V1 too"):
        network.load_pretrained(train_on, network.OFFICIAL_ONE_LEAD, leads=("V1",))


@pytest.mark.parametrize("how", data.PREPROCESSING)
def test_the_cache_of_a_lead_is_preprocessing_of_it_alone(clinic, how):
    data.build_cache(".", "clinic.csv", how, ("V2",), workers=1)
    _, signals = data.load_records(".", "clinic.csv", how, ("V2",))
    signal, fs = data.read_record("ecg/r7")
    want = data.preprocess(signal[[7]], fs, how)  # V2 is the eighth
    assert signals.shape == (N, 1, 5000)
    np.testing.assert_array_equal(signals[7], want.astype(np.float16))


def test_one_lead_from_records_to_a_prediction(clinic, tiny, capsys, fails):
    """Records that hold lead I alone; the backbone is one of twelve leads."""
    train()
    whole = torch.load("run/probe.pt", weights_only=True)["state_dict"]
    for i in range(N):
        signal, fs = data.read_record(f"ecg/r{i}")
        write_record(f"ecg/r{i}", signal[:1], ["i"], fs)
    train("--leads", "I", "--weights", "run/probe.pt", "--out", "one", "--epochs", "0")
    assert "run/probe.pt without 11 of its leads" in capsys.readouterr().out
    checkpoint = torch.load("one/best.pt", weights_only=True)
    assert checkpoint["leads"] == ["I"]
    stem = checkpoint["state_dict"]["first_conv.conv.weight"]
    assert torch.equal(stem, whole["first_conv.conv.weight"][:, :1])
    evaluate.main(["one/best.pt", "--record", "ecg/r3", "--plot", "ecg.png"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    x = data.preprocess(*data.read_record("ecg/r3", ("I",)))
    want = dict(zip(CLASSES, predicted("one/best.pt", x[None])[0].tolist()))
    assert {line[0]: float(line[1]) for line in lines} == pytest.approx(want, abs=6e-4)
    fails(evaluate.main, ["run/best.pt", "--record", "ecg/r3"], "has no lead II (it has i)")


@pytest.mark.parametrize("size, grids", [(1, "all"), (3000, [])])
def test_a_record_in_wrong_units_is_drawn_without_a_grid(tmp_path, monkeypatch, size, grids):
    """Its lines for each 0.1 mV would be without end."""
    import matplotlib.pyplot as plt
    import wfdb
    write_record(tmp_path / "r", size * ecg(1, 5000, 500, RNG), NAMES, gain=5)
    seen = []
    monkeypatch.setattr(wfdb, "plot_items", lambda **k: seen.append(k) or plt.figure())
    evaluate.plot_record(tmp_path / "r", data.LEADS, tmp_path / "r.png")
    assert seen[0]["ecg_grids"] == grids and (tmp_path / "r.png").exists()


# --------------------------------------------------------------------------------------- other sets

@pytest.fixture(scope="module")
def trained_set(clinic_set, tmp_path_factory):
    """The clinic's folder after training."""
    import tiny as small
    root = shutil.copytree(clinic_set, tmp_path_factory.mktemp("trained") / "clinic")
    with pytest.MonkeyPatch.context() as m:
        small.shrink(m.setattr)
        m.chdir(root)
        train("--preprocess", "zscore", "--lr", "0.01")
    return root


@pytest.fixture
def trained(trained_set, tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(shutil.copytree(trained_set, tmp_path / "trained"))
    checkpoint = torch.load("run/best.pt", weights_only=True)
    torch.save(checkpoint | {"data": ".", "task": "clinic.csv"}, "run/best.pt")


def by_hand(record, windows=1):
    """Probabilities of a record's windows of 10 s by run/best.pt, (windows, L)."""
    signal, fs = data.read_record(record)
    n = int(10 * fs)
    parts = [data.preprocess(signal[:, i * n:(i + 1) * n], fs, "zscore") for i in range(windows)]
    return predicted("run/best.pt", np.stack(parts))


def test_external_validation(trained, tmp_path, fails, capsys):
    """Another folder, its table with the classes in another order, one renamed, and all folds."""
    other = tmp_path / "georgia"
    shutil.copytree("ecg", other / "ecg")
    rows = [{"record": row["record"], "AFIB": row["AFIB"], "PVC": row["noise"],
             "fast": row["fast"]} for row in read_csv("clinic.csv")]
    write_csv(tmp_path / "georgia.csv", rows)
    evaluate.main(["run/best.pt", "--data", str(other), "--task", str(tmp_path / "georgia.csv"),
                   "--fold", "all", "--json", "s.json"])
    out, scores = capsys.readouterr().out, json.load(open("s.json"))
    assert f"run/predictions-georgia-georgia-all.npz: predictions of {N} records" in out
    assert "classes left out: PVC of georgia.csv; noise of run/best.pt" in out
    write_csv(tmp_path / "none.csv", [{"record": row["record"], "PVC": 1} for row in rows[1:]])
    argv = ["run/best.pt", "--data", str(other), "--task", str(tmp_path / "none.csv")]
    fails(evaluate.main, argv, "no class in common", "PVC", "wanted")
    assert len(list((other / "cache").glob("*.json"))) == 1  # no cache was built for it
    assert scores["n"] == N and list(scores["per_class"]) == ["AFIB", "fast"]
    z = np.load("run/predictions-georgia-georgia-all.npz")
    want = np.stack([by_hand(row["record"])[0, [1, 0]] for row in rows])
    np.testing.assert_allclose(z["y_prob"], want, atol=2e-3)  # the cache is float16
    assert z["y_true"].tolist() == [[int(row["AFIB"]), int(row["fast"])] for row in rows]


def test_features_serve_another_classifier(trained):
    """Embeddings of which scikit-learn learns what the set shows."""
    from sklearn.linear_model import LogisticRegression
    evaluate.main(["run/best.pt", "--fold", "all", "--features"])
    z = np.load("run/predictions-all.npz")
    state = weights("run", "best.pt")
    assert z["features"].shape == (N, state["dense.weight"].shape[1])
    logits = z["features"] @ state["dense.weight"].numpy().T + state["dense.bias"].numpy()
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), z["y_prob"], atol=1e-5)
    x, fast = (z["features"] - z["features"].mean(0)) / z["features"].std(0), z["y_true"][:, 0]
    classifier = LogisticRegression(max_iter=1000).fit(x[:20], fast[:20])
    assert classifier.score(x[20:], fast[20:]) > 0.9


# --------------------------------------------------------------------------------------- thresholds

def test_thresholds_have_the_best_f1():
    """Against every threshold, tried with scikit-learn; probabilities tie."""
    from sklearn.metrics import f1_score
    rng = np.random.default_rng(1)
    y, prob = rng.random((60, 6)) < 0.2, rng.random((60, 6)).round(1)
    prob[:, :3] = np.clip(prob[:, :3] + 0.3 * y[:, :3], 0, 1).round(1)
    y[:, 4], y[:, 5] = True, False
    for c, found in enumerate(evaluate.best_thresholds(y, prob)[:4]):
        best = max(f1_score(y[:, c], prob[:, c] >= t) for t in prob[:, c])
        assert found in prob[:, c] and f1_score(y[:, c], prob[:, c] >= found) == best
    assert np.isnan(evaluate.best_thresholds(y, prob)[4:]).all()


def test_thresholds_come_from_fold_9(trained, capsys, monkeypatch):
    """Where they rest on enough positives; of four ECGs none does."""
    evaluate.main(["run/best.pt", "--fold", "9"])
    z, checkpoint = np.load("run/predictions-9.npz"), torch.load("run/best.pt", weights_only=True)
    thresholds = evaluate.best_thresholds(z["y_true"], z["y_prob"])
    assert checkpoint["positives"] == z["y_true"].sum(0).tolist()
    np.testing.assert_array_equal(checkpoint["thresholds"], thresholds)
    for few in (evaluate.FEW, 1):
        monkeypatch.setattr(evaluate, "FEW", few)
        capsys.readouterr()
        evaluate.main(["run/best.pt", "--record", "ecg/r3"])
        lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
        for i, name in enumerate(CLASSES):
            above = few == 1 and float(lines[name].split()[1]) >= thresholds[i]
            assert ("above" in lines[name]) == above
    assert evaluate.thresholds_of(checkpoint) == pytest.approx(thresholds, nan_ok=True)
    for unfit in ("x", thresholds.tolist()[1:], ["x"] * 3):
        assert np.isnan(evaluate.thresholds_of(checkpoint | {"thresholds": unfit})).all()


def test_a_long_record_is_averaged_over_its_windows(trained, capsys):
    """35 s: three whole windows, the rest is left out."""
    signal = np.where(np.arange(17500) < 5000, ecg(1, 17500, 500, RNG), RNG.normal(size=17500))
    write_record("long", signal, NAMES)
    Path("clinic.csv").unlink()  # the checkpoint knows its classes
    evaluate.main(["run/best.pt", "--record", "long"])
    lines = capsys.readouterr().out.splitlines()
    found = {line.split()[0]: float(line.split()[1]) for line in lines[1:4]}
    want = by_hand("long", 3)
    assert lines[-1] == "mean of 3 windows of 10 s" and np.ptp(want, 0).max() > 1e-2
    assert [found[name] for name in CLASSES] == pytest.approx(want.mean(0).tolist(), abs=6e-4)


def test_many_records_make_one_table(trained, fails, capsys, monkeypatch):
    """A folder and a file of the CinC Challenges' kind; one that cannot be read is named."""
    monkeypatch.setattr(evaluate, "FEW", 1)
    write_challenge_record("A0001", data.read_record("ecg/r2")[0])
    argv = ["--record", "ecg", "A0001.mat", "A0001.hea", "ecg/r2", "--out", "all.csv"]
    evaluate.main(["run/best.pt", *argv])  # some of them stand twice
    assert f"all.csv: {N + 1} records, 3 classes" in capsys.readouterr().out
    rows = read_csv("all.csv")
    assert sorted(row["record"] for row in rows) == sorted(
        ["A0001", *(f"ecg/r{i}" for i in range(N))])
    thresholds = torch.load("run/best.pt", weights_only=True)["thresholds"]
    for row in rows[::9]:
        prob = [float(row[name]) for name in CLASSES]
        np.testing.assert_allclose(prob, by_hand(row["record"])[0], atol=2e-3)
        above = [name for name, p, t in zip(CLASSES, prob, thresholds) if p >= t]
        assert row["above_threshold"].split(";") == (above or [""]) and row["windows"] == "1"
    same = next(row for row in rows if row["record"] == "ecg/r2")
    assert [float(same[c]) for c in CLASSES] == pytest.approx(
        [float(rows[-1][c]) for c in CLASSES], abs=2e-3)
    Path("linked").mkdir()
    Path("linked/ecg").symlink_to(Path("ecg").resolve())
    assert len(evaluate.find_records(["linked"])) == N
    checkpoint = torch.load("run/best.pt", weights_only=True)
    rare = evaluate.Prediction("r", 1, np.array([1.25e-9, 0.5, 1]))
    evaluate.write_table("rare.csv", checkpoint, [rare])
    assert [float(read_csv("rare.csv")[0][name]) for name in CLASSES] == rare.prob.tolist()
    open("ecg/r5.dat", "wb").close()
    fails(evaluate.main, ["run/best.pt", "--record", "ecg"], "ecg/r5", f"1 of {N}", "records.csv")
    assert len(read_csv("run/records.csv")) == N - 1


def write_challenge_record(name, signal):
    """As the PhysioNet/CinC Challenges 2020 and 2021 do: MATLAB 4 after a header of 24 bytes."""
    from scipy.io import savemat
    counts = (1000 * signal).round().astype(np.int16)
    savemat(f"{name}.mat", {"val": counts}, format="4")
    lines = [f"{name} 12 257 {signal.shape[1]}"]
    lines += [f"{name}.mat 16+24 1000/mV 16 0 {row[0]} 0 0 {lead}"
              for row, lead in zip(counts, data.LEADS)]
    with open(f"{name}.hea", "w") as f:
        f.write("\n".join([*lines, "#Age: 74", "#Sex: Male", "#Dx: 426783006", ""]))
