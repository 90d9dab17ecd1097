"""Runs the toy script in processes of its own: killed, resumed, in groups. Compares what they leave behind.

The processes are forked from a server that has imported torch already: that saves 3 s for each.
"""
import dataclasses
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from multiprocessing import get_context
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
ENV = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
       "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore:This DataLoader will create"}


def _child(argv, out, env):
    from tests import toy
    from utils.errors import cli
    os.setsid()  # a terminal's job: signals to the group reach the loader's workers, not pytest
    for path, fd in ((f"{out}.out", 1), (f"{out}.err", 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    os.environ.update(env)
    warnings.filterwarnings("ignore", "This DataLoader will create")  # on machines with one core
    sys.argv = ["toy", *map(str, argv)]
    cli(toy.main)


@dataclasses.dataclass
class Run:
    """A started process. `kind`: a multiprocessing process or a Popen."""
    process: object
    path: str

    @property
    def pid(self):
        return self.process.pid

    @property
    def out(self):
        return Path(f"{self.path}.out").read_text()

    @property
    def err(self):
        """What went to stderr, without the progress bars."""
        text = Path(f"{self.path}.err").read_text()
        lines = re.split(r"[\r\n]|(?<=])(?=error: )", text)  # another rank's error stands right behind the bar
        return [line for line in lines if line.strip() and not re.search(r"img/s|s/img|\?img|\d+%\|", line)]

    def send(self, signum, group=False):
        try:
            (os.killpg if group else os.kill)(self.pid, signum)
        except ProcessLookupError:
            pass

    def wait(self, timeout=60):
        """-> the exit code, negative for a signal. Kills the process's group when it takes longer."""
        if isinstance(self.process, subprocess.Popen):
            try:
                return self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.send(signal.SIGKILL, group=True)
                raise AssertionError(f"no end after {timeout} s:\n{self.out}\n{self.err}") from None
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.send(signal.SIGKILL, group=True)
            raise AssertionError(f"no end after {timeout} s:\n{self.out}\n{self.err}")
        return self.process.exitcode

    def until(self, text, timeout=60):
        """Waits until the process has printed the text."""
        end = time.monotonic() + timeout
        while text not in self.out:
            assert time.monotonic() < end, f"{text!r} did not come:\n{self.out}\n{self.err}"
            time.sleep(0.005)
        return self


def _paths(project):
    Path(project).mkdir(parents=True, exist_ok=True)
    return f"{project}/log{random.getrandbits(60):x}"


def _forkserver():
    context = get_context("forkserver")
    context.set_forkserver_preload(["pytest", "torch._dynamo", "tests.toy"])
    return context


def start(project, *argv, **env):
    """Starts the toy script with `--project project` and the flags."""
    os.environ.update(ENV)
    context = _forkserver()
    out = _paths(project)
    env = {k: str(v) for k, v in env.items()}
    process = context.Process(target=_child, args=(("--project", project, *argv), out, env))
    process.start()
    run = Run(process, out)
    while not os.path.exists(f"{out}.err"):
        assert process.is_alive(), "it ended before it could open its files"
        time.sleep(0.001)
    return run


def toy(project, *argv, code=0, **env):
    """Runs the toy script to its end; checks the exit code. Returns the `Run`."""
    run = start(project, *argv, **env)
    found = run.wait()
    assert found == code, f"exit {found}:\n{run.out}\n" + "\n".join(run.err)
    return run


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def two_ranks(target, folder, seconds):
    """Runs target(folder, rank, port) in two processes, which must end well within so many seconds each."""
    context, port = _forkserver(), free_port()
    os.environ.update(ENV)
    ranks = [context.Process(target=target, args=(folder, rank, port)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(seconds)
            assert process.exitcode == 0
    finally:
        for process in ranks:
            process.kill()


def world(project, *argv, size=2, **env):
    """Starts `size` processes of one group, as torchrun would. Returns their `Run`s."""
    port = free_port()
    return [start(project, *argv, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size,
                  MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **env) for rank in range(size)]


def toys(project, *argv, size=2, code=0):
    """Runs a group to its end; checks all exit codes. Returns the `Run`s."""
    runs = world(project, *argv, size=size)
    try:
        for run in runs:
            found = run.wait()
            assert found == code, f"exit {found}:\n{run.out}\n" + "\n".join(run.err)
    finally:  # the others of a group that fails wait for it, and pytest for them
        for run in runs:
            run.process.kill()
    return runs


def command(project, *argv, **env):
    """Starts any command line from the repository's root."""
    out = _paths(project)
    with open(f"{out}.out", "w") as stdout, open(f"{out}.err", "w") as stderr:
        process = subprocess.Popen(list(map(str, argv)), cwd=ROOT, stdout=stdout, stderr=stderr, start_new_session=True,
                                   env=os.environ | ENV | env)
    return Run(process, out)


def torchrun(project, *argv, flags=("--nproc_per_node", 2, "--master_port", "0")):
    return command(project, sys.executable, "-m", "torch.distributed.run", *flags, "-m", "tests.toy", "--project",
                   project, *argv)


def differences(a, b, path=""):
    """Paths at which two nested values of dicts, lists, tensors and numbers are not the same bits."""
    if type(a) is not type(b):
        return [path]
    if isinstance(a, dict):
        if list(a) != list(b):
            return [f"{path}: keys"]
        return [d for key in a for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)):
        return [path] if len(a) != len(b) else [d for i, (x, y) in enumerate(zip(a, b))
                                                for d in differences(x, y, f"{path}/{i}")]
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and \
            a.contiguous().flatten().view(torch.uint8).equal(b.contiguous().flatten().view(torch.uint8))
        return [] if same else [path]
    return [] if a == b or a != a and b != b else [path]


def read(path):
    """What a run is, from its checkpoint: without the arguments, and without the seconds that epochs took."""
    state = torch.load(path, weights_only=True)
    state.pop("args")
    state["history"] = [{k: v for k, v in row.items() if k != "seconds"} for row in state["history"]]
    return state
