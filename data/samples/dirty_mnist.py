"""Dirty-MNIST, second edition (DACON 2021): 10 to 14 different capital letters in heavy noise, made to order.

    python -m data.samples.dirty_mnist --letters resources/mnist_data/train.csv --out resources/dirty_mnist_2nd --num 350000
    python -m data.samples.dirty_mnist --letters resources/mnist_data/test.csv --rows=-3000: --num 5000 \
        --out resources/val_dirty_mnist_2nd

Writes OUT/100000.png ... and adds their rows to OUT_answer.csv (index, a ... z). The same flags after a stop go on
where it was. An image depends on (seed, index), the letters and the other flags alone: not on --workers, not on --num.
`Synthetic` makes such images while a net trains: never one twice, and none on the disk.
"""
import argparse
import contextlib
import csv
import functools
import json
import multiprocessing
import os
import signal
import string
import struct
import zlib
from concurrent import futures

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.samples import glyphs
from utils.train.args import int_range
from utils.errors import Parser, UserError, cli
from utils.files import whole_file, write_csv

SIDE, LARGEST = 28, 79  # of a glyph; of the box around one turned by 45 degrees and doubled
STREAM = 26             # ends the seeds: augmentation, seeded with (seed, epoch, index), shall draw other numbers
BLOCK = 16              # images made at once: so few stay in the processor's cache
HEADER = ["index", *string.ascii_lowercase]
PLACED = np.dtype([(name, np.int64) for name in ("image", "letter", "glyph", "side", "x", "y")]
                  + [(name, np.float64) for name in ("angle", "scale", "factor")])


class Synthesizer:
    """The competition's recipe. pixels (N, 28, 28) uint8 and letters (N,) 0..25 are those of `glyphs.read`.

    size: pixels a side; counts: fewest and most letters; noise: the background is whole, 0..noise inclusive, uniform.
    The letters are the same on every device; the noise of a GPU is its own, that of all CPUs is the same.
    Raises UserError when a letter has no glyph, or for numbers out of range.
    """

    def __init__(self, pixels, letters, *, size=256, counts=(10, 14), noise=254, device="cpu"):
        if size < LARGEST or not 1 <= counts[0] <= counts[1] <= 26 or not 0 <= noise <= 255:
            raise UserError(f"--size {size} --letters-per-image {counts[0]} {counts[1]} --noise {noise}: at least "
                            f"{LARGEST}, two numbers from 1 to 26 in order, and 0 to 255, please")
        self.have = np.bincount(letters, minlength=26)
        if not self.have.all():
            missing = "".join(string.ascii_uppercase[i] for i in np.flatnonzero(self.have == 0))
            raise UserError(f"the letters given have no {missing}; give a file with all of A to Z")
        self.first = self.have.cumsum() - self.have
        bright = np.minimum(2 * pixels[np.argsort(letters, kind="stable")].astype(np.int64), 255).astype(np.uint8)
        self.pixels = torch.from_numpy(bright)[:, None].to(device)
        self.size, self.counts, self.noise, self.device = size, tuple(counts), noise, torch.device(device)

    def draw(self, keys, seed):
        """What is to be seen -> (table with a row of PLACED per letter, a random generator per image for its noise).

        keys: per image a whole number, or several, such as (epoch, index). glyph: index among the sorted glyphs; x, y,
        side: the box, in pixels; angle: degrees counter-clockwise.
        """
        rngs, chosen, random = [], [], []
        for key in keys:
            key = key if isinstance(key, (tuple, list)) else (key,)
            rng = np.random.default_rng((seed, *key, STREAM))
            count = rng.integers(self.counts[0], self.counts[1] + 1)
            chosen.append(rng.permutation(26)[:count])
            random.append(rng.random((7, count)))
            rngs.append(rng)
        letter, u = np.concatenate(chosen), np.concatenate(random, 1)
        table = np.empty(len(letter), PLACED)
        table["image"], table["letter"] = np.repeat(np.arange(len(keys)), [len(c) for c in chosen]), letter
        table["glyph"] = self.first[letter] + (u[0] * self.have[letter]).astype(int)
        table["angle"], table["scale"] = 360 * u[1], 1 + u[2]
        turn = np.radians(table["angle"])
        table["side"] = SIDE * table["scale"] * (abs(np.cos(turn)) + abs(np.sin(turn)))  # rounded down
        table["factor"] = np.where(u[3] < .3, .3 + .4 * u[4], 1)
        for name, v in (("x", u[5]), ("y", u[6])):
            table[name] = v * (self.size - table["side"] + 1)
        return table, rngs

    def labels(self, keys, seed):
        """-> (B, 26) float32 of 0 and 1, those of `batch`, without the work for the images."""
        return self._labels(self.draw(keys, seed)[0], len(keys))

    def batch(self, keys, seed):
        """-> images (B, 1, size, size) uint8 and labels (B, 26) float32, on the device; keys as in `draw`.

        Every letter is rounded before it is added: whole numbers have the same sum in any order, so that an image
        does not depend on the batch that it is made in.
        """
        table, rngs = self.draw(keys, seed)
        canvas = self._noise(rngs)
        # letters of about one size together: a box that fits all of them is then hardly too large for most; and so few
        # that a CPU keeps them in its cache
        parts = len(table) // 50 + 1 if self.device.type == "cpu" else 4
        for part in np.array_split(table[np.argsort(table["side"], kind="stable")], min(parts, len(table))):
            self._add(canvas, part)
        images = canvas.clamp_(max=255).byte().view(len(keys), 1, self.size, self.size)
        return images, self._labels(table, len(keys)).to(self.device)

    def one(self, key, seed):
        """-> image (1, size, size) uint8 and label (26,) float32."""
        images, labels = self.batch([key], seed)
        return images[0], labels[0]

    @staticmethod
    def _labels(table, count):
        labels = torch.zeros(count, 26)
        labels[table["image"], table["letter"]] = 1
        return labels

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
        for row, rng in zip(noise, rngs):  # rng.integers(0, 255, count) is the same and takes ten times as long
            row[:] = np.frombuffer(rng.bytes(count), np.uint8)
            over = np.flatnonzero(row > self.noise)
            row[over] = rng.integers(0, self.noise + 1, len(over), np.uint8)
        return torch.from_numpy(noise).view(-1).float()

    def _add(self, canvas, table):
        """Adds the letters of a table to images (B * size * size,), in place."""
        turn, half_glyphs = np.radians(table["angle"]), SIDE / 2 * table["scale"]
        cos, sin = np.cos(turn) / half_glyphs, np.sin(turn) / half_glyphs
        real = torch.from_numpy(np.stack((cos, sin, table["side"] / 2, table["factor"]))).float().to(self.device)
        whole = torch.from_numpy(np.stack([table[name] for name in ("glyph", "image", "x", "y")])).to(self.device)
        cos, sin, half, factor = real[..., None]
        glyph, image, x, y = whole[..., None]
        steps = torch.arange(int(table["side"].max()), device=self.device)
        # from the centre of the box to its pixels; what lies beyond the box is sampled so far off that it is black
        away = torch.where(steps < 2 * half, steps + .5 - half, 1e4)[..., None]
        right, down = torch.stack((cos, sin), -1), torch.stack((-sin, cos), -1)
        grid = (away * right)[:, None] + (away * down)[:, :, None]
        values = F.grid_sample(self.pixels[glyph[:, 0]].float(), grid, align_corners=False)[:, 0]
        column, row = ((start + steps).clamp(max=self.size - 1) for start in (x, y))
        index = ((image * self.size + row) * self.size)[..., None] + column[:, None]
        canvas.scatter_add_(0, index.view(-1), values.mul_(factor[..., None]).round_().view(-1))


