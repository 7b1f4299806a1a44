"""ECG datasets: labels (of PTB-XL's tasks or of a table of your own), records, preprocessing, and
a cache of preprocessed signals.

    python data.py --download --data ptbxl      # fetch PTB-XL 1.0.3 (1.7 GB), check every hash
    python data.py --data ptbxl                 # preprocess every record once; prints where to
    python data.py --data clinic --task clinic.csv --leads I --preprocess raw

The cache is one float16 array (N, leads, 5000), 2.6 GB for PTB-XL, one row per row of the
dataset's table; np.load(path, mmap_mode="r") reads it. Next to it, a .json says what it was made
of, and a .marks.npy which rows could be read. Signals: leads in the order of LEADS, 10 s at 500
Hz, in millivolts, or unitless after normalization. This file imports no other project file.
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
import threading
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
FS = 500            # Hz
SAMPLES = 5000      # 10 s
TRAIN_FOLDS, VAL_FOLD, TEST_FOLD = range(1, 9), 9, 10
STATEMENT = ""      # the first column of scp_statements.csv has no name
TASKS = {           # (column that flags the task's statements, column that names their class)
    "all71": (None, STATEMENT),
    "diagnostic44": ("diagnostic", STATEMENT),
    "subclass23": ("diagnostic", "diagnostic_subclass"),
    "superclass5": ("diagnostic", "diagnostic_class"),
    "form19": ("form", STATEMENT),
    "rhythm12": ("rhythm", STATEMENT),
}
PTBXL_COLUMNS = ("ecg_id", "patient_id", "scp_codes", "strat_fold", "filename_hr")
LABELS = {"0": 0, "1": 1, "False": 0, "True": 1, "FALSE": 0, "TRUE": 1, "false": 0, "true": 1}
NOT_CLASSES = ("record", "ecg_id", "patient_id", "fold")    # of a custom table's columns
UNKNOWN = r"(nan?|n/a|<na>|none|null|-\d+(\.0)?)?"      # patient_id: each record is its own
PREPROCESSING = ("filter", "zscore", "raw")

MILLIVOLTS = {"v": 1e3, "mv": 1.0, "uv": 1e-3, "nv": 1e-6}
MICROVOLTS = rb"/(\xc2\xb5|\xce\xbc|\xb5)[vV]"  # micro sign or Greek mu, in UTF-8 or Latin-1
MAX_MILLIVOLTS = 1e4            # an ECG's amplitude is about 1; the largest float16 is 65504
MIN_FS, MAX_FS = 50, 100_000    # Hz, limits for resampling
BASELINE_WINDOW = 201           # samples of the running median, 0.4 s
LAYOUT = 4          # version of the cache format; caches of other versions are ignored
CHUNK = 32          # records that are read before their rows are marked
DATABASE, STATEMENTS, SUMS = "ptbxl_database.csv", "scp_statements.csv", "SHA256SUMS.txt"
URL = ("https://physionet.org/static/published-projects/ptb-xl/"
       "ptb-xl-a-large-publicly-available-electrocardiography-dataset-1.0.3.zip")


class InputError(ValueError):
    """Unusable user input; the message says what was found, what was wanted and what to do."""


def line_of(error):
    """An error as one line for the user; for a system error, the file and the reason."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    line = f"{error.filename or 'the system'}: {error.strerror.lower()}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        line += "; make room, and run the same command again"
    return line


# ------------------------------------------------------------------------------------------- tables

class Table(NamedTuple):
    """The table of a dataset: ptbxl_database.csv, or a custom one."""
    path: Path
    rows: list              # a dict for each record
    ecg_id: np.ndarray      # (N,) int64, or str where they are not whole numbers
    records: list           # N paths of WFDB records, relative to the dataset's folder

    def bad_cell(self, i, column, wanted):
        return InputError(f"{self.path}: row {i + 2}: {column} is {self.rows[i][column][:40]!r}; "
                          f"wanted {wanted}")


def is_own(task):
    """Whether a task is a custom .csv table."""
    return str(task).lower().endswith(".csv")


def check_task(task):
    if not is_own(task) and task not in TASKS:
        from difflib import get_close_matches
        near = "".join(f" did you mean {name}?" for name in get_close_matches(str(task), TASKS, 1))
        raise InputError(f"task {task!r} is unknown;{near} wanted one of {', '.join(TASKS)}, or a "
                         ".csv table")


