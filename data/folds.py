"""The split into folds for training and validation, written once as JSON {sample name: fold}, and checks of it."""
import hashlib
import math
import os
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from data import images
from data.cache import facts
from utils.errors import UserError, answers_for
from utils.files import read_csv, read_json, show, write_json
from utils.pictures import review
from utils.train import dist


# the words of a name that tell a part of a data set, see part_of
PARTS = {"train": "train", "training": "train", "trainval": "train", "val": "val", "valid": "val", "validation": "val",
         "dev": "val", "test": "test", "testing": "test"}
SHOWN = 20  # classes


# ---- the data's own parts --------------------------------------------------------------------------------------------
def part_of(name):
    """"train", "val" or "test" where a word of the name says so (train2017, instances_val.json, TestSet), else None.
    In a path the first such word decides: train/images and images/train are the same part."""
    words = re.findall("[A-Z]?[a-z]+|[A-Z]+", str(name))
    return next((PARTS[word] for word in (word.lower().removesuffix("set") for word in words) if word in PARTS), None)


def describe(data, layout, names, counts, sides):
    """Rank 0 prints what was understood of the data before a run trains on it.

    layout: a description in words. names: the classes. counts: (samples, classes), the number of objects or labels in
    every sample. sides: the indices of the training samples, and of the validation samples.
    """
    dist.print0(f"{data}: {layout}; {len(counts)} samples, {len(names)} classes")
    for part, side in zip(("training", "validation"), sides):
        rows = np.asarray(counts)[side]
        shown = [f"{show(name)[1:-1]} {n:.0f}" for name, n in zip(names[:SHOWN], rows.sum(0))]
        shown += [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
        dist.print0(f"  {part}: {len(rows)} samples, {(rows.sum(1) == 0).sum()} without a label: {', '.join(shown)}")


# ---- which sample is in which fold -----------------------------------------------------------------------------------
def assign(names, sizes, *, strata=None, groups=None, seed=910103):
    """-> {name: fold}, so that fold k gets the share sizes[k] of the samples.

    strata: a label per sample, spread over the folds in equal proportions. groups: a label per sample; a group is never
    divided. K-fold, stratified, grouped and stratified-grouped splits follow one greedy rule: the largest groups first,
    in random order among equals, each to the fold that it brings closest to its share of every stratum. The default
    seed is the wildfire system's; it is not the training seed, so that experiments with several seeds share one split.
    """
    strata = strata or [0] * len(names)
    members = defaultdict(list)
    for i, group in enumerate(groups or ()):
        members[group].append(i)
    order = list(members.values() if groups else zip(range(len(names))))
    np.random.default_rng(seed).shuffle(order)
    order.sort(key=len, reverse=True)
    folds, fold_of, filled = range(len(sizes)), [0] * len(names), [0.0] * len(sizes)
    size_of = [0] * len(sizes)
    wanted = {stratum: [share * n for share in sizes] for stratum, n in Counter(strata).items()}
    counts = {stratum: [0] * len(sizes) for stratum in wanted}
    # how full each fold would be with half the group, as Sainte-Laguë shares out seats (with all of it a small share
    # would always be rounded down): first in the group's strata, then as a whole; kept for groups of one sample
    loads_of_one = {stratum: [0.5 / n for n in wanted[stratum]] for stratum in wanted}
    for group in order:
        labels = [(strata[group[0]], 1)] if len(group) == 1 else Counter(strata[i] for i in group).items()
        loads = loads_of_one[strata[group[0]]] if len(group) == 1 else [
            sum(n * (counts[s][k] + n / 2) / wanted[s][k] for s, n in labels) for k in folds]
        _, _, fold = min(zip(loads, filled, folds))
        for s, n in labels:
            counts[s][fold] += n
            loads_of_one[s][fold] = (counts[s][fold] + 0.5) / wanted[s][fold]
        for i in group:
            fold_of[i] = fold
        size_of[fold] += len(group)
        filled[fold] = size_of[fold] / sizes[fold]
    return dict(zip(names, fold_of))


def area_strata(areas):
    """A stratum per sample from its positive area in pixels: 10 bins of log(area); empty masks are a stratum.

    The bins are the wildfire system's (np.histogram over the logarithms), which had no empty masks.
    """
    logs = [math.log(a) for a in areas if a > 0]
    edges = np.histogram_bin_edges(logs, 10)[1:-1] if logs else []
    return [int(np.digitize(math.log(a), edges)) if a > 0 else -1 for a in areas]


def parse_folds(text, names=(), held_out=(), fold=0):
    """--folds -> the split for `load_or_make_split`: "5" -> equal shares; "0.2" -> a fraction to hold out; "0" -> None,
    nothing to validate; else the Path of a split's JSON.

    text None: the data's own split {name: fold}, whose fold 0 is validation, where `held_out` is True for some of the
    names; else five folds. UserError for another fold of the data's own split, and for other numbers.
    """
    if text is None and any(held_out):
        if fold:
            raise UserError("--fold: the data has validation images of its own; leave it out, or give --folds 5")
        return {name: int(not out) for name, out in zip(names, held_out)}
    text = text or "5"
    try:
        value = float(text)
    except ValueError:
        return Path(text)
    if value == 0:
        return None
    if 0 < value < 1:
        return [value, 1 - value]
    if 2 <= value <= 1000 and value == int(value):
        return [1 / value] * int(value)
    raise UserError(f"--folds {text}: neither a number of folds from 2 to 1000 nor a fraction below 1; give one of "
                    f"these, 0 for no validation, or the name of a split's file")


def read_split(path, names):
    """The folds of the samples `names` from a split's JSON -> {name: fold}. Raises UserError when some are missing."""
    fold_of = read_json(path)
    missing = [name for name in names if type(fold_of) is not dict or type(fold_of.get(name)) is not int]
    if missing:
        raise UserError(f"{path}: has no fold for {missing[0]} ({len(missing)} in total); give the folds.json of a run "
                        f"on this data, or start a new run with --folds 5")
    return {name: fold_of[name] for name in names}


def read_groups(path, names):
    """The group of each sample from a CSV: its first column is the sample's name (with folders and suffix, or without),
    its column `group`, else the second, is the group."""
    remedy = "give a CSV with the columns name and group"
    rows = [row for row in read_csv(path, remedy) if row] or [[]]
    column = rows[0].index("group") if "group" in rows[0] else 1
    if any(len(row) <= column for row in rows):
        raise UserError(f"{path}: not a table of groups; {remedy}")
    group_of = {row[0]: row[column] for row in rows}
    found = [next((group_of[n] for n in (name, Path(name).name, Path(name).stem) if n in group_of), None)
             for name in names]
    if None in found:
        raise UserError(f"{path}: has no group for {names[found.index(None)]} ({found.count(None)} in total); add the "
                        f"rows")
    return found


def load_or_make_split(folder, names, spec, fold, *, files, strata=None, groups=None, drop=None, untrained=False):
    """-> (indices of the samples to train on, indices of those to validate on), and prints `leak_warnings`.

    A new run writes the split to folds.json in its folder, and the samples that it drops to dropped.json; a resumed run
    reads these. spec: see `parse_folds`. fold: the one to validate on. files: the samples' images. strata: see
    `assign`. groups: a CSV, see `read_groups`, or the group of each sample. drop: (a noise.csv, the number of its worst
    samples to leave out of the training). untrained: the samples are not trained on, so that all may be held out.
    """
    written = folder / "folds.json"
    new = not written.exists()
    groups = (groups if type(groups) is list else read_groups(groups, names)) if groups and new else None
    fold_of = spec if new else written
    if isinstance(fold_of, Path):
        fold_of = read_split(fold_of, names)
    elif isinstance(fold_of, list):
        if fold and len(set(fold_of)) > 1:
            raise UserError(f"--fold {fold}: --folds is a fraction to hold out, of which there is one; leave --fold "
                            f"out, or give a number of folds")
        fold_of = assign(names, fold_of, strata=strata, groups=groups)
    sides = [], []
    for i, name in enumerate(names):
        sides[fold_of is not None and fold_of[name] == fold].append(i)
    train, val = sides
    if fold_of and not (val and (untrained or train)):
        raise UserError(f"--fold {fold}: leaves {len(train)} samples to train and {len(val)} to validate; there are "
                        f"the folds {', '.join(map(str, sorted(set(fold_of.values()))))} (--folds 0: no validation)")
    if drop and not untrained:
        with answers_for("--drop-noisy"):  # of a damaged checkpoint
            table, count = drop
        train = _without_noisy(folder / "dropped.json", table, count, train, names, files)
    if fold_of and new and dist.rank() == 0:
        write_json(written, fold_of)
        for line in leak_warnings(*([files[i] for i in side] for side in (train, val)),
                                  groups=groups and dict(zip(files, groups))):
            print(line)
    return train, val


def _without_noisy(written, table, count, train, names, files):
    """The training samples without the `count` worst of a noise.csv. They are written down, because the table may be
    made anew before the run is resumed. UserError where it ranks no training sample: the table of a single run ranks
    the samples that its own fold held out."""
    dropped = read_json(written) if written.exists() else None
    if dropped is None:
        ranked = list(map(os.path.realpath, review.read_noise(table)))
        worst, real = set(ranked[:count]), {i: os.path.realpath(files[i]) for i in train}
        if set(ranked).isdisjoint(real.values()):
            raise UserError(f"{table}: ranks no sample that is trained on; give the ranking of runs of several folds "
                            f"of this data, and start in the folder that they were started in")
        dropped = [names[i] for i in train if real[i] in worst]
        if len(dropped) == len(train):
            raise UserError(f"--drop-noisy {table}:{count}: leaves no sample to train on; lower the number")
        if dist.rank() == 0:
            write_json(written, dropped)
    dist.print0(f"--drop-noisy: {len(dropped)} of the {count} worst samples are not trained on")
    dropped = set(dropped)
    return [i for i in train if names[i] not in dropped]


def spread(indices, count):
    """At most `count` of the indices, evenly spread: files are often in the order of their classes or places."""
    return indices[::max(1, len(indices) // count)][:count]


# ---- copies ----------------------------------------------------------------------------------------------------------
def leak_warnings(train, val, *, groups=None):
    """Lines to print when the validation files are not new to the training; [] for a clean split.

    train, val: image files of the two sides. groups: {file: its group}. A file of equal pixels on both sides is found
    (see images.digest), in another format, compression or with other metadata too, and so is a group on both sides.
    Raises UserError for a file that cannot be read. For one process only: it reads files.
    """
    lines, copies = [], _copies(train, val)
    if copies:
        lines.append(f"warning: {len(copies)} of {len(val)} validation files are copies of training files, such as "
                     f"{copies[0][0]} = {copies[0][1]}; the score will be too good (remove them, or give a file and "
                     f"its copies one group)")
    seen, held = ({groups[path] for path in side if groups} for side in (train, val))
    if seen & held:
        lines.append(f"warning: {len(seen & held)} groups are on both sides of the split, such as "
                     f"{min(seen & held, key=str)}; the score will be too good (make a new split with the groups)")
    return lines


def without_copies(files, held_out, root):
    """-> indices of the files of --extra-data `root` that are not copies of validation images (equal pixels), because
    these must not be trained on. Rank 0 reads, for all. Raises UserError for a file that cannot be read."""
    copies = dict(dist.broadcast(dist.rank() == 0 and _copies(held_out, files)))
    if copies:
        dist.print0(f"{root}: {len(copies)} of {len(files)} images are copies of validation images and left out, such "
                    f"as {next(iter(copies))}")
    return [i for i, file in enumerate(files) if file not in copies]


def _copies(train, val):
    """[(validation file, the first training file with equal pixels)]. Files are compared from cheap to expensive: by
    bands, height and width, by one row, by all pixels. Each time only the files stay that have a counterpart on the
    other side."""
    def size(path):
        return list(images.size(path))

    found = {path: () for path in (*train, *val)}  # what is known of each file
    for look in (size, _row, images.digest):
        common = {found.get(path) for path in train} & {found.get(path) for path in val} - {None}
        files = [path for path in found if found[path] in common]
        values = facts(look.__name__, look, [(path,) for path in files], bar="copies")
        found = {path: (*found[path], str(value)) for path, value in zip(files, values)}
    seen_of = {found[path]: path for path in reversed(train) if path in found}
    return [(held, seen_of[found[held]]) for held in val if found.get(held) in seen_of]


def _row(path):
    """A digest of one row of pixels, for which little of a file is decoded."""
    _, height, width = images.size(path)
    pixels = images.read(path, window=(height // 8, 0, 1, width), once=True)
    return hashlib.blake2b(pixels.numpy().tobytes(), digest_size=16).hexdigest()
