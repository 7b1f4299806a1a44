"""Run a script of the project with a small network in place of ECGFounder:
python tests/tiny.py post_train.py --task ..."""
import functools
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LEVELS = ((16, 1), (32, 2))


def shrink(setattr=setattr):
    import model
    setattr(model, "ecgfounder", functools.partial(model.ecgfounder, levels=LEVELS))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    shrink()
    sys.argv = sys.argv[1:]
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
