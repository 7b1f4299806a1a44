"""ECG datasets: labels of PTB-XL or of a table of your own, records, a cache of their signals.

    python data.py --download --data ptbxl      # fetch PTB-XL 1.0.3 (1.7 GB) and preprocess it
    python data.py --data clinic --task clinic.csv --leads I --preprocess raw

The cache is one float16 array (N, leads, 5000), a row for each row of the dataset's table: leads in
the order of LEADS, 10 s at 500 Hz, in millivolts, or unitless after normalization. Needs NumPy,
SciPy, wfdb and tqdm (and PyTorch for --download); no other project file.
"""
import argparse
import ast
import csv
import io
import json
import math
import os
import posixpath
import re
import signal
import sys
import time
import zipfile
import zlib
from collections import Counter, namedtuple
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
FS, SAMPLES = 500, 5000         # Hz, 10 s
TRAIN_FOLDS, VAL_FOLD, TEST_FOLD = range(1, 9), 9, 10
TASKS = {   # of PTB-XL: (column of scp_statements.csv that flags a task's statements, column that
            # names their class; "" is the first column, the statement itself)
    "all71": (None, ""),
    "diagnostic44": ("diagnostic", ""),
    "subclass23": ("diagnostic", "diagnostic_subclass"),
    "superclass5": ("diagnostic", "diagnostic_class"),
    "form19": ("form", ""),
    "rhythm12": ("rhythm", ""),
}
DATABASE, STATEMENTS = "ptbxl_database.csv", "scp_statements.csv"
NOT_CLASSES = ("record", "ecg_id", "patient_id", "fold")    # of a custom table's columns
LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
FOLDS = {f"{fold}{end}": fold for fold in range(1, 11) for end in ("", ".0")}
UNKNOWN = (r"(#?n[./]?a\.?n?|<na>|nat|none|\(?null\)?|missing|\W*(not )?unk(nown)?\W*( patient)?|"
           r"not (available|known)|anonym[a-z]*|[-?.]+|0+(\.0)?|-\d+(\.0)?)?")      # patient_id
PREPROCESSING = ("filter", "zscore", "raw")
MILLIVOLTS = {"v": 1e3, "mv": 1.0, "uv": 1e-3, "nv": 1e-6}
LEAD_OF = {lead.lower(): lead for lead in LEADS} | {f"c{i}": f"V{i}" for i in range(1, 7)} | {
    "di": "I", "d1": "I", "dii": "II", "d2": "II", "diii": "III", "d3": "III"}
DERIVED = {"III": (-1, 1), "aVR": (-0.5, -0.5), "aVL": (1, -0.5), "aVF": (-0.5, 1)}  # of I, II
LINES = {   # of a WFDB header: the parts of each kind, in groups what is used of them
    "record": {"name": r"[-\w]+(/\d+)?", "number of signals": r"\d+",
               "rate": r"(?:(\d+\.?\d*)(?:/\S+)?)?", "number of samples": r"(\d*)(?=\s|$)"},
    "segment": {"name": r"([-\w]*~?)", "length": r"(\d+)"},
    "signal": {"file": r"(~?[-\w]*(?:\.\w*)?)", "format": r"\d+(?:x(\d+))?(:\d+)?(?:\+\d+)?",
               "gain": r"(?:-?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?(?:\(-?\d+\))?(?:/(\S*))?)?",
               "checksum and name": r"(?:-?\d+\b\s*){0,3}(?:(-?\d+)\b\s*)?(?:-?\d+\b\s*)?(.*)"}}
URL = ("https://physionet.org/static/published-projects/ptb-xl/"
       "ptb-xl-a-large-publicly-available-electrocardiography-dataset-1.0.3.zip")


class InputError(ValueError):
    """Unusable input; the message says what was found, what was wanted and what to do."""


class Labels(NamedTuple):
    """Records and their labels; patients that are unknown have a negative number each."""
    ecg_id: np.ndarray      # (N,) int64, or str where they are not whole numbers
    record: np.ndarray      # (N,) str: paths of WFDB records, relative to the dataset's folder
    row: np.ndarray         # (N,) int64: place in the table and in the cache
    patient_id: np.ndarray  # (N,) int64 or str
    fold: np.ndarray        # (N,) int64: 1-8 train, 9 validates, 10 tests
    y: np.ndarray           # (N, L) uint8
    classes: list           # L names

    def take(self, chosen):     # by an index or a mask
        return Labels(*(field[chosen] for field in self[:-1]), self.classes)


