"""One geometry for everything: a 3x3 matrix on pixel coordinates moves images, masks, boxes and points alike.

Coordinates are continuous, x to the right and y down: pixel (column j, row i) covers [j, j+1) x [i, i+1), its
centre is (j + 0.5, i + 0.5). A matrix maps source coordinates to output coordinates; matrices compose with `@`,
the first transform rightmost, and are affine float64 numpy arrays.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F


def translate(dx, dy):
    return np.array([[1.0, 0, dx], [0, 1, dy], [0, 0, 1]])


def scale(sx, sy):
    return np.diag([sx, sy, 1.0])


def rotate(degrees):
    """Counter-clockwise as seen on the screen, about the origin."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])


def flip_h(width):
    """Left <-> right."""
    return np.array([[-1.0, 0, width], [0, 1, 0], [0, 0, 1]])


def flip_v(height):
    """Up <-> down."""
    return np.array([[1.0, 0, 0], [0, -1, height], [0, 0, 1]])


def rot90(k, height, width):
    """k quarter turns counter-clockwise of a height x width image, as `torch.rot90(image, k, (-2, -1))`."""
    matrix = np.eye(3)
    for _ in range(k % 4):
        matrix = np.array([[0.0, 1, 0], [-1, 0, width], [0, 0, 1]]) @ matrix
        height, width = width, height
    return matrix


def warp_points(points, matrix):
    """Points (..., 2) of x, y -> the same, moved."""
    points = np.asarray(points, np.float64)
    return points @ matrix[:2, :2].T + matrix[:2, 2]


def warp_boxes(boxes, matrix):
    """Boxes (N, 4) of x1, y1, x2, y2 -> the boxes around their moved corners."""
    corners = np.asarray(boxes, np.float64).reshape(-1, 2, 1, 2) * matrix[:2, :2]  # (N, corner, x or y, its two terms)
    first, second = corners[:, 0], corners[:, 1]
    return np.concatenate((np.minimum(first, second).sum(-1) + matrix[:2, 2],
                           np.maximum(first, second).sum(-1) + matrix[:2, 2]), 1)


def shear(x_degrees, y_degrees):
    """About the origin."""
    return np.array([[1, math.tan(math.radians(x_degrees)), 0], [math.tan(math.radians(y_degrees)), 1, 0], [0, 0, 1]])


def paste(image, matrix, canvas, cell):
    """Draws an image into the part `cell` = (x1, y1, x2, y2) of a canvas, in one resampling.

    image: (C, H, W); canvas: (C, height, width) of the same dtype, changed in place. -> (the matrix that was used, the
    rectangle x1, y1, x2, y2 that was drawn to, or an empty one). A matrix that only scales, flips and moves is moved by
    up to half a pixel, so that a rectangle of whole pixels goes onto one of whole pixels: that is resized with
    antialiasing, several times faster than the general `warp`, which does the rest.
    """
    straight = abs(matrix[0, 1]) < 1e-9 and abs(matrix[1, 0]) < 1e-9
    limits = [(max(round(cell[i]), 0), min(round(cell[i + 2]), canvas.shape[2 - i])) for i in (0, 1)]
    if not straight:
        return matrix, _paste_warped(image, matrix, canvas, limits)
    snapped, source, target = np.eye(3), [], []
    for i, side in enumerate((image.shape[2], image.shape[1])):
        factor, start = float(matrix[i, i]), float(matrix[i, 2])  # numpy's own numbers are slow one by one
        low, high = sorted((start, start + factor * side))
        low, high = max(round(low), limits[i][0]), min(round(high), limits[i][1])
        ends = sorted(round(min(max((edge - start) / factor, 0), side)) for edge in (low, high))
        if high <= low or ends[1] <= ends[0]:
            return matrix, np.zeros(4)
        factor = math.copysign((high - low) / (ends[1] - ends[0]), factor)
        snapped[i, i], snapped[i, 2] = factor, low - factor * ends[factor < 0]
        source.append(ends)
        target.append((low, high))
    (x1, x2), (y1, y2) = target
    part = image[:, source[1][0]:source[1][1], source[0][0]:source[0][1]]
    if part.shape[1:] != (y2 - y1, x2 - x1):
        batch = part.permute(1, 2, 0)[None].permute(0, 3, 1, 2)  # part[None] would not pass for channels-last: slower
        part = F.interpolate(batch, (y2 - y1, x2 - x1), mode="bilinear", antialias=True)[0]
    axes = [axis for axis, i in ((2, 0), (1, 1)) if matrix[i, i] < 0]
    canvas[:, y1:y2, x1:x2] = part.flip(axes) if axes else part
    return snapped, np.array((x1, y1, x2, y2), np.float64)


def _paste_warped(image, matrix, canvas, limits):
    around = warp_boxes([[0, 0, image.shape[2], image.shape[1]]], matrix)[0]
    (x1, x2), (y1, y2) = [(max(math.floor(around[i]), low), min(math.ceil(around[i + 2]), high))
                          for i, (low, high) in enumerate(limits)]
    if x2 <= x1 or y2 <= y1:
        return np.zeros(4)
    to_part, size = translate(-x1, -y1) @ matrix, (y2 - y1, x2 - x1)
    inside = warp(torch.ones_like(image[:1]), to_part, size, mode="nearest") > 0
    canvas[:, y1:y2, x1:x2] = torch.where(inside, warp(image, to_part, size, border="reflect"), canvas[:, y1:y2, x1:x2])
    return np.array((x1, y1, x2, y2), np.float64)


