"""PTB-XL: labels of its tasks, records, preprocessing, and a cache of preprocessed signals.

    python data.py --download --data ptbxl      # fetch PTB-XL 1.0.3 (1.7 GB), check every hash
    python data.py --data ptbxl                 # preprocess every record -> ptbxl/cache/filter.npy
    python data.py --data ptbxl --preprocess raw --workers 4

The cache is one float16 array (N, 12, 5000), 2.6 GB for the whole set, in the order of
ptbxl_database.csv; np.load("ptbxl/cache/filter.npy", mmap_mode="r") reads it. Beside it filter.json
says what it was made of, and filter.marks.npy which rows could be read. Signals: 12 leads in the
order of LEADS, 10 s at 500 Hz, in millivolts before normalisation and without a unit after it.
This file imports no other of the project.
"""
import argparse
import ast
import csv
import errno
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import sys
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
FS = 500            # Hz
SAMPLES = 5000      # 10 s
TRAIN_FOLDS, VAL_FOLD, TEST_FOLD = range(1, 9), 9, 10
STATEMENT = ""      # the first column of scp_statements.csv has no name
TASKS = {           # its columns: which flags the task's statements, which names their classes
    "all71": (None, STATEMENT),
    "diagnostic44": ("diagnostic", STATEMENT),
    "subclass23": ("diagnostic", "diagnostic_subclass"),
    "superclass5": ("diagnostic", "diagnostic_class"),
    "form19": ("form", STATEMENT),
    "rhythm12": ("rhythm", STATEMENT),
}
PREPROCESSING = ("filter", "zscore", "raw")

MILLIVOLTS = {"v": 1e3, "mv": 1.0, "uv": 1e-3, "µv": 1e-3, "μv": 1e-3, "nv": 1e-6}
MAX_MILLIVOLTS = 1e4            # an ECG has about 1; the largest float16 is 65504
MIN_FS, MAX_FS = 50, 100_000    # Hz, of what is resampled
BASELINE_WINDOW = 201           # samples of the running median, 0.4 s
LAYOUT = 3          # of the cache; one of another layout is built again
CHUNK = 32          # records a worker does at once
DATABASE, STATEMENTS, SUMS = "ptbxl_database.csv", "scp_statements.csv", "SHA256SUMS.txt"
URL = ("https://physionet.org/static/published-projects/ptb-xl/"
       "ptb-xl-a-large-publicly-available-electrocardiography-dataset-1.0.3.zip")


class InputError(ValueError):
    """What the user gave cannot be used; the message says what was found, wanted and to be done."""


def line_of(error):
    """An error as one line to a person; of a system error the file and the reason."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    line = f"{error.filename or 'the system'}: {error.strerror.lower()}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        line += "; make room, and run the same command again"
    return line


# ------------------------------------------------------------------------------------------- labels

class Labels(NamedTuple):
    ecg_id: np.ndarray      # (N,) int64
    patient_id: np.ndarray  # (N,) int64; -ecg_id where the patient is unknown
    fold: np.ndarray        # (N,) int64, 1 to 10
    y: np.ndarray           # (N, L) uint8
    classes: list           # L names, sorted


def load_labels(root, task):
    """The records that have a label of `task`, as Labels, from PTB-XL's two csv files alone.

    Protocol of Strodthoff et al. (2021): a statement counts as present whatever its likelihood, 0
    included; records without any label of the task are left out. The classes are all of the task in
    scp_statements.csv, whether or not a record has them. Raises InputError for an unknown task and
    for files that are missing or malformed.
    """
    check_task(task)
    rows, ecg_id = read_database(root, ("patient_id", "scp_codes", "strat_fold"))
    class_of = read_classes(root, task)
    classes = sorted(set(class_of.values()) - {None})
    y = np.zeros((len(rows), len(classes)), np.uint8)
    patient_id, fold = -ecg_id, np.empty(len(rows), np.int64)
    for i, row in enumerate(rows):
        for code in read_codes(root, i, row):
            if code not in class_of:
                wanted = f"statements of {STATEMENTS}, which has no {str(code)[:40]!r}"
                raise bad_cell(root, i, row, "scp_codes", f"{wanted}; fetch both files again")
            if class_of[code] is not None:
                y[i, classes.index(class_of[code])] = 1
        fold[i] = whole_number(root, i, row, "strat_fold")
        if not 1 <= fold[i] <= 10:
            raise bad_cell(root, i, row, "strat_fold", "1 to 10")
        if row["patient_id"]:
            patient_id[i] = whole_number(root, i, row, "patient_id")
    labelled = y.any(1)
    fields = (field[labelled] for field in (ecg_id, patient_id, fold, y))
    return Labels(*fields, classes)


def read_classes(root, task):
    """scp_statements.csv -> {statement: its class in the task, None where it has none}."""
    flag, name = TASKS[task]
    columns, class_of = {STATEMENT, flag, name} - {None}, {}
    for row in read_table(root, STATEMENTS, columns):
        flagged = flag is None or row[flag].strip() in ("1", "1.0")
        class_of[row[STATEMENT]] = (row[name] or None) if flagged else None
    return class_of


def read_codes(root, i, row):
    """A record's statements, of which PTB-XL writes a Python dict to their likelihoods."""
    try:
        codes = ast.literal_eval(row["scp_codes"])
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        codes = None
    if not isinstance(codes, dict):
        raise bad_cell(root, i, row, "scp_codes", "a dict such as {'NORM': 100.0}")
    return codes