def load_labels(root, task, unlabelled=False):
    """The records of a task as Labels, from csv files alone; `unlabelled`: also those of PTB-XL
    without a label of the task. Raises InputError for an unknown task or a bad table.

    task: one of TASKS, with PTB-XL in the folder `root`, or a table of your own (.csv): `record` (a
    WFDB record's path without extension, relative to `root`), optionally `ecg_id`, `patient_id` and
    `fold`; every other column is a class, of 0 and 1. Without `fold`, a hash deals each patient to
    one of ten folds, the same in every table."""
    path, table = read_table(root, task)
    y, classes = own_classes(path, table) if is_own(task) else ptbxl_classes(path, table, task)
    patients = [who or str(-1 - i) for i, who in enumerate(table["patient_id"])]
    labels = Labels(identifiers(table["ecg_id"]), np.array(table["record"]), np.arange(len(y)),
                    identifiers(patients), np.array(table["fold"]), y, classes)
    return labels if is_own(task) or unlabelled else labels.take(y.any(1))


def read_table(root, task):
    """(path, {column: cells}) of a dataset's table; it has the columns record, ecg_id, patient_id
    (empty where unknown) and fold, whatever the table calls them or lacks."""
    path, fold = Path(root, DATABASE), "strat_fold"
    needed = ["filename_hr", fold, "patient_id", "scp_codes"]
    if is_own(task):
        path, fold, needed = Path(task), "fold", ["record"]
    elif task not in TASKS:
        raise InputError(f"task {task!r}: wanted {', '.join(TASKS)}, or a .csv table")
    table = read_csv(path, needed)
    records = [posixpath.normpath(strip_extension(cell)) for cell in table[needed[0]]]
    ids = [cell.removesuffix(".0") for cell in table.get("ecg_id", records)]    # pandas adds it
    patients = ["" if is_unknown(who) else who.removesuffix(".0")
                for who in table.get("patient_id", [""] * len(records))]
    for column, names in ((needed[0], records), ("ecg_id", ids)):
        for name, count in Counter(names).items():
            if count > 1 or re.match(r"/|\.\.|\.?$", name):
                raise InputError(f"{path}: {column} {name!r}, in {count} rows; wanted one row each "
                                 f"and records inside {root}")
    if fold in table:
        folds = translate(path, fold, table[fold], FOLDS, "1-8 (train), 9 (validates), 10 (tests)")
    else:   # by a hash, so that a patient is in the same fold in every table and on every machine
        folds = [1 + zlib.crc32((who or record).encode()) % 10
                 for who, record in zip(patients, records)]
    return path, {**table, "record": records, "ecg_id": ids, "patient_id": patients, "fold": folds}


def is_own(task):
    return str(task).lower().endswith(".csv")


def is_unknown(patient):
    return re.fullmatch(UNKNOWN, str(patient), re.IGNORECASE) is not None


def strip_extension(path):
    return re.sub(r"\.(hea|dat|mat)$", "", str(path))


def read_csv(path, needed):
    """A csv file with a header -> {column: its cells, without spaces around them}. What Excel adds
    is left out: a first line `sep=,`, columns without a name and a cell."""
    try:
        text = re.sub('^"?sep=.*\n', "", path.read_text("utf-8-sig"))
        mark = max(",;\t", key=text.partition("\n")[0].count)
        rows = csv.reader(io.StringIO(text), delimiter=mark)
        rows = [[cell.strip() for cell in row] for row in rows]
        names, *rows = [row for row in rows if any(row)] or [[]]
        ragged = [i for i, row in enumerate(rows, 2) if len(row) != len(names)]
        columns = [(name, cells) for name, cells in zip(names, zip(*rows)) if name or any(cells)]
        if not rows or ragged or len(dict(columns)) < len(columns) or not {*needed} <= {*names}:
            raise InputError(f"has {len(rows)} rows (other lengths: {ragged[:5] or 'none'}), the "
                             f"columns {', '.join(names)[:200]}; wanted {needed}, and none twice")
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: {error}; wanted a csv table in UTF-8; see --data, --task, "
                         "data.py --download") from None
    return dict(columns)


def translate(path, column, cells, values, wanted):
    """The cells of a column by the dict `values`. Raises InputError for the first unknown one."""
    for i, cell in enumerate(cells, 2):
        if cell.lower() not in values:
            raise InputError(f"{path}: row {i}: {column} is {cell[:40]!r}; wanted {wanted}")
    return [values[cell.lower()] for cell in cells]


