"""Decoded images kept in memory, or in one memory-mapped file that all processes share."""
import contextlib
import hashlib
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from utils.errors import UserError
from utils.files import locked, stamps_of, whole_file, write_json, writing
from utils.train import dist


LOOKED_AT = 100  # images, after which the size of all is estimated


def free_memory():
    """Bytes that processes can still get, in a container those up to its limit; infinity where the system does not say.
    """
    found, group = [math.inf], Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, TypeError):
        found.append(1024 * int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1]))
    with contextlib.suppress(OSError, TypeError, ValueError):  # without a limit it is "max"; what is of files can go
        of_files = int(re.search(r"^file (\d+)", (group / "memory.stat").read_text(), re.M)[1])
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()) + of_files)
    return min(found)


class Cache:
    """`cache[i]` -> the tensor that `read(i)` gave for files[i], without reading the file again. The tensor is the
    cache's own memory: read-only.

    where: "ram": every training process keeps the tensors, and loader workers share them by fork. "disk": the tensors
    are one file in `folder`, which is built once, and built again when the size or time of a file has changed, or
    `variant`, which stands for all that `read` depends on. None: nothing is kept.
    Shapes and dtypes may differ from file to file. Raises UserError when the cache cannot be written.
    """

    def __init__(self, files, read, where, *, folder="runs/cache", variant=""):
        self.files, self.read, self.where, self.variant = files, read, where, str(variant)
        if where == "ram":
            self.tensors = []
            for i in self._indices():
                # cloned, because a view would keep the whole tensor that it is a part of
                self.tensors.append(self.read(i).clone(memory_format=torch.contiguous_format))
                if i == LOOKED_AT:
                    self._check_room()
        elif where == "disk":
            name = hashlib.sha256("\n".join(str(Path(f).resolve()) for f in files).encode()).hexdigest()[:16]
            self.path = Path(folder) / name
            with writing(folder, "make room, or leave --cache disk out"):
                os.makedirs(folder, exist_ok=True)
                # one process builds; the others, of other runs too, find the file built
                with locked(self.path.with_suffix(".lock")):
                    self._open() or self._build()

    def __getitem__(self, i):
        if self.where == "ram":
            return self.tensors[i]
        if self.where == "disk":
            start, shape, dtype = self.index[i]
            return torch.from_numpy(np.ndarray(shape, dtype, self.array, start))
        return self.read(i)

    def _indices(self):
        return tqdm(range(len(self.files)), desc="cache", disable=dist.rank() > 0, leave=False)

    def _check_room(self):
        """UserError where the memory will not do: the system would end some process, without a word."""
        size = sum(tensor.nbytes for tensor in self.tensors) / len(self.tensors) * len(self.files)
        if size * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > free_memory():
            raise UserError(f"--cache ram: {len(self.files)} images need about {size / 1e9:.3g} GB in each process, "
                            f"and so much memory is not free; use --cache disk")

    def _stamp(self):
        return [self.variant, *stamps_of(self.files)]

    def _open(self):
        try:
            header = json.loads(self.path.with_suffix(".json").read_text())
            self.array = np.memmap(self.path.with_suffix(".bin"), np.uint8, "c")  # torch wants writable memory
            self.index = header["index"]
            return header["stamp"] == self._stamp() and header["bytes"] == len(self.array)
        except (OSError, ValueError, TypeError, KeyError, RecursionError):  # not built yet, or damaged
            return False

    def _build(self):
        index, header = [], self.path.with_suffix(".json")
        with whole_file(self.path.with_suffix(".bin")) as temporary:
            with open(temporary, "wb") as file:
                for i in self._indices():
                    array = np.ascontiguousarray(self.read(i))
                    index.append([file.tell(), array.shape, array.dtype.name])
                    file.write(array)
                size = file.tell()
            header.unlink(missing_ok=True)  # a header never describes another array
        write_json(header, {"stamp": self._stamp(), "index": index, "bytes": size}, indent=None)
        self._open()
