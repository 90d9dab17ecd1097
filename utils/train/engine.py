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
from torch.nn.parallel import DistributedDataParallel

from utils.errors import NumericalError, Stopped, UserError
from utils.files import write_json
from utils.pictures import cells, charts, table
from utils.train import checkpoint, dist, runs
from utils.train.loggers import Loggers
from utils.train.optim import set_lr
from utils.train.terminal import Progress, Signals

SAVE_MINUTES = 10  # between two saves within an epoch


def seed_everything(seed, deterministic=False):
    """Seeds the initialisation of nets. The loop seeds every batch itself."""
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        torch.use_deterministic_algorithms(True)


def precision(amp, device):
    """"auto" | "bf16" | "fp16" | "off" -> the autocast dtype, or None for fp32.

    auto: bf16 where the hardware computes in it, else fp16 on CUDA (with loss scaling), else fp32.
    """
    if amp != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return torch.bfloat16
    return None


def autocast(device, dtype):
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def to_device(batch, device):
    """Moves the tensors of a dict to the device; batches of images (4-D) become channels-last."""
    def move(value):
        if not isinstance(value, torch.Tensor):
            return value
        layout = torch.channels_last if value.ndim == 4 else torch.preserve_format
        return value.to(device, non_blocking=True, memory_format=layout)
    return {name: move(value) for name, value in batch.items()}


class State:
    """A run: its weights, their averages, its optimizer, and how far it has come. It makes the optimizer steps.

    model: the net, trained in place. optimizer: `optim.make_optimizer`. schedule: `optim.make_schedule`.
    ema: `optim.make_ema`; these weights are evaluated. swa: `swa.SWA`; these are evaluated after the last epoch.
    amp: see `precision`. accumulate: batches per optimizer step; the last step of an epoch may have fewer.
    clip: largest norm of a step's gradient, 0: no limit. compile: whether to train the net through torch.compile.
    """

    def __init__(self, model, optimizer, schedule, *, device, ema=None, swa=None, amp="auto", accumulate=1, clip=0.0,
                 compile=False):
        self.model, self.optimizer, self.schedule, self.ema, self.swa = model, optimizer, schedule, ema, swa
        self.device, self.accumulate, self.clip = device, accumulate, clip
        self.dtype = precision(amp, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)
        self.net = torch.compile(model) if compile else model
        if dist.world_size() > 1:
            self.net = DistributedDataParallel(self.net, device_ids=[device] if device.type == "cuda" else None,
                                               gradient_as_bucket_view=True)
        self.step, self.steps_per_epoch = 0, 0  # optimizer steps done, and in an epoch; `fit` sets the latter
        self.history, self.sums = [], {}  # a row per finished epoch; sums of the running epoch's losses
        self.score, self.threshold = None, None  # the name of the score, and the threshold of the last evaluation
        self.finite = torch.ones((), dtype=torch.bool, device=device)

    @property
    def eval_model(self):
        """The model that is evaluated: the EMA weights if the run has them, else the trained ones."""
        return self.ema.module if self.ema else self.model

    @property
    def lr(self):
        """The learning rate of the last step."""
        return self.optimizer.param_groups[0]["lr"]

    @property
    def scores(self):
        """The scores of the epochs that were evaluated. NaN counts as the lowest."""
        scores = [row[self.score] for row in self.history if self.score in row]
        return [-math.inf if math.isnan(score) else score for score in scores]

    def train_batch(self, compute_loss, batch, index, batches):
        """Trains on batch `index` of an epoch of `batches`. Returns whether this completed an optimizer step."""
        first = index - index % self.accumulate  # of this step's batches; an epoch's last step may have fewer
        count = min(self.accumulate, batches - first)
        last = index == first + count - 1
        # the ranks exchange gradients once per step, in its last backward pass
        with contextlib.nullcontext() if last or dist.world_size() == 1 else self.net.no_sync():
            with autocast(self.device, self.dtype):
                loss, parts = compute_loss(self.net, to_device(batch, self.device))
            self.scaler.scale(loss / count).backward()
        self.finite &= loss.detach().isfinite()
        for name, value in {"loss": loss, **parts}.items():  # on the device: the CPU does not wait
            value = torch.as_tensor(value, device=self.device).detach().float()
            self.sums[name] = self.sums.get(name, 0) + value
        if last:
            self._update()
        return last

    def _update(self):
        """The optimizer step, after the backward passes of its batches."""
        set_lr(self.optimizer, self.schedule(self.step, self.scores), self.step)
        self.scaler.unscale_(self.optimizer)
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(params, self.clip or math.inf, foreach=self.device.type != "mps")
        if not self.scaler.is_enabled():  # the scaler skips such steps
            self.finite &= norm.isfinite()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update_parameters(self.model)
        self.step += 1

    def state_dict(self):
        """What a checkpoint holds besides the header. Raises NumericalError rather than return NaN or infinity."""
        saved = {"model": self.model.state_dict(), "step": self.step, "steps_per_epoch": self.steps_per_epoch,
                 "optimizer": self.optimizer.state_dict() | {"name": type(self.optimizer).__name__},
                 "scaler": self.scaler.state_dict(), "history": self.history, "score": self.score,
                 "threshold": self.threshold,
                 "sums": {name: float(dist.mean(value.clone())) for name, value in self.sums.items()}}
        for name, average, count in self._averages():
            saved[count] = int(average.n_averaged) if average else 0
            saved[name] = average.module.state_dict() if saved[count] else None
        weights = [t for name in ("model", "ema", "swa") for t in (saved[name] or {}).values() if t.is_floating_point()]
        self.finite &= torch.stack([t.isfinite().all() for t in weights]).all()
        self.check()
        return saved

    def load_state_dict(self, saved):
        """Goes on from a `state_dict()`. Raises UserError for another net, optimizer or number of steps per epoch."""
        if saved["steps_per_epoch"] != self.steps_per_epoch:
            raise UserError(f"--resume: the run had {saved['steps_per_epoch']} steps per epoch, this data and these "
                            f"flags make {self.steps_per_epoch}; resume with its data, --bs and --accumulate, or start "
                            f"a new run with --weights")
        if saved["optimizer"]["name"] != type(self.optimizer).__name__:
            raise UserError(f"--resume: the run had the optimizer {saved['optimizer']['name']}; keep --optimizer, or "
                            f"start a new run with --weights")
        checkpoint.load_strict(self.model, saved["model"], "--resume")
        for name, average, count in self._averages():
            if average:  # if the run had no such average, it begins with the run's weights
                checkpoint.load_strict(average.module, saved.get(name) or saved["model"], "--resume")
                average.n_averaged.fill_(saved.get(count, 0))
        ours = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(saved["optimizer"])
        for group, settings in zip(self.optimizer.param_groups, ours):
            group.update(settings)  # --resume --lr, --momentum, --weight-decay and the warm-up's flags count
        if saved["scaler"]:  # empty when the run had another --amp
            self.scaler.load_state_dict(saved["scaler"])
        for name in ("step", "history", "score", "threshold"):
            setattr(self, name, saved.get(name))
        self.sums = {name: torch.tensor(value, device=self.device) for name, value in saved["sums"].items()}

    def _averages(self):
        """(key in the checkpoint, averaged model or None, key of how many it is the average of)"""
        return ("ema", self.ema, "ema_steps"), ("swa", self.swa, "swa_count")

    def check(self):
        """Raises NumericalError when a loss or a gradient was not finite. Waits for the GPU."""
        if not self.finite or (self.scaler.is_enabled() and self.scaler.get_scale() < 1e-3):
            then = "--resume goes on from the last epoch" if self.history else "start again"
            raise NumericalError(f"loss or gradients are no longer finite (noticed at step {self.step}); lower --lr, "
                                 f"try --clip 1 or --amp off, then {then}")


