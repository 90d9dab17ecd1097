"""What the readers of label formats share: the layout that they find, the records that they give, and files of text.

A reader is a file with two functions: find(path) -> the Layout of a data set in its format, or None; and
read(layout) -> Records. What a reader cannot understand is a UserError that names the file and the place in it. A box
that is understood but makes no sense stays in the records: data/labels drops it and counts it.
"""
import os
from pathlib import Path
from typing import Callable, NamedTuple

from data import images
from data.folds import PARTS, join_parts, part_of
from utils.errors import UserError
from utils.files import finder, list_tree, read_bytes, show

IMAGE_FOLDERS = {"images", "image", "imgs", "img", "jpegimages"}
MISSING, NO_BOX = "image not found", "no box of 4 numbers, nor a polygon"  # kinds of cases
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
    images: list            # (file relative to the root, held out for validation?, (height, width) as labelled or None)
    boxes: list             # (index of the image, category, (x1, y1, x2, y2) in pixels, label file, number in it)
    names: dict             # {category: name}
    cases: dict = {}        # {kind of what was left out, see data/labels: [where it stands]}
    normalised: bool = False  # the boxes are shares of the image's width and height instead of pixels


def list_files(folder, *suffixes):
    """The names in a folder that end with one of the suffixes, sorted; none where there is no such folder."""
    try:
        return sorted(n for n in os.listdir(folder) if n.lower().endswith(suffixes) and not n.startswith("."))
    except OSError:
        return []


def pair(root, suffix, label_folders, entries=()):
    """Images and their label files -> {image: [label file or None, "train" or "val"]}, {kind of case: places}.

    Both have one path, but for suffixes, capitals, and folders that are named like images or labels. entries: (part,
    folder or list of images, where it stands), the data's own parts; else the folders' names tell them. Images for
    testing are left out. Raises UserError for two files of one path, and for a label file in a folder of labels without
    an image.
    """
    def key(file):
        folder, name = os.path.split(file)
        words = [word for word in folder.lower().split("/") if word not in IMAGE_FOLDERS | label_folders]
        return "/".join([*words, os.path.splitext(name)[0]])

    def by_key(files):
        found = {}
        for file in files:
            other = found.setdefault(key(file), file)
            if other != file:
                raise UserError(f"{root / file}: {other} has the same name; rename or remove one")
        return found

    def lies_in(file, names):
        return not names.isdisjoint(os.path.dirname(file).lower().split("/"))

    files = list_tree(root)
    labels = [file for file in files if file.lower().endswith(suffix) and os.path.basename(file).lower() not in NO_LABELS]
    pictures = [file for file in files if file.lower().endswith(images.SUFFIXES)]
    if not entries or not all(os.path.isdir(root / entry) for _, entry, _ in entries):
        beside = {os.path.dirname(label) for label in labels}
        inside = [file for file in pictures if lies_in(file, IMAGE_FOLDERS)]
        pictures = inside or [file for file in pictures if os.path.dirname(file) in beside]
    there = {os.path.dirname(file) for file in pictures}
    image_of = by_key(pictures)
    label_of = by_key(label for label in labels if lies_in(label, label_folders) or os.path.dirname(label) in there)
    lone = [label for name, label in label_of.items() if name not in image_of and part_of(os.path.dirname(label)) != "test"]
    wrong = next((label for label in lone if lies_in(label, label_folders)), None)
    if wrong:
        folder = next((os.path.dirname(file) for name, file in image_of.items()
                       if os.path.dirname(name) == os.path.dirname(key(wrong))), "")
        raise UserError(f"{root / wrong}: no image of that name in {root / folder} ({len(lone)} in total); add it as PNG, "
                        f"JPEG or TIFF, or remove the label file")
    parts, missing = _parts(root, pictures, entries)
    found = {file: [label_of.get(name), parts[file] or "train"] for name, file in image_of.items()
             if parts[file] != "test" and (parts[file] or label_of.get(name) or not any(parts.values()))}
    return found, {MISSING: missing, "label file without an image": lone}


def _parts(root, files, entries):
    """-> {file: part or None}, [where an image stands that is not there]."""
    if not entries:
        return {file: part_of(os.path.dirname(file)) for file in files}, []
    locate, listed, missing = finder(files), [], []
    for part, entry, where in entries:
        if os.path.isdir(root / entry):
            listed += [(file, part, where) for file in files if entry == "." or file.startswith(f"{entry}/")]
            continue
        for number, line in enumerate(read_lines(root / entry), 1):
            file = locate(line.strip()) or locate(line.partition(" ")[0])  # VOC's "000005 -1"
            if file:
                listed.append((file, part, f"{where}: line {number}"))
            elif line.strip() and part != "test":
                missing.append(f"{where}: line {number}: no image {show(line.strip())}")
    part_of_file = join_parts(listed)
    rest = "test" if "train" in {part for part, *_ in entries} else "train"  # the others are not meant for training
    return {file: part_of_file.get(file, rest) for file in files}, missing


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
