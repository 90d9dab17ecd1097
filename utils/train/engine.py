"""The training loop of all three tasks.

A script gives two functions, and this is all that the loop knows about its task:

    compute_loss(model, batch) -> (loss, {name: value})      loss: mean over the batch
    evaluate(model) -> {name: value}                         the first value is the score, higher is better

The state of a run is: weights, their averages, optimizer, scaler, the number of optimizer steps done, the running
epoch's losses, and a row and a score per finished epoch. Everything else follows from these: position in the data,
learning rate, best score. Random numbers do too: torch's generators are seeded from (seed, epoch, batch, rank) before
every batch. A run that is killed anywhere and resumed therefore ends with the same bits as one that was not.
"""
import contextlib
import math
import resource
import signal
import sys
import time

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from utils.pictures import charts, table
from utils.train import checkpoint, dist
from utils.errors import NumericalError, Stopped, UserError
from utils.files import write_json
from utils.train.optim import set_lr

SAVE_MINUTES = 10  # within long epochs


def seed_everything(seed, deterministic=False):
    """Seeds the initialisation of nets; the loop seeds every batch by itself."""
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
    """A dict's tensors on the device, image batches (4-D) channels-last."""
    def move(value):
        if not isinstance(value, torch.Tensor):
            return value
        layout = torch.channels_last if value.ndim == 4 else torch.preserve_format
        return value.to(device, non_blocking=True, memory_format=layout)
    return {name: move(value) for name, value in batch.items()}


class Signals:
    """While it is entered, SIGTERM and Ctrl-C only set `signum`, for the loop to look at between two steps.

    Inside `interruptible()` they raise Stopped at once: for validation, which changes nothing.
    """

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

    @contextlib.contextmanager
    def interruptible(self):
        # with several ranks one would leave the others waiting: all finish the validation instead
        self.raises = dist.world_size() == 1
        try:
            if self.raises and self.signum:
                raise Stopped(self.signum)
            yield
        finally:
            self.raises = False


class State:
    """Everything that a run is: what a checkpoint holds besides the header."""

    def __init__(self, model, optimizer, ema, swa, *, device, dtype, steps_per_epoch):
        self.model, self.optimizer, self.ema, self.swa = model, optimizer, ema, swa
        self.device, self.dtype, self.steps_per_epoch = device, dtype, steps_per_epoch
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        self.step = 0  # optimizer steps done
        self.history, self.scores = [], []  # a row and a score per finished epoch
        self.sums = {}  # of the running epoch's losses
        self.finite = torch.ones((), dtype=torch.bool, device=device)

    @property
    def eval_model(self):
        """The weights that count: the averaged ones where the run keeps them."""
        return self.ema.module if self.ema else self.model

    def state_dict(self):
        """Raises NumericalError rather than hand out numbers that are not finite."""
        self.check()
        modules = [self.model, *(average.module for average in (self.ema, self.swa) if average)]
        weights = [t for module in modules for t in module.state_dict().values() if t.is_floating_point()]
        if not torch.stack([t.isfinite().all() for t in weights]).all():
            self.finite.fill_(False)
            self.check()
        return {"model": self.model.state_dict(), "ema": self.ema.module.state_dict() if self.ema else None,
                "ema_steps": int(self.ema.n_averaged) if self.ema else 0,
                "swa": self.swa.module.state_dict() if self.swa and self.swa.n_averaged else None,
                "swa_count": int(self.swa.n_averaged) if self.swa else 0,
                "optimizer": self.optimizer.state_dict() | {"name": type(self.optimizer).__name__},
                "scaler": self.scaler.state_dict(), "step": self.step, "steps_per_epoch": self.steps_per_epoch,
                "history": self.history, "scores": self.scores,
                "sums": {name: float(dist.mean(value.clone())) for name, value in self.sums.items()}}

    def load_state_dict(self, saved):
        if saved["steps_per_epoch"] != self.steps_per_epoch:
            raise UserError(f"--resume: the run had {saved['steps_per_epoch']} steps per epoch, this data and these "
                            f"flags make {self.steps_per_epoch}; resume with its data, --bs and --accumulate, or start "
                            f"a new run with --weights")
        checkpoint.load_strict(self.model, saved["model"], "--resume")
        if self.ema:  # a run without it has none: its mean begins with the weights that it has come to
            checkpoint.load_strict(self.ema.module, saved["ema"] or saved["model"], "--resume")
            self.ema.n_averaged.fill_(saved["ema_steps"])
        if self.swa and saved.get("swa"):
            checkpoint.load_strict(self.swa.module, saved["swa"], "--resume")
            self.swa.n_averaged.fill_(saved["swa_count"])
        if saved["optimizer"]["name"] != type(self.optimizer).__name__:
            raise UserError(f"--resume: the run had the optimizer {saved['optimizer']['name']}; keep --optimizer, or "
                            f"start a new run with --weights")
        ours = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(saved["optimizer"])
        for group, settings in zip(self.optimizer.param_groups, ours):
            group.update(settings)  # so that --resume --lr, --momentum, --weight-decay and the warmup's flags count
        if saved["scaler"]:  # empty when the run had another --amp
            self.scaler.load_state_dict(saved["scaler"])
        self.step, self.history, self.scores = saved["step"], saved["history"], saved["scores"]
        self.sums = {name: torch.tensor(value, device=self.device) for name, value in saved["sums"].items()}

    def check(self):
        if not self.finite or (self.scaler.is_enabled() and self.scaler.get_scale() < 1e-3):
            then = "--resume goes on from the last epoch" if self.history else "start again"
            raise NumericalError(f"loss or gradients are no longer finite (noticed at step {self.step}); lower --lr, "
                                 f"try --clip 1 or --amp off, then {then}")