def fit(state, loader, compute_loss, evaluate=None, *, folder, header, epochs, resume=None, seed=0, patience=0,
        save_period=10, loggers=None):
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
        if dist.rank() == 0 and "args" in header:  # no sooner: they might have been refused
            write_json(folder / "args.json", header["args"])
        _write_results(folder, state)  # the run may have been killed between its checkpoint and this
    saved = state.step, len(state.history)  # how far last.pt goes

    def save(name="last.pt", **changes):
        nonlocal saved
        content = header | state.state_dict() | changes  # on every rank: all notice numbers that are not finite
        if name == "last.pt":
            saved = state.step, len(state.history)
        else:  # it can predict but not go on, at a third of the size
            content = {k: v for k, v in content.items() if k not in ("optimizer", "scaler", "swa", "swa_count")}
        if dist.rank() == 0:
            checkpoint.save(folder / name, content, keep_previous=name == "last.pt")

    evaluate, loggers = evaluate or (lambda model: {}), loggers or Loggers()
    with contextlib.closing(loggers), Signals() as signals:
        try:
            while len(state.history) < epochs and not _out_of_patience(state.scores, patience):
                began = time.monotonic()
                _train_epoch(state, loader, compute_loss, save, signals, epochs=epochs, seed=seed)
                _finish_epoch(state, loader, evaluate, save, signals, began=began, save_period=save_period)
                _write_results(folder, state)
                loggers.log(state.history[-1], len(state.history))
                dist.print0(_line(state.history[-1]))
                signals.check()
            if state.swa:
                _finish_swa(state, loader, compute_loss, evaluate, folder, save, signals, seed=seed)
        except Stopped:  # the state is that between two steps, or that of a trained epoch before its evaluation
            if saved != (state.step, len(state.history)):
                save()
            dist.print0(f"stopped and saved at step {state.step}; go on with --resume")
            raise
    if dist.rank() == 0:
        try:
            table.write(folder)
        except UserError as error:  # all else is written, and the next run's end makes this table anew
            print(f"warning: {error}", file=sys.stderr)