def read_database(root, columns=()):
    """ptbxl_database.csv -> (rows, ecg_id (N,)). Raises InputError also for an ecg_id that is no
    number or stands twice."""
    rows = read_table(root, DATABASE, ("ecg_id", "filename_hr", *columns))
    ids = [whole_number(root, i, row, "ecg_id") for i, row in enumerate(rows)]
    if len(set(ids)) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise InputError(f"{Path(root, DATABASE)}: ecg_id {twice} stands twice; fetch the file "
                         "again")
    return rows, np.array(ids, np.int64)


def read_table(root, name, columns):
    """The rows of a csv file as dicts. Raises InputError where it is missing, empty, damaged or
    lacks one of `columns`."""
    path, fetch = Path(root, name), f"`python data.py --download --data {root}` fetches it"
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            reader = csv.DictReader(f)
            lacking = sorted(set(columns) - set(reader.fieldnames or []))
            if lacking:
                raise InputError(f"{path}: has no column {lacking[0]!r}; wanted PTB-XL's, {fetch}")
            rows = list(reader)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror.lower()}; wanted a PTB-XL folder: name it with "
                         f"--data, or {fetch}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a csv file in UTF-8 ({error}); fetch it again") from None
    for number, row in enumerate(rows, 2):
        if None in row or any(row[c] is None for c in columns):
            raise InputError(f"{path}: row {number} does not have {len(reader.fieldnames)} fields; "
                             "fetch the file again")
    if not rows:
        raise InputError(f"{path}: has no rows; fetch it again")
    return rows


def whole_number(root, i, row, column):
    try:
        value = float(row[column])
        if value == int(value) and abs(value) < 2**53:
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise bad_cell(root, i, row, column, "a whole number")


def bad_cell(root, i, row, column, wanted):
    return InputError(f"{Path(root, DATABASE)}: row {i + 2}: {column} is {row[column][:40]!r}; "
                      f"wanted {wanted}")


def check_task(task):
    if task not in TASKS:
        from difflib import get_close_matches
        near = get_close_matches(str(task), TASKS, 1, 0)[0]
        raise InputError(f"task {task!r} is unknown; did you mean {near}? (one of "
                         f"{', '.join(TASKS)})")


def subset(index, frac, seed):
    """A fraction of the records `index` (n,), sorted: max(1, floor(frac n + 0.5)) of them, set by
    `seed` alone.

    Nested: for one index and seed a smaller fraction lies inside every larger one. Raises
    InputError unless 0 < frac <= 1.
    """
    if not 0 < frac <= 1:
        raise InputError(f"the fraction is {frac}; wanted 0 < fraction <= 1")
    index = np.sort(np.asarray(index))
    chosen = np.random.RandomState(seed).permutation(index)[:max(1, int(frac * len(index) + 0.5))]
    return np.sort(chosen)


