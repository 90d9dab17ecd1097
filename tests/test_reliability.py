"""Faults and hostile files that a campaign found, each with a test: what is damaged is noticed, nothing hangs, nothing
is written where it must not be, and every end is one line."""
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import nets
from data import cache as cache_module
from data.cache import Cache
from nets import pretrained
from tests.harness import ENV, differences, toy
from tests.test_checkpoint import small
from utils import files, tensors
from utils.errors import NumericalError, UserError
from utils.train import checkpoint, runs
from utils.train.optim import make_optimizer, make_schedule, param_groups
from utils.train.state import State


class Net(nn.Module):
    task_prefixes = ("head.",)

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)


def refused(path, *words, load=None):
    """pretrained.load of the file raises a ValueError of one line; the net stays as it was."""
    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        pretrained.load(net, str(path))
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600 and str(path) in text and all(word in text for word in words), text
    assert differences(dict(net.state_dict()), before) == []


# ---- weights ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("own", [True, False])
def test_no_flipped_bit_of_weights_is_silent(tmp_path, own):
    """Also in our own best.pt and in foreign files of torch's zip format, of which torch itself checks nothing."""
    state = Net().state_dict()
    if own:
        checkpoint.save(tmp_path / "net.pt", {"task": "toy", "arch": {"name": "Net", "kwargs": {}}, "model": state})
    else:
        torch.save(state, tmp_path / "net.pt")
    whole, rng = (tmp_path / "net.pt").read_bytes(), random.Random(0)
    for _ in range(300):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / "flipped.pt").write_bytes(data)
        net = Net()
        try:
            pretrained.load(net, str(tmp_path / "flipped.pt"))
        except ValueError as error:
            assert "flipped.pt" in str(error)
        else:
            assert differences(dict(net.state_dict()), dict(state)) == []


def rezipped(source, target, change=lambda records: records, **options):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **options) as new:
        for name, data in change({name: old.read(name) for name in old.namelist()}).items():
            new.writestr(name, data)
    return target


def test_records_that_were_exchanged(tmp_path):
    """Every record has the right CRC-32 then, and the tensors are of one size."""
    checkpoint.save(tmp_path / "good.pt", small())
    same = rezipped(tmp_path / "good.pt", tmp_path / "same.pt")
    assert differences(checkpoint.load(same), small()) == []

    def exchange(records):
        one, other = [name for name, data in records.items() if "/data/" in name and len(data) == 864]
        return records | {one: records[other], other: records[one]}

    def change(records):
        program = next(name for name in records if name.endswith("data.pkl"))
        assert b"toy" in records[program]
        return records | {program: records[program].replace(b"toy", b"tot")}

    for alter in (exchange, change):
        bad = rezipped(tmp_path / "good.pt", tmp_path / "bad.pt", alter)
        with pytest.raises(UserError, match="exchanged"):
            checkpoint.load(bad)
        with pytest.raises(ValueError, match="exchanged"):
            pretrained.read(bad)
    state = torch.load(tmp_path / "good.pt", weights_only=True)  # a change that the user makes with torch is his own
    torch.save(state | {"threshold": 0.25}, tmp_path / "edited.pt")
    assert checkpoint.load(tmp_path / "edited.pt")["threshold"] == 0.25


def test_a_compressed_archive_is_refused_also_where_it_is_not_smaller(tmp_path):
    torch.save(Net().state_dict(), tmp_path / "net.pt")
    with zipfile.ZipFile(tmp_path / "net.pt") as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    bad = rezipped(tmp_path / "net.pt", tmp_path / "bad.pt", compression=zipfile.ZIP_DEFLATED)
    assert bad.stat().st_size > size
    with pytest.raises(ValueError, match="compressed"):
        tensors.read(bad)


