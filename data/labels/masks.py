"""Boxes of the objects in segmentation masks, so that a detector trains on an unchanged segmentation data set.

    DATA/train_img/*.tif   DATA/train_mask/*.tif        python train_det.py --data DATA

An object is a connected part of one class. With the detector, `predict.py --task seg --detector` looks for objects in
crops of large images only.
"""
import os

import numpy as np
from rasterio import features

from data import images, pairs, seg
from data.cache import in_threads
from data.labels.records import Layout, Records
from utils.errors import UserError

VOID = 255  # in masks of classes above 1 this is no object; in binary masks it is the objects' value


def find(path):
    """The Layout of a folder with `train_img` and `train_mask`, else None."""
    if not (os.path.isdir(path / "train_img") and os.path.isdir(path / "train_mask")):
        return None
    files, masks = ([str(file.relative_to(path)) for file in part]
                    for part in zip(*pairs.of_folders(path / "train_img", path / "train_mask")))
    return Layout(path, masks, {file: [mask, "train"] for file, mask in zip(files, masks)}, read, "object {}")


def read(layout):
    """Layout -> Records. UserError for a mask of another size than its image."""
    def check(pair):
        file, label = pair
        mask, size = seg.read_mask(layout.root / label, classes=256), images.size(layout.root / file)[1:]
        if tuple(mask.shape) != size:
            raise UserError(f"{layout.root / label}: is {tuple(mask.shape)} pixels, its image {file} is {size}; make "
                            f"them equal")
        empty = images.void(images.read(layout.root / label))  # as the file declares it; 255 may be an object
        return objects(mask if empty is None else mask.masked_fill(empty, 0))

    found = in_threads(check, list(zip(layout.images, layout.labels)), "masks")
    boxes = [(i, value, box, label, number) for i, (label, parts) in enumerate(zip(layout.labels, found))
             for number, (value, box) in enumerate(parts, 1)]
    values = {value for _, value, *_ in boxes}
    if values <= {1, VOID}:
        boxes, names = [(i, 1, *rest) for i, _, *rest in boxes], {1: "object"} if boxes else {}
    else:
        boxes = [box for box in boxes if box[1] != VOID]
        names = {value: f"class {value}" for value in values - {VOID}}
    return Records([(file, False, None) for file in layout.images], boxes, names)


def objects(mask):
    """mask (H, W), integers -> [(value, (x1, y1, x2, y2))] of its connected parts with a value above 0, in pixels. Two
    pixels are connected when they touch, at a corner too."""
    values = mask.numpy().astype(np.int32)
    found = []
    for outline, value in features.shapes(values, mask=values > 0, connectivity=8):
        x, y = zip(*outline["coordinates"][0])
        found.append((int(value), (min(x), min(y), max(x), max(y))))
    return found
