"""Segmentation data: image and mask files in the wildfire competition's layout -> tensors -> what the net sees.

    DATA/train_img/train_img_17.tif    DATA/train_mask/train_mask_17.tif    DATA/test_img/test_img_3.tif

Other layouts: folders that differ in words for images and masks (images/train and masks/train, val/img and val/gt), or
one folder with x_sat.jpg and x_mask.png, or a table with the columns image and mask: pairs.csv.
"""
import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import augment, folds, images
from data.cache import Cache
from utils.train import dist
from utils.errors import UserError
from utils.files import list_tree, read_csv, show
from utils.ops import tiles
from utils.ops.geometry import warp

IMAGE_WORDS = {"img", "image", "images", "imgs", "sat", "rgb", "photo", "photos"}
MASK_WORDS = {"mask", "masks", "msk", "label", "labels", "annotation", "annotations", "gt", "seg", "segmentation"}
TABLE = "pairs.csv"
WAY_OUT = f"or list the pairs in a {TABLE} with the columns image and mask"
UNKNOWN = -1  # of `present`: ignored pixels may belong to the class


class Samples(NamedTuple):
    """Pairs of image and mask. A list per column: names, (image path, mask path), True where the data set itself holds
    the sample out for validation, groups for the split or None, sampling weights, (height, width), pixels of an object;
    bands: those to read, from 1. A mask path that is the image's: the image has no object."""
    names: list
    pairs: list
    held_out: list
    groups: list
    weights: list
    sizes: list
    areas: list
    bands: list

    @property
    def images(self):
        return [image for image, _ in self.pairs]

    def pick(self, indices):
        """The samples with these indices."""
        return Samples(*([column[i] for i in indices] for column in self[:-1]), self.bands)

    def __add__(self, other):
        return Samples(*(ours + theirs for ours, theirs in zip(self[:-1], other[:-1])), self.bands)


def read(root, *, bands=None, classes=1, ignore=None):
    """The training samples of a data folder, or of a table of pairs, checked: sizes, bands, mask values. -> Samples

    bands: those that will be read; None: `images.default_bands`. classes, ignore: of `read_mask`. Raises UserError
    naming the file.
    """
    root = Path(root)
    table = root if root.suffix.lower() == ".csv" else root / TABLE
    found = listed_pairs(table) if os.path.isfile(table) else found_pairs(root)
    _, paired, *_ = zip(*found)
    files = [image for image, _ in paired]
    bands = bands or images.default_bands(files)
    images.check_bands(files, bands)
    return Samples(*map(list, zip(*found)), *scan(paired, classes, ignore), bands)


def test_folder(root):
    """Where the images without masks are that predict.py reads by default."""
    root = Path(root)
    return (root.parent if root.suffix.lower() == ".csv" else root) / "test_img"


def listed_pairs(table):
    """A CSV with the columns image and mask, and group, part and weight if wanted -> rows of the first columns of
    Samples. Paths are relative to its folder; an empty mask: no object. Rows for testing are left out."""
    header, *rows = [[value.strip() for value in row] for row in read_csv(table) if row] or [[]]
    found, listed = [], set()
    for number, row in enumerate(rows, 2):
        entry = {"group": None, "part": "train", "weight": "1"} | dict(zip(header, row))
        try:
            image, mask = table.parent / entry["image"], table.parent / (entry["mask"] or entry["image"])
            part, weight = folds.PARTS[entry["part"].lower() or "train"], float(entry["weight"])
            wrong = [path for path in (image, mask) if not path.is_file()]
            if wrong or image in listed or not 0 < weight < 1e9 or len(row) != len(header):
                raise ValueError
        except (KeyError, ValueError):
            raise UserError(f"{table}: row {number}: {show(','.join(row))}: not a new image, its mask and, if wanted, "
                            f"group, part and weight, in the order of its first line; correct it") from None
        listed.add(image)
        if part != "test":
            found.append((entry["image"], (image, mask), part == "val", entry["group"], weight))
    if not found:
        raise UserError(f"{table}: no rows; write a first line image,mask and a row per image")
    return found


def found_pairs(root):
    """The pairs in folders -> rows of the first columns of Samples. Words of the folders, else of the files, tell masks
    from images, and the part. Names are the images' stems. UserError for a layout that is not understood."""
    files = [] if os.path.isdir(root / "train_img") else [
        Path(file) for file in list_tree(root) if file.lower().endswith(images.SUFFIXES)]
    for place in ("parent", "name"):
        masks = [file for file in files if MASK_WORDS & set(_words(getattr(file, place)))]
        if masks:
            break
    sides = defaultdict(lambda: ({}, {}))
    for file in files:
        sides[folds.part_of(file.parent)][file in masks][str(file.with_suffix(""))] = root / file
    if files and not masks:
        raise UserError(f"{root}: no masks found: no folders such as train_img and train_mask, images/train and "
                        f"masks/train, and no file {files[0].stem}_mask beside {files[0]}; rename them, {WAY_OUT}")
    found = [(pair, part == "val") for part, pair_of in sides.items() if part != "test" for pair in match(*pair_of)]
    for part in () if files else ("train", "val"):
        if part == "train" or os.path.isdir(root / "val_img"):
            found += [(pair, part == "val") for pair in pairs(root / f"{part}_img", root / f"{part}_mask").values()]
    names = [image.stem for (image, _), _ in found]
    if len(set(names)) < len(names):  # several folders have them
        names = [str(image.relative_to(root).with_suffix("")) for (image, _), _ in found]
    return [(name, pair, held_out, None, 1.0) for name, (pair, held_out) in zip(names, found)]


