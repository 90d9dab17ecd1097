"""Labels of object detection: images and their boxes, from the files as they are, checked box by box.

    competition  DATA/train/label/Train.json   DATA/train/images/*.jpg   DATA/Test_Images_Information.json
    COCO         DATA/annotations/instances_train2017.json (and val)   DATA/train2017/*.jpg; or one JSON alone
                 or as Roboflow has it, a JSON amid the images: DATA/train/_annotations.coco.json (and valid)
    YOLO         DATA/labels/train/*.txt (and val)   DATA/images/train/*.jpg   DATA/classes.txt, or data.yaml's names
                 DATA/train/labels/*.txt (and valid)   DATA/train/images/*.jpg
    VOC          DATA/Annotations/*.xml   DATA/JPEGImages/*.jpg   DATA/ImageSets/Main/val.txt
    masks        DATA/train_mask/*.tif   DATA/train_img/*.tif: see data/labels/masks.py

A box that makes no sense is left out; its image and its other boxes stay. What was left out is told, and too much of
it is an error. Reading the headers of many images takes minutes, so what was found is kept until a file changes.
"""
import fcntl
import hashlib
import json
import os
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data import images, seg
from data.labels import formats, masks
from data.labels.formats import PLACE, YAML, YOLO_NAMES, Layout, get, part_of, read_json, same_name, show, yolo_labels
from utils.train import dist
from utils.errors import UserError

VERSION = 3  # of what is kept: to be raised when this file or formats.py finds something else
TEST_INFORMATION = "Test_Images_Information.json"
LABEL_FOLDERS = ("annotations", "label", "labels")  # whose images lie beside them, not in them
# Less than a pixel is nothing to see, and the logarithms of its sides run away. 0.1 is for YOLO's rounding: with four
# decimals, one pixel of 2000 is written as 0.95 to 1.05
MIN_SIDE = 0.9
MAX_DROPPED = 0.01  # of the boxes; more is rather a misunderstanding than a slip
DROPPED = ("not finite", "unknown category", "less than a pixel inside the image", "duplicate")


class Labels(NamedTuple):
    files: list         # of images, as Path
    sizes: list         # (height, width), after EXIF rotation
    boxes: list         # float64 arrays (n, 4): x1 y1 x2 y2, pixels, inside the image
    classes: list       # int64 arrays (n,), from 0
    names: list         # of the classes
    category_ids: list  # what the label files call the classes, for submissions in COCO's format
    held_out: list      # True where the data set itself has the image for validation, and others for training


def read(path, *, allow_bad=False, cache="runs/cache"):
    """A folder (see above), a COCO-like .json or a YOLO data.yaml -> Labels. Images without boxes are in it too, as
    background.

    Boxes are clipped to the image, and left out when they are not finite, of an unknown category, less than a pixel,
    or the same as another. Rank 0 prints how many and the first, and writes the others to a text file in `cache`; more
    than 1 % are a UserError unless allow_bad. cache: folder for what was found, None for none.

    Classes are the categories that the files declare, sorted by id, else those that occur.
    """
    layout = _find(Path(path))
    key = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:16]
    store = cache and Path(cache) / f"labels-{key}.json"
    with _one_at_a_time(store):
        found = store and _load(store, layout)
        if not found:
            found = _check(layout)
            if store:
                data = json.dumps(found).encode()
                _write(store, hashlib.sha256(data).hexdigest().encode() + b"\n" + data)
    _report(path, found, store and store.with_suffix(".txt"), allow_bad)
    counts = np.cumsum(found["counts"])[:-1]
    return Labels([layout.root / file for file in found["files"]], [tuple(size) for size in found["sizes"]],
                  np.split(np.array(found["boxes"], np.float64).reshape(-1, 4), counts),
                  np.split(np.array(found["classes"], np.int64), counts),
                  found["names"], found["category_ids"], found["held_out"])


def with_names(extra, names, root):
    """Labels of other data, its classes numbered as in `names`. UserError when it has boxes of a class that is not."""
    there = sorted(set(np.concatenate(extra.classes).tolist()))
    unknown = [extra.names[k] for k in there if extra.names[k] not in names]
    if unknown:
        raise UserError(f"{root}: has boxes of {unknown[0][:80]}, which --data does not have; rename or remove them")
    number = np.array([names.index(name) if name in names else -1 for name in extra.names])
    return extra._replace(classes=[number[c] for c in extra.classes], names=names)


