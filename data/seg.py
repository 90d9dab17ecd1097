"""Segmentation data: image and mask files in the wildfire competition's layout -> tensors -> what the net sees.

    DATA/train_img/train_img_17.tif    DATA/train_mask/train_mask_17.tif    DATA/test_img/test_img_3.tif

data/pairs.py reads other layouts.
"""
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rasterio import Affine
from rasterio.crs import CRS
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import augment, bad, images, pairs, units
from data.cache import Cache, facts
from utils.train import dist
from utils.errors import UserError
from utils.ops import tiles
from utils.ops.geometry import resize, shrunk, warp

IGNORE = 255  # in masks as they are trained on: the pixel counts neither in the loss nor in a metric
UNKNOWN = -1  # of `present`: ignored pixels may belong to the class


class Samples(NamedTuple):
    """Pairs of image and mask. A list per column: names, (image path, mask path), True where the data set itself holds
    the sample out for validation, groups for the split or None, sampling weights, (height, width), pixels per class (of
    binary masks two classes); bands: those to read, from 1. A mask path that is the image's: the image has no object.
    """
    names: list
    pairs: list
    held_out: list
    groups: list
    weights: list
    sizes: list
    counts: list
    bands: list

    @property
    def images(self):
        return [image for image, _ in self.pairs]

    @property
    def areas(self):
        """Pixels of an object, per sample."""
        return [sum(counts[1:]) for counts in self.counts]

    def pick(self, indices):
        """The samples with these indices."""
        return Samples(*([column[i] for i in indices] for column in self[:-1]), self.bands)

    def __add__(self, other):
        return Samples(*(ours + theirs for ours, theirs in zip(self[:-1], other[:-1])), self.bands)


def read(root, *, bands=None, classes=1, ignore=None, allow_bad=False):
    """The training samples of a data folder, or of a table of pairs, checked: pixels, bands, sizes, mask values. ->
    Samples

    bands: those that will be read; None: `images.default_bands`. classes, ignore: of `read_mask`. Pairs that cannot be
    used are left out; more than 1 % of them are a UserError unless allow_bad, see `bad.sort_out`.
    """
    rows = pairs.find(Path(root))
    _, paired, *_ = zip(*rows)
    bands = bands or bad.default_bands([image for image, _ in paired])

    def check(pair):
        bad.decode(pair[0], bands)
        return check_mask(*pair, classes, ignore)

    kept, found = bad.sort_out(root, paired, check, variant=(bands, classes, ignore), allow_bad=allow_bad)
    sizes, counts = zip(*found)
    columns = (list(column) for column in zip(*(rows[i] for i in kept)))
    samples = Samples(*columns, list(map(tuple, sizes)), list(counts), bands)
    images.read_headers([mask for _, mask in samples.pairs])
    declared = [mask for image, mask in samples.pairs if mask != image and declared_class(mask, classes) is not None]
    if declared:
        dist.print0(f"{declared[0]}: declares {declared_class(declared[0], classes)} as no data, which is a class "
                    f"({len(declared)} such masks); it counts as that class, unless --ignore names it")
    return samples


def test_folder(root):
    """Where the images without masks are that predict.py reads by default."""
    root = Path(root)
    return (root.parent if root.is_file() else root) / "test_img"


def read_mask(path, classes=1, ignore=None, window=None):
    """-> uint8 tensor (H, W) of class indices; IGNORE where the mask says nothing: at the value `ignore`, and where the
    file declares no data. In binary masks 255 counts as 1 (unless it is `ignore`). window: (row, column, height,
    width), None: all.

    Raises UserError for other values: they would be trained as wrong classes, or crash a GPU.
    """
    planes, top = images.read(path, window=window).numpy(), max(classes - 1, 1)
    mask = planes[0]
    if len(planes) not in (1, 3) or not np.array_equal(planes, np.broadcast_to(mask, planes.shape), equal_nan=True):
        raise UserError(f"{path}: has {len(planes)} bands, and a mask has one; save class indices, not colours")
    declared = declared_class(path, classes)
    mask = mask if declared is None else np.nan_to_num(mask, nan=declared)
    hidden = np.isnan(mask) | (mask == ignore)
    if classes == 1 and ignore != 255 and (mask == 255).any():
        if (mask == 1).any():
            raise UserError(f"{path}: has the values 1 and 255; give --ignore 255 if that is no data, else make them "
                            f"one")
        mask = np.where(mask == 255, 1, mask)
    mask = np.where(hidden, IGNORE, mask)
    with np.errstate(invalid="ignore"):  # numbers beyond a byte, which are refused below
        labels = mask.astype(np.uint8)
    wrong = ~hidden & ((labels != mask) | (labels > top))
    if wrong.any():
        raise UserError(f"{path}: has the value {mask[wrong][0]:g}; masks hold 0 to {top}, see --classes and --ignore")
    return torch.from_numpy(labels)


