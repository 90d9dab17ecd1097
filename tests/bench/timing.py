"""What the speed benchmarks share: a clock, runs in turn, a training step in three parts."""
import contextlib
import ctypes
import time

import torch

from nets.blocks import fuse
from utils.train import dist, engine
from utils.train.state import precision


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def with_plain_memory(run):
    """The function without `dist.keep_memory`: with the limits that glibc's malloc comes to by itself where large
    blocks are freed."""
    def plain():
        with contextlib.suppress(OSError, AttributeError, TypeError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
            mallopt(-1, 2**26)  # M_TRIM_THRESHOLD
        try:
            return run()
        finally:
            dist.keep_memory()
    return plain


def in_turn(runs, rounds):
    """{name: function} -> {name: what each round gave}; the first two rounds choose kernels and do not count."""
    given = {name: [] for name in runs}
    for i in range(rounds + 2):
        for name, run in runs.items():
            taken = run()
            given[name] += [taken] if i > 1 else []
    return given


def prepared(net, device, compile=False, amp="auto"):
    """A net as predict.py runs it: batch norms folded, in half precision where the hardware has it, channels-last."""
    net = fuse(net).to(device, precision(amp, device) or torch.float32, memory_format=torch.channels_last)
    if compile:
        torch._inductor.config.freezing = device.type == "cpu"
        net.compile()
    return net


def training_step(loss, model, optimizer, device, *, dtype=None, ema=None):
    """-> a function that does one step and returns the seconds of (forward and loss, backward, optimizer). loss: a
    function without arguments. ema: if given, the gradients' norm is taken too, as in utils/train/engine.py."""
    def step():
        times = [clock(device)]
        with engine.autocast(device, dtype):
            value = loss()
        times.append(clock(device))
        value.backward()
        times.append(clock(device))
        if ema:
            torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        if ema:
            ema.update_parameters(model)
        times.append(clock(device))
        return [b - a for a, b in zip(times, times[1:])]
    return step


def show(kind, steps, bs, base):
    """Prints the fastest round of each training step; `base`: the name of the one that the ratios are of. -> {name:
    its seconds}"""
    best = {name: min(taken, key=sum) for name, taken in steps.items()}
    for name, (forward, backward, update) in best.items():
        total = forward + backward + update
        print(f"{kind} {name}: {bs / total:.2f} img/s, ratio {sum(best[base]) / total:.2f} (forward and loss "
              f"{forward:.3f} s, backward {backward:.3f} s, optimizer {update:.3f} s)", flush=True)
    return {name: sum(taken) for name, taken in best.items()}


def loading_round(data, collate, inputs, keys, bs):
    """Batches of data[0, key] -> seconds of the processor per image: in all, up to the workers' batch, from there to
    the net's input."""
    load = convert = 0
    for start in range(0, len(keys), bs):
        began = time.process_time()
        batch = collate([data[0, key] for key in keys[start:start + bs]])
        loaded = time.process_time()
        inputs(batch)
        load, convert = load + loaded - began, convert + time.process_time() - loaded
    return (load + convert) / len(keys), load / len(keys), convert / len(keys)