def read_table(root, task):
    """All records of a dataset, with or without a label of the task. Raises InputError for a table
    that is missing or malformed, or that lists a record twice or one outside `root`."""
    check_task(task)
    path, record, columns = Path(root, DATABASE), "filename_hr", PTBXL_COLUMNS
    if is_own(task):
        path, record, columns = Path(task), "record", ["record"]
    rows = read_csv(path, columns)
    for row in rows:
        row[record] = strip_extension(row[record].strip())
    column = "ecg_id" if "ecg_id" in rows[0] else record
    ecg_id = identifiers([cell_of(row, column) for row in rows])
    table = Table(path, rows, ecg_id, [row[record] for row in rows])
    for i, name in enumerate(table.records):
        if "ecg_id" in rows[i] and not cell_of(rows[i], "ecg_id"):
            raise table.bad_cell(i, "ecg_id", "an id for each record")
        if not name or os.path.isabs(name) or ".." in Path(name).parts:
            raise table.bad_cell(i, record, f"a path inside {root}, relative to it")
    for what, values in (("record", table.records), ("ecg_id", table.ecg_id.tolist())):
        value, count = Counter(values).most_common(1)[0]
        if count > 1:
            raise InputError(f"{path}: {what} {value} appears twice; wanted one row per record")
    return table


def read_csv(path, columns):
    """The rows of a csv file as dicts. Raises InputError where it is missing, empty, damaged or
    lacks one of `columns`."""
    fetch = ""
    if path.name in (DATABASE, STATEMENTS):
        fetch = ("; is --data PTB-XL's folder? `python data.py --download --data "
                 f"{path.parent}` fetches it")
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            names = [name.strip() for name in next(csv.reader(f), [])]
            rows = list(csv.DictReader(f, names))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror.lower()}; wanted a table of records"
                         f"{fetch}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a csv file in UTF-8 ({error}); save it as one"
                         f"{fetch}") from None
    lacking = [column for column in columns if column not in names]
    if lacking or len(set(names)) < len(names):
        what = f"has no column {lacking[0]!r}" if lacking else "has a column name twice"
        raise InputError(f"{path}: {what} (it has {', '.join(names)[:200]}); wanted "
                         f"{', '.join(map(repr, columns))}, separated by commas{fetch}")
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise InputError(f"{path}: row {number} does not have {len(names)} fields{fetch}")
    if not rows:
        raise InputError(f"{path}: has no rows{fetch}")
    return rows


def identifiers(cells):
    """Names or numbers -> (N,) int64 where all are whole numbers, else str."""
    if all(re.fullmatch(r"-?(0|[1-9]\d{0,14})", cell) for cell in cells):
        return np.array(list(map(int, cells)))
    return np.array(cells)


def patients_of(rows):
    """The column patient_id as `identifiers`; each unknown one gets a negative number of its own.
    """
    cells = [cell_of(row, "patient_id") for row in rows]
    return identifiers([str(-1 - i) if is_unknown(cell) else cell for i, cell in enumerate(cells)])


def is_unknown(patient):
    return re.fullmatch(UNKNOWN, str(patient), re.IGNORECASE) is not None


def cell_of(row, column):
    """A cell without spaces around it, and a whole number without the ".0" that pandas adds."""
    return re.sub(r"^(-?\d+)\.0$", r"\1", row[column].strip())


# ------------------------------------------------------------------------------------------- labels

class Labels(NamedTuple):
    ecg_id: np.ndarray      # (N,) int64 or str
    record: np.ndarray      # (N,) str: paths of WFDB records, relative to the dataset's folder
    row: np.ndarray         # (N,) int64: place in the table and in the cache
    patient_id: np.ndarray  # (N,) int64 or str; a negative number where the patient is unknown
    fold: np.ndarray        # (N,) int64, 1 to 10
    y: np.ndarray           # (N, L) uint8
    classes: list           # L names

    def take(self, chosen):
        """The records that an index or a mask selects."""
        return Labels(*(field[chosen] for field in self[:-1]), self.classes)

    def of_patients(self, records):
        """(N,) bool: the records of patients with at least one of `records`, a list of names."""
        return np.isin(self.patient_id, self.patient_id[np.isin(self.record, records)])


