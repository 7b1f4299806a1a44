"""Sets of one's own: tables, fewer leads, other people's sets, features, thresholds, records."""
import re
import shlex
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat
from sklearn.metrics import f1_score

import data
import evaluate
import post_train
from helpers import ROOT, arguments, predicted, read_csv, write_csv, write_record

RECORDS = [f"ecg/{i:05d}_hr" for i in range(1, 61)]


@pytest.fixture
def clinic(demo_set, undisturbed, tmp_path, tiny, monkeypatch):
    """The demo set's records in ecg/ and a run on them in run/, in the current folder."""
    shutil.copytree(demo_set / "records500/00000", tmp_path / "clinic" / "ecg")
    monkeypatch.chdir(tmp_path / "clinic")
    shutil.copytree(undisturbed, "run")


def by_hand(record, windows=1):
    """Probabilities of a record by run/best.pt, means over windows of 10 s."""
    signal, fs = data.read_record(record)
    starts = [int(10 * fs * i) for i in range(windows)]
    parts = [data.preprocess(signal[:, i:i + int(10 * fs)], fs) for i in starts]
    return predicted("run/best.pt", np.stack(parts)).mean(0)


def test_a_table_becomes_labels(tmp_path):
    """However a spreadsheet or pandas writes it; the classes are in its order."""
    plain = "record,patient_id,fold,STACH,AFIB\nb/2,17,10,0,1\na/1,3,1,1,0\n"
    for text in (plain, "\ufeff" + plain.replace(",", ", ").replace("\n", "\r\n"),
                 plain.replace("b/2", "b/2.hea").replace("17,10,0,1", "17.0,10.0,False,True")):
        (tmp_path / "table.csv").write_text(text, encoding="utf-8", newline="")
        labels = data.load_labels(tmp_path, tmp_path / "table.csv")
        assert labels.classes == ["STACH", "AFIB"] and labels.record.tolist() == ["b/2", "a/1"]
        assert labels.patient_id.tolist() == [17, 3] and labels.fold.tolist() == [10, 1]
        assert labels.y.tolist() == [[0, 1], [1, 0]]


def test_whole_patients_are_dealt_to_folds_by_a_hash(tmp_path):
    """By CRC-32, of "123456789" it is 0xcbf43926. Unknown patients are each their own."""
    patients = ["", "nan", "<NA>", "None", "-1.0", " 7.0", "123456789", "anonym9", "anonym9"]
    rows = [{"record": f"r{i}", "patient_id": who, "AFIB": 1} for i, who in enumerate(patients)]
    write_csv(tmp_path / "table.csv", rows)
    labels = data.load_labels(tmp_path, tmp_path / "table.csv")
    dealt = ["r0", "r1", "r2", "r3", "r4", "7", *patients[6:]]
    assert labels.fold.tolist() == [zlib.crc32(name.encode()) % 10 + 1 for name in dealt]
    assert labels.fold[6] == 0xcbf43926 % 10 + 1 and len({*labels.patient_id.tolist()}) == 8


def test_the_readmes_example(clinic, capsys):
    """A table with its head, and its commands for it, which train, score and predict."""
    readme = (ROOT / "README.md").read_text()
    head = re.search(r"```\n(record,.*\n)", readme)[1]
    Path("clinic.csv").write_text(head + "".join(
        f"some/{record[4:]},{i // 2},{i % 2}\n" for i, record in enumerate(RECORDS)))
    shutil.copytree("ecg", "clinic/some")
    shutil.copy("ecg/00001_hr.hea", "clinic/some/record.hea")
    commands = re.findall(r"^python (post_train|evaluate)\.py (.*clinic.*)", readme, re.MULTILINE)
    assert {script for script, _ in commands} == {"post_train", "evaluate"}
    for script, words in commands:
        short = "--weights none --epochs 1 --probe-epochs 1 " * (script == "post_train")
        argv = shlex.split(short + words, comments=True)
        {"post_train": post_train, "evaluate": evaluate}[script].main(argv)
    out = capsys.readouterr().out
    assert "2 records name no patient" in out     # the first two are of 0
    assert "best.pt on fold 10: " in out and re.search(r"^AFIB +0\.\d{4}", out, re.MULTILINE)
    assert Path("ecg.png").read_bytes().startswith(b"\x89PNG")


def test_one_lead_from_records_to_a_prediction(clinic, uncached, capsys):
    """Records that hold V1 alone. The backbone is one of twelve leads, and the network cut from it
    is the whole one with zeros."""
    for record in RECORDS:
        path = uncached / "records500/00000" / record[4:]
        write_record(path, data.read_record(path, ("V1",))[0], ["v1"])
    post_train.main(arguments(uncached, "one", "--leads", "v1", "--weights", "run/probe.pt",
                              "--epochs", 0))
    x = data.preprocess(*data.read_record(path, ("V1",)))
    inputs = {"one/best.pt": x, "run/probe.pt": np.pad(x, ((6, 5), (0, 0)))}
    features = [evaluate.load_model(path)[1].forward_features(torch.from_numpy(ecg)[None])
                for path, ecg in inputs.items()]
    torch.testing.assert_close(*features, atol=1e-6, rtol=1e-5)
    capsys.readouterr()
    evaluate.main(["one/best.pt", "--record", str(path)])
    found = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()[1:6]]
    want = np.sort(predicted("one/best.pt", x[None])[0])[::-1]
    assert found == pytest.approx(want[:5], abs=6e-4)


