"""What the readers of label formats share: the layout that they find, the records that they give, and files of text.

A reader is a file with two functions: find(path) -> the Layout of a data set in its format, or None; and
read(layout) -> Records. What a reader cannot understand is a UserError that names the file and the place in it. A box
that is understood but makes no sense stays in the records: data/labels drops it and counts it.
"""
import os
import re
from pathlib import Path
from typing import Callable, NamedTuple

from utils.errors import UserError
from utils.files import read_bytes

class Layout(NamedTuple):
    """The files of a data set. labels, images: names relative to `root`, sorted."""
    root: Path
    labels: list
    images: list     # empty where the label files list the images
    read: Callable   # read(layout) -> Records
    place: str       # how a message names a box in its label file, such as "line {}"


class Records(NamedTuple):
    """What the label files hold."""
    images: list            # (file relative to the root, held out for validation?, (height, width) as labelled or None)
    boxes: list             # (index of the image, category, (x1, y1, x2, y2) in pixels, label file, number in it)
    names: dict             # {category: name}
    crowds: list = []       # (label file, number in it) of regions that are no single objects
    normalised: bool = False  # the boxes are shares of the image's width and height instead of pixels


def part_of(name):
    """"train" or "val" for names such as instances_val2017.json and valid.json, else None."""
    found = re.search(r"(?<![a-z])(train|val)", name.lower())
    return found and found[1]


def list_files(folder, *suffixes):
    """The names in a folder that end with one of the suffixes, sorted; none where there is no such folder."""
    try:
        return sorted(n for n in os.listdir(folder) if n.lower().endswith(suffixes) and not n.startswith("."))
    except OSError:
        return []


def by_stem(names, folder):
    """{name without its suffix: name}. UserError for two files of one name in the folder: their boxes would be lost, or
    be taken for another image's."""
    found = {}
    for name in names:
        other = found.setdefault(os.path.splitext(name)[0], name)
        if other != name:
            raise UserError(f"{folder / name}: {other} has the same name; rename or remove one")
    return found


def check_pairs(image_folder, images, label_folder, labels):
    """Raises UserError for a label file without an image. images, labels: names in their folders."""
    label_of = by_stem(labels, label_folder)
    lone = sorted(label_of.keys() - by_stem(images, image_folder).keys())
    if lone:
        raise UserError(f"{label_folder / label_of[lone[0]]}: no image of that name in {image_folder} ({len(lone)} in "
                        f"total); add it as PNG, JPEG or TIFF, or remove the label file")


def read_lines(path):
    """The lines of a UTF-8 file, with or without byte order mark, with line ends of any system. Raises UserError."""
    try:
        return read_bytes(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8; save it as UTF-8") from None
