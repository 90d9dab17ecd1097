"""The hostile files, names and flags of G8: for each what it writes, and what reads it."""
import builtins
import contextlib
import json
import os
import pickle
import re
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
from PIL.PngImagePlugin import PngInfo
from torch import nn

import predict
import train_cls
import train_det
import train_seg
from data import bad, cls, folds, images, labels, seg
from nets import weights
from tests.conftest import TINY_CLS, write_dirty, write_tif
from tests.test_images import VRT
from tests.test_labels import FORMATS
from utils.errors import UserError, answers_for
from utils.pictures import review
from utils.train import checkpoint

SECRET = 77  # every pixel of the file that nobody may read


class Case(NamedTuple):
    """make(root, port): writes the hostile files below root / "DATA". act(root): reads them; it may raise UserError."""
    name: str
    make: Callable
    act: Callable


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


def _text(name, text, encoding="utf-8"):
    def make(root, port):
        path = root / "DATA" / name
        path.write_bytes(text.format(secret=root / "secret.tif", port=port).encode(encoding))
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
IMAGE_FILES = {
    "VRT of another file": _text("a.tif", VRT.replace("{}", "{secret}")),
    "VRT of the network": _text("a.tif", VRT.replace("{}", URL)),
    "VRT as PNG": _text("a.png", VRT.replace("{}", "{secret}")),
    "VRT behind a PNG's first bytes": _text("a.png", "\x89PNG\r\n\x1a\n" + VRT.replace("{}", "{secret}"), "latin-1"),
    "huge VRT": _text("a.tif", HUGE),
    "WMS": _text("a.tif", WMS),
    "SVG": _text("a.png", "<svg xmlns='x'/>"),
    "overview beside it": _beside("a.tif.ovr", VRT.replace("{}", "{secret}")),
    "overview of the network": _beside("a.tif.ovr", VRT.replace("{}", URL)),
    "overview in aux.xml": _beside("a.tif.aux.xml", OVERVIEW),
    "overview in aux.xml of the network": _beside("a.tif.aux.xml", OVERVIEW.replace("{secret}", URL)),
    "entities in aux.xml": _beside("a.tif.aux.xml", ENTITIES + "<PAMDataset>&j;</PAMDataset>"),
    "mask beside it": _beside("a.tif.msk", VRT.replace("{}", "{secret}")),
    "mask of the network": _beside("a.tif.msk", VRT.replace("{}", URL)),
    "world file": _beside("a.tfw", "nan\n" * 6),
    "overview in a tag": _tagged(OVERVIEWS={"OVERVIEW_FILE": "{secret}"}),
    "overview of the network in a tag": _tagged(OVERVIEWS={"OVERVIEW_FILE": URL}),
    "subdatasets in a tag": _tagged(SUBDATASETS={"SUBDATASET_1_NAME": "{secret}"}),
    "large PNG": _png_bomb, "claim of a large PNG": _png_claim, "sparse TIFF": _sparse_tif, "3000 bands": _bands,
    "200 frames": _frames, "large text in a PNG": _chunks, "text": _text("a.jpg", "GIF8 but text"),
    **{f"{kind} as {name}": _special(kind, name) for name in ("a.tif", "a.png", "a.jpg") for kind in (
        "/dev/zero", "/dev/random", "fifo", "folder", "loop", "/dev/tty", "huge", "/proc/self/mem")},
}
NAMES = (URL, "http://127.0.0.1:{port}/x.tif", "/vsizip/x.zip/x.tif",
         "/vsizip//vsicurl/http://127.0.0.1:{port}/x.zip/x.tif",
         "zip://x.zip!x.tif", "GTIFF_DIR:1:x.tif", "s3://bucket/x.tif", "/vsistdin/x.tif", "/vsimem/x.tif", "x" * 5000,
         "a\nb.tif", "-x.tif", "WMS:http://127.0.0.1:{port}/", "GTIFF_RAW:x.tif", "/vsis3/b/x.tif",
         "ftp://127.0.0.1:{port}/x.tif")
IMAGE_CASES = [Case(f"image: {name}", make, _read_images) for name, make in IMAGE_FILES.items()]
IMAGE_CASES += [Case(f"name of an image: {name[:60]!r}", _port, _named(name)) for name in NAMES]


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


def add_file(name, text):
    def change(data, root, port):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(text.replace("ROOT", str(root)).replace("PORT", str(port)))
    return change


def _yaml(*lines):
    """YOLO's data set with such a data.yaml."""
    return _dataset("yolo", add_file("data.yaml", "".join(f"{line}\n" for line in lines)))


def _xml(text):
    return _dataset("voc", _replace("*.xml", text))


def _category(name):
    return _json(lambda content, *_: content["categories"][0].update(name=name))


SYSTEM = ('<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x SYSTEM "{}">]>'
          '<annotation><object><name>&x;</name></object></annotation>')
