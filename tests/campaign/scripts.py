"""The three training scripts on tiny data, with faults to order: what the goals about whole runs start.

A run is 3 epochs of 4 or 5 batches, in windows of 3 (--accumulate), with EMA weights and a checkpoint to keep. What an
undisturbed run leaves behind is made once per task, in the campaign's shared folder.
"""
import collections
import contextlib
import json
import os
import shutil
import time
from typing import Callable, NamedTuple

import train_cls
import train_det
import train_seg
from tests import toy
from tests.campaign import core, faults
from tests.conftest import TINY, TINY_CLS, TINY_DET, write_dirty, write_parking, write_wildfire
from tests.harness import differences, free_port, read
from tests.test_faults import table
from utils.train import checkpoint

RUN = ["--epochs", 3, "--accumulate", 3, "--clip", 1, "--save-period", 2, "--bs", 2]
FILES = ("last.pt", "best.pt", "epoch_2.pt")
WAIT = 150  # seconds; a run takes two or three where the machine is not busy


class Task(NamedTuple):
    module: object
    flags: list
    write: Callable     # writes the data set into a folder
    images: str         # the folder of its training images
    test: str           # the folder of its test images


TASKS = {
    "seg": Task(train_seg, [*TINY, *RUN], lambda root: write_wildfire(root, train=10, test=3, size=(32, 32)),
                "train_img", "test_img"),
    "det": Task(train_det, [*TINY_DET, *RUN], lambda root: write_parking(root, train=10, test=3), "train/images",
                "test/images"),
    # two ranks have one image each, which 32 pixels are too few for
    "cls": Task(train_cls, [*TINY_CLS, *RUN, "--imgsz", 64], lambda root: write_dirty(root, train=12, test=3),
                "dirty_mnist_2nd", "test_dirty_mnist_2nd"),
}
TOY = Task(toy, RUN, None, "", "")  # tests/toy.py: the same loop, without images; ends in a second
ALL = TASKS | {"toy": TOY}


def made(path, make):
    """`path`, which make(a temporary path) writes where it does not exist."""
    if not path.exists():
        temporary = path.with_name(f".{path.name}-{os.getpid()}")
        shutil.rmtree(temporary, ignore_errors=True)
        make(temporary)
        with contextlib.suppress(OSError):  # another process was faster
            temporary.rename(path)
    return path


def data(shared, task):
    """The task's data set, which no trial may change."""
    return made(shared / f"data-{task}", TASKS[task].write)


# ---- runs ------------------------------------------------------------------------------------------------------------
def start(task, place, *flags, folder=None, setup=None, **options):
    """Starts a training run of a task in the trial's folder -> Run. setup: called in its process before main()."""
    own = folder or place.own
    own.mkdir(parents=True, exist_ok=True)
    where = ["--data", data(place.shared, task)] if ALL[task].write else []
    return core.script(ALL[task].module, *where, *ALL[task].flags, "--project", own / "runs", *flags,
                       path=own / "log", cwd=own, setup=setup, **options)


def start_toy(project, *flags, setup=None, **env):
    """Starts the toy script of tests/toy.py, which has the same loop and ends in a second -> Run."""
    project.mkdir(parents=True, exist_ok=True)
    return core.script(toy, "--project", project, *flags, path=project / "log", cwd=project, setup=setup, env=env)


def finish(run, codes=(0,), seconds=WAIT):
    """Waits for a run's end and checks its exit code -> the code."""
    code = run.wait(seconds)
    if code not in codes:
        raise core.Failed("traceback" if "Traceback" in "\n".join(run.err) else f"exit {code}",
                          f"{run.out[-1500:]}\n" + "\n".join(run.err[-30:]))
    return code


def straight(shared, task, *, ranks=1):
    """The folder of an undisturbed run, with events.json (how often each event came) and seconds.txt."""
    def make(folder):
        place, began = core.Place(shared, folder), time.monotonic()
        counts = folder / "events.json"
        if ranks == 1:
            finish(start(task, place, setup=lambda: faults.install(counts=counts), folder=folder))
        else:
            setups = [lambda: faults.install(counts=counts), faults.install]
            for run in world(task, place, folder=folder, setups=setups):
                finish(run)
        (folder / "seconds.txt").write_text(str(time.monotonic() - began))
    return made(shared / f"straight-{task}-{ranks}", make)


def what_happened(folder):
    """-> {event: how often}, seconds of the undisturbed run in this folder."""
    return (collections.Counter(json.loads((folder / "events.json").read_text())),
            float((folder / "seconds.txt").read_text()))


def world(task, place, *flags, folder=None, setups=(None, None), env=(), **options):
    """Starts two ranks of one run, as torchrun would -> [Run, Run]."""
    port = free_port()
    return [start(task, place, *flags, folder=folder, setup=setups[rank], **options,
                  env={"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2,
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **dict(env)}) for rank in range(2)]


def saved(folder):
    """Whether a run has saved; then its newest checkpoint must be valid."""
    if not (folder / "last.pt").exists() and not (folder / "last.pt.prev").exists():
        return False
    with contextlib.redirect_stdout(None):
        checkpoint.load(folder / "last.pt")
    return True


def same_run(shared, task, folder, *, ranks=1):
    """Fails unless a run has left what the undisturbed one has left: weights, their average, optimizer and table, to
    the bit; with several ranks, losses in the table may differ in the last digits, because their sums are averaged
    when a run stops."""
    expected = straight(shared, task, ranks=ranks) / "runs/exp"
    for file in FILES:
        core.check((expected / file).exists() == (folder / file).exists(), f"{file} is missing or too many")
        if (expected / file).exists():
            a, b = read(expected / file), read(folder / file)
            if ranks > 1:
                core.check(close(a.pop("history"), b.pop("history")), "another history", file)
            differ = differences(a, b)
            core.check(not differ, "not the same bits", f"{file}: {differ[:8]}")
    if ranks == 1:
        core.check(table(expected) == table(folder), "another results.csv")
    left = [path.name for path in folder.iterdir() if path.name.startswith(".new-")]
    core.check(not left, "temporary files are left", left)


def close(a, b):
    """Whether two histories agree, but for the last digits of their numbers."""
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(abs(x[k] - y[k]) <= 1e-5 * abs(x[k]) or x[k] != x[k] and y[k] != y[k] for k in x)
        for x, y in zip(a, b))


def predict_flags(shared, task, out):
    """Flags of predict.py with the undisturbed run's best weights, on the task's test images."""
    return ["--task", task, "--weights", straight(shared, task) / "runs/exp/best.pt", "--source",
            data(shared, task) / TASKS[task].test, "--device", "cpu", "--workers", 0, "--out", out]


