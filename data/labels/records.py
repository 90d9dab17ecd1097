"""What the readers of label formats share: the layout that they find, the records that they give, and files of text.

A reader is a file with two functions: find(path) -> the Layout of a data set in its format, or None; and
read(layout) -> Records. What a reader cannot understand is a UserError that names the file and the place in it. A box
that is understood but makes no sense stays in the records: data/labels drops it and counts it.
"""
import os
from pathlib import Path
from typing import Callable, NamedTuple
from xml.etree import ElementTree

import numpy as np

from data import images
from data.folds import PARTS, part_of
from utils.errors import UserError
from utils.files import by_name, finder, list_tree, read_bytes, show
from utils.ops.geometry import rotate, translate, warp_boxes

IMAGE_FOLDERS = {"images", "image", "imgs", "img", "jpegimages"}
MISSING, NO_BOX = "image not found", "no box of 4 numbers, nor a polygon"  # kinds of cases
TURNED_BOX = "rotated box, taken by its extent"  # a note
NO_LABELS = ("classes.txt", "predefined_classes.txt", "readme.txt")  # programs write them among the labels


class Layout(NamedTuple):
    """The files of a data set. labels, images: names relative to `root`."""
    root: Path
    labels: list
    images: dict     # {image: [its label file or None, part]}; empty where the label files list the images
    read: Callable   # read(layout) -> Records
    place: str       # how a message names a box in its label file, such as "line {}"
    cases: dict = {}  # as in Records


class Records(NamedTuple):
    """What the label files hold."""
    images: list            # (file relative to the root, held out for validation?, (height, width) as labelled or None,
    #                         in COCO's format the id)
    boxes: list             # (index of the image, category, (x1, y1, x2, y2) in pixels, label file, number in it)
    names: dict             # {category: name}
    cases: dict = {}        # {kind of what was left out, see data/labels: [where it stands]}
    normalised: bool = False  # the boxes are shares of the image's width and height instead of pixels


def list_files(folder, suffix=""):
    """The names in a folder that end with the suffix, sorted; none where there is no such folder."""
    try:
        return sorted(n for n in os.listdir(folder) if n.lower().endswith(suffix) and not n.startswith("."))
    except (OSError, ValueError):  # ValueError: a name with a zero byte
        return []


def pair(root, suffix, label_folders, entries=()):
    """Images and their label files -> {image: [label file or None, "train" or "val"]}, {kind of case: places}.

    Both have one path, but for suffixes, capitals, and folders that are named like images or labels. entries: (part,
    folder or list of images, where it stands), the data's own parts; else the folders' names tell them. Images for
    testing are left out. Raises UserError for two files of one path, and for a label file in a folder of labels without
    an image.
    """
    def folders_of(file):
        return os.path.dirname(file).lower().split("/")

    def key_of(file):
        return "/".join([*(name for name in folders_of(file) if name not in IMAGE_FOLDERS | label_folders),
                         Path(file).stem])

    files, missing = list_tree(root), []
    pictures = [file for file in files if file.lower().endswith(images.SUFFIXES)]
    if entries:
        parts, missing = _listed_parts(root, pictures, entries)
    else:
        pictures = [file for file in pictures if IMAGE_FOLDERS.intersection(folders_of(file))] or pictures
        parts = {file: part_of(os.path.dirname(file)) for file in pictures}
    image_of = by_name(pictures, key_of, root)
    label_of = by_name((file for file in files if file.lower().endswith(suffix)
                        and Path(file).name.lower() not in NO_LABELS), key_of, root)
    for label in (label_of[key] for key in sorted(label_of.keys() - image_of.keys())):
        if label_folders.intersection(folders_of(label)) and part_of(os.path.dirname(label)) != "test":
            raise UserError(f"{root / label}: no image of that name in {root}; add it as PNG, JPEG or TIFF, or "
                            f"remove the label file")
    found = {file: [label_of.get(key), parts[file] or "train"] for key, file in image_of.items()
             if parts[file] != "test" and (parts[file] or label_of.get(key) or not any(parts.values()))}
    return found, {MISSING: missing}


