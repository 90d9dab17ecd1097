"""Charts of a run: its curves, and of detection the precision-recall curves, the confusion matrix and the statistics of
the labels. Every file is written whole or not at all.
"""
import math

import numpy as np
from PIL import ImageDraw

from utils.pictures import cells
from utils.pictures.detection import class_name
from utils.pictures.plots import BEST, GRID, LINE, TOP, Plot, categories, limits, ticks
from utils.pictures.sheets import FAINT, INK, PALETTE, font, join, save_image, to_numpy

MOST = 20  # classes with a colour of their own
NOTHING = "no class has ground truth"


def plot_curves(path, rows, score=None):
    """Draws results.png, a plot per column of the rows, four abreast, over the column "epoch".

    rows: {name: number}, one per epoch; NaN, infinite and missing values leave gaps. score: the column whose best,
    that is highest, value is marked.
    """
    names = list(dict.fromkeys(name for row in rows for name in row if name != "epoch"))
    xs = np.array([row["epoch"] for row in rows], float)
    plots = [_curve(name, xs, np.array([row.get(name, math.nan) for row in rows], float), name == score)
             for name in names]
    save_image(path, join([join(plots[i:i + 4], 0) for i in range(0, len(plots), 4)], 1))


def _curve(name, xs, ys, is_score):
    x, y, finite = limits(xs), limits(ys), np.isfinite(ys)
    radius = min(3.2, max(1.4, 100 / len(xs)))
    lines, note, fill = [(ys, LINE, 2, radius)], "no finite value", FAINT
    if finite.any():
        note = f"last {ys[finite][-1]:.4g}"
    if is_score and finite.any():
        best = np.where(finite, ys, -math.inf).argmax()
        only = np.where(np.arange(len(ys)) == best, ys, math.nan)
        lines += [(only, "white", 0, 6), (only, BEST, 0, 4.5)]
        note, fill = f"best {ys[best]:.4g} at {xs[best]:g}", BEST
    plot = Plot((326, 192), x, y, title=name, note=note, note_fill=fill, x_ticks=ticks(*x, whole=True),
                y_ticks=ticks(*y))
    plot.lines(xs, lines)
    return plot.image


def pr_curves(path, recall, precision, names, ap50):
    """Writes the precision-recall curves at IoU 0.50, one line per class and a bold one for their mean.

    recall: (R,), rising from 0 to 1; precision: (classes, R), a row of NaN for a class without ground truth; names,
    ap50: one per class. Of more than 20 classes the 20 with the lowest AP50 are coloured and named, the others are
    grey.
    """
    known = [k for k in np.argsort(-np.array(ap50), kind="stable") if not np.isnan(ap50[k])]
    rows, lines = [], [(precision[k], (205, 210, 217), 1, 0) for k in known[:-MOST]]
    for i, k in enumerate(known[-MOST:]):  # the palette's pale colours were chosen for photographs
        colour = (PALETTE[k if len(names) <= MOST else i] * 0.75).astype(int)
        lines.append((precision[k], tuple(colour.tolist()), 2, 0))
        rows.append({"class": class_name(names, k), "AP50": float(ap50[k])})
    if len(known) > 1:
        lines.append((precision[known].mean(0), INK, 3, 0))
        rows.append({"class": f"mean of {len(known)} classes", "AP50": float(np.mean([ap50[k] for k in known]))})
    axis = [(v / 5, f"{v / 5:.1f}") for v in range(6)]
    plot = Plot((520, 420), (0, 1), (0, 1), title="precision and recall at IoU 0.50", x_ticks=axis, y_ticks=axis,
                x_label="recall", y_label="precision", left=68, bottom=50,
                note="" if 0 < len(known) <= MOST else f"the {MOST} lowest in colour" if known else NOTHING)
    plot.lines(recall, lines)
    colours = [colour for _, colour, *_ in lines[-len(rows):]]
    save_image(path, join([plot.image, cells.as_picture("", rows, colours)], 0))


def _shade(shares, colour):
    """Shares (...) in 0..1 -> uint8 (..., 3), white to the colour; small shares are lifted so that they can be seen."""
    shares = np.asarray(shares)[..., None] ** 0.6
    return np.round(255 + shares * (np.array(colour) - 255)).astype(np.uint8)


