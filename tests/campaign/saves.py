"""G3: a save that is killed, or that the disk refuses, at a random byte: a valid checkpoint is always there."""
import errno
import os
import resource

import pytest

from tests.campaign.core import Goal, check
from tests.harness import differences
from tests.test_checkpoint import faulty, forked, small
from utils.errors import UserError
from utils.train import checkpoint

CODES = (errno.ENOSPC, errno.EIO, errno.EDQUOT)
CALLS = ("fsync", "replace", "open", "stat", "close")
KINDS = ("kill at a byte", "error at a byte", "kill at a call", "error at a call", "RLIMIT_FSIZE")


def trial(place, rng, number):
    """One fault in one save, into a folder with none to three earlier saves and perhaps a stale temporary file."""
    path, kind, before = place.own / "last.pt", KINDS[number % len(KINDS)], rng.randrange(4)
    width = rng.choice((1, 8, 64))
    for step in range(before):
        checkpoint.save(path, small(step, width), keep_previous=True)
    if rng.random() < 0.3:
        (place.own / ".new-last.pt").write_bytes(rng.randbytes(3000))
    checkpoint.save(place.own / "size.pt", small(before, width))
    size = (place.own / "size.pt").stat().st_size
    with pytest.MonkeyPatch.context() as patch:
        code = forked(lambda: _save(patch, rng, kind, path, small(before, width), size))
    check(code in (-9, 0, 2), f"exit {code} after {kind}")
    _valid(path, before, code, kind, width)
    # the next save finds nothing in its way
    checkpoint.save(path, small(before + 1, width), keep_previous=True)
    check(checkpoint.load(path)["step"] == before + 1, "the next save is not loaded", kind)
    check(set(os.listdir(place.own)) <= {"last.pt", "last.pt.prev", "size.pt"}, "a temporary file is left",
          os.listdir(place.own))
    return {kind: 1}


def _save(patch, rng, kind, path, state, size):
    """The forked process: ends with 0 (saved), 2 (refused, with its message) or by SIGKILL."""
    code = rng.choice(CODES)

    def die(*_):
        os.kill(os.getpid(), 9)

    def refuse(*_):
        return OSError(code, os.strerror(code))

    fault = die if kind.startswith("kill") else refuse
    if kind == "RLIMIT_FSIZE":
        limit = rng.randrange(size)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    elif kind.endswith("byte"):
        faulty(patch, rng.randrange(size), fault, rng.choice((1, 512, 4096, 1 << 20)))
    else:
        _at_a_call(patch, rng.choice(CALLS), rng.choice((1, 2)), rng.random() < 0.5, fault)
    try:
        checkpoint.save(path, state, keep_previous=True)
    except UserError as error:
        os._exit(2 if "\n" not in str(error) and str(path) in str(error) else 5)
    os._exit(0)


def _at_a_call(patch, name, n, before, fault):
    """The fault comes at the n-th call of os.NAME, before or after what it does."""
    real, calls = getattr(os, name), []

    def wrapped(*args, **kwargs):
        calls.append(name)
        if len(calls) == n and before:
            if error := fault():
                raise error
        result = real(*args, **kwargs)
        if len(calls) == n and not before:
            if error := fault():
                raise error
        return result
    patch.setattr(os, name, wrapped)


def _valid(path, before, code, kind, width):
    """Fails unless a checkpoint is there that holds the new state or the one before it."""
    if before == 0 and code != 0 and not path.exists():
        return  # there was nothing to keep
    state = checkpoint.load(path)
    check(state["step"] in (before - 1, before), "more than one save was lost", f"{kind}: {state['step']} of {before}")
    check(code != 0 or state["step"] == before, "a save that succeeded is not there", kind)
    check(not differences(state, small(state["step"], width)), "another content", kind)


GOAL = Goal("G3", "kill, ENOSPC, EIO at a random byte or call of a save: a valid checkpoint", trial, cap=5000,
            seconds=30, share=1, short=tuple(range(10)))
