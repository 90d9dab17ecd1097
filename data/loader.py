"""Batches whose content depends on (seed, epoch, index) only: not on workers, ranks or restarts."""
import itertools
import os
import signal

import numpy as np
from torch.utils.data import DataLoader

from utils import dist

TIMEOUT = 300  # seconds without a batch until a worker counts as stuck


class EpochBatches:
    """A batch sampler for training. Yields this rank's share of every global batch as (epoch, index) keys.

    The order is a permutation drawn from (seed, epoch). All batches are full: the last one is filled up from
    the order's beginning, with indices counted on beyond `size`, so that the repeated samples are augmented
    anew (datasets take the index modulo their size). The global batches do not depend on the number of ranks.
    """

    def __init__(self, size, batch_size, seed=0):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.epoch, self.skip = 0, 0

    def set_epoch(self, epoch, skip=0):
        """The epoch to draw next, without its first `skip` batches (a resumed run has done them)."""
        self.epoch, self.skip = epoch, skip

    def __len__(self):
        return -(-self.size // self.batch_size)

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.size)
        rounds = -(-len(self) * self.batch_size // self.size)
        order = np.concatenate([order + i * self.size for i in range(rounds)])[:len(self) * self.batch_size]
        share = self.batch_size // dist.world_size()
        for batch in order.reshape(len(self), self.batch_size)[self.skip:]:
            mine = batch[dist.rank() * share:(dist.rank() + 1) * share]
            yield [(self.epoch, int(index)) for index in mine]


def train_loader(dataset, batch_size, *, workers=0, seed=0, device="cpu"):
    """Shuffled, augmented batches. `dataset[(epoch, index)]` -> dict of tensors.

    len(loader) is the number of batches in an epoch, also while a resumed one yields only the rest of it.
    """
    sampler = EpochBatches(len(dataset), batch_size, seed)
    return DataLoader(dataset, batch_sampler=sampler, **_options(workers, device))


def eval_loader(dataset, batch_size, *, shapes=None, workers=0, device="cpu"):
    """This rank's share of the samples, every sample on exactly one rank: counts can be summed over ranks.

    `dataset[index]` -> dict of tensors. shapes: a shape per sample; a batch holds samples of one shape. A
    rank's share may be empty.
    """
    shapes = shapes or [()] * len(dataset)
    share = sorted(range(dist.rank(), len(dataset), dist.world_size()), key=shapes.__getitem__)
    batches = []
    for _, same in itertools.groupby(share, key=shapes.__getitem__):
        same = list(same)
        batches += [same[i:i + batch_size] for i in range(0, len(same), batch_size)]
    return DataLoader(dataset, batch_sampler=batches, **_options(workers, device))


def _options(workers, device):
    workers = min(workers, os.cpu_count() or 1)
    options = {"num_workers": workers, "pin_memory": str(device).startswith("cuda"), "worker_init_fn": _init_worker}
    if workers:
        # fork: the workers share the cache's memory, which other ways of starting them would copy
        options |= {"persistent_workers": True, "prefetch_factor": 4, "timeout": TIMEOUT,
                    "multiprocessing_context": "fork"}
    return options


def _init_worker(worker):
    # the main process decides when to stop; a Ctrl-C or a cluster's SIGTERM reaches workers too
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
