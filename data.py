"""PTB-XL: labels of its tasks, records, preprocessing, and a cache of preprocessed signals.

    python data.py --download --data ptbxl      # fetch PTB-XL 1.0.3 (1.7 GB), unpack its 500 Hz records, check every hash
    python data.py --data ptbxl                 # preprocess every record once -> ptbxl/cache/filter.npy
    python data.py --data ptbxl --preprocess raw --workers 4

The cache is one float16 array (N, 12, 5000), 2.6 GB for the whole set, N in the order of ptbxl_database.csv; read it with
np.load("ptbxl/cache/filter.npy", mmap_mode="r"). filter.json beside it holds the ecg_ids and how it was made.
Signals: 12 leads in the order of LEADS, 10 s at 500 Hz, millivolts before and no unit after normalisation.
This file imports no other of the project.
"""
import argparse
import ast
import csv
import errno
import json
import math
import os
import re
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
FS = 500            # Hz
MIN_FS, MAX_FS = 50, 100_000  # Hz, of what is resampled
SAMPLES = 5000      # 10 s
TASKS = ("all71", "diagnostic44", "subclass23", "superclass5", "form19", "rhythm12")
TRAIN_FOLDS, VAL_FOLD, TEST_FOLD = range(1, 9), 9, 10
PREPROCESSING = ("filter", "zscore", "raw")

MILLIVOLTS = {"v": 1e3, "mv": 1.0, "uv": 1e-3, "µv": 1e-3, "μv": 1e-3, "nv": 1e-6}
MAX_MILLIVOLTS = 1e4  # an ECG has about 1; resampling may overshoot, and the largest float16 is 65504
BASELINE_WINDOW = 201  # samples of the running median, 0.4 s
LAYOUT = 2          # of the cache; another number than the file's means: build it again
CHUNK = 32          # records between two marks of progress
URL = ("https://physionet.org/static/published-projects/ptb-xl/"
       "ptb-xl-a-large-publicly-available-electrocardiography-dataset-1.0.3.zip")
TABLES = ("ptbxl_database.csv", "scp_statements.csv")


class InputError(ValueError):
    """What the user gave cannot be used; the message says what was found, what was wanted and what to do."""


