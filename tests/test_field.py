"""Records, tables and weights as people have them: read right, refused in one line, or noted."""
import io
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import wfdb
from scipy.io import savemat

import data
import evaluate
import model as network
from helpers import ROOT, read_csv, write_csv

LEADS = data.LEADS


@pytest.fixture(scope="module")
def ecg(demo_set):
    """One ECG in whole microvolts, (12, 5000), as a .dat file holds it."""
    signal, _ = data.read_record(demo_set / "records500/00000/00001_hr")
    return np.round(1000 * signal).astype("<i2")


def write_header(path, *lines):
    Path(f"{path}.hea").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    return path


def write(path, d, names=LEADS, gain="1000(0)/mV", first="{} {} 500 {}", end=""):
    """Samples (leads, n) as a WFDB record, its header by hand."""
    path.parent.mkdir(parents=True, exist_ok=True)
    d.T.astype("<i2").tofile(f"{path}.dat")
    lines = [f"{path.name}.dat 16 {gain} 16 0 0 {int(lead.sum(dtype=int)) % 65536} 0 {name}"
             for lead, name in zip(d, names)]
    return write_header(path, first.format(path.name, len(names), d.shape[1]), *lines, end)


def write_frames(path, d, k):
    """The same with k samples of each lead in a frame, beside a slower signal."""
    n = d.shape[1] // k
    frames = [lead.reshape(n, k) for lead in d] + [np.zeros((n, 1), "<i2")]
    np.concatenate(frames, 1).astype("<i2").tofile(f"{path}.dat")
    lines = [f"{path.name}.dat 16x{k} 1000(0)/mV 16 0 0 0 0 {lead}" for lead in LEADS]
    return write_header(path, f"{path.name} 13 {500 / k:g} {n}", *lines,
                        f"{path.name}.dat 16 1000/NU 16 0 0 0 0 RESP")


def write_segments(path, d, *gains):
    """The same in as many segments as there are gains."""
    parts = np.split(d, len(gains), 1)
    for i, (part, gain) in enumerate(zip(parts, gains)):
        write(path.with_name(f"part{i}"), part, gain=gain)
    lines = [f"part{i} {part.shape[1]}" for i, part in enumerate(parts)]
    return write_header(path, f"{path.name}/{len(gains)} 12 500 {d.shape[1]}", *lines)


def write_layout(path, d):
    """The same in two segments of which the header's first line is a layout."""
    write_segments(path, d, "1000/mV", "1000/mV")
    write_header(path.with_name("layout"), "layout 12 500 0", *(
        f"~ 0 1000/mV 0 0 0 0 0 {lead}" for lead in LEADS))
    return write_header(path, f"{path.name}/3 12 500 5000", "layout 0", "part0 2500", "part1 2500")


VOLTS = "1000000(0)/V"
OTHER_NAMES = ["DI", "D2", "diii", *LEADS[3:9], "C4", "C5", "c6"]
SAID = ["Lead I (Einthoven)", "ECG II", "MDC_ECG_LEAD_III", "lead_aVR", "EKG-aVL", "AVF", "V 1",
        *LEADS[7:]]


@pytest.mark.parametrize("make", [
    lambda path, d: write(path, d),
    lambda path, d: write(path, d, SAID),
    lambda path, d: write(path, d, OTHER_NAMES),
    lambda path, d: write(path, d[::-1], LEADS[::-1]),
    lambda path, d: write(path, d, first="\ufeff{} {} 500 {} 05-Feb-2020 11:39:16"),
    lambda path, d: write(path, d, gain=VOLTS, end="# 1 LSB/µV"),
    *(lambda path, d, unit=unit: write(path, d, gain=f"1(0)/{unit}")
      for unit in ("uV", "µV", "\u03bcV", "\udcb5V", "\udca6\udcccV")),
    lambda path, d: write_frames(path, d, 5),
    lambda path, d: write_frames(path, d, 500),
    lambda path, d: write_segments(path, d, "1000/mV", "1000/mV"),
    lambda path, d: write_segments(path, d, "1/µV", "1/µV"),
    write_layout])
