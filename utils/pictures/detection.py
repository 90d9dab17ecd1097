"""Pictures of detection, drawn with Pillow and numpy only: boxes on images, precision-recall curves, the confusion
matrix, and what the labels of a data set are like.

Boxes are x1 y1 x2 y2 in pixels; they and the images are tensors (any device) or numpy arrays. Classes count from 0,
class k has the colour PALETTE[k] (cyclic). Every file is written whole or not at all.
"""
import math
import unicodedata

import numpy as np
import torch
from PIL import Image, ImageDraw

from utils.files import whole_file
from utils.pictures.sheets import FAINT, INK, PALETTE, contact_sheet, font, text_line, to_rgb
from utils.pictures.charts import BEST, FINE, GRID, LINE

MOST = 20  # lines in one plot, swatches in one legend


def _array(values, columns=None):
    """Tensor, array or list -> float64 array, of `columns` columns if given."""
    values = values.detach().cpu().double() if isinstance(values, torch.Tensor) else values
    values = np.asarray(values, np.float64)
    return values if columns is None else values.reshape(-1, columns)


def _colour(k):
    return tuple(PALETTE[int(k) % len(PALETTE)].tolist())


def _brightness(colour):
    return np.dot(colour, (0.299, 0.587, 0.114))


def class_name(names, k):
    """The name of class k in one line of ASCII, all that Pillow's own font has: accents are dropped, and a name in
    another script is told by its number."""
    k = int(k)
    text = unicodedata.normalize("NFKD", " ".join(str(names[k]).split())) if 0 <= k < len(names) else f"class {k}"
    text = "".join(c for c in text if not unicodedata.combining(c))
    return text if text.isascii() else f"class {k}"


# ---- boxes on images -------------------------------------------------------------------------------------------------
def draw_boxes(rgb, boxes, classes, names, scores=None):
    """Draws boxes and their tags (name, score) into a copy of a picture.

    rgb: uint8 (H, W, 3); boxes: (n, 4); classes: (n,); scores: (n,) or None -> uint8 (H, W, 3).
    Boxes are cut at the picture's edge; those beyond it, inverted ones and NaN are not drawn. Higher scores (without
    scores: later boxes) are drawn over lower ones and choose the place of their tag first: above the box, inside,
    below. Tags never overlap each other; in a crowd, where they would hide the picture, the rest has only its colour.
    """
    picture, (height, width) = Image.fromarray(rgb), rgb.shape[:2]
    draw, line = ImageDraw.Draw(picture), round(max(rgb.shape) / 400 + 0.5)
    boxes, classes = _array(boxes, 4), _array(classes)
    order, tags = np.arange(len(boxes)) if scores is None else np.argsort(_array(scores), kind="stable"), []
    for i in order:
        x1, y1, x2, y2 = boxes[i]
        if not (x1 < width and x2 > 0 and y1 < height and y2 > 0 and x1 <= x2 and y1 <= y2):
            continue
        left, top = (min(round(max(v, 0)), n - 1) for v, n in ((x1, width), (y1, height)))
        right, bottom = (max(round(min(v, n)) - 1, low) for v, n, low in ((x2, width, left), (y2, height, top)))
        draw.rectangle([left, top, right, bottom], outline=_colour(classes[i]), width=line)
        text = class_name(names, classes[i]) + ("" if scores is None else f" {float(scores[i]):.2f}")
        tags.append((left, top, bottom, text, _colour(classes[i])))
    _draw_tags(draw, tags[::-1], width, height)
    return np.array(picture)


def _draw_tags(draw, tags, width, height):
    """tags: (left, top, bottom of the box, text, colour), the most important first."""
    size = max(10, round(max(width, height) / 70 + 5))
    tall, taken, room = size + 2, np.zeros((0, 4)), 0.15 * width * height
    for left, top, bottom, text, colour in tags:
        if room < 0:
            break
        wide = min(math.ceil(draw.textlength(text, font(size))) + 6, width)
        x = min(left, width - wide)
        for y in (top - tall, top, bottom + 1, bottom + 1 - tall):
            meets = ((taken[:, :2] < (x + wide, y + tall)) & (taken[:, 2:] > (x, y))).all(1).any()
            if 0 <= y <= height - tall and not meets:
                room -= wide * tall
                taken = np.append(taken, [[x, y, x + wide, y + tall]], 0)
                draw.rectangle([x, y, x + wide - 1, y + tall - 1], colour)
                text_line(draw, (x + 3, y + tall / 2), text, size=size, width=wide - 5,
                          fill=INK if _brightness(colour) > 110 else "white")
                break