def load_labels(root, task):
    """The records of a task as Labels, from csv files alone. Raises InputError for an unknown task
    and for files that are missing or malformed.

    task: one of TASKS, with PTB-XL in the folder `root`, or a custom table with a header row:
    `record` (a WFDB record's path without extension, relative to `root`), optionally `ecg_id`,
    `patient_id` and `fold` (1-8 train, 9 validates, 10 tests); every other column is a class, of
    0 and 1. Without `fold`, each patient is assigned to one of ten folds by a hash.
    """
    table, own = read_table(root, task), is_own(task)
    patient_id, fold, y, classes = (read_own_labels(table) if own else
                                    read_ptbxl_labels(root, task, table))
    labels = Labels(table.ecg_id, np.array(table.records), np.arange(len(y)), patient_id, fold, y,
                    classes)
    return labels if own else labels.take(labels.y.any(1))


def read_ptbxl_labels(root, task, table):
    """Protocol of Strodthoff et al. (2021): a statement counts as present whatever its likelihood,
    0 included; records without any label of the task are left out. The classes are all those of the
    task in scp_statements.csv, sorted, whether or not any record has them."""
    class_of = read_classes(root, task)
    classes = sorted(set(class_of.values()) - {None})
    place = {name: c for c, name in enumerate(classes)}
    y = np.zeros((len(table.rows), len(classes)), np.uint8)
    for i in range(len(table.rows)):
        for code in read_codes(table, i):
            if code not in class_of:
                raise table.bad_cell(i, "scp_codes", f"statements of {STATEMENTS}, which has no "
                                     f"{str(code)[:40]!r}; fetch both files again")
            if class_of[code] is not None:
                y[i, place[class_of[code]]] = 1
    return patients_of(table.rows), read_folds(table, "strat_fold"), y, classes


def read_classes(root, task):
    """scp_statements.csv -> {statement: its class in the task, None where it has none}."""
    flag, name = TASKS[task]
    columns, class_of = sorted({STATEMENT, flag or name, name}), {}
    for row in read_csv(Path(root, STATEMENTS), columns):
        flagged = flag is None or row[flag].strip() in ("1", "1.0")
        class_of[row[STATEMENT]] = (row[name] or None) if flagged else None
    return class_of


def read_codes(table, i):
    """A record's statements: PTB-XL stores them as a Python dict {statement: likelihood}."""
    try:
        return {**ast.literal_eval(table.rows[i]["scp_codes"])}  # TypeError for what is no dict
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        raise table.bad_cell(i, "scp_codes", "a dict such as {'NORM': 100.0}") from None


def read_folds(table, column):
    cells, folds = [cell_of(row, column) for row in table.rows], list(map(str, range(1, 11)))
    for i, cell in enumerate(cells):
        if cell not in folds:
            raise table.bad_cell(i, column, "a fold, 1 to 10 (1-8 train, 9 validates, 10 tests)")
    return np.array(cells, np.int64)


def read_own_labels(table):
    columns = list(table.rows[0])
    classes = [column for column in columns if column not in NOT_CLASSES]
    if not classes:
        raise InputError(f"{table.path}: has no class; wanted, besides {', '.join(columns)}, a "
                         "column of 0 and 1 for each class")
    if "" in classes:
        raise InputError(f"{table.path}: column {columns.index('') + 1} has no name; wanted one "
                         "for each class (pandas: to_csv(..., index=False))")
    y = np.empty((len(table.rows), len(classes)), np.uint8)
    for i, row in enumerate(table.rows):
        for c, name in enumerate(classes):
            cell = row[name] if row[name] in LABELS else cell_of(row, name)
            if cell not in LABELS:
                raise table.bad_cell(i, name, "0 or 1, as every column is a class except "
                                     f"{', '.join(NOT_CLASSES)}")
            y[i, c] = LABELS[cell]
    rows = [{"patient_id": "", **row} for row in table.rows]    # unknown without such a column
    people = [cell_of(row, "patient_id") for row in rows]
    people = [row["record"] if is_unknown(who) else who for row, who in zip(rows, people)]
    # By a hash, so that a patient is in the same fold in every table and on every machine.
    dealt = np.array([1 + zlib.crc32(name.encode()) % 10 for name in people])
    folds = read_folds(table, "fold") if "fold" in columns else dealt
    return patients_of(rows), folds, y, classes


def subset(index, frac, seed):
    """A random fraction of the records `index` (n,), sorted: max(1, floor(frac n + 0.5)) of them,
    drawn with `seed`.

    Nested: with the same index and seed, a smaller fraction is a subset of every larger one. Raises
    InputError unless 0 < frac <= 1.
    """
    if not 0 < frac <= 1:
        raise InputError(f"the fraction is {frac}; wanted 0 < fraction <= 1")
    index = np.sort(np.asarray(index))
    chosen = np.random.RandomState(seed).permutation(index)[:max(1, int(frac * len(index) + 0.5))]
    return np.sort(chosen)


