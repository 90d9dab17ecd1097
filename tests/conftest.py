"""Fixtures: tiny data sets in the competitions' layouts, and scripts run as from a shell but without one."""
import faulthandler
import fcntl
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.transform import from_origin
from tqdm import tqdm

from data import augment
from utils import errors

os.environ["GDAL_CACHEMAX"] = "16"  # MB: the tests' scenes are larger, as real ones are than the cache that they have
tqdm.monitor_interval = 0  # its thread may hold anything while `command` forks this process



class Augmentation:
    """Flags of data.augment, as the data sets take them: SegData(..., **changes.options)."""

    def __init__(self, **flags):
        neutral = augment.view.__kwdefaults__ | augment.colour.__kwdefaults__
        assert flags.keys() <= neutral.keys()
        self.flags, self.options = flags, augment.of_flags(neutral | flags)

    def but(self, **flags):
        return Augmentation(**self.flags | flags)

    def view(self, rng, *args):
        return augment.view(rng, *args, **self.options["view"])

    def colour(self, rng, bands):
        return augment.colour(rng, bands, **self.options["colour"]).numpy()


# the competitions' augmentations, as the scripts' recipes have them
WILDFIRE = Augmentation(hflip=0.5, rot90=True, crop_padding=2.0, border=("reflect", "wrap"))
PARKING = Augmentation(hflip=0.5, translate=0.1, zoom=(0.5, 1.5), zoom_linear=True, hue=0.015, saturation=0.7, value=0.4)
DIRTY = Augmentation(rot90=True, p_affine=0.5, degrees=15.0, translate=0.0625, zoom=(0.9, 1.1), zoom_linear=True,
                     border=("reflect",))

# the smallest UNet that --encoder allows, and the fewest steps
TINY = "--conv0 8 --decoder 8 8 8 8 --imgsz 32 --bs 4 --epochs 1 --repeat 1 --workers 0 --device cpu".split()
# the smallest detector
TINY_DET = "--variant n --imgsz 64 --bs 4 --epochs 1 --workers 0 --device cpu --amp off".split()
# the smallest classifier; it has batch norms, but nothing to drop
TINY_CLS = "--net regnetx_002 --imgsz 32 --bs 4 --epochs 1 --workers 0 --device cpu --amp off".split()


def write_tif(path, array, *, crs="EPSG:32652", transform=from_origin(300_000, 4_000_000, 30, 30), **options):
    """Writes (C, H, W) or (H, W) as a GeoTIFF. Returns its path."""
    array = np.atleast_3d(array) if array.ndim == 3 else array[None]
    with rasterio.open(path, "w", driver="GTiff", count=len(array), height=array.shape[1], width=array.shape[2],
                       dtype=array.dtype, crs=crs, transform=transform, **options) as file:
        file.write(array)
    return Path(path)


def tile(seed, height=64, width=64, *, bands=10, classes=1):
    """-> image uint16 (bands, H, W), mask uint8 (H, W). Class k is a rectangle, bright in band 8 - k."""
    rng = np.random.default_rng(seed)
    image = rng.integers(4000, 8000, (bands, height, width)).astype(np.uint16)
    mask = np.zeros((height, width), np.uint8)
    for k in range(1, max(classes, 2)):
        h, w = height // 3, width // 3
        y, x = rng.integers(height - h), rng.integers(width - w)
        mask[y:y + h, x:x + w] = k
    for k in range(1, max(classes, 2)):
        image[min(7, bands) - k][mask == k] += 30000
    return image, mask


def write_wildfire(root, *, train=8, test=3, size=(64, 64), classes=1):
    """train_img, train_mask and test_img below `root`, 10 bands of uint16, every tile at its own place."""
    root = Path(root)
    for folder in ("train_img", "train_mask", "test_img"):
        (root / folder).mkdir(parents=True)
    for split, count in (("train", train), ("test", test)):
        for i in range(count):
            image, mask = tile((i, split == "test"), *size, classes=classes)
            place = dict(transform=from_origin(300_000 + 3000 * i, 4_000_000, 30, 30))
            write_tif(root / f"{split}_img" / f"{split}_img_{i}.tif", image, **place)
            if split == "train":
                write_tif(root / "train_mask" / f"train_mask_{i}.tif", mask, crs=None, transform=None)
    return root


