"""The file formats of box labels: JSON as COCO's, YOLO's text files, Pascal VOC's XML.

What cannot be understood is a UserError that names the file and the place. Boxes that are understood but make no sense
are left to data/labels, which counts them.
"""
import csv
import itertools
import json
import os
import re
import reprlib
import stat
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from utils.errors import UserError

# of the parking-lot competition (AI Challenge 2022), whose labels tell the numbers 1 to 14 only
PARKING = ("sedan", "SUV", "van", "bus", "school bus", "truck", "taxi", "adult", "child", "motorcycle", "kickboard",
           "bicycle", "stroller", "cart")
YOLO_NAMES = ("classes.txt", "obj.names", "labels/classes.txt", "data.yaml")  # the first that is there
YAML = (".yaml", ".yml")
MAX_CLASS = 100_000  # of YOLO, where a class is a count from 0; more is a number that slipped columns
MAX_ID = 2**53  # of a category in JSON
PLACE = {"YOLO": "line {}", "VOC": "object {}", "masks": "object {}", "COCO": "annotations[{}]",
         "competition": "annotations[{}]"}


short = reprlib.Repr()
short.maxstring = 200
show = short.repr  # what stands in a message stays short, and in one line


def same_name(name):
    """A file's name in one Unicode form: archives from a Mac hold accents and Hangul in another."""
    return unicodedata.normalize("NFC", name)


class Layout(NamedTuple):
    """kind: "competition", "COCO", "YOLO", "VOC" or "masks". labels, images: names relative to `root`, sorted; without
    images where the labels list them."""
    kind: str
    root: Path
    labels: list
    images: list


@dataclass
class Parsed:
    """Per image: `files` (relative to the layout's root), `held_out`, `stated` (height, width in the labels, or None).
    Per box: `owner` (index of its image), `category`, `boxes` (x1 y1 x2 y2 in pixels; YOLO: xc yc w h, normalised),
    `places` (label file, number therein). `names`: {category: name}. `crowd`: the places of regions left out."""
    files: list = field(default_factory=list)
    held_out: list = field(default_factory=list)
    stated: list = field(default_factory=list)
    owner: list = field(default_factory=list)
    category: list = field(default_factory=list)
    boxes: list = field(default_factory=list)
    places: list = field(default_factory=list)
    names: dict = field(default_factory=dict)
    crowd: list = field(default_factory=list)

    def add_image(self, file, held_out, stated=None):
        self.files.append(file)
        self.held_out.append(held_out)
        self.stated.append(stated)

    def add_box(self, owner, category, box, place):
        self.owner.append(owner)
        self.category.append(category)
        self.boxes.append(box)
        self.places.append(place)


def part_of(name):
    """"train" or "val" for names such as instances_val2017.json and valid.json, else None."""
    found = re.search(r"(?<![a-z])(train|val)", name.lower())
    return found and found[1]


def parse(layout):
    """Layout -> Parsed."""
    return {"YOLO": _parse_yolo, "VOC": _parse_voc}.get(layout.kind, _parse_json)(layout)


def _read(path):
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block
            raise UserError(f"{path}: not a regular file; replace or remove it")
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check path and permissions") from None


def read_text(path):
    """The lines of a UTF-8 file, with or without byte order mark, of any line ends."""
    try:
        return _read(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8; save it as one") from None


def read_json(path):
    """A JSON file's content. Raises UserError for what is not JSON, and for what Python takes for JSON or passes over:
    NaN, Infinity, and a key twice in one object."""
    def unique(pairs):
        entry = dict(pairs)
        if len(entry) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"the key {show(twice)} stands twice in one object")
        return entry

    def no_number(text):
        raise ValueError(f"{text} is no number of JSON")

    try:
        return json.loads(_read(path), object_pairs_hook=unique, parse_constant=no_number)
    except RecursionError:
        raise UserError(f"{path}: nested too deeply to be labels; replace it") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); correct or replace it") from None


