"""Classification data: images and a table of answers (several classes an image, or one), or a folder per class.

    resources/dirty_mnist_2nd/00000.png ...   resources/dirty_mnist_2nd_answer.csv: index,a,b, ... z of 0 and 1
    DATA/train/*.jpg                          DATA/train.csv: name,label        or: name and a column per class
    DATA/train/cat/*.jpg  DATA/train/dog/*.jpg          and, if they are there: DATA/val/cat/*.jpg ...
"""
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from data import augment, bad, folds, images, units
from data.cache import Cache
from utils.errors import UserError
from utils.files import read_csv, same_name
from utils.ops import geometry
from utils.train import checkpoint, dist

ANSWER = "_answer"  # the competition's dirty_mnist_2nd_answer.csv belongs to the folder dirty_mnist_2nd
COMPETITION = f"dirty_mnist_2nd{ANSWER}.csv"
COMPETITION_TEST = "test_dirty_mnist_2nd"
TRUTHS = {"true": 1.0, "false": 0.0}


class Samples(NamedTuple):
    """Images and their classes, a row per image."""
    files: list     # Path
    labels: object  # float32 (N, classes) of 0 and 1
    names: list     # of the classes
    single_label: bool  # every image has one class
    held_out: list = ()  # True where the data set itself has the image for validation; or empty

    def usable(self, root, bands, allow_bad=False):
        """The Samples without the images that cannot be read, see `bad.readable`. root: where they are."""
        kept = bad.readable(root, self.files, bands, allow_bad=allow_bad)
        return self._replace(files=[self.files[i] for i in kept], labels=self.labels[kept],
                             held_out=[self.held_out[i] for i in kept if self.held_out])


def read(root, *, table=None, folder=None, least=2):
    """-> Samples, of a CSV and a folder of images, or of one folder per class.

    table, folder: where they are; without: `*_answer.csv` or `train.csv` in root, and the folder of that name, of
    several the competition's. Every image needs its row and every row its image. least: so many classes at least.
    Raises UserError naming file and line.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; put the data there, or point --data to it (python -m data.samples "
                        f"makes sample data)")
    found = sorted(p for p in [*root.glob(f"*{ANSWER}.csv"), root / "train.csv"]
                   if p.is_file() and not p.name.startswith("test"))
    unanswered = next((p for p in sorted(root.glob("test*")) if p.is_dir()), None)
    if table is None and not found and unanswered and not (root / "train").is_dir():
        raise UserError(f"{root}: no *{ANSWER}.csv, no train.csv, and {unanswered.name} is no class; add the answers, "
                        f"or name them by --labels and --images")
    if table is None and not found:
        if folder:
            raise UserError(f"--images {folder}: is for a table, and {root} has none; name it by --labels")
        return _class_folders(root, least)
    found = [p for p in found if p.name == COMPETITION] or found
    if table is None and len(found) > 1:
        raise UserError(f"{root}: has the tables {found[0].name} and {found[1].name}; tell by --labels which one to "
                        f"train on")
    table = Path(table) if table else found[0]
    folder = Path(folder) if folder else root / table.stem.removesuffix(ANSWER)
    keys, labels, names, single_label = read_table(table, least)
    file_of = find_files(folder)
    files = {}
    for key in keys:
        name = same_name(key).replace("\\", "/").rpartition("/")[2]  # some tables tell the folder too
        file = file_of.get(name) or file_of.get(name.lower()) or (
            file_of.get(int(key)) if key.isdecimal() and len(key) < 20 else None)
        if file is None:
            raise UserError(f"{table}: {key[:80]} has no image in {folder}; add it, or remove the row")
        if files.setdefault(file, key) != key:
            raise UserError(f"{table}: {files[file]} and {key} are one image, {file}; remove one")
    spare = set(file_of.values()) - set(files)
    if spare:
        raise UserError(f"{min(spare)}: has no row in {table} ({len(spare)} such); add it, or remove the image")
    return Samples(list(files), labels, names, single_label)


def test_folder(root):
    """Where the images without answers are that predict.py reads by default: the competition's, or `test`."""
    competition = Path(root) / COMPETITION_TEST
    return competition if competition.is_dir() else Path(root) / "test"