def fit(model, loader, optimizer, schedule, compute_loss, evaluate=None, *, folder, header, epochs, device,
        resume=None, accumulate=1, clip=0.0, amp="auto", ema=None, swa=None, compile=False, seed=0, patience=0,
        save_period=10, loggers=None):
    """Trains `model` in place; returns the run's `State`.

    loader: batches as dicts of tensors, with `batch_sampler.set_epoch(epoch, skip)`; `accumulate` of them make
    an optimizer step, the last step of an epoch may have fewer. schedule: `utils.optim.make_schedule`.
    ema: `utils.optim.make_ema`; it is what gets evaluated. swa: `utils.swa.SWA`; evaluated after the last epoch.
    header: what prediction needs (task, arch, args, ...), stored in every checkpoint. resume: a loaded checkpoint
    to go on from. clip: largest gradient norm, 0: any. patience: epochs without a better score before the run ends,
    0: all epochs. loggers: `charts.make_loggers`.

    Writes into `folder`: last.pt (and last.pt.prev), best.pt, epoch_N.pt, swa.pt, swa.json (its scores), results.csv,
    results.png; at the end summary.csv, the table of all runs (utils/pictures/table.py).
    Raises NumericalError when loss or gradients are not finite, Stopped after SIGTERM or Ctrl-C.
    """
    state = State(model, optimizer, ema, swa, device=device, dtype=precision(amp, device),
                  steps_per_epoch=math.ceil(len(loader) / accumulate))
    if resume:
        state.load_state_dict(resume)
        if dist.rank() == 0 and "args" in header:  # no sooner: they might have been refused
            write_json(folder / "args.json", header["args"])
        _write_results(folder, state.history)  # the run may have been killed between its checkpoint and this

    net = torch.compile(model) if compile else model
    if dist.world_size() > 1:
        net = DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None,
                                      gradient_as_bucket_view=True)

    def save(name="last.pt", saved=None):
        saved = saved or header | state.state_dict()  # on every rank: all notice numbers that are not finite
        if dist.rank() == 0:
            checkpoint.save(folder / name, saved, keep_previous=name == "last.pt")

    loggers = loggers or charts.Loggers()
    with contextlib.closing(loggers), Signals() as signals:
        while len(state.history) < epochs and not _out_of_patience(state.scores, patience):
            epoch, began = len(state.history), time.monotonic()
            _train_epoch(net, loader, state, schedule, compute_loss, save=save, signals=signals, epochs=epochs,
                         accumulate=accumulate, clip=clip, seed=seed)
            row = {"epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"]}
            row |= {k: float(dist.mean(v / len(loader))) for k, v in state.sums.items()}

            state.check()
            for module in (model, state.eval_model):
                dist.same_buffers(module)
            try:
                with signals.interruptible():
                    metrics = evaluate_on(state, evaluate) if evaluate else {}
            except Stopped:  # the epoch is trained but not judged; a resumed run begins with that
                save()
                _stop_if(signals.signum, state)
            row |= {k: float(v) for k, v in metrics.items()} | {"seconds": time.monotonic() - began}
            row = dist.broadcast(row)

            state.history.append(row)
            state.scores += [-math.inf if math.isnan(row[k]) else row[k] for k in metrics][:1]
            state.sums = {}
            if swa:
                swa.take(model, len(state.history))
            saved = header | state.state_dict()
            slim = _slim(saved)
            if state.scores and state.scores[-1] > max(state.scores[:-1], default=-math.inf):
                save("best.pt", slim)
            if save_period and (epoch + 1) % save_period == 0:
                save(f"epoch_{epoch + 1}.pt", slim)
            save("last.pt", saved)  # after the others: killed before this, the run comes here again and writes them
            _record(folder, state.history, loggers)
            _stop_if(dist.any_rank(signals.signum), state)

        if swa and swa.n_averaged:
            try:
                with signals.interruptible():
                    scores = _finish_swa(state, loader, compute_loss, evaluate, seed=seed)
            except Stopped:  # last.pt is complete; a resumed run begins with this
                _stop_if(signals.signum, state)
            averaged = {"model": swa.module.state_dict(), "ema": None, "ema_steps": 0, "swa_scores": scores}
            save("swa.pt", _slim(header | state.state_dict()) | averaged)
            if dist.rank() == 0 and scores:  # no row of results.csv: that is the history, of other weights
                write_json(folder / "swa.json", scores)
            dist.print0(f"swa.pt, the mean of {int(swa.n_averaged)} epochs: "
                        + "  ".join(f"{k} {v:.4g}" for k, v in scores.items()))
            _stop_if(dist.any_rank(signals.signum), state)
        elif swa:
            dist.print0("no swa.pt: the run had ended (--patience?) before its epochs for --swa")
    if dist.rank() == 0:
        try:
            table.write(folder)
        except UserError as error:  # all else is written, and the next run's end makes this table anew
            print(f"warning: {error}", file=sys.stderr)
    return state


