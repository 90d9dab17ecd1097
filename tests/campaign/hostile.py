"""G8: files and names that were made to do harm, under an audit hook and, where it is installed, under strace.

Nothing in a file is executed or imported, nothing connects to the network, nothing is written outside the folders of
the trial, no other file of the machine is read into a result, nothing blocks.
"""
import builtins
import contextlib
import functools
import json
import os
import pickle
import re
import shutil
import socket
import struct
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import rasterio
import torch
from PIL import Image
from torch import nn

import predict
import train_cls
import train_det
import train_seg
from data import bad, cls, folds, images, labels, seg
from data.results import submissions
from nets import weights
from tests.campaign import core, scripts
from tests.campaign.core import Goal, check
from tests.conftest import TINY_CLS, write_dirty, write_tif
from tests.harness import ROOT
from tests.test_images import VRT
from tests.test_labels import FORMATS
from utils.errors import UserError, answers_for
from utils.pictures import review
from utils.train import checkpoint

SECRET = 77  # every pixel of the file that nobody may read
SECONDS = 25


class Case(NamedTuple):
    """make(root, port): writes the hostile files below root / "DATA". act(root): reads them; it may raise UserError."""
    name: str
    make: Callable
    act: Callable


# ---- the watch -------------------------------------------------------------------------------------------------------
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PROGRAMS = ("os.exec", "os.posix_spawn", "os.spawn", "os.system", "subprocess.Popen", "os.startfile")
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate", "os.chmod",
           "shutil.rmtree", "shutil.move")
ALLOWED = ("/dev/null", "/dev/shm", "/dev/tty", "/proc/self", "/tmp/pymp-", "/tmp/torch_", "/sys/kernel/mm")