def find_files(folder):
    """{stem, name, both in small letters, and the stem's number if it is one: image file}."""
    file_of, stems, found = {}, set(), images.find(folder)
    for path in found:  # first, for the others are to give way
        file_of |= {same_name(path.stem).lower(): path, same_name(path.name).lower(): path}
    for path in found:
        if path.stem in stems:
            raise UserError(f"{path}: another image has the same name; rename or remove one")
        stems.add(path.stem)
        file_of |= {same_name(path.stem): path, same_name(path.name): path}
        if path.stem.isdecimal():
            file_of[int(path.stem)] = path
    return file_of


def read_table(path, least=2):
    """A CSV whose first column names the images -> keys, labels (N, classes) float32, class names, and whether every
    image has a single label.

    A second column that is the last one holds the class. Several further columns are the classes, 0 or 1 in each row;
    images have a single label where every row has one 1.
    """
    rows = [(i, row) for i, row in enumerate(read_csv(path), 1) if row]
    if len(rows) < 2 or len(rows[0][1]) < 2:
        raise UserError(f"{path}: no header and rows of two columns or more, separated by commas; see the layouts in "
                        f"data/cls.py")
    header, rows = rows[0][1], rows[1:]
    wrong = next((i for i, row in rows if len(row) != len(header)), None)
    if wrong:
        raise UserError(f"{path}: line {wrong} has another number of columns than the header's {len(header)}; correct "
                        f"it")
    keys, seen = [row[0].strip() for _, row in rows], {}
    for (i, _), key in zip(rows, keys):
        if seen.setdefault(key, i) != i:
            raise UserError(f"{path}: line {i}: {key} stands in line {seen[key]} too; remove one")
    if len(header) == 2:
        values = [row[1].strip() for _, row in rows]
        names = sorted(set(values), key=_numbers_first)
        if "" in names:
            raise UserError(f"{path}: line {rows[values.index('')][0]} has no class; add it, or remove the row")
        if len(names) < least:
            raise UserError(f"{path}: all rows have the class {names[0][:80]}; there must be two or more")
        index = {name: i for i, name in enumerate(names)}
        return keys, np.eye(len(names), dtype=np.float32)[[index[value] for value in values]], names, True
    names = [name.strip() for name in header[1:]]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two columns of one name; rename or remove one")
    truth_of = {value: _truth(value) for value in {value for _, row in rows for value in row[1:]}}
    for i, row in rows:
        bad = next((value for value in row[1:] if truth_of[value] not in (0, 1)), None)
        if bad is not None:
            raise UserError(f"{path}: line {i} has the value {bad[:20]!r}; labels are 0 or 1")
    labels = np.array([[truth_of[value] for value in row[1:]] for _, row in rows], np.float32)
    return keys, labels, names, bool((labels.sum(1) == 1).all())


def _truth(value):
    """"1", "1.00", "True" -> 1.0; None for what is no number."""
    word = value.strip().lower()
    try:
        return TRUTHS[word] if word in TRUTHS else float(word)
    except ValueError:
        return None


def _numbers_first(name):
    """Sorts names: numbers by their size, told by their digits, for Python reads no more than 4,300 of them."""
    return (False, len(name.lstrip("0")), name) if name.isdecimal() else (True, 0, name)


