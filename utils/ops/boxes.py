"""Boxes: overlap, non-maximum suppression, and the fusion of several models' detections.

Boxes are x1 y1 x2 y2 in continuous pixel coordinates (utils/ops/geometry.py). Detections are rows (n, 6) of x1 y1 x2 y2
score class. Everything is computed in float32 or float64 on the device of its input; fusion on the CPU.
"""
import math

import torch
import torch.nn.functional as F


def _ops():
    """torchvision.ops, imported where boxes are computed: the import takes as long as that of torch."""
    import torchvision
    return torchvision.ops


def to_xyxy(xywh):
    """Boxes (..., 4) of centre x, centre y, width, height -> corners x1 y1 x2 y2."""
    return _ops().box_convert(xywh, "cxcywh", "xyxy")


def to_xywh(xyxy):
    """Boxes (..., 4) of corners x1 y1 x2 y2 -> centre x, centre y, width, height."""
    return _ops().box_convert(xyxy, "xyxy", "cxcywh")


def sides(boxes):
    """Boxes (..., 4) or detections (..., 6), tensors or numpy arrays -> (..., 2): width and height."""
    return boxes[..., 2:4] - boxes[..., :2]


def confident(detections, least):
    """The detections (n, 6) with a score of at least `least`."""
    return detections[detections[:, 4] >= least]


def by_score(detections):
    """The detections (n, 6), the best score first, equal ones in their order."""
    return detections[detections[:, 4].argsort(descending=True, stable=True)]


def clip(boxes, height, width):
    """A copy of boxes (..., 4) or detections (..., 6) with all corners inside the image of height x width pixels."""
    inside = _ops().clip_boxes_to_image(boxes[..., :4], (height, width))
    return torch.cat((inside, boxes[..., 4:]), -1)


def iou(a, b, *, kind="iou", eps=1e-7):
    """Overlap of boxes a (..., 4) and b (..., 4), x1 y1 x2 y2, element by element over the broadcast shape -> (...).

    All pairs of a (n, 4) and b (m, 4): `iou(a[:, None], b[None])` -> (n, m).
    kind: "iou", 0 .. 1; "ciou", -1.5 .. 1: minus the distance of the centres and the difference of the aspect ratios
    (Zheng et al. 2020, Distance-IoU Loss; its trade-off alpha carries no gradient). float64 stays float64, everything
    else is computed in float32. Unlike torchvision's complete_box_iou, values and gradients are finite for boxes
    without area too (their IoU is 0), due to eps. ValueError for another kind.
    """
    if kind not in ("iou", "ciou"):
        raise ValueError(f'kind {kind!r} must be "iou" or "ciou"')
    a, b = (t if t.dtype == torch.float64 else t.float() for t in (a, b))
    size_a, size_b = (sides(t).clamp(min=0) for t in (a, b))
    inter = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    overlap = inter / (size_a.prod(-1) + size_b.prod(-1) - inter + eps)
    if kind == "iou":
        return overlap
    around = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    diagonal = around.square().sum(-1) + eps
    distance = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]).square().sum(-1) / 4
    # eps inside atan2, because the angle has no gradient at width = height = 0
    angle_a, angle_b = (torch.atan2(size[..., 0], size[..., 1] + eps) for size in (size_a, size_b))
    v = 4 / math.pi ** 2 * (angle_a - angle_b).square()
    with torch.no_grad():
        alpha = v / (1 - overlap + v + eps)
    return overlap - distance / diagonal - alpha * v


@torch.no_grad()
def nms(rows, *, conf=0.001, iou=0.6, max_det=300, multi_label=True, max_candidates=30000, agnostic=False):
    """Predictions of a batch -> a list with the detections (n, 6) float32 of each image, the best score first.

    rows            (B, N, 5+nc): centre x, centre y, width, height in pixels, objectness, class probabilities
                    (objectness 1 where the net has none). Rows with NaN or infinity are ignored
    conf            a detection's score, objectness x class probability, must be greater than this
    iou             of two boxes that overlap by more than this, the one with the lower score is removed
    max_det         at most this many detections per image
    multi_label     a box counts once for each class above `conf`; otherwise for its best class only
    max_candidates  at most this many detections of an image, the best, enter the suppression
    agnostic        boxes of different classes suppress each other too

    Equal scores are ranked by row, then by class. The caller concatenates the predictions of several views of one image
    (test-time augmentation, windows) along N.
    """
    rows = rows.float().cpu() if rows.device.type == "mps" else rows.float()  # mps has no float64
    # filtered by the best class first: only few rows are copied, and NaN fails every comparison
    image, row = (rows[..., 4] * rows[..., 5:].amax(-1) > conf).nonzero(as_tuple=True)
    per_image = rows[image, row].split(image.bincount(minlength=len(rows)).tolist())
    return [suppress(_candidates(found, conf, multi_label, max_candidates), iou=iou, max_det=max_det, agnostic=agnostic)
            for found in per_image]


