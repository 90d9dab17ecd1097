"""Several processes, started by torchrun; with one process all of this does nothing."""
import contextlib
import ctypes
import os
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_gather

from utils.errors import UserError

PATIENCE = timedelta(hours=1)  # for the other ranks, which may read all images or fill a cache meanwhile


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def print0(*values):
    """print, on rank 0 only."""
    if rank() == 0:
        print(*values, flush=True)


def keep_memory():
    """Lets this process keep the large blocks that it frees. glibc returns those above 32 MB to the system at once, and
    every new one then costs a page fault per 4 KB: 7 to 20 % of a training step on the CPU (YOLOv5 s, 640 px, batch 4;
    the wildfire UNet, 256 px, batch 16), for a fifth more memory at its peak. Loader workers inherit it. Other C
    libraries do without."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30) or mallopt(-4, 0)  # M_MMAP_THRESHOLD; before glibc 2.35, which refuses: M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def setup(device="auto", patience=None):
    """Picks this process's device and joins the group. `device`: "auto", "cpu", "cuda", "cuda:1", "mps". patience: how
    long others are waited for, None: PATIENCE; one that has died is noticed at once.

    Raises UserError for a device that is not there.
    """
    keep_memory()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
        if device.type not in ("cpu", "cuda", "mps"):  # torch knows some that cannot train
            raise RuntimeError
        if device.type == "cuda" and device.index is None and torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {device}: not on this machine ({torch.cuda.device_count()} CUDA devices); "
                        f"use --device cpu, or fewer processes per node") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size() > 1:
        # small decisions (stop? save?) travel between CPUs, so that they never wait for the GPU's queue
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=_new_store(), rank=rank(), world_size=world_size(),
                                timeout=patience or PATIENCE)
        if device.type == "cpu":  # torchrun sets one thread per process; share the cores instead
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    return device


def _new_store():
    """A place to meet, with nothing in it.

    torchrun's store outlives the processes that it restarts. What the old ones left there would mislead the new ones
    (gloo connects to addresses that are gone, and waits), so rank 0 opens a new section of it. It tells the others,
    each of which asks under a name of its own: an answer to that cannot be an old one.
    """
    store = next(dist.rendezvous("env://", timeout=PATIENCE))[0]
    name = uuid.uuid4().hex
    if rank() > 0:
        store.set(f"ask {rank()}", name)
        section = store.get(f"answer {name}").decode()
        store.set(f"{section} {rank()}", "here")
        return dist.PrefixStore(section, store)
    for other in range(1, world_size()):
        while not store.check([f"{name} {other}"]):
            store.set(f"answer {store.get(f'ask {other}').decode()}", name)  # which is perhaps an old one's question
            time.sleep(0.02)
    return dist.PrefixStore(name, store)


def broadcast(value):
    """Rank 0's value (numbers, strings, lists, dicts) on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gather(value):
    """[every rank's value], on every rank."""
    if world_size() == 1:
        return [value]
    box = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


def any_rank(number):
    """The largest of the ranks' integers: one rank's wish to stop becomes everybody's."""
    if world_size() == 1:
        return number
    box = torch.tensor(number)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box)


def mean(tensor):
    """Mean over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= world_size()
    return tensor


def same_weights(module):
    """Rank 0's parameters and buffers on every rank, such as batch norm's running statistics: all evaluate one net."""
    if world_size() > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)


def barrier():
    if world_size() > 1:
        dist.barrier()


class CPUSyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all ranks, which are equally large. torch's own (nn.SyncBatchNorm) runs on GPUs
    only; on CPUs every rank normalises the whole batch and takes its own part of it."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        return super().forward(torch.cat(all_gather(x))).chunk(world_size())[rank()]


def sync_batch_norm(model, device):
    """Makes every batch norm see the global batch instead of one rank's share. Returns the model."""
    if world_size() == 1 or device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model) if world_size() > 1 else model
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = CPUSyncBatchNorm  # it adds no attribute
    return model
