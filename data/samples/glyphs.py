"""Pictures of single capital letters: from the competition's CSV, from EMNIST's idx files, or drawn with a font."""
import gzip
import string
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from utils.ops import geometry
from utils.errors import UserError

SIDE = 28
COLUMNS = [str(i) for i in range(SIDE * SIDE)]


def read(path=None):
    """Glyphs, white on black -> pixels uint8 (N, 28, 28), letters int64 (N,), A is 0 and Z is 25.

    path: the competition's CSV with the columns letter and, at the end, 0..783 (train.csv of its mnist_data has id and
    digit before them, test.csv has id); or one of a pair of idx files, as EMNIST's, whose names differ by images-idx3
    and labels-idx1; gzipped or not. None: 100 a letter from `render`.
    Raises UserError for what is none of these, or damaged.
    """
    if path is None:
        return render(100)
    content = _content(path)
    if content[:4] in (b"\0\0\x08\x03", b"\0\0\x08\x01"):
        return _read_idx(path)
    return _read_csv(path, content)


def _content(path):
    try:
        content = Path(path).read_bytes()
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"{path}: damaged gzip; fetch or write it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); give a file of letters") from None


def _read_csv(path, content):
    lines = content.removeprefix(b"\xef\xbb\xbf").splitlines()
    names = [name.strip(' "') for name in lines[0].decode("latin-1").split(",")] if lines else []
    before = len(names) - len(COLUMNS)
    if "letter" not in names[:max(before, 0)] or names[before:] != COLUMNS:
        raise UserError(f"{path}: has not the columns letter and, at the end, 0 to 783; give the competition's CSV of "
                        f"letters, or EMNIST's idx files")
    column = names.index("letter")
    rows = [(number, line) for number, line in enumerate(lines[1:], 2) if line.strip()]
    if not rows:
        raise UserError(f"{path}: has no letters; fetch or write it again")
    pixels, letters = np.empty((len(rows), len(COLUMNS)), np.uint8), np.empty(len(rows), np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy only warns of what is no number
        for i, (number, line) in enumerate(rows):
            fields = line.split(b",", before)
            letter = fields[column].strip(b' "') if len(fields) > before else b""
            if len(fields) <= before or fields[-1].count(b",") != len(COLUMNS) - 1:
                raise UserError(f"{path}: line {number} has {line.count(b',') + 1} fields instead of {len(names)}; "
                                f"mend or remove it")
            if len(letter) != 1 or not b"A" <= letter <= b"Z":
                raise UserError(f"{path}: line {number} has the letter {letter.decode('latin-1')!r}, not one of A to "
                                f"Z; mend or remove it")
            try:  # np.fromstring: 40 us a row; np.loadtxt and int() of every field take ten times that
                values = np.fromstring(fields[-1], np.int64, sep=",")
            except (ValueError, DeprecationWarning):
                values = np.empty(0)
            if len(values) != len(COLUMNS) or values.min() < 0 or values.max() > 255:
                raise UserError(f"{path}: line {number} has a pixel that is no whole number from 0 to 255; mend or "
                                f"remove it")
            pixels[i], letters[i] = values, letter[0] - ord("A")
    return pixels.reshape(-1, SIDE, SIDE), letters


def _read_idx(path):
    """Of EMNIST's splits, "letters" counts from 1; the others hold digits (0-9), capitals (10-35) and small letters."""
    path = Path(path)
    pairs = (("images", "labels"), ("idx3", "idx1"))
    files = []
    for kind in (0, 1):
        name = path.name
        for pair in pairs:
            name = name.replace(pair[1 - kind], pair[kind])
        files.append(path.with_name(name))
    pixels, labels = _idx(files[0], 3), _idx(files[1], 1).astype(np.int64)
    if pixels.shape[1:] != (SIDE, SIDE) or len(pixels) != len(labels) or not len(labels):
        raise UserError(f"{files[0]}: {len(pixels)} images of {pixels.shape[1]}x{pixels.shape[2]} and {len(labels)} "
                        f"labels; give a pair of idx files of 28x28 letters")
    if "emnist" in path.name.lower():
        pixels = pixels.swapaxes(1, 2)  # its images lie on their sides
    if labels.max() > 26:
        first, kept = 10, (labels >= 10) & (labels <= 35)
    else:
        first, kept = int(labels.min() > 0), labels >= 0
    pixels, letters = pixels[kept], labels[kept] - first
    if not len(letters) or letters.max() > 25:
        raise UserError(f"{files[1]}: the labels are not those of letters; EMNIST's split letters has them")
    return np.ascontiguousarray(pixels), letters


def _idx(path, dims):
    content = _content(path)
    header = 4 + 4 * dims
    shape = np.frombuffer(content[4:header], ">u4").astype(int) if len(content) >= header else np.zeros(dims, int)
    if content[:4] != bytes((0, 0, 8, dims)) or len(content) != header + shape.prod():
        raise UserError(f"{path}: damaged, or not an idx file of {dims} dimensions; fetch it again")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def render(count, *, seed=0):
    """Letters of Pillow's own font, with four widths of stroke, turned, sheared, scaled and moved at random.

    `count` of each -> pixels uint8 (26 * count, 28, 28), letters int64 (26 * count,), in random order. Glyph k of a
    letter depends on (seed, k) only.
    """
    fine, font, pixels = 4 * SIDE, ImageFont.load_default(3 * SIDE), []
    drawn = torch.zeros(4, 26, 1, fine, fine)
    for stroke, letter in np.ndindex(4, 26):
        canvas = Image.new("L", (fine, fine))
        ImageDraw.Draw(canvas).text((fine / 2, fine / 2), string.ascii_uppercase[letter], 255, font, "mm",
                                    stroke_width=stroke)
        drawn[stroke, letter, 0] = torch.from_numpy(np.array(canvas))
    for k in range(count):
        rng = np.random.default_rng((seed, k))
        turns = [geometry.translate(*(SIDE + rng.uniform(-3, 3, 2))) @ geometry.rotate(rng.normal(0, 8))
                 @ geometry.shear(rng.normal(0, 8), rng.normal(0, 4)) @ geometry.scale(*rng.uniform(.42, .62, 2))
                 @ geometry.translate(-fine / 2, -fine / 2) for _ in range(26)]
        # drawn on two pixels a pixel and averaged: warped at once, three of four would be skipped
        twice = geometry.warp(drawn[rng.integers(4, size=26), range(26)], np.stack(turns), (2 * SIDE, 2 * SIDE))
        pixels.append(F.avg_pool2d(twice, 2)[:, 0] * torch.from_numpy(rng.uniform(.8, 1, (26, 1, 1))))
    order = np.random.default_rng(seed).permutation(26 * count)
    return torch.cat(pixels).round().byte().numpy()[order], np.tile(np.arange(26), count)[order]