def test_archives_that_would_grow(tmp_path):
    torch.save({"conv.weight": torch.zeros(4, 3, 3, 3), "big": torch.zeros(1 << 22)}, tmp_path / "big.pt")
    small_one = rezipped(tmp_path / "big.pt", tmp_path / "small.pt", compression=zipfile.ZIP_DEFLATED)
    assert small_one.stat().st_size < 1e5
    refused(small_one, "compressed")
    data = bytearray((tmp_path / "big.pt").read_bytes())  # ten records, all of them the bytes of the largest
    with zipfile.ZipFile(tmp_path / "big.pt") as archive:
        entries, start = archive.infolist(), archive.start_dir
        large = max(entries, key=lambda entry: entry.file_size)
        records = [(entry.filename, archive.read(entry)) for entry in entries]
    with zipfile.ZipFile(tmp_path / "overlap.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"")
        archive.filelist += [large] * 9
        archive.fp.write(data[:start])
    refused(tmp_path / "overlap.pt")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "twice.pt", "w") as archive:
        for name, content in [*records, records[-1]]:
            archive.writestr(name, content)
    refused(tmp_path / "twice.pt", "hidden in another")


def packed(header, data):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize("header, data", [
    ({"conv.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, bytes(12)),
    ({"conv.weight": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}, bytes(16)),
    ({"conv.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(16)),
    ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
      "b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
      "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12)),
    ({"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}, bytes(8)),
    ({"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}, bytes(8)),
    ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 0]}}, b"")])
def test_spans_of_safetensors(tmp_path, header, data):
    """Beyond the file, with a hole at the start or the end, overlapping, of numbers that no net here has, without any."""
    path = tmp_path / "w.safetensors"
    path.write_bytes(packed(header, data))
    with pytest.raises(ValueError, match="damaged, or not a file of tensors"):
        tensors.read(path)
    refused(path)
    path.write_bytes(packed(header, data)[:20])
    with pytest.raises(ValueError, match="its header is cut off"):
        tensors.read(path)


def program(*calls):
    """A pickle of a dict whose values are calls of (module, name) with arguments, as a hostile file has them."""
    class Call:
        def __init__(self, function, args):
            self.function, self.args = function, args

        def __reduce__(self):
            return self.function, self.args
    return pickle.dumps({str(i): Call(*call) for i, call in enumerate(calls)}, protocol=2)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("call", [(bytearray, (3 << 30,)), (torch.FloatTensor, (1 << 30,)),
                                  (torch._utils._rebuild_meta_tensor_no_storage,
                                   (torch.float32, (1 << 40,), (1,), False))])
def test_memory_that_the_file_does_not_hold(tmp_path, call, legacy):
    path = tmp_path / "memory.pt"
    if legacy:
        parts = [0x1950a86a20f9469cfc6c, 1001, {"little_endian": True}]
        path.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in parts) + program(call)
                         + pickle.dumps([], protocol=2))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", program(call))
            archive.writestr("archive/version", "3\n")
    assert path.stat().st_size < 1000
    began = time.monotonic()
    refused(path, "which no file of weights needs")
    assert time.monotonic() - began < 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [
    lambda w: w.to_sparse(), lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), lambda w: w.to("meta"),
    lambda w: w.to(torch.float8_e4m3fn), lambda w: w.to(torch.complex64), lambda w: w.round().long(),
    lambda w: w.bool(), lambda w: torch.full_like(w, 1e300, dtype=torch.float64), lambda w: w * float("nan")],
    ids="sparse quantized meta fp8 complex integer bool 1e300 nan".split())
@pytest.mark.parametrize("legacy", [True, False])
def test_weights_of_other_kinds(tmp_path, make, legacy):
    torch.save(Net().state_dict() | {"conv.weight": make(torch.randn(4, 3, 3, 3))}, tmp_path / "odd.pt",
               _use_new_zipfile_serialization=not legacy)
    refused(tmp_path / "odd.pt")
    odd = make(torch.randn(4, 3, 3, 3))
    if odd.layout is not torch.strided or odd.is_quantized or odd.is_meta or odd.dtype in (
            torch.float8_e4m3fn, torch.complex64):  # also where a later torch builds them by a function of another name
        with pytest.raises(ValueError, match="conv.weight is of a kind that no net here has"):
            tensors._check("conv.weight", odd)


