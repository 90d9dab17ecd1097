"""The person at the terminal: the progress bar that the loop shows, and the signals that stop it."""
import contextlib
import resource
import signal
import sys
import time

import torch
from tqdm import tqdm

from utils.errors import Stopped
from utils.train import dist


class Signals:
    """While it is entered, SIGTERM and Ctrl-C only set `signum`, which the loop reads between two optimizer steps."""

    def __enter__(self):
        self.signum, self.raises = 0, False
        self.before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _handle(self, signum, frame):
        self.signum = signum
        if self.raises:
            self.raises = False
            raise Stopped(signum)

    def check(self, number=0):
        """Raises Stopped on every rank when one of them got a signal. Else returns the ranks' largest `number`, 0 or 1.
        """
        number = dist.any_rank(self.signum or number)
        if number > 1:
            raise Stopped(number)
        return number

    @contextlib.contextmanager
    def interruptible(self):
        """Inside, a signal raises Stopped at once: for validation, which changes nothing. With several processes, all
        of them finish the validation instead, because one that stopped would leave the others waiting."""
        self.raises = dist.world_size() == 1
        try:
            if self.raises and self.signum:
                raise Stopped(self.signum)
            yield
        finally:
            self.raises = False


class Progress(tqdm):
    """A bar on rank 0: loss, learning rate, images per second, memory."""

    def __init__(self, title, loader, done=0):
        """loader: the epoch's batches, of which `done` have been trained on."""
        self.size, self.shown = loader.batch_sampler.batch_size, time.monotonic()
        super().__init__(total=len(loader) * self.size, initial=done * self.size, desc=title, unit="img",
                         disable=dist.rank() > 0, mininterval=0.5 if sys.stderr.isatty() else 30)

    def show(self, state, batches):
        """Moves the bar to so many batches of the epoch. Once a second, reads the numbers from the GPU and checks them.
        """
        self.update(batches * self.size - self.n)
        if time.monotonic() - self.shown < 1:
            return
        state.check()
        peak = torch.cuda.max_memory_allocated(state.device) if state.device.type == "cuda" else \
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self.set_postfix_str(f"loss {float(state.sums['loss'] / batches):.4g}, lr {state.lr:.2g}, "
                             f"{peak / 2**30:.1f} GiB", refresh=False)
        self.shown = time.monotonic()