def _slim(saved):
    """A checkpoint that predicts but cannot go on: a third of the size."""
    return {k: v for k, v in saved.items() if k not in ("optimizer", "scaler", "swa", "swa_count")}


def evaluate_on(state, evaluate):
    """-> evaluate(the run's weights that count), as the loop calls it."""
    with torch.inference_mode(), autocast(state.device, state.dtype):
        return evaluate(state.eval_model.eval())


def check_debug(history):
    """--debug: raises NumericalError when the loss of the last epoch is not lower than that of the first."""
    first, last = (history[i]["loss"] for i in (0, -1))
    if not last < first:
        raise NumericalError(f"--debug: the loss did not fall, {first:.4g} before and {last:.4g} after; look at --lr "
                             f"and at train_batch.png")
    dist.print0(f"--debug: the loss fell from {first:.4g} to {last:.4g}")


def _train_epoch(net, loader, state, schedule, compute_loss, *, save, signals, epochs, accumulate, clip, seed):
    """The rest of an epoch, from the step that `state` has reached. Raises Stopped between two steps."""
    epoch, batches, device = len(state.history), len(loader), state.device
    done = (state.step - epoch * state.steps_per_epoch) * accumulate
    if done >= batches:
        return
    params = [p for group in state.optimizer.param_groups for p in group["params"]]
    loader.batch_sampler.set_epoch(epoch, done)
    net.train()
    saved = time.monotonic()
    with Progress(f"epoch {epoch + 1}/{epochs}", loader, done) as progress:
        for i, batch in enumerate(loader, done):
            first = i - i % accumulate  # of this step's batches; an epoch's last step may have fewer
            last = i == min(first + accumulate, batches) - 1
            torch.manual_seed(_mix(seed, epoch, i, dist.rank()))
            # gradients travel between ranks once per step, in its last backward pass
            hold = net.no_sync() if dist.world_size() > 1 and not last else contextlib.nullcontext()
            with hold:
                with autocast(device, state.dtype):
                    loss, parts = compute_loss(net, to_device(batch, device))
                state.scaler.scale(loss / min(accumulate, batches - first)).backward()
            state.finite &= loss.detach().isfinite()
            for name, value in {"loss": loss, **parts}.items():  # summed where they are: nobody waits for the GPU
                state.sums[name] = state.sums.get(name, 0) + torch.as_tensor(value, device=device).detach().float()
            if not last:
                continue

            set_lr(state.optimizer, schedule(state.step, state.scores), state.step)
            state.scaler.unscale_(state.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(params, clip or math.inf, foreach=device.type != "mps")
            if not state.scaler.is_enabled():  # else the scaler finds and skips such steps
                state.finite &= norm.isfinite()
            state.scaler.step(state.optimizer)
            state.scaler.update()
            state.optimizer.zero_grad(set_to_none=True)
            if state.ema:
                state.ema.update_parameters(state.model)
            state.step += 1

            if progress.update(i + 1):
                state.check()
                lr = state.optimizer.param_groups[0]["lr"]
                progress.show(loss=state.sums["loss"] / (i + 1), lr=lr, device=device)
            overdue = dist.rank() == 0 and time.monotonic() - saved > SAVE_MINUTES * 60
            wish = dist.any_rank(signals.signum or int(overdue))
            if wish:
                save()
                saved = time.monotonic()
            _stop_if(wish if wish > 1 else 0, state)


def _finish_swa(state, loader, compute_loss, evaluate, *, seed):
    """Batch norms of the averaged weights in a pass over what would be the next epoch; -> their scores."""
    epoch = len(state.history)
    loader.batch_sampler.set_epoch(epoch)

    def batches(progress):
        for i, batch in enumerate(loader):
            torch.manual_seed(_mix(seed, epoch, i, dist.rank()))
            yield to_device(batch, state.device)
            progress.update(i + 1)

    with autocast(state.device, state.dtype), Progress("batch norm of the mean weights", loader, 0) as progress:
        state.swa.update_norms(batches(progress), compute_loss)
    with torch.inference_mode(), autocast(state.device, state.dtype):
        scores = evaluate(state.swa.module.eval()) if evaluate else {}
    return {k: float(v) for k, v in scores.items()}


class Progress:
    """A bar on rank 0: loss, lr, images/s, memory. Reads numbers from the GPU once a second."""

    def __init__(self, title, loader, done):
        size = loader.batch_sampler.batch_size
        self.size, self.shown = size, time.monotonic()
        self.bar = tqdm(total=len(loader) * size, initial=done * size, desc=title, unit="img", disable=dist.rank() > 0,
                        mininterval=0.5 if sys.stderr.isatty() else 30)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def update(self, batches):
        """-> whether it is time to show numbers."""
        self.bar.update(batches * self.size - self.bar.n)
        return time.monotonic() - self.shown > 1

    def show(self, *, loss, lr, device):
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else \
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self.bar.set_postfix_str(f"loss {float(loss):.4g}, lr {lr:.2g}, {peak / 2**30:.1f} GiB", refresh=False)
        self.shown = time.monotonic()


def _mix(*numbers):
    """One seed from several numbers; any difference in any of them gives unrelated random numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _out_of_patience(scores, patience):
    return bool(patience and scores) and len(scores) - 1 - scores.index(max(scores)) >= patience


def _record(folder, history, loggers):
    _write_results(folder, history)
    if dist.rank() == 0:
        loggers.log(history[-1], history[-1]["epoch"])
        print("  ".join(f"{k} {v:.4g}" for k, v in history[-1].items()), flush=True)


def _write_results(folder, history):
    if dist.rank() > 0 or not history:
        return
    try:
        charts.write_csv(folder / "results.csv", history)
        charts.plot_curves(folder / "results.png", history)
    except OSError as error:
        raise UserError(f"{folder}: cannot write the results ({error.strerror}); make room, then --resume") from None


def _stop_if(signum, state):
    """Ends a run that has just been saved, where a signal asked for it."""
    if signum:
        if dist.rank() == 0:
            print(f"stopped and saved at step {state.step}; go on with --resume", flush=True)
        raise Stopped(signum)
