"""nets/weights.py: state_dict() as the oracle for modules that torch.save pickled, and malicious files."""
import argparse
import collections
import contextlib
import copy
import functools
import importlib
import io
import pickle
import pickletools
import random
import struct
import sys
import tracemalloc
import types
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from utils import tensors

read_module = functools.partial(tensors.read, modules=True)


@contextlib.contextmanager
def foreign(module, package="models.common"):
    """Inside the `with`, the module's classes are called models.common.Conv and so on; outside, they do not exist."""
    made = {}
    for part in list(module.modules()):
        home = part.__class__
        if home not in made:
            made[home] = type(home.__name__, (home,), {"__module__": package})
        part.__class__ = made[home]
    places = {}
    for name in ("models", package):
        sys.modules[name] = places[name] = types.ModuleType(name)
    for cls in made.values():
        setattr(places[package], cls.__name__, cls)
    try:
        yield module
    finally:
        for name in places:
            del sys.modules[name]
        back = {cls: home for home, cls in made.items()}
        for part in module.modules():
            part.__class__ = back[part.__class__]


class Odd(nn.Module):
    """A module with everything that a state dict can contain or omit."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, bias=False).to(memory_format=torch.channels_last)
        self.bn = nn.BatchNorm2d(4)
        self.layers = nn.ModuleDict({"a b": nn.Linear(2, 2), "ü": nn.Sequential(nn.SiLU(), nn.LSTM(2, 3))})
        self.shared = self.layers["a b"]  # two names for one module
        self.absent = None
        self.register_module("nothing", None)
        self.register_parameter("scale", nn.Parameter(torch.tensor(1.5)))
        self.register_parameter("no_bias", None)
        self.register_buffer("hidden", torch.ones(3), persistent=False)
        wide = torch.randn(6, 8, generator=g)
        self.register_buffer("part", wide[1:5:2, 3:])
        self.register_buffer("turned", wide.t())
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("last", torch.arange(5)[4:])
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
                      torch.uint8):
            numbers = (torch.randn(2, 3, generator=g) * 50).abs()
            self.register_buffer(f"of_{dtype}".replace(".", "_"), numbers.to(dtype))
        self.anything = {"yaml": {"depth": 0.33, "anchors": [[10, 13], (1,)]}, "grid": [torch.ones(2)], "big": 2**70}
        self.kernel = None, True, "text", -1, -70000, b"bytes", {1, 2}, torch.Size([2])
        self.scale.note = "parameters may have attributes"


def written(path, content, **options):
    torch.save(content, path, **options)
    return str(path)


def assert_same(state, expected):
    assert list(state) == list(expected)
    for name, tensor in state.items():
        assert type(tensor) is torch.Tensor and not tensor.requires_grad
        assert tensor.dtype == expected[name].dtype and tensor.stride() == expected[name].stride(), name
        assert torch.equal(tensor, expected[name]), name


def refused(path, *words):
    """Reading raises a ValueError of one line that names the file and every word."""
    with pytest.raises(ValueError) as error:
        read_module(path)
    text = str(error.value)
    assert text.isprintable() and len(text) < 1000 and str(path) in text and all(w in text for w in words), text


# ---- what torch.save wrote ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("half", [False, True])
def test_state_dict_of_a_foreign_module(half, tmp_path):
    net = Odd().half() if half else Odd()
    with foreign(net):
        path = written(tmp_path / "m.pt", {"model": net, "ema": None})
    with pytest.raises(ModuleNotFoundError):
        torch.load(path, weights_only=False)
    state = read_module(path)
    assert_same(state, net.state_dict())
    assert "hidden" not in state and "no_bias" not in state and "layers.ü.1.weight_ih_l0" in state
    assert state["shared.weight"].data_ptr() == state["layers.a b.weight"].data_ptr()
    state["bn.weight"].zero_()  # the memory is writable


def test_a_whole_training_checkpoint(tmp_path):
    """Beside an optimizer, numpy scalars, a Namespace, paths and dtypes; the EMA weights come first."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    ema = copy.deepcopy(net).apply(lambda m: nn.init.normal_(m.weight) if hasattr(m, "weight") else None)
    optimizer = {"state": {0: {"step": torch.tensor(3.), "exp_avg": torch.ones(4)}}, "param_groups": [{"lr": 0.1}]}
    rest = {"optimizer": optimizer, "best_fitness": np.float64(0.3), "opt": argparse.Namespace(a={"b": 1}),
            "where": tmp_path, "dtype": torch.float16, "results": np.arange(3), "state": net.state_dict(),
            "counts": collections.Counter("aab"), "date": "2022", (1, 2): "a tuple as a key", "complex": 1j,
            "frozen": frozenset([1])}
    assert_same(read_module(written(tmp_path / "a.pt", {"model": net, "ema": ema, **rest})), ema.state_dict())
    assert_same(read_module(written(tmp_path / "b.pt", {**rest, "ema": None, "model": net})), net.state_dict())
    assert_same(read_module(written(tmp_path / "c.pt", {**rest, "model": net})), net.state_dict())
    assert_same(read_module(written(tmp_path / "d.pt", ema)), ema.state_dict())


