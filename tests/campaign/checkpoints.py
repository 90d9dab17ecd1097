"""G4: damaged and crafted checkpoints, through every door that reads one.

Doors: `checkpoint.load` (--resume, predict.py) for last.pt and best.pt, and `--weights` (nets/weights.py) for our
best.pt, a foreign state dict, a pickled module and a safetensors file. A file is refused in one line, or it gives what
the undamaged file gives. Only safetensors has no checksum: there a changed number is counted, and not a failure.
"""
import functools
import io
import math
import pickletools
import shutil
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import predict
from nets import pretrained
from tests import toy
from tests.campaign import core, scripts
from tests.campaign.core import Failed, Goal, bounded, check
from tests.harness import differences
from tests.test_checkpoint import mutated
from utils.errors import UserError, answers_for
from utils.train import checkpoint

SECONDS = 5
MEMORY = 400 << 20  # more than any of these small files needs


# ---- doors -----------------------------------------------------------------------------------------------------------
def foreign_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Linear(4, 3)))


def load(path):
    return checkpoint.load(path)


def weights_of(make):
    """--weights into such a net -> what the net then holds."""
    def door(path):
        net = make()
        for tensor in net.state_dict().values():  # what is not loaded is seen
            tensor.fill_(7)
        with answers_for("--weights"):
            pretrained.load(net, str(path))
        return dict(net.state_dict())
    return door


# file: (the door, whether every byte of its content has a checksum)
DOORS = {"last.pt": (load, True), "best.pt": (load, True), "own.pt": (weights_of(toy.Net), True),
         "foreign.pth": (weights_of(foreign_net), True), "module.pt": (weights_of(foreign_net), True),
         "weights.safetensors": (weights_of(foreign_net), False)}


def whole_files(shared):
    """The folder with the undamaged file of every door: of a run of tests/toy.py, and as torch and safetensors write
    them."""
    def make(folder):
        scripts.finish(scripts.start_toy(folder, "--epochs", 2))
        for name in ("last.pt", "best.pt"):
            shutil.copy(folder / "exp" / name, folder / name)
        # a real header, with the weights of the toy, which are small enough for a bit in them to be hit
        header = checkpoint.load(scripts.straight(shared, "cls") / "runs/exp/best.pt")
        small = checkpoint.load(folder / "best.pt")
        checkpoint.save(folder / "own.pt", header | {"model": small["model"], "ema": small["ema"]})
        net = foreign_net()
        torch.save({"state_dict": net.state_dict()}, folder / "foreign.pth")
        torch.save({"model": net, "ema": None}, folder / "module.pt")
        save_file(net.state_dict(), folder / "weights.safetensors")
    return scripts.made(shared / "checkpoints", make)


@functools.lru_cache(maxsize=None)
def whole(shared, name):
    """-> the undamaged file's bytes, and what it holds."""
    path = whole_files(shared) / name
    return path.read_bytes(), DOORS[name][0](path)


