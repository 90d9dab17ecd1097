"""Boxes in YOLO's text files, one per image: class, centre x, centre y, width, height as shares of the image's sides.

    DATA/labels/train/*.txt (and val)   DATA/images/train/*.jpg   DATA/classes.txt, or the names in data.yaml
    DATA/train/labels/*.txt (and valid)   DATA/train/images/*.jpg

A line with the points of a polygon gives the box around it.
"""
import csv
import os
import re

from data import images
from data.labels.records import Layout, Records, by_stem, check_pairs, list_files, read_lines
from utils.errors import UserError
from utils.files import show

YAML = (".yaml", ".yml")
NAMES = ("classes.txt", "obj.names", "labels/classes.txt", "data.yaml")  # the first that exists names the classes
MAX_CLASS = 100_000  # classes are counted from 0; a larger number has slipped from another column


# ---- which files -----------------------------------------------------------------------------------------------------
def find(path):
    """The Layout of a data.yaml, or of a folder with `images` and `labels`, or with these in its parts; else None.

    Images are those in images, images/train*, images/val*, train*/images, val*/images, and in folders in these; images
    for testing have no labels. Raises UserError for a label file without an image.
    """
    if path.suffix.lower() in YAML and os.path.isfile(path):
        root, files, labels = path.parent, [], [path.name]
    elif any(os.path.isdir(path / top / "images") and os.path.isdir(path / top / "labels") for top in ("", "train")):
        root, files, labels = path, [], [name for name in NAMES if os.path.exists(path / name)][:1]
    else:
        return None

    def parts(top):
        return {name for name in list_files(root / top, "")
                if name.startswith(("train", "val")) and os.path.isdir(root / top / name)}

    inner, outer = sorted(parts("images") | parts("labels")), sorted(parts("."))
    for folder in ["images", *(f"images/{name}" for name in inner), *(f"{name}/images" for name in outer)]:
        list_names = list_files if folder == "images" and inner else _list_tree
        names, beside = list_names(root / folder, *images.SUFFIXES), _labels_of(folder)
        # labelImg writes the names of the classes among the labels
        texts = [name for name in list_names(root / beside, ".txt") if name != "classes.txt"]
        check_pairs(root / folder, names, root / beside, texts)
        files += [f"{folder}/{name}" for name in names]
        labels += [f"{beside}/{name}" for name in texts]
    return Layout(root, labels, files, read, "line {}")


def _list_tree(folder, *suffixes):
    """`list_files` of a folder and of all folders in it but those for testing: names relative to it."""
    found = []
    for top, folders, _ in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "test")))
        found += [os.path.relpath(os.path.join(top, name), folder) for name in list_files(top, *suffixes)]
    return found


def _labels_of(path):
    """A path within the data, with the folder `labels` in place of `images`."""
    return re.sub(r"(^|/)images(/|$)", r"\1labels\2", path, count=1)


# ---- what they hold --------------------------------------------------------------------------------------------------
def read(layout):
    """Layout -> Records, their boxes normalised."""
    found, boxes, names, label_of = [], [], [], by_stem(layout.labels, layout.root)
    for name in layout.labels:
        if "/" not in name or name in NAMES:
            names = _read_names(layout.root / name)
    for owner, file in enumerate(layout.images):
        label = label_of.get(os.path.splitext(_labels_of(file))[0])
        found.append((file, file.startswith(("images/val", "val")) and file.count("/") > 1, None))
        for number, line in enumerate(read_lines(layout.root / label) if label else [], 1):
            if not line.split():
                continue
            try:
                category, box = _parse_line(line)
            except ValueError:
                raise UserError(f"{layout.root / label}: line {number}: {show(line)}; correct it, it must be a class "
                                f"from 0 and 4 numbers (x and y of the centre, width, height), or a polygon's points"
                                ) from None
            boxes.append((owner, category, box, label, number))
    # classes are counted from 0, so those without a box are classes too
    names = names or [f"class {k}" for k in range(max((category for _, category, *_ in boxes), default=-1) + 1)]
    return Records(found, boxes, dict(enumerate(names)), normalised=True)


def _parse_line(line):
    """-> class, (x1, y1, x2, y2). Raises ValueError."""
    category, *numbers = line.split()
    category, numbers = int(category), [float(number) for number in numbers]
    if len(numbers) >= 6 and len(numbers) % 2 == 0:  # a polygon
        x1, y1, x2, y2 = *map(min, (numbers[::2], numbers[1::2])), *map(max, (numbers[::2], numbers[1::2]))
        numbers = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
    x, y, width, height = numbers
    if not 0 <= category <= MAX_CLASS:
        raise ValueError
    return category, (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def _read_names(path):
    """The names of the classes. Raises UserError."""
    if path.suffix.lower() in YAML:
        return _read_yaml(path)
    names = [line.strip() for line in "\n".join(read_lines(path)).rstrip().split("\n")]
    if not all(names):
        raise UserError(f"{path}: has an empty line, or none at all; it holds the name of one class per line")
    return names


def _read_yaml(path):
    """The `names` of Ultralytics' data.yaml: [a, b], {0: a, 1: b}, or one a line, "- a" or "0: a"; [] without any. No
    other YAML is read, so that no package for YAML is needed."""
    text = "\n".join(re.sub(r"(^|\s)#.*", "", line).rstrip() for line in read_lines(path))
    found = re.search(r"^names\s*:[ \t]*(.*)((?:\n(?:(?:\s|-\s|[\]}]).*)?)*)", text, re.MULTILINE)  # to the next key
    if not found:
        return []
    first, more = found.groups()
    if first.startswith(("[", "{")):
        text = (first[1:] + more.replace("\n", " ")).partition({"[": "]", "{": "}"}[first[0]])[0]
        text = text.strip().removesuffix(",")
        try:
            entries = next(csv.reader([text], quotechar="'" if "'" in text else '"', skipinitialspace=True), [])
        except csv.Error:  # such as a name of megabytes
            entries = []
    else:
        entries = [line.strip().removeprefix("-") for line in more.splitlines() if line]
    names = []
    for entry in entries:
        number, name = re.fullmatch(r"(?:\s*(\d+)\s*:)?(.*)", entry).groups()
        in_order = number in (None, str(len(names)))  # else a number is left out, or the order is another
        names.append(name.strip().strip("\"'") if in_order else "")
    if not names or not all(names):
        raise UserError(f"{path}: its names are not understood; write them into classes.txt beside it, one per line")
    return names
