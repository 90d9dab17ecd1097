"""COCO's average precision of detected boxes, and what explains it: thresholds, scores of images."""
import numpy as np
import torch

from utils.ops import boxes

IOUS, RECALLS = np.linspace(0.5, 0.95, 10), np.linspace(0, 1, 101)
AREAS = {"ap": (0, 1e10), "ap_small": (0, 32 ** 2), "ap_medium": (32 ** 2, 96 ** 2), "ap_large": (96 ** 2, 1e10)}


class DetectionAP:
    """COCO's average precision of boxes (Lin et al. 2014; cocodataset.org/#detection-eval), equal to pycocotools'.

    It keeps the boxes and evaluates them at the end, in float64 on the CPU.

    classes  the number of classes, C
    max_det  so many detections of an image and class count, those with the highest scores
    """

    def __init__(self, classes, max_det=100):
        self.classes, self.max_det = classes, max_det
        self.detections, self.gt_boxes = [], []  # image by image: (n, 6) and (m, 5), float64
        self.by_iou = {}  # IoU -> per class scores (n,), hits (n,) and the number of ground-truth boxes

    def update(self, detections, gt_boxes):
        """detections: per image a tensor (n, 6) of x1 y1 x2 y2 score class, in any order, on any device; gt_boxes: per
        image (m, 5) of x1 y1 x2 y2 class. Pixels; classes 0 .. C-1. Where several processes validate, each is given the
        images of all (`TiledImages.detect` gathers them).

        ValueError when the lists differ in length, or a shape or a class is wrong.
        """
        if len(detections) != len(gt_boxes):
            raise ValueError(f"there are detections of {len(detections)} images, but gt_boxes of {len(gt_boxes)}")
        detections = [self._checked("detections", rows, 6) for rows in detections]
        self.by_iou = {}
        self.gt_boxes += [self._checked("gt_boxes", rows, 5) for rows in gt_boxes]
        self.detections += [rows if len(rows) <= self.max_det else self._best(rows) for rows in detections]

    def _checked(self, name, rows, columns):
        if rows.shape[1:] != (columns,) or not set(rows[:, -1].tolist()) <= set(range(self.classes)):
            raise ValueError(f"{name} {tuple(rows.shape)} must be (n, {columns}), their classes 0 .. {self.classes - 1}")
        return rows.detach().cpu().double()

    def _best(self, rows):
        """Of each class the max_det rows with the highest scores."""
        rows = boxes.by_score(rows)
        return torch.cat([rows[rows[:, 5] == c][:self.max_det] for c in rows[:, 5].unique()])

    def compute(self):
        """{"ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"}, each 0 .. 1: means over the classes that have
        ground truth (for the last three: of that area, between 32^2 and 96^2 pixels), of the precision at 101 recalls
        and, where the name has no number, at the IoUs 0.50, 0.55 .. 0.95. NaN when there is no ground truth at all,
        where COCO prints -1.
        """
        ap = self._precision(IOUS, [*AREAS.values()]).mean(-1)  # (C, areas, IoUs), all NaN or all not
        means = {name: _mean(ap[:, i]) for i, name in enumerate(AREAS)}
        return {"ap": means.pop("ap"), "ap50": _mean(ap[:, 0, 0]), "ap75": _mean(ap[:, 0, 5]), **means}

    def per_class(self):
        """C dicts {"ap", "ap50", "ap75", "truths"}: AP as in compute(), NaN for a class without ground truth; the
        number of ground-truth boxes."""
        actual = _joined(self.gt_boxes, 5)[:, 4]
        return [{"ap": float(row.mean()), "ap50": float(row[0]), "ap75": float(row[5]), "truths": int((actual == c).sum())}
                for c, row in enumerate(self._precision(IOUS, [AREAS["ap"]]).mean(-1)[:, 0])]

    def best_threshold(self, iou=0.5):
        """-> (t, F1): keeping the detections with score >= t gives the highest F1, averaged over the classes with
        ground truth; of several such t the highest. Both NaN without ground truth or detections."""
        if iou not in self.by_iou:
            self._precision([iou], [AREAS["ap"]])
        levels = np.unique(np.concatenate([scores for scores, *_ in self.by_iou[iou]]))[::-1]
        present = [row for row in self.by_iou[iou] if row[-1]]
        if not len(levels) or not present:
            return float("nan"), float("nan")
        f1 = np.zeros(len(levels))
        for scores, hits, total in present:
            kept = np.searchsorted(-scores, -levels, "right")  # the number of detections with at least each level
            f1 += 2 * np.append(0, hits.cumsum())[kept] / (kept + total) / len(present)
        best = f1.round(12).argmax()  # equal values must compare as equal
        return float(levels[best]), float(f1[best])

    def samples(self, files, iou=0.5):
        """The rows of samples.csv, one per image: name, score (the F1 of the image's boxes, class by class, with the
        detections from `best_threshold` on; 1 where nothing is and nothing is found), and the numbers of its
        ground-truth boxes, detections and hits."""
        threshold, rows = self.best_threshold(iou)[0], []
        for file, detections, gt_boxes in zip(files, self.detections, self.gt_boxes):
            kept = boxes.confident(detections, threshold)
            d, t, overlap = _pairs([kept], [gt_boxes], iou)
            order = np.lexsort((-overlap, d, -kept[d, 4].numpy()))  # each, the best first, takes the highest IoU
            hits, count = int(_greedy(d[order], t[order]).sum()), len(kept) + len(gt_boxes)
            rows.append({"name": str(file), "score": 2 * hits / count if count else 1.0, "boxes": len(gt_boxes),
                         "detections": len(kept), "hits": hits})
        return rows

    def _evaluate(self, ious, areas):
        """Yields per class: scores (n,), the highest first, of equal ones in the order of the images; hits and counted
        (n, areas, IoUs); the number of ground-truth boxes (areas,).

        For each range of areas, a detection takes the free ground-truth box of its image and class that is in the range
        and has the highest IoU; failing that, one outside the range: then it counts neither as a hit nor as a false
        positive, and neither does a detection outside the range that takes none.
        """
        detections, gt_boxes = _joined(self.detections, 6), _joined(self.gt_boxes, 5)
        low, high = np.transpose(areas)
        inside, gt_inside = ((low <= size) & (size <= high) for size in (
            boxes.sides(rows).prod(1, keepdims=True) for rows in (detections, gt_boxes)))
        least = np.minimum(ious, 1 - 1e-10)  # COCO's: 1 shall be reached in spite of rounding
        d, t, overlap = _pairs(self.detections, self.gt_boxes, least.min())
        order = np.lexsort((-t, -overlap, d, -detections[d, 4]))  # of equal IoUs the last box
        d, t, overlap = d[order], t[order], overlap[order, None, None]
        ranked = np.lexsort((-detections[:, 4], detections[:, 5]))
        ends = np.searchsorted(detections[ranked, 5], np.arange(self.classes + 1))
        rank, label = ranked.argsort()[d], detections[d, 5]
        for c, (first, last) in enumerate(zip(ends, ends[1:])):  # class by class, which takes less memory
            rows, own, total = ranked[first:last], label == c, gt_inside[gt_boxes[:, 4] == c].sum(0)
            i, j = np.tile(rank[own] - first, 2), np.tile(t[own], 2)
            reached, wanted = overlap[own] >= least, gt_inside[t[own], :, None]
            # all boxes in the range first: who gets one of them does not depend on the others
            pair, *column = _greedy(i, j, np.concatenate((reached & wanted, reached & ~wanted))).nonzero()
            hits, claimed = np.zeros((2, len(rows), len(areas), len(ious)), bool)
            claimed[i[pair], *column] = True
            hits[i[pair], *column] = 2 * pair < len(i)
            yield detections[rows, 4], hits, hits | ~claimed & inside[rows][..., None], total

    def _precision(self, ious, areas):
        """-> (C, areas, IoUs, 101), NaN where there is no ground truth."""
        result = np.full((self.classes, len(areas), len(ious), len(RECALLS)), np.nan)
        self.by_iou |= {iou: [] for iou in ious}
        for c, (scores, hits, counted, totals) in enumerate(self._evaluate(ious, areas)):
            for k, iou in enumerate(ious):
                self.by_iou[iou].append((scores, hits[:, 0, k], totals[0]))
            for a in totals.nonzero()[0]:
                found, seen = hits[:, a].cumsum(0), counted[:, a].cumsum(0)
                precision = np.append(found / np.maximum(seen, 1), np.zeros((1, len(ious))), 0)
                precision = np.maximum.accumulate(precision[::-1])[::-1]  # the best at this recall or a higher one
                needed = np.searchsorted(np.arange(totals[a] + 1) / totals[a], RECALLS)  # hits for each recall
                for k in range(len(ious)):
                    result[c, a, k] = precision[np.searchsorted(found[:, k], needed), k]
        return result


