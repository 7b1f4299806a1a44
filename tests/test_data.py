"""Labels, records, preprocessing, the cache and the download."""
import ast
import errno
import json
import multiprocessing
import os
import re
import shutil
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import scipy.signal
from hypothesis import given, strategies as st

import data
from helpers import content, states_kept, temporaries, write_record
from make_demo import NAMES, make_demo

SIGNAL = np.round(np.random.default_rng(0).normal(0, 0.4, (12, 5000)), 3)


@pytest.mark.parametrize("root", ["demo_set", pytest.param("real", marks=pytest.mark.real)])
@pytest.mark.parametrize("task", data.TASKS)
def test_labels_equal_those_derived_with_pandas(request, root, task):
    """The protocol once more, by another library and another way round."""
    pd, root = pytest.importorskip("pandas"), request.getfixturevalue(root)
    statements = pd.read_csv(root / "scp_statements.csv", index_col=0)
    table = pd.read_csv(root / "ptbxl_database.csv", index_col="ecg_id")
    kind = {"all71": None, "form19": "form", "rhythm12": "rhythm"}.get(task, "diagnostic")
    chosen = statements if kind is None else statements[statements[kind] == 1]
    name = {"subclass23": chosen.diagnostic_subclass, "superclass5": chosen.diagnostic_class}
    name = name.get(task, chosen.index.to_series()).to_dict()
    sets = table.scp_codes.map(lambda s: {name[c] for c in ast.literal_eval(s) if c in name})
    sets = sets[sets.map(bool)]
    labels, classes = data.load_labels(root, task), sorted(set(name.values()))
    assert labels.classes == classes and task.endswith(str(len(classes)))
    assert labels.ecg_id.tolist() == sets.index.tolist()
    assert [{c for c, v in zip(labels.classes, row) if v} for row in labels.y] == sets.tolist()
    assert labels.fold.tolist() == table.strat_fold[sets.index].tolist()
    assert labels.patient_id.tolist() == table.patient_id[sets.index].astype(int).tolist()


@given(n=st.integers(1, 500), a=st.floats(0.001, 1), b=st.floats(0.001, 1), seed=st.integers(0, 99))
def test_subset_is_nested_and_of_the_right_size(n, a, b, seed):
    index = np.arange(n) * 3 + 1
    small, large = (data.subset(index, frac, seed) for frac in sorted((a, b)))
    assert set(small) <= set(large) <= set(index)
    assert len(small) == max(1, int(min(a, b) * n + 0.5)) and list(small) == sorted(small)
    assert np.array_equal(data.subset(index[::-1], a, seed), data.subset(index, a, seed))


# ------------------------------------------------------------------------ records and preprocessing

@pytest.mark.parametrize("units, factor, gain", [
    (b"mV", 1, 1000), (b"V", 1e-3, 1e6), (b"MV", 1, 1000), (b"nV", 1e6, 1e-3),
    *((units, 1e3, 1) for units in (b"uV", "µV".encode(), "μV".encode(), "µV".encode("latin-1")))])
def test_leads_are_found_by_name_and_converted(tmp_path, units, factor, gain):
    order = np.random.default_rng(1).permutation(12)
    names = [NAMES[i].lower() if i % 2 else NAMES[i] for i in order] + ["vx", "vy", "vz"]
    leads = np.vstack([SIGNAL[order], SIGNAL[:3] + 0.1]) * factor
    path = write_record(tmp_path / "r", leads, names, fs=400, gain=gain)
    header = path.with_suffix(".hea")
    header.write_bytes(header.read_bytes().replace(b"/mV", b"/" + units))
    signal, fs = data.read_record(path)
    assert fs == 400 and signal.dtype == np.float32
    np.testing.assert_allclose(signal, SIGNAL, atol=2e-6)


@pytest.mark.real
def test_real_records_as_published_and_at_other_rates(real, golden):
    want = golden["preprocess"]
    for ecg_id, published in zip(want["ecg_id"], want["signal"]):
        path = real / f"records500/{ecg_id // 1000 * 1000:05d}/{ecg_id:05d}_hr"
        signal, fs = data.read_record(path)
        got = data.preprocess(signal, fs)
        np.testing.assert_allclose(got[:, ::want["every"]], published, atol=1e-4)
        for rate in (100, 257, 1000):
            other = scipy.signal.resample_poly(signal + 1, rate, fs, axis=1, padtype="line")
            again = data.preprocess(other, rate)
            assert np.corrcoef(got.ravel(), again.ravel())[0, 1] > 0.999
            assert np.abs(got - again)[:, -250:].max() < 0.3