def test_read_as_the_same_ecg(ecg, tmp_path, make):
    signal, fs = data.read_record(make(tmp_path / "r", ecg))
    assert fs == 500
    np.testing.assert_allclose(signal, ecg / 1000, atol=1e-6)


def test_a_micro_sign_in_another_channel(ecg, tmp_path):
    path = write(tmp_path / "r", np.vstack([ecg, ecg[:1]]), [*LEADS, "EEG"], VOLTS)
    *lines, last, _ = Path(f"{path}.hea").read_text().split("\n")
    write_header(path, *lines, last.replace(VOLTS, "10/µV"))
    np.testing.assert_allclose(data.read_record(path)[0], ecg / 1000, atol=1e-6)


def test_a_missing_sample_of_a_frame(ecg, tmp_path):
    gap = ecg.copy()
    gap[:, 2502] = -32768
    signal = data.read_record(write_frames(tmp_path / "r", gap, 5))[0]
    assert np.argwhere(np.isnan(signal)).tolist() == [[lead, 2502] for lead in range(12)]
    there = np.arange(5000) != 2502
    np.testing.assert_allclose(signal[:, there], ecg[:, there] / 1000, atol=1e-6)


def test_limb_leads_follow_from_two(ecg, tmp_path):
    """By Einthoven's law and Goldberger's definitions, in microvolts here."""
    rows = [0, 1, *range(6, 12)]
    path = write(tmp_path / "r", ecg[rows], [LEADS[i] for i in rows])
    i, ii = ecg[:2].astype(float)
    want = [i, ii, ii - i, -(i + ii) / 2, i - ii / 2, ii - i / 2, *ecg[6:]]
    np.testing.assert_allclose(1000 * data.read_record(path)[0], want, atol=1e-3)
    assert next(data.load_windows(path))[1]["derived"] == "III, aVR, aVL, aVF"


@pytest.mark.parametrize("make, words", [
    (lambda path, d: write(path, d, ["ECG", "MLII", *LEADS[2:]]), ["no lead I", "MLII", "rename"]),
    (lambda path, d: write(path, d, [*LEADS[:3], "-aVR", *LEADS[4:6], "Lead -V1", *LEADS[7:]]),
     ["no lead V1 ", "-aVR, ", "Lead -V1"]),
    (lambda path, d: write(path, d, first="{} {} 0 {}"), ["line 1", "0 a second"]),
    (lambda path, d: write_segments(path, np.roll(d, 1, 0), "1/mV", "1/Pa"), ["pa", "one rate"]),
    (lambda path, d: write_header(write_segments(path, d, "1/mV"), "r/1 12 250 5000", "part0 5000"),
     ["part0.hea", "another rate"]),
    (lambda path, d: write(path, d, first="{} {} 500 {} 10:00:00 29/13/2001"), ["line 1", "date"]),
    (lambda path, d: write(path, d, first="{}.mat {} 500 {}"), ["line 1", "name", ".mat"]),
    (lambda path, d: write(path, d, first="{} {} 500 0"), ["line 1", "0 samples"]),
    (lambda path, d: write(path, d, first="{} {} 500 9s"), ["line 1", "number of samples"]),
    (lambda path, d: write(path, d, gain="1.0E3(0)/mV"), ["line 2", "gain", "1.0E3"]),
    (lambda path, d: np.roll(d, 1, 1).tofile(f"{write(path, d)}.dat"), ["lead I", "checksum"])])
def test_refused(ecg, tmp_path, make, words):
    make(tmp_path / "r", ecg)
    with pytest.raises(data.InputError) as error:
        next(data.load_windows(tmp_path / "r"))
    assert all(word in str(error.value) for word in [str(tmp_path / "r"), *words]), error.value


