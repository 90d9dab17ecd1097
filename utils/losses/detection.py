"""Detection losses: which cells answer for which boxes, and what their outputs should have been.

`boxes` are rows (n, 6): position of the image in the batch, class, x1, y1, x2, y2 in pixels. Nothing loops over images.
Sums over boxes are divided by counts over all ranks, so that several processes compute the gradient that one would.
"""
import torch
import torch.nn.functional as F

from utils.train import dist
from utils.ops.boxes import iou, to_xywh, to_xyxy
from utils.losses import focus

BALANCE = {3: (4.0, 1.0, 0.4), 4: (4.0, 1.0, 0.25, 0.06)}  # by the number of levels: weights of their objectness


def anchor_loss(maps, boxes, anchors, strides, *, threshold=4.0, box=0.05, obj=1.0, cls=0.5, obj_pw=1.0, cls_pw=1.0,
                smoothing=0.0, gamma=0.0):
    """YOLOv5's loss: anchors that fit within a factor `threshold`, in the box's cell and the two nearest ones.

    maps: per level (B, anchors, rows, columns, 5 + classes), raw, fine to coarse; anchors: (levels, anchors, 2) in
    strides; strides: pixels per cell. box, obj, cls: the parts' weights; obj_pw, cls_pw: weights of positives in the
    cross-entropies; smoothing: of the class labels, eps / 2 and 1 - eps / 2; gamma: of the focal loss (Lin et al. 2017,
    without its alpha; 0: none).
    -> (loss, {"box", "obj", "cls"}): 1 - CIoU, objectness (whose target is the CIoU reached), classes; each weighted,
    per level a mean over matches or cells, summed over levels. "cls" is 0 where there is a single class.
    """
    maps = [raw.float() for raw in maps]
    matches = [match_anchors(raw.shape, boxes, a, s, threshold) for raw, a, s in zip(maps, anchors, strides)]
    counts = torch.tensor([float(len(classes)) for _, _, classes in matches], device=boxes.device)
    counts = dist.mean(counts).clamp(min=1e-9)  # matches per level
    lbox = lobj = lcls = maps[0].new_zeros(())
    for raw, match, a, stride, count, balance in zip(maps, matches, anchors, strides, counts, BALANCE[len(maps)]):
        index, target, classes = match
        y = raw[index]
        xy, wh = 2 * y[:, :2].sigmoid() - 0.5, (2 * y[:, 2:4].sigmoid()) ** 2 * a[index[1]]
        overlap = iou(to_xyxy(torch.cat((xy, wh), 1)), to_xyxy(target), kind="ciou")  # in strides
        lbox = lbox + (1 - overlap).sum() / count
        reached = raw.new_zeros(raw.shape[:-1])
        # where several boxes share a cell and an anchor, the best counts, whatever their order
        reached.view(-1).scatter_reduce_(0, _flat(index, reached.shape), overlap.detach().clamp(0), "amax")
        lobj = lobj + balance * _bce(raw[..., 4], reached, obj_pw, gamma).mean()
        if raw.shape[-1] > 6:  # more than one class
            labels = torch.full_like(y[:, 5:], smoothing / 2)
            labels.scatter_(1, classes[:, None], 1 - smoothing / 2)
            lcls = lcls + _bce(y[:, 5:], labels, cls_pw, gamma).mean(1).sum() / count
    parts = {"box": box * lbox, "obj": obj * lobj, "cls": cls * lcls}
    return sum(parts.values()), parts