def declared_class(path, classes):
    """The no-data value that a mask's file declares, if it is one of the classes; else None. It is mostly the image's,
    copied by a tool, and would hide a class: so it counts as that class."""
    return next((int(value) for value in images.header(path).nodata if value in range(max(classes, 2))), None)


def mask_of(pair, classes=1, ignore=None, window=None):
    """`read_mask` of an (image, mask) path; zeros where there is no mask, see `Samples`."""
    image, mask = pair
    if image == mask:
        return torch.zeros(window[2:] if window else images.size(image)[1:], dtype=torch.uint8)
    return read_mask(mask, classes, ignore, window)


def check_mask(image, mask, classes=1, ignore=None):
    """-> (height, width) of an image and its mask, [pixels per class] without those to ignore (background and object of
    a binary mask). UserError for a mask of another size or at another place than its image, and for a wrong value."""
    size, labels = images.size(image)[1:], mask_of((image, mask), classes, ignore)
    if tuple(labels.shape) != size:
        raise UserError(f"{mask}: has another size than its image ({tuple(labels.shape)} pixels, {image} has {size}); "
                        f"make them equal")
    check_place(image, mask)
    return size, torch.bincount(labels[labels != IGNORE], minlength=max(classes, 2)).tolist()


def check_place(image, mask):
    """UserError where both files tell their place on Earth and a corner of the mask lies more than half a pixel beside
    its image's, or in another coordinate system."""
    here, there = images.header(image).place, images.header(mask).place
    if not here or not there:
        return
    height, width = images.size(image)[1:]
    corners = [(x, y) for x in (0, width) for y in (0, height)]
    to_image, to_earth = ~Affine(*here[1]), Affine(*there[1])
    away = max(math.dist(corner, to_image @ (to_earth @ corner)) for corner in corners)
    same = here[0] == there[0] or CRS.from_string(here[0]) == CRS.from_string(there[0])
    if not same or away > 0.5:
        what = f"lies up to {away:.4g} pixels beside its image {image}" if same else \
            f"has another coordinate system than its image {image}"
        raise UserError(f"{mask}: {what}; warp it onto the image, or remove the place from one of them")


def hold_data(files, windows, bands):
    """-> a bool per tile, which is a window (row, column, height, width) of its file, or for None the whole file:
    whether any of its pixels holds data."""
    def look(file, window):
        empty = images.void(images.read_picture(file, bands, window=window))
        return empty is None or not bool(empty.all())

    doubtful = [item for item in zip(files, windows) if images.header(item[0]).gaps]
    found = dict(zip(doubtful, facts("data", look, doubtful, variant=bands, bar="no data")))
    return [found.get(item, True) for item in zip(files, windows)]


def objects(mask):
    """Mask (H, W) of class indices -> bool (H, W): the pixels of a class above 0."""
    return (mask > 0) & (mask != IGNORE)


def present(masks, classes=1):
    """Which classes an image contains, the target of the auxiliary head: masks (B, H, W) of class indices -> float32
    (B, classes), with one class (B, 1). 1: the class has a pixel, 0: it has none, UNKNOWN: ignored pixels may belong to
    it."""
    wanted = [1] if classes == 1 else range(classes)
    seen = torch.stack([(masks == k).flatten(1).any(1) for k in wanted], 1)
    return seen.float().masked_fill(~seen & (masks == IGNORE).flatten(1).any(1, keepdim=True), UNKNOWN)


@dataclass
class Input(units.Input):
    """What a segmentation net sees of images. mean_planes: also a constant plane per band, see `add_mean_planes`.
    resize: whole images at imgsz x imgsz, in place of crops."""
    mean_planes: bool = True
    resize: bool = False

    @property
    def channels(self):
        """How many channels the net's input has."""
        return len(self.bands) * (1 + self.mean_planes)

    @property
    def side(self):
        """The side to which whole images are resized for the net; None: they are not."""
        return self.imgsz if self.resize else None

    def __call__(self, pixels, bands=None):
        """pixels (B, len(bands), H, W) in the files' numbers, bands as in `scaled` -> (B, channels, H, W) float32."""
        x = self.normalised(self.scaled(pixels, bands))
        return add_mean_planes(x) if self.mean_planes else x


def add_mean_planes(image):
    """(..., C, H, W) -> (..., 2C, H, W): for every band a constant plane, its mean over the pixels that are not 0.

    They tell the net the tile's overall brightness, which differs more between tiles than within one
    (the wildfire system's README). Pixels without data are 0; a band of zeros gets 0.
    """
    valid = image != 0
    mean = (image * valid).sum((-2, -1), keepdim=True) / valid.sum((-2, -1), keepdim=True).clamp(min=1)
    return torch.cat((image, mean.expand_as(image)), -3)


