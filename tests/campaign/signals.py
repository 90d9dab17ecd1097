"""G6: SIGTERM and Ctrl-C at any moment, twice, and output that nobody reads: the right exit code, and nothing lost."""
import os
import signal
import subprocess
import sys
import time

import predict
from tests import harness
from tests.campaign import core, faults, scripts
from tests.campaign.core import Goal, check

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
PATIENCE = 10  # seconds from the signal to the end, on a busy machine
KINDS = ("real", "training", "training", "twice", "group", "predict", "head", "real head", "save", "validation")


def trial(place, rng, number):
    """The kinds go around; a training run that was stopped is then resumed, and must end with the same bits."""
    kind, task = KINDS[number % len(KINDS)], list(scripts.ALL)[number // len(KINDS) % 4]
    if task == "toy" and (kind == "predict" or kind.startswith("real")):
        task = "cls"
    return {"real": _real, "predict": _predict, "head": _head, "real head": _real_head}.get(kind, _training)(
        place, rng, task, kind)


# ---- forked runs -----------------------------------------------------------------------------------------------------
def _training(place, rng, task, kind):
    counts, seconds = scripts.what_happened(scripts.straight(place.shared, task))
    signum, workers = rng.choice(list(CODES)), rng.choice((0, 2))
    word, fault, slow = {signal.SIGTERM: "term", signal.SIGINT: "int"}[signum], "", []
    if kind == "save":
        event = rng.choice(("write", "fsync", "replace", "replaced"))
        fault, slow = f"{word}@{event}:{rng.randint(1, max(counts[event], 1))}", ["fsync=0.05"]
    elif kind == "validation":
        fault, slow = f"{word}@eval:{rng.randint(1, counts['eval'])}", ["eval=0.05"]
    run = scripts.start(task, place, "--workers", workers,
                        setup=lambda: faults.install(fault, every_step=rng.random() < 0.5, slow=slow))
    if not fault:
        run.process.join(rng.uniform(0.02, seconds))
        run.send(signum, group=kind == "group")
    second = None
    if kind in ("twice", "save", "group"):
        run.process.join(rng.uniform(0, 0.3))
        second = rng.choice(list(CODES))
        run.send(second, group=rng.random() < 0.5)
    began = time.monotonic()
    code = run.wait(scripts.WAIT)
    took = time.monotonic() - began
    _ended(run, code, {signum, second or signum}, early="run: " not in run.out)
    check(fault or code == 0 or took < PATIENCE, "the end takes too long", f"{took:.1f} s")
    return {f"{kind}: {_resumed(place, task, code)}": 1}


def _ended(run, code, signums, early=False):
    """Fails for another exit code than those of the signals or 0. early: before main() could set its handlers."""
    good = {0, *(CODES[signum] for signum in signums)}
    if early:
        good |= {-signum for signum in signums}
    core.no_traceback(run, code)
    check(code in good, f"exit {code}", f"{run.out[-1500:]}\n" + "\n".join(run.err[-20:]))
    check(code == 0 or not run.err, "more than nothing on stderr", "\n".join(run.err[-20:]))


def _resumed(place, task, code):
    """What a run that was stopped has left is whole, and goes on to the same end."""
    folder = place.own / "runs/exp"
    if not folder.exists() or not scripts.saved(folder):
        check(not list(place.own.glob("runs/*/last.pt")), "a checkpoint elsewhere")
        return "before the first save"
    scripts.finish(scripts.start(task, place, "--resume", folder))
    scripts.same_run(place.shared, task, folder)
    return "had ended" if code == 0 else "resumed"


def _predict(place, rng, task, kind):
    """predict.py stopped at any moment: its results are whole or absent, and the next call writes them."""
    signum, out = rng.choice(list(CODES)), place.own / "out"
    flags = scripts.predict_flags(place.shared, task, out)
    run = core.script(predict, *flags, path=place.own / "log", cwd=place.own)
    run.process.join(rng.uniform(0, 1.5))
    run.send(signum)
    if rng.random() < 0.3:
        run.send(rng.choice(list(CODES)))
    code = run.wait(60)
    core.no_traceback(run, code)
    check(code in (0, *CODES.values(), *(-signum for signum in CODES)), f"predict.py: exit {code}", "\n".join(run.err))
    again = core.script(predict, *flags[:-1], place.own / "again", path=place.own / "log", cwd=place.own)
    scripts.finish(again)
    return {f"predict: {'had ended' if code == 0 else 'stopped'}": 1}


def _head(place, rng, task, kind):
    """Who reads the output closes it, at any moment: exit code 141 or 0, and what is saved stays whole."""
    reading, writing = os.pipe()

    def onto_the_pipe():
        os.dup2(writing, 1)
        if both:
            os.dup2(writing, 2)
        os.close(reading)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # the old ones can seek
    both, after = rng.random() < 0.5, rng.choice((0, 10, 500, 1500, 3000))
    run = scripts.start(task, place, "--workers", rng.choice((0, 2)), setup=onto_the_pipe)
    os.close(writing)
    while after > 0 and (text := os.read(reading, after)):
        after -= len(text)
    os.close(reading)
    code = run.wait(scripts.WAIT)
    core.no_traceback(run, code)
    check(code in (0, 141), f"a closed pipe: exit {code}", "\n".join(run.err))
    check(not run.err, "a closed pipe: lines on stderr", "\n".join(run.err))
    return {f"head: {_resumed(place, task, code)}": 1}


# ---- real commands ---------------------------------------------------------------------------------------------------
def _real(place, rng, task, kind):
    """A command as a person types it, stopped anywhere from its first import on."""
    signum = rng.choice(list(CODES))
    run = core.command(harness.ROOT / f"train_{task}.py", "--data", scripts.data(place.shared, task),
                       *scripts.TASKS[task].flags, "--project", place.own / "runs", path=place.own / "log",
                       cwd=place.own)
    time.sleep(rng.uniform(0, 8))
    run.send(signum, group=rng.random() < 0.5)
    if rng.random() < 0.3:
        time.sleep(rng.uniform(0, 0.2))
        run.send(signum)
    began, code = time.monotonic(), run.wait(scripts.WAIT)
    check(code == 0 or time.monotonic() - began < PATIENCE, "the end takes too long")
    early = not (place.own / "runs").exists()
    if early:  # Python itself answers to what comes during the imports, to Ctrl-C with a traceback
        check(code in (-signum, CODES[signum]), f"during the imports: exit {code}", "\n".join(run.err[-20:]))
        return {f"real: during the imports{', with a traceback' * ('Traceback' in ' '.join(run.err))}": 1}
    core.no_traceback(run, code)
    check(code in (0, CODES[signum]), f"a real command: exit {code}", "\n".join(run.err[-20:]))
    return {f"real: {_resumed(place, task, code)}": 1}


def _real_head(place, rng, task, kind):
    """`| head -1` and the like behind real commands."""
    data, own, root = scripts.data(place.shared, task), place.own, harness.ROOT
    trained = scripts.straight(place.shared, task) / "runs/exp"
    flags = " ".join(map(str, scripts.TASKS[task].flags))
    lines = (f"{root}/train_{task}.py {flags} --data {data}", f"{root}/train_{task}.py --help",
             f"-m data.samples --only wildfire --train 4 --size 64 --out {own}/samples", f"-m utils.report {trained}",
             f"{root}/predict.py --task {task} --weights {trained}/best.pt --source {data / scripts.TASKS[task].test} "
             f"--device cpu --workers 0 --out {own}/out")
    line, pipe = rng.choice(lines), rng.choice(("| head -1", "2>&1 | head -1", "| head -c 5", "2>&1 | true"))
    done = subprocess.run(["bash", "-c", f"{sys.executable} {line} {pipe}; exit ${{PIPESTATUS[0]}}"], cwd=own,
                          capture_output=True, text=True, timeout=scripts.WAIT, env=os.environ | harness.ENV)
    what = f"{line} {pipe}: exit {done.returncode}\n{done.stderr[-2000:]}"
    check("Traceback" not in done.stderr + done.stdout, "real head: traceback", what)
    check("Exception ignored" not in done.stderr, "real head: Exception ignored", what)
    check(done.returncode in (0, 141), f"real head: exit {done.returncode}", what)
    return {f"real head: exit {done.returncode}": 1}


GOAL = Goal("G6", "SIGTERM and Ctrl-C at random moments, closed pipes: exit codes, then resumed to the same bits",
            trial, cap=1000, seconds=400, share=3, short=(31, 36))