# ------------------------------------------------------------------------------------------ records

def read_record(path):
    """A WFDB record (path without extension) -> float32 (12, n) in millivolts, leads ordered as
    LEADS, and its rate in Hz.

    Leads are found by name, whatever their case and order; others are left out; voltages in other
    units are converted. Samples marked as missing are NaN. Raises InputError naming the path and
    what is wrong.
    """
    import wfdb
    try:
        record = wfdb.rdrecord(str(path))
        signal, names, units = record.p_signal, record.sig_name, record.units
        fs = float(record.fs)
    except Exception as error:  # wfdb raises nearly every type for a malformed header or short file
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: cannot be read as a WFDB record ({reason}); wanted its .hea "
                         "header and the signal file that this names") from None
    n = 0 if signal is None else len(signal)
    if not n or not fs > 0:
        raise InputError(f"{path}: has {n} samples at {fs:g} Hz; wanted an ECG")
    row = {(name or "").strip().lower(): i for i, name in reversed(list(enumerate(names)))}
    missing = [lead for lead in LEADS if lead.lower() not in row]
    if missing:
        raise InputError(f"{path}: has no lead {missing[0]} (it has {', '.join(map(str, names))}); "
                         f"wanted {', '.join(LEADS)}")
    rows = [row[lead.lower()] for lead in LEADS]
    scale = [MILLIVOLTS.get((units[i] or "").strip().lower()) for i in rows]
    if None in scale:
        i = rows[scale.index(None)]
        raise InputError(f"{path}: lead {names[i]} is in {units[i]!r}, which is no voltage; wanted "
                         "mV, uV, nV or V")
    return (signal[:, rows] * np.array(scale)).T.astype(np.float32), fs


def preprocess(signal, fs, how="filter"):
    """(12, n) in millivolts at `fs` Hz -> float32 (12, 5000): 10 s at 500 Hz, shorter records
    zero-padded at the end.

    how: "filter" (`remove_noise`, then z-score over all leads at once), "zscore" (the last step
    alone) or "raw" (millivolts). Missing samples (NaN) are interpolated, other rates resampled and
    the rest is cut off first. Normalised flat records are zeros. Raises InputError for a record
    that is no ECG: wrong shape, too short to filter, infinite or huge samples.
    """
    x = np.asarray(signal)
    check_preprocessing(how)
    if x.ndim != 2 or len(x) != len(LEADS) or not x.shape[1] or not 0 < fs < np.inf:
        raise InputError(f"a signal of shape {x.shape} at {fs} Hz; wanted (12, n) at a positive "
                         "rate")
    # 10 s, and one more for the filter that resamples
    x = x[:, :math.ceil(11 * min(fs, MAX_FS))].astype(np.float64)
    if not np.abs(x[~np.isnan(x)]).max(initial=0) <= MAX_MILLIVOLTS:
        raise InputError(f"a signal with infinite samples, or some beyond {MAX_MILLIVOLTS:g} mV; "
                         "wanted an ECG in millivolts")
    x = np.stack([fill_gaps(lead) for lead in x])
    x = resample(x, fs)[:, :SAMPLES]
    if how == "filter":
        x = remove_noise(x)
    if how != "raw":
        std = x.std()  # the small number beside it stands in ECGFounder's own preprocessing
        x = (x - x.mean()) / (std + 1e-8) if std >= 1e-6 else np.zeros_like(x)
    out = np.zeros((len(LEADS), SAMPLES), np.float32)
    out[:, :x.shape[1]] = x
    return out


def fill_gaps(lead):
    """One lead (n,) with its missing samples (NaN) interpolated: linearly, by the nearest value at
    the ends, else by 0."""
    missing = np.isnan(lead)
    if not missing.any():
        return lead
    if missing.all():
        return np.zeros_like(lead)
    time = np.arange(len(lead))
    return np.interp(time, time[~missing], lead[~missing])


