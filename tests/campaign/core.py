"""What all goals share: trials that run in a forked process, scripts that run in forked processes, and the table.

A trial is a function of (place, rng, number). It returns {what was done: how often} and raises `Failed` for what must
not happen. It runs in a forked child of a process that has imported everything, so that a crash, a hang or memory
that is used up costs that child and is a result, not the end of the campaign.
"""
import collections
import contextlib
import ctypes
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch._dynamo  # the first optimizer of a process imports it: not in every forked run
from tqdm import tqdm

from tests import harness
from utils.errors import cli

tqdm.monitor_interval = 0  # its thread may hold a lock while this process forks

FORK = multiprocessing.get_context("fork")
PARENT_DEATH, SUBREAPER = 1, 36  # prctl: die with the parent; orphans become children of this process, which ends them


class Goal(NamedTuple):
    """A series of trials. what: for the table. cap: the most trials of a campaign. seconds: after which a trial counts
    as a hang. share: of the campaign's time, relative to the other goals. short: the trials of `make test`."""
    name: str
    what: str
    trial: Callable
    cap: int
    seconds: float
    share: float
    short: tuple


class Place(NamedTuple):
    """Where a trial works. shared: data and undisturbed runs, made once. own: an empty folder, the current one."""
    shared: Path
    own: Path


class Failed(AssertionError):
    """A trial found what must not happen. kind: a few words for the table, equal for equal faults."""

    def __init__(self, kind, detail=""):
        super().__init__(f"{kind}\n{detail}")
        self.kind, self.detail = kind, str(detail)


def check(good, kind, detail=""):
    if not good:
        raise Failed(kind, detail)


# ---- trials ----------------------------------------------------------------------------------------------------------
class Report:
    """What the trials of a goal have shown."""

    def __init__(self, goal, seed):
        self.goal, self.seed, self.tried, self.seconds = goal, seed, 0, 0.0
        self.done = collections.Counter()
        self.failures = {}  # kind: [(number, detail)]

    def add(self, number, kind, detail, done, seconds):
        self.tried += 1
        self.seconds += seconds
        self.done.update(done)
        if kind:
            self.failures.setdefault(kind, []).append((number, detail))

    @property
    def failed(self):
        return sum(map(len, self.failures.values()))

    def again(self, number):
        """The command that runs a trial again."""
        return f"python -m tests.campaign --only {self.goal.name} --seed {self.seed} --trial {number}"


def run(goal, seed, numbers, root, deadline, say=lambda text: None):
    """Runs the trials `numbers` one after the other, until time.monotonic() has reached the deadline -> Report."""
    report, left = Report(goal, seed), list(numbers)
    while left and time.monotonic() < deadline:
        reader, writer = FORK.Pipe(False)
        worker = FORK.Process(target=_work, args=(goal, seed, left, Path(root), deadline, writer))
        worker.start()
        writer.close()
        try:
            finished, number, ended = _listen(reader, goal.seconds, report, say)
        except BaseException:  # Ctrl-C: nothing may live on
            kill_below(worker.pid)
            worker.kill()
            raise
        left = left[finished + (number is not None):]
        if number is not None:  # its process ended, or had to be ended, in the middle of this trial
            kill_below(worker.pid)
            worker.kill()
            worker.join()
            kind = ended or f"crash (exit {worker.exitcode})"
            report.add(number, kind, "", {}, goal.seconds if ended else 0)
            say(f"{goal.name} {number}: {kind}")
        worker.join(30)
        worker.kill()
        if finished == 0 and number is None:  # the deadline
            break
    return report


def _listen(reader, seconds, report, say):
    """Takes in a worker's results -> how many, the trial that it did not finish or None, why."""
    finished, current = 0, None
    while True:
        if not reader.poll(seconds + 20):
            return finished, current, "hang"
        try:
            message = reader.recv()
        except EOFError:
            return finished, current, ""
        if len(message) == 1:
            current = message[0]
            continue
        report.add(*message)
        if message[1]:
            say(f"{report.goal.name} {message[0]}: {message[1]}")
        finished, current = finished + 1, None