def identifiers(cells):
    """(N,) int64 where all are whole numbers, else str."""
    whole = all(re.fullmatch(r"-?(0|[1-9]\d{0,14})", cell) for cell in cells)
    return np.array(list(map(int, cells)) if whole else cells)


def ptbxl_classes(path, table, task):
    """(y, classes) by the protocol of Strodthoff et al. (2021): a statement counts as present
    whatever its likelihood, 0 included; the classes are all those of the task, sorted."""
    flag, name = TASKS[task]
    columns = read_csv(path.with_name(STATEMENTS), ["", name, flag or ""])
    class_of = {code: kind * (not flag or flagged in ("1", "1.0"))      # "" where it has none
                for code, kind, flagged in zip(columns[""], columns[name], columns[flag or ""])}
    classes = sorted({*class_of.values()} - {""})
    y = np.zeros((len(table["scp_codes"]), len(classes)), np.uint8)
    for i, cell in enumerate(table["scp_codes"]):
        try:
            kinds = [class_of[code] for code in {**ast.literal_eval(cell)}]
        except (KeyError, TypeError, ValueError, SyntaxError, MemoryError, RecursionError):
            raise InputError(f"{path}: row {i + 2}: scp_codes is {cell[:40]!r}; wanted statements "
                             f"of {STATEMENTS}; fetch both files again") from None
        y[i, [classes.index(kind) for kind in kinds if kind]] = 1
    return y, classes


def own_classes(path, table):
    """(y, classes) of a custom table."""
    classes = [name for name in table if name not in NOT_CLASSES]
    wanted = (f"0 or 1, as in each column but {', '.join(NOT_CLASSES)}; leave out unknown labels, "
              "and give exclusive classes a column each (pandas: to_csv(..., index=False))")
    if not classes or "" in classes:
        raise InputError(f"{path}: has no class, or one without a name; wanted {wanted}")
    y = [translate(path, name, table[name], LABELS, wanted) for name in classes]
    return np.array(y, np.uint8).T, classes


def subset(index, frac, seed):
    """A random fraction, 0 < frac <= 1, of the records `index` (n,), sorted: max(1, floor(frac n +
    0.5)) of them. With one seed, a smaller fraction is a subset of every larger one."""
    order = np.random.RandomState(seed).permutation(np.sort(index))
    return np.sort(order[:max(1, int(frac * len(order) + 0.5))])


def parse_leads(text):
    """"v1,II" -> ("II", "V1"), in the order of LEADS."""
    asked = [name.strip().lower() for name in text.split(",")]
    if not {*asked} <= {*map(str.lower, LEADS)}:
        raise InputError(f"--leads {text!r}: wanted some of {','.join(LEADS)}")
    return tuple(lead for lead in LEADS if lead.lower() in asked)


def lead_called(name):
    """The lead that a signal's name means, as "Lead III (Einthoven)" or "D3"; else the name."""
    # A minus is part of the name unless it joins two words: -aVR is not aVR.
    prefix = r"^((mdc_)?e[ck]g(-|[ _.:]*))?(lead(-|[ _.:]*))?"
    short = re.sub(rf"{prefix}| *[([].*$", "", name.strip().lower())
    return LEAD_OF.get(re.sub(r"[ _](?=\d$)", "", short), name.strip())


# signals: {lead: Channel}; segments: [(path, Header, frames)]; whole: it does not say its length
Header = namedtuple("Header", "frame_rate frames signals segments whole")
# place: among the signals; per_frame: samples; checksum: of all its samples modulo 65536, or 0
Channel = namedtuple("Channel", "place per_frame unit checksum")


def read_line(path, number, line, kind):
    """What is used of a header's line. Raises InputError for one that wfdb cannot read right."""
    used = []
    for part, form in LINES[kind].items():
        if not (match := re.match(rf"{form}(?:\s+|$)", line)):
            raise InputError(f"{path}.hea: line {number}: {line[:40]!r} begins with no {part}")
        used += match.groups("")
        line = line[match.end():]
    return used


