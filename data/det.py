"""Detection data: images with boxes -> mosaics for training, letterboxed images for validation and prediction."""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, default_collate

from data import augment, images
from data.cache import Cache
from utils.ops import boxes, tiles
from utils.errors import UserError
from utils.ops.geometry import paste, scale, translate, warp_boxes

GREY = 114  # of 255, around the images


def rect(size, imgsz, stride, pad=0.5):
    """size (height, width) of an image -> (height, width) of the smallest canvas for its long side at imgsz pixels, in
    multiples of the stride.

    pad: least border, in strides, both sides together: objects at the edge get some surroundings.
    """
    return tuple(int(np.ceil(side * imgsz / max(size) / stride + pad)) * stride for side in size)


def default_scale(files, bands):
    """`images.default_scale`. UserError where the first file's pixels go beyond it, or below 0: what is trained on is
    cut off at 0 and 1."""
    file, scale = files[0], images.default_scale(files)
    pixels = images.read_picture(file, bands, shape=reduced(images.size(file)[1:], 1024))
    kind, least, most = images.header(file).dtype, float(pixels.numpy().min()), float(pixels.numpy().max())
    if least < 0:  # such as decibels, of which nothing would be left
        raise UserError(f"{file}: has {kind} pixels down to {least:g}, and all below 0 is black; add a number to the "
                        f"pixels of all images so that they begin at 0, or let it be black by --band-scale")
    if most > scale:
        raise UserError(f"{file}: has {kind} pixels up to {most:g}, and nothing tells which is white; give "
                        f"--band-scale")
    return scale


def reduced(size, limit):
    """size (height, width) -> the same shape with the long side at most `limit`."""
    factor = min(1, limit / max(size))
    return tuple(max(1, round(side * factor)) for side in size)


def read_small(path, bands, size, window=None):
    """A picture resized to `size` -> (H, W, C) in memory, from which it is fast to resize once more."""
    image = images.read_picture(path, bands, window=window).permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return images.resize(image, size).permute(1, 2, 0).contiguous()


def cut(files, boxes, classes, sizes, *, tile, overlap):
    """Lists of data.labels.Labels -> the same with every larger image's windows in place of it, for training at full
    resolution; a fifth list: window or None; and the index of the image that each entry is of. Boxes are clipped to
    their window, and left out where little of them is in it (`augment.visible`)."""
    entries, image_of = [], []
    for i, (file, rows, labels, size) in enumerate(zip(files, boxes, classes, sizes)):
        for window in tiles.cover(size, tile, overlap) or [None]:
            y, x, *part = window or (0, 0, *size)
            before = rows - [x, y, x, y]
            after = before.clip(0, [*part[::-1]] * 2)
            keep = augment.visible(before, after) if window else slice(None)
            entries.append((file, after[keep], labels[keep], tuple(part), window))
            image_of.append(i)
    return [list(column) for column in zip(*entries)], image_of