def _work(goal, seed, numbers, root, deadline, pipe):
    """What the forked process does. It ends after a trial that failed: the next one starts from a clean process."""
    os.setsid()
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    ctypes.CDLL(None).prctl(PARENT_DEATH, signal.SIGKILL, 0, 0, 0)
    null = os.open(os.devnull, os.O_RDWR)
    if os.environ.get("CAMPAIGN_LOUD") is None:
        os.dup2(null, 1), os.dup2(null, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 0)
    temporary = root / "t"  # what killed processes leave there goes away with the campaign
    if len(str(temporary)) < 60:  # names of sockets have at most 107 bytes
        temporary.mkdir(parents=True, exist_ok=True)
        os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    for number in numbers:
        if time.monotonic() > deadline:
            break
        pipe.send((number,))
        kind = _one(goal, seed, number, root, pipe)
        if kind:
            break
    os._exit(0)


def _one(goal, seed, number, root, pipe):
    """Runs a trial and sends what came of it -> the kind of its failure, or ""."""
    (root / "shared").mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix=f"{goal.name}-{number}-", dir=root))
    began, kind, detail, done = time.monotonic(), "", "", {}
    try:
        os.chdir(own)
        done = goal.trial(Place(root / "shared", own), random.Random(f"{seed} {goal.name} {number}"), number) or {}
    except Failed as error:
        kind, detail = error.kind, error.detail
    except AssertionError as error:
        text = str(error)
        kind = "no end" if text.startswith("no end") else f"assertion: {where(error)}"
        detail = text
    except Exception as error:
        kind, detail = f"{type(error).__name__}: {where(error)}", traceback.format_exc()
    finally:
        os.chdir(root)
        kill_below(os.getpid())
    pipe.send((number, kind, detail[-6000:], done, time.monotonic() - began))
    if not (kind and os.environ.get("CAMPAIGN_KEEP")):
        shutil.rmtree(own, ignore_errors=True)
    return kind


def where(error):
    """The function in which an error was raised, such as checkpoint._read."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).stem}.{frame.name}"


# ---- processes -------------------------------------------------------------------------------------------------------
def processes():
    """{pid: (parent, process group, state)} of all processes."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            state, parent, group = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:3]
            found[int(pid)] = int(parent), int(group), state
    return found


def below(pid):
    """The processes that a process has started, directly or not, without those that have ended."""
    table, found = processes(), []
    front = [pid]
    while front:
        front = [child for child, (parent, _, _) in table.items() if parent in front]
        found += [child for child in front if table[child][2] != "Z"]
    return found


def kill_below(pid):
    """Ends all that a process has started."""
    for _ in range(5):
        for child in below(pid):
            with contextlib.suppress(OSError):
                os.kill(child, signal.SIGKILL)
        with contextlib.suppress(OSError):
            while pid == os.getpid() and os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not below(pid):
            return
        time.sleep(0.05)


def fork(target, *args, path, cwd=".", env=(), setup=None):
    """Runs target(*args) in a forked process with a session and output files of its own -> harness.Run."""
    path = f"{path}-{random.getrandbits(40):x}"
    process = FORK.Process(target=_child, args=(target, args, path, cwd, dict(env), setup))
    process.start()
    started = harness.Run(process, path)
    end = time.monotonic() + 30
    while not os.path.exists(f"{path}.err"):
        assert time.monotonic() < end, "it did not open its files"
        time.sleep(0.001)
    return started


