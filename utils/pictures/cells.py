"""Tables: rows, which are dicts, as aligned text, Markdown, CSV or a picture.

The columns are the keys of all rows in order of first appearance; a missing key or None is an empty cell.
"""
import csv
import io
import math

from PIL import ImageOps

from utils.files import write_text
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


def as_csv(rows):
    """CSV text; floats have six significant digits, integers are exact."""
    file = io.StringIO()
    table = csv.DictWriter(file, column_names(rows), lineterminator="\n")
    table.writeheader()
    table.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return file.getvalue()


def write_csv(path, rows):
    """Writes `as_csv(rows)`, in place of an older file. Raises UserError if the file cannot be written."""
    write_text(path, as_csv(rows))


def as_text(rows, *, markdown=False):
    """Text with aligned columns, or a Markdown table; floats have four significant digits."""
    columns = []
    for texts, numeric in _columns(rows):
        if markdown:
            texts = [text.replace("|", "\\|") for text in texts]
            texts.insert(1, "--:" if numeric else "---")
        width = max(map(len, texts))
        columns.append([text.rjust(width) if numeric else text.ljust(width) for text in texts])
    return "".join("| " + " | ".join(line) + " |\n" if markdown else "  ".join(line).rstrip() + "\n"
                   for line in zip(*columns))


def as_picture(title, rows):
    """A Pillow image of the table, its title above."""
    columns = []
    for texts, numeric in _columns(rows):
        width = min(WIDEST, math.ceil(max(map(font(12).getlength, texts))) + 3 * GAP)
        columns.append([label(text, width, fill=INK if r else FAINT, right=numeric) for r, text in enumerate(texts)])
    table = join([join(column, 1) for column in columns or [[label("")]]], 0)
    return ImageOps.expand(join([label(title, size=14), table], 1), GAP, "white")
