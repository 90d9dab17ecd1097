"""Predictions as labels (Lee 2013, "Pseudo-Label"): what a net is sure of, in the layouts that training reads.

    python predict.py --task seg --tta --pseudo 0.9        # -> OUT/pseudo, for train_seg.py --extra-data OUT/pseudo

Images are linked, not copied. Pixels that the net is not sure of get a value to be ignored, images with any class in
doubt are left out. So are images without a sure box; in one with a sure box, all others are taught as background.
"""
import json
import os
from pathlib import Path

import numpy as np
import torch

from data.labels import MIN_SIDE
from data.results.submissions import write_rows


def unsure(classes, ignore):
    """The value of pixels that are not taught: what the training ignores, else one that no mask of its data has; 255 is
    an object in binary masks of 0 and 255, which --ignore 255 would take out of all of them."""
    return ignore if ignore is not None else 254 if classes < 255 else 255


def sure_mask(probs, mask, least, unsure):
    """probs (B, K, H, W), mask (B, H, W) uint8 -> the mask, `unsure` where its own class has a probability below
    `least`."""
    if probs.shape[1] == 1:  # of the class in the mask, whose threshold need not be 0.5
        own = torch.where(mask.to(probs.device) > 0, probs[:, 0], 1 - probs[:, 0])
    else:
        own = probs.amax(1)
    return mask.masked_fill((own < least).cpu(), unsure)


def link(files, folder):
    """Links to image files, under their names, in a new or old folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        os.symlink(Path(file).resolve(), folder / Path(file).name)


def write_boxes(root, files, sizes, results, names, category_ids, least):
    """The competition's layout: ROOT/train/{images, label/Train.json}. results: per image detections (n, 6) of x1, y1,
    x2, y2, score, class, of which those with a score of at least `least` count. -> number of images, of boxes."""
    sure = [(file, size, _sound(rows[rows[:, 4] >= least])) for file, size, rows in zip(files, sizes, results)]
    sure = [item for item in sure if len(item[2])]
    link([file for file, _, _ in sure], root / "train/images")
    annotations = [{"image_id": i, "category_id": category_ids[int(label)], "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
                   for i, (_, _, rows) in enumerate(sure) for x1, y1, x2, y2, _, label in rows.tolist()]
    (root / "train/label").mkdir()
    (root / "train/label/Train.json").write_text(json.dumps({
        "images": [{"id": i, "file_name": Path(file).name, "height": size[0], "width": size[1]}
                   for i, (file, size, _) in enumerate(sure)],
        "annotations": [{"id": i} | annotation for i, annotation in enumerate(annotations)],
        "categories": [{"id": key, "name": name} for key, name in zip(category_ids, names)]}))
    return len(sure), len(annotations)


def _sound(rows):
    """Detections (n, 6) without those that reading labels would drop: less than a pixel, or, clipped to the image, the
    box of another one."""
    rows = rows[(rows[:, 2:4] - rows[:, :2] >= MIN_SIDE).all(1)]
    _, first = np.unique(rows[:, [0, 1, 2, 3, 5]].numpy(), axis=0, return_index=True)
    return rows[np.sort(first)]


def write_classes(root, files, probs, names, exclusive, least):
    """ROOT/train.csv and ROOT/train. probs (N, classes), numpy. Of several classes an image each must be there, or
    absent, with a probability of at least `least`; of exclusive ones the best. -> number of images."""
    certain = probs.max(1) >= least if exclusive else ((probs >= least) | (probs <= 1 - least)).all(1)
    kept = [(file, row) for file, row, good in zip(files, probs, certain) if good]
    link([file for file, _ in kept], root / "train")
    if exclusive:
        write_rows(root / "train.csv", ["name", "label"], [[file.name, names[row.argmax()]] for file, row in kept])
    else:
        write_rows(root / "train.csv", ["name", *names], [[file.name, *(row > 0.5).astype(int)] for file, row in kept])
    return len(kept)
