"""Detection: our mosaics against those of a pipeline built on OpenCV, images per second of one process.

    python -m tests.bench.det_loader [--data DATA] [--samples 64] [--bs 16] [--rounds 5]

Both go from files, or from images kept in RAM, to the batch that a net gets: float RGB in 0..1, mosaics of four under
a random zoom, shift and flip, colours changed. OpenCV's: every image resized to the long side, four on a canvas of
twice the size, that warped to the size, hues by a table; it keeps the resized images in RAM, we those that are
at most half as large again, what the largest zoom shows.
One thread each, in turn, `rounds` times; the fastest round counts, in seconds of the processor: others may share it.
"bytes": from files to a batch of bytes, which loader workers do; "float": from there to the net's input, which the
device does, here the same thread. Without --data: 640 x 480 JPEGs of noise.
"""
import argparse
import tempfile
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from data import augment, det, labels
from tests.bench.timing import loading_round
from utils.train import dist

CASES = [(640, None), (640, "ram"), (320, "ram")]


class OpenCVMosaics:
    def __init__(self, files, boxes, classes, sizes, *, imgsz, cache):
        self.files, self.imgsz, self.sizes = files, imgsz, sizes
        self.labels = [np.concatenate((c[:, None], b), 1).astype(np.float32) for b, c in zip(boxes, classes)]
        self.kept = [self.resized(i) for i in range(len(files))] if cache else None

    def resized(self, i):
        image = cv2.imread(str(self.files[i]))
        factor = self.imgsz / max(image.shape[:2])
        size = [round(side * factor) for side in image.shape[1::-1]]
        return image if factor == 1 else cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)

    def __getitem__(self, key):
        rng, s = np.random.default_rng(key), self.imgsz
        canvas = np.full((2 * s, 2 * s, 3), 114, np.uint8)
        cx, cy = rng.integers(s // 2, s * 3 // 2, 2)
        rows = []
        for place, k in enumerate([key[1], *rng.integers(len(self.files), size=3)]):
            image = self.kept[k] if self.kept else self.resized(k)
            h, w = image.shape[:2]
            x, y = cx - w * (place % 2 == 0), cy - h * (place < 2)
            x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, 2 * s), min(y + h, 2 * s)
            canvas[y1:y2, x1:x2] = image[y1 - y:y2 - y, x1 - x:x2 - x]
            moved = self.labels[k].copy()
            moved[:, 1:] = moved[:, 1:] * (max(h, w) / max(self.sizes[k])) + (x, y, x, y)
            rows.append(moved)
        zoom = rng.uniform(0.5, 1.5)
        shift = s * (0.5 + rng.uniform(-0.1, 0.1, 2)) - zoom * s
        matrix = np.array([[zoom, 0, shift[0]], [0, zoom, shift[1]]])
        image = cv2.warpAffine(canvas, matrix, (s, s), borderValue=[114] * 3)
        rows = np.concatenate(rows)
        before = rows[:, 1:].clip(0, 2 * s) * zoom + np.tile(shift, 2)
        after = before.clip(0, s)
        keep = augment.visible(before, after)
        rows = np.concatenate((rows[keep, :1], after[keep]), 1).astype(np.float32)
        image = recolour_by_table(rng, image)
        if rng.random() < 0.5:
            image = cv2.flip(image, 1)
            rows[:, [1, 3]] = s - rows[:, [3, 1]]
        image = np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1))
        return torch.from_numpy(image), torch.from_numpy(rows)


def recolour_by_table(rng, image, gains=(0.015, 0.7, 0.4)):
    hue, saturation, value = 1 + rng.uniform(-1, 1, 3) * gains
    bands, steps = cv2.split(cv2.cvtColor(image, cv2.COLOR_BGR2HSV)), np.arange(256)
    tables = steps * hue % 180, (steps * saturation).clip(0, 255), (steps * value).clip(0, 255)
    bands = [cv2.LUT(band, table.astype(np.uint8)) for band, table in zip(bands, tables)]
    return cv2.cvtColor(cv2.merge(bands), cv2.COLOR_HSV2BGR)


def opencv_collate(samples):
    images, rows = zip(*samples)
    return torch.stack(images), torch.cat([torch.nn.functional.pad(r, (1, 0), value=i) for i, r in enumerate(rows)])


def opencv_inputs(batch):
    return batch[0].float() / 255


def our_inputs(batch):
    """As in train_det.py, where the device does it; here it is the same thread."""
    return augment.recolour(batch["image"], batch["colour"], 255.0)


def noise(folder, count=64):
    """JPEGs of smooth noise with grain, about as large as photographs -> files, boxes, classes, sizes."""
    rng = np.random.default_rng(0)
    files = [Path(folder) / f"{i}.jpg" for i in range(count)]
    for file in files:
        coarse = Image.fromarray(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8))
        coarse = coarse.resize((640, 480), Image.Resampling.BICUBIC)
        grain = rng.normal(0, 6, (480, 640, 1))
        Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(file, quality=90)
    corners = [rng.uniform(0, 400, (12, 2)) for _ in files]
    boxes = [np.concatenate((c, c + rng.uniform(10, 80, c.shape)), 1) for c in corners]
    return files, boxes, [rng.integers(3, size=12)] * count, [(480, 640)] * count


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder of train_det.py --data; without: noise")
    parser.add_argument("--samples", type=int, default=64, help="mosaics in a round")
    parser.add_argument("--bs", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    dist.keep_memory()  # as the scripts do; OpenCV gains by it as well

    with tempfile.TemporaryDirectory() as folder:
        if args.data:
            found = labels.read(args.data, cache=None)
            made = found.files, found.boxes, found.classes, found.sizes
        else:
            made = noise(folder)
        size = sum(file.stat().st_size for file in made[0]) / len(made[0])
        print(f"{len(made[0])} files, {size / 1000:.0f} kB each, batch {args.bs}, torch {torch.__version__}, "
              f"OpenCV {cv2.__version__}")
        for imgsz, cache in CASES:
            runs = {"OpenCV": (OpenCVMosaics(*made, imgsz=imgsz, cache=cache), opencv_collate, opencv_inputs),
                    "ours": (det.DetData(*made, bands=[1, 2, 3], imgsz=imgsz, cache=cache), det.collate, our_inputs)}
            best = {name: (float("inf"), 0, 0) for name in runs}
            for i in range(args.rounds + 1):
                for name, run in runs.items():
                    taken = loading_round(*run, [k % len(made[0]) for k in range(args.samples)], args.bs)
                    best[name] = min(best[name], taken) if i else best[name]  # the first one warms up
            for name, (total, load, inputs) in best.items():
                ratio, ratio_load = (old / new for old, new in zip(best["OpenCV"], (total, load)))
                print(f"{imgsz} px from {'RAM' if cache else 'disk'}, {name}: {1 / total:.1f} img/s, ratio {ratio:.2f} "
                      f"(bytes {1000 * load:.1f} ms, ratio {ratio_load:.2f}; float {1000 * inputs:.1f} ms)", flush=True)


if __name__ == "__main__":
    main()