# ------------------------------------------------------------------------------------------ records

def parse_leads(text):
    """"v1,II" -> ("II", "V1"), in the order of LEADS. Raises InputError for an unknown name."""
    asked, known = text.split(","), {lead.lower(): lead for lead in LEADS}
    unknown = [name for name in asked if name.strip().lower() not in known]
    if unknown:
        raise InputError(f"--leads {text}: {unknown[0]!r} is unknown; wanted some of "
                         f"{','.join(LEADS)}")
    return tuple(sorted({known[name.strip().lower()] for name in asked}, key=LEADS.index))


def strip_extension(path):
    """A record's path without the extension of one of its files."""
    return re.sub(r"\.(hea|dat|mat)$", "", str(path))


def read_record(path, leads=LEADS):
    """A WFDB record (path without extension) -> float32 (leads, n) in millivolts, and its
    sampling rate in Hz.

    Leads are found by name, whatever their case and order; others are dropped; other units of
    voltage are converted. Samples marked as missing are NaN. Raises InputError naming the path and
    what is wrong.
    """
    import wfdb
    try:
        record = wfdb.rdrecord(str(path))
        signal, names, units, fs = record.p_signal, record.sig_name, record.units, float(record.fs)
        if re.search(MICROVOLTS, Path(f"{path}.hea").read_bytes()):  # wfdb drops the micro sign
            units = ["uV" if unit in ("V", "v") else unit for unit in units]
    except Exception as error:  # wfdb raises almost anything for a malformed header or short file
        known = isinstance(error, OSError) and error.strerror
        reason = line_of(error) if known else f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: cannot be read as a WFDB record ({reason}); wanted its .hea "
                         "header and the signal file it names") from None
    n = 0 if signal is None else len(signal)
    if not n or not fs > 0:
        raise InputError(f"{path}: has {n} samples at {fs:g} Hz; wanted an ECG")
    row = {(name or "").strip().lower(): i for i, name in reversed(list(enumerate(names)))}
    missing = [lead for lead in leads if lead.lower() not in row]
    if missing:
        raise InputError(f"{path}: has no lead {missing[0]} (it has {', '.join(map(str, names))}); "
                         f"wanted {', '.join(leads)}; --leads trains on fewer")
    rows = [row[lead.lower()] for lead in leads]
    scale = [MILLIVOLTS.get((units[i] or "").strip().lower()) for i in rows]
    if None in scale:
        i = rows[scale.index(None)]
        raise InputError(f"{path}: lead {names[i]} is in {units[i]!r}, which is not a voltage; "
                         "wanted mV, uV, nV or V")
    return (signal[:, rows] * np.array(scale)).T.astype(np.float32), fs


def preprocess(signal, fs, how="filter"):
    """(leads, n) in millivolts at `fs` Hz -> float32 (leads, 5000): 10 s at 500 Hz, shorter records
    zero-padded at the end.

    how: "filter" (`remove_noise`, then z-score over all leads at once), "zscore" (the last step
    alone) or "raw" (millivolts). First, missing samples (NaN) are interpolated, other sampling
    rates resampled and what is beyond 10 s is cut off. Flat records normalize to zeros. Raises
    InputError for what is not an ECG: wrong shape, too short to filter, infinite or huge samples.
    """
    x = np.asarray(signal)
    check_preprocessing(how)
    if x.ndim != 2 or not x.size or not 0 < fs < np.inf:
        raise InputError(f"a signal of shape {x.shape} at {fs} Hz; wanted (leads, n) at a positive "
                         "rate")
    seconds = 10 if fs == FS else 11    # one more for the filter that resamples
    x = x[:, :math.ceil(seconds * min(fs, MAX_FS))].astype(np.float64)
    if not np.abs(x[~np.isnan(x)]).max(initial=0) <= MAX_MILLIVOLTS:
        raise InputError(f"a signal with infinite samples, or some beyond {MAX_MILLIVOLTS:g} mV; "
                         "wanted an ECG in millivolts")
    x = resample(np.stack([fill_gaps(lead) for lead in x]), fs)[:, :SAMPLES]
    if how == "filter":
        x = remove_noise(x)
    if how != "raw":
        std = x.std()  # the 1e-8 is from ECGFounder's own preprocessing
        x = (x - x.mean()) / (std + 1e-8) if std >= 1e-6 else np.zeros_like(x)
    return np.pad(x.astype(np.float32), ((0, 0), (0, SAMPLES - x.shape[1])))


