"""What else a machine does to a run: two in one folder, files that vanish, full and read-only disks, little memory,
clocks that jump, other languages, damaged caches and neighbours.

Group E is no goal of its own; it holds what the others leave out.
"""
import contextlib
import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import predict
from tests.campaign import core, faults, scripts
from tests.campaign.core import Goal, check
from tests.conftest import digest
from tests.harness import ENV, ROOT
from tests.test_checkpoint import mutated
from utils.train import checkpoint


def trial(place, rng, number):
    name = list(CASES)[number % len(CASES)]
    task = list(scripts.TASKS)[number // len(CASES) % 3]
    return {f"{name}: {CASES[name](place, rng, task) or 'ok'}": 1}


def _refused(run, code, what):
    """The run ends with exit code 2 and one line."""
    lines = "\n".join(run.err[-25:])
    check("Traceback" not in lines, f"{what}: traceback", lines)
    check(code == 2, f"{what}: exit {code}", f"{run.out[-800:]}\n{lines}")
    errors = [line for line in run.err if not line.startswith("_tiff")]  # libtiff speaks for itself
    check(len(errors) == 1 and errors[0].startswith("error: "), f"{what}: no single line", lines)
    return errors[0]


# ---- folders and disks -----------------------------------------------------------------------------------------------
def two_runs(place, rng, task):
    """A second run in the folder of a running one is refused; the first one does not notice."""
    first = scripts.start(task, place, setup=lambda: faults.install(every_step=True, slow=["batch=0.05"]))
    folder, end = place.own / "runs/exp", time.monotonic() + 60
    while not (folder / "last.pt").exists():
        check(time.monotonic() < end, "no checkpoint", first.out)
        time.sleep(0.01)
    second = scripts.start(task, place, "--resume", folder)
    line = _refused(second, second.wait(scripts.WAIT), "second run")
    check("another process" in line, "second run: another reason", line)
    third = scripts.start(task, place)  # a new run beside it gets a folder of its own
    for run in (first, third):
        scripts.finish(run)
    for name in ("exp", "exp2"):
        scripts.same_run(place.shared, task, place.own / "runs" / name)


def output_deleted(place, rng, task):
    run = scripts.start(task, place, setup=lambda: faults.install(every_step=rng.random() < 0.5, slow=["batch=0.03"]))
    run.until("run: ", 60)
    time.sleep(rng.uniform(0, 1.5))
    shutil.rmtree(place.own / "runs/exp", ignore_errors=True)
    code = run.wait(scripts.WAIT)
    if code == 0:
        return "had ended"
    check(str(place.own / "runs/exp") in _refused(run, code, "output deleted"), "output deleted: not named")
    return None


def data_deleted(place, rng, task):
    data = shutil.copytree(scripts.data(place.shared, task), place.own / "DATA")
    run = scripts.start(task, place, "--data", data, "--workers", rng.choice((0, 2)),
                        setup=lambda: faults.install(every_step=True, slow=["batch=0.03"]))
    run.until("run: ", 60)
    time.sleep(rng.uniform(0, 1.5))
    shutil.rmtree(data)
    code = run.wait(scripts.WAIT)
    if code == 0:
        return "had ended"
    check(str(data) in _refused(run, code, "data deleted"), "data deleted: not named")
    scripts.saved(place.own / "runs/exp")
    return None


def read_only(place, rng, task):
    """The folder of the runs cannot be written: refused before the training."""
    project = rng.choice((place.own / "closed", Path("/proc"), place.own / "file"))
    (place.own / "file").write_text("x")
    (place.own / "closed").mkdir()
    if project.name == "closed":
        project.chmod(0o555)
    ordinary = os.getuid() == 0 and project.name == "closed"

    def drop():  # root may write everywhere
        if ordinary:
            os.setgid(65534), os.setuid(65534)
    scripts.data(place.shared, task)
    for path in (place.shared, place.shared.parent, place.own):
        path.chmod(0o777 if path == place.own else 0o755)
    run = scripts.start(task, place, "--project", project, setup=drop)
    line = _refused(run, run.wait(scripts.WAIT), "read-only output")
    check(str(project) in line, "read-only output: not named", line)


def full_disk(place, rng, task):
    """Files of more than a random size cannot be written: training or prediction ends with one line."""
    best = scripts.straight(place.shared, task) / "runs/exp/best.pt"
    limit = int(best.stat().st_size * 4 ** rng.uniform(-7, 1.5))

    def setup():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if rng.random() < 0.5:
        run = core.script(predict, *scripts.predict_flags(place.shared, task, place.own / "out"),
                          path=place.own / "log", cwd=place.own, setup=setup)
        what = "full disk, predict.py"
    else:
        run = scripts.start(task, place, setup=setup)
        what = "full disk"
    code = run.wait(scripts.WAIT)
    if code == 0:
        return "large enough"
    line = _refused(run, code, what)
    check("cannot be written" in line or "cannot be made" in line, f"{what}: another reason", line)
    if what == "full disk" and scripts.saved(place.own / "runs/exp"):
        scripts.finish(scripts.start(task, place, "--resume", place.own / "runs/exp"))
        scripts.same_run(place.shared, task, place.own / "runs/exp")
    return None


def vanishing_mount(place, rng, task):
    """The run's folder becomes unwritable in mid-run (its files are replaced by folders)."""
    run = scripts.start(task, place, setup=lambda: faults.install(every_step=True, slow=["batch=0.03"]))
    folder, end = place.own / "runs/exp", time.monotonic() + 60
    while not (folder / "last.pt").exists() and run.process.exitcode is None:
        check(time.monotonic() < end, "no checkpoint", run.out)
        time.sleep(0.01)
    target = rng.choice(("last.pt.prev", "results.csv", "run.json", "best.pt"))
    with contextlib.suppress(OSError):
        (folder / target).unlink(missing_ok=True)
        (folder / target).mkdir()
        (folder / target / "x").write_text("x")
    code = run.wait(scripts.WAIT)
    if code == 0:
        return "had ended"
    _refused(run, code, f"a folder named {target}")
    return None


# ---- machine ---------------------------------------------------------------------------------------------------------
def clock(place, rng, task):
    """The clock jumps by up to a year, again and again; files are dated in the future."""
    def setup():
        real, jumps = time.time, itertools.cycle([rng.uniform(-3e7, 3e7) for _ in range(7)])
        time.time = lambda: real() + next(jumps)
        faults.install(every_step=True)
    data = shutil.copytree(scripts.data(place.shared, task), place.own / "DATA")
    for path in data.rglob("*"):
        os.utime(path, (time.time() + rng.uniform(-1e9, 1e9),) * 2)
    run = scripts.start(task, place, "--data", data, setup=setup)
    if rng.random() < 0.5:
        run.process.join(rng.uniform(0.5, 2))
        run.send(signal.SIGKILL)
    folder = place.own / "runs/exp"
    if run.wait(scripts.WAIT):
        flags = ["--resume", folder] if scripts.saved(folder) else []
        shutil.rmtree(folder) if not flags else None
        scripts.finish(scripts.start(task, place, "--data", data, *flags, setup=setup))
    scripts.same_run(place.shared, task, folder)


def memory(place, rng, task):
    """Little address space: the run ends well, or with one line that says so."""
    more = int(2 ** rng.uniform(20, 30))
    predicts = rng.random() < 0.4

    def setup():
        core.limit_memory(more)
    run = core.script(predict, *scripts.predict_flags(place.shared, task, place.own / "out"), path=place.own / "log",
                      cwd=place.own, setup=setup) if predicts else \
        scripts.start(task, place, "--workers", rng.choice((0, 2)), setup=setup)
    code = run.wait(scripts.WAIT)
    if code == 0:
        return "enough"
    if not predicts:
        scripts.saved(place.own / "runs/exp")
    if code < 0 or code > 5:  # a library that does not ask whether it got its memory
        return f"a library ended the process ({code})"
    line = _refused(run, code, "little memory")
    return "out of memory" if "memory" in line else "another line"


def file_descriptors(place, rng, task):
    """Few files may be open."""
    most = rng.choice((24, 40, 64, 128))

    def setup():
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    run = scripts.start(task, place, "--workers", rng.choice((0, 2)), setup=setup)
    code = run.wait(scripts.WAIT)
    if code == 0:
        return "enough"
    _refused(run, code, "few open files")
    return None


def shared_memory(place, rng, task):
    """A /dev/shm of a few hundred kilobytes, where this process may mount one."""
    inside = [sys.executable, ROOT / f"train_{task}.py", "--data", scripts.data(place.shared, task),
              *scripts.TASKS[task].flags, "--workers", 2, "--project", place.own / "runs"]
    line = " ".join(map(str, inside))
    size = rng.choice((16, 64, 400))
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"mount -t tmpfs -o size={size}k tmpfs /dev/shm || exit 99; exec {line}"],
        cwd=place.own, capture_output=True, text=True, timeout=scripts.WAIT, env=os.environ | ENV)
    if done.returncode == 99 or "unshare" in done.stderr:
        return "not possible here"
    text = done.stderr[-2500:]
    check("Traceback" not in text, "small /dev/shm: traceback", text)
    check(done.returncode in (0, 2), f"small /dev/shm: exit {done.returncode}", text)
    check(done.returncode == 0 or text.count("error: ") == 1, "small /dev/shm: no single line", text)
    return f"exit {done.returncode}"


