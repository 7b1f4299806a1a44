"""Make the sets of the README's experiment out of a full PTB-XL 1.0.3 download; their ecg_ids and folds stand in tests/records.csv.

    python tests/make_subset.py ptbxl target ptbxl-target          # 2,831 records: 2,322 to train, 330 to validate, 179 to test
    python tests/make_subset.py ptbxl pretrain ptbxl-pretrain      # 1,268 other records, all of folds 1-8

The signals are linked, not copied. In the set to pretrain on, PTB-XL's folds 7 and 8 are called 9 and 10, so that it has a
validation and a test fold of its own. PTB-XL's folds share no patient, so the set has none of the target's folds 9 and 10;
a few patients of its training folds are in both.
"""
import argparse
import csv
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import data

LISTING = Path(__file__).parent / "records.csv"


def make_subset(source, name, dest, listing=LISTING):
    """Write the set `name` of the listing (ecg_id, set, strat_fold) as a PTB-XL folder. Raises data.InputError for what is missing."""
    source, dest = Path(source).resolve(), Path(dest)
    with open(listing, newline="") as f:
        fold = {row["ecg_id"]: row["strat_fold"] for row in csv.DictReader(f) if row["set"] == name}
    rows = [row for row in data.read_table(source, data.TABLES[0], ("ecg_id", "strat_fold")) if row["ecg_id"] in fold]
    if len(rows) < len(fold):
        raise data.InputError(f"{source}: lacks {len(fold) - len(rows)} of the {len(fold)} records of the set; wanted the whole of PTB-XL 1.0.3")
    dest.mkdir(parents=True)
    with open(dest / data.TABLES[0], "w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(row | {"strat_fold": fold[row["ecg_id"]]} for row in rows)
    shutil.copy(source / data.TABLES[1], dest)
    os.symlink(source / "records500", dest / "records500")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", help="PTB-XL's folder")
    parser.add_argument("name", choices=("target", "pretrain"))
    parser.add_argument("dest", help="folder to make")
    args = parser.parse_args()
    try:
        make_subset(args.source, args.name, args.dest)
    except (data.InputError, OSError) as error:
        sys.exit(f"make_subset.py: {data.line_of(error)}")
