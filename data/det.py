"""Detection data: images with boxes -> mosaics for training, letterboxed images for validation and prediction."""
import functools
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, default_collate

from data import augment, images, units
from data.cache import Cache
from utils.ops import boxes, tiles
from utils.ops.geometry import of_one_dtype, paste, resize, scale, translate, warp_boxes
from utils.train import dist

GREY = 114  # of 255, around the images


@dataclass
class Input(units.Input):
    """What the net sees of images (B, C, H, W) in the numbers of their files -> float32, 0..1.

    bands: the band numbers that the channels are; None: the input's own. colour: matrices (B, C, C) of
    `augment.colour` for training, applied together with the scaling. With --pixel-scale standard it is not limited to
    0..1.
    """

    def __call__(self, images, bands=None, colour=None):
        x = self.scaled(images, bands, colour)
        return x if len(self.pixel_mean) else x.clamp_(0, 1)


class Sample(NamedTuple):
    """An image with its boxes, or a window of an image."""
    file: Path
    boxes: np.ndarray     # float64 (n, 5): class, x1, y1, x2, y2, in pixels of the image or window
    size: tuple           # (height, width)
    window: tuple = None  # (y, x, height, width) in the file; None: the whole image
    weight: float = 1.0   # how often the sample is drawn, compared with the others


def samples(data, indices, weight=1.0):
    """Some images of data.labels.Labels -> list of Sample."""
    return [Sample(data.files[i], np.column_stack((data.classes[i], data.boxes[i])), data.sizes[i], weight=weight)
            for i in indices]


def cut(samples, tile, overlap):
    """Samples -> the same with the windows of every image larger than `tile` in its place, for training at full
    resolution; tile None: none. Boxes are clipped to their window, and dropped where too little of them is inside
    (`augment.visible`)."""
    found = []
    for sample in samples:
        windows = tiles.cover(sample.size, tile, overlap)
        found += [] if windows else [sample]
        for y, x, height, width in windows:
            rows = crop(sample.boxes, sample.boxes[:, 1:] - [x, y, x, y], (0, 0, width, height))
            found.append(sample._replace(boxes=rows, size=(height, width), window=(y, x, height, width)))
    return found


def crop(rows, moved, area):
    """rows (n, 5) of class and box; moved (n, 4): where the boxes are now -> the rows (m, 5) of those boxes that are
    still visible in the area (x1, y1, x2, y2), clipped to it."""
    clipped = moved.clip([*area[:2]] * 2, [*area[2:]] * 2)
    keep = augment.visible(moved, clipped)
    return np.column_stack((rows[keep, 0], clipped[keep]))


def rect(size, imgsz, stride, border=0.5):
    """size (height, width) of an image -> (height, width) of the smallest canvas for its long side at imgsz pixels, in
    multiples of the stride, with a border of half a stride at least, both sides together: objects at the edge get some
    surroundings.
    """
    return tuple(math.ceil(side * imgsz / max(size) / stride + border) * stride for side in size)


