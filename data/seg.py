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
MASK_WORDS = {"mask", "masks", "msk", "msks", "label", "labels", "annotation", "annotations", "gt", "seg", "segmentation"}
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
    names, paired, *_ = map(list, zip(*found))
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
    if not {"image", "mask"} <= set(header) or not rows:
        raise UserError(f"{table}: no first line with the columns image and mask, and rows below it; write image,mask and, "
                        f"if wanted, group,part,weight")
    found = {}
    for number, row in enumerate(rows, 2):
        entry = {"group": None, "part": "train", "weight": 1} | dict(zip(header, row))
        part, weight = folds.PARTS.get(entry["part"].lower() or "train"), _weight(entry["weight"])
        image, mask = table.parent / entry["image"], table.parent / (entry["mask"] or entry["image"])
        wrong = next((path for path in (image, mask) if not path.is_file()), None)
        if len(row) != len(header) or not part or weight is None or wrong or entry["image"] in found:
            why = f"no file {wrong}" if wrong else "another number of columns, an unknown part, a weight that is no number " \
                "above 0, or an image that is listed already"
            raise UserError(f"{table}: row {number}: {show(','.join(row))}: {why}; correct it")
        if part != "test":
            found[entry["image"]] = entry["image"], (image, mask), part == "val", entry["group"], weight
    return list(found.values())


def _weight(text):
    """A number above 0, else None."""
    try:
        return float(text) if 0 < float(text) < float("inf") else None
    except ValueError:
        return None


def found_pairs(root):
    """The pairs in folders -> rows of the first columns of Samples. A folder of masks belongs to the folder of images
    whose path has the same words, without those for images and masks. Names are the images' stems. UserError for a
    layout that is not understood."""
    sides = defaultdict(dict)
    for folder in sorted({os.path.dirname(file) for file in list_tree(root) if file.lower().endswith(images.SUFFIXES)}):
        words = _words(folder)
        if folds.part_of(folder) != "test":
            side = "image" if MASK_WORDS.isdisjoint(words) else "mask"
            sides[tuple(folds.PARTS.get(word, word) for word in words if word not in IMAGE_WORDS | MASK_WORDS)][side] = folder
    folders = [(side["image"], side["mask"]) for side in sides.values() if len(side) == 2]
    if not folders:  # images and masks in one folder
        folders = [(folder, folder) for side in sides.values() for folder in side.values()
                   if any(MASK_WORDS & set(_words(file.stem)) for file in images.find(root / folder))]
    if not folders and os.path.isdir(root) and not os.path.isdir(root / "train_img"):
        shown = ", ".join(folder or "." for side in sides.values() for folder in side.values()) or "none"
        raise UserError(f"{root}: no folders of images and masks that belong together, such as train_img and train_mask, or "
                        f"images/train and masks/train (folders with images: {shown[:200]}); rename them, {WAY_OUT}")
    found = [(image, pair, folds.part_of(folder) == "val") for folder, masks in folders or [("train_img", "train_mask")]
             for image, pair in pairs(root / folder, root / masks).items()]
    names = [name for name, *_ in found]
    if len(set(names)) < len(names):  # two folders have them
        names = [str(pair[0].relative_to(root).with_suffix("")) for _, pair, _ in found]
    held_out = any(not out for *_, out in found)
    return [(name, pair, out and held_out, None, 1.0) for name, (_, pair, out) in zip(names, found)]


def _words(text):
    return re.findall(r"[^\W_]+", text.lower())


def pairs(image_folder, mask_folder):
    """-> {image stem: (image path, mask path)}, by the first rule that pairs all files: equal stems; stems equal but for
    words for images and masks; stems equal without what all images, and all masks, have in common at start and end.

    Raises UserError naming the first files without partner, and two files of one name.
    """
    found, masks = images.find(image_folder), images.find(mask_folder)
    if image_folder == mask_folder:
        masks = [file for file in found if MASK_WORDS & set(_words(file.stem))]
        found = [file for file in found if file not in set(masks)]
    sides = images.by_stem(found), images.by_stem(masks)
    for rule in (lambda stem, all: stem, _without_common, _without_words):
        image_of, mask_of = ({rule(stem, side): path for stem, path in side.items()} for side in sides)
        if image_of.keys() == mask_of.keys() and len(image_of) == len(found) == len(masks):
            return {path.stem: (path, mask_of[key]) for key, path in image_of.items()}
    lone = [path for key, path in image_of.items() if key not in mask_of][:1]
    lone += [path for key, path in mask_of.items() if key not in image_of][:1]
    lone = lone or found[:1]
    raise UserError(f"{lone[0]}: no file of that name in {mask_folder if lone[0] in found else image_folder}"
                    f"{f' ({lone[1].name} has no partner either)' if lone[1:] else ''}; add it, or remove this one, "
                    f"{WAY_OUT}")


def _without_words(stem, all):
    return " ".join(word for word in _words(stem) if word not in IMAGE_WORDS | MASK_WORDS)


def _without_common(stem, all):
    """Numbers stay whole: what is common ends before a digit, and starts behind one."""
    prefix, suffix = os.path.commonprefix(list(all)), os.path.commonprefix([name[::-1] for name in all])
    return stem[len(prefix.rstrip("0123456789")):len(stem) - len(suffix.rstrip("0123456789"))]


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