def watch(root):
    """From now on this process writes down, in root / "watch.txt", what no case may do."""
    core.limit_memory()
    sys.dont_write_bytecode = True
    log = os.open(root / "watch.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    inside = tuple(map(str, (root, *ALLOWED)))

    def outside(path):
        if isinstance(path, int) or path is None:
            return False
        path = os.path.abspath(os.fsdecode(path))
        return not path.startswith(inside)

    def hook(event, args):
        wrong = False
        if event == "open":
            wrong = isinstance(args[2], int) and args[2] & WRITES and outside(args[0])
        elif event in CHANGES:
            wrong = any(outside(path) for path in args if isinstance(path, (str, bytes)))
        elif event == "socket.connect":
            wrong = not isinstance(args[1], (str, bytes))  # a unix socket connects processes of this machine
        elif event in ("socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
            wrong = True
        elif event in PROGRAMS:
            wrong = "git" not in str(args[0]) and "git" not in str(args[1:2])
        elif event == "import":
            wrong = "wicked" in str(args[0])
        elif event == "pickle.find_class":
            wrong = args[0] in ("os", "posix", "nt", "builtins", "subprocess", "wicked", "sys")
        if wrong:
            os.write(log, f"{event} {args!r}\n"[:500].encode(errors="replace"))
    sys.addaudithook(hook)


def trial(place, rng, number):
    if number >= len(CASES):
        return _under_strace(place, number - len(CASES))
    case = CASES[number]
    root, data = place.own, place.own / "DATA"
    data.mkdir()
    write_tif(root / "secret.tif", np.full((1, 6, 8), SECRET, np.uint8))
    (root / "secret.txt").write_text("0 0.5 0.5 0.77 0.77\n")
    (root / "wicked.py").write_text("open('executed', 'w')\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        case.make(root, server.getsockname()[1])
        run = core.fork(_act, case, root, path=root / "log", cwd=root, setup=functools.partial(watch, root))
        code = run.wait(SECONDS)
        server.settimeout(0)
        with contextlib.suppress(OSError):
            server.accept()
            raise core.Failed("a connection", case.name)
    text = "\n".join(run.err[-15:])
    seen = (root / "watch.txt").read_text()
    check(not seen, f"forbidden: {seen.split(' ')[0]}", f"{case.name}\n{seen}")
    check(not (root / "executed").exists() and not (data / "executed").exists(), "executed", case.name)
    check("Traceback" not in text and code in (0, 2, 4), f"{'traceback' if 'Traceback' in text else f'exit {code}'}",
          f"{case.name}\n{text}")
    check("\x1b[31m" not in run.out + text, "escape sequences reach the terminal", case.name)
    return {"read" if code == 0 else "refused": 1}


def _act(case, root):
    """The watched process: exit code 0 or 2."""
    try:
        case.act(root)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


# ---- images ----------------------------------------------------------------------------------------------------------
def _read_images(root):
    """Every file below DATA through all readers of images; the secret may not be in what they give."""
    refused = None
    for path in sorted((root / "DATA").iterdir()):
        for reader in (images.size, images.read, images.digest, lambda p: bad.decode(p, None), seg.read_mask,
                       lambda p: images.read(p, shape=(3, 4)), lambda p: images.thumbnail(p, [1], 4)):
            try:
                found = reader(path)
            except UserError as error:
                refused = error
                continue
            pixels = found[0] if isinstance(found, tuple) and isinstance(found[0], torch.Tensor) else found
            if isinstance(pixels, torch.Tensor) and (pixels == SECRET).any():
                raise AssertionError(f"{path}: the secret was read by {reader}")
    if refused:
        raise refused


def _named(*names):
    """Names that GDAL would take for the network, an archive or another driver."""
    def act(root):
        port = (root / "port").read_text()
        for name in names:
            for reader in (images.size, images.read, images.digest):
                with contextlib.suppress(UserError):
                    reader(name.format(port=port))
    return act


def _port(root, port):
    (root / "port").write_text(str(port))
    write_tif(root / "x.tif", np.zeros((1, 6, 8), np.uint8))


def _text(name, text):
    def make(root, port):
        (root / "DATA" / name).write_text(text.format(secret=root / "secret.tif", port=port))
    return make


def _beside(name, text):
    """A harmless image with a hostile file beside it."""
    def make(root, port):
        write_tif(root / "DATA/a.tif", np.zeros((1, 6, 8), np.uint8))
        (root / "DATA" / name).write_text(text.format(secret=root / "secret.tif", port=port))
    return make


def _tagged(**tags):
    def make(root, port):
        path = write_tif(root / "DATA/a.tif", np.zeros((1, 6, 8), np.uint8))
        with rasterio.open(path, "r+") as file:
            for space, values in tags.items():
                file.update_tags(ns=space, **{k: v.format(secret=root / "secret.tif", port=port)
                                              for k, v in values.items()})
    return make


def _special(kind, name="a.tif"):
    """Not a regular file under this name."""
    def make(root, port):
        path = root / "DATA" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.unlink()
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(path)
        elif kind == "huge":
            with open(path, "wb") as file:
                file.truncate(8 << 30)
        else:
            path.symlink_to(kind)
    return make


def _png_bomb(root, port):
    Image.new("L", (10_000, 10_000)).save(root / "DATA/a.png")  # 100 KB


def _png_claim(root, port):
    """A PNG of 100 bytes that claims to have 1.6e9 pixels."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    (root / "DATA/a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes(5000))) + chunk(b"IEND", b""))


def _sparse_tif(root, port):
    with rasterio.open(root / "DATA/a.tif", "w", driver="GTiff", width=20_000, height=20_000, count=4, dtype="uint8",
                       tiled=True, SPARSE_OK="YES", compress="deflate"):
        pass


def _bands(root, port):
    write_tif(root / "DATA/a.tif", np.zeros((3000, 2, 2), np.uint8))


def _frames(root, port):
    frame = Image.new("L", (8, 8))
    frame.save(root / "DATA/a.gif", save_all=True, append_images=[Image.new("L", (8, 8), i) for i in range(1, 200)])


def _chunks(root, port):
    """A PNG whose text chunk unpacks to 64 MiB."""
    from PIL.PngImagePlugin import PngInfo
    info = PngInfo()
    info.add_text("comment", "x" * (1 << 26), zip=True)
    Image.new("L", (8, 8)).save(root / "DATA/a.png", pnginfo=info)


WMS = ('<GDAL_WMS><Service name="TMS"><ServerUrl>http://127.0.0.1:{port}/a</ServerUrl></Service><DataWindow><SizeX>4'
       '</SizeX><SizeY>4</SizeY></DataWindow></GDAL_WMS>')
OVERVIEW = '<PAMDataset><Metadata domain="OVERVIEWS"><MDI key="OVERVIEW_FILE">{secret}</MDI></Metadata></PAMDataset>'
HUGE = '<VRTDataset rasterXSize="2000000000" rasterYSize="2000000000"><VRTRasterBand band="1"/></VRTDataset>'
ENTITIES = ('<!DOCTYPE a [<!ENTITY a "lollollollollol">' + "".join(
    f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefghi", "bcdefghij")) + "]>")
URL = "/vsicurl/http://127.0.0.1:{port}/x.tif"
IMAGE_CASES = [Case(f"image: {name}", make, _read_images) for name, make in {
    "VRT of another file": _text("a.tif", VRT.replace("{}", "{secret}")),
    "VRT of the network": _text("a.tif", VRT.replace("{}", URL)), "VRT as PNG": _text("a.png", VRT.replace("{}", "{secret}")),
    "huge VRT": _text("a.tif", HUGE), "WMS": _text("a.tif", WMS), "SVG": _text("a.png", "<svg xmlns='x'/>"),
    "overview beside it": _beside("a.tif.ovr", VRT.replace("{}", "{secret}")),
    "overview of the network": _beside("a.tif.ovr", VRT.replace("{}", URL)),
    "overview in aux.xml": _beside("a.tif.aux.xml", OVERVIEW),
    "overview in aux.xml of the network": _beside("a.tif.aux.xml", OVERVIEW.replace("{secret}", URL)),
    "entities in aux.xml": _beside("a.tif.aux.xml", ENTITIES + "<PAMDataset>&j;</PAMDataset>"),
    "mask beside it": _beside("a.tif.msk", VRT.replace("{}", "{secret}")),
    "mask of the network": _beside("a.tif.msk", VRT.replace("{}", URL)),
    "world file": _beside("a.tfw", "nan\n" * 6), "overview in a tag": _tagged(OVERVIEWS={"OVERVIEW_FILE": "{secret}"}),
    "overview of the network in a tag": _tagged(OVERVIEWS={"OVERVIEW_FILE": URL}),
    "subdatasets in a tag": _tagged(SUBDATASETS={"SUBDATASET_1_NAME": "{secret}"}),
    "large PNG": _png_bomb, "claim of a large PNG": _png_claim, "sparse TIFF": _sparse_tif, "3000 bands": _bands, "200 frames": _frames,
    "large text in a PNG": _chunks, "/dev/zero": _special("/dev/zero"), "/dev/random as PNG": _special("/dev/random", "a.png"),
    "FIFO": _special("fifo"), "FIFO as JPEG": _special("fifo", "a.jpg"), "folder": _special("folder"),
    "link to itself": _special("loop"), "link to the terminal": _special("/dev/tty"),
    "8 GiB of zeros": _special("huge"), "8 GiB of zeros as JPEG": _special("huge", "a.jpg"),
    "/proc/self/mem": _special("/proc/self/mem"), "text": _text("a.jpg", "GIF8 but text"),
}.items()]
IMAGE_CASES += [Case(f"name of an image: {name}", _port, _named(name)) for name in (
    URL, "http://127.0.0.1:{port}/x.tif", "/vsizip/x.zip/x.tif", "/vsizip//vsicurl/http://127.0.0.1:{port}/x.zip/x.tif",
    "zip://x.zip!x.tif", "GTIFF_DIR:1:x.tif", "s3://bucket/x.tif", "/vsistdin/x.tif", "/vsimem/x.tif", "x" * 5000,
    "a\nb.tif", "-x.tif", "WMS:http://127.0.0.1:{port}/", "GTIFF_RAW:x.tif", "/vsis3/b/x.tif", "ftp://127.0.0.1:{port}/x.tif")]


# ---- labels and tables -----------------------------------------------------------------------------------------------
def _dataset(format, change):
    """A small data set of boxes, in which `change`(its folder, root, port) does harm."""
    def make(root, port):
        (root / "DATA").rmdir()
        FORMATS[format][0](root / "DATA")
        change(root / "DATA", root, port)
    return make


def _read_labels(root):
    found = labels.read(root / "DATA", cache=None, allow_bad=True)
    for file in found.files:
        if not Path(file).resolve().is_relative_to((root / "DATA").resolve()):
            raise AssertionError(f"{file}: outside of the data")


def _json(change):
    def apply(data, root, port):
        path = next(data.rglob("Train.json"))
        content = json.loads(path.read_text())
        change(content, root, port)
        path.write_text(json.dumps(content))
    return _dataset("competition", apply)


def _name_image(name):
    def change(content, root, port):
        content["images"][0]["file_name"] = name.format(root=root, port=port)
    return _json(change)


def _replace(pattern, text):
    """The first file of that pattern gets another content."""
    def change(data, root, port):
        path = sorted(data.rglob(pattern))[0]
        path.write_text(text.format(root=root, port=port) if "{root}" in text or "{port}" in text else text)
    return change


def _special_label(kind, pattern, format):
    def change(data, root, port):
        path = sorted(data.rglob(pattern))[0]
        path.unlink()
        _special(kind, path.relative_to(data))(root, port)
    return _dataset(format, change)


def _add(name, text):
    def change(data, root, port):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(text.replace("ROOT", str(root)).replace("PORT", str(port)))
    return change


SYSTEM = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x SYSTEM "{}">]><annotation><object><name>&x;</name></object></annotation>'
LABEL_CASES = [Case(f"labels: {name}", make, _read_labels) for name, make in {
    "image above the folder": _name_image("../secret.tif"), "absolute image": _name_image("{root}/secret.tif"),
    "image at an address": _name_image("http://127.0.0.1:{port}/a.jpg"), "image of GDAL": _name_image("/vsicurl/http://127.0.0.1:{port}/a.tif"),
    "image with a zero byte": _name_image("a\0b.jpg"), "image of 5000 letters": _name_image("x" * 5000),
    "image /dev/zero": _name_image("/dev/zero"), "image with an escape sequence": _name_image("\x1b[31m.jpg"),
    "category with an escape sequence": _json(lambda c, *_: c["categories"][0].update(name="\x1b[31mred\x1b]0;x\a")),
    "category that is a formula": _json(lambda c, *_: c["categories"][0].update(name="=cmd|' /C calc'!A0")),
    "deep JSON": _dataset("alone", _replace("*.json", "[" * 100_000)),
    "number of 5000 digits": _dataset("alone", _replace("*.json", '{"images": [' + "9" * 5000 + "]}")),
    "entities": _dataset("voc", _replace("*.xml", ENTITIES + "<annotation>&j;</annotation>")),
    "entity of a file": _dataset("voc", _replace("*.xml", SYSTEM.format("file:///etc/passwd"))),
    "entity of the network": _dataset("voc", _replace("*.xml", SYSTEM.format("http://127.0.0.1:9/"))),
    "XML file of another image": _dataset("voc", _replace("*.xml", "<annotation><filename>../../secret.tif</filename></annotation>")),
    "YAML tag": _dataset("yolo", _add("data.yaml", "names: !!python/object/apply:os.system ['touch executed']\n")),
    "YAML download": _dataset("yolo", _add("data.yaml", "train: images/train\nnames: [a, b, c]\ndownload: exec(open('executed', 'w'))\n")),
    "YAML script to download": _dataset("yolo", _add("data.yaml", "train: images/train\nnames: [a, b, c]\ndownload: |\n  import os\n  os.system('touch executed')\n")),
    "YAML path above": _dataset("yolo", _add("data.yaml", "path: /\ntrain: etc\nnames: [a]\n")),
    "YAML address": _dataset("yolo", _add("data.yaml", "train: http://127.0.0.1:PORT/x\nnames: [a]\n")),
    "YAML anchors": _dataset("yolo", _add("data.yaml", "a: &a [x, x]\nb: &b [*a, *a]\nnames: *b\n")),
    "list of images above": _dataset("yolo", _add("train.txt", "../secret.tif\nROOT/secret.tif\n/dev/zero\n")),
    "FIFO for JSON": _special_label("fifo", "*.json", "alone"), "/dev/zero for JSON": _special_label("/dev/zero", "*.json", "alone"),
    "8 GiB of JSON": _special_label("huge", "*.json", "alone"), "FIFO for text": _special_label("fifo", "*.txt", "yolo"),
    "/dev/zero for text": _special_label("/dev/zero", "labels/*/*.txt", "yolo"), "8 GiB of text": _special_label("huge", "labels/*/*.txt", "yolo"),
    "FIFO for XML": _special_label("fifo", "*.xml", "voc"), "/dev/zero for XML": _special_label("/dev/zero", "*.xml", "voc"),
    "link to a secret text": _special_label("loop", "*.xml", "voc"), "a folder of links to itself": _dataset(
        "yolo", lambda data, *_: (data / "images/again").symlink_to(data)),
}.items()]
READERS = {"cls.read": lambda path: cls.read(path.parent, table=path, folder=path.parent / "dirty_mnist_2nd"),
           "folds.read_groups": lambda path: folds.read_groups(path, ["a"]),
           "folds.read_split": lambda path: folds.read_split(path, ["a"]), "review.read_noise": review.read_noise,
           "submissions.read_probabilities": submissions.read_probabilities}
TABLE_CASES = [Case(f"{name}: {kind}", lambda root, port, kind=kind: (write_dirty(root / "D", train=6, test=2, side=16),
                                                                      _special(kind, "t.csv")(root, port)),
                    lambda root, reader=reader: reader(root / "DATA/t.csv"))
               for name, reader in READERS.items() for kind in ("fifo", "/dev/zero", "folder", "loop", "huge")]


# ---- checkpoints -----------------------------------------------------------------------------------------------------
class Evil:
    """A pickle that calls a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


EVIL = {"exec": (builtins.exec, "open('executed', 'w')"), "os.system": (os.system, "touch executed"),
        "import": (builtins.__import__, "wicked"), "eval": (builtins.eval, "open('executed', 'w')"),
        "remove": (os.remove, "secret.tif"), "connect": (socket.create_connection, ("127.0.0.1", 9))}


def _evil(call, form):
    def make(root, port):
        path, evil = root / "DATA/a.pt", Evil(*EVIL[call])
        if form == "plain pickle":
            path.write_bytes(pickle.dumps(evil))
        elif form == "module":
            net = nn.Linear(2, 2)
            net.__dict__["anything"] = evil
            torch.save({"model": net}, path)
        else:
            torch.save({"task": "cls", "arch": {}, "model": {"w": evil}, "ema": None}, path,
                       _use_new_zipfile_serialization=form != "legacy")
    return make


def _both_doors(root):
    path, refused = root / "DATA/a.pt", None
    for door in (checkpoint.load, weights.read):
        try:
            with answers_for("--weights"):
                door(path)
        except UserError as error:
            refused = error
    if refused:
        raise refused


def _net_of_name(name):
    """A valid checkpoint of a net that is called so."""
    def make(root, port):
        torch.save({"task": "cls", "arch": {"name": name, "kwargs": {}}, "model": {}, "ema": None, "classes": ["a"],
                    "input": {"bands": [1], "pixel_scale": 1, "imgsz": 32, "mean": [0], "std": [1]},
                    "single_label": True, "args": {"data": str(root)}}, root / "DATA/a.pt")
        Image.new("L", (32, 32)).save(root / "DATA/a.png")
    return make


def _predict(root):
    sys.argv = ["predict.py", "--task", "cls", "--weights", str(root / "DATA/a.pt"), "--source", str(root / "DATA/a.png"),
                "--device", "cpu", "--workers", "0", "--out", str(root / "out")]
    sys.path.insert(0, str(root))
    predict.main()


def _zip_slip(root, port):
    with zipfile.ZipFile(root / "DATA/a.pt", "w") as file:
        for name in ("../../executed", "/tmp/executed", "a/data.pkl", "a/version", "a/data/0"):
            file.writestr(name, b"x")


CHECKPOINT_CASES = [Case(f"checkpoint: {call}, {form}", _evil(call, form), _both_doors) for call in EVIL
                    for form in ("state", "legacy", "plain pickle", "module")]
CHECKPOINT_CASES += [Case(f"checkpoint: net of the name {name}", _net_of_name(name), _predict) for name in (
    "os.system", "wicked.Net", "../wicked", "builtins.exec", "nets.weights.download", "unet.os", "pretrained.load",
    "torch.hub.load", "weights.download", "\x1b[31m", "__init__.build", "yolo.VARIANTS")]
CHECKPOINT_CASES += [Case("checkpoint: names of records lead out", _zip_slip, _both_doors)]
CHECKPOINT_CASES += [Case(f"checkpoint: {kind}", _special(kind, "a.pt"), _both_doors)
                     for kind in ("fifo", "/dev/zero", "folder", "loop", "huge", "/dev/tty")]


# ---- command lines ---------------------------------------------------------------------------------------------------
def _flag(module, *flags):
    def act(root):
        small = TINY_CLS if module is train_cls else ["--epochs", "1", "--device", "cpu", "--workers", "0"]
        sys.argv = [f"{module.__name__}.py", *([] if module is predict else map(str, small)),
                    *(str(flag).replace("ROOT", str(root)) for flag in flags)]
        try:
            module.main()
        except SystemExit as ended:
            if ended.code not in (0, 2):
                raise
            raise UserError("refused") from None
    return act


def _letters(root, port):
    write_dirty(root / "D", train=6, test=2, side=40)
    _special("fifo", "fifo")(root, port), _special("/dev/zero", "zero")(root, port)


def _odd_names(root, port):
    """Images whose names are formulas and escape sequences."""
    write_dirty(root / "D", train=6, test=2, side=40)
    folder = root / "D/dirty_mnist_2nd"
    table = root / "D/dirty_mnist_2nd_answer.csv"
    text = table.read_text()
    for old, new in (("0", "=1+1"), ("1", "@SUM(1)"), ("2", "\x1b[31mred"), ("3", "+1"), ("4", "-2+3")):
        (folder / f"{int(old):05}.png").rename(folder / f"{new}.png")
        text = text.replace(f"\n{old},", f"\n{new},", 1)
    table.write_text(text)


def _no_formulas(root):
    """After training on such names, no table holds a cell that a spreadsheet would compute."""
    _flag(train_cls, "--data", "ROOT/D", "--folds", "2", "--project", "ROOT/runs")(root)
    for path in (root / "runs").rglob("*.csv"):
        for cell in re.split(r"[,\n]", path.read_text()):  # a cell of flags begins with two hyphens
            if re.match(r"[=+@\t\r]|-(?!-|[\d.]+(e-?\d+)?$)", cell):
                raise AssertionError(f"{path}: the cell {cell!r} is a formula")


FLAGS = {"--labels": train_cls, "--groups": train_cls, "--folds": train_cls, "--weights": train_cls, "--resume": train_cls,
         "--synthesize": train_cls, "--drop-noisy": train_cls}
FLAG_CASES = [Case(f"{flag} {kind}", _letters, _flag(
    module, "--data", "ROOT/D", *(["--images", "ROOT/D/dirty_mnist_2nd"] if flag == "--labels" else []), flag,
    f"ROOT/DATA/{kind}" + (":2" if flag == "--drop-noisy" else ""), "--project", "ROOT/runs"))
    for flag, module in FLAGS.items() for kind in ("fifo", "zero")]
FLAG_CASES += [Case(f"{flag} {kind} of predict.py", _letters, _flag(
    predict, "--task", "cls", flag, f"ROOT/DATA/{kind}", "--out", "ROOT/out", "--device", "cpu"))
    for flag in ("--probs", "--weights") for kind in ("fifo", "zero")]
FLAG_CASES += [Case(f"--name {name!r}"[:60], _letters, _flag(
    train_cls, "--data", "ROOT/D", "--folds", "0", "--project", "ROOT/runs", f"--name={name}")) for name in (
    "größe 火", "-x", "a\nb", "x" * 400, "\x1b[31mred", "=1+1", ".")]
FLAG_CASES += [Case(f"--data {data!r}"[:60], _letters, _flag(module, "--data", data, "--project", "ROOT/runs"))
               for module in (train_seg, train_det, train_cls) for data in ("/dev/zero", "ROOT/DATA/fifo", "x" * 5000,
                                                                            "http://127.0.0.1:9/a.json", "a\0b")]
FLAG_CASES += [Case("names that are formulas and escape sequences", _odd_names, _no_formulas)]

CASES = IMAGE_CASES + LABEL_CASES + TABLE_CASES + CHECKPOINT_CASES + FLAG_CASES


# ---- the kernel's view -----------------------------------------------------------------------------------------------
STRACED = ("images", "labels", "checkpoint")


def _under_strace(place, number):
    """A real command on a folder of many hostile files: what it opens, starts and connects to."""
    what = STRACED[number % len(STRACED)]
    if not shutil.which("strace"):
        return {"without strace": 1}
    root = place.own
    (root / "DATA").mkdir()
    write_tif(root / "secret.tif", np.full((1, 6, 8), SECRET, np.uint8))
    (root / "wicked.py").write_text("open('executed', 'w')\n")
    task = {"images": "seg", "labels": "det", "checkpoint": "cls"}[what]
    argv = [ROOT / "predict.py", *scripts.predict_flags(place.shared, task, root / "out")]
    if what == "images":
        source = root / "source"
        shutil.copytree(scripts.data(place.shared, task) / scripts.TASKS[task].test, source)
        for i, case in enumerate(IMAGE_CASES[:17]):
            case.make(root, 9)
            for path in list((root / "DATA").iterdir()):
                path.rename(source / f"{i}{path.name}")
        argv[argv.index("--source") + 1] = source
    elif what == "labels":
        FORMATS["yolo"][0](root / "D")
        _add("data.yaml", "path: .\ntrain: images/train\nval: images/val\nnames: [a, b, c]\ndownload: touch executed\n")(
            root / "D", root, 9)
        argv = [ROOT / "train_det.py", "--data", root / "D", *scripts.TASKS["det"].flags, "--project", root / "runs"]
    else:
        _evil("os.system", "state")(root, 9)
        argv[argv.index("--weights") + 1] = root / "DATA/a.pt"
    trace = root / "trace"
    done = core.subprocess.run(
        ["strace", "-f", "-qq", "-e", "trace=openat,connect,execve", "-o", trace, sys.executable, "-B",
         *map(str, argv)], cwd=root, capture_output=True, text=True, timeout=SECONDS * 8,
        env=os.environ | core.harness.ENV)
    check("Traceback" not in done.stderr and done.returncode in (0, 2, 4), f"strace {what}: exit {done.returncode}",
          done.stderr[-2000:])
    inside = tuple(map(str, (root, *ALLOWED)))
    for line in trace.read_text(errors="replace").splitlines():
        opened = re.search(r'openat\(AT_FDCWD, "([^"]*)", (\S+?)[,)]', line)
        if opened and "= -1" not in line:
            path = os.path.abspath(os.path.join(root, opened[1]))
            written = re.search("O_WRONLY|O_RDWR|O_CREAT", opened[2])
            check(not written or path.startswith(inside) or path.startswith("/dev/"), "strace: written outside", line)
            check(path != str(root / "secret.tif"), "strace: the secret was opened", line)
        check("connect(" not in line or "AF_INET" not in line, "strace: a connection", line)
        started = re.search(r'execve\("([^"]*)"', line)
        check(not started or "= -1" in line or os.path.basename(started[1])[:6] in ("python", "git"),
              "strace: another program", line)
    check(not (root / "executed").exists(), "executed", what)
    return {"under strace": 1}


GOAL = Goal("G8", f"{len(CASES)} hostile files and names under an audit hook, {len(STRACED)} commands under strace", trial,
            cap=len(CASES) + len(STRACED), seconds=400, share=2, short=(*range(0, len(CASES), 23), len(CASES) - 1))