def get(entry, key, types, *place):
    """entry[key], if it is of one of the types; else a UserError naming the place: file, list, index in it."""
    value = entry.get(key) if type(entry) is dict else None
    if type(value) not in types:
        there = f"{place[0]}: {place[1]}[{place[2]}]" if len(place) > 1 else str(place[0])
        what = (f"not an object with {key}" if type(entry) is not dict else
                f"{key} is {show(value)}" if key in entry else f"{key} is missing")
        wanted = " or ".join({int: "a whole number", str: "a text", list: "a list"}[t] for t in types)
        raise UserError(f"{there}: {what}; correct it, it must be {wanted}")
    return value


# ---- JSON ------------------------------------------------------------------------------------------------------------
def _parse_json(layout):
    parsed, taken = Parsed(), {}
    for label in layout.labels:
        path, part = layout.root / label, part_of(Path(label).name) or part_of(os.path.dirname(label))
        data = read_json(path)
        # the images of instances_val2017.json are rather in val2017 than in train2017
        names = [f"{name}{year}" for name in (("val", "train") if part == "val" else ("train", "val"))
                 for year in ("", "2017", "2014")]
        names = [Path(label).stem.removeprefix("instances_"), *names]  # CVAT's subsets, of any name
        folders = [os.path.dirname(label), "", "images", *names, *(f"images/{n}" for n in names),
                   *(f"{n}/images" for n in names)]
        locate = _locator(layout.root, ["train/images"] if layout.kind == "competition" else folders)
        index_of = {}
        for i, entry in enumerate(get(data, "images", (list,), path)):
            key = get(entry, "id", (int, str), path, "images", i)
            name = get(entry, "file_name", (str,), path, "images", i)
            file = locate(name, f"{path}: images[{i}]")
            if key in index_of:
                raise UserError(f"{path}: images[{i}]: the id {show(key)} stands there twice; correct one")
            if file in taken:
                raise UserError(f"{path}: images[{i}]: {show(name)} is listed already, in {taken[file]}; remove one")
            taken[file], index_of[key] = label, len(parsed.files)
            stated = (entry["height"], entry["width"]) if entry.get("height") and entry.get("width") else None
            parsed.add_image(file, part == "val", stated)
        _add_categories(parsed.names, data, path)
        _add_annotations(parsed, data, path, label, index_of)
    if not parsed.names:
        found = sorted(set(parsed.category))
        parking = found == list(range(1, 15))
        parsed.names = {n: PARKING[n - 1] if parking else f"class {n}" for n in found}
    used, count = set(parsed.category), Counter(parsed.names.values())
    # Roboflow's first category is the project, which may be called as one of its classes
    parsed.names = {n: name for n, name in parsed.names.items() if n in used or count[name] == 1}
    return parsed


def _locator(root, folders):
    """-> function(file_name, place) -> its path relative to root. Lists a folder once: a look-up per image is slow on
    network disks. Names are compared by `same_name`."""
    top, listed = os.path.abspath(root), {}
    folders = [f for f in dict.fromkeys(folders) if os.path.isdir(os.path.join(top, f))]

    def names(folder):
        try:
            return {same_name(n): n for n in os.listdir(os.path.join(top, folder))}
        except (OSError, ValueError):  # the latter: a name with a zero byte
            return {}

    def locate(name, place):
        inside, name = False, name if "/" in name else name.replace("\\", "/")  # Label Studio's on Windows
        for base in folders:
            path = os.path.normpath(os.path.join(base, name))
            path = os.path.relpath(path, top) if os.path.isabs(path) else path
            if path == ".." or path.startswith("../"):
                continue
            inside = True
            folder, file = os.path.split(path)
            if folder not in listed:
                listed[folder] = names(folder)
            file = listed[folder].get(same_name(file))
            if file and name:
                return os.path.join(folder, file)
        if folders and not inside:
            raise UserError(f"{place}: {show(name)} leads out of {root}; move the image into it, correct file_name")
        looked = ", ".join(f or "." for f in folders)
        raise UserError(f"{place}: no image {show(name)} in {root} (looked in {looked}); add it, or remove the entry")
    return locate