def language(place, rng, task):
    """LANG=C, and folders whose names are not ASCII."""
    own = place.own / "größe 火"
    shutil.copytree(scripts.data(place.shared, task), own / "DATA")
    env = {"LANG": "C", "LC_ALL": rng.choice(("C", "POSIX")), "PYTHONCOERCECLOCALE": rng.choice(("0", "1")),
           "HOME": "/nonexistent"}
    run = core.command(ROOT / f"train_{task}.py", "--data", "DATA", *scripts.TASKS[task].flags, "--name", "läuft",
                       path=place.own / "log", cwd=own, **env)
    scripts.finish(run)
    best = own / f"runs/{task}/läuft/best.pt"
    checkpoint.load(best)
    run = core.command(ROOT / "predict.py", "--task", task, "--weights", best, "--device", "cpu", "--workers", 0,
                       "--source", own / "DATA" / scripts.TASKS[task].test, path=place.own / "log", cwd=own, **env)
    scripts.finish(run)


# ---- what earlier runs have left -------------------------------------------------------------------------------------
def damaged_caches(place, rng, task):
    """Every file in runs/cache is damaged between two runs: the second one is as the first one."""
    cache = rng.choice((["--cache", "disk"], []))
    scripts.finish(scripts.start(task, place, "--name", "first", *cache))
    files = sorted(path for path in (place.own / "runs/cache").rglob("*") if path.is_file())
    for path in files:
        kind = rng.randrange(4)
        if kind == 0:
            path.write_bytes(b"")
        elif kind == 1 and path.suffix != ".lock":
            path.unlink()
            path.mkdir()
        elif path.stat().st_size:
            path.write_bytes(mutated(path.read_bytes()[:2**20], rng))
    run = scripts.start(task, place, *cache)
    code = run.wait(scripts.WAIT)
    lines = "\n".join(run.err)
    check("Traceback" not in lines, "damaged cache: traceback", lines[-2500:])
    if code:
        check(code == 2, f"damaged cache: exit {code}", lines)
        return "refused"
    if cache and any(path.suffix == ".bin" for path in files):
        return "trained"  # a cache on disk has no checksum of its pixels
    scripts.same_run(place.shared, task, place.own / "runs/exp")
    return "the same bits"