def fill_gaps(lead):
    """One lead (n,) with its missing samples (NaN) filled: by linear interpolation, at the ends by
    the nearest value, with zeros if all are missing."""
    missing = np.isnan(lead)
    if not missing.any():
        return lead
    if missing.all():
        return np.zeros_like(lead)
    time = np.arange(len(lead))
    return np.interp(time, time[~missing], lead[~missing])


def resample(x, fs):
    """(leads, n) at `fs` Hz -> (leads, n 500 / fs) at 500 Hz."""
    from scipy.signal import resample_poly
    if fs == FS:
        return x
    if not MIN_FS <= fs <= MAX_FS:
        raise InputError(f"a sampling rate of {fs} Hz; wanted {MIN_FS} to {MAX_FS} Hz")
    ratio = Fraction(FS / fs).limit_denominator(1000)
    # Beyond its ends a lead is extended along the line through its first and last samples, as
    # zeros there would make a step.
    ends = "line" if x.shape[1] > 1 else "constant"
    return resample_poly(x, ratio.numerator, ratio.denominator, axis=1, padtype=ends)


def remove_noise(x):
    """(leads, n) at 500 Hz -> the same, filtered as ECGFounder's training data were: zero-phase 50
    Hz notch (Q 30); zero-phase Butterworth band-pass of order 4, 0.67-40 Hz; minus the running
    median of 0.4 s."""
    from scipy import ndimage, signal as dsp
    if x.shape[1] < BASELINE_WINDOW:
        raise InputError(f"a signal of {x.shape[1] / FS:g} s; wanted at least "
                         f"{BASELINE_WINDOW / FS:g} s to filter it")
    x = dsp.filtfilt(*dsp.iirnotch(50, 30, FS), x)
    x = dsp.sosfiltfilt(dsp.butter(4, (0.67, 40), "bandpass", fs=FS, output="sos"), x)
    # One lead at a time: SciPy's fast running median is the one for 1-D arrays.
    return x - [ndimage.median_filter(lead, BASELINE_WINDOW, mode="constant") for lead in x]


def check_preprocessing(how):
    if how not in PREPROCESSING:
        raise InputError(f"preprocessing {how!r} is unknown; wanted one of "
                         f"{', '.join(PREPROCESSING)}")


def load_windows(path, how="filter", leads=LEADS, windows=None):
    """The consecutive 10 s windows of a record -> float16 (windows, leads, 5000); the cache holds
    the first. A remainder of less than 10 s is dropped, unless it is all there is. `windows` caps
    their number. Raises InputError naming the path.
    """
    signal, fs = read_record(path, leads)
    whole = max(1, int(signal.shape[1] / fs / 10 + 1e-6))
    starts = [round(10 * fs * i) for i in range(min(whole, windows or whole))]
    try:
        return np.stack([preprocess(signal[:, i:], fs, how).astype(np.float16) for i in starts])
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


# -------------------------------------------------------------------------------------------- cache

class Cache(NamedTuple):
    """The files of a cache; their name identifies what it was made of."""
    array: Path         # float16 (N, leads, 5000), once every record has been tried
    part: Path          # the array until then
    marks: Path         # bool (N,): which rows hold their record; set once a row is written
    plan: Path          # what the array is made of, as JSON
    unreadable: Path    # csv of the records that could not be read

    def open(self, plan, array=None):
        """(signals, marks), read only; None where one is missing or damaged."""
        try:
            signals, marks = (np.load(p, mmap_mode="r") for p in (array or self.array, self.marks))
        except (OSError, ValueError, EOFError):
            return None
        whole = list(signals.shape) == plan["shape"] and marks.shape == signals.shape[:1]
        whole &= signals.dtype == np.float16 and marks.dtype == bool
        return (signals, marks) if whole else None

    def left_out(self):
        """A line on the records that could not be read, None where there are none."""
        marks = np.load(self.marks)
        if marks.all():
            return None
        return (f"{np.sum(~marks)} of {len(marks)} records cannot be read and are left out, see "
                f"{self.unreadable}")


def find_cache(root, task="all71", how="filter", leads=LEADS):
    """(Cache, its plan: what it is made of, as plain data), whether or not it is there."""
    check_preprocessing(how)
    table = read_table(root, task)
    plan = {"layout": LAYOUT, "preprocessing": how, "leads": list(leads), "fs": FS,
            "shape": [len(table.rows), len(leads), SAMPLES], "ecg_ids": table.ecg_id.tolist(),
            "records": table.records}
    name = f"{how}-{zlib.crc32(json.dumps(plan).encode()):08x}"
    ends = (".npy", ".part.npy", ".marks.npy", ".json", ".unreadable.csv")
    return Cache(*(Path(root, "cache", name + end) for end in ends)), plan