def test_ids(root):
    """{image file's name, by `same_name`: image id} from ROOT/Test_Images_Information.json: {"images": [{"id",
    "file_name"}]}, or that list alone. {} where there is no such file."""
    path, found = Path(root) / TEST_INFORMATION, {}
    if not os.path.lexists(path):
        return found
    data = read_json(path)
    for i, entry in enumerate(data if type(data) is list else get(data, "images", (list,), path)):
        key = get(entry, "id", (int, str), path, "images", i)
        name = get(entry, "file_name", (str,), path, "images", i).replace("\\", "/")
        name = same_name(os.path.basename(name))
        if name in found:
            raise UserError(f"{path}: images[{i}]: {show(name)} is listed twice; remove one")
        found[name] = key
    twice = [key for key, count in Counter(found.values()).items() if count > 1]
    if twice:
        raise UserError(f"{path}: the id {show(twice[0])} stands for two images; correct one")
    return found


# ---- which files -----------------------------------------------------------------------------------------------------
def _find(path):
    """-> Layout, the first that fits: competition, COCO with a training part, YOLO, VOC, masks, a JSON amid the images
    of each part, one JSON alone."""
    if os.path.isfile(path) and path.suffix.lower() == ".json":
        up = path.parent.name.lower() in LABEL_FOLDERS
        return Layout("COCO", path.parent.parent if up else path.parent,
                      [f"{path.parent.name}/{path.name}" if up else path.name], [])
    if os.path.isfile(path) and path.suffix.lower() in YAML:
        return _find_yolo(path.parent, path.name)
    if not os.path.isdir(path):  # unlike Path.is_dir, for every name
        raise UserError(f"{path}: no such folder or .json file; put the data there, or point --data to it")
    if (path / "train/label/Train.json").exists():
        return Layout("competition", path, ["train/label/Train.json"], [])
    parts = [n for n in _list(path / "annotations", ".json") if part_of(n)]
    # COCO's folder has captions and key points of the same images too
    parts = [n for n in parts if n.startswith("instances")] or parts
    if "train" in map(part_of, parts):
        return Layout("COCO", path, [f"annotations/{n}" for n in parts], [])
    if any((path / top / "images").is_dir() and (path / top / "labels").is_dir() for top in ("", "train")):
        return _find_yolo(path)
    if (path / "JPEGImages").is_dir() and (path / "Annotations").is_dir():
        return _find_voc(path)
    if (path / "train_img").is_dir() and (path / "train_mask").is_dir():
        files, mask_files = zip(*seg.pairs(path / "train_img", path / "train_mask").values())
        return Layout("masks", path, *([str(file.relative_to(path)) for file in part] for part in (mask_files, files)))
    amid = [f"{top}/{n}" for top in _list(path, "") if part_of(top) for n in _list(path / top, ".json")]
    if "train" in map(part_of, map(os.path.dirname, amid)):
        return Layout("COCO", path, amid, [])
    alone = [f"annotations/{n}" for n in _list(path / "annotations", ".json")]
    alone += [n for n in _list(path, ".json") if n != TEST_INFORMATION]
    if len(alone) == 1:
        return Layout("COCO", path, alone, [])
    if alone:
        raise UserError(f"{path}: has {len(alone)} JSON files ({alone[0]}, {alone[1]}, ...); point --data to one")
    raise UserError(f"{path}: no labels in it: neither train/label/Train.json nor annotations/*.json nor images and "
                    f"labels nor JPEGImages and Annotations nor train_img and train_mask; check the path given to "
                    f"--data")


def _list(folder, *suffixes):
    """The names in a folder with one of the suffixes, sorted; none if there is no such folder."""
    try:
        return sorted(n for n in os.listdir(folder) if n.lower().endswith(suffixes) and not n.startswith("."))
    except OSError:
        return []


def _tree(folder, *suffixes):
    """`_list` of a folder and all those in it but for testing: names relative to it."""
    found = []
    for top, folders, _ in os.walk(folder):
        folders[:] = sorted(n for n in folders if not n.startswith((".", "test")))
        found += [os.path.normpath(os.path.join(os.path.relpath(top, folder), n)) for n in _list(top, *suffixes)]
    return found


