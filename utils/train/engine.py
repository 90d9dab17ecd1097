"""The training loop of all three tasks.

A script passes two functions, and the loop knows nothing else about its task:

    compute_loss(model, batch) -> (loss, {name: value})      loss: mean over the batch
    evaluate(model) -> {name: value}                         the first value is the score, higher is better;
                                                             "threshold" is kept for prediction and is no metric

A loss may call autograd.grad (a gradient penalty), call the model more than once, and use the EMA weights of the state.

The state of a run is: weights, their averages, optimizer, scaler, the number of optimizer steps done, the sums of the
running epoch's losses, a row per finished epoch, the name of the score, and the threshold. Everything else is computed
from these: the position in the data, the learning rate, the best score, and the random numbers, because torch's
generators are seeded from (seed, epoch, batch, rank) before every batch. So a run that is killed anywhere and resumed
ends with the same bits as a run that was not killed.
"""
import contextlib
import math
import sys
import time

import numpy as np
import torch

from utils import watchdog
from utils.errors import Stopped, UserError
from utils.files import write_json
from utils.pictures import cells, charts, table
from utils.train import checkpoint, dist, runs
from utils.train.loggers import Progress
from utils.train.state import autocast, to_device

SAVE_MINUTES = 10  # between two saves within an epoch


def seed_everything(seed, deterministic=False):
    """Seeds the initialisation of nets. The loop seeds every batch itself."""
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        torch.use_deterministic_algorithms(True)


