"""Images of any size in windows of one size: where the windows lie, and how their maps are stitched together.

A scene is processed in swaths of columns, each from top to bottom, so that the sums in memory are never larger than a
window's height times a swath's width.
"""
import itertools
import math

import torch
import torch.nn.functional as F

SWATH = 4096  # columns


def starts(length, tile, overlap):
    """The first pixels of windows of `tile` pixels that cover `length` pixels and share at least the fraction `overlap`.

    As few windows as possible, evenly spread, so that no last window is narrow.
    """
    if length <= tile:
        return [0]
    step = max(tile - math.ceil(tile * overlap), 1)  # rounded to whole pixels as the starts are
    count = math.ceil((length - tile) / step) + 1
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def cover(size, tile, overlap):
    """size (height, width) -> overlapping windows (y, x, height, width) of an image that is larger than `tile` pixels;
    an empty list for smaller images, and for tile None."""
    if not tile or max(size) <= tile:
        return []
    sides = [min(tile, side) for side in size]
    return [(*start, *sides) for start in itertools.product(*(starts(side, tile, overlap) for side in size))]


def partition(size, tile):
    """As `cover`, but every pixel is in exactly one window; the sides of the windows differ by one pixel at most."""
    if not tile or max(size) <= tile:
        return []

    def spans(side):
        count = -(-side // tile)
        return itertools.pairwise(round(i * side / count) for i in range(count + 1))

    return [(y, x, below - y, right - x) for (y, below), (x, right) in itertools.product(*map(spans, size))]


def of_images(sizes, cut):
    """The tiles of several images -> the index of each tile's image, and each tile's window; None: the whole image.

    sizes: (height, width) per image; cut: a function size -> windows, such as `cover` and `partition`.
    """
    pairs = [(i, window) for i, size in enumerate(sizes) for window in cut(size) or [None]]
    return [i for i, _ in pairs], [window for _, window in pairs]


def plan(height, width, tile, overlap, swath=SWATH):
    """-> a list of swaths (first column, end column, rows, columns), with the first rows and columns of their windows.

    A window that reaches into two swaths is in both: it is predicted twice instead of being kept in memory.
    """
    ys, xs = starts(height, tile, overlap), starts(width, tile, overlap)
    return [(x0, min(x0 + swath, width), ys, [x for x in xs if x < x0 + swath and x + tile > x0])
            for x0 in range(0, width, swath)]


def windows(swaths):
    """The first pixels (y, x) of the plan's windows, in the order in which `stitch` needs their maps."""
    return [(y, x) for _, _, ys, xs in swaths for y in ys for x in xs]


def weights(height, width):
    """(height, width): the weight of each pixel of a window, sin^2 from the borders to the middle, never 0."""
    def line(n):
        return torch.sin(math.pi * (torch.arange(n) + 0.5) / n).square().clamp(min=1e-3)
    return line(height)[:, None] * line(width)


def stitch(swaths, maps, height):
    """Weighted mean of overlapping maps. Yields (row, column, block (K, h, w)), every pixel of the scene once.

    maps: an iterable of tensors (K, h, w), one per window, in the order of `windows`. height: the scene's, pixels.
    """
    maps = iter(maps)
    for first, end, ys, xs in swaths:
        total = None
        for y, below in itertools.pairwise([*ys, height]):
            for x in xs:
                values = next(maps)
                if total is None:
                    weight = weights(*values.shape[1:]).to(values)
                    left, right = min(xs), max(xs) + values.shape[2]
                    total = values.new_zeros(len(values) + 1, values.shape[1], right - left)  # last: the weights
                part = total[:, :, x - left:x - left + values.shape[2]]
                part[:-1] += values * weight
                part[-1] += weight
            done = below - y  # rows that no later window reaches
            yield y, first, (total[:-1, :done] / total[-1, :done])[:, :, first - left:end - left]
            total = F.pad(total[:, done:], (0, 0, 0, done))
