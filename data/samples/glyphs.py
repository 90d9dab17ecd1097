"""Glyphs, pictures of single capital letters: from the competition's CSV, or a font."""
import csv
import gzip
import string
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from utils.errors import UserError
from utils.files import reading
from utils.pictures.sheets import font

SIDE = 28
LETTERS = list(string.ascii_uppercase)
COLUMNS = [str(i) for i in range(SIDE * SIDE)]


def read(path=None):
    """Pictures of single letters, white on black -> pixels uint8 (N, 28, 28), letters int64 (N,): 0 is A, 25 is Z.

    path: the competition's CSV, with a column letter and, at the end, the columns 0 ... 783 (train.csv has id and digit
    before them, test.csv id); it may be gzipped. None: 100 glyphs of each letter from `render`.
    Raises UserError for other files and for damaged ones.
    """
    if path is None:
        return render(100)
    names, *lines = _rows(path) or [[]]
    before = len(names) - len(COLUMNS)
    if "letter" not in names[:max(before, 0)] or names[before:] != COLUMNS:
        raise UserError(f"{path}: the columns are not letter and, at the end, 0 to 783; give the competition's CSV of "
                        f"letters")
    pixels, letters = [], []
    for number, row in enumerate(lines, 2):
        if not row:
            continue
        try:
            letters.append(LETTERS.index(row[names.index("letter")].strip()))
            pixels.append(np.array(row[before:], np.uint8).reshape(SIDE, SIDE))
        except (ValueError, IndexError, OverflowError):
            raise UserError(f"{path}: line {number} is not {', '.join(names[:before])} (from A to Z) and 784 whole "
                            f"numbers from 0 to 255; correct or remove it") from None
    if not letters:
        raise UserError(f"{path}: contains no letters; fetch or write it again")
    return np.array(pixels), np.array(letters, np.int64)


def _rows(path):
    with reading(path):
        content = Path(path).read_bytes()
    try:
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        return list(csv.reader(content.decode("utf-8-sig", errors="replace").splitlines()))
    except (EOFError, zlib.error, gzip.BadGzipFile, csv.Error):
        raise UserError(f"{path}: damaged, or not a CSV; fetch or write it again") from None


def render(count, *, seed=0):
    """Letters of Pillow's own font in several sizes and stroke widths, randomly turned and shifted.

    `count` of each letter -> pixels uint8 (26 * count, 28, 28), letters int64 (26 * count,), in random order. Glyph k
    of a letter depends on (seed, k) alone.
    """
    pixels = []
    for k in range(count):
        rng = np.random.default_rng((seed, k))
        for letter in LETTERS:
            canvas, size = Image.new("L", (4 * SIDE, 4 * SIDE)), int(rng.integers(88, 105))
            ImageDraw.Draw(canvas).text(2 * SIDE + rng.uniform(-6, 6, 2), letter, 255, font(size), "mm",
                                        stroke_width=int(rng.integers(4)))
            pixels.append(np.asarray(canvas.rotate(rng.normal(0, 8), Image.Resampling.BICUBIC).reduce(4)))
    order = np.random.default_rng(seed).permutation(26 * count)
    return np.stack(pixels)[order], np.tile(np.arange(26), count)[order]
