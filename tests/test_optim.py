"""utils/train/optim.py against torch's schedulers, textbook update formulas in plain float64, and points by hand."""
import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from nets.regnet import RegNetX
from utils.errors import UserError
from utils.train import optim
from utils.train.optim import SCHEDULES, make_ema, make_optimizer, make_schedule, param_groups, plateaus, set_lr


def factors(name, steps, scores=(), **options):
    schedule = make_schedule(name, **options)
    return [schedule(step, scores) for step in range(steps)]


def torchs(make, steps, score=None):
    """Factors of one of torch's schedulers, which is told lr 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, seen = make(optimizer), []
    for step in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step(*([score(step)] if score else []))
    return seen


# ---- schedules ------------------------------------------------------------------------------------------------------

def test_schedules_by_hand():
    options = dict(steps_per_epoch=5, epochs=8, period=2, floor=0.1)
    for name, points in {
        "restarts": {0: 1, 5: 0.55, 9: 0.1 + 0.9 * (1 + math.cos(math.pi * 0.9)) / 2, 10: 1, 15: 0.55, 30: 1},
        "cosine": {0: 1, 10: 0.1 + 0.9 * (1 + 0.5 ** 0.5) / 2, 20: 0.55, 40: 0.1, 50: 0.1},
        "flat": {0: 1, 20: 1, 25: 0.1 + 0.9 * (1 + 0.5 ** 0.5) / 2, 30: 0.55, 40: 0.1, 50: 0.1},
        "linear": {0: 1, 10: 0.775, 20: 0.55, 40: 0.1, 50: 0.1},
        "step": {0: 1, 9: 1, 10: 0.75, 19: 0.75, 20: 0.5625, 80: 0.75 ** 8, 81: 0.75 ** 8, 90: 0.1, 1000: 0.1},
        "plateau": {0: 1, 39: 1}, "constant": {0: 1, 39: 1},
    }.items():
        schedule = make_schedule(name, **options)
        assert {step: schedule(step) for step in points} == pytest.approx(points, rel=1e-12), name
    assert set(SCHEDULES) >= {"restarts", "cosine", "flat", "linear", "step", "plateau", "constant"}


def test_the_wildfire_systems_schedule():
    """Restarts every 10 epochs from lr 1e-3 to eta_min 1e-6, per iteration: floor 1e-3, which is the default."""
    steps = 7
    ours = [1e-3 * f for f in factors("restarts", 40 * steps, steps_per_epoch=steps, epochs=150)]
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=10 * steps, T_mult=1, eta_min=1e-6)
    for lr in ours:
        assert lr == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()
    assert min(ours) == pytest.approx(1e-6, rel=0.6) and min(ours) >= 1e-6


def test_schedules_are_torchs():
    steps, options = 60, dict(steps_per_epoch=4, epochs=15, period=3, floor=1e-9)
    assert factors("cosine", steps, **options | {"floor": 0.01}) == pytest.approx(
        torchs(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=60, eta_min=0.01), steps), rel=1e-9)
    assert factors("flat", steps, **options | {"floor": 0.01}) == pytest.approx(
        torchs(lambda o: lr_scheduler.SequentialLR(o, [
            lr_scheduler.ConstantLR(o, factor=1.0), lr_scheduler.CosineAnnealingLR(o, T_max=30, eta_min=0.01)],
            milestones=[30]), steps), rel=1e-9)
    assert factors("step", steps, **options) == pytest.approx(
        torchs(lambda o: lr_scheduler.StepLR(o, step_size=12, gamma=0.75), steps), rel=1e-9)


@pytest.mark.parametrize("patience", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_plateau_is_torchs(patience, seed):
    """Torch's patience is the number of bad epochs that are still accepted: one less than ours."""
    scores = (np.random.default_rng(seed).normal(size=60).cumsum() / 10).round(1).tolist()  # with ties
    scores[20] = float("nan")  # no better than anything

    def make(optimizer):
        return lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=patience - 1, threshold=0,
                                              min_lr=0.01, eps=0)

    schedule = make_schedule("plateau", steps_per_epoch=3, epochs=60, period=patience, floor=0.01)
    ours = [schedule(3 * epoch, scores[:epoch]) for epoch in range(60)]
    assert ours == pytest.approx(torchs(make, 60, scores.__getitem__), rel=1e-12)
    assert len(set(ours)) > 2


