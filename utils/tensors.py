"""Files of tensors: our checkpoints, published weights, pickled modules, safetensors.

Nothing in a file is executed: `torch.load(weights_only=True)` builds tensors and plain containers, and a class or
function that a file names is at most replaced by an object that does nothing. No more is allocated than the file holds.
torch stores a CRC-32 for every record of its zip format and does not check it; `read` does. The other formats have no
checksums, see `sha256`.
"""
import contextlib
import hashlib
import json
import math
import mmap
import os
import pickletools
import re
import stat
import zipfile

import numpy as np
import torch
from torch import nn

from utils.files import unique

_SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
                "BOOL": torch.bool}
_DTYPES = set(_SAFETENSORS.values())
# what torch's own reader would call though no file of weights needs it: it allocates memory that the file does not hold,
# or makes tensors of kinds that no net here has
_REFUSED = re.compile(r"(builtins|__builtin__)\.bytearray|torch\.(\w+\.)*\w*Tensor|torch\.storage\.\w+|torch\._tensor\.\w+|"
                      r"torch\._utils\._rebuild_(?!tensor_v2|parameter)\w+")
LARGEST = 10**6  # values in a file
LONGEST_NAME = 100  # characters of a class name
DEEPEST = 100    # levels of lists and dicts, with the points in names of tensors
_PROGRAM, _SEAL = "/data.pkl", "/records"  # ends of the names of records
_SCRIPT = "/constants.pkl"  # a record of TorchScript
_FOLDER = 16     # flag of a record: torch would read none of its bytes
_PICKLES = 4  # in a file of torch before 1.6: three that describe it, and the content


def read(path, *, modules=False):
    """-> what a file holds: a dict of tensors, numbers, strings, lists and dicts.

    modules: whether a pickled module is read too, without its code. It may stand under "ema" (if that is not None),
    under "model", or alone; its state dict is returned: parameters and persistent buffers in their order, in the file's
    dtypes, and tensors that shared memory still share it; and with "names" its class names, if it has them.
    Raises OSError when there is no such file, and ValueError in one line when it is damaged or holds something else.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block
        raise OSError(f"{path}: not a file")
    with open(path, "rb") as file:
        try:
            start = file.read(9)
            file.seek(0)
            content = _read_safetensors(file) if start[8:] == b"{" else _read_torch(file, start[:2] == b"PK", modules)
            for name, tensor in walk(content):
                _check(name, tensor)
        except Exception as error:  # zipfile, pickletools and torch raise a dozen types on damaged files
            reason = " ".join(str(error.__context__ or error).split())[:200] or type(error).__name__
            raise ValueError(f"{path}: damaged, or not a file of tensors ({reason}); fetch it again, or save a state dict "
                             f"with torch.save(model.state_dict(), ...)") from None
    return content


def class_names(value):
    """Class names as files of others have them, a list or a dict -> {index: name}: those that are text, without control
    characters and not too long."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
    return {k: "".join(filter(str.isprintable, name[:LONGEST_NAME])) for k, name in pairs if isinstance(name, str)}


def walk(value, name="state"):
    """Pairs (name, tensor) of all tensors in nested dicts and lists. Raises ValueError for more than LARGEST values, or
    DEEPEST levels: in a small file, a list can hold ten times the same list of ten times the same list."""
    todo, count = [(name, value)], 0
    while todo:
        name, value = todo.pop()
        count += 1
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, (dict, list, tuple)):
            if count + len(todo) + len(value) > LARGEST or name.count(".") > DEEPEST:
                raise ValueError(f"it holds more than {LARGEST} values, or more than {DEEPEST} lists in each other")
            pairs = list(value.items() if isinstance(value, dict) else enumerate(value))
            todo += [(f"{name}.{key}", child) for key, child in reversed(pairs)]


def sha256(path):
    """The SHA-256 of a file whose format has no checksums; None for torch's zip format."""
    with open(path, "rb") as file:
        start = file.read(2)
        return None if start == b"PK" else hashlib.sha256(start + file.read()).hexdigest()


def fits(tensor, target):
    """Whether the numbers of `tensor` can take the place of those of `target`: of the same kind, and finite there."""
    return tensor.is_floating_point() == target.is_floating_point() and bool(tensor.to(target.dtype).isfinite().all())


