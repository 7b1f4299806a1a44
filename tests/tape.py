"""A stand-in for CUDA graphs on the CPU: it records a step's operations and replays them on the
memory they were recorded with.

What a real graph does to a program, it does too: numbers that Python passes stay as recorded,
tensors are read and written where they were, random numbers are drawn anew, and reading a number
back is refused. Recording leaves every number as it was.
"""
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def storages(tree):
    return {tensor.untyped_storage()._cdata for tensor in tensors(tree)}


class Tape(TorchDispatchMode):
    def __enter__(self):
        self.calls, self.made, self.before = [], set(), {}
        self.draws = torch.get_rng_state()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = args, kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a number is read back in a recording")
        for storage in (tensor.untyped_storage() for tensor in tensors(given)):
            if storage._cdata not in self.made:
                self.before.setdefault(storage._cdata, (storage, storage.clone()))
        results = func(*given[0], **given[1])
        self.made |= storages(results) - self.before.keys()
        self.calls.append((func, *given, results))
        return results

    def __exit__(self, *error):
        super().__exit__(*error)
        for storage, content in self.before.values():
            storage.copy_(content)
        torch.set_rng_state(self.draws)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, results in self.calls:
            given = storages((args, kwargs))
            for old, new in zip(tensors(results), tensors(func(*args, **kwargs)), strict=True):
                if old.untyped_storage()._cdata not in given:  # else a view, or in place
                    old.copy_(new)


def install(monkeypatch):
    """Let torch.cuda's graphs be tapes, and its streams nothing."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    stand_ins = {"CUDAGraph": Tape, "graph": lambda tape, stream: tape,
                 "Stream": lambda: stream, "current_stream": lambda: stream,
                 "stream": lambda stream: nullcontext()}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
