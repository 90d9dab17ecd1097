"""One geometry for everything: a 3x3 matrix on pixel coordinates moves images, masks, boxes and points alike.

Coordinates are continuous, x to the right and y down: pixel (column j, row i) covers [j, j+1) x [i, i+1), its centre is
(j + 0.5, i + 0.5). A matrix maps source coordinates to output coordinates. Matrices are affine float64 numpy arrays and
compose with `@`: the rightmost one is applied first.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F


def translate(dx, dy):
    """Shift by dx, dy pixels."""
    return np.array([[1.0, 0, dx], [0, 1, dy], [0, 0, 1]])


def scale(sx, sy):
    """Zoom about the origin."""
    return np.diag([sx, sy, 1.0])


def rotate(degrees):
    """Counter-clockwise as seen on the screen, about the origin."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])


def shear(x_degrees, y_degrees):
    """Shear about the origin, by angles along x and along y."""
    return np.array([[1, math.tan(math.radians(x_degrees)), 0], [math.tan(math.radians(y_degrees)), 1, 0], [0, 0, 1]])


def flip_h(width):
    """Left <-> right."""
    return translate(width, 0) @ scale(-1, 1)


def flip_v(height):
    """Up <-> down."""
    return translate(0, height) @ scale(1, -1)


def rot90(k, height, width):
    """k quarter turns counter-clockwise of a height x width image, as `torch.rot90(image, k, (-2, -1))`."""
    matrix = np.eye(3)
    for _ in range(k % 4):
        matrix = np.array([[0.0, 1, 0], [-1, 0, width], [0, 0, 1]]) @ matrix
        height, width = width, height
    return matrix


def warp_boxes(boxes, matrix):
    """Boxes (N, 4) of x1, y1, x2, y2 -> the boxes (N, 4) around their moved corners; float64."""
    terms = np.asarray(boxes, np.float64).reshape(-1, 2, 1, 2) * matrix[:2, :2]  # (N, corner, x or y, terms of the sum)
    first, second = terms[:, 0], terms[:, 1]
    return np.concatenate((np.minimum(first, second).sum(-1) + matrix[:2, 2],
                           np.maximum(first, second).sum(-1) + matrix[:2, 2]), 1)


def of_one_dtype(images):
    """Images as they are, or all of them as float32 where their dtypes differ: they could neither be stacked nor drawn
    onto one canvas."""
    return [image.float() for image in images] if len({image.dtype for image in images}) > 1 else images


def resize(image, size):
    """(C, H, W) -> (C, *size), antialiased. Bytes stay bytes, all else becomes float32."""
    if image.shape[1:] == tuple(size):
        return image
    bytes_here = image.dtype == torch.uint8 and image.device.type == "cpu"  # GPUs resize no bytes
    # with the bands last in memory, image[None] would not count as channels-last, which is slower
    batch = (image if bytes_here else image.float()).permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    small = F.interpolate(batch, size, mode="bilinear", antialias=True)[0]
    return small.round().to(torch.uint8) if image.dtype == torch.uint8 and not bytes_here else small


def shrunk(image, matrix):
    """An image (C, H, W) that a matrix makes smaller, resized with antialiasing by as much, -> the smaller image and
    the matrix from its pixels: `warp` alone would skip pixels. What shrinks by less than a ninth stays as it is."""
    sides, factor = image.shape[1:], abs(np.linalg.det(matrix[:2, :2])) ** 0.5
    height, width = [max(1, round(side * factor)) for side in sides] if factor < 0.89 else sides
    return resize(image, (height, width)), matrix @ scale(sides[1] / width, sides[0] / height)


