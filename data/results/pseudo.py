"""Pseudo labels (Lee 2013): predictions that the net is sure of, as labels in the layouts that training reads.

    python predict.py --task seg --tta --pseudo 0.9        # -> OUT/pseudo, for train_seg.py --extra-data OUT/pseudo

Images are linked, not copied. Pixels that the net is not sure of get a value that training ignores; an image is left
out when one of its classes is in doubt, or when it has no sure box. In an image with a sure box, all other boxes are
trained as background.
"""
import os
from pathlib import Path

import numpy as np
import torch

from data.labels import MIN_SIDE
from data.results.submissions import coco_items
from utils.files import write_csv, write_json, writing
from utils.ops import boxes

UNSURE = 255  # in masks: the pixel is not to be trained on; the files declare it as no data


def link(files, folder):
    """Links to image files, under their names, in a new or old folder."""
    with writing(folder):
        os.makedirs(folder, exist_ok=True)
        for file in files:
            os.symlink(Path(file).resolve(), Path(folder) / Path(file).name)


def sure_mask(probs, mask, least):
    """probs (B, K, H, W), mask (B, H, W) uint8 -> the mask, UNSURE where the class in it has a probability below
    `least`."""
    if probs.shape[1] == 1:  # the threshold of the mask need not be 0.5
        own = torch.where(mask.to(probs.device) > 0, probs[:, 0], 1 - probs[:, 0])
    else:
        own = probs.amax(1)
    return mask.masked_fill((own < least).cpu(), UNSURE)


def write_boxes(root, files, sizes, results, names, category_ids, least):
    """The competition's layout: ROOT/train/{images, label/Train.json}. results: per image detections (n, 6) of x1, y1,
    x2, y2, score, class, of which those with a score of at least `least` count. -> number of images, of boxes."""
    sure = [(file, size, _sound(boxes.confident(rows, least))) for file, size, rows in zip(files, sizes, results)]
    sure = [item for item in sure if len(item[2])]
    link([file for file, _, _ in sure], root / "train/images")
    items = coco_items([rows for _, _, rows in sure], range(len(sure)), category_ids)
    write_json(root / "train/label/Train.json", {
        "images": [{"id": i, "file_name": Path(file).name, "height": size[0], "width": size[1]}
                   for i, (file, size, _) in enumerate(sure)],
        "annotations": [{"id": i, "iscrowd": 0, "area": item["bbox"][2] * item["bbox"][3]} | item
                        for i, item in enumerate(items)],
        "categories": [{"id": key, "name": name} for key, name in zip(category_ids, names)]}, indent=None)
    return len(sure), len(items)


def _sound(rows):
    """Detections (n, 6) without the boxes that reading labels would drop: less than a pixel, or equal to another box
    after clipping to the image."""
    rows = rows[(boxes.sides(rows) >= MIN_SIDE).all(1)]
    _, first = np.unique(rows[:, [0, 1, 2, 3, 5]].numpy(), axis=0, return_index=True)
    return rows[np.sort(first)]


def write_classes(root, files, probs, names, single_label, least):
    """ROOT/train.csv and ROOT/train. probs (N, classes), numpy. Where an image has several classes, each must be
    present, or absent, with a probability of at least `least`; where it has one, the best must. -> number of images."""
    certain = probs.max(1) >= least if single_label else ((probs >= least) | (probs <= 1 - least)).all(1)
    kept = [(file, row) for file, row, good in zip(files, probs, certain) if good]
    link([file for file, _ in kept], root / "train")
    write_csv(root / "train.csv", ["name", *(["label"] if single_label else names)], [
        [file.name, *([names[row.argmax()]] if single_label else (row > 0.5).astype(int))] for file, row in kept])
    return len(kept)