def _train_epoch(state, loader, compute_loss, save, signals, *, epochs, seed):
    """Trains the rest of an epoch, from the step that `state` has reached. Raises Stopped between two steps."""
    epoch, batches = len(state.history), len(loader)
    done = (state.step - epoch * state.steps_per_epoch) * state.accumulate
    if done >= batches:
        return
    state.net.train()
    saved = time.monotonic()
    with Progress(f"epoch {epoch + 1}/{epochs}", loader, done) as progress:
        for i, batch in _seeded(loader, epoch, done, seed):
            if not state.train_batch(compute_loss, batch, i, batches):
                continue
            progress.show(state, i + 1)
            if signals.check(int(dist.rank() == 0 and time.monotonic() - saved > SAVE_MINUTES * 60)):
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
    row = {"epoch": len(state.history) + 1, "lr": state.lr}
    row |= {name: float(dist.mean(value / len(loader))) for name, value in state.sums.items()}
    state.check()
    for module in (state.model, state.eval_model):
        dist.same_weights(module)
    with signals.interruptible():
        metrics, threshold = _metrics(evaluate_on(state, evaluate))
    state.history.append(dist.broadcast(row | metrics | {"seconds": time.monotonic() - began}))
    state.sums = {}
    if metrics:
        state.score, state.threshold = next(iter(metrics)), threshold
    if state.swa:
        state.swa.take(state.model, len(state.history))
    if metrics and state.scores[-1] > max(state.scores[:-1], default=-math.inf):
        save("best.pt")
    if save_period and len(state.history) % save_period == 0:
        save(f"epoch_{len(state.history)}.pt")
    save()  # after the others: a run that is killed before this comes here again and writes them


def _finish_swa(state, loader, compute_loss, evaluate, folder, save, signals, *, seed):
    """Batch norms of the SWA weights in a pass over what would be the next epoch; writes swa.pt and swa.json."""
    if not state.swa.n_averaged:
        dist.print0("no swa.pt: the run had ended (--patience?) before its epochs for --swa")
        return
    model = state.swa.module
    with signals.interruptible():
        with autocast(state.device, state.dtype), state.swa.new_statistics(), Progress("batch norms", loader) as bar:
            for _, batch in _seeded(loader, len(state.history), 0, seed):
                compute_loss(model, to_device(batch, state.device))
                bar.update(bar.size)
        metrics, threshold = _metrics(evaluate_on(state, evaluate, model))
    save("swa.pt", model=model.state_dict(), ema=None, ema_steps=0, swa_scores=metrics, threshold=threshold)
    if dist.rank() == 0 and metrics:  # no row of results.csv: that is the history, of other weights
        write_json(folder / "swa.json", metrics)
    dist.print0(f"swa.pt, the mean of {int(state.swa.n_averaged)} epochs: {_line(metrics)}")
    signals.check()


def evaluate_on(state, evaluate, model=None):
    """evaluate(model), as the loop calls it. model: by default `state.eval_model`."""
    with torch.inference_mode(), autocast(state.device, state.dtype):
        return evaluate((model or state.eval_model).eval())


def check_debug(history):
    """--debug: raises NumericalError when the loss of the last epoch is not lower than that of the first."""
    first, last = (history[i]["loss"] for i in (0, -1))
    if not last < first:
        raise NumericalError(f"--debug: the loss did not fall, {first:.4g} before and {last:.4g} after; look at --lr "
                             f"and at train_batch.png")
    dist.print0(f"--debug: the loss fell from {first:.4g} to {last:.4g}")


def _metrics(found):
    """What `evaluate` returned -> ({name: number}, the threshold or None)."""
    return {name: float(value) for name, value in found.items() if name != "threshold"}, found.get("threshold")


def _out_of_patience(scores, patience):
    return bool(patience and scores) and len(scores) - 1 - scores.index(max(scores)) >= patience


def _write_results(folder, state):
    if dist.rank() == 0 and state.history:
        cells.write_csv(folder / "results.csv", state.history)
        charts.plot_curves(folder / "results.png", state.history, state.score)
        if state.score:
            runs.add_record(folder, score=state.score)


def _line(row):
    return "  ".join(f"{name} {value:.4g}" for name, value in row.items())
