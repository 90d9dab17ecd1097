"""Boxes in Pascal VOC's XML files, one per image.

    DATA/Annotations/*.xml   DATA/JPEGImages/*.jpg   DATA/ImageSets/Main/val.txt and test.txt, if they are there
"""
import os
from pathlib import Path
from xml.etree import ElementTree

from data import images
from data.labels.records import Layout, Records, by_stem, check_pairs, list_files, read_lines
from utils.errors import UserError
from utils.files import read_bytes, show

TEST, VAL = SETS = "ImageSets/Main/test.txt", "ImageSets/Main/val.txt"


def find(path):
    """The Layout of a folder with `Annotations` and `JPEGImages`, else None. Raises UserError for a label file without
    an image."""
    folder, label_folder = path / "JPEGImages", path / "Annotations"
    if not (os.path.isdir(folder) and os.path.isdir(label_folder)):
        return None
    files, labels = list_files(folder, *images.SUFFIXES), list_files(label_folder, ".xml")
    check_pairs(folder, files, label_folder, labels)
    sets = [name for name in SETS if os.path.exists(path / name)]
    return Layout(path, sets + [f"Annotations/{name}" for name in labels], [f"JPEGImages/{name}" for name in files],
                  read, "object {}")


def read(layout):
    """Layout -> Records. Images of test.txt are left out, images of val.txt held out. Category ids number the sorted
    class names."""
    found, boxes, label_of = [], [], by_stem(layout.labels, layout.root)
    # the first words of the lines: "000005", or "000005 -1"
    test, val = ({line.split()[0] for line in read_lines(layout.root / name) if line.strip()}
                 if name in layout.labels else set() for name in SETS)
    missing = val - {Path(file).stem for file in layout.images}
    if missing:
        raise UserError(f"{layout.root / VAL}: no image {show(min(missing))} in JPEGImages; add it, or remove the line")
    for file in layout.images:
        stem = Path(file).stem
        if stem in test:
            continue
        label = label_of.get(f"Annotations/{stem}")
        for number, (name, box) in enumerate(_objects(layout.root / label) if label else [], 1):
            boxes.append((len(found), name, box, label, number))
        found.append((file, stem in val, None))
    names = sorted({name for _, name, *_ in boxes})
    boxes = [(owner, names.index(name), *rest) for owner, name, *rest in boxes]
    return Records(found, boxes, dict(enumerate(names)))


def _objects(path):
    """A file's [(name, (x1, y1, x2, y2))] in pixels. In the file, pixels count from 1 and the box includes its last
    ones. Raises UserError."""
    data = read_bytes(path)
    # Zero bytes are removed to see the words in UTF-16 too. Labels declare no entities, and these can grow without end
    if any(word in data.replace(b"\0", b"") for word in (b"<!DOCTYPE", b"<!ENTITY")):
        raise UserError(f"{path}: declares a DOCTYPE or an ENTITY; remove the declaration")
    try:
        root = ElementTree.fromstring(data)
        if root.tag != "annotation":
            raise ValueError
    except (ElementTree.ParseError, ValueError, LookupError):  # the latter two: an encoding that is not supported
        raise UserError(f"{path}: not a valid XML file of an <annotation>; correct or replace it") from None
    found = []
    for number, item in enumerate(root.findall("object"), 1):
        try:
            name = " ".join(item.findtext("name").split())
            x1, y1, x2, y2 = (float(item.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
            if not name:
                raise ValueError
        except (AttributeError, TypeError, ValueError):  # the first two: there is no such element
            raise UserError(f"{path}: object {number}: has no name, or no bndbox with the numbers xmin, ymin, xmax, "
                            f"ymax; correct it") from None
        found.append((name, (x1 - 1, y1 - 1, x2, y2)))
    return found