def resample(x, fs):
    """(12, n) at `fs` Hz -> (12, n 500 / fs) at 500 Hz."""
    from scipy.signal import resample_poly
    if fs == FS:
        return x
    if not MIN_FS <= fs <= MAX_FS:
        raise InputError(f"a sampling rate of {fs} Hz; wanted {MIN_FS} to {MAX_FS} Hz")
    ratio = Fraction(FS / fs).limit_denominator(1000)
    # Beyond its ends a lead goes on along the line between its first and last sample, as zeros
    # there would be a step.
    ends = "line" if x.shape[1] > 1 else "constant"
    return resample_poly(x, ratio.numerator, ratio.denominator, axis=1, padtype=ends)


def remove_noise(x):
    """(12, n) at 500 Hz -> the same, filtered as ECGFounder's training data were: zero-phase 50 Hz
    notch (Q 30); zero-phase Butterworth band-pass of order 4, 0.67-40 Hz; minus the running median
    of 0.4 s."""
    from scipy import ndimage, signal as dsp
    if x.shape[1] < BASELINE_WINDOW:
        raise InputError(f"a signal of {x.shape[1] / FS:g} s; wanted at least "
                         f"{BASELINE_WINDOW / FS:g} s to filter it")
    x = dsp.filtfilt(*dsp.iirnotch(50, 30, FS), x)
    x = dsp.sosfiltfilt(dsp.butter(4, (0.67, 40), "bandpass", fs=FS, output="sos"), x)
    # One lead at a time: SciPy's fast running median is the one for 1-D arrays.
    median = [ndimage.median_filter(lead, BASELINE_WINDOW, mode="constant") for lead in x]
    return x - np.stack(median)


def check_preprocessing(how):
    if how not in PREPROCESSING:
        raise InputError(f"preprocessing {how!r} is unknown; wanted one of "
                         f"{', '.join(PREPROCESSING)}")


def load_signal(path, how):
    """A record as the cache keeps it: float16 (12, 5000). Raises InputError that names the path."""
    signal, fs = read_record(path)
    try:
        return preprocess(signal, fs, how).astype(np.float16)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


# -------------------------------------------------------------------------------------------- cache

class CacheFiles(NamedTuple):
    array: Path         # float16 (N, 12, 5000), once every record has been tried
    part: Path          # the array until then
    marks: Path         # bool (N,): which rows hold their record; each set after the row's bytes
    plan: Path          # what the array is made of, as JSON; written before the first row
    unreadable: Path    # csv of the records that could not be read


def cache_files(root, how):
    check_preprocessing(how)
    ends = (".npy", ".part.npy", ".marks.npy", ".json", ".unreadable.csv")
    return CacheFiles(*(Path(root, "cache", how + end) for end in ends))


def plan_cache(root, how):
    """What an up-to-date cache is made of, as plain data."""
    rows, ecg_id = read_database(root)
    for i, row in enumerate(rows):
        name = row["filename_hr"]
        if not name or os.path.isabs(name) or ".." in Path(name).parts:
            raise bad_cell(root, i, row, "filename_hr", f"a path inside {root}")
    return {"layout": LAYOUT, "preprocessing": how, "shape": [len(rows), len(LEADS), SAMPLES],
            "fs": FS, "leads": list(LEADS), "ecg_ids": ecg_id.tolist(),
            "source": [row["filename_hr"] for row in rows]}


def open_cache(array, files, plan):
    """(signals, marks) of a cache that is, or is being, made as planned; None where there is no
    such cache, or a damaged one."""
    try:
        if json.loads(files.plan.read_text()) != plan:
            return None
        signals, marks = (np.load(path, mmap_mode="r") for path in (array, files.marks))
    except (OSError, ValueError, EOFError):
        return None
    whole = signals.shape == tuple(plan["shape"]) and marks.shape == signals.shape[:1]
    whole &= signals.dtype == np.float16 and marks.dtype == bool
    return (signals, marks) if whole else None


