"""Metrics that count: update() adds counts (or keeps a row per sample), reduce() sums them over ranks (or gathers
those), compute() divides once, at the end.

So the result depends neither on the batch size nor on how the samples were dealt to ranks. The first key of compute()
is the score (higher is better).
"""
import numpy as np
import torch

from utils.train import dist
from utils.metrics.average_precision import DetectionAP  # noqa: F401, detection's metric is one of these
from utils.metrics.ensemble import fit_thresholds


class Counts:
    """int64 counts, kept on the device of what was last added; the base of the metrics below."""

    def __init__(self, size):
        self.counts = torch.zeros(size, dtype=torch.int64)

    def add(self, counts):
        self.counts = self.counts.to(counts.device) + counts

    def reduce(self):
        """Sums the counts over ranks, if there are several: every rank calls it once, after its last update, and
        a rank without samples too. The sum is taken on CPUs, where compute() needs it. Returns self."""
        self.counts = sum(dist.gather(self.counts.cpu()))
        return self


def _ratio(part, whole, empty):
    """part / whole, and `empty` for 0/0."""
    return part / whole if whole else empty


def _valid(labels, ignore):
    # int64 first: torch wraps a scalar to the dtype of the tensor, and in uint8 -1 would equal 255
    return torch.ones_like(labels, dtype=torch.bool) if ignore is None else labels.long() != ignore


LEVELS = torch.arange(1, 20) / 20  # thresholds that `BinaryIoU.best_threshold` chooses from


