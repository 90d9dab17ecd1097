"""Test-time augmentation: every pass is a matrix of `utils.geometry`, and its inverse undoes it."""
import numpy as np

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