def detection_sheet(path, images, truths, predictions=None, *, names, limit=8, score=0.25, max_side=400):
    """Writes a grid of images with their true boxes, or with predictions pairs of truth | prediction.

    images: B of (C, H, W). truths: B of (m, 5) x1 y1 x2 y2 class. predictions: B of (n, 6) x1 y1 x2 y2 score class, of
    which those below `score` are not drawn. names: of all classes.
    Boxes are drawn after the images have been scaled to max_side. At most `limit` images are drawn.
    """
    groups, present = [], set()
    for i, image in enumerate(images[:limit]):
        rgb = to_rgb(image)
        side = max(rgb.shape[:2])
        zoom = max_side / side if side > max_side else max_side // side
        size = [max(1, round(n * zoom)) for n in rgb.shape[1::-1]]
        how = Image.Resampling.LANCZOS if zoom < 1 else Image.Resampling.NEAREST
        rgb = np.array(Image.fromarray(rgb).resize(size, how))
        truth = _array(truths[i], 5)
        groups.append([draw_boxes(rgb, truth[:, :4] * zoom, truth[:, 4], names)])
        present |= set(truth[:, 4])
        if predictions is not None:
            found = _array(predictions[i], 6)
            found = found[found[:, 4] >= score]
            groups[-1].append(draw_boxes(rgb, found[:, :4] * zoom, found[:, 5], names, found[:, 4]))
            present |= set(found[:, 5])
    width = 1 if predictions is None else 2  # pictures per image; several images abreast give a sheet roughly square
    across = max(1, round((len(groups) / width) ** 0.5))
    titles = ["truth", f"prediction, score >= {score:g}"] * min(across, len(groups)) if width == 2 else None
    legend = {class_name(names, k): _colour(k) for k in sorted(present)} if len(present) <= MOST else None
    rows = [[picture for group in groups[s:s + across] for picture in group] for s in range(0, len(groups), across)]
    contact_sheet(path, rows, titles=titles, legend=legend, max_side=max_side)


# ---- plots -----------------------------------------------------------------------------------------------------------
def _shade(shares, colour):
    """Shares (...) in 0..1 -> uint8 (..., 3), white to the colour; small shares are lifted so that they can be seen."""
    shares = np.asarray(shares, np.float64)[..., None].clip(0, 1) ** 0.6
    return np.round(255 + shares * (np.array(colour) - 255)).astype(np.uint8)


def _upright(sheet, x, y, text, *, size=12, anchor="m", fill=FAINT, width=math.inf):
    """One line of text that reads upwards around column x; its middle ("m") or its end ("e") is at row y."""
    length = math.ceil(min(font(size).getlength(text), width))
    if length > 0:
        strip = Image.new("L", (length, size + 6))
        text_line(ImageDraw.Draw(strip), (0, size / 2 + 3), text, size=size, fill=255, width=width)
        strip = strip.rotate(90, expand=True)
        sheet.paste(Image.new("RGB", strip.size, fill), (round(x - strip.width / 2),
                    round(y - (length / 2 if anchor == "m" else 0))), strip)


def _head(draw, area, title, note=""):
    """A panel's title, and a note at its right."""
    text_line(draw, (area[2], area[1] - 20), note, anchor="rm", size=12, fill=FAINT)
    room = area[2] - area[0] - 10 - draw.textlength(note, font(12))
    text_line(draw, (area[0], area[1] - 20), title, size=16, width=room)


def _axes(sheet, area, x_ticks, y_ticks, *, x_label="", y_label=""):
    """Grid, tick labels and axis titles. area: left, top, right, bottom; ticks: {share of the axis: text}."""
    draw, (left, top, right, bottom) = ImageDraw.Draw(sheet), area
    for share, text in y_ticks.items():
        y = round(bottom - share * (bottom - top))
        draw.line([left, y, right, y], GRID)
        text_line(draw, (left - 8, y), text, anchor="rm", size=12, fill=FAINT)
    for share, text in x_ticks.items():
        x = round(left + share * (right - left))
        draw.line([x, top, x, bottom], GRID)
        text_line(draw, (x, bottom + 7), text, anchor="ma", size=12, fill=FAINT)
    draw.line([left, bottom, right, bottom], FAINT)
    text_line(draw, ((left + right) / 2, bottom + 31), x_label, anchor="mm", size=12, fill=FAINT)
    _upright(sheet, left - 50, (top + bottom) / 2, y_label)


