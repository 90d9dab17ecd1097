"""utils/losses/detection.py against plain loops in float64, written from the papers' formulas."""
import math

import numpy as np
import pytest
import torch

from utils.losses import detection as losses_det
from utils.losses.detection import anchor_loss, assign, distribution_focal, free_loss, match_anchors, pad

STRIDES = [8, 16, 32]
ANCHORS = torch.tensor([[[1.25, 1.6], [2.0, 3.75], [4.1, 2.9]], [[1.9, 3.8], [3.9, 2.8], [3.7, 7.4]],
                        [[3.6, 2.8], [4.9, 6.2], [11.7, 10.2]]], dtype=torch.float64)
P6 = torch.cat((ANCHORS, torch.tensor([[[1.0, 0.8], [0.5, 1.1], [1.4, 1.2]]], dtype=torch.float64)))  # and stride 64


def scene(seed, *, images=3, size=96, classes=4, most=6):
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(images):
        for _ in range(rng.integers(0, most)):
            w, h = np.exp(rng.uniform(math.log(4), math.log(90), 2))
            x1, y1 = rng.uniform(0, size - min(w, size - 1)), rng.uniform(0, size - min(h, size - 1))
            rows.append([i, rng.integers(classes), x1, y1, min(x1 + w, size), min(y1 + h, size)])
    rng.shuffle(rows)
    return torch.tensor(rows, dtype=torch.float64).view(-1, 6)


def anchor_maps(seed, *, images=3, size=96, classes=4, strides=STRIDES):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(images, 3, size // s, size // s, 5 + classes, generator=g, dtype=torch.float64)
            for s in strides]


def sigmoid(v):
    return 1 / (1 + math.exp(-v))


def bce(logit, target, pos=1.0):
    p = sigmoid(logit)
    return -(pos * target * math.log(p) + (1 - target) * math.log(1 - p))


def overlap(a, b):
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    inter = max(w, 0) * max(h, 0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter + 1e-7)


def ciou(a, b):
    v = overlap(a, b)
    cw, ch = max(a[2], b[2]) - min(a[0], b[0]), max(a[3], b[3]) - min(a[1], b[1])
    d = ((a[0] + a[2] - b[0] - b[2]) / 2) ** 2 + ((a[1] + a[3] - b[1] - b[3]) / 2) ** 2
    s = 4 / math.pi ** 2 * (math.atan((b[2] - b[0]) / (b[3] - b[1])) - math.atan((a[2] - a[0]) / (a[3] - a[1]))) ** 2
    return v - d / (cw ** 2 + ch ** 2) - s / (1 - v + s + 1e-7) * s


def slow_anchor_loss(maps, rows, anchors=ANCHORS, *, threshold=4.0, box=.05, obj=1.0, cls=.5, obj_pw=1.0, cls_pw=1.0,
                     smoothing=0.0):
    total = {"box": 0.0, "obj": 0.0, "cls": 0.0}
    balances = (4.0, 1.0, 0.4) if len(maps) == 3 else (4.0, 1.0, 0.25, 0.06)
    for m, level, stride, balance in zip(maps, anchors.tolist(), (8, 16, 32, 64), balances):
        height, width, classes = m.shape[2], m.shape[3], m.shape[4] - 5
        target, boxes, labels = np.zeros(m.shape[:4]), [], []
        for image, label, x1, y1, x2, y2 in rows.tolist():
            x, y, w, h = (x1 + x2) / 2 / stride, (y1 + y2) / 2 / stride, (x2 - x1) / stride, (y2 - y1) / stride
            for a, (aw, ah) in enumerate(level):
                if max(w / aw, aw / w, h / ah, ah / h) >= threshold:
                    continue
                cells = [(int(x), int(y)), (int(x) + (-1 if x % 1 < .5 else 1), int(y)),
                         (int(x), int(y) + (-1 if y % 1 < .5 else 1))]
                for i, j in cells:
                    if not (0 <= i < width and 0 <= j < height):
                        continue
                    t = m[int(image), a, j, i].tolist()
                    px, py = 2 * sigmoid(t[0]) - .5, 2 * sigmoid(t[1]) - .5
                    pw, ph = (2 * sigmoid(t[2])) ** 2 * aw, (2 * sigmoid(t[3])) ** 2 * ah
                    gx, gy = x - i, y - j
                    v = ciou((px - pw / 2, py - ph / 2, px + pw / 2, py + ph / 2),
                             (gx - w / 2, gy - h / 2, gx + w / 2, gy + h / 2))
                    boxes.append(1 - v)
                    target[int(image), a, j, i] = max(target[int(image), a, j, i], v, 0)
                    per = []
                    for c in range(classes):
                        y_c = 1 - smoothing / 2 if c == label else smoothing / 2
                        per.append(bce(t[5 + c], y_c, cls_pw))
                    labels.append(np.mean(per))
        if boxes:
            total["box"] += box * np.mean(boxes)
            total["cls"] += cls * np.mean(labels)
        each = [bce(t, y, obj_pw)
                for t, y in zip(m[..., 4].flatten().tolist(), target.flatten().tolist())]
        total["obj"] += obj * balance * np.mean(each)
    return total


