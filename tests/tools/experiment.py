"""Train the rows of RESULTS.md in <out>/<row>-<frac>-<seed> and predict fold 10. What is done is
left out, what was interrupted goes on. Options after -- go to every post_train.py.

    python tests/tools/experiment.py --data ptbxl --rows probe post --dry-run -- --amp bf16
"""
import argparse
import subprocess
import sys
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROWS = {            # what each gives post_train.py, in the order in which they decide most
    "probe": "--epochs 0",
    "baseline": "--strategy baseline",
    "post": "",
    "preview": "--drop-path 0",
    "long-preview": "--probe-epochs 30",
    "drop-path": "--probe-epochs 0",
    "schedule": "--probe-epochs 0 --drop-path 0 --dropout 0",
    "random-probe": "--epochs 0 --weights none",
    "community": "--probe-epochs 30 --probe-lr 5e-3 --batch-size 256 --no-interpolate"}
EPOCHS = {0.1: 30, 0.3: 20, 1.0: 15}    # of fine-tuning, by the fraction


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    add = parser.add_argument
    add("--data", required=True, help="the folder of the set")
    add("--task", default="all71")
    add("--weights", default="checkpoints/12_lead_ECGFounder.pth", help="where all rows start")
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    add("--fracs", nargs="+", type=float, default=[1.0, 0.1, 0.3])
    add("--seeds", nargs="+", type=int, default=[0])
    add("--out", default="runs")
    add("--hz100", action="store_true", help="the network at 100 Hz, by hz100.py")
    add("--dry-run", action="store_true", help="print the commands that are left")
    add("options", nargs="*", help="after --: for every post_train.py")
    args = parser.parse_args(argv)
    for seed, frac, row in product(args.seeds, args.fracs, args.rows):
        out = Path(args.out, f"{row}-{frac:g}-{seed}")
        if (out / "predictions.npz").exists():
            continue
        options = f"--frac {frac:g} --seed {seed} --epochs {EPOCHS.get(frac, 30)} {ROWS[row]}"
        train = ["post_train.py", "--data", args.data, "--weights", args.weights, "--task",
                 args.task, "--out", str(out), "--resume", "--batch-size", "32", *options.split(),
                 *args.options]     # of an option that stands twice the last counts
        for command in (train, ["evaluate.py", f"{out}/best.pt"]):
            script, *words = ["tests/tools/hz100.py"] * args.hz100 + command
            print("python", script, *words, flush=True)
            command = [sys.executable, ROOT / script, *words]
            if not args.dry_run and subprocess.run(command).returncode:
                sys.exit(f"experiment.py: {out} has failed; the same command goes on")


if __name__ == "__main__":
    main()