def test_matlab_5_is_named(ecg, tmp_path):
    """Under a header for MATLAB 4, with the right checksums or with unknown ones."""
    savemat(tmp_path / "r.mat", {"val": ecg})
    write(tmp_path / "r", ecg)
    header = (tmp_path / "r.hea").read_text().replace("r.dat 16", "r.mat 16+24")
    for text in (header, re.sub(r" \d+ 0 (?=\w+\n)", " 0 0 ", header)):
        with pytest.raises(data.InputError, match="MATLAB 5 or later.*format='4'"):
            data.read_record(write_header(tmp_path / "r", text))


FLAT = np.full((12, 5000), 123)
GONE = np.full((12, 5000), -32768)


def paper(d):
    """Each lead known for 2.5 s of 10."""
    at = np.arange(5000) // 1250 == np.arange(12)[:, None] // 3
    return np.where(at, d, -32768)


EMPTY = {   # samples -> what --record says, None where it refuses
    "flat": (lambda d: FLAT, None),
    "missing": (lambda d: GONE, None),
    "thin": (lambda d: np.where(np.arange(5000) < 50, d, GONE), None),
    "late": (lambda d: np.hstack([GONE, d]), "1 of 2 windows have no signal"),
    "paper": (paper, "1 of 1 windows lack 75 % of its samples"),
    "loose": (lambda d: np.vstack([d[:10], FLAT[:2]]), "1 of 1 windows lack V5, V6"),
    "two": (lambda d: np.hstack([np.vstack([d[:10], FLAT[:2]]), np.vstack([FLAT[:1], d[1:]])]),
            "1 of 2 windows lack V5, V6; 1 of 2 windows lack I"),
    "four": (lambda d: np.hstack([d * (np.arange(12) != i)[:, None] for i in (0, 1, 2, 6, 6)]),
             "2 of 5 windows lack V1; 1 of 5 windows lack I; 1 of 5 windows lack II"),
    "whole": (lambda d: d, "")}


@pytest.fixture
def folder(ecg, tmp_path, monkeypatch):
    """The records of EMPTY, a table of them, and what a Mac and segments leave beside them."""
    monkeypatch.chdir(tmp_path)
    for name, (change, _) in EMPTY.items():
        write(Path("ecg", name), change(ecg))
    for name in ("._whole", "__MACOSX/._whole", ".ipynb_checkpoints/whole-checkpoint"):
        Path(f"ecg/{name}.hea").parent.mkdir(exist_ok=True)
        Path(f"ecg/{name}.hea").write_bytes(b"\0\5\26\7Mac OS X")
    write_segments(Path("ecg/halves"), ecg, "1000/mV", "1000/mV")
    write_header(Path("ecg/broken"), "broken/2 12 500 5000", "whole", "")
    write_header(Path("ecg/circle"), "circle/1 12 500 5000", "circle 5000", "")
    write(Path("ecg", "\udcb2\udca1", "name"), ecg)
    Path("own.csv").write_text("\n".join(["record,a", *(f"{name},1" for name in EMPTY)]))
    return tmp_path


def test_the_cache_lists_what_it_cannot_use(folder, ecg, capsys):
    path, notes = data.build_cache("ecg", [*EMPTY], workers=1, skip_unreadable=True)
    assert [*notes["unreadable"]] == ["flat", "missing", "thin"]
    assert notes["lacking"] == {"paper": "75 % of its samples", "loose": "V5, V6",
                                "two": "V5, V6", "four": "I"}
    assert "4 of 9 records lack more than a tenth" in capsys.readouterr().out
    x, want = np.load(path), data.preprocess(np.float32(ecg / 1000), 500).astype(np.float16)
    assert not x[:3].any() and x[3].tolist() == x[8].tolist() == want.tolist()
    with pytest.raises(data.InputError, match="flat.*all 3.*--skip-unreadable"):
        data.build_cache("ecg", [*EMPTY], workers=1)


