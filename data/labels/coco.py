"""Boxes in one file for many images: COCO's JSON in its usual folders, the parking-lot competition's, CVAT's XML
(cvat.py), and Label Studio's JSON, which is a list (label_studio.py).

    competition  DATA/train/label/Train.json   DATA/train/images/*.jpg   DATA/Test_Images_Information.json
    COCO         DATA/annotations/instances_train2017.json (and val)   DATA/train2017/*.jpg; or a single JSON file;
                 or, as Roboflow exports it, a JSON among the images: DATA/train/_annotations.coco.json (and valid)
    CVAT         DATA/annotations.xml   DATA/images/*.jpg; or a single XML file
"""
import functools
import itertools
import os
import re
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

from data.folds import part_of
from data.labels import cvat, label_studio
from data.labels.records import MISSING, NO_BOX, Layout, Records, list_files, read_xml
from utils.errors import UserError
from utils.files import read_json, same_name, show

COMPETITION = "train/label/Train.json"
CVAT = "annotations.xml"
TEST_INFORMATION = "Test_Images_Information.json"
LABEL_FOLDERS = ("annotations", "label", "labels")  # the images lie beside a folder of this name, not in it
# the classes of the parking-lot competition (AI Challenge 2022), whose labels hold only the numbers 1 to 14
PARKING = ("sedan", "SUV", "van", "bus", "school bus", "truck", "taxi", "adult", "child", "motorcycle", "kickboard",
           "bicycle", "stroller", "cart")
UPLOADED = re.compile("^[0-9a-f]{8}-")  # Label Studio puts it before the names of uploaded images
TYPES = {int: "a whole number", str: "a text", list: "a list"}


# ---- which files -----------------------------------------------------------------------------------------------------
def find(path):
    """The Layout of a .json or .xml, of the competition's folder, of COCO's folder with a training part, or of CVAT's;
    else None."""
    if path.suffix.lower() in (".json", ".xml") and os.path.isfile(path):
        root = path.parent.parent if path.parent.name.lower() in LABEL_FOLDERS else path.parent
        return _layout(root, [str(path.relative_to(root))])
    if os.path.exists(path / COMPETITION):
        return _layout(path, [COMPETITION])
    parts = [name for name in _json_files(path) if part_of(name) in ("train", "val")]
    # COCO's folder has captions and key points of the same images too
    parts = [name for name in parts if "/instances" in name] or parts
    if "train" in map(part_of, parts):
        return _layout(path, parts)
    return _layout(path, [CVAT]) if os.path.isfile(path / CVAT) else None


def find_other(path):
    """The Layout of a folder with a JSON among the images of each part, or with one JSON file; else None. To be asked
    after the other formats, whose folders may hold a JSON too. Raises UserError for several JSON files."""
    among = [f"{part}/{name}" for part in list_files(path) if part_of(part) in ("train", "val")
             for name in list_files(path / part, ".json")]
    if "train" in map(part_of, among):
        return _layout(path, among)
    alone = _json_files(path) + [name for name in list_files(path, ".json") if name != TEST_INFORMATION]
    if len(alone) > 1:
        raise UserError(f"{path}: has {len(alone)} JSON files ({alone[0]}, {alone[1]}, ...); point --data to one")
    return _layout(path, alone) if alone else None


def _json_files(path):
    """The JSON files in the folder `annotations`, in capitals too."""
    return [f"{folder}/{name}" for folder in list_files(path) if folder.lower() == "annotations"
            for name in list_files(path / folder, ".json")]


def _layout(root, labels):
    return Layout(root, labels, {}, read, "annotations[{}]")


# ---- what they hold --------------------------------------------------------------------------------------------------
def read(layout):
    """Layout -> Records. Several files must agree in their categories, and no image may be in two of them."""
    images, boxes, cases, names, listed = [], [], defaultdict(list), {}, {}
    for label in layout.labels:
        path, part = layout.root / label, part_of(Path(label).name) or part_of(os.path.dirname(label))
        data, index_of = _load(path, cases), {}
        locate = _locator(layout.root, _image_folders(layout.root, label, part))
        for place, entry, key, name in _entries(data, "images", path, id=(int, str), file_name=(str,)):
            file = locate(name)
            if key in index_of:
                raise UserError(f"{place}: the id {show(key)} stands there twice; correct one")
            if file in listed:
                raise UserError(f"{place}: {show(name)} is listed already, in {listed[file]}; remove one")
            index_of[key] = len(images) if file else None
            if not file:
                cases[MISSING].append(f"{place}: no image {show(name)} in {layout.root}")
                continue
            listed[file] = label
            stated = (entry["height"], entry["width"]) if entry.get("height") and entry.get("width") else None
            images.append((file, part == "val", stated, key))
        _read_categories(names, data, path)
        # the ids of annotations are not read: nothing refers to them, and merged files often repeat them
        fields = {"image_id": (int, str), "category_id": (int,)}
        for number, (place, entry, image, category) in enumerate(_entries(data, "annotations", path, **fields)):
            if image not in index_of:
                raise UserError(f"{place}: there is no image with the id {show(image)}; add the image, or remove its "
                                f"annotations")
            box, crowd = _corners(entry), entry.get("iscrowd") or 0
            if type(crowd) not in (int, bool):
                raise UserError(f"{place}: iscrowd is {show(crowd)}; correct it, it must be 0 or 1")
            if crowd or not box:
                cases["crowd" if crowd else NO_BOX].append(f"{label}: {layout.place.format(number)}")
            elif index_of[image] is not None:
                boxes.append((index_of[image], category, box, label, number))
    used, count = {category for _, category, *_ in boxes}, Counter(names.values())
    if not names:
        names = {key: PARKING[key - 1] if used == set(range(1, 15)) else f"class {key}" for key in used}
    # Roboflow's first category is the project, which may have the name of one of its classes
    names = {key: name for key, name in names.items() if key in used or count[name] == 1}
    return Records(images, boxes, names, cases)


