"""Ensembles of classifiers: weights of the members and a threshold per class, fitted to held-out probabilities.

Both maximise the accuracy itself, which is a step function: they try values, where a gradient would say nothing.
"""
import json
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.files import write_json
from utils.train import dist

FACTORS = (0, 0.5, 1, 1.5, 2, 3)


def average(probs, weights):
    """probs (M, N, C), weights (M,), their sum above 0 -> the weighted mean over members, (N, C) float64."""
    return np.average(np.asarray(probs, np.float64), axis=0, weights=weights)


def adds_up(probs):
    """Whether every row of a table of probabilities (N, C) adds up to 1, as far as its digits tell."""
    digits = next(d for d in range(1, 9) if d == 8 or np.allclose(np.round(probs, d), probs, rtol=0, atol=1e-12))
    rounded = np.clip(0.5 * 10.0 ** -digits * probs.shape[1], 1e-5, 0.1)
    return bool((abs(probs.sum(1) - 1) < rounded + 1e-9).all())


def hits(probs, labels, exclusive=False, thresholds=0.5):
    """How many decisions are right: of the N images where the classes are exclusive (the most probable is theirs), of
    the N x C labels where not (present: above the threshold). probs (N, C), labels (N, C) of 0 and 1."""
    if exclusive:
        return int((probs.argmax(1) == labels.argmax(1)).sum())
    return int(((probs > thresholds) == (labels > 0.5)).sum())


def fit_weights(probs, labels, exclusive):
    """probs (M, N, C) of M members, labels (N, C) of 0 and 1 -> weights (M,) float64, each one of FACTORS.

    From equal weights on, one weight at a time: of all such changes the best is made, until none is better. Better is
    more `hits` at threshold 0.5, or as many with more equal weights (a lower sum of squares of the shares); where two
    changes are alike the earlier member's. Never worse than equal weights on these images. ValueError for other shapes.
    """
    probs, labels = np.asarray(probs, np.float64), np.asarray(labels)
    if probs.ndim != 3 or not len(probs) or probs.shape[1:] != labels.shape:
        raise ValueError(f"probs {probs.shape} must be (members, *labels.shape), labels are {labels.shape}")

    def value(weights):
        shares = np.array(weights) / sum(weights)
        return hits(average(probs, weights), labels, exclusive), -round(float(shares @ shares), 9)

    best = (1.0,) * len(probs)
    score = value(best)
    while True:  # ends: every turn raises the score, and the grid is finite
        steps = [(*best[:m], float(f), *best[m + 1:]) for m in range(len(probs)) for f in FACTORS if f != best[m]]
        found = [(value(weights), weights) for weights in steps if sum(weights)]
        top = max(found, key=lambda item: item[0], default=(score, best))
        if top[0] <= score:
            return np.array(best)
        score, best = top


def fit_thresholds(probs, labels):
    """probs (N, C) 0..1, labels (N, C) of 0 and 1 -> (C,) float64, per class the threshold 0..1 with the most hits.

    Every way to divide a class's scores is tried: at 0, between each two neighbouring scores, and above the highest.
    The threshold is the middle of the best gap; 0.5 where that is as good, else of several the gap nearest to 0.5.
    ValueError for other shapes.
    """
    probs, positive = np.asarray(probs, np.float64), np.asarray(labels) > 0.5
    if probs.ndim != 2 or probs.shape != positive.shape:
        raise ValueError(f"probs {probs.shape} and labels {positive.shape} must both be (images, classes)")
    order = probs.argsort(0, kind="stable")
    scores, positive = (np.take_along_axis(values, order, 0) for values in (probs, positive))
    edge = np.zeros((1, probs.shape[1]))
    low, high = np.concatenate((edge, scores)), np.concatenate((scores, edge + 1))  # gap k has k scores below it
    below = np.concatenate((edge, (~positive).cumsum(0))) - np.concatenate((edge, positive.cumsum(0)))
    right = below + positive.sum(0)
    right[:-1][low[:-1] >= high[:-1]] = -1  # no gap between equal scores; above the last there always is one
    middle = (low + high) / 2
    middle = np.where(middle < high, middle, low)  # of neighbouring floats the middle is one of the two
    tied = np.where(right == right.max(0), np.abs(middle - 0.5), np.inf)
    found = np.take_along_axis(middle, tied.argmin(0)[None], 0)[0]
    half = ((probs > 0.5) == (np.asarray(labels) > 0.5)).sum(0)
    return np.where(half >= right.max(0), 0.5, found)


# ---- ensemble.json: {"weights": {checkpoint: number}, "thresholds": {class: 0..1}, empty for exclusive classes, ------
# ---- "flags": how the checkpoints looked at the images} --------------------------------------------------------------
def write(path, checkpoints, weights, names, thresholds=(), *, flags=""):
    """checkpoints: their paths; thresholds: one per name, or none. Raises UserError when it cannot be written."""
    write_json(path, {"weights": dict(zip(map(str, checkpoints), map(float, weights))),
                      "thresholds": dict(zip(names, map(float, thresholds))), "flags": flags})


def read(path, checkpoints, names, exclusive, *, flags=""):
    """-> the checkpoints' weights (list), thresholds (C,) in the order of the names, or 0.5 for exclusive classes.

    Raises UserError when it is damaged, or was made for other checkpoints, classes or flags.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        weights, thresholds = dict(found["weights"]), dict(found["thresholds"])
        sound = all(is_number(w, 1e9) for w in weights.values()) and sum(weights.values()) > 1e-6 and all(
            is_number(t, 1) for t in thresholds.values())
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a fitted ensemble ({type(error).__name__}); give the ensemble.json of "
                        f"--fit-weights") from None
    if not sound:
        raise UserError(f"{path}: a weight or a threshold is out of range; fit anew with --fit-weights")
    weight_of = {Path(name).resolve(): weight for name, weight in weights.items()}
    given = [Path(checkpoint).resolve() for checkpoint in checkpoints]
    if set(given) != set(weight_of):
        raise UserError(f"{path}: was fitted to {', '.join(weights)}; give these as --weights, or fit anew with "
                        f"--fit-weights")
    if found.get("flags", flags) != flags:  # older ones do not tell
        raise UserError(f"{path}: was fitted with the flags {found['flags']!r}, not {flags!r}; give the same, or fit "
                        f"anew with --fit-weights")
    if not exclusive and set(thresholds) != set(names):
        raise UserError(f"{path}: has thresholds for other classes than the checkpoints'; fit anew with --fit-weights")
    return [weight_of[checkpoint] for checkpoint in given], \
        0.5 if exclusive else np.array([thresholds[name] for name in names])


def is_number(value, most):
    """Whether a value of a JSON is a number from 0 to `most`."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= most


def fit(members, labels, exclusive):
    """Held-out probabilities -> weights (members,), thresholds (classes,), or 0.5 where classes are exclusive."""
    shares = fit_weights(members, labels, exclusive)
    probs = average(members, shares)
    thresholds = 0.5 if exclusive else fit_thresholds(probs, labels)
    count = len(labels) if exclusive else labels.size
    before = hits(average(members, np.ones(len(members))), labels, exclusive) / count
    after = hits(probs, labels, exclusive, thresholds) / count
    dist.print0(f"fitted to {len(labels)} held-out images: weights {' '.join(f'{share:g}' for share in shares)}, "
                f"accuracy {before:.4f} -> {after:.4f} (of these very images: optimistic)")
    return shares, thresholds