def build_cache(root, task="all71", how="filter", leads=LEADS, workers=None,
                skip_unreadable=False):
    """Preprocess every record of the dataset's table once into an array in <root>/cache; returns
    the Cache.

    Returns at once if the cache is up to date. A killed build, when restarted, resumes where it
    stopped and ends with the same bytes. Unreadable records are listed and the rest is cached; then
    InputError is raised, unless `skip_unreadable` accepts a cache without them; a build without it
    tries them again. Later changes to a record's files are not noticed: delete the cache folder.
    """
    cache, plan = find_cache(root, task, how, leads)
    found, folder = cache.open(plan), cache.array.parent
    if found and (skip_unreadable or found[1].all()):
        return cache
    if not Path(root).is_dir():
        raise InputError(f"{root}: no such folder; wanted the dataset's, give it with --data")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror.lower()}; the cache is kept there, remove "
                         "what is in the way, or use a writable folder with links to the "
                         "data") from None
    with locked(folder, [f"{cache.array.stem}.*"]):  # a second build waits here for the first
        # A complete cache that lacks unreadable records is filled in place.
        array = cache.array if cache.open(plan) else cache.part
        unreadable = fill(cache, array, plan, root, workers or os.cpu_count())
        if unreadable:
            write_atomically(cache.unreadable, lambda path: write_listing(path, unreadable))
            if not skip_unreadable:
                raise InputError(f"{unreadable[0][2]}; all {len(unreadable)} records that cannot "
                                 f"be read are listed in {cache.unreadable}, the others are "
                                 "cached; fix them and run this again, or leave them out with "
                                 "--skip-unreadable")
        else:
            cache.unreadable.unlink(missing_ok=True)
        os.replace(array, cache.array)
    return cache


def read_rows(root, plan, rows):
    """[(row, its signal, why it cannot be read)]; one of the last two is None."""
    results = []
    for row in rows:
        path, signal, why = Path(root, plan["records"][row]), None, None
        try:
            signal = load_windows(path, plan["preprocessing"], plan["leads"], 1)[0]
        except InputError as error:
            why = str(error)
        results.append((row, signal, why))
    return results


def fill(cache, array, plan, root, workers):
    """Write the rows of the file `array` that are not marked; returns [(ecg_id, record, why it
    cannot be read)]."""
    import scipy.ndimage, scipy.signal, wfdb  # noqa: E401,F401  once, not in every worker
    if cache.open(plan, array) is None:
        begin_cache(cache, plan)
    marks = np.lib.format.open_memmap(cache.marks, "r+")
    todo = np.flatnonzero(~marks).tolist()
    processes = min(workers, math.ceil(len(todo) / CHUNK))
    loader = torch.utils.data.DataLoader(
        todo, CHUNK, collate_fn=partial(read_rows, root, plan), worker_init_fn=end_with_parent,
        num_workers=processes if processes > 1 else 0)
    start = np.load(array, mmap_mode="r").offset    # where row 0 begins
    size = 2 * math.prod(plan["shape"][1:])         # bytes of a row
    bar = tqdm(None, cache.array.stem, len(marks), initial=len(marks) - len(todo), unit="record",
               disable=None)
    unreadable = []
    with bar, open(array, "r+b") as f:
        for chunk in chunks_of(loader):
            for row, signal, why in chunk:
                if why:
                    unreadable.append((plan["ecg_ids"][row], plan["records"][row], why))
                    continue
                f.seek(start + row * size)
                f.write(signal.tobytes())  # with a memory map, a full disk would kill the process
            f.flush()
            os.fsync(f.fileno())
            marks[[row for row, _, why in chunk if not why]] = True
            marks.flush()
            bar.update(len(chunk))
    return unreadable


def end_with_parent(worker):
    """In a worker: exit as soon as the parent process does. The DataLoader's own check does not
    help a worker blocked in sending, as its siblings keep the pipe open."""
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def chunks_of(loader):
    try:
        yield from loader
    except RuntimeError as error:  # how the DataLoader reports it
        raise InputError(f"a worker was killed, perhaps because memory ran out ({error}); run the "
                         "same command again, it resumes where it stopped (fewer --workers need "
                         "less memory)") from None