def _add_categories(names, data, path):
    """Adds a JSON's categories to {id: name}; several files must agree."""
    here = set()
    for i, entry in enumerate(get(data, "categories", (list,), path) if "categories" in data else []):
        key = _category(get(entry, "id", (int,), path, "categories", i), path, "categories", i)
        name = get(entry, "name", (str,), path, "categories", i)
        if key in here or names.get(key, name) != name:
            raise UserError(f"{path}: categories[{i}]: the id {key} is another category's too; correct one of them")
        here.add(key)
        names[key] = name


def _category(key, path, group, i):
    if abs(key) >= MAX_ID:
        raise UserError(f"{path}: {group}[{i}]: the category's id is too large; number the categories from 1")
    return key


def _add_annotations(parsed, data, path, label, index_of):
    # their own ids are not looked at: nothing refers to them, and merged files often repeat them
    for i, entry in enumerate(get(data, "annotations", (list,), path)):
        image = get(entry, "image_id", (int, str), path, "annotations", i)
        if image not in index_of:
            raise UserError(f"{path}: annotations[{i}]: there is no image with the id {show(image)}; add the "
                            f"image, or remove its annotations")
        category = _category(get(entry, "category_id", (int,), path, "annotations", i), path, "annotations", i)
        box = get(entry, "bbox", (list,), path, "annotations", i)
        crowd = entry.get("iscrowd", 0)
        try:
            if len(box) != 4 or {*map(type, box)} - {int, float} or type(crowd) not in (int, bool):
                raise ValueError
            x, y, width, height = map(float, box)
        except (ValueError, OverflowError):  # the latter: an integer beyond float64
            raise UserError(f"{path}: annotations[{i}]: bbox {show(box)}, iscrowd {show(crowd)}; correct them, "
                            f"they must be 4 numbers (x, y, width, height), and 0 or 1") from None
        if crowd:
            parsed.crowd.append((label, i))
        else:
            parsed.add_box(index_of[image], category, (x, y, x + width, y + height), (label, i))


# ---- text and XML ----------------------------------------------------------------------------------------------------
def yolo_labels(path):
    """A path within the data, with its folder `labels` in place of `images`."""
    return re.sub(r"(^|/)images(/|$)", r"\1labels\2", path, count=1)


def _parse_yolo(layout):
    parsed, names, label_of = Parsed(), [], _by_stem(layout.labels)
    for path in (layout.root / name for name in layout.labels if "/" not in name or name in YOLO_NAMES):
        names = _yaml_names(path) if path.suffix.lower() in YAML else [
            line.strip() for line in "\n".join(read_text(path)).rstrip().split("\n")]
        if not all(names):
            raise UserError(f"{path}: has an empty line, or none at all; it holds the name of one class per line")
    for owner, file in enumerate(layout.images):
        label = label_of.get(os.path.splitext(yolo_labels(file))[0])
        parsed.add_image(file, file.startswith(("images/val", "val")) and file.count("/") > 1)
        for number, line in enumerate(read_text(layout.root / label) if label else [], 1):
            words = line.split()
            if not words:
                continue
            try:
                category, box = int(words[0]), tuple(map(float, words[1:]))
                if len(box) >= 6 and len(box) % 2 == 0:  # a polygon
                    ends = [(min(side), max(side)) for side in (box[::2], box[1::2])]
                    box = tuple((low + high) / 2 for low, high in ends) + tuple(high - low for low, high in ends)
                if len(box) != 4 or not 0 <= category <= MAX_CLASS:
                    raise ValueError
            except ValueError:
                raise UserError(f"{layout.root / label}: line {number}: {show(line)}; correct it, it must be a "
                                f"class from 0 and 4 numbers (x and y of the centre, width, height), or a polygon's "
                                f"points") from None
            parsed.add_box(owner, category, box, (label, number))
    # a class is a count from 0, also where one has no box
    names = names or [f"class {n}" for n in range(max(parsed.category, default=-1) + 1)]
    parsed.names = dict(enumerate(names))
    return parsed


def _by_stem(names):
    """{name without its suffix: name}: a suffix may be written in capitals."""
    return {os.path.splitext(name)[0]: name for name in names}


