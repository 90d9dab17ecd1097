"""Ends a process that waits in vain: for a batch of its loader workers, for another rank, or for its own step.

A worker that hangs and a rank that is stopped send nothing, and are not dead. So what is waited for gives signs of life,
and a thread looks for them. A rank that is busy for long, with a cache or a validation, still gives its signs.
"""
import atexit
import itertools
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress

from utils.errors import UserError, end

LOOKS = 20     # in the time without a sign after which the process ends; a rank gives as many signs
FIRST = 5      # so many times --timeout for a first batch: its workers begin, and nothing is in the system's cache; and
               # for a training step, which is slow on processors

_signs = {}    # what is waited for: (a value that changes as long as it lives, factor of --timeout)


def start(timeout, store=None, rank=0, world_size=1):
    """Watches from now on. timeout: seconds without a sign of life. store: of the process group, if there is one."""
    threading.Thread(target=_watch, args=(timeout,), daemon=True).start()
    if world_size > 1:
        atexit.register(store.set, f"alive {rank}", "done")
        others = [other for other in range(world_size) if other != rank]
        threading.Thread(target=_exchange, args=(store.clone(), rank, others, timeout), daemon=True).start()


@contextmanager
def waiting(what, factor=1):
    """While the block runs, the process waits for something that gives no signs."""
    _signs[what] = object(), factor
    try:
        yield
    finally:
        del _signs[what]


def _watch(timeout):
    idle, last = Counter(), {}
    while True:
        time.sleep(timeout / LOOKS)  # looks are counted, and not seconds: the whole job may have been stopped and gone on
        for what, (sign, factor) in list(_signs.items()):
            idle[what] = idle[what] + 1 if last.get(what) == sign else 0
            last[what] = sign
            if idle[what] >= LOOKS * factor:
                end(UserError(f"no sign of life from {what} for {timeout * factor:g} s; look for what it waits for, or "
                              f"raise --timeout, then go on with --resume"))


def _exchange(store, rank, others, timeout):
    """Tells the other ranks that this one lives, and takes down what they tell."""
    with suppress(RuntimeError):  # the store is gone: the main thread will notice
        for number in itertools.count():
            store.set(f"alive {rank}", str(number))
            for other in others:
                sign = store.get(f"alive {other}")  # waits for the first one
                _signs[f"rank {other}"] = (object() if sign == b"done" else sign), 1
            time.sleep(timeout / LOOKS)
