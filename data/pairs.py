"""Which image belongs to which mask, for segmentation.

    DATA/train_img/train_img_17.tif    DATA/train_mask/train_mask_17.tif     (and val_img, val_mask)

Other layouts: folders that differ in words for images and masks (images/train and masks/train, val/img and val/gt), or
one folder with x_sat.jpg and x_mask.png, or a table with the columns image and mask: pairs.csv.
"""
import os
import re
from collections import defaultdict
from pathlib import Path

from data import folds, images
from utils.errors import UserError
from utils.files import by_name, list_tree, read_csv, show

IMAGE_WORDS = {"img", "image", "images", "imgs", "sat", "rgb", "photo", "photos"}
MASK_WORDS = {"mask", "masks", "msk", "label", "labels", "annotation", "annotations", "gt", "seg", "segmentation"}
TABLE = "pairs.csv"
WAY_OUT = f"or list the pairs in a {TABLE} with the columns image and mask"


def find(root):
    """A folder or a table -> rows of the first columns of `seg.Samples`. Raises UserError."""
    table = root if root.suffix.lower() == ".csv" else root / TABLE
    return _listed(table) if os.path.isfile(table) else _found(root)


def _listed(table):
    """A CSV with the columns image and mask, and group, part and weight if wanted -> rows of the first columns of
    Samples. Paths are relative to its folder; an empty mask: no object. Rows for testing are left out."""
    header, *rows = [[value.strip() for value in row] for row in read_csv(table) if row] or [[]]
    found, listed = [], set()
    for number, row in enumerate(rows, 2):
        entry = {"group": None, "part": "train", "weight": "1"} | dict(zip(header, row))
        try:
            image, mask = table.parent / entry["image"], table.parent / (entry["mask"] or entry["image"])
            part, weight = folds.PARTS[entry["part"].lower() or "train"], float(entry["weight"])
            if image in listed or not (image.is_file() and mask.is_file() and 0 < weight < 1e9) \
                    or len(row) != len(header):
                raise ValueError
        except (KeyError, ValueError, OSError):  # OSError: a name that is too long
            raise UserError(f"{table}: row {number}: {show(','.join(row))}: not a new image, its mask and, if wanted, "
                            f"group, part and weight, in the order of its first line; correct it") from None
        listed.add(image)
        if part != "test":
            found.append((entry["image"], (image, mask), part == "val", entry["group"], weight))
    if not found:
        raise UserError(f"{table}: no rows; write a first line image,mask and a row per image")
    return found


def _found(root):
    """The pairs in folders -> rows of the first columns of Samples. Words of the folders, else of the files, tell masks
    from images, and the part. Names are the images' stems. UserError for a layout that is not understood."""
    files = [] if os.path.isdir(root / "train_img") else [
        Path(file) for file in list_tree(root) if file.lower().endswith(images.SUFFIXES)]
    for place in ("parent", "name"):
        masks = {file for file in files if MASK_WORDS.intersection(_words(getattr(file, place)))}
        if masks:
            break
    sides = defaultdict(lambda: ({}, {}))
    for file in files:
        sides[folds.part_of(file.parent)][file in masks][str(file.with_suffix(""))] = root / file
    if files and not masks:
        raise UserError(f"{root}: no masks found: no folders such as train_img and train_mask, images/train and "
                        f"masks/train, and no file {files[0].stem}_mask beside {files[0]}; rename them, {WAY_OUT}")
    found = [(pair, part == "val") for part, pair_of in sides.items() if part != "test" for pair in match(*pair_of)]
    for part in () if files else ("train", "val"):
        if part == "train" or os.path.isdir(root / "val_img"):
            found += [(pair, part == "val") for pair in of_folders(root / f"{part}_img", root / f"{part}_mask")]
    names = [image.stem for (image, _), _ in found]
    if len(set(names)) < len(names):  # several folders have them
        names = [str(image.relative_to(root).with_suffix("")) for (image, _), _ in found]
    return [(name, pair, held_out, None, 1.0) for name, (pair, held_out) in zip(names, found)]


def _words(path):
    return re.findall(r"[^\W_]+", str(path).lower())


def of_folders(image_folder, mask_folder):
    """-> [(image path, mask path)] of two folders, see `match`. UserError for two files of one name too."""
    return match(*(by_name(images.find(folder), lambda file: file.stem) for folder in (image_folder, mask_folder)))


def match(image_of, mask_of):
    """{name: image path}, {name: mask path} -> [(image path, mask path)], by the first rule that pairs all: names equal
    without what all images, and all masks, have in common at start and end (numbers stay whole); names equal without
    words for images and masks. Raises UserError naming the first files without partner."""
    def without_common(names):
        several = names if len(names) > 1 else [""]
        starts = (os.path.commonprefix([name[::step] for name in several]) for step in (1, -1))
        first, last = (len(start.rstrip("0123456789")) for start in starts)
        return [name[first:len(name) - last] for name in names]

    def without_words(names):
        return [" ".join(word for word in _words(name) if word not in IMAGE_WORDS | MASK_WORDS) for name in names]

    for rule in (without_common, without_words):
        sides = [dict(zip(rule(list(side)), side.values())) for side in (image_of, mask_of)]
        if sides[0].keys() == sides[1].keys() and len(image_of) == len(mask_of) == len(sides[0]):
            return [(path, sides[1][key]) for key, path in sides[0].items()]
    lone = [path for one, other in (sides, sides[::-1]) for key, path in one.items() if key not in other]
    lone = lone or list(image_of.values())[:2]
    raise UserError(f"{lone[0]}: no file of that name on the other side (neither for {lone[-1]}); add it, or remove "
                    f"this one, {WAY_OUT}")
