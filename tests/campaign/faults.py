"""Faults to order in any training script: those of tests/toy.py, hooked into the loop from outside."""
import json
import os

from tests import toy
from utils.train import checkpoint, engine
from utils.train.state import State

BATCHES = 4  # of an epoch of scripts.TASKS, at least

# which events lie in a save, in the validation, at the edge of an epoch, and anywhere
PLACES = {"save": ("write", "write", "fsync", "fsynced", "replace", "replaced"), "validation": ("eval", "evaluated"),
          "edge": ("batch", "trained"), "anywhere": ("batch", "trained", "timer")}


def install(fault="", *, every_step=False, slow=(), counts=None):
    """Hooks a fault into this process: ACTION@EVENT:N, "" for none. To be called before the script's main().

    Events: batch and trained (before and after a batch), eval and evaluated, write (a piece of a checkpoint), fsync and
    fsynced, replace and replaced. every_step: save after every optimizer step. slow: EVENT=SECONDS to wait. counts: a
    file for how often each event came. -> toy.Faults
    """
    faults = toy.Faults([fault] if fault else [], slow)
    os.fsync = faults.around(os.fsync, "fsync", "fsynced")
    os.replace = faults.around(os.replace, "replace", "replaced")
    checkpoint.open = lambda *args: toy.Noisy(open(*args), faults)
    State.train_batch = faults.around(State.train_batch, "batch", "trained")
    engine.evaluate_on = faults.around(engine.evaluate_on, "eval", "evaluated")
    if every_step:
        engine.SAVE_MINUTES = 0
    if counts:
        write_table = engine.table.write  # the last thing that the loop does

        def count(folder):
            write_table(folder)
            counts.write_text(json.dumps(faults.counts))
        engine.table.write = count
    return faults


def draw(rng, counts, seconds):
    """-> place, the fault to order ("" for the timer), seconds of the timer. counts, seconds: of an undisturbed run."""
    place = rng.choice(list(PLACES))
    event = rng.choice(PLACES[place])
    if event == "timer":
        return place, "", rng.uniform(0, seconds)
    if place == "edge":
        return place, f"kill@{event}:{BATCHES * rng.randint(1, 2) + (event == 'batch')}", 0.0
    return place, f"kill@{event}:{rng.randint(1, max(1, counts[event] * 2 // 3))}", 0.0  # a resumed run has fewer
