"""Augmentation: random matrices of utils/ops/geometry.py, and random colours, drawn from a numpy generator."""
import math

import numpy as np
import torch

from utils.ops import boxes, geometry


def crop_flip(rng, height, width, size, point=None):
    """A random crop of a height x width tile -> (matrix onto a size x size canvas, border "reflect" or "wrap").

    As in the wildfire system: sides below twice the crop are padded to it (by reflection or by wrapping around, with
    equal probability); the crop is drawn, flipped and turned. point: (row, column), a pixel that the crop contains.
    """
    border = ("reflect", "wrap")[rng.integers(2)]
    matrix = np.eye(3)
    for axis, side in enumerate((width, height)):
        padded = max(side, 2 * size)
        before = (padded - side) // 2
        first, last = 0, padded - size
        if point is not None:
            position = point[1 - axis] + before
            first, last = max(first, position - size + 1), min(last, position)
        matrix[axis, 2] = before - rng.integers(first, last + 1)
    return flip_turn(rng, size) @ matrix, border


def flip_turn(rng, size):
    """The matrix of one of the eight flips and quarter turns of a size x size image."""
    flip = geometry.flip_h(size) if rng.integers(2) else np.eye(3)
    return geometry.rot90(rng.integers(4), size, size) @ flip


def gain(rng, bands, spread):
    """Brightness factors (bands, 1, 1), float32: a factor for the tile, log-uniform from -spread to spread octaves,
    times a factor for each band from -spread/4 to spread/4 octaves."""
    octaves = rng.uniform(-spread, spread) + rng.uniform(-spread, spread, (bands, 1, 1)) / 4
    return np.exp2(octaves).astype(np.float32)


def zoom_turn(rng, size, zoom, degrees):
    """The matrix of a random zoom, by 1 - zoom to 1 + zoom, and a random rotation of a size x size image about its
    middle, which it moves to the origin."""
    factor, angle = 1 + rng.uniform(-zoom, zoom), rng.uniform(-degrees, degrees)
    return geometry.rotate(angle) @ geometry.scale(factor, factor) @ geometry.translate(-size / 2, -size / 2)


def shifted(rng, size, share):
    """The matrix that moves the origin to the middle of a size x size image, give or take a share of the size."""
    return geometry.translate(*(size * (0.5 + rng.uniform(-share, share, 2))))


# ---- detection ----

def affine(rng, canvas, size, *, degrees=0.0, translate=0.1, scale=0.5, shear=0.0, flip_ud=0.0, flip_lr=0.5):
    """A random view of a canvas x canvas picture -> the matrix from it to size x size pixels.

    degrees, shear: largest angle either way, in degrees, about the picture's middle. scale: it is zoomed by 1 - scale
    to 1 + scale. translate: its middle is at most so far, as a share of size, from the view's. flip_ud, flip_lr:
    probabilities.
    """
    matrix = zoom_turn(rng, canvas, scale, degrees)
    matrix = geometry.shear(*rng.uniform(-shear, shear, 2)) @ matrix
    matrix = shifted(rng, size, translate) @ matrix
    if rng.random() < flip_ud:
        matrix = geometry.flip_v(size) @ matrix
    if rng.random() < flip_lr:
        matrix = geometry.flip_h(size) @ matrix
    return matrix


