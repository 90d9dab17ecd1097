"""utils/ops/boxes.py against torchvision, plain float64 loops and hand-computed cases."""
import math

import pytest
import torch
from torchvision.ops import batched_nms, box_convert, box_iou, complete_box_iou, complete_box_iou_loss
from torchvision.ops import nms as torchvision_nms

from utils.ops.boxes import clip, iou, nms, suppress, to_xywh, to_xyxy, wbf


def random_boxes(n, size=100., seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(n, 2, generator=g, dtype=dtype) * size
    return torch.cat((low, low + torch.rand(n, 2, generator=g, dtype=dtype) * size + 0.1), 1)


def plain_iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / union if union > 0 else 0.


# ---- boxes and overlap

def test_corners_and_centres():
    assert to_xyxy(torch.tensor([10., 20, 4, 6])).tolist() == [8, 17, 12, 23]
    assert to_xywh(torch.tensor([8., 17, 12, 23])).tolist() == [10, 20, 4, 6]
    boxes = random_boxes(60).view(3, 20, 4)
    torch.testing.assert_close(to_xywh(boxes), box_convert(boxes, "xyxy", "cxcywh"))
    torch.testing.assert_close(to_xyxy(to_xywh(boxes)), boxes)


def test_clip_moves_only_what_is_outside():
    rows = torch.tensor([[-3., -4, 700, 500, 0.9, 700], [5, 6, 7, 8, 0.5, -1]])
    before = rows.clone()
    assert clip(rows, 480, 640).tolist() == [[0, 0, 640, 480, rows[0, 4].item(), 700], [5, 6, 7, 8, 0.5, -1]]
    assert torch.equal(rows, before)
    assert clip(torch.tensor([650., -9, 660, -8]), 480, 640).tolist() == [640, 0, 640, 0]


def test_iou_of_all_pairs():
    a, b = random_boxes(30), random_boxes(40, seed=1)
    pairs = iou(a[:, None], b[None])
    assert pairs.shape == (30, 40) and (pairs > 0).any() and (pairs == 0).any()
    torch.testing.assert_close(pairs, torch.tensor([[plain_iou(p, q) for q in b.tolist()] for p in a.tolist()],
                                                   dtype=torch.float64), atol=1e-8, rtol=0)
    torch.testing.assert_close(pairs, box_iou(a, b), atol=1e-8, rtol=0)
    torch.testing.assert_close(iou(a, b[:30]), pairs[:, :30].diagonal())


def test_ciou_and_its_gradient_are_torchvisions():
    a, b = random_boxes(200), random_boxes(200, seed=1)
    a[:20] = b[:20] + 0.5 * torch.rand(20, 4, generator=torch.Generator().manual_seed(2), dtype=a.dtype)
    expected = complete_box_iou(a, b).diagonal()
    torch.testing.assert_close(iou(a, b, kind="ciou"), expected, atol=1e-7, rtol=0)
    assert expected.min() < -0.5 < 0.8 < expected.max()
    gradients = []
    for loss in (lambda x: (1 - iou(x, b, kind="ciou")).sum(), lambda x: complete_box_iou_loss(x, b).sum()):
        x = a.clone().requires_grad_()
        gradients.append(torch.autograd.grad(loss(x), x)[0])
    torch.testing.assert_close(*gradients, atol=1e-8, rtol=1e-5)


def test_ciou_by_hand():
    # 4 x 2 against 2 x 4 with the same centre: IoU 4 / 12; distance 0; angles atan(2) and atan(1/2)
    a, b = torch.tensor([0., 1, 4, 3]), torch.tensor([1., 0, 3, 4])
    v = 4 / math.pi ** 2 * (math.atan(2) - math.atan(0.5)) ** 2
    assert iou(a, b, kind="ciou").item() == pytest.approx(1 / 3 - v * v / (1 - 1 / 3 + v), abs=1e-6)
    # the same shape 6 px to the right: no overlap; 36 / (10^2 + 2^2)
    assert iou(a, a + torch.tensor([6., 0, 6, 0]), kind="ciou").item() == pytest.approx(-36 / 104, abs=1e-6)
    assert iou(a, a, kind="ciou").item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("kind", ["iou", "ciou"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_degenerate_boxes_stay_finite(kind, dtype):
    cases = torch.tensor([[0., 0, 0, 0], [5, 5, 5, 9], [5, 5, 9, 5], [5, 5, 9, 9], [9, 9, 5, 5], [0, 0, 6e4, 6e4],
                          [6e4, 6e4, 6e4, 6e4], [5, 5, 5.01, 5.01], [0, 0, 1e-12, 0]], dtype=dtype)
    a, b = cases[:, None].repeat(1, len(cases), 1).requires_grad_(), cases[None].repeat(len(cases), 1, 1)
    value = iou(a, b, kind=kind)
    assert value.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert value.isfinite().all() and value.max() <= 1 + 1e-6
    valid = [k for k in range(9) if k != 4]  # box 4 has swapped corners
    assert value.view(9, 9)[valid][:, valid].min() >= -1.5
    if dtype != torch.float16:  # the angle's slope at a box without area is 1e7 per pixel, above float16's range
        value.sum().backward()
        assert a.grad.isfinite().all() and (a.grad.abs() < 1e9).all()
    if kind == "iou":  # boxes without area and with swapped corners overlap nothing
        assert (value[[0, 1, 2, 4, 6]] == 0).all()


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match='"iou" or "ciou"'):
        iou(torch.zeros(4), torch.zeros(4), kind="giou")


# ---- suppression

def predictions(images=3, n=400, classes=4, objects=6, size=300., seed=0):
    """Rows of `nms` in float32: clusters of overlapping boxes with noise."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.rand(images, n, 5 + classes, generator=g)
    centres = torch.rand(images, objects, 4, generator=g) * torch.tensor([size, size, 60, 60]) + 20
    which = torch.randint(objects, (images, n, 1), generator=g).expand(-1, -1, 4)
    rows[..., :4] = centres.gather(1, which) + 4 * torch.randn(images, n, 4, generator=g)
    return rows


def brute_force(rows, conf=0.001, iou=0.6, max_det=300, multi_label=True, max_candidates=30000, agnostic=False):
    """`nms` of one image in plain float64 Python -> the survivors [(row, class)], in order."""
    found = []
    for i, (x, y, w, h, obj, *probs) in enumerate(rows.tolist()):
        scores = [torch.tensor(obj).mul(p).item() for p in probs]  # the float32 product
        chosen = range(len(scores)) if multi_label else [max(range(len(scores)), key=lambda c: scores[c])]
        found += [(-scores[c], i, c, (x - w / 2, y - h / 2, x + w / 2, y + h / 2)) for c in chosen if scores[c] > conf]
    kept = []
    for candidate in sorted(found, key=lambda f: f[:3])[:max_candidates]:
        if all(plain_iou(candidate[3], k[3]) <= iou or not (agnostic or candidate[2] == k[2]) for k in kept):
            kept.append(candidate)
    return [(i, c) for _, i, c, _ in kept[:max_det]]


def survivors(rows, detections):
    """The (row, class) of each detection, found by its box and score."""
    scores = rows[:, 4:5] * rows[:, 5:]
    same = (to_xyxy(rows[:, :4])[None] == detections[:, None, :4]).all(2)[:, :, None] & (
        scores[None] == detections[:, 4, None, None])
    label = detections[:, 5].long()
    return [(same[k, :, c].nonzero()[0].item(), c) for k, c in enumerate(label.tolist())]


@pytest.mark.parametrize("options", [
    {}, {"agnostic": True}, {"multi_label": False}, {"multi_label": False, "agnostic": True}, {"iou": 0.3},
    {"conf": 0.4, "iou": 0.9}, {"max_det": 3}, {"max_det": 11, "iou": 0.2}, {"max_candidates": 37},
    pytest.param({"max_det": 150, "iou": 0.9}, marks=pytest.mark.slow),
    {"max_candidates": 100, "max_det": 5, "agnostic": True}, {"max_det": 0},
    {"iou": 1.0, "max_det": 30, "max_candidates": 150}])
def test_nms_against_brute_force(options):
    rows = predictions()
    before = rows.clone()
    result = nms(rows, **options)
    assert torch.equal(rows, before) and len(result) == 3
    for image, detections in zip(rows, result):
        expected = brute_force(image, **options)
        assert detections.dtype == torch.float32 and detections.shape == (len(expected), 6)
        assert survivors(image, detections) == expected


def test_nms_against_torchvision_class_by_class():
    rows = predictions(images=4, n=900, classes=7, objects=25, size=640, seed=3)
    for image, detections in zip(rows, nms(rows, max_det=10 ** 6)):
        boxes, scores, expected = to_xyxy(image[:, :4]), image[:, 4:5] * image[:, 5:], []
        for c in range(7):
            mine = (scores[:, c] > 0.001).nonzero()[:, 0]
            keep = mine[torchvision_nms(boxes[mine].double(), scores[mine, c].double(), 0.6)]
            expected.append(torch.cat((boxes[keep], scores[keep, c, None], torch.full((len(keep), 1), float(c))), 1))
        expected = torch.cat(expected)
        expected = expected[expected[:, 4].argsort(descending=True)]
        assert len(expected) > 300 and torch.equal(detections, expected)


def test_an_image_does_not_depend_on_the_others():
    rows = predictions(images=5)
    rows[2, :, 4] = 0  # an image without detections in the middle
    together = nms(rows)
    assert len(together[2]) == 0 and min(len(together[i]) for i in (0, 1, 3, 4)) > 0
    for i in range(5):
        assert torch.equal(together[i], nms(rows[i:i + 1])[0])


def test_many_classes_far_apart_keep_their_pixels():
    # pairs of 1-px boxes at a corner of a 7680-px image, whose IoU is just above or just below the threshold
    g = torch.Generator().manual_seed(0)
    rows = torch.zeros(1, 160, 85)
    rows[0, :, :2] = 7600 + 80 * torch.rand(80, 2, generator=g).repeat_interleave(2, 0)
    shift = torch.where(torch.rand(80, generator=g) < 0.5, 0.24, 0.26)  # IoU .613 or .587
    rows[0, 1::2, 0] += shift
    rows[0, :, 2:4], rows[0, ::2, 4], rows[0, 1::2, 4] = 1, 0.9, 0.8
    rows[0, torch.arange(160), 5 + torch.arange(80).repeat_interleave(2)] = 1
    far = torch.zeros(1, 1, 85)  # a box in the opposite corner, so that the classes are placed far apart
    far[..., :6] = torch.tensor([1., 1, 2, 2, 0.1, 1])
    detections = nms(torch.cat((rows, far), 1))[0]
    assert survivors(rows[0], detections[:-1]) == brute_force(rows[0])
    assert len(detections) == 80 + int((shift > 0.25).sum()) + 1
    boxes, label = to_xyxy(rows[0, :, :4]), torch.arange(80).repeat_interleave(2)
    in_float32 = batched_nms(boxes, rows[0, :, 4], label, 0.6)  # it adds offsets in float32 when there are few boxes
    assert len(in_float32) != len(detections)  # else the case is too easy


def test_broken_rows_are_absent():
    rows = predictions()
    expected = nms(rows)
    broken = predictions(n=27, seed=9)
    for k in range(27):  # each non-finite value once in each column
        broken[:, k, k // 3] = (math.nan, math.inf, -math.inf)[k % 3]
    for order in ((broken, rows), (rows, broken)):
        for options in ({}, {"max_candidates": 10 ** 6}, {"multi_label": False}):
            for a, b in zip(nms(torch.cat(order, 1), **options), nms(rows, **options)):
                assert torch.equal(a, b)
    assert [len(d) for d in nms(broken * math.nan)] == [0, 0, 0]
    assert all(len(d) for d in expected)


def test_a_far_box_does_not_cost_the_others_precision():
    rows, stray = predictions(), torch.zeros(3, 4, 9)
    stray[..., 4:] = 0.999
    stray[..., :4] = torch.tensor([[1e30, 0, 1e20, 1e20], [0, -1e35, 5, 5], [3e38, 3e38, 1, 1], [0, 0, 3e38, 3e38]])
    for a, b in zip(nms(torch.cat((stray, rows), 1), max_det=10 ** 6), nms(rows, max_det=10 ** 6)):
        assert torch.equal(a[(a[:, :4].abs() < 1e4).all(1)], b)


def test_equal_scores_go_by_row_then_class():
    rows = predictions(images=2, n=300)
    rows[..., 4:] = 0.5
    for options in ({}, {"max_candidates": 50}, {"agnostic": True}, {"multi_label": False}, {"max_candidates": 51}):
        result = nms(rows, **options)
        for image, detections in zip(rows, result):
            assert survivors(image, detections) == brute_force(image, **options)
        assert all(torch.equal(a, b) for a, b in zip(result, nms(rows, **options)))
    assert all((d[:, 5] == 0).all() for d in nms(rows, agnostic=True))


def test_thresholds_are_exclusive():
    rows = torch.zeros(1, 2, 6)
    rows[0] = torch.tensor([[5., 5, 10, 10, 1, 0.5], [5, 7.5, 10, 5, 1, 0.25]])  # the second is half of the first
    assert len(nms(rows, conf=0.25)[0]) == 1 and len(nms(rows, conf=0.2499)[0]) == 2
    assert len(nms(rows, iou=0.5)[0]) == 2 and len(nms(rows, iou=0.4999)[0]) == 1
    assert len(nms(rows, iou=0.5, conf=0.25)[0]) == 1 and len(nms(rows, conf=0.5)[0]) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_compute_in_float32(dtype):
    rows = predictions().to(dtype)
    for a, b in zip(nms(rows), nms(rows.float())):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 10, 8), (2, 0, 8), (2, 10, 8), (2, 10, 6)])
def test_nothing_found(shape):
    for options in ({}, {"multi_label": False}, {"agnostic": True}, {"max_candidates": 0}):
        assert [d.shape for d in nms(torch.zeros(shape), **options)] == [(0, 6)] * shape[0]


def test_no_gradient_flows():
    assert not nms(predictions().requires_grad_())[0].requires_grad


# ---- fusion

def detection(x, score, label=0., size=10.):
    return [x, 0., x + size, 10., score, label]


def test_wbf_by_hand():
    a, b, c = (torch.tensor([row]) for row in (detection(0, 0.8), detection(2, 0.4), detection(50, 0.6)))
    # 0 and 2 fuse: x = (0.8 * 0 + 0.4 * 2) / 1.2, score = 0.6 x 2 of 2 models; one of two models has found 50
    fused = wbf([torch.cat((a, c)), b])
    torch.testing.assert_close(fused, torch.tensor([[2 / 3, 0, 32 / 3, 10, 0.6, 0], [50, 0, 60, 10, 0.3, 0]]))
    # weights 3 : 1: the scores become 2.4 and 0.4; 2.8 / 2 x 2 / 4
    fused = wbf([torch.cat((a, c)), b], weights=[3, 1])
    torch.testing.assert_close(fused, torch.tensor([[2 / 7, 0, 72 / 7, 10, 0.7, 0], [50, 0, 60, 10, 0.45, 0]]))
    torch.testing.assert_close(fused, wbf([torch.cat((a, c)), b], weights=[0.75, 0.25]))  # only their ratio counts
    # more members than models do not raise the score; another class does not fuse
    torch.testing.assert_close(wbf([torch.cat((a, a, a))])[:, 4], torch.tensor([0.8]))
    assert len(wbf([a, torch.tensor([detection(0, 0.8, label=1.)])])) == 2
    # IoU of 0 and 2 is 8 / 12
    assert len(wbf([a, b], iou=0.66)) == 1 and len(wbf([a, b], iou=0.67)) == 2
    assert len(wbf([a, b[:0]])) == 1 and len(wbf([a[:0], b[:0]])) == 0


def test_wbf_compares_with_the_fused_box():
    # 4 overlaps 0 by 6/14 = .43 only, but the fused box of 0 and 2, which lies at 1, by 7/13 = .54
    rows = [torch.tensor([detection(x, s)]) for x, s in ((0, 0.9), (2, 0.9), (4, 0.5))]
    assert len(wbf(rows, iou=0.5)) == 1
    assert len(wbf([rows[0], rows[2]], iou=0.5)) == 2


def slow_wbf(detections, weights, threshold):
    """The paper's algorithm: every fused box is computed again from the list of its members."""
    entries = sorted(((row[4] * w, row[:4], row[5], m) for m, (rows, w) in enumerate(zip(detections, weights))
                      for row in rows.tolist()), key=lambda e: -e[0])
    clusters = []
    for entry in entries:
        overlaps = [(plain_iou(mean(c), entry[1]), -k) for k, c in enumerate(clusters) if c[0][2] == entry[2]]
        best, k = max(overlaps, default=(0, 0))
        if best > threshold:
            clusters[-k].append(entry)
        else:
            clusters.append([entry])
    scores = [sum(max([e[0] for e in c if e[3] == m], default=0) for m in range(len(weights))) / sum(weights)
              for c in clusters]
    return sorted(([*mean(c), s, c[0][2]] for c, s in zip(clusters, scores)), key=lambda row: -row[4])


def mean(cluster):
    total = sum(e[0] for e in cluster)
    return [sum(e[0] * e[1][side] for e in cluster) / total for side in range(4)]


@pytest.mark.parametrize("weights", [None, (1., 2., 0.5, 1.)])
@pytest.mark.parametrize("threshold, conf", [(0.55, 0.), (0.4, 0.3), (0.8, 0.1)])
def test_wbf_against_a_slow_loop(weights, threshold, conf):
    detections = nms(predictions(images=4, n=150, classes=3, objects=8, seed=5), iou=0.85, max_det=60)
    g = torch.Generator().manual_seed(0)
    detections = [detections[0]] + [detections[0][torch.randperm(60, generator=g)[:50]] for _ in range(3)]
    for d in detections[1:]:
        d[:, :4] += 3 * torch.randn(len(d), 4, generator=g)
        d[:, 4] *= torch.rand(len(d), generator=g)
    detections = [d[d[:, 4] > conf] for d in detections]
    fused = wbf(detections, weights=weights, iou=threshold)
    expected = torch.tensor(slow_wbf(detections, weights or (1.,) * 4, threshold))
    assert 20 < len(expected) < sum(map(len, detections)) * 0.6
    torch.testing.assert_close(fused, expected, atol=1e-4, rtol=1e-5)


def test_wbf_of_one_models_several_boxes():
    """They do not count as agreement of models: the score is not above theirs, and below that of two models."""
    own = torch.tensor([detection(0, 0.9), detection(1, 0.85), detection(2, 0.8)])
    for weights, share in ((None, 0.5), ([3., 1.], 0.75)):
        [fused] = wbf([own, torch.zeros(0, 6)], weights=weights)
        assert float(fused[4]) == pytest.approx(0.9 * share, rel=1e-6)
    assert float(wbf([own, own[:1]])[0, 4]) == pytest.approx(0.9, rel=1e-6)


def test_wbf_of_few_or_no_detections():
    one = torch.tensor([detection(0, 0.8)])
    assert wbf([]).shape == wbf([torch.zeros(0, 6)]).shape == wbf([torch.zeros(0, 6)] * 3).shape == (0, 6)
    torch.testing.assert_close(wbf([one]), one)
    torch.testing.assert_close(wbf([one, torch.zeros(0, 6)])[0, 4], torch.tensor(0.4))
    broken = torch.tensor([detection(0, math.nan), detection(math.nan, 0.9), detection(math.inf, 0.9)])
    torch.testing.assert_close(wbf([torch.cat((broken, one))]), one)
    for weights in ([1.], [1., 0.], [1., -1.], [1., math.nan]):
        with pytest.raises(ValueError, match="must be 2 positive numbers"):
            wbf([one, one], weights=weights)


@pytest.mark.parametrize("seed", range(5))
def test_suppress_sorts_and_is_torchvisions(seed):
    g = torch.Generator().manual_seed(seed)
    corner, size = torch.rand(60, 2, generator=g) * 80, torch.rand(60, 2, generator=g) * 30 + 1
    rows = torch.cat((corner, corner + size, torch.rand(60, 1, generator=g), torch.randint(3, (60, 1), generator=g)), 1)
    want = rows[batched_nms(rows[:, :4], rows[:, 4], rows[:, 5], 0.4)]
    assert torch.equal(suppress(rows, iou=0.4), want)
    assert torch.equal(suppress(rows, iou=0.4, max_det=7), want[:7])
    one = rows[torchvision_nms(rows[:, :4], rows[:, 4], 0.4)]
    assert torch.equal(suppress(rows, iou=0.4, agnostic=True), one)
    assert suppress(rows[:0]).shape == (0, 6)