def seal(path):
    """Adds a record to a zip archive that tells which records it has, and their CRC-32."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"archive{_SEAL}", _described(archive))


def check_records(path):
    """Every record of a zip archive against its CRC-32, and all against the one of `seal`, if there is one. None is
    compressed, none lies within another, and no name stands twice: torch's files are never so, and a small file could
    become a large one. Raises ValueError."""
    with zipfile.ZipFile(path) as archive:
        entries, names = archive.infolist(), archive.namelist()
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.external_attr & _FOLDER for entry in entries) or \
                sum(entry.file_size for entry in entries) > os.path.getsize(path) or len(set(names)) < len(names) or \
                archive.testzip() or not any(name.endswith(_PROGRAM) for name in names) or \
                any(archive.read(name) != _described(archive) for name in names if name.endswith(_SEAL)):
            raise ValueError("a record is compressed, hidden in another, exchanged, or does not have its CRC-32")


def _described(archive):
    return repr(sorted((entry.filename, entry.file_size, entry.CRC) for entry in archive.infolist()
                       if not entry.filename.endswith(_SEAL))).encode()


def _check(name, tensor):
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu" or \
            tensor.dtype not in _DTYPES:
        raise ValueError(f"tensor {name} is of a kind that no net here has: {tensor.dtype}, {tensor.layout}")
    # a 1 KB file can pretend to be a tensor of 1e9 numbers by repeating one
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise ValueError(f"tensor {name} is larger than its data")


class _Inert(nn.Module):
    """Replaces every class and function that a pickle names, so that none of them is imported or called: accepts all
    arguments and keeps only what a state dict is made of, and class names as texts."""

    names = None

    def __init__(self, *args):
        super().__init__()

    def __setstate__(self, state):
        super().__init__()  # a pickle makes modules without __init__
        if isinstance(state, dict):
            parts = "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"
            self.__dict__.update({name: state[name] for name in parts if name in state})
            self.names = class_names(state.get("names"))


def _read_torch(file, zipped, modules):
    """A file of torch.save: since torch 1.6 a zip archive, before a sequence of pickles."""
    foreign = []
    if zipped:
        if not zipfile.is_zipfile(file):
            raise ValueError("its end is missing, as of a download that was cut off")
        if any(name.endswith(_SCRIPT) for name in zipfile.ZipFile(file).namelist()):
            raise ValueError("it is TorchScript, a program: give the checkpoint that it was exported from")
        check_records(file.name)
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(file.name) if modules else []
    for name in _names(file, zipped):
        if _REFUSED.fullmatch(name):
            raise ValueError(f"it calls {name}, which no file of weights needs")
    file.seek(0)
    with torch.serialization.safe_globals([(_Inert, name) for name in foreign]):
        content = torch.load(file, map_location="cpu", weights_only=True)
    found = content
    if isinstance(content, dict):
        found = content.get("model") if content.get("ema") is None else content["ema"]
    if isinstance(found, _Inert):
        content = dict(found.state_dict()) | ({"names": found.names} if found.names else {}) or found
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, and neither tensors nor a module")
    return content


def _names(file, zipped):
    """The classes and functions that a file of torch.save names."""
    with contextlib.ExitStack() as stack:
        if zipped:
            archive = stack.enter_context(zipfile.ZipFile(file))
            record = next(name for name in archive.namelist() if name.endswith(_PROGRAM))
            file = stack.enter_context(archive.open(record))
        else:  # reading more bytes than a file has would take as much memory
            file = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        for _ in range(1 if zipped else _PICKLES):
            for operation, value, _ in pickletools.genops(file):
                if operation.name == "GLOBAL":  # torch's reader knows no other operation that names something
                    yield value.replace(" ", ".")


def _read_safetensors(file):
    """The state dict of a file in the safetensors format: 8 bytes with the header's length, a JSON header, the tensors'
    bytes."""
    data = np.frombuffer(file.read(), np.uint8)
    start = 8 + int.from_bytes(bytes(data[:8]), "little")
    if start > len(data):
        raise ValueError("its header is cut off")
    header, state, end = json.loads(bytes(data[8:start]), object_pairs_hook=unique), {}, start
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (first, last) = _SAFETENSORS[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if len(range(first, last)) != math.prod(shape) * dtype.itemsize or start + first != end:  # one behind the other
            raise ValueError(f"{name} has the shape {shape} and the bytes {first} to {last}")
        end = start + last
        state[name] = torch.from_numpy(data[start + first:end].copy()).view(dtype).reshape(shape) if last > first else \
            torch.empty(shape, dtype=dtype)
    if end != len(data):
        raise ValueError(f"{len(data)} bytes in place of {end}")
    return {name: state[name] for name in header}