def _candidates(rows, conf, multi_label, count):
    """Rows (N, 5+nc) of an image -> its best detections with a score above conf, at most `count`, sorted."""
    boxes = to_xyxy(rows[:, :4])
    finite = boxes.isfinite().all(1) & rows.isfinite().all(1)
    boxes, scores = boxes[finite], (rows[:, 4:5] * rows[:, 5:])[finite]
    labels = torch.arange(scores.shape[1], device=rows.device).expand_as(scores)
    if not multi_label:
        scores, labels = scores.max(1, keepdim=True)
    chosen = scores > conf
    if chosen.sum() > count > 0:  # filtered by score before they are listed and sorted: an untrained net gives millions
        chosen &= scores >= scores.flatten().topk(count).values[-1]
    row, column = chosen.nonzero(as_tuple=True)
    return by_score(torch.cat((boxes[row], scores[row, column, None], labels[row, column, None].float()), 1))[:count]


def suppress(detections, *, iou=0.6, max_det=300, agnostic=False):
    """Greedy suppression of one image's detections (n, 6): the best max_det survivors, the best score first."""
    detections = by_score(detections)
    # Each class is shifted to a place of its own, in float64: in float32, 80 classes that are 7680 px apart leave steps
    # of 1/16 px (so does torchvision's batched_nms). Beyond 2^24 px float32 has no whole pixels; clamped, a stray box
    # out there does not cost the others their precision.
    boxes, scores = detections[:, :4].double().clamp(-2 ** 24, 2 ** 24), detections[:, 4].double()
    if not agnostic and len(boxes):
        boxes = boxes + detections[:, 5:].double() * (boxes.max() - boxes.min() + 1)
    # Worse boxes never suppress better ones: blocks are processed from the best on, until there are enough survivors.
    # Small blocks mean the least comparisons; GPUs prefer few kernels.
    block = 512 if boxes.device.type == "cpu" else 2048
    keep = torch.zeros(0, dtype=torch.long, device=boxes.device)
    for index in torch.arange(len(boxes), device=boxes.device).split(block):
        if len(keep):
            index = index[~(_ops().box_iou(boxes[index], boxes[keep]) > iou).any(1)]
        keep = torch.cat((keep, index[_ops().nms(boxes[index], scores[index], iou)]))
        if len(keep) >= max_det:
            break
    return detections[keep[:max_det]]


@torch.no_grad()
def wbf(detections, *, weights=None, iou=0.55):
    """Weighted boxes fusion (Solovyev et al. 2021): the detections of several models of one image -> (n, 6), sorted.

    detections  a (n_i, 6) tensor per model, all in the same pixels; scores are probabilities
    weights     one positive number per model; without, all models count the same
    iou         a box joins the fused box of its class that it overlaps most, if their IoU is greater than this

    A fused box is the mean of its members' corners, weighted by weight x score. Its score is the weighted mean over all
    models of the best score that each model has in it, 0 for models without a member: boxes that few models have found
    get a low score. This is the paper's score as long as no model has two boxes in one fused box; otherwise it is
    neither above 1 nor lowered by a model's second box. ValueError for weights that do not fit.
    """
    weights = torch.as_tensor([1.0] * len(detections) if weights is None else weights).double()
    if len(weights) != len(detections) or not (weights > 0).all():
        raise ValueError(f"weights {weights.tolist()} must be {len(detections)} positive numbers, one per model")
    if not detections:
        return torch.zeros(0, 6)
    rows = torch.cat([F.pad(d.cpu().double(), (0, 1), value=model) for model, d in enumerate(detections)])
    rows = rows[rows.isfinite().all(1)]
    fused = [_fuse(rows[rows[:, 5] == label], weights, iou) for label in rows[:, 5].unique()]
    return by_score(torch.cat([rows[:0, :6], *fused]).float()).to(detections[0].device)


def _fuse(rows, weights, threshold):
    """Detections of one class with the index of their model, (n, 7) float64 -> fused detections (k, 6)."""
    models = rows[:, 6].long()
    scores = rows[:, 4] * weights[models]
    fused, sums, count = torch.zeros_like(rows[:, :4]), torch.zeros_like(scores), 0
    votes = rows.new_zeros(len(rows), len(weights))  # the best score of each model in each fused box
    for i in scores.argsort(descending=True, stable=True).tolist():
        overlap = iou(fused[:count], rows[i, :4], eps=1e-12)
        best = int(overlap.argmax()) if (overlap > threshold).any() else count
        count = max(count, best + 1)
        sums[best] += scores[i]
        votes[best, models[i]] = torch.maximum(votes[best, models[i]], scores[i])
        fused[best] += (rows[i, :4] - fused[best]) * (scores[i] / sums[best])  # the running weighted mean
    mean = votes[:count].sum(1) / weights.sum()
    return torch.column_stack((fused[:count], mean, rows[0, 5].expand(count)))


def drop_border_boxes(rows, window, height, width, margin=2):
    """Detections (n, 6) of a window, in pixels of the image, without the boxes that end within `margin` pixels of a
    border of the window beyond which the image continues: they are cut, and a neighbouring window or the view of the
    whole image shows the complete object.

    window: (y, x, height, width) in an image of height x width.
    """
    y, x, h, w = window
    start, end, size = rows.new_tensor([(x, y), (x + w, y + h), (width, height)])
    cut = (rows[:, :2] < start + margin) & (start > 0) | (rows[:, 2:4] > end - margin) & (end < size)
    return rows[~cut.any(1)]