class SegData(Dataset):
    """`data[(epoch, index)]` -> an augmented crop, which depends on (seed, epoch, index) only.
    `data[index]` -> the whole tile as it is.

    Both are {"image": float32 (C, H, W) in the file's numbers, "mask": uint8 (H, W), "index": int}. `len` counts every
    tile `repeat` times: the wildfire system's epoch was ten passes over its data. paired: [(image path, mask path)].
    windows: the part of each image that is its tile, (row, column, height, width), or None for the whole image.
    view, colour: keyword arguments of `augment.view` and `augment.colour`. p_object: probability that a crop is laid
    over a pixel of an object. resize: whole tiles are resized to imgsz x imgsz before they are changed, in place of
    crops.
    """

    def __init__(self, paired, windows=None, *, view={}, colour={}, bands=None, classes=1, ignore=None,
                 imgsz=256, repeat=1, seed=0, p_object=0.0, resize=False, cache=None):
        self.paired, self.imgsz, self.repeat, self.seed = paired, imgsz, repeat, seed
        self.view, self.colour = dict(view, crop_padding=0.0) if resize else view, colour
        self.p_object, self.resize = p_object, resize
        windows = windows or [None] * len(paired)
        image_files, mask_files = zip(*paired)
        places = tuple(windows) if any(windows) else ()
        self.images = Cache(image_files, lambda i: images.read_picture(image_files[i], bands, window=windows[i]), cache,
                            variant=(bands, *places))
        self.masks = Cache(mask_files, lambda i: mask_of(paired[i], classes, ignore, windows[i]), cache,
                           variant=(classes, ignore, *places))

    def __len__(self):
        return len(self.paired) * self.repeat

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (None, key)
        i = index % len(self.paired)
        image, mask = self.images[i], self.masks[i]
        if epoch is not None:
            image, mask = self.augmented(np.random.default_rng((self.seed, epoch, index)), image, mask)
        empty = images.void(image)
        mask = mask if empty is None else mask.masked_fill(empty, IGNORE)
        return {"image": image.float(), "mask": mask, "index": i}

    def augmented(self, rng, image, mask):
        """Image (C, H, W), mask (H, W) -> a random view of both, imgsz x imgsz. Beyond a constant border, the mask says
        nothing."""
        size = (self.imgsz, self.imgsz)
        if self.resize:
            image, mask = resize(image, size), images.nearest(mask, size)
        matrix, border = augment.view(rng, *mask.shape, self.imgsz, self.object_pixel(rng, mask), **self.view)
        mask = IGNORE - warp(IGNORE - mask[None], matrix, size, border=border, mode="nearest")[0]
        image = warp(*shrunk(image, matrix), size, border=border)
        if any(self.colour.values()):
            image, = augment.recolour(image[None], augment.colour(rng, len(image), **self.colour)[None])
        return image, mask

    def object_pixel(self, rng, mask):
        """(row, column) of a random pixel with a class above 0, for a crop that contains it; else None."""
        if not self.p_object or rng.random() >= self.p_object:
            return None
        pixels = torch.nonzero(objects(mask))
        return pixels[rng.integers(len(pixels))].tolist() if len(pixels) else None


class Tiles(Dataset):
    """Some bands (from 1) of images: {"image": (C, H, W), "index"}. windows: the part of each that is read, or None for
    whole images."""

    def __init__(self, files, bands, windows=None):
        self.files, self.bands, self.windows = files, bands, windows or [None] * len(files)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        image = images.read_picture(self.files[i], self.bands, window=self.windows[i])
        # whole images of a batch may differ in dtype
        return {"image": image if self.windows[i] else image.float(), "index": i}


def predict_windows(file, part, bands, predict, *, tile, overlap, bs, workers=0):
    """Reads a part (y, x, height, width) of an image in windows, predicts them and merges what was predicted. Yields
    (row, column, probabilities (K, h, w)), every pixel once; memory does not grow with the image.

    predict: windows (B, len(bands), h, w) in the file's numbers -> probabilities (B, K, h, w). tile: the windows' side;
    overlap: the share of it that neighbours have in common. One window is read without workers: starting them takes
    longer.
    """
    top, left, height, width = part
    swaths = tiles.plan(height, width, tile, overlap)
    places = [(top + y, left + x, min(tile, height), min(tile, width)) for y, x in tiles.windows(swaths)]
    workers = workers if len(places) > 1 else 0
    loader = DataLoader(Tiles([file] * len(places), bands, places), bs, num_workers=workers)
    maps = (probs for batch in tqdm(loader, desc=file.name, leave=False, disable=dist.rank() > 0 or not workers)
            for probs in predict(batch["image"]))
    for y, x, block in tiles.stitch(swaths, maps, height):
        yield top + y, left + x, block