def _load(path, cases):
    """The content of a JSON file, or what CVAT's or Label Studio's file holds in the same form. cases: gets notes."""
    try:
        if path.suffix.lower() == ".xml":
            return cvat.as_coco(read_xml(path, "annotations"), cases)
        data = read_json(path)
        return label_studio.as_coco(data, cases) if data and type(data) is list else data
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}: neither CVAT's XML for images nor Label Studio's JSON ({show(error)}); export it "
                        f"again, not as a video nor as JSON-MIN") from None


def _image_folders(root, label, part):
    """Where the images of a label file may lie, relative to the root, in the order in which they are looked for."""
    if label == COMPETITION:
        return ["train/images"]
    inside = [str(folder.relative_to(root)) for depth in ("*/", "*/*/") for folder in sorted(root.glob(depth))]
    # the images of instances_val2017.json are rather in val2017 than in train2017; CVAT's subsets have any name
    named = [name for name in inside if os.path.basename(name) == Path(label).stem.removeprefix("instances_")]
    usual = [name for name in inside if name.lower().startswith("images") or part_of(name)]
    return [os.path.dirname(label), "", *named, *sorted(usual, key=lambda name: part_of(name) != part)]


def _locator(root, folders):
    """-> function(file_name) -> the image's path relative to root, or None. Each folder is listed once: a look-up
    per image is slow on network disks. Names are compared by `same_name`."""
    names = functools.cache(lambda folder: {same_name(name): name for name in list_files(root / folder)})

    def locate(name):
        name = name if "/" in name else name.replace("\\", "/")  # Label Studio's on Windows
        for base in folders if name else ():
            path = os.path.relpath(os.path.join(root, base, name), root)  # `name` may be absolute
            folder, file = os.path.split(path)
            here = names(folder)
            found = here.get(same_name(file)) or here.get(same_name(UPLOADED.sub("", file)))
            if found and not path.startswith("../"):
                return os.path.join(folder, found)
        return None
    return locate


def _read_categories(names, data, path):
    """Adds the categories of a file to {id: name}."""
    here = set()
    for place, _, key, name in _entries({"categories": []} | data, "categories", path, id=(int,), name=(str,)):
        if key in here or names.setdefault(key, name) != name:
            raise UserError(f"{place}: the id {key} is another category's too; correct one of them")
        here.add(key)


def _corners(entry):
    """The bbox of an annotation, or the extent of its polygons where it has none -> (x1, y1, x2, y2) in pixels; None
    where these are not numbers."""
    polygons = entry.get("segmentation")
    try:
        if entry.get("bbox") or type(polygons) is not list:
            x, y, width, height = _numbers(entry["bbox"])
            return x, y, x + width, y + height
        points = _numbers(list(itertools.chain(*polygons)))
        return min(points[::2]), min(points[1::2]), max(points[::2]), max(points[1::2])
    except (KeyError, TypeError, ValueError, OverflowError):  # OverflowError: an integer beyond float64
        return None


def _numbers(values):
    if not {int, float}.issuperset(map(type, values)):
        raise ValueError
    return list(map(float, values))


def image_lists(folder):
    """The files in a folder, and in `annotations` in it, that list test images: the competition's and COCO's."""
    return [path for pattern in (TEST_INFORMATION, "image_info*.json", "annotations/image_info*.json")
            for path in sorted(Path(folder).glob(pattern))]


def test_ids(path):
    """{name of an image file, by `same_name`: its id} from the JSON `path`: {"images": [{"id", "file_name"}]}, or that
    list alone. Raises UserError."""
    data = read_json(path)
    data = {"images": data} if type(data) is list else data
    found = [(same_name(os.path.basename(name.replace("\\", "/"))), key)
             for _, _, key, name in _entries(data, "images", path, id=(int, str), file_name=(str,))]
    for what, values in zip(("file_name", "id"), zip(*found)):
        twice, count = Counter(values).most_common(1)[0]
        if count > 1:
            raise UserError(f"{path}: the {what} {show(twice)} stands there {count} times; correct it")
    return dict(found)


def _entries(data, key, path, **fields):
    """Yields (place for messages, entry, the values of its fields) of the list data[key]. fields: {name: types}."""
    for i, entry in enumerate(_get(data, key, (list,), path)):
        place = f"{path}: {key}[{i}]"
        yield place, entry, *(_get(entry, name, types, place) for name, types in fields.items())


def _get(entry, key, types, place):
    """entry[key], if it is of one of the types; else a UserError that names the place."""
    value = entry.get(key) if type(entry) is dict else None
    if type(value) is int and int in types:  # the usual case first, which is fast
        return value
    if int in types and type(value) in (float, str):  # 1.0 and "1" are the number 1 in some files
        with suppress(ValueError, OverflowError):
            value = int(value) if int(value) == value or str(int(value)) == value else value
    if type(value) not in types:
        what = (f"not an object with {key}" if type(entry) is not dict else
                f"{key} is {show(value)}" if key in entry else f"{key} is missing")
        raise UserError(f"{place}: {what}; correct it, it must be {' or '.join(TYPES[t] for t in types)}")
    return value