def match_anchors(shape, boxes, anchors, stride, threshold):
    """The m places of one level's map that answer for a box -> (index: image, anchor, row, column, each (m,);
    their boxes (m, 4): x, y of the centre from the cell's corner, width, height, in strides; their classes (m,)).

    shape: of the map, (B, anchors, rows, columns, ...); boxes (n, 6), pixels; anchors (anchors, 2) in strides. A box
    is matched to every anchor that fits, in the cell of its centre and, unless that is outside, in the nearer
    horizontal and the nearer vertical neighbour.
    """
    rows, columns = shape[2:4]
    xywh = to_xywh(boxes[:, 2:]) / stride
    ratio = xywh[:, None, 2:] / anchors
    target, anchor = (torch.maximum(ratio, 1 / ratio).amax(-1) < threshold).nonzero(as_tuple=True)
    xy = xywh[target, :2]
    cell, limit = xy.floor(), xy.new_tensor((columns, rows))
    side = torch.where(xy - cell < 0.5, -1, 1)  # towards the nearer neighbour
    near = [cell, cell + side * xy.new_tensor((1, 0)), cell + side * xy.new_tensor((0, 1))]
    cell, target, anchor = torch.cat(near), target.repeat(3), anchor.repeat(3)
    inside = ((cell >= 0) & (cell < limit)).all(1)
    cell, target, anchor = cell[inside], target[inside], anchor[inside]
    column, row = cell.long().unbind(1)
    relative = torch.cat((xywh[target, :2] - cell, xywh[target, 2:]), 1)
    return (boxes[target, 0].long(), anchor, row, column), relative, boxes[target, 1].long()


def free_loss(maps, boxes, strides, bins, *, box=7.5, dfl=1.5, cls=0.5, topk=10, alpha=0.5, beta=6.0):
    """Task-aligned loss of the anchor-free head (TOOD, Feng et al. 2021; the distances' of GFL, Li et al. 2020).

    maps: per level (B, rows, columns, 4 * bins + classes), raw: distributions of the distances left, top, right and
    bottom over 0 .. bins - 1 strides, then classes; strides: pixels per cell. box, dfl, cls: the parts' weights; topk,
    alpha, beta: see `assign`. -> (loss, {"box", "dfl", "cls"}): 1 - CIoU, distances as distributions, classes (whose
    target is how well the cell does by its box); each weighted, a sum divided by that of the targets.
    """
    centres = torch.cat([_centres(raw, stride) for raw, stride in zip(maps, strides)])  # (N, 2) pixels
    scale = torch.cat([centres.new_full((raw[0, ..., 0].numel(), 1), s) for raw, s in zip(maps, strides)])  # (N, 1)
    raw = torch.cat([raw.flatten(1, 2) for raw in maps], 1).float()
    logits = raw[..., :4 * bins].unflatten(-1, (4, bins))
    # no matrix product, whose terms autocast would round
    distances = (logits.softmax(-1) * torch.arange(bins, device=raw.device, dtype=raw.dtype)).sum(-1) * scale
    predicted = torch.cat((centres - distances[..., :2], centres + distances[..., 2:]), -1)  # (B, N, 4)
    truths, classes, mask = pad(boxes, len(raw))
    with torch.no_grad():
        assigned, target_scores = assign(raw[..., 4 * bins:].sigmoid(), predicted, centres, scale, truths, classes,
                                         mask, topk=topk, alpha=alpha, beta=beta)
    total = dist.mean(target_scores.sum()).clamp(min=1 / dist.world_size())  # at least 1 over all ranks

    labels = torch.zeros_like(raw[..., 4 * bins:])
    labels.scatter_(2, classes.gather(1, assigned)[..., None], target_scores[..., None])
    lcls = F.binary_cross_entropy_with_logits(raw[..., 4 * bins:], labels, reduction="sum") / total
    image, cell = target_scores.nonzero(as_tuple=True)
    weight, target = target_scores[image, cell], truths[image, assigned[image, cell]]
    lbox = ((1 - iou(predicted[image, cell], target, kind="ciou")) * weight).sum() / total
    sides = torch.cat((centres[cell] - target[:, :2], target[:, 2:] - centres[cell]), 1) / scale[cell]
    ldfl = (distribution_focal(logits[image, cell], sides).mean(1) * weight).sum() / total
    parts = {"box": box * lbox, "dfl": dfl * ldfl, "cls": cls * lcls}
    return sum(parts.values()), parts