def build_cache(root, how="filter", workers=None, skip_unreadable=False):
    """Preprocess every record of ptbxl_database.csv once into <root>/cache/<how>.npy.

    Up to date, it returns at once. Killed and started again, it goes on from what is done, with
    the same bytes at the end. Unreadable records are listed and the rest is done; then InputError
    is raised, unless `skip_unreadable` accepts a cache without them; each later build tries them
    again.
    """
    files, plan = cache_files(root, how), plan_cache(root, how)
    found, folder = open_cache(files.array, files, plan), files.array.parent
    fixed = skip_unreadable and not os.access(folder, os.W_OK)  # nothing can be tried again
    if found and (found[1].all() or fixed):
        return
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror.lower()}; the cache is kept there, remove "
                         "what is in its way, or copy the data to a folder that can be written "
                         "to") from None
    with locked(folder, [f"{how}.*"]):  # a second build waits here
        unreadable = fill(files, plan, root, workers or os.cpu_count())
        if unreadable:
            write_atomically(files.unreadable, lambda path: write_listing(path, unreadable))
            if not skip_unreadable:
                raise InputError(f"{unreadable[0][2]}; all {len(unreadable)} records that cannot "
                                 f"be read are listed in {files.unreadable}, the others are "
                                 "cached; fetch them again and run this again, or leave them out "
                                 "with --skip-unreadable")
        else:
            files.unreadable.unlink(missing_ok=True)
        if files.part.exists():
            os.replace(files.part, files.array)


def fill(files, plan, root, workers):
    """Write the rows that are not marked; returns [(ecg_id, name, why it cannot be read)]."""
    from tqdm import tqdm
    array = files.array if open_cache(files.array, files, plan) else files.part
    if open_cache(array, files, plan) is None:
        begin_cache(files, plan)
    ids, names, how = plan["ecg_ids"], plan["source"], plan["preprocessing"]
    marks = np.lib.format.open_memmap(files.marks, "r+")
    todo = np.flatnonzero(~marks).tolist()
    jobs = [(array, how, [(row, Path(root, names[row])) for row in todo[i:i + CHUNK]])
            for i in range(0, len(todo), CHUNK)]
    bar = tqdm(None, f"cache {how}", len(ids), unit="record", initial=len(ids) - len(todo),
               disable=None)
    unreadable = []
    with bar, open(array, "r+b") as written:
        for results in run_jobs(write_records, jobs, workers):
            os.fsync(written.fileno())
            marks[[row for row, why in results if why is None]] = True
            marks.flush()
            unreadable += [(ids[row], names[row], why) for row, why in results if why]
            bar.update(len(results))
    return unreadable


def begin_cache(files, plan):
    """Make an empty array and its marks. Raises InputError if the disk is too full."""
    for path in (files.plan, files.array, files.part):
        path.unlink(missing_ok=True)
    size, free = 2 * math.prod(plan["shape"]), shutil.disk_usage(files.part.parent).free
    if size > free:
        raise InputError(f"{files.array}: no space left: it wants {size / 1e9:.2g} GB and finds "
                         f"{free / 1e9:.2g}; make room and run this again")
    np.lib.format.open_memmap(files.part, "w+", np.float16, tuple(plan["shape"]))
    np.save(files.marks, np.zeros(plan["shape"][0], bool))
    write_atomically(files.plan, lambda path: path.write_text(json.dumps(plan)))


def write_records(array, how, records):
    """Write the records [(row, path)] into the array's file; returns [(row, None or why it cannot
    be read)]."""
    results, offset = [], np.load(array, mmap_mode="r").offset
    with open(array, "r+b") as f:
        for row, path in records:
            try:
                block = load_signal(path, how).tobytes()
            except InputError as error:
                results.append((row, str(error)))
                continue
            f.seek(offset + row * len(block))
            f.write(block)
            results.append((row, None))
    return results


def run_jobs(function, jobs, workers):
    """function(*job) of the jobs in `workers` processes; yields the results in order."""
    if workers == 1 or len(jobs) < 2:
        yield from (function(*job) for job in jobs)
        return
    import scipy.ndimage, scipy.signal, wfdb  # noqa: E401,F401  once, not in every worker
    fork = multiprocessing.get_context("fork")
    try:
        with ProcessPoolExecutor(min(workers, len(jobs)), fork, end_with_parent) as pool:
            yield from pool.map(function, *zip(*jobs))
    except BrokenProcessPool:
        raise InputError("a worker was killed, perhaps because memory ran out; run the same "
                         "command again, it goes on from what is done (fewer --workers need less "
                         "memory)") from None


