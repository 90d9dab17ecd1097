"""Labels of object detection: images and their boxes, read from the usual formats and checked box by box.

    coco.py    the parking-lot competition's files, COCO's folders, or one JSON file
    yolo.py    YOLO's text files, with data.yaml or without
    voc.py     Pascal VOC's XML files
    masks.py   the objects in segmentation masks

A box that makes no sense is dropped; its image and its other boxes stay. Dropped boxes are reported, and more than 1 %
of them are an error. Reading the headers of many images takes minutes, so the result is kept until a file changes.
"""
import hashlib
import json
import os
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data import images
from data.labels import coco, masks, voc, yolo
from data.labels.records import show
from utils.errors import UserError
from utils.files import locked, whole_file, write_text
from utils.train import dist

VERSION = 4  # of the kept result: to be raised when a reader finds something else in the same files
# A side of less than a pixel shows nothing, and its logarithm diverges. 0.1 is left for YOLO's rounding: with four
# decimals, one pixel of 2000 is written as 0.95 to 1.05
MIN_SIDE = 0.9
MAX_DROPPED = 0.01  # share of the boxes; more is rather a misunderstanding than a slip
DROPPED = ("not finite", "unknown category", "less than a pixel inside the image", "duplicate")


class Labels(NamedTuple):
    files: list         # the images, as Path
    sizes: list         # (height, width), after EXIF rotation
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

    Classes are the categories that the files declare, sorted by id, else those that occur.
    """
    layout = _find(Path(path))
    key = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:16]
    store = cache and Path(cache) / f"labels-{key}.z"
    with ExitStack() as stack:
        if store:
            # One process reads the labels; the others, of other runs too, then find the result. Where files cannot be
            # written or locked, every process reads for itself
            with suppress(OSError):
                store.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(store.with_suffix(".lock")))
        found = store and _load(store, layout)
        if not found:
            found = _check(layout)
            if store:
                with suppress(UserError), whole_file(store) as temporary:
                    temporary.write_bytes(zlib.compress(json.dumps(found).encode(), 1))
    _report(path, found, store and store.with_suffix(".txt"), allow_bad)
    return Labels([layout.root / file for file in found["files"]], [tuple(size) for size in found["sizes"]],
                  [np.array(boxes, np.float64).reshape(-1, 4) for boxes in found["boxes"]],
                  [np.array(classes, np.int64) for classes in found["classes"]],
                  found["names"], found["category_ids"], found["held_out"])


def with_names(extra, names, root):
    """The Labels of other data, their classes numbered as in `names`. UserError when they have boxes of other classes.
    """
    used = sorted(set(np.concatenate(extra.classes).tolist()))
    unknown = [extra.names[k] for k in used if extra.names[k] not in names]
    if unknown:
        raise UserError(f"{root}: has boxes of {unknown[0][:80]}, which --data does not have; rename or remove them")
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
    key = _key(layout)  # before reading: a file that changes meanwhile is read again
    records = layout.read(layout)
    if not records.images:
        raise UserError(f"{layout.root}: no images in its labels, or in its folders; check the path given to --data")
    files, held_out, stated = map(list, zip(*records.images))
    stamps = _stamps(layout.root, files)
    with ThreadPoolExecutor(8) as pool:
        sizes = list(tqdm(pool.map(lambda file: images.size(layout.root / file)[1:], files), desc="sizes",
                          total=len(files), leave=False, disable=dist.rank() > 0))
    category_ids = sorted(records.names)
    for name, count in Counter(records.names.values()).most_common(1):
        if count > 1:  # results are kept by name
            one, other = [n for n in category_ids if records.names[n] == name][:2]
            raise UserError(f"{layout.root / layout.labels[0]}: the categories {one} and {other} are both named "
                            f"{show(name)}; rename one, or give all their boxes one category")
    boxes, reasons, clipped = _clip(records, np.array(sizes), category_ids)

    def places(chosen):
        return [f"{label}: {layout.place.format(number)}, {files[owner]}: {box}" for owner, _, box, label, number in
                (records.boxes[i] for i in np.flatnonzero(chosen))]

    kept = reasons == len(DROPPED)
    cases = {kind: places(reasons == k) for k, kind in enumerate(DROPPED)}
    cases["clipped to the image"] = places(kept & clipped)
    cases["crowd"] = [f"{label}: {layout.place.format(number)}" for label, number in records.crowds]
    cases["image of another size than its labels state"] = [
        f"{file}: {size[0]} x {size[1]}, not {show(labelled)}"
        for file, size, labelled in zip(files, sizes, stated) if labelled not in (None, tuple(size))]
    boxes_of, classes_of = [[] for _ in files], [[] for _ in files]
    class_of = {category: k for k, category in enumerate(category_ids)}
    for i in np.flatnonzero(kept):
        owner, category, *_ = records.boxes[i]
        boxes_of[owner].append(boxes[i].tolist())
        classes_of[owner].append(class_of[category])
    return {"key": key, "stamps": stamps, "files": files, "sizes": sizes, "boxes": boxes_of, "classes": classes_of,
            "held_out": [out and not all(held_out) for out in held_out], "category_ids": category_ids,
            "names": [records.names[n] for n in category_ids], "cases": {k: v for k, v in cases.items() if v},
            "total": len(records.boxes)}


def _clip(records, sizes, category_ids):
    """-> boxes (n, 4) clipped to their images, in pixels; for each the index in DROPPED of the reason to drop it, else
    len(DROPPED); whether more than a pixel of it was outside, which is more than rounding."""
    owner, category = (np.array([box[k] for box in records.boxes], np.int64) for k in (0, 1))
    boxes = np.array([box[2] for box in records.boxes], np.float64).reshape(-1, 4)
    limit = sizes[owner][:, [1, 0, 1, 0]]
    with np.errstate(over="ignore", invalid="ignore"):
        boxes = boxes * limit if records.normalised else boxes
        inside = np.clip(boxes, 0, limit)
        side = (inside[:, 2:] - inside[:, :2]).min(1)
        beyond = abs(inside - boxes).max(1) > 1
    reasons = np.select([~np.isfinite(boxes).all(1), ~np.isin(category, category_ids), side < MIN_SIDE], range(3),
                        len(DROPPED))
    left = np.flatnonzero(reasons == len(DROPPED))
    first = np.unique(np.column_stack((owner, category, inside))[left], axis=0, return_index=True)[1]
    reasons[np.delete(left, first)] = DROPPED.index("duplicate")
    return inside, reasons, beyond


def _report(path, found, file, allow_bad):
    """On rank 0 prints a line per kind of case and writes all cases to `file`. UserError when too many boxes are
    dropped, or none are left."""
    cases, dropped = found["cases"], {kind: len(found["cases"][kind]) for kind in DROPPED if kind in found["cases"]}
    if dist.rank() == 0 and file and cases:
        with suppress(UserError):
            write_text(file, "".join(f"{kind}{' (dropped)' if kind in DROPPED else ''}: {place}\n"
                                     for kind, places in cases.items() for place in places))
    see = f"; all in {file}" if file and os.path.exists(file) else ""
    for kind, places in cases.items() if dist.rank() == 0 else ():
        what = "left out" if kind in (*DROPPED, "crowd") else "found"
        line = f"{path}: {kind}: {len(places)} {what}, first {places[0]}{see}"
        print(line.encode(errors="backslashreplace").decode())
    if sum(dropped.values()) > MAX_DROPPED * found["total"] and not allow_bad:
        counts = ", ".join(f"{count} {kind}" for kind, count in dropped.items())
        raise UserError(f"{path}: {sum(dropped.values())} of {found['total']} boxes cannot be used ({counts}{see}); "
                        f"correct them, or go on without them by --allow-bad-labels")
    if not any(found["boxes"]):
        raise UserError(f"{path}: no boxes in the labels of {len(found['files'])} images, so nothing to learn; check "
                        f"the labels")


# ---- the kept result -------------------------------------------------------------------------------------------------
def _load(store, layout):
    """The kept result of _check; None when there is none, when it is damaged, or when a file has changed since."""
    with suppress(OSError, ValueError, KeyError, TypeError, zlib.error):
        found = json.loads(zlib.decompress(store.read_bytes()))
        if found["key"] == _key(layout) and found["stamps"] == _stamps(layout.root, found["files"]):
            return found
    return None


def _key(layout):
    return [VERSION, layout.labels, layout.images, _stamps(layout.root, layout.labels)]


def _stamps(root, files):
    """Per file [bytes, time of the last change], or None when it cannot be read, which its reader will tell."""
    def stamp(path):
        with suppress(OSError):
            found = os.stat(path)
            return [found.st_size, found.st_mtime_ns]
    return [stamp(os.path.join(root, file)) for file in files]