def confusion_matrix(path, matrix, names):
    """Writes the confusion matrix as a heat map: each cell's share of its row, right ones blue and wrong ones orange.

    matrix: (C + 1, C + 1) counts, row: ground truth, column: prediction, the last of both is the background (row: false
    positives; column: missed). names: of the C classes. Counts, and in large cells shares, are written where they fit.
    """
    count = len(matrix)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    colours = np.where(np.eye(count, dtype=bool)[..., None], _shade(shares, LINE), _shade(shares, BEST))
    labels = [class_name(names, k) for k in range(count - 1)] + ["background"]
    cell = max(3, min(96, 880 // count))
    axis, size = categories(labels, cell)
    longest = min(150, math.ceil(max(map(font(size).getlength, labels))))
    plot = Plot((cell * count, cell * count), (0, count), (count, 0), title="confusion matrix", x_ticks=axis,
                y_ticks=axis, note="blue: right, orange: wrong", x_label="prediction", y_label="truth", left=longest + 36,
                bottom=longest + 40, text_size=size, upright=True)
    pixels = colours.repeat(cell, 0).repeat(cell, 1)
    if cell >= 6:
        pixels[::cell] = pixels[:, ::cell] = GRID
    plot.heat_map(pixels)
    draw, size = ImageDraw.Draw(plot.image), max(8, min(14, cell // 3))
    for r, c in np.argwhere(matrix > 0) if cell >= 18 else ():
        text = f"{matrix[r, c]:.0f}" + f"\n{shares[r, c]:.0%}" * (cell >= 50)
        left, _, right, _ = draw.textbbox((0, 0), text, font(size))
        if right - left <= cell - 4:
            draw.text(plot.place(c + 0.5, r + 0.5), text, "white" if shares[r, c] > 0.7 else INK, font(size), "mm",
                      align="center")
    save_image(path, plot.image)


def label_statistics(path, boxes, classes, sizes, names):
    """Writes one picture of a data set's labels: instances per class, where the boxes' centres are, how large the boxes
    are, and how many an image has.

    boxes: per image (n, 4); classes: per image (n,); sizes: per image (height, width); names: of all classes.
    """
    per_image = np.array([len(rows) for rows in boxes])
    size = np.repeat(np.array(sizes)[:, ::-1], per_image, 0)
    every = np.concatenate([np.reshape(to_numpy(rows), (-1, 4)) for rows in boxes])
    centre, extent = ((every[:, :2] + every[:, 2:]) * 50 / size).T, ((every[:, 2:] - every[:, :2]) * 100 / size).T
    counts = np.bincount(np.concatenate([*map(to_numpy, classes)]).astype(int), minlength=len(names))
    axis = [(0, "0"), (50, "50"), (100, "100")]
    centres = _density(*centre, (0, 100), (100, 0), axis, title="box centres", note=f"{len(every):,} boxes",
                       x_label="x, % of the width", y_label="y, % of the height")
    axis, empty = [(p, f"{10.0 ** p:g}") for p in range(-2, 3)], (extent <= 0).any(0).sum()
    note = "median {:.2g} x {:.2g} %".format(*np.median(extent, 1)) if len(every) else ""
    extents = _density(*np.log10(extent.clip(0.01)), (-2, 2), (-2, 2), axis, title="box sizes",
                       note=note + f", {empty:,} empty" * bool(empty), x_label="width, % of the image",
                       y_label="height, % of the image")
    right = join([join([centres, extents], 0), _images_per_count(per_image)], 1)
    save_image(path, join([_class_bars(counts, names), right], 0))


def _density(xs, ys, x, y, axis, **texts):
    """How many points lie where; points beyond the ends of the axes x and y are counted at the edge."""
    plot = Plot((300, 300), x, y, x_ticks=axis, y_ticks=axis, left=72, bottom=50, **texts)
    ends = [(TOP, plot.bottom), (plot.left, plot.right)]
    columns, rows = plot.place(xs, ys)
    bins = round(min(30, max(8, (len(xs) / 10) ** 0.5)))  # few boxes, large bins: the picture is not to show noise
    counts, *_ = np.histogram2d(rows.clip(*ends[0]), columns.clip(*ends[1]), bins, ends)
    plot.heat_map(_shade((counts / max(counts.max(), 1)) ** 0.7, LINE))
    return plot.image


def _class_bars(counts, names):
    """Instances per class, most frequent first."""
    pitch, order = min(34, 770 / max(1, len(counts))), np.argsort(-counts, kind="stable")
    axis, size = categories([f"{class_name(names, k)}  {counts[k]:,}" for k in order], pitch)
    plot = Plot((250, round(pitch * len(counts))), (0, max(1, counts.max(initial=0))), (len(counts) or 1, 0),
                title="instances per class", note=f"{np.count_nonzero(counts)} of {len(counts)} classes", y_ticks=axis,
                left=170, text_size=size)
    for i, k in enumerate(order):
        plot.bar(0, i + 0.88, counts[k], i + 0.12, LINE if counts[k] else BEST)
    return plot.image


def _images_per_count(per_image):
    """How many images have 0, 1, 2, ... boxes, in at most 70 bars."""
    most = per_image.max(initial=0)
    width = math.ceil((most + 1) / 70)
    bars = np.bincount(per_image // width, minlength=10)
    x, y = (-0.5, len(bars) * width - 0.5), (0, max(1, bars.max()) * 1.05)
    note = f"mean {per_image.mean():.3g}, most {most:,}, none in {np.sum(per_image == 0):,}"
    plot = Plot((700, 200), x, y, title=f"boxes per image, {len(per_image):,} images", note=note, left=72, bottom=50,
                x_ticks=ticks(*x, whole=True), y_ticks=ticks(*y, whole=True), y_label="images",
                x_label="boxes per image" + f", in steps of {width:,}" * (width > 1))
    for i in np.flatnonzero(bars):
        plot.bar((i + 0.08) * width - 0.5, 0, (i + 0.92) * width - 0.5, bars[i], LINE)
    return plot.image
