"""Accuracy and average precision of image classification, of a data set and image by image.

update() keeps a row per image, reduce() gathers the rows of all ranks, compute() evaluates them once, at the end: the
result depends neither on the batch size nor on how the images were distributed to ranks. The first key of compute() is
the score, higher is better.
"""
import numpy as np
import torch

from utils.train import dist


class Accuracy:
    """Accuracy and average precision: of several classes an image, or of one (single_label).

    It keeps the probabilities, because the average precision needs their order.
    """

    def __init__(self, classes, single_label=False):
        self.classes, self.single_label = classes, single_label
        self.rows = [np.zeros((0, 2 * classes + 1))]  # probabilities, labels, index

    @torch.no_grad()
    def update(self, probs, labels, index):
        """probs (B, C) 0..1, labels (B, C) 0 or 1; index (B,): the images' numbers. ValueError when the shapes differ.
        """
        if probs.shape != labels.shape or probs.shape[1] != self.classes:
            raise ValueError(f"probs {tuple(probs.shape)} and labels {tuple(labels.shape)} must both be "
                             f"(B, {self.classes})")
        columns = [t.cpu().double() for t in (probs, labels, index[:, None])]  # mps has no doubles
        self.rows.append(torch.cat(columns, 1).numpy())

    def reduce(self):
        """Gathers the images of all ranks, if there are several: every rank calls it once. Returns self."""
        self.rows = dist.gather(np.concatenate(self.rows))
        return self

    def _columns(self):
        """-> probabilities, labels and predictions (N, C), index (N,); labels and predictions are bool."""
        rows = np.concatenate(self.rows)
        probs, labels = rows[:, :self.classes], rows[:, self.classes:-1] > 0.5
        predicted = np.eye(self.classes, dtype=bool)[probs.argmax(1)] if self.single_label else probs > 0.5
        return probs, labels, predicted, rows[:, -1].astype(int)

    def compute(self):
        """single_label: {"acc": share of images whose most probable class is theirs, "map"}. Else {"acc": share of all
        single labels that are right at 0.5 (Dirty-MNIST's score), "exact": of images with no wrong label, "map"}.
        map: mean of the average precision over the classes that occur. NaN when nothing was counted."""
        probs, labels, predicted, _ = self._columns()
        if not len(probs):
            return {"acc": float("nan"), "map": float("nan")}
        right, found = predicted == labels, average_precisions(probs, labels)[labels.any(0)]
        exact = float(right.all(1).mean())
        scores = {"acc": exact} if self.single_label else {"acc": float(right.mean()), "exact": exact}
        return scores | {"map": float(found.mean()) if len(found) else float("nan")}

    def per_class(self):
        """C dicts {"acc", "ap", "images"}: share of right labels, average precision, images that have the class."""
        probs, labels, predicted, _ = self._columns()
        return [{"acc": float(acc), "ap": float(ap), "images": int(count)} for acc, ap, count in zip(
            (predicted == labels).mean(0), average_precisions(probs, labels), labels.sum(0))]

    def best_thresholds(self):
        """The threshold of each class that makes the most labels right, see `fit_thresholds`. -> list"""
        return fit_thresholds(*self._columns()[:2]).tolist()

    def samples(self, files, names):
        """The rows of samples.csv, by index: name, score (minus the mean cross entropy of the labels: a wrong label
        costs the more the more confident the net is), the labels, and the predicted classes."""
        probs, labels, predicted, index = self._columns()
        likelihood = np.where(labels, probs, 1 if self.single_label else 1 - probs).clip(1e-7)
        score = np.log(likelihood).sum(1) / (1 if self.single_label else self.classes)

        def text(row):
            return " ".join(name for name, present in zip(names, row) if present)

        return [{"name": str(files[index[k]]), "score": float(score[k]), "labels": text(labels[k]),
                 "predicted": text(predicted[k])} for k in index.argsort(kind="stable")]


def average_precisions(scores, labels):
    """scores (N, C), labels (N, C) bool -> (C,): the sum over thresholds of precision times gain in recall, as
    scikit-learn computes it; NaN for a class without positives."""
    result = []
    for s, y in zip(scores.T, labels.T):
        order = np.argsort(-s, kind="stable")
        s, y = s[order], y[order]
        last = np.append(s[1:] != s[:-1], True)[:len(s)]  # equal scores are one threshold
        hits, seen = y.cumsum()[last], np.flatnonzero(last) + 1
        result.append((hits / seen * np.diff(hits, prepend=0)).sum() / y.sum() if y.any() else np.nan)
    return np.array(result)


def fit_thresholds(probs, labels):
    """probs (N, C) 0..1, labels (N, C) bool -> (C,) float64, per class the threshold 0..1 with the most right labels.

    Every way to divide a class's scores is tried: below the lowest, between each two neighbours, above the highest.
    The threshold is the middle of the best gap: 0.5 if that is as good, otherwise the best middle nearest to 0.5.
    """
    found = []
    for scores, positive in zip(probs.T, labels.T):
        values = np.unique([0, *scores, 1])
        middle = (values[:-1] + values[1:]) / 2
        middle = np.where(middle < values[1:], middle, values[:-1])  # of neighbouring floats it is one of the two
        tried = np.array([0.5, *middle, 1])
        above, below = (np.searchsorted(np.sort(scores[chosen]), tried, "right") for chosen in (positive, ~positive))
        found.append(tried[np.lexsort((np.abs(tried - 0.5), above - below))[0]])
    return np.array(found)
