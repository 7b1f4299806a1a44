"""Labels, records, preprocessing, the cache and the download, on made-up and (where there are) real records."""
import ast
import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import scipy.signal
import wfdb
from hypothesis import given, settings, strategies as st

import data
from conftest import ROOT
from make_demo import NAMES, make_demo


# ----------------------------------------------------------------------------------------------------------------- labels

REAL_COUNTS = {"all71": (71, 2322, 330, 179), "diagnostic44": (44, 2279, 320, 176), "subclass23": (23, 2279, 320, 176),
               "superclass5": (5, 2279, 320, 176), "form19": (19, 904, 126, 67), "rhythm12": (12, 2230, 316, 169)}


@pytest.mark.real
@pytest.mark.parametrize("task", data.TASKS)
def test_real_counts(real, task):
    labels = data.load_labels(real, task)
    counts = [int(np.isin(labels.fold, folds).sum()) for folds in (range(1, 9), [9], [10])]
    assert (len(labels.classes), *counts) == REAL_COUNTS[task]
    folds_of = {}
    for patient, fold in zip(labels.patient_id, labels.fold):
        folds_of.setdefault(patient, set()).add(fold)
    assert all(len(folds) == 1 for folds in folds_of.values())


@pytest.mark.parametrize("task", data.TASKS)
def test_labels_equal_those_derived_with_pandas(demo_set, task):
    """The protocol once more, by another library and another way round."""
    pd = pytest.importorskip("pandas")
    statements = pd.read_csv(demo_set / "scp_statements.csv", index_col=0)
    table = pd.read_csv(demo_set / "ptbxl_database.csv", index_col="ecg_id")
    kind = {"all71": None, "form19": "form", "rhythm12": "rhythm"}.get(task, "diagnostic")
    chosen = statements if kind is None else statements[statements[kind] == 1]
    name = {"subclass23": chosen.diagnostic_subclass, "superclass5": chosen.diagnostic_class}.get(task, chosen.index.to_series()).to_dict()
    sets = table.scp_codes.map(lambda s: {name[c] for c in ast.literal_eval(s) if c in name})
    sets = sets[sets.map(len) > 0]
    labels = data.load_labels(demo_set, task)
    assert labels.classes == sorted(set(name.values())) and len(labels.classes) == int("".join(filter(str.isdigit, task)))
    assert labels.ecg_id.tolist() == sets.index.tolist()
    assert [{c for c, v in zip(labels.classes, row) if v} for row in labels.y] == sets.tolist()
    assert labels.fold.tolist() == table.strat_fold[sets.index].tolist()
    assert labels.patient_id.tolist() == table.patient_id[sets.index].astype(int).tolist()


def edit_csv(path, change):
    with open(path, newline="") as f:
        rows = list(csv.DictReader(f))
    change(rows)
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_an_empty_patient_id_is_a_patient_of_its_own(demo):
    edit_csv(demo / "ptbxl_database.csv", lambda rows: [row.update(patient_id="") for row in rows[:3]])
    labels = data.load_labels(demo, "all71")
    assert labels.patient_id[:3].tolist() == [-1, -2, -3] and (labels.patient_id[3:] > 0).all()


def test_windows_line_ends_and_a_byte_order_mark_work(demo):
    before = data.load_labels(demo, "all71")
    for name in data.TABLES:
        text = (demo / name).read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
        (demo / name).write_bytes(b"\xef\xbb\xbf" + text)
    after = data.load_labels(demo, "all71")
    assert after.classes == before.classes and np.array_equal(after.y, before.y)


@given(n=st.integers(1, 500), a=st.floats(0.001, 1), b=st.floats(0.001, 1), seed=st.integers(0, 99))
def test_subset_is_nested_and_of_the_right_size(n, a, b, seed):
    index = np.arange(n) * 3 + 1
    small, large = (data.subset(index, frac, seed) for frac in sorted((a, b)))
    assert set(small) <= set(large) <= set(index)
    assert len(small) == max(1, int(min(a, b) * n + 0.5)) and list(small) == sorted(small)
    assert np.array_equal(data.subset(index[::-1], a, seed), data.subset(index, a, seed))
    assert np.array_equal(data.subset(index, 1, seed), index)