def _words(path):
    return re.findall(r"[^\W_]+", str(path).lower())


def pairs(image_folder, mask_folder):
    """-> {image stem: (image path, mask path)} of two folders, see `match`. UserError for two files of one name too."""
    matched = match(*(images.by_stem(images.find(folder)) for folder in (image_folder, mask_folder)))
    return {image.stem: (image, mask) for image, mask in matched}


def match(image_of, mask_of):
    """{name: image path}, {name: mask path} -> [(image path, mask path)], by the first rule that pairs all: names equal
    without what all images, and all masks, have in common at start and end (numbers stay whole); names equal without
    words for images and masks. Raises UserError naming the first files without partner."""
    def without_common(name, names):
        names = names if len(names) > 1 else ("", name)
        starts = (os.path.commonprefix([name[::step] for name in names]) for step in (1, -1))
        first, last = (len(start.rstrip("0123456789")) for start in starts)
        return name[first:len(name) - last]

    def without_words(name, names):
        return [word for word in _words(name) if word not in IMAGE_WORDS | MASK_WORDS]

    for rule in (without_common, without_words):
        sides = [{str(rule(name, side)): path for name, path in side.items()} for side in (image_of, mask_of)]
        if sides[0].keys() == sides[1].keys() and len(image_of) == len(mask_of) == len(sides[0]):
            return [(path, sides[1][key]) for key, path in sides[0].items()]
    of_images, of_masks = sides
    lone = [path for key, path in of_images.items() if key not in of_masks][:1]
    lone += [path for key, path in of_masks.items() if key not in of_images][:1]
    lone = lone or list(image_of.values())[:2]
    raise UserError(f"{lone[0]}: no file of that name on the other side (neither for {lone[-1]}); add it, or remove "
                    f"this one, {WAY_OUT}")


def read_mask(path, classes=1, ignore=None, window=None):
    """-> uint8 tensor (H, W) of class indices. In binary masks 255 counts as 1 (unless it is `ignore`). window: (row,
    column, height, width), None: all.

    Raises UserError for other values: they would be trained as wrong classes, or crash a GPU.
    """
    mask = images.read(path, window=window, missing=None)  # often the label to ignore
    if len(mask) != 1:
        raise UserError(f"{path}: a mask has 1 band, this has {len(mask)}; save class indices, not colours")
    mask = mask[0] if mask.is_floating_point() or mask.dtype == torch.uint8 else mask[0].int()
    if classes == 1 and ignore != 255 and (mask == 255).any():
        if (mask == 1).any():
            raise UserError(f"{path}: has the values 1 and 255; give --ignore 255 if that is no data, else make them "
                            f"one")
        mask = torch.where(mask == 255, 1, mask)
    if mask.dtype == torch.uint8:  # without sorting, fifty times as fast
        values = torch.bincount(mask.flatten()).nonzero()[:, 0]
    else:
        values = torch.unique(mask)
    values = [v for v in values.tolist() if v != ignore]
    top = max(classes - 1, 1)
    wrong = [v for v in values if v not in range(top + 1)]
    if wrong:
        raise UserError(f"{path}: has the value {wrong[0]:g}; masks hold 0 to {top}, see --classes and --ignore")
    return mask.to(torch.uint8)


def mask_of(pair, classes=1, ignore=None, window=None):
    """`read_mask` of an (image, mask) path; zeros where there is no mask, see `Samples`."""
    image, mask = pair
    if image == mask:
        return torch.zeros(window[2:] if window else images.size(image)[1:], dtype=torch.uint8)
    return read_mask(mask, classes, ignore, window)


def scan(paired, classes=1, ignore=None):
    """Checks the mask of every (image, mask) -> [(height, width)], [pixels of an object], in their order.

    Raises UserError for a mask of another size than its image, and for a wrong mask value.
    """
    def check(item):
        image, mask = item
        size, labels = images.size(image)[1:], mask_of(item, classes, ignore)
        if tuple(labels.shape) != size:
            raise UserError(f"{mask}: is {tuple(labels.shape)} pixels, its image {image} is {size}; make them equal")
        return size, int(objects(labels, ignore).sum())

    return map(list, zip(*images.in_threads(check, list(paired), "check")))


