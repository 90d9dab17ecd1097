"""Boxes in YOLO's text files, one per image: class, centre x, centre y, width, height as shares of the image's sides.

    DATA/labels/train/*.txt (and val)   DATA/images/train/*.jpg   DATA/classes.txt, or the names in data.yaml
    DATA/train/labels/*.txt (and valid)   DATA/train/images/*.jpg, or *.txt and *.jpg in one folder
    data.yaml, whose train, val and test are folders, or lists of images such as train.txt

A line with the points of a polygon gives the box around it.
"""
import os

from data.labels import data_yaml
from data.labels.records import Layout, Records, list_entries, pair, read_lines
from utils.errors import UserError
from utils.files import show
from utils.train import dist

YAML = (".yaml", ".yml")
NAMES = ("classes.txt", "obj.names", "labels/classes.txt", "data.yaml", "data.yml")  # the first names the classes
LABEL_FOLDERS = {"labels", "label", "txt", "txts"}
MAX_CLASS = 100_000  # classes are counted from 0; a larger number has slipped from another column
BAD_LINE = "not a class from 0 and 4 numbers (x and y of the centre, width, height), or a polygon's points"


# ---- which files -----------------------------------------------------------------------------------------------------
def find(path):
    """The Layout of a data.yaml, or of a folder with text files, one per image; else None. Raises UserError for a label
    file without an image."""
    alone = path.suffix.lower() in YAML and os.path.isfile(path)
    home = path.parent if alone else path
    names = [path.name] if alone else [name for name in NAMES if os.path.exists(home / name)]
    yaml = next((name for name in names if name.lower().endswith(YAML)), None)
    root, entries = _declared_parts(home, yaml) if yaml else (home, [])
    entries = entries or list_entries(root, ".")
    found, cases = pair(root, ".txt", LABEL_FOLDERS, entries)
    labels = [label for label, _ in found.values() if label]
    usual = any(os.path.isdir(root / top / "images") and os.path.isdir(root / top / "labels") for top in ("", "train"))
    if not (labels or usual or alone):
        return None
    lists = [entry for _, entry, _ in entries if os.path.isfile(root / entry)]
    named = [os.path.relpath(home / name, root) for name in names[:1]]
    return Layout(root, named + lists + labels, found, read, "line {}", cases)


def _declared_parts(home, yaml):
    """The parts that a data.yaml in the folder `home` declares -> their folder, entries for `records.pair`. Where none
    of them is there, the names of folders tell the parts. Raises UserError for a part that is not there."""
    declared = data_yaml.read(home / yaml)
    values = [(part, value) for part, found in declared.items() if part in ("train", "val", "test")
              for value in (found if type(found) is list else [found] if found else [])]
    if any(type(value) is not str for _, value in [*values, ("path", declared.get("path") or "")]):
        raise UserError(f"{home / yaml}: path, train, val and test are not texts; write folders or lists of images")
    for root in [home / declared["path"], home] if declared.get("path") else [home]:
        # Roboflow writes ../train/images for what lies beside the file
        entries = [(part, next((os.path.normpath(name) for name in (value, value.lstrip("./"))
                                if os.path.exists(root / name)), None), f"{home / yaml}: {part}: {value}")
                   for part, value in values]
        lost = [where for part, place, where in entries if not place and part != "test"]
        if not lost:
            return root, [entry for entry in entries if entry[1]]
    if any(place for _, place, _ in entries):
        raise UserError(f"{lost[0]}: no such folder or list of images in {home}; correct the line, or path")
    dist.print0(f"{lost[0]}: not there, so the folders images and labels are looked for")
    return home, []


# ---- what they hold --------------------------------------------------------------------------------------------------
def read(layout):
    """Layout -> Records, their boxes normalised."""
    boxes, names, bad = [], [], []
    for name in layout.labels:
        if os.path.basename(name) in NAMES or name.lower().endswith(YAML):
            names = _read_names(layout.root / name)
    for owner, (label, _) in enumerate(layout.images.values()):
        for number, line in enumerate(read_lines(layout.root / label) if label else [], 1):
            try:
                if line.split():
                    boxes.append((owner, *_parse_line(line), label, number))
            except (ValueError, OverflowError):
                bad.append(f"{label}: line {number}: {show(line)}")
    # classes are counted from 0, so those without a box are classes too
    names = names or [f"class {k}" for k in range(max((category for _, category, *_ in boxes), default=-1) + 1)]
    return Records([(file, part == "val", None) for file, (_, part) in layout.images.items()], boxes,
                   dict(enumerate(names)), {BAD_LINE: bad}, normalised=True)


def _parse_line(line):
    """-> class, (x1, y1, x2, y2). Raises ValueError."""
    category, *numbers = map(float, line.split())
    if len(numbers) >= 6 and len(numbers) % 2 == 0:  # a polygon
        sides = numbers[::2], numbers[1::2]
        x1, y1, x2, y2 = *map(min, sides), *map(max, sides)
        numbers = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
    x, y, width, height = numbers
    if not 0 <= category <= MAX_CLASS or category != int(category):
        raise ValueError
    return int(category), (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def _read_names(path):
    """The names of the classes. Raises UserError."""
    if path.suffix.lower() not in YAML:
        names = [line.strip() for line in "\n".join(read_lines(path)).rstrip().split("\n")]
        if not all(names):
            raise UserError(f"{path}: has an empty line, or none at all; it holds the name of one class per line")
        return names
    declared = data_yaml.read(path)
    names, count = declared.get("names", {}), declared.get("nc")
    if type(names) is dict:  # numbered from 0, in any order
        names = [names.get(str(k)) for k in range(len(names))]
    texts = type(names) is list and all(type(name) is str and name.strip() for name in names)
    if not texts or "names" in declared and not names:
        raise UserError(f"{path}: its names are not understood; write them into classes.txt beside it, one per line")
    if names and count not in (None, str(len(names))):
        raise UserError(f"{path}: nc is {show(count)} and there are {len(names)} names; correct one of them")
    return [name.strip() for name in names]