@pytest.mark.parametrize("frac", [0, -1, 1.01, float("nan")])
def test_bad_fractions(frac):
    with pytest.raises(data.InputError, match="wanted 0 < fraction <= 1"):
        data.subset([1, 2], frac, 0)


# ---------------------------------------------------------------------------------------------------------------- records

def write_record(folder, signal, fs=500, units="mV", names=NAMES, gain=1000):
    n = len(names)
    wfdb.wrsamp("r", fs=fs, units=[units] * n, sig_name=list(names), p_signal=np.asarray(signal, float).T, fmt=["16"] * n,
                adc_gain=[gain] * n, baseline=[0] * n, write_dir=str(folder))
    return folder / "r"


SIGNAL = np.round(np.random.default_rng(0).normal(0, 0.4, (12, 5000)), 3)


def test_reading(tmp_path):
    signal, fs = data.read_record(write_record(tmp_path, SIGNAL))
    assert fs == 500 and signal.dtype == np.float32 and signal.shape == (12, 5000)
    np.testing.assert_allclose(signal, SIGNAL, atol=1e-6)


def test_leads_are_found_by_name(tmp_path):
    order = np.random.default_rng(1).permutation(12)
    names = [NAMES[i].lower() if i % 2 else NAMES[i] for i in order] + ["vx", "vy", "vz"]
    signal, _ = data.read_record(write_record(tmp_path, np.vstack([SIGNAL[order], SIGNAL[:3] + 0.1]), names=names))
    np.testing.assert_allclose(signal, SIGNAL, atol=1e-6)


@pytest.mark.parametrize("units, factor, gain", [("uV", 1e3, 1), ("V", 1e-3, 1e6), ("MV", 1, 1000), ("nV", 1e6, 1e-3)])
def test_units_of_voltage(tmp_path, units, factor, gain):
    signal, _ = data.read_record(write_record(tmp_path, SIGNAL * factor, units=units, gain=gain))
    np.testing.assert_allclose(signal, SIGNAL, atol=2e-6)


def test_what_is_no_ecg_is_named(tmp_path):
    with pytest.raises(data.InputError, match="has no lead V6"):
        data.read_record(write_record(tmp_path, SIGNAL[:11], names=NAMES[:11]))
    with pytest.raises(data.InputError, match="lead I is in 'mmHg'"):
        data.read_record(write_record(tmp_path, SIGNAL, units="mmHg"))
    with pytest.raises(data.InputError, match="cannot be read as a WFDB record"):
        data.read_record(tmp_path / "absent")


# --------------------------------------------------------------------------------------------------------- preprocessing

@pytest.mark.real
def test_filter_equals_the_published_preprocessing(real, golden):
    want = golden["preprocess"]
    for ecg_id, signal in zip(want["ecg_id"], want["signal"]):
        got = data.preprocess(*data.read_record(real / f"records500/{ecg_id // 1000 * 1000:05d}/{ecg_id:05d}_hr"))
        assert got.dtype == np.float32 and got.shape == (12, 5000)
        np.testing.assert_allclose(got[:, ::want["every"]], signal, atol=1e-4)


def test_filter_step_by_step():
    """The three filters written with SciPy's transfer functions and slow running median."""
    x = scipy.signal.filtfilt(*scipy.signal.iirnotch(50, 30, 500), SIGNAL)
    x = scipy.signal.filtfilt(*scipy.signal.butter(4, [0.67, 40], "bandpass", fs=500), x)
    x = x - np.stack([scipy.signal.medfilt(lead, 201) for lead in x])
    x = (x - x.mean()) / (x.std() + 1e-8)
    np.testing.assert_allclose(data.preprocess(SIGNAL, 500), x, atol=1e-4)


