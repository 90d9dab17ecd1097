"""Tables: rows, which are dicts, as aligned text, CSV or a picture.

The columns are the keys of all rows in order of first appearance; a missing key or None is an empty cell.
"""
import math

from PIL import ImageOps

from utils import files
from utils.pictures.sheets import FAINT, GAP, INK, font, join, label

WIDEST = 300  # pixels of a column of a picture


def column_names(rows):
    return list(dict.fromkeys(key for row in rows for key in row))


def _columns(rows):
    """-> [(texts: the name and the cells; whether the cells are numbers, which stand on the right)]"""
    def text(value):
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())

    columns = {name: [row.get(name) for row in rows] for name in column_names(rows)}
    return [([name, *map(text, values)], all(isinstance(value, (int, float, type(None))) for value in values))
            for name, values in columns.items()]


def write_csv(path, rows):
    """Writes a CSV, in place of an older file; floats have six significant digits, integers are exact. Raises UserError
    if the file cannot be written."""
    names = column_names(rows)
    files.write_csv(path, names, [[f"{value:.6g}" if isinstance(value, float) else value
                                   for value in map(row.get, names)] for row in rows])


def as_text(rows):
    """Text with aligned columns; floats have four significant digits."""
    columns = []
    for texts, numeric in _columns(rows):
        width = max(map(len, texts))
        columns.append([text.rjust(width) if numeric else text.ljust(width) for text in texts])
    return "".join("  ".join(line).rstrip() + "\n" for line in zip(*columns))


def as_picture(title, rows):
    """A Pillow image of the table, its title above."""
    columns = []
    for texts, numeric in _columns(rows):
        width = min(WIDEST, math.ceil(max(map(font(12).getlength, texts))) + 3 * GAP)
        columns.append([label(text, width, fill=INK if r else FAINT, right=numeric) for r, text in enumerate(texts)])
    table = join([join(column, 1) for column in columns or [[label("")]]], 0)
    return ImageOps.expand(join([label(title, size=14), table], 1), GAP, "white")
