"""Test-time augmentation: every pass is a matrix of `utils.geometry`, and its inverse undoes it."""
import numpy as np
import torch
import torch.nn.functional as F

from utils import geometry


def flips(height, width):
    """Identity, horizontal, vertical and both flips of a height x width image."""
    h, v = geometry.flip_h(width), geometry.flip_v(height)
    return [np.eye(3), h, v, v @ h]


def mean_map(predict, images, passes):
    """Mean over passes of `predict(images)`, each moved back to where it was.

    predict: (B, C, H, W) -> maps (B, K, H, W), probabilities if their mean is to mean something.
    passes: matrices that keep the size, such as `flips(H, W)`.
    """
    size, total = images.shape[-2:], 0
    for matrix in passes:
        maps = predict(geometry.warp(images, matrix, size))
        total = total + geometry.warp(maps, np.linalg.inv(matrix), size)
    return total / len(passes)


DETECTION = ((1.0, False), (0.83, True), (0.67, False))  # YOLOv5's passes: size, flipped


def scaled(height, width, stride, passes=DETECTION, factor=1.0):
    """-> [(matrix, (height, width))]: views of a height x width image at several sizes, in multiples of the stride."""
    views = []
    for share, flipped in passes:
        size = tuple(-(-round(side * share * factor) // stride) * stride for side in (height, width))
        matrix = geometry.scale(size[1] / width, size[0] / height)
        views.append((geometry.flip_h(size[1]) @ matrix if flipped else matrix, size))
    return views


def cat_rows(predict, images, passes):
    """All views' predictions, moved back to where they are in `images` and concatenated.

    predict: (B, C, H, W) -> rows (B, N, 5 + classes) of centre x, centre y, width, height, ...; passes: of `scaled`.
    """
    everything = []
    for matrix, size in passes:
        view = images
        if size != tuple(images.shape[2:]):
            view = F.interpolate(images, size, mode="bilinear", antialias=True)
        rows = predict(view.flip(3) if matrix[0, 0] < 0 else view)
        inverse = np.linalg.inv(matrix)
        step, shift = rows.new_tensor((inverse[0, 0], inverse[1, 1])), rows.new_tensor(inverse[:2, 2])
        rows[..., :2] = rows[..., :2] * step + shift
        rows[..., 2:4] *= step.abs()
        everything.append(rows)
    return torch.cat(everything, 1)
