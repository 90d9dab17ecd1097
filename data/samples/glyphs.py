"""Glyphs, pictures of single capital letters: from the competition's CSV, EMNIST's idx files, or a font."""
import csv
import gzip
import math
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
    before them, test.csv id); or one file of a pair of idx files, such as EMNIST's, whose names differ by images-idx3
    and labels-idx1. Files may be gzipped. None: 100 glyphs of each letter from `render`.
    Raises UserError for other files and for damaged ones.
    """
    if path is None:
        return render(100)
    content = _content(path)
    if content[:4] in (b"\0\0\x08\x03", b"\0\0\x08\x01"):
        return _read_idx(Path(path))
    return _read_csv(path, content)


def _content(path):
    with reading(path):
        content = Path(path).read_bytes()
    try:
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"{path}: damaged gzip; fetch or write it again") from None


def _read_csv(path, content):
    names, *lines = csv.reader(content.decode("utf-8-sig", errors="replace").splitlines() or [""])
    before = len(names) - len(COLUMNS)
    if "letter" not in names[:max(before, 0)] or names[before:] != COLUMNS:
        raise UserError(f"{path}: the columns are not letter and, at the end, 0 to 783; give the competition's CSV of "
                        f"letters, or EMNIST's idx files")
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


def _read_idx(path):
    """Labels count from 0 or, as in EMNIST's split letters, from 1."""
    images = path.with_name(path.name.replace("labels", "images").replace("idx1", "idx3"))
    targets = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    pixels, labels = _idx(images, 3), _idx(targets, 1).astype(np.int64)
    if pixels.shape[1:] != (SIDE, SIDE) or len(pixels) != len(labels) or not len(labels):
        raise UserError(f"{images}: {len(pixels)} images of {pixels.shape[1]}x{pixels.shape[2]} and {len(labels)} "
                        f"labels; give a pair of idx files of 28x28 letters")
    if "emnist" in path.name.lower():
        pixels = pixels.swapaxes(1, 2)  # EMNIST's images are transposed
    letters = labels - int(labels.min() > 0)
    if letters.max() > 25:
        raise UserError(f"{targets}: the labels are not those of letters; give EMNIST's split letters")
    return np.ascontiguousarray(pixels), letters


def _idx(path, dims):
    content = _content(path)
    header = 4 + 4 * dims
    shape = [int.from_bytes(content[k:k + 4], "big") for k in range(4, header, 4)]
    if content[:4] != bytes((0, 0, 8, dims)) or len(content) != header + math.prod(shape):
        raise UserError(f"{path}: damaged, or not an idx file of {dims} dimensions; fetch it again")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


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
