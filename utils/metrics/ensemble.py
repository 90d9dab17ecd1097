"""Ensembles of classifiers: weights of the members and a threshold per class, fitted to held-out probabilities.

Both maximise the accuracy itself, a step function without a useful gradient: they try values.
"""
import os

import numpy as np

from utils.errors import UserError
from utils.files import read_json, write_json
from utils.train import dist

FACTORS = (0, 0.5, 1, 1.5, 2, 3)


def average(probs, weights):
    """probs (M, N, C), weights (M,), their sum above 0 -> the weighted mean over members, (N, C) float64."""
    return np.average(np.asarray(probs, np.float64), axis=0, weights=weights)


def adds_up(probs):
    """Whether every row of a table of probabilities (N, C) adds up to 1, give or take what two digits round off."""
    return bool((abs(probs.sum(1) - 1) < min(0.005 * probs.shape[1], 0.1) + 1e-9).all())


def hits(probs, labels, single_label=False, thresholds=0.5):
    """How many decisions are right: of N images if each has a single label (the most probable class), else of N x C
    labels (present: above the threshold). probs (N, C), labels (N, C) of 0 and 1."""
    if single_label:
        return int((probs.argmax(1) == labels.argmax(1)).sum())
    return int(((probs > thresholds) == (labels > 0.5)).sum())


def fit_weights(probs, labels, single_label):
    """probs (M, N, C) of M members, labels (N, C) of 0 and 1 -> weights (M,) float64, each one of FACTORS.

    Coordinate ascent from equal weights: of all changes of one weight the best is made, until none is better. Better is
    more `hits` at threshold 0.5, or as many with more equal weights (a lower sum of squares of the shares); where two
    changes are alike the earlier member's. Never worse than equal weights on these images. ValueError for other shapes.
    """
    probs, labels = np.asarray(probs, np.float64), np.asarray(labels)
    if probs.ndim != 3 or not len(probs) or probs.shape[1:] != labels.shape:
        raise ValueError(f"probs {probs.shape} must be (members, *labels.shape), labels are {labels.shape}")

    def value(weights):
        shares = np.array(weights) / sum(weights)
        return hits(average(probs, weights), labels, single_label), -round(float(shares @ shares), 9)

    best = (1.0,) * len(probs)
    while True:  # ends: every turn raises the value, and the grid is finite
        changed = [(*best[:m], float(f), *best[m + 1:]) for m in range(len(probs)) for f in FACTORS]
        top = max([best, *(weights for weights in changed if sum(weights))], key=value)  # of equal ones the first
        if top == best:
            return np.array(best)
        best = top


def fit_thresholds(probs, labels):
    """probs (N, C) 0..1, labels (N, C) of 0 and 1 -> (C,) float64, per class the threshold 0..1 with the most hits.

    Every way to divide a class's scores is tried: below the lowest, between each two neighbours, above the highest.
    The threshold is the middle of the best gap; 0.5 where that is as good, else of several the one nearest to 0.5.
    ValueError for other shapes.
    """
    probs, labels = np.asarray(probs, np.float64), np.asarray(labels) > 0.5
    if probs.ndim != 2 or probs.shape != labels.shape:
        raise ValueError(f"probs {probs.shape} and labels {labels.shape} must both be (images, classes)")
    found = []
    for scores, positive in zip(probs.T, labels.T):
        values = np.unique([0, *scores, 1])
        middle = (values[:-1] + values[1:]) / 2
        middle = np.where(middle < values[1:], middle, values[:-1])  # of neighbouring floats it is one of the two
        tried = np.array([0.5, *middle, 1])
        above, below = (np.searchsorted(np.sort(scores[chosen]), tried, "right") for chosen in (positive, ~positive))
        found.append(tried[np.lexsort((np.abs(tried - 0.5), above - below))[0]])
    return np.array(found)


# ---- ensemble.json: weights by checkpoint, thresholds by class (none for single labels), flags of the prediction ----
def write(path, checkpoints, weights, names, thresholds=(), *, flags=""):
    """checkpoints: their paths; thresholds: one per name, or none. Raises UserError when it cannot be written."""
    write_json(path, {"weights": dict(zip(map(str, checkpoints), map(float, weights))),
                      "thresholds": dict(zip(names, map(float, thresholds))), "flags": flags})


def read(path, checkpoints, names, single_label, *, flags=""):
    """-> the checkpoints' weights (list), thresholds (C,) in the order of the names, or 0.5 for single labels.

    Raises UserError when it is damaged, or was made for other checkpoints, classes or flags.
    """
    found = read_json(path)
    try:
        weights = {os.path.realpath(name): weight for name, weight in dict(found["weights"]).items()}
        thresholds = dict(found["thresholds"])
        numbers = (*weights.values(), *thresholds.values())
        if not all(0 <= number <= 1e9 for number in numbers) or not sum(weights.values()):
            raise ValueError("a number is out of range")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a fitted ensemble ({type(error).__name__}: {error}); give the ensemble.json of "
                        f"--fit-weights") from None
    given = list(map(os.path.realpath, checkpoints))
    for what, fitted, now in (("checkpoints", sorted(weights), sorted(given)),
                              ("flags", found.get("flags", flags), flags),
                              ("classes", sorted(thresholds), [] if single_label else sorted(names))):
        if fitted != now:
            raise UserError(f"{path}: was fitted with the {what} {fitted!r}, not {now!r}; give the same, or fit anew "
                            f"with --fit-weights")
    return [weights[checkpoint] for checkpoint in given], \
        0.5 if single_label else np.array([thresholds[name] for name in names])


def fit(members, labels, single_label):
    """Held-out probabilities -> weights (members,), thresholds (classes,), or 0.5 for single labels."""
    weights = fit_weights(members, labels, single_label)
    probs = average(members, weights)
    thresholds = 0.5 if single_label else fit_thresholds(probs, labels)
    count = len(labels) if single_label else labels.size
    before = hits(np.mean(members, 0), labels, single_label) / count
    after = hits(probs, labels, single_label, thresholds) / count
    dist.print0(f"fitted to {len(labels)} held-out images: weights {' '.join(f'{weight:g}' for weight in weights)}, "
                f"accuracy {before:.4f} -> {after:.4f} (of these very images: optimistic)")
    return weights, thresholds
