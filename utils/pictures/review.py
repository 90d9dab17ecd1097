"""Which samples a run gets wrong: the review of a run, and a ranking of samples over runs, for relabelling.

    python -m utils.report noise runs/seg/fold0 runs/seg/fold1 ...     # -> noise.csv, the worst first

A run's samples.csv has a row per validation sample: name (the image's path), score (higher is better: IoU, F1, -loss),
and more columns that depend on the task. No net is run here.
"""
import itertools
import math
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.files import read_csv
from utils.pictures import cells
from utils.pictures.sheets import draw_sheet, in_rows, join, save_image


# ---- review of a run -------------------------------------------------------------------------------------------------
def worst_and_best(scores, worst=12, best=4):
    """-> (indices of the lowest scores, lowest first; of the highest of the others, highest first). There are more of
    the worst, because wrong labels are among them."""
    order = np.argsort(scores, kind="stable").tolist()
    return order[:worst], order[worst:][::-1][:best]


def score_and_name(sample):
    return f"{sample['score']:.4f}   {Path(sample['name']).name}"


def write_review(folder, samples, draw, tables, *, caption=score_and_name, across=1, **options):
    """Writes into a run's folder samples.csv and review.png (the worst and the best samples, `across` of them side by
    side, and tables below). Raises UserError when they cannot be written.

    samples: the rows of samples.csv. draw: a function that makes of a list of indices a list of lists of pictures,
    uint8 (H, W, 3). tables: {title: rows}, metrics by class and by size. caption: a function of a row of samples.csv.
    options: of `sheets.draw_sheet`.
    """
    parts = worst_and_best([sample["score"] for sample in samples])
    pictures = draw(sum(parts, []))
    captions = [f"{part} {i}:   {caption(samples[k])}" for part, indices in zip(("worst", "best"), parts)
                for i, k in enumerate(indices, 1)]
    sheet = draw_sheet([sum(row, []) for row in in_rows(pictures, across)], captions=in_rows(captions, across),
                       **options)
    save_image(f"{folder}/review.png", join([sheet, *itertools.starmap(cells.as_picture, tables.items())], 1))
    cells.write_csv(f"{folder}/samples.csv", samples)


# ---- label noise -----------------------------------------------------------------------------------------------------
def rank_samples(runs):
    """Run folders -> [{"rank": 1, ..., "name", "score", "run"}], the lowest score first (of equals, by name).

    A net has not learned the labels of held-out samples by heart; the folds of one split hold out every sample once. A
    sample in several tables gets the mean of its scores. Raises UserError naming a table that is missing or damaged.
    """
    found = {}
    for run in dict.fromkeys(map(str, runs)):
        for row in _read(Path(run) / "samples.csv", "score", "train the run with validation, or leave it out"):
            found.setdefault(row["name"], []).append((row["score"], run))
    order = sorted((sum(score for score, _ in rows) / len(rows), name) for name, rows in found.items())
    return [{"rank": rank, "name": name, "score": score, "run": "; ".join(run for _, run in found[name])}
            for rank, (score, name) in enumerate(order, 1)]


def read_noise(path, count=None, run=None):
    """noise.csv -> the names of the `count` worst (None: all), by rank, whatever the order and number of its rows has
    become. With a run's folder, only the names that are in its samples.csv: the samples that it has held out.

    Raises UserError when a table is missing or damaged, or when the run has held out none.
    """
    rows = _read(path, "rank", "make it with python -m utils.report noise RUN ...")
    names = [row["name"] for row in sorted(rows, key=lambda row: row["rank"])][:count]
    if run is None:
        return names
    samples = _read(f"{run}/samples.csv", "score", "give a checkpoint in its run's folder")
    held_out = {row["name"] for row in samples}.intersection(names)
    if not held_out:
        raise UserError(f"{path}: {run} has held out none of the {len(names)} worst samples; take another run's "
                        f"checkpoint")
    return [name for name in names if name in held_out]


def _read(path, number, remedy):
    """A CSV's rows, at least one, each with a `name` and a finite `number`; other columns stay text."""
    header, *table = [cells for cells in read_csv(path, remedy) if cells] or [[]]
    rows = [dict(zip(header, cells)) for cells in table]
    for line, row in enumerate(rows or [{}], 2):
        try:
            row[number] = float(row[number])
            if not row["name"] or not math.isfinite(row[number]):
                raise ValueError
        except (ValueError, KeyError):  # KeyError: no such column, or a row that ends early
            raise UserError(f"{path}: line {line} has no name or no number as {number}; {remedy}") from None
    return rows