def test_record_keeps_all_predictions(folder, tiny, fails, monkeypatch):
    """Whatever names the terminal cannot print, and whatever cannot be read beside them."""
    checkpoint = {"classes": ["a", "病"], "leads": [*LEADS], "preprocessing": "filter",
                  "state_dict": network.ecgfounder(2).state_dict()}
    torch.save(checkpoint, "x.pt")
    fails(evaluate.main, ["x.pt", "--record", "ecg"], "5 of 13 records", "records.csv")
    rows = {row["record"]: row for row in csv_of("records.csv")}
    assert {Path(name).name: row["notes"] for name, row in rows.items()} == {
        **{name: notes for name, (_, notes) in EMPTY.items() if notes is not None},
        "halves": "", "name": ""}
    same = ("ecg/late", "ecg/whole", "ecg/halves", "ecg/x/name")
    assert len({rows[name]["病"] for name in same}) == 1
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "latin-1"))
    evaluate.main(["x.pt", "--record", "ecg/whole"])
    assert b"\\u75c5" in sys.stdout.buffer.getvalue()


def csv_of(path):
    """Rows of a csv whose names are not all in UTF-8."""
    Path("utf8.csv").write_bytes(Path(path).read_bytes().replace(b"\xb2\xa1", b"x"))
    return read_csv("utf8.csv")


def test_a_long_record_is_read_in_parts(ecg, tmp_path, monkeypatch):
    """No more than eleven seconds at once, and only the wanted leads; the windows are the same."""
    long = np.hstack([np.roll(ecg, 37 * i, 1) for i in range(13)])
    path, parts, read = write(tmp_path / "r", long), [], wfdb.rdrecord

    def reading(name, first, last, channels, **options):
        parts.append((last - first, channels))
        return read(name, first, last, channels, **options)

    monkeypatch.setattr(wfdb, "rdrecord", reading)
    windows = [window for window, _ in data.load_windows(path, "zscore", ("II", "V1"))]
    assert {(5500, (1, 6)), (5000, (1, 6))} == {(n, tuple(channels)) for n, channels in parts}
    assert len(windows) == 13
    for i, window in enumerate(windows):
        part = np.float32(long[[1, 6], 5000 * i:5000 * i + 5000] / 1000)
        want = data.preprocess(part, 500, "zscore")
        np.testing.assert_array_equal(window, want.astype(np.float16))


def test_a_header_need_not_say_how_long_its_record_is(ecg, tmp_path):
    write(tmp_path / "r", np.hstack([ecg] * 7), first="{} {} 500")
    assert [note["windows"] for _, note in data.load_windows(tmp_path / "r", "raw")] == [7] * 7


def test_segments_of_any_kind(ecg, tmp_path):
    """Of fewer leads, in another order, in another unit, and a gap: NaN where nothing is known."""
    first, last = ecg[:, :2000], ecg[2:8, 2500:][::-1]
    write(tmp_path / "part0", first)
    write(tmp_path / "part1", last, LEADS[2:8][::-1], gain="1/µV")
    path = write_header(tmp_path / "r", "r/3 12 500 5000", "part0 2000", "~ 500", "part1 2500")
    want = np.where(np.arange(5000) < 2000, ecg / 1000, np.nan)
    want[2:8, 2500:] = ecg[2:8, 2500:] / 1000
    np.testing.assert_allclose(data.read_record(path)[0], want, atol=1e-6)
    part, _ = data.read_record(path, ("V1", "III"), 3, 5)
    np.testing.assert_allclose(part, want[[6, 2], 1500:4000], atol=1e-6)
    assert next(data.load_windows(path, "raw"))[1]["lacking"] == "35 % of its samples"