def read_header(path):
    """The Header of a WFDB record. Raises InputError for one that cannot be read."""
    import wfdb
    text = Path(f"{path}.hea").read_bytes().decode("utf-8-sig", "surrogateescape")
    lines = [(path, number, line) for number, line in enumerate(map(str.strip, text.split("\n")), 1)
             if line and line[0] != "#"] or [(path, 1, "")]
    several, rate, length = read_line(*lines[0], "record")
    if not float(rate or 250) or not int(length or 1):
        raise InputError(f"{path}.hea: line {lines[0][1]}: has 0 samples, or 0 a second")
    signals, segments = {}, []
    for i, line in enumerate(lines[1:]):
        if several:
            name, frames = read_line(*line, "segment")
            part, gap = Path(path).with_name(name), name == "~" or not int(frames)
            header = Header(0, 0, {}, [], True) if gap else read_header(part)
            if not gap and header.frame_rate != float(rate or 250):
                raise InputError(f"{part}.hea: has another rate than {path}.hea")
            segments.append((part, header, int(frames)))
            signals = {**header.signals, **signals}
            continue
        file, per_frame, skew, unit, checksum, name = read_line(*line, "signal")
        mat = Path(path).with_name(file)
        if mat.suffix == ".mat" and b"MATLAB " in np.fromfile(mat, "S7", 1):
            raise InputError(f"{file} is of MATLAB 5 or later; wanted savemat(..., format='4')")
        unit = re.sub(r"[^!-~]+(?=v$)", "u", unit.lower()) or "mv"      # wfdb drops a micro sign
        checksum = 0 if skew else int(checksum or 0) % 65536
        signals.setdefault(lead_called(name), Channel(i, int(per_frame or 1), unit, checksum))
    frames = int(length or 0) or sum(frames for *_, frames in segments)
    frames = frames or len(wfdb.rdrecord(str(path)).p_signal)
    return Header(float(rate or 250), frames, signals, segments, not length)


def find_leads(header, leads):
    """({lead: Channel} to read, leads that follow from I and II). Raises InputError for a record
    without a lead, in a unit that is no voltage, or with leads of different rates."""
    derived = [lead for lead in leads if lead in DERIVED and lead not in header.signals]
    needed = dict.fromkeys([*leads, *("I", "II") * bool(derived)])
    wanted = {lead: header.signals.get(lead) for lead in needed if lead not in derived}
    if missing := [lead for lead, found in wanted.items() if found is None]:
        raise InputError(f"has no lead {missing[0]} (it has {', '.join(header.signals)}); "
                         f"wanted {', '.join(leads)}; rename those that have another name")
    _, rates, units, _ = map(set, zip(*wanted.values()))
    if len(rates) > 1 or not units <= MILLIVOLTS.keys():
        raise InputError(f"is in {', '.join(units)} at {len(rates)} rates; wanted mV, uV, nV or V, "
                         "and one rate")
    return wanted, derived


def read_record(path, leads=LEADS, start=0, seconds=None, header=None):
    """A WFDB record (path without extension) -> float32 (leads, n) in millivolts, and its sampling
    rate in Hz; `seconds` of it, from `start` on. Leads are found by name; III, aVR, aVL and aVF may
    follow from I and II. Missing samples are NaN, as is a lead that a segment lacks. Raises what
    wfdb raises, and InputError for wrong headers, leads, units and checksums."""
    header = header or read_header(path)
    rate, (channel, *_) = header.frame_rate, find_leads(header, leads)[0].values()
    fs, stop, past = rate * channel.per_frame, header.frames / rate, 0
    stop = stop if seconds is None else min(stop, start + seconds)
    x = np.full((len(leads), math.ceil((stop - start) * fs - 1e-6)), np.nan, np.float32)
    for path, part, frames in header.segments or [(path, header, header.frames)]:
        at, past = past, past + frames
        first, last = max(0, int(start * rate) - at), min(frames, math.ceil(stop * rate) - at)
        there = [i for i, lead in enumerate(leads) if lead in part.signals or (
            lead in DERIVED and {"I", "II"} <= part.signals.keys())]
        if there and first < last:
            if frames <= 60 * rate or seconds is None or part.whole:    # and checksums compared
                first, last = 0, None
            piece = read_samples(path, part, [leads[i] for i in there], first, last)
            begin = (at + first) * channel.per_frame - round(start * fs)    # in x
            piece = piece[:, max(0, -begin):x.shape[1] - begin]
            x[there, max(0, begin):max(0, begin) + piece.shape[1]] = piece
    return x, fs