def test_zscore_and_raw():
    z = data.preprocess(SIGNAL, 500, "zscore")
    np.testing.assert_allclose(z, (SIGNAL - SIGNAL.mean()) / SIGNAL.std(), atol=1e-5)
    np.testing.assert_allclose(data.preprocess(SIGNAL, 500, "raw"), SIGNAL, atol=1e-6)


@pytest.mark.parametrize("fs", [100, 250, 257, 360, 1000])
def test_other_rates_are_resampled(fs):
    tone = lambda rate: np.tile(np.sin(2 * np.pi * 7 * np.arange(int(12 * rate)) / rate), (12, 1))
    got = data.preprocess(tone(fs), fs, "raw")
    np.testing.assert_allclose(got[:, 200:-200], tone(500)[:, 200:4800], atol=0.01)


@pytest.mark.parametrize("fs", [100, 250, 257, 360, 1000])
@pytest.mark.parametrize("shape", [np.ones_like, lambda t: 1 + t / 10])
def test_offsets_and_drifts_keep_their_ends(fs, shape):
    got = data.preprocess(np.tile(2 * shape(np.arange(10 * fs) / fs), (12, 1)), fs, "raw")
    want = np.tile(2 * shape(np.arange(5000) / 500), (12, 1))
    np.testing.assert_allclose(got[:, :-10], want[:, :-10], rtol=2e-3)
    np.testing.assert_allclose(got[:, -10:], want[:, -10:], rtol=5e-3)


@pytest.fixture(scope="module")
def real_signals(real):
    paths = sorted(real.glob("records500/*/*.hea"))[::70][:40]
    return [data.read_record(path.with_suffix(""))[0].astype(float) for path in paths]


@pytest.mark.real
@pytest.mark.parametrize("fs", [100, 250, 257, 360, 1000])
@pytest.mark.parametrize("offset", [0, 1])
def test_records_of_other_rates_are_the_same_ecg(real_signals, fs, offset):
    assert len(real_signals) == 40
    for signal in real_signals:
        other = scipy.signal.resample_poly(signal, fs, 500, axis=1, padtype="line")
        got, want = data.preprocess(other + offset, fs), data.preprocess(signal, 500)
        assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.999
        assert np.abs(got - want)[:, -250:].max() < 0.3


@pytest.mark.real
def test_a_gap_changes_nothing_else(real_signals):
    """20 ms without samples where the lead is quiet, on a lead far from zero."""
    for signal in real_signals:
        signal = signal + 1
        steps = np.abs(np.diff(signal[4, 500:4500]))
        start = 500 + int(np.convolve(steps, np.ones(30), "valid").argmin()) + 10
        holes = signal.copy()
        holes[4, start:start + 10] = np.nan
        change = np.abs(data.preprocess(holes, 500) - data.preprocess(signal, 500))
        change[4, start:start + 10] = 0
        assert change.max() < 0.02


@pytest.mark.parametrize("fs, up, down", [(50, 10, 1), (257, 500, 257), (500, 1, 1), (1000, 1, 2), (5000, 1, 10)])
def test_only_the_first_ten_seconds_count(fs, up, down):
    """Of half a minute: what the whole of it, resampled, begins with; whatever comes later."""
    x = np.random.default_rng(0).standard_normal((12, 30 * fs)).cumsum(1) / 10
    want = scipy.signal.resample_poly(x, up, down, axis=1, padtype="line")[:, :5000]
    x[4, 20 * fs] = 1e6
    np.testing.assert_allclose(data.preprocess(x, fs, "raw"), want, rtol=1e-2, atol=1e-2)


def test_long_is_cut_and_short_is_padded_after_the_filter():
    long = np.concatenate([SIGNAL, SIGNAL[:, ::-1]], 1)
    assert np.array_equal(data.preprocess(long, 500), data.preprocess(SIGNAL, 500))
    for how in data.PREPROCESSING:
        short = data.preprocess(SIGNAL[:, :3000], 500, how)
        assert (short[:, 3000:] == 0).all() and short[:, :3000].std() > 0.3
        if how != "raw":
            assert abs(short[:, :3000].mean()) < 1e-5 and abs(short[:, :3000].std() - 1) < 1e-4


