"""utils/train/checkpoint.py: a valid file at every moment, no silent damage, no code from files, one line for every fault."""
import builtins
import errno
import io
import os
import pickle
import random
import resource
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.harness import differences, read, toy
from utils.train import checkpoint
from utils.errors import UserError


def small(step=0, width=8):
    """A checkpoint with everything that one may hold; `step` makes it recognisable."""
    generator = torch.Generator().manual_seed(step)
    weights = {"conv.weight": torch.randn(width, 3, 3, 3, generator=generator),
               "norm.running_var": torch.rand(width, generator=generator), "norm.count": torch.tensor(step)}
    moments = {i: {"step": torch.tensor(float(step)), "exp_avg": torch.randn(width, 3, generator=generator)}
               for i in range(2)}
    return {"task": "toy", "arch": {"name": "Net", "kwargs": {"width": width, "conv0": [3, 2]}}, "model": weights,
            "ema": {k: v + 1 for k, v in weights.items()},
            "optimizer": {"state": moments, "param_groups": [{"lr": 0.1}]}, "step": step,
            "args": {}, "scaler": {}, "steps_per_epoch": step + 1, "sums": {},
            "history": [{"epoch": 1, "loss": 0.25, "größer": 1}] * (step // (step + 1)), "scores": [0.5, -1e-300]}


def one_line(caught, *words):
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500
    for word in words:
        assert str(word) in text
    return text


class Disk(io.RawIOBase):
    """A raw file on a disk with room for `room` bytes: then `fault(room)`, an OSError to raise or the process's end."""

    def __init__(self, path, room, fault):
        self.fd, self.room, self.fault = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), room, fault

    def writable(self):
        return True

    def fileno(self):
        return self.fd

    def write(self, data):
        data = bytes(data)[:max(self.room, 0)]
        self.room -= len(data)
        if data:
            return os.write(self.fd, data)  # a short write first, as from a real disk
        raise self.fault()

    def close(self):
        if not self.closed:
            try:
                super().close()
            finally:
                os.close(self.fd)


def faulty(monkeypatch, room, fault, buffering=4096):
    def opened(path, mode):
        assert mode == "wb"
        return io.BufferedWriter(Disk(path, room, fault), buffering)
    monkeypatch.setattr(checkpoint, "open", opened, raising=False)


def forked(function):
    """Runs function() in a forked process. Returns its exit code, negative for a signal."""
    pid = os.fork()
    if not pid:
        try:
            function()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---- whole -----------------------------------------------------------------------------------------------------------
def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "größe 1" / "last.pt"
    path.parent.mkdir()
    checkpoint.save(path, small(3))
    assert differences(small(3), checkpoint.load(path)) == []
    assert os.listdir(path.parent) == ["last.pt"]


def test_previous_is_kept_where_asked(tmp_path):
    path = tmp_path / "last.pt"
    for step in range(3):
        checkpoint.save(path, small(step), keep_previous=True)
        checkpoint.save(tmp_path / "best.pt", small(step))
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "last.pt", "last.pt.prev"]
    assert [torch.load(tmp_path / f)["step"] for f in ("best.pt", "last.pt", "last.pt.prev")] == [2, 2, 1]


def test_falls_back_to_the_previous_with_a_warning(tmp_path, capsys):
    path = tmp_path / "last.pt"
    for step in range(2):
        checkpoint.save(path, small(step), keep_previous=True)
    for damage in (lambda: path.write_bytes(path.read_bytes()[:-100]), lambda: path.write_bytes(b""), path.unlink):
        damage()
        assert differences(checkpoint.load(path), small(0)) == []
        warning = capsys.readouterr().out
        assert warning.startswith("warning: ") and warning.count("\n") == 1 and f"{path}.prev" in warning
    Path(f"{path}.prev").write_bytes(b"neither")
    with pytest.raises(UserError) as caught:
        checkpoint.load(path)
    one_line(caught, path)


