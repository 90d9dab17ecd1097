"""Batches whose content depends on (seed, epoch, index) only: not on workers, ranks or restarts."""
import atexit
import contextlib
import itertools
import os
import signal
import weakref

import numpy as np
from torch.utils.data import DataLoader

from utils import watchdog
from utils.train import dist


class EpochBatches:
    """A batch sampler for training. Yields this rank's share of every global batch as (epoch, index) keys.

    The order is a permutation drawn from (seed, epoch). All batches are full: the last one is filled up from the order's
    beginning, with indices counted on beyond `size`, so that the repeated samples are augmented anew (datasets take the
    index modulo their size). The global batches do not depend on the number of ranks.

    parts: an epoch is one of `parts` parts of the permutation, so `parts` epochs see every sample once. weights: how
    often each sample is drawn, relative to the others; unless all are equal, samples are drawn with replacement instead
    of permuted.
    """

    def __init__(self, size, batch_size, seed=0, *, parts=1, weights=None):
        self.size, self.batch_size, self.seed, self.parts = size, batch_size, seed, parts
        self.shares = None if weights is None or len(np.unique(weights)) == 1 else np.divide(weights, np.sum(weights))
        self.epoch, self.skip = 0, 0

    def set_epoch(self, epoch, skip=0):
        """The epoch to draw next, without its first `skip` batches (a resumed run has done them)."""
        self.epoch, self.skip = epoch, skip

    def __len__(self):
        return -(-self.size // (self.batch_size * self.parts))

    def order(self):
        """The epoch's indices, len(self) * batch_size of them."""
        rng, count = np.random.default_rng((self.seed, self.epoch // self.parts)), len(self) * self.batch_size
        rounds = -(-count * self.parts // self.size)
        part = slice(self.epoch % self.parts * count, (self.epoch % self.parts + 1) * count)
        if self.shares is None:
            order = rng.permutation(self.size)
            return np.concatenate([order + i * self.size for i in range(rounds)])[part]
        order = rng.choice(self.size, rounds * self.size, p=self.shares)
        by_index = order.argsort(kind="stable")
        nth = np.empty_like(order)  # the index's nth time in this order
        nth[by_index] = np.arange(len(order)) - np.searchsorted(order[by_index], order[by_index])
        return (order + nth * self.size)[part]

    def __iter__(self):
        epoch, batches = self.epoch, self.order().reshape(len(self), dist.world_size(), -1)[self.skip:, dist.rank()]
        return ([(epoch, index) for index in batch.tolist()] for batch in batches)


class Loader(DataLoader):
    """A DataLoader of dicts of tensors, whose workers ignore SIGTERM and Ctrl-C: these signals reach them too, but the
    main process decides when to stop.

    batches: lists of the dataset's keys. device: where the batches go. collate: samples -> batch, None stacks them.
    """

    def __init__(self, dataset, batches, workers, device, collate):
        workers = min(workers, os.cpu_count() or 1)
        # fork: the workers share the cache's memory, which other ways of starting them would copy
        options = {"persistent_workers": True, "prefetch_factor": 4,
                   "multiprocessing_context": "fork"} if workers else {}
        super().__init__(dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate,
                         pin_memory=str(device).startswith("cuda"), **options)

    def __iter__(self):
        if not self.num_workers:
            return super().__iter__()
        with watchdog.waiting(WORKER, watchdog.FIRST), _signals_held():
            batches = super().__iter__()
        _workers.update(batches._workers)
        return self._received(batches)

    def _received(self, batches):
        factor = watchdog.FIRST
        while True:
            with watchdog.waiting(WORKER, factor):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
            factor = 1


WORKER = "a loader worker (--workers 0 loads in the main process)"
_workers = weakref.WeakSet()


@atexit.register
def _end_workers():
    """Kills the workers that an exception has left. Python would send them SIGTERM, which they ignore, and wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call it an error
    for worker in _workers:
        worker.kill()


@contextlib.contextmanager
def _signals_held():
    """SIGTERM and Ctrl-C are handled after the block, not during a fork; processes started in the block ignore them."""
    signums, held = (signal.SIGTERM, signal.SIGINT), []
    handlers = [signal.signal(signum, lambda signum, frame: held.append(signum)) for signum in signums]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signums)  # children inherit it, whatever torch sets up in them
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for signum, handler in zip(signums, handlers):
            signal.signal(signum, handler)
        for signum in held:
            signal.raise_signal(signum)


def train_loader(dataset, batch_size, *, workers=0, seed=0, device="cpu", collate=None, **options):
    """Shuffled, augmented batches. `dataset[(epoch, index)]` -> dict of tensors.

    len(loader) is the number of batches in an epoch, also while a resumed one yields only the rest of it. options: of
    EpochBatches.
    """
    return Loader(dataset, EpochBatches(len(dataset), batch_size, seed, **options), workers, device, collate)


def eval_loader(dataset, batch_size, *, shapes=None, workers=0, device="cpu", collate=None):
    """This rank's share of the samples, every sample on exactly one rank: counts can be summed over ranks.

    `dataset[index]` -> dict of tensors. shapes: a shape per sample; a batch holds samples of one shape. A rank's share
    may be empty.
    """
    shapes = shapes or [()] * len(dataset)
    share = sorted(range(dist.rank(), len(dataset), dist.world_size()), key=shapes.__getitem__)
    batches = []
    for _, same in itertools.groupby(share, key=shapes.__getitem__):
        same = list(same)
        batches += [same[i:i + batch_size] for i in range(0, len(same), batch_size)]
    return Loader(dataset, batches, workers, device, collate)