def line_of(error):
    """An error as one line to a person; of the system's own (OSError) the file and the reason, without the number."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return f"{error.filename or 'the system'}: {error.strerror.lower()}{'; make room, and run the same command again' if full else ''}"


# ---------------------------------------------------------------------------------------------------------------- labels

class Labels(NamedTuple):
    ecg_id: np.ndarray      # (N,) int64
    patient_id: np.ndarray  # (N,) int64; a record of unknown patient is a patient of its own, -ecg_id
    fold: np.ndarray        # (N,) int64, 1 to 10
    y: np.ndarray           # (N, L) uint8
    classes: list           # L names, sorted


def read_table(root, name, columns):
    """The rows of a csv file as dicts. Raises InputError where it is missing, empty, damaged or lacks one of `columns`."""
    path = Path(root, name)
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            reader = csv.DictReader(f)
            lacking = [c for c in columns if c not in (reader.fieldnames or [])]
            if lacking:
                raise InputError(f"{path}: has no column {lacking[0]!r}; wanted PTB-XL's {name}, "
                                 f"`python data.py --download --data {root}` fetches it")
            rows = list(reader)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror.lower()}; wanted a PTB-XL folder: name it with --data, or "
                         f"`python data.py --download --data {root}` fetches it") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a csv file in UTF-8 ({error}); fetch it again") from None
    for number, row in enumerate(rows, 2):
        if None in row or any(row[c] is None for c in columns):
            raise InputError(f"{path}: row {number} does not have {len(reader.fieldnames)} fields; fetch the file again")
    if not rows:
        raise InputError(f"{path}: has no rows; fetch it again")
    return rows


def read_database(root, columns=()):
    """ptbxl_database.csv -> (rows, ecg_id (N,)). Raises InputError also for an ecg_id that is no number or stands twice."""
    rows = read_table(root, TABLES[0], ("ecg_id", "filename_hr", *columns))
    ids = [whole_number(root, i, row, "ecg_id") for i, row in enumerate(rows, 2)]
    if len(set(ids)) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise InputError(f"{Path(root, TABLES[0])}: ecg_id {twice} stands twice; fetch the file again")
    return rows, np.array(ids, np.int64)


def whole_number(root, number, row, column):
    try:
        value = float(row[column])
        if value == int(value) and abs(value) < 2**53:
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise InputError(f"{Path(root, TABLES[0])}: row {number}: {column} is {row[column]!r}; wanted a whole number")


def load_labels(root, task):
    """The records that have a label of `task`, as Labels, from PTB-XL's two csv files alone.

    Protocol of Strodthoff et al. (2021): a statement counts as present whatever its likelihood, 0 included; records without
    any label of the task are left out. The classes are all of the task in scp_statements.csv, in sorted order, whether or
    not a record has them. Raises InputError for an unknown task and for files that are missing or malformed.
    """
    check_task(task)
    database, ecg_id = read_database(root, ("patient_id", "scp_codes", "strat_fold"))
    statements = read_table(root, TABLES[1], ("", "diagnostic", "form", "rhythm", "diagnostic_class", "diagnostic_subclass"))
    flag = {"form19": "form", "rhythm12": "rhythm"}.get(task, "diagnostic")
    value = {"subclass23": "diagnostic_subclass", "superclass5": "diagnostic_class"}.get(task, "")
    chosen = [s for s in statements if task == "all71" or s[flag].strip() in ("1", "1.0")]
    class_of = {s[""]: s[value] for s in chosen if s[value]}     # statement -> class of the task
    classes = sorted(set(class_of.values()))
    column = {name: i for i, name in enumerate(classes)}
    known = {s[""] for s in statements}

    y = np.zeros((len(database), len(classes)), np.uint8)
    patient_id, fold = np.empty(len(database), np.int64), np.empty(len(database), np.int64)
    for i, row in enumerate(database):
        where = f"{Path(root, TABLES[0])}: row {i + 2}"
        try:
            codes = ast.literal_eval(row["scp_codes"])
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            codes = None
        if not isinstance(codes, dict):
            raise InputError(f"{where}: scp_codes is {row['scp_codes'][:40]!r}; wanted a dict such as {{'NORM': 100.0}}")
        for code in codes:
            if code not in known:
                raise InputError(f"{where}: the statement {str(code)[:40]!r} does not stand in {TABLES[1]}; fetch both files again")
            if code in class_of:
                y[i, column[class_of[code]]] = 1
        fold[i] = whole_number(root, i + 2, row, "strat_fold")
        if not 1 <= fold[i] <= 10:
            raise InputError(f"{where}: strat_fold is {fold[i]}; wanted 1 to 10")
        patient_id[i] = whole_number(root, i + 2, row, "patient_id") if row["patient_id"] else -ecg_id[i]
    labelled = y.any(1)
    return Labels(ecg_id[labelled], patient_id[labelled], fold[labelled], y[labelled], classes)


def check_task(task):
    if task not in TASKS:
        from difflib import get_close_matches
        near = get_close_matches(str(task), TASKS, 1, 0)[0]
        raise InputError(f"task {task!r} is unknown; did you mean {near}? (one of {', '.join(TASKS)})")


def check_preprocessing(how):
    if how not in PREPROCESSING:
        raise InputError(f"preprocessing {how!r} is unknown; wanted one of {', '.join(PREPROCESSING)}")


def subset(index, frac, seed):
    """A fraction of the records `index` (n,), sorted: max(1, floor(frac n + 0.5)) of them, set by `seed` alone.

    Nested: for one index and seed a smaller fraction lies inside every larger one. Raises InputError unless 0 < frac <= 1.
    """
    if not 0 < frac <= 1:
        raise InputError(f"the fraction is {frac}; wanted 0 < fraction <= 1")
    index = np.sort(np.asarray(index))
    return np.sort(np.random.RandomState(seed).permutation(index)[:max(1, int(frac * len(index) + 0.5))])


# --------------------------------------------------------------------------------------------------------------- records

def read_record(path):
    """A WFDB record (path without extension) -> float32 (12, n) in millivolts, leads ordered as LEADS, and its rate in Hz.

    Leads are found by name, whatever their case and order; others are left out; voltages in other units are converted.
    Samples marked as missing are NaN. Raises InputError naming the path and what is wrong.
    """
    import wfdb
    try:
        record = wfdb.rdrecord(str(path))
        signal, names, units, fs = record.p_signal, record.sig_name, record.units, float(record.fs)
    except Exception as error:  # wfdb raises nearly every type for a malformed header or a short file
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: cannot be read as a WFDB record ({reason}); wanted its .hea header and the signal file that this names") from None
    if signal is None or not len(signal) or not fs > 0:
        raise InputError(f"{path}: has {0 if signal is None else len(signal)} samples at {fs:g} Hz; wanted an ECG")
    row = {(name or "").strip().lower(): i for i, name in reversed(list(enumerate(names)))}
    missing = [lead for lead in LEADS if lead.lower() not in row]
    if missing:
        raise InputError(f"{path}: has no lead {missing[0]} (it has {', '.join(map(str, names))}); wanted {', '.join(LEADS)}")
    rows = [row[lead.lower()] for lead in LEADS]
    for i in rows:
        if (units[i] or "").strip().lower() not in MILLIVOLTS:
            raise InputError(f"{path}: lead {names[i]} is in {units[i]!r}, which is no voltage; wanted mV, uV, nV or V")
    scale = np.array([MILLIVOLTS[units[i].strip().lower()] for i in rows])
    return (signal[:, rows] * scale).T.astype(np.float32), fs


def fill_gaps(lead):
    """One lead (n,) with its missing samples (NaN) interpolated: linearly, by the nearest value at the ends, else by 0."""
    missing = np.isnan(lead)
    if not missing.any():
        return lead
    if missing.all():
        return np.zeros_like(lead)
    time = np.arange(len(lead))
    return np.interp(time, time[~missing], lead[~missing])


def preprocess(signal, fs, how="filter"):
    """(12, n) in millivolts at `fs` Hz -> float32 (12, 5000): 10 s at 500 Hz, shorter records zero-padded at the end.

    how: "filter" (as ECGFounder was trained: zero-phase 50 Hz notch, Q 30; zero-phase Butterworth band-pass of order 4,
    0.67-40 Hz; running median of 0.4 s subtracted; z-score over all leads at once), "zscore" (the last step alone) or
    "raw" (millivolts). Missing samples (NaN) are interpolated, other rates resampled and the rest is cut off first.
    Normalised flat records are zeros. Raises InputError for a record that is no ECG: wrong shape, too short to filter,
    infinite or huge samples.
    """
    from scipy import ndimage, signal as dsp
    x = np.asarray(signal)
    check_preprocessing(how)
    if x.ndim != 2 or len(x) != len(LEADS) or not x.shape[1] or not 0 < fs < np.inf:
        raise InputError(f"a signal of shape {x.shape} at {fs} Hz; wanted (12, n) at a positive rate")
    x = x[:, :math.ceil(11 * min(fs, MAX_FS))].astype(np.float64)  # 10 s, and one more for the filter that resamples
    if not np.abs(np.nan_to_num(x, posinf=np.inf, neginf=-np.inf)).max() <= MAX_MILLIVOLTS:
        raise InputError(f"holds infinite samples or such beyond {MAX_MILLIVOLTS:g} mV; wanted an ECG in millivolts")
    x = np.stack([fill_gaps(lead) for lead in x])
    if fs != FS:
        if not MIN_FS <= fs <= MAX_FS:
            raise InputError(f"a sampling rate of {fs} Hz; wanted {MIN_FS} to {MAX_FS} Hz")
        ratio = Fraction(FS / fs).limit_denominator(1000)
        # Beyond its ends a lead goes on along the line between its first and last sample: zeros there would be a step.
        ends = "line" if x.shape[1] > 1 else "constant"
        x = dsp.resample_poly(x, ratio.numerator, ratio.denominator, axis=1, padtype=ends)
    x = x[:, :SAMPLES]
    if how == "filter":
        if x.shape[1] < BASELINE_WINDOW:
            raise InputError(f"is {x.shape[1] / FS:g} s long; wanted at least {BASELINE_WINDOW / FS:g} s to filter it")
        x = dsp.filtfilt(*dsp.iirnotch(50, 30, FS), x)
        x = dsp.sosfiltfilt(dsp.butter(4, (0.67, 40), "bandpass", fs=FS, output="sos"), x)
        # One lead at a time: SciPy's fast running median is the one for 1-D arrays.
        x = x - np.stack([ndimage.median_filter(lead, BASELINE_WINDOW, mode="constant") for lead in x])
    if how != "raw":
        std = x.std()
        x = (x - x.mean()) / (std + 1e-8) if std >= 1e-6 else np.zeros_like(x)
    out = np.zeros((len(LEADS), SAMPLES), np.float32)
    out[:, :x.shape[1]] = x
    return out


# ----------------------------------------------------------------------------------------------------------------- cache

class Cache(NamedTuple):
    signals: np.ndarray     # (N, 12, 5000) float16, memory-mapped, read only
    row: dict               # ecg_id -> row of signals, for the records that could be read


class CacheFiles(NamedTuple):
    array: Path             # the finished array
    about: Path             # its description; written last, so that an array without it does not count
    part: Path              # the array while it is built
    log: Path               # what is being built (a line of JSON), then the numbers of the rows that are done
    unreadable: Path        # csv of the records that could not be read


def cache_files(root, how):
    check_preprocessing(how)
    return CacheFiles(*(Path(root, "cache", how + end) for end in (".npy", ".json", ".part.npy", ".part.log", ".unreadable.csv")))


def source_of(root, how):
    """What a cache must have been made of to be up to date, and the records' paths."""
    rows, ecg_id = read_database(root)
    names = [row["filename_hr"] for row in rows]
    for name in names:
        if not name or os.path.isabs(name) or ".." in Path(name).parts:
            raise InputError(f"{Path(root, TABLES[0])}: filename_hr is {name!r}; wanted a path inside {root}")
    return {"layout": LAYOUT, "preprocessing": how, "shape": [len(rows), len(LEADS), SAMPLES], "fs": FS,
            "leads": list(LEADS), "ecg_ids": ecg_id.tolist(), "source": names}, [Path(root, name) for name in names]


