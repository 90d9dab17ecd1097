"""The short form of the campaign (tests/campaign): a few trials of every goal, with a fixed seed, all of which pass."""
import time

import pytest

from tests.campaign import core
from tests.campaign.goals import GOALS

SEED = 0


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """One folder for all goals: they share data and undisturbed runs."""
    return tmp_path_factory.mktemp("campaign")


LONG = {"G1", "G2", "G6", "G7", "E"}  # whole runs that are killed, stopped and resumed: a minute and more


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in GOALS])
def test_a_few_trials(root, name):
    goal = GOALS[name]
    report = core.run(goal, SEED, goal.short, root, time.monotonic() + 200)
    again = [f"{kind}: {report.again(found[0][0])}\n{found[0][1]}" for kind, found in report.failures.items()]
    assert not again and report.tried == len(goal.short), "\n\n".join(again)


def test_a_trial_is_drawn_from_its_number(tmp_path):
    """The same number gives the same trial; another number, or another goal, another one."""
    drawn = []

    def trial(place, rng, number):
        return {str(rng.random()): 1}
    for name, numbers in (("A", [3]), ("A", [1, 2, 3]), ("A", [4]), ("B", [3])):
        goal = core.Goal(name, "", trial, 10, 10, 1, ())
        drawn.append(set(core.run(goal, SEED, numbers, tmp_path, time.monotonic() + 60).done))
    assert drawn[0] < drawn[1] and len(drawn[1]) == 3 and not drawn[0] & (drawn[2] | drawn[3])


def test_failures_are_counted_by_kind_and_trials_go_on(tmp_path):
    """An error, a crash and a hang cost one trial each."""
    import os

    def trial(place, rng, number):
        if number == 1:
            core.check(False, "wrong", "the reason")
        elif number == 2:
            os.kill(os.getpid(), 9)
        elif number == 3:
            time.sleep(600)
        elif number == 4:
            raise ZeroDivisionError
        return {"done": 1}
    goal = core.Goal("A", "what", trial, 10, -18, 1, ())  # hangs are noticed after 2 s
    report = core.run(goal, SEED, range(6), tmp_path, time.monotonic() + 60)
    kinds = {kind: [number for number, _ in found] for kind, found in report.failures.items()}
    assert kinds == {"wrong": [1], "crash (exit -9)": [2], "hang": [3], "ZeroDivisionError: test_campaign.trial": [4]}
    assert report.tried == 6 and report.done == {"done": 2}
    text = core.table([report])
    assert "| A | what | 6 | 2 |" in text and "--only A --seed 0 --trial 1" in text and "the reason" in text