def read_samples(path, header, leads, first, last):
    """Frames `first` to `last` (None: all) of a WFDB record in one segment -> (leads, n) in mV."""
    import wfdb
    wanted, derived = find_leads(header, leads)
    record = wfdb.rdrecord(str(path), first, last, [found.place for found in wanted.values()],
                           physical=False, smooth_frames=False)
    for (lead, found), samples in zip(wanted.items(), record.e_d_signal):
        if last is None and found.checksum not in (0, samples.sum() % 65536):
            raise InputError(f"lead {lead} has not the checksum that its header gives")
    samples = zip(wanted.items(), record.dac(expanded=True))
    volts = {lead: MILLIVOLTS[found.unit] * x for (lead, found), x in samples}
    for lead in derived:
        volts[lead] = DERIVED[lead][0] * volts["I"] + DERIVED[lead][1] * volts["II"]
    return np.stack([volts[lead] for lead in leads])


def preprocess(signal, fs, how="filter"):
    """(leads, n) in millivolts at `fs` Hz -> float32 (leads, 5000): the first 10 s at 500 Hz,
    zero-padded at the end if shorter. Missing samples (NaN) are interpolated. how: "filter"
    (`remove_noise`, then z-score over all leads at once; flat ones become zeros), "zscore" (the
    last step alone) or "raw" (millivolts). Raises InputError for samples beyond 10 V."""
    from scipy import signal as dsp
    x = np.asarray(signal)
    if x.ndim != 2 or x.shape[1] < max(2, len(x)) or not 50 <= fs <= 100_000:
        raise InputError(f"shape {x.shape} at {fs} Hz; wanted (leads, n) at 50 to 100,000 Hz")
    if how not in PREPROCESSING:
        raise InputError(f"preprocessing {how!r}: wanted {', '.join(PREPROCESSING)}")
    seconds = 10 if fs == FS else 11    # one more for the filter that resamples
    x = x[:, :math.ceil(seconds * fs)].astype(np.float64)
    if not np.abs(x[~np.isnan(x)]).max(initial=0) <= 1e4:   # an ECG's are about 1
        raise InputError("samples beyond 10 V; wanted an ECG in millivolts")
    x = np.stack([fill_gaps(lead) for lead in x])
    if fs != FS:    # beyond its ends a lead goes on along the line through its first and last one
        up, down = Fraction(FS / float(fs)).limit_denominator(1000).as_integer_ratio()
        x = dsp.resample_poly(x, up, down, axis=1, padtype="line")
    x = remove_noise(x[:, :SAMPLES]) if how == "filter" else x[:, :SAMPLES]
    if how != "raw":
        std = x.std()   # the 1e-8 is from ECGFounder's own preprocessing
        x = (x - x.mean()) / (std + 1e-8) if std >= 1e-6 else np.zeros_like(x)
    return np.pad(x.astype(np.float32), ((0, 0), (0, SAMPLES - x.shape[1])))


def fill_gaps(lead):
    """One lead (n,), its missing samples (NaN) interpolated, or zeros if all are missing."""
    there, at = ~np.isnan(lead), np.arange(len(lead))
    return np.interp(at, at[there], lead[there]) if there.any() else np.zeros(len(lead))


def remove_noise(x):
    """(leads, n) at 500 Hz -> the same, filtered as ECGFounder's training data were: zero-phase 50
    Hz notch (Q 30); zero-phase Butterworth band-pass of order 4, 0.67-40 Hz; minus the running
    median of 0.4 s. Raises ValueError for what is too short to filter."""
    from scipy import ndimage, signal as dsp
    x = dsp.filtfilt(*dsp.iirnotch(50, 30, FS), x)
    x = dsp.sosfiltfilt(dsp.butter(4, (0.67, 40), "bandpass", fs=FS, output="sos"), x)
    # One lead at a time: SciPy's fast running median is the one for 1-D arrays.
    return x - [ndimage.median_filter(lead, 201, mode="constant") for lead in x]