def _find_yolo(root, names=None):
    """Images in images, images/train*, images/val*, train*/images, val*/images, and in folders therein; those for
    testing have no labels. names: the file that names the classes; None: the first of YOLO_NAMES."""
    def parts(top):
        return {n for n in _list(root / top, "") if n.startswith(("train", "val")) and (root / top / n).is_dir()}

    inner, outer = sorted(parts("images") | parts("labels")), sorted(parts("."))
    folders = ["images", *(f"images/{n}" for n in inner), *(f"{n}/images" for n in outer)]
    files, labels = [], [names] if names else [name for name in YOLO_NAMES if (root / name).exists()][:1]
    for folder in folders:
        below = _list if folder == "images" and inner else _tree
        here, beside = below(root / folder, *images.SUFFIXES), yolo_labels(folder)
        texts = [n for n in below(root / beside, ".txt") if n != "classes.txt"]  # labelImg leaves that there
        _check_pairs(root / folder, here, root / beside, texts)
        files += [f"{folder}/{n}" for n in here]
        labels += [f"{beside}/{n}" for n in texts]
    return Layout("YOLO", root, labels, files)


def _find_voc(root):
    files, texts = _list(root / "JPEGImages", *images.SUFFIXES), _list(root / "Annotations", ".xml")
    _check_pairs(root / "JPEGImages", files, root / "Annotations", texts)
    lists = [n for n in ("ImageSets/Main/test.txt", "ImageSets/Main/val.txt") if (root / n).exists()]
    return Layout("VOC", root, lists + [f"Annotations/{n}" for n in texts], [f"JPEGImages/{n}" for n in files])


def _check_pairs(image_folder, files, label_folder, labels):
    """Every label file has its image, and no two images share one: else boxes would be lost, or be another image's."""
    stems, texts = (Counter(os.path.splitext(n)[0] for n in names) for names in (files, labels))
    for folder, found, what in ((image_folder, stems, "images"), (label_folder, texts, "label files")):
        for stem, count in found.most_common(1):
            if count > 1:
                raise UserError(f"{folder / stem}.*: {count} {what} of one name; rename or remove all but one")
    lone = [stem for stem in texts if stem not in stems]
    if lone:
        label = next(n for n in labels if os.path.splitext(n)[0] == lone[0])
        beside = [n for n in _list((image_folder / lone[0]).parent, "") if Path(n).stem == Path(lone[0]).name]
        remedy = f"convert {beside[0]} to PNG or JPEG" if beside else "add it"
        raise UserError(f"{label_folder / label}: no image of that name in {image_folder} ({len(lone)} such); "
                        f"{remedy}, or remove the label file")


# ---- what they hold --------------------------------------------------------------------------------------------------
def _check(layout):
    """Reads and checks everything -> dict of what JSON can hold, for the cache."""
    label_stamps = _stamps(layout.root, layout.labels)  # before reading: a file that changes meanwhile is read again
    parsed = (masks if layout.kind == "masks" else formats).parse(layout)
    if not parsed.files:
        raise UserError(f"{layout.root}: no images in its labels, or in its folders; check the path given to --data")
    image_stamps = _stamps(layout.root, parsed.files)
    with ThreadPoolExecutor(8) as pool:
        sizes = list(tqdm(pool.map(lambda file: images.size(layout.root / file)[1:], parsed.files), desc="sizes",
                          total=len(parsed.files), leave=False, disable=dist.rank() > 0))
    category_ids = sorted(parsed.names)
    for name, count in Counter(parsed.names.values()).most_common(1):
        if count > 1:  # results are kept by name
            same = [n for n in category_ids if parsed.names[n] == name]
            raise UserError(f"{layout.root / layout.labels[0]}: the categories {same[0]} and {same[1]} are both named "
                            f"{show(name)}; rename one, or give all their boxes one category")
    boxes, reasons, clipped = _clip(parsed, np.array(sizes), category_ids, normalised=layout.kind == "YOLO")
    kept = np.flatnonzero(reasons == "")
    owner, category = (np.array(values, np.int64)[kept] for values in (parsed.owner, parsed.category))
    order = np.argsort(owner, kind="stable")

    def place(i):
        label, number = parsed.places[i]
        return f"{label}: {PLACE[layout.kind].format(number)}, {parsed.files[parsed.owner[i]]}: {parsed.boxes[i]}"

    cases = {kind: [place(i) for i in np.flatnonzero(reasons == kind)] for kind in DROPPED}
    cases["clipped to the image"] = [place(i) for i in kept if clipped[i]]
    cases["crowd"] = [f"{label}: {PLACE[layout.kind].format(i)}" for label, i in parsed.crowd]
    cases["image of another size than its labels state"] = [
        f"{file}: {size[0]} x {size[1]}, not {show(stated)}"
        for file, size, stated in zip(parsed.files, sizes, parsed.stated) if stated not in (None, tuple(size))]
    held_out = parsed.held_out if not all(parsed.held_out) else [False] * len(parsed.files)
    return {"version": VERSION, "labels": layout.labels, "images": layout.images, "label_stamps": label_stamps,
            "image_stamps": image_stamps, "files": parsed.files, "sizes": sizes, "held_out": held_out,
            "counts": np.bincount(owner, minlength=len(sizes)).tolist(), "boxes": boxes[kept[order]].tolist(),
            "classes": np.searchsorted(category_ids, category[order]).tolist(), "category_ids": category_ids,
            "names": [parsed.names[n] for n in category_ids], "cases": cases, "total": len(parsed.boxes)}


