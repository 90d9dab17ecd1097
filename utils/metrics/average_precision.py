"""COCO's average precision of detected boxes, with what explains it: curves, thresholds, confusions."""
import numpy as np
import torch

from utils.train import dist

IOUS, RECALLS = np.linspace(0.5, 0.95, 10), np.linspace(0, 1, 101)
AREAS = {"ap": (0, 1e10), "ap_small": (0, 32 ** 2), "ap_medium": (32 ** 2, 96 ** 2), "ap_large": (96 ** 2, 1e10)}


class DetectionAP:
    """COCO's average precision of boxes (Lin et al. 2014; cocodataset.org/#detection-eval), equal to pycocotools'.

    It keeps the boxes and does the work at the end, in float64 on the CPU.

    classes  their number, C
    max_det  so many detections of an image and class are judged, those with the highest scores
    """

    def __init__(self, classes, max_det=100):
        self.classes, self.max_det = classes, max_det
        self.images = 0
        self.index = []  # what update() was told of each image
        self.detections, self.truths = [np.zeros((0, 7))], [np.zeros((0, 6))]  # the columns of update(), then the image

    @torch.no_grad()
    def update(self, detections, truths, index=None):
        """detections: per image a tensor (n, 6) of x1 y1 x2 y2 score class, in any order, on any device; truths: per
        image (m, 5) of x1 y1 x2 y2 class. Pixels; classes 0 .. C-1. index: the images' numbers, for samples().

        ValueError when the lists differ in length, or a shape or a class is wrong.
        """
        if len(detections) != len(truths):
            raise ValueError(f"detections of {len(detections)} images, but truths of {len(truths)}")
        for name, columns, kept, new in (("detections", 6, self.detections, detections),
                                         ("truths", 5, self.truths, truths)):
            for boxes in new:
                if boxes.dim() != 2 or boxes.shape[1] != columns:
                    raise ValueError(f"{name} {tuple(boxes.shape)} must be (n, {columns})")
            rows = torch.cat([*new]).cpu().double().numpy() if len(new) else np.zeros((0, columns))
            if not np.isin(rows[:, -1], np.arange(self.classes)).all():
                raise ValueError(f"classes of the {name} reach from {rows[:, -1].min():g} to {rows[:, -1].max():g}; "
                                 f"they must be integers in 0 .. {self.classes - 1}")
            image = np.repeat(np.arange(self.images, self.images + len(new)), [len(boxes) for boxes in new])
            kept.append(np.column_stack((rows, image)))
        self.images += len(truths)
        self.index += [-1] * len(truths) if index is None else [int(i) for i in index]

    def reduce(self):
        """Gathers the images of all ranks, if there are several: every rank calls it once, after its last update, and
        a rank without images too. Then all have the same result, which depends on who had which image only where
        scores are equal (COCO's order of those is the images'). Returns self."""
        if dist.world_size() > 1:
            images = dist.gather(self.images)
            for kept in (self.detections, self.truths):
                rows = np.concatenate(kept)
                rows[:, -1] += sum(images[:dist.rank()])
                kept[:] = dist.gather(rows)
            self.images, self.index = sum(images), sum(dist.gather(self.index), [])
        return self

    def compute(self):
        """{"ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"}, each 0 .. 1: means over the classes that have
        truths (for the last three: of that area, 32^2 and 96^2 pixels being the borders), of the precision at 101
        recalls and, where the name has no number, at the IoUs 0.50, 0.55 .. 0.95. NaN when there is no truth at
        all, where COCO prints -1.
        """
        ap = self._precision(IOUS, AREAS.values()).mean(-1)  # (C, areas, IoUs), all NaN or all not
        means = {name: _mean(ap[:, i]) for i, name in enumerate(AREAS)}
        return {"ap": means.pop("ap"), "ap50": _mean(ap[:, 0, 0]), "ap75": _mean(ap[:, 0, 5]), **means}

    def per_class(self):
        """C dicts {"ap", "ap50", "ap75", "truths", "detections"}: as in compute(), NaN for a class without truths;
        how many there are, of the detections those that are judged."""
        ap = self._precision(IOUS, [AREAS["ap"]]).mean(-1)[:, 0]
        detections, truths = self._sorted()
        counts = (np.bincount(rows[:, -2].astype(int), minlength=self.classes) for rows in (truths, detections))
        return [{"ap": float(row.mean()), "ap50": float(row[0]), "ap75": float(row[5]), "truths": int(m),
                 "detections": int(n)} for row, m, n in zip(ap, *counts)]

    def curve(self, iou=0.5):
        """-> recalls (101,), precision (C, 101), float64: the best precision at this recall or a higher one, 0 where
        that recall is not reached, NaN for a class without truths."""
        return torch.from_numpy(RECALLS), torch.from_numpy(self._precision([iou], [AREAS["ap"]])[:, 0, 0])

    def best_threshold(self, iou=0.5):
        """-> (t, F1): keeping the detections with score >= t gives the highest F1, averaged over the classes with
        truths; of several such t the highest. Both NaN without truths or detections."""
        scores, classes, hits, counts, totals = self._match([iou], [AREAS["ap"]])
        gains, present = np.zeros(len(scores)), (totals > 0).sum()
        if not present or not len(scores):
            return float("nan"), float("nan")
        for c in range(self.classes):
            rows = slice(*np.searchsorted(classes, (c, c + 1)))
            if totals[c]:
                f1 = 2 * hits[rows, 0, 0].cumsum() / (counts[rows, 0, 0].cumsum() + totals[c, 0])
                gains[rows] = np.diff(f1, prepend=0)  # what the mean gains by this detection, after the better ones
        order = np.argsort(-scores, kind="stable")
        scores, f1 = scores[order], (gains[order].cumsum() / present).round(12)  # equal ones shall be equal
        f1[:-1][scores[:-1] == scores[1:]] = -1  # detections with equal scores go together
        best = f1.argmax()
        return float(scores[best]), float(f1[best])

    def confusion(self, score=0.25, iou=0.5):
        """-> (C+1, C+1) int64: row truth, column prediction, the last of each is background. Of the detections with
        at least this score, whatever their class, those of highest IoU get their truths first, one each; of equal
        IoUs the same class, then the higher score."""
        detections, truths = self._sorted()
        detections = detections[detections[:, 4] >= score]
        detections = detections[np.lexsort((-detections[:, 4], detections[:, -1]))]
        truths = truths[np.argsort(truths[:, -1], kind="stable")]
        images = detections[:, -1]
        d, t, ious = _pairs(detections, images, truths, truths[:, -1], iou)
        order = np.lexsort((detections[d, -2] != truths[t, -2], -ious, images[d]))
        d, t = d[order], t[order]
        matched = _greedy(images[d], d, t, np.ones((len(d), 1), bool),
                          np.zeros((len(detections), 1), bool), np.zeros((len(truths), 1), bool))[:, 0]
        d, t = d[matched], t[matched]
        predicted, actual = detections[:, -2].astype(int), truths[:, -2].astype(int)
        matrix = np.zeros((self.classes + 1, self.classes + 1), np.int64)
        np.add.at(matrix, (actual[t], predicted[d]), 1)
        matrix[-1] += np.bincount(np.delete(predicted, d), minlength=self.classes + 1)
        matrix[:, -1] += np.bincount(np.delete(actual, t), minlength=self.classes + 1)
        return torch.from_numpy(matrix)

    def samples(self, files, iou=0.5):
        """The rows of samples.csv, by index: name, score (F1 of the image's boxes, class by class, with the detections
        from `best_threshold` on; 1 where nothing is and nothing is found), its boxes, detections and hits."""
        detections, truths = self._sorted()
        detections = detections[detections[:, 4] >= self.best_threshold(iou)[0]]
        groups = self._groups(detections)
        d, t, ious = _pairs(detections, groups, truths, self._groups(truths), iou)
        order = np.lexsort((-ious, d))  # the highest scores first, each takes the truth of highest IoU
        d, t = d[order], t[order]
        hit = _greedy(groups[d], d, t, np.ones((len(d), 1), bool), np.zeros((len(detections), 1), bool),
                      np.zeros((len(truths), 1), bool))[:, 0]
        found, boxes, hits = (np.bincount(images.astype(int), minlength=self.images)
                              for images in (detections[:, -1], truths[:, -1], detections[d[hit], -1]))
        f1 = np.where(found + boxes > 0, 2 * hits / np.maximum(found + boxes, 1), 1.0)
        return [{"name": str(files[self.index[k]]), "score": float(f1[k]), "boxes": int(boxes[k]),
                 "detections": int(found[k]), "hits": int(hits[k])}
                for k in np.argsort(self.index, kind="stable")]

    def boxes_of(self, number):
        """The image of this number, as update() was told -> detections (n, 6), truths (m, 5), as they came."""
        k = self.index.index(number)
        detections, truths = (np.concatenate(kept) for kept in (self.detections, self.truths))
        return tuple(torch.from_numpy(rows[rows[:, -1] == k, :-1]) for rows in (detections, truths))

    def _sorted(self):
        """-> detections (n, 7), truths (m, 6), by image, by class, the best score first; at most max_det of each."""
        detections, truths = np.concatenate(self.detections), np.concatenate(self.truths)
        truths = truths[np.argsort(self._groups(truths), kind="stable")]
        detections = detections[np.lexsort((-detections[:, 4], self._groups(detections)))]
        groups = self._groups(detections)
        return detections[np.arange(len(groups)) - np.searchsorted(groups, groups) < self.max_det], truths

    def _groups(self, rows):
        return rows[:, -1] * self.classes + rows[:, -2]

    def _match(self, ious, areas):
        """-> scores (n,), classes (n,), hits and counts (n, areas, IoUs), totals (C, areas). By class, then by score.

        Per range of areas, a detection takes the free truth in the range of highest IoU; failing that, one outside:
        then it counts neither as hit nor as false alarm, and neither does one outside that finds none.
        """
        detections, truths = self._sorted()
        groups = self._groups(detections)
        inside, inside_truths = _inside(detections, areas), _inside(truths, areas)
        ious = np.minimum(ious, 1 - 1e-10)  # COCO's: 1 shall be reached in spite of rounding
        d, t, iou = _pairs(detections, groups, truths, self._groups(truths), ious.min())
        order = np.lexsort((-t, -iou, d))  # of equal IoUs the last truth
        d, t, reached = d[order], t[order], iou[order][:, None, None] >= ious
        hits = np.zeros((*inside.shape, len(ious)), bool)
        taken = np.zeros((*inside_truths.shape, len(ious)), bool)
        # all truths in the range first: who gets one of them does not depend on the others
        _greedy(groups[d], d, t, reached & inside_truths[t][..., None], hits, taken)
        claimed = hits.copy()
        _greedy(groups[d], d, t, reached & ~inside_truths[t][..., None], claimed, taken)
        counts = hits | ~claimed & inside[..., None]
        order = np.lexsort((-detections[:, 4], detections[:, -2]))  # equal scores stay in the order of the images
        totals = np.stack([inside_truths[truths[:, -2] == c].sum(0) for c in range(self.classes)])
        return detections[order, 4], detections[order, -2], hits[order], counts[order], totals

    def _precision(self, ious, areas):
        """-> (C, areas, IoUs, 101), NaN where there are no truths."""
        _, classes, hits, counts, totals = self._match(ious, list(areas))
        result = np.full((*totals.shape, len(ious), len(RECALLS)), np.nan)
        for c, a in zip(*totals.nonzero()):
            rows, total = slice(*np.searchsorted(classes, (c, c + 1))), totals[c, a]
            hit, column = hits[rows, a].nonzero()
            found, seen = hits[rows, a].cumsum(0, np.int32), counts[rows, a].cumsum(0, np.int32)
            # Precision at the k-th hit, where it is highest for that recall; then the best from there on.
            best = np.zeros((total, len(ious)))
            best[found[hit, column] - 1, column] = found[hit, column] / seen[hit, column]
            best = np.maximum.accumulate(best[::-1])[::-1]
            needed = np.searchsorted(np.arange(total + 1) / total, RECALLS)  # hits for each recall
            result[c, a] = best[np.maximum(needed, 1) - 1].T
        return result


