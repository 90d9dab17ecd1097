"""Detection data: images with boxes -> mosaics for training, letterboxed images for validation and prediction."""
import math

import numpy as np
import torch
from torch.utils.data import Dataset

from data import augment, images
from data.cache import Cache
from utils.geometry import paste, scale, warp_boxes

GREY = 114  # of 255, around the images


def rect(size, imgsz, stride, pad=0.5):
    """(height, width) of an image -> the smallest canvas, in multiples of the stride, for its long side at imgsz.

    pad: strides of border that it has at least, both sides together: objects at the edge get some surroundings.
    """
    return tuple(int(np.ceil(side * imgsz / max(size) / stride + pad)) * stride for side in size)


def read(path, bands=None, **options):
    """`images.read`; where RGB is asked for (bands 1-3), grey images and CMYK ones become that."""
    if list(bands or []) != [1, 2, 3]:
        return images.read(path, bands, **options)
    if images.kind(path) == "JPEG":
        image = images.read(path, **options)  # whole: to pick bands would be to copy them
        if len(image) == 4:
            ink = image.int()
            image = (ink[:3] * ink[3] // 255).to(torch.uint8)
    else:
        image = images.read(path, [1] if images.size(path)[0] == 1 else bands, **options)
    return image.expand(3, -1, -1) if len(image) == 1 else image


def reduced(size, limit):
    """(height, width), with the long side at most `limit`."""
    factor = min(1, limit / max(size))
    return tuple(max(1, round(side * factor)) for side in size)


def read_small(path, bands, size):
    """`read`, then resized (size None: as it is) -> (H, W, C), bands last: fast to resize once more."""
    image = read(path, bands).permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return (images.resize(image, size) if size else image).permute(1, 2, 0).contiguous()


class DetData(Dataset):
    """`data[(epoch, index)]` -> an augmented picture imgsz x imgsz, which depends on (seed, epoch, index) only:
        {"image": (H, W, C) in the file's dtype, "boxes": float32 (n, 5) of class, x1, y1, x2, y2 in its pixels,
        "colour": (C, C) matrix still to be applied, "index": int}
    `data[index]` -> the whole image, letterboxed:
        the same with "matrix": float64 (3, 3), from pixels of the file to these; boxes stay in pixels of the file.

    files, boxes, classes, sizes: of data.labels; larger images are reduced to what is needed as they are read (and kept, by
    `cache`); without sizes they are not. shapes: canvas (height, width) of each letterboxed image, see `rect`; without:
    imgsz x imgsz. mosaic, mixup: probabilities; grid: 4 or 9 images in a mosaic; close_mosaic: epoch from which on there
    are neither. hsv: see augment.colour. The rest: see augment.affine.
    """

    def __init__(self, files, boxes, classes, sizes=None, *, bands=None, imgsz=640, shapes=None, seed=0, cache=None,
                 mosaic=1.0, grid=4, mixup=0.0, close_mosaic=None, hsv=(0.015, 0.7, 0.4), **affine):
        self.files, self.imgsz, self.shapes, self.seed = files, imgsz, shapes, seed
        self.labels = [np.concatenate((c[:, None], b), 1).astype(np.float32) for b, c in zip(boxes, classes)]
        limit = imgsz if shapes else math.ceil(imgsz * (1 + affine.get("scale", 0.5)))  # no view shows more
        small = {file: reduced(size, limit) for file, size in zip(files, sizes or ())}
        self.shrink = [(small[file][1] / w, small[file][0] / h) for file, (h, w) in zip(files, sizes or ())] or \
            [(1.0, 1.0)] * len(files)
        self.mosaic, self.grid, self.mixup, self.hsv, self.affine = mosaic, grid, mixup, hsv, affine
        self.close_mosaic = np.inf if close_mosaic is None else close_mosaic
        self.read = lambda path: read_small(path, bands, small.get(path))
        self.cache = Cache(files, self.read, cache, variant=("bands last", bands, limit, bool(sizes))) if cache else None

    def __len__(self):
        return len(self.files)

    def load(self, i):
        """-> (C, H, W), bands last in memory."""
        pixels = self.cache[i] if self.cache else self.read(self.files[i])
        return (pixels if pixels.dtype == torch.uint8 else pixels.float()).permute(2, 0, 1)

    def __getitem__(self, key):
        if not isinstance(key, tuple):
            return self.letterboxed(key)
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        mosaic = epoch < self.close_mosaic and rng.random() < self.mosaic
        image, boxes = self.scene(rng, index % len(self), mosaic)
        if mosaic and rng.random() < self.mixup:
            other, more = self.scene(rng, rng.integers(len(self)), mosaic)
            share = rng.beta(32, 32)
            mixed = image.float() * share + other.float() * (1 - share)
            image, boxes = (mixed.round() if image.dtype == torch.uint8 else mixed).to(image.dtype), np.concatenate((boxes, more))
        colour = torch.from_numpy(augment.colour(rng, len(image), *self.hsv))
        return {"image": image.permute(1, 2, 0), "boxes": torch.from_numpy(boxes), "colour": colour,
                "index": index % len(self)}

    def scene(self, rng, i, mosaic):
        """One image, or a mosaic of it with others, under one random affine matrix -> picture (C, H, W), boxes (n, 5)."""
        chosen = [i, *rng.integers(len(self), size=self.grid - 1)] if mosaic else [i]
        sources = [self.load(k) for k in chosen]
        side, placed = augment.layout(rng, [source.shape[1:] for source in sources], self.imgsz)
        view = augment.affine(rng, side, self.imgsz, **self.affine)
        cells = warp_boxes([cell for _, cell in placed], view).tolist()
        if self.affine.get("degrees") or self.affine.get("shear"):  # cells are rectangles no more
            cells = [(0, 0, self.imgsz, self.imgsz)] * len(placed)
        return self.compose(sources, chosen, [view @ matrix for matrix, _ in placed], cells)

    def compose(self, sources, chosen, matrices, cells):
        canvas = new_canvas(sources[0], (self.imgsz, self.imgsz))
        before, drawn = [], []
        for source, k, matrix, cell in zip(sources, chosen, matrices, cells):
            matrix, part = paste(source, matrix, canvas, cell)
            before.append(warp_boxes(self.labels[k][:, 1:], matrix @ scale(*self.shrink[k])))
            drawn.append(np.broadcast_to(part, before[-1].shape))
        before, drawn = np.concatenate(before), np.concatenate(drawn)
        after = np.minimum(np.maximum(before, drawn[:, [0, 1, 0, 1]]), drawn[:, [2, 3, 2, 3]])
        keep = augment.visible(before, after)
        classes = np.concatenate([self.labels[k][:, :1] for k in chosen])
        return canvas, np.concatenate((classes[keep], after[keep]), 1).astype(np.float32)

    def letterboxed(self, i):
        source = self.load(i)
        shape = self.shapes[i] if self.shapes else (self.imgsz, self.imgsz)
        canvas = new_canvas(source, shape)
        matrix, _ = paste(source, augment.letterbox(*source.shape[1:], self.imgsz, shape), canvas, (0, 0, *shape[::-1]))
        return {"image": canvas.permute(1, 2, 0), "boxes": torch.from_numpy(self.labels[i]),
                "matrix": torch.from_numpy(matrix @ scale(*self.shrink[i])), "index": i}


def new_canvas(like, shape):
    """(C, H, W) of the dtype of `like`, bands last in memory, grey (0 for bands that are not bytes)."""
    fill = GREY if like.dtype == torch.uint8 else 0
    return torch.full((*shape, len(like)), fill, dtype=like.dtype).permute(2, 0, 1)


def collate(samples):
    """Samples -> {"image": (B, C, H, W) channels-last, "boxes": (n, 6) of position in the batch, class, x1, y1, x2, y2,
    and the rest stacked}."""
    if len({s["image"].dtype for s in samples}) > 1:  # bytes and others: stacking in a worker would not convert them
        samples = [s | {"image": s["image"].float()} for s in samples]
    batch = {name: torch.utils.data.default_collate([s[name] for s in samples]) for name in samples[0] if name != "boxes"}
    batch["image"] = batch["image"].permute(0, 3, 1, 2)
    batch["boxes"] = torch.cat([torch.nn.functional.pad(s["boxes"], (1, 0), value=i) for i, s in enumerate(samples)])
    return batch


def move(rows, matrix):
    """Detections or boxes (n, 4 or more: x1, y1, x2, y2, ...), moved by a matrix that scales and shifts."""
    step = rows.new_tensor([matrix[0, 0], matrix[1, 1]] * 2)
    return torch.cat((rows[:, :4] * step + rows.new_tensor([matrix[0, 2], matrix[1, 2]] * 2), rows[:, 4:]), 1)


def restore(rows, matrix):
    """The same, back to pixels of the file."""
    return move(rows, torch.linalg.inv(matrix.cpu().double()))
