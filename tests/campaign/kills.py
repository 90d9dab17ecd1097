"""G1 and G2: runs that are killed again and again, and end with the bits of a run that nobody disturbed."""
import collections
import functools
import shutil
import signal
import time

from tests import harness
from tests.campaign import core, faults, scripts
from tests.campaign.core import Goal, check
from tests.test_faults import group

MOST = 8       # kills of one chain; then it may finish
RESTARTS = 12  # of torchrun, which on some machines uses up several to connect the ranks anew


# ---- G1: one process -------------------------------------------------------------------------------------------------
def single(place, rng, number):
    """A chain: start, kill, resume, kill ... until a run ends. The task and the number of workers go around."""
    task, workers = list(scripts.TASKS)[number % 3], number // 3 % 2 * 2
    counts, seconds = scripts.what_happened(scripts.straight(place.shared, task))
    folder, kills = place.own / "runs/exp", collections.Counter()
    while True:
        where, fault, timer = faults.draw(rng, counts, seconds) if kills.total() < MOST else ("", "", 0)
        resume = ["--resume", folder] if kills and scripts.saved(folder) else []
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        every_step, slow = rng.random() < 0.6, ["fsync=0.01"] if rng.random() < 0.5 else []
        run = scripts.start(task, place, "--workers", workers, *resume,
                            setup=lambda: faults.install(fault, every_step=every_step, slow=slow))
        if timer:
            run.process.join(timer)
            run.send(signal.SIGKILL)
        code = scripts.finish(run, (0, -signal.SIGKILL))
        if code == 0:
            break
        kills[f"{task} {where}"] += 1
        check(_alone(run), "workers live on")
    scripts.same_run(place.shared, task, folder)
    return {f"kills {name}": count for name, count in kills.items()}


def _alone(run, seconds=30):
    """Whether the workers of a run that was killed go away."""
    end = time.monotonic() + seconds
    while group(run.pid):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


# ---- G2: two ranks ---------------------------------------------------------------------------------------------------
def ranks(place, rng, number):
    """Kills of one rank of two. Even trials run under torchrun; in odd ones this process does what torchrun does, in a
    tenth of the time: it ends the other rank and starts both anew."""
    task, real = list(scripts.ALL)[number // 2 % 4], number % 2 == 0
    counts, _ = scripts.what_happened(scripts.straight(place.shared, task, ranks=2))
    orders = {}  # {restart: (rank, fault)}
    for restart in range(rng.choice((1, 1, 2))):
        rank = rng.randrange(2)
        events = ["batch", "trained", "eval", "evaluated", *["write", "fsync", "replaced"] * (rank == 0)]
        event = rng.choice(events)
        orders[restart] = rank, f"kill@{event}:{rng.randint(1, max(1, counts[event] // 2))}"
    restarts = (_torchrun if real else _agent)(task, place, orders, every_step=rng.random() < 0.6)
    folders = [path.name for path in (place.own / "runs").iterdir() if path.is_dir() and path.name != "cache"]
    check(folders == ["exp"], "another run folder", folders)
    scripts.same_run(place.shared, task, place.own / "runs/exp", ranks=2)
    kills = min(len(orders), restarts)  # a fault that the rest of a run is too short for does not come
    return {f"kills {task} {'torchrun' if real else 'forked'}": kills, "restarts": restarts}


def _torchrun(task, place, orders, every_step):
    """A run under torchrun -> how often it restarted the ranks."""
    words = " ".join(f"{restart}:{rank}:{fault}" for restart, (rank, fault) in orders.items())
    where = ["--data", scripts.data(place.shared, task)] if scripts.ALL[task].write else []
    run = core.command(
        "-m", "torch.distributed.run", "--nproc_per_node", 2, "--max-restarts", RESTARTS, "--master_port",
        harness.free_port(), "-m", "tests.campaign.rank", task, *where, *scripts.ALL[task].flags, "--project",
        place.own / "runs", path=place.own / "log", cwd=place.own, CAMPAIGN_FAULTS=words,
        CAMPAIGN_EVERY_STEP=str(int(every_step)))
    code = run.wait(400)
    log = "\n".join(run.err)
    check(code == 0, f"torchrun's exit {code}", f"{run.out[-2000:]}\n{log[-4000:]}")
    check("Traceback" not in log.replace("traceback : Signal", ""), "traceback", log[-4000:])
    return max(run.out.count("campaign rank 0 starts") - 1, 0)


def _agent(task, place, orders, every_step):
    """What torchrun does to its ranks -> how often they were started anew."""
    for restart in range(RESTARTS):
        rank, fault = orders.get(restart, (0, ""))
        setups = [functools.partial(faults.install, fault if rank == here else "", every_step=every_step)
                  for here in range(2)]
        both = scripts.world(task, place, setups=setups,
                             env={"TORCHELASTIC_RUN_ID": "campaign", "TORCHELASTIC_RESTART_COUNT": restart})
        end = time.monotonic() + scripts.WAIT
        while None in (codes := [run.process.exitcode for run in both]) and not any(codes):
            check(time.monotonic() < end, "both ranks hang", "\n".join(both[0].err + both[1].err))
            time.sleep(0.02)
        if codes == [0, 0]:
            return restart
        time.sleep(0.1)  # torchrun looks at its ranks ten times a second
        for run in both:
            run.send(signal.SIGTERM)
        for run in both:
            run.process.join(5)
            run.send(signal.SIGKILL, group=True)
            run.process.join()
        lines = both[0].err + both[1].err
        check("Traceback" not in "\n".join(lines), "traceback", "\n".join(lines))
    raise core.Failed("no end after all restarts")


SINGLE = Goal("G1", "SIGKILL at random moments, then --resume: the same bits", single, cap=1000, seconds=900, share=4,
              short=(5,))
RANKS = Goal("G2", "SIGKILL of one rank of two: restarted, the same bits", ranks, cap=200, seconds=900, share=4,
             short=(7,))
