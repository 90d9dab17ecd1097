"""What a training run writes for a human: results.csv, results.png, TensorBoard and Weights & Biases.

The picture sheets are in utils/pictures/sheets.py. Only torch, numpy and Pillow are needed; TensorBoard and W&B are imported
when they are asked for. Every file is written whole or not at all.
"""
import csv
import importlib
import math
import numbers
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from utils.errors import UserError
from utils.files import whole_file, write_text
from utils.pictures import table
from utils.pictures.sheets import FAINT, font, text_line

PANEL, AXES, FINE = (400, 270), (58, 44, 384, 240), 3  # panel size; axes' left, top, right, bottom; supersampling
GRID, LINE, BEST = (232, 235, 239), (37, 99, 214), (234, 88, 12)


def _plain(value):
    """A one-element tensor or numpy scalar as the Python value that it holds; anything else unchanged."""
    return value.item() if hasattr(value, "item") else value


def _numbers(row):
    """The entries of one row that are numbers, as floats (NaN included; text, None and flags are left out)."""
    row = {key: _plain(value) for key, value in row.items()}
    return {k: float(v) for k, v in row.items() if isinstance(v, numbers.Real) and not isinstance(v, bool)}


def write_csv(path, rows):
    """Writes the rows (one dict per epoch) as one table, replacing the file: a resumed run has no duplicate rows.

    The columns are all keys in order of first appearance; a missing key or None is an empty cell. Floats get six
    significant digits, whole numbers stay exact. What is no text in a file's name is written as an escape: "\\udce9".
    Raises UserError if the file cannot be written.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [{k: _plain(v) for k, v in row.items()} for row in rows]
    cells = [{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in cells]
    with whole_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8",
                                             errors="backslashreplace") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(cells)


def _limits(values):
    """Smallest and largest finite value with a margin, never equal: (low, high). No finite value: (0, 1)."""
    values = values[np.isfinite(values)]
    low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
    size = max(abs(low), abs(high))
    margin = 0.06 * ((high - low if high - low > 1e-6 * size else size) or 1.0)
    return low - margin, high + margin


def _ticks(low, high, whole=False):
    """[(value, label)] at 3 to 5 round numbers in [low, high]: the coarsest step that gives three of them.

    whole: only whole numbers, for epochs (then a short axis may have fewer than three).
    """
    top = math.floor(math.log10(high - low)) + 1
    for step in (base * 10.0 ** power for power in range(max(top, 0) if whole else top, -330, -1)
                 for base in (5, 2.5, 2, 1)):
        values = np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step
        if not (whole and step % 1) and (len(values) >= 3 or whole and step == 1):
            break
    if 1e-2 <= max(abs(low), abs(high)) < 1e5:
        digits = next((d for d in range(9) if abs(round(step, d) - step) < 1e-6 * step), 9)
        return [(value, f"{value + 0.0:.{digits}f}") for value in values]
    return [(v, np.format_float_scientific(v, 3, trim="-", exp_digits=1) if v else "0") for v in values]


def _best(key, values):
    """Index of the best value where the name tells which direction is better, else None."""
    if "loss" in key.lower():
        pick = np.nanargmin if "val" in key.lower() else None
    else:
        pick = np.nanargmax if table.higher_is_better(key) else None
    finite = np.where(np.isfinite(values), values, np.nan)
    return int(pick(finite)) if pick and not np.isnan(finite).all() else None


def _panel(title, xs, ys):
    """One curve as a picture of size PANEL. xs: finite (N,); ys: (N,), a gap wherever it is not finite."""
    left, top, right, bottom = AXES
    (x0, x1), (y0, y1) = _limits(xs), _limits(ys)

    def to_x(x):
        return left + (x - x0) / (x1 - x0) * (right - left)

    def to_y(y):  # rows count downwards
        return bottom - (y - y0) / (y1 - y0) * (bottom - top)

    big = Image.new("RGB", (PANEL[0] * FINE, PANEL[1] * FINE), "white")
    draw = ImageDraw.Draw(big)

    def rule(ax, ay, bx, by, colour):  # whole pixels of the reduced picture, so that it stays crisp
        ax, ay, bx, by = round(ax), round(ay), round(bx), round(by)
        draw.rectangle([ax * FINE, ay * FINE, bx * FINE + FINE - 1, by * FINE + FINE - 1], colour)

    x_ticks, y_ticks = _ticks(x0, x1, whole=not (xs % 1).any()), _ticks(y0, y1)
    for value, _ in y_ticks:
        rule(left, to_y(value), right, to_y(value), GRID)
    for value, _ in x_ticks:
        rule(to_x(value), bottom, to_x(value), bottom + 4, FAINT)
    rule(left, bottom, right, bottom, FAINT)

    points = [((to_x(x) + 0.5) * FINE, (to_y(y) + 0.5) * FINE) for x, y in zip(xs, ys)]
    shown, best = np.flatnonzero(np.isfinite(ys)), _best(title, ys)
    for a, b in zip(shown, shown[1:]):
        if b == a + 1:
            draw.line([points[a], points[b]], LINE, 2 * FINE)
    radius = min(3.2, max(1.4, 0.3 * (right - left) / max(1, len(shown))))  # the dots also round the corners
    marks = [(i, radius, LINE) for i in shown] + [(best, 6, "white"), (best, 4.5, BEST)] * (best is not None)
    for i, size, colour in marks:
        draw.circle(points[i], size * FINE, colour)

    panel = big.reduce(FINE)  # text is drawn after the reduction: hinted at its real size it is sharper
    draw = ImageDraw.Draw(panel)
    for value, label in x_ticks:
        text_line(draw, (to_x(value), bottom + 9), label, anchor="ma", size=12, fill=FAINT)
    for value, label in y_ticks:
        text_line(draw, (left - 8, to_y(value)), label, anchor="rm", size=12, fill=FAINT, width=left - 8)
    note = "no finite value" if not len(shown) else f"last {ys[shown[-1]]:.4g}"
    if best is not None:
        note = f"best {ys[best]:.4g} at {xs[best]:g}"
    text_line(draw, (right, 24), note, anchor="rm", size=12, fill=FAINT if best is None else BEST)
    text_line(draw, (left, 24), title, size=16, width=right - left - 10 - draw.textlength(note, font(12)))
    return panel


def plot_curves(path, rows, *, x="epoch"):
    """Draws one panel per numeric key of the rows other than `x`, at most four abreast, to an image file.

    NaN, infinite and missing values leave gaps; a row without a number under `x` stands at its index. The best
    value is marked where the name tells the direction (iou, map, f1, ...: largest; val loss: smallest).
    """
    rows = [_numbers(row) for row in rows]
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key != x]
    xs = np.array([row.get(x, i) for i, row in enumerate(rows)], float)
    xs = np.where(np.isfinite(xs), xs, np.arange(len(xs)))
    across = max(1, min(4, len(keys)))
    size = PANEL[0] * across, PANEL[1] * max(1, math.ceil(len(keys) / across))
    sheet = Image.new("RGB", size, "white")
    for i, key in enumerate(keys):
        panel = _panel(key, xs, np.array([row.get(key, math.nan) for row in rows], float))
        sheet.paste(panel, (i % across * PANEL[0], i // across * PANEL[1]))
    with whole_file(path) as temporary:
        sheet.save(temporary)


# ---- loggers ---------------------------------------------------------------------------------------------------------
class Loggers:
    """Forwards a row's numbers to every sink, a (log(numbers, step), close()) pair; with no sink it does nothing."""

    def __init__(self, sinks=()):
        self.sinks = list(sinks)

    def log(self, row, step):
        """row: dict, of which the numbers are sent. step: int, never smaller than the last one."""
        for log, _ in self.sinks:
            log(_numbers(row), step)

    def close(self):
        """Flushes and ends every sink."""
        for _, close in self.sinks:
            close()