def parse_description(text, source):
    """A cache's description, or None where it is damaged, of another layout or of other records."""
    try:
        description = json.loads(text)
        return description if all(description[key] == value for key, value in source.items()) else None
    except (ValueError, KeyError, TypeError):
        return None


def read_description(files, source):
    """The finished cache's description, or None where there is no such cache of `source`, or it is damaged."""
    if not (files.about.exists() and is_array(files.array, source)):
        return None
    description = parse_description(files.about.read_text(errors="replace"), source)
    return description if description and "unreadable" in description else None


def is_array(path, source):
    """Whether `path` is a whole array of the shape that `source` asks for."""
    try:
        array = np.load(path, mmap_mode="r")
        return array.shape == tuple(source["shape"]) and array.dtype == np.float16
    except (OSError, ValueError, EOFError):
        return False


def load_cache(root, how="filter"):
    """The finished cache as Cache. Raises InputError where there is none or it is not up to date."""
    files = cache_files(root, how)
    description = read_description(files, source_of(root, how)[0])
    if description is None:
        raise InputError(f"{files.array}: missing or out of date; `python data.py --data {root} --preprocess {how}` builds it")
    unreadable = {ecg_id for ecg_id, _, _ in description["unreadable"]}
    row = {ecg_id: i for i, ecg_id in enumerate(description["ecg_ids"]) if ecg_id not in unreadable}
    return Cache(np.load(files.array, mmap_mode="r"), row)