@pytest.fixture(autouse=True)
def in_float64(monkeypatch):
    """The losses compute in fp32; here the casts do nothing, so that differences are errors and not rounding."""
    monkeypatch.setattr(torch.Tensor, "float",
                        lambda self: self if self.dtype == torch.float64 else self.to(torch.float32))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", [{}, dict(threshold=2.91, box=.0296, obj=.301, obj_pw=.911, cls=.243, cls_pw=.631),
                                     dict(smoothing=0.1)])
def test_anchor_loss_is_the_loops(seed, options):
    maps, rows = anchor_maps(seed), scene(seed)
    loss, parts = anchor_loss(maps, rows, ANCHORS, STRIDES, **options)
    slow = slow_anchor_loss(maps, rows, **options)
    assert {k: float(v) for k, v in parts.items()} == pytest.approx(slow, rel=1e-6)
    assert float(loss) == pytest.approx(sum(slow.values()), rel=1e-6)


@pytest.mark.parametrize("seed", range(2))
def test_anchor_loss_of_four_levels_is_the_loops(seed):
    """The coarsest one has matches, or its share would not be seen."""
    strides = [*STRIDES, 64]
    maps, rows = anchor_maps(seed, size=128, strides=strides), scene(seed, size=128)
    assert len(match_anchors(maps[3].shape, rows, P6[3], 64, 4.0)[0])
    _, parts = anchor_loss(maps, rows, P6, strides)
    assert {k: float(v) for k, v in parts.items()} == pytest.approx(slow_anchor_loss(maps, rows, P6), rel=1e-6)


def test_anchor_loss_without_boxes_has_a_gradient():
    maps = [m.requires_grad_() for m in anchor_maps(0)]
    loss, parts = anchor_loss(maps, torch.zeros(0, 6, dtype=torch.float64), ANCHORS, STRIDES)
    loss.backward()
    assert parts["box"] == parts["cls"] == 0 and parts["obj"] > 0
    assert all(m.grad[..., 4].abs().min() > 0 and m.grad.isfinite().all() for m in maps)


def test_the_order_of_the_boxes_is_irrelevant():
    maps, rows = anchor_maps(1), scene(1, most=20)
    a, b = (float(anchor_loss(maps, r, ANCHORS, STRIDES)[0]) for r in (rows, rows.flip(0)))
    assert a == pytest.approx(b, rel=1e-12)


def test_one_class_has_no_class_loss():
    maps, rows = anchor_maps(2, classes=1), scene(2, classes=1)
    assert anchor_loss(maps, rows, ANCHORS, STRIDES)[1]["cls"] == 0


