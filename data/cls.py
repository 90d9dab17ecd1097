"""Classification data: images and a table of answers (several classes an image, or one), or a folder per class.

    resources/dirty_mnist_2nd/00000.png ...   resources/dirty_mnist_2nd_answer.csv: index,a,b, ... z of 0 and 1
    DATA/train/*.jpg                          DATA/train.csv: name,label        or: name and a column per class
    DATA/train/cat/*.jpg  DATA/train/dog/*.jpg          and, if they are there: DATA/val/cat/*.jpg ...

In place of train and val: training, valid, validation, dev, in capitals too; test parts are left out. val.csv beside
train.csv, and a column split, part, set or subset of a table, tell the part as well.
"""
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from data import augment, bad, folds, images, units
from data.augment import mix
from data.cache import Cache
from utils.errors import UserError
from utils.files import by_name, finder, list_tree, read_csv
from utils.ops import geometry
from utils.train import dist

ANSWER = "_answer"  # the competition's dirty_mnist_2nd_answer.csv belongs to the folder dirty_mnist_2nd
COMPETITION = f"dirty_mnist_2nd{ANSWER}.csv"
COMPETITION_TEST = "test_dirty_mnist_2nd"
TRUTHS = {"true": 1.0, "false": 0.0}
PART_COLUMNS = ("split", "part", "set", "subset")
SEVERAL = ("labels", "tags", "classes", "categories", "targets", "attributes")  # columns of several labels a row
ONE = ("label", "tag", "class", "category", "target", *SEVERAL)  # such a column is no class itself


class Samples(NamedTuple):
    """Images and their classes, a row per image."""
    files: list     # Path
    labels: object  # float32 (N, classes) of 0 and 1
    names: list     # of the classes
    single_label: bool  # every image has one class
    held_out: list = ()  # True where the data set itself has the image for validation

    def usable(self, root, bands, allow_bad=False):
        """The Samples without the images that cannot be read, see `bad.readable`. root: where they are."""
        columns = self.files, self.labels, self.held_out
        files, labels, held_out = bad.readable(root, columns, bands, allow_bad=allow_bad)
        return self._replace(files=files, labels=np.stack(labels), held_out=held_out)


def read(root, *, table=None, folder=None, columns=None, least=2):
    """-> Samples, of a CSV and a folder of images, or of one folder per class.

    table, folder: where they are; without: `*_answer.csv` or `train.csv` (and `val.csv`) in root, and the folder of
    that name, else `images`, else root. columns: see `read_table`. Every row needs its image. least: so many classes at
    least. Raises UserError naming file and line.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; put the data there, or point --data to it (python -m data.samples "
                        f"makes sample data)")
    tables = [Path(table)] if table else _tables(root)
    if not tables:
        if folder or columns:
            raise UserError(f"{f'--images {folder}' if folder else '--columns'}: is for a table, and {root} has none; "
                            f"name it by --labels")
        return _class_folders(root, least)
    places = {}
    for path in tables:
        usual = root / path.stem.removesuffix(ANSWER), root / "images", root
        places[path] = Path(folder or next(filter(Path.is_dir, usual)))
    find_in = {place: find_files(place) for place in places.values()}
    rows, labels, names, single_label = read_table(tables, least, columns)
    files, lost = {}, []
    for path, key, _ in rows:
        file = find_in[places[path]](key)
        lost += [] if file else [f"{path}: {key[:80]} has no image in {places[path]}"]
        if files.setdefault(file or (path, key), (path, key)) != (path, key):
            raise UserError(f"{path}: {files[file][1]} and {key} are one image, {file}; remove one")
    if lost:
        raise UserError(f"{lost[0]} ({len(lost)} such); add it, or remove the row")
    spare = {path for place in find_in for path in images.find(place, below=True)} - set(files)
    if spare:
        dist.print0(f"{root}: {len(spare)} images have no row to train or validate on and are left out, such as "
                    f"{min(spare)}")
    return Samples(list(files), labels, names, single_label, [part == "val" for *_, part in rows])


def _tables(root):
    """The training table in root, and validation tables that belong to it; none where folders tell the classes."""
    part_of = {p: folds.PARTS.get(p.stem.lower()) for p in sorted(root.iterdir())
               if p.suffix.lower() == ".csv" and folds.part_of(p.stem) != "test"}
    train = [p for p, part in part_of.items() if p.stem.endswith(ANSWER) or part == "train"]
    if not train and len(part_of) == 1 and len(_folders(root)) < 2:
        train = list(part_of)
    train = [p for p in train if p.name == COMPETITION] or train
    if len(train) > 1:
        raise UserError(f"{root}: has the tables {train[0].name} and {train[1].name}; tell by --labels which one to "
                        f"train on")
    return train + [p for p, part in part_of.items() if train and part == "val"]


def test_folder(root):
    """Where the images without answers are that predict.py reads by default: the competition's, or `test`."""
    competition = Path(root) / COMPETITION_TEST
    return competition if competition.is_dir() else Path(root) / "test"


