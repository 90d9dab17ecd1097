"""Which samples a run gets wrong: a ranking for relabelling, a page of the best and worst, scores by size.

    python -m utils.report noise runs/seg/fold0 runs/seg/fold1 ...     # -> noise.csv, the worst first, and pictures

A run's samples.csv has a row per validation sample: name (the image's path), score (higher is better: IoU, F1, -loss),
of the worst a picture in the run's folder, and whatever else is known of it. No net is run here.
"""
import contextlib
import csv
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from utils.train import dist
from utils.errors import UserError
from utils.files import whole_file
from utils.pictures.sheets import FAINT, contact_sheet, draw_sheet, font, text_line


# ---- label noise -----------------------------------------------------------------------------------------------------
def rank(runs):
    """Run folders -> [{"rank": 1, ..., "name", "score", "run", "picture": path or ""}], the lowest score first (of
    equals, by name).

    Held-out samples are judged by a net that has not learned their labels by heart: of the folds of one split, every
    sample once. A sample in several tables gets the mean of its scores. Raises UserError naming a table that is
    missing or damaged.
    """
    scores, places, drawn = {}, {}, {}
    for run in dict.fromkeys(map(str, runs)):
        for row in _read(Path(run) / "samples.csv", "score", "train the run with validation, or leave it out"):
            scores.setdefault(row["name"], []).append(row["score"])
            places.setdefault(row["name"], {})[run] = None
            if row.get("picture"):
                drawn.setdefault(row["name"], str(Path(run) / row["picture"]))
    order = sorted((sum(found) / len(found), name) for name, found in scores.items())
    return [{"rank": i, "name": name, "score": score, "run": "; ".join(places[name]), "picture": drawn.get(name, "")}
            for i, (score, name) in enumerate(order, 1)]


def keep(folder, samples, rows, captions, *, titles=None, max_side=256):
    """Writes pictures of a run's worst samples to folder/worst, and their names into the samples' rows of samples.csv.

    samples: those rows, the worst first; rows, captions: of each a list of pictures and a text, see
    `pictures.contact_sheet`.
    """
    for i, (sample, row, caption) in enumerate(zip(samples, rows, captions), 1):
        sample["picture"] = f"worst/{i:02}.jpg"
        contact_sheet(Path(folder) / sample["picture"], [row], titles=titles, captions=[caption], max_side=max_side)


def draw_noise(path, ranked):
    """Writes the pictures that rows of `rank` have, one below the other, as one; without any (of runs of an earlier
    version, or deleted since) nothing. Returns their number. Raises UserError when it cannot be written."""
    pictures = []
    for row in ranked:
        with contextlib.suppress(OSError), Image.open(row["picture"]) as image:
            pictures.append(image.convert("RGB"))
    if pictures:
        _stack(path, pictures)
    return len(pictures)


def read_noise(path, count=None, run=None):
    """noise.csv -> the names of the `count` worst (None: all), by rank, whatever the order and number of its rows has
    become; of those, with a run's folder, the ones that are in its samples.csv: that it has held out.

    Raises UserError when a table is missing or damaged, or when the run has held out none.
    """
    rows = _read(path, "rank", "make it with python -m utils.report noise RUN ...")
    names = [row["name"] for row in sorted(rows, key=lambda row: row["rank"])][:count]
    if run is None:
        return names
    samples = _read(Path(run) / "samples.csv", "score", "give a checkpoint in its run's folder")
    held_out = {row["name"] for row in samples}
    if held_out.isdisjoint(names):
        raise UserError(f"{path}: {run} has held out none of the {len(names)} worst samples; take another run's "
                        f"checkpoint")
    return [name for name in names if name in held_out]


