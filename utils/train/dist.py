"""Several processes, started by torchrun, and the signals that stop them. With a single process, functions that exchange
something do nothing."""
import ctypes
import os
import signal
import time
import uuid
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_gather

from utils import watchdog
from utils.errors import Stopped, UserError

MEETING = timedelta(hours=1)  # for the ranks to find each other


def rank():
    return int(os.environ.get("RANK", 0))


def is_main():
    """Whether this is the process that prints and writes for all, rank 0."""
    return rank() == 0


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def print0(*values):
    """print, on rank 0 only."""
    if is_main():
        print(*values, flush=True)


def keep_memory():
    """Makes the process keep the large memory blocks that it frees, and so its loader workers.

    glibc returns freed blocks above 32 MB to the system at once; each new one then costs a page fault per 4 KB, which
    is 7 to 20 % of a training step on the CPU (YOLOv5 s, 640 px, batch 4; the wildfire UNet, 256 px, batch 16). The
    peak of memory rises by a fifth. With other C libraries this function does nothing.
    """
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30) or mallopt(-4, 0)  # M_MMAP_THRESHOLD; glibc before 2.35 refuses so much: M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def setup(device="auto", timeout=60):
    """Chooses this process's device and joins the process group. -> torch.device

    device: "auto", "cpu", "cuda", "cuda:1", "mps". timeout: see utils/watchdog.py; a rank that has died is an
    error at once. Raises UserError for a device that does not exist.
    """
    keep_memory()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
        if device.type not in ("cpu", "cuda", "mps"):  # such as "meta", which computes nothing
            raise RuntimeError
        if device.type == "cuda" and device.index is None and torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {device}: not on this machine ({torch.cuda.device_count()} CUDA devices); "
                        f"use --device cpu, or fewer processes per node") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = None
    if world_size() > 1:
        # small messages (stop? save?) are sent from CPU to CPU, so that they do not wait for the GPU's queue
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = _new_store()
        dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size(),
                                timeout=timedelta(days=7))  # a rank may be filling a cache, or have the one large scene
        if device.type == "cpu":  # torchrun sets one thread per process; share the cores instead
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    watchdog.start(timeout, store, rank(), world_size())
    return device


def _new_store():
    """An empty store for the process group.

    torchrun's store outlives the processes that it restarts, and what they left there would mislead the new ones: gloo
    would connect to addresses that no longer exist, and wait. So rank 0 opens a new section of the store and tells the
    others its name. Each rank asks with a unique key, so that a stale reply cannot be read.
    """
    store = next(dist.rendezvous("env://", timeout=MEETING))[0]
    name = uuid.uuid4().hex
    if rank() > 0:
        store.set(f"ask {rank()}", name)
        section = store.get(f"answer {name}").decode()
        store.set(f"{section} {rank()}", "here")
        return dist.PrefixStore(section, store)
    for other in range(1, world_size()):
        while not store.check([f"{name} {other}"]):
            store.set(f"answer {store.get(f'ask {other}').decode()}", name)  # the question may be stale
            time.sleep(0.02)
    return dist.PrefixStore(name, store)


def broadcast(value):
    """Returns rank 0's value (numbers, strings, lists, dicts) on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gather(value):
    """Returns the list of all ranks' values on every rank."""
    if world_size() == 1:
        return [value]
    box = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


def gather_dicts(values):
    """Returns one dict of all ranks' entries on every rank."""
    return {key: value for share in gather(values) for key, value in share.items()}


def any_rank(number):
    """Returns the largest of the ranks' integers, so that all stop when one of them has to."""
    if world_size() == 1:
        return number
    box = torch.tensor(number)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box)


def mean(tensor):
    """Averages a tensor over the ranks, in place, and returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= world_size()
    return tensor


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
        number = any_rank(self.signum or number)
        if number > 1:
            raise Stopped(number)
        return number

    @contextmanager
    def interruptible(self):
        """Inside, a signal raises Stopped at once: for validation, which changes nothing. With several processes, all
        of them finish the validation instead, because one that stopped would leave the others waiting."""
        self.raises = world_size() == 1
        try:
            if self.raises and self.signum:
                raise Stopped(self.signum)
            yield
        finally:
            self.raises = False


def same_weights(module):
    """Copies rank 0's parameters and buffers, such as the running statistics of batch norm, to every rank."""
    if world_size() > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)


def barrier():
    if world_size() > 1:
        dist.barrier()


class CPUSyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all ranks, which have equal sizes. torch's nn.SyncBatchNorm runs on GPUs only; on
    CPUs every rank normalises the whole batch and keeps its own part."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        return super().forward(torch.cat(all_gather(x)))[rank() * len(x):][:len(x)]  # may be changed in place


def sync_batch_norm(model, device):
    """Makes every batch norm use the batches of all ranks. Returns the model."""
    if world_size() == 1 or device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model) if world_size() > 1 else model
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = CPUSyncBatchNorm  # a subclass without attributes of its own
    return model
