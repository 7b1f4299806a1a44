"""Labels, records, preprocessing, the cache, the Dataset and the download, on made-up and (where
there are) real records."""
import ast
import io
import json
import os
import re
import shutil
import signal
import zipfile
from hashlib import sha256
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import scipy.signal
import torch
from hypothesis import given, strategies as st

import data
from helpers import content, read_csv, states_kept, write_record
from make_demo import NAMES, make_demo

RATES = [100, 250, 257, 360, 1000]
SIGNAL = np.round(np.random.default_rng(0).normal(0, 0.4, (12, 5000)), 3)


# ------------------------------------------------------------------------------------------- labels

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
    sets = sets[sets.map(len) > 0]
    labels = data.load_labels(root, task)
    assert labels.classes == sorted(set(name.values()))
    assert len(labels.classes) == int(re.sub(r"\D", "", task))
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
    assert np.array_equal(data.subset(index, 1, seed), index)


# ------------------------------------------------------------------------------------------ records

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


# ------------------------------------------------------------------------------------ preprocessing

@pytest.mark.real
def test_filter_equals_the_published_preprocessing(real, golden):
    want = golden["preprocess"]
    for ecg_id, signal in zip(want["ecg_id"], want["signal"]):
        path = real / f"records500/{ecg_id // 1000 * 1000:05d}/{ecg_id:05d}_hr"
        got = data.preprocess(*data.read_record(path))
        assert got.dtype == np.float32 and got.shape == (12, 5000)
        np.testing.assert_allclose(got[:, ::want["every"]], signal, atol=1e-4)


def test_each_preprocessing_step_by_step():
    """The filters written with SciPy's transfer functions and slow running median."""
    x = scipy.signal.filtfilt(*scipy.signal.iirnotch(50, 30, 500), SIGNAL)
    x = scipy.signal.filtfilt(*scipy.signal.butter(4, [0.67, 40], "bandpass", fs=500), x)
    x = x - np.stack([scipy.signal.medfilt(lead, 201) for lead in x])
    for how, want in (("filter", x), ("zscore", SIGNAL)):
        want = (want - want.mean()) / want.std()
        np.testing.assert_allclose(data.preprocess(SIGNAL, 500, how), want, atol=1e-4)
    np.testing.assert_allclose(data.preprocess(SIGNAL, 500, "raw"), SIGNAL, atol=1e-6)


@pytest.mark.parametrize("fs", RATES)
def test_other_rates_are_resampled(fs):
    """A tone stays the same tone; of an offset and a drift the ends stay too."""
    def tiled(shape, rate, seconds):
        return np.tile(shape(np.arange(int(seconds * rate)) / rate), (12, 1))

    tone = lambda t: np.sin(2 * np.pi * 7 * t)
    got = data.preprocess(tiled(tone, fs, 12), fs, "raw")
    np.testing.assert_allclose(got[:, 200:-200], tiled(tone, 500, 10)[:, 200:-200], atol=0.01)
    for shape in (lambda t: 2 + 0 * t, lambda t: 2 + t / 5):
        got, want = data.preprocess(tiled(shape, fs, 10), fs, "raw"), tiled(shape, 500, 10)
        np.testing.assert_allclose(got[:, :-10], want[:, :-10], rtol=2e-3)
        np.testing.assert_allclose(got[:, -10:], want[:, -10:], rtol=5e-3)


@pytest.fixture(scope="module")
def real_signals(real):
    paths = sorted(real.glob("records500/*/*.hea"))[::70][:40]
    assert len(paths) == 40
    return [data.read_record(path.with_suffix(""))[0].astype(float) for path in paths]


@pytest.mark.real
@pytest.mark.parametrize("fs", RATES)
@pytest.mark.parametrize("offset", [0, 1])
def test_records_of_other_rates_are_the_same_ecg(real_signals, fs, offset):
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


@pytest.mark.parametrize("fs, up, down", [
    (50, 10, 1), (257, 500, 257), (500, 1, 1), (1000, 1, 2), (5000, 1, 10)])