def test_a_hash_for_formats_without_checksums(tmp_path):
    safetensors.torch.save_file(Net().state_dict(), tmp_path / "w.safetensors")
    torch.save(Net().state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save(Net().state_dict(), tmp_path / "new.pth")
    assert "sha256" not in pretrained.describe(pretrained.load(Net(), str(tmp_path / "new.pth")))
    for name in ("w.safetensors", "old.pth"):
        path = tmp_path / name
        found = subprocess.run(["sha256sum", path], capture_output=True, text=True).stdout.split()[0]
        assert f":sha256={found} " in pretrained.describe(pretrained.load(Net(), str(path)))
        pretrained.load(Net(), f"{path}:sha256={found.upper()}")
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}: has another SHA-256; fetch it again"):
            pretrained.load(Net(), f"{path}:sha256={found}")
        with pytest.raises(UserError, match=f"--weights .*{name}: has another SHA-256; fetch it again"):
            pretrained.checkpoint(f"{path}:sha256={found}", "det")


# ---- all that a checkpoint holds is finite ---------------------------------------------------------------------------
def state_of(model):
    optimizer = make_optimizer("adamw", param_groups(model, 0.01), lr=0.1)
    return State(model, optimizer, make_schedule("constant", steps_per_epoch=2, epochs=2), device=torch.device("cpu"),
                 amp="off")


