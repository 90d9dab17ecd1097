"""Detection losses: they assign ground-truth boxes to cells of the maps and compare the cells' outputs with them.

Ground-truth `boxes` are rows (n, 6): position of the image in the batch, class, x1, y1, x2, y2 in pixels. Sums over
boxes are divided by counts over all ranks, so that several processes compute the same gradient as one process.
"""
import torch
import torch.nn.functional as F

from utils.ops.anchors import decode_points
from utils.ops.boxes import iou, to_xywh, to_xyxy
from utils.train import dist

BALANCE = {3: (4.0, 1.0, 0.4), 4: (4.0, 1.0, 0.25, 0.06)}  # number of levels: the objectness weight of each level


def anchor_loss(maps, boxes, anchors, strides, *, threshold=4.0, box=0.05, obj=1.0, cls=0.5, obj_pw=1.0, cls_pw=1.0,
                smoothing=0.0):
    """YOLOv5's loss: a box is assigned to all anchors that fit within a factor `threshold`, in its cell and the two
    nearest cells.

    maps: per level (B, anchors, rows, columns, 5 + classes), raw, fine to coarse; anchors: (levels, anchors, 2) in
    strides; strides: pixels per cell. box, obj, cls: weights of the three parts; obj_pw, cls_pw: weights of positives
    in the cross-entropies; smoothing: label smoothing, eps / 2 and 1 - eps / 2.
    -> (loss, {"box", "obj", "cls"}), the loss being the sum of the three: 1 - CIoU; objectness, whose target is the
    CIoU; classes. Each is weighted, per level a mean over matches or cells, summed over the levels. "cls" is 0 if
    there is a single class.
    """
    matches = [match_anchors(raw.shape, boxes, a, s, threshold) for raw, a, s in zip(maps, anchors, strides)]
    counts = torch.tensor([float(len(index)) for index, *_ in matches], device=boxes.device)
    counts = dist.mean(counts).clamp(min=1e-9)  # matches per level
    lbox = lobj = lcls = 0.0
    for raw, (index, anchor, target, classes), count, balance in zip(maps, matches, counts, BALANCE[len(maps)]):
        raw = raw.float().flatten(0, 3)
        y = raw[index]
        xy, wh = 2 * y[:, :2].sigmoid() - 0.5, (2 * y[:, 2:4].sigmoid()) ** 2 * anchor
        overlap = iou(to_xyxy(torch.cat((xy, wh), 1)), to_xyxy(target), kind="ciou")  # in strides
        lbox = lbox + (1 - overlap).sum() / count
        # where several boxes share a cell and an anchor, the largest overlap counts, whatever the order of the boxes
        reached = raw.new_zeros(len(raw)).scatter_reduce_(0, index, overlap.detach().clamp(0), "amax")
        lobj = lobj + balance * _bce(raw[:, 4], reached, obj_pw).mean()
        if raw.shape[1] > 6:  # more than one class
            labels = torch.full_like(y[:, 5:], smoothing / 2)
            labels.scatter_(1, classes[:, None], 1 - smoothing / 2)
            lcls = lcls + _bce(y[:, 5:], labels, cls_pw).mean(1).sum() / count
    parts = {"box": box * lbox, "obj": obj * lobj, "cls": cls * lcls}
    return sum(parts.values()), parts


def match_anchors(shape, boxes, anchors, stride, threshold):
    """The m places of one level's map that are assigned to a box -> (index (m,) into the map flattened to rows of
    outputs; anchor sizes (m, 2); boxes (m, 4): x, y of the centre from the cell's corner, width, height, in strides;
    classes (m,)).

    shape: shape of the map, (B, anchors, rows, columns, ...); boxes (n, 6), pixels; anchors (anchors, 2) in strides. A
    box is assigned to every anchor that fits, in the cell of its centre and, unless that is outside the map, in the
    nearer horizontal and the nearer vertical neighbour.
    """
    rows, columns = shape[2:4]
    xywh = to_xywh(boxes[:, 2:]) / stride
    ratio = xywh[:, None, 2:] / anchors
    target, anchor = (torch.maximum(ratio, 1 / ratio).amax(-1) < threshold).nonzero(as_tuple=True)
    xy = xywh[target, :2]
    cell, limit = xy.floor(), xy.new_tensor((columns, rows))
    side = torch.where(xy - cell < 0.5, -1, 1)  # towards the nearer neighbour
    steps = xy.new_tensor([[[0, 0]], [[1, 0]], [[0, 1]]])
    cell, target, anchor = (cell + side * steps).flatten(0, 1), target.repeat(3), anchor.repeat(3)
    inside = ((cell >= 0) & (cell < limit)).all(1)
    cell, target, anchor = cell[inside], target[inside], anchor[inside]
    (image, classes), (column, row) = boxes[target, :2].long().T, cell.long().T
    index = ((image * len(anchors) + anchor) * rows + row) * columns + column
    relative = torch.cat((xywh[target, :2] - cell, xywh[target, 2:]), 1)
    return index, anchors[anchor], relative, classes