def _mean(ap):
    present = ap[~np.isnan(ap)]
    return float(present.mean()) if len(present) else float("nan")


def _inside(boxes, areas):
    """(n, areas): is the box's area in the range, borders included?"""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return np.stack([~((area < low) | (area > high)) for low, high in areas], 1)


def _pairs(detections, groups, truths, truth_groups, least):
    """All pairs of the same group with IoU >= least > 0, detection by detection. truth_groups ascend.
    -> row of the detection, row of the truth, IoU, each (p,)."""
    first, last = (np.searchsorted(truth_groups, groups, side) for side in ("left", "right"))
    found = []
    for start in range(0, max(len(groups), 1), 10000):  # in parts, which bounds the memory
        part = slice(start, start + 10000)
        sizes = (last - first)[part]
        d = np.repeat(np.arange(len(groups))[part], sizes)
        t = np.arange(len(d)) + np.repeat(first[part] - (sizes.cumsum() - sizes), sizes)
        a, b = detections[d, :4].T, truths[t, :4].T
        w = np.minimum(a[2], b[2]) - np.maximum(a[0], b[0])
        h = np.minimum(a[3], b[3]) - np.maximum(a[1], b[1])
        shared = w.clip(0) * h.clip(0)
        union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
        iou = np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)
        near = iou >= least
        found.append((d[near], t[near], iou[near]))
    return [np.concatenate(column) for column in zip(*found)]


def _greedy(groups, d, t, allowed, claimed, taken):
    """Goes through the pairs (d, t) of each group in the order given, and joins the two if that is allowed and
    neither has a partner. All groups advance together: step k is the k-th pair of each.

    groups (p,), ascending; d and t (p,), of which a group's are no other group's; allowed (p, ...); claimed (n, ...)
    and taken (m, ...), whether a detection and a truth have a partner, are updated. -> (p, ...), the pairs joined.
    """
    step = np.arange(len(groups)) - np.searchsorted(groups, groups)
    joined = np.zeros_like(allowed)
    for pairs in np.split(np.argsort(step, kind="stable"), np.bincount(step).cumsum()[:-1]):
        hit = allowed[pairs] & ~claimed[d[pairs]] & ~taken[t[pairs]]
        joined[pairs] = hit
        claimed[d[pairs]] |= hit
        taken[t[pairs]] |= hit
    return joined
