"""Boxes in the JSON of Label Studio, a list of tasks, translated for coco.py."""
import posixpath
from urllib.parse import unquote

from data.labels import records

SIDES = {"x": "width", "y": "height", "width": "width", "height": "height"}  # value: the side that it is a percentage of


def as_coco(tasks, cases):
    """A list of tasks -> content as `records.as_coco` gives it: rectangles; other regions have no box there.
    Annotations that were cancelled do not count. Raises TypeError, LookupError or AttributeError where something is
    missing."""
    images, shapes = [], []
    for i, task in enumerate(tasks):
        address = task["data"]["image"]  # http://..., /data/upload/1/NAME, /data/local-files/?d=FOLDER/NAME
        images.append({"id": i, "file_name": unquote(address.partition("?d=")[2] or posixpath.basename(address))})
        for region in (region for entry in task["annotations"] if not entry.get("was_cancelled")
                       for region in entry["result"] if region["type"].endswith("labels")):  # not relations, texts
            value, points = region["value"], []
            if region["type"] == "rectanglelabels":
                images[i] |= {side: region[f"original_{side}"] for side in ("width", "height")}
                x, y, width, height = (value[key] * images[i][side] / 100 for key, side in SIDES.items())
                points = [x, y, x + width, y + height]
            shapes.append((i, str(value[region["type"]][0]), points, value.get("rotation")))
    return records.as_coco(images, shapes, 0, cases)