def _clip(parsed, sizes, category_ids, *, normalised):
    """-> boxes (n, 4) clipped to their images; per box the reason to drop it, or ""; whether more than a pixel of it
    was outside, which is more than rounding."""
    owner, category = np.array(parsed.owner, np.int64), np.array(parsed.category, np.int64)
    boxes = np.array(parsed.boxes, np.float64).reshape(-1, 4)
    limit = sizes[owner][:, [1, 0, 1, 0]]
    with np.errstate(over="ignore", invalid="ignore"):
        if normalised:
            centre, half = boxes[:, :2], boxes[:, 2:] / 2
            boxes = np.concatenate((centre - half, centre + half), 1) * limit
        inside = np.clip(boxes, 0, limit)
        side = (inside[:, 2:] - inside[:, :2]).min(1)
        beyond = abs(inside - boxes).max(1) > 1
    reasons = np.select([~np.isfinite(boxes).all(1), ~np.isin(category, category_ids), side < MIN_SIDE],
                        DROPPED[:3], default="").astype(object)
    left = np.flatnonzero(reasons == "")
    rows = np.column_stack((owner, category, inside))[left]
    first = np.unique(rows, axis=0, return_index=True)[1]
    reasons[np.delete(left, first)] = "duplicate"
    return inside, reasons, beyond


def _report(path, found, file, allow_bad):
    """Prints a line per kind on rank 0, writes all cases; raises UserError when nothing is left, or too little."""
    cases = {kind: places for kind, places in found["cases"].items() if places}
    dropped = sum(len(cases.get(kind, ())) for kind in DROPPED)
    lines = [f"{kind}{' (dropped)' if kind in DROPPED else ''}: {place}\n" for kind in cases for place in cases[kind]]
    written = file and cases and (dist.rank() > 0 or _write(file, "".join(lines).encode(errors="backslashreplace")))
    see = f"; all in {file}" if written else ""
    for kind, places in cases.items() if dist.rank() == 0 else ():
        what = "left out" if kind in (*DROPPED, "crowd") else "found"
        line = f"{path}: {kind}: {len(places)} {what}, first {places[0]}{see}"
        print(line.encode(errors="backslashreplace").decode())
    if dropped > MAX_DROPPED * found["total"] and not allow_bad:
        counts = ", ".join(f"{len(cases[kind])} {kind}" for kind in DROPPED if kind in cases)
        raise UserError(f"{path}: {dropped} of {found['total']} boxes cannot be used ({counts}{see}); correct them, or "
                        f"go on without them by --allow-bad-labels")
    if not found["boxes"]:
        raise UserError(f"{path}: no boxes in the labels of {len(found['files'])} images, so nothing to learn; check "
                        f"the labels")


# ---- what is kept ----------------------------------------------------------------------------------------------------
@contextmanager
def _one_at_a_time(store):
    """One process reads the labels; the others, also of other runs, then find them. Where files cannot be written or
    locked, every process reads for itself."""
    lock = None
    try:
        if store:
            store.parent.mkdir(parents=True, exist_ok=True)
            lock = open(store.with_suffix(".lock"), "w")
            fcntl.lockf(lock, fcntl.LOCK_EX)
    except OSError:
        pass
    try:
        yield
    finally:
        if lock:
            lock.close()


def _load(store, layout):
    """What _check found earlier; None where it was never kept, is damaged, or where a file has changed since."""
    try:
        digest, data = store.read_bytes().split(b"\n", 1)
        if hashlib.sha256(data).hexdigest().encode() != digest:
            return None
        found = json.loads(data)
        if (found["version"] == VERSION and found["labels"] == layout.labels and found["images"] == layout.images
                and found["label_stamps"] == _stamps(layout.root, layout.labels)
                and found["image_stamps"] == _stamps(layout.root, found["files"])):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _stamps(root, files):
    def stamp(path):
        try:
            found = os.stat(path)
            return [found.st_size, found.st_mtime_ns]
        except OSError:  # which its reader will tell
            return None
    return [stamp(os.path.join(root, file)) for file in files]


def _write(path, data):
    """Whole or not at all. -> whether it could be written."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
        return True
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        return False