def test_a_box_at_the_border_stays_inside():
    row = torch.tensor([[0, 0, 88.0, 88, 96, 96]], dtype=torch.float64)
    index, sizes, relative, _ = match_anchors((1, 3, 12, 12, 9), row, ANCHORS[0], 8, 4.0)
    _, anchor, j, i = np.unravel_index(index.numpy(), (1, 3, 12, 12))
    assert len(j) and int(j.max()) == 11 and int(i.max()) == 11 and torch.equal(sizes, ANCHORS[0][anchor])
    assert ((relative[:, :2] >= -.5) & (relative[:, :2] <= 1.5)).all()


# ---- anchor-free ----

BINS = 8


def free_maps(seed, *, images=3, size=96, classes=4):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(images, size // s, size // s, 4 * BINS + classes, generator=g, dtype=torch.float64)
            for s in STRIDES]


def slow_free_loss(maps, rows, *, topk=3, alpha=.5, beta=6.0, box=7.5, dfl=1.5, cls=.5):
    cells = []  # image, centre, stride, box, distributions, class logits
    images, classes = maps[0].shape[0], maps[0].shape[-1] - 4 * BINS
    for m, s in zip(maps, STRIDES):
        for j in range(m.shape[1]):
            for i in range(m.shape[2]):
                cells.append(((i + .5) * s, (j + .5) * s, s, m[:, j, i]))

    def decode(cell, image):
        x, y, s, t = cell
        d = [float((t[image, k * BINS:(k + 1) * BINS].softmax(0) * torch.arange(BINS)).sum()) * s for k in range(4)]
        return x - d[0], y - d[1], x + d[2], y + d[3]

    lbox = ldfl = lcls = total = 0.0
    goals = {}
    for image in range(images):
        mine = [r[1:] for r in rows.tolist() if r[0] == image]
        claims = {}
        found = [decode(c, image) for c in cells]
        for g, (label, *truth) in enumerate(mine):
            cx, cy = (truth[0] + truth[2]) / 2, (truth[1] + truth[3]) / 2
            hw, hh = (truth[2] - truth[0]) / 2, (truth[3] - truth[1]) / 2
            inside = [n for n, (x, y, s, _) in enumerate(cells)
                      if abs(x - cx) < max(hw, s) and abs(y - cy) < max(hh, s)]
            score = {n: sigmoid(float(cells[n][3][image, 4 * BINS + int(label)])) for n in inside}
            value = {n: score[n] ** alpha * overlap(truth, found[n]) ** beta for n in inside}
            for n in sorted(inside, key=lambda n: -value[n])[:topk]:
                claims.setdefault(n, []).append((overlap(truth, found[n]), -g, value[n]))
        owned = {n: max(c) for n, c in claims.items()}
        for g in range(len(mine)):
            own = {n: c for n, c in owned.items() if -c[1] == g}
            if own:
                best_iou, best = max(c[0] for c in own.values()), max(c[2] for c in own.values())
                goals |= {(image, n): (g, c[2] * best_iou / best if best else 0.0) for n, c in own.items()}
        for n, c in enumerate(cells):
            g, goal = goals.get((image, n), (None, 0.0))
            total += goal
            for k in range(classes):
                lcls += bce(float(c[3][image, 4 * BINS + k]), goal if g is not None and k == mine[g][0] else 0.0)
            if goal:
                truth = mine[g][1:]
                lbox += goal * (1 - ciou(found[n], truth))
                for k, d in enumerate((c[0] - truth[0], c[1] - truth[1], truth[2] - c[0], truth[3] - c[1])):
                    d = min(max(d / c[2], 0), BINS - 1.01)
                    logp = c[3][image, k * BINS:(k + 1) * BINS].log_softmax(0)
                    low = int(d)
                    ldfl -= goal / 4 * (float(logp[low]) * (low + 1 - d) + float(logp[low + 1]) * (d - low))
    total = max(total, 1)
    return {"box": box * lbox / total, "dfl": dfl * ldfl / total, "cls": cls * lcls / total}


