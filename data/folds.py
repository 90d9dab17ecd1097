"""Splits, written once as JSON: {sample name: fold}. Whoever reads the file sees the same split."""
import csv
import json
import math
import os
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import images
from utils.pictures import review
from utils.train import dist
from utils.errors import UserError
from utils.files import write_json


def assign(names, sizes, *, strata=None, groups=None, seed=910103):
    """-> {name: fold}, so that fold k gets the share sizes[k] of the samples.

    strata: a label per sample, spread over the folds in equal proportions. groups: a label per sample; a
    group is never divided. K-fold, stratified, grouped and stratified-grouped are the same greedy rule: the
    largest groups first, in random order among equals, each to the fold that it brings closest to its share
    of every stratum. The default seed is the wildfire system's; it is not the training seed, so that
    experiments with several seeds share one split.
    """
    strata = strata or [0] * len(names)
    groups = groups or list(names)
    members = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    order = list(members.values())
    np.random.default_rng(seed).shuffle(order)
    order.sort(key=len, reverse=True)
    totals, filled, fold_of = Counter(strata), [Counter() for _ in sizes], {}
    for group in order:
        labels = Counter(strata[i] for i in group)
        # how full each fold would be with half the group, as Sainte-Laguë shares out seats (with all of it a small
        # share would always be rounded down): in the group's strata first, then as a whole
        load = [(sum(n * (filled[k][s] + n / 2) / (share * totals[s]) for s, n in labels.items()),
                 filled[k].total() / share) for k, share in enumerate(sizes)]
        fold = min(range(len(sizes)), key=lambda k: load[k])
        filled[fold].update(labels)
        fold_of.update((names[i], fold) for i in group)
    return {name: fold_of[name] for name in names}


def area_strata(areas, bins=10):
    """A stratum per sample from its positive area in pixels: `bins` of log(area), empty ones by themselves.

    The bins of the wildfire system (np.histogram over the logarithms), which had no empty masks.
    """
    logs = [math.log(a) for a in areas if a > 0]
    edges = np.histogram_bin_edges(logs, bins)[1:-1] if logs else []
    return [int(np.digitize(math.log(a), edges)) if a > 0 else -1 for a in areas]


def parse(text):
    """--folds: "5" -> equal shares, "0" -> None, "0.2" -> a held-out fraction, else a Path to a split's JSON."""
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
    raise UserError(f"--folds {text}: neither a number of folds from 2 to 1000 nor a fraction below 1; 0 is for no "
                    f"validation, and a file's name for its split")


def given(text, names, held_out, fold):
    """--folds, as `load_or_make_split` takes it; without (None), the data's own split, where it holds samples out, else a fifth.
    held_out: True for those, a value per name, or empty. The own split's validation is fold 0: UserError for another.
    """
    if text is not None or not any(held_out):
        return parse(text or "5")
    if fold:
        raise UserError("--fold: the data has validation images of its own; leave it out, or give --folds 5")
    return {name: int(not out) for name, out in zip(names, held_out)}


def read(path, names):
    """A split's JSON, complete for `names`."""
    try:
        fold_of = json.loads(Path(path).read_text())
        missing = [n for n in names if not isinstance(fold_of.get(n), int)]
    except (OSError, ValueError, AttributeError, RecursionError):
        raise UserError(f"{path}: not a split; give a run's folds.json: {{name: fold}}") from None
    if missing:
        raise UserError(f"{path}: has no fold for {missing[0]} ({len(missing)} such); a split is for the data that it "
                        f"was made of: start a new run with --folds 5")
    return {n: fold_of[n] for n in names}


def load_or_make_split(folder, names, spec, fold, *, files, strata=None, groups=None, drop=None, untrained=False):
    """-> (indices of the samples to train on, to validate on), by the folds.json and dropped.json in the run's folder,
    which a resumed run finds there. A new run writes them, and prints `leaks` of the files. spec: of `parse`, or the
    split itself {name: fold}; None: nothing to validate. strata: of `assign`. groups: a CSV, see `read_groups`.
    drop: (a noise.csv, the number of its worst files that are not trained on). untrained: all may be held out, because
    the training images are synthesized.
    """
    written = folder / "folds.json"
    groups = read_groups(groups, names) if groups and not written.exists() else None
    spec = written if written.exists() else spec
    if isinstance(spec, Path):
        spec = read(spec, names)
    elif isinstance(spec, list):
        if fold and len(set(spec)) > 1:
            raise UserError(f"--fold {fold}: --folds is a fraction to hold out, of which there is one; leave --fold "
                            f"out, or give a number of folds")
        spec = assign(names, spec, strata=strata, groups=groups)
    held_out = {name for name, k in spec.items() if k == fold} if spec else set()
    if spec and not (held_out and (untrained or len(held_out) < len(spec))):
        there = ", ".join(map(str, sorted(set(spec.values()))))
        raise UserError(f"--fold {fold}: leaves {len(spec) - len(held_out)} samples to train and {len(held_out)} to "
                        f"validate; there are the folds {there} (--folds 0: no validation)")
    train, val = ([i for i, name in enumerate(names) if (name in held_out) is side] for side in (False, True))
    if drop and not untrained:
        train = _without_noisy(folder / "dropped.json", drop, train, names, files)
    if spec is None:
        return train, val
    if dist.rank() == 0 and not written.exists():
        write_json(written, spec)
        sides = ([files[i] for i in part] for part in (train, val))
        for line in leaks(*sides, groups=groups and dict(zip(files, groups))):
            print(line)
    return train, val