def test_plateaus_by_hand():
    assert [plateaus([1, 2, 2, 1, 3, 3, 3, 3, 3][:n], 2) for n in range(10)] == [0, 0, 0, 0, 1, 1, 1, 2, 2, 3]
    assert plateaus([], 3) == 0 and plateaus([float("nan")] * 4, 2) == 2


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("epochs", [0.5, 2, 2.5, 1 / 3])
def test_warmup(name, epochs):
    """Straight up to 1, never beyond it, also by a fraction of an epoch; then the curve from its start."""
    options = dict(steps_per_epoch=5, epochs=20, period=3, floor=0.01)
    seen = factors(name, 100, warmup_epochs=epochs, **options)
    warm = round(epochs * 5)
    assert seen[:warm] == pytest.approx([(i + 1) / warm for i in range(warm)])
    assert max(seen) == 1 and min(seen) > 0
    assert seen[warm] == 1
    if name in ("cosine", "flat", "linear"):  # these end with the run
        rest = make_schedule(name, steps_per_epoch=1, epochs=100 - warm, floor=0.01)
        assert seen[warm:] == pytest.approx([rest(i) for i in range(100 - warm)])
    else:
        assert seen[warm:] == factors(name, 100 - warm, **options)


@pytest.mark.parametrize("name", SCHEDULES)
def test_extreme_lengths(name):
    """Runs shorter than their warmup, of one step; factors stay within 0...1, and no state is kept."""
    for options in (dict(epochs=1, warmup_epochs=3), dict(epochs=0), dict(epochs=1), dict(epochs=2, period=1)):
        schedule = make_schedule(name, steps_per_epoch=1, **options)
        seen = [schedule(step) for step in range(6)]
        assert all(0 < f <= 1 for f in seen)
        assert [schedule(step) for step in reversed(range(6))] == seen[::-1]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("floor", [1e-3, 0.2])
def test_floor(name, floor):
    schedule = make_schedule(name, steps_per_epoch=10, epochs=100, period=1, floor=floor)
    seen = [schedule(step, [0.0] * (step // 10)) for step in range(1500)]
    assert min(seen) >= floor * (1 - 1e-12)
    if name != "constant":
        assert min(seen) == pytest.approx(floor, rel=0.03 / floor if name == "restarts" else 1e-9)


# ---- parameter groups, optimizers -----------------------------------------------------------------------------------

def test_param_groups():
    net = RegNetX(num_classes=3)
    net.stem.conv.weight.requires_grad_(False)
    net.scalar = nn.Parameter(torch.ones(()))
    weights, scales, biases = param_groups(net, 0.05)
    assert weights["weight_decay"] == 0.05 and scales["weight_decay"] == biases["weight_decay"] == 0
    assert {id(p) for p in biases["params"]} == {id(p) for n, p in net.named_parameters() if n.endswith("bias")}
    decay = {id(m.weight) for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))} - {id(net.stem.conv.weight)}
    assert {id(p) for p in weights["params"]} == decay
    both = [id(p) for p in weights["params"] + scales["params"] + biases["params"]]
    assert sorted(both) == sorted(id(p) for p in net.parameters() if p.requires_grad)
    assert id(net.head.fc.bias) in both and id(net.scalar) in both and id(net.stem.conv.weight) not in both
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    assert [len(g["params"]) for g in param_groups(tied, 0.1)] == [1, 2]


def adam(w, grads, lrs, decay, decoupled, momentum, eps):
    """Kingma & Ba 2015; decay inside the gradient, or (Loshchilov & Hutter 2019) beside it."""
    m = v = 0.0
    for t, (g, lr) in enumerate(zip(grads, lrs), 1):
        g = g if decoupled else g + decay * w
        m, v = momentum * m + (1 - momentum) * g, 0.999 * v + 0.001 * g * g
        step = m / (1 - momentum ** t) / (math.sqrt(v / (1 - 0.999 ** t)) + eps)
        w = w - lr * (step + (decay * w if decoupled else 0))
    return w


def sgd(w, grads, lrs, decay, momentum):
    """Momentum in Nesterov's form, as torch writes it."""
    velocity = 0.0
    for g, lr in zip(grads, lrs):
        g = g + decay * w
        velocity = momentum * velocity + g
        w = w - lr * (g + momentum * velocity)
    return w


def radam(w, grads, lrs, decay, momentum, eps):
    """Liu et al. 2020, algorithm 2: no second moment while the length of its average is at most 5 (torch: 5)."""
    m = v = 0.0
    longest = 2 / (1 - 0.999) - 1
    for t, (g, lr) in enumerate(zip(grads, lrs), 1):
        m, v = momentum * m + (1 - momentum) * g, 0.999 * v + 0.001 * g * g
        length = longest - 2 * t * 0.999 ** t / (1 - 0.999 ** t)
        step = m / (1 - momentum ** t)
        if length > 5:
            step *= math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
            step *= math.sqrt(1 - 0.999 ** t) / (math.sqrt(v) + eps)
        w = w - lr * (step + decay * w)
    return w


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "radam"])
@pytest.mark.parametrize("momentum, eps", [(0.9, 1e-8), (0.937, 1e-3), (0.0, 1e-8)])
def test_updates_are_the_textbooks(name, momentum, eps):
    """Twenty steps with a changing rate; the matrix decays, the vector does not."""
    rng = np.random.default_rng(0)
    net = nn.Linear(3, 2).double()
    start = [p.detach().flatten().tolist() for p in net.parameters()]
    grads = [rng.normal(size=(20, p.numel())) for p in net.parameters()]
    lrs = [0.01 * f for f in factors("cosine", 20, steps_per_epoch=20, epochs=1)]
    optimizer = make_optimizer(name, param_groups(net, 0.1), lr=0.01, momentum=momentum, eps=eps)
    for i in range(20):
        step(optimizer, net, [g[i] for g in grads], lrs[i] / 0.01)
    for p, first, g, decay in zip(net.parameters(), start, grads, (0.1, 0.0)):
        for j, (w, ours) in enumerate(zip(first, p.detach().flatten().tolist())):
            expected = sgd(w, g[:, j], lrs, decay, momentum) if name == "sgd" else \
                radam(w, g[:, j], lrs, decay, momentum, eps) if name == "radam" else \
                adam(w, g[:, j], lrs, decay, name == "adamw", momentum, eps)
            assert ours == pytest.approx(expected, rel=1e-9, abs=1e-12)