def load_windows(path, how="filter", leads=LEADS):
    """Yield the 10 s windows of a record in which a lead has a signal, as float16 (leads, 5000),
    with notes: how many windows the record has, what this one lacks, which leads are derived. The
    cache holds the first. A remainder of less than 10 s is dropped, unless it is all there is.
    Raises InputError for a record that cannot be read or has no such window."""
    try:
        header, any_signal = read_header(path), False
        derived = ", ".join(find_leads(header, leads)[1])
        n = max(1, int(header.frames / header.frame_rate / 10 + 1e-6))
        for i in range(n):
            signal, fs = read_record(path, leads, 10 * i, 11, header)
            lacking = what_lacks(signal[:, :math.ceil(10 * fs)], fs, leads)
            if lacking is not None:
                any_signal = True
                yield (preprocess(signal, fs, how).astype(np.float16),
                       {"windows": n, "lacking": lacking, "derived": derived})
        if not any_signal:
            raise InputError("its leads are missing or flat")
    except Exception as error:  # wfdb raises almost anything for a malformed header or short file
        why = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        why = why.replace("ValueError: time data", "line 1 of the .hea: the date or time")
        raise InputError(" ".join(f"{path}: cannot be used: {why}".split())) from None


def what_lacks(signal, fs, leads):
    """What a window lacks, in words: more than a tenth of its samples, or whole leads; None if no
    lead has a second of samples that are not all the same."""
    known = ~np.isnan(signal)
    height = np.where(known, signal, -np.inf).max(1) - np.where(known, signal, np.inf).min(1)
    alive = (known.sum(1) >= fs) & (height > 1e-6)
    if not alive.any():
        return None
    if known.mean() < 0.9:
        return f"{100 * (1 - known.mean()):.0f} % of its samples"
    return ", ".join(lead for lead, lives in zip(leads, alive) if not lives)


NOTES = {   # what is noted of records in the .json beside a cache, and said
    "unreadable": "cannot be used and are left out",
    "lacking": "lack more than a tenth of their samples, or whole leads",
    "derived": "have leads that were derived from I and II"}


def build_cache(root, records, how="filter", leads=LEADS, workers=None, skip_unreadable=False,
                wait=False):
    """Preprocess `records` (paths relative to `root`) once -> (path of the array, what the .json
    beside it holds: what the array is made of, and {record: note} for each of NOTES). Records that
    cannot be used raise InputError, once all others are cached, unless `skip_unreadable`. Changed
    records are not noticed: delete the cache. wait: for another process to build it."""
    records = list(map(str, records))
    made_of = {"layout": 6, "preprocessing": how, "leads": [*leads], "fs": FS, "records": records}
    path = Path(root, "cache", f"{how}-{zlib.crc32(json.dumps(made_of).encode()):08x}.npy")
    about = path.with_suffix(".json")
    while wait and not path.exists():
        time.sleep(1)
    if not (path.exists() and about.exists()):
        if not Path(root).is_dir():
            raise InputError(f"{root}: no such folder; give the dataset's with --data")
        path.parent.mkdir(exist_ok=True)
        with whole_file(path) as f:
            workers = min(61, max(1, workers or os.cpu_count()))    # Windows allows no more
            notes = write_signals(f, root, records, how, leads, workers)
            with whole_file(about) as g:    # there before the array is
                g.write(json.dumps({**made_of, **notes}, indent=1).encode())
    notes = json.loads(about.read_text())
    if (unreadable := notes["unreadable"]) and not skip_unreadable:
        raise InputError(f"{next(iter(unreadable.values()))}; {about} lists all {len(unreadable)}: "
                         f"mend them and delete {path}, or leave them out with --skip-unreadable")
    for key in filter(notes.get, NOTES):
        print(f"{len(notes[key]):,} of {len(records):,} records {NOTES[key]}, see {about}")
    return path, notes


def write_signals(f, root, records, how, leads, workers):
    """Write the signals of all records to the file `f` as a .npy array, in order, zeros for those
    that cannot be used -> {key of NOTES: {record: in words}}."""
    import scipy.ndimage, scipy.signal, wfdb  # noqa: E401,F401  once, not in every worker
    notes = {key: {} for key in NOTES}
    header = {"descr": "<f2", "fortran_order": False, "shape": (len(records), len(leads), SAMPLES)}
    np.lib.format.write_array_header_1_0(f, header)
    read, ignore = partial(first_window, root, how, leads), (signal.SIGINT, signal.SIG_IGN)
    size = 128 * workers    # of the parts that are submitted: what is finished stays in memory
    with ProcessPoolExecutor(workers, initializer=signal.signal, initargs=ignore) as pool:
        pool.submit(os.getpid)      # the workers are forked before the bar has a thread
        parts = (records[i:i + size] for i in range(0, len(records), size))
        windows = (window for part in parts for window in pool.map(read, part, chunksize=8))
        windows = tqdm(windows, "cache", len(records), unit="record", disable=None)
        for (window, said), record in zip(windows, records):
            f.write(window.tobytes())
            for key in filter(said.get, NOTES):
                notes[key][record] = said[key]
    return notes


