"""Make the sets of RESULTS.md's experiment out of PTB-XL 1.0.3, as folders of links to its signals.

    python tests/tools/make_subset.py ptbxl folds1-7 ptbxl-pretrain   # 15,245 ECGs to pretrain on
    python tests/tools/make_subset.py ptbxl folds8-10 ptbxl-target    # 6,554 ECGs to post-train on
    python tests/tools/make_subset.py ptbxl folds8-10-tenth ptbxl-tenth   # a tenth to validate on

folds8-10 trains on PTB-XL's fold 8, validates on 9 and tests on 10. folds1-7 trains on 1 to 6; of
fold 7 the patients with an odd number validate and the others test, as folds 9 and 10 of the set.
PTB-XL's folds share no patient, nor do folds1-7 and folds8-10. folds8-10-tenth is folds8-10 where
only the patients whose number ends in 0 validate.
"""
import argparse
import csv
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import data

SETS = {"folds1-7": range(1, 8), "folds8-10": range(8, 11), "folds8-10-tenth": range(8, 11)}


def make_subset(source, name, dest):
    """Write the set `name` as a PTB-XL folder."""
    source, dest, chosen = Path(source).resolve(), Path(dest), []
    path, table = data.read_table(source, "all71")
    for cells in zip(*table.values()):
        row = dict(zip(table, cells))
        fold, patient = row.pop("fold"), int(row["patient_id"] or 0)
        if fold not in SETS[name] or name == "folds8-10-tenth" and fold == 9 and patient % 10:
            continue
        if fold == 7:
            fold = 9 if patient % 2 else 10
        chosen.append({**row, "strat_fold": fold})
    if not chosen:
        raise data.InputError(f"{path}: has no record of {name}; wanted the whole of PTB-XL 1.0.3")
    dest.mkdir(parents=True)
    with open(dest / data.DATABASE, "w", newline="") as f:
        writer = csv.DictWriter(f, list(chosen[0]))
        writer.writeheader()
        writer.writerows(chosen)
    shutil.copy(source / data.STATEMENTS, dest)
    for folder in {Path(row["record"]).parts[0] for row in chosen}:
        (dest / folder).symlink_to(source / folder)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("source", help="PTB-XL's folder")
    parser.add_argument("name", choices=SETS)
    parser.add_argument("dest", help="folder to make")
    args = parser.parse_args(argv)
    with data.errors_in_one_line("make_subset.py"):
        make_subset(args.source, args.name, args.dest)


if __name__ == "__main__":
    main()