def align(labels, cache):
    """Labels -> (the labels whose record is in the cache, its rows (n,))."""
    there = np.array([i in cache.row for i in labels.ecg_id.tolist()], bool)
    labels = Labels(*(field[there] for field in labels[:4]), labels.classes)
    return labels, np.array([cache.row[i] for i in labels.ecg_id.tolist()], np.int64)


def build_cache(root, how="filter", workers=None, skip_unreadable=False):
    """Preprocess every record of ptbxl_database.csv once into <root>/cache/<how>.npy and describe it in <how>.json.

    Up to date, it returns at once. Killed and started again it goes on from what is done, with the same bytes at the end.
    Unreadable records are listed and the rest is done; then InputError is raised, unless `skip_unreadable` accepts a cache
    without them. Every later build tries them again.
    """
    files, (source, paths) = cache_files(root, how), source_of(root, how)
    if up_to_date(files, source, paths, how, skip_unreadable):
        return
    try:
        files.array.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"{files.array.parent}: {error.strerror.lower()}; the cache is kept there, remove what is in its way, or copy "
                         "the data to a folder that can be written to") from None
    with locked(files.array.parent, [f"{how}.*"]):  # a second build waits here, and then finds the work done
        if up_to_date(files, source, paths, how, skip_unreadable):
            return
        done = open_part(files, source)
        unreadable = fill_part(files, paths, done, how, workers or os.cpu_count())
        unreadable = [(source["ecg_ids"][row], source["source"][row], why) for row, why in sorted(unreadable)]
        if unreadable:
            write_atomically(files.unreadable, lambda path: write_listing(path, unreadable))
            if not skip_unreadable:
                raise unreadable_error(files, unreadable)
        else:
            files.unreadable.unlink(missing_ok=True)
        if files.part.exists():
            os.replace(files.part, files.array)
        about = json.dumps({**source, "unreadable": unreadable, "versions": versions()})
        write_atomically(files.about, lambda path: path.write_text(about))
        files.log.unlink(missing_ok=True)