def warp(image, matrix, size, *, mode="bilinear", border="constant", fill=0):
    """Moves an image by `matrix` onto a canvas of `size` = (height, width), in one resampling.

    image: (C, H, W) or (B, C, H, W), any dtype; matrix: (3, 3), or (B, 3, 3) for one per image.
    mode: "bilinear", or "nearest" for masks. border: what lies outside the source: "constant" (`fill`),
    "reflect" (without repeating the edge) or "wrap".

    Flips, quarter turns and whole-pixel shifts move pixels exactly, in any dtype. Everything else is
    interpolated, in float32 for integers and half precision, which are rounded back. The identity gives the
    image itself.
    """
    inverse = np.linalg.inv(matrix)
    steps, offset = inverse[..., :2, :2], inverse[..., :2, :2] @ (0.5, 0.5) + inverse[..., :2, 2] - 0.5
    if inverse.ndim == 2 and _whole(steps, 1e-9) and _whole(offset, 1e-6) and (abs(np.rint(steps)).sum(0) == 1).all():
        return _move(image, np.rint(steps).astype(int), np.rint(offset).astype(int), size, border, fill)
    return _resample(image, inverse, size, mode, border, fill)


def _whole(values, tolerance):
    return (abs(values - np.rint(values)) < tolerance).all()


def _inside(index, length, border):
    """Indices beyond 0..length-1 brought back inside."""
    if border == "wrap":
        return index % length
    if border == "reflect":
        period = max(2 * (length - 1), 1)
        return (length - 1) - abs(index % period - (length - 1)) if length > 1 else index * 0
    return index


def _move(image, steps, offset, size, border, fill):
    """Output pixel (row v, column u) is source pixel steps @ (u, v) + offset: only indices are computed with."""
    dtype = image.dtype
    if dtype == torch.uint16:  # torch has few kernels for it; the same bits move as int16
        image, fill = image.view(torch.int16), int(np.uint16(fill).view(np.int16))
    if steps[0, 0] == 0:  # a quarter turn: source x runs along output rows
        image, steps, offset = image.transpose(-1, -2), steps[::-1], offset[::-1]
    outside = []
    for axis, length, step, start in ((-1, size[1], steps[0, 0], offset[0]), (-2, size[0], steps[1, 1], offset[1])):
        source = image.shape[axis]
        index = torch.from_numpy(_inside(np.arange(length) * step + start, source, border))
        outside.append((index < 0) | (index >= source))
        if length == source and step == -1 and start == source - 1:
            image = image.flip(axis)  # unlike index_select this keeps channels-last
        elif (length, step, start) != (source, 1, 0):
            image = image.index_select(axis, index.clamp(0, source - 1).to(image.device))
    if border == "constant" and (outside[0].any() or outside[1].any()):
        image = image.masked_fill((outside[1][:, None] | outside[0][None]).to(image.device), fill)
    return image.view(dtype) if dtype == torch.uint16 else image  # view() would cut the gradient


def _to_grid(image, corners=False):
    """The matrix from pixels to grid_sample's -1..1: the image's edges, or the centres of its outermost pixels."""
    height, width = image.shape[-2:]
    if corners:
        return translate(-1, -1) @ scale(2 / (width - 1), 2 / (height - 1)) @ translate(-0.5, -0.5)
    return translate(-1, -1) @ scale(2 / width, 2 / height)


def _resample(image, inverse, size, mode, border, fill):
    batched = image if image.ndim == 4 else image[None]
    values = batched if batched.dtype == torch.float64 else batched.float()  # half precision is too coarse for places
    if border == "reflect":  # one row or column between itself and itself: grid_sample would divide by 0
        values = values.repeat(1, 1, *(2 if side == 1 else 1 for side in values.shape[-2:]))
    height, width = values.shape[-2:]
    inverse = np.reshape(inverse, (-1, 3, 3))
    dtype, filled = values.dtype, border == "constant" and fill  # grid_sample fills up with 0 only
    values = values - float(fill) if filled else values
    if border == "wrap":  # places are brought back inside, for which sums must be wide
        dtype = torch.float32 if image.device.type == "mps" else torch.float64
    else:
        inverse = _to_grid(values, corners=border == "reflect") @ inverse
    # where the image is: places of 32 views of 384 x 384 pixels are 40 MB, and take a CPU longer than their pixels
    across, down, start = torch.as_tensor(inverse[:, :2], dtype=dtype, device=image.device)[..., None, None].unbind(2)
    y, x = (torch.arange(side, dtype=dtype, device=image.device) + 0.5 for side in size)
    grid = torch.empty(len(inverse), *size, 2, dtype=dtype, device=image.device)
    for i in (0, 1):
        torch.add(across[:, i] * x, down[:, i] * y[:, None] + start[:, i], out=grid[..., i])
    if border == "wrap":  # between the last pixel and the first one
        grid = torch.stack([(grid[..., i] - 0.5) % n + 0.5 for i, n in enumerate((width, height))], -1)
        values = F.pad(values, (0, 1, 0, 1), mode="circular")
        grid = grid * 2 / grid.new_tensor((values.shape[-1], values.shape[-2])) - 1
    grid = grid.to(values).expand(len(values), -1, -1, -1)
    padding = {"constant": "zeros", "reflect": "reflection", "wrap": "border"}[border]
    out = F.grid_sample(values, grid, mode=mode, padding_mode=padding, align_corners=border == "reflect")
    out = out + float(fill) if filled else out
    out = (out if image.is_floating_point() else out.round()).to(image.dtype)
    return out if image.ndim == 4 else out[0]