PARTS = "train: images/train", "names: [a, b, c]"
LABEL_FILES = {
    "image above the folder": _name_image("../secret.tif"),
    "absolute image": _name_image("{root}/secret.tif"),
    "image at an address": _name_image("http://127.0.0.1:{port}/a.jpg"),
    "image of GDAL": _name_image("/vsicurl/http://127.0.0.1:{port}/a.tif"),
    "image with a zero byte": _name_image("a\0b.jpg"),
    "image of 5000 letters": _name_image("x" * 5000),
    "image /dev/zero": _name_image("/dev/zero"),
    "image with an escape sequence": _name_image("\x1b[31m.jpg"),
    "category with an escape sequence": _category("\x1b[31mred\x1b]0;x\a"),
    "category that is a formula": _category("=cmd|' /C calc'!A0"),
    "deep JSON": _dataset("alone", _replace("*.json", "[" * 100_000)),
    "number of 5000 digits": _dataset("alone", _replace("*.json", '{"images": [' + "9" * 5000 + "]}")),
    "entities": _xml(ENTITIES + "<annotation>&j;</annotation>"),
    "entity of a file": _xml(SYSTEM.format("file:///etc/passwd")),
    "entity of the network": _xml(SYSTEM.format("http://127.0.0.1:9/")),
    "XML file of another image": _xml("<annotation><filename>../../secret.tif</filename></annotation>"),
    "YAML tag": _yaml("names: !!python/object/apply:os.system ['touch executed']"),
    "YAML download": _yaml(*PARTS, "download: exec(open('executed', 'w'))"),
    "YAML script to download": _yaml(*PARTS, "download: |", "  import os", "  os.system('touch executed')"),
    "YAML path above": _yaml("path: /", "train: etc", "names: [a]"),
    "YAML address": _yaml("train: http://127.0.0.1:PORT/x", "names: [a]"),
    "YAML anchors": _yaml("a: &a [x, x]", "b: &b [*a, *a]", "names: *b"),
    "list of images above": _dataset("yolo", add_file("train.txt", "../secret.tif\nROOT/secret.tif\n/dev/zero\n")),
    "a folder of links to itself": _dataset("yolo", lambda data, *_: (data / "images/again").symlink_to(data)),
    **{f"{kind} for {name}": _special_label(kind, pattern, format)
       for kind in ("fifo", "/dev/zero", "huge", "loop")
       for name, pattern, format in (("JSON", "*.json", "alone"), ("text", "labels/*/*.txt", "yolo"),
                                     ("XML", "*.xml", "voc"))},
}
LABEL_CASES = [Case(f"labels: {name}", make, _read_labels) for name, make in LABEL_FILES.items()]
READERS = {
    "cls.read": lambda path: cls.read(path.parent, table=path, folder=path.parent / "dirty_mnist_2nd"),
    "folds.read_groups": lambda path: folds.read_groups(path, ["a"]),
    "folds.read_split": lambda path: folds.read_split(path, ["a"]),
    "review.read_noise": review.read_noise,
}
TABLE_CASES = [Case(f"{name}: {kind}", _special(kind, "t.csv"), lambda root, reader=reader: reader(root / "DATA/t.csv"))
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


def evil_checkpoint(call, form):
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
    data = root / "DATA"
    sys.argv = ["predict.py", "--task", "cls", "--weights", str(data / "a.pt"), "--source", str(data / "a.png"),
                "--device", "cpu", "--workers", "0", "--out", str(root / "out")]
    sys.path.insert(0, str(root))
    predict.main()


def _zip_slip(root, port):
    with zipfile.ZipFile(root / "DATA/a.pt", "w") as file:
        for name in ("../../executed", "/tmp/executed", "a/data.pkl", "a/version", "a/data/0"):
            file.writestr(name, b"x")


CHECKPOINT_CASES = [Case(f"checkpoint: {call}, {form}", evil_checkpoint(call, form), _both_doors) for call in EVIL
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


FLAGS = ("--labels", "--groups", "--folds", "--weights", "--resume", "--synthesize", "--drop-noisy")
FLAG_CASES = [Case(f"{flag} {kind}", _letters, _flag(
    train_cls, "--data", "ROOT/D", *(["--images", "ROOT/D/dirty_mnist_2nd"] if flag == "--labels" else []), flag,
    f"ROOT/DATA/{kind}" + (":2" if flag == "--drop-noisy" else ""), "--project", "ROOT/runs"))
    for flag in FLAGS for kind in ("fifo", "zero")]
FLAG_CASES += [Case(f"--weights {kind} of predict.py", _letters, _flag(
    predict, "--task", "cls", "--weights", f"ROOT/DATA/{kind}", "--out", "ROOT/out", "--device", "cpu"))
    for kind in ("fifo", "zero")]
FLAG_CASES += [Case(f"--name {name!r}"[:60], _letters, _flag(
    train_cls, "--data", "ROOT/D", "--folds", "0", "--project", "ROOT/runs", f"--name={name}")) for name in (
    "größe 火", "-x", "a\nb", "x" * 400, "\x1b[31mred", "=1+1", ".")]
FLAG_CASES += [Case(f"--data {data!r}"[:60] + f" of {module.__name__}", _letters,
                    _flag(module, "--data", data, "--project", "ROOT/runs"))
               for module in (train_seg, train_det, train_cls)
               for data in ("/dev/zero", "ROOT/DATA/fifo", "x" * 5000, "http://127.0.0.1:9/a.json", "a\nb")]
FLAG_CASES += [Case("names that are formulas and escape sequences", _odd_names, _no_formulas)]

CASES = IMAGE_CASES + LABEL_CASES + TABLE_CASES + CHECKPOINT_CASES + FLAG_CASES
