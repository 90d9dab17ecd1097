"""Stochastic weight averaging (SWA; Izmailov et al. 2018, arXiv 1803.05407): in the last part of a run, a constant
learning rate keeps the weights moving; their mean generalises better than each of them.

    averaged = swa_epochs(30, share=0.25)
    schedule = with_swa(schedule, averaged, steps_per_epoch=steps)
    state = State(model, optimizer, schedule, swa=SWA(model, averaged), ...)    # engine.fit writes swa.pt
"""
import contextlib

from torch import nn
from torch.optim.swa_utils import AveragedModel

from utils.train import dist


def swa_epochs(epochs, share):
    """-> range: the epochs, counted from 1, after which the weights enter the mean; at least one if share > 0. share:
    the last part of the run that is averaged, 0 .. 1."""
    count = max(round(share * epochs), 1) if share else 0
    return range(epochs - count + 1, epochs + 1)


def with_swa(schedule, averaged, *, steps_per_epoch, lr=0.2):
    """`schedule` until the epochs `averaged` (`swa_epochs`) begin, and the constant `lr` from there, a fraction of the
    initial learning rate; a pure function as well."""
    start = (averaged.start - 1) * steps_per_epoch
    return lambda step, scores=(): schedule(step, scores) if step < start else lr


class SWA(AveragedModel):
    """The plain mean of the weights after each of the `epochs`, of `swa_epochs`, with the last buffers until
    `new_statistics`."""

    def __init__(self, model, epochs):
        super().__init__(model)
        self.epochs = epochs

    def take(self, model, epoch):
        """To be called after each epoch (counted from 1): adds the weights to the mean if the epoch is one of those."""
        if epoch in self.epochs:
            if self.n_averaged > self.epochs.index(epoch):
                self.n_averaged.zero_()  # the run has been made longer, and its mean begins anew
            self.update_parameters(model)

    @contextlib.contextmanager
    def new_statistics(self):
        """Inside, the averaged weights are in training mode, and the running statistics of batch norms start anew; they
        become the mean over the batches that pass through the module, and over the ranks."""
        self.module.train()  # frozen layers stay in evaluation mode
        norms = {m: m.momentum for m in self.module.modules()
                 if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training}
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean
        yield
        for norm, momentum in norms.items():
            norm.momentum = momentum
            dist.mean(norm.running_mean), dist.mean(norm.running_var)
