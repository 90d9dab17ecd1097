"""Classification: our augmented batches against those of a pipeline built on OpenCV, images per second of one process.

    python -m tests.bench.cls_loader [--size 384] [--bs 32] [--rounds 5]

Both go from grey PNGs of 256 x 256 pixels of noise, or from images kept in RAM, to the batch that a net gets, as the
winning Dirty-MNIST system made it: resized, a quarter turn, half of the time a shift, scale and rotation (outside by
reflection), half of the time a blank square, normalised. OpenCV's resamples twice, image by image; ours once, a batch
at a time, where the net is. One thread each, in turn, `rounds` times; the fastest round counts, in seconds of the
processor: others may share it. "bytes": what loader workers do; "float": what the device does, here the same thread.
"""
import argparse
import tempfile
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from data import cls
from tests.bench.timing import loading_round
from utils.train import dist


class OpenCVViews:
    def __init__(self, files, size, keep):
        self.files, self.size = files, size
        self.kept = [cv2.imread(str(file), cv2.IMREAD_GRAYSCALE) for file in files] if keep else None

    def __getitem__(self, key):
        rng, s = np.random.default_rng(key), self.size
        image = self.kept[key[1]] if self.kept else cv2.imread(str(self.files[key[1]]), cv2.IMREAD_GRAYSCALE)
        image = np.rot90(cv2.resize(image, (s, s), interpolation=cv2.INTER_LINEAR), rng.integers(4))
        if rng.random() < 0.5:
            matrix = cv2.getRotationMatrix2D((s / 2, s / 2), rng.uniform(-15, 15), 1 + rng.uniform(-0.1, 0.1))
            matrix[:, 2] += rng.uniform(-0.0625, 0.0625, 2) * s
            image = cv2.warpAffine(image, matrix, (s, s), borderMode=cv2.BORDER_REFLECT_101)
        if rng.random() < 0.5:
            x, y = rng.integers(0, s - round(0.3 * s), 2)
            image = image.copy()
            image[y:y + round(0.3 * s), x:x + round(0.3 * s)] = 0
        return torch.from_numpy((image.astype(np.float32) / 255 - 0.5) / 0.5)[None]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=384)
    parser.add_argument("--bs", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    dist.keep_memory()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.png" for i in range(4 * args.bs)]
        for i, file in enumerate(files):
            pixels = np.random.default_rng(i).integers(0, 255, (256, 256), dtype=np.uint8)
            Image.fromarray(pixels).save(file)
        for keep in (None, "ram"):
            ours = cls.AugmentedImages(cls.Images(files, np.zeros((len(files), 26), np.float32), cache=keep), args.size)
            runs = {"OpenCV": (OpenCVViews(files, args.size, keep), torch.stack, lambda batch: batch),
                    "ours": (ours, cls.collate, lambda batch: cls.to_input(batch, args.size, 255.0, (0.5,), (0.5,)))}
            best = {name: (float("inf"), 0, 0) for name in runs}
            for i in range(args.rounds + 1):
                for name, run in runs.items():
                    taken = loading_round(*run, range(len(files)), args.bs)
                    best[name] = min(best[name], taken) if i else best[name]  # the first one warms up
            for name, (total, load, convert) in best.items():
                ratio, ratio_load = (old / new for old, new in zip(best["OpenCV"], (total, load)))
                print(f"{args.size} px from {'RAM' if keep else 'files'}, {name}: {1 / total:.0f} img/s, ratio "
                      f"{ratio:.2f} (bytes {1000 * load:.2f} ms, ratio {ratio_load:.1f}; float {1000 * convert:.2f} "
                      f"ms)", flush=True)


if __name__ == "__main__":
    main()
