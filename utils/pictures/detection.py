"""Pictures of detection: boxes on images, drawn with Pillow and numpy only.

Boxes are x1 y1 x2 y2 in pixels; they and the images are tensors (any device) or numpy arrays. Classes count from 0,
class k has the colour PALETTE[k] (cyclic).
"""
import math
import unicodedata

import numpy as np
from PIL import Image, ImageDraw

from utils.ops.boxes import confident
from utils.pictures.sheets import INK, PALETTE, abreast, contact_sheet, fit, font, text_line, to_numpy, to_rgb

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
    scores: later boxes) are drawn over lower ones and choose the place of their tag first: above the box, inside,
    below. Tags never overlap each other; in a crowd, where they would hide the picture, the rest has only its colour.
    """
    picture, (height, width) = Image.fromarray(rgb), rgb.shape[:2]
    draw, line = ImageDraw.Draw(picture), round(max(height, width) / 400 + 0.5)
    rows, edge, tags = to_numpy(rows), (width, height), []
    scored = rows.shape[1] == 6
    for row in rows[rows[:, 4].argsort(kind="stable")] if scored else rows:
        low, high, k = row[:2] * zoom, row[2:4] * zoom, int(row[-1])
        if not ((low < edge) & (high > 0) & (low <= high)).all():
            continue
        corner = np.minimum(low.clip(0).round(), np.subtract(edge, 1))
        opposite = np.maximum(np.minimum(high, edge).round() - 1, corner)
        draw.rectangle([*corner, *opposite], outline=colour_of(k), width=line)
        text = class_name(names, k) + (f" {row[4]:.2f}" if scored else "")
        tags.append((*map(int, (*corner, opposite[1])), text, colour_of(k)))
    _draw_tags(draw, tags[::-1], width, height)
    return np.array(picture)


def _draw_tags(draw, tags, width, height):
    """tags: (left, top, bottom of the box, text, colour), the most important first."""
    size = max(10, round(max(width, height) / 70 + 5))
    tall, taken = size + 2, np.zeros((height, width), bool)
    for left, top, bottom, text, colour in tags:
        if taken.mean() > 0.15:
            break
        wide = min(math.ceil(draw.textlength(text, font(size))) + 6, width)
        x = min(left, width - wide)
        for y in (top - tall, top, bottom + 1, bottom + 1 - tall):
            if not 0 <= y <= height - tall or taken[y:y + tall, x:x + wide].any():
                continue
            taken[y:y + tall, x:x + wide] = True
            draw.rectangle([x, y, x + wide - 1, y + tall - 1], colour)
            text_line(draw, (x + 3, y + tall / 2), text, size=size, width=wide - 5,
                      fill=INK if np.dot(colour, (0.299, 0.587, 0.114)) > 110 else "white")
            break


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