def _mean(values):
    """The mean over the first axis of what is not NaN; NaN where everything is."""
    there = ~np.isnan(values)
    return np.where(there, values, 0).sum(0) / np.where(there.any(0), there.sum(0), math.nan)


def pr_curves(path, recall, precision, names, ap50):
    """Writes the precision-recall curves at IoU 0.50, one line per class and a bold one for their mean.

    recall: (R,), rising from 0 to 1; precision: (classes, R), a row of NaN for a class without truth; names, ap50: one
    per class. Of more than 20 classes the 20 with the lowest AP50 are coloured and named, the others are grey.
    """
    recall, precision, ap50 = _array(recall), _array(precision, len(recall)), _array(ap50)
    area = left, top, right, bottom = 68, 48, 588, 468
    sheet = Image.new("RGB", (840, 524), "white")
    ticks = {v / 5: f"{v / 5:.1f}" for v in range(6)}
    _axes(sheet, area, ticks, ticks, x_label="recall", y_label="precision")
    layer = Image.new("RGBA", (sheet.width * FINE, sheet.height * FINE))

    def curve(values, colour, thick):
        places = [((left + r * (right - left) + 0.5) * FINE, (bottom - p * (bottom - top) + 0.5) * FINE)
                  for r, p in zip(recall, values) if math.isfinite(p)]
        if len(places) > 1:
            ImageDraw.Draw(layer).line(places, colour, round(thick * FINE), joint="curve")

    def dark(k):  # the palette's pale colours were chosen for photographs
        colour = _colour(k)
        return tuple(int(c * min(1, 170 / _brightness(colour))) for c in colour)

    classes = [k for k in np.argsort(-ap50, kind="stable") if not np.isnan(precision[k]).all()]
    named = classes[-MOST:]  # NaN sorts last
    for k in classes[:-MOST]:
        curve(precision[k], (205, 210, 217), 1)
    entries = [(class_name(names, k), ap50[k], dark(k if len(precision) <= MOST else i), 1.5)
               for i, k in enumerate(named)]
    for k, (_, _, colour, thick) in zip(named, entries):
        curve(precision[k], colour, thick)
    if len(classes) > 1:
        entries.insert(0, (f"mean of {len(classes)} classes", _mean(ap50[classes]), INK, 3))
        curve(_mean(precision[classes]), INK, 3)
    layer = layer.reduce(FINE)
    sheet.paste(layer, mask=layer)
    draw = ImageDraw.Draw(sheet)
    _head(draw, area, "precision and recall at IoU 0.50", f"the {MOST} lowest in colour" if len(classes) > MOST else "")
    heading = "AP50" if classes else "no class has truth"
    text_line(draw, (sheet.width - 16, top - 20), heading, anchor="rm", size=12, fill=FAINT)
    for i, (name, value, colour, thick) in enumerate(entries):
        y = top + 8 + 19.5 * i
        draw.line([right + 22, y, right + 42, y], colour, 4 if thick == 3 else 2)
        text_line(draw, (right + 50, y), name, width=146)
        text_line(draw, (sheet.width - 16, y), "-" if math.isnan(value) else f"{value:.3f}", anchor="rm")
    with whole_file(path) as temporary:
        sheet.save(temporary)


