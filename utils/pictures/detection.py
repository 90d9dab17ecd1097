"""Pictures of detection: boxes on images, drawn by torchvision.

Boxes are x1 y1 x2 y2 in pixels; they and the images are tensors (any device) or numpy arrays. Classes count from 0,
class k has the colour PALETTE[k] (cyclic).
"""
import unicodedata

import numpy as np
import torch

from utils.ops.boxes import clip, confident, sides
from utils.pictures.sheets import PALETTE, abreast, contact_sheet, fit, to_numpy, to_rgb

MOST = 20  # classes in a legend


def class_name(names, k):
    """The name of class k in one line of ASCII, all that Pillow's own font has: accents are dropped, and a name in
    another script is replaced by the number of the class."""
    text = unicodedata.normalize("NFKD", " ".join(str(names[k]).split())) if 0 <= k < len(names) else ""
    text = "".join(c for c in text if not unicodedata.combining(c))
    return text if text and text.isascii() else f"class {k}"


def colour_of(k):
    return tuple(PALETTE[int(k) % len(PALETTE)].tolist())


def draw_boxes(rgb, rows, names, zoom=1):
    """Draws boxes and their tags (name, score) into a copy of a picture, which is an image scaled by `zoom`.

    rgb: uint8 (H, W, 3); rows, in pixels of the image: ground truth (n, 5) of x1 y1 x2 y2 class, or detections (n, 6)
    of x1 y1 x2 y2 score class -> uint8 (H, W, 3).
    Boxes are cut at the picture's edge; boxes beyond it, inverted ones and NaN are not drawn. Higher scores (without
    scores: later boxes) are drawn over lower ones.
    """
    from torchvision.utils import draw_bounding_boxes  # its import takes long

    rows, (height, width) = torch.as_tensor(to_numpy(rows)), rgb.shape[:2]
    scored = rows.shape[1] == 6
    if scored:
        rows = rows[rows[:, 4].argsort(stable=True)]
    corners = clip(rows[:, :4] * zoom, height, width)
    shown = (sides(corners) > 0).all(1)
    rows, low, high = rows[shown], *corners[shown].round().split(2, 1)
    if not len(rows):
        return rgb.copy()
    corners = clip(torch.cat([low, torch.maximum(high - 1, low)], 1), height - 1, width - 1)
    tags = [class_name(names, int(row[-1])) + (f" {row[4]:.2f}" if scored else "") for row in rows]
    colours = [*map(colour_of, rows[:, -1])]
    picture = draw_bounding_boxes(torch.from_numpy(rgb).permute(2, 0, 1), corners, tags, colours, fill_labels=True,
                                  width=round(max(height, width) / 400 + 0.5), label_colors=[
                                      "black" if np.dot(colour, (0.299, 0.587, 0.114)) > 110 else "white" for colour in colours])
    return picture.permute(1, 2, 0).contiguous().numpy()


def detection_sheet(path, images, gt_boxes, predictions=None, *, names, limit=8, score=0.25, max_side=400):
    """Writes a grid of images with their ground-truth boxes, or with predictions pairs of truth | prediction.

    images: B of (C, H, W). gt_boxes: B of (m, 5) x1 y1 x2 y2 class. predictions: B of (n, 6) x1 y1 x2 y2 score class,
    of which those below `score` are not drawn. names: of all classes.
    Boxes are drawn after the images have been scaled to max_side. At most `limit` images are drawn.
    """
    groups = []
    for i, image in enumerate(images[:limit]):
        rgb = to_rgb(image)
        picture = fit(rgb, max_side)
        shown = [gt_boxes[i]] if predictions is None else [gt_boxes[i], confident(predictions[i], score)]
        groups.append([draw_boxes(picture, rows, names, max(picture.shape) / max(rgb.shape)) for rows in shown])
    legend = {class_name(names, k): colour_of(k) for k in range(len(names))} if len(names) <= MOST else None
    titles = () if predictions is None else ["truth", f"prediction, score >= {score:g}"]
    contact_sheet(path, abreast(groups), titles=titles, legend=legend, max_side=max_side)