def neighbours(place, rng, task):
    """Damaged run folders beside the run, of which it makes a table, and among which --resume looks for the newest."""
    runs = place.own / "runs"
    trained = scripts.straight(place.shared, task) / "runs/exp"
    for name in ("a", "b", "c"):
        folder = shutil.copytree(trained, runs / name)
        for path in sorted(path for path in folder.iterdir() if path.is_file()):
            kind = rng.randrange(5)
            if kind == 0:
                path.unlink()
            elif kind == 1:
                path.write_bytes(mutated(path.read_bytes()[:2**16] or b"empty", rng))
            elif kind == 2:
                path.unlink()
                rng.choice((path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(path)))()
        for path in (folder, *folder.iterdir()):
            with contextlib.suppress(OSError):
                os.utime(path, (time.time() - rng.uniform(0, 1e6),) * 2, follow_symlinks=False)
    before = {k: v for k, v in digest(runs).items() if Path(k).name not in ("summary.csv", "lock")}
    scripts.finish(scripts.start(task, place))
    scripts.same_run(place.shared, task, runs / "exp")
    check(before.items() <= digest(runs).items(), "a neighbour was changed")
    run = core.command("-m", "utils.report", runs, path=place.own / "log", cwd=place.own, PYTHONPATH=str(ROOT))
    code = run.wait(60)
    check(code in (0, 2) and "Traceback" not in "\n".join(run.err), "the table: traceback", "\n".join(run.err))
    shutil.rmtree(runs / "exp")
    run = scripts.start(task, place, "--resume")
    code = run.wait(scripts.WAIT)
    if code:
        _refused(run, code, "--resume among damaged runs")
        return "none to resume"
    return "one resumed"


CASES = {"two runs in one folder": two_runs, "output deleted": output_deleted, "data deleted": data_deleted,
         "read-only output": read_only, "full disk": full_disk, "a folder in the way": vanishing_mount, "clock": clock,
         "little memory": memory, "few open files": file_descriptors, "small /dev/shm": shared_memory,
         "LANG=C": language,
         "damaged caches": damaged_caches, "damaged neighbours": neighbours}
GOAL = Goal("E", "two runs, deleted and full folders, clock, memory, language, caches, neighbours", trial, cap=500,
            seconds=500, share=2, short=(29, 30))
