"""Images of any size through a net of fixed window: a plan of windows, and their smooth merging.

The plan goes down one swath of columns after the other, so that the sums under construction are never larger
than a window's height times a swath's width, whatever the size of the scene.
"""
import math

import torch

SWATH = 4096  # columns


def starts(length, tile, overlap):
    """First pixels of windows that cover `length`: `tile` long, sharing at least the fraction `overlap`.

    As few as possible, evenly spread: no narrow last window with little around it.
    """
    if length <= tile:
        return [0]
    step = max(tile - math.ceil(tile * overlap), 1)  # in whole pixels, as rounded starts are
    count = math.ceil((length - tile) / step) + 1
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def cover(size, tile, overlap):
    """size (height, width) -> the windows (y, x, height, width) of an image that is larger than `tile`, else []."""
    if not tile or max(size) <= tile:
        return []
    sides = [min(tile, side) for side in size]
    return [(y, x, *sides) for y in starts(size[0], tile, overlap) for x in starts(size[1], tile, overlap)]


def partition(size, tile):
    """As `cover`, but every pixel is in one window only, and the windows' sides differ by a pixel at most."""
    if not tile or max(size) <= tile:
        return []
    edges = [[round(i * side / count) for i in range(count + 1)] for side in size for count in [-(-side // tile)]]
    return [(y, x, below - y, right - x) for y, below in zip(edges[0], edges[0][1:])
            for x, right in zip(edges[1], edges[1][1:])]


def of_images(sizes, cut):
    """sizes: (height, width) of images; cut(size) -> windows as `cover` and `partition` give them -> per tile the index
    of its image, and its window; None where the whole image is one tile."""
    pairs = [(i, window) for i, size in enumerate(sizes) for window in cut(size) or [None]]
    return [i for i, _ in pairs], [window for _, window in pairs]


def plan(height, width, tile, overlap, swath=SWATH):
    """-> [(first column, end column, rows, columns)]: per swath, the windows' first rows and first columns.

    A window that reaches into two swaths is in both: it is predicted twice rather than kept.
    """
    ys, xs = starts(height, tile, overlap), starts(width, tile, overlap)
    size = min(tile, width)
    return [(x0, min(x0 + swath, width), ys, [x for x in xs if x < x0 + swath and x + size > x0])
            for x0 in range(0, width, swath)]


def windows(swaths):
    """The plan's windows as (y, x), in the order in which `merge` wants their maps."""
    return [(y, x) for _, _, ys, xs in swaths for y in ys for x in xs]


def weights(height, width):
    """(H, W): how much a window's pixels count, sin^2 from the borders to the middle, never 0."""
    def line(n):
        return torch.sin(math.pi * (torch.arange(n) + 0.5) / n).square().clamp(min=1e-3)
    return line(height)[:, None] * line(width)


def merge(swaths, maps, height):
    """Weighted mean of overlapping maps. Yields (row, column, block (K, h, w)), every pixel of the scene once.

    maps: iterator of tensors (K, h, w), one per window, in the order of `windows`. height: the scene's.
    """
    maps = iter(maps)
    for first, end, ys, xs in swaths:
        total = None
        for y, below in zip(ys, ys[1:] + [height]):
            for x in xs:
                values = next(maps)
                if total is None:
                    weight = weights(*values.shape[1:]).to(values)
                    left, right = min(xs), max(xs) + values.shape[2]
                    total = values.new_zeros(len(values) + 1, values.shape[1], right - left)  # the last: weights
                part = total[:, :, x - left:x - left + values.shape[2]]
                part[:-1] += values * weight
                part[-1] += weight
            done = below - y  # rows that no later window touches
            yield y, first, (total[:-1, :done] / total[-1, :done])[:, :, first - left:end - left]
            total = torch.cat((total[:, done:], torch.zeros_like(total[:, :done])), 1)