def test_other_peoples_sets(clinic):
    """Another folder, its table with the classes in another order, one renamed, and all folds."""
    shutil.copytree("ecg", "georgia/ecg")
    rows = [{"record": record, "STACH": i % 2, "PVC": 1, "AFIB": i % 3 // 2}
            for i, record in enumerate(RECORDS)]
    write_csv("georgia.csv", rows)
    evaluate.main("run/best.pt --data georgia --task georgia.csv --fold all --features".split())
    z, (checkpoint, model) = (np.load("run/predictions-georgia-georgia-all.npz"),
                              evaluate.load_model("run/best.pt"))
    order = [checkpoint["classes"].index(name) for name in ("STACH", "AFIB")]
    assert z["classes"].tolist() == ["STACH", "AFIB"]
    assert z["y_true"].tolist() == [[row["STACH"], row["AFIB"]] for row in rows]
    want = [by_hand(record)[order] for record in RECORDS[::6]]
    np.testing.assert_allclose(z["y_prob"][::6], want, atol=2e-3)   # the cache is float16
    logits = model.dense(torch.from_numpy(z["features"]))[:, order].detach()
    np.testing.assert_allclose(z["y_prob"], torch.sigmoid(logits), atol=1e-5)


def test_sets_that_end_alike_have_predictions_of_their_own(clinic):
    """The same records, with other labels; the first one's predictions stay."""
    for name, label in (("a/v1.2", 0), ("a/v1.3", 1), ("b/v1.2", 1)):
        shutil.copytree("ecg", f"{name}/ecg")
        rows = [{"record": record, "AFIB": label} for record in RECORDS]
        write_csv(f"{name}/labels.csv", rows)
        evaluate.main(["run/best.pt", "--data", name, "--task", f"{name}/labels.csv"])
    for name, label in (("a-v1.2", 0), ("a-v1.3", 1), ("b-v1.2", 1)):
        z = np.load(f"run/predictions-{name}-{name}-labels.npz")
        assert (z["y_true"] == label).all()


def test_thresholds_have_the_best_f1_on_fold_9(undisturbed, tiny):
    """Against every threshold, tried with scikit-learn; probabilities tie."""
    rng = np.random.default_rng(1)
    y, prob = rng.random((60, 6)) < 0.2, rng.random((60, 6)).round(1)
    prob[:, :3] = np.clip(prob[:, :3] + 0.3 * y[:, :3], 0, 1).round(1)
    y[:, 4], y[:, 5] = True, False
    for c, found in enumerate(evaluate.best_thresholds(y, prob)[:4]):
        best = max(f1_score(y[:, c], prob[:, c] >= t) for t in prob[:, c])
        assert found in prob[:, c] and f1_score(y[:, c], prob[:, c] >= found) == best
    assert np.isnan(evaluate.best_thresholds(y, prob)[4:]).all()
    checkpoint, model = evaluate.load_model(undisturbed / "best.pt")
    labels, signals = data.load_records(checkpoint["data"], "rhythm12")
    nine = evaluate.predict(checkpoint, model, labels.take(labels.fold == 9), signals, "cpu")
    want = evaluate.best_thresholds(nine["y_true"], nine["y_prob"])
    np.testing.assert_allclose(checkpoint["thresholds"], want, atol=1e-6)


def test_many_records_make_one_table(clinic, fails, monkeypatch):
    """A folder, a record of 35 s, and one of the CinC Challenges' kind; one that cannot be read."""
    monkeypatch.setattr(evaluate, "FEW", 1)
    signal = np.random.default_rng(0).normal(size=(12, 17500))
    write_record("long", signal, data.LEADS)
    savemat("A1.mat", {"val": (1000 * signal[:, :2570]).astype(np.int16)}, format="4")
    lines = [f"A1.mat 16+24 1000/mV 16 0 0 0 0 {lead}" for lead in data.LEADS]
    Path("A1.hea").write_text("\n".join(["A1 12 257 2570", *lines, "#Dx: 426783006", ""]))
    open("ecg/00005_hr.dat", "wb").close()
    records = ["ecg", "A1.mat", "A1.hea", RECORDS[1], "long"]    # some of them stand twice
    fails(evaluate.main, ["run/best.pt", "--out", "all.csv", "--record", *records], "00005_hr",
          "1 of 62", "all.csv")
    rows = {row["record"]: row for row in read_csv("all.csv")}
    assert rows.keys() == {"A1", "long", *RECORDS} - {RECORDS[4]}
    checkpoint = torch.load("run/best.pt", weights_only=True)
    for record, windows in (("A1", 1), (RECORDS[1], 1), ("long", 3)):
        row, want = rows[record], by_hand(record, windows)
        found = [float(row[name]) for name in checkpoint["classes"]]
        np.testing.assert_allclose(found, want, atol=2e-3)
        above = [name for name, p, t in zip(checkpoint["classes"], want, checkpoint["thresholds"])
                 if p >= t]
        assert row["above_threshold"] == ";".join(above) and row["windows"] == str(windows)
