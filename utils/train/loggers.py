"""What a run shows while it trains: the progress bar; TensorBoard and Weights & Biases, imported only on request."""
import importlib
import os
import resource
import sys
import time

import torch
from tqdm import tqdm

from utils.errors import UserError, one_line
from utils.files import write_text
from utils.train import dist


class Progress(tqdm):
    """A bar on rank 0: loss, learning rate, images per second, memory."""

    def __init__(self, title, loader, done=0):
        """loader: the batches of the epoch. done: how many of them the net has been trained on."""
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


def _optional(module, name, package):
    """The object `name` of an optional package, or a UserError that says what to install."""
    try:  # a folder that only happens to be called "wandb" imports as an empty package: hence AttributeError
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--{package}: {package} cannot be imported ({error}); pip install {package}") from error


def make_loggers(run_dir, *, tensorboard=False, wandb=False, config=None):
    """-> [(log(row, step), close())] for TensorBoard events in run_dir and for a W&B run, each when asked for; only rank
    0 should ask. row: {name: number}; step: int, never smaller than the last one.

    config: dict of plain values that W&B shows. The W&B run has the folder's name, the project is WANDB_PROJECT or the
    folder above the run's; WANDB_MODE=offline works without an account or a network. The run's id
    is kept in run_dir/wandb_id.txt, so that a resumed run continues its own curves.
    Raises UserError if a package is missing or W&B cannot start.
    """
    sinks = []
    if tensorboard:
        writer = _optional("torch.utils.tensorboard", "SummaryWriter", "tensorboard")(str(run_dir))

        def add_scalars(row, step):
            for key, value in row.items():
                writer.add_scalar(key, value, step)
        sinks.append((add_scalars, writer.close))
    if wandb:
        start, kept = _optional("wandb", "init", "wandb"), run_dir / "wandb_id.txt"
        try:
            run = start(project=os.environ.get("WANDB_PROJECT") or run_dir.resolve().parent.name,
                        name=run_dir.resolve().name, dir=str(run_dir), config=config,
                        id=kept.read_text().strip() if kept.exists() else None, resume="allow")
        except Exception as error:  # no account, no network, a deleted run: the user must settle all of them
            raise UserError(f"--wandb: W&B did not start ({one_line(error)}); `wandb login`, or "
                            f"WANDB_MODE=offline") from error
        write_text(kept, run.id)
        sinks.append((lambda row, step: run.log(row, step=step), run.finish))
    return sinks
