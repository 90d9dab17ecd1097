"""Labels of object detection: images and their boxes, read from the usual formats and checked box by box.

    coco.py    the parking-lot competition's files, COCO's folders, or one JSON file; CVAT's XML (cvat.py) and Label
               Studio's JSON (label_studio.py), which are translated into COCO's
    yolo.py    YOLO's text files, with data.yaml (data_yaml.py reads it) or without
    voc.py     Pascal VOC's XML files
    masks.py   the objects in segmentation masks

A box that makes no sense is dropped; its image and its other boxes stay. Dropped boxes are reported, and more than 1 %
of them are an error, see data/bad.py. Reading the headers of many images takes minutes, so the result is kept until a
file changes.
"""
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import bad, images
from data.labels import coco, masks, voc, yolo
from data.labels.records import MISSING, NO_BOX, TURNED_BOX, list_files
from utils.errors import UserError
from utils.files import folder_of, kept_values, many_objects, show, stamps_of, store_of

VERSION = 8  # of the kept result: to be raised when a reader finds something else in the same files
# A side of less than a pixel shows nothing, and its logarithm diverges. 0.1 is left for YOLO's rounding: with four
# decimals, one pixel of 2000 is written as 0.95 to 1.05
MIN_SIDE = 0.9
DROPPED = ("labelled without the turn in the image's EXIF (turn the file or its labels)", "not finite",
           "unknown category", "less than a pixel inside the image", "duplicate")
UNREADABLE = (NO_BOX, yolo.BAD_LINE)
MAX_CUT = 0.2  # share of the boxes that may lose this share of their area by clipping; else they are of another format
CLIPPED = "clipped to the image"
RESIZED = "image of another size than its labels state"
NOTES = {CLIPPED: "found", RESIZED: "found", TURNED_BOX: "found", "crowd": "left out"}  # cases that are no faults


class Labels(NamedTuple):
    files: list         # the images, as Path
    sizes: list         # (height, width), after EXIF rotation; None where the header cannot be read, see `usable`
    boxes: list         # float64 arrays (n, 4): x1 y1 x2 y2, pixels, inside the image
    classes: list       # int64 arrays (n,), from 0
    held_out: list      # True for images that the data set itself holds out for validation
    names: list         # of the classes
    category_ids: list  # the classes' numbers in the label files, for submissions in COCO's format
    layout: str = ""    # in words


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
            with many_objects():
                found.update({"key": key} | _check(layout, cache))
    _report(path, found, layout, store.with_suffix(".txt"), allow_bad)
    boxes, classes = (np.frombuffer(bytearray.fromhex(found[key]), kind)
                      for key, kind in (("boxes", np.float64), ("classes", np.int64)))
    ends = np.cumsum(found["counts"]).tolist()
    spans = list(map(slice, [0, *ends], ends))
    return Labels([layout.root / file for file in found["files"]], [size and tuple(size) for size in found["sizes"]],
                  [boxes.reshape(-1, 4)[span] for span in spans], [classes[span] for span in spans],
                  found["held_out"], list(found["category_of"]), list(found["category_of"].values()),
                  f"labels in {Path(layout.labels[-1]).suffix} files")


def usable(path, data, bands, allow_bad=False):
    """The Labels of a data set without the images that cannot be read, see `bad.readable`."""
    return Labels(*bad.readable(path, data[:5], bands, allow_bad=allow_bad), *data[5:])


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
    return Path(folder_of(path), "test", "images")


def image_ids(path, file):
    """{image file, as an absolute path: its id} of training data in COCO's format, if `file` is in its folder; else {}.
    """
    layout = _find(Path(path))
    inside = layout.read is coco.read and layout.root.resolve() in Path(file).resolve().parents
    return {os.path.abspath(layout.root / name): key for name, *_, key in inside and layout.read(layout).images or ()}


def _find(path):
    """-> Layout, of the first format that fits."""
    for find in (coco.find, yolo.find, voc.find, masks.find, coco.find_other):
        layout = find(path)
        if layout:
            return layout
    if os.path.isdir(path):  # unlike Path.is_dir, for every name
        shown = ", ".join(map(show, list_files(path)[:2])) or "nothing"
        raise UserError(f"{path}: no labels in it, but {shown}: neither train/label/Train.json nor annotations/*.json "
                        f"nor images with labels/*.txt or annotations/*.xml or with these beside them nor train_img "
                        f"and train_mask; check --data, or convert the labels to one JSON file in COCO's format")
    raise UserError(f"{path}: no such folder or .json file; put the data there, or point --data to it")