def test_other_layouts_of_a_file(tmp_path):
    """The folder in the archive is named after the file or, for a buffer, "archive"; old files lack the byte order."""
    net = nn.Linear(2, 3)
    path = written(tmp_path / "some name.pt", {"model": net})
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "old.pt", "w") as target:
        assert "some name/data.pkl" in source.namelist()
        for name in source.namelist():
            if not name.endswith("byteorder"):
                target.writestr(name, source.read(name))
    buffer = io.BytesIO()
    torch.save({"model": net}, buffer)
    (tmp_path / "buffer.pt").write_bytes(buffer.getvalue())
    for name in ("some name.pt", "old.pt", "buffer.pt"):
        assert_same(read_module(tmp_path / name), net.state_dict())


@pytest.mark.parametrize("content", [
    [nn.Linear(2, 2)], torch.ones(2), 3, None, argparse.Namespace(a=1), argparse.Namespace(_parameters={}, _buffers={})])
def test_neither_tensors_nor_a_module_in_it(content, tmp_path):
    refused(written(tmp_path / "no.pt", content), "neither tensors nor a module", "save a state dict")


@pytest.mark.parametrize("content", [
    {}, {"model": None, "ema": None}, {"model": {"weight": torch.ones(2)}}, {"weight": torch.ones(2)}])
def test_without_a_module_it_is_the_content(content, tmp_path):
    odd = content | {"args": argparse.Namespace(lr=0.1)}  # as timm's training writes it
    for written_one in (content, odd):
        found = read_module(written(tmp_path / "plain.pt", written_one))
        assert found.keys() == written_one.keys()
        assert [name for name, _ in tensors.walk(found)] == [name for name, _ in tensors.walk(content)]


def test_legacy_and_other_formats(tmp_path):
    net = nn.Linear(2, 2)
    legacy = dict(_use_new_zipfile_serialization=False)
    refused(written(tmp_path / "legacy.pt", {"model": net}, **legacy), "Unsupported")
    assert_same(read_module(written(tmp_path / "legacy.pt", net.state_dict(), **legacy)),
                {name: tensor.detach() for name, tensor in net.state_dict().items()})
    refused(written(tmp_path / "protocol.pt", {"model": net}, pickle_protocol=4), "operand")
    for data in (b"", b"<!DOCTYPE html>\n<html>404</html>\n", pickle.dumps({"model": 1})):
        (tmp_path / "foreign.pt").write_bytes(data)
        refused(tmp_path / "foreign.pt", "not a file of tensors")
    for path in (tmp_path / "nothing.pt", tmp_path):
        with pytest.raises(OSError):
            read_module(path)


# ---- programs in the pickle -----------------------------------------------------------------------------------------

class Call:
    """For `pickled`: a global that is called with args and given a state, unless they are None."""

    def __init__(self, name, args=None, state=None, opcode=b"R"):
        self.name, self.args, self.state, self.opcode = name, args, state, opcode


def pickled(value):
    """A value -> opcodes, also for programs that pickle itself would not write; bytes are opcodes."""
    match value:
        case bytes():
            return value
        case None | bool():
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        case int():
            n = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
            return b"\x8a" + bytes([len(n)]) + n
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            text = value.encode("utf-8", "surrogatepass")
            return b"X" + struct.pack("<I", len(text)) + text
        case tuple():
            return b"(" + b"".join(map(pickled, value)) + b"t"
        case list():
            return b"](" + b"".join(map(pickled, value)) + b"e"
        case dict():
            return b"}(" + b"".join(pickled(k) + pickled(v) for k, v in value.items()) + b"u"
        case Call():
            text = b"c" + value.name.replace(" ", "\n").encode() + b"\n"
            text += pickled(value.args) + value.opcode if value.args is not None else b""
            return text + (pickled(value.state) + b"b" if value.state is not None else b"")