def test_stale_temporary_file_is_ignored_and_overwritten(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, small(1))
    (tmp_path / ".new-last.pt").write_bytes(b"left by a killed process" * 10000)
    assert checkpoint.load(path)["step"] == 1
    checkpoint.save(path, small(2), keep_previous=True)
    assert checkpoint.load(path)["step"] == 2
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "last.pt.prev"]


def test_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    """A power cut is not to be had in a test: the order of the calls is what protects from it."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    checkpoint.save(tmp_path / "last.pt", small(1), keep_previous=True)
    assert calls == ["fsync", "replace", "fsync"]
    checkpoint.save(tmp_path / "last.pt", small(1), keep_previous=True)
    assert calls[3:] == ["fsync", "replace", "replace", "fsync"]


# ---- full disks and kills --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_full_or_broken_disk_keeps_the_old_file(tmp_path, monkeypatch, code):
    path = tmp_path / "last.pt"
    checkpoint.save(path, small(1))
    torch.save(small(2), buffer := io.BytesIO())
    size = len(buffer.getvalue())  # the last record is not written through the pretended disk
    rng = random.Random(code)
    for i in range(100):
        buffering = rng.choice([1, 512, 4096, 1 << 20])
        faulty(monkeypatch, rng.randrange(size), lambda: OSError(code, os.strerror(code)), buffering)
        with pytest.raises(UserError) as caught:
            checkpoint.save(path, small(2), keep_previous=True)
        one_line(caught, path, "make room")
        assert os.listdir(tmp_path) == ["last.pt"]  # nothing half written stays
    monkeypatch.undo()
    assert differences(checkpoint.load(path), small(1)) == []


def test_a_disk_that_loses_data_is_noticed_on_reading_back(tmp_path, monkeypatch):
    class Lossy(io.FileIO):
        def write(self, data):
            super().write(bytes(len(data)) if self.tell() > 500 else data)
            return len(data)

    path = tmp_path / "last.pt"
    checkpoint.save(path, small(1))
    monkeypatch.setattr(checkpoint, "open", Lossy, raising=False)
    with pytest.raises(UserError) as caught:
        checkpoint.save(path, small(2), keep_previous=True)
    one_line(caught, path)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["last.pt"] and checkpoint.load(path)["step"] == 1


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("n", [1, 2])
def test_failing_system_calls_leave_a_valid_file(tmp_path, monkeypatch, call, n):
    path = tmp_path / "last.pt"
    for step in range(2):
        checkpoint.save(path, small(step), keep_previous=True)
    real, count = getattr(os, call), [0]

    def fails(*args):
        count[0] += 1
        if count[0] == n:
            raise OSError(errno.EIO, "Input/output error")
        return real(*args)

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(UserError) as caught:
        checkpoint.save(path, small(2), keep_previous=True)
    one_line(caught, path)
    monkeypatch.undo()
    assert checkpoint.load(path)["step"] in (1, 2)


def test_file_size_limit(tmp_path):
    """A true failure of the kernel instead of a pretended one."""
    path = tmp_path / "last.pt"
    checkpoint.save(path, small(2))
    size = os.path.getsize(path)
    checkpoint.save(path, small(1))

    def child(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            checkpoint.save(path, small(2), keep_previous=True)
        except UserError:
            os._exit(2)

    for limit in (0, 1, 1000, size // 2, size - 1):
        assert forked(lambda: child(limit)) == 2
        assert os.listdir(tmp_path) == ["last.pt"]
    assert differences(checkpoint.load(path), small(1)) == []


def kills(tmp_path, count, seed):
    """Kills a writer `count` times at random bytes and around every sync and rename."""
    path = tmp_path / "last.pt"
    checkpoint.save(path, small(0))
    size, rng, last = os.path.getsize(path), random.Random(seed), 0
    found = {False: 0, True: 0}

    def die(*_):
        os.kill(os.getpid(), 9)

    def child(step, monkeypatch):
        where = rng.random()
        if where < 0.6:
            faulty(monkeypatch, rng.randrange(size), die, rng.choice([1, 512, 4096]))
        else:
            name, n, before = rng.choice(["fsync", "replace"]), rng.choice([1, 2]), rng.random() < 0.5
            real, calls = getattr(os, name), []

            def wrapped(*args):
                calls.append(1)
                if len(calls) == n and before:
                    die()
                real_result = real(*args)
                if len(calls) == n:
                    die()
                return real_result
            monkeypatch.setattr(os, name, wrapped)
        checkpoint.save(path, small(step), keep_previous=True)

    for step in range(1, count + 1):
        rng.seed(seed * 100_000 + step)
        with pytest.MonkeyPatch.context() as monkeypatch:
            code = forked(lambda: child(step, monkeypatch))
        # with no file to replace yet in the way, the second rename never comes: such a writer is not killed
        assert code == -9 or path.exists()
        state = checkpoint.load(path)
        assert state["step"] in (last, step), "more than one save was lost"
        assert differences(state, small(state["step"])) == []
        found[state["step"] == step] += 1
        last = state["step"]
    assert min(found.values()) > count / 20  # both outcomes were met


def test_a_valid_file_exists_whenever_the_writer_is_killed(tmp_path, capfd):
    kills(tmp_path, 60, seed=0)


@pytest.mark.slow
def test_a_valid_file_exists_whenever_the_writer_is_killed_3000_times(tmp_path, capfd):
    kills(tmp_path, 3000, seed=1)


# ---- damage ----------------------------------------------------------------------------------------------------------
def mutated(data, rng):
    """A damaged copy, never equal to the data."""
    data, kind = bytearray(data), rng.randrange(7)
    at, length = rng.randrange(len(data)), min(int(2 ** rng.uniform(0, 12)), len(data))
    if kind <= 1:
        for _ in range(1 if kind == 0 else rng.randrange(2, 9)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        data[at:at + length] = bytes(length)
    elif kind == 4:
        data[at:at + length] = rng.randbytes(length)
    elif kind == 5:
        data[at:at] = rng.randbytes(length)
    else:
        del data[at:at + length]
    return bytes(data)


def mutations(tmp_path, count, seed):
    """-> how many were refused and how many loaded; none may load as something else."""
    path, damaged = tmp_path / "last.pt", tmp_path / "damaged.pt"
    checkpoint.save(path, small(1))
    data, rng, seen = path.read_bytes(), random.Random(seed), {"refused": 0, "same": 0}
    for i in range(count):
        damaged.write_bytes(mutated(data, rng))
        began = time.monotonic()
        try:
            state = checkpoint.load(damaged)
        except UserError as error:
            assert "\n" not in str(error) and str(damaged) in str(error)
            seen["refused"] += 1
        else:
            assert differences(state, small(1)) == [], f"mutation {i} changed the content silently"
            seen["same"] += 1
        assert time.monotonic() - began < 5
    return seen


def test_damage_is_never_silent(tmp_path):
    seen = mutations(tmp_path, 2000, seed=0)
    assert seen["refused"] > 1500 and seen["same"] > 10


@pytest.mark.slow
def test_damage_is_never_silent_in_10000_mutations(tmp_path):
    assert mutations(tmp_path, 10_000, seed=1)["refused"] > 7500


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, small(1, width=1))
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(UserError):
            checkpoint.load(path)


# ---- hostile files ---------------------------------------------------------------------------------------------------
class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return builtins.exec, (f"open({self.path!r}, 'w')",)


@pytest.mark.parametrize("place", ["state", "weights", "plain pickle", "legacy"])
def test_code_in_a_file_is_not_executed(tmp_path, place):
    path, trap = tmp_path / "evil.pt", str(tmp_path / "executed")
    evil = Evil(trap)
    if place == "plain pickle":
        path.write_bytes(pickle.dumps(evil))
    else:
        state = small() | ({"extra": evil} if place == "state" else {"model": {"weight": evil}})
        torch.save(state, path, _use_new_zipfile_serialization=place != "legacy")
    with pytest.raises(UserError) as caught:
        checkpoint.load(path)
    one_line(caught, path)
    assert not os.path.exists(trap)
    if place != "legacy":
        pickle.loads(path.read_bytes()) if place == "plain pickle" else torch.load(path, weights_only=False)
        assert os.path.exists(trap)  # the trap works


def test_pickled_modules_are_refused(tmp_path):
    path = tmp_path / "module.pt"
    torch.save(small() | {"model": nn.Linear(2, 2)}, path)
    with pytest.raises(UserError) as caught:
        checkpoint.load(path)
    one_line(caught, path)


def test_compressed_bomb_is_refused_before_it_is_unpacked(tmp_path):
    path, bomb = tmp_path / "good.pt", tmp_path / "bomb.pt"
    checkpoint.save(path, small())
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
        target.writestr("archive/data/99", bytes(1 << 26))
    assert bomb.stat().st_size < 200_000
    with pytest.raises(UserError) as caught:
        checkpoint.load(bomb)
    one_line(caught, bomb)


@pytest.mark.parametrize("place", ["model", "ema", "optimizer"])
def test_a_tensor_larger_than_its_data_is_refused(tmp_path, place):
    path, state = tmp_path / "bomb.pt", small()
    huge = torch.zeros(1).expand(10**12)
    if place == "optimizer":
        state[place]["state"][0]["exp_avg"] = huge
    else:
        state[place]["conv.weight"] = huge
    torch.save(state, path)
    assert path.stat().st_size < 20_000
    with pytest.raises(UserError) as caught:
        checkpoint.load(path)
    one_line(caught, path, "larger than its data")


@pytest.mark.parametrize("place", ["model", "ema"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, place, value):
    path, state = tmp_path / "last.pt", small()
    state[place]["conv.weight"][3, 1, 2, 0] = value
    checkpoint.save(path, state)
    with pytest.raises(UserError) as caught:
        checkpoint.load(path)
    one_line(caught, path, "conv.weight", "not finite")


def test_what_becomes_infinite_in_the_net_is_refused(tmp_path):
    path, state = tmp_path / "last.pt", small()
    state["model"]["conv.weight"] = torch.full((8, 3, 3, 3), 1e300, dtype=torch.float64)
    checkpoint.save(path, state)
    with pytest.raises(UserError) as caught:
        checkpoint.load(path)
    one_line(caught, path, "conv.weight", "not finite")


@pytest.mark.parametrize("key, value", [("threshold", float("nan")), ("threshold", [0.5, float("inf")]),
                                        ("args", {"tile": {"a": 1}}), ("args", {"tile": -3}), ("args", {"overlap": "x"}),
                                        ("args", {"lr": float("nan")}), ("history", [{"epoch": "1"}]),
                                        ("args", {"zoom": [1.0]}), ("args", {"zoom": [1.0, 1.0, 1.0]}),
                                        ("args", {"zoom": ["x", 1.0]}), ("args", {"letters_per_image": [1]}),
                                        ("args", {"border": [0]})])
def test_values_that_no_run_writes_are_refused(tmp_path, key, value):
    path = tmp_path / "last.pt"
    checkpoint.save(path, small() | {key: value})
    with pytest.raises(UserError) as caught:
        checkpoint.load(path)
    one_line(caught, path, "another version", f"its {key} is")


@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_foreign_content_is_refused(tmp_path):
    path = tmp_path / "foreign.pt"
    for value in (torch.zeros(3), [1], {}, {"state_dict": {"w": torch.zeros(2)}}, nn.Linear(2, 2).state_dict(), None, 7,
                  {"task": "toy", "arch": 1}, small() | {"model": [1]}, small() | {"model": {"w": "text"}},
                  small() | {"model": None, "ema": None}, {k: v for k, v in small().items() if k != "model"},
                  small() | {"ema": torch.zeros(2)}, small() | {"model": {"w": torch.zeros(2).to_sparse()}}):
        torch.save(value, path)
        with pytest.raises(UserError) as caught:
            checkpoint.load(path)
        one_line(caught, path)


def test_paths_that_hold_no_file_answer_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("weights\n" * 1000)
    (tmp_path / "archive.pt").write_bytes(zip_of({"readme.txt": b"hello"}))
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "loop", tmp_path / "empty.pt", tmp_path / "text.pt",
                 tmp_path / "archive.pt", tmp_path / "missing.pt", "/dev/zero", "/proc/self/mem", "x" * 300,
                 tmp_path / "text.pt" / "below"):
        with pytest.raises(UserError) as caught:
            checkpoint.load(path)
        one_line(caught, path)


def zip_of(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in files.items():
            file.writestr(name, data)
    return buffer.getvalue()


# ---- into a net ------------------------------------------------------------------------------------------------------
def test_the_average_is_what_predicts_and_raw_weights_where_there_is_none(tmp_path):
    torch.manual_seed(0)
    raw, average, net = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    state = {"model": raw.state_dict(), "ema": average.state_dict()}
    assert checkpoint.load_weights(net, state, "x.pt") is net
    assert torch.equal(net.weight, average.weight) and not torch.equal(net.weight, raw.weight)
    checkpoint.load_weights(net, state | {"ema": None}, "x.pt")
    assert torch.equal(net.weight, raw.weight)


def test_weights_of_another_net_are_itemised_in_one_line():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    good = net.state_dict()
    wrong = {"missing": {k: v for k, v in good.items() if k != "1.bias"}, "added": good | {"2.x": torch.zeros(2)},
             "shape": good | {"0.weight": torch.zeros(4, 1, 3, 3)}}
    words = {"missing": ["1.bias missing instead of (4,)"], "added": ["2.x (2,) instead of nothing"],
             "shape": ["0.weight (4, 1, 3, 3) instead of (4, 3, 3, 3)"]}
    before = {k: v.clone() for k, v in good.items()}
    for name, weights in wrong.items():
        with pytest.raises(UserError) as caught:
            checkpoint.load_strict(net, weights, "runs/x.pt")
        one_line(caught, "runs/x.pt", "1 tensors differ", *words[name])
    with pytest.raises(UserError) as caught:
        checkpoint.load_strict(net, {f"other.{i}": torch.zeros(3) for i in range(500)}, "runs/x.pt")
    one_line(caught, "507 tensors differ")
    assert differences(before, dict(net.state_dict())) == []


# ---- what a run writes -----------------------------------------------------------------------------------------------
def test_a_run_writes_plain_values_only(tmp_path):
    """Tensors, numbers, strings, lists, dicts: whatever else would one day be refused by weights_only."""
    toy(tmp_path, "--name", "name with spaces und größe", "--save-period", 1, "--epochs", 2, "--accumulate", 3)
    folder = tmp_path / "name with spaces und größe"
    assert {"last.pt", "last.pt.prev", "best.pt", "epoch_1.pt", "epoch_2.pt"} <= {f.name for f in folder.iterdir()}
    types = set()

    def walk(value):
        types.add(type(value))
        if isinstance(value, dict):
            assert all(type(key) in (str, int) for key in value)
        for child in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
            walk(child)

    for file in folder.glob("*.pt*"):
        walk(checkpoint.load(file))
        with zipfile.ZipFile(file) as archive:  # the pickle itself names torch's constructors and nothing else
            text = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
        names = {f"{op[1]}" for op in __import__("pickletools").genops(text) if op[0].name == "GLOBAL"}
        assert all(name.split()[0] in ("torch._utils", "torch", "collections") for name in names)
    types -= {dict, __import__("collections").OrderedDict, list, tuple, str, int, float, bool, type(None), torch.Tensor}
    assert not types
    last = read(folder / "last.pt")
    slim = read(folder / "best.pt")
    assert last["optimizer"]["state"] and "optimizer" not in slim and slim["model"] and slim["ema"]
    assert not any(isinstance(v, np.generic) for row in last["history"] for v in row.values())
