"""Files of results: what competitions and other programs want to read."""
import csv
import json
import math
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import rasterio
import torch
from PIL import Image
from rasterio import features

from data import det, images
from data.labels import coco
from utils.ops import boxes
from utils.pictures import detection as pictures_det, sheets
from utils.errors import UserError
from utils.files import same_name


# ---- segmentation ----
def new_mask(file, folder):
    """The mask's GeoTIFF in `folder`, open for writing, at the place on Earth of its source (if that has one)."""
    _, height, width = images.size(file)
    place = {}
    if images.kind(file) == "GTiff":
        with images.open_raster(file) as source:
            points, crs = source.gcps  # such as Sentinel-1's
            place = {"gcps": points, "crs": crs} if points else {"crs": source.crs, "transform": source.transform}
    return rasterio.open(folder / f"{file.stem}.tif", "w", driver="GTiff", dtype="uint8", count=1, height=height,
                         width=width, compress="deflate", tiled=max(height, width) > 1024, BIGTIFF="IF_SAFER", **place)


def polygons(mask, name):
    """An open mask -> GeoJSON of its classes' outlines, in the mask's coordinates, as a dict."""
    shapes = features.shapes(rasterio.band(mask, 1), transform=mask.transform)
    collection = {"type": "FeatureCollection", "name": name, "features": [
        {"type": "Feature", "geometry": shape, "properties": {"class": int(value)}}
        for shape, value in shapes if value > 0]}
    if mask.crs:  # GeoJSON's own default is WGS 84
        collection["crs"] = {"type": "name", "properties": {"name": mask.crs.to_string()}}
    return collection


def write_masks(files, sizes, out):
    """y_pred.pkl of the wildfire competition: {file name: uint8 mask (H, W)}, a pickle; without large scenes, and not
    of more than memory may hold."""
    pixels, masks = {file: math.prod(sizes[file][1:]) for file in files}, {}
    small = [file for file in files if pixels[file] <= 2**26]
    if len(small) < len(files):
        print(f"{len(files) - len(small)} scenes are too large for y_pred.pkl; their masks are in {out / 'masks'}")
    if sum(pixels[file] for file in small) > 2**32:
        print(f"no y_pred.pkl: it would hold more than 2^32 pixels; the masks are in {out / 'masks'}")
        return
    for file in small:
        with rasterio.open(out / "masks" / f"{file.stem}.tif", driver="GTiff") as mask:
            masks[file.name] = mask.read(1)
    with open(out / "y_pred.pkl", "wb") as file:
        pickle.dump(masks, file)


def draw_mask(file, out, bands, *, overlay, outlines):
    """Overlay picture and polygons from a written mask, into folders of these names."""
    with rasterio.open(out / "masks" / f"{file.stem}.tif", driver="GTiff") as mask:
        if overlay:
            reduced = det.reduced(mask.shape, 1024)
            rgb = sheets.to_rgb(images.read(file, bands, shape=reduced))
            picture = sheets.overlay(rgb, mask.read(1, out_shape=reduced))
            Image.fromarray(picture).save(out / "overlays" / f"{file.stem}.png")
        if outlines:
            (out / "polygons" / f"{file.stem}.geojson").write_text(json.dumps(polygons(mask, file.stem)))


# ---- detection ----
def image_ids(files, near, *, others=False):
    """The competition's image ids, from Test_Images_Information.json in `near` or at most two folders above; without
    it the file's stem, as a number where it is one that no other file has.

    others: a list that knows none of the images is no error but ignored: they may be training images.
    """
    names = [same_name(file.name) for file in files]
    for folder in (near, *list(Path(near).resolve().parents)[:2]):
        known = coco.test_ids(folder)
        if known and not (others and known.keys().isdisjoint(names)):
            missing = [file for file, name in zip(files, names) if name not in known]
            if missing:
                raise UserError(f"{missing[0]}: not in {folder / coco.TEST_INFORMATION} ({len(missing)} such); add "
                                f"it there, or remove the image")
            return [known[name] for name in names]
    ids = [int(file.stem) if file.stem.isascii() and file.stem.isdigit() else file.stem for file in files]
    count = Counter(ids)
    return [key if count[key] == 1 else file.stem for key, file in zip(ids, files)]  # 7 and 007


def coco_items(results, ids, category_ids):
    """COCO's results format: [{"image_id", "category_id", "bbox": [x, y, w, h] in pixels, "score"}]."""
    return [{"image_id": image_id, "category_id": category_ids[int(label)], "bbox": [x1, y1, x2 - x1, y2 - y1],
             "score": score}
            for image_id, rows in zip(ids, results) for x1, y1, x2, y2, score, label in rows.tolist()]


