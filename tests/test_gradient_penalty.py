"""Losses that call autograd.grad or the net more than once, beside everything that the loop can do.

The gradient penalty is that of Drucker & LeCun 1992: the squared gradient of each sample's loss by its input.
"""
import math
import os
import signal

import pytest
import torch
from torch import nn

import nets
from data.loader import train_loader
from nets.blocks import recompute
from nets.unet import UNet
from nets.yolo import YOLOv5
from tests.harness import ENV, differences, read, two_ranks
from tests.test_engine import CPU, train
from tests.test_swa import averaged
from tests.toy import Data, Net
from utils.errors import Stopped
from utils.pictures import charts
from utils.train import dist, engine, optim
from utils.train.state import State, autocast


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(charts, "plot_curves", lambda *_: None)


def penalty(loss, image):
    """loss: the mean over the batch. -> the mean over the samples of |d loss of the sample / d image|^2."""
    slope, = torch.autograd.grad(loss, image, create_graph=True)
    return slope.float().square().sum() * len(image)


def penalized(stop=0):
    """A loss for the toy net; SIGTERM in batch `stop`."""
    count = [0]

    def compute_loss(model, batch):
        count[0] += 1
        if count[0] == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        image = batch["image"].requires_grad_()
        loss = (model(image).float() - batch["target"]).square().mean()
        slope = penalty(loss, image)
        return loss + slope, {"loss of the target": loss, "penalty": slope}
    return compute_loss


class Saving(Net):
    """The toy net with its first half recomputed in every backward pass."""

    def __init__(self, **options):
        super().__init__(**options)
        self.start = _Start(self)

    def forward(self, x):
        x = recompute(self.start, x) if self.training else self.start(x)
        x = self.norm2(self.conv2(x)).relu().mean((2, 3))
        return self.head(self.dropout(x))[:, 0]


class _Start(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.conv, self.norm, self.passes = net.conv1, net.norm1, 0

    def forward(self, x):
        self.passes += 1
        return self.norm(self.conv(x)).relu()


def saving(seed=0, **options):
    """With the weights that Net has when it is made from the seed."""
    torch.manual_seed(seed)
    return Saving(**options)


def same(net, other):
    """Whether nets with the same tensors under other names hold the same bits."""
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in net.state_dict().items())


# ---- nets ------------------------------------------------------------------------------------------------------------
def mean_square(out):
    return sum(x.float().square().mean() for x in (out if isinstance(out, (list, tuple)) else [out]))


NETS = {
    "unet": lambda **options: UNet(in_chans=3, conv0=[8], decoder=[32, 24, 16, 8], **options),
    "efficientnet": lambda **options: nets.make("efficientnetv2_b0", 3, 4, drop_rate=0.5, drop_path_rate=0.2,
                                                **options),
    "regnet": lambda **options: nets.make("regnetx_002", 3, 4, **options),
    "yolo": lambda **options: YOLOv5("n", 3, **options),
}


def gradients(make, weight, amp=None, **options):
    """-> the loss, the gradients and the buffers after a backward pass."""
    torch.manual_seed(0)
    net = make(**options).train()
    image = torch.randn(2, 3, 64, 64).requires_grad_()
    with autocast(CPU, amp):
        loss = mean_square(net(image))
        loss = loss + weight * penalty(loss, image)
    loss.backward()
    return {"loss": loss.detach(), "gradients": {n: p.grad for n, p in net.named_parameters() if p.grad is not None},
            "buffers": dict(net.named_buffers())}


@pytest.mark.parametrize("name, amp", [("unet", None), ("efficientnet", None), ("yolo", None),
                                       ("regnet", torch.bfloat16)])
def test_recomputed_activations_change_no_bit(name, amp):
    """Loss, gradients and running statistics, with two backward passes through every block."""
    plain, recomputed = (gradients(NETS[name], 100, amp, grad_checkpoint=on) for on in (False, True))
    assert differences(plain, recomputed) == []
    without = gradients(NETS[name], 0, amp)
    assert differences(plain["gradients"], without["gradients"])
    assert differences(plain["buffers"], without["buffers"]) == []


def test_activations_are_computed_once_per_backward_pass():
    net, image = saving(), torch.randn(4, 3, 8, 8).requires_grad_()
    before = net.norm1.num_batches_tracked.item()
    loss = net(image).square().mean()
    assert net.start.passes == 1
    (loss + penalty(loss, image)).backward()
    assert net.start.passes == 3 and net.norm1.num_batches_tracked == before + 1


