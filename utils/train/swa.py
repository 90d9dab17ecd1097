"""Stochastic weight averaging (Izmailov et al. 2018, arXiv 1803.05407): the last part of a run holds a rate that keeps
the weights moving, and the mean of where they come to generalises better than any of these places.

    schedule = with_swa(schedule, steps_per_epoch=steps, epochs=30, share=0.25)
    state = engine.fit(..., schedule, ..., swa=SWA(model, epochs=30, share=0.25))       # -> swa.pt
"""
import contextlib

from torch import nn
from torch.optim.swa_utils import AveragedModel

from utils.errors import UserError
from utils.train import dist
from utils.train.optim import make_schedule


def swa_epochs(epochs, share, cycle=0):
    """-> range: the epochs, counted from 1, at whose end the weights are taken in.

    They end the last `share` (0..1) of the run; where the rate comes down in cycles of `cycle` epochs, its last whole
    cycles. At least one where share > 0. Raises UserError for a cycle that is longer than the run.
    """
    length = max(cycle, 1)
    if share and length > epochs:
        raise UserError(f"--swa-cycle {cycle}: longer than the run's {epochs} epochs; lower it, or raise --epochs")
    count = min(max(round(share * epochs / length), 1), epochs // length) if share else 0
    return range(epochs - (count - 1) * length, epochs + 1, length)


def with_swa(schedule, *, steps_per_epoch, epochs, share, lr=0.2, cycle=0, floor=1e-3):
    """`schedule` up to the epochs that are averaged, from there a rate of its own; a pure function as well.

    lr     share of the initial learning rate that is held, or from which each cycle comes down
    cycle  epochs in which it comes down to `floor`, again and again; 0: it is held
    floor  share of the initial learning rate. Raises UserError when it lies above `lr`.
    """
    if cycle and share and floor > lr:
        raise UserError(f"--swa-lr {lr:g}: cycles come down from it to --lr-floor {floor:g}; raise it")
    start = (swa_epochs(epochs, share, cycle).start - max(cycle, 1)) * steps_per_epoch
    rate = make_schedule("cyclic" if cycle else "constant", steps_per_epoch=steps_per_epoch, epochs=epochs,
                         period=cycle, floor=floor / lr if cycle and lr else 1)
    return lambda step, scores=(): schedule(step, scores) if step < start else lr * rate(step - start)


class SWA(AveragedModel):
    """The plain mean of the weights at the ends of `swa_epochs`; buffers are those of the last, until `new_statistics`."""

    def __init__(self, model, *, epochs, share, cycle=0):
        super().__init__(model)
        self.epochs = swa_epochs(epochs, share, cycle)

    def take(self, model, epoch):
        """Called at the end of each epoch (counted from 1) takes the weights in, where it is one of those."""
        if epoch in self.epochs:
            if self.n_averaged > self.epochs.index(epoch):
                self.n_averaged.zero_()  # a run that has been made longer begins anew: others were taken for its end
            self.update_parameters(model)

    @contextlib.contextmanager
    def new_statistics(self):
        """Inside, the averaged weights are in training mode, and batch norms forget their running statistics: these become
        the mean over the batches that pass through the module, and over ranks."""
        norms = {m: m.momentum for m in self.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean
        self.module.train()
        yield
        for norm, momentum in norms.items():
            norm.momentum = momentum
            dist.mean(norm.running_mean), dist.mean(norm.running_var)
