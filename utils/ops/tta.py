"""Test-time augmentation: every pass is a matrix of `utils.geometry`, and its inverse undoes it.

    views = tta.tta_views(("hflip", "rot90", "scale"), (height, width), stride=32)     # 2 x 2 x 3 passes
    probs = tta.merge(tta.maps(predict, images, views), "gmean")                    # segmentation
    probs = tta.merge(predict(tta.move(images, *view)) for view in views)           # classification
    rows = tta.tta_boxes(predict, images, views)                                         # detection, then boxes.nms
"""
import itertools

import numpy as np
import torch
import torch.nn.functional as F

from utils.ops import geometry

NAMES = ("hflip", "vflip", "rot90", "rot180", "scale")
SCALES = (0.83, 1.0, 1.2)
MERGES = {  # what is done to each pass, how two are joined, what is done to the result of n passes
    "mean": (lambda p: p, torch.add, lambda total, n: total / n),
    "gmean": (lambda p: p.clamp(min=torch.finfo(p.dtype).tiny).log(), torch.add, lambda total, n: (total / n).exp()),
    "sum": (lambda p: p, torch.add, lambda total, n: total),
    "max": (lambda p: p, torch.maximum, lambda total, n: total),
    "min": (lambda p: p, torch.minimum, lambda total, n: total),
    "tsharpen": (torch.sqrt, torch.add, lambda total, n: total / n),
}


def tta_views(names, size, *, stride=1, scales=SCALES, factor=1.0):
    """-> [(matrix, (height, width))]: the product of what the names offer, for images of `size` = (height, width): the
    matrix of each pass, from the image onto its canvas, and the size of that. No names: the image as it is.

    names   of NAMES. hflip, vflip: as it is and mirrored; rot90: 0 and 90 degrees, counter-clockwise; rot180: 0 and 180
            degrees, with rot90 all four quarter turns; scale: all `scales`
    stride  sides are rounded up to multiples of it, which stretches the image a little
    factor  of all sizes

    Views that several combinations give (hflip and vflip are rot180), or several scales after rounding, come once.
    ValueError for other names.
    """
    if not set(names) <= set(NAMES):
        raise ValueError(f"names {tuple(names)} must be of {NAMES}")
    offers = [(0, step) if name in names else (0,) for name, step in (("rot180", 2), ("rot90", 1), ("vflip", 1),
                                                                      ("hflip", 1))]
    found = {}
    for share, half, quarter, v, h in itertools.product(scales if "scale" in names else (1.0,), *offers):
        height, width = (-(-max(round(side * share * factor), 1) // stride) * stride for side in size)
        matrix = geometry.scale(width / size[1], height / size[0])
        if h:
            matrix = geometry.flip_h(width) @ matrix
        if v:
            matrix = geometry.flip_v(height) @ matrix
        matrix = geometry.rot90(half + quarter, height, width) @ matrix
        found.setdefault(tuple(matrix.ravel()), (matrix, (width, height) if quarter else (height, width)))
    return list(found.values())


def yolov5(size, *, stride, factor=1.0):
    """YOLOv5's passes: the image as it is, its mirror image at 0.83 of the size, the image at 0.67."""
    return [tta_views(names, size, stride=stride, factor=share * factor)[-1]
            for share, names in ((1.0, ()), (0.83, ("hflip",)), (0.67, ()))]


def move(images, matrix, size):
    """images (B, C, H, W) float32, moved by the matrix of a pass, or by its inverse, onto `size` = (height, width).

    Flips and turns move pixels exactly. Before them the image is resized, in one step for the whole batch: like `warp`,
    but with its edge pixels continued outwards, and antialiased where it shrinks.
    """
    height, width = size if abs(matrix[0, 0]) > abs(matrix[0, 1]) else size[::-1]  # before a quarter turn
    if (height, width) != tuple(images.shape[2:]):
        matrix = matrix @ geometry.scale(images.shape[3] / width, images.shape[2] / height)
        images = F.interpolate(images, (height, width), mode="bilinear", antialias=True)
    return geometry.warp(images, matrix, size)


def at_size(predict, images, side):
    """predict(images resized to side x side) -> its maps (B, K, h, w), resized back."""
    size = images.shape[2:]
    images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
    return F.interpolate(predict(images), size, mode="bilinear", antialias=True)


def maps(predict, images, views):
    """Yields, pass by pass, the maps `predict(view)`, moved back to where they are in `images`.

    predict: (B, C, h, w) -> maps (B, K, h, w) float32; images (B, C, H, W) float32; views: of `passes`.
    """
    for matrix, size in views:
        yield move(predict(move(images, matrix, size)), np.linalg.inv(matrix), images.shape[2:])


def tta_boxes(predict, images, views):
    """Yields, pass by pass, the boxes `predict(view)`, moved back to where they are in `images`.

    predict: (B, C, h, w) -> rows (B, N, 5 + classes) of centre x, centre y, width, height, ..., changed in place.
    """
    for matrix, size in views:
        found = predict(move(images, matrix, size))
        inverse = np.linalg.inv(matrix)
        if abs(inverse[0, 1]) > abs(inverse[0, 0]):  # a quarter turn
            found[..., :4] = found[..., [1, 0, 3, 2]]
        step, shift = found.new_tensor(inverse[:2, :2].sum(1)), found.new_tensor(inverse[:2, 2])  # one is 0 of two
        found[..., :2] = found[..., :2] * step + shift
        found[..., 2:4] *= step.abs()
        yield found


def merge(probs, how="mean", *, exclusive=False):
    """An iterable of each pass's probabilities (B, K, ...) -> probabilities (B, K, ...). Two are held at a time.

    how        of MERGES: ttach's, on probabilities. sum is cut off at 1; tsharpen is the mean of p ** 0.5, so that a
               threshold of 0.5 on it is one of 0.25 on what all passes agree on
    exclusive  the K classes exclude each other: scaled to add up to 1 again, which makes sum the mean
    """
    before, join, after = MERGES[how]
    total, count = None, 0
    for p in probs:
        p = before(p)
        total, count = p if total is None else join(total, p), count + 1
    merged = after(total, count)
    if exclusive:
        return merged / merged.sum(1, keepdim=True).clamp(min=torch.finfo(merged.dtype).tiny)
    return merged.clamp(max=1)