def begin_cache(cache, plan):
    """Make an empty array and its marks. Raises InputError if the disk is too full."""
    cache.marks.unlink(missing_ok=True)
    cache.part.unlink(missing_ok=True)
    size, free = 2 * math.prod(plan["shape"]), shutil.disk_usage(cache.part.parent).free
    if size > free:
        raise InputError(f"{cache.array}: no space left: it needs {size / 1e9:.2g} GB, "
                         f"{free / 1e9:.2g} are free; make room and run this again")
    np.lib.format.open_memmap(cache.part, "w+", np.float16, tuple(plan["shape"]))
    write_atomically(cache.plan, lambda path: path.write_text(json.dumps(plan)))
    np.save(cache.marks, np.zeros(plan["shape"][0], bool))


def write_listing(path, unreadable):
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows([("ecg_id", "record", "reason"), *unreadable])


def load_records(root, task, how="filter", leads=LEADS):
    """(Labels, signals): the task's records that are in the cache. The signal of record i is
    signals[labels.row[i]], of the memory-mapped array (N, leads, 5000), read only.

    Raises InputError where there is no cache.
    """
    labels, (cache, plan) = load_labels(root, task), find_cache(root, task, how, leads)
    found = cache.open(plan)
    if found is None:
        raise InputError(f"{cache.array}: missing or damaged; `python data.py --data {root} --task "
                         f"{task} --preprocess {how} --leads {','.join(leads)}` builds it")
    signals, marks = found
    if not marks.any():
        raise InputError(f"{root}: none of its {len(marks)} records could be read; the reasons are "
                         f"in {cache.unreadable}")
    return labels.take(marks[labels.row]), signals


class ECGDataset(torch.utils.data.Dataset):
    """A task's records of some folds, for a DataLoader: signal (leads, 5000) and y (L,), float32.

        build_cache("ptbxl")
        train = ECGDataset("ptbxl", "all71", folds=TRAIN_FOLDS)
    """

    def __init__(self, root, task, folds, how="filter", leads=LEADS):
        labels, signals = load_records(root, task, how, leads)
        self.labels = labels.take(np.isin(labels.fold, folds))
        self.path = signals.filename  # the array itself would be copied to each worker

    def __len__(self):
        return len(self.labels.row)

    def __getitem__(self, i):
        signal = np.load(self.path, mmap_mode="r")[self.labels.row[i]].astype(np.float32)
        return torch.from_numpy(signal), torch.from_numpy(self.labels.y[i].astype(np.float32))


def batches(signals, rows, device="cpu"):
    """For each array of row numbers in `rows`, yield those rows of `signals` as a float32 tensor on
    `device`.

    signals: a tensor, used on its own device, or the cache's memory map; then a thread reads (for a
    GPU also pins and copies) the next batch while the caller works on the current one.
    """
    if isinstance(signals, torch.Tensor):
        for index in rows:
            yield signals.index_select(0, to_device(index, signals.device)).float()
        return

    def load(index):
        return to_device(signals[index], device)  # a copy of these rows alone

    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for index in rows:
            ahead, batch = pool.submit(load, index), ahead
            if batch is not None:
                yield batch.result().float()
        if ahead is not None:
            yield ahead.result().float()


def to_device(array, device):
    """An array as a tensor on `device`, without waiting for a busy GPU."""
    tensor = torch.as_tensor(array)
    if torch.device(device).type != "cuda":
        return tensor
    with torch.cuda.device(device):  # a new thread starts on the first GPU
        return tensor.pin_memory().to(device, non_blocking=True)


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
        raise InputError("this system has no file locks for Python (fcntl); wanted Linux, macOS "
                         "or, on Windows, WSL") from None
    with open(Path(folder, ".lock"), "w") as lock:  # writable, as network file systems require
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise InputError(f"{folder}: {busy}") from None
        for name in names:
            for path in Path(folder).glob(f".[0-9]*.{name}"):
                path.unlink(missing_ok=True)
        yield


def write_atomically(path, write):
    """Call `write` with a temporary path next to `path`, then rename it to `path`, which is never
    half-written."""
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
        raise OSError(error.errno, error.strerror, str(path)) from None  # ENOSPC names no file
    finally:
        temporary.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------- download

