"""Augmentation: a random matrix of utils/ops/geometry.py and a random colour change, drawn from a numpy generator."""
import math

import numpy as np
import torch

from utils.ops import boxes, geometry


def of_flags(flags):
    """The flags of a training script, {flag: value} -> the keyword arguments of both functions: {"view": {...}, "colour":
    {...}}."""
    return {function.__name__: {name: flags[name] for name in function.__kwdefaults__} for function in (view, colour)}


def view(rng, height, width, size, point=None, *, hflip=0.0, vflip=0.0, rot90=False, p_affine=1.0, zoom=(1.0, 1.0),
         zoom_linear=False, aspect=1.0, degrees=0.0, shear=0.0, translate=0.0, crop_padding=0.0, border=("constant",)):
    """A random view of a height x width picture -> (the matrix from it to size x size pixels, the border around it).

    As they stand, the keyword arguments change nothing. They are the flags of all training scripts:
    hflip, vflip: probabilities of mirroring left and right, up and down. rot90: also a random quarter turn.
    p_affine: probability that the picture is zoomed, stretched, turned, sheared and shifted, by up to the following.
    zoom: (lowest, highest) factor, log-uniform; below 1 a view shows more, above 1 less. zoom_linear: it is uniform, as
    in the competitions' systems. aspect: largest stretch of width against height, either way, log-uniform. degrees:
    largest rotation. shear: largest angle along x and y, degrees. translate: largest shift, share of the view's side.
    crop_padding: 0: the view's middle is the picture's, but for the shift. Else the view lies anywhere in the picture,
    of which sides below crop_padding times what the view shows are padded to that, by one of the borders ("constant",
    "reflect", "wrap": see `geometry.warp`), with equal probability. point: (row, column) of a pixel over which such a
    view is laid, before it is turned and shifted.
    """
    moved = p_affine == 1 or rng.random() < p_affine
    most = moved * np.array((degrees, shear, shear, translate, translate))
    share, angle, *slant, right, down, v, h = rng.uniform((0, *-most, 0, 0), (1, *most, 1, 1))
    low, high = zoom
    factor = low + (high - low) * share if zoom_linear else low * (high / low) ** share
    stretch = aspect ** rng.uniform(-0.5, 0.5) if aspect > 1 else 1
    factors = np.array((factor * stretch, factor / stretch)) ** moved  # of x, y, as all pairs below
    sides, windows = np.array((width, height)), size / factors
    middle = sides / 2
    if crop_padding:
        padded = np.maximum(sides, crop_padding * windows)
        before = (padded - sides) // 2
        first, last = np.zeros(2), padded - windows
        if point is not None:
            at = before + point[::-1]
            first, last = np.maximum(first, at - windows + 1), np.minimum(last, at)
        middle = rng.integers(first.astype(int), last.astype(int), endpoint=True) - before + windows / 2
    # until the last line, the view's middle is the origin
    matrix = geometry.rotate(angle) @ geometry.scale(*factors) @ geometry.translate(*-middle)
    matrix = geometry.translate(size * right, size * down) @ geometry.shear(*slant) @ matrix
    matrix = geometry.scale(-1 if h < hflip else 1, -1 if v < vflip else 1) @ matrix
    matrix = geometry.rot90(rot90 and rng.integers(4), 0, 0) @ matrix
    return geometry.translate(size / 2, size / 2) @ matrix, border[rng.integers(len(border))]


def colour(rng, bands, *, hue=0.0, saturation=0.0, value=0.0, gain=0.0):
    """A random matrix on the bands of a picture, a float32 tensor (bands, bands), for `recolour`.

    hue, saturation: of three bands, which are taken for RGB: hues are turned by up to `hue` of the circle; saturation
    times 1 - saturation to 1 + saturation. value: all bands times 1 - value to 1 + value. gain: all bands times a
    factor of -gain to gain octaves, and each band times one of -gain / 4 to gain / 4 octaves.
    """
    turn, saturate, bright = rng.uniform(-1, 1, 3) * (hue, saturation, value) + (0, 1, 1)
    matrix = np.eye(bands)
    if bands == 3:  # a circulant matrix, whose eigenvalues are 1 for grey and a complex number for colours
        line = np.fft.irfft((1, saturate * np.exp(-2j * np.pi * turn)), 3)
        matrix = line[np.subtract.outer(range(3), range(3))]
    if gain:
        matrix = np.exp2(gain * (rng.uniform(-1, 1) + rng.uniform(-1, 1, (bands, 1)) / 4)) * matrix
    return torch.from_numpy((bright * matrix).astype(np.float32))


def recolour(images, matrices, scale=1.0):
    """images (B, C, H, W), any dtype; matrices (B, C, C) of `colour` -> the images divided by scale (a
    number, or one per band) and recoloured, float32, not clamped; where a band holds no data (NaN), it stays so."""
    mixed = torch.empty(images.shape, device=images.device)
    matrices = matrices.to(mixed) / torch.as_tensor(scale, device=mixed.device)
    # image by image into one tensor: allocating memory costs CPUs more than the sums
    for image, matrix, out in zip(images, matrices, mixed.flatten(2)):
        torch.mm(matrix, image.contiguous().float().nan_to_num(0.0).flatten(1), out=out)
    return mixed.masked_fill_(images.isnan(), math.nan) if images.is_floating_point() else mixed


def square(rng, size, probability, side):
    """The blank square of the winning Dirty-MNIST system: somewhere in a size x size image; side: share of the size.
    -> (4,) x1, y1, x2, y2; zeros without a square"""
    corner = rng.uniform(0, size * (1 - side), 2)
    return np.concatenate((corner, corner + size * side)) * (rng.random() < probability)


# ---- detection ----

def layout(rng, sizes, imgsz):
    """Where 1 or 4 pictures go on one square canvas, each with its long side scaled to imgsz.

    sizes: [(height, width)], pixels. -> side of the canvas (imgsz times 1 or 2); the pictures' matrices onto the
    canvas; their cells (x1, y1, x2, y2), beyond which they must not be drawn. One picture lies in the middle; four meet
    in a point within the middle half of the canvas (mosaic, Bochkovskiy et al. 2020).
    """
    across = math.isqrt(len(sizes))  # cells in a row of the canvas
    side = across * imgsz
    inner = [rng.uniform(side / 4, side * 3 / 4, 2) for _ in range(across - 1)]
    edges = np.array([(0, 0), *inner, (side, side)])  # x and y of the cells' borders
    share = np.array([[0.5], [1, 0]][across - 1])  # how much of a cell's free room is before the picture
    matrices, cells = [], []
    for place, (h, w) in enumerate(sizes):
        cell = np.array((place % across, place // across))  # column, row
        low, high = edges[cell, [0, 1]], edges[cell + 1, [0, 1]]
        length = np.array((w, h)) * imgsz / max(h, w)
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
