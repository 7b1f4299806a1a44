"""Sets of one's own: tables, fewer leads, other people's sets, features, thresholds, records."""
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
import post_train
import tiny as small
from helpers import ROOT, arguments, predicted, read_csv, write_csv, write_record

RECORDS = [f"ecg/{i:05d}_hr" for i in range(1, 61)]
CLASSES = ["odd", "STACH", "AFIB"]      # in no order
OPTIONS = ("--task", "clinic.csv", "--preprocess", "zscore", "--lr", 0.01)


@pytest.fixture(scope="module")
def clinic_set(demo_set, tmp_path_factory):
    """The demo set's records in ecg/, clinic.csv, and what training on them writes to run/."""
    root, labels = tmp_path_factory.mktemp("clinic"), data.load_labels(demo_set, "rhythm12")
    shutil.copytree(demo_set / "records500/00000", root / "ecg")
    y = dict(zip(labels.classes, labels.y.T))
    columns = {"record": RECORDS, "patient_id": labels.patient_id, "fold": labels.fold,
               "odd": labels.ecg_id % 2, "STACH": y["STACH"], "AFIB": y["AFIB"]}
    write_csv(root / "clinic.csv", [dict(zip(columns, row)) for row in zip(*columns.values())])
    with pytest.MonkeyPatch.context() as m:
        small.shrink(m.setattr)
        m.chdir(root)
        post_train.main(arguments(".", "run", *OPTIONS))
    return root


@pytest.fixture
def clinic(clinic_set, tmp_path, tiny, monkeypatch):
    """A copy, as the current folder."""
    monkeypatch.chdir(shutil.copytree(clinic_set, tmp_path / "copy"))


def by_hand(record, windows=1):
    """Probabilities of a record by run/best.pt, means over windows of 10 s."""
    signal, fs = data.read_record(record)
    starts = [int(10 * fs * i) for i in range(windows)]
    parts = [data.preprocess(signal[:, i:i + int(10 * fs)], fs, "zscore") for i in starts]
    return predicted("run/best.pt", np.stack(parts)).mean(0)


def test_a_table_becomes_labels(clinic):
    """However a spreadsheet or pandas writes it."""
    rows, text = read_csv("clinic.csv"), Path("clinic.csv").read_text()
    with open("spaced.csv", "w", encoding="utf-8-sig", newline="\r\n") as f:
        f.write(text.replace("fold", " fold ", 1).replace(",", ", "))
    write_csv("ended.csv", [row | {"record": f"{row['record']}.hea", "fold": f"{row['fold']}.0",
                                   "AFIB": str(row["AFIB"] == "1")} for row in rows])
    for name in ("clinic.csv", "spaced.csv", "ended.csv"):
        labels = data.load_labels(".", name)
        assert labels.classes == CLASSES and labels.ecg_id.tolist() == [r["record"] for r in rows]
        assert labels.patient_id.tolist() == [int(row["patient_id"]) for row in rows]
        assert labels.fold.tolist() == [int(row["fold"]) for row in rows]
        assert labels.y.tolist() == [[int(row[name]) for name in CLASSES] for row in rows]


def test_whole_patients_are_dealt_to_folds_by_a_hash(clinic):
    """By CRC-32, of "123456789" it is 0xcbf43926. Unknown patients are each their own."""
    patients = ["", "nan", "<NA>", "None", "-1.0", " 7.0", "123456789", "9a", "9a"]
    records = [f"r{i}" for i in range(9)]
    lone = [{"record": record, "AFIB": 1} for record in records]
    dealt = [{"ecg_id": 9 - i, **row, "patient_id": patients[i]} for i, row in enumerate(lone)]
    for rows, names in ((lone, records), (dealt, [*records[:5], "7", *patients[6:]])):
        write_csv("table.csv", rows)
        labels = data.load_labels(".", "table.csv")
        assert labels.fold.tolist() == [zlib.crc32(name.encode()) % 10 + 1 for name in names]
        assert len(set(labels.patient_id.tolist())) == len(set(names))
    assert labels.fold[6] == 0xcbf43926 % 10 + 1 and labels.ecg_id.tolist() == [*range(9, 0, -1)]


def test_the_readmes_example(clinic, capsys):
    """A table like its own, and its commands for it, which train, score and predict."""
    readme = (ROOT / "README.md").read_text()
    table = re.search(r"```\n(record,.*\n)((?:.*\n)+?)```", readme)
    Path("shown.csv").write_text(table[1] + table[2])
    shown = data.load_labels(".", "shown.csv")
    answers = [int(row[-1]) for row in table[2].split()]
    assert shown.classes == ["AFIB"] and shown.y[:, 0].tolist() == answers
    shutil.copytree("ecg", "clinic/some")
    shutil.copy("ecg/00001_hr.hea", "clinic/some/record.hea")
    rows = [f"some/{record[4:]},{i // 2},{i % 2}\n" for i, record in enumerate(RECORDS)]
    Path("clinic.csv").write_text(table[1] + "".join(rows))
    commands = re.findall(r"^python (post_train|evaluate)\.py (.*clinic.*)", readme, re.MULTILINE)
    assert {script for script, _ in commands} == {"post_train", "evaluate"}
    for script, words in commands:
        short = "--weights none --epochs 1 --probe-epochs 1 " * (script == "post_train")
        argv = shlex.split(short + words, comments=True)
        {"post_train": post_train, "evaluate": evaluate}[script].main(argv)
    out = capsys.readouterr().out
    assert "best.pt on fold 10: " in out and re.search(r"^AFIB +0\.\d{4}", out, re.MULTILINE)
    assert Path("ecg.png").read_bytes().startswith(b"\x89PNG")


