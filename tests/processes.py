"""Scripts of the project in processes of their own, with the small network of tiny.py.

The processes are forked from a server that has imported the libraries, which saves each of them
seconds."""
import functools
import itertools
import multiprocessing
import os
import resource
import runpy
import signal
import sys
from contextlib import suppress

import tiny

LIBRARIES = ["torch.distributed.nn", "wfdb", "scipy.ndimage", "scipy.signal"]
PATIENCE = 300      # seconds without a word


@functools.cache
def server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    return context


def start(*words, largest_file=None, kill_at=None, **environment):
    """Start the script words[0] with the other words as its arguments; for `end`.

    largest_file: in bytes, as on a full disk. kill_at: of which call of os.fsync it does not come
    back (SIGKILL)."""
    errors, theirs = server().Pipe(duplex=False)
    given = theirs, list(map(str, words)), largest_file, kill_at, environment
    process = server().Process(target=script, args=given)
    process.start()
    theirs.close()
    return process, errors


def end(started, status=0):
    """Lines of stderr when the process and its workers, which hold stderr too, have ended; its exit
    status must be this."""
    (process, errors), text = started, b""
    try:
        while (ended := errors.poll(PATIENCE)) and (part := os.read(errors.fileno(), 2**16)):
            text += part
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.join()
    lines = text.decode().splitlines()
    assert ended and process.exitcode == status, (ended, process.exitcode, lines)
    return lines


def script(errors, words, largest_file, kill_at, environment):
    """In the new process."""
    os.environ.update(environment, CUDA_VISIBLE_DEVICES="")
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    os.setsid()
    os.chdir(tiny.ROOT)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(errors.fileno(), 2)
    errors.close()
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    import torch
    torch.set_num_threads(1)
    tiny.shrink()
    calls, fsync = itertools.count(1), os.fsync

    def fsync_and_perhaps_end(descriptor):
        fsync(descriptor)
        if next(calls) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = fsync_and_perhaps_end
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