class Pictures:
    """`pictures[i]` -> image i, or its window, (C, H, W) uint8 or float32, bands last in memory, its long side at most
    `limit`. Larger images are reduced on reading; data.cache.Cache keeps them (`cache`: "ram", "disk" or None).

    sizes: (height, width) in the files; windows: (y, x, height, width) or None. `pictures.sizes`: (height, width) of
    what is read; `pictures.matrices`: from pixels of the image or window to pixels of what is read.
    """

    def __init__(self, files, sizes, windows, *, bands, limit, cache=None):
        self.files, self.windows, self.bands = files, windows, bands
        self.sizes = [images.reduced(size, limit) for size in sizes]
        self.matrices = [scale(new[1] / old[1], new[0] / old[0]) for new, old in zip(self.sizes, sizes)]
        self.cache = Cache(files, self.read, cache, variant=("bands last", bands, limit, windows))

    def read(self, i):
        """-> (H, W, C) in the file's dtype, contiguous: fast to resize once more."""
        full, small = (self.windows[i] or images.size(self.files[i]))[-2:], self.sizes[i]
        step = max(full) // (4 * max(small))  # of a far larger scene every step-th pixel will do
        shape = tuple(max(1, side // step) for side in full) if step > 1 else None
        image = images.read_picture(self.files[i], self.bands, window=self.windows[i], shape=shape)
        image = resize(image, small)
        if image.is_floating_point() and images.header(self.files[i]).dtype == "uint8":  # where there is no data
            image = image.nan_to_num(GREY).round().to(torch.uint8)
        return image.permute(1, 2, 0).contiguous()

    def __getitem__(self, i):
        pixels = self.cache[i]
        return (pixels if pixels.dtype == torch.uint8 else pixels.float()).permute(2, 0, 1)


class DetData(Dataset):
    """Training: `data[(epoch, index)]` -> an augmented picture imgsz x imgsz, which depends on (seed, epoch, index)
    only:
        {"image": (H, W, C) in the file's numbers, uint8 or float32,
         "boxes": float32 (n, 5) of class, x1, y1, x2, y2 in pixels of the picture,
         "colour": float32 (C, C), still to be applied by `Input`, "index": int}

    samples: list of Sample. bands: from 1; None: all. mosaic, mixup: probabilities, mixup blends a mosaic with a second
    one; close_mosaic: epoch, from 0, from which on there are neither. view,
    colour: keyword arguments of `augment.view`, for each picture or mosaic, and `augment.colour`. cache: see Pictures.
    """

    def __init__(self, samples, *, view={}, colour={}, bands=None, imgsz=640, seed=0, cache=None, mosaic=1.0, mixup=0.0,
                 close_mosaic=math.inf):
        self.files, boxes, sizes, windows, _ = zip(*samples)
        self.labels = [rows.astype(np.float32) for rows in boxes]
        self.imgsz, self.seed = imgsz, seed
        self.mosaic, self.mixup, self.close_mosaic = mosaic, mixup, close_mosaic
        self.view, self.colour = view, colour
        limit = math.ceil(imgsz * max(1, *view.get("zoom", [1])))  # no view shows more, unless it is stretched
        self.pictures = Pictures(self.files, sizes, windows, bands=bands, limit=limit, cache=cache)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, key):
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
        colour = augment.colour(rng, len(image), **self.colour)
        return {"image": image.permute(1, 2, 0), "boxes": torch.from_numpy(boxes), "colour": colour,
                "index": index % len(self)}

    def scene(self, rng, i, mosaic):
        """One view of image i, or of a mosaic of it with others -> picture (C, H, W), boxes (n, 5)."""
        chosen = [i, *rng.integers(len(self), size=3)] if mosaic else [i]
        side, matrices, cells = augment.layout(rng, [self.pictures.sizes[k] for k in chosen], self.imgsz)
        view, _ = augment.view(rng, side, side, self.imgsz, **self.view)
        cells = warp_boxes(cells, view)
        if self.view.get("degrees") or self.view.get("shear"):
            # rotated cells are no rectangles: each picture is drawn whole, over the pictures before it
            cells[:] = (0, 0, self.imgsz, self.imgsz)
        # pictures of the mosaic that the view does not show need not be decoded
        shown = [j for j, cell in enumerate(cells) if max(cell[:2]) < self.imgsz and min(cell[2:]) > 0] or [0]
        return self.compose([chosen[j] for j in shown], [view @ matrices[j] for j in shown], cells[shown].tolist())

    def compose(self, chosen, matrices, cells):
        """Draws the images `chosen` by their matrices, each into its cell (x1, y1, x2, y2) of the canvas -> picture
        (C, imgsz, imgsz), boxes float32 (n, 5), clipped to what is seen of their image."""
        sources = of_one_dtype([self.pictures[k] for k in chosen])
        canvas = new_canvas(sources[0], (self.imgsz, self.imgsz))
        rows = []
        for source, k, matrix, cell in zip(sources, chosen, matrices, cells):
            matrix, drawn = paste(source, matrix, canvas, cell)
            moved = warp_boxes(self.labels[k][:, 1:], matrix @ self.pictures.matrices[k])
            rows.append(crop(self.labels[k], moved, drawn))
        return canvas, np.concatenate(rows).astype(np.float32)


def new_canvas(like, shape):
    """shape (height, width) -> (C, height, width), bands and dtype of `like`, bands last in memory; grey, or no data
    (NaN) where pixels are not bytes."""
    fill = GREY if like.dtype == torch.uint8 else math.nan
    return torch.full((*shape, len(like)), fill, dtype=like.dtype).permute(2, 0, 1)


def collate(samples):
    """Samples of DetData or TiledImages -> a batch: {"image": (B, C, H, W) channels-last, "boxes": float32 (n, 6) of
    position in the batch, class, x1, y1, x2, y2, "colour" stacked; everything else as lists, which stay on the CPU}."""
    batch = {name: [sample[name] for sample in samples] for name in samples[0]}
    batch["image"] = of_one_dtype(batch["image"])
    batch |= {name: default_collate(batch[name]) for name in ("image", "colour") if name in batch}
    batch["image"] = batch["image"].permute(0, 3, 1, 2)
    batch["boxes"] = torch.cat([F.pad(rows, (1, 0), value=i) for i, rows in enumerate(batch["boxes"])])
    return batch


def gt_boxes(batch):
    """The boxes of a collated batch, image by image: B tensors (n, 5) of x1, y1, x2, y2, class."""
    rows = batch["boxes"]
    return [rows[rows[:, 0] == i, 1:].roll(-1, 1) for i in range(len(batch["image"]))]


def move(rows, matrix):
    """Rows (n, 4 or more) of x1, y1, x2, y2, ... -> float32, the boxes moved by a matrix."""
    return torch.cat((torch.from_numpy(warp_boxes(rows[:, :4], matrix)), rows[:, 4:]), 1).float()


class TiledImages(Dataset):
    """Validation and prediction: the views of every file are the whole image and, if it is larger than `tile`, its
    windows too.

    `data[k]` -> view k, letterboxed:
        {"image": (height, width, C) in the file's numbers, uint8 or float32; "index": k,
         "boxes": the image's `boxes`, float32 (n, 5) of class, x1, y1, x2, y2 in pixels of the view,
         "matrix": float64 (3, 3), from pixels of the file to pixels of the view}
    boxes: the same in pixels of the file, per file; None: no boxes. cache: see Pictures. `data.sizes`: (height, width)
    per file; `data.shapes`: the same per view. border: of `rect`, in strides. enlarge: whether smaller images are
    enlarged to imgsz. UserError for a file without the bands.
    """

    def __init__(self, files, boxes=None, *, bands, imgsz, stride, tile=None, overlap=0.25, cache=None, border=0.5,
                 enlarge=True):
        self.files = files
        self.boxes = boxes or [torch.zeros(0, 5)] * len(files)
        self.sizes = [images.size(file)[1:] for file in files]
        images.check_bands(files, bands)
        # (the file's index, window (y, x, height, width) or None)
        self.views = [(i, window) for i, size in enumerate(self.sizes)
                      for window in [None, *tiles.cover(size, tile, overlap)]]
        sizes = [window[2:] if window else self.sizes[i] for i, window in self.views]
        self.sides = [imgsz if enlarge else min(imgsz, max(size)) for size in sizes]
        self.shapes = [rect(size, side, stride, border) for size, side in zip(sizes, self.sides)]
        self.pictures = Pictures([files[i] for i, _ in self.views], sizes, [window for _, window in self.views],
                                 bands=bands, limit=imgsz, cache=cache)

    def __len__(self):
        return len(self.views)

    def __getitem__(self, k):
        i, window = self.views[k]
        image, shape = self.pictures[k], self.shapes[k]
        canvas = new_canvas(image, shape)
        matrix = augment.letterbox(*image.shape[1:], self.sides[k], shape)
        matrix, _ = paste(image, matrix, canvas, (0, 0, *shape[::-1]))
        y, x = window[:2] if window else (0, 0)
        matrix = matrix @ self.pictures.matrices[k] @ translate(-x, -y)
        return {"image": canvas.permute(1, 2, 0), "boxes": move(self.boxes[i].roll(-1, 1), matrix).roll(1, 1),
                "matrix": matrix, "index": k}

    def detect(self, loader, predict, *, iou, max_det, weights=None):
        """-> per file the detections (n, 6) within the image, in its pixels, the same on every rank.

        loader: of `collate`d views, whose shares lie on the ranks. predict: batch -> per checkpoint a list with the
        detections (n, 6) of each of its images, in pixels of the batch. iou, max_det: of boxes.suppress, which joins a
        checkpoint's views; weights: of boxes.wbf, which fuses the checkpoints.
        """
        found = {}  # view -> its detections by each checkpoint, in pixels of the file
        for batch in loader:
            for k, matrix, *members in zip(batch["index"], batch["matrix"], *predict(batch)):
                i, window = self.views[k]
                found[k] = [move(rows.cpu(), np.linalg.inv(matrix)) for rows in members]
                if window:
                    found[k] = [boxes.drop_border_boxes(rows, window, *self.sizes[i]) for rows in found[k]]
        found = dist.gather_dicts(found)
        results = []
        for i, views in itertools.groupby(range(len(self)), key=lambda k: self.views[k][0]):
            members = [boxes.suppress(torch.cat(rows), iou=iou, max_det=max_det) if len(rows) > 1 else rows[0]
                       for rows in zip(*(found[k] for k in views))]
            rows = boxes.wbf(members, weights=weights)[:max_det] if len(members) > 1 else members[0]
            rows = boxes.clip(rows, *self.sizes[i])
            rows = rows[(boxes.sides(rows) > 0).all(1)]
            results.append(rows[[not in_void(self.files[i], self.pictures.bands, box) for box in rows[:, :4].tolist()]])
        return results


def in_void(file, bands, box):
    """Whether at least half of a box x1, y1, x2, y2, in pixels of the file, holds no data."""
    empty = _void_map(file, tuple(bands)) if images.header(file).gaps else None
    if empty is None:
        return False
    y, x = (new / old for new, old in zip(empty.shape, images.size(file)[1:]))
    x1, y1, x2, y2 = box
    return bool(empty[int(y1 * y):math.ceil(y2 * y), int(x1 * x):math.ceil(x2 * x)].float().mean() >= 0.5)


@functools.lru_cache(maxsize=2**12)
def _void_map(file, bands):
    """`images.void` of a file, reduced to at most 512 pixels."""
    return images.void(images.thumbnail(file, bands, 512)[0])
