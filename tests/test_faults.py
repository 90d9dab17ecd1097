"""Whole processes that are killed, stopped, starved and resumed: nothing is lost, and every end is one line.

The toy script of tests/toy.py trains 4 epochs of 7 batches in windows of 3, with dropout, batch norm, an average,
warmup, and files written after every step.
"""
import os
import random
import shutil
import signal
import sys
import time

import pytest

from tests.harness import command, differences, read, start, toy
from utils.train import checkpoint

RUN = ("--epochs", 4, "--accumulate", 3, "--clip", 1, "--save-period", 2)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of a run that nobody disturbed."""
    project = tmp_path_factory.mktemp("straight")
    toy(project, *RUN)
    return project / "exp"


def table(folder):
    """results.csv without the column of seconds."""
    return [line.rpartition(",")[0] for line in (folder / "results.csv").read_text().splitlines()]


def same_run(a, b):
    """All that two runs leave behind is the same, to the bit."""
    for file in ("last.pt", "best.pt", "epoch_2.pt", "epoch_4.pt"):
        assert differences(read(a / file), read(b / file)) == [], file
    assert table(a) == table(b)
    assert not list(b.glob("*.tmp"))


def one_error(run, *words):
    """Exactly one line went to stderr."""
    assert len(run.err) == 1 and run.err[0].startswith("error: "), run.err
    for word in words:
        assert word in run.err[0]
    return run.err[0]


# ---- SIGKILL ---------------------------------------------------------------------------------------------------------
EVENTS = {"batch": 12, "write": 1500, "fsync": 5, "fsynced": 5, "replace": 9, "replaced": 9, "eval": 6}  # and how often


def chain(project, name, workers, rng, counts):
    """Starts a run, kills it, resumes it, kills it again ... until it ends. Returns how often it was killed."""
    folder, kills = project / name, 0
    while True:
        event, fault, timer = rng.choice([*EVENTS, "timer"]), [], 0.0
        if event == "timer":
            timer = rng.uniform(0, 1.2)
        else:
            fault = ["--fault", f"kill@{event}:{rng.randint(1, EVENTS[event])}"]
        resume = ["--resume", folder] if kills and saved(folder) else []
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        run = start(project, *RUN, "--name", name, "--workers", workers, *resume, *fault, "--slow", "fsync=0.01",
                    *["--every-step"] * rng.choice([True, True, False]))
        if timer:
            time.sleep(timer)
            run.send(signal.SIGKILL)
        code = run.wait()
        assert code in (0, -9), f"exit {code}\n{run.out}\n{run.err}"
        if code == 0:
            return kills
        kills += 1
        counts[event] = counts.get(event, 0) + 1


def saved(folder):
    """Whether the run has saved; then the newest save is valid."""
    if not (folder / "last.pt").exists() and not (folder / "last.pt.prev").exists():
        return False
    checkpoint.load(folder / "last.pt")
    return True


def campaign(project, straight, workers, kills, seed):
    """Chains until so many kills have been survived."""
    rng, counts, number = random.Random(seed), {}, 0
    while sum(counts.values()) < kills:
        number += 1
        chain(project, f"chain{number}", workers, rng, counts)
        same_run(straight, project / f"chain{number}")
    return counts


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_killed_and_resumed_run_ends_with_the_same_bits(tmp_path, straight, workers):
    campaign(tmp_path, straight, workers, 8, seed=workers)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_hundred_kills(tmp_path, straight, workers):
    counts = campaign(tmp_path, straight, workers, 100, seed=100 + workers)
    assert set(counts) == {*EVENTS, "timer"} and min(counts.values()) >= 3, counts


@pytest.mark.parametrize("fault", ["kill@write:700", "kill@write:1000", "kill@replace:3", "kill@replace:4",
                                   "kill@replaced:3", "kill@fsync:4", "kill@fsynced:6"])
def test_killed_at_the_end_of_an_epoch(tmp_path, straight, fault):
    """best.pt, epoch_2.pt, the table: none of them may be missed by the run that goes on."""
    toy(tmp_path, *RUN, "--fault", fault, code=-9)
    assert start(tmp_path, "--resume", "--fault", fault).wait() in (-9, 0)
    toy(tmp_path, "--resume")
    same_run(straight, tmp_path / "exp")


@pytest.mark.slow
def test_every_rename_of_a_run(tmp_path, straight):
    for before in ("replace", "replaced"):
        for n in range(1, 100):
            run = start(tmp_path, *RUN, "--name", f"{before}{n}", "--fault", f"kill@{before}:{n}")
            if run.wait() == 0:
                assert n > 15
                break
            folder = tmp_path / f"{before}{n}"
            if saved(folder):
                toy(tmp_path, "--resume", folder)
                same_run(straight, folder)


def test_workers_of_a_killed_run_go_away(tmp_path):
    run = start(tmp_path, "--workers", 2, "--slow", "batch=0.2").until("started")
    time.sleep(0.6)
    assert group(run.pid) >= 3
    run.send(signal.SIGKILL)
    run.wait()
    gone(run, 30)


def gone(run, seconds):
    """Waits until no process of the run is left."""
    end = time.monotonic() + seconds
    while group(run.pid):
        assert time.monotonic() < end, "workers live on"
        time.sleep(0.02)


def group(pgid):
    """How many processes there are in a process group."""
    count = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            state, _, pgrp = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[:3]
            count += int(pgrp) == pgid and state != "Z"
        except OSError:
            pass
    return count


# ---- SIGTERM and Ctrl-C ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("workers, signum, code", [
    (2, signal.SIGTERM, 143), (0, signal.SIGINT, 130), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (0, signal.SIGTERM, 143), (2, signal.SIGINT, 130)))])
def test_stopped_from_outside_and_resumed(tmp_path, straight, workers, signum, code):
    """As a cluster or a Ctrl-C does it: the signal goes to all processes of the job, at any time."""
    rng, stops = random.Random(code + workers), 0
    while True:
        resume = ["--resume"] * bool(stops)
        run = start(tmp_path, *RUN, "--workers", workers, "--slow", "batch=0.02", *resume).until("started")
        time.sleep(rng.uniform(0.05, 0.8))
        began = time.monotonic()
        run.send(signum, group=True)
        found = run.wait()
        assert time.monotonic() - began < 5 and found in (0, code)
        if found == 0:
            break
        assert run.err == []
        stops += 1
        if "stopped and saved at step" not in run.out:  # it came before the loop had begun
            assert not saved(tmp_path / "exp") or stops > 1
            stops = int(saved(tmp_path / "exp"))
            if not stops:
                shutil.rmtree(tmp_path / "exp")
    assert stops
    same_run(straight, tmp_path / "exp")


def test_stopped_before_the_loop_begins(tmp_path):
    for signum, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        run = start(tmp_path, "--fault", "hang@start").until("started")
        time.sleep(0.2)
        began = time.monotonic()
        run.send(signum)
        assert run.wait() == code and time.monotonic() - began < 2 and run.err == []
    assert not list(tmp_path.glob("*/last.pt"))


def test_stopped_in_validation(tmp_path, straight):
    run = start(tmp_path, *RUN, "--slow", "eval=0.5", "--fault", "term@eval:3")
    began = time.monotonic()
    assert run.wait() == 143 and time.monotonic() - began < 5 and "saved at step 3" in run.out  # all of it takes 6 s
    toy(tmp_path, "--resume")
    same_run(straight, tmp_path / "exp")


def test_more_signals_while_it_saves(tmp_path, straight):
    run = start(tmp_path, *RUN, "--fault", "term@batch:10", "--slow", "fsync=0.3", "--workers", 2)
    for _ in range(40):
        time.sleep(0.05)
        if "epoch 1" in run.out:
            run.send(signal.SIGTERM, group=True)
            run.send(signal.SIGINT, group=True)
    assert run.wait() in (143, 130) and run.err == []
    assert "stopped and saved at step" in run.out
    toy(tmp_path, "--resume")
    same_run(straight, tmp_path / "exp")


# ---- what else can happen --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fault, code, words", [
    ("kill@sample:40", 2, ["DataLoader worker", "--workers"]),
    ("hang@sample:40", 2, ["no sign of life from a loader worker", "--workers", "--timeout"]),
    ("stop@sample:40", 2, ["no sign of life from a loader worker", "--workers", "--timeout"]),
    ("error@sample:40", 2, ["error: toy sample: an error to order; order another"])])
def test_a_worker_that_fails(tmp_path, straight, fault, code, words):
    """One line, at once, no process left behind; and the run goes on from its last save."""
    began = time.monotonic()
    run = toy(tmp_path, *RUN, "--workers", 2, "--fault", fault, "--timeout", 1, "--every-step", code=code)
    assert time.monotonic() - began < 10
    one_error(run, *words)
    gone(run, 2)
    assert saved(tmp_path / "exp")
    toy(tmp_path, "--resume")
    same_run(straight, tmp_path / "exp")


def test_a_fault_of_ours_shows_where(tmp_path):
    for workers in (0, 1):
        run = toy(tmp_path, "--workers", workers, "--fault", "crash@sample:9", code=1)
        assert "ZeroDivisionError: a crash to order" in run.err and any("toy.py" in line for line in run.err)


@pytest.mark.parametrize("fault, code, words", [
    ("full@write:700", 2, [".pt: cannot be written (No space left on device); make room"]),
    ("full@replace:7", 2, ["No space left on device", "exp", "--resume"]),
    ("full@fsync:5", 2, [".pt: cannot be written (No space left on device); make room"]),
    ("nan@batch:9", 3, ["no longer finite", "--lr"]), ("inf@batch:9", 3, ["no longer finite", "--lr"]),
    ("memory@batch:9", 2, ["out of memory", "--bs"]), ("error@eval:4", 2, ["toy eval: an error to order"])])
def test_a_run_that_fails_goes_on_from_its_last_save(tmp_path, straight, fault, code, words):
    one_error(toy(tmp_path, *RUN, "--fault", fault, code=code), *words)
    assert saved(tmp_path / "exp")
    toy(tmp_path, "--resume")
    same_run(straight, tmp_path / "exp")


def test_the_run_folder_is_deleted(tmp_path):
    run = start(tmp_path, *RUN, "--slow", "batch=0.05").until("started")
    shutil.rmtree(tmp_path / "exp")
    assert run.wait() == 2
    one_error(run, str(tmp_path / "exp"))


def test_two_processes_in_one_folder(tmp_path, straight):
    first = start(tmp_path, *RUN, "--every-step", "--slow", "batch=0.05").until("started")
    while not (tmp_path / "exp" / "last.pt").exists():
        time.sleep(0.01)
    for resume in (["--resume"], ["--resume", tmp_path / "exp"], ["--resume", tmp_path / "exp" / "last.pt"]):
        one_error(toy(tmp_path, *resume, code=2), str(tmp_path / "exp"), "another process trains in this run folder")
    assert first.wait() == 0
    same_run(straight, tmp_path / "exp")


def test_resumed_with_other_flags(tmp_path):
    toy(tmp_path, *RUN, "--fault", "term@batch:10", code=143)
    one_error(toy(tmp_path, "--resume", "--bs", 8, code=2), "--resume", "3 steps per epoch", "--bs")
    run = toy(tmp_path, "--resume", "--lr", 0.01, "--epochs", 5)
    assert "--lr: 0.01 instead of the run's 0.02" in run.out and "--epochs: 5 instead of the run's 4" in run.out
    assert len(read(tmp_path / "exp" / "last.pt")["history"]) == 5
    again = toy(tmp_path, "--resume")
    assert "epoch" not in again.out  # it had ended


@pytest.mark.slow
@pytest.mark.parametrize("pipe", ["2>&1 | head -c 10", ">&- 2>&-"])
def test_output_that_nobody_reads(tmp_path, straight, pipe):
    """The run may end for it, but what it has saved stays whole."""
    line = " ".join(map(str, (sys.executable, "-m", "tests.toy", "--project", tmp_path, *RUN, "--slow", "batch=0.02")))
    run = command(tmp_path, "bash", "-c", f"{line} {pipe}; exit ${{PIPESTATUS[0]}}")
    assert run.wait() in (0, 141) and run.err == []
    if not saved(tmp_path / "exp") or len(read(tmp_path / "exp" / "last.pt")["history"]) < 4:
        assert "head" in pipe
        toy(tmp_path, *RUN, *["--resume"] * saved(tmp_path / "exp"))
    same_run(straight, sorted(tmp_path.glob("exp*"))[-1])
