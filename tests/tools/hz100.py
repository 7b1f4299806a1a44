"""Run a script of this project on the network at 100 Hz: every fifth sample of the cache, which its
band-pass to 40 Hz allows: a fifth of the arithmetic. The checkpoints are of use with this tool
alone, and ECGFounder's weights, which are of 500 Hz, are not for it.

    python tests/tools/hz100.py post_train.py --data target --task all71 --weights none
"""
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import data


def load_thinned(*args, load_records=data.load_records, **options):
    labels, signals = load_records(*args, **options)
    return labels, signals[..., ::5]


if __name__ == "__main__":
    data.load_records = load_thinned
    del sys.argv[0]
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
