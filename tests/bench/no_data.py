"""Pixels without data, and bands in units of their own: the figures of "Data as people have it" in docs/results.md.

    python -m tests.bench.no_data --data W --out runs/no_data      # W: tiles in the wildfire layout with groups.csv
    python -m tests.bench.no_data --units --out runs/no_data       # synthetic tiles of reflectance, heights, decibels

Runs that are there already are not run again.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import rasterio
import torch
from rasterio.transform import from_origin

import nets
from data import images, seg
from utils.metrics.segmentation import BinaryIoU
from utils.ops import decide
from utils.train import checkpoint

RECIPE = ("--bands 1-7 --pixel-scale 10000 --imgsz 64 --bs 8 --epochs 8 --repeat 1 --schedule cosine "
          "--loss lovasz_elu bce=1 --gain 1 --decoder 64 48 32 16")
UNITS = "--bands all --imgsz 96 --bs 8 --epochs 12 --repeat 2 --schedule cosine"


def with_holes(source, target, empty=65535):
    """Copies tiles; a third of each, at a random side, becomes `empty`, which the copy declares as no data."""
    rng = np.random.default_rng(0)
    (target / "train_img").mkdir(parents=True)
    for path in sorted((source / "train_img").iterdir()):
        with rasterio.open(path) as file:
            image, profile = file.read(), file.profile
        side, third = rng.integers(4), image.shape[1] // 3
        image[[np.s_[:, :third], np.s_[:, -third:], np.s_[:, :, :third], np.s_[:, :, -third:]][side]] = empty
        profile.update(nodata=empty)
        with rasterio.open(target / "train_img" / path.name, "w", **profile) as file:
            file.write(image)
    shutil.copytree(source / "train_mask", target / "train_mask")
    shutil.copy(source / "groups.csv", target)


def write_units(target, count=40, side=96):
    """Tiles of two bands of reflectance, a height model in metres and decibels; objects differ in all but the heights.
    The first five columns are -9999 and declared as no data."""
    rng = np.random.default_rng(0)
    for folder in ("train_img", "train_mask"):
        (target / folder).mkdir(parents=True)

    def smooth(width, spread):
        noise = np.pad(rng.normal(size=(side, side)), width // 2, mode="reflect")
        return spread * np.lib.stride_tricks.sliding_window_view(noise, (width, width)).mean((2, 3))

    for i in range(count):
        mask = np.zeros((side, side), np.uint8)
        for _ in range(rng.integers(1, 4)):
            y, x = rng.integers(0, 70, 2)
            mask[y:y + rng.integers(12, 26), x:x + rng.integers(12, 26)] = 1
        noise = rng.normal(size=(3, side, side))
        image = np.stack((0.22 + smooth(9, 0.12) + 0.005 * noise[0] - 0.04 * mask,
                          0.25 + smooth(9, 0.12) + 0.005 * noise[1] + 0.04 * mask,
                          1200 + smooth(31, 4800), -15 + 2 * noise[2] - 4 * mask)).astype(np.float32)
        image[:, :, :5] = -9999
        place = dict(driver="GTiff", height=side, width=side, crs="EPSG:32652",
                     transform=from_origin(300_000 + 3000 * i, 4_000_000, 30, 30))
        with rasterio.open(target / f"train_img/train_img_{i}.tif", "w", count=4, dtype="float32", nodata=-9999,
                           **place) as file:
            file.write(image)
        with rasterio.open(target / f"train_mask/train_mask_{i}.tif", "w", count=1, dtype="uint8", **place) as file:
            file.write(mask, 1)


def train(out, name, data, flags):
    """Trains a run, unless it is there -> its folder."""
    run = out / "seg" / name
    if not (run / "results.json").exists():
        shutil.rmtree(run, ignore_errors=True)
        subprocess.run([sys.executable, "train_seg.py", "--data", str(data), "--project", str(out / "seg"), "--name", name,
                        "--workers", "0", *flags.split()], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return run


def judge(run, root):
    """-> IoU of a run on the held-out tiles of `root`, over the pixels that hold data, and how many pixels without data
    it takes for an object."""
    state = checkpoint.load(run / "last.pt")
    net, inputs = nets.build(state["arch"]), seg.Input(**state["input"])
    checkpoint.load_weights(net, state, run)
    fold_of, samples = json.loads((run / "folds.json").read_text()), seg.read(root, bands=inputs.bands)
    data = seg.SegData([pair for name, pair in zip(samples.names, samples.pairs) if fold_of[name] == 0], bands=inputs.bands)
    metric, wrong = BinaryIoU(seg.IGNORE), 0
    with torch.inference_mode():
        for i in range(len(data)):
            raw, mask = data[i]["image"][None], data[i]["mask"][None]
            probs = decide.background(decide.segment(net.eval(), inputs(raw)), images.void(raw))
            metric.update(probs, mask)
            wrong += int((decide.masks(probs)[raw.isnan().all(1)] > 0).sum())
    return metric.compute()["iou"], wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--units", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/no_data"))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    if args.units:
        root = args.out / "units"
        root.exists() or write_units(root)
        for scale in ("standard", "1"):
            iou, wrong = judge(train(args.out, f"units_{scale}", root, f"{UNITS} --pixel-scale {scale}"), root)
            print(f"--pixel-scale {scale}: IoU {iou:.4f}, {wrong} pixels without data are objects")
    for seed in range(args.seeds if args.data else 0):
        holes = args.out / "holes"
        holes.exists() or with_holes(args.data, holes)
        for name, root in (("whole", args.data), ("holes", holes)):
            run = train(args.out, f"{name}{seed}", root, f"{RECIPE} --groups {root}/groups.csv --seed {seed}")
            iou, wrong = judge(run, holes)
            print(f"seed {seed}, trained on {name}: IoU {iou:.3f}, {wrong} pixels without data are objects")


if __name__ == "__main__":
    main()