def up_to_date(files, source, paths, how, skip_unreadable):
    """Whether the finished cache can be used as it is; one built without some records only while they stay unreadable.

    Raises InputError, touching nothing, where they do and `skip_unreadable` does not accept that.
    """
    description = read_description(files, source)
    if description is None:
        return False
    missing = {ecg_id for ecg_id, _, _ in description["unreadable"]}
    if any(readable(path, how) for ecg_id, path in zip(source["ecg_ids"], paths) if ecg_id in missing):
        return False
    if missing and not skip_unreadable:
        raise unreadable_error(files, description["unreadable"])
    return True


def write_listing(path, unreadable):
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows([("ecg_id", "filename_hr", "reason"), *unreadable])


def unreadable_error(files, unreadable):
    return InputError(f"{len(unreadable)} record{'s' * (len(unreadable) > 1)} cannot be read, the first is {unreadable[0][2]}; all are listed in {files.unreadable}, "
                      "the others are cached; fetch them again and run this again, or leave them out with --skip-unreadable")


def readable(path, how):
    try:
        prepare(path, how)
        return True
    except InputError:
        return False


@contextmanager
def locked(folder, names, busy=None):
    """Keep other processes from writing the files `names` (glob patterns) of `folder`: wait for them, or raise InputError(busy).

    Temporary files of these names, which a killed process may have left, are removed.
    """
    try:
        import fcntl
    except ImportError:
        raise InputError("this system has no file locks for Python (fcntl); wanted Linux or macOS, on Windows inside WSL") from None
    with open(Path(folder, ".lock"), "w") as lock:  # a file, open for writing, as network file systems want it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB if busy else fcntl.LOCK_EX)
        except BlockingIOError:
            raise InputError(f"{folder}: {busy}") from None
        for name in names:
            for path in Path(folder).glob(f".[0-9]*.{name}"):
                path.unlink(missing_ok=True)
        yield


def open_part(files, source):
    """Make `part` and `log` ready to go on from and return the set of rows that are done. Raises InputError if the disk is full."""
    n, done, description = source["shape"][0], set(), read_description(files, source)
    text = files.log.read_text(errors="replace") if files.log.exists() else ""
    first, *lines = text.split("\n")[:-1] or [""]  # a torn last line does not count
    logged = {int(line) for line in lines if line.isdecimal() and int(line) < n}
    if parse_description(first, source) is not None and (is_array(files.part, source) or len(logged) == n and is_array(files.array, source)):
        done = logged
    elif description is not None:  # finished without its unreadable records: only those are to do
        bad = {ecg_id for ecg_id, _, _ in description["unreadable"]}
        done = {row for row, ecg_id in enumerate(source["ecg_ids"]) if ecg_id not in bad}
        files.log.unlink(missing_ok=True)
        files.about.unlink()
        os.replace(files.array, files.part)
    else:
        files.log.unlink(missing_ok=True)
        files.about.unlink(missing_ok=True)
        size = np.lib.format.open_memmap(files.part, "w+", np.float16, tuple(source["shape"])).nbytes
        try:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                with open(files.part, "r+b") as f:
                    os.posix_fallocate(f.fileno(), 0, files.part.stat().st_size)
        except OSError as error:
            files.part.unlink()
            raise InputError(f"{files.array}: {error.strerror}; it wants {size / 1e9:.2g} GB there, make room and run it again") from None
    lines = [json.dumps(source), *map(str, sorted(done))]
    write_atomically(files.log, lambda path: path.write_text("\n".join(lines) + "\n"))  # it vouches for the part, so it comes last
    return done


