"""A competition's sample submission, filled with results (predict.py --submission). It tells its shape by itself:

    classes      a column per class, of 0 and 1 or of probabilities; a row per image and class ("7.png_cat", or a class
                 column); one label, by name or number; several labels in one text; one probability of two classes
    masks        run lengths "start length start length ...", a row per image, or per image and class
    detections   a row or a JSON object each, with columns for the box; or one text per image,
                 "class score x1 y1 x2 y2 ..." or "score x y width height ..."

A sample is a CSV, a JSON list of objects, or a JSON object {image: value}. Boxes are in pixels, or in shares of the
image's sides where the sample's first box is; a text of no class stands for an image without detections. Columns that
are not understood, rows without an image and rows of images that cannot be read keep the sample's own values.
"""
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data import images
from data.results.submissions import keys_of
from utils.errors import UserError
from utils.files import finder, read_bytes, read_csv, read_json, show, write_csv, write_json
from utils.ops.boxes import sides
from utils.train import dist

ROLES = {"class": "class classid classname category categoryid categoryname label labelid labelname",
         "score": "score confidence conf probability prob", "bbox": "bbox",
         "x1": "x1 xmin left x", "y1": "y1 ymin top y",
         "x2": "x2 xmax right", "y2": "y2 ymax bottom", "w": "w width", "h": "h height"}
TEXTS = ("class score x1 y1 x2 y2".split(), "score x1 y1 w h".split())  # of a detection


class Sample(NamedTuple):
    """places: (row as {column: value}, image file or None, class index or None); lost: {key: message} of the rows
    without an image; fill: function(result, class index, image file) -> [{column: value}], of one row, or of all
    detections of the image."""
    path: Path
    places: list
    lost: dict
    fill: Any


def read(path, files, ids, *, task, **options):
    """-> Sample. Rank 0 prints what is understood; UserError where nothing is.

    files, ids: the images and their ids. task: "seg", "det" or "cls". options: the lists `names` and `numbers` describe
    the classes in the net's order (no names: []); `rle` is one of `flags.RUNS`, or None: what the sample says, else
    the first.
    """
    try:
        return _read(Path(path), files, ids, SHAPES[task], **options)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        seen = show(read_bytes(path)[:150].decode(errors="replace"))
        raise UserError(f"{path}: begins with {seen}, which is not understood for --task {task} ({error}); compare it "
                        f"with the images, the classes, and the shapes in docs/data.md") from None


def _read(path, files, ids, shape, *, names, numbers, rle):
    if path.suffix == ".json":
        rows = read_json(path)
        if isinstance(rows, dict):
            rows = [{"image": name, "value": value} for name, value in rows.items()]
    else:
        header, *lines = filter(None, read_csv(path))
        rows = [dict(zip(header, line, strict=True)) for line in lines]
    columns = {name: [str(row[name]).strip() for row in rows] for name in rows[0]}
    key = min(columns, key=lambda name: name in names or not name.lower().startswith(("image", "img", "file")))
    keys, owners = columns.pop(key), [None] * len(rows)
    if shape != boxes and len({*keys}) < len(rows):  # a row per image and class
        [owner] = [name for name in columns if role_of(name) == "class"]
        owners = columns.pop(owner)
    found = match(keys, files, ids)
    if not any(found.values()):  # "7.png_cat"
        keys, _, owners = zip(*(text.rpartition("_") for text in keys))
        found = match(keys, files, ids)
    if not any(found.values()):
        raise ValueError(f"no row is of {files[0]} or another image")
    known = {text: k for texts in (map(str, numbers), names) for k, text in enumerate(texts)} | {None: None}
    understood, fill = shape(columns, known, names, numbers, any(owners), rle)
    places = [(row, found[text], known[owner]) for row, text, owner in zip(rows, keys, owners)]
    if shape == boxes and len(columns) > 1:  # a row per detection: an image's rows are written where its first one is
        places = list({place[1] or i: place for i, place in enumerate(places)}.values())
        if path.suffix == ".json":  # it is an example, which does not list the images
            listed = {*found.values()}
            places += [(rows[0] | {key: name}, file, None) for name, file in zip(ids, files) if file not in listed]
    dist.print0(f"submission: {len(rows):,} rows, {understood}")
    lost = {text: f"{path}: there is no image {show(text)}" for text, file in found.items() if not file}
    return Sample(path, places, lost, fill)


def write(sample, out, results):
    """Writes the filled sample into the folder `out`, under its own name. results: {file: what `fill` takes}."""
    path, places, _, fill = sample
    rows = [row | values for row, file, k in places
            for values in (fill(results[file], k, file) if file in results else [{}])]
    if path.suffix == ".json":
        write_json(out / path.name, dict(map(dict.values, rows)) if isinstance(read_json(path), dict) else rows,
                   indent=None)
    else:
        write_csv(out / path.name, places[0][0], map(dict.values, rows))


