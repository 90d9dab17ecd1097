"""Dirty-MNIST, second edition (DACON 2021): synthetic images of 10 to 14 different capital letters in heavy noise.

    python -m data.samples.dirty_mnist --letters resources/mnist_data/train.csv --num 350000 \
        --out more/dirty_mnist_2nd

The command writes OUT/100000.png and so on, and at the end OUT_answer.csv (index, a ... z). An image depends only on
(seed, index), on the letters and on the flags of the recipe, not on --num. `Synthetic` makes such images during
training: every image is new, and no image is written to disk.
"""
import argparse
import os
import string

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import trange

from data.samples import glyphs
from utils.errors import Parser, UserError, cli
from utils.files import check_absent, whole_folder, write_csv
from utils.train.args import int_range

SIDE, LARGEST = 28, 79  # pixels: side of a glyph; side of the box around a glyph turned by 45 degrees and doubled
STREAM = 26             # ends the seeds: the augmentation, seeded with (seed, epoch, index), draws other numbers
BLOCK = 16              # images made at once: few enough for the processor's cache
HEADER = ["index", *string.ascii_lowercase]
PLACED = np.dtype([(name, np.int64) for name in ("image", "letter", "glyph", "side", "x", "y")]
                  + [(name, np.float64) for name in ("angle", "scale", "factor")])


class Synthesizer:
    """The competition's recipe for images.

    pixels (N, 28, 28) uint8 and letters (N,) 0..25: the glyphs, as returned by `glyphs.read`. size: image side in
    pixels, at least LARGEST. counts: smallest and largest number of letters in an image, 1 to 26. noise: the background
    is uniform in 0..noise, inclusive, whole numbers. The letters are the same on every device; the noise is the same
    on all CPUs, and differs on a GPU. Raises UserError if a letter has no glyph.
    """

    def __init__(self, pixels, letters, *, size=256, counts=(10, 14), noise=254, device="cpu"):
        if counts[0] > counts[1]:
            raise UserError(f"--letters-per-image {counts[0]} {counts[1]}: the smaller number comes first; turn them")
        self.available = np.bincount(letters, minlength=26)
        if not self.available.all():
            missing = "".join(string.ascii_uppercase[i] for i in np.flatnonzero(self.available == 0))
            raise UserError(f"--letters: there is no glyph of {missing}; give a file with all letters from A to Z")
        self.first = self.available.cumsum() - self.available
        bright = np.minimum(2 * pixels[np.argsort(letters, kind="stable")].astype(np.int64), 255).astype(np.uint8)
        self.pixels = torch.from_numpy(bright)[:, None].to(device)
        self.size, self.counts, self.noise, self.device = size, tuple(counts), noise, torch.device(device)

    def draw(self, keys, seed):
        """Draws what images show -> (table with a row of PLACED for each letter, labels as in `batch`, on the CPU, and
        for each image a random generator for its noise).

        keys: for each image a whole number, or several, such as (epoch, index). Columns: glyph is the index among the
        glyphs sorted by letter; x, y, side: the letter's box in pixels; angle: degrees counter-clockwise; factor: of
        the brightness.
        """
        rngs = [np.random.default_rng((seed, *np.atleast_1d(key), STREAM)) for key in keys]
        chosen, random = [], []
        for rng in rngs:
            count = rng.integers(self.counts[0], self.counts[1] + 1)
            chosen.append(rng.permutation(26)[:count])
            random.append(rng.random((7, count)))
        letter, u = np.concatenate(chosen), np.concatenate(random, 1)
        image = np.repeat(np.arange(len(keys)), [len(c) for c in chosen])
        glyph = self.first[letter] + np.floor(u[0] * self.available[letter])
        angle, scale, factor = 360 * u[1], 1 + u[2], np.where(u[3] < .3, .3 + .4 * u[4], 1)
        turn = np.radians(angle)
        side = np.floor(SIDE * scale * (abs(np.cos(turn)) + abs(np.sin(turn))))
        x, y = u[5:] * (self.size - side + 1)  # rounded down by the table
        labels = torch.zeros(len(keys), 26)
        labels[image, letter] = 1
        return np.rec.fromarrays((image, letter, glyph, side, x, y, angle, scale, factor), PLACED), labels, rngs

    def batch(self, keys, seed):
        """-> images (B, 1, size, size) uint8 and labels (B, 26) float32 of 0 and 1, on the device; keys: see `draw`.

        Every letter is rounded before it is added. A sum of whole numbers does not depend on their order, so an image
        does not depend on the other images of its batch.
        """
        table, labels, rngs = self.draw(keys, seed)
        canvas = self._noise(rngs)
        # Letters of similar size are added together, as all of them are sampled in boxes of the size of the largest
        # one; on a CPU so few at once that they stay in its cache.
        parts = len(table) // 50 + 1 if self.device.type == "cpu" else 4
        for part in np.array_split(table[np.argsort(table["side"], kind="stable")], min(parts, len(table))):
            self._add(canvas, part)
        images = canvas.clamp_(max=255).byte().view(len(keys), 1, self.size, self.size)
        return images, labels.to(self.device)

    def _noise(self, rngs):
        """-> (B * size * size,) float32 whole numbers, on the device."""
        count = self.size ** 2
        if self.device.type != "cpu":
            noise = torch.empty(len(rngs), count, device=self.device)
            generator = torch.Generator(self.device)
            for row, rng in zip(noise, rngs):
                row.random_(0, self.noise + 1, generator=generator.manual_seed(int(rng.integers(2 ** 63))))
            return noise.view(-1)
        noise = np.empty((len(rngs), count), np.uint8)
        for row, rng in zip(noise, rngs):  # ten times as fast as rng.integers(0, noise + 1, count)
            row[:] = np.frombuffer(rng.bytes(count), np.uint8)
            over = np.flatnonzero(row > self.noise)
            row[over] = rng.integers(0, self.noise + 1, len(over), np.uint8)
        return torch.from_numpy(noise).view(-1).float()

    def _add(self, canvas, table):
        """Adds the letters of a table to the images (B * size * size,), in place."""
        turn, half_glyphs = np.radians(table["angle"]), SIDE / 2 * table["scale"]
        cos, sin = np.cos(turn) / half_glyphs, np.sin(turn) / half_glyphs
        real = torch.from_numpy(np.stack((cos, sin, table["side"] / 2, table["factor"]))).float().to(self.device)
        whole = torch.from_numpy(np.stack([table[name] for name in ("glyph", "image", "x", "y")])).to(self.device)
        cos, sin, half, factor = real[..., None]
        glyph, image, x, y = whole[..., None]
        steps = torch.arange(int(table["side"].max()), device=self.device)
        # from the centre of the box to its pixels; pixels outside the box are sampled far outside the glyph: they are 0
        away = torch.where(steps < 2 * half, steps + .5 - half, 1e4)[..., None]
        right, down = torch.stack((cos, sin), -1), torch.stack((-sin, cos), -1)
        grid = (away * right)[:, None] + (away * down)[:, :, None]
        values = F.grid_sample(self.pixels[glyph[:, 0]].float(), grid, align_corners=False)[:, 0]
        column, row = ((start + steps).clamp(max=self.size - 1) for start in (x, y))
        index = ((image * self.size + row) * self.size)[..., None] + column[:, None]
        canvas.scatter_add_(0, index.view(-1), values.mul_(factor[..., None]).round_().view(-1))