def layout(rng, sizes, imgsz):
    """Where 1, 4 or 9 pictures go on one square canvas, each with its long side scaled to imgsz: mosaics.

    sizes: [(height, width)], pixels. -> side of the canvas (imgsz times 1, 2 or 3); the pictures' matrices onto the
    canvas; their cells (x1, y1, x2, y2), beyond which they must not be drawn. One picture lies in the middle. Four meet
    in a point (Bochkovskiy et al. 2020) within the middle half of the canvas. Of nine, eight surround the first, which
    keeps its whole size.
    """
    across = math.isqrt(len(sizes))  # cells in a row of the canvas
    side = across * imgsz
    lengths = [np.array((w, h)) * imgsz / max(h, w) for h, w in sizes]
    if across == 3:
        middle = side / 2 + rng.uniform(-imgsz / 2, imgsz / 2, 2)
        inner = [middle - lengths[0] / 2, middle + lengths[0] / 2]
    else:
        inner = [rng.uniform(side / 4, side * 3 / 4, 2) for _ in range(across - 1)]
    edges = np.array([(0, 0), *inner, (side, side)])  # x and y of the cells' borders
    # outer pictures lie at the inner border of their cell, all others in the middle of it
    share = np.array([[0.5], [1, 0], [1, 0.5, 0]][across - 1])
    matrices, cells = [], []
    for (h, w), length, place in zip(sizes, lengths, [4, 0, 1, 2, 3, 5, 6, 7, 8] if across == 3 else range(4)):
        cell = np.array((place % across, place // across))  # column, row
        low, high = edges[cell, [0, 1]], edges[cell + 1, [0, 1]]
        start = low + (high - low - length) * share[cell]
        matrices.append(geometry.translate(*start) @ geometry.scale(*length / (w, h)))
        cells.append((*low, *high))
    return side, matrices, cells


def letterbox(height, width, imgsz, shape):
    """The matrix that scales a height x width picture's long side to imgsz, both sides to whole pixels, and centres it
    on a canvas of `shape` (height, width)."""
    factor = imgsz / max(height, width)
    h, w = max(1, round(height * factor)), max(1, round(width * factor))
    return geometry.translate((shape[1] - w) // 2, (shape[0] - h) // 2) @ geometry.scale(w / width, h / height)


def visible(before, after):
    """Which boxes are still worth learning: before (n, 4) as moved, after (n, 4) clipped to what is seen.

    Sides above 2 pixels, a tenth of the area still there, no side a hundred times the other. -> bool (n,)
    """
    size, whole = boxes.sides(after), boxes.sides(before)
    return (size > 2).all(1) & (size.prod(1) > 0.1 * whole.prod(1)) & (size.max(1) < 100 * size.min(1))


def colour(rng, bands, hue, saturation, value):
    """A random float32 matrix (bands, bands) on the bands of a picture: brighter or darker by a factor 1 - value to
    1 + value; three bands are taken for RGB and also get a saturation times 1 - saturation to 1 + saturation, and hues
    turned by up to `hue` of the circle."""
    turn, saturate, gain = rng.uniform(-1, 1, 3) * (hue, saturation, value) + (0, 1, 1)
    if bands != 3:
        return np.eye(bands, dtype=np.float32) * np.float32(gain)
    grey = np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3 ** 0.5  # turns colours about the grey axis
    angle = 2 * np.pi * turn
    turned = np.cos(angle) * (np.eye(3) - grey) + np.sin(angle) * cross
    return (gain * (grey + saturate * turned)).astype(np.float32)


def recolour(images, matrices, scale=1.0):
    """images (B, C, H, W), any dtype; matrices (B, C, C) of `colour` -> the recoloured images divided by scale
    (a number, or one per band), float32, not clamped."""
    mixed = torch.empty(images.shape, device=images.device)
    matrices = matrices.to(mixed) / torch.as_tensor(scale, device=mixed.device)
    # image by image into one tensor: allocating memory costs CPUs more than the sums
    for image, matrix, out in zip(images, matrices, mixed.flatten(2)):
        torch.mm(matrix, image.contiguous().float().flatten(1), out=out)
    return mixed


# ---- classification ----

def random_affine(rng, size, *, rot90=True, flip=0.0, degrees=15.0, shift=0.0625, zoom=0.1, p_affine=0.5,
                  cutout_size=0.3, p_cutout=0.5):
    """The augmentation of the winning Dirty-MNIST system: a random quarter turn, a small shift, zoom and rotation with
    probability p_affine, and a blank square with probability p_cutout.

    flip: probability of each flip. degrees, shift (share of the size), zoom: largest changes. cutout_size: side of the
    square, share of the size. -> (matrix on a size x size canvas, square (4,) x1, y1, x2, y2; zeros without a square)
    """
    matrix = geometry.rot90(rng.integers(4) if rot90 else 0, size, size)
    for mirror in (geometry.flip_h, geometry.flip_v):
        if rng.random() < flip:
            matrix = mirror(size) @ matrix
    if rng.random() < p_affine:
        moved = zoom_turn(rng, size, zoom, degrees)
        matrix = shifted(rng, size, shift) @ moved @ matrix
    if rng.random() >= p_cutout:
        return matrix, np.zeros(4)
    corner = rng.uniform(0, size * (1 - cutout_size), 2)
    return matrix, np.concatenate((corner, corner + size * cutout_size))