def find_files(folder):
    """-> function(name in a table) -> image file or None. Names are compared with their folders or without, with the
    suffix or without, in capitals or not, and as numbers."""
    files = images.find(folder, below=True)
    by_name(files, lambda path: path.with_suffix(""))
    path_of = {path.relative_to(folder).as_posix(): path for path in files}
    find = finder({_numbered(path.stem): path for path in files if path.stem.isdecimal()}
                  | {name.lower(): path for name, path in path_of.items()} | path_of)
    return lambda key: find(key) or find(key.lower()) or find(_numbered(key))


def _numbered(name):
    """Drops the leading zeros of a name that is a number; other names stay unchanged."""
    return f"#{int(name)}" if name.isdecimal() and len(name) < 20 else name


def read_table(tables, least=2, columns=None):
    """CSVs of the same columns -> rows (table, the image's name, part or None), labels (N, classes) float32, class
    names, and whether every image has a single label.

    columns: the column of the images, then the column of the label, or the columns of the classes. None: the first
    column has the images, and all others are classes, except a column split, part, set or subset which tells the part
    of every row. Rows for testing are left out; the rows of val.csv are for validation. One column holds the class, or
    several, see `split_labels`. Several columns are the classes, 0 or 1 in each row; images have a single label where
    every row has one 1.
    """
    header, rows, seen = None, [], {}
    for path in tables:
        lines = [(path, i, [value.strip() for value in row]) for i, row in enumerate(read_csv(path), 1) if row]
        first = lines[0][-1] if len(lines) > 1 else []
        if len(first) < 2:
            raise UserError(f"{path}: no header and rows of two columns or more, separated by commas; see the layouts "
                            f"in data/cls.py")
        header = header or first
        if first != header:
            raise UserError(f"{path}: has other columns than {tables[0]}; make them equal")
        rows += lines[1:]
    columns = columns or ()
    unknown = [name for name in columns if name not in header]
    if unknown or columns and len(columns) < 2:
        raise UserError(f"{path}: --columns: no column {(unknown or ['of labels'])[0]}; name the column of the "
                        f"images, then the columns of the labels; the table has {', '.join(header)[:300]}")
    key, *used = map(header.index, columns) if columns else range(len(header))
    for path, i, row in rows:
        if len(row) != len(header):
            raise UserError(f"{path}: line {i} has another number of columns than the header's {len(header)}; correct "
                            f"it")
        if seen.setdefault((path, row[key]), i) != i:
            raise UserError(f"{path}: line {i}: {row[key]} stands in line {seen[path, row[key]]} too; remove one")
    part = next((k for k, name in enumerate(header) if k != key and name.lower() in PART_COLUMNS
                 and name not in columns and all(row[k].lower() in folds.PARTS for *_, row in rows)), None)
    used = [k for k in used if k != part]
    parts = [folds.part_of(row[part]) if part is not None else "train" if path == tables[0] else "val"
             for path, _, row in rows]
    rows = [(*row, part) for row, part in zip(rows, parts) if part != "test"]
    values = [(f"{path}: line {i}", [row[k] for k in used]) for path, i, row, _ in rows]
    names = [header[k] for k in used]
    labels, names = _label_column(tables[0], names[0], values, least) if len(used) == 1 else \
        _class_columns(tables[0], header[key], names, values, columns)
    return [(path, row[key], part) for path, _, row, part in rows], labels, names, bool((labels.sum(1) == 1).all())


def split_labels(values, column):
    """The values of a label column -> lists of labels. They are joined by |, semicolon, comma or space where every
    label of a joined value also stands alone in some row, or where the column is named labels, tags or the like."""
    for mark in "|;, ":
        labels = [[label.strip() for label in value.split(mark) if label.strip()] for value in values]
        joined = {label for row in labels if len(row) > 1 for label in row}
        if joined and (column.lower() in SEVERAL or joined <= {row[0] for row in labels if len(row) == 1}):
            dist.print0(f"the column {column} holds several labels a row, joined by {mark!r}: {len(joined)} labels")
            return labels
    return [[value] for value in values]


def _label_column(path, column, rows, least):
    """-> labels, class names of the rows (place, [value]) of a column of labels."""
    empty = next((place for place, [value] in rows if not value), None)
    if empty:
        raise UserError(f"{empty} has no class; add it, or remove the row")
    values = split_labels([value for _, [value] in rows], column)
    names = sorted({name for row in values for name in row}, key=_numbers_first)
    if len(names) < least:
        raise UserError(f"{path}: all rows have the class {names[0][:80]}; there must be two or more")
    one_hot = dict(zip(names, np.eye(len(names), dtype=np.float32)))
    return np.stack([np.max([one_hot[name] for name in row], 0) for row in values]), names