def _yaml_names(path):
    """The `names` of Ultralytics' data.yaml: [a, b], {0: a, 1: b}, or one a line, "- a" or "0: a"; [] without any. Only
    these forms are read: that takes no YAML."""
    lines = [re.sub(r"(^|\s)#.*", "", line).rstrip() for line in read_text(path)]
    start = next((i for i, line in enumerate(lines) if re.match(r"names\s*:", line)), None)
    if start is None:
        return []
    first, more = lines[start].partition(":")[2].strip(), lines[start + 1:]
    if first.startswith(("[", "{")):
        text, end = " ".join([first[1:], *more]), {"[": "]", "{": "}"}[first[0]]
        text = text[:text.find(end)].strip().removesuffix(",")
        try:
            entries = next(csv.reader([text], quotechar="'" if "'" in text else '"', skipinitialspace=True), [])
        except csv.Error:  # such as a name of megabytes
            entries = []
    else:
        block = itertools.takewhile(lambda line: not line or re.match(r"-\s|\s", line), more)
        entries = [line.strip().removeprefix("-") for line in block if line]
    names = []
    for entry in entries:
        key, colon, name = entry.partition(":")
        if not colon or not key.strip().isdecimal():
            name = entry
        elif key.strip() != str(len(names)):  # a number is left out, or they are in another order
            name = ""
        names.append(name.strip().strip("\"'"))
    if not names or not all(names):
        raise UserError(f"{path}: its names are not understood; write them into classes.txt beside it, one per line")
    return names


def _parse_voc(layout):
    parsed, label_of = Parsed(), _by_stem(layout.labels)
    test, val = (_image_set(layout, f"ImageSets/Main/{name}.txt") for name in ("test", "val"))
    stems = {Path(file).stem for file in layout.images}
    if val - stems:
        raise UserError(f"{layout.root / 'ImageSets/Main/val.txt'}: no image {show(min(val - stems))} in JPEGImages; "
                        f"add it, or remove the line")
    for file in layout.images:
        stem = Path(file).stem
        if stem in test:
            continue
        label = label_of.get(f"Annotations/{stem}")
        if label:
            for number, (name, box) in enumerate(_objects(layout.root / label), 1):
                parsed.add_box(len(parsed.files), name, box, (label, number))
        parsed.add_image(file, stem in val)
    found = sorted(set(parsed.category))
    parsed.names = dict(enumerate(found))
    number_of = {name: i for i, name in enumerate(found)}
    parsed.category = [number_of[name] for name in parsed.category]
    return parsed


def _image_set(layout, name):
    """The first words of a list's lines: "000005", or "000005 -1"."""
    lines = read_text(layout.root / name) if name in layout.labels else []
    return {line.split()[0] for line in lines if line.strip()}


def _objects(path):
    """A VOC file's (name, (x1, y1, x2, y2)); in the file pixels count from 1, and the last one is part of the box."""
    data = _read(path)
    # without zero bytes UTF-16 is seen too. Labels declare no entities; those that do may expand without end
    if any(word in data.replace(b"\0", b"") for word in (b"<!DOCTYPE", b"<!ENTITY")):
        raise UserError(f"{path}: declares a DOCTYPE or an ENTITY; remove the declaration")
    try:
        root = ElementTree.fromstring(data)
        if root.tag != "annotation":
            raise ValueError
    except (ElementTree.ParseError, ValueError, LookupError):  # the latter two: an encoding unknown, or unsupported
        raise UserError(f"{path}: not a valid XML file of an <annotation>; correct or replace it") from None
    found = []
    for number, item in enumerate(root.findall("object"), 1):
        name = " ".join((item.findtext("name") or "").split())
        try:
            if not name:
                raise ValueError
            x1, y1, x2, y2 = (float(item.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
        except (TypeError, ValueError):
            raise UserError(f"{path}: object {number}: has no name, or no bndbox with the numbers xmin, ymin, xmax, "
                            f"ymax; correct it") from None
        found.append((name, (x1 - 1, y1 - 1, x2, y2)))
    return found