# ---- the loop --------------------------------------------------------------------------------------------------------
def test_equals_a_loop_written_by_hand(tmp_path):
    """Two batches per step, with SGD in float64; autograd.functional computes the slope of each sample's loss."""
    torch.manual_seed(0)
    net = Net(norm="none", dropout=0).double()
    by_hand = Net(norm="none", dropout=0).double()
    by_hand.load_state_dict(net.state_dict())
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    loader = train_loader(Data(16), 4)
    loader.batch_sampler.set_epoch(0)
    for i, batch in enumerate(loader):
        image, target = batch["image"].double(), batch["target"].double()
        for x, y in zip(image, target):
            def error(x):
                return (by_hand(x[None])[0] - y).square()
            slope = torch.autograd.functional.jacobian(error, x, create_graph=True)
            ((error(x) + slope.square().sum()) / 8).backward()
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()

    def compute_loss(model, batch):
        image = batch["image"].double().requires_grad_()
        loss = (model(image) - batch["target"]).square().mean()
        slope, = torch.autograd.grad(loss, image, create_graph=True)
        return loss + slope.square().sum() * len(image), {}

    train(tmp_path, epochs=1, size=16, net=net, optimizer="sgd", momentum=0.0, lr=0.1, weight_decay=0, accumulate=2,
          schedule="constant", compute_loss=compute_loss, evaluate=None)
    for ours, theirs in zip(net.parameters(), by_hand.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("batch", [2, 10, 16])  # the last is in SWA's pass for the norms
def test_a_stopped_run_ends_with_the_same_bits(tmp_path, amp, batch):
    """SWA, EMA, accumulation, clipping, recomputed activations and mixed precision at once."""
    options = dict(epochs=2, share=0.5, amp=amp, accumulate=3, clip=1.0)
    averaged(tmp_path / "straight", net=saving(), compute_loss=penalized(), **options)
    with pytest.raises(Stopped):
        averaged(tmp_path / "stopped", net=saving(), compute_loss=penalized(batch), **options)
    averaged(tmp_path / "stopped", net=saving(), compute_loss=penalized(), resume=True, **options)
    for name in ("last.pt", "best.pt", "swa.pt"):
        assert differences(read(tmp_path / "straight" / name), read(tmp_path / "stopped" / name)) == [], name


def test_a_run_with_recomputed_activations_is_the_same(tmp_path):
    runs = [averaged(tmp_path / kind.__name__, net=net, compute_loss=penalized(), accumulate=3)
            for kind, net in ((Net, None), (Saving, saving()))]
    for module in ("model", "ema", "swa"):
        plain, recomputed = (getattr(getattr(run, module), "module", getattr(run, module)) for run in runs)
        assert same(plain, recomputed), module
    assert all(row["penalty"] > 0 and row["loss"] == pytest.approx(row["loss of the target"] + row["penalty"], rel=1e-5)
               for row in runs[0].history)


def test_the_gradients_of_parameters_may_be_asked_for_in_the_pass_for_the_norms(tmp_path):
    def compute_loss(model, batch):
        loss = (model(batch["image"]) - batch["target"]).square().mean()
        slopes = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        return loss + 0.01 * sum(slope.square().sum() for slope in slopes), {}

    state = averaged(tmp_path, epochs=2, compute_loss=compute_loss)
    assert all(p.grad is None for p in state.swa.module.parameters())


def test_a_mean_teacher(tmp_path):
    """The loss uses the EMA weights, which the state has before the loss is written."""
    torch.manual_seed(0)
    net = Net()
    state = State(net, optim.make_optimizer("adamw", optim.param_groups(net, 0.01), lr=0.02), lambda *_: 1.0,
                  device=CPU, ema=optim.make_ema(net, 100), amp="off")
    gaps = []

    def compute_loss(model, batch):
        with torch.no_grad():
            teacher = state.ema.module(batch["image"])
        gap = (model(batch["image"]) - teacher).square().mean()
        gaps.append(gap.item())
        return (model(batch["image"]) - batch["target"]).square().mean() + gap, {}

    engine.fit(state, train_loader(Data(26), 4), compute_loss, folder=tmp_path, epochs=2,
               header={"task": "toy", "arch": {"name": "Net"}})
    assert len(gaps) == 14 and all(math.isfinite(gap) for gap in gaps) and gaps[-1] > 0


# ---- two processes ---------------------------------------------------------------------------------------------------
def twice(model, batch):
    """The net sees two views of each batch: consistency, and the penalty of the first."""
    image = batch["image"].requires_grad_()
    first, second = model(image), model(batch["image"].detach().flip(3))
    loss = (first - batch["target"]).square().mean()
    return loss + penalty(loss, image) + (first - second).square().mean(), {}


def losses_of_two(folder, rank, port):
    os.environ.update(ENV, RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    charts.plot_curves = lambda *_: None
    dist.setup("cpu")
    torch.manual_seed(0)
    plain = dict(optimizer="sgd", lr=0.05, accumulate=3, evaluate=None)
    train(folder / "two", net=Net(norm="none", dropout=0), compute_loss=twice, **plain)
    train(folder / "norms", net=saving(dropout=0), compute_loss=twice, **plain)
    dist.barrier()


@pytest.mark.slow
def test_two_processes(tmp_path):
    """They train the net that one process trains; with batch norms, whose statistics change between the two views."""
    two_ranks(losses_of_two, tmp_path, 120)
    torch.manual_seed(0)
    train(tmp_path / "one", net=Net(norm="none", dropout=0), compute_loss=twice, optimizer="sgd", lr=0.05, accumulate=3,
          evaluate=None)
    one, two = (read(tmp_path / run / "last.pt") for run in ("one", "two"))
    for part in ("model", "ema"):
        for name, value in one[part].items():
            torch.testing.assert_close(two[part][name], value, rtol=1e-5, atol=1e-6)
    assert one["step"] == two["step"] == read(tmp_path / "norms" / "last.pt")["step"] == 6
