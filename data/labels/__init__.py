"""Labels of object detection: images and their boxes, read from the usual formats and checked box by box.

    coco.py    the parking-lot competition's files, COCO's folders, or one JSON file
    yolo.py    YOLO's text files, with data.yaml or without
    voc.py     Pascal VOC's XML files
    masks.py   the objects in segmentation masks

A box that makes no sense is dropped; its image and its other boxes stay. Dropped boxes are reported, and more than 1 %
of them are an error, see data/bad.py. Reading the headers of many images takes minutes, so the result is kept until a
file changes.
"""
import itertools
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import bad, images
from data.labels import coco, masks, voc, yolo
from utils.errors import UserError
from utils.files import kept_values, show, stamps_of, store_of

VERSION = 5  # of the kept result: to be raised when a reader finds something else in the same files
# A side of less than a pixel shows nothing, and its logarithm diverges. 0.1 is left for YOLO's rounding: with four
# decimals, one pixel of 2000 is written as 0.95 to 1.05
MIN_SIDE = 0.9
DROPPED = ("not finite", "unknown category", "less than a pixel inside the image", "duplicate")
CLIPPED = "clipped to the image"
RESIZED = "image of another size than its labels state"
NOTES = {CLIPPED: "found", RESIZED: "found", "crowd": "left out"}  # cases that are no faults


class Labels(NamedTuple):
    files: list         # the images, as Path
    sizes: list         # (height, width), after EXIF rotation; None where the header cannot be read, see `usable`
    boxes: list         # float64 arrays (n, 4): x1 y1 x2 y2, pixels, inside the image
    classes: list       # int64 arrays (n,), from 0
    names: list         # of the classes
    category_ids: list  # the classes' numbers in the label files, for submissions in COCO's format
    held_out: list      # True for images that the data set itself holds out for validation


def read(path, *, allow_bad=False, cache="runs/cache"):
    """A folder in one of the formats, a .json or a data.yaml -> Labels. Images without boxes are background.

    Boxes are clipped to the image, and dropped when they are not finite, of an unknown category, less than a pixel, or
    the same as another. Rank 0 prints how many and the first, and writes all to a text file in `cache`; more than 1 %
    are a UserError unless allow_bad. cache: the folder in which the result is kept, None: it is not kept.

    Classes are the declared categories, sorted by id. Files that declare none: the categories of their boxes.
    """
    layout = _find(Path(path))
    store = store_of(cache, "labels", path)
    with kept_values(store) as found:
        # before reading: a file that changes meanwhile is read again
        key = [VERSION, layout.labels, layout.images, _stamps(layout, layout.labels)]
        if found.get("key") != key or found.get("stamps") != _stamps(layout, found["files"]):
            found.clear()
            found.update({"key": key} | _check(layout))
    bad.leave_out(path, found["cases"], found["total"], "boxes", allow_bad=allow_bad, notes=NOTES,
                  file=store.with_suffix(".txt"))
    if not any(found["boxes"]):
        raise UserError(f"{path}: no boxes in the labels of {len(found['files'])} images, so nothing to learn; check "
                        f"the labels")
    return Labels([layout.root / file for file in found["files"]], [size and tuple(size) for size in found["sizes"]],
                  [np.array(boxes, np.float64).reshape(-1, 4) for boxes in found["boxes"]],
                  [np.array(classes, np.int64) for classes in found["classes"]],
                  found["names"], found["category_ids"], found["held_out"])


def usable(path, data, bands, allow_bad=False):
    """The Labels of a data set without the images that cannot be read, see `bad.readable`."""
    kept = bad.readable(path, data.files, bands, allow_bad=allow_bad)
    files, sizes, boxes, classes, held_out = ([column[i] for i in kept] for column in (*data[:4], data.held_out))
    return Labels(files, sizes, boxes, classes, data.names, data.category_ids, held_out)


def with_names(extra, names, root):
    """The Labels of other data, their classes numbered as in `names`. UserError when they have boxes of other classes.
    """
    unknown = {extra.names[k] for k in np.concatenate(extra.classes)} - set(names)
    if unknown:
        raise UserError(f"{root}: has boxes of {min(unknown)[:80]}, which --data does not have; rename or remove them")
    number = np.array([names.index(name) if name in names else -1 for name in extra.names])
    return extra._replace(classes=[number[c] for c in extra.classes], names=names)


