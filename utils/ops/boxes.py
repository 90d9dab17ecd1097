"""Boxes: overlap, non-maximum suppression, and the fusion of several models' detections.

Boxes are x1 y1 x2 y2 in continuous pixel coordinates (utils/ops/geometry.py). Detections are rows (n, 6) of
x1 y1 x2 y2 score class. Everything computes in float32 at least, on the device of its input; fusion on the CPU.
"""
import math

import numpy as np
import torch
import torchvision


def to_xyxy(xywh):
    """Boxes (..., 4) of centre x, centre y, width, height -> corners x1 y1 x2 y2."""
    centre, half = xywh[..., :2], xywh[..., 2:] / 2
    return torch.cat((centre - half, centre + half), -1)


def to_xywh(xyxy):
    """Boxes (..., 4) of corners x1 y1 x2 y2 -> centre x, centre y, width, height."""
    low, high = xyxy[..., :2], xyxy[..., 2:]
    return torch.cat(((low + high) / 2, high - low), -1)


def clip(boxes, height, width):
    """A copy of boxes (..., 4) or detections (..., 6) whose corners lie within the image of height x width pixels."""
    boxes = boxes.clone()
    boxes[..., 0:4:2] = boxes[..., 0:4:2].clamp(0, width)
    boxes[..., 1:4:2] = boxes[..., 1:4:2].clamp(0, height)
    return boxes


def iou(a, b, *, kind="iou", eps=1e-7):
    """Overlap of boxes a (..., 4) and b (..., 4), x1 y1 x2 y2, element by element over the broadcast shape -> (...).

    All pairs of a (n, 4) and b (m, 4): `iou(a[:, None], b[None])` -> (n, m).
    kind: "iou", 0 .. 1; "ciou", -1.5 .. 1, minus the distance of the centres and the difference of the aspect ratios
    (Zheng et al. 2020, Distance-IoU Loss; its trade-off alpha carries no gradient). eps keeps values and gradients
    finite for boxes without area, whose IoU is 0. float64 stays float64, all else is computed in float32.
    ValueError for another kind.
    """
    if kind not in ("iou", "ciou"):
        raise ValueError(f'kind {kind!r} must be "iou" or "ciou"')
    a, b = (t if t.dtype == torch.float64 else t.float() for t in (a, b))
    size_a, size_b = ((t[..., 2:] - t[..., :2]).clamp(min=0) for t in (a, b))
    inter = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    overlap = inter / (size_a.prod(-1) + size_b.prod(-1) - inter + eps)
    if kind == "iou":
        return overlap
    around = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    diagonal = around.square().sum(-1) + eps
    distance = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]).square().sum(-1) / 4
    # eps inside, for the angle has no gradient at width = height = 0
    angle_a, angle_b = (torch.atan2(size[..., 0], size[..., 1] + eps) for size in (size_a, size_b))
    v = 4 / math.pi ** 2 * (angle_a - angle_b).square()
    with torch.no_grad():
        alpha = v / (1 - overlap + v + eps)
    return overlap - distance / diagonal - alpha * v


@torch.no_grad()
def nms(rows, *, conf=0.001, iou=0.6, max_det=300, multi_label=True, max_candidates=30000, agnostic=False):
    """Predictions of a batch -> a list with the detections (n, 6) float32 of each image, the best score first.

    rows            (B, N, 5+nc): centre x, centre y, width, height in pixels, objectness, class probabilities
                    (objectness 1 where the net has none). A row with NaN or infinity is as good as absent
    conf            a detection's score, objectness x class probability, must be greater than this
    iou             of two boxes that overlap by more than this the one with the lower score goes
    max_det         at most so many detections an image
    multi_label     a box counts once for each class above `conf`; else for its best class only
    max_candidates  at most so many, the best, enter the suppression of an image
    agnostic        boxes of different classes suppress each other too

    Equal scores are ranked by row, then by class. Predictions of several passes over the same image (TTA, slices) are
    concatenated along N by the caller.
    """
    rows = rows.float().cpu() if rows.device.type == "mps" else rows.float()  # which has no float64
    # the best class first: few rows are left to be copied, and NaN fails every comparison
    image, row = (rows[..., 4] * rows[..., 5:].amax(-1) > conf).nonzero(as_tuple=True)
    per_image = rows[image, row].split(image.bincount(minlength=len(rows)).tolist())
    return [suppress(_candidates(found, conf, multi_label, max_candidates), iou=iou, max_det=max_det, agnostic=agnostic)
            for found in per_image]


def _candidates(rows, conf, multi_label, count):
    """Rows (N, 5+nc) of an image -> its best detections with a score above conf, at most `count`, sorted."""
    boxes, scores = to_xyxy(rows[:, :4]), rows[:, 4:5] * rows[:, 5:]
    finite = boxes.isfinite().all(1) & rows.isfinite().all(1)
    scores = scores.masked_fill(~finite[:, None], -torch.inf)
    labels = torch.arange(scores.shape[1], device=rows.device).expand_as(scores)
    if not multi_label:
        scores, labels = scores.max(1, keepdim=True)
    chosen = scores > conf
    if chosen.sum() > count > 0:  # list and sort only what may stay: a net at its start can give millions
        chosen &= scores >= scores.flatten().topk(count).values[-1]
    row, column = chosen.nonzero(as_tuple=True)
    scores, labels = scores[row, column], labels[row, column]
    order = scores.argsort(descending=True, stable=True)[:count]
    return torch.cat((boxes[row[order]], scores[order, None], labels[order, None].float()), 1)