def through(path, name, expected=None, what="reading"):
    """Reads a damaged file through the door of `name` -> "refused", "same" or "different". Fails for every error that
    is not ours, and for time and memory beyond the bounds."""
    try:
        with bounded(MEMORY, SECONDS, f"{name}: {what}"):
            found = DOORS[name][0](path)
    except UserError as error:
        text = str(error)
        check("\n" not in text and len(text) < 1500, f"{name}: a message of several lines, or a long one", text)
        check(str(path) in text, f"{name}: a message that does not name the file", text)
        return "refused"
    except MemoryError:
        raise Failed(f"{name}: {what}: out of memory") from None
    except (Failed, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise Failed(f"{name}: {type(error).__name__} in {core.where(error)}", f"{what}\n{error!r}") from error
    return "same" if expected is not None and not differences(expected, found) else "different"


# ---- bytes -----------------------------------------------------------------------------------------------------------
def changed_bytes(place, rng, name):
    """Flipped bits, truncations, insertions: of the whole file, or of its last records, where the directory is."""
    data, expected = whole(place.shared, name)
    part = rng.choice((0, 0, len(data) - min(len(data), 1500)))
    if name.endswith("safetensors"):
        part = 0
    damaged = data[:part] + mutated(data[part:], rng)
    path = place.own / f"bad{Path(name).suffix}"
    path.write_bytes(damaged)
    outcome = through(path, name, expected)
    if outcome == "different" and damaged != data:
        check(not DOORS[name][1], f"{name}: changed in silence", "bytes")
        return "bytes of a file without checksum: changed"
    return f"bytes: {outcome}"


# ---- records of the zip file -----------------------------------------------------------------------------------------
def changed_records(place, rng, name):
    """A zip file written anew, with right checksums: records exchanged, renamed, dropped, added, compressed, repeated,
    or laid over each other."""
    data, expected = whole(place.shared, name)
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        records = [[entry.filename, file.read(entry)] for entry in file.infolist()]
    kind = rng.choice(("exchange", "rename", "drop", "add", "compress", "repeat", "overlap", "order", "bomb"))
    a, b = rng.sample(range(len(records)), 2)
    compression = zipfile.ZIP_STORED
    if kind == "exchange":
        records[a][1], records[b][1] = records[b][1], records[a][1]
    elif kind == "rename":
        records[a][0] = rng.choice((records[a][0] + "x", "../" + records[a][0], "/etc/passwd", records[b][0].upper()))
    elif kind == "drop":
        del records[a]
    elif kind == "add":
        records.insert(a, [rng.choice(("archive/data/99", "archive/code/a.py", "x" * 5000)), rng.randbytes(100)])
    elif kind == "compress":
        compression = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    elif kind == "repeat":
        records.append([records[a][0], records[b][1]])
    elif kind == "order":
        rng.shuffle(records)
    elif kind == "bomb":
        compression = zipfile.ZIP_DEFLATED
        records.append([records[0][0].split("/")[0] + "/data/99", bytes(1 << 29)])
    path = place.own / "bad.pt"
    with zipfile.ZipFile(path, "w", compression) as file:
        for record, content in records:
            file.writestr(record, content)
    if kind == "overlap":
        _lay_over(path, rng)
    outcome = through(path, name, expected)
    if outcome == "different":
        detectable = name in ("last.pt", "best.pt", "own.pt")  # nobody can know what a foreign file was before
        check(not detectable, f"{name}: changed in silence", f"records: {kind}")
    return f"records: {kind} {outcome}"


def _lay_over(path, rng):
    """Lets the directory's entries of two records point to the same bytes."""
    data = bytearray(path.read_bytes())
    entries, at = [], data.find(b"PK\1\2")
    while at >= 0:
        entries.append(at)
        at = data.find(b"PK\1\2", at + 4)
    a, b = rng.sample(entries, 2)
    data[a + 16:a + 28], data[a + 42:a + 46] = data[b + 16:b + 28], data[b + 42:b + 46]
    path.write_bytes(data)


# ---- programs of the pickle ------------------------------------------------------------------------------------------
def changed_program(place, rng, name):
    """Changed opcodes and arguments of the pickle, in an archive with right checksums."""
    data, expected = whole(place.shared, name)
    opcodes = [ord(op.code) for op in pickletools.opcodes]
    path = place.own / "bad.pt"
    with zipfile.ZipFile(io.BytesIO(data)) as file, zipfile.ZipFile(path, "w") as target:
        for entry in file.infolist():
            content = bytearray(file.read(entry))
            if entry.filename.endswith("data.pkl"):
                for _ in range(rng.choice((1, 1, 3))):
                    content[rng.randrange(len(content))] = rng.choice((rng.randrange(256), rng.choice(opcodes)))
            target.writestr(entry.filename, bytes(content))
    outcome = through(path, name, expected)
    check(outcome != "different" or name in ("foreign.pth", "module.pt"), f"{name}: changed in silence", "program")
    return f"program: {outcome}"


# ---- contents that were made to do harm ------------------------------------------------------------------------------
def _nested(levels, width):
    value = [0]
    for _ in range(levels):
        value = [value] * width
    return value


def _deep(levels):
    value = 0
    for _ in range(levels):
        value = [value]
    return value


class _Bytes:
    """A pickle of a few bytes that asks for gigabytes."""

    def __reduce__(self):
        return bytearray, (3 << 30,)


CONTENTS = {  # what stands in place of a tensor, made from it, or beside it
    "expanded": lambda x: torch.zeros(1).expand(10**11), "expanded a little": lambda x: torch.zeros(1).expand(x.shape),
    "sparse": lambda x: x.to_sparse(), "sparse csr": lambda x: torch.eye(3).to_sparse_csr(),
    "meta": lambda x: x.to("meta"), "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "fp8": lambda x: x.to(torch.float8_e4m3fn), "complex": lambda x: x.to(torch.complex64),
    "integers": lambda x: (x * 100).long(), "bool": lambda x: x > 0,
    "1e300": lambda x: torch.full_like(x, 1e300, dtype=torch.float64), "nan": lambda x: x * math.nan,
    "infinity": lambda x: x * math.inf, "shared lists": lambda x: _nested(60, 10), "deep lists": lambda x: _deep(900),
    "text": lambda x: "x" * 10, "none": lambda x: None, "gigabytes": lambda x: _Bytes(),
    "strange strides": lambda x: x.flatten().repeat(2)[::2].view(x.shape), "bf16": lambda x: x.bfloat16(),
    "scalar": lambda x: torch.tensor(1.0), "empty": lambda x: torch.empty(0, 10**12), "a class": lambda x: Path("x"),
    "complex number": lambda x: 1j, "huge number": lambda x: 10**4000,
}
SOUND = ("bf16", "strange strides", "expanded a little")  # may be accepted in place of a tensor
NUMBERS = (*SOUND, "integers", "bool", "complex", "text", "none", "deep lists", "complex number", "huge number",
           "scalar", "empty")  # may be accepted by checkpoint.load, because it does not know the net


def crafted(place, rng, name):
    """A file that torch.save wrote, whose content is hostile."""
    key, instead = rng.choice(list(CONTENTS)), rng.random() < 0.6
    data, _ = whole(place.shared, name)
    state = {"model": foreign_net()} if name == "module.pt" else torch.load(io.BytesIO(data), weights_only=True)
    if name == "module.pt":
        state["model"]._modules["0"]._parameters.pop("bias")
        first = next(state["model"].parameters()).detach()
        target, where = state["model"]._modules["0"]._buffers, "bias"
        first = torch.zeros(4)
    else:
        target = state.get("ema") or state.get("state_dict")
        where = next(iter(target))
        first = target[where]
    if instead:
        target[where] = CONTENTS[key](first)
    else:
        state[rng.choice(("history", "extra", "args"))] = CONTENTS[key](torch.zeros(3))
    path = place.own / "bad.pt"
    try:
        torch.save(state, path)
    except Exception:  # such a value cannot be written at all
        return "crafted: not writable"
    outcome = through(path, name, what=key)
    accepted = not instead or key in (NUMBERS if name in ("last.pt", "best.pt") else SOUND)
    check(outcome == "refused" or accepted, f"{name}: accepts {key}")
    return f"crafted: {'refused' if outcome == 'refused' else 'read'}"


# ---- headers ---------------------------------------------------------------------------------------------------------
VALUES = (None, [], {}, "", "x", -3, 0, 1.5, math.nan, math.inf, 1e300, 10**9, 10**30, [0], ["x"], [[1]], True,
          "../../etc/passwd", "\x1b[31mred", [1] * 10000, {"a": {}}, -1e9, "/dev/zero", b"bytes", (1, 2))
REFUSED = (  # (key, value): meaningless for certain
    ("args", None), ("input/bands", [0]), ("input/bands", []), ("input/imgsz", 0), ("input/imgsz", -1),
    ("threshold", math.nan), ("threshold", "half"), ("arch", None), ("arch/name", 3), ("arch/kwargs", None),
    ("arch/kwargs/in_chans", 10**8), ("arch/kwargs/in_chans", -1), ("arch/kwargs/in_chans", "x"), ("task", None),
    ("input", None), ("input/pixel_scale", 0), ("input/pixel_scale", math.nan), ("classes", None), ("classes", 0),
    ("model", None), ("model", []))
RESUMED = (("step", -3), ("step", 10**9), ("step", "x"), ("history", ["x"]), ("history", None), ("steps_per_epoch", 0),
           ("sums", None), ("optimizer", None), ("optimizer/state", None), ("score", 3), ("args", None), ("scaler", 3),
           ("ema_steps", -1), ("history/0", {}), ("history/0/loss", "x"))


def header(place, rng, name):
    """A checkpoint of a real script with one value exchanged, through predict.py or --resume: one line, or results."""
    task, resumed = rng.choice(list(scripts.TASKS)), rng.random() < 0.4
    straight = scripts.straight(place.shared, task) / "runs/exp"
    state = torch.load(straight / ("last.pt" if resumed else "best.pt"), weights_only=True)
    certain = rng.random() < 0.5
    if certain:
        key, value = rng.choice(REFUSED + (RESUMED if resumed else ()))
    else:
        key, value = rng.choice(_paths({k: v for k, v in state.items() if k not in ("model", "ema", "optimizer")})), \
            rng.choice(VALUES)
    if not _exchange(state, key.split("/"), value):
        return "headers: no such key"
    folder = place.own / "runs/exp"
    folder.mkdir(parents=True)
    try:
        checkpoint.save(folder / "last.pt", state)
    except UserError:
        return "headers: not writable"
    if resumed:
        (folder / "folds.json").write_bytes((straight / "folds.json").read_bytes())
        run = core.script(scripts.TASKS[task].module, "--resume", folder, path=place.own / "log", cwd=place.own,
                          setup=core.limit_memory)
    else:
        flags = scripts.predict_flags(place.shared, task, place.own / "out")
        flags[flags.index("--weights") + 1] = folder / "last.pt"
        run = core.script(predict, *flags, path=place.own / "log", cwd=place.own, setup=core.limit_memory)
    code = run.wait(60)
    what = f"{task} {'--resume' if resumed else 'predict.py'} {key} = {repr(value)[:60]}"
    lines = "\n".join(run.err)
    check("Traceback" not in lines, "headers: traceback", f"{what}\n{lines[-1500:]}")
    check("out of memory" not in lines, "headers: out of memory", what)
    check(code in (0, 2, 3, 4), f"headers: exit {code}", f"{what}\n{lines[-1500:]}")
    check(code or not certain, "headers: accepted", what)
    check(not code or len(run.err) == 1 and "\x1b" not in lines, "headers: not one plain line", f"{what}\n{lines}")
    return f"headers: {'refused' if code else 'used'}"


def _paths(value, prefix=()):
    """The paths of all values in nested dicts, and of the first in lists: "input/bands"."""
    found = ["/".join(prefix)] if prefix else []
    items = value.items() if isinstance(value, dict) else \
        enumerate(value[:1]) if isinstance(value, (list, tuple)) else ()
    for key, child in items:
        found += _paths(child, (*prefix, str(key)))
    return found


def _exchange(state, path, value):
    """Puts the value at a path -> whether there was one."""
    *folders, last = path
    for key in folders:
        state = state[int(key)] if isinstance(state, list) else state.get(key)
        if not isinstance(state, (dict, list)):
            return False
    try:
        if isinstance(state, list):
            state[int(last)] = value
        elif last not in state:
            return False
        else:
            state[last] = value
    except (IndexError, ValueError):
        return False
    return True


# ---- trials ----------------------------------------------------------------------------------------------------------
ZIPPED = [name for name in DOORS if not name.endswith("safetensors")]


def fallback(place, rng, name):
    """last.pt is damaged, last.pt.prev is whole: a run goes on from it."""
    data, expected = whole(place.shared, "last.pt")
    path = place.own / "last.pt"
    Path(f"{path}.prev").write_bytes(data)
    path.write_bytes(rng.choice((b"", data[:rng.randrange(len(data))], bytes(len(data)), rng.randbytes(500))))
    if rng.random() < 0.3:
        path.unlink()
    check(through(path, "last.pt", expected) == "same", "last.pt.prev is not used")
    return "fallback to last.pt.prev"


def trial(place, rng, number):
    """Of 100 trials 2 exchange values of a header, 60 change bytes, the rest crafts records, programs and contents."""
    kind = number % 50
    names = list(DOORS)
    if kind == 7:
        return {header(place, rng, None): 1}
    if kind == 23:
        return {fallback(place, rng, None): 1}
    if kind % 5 < 3:
        return {changed_bytes(place, rng, names[number // 5 % len(names)]): 1}
    function = (changed_records, changed_program, crafted)[number // 5 % 3]
    return {function(place, rng, rng.choice(ZIPPED)): 1}


GOAL = Goal("G4", "damaged and crafted checkpoints through both readers: refused in one line, or unchanged", trial,
            cap=10_000, seconds=70, share=3, short=(*range(0, 7), *range(8, 50)))