def _read(path, number, remedy):
    """A CSV's rows, each with a `name` and a finite `number`; other columns stay text."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, strict=True)
            rows = []
            for row in table:
                row[number] = float(row[number])
                if not row["name"] or not math.isfinite(row[number]):
                    raise ValueError
                rows.append(row)
    except FileNotFoundError:
        raise UserError(f"{path}: no such table; {remedy}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except (ValueError, TypeError, KeyError, csv.Error):  # KeyError: no such column; TypeError: a row that ends early
        raise UserError(f"{path}: line {table.line_num} has no name or no number as {number}; {remedy}") from None
    if not rows:
        raise UserError(f"{path}: has no rows; {remedy}")
    return rows


# ---- segmentation by size --------------------------------------------------------------------------------------------
def components(labels):
    """labels (H, W) or (B, H, W), integers -> int64, the same shape: 0 where labels <= 0, else the number 1, 2, ... of
    the pixel's component, in the order of their first pixels, through the whole batch.

    Two pixels of one label are connected when they touch, at a corner too (8-connectivity, OpenCV's default). Each
    row's runs of one label are joined with those that they touch in the next row: every run hooks itself under the
    first one that it touches, then paths are halved (Shiloach and Vishkin 1982); a handful of passes, however winding
    a component is.
    """
    batch = labels if labels.ndim == 3 else labels[None]
    inside, width = batch > 0, batch.shape[2]
    starts = inside.clone()
    starts[..., 1:] &= batch[..., 1:] != batch[..., :-1]
    run = starts.flatten().cumsum(0).view(batch.shape) - 1  # of a pixel inside, in reading order
    pairs = []
    for dx in (-1, 0, 1):
        above, below = slice(max(-dx, 0), width - max(dx, 0)), slice(max(dx, 0), width - max(-dx, 0))
        same = inside[:, :-1, above] & (batch[:, :-1, above] == batch[:, 1:, below])
        pair = torch.stack((run[:, :-1, above][same], run[:, 1:, below][same]))
        new = torch.ones_like(pair[0], dtype=torch.bool)
        new[1:] = (pair[:, 1:] != pair[:, :-1]).any(0)  # two runs touch along many pixels
        pairs.append(pair[:, new])
    low, high = torch.cat(pairs, 1)
    start = torch.arange(int(starts.sum()), device=labels.device)
    root = start.clone()
    while low.numel():
        root.scatter_reduce_(0, high, low, "amin")
        while not torch.equal(above := root[root], root):
            root = above
        one, other = root[low], root[high]
        low, high = torch.minimum(one, other)[one != other], torch.maximum(one, other)[one != other]
    numbers = (root == start).cumsum(0)[root]  # a root has the first pixel of its component
    return torch.zeros_like(batch, dtype=torch.int64).masked_scatter_(inside, numbers[run[inside]]).view(labels.shape)


class SegmentationReview:
    """What a validation learns about each image and each object of the truth; update() and reduce() as in
    utils/metrics.

    Class 0 is background. An image's IoU is that of all other classes together: pixels of the right class, by those
    predicted plus those labelled minus the right ones; 1 when there are none. An object is a component of the truth;
    it is found when at least half of its pixels have the right class. ignore: label of pixels that do not count.
    """

    def __init__(self, ignore=None):
        self.ignore = ignore
        self.images = [np.zeros((0, 6), np.int64)]  # index, right, predicted, actual pixels, objects, found ones
        self.objects = [np.zeros((0, 2), np.int64)]  # pixels, found

    @torch.no_grad()
    def update(self, index, predicted, truth):
        """index (B,), the images' numbers; predicted, truth (B, H, W), class indices (bool or 0 and 1 where there is
        one class). ValueError when the shapes differ."""
        if predicted.shape != truth.shape or truth.ndim != 3 or len(index) != len(truth):
            raise ValueError(f"predictions {tuple(predicted.shape)} and truth {tuple(truth.shape)} must both be "
                             f"(B,H,W), with {len(index)} images")
        predicted, truth = predicted.long(), truth.long()
        if self.ignore is not None:
            void = truth == self.ignore
            predicted, truth = predicted.masked_fill(void, 0), truth.masked_fill(void, 0)
        right = (predicted == truth) & (truth > 0)
        numbers = components(truth)
        pixels = torch.bincount(numbers.flatten())[1:]
        covered = torch.bincount(numbers[right], minlength=len(pixels) + 1)[1:]
        found = (2 * covered >= pixels).long()
        last = numbers.flatten(1).amax(1).cummax(0).values  # the highest number so far, image by image
        first = torch.cat((last.new_zeros(1), last[:-1]))
        sums = torch.cat((found.new_zeros(1), found.cumsum(0)))
        rows = [torch.as_tensor(index).to(truth), right.sum((1, 2)), (predicted > 0).sum((1, 2)),
                (truth > 0).sum((1, 2)), last - first, sums[last] - sums[first]]
        self.images.append(torch.stack(rows, 1).cpu().numpy())
        self.objects.append(torch.stack((pixels, found), 1).cpu().numpy())

    def reduce(self):
        """Gathers the rows of all ranks, if there are several: every rank calls it once. Returns self."""
        self.images = dist.gather(np.concatenate(self.images))
        self.objects = dist.gather(np.concatenate(self.objects))
        return self

    def samples(self, names):
        """The rows of samples.csv, for `report.write_csv`; names: by the images' numbers."""
        images = np.concatenate(self.images)
        images = images[images[:, 0].argsort(kind="stable")]
        return [{"name": str(names[i]), "score": _iou(right, predicted, actual), "area": actual,
                 "predicted": predicted, "objects": objects, "found": found}
                for i, right, predicted, actual, objects, found in images.tolist()]

    def tables(self):
        """{title: rows} for `page`: the IoU over all pixels of the images with small and with large positive area,
        the share of small and of large objects found. Small: up to the median. Of images without positives, whose
        IoU is 0 or 1, it is the mean."""
        images, objects = np.concatenate(self.images), np.concatenate(self.objects)
        empty, filled = images[images[:, 3] == 0], images[images[:, 3] > 0]
        by_area = [row | {"images": len(part), "iou": _iou(*part[:, 1:4].sum(0).tolist())}
                   for row, part in _halves(filled, filled[:, 3])]
        if len(empty):
            by_area.append({"size": "empty", "pixels": "0", "images": len(empty),
                            "iou": float((empty[:, 2] == 0).mean())})
        by_object = [row | {"objects": len(part), "recall": float(part[:, 1].mean())}
                     for row, part in _halves(objects, objects[:, 0])]
        return {"Images by positive area": by_area, "Objects by area": by_object}


