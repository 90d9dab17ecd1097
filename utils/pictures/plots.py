"""A plot: axes with a grid, and the lines and heat maps in them, drawn with Pillow."""
import math

import numpy as np
from PIL import Image, ImageDraw

from utils.pictures.sheets import FAINT, font, text_line

GRID, LINE, BEST = (232, 235, 239), (37, 99, 214), (234, 88, 12)
TOP, RIGHT, BOTTOM, FINE = 48, 16, 30, 3  # margins; supersampling of lines


class Plot:
    """One plot, whose picture is `image`.

    size: width and height inside the axes, pixels. x: the values at the left and right end; y: at the bottom and top.
    x_ticks, y_ticks: (value, text) pairs. left: the margin for the texts of y_ticks.
    """

    def __init__(self, size, x, y, *, title, note="", x_ticks=(), y_ticks=(), left=58, text_size=12):
        self.x, self.y, self.left, self.right, self.bottom = x, y, left, left + size[0], TOP + size[1]
        self.image = Image.new("RGB", (self.right + RIGHT, self.bottom + BOTTOM), "white")
        draw, faint = ImageDraw.Draw(self.image), {"size": text_size, "fill": FAINT}
        for value, text in y_ticks:
            row = round(self.place(x[0], value)[1])
            draw.line([left, row, self.right, row], GRID)
            text_line(draw, (left - 8, row), text, anchor="rm", width=left - 12, **faint)
        for value, text in x_ticks:
            column = round(self.place(value, y[0])[0])
            draw.line([column, TOP, column, self.bottom], GRID)
            text_line(draw, (column, self.bottom + 7), text, anchor="ma", **faint)
        draw.line([left, self.bottom, self.right, self.bottom], FAINT)
        text_line(draw, (self.right, 24), note, anchor="rm", size=12, fill=FAINT)
        text_line(draw, (left, 24), title, size=16, width=size[0] - 10 - draw.textlength(note, font(12)))

    def place(self, x, y):
        """Values, numbers or arrays -> column and row in the picture."""
        (x0, x1), (y0, y1) = self.x, self.y
        return (self.left + (x - x0) / (x1 - x0) * (self.right - self.left),
                self.bottom - (y - y0) / (y1 - y0) * (self.bottom - TOP))

    def lines(self, xs, lines):
        """lines: [(values (N,), colour, width)], with dots at the values; a gap wherever a value is not finite."""
        big = self.image.resize([side * FINE for side in self.image.size], Image.Resampling.NEAREST)
        draw = ImageDraw.Draw(big)
        for ys, colour, width in lines:
            points, finite = (np.stack(self.place(xs, ys), 1) + 0.5) * FINE, np.isfinite(ys)
            for i in np.flatnonzero(finite):
                if i and finite[i - 1]:
                    draw.line([*points[i - 1], *points[i]], colour, width * FINE)
                draw.circle(points[i].tolist(), 0.75 * width * FINE, colour)
        self.image = big.reduce(FINE)

    def heat_map(self, colours):
        """Cells (rows, columns, 3) uint8 that fill the axes."""
        size = self.right - self.left, self.bottom - TOP
        self.image.paste(Image.fromarray(colours).resize(size, Image.Resampling.NEAREST), (self.left, TOP))


def limits(values):
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