def test_tables_of_excel(tmp_path):
    lines = ["record,patient_id,a", *(f"r{i},p{i // 2},{i % 2}" for i in range(40))]
    for text in ("\n".join(lines), ",,\n".join([*lines, ",,", ""]), "\n".join(["sep=,", *lines]),
                 "\n".join(["sep=;", *lines]).replace(",", ";"),
                 "\n".join(lines).replace(",", "\t")):
        (tmp_path / "own.csv").write_text(text)
        labels = data.load_labels(tmp_path, tmp_path / "own.csv")
        assert labels.classes == ["a"] and labels.y[:, 0].tolist() == [0, 1] * 20
        assert len({*labels.patient_id}) == 20


@pytest.mark.parametrize("patient", ["unknown", "[Unknown]", "0", "0.0", "-", "#N/A", "n.a."])
def test_unknown_patients_are_each_their_own(tmp_path, patient):
    rows = [f"r{i},{('p', patient)[i % 2]},1" for i in range(40)]
    (tmp_path / "own.csv").write_text("\n".join(["record,patient_id,a", *rows]))
    labels = data.load_labels(tmp_path, tmp_path / "own.csv")
    assert len({*labels.patient_id.tolist()}) == 21 and len({*labels.fold[1::2].tolist()}) > 5


def test_weights_of_other_programs(tiny, tmp_path):
    state = network.ecgfounder(1).state_dict()
    named, wrapped = ({prefix + key: value for key, value in state.items()}
                      for prefix in ("module.", "_orig_mod.model."))
    notebook = {"state_dict": state, "mae": np.float32(4.2), "step": np.int64(3)}
    average = {"n_averaged": torch.tensor(3), **named}
    for saved in (notebook, named, {"model_state_dict": wrapped}, {"ema": average, "epoch": 1}):
        torch.save(saved, tmp_path / "x.pth")
        model = network.ecgfounder(1)
        network.load_pretrained(model, tmp_path / "x.pth")
        assert torch.equal(model.first_conv.conv.weight, state["first_conv.conv.weight"])


def test_the_readmes_answers(folder, ecg, demo_set):
    """Its snippets: records from arrays, a table from codes, a number from features."""
    readme = (ROOT / "README.md").read_text().split("## Your own ECGs")[1].split("## Copying")[0]
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    padded = np.pad(ecg.T[:4000] / 1000, ((50, 46), (0, 0)))
    np.save("ecg.npy", padded)
    for name in ("clinic", "georgia", "runs/all71-frac1-post-seed0"):
        Path(name).mkdir(parents=True)
    for name, codes in {"A1": "426783006", "A2": "59118001,164889003"}.items():
        Path(f"georgia/{name}.hea").write_text(f"{name} 12 500 5000\n# Dx: {codes}\n")
    Path("georgia/A3.hea").write_text("A3 12 500 5000\n# Age: 74\n")     # it has no codes
    shutil.copytree(demo_set, "ptbxl", ignore=shutil.ignore_patterns("records*", "cache"))
    rows = [{**row, "age": 20 + i} for i, row in enumerate(read_csv("ptbxl/ptbxl_database.csv"))]
    write_csv("ptbxl/ptbxl_database.csv", rows)
    np.savez("runs/all71-frac1-post-seed0/predictions-all.npz",
             ecg_id=[int(row["ecg_id"]) for row in rows[::-1]],
             features=[[1000 * row["age"], -row["age"]] for row in rows[::-1]])
    exec(code, found := {})
    signal, fs = data.read_record("clinic/0001")
    assert fs == 400
    np.testing.assert_allclose(signal, ecg[:, :4000] / 1000, atol=1e-3)
    assert Path("georgia.csv").read_text() == "record,SR,AFIB\nA1.hea,1,0\nA2.hea,0,1\n"
    assert data.load_labels("georgia", "georgia.csv").record.tolist() == ["A1", "A2"]
    test = [row["age"] for row in rows[::-1] if int(row["strat_fold"]) > 8]
    np.testing.assert_allclose(found["age"], test, atol=0.1)