def fill_part(files, paths, done, how, workers):
    """Do the rows that are left, logging them only once their bytes are on the disk; returns [(row, why it cannot be read)]."""
    from tqdm import tqdm
    jobs = [(row, path) for row, path in enumerate(paths) if row not in done]
    if not jobs:
        return []
    unreadable, offset = [], np.load(files.part, mmap_mode="r").offset
    with tqdm(total=len(paths), initial=len(done), unit="record", desc=f"cache {how}", disable=None) as bar, \
            open(files.part, "r+b") as part, open(files.log, "a") as log:
        for results in run_jobs(jobs, files.part, offset, how, workers):
            os.fsync(part.fileno())
            log.write("".join(f"{row}\n" for row, why in results if why is None))
            log.flush()
            unreadable += [(row, why) for row, why in results if why is not None]
            bar.update(len(results))
    return unreadable


def run_jobs(jobs, part, offset, how, workers):
    """write_records over chunks of `jobs` in `workers` processes; yields each chunk's results as they come."""
    chunks = [jobs[i:i + CHUNK] for i in range(0, len(jobs), CHUNK)]
    if workers == 1 or len(chunks) == 1:
        yield from (write_records(chunk, part, offset, how) for chunk in chunks)
        return
    import multiprocessing
    import wfdb, scipy.signal, scipy.ndimage  # noqa: E401,F401  once here rather than in every worker
    pool = ProcessPoolExecutor(min(workers, len(chunks)), multiprocessing.get_context("fork"), end_with_parent)
    try:
        for future in as_completed([pool.submit(write_records, chunk, part, offset, how) for chunk in chunks]):
            yield future.result()
    except BrokenProcessPool:
        raise InputError("a worker was killed, for want of memory perhaps; run the same command again, "
                         "it goes on from what is done (fewer --workers need less memory)") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def end_with_parent():
    """In a worker: end as soon as the building process does, however it ended."""
    import multiprocessing
    import signal
    import threading
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def write_records(jobs, part, offset, how):
    """Write the records `jobs` [(row, path)] into the array's file; returns [(row, None or why it cannot be read)]."""
    results = []
    with open(part, "r+b") as f:
        for row, path in jobs:
            try:
                block = prepare(path, how).tobytes()
                f.seek(offset + row * len(block))
                f.write(block)
                results.append((row, None))
            except InputError as error:
                results.append((row, str(error)))
    return results


def prepare(path, how):
    """A record as the cache keeps it: float16 (12, 5000). Raises InputError that names the path."""
    signal, fs = read_record(path)
    try:
        return preprocess(signal, fs, how).astype(np.float16)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def write_atomically(path, write):
    """Call `write` with a temporary path beside `path`, then give the file its name: it is complete or absent."""
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        with open(temporary, "r+b") as f:
            os.fsync(f.fileno())  # so that not even a power failure leaves an empty file under the final name
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None  # a full disk's error names no file
    finally:
        temporary.unlink(missing_ok=True)


def versions():
    import scipy
    import wfdb
    return {"numpy": np.__version__, "scipy": scipy.__version__, "wfdb": wfdb.__version__}


def batches(signals, rows, device="cpu"):
    """For each array of row numbers in `rows`: those of `signals` as a float32 tensor on `device`.

    signals: a tensor, used where it is, or the cache's memory map; then a thread reads (and for a GPU pins and sends) the
    next batch while the caller works on this one.
    """
    import torch
    if isinstance(signals, torch.Tensor):
        for index in rows:
            yield signals.index_select(0, torch.as_tensor(index, device=signals.device)).float()
        return

    def load(index):
        batch = torch.from_numpy(signals[index])  # a copy of these rows alone
        if torch.device(device).type == "cuda":
            with torch.cuda.device(device):  # a thread begins on the first GPU
                return batch.pin_memory().to(device, non_blocking=True)
        return batch

    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for index in rows:
            ahead, batch = pool.submit(load, index), ahead
            if batch is not None:
                yield batch.result().float()
        if ahead is not None:
            yield ahead.result().float()


# -------------------------------------------------------------------------------------------------------------- download

def sha256(path):
    import hashlib
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_right(path, digest):
    return path.exists() and sha256(path) == digest