def test_missing_samples_are_interpolated_and_flat_records_zeros():
    nan = np.nan
    leads = np.tile([[1.0, nan, nan, 4.0], [nan, 2.0, 2.5, nan], [nan] * 4, [0, 1, 2, 3]], (3, 1))
    want = np.tile([[1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 2.5, 2.5], [0.0] * 4, [0, 1, 2, 3]], (3, 1))
    assert np.array_equal(data.preprocess(leads, 500, "raw")[:, :4], want)
    one = np.full((12, 10000), 1.5)
    one[:, 3000] = nan
    assert np.array_equal(data.preprocess(one, 1000, "raw"), np.full((12, 5000), 1.5, np.float32))
    assert np.isfinite(data.preprocess(np.ones((12, 1)), 250, "raw")).all()
    holes = SIGNAL.copy()
    holes[3, 100:200] = nan
    assert np.isfinite(data.preprocess(holes, 500)).all()
    for flat in (np.zeros((12, 5000)), np.full((12, 5000), 1.5), np.full((12, 5000), nan)):
        assert (data.preprocess(flat, 500) == 0).all() and (data.preprocess(flat, 500, "zscore") == 0).all()


@pytest.mark.parametrize("signal, fs, words", [
    (SIGNAL[:, :50], 500, "is 0.1 s long"), (SIGNAL, 0, "positive rate"), (SIGNAL, np.nan, "positive rate"), (SIGNAL[:11], 500, r"\(11, 5000\)"),
    (SIGNAL[:, :0], 500, "wanted"), (np.where(SIGNAL > 1, np.inf, SIGNAL), 500, "infinite"), (SIGNAL * 1e6, 500, "beyond"),
])
def test_what_is_too_short_or_no_signal(signal, fs, words):
    with pytest.raises(data.InputError, match=words):
        data.preprocess(signal, fs)


@given(scale=st.floats(0.05, 50), shift=st.floats(-5, 5), how=st.sampled_from(("filter", "zscore")))
@settings(max_examples=15)
def test_scale_and_shift_change_nothing(scale, shift, how):
    np.testing.assert_allclose(data.preprocess(SIGNAL * scale + shift, 500, how), data.preprocess(SIGNAL, 500, how), atol=2e-4)


# ------------------------------------------------------------------------------------------------------------------ cache

def files(root):
    return sorted(p.name for p in (root / "cache").iterdir() if p.name != ".lock")


def content(root, how="filter"):
    return {p.name: p.read_bytes() for p in (root / "cache").iterdir() if p.name.startswith(how)}


@pytest.fixture
def uncached(demo):
    for path in (demo / "cache").iterdir():
        path.unlink()
    return demo


def test_cache_holds_every_record(demo_set):
    cache = data.load_cache(demo_set)
    assert files(demo_set) == ["filter.json", "filter.npy"]
    assert cache.signals.shape == (60, 12, 5000) and cache.signals.dtype == np.float16 and not cache.signals.flags.writeable
    array = np.load(demo_set / "cache" / "filter.npy", mmap_mode="r")
    for ecg_id in (1, 17, 60):
        want = data.preprocess(*data.read_record(demo_set / f"records500/00000/{ecg_id:05d}_hr"))
        assert np.array_equal(array[cache.row[ecg_id]], want.astype(np.float16))
    about = json.loads((demo_set / "cache" / "filter.json").read_text())
    assert about["ecg_ids"] == list(range(1, 61)) and about["preprocessing"] == "filter" and about["leads"] == list(data.LEADS)
    assert set(about["versions"]) == {"numpy", "scipy", "wfdb"} and about["source"][0] == "records500/00000/00001_hr"


@pytest.mark.parametrize("how", data.PREPROCESSING)
def test_workers_give_the_same_bytes(uncached, how):
    data.build_cache(uncached, how, workers=1)
    one = content(uncached, how)
    for path in (uncached / "cache").iterdir():
        path.unlink()
    data.main(["--data", str(uncached), "--preprocess", how, "--workers", "2"])
    assert content(uncached, how) == one