@pytest.mark.parametrize("n", [5000, 3000])
def test_each_preprocessing_step_by_step(n):
    """The filters written with SciPy's transfer functions and slow running median; short records
    are padded after them."""
    ecg = SIGNAL[:, :n]
    x = scipy.signal.filtfilt(*scipy.signal.iirnotch(50, 30, 500), ecg)
    x = scipy.signal.filtfilt(*scipy.signal.butter(4, [0.67, 40], "bandpass", fs=500), x)
    x = x - np.stack([scipy.signal.medfilt(lead, 201) for lead in x])
    normal = {how: (y - y.mean()) / y.std() for how, y in (("filter", x), ("zscore", ecg))}
    for how, want in (normal | {"raw": ecg}).items():
        want = np.pad(want, ((0, 0), (0, 5000 - n)))
        np.testing.assert_allclose(data.preprocess(ecg, 500, how), want, atol=1e-4)


@pytest.mark.parametrize("fs", [50, 100, 257, 360, 500, 1000, 5000])
def test_other_rates_are_resampled(fs):
    """A tone stays the same tone, whatever comes later; a drift keeps its ends."""
    t, given = np.arange(5000) / 500, np.arange(30 * fs) / fs
    tone = np.where(given < 20, np.sin(2 * np.pi * 7 * given), 1e6)
    got = data.preprocess([tone], fs, "raw")[0]
    np.testing.assert_allclose(got[200:], np.sin(2 * np.pi * 7 * t)[200:], atol=0.01)
    for slope in (0, 0.2):
        got = data.preprocess([2 + slope * given[:10 * fs]], np.float32(fs), "raw")
        np.testing.assert_allclose(got, [2 + slope * t], rtol=5e-3)


def test_gaps_are_interpolated_and_flat_records_zeros():
    nan = np.nan
    leads = [[1.0, nan, nan, 4.0], [nan, 2.0, 2.5, nan], [nan] * 4, [0, 1, 2, 3]]
    want = [[1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 2.5, 2.5], [0.0] * 4, [0, 1, 2, 3]]
    assert np.array_equal(data.preprocess(leads, 500, "raw")[:, :4], want)
    for value in (0, 1.5, nan):
        assert not data.preprocess(np.full((12, 5000), value), 500).any()


@pytest.mark.parametrize("signal, fs, how, word", [
    (SIGNAL.T, 500, "filter", "(leads, n)"), (SIGNAL[0], 500, "filter", "(leads, n)"),
    (SIGNAL, 0.5, "filter", "0.5 Hz"), (SIGNAL, 500, "filtered", "zscore"),
    (1e5 * SIGNAL, 500, "raw", "millivolts")])
def test_what_is_no_ecg_is_not_preprocessed(signal, fs, how, word):
    with pytest.raises(data.InputError, match=re.escape(word)):
        data.preprocess(signal, fs, how)


# -------------------------------------------------------------------------------------------- cache

@pytest.mark.parametrize("how", data.PREPROCESSING)
def test_a_cache_holds_every_record(uncached, demo_set, monkeypatch, how):
    """Built by two workers; that of the demo set was by one."""
    data.main(["--data", str(uncached), "--preprocess", how, "--workers", "2"])
    assert how != "filter" or content(uncached / "cache") == content(demo_set / "cache")
    monkeypatch.setattr(data, "write_signals", None)    # what is there is not built again
    labels, signals = data.load_records(uncached, "form19", how)    # not all have a form
    assert 0 < len(labels.row) < 60 and labels.row.tolist() == (labels.ecg_id - 1).tolist()
    paths = sorted(path.with_suffix("") for path in uncached.rglob("*_hr.hea"))[::7]
    want = np.stack([data.preprocess(*data.read_record(path), how) for path in paths])
    assert signals.dtype == np.float16 and np.array_equal(signals[::7], want.astype(np.float16))


def test_a_killed_build_starts_over(uncached, tmp_path):
    """After a kill at any moment; what it left is removed in time."""
    build = "--preprocess", "raw", "--workers", "1", "--data"
    with states_kept(uncached, tmp_path / "states") as states:
        data.main([*build, str(uncached)])
    assert len(states) == 2
    for state in states:
        for path in temporaries(state):     # of another process, long ago
            os.utime(path, (0, 0))
        data.main([*build, str(state)])
        assert content(state / "cache") == content(uncached / "cache")


@pytest.mark.parametrize("name, fault, status, words", [
    ("data.load_windows", lambda *a: os.kill(os.getpid(), 9), 2, ["terminated", "--workers 1"]),
    ("os.fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left")), 2, ["No space left"]),
    ("os.fsync", Mock(side_effect=KeyboardInterrupt), 130, ["interrupted"])])