def assign(scores, predicted, centres, scale, truths, classes, mask, *, topk, alpha, beta):
    """Task-aligned assignment: each box gets the `topk` cells within it that do best by score^alpha * IoU^beta.

    scores (B, N, C), 0..1, and predicted (B, N, 4): what the net says; centres (N, 2) and scale (N, 1): the cells'
    centres and strides, pixels; truths (B, M, 4), classes (B, M), mask (B, M): the boxes, see `pad`.
    -> assigned (B, N): the cell's box, 0..M-1 (of several claimants the one with the highest IoU); target_scores
    (B, N): the score that the cell should give, 0 where it has no box: the alignment, scaled so that a box's best cell
    gets the box's best IoU.
    """
    # a box narrower than a stride may have no cell's centre in it: all count as at least two strides wide
    middle, half = (truths[..., :2] + truths[..., 2:]) / 2, (truths[..., 2:] - truths[..., :2]) / 2
    reach = torch.maximum(half[:, :, None], scale)  # (B, M, N, 2)
    inside = ((centres - middle[:, :, None]).abs() < reach).all(-1) & mask[..., None]
    overlap = iou(truths[:, :, None], predicted[:, None]).clamp(min=0) * inside  # (B, M, N)
    score = scores.transpose(1, 2).gather(1, classes[..., None].expand(-1, -1, scores.shape[1]))
    align = score ** alpha * overlap ** beta * inside
    best = align.topk(min(topk, align.shape[-1]), dim=-1).indices
    claimed = torch.zeros_like(inside).scatter_(2, best, True) & inside
    overlap_claimed = torch.where(claimed, overlap, -1)
    value, assigned = overlap_claimed.max(1)
    mine = claimed & (torch.arange(truths.shape[1], device=assigned.device)[:, None] == assigned[:, None])
    align = align * mine
    peak = (overlap * mine).amax(-1, keepdim=True)
    # at the start the best alignment of a small object may be 1e-15: what is added to it against 0 / 0 must be less
    target_scores = (align * peak / align.amax(-1, keepdim=True).clamp(min=torch.finfo(align.dtype).tiny)).amax(1)
    return assigned, target_scores


def distribution_focal(logits, target):
    """logits (..., bins), target (...) in bins -> (...): cross-entropy with the two bins around the target, each
    weighted by its nearness (GFL, Li et al. 2020). Targets beyond the bins are moved to the nearest end."""
    bins = logits.shape[-1]
    target = target.clamp(0, bins - 1 - 0.01)  # the upper one of the two bins must exist
    low = target.long()
    logp = logits.log_softmax(-1)
    left, right = (logp.gather(-1, (low + i)[..., None])[..., 0] for i in (0, 1))
    return -left * (low + 1 - target) - right * (target - low)


def pad(boxes, batch):
    """Rows (n, 6) of `batch` images, padded with zeros to M >= 1 an image -> boxes (batch, M, 4), classes (batch, M),
    there (batch, M): False where it is padding."""
    boxes = boxes[boxes[:, 0].argsort(stable=True)]
    image = boxes[:, 0].long()
    count = image.bincount(minlength=batch)
    slot = torch.arange(len(image), device=boxes.device) - (count.cumsum(0) - count)[image]
    padded = boxes.new_zeros(batch, max(1, int(count.max())), 6)
    padded[image, slot] = boxes
    padded[image, slot, 0] = 1
    return padded[..., 2:], padded[..., 1].long(), padded[..., 0] > 0


def _centres(raw, stride):
    """A map (B, rows, columns, ...) -> its cells' centres x, y (rows * columns, 2), pixels."""
    rows, columns = raw.shape[1:3]
    y, x = torch.arange(rows, device=raw.device), torch.arange(columns, device=raw.device)
    return (torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1) + 0.5) * stride


def _bce(logits, target, pos_weight, gamma):
    weight = logits.new_tensor(pos_weight) if pos_weight != 1 else None
    loss = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight, reduction="none")
    if gamma:  # right for soft targets too, where |target - p| is how far off it is
        loss = focus(loss, (target - logits.sigmoid()).abs(), gamma)
    return loss


def _flat(index, shape):
    """Indices per dimension -> indices into the flattened tensor."""
    flat = index[0]
    for i, side in zip(index[1:], shape[1:]):
        flat = flat * side + i
    return flat