def fit(state, loader, compute_loss, evaluate=None, *, folder, header, epochs, resume=None, seed=0, patience=0,
        save_period=10, loggers=()):
    """Trains `state` until it has `epochs` rows of history.

    loader: batches as dicts of tensors, with `batch_sampler.set_epoch(epoch, skip)`; see data/loader.py.
    header: what prediction needs (task, arch, input, args, ...), stored in every checkpoint. resume: a loaded
    checkpoint to go on from. patience: epochs without a better score before the run ends, 0: all epochs.
    save_period: a checkpoint is kept every so many epochs, 0: none. loggers: `loggers.make_loggers`.

    Writes into `folder`: last.pt (and last.pt.prev), best.pt, epoch_N.pt, swa.pt, swa.json (its scores), results.csv,
    results.png; at the end summary.csv, the table of all runs (utils/pictures/table.py).
    Raises NumericalError when loss or gradients are not finite, Stopped after SIGTERM or Ctrl-C.
    """
    state.steps_per_epoch = -(-len(loader) // state.accumulate)
    if resume:
        state.load_state_dict(resume)
        state.saved = state.step, state.epoch
        if dist.is_main():  # no sooner: they might have been refused
            write_json(folder / "args.json", header["args"])
        _write_results(folder, state)  # the run may have been killed between its checkpoint and this

    def save(name="last.pt", **changes):
        content = header | state.state_dict() | changes  # on every rank: all notice numbers that are not finite
        last = name == "last.pt"
        if not last:  # it can predict but not go on, at a third of the size
            content = {k: v for k, v in content.items() if k not in ("optimizer", "scaler", "swa", "swa_count")}
        if dist.is_main():
            checkpoint.save(folder / name, content, keep_previous=last)
        if last:
            state.saved = state.step, state.epoch

    evaluate = evaluate or (lambda model: {})
    with contextlib.ExitStack() as stack, dist.Signals() as signals:
        for _, close in loggers:
            stack.callback(close)
        try:
            while state.epoch < epochs and not _out_of_patience(state.scores, patience):
                began = time.monotonic()
                _train_epoch(state, loader, compute_loss, save, signals, epochs=epochs, seed=seed)
                _finish_epoch(state, loader, evaluate, save, signals, began=began, save_period=save_period)
                _write_results(folder, state)
                for log, _ in loggers:
                    log(state.history[-1], state.epoch)
                dist.print0(line(state.history[-1]))
                signals.check()
            if state.swa:
                _finish_swa(state, loader, compute_loss, evaluate, folder, save, signals, seed=seed)
        except Stopped:  # the state is that between two steps, or that of a trained epoch before its evaluation
            if state.saved != (state.step, state.epoch):
                save()
            dist.print0(f"stopped and saved at step {state.step}; go on with --resume")
            raise
    if dist.is_main():
        try:
            table.write(folder)
        except UserError as error:  # all else is written, and the next run's end makes this table anew
            print(f"warning: {error}", file=sys.stderr)


def _train_epoch(state, loader, compute_loss, save, signals, *, epochs, seed):
    """Trains the rest of an epoch, from the step that `state` has reached. Raises Stopped between two steps."""
    epoch, batches = state.epoch, len(loader)
    done = (state.step - epoch * state.steps_per_epoch) * state.accumulate
    if done >= batches:
        return
    state.net.train()
    saved = time.monotonic()
    with Progress(f"epoch {epoch + 1}/{epochs}", loader, done) as progress:
        for i, batch in _seeded(loader, epoch, done, seed):
            with watchdog.waiting("a training step", watchdog.FIRST):
                stepped = state.train_batch(compute_loss, batch, i, batches)
            if not stepped:
                continue
            progress.show(state, i + 1)
            if signals.check(int(dist.is_main() and time.monotonic() - saved > SAVE_MINUTES * 60)):
                save()
                saved = time.monotonic()


def _seeded(loader, epoch, done, seed):
    """The (index, batch) pairs of an epoch after the first `done` batches; before each, torch's generators are seeded.
    """
    loader.batch_sampler.set_epoch(epoch, done)
    for i, batch in enumerate(loader, done):
        mixed = np.random.SeedSequence((seed, epoch, i, dist.rank())).generate_state(1, np.uint64)
        torch.manual_seed(int(mixed[0]))
        yield i, batch


def _finish_epoch(state, loader, evaluate, save, signals, *, began, save_period):
    """Evaluates a trained epoch, appends its row to the history and saves."""
    row = {"epoch": state.epoch + 1, "lr": state.lr}
    row |= {name: float(dist.mean(value / len(loader))) for name, value in state.sums.items()}
    state.check()
    for module in (state.model, state.eval_model):
        dist.same_weights(module)
    with signals.interruptible():
        metrics, threshold = _metrics(evaluate_on(state, evaluate))
    state.history.append(dist.broadcast(row | metrics | {"seconds": time.monotonic() - began}))
    state.sums = {}
    if state.swa:
        state.swa.take(state.model, state.epoch)
    if metrics:
        state.score, state.threshold = next(iter(metrics)), threshold
        if state.scores[-1] > max(state.scores[:-1], default=-math.inf):
            save("best.pt")
    if save_period and state.epoch % save_period == 0:
        save(f"epoch_{state.epoch}.pt")
    save()  # after the others: a run that is killed before this comes here again and writes them


def _finish_swa(state, loader, compute_loss, evaluate, folder, save, signals, *, seed):
    """Batch norms of the SWA weights in a pass over what would be the next epoch; writes swa.pt and swa.json."""
    if not state.swa.n_averaged:
        dist.print0("no swa.pt: the run had ended (--patience?) before its epochs for --swa")
        return
    model = state.swa.module
    with signals.interruptible():
        with autocast(state.device, state.dtype), state.swa.new_statistics(), Progress("batch norms", loader) as bar:
            for _, batch in _seeded(loader, state.epoch, 0, seed):
                compute_loss(model, to_device(batch, state.device))
                bar.update(bar.size)
        metrics, threshold = _metrics(evaluate_on(state, evaluate, model))
    save("swa.pt", model=model.state_dict(), ema=None, ema_steps=0, swa_scores=metrics, threshold=threshold)
    if dist.is_main() and metrics:  # no row of results.csv: that is the history, of other weights
        write_json(folder / "swa.json", metrics)
    dist.print0(f"swa.pt, the mean of {int(state.swa.n_averaged)} epochs: {line(metrics)}")
    signals.check()


def evaluate_on(state, evaluate, model=None):
    """evaluate(model), as the loop calls it. model: by default `state.eval_model`."""
    with torch.inference_mode(), autocast(state.device, state.dtype):
        return evaluate((model or state.eval_model).eval())


def _metrics(found):
    """What `evaluate` returned -> ({name: number}, the threshold or None)."""
    return {name: float(value) for name, value in found.items() if name != "threshold"}, found.get("threshold")


def _out_of_patience(scores, patience):
    return bool(patience and scores) and len(scores) - 1 - scores.index(max(scores)) >= patience


def _write_results(folder, state):
    if dist.is_main() and state.history:
        cells.write_csv(folder / "results.csv", state.history)
        charts.plot_curves(folder / "results.png", state.history, state.score)
        if state.score:
            runs.add_record(folder, score=state.score)


def line(row):
    """{name: number} in one line."""
    return "  ".join(f"{name} {value:.4g}" for name, value in row.items())