def _class_columns(path, key, names, rows, chosen):
    """-> labels, class names of the rows (place, values) of a column of 0 and 1 per class."""
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two columns of one name; rename or remove one")
    label = next((name for name in names if name.lower() in ONE and not chosen), None)
    if label:
        raise UserError(f"{path}: has the column {label} beside {len(names) - 1} others, which may be no classes; name "
                        f"the columns by --columns {key} {label}")
    wrong = next(((place, value) for place, row in rows for value in row if _truth(value) not in (0, 1)), None)
    if wrong:
        raise UserError(f"{wrong[0]} has the value {wrong[1][:20]!r} in a column of a class; labels are 0 or 1, or "
                        f"name the columns by --columns {key} LABEL")
    return np.array([list(map(_truth, row)) for _, row in rows], np.float32), names


@functools.cache
def _truth(value):
    """"1", "1.00", "True" -> 1.0; None for what is no number."""
    try:
        return float(TRUTHS.get(value.lower(), value))
    except ValueError:
        return None


def _numbers_first(name):
    """Sorts names: numbers by their size, told by their digits, for Python reads no more than 4,300 of them."""
    return (False, len(name.lstrip("0")), name) if name.isdecimal() else (True, 0, name)


def _folders(path):
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _class_folders(root, least):
    """A folder per class in `root`, or in the folders of its parts for training and validation."""
    part_of = {p: folds.part_of(p.name) for p in _folders(root)}
    parts = sorted((p for p, part in part_of.items() if part in ("train", "val") and _folders(p)), key=part_of.get)
    other = next((p.name for p, part in part_of.items() if part in ("val", "test")), None)
    if "train" not in map(part_of.get, parts):
        if other:
            raise UserError(f"{root}: no *{ANSWER}.csv, no train.csv, and {other} is no class; add the training part, "
                            f"or name the answers by --labels and --images")
        parts = [root]
    trained = [p for p in parts if part_of.get(p) != "val"]
    names = sorted({p.name for part in trained for p in _folders(part)})
    if len(names) < least:
        what = "two folders" if least > 1 else "a folder"
        raise UserError(f"{trained[0]}: neither a table (train.csv, *{ANSWER}.csv) nor {what} of classes in it; see "
                        f"--data, or write a table of images and labels, see --labels")
    folders = [folder for part in parts for folder in _folders(part)]
    unknown = [folder for folder in folders if folder.name not in names]
    if unknown:
        raise UserError(f"{unknown[0]}: no such class in {trained[0]}; rename or remove it")
    found = [(file, names.index(folder.name), folder.parent not in trained) for folder in folders
             for file in images.find(folder, below=True)]
    files, classes, held_out = map(list, zip(*found))
    others = sorted(folder / file for folder in folders for file in list_tree(folder)
                    if not file.lower().endswith(images.SUFFIXES))
    if others:
        dist.print0(f"{root}: {len(others)} files are no TIFF, PNG or JPEG and left out, such as {others[0]}")
    return Samples(files, np.eye(len(names), dtype=np.float32)[classes], names, True, held_out)


def with_names(extra, table, root):
    """The Samples of other data with the classes of `table`, in that order; classes that it lacks are absent from its
    images. UserError when it has classes unknown to `table`, or several labels per image where `table` has one."""
    unknown = [name for name in extra.names if name not in table.names]
    if unknown or table.single_label and not extra.single_label:
        what = f"has the class {unknown[0][:80]}" if unknown else "has one label per image or several"
        raise UserError(f"{root}: {what}, unlike the training data; correct its table, or leave it out")
    labels = np.zeros((len(extra.files), len(table.names)), np.float32)
    labels[:, [table.names.index(name) for name in extra.names]] = extra.labels
    return extra._replace(labels=labels, names=table.names, single_label=table.single_label)


def subset(labels, count, *, seed=0):
    """Indices of about `count` samples (N, classes) in which every class is about as frequent as in all."""
    share = count / len(labels)
    fold_of = folds.assign(range(len(labels)), [share, 1 - share], strata=strata(labels), seed=seed)
    return [i for i, fold in fold_of.items() if fold == 0]


def strata(labels):
    """A stratum per sample: its class, or for several the number of classes and the rarest of them."""
    rarest = np.where(labels > 0, labels.sum(0), np.inf).argmin(1)
    return [(int(n), int(c)) for n, c in zip(labels.sum(1), rarest)]