def _mean(ap):
    present = ap[~np.isnan(ap)]
    return float(present.mean()) if len(present) else float("nan")


def _joined(rows_of, columns):
    """Boxes of each image -> one numpy array (n, columns)."""
    return torch.cat([torch.zeros(0, columns).double(), *rows_of]).numpy()


def _pairs(detections, gt_boxes, least):
    """Lists of the boxes of images -> all pairs in one image and class with IoU >= least > 0: the number of the
    detection and of the ground-truth box, through all images, and the IoU, each (p,)."""
    found, n, m = [np.zeros((3, 0))], 0, 0
    for a, b in zip(detections, gt_boxes):
        overlap = boxes.iou(a[:, None, :4], b[:, :4], eps=0)  # NaN for two boxes without area
        d, t = ((overlap >= least) & (a[:, None, 5] == b[:, 4])).numpy().nonzero()
        found.append((d + n, t + m, overlap[d, t]))
        n, m = n + len(a), m + len(b)
    d, t, overlap = np.concatenate(found, 1)
    return d.astype(int), t.astype(int), overlap


def _greedy(d, t, allowed=None):
    """Goes through the pairs (d, t) in the order given, and matches the two if that is allowed and neither has a
    partner. allowed: (p, ...) bool, of several matchings side by side, at most 63. -> (p, ...) bool, the pairs matched.
    """
    allowed = np.ones(len(d), bool) if allowed is None else allowed
    bit = 2 ** np.arange(allowed[:1].size)  # of each matching: a pair takes one step for all of them
    claimed, taken, matched = [0] * (d.max(initial=0) + 1), [0] * (t.max(initial=0) + 1), []
    for i, j, bits in zip(d.tolist(), t.tolist(), (allowed.reshape(len(d), len(bit)) @ bit).tolist()):
        free = bits & ~(claimed[i] | taken[j])
        if free:
            claimed[i] |= free
            taken[j] |= free
        matched.append(free)
    return (np.array(matched, int)[:, None] & bit > 0).reshape(allowed.shape)
