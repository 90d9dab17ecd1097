"""A plot: axes with a grid, and the lines, bars and heat maps in them, drawn with Pillow."""
import math

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from utils.pictures.sheets import FAINT, font, label, text_line

GRID, LINE, BEST = (232, 235, 239), (37, 99, 214), (234, 88, 12)
TOP, RIGHT, FINE = 48, 16, 3  # margins; supersampling of lines


class Plot:
    """One plot, whose picture is `image`.

    size: width and height inside the axes, pixels. x: the values at the left and right end; y: at the bottom and top.
    x_ticks, y_ticks: (value, text) pairs. left, bottom: margins; upright: the texts of x_ticks read upwards.
    """

    def __init__(self, size, x, y, *, title, note="", note_fill=FAINT, x_ticks=(), y_ticks=(), x_label="", y_label="",
                 left=58, bottom=30, text_size=12, upright=False):
        self.x, self.y, self.left, self.right, self.bottom = x, y, left, left + size[0], TOP + size[1]
        self.image = Image.new("RGB", (self.right + RIGHT, self.bottom + bottom), "white")
        draw = ImageDraw.Draw(self.image)
        for value, text in y_ticks:
            row = round(self.place(x[0], value)[1])
            draw.line([left, row, self.right, row], GRID)
            text_line(draw, (left - 8, row), text, anchor="rm", size=text_size, fill=FAINT, width=left - 12)
        for value, text in x_ticks:
            column = round(self.place(value, y[0])[0])
            draw.line([column, TOP, column, self.bottom], GRID)
            if upright:
                self.text_upwards((column, self.bottom), text, size=text_size, width=bottom - 30)
            else:
                text_line(draw, (column, self.bottom + 7), text, anchor="ma", size=text_size, fill=FAINT)
        draw.line([left, self.bottom, self.right, self.bottom], FAINT)
        text_line(draw, (left + size[0] / 2, self.image.height - 14), x_label, anchor="mm", size=12, fill=FAINT)
        self.text_upwards((12, TOP), y_label, size=12, width=size[1])
        text_line(draw, (self.right, 24), note, anchor="rm", size=12, fill=note_fill)
        text_line(draw, (left, 24), title, size=16, width=size[0] - 10 - draw.textlength(note, font(12)))

    def place(self, x, y):
        """Values, numbers or arrays -> column and row in the picture."""
        (x0, x1), (y0, y1) = self.x, self.y
        return (self.left + (x - x0) / (x1 - x0) * (self.right - self.left),
                self.bottom - (y - y0) / (y1 - y0) * (self.bottom - TOP))

    def text_upwards(self, xy, text, *, size, width):
        """A line of text that reads upwards around column x and ends at row y, `width` pixels long at most."""
        mask = ImageOps.invert(label(text, width, size=size, fill="black", right=True).convert("L"))
        mask = mask.rotate(90, expand=True)
        self.image.paste(FAINT, (xy[0] - mask.width // 2, xy[1]), mask)

    def lines(self, xs, lines):
        """lines: [(values (N,), colour, width, radius of the dots)]; a gap wherever a value is not finite."""
        big = self.image.resize([side * FINE for side in self.image.size], Image.Resampling.NEAREST)
        draw = ImageDraw.Draw(big)
        for ys, colour, width, radius in lines:
            points, finite = (np.stack(self.place(xs, ys), 1) + 0.5) * FINE, np.isfinite(ys)
            for i in np.flatnonzero(finite):
                if i and finite[i - 1]:
                    draw.line([*points[i - 1], *points[i]], colour, width * FINE)
                draw.circle(points[i].tolist(), radius * FINE, colour)
        self.image = big.reduce(FINE)

    def bar(self, x0, y0, x1, y1, colour):
        """A filled rectangle from the lower left to the upper right corner, at least a pixel wide and high."""
        (left, bottom), (right, top) = self.place(x0, y0), self.place(x1, y1)
        left, top, right, bottom = map(round, (left, top, right, bottom))
        ImageDraw.Draw(self.image).rectangle([left, min(top, bottom - 1), max(right - 1, left), bottom - 1], colour)

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


def categories(names, pitch):
    """-> ticks in the middle of cells of `pitch` pixels that count from 0, (place, name) pairs, and the size of their
    text; every second, third, ... name where all would overlap."""
    size = min(13, max(9, math.floor(pitch)))
    return [(k + 0.5, names[k]) for k in range(0, len(names), math.ceil(size / pitch))], size
