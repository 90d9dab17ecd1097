"""What start-up and scores cost as data sets grow: stand-ins of two sizes, CPU seconds, memory, and the exponent between.

    python -m tests.bench.scale [--images 1000] [--samples 50000]

Every row runs in a process of its own, so that nothing is in memory. "again" is a second run on unchanged files.
"""
import argparse
import json
import math
import multiprocessing
import os
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import rasterio
import torch
from PIL import Image

from data import folds, images, labels, loader, seg
from data.results import masks, submissions
from tests.conftest import write_tif
from utils.metrics.average_precision import DetectionAP
from utils.ops.tiles import plan, windows as places


def pictures(folder, count, suffix, side=128):
    """`count` different images."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    base = np.cumsum(rng.integers(-3, 4, (side, side, 3)), 1).astype(np.uint8)
    for i in range(count):
        path = folder / f"{i:06}.{suffix}"
        if suffix == "tif":
            write_tif(path, np.roll(base, i, 1).transpose(2, 0, 1).astype(np.uint16) * 100 + i)
        else:
            Image.fromarray(np.roll(base, i, 1) + np.uint8(i // side)).save(path)
    return sorted(folder.iterdir())


def parking(root, count):
    pictures(root / "train/images", count, "jpg")
    rng, sides = np.random.default_rng(0), [60, 60, 30, 30]
    boxes = (rng.random((10 * count, 4)) * sides + [0, 0, 5, 5]).round(2).tolist()
    content = {"images": [{"id": i, "file_name": f"{i:06}.jpg", "height": 128, "width": 128} for i in range(count)],
               "annotations": [{"id": k, "image_id": k // 10, "category_id": k % 14 + 1, "bbox": box, "iscrowd": 0}
                               for k, box in enumerate(boxes)],
               "categories": [{"id": k, "name": str(k)} for k in range(1, 15)]}
    (root / "train/label").mkdir()
    (root / "train/label/Train.json").write_text(json.dumps(content))


def tiles(root, count):
    for path in pictures(root / "train_img", count, "tif"):
        (root / "train_mask").mkdir(exist_ok=True)
        write_tif(root / "train_mask" / path.name, np.eye(128, dtype=np.uint8))


def headers(folder):
    for path in sorted(folder.iterdir()):
        images.header(path)


def copies(folder):
    files = sorted(folder.iterdir())
    folds.leak_warnings(files[::2], files[1::2])


def assign(count):
    folds.assign(list(range(count)), [0.2] * 5, strata=[i * 7919 % 26 for i in range(count)])


def order(count):
    next(iter(loader.EpochBatches(10 * count, 64)))


def precision(count):
    rng, metric = np.random.default_rng(0), DetectionAP(14, max_det=300)
    for _ in range(count):
        corner, size = rng.uniform(0, 500, (307, 2)), np.exp(rng.uniform(2, 6, (307, 2)))
        corner[7:107], size[7:107] = corner[np.arange(100) % 7] + rng.normal(0, 3, (100, 2)), size[np.arange(100) % 7]
        label = np.append(np.arange(7) % 14, np.arange(300) % 7)
        rows = torch.from_numpy(np.column_stack((corner, corner + size, rng.random(307), label)))
        metric.update([rows[7:]], [rows[:7, [0, 1, 2, 3, 5]]])
    began = time.process_time()
    metric.compute(), metric.best_threshold()
    return time.process_time() - began


def scene(path, width, **options):
    """Ten bands of uint16, 512 rows, compressed."""
    rows = np.cumsum(np.random.default_rng(0).integers(-3, 4, (10, 512, width)), 2).astype(np.uint16)
    write_tif(path, rows, compress="deflate", **options)


def windows(path):
    for y, x in places(plan(*images.size(path)[1:], 256, 0.5)):
        images.read(path, window=(y, x, 256, 256))


def boxes(count):
    rng, files = np.random.default_rng(0), [Path(f"{i:06}.jpg") for i in range(count)]
    rows = [torch.from_numpy(np.column_stack((rng.uniform(0, 700, (300, 4)), rng.random(300), np.arange(300) % 14))).float()
            for _ in files]
    submissions.write_boxes(Path(f"boxes{count}"), files, [(720, 1280)] * count, rows, ids=list(range(count)),
                            category_ids=list(range(1, 15)), max_mb=20)


def outlines(folder):
    with rasterio.open(folder / "noise.tif") as mask:
        masks.write_polygons(folder / "noise.geojson", mask)


def measured(function, *args):
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    inner = function(*args)
    seconds = inner if isinstance(inner, float) else time.process_time() - began
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=50000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for n, samples in ((args.images // 4, args.samples // 4), (args.images, args.samples)):
            root = Path(f"size{n}").absolute()
            parking(root / "lot", n), tiles(root / "tiles", n)
            work = {"labels, first": (labels.read, root / "lot"), "labels, again": (labels.read, root / "lot"),
                    "copies of JPEG, first": (copies, root / "lot/train/images"),
                    "copies of JPEG, again": (copies, root / "lot/train/images"),
                    "seg.read, first": (seg.read, root / "tiles"), "seg.read, again": (seg.read, root / "tiles")}
            for suffix in ("png", "jpg", "tif"):
                pictures(root / suffix, n, suffix, 32)
                work[f"headers of {suffix}"] = headers, root / suffix
            scene(root / "tiles.tif", 8 * n, tiled=True, blockxsize=256, blockysize=256)
            scene(root / "strips.tif", 8 * n)
            write_tif(root / "noise.tif", np.random.default_rng(0).integers(0, 2, (256, n), np.uint8))
            work |= {"windows of a scene, tiled": (windows, root / "tiles.tif"),
                     "windows of a scene, strips": (windows, root / "strips.tif"),
                     "detections written, 300 per image": (boxes, n), "outlines of noise": (outlines, root)}
            work |= {"folds.assign": (assign, samples), "EpochBatches, repeat 10": (order, samples),
                     "DetectionAP, both": (precision, n)}
            for name, (function, argument) in work.items():
                with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
                    size = samples if isinstance(argument, int) and argument == samples else n
                    rows.setdefault(name, []).append((size, *pool.submit(measured, function, argument).result()))
    print("| what | items | CPU s | MB | exponent |\n|---|---|---|---|---|")
    for name, ((few, short, _), (many, long, memory)) in rows.items():
        print(f"| {name} | {many:,} | {long:.2f} | {memory:.0f} | {math.log(long / short) / math.log(many / few):.2f} |")


if __name__ == "__main__":
    main()