def suppress(detections, *, iou=0.6, max_det=300, agnostic=False):
    """Greedy suppression of one image's detections (n, 6): the best max_det survivors, the best score first."""
    detections = detections[detections[:, 4].argsort(descending=True, stable=True)]
    # Classes are kept apart by moving each to a place of its own, in float64: in float32, 80 classes 7680 px apart
    # leave steps of 1/16 px. Beyond 2^24 px float32 has no whole pixels; a stray box out there must not cost the others
    # their precision.
    boxes, scores = detections[:, :4].double().clamp(-2 ** 24, 2 ** 24), detections[:, 4].double()
    if not agnostic and len(boxes):
        boxes = boxes + detections[:, 5:].double() * (boxes.max() - boxes.min() + 1)
    # What survives among the best is not changed by those behind them: block by block, until there are enough. Small
    # blocks leave the least to compare; GPUs prefer few kernels.
    block = 512 if boxes.device.type == "cpu" else 2048
    keep = torch.zeros(0, dtype=torch.long, device=boxes.device)
    for index in torch.arange(len(boxes), device=boxes.device).split(block):
        if len(keep):
            index = index[~(torchvision.ops.box_iou(boxes[index], boxes[keep]) > iou).any(1)]
        keep = torch.cat((keep, index[torchvision.ops.nms(boxes[index], scores[index], iou)]))
        if len(keep) >= max_det:
            break
    return detections[keep[:max_det]]


@torch.no_grad()
def wbf(detections, *, weights=None, iou=0.55, conf=0.0):
    """Weighted boxes fusion (Solovyev et al. 2021): the detections of several models of one image -> (n, 6), sorted.

    detections  a (n_i, 6) tensor per model, all in the same pixels; scores are probabilities
    weights     one positive number per model; by default all count the same
    iou         a box joins the fused box of its class that it overlaps most, if by more than this
    conf        boxes whose score is not greater than this are left out

    A fused box is the mean of its members' corners, weighted by weight x score; its score is the mean over all models,
    by weight, of the best score that each has in it, 0 for none: what few have seen counts less. That is the paper's
    where no model has two boxes in one; there, it is neither above 1 nor lowered by a model's second box. ValueError
    for weights that do not fit.
    """
    weights = [1.0] * len(detections) if weights is None else [float(w) for w in weights]
    if len(weights) != len(detections) or not all(w > 0 for w in weights):
        raise ValueError(f"weights {weights} must be {len(detections)} positive numbers, one per model")
    if not detections:
        return torch.zeros(0, 6)
    device = detections[0].device
    boxes = torch.cat([d[:, :4] for d in detections]).cpu().double()
    scores = torch.cat([d[:, 4].cpu().double() * w for d, w in zip(detections, weights)])
    labels = torch.cat([d[:, 5] for d in detections]).cpu()
    models = torch.arange(len(detections)).repeat_interleave(torch.tensor([len(d) for d in detections]))
    used = torch.cat([d[:, 4] > conf for d in detections]).cpu() & boxes.isfinite().all(1) & scores.isfinite()
    fused = [np.zeros((0, 6))]
    for label in labels[used].unique().tolist():
        mine = used & (labels == label)
        corners, score = _fuse(boxes[mine].numpy(), scores[mine].numpy(), models[mine].numpy(), np.array(weights), iou)
        fused.append(np.concatenate((corners, score, np.full_like(score, label)), 1))
    fused = torch.from_numpy(np.concatenate(fused)).float()
    return fused[fused[:, 4].argsort(descending=True, stable=True)].to(device)


def _fuse(boxes, scores, models, weights, threshold):
    """Clusters of one class, numpy, in the order of the weighted scores -> fused corners (k, 4), scores (k, 1)."""
    order = np.argsort(-scores, kind="stable")
    fused, sums, votes = np.zeros_like(boxes), np.zeros(len(boxes)), np.zeros((len(boxes), len(weights)))
    count = 0
    for box, score, model in zip(boxes[order], scores[order], models[order]):
        best = _match(fused[:count], box, threshold)
        if best is None:
            best, count = count, count + 1
        sums[best] += score
        votes[best, model] = max(votes[best, model], score)
        fused[best] += (box - fused[best]) * (score / sums[best])  # the running weighted mean
    return fused[:count], votes[:count].sum(1, keepdims=True) / weights.sum()


def _match(boxes, box, threshold):
    """The index of the box that overlaps `box` most, or None if none does by more than the threshold.

    numpy, for it runs once per detection, where torch would take four times as long.
    """
    if not len(boxes):
        return None
    inside = (np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])).clip(min=0)
    sizes, inter = boxes[:, 2:] - boxes[:, :2], inside[:, 0] * inside[:, 1]
    overlap = inter / (sizes[:, 0] * sizes[:, 1] + (box[2] - box[0]) * (box[3] - box[1]) - inter + 1e-12)
    best = overlap.argmax()
    return best if overlap[best] > threshold else None


def drop_border_boxes(rows, window, height, width, margin=2):
    """Detections (n, 6), in pixels of the image, less those that a border of the window cuts: that end within `margin`
    pixels of it, where the image goes on. A neighbour sees such an object whole, or the view of the whole image does.

    window: (y, x, height, width) in an image of height x width.
    """
    y, x, h, w = window
    limits = rows.new_tensor([x + margin if x > 0 else -torch.inf, y + margin if y > 0 else -torch.inf,
                              x + w - margin if x + w < width else torch.inf,
                              y + h - margin if y + h < height else torch.inf])
    cut = torch.cat((rows[:, :2] < limits[:2], rows[:, 2:4] > limits[2:]), 1)
    return rows[~cut.any(1)]
