"""Make the sets of the experiments out of a full PTB-XL 1.0.3, as folders of links to its signals.

    python tests/make_subset.py ptbxl folds1-7 ptbxl-pretrain      # 15,245 records to pretrain a backbone on
    python tests/make_subset.py ptbxl folds8-10 ptbxl-target       # 6,554 records to post-train it on: a tenth to train

folds8-10 trains on PTB-XL's fold 8, validates on 9 and tests on 10. folds1-7 trains on 1 to 6; of fold 7 the patients with
an odd number validate and the others test, as folds 9 and 10 of the set. PTB-XL's folds share no patient, nor do the sets.

The smaller sets of the first experiment, listed in tests/records.csv:

    python tests/make_subset.py ptbxl target ptbxl-target          # 2,831 records: 2,322 to train, 330 to validate, 179 to test
    python tests/make_subset.py ptbxl pretrain ptbxl-pretrain      # 1,268 other records, all of folds 1-8
"""
import argparse
import csv
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import data

LISTING = Path(__file__).parent / "records.csv"


def fold_of(row, name, listed):
    """The fold of a row of ptbxl_database.csv in the set `name`, or None where it is not in the set."""
    fold = int(float(row["strat_fold"]))
    if name == "folds8-10":
        return fold if fold >= 8 else None
    if name == "folds1-7":
        odd = int(float(row["patient_id"] or row["ecg_id"])) % 2
        return {7: 9 if odd else 10, 8: None, 9: None, 10: None}.get(fold, fold)
    return listed.get(row["ecg_id"])


def make_subset(source, name, dest, listing=LISTING):
    """Write the set `name` as a PTB-XL folder. Raises data.InputError for what is missing."""
    source, dest = Path(source).resolve(), Path(dest)
    with open(listing, newline="") as f:
        listed = {row["ecg_id"]: row["strat_fold"] for row in csv.DictReader(f) if row["set"] == name}
    rows = data.read_table(source, data.TABLES[0], ("ecg_id", "patient_id", "strat_fold", "filename_hr"))
    rows = [row | {"strat_fold": fold} for row in rows if (fold := fold_of(row, name, listed)) is not None]
    if len(rows) < len(listed) or not rows:
        raise data.InputError(f"{source}: lacks {len(listed) - len(rows)} of the {len(listed)} records of the set; "
                              "wanted the whole of PTB-XL 1.0.3")
    dest.mkdir(parents=True)
    with open(dest / data.TABLES[0], "w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    shutil.copy(source / data.TABLES[1], dest)
    for folder in {Path(row["filename_hr"]).parts[0] for row in rows}:
        os.symlink(source / folder, dest / folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", help="PTB-XL's folder")
    parser.add_argument("name", choices=("folds1-7", "folds8-10", "target", "pretrain"))
    parser.add_argument("dest", help="folder to make")
    args = parser.parse_args()
    try:
        make_subset(args.source, args.name, args.dest)
    except (data.InputError, OSError) as error:
        sys.exit(f"make_subset.py: {data.line_of(error)}")
