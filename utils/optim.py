"""Optimizers, learning-rate schedules as pure functions, and the averaged model."""
import math

import torch
from torch.optim.swa_utils import AveragedModel


def param_groups(model, weight_decay):
    """Three groups: weights, which decay, the scales of norms, and biases, which do not."""
    groups = {"weights": [], "scales": [], "biases": []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups["weights" if p.ndim > 1 else "biases" if name.endswith("bias") else "scales"].append(p)
    return [{"name": name, "params": params, "weight_decay": weight_decay if name == "weights" else 0.0}
            for name, params in groups.items() if params]


def make_optimizer(name, params, *, lr, momentum=0.9, eps=1e-8):
    """adamw, adam (L2 decay, as the paper) or sgd (Nesterov), with torch's fused kernels.

    `params`: groups of `param_groups`.
    """
    if name == "sgd":
        optimizer = torch.optim.SGD(params, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=True)
    else:
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[name]
        optimizer = kind(params, lr=lr, betas=(momentum, 0.999), eps=eps, fused=True)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def warm_up(optimizer, steps, *, bias_lr=0.0, momentum=None):
    """For the first `steps` optimizer steps: biases come down from `bias_lr` to the learning rate to which all else
    rises from 0, so that the net finds its output's scale before its weights move; the momentum rises from `momentum`.
    Beside a schedule with a warmup of as many steps. Returns the optimizer.
    """
    for group in optimizer.param_groups:
        final = group["betas"][0] if "betas" in group else group["momentum"]
        group["warmup"] = {"steps": steps, "lr": bias_lr if group.get("name") == "biases" else 0.0,
                           "momentum": final if momentum is None else momentum, "final": final}
    return optimizer


SCHEDULES = ("restarts", "cosine", "linear", "step", "poly", "plateau", "constant")


def make_schedule(name, *, steps_per_epoch, epochs, warmup_epochs=0.0, period=10, floor=1e-3):
    """-> `schedule(step, scores)`, the factor on the initial learning rate at optimizer step `step` (from 0).

    restarts  cosine from 1 to `floor` every `period` epochs (Loshchilov & Hutter 2017)
    cosine    one cosine from 1 to `floor` over the run
    linear    a line from 1 to `floor` over the run
    step      x 0.75 every `period` epochs, not below `floor`
    poly      (1 - progress) ** 0.9, not below `floor`
    plateau   x 0.5 after every `period` epochs without a better score, not below `floor`
    constant  1
    Each is preceded by a linear warmup from 0. `scores`: validation scores of the finished epochs, higher is
    better; only "plateau" looks at them. A pure function: a resumed run needs no state of it.
    """
    warmup = round(warmup_epochs * steps_per_epoch)
    total = max(epochs * steps_per_epoch - warmup, 1)
    length = max(period * steps_per_epoch, 1)

    def cosine(progress):
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2

    curves = {
        "restarts": lambda t, scores: cosine(t % length / length),
        "cosine": lambda t, scores: cosine(min(t / total, 1)),
        "linear": lambda t, scores: floor + (1 - floor) * (1 - min(t / total, 1)),
        "step": lambda t, scores: max(0.75 ** (t // length), floor),
        "poly": lambda t, scores: max((1 - min(t / total, 1)) ** 0.9, floor),
        "plateau": lambda t, scores: max(0.5 ** plateaus(scores, period), floor),
        "constant": lambda t, scores: 1.0,
    }
    curve = curves[name]
    return lambda step, scores=(): (step + 1) / warmup if step < warmup else curve(step - warmup, scores)


def plateaus(scores, patience):
    """How often `patience` scores in a row brought no improvement over the best before them."""
    count, best, waited = 0, -math.inf, 0
    for score in scores:
        waited = 0 if score > best else waited + 1
        best = max(best, score)
        if waited >= patience:
            count, waited = count + 1, 0
    return count


def set_lr(optimizer, factor, step=None):
    """The schedule's factor on every group's initial learning rate; before the end of `warm_up`, what that adds."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
        if "warmup" in group and step is not None:
            warmup = group["warmup"]
            left = max(1 - (step + 1) / warmup["steps"], 0) if warmup["steps"] else 0.0
            group["lr"] += left * warmup["lr"]
            momentum = warmup["final"] + left * (warmup["momentum"] - warmup["final"])
            group.update({"betas": (momentum, group["betas"][1])} if "betas" in group else {"momentum": momentum})


def make_ema(model, total_steps):
    """Exponential moving average of weights and buffers, fitted to the length of the run.

    The average looks back over a twentieth of the run, at most 10,000 steps (decay 0.9999), and over a fifth
    of the steps done so far, so that neither a short run nor an early epoch is judged by its random start.
    """
    horizon = min(10_000, max(total_steps / 20, 1))

    def update(averaged, current, count):
        # the count of `ema` itself lies on the CPU; the argument would make the CPU wait for the GPU
        weight = 1 / min(horizon, 1 + int(ema.n_averaged) / 5)
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, weight)
        else:
            torch._foreach_copy_(averaged, current)

    ema = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    return ema.requires_grad_(False)
