"""Optimizers, learning-rate schedules as pure functions, and the EMA weights."""
import math

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel


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


OPTIMIZERS = ("adamw", "adam", "sgd", "radam", "adamp")


def make_optimizer(name, params, *, lr, momentum=0.9, eps=1e-8):
    """An optimizer for the groups of `param_groups`, with torch's fused kernels where it has them.

    sgd    Nesterov momentum
    adam   weight decay as part of the gradient (L2), as in the paper
    adamw  decoupled weight decay, times the learning rate (Loshchilov & Hutter 2019); also in the next two
    radam  the adaptive learning rate is rectified while its variance is large (Liu et al. 2020)
    adamp  without the part of a step that only makes scale-invariant weights longer, see `AdamP`
    """
    if name == "sgd":
        optimizer = torch.optim.SGD(params, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=True)
        for p in parameters(optimizer) if momentum else ():
            # torch would leave them uninitialised when GradScaler skips the very first step
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    else:
        kind, options = {"adamw": (torch.optim.AdamW, {"fused": True}), "adam": (torch.optim.Adam, {"fused": True}),
                         "radam": (torch.optim.RAdam, {"decoupled_weight_decay": True}), "adamp": (AdamP, {})}[name]
        optimizer = kind(params, lr=lr, betas=(momentum, 0.999), eps=eps, **options)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


class AdamP(torch.optim.Optimizer):
    """AdamW without the part of its step that lies along scale-invariant weights (Heo et al. 2021, arXiv 2006.08217).

    The scale of a weight in front of a norm does not matter to the net, but momentum makes it grow, and growing makes
    the steps small. The gradients of such weights are orthogonal to them: |cos(w, g)| < 0.1 / sqrt(dim(w)), in every
    output channel, or else in the layer as a whole. They decay only a tenth as much as others. Vectors and scalars get
    AdamW's step. The CPU reads no numbers to decide this, so it does not wait for the GPU.

    settings: lr, betas and eps, of all groups that have none of their own; each group has its weight_decay.
    """

    def __init__(self, params, **settings):
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self):
        """Makes one step. Parameters without a gradient stay as they are."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, group)

    def _move(self, p, group):
        (beta1, beta2), lr, state, ratio = group["betas"], group["lr"], self.state[p], 1.0
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        state["step"] += 1
        state["exp_avg"].lerp_(p.grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
        root = (state["exp_avg_sq"].sqrt() / math.sqrt(1 - beta2 ** state["step"])).add_(group["eps"])
        update = state["exp_avg"] / root / (1 - beta1 ** state["step"])
        if p.ndim > 1:
            update, ratio = project(p, p.grad, update)
        p.mul_(1 - lr * group["weight_decay"] * ratio).sub_(update, alpha=lr)


def project(weight, grad, update):
    """-> (AdamP's update, the ratio of its weight decay). Three tensors of one shape, (out, ...), and a 0-d tensor."""
    ratio, projected = weight.new_ones(()), update
    for rows in (1, len(weight)):  # the layer as a whole, then its channels, which override it if all are invariant
        w, g, u = (t.reshape(rows, -1) for t in (weight, grad, update))
        unit = F.normalize(w)
        invariant = (unit * F.normalize(g)).sum(1).abs().max() < 0.1 / math.sqrt(w.shape[1])
        along = (unit * u).sum(1, keepdim=True) * unit
        projected = torch.where(invariant, (u - along).view_as(update), projected)
        ratio = torch.where(invariant, 0.1, ratio)
    return projected, ratio


def lookahead(optimizer, k=5, alpha=0.5):
    """Adds Lookahead (Zhang et al. 2019, arXiv 1907.08610) to an optimizer: after every `k` steps the slow weights move
    by the fraction `alpha` towards the weights, which continue from there. The moments stay. k 0: no Lookahead.

    The slow weights and the count of steps are kept in the optimizer's state, and so in its state_dict(). Between these
    steps the model holds the fast weights. Returns the optimizer.
    """
    params = parameters(optimizer)

    def begin(optimizer, *_):  # under a key of its own: Adam initialises a parameter whose state is empty
        if "lookahead" not in optimizer.state:
            optimizer.state["lookahead"] = {"steps": 0, "slow": [p.detach().clone() for p in params]}

    @torch.no_grad()
    def catch_up(optimizer, *_):
        if getattr(optimizer, "found_inf", 0):  # GradScaler leaves it to fused kernels to skip a step
            return
        state = optimizer.state["lookahead"]
        state["steps"] += 1
        if state["steps"] >= k:
            slow = [s.to(p.device) for s, p in zip(state["slow"], params)]  # those of a checkpoint are on the CPU
            torch._foreach_lerp_(slow, params, alpha)
            torch._foreach_copy_(params, slow)
            state.update(steps=0, slow=slow)

    if k:
        optimizer.register_step_pre_hook(begin)
        optimizer.register_step_post_hook(catch_up)
    else:  # they would be stale if the run is resumed with Lookahead later
        optimizer.register_load_state_dict_post_hook(lambda optimizer: optimizer.state.pop("lookahead", None))
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


SCHEDULES = ("restarts", "cyclic", "cosine", "flat", "linear", "step", "poly", "plateau", "constant")


def make_schedule(name, *, steps_per_epoch, epochs, warmup_epochs=0.0, period=10, floor=1e-3):
    """-> `schedule(step, scores)`, the factor on the initial learning rate at optimizer step `step` (from 0).

    restarts  a cosine from 1 to `floor` every `period` epochs (Loshchilov & Hutter 2017)
    cyclic    linear from 1 to `floor`, which the last step of every `period` epochs has (Izmailov et al. 2018, eq. 1)
    cosine    one cosine from 1 to `floor` over the run
    flat      1 for the first half of the run, then a cosine from 1 to `floor` (RTMDet, Lyu et al. 2022)
    linear    linear from 1 to `floor` over the run
    step      x 0.75 every `period` epochs, not below `floor`
    poly      (1 - progress) ** 0.9, not below `floor`
    plateau   x 0.5 after every `period` epochs without a better score, not below `floor`
    constant  1
    A linear warm-up from 0 precedes each of them. scores: those of the finished epochs, higher is better; only
    "plateau" uses them. As a pure function, the schedule has no state that a checkpoint would have to hold.
    """
    warmup = round(warmup_epochs * steps_per_epoch)
    total = max(epochs * steps_per_epoch - warmup, 1)
    length = max(period * steps_per_epoch, 1)

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
            case "cyclic":
                return 1 - (1 - floor) * min((t % length + 1) / length, 1)
            case "cosine":
                return cosine(progress)
            case "flat":
                return cosine(max(2 * progress - 1, 0))
            case "linear":
                return floor + (1 - floor) * (1 - progress)
            case "step":
                return max(0.75 ** (t // length), floor)
            case "poly":
                return max((1 - progress) ** 0.9, floor)
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
