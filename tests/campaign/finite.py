"""G9: NaN and infinity in loss, gradients, moments, weights, pixels and running statistics, at every step.

The run ends with exit code 3 or goes on; no file that it leaves behind holds a number that is not finite; and what the
message advises works: --resume, from a valid file, to the bits of a run in which nothing happened.
"""
import itertools
import math

import torch

from tests import toy
from tests.campaign import scripts
from tests.campaign.core import Goal, check
from tests.harness import differences, read
from utils import tensors
from utils.train import checkpoint
from utils.train.state import State

EPOCHS, BATCHES = 3, 7
VALUES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
PLACES = ("loss", "gradient", "moment", "second moment", "weight", "average", "pixel", "running mean", "running var",
          "one gradient", "validation pixel")
CASES = list(itertools.product(PLACES, ("off", "bf16", "fp16"), VALUES, range(1, EPOCHS * BATCHES + 1)))


def case_of(number):
    """The cases in an order in which neighbours differ in everything."""
    return CASES[number * 389 % len(CASES)]  # 389 has no common factor with their number


assert math.gcd(389, len(CASES)) == 1


def run_flags(amp):
    return ["--epochs", EPOCHS, "--accumulate", 2, "--amp", amp, "--save-period", 2]


def straight(shared, amp):
    """The folder of a run in which nothing happens."""
    def make(folder):
        scripts.finish(scripts.start_toy(folder, *run_flags(amp)))
    return scripts.made(shared / f"finite-{amp}", make) / "exp"


def trial(place, rng, number):
    where, amp, kind, step = case_of(number)
    project = place.own / "runs"
    every_step = ["--every-step"] * (rng.random() < 0.5)
    run = scripts.start_toy(project, *run_flags(amp), *every_step, "--workers", 0,
                            setup=lambda: inject(where, VALUES[kind], step))
    code = run.wait(60)
    what = f"{kind} in {where} at batch {step}, amp {amp} {every_step}: exit {code}"
    lines = "\n".join(run.err)
    check("Traceback" not in lines, "traceback", f"{what}\n{lines}")
    check(code in (0, 3), f"exit {code}", f"{what}\n{lines}")
    folder = project / "exp"
    for file in sorted(folder.glob("*.pt*")):
        _all_finite(file, what)
    if code == 3:
        check(len(run.err) == 1, "no single line", lines)
        advice = "--resume" in lines
        can = (folder / "last.pt").exists() or (folder / "last.pt.prev").exists()
        check(can or not advice, "advises --resume without a checkpoint", f"{what}\n{lines}")
        if can:
            checkpoint.load(folder / "last.pt")
            again = scripts.start_toy(project, "--resume", folder)
            code = again.wait(60)
            check(code == 0, f"the resumed run: exit {code}", f"{what}\n{lines}\n" + "\n".join(again.err))
            differ = differences(read(straight(place.shared, amp) / "last.pt"), read(folder / "last.pt"))
            check(not differ, "the resumed run: not the same bits", f"{what}: {differ[:6]}")
        else:
            check("start again" in lines or "--resume" in lines, "no advice", lines)
        return {f"{where} stopped": 1}
    return {f"{where} recovered": 1}


def _all_finite(path, what):
    """Reads a file without the checks of our reader."""
    state = torch.load(path, weights_only=True)
    for name, tensor in tensors.walk(state):
        good = not tensor.is_floating_point() or bool(tensor.isfinite().all())
        check(good, f"not finite in {path.name.split('_')[0]}", f"{what}: {path.name} {name}")


# ---- injections ------------------------------------------------------------------------------------------------------
def inject(where, value, step):
    """Hooks into this process: at the step-th batch of the run, `value` appears in that place."""
    real, seen = State.train_batch, []

    def train_batch(self, compute_loss, batch, index, batches):
        seen.append(index)
        if len(seen) != step:
            return real(self, compute_loss, batch, index, batches)
        with torch.no_grad():
            handles = _before(self, where, value, batch)
        if where == "loss":
            compute_loss = _poisoned(compute_loss, value)
        done = real(self, compute_loss, batch, index, batches)
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            _after(self, where, value)
        return done
    State.train_batch = train_batch
    if where == "validation pixel":
        item = toy.Data.__getitem__

        def __getitem__(self, key):
            sample = item(self, key)
            if not isinstance(key, tuple) and len(seen) >= step:
                sample["image"][0, 0, 0] = value
            return sample
        toy.Data.__getitem__ = __getitem__


def _poisoned(compute_loss, value):
    def poisoned(model, batch):
        loss, parts = compute_loss(model, batch)
        return loss * value, parts
    return poisoned


def _poison(tensor, value):
    """The first number of a tensor becomes `value`, whatever its strides."""
    tensor[(0,) * tensor.ndim] = value


def _before(state, where, value, batch):
    """Before the batch -> hooks to remove after it."""
    params = list(state.model.parameters())
    if where == "pixel":
        batch["image"][0, 0, 0, 0] = value
    elif where == "gradient":
        return [p.register_hook(lambda grad: grad * value) for p in params]
    elif where == "one gradient":
        def one(grad):
            grad = grad.clone()
            _poison(grad, value)
            return grad
        return [params[-1].register_hook(one)]
    return []


def _after(state, where, value):
    """After the batch, and after the optimizer's step if it made one."""
    moments = {"moment": "exp_avg", "second moment": "exp_avg_sq"}
    if where in moments:
        for entry in list(state.optimizer.state.values())[:1]:
            _poison(entry[moments[where]], value)
    elif where == "weight":
        _poison(next(state.model.parameters()), value)
    elif where == "average" and state.ema:
        _poison(next(state.ema.module.parameters()), value)
    elif where.startswith("running"):
        for name, buffer in state.model.named_buffers():
            if name.endswith(where.replace(" ", "_")):
                buffer[0] = value
                return


GOAL = Goal("G9", "NaN and infinity at every step, fp32, bf16, fp16: nothing in files, exit 3 or recovery, resumable",
            trial, cap=len(CASES), seconds=200, share=2, short=(0, 1, 2))
