"""Make the sets of RESULTS.md's experiment out of PTB-XL 1.0.3, as folders of links to its signals.

    python tests/tools/make_subset.py ptbxl folds1-7 pretrain

folds8-10 (6,554 ECGs) trains on PTB-XL's fold 8, validates on 9 and tests on 10; of its variant
folds8-10-tenth only the patients whose number ends in 0 validate. folds1-7 (15,245) trains on 1 to
6; of fold 7 the patients with an odd number validate and the others test, as folds 9 and 10.
"""
import csv
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import data

SETS = {"folds1-7": range(1, 8), "folds8-10": range(8, 11), "folds8-10-tenth": range(8, 11)}


def main(source, name, dest):
    source, dest = Path(source).resolve(), Path(dest)
    path, table = data.read_table(source, "all71")
    folds, labels = table.pop("fold"), data.load_labels(source, "all71", unlabelled=True)
    dest.mkdir(parents=True)
    with open(dest / path.name, "w", newline="") as f:
        writer = csv.DictWriter(f, list(table))
        writer.writeheader()
        for fold, patient, *cells in zip(folds, labels.patient_id, *table.values()):
            if fold in SETS[name] and not (name.endswith("tenth") and fold == 9 and patient % 10):
                new = (10, 9)[patient % 2] if fold == 7 else fold
                writer.writerow({**dict(zip(table, cells)), "strat_fold": new})
    shutil.copy(source / data.STATEMENTS, dest)
    for folder in source.glob("records*"):
        (dest / folder.name).symlink_to(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
