"""G8: files and names that were made to do harm, under an audit hook and, where it is installed, under strace.

Nothing in a file is executed or imported, nothing connects to the network, nothing is written outside the folders of
the trial, no other file of the machine is read into a result, nothing blocks.
"""
import contextlib
import functools
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile

import numpy as np

from tests.campaign import core, scripts
from tests.campaign.core import Goal, check
from tests.campaign.hostile_files import CASES, IMAGE_CASES, SECRET, add_file, evil_checkpoint
from tests.conftest import write_tif
from tests.harness import ENV, ROOT
from tests.test_labels import FORMATS
from utils import errors

SECONDS = 25


# ---- the watch -------------------------------------------------------------------------------------------------------
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PROGRAMS = ("os.exec", "os.posix_spawn", "os.spawn", "os.system", "subprocess.Popen", "os.startfile")
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate", "os.chmod",
           "shutil.rmtree", "shutil.move")
ALLOWED = ("/dev/null", "/dev/shm", "/dev/tty", "/proc/self", "/sys/kernel/mm")


def watch(root):
    """From now on this process writes down, in root / "watch.txt", what no case may do."""
    core.limit_memory()
    sys.dont_write_bytecode = True
    log = os.open(root / "watch.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    inside = tuple(map(str, (root, tempfile.gettempdir(), *ALLOWED)))

    def outside(path):
        if isinstance(path, int) or path is None:
            return False
        path = os.path.abspath(os.fsdecode(path))
        return not path.startswith(inside)

    def hook(event, args):
        wrong = False
        if event == "open":
            wrong = isinstance(args[2], int) and args[2] & WRITES and outside(args[0])
        elif event in CHANGES:
            wrong = any(outside(path) for path in args if isinstance(path, (str, bytes)))
        elif event == "socket.connect":
            wrong = not isinstance(args[1], (str, bytes))  # a unix socket connects processes of this machine
        elif event in ("socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
            wrong = True
        elif event in PROGRAMS:
            wrong = "git" not in str(args[0]) and "git" not in str(args[1:2])
        elif event == "import":
            wrong = "wicked" in str(args[0])
        elif event == "pickle.find_class":
            wrong = args[0] in ("os", "posix", "nt", "builtins", "subprocess", "wicked", "sys")
        if wrong:
            os.write(log, f"{event} {args!r}\n"[:500].encode(errors="replace"))
    sys.addaudithook(hook)


def trial(place, rng, number):
    if number >= len(CASES):
        return _under_strace(place, number - len(CASES))
    case = CASES[number]
    root, data = place.own, place.own / "DATA"
    data.mkdir()
    write_tif(root / "secret.tif", np.full((1, 6, 8), SECRET, np.uint8))
    (root / "secret.txt").write_text("0 0.5 0.5 0.77 0.77\n")
    (root / "wicked.py").write_text("open('executed', 'w')\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        case.make(root, server.getsockname()[1])
        run = core.fork(_act, case, root, path=root / "log", cwd=root, setup=functools.partial(watch, root))
        code = run.wait(SECONDS)
        server.settimeout(0)
        with contextlib.suppress(OSError):
            server.accept()
            raise core.Failed("a connection", case.name)
    text = "\n".join(run.err[-15:])
    seen = (root / "watch.txt").read_text()
    check(not seen, f"forbidden: {seen.split(' ')[0]}", f"{case.name}\n{seen}")
    check(not (root / "executed").exists() and not (data / "executed").exists(), "executed", case.name)
    check("Traceback" not in text and code in (0, 2, 4), f"{'traceback' if 'Traceback' in text else f'exit {code}'}",
          f"{case.name}\n{text}")
    check("\x1b[31m" not in run.out + text, "escape sequences reach the terminal", case.name)
    return {"read" if code == 0 else "refused": 1}


def _act(case, root):
    """The watched process, which ends as a script does."""
    errors.cli(functools.partial(case.act, root))


# ---- the kernel's view -----------------------------------------------------------------------------------------------
KNOWN = r"python|git|ldconfig|gcc|cc|ld|objdump|uname|lscpu"  # those that torch and ctypes start to find libraries
STRACED = ("images", "labels", "checkpoint")


def _under_strace(place, number):
    """A real command on a folder of many hostile files: what it opens, starts and connects to."""
    what = STRACED[number % len(STRACED)]
    if not shutil.which("strace"):
        return {"without strace": 1}
    root = place.own
    (root / "DATA").mkdir()
    write_tif(root / "secret.tif", np.full((1, 6, 8), SECRET, np.uint8))
    (root / "wicked.py").write_text("open('executed', 'w')\n")
    task = {"images": "seg", "labels": "det", "checkpoint": "cls"}[what]
    argv = [ROOT / "predict.py", *scripts.predict_flags(place.shared, task, root / "out")]
    if what == "images":
        source = root / "source"
        shutil.copytree(scripts.data(place.shared, task) / scripts.TASKS[task].test, source)
        for i, case in enumerate(IMAGE_CASES[:17]):
            case.make(root, 9)
            for path in list((root / "DATA").iterdir()):
                path.rename(source / f"{i}{path.name}")
        argv[argv.index("--source") + 1] = source
    elif what == "labels":
        FORMATS["yolo"][0](root / "D")
        text = "path: .\ntrain: images/train\nval: images/val\nnames: [a, b, c]\ndownload: touch executed\n"
        add_file("data.yaml", text)(root / "D", root, 9)
        argv = [ROOT / "train_det.py", "--data", root / "D", *scripts.TASKS["det"].flags, "--project", root / "runs"]
    else:
        evil_checkpoint("os.system", "state")(root, 9)
        argv[argv.index("--weights") + 1] = root / "DATA/a.pt"
    trace = root / "trace"
    done = subprocess.run(
        ["strace", "-f", "-qq", "-e", "trace=openat,connect,execve", "-o", trace, sys.executable, "-B",
         *map(str, argv)], cwd=root, capture_output=True, text=True, timeout=SECONDS * 8,
        env=os.environ | ENV)
    check("Traceback" not in done.stderr and done.returncode in (0, 2, 4), f"strace {what}: exit {done.returncode}",
          done.stderr[-2000:])
    inside = tuple(map(str, (root, tempfile.gettempdir(), *ALLOWED)))
    for line in trace.read_text(errors="replace").splitlines():
        opened = re.search(r'openat\(AT_FDCWD, "([^"]*)", (\S+?)[,)]', line)
        if opened and "= -1" not in line:
            path = os.path.abspath(os.path.join(root, opened[1]))
            written = re.search("O_WRONLY|O_RDWR|O_CREAT", opened[2])
            check(not written or path.startswith(inside) or path.startswith("/dev/"), "strace: written outside", line)
            check(path != str(root / "secret.tif"), "strace: the secret was opened", line)
        check("connect(" not in line or "AF_INET" not in line, "strace: a connection", line)
        started = re.search(r'execve\("([^"]*)"', line)
        check(not started or "= -1" in line or re.match(KNOWN, os.path.basename(started[1])),
              "strace: another program", line)
    check(not (root / "executed").exists(), "executed", what)
    return {"under strace": 1}


GOAL = Goal("G8", f"{len(CASES)} hostile files and names under an audit hook, {len(STRACED)} commands under strace",
            trial, cap=len(CASES) + len(STRACED), seconds=400, share=2,
            short=(*range(0, len(CASES), 29), len(CASES) - 1))
