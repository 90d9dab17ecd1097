"""Intersection over union (IoU) of segmentation masks: of a data set, and image by image.

update() adds counts (or keeps a row per image), reduce() sums them over the ranks (or gathers the rows), compute()
divides once, at the end: the result depends neither on the batch size nor on how the images were distributed to ranks.
The first key of compute() is the score, higher is better.
"""

import torch

from utils.ops.components import components
from utils.train import dist

LEVELS = torch.arange(19, 0, -1) / 20  # thresholds that `BinaryIoU.best_threshold` chooses from
HALF = 9  # the place of 0.5 among them


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


def _ratio(part, whole, empty=1.0):
    """part / whole, and `empty` for 0/0."""
    return part / whole if whole else empty


def _valid(labels, ignore):
    # int64 first: torch wraps a scalar to the dtype of the tensor, and in uint8 -1 would equal 255
    return torch.ones_like(labels, dtype=torch.bool) if ignore is None else labels.long() != ignore


class BinaryIoU(Counts):
    """IoU, F1, precision and recall of the positive class over all pixels of all images together (the pooled Jaccard
    index of torchmetrics' BinaryJaccardIndex, not a mean over images). A pixel is predicted positive when its
    probability is greater than 0.5.

    ignore  label value of pixels that do not count
    """

    def __init__(self, ignore=None):
        # Hits and predicted pixels of iou_forced; then the positive pixels and all pixels, by the number of LEVELS that
        # their probability does not exceed.
        super().__init__(2 + 2 * (len(LEVELS) + 1))
        self.ignore = ignore

    @torch.no_grad()
    def update(self, probs, labels):
        """probs (B,H,W) or (B,1,H,W), float, after the sigmoid; labels likewise, any dtype, positive where > 0.5.

        ValueError when the shapes differ.
        """
        if probs.numel() != labels.numel() or probs.shape[-2:] != labels.shape[-2:]:
            raise ValueError(f"probs {tuple(probs.shape)} and labels {tuple(labels.shape)} must both be (B,H,W) or "
                             f"(B,1,H,W)")
        probs, labels = probs.flatten(1).float(), labels.flatten(1)
        valid = _valid(labels, self.ignore)
        actual = (labels > 0.5) & valid
        highest = probs.masked_fill(~valid, -torch.inf).argmax(1, keepdim=True)
        forced = (probs > 0.5).scatter(1, highest, True) & valid
        level = torch.bucketize(-probs, -LEVELS.to(probs.device), right=True)
        by_level = [torch.bincount(level[chosen], minlength=len(LEVELS) + 1) for chosen in (actual, valid)]
        self.add(torch.cat((torch.stack([(forced & actual).sum(), forced.sum()]), *by_level)))

    def _above(self):
        """-> positive pixels and all pixels with a probability above each of LEVELS, and above nothing: (2, 20)"""
        return self.counts[2:].view(2, -1).cumsum(1)

    def best_threshold(self):
        """The one of LEVELS with the highest IoU over all pixels; of equal ones the nearest to 0.5."""
        hits, predicted = self._above().double()
        iou = (hits / (predicted + hits[-1] - hits).clamp(min=1)).tolist()
        return float(LEVELS[max(range(len(LEVELS)), key=lambda k: (iou[k], -abs(k - HALF), k))])

    def compute(self):
        """{"iou", "f1", "precision", "recall", "iou_forced"}, each 0 .. 1.

        iou_forced counts (p > 0.5) | (p is the maximum of its image) as predicted, one pixel an image even when
        several tie: the wildfire competition's masks are never empty. When nothing is positive and nothing is
        predicted (or nothing was counted), there is nothing to get wrong and all values are 1; otherwise a
        precision or recall of 0/0 is 0.
        """
        (hits, actual), (predicted, _) = self._above()[:, [HALF, -1]].tolist()
        forced_hits, forced = self.counts[:2].tolist()
        empty = float(predicted + actual == 0)
        return {"iou": _ratio(hits, predicted + actual - hits),
                "f1": _ratio(2 * hits, predicted + actual),
                "precision": _ratio(hits, predicted, empty),
                "recall": _ratio(hits, actual, empty),
                "iou_forced": _ratio(forced_hits, forced + actual - forced_hits)}


class MeanIoU(Counts):
    """Mean IoU and pixel accuracy from a confusion matrix over all pixels of all images together.

    classes  the number of classes, C
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
        pred_labels, labels = pred_labels[valid].long(), labels[valid].long()
        values = torch.stack((pred_labels, labels))
        if ((values < 0) | (values >= self.classes)).any():
            raise ValueError(f"predictions or labels reach from {values.min()} to {values.max()}, outside 0 .. "
                             f"{self.classes - 1} (ignore={self.ignore})")
        self.add(torch.bincount(labels * self.classes + pred_labels, minlength=self.classes ** 2))

    def compute(self):
        """{"miou", "acc", "iou_0", ...}, each 0 .. 1.

        miou is the mean over the classes that occur in the labels or in the predictions; a class that occurs in
        neither has no IoU and no key. When nothing was counted, miou and acc are 1, as in BinaryIoU.
        """
        matrix = self.counts.view(self.classes, self.classes)
        hits = matrix.diagonal()
        pairs = torch.stack((hits, matrix.sum(0) + matrix.sum(1) - hits), 1).tolist()
        ious = {f"iou_{c}": hit / union for c, (hit, union) in enumerate(pairs) if union}
        return {"miou": _ratio(sum(ious.values()), len(ious)), "acc": _ratio(int(hits.sum()), int(matrix.sum())), **ious}


class SampleIoU:
    """IoU of each image, and the objects that are found in it.

    Class 0 is background. The IoU of an image is taken over all other classes together: pixels of the right class,
    divided by the pixels that are predicted or labelled; 1 when there are none. An object is a connected component of
    the ground truth; it is found when at least half of its pixels have the right class.

    ignore  label value of pixels that do not count
    """

    def __init__(self, ignore=None):
        self.ignore = ignore
        self.images = []  # rows of: index; right, predicted and actual pixels; objects, objects found

    @torch.no_grad()
    def update(self, index, predicted, truth):
        """index (B,), the images' numbers; predicted, truth (B,H,W), class indices (bool or 0 and 1 where there is
        one class). ValueError when the shapes differ."""
        if predicted.shape != truth.shape or truth.ndim != 3 or len(index) != len(truth):
            raise ValueError(f"predictions {tuple(predicted.shape)} and truth {tuple(truth.shape)} must both be "
                             f"(B,H,W), with {len(index)} images")
        valid = _valid(truth, self.ignore)
        for number, p, t in zip(index, (predicted * valid).cpu(), (truth * valid).cpu()):
            right, objects = (p == t) & (t > 0), components(t)
            pixels = objects.flatten().bincount()
            found = 2 * objects[right].bincount(minlength=len(pixels)) >= pixels
            # number 0 is the background
            counts = number, right.sum(), (p > 0).sum(), (t > 0).sum(), len(pixels) - 1, found[1:].sum()
            self.images.append(list(map(int, counts)))

    def reduce(self):
        """Gathers the rows of all ranks, if there are several: every rank calls it once. Returns self."""
        self.images = sum(dist.gather(self.images), [])
        return self

    def samples(self, names):
        """The rows of samples.csv; names: by the images' numbers."""
        return [{"name": str(names[i]), "score": _ratio(right, predicted + actual - right), "area": actual,
                 "predicted": predicted, "objects": objects, "found": found}
                for i, right, predicted, actual, objects, found in sorted(self.images)]
