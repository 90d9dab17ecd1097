"""The tensors of a file in which a whole module was pickled, such as YOLOv5's releases, without running any of it.

    state = unpickle.read_module("yolov5s.pt")        {"model.0.conv.weight": tensor, ...}

A pickle is a program: `pickle.load` imports and calls what the file names. Here it is only parsed. Opcodes that would
import or call something leave an inert note of what was asked, so that there is no list of harmless functions
to get wrong; the modules' tensors are then built from those notes, with every number in them checked.
"""
import math
import os
import pickletools
import zipfile

import torch

_DTYPES = {
    "torch DoubleStorage": torch.float64, "torch FloatStorage": torch.float32, "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16, "torch LongStorage": torch.int64, "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16, "torch CharStorage": torch.int8, "torch ByteStorage": torch.uint8,
}
_PARAMETERS = "torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_with_state"
# Far above any net's, and low enough that a small file cannot ask for hours or for all the memory.
_PICKLE_BYTES = 2 << 20
_ENTRIES = 20_000   # modules and tensors, counted once for each of their names
_NAME = 200         # characters; a module inside itself has names without end


def read_module(path):
    """The module under "ema" (where that is not None) or "model", or the file's only content -> its state dict.

    {name: tensor} in the order of `Module.state_dict()`: parameters and persistent buffers, in the file's dtypes (fp16
    in the releases), on the CPU whatever they were saved on; tensors that shared memory still do.
    Every record that is read is checked against its CRC-32. Raises OSError when there is no such file, and ValueError
    in one line for everything else: damaged, hostile, the format before torch 1.6, not a module.
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                folder = _open(archive, os.path.getsize(path))
                root, storages = _root(parse(archive.read(f"{folder}data.pkl"))), {}
                return {name: _tensor(note, name, archive, folder, storages) for name, note in _named_tensors(root)}
        except MemoryError:
            raise
        except Exception as error:  # zipfile and pickletools raise a dozen types
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"{path}: holds neither plain tensors nor a module in torch's zip format ({reason}); "
                             f"fetch it again, or save a state dict with torch.save(model.state_dict(), ...)") from None


def _open(archive, size):
    """Looks at the list of records. Returns the folder that they lie in, "archive/" or such."""
    entries = archive.infolist()
    # compressed records, or several over the same bytes, could unfold to any size
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or sum(e.file_size for e in entries) > size:
        raise ValueError("its records are compressed or overlap")
    pickles = [e for e in entries if e.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].file_size > _PICKLE_BYTES:
        raise ValueError("it has no pickle of usual length")
    folder = pickles[0].filename.removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
        raise ValueError("it was written on a big-endian machine")
    return folder


class Inert:
    """What stands for a global of the file, or for the result of calling one: `name` ("module name"), the arguments,
    and the state that the object would have been given."""
    __slots__ = "name", "args", "state"

    def __init__(self, name, arguments=()):
        self.name, self.args, self.state = name, arguments, None


def parse(data):
    """A pickle of protocol 2, which is torch.save's -> its content: numbers, strings, tuples, lists, dicts and `Inert`.

    Source: the opcodes' descriptions in Python's pickletools. Raises ValueError, LookupError, TypeError.
    """
    stack, marks, memo = [], [], {}
    constants = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
    tuples = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}

    def cut(start):
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, arg, _ in pickletools.genops(data):
        match opcode.name:
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(arg)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append(constants[opcode.name])
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(cut(len(stack) - tuples[opcode.name])))
            case "TUPLE":
                stack.append(tuple(cut(marks.pop())))
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "MARK":
                marks.append(len(stack))
            case "APPEND" | "APPENDS":
                items = cut(marks.pop() if opcode.name == "APPENDS" else -1)
                if isinstance(stack[-1], list):
                    stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = cut(marks.pop() if opcode.name == "SETITEMS" else -2)
                if isinstance(stack[-1], dict):
                    # other keys are of no use here, and to hash a tuple of tuples of ... can take for ever
                    pairs = zip(items[::2], items[1::2], strict=True)
                    stack[-1].update((k, v) for k, v in pairs if isinstance(k, (str, int)))
            case "GLOBAL":
                stack.append(Inert(arg))
            case "BINPERSID":
                stack.append(Inert("storage", stack.pop()))
            case "REDUCE" | "NEWOBJ":  # would call
                arguments, function = stack.pop(), stack.pop()
                ordered = function.name == "collections OrderedDict"
                stack.append({} if ordered else Inert(function.name, arguments))
            case "BUILD":  # would call __setstate__
                state = stack.pop()
                if isinstance(stack[-1], Inert):
                    stack[-1].state = state
            case "POP":
                stack.pop()
            case "POP_MARK":
                cut(marks.pop())
            case "STOP":
                return stack.pop()
            case "PROTO":
                pass
            case name:
                raise ValueError(f"its pickle has opcode {name}, which torch.save does not write")


def _root(content):
    """The pickled module of a checkpoint."""
    if isinstance(content, dict):
        content = content.get("model") if content.get("ema") is None else content["ema"]
    if not isinstance(content, Inert):
        raise ValueError("there is no module in it")
    return content


def _named_tensors(root):
    """Pairs (name, note of a tensor) in the order of state_dict()."""
    pending, entries = [("", root)], 0
    while pending:
        prefix, module = pending.pop()
        parts = [module.state.get(key) for key in ("_parameters", "_buffers", "_modules")] if (
            isinstance(module, Inert) and isinstance(module.state, dict)) else [None]
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError(f"{prefix[:-1]!r} is no module" if prefix else "there is no module in it")
        hidden = _listed(module.state.get("_non_persistent_buffers_set"))
        entries += 1 + len(hidden) + sum(map(len, parts))
        if entries > _ENTRIES:
            raise ValueError("it has too many modules")
        parameters, buffers, modules = ({_join(prefix, k): v for k, v in part.items() if v is not None}
                                        for part in parts)
        hidden = {prefix + name for name in hidden if isinstance(name, str) and len(name) <= _NAME}
        yield from parameters.items()
        yield from ((name, note) for name, note in buffers.items() if name not in hidden)
        pending += [(f"{name}.", child) for name, child in reversed(modules.items())]


def _listed(note):
    """The list in a note of set([...]); an empty one for anything else, such as an old module without the set."""
    listed = note.args[0] if isinstance(note, Inert) and isinstance(note.args, tuple) and note.args else None
    return listed if isinstance(listed, list) else []


def _join(prefix, name):
    if not isinstance(name, str) or len(prefix) + len(name) > _NAME or not name.isprintable():
        raise ValueError("a name in it is too long (a module inside itself?) or not text")
    return prefix + name


def _tensor(note, name, archive, folder, storages):
    """The note of a parameter or tensor -> torch.Tensor. `storages` keeps what was read: each record once."""
    if isinstance(note, Inert) and note.name in _PARAMETERS:
        note = note.args[0]
    if not isinstance(note, Inert) or note.name != "torch._utils _rebuild_tensor_v2":
        raise ValueError(f"{name!r} is no plain tensor")
    storage, offset, size, stride = note.args[:4]
    kind, storage_type, key, _, count = storage.args
    if kind != "storage" or storage_type.name not in _DTYPES or not isinstance(key, str):
        raise ValueError(f"{name!r} has numbers of a kind that is not read here")
    dtype = _DTYPES[storage_type.name]
    if (key, dtype) not in storages:
        data = archive.read(f"{folder}data/{key}")
        raw = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        storages[key, dtype] = raw.view(dtype)
    storage = storages[key, dtype]
    _check_bounds(name, storage.numel(), count, offset, size, stride)
    return storage.as_strided(size, stride, offset)


def _check_bounds(name, stored, count, offset, size, stride):
    """torch itself would read before, behind, or the same numbers many times over: a tensor larger than its data."""
    if not (isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= 8
            and all(type(n) is int and 0 <= n < 2**40 for n in (*size, *stride, offset))):
        raise ValueError(f"{name!r} has no valid shape")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride)) if math.prod(size) else offset - 1
    if count != stored or last >= stored or math.prod(size) > stored:
        raise ValueError(f"{name!r} is larger than its data")
