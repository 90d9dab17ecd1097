"""G7: a worker or a rank that hangs in any way, and a main process that does: the run ends itself, with one line.

The flag under test: --timeout SECONDS. So long without a batch or a sign of life of another rank, or five times as long
without a step, ends a script with exit code 2.
"""
import contextlib
import ctypes
import inspect
import os
import signal
import time

from tests import harness, toy
from tests.campaign import core, faults, scripts
from tests.campaign.core import Goal, check
from tests.test_faults import group
from utils.train.args import train_parser

TIMEOUT = 4     # seconds, of the flag
PATIENCE = 25   # seconds beyond it, on a busy machine
RUN = ("--epochs", 4, "--accumulate", 3, "--clip", 1, "--save-period", 2)  # of the toy script

# name: what is done to whom
CASES = {
    "all workers stopped": ("workers", signal.SIGSTOP), "one worker stopped": ("worker", signal.SIGSTOP),
    "all workers killed": ("workers", signal.SIGKILL), "one worker killed": ("worker", signal.SIGKILL),
    "a worker sleeps": ("fault", "hang@sample"), "a worker stuck in C": ("fault", "stuck@sample"),
    "a worker stopped in a sample": ("fault", "stop@sample"),
    "the main process sleeps in a step": ("fault", "hang@batch"),
    "a rank stopped": ("rank", "stop@batch"), "a rank stopped in the validation": ("rank", "stop@eval"),
    "a rank sleeps": ("rank", "hang@batch"), "a rank stopped at any moment": ("rank", "timer"),
    "a rank stopped, torchrun": ("torchrun", "stop@batch"), "workers of a real script stopped": ("script", "workers"),
    "one worker of a real script stopped": ("script", "worker"), "main() of another program raises": ("main", ""),
}


def trial(place, rng, number):
    name = list(CASES)[number % len(CASES)]
    who, what = CASES[name]
    {"workers": _signalled, "worker": _signalled, "fault": _ordered, "rank": _rank, "torchrun": _torchrun,
     "script": _script, "main": _main}[who](place, rng, who, what)
    return {name: 1}


def stuck_in_c(self, event):
    """tests/toy.py's Faults with one more action: a call into C that keeps Python's lock."""
    if self.acts.get((event, self.counts[event] + 1)) == "stuck":
        ctypes.PyDLL(None).sleep(3600)
    return _call(self, event)


_call = toy.Faults.__call__


def _setup():
    toy.Faults.__call__ = stuck_in_c


# ---- one process -----------------------------------------------------------------------------------------------------
def straight(shared, ranks=1):
    """The toy script's folder of an undisturbed run."""
    def make(folder):
        if ranks == 1:
            scripts.finish(scripts.start_toy(folder, *RUN))
        else:
            for run in _world(folder):
                scripts.finish(run)
    return scripts.made(shared / f"toy-{ranks}", make) / "exp"


def _start(place, rng, *flags):
    return scripts.start_toy(place.own / "runs", *RUN, "--workers", 2, "--timeout", TIMEOUT, *flags,
                             *["--every-step"] * (rng.random() < 0.5), setup=_setup)


def _signalled(place, rng, who, what):
    """Signals to workers of the loader, or of the validation's, at a random moment."""
    run = _start(place, rng, "--slow", "batch=0.05", "eval=0.05").until("started")
    time.sleep(rng.uniform(0.3, 2.5))
    workers = core.below(run.pid)
    hit = workers if who == "workers" else workers[:1] if rng.random() < 0.5 else workers[-1:]
    for pid in hit:
        with contextlib.suppress(OSError):
            os.kill(pid, what)
    _ends(place, run, may_end_well=not hit or who == "worker")


def _ordered(place, rng, who, what):
    event = what.partition("@")[2]
    n = rng.randint(1, {"sample": 12, "batch": 25, "eval": 11, "fsync": 6}[event])
    _ends(place, _start(place, rng, "--fault", f"{what}:{n}"))


def _ends(place, run, may_end_well=False):
    """The run ends with one line and exit code 2 soon after the timeout; its processes are gone; last.pt is valid, and
    the run can be resumed to the same bits. may_end_well: the run may not have needed that worker any more."""
    began = time.monotonic()
    try:
        code = run.wait(TIMEOUT + PATIENCE + 10)
    except AssertionError as error:
        raise core.Failed("it hangs", error) from None
    took = time.monotonic() - began
    if not (code == 0 and may_end_well):
        check(code == 2, f"exit {code}", f"{run.out[-1000:]}\n" + "\n".join(run.err[-20:]))
        core.one_line(run, code)
        check(took < TIMEOUT + PATIENCE, "noticed too late", f"{took:.1f} s")
    _gone(run)
    folder = place.own / "runs/exp"
    if scripts.saved(folder):
        scripts.finish(scripts.start_toy(place.own / "runs", "--resume", "--workers", 0))
        _same(straight(place.shared), folder)


def _gone(run):
    end = time.monotonic() + 10
    while group(run.pid):
        check(time.monotonic() < end, "children live on")
        time.sleep(0.05)