def _listed_parts(root, files, entries):
    """-> {file: part}, [where an image stands that is not there]. UserError for an image that is to be trained on and
    in another part too."""
    locate, missing = finder(dict(zip(files, files))), []
    # others are not meant for training where the training images are listed
    found = dict.fromkeys(files, ("test" if "train" in {part for part, *_ in entries} else "train", None))
    for part, entry, where in entries:
        if os.path.isdir(root / entry):
            names = [(file, file, where) for file in files if entry == "." or file.startswith(f"{entry}/")]
        else:  # VOC has lines such as "000005 -1"
            names = [(line, locate(line.strip()) or locate(line.partition(" ")[0]), f"{where}: line {number}")
                     for number, line in enumerate(read_lines(root / entry), 1) if line.strip()]
        for name, file, place in names:
            other, there = found.get(file, (part, None))
            if there and other != part and "train" in (other, part):
                raise UserError(f"{place}: {file} is in the part {part} here and in {other} in {there}; remove one")
            if file and not (there and part == "test"):  # what is for validation and testing is for validation
                found[file] = part, place
            elif not file and part != "test":
                missing.append(f"{place}: no image {show(name.strip())}")
    return {file: part for file, (part, _) in found.items()}, missing


def list_entries(root, *folders):
    """The entries for `pair` of image lists such as train.txt and val.txt in these folders."""
    return [(part, os.path.join(folder, name), root / folder / name) for folder in folders
            for name in list_files(root / folder, ".txt") if (part := PARTS.get(name[:-4].lower()))
            and name[:-4].lower() != "trainval"]


def read_lines(path):
    """The lines of a UTF-8 file, with or without byte order mark, with line ends of any system. Raises UserError."""
    try:
        return read_bytes(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8; save it as UTF-8") from None


def read_xml(path, tag):
    """The root element of an XML file, which has this tag. Raises UserError."""
    data = read_bytes(path)
    # Zero bytes are removed to see the words in UTF-16 too. Labels declare no entities, and these can grow without end
    if any(word in data.replace(b"\0", b"") for word in (b"<!DOCTYPE", b"<!ENTITY")):
        raise UserError(f"{path}: declares a DOCTYPE or an ENTITY; remove the declaration")
    try:
        root = ElementTree.fromstring(data)
        if root.tag != tag:
            raise ValueError
    except (ElementTree.ParseError, ValueError, LookupError):  # the latter two: an encoding that is not supported
        raise UserError(f"{path}: not a valid XML file of an <{tag}>; correct or replace it") from None
    return root


def as_coco(images, shapes, pivot, cases):
    """What a file of another format holds, as COCO's JSON would hold it, for coco.py to read.

    images: [{"id", "file_name", "height", "width"}], the latter two if known; shapes: [(id of the image, class name,
    points, degrees)], points: [x, y, x, y, ...] in pixels, two corners of a box, all of a polygon, none of what has no
    box. Of a box that is turned clockwise, around the point at this share `pivot` of its sides, the extent is taken,
    which is noted in `cases`.
    """
    names, annotations = sorted({shape[1] for shape in shapes}), []
    for i, name, points, degrees in shapes:
        if degrees:
            start, end = np.reshape(points, (2, 2))
            x, y = start + pivot * (end - start)
            points = warp_boxes([points], translate(x, y) @ rotate(-degrees) @ translate(-x, -y))[0].tolist()
            cases[TURNED_BOX].append(f"image {i}: {name}")
        annotations.append({"image_id": i, "category_id": names.index(name), "segmentation": [points]})
    return {"images": images, "categories": [{"id": k, "name": name} for k, name in enumerate(names)],
            "annotations": annotations}
