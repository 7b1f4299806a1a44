"""Run a script of this project on the network at 100 Hz: every fifth sample of the cache, which its
band-pass to 40 Hz allows: a fifth of the arithmetic.

    python tests/tools/hz100.py post_train.py --data target --task all71 --weights none
    python tests/tools/hz100.py evaluate.py runs/all71-frac1-post-seed0/best.pt

For experiments where time is short: the checkpoints are of use with this tool alone, and
ECGFounder's weights, which are of 500 Hz, are not for it.
"""
import argparse
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEP = 5


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("script", choices=("post_train.py", "evaluate.py"))
    parser.add_argument("options", nargs=argparse.REMAINDER, help="the script's own")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    import data
    load_records = data.load_records

    def load_thinned(*args, **kwargs):
        labels, signals = load_records(*args, **kwargs)
        return labels, signals[..., ::STEP]

    data.load_records = load_thinned
    sys.argv = [args.script, *args.options]
    runpy.run_path(str(ROOT / args.script), run_name="__main__")


if __name__ == "__main__":
    main()