def _class_folders(root, least):
    """A folder per class in `root`, or in its `train` and its `val` or `valid`."""
    parts = [root / name for name in ("train", "val", "valid") if (root / name).is_dir()]
    parts = parts if parts[:1] == [root / "train"] else [root]
    names = sorted(p.name for p in parts[0].iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(names) < least:
        what = "two folders" if least > 1 else "a folder"
        raise UserError(f"{parts[0]}: neither a table (train.csv, *{ANSWER}.csv) nor {what} of classes in it; see "
                        f"--data")
    files, classes, held_out, others = [], [], [], []
    for part in parts:
        for folder in sorted(p for p in part.iterdir() if p.is_dir() and not p.name.startswith(".")):
            if folder.name not in names:
                raise UserError(f"{folder}: no such class in {parts[0]}; rename or remove it")
            there = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
            found = [p for p in there if p.suffix.lower() in images.SUFFIXES]
            files += found or images.find(folder)  # which tells that there are none
            classes += [names.index(folder.name)] * len(found)
            held_out += [part != parts[0]] * len(found)
            others += [p for p in there if p.suffix.lower() not in images.SUFFIXES]
    if others:
        dist.print0(f"{root}: {len(others)} files are no TIFF, PNG or JPEG and left out, such as {others[0]}")
    return Samples(files, np.eye(len(names), dtype=np.float32)[classes], names, True, held_out if any(held_out) else ())


def with_names(extra, table, root):
    """The Samples of other data with the classes of `table`, in that order; classes that it lacks are absent from its
    images. UserError when it has classes unknown to `table`, or several labels per image where `table` has one."""
    unknown = [name for name in extra.names if name not in table.names]
    if unknown or table.single_label and not extra.single_label:
        what = f"has the class {unknown[0][:80]}" if unknown else "has one label per image or several"
        raise UserError(f"{root}: {what}, unlike --data; correct its table, or leave --extra-data out")
    labels = np.zeros((len(extra.files), len(table.names)), np.float32)
    labels[:, [table.names.index(name) for name in extra.names]] = extra.labels
    return Samples(extra.files, labels, table.names, table.single_label)


def held_out(paths, states):
    """-> the images that the runs of all checkpoints validated on (files), their labels (N, classes).

    Only images that no member was trained on are fair to all: UserError where the runs held out different ones.
    """
    found = None
    for path, state in zip(paths, states):
        settings, split = state["args"], Path(path).parent / "folds.json"
        if not {"data", "labels", "images", "fold"} <= settings.keys():
            raise UserError(checkpoint.OTHER_VERSION.format(path))
        if not split.exists():
            raise UserError(f"{split}: missing, so no images are known that {path} was not trained on; give "
                            f"--ensemble-weights instead of --fit-weights")
        table = read(settings["data"], table=settings["labels"], folder=settings["images"])
        table = table.usable(settings["data"], state["input"]["bands"], allow_bad=True)
        if table.names != state["classes"]:
            raise UserError(f"{settings['data']}: has other classes than {path}; bring back the data it was trained on")
        names = [os.path.relpath(file, settings["data"]) for file in table.files]  # as train_cls.split
        fold_of = folds.read_split(split, names)
        out = {file.resolve(): (file, row) for file, name, row in zip(table.files, names, table.labels)
               if fold_of[name] == settings["fold"]}
        found = out if found is None else found
        if out.keys() != found.keys():
            raise UserError(f"{path}: its run held out other images than that of {paths[0]}; give --ensemble-weights "
                            f"instead of --fit-weights (equal ones for the folds of one split)")
    files, labels = zip(*found.values())
    return list(files), np.stack(labels)


def subset(labels, count, *, seed=0):
    """Indices of about `count` samples (N, classes) in which every class is about as frequent as in all."""
    share = count / len(labels)
    fold_of = folds.assign(range(len(labels)), [share, 1 - share], strata=strata(labels), seed=seed)
    return [i for i, fold in fold_of.items() if fold == 0]


def strata(labels):
    """A stratum per sample: its class, or for several the number of classes and the rarest of them."""
    frequency = labels.sum(0)
    rarest = np.where(labels > 0, frequency, np.inf).argmin(1)
    return [(int(n), int(c)) for n, c in zip(labels.sum(1), rarest)]


class Images(Dataset):
    """`data[index]` -> {"image": (C, h, w) as in the file, "label": float32 (classes,)}.

    Where the shorter side is longer than `limit` pixels, it is reduced to that. cache: see data.cache."""

    def __init__(self, files, labels, *, bands=None, limit=1024, cache=None):
        self.files, self.labels = files, torch.as_tensor(labels)
        self.pictures = Cache(files, lambda i: reduce(images.read_picture(files[i], bands), limit), cache,
                              variant=("pictures", bands, limit))

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return {"image": self.pictures[i], "label": self.labels[i]}


class AugmentedImages(Dataset):
    """`data[(epoch, index)]` -> a sample of `source` and a random placement of it, which depends on (seed, epoch,
    index) only; `data[index]` -> the sample, placed as a whole. To the sample are added
        "matrix": float64 (3, 3) onto the net's imgsz x imgsz canvas,
        "hole": float32 (4,) x1, y1, x2, y2 of an erased square on that canvas, "index".
    `Input` warps the batch by its matrices on the net's device. Images of several sizes are padded by reflection to the
    largest of the batch. options: of `augment.random_affine`.
    source: `Images`, or dirty_mnist.Synthetic, which makes a new image for every (epoch, index).
    """

    def __init__(self, source, imgsz, *, seed=0, **options):
        self.source, self.imgsz, self.seed, self.options = source, imgsz, seed, options

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
        return [sample | self.place(key, *sample["image"].shape[1:]) for key, sample in zip(keys, samples)]

    def place(self, key, height, width):
        matrix, hole = geometry.scale(self.imgsz / width, self.imgsz / height), np.zeros(4)
        if isinstance(key, tuple):
            turn, hole = augment.random_affine(np.random.default_rng((self.seed, *key)), self.imgsz, **self.options)
            matrix = turn @ matrix
        return {"matrix": torch.from_numpy(matrix), "hole": torch.from_numpy(hole).float(),
                "index": (key[1] if isinstance(key, tuple) else key) % len(self)}


def reduce(image, limit):
    """An image whose shorter side is longer than `limit`, reduced to that: the later warp does not average."""
    factor = min(1, limit / min(image.shape[1:]))
    return images.resize(image, tuple(max(1, round(n * factor)) for n in image.shape[1:]))


def collate(samples):
    """Stacks; images of several sizes are filled up by reflection at the right and at the bottom."""
    height, width = (max(s["image"].shape[i] for s in samples) for i in (1, 2))
    mixed = len({s["image"].dtype for s in samples}) > 1  # 8 and 16 bits do not stack
    for s in samples:
        s["image"] = s["image"].float() if mixed else s["image"]
        _, h, w = s["image"].shape
        if (h, w) != (height, width):
            s["image"] = geometry.warp(s["image"], np.eye(3), (height, width), border="reflect")
    matrices = np.stack([s.pop("matrix") for s in samples])  # no tensor: warp wants them here, not on the GPU
    return torch.utils.data.default_collate(samples) | {"matrix": matrices}


@dataclass
class Input(units.Input):
    """What a classifier sees of images: (pixel / pixel_scale - mean) / std. mean, std: one number per band, or one for
    all."""
    mean: list = (0.0,)
    std: list = (1.0,)

    def __call__(self, batch, view=np.eye(3), side=None):
        """A batch of `collate`, whose images have the input's bands -> (B, C, side, side) float32, placed by the
        batch's matrices in one resampling, erased squares black.

        view: matrix of a test-time view, applied after the batch's own matrix. side: the canvas's; None means imgsz.
        """
        side = side or self.imgsz
        x = geometry.warp(self.scaled(batch["image"]), view @ batch["matrix"], (side, side), border="reflect")
        line = torch.arange(side, device=x.device) + 0.5
        x1, y1, x2, y2 = batch["hole"].to(x.device).T[..., None]
        inside = ((line > y1) & (line < y2))[:, None, :, None] & ((line > x1) & (line < x2))[:, None, None, :]
        mean, std = (x.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (x.masked_fill_(inside, 0) - mean) / std
