"""Dirty-MNIST images, files and all, a second and core: data/samples/dirty_mnist.py against a loop as one writes it.

    OMP_NUM_THREADS=1 taskset -c 1 python -m tests.bench.synth_speed [--letters FILE] [--rounds 5] [--device cuda]

The loop: a table of whole numbers as pandas reads it; for every letter of every image, all rows of that letter are
taken, one of them is drawn, turned by Pillow (OpenCV if it is installed) and added; Pillow (OpenCV) writes the PNG.
Ours: the command with one process. Both in turn, `rounds` times, in CPU seconds; the fastest round counts: noise only
adds. With --device cuda also images without files, on the device, in seconds of the clock.
"""
import argparse
import math
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.samples import glyphs
from data.samples.dirty_mnist import Synthesizer, write

try:
    import cv2
except ImportError:
    cv2 = None


def turned(glyph, angle, scale):
    """uint8 (28, 28) -> turned and scaled, in a box that just holds it."""
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    side = int(28 * scale * (abs(c) + abs(s)))
    if cv2:
        matrix = cv2.getRotationMatrix2D((14, 14), angle, scale)
        matrix[:, 2] += side / 2 - 14
        return cv2.warpAffine(glyph, matrix, (side, side))
    c, s = c / scale, s / scale
    back = (c, -s, 14 - (c - s) * side / 2, s, c, 14 - (s + c) * side / 2)
    return np.asarray(Image.fromarray(glyph).transform((side, side), Image.Transform.AFFINE, back,
                                                       Image.Resampling.BILINEAR))


def loop(table, letters, out, num, rng):
    for i in range(num):
        canvas = rng.integers(0, 255, (256, 256))
        for letter in rng.choice(26, rng.integers(10, 15), replace=False):
            rows = table[letters == letter]
            glyph = rows[rng.integers(len(rows))].reshape(28, 28)
            glyph = turned(np.clip(2 * glyph, 0, 255).astype(np.uint8), rng.uniform(0, 360), rng.uniform(1, 2))
            if rng.random() < .3:
                glyph = glyph * rng.uniform(.3, .7)
            side = len(glyph)
            y, x = rng.integers(0, 257 - side, 2)
            canvas[y:y + side, x:x + side] += glyph.astype(int)
        picture, path = canvas.clip(0, 255).astype(np.uint8), os.path.join(out, f"{i:06d}.png")
        cv2.imwrite(path, picture) if cv2 else Image.fromarray(picture).save(path)


def clock(function, rounds_clock=time.process_time):
    start = rounds_clock()
    function()
    return rounds_clock() - start


def on_device(synthesizer, num=4096, batch=256):
    def run():
        for start in range(0, num, batch):
            synthesizer.batch(range(start, start + batch), 0)
        torch.cuda.synchronize()
    run()
    return num / min(clock(run, time.perf_counter) for _ in range(3))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--letters", help="a file of letters (default: a font's)")
    parser.add_argument("--count", type=int, default=20_000, help="letters in the table (repeated if need be)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    pixels, letters = (np.resize(array, (args.count, *array.shape[1:])) for array in glyphs.read(args.letters))
    table, synthesizer = pixels.reshape(len(pixels), -1).astype(np.int64), Synthesizer(pixels, letters)
    best = {"loop": math.inf, "ours": math.inf, "no files": math.inf}
    for k in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            rng = np.random.default_rng(k)
            jobs = {"loop": (8, lambda: loop(table, letters, folder, 8, rng)),
                    "ours": (320, lambda: write(synthesizer, Path(folder) / "ours", 320, seed=k)),
                    "no files": (320, lambda: [synthesizer.batch(range(i, i + 16), k) for i in range(0, 320, 16)])}
            for name, (num, job) in jobs.items():
                best[name] = min(best[name], clock(job) / num)
    print(f"{'OpenCV' if cv2 else 'Pillow'}, {args.count} letters, images per CPU second:",
          ", ".join(f"{name} {1 / seconds:.1f}" for name, seconds in best.items()))
    print(f"files: {best['loop'] / best['ours']:.0f} times as fast as the loop")
    if args.device != "cpu":
        print(f"{args.device}: {on_device(Synthesizer(pixels, letters, device=args.device)):.0f} images a second")


if __name__ == "__main__":
    main()