class Images(Dataset):
    """`data[index]` -> {"image": (C, h, w) as in the file, "label": float32 (classes,)}.

    Where the shorter side is longer than `limit` pixels, it is reduced to that. cache: see data.cache."""

    def __init__(self, files, labels, *, bands=None, limit=1024, cache=None):
        self.files, self.labels = files, torch.as_tensor(labels)
        self.pictures = Cache(files, lambda i: reduce(images.read_picture(files[i], bands), limit), cache,
                              variant=("pictures", bands, limit))

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return {"image": self.pictures[i], "label": self.labels[i]}


class AugmentedImages(Dataset):
    """`data[(epoch, index)]` -> a sample of `source` and a random placement of it, which depends on (seed, epoch,
    index) only; `data[index]` -> the sample, placed as a whole. To the sample are added
        "matrix": float64 (3, 3) onto the net's imgsz x imgsz canvas,
        "hole": float32 (4,) x1, y1, x2, y2 of an erased square on that canvas, "border": of `warp`, "index", and if
        colours are changed "colour": float32 (C, C) of `augment.colour`.
    `Input` warps the batch by its matrices on the net's device. Images of several sizes are padded by reflection to the
    largest of the batch. view, colour: keyword arguments of `augment.view`, on that canvas (of several borders the first
    sample's is for its batch), and of `augment.colour`. p_cutout, cutout_size: of `augment.square`. source: `Images`, or
    dirty_mnist.Synthetic, which makes a new image for every (epoch, index).
    """

    def __init__(self, source, imgsz, *, view={}, colour={}, seed=0, p_cutout=0.0, cutout_size=0.3):
        self.source, self.imgsz, self.seed = source, imgsz, seed
        self.view, self.colour, self.p_cutout, self.cutout_size = view, colour, p_cutout, cutout_size

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        return self.__getitems__([key])[0]

    def __getitems__(self, keys):  # a DataLoader asks for a batch at once if it can; synthesis is faster so
        if hasattr(self.source, "__getitems__"):
            samples = self.source.__getitems__(keys)
            for sample in samples:  # as `Images` does with those that validate
                sample["image"] = reduce(sample["image"], 2 * self.imgsz)
        else:
            samples = [self.source[(key[1] if isinstance(key, tuple) else key) % len(self)] for key in keys]
        return [sample | self.place(key, sample["image"]) for key, sample in zip(keys, samples)]

    def place(self, key, image):
        """What is added to a sample with this image, or stands in its place."""
        side, (*epoch, index) = self.imgsz, key if isinstance(key, tuple) else (key,)
        rng = np.random.default_rng((self.seed, *epoch, index))
        options, colours, p_cutout = (self.view, self.colour, self.p_cutout) if epoch else (
            {"border": ["reflect"]}, {}, 0)
        view, border = augment.view(rng, side, side, side, **options)
        hole = augment.square(rng, side, p_cutout, self.cutout_size)
        image, _ = geometry.shrunk(image, view)
        matrix = view @ geometry.scale(side / image.shape[2], side / image.shape[1])
        found = {"image": image, "matrix": torch.from_numpy(matrix), "hole": torch.from_numpy(hole).float(),
                 "border": border, "index": index % len(self)}
        if any(colours.values()):
            found["colour"] = augment.colour(rng, len(image), **colours)
        return found


def reduce(image, limit):
    """An image whose shorter side is longer than `limit`, reduced to that: the later warp does not average."""
    return geometry.resize(image, images.reduced(image.shape[1:], limit, min))


def collate(samples):
    """Stacks; images of several sizes are filled up by reflection at the right and at the bottom."""
    pictures = geometry.of_one_dtype([s["image"] for s in samples])
    size = tuple(max(picture.shape[i] for picture in pictures) for i in (1, 2))
    for s, picture in zip(samples, pictures):
        s["image"] = picture if picture.shape[1:] == size else geometry.warp(picture, np.eye(3), size, border="reflect")
    matrices = np.stack([s.pop("matrix") for s in samples])  # no tensor: warp wants them here, not on the GPU
    return torch.utils.data.default_collate(samples) | {"matrix": matrices}


@dataclass
class Input(units.Input):
    """What a classifier sees of images: (pixel / pixel_scale - mean) / std."""

    def __call__(self, batch, view=np.eye(3), side=None):
        """A batch of `collate`, whose images have the input's bands -> (B, C, side, side) float32, placed by the
        batch's matrices in one resampling, erased squares black.

        view: matrix of a test-time view, applied after the batch's own matrix. side: the canvas's; None means imgsz.
        """
        side = side or self.imgsz
        x = self.scaled(batch["image"], colour=batch.get("colour"))
        x = geometry.warp(x, view @ batch["matrix"], (side, side), border=batch["border"][0])
        inside = mix.inside(batch["hole"].to(x.device) - 0.5, side, side)
        return self.normalised(x.masked_fill_(inside, 0))