def _without_noisy(written, drop, train, names, files):
    """The training samples without the worst of a noise.csv, which are written down: the table may be made anew before
    the run is resumed. UserError where it ranks no training sample: a single run's has what its own fold held out."""
    try:
        dropped = dist.broadcast(dist.rank() == 0 and written.exists() and json.loads(written.read_text()))
    except ValueError:
        raise UserError(f"{written}: damaged; start a new run") from None
    if dropped is False:
        ranked, real = review.read_noise(drop[0]), {i: os.path.realpath(files[i]) for i in train}
        ranked = [os.path.realpath(name) for name in ranked]
        if set(ranked).isdisjoint(real.values()):
            raise UserError(f"{drop[0]}: ranks no sample that is trained on; give the ranking of runs of several folds "
                            f"of this data, and start in the folder that they were started in")
        worst = set(ranked[:drop[1]])
        dropped = [names[i] for i in train if real[i] in worst]
        if len(dropped) == len(train):
            raise UserError(f"--drop-noisy {drop[0]}:{drop[1]}: leaves no sample to train on; lower the number")
        if dist.rank() == 0:
            write_json(written, dropped)
    dist.print0(f"--drop-noisy: {len(dropped)} of the {drop[1]} worst are not trained on")
    dropped = set(dropped)
    return [i for i in train if names[i] not in dropped]


def read_groups(path, names):
    """A CSV whose first column is the sample's name (with folders and suffix, or without) and whose column `group`
    (else the second) its group."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
        column = rows[0].index("group") if "group" in rows[0] else 1
        group_of = {row[0]: row[column] for row in rows}
    except (OSError, UnicodeDecodeError, IndexError, csv.Error):
        raise UserError(f"{path}: not a table of groups; give a CSV with the columns name and group") from None
    rows = [next((n for n in (name, Path(name).name, Path(name).stem) if n in group_of), None) for name in names]
    missing = [name for name, row in zip(names, rows) if row is None]
    if missing:
        raise UserError(f"{path}: has no group for {missing[0]} ({len(missing)} such); add the rows")
    return [group_of[row] for row in rows]


def some(indices, count):
    """At most so many of the indices, from all along: files are often in the order of their classes or places."""
    return indices[::max(1, len(indices) // count)][:count]


def leaks(train, val, *, groups=None, shown=3):
    """Lines to print when a split does not divide what it should: [] for a clean one.

    train, val: image files of the two sides. groups: {file: its group}, when there are groups. Found are equal pixels
    on both sides (see images.digest), also in another format, compression or with other metadata, and groups on both.
    `shown` examples each. Raises UserError for a file that cannot be read. For one process only: it reads files.
    """
    lines = []

    def warn(what, examples):
        lines.append(f"warning: {what}; the score will be too good")
        lines.extend(f"  {example}" for example in examples[:shown])
        if len(examples) > shown:
            lines.append(f"  and {len(examples) - shown} more")

    copies = _copies(train, val)
    if copies:
        warn(f"{len(copies)} of {len(val)} validation files are copies of training files (remove them, or give a file "
             f"and its copies one group)", [f"{held} = {seen}" for held, seen in copies])
    seen_of, held_of = ({groups[path]: path for path in reversed(side)} if groups else {} for side in (train, val))
    both = [group for group in held_of if group in seen_of]
    if both:
        warn(f"{len(both)} groups are on both sides of the split (make a new one with the groups)",
             [f"{group}: {held_of[group]}, {seen_of[group]}" for group in sorted(both, key=str)])
    return lines


def unseen(files, held_out, root):
    """-> indices of the files of --extra-data `root` that are no copies of validation images (the same pixels): those
    are not trained on. Rank 0 reads, for all. Raises UserError for a file that cannot be read."""
    copies = dict(dist.broadcast(dist.rank() == 0 and _copies(held_out, files)))
    if copies:
        dist.print0(f"{root}: {len(copies)} of {len(files)} images are copies of validation images and left out, such "
                    f"as {next(iter(copies))}")
    return [i for i, file in enumerate(files) if file not in copies]


def _copies(train, val):
    """[(validation file, a training file with equal pixels)]. What tells files apart is looked at from cheap to dear:
    bands, height and width, a few rows of the middle, all pixels; each time, those files stay that have a counterpart
    on the other side."""
    suspects = {(): (list(train), list(val))} if train and val else {}
    with ThreadPoolExecutor(8) as pool:  # reading, decoding and hashing leave Python's lock alone
        for look in (images.size, lambda path: images.digest(path, middle=4), images.digest):
            files = [(key, side, path) for key, pair in suspects.items() for side in (0, 1) for path in pair[side]]
            values = tqdm(pool.map(look, [path for *_, path in files]), total=len(files), desc="copies", leave=False,
                          disable=dist.rank() > 0 or not files)
            suspects = defaultdict(lambda: ([], []))
            for value, (key, side, path) in zip(values, files):  # in this order the bar sees its end
                suspects[(*key, value)][side].append(path)
            suspects = {key: pair for key, pair in suspects.items() if all(pair)}
    seen_of = {held: pair[0][0] for pair in suspects.values() for held in pair[1]}
    return [(held, seen_of[held]) for held in val if held in seen_of]