class Synthetic(torch.utils.data.Dataset):
    """Dirty-MNIST without end, as a data set of `length` images an epoch, each seen once and never again.

    data[(epoch, index)] -> {"image": (1, size, size) uint8, "label": (26,) float32}; data[index] is the image that
    the command writes for this seed and index. letters: a file, see `glyphs.read`; the rest: see Synthesizer.
    """

    def __init__(self, letters, length, *, seed=0, **recipe):
        self.length, self.seed = length, seed
        self.synthesizer = Synthesizer(*glyphs.read(letters), **recipe)

    def __len__(self):
        return self.length

    def __getitem__(self, key):
        return self.__getitems__([key])[0]

    def __getitems__(self, keys):  # a DataLoader asks for a batch at once if it can
        return [{"image": image, "label": label} for image, label in zip(*self.synthesizer.batch(keys, self.seed))]


# ---- the files -----------------------------------------------------------------------------------------------------
def _chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_parts(image, text):
    """Grey image (H, W) uint8 array -> (first bytes, the rest) of a PNG, uncompressed: noise does not get smaller.

    The first bytes hold the size and the comment. libpng takes 60 times as long, as it tries its filters on every row.
    """
    height, width = image.shape
    rows = np.zeros((height, 1 + width), np.uint8)  # each begins with its filter: none
    rows[:, 1:] = image
    head = (b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
            + _chunk(b"tEXt", b"Comment\0" + text.encode("latin-1")))
    return head, _chunk(b"IDAT", zlib.compress(rows, 0)) + _chunk(b"IEND", b"")