def download(root, url=URL):
    """Fetch PTB-XL's zip, unpack its 500 Hz records and two tables into `root` and check them
    against SHA256SUMS.txt; files already there with the right hash are not rewritten.

    A zip that is there already, as ptb-xl.zip in `root`, is not fetched. Raises InputError for a
    zip that is damaged or lacks a file, and for a file whose hash is not the published one. The zip
    is removed at the end.
    """
    from http.client import HTTPException
    root, archive = Path(root), Path(root, "ptb-xl.zip")
    if (root / SUMS).exists():
        wanted = wanted_files((root / SUMS).read_text(errors="replace"))
        if wanted and all(hash_matches(root / name, digest) for name, digest in wanted.items()):
            return
    root.mkdir(parents=True, exist_ok=True)
    fetched = not archive.exists()
    try:
        if fetched:
            torch.hub.download_url_to_file(url, str(archive))
    except (OSError, ValueError, HTTPException) as error:
        raise InputError(f"{url}: cannot be fetched ({line_of(error)}); run the same command "
                         "again, give a mirror with --url, or fetch it by hand (`wget -c` resumes) "
                         f"to {archive}") from None
    try:
        with zipfile.ZipFile(archive) as z:
            unpack(z, root)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        if not fetched:
            raise InputError(f"{archive}: not PTB-XL 1.0.3's zip, or not all of it ({error}); "
                             "complete or remove it and run this again") from None
        archive.unlink()
        raise InputError(f"{url}: not PTB-XL 1.0.3's zip, or damaged ({error}); the download was "
                         "removed, run the same command again") from None
    archive.unlink()


def unpack(z, root):
    """Raises KeyError for a file that the zip lacks, BadZipFile for one with another hash."""
    sums = min((name for name in z.namelist() if Path(name).name == SUMS), key=len, default=SUMS)
    text, prefix = z.read(sums), sums[:-len(SUMS)]
    wanted = wanted_files(text.decode(errors="replace"))
    for name, digest in tqdm(wanted.items(), "unpack", unit="file", disable=None):
        if hash_matches(root / name, digest):
            continue
        content = z.read(prefix + name)
        if hashlib.sha256(content).hexdigest() != digest:
            raise zipfile.BadZipFile(f"{name} does not have the hash listed in {SUMS}")
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(root / name, lambda path: path.write_bytes(content))
    if not {DATABASE, STATEMENTS} <= wanted.keys():
        raise zipfile.BadZipFile(f"{SUMS} does not list the two tables")
    write_atomically(root / SUMS, lambda path: path.write_bytes(text))


def wanted_files(sums):
    """SHA256SUMS.txt -> {name: hash} of the 500 Hz records and the two tables; only such names are
    ever written."""
    pairs = re.findall(r"^([0-9a-f]{64}) [ *]?(\S+)\s*$", sums, re.MULTILINE)
    return {name: digest for digest, name in pairs if name in (DATABASE, STATEMENTS)
            or re.fullmatch(r"records500/\d{5}/\d{5}_hr\.(dat|hea)", name)}


def hash_matches(path, digest):
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == digest


# ------------------------------------------------------------------------------------- command line

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    add = parser.add_argument
    add("--data", default="ptbxl", help="the dataset's folder (default: ptbxl)")
    add("--task", default="all71",
        help="a .csv table of your own (default: PTB-XL; one cache serves all its tasks)")
    add("--leads", default=",".join(LEADS), help="such as II,V1,V5 (default: all twelve)")
    add("--preprocess", choices=PREPROCESSING, default="filter",
        help="default: filter, as ECGFounder's authors require")
    add("--workers", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    add("--skip-unreadable", action="store_true",
        help="finish the cache without records that cannot be read")
    add("--download", action="store_true", help="fetch PTB-XL 1.0.3 into the folder first")
    add("--url", default=URL, help="the zip to fetch (default: PhysioNet's)")
    args = parser.parse_args(argv)
    try:
        if args.workers < 1:
            raise InputError(f"--workers is {args.workers}; wanted at least 1")
        check_task(args.task)
        leads = parse_leads(args.leads)
        if args.download:
            download(args.data, args.url)
        cache = build_cache(args.data, args.task, args.preprocess, leads, args.workers,
                            args.skip_unreadable)
        marks, size = np.load(cache.marks), cache.array.stat().st_size
        line = f"{cache.array}: {marks.sum():,} records, {size / 1e9:.2f} GB"
        print(*filter(None, [line, cache.left_out()]), sep="\n")
    except (InputError, OSError) as error:
        parser.exit(2, f"data.py: {line_of(error)}\n")
    except KeyboardInterrupt:
        parser.exit(130, "data.py: interrupted; run the same command again (a cache build "
                         "resumes where it stopped, a download starts over)\n")


if __name__ == "__main__":
    main()
