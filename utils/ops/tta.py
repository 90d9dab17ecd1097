"""Test-time augmentation: every view of an image is a matrix of utils/ops/geometry.py, and the inverse undoes it.

    views = tta.tta_views(("hflip", "rot90", "scale"), (height, width), stride=32)        # 2 x 2 x 3 views
    probs = tta.merge(tta.maps(predict, images, views), "gmean")                          # segmentation
    probs = tta.merge(predict(tta.warp_view(images, *view)) for view in views)            # classification
    rows = tta.tta_boxes(predict, images, views)                                          # detection, then boxes.nms
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

from utils.ops import geometry

TURNS = {  # name: the matrix of a flip or turn, for a canvas of height x width
    "hflip": lambda height, width: geometry.flip_h(width),
    "vflip": lambda height, width: geometry.flip_v(height),
    "rot90": lambda height, width: geometry.rot90(1, height, width),
    "rot180": lambda height, width: geometry.rot90(2, height, width),
}
NAMES = (*TURNS, "scale")
SCALES = (0.83, 1.0, 1.2)
MERGES = ("mean", "gmean", "sum", "max", "min", "tsharpen")


def tta_views(names, size, *, stride=1, scales=SCALES, factor=1.0):
    """-> [(matrix, (height, width))]: all combinations of what the names offer, for images of `size` = (height, width):
    the matrix of each view, from the image to the view's canvas, and the size of the canvas.

    names   of NAMES; none: only the image itself. hflip, vflip: unchanged and mirrored; rot90: 0 and 90 degrees
            counter-clockwise; rot180: 0 and 180 degrees, with rot90 all four quarter turns; scale: all `scales`
    stride  sides are rounded up to multiples of it, which stretches the image a little
    factor  on all sizes

    Equal views come once: hflip and vflip together are rot180, several scales may be equal after rounding.
    ValueError for unknown names.
    """
    if not set(names) <= set(NAMES):
        raise ValueError(f"names {tuple(names)} must be of {NAMES}")
    found = {}
    for share in scales if "scale" in names else (1.0,):
        height, width = (-(-max(round(side * share * factor), 1) // stride) * stride for side in size)
        views = [(geometry.scale(width / size[1], height / size[0]), (height, width))]
        for name, turn in TURNS.items():
            if name in names:
                views += [(turn(*canvas) @ matrix, canvas[::-1] if name == "rot90" else canvas)
                          for matrix, canvas in views]
        found |= {tuple(matrix.ravel()): (matrix, canvas) for matrix, canvas in views}
    return list(found.values())


def yolov5(size, *, stride, factor=1.0):
    """YOLOv5's views: the image itself, mirrored at 0.83 of the size, and at 0.67 of the size -> [(matrix, size of the
    canvas, (start, end) of the rows that count, shares of them)].

    The rows of the net's levels, of strides 8, 16 ... `stride`, come fine to coarse. As YOLOv5 does it, the coarsest
    level of the first view and the finest of the last one do not count: the other views see these objects better.
    """
    cells = [4.0 ** -level for level in range(round(math.log2(stride / 8)) + 1)]
    finest, coarsest = cells[0] / sum(cells), cells[-1] / sum(cells)
    return [(*tta_views(names, size, stride=stride, factor=share * factor)[-1], part) for share, names, part in (
        (1.0, (), (0, 1 - coarsest)), (0.83, ("hflip",), (0, 1)), (0.67, (), (finest, 1)))]


def warp_view(images, matrix, size):
    """images (B, C, H, W) float32, moved by the matrix of a view, or by its inverse, onto `size` = (height, width).

    Flips and turns move pixels exactly. Before them the images are resized, with one call for the batch: as `warp` does
    it, but edge pixels continue outwards, and with antialiasing where the images shrink.
    """
    height, width = size if abs(matrix[0, 0]) > abs(matrix[0, 1]) else size[::-1]  # before a quarter turn
    if (height, width) != tuple(images.shape[2:]):
        matrix = matrix @ geometry.scale(images.shape[3] / width, images.shape[2] / height)
        images = F.interpolate(images, (height, width), mode="bilinear", antialias=True)
    return geometry.warp(images, matrix, size)


def maps(predict, images, views):
    """Yields, view by view, the maps `predict(view)`, moved back to the pixels of `images`.

    predict: (B, C, h, w) -> maps (B, K, h, w) float32; images: (B, C, H, W) float32; views: of `tta_views`.
    """
    for matrix, size in views:
        yield warp_view(predict(warp_view(images, matrix, size)), np.linalg.inv(matrix), images.shape[2:])


def tta_boxes(predict, images, views):
    """Yields, view by view, the boxes `predict(view)`, moved back to the pixels of `images`.

    predict: (B, C, h, w) -> rows (B, N, 5 + classes) of centre x, centre y, width, height, ..., changed in place.
    views: of `tta_views` or `yolov5`.
    """
    for matrix, size, *part in views:
        rows = predict(warp_view(images, matrix, size))
        if part:
            rows = rows[:, slice(*(round(share * rows.shape[1]) for share in part[0]))]
        inverse = np.linalg.inv(matrix)
        if abs(inverse[0, 1]) > abs(inverse[0, 0]):  # a quarter turn
            rows[..., :4] = rows[..., [1, 0, 3, 2]]
        step, shift = rows.new_tensor(inverse[:2, :2].sum(1)), rows.new_tensor(inverse[:2, 2])  # one of two terms is 0
        rows[..., :2] = rows[..., :2] * step + shift
        rows[..., 2:4] *= step.abs()
        yield rows


def merge(probs, how="mean", *, single_label=False):
    """The probabilities of all views, an iterable of (B, K, ...), -> their merged probabilities (B, K, ...).

    how           of MERGES, the names of the package ttach. gmean: geometric mean. sum is clamped at 1. tsharpen
                  averages sqrt(p): where all views agree on p, a threshold of 0.5 means p > 0.25
    single_label  the K classes exclude each other: the result is scaled to the sum 1, so that sum equals mean

    Two views are held in memory at a time. ValueError for another `how`.
    """
    if how not in MERGES:
        raise ValueError(f"merge {how!r} must be one of {MERGES}")
    join = {"max": torch.maximum, "min": torch.minimum}.get(how, torch.add)
    total, count = None, 0
    for p in probs:
        tiny = torch.finfo(p.dtype).tiny
        p = p.clamp(min=tiny).log() if how == "gmean" else p.sqrt() if how == "tsharpen" else p
        total, count = p if total is None else join(total, p), count + 1
    merged = total / count if how in ("mean", "gmean", "tsharpen") else total
    merged = merged.exp() if how == "gmean" else merged
    if single_label:
        return merged / merged.sum(1, keepdim=True).clamp(min=tiny)
    return merged.clamp(max=1)