def step(state):
    state.steps_per_epoch = 2
    state.train_batch(lambda model, batch: (model.conv(batch["image"]).square().mean(), {}),
                      {"image": torch.ones(1, 3, 4, 4)}, 0, 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_moment_that_is_not_finite_is_not_saved(value):
    state = state_of(Net())
    step(state)
    state.state_dict()
    next(iter(state.optimizer.state.values()))["exp_avg_sq"].flatten()[3] = value
    with pytest.raises(NumericalError):
        state.state_dict()


def test_a_saved_moment_that_is_not_finite_leads_to_the_previous_file(tmp_path, capsys):
    path, state = tmp_path / "last.pt", small(2)
    checkpoint.save(path, small(1))
    state["optimizer"]["state"][1]["exp_avg"][0, 0] = float("nan")
    checkpoint.save(path, state, keep_previous=True)
    assert differences(checkpoint.load(path), small(1)) == []
    assert "exp_avg is not finite" in capsys.readouterr().out


def test_a_moment_of_another_shape(tmp_path):
    state = state_of(Net())
    step(state)
    saved = state.state_dict()
    saved["optimizer"]["state"][0]["exp_avg"] = torch.zeros(7)
    with pytest.raises(UserError, match="optimizer is damaged"):
        state_of(Net()).load_state_dict(saved | {"steps_per_epoch": 0, "step": 0, "history": []})


# ---- headers ---------------------------------------------------------------------------------------------------------
HEADERS = [
    {"args": None}, {"args": [1]}, {"args": {"data": {1: 2}}}, {"args": {"data": torch.zeros(2)}}, {"arch": "UNet"},
    {"arch": {}}, {"arch": {"name": 3, "kwargs": {}}}, {"arch": {"name": "unet.UNet"}},
    {"arch": {"name": "unet.UNet", "kwargs": [1]}}, {"arch": {"name": "os.system", "kwargs": {}}}, {"input": None},
    {"input": {}}, {"bands": [0]}, {"bands": []}, {"bands": ["a"]}, {"bands": [1, 2, 3]}, {"imgsz": 0}, {"imgsz": "x"},
    {"pixel_scale": 0}, {"pixel_scale": float("nan")}, {"pixel_scale": [1.0] * 3}, {"pixel_mean": [1.0] * 3},
    {"mean_planes": False}, {"classes": 0}, {"classes": -1}, {"classes": 2}, {"classes": []}, {"classes": "abc"},
    {"classes": [1, 2]}, {"threshold": float("nan")}, {"threshold": 2.0}, {"threshold": "half"},
    {"threshold": [0.1, 0.2]}, {"score": 3}, {"ema": [1]}, {"ema": {"x": 1}}, {"model": None}, {"task": 1},
    {"task": "x"},
    {"seen": {"low": [1.0]}}, {"seen": 3}]


@pytest.fixture(scope="module")
def net_file(tmp_path_factory):
    """A checkpoint that predicts."""
    path = tmp_path_factory.mktemp("net") / "best.pt"
    arch = {"name": "unet.UNet", "kwargs": {"in_chans": 4, "classes": 1}}
    checkpoint.save(path, {"task": "seg", "arch": arch, "classes": 1, "model": nets.build(arch).state_dict(),
                           "ema": None,
                           "input": {"bands": [1, 2], "pixel_scale": 255.0, "imgsz": 32}, "threshold": 0.5,
                           "args": {"data": "nowhere"}})
    return path


def predicted(path, monkeypatch, capsys):
    """-> the UserError with which predict.py refuses the checkpoint, or None."""
    import predict
    monkeypatch.setattr(sys, "argv", ["predict.py", "--task", "seg", "--weights", str(path), "--device", "cpu"])
    monkeypatch.setattr(predict.dist, "setup", lambda device: torch.device("cpu"))
    try:
        predict.main()
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("change", HEADERS, ids=str)
def test_crafted_headers(net_file, change, tmp_path, monkeypatch, capsys):
    state = torch.load(net_file, weights_only=True)
    inner = {key: value for key, value in change.items() if key in ("bands", "imgsz", "pixel_scale", "pixel_mean",
                                                                    "mean_planes", "seen")}
    torch.save(state | change | ({"input": state["input"] | inner} if inner else {}), tmp_path / "crafted.pt")
    text = predicted(tmp_path / "crafted.pt", monkeypatch, capsys)
    assert text and str(tmp_path / "crafted.pt") in text and "\n" not in text, text
    assert "nowhere" in predicted(net_file, monkeypatch, capsys)  # what was not changed gets as far as the data


@pytest.mark.parametrize("change", [
    {"step": -3}, {"step": 10**9}, {"step": 1.5}, {"step": True}, {"steps_per_epoch": 0}, {"history": None},
    {"history": [1]}, {"history": [{"loss": "x"}]}, {"history": [{}]}, {"history": [{"epoch": 2}]},
    {"threshold": float("nan")}, {"args": {"bands": {"a": 1}}}, {"sums": [1]}, {"scaler": None}, {"optimizer": None},
    {"optimizer": {}}, {"optimizer": {"name": "AdamW"}}, {"optimizer": {"name": "AdamW", "state": 3,
                                                                        "param_groups": 4}},
    {"score": 3}, {"ema_steps": -1}, {"args": None}, {"args": {"bs": "x"}}, {"args": {"lr": None}}], ids=str)
def test_crafted_headers_of_resumed_runs(tmp_path, change):
    toy(tmp_path, "--epochs", 1)
    path = tmp_path / "exp" / "last.pt"
    torch.save(torch.load(path, weights_only=True) | change, path)
    os.remove(f"{path}.prev") if os.path.exists(f"{path}.prev") else None
    run = toy(tmp_path, "--resume", "--epochs", 2, code=2)
    assert len(run.err) == 1 and run.err[0].startswith("error: ")


def test_lists_in_lists_in_lists(tmp_path):
    value = []
    for _ in range(60):
        value = [value] * 10
    deep = []
    for _ in range(150):
        deep = [deep]
    for name, more in (("wide", value), ("deep", deep)):
        torch.save(small() | {"args": {"more": more}}, tmp_path / f"{name}.pt")
        began = time.monotonic()
        with pytest.raises(UserError, match="it holds more than"):
            checkpoint.load(tmp_path / f"{name}.pt")
        assert time.monotonic() - began < 30


def test_shapes_are_compared_before_memory_is_taken(net_file, tmp_path, monkeypatch, capsys):
    state = torch.load(net_file, weights_only=True)
    state["arch"]["kwargs"]["in_chans"] = 10**9  # 128 GB of weights
    torch.save(state, tmp_path / "huge.pt")
    began = time.monotonic()
    assert "another net" in predicted(tmp_path / "huge.pt", monkeypatch, capsys)
    assert time.monotonic() - began < 10


# ---- files that are none ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("read", [files.read_csv, files.read_json, files.read_bytes, checkpoint.load])
def test_pipes_and_devices(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", "/dev/stdin", tmp_path):
        with pytest.raises(UserError):
            read(path)


def test_text_of_any_length(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST_TEXT", 10)
    (tmp_path / "t.csv").write_text("a,b\n1,2\n3,4\n")
    with pytest.raises(UserError, match="12 bytes"):
        files.read_csv(tmp_path / "t.csv")


def test_the_whole_file_system_is_no_data_set():
    with pytest.raises(UserError, match="whole file system"):
        files.list_tree("/")


# ---- what must not be touched ----------------------------------------------------------------------------------------
def test_the_users_repository_is_only_read(tmp_path):
    """`git describe --dirty` writes the index anew when a file was touched."""
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True,
                       capture_output=True)
    git("init", "-q")
    (tmp_path / "file").write_text("a")
    assert runs.commit(tmp_path) == ""
    git("add", "file"), git("commit", "-qm", "one")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True).stdout
    os.utime(tmp_path / "file", (1, 1))
    before = (tmp_path / ".git/index").read_bytes()
    assert head.startswith(runs.commit(tmp_path)) and len(runs.commit(tmp_path)) == 7
    assert (tmp_path / ".git/index").read_bytes() == before
    (tmp_path / "other").write_text("b")
    assert not runs.commit(tmp_path).endswith("-dirty")
    (tmp_path / "file").write_text("b")
    assert runs.commit(tmp_path).endswith("-dirty") and (tmp_path / ".git/index").read_bytes() == before
    git("describe", "--always", "--dirty")
    os.utime(tmp_path / "file", (2, 2))


def script(text, folder, seconds=60):
    done = subprocess.run([sys.executable, "-c", text], cwd=folder, env=os.environ | ENV, capture_output=True,
                          text=True,
                          timeout=seconds)
    return done.returncode, done.stdout, done.stderr


def test_names_do_not_steer_a_terminal(tmp_path):
    code, out, err = script("from utils.errors import UserError, cli\n"
                            "def main():\n"
                            "    print('tab\\there \\x1b[2J\\x9b1m\\x07 größe')\n"
                            "    raise UserError('\\x1b]0;title\\x07.tif: damaged')\n"
                            "cli(main)\n", tmp_path)
    assert (code, out) == (2,
                           "tab\there \\x1b[2J\\x9b1m\\x07 größe\n") and err == "error: \\x1b]0;title\\x07.tif: damaged\n"


# ---- memory, notebooks -----------------------------------------------------------------------------------------------
def test_a_cache_that_will_not_fit(monkeypatch):
    image, names = torch.zeros(1000, dtype=torch.uint8), list(map(str, range(500)))
    monkeypatch.setattr(cache_module, "free_memory", lambda: 600_000)
    assert len(Cache(names, lambda i: image, "ram").tensors) == 500
    monkeypatch.setattr(cache_module, "free_memory", lambda: 400_000)
    read = []
    with pytest.raises(UserError, match="--cache ram: 500 images .* --cache disk"):
        Cache(names, lambda i: read.append(i) or image, "ram")
    assert len(read) < 150
    assert len(Cache(names[:50], lambda i: image, "ram").tensors) == 50
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(cache_module, "free_memory", lambda: 600_000)
    with pytest.raises(UserError, match="--cache disk"):
        Cache(names, lambda i: image, "ram")


def test_the_memory_that_is_free():
    known = 1024 * int(next(line.split()[1] for line in open("/proc/meminfo") if line.startswith("MemAvailable")))
    assert 0 < cache_module.free_memory() < 1.2 * known


def test_main_called_from_another_script(tmp_path):
    """An exception in a loop over a loader, caught or not: the interpreter ends, and its workers with it."""
    text = ("import torch\nfrom data.loader import eval_loader\n"
            "class Data:\n"
            "    def __len__(self): return 100\n"
            "    def __getitem__(self, i): return {'x': torch.zeros(1)}\n"
            "def main():\n"
            "    loader = eval_loader(Data(), 1, workers=2)\n"
            "    for batch in loader:\n"
            "        print(*[w.pid for w in __import__('multiprocessing').active_children()], flush=True)\n"
            "        raise KeyError('a bug')\n"
            "try:\n"
            "    main()\n"
            "except KeyError as error:\n"
            "    kept = error\n"  # and with it the loop's frame
            "main()\n")
    code, out, err = script(text, tmp_path)
    assert code == 1 and err.count("a bug") == 1 and "Exception ignored" not in err and len(set(out.split())) == 4
    for pid in out.split():
        assert not Path(f"/proc/{pid}").exists()