def _iou(right, predicted, actual):
    return right / (predicted + actual - right) if predicted + actual else 1.0


def _halves(rows, sizes):
    """[({"size", "pixels": range}, rows)] of the small ones, up to the median, and of the large ones, where any."""
    limit = np.median(sizes) if len(sizes) else 0
    return [({"size": name, "pixels": f"{sizes[part].min()} to {sizes[part].max()}"}, rows[part])
            for name, part in (("small", sizes <= limit), ("large", sizes > limit)) if part.any()]


# ---- page ------------------------------------------------------------------------------------------------------------
def ends(scores, worst=12, best=4):
    """-> (indices of the lowest scores, lowest first; of the highest of the others, highest first). More of the worst:
    wrong labels are among them."""
    order = np.argsort(scores, kind="stable").tolist()
    return order[:worst], order[worst:][::-1][:best]


def page(path, parts, *, tables, titles, max_side=256):
    """Writes samples and tables as one picture, see `sheet`, and the worst one by one, see `keep`.

    parts: {"worst": samples, "best": samples}; a sample is (its row of samples.csv, pictures), pictures uint8
    (H, W, 3), one per title. max_side: of `pictures.draw_sheet`.
    """
    def caption(sample):
        return f"{sample['score']:.4f}   {Path(sample['name']).name}"

    rows = [pictures for samples in parts.values() for _, pictures in samples]
    captions = [f"{part} {i}:   {caption(sample)}" for part, samples in parts.items()
                for i, (sample, _) in enumerate(samples, 1)]
    sheet(path, rows, tables=tables, titles=titles, captions=captions, max_side=max_side)
    worst, rows = zip(*parts["worst"])
    keep(Path(path).parent, worst, rows, map(caption, worst), titles=titles, max_side=max_side)


def sheet(path, rows, *, tables=None, **options):
    """Writes what `pictures.contact_sheet(path, rows, **options)` does, and tables below: {title: [{column: value}]},
    of a model's metrics per class and by size. Raises UserError when it cannot be written."""
    drawn = [_table(title, entries) for title, entries in (tables or {}).items()]
    _stack(path, [draw_sheet(rows, **options), *drawn])


def _stack(path, pictures):
    """Writes pictures, one below the other, as one."""
    whole = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height
    with whole_file(path) as temporary:
        whole.save(temporary)


def _table(title, rows):
    """A picture of a table: columns are the keys in order of first appearance, numbers stand on the right."""
    margin, gap, line = 8, 24, 20
    columns = list(dict.fromkeys(key for row in rows for key in row))
    texts = [[str(f"{v:.4f}" if isinstance(v, float) else v) for v in (row.get(c, "") for c in columns)]
             for row in rows]
    right = [all(isinstance(row.get(c, 0), (int, float)) for row in rows) for c in columns]
    widths = [math.ceil(max(font(12).getlength(t) for t in column)) for column in zip(columns, *texts)]
    width = max(sum(widths) + gap * len(widths), math.ceil(font(14).getlength(title))) + 2 * margin
    picture = Image.new("RGB", (width, line * (len(rows) + 2) + 2 * margin), "white")
    draw = ImageDraw.Draw(picture)
    text_line(draw, (margin, margin + line / 2), title, size=14)
    for r, cells in enumerate([columns, *texts], 1):
        left = margin
        for cell, wide, at_right in zip(cells, widths, right):
            place = (left + wide * at_right, margin + line * (r + 0.5))
            style = {"fill": FAINT} if r == 1 else {}
            text_line(draw, place, cell, size=12, anchor="rm" if at_right else "lm", **style)
            left += wide + gap
    return picture
