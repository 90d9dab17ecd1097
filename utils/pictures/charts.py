"""Charts of a run: its curves, and of detection the precision-recall curves, the confusion matrix and the statistics of
the labels. Every file is written whole or not at all.
"""
import math

import numpy as np
from PIL import ImageDraw

from utils.pictures import cells
from utils.pictures.detection import class_name
from utils.pictures.plots import BEST, LINE, TOP, Plot, limits, ticks
from utils.pictures.sheets import INK, PALETTE, font, in_rows, join, save_image, shade, text_line

MOST = 20  # classes with a colour of their own


def plot_curves(path, rows, score=None):
    """Draws results.png, a plot per column of the rows, four abreast, over the column "epoch".

    rows: {name: number}, one per epoch; NaN, infinite and missing values leave gaps. score: the column whose best,
    that is highest, value is marked.
    """
    columns = {name: np.array([row.get(name, math.nan) for row in rows], float) for name in cells.column_names(rows)}
    epochs = columns.pop("epoch")
    plots = [_curve(name, epochs, values, name == score) for name, values in columns.items()]
    save_image(path, join([join(row, 0) for row in in_rows(plots, 4)], 1))


def _curve(name, xs, ys, is_score):
    x, y, finite = limits(xs), limits(ys), np.isfinite(ys)
    lines = [(ys, LINE, 2)]
    note = f"last {ys[finite][-1]:.4g}" if finite.any() else "no finite value"
    if is_score and finite.any():
        best = np.where(finite, ys, -math.inf).argmax()
        only = np.where(np.arange(len(ys)) == best, ys, math.nan)
        lines += [(only, "white", 8), (only, BEST, 6)]
        note = f"best {ys[best]:.4g} at {xs[best]:g}"
    plot = Plot((326, 192), x, y, title=name, note=note, x_ticks=ticks(*x, whole=True), y_ticks=ticks(*y))
    plot.lines(xs, lines)
    return plot.image


def pr_curves(path, recall, precision, names, ap50):
    """Writes the precision-recall curves at IoU 0.50, one line per class and a bold one for their mean.

    recall: (R,), rising from 0 to 1; precision: (classes, R), a row of NaN for a class without ground truth; names,
    ap50: one per class. Of more than 20 classes the 20 with the lowest AP50 are coloured and named, the others are
    grey.
    """
    known = [k for k in np.argsort(-np.array(ap50), kind="stable") if not np.isnan(ap50[k])]
    rows, lines = [], [(precision[k], (205, 210, 217), 1) for k in known[:-MOST]]
    for k, colour in zip(known[-MOST:], (PALETTE * 0.75).astype(int).tolist()):  # pale ones were chosen for photographs
        lines.append((precision[k], tuple(colour), 2))
        rows.append({"class": class_name(names, k), "AP50": float(ap50[k])})
    if len(known) > 1:
        lines.append((precision[known].mean(0), INK, 3))
        rows.append({"class": f"mean of {len(known)} classes", "AP50": float(np.mean([ap50[k] for k in known]))})
    axis = [(v / 5, f"{v / 5:.1f}") for v in range(6)]
    plot = Plot((520, 420), (0, 1), (0, 1), title="precision over recall at IoU 0.50", x_ticks=axis, y_ticks=axis)
    plot.lines(recall, lines)
    table = cells.as_picture(f"the {len(rows)} lowest of {len(known)}" if len(known) > MOST else "", rows,
                             [colour for _, colour, _ in lines[len(lines) - len(rows):]])
    save_image(path, join([plot.image, table], 0))


def confusion_matrix(path, matrix, names):
    """Writes the confusion matrix as a heat map: each cell's share of its row, right ones blue and wrong ones orange.

    matrix: (C + 1, C + 1) counts, row: ground truth, column: prediction, the last of both is the background (row: false
    positives; column: missed). names: the names of the C classes. The counts are written where they fit.
    """
    count = len(matrix)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    right, wrong = (shade(shares ** 0.6, colour) for colour in (LINE, BEST))  # small shares are to be seen, too
    cell = max(3, min(96, 880 // count))
    size, labelled = min(13, max(9, cell)), range(0, count, -(-9 // cell))  # more labels would overlap
    plot = Plot((cell * count, cell * count), (0, count), (count, 0), title="truth (rows), prediction (columns)",
                note="right: blue, wrong: orange", left=170, text_size=size,
                x_ticks=[(k + 0.5, str(k)) for k in labelled],
                y_ticks=[(k + 0.5, f"{class_name([*names, 'background'], k)}  {k}") for k in labelled])
    plot.heat_map(np.where(np.eye(count, dtype=bool)[..., None], right, wrong))
    draw = ImageDraw.Draw(plot.image)
    for r, c in np.argwhere(matrix > 0) if cell >= 18 else ():
        text = f"{matrix[r, c]:.0f}"
        if draw.textlength(text, font(size)) <= cell - 4:
            text_line(draw, plot.place(c + 0.5, r + 0.5), text, size=size, anchor="mm",
                      fill="white" if shares[r, c] > 0.7 else INK)
    save_image(path, plot.image)


def label_statistics(path, boxes, classes, sizes, names):
    """Writes one picture of a data set's labels: instances per class, where the boxes' centres are, and how large the
    boxes are.

    boxes: per image an array (n, 4); classes: per image (n,); sizes: per image (height, width); names: of all classes.
    """
    size = np.repeat(np.array(sizes)[:, ::-1], [len(rows) for rows in boxes], 0)
    every = np.concatenate(boxes)
    centre, extent = ((every[:, :2] + every[:, 2:]) * 50 / size).T, ((every[:, 2:] - every[:, :2]) * 100 / size).T
    counts = np.bincount(np.concatenate(classes).astype(int), minlength=len(names))
    axis, decades = [(0, "0"), (50, "50"), (100, "100")], [(p, f"{10.0 ** p:g}") for p in range(-2, 3)]
    centres = _density(*centre, (0, 100), (100, 0), axis, title="x and y of the centres, %",
                       note=f"{len(every):,} boxes, {len(boxes):,} images")
    note = "median {:.2g} x {:.2g}".format(*np.median(extent, 1)) if len(every) else ""
    extents = _density(*np.log10(extent.clip(0.01)), (-2, 2), (-2, 2), decades, title="width and height, %",
                       note=note + f", {(extent <= 0).any(0).sum():,} empty")
    save_image(path, join([_instances(counts, names), centres, extents], 0))


def _density(xs, ys, x, y, axis, **texts):
    """How many points lie where; points beyond the ends of the axes x and y are counted at the edge."""
    plot = Plot((300, 300), x, y, x_ticks=axis, y_ticks=axis, **texts)
    ends = [(TOP, plot.bottom), (plot.left, plot.right)]
    columns, rows = plot.place(xs, ys)
    bins = round(min(30, max(8, (len(xs) / 10) ** 0.5)))  # few boxes, large bins: the picture is not to show noise
    counts, *_ = np.histogram2d(rows.clip(*ends[0]), columns.clip(*ends[1]), bins, ends)
    plot.heat_map(shade((counts / max(counts.max(), 1)) ** 0.4, LINE))
    return plot.image


def _instances(counts, names):
    """The number of instances of the classes, of many classes of the most frequent."""
    order = np.argsort(-counts, kind="stable")[:30]
    colours = map(tuple, shade(counts[order] / max(1, counts.max()), LINE).tolist())
    return cells.as_picture(f"{np.count_nonzero(counts)} of {len(counts)} classes occur",
                            [{"class": class_name(names, k), "boxes": int(counts[k])} for k in order], [*colours])