@pytest.mark.parametrize("seed", range(5))
def test_free_loss_is_the_loops(seed):
    maps, rows = free_maps(seed), scene(seed)
    loss, parts = free_loss(maps, rows, STRIDES, BINS, topk=3)
    slow = slow_free_loss(maps, rows)
    assert {k: float(v) for k, v in parts.items()} == pytest.approx(slow, rel=1e-5)
    assert float(loss) == pytest.approx(sum(slow.values()), rel=1e-5)


def test_free_loss_without_boxes():
    maps = [m.requires_grad_() for m in free_maps(0)]
    loss, parts = free_loss(maps, torch.zeros(0, 6, dtype=torch.float64), STRIDES, BINS)
    loss.backward()
    assert parts["box"] == parts["dfl"] == 0 and parts["cls"] > 0 and all(m.grad.isfinite().all() for m in maps)


def test_every_box_is_assigned_however_small():
    """A box of 3 pixels between the cells' centres still has cells."""
    rows = torch.tensor([[0, 1, 14.6, 14.6, 17.4, 17.4]], dtype=torch.float64)
    _, parts = free_loss(free_maps(0, images=1), rows, STRIDES, BINS)
    assert parts["box"] > 0


def test_distribution_focal_is_least_at_the_target():
    target = torch.tensor([3.25], dtype=torch.float64)
    best = torch.full((1, BINS), -40.0, dtype=torch.float64)
    best[0, 3], best[0, 4] = math.log(.75), math.log(.25)
    entropy = -(.75 * math.log(.75) + .25 * math.log(.25))
    assert float(distribution_focal(best, target)) == pytest.approx(entropy, rel=1e-9)
    assert float(distribution_focal(torch.zeros(1, BINS, dtype=torch.float64), target)) == pytest.approx(math.log(BINS))


def test_pad_keeps_boxes_with_their_images():
    rows = scene(3, images=4, most=9)
    boxes, classes, mask = pad(rows, 5)
    for image in range(5):
        mine = rows[rows[:, 0] == image]
        assert torch.equal(boxes[image][mask[image]], mine[:, 2:])
        assert torch.equal(classes[image][mask[image]], mine[:, 1].long())
    assert not mask[4].any()


def test_the_best_cell_is_to_score_as_its_overlap():
    """TOOD's normalisation: the largest goal of a box equals the largest IoU among its cells."""
    torch.manual_seed(0)
    gt_boxes = torch.tensor([[[10.0, 10, 50, 60]]])
    line = torch.arange(4., 64, 8)
    centres = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).view(-1, 2)
    half = torch.rand(1, 64, 4) * 40
    found = torch.cat((centres - half[..., :2], centres + half[..., 2:]), -1)
    owner, goal = assign(torch.rand(1, 64, 2), found, centres, torch.full((64, 1), 8.), gt_boxes,
                         torch.zeros(1, 1).long(), torch.ones(1, 1, dtype=torch.bool), topk=10)
    assert (goal > 0).sum() <= 10 and (owner == 0).all()
    overlaps = losses_det.iou(gt_boxes[0], found[0])
    assert float(goal.max()) == pytest.approx(float(overlaps[goal[0] > 0].max()), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_objects_have_a_goal_from_the_first_step(dtype):
    """At the start boxes are wide and scores low: the alignment of an object of 10 pixels is 1e-15."""
    line = torch.arange(4., 64, 8, dtype=dtype)
    centres = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).view(-1, 2)
    found = torch.cat((centres - 60, centres + 60), -1)[None]
    gt_boxes, mask = centres.new_tensor([[[20, 20, 30, 30], [0, 0, 0, 0]]]), torch.tensor([[True, False]])
    for low in (1e-4, 0):  # without any score nothing is known
        _, goal = assign(torch.full((1, 64, 2), low, dtype=dtype), found, centres, torch.full((64, 1), 8., dtype=dtype),
                         gt_boxes, torch.zeros(1, 2).long(), mask, topk=10)
        assert float(goal.max()) == pytest.approx(100 / 120 ** 2 if low else 0, rel=1e-4)
