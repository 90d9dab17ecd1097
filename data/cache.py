"""Decoded images kept: in memory, or in one memory-mapped file that all processes share."""
import fcntl
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from utils.train import dist
from utils.errors import UserError


class Cache:
    """`cache[i]` -> the tensor that `read(i)` gave, from files[i], without reading the file again. It is the
    cache's own memory: not to be changed.

    where: "ram" (per training process; loader workers share it by fork) or "disk": one array in `folder`, built once,
    and built again when a file's size or time, or `variant` (what `read` depends on), changed; None: nothing is kept.
    Shapes and dtypes may differ from file to file.
    """

    def __init__(self, files, read, where, *, folder="runs/cache", variant=""):
        self.files, self.read, self.where, self.variant, self.tensors = files, read, where, str(variant), []
        if where is None:
            return
        if where == "ram":
            self.tensors = [tensor.clone() for tensor in self._tensors()]  # not the rest of a view's memory
            return
        name = hashlib.sha256("\n".join(str(Path(f).resolve()) for f in files).encode()).hexdigest()[:16]
        self.path = Path(folder) / name
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path.with_suffix(".lock"), "w") as lock:
                fcntl.lockf(lock, fcntl.LOCK_EX)  # one process builds; others, also of other runs, then find it built
                self._open() or self._build()
        except OSError as error:
            raise UserError(f"{self.path.parent}: cannot write the cache ({error.strerror}); make room, or leave "
                            f"--cache disk out") from None

    def __getitem__(self, i):
        if self.where is None:
            return self.read(i)
        if self.tensors:
            return self.tensors[i]
        start, shape, dtype = self.index[i]
        dtype = getattr(torch, dtype)
        stop = start + int(np.prod(shape)) * dtype.itemsize
        return torch.from_numpy(self.array[start:stop]).view(dtype).reshape(shape)

    def _tensors(self):
        self.index, start = [], 0
        for i in tqdm(range(len(self.files)), desc="cache", disable=dist.rank() > 0, leave=False):
            tensor = self.read(i).contiguous()
            self.index.append((start, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")))
            start += tensor.numel() * tensor.element_size()
            yield tensor

    def _stamp(self):
        stats = [os.stat(file) for file in self.files]
        return [self.variant] + [[s.st_size, s.st_mtime_ns] for s in stats]

    def _open(self):
        try:
            header = json.loads(self.path.with_suffix(".json").read_text())
            self.array = np.memmap(self.path.with_suffix(".bin"), np.uint8, "c")  # torch wants to write
            self.index = header["index"]
            return header["stamp"] == self._stamp() and header["bytes"] == len(self.array)
        except (OSError, ValueError, TypeError, KeyError, RecursionError):  # none yet, or damaged
            return False

    def _build(self):
        temporary = self.path.with_suffix(".tmp")
        try:
            with open(temporary, "wb") as file:
                for tensor in self._tensors():
                    file.write(tensor.reshape(-1).view(torch.uint8).numpy())
            header = {"stamp": self._stamp(), "index": self.index, "bytes": temporary.stat().st_size}
            self.path.with_suffix(".json").unlink(missing_ok=True)  # never a header beside another array
            os.replace(temporary, self.path.with_suffix(".bin"))
            self.path.with_suffix(".json").write_text(json.dumps(header))
        finally:
            temporary.unlink(missing_ok=True)
        self._open()