def test_up_to_date_it_returns_at_once(demo, monkeypatch, capsys):
    monkeypatch.setattr(data, "prepare", lambda *a: pytest.fail("a record was read"))
    before = {p.name: p.stat().st_mtime_ns for p in (demo / "cache").iterdir()}
    data.main(["--data", str(demo)])
    assert {p.name: p.stat().st_mtime_ns for p in (demo / "cache").iterdir()} == before
    assert "60 records" in capsys.readouterr().out


@pytest.mark.parametrize("change", [lambda d: d.update(layout=0), lambda d: d.update(ecg_ids=d["ecg_ids"][::-1]), lambda d: d.pop("leads")])
def test_an_older_layout_is_built_again(demo, change):
    good, path = content(demo), demo / "cache" / "filter.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))
    with pytest.raises(data.InputError, match="missing or out of date; `python data.py"):
        data.load_cache(demo)
    data.build_cache(demo, workers=1)
    assert content(demo) == good


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_started_again(uncached, demo_set, workers):
    command = [sys.executable, str(ROOT / "data.py"), "--data", str(uncached), "--workers", str(workers)]
    survived = 0
    for delay in (0.05, 0.2, 0.1):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        log = uncached / "cache" / "filter.part.log"
        deadline = time.time() + 60
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 1) and time.time() < deadline:
            time.sleep(0.005)
        time.sleep(delay)
        survived += process.poll() is None
        process.kill()
        process.wait()
        assert (uncached / "cache" / "filter.npy").exists() <= (not (uncached / "cache" / "filter.part.npy").exists())
    assert survived  # at least one was killed at work
    subprocess.run(command, check=True, capture_output=True)
    assert content(uncached) == content(demo_set)


def test_it_goes_on_from_what_is_done(uncached, monkeypatch):
    read, prepare = [], data.prepare

    def stop_at_40(path, how):
        read.append(path)
        if len(read) == 40:
            raise KeyboardInterrupt
        return prepare(path, how)

    monkeypatch.setattr(data, "prepare", stop_at_40)
    with pytest.raises(SystemExit) as stop:
        data.main(["--data", str(uncached), "--workers", "1"])
    assert stop.value.code == 130 and files(uncached) == ["filter.part.log", "filter.part.npy"]
    before, read[:] = len(read), [None] * 40
    data.build_cache(uncached, workers=1)
    assert before == 40 and len(read) - 40 == 60 - data.CHUNK  # the first chunk was logged as done


