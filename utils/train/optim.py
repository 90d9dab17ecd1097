"""Optimizers, learning-rate schedules as pure functions, and the EMA weights."""
import math

import torch
from torch.optim.swa_utils import AveragedModel

from utils.errors import UserError


def param_groups(model, weight_decay):
    """The parameters in three groups: weights, which have weight decay, and the scales of norms and the biases, which
    have none."""
    groups = {"weights": [], "scales": [], "biases": []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups["weights" if p.ndim > 1 else "biases" if name.endswith("bias") else "scales"].append(p)
    return [{"name": name, "params": params, "weight_decay": weight_decay if name == "weights" else 0.0}
            for name, params in groups.items() if params]


def parameters(optimizer):
    """The parameters of all groups of an optimizer."""
    return [p for group in optimizer.param_groups for p in group["params"]]


OPTIMIZERS = ("adamw", "adam", "sgd", "radam")


def make_optimizer(name, params, *, lr, momentum=0.9, eps=1e-8):
    """An optimizer for the groups of `param_groups`, with torch's fused kernels where it has them.

    sgd    Nesterov momentum
    adam   weight decay as part of the gradient (L2), as in the paper
    adamw  decoupled weight decay, times the learning rate (Loshchilov & Hutter 2019); also in radam
    radam  the adaptive learning rate is rectified while its variance is large (Liu et al. 2020)
    Raises UserError for another name, which a resumed run of another edition may have.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"--optimizer {name}: is not one of {', '.join(OPTIMIZERS)}; start a new run with --weights")
    if name == "sgd":
        optimizer = torch.optim.SGD(params, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=True)
        for p in parameters(optimizer) if momentum else ():
            # torch would leave them uninitialised when GradScaler skips the very first step
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    else:
        kind, options = {"adamw": (torch.optim.AdamW, {"fused": True}), "adam": (torch.optim.Adam, {"fused": True}),
                         "radam": (torch.optim.RAdam, {"decoupled_weight_decay": True})}[name]
        optimizer = kind(params, lr=lr, betas=(momentum, 0.999), eps=eps, **options)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def warm_up(optimizer, steps, *, bias_lr, momentum):
    """For the first `steps` optimizer steps, beside a schedule whose warm-up is as long: the learning rate of biases
    falls from `bias_lr`, while the others rise from 0, so that the net finds its output's scale before its weights
    move; the momentum rises from `momentum`. Returns the optimizer.
    """
    for group in optimizer.param_groups:
        final = group["betas"][0] if "betas" in group else group["momentum"]
        group["warmup"] = {"steps": steps, "lr": bias_lr if group["name"] == "biases" else 0.0,
                           "momentum": momentum, "final": final}
    return optimizer


SCHEDULES = ("restarts", "cosine", "flat", "linear", "step", "plateau", "constant")


def make_schedule(name, *, steps_per_epoch, epochs, warmup_epochs=0.0, period=10, floor=1e-3):
    """-> `schedule(step, scores)`, the factor on the initial learning rate at optimizer step `step` (from 0).

    restarts  a cosine from 1 to `floor` every `period` epochs (Loshchilov & Hutter 2017)
    cosine    one cosine from 1 to `floor` over the run
    flat      1 for the first half of the run, then a cosine from 1 to `floor` (RTMDet, Lyu et al. 2022)
    linear    linear from 1 to `floor` over the run
    step      x 0.75 every `period` epochs, not below `floor`
    plateau   x 0.5 after every `period` epochs without a better score, not below `floor`
    constant  1
    A linear warm-up from 0 precedes each of them. scores: those of the finished epochs, higher is better; only
    "plateau" uses them. As a pure function, the schedule has no state that a checkpoint would have to hold.
    """
    warmup = round(warmup_epochs * steps_per_epoch)
    total = max(epochs * steps_per_epoch - warmup, 1)
    length = period * steps_per_epoch

    def cosine(progress):
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2

    def schedule(step, scores=()):
        t = step - warmup
        if t < 0:
            return (step + 1) / warmup
        progress = min(t / total, 1)
        match name:
            case "restarts":
                return cosine(t % length / length)
            case "cosine":
                return cosine(progress)
            case "flat":
                return cosine(max(2 * progress - 1, 0))
            case "linear":
                return floor + (1 - floor) * (1 - progress)
            case "step":
                return max(0.75 ** (t // length), floor)
            case "plateau":
                return max(0.5 ** plateaus(scores, period), floor)
            case "constant":
                return 1.0

    return schedule


def plateaus(scores, patience):
    """How many times `patience` scores in a row were not better than the best before them."""
    count, best, waited = 0, -math.inf, 0
    for score in scores:
        waited = 0 if score > best else waited + 1
        best = max(best, score)
        if waited >= patience:
            count, waited = count + 1, 0
    return count


def set_lr(optimizer, factor, step=0):
    """Sets every group's learning rate to `factor` times its initial one, and what `warm_up` adds at this step."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
        if "warmup" in group:
            warmup = group["warmup"]
            left = max(1 - (step + 1) / max(warmup["steps"], 1), 0)
            group["lr"] += left * warmup["lr"]
            momentum = warmup["final"] + left * (warmup["momentum"] - warmup["final"])
            group.update({"betas": (momentum, group["betas"][1])} if "betas" in group else {"momentum": momentum})


def make_ema(model, total_steps):
    """The exponential moving average (EMA) of a model's weights and buffers, its horizon adapted to the run's length.

    The horizon is a twentieth of the run's steps, at most 10,000 (decay 0.9999), and at most a fifth of the steps done
    so far: without these limits, the random initial weights would weigh too much in short runs and early epochs.
    """
    horizon = min(10_000, max(total_steps / 20, 1))

    def update(averaged, current, count):
        # `ema.n_averaged` is on the CPU; reading the argument would make the CPU wait for the GPU
        weight = 1 / min(horizon, 1 + int(ema.n_averaged) / 5)
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, weight)
        else:
            torch._foreach_copy_(averaged, current)

    ema = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    return ema.requires_grad_(False).eval()  # always, also in a loss, where it may be the teacher