def _same(expected, folder):
    differ = harness.differences(harness.read(expected / "last.pt"), harness.read(folder / "last.pt"))
    check(not differ, "not the same bits", differ[:8])


# ---- two ranks -------------------------------------------------------------------------------------------------------
def _world(project, *flags, fault=(), rank=0):
    port = harness.free_port()
    return [scripts.start_toy(project, *RUN, *flags, *(["--fault", fault, "--fault-rank", rank] if fault else []),
                              setup=_setup, RANK=here, LOCAL_RANK=here, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2,
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for here in range(2)]


def _rank(place, rng, who, what):
    """One rank of two hangs: the other ends, soon, with one line."""
    rank, timer = rng.randrange(2), what == "timer"
    fault = "" if timer else f"{what}:{rng.randint(1, 10)}"
    flags = ["--timeout", TIMEOUT, "--slow", "batch=0.02", *["--every-step"] * (rng.random() < 0.5)]
    both = _world(place.own / "runs", *flags, fault=fault, rank=rank)
    if timer:
        time.sleep(rng.uniform(0.5, 2.5))
        both[rank].send(signal.SIGSTOP)
    other = both[1 - rank]
    try:
        code = other.wait(TIMEOUT + PATIENCE + 10)
    except AssertionError as error:
        raise core.Failed("the other rank hangs", error) from None
    if not (timer and code == 0):
        check(code == 2, f"the other rank: exit {code}", "\n".join(other.err[-20:]))
        core.one_line(other, code)
    both[rank].send(signal.SIGKILL, group=True)
    both[rank].process.join()
    for run in both:
        _gone(run)
    if scripts.saved(place.own / "runs/exp"):
        for run in _world(place.own / "runs", "--resume"):
            scripts.finish(run)


def _torchrun(place, rng, who, what):
    """Under torchrun, the whole command ends, and the stopped rank is gone too."""
    run = core.command(
        "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", harness.free_port(), "-m", "tests.toy",
        "--project", place.own / "runs", *RUN, "--timeout", TIMEOUT, "--fault", f"{what}:{rng.randint(2, 10)}",
        "--fault-rank", rng.randrange(2), path=place.own / "log", cwd=place.own)
    try:
        code = run.wait(TIMEOUT + PATIENCE + 90)  # torchrun waits 30 s for the rank that does not hear SIGTERM
    except AssertionError as error:
        raise core.Failed("torchrun hangs", error) from None
    errors = [line for line in run.err if line.startswith("error: ")]
    check(code == 1 and 1 <= len(errors) <= 2, f"torchrun: exit {code}, {len(errors)} lines", "\n".join(run.err[-30:]))
    _gone(run)
    scripts.saved(place.own / "runs/exp")


# ---- real scripts ----------------------------------------------------------------------------------------------------
def has_flag():
    """Whether the training scripts have --timeout."""
    return "timeout" in inspect.getsource(train_parser)


def _script(place, rng, who, what):
    """SIGSTOP of the workers of a real training script."""
    task = rng.choice(list(scripts.TASKS))
    flags = ["--timeout", TIMEOUT] if has_flag() else []
    run = scripts.start(task, place, "--workers", 2, "--epochs", 50, *flags,
                        setup=lambda: faults.install(every_step=True))
    run.until("epoch 2", 60) if rng.random() < 0.5 else run.until("run: ", 60)
    time.sleep(rng.uniform(0.2, 1))
    while not (workers := core.below(run.pid)):  # on a busy machine they start later
        time.sleep(0.1)
    for pid in workers if what == "workers" else workers[:1]:
        os.kill(pid, signal.SIGSTOP)
    try:
        code = run.wait(TIMEOUT + PATIENCE + 30)
    except AssertionError as error:
        raise core.Failed("a real script hangs", error) from None
    check(code == 2, f"exit {code}", "\n".join(run.err[-20:]))
    core.one_line(run, code)
    _gone(run)
    scripts.saved(place.own / "runs/exp")


def _main(place, rng, who, what):
    """main() called by another program, without utils.errors.cli: an exception in the middle of an epoch ends the
    program, with its traceback; no worker keeps it from ending."""
    task = rng.choice(list(scripts.TASKS))
    code = (f"import sys; sys.argv = sys.argv[1:]\nfrom tests.campaign import faults\n"
            f"faults.install('crash@batch:{rng.randint(2, 8)}')\nimport train_{task}\ntrain_{task}.main()\n")
    run = core.command("-c", code, f"train_{task}.py", "--data", scripts.data(place.shared, task),
                       *scripts.TASKS[task].flags, "--workers", 2, "--project", place.own / "runs",
                       path=place.own / "log", cwd=place.own)
    try:
        code = run.wait(90)
    except AssertionError as error:
        raise core.Failed("the program hangs at its exit", error) from None
    check(code == 1 and "ZeroDivisionError" in "\n".join(run.err), f"exit {code}", "\n".join(run.err[-20:]))
    _gone(run)


GOAL = Goal("G7", "workers, ranks and steps that hang: one line, exit code 2, children gone, resumable", trial, cap=500,
            seconds=300, share=3, short=(1,))