def _ask(module, name, package):
    """The object `name` of an optional package, or a UserError that says what to install."""
    try:  # a folder that only happens to be called "wandb" imports as an empty package: hence AttributeError
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--{package}: {package} cannot be imported ({error}); pip install {package}") from error


def make_loggers(run_dir, *, tensorboard=False, wandb=False, name="", config=None):
    """Boards that write TensorBoard events to run_dir and a W&B run, each when asked for; only rank 0 should ask.

    name: of the W&B run (default: the folder's); config: dict of plain values shown with it. The W&B project is
    WANDB_PROJECT or the folder above the run's; WANDB_MODE=offline works without an account or a network. The run's id
    is kept in run_dir/wandb_id.txt, so that a resumed run continues its own curves.
    Raises UserError if a package is missing or W&B cannot start.
    """
    run_dir, sinks = Path(run_dir), []
    if tensorboard:
        writer = _ask("torch.utils.tensorboard", "SummaryWriter", "tensorboard")(str(run_dir))

        def add_scalars(row, step):
            for key, value in row.items():
                writer.add_scalar(key, value, step)
        sinks.append((add_scalars, writer.close))
    if wandb:
        start = _ask("wandb", "init", "wandb")
        kept = run_dir / "wandb_id.txt"
        run_id = kept.read_text().strip() if kept.exists() else ""
        project = os.environ.get("WANDB_PROJECT") or run_dir.resolve().parent.name
        try:
            run = start(project=project, name=name or run_dir.resolve().name, dir=str(run_dir), config=config,
                        id=run_id or None, resume="allow")
        except Exception as error:  # no account, no network, a deleted run: all of them are the user's to settle
            message = " ".join(str(error).split())
            raise UserError(f"--wandb: W&B did not start ({message}); `wandb login`, or WANDB_MODE=offline") from error
        write_text(kept, run.id)
        sinks.append((lambda row, step: run.log(row, step=step), run.finish))
    return Loggers(sinks)
