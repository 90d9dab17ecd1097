"""The curves of a run, drawn with Pillow. The file is written whole or not at all."""
import math

import numpy as np
from PIL import Image, ImageDraw

from utils.pictures import cells
from utils.pictures.sheets import FAINT, font, in_rows, join, save_image, text_line

GRID, LINE, BEST = (232, 235, 239), (37, 99, 214), (234, 88, 12)
WIDTH, HEIGHT = 400, 270
LEFT, TOP, RIGHT, BOTTOM = 58, 48, 384, 240  # of the axes
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
    (x0, x1), (y0, y1), finite = _limits(xs), _limits(ys), np.isfinite(ys)

    def place(x, y):
        return (FINE * (LEFT + (x - x0) / (x1 - x0) * (RIGHT - LEFT) + 0.5),
                FINE * (BOTTOM - (y - y0) / (y1 - y0) * (BOTTOM - TOP) + 0.5))

    def write(x, y, text, size=12, **options):
        text_line(draw, (FINE * x, FINE * y), text, size=FINE * size, **options)

    image = Image.new("RGB", (FINE * WIDTH, FINE * HEIGHT), "white")
    draw, points = ImageDraw.Draw(image), [place(x, y) for x, y in zip(xs, ys)]
    for value, text in ticks(y0, y1):
        draw.line([place(x0, value), place(x1, value)], GRID, FINE)
        write(LEFT - 8, place(x0, value)[1] / FINE, text, anchor="rm", fill=FAINT, width=FINE * (LEFT - 12))
    for value, text in ticks(x0, x1, whole=True):
        draw.line([place(value, y0), place(value, y1)], GRID, FINE)
        write(place(value, y0)[0] / FINE, BOTTOM + 7, text, anchor="ma", fill=FAINT)
    draw.line([place(x0, y0), place(x1, y0)], FAINT, FINE)

    note = f"last {ys[finite][-1]:.4g}" if finite.any() else "no finite value"
    for i in np.flatnonzero(finite):
        if i and finite[i - 1]:
            draw.line([points[i - 1], points[i]], LINE, 2 * FINE)
        draw.circle(points[i], 1.5 * FINE, LINE)
    if is_score and finite.any():
        best = np.where(finite, ys, -math.inf).argmax()
        draw.circle(points[best], 5 * FINE, BEST, "white", FINE)
        note = f"best {ys[best]:.4g} at {xs[best]:g}"
    write(RIGHT, 24, note, anchor="rm", fill=FAINT)
    write(LEFT, 24, name, size=16, width=FINE * (RIGHT - LEFT - 10) - draw.textlength(note, font(FINE * 12)))
    return image.reduce(FINE)


def _limits(values):
    """The smallest and largest finite value with a margin: (low, high), never equal."""
    values = values[np.isfinite(values)]
    low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
    margin = 0.06 * ((high - low) or abs(high) or 1.0)
    return low - margin, high + margin


def ticks(low, high, whole=False):
    """(value, text) pairs at 3 to 5 round numbers in [low, high]: the coarsest step that gives three of them.

    whole: only whole numbers, for epochs (then a short axis may have fewer than three).
    """
    power = 10.0 ** math.floor(math.log10(high - low))
    steps = [step * power for step in (5, 2.5, 2, 1, 0.5, 0.25)]
    for step in [step for step in steps if step % 1 == 0] + [1] if whole else steps:
        values = np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step + 0.0  # no -0
        if len(values) >= 3:
            break
    return [(value, f"{value:.7g}") for value in values]