def paste(image, matrix, canvas, cell):
    """Draws an image into the part `cell` = (x1, y1, x2, y2) of a canvas, in one resampling.

    image: (C, H, W); canvas: (C, height, width) of the same dtype, changed in place. -> (the matrix that was used, the
    rectangle x1, y1, x2, y2 that was drawn, empty if nothing was). A matrix that only scales, flips and shifts is
    changed by up to half a pixel, so that a rectangle of whole pixels is drawn to one of whole pixels: that is resized
    with antialiasing, several times faster than the general `warp`, which all other matrices take.
    """
    sides, low = np.array(image.shape[2:0:-1]), np.rint(cell[:2]).clip(0)  # x, y; so are all pairs below
    high = np.minimum(np.rint(cell[2:]), canvas.shape[2:0:-1])
    if abs(matrix[0, 1]) > 1e-9 or abs(matrix[1, 0]) > 1e-9:
        return matrix, _paste_warped(image, matrix, canvas, low, high)
    factor, start = matrix.diagonal()[:2], matrix[:2, 2]
    ends = np.rint(np.sort([start, start + factor * sides], 0))
    target = np.stack((np.maximum(ends[0], low), np.minimum(ends[1], high)))  # first and end pixels on the canvas
    source = np.sort(np.rint(((target - start) / factor).clip(0, sides)), 0)  # and of the image
    if (target[1] <= target[0]).any() or (source[1] <= source[0]).any():
        return matrix, np.zeros(4)
    factor = np.copysign((target[1] - target[0]) / (source[1] - source[0]), factor)
    snapped = scale(*factor)
    snapped[:2, 2] = target[0] - factor * np.where(factor < 0, source[1], source[0])
    (left, top), (right, bottom) = source.astype(int)
    (x1, y1), (x2, y2) = target.astype(int).tolist()
    part = resize(image[:, top:bottom, left:right], (y2 - y1, x2 - x1))
    axes = [2 - i for i in (0, 1) if factor[i] < 0]
    canvas[:, y1:y2, x1:x2] = part.flip(axes) if axes else part
    return snapped, target.ravel()


def _paste_warped(image, matrix, canvas, low, high):
    """`paste` with a general matrix. low, high: first and end pixel (x, y). -> the rectangle that was drawn."""
    around = warp_boxes([[0, 0, image.shape[2], image.shape[1]]], matrix)[0]
    drawn = np.concatenate((np.maximum(np.floor(around[:2]), low), np.minimum(np.ceil(around[2:]), high)))
    x1, y1, x2, y2 = drawn.astype(int).tolist()
    if x2 <= x1 or y2 <= y1:
        return np.zeros(4)
    to_part, size = translate(-x1, -y1) @ matrix, (y2 - y1, x2 - x1)
    inside = warp(torch.ones_like(image[:1]), to_part, size, mode="nearest") > 0
    part, (image, to_part) = canvas[:, y1:y2, x1:x2], shrunk(image, to_part)
    part.copy_(torch.where(inside, warp(image, to_part, size, border="reflect"), part))
    return drawn


def warp(image, matrix, size, *, mode="bilinear", border="constant"):
    """Moves an image by `matrix` onto a canvas of `size` = (height, width), in one resampling.

    image: (C, H, W) or (B, C, H, W), any dtype; matrix: (3, 3), or (B, 3, 3) with one per image.
    mode: "bilinear", or "nearest" for masks. border: the values outside of the source: "constant" (0), "reflect"
    (without repeating the edge) or "wrap".

    Flips, quarter turns and shifts by whole pixels move pixels exactly, in any dtype; with the identity the result is
    the image itself. Everything else is interpolated; integers and half precision are computed in float32 and rounded.
    """
    inverse = np.linalg.inv(matrix)
    steps, offset = inverse[..., :2, :2], inverse[..., :2, :2] @ (0.5, 0.5) + inverse[..., :2, 2] - 0.5
    if inverse.ndim == 2 and _whole(steps, 1e-9) and _whole(offset, 1e-6) and (abs(np.rint(steps)).sum(0) == 1).all():
        return _move(image, np.rint(steps).astype(int), np.rint(offset).astype(int), size, border)
    return _resample(image, inverse, size, mode, border)


def _whole(values, tolerance):
    return (abs(values - np.rint(values)) < tolerance).all()