def parking_items(items):
    """COCO items as the parking-lot competition took them: a tenth of a pixel, four digits of score, empty
    segmentation."""
    return [item | {"bbox": [round(v, 1) for v in item["bbox"]], "score": round(item["score"], 4), "segmentation": []}
            for item in items]


def cut(items, limit):
    """As many of the items as stay below `limit` bytes of JSON, those of highest score -> (the JSON, with the items in
    their old order; the number of items left out)."""
    texts = [json.dumps(item) for item in items]
    sizes = np.array([len(text.encode()) + 2 for text in texts])  # ", " between two of them, [ ] around all
    order = np.argsort([-item["score"] for item in items], kind="stable")
    kept = sorted(order[:int((sizes[order].cumsum() < limit).sum())])
    return "[" + ", ".join(texts[i] for i in kept) + "]", len(items) - len(kept)


def yolo_lines(rows, height, width):
    """Detections (n, 6) as text, one a line: class from 0, centre x, centre y, width, height as shares of the image's
    sides, score."""
    xywh = boxes.to_xywh(rows[:, :4].double()) / torch.tensor([width, height] * 2)
    return "".join(f"{int(label)} {x:.6f} {y:.6f} {w:.6f} {h:.6f} {score:.6f}\n"
                   for (x, y, w, h), (score, label) in zip(xywh.tolist(), rows[:, 4:].tolist()))


def draw_boxes(path, file, size, rows, names, bands, limit=1920):
    """A JPEG of the image, at most `limit` pixels a side, with its detections."""
    shape = det.reduced(size, limit)
    rgb = sheets.to_rgb(images.read_picture(file, bands, shape=shape))
    rgb = pictures_det.draw_boxes(rgb, rows[:, :4] * (max(shape) / max(size)), rows[:, 5].long(), names, rows[:, 4])
    Image.fromarray(rgb).save(path, quality=90)


# ---- classification ----
def read_probabilities(path, names=None):
    """probabilities.csv of an earlier run -> its classes, {index: their probabilities}. names: the classes that it must
    have. UserError naming the file and the row."""
    table, wrong = {}, None
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *rows = [row for row in csv.reader(file) if row]
        if header[1:] != (names or header[1:]) or len(set(header)) < len(header) or len(header) < 2:
            raise UserError(f"{path}: has other columns than the classes of the rest; give one of this task")
        for key, *values in rows:
            values = np.array([float(value) for value in values])
            if key in table or len(values) != len(header) - 1 or not ((values >= 0) & (values <= 1)).all():
                wrong = wrong or key
            table[key] = values
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        raise UserError(f"{path}: not a readable table of probabilities ({error}); give a probabilities.csv") from None
    if wrong is not None or not table:
        what = "has no rows" if wrong is None else f"the row {wrong} is damaged, or there twice"
        raise UserError(f"{path}: {what}; predict again")
    return header[1:], table


def read_tables(paths, names=None, keys=None):
    """Tables of `read_probabilities` -> their classes, the images' keys, and of each the probabilities (N, classes) in
    the order of the keys. names, keys: what they must have, they may tell of other images too; without keys all must
    tell of the same. UserError naming the file and what is missing."""
    tables, same = [], keys is None
    for path in paths:
        names, table = read_probabilities(path, names)
        tables.append(table)
    if not same or any(table.keys() != tables[0].keys() for table in tables):
        for path, table in zip(paths, tables):
            number, count = Counter(map(index_of, table)).most_common(1)[0]
            if count > 1:
                raise UserError(f"{path}: {count} rows have the number {number}; rename them, or remove all but one")
        tables = [{index_of(key): row for key, row in table.items()} for table in tables]
    keys = list(tables[0]) if same else keys
    for path, table in zip(paths, tables):
        missing = [(path, key) for key in keys if key not in table]
        missing += [(paths[0], key) for key in table if key not in tables[0]] if same else []
        if missing:
            raise UserError("{}: has no row for {}; predict the same images".format(*missing[0]))
    return names, keys, [np.array([table[key] for key in keys]) for table in tables]


def index_of(name):
    """A name as the Dirty-MNIST competition writes it: 00007 is 7."""
    return str(int(name)) if name.isdecimal() else name


def write_classes(out, keys, probs, names, exclusive, thresholds):
    """probs (N, classes) of the images `keys` -> submission.csv, of 0 and 1, and probabilities.csv in the folder `out`.
    thresholds: one, or one per class; of exclusive classes the most probable is there."""
    decided = np.eye(len(names), dtype=int)[probs.argmax(1)] if exclusive else (probs > thresholds).astype(int)
    for name, rows in {"submission.csv": decided.tolist(),
                       "probabilities.csv": [[f"{p:.6f}" for p in row] for row in probs]}.items():
        write_rows(out / name, ["index", *names], [[key, *row] for key, row in zip(keys, rows)])


def write_rows(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:  # names are any bytes
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