class DetData(Dataset):
    """`data[(epoch, index)]` -> an augmented picture imgsz x imgsz, which depends on (seed, epoch, index) only:
        {"image": (H, W, C) in the file's numbers, uint8 or float32,
         "boxes": float32 (n, 5) of class, x1, y1, x2, y2 in pixels of the picture,
         "colour": float32 (C, C), still to be applied by augment.recolour, "index": int}
    `data[index]` -> the whole image, letterboxed:
        {"image", "index": as above, "boxes": float32 (n, 5) in pixels of the file,
         "matrix": float64 (3, 3), from pixels of the file to pixels of the picture}

    files, boxes, classes, sizes: lists of data.labels.Labels. Larger images are reduced to what can be seen of them as
    they are read, and kept so by `cache` ("ram" or "disk"). windows: see `cut`; of an image that has one, only that is
    seen, and pixels are counted in it. bands: from 1; None: all. shapes: canvas (height, width) of each letterboxed
    image, see `rect`; None: imgsz x imgsz. mosaic, mixup: probabilities, mixup of a mosaic with a second one; grid: 4
    or 9 images in a mosaic; close_mosaic: epoch, from 0, from which on there are neither. hsv: see augment.colour. The
    rest: see augment.affine.
    """

    def __init__(self, files, boxes, classes, sizes, windows=None, *, bands=None, imgsz=640, shapes=None, seed=0,
                 cache=None, mosaic=1.0, grid=4, mixup=0.0, close_mosaic=math.inf, hsv=(0.015, 0.7, 0.4), **affine):
        self.files, self.imgsz, self.shapes, self.seed = files, imgsz, shapes, seed
        self.labels = [np.concatenate((c[:, None], b), 1).astype(np.float32) for b, c in zip(boxes, classes)]
        self.mosaic, self.grid, self.mixup, self.close_mosaic = mosaic, grid, mixup, close_mosaic
        self.hsv, self.affine = hsv, affine
        limit = imgsz if shapes else math.ceil(imgsz * (1 + affine.get("scale", 0.5)))  # no view shows more
        self.small = small = [reduced(size, limit) for size in sizes]
        # matrices from pixels of the file to those of what is read
        self.shrink = [scale(new[1] / w, new[0] / h) for new, (h, w) in zip(small, sizes)]
        windows = windows or [None] * len(files)
        self.pictures = Cache(files, lambda i: read_small(files[i], bands, small[i], windows[i]), cache,
                              variant=("bands last", bands, limit, *(windows if any(windows) else ())))

    def __len__(self):
        return len(self.files)

    def load(self, i):
        """-> (C, H, W), uint8 or float32, bands last in memory."""
        pixels = self.pictures[i]
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
            image = mixed.round().to(torch.uint8) if image.dtype == other.dtype == torch.uint8 else mixed
            boxes = np.concatenate((boxes, more))
        colour = torch.from_numpy(augment.colour(rng, len(image), *self.hsv))
        return {"image": image.permute(1, 2, 0), "boxes": torch.from_numpy(boxes), "colour": colour,
                "index": index % len(self)}

    def scene(self, rng, i, mosaic):
        """Image i, or a mosaic of it with others, under one random affine matrix -> picture (C, H, W), boxes (n, 5)."""
        chosen = [i, *rng.integers(len(self), size=self.grid - 1)] if mosaic else [i]
        side, placed = augment.layout(rng, [self.small[k] for k in chosen], self.imgsz)
        view = augment.affine(rng, side, self.imgsz, **self.affine)
        cells = warp_boxes([cell for _, cell in placed], view)
        if self.affine.get("degrees") or self.affine.get("shear"):
            # turned cells are no rectangles: each picture is drawn whole, over those before it
            cells[:] = (0, 0, self.imgsz, self.imgsz)
        # of a mosaic that is zoomed into, not all is in sight; the rest need not be decoded
        seen = np.flatnonzero((cells[:, :2] < self.imgsz).all(1) & (cells[:, 2:] > 0).all(1)).tolist() or [0]
        chosen, matrices = [chosen[j] for j in seen], [view @ placed[j][0] for j in seen]
        sources = [self.load(k) for k in chosen]
        if len({source.dtype for source in sources}) > 1:  # into a canvas of bytes others would wrap
            sources = [source.float() for source in sources]
        return self.compose(sources, chosen, matrices, cells[seen].tolist())

    def compose(self, sources, chosen, matrices, cells):
        """Draws sources (C, H, W), which are the images `chosen`, by their matrices, each into its cell (x1, y1, x2,
        y2) of the canvas -> picture (C, imgsz, imgsz), boxes float32 (n, 5), clipped to what is seen of their image."""
        canvas = new_canvas(sources[0], (self.imgsz, self.imgsz))
        before, drawn = [], []
        for source, k, matrix, cell in zip(sources, chosen, matrices, cells):
            matrix, part = paste(source, matrix, canvas, cell)
            before.append(warp_boxes(self.labels[k][:, 1:], matrix @ self.shrink[k]))
            drawn.append(np.broadcast_to(part, before[-1].shape))
        before, drawn = np.concatenate(before), np.concatenate(drawn)
        after = np.minimum(np.maximum(before, drawn[:, [0, 1, 0, 1]]), drawn[:, [2, 3, 2, 3]])
        keep = augment.visible(before, after)
        classes = np.concatenate([self.labels[k][:, :1] for k in chosen])
        return canvas, np.concatenate((classes[keep], after[keep]), 1).astype(np.float32)

    def letterboxed(self, i):
        shape = self.shapes[i] if self.shapes else (self.imgsz, self.imgsz)
        sample = letterboxed(self.load(i), self.imgsz, shape, self.shrink[i])
        return sample | {"boxes": torch.from_numpy(self.labels[i]), "index": i}


def new_canvas(like, shape):
    """shape (height, width) -> (C, height, width), bands and dtype those of `like`, bands last in memory; grey, or 0
    where pixels are not bytes."""
    fill = GREY if like.dtype == torch.uint8 else 0
    return torch.full((*shape, len(like)), fill, dtype=like.dtype).permute(2, 0, 1)


def letterboxed(image, imgsz, shape, before):
    """An image (C, H, W) in the middle of a canvas `shape` (height, width), its long side at imgsz pixels -> {"image":
    (height, width, C), "matrix": float64 (3, 3) from pixels of the file to those of the canvas}. before: matrix from
    pixels of the file to those of the image."""
    canvas = new_canvas(image, shape)
    matrix = augment.letterbox(*image.shape[1:], imgsz, shape)
    matrix, _ = paste(image, matrix, canvas, (0, 0, *shape[::-1]))
    return {"image": canvas.permute(1, 2, 0), "matrix": matrix @ before}