def test_folder(path):
    """The folder of the test images that belong to training data, which may be a label file: DATA/test/images."""
    root = Path(path)
    return (root.parent if root.is_file() else root) / "test" / "images"


def _find(path):
    """-> Layout, of the first format that fits."""
    for find in (coco.find, yolo.find, voc.find, masks.find, coco.find_other):
        layout = find(path)
        if layout:
            return layout
    if os.path.isdir(path):  # unlike Path.is_dir, for every name
        raise UserError(f"{path}: no labels in it: neither train/label/Train.json nor annotations/*.json nor images "
                        f"and labels nor JPEGImages and Annotations nor train_img and train_mask; check the path given "
                        f"to --data")
    raise UserError(f"{path}: no such folder or .json file; put the data there, or point --data to it")


# ---- checks ----------------------------------------------------------------------------------------------------------
def _check(layout):
    """Reads and checks everything -> dict of values that JSON can hold."""
    records = layout.read(layout)
    if not records.images:
        raise UserError(f"{layout.root}: no images in its labels, or in its folders; check the path given to --data")
    files, held_out, stated = map(list, zip(*records.images))
    stamps = _stamps(layout, files)
    headers = images.in_threads(lambda file: bad.attempt(images.size, layout.root / file)[0], files, "sizes")
    sizes = [header and header[1:] for header in headers]  # None where an image cannot be read
    category_of = {}
    for category, name in sorted(records.names.items()):
        if category_of.setdefault(name, category) != category:  # results are kept by name
            raise UserError(f"{layout.root / layout.labels[0]}: the categories {category_of[name]} and {category} are "
                            f"both named {show(name)}; rename one, or give all their boxes one category")
    boxes, classes, cases = _sort_out(records, files, sizes, list(category_of.values()), layout.place)
    cases["crowd"] = [f"{label}: {layout.place.format(number)}" for label, number in records.crowds]
    cases[RESIZED] = [
        f"{file}: {size[0]} x {size[1]}, not {show(labelled)}"
        for file, size, labelled in zip(files, sizes, stated) if size and labelled not in (None, size)]
    return {"stamps": stamps, "files": files, "sizes": sizes, "boxes": boxes, "classes": classes,
            "held_out": [out and not all(held_out) for out in held_out], "category_ids": list(category_of.values()),
            "names": list(category_of), "cases": {kind: places for kind, places in cases.items() if places},
            "total": len(records.boxes)}


def _sort_out(records, files, sizes, category_ids, place):
    """-> per image the boxes to keep, clipped to it, in pixels, and their classes; {kind of case: its places}."""
    boxes, classes, class_of = [[] for _ in files], [[] for _ in files], {key: k for k, key in enumerate(category_ids)}
    cases, seen = {kind: [] for kind in (*DROPPED, CLIPPED)}, set()
    for owner, category, box, label, number in (row for row in records.boxes if sizes[row[0]]):
        height, width = sizes[owner]
        corners = [side * n for side, n in zip(box, (width, height) * 2)] if records.normalised else box
        inside = tuple(min(max(0.0, side), n) for side, n in zip(corners, (width, height) * 2))
        reasons = (not all(map(math.isfinite, corners)), category not in class_of,
                   min(inside[2] - inside[0], inside[3] - inside[1]) < MIN_SIDE, (owner, category, inside) in seen)
        case = next(itertools.compress(DROPPED, reasons), None)
        if case is None:
            seen.add((owner, category, inside))
            boxes[owner].append(inside)
            classes[owner].append(class_of[category])
            if max(abs(a - b) for a, b in zip(inside, corners)) > 1:  # less is rounding
                case = CLIPPED
        if case:
            cases[case].append(f"{label}: {place.format(number)}, {files[owner]}: {box}")
    return boxes, classes, cases


def _stamps(layout, files):
    return stamps_of([layout.root / file for file in files])