def write(synthesizer, out, num, *, start=100_000, seed=0, digits=6, workers=0):
    """Writes images start ... start + num - 1 to `out`/{index}.png, and their labels among the rows of
    `out`_answer.csv. Returns the latter's name.

    Files that are there and complete are kept: a stopped run goes on. Each appears whole or not at all.
    workers: processes; 0 writes in this one. UserError: what cannot be written, or is there from another recipe.
    """
    s, answers = synthesizer, f"{os.path.normpath(out)}_answer.csv"
    letters = zlib.crc32(s.pixels.cpu().numpy().tobytes() + s.have.tobytes())
    recipe = {"seed": seed, "counts": s.counts, "noise": s.noise, "letters": f"{letters:08x}"}
    others = _other_rows(answers, start, start + num)  # read before an hour's work, not after
    job = functools.partial(_write_block, s, out, seed=seed, digits=digits, text=json.dumps(recipe))
    blocks = [range(i, min(i + BLOCK, start + num)) for i in range(start, start + num, BLOCK)]
    rows = []
    with contextlib.closing(_run(job, blocks, workers)) as done, \
            tqdm(total=num, desc=str(out), unit="image", disable=None) as bar:
        for block, labels in zip(blocks, done):
            rows += [[index, *label] for index, label in zip(block, labels)]
            bar.update(len(block))
    write_csv(answers, HEADER, [*others, *rows])
    return answers


def _write_block(synthesizer, out, indices, *, seed, digits, text):
    """Writes those of the images that are missing. -> all of their labels, a list of 26 for each."""
    paths = {i: os.path.join(out, f"{i:0{digits}d}.png") for i in indices}
    head, _ = png_parts(np.empty((synthesizer.size,) * 2, np.uint8), text)
    missing = [i for i, path in paths.items() if not _complete(path, head)]
    if missing:
        for i, image in zip(missing, synthesizer.batch(missing, seed)[0].cpu().numpy()):
            with whole_file(paths[i]) as new:
                new.write_bytes(b"".join(png_parts(image[0], text)))
    return synthesizer.labels(indices, seed).int().tolist()


def _complete(path, head):
    """Whether the file is there to its end. UserError if it begins with another head."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the folder") from None
    if content[:len(head)] != head[:len(content)]:
        raise UserError(f"{path}: is there, but made with other letters or flags; choose another --out or "
                        f"--start-index")
    return content.endswith(_chunk(b"IEND", b""))


def _other_rows(path, start, stop):
    """The rows of an answer file whose indices are not start ... stop - 1: the competition's own, for instance."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
        if rows[0] == HEADER and {len(row) for row in rows} == {len(HEADER)}:
            return [row for row in rows[1:] if not start <= int(row[0]) < stop]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, IndexError, csv.Error):
        pass
    raise UserError(f"{path}: is there, but no table of index and a to z; move it away or choose another --out")


def _run(job, inputs, workers):
    """Yields job(input) for each, in order, from so many processes; with 0 from this one."""
    global _job
    if not workers:
        yield from map(job, inputs)
        return
    _job = job  # forked processes have it too: nothing is sent to them but their inputs
    executor = futures.ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _deaf)
    try:
        yield from executor.map(_call, inputs)
    except futures.process.BrokenProcessPool:
        raise UserError("a process has died, out of memory perhaps; lower --workers; run again: it goes on") from None
    finally:
        executor.shutdown(cancel_futures=True)  # what has begun is written to its end


def _call(value):
    return _job(value)


def _deaf():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the first one decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


def _rows(text, path):
    """"-3000:" -> slice(-3000, None)."""
    try:
        start, stop = (int(part) if part else None for part in text.split(":"))
        return slice(start, stop)
    except ValueError:
        raise UserError(f"--rows {text}: no part of {path}; write 0:3000, or --rows=-3000: for the last ones") from None


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--letters", metavar="FILE", help="the competition's CSV or EMNIST's idx, or .gz (default: letters of a font)")
    add("--rows", default=":", metavar="A:B", help="only these letters of the file, as Python slices a list")
    add("--out", required=True, metavar="DIR")
    add("--num", type=int_range(1), default=350_000, metavar="N", help="images (default: 350000)")
    add("--start-index", type=int_range(0), default=100_000, metavar="N", help="name of the first (default: 100000)")
    add("--size", type=int_range(LARGEST, 4096), default=256, metavar="N", help="pixels a side (default: 256)")
    add("--letters-per-image", type=int_range(1, 26), nargs=2, default=(10, 14), metavar="N", help="default: 10 14")
    add("--noise", type=int_range(0, 255), default=254, metavar="N", help="its largest value (default: 254)")
    add("--seed", type=int_range(0), default=0, metavar="N", help="other seeds, other images (default: 0)")
    add("--workers", type=int_range(0), default=os.cpu_count(), metavar="N", help="processes (default: one a core)")
    flags = vars(parser.parse_args())
    rows = _rows(flags["rows"], flags["letters"])
    pixels, letters = (array[rows] for array in glyphs.read(flags["letters"]))
    synthesizer = Synthesizer(pixels, letters, size=flags["size"], counts=flags["letters_per_image"],
                              noise=flags["noise"])
    print(write(synthesizer, flags["out"], flags["num"], start=flags["start_index"], seed=flags["seed"],
                workers=flags["workers"]))


if __name__ == "__main__":
    cli(main)