def objects(mask, ignore=None):
    """Mask (H, W) of class indices -> bool (H, W): the pixels of a class above 0."""
    return (mask > 0) & (mask != (-1 if ignore is None else ignore))


def present(masks, classes=1, ignore=None):
    """Which classes an image contains, the target of the auxiliary head: masks (B, H, W) of class indices -> float32
    (B, classes), with one class (B, 1). 1: the class has a pixel, 0: it has none, UNKNOWN: ignored pixels may belong to
    it."""
    void = torch.zeros_like(masks, dtype=torch.bool) if ignore is None else masks == ignore
    wanted = [1] if classes == 1 else range(classes)
    seen = torch.stack([((masks == k) & ~void).flatten(1).any(1) for k in wanted], 1)
    return seen.float().masked_fill(~seen & void.flatten(1).any(1, keepdim=True), UNKNOWN)


@dataclass
class Input(images.Input):
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
        x = self.scaled(pixels, bands)
        return add_mean_planes(x) if self.mean_planes else x


def add_mean_planes(image):
    """(..., C, H, W) -> (..., 2C, H, W): for every band a constant plane, its mean over the pixels > 0.

    They tell the net the tile's overall brightness, which differs more between tiles than within one
    (the wildfire system's README). A band without positive pixels gets 0.
    """
    valid = image > 0
    mean = (image * valid).sum((-2, -1), keepdim=True) / valid.sum((-2, -1), keepdim=True).clamp(min=1)
    return torch.cat((image, mean.expand_as(image)), -3)


class SegData(Dataset):
    """`data[(epoch, index)]` -> an augmented crop, which depends on (seed, epoch, index) only.
    `data[index]` -> the whole tile as it is.

    Both are {"image": float32 (C, H, W) in the file's numbers, "mask": uint8 (H, W), "index": int}. `len` counts every
    tile `repeat` times: the wildfire system's epoch was ten passes over its data. paired: [(image path, mask path)].
    windows: the part of each image that is its tile, (row, column, height, width), or None for the whole image.
    gain: octaves of random brightness, see `augment.gain`. p_object: probability that a crop is laid over a pixel of an
    object. resize: whole tiles are resized to imgsz x imgsz, in place of crops.
    """

    def __init__(self, paired, windows=None, *, bands=None, classes=1, ignore=None, imgsz=256, repeat=1, seed=0,
                 gain=0.0, p_object=0.0, resize=False, cache=None):
        self.paired, self.imgsz, self.repeat, self.seed = paired, imgsz, repeat, seed
        self.gain, self.p_object, self.ignore, self.resize = gain, p_object, ignore, resize
        windows = windows or [None] * len(paired)
        image_files, mask_files = ([pair[side] for pair in paired] for side in (0, 1))
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
        return {"image": image.float(), "mask": mask, "index": i}

    def augmented(self, rng, image, mask):
        """Image (C, H, W), mask (H, W) -> a random crop of both, imgsz x imgsz."""
        size = (self.imgsz, self.imgsz)
        if self.resize:
            image = images.resize(image, size)  # antialiased; flips and quarter turns follow
            mask = images.nearest(mask, size)
            matrix, border = augment.flip_turn(rng, self.imgsz), "constant"
        else:
            matrix, border = augment.crop_flip(rng, *mask.shape, self.imgsz, self.object_pixel(rng, mask))
        image = warp(image, matrix, size, border=border)
        mask = warp(mask[None], matrix, size, border=border, mode="nearest")[0]
        if self.gain:
            image = image.float() * torch.from_numpy(augment.gain(rng, len(image), self.gain))
        return image, mask

    def object_pixel(self, rng, mask):
        """(row, column) of a random pixel with a class above 0, for a crop that contains it; else None."""
        if not self.p_object or rng.random() >= self.p_object:
            return None
        pixels = torch.nonzero(objects(mask, self.ignore))
        return pixels[rng.integers(len(pixels))].tolist() if len(pixels) else None


class Tiles(Dataset):
    """Some bands (from 1) of whole images, or of windows of one image: {"image": (C, H, W), "index"}."""

    def __init__(self, files, bands, windows=None):
        self.files, self.bands, self.windows = files, bands, windows

    def __len__(self):
        return len(self.windows or self.files)

    def __getitem__(self, i):
        if not self.windows:
            image = images.read_picture(self.files[i], self.bands)
            return {"image": image.float(), "index": i}  # images of a batch may differ in dtype
        return {"image": images.read_picture(self.files[0], self.bands, window=self.windows[i]), "index": i}


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
    loader = DataLoader(Tiles([file], bands, places), bs, num_workers=workers)
    maps = (probs for batch in tqdm(loader, desc=file.name, leave=False, disable=dist.rank() > 0 or not workers)
            for probs in predict(batch["image"]))
    for y, x, block in tiles.stitch(swaths, maps, height):
        yield top + y, left + x, block