def test_two_at_once_end_with_one_right_cache(uncached, demo_set):
    command = [sys.executable, str(ROOT / "data.py"), "--data", str(uncached), "--workers", "1"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    assert [p.wait(120) for p in both] == [0, 0] and all(b"60 records" in p.stdout.read() for p in both)
    assert content(uncached) == content(demo_set) and files(uncached) == ["filter.json", "filter.npy"]


def test_a_torn_log_line_does_not_count(uncached, demo_set, monkeypatch):
    """As a full disk or a power failure may leave it, twice in a row: no row is taken for done that is not."""
    class Stop(Exception):
        pass

    def stop(*a):
        raise Stop

    data.build_cache(uncached, workers=1)
    array, log = uncached / "cache" / "filter.npy", uncached / "cache" / "filter.part.log"
    about = uncached / "cache" / "filter.json"
    description = {k: v for k, v in json.loads(about.read_text()).items() if k not in ("unreadable", "versions")}
    about.unlink()
    array.rename(uncached / "cache" / "filter.part.npy")
    with open(uncached / "cache" / "filter.part.npy", "r+b") as f:  # rows 3 to 59 are not done
        f.seek(-57 * 120000, 2)
        f.write(bytes(57 * 120000))
    log.write_text(json.dumps(description) + "\n0\n1\n2\n3")
    with monkeypatch.context() as m, pytest.raises(Stop):
        m.setattr(data, "run_jobs", stop)
        data.build_cache(uncached, workers=1)
    assert log.read_text().splitlines()[1:] == ["0", "1", "2"]  # what is logged next begins a line of its own
    data.build_cache(uncached, workers=1)
    assert content(uncached) == content(demo_set)
    for text in ("", "\n", "[]\n1\n"):
        about.unlink(missing_ok=True)
        log.write_text(text)
        data.build_cache(uncached, workers=1)
        assert content(uncached) == content(demo_set)


def test_headers_without_names(tmp_path):
    write_record(tmp_path, SIGNAL)
    text = (tmp_path / "r.hea").read_text().splitlines()
    (tmp_path / "r.hea").write_text("\n".join([text[0]] + [line.rsplit(" ", 1)[0] for line in text[1:13]]) + "\n")
    with pytest.raises(data.InputError, match="r: .*(has no lead I|cannot be read)"):
        data.read_record(tmp_path / "r")


def test_a_killed_worker_ends_the_build(uncached, monkeypatch):
    monkeypatch.setattr(data, "prepare", lambda path, how: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(data.InputError, match="a worker was killed"):
        data.build_cache(uncached, workers=2)


def test_its_blocks_are_reserved_first(uncached, monkeypatch, fails):
    sizes = []
    monkeypatch.setattr(data.os, "posix_fallocate", lambda fd, start, size: sizes.append((start, size)))
    data.build_cache(uncached, workers=1)
    assert sizes == [(0, (uncached / "cache" / "filter.npy").stat().st_size)]

    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(data.os, "posix_fallocate", full)
    monkeypatch.setattr(data, "prepare", lambda *a: pytest.fail("work was wasted"))
    fails(data.main, ["--data", uncached, "--preprocess", "raw"], "No space left", "GB")
    assert files(uncached) == ["filter.json", "filter.npy"]


def test_unreadable_records(demo, fails, capsys):
    good = content(demo)
    for path in (demo / "cache").iterdir():
        path.unlink()
    folder = demo / "records500" / "00000"
    moved = {name: (folder / name).read_bytes() for name in ("00003_hr.dat", "00005_hr.dat", "00007_hr.hea", "00009_hr.hea")}
    (folder / "00003_hr.dat").unlink()
    (folder / "00005_hr.dat").write_bytes(moved["00005_hr.dat"][:1001])
    (folder / "00007_hr.hea").write_text("no header\n")
    (folder / "00009_hr.hea").write_bytes(b"")
    listing = demo / "cache" / "filter.unreadable.csv"
    for workers in (1, 2):  # the second time only those four are tried again
        fails(data.main, ["--data", demo, "--workers", workers], "4 records cannot be read", "00003_hr", listing, "--skip-unreadable")
        assert [row["ecg_id"] for row in csv.DictReader(listing.open())] == ["3", "5", "7", "9"]
        assert not (demo / "cache" / "filter.npy").exists()
    data.main(["--data", str(demo), "--skip-unreadable"])
    assert "56 records" in capsys.readouterr().out
    cache = data.load_cache(demo)
    assert set(range(1, 61)) - set(cache.row) == {3, 5, 7, 9}
    labels, rows = data.align(data.load_labels(demo, "all71"), cache)
    assert len(labels.y) == len(rows) == 56 and 3 not in labels.ecg_id and rows[labels.ecg_id == 4] == 3
    data.build_cache(demo, skip_unreadable=True)  # nothing to do
    before = content(demo)
    fails(data.main, ["--data", demo], "4 records cannot be read")
    assert content(demo) == before  # what others use by now is left alone
    for name, old in moved.items():  # fetched again
        (folder / name).write_bytes(old)
    data.main(["--data", str(demo)])
    assert content(demo) == good and files(demo) == ["filter.json", "filter.npy"]


def test_a_read_only_cache_is_usable(demo, tmp_path):
    paths = [tmp_path, demo, *demo.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    parents = [p for p in tmp_path.parents if str(p).startswith("/tmp/") and p.stat().st_uid == os.getuid()]
    modes = {p: p.stat().st_mode for p in parents}
    root = os.geteuid() == 0
    try:
        if root:  # the superuser may write anywhere: be somebody else for a while
            for p in parents:
                p.chmod(0o755)
            os.seteuid(65534)
        with pytest.raises(PermissionError):
            (demo / "cache" / "x").write_text("")
        data.build_cache(demo)
        assert len(data.load_cache(demo).row) == 60
    finally:
        if root:
            os.seteuid(0)
        for p, mode in modes.items():
            p.chmod(mode)
        for path in paths:
            path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.mark.real
def test_real_cache(real):
    data.build_cache(real)
    cache = data.load_cache(real)
    assert cache.signals.shape == (2831, 12, 5000) and len(cache.row) == 2831
    sample = np.asarray(cache.signals[::97], np.float32)
    assert np.isfinite(sample).all() and np.allclose(sample.std((1, 2)), 1, atol=1e-2)


def test_batches_come_in_order_from_memory_and_from_disk(demo_set):
    import torch
    signals = data.load_cache(demo_set).signals
    rows = [np.array([5, 3]), np.array([0]), np.array([59, 59, 1])]
    for source in (signals, torch.from_numpy(np.array(signals))):
        got = list(data.batches(source, iter(rows)))
        assert [b.dtype for b in got] == [torch.float32] * 3
        assert all(np.array_equal(b, signals[r].astype(np.float32)) for b, r in zip(got, rows))
    assert list(data.batches(signals, iter([]))) == []


# --------------------------------------------------------------------------------------------------------------- download

@pytest.fixture
def mirror(tmp_path):
    """A small PTB-XL zip behind a local HTTP server -> (url, folder served, requests seen)."""
    served, seen = tmp_path / "served", []
    make_demo(served / "set", records=3)
    members = [p for p in sorted((served / "set").rglob("*")) if p.is_file()]
    pack(served, members)

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(served))

        def do_GET(self):
            seen.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/ptb-xl.zip", served, seen
    server.shutdown()


def pack(served, members, prefix="ptb-xl-1.0.3/", extra=()):
    names = {p.relative_to(served / "set").as_posix(): p.read_bytes() for p in members}
    names |= {"records100/00000/00001_lr.dat": b"low rate", "README.md": b"text"}
    sums = "".join(f"{sha256(c).hexdigest()} {n}\n" for n, c in names.items())
    with zipfile.ZipFile(served / "ptb-xl.zip", "w") as z:
        for name, c in (*names.items(), ("SHA256SUMS.txt", sums.encode()), *extra):
            z.writestr(prefix + name, c)


def test_download(mirror, tmp_path, capsys):
    url, served, seen = mirror
    root = tmp_path / "got"
    data.main(["--download", "--url", url, "--data", str(root)])
    assert "3 records" in capsys.readouterr().out
    have = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() and "cache" not in p.parts}
    assert have == {"SHA256SUMS.txt", "ptbxl_database.csv", "scp_statements.csv"} | {
        f"records500/00000/0000{i}_hr.{end}" for i in (1, 2, 3) for end in ("dat", "hea")}
    for name in have - {"SHA256SUMS.txt"}:
        assert (root / name).read_bytes() == (served / "set" / name).read_bytes()
    data.download(root, url)  # all there and right: nothing is fetched
    assert seen == ["/ptb-xl.zip"]
    stamps = {name: (root / name).stat().st_mtime_ns for name in have}
    (root / "records500/00000/00002_hr.dat").write_bytes(b"damaged")
    data.download(root, url)
    changed = {name for name in have if (root / name).stat().st_mtime_ns != stamps[name]}
    assert len(seen) == 2 and changed == {"records500/00000/00002_hr.dat", "SHA256SUMS.txt"}


def test_a_damaged_zip_starts_over(mirror, tmp_path, fails):
    url, served, seen = mirror
    whole = (served / "ptb-xl.zip").read_bytes()
    (served / "ptb-xl.zip").write_bytes(whole[:len(whole) // 2])
    root = tmp_path / "got"
    fails(data.main, ["--download", "--url", url, "--data", root], "came damaged", "run the same command again")
    assert not list(root.iterdir())
    (served / "ptb-xl.zip").write_bytes(whole)
    data.main(["--download", "--url", url, "--data", str(root)])


def test_a_wrong_hash_or_lacking_file_is_named(mirror, tmp_path, fails):
    url, served, _ = mirror
    members = [p for p in sorted((served / "set").rglob("*")) if p.is_file()]
    pack(served, members)
    with zipfile.ZipFile(served / "ptb-xl.zip") as z:
        entries = {n: z.read(n) for n in z.namelist()}
    name = "ptb-xl-1.0.3/records500/00000/00002_hr.dat"
    for content, words in ((b"other", "does not have the hash"), (None, "lacks records500/00000/00002_hr.dat")):
        with zipfile.ZipFile(served / "ptb-xl.zip", "w") as z:
            for n, c in entries.items():
                c = content if n == name else c
                if c is not None:
                    z.writestr(n, c)
        root = tmp_path / words.split()[0]
        fails(data.main, ["--download", "--url", url, "--data", root], words)
        assert not (root / "records500/00000/00002_hr.dat").exists()


def test_a_zip_cannot_write_outside(mirror, tmp_path):
    url, served, _ = mirror
    evil = b"evil"
    with zipfile.ZipFile(served / "ptb-xl.zip", "a") as z:
        z.writestr("ptb-xl-1.0.3/../../escaped.txt", evil)
        sums = z.read("ptb-xl-1.0.3/SHA256SUMS.txt").decode() + f"{sha256(evil).hexdigest()} ../../escaped.txt\n"
        with pytest.warns(UserWarning):
            z.writestr("ptb-xl-1.0.3/SHA256SUMS.txt", sums)
    data.download(tmp_path / "a" / "b", url)
    assert not list(tmp_path.rglob("escaped.txt"))


@pytest.mark.parametrize("damage", ["truncated", "empty", "of another shape", "no array", "description cut", "description not UTF-8", "description without a key"])
def test_a_damaged_cache_is_built_again(demo, demo_set, damage):
    array, about = demo / "cache" / "filter.npy", demo / "cache" / "filter.json"
    whole, text = array.read_bytes(), about.read_bytes()
    description = json.loads(text)
    if damage == "of another shape":
        np.save(array, np.zeros((3, 12, 5000), np.float16))
    elif damage.startswith("description"):
        del description["unreadable"]
        about.write_bytes({"cut": text[:99], "not UTF-8": b"\xff" + text, "without a key": json.dumps(description).encode()}[damage[12:]])
    else:
        array.write_bytes({"truncated": whole[:len(whole) // 2], "empty": b"", "no array": b"junk" * 99}[damage])
    with pytest.raises(data.InputError, match="missing or out of date; `python data.py"):
        data.load_cache(demo)
    data.build_cache(demo, workers=1)
    assert content(demo) == content(demo_set)


@pytest.mark.parametrize("damage", ["zeros in the log", "log not UTF-8", "part truncated", "part empty", "a row too many"])
def test_a_damaged_half_cache_is_gone_on_with(demo, demo_set, monkeypatch, damage):
    """As a power failure may leave it, 32 rows done."""
    cache, source = demo / "cache", data.source_of(demo, "filter")[0]
    (cache / "filter.json").unlink()
    part, log = (cache / "filter.npy").rename(cache / "filter.part.npy"), cache / "filter.part.log"
    rows = "".join(f"{i}\n" for i in range(32))
    log.write_bytes(json.dumps(source).encode() + b"\n" + rows.encode() + {"zeros in the log": b"\0\0\0\n", "log not UTF-8": b"\xff\xfe\n", "a row too many": b"99\n"}.get(damage, b""))
    with open(part, "r+b") as f:  # what is not logged is not there
        f.seek(-28 * 120000, 2)
        f.write(bytes(28 * 120000))
        f.truncate({"part truncated": 10**6, "part empty": 0}.get(damage, part.stat().st_size))
    data.build_cache(demo, workers=1)
    assert content(demo) == content(demo_set) and files(demo) == ["filter.json", "filter.npy"]
