import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "tools")]

# Machines are shared: no test depends on wall time.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def pytest_configure(config):
    # Started in the background, a process ignores Ctrl-C, which tests press.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # wfdb calls pandas in an older way.
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:wfdb")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "real: needs real PTB-XL records, in the folder PTBXL_DIR")


@pytest.fixture(autouse=True)
def on_the_cpu(request, monkeypatch):
    """What is no test of the GPU runs on the CPU on a machine with a GPU, too."""
    if "gpu" not in request.keywords:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    elif not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")


@pytest.fixture(scope="session")
def real():
    if not os.environ.get("PTBXL_DIR"):
        pytest.skip("PTBXL_DIR does not name a folder with real PTB-XL records")
    return Path(os.environ["PTBXL_DIR"])


@pytest.fixture(scope="session")
def demo_set(tmp_path_factory):
    """60 synthetic ECGs with their cache. Not to be written to: copy it, or use `demo`."""
    import data
    from make_demo import make_demo
    root = tmp_path_factory.mktemp("demo") / "set"
    make_demo(root, records=60)
    data.load_records(root, "all71", workers=1)
    return root


@pytest.fixture
def demo(demo_set, tmp_path):
    """A copy of the demo set that a test may change."""
    return Path(shutil.copytree(demo_set, tmp_path / "demo"))


@pytest.fixture
def uncached(demo):
    shutil.rmtree(demo / "cache")
    return demo


@pytest.fixture
def tiny(monkeypatch):
    """The same code with a small network, for tests of the loop rather than of the network."""
    import tiny as small
    small.shrink(monkeypatch.setattr)


@pytest.fixture(scope="session")
def undisturbed(demo_set, tmp_path_factory):
    """A finished run's folder, not to be written to; beside it, in states/, what kills leave."""
    import post_train
    import tiny as small
    from helpers import arguments, prefer_the_middle, states_kept
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as m, states_kept(out, out.parent / "states"):
        small.shrink(m.setattr)
        prefer_the_middle(m)
        post_train.main(arguments(demo_set, out))
    return out


@pytest.fixture
def fails(capsys):
    """Call a script's main; expect its exit status and one line to a person with all of `words`."""
    def call(main, argv, *words, status=2):
        with pytest.raises(SystemExit) as stop:
            main(list(map(str, argv)))
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if line and "%|" not in line]  # no bars
        assert stop.value.code == status and len(lines) == 1, error
        assert all(str(word) in lines[0] for word in words), error
        return lines[0]
    return call


@pytest.fixture(scope="session")
def golden():
    return {path.stem: json.loads(path.read_text()) for path in TESTS.glob("golden/*.json")}
