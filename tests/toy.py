"""A whole training script on toy data, with faults to order: what the tests of the loop run, kill and resume.

    python -m tests.toy --epochs 3 --project /tmp/toy
    torchrun --nproc_per_node 2 -m tests.toy --project /tmp/toy --fault kill@batch:5 --fault-rank 1

A fault is ACTION@EVENT:N, done at the N-th time that a process comes to the event. Events: start, batch, sample (in
the loader's process), eval (a batch of the validation), write (a piece of a checkpoint), fsync, replace (a rename),
fsynced and replaced (after them), end. Actions: kill, term, int, stop (SIGSTOP), hang, nan, inf, error, crash, full
(a disk), memory.
"""
import collections
import errno
import os
import signal
import sys
import time

import numpy as np
import torch
from torch import nn

from data.loader import eval_loader, train_loader
from utils.train import checkpoint, dist, engine
from utils.train.args import setup_run, train_parser, training
from utils.errors import UserError, cli

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT, "stop": signal.SIGSTOP}


def parse_args():
    parser = train_parser("Toy.", "toy", epochs=3, bs=4, imgsz=16, lr=0.02, workers=0, amp="off", save_period=0,
                          schedule="cosine", warmup_epochs=0.5)
    add = parser.add_argument_group("toy").add_argument
    add("--size", type=int, default=26, help="training samples")
    add("--val", type=int, default=10, help="samples to validate on; 0: none")
    add("--norm", choices=("batch", "none"), default="batch")
    add("--dropout", type=float, default=0.3)
    add("--every-step", action="store_true", help="save after every optimizer step")
    add("--fault", nargs="*", default=[], metavar="ACTION@EVENT:N")
    add("--fault-rank", type=int, default=0, help="the rank that has the faults; only before torchrun's first restart")
    add("--slow", nargs="*", default=[], metavar="EVENT=SECONDS", help="wait so long at every such event")
    args, *run = setup_run(parser)
    for name in ("fault", "fault_rank", "slow", "every_step"):  # these are not kept by --resume
        setattr(args, name, getattr(parser.parse_args(), name))
    return args, *run


class Faults:
    """Called with an event's name wherever one happens; acts at the ordered times."""

    def __init__(self, faults=(), slow=()):
        self.counts = collections.Counter()
        self.acts = {}
        for fault in faults:
            action, _, when = fault.partition("@")
            event, _, n = when.partition(":")
            self.acts[event, int(n or 1)] = action
        self.waits = {event: float(seconds) for event, _, seconds in (s.partition("=") for s in slow)}

    def __call__(self, event):
        self.counts[event] += 1
        time.sleep(self.waits.get(event, 0))
        action = self.acts.get((event, self.counts[event]))
        if action in SIGNALS:
            os.kill(os.getpid(), SIGNALS[action])
        elif action == "hang":
            time.sleep(3600)
        elif action == "error":
            raise UserError(f"toy {event}: an error to order; order another")
        elif action == "crash":
            raise ZeroDivisionError("a crash to order")
        elif action == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        elif action == "memory":
            torch.empty(1 << 60)
        return action

    def around(self, function, before, after):
        def wrapped(*args, **kwargs):
            self(before)
            result = function(*args, **kwargs)
            self(after)
            return result
        return wrapped


class Noisy:
    """A file that tells `faults` about each of its writes."""

    def __init__(self, file, faults):
        self.file, self.faults = file, faults

    def write(self, data):
        self.faults("write")
        return self.file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


class Data:
    """Blurred random pictures and a number to predict from them; in training with noise from (seed, epoch, index)."""

    def __init__(self, size, seed=0, faults=Faults()):
        self.size, self.seed, self.faults = size, seed, faults

    def __len__(self):
        return self.size

    def __getitem__(self, key):
        self.faults("sample")
        epoch, index = key if isinstance(key, tuple) else (None, key)
        image = np.random.default_rng((7, index % self.size)).standard_normal((3, 8, 8), np.float32)
        target = np.tanh(image[0].mean() * 4 + image[1, :4].mean())
        if epoch is not None:
            image += 0.3 * np.random.default_rng((self.seed, epoch, index)).standard_normal((3, 8, 8), np.float32)
        return {"image": torch.from_numpy(image), "target": torch.tensor(target), "index": index}


class Net(nn.Module):
    def __init__(self, norm="batch", dropout=0.3, width=8):
        super().__init__()
        bias = norm == "none"
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=bias)
        self.norm1 = nn.BatchNorm2d(width) if norm == "batch" else nn.Identity()
        self.conv2 = nn.Conv2d(width, width, 3, stride=2, padding=1, bias=bias)
        self.norm2 = nn.BatchNorm2d(width) if norm == "batch" else nn.Identity()
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(width, 1)

    def forward(self, x):
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu().mean((2, 3))
        return self.head(self.dropout(x))[:, 0]


def make_loss(faults=Faults()):
    def compute_loss(model, batch):
        action = faults("batch")
        error = model(batch["image"]).float() - batch["target"]
        loss = error.square().mean() * {"nan": float("nan"), "inf": float("inf")}.get(action, 1.0)
        return loss, {"mae": error.abs().mean()}
    return compute_loss


def make_evaluate(loader, device, faults=Faults()):
    def evaluate(model):
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in loader:
            faults("eval")
            batch = engine.to_device(batch, device)
            error = model(batch["image"]).double() - batch["target"]
            sums += torch.tensor([error.square().sum(), len(error)])
        mean = dist.mean(sums) * dist.world_size()
        return {"score": 1 - mean[0] / mean[1], "count": mean[1]}
    return evaluate


def main():
    args, device, folder, resume = parse_args()
    mine = args.fault_rank == dist.rank() and not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    faults = Faults(args.fault if mine else (), args.slow)
    os.fsync = faults.around(os.fsync, "fsync", "fsynced")
    os.replace = faults.around(os.replace, "replace", "replaced")
    checkpoint.open = lambda *a: Noisy(open(*a), faults)
    if args.every_step:
        engine.SAVE_MINUTES = 0
    print("started", flush=True)
    faults("start")

    engine.seed_everything(args.seed, args.deterministic)
    data = Data(args.size, args.seed, faults)
    loader = train_loader(data, args.bs, workers=args.workers, seed=args.seed, device=device)
    model = Net(args.norm, args.dropout).to(device)
    if args.sync_bn:
        model = dist.sync_batch_norm(model, device)
    val = eval_loader(Data(args.val, faults=faults), max(1, args.bs // dist.world_size()), workers=args.workers)
    state, options = training(args, folder, model, loader, device)
    header = {"task": "toy", "arch": {"name": "Net", "kwargs": {}}, "args": vars(args)}
    engine.fit(state, loader, make_loss(faults), make_evaluate(val, device, faults) if args.val else None,
               folder=folder, header=header, resume=resume, **options)
    faults("end")


if __name__ == "__main__":
    cli(main)
    sys.exit(0)