# ---- checks ----------------------------------------------------------------------------------------------------------
def _check(layout, cache):
    """Reads and checks everything -> dict of values that JSON can hold."""
    records = layout.read(layout)
    if not records.images and not records.cases.get(MISSING):
        raise UserError(f"{layout.root}: no images in its labels, or in its folders; check the path given to --data")
    files, held_out, stated = ([row[k] for row in records.images] for k in range(3))
    stamps = _stamps(layout, files)
    paths = [layout.root / file for file in files]
    images.read_headers(paths, cache=cache, bar="sizes")
    headers = [bad.attempt(images.header, path)[0] for path in paths]
    sizes = [header and header.size[1:] for header in headers]  # None where an image cannot be read
    category_of = {}
    for category, name in sorted(records.names.items()):
        if category_of.setdefault(name, category) != category:  # results are kept by name
            raise UserError(f"{layout.root / layout.labels[0]}: the categories {category_of[name]} and {category} are "
                            f"both named {show(name)}; rename one, or give all their boxes one category")
    # images are read upright, but some programs label them as they are stored
    stored = [bool(header and header.orientation > 4 and shape == header.size[:0:-1] != header.size[1:])
              for header, shape in zip(headers, stated)]
    cases = {RESIZED: [f"{file}: {size[0]} x {size[1]}, not {show(shape)}"
                       for file, size, shape, as_stored in zip(files, sizes, stated, stored)
                       if size and shape and shape != size and not as_stored]}
    boxes, classes, counts, more, cut = _sort_out(records, files, sizes, stored, category_of.values(), layout.place)
    cases |= more | records.cases | layout.cases
    held_out = [out and not all(held_out) for out in held_out]
    return {"stamps": stamps, "files": files, "sizes": sizes, "counts": counts,
            "boxes": boxes.tobytes().hex(), "classes": classes.tobytes().hex(),
            "held_out": held_out, "category_of": category_of, "cases": cases, "cut": cut,
            "total": len(records.boxes) + sum(len(cases.get(kind, ())) for kind in UNREADABLE)}


def _areas(boxes):
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _sort_out(records, files, sizes, stored, category_ids, place):
    """-> the boxes to keep (n, 4), image by image, clipped to it, in pixels; their classes (n,); how many each image has;
    {kind of case: its places}; how many boxes lose much of their area by clipping."""
    rows, class_of = [row for row in records.boxes if sizes[row[0]]], {key: k for k, key in enumerate(category_ids)}
    owners = np.array([row[0] for row in rows], int)
    classes = np.array([class_of.get(row[1], -1) for row in rows], int)
    sides = np.array([size and size[::-1] * 2 or (0,) * 4 for size in sizes], float).reshape(-1, 4)[owners]
    corners = np.array([row[2] for row in rows], float).reshape(-1, 4) * (sides if records.normalised else 1)
    with np.errstate(invalid="ignore", over="ignore"):
        inside = np.fmin(np.fmax(corners, 0), sides) + 0.0  # not -0.0
        infinite = ~np.isfinite(corners).all(1)
        faults = np.stack((np.array(stored, bool)[owners], infinite, classes < 0,
                           (inside[:, 2:] - inside[:, :2]).min(1) < MIN_SIDE,
                           _repeated(np.column_stack((owners, classes, infinite, inside)))))
        moved = (np.abs(inside - corners) > 1).any(1)  # less is rounding
        cut = int((_areas(inside) < (1 - MAX_CUT) * _areas(corners)).sum())
    bad_rows, cases = faults.any(0), {kind: [] for kind in (*DROPPED, CLIPPED)}
    for i in np.flatnonzero(bad_rows | moved):
        _, _, box, label, number = rows[i]
        case = DROPPED[faults[:, i].argmax()] if bad_rows[i] else CLIPPED
        cases[case].append(f"{label}: {place.format(number)}, {files[owners[i]]}: {box}")
    kept = np.flatnonzero(~bad_rows)
    kept = kept[owners[kept].argsort(kind="stable")]
    return inside[kept], classes[kept], np.bincount(owners[kept], minlength=len(files)).tolist(), cases, cut


def _repeated(rows):
    """Rows (n, k) of numbers -> bool (n,): whether an equal row stands before."""
    order, repeated = np.lexsort(rows.T), np.zeros(len(rows), bool)
    repeated[order[1:]] = (np.diff(rows[order], axis=0) == 0).all(1)
    return repeated


def _report(path, found, layout, file, allow_bad):
    """Reports bad images and boxes, see `bad.leave_out`. UserError where no box is left and, unless allow_bad, where too
    many are bad, or the labels are rather misunderstood."""
    cases, total, count = found["cases"], found["total"], len(found["files"])
    missing = cases.pop(MISSING, [])
    bad.leave_out(path, {MISSING: missing}, count + len(missing), "images", allow_bad=allow_bad,
                  file=file.with_name(f"missing-{file.name}"))  # the next call writes a list of its own
    bad.leave_out(path, cases, total, "boxes", allow_bad=allow_bad, notes=NOTES, file=file)
    held = [boxes for boxes, out in zip(found["counts"], found["held_out"]) if out]
    bare = sum(label is None for label, _ in layout.images.values())
    doubts = {f"{found['cut']} of {total} boxes lie to more than a fifth outside their images, as boxes of another "
              f"order or unit do": found["cut"] > max(1, MAX_CUT * total),
              f"{bare} of {count} images have no label file": 2 * bare > count,
              f"none of the {len(held)} validation images has a box": held and any(found["counts"]) and not any(held)}
    for doubt, holds in doubts.items():
        if holds and not allow_bad:
            raise UserError(f"{path}: {doubt}; correct that, or go on by --allow-bad")
    if not any(found["counts"]):
        raise UserError(f"{path}: no boxes in the labels of {count} images, so nothing to learn; check the labels")


def _stamps(layout, files):
    root = str(layout.root)
    return stamps_of([f"{root}/{file}" for file in files])