def end_with_parent():
    """In a worker: end as soon as the building process does, however it ended."""
    import signal
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def write_listing(path, unreadable):
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows([("ecg_id", "filename_hr", "reason"), *unreadable])


def load_records(root, task, how="filter"):
    """(Labels, signals, rows): the task's records that are in the cache. The signal of record i is
    signals[rows[i]], of the memory-mapped array (N, 12, 5000), read only.

    Raises InputError where there is no cache or it is not up to date.
    """
    labels, files, plan = load_labels(root, task), cache_files(root, how), plan_cache(root, how)
    found = open_cache(files.array, files, plan)
    if found is None:
        raise InputError(f"{files.array}: missing or out of date; `python data.py --data {root} "
                         f"--preprocess {how}` builds it")
    signals, marks = found
    row = {ecg_id: i for i, ecg_id in enumerate(plan["ecg_ids"]) if marks[i]}
    there = np.array([i in row for i in labels.ecg_id.tolist()], bool)
    labels = Labels(*(field[there] for field in labels[:4]), labels.classes)
    return labels, signals, np.array([row[i] for i in labels.ecg_id.tolist()], np.int64)


class PTBXL(torch.utils.data.Dataset):
    """A task's records of some folds, for a DataLoader: signal (12, 5000) and y (L,), float32.

        build_cache("ptbxl")
        train = PTBXL("ptbxl", "all71", folds=TRAIN_FOLDS)
    """

    def __init__(self, root, task, folds, how="filter"):
        labels, _, rows = load_records(root, task, how)
        chosen = np.isin(labels.fold, folds)
        self.rows, self.y, self.classes = rows[chosen], labels.y[chosen], labels.classes
        self.path = cache_files(root, how).array  # an open array would be copied to each worker

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        signal = np.load(self.path, mmap_mode="r")[self.rows[i]].astype(np.float32)
        return torch.from_numpy(signal), torch.from_numpy(self.y[i].astype(np.float32))


def batches(signals, rows, device="cpu"):
    """For each array of row numbers in `rows`: those of `signals` as a float32 tensor on `device`.

    signals: a tensor, used where it is, or the cache's memory map; then a thread reads (and for a
    GPU pins and sends) the next batch while the caller works on this one.
    """
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


# -------------------------------------------------------------------------------------------- files

@contextmanager
def locked(folder, names, busy=None):
    """Keep other processes from writing the files `names` (glob patterns) of `folder`: wait for
    them, or raise InputError(busy).

    Temporary files of these names, which a killed process may have left, are removed.
    """
    try:
        import fcntl
    except ImportError:
        raise InputError("this system has no file locks for Python (fcntl); wanted Linux or macOS, "
                         "on Windows inside WSL") from None
    with open(Path(folder, ".lock"), "w") as lock:  # open for writing, as network disks want it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise InputError(f"{folder}: {busy}") from None
        for name in names:
            for path in Path(folder).glob(f".[0-9]*.{name}"):
                path.unlink(missing_ok=True)
        yield


def write_atomically(path, write):
    """Call `write` with a temporary path beside `path`, then give the file its name: it is complete
    or absent."""
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        with open(temporary, "r+b") as f:
            os.fsync(f.fileno())  # so that a power failure leaves no empty file under the name
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None  # a full disk names no file
    finally:
        temporary.unlink(missing_ok=True)


def versions():
    import scipy
    import wfdb
    return {"numpy": np.__version__, "scipy": scipy.__version__, "wfdb": wfdb.__version__}


# ----------------------------------------------------------------------------------------- download