def first_window(root, how, leads, record):
    """The first window of `load_windows`; zeros and a note where there is none."""
    try:
        return next(load_windows(Path(root, record), how, leads))
    except InputError as error:
        return np.zeros((len(leads), SAMPLES), np.float16), {"unreadable": str(error)}


def load_records(root, task, how="filter", leads=LEADS, **options):
    """(Labels, signals) of the task's readable records. That of record i is signals[labels.row[i]],
    of the memory-mapped array (N, leads, 5000), built if missing. options: of `build_cache`."""
    labels = load_labels(root, task, unlabelled=True)
    path, notes = build_cache(root, labels.record, how, leads, **options)
    chosen = (is_own(task) | labels.y.any(1)) & ~np.isin(labels.record, list(notes["unreadable"]))
    return labels.take(chosen), np.load(path, mmap_mode="r")


@contextmanager
def whole_file(path):
    """A file to write bytes to, which gets the name `path` once all are written, or never."""
    part = Path(path).with_name(f".{Path(path).name}.{os.urandom(8).hex()}.part")
    for old in part.parent.glob(f".{Path(path).name}.*.part"):  # a killed process may have left it
        with suppress(FileNotFoundError):
            if time.time() - old.stat().st_mtime > 3600:
                old.unlink()
    try:
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())    # so that a power failure leaves no empty file under the name
        os.replace(part, path)
    except OSError as error:
        error.filename = error.filename or str(path)    # a full disk names none
        raise
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def errors_in_one_line(script, *more, interrupted="interrupted; no file is half-written"):
    """End the script with one line and status 2 for what the user can mend: InputError, system
    errors, and the exceptions `more`. What the terminal cannot show is printed escaped."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError):     # a notebook's; one pointed elsewhere by dup2
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        yield
    except (KeyboardInterrupt, InputError, OSError, BrokenExecutor, *more) as error:
        stopped = isinstance(error, KeyboardInterrupt)
        line = interrupted if stopped else " ".join(str(error).split())
        line += "; perhaps memory ran out: data.py --workers 1" * isinstance(error, BrokenExecutor)
        sys.stderr.write(f"{script}: {line}\n")
        sys.exit(130 if stopped else 2)


def download(root):
    """Fetch PTB-XL's zip, unless it lies in `root`, and unpack its tables and 500 Hz records."""
    import torch
    archive, wanted = Path(root, "ptb-xl.zip"), r"records500/\d+/\w+\.(dat|hea)|\w+\.csv"
    if not archive.exists() and Path(root, DATABASE).exists():
        return
    archive.parent.mkdir(parents=True, exist_ok=True)
    try:
        if not archive.exists():
            torch.hub.download_url_to_file(URL, str(archive))
        with zipfile.ZipFile(archive) as z:
            for member in tqdm(z.infolist(), "unpack", unit="file", disable=None):
                member.filename = member.filename.partition("/")[2]     # without the zip's folder
                if re.fullmatch(wanted, member.filename):
                    z.extract(member, root)     # which checks its CRC
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise InputError(f"{archive}: {error}; remove it, or: wget -c -O {archive} {URL}") from None
    archive.unlink()


def add_options(add):
    """The options of a dataset, of data.py and post_train.py."""
    add("--data", default="ptbxl", help="the dataset's folder (default: ptbxl)")
    add("--leads", default=",".join(LEADS), help="such as II,V1,V5 (default: all twelve)")
    add("--preprocess", choices=PREPROCESSING, default="filter",
        help="default: filter, as ECGFounder's authors require")
    add("--skip-unreadable", action="store_true", help="leave out records that cannot be used")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    add_options(parser.add_argument)
    parser.add_argument("--task", default="all71", help="a .csv table (default: PTB-XL)")
    parser.add_argument("--workers", type=int, help="processes (default: all cores)")
    parser.add_argument("--download", action="store_true", help="fetch PTB-XL 1.0.3 first")
    args = parser.parse_args(argv)
    with errors_in_one_line("data.py"):
        leads = parse_leads(args.leads)
        if args.download:
            download(args.data)
        labels, signals = load_records(args.data, args.task, args.preprocess, leads,
                                       workers=args.workers, skip_unreadable=args.skip_unreadable)
    print(f"{signals.filename}: {len(labels.row):,} records, {signals.nbytes / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