def download(root, url=URL):
    """Fetch PTB-XL's zip, unpack the 500 Hz records and the two tables into `root` and check them against SHA256SUMS.txt.

    Files that are there and right are not written again, and where all are, nothing is fetched. The zip is removed at the
    end. Raises InputError for a zip that is damaged or lacks a file, and for a file whose hash is not the published one.
    """
    import torch.hub
    import zipfile
    import zlib
    from http.client import HTTPException
    root, sums = Path(root), Path(root, "SHA256SUMS.txt")
    if sums.exists() and all(is_right(root / name, digest) for name, digest in wanted_files(sums.read_text(errors="replace"), sums).items()):
        return
    root.mkdir(parents=True, exist_ok=True)
    archive = root / "ptb-xl.zip"
    if not archive.exists():
        try:
            torch.hub.download_url_to_file(url, str(archive))
        except (OSError, ValueError, HTTPException) as error:
            raise InputError(f"{url}: cannot be fetched ({line_of(error)}); run the same command again, or --url for a mirror") from None
    try:
        unpack(archive, root)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        archive.unlink()
        raise InputError(f"{url}: the zip came damaged ({error}) and was removed; run the same command again") from None
    archive.unlink()


def wanted_files(text, where):
    """SHA256SUMS.txt -> {name: hash} of the 500 Hz records and the two tables; only such names are ever written."""
    pairs = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    wanted = {p[1].strip().lstrip("*"): p[0] for p in pairs if len(p) == 2}
    wanted = {name: digest for name, digest in wanted.items()
              if name in TABLES or re.fullmatch(r"records500/\d{5}/\d{5}_hr\.(dat|hea)", name)}
    if not set(TABLES) <= set(wanted):
        raise InputError(f"{where}: does not list {TABLES[0]} and {TABLES[1]}; wanted PTB-XL 1.0.3's SHA256SUMS.txt, remove it and run again")
    return wanted


def unpack(archive, root):
    import hashlib
    import zipfile
    from tqdm import tqdm
    with zipfile.ZipFile(archive) as z:
        tables = [name for name in z.namelist() if name.rpartition("/")[2] == "SHA256SUMS.txt"]
        if not tables:
            raise InputError(f"{archive}: holds no SHA256SUMS.txt; wanted PTB-XL 1.0.3's zip, remove it and run again")
        prefix = min(tables, key=len)[:-len("SHA256SUMS.txt")]
        text = z.read(prefix + "SHA256SUMS.txt")
        members = set(z.namelist())
        for name, digest in tqdm(wanted_files(text.decode(errors="replace"), archive).items(), "unpack", unit="file", disable=None):
            target = root / name
            if is_right(target, digest):
                continue
            if prefix + name not in members:
                raise InputError(f"{archive}: lacks {name}; wanted PTB-XL 1.0.3's zip, remove it and run again")
            content = z.read(prefix + name)
            if hashlib.sha256(content).hexdigest() != digest:
                raise InputError(f"{archive}: {name} does not have the hash of SHA256SUMS.txt; remove the zip and run again")
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, lambda path: path.write_bytes(content))
        write_atomically(root / "SHA256SUMS.txt", lambda path: path.write_bytes(text))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="ptbxl", help="PTB-XL's folder (default: ptbxl)")
    parser.add_argument("--preprocess", choices=PREPROCESSING, default="filter",
                        help="default: filter, what ECGFounder's authors demand")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    parser.add_argument("--skip-unreadable", action="store_true", help="finish the cache without records that cannot be read")
    parser.add_argument("--download", action="store_true", help="fetch PTB-XL 1.0.3 into the folder first")
    parser.add_argument("--url", default=URL, help="the zip to fetch (default: PhysioNet's)")
    args = parser.parse_args(argv)
    try:
        if args.workers < 1:
            raise InputError(f"--workers is {args.workers}; wanted at least 1")
        if args.download:
            download(args.data, args.url)
        build_cache(args.data, args.preprocess, args.workers, args.skip_unreadable)
        cache = load_cache(args.data, args.preprocess)
        left_out = len(cache.signals) - len(cache.row)
        print(f"{cache_files(args.data, args.preprocess).array}: {len(cache.row):,} records, {cache.signals.nbytes / 1e9:.2f} GB"
              f"{f', {left_out} unreadable ones left out' if left_out else ''}")
    except (InputError, OSError) as error:
        sys.stderr.write(f"data.py: {line_of(error)}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("data.py: interrupted; run the same command again, it goes on from what is done\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