def lot(seed, height=64, width=96, *, classes=3, most=4):
    """-> picture uint8 (H, W, 3), boxes (n, 4) in whole pixels, classes (n,). Class k is a rectangle of colour k (red,
    green, blue), 14 to 30 pixels a side, on dark grey; none touches another."""
    rng = np.random.default_rng(seed)
    picture = rng.integers(40, 70, (height, width, 3)).astype(np.uint8)
    taken, boxes, labels = np.zeros((height, width), bool), [], []
    for _ in range(rng.integers(1, most + 1)):
        h, w = rng.integers(14, 31, 2)
        y, x, k = rng.integers(1, height - h), rng.integers(1, width - w), rng.integers(classes)
        if not taken[y - 1:y + h + 1, x - 1:x + w + 1].any():
            taken[y:y + h, x:x + w] = True
            picture[y:y + h, x:x + w] = np.eye(3, dtype=np.uint8)[k] * 200 + 30
            boxes.append((x, y, x + w, y + h))
            labels.append(k)
    return picture, np.array(boxes, np.float64), np.array(labels)


def write_parking(root, *, train=10, test=3, size=(64, 96), most=4):
    """The parking-lot competition's layout: JPEGs of `lot` to train on, PNGs to test, categories 1 to 3."""
    root = Path(root)
    for folder in ("train/images", "train/label", "test/images"):
        (root / folder).mkdir(parents=True)
    found, tests, annotations = [], [], []
    for i in range(train):
        picture, boxes, classes = lot((i, 0), *size, most=most)
        found.append({"id": i, "file_name": f"{i:03}.jpg", "width": size[1], "height": size[0]})
        Image.fromarray(picture).save(root / f"train/images/{i:03}.jpg", quality=95, subsampling=0)
        for (x1, y1, x2, y2), k in zip(boxes.tolist(), classes.tolist()):
            annotations.append({"id": len(annotations), "image_id": i, "category_id": k + 1,
                                "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0})
    for i in range(test):
        Image.fromarray(lot((i, 1), *size, most=most)[0]).save(root / f"test/images/lot.{i}.png")
        tests.append({"id": 500 + i, "file_name": f"lot.{i}.png"})
    names = [{"id": k + 1, "name": name} for k, name in enumerate(("sedan", "bus", "adult"))]
    labels = {"images": found, "annotations": annotations, "categories": names}
    (root / "train/label/Train.json").write_text(json.dumps(labels))
    (root / "Test_Images_Information.json").write_text(json.dumps({"images": tests}))
    return root


def write_dirty(root, *, train=12, test=5, side=40, classes=4):
    """Dirty-MNIST's layout with `classes` letters: letter k is there when the k-th strip of a grey PNG is bright."""
    root, names = Path(root), "abcdefghijklmnopqrstuvwxyz"[:classes]
    for folder, first, count in (("dirty_mnist_2nd", 0, train), ("test_dirty_mnist_2nd", 50000, test)):
        (root / folder).mkdir(parents=True)
        rng, rows = np.random.default_rng(first), [["index", *names]]
        for i in range(first, first + count):
            labels = rng.integers(0, 2, classes)
            image = rng.integers(0, 60, (side, side)) + 180 * labels.repeat(-(-side // classes))[:side]
            Image.fromarray(image.astype(np.uint8)).save(root / folder / f"{i:05}.png")
            rows.append([i, *labels])
        text = "".join(",".join(map(str, row)) + "\n" for row in rows)
        (root / f"{folder}_answer.csv").write_text(text)
    return root


def digest(root):
    """{file below root: (bytes, modification time)}, to see that nothing was changed, added or removed."""
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(Path(root).rglob("*")) if p.is_file()}


@pytest.fixture(scope="session")
def wildfire(tmp_path_factory):
    """A shared data set of 8 + 3 tiles; nobody may write into it, which is checked at the end."""
    root = write_wildfire(tmp_path_factory.mktemp("shared") / "Wildfire")
    before = digest(root)
    yield root
    assert digest(root) == before


@pytest.fixture(scope="session")
def parking(tmp_path_factory):
    """A shared data set of 10 + 3 lots; nobody may write into it, which is checked at the end."""
    root = write_parking(tmp_path_factory.mktemp("shared") / "DATA")
    before = digest(root)
    yield root
    assert digest(root) == before


@pytest.fixture(scope="session")
def dirty(tmp_path_factory):
    """A shared data set of 12 + 5 images with four classes; nobody may write into it, which is checked at the end."""
    root = write_dirty(tmp_path_factory.mktemp("shared") / "resources")
    before = digest(root)
    yield root
    assert digest(root) == before


@pytest.fixture
def script(monkeypatch, tmp_path):
    """script(module, *flags): the module's main() in this process, in the test's own folder."""
    monkeypatch.chdir(tmp_path)

    def call(module, *flags):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
        return module.main()
    return call


@pytest.fixture
def command(tmp_path):
    """command(module, *flags) -> code, out, err, lines: the script as a process of its own, with its true exit code.

    The process is a fork of this one: torch is imported already, and a hundred commands take seconds. `lines`:
    what stands on stderr apart from progress bars.
    """
    def call(module, *flags, cwd=tmp_path, seconds=60):
        pipes = [os.pipe() for _ in range(2)]
        for reading, _ in pipes:
            fcntl.fcntl(reading, fcntl.F_SETPIPE_SZ, 2**20)  # nobody reads before the end
        pid = os.fork()
        if pid == 0:
            _child(module, flags, cwd, [writing for _, writing in pipes])
        end = time.monotonic() + seconds
        while (status := os.waitpid(pid, os.WNOHANG)) == (0, 0):
            if time.monotonic() > end:
                os.kill(pid, signal.SIGABRT)  # faulthandler says where it stands
                os.waitpid(pid, 0)
                out, err = map(_drain, pipes)
                pytest.fail(f"{module.__name__} {flags}: still running after {seconds} s\n{err}")
            time.sleep(0.002)
        out, err = map(_drain, pipes)
        lines = [line for line in re.split(r"[\r\n]+|\x1b\[A", err)
                 if line.strip() and not re.search(r"%\||it/s|img/s", line)]
        return SimpleNamespace(code=os.waitstatus_to_exitcode(status[1]), out=out, err=err, lines=lines)
    return call


def _drain(pipe):
    reading, writing = pipe
    os.close(writing)
    os.set_blocking(reading, False)  # a loader's worker that outlived the script may hold the other end
    with open(reading, "rb") as file:
        return (file.read() or b"").decode()


def _child(module, flags, cwd, outputs):
    """What a forked process does: the script, and then nothing of pytest's."""
    try:
        for number, output in enumerate(outputs, 1):
            os.dup2(output, number)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
        faulthandler.enable(file=2)
        torch.set_num_threads(1)  # OpenMP's threads did not come along
        tqdm.set_lock(threading.RLock())  # its own is shared between processes: one that dies with it stops all others
        os.chdir(cwd)
        sys.argv = [f"{module.__name__}.py", *map(str, flags)]
        errors.cli(module.main)
        os._exit(0)
    except SystemExit as error:  # argparse
        sys.stderr.flush()
        os._exit(error.code)
    except BaseException:
        os._exit(99)


@pytest.fixture
def refused(command, tmp_path):
    """refused(module, *flags, says=words): the command ends as promised, and changes nothing but new runs; -> its line.
    """
    def mine():
        return {k: v for k, v in digest(tmp_path).items() if not re.search("/runs/|/out", k)}

    def call(module, *flags, says=()):
        before = mine()
        done = command(module, *flags)
        text = f"{done.code}\n{done.err}"
        assert done.code == 2 and len(done.lines) == 1 and done.lines[0].startswith("error: "), text
        assert all(str(word) in done.lines[0] for word in ([says] if isinstance(says, str) else says)), text
        assert ";" in done.lines[0] or "--help" in done.lines[0], text  # the remedy
        assert mine() == before
        return done.lines[0]
    return call


def warp_points(points, matrix):
    """Points (..., 2) of x, y -> the same points, moved by a matrix of utils/ops/geometry.py; float64."""
    points = np.asarray(points, np.float64)
    return points @ matrix[:2, :2].T + matrix[:2, 2]