class BinaryIoU(Counts):
    """IoU, F1, precision and recall of the positive class over all pixels of all items together (the pooled Jaccard
    index of torchmetrics' BinaryJaccardIndex, not a mean over items).

    threshold  a pixel is predicted positive when its probability is greater than this
    ignore     label value of pixels that do not count
    """

    def __init__(self, threshold=0.5, ignore=None):
        # hits, predicted, actual; hits and predicted with each item's best pixel forced; then, by the number of LEVELS
        # that lie below a pixel's probability, the positive pixels and all
        super().__init__(5 + 2 * (len(LEVELS) + 1))
        self.threshold, self.ignore = threshold, ignore

    @torch.no_grad()
    def update(self, probs, labels):
        """probs (B,H,W) or (B,1,H,W), float, after the sigmoid; labels likewise, any dtype, positive where > 0.5.

        ValueError when the shapes differ or there are several channels.
        """
        shapes = tuple(probs.shape), tuple(labels.shape)
        probs, labels = (t.squeeze(1) if t.dim() == 4 else t for t in (probs, labels))
        if probs.dim() != 3 or probs.shape != labels.shape:
            raise ValueError(f"probs {shapes[0]} and labels {shapes[1]} must both be (B,H,W) or (B,1,H,W)")
        probs, labels = probs.flatten(1), labels.flatten(1)
        valid = _valid(labels, self.ignore)
        predicted, actual = (probs > self.threshold) & valid, (labels > 0.5) & valid
        # The forced pixel adds to the counts only where it was not predicted anyway, and never if all is ignored.
        best = probs.masked_fill(~valid, -torch.inf).argmax(1, keepdim=True)
        forced = valid.gather(1, best) & ~predicted.gather(1, best)
        hits = predicted & actual
        counts = torch.stack([hits.sum(), predicted.sum(), actual.sum(),
                              hits.sum() + (forced & actual.gather(1, best)).sum(), predicted.sum() + forced.sum()])
        level = torch.bucketize(probs.float(), LEVELS.to(probs.device))
        spread = [torch.bincount(level[chosen], minlength=len(LEVELS) + 1) for chosen in (actual, valid)]
        self.add(torch.cat((counts, *spread)))

    def best_threshold(self):
        """The one of LEVELS with the highest IoU over all pixels; of equal ones the nearest to 0.5."""
        positive, everything = self.counts[5:].view(2, -1).double()
        hits, predicted = (values.flip(0).cumsum(0).flip(0)[1:] for values in (positive, everything))
        iou = hits / (predicted + positive.sum() - hits).clamp(min=1)
        best = torch.nonzero(iou == iou.max())[:, 0].tolist()
        return float(LEVELS[min(best, key=lambda k: abs(k - len(LEVELS) // 2))])

    def compute(self):
        """{"iou", "f1", "precision", "recall", "iou_forced"}, each 0 .. 1.

        iou_forced counts (p > threshold) | (p is the maximum of its item) as predicted, one pixel an item even when
        several tie: the wildfire competition's masks are never empty. When nothing is positive and nothing is
        predicted (or nothing was counted), there is nothing to get wrong and all values are 1; otherwise a
        precision or recall of 0/0 is 0.
        """
        hits, predicted, actual, forced_hits, forced = self.counts[:5].tolist()
        empty = 1.0 if predicted + actual == 0 else 0.0
        return {"iou": _ratio(hits, predicted + actual - hits, 1.0),
                "f1": _ratio(2 * hits, predicted + actual, 1.0),
                "precision": _ratio(hits, predicted, empty),
                "recall": _ratio(hits, actual, empty),
                "iou_forced": _ratio(forced_hits, forced + actual - forced_hits, 1.0)}


class MeanIoU(Counts):
    """Mean IoU and pixel accuracy from a confusion matrix over all pixels of all items together.

    classes  their number, C
    ignore   label value of pixels that do not count
    """

    def __init__(self, classes, ignore=None):
        super().__init__(classes * classes)  # row: label, column: prediction
        self.classes, self.ignore = classes, ignore

    @torch.no_grad()
    def update(self, pred_labels, labels):
        """pred_labels (B,H,W), integers 0 .. C-1; labels the same shape, 0 .. C-1 or `ignore`.

        ValueError when the shapes differ or a value that counts is out of range.
        """
        if pred_labels.shape != labels.shape:
            raise ValueError(f"predictions {tuple(pred_labels.shape)} and labels {tuple(labels.shape)} must have "
                             f"the same shape")
        valid = _valid(labels, self.ignore)
        pred_labels, labels = (t.long().masked_fill(~valid, 0) for t in (pred_labels, labels))
        for name, values in (("predictions", pred_labels), ("labels", labels)):
            if ((values < 0) | (values >= self.classes)).any():
                raise ValueError(f"{name} reach from {values.min()} to {values.max()}, outside 0 .. "
                                 f"{self.classes - 1} (ignore={self.ignore})")
        # Ignored pixels go to a bin of their own, in front.
        bins = torch.where(valid, 1 + labels * self.classes + pred_labels, 0)
        self.add(torch.bincount(bins.flatten(), minlength=1 + self.classes ** 2)[1:])

    def compute(self):
        """{"miou", "acc", "iou_0", ...}, each 0 .. 1.

        miou is the mean over the classes that occur in the labels or in the predictions; a class that occurs in
        neither has no IoU and no key. When nothing was counted, miou and acc are 1, as in BinaryIoU.
        """
        matrix = self.counts.view(self.classes, self.classes)
        hits = matrix.diagonal()
        unions = (matrix.sum(0) + matrix.sum(1) - hits).tolist()
        ious = {f"iou_{c}": hit / union for c, (hit, union) in enumerate(zip(hits.tolist(), unions)) if union}
        return {"miou": _ratio(sum(ious.values()), len(ious), 1.0),
                "acc": _ratio(hits.sum().item(), matrix.sum().item(), 1.0), **ious}


class Accuracy:
    """Accuracy and average precision of classification, several classes an image or (exclusive) one.

    It keeps the probabilities: the average precision needs their order.
    """

    def __init__(self, classes, exclusive=False):
        self.classes, self.exclusive = classes, exclusive
        self.rows = [np.zeros((0, 2 * classes + 1))]  # probabilities, labels, index

    @torch.no_grad()
    def update(self, probs, labels, index=None):
        """probs (B, C) 0..1, labels (B, C) 0 or 1; index (B,): the images' numbers, for samples(). ValueError when the
        shapes differ."""
        if probs.shape != labels.shape or probs.shape[1] != self.classes:
            raise ValueError(f"probs {tuple(probs.shape)} and labels {tuple(labels.shape)} must both be "
                             f"(B, {self.classes})")
        index = torch.full((len(probs),), -1) if index is None else index
        columns = [t.cpu().double() for t in (probs, labels, index[:, None])]  # mps has no doubles
        self.rows.append(torch.cat(columns, 1).numpy())

    def reduce(self):
        """Gathers the images of all ranks, if there are several: every rank calls it once. Returns self."""
        self.rows = dist.gather(np.concatenate(self.rows))
        return self

    def _split(self):
        probs, labels, _ = np.split(np.concatenate(self.rows), [self.classes, 2 * self.classes], axis=1)
        decided = np.eye(self.classes, dtype=bool)[probs.argmax(1)] if self.exclusive else probs > 0.5
        return probs, labels > 0.5, decided

    def compute(self):
        """exclusive: {"acc": share of images whose most probable class is theirs, "map"}. Else {"acc": share of all
        single labels that are right at 0.5 (Dirty-MNIST's score), "exact": of images with no wrong label, "map"}.
        map: mean over classes that occur of the average precision. NaN when nothing was counted."""
        probs, labels, decided = self._split()
        right = decided == labels
        if not len(probs):
            return {"acc": float("nan"), "map": float("nan")}
        found = average_precisions(probs, labels)
        mean = float(found[labels.any(0)].mean()) if labels.any() else float("nan")
        if self.exclusive:
            return {"acc": float((probs.argmax(1) == labels.argmax(1)).mean()), "map": mean}
        return {"acc": float(right.mean()), "exact": float(right.all(1).mean()), "map": mean}

    def per_class(self):
        """C dicts {"acc", "ap", "images"}: share of right labels, average precision, images that have the class."""
        probs, labels, decided = self._split()
        return [{"acc": float(a), "ap": float(p), "images": int(n)}
                for a, p, n in zip((decided == labels).mean(0), average_precisions(probs, labels), labels.sum(0))]


    def best_thresholds(self):
        """A threshold per class, the one with the most right labels: see utils.ensemble.fit_thresholds. -> list"""
        probs, labels, _ = self._split()
        return fit_thresholds(probs, labels).tolist() if len(probs) else [0.5] * self.classes

    def samples(self, files, names):
        """The rows of samples.csv, by index: name, score (minus the mean cross entropy of the labels: a wrong label
        costs the more the surer the net is), the labels, and what is predicted."""
        probs, labels, decided = self._split()
        wanted = np.where(labels, probs, 1) if self.exclusive else np.where(labels, probs, 1 - probs)
        score = np.log(wanted.clip(1e-7)).sum(1) / (1 if self.exclusive else self.classes)
        index = np.concatenate(self.rows)[:, -1].astype(int)
        said = [[" ".join(name for name, there in zip(names, row) if there) for row in part]
                for part in (labels, decided)]
        return [{"name": str(files[index[k]]), "score": float(score[k]), "labels": said[0][k], "predicted": said[1][k]}
                for k in index.argsort(kind="stable")]


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