def download(root, url=URL):
    """Fetch PTB-XL's zip, unpack its 500 Hz records and two tables into `root` and check them
    against SHA256SUMS.txt.

    Files that are there and right are not written again, and where all are, nothing is fetched.
    The zip is removed at the end. Raises InputError for a zip that is damaged or lacks a file, and
    for a file whose hash is not the published one.
    """
    import zipfile
    import zlib
    from http.client import HTTPException
    root, archive = Path(root), Path(root, "ptb-xl.zip")
    if (root / SUMS).exists():
        wanted = wanted_files((root / SUMS).read_text(errors="replace"), root / SUMS)
        if all(is_right(root / name, digest) for name, digest in wanted.items()):
            return
    root.mkdir(parents=True, exist_ok=True)
    if not archive.exists():
        try:
            torch.hub.download_url_to_file(url, str(archive))
        except (OSError, ValueError, HTTPException) as error:
            raise InputError(f"{url}: cannot be fetched ({line_of(error)}); run the same command "
                             "again, or --url for a mirror") from None
    try:
        with zipfile.ZipFile(archive) as z:
            unpack(z, root)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        archive.unlink()
        raise InputError(f"{url}: not PTB-XL 1.0.3's zip, or damaged ({error}), and removed; run "
                         "the same command again") from None
    archive.unlink()


def unpack(z, root):
    """Raises KeyError for a file that the zip lacks, BadZipFile for one with another hash."""
    from tqdm import tqdm
    from zipfile import BadZipFile
    sums = min((name for name in z.namelist() if Path(name).name == SUMS), key=len, default=SUMS)
    text, prefix = z.read(sums), sums[:-len(SUMS)]
    wanted = wanted_files(text.decode(errors="replace"), z.filename)
    for name, digest in tqdm(wanted.items(), "unpack", unit="file", disable=None):
        if is_right(root / name, digest):
            continue
        content = z.read(prefix + name)
        if hashlib.sha256(content).hexdigest() != digest:
            raise BadZipFile(f"{name} does not have the hash of {SUMS}")
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(root / name, lambda path: path.write_bytes(content))
    write_atomically(root / SUMS, lambda path: path.write_bytes(text))


def wanted_files(text, where):
    """SHA256SUMS.txt -> {name: hash} of the 500 Hz records and the two tables; only such names are
    ever written."""
    pairs = re.findall(r"^([0-9a-f]{64}) [ *]?(\S+)\s*$", text, re.MULTILINE)
    wanted = {name: digest for digest, name in pairs if name in (DATABASE, STATEMENTS)
              or re.fullmatch(r"records500/\d{5}/\d{5}_hr\.(dat|hea)", name)}
    if not {DATABASE, STATEMENTS} <= set(wanted):
        raise InputError(f"{where}: its {SUMS} does not list {DATABASE} and {STATEMENTS}; wanted "
                         "PTB-XL 1.0.3's, remove the file and run this again")
    return wanted


def is_right(path, digest):
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == digest


# ------------------------------------------------------------------------------------- command line

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    add = parser.add_argument
    add("--data", default="ptbxl", help="PTB-XL's folder (default: ptbxl)")
    add("--preprocess", choices=PREPROCESSING, default="filter",
        help="default: filter, as ECGFounder's authors demand")
    add("--workers", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    add("--skip-unreadable", action="store_true",
        help="finish the cache without records that cannot be read")
    add("--download", action="store_true", help="fetch PTB-XL 1.0.3 into the folder first")
    add("--url", default=URL, help="the zip to fetch (default: PhysioNet's)")
    args = parser.parse_args(argv)
    try:
        if args.workers < 1:
            raise InputError(f"--workers is {args.workers}; wanted at least 1")
        if args.download:
            download(args.data, args.url)
        build_cache(args.data, args.preprocess, args.workers, args.skip_unreadable)
        files = cache_files(args.data, args.preprocess)
        marks, size = np.load(files.marks), files.array.stat().st_size
        line = f"{files.array}: {marks.sum():,} records, {size / 1e9:.2f} GB"
        if not marks.all():
            line += f", {np.sum(~marks)} unreadable ones left out"
        print(line)
    except (InputError, OSError) as error:
        sys.stderr.write(f"data.py: {line_of(error)}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("data.py: interrupted; run the same command again, it goes on from what "
                         "is done\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
