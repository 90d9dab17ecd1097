"""Anchors: the places and sizes from which a detector's outputs are turned into boxes, and sizes fitted to a data set.

Sizes are width, height in pixels as the net sees them (k-means anchors: Redmon & Farhadi 2017, YOLO9000).
"""
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F


# ---- places ----------------------------------------------------------------------------------------------------------
class Points(NamedTuple):
    """The outputs of an anchor-free head for all N cells of its maps."""
    boxes: torch.Tensor    # (B, N, 4): x1 y1 x2 y2, pixels
    sides: torch.Tensor    # (B, N, 4, bins): logits of the distances left, top, right, bottom
    classes: torch.Tensor  # (B, N, classes): logits
    centres: torch.Tensor  # (N, 2): x, y of the cells' centres, pixels
    strides: torch.Tensor  # (N, 1): pixels per cell


def cells(rows, columns, device):
    """-> int64 (rows * columns, 2): the column and the row of every cell of a map, row by row."""
    sides = (torch.arange(length, device=device) for length in (rows, columns))
    return torch.cartesian_prod(*sides).flip(1)


def decode_points(maps, strides, bins):
    """Raw maps per level (B, rows, columns, 4 * bins + classes) -> Points in fp32.

    A cell's box reaches from its centre to the left, top, right and bottom by the means of four distributions over
    0 .. bins - 1 strides (GFL, Li et al. 2020).
    """
    places = torch.cat([F.pad(cells(*raw.shape[1:3], raw.device) + 0.5, (0, 1), value=1.0) * stride
                        for raw, stride in zip(maps, strides)])
    centres, scale = places[:, :2], places[:, 2:]
    raw = torch.cat([raw.flatten(1, 2) for raw in maps], 1).float()
    sides = raw[..., :4 * bins].unflatten(-1, (4, bins))
    # a sum of products: autocast would round the terms of a matrix product
    distances = (sides.softmax(-1) * torch.arange(bins, device=raw.device, dtype=raw.dtype)).sum(-1) * scale
    boxes = torch.cat((centres - distances[..., :2], centres + distances[..., 2:]), -1)
    return Points(boxes, sides, raw[..., 4 * bins:], centres, scale)


# ---- sizes -----------------------------------------------------------------------------------------------------------
def side_ratios(anchors, wh):
    """anchors (..., 2), boxes wh (N, 2) -> (n, N): how well anchor and box agree, 0 .. 1: the smaller of the ratios of
    their widths and of their heights."""
    # a contiguous row per side is ten times faster
    anchors, wh = (np.ascontiguousarray(np.reshape(sizes, (-1, 2)).T) for sizes in (anchors, wh))
    return np.minimum(*(np.minimum(a, b) / np.maximum(a, b) for a, b in zip(anchors[..., None], wh)))


def recall(anchors, wh, threshold=4.0):
    """-> (the share of boxes wh (N, 2) with an anchor within the factor `threshold` in both sides, which is the best
    recall that a loss with this threshold can teach; the mean number of such anchors per box). No boxes: 0, 0."""
    fits = side_ratios(anchors, wh) > 1 / threshold
    return (float(fits.any(0).mean()), float(fits.sum(0).mean())) if len(wh) else (0.0, 0.0)


def kmeans(wh, n, *, rng, iterations=30):
    """n cluster centres (n, 2) of boxes wh (N, 2), N > 0, by k-means on sizes divided by their standard deviation.

    Starts from k-means++ (Arthur & Vassilvitskii 2007). With fewer than n different boxes some centres are equal.
    """
    wh = np.asarray(wh, np.float64)
    std = wh.std(0)
    std[std == 0] = 1
    points = wh / std

    def distances(centres):  # squared, (N, number of centres)
        return ((points[:, None] - centres) ** 2).sum(2)

    centres = points[rng.integers(len(points), size=1)]
    while len(centres) < n:
        nearest = distances(centres).min(1)
        chosen = rng.choice(len(points), p=nearest / nearest.sum() if nearest.any() else None)
        centres = np.concatenate((centres, points[chosen, None]))
    for _ in range(iterations):
        members = distances(centres).argmin(1) == np.arange(n)[:, None]
        counts = members.sum(1, keepdims=True)
        centres = np.where(counts > 0, members @ points / np.maximum(counts, 1), centres)
    return centres * std


def auto(wh, anchors, *, threshold=4.0, seed=0, enough=0.98):
    """-> (anchors (levels, 3, 2) float32, a line that says what was done and why).

    wh (N, 2): box sizes in pixels as the net sees them (scaled to its image size); boxes below 2 px in both sides or
    without area are left out. anchors (levels, 3, 2) are kept if their recall is above `enough`, or if k-means
    finds none with a higher one. New anchors are sorted by area: the small ones go to the fine levels.
    """
    anchors, wh = np.array(anchors, np.float32), np.asarray(wh, np.float64).reshape(-1, 2)
    wh = wh[np.isfinite(wh).all(1) & (wh.max(1) >= 2) & (wh.min(1) > 0)]
    before, text = recall(anchors, wh, threshold), "{:.4f}, {:.2f} anchors per box".format
    if len(wh) and before[0] <= enough:
        # of logarithms, because a loss matches anchors and boxes by the ratios of their sides
        new = np.exp(kmeans(np.log(wh), anchors.size // 2, rng=np.random.default_rng(seed)))
        new = new[np.argsort(new.prod(1), kind="stable")].reshape(anchors.shape).astype(np.float32)
        after = recall(new, wh, threshold)
        if after[0] > before[0]:
            return new, f"anchors changed: best possible recall {text(*before)} -> {text(*after)}"
    return anchors, f"anchors kept: best possible recall {text(*before)} ({len(wh)} boxes)"