class Synthetic(torch.utils.data.Dataset):
    """An endless Dirty-MNIST as a data set of `length` images an epoch; no image is seen twice.

    data[(epoch, index)] -> {"image": (1, size, size) uint8, "label": (26,) float32}; data[index] is the image that
    the command writes for this seed and index. letters: a file, see `glyphs.read`. recipe: see Synthesizer.
    """

    def __init__(self, letters, length, *, seed=0, **recipe):
        self.length, self.seed = length, seed
        self.synthesizer = Synthesizer(*glyphs.read(letters), **recipe)

    def __len__(self):
        return self.length

    def __getitem__(self, key):
        return self.__getitems__([key])[0]

    def __getitems__(self, keys):  # a DataLoader asks for a whole batch at once
        return [{"image": image, "label": label} for image, label in zip(*self.synthesizer.batch(keys, self.seed))]


# ---- the files -----------------------------------------------------------------------------------------------------
def write(synthesizer, out, num, *, start=100_000, seed=0, digits=6):
    """Writes images start ... start + num - 1 to `out`/{index}.png and then their labels to the table `out`_answer.csv.

    Returns the name of the table. The folder appears whole or not at all. Raises UserError if it or the table exists
    already or cannot be written.
    """
    answers, rows, stop = f"{os.path.normpath(out)}_answer.csv", [], start + num
    check_absent(answers)
    with whole_folder(out) as folder:
        for first in trange(start, stop, BLOCK, desc=str(out), unit=f"{BLOCK} images", disable=None):
            indices = range(first, min(first + BLOCK, stop))
            images, labels = synthesizer.batch(indices, seed)
            for i, image, label in zip(indices, images.numpy(), labels.int().tolist()):
                # not compressed, as noise cannot be
                Image.fromarray(image[0]).save(f"{folder}/{i:0{digits}d}.png", compress_level=0)
                rows.append([i, *label])
    write_csv(answers, HEADER, rows)
    return answers


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--letters", metavar="FILE", help="the competition's CSV, or .gz (default: letters of a font)")
    add("--out", required=True, metavar="DIR", help="the folder of the images")
    add("--num", type=int_range(1), default=350_000, metavar="N", help="number of images (default: 350000)")
    add("--start-index", type=int_range(0), default=100_000, metavar="N", help="index of the first (default: 100000)")
    add("--size", type=int_range(LARGEST, 4096), default=256, metavar="N", help="image side in pixels (default: 256)")
    add("--letters-per-image", type=int_range(1, 26), nargs=2, default=(10, 14), metavar="N", help="smallest and "
        "largest number of letters in an image (default: 10 14)")
    add("--noise", type=int_range(0, 255), default=254, metavar="N", help="largest value of the noise (default: 254)")
    add("--seed", type=int_range(0), default=0, metavar="N", help="another seed gives other images (default: 0)")
    args = parser.parse_args()
    synthesizer = Synthesizer(*glyphs.read(args.letters), size=args.size, counts=args.letters_per_image,
                              noise=args.noise)
    print(write(synthesizer, args.out, args.num, start=args.start_index, seed=args.seed))


if __name__ == "__main__":
    cli(main)