def test_a_failed_build_leaves_nothing(uncached, monkeypatch, fails, name, fault, status, words):
    monkeypatch.setattr(name, fault)
    fails(data.main, ["--data", uncached, "--preprocess", "raw"], *words, status=status)
    assert content(uncached / "cache") == {}


def test_two_builds_at_once(uncached, demo_set, monkeypatch):
    """Both have written a whole file before either gives it its name."""
    context, fsync = multiprocessing.get_context("fork"), os.fsync
    barrier = context.Barrier(2)
    monkeypatch.setattr(os, "fsync", lambda file: (barrier.wait(60), fsync(file)))
    with ProcessPoolExecutor(2, context) as pool:
        list(pool.map(data.main, 2 * [["--data", str(uncached), "--workers", "1"]]))
    assert content(uncached / "cache") == content(demo_set / "cache")


def test_two_containers_with_the_same_process_number(tmp_path):
    path = tmp_path / "x"
    with data.whole_file(path) as f, data.whole_file(path) as g:
        f.write(b"one")
        g.write(b"another")
    assert content(tmp_path) == {"x": b"one"}


def test_a_long_build(uncached, monkeypatch):
    """No file of it lies untouched for so long that it would be taken for a killed one's; and
    Windows allows no more than 61 processes."""
    def write(f, root, records, how, leads, workers):
        (part,) = temporaries(root)
        assert ".npy." in part.name and workers == 61
        raise data.InputError("seen")
    monkeypatch.setattr(data, "write_signals", write)
    with pytest.raises(data.InputError, match="seen"):
        data.load_records(uncached, "all71", workers=100)


def test_unreadable_records_are_listed_and_left_out_on_request(uncached, demo_set, fails):
    """No file, and what is left of files that were cut."""
    (uncached / "records500/00000/00003_hr.dat").unlink()
    for name, size in (("00005_hr.dat", 1001), ("00007_hr.hea", 9), ("00009_hr.hea", 0)):
        os.truncate(uncached / "records500/00000" / name, size)
    fails(data.main, ["--data", uncached], "00003_hr", "all 4", "--skip-unreadable")
    about, = uncached.glob("cache/*.json")
    bad = json.loads(about.read_text())["unreadable"]
    assert [record[-8:] for record in bad] == [f"{i:05d}_hr" for i in (3, 5, 7, 9)]
    labels, signals = data.load_records(uncached, "all71", skip_unreadable=True)
    assert set(range(1, 61)) - set(labels.ecg_id.tolist()) == {3, 5, 7, 9}
    whole = data.load_records(demo_set, "all71")[1]
    assert np.array_equal(signals[labels.row], whole[labels.ecg_id - 1]) and not signals[2].any()


# ----------------------------------------------------------------------------------------- download

@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """(Path of a small PTB-XL zip that data.py downloads, its files by their names)."""
    make_demo(tmp_path / "set", records=3)
    monkeypatch.chdir(tmp_path / "set")
    files = {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    others = ("records100/00000/00001_lr.dat", "../escaped.csv", "records500/../../escaped.dat")
    with zipfile.ZipFile(tmp_path / "mirror.zip", "w") as z:
        for name, text in [*files.items(), *((name, b"no") for name in others)]:
            z.writestr(f"ptb-xl-1.0.3/{name}", text)
    monkeypatch.setattr(data, "URL", (tmp_path / "mirror.zip").as_uri())
    return tmp_path / "mirror.zip", files


@pytest.mark.parametrize("damage", [
    lambda whole: whole[:len(whole) // 2], lambda whole: b"<html>",
    lambda whole: whole.replace(b"STTC", b"ttcs"), lambda whole: whole.replace(b"NORM'", b"mron'")])
def test_a_bad_zip_is_named_and_can_be_fetched_again(mirror, tmp_path, monkeypatch, fails, damage):
    (path, files), root = mirror, tmp_path / "a" / "b"
    argv, whole = ["--download", "--data", str(root)], path.read_bytes()
    path.write_bytes(damage(whole))
    fails(data.main, argv, "ptb-xl.zip", "remove it", "wget -c")
    (root / "ptb-xl.zip").write_bytes(whole)    # fetched by hand
    monkeypatch.setattr(data, "URL", "file:///nowhere")
    data.main(argv)
    data.main(argv)     # all is there: nothing is fetched
    shutil.rmtree(root / "cache")
    monkeypatch.chdir(root)
    found = {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert found == files and not list(tmp_path.rglob("escaped*"))