def free_loss(maps, boxes, strides, bins, *, box=7.5, dfl=1.5, cls=0.5, topk=10):
    """Task-aligned loss of the anchor-free head (TOOD, Feng et al. 2021), with the distribution focal loss of GFL (Li
    et al. 2020).

    maps: per level (B, rows, columns, 4 * bins + classes), raw, see `anchors.decode_points`; strides: pixels per cell.
    box, dfl, cls: weights of the three parts; topk: see `assign`.
    -> (loss, {"box", "dfl", "cls"}), the loss being the sum of the three: 1 - CIoU; distances as distributions;
    classes, whose target is the alignment of the cell with its box. Each is weighted, a sum divided by the sum of the
    targets.
    """
    points = decode_points(maps, strides, bins)
    gt_boxes, gt_classes, mask = pad(boxes, len(points.boxes))
    with torch.no_grad():
        assigned, target_scores = assign(points.classes.sigmoid(), points.boxes, points.centres, points.strides,
                                         gt_boxes, gt_classes, mask, topk=topk)
    total = dist.mean(target_scores.sum()).clamp(min=1 / dist.world_size())  # at least 1 over all ranks

    labels = torch.zeros_like(points.classes)
    labels.scatter_(2, gt_classes.gather(1, assigned)[..., None], target_scores[..., None])
    lcls = F.binary_cross_entropy_with_logits(points.classes, labels, reduction="sum") / total
    image, cell = target_scores.nonzero(as_tuple=True)
    weight, target = target_scores[image, cell], gt_boxes[image, assigned[image, cell]]
    lbox = ((1 - iou(points.boxes[image, cell], target, kind="ciou")) * weight).sum() / total
    centre = points.centres[cell]
    sides = torch.cat((centre - target[:, :2], target[:, 2:] - centre), 1) / points.strides[cell]
    ldfl = (distribution_focal(points.sides[image, cell], sides).mean(1) * weight).sum() / total
    parts = {"box": box * lbox, "dfl": dfl * ldfl, "cls": cls * lcls}
    return sum(parts.values()), parts


def assign(scores, predicted, centres, strides, gt_boxes, gt_classes, mask, *, topk):
    """Task-aligned assignment: each box gets the `topk` cells inside it with the highest score^0.5 * IoU^6.

    scores (B, N, C), 0..1, and predicted (B, N, 4): the net's output; centres (N, 2) and strides (N, 1) of the cells,
    pixels; gt_boxes (B, M, 4), gt_classes (B, M), mask (B, M): the ground truth, see `pad`.
    -> assigned (B, N): index of the cell's box, 0..M-1 (of several claimants the one with the highest IoU);
    target_scores (B, N): the score that the cell should give, 0 if it has no box: the alignment, scaled so that a box's
    best cell gets the box's highest IoU.
    """
    # a box narrower than a stride may contain no cell's centre: all count as at least two strides wide
    middle, size = to_xywh(gt_boxes)[:, :, None].split(2, -1)
    inside = ((centres - middle).abs() < torch.maximum(size / 2, strides)).all(-1) & mask[..., None]  # (B, M, N)
    overlap = iou(gt_boxes[:, :, None], predicted[:, None]).clamp(min=0) * inside
    score = scores.transpose(1, 2).gather(1, gt_classes[..., None].expand(-1, -1, scores.shape[1]))
    align = score ** 0.5 * overlap ** 6.0 * inside
    best = align.topk(min(topk, align.shape[-1]), dim=-1).indices
    claimed = torch.zeros_like(inside).scatter_(2, best, True) & inside
    assigned = torch.where(claimed, overlap, -1).argmax(1)
    own = claimed & (torch.arange(gt_boxes.shape[1], device=assigned.device)[:, None] == assigned[:, None])
    align = align * own
    peak = (overlap * own).amax(-1, keepdim=True)
    # at the start the best alignment of a small object may be 1e-15: the guard against 0 / 0 must be smaller
    target_scores = (align * peak / align.amax(-1, keepdim=True).clamp(min=torch.finfo(align.dtype).tiny)).amax(1)
    return assigned, target_scores


def distribution_focal(logits, target):
    """logits (..., bins), target (...) in bins -> (...): cross-entropy with the two bins around the target, each
    weighted by its nearness (GFL, Li et al. 2020). Targets beyond the bins are moved to the nearest end."""
    target = target.clamp(0, logits.shape[-1] - 1 - 0.01)  # the upper one of the two bins must exist
    low = target.long()
    logp = logits.log_softmax(-1)
    left, right = (logp.gather(-1, (low + i)[..., None])[..., 0] for i in (0, 1))
    return -left * (low + 1 - target) - right * (target - low)


def pad(boxes, batch):
    """Rows (n, 6) of `batch` images, padded to M >= 1 rows per image -> boxes (batch, M, 4), classes (batch, M), mask
    (batch, M): False for padding. No loop over images: a GPU would wait for each."""
    boxes = boxes[boxes[:, 0].argsort(stable=True)]
    image = boxes[:, 0].long()
    count = image.bincount(minlength=batch)
    slot = torch.arange(len(image), device=boxes.device) - (count.cumsum(0) - count)[image]
    padded = boxes.new_zeros(batch, max(1, int(count.max())), 6)
    padded[image, slot] = boxes
    padded[image, slot, 0] = 1
    return padded[..., 2:], padded[..., 1].long(), padded[..., 0] > 0


def _bce(logits, target, pos_weight):
    """Binary cross-entropy element by element."""
    weight = None if pos_weight == 1 else logits.new_tensor(pos_weight)
    return F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight, reduction="none")
