"""What competitions and other programs read: detections as text and JSON, class probabilities as tables."""
import itertools
import json
import os
from collections import Counter

import numpy as np
import torch
from PIL import Image

from data import bad, images, labels
from data.labels import coco
from utils.errors import UserError
from utils.files import same_name, write_csv, write_json_list, write_text
from utils.ops import boxes
from utils.pictures import detection as pictures_det, sheets
from utils.train import dist

SHORTEST = 96  # bytes of the JSON of `parking_items`, at least


# ---- detection -------------------------------------------------------------------------------------------------------
def image_ids(files, *, others=False, listed=None, data=None):
    """The competition's image ids: from the first JSON file that lists all images, or from their names.

    These are `listed`; else the lists of test images (`coco.image_lists`) beside the first image or at most two folders
    above, and the labels of the training data `data`, of its own images. UserError for a list that lacks some images.
    Without a list the ids are `keys_of` the files' stems.

    others: a list that has none of the images is ignored instead of refused: they may be training images.
    """
    folder = files[0].parent
    folders = (folder, *list(folder.resolve().parents)[:2])
    paths = [listed] if listed else itertools.chain(*map(coco.image_lists, folders))
    tables = [(path, known) for path in paths if (known := coco.test_ids(path)) or listed]
    tables.append((None, data and not listed and bad.attempt(labels.image_ids, data, files[0])[0] or {}))
    found = [(path, [known.get(os.path.abspath(file), known.get(same_name(file.name))) for file in files])
             for path, known in tables]
    path, ids = min(found, key=lambda item: item[1].count(None))
    missing = [file for file, key in zip(files, ids) if key is None]
    if path and missing and (listed or not others or len(missing) < len(files)):
        raise UserError(f"{missing[0]}: not in {path} ({len(missing)} in total); add it there, or remove the image")
    return keys_of([file.stem for file in files]) if missing else ids


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


def likely(results, count):
    """Of detections (n, 6) per image the `count` of highest score, in four digits, over all images; of equal ones the
    first. What cannot be in the submission is not made into items, which take fifty times the memory."""
    scores = np.array([round(score, 4) for rows in results for score in rows[:, 4].tolist()])
    kept = np.zeros(len(scores), bool)
    kept[np.argsort(-scores, kind="stable")[:count]] = True
    parts = np.split(kept, np.cumsum([len(rows) for rows in results])[:-1])
    return [rows[torch.from_numpy(part)] for rows, part in zip(results, parts)]


def cut(items, limit):
    """The items of highest score that stay below `limit` bytes of JSON -> (the JSON, with the items in their old order;
    the number of items left out)."""
    texts = [json.dumps(item) for item in items]
    sizes = np.array([len(text) + 2 for text in texts])  # ", " between two of them, [ ] around all
    order = np.argsort([-item["score"] for item in items], kind="stable")
    kept = sorted(order[:int((sizes[order].cumsum() < limit).sum())])
    return "[" + ", ".join(texts[i] for i in kept) + "]", len(items) - len(kept)


def yolo_lines(rows, height, width):
    """Detections (n, 6) as text, one a line: class from 0, centre x, centre y, width, height as shares of the image's
    sides, score."""
    xywh = boxes.to_xywh(rows[:, :4].double()) / torch.tensor([width, height] * 2)
    table = torch.cat((rows[:, 5:], xywh, rows[:, 4:5]), 1)
    return "%d %.6f %.6f %.6f %.6f %.6f\n" * len(table) % tuple(table.flatten().tolist())


def write_boxes(out, files, sizes, results, *, ids, category_ids, max_mb):
    """Writes OUT/labels/NAME.txt (`yolo_lines`), OUT/coco.json (`coco_items`), and OUT/submission.json (`parking_items`
    of less than max_mb 10^6 bytes) -> the number of detections that are left out of the latter.

    sizes: (height, width) per file; results: detections (n, 6) of x1, y1, x2, y2, score, class per file; ids: of
    `image_ids`. Every rank writes its share of the text files, and rank 0 the rest.
    """
    for file, size, rows in _share(files, sizes, results):
        write_text(out / "labels" / f"{file.stem}.txt", yolo_lines(rows, *size))
    best = likely(results, int(max_mb * 1e6 / SHORTEST))
    submission, dropped = cut(parking_items(coco_items(best, ids, category_ids)), max_mb * 1e6)
    if dist.is_main():
        write_json_list(out / "coco.json", (coco_items([rows], [key], category_ids) for rows, key in zip(results, ids)))
        write_text(out / "submission.json", submission)
    return dropped + sum(map(len, results)) - sum(map(len, best))


def draw_boxes(folder, files, results, *, names, bands, threshold):
    """Writes FOLDER/NAME.jpg: the images, at most 1920 pixels a side, with their detections of at least this score.
    Every rank draws its share."""
    for file, rows in _share(files, results):
        image, zoom = images.thumbnail(file, bands, 1920)
        rgb = pictures_det.draw_boxes(sheets.to_rgb(image), boxes.confident(rows, threshold), names, zoom)
        sheets.save_image(folder / f"{file.stem}.jpg", Image.fromarray(rgb), quality=90)


def _share(*columns):
    """This rank's rows of the columns."""
    return list(zip(*columns))[dist.rank()::dist.world_size()]


# ---- classification --------------------------------------------------------------------------------------------------
def keys_of(names):
    """Names of images as competitions write them: 00007 is the number 7, if no other of the names is this number."""
    numbers = [int(name) if name.isascii() and name.isdigit() else name for name in names]
    count = Counter(numbers)
    return [number if count[number] == 1 else name for name, number in zip(names, numbers)]


def decide(probs, single_label, thresholds):
    """Probabilities (N, classes) -> 0 or 1. thresholds: one, or one per class; of exclusive classes the most probable
    is there."""
    return np.eye(probs.shape[1], dtype=int)[probs.argmax(1)] if single_label else (probs > thresholds).astype(int)


def write_classes(out, keys, names, decided, probs):
    """Writes submission.csv, of `decided` (N, classes) of 0 and 1, and probabilities.csv, of `probs` (N, classes), into
    the folder `out`. keys: the images' names in them."""
    for name, rows in {"submission.csv": decided.tolist(),
                       "probabilities.csv": [[f"{p:.6f}" for p in row] for row in probs]}.items():
        write_csv(out / name, ["index", *names], [[key, *row] for key, row in zip(keys, rows)])
