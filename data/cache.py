"""What is kept of files until they change: facts about them, such as headers and digests, in the folder runs/cache;
decoded images in memory, or in one memory-mapped file that all processes share."""
import contextlib
import hashlib
import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from utils.errors import UserError
from utils.files import kept_values, locked, stamps_of, store_of, whole_file, write_json, writing
from utils.train import dist


FOLDER = "runs/cache"
LOOKED_AT = 100  # images, after which the size of all is estimated
BATCH = 32  # items that a thread takes at once; a thread's turn takes longer than reading a header
VERSION = 1  # of the facts: to be raised when a function finds something else in the same files
SIDECARS = (".msk", ".aux.xml")  # files PATH.msk and PATH.aux.xml, which say more about the image PATH


def in_threads(function, items, what=None):
    """[function(item) for item in items], in threads: reading, decoding and hashing release Python's lock. what: the
    name of a progress bar, which rank 0 shows."""
    step = max(1, min(BATCH, len(items) // 100))
    batches = [items[i:i + step] for i in range(0, len(items), step)]
    found, hidden = [], dist.rank() > 0 or not items or what is None
    with ThreadPoolExecutor(8) as pool, tqdm(total=len(items), desc=what, unit="img", leave=False, disable=hidden) as bar:
        for values in pool.map(lambda batch: list(map(function, batch)), batches):
            found += values
            bar.update(len(values))
        return found


def facts(question, function, items, *, variant=None, cache=FOLDER, bar=None):
    """[function(*item) for item in items], in threads; of an item whose files have not changed, what was found before.

    items: tuples of files (Path) and plain values. function: -> a plain value, as JSON has them; None is not kept.
    question, variant: what the value depends on beside the item. bar: the name of a progress bar. The facts about the
    files of a folder stand in one file in the folder `cache`, see `kept_values`; cache None: nothing is kept.
    """
    if not items:
        return []
    paths = [[part for part in item if isinstance(part, Path)] for item in items]
    files = [str(path) for row in paths for path in row]
    root = os.path.commonpath([os.path.realpath(end) for end in (min(files), max(files))])
    beside = set()
    for folder in set(map(os.path.dirname, files)):
        with contextlib.suppress(OSError):
            beside |= {os.path.join(folder, name) for name in os.listdir(folder or ".") if name.endswith(SIDECARS)}
    with kept_values(store_of(cache, question, root, (VERSION, variant))) as known:
        names = ["\n".join(map(str, item)) for item in items]
        stamps = [stamps_of(row + [more for path in row for end in SIDECARS if (more := f"{path}{end}") in beside])
                  for row in paths]
        new = [i for i, name in enumerate(names) if known.get(name, [None])[0] != stamps[i]]
        for i, value in zip(new, in_threads(lambda i: function(*items[i]), new, bar)):
            known[names[i]] = [stamps[i], value]
        found = [known[name][1] for name in names]
        for i in new:
            if found[i] is None:
                known.pop(names[i], None)
    return found


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
            for tensor in self._read_all():
                # cloned, because a view would keep the whole tensor that it is a part of
                self.tensors.append(tensor.clone(memory_format=torch.contiguous_format))
                if len(self.tensors) == LOOKED_AT:
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

    def _read_all(self):
        """Yields the tensors in the files' order; threads read them."""
        count, hidden = len(self.files), dist.rank() > 0
        with ThreadPoolExecutor(8) as pool, tqdm(total=count, desc="cache", disable=hidden, leave=False) as bar:
            for start in range(0, count, BATCH):
                for tensor in pool.map(self.read, range(start, min(start + BATCH, count))):
                    yield tensor
                    bar.update()

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
                for array in map(np.ascontiguousarray, self._read_all()):
                    index.append([file.tell(), array.shape, array.dtype.name])
                    file.write(array)
                size = file.tell()
            header.unlink(missing_ok=True)  # a header never describes another array
        write_json(header, {"stamp": self._stamp(), "index": index, "bytes": size}, indent=None)
        self._open()