def collate(samples):
    """Samples of DetData -> a batch: {"image": (B, C, H, W) channels-last, "boxes": float32 (n, 6) of position in the
    batch, class, x1, y1, x2, y2, and the rest stacked}."""
    if len({s["image"].dtype for s in samples}) > 1:  # bytes and others: stacking in a worker would not convert them
        samples = [s | {"image": s["image"].float()} for s in samples]
    apart = "boxes", "matrix"
    batch = {name: default_collate([s[name] for s in samples]) for name in samples[0] if name not in apart}
    if "matrix" in samples[0]:  # no tensor: it is wanted here, not on the GPU
        batch["matrix"] = np.stack([s["matrix"] for s in samples])
    batch["image"] = batch["image"].permute(0, 3, 1, 2)
    batch["boxes"] = torch.cat([F.pad(s["boxes"], (1, 0), value=i) for i, s in enumerate(samples)])
    return batch


def gt_boxes(batch):
    """The boxes of a collated batch, image by image: B tensors (n, 5) of x1, y1, x2, y2, class."""
    image, rows = batch["boxes"][:, 0], batch["boxes"][:, 1:].roll(-1, 1)
    return [rows[image == i] for i in range(len(batch["image"]))]


def move(rows, matrix):
    """Boxes or detections (n, 4 or more) of x1, y1, x2, y2, ..., moved by a matrix (3, 3) that only scales and shifts.
    """
    step = rows.new_tensor([matrix[0, 0], matrix[1, 1]] * 2)
    return torch.cat((rows[:, :4] * step + rows.new_tensor([matrix[0, 2], matrix[1, 2]] * 2), rows[:, 4:]), 1)


def restore(rows, matrix):
    """`move` by the inverse: with a letterboxed sample's "matrix", back to pixels of the file."""
    return move(rows, np.linalg.inv(matrix))


class TiledImages(Dataset):
    """What the nets look at: every image as a whole and, if it is larger than `tile`, also its windows.

    `views[k]` -> as a letterboxed sample of DetData, without boxes or with the image's `boxes`: float32 (n, 5) of
    class, x1, y1, x2, y2 per file. UserError for a file without the bands.
    """

    def __init__(self, files, boxes=None, *, bands, imgsz, stride, tile=None, overlap=0.25):
        self.files, self.bands, self.imgsz = files, bands, imgsz
        self.boxes = boxes or [torch.zeros(0, 5)] * len(files)
        self.sizes = []  # (height, width) per file
        self.items = []  # (file's index, window (y, x, height, width) or None) per view
        self.first = []  # each file's first view; at the end the number of views
        for i, file in enumerate(files):
            count, *size = images.size(file)
            if not images.has_bands(file, bands):
                raise UserError(f"{file}: has {count} bands, band {max(bands)} is asked for; leave it out, or train "
                                f"with other --bands")
            self.sizes.append(tuple(size))
            self.first.append(len(self.items))
            self.items += [(i, window) for window in [None] + tiles.cover(size, tile, overlap)]
        self.first.append(len(self.items))
        self.shapes = [rect(window[2:] if window else self.sizes[i], imgsz, stride) for i, window in self.items]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, k):
        i, window = self.items[k]
        height, width = self.sizes[i]
        if window:
            image = images.read_picture(self.files[i], self.bands, window=window)
            to_read = translate(-window[1], -window[0])
        else:  # of a far larger scene only every step-th pixel is read, still four for each one of the net's input
            step = max(height, width) // (4 * self.imgsz) or 1
            shape = (max(1, height // step), max(1, width // step))
            image = images.read_picture(self.files[i], self.bands, shape=shape if step > 1 else None)
            to_read = scale(shape[1] / width, shape[0] / height)
        image = image if image.dtype == torch.uint8 else image.float()
        sample = letterboxed(image, self.imgsz, self.shapes[k], to_read)
        return sample | {"boxes": self.boxes[i], "index": k}

    def merge(self, i, found, *, iou, max_det, weights=None):
        """All that was found in image i -> its detections (n, 6), within the image, in its pixels.

        found: {view: detections (n, 6) of each checkpoint}. A checkpoint's views are joined by suppression, the
        checkpoints by fusion. iou, max_det: of boxes.suppress; weights: of boxes.wbf.
        """
        height, width = self.sizes[i]
        mine = range(self.first[i], self.first[i + 1])
        per_member = []
        for by_view in zip(*[found[k] for k in mine]):
            rows = by_view[0]
            if len(mine) > 1:
                kept = [some if window is None else boxes.drop_border_boxes(some, window, height, width)
                        for some, (_, window) in zip(by_view, (self.items[k] for k in mine))]
                rows = boxes.suppress(torch.cat(kept), iou=iou, max_det=max_det)
            per_member.append(rows)
        rows = per_member[0]
        if len(per_member) > 1:
            rows = boxes.wbf(per_member, weights=weights)[:max_det]
        rows = boxes.clip(rows, height, width)
        return rows[(rows[:, 2:4] > rows[:, :2]).all(1)]