def test_only_the_first_ten_seconds_count(fs, up, down):
    """Of half a minute: what the whole of it, resampled, begins with; whatever comes later."""
    x = np.random.default_rng(0).standard_normal((12, 30 * fs)).cumsum(1) / 10
    want = scipy.signal.resample_poly(x, up, down, axis=1, padtype="line")[:, :5000]
    x[4, 20 * fs] = 1e6
    np.testing.assert_allclose(data.preprocess(x, fs, "raw"), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("how", data.PREPROCESSING)
def test_long_is_cut_and_short_is_padded_after_the_filter(how):
    long = np.concatenate([SIGNAL, SIGNAL[:, ::-1]], 1)
    assert np.array_equal(data.preprocess(long, 500, how), data.preprocess(SIGNAL, 500, how))
    short = data.preprocess(SIGNAL[:, :3000], 500, how)
    assert (short[:, 3000:] == 0).all() and short[:, :3000].std() > 0.3
    if how != "raw":
        assert abs(short[:, :3000].mean()) < 1e-5 and abs(short[:, :3000].std() - 1) < 1e-4


def test_missing_samples_are_interpolated_and_flat_records_zeros():
    nan = np.nan
    leads = [[1.0, nan, nan, 4.0], [nan, 2.0, 2.5, nan], [nan] * 4, [0, 1, 2, 3]]
    want = [[1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 2.5, 2.5], [0.0] * 4, [0, 1, 2, 3]]
    got = data.preprocess(np.tile(leads, (3, 1)), 500, "raw")
    assert np.array_equal(got[:, :4], np.tile(want, (3, 1)))
    one = np.full((12, 10000), 1.5)
    one[:, 3000] = nan
    assert (data.preprocess(one, 1000, "raw") == 1.5).all()
    assert np.isfinite(data.preprocess(np.ones((12, 1)), 250, "raw")).all()
    holes = SIGNAL.copy()
    holes[3, 100:200] = nan
    assert np.isfinite(data.preprocess(holes, 500)).all()
    for value in (0, 1.5, nan):
        for how in ("filter", "zscore"):
            assert (data.preprocess(np.full((12, 5000), value), 500, how) == 0).all()


@pytest.mark.parametrize("signal, fs, words", [
    (SIGNAL[:, :50], 500, "of 0.1 s"), (SIGNAL, 0, "positive rate"),
    (SIGNAL, np.nan, "positive rate"), (SIGNAL[0], 500, r"\(5000,\)"),
    (SIGNAL[:, :0], 500, "wanted"), (np.where(SIGNAL > 1, np.inf, SIGNAL), 500, "infinite"),
    (SIGNAL * 1e6, 500, "beyond")])
def test_what_is_too_short_or_no_signal(signal, fs, words):
    with pytest.raises(data.InputError, match=words):
        data.preprocess(signal, fs)


# -------------------------------------------------------------------------------------------- cache

@pytest.fixture(scope="module")
def whole(demo_set):
    return content(demo_set / "cache")


@pytest.fixture
def reads(monkeypatch, demo_set):
    """The paths of the records that are read, for speed out of a cache that is there."""
    signals, paths = np.load(data.find_cache(demo_set)[0].array, mmap_mode="r"), []

    def load(path, how, leads, windows):
        paths.append(path)
        return signals[int(path.name[:5]) - 1][None]

    monkeypatch.setattr(data, "load_windows", load)
    return paths


@pytest.fixture
def interrupted(uncached, reads, monkeypatch, fails):
    """A build that Ctrl-C ended in its second chunk, some rows of which are torn."""
    with monkeypatch.context() as m:  # the plan, the first chunk and the second go to the disk
        m.setattr(os, "fsync", Mock(side_effect=[None, None, KeyboardInterrupt]))
        fails(data.main, ["--data", uncached, "--workers", 1], "resumes", status=130)
    np.load(data.find_cache(uncached)[0].part, mmap_mode="r+")[40:50, 3:] = 7
    reads.clear()
    return uncached


@pytest.mark.parametrize("how", data.PREPROCESSING)
def test_a_cache_holds_every_record(uncached, whole, how, capsys):
    """Built by two workers; that of the demo set was by one."""
    data.main(["--data", str(uncached), "--preprocess", how, "--workers", "2"])
    assert "60 records" in capsys.readouterr().out
    found = content(uncached / "cache")
    names = [re.sub("-[0-9a-f]{8}", "", name) for name in sorted(found)]
    assert names == [f"{how}.json", f"{how}.marks.npy", f"{how}.npy"]
    assert how != "filter" or found == whole
    labels, signals = data.load_records(uncached, "all71", how)
    assert labels.ecg_id.tolist() == (labels.row + 1).tolist() == list(range(1, 61))
    assert signals.dtype == np.float16 and not signals.flags.writeable
    paths = sorted(path.with_suffix("") for path in uncached.rglob("*_hr.hea"))
    want = np.stack([data.preprocess(*data.read_record(path), how) for path in paths])
    assert np.array_equal(signals, want.astype(np.float16))
    plan = json.loads(found[min(found)])
    assert plan["ecg_ids"] == list(range(1, 61)) and plan["preprocessing"] == how
    assert plan["leads"] == list(data.LEADS) and plan["records"][0] == "records500/00000/00001_hr"


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


DAMAGE = {
    "array truncated": ("array", lambda b: b[:len(b) // 2]),
    "array empty": ("array", lambda b: b""),
    "no array": ("array", lambda b: b"junk" * 99),
    "array of another shape": ("array", lambda b: npy(np.zeros((3, 12, 5000), np.float16))),
    "float32": ("array", lambda b: npy(np.zeros((60, 12, 5000), np.float32))),
    "marks truncated": ("marks", lambda b: b[:-1]),
    "marks empty": ("marks", lambda b: b""),
    "marks of fewer records": ("marks", lambda b: npy(np.ones(59, bool))),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("state", ["demo", "interrupted"])
def test_a_damaged_cache_is_built_again(request, reads, whole, state, damage):
    """As a power failure may leave it, finished or half built."""
    root, (name, change) = request.getfixturevalue(state), DAMAGE[damage]
    name = "part" if (state, name) == ("interrupted", "array") else name
    path = getattr(data.find_cache(root)[0], name)
    before = path.read_bytes()
    path.write_bytes(change(before))
    assert path.read_bytes() != before
    with pytest.raises(data.InputError, match="filter-.*npy: .*`python data.py"):
        data.load_records(root, "all71")
    data.build_cache(root, workers=1)
    assert content(root / "cache") == whole and len(reads) == 60


def test_killed_at_any_moment_and_built_again(uncached, reads, whole, tmp_path):
    """Rows are marked after their bytes are on the disk, and what is marked is not read again."""
    with states_kept(uncached, tmp_path / "states", "fsync", "replace"):
        data.build_cache(uncached, workers=1)
    states, array = sorted((tmp_path / "states").iterdir()), data.find_cache(uncached)[0].array
    found = []
    for root in states:
        cache, plan = data.find_cache(root)
        left = cache.open(plan, cache.part)
        assert not cache.array.exists()
        if left:
            signals, marks = left
            assert np.array_equal(signals[marks], np.load(array)[marks])
            found.append((int(marks.sum()), int(signals.any((1, 2)).sum())))
            np.load(cache.part, mmap_mode="r+")[~marks, 3:] = 7  # rows half written
        reads.clear()
        data.build_cache(root, workers=1)
        assert content(root / "cache") == whole and len(reads) == 60 - (found[-1][0] if left else 0)
    assert found == [(0, 32), (32, 60), (60, 60)] and len(states) == 2 + 3  # two: of the plan


def test_a_killed_worker_ends_the_build(uncached, monkeypatch, fails, whole):
    with monkeypatch.context() as m:
        m.setattr(data, "load_windows", lambda *a: os.kill(os.getpid(), signal.SIGKILL))
        fails(data.main, ["--data", uncached, "--workers", 2], "worker", "killed", "--workers")
    data.build_cache(uncached, workers=2)
    assert content(uncached / "cache") == whole


def test_a_full_disk_is_said_before_the_work(uncached, reads, monkeypatch, fails):
    asked, usage = [], SimpleNamespace(free=60 * 12 * 5000 * 2 - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage)
    words = ("filter-", "no space left", "0.0072 GB", "make room")
    fails(data.main, ["--data", uncached], *words)
    assert asked == [uncached / "cache"] and not reads and not content(uncached / "cache")


def test_unreadable_records(uncached, whole, fails, capsys, monkeypatch):
    folder, cache = uncached / "records500" / "00000", data.find_cache(uncached)[0]
    names = ("00003_hr.dat", "00005_hr.dat", "00007_hr.hea", "00009_hr.hea")
    old = {name: (folder / name).read_bytes() for name in names}
    (folder / names[0]).unlink()
    for name, damaged in zip(names[1:], (old[names[1]][:1001], b"no header\n", b"")):
        (folder / name).write_bytes(damaged)
    fail = lambda *more: fails(data.main, ["--data", uncached, *more], "4 records", "00003_hr",
                               cache.unreadable, "--skip-unreadable")
    fail("--workers", 2)
    assert not cache.array.exists()
    rows = read_csv(cache.unreadable)
    assert [(row["ecg_id"], row["record"][-8:]) for row in rows] == [
        ("3", "00003_hr"), ("5", "00005_hr"), ("7", "00007_hr"), ("9", "00009_hr")]
    assert all(row["record"] in row["reason"] for row in rows)

    data.main(["--data", str(uncached), "--skip-unreadable"])
    assert "56 records" in capsys.readouterr().out
    labels, signals = data.load_records(uncached, "all71")
    assert len(labels.y) == 56 and labels.row[labels.ecg_id == 4] == 3
    assert set(range(1, 61)) - set(labels.ecg_id.tolist()) == {3, 5, 7, 9}
    assert len(data.ECGDataset(uncached, "all71", range(1, 11))) == 56
    before = content(uncached / "cache")
    data.build_cache(uncached, skip_unreadable=True)
    fail()
    assert content(uncached / "cache") == before  # what others use by now is left alone

    for name in names:  # fetched again
        (folder / name).write_bytes(old[name])
    read, read_record = [], data.read_record
    monkeypatch.setattr(data, "read_record", lambda *a: read.append(a[0]) or read_record(*a))
    data.main(["--data", str(uncached), "--workers", "1"])
    assert [path.name[4] for path in read] == ["3", "5", "7", "9"]  # no row of others is touched
    assert content(uncached / "cache") == whole and signals[2].any()  # the same file


def test_an_up_to_date_cache_is_used_as_it_is(demo, reads, capsys):
    """Nothing is read or written, so that a folder that cannot be written to will do."""
    cache = demo / "cache"
    before = {path: path.stat().st_mtime_ns for path in (*cache.iterdir(), cache)}
    data.main(["--data", str(demo)])
    assert len(data.load_records(demo, "all71")[0].row) == 60
    assert {path: path.stat().st_mtime_ns for path in (*cache.iterdir(), cache)} == before
    assert "60 records" in capsys.readouterr().out and not reads


@pytest.mark.parametrize("folds", [data.TRAIN_FOLDS, [9], [9, 10]])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_dataset_through_a_loader(demo_set, folds, workers):
    dataset = data.ECGDataset(demo_set, "rhythm12", folds)
    loader = torch.utils.data.DataLoader(dataset, batch_size=7, num_workers=workers)
    x, y = (torch.cat(parts) for parts in zip(*loader))
    labels = data.load_labels(demo_set, "rhythm12")
    chosen = np.isin(labels.fold, list(folds))
    array = np.load(data.find_cache(demo_set)[0].array, mmap_mode="r")
    assert x.dtype == y.dtype == torch.float32 and len(dataset) == len(x) == chosen.sum() > 0
    assert np.array_equal(x, array[labels.ecg_id[chosen] - 1].astype(np.float32))
    assert np.array_equal(y, labels.y[chosen]) and dataset.labels.classes == labels.classes


# ----------------------------------------------------------------------------------------- download

RECORD = "records500/00000/00002_hr.dat"


@pytest.fixture
def mirror(tmp_path):
    """A small PTB-XL zip -> (its url, its path, the names and contents of its files)."""
    make_demo(tmp_path / "set", records=3)
    paths = [p for p in (tmp_path / "set").rglob("*") if p.is_file()]
    files = {p.relative_to(tmp_path / "set").as_posix(): p.read_bytes() for p in paths}
    files |= {"records100/00000/00001_lr.dat": b"low rate", "../escaped.txt": b"evil"}
    sums = "".join(f"{sha256(content).hexdigest()} {name}\n" for name, content in files.items())
    files["SHA256SUMS.txt"] = sums.encode()
    path = tmp_path / "mirror.zip"
    pack(path, files)
    return path.as_uri(), path, files


def pack(path, files):
    with zipfile.ZipFile(path, "w") as z:
        for name, content in files.items():
            z.writestr(f"ptb-xl-1.0.3/{name}", content)


def test_download(mirror, tmp_path, capsys):
    url, path, files = mirror
    root = tmp_path / "got"
    data.main(["--download", "--url", url, "--data", str(root)])
    assert "3 records" in capsys.readouterr().out
    shutil.rmtree(root / "cache")
    have = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_file()}
    assert have.keys() == files.keys() - {"records100/00000/00001_lr.dat", "../escaped.txt"}
    assert not list(tmp_path.rglob("escaped.txt"))
    assert all(p.read_bytes() == files[name] for name, p in have.items())
    data.download(root, "file:///nowhere")  # all there and right: nothing is fetched
    stamps = {name: p.stat().st_mtime_ns for name, p in have.items()}
    have[RECORD].write_bytes(b"damaged")
    data.download(root, url)
    changed = {name for name, p in have.items() if p.stat().st_mtime_ns != stamps[name]}
    assert changed == {RECORD, "SHA256SUMS.txt"} and have[RECORD].read_bytes() == files[RECORD]


@pytest.mark.parametrize("culprit, damage", [
    ("", lambda path, files: os.truncate(path, path.stat().st_size // 2)),
    ("", lambda path, files: path.write_bytes(b"<html>")),
    (RECORD, lambda path, files: pack(path, files | {RECORD: b"other"})),
    (RECORD, lambda path, files: pack(path, {k: v for k, v in files.items() if k != RECORD}))])
def test_a_bad_zip_is_named_and_fetched_again(mirror, tmp_path, fails, culprit, damage):
    url, path, files = mirror
    root, good = tmp_path / "got", path.read_bytes()
    damage(path, files)
    argv = ["--download", "--url", url, "--data", str(root)]
    fails(data.main, argv, culprit or url, "run the same command again")
    assert not any((root / name).exists() for name in (RECORD, "SHA256SUMS.txt", "ptb-xl.zip"))
    path.write_bytes(good)
    data.main(argv)
    assert (root / RECORD).read_bytes() == files[RECORD]


def test_a_zip_of_ones_own_is_kept_until_it_is_whole(mirror, tmp_path, fails):
    root, whole = tmp_path / "got", mirror[1].read_bytes()
    root.mkdir()
    (root / "ptb-xl.zip").write_bytes(whole[:-99])
    argv = ["--download", "--url", "file:///nowhere", "--data", str(root)]
    fails(data.main, argv, "ptb-xl.zip", "complete or remove it")
    assert (root / "ptb-xl.zip").read_bytes() == whole[:-99]
    (root / "ptb-xl.zip").write_bytes(whole)
    data.main(argv)
    assert (root / RECORD).exists() and not (root / "ptb-xl.zip").exists()