def _move(image, steps, offset, size, border):
    """Output pixel (row v, column u) is source pixel steps @ (u, v) + offset: only indices are computed."""
    if steps[0, 0] == 0:  # a quarter turn: source x runs along output rows
        image, steps, offset = image.transpose(-1, -2), steps[::-1], offset[::-1]
    outside = []
    for axis, length, step, start in ((-1, size[1], steps[0, 0], offset[0]), (-2, size[0], steps[1, 1], offset[1])):
        source = image.shape[axis]
        index = _fold(np.arange(length) * step + start, source, border)
        outside.append(torch.from_numpy((index < 0) | (index >= source)))
        if length == source and step == -1 and start == source - 1:
            image = image.flip(axis)  # unlike index_select this keeps channels-last
        elif (length, step, start) != (source, 1, 0):
            image = image.index_select(axis, torch.from_numpy(index.clip(0, source - 1)).to(image.device))
    if outside[0].any() or outside[1].any():
        outside = (outside[1][:, None] | outside[0][None]).to(image.device)
        image = torch.where(outside, image.new_zeros(()), image)  # masked_fill has no uint16
    return image


def _fold(index, length, border):
    """Pixel indices of one axis; those beyond 0..length-1 are brought back inside if the border repeats the image."""
    if border == "wrap":
        return index % length
    if border == "reflect":
        return (length - 1) - abs(index % max(2 * (length - 1), 1) - (length - 1)) if length > 1 else index * 0
    return index


def _resample(image, inverse, size, mode, border):
    """`warp` by grid_sample, with matrices (3, 3) or (B, 3, 3) from output to source coordinates."""
    batched = image if image.ndim == 4 else image[None]
    values = batched if batched.dtype == torch.float64 else batched.float()  # half precision is too coarse
    if border == "reflect":  # one row or column is doubled, else grid_sample would divide by 0
        values = values.repeat(1, 1, *(2 if side == 1 else 1 for side in values.shape[-2:]))
    height, width = values.shape[-2:]
    dtype = values.dtype
    inverse = np.reshape(inverse, (-1, 3, 3))
    # grid_sample's -1 and 1 are the image's edges, with align_corners the centres of its outermost pixels
    corners = int(border == "reflect")
    if border != "wrap":
        to_grid = translate(-1, -1) @ scale(2 / (width - corners), 2 / (height - corners))
        inverse = to_grid @ translate(-corners / 2, -corners / 2) @ inverse
    elif image.device.type != "mps":  # it has no float64, which the remainders below need
        dtype = torch.float64
    # computed on the image's device: for 32 views of 384 x 384 pixels these are 40 MB, and a CPU needs longer for them
    # than for the pixels
    across, down, start = torch.as_tensor(inverse[:, :2], dtype=dtype, device=image.device)[..., None, None].unbind(2)
    y, x = (torch.arange(side, dtype=dtype, device=image.device) + 0.5 for side in size)
    grid = torch.empty(len(inverse), *size, 2, dtype=dtype, device=image.device)
    for i, n in enumerate((width, height)):  # written in place: a CPU would need half as long again to stack x and y
        place = torch.add(across[:, i] * x, down[:, i] * y[:, None] + start[:, i], out=grid[..., i])
        if border == "wrap":
            place.copy_(((place - 0.5) % n + 0.5) * 2 / (n + 1) - 1)
    if border == "wrap":  # the first row and column once more behind the last: pixels between them are interpolated
        values = F.pad(values, (0, 1, 0, 1), mode="circular")
    grid = grid.to(values).expand(len(values), -1, -1, -1)
    padding = {"constant": "zeros", "reflect": "reflection", "wrap": "border"}[border]
    out = F.grid_sample(values, grid, mode=mode, padding_mode=padding, align_corners=bool(corners))
    out = (out if image.is_floating_point() else out.round()).to(image.dtype)
    return out if image.ndim == 4 else out[0]