def confusion_matrix(path, matrix, names):
    """Writes the confusion matrix as a heat map: each cell's share of its row, right ones blue and wrong ones orange.

    matrix: (C + 1, C + 1) counts, row: truth, column: prediction, the last one of both for the background (row: false
    positives; column: missed). names: of the C classes. Counts, and in large cells shares, are written where they fit.
    """
    matrix, count = _array(matrix), len(matrix)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    colours = np.where(np.eye(count, dtype=bool)[..., None], _shade(shares, LINE), _shade(shares, BEST))
    labels = [class_name(names, k) for k in range(count - 1)] + ["background"]
    cell = max(3, min(96, 880 // count))
    size = min(13, max(9, cell - 2))
    longest = max(map(font(size).getlength, labels))
    flat, margin = longest <= cell - 6, math.ceil(min(longest, 150)) + 10  # flat: the columns' names fit unturned
    left, top, side = 40 + margin, 48, cell * count
    bar, high = left + max(side, 250) + 24, max(100, min(side, 300))
    sheet = Image.new("RGB", (bar + 84, top + side + (26 if flat else margin) + 36), "white")
    draw = ImageDraw.Draw(sheet)
    sheet.paste(Image.fromarray(colours).resize((side, side), Image.Resampling.NEAREST), (left, top))
    for place in range(0, side + 1, cell if cell >= 6 else side):
        draw.line([left + place, top, left + place, top + side], GRID)
        draw.line([left, top + place, left + side, top + place], GRID)
    if cell >= 18:
        _cell_texts(draw, (left, top), cell, matrix, shares, colours)
    for k in range(0, count, math.ceil((size + 1) / cell)):  # of a huge matrix every second, third, ... name
        middle = (k + 0.5) * cell
        text_line(draw, (left - 8, top + middle), labels[k], anchor="rm", size=size, width=150)
        if flat:
            text_line(draw, (left + middle, top + side + 8), labels[k], anchor="ma", size=size)
        else:
            _upright(sheet, left + middle, top + side + 8, labels[k], size=size, anchor="e", fill=INK, width=150)
    _head(draw, (left, top, sheet.width - 16, 0), "confusion matrix", "share of the truth")
    text_line(draw, (left + side / 2, sheet.height - 18), "prediction", anchor="mm", size=12, fill=FAINT)
    _upright(sheet, 20, top + side / 2, "truth")
    ramp = np.concatenate([np.repeat(_shade(np.linspace(1, 0, high), c)[:, None], 10, 1) for c in (LINE, BEST)], 1)
    sheet.paste(Image.fromarray(ramp), (bar, top))
    for share in (0, 0.25, 0.5, 0.75, 1):
        text_line(draw, (bar + 26, top + (1 - share) * (high - 1)), f"{share:.0%}", size=11, fill=FAINT)
    for i, (text, colour) in enumerate((("right", LINE), ("wrong", BEST))):
        text_line(draw, (bar, top + high + 16 + 16 * i), text, size=12, fill=colour)
    with whole_file(path) as temporary:
        sheet.save(temporary)


def _cell_texts(draw, corner, cell, matrix, shares, colours):
    """The count of each cell that is not empty, in large cells its share too, where they fit."""
    size = max(8, min(14, cell // 3))
    for r, c in np.argwhere(matrix > 0):
        lines = [f"{matrix[r, c]:.0f}"]
        if cell >= 50:
            lines.append(f"{shares[r, c]:.0%}" if shares[r, c] >= 0.005 else "<1%")
        if max(map(font(size).getlength, lines)) > cell - 4:
            continue
        for i, text in enumerate(lines):
            place = (c + 0.5) * cell, (r + 0.5) * cell + (i - (len(lines) - 1) / 2) * (size + 4)
            text_line(draw, np.add(corner, place).tolist(), text, anchor="mm", size=size - i,
                      fill=INK if _brightness(colours[r, c]) > 125 else "white")


# ---- labels ----------------------------------------------------------------------------------------------------------
def _round_step(top, most):
    """The smallest of 1, 2, 5, 10, 20, ... of which at most `most` reach `top`."""
    return next(step for p in range(40) for step in (10 ** p, 2 * 10 ** p, 5 * 10 ** p) if top <= step * most)


def _density(sheet, area, x, y):
    """Points (n,) in 0..1, y upwards, as a heat map; points beyond are counted at the edge."""
    bins = round(min(30, max(8, (len(x) / 10) ** 0.5)))  # few boxes, large bins: the picture is not to show noise
    counts = np.histogram2d((1 - y).clip(0, 1), x.clip(0, 1), bins, [[0, 1], [0, 1]])[0]
    picture = Image.fromarray(_shade((counts / max(counts.max(), 1)) ** 0.7, LINE))
    size = area[2] - area[0], area[3] - area[1]
    sheet.paste(picture.resize(size, Image.Resampling.NEAREST), area[:2])
    ImageDraw.Draw(sheet).rectangle(area, outline=GRID)


def label_statistics(path, boxes, classes, sizes, names):
    """Writes one picture of a data set's labels: instances per class, where the boxes' centres are, how large the boxes
    are, and how many an image has.

    boxes: per image (n, 4); classes: per image (n,); sizes: per image (height, width); names: of all classes.
    """
    per_image = np.array([len(b) for b in boxes], np.int64)
    size = np.repeat(_array(sizes, 2)[:, ::-1], per_image, 0)
    every = np.concatenate([np.zeros((0, 4)), *[_array(b, 4) for b in boxes]])
    centre = (every[:, :2] + every[:, 2:]) / 2 / size
    extent = (every[:, 2:] - every[:, :2]) / size * 100  # % of the image
    empty = (extent <= 0).any(1)
    label = np.concatenate([np.zeros(0), *[_array(c).reshape(-1) for c in classes]]).astype(np.int64)
    counts = np.bincount(label, minlength=len(names))
    sheet = Image.new("RGB", (1240, max(700, min(860, 90 + 10 * len(counts)))), "white")
    draw = ImageDraw.Draw(sheet)
    _class_bars(sheet, (150, 48, 400, sheet.height - 40), counts, names)

    area, halves = (500, 48, 800, 348), {0: "0", 0.5: "50", 1: "100"}
    downwards = {1 - share: text for share, text in halves.items()}
    _axes(sheet, area, halves, downwards, x_label="x, % of the width", y_label="y, % of the height")
    _density(sheet, area, centre[:, 0], 1 - centre[:, 1])
    _head(draw, area, "box centres", f"{len(every):,} boxes")

    area = 900, 48, 1200, 348
    logs = np.log10(extent.clip(1e-3, 100))
    low = min(1, math.floor(np.percentile(logs, 1))) if len(every) else 0  # the axis' first decade, but for outliers
    decades = {(p - low) / (2 - low): f"{10.0 ** p:g}" for p in range(low, 3)}
    _axes(sheet, area, decades, decades, x_label="width, % of the image", y_label="height, % of the image")
    _density(sheet, area, *((logs - low) / (2 - low)).T)
    note = "median {:.2g} x {:.2g} %".format(*np.median(extent, 0)) if len(every) else ""
    _head(draw, area, "box sizes", note + (f", {empty.sum():,} empty" if empty.any() else ""))
    _images_per_count(sheet, (500, 448, 1200, sheet.height - 52), per_image)
    with whole_file(path) as temporary:
        sheet.save(temporary)


def _class_bars(sheet, area, counts, names):
    """Instances per class, most frequent first."""
    draw, (left, top, right, bottom) = ImageDraw.Draw(sheet), area
    _head(draw, area, "instances per class", f"{np.count_nonzero(counts)} of {len(counts)} classes")
    pitch = min(34, (bottom - top) / max(1, len(counts)))
    size = min(13, max(9, math.floor(pitch)))
    step, longest = math.ceil(size / pitch), max(1, counts.max(initial=0))
    for i, k in enumerate(np.argsort(-counts, kind="stable")):
        y = top + i * pitch
        end = left + counts[k] / longest * (right - left - 50)
        low, high = round(y + 0.12 * pitch), round(y + 0.88 * pitch) - 1
        draw.rectangle([left, low, max(left + 1, round(end)), max(low, high)], LINE if counts[k] else BEST)
        if i % step == 0:
            text_line(draw, (left - 8, y + pitch / 2), class_name(names, k), anchor="rm", size=size, width=left - 20)
            text_line(draw, (end + 7, y + pitch / 2), f"{counts[k]:,}", size=size, fill=FAINT if counts[k] else BEST)


def _images_per_count(sheet, area, per_image):
    """How many images have 0, 1, 2, ... boxes, in at most 70 bars."""
    draw, (left, top, right, bottom) = ImageDraw.Draw(sheet), area
    most = per_image.max(initial=0)
    width = _round_step(most + 1, 70)
    bars = np.bincount(per_image // width, minlength=10)
    end, high = len(bars) * width, max(1, bars.max()) * 1.05
    centre = 0.5 if width == 1 else 0  # a bar for one number has it below its middle, a wider one where it begins
    x_ticks = {(n + centre) / end: f"{n:,}" for n in range(0, end, max(width, _round_step(end, 12)))}
    y_ticks = {n / high: f"{n:,}" if n < 10000 else f"{n / 1000:g}k"
               for n in range(0, math.floor(high) + 1, _round_step(bars.max(), 5))}
    x_label = "boxes per image" if width == 1 else f"boxes per image, in steps of {width:,}"
    _axes(sheet, area, x_ticks, y_ticks, x_label=x_label, y_label="images")
    for i in np.flatnonzero(bars):
        x1, x2 = (round(left + (i + edge) / len(bars) * (right - left)) for edge in (0.08, 0.92))
        y = round(bottom - bars[i] / high * (bottom - top))
        draw.rectangle([x1, min(y, bottom - 1), x2 - 1, bottom - 1], LINE)
    note = f"mean {per_image.sum() / max(1, len(per_image)):.3g}, most {most:,}, none in {np.sum(per_image == 0):,}"
    _head(draw, area, f"boxes per image, {len(per_image):,} images", note)