def _child(target, args, path, cwd, env, setup):
    os.setsid()
    for suffix, fd in (("out", 1), ("err", 2)):
        file = os.open(f"{path}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, fd)
        os.close(file)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    torch.set_num_threads(1)  # OpenMP's threads did not come along
    tqdm.set_lock(threading.RLock())  # its own is shared: a process that dies with it would stop all others
    warnings.filterwarnings("ignore", "This DataLoader will create")  # on machines with one core
    os.chdir(cwd)
    os.environ.update({**harness.ENV, **{name: str(value) for name, value in env.items()}})
    if setup:
        setup()
    target(*args)
    sys.stdout.flush()


def script(module, *flags, **options):
    """Starts a script's main() as from a shell, in a forked process. options: of `fork`."""
    return fork(_main, module, flags, **options)


def _main(module, flags):
    sys.argv = [f"{module.__name__.rpartition('.')[2]}.py", *map(str, flags)]
    cli(module.main)


def command(*argv, path, cwd, **env):
    """Starts a real command line of this Python in the folder `cwd` -> harness.Run. argv: what follows `python`."""
    path = f"{path}-{random.getrandbits(40):x}"
    with open(f"{path}.out", "w") as stdout, open(f"{path}.err", "w") as stderr:
        process = subprocess.Popen([sys.executable, *map(str, argv)], cwd=cwd, stdout=stdout, stderr=stderr,
                                   start_new_session=True, env=os.environ | harness.ENV | env)
    return harness.Run(process, path)


def one_line(run, code, kind="no single line"):
    """Exactly one line on stderr, which is an error of ours, and no traceback."""
    lines = run.err
    check("Traceback" not in "\n".join(lines), f"traceback (exit {code})", "\n".join(lines))
    check(len(lines) == 1 and lines[0].startswith("error: "), kind, f"exit {code}\n" + "\n".join(lines))
    return lines[0]


def no_traceback(run, code):
    check("Traceback" not in "\n".join(run.err), f"traceback (exit {code})", "\n".join(run.err))


# ---- memory ----------------------------------------------------------------------------------------------------------
def memory():
    """(now, most so far) of this process's address space, in bytes."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[name].split()[0]) * 1024 for name in ("VmSize", "VmPeak"))


def limit_memory(more=4 << 30):
    """This process may take so many bytes more than it has; beyond, it gets a MemoryError, and the machine is safe."""
    limit = memory()[0] + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


class Hang(BaseException):
    """Raised in the middle of a block that takes too long; no `except Exception` catches it."""


@contextlib.contextmanager
def bounded(limit, seconds, what="reading"):
    """Fails when the block takes more memory (bytes) or time than allowed."""
    def interrupt(signum, frame):
        raise Hang

    size, before = memory()
    began = time.monotonic()
    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 3 * seconds)
    try:
        yield
    except Hang:
        raise Failed(f"{what} hangs") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    took, after = time.monotonic() - began, memory()[1]
    check(took <= seconds, f"{what} took more than {seconds} s", f"{took:.1f} s")
    check(after <= before or after - size <= limit, f"{what} took more than {limit >> 20} MiB",
          f"{(after - size) / 2**20:.0f} MiB")


# ---- the table -------------------------------------------------------------------------------------------------------
def table(reports):
    """The reports as one markdown table, and below it an example and a command for every kind of failure."""
    lines = ["| goal | what | tried | passed | in these | kinds of failure |", "|---|---|---|---|---|---|"]
    for report in reports:
        done = ", ".join(f"{name} {count:,}" for name, count in sorted(report.done.items()))
        kinds = "; ".join(f"{kind} ({len(found)}, such as {found[0][0]})" for kind, found in report.failures.items())
        lines.append(f"| {report.goal.name} | {report.goal.what} | {report.tried:,} | "
                     f"{report.tried - report.failed:,} | {done} | {kinds.replace('|', '/')} |")
    for report in reports:
        for kind, found in report.failures.items():
            first = " / ".join(found[0][1].strip().splitlines()[-3:])[:400]
            lines += ["", f"{report.goal.name} {kind}: {len(found)} times; {first}", f"    {report.again(found[0][0])}"]
    return "\n".join(lines)