def step(optimizer, net, grads, factor=1.0):
    """A step with these gradients: an array, or None, per parameter."""
    for p, g in zip(net.parameters(), grads, strict=True):
        p.grad = None if g is None else torch.as_tensor(g, dtype=p.dtype).reshape(p.shape)
    set_lr(optimizer, factor)
    optimizer.step()


def test_every_name_makes_an_optimizer_of_the_groups():
    net = RegNetX(num_classes=3)
    for name in optim.OPTIMIZERS:
        optimizer = make_optimizer(name, param_groups(net, 0.05), lr=0.1, momentum=0.8)
        assert [g["weight_decay"] for g in optimizer.param_groups] == [0.05, 0, 0]
        assert [g["initial_lr"] for g in optimizer.param_groups] == [0.1] * 3
        assert {g["betas"][0] if "betas" in g else g["momentum"] for g in optimizer.param_groups} == {0.8}
    assert optim.OPTIMIZERS == ("adamw", "adam", "sgd", "radam")


def test_another_name_is_refused():
    with pytest.raises(UserError, match="--optimizer adamp: is not one of adamw, adam, sgd, radam; start a new run"):
        make_optimizer("adamp", [nn.Parameter(torch.zeros(1))], lr=0.1)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_a_first_step_that_the_scaler_skips(name):
    """fp16 often overflows in the first step: what follows is as without it. Fresh memory is full of NaN here."""
    found = []
    torch.use_deterministic_algorithms(True)
    try:
        for factors in ([1.0, 2.0], [math.inf, 1.0, 2.0]):
            net = nn.Linear(3, 1, bias=False)
            nn.init.ones_(net.weight)
            optimizer, scaler = make_optimizer(name, param_groups(net, 0.01), lr=0.1), torch.amp.GradScaler("cpu")
            for factor in factors:
                scaler.scale(net(torch.tensor([[factor, 1.0, -1.0]])).sum()).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            found.append(net.weight.detach())
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.isfinite(found[0]).all() and torch.equal(*found)