def module(parameters=None, buffers=None, modules=None, **more):
    state = {"training": True, "_parameters": parameters or {}, "_buffers": buffers or {}, "_modules": modules or {}}
    return Call("models.yolo Model", (), state | more, b"\x81")


def tensor(size=(2, 3), stride=(3, 1), offset=0, *, storage=None, count=6, kind="FloatStorage", key="0"):
    storage = pickled(("storage", Call(f"torch {kind}"), key, "cpu", count)) + b"Q" if storage is None else storage
    hooks = Call("collections OrderedDict", ())
    return Call("torch._utils _rebuild_tensor_v2", (storage, offset, size, stride, False, hooks))


def write(path, content, records=None, folder="archive"):
    """A file in torch's format around a pickle that holds {"model": content}; record "0" holds 0. ... 5."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{folder}/data.pkl", b"\x80\x02" + pickled({"model": content}) + b".")
        file.writestr(f"{folder}/version", "3\n")
        for key, data in (records or {"0": np.arange(6, dtype="<f4").tobytes()}).items():
            file.writestr(f"{folder}/data/{key}", data)
    return path


def test_the_writer_of_these_tests(tmp_path):
    """Its files are read by us, and those with a single tensor by torch."""
    expected = {"w": torch.arange(6.).view(2, 3)}
    path = write(tmp_path / "m.pt", module({"w": tensor()}, modules={"m": module(modules={
        "0": module(buffers={"b": tensor((2,), (3,), 1)})})}))
    expected["m.0.b"] = expected["w"].flatten()[1::3]
    assert_same(read_module(path), expected)
    write(path, tensor())
    assert torch.equal(torch.load(path, weights_only=True)["model"], expected["w"])


def traps(marker):
    """Programs that make the directory `marker` when pickle runs them: {name: opcodes}."""
    name, mkdir = pickled(str(marker)), Call("os mkdir", (str(marker),))
    code = f"__import__('os').mkdir({str(marker)!r})"
    return {
        "eval": pickled(Call("builtins eval", (code,))), "exec": pickled(Call("builtins exec", (code,))),
        "subprocess": pickled(Call("subprocess call", (["mkdir", str(marker)],))),
        "os.mkdir": pickled(mkdir), "os.system": pickled(Call("os system", (f"mkdir '{marker}'",))),
        "getattr": pickled(Call("builtins getattr", (Call("os path"), "os"))) + b"0" + pickled(mkdir),
        "apply of a partial": pickled(Call("functools partial", (Call("os mkdir"), str(marker)))) + b")R",
        "map": pickled(Call("builtins list", (Call("builtins map", (Call("os mkdir"), [str(marker)])),))),
        "inside a tensor": pickled(Call("torch._utils _rebuild_parameter", (mkdir, True, None))),
        "inside an OrderedDict": pickled(Call("collections OrderedDict", ([["a", mkdir]],))),
        "setstate": pickled(Call("functools partial", (Call("os mkdir"), str(marker)), (
            Call("os mkdir"), (str(marker),), {}, {}))) + b")R",
        "INST": b"(" + name + b"ios\nmkdir\n", "OBJ": b"(cos\nmkdir\n" + name + b"o",
        "STACK_GLOBAL": pickled("os") + pickled("mkdir") + b"\x93" + name + b"\x85R",
    }


@pytest.mark.parametrize("name", traps("x"))
@pytest.mark.parametrize("place", ["beside", "as the module", "as a tensor", "state of the module"])
def test_nothing_runs(name, place, tmp_path):
    marker = tmp_path / "executed"
    trap = traps(marker)[name]
    if name not in ("OBJ", "INST", "inside a tensor"):  # with mkdir they are an error in Python 3
        pickle.loads(b"\x80\x02" + trap + b".")
        marker.rmdir()  # the trap works
    good = {"w": tensor()}
    content = {"beside": module(good, trap=trap), "as the module": trap, "as a tensor": module({"w": trap}),
               "state of the module": Call("models.yolo Model", (), trap, b"\x81")}[place]
    path = write(tmp_path / "trap.pt", content)
    if place == "beside" and name in ("eval", "exec", "subprocess"):  # torch refuses a file that names the module os
        assert list(read_module(path)) == ["w"]
    else:
        refused(path)
    assert not marker.exists()


def test_a_text_that_claims_gigabytes_takes_none(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"X" + (3_800_000_000).to_bytes(4, "little") + bytes(500))
    tracemalloc.start()
    refused(tmp_path / "a.pt")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_nothing_is_imported(tmp_path, monkeypatch):
    (tmp_path / "wicked.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'executed')!r})\nthing = dict\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = write(tmp_path / "m.pt", module({"w": tensor()}, thing=Call("wicked thing", ()), other=Call("this s")))
    before = set(sys.modules)
    assert list(read_module(path)) == ["w"]
    assert set(sys.modules) == before and not (tmp_path / "executed").exists()
    importlib.import_module("wicked")
    assert (tmp_path / "executed").exists()  # else nothing was tested
    del sys.modules["wicked"]


# ---- tensors that lie about their size ------------------------------------------------------------------------------

STORAGE = ("storage", Call("torch FloatStorage"), "0", "cpu", 6)
BAD_TENSORS = {
    "offset beyond": tensor(offset=1), "far offset": tensor((1,), (1,), 6), "huge offset": tensor((1,), (1,), 2**63),
    "offset before": tensor((1,), (1,), -1), "negative stride": tensor((2,), (-1,), 3), "too many rows": tensor((3, 3)),
    "too wide a stride": tensor(stride=(4, 1)), "negative size": tensor((-2, -3)),
    "huge size": tensor((2**40, 2**40), (0, 0)),
    "overflow": tensor((2**32, 2**32), (1, 1)), "empty and huge": tensor((0, 2**63), (1, 1)),
    "stride missing": tensor((2, 3), (3,)), "text": tensor("23", "31"),
    "fraction": tensor((2., 3.)), "fraction of an offset": tensor(offset=0.), "bool": tensor((True, 3)),
    "no offset": tensor(offset=None), "nested size": tensor(((2, 3),), ((3, 1),)),
    "count too small": tensor((1,), (1,), count=5),
    "count too large": tensor(count=7), "negative count": tensor(count=-1), "count of text": tensor(count="6"),
    "another dtype": tensor(kind="HalfStorage"), "half as many": tensor((1,), (1,), kind="DoubleStorage", count=6),
    "unknown dtype": tensor(kind="QInt8Storage"), "no storage": tensor(kind="nn"), "no record": tensor(key="1"),
    "record outside": tensor(key="../data.pkl"), "record of the system": tensor(key="/../../../../etc/passwd"),
    "key of a tuple": tensor(key=("0",)), "no key": tensor(key=None),
    "storage of text": tensor(storage="storage"), "storage of nothing": tensor(storage=()),
    "storage kind": tensor(storage=pickled(("module", *STORAGE[1:])) + b"Q"),
    "storage type of text": tensor(storage=pickled(("storage", "torch FloatStorage", *STORAGE[2:])) + b"Q"),
    "short storage": tensor(storage=pickled(STORAGE[:4]) + b"Q"),
    "long storage": tensor(storage=pickled((*STORAGE, 1)) + b"Q"),
    "storage not persistent": tensor(storage=STORAGE), "no arguments": Call("torch._utils _rebuild_tensor_v2", ()),
    "arguments of text": Call("torch._utils _rebuild_tensor_v2", "abcdef"),
    "parameter of nothing": Call("torch._utils _rebuild_parameter", ()),
    "parameter twice": Call("torch._utils _rebuild_parameter", (Call("torch._utils _rebuild_parameter", (tensor(),)),)),
    "not called": Call("torch._utils _rebuild_tensor_v2"), "number": 3, "text for a tensor": "w", "list": [1.],
    "dict": {},
    "module for a tensor": module(),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensor(name, tmp_path):
    refused(write(tmp_path / "bad.pt", module({"w": BAD_TENSORS[name]})))
    refused(write(tmp_path / "bad.pt", module(modules={"m": module(buffers={"w": BAD_TENSORS[name]})})))


@pytest.mark.parametrize("size, stride, offset", [
    ((6,), (1,), 0), ((), (), 5), ((3, 2), (1, 3), 0), ((1, 6), (2**30, 1), 0), ((0, 3), (3, 1), 6),
    ((2, 2), (4, 1), 0), ((1,) * 8, (9,) * 8, 3)])
def test_good_tensor(size, stride, offset, tmp_path):
    path = write(tmp_path / "good.pt", module({"w": tensor(size, stride, offset)}))
    assert torch.equal(read_module(path)["w"], torch.arange(6.).as_strided(size, stride, offset))


# ---- modules that are none ------------------------------------------------------------------------------------------

def in_itself():
    start, end = pickled(module(modules={"m": b"@"})).split(b"@")
    cls = pickled(Call("models.yolo Model", (), None, b"\x81"))
    return cls + b"q\x01" + start[len(cls):] + b"h\x01" + end


def nested(levels):
    start, end = pickled(module(modules={"m": b"@"})).split(b"@")
    return start * levels + pickled(module({"w": tensor()})) + end * levels


BAD_MODULES = {
    "no state": Call("models.yolo Model", (), None, b"\x81"),
    "list": module(_modules=[]),
    "child of text": module(modules={"a": "b"}), "child of a tensor": module(modules={"a": tensor()}),
    "name of a number": module({1: tensor()}), "child's name": module(modules={1: module({"w": tensor()})}),
    "module inside itself": in_itself(), "modules 3000 deep": nested(3000), "empty pickle": b"", "stack": b"RRR",
    "no such memo": b"h\x05",
    "mark": b"t", "opcode": b"\xff", "persistent": b"NQ",
}


@pytest.mark.parametrize("name", BAD_MODULES)
def test_bad_module(name, tmp_path):
    refused(write(tmp_path / "bad.pt", BAD_MODULES[name]))
    refused(write(tmp_path / "bad.pt", module({"w": tensor()}, modules={"m": BAD_MODULES[name]})))


# ---- damaged archives -----------------------------------------------------------------------------------------------

def test_cut_anywhere(tmp_path):
    whole = write(tmp_path / "m.pt", module({"w": tensor()})).read_bytes()
    for n in range(0, len(whole), 5):
        (tmp_path / "m.pt").write_bytes(whole[:n])
        refused(tmp_path / "m.pt")


def test_every_byte_of_the_records_is_checked(tmp_path):
    whole = write(tmp_path / "m.pt", module({"w": tensor()})).read_bytes()
    expected = read_module(tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as file:
        spans = [(i.header_offset + 30 + len(i.filename), i.file_size) for i in file.infolist()]
    records = {start + k for start, size in spans for k in range(size)}
    assert len(records) > 250
    for n in range(0, len(whole), 3):
        data = bytearray(whole)
        data[n] ^= 1
        (tmp_path / "m.pt").write_bytes(data)
        if n in records:
            refused(tmp_path / "m.pt", "CRC-32")
        else:  # headers: the right numbers or a ValueError
            with contextlib.suppress(ValueError):
                assert_same(read_module(tmp_path / "m.pt"), expected)


def test_records_that_are_missing_or_short(tmp_path):
    path, content = tmp_path / "m.pt", module({"w": tensor()})
    program = b"\x80\x02" + pickled({"model": content}) + b"."
    for records in ({}, {"data.pkl": program}, {"a/data.pkl": program, "data/0": bytes(24)},
                    {"a/data.pkl": program, "a/data/0": bytes(23)}, {"a/data.pkl": program, "a/data/0": b""},
                    {"a/data.pkl": program[:-1], "a/data/0": bytes(24)}, {"a/data/0": bytes(24)}):
        with zipfile.ZipFile(path, "w") as file:
            for name, data in ({"a/version": b"3\n"} | records).items():
                file.writestr(name, data)
        refused(path)
    with zipfile.ZipFile(path, "w") as file:  # the control
        for name, data in {"a/data.pkl": program, "a/version": b"3\n", "a/data/0": bytes(24)}.items():
            file.writestr(name, data)
    assert_same(read_module(path), {"w": torch.zeros(2, 3)})


def test_programs_with_changed_bytes(tmp_path):
    """With correct checksums: tensors that are not larger than the file's, or a ValueError."""
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    with zipfile.ZipFile(written(tmp_path / "m.pt", {"model": net})) as file:
        records = {name: file.read(name) for name in file.namelist()}
    rng, path, outcomes = random.Random(0), tmp_path / "changed.pt", collections.Counter()
    largest = max(len(data) for name, data in records.items() if "/data/" in name)
    opcodes = [ord(op.code) for op in pickletools.opcodes]
    for _ in range(200):
        program = bytearray(records["m/data.pkl"])
        for _ in range(rng.choice((1, 1, 3))):
            program[rng.randrange(len(program))] = rng.choice((rng.randrange(256), rng.choice(opcodes)))
        with zipfile.ZipFile(path, "w") as file:
            for name, data in (records | {"m/data.pkl": bytes(program)}).items():
                file.writestr(name, data)
        try:
            state = read_module(path)
        except ValueError as error:
            outcomes["refused"] += str(error).isprintable()
        else:
            outcomes["read"] += all(t.numel() * t.element_size() <= largest for t in state.values())
    assert outcomes.total() == 200 and min(outcomes.values()) > 20, outcomes
