"""Boxes in Pascal VOC's XML files, one per image.

    DATA/Annotations/*.xml   DATA/JPEGImages/*.jpg   DATA/ImageSets/Main/{train,val,test}.txt, if they are there
    DATA/train/*.{xml,jpg}, DATA/{images,annotations}/... and other folders that `records.pair` understands
"""
from data.labels.records import Layout, Records, list_entries, pair, read_xml
from utils.errors import UserError

LABEL_FOLDERS = {"annotations", "annotation", "labels", "label", "xmls", "xml"}


def find(path):
    """The Layout of a folder with XML files, one per image, else None. Raises UserError for a label file without an
    image."""
    entries = list_entries(path, "ImageSets/Main", ".")
    found, cases = pair(path, ".xml", LABEL_FOLDERS, entries)
    labels = sorted(label for label, _ in found.values() if label)
    files = [entry for _, entry, _ in entries] + labels
    return Layout(path, files, found, read, "object {}", cases) if labels else None


def read(layout):
    """Layout -> Records. Category ids number the sorted class names."""
    found, boxes = [], []
    for owner, (file, (label, part)) in enumerate(layout.images.items()):
        size, objects = _objects(layout.root / label) if label else (None, [])
        found.append((file, part == "val", size))
        boxes += [(owner, name, box, label, number) for number, (name, box) in enumerate(objects, 1)]
    names = sorted({name for _, name, *_ in boxes})
    boxes = [(owner, names.index(name), *rest) for owner, name, *rest in boxes]
    return Records(found, boxes, dict(enumerate(names)))


def _objects(path):
    """-> (height, width) as a file states it or None, [(name, (x1, y1, x2, y2))] in pixels. In the file, pixels count
    from 1 and the box includes its last ones. Raises UserError."""
    root, found = read_xml(path, "annotation"), []
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
    size = [root.findtext(f"size/{side}", "").strip() for side in ("height", "width")]
    return tuple(map(int, size)) if all(side.isdecimal() and int(side) for side in size) else None, found
