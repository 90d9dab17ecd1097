"""Boxes in the XML of CVAT, "CVAT for images 1.1", translated for coco.py."""
from data.labels import records

SIDES = ("xtl", "ytl", "xbr", "ybr")


def as_coco(root, cases):
    """The root element of an XML file -> content as `records.as_coco` gives it: boxes and polygons; other shapes have
    no box there. A tag is of the whole image, and no shape. Raises ValueError or TypeError where something is missing.
    """
    images, shapes = [], []
    for i, image in enumerate(root.iter("image")):
        images.append({"id": i, "file_name": image.get("name"), "height": int(image.get("height")),
                       "width": int(image.get("width"))})
        for shape in image.iterfind("*[@label]"):
            words = {"box": [shape.get(side, "nan") for side in SIDES], "tag": None,
                     "polygon": shape.get("points", "").replace(";", ",").split(",")}.get(shape.tag, ())
            if words is not None:
                shapes.append((i, shape.get("label"), [*map(float, words)], float(shape.get("rotation", 0))))
    return records.as_coco(images, shapes, 0.5, cases)
