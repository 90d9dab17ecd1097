"""The curves of a run, drawn with Pillow. The file is written whole or not at all."""
import math

import numpy as np
from PIL import Image, ImageDraw

from utils.pictures import cells
from utils.pictures.sheets import FAINT, font, in_rows, join, save_image, text_line

GRID, LINE, BEST = (232, 235, 239), (37, 99, 214), (234, 88, 12)
WIDTH, HEIGHT = 400, 270
LEFT, TOP, RIGHT, BOTTOM = 68, 48, 384, 240  # of the axes
FINE = 3  # the pictures are drawn larger by this factor, then reduced, so that lines are smooth


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
    x_of, first, last = _axis(xs, LEFT, RIGHT)
    y_of, low, high = _axis(ys, BOTTOM, TOP)

    def write(x, y, text, size=12, **options):
        text_line(draw, (x, y), text, size=FINE * size, **options)

    image, finite = Image.new("RGB", (FINE * WIDTH, FINE * HEIGHT), "white"), np.isfinite(ys)
    draw, points = ImageDraw.Draw(image), [(x_of(x), y_of(y)) for x, y in zip(xs, ys)]
    for value in (low, high):
        draw.line([(FINE * LEFT, y_of(value)), (FINE * RIGHT, y_of(value))], GRID, FINE)
        write(FINE * (LEFT - 8), y_of(value), f"{value:.3g}", anchor="rm", fill=FAINT, width=FINE * (LEFT - 12))
    for value in (first, last):
        write(x_of(value), FINE * (BOTTOM + 7), f"{value:g}", anchor="ma", fill=FAINT)
    draw.line([(FINE * LEFT, FINE * BOTTOM), (FINE * RIGHT, FINE * BOTTOM)], FAINT, FINE)

    note = f"last {ys[finite][-1]:.4g}" if finite.any() else "no finite value"
    for i in np.flatnonzero(finite):
        if i and finite[i - 1]:
            draw.line([points[i - 1], points[i]], LINE, 2 * FINE)
        draw.circle(points[i], 1.5 * FINE, LINE)
    if is_score and finite.any():
        best = np.where(finite, ys, -math.inf).argmax()
        draw.circle(points[best], 5 * FINE, BEST, "white", FINE)
        note = f"best {ys[best]:.4g} at {xs[best]:g}"
    write(FINE * RIGHT, FINE * 24, note, anchor="rm", fill=FAINT)
    write(FINE * LEFT, FINE * 24, name, size=16,
          width=FINE * (RIGHT - LEFT - 10) - draw.textlength(note, font(FINE * 12)))
    return image.reduce(FINE)


def _axis(values, start, end):
    """-> function(value) -> pixel of the fine picture, start to end with a margin; the smallest and the largest finite
    value."""
    values = values[np.isfinite(values)]
    low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
    margin = 0.06 * ((high - low) or abs(high) or 1.0)

    def place(value):
        return FINE * (start + (value - low + margin) / (high - low + 2 * margin) * (end - start) + 0.5)
    return place, low, high