def match(keys, files, ids):
    """{key: its image file, or None}. Keys are ids, or names with or without folders and suffix; or numbers with and
    without zeros at the start, where no other key and no other file has this number."""
    keys = list(dict.fromkeys(keys))
    exact, find = dict(zip(map(str, ids), files)), finder(dict(zip(map(str, files), files)))
    numbered = dict(zip(keys_of([file.stem for file in files]), files))
    return {key: exact.get(key) or find(key) or numbered.get(number)
            for key, number in zip(keys, keys_of([Path(key).stem if images.is_image(key) else key for key in keys]))}


def role_of(column):
    """Which of ROLES a column has by its name, or None."""
    return next((role for role, words in ROLES.items() if column.lower().replace("_", "") in words.split()), None)


# ---- shapes: each returns what the user is told, and Sample.fill. ValueError: the sample has another shape -----------
def classes(columns, known, names, numbers, each, rle):
    """A column, or a row, per class; or labels. A result is (0 or 1 (K,), probabilities (K,)), of numpy."""
    found = {name: known[name] for name in columns if name in known}
    texts = [text for name in found or columns for text in columns[name]]
    exact = any(re.fullmatch(r"\d*\.\d+", text) for text in texts)
    if not found and (each or exact and len(names) == 2):  # of two classes, the last one's
        found = dict.fromkeys(columns, len(names) - 1)
    if found:
        return f"classes with {'probabilities' if exact else '0 and 1'}", lambda result, k, _: [
            {name: round(result[exact][own if k is None else k].item(), 6) for name, own in found.items()}]
    if len(columns) > 1:
        raise ValueError("no column has the name of a class")
    mark = next((mark for mark in "|;," if mark in "".join(texts)), " ")
    labels = naming([text.strip("[' ]") for text in mark.join(texts).split(mark)], names, numbers)

    def fill(result, *_):
        present = [labels[k] for k in result[0].nonzero()[0]]
        if "[" not in texts[0]:  # a single number stays a number in JSON
            present = present[0] if len(present) == 1 else mark.join(map(str, present))
        return [dict.fromkeys(columns, present)]
    return f"labels such as {labels[0]}, several joined by {mark!r}", fill


def naming(texts, names, numbers):
    """Labels of a sample -> what it calls the classes in the net's order: names or numbers."""
    return numbers if {*texts} - {*names} and all(map(str.isdecimal, texts)) else names


def runs(columns, known, names, numbers, each, rle):
    """Run lengths in the last column. A result is the file of a mask."""
    *_, (name, texts) = columns.items()
    empty = next((text for text in texts if not sum(map(int, re.findall(r" (\d+)", text)))), "")
    rle = rle or ("column,0" if any(re.match("0 [1-9]", text) for text in texts) else "column,1")

    def fill(file, k, _):
        mask = images.read(file)[0].numpy()
        line = np.pad((mask > 0 if k is None else mask == k + 1).ravel("F" if rle.startswith("column") else "C"), 1)
        found = np.flatnonzero(line[1:] != line[:-1])  # start, end, start, end ...
        found[1::2] -= found[::2]
        found[::2] += int(rle[-1])
        return [{name: " ".join(map(str, found)) or empty}]
    return f"run lengths {rle}, empty masks {empty!r}", fill


def boxes(columns, known, names, numbers, each, rle):
    """Detections, as rows or as a text per image. A result is rows (n, 6) of x1, y1, x2, y2, score, class, of numpy."""
    roles, example = list(map(role_of, columns)), [texts[0] for texts in columns.values()]
    if len(columns) == 1:
        example = next(filter(None, map(str.split, *columns.values())), [])
        roles = TEXTS[len(example) % 6 > 0]
    elif not {"bbox", "x1"} & {*roles}:
        raise ValueError("no column is of a box")
    told = [text for role, text in zip(roles, example) if role == "class"]
    labels, empty = naming(told, names, numbers), "" if {*told} <= {*known} else " ".join(example)
    places = [float(number) for role, text in zip(roles, example) if role not in ("class", "score", None)
              for number in re.findall(r"[\d.]+", text)]
    shares = any(0 < number < 1 for number in places) and max(places) <= 1

    def fill(result, _, file):
        height, width = images.size(file)[1:] if shares else (1, 1)
        table = np.c_[result, sides(result)] / (width, height, width, height, 1, 1, width, height)
        items = [{"x1": x1, "y1": y1, "x2": x2, "y2": y2, "w": w, "h": h, "bbox": [x1, y1, w, h], "score": score,
                  "class": labels[int(k)]} for x1, y1, x2, y2, score, k, w, h in table.round(6).tolist()]
        if len(columns) == 1:
            return [dict.fromkeys(columns, " ".join(str(item[role]) for item in items for role in roles) or empty)]
        return [{name: item[role] for name, role in zip(columns, roles) if role} for item in items]
    return f"detections of classes such as {labels[0]}, in {'shares of the image' if shares else 'pixels'}" + \
        f", {empty!r} without any" * (len(columns) == 1), fill


SHAPES = {"cls": classes, "seg": runs, "det": boxes}