def test_set_lr_keeps_the_ratio_of_groups_through_a_resume():
    net = nn.Linear(2, 2)
    weights, rest = param_groups(net, 0.1)
    optimizer = make_optimizer("adamw", [weights, rest | {"lr": 0.5}], lr=0.1)
    set_lr(optimizer, 0.2)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.02, 0.1])
    resumed = make_optimizer("adamw", param_groups(net, 0.1), lr=0.7)
    resumed.load_state_dict(optimizer.state_dict())
    for factor in (0.2, 1.0):  # always of the initial rate, not of the last one
        set_lr(resumed, factor)
        assert [g["lr"] for g in resumed.param_groups] == pytest.approx([0.1 * factor, 0.5 * factor])


# ---- the averaged model ---------------------------------------------------------------------------------------------

def walk(seed=0):
    """A net whose weights and statistics go their way: -> (net, change it once)."""
    net, g = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)), torch.Generator().manual_seed(seed)

    def move():
        for tensor in (*net.parameters(), *net.buffers()):
            if tensor.is_floating_point():
                tensor.data += torch.randn(tensor.shape, generator=g)
        net[1].num_batches_tracked += 1
    return net, move


@pytest.mark.parametrize("total, horizon", [(100, 5), (10, 1), (1, 1), (0, 1), (500, 25), (10 ** 6, 10_000)])
def test_ema_is_the_formula(total, horizon):
    """a += (w - a) / min(horizon, 1 + n / 5) after n steps; the first step copies; counters are copied."""
    net, move = walk()
    ema, expected = make_ema(net, total), None
    for n in range(40):
        move()
        ema.update_parameters(net)
        current = {k: v.double() for k, v in net.state_dict().items()}
        weight = 1 / min(horizon, 1 + n / 5)
        expected = {k: v if n == 0 or "num" in k else expected[k] + (v - expected[k]) * weight
                    for k, v in current.items()}
        for name, averaged in ema.module.state_dict().items():
            assert torch.allclose(averaged.double(), expected[name], atol=1e-5), (n, name)
    assert ema.module[1].num_batches_tracked == net[1].num_batches_tracked == 40
    assert ema.module[1].num_batches_tracked.dtype == torch.int64
    assert int(ema.n_averaged) == 40 and not any(p.requires_grad for p in ema.parameters())
    assert not ema.module[1].training  # its batch norms do not learn from what a loss shows it
    assert all(p.requires_grad for p in net.parameters())
    if horizon > 1:
        assert not torch.allclose(ema.module[0].weight, net[0].weight)


def test_ema_looks_back_over_a_fifth_of_the_steps_so_far():
    """Of steps 1...n, the mean age of what the average holds is about n / 6 while it ramps up."""
    net = nn.Linear(1, 1, bias=False)
    ema = make_ema(net, 10 ** 6)
    for step in range(1, 1001):
        net.weight.data.fill_(step)
        ema.update_parameters(net)
    assert 1000 - float(ema.module.weight) == pytest.approx(1000 / 6, rel=0.02)


def test_ema_looks_back_over_ten_thousand_steps_at_most():
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.zero_()
    ema = make_ema(net, 10 ** 6)
    ema.n_averaged.fill_(500_000)
    net.weight.data.fill_(1)
    ema.update_parameters(net)
    assert float(ema.module.weight) == pytest.approx(1e-4)


def test_ema_leaves_the_model_alone_and_is_a_copy():
    net, move = walk()
    ema = make_ema(net, 100)
    before = copy.deepcopy(net.state_dict())
    ema.update_parameters(net)
    ema.update_parameters(net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    move()
    assert all(torch.equal(v, before[k]) for k, v in ema.module.state_dict().items())


def test_ema_resumes_to_the_bit():
    """As the loop does it: the averaged weights and the count, into a fresh average."""
    (net, move), total = walk(), 200
    straight = make_ema(net, total)
    for step in range(30):
        move()
        straight.update_parameters(net)
        if step == 12:
            saved, steps = copy.deepcopy(straight.module.state_dict()), int(straight.n_averaged)
            resumed = make_ema(copy.deepcopy(net), total)
            resumed.module.load_state_dict(saved)
            resumed.n_averaged.fill_(steps)
        elif step > 12:
            resumed.update_parameters(net)
    for (name, a), b in zip(straight.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(a, b), name
    assert int(resumed.n_averaged) == 30
