"""Run a script of the project with a small network and kill it (SIGKILL) at one of its moments.

    python tests/moments.py LIST 0 FOLDER post_train.py ...     # to the end; their names go to LIST
    python tests/moments.py LIST 37 FOLDER post_train.py ...    # end at the 37th moment

Moments: each file below FOLDER that is opened, renamed or removed, by the script's workers too;
each call of os.fsync and of a module of the network; and a checkpoint of which half is written.
Their order is the same in every run of one process.
"""
import atexit
import json
import multiprocessing
import os
import re
import runpy
import signal
import sys
from pathlib import Path

import tiny


def watch(listing, kill_at, folder):
    """Begin to count; returns the function that counts a moment."""
    counter, names, script = multiprocessing.get_context("fork").Value("q"), [], os.getpid()
    fsync = os.fsync

    def moment(name, just_before=lambda: None):
        with counter.get_lock():
            counter.value += 1
            reached = counter.value == kill_at
            if reached and os.getpid() != script:
                os.kill(script, signal.SIGKILL)  # so that the script does not hold the lock
        names.append(re.sub(r"\.\d+\.", "", name, count=1))  # the process in a temporary's name
        if reached and os.getpid() == script:
            just_before()
            os.kill(script, signal.SIGKILL)

    def audit(event, args):
        if event in ("open", "os.rename", "os.remove") and isinstance(args[0], (str, os.PathLike)):
            if str(args[0]).startswith(folder):
                moment(f"{event} {os.path.basename(args[0])}")

    def write():
        if os.getpid() == script:
            elsewhere = ["in a worker"] * (counter.value - len(names))
            Path(listing).write_text(json.dumps(names + elsewhere))

    def fsync_and_watch(descriptor):
        moment("os.fsync")
        fsync(descriptor)

    sys.addaudithook(audit)
    os.fsync = fsync_and_watch
    atexit.register(write)
    return moment


def watch_network(moment):
    import torch
    save = torch.save

    def save_and_watch(value, path):
        save(value, path)
        moment(f"half of {path.name}", lambda: os.truncate(path, path.stat().st_size // 2))

    def called(module, x):
        mode = "training" if module.training else "inference"
        moment(f"{mode} {type(module).__name__}")

    torch.save = save_and_watch
    torch.nn.modules.module.register_module_forward_pre_hook(called)


if __name__ == "__main__":
    listing, kill_at, folder, name, *arguments = sys.argv[1:]
    sys.path.insert(0, str(tiny.ROOT))
    moment = watch(listing, int(kill_at), folder)
    if name == "post_train.py":
        tiny.shrink()
        watch_network(moment)
    sys.argv = [name, *arguments]
    runpy.run_path(str(tiny.ROOT / name), run_name="__main__")