def test_one_lead_from_records_to_a_prediction(clinic, capsys):
    """Records that hold V1 alone. The backbone is one of twelve leads, and the network cut from it
    is the whole one with zeros."""
    for record in RECORDS:
        write_record(record, data.read_record(record, ("V1",))[0], ["v1"])
    post_train.main(arguments(".", "one", *OPTIONS, "--leads", "v1", "--weights", "run/probe.pt",
                              "--epochs", 0))
    assert "run/probe.pt without 11 of its leads" in capsys.readouterr().out
    x = data.preprocess(*data.read_record(RECORDS[2], ("V1",)), "zscore")
    inputs = {"one/best.pt": x, "run/probe.pt": np.pad(x, ((6, 5), (0, 0)))}
    features = [evaluate.load_model(path)[1].forward_features(torch.from_numpy(ecg)[None])
                for path, ecg in inputs.items()]
    torch.testing.assert_close(*features, atol=1e-6, rtol=1e-5)
    evaluate.main(["one/best.pt", "--record", RECORDS[2]])
    found = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:4])
    want = predicted("one/best.pt", x[None])[0].tolist()
    assert [float(found[name]) for name in CLASSES] == pytest.approx(want, abs=6e-4)


def test_other_peoples_sets(clinic, capsys):
    """Another folder, its table with the classes in another order, one renamed, and all folds."""
    shutil.copytree("ecg", "georgia/ecg")
    rows = read_csv("clinic.csv")
    write_csv("georgia.csv", [{"record": row["record"], "STACH": row["STACH"], "PVC": row["AFIB"],
                               "odd": row["odd"]} for row in rows])
    evaluate.main("run/best.pt --data georgia --task georgia.csv --fold all --features".split())
    out = capsys.readouterr().out
    assert "left out of georgia.csv: PVC" in out and "left out of run/best.pt: AFIB" in out
    z, order = np.load("run/predictions-georgia-georgia-all.npz"), [1, 0]
    assert z["classes"].tolist() == [CLASSES[i] for i in order]
    assert z["y_true"].tolist() == [[int(row["STACH"]), int(row["odd"])] for row in rows]
    want = [by_hand(record)[order] for record in RECORDS[::6]]
    np.testing.assert_allclose(z["y_prob"][::6], want, atol=2e-3)   # the cache is float16
    checkpoint, model = evaluate.load_model("run/best.pt")
    logits = model.dense(torch.from_numpy(z["features"]))[:, order].detach()
    np.testing.assert_allclose(z["y_prob"], torch.sigmoid(logits), atol=1e-5)
    nine = [row["fold"] == "9" for row in rows]     # what the thresholds in best.pt are from
    want = evaluate.best_thresholds(z["y_true"][nine], z["y_prob"][nine])
    np.testing.assert_allclose(np.take(checkpoint["thresholds"], order), want, atol=1e-6)


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


def test_many_records_make_one_table(clinic, fails, monkeypatch):
    """A folder, a record of 35 s, and one of the CinC Challenges' kind; one that cannot be read."""
    from scipy.io import savemat
    monkeypatch.setattr(evaluate, "FEW", 1)
    signal = np.random.default_rng(0).normal(size=(12, 17500))
    write_record("long", signal, data.LEADS)
    savemat("A1.mat", {"val": (1000 * signal[:, :2570]).astype(np.int16)}, format="4")
    lines = [f"A1.mat 16+24 1000/mV 16 0 0 0 0 {lead}" for lead in data.LEADS]
    Path("A1.hea").write_text("\n".join(["A1 12 257 2570", *lines, "#Dx: 426783006", ""]))
    records = ["ecg", "A1.mat", "A1.hea", RECORDS[1], "long"]    # some of them stand twice
    evaluate.main(["run/best.pt", "--out", "all.csv", "--record", *records])
    rows = {row["record"]: row for row in read_csv("all.csv")}
    assert rows.keys() == {"A1", "long", *RECORDS}
    thresholds = torch.load("run/best.pt", weights_only=True)["thresholds"]
    for record, windows in (("A1", 1), (RECORDS[1], 1), ("long", 3)):
        row, want = rows[record], by_hand(record, windows)
        np.testing.assert_allclose([float(row[name]) for name in CLASSES], want, atol=2e-3)
        above = [c for c, p, t in zip(CLASSES, want, thresholds) if p >= t]
        assert row["above_threshold"] == ";".join(above) and row["windows"] == str(windows)
    open("ecg/00005_hr.dat", "wb").close()
    fails(evaluate.main, ["run/best.pt", "--record", "ecg"], "00005_hr", "1 of 60", "records.csv")
    assert len(read_csv("run/records.csv")) == 59
