"""The state of a run, and its optimizer steps."""
import contextlib
import math

import torch
from torch.nn.parallel import DistributedDataParallel

from utils import tensors
from utils.errors import NumericalError, UserError
from utils.files import show
from utils.train import checkpoint, dist
from utils.train.optim import parameters, set_lr


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
        # optimizer steps done, and in an epoch; the steps and epochs that last.pt holds: `fit` sets the last two
        self.step, self.steps_per_epoch, self.saved = 0, 0, (0, 0)
        self.history, self.sums = [], {}  # a row per finished epoch; sums of the running epoch's losses
        self.score, self.threshold = None, None  # the name of the score, and the threshold of the last evaluation
        self.finite = torch.ones((), dtype=torch.bool, device=device)

    @property
    def eval_model(self):
        """The model that is evaluated: the EMA weights if the run has them, else the trained ones."""
        return self.ema.module if self.ema else self.model

    @property
    def epoch(self):
        """The number of finished epochs."""
        return len(self.history)

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
        norm = torch.nn.utils.clip_grad_norm_(parameters(self.optimizer), self.clip or math.inf,
                                              foreach=self.device.type != "mps")
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
        self.finite &= torch.stack([tensor.isfinite().all().to(self.device) for _, tensor in tensors.walk(saved)]).all()
        self.check()
        return saved

    def load_state_dict(self, saved):
        """Goes on from a `state_dict()`. Raises UserError for another net, optimizer or number of steps per epoch."""
        if lost := {"scaler", "step", "steps_per_epoch", "history", "sums"} - saved.keys():
            raise UserError(f"--resume: the checkpoint has no {', '.join(sorted(lost))}; use another one")
        epochs = [row.get("epoch") for row in saved["history"]]
        if not 0 <= saved["step"] - len(epochs) * saved["steps_per_epoch"] <= saved["steps_per_epoch"] or \
                epochs != [*range(1, len(epochs) + 1)]:
            raise UserError(f"--resume: step {saved['step']} does not belong to a history of the epochs {show(epochs)}; "
                            f"use another checkpoint")
        if saved["steps_per_epoch"] != self.steps_per_epoch:
            raise UserError(f"--resume: the run had {saved['steps_per_epoch']} steps per epoch, this data and these "
                            f"flags make {self.steps_per_epoch}; resume with its data, --bs and --accumulate, or start "
                            f"a new run with --weights")
        if saved["optimizer"].get("name") != type(self.optimizer).__name__:
            raise UserError(f"--resume: the run had the optimizer {saved['optimizer'].get('name')}; keep --optimizer, or "
                            f"start a new run with --weights")
        checkpoint.load_strict(self.model, saved["model"], "--resume")
        for name, average, count in self._averages():
            if average:  # if the run had no such average, it begins with the run's weights
                checkpoint.load_strict(average.module, saved.get(name) or saved["model"], "--resume")
                average.n_averaged.fill_(saved.get(count, 0))
        ours = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(saved["optimizer"])
            for p, moments in self.optimizer.state.items():
                if any(tensor.ndim and tensor.shape != p.shape for _, tensor in tensors.walk(moments)):
                    raise ValueError("a moment has another shape than its weight")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--resume: the state of the optimizer is damaged ({error}); use another checkpoint") from None
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
            then = "--resume goes on from last.pt" if any(self.saved) else "start again"
            raise NumericalError(f"loss or gradients are no longer finite (noticed at step {self.step}); lower --lr, "
                                 f"try --clip 1 or --amp off, then {then}")
