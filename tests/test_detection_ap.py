"""utils/metrics/average_precision.py against pycocotools, and against plain loops where COCO has no such number."""
import contextlib
import io
import math

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from utils.metrics.average_precision import DetectionAP

NAMES = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"]
SIZES = ([1, 2, 3, 4, 6], [8, 16, 31, 32, 33], [64, 95, 96, 97, 128], [200, 100_000, 120_000, 0])  # 0: no area


def case(seed, *, images=8, classes=3, detections=12, truths=6, ties=True, empty=0.2):
    """-> per image (n, 6) and (m, 5), float64. Half of the detections lie near a truth or on it; with `ties` sizes,
    shifts and scores are few, so that boxes are doubled and IoUs, scores and areas are often equal."""
    rng = np.random.default_rng(seed)
    found, actual = [], []
    for _ in range(images):
        n, m = (0 if rng.random() < empty else rng.integers(top + 1) for top in (detections, truths))
        sizes = SIZES[rng.integers(len(SIZES))] if ties else rng.uniform(4, 200, 8)
        corner, size = rng.integers(0, 8, (n + m, 2)), rng.choice(sizes, (n + m, 2))
        label = rng.integers(classes, size=n + m)
        if m:
            near, source = rng.random(n) < 0.5, rng.integers(m, size=n)
            corner[m:][near], size[m:][near], label[m:][near] = (x[source[near]] for x in (corner, size, label))
        shift = rng.integers(0, 2, (n + m, 2)) if ties else rng.uniform(0, 4, (n + m, 2)).astype(np.float32)
        score = rng.integers(0, 4, n + m) / 4 if ties else rng.random(n + m).astype(np.float32)
        rows = np.column_stack((corner + shift, corner + shift + size, score, label)).astype(np.float64)
        rows[:, :4] = rows[:, :4].astype(np.float32)  # then sizes and corners have one value, in COCO's format too
        found.append(torch.from_numpy(rows[m:]))
        actual.append(torch.from_numpy(rows[:m, [0, 1, 2, 3, 5]]))
    return found, actual


def metric(found, actual, classes=3, batch=3, **kwargs):
    result = DetectionAP(classes, **kwargs)
    for i in range(0, len(actual), batch):
        result.update(found[i:i + batch], actual[i:i + batch])
    return result


def coco(images, classes, boxes):
    """boxes: (image, x1, y1, x2, y2, class) or with a score before the class -> a pycocotools data set."""
    data = COCO()
    data.dataset = {"images": [{"id": i} for i in range(images)], "categories": [{"id": c} for c in range(classes)],
                    "annotations": [{"id": k + 1, "image_id": i, "category_id": int(rest[-1]), "score": rest[0],
                                     "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
                                    for k, (i, x1, y1, x2, y2, *rest) in enumerate(boxes)]}
    data.createIndex()
    return data


def oracle(found, actual, classes=3, max_det=100):
    """pycocotools' precision (10 IoUs, 101 recalls, C, 4 ranges of areas), NaN where it has -1."""
    with contextlib.redirect_stdout(io.StringIO()):
        data = [coco(len(actual), classes, [(i, *row) for i, rows in enumerate(side) for row in rows.tolist()])
                for side in (actual, found)]
        run = COCOeval(*data, "bbox")
        run.params.maxDets = [max_det]
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][..., -1]
    return np.where(precision < 0, np.nan, precision)


def mean(values):
    values = values[~np.isnan(values)]
    return values.mean() if values.size else math.nan


def check(found, actual, classes=3, max_det=100):
    """All numbers of COCO's; returns ours."""
    ours, expected = metric(found, actual, classes, max_det=max_det), oracle(found, actual, classes, max_det)
    values = ours.compute()
    assert list(values) == NAMES
    six = [expected[..., 0], expected[0, ..., 0], expected[5, ..., 0], *(expected[..., a] for a in (1, 2, 3))]
    assert list(values.values()) == pytest.approx([mean(x) for x in six], abs=1e-12, nan_ok=True)
    rows = ours.per_class()
    assert len(rows) == classes
    for c, row in enumerate(rows):
        three = [expected[:, :, c, 0], expected[0, :, c, 0], expected[5, :, c, 0]]
        assert [row[name] for name in NAMES[:3]] == pytest.approx([mean(x) for x in three], abs=1e-12, nan_ok=True)
        assert row["truths"] == sum((rows[:, 4] == c).sum() for rows in actual)
    return values


@pytest.mark.parametrize("seed", range(60))
def test_equals_pycocotools_with_ties(seed):
    check(*case(seed, images=1 + seed % 13, detections=4 + seed % 17, truths=1 + seed % 7), classes=3)


@pytest.mark.parametrize("seed", range(10))
def test_equals_pycocotools_without_ties(seed):
    values = check(*case(seed, images=20, classes=1 + seed % 3, detections=40, truths=15, ties=False))
    assert all(0 < value < 1 for value in values.values())  # else little is tested


@pytest.mark.parametrize("max_det", [1, 5, 100])
@pytest.mark.parametrize("ties", [False, True])
def test_only_the_best_of_an_image_and_class_are_judged(max_det, ties):
    found, actual = case(0, images=4, classes=2, detections=500, truths=120, ties=ties, empty=0)
    assert max(len(rows) for rows in found) > 240
    values = check(found, actual, 2, max_det)
    assert values != metric(found, actual, 2, max_det=max_det + 1).compute()


def test_one_class_in_one_image_and_many_in_none():
    check(*case(0, images=1, classes=1, detections=50, truths=20, empty=0), classes=1)
    check(*case(1, images=30, classes=3, detections=3, truths=1, empty=0.5), classes=9)


@pytest.mark.parametrize("axis", [0, 1])
def test_extreme_boxes(axis):
    """No area, more than COCO's largest (1e10, which is outside every range), corners in the wrong order."""
    boxes = torch.tensor([[0., 0, 0, 0], [5, 5, 5, 9], [0, 0, 2e5, 2e5], [0, 0, 1e5, 1e5], [9, 9, 5, 5], [9, 0, 5, 4],
                          [1e7, 1e7, 1e7 + 1, 1e7 + 1], [-8, -8, 8, 8]]).double()
    if axis:
        boxes = boxes[:, [1, 0, 3, 2]]
    score = torch.linspace(0.9, 0.1, 8).double()[:, None]
    label = torch.zeros(8, 1).double()
    found, actual = [torch.cat((boxes, score, label), 1)] * 2, [torch.cat((boxes, label), 1), torch.zeros(0, 5)]
    check(found, actual, 1)
    check(found[:1], actual[:1], 1)


def boxes(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_an_iou_of_one_may_lack_a_rounding_error():
    truth, found = boxes([0, 0, 10, 10, 0]), boxes([0, 0, 10, 10 - 1e-10, 0.5, 0])
    assert metric([found], [truth]).best_threshold(1.0) == (0.5, 1.0)
    found[0, 3] = 10 - 1e-8
    assert metric([found], [truth]).best_threshold(1.0) == (0.5, 0.0)


def test_nothing_at_all():
    none = dict.fromkeys(NAMES, math.nan)
    nothing, something = [torch.zeros(0, 6)], [boxes([0, 0, 9, 9, 0.5, 1])]
    for found, actual in (([], []), (nothing, [torch.zeros(0, 5)]), (something, [torch.zeros(0, 5)])):
        empty = metric(found, actual)
        assert empty.compute() == pytest.approx(none, nan_ok=True)
        assert all(map(math.isnan, empty.best_threshold()))
        assert all(math.isnan(row["ap"]) and row["truths"] == 0 for row in empty.per_class())
    unseen = metric(nothing, [boxes([0, 0, 9, 9, 1])])
    assert unseen.compute() == pytest.approx({**none, "ap": 0, "ap50": 0, "ap75": 0, "ap_small": 0}, nan_ok=True)
    assert all(map(math.isnan, unseen.best_threshold()))


def test_a_perfect_detector_has_exactly_one():
    actual = [torch.cat((xy, xy + size, label), 1) for xy, size, label in (
        (500 * torch.rand(9, 2), torch.full((9, 2), side), torch.arange(9.)[:, None] % 3) for side in (9., 50., 150.))]
    found = [torch.cat((rows[:, :4], torch.rand(9, 1), rows[:, 4:]), 1) for rows in actual]
    perfect = metric(found, actual)
    assert perfect.compute() == dict.fromkeys(NAMES, 1.0)
    lowest = min(float(rows[:, 4].min()) for rows in found)
    assert perfect.best_threshold() == (lowest, 1.0)


def iou(a, b):
    w, h = (min(a[k + 2], b[k + 2]) - max(a[k], b[k]) for k in (0, 1))
    shared = max(w, 0) * max(h, 0)
    return shared / (sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - shared) if shared else 0


def hits_of(found, actual, c, at):
    """One class's hits, image by image and detection by detection, the best score first."""
    hits = 0
    for rows, truths in zip(found, actual):
        free = [row for row in truths.tolist() if row[4] == c]
        for row in sorted((row for row in rows.tolist() if row[5] == c), key=lambda row: -row[4]):
            best = max(free, key=lambda truth: iou(row, truth), default=None)
            if best and iou(row, best) >= at:
                free.remove(best)
                hits += 1
    return hits


@pytest.mark.parametrize("at", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("levels", [5, 10 ** 6])
def test_best_threshold_against_trying_them_all(at, levels):
    found, actual = case(levels + int(at * 10), images=8, detections=10, ties=False)
    found = [torch.cat((rows[:, :4], (rows[:, 4:5] * levels).round() / levels, rows[:, 5:]), 1) for rows in found]
    f1 = {}
    for t in sorted({float(s) for rows in found for s in rows[:, 4]}):
        kept = [rows[rows[:, 4] >= t] for rows in found]
        counts = [(hits_of(kept, actual, c, at), sum(int((rows[:, 5] == c).sum()) for rows in kept),
                   sum(int((rows[:, 4] == c).sum()) for rows in actual)) for c in range(3)]
        f1[t] = round(sum(2 * hits / (n + m) for hits, n, m in counts) / 3, 12)
    assert len(f1) > 4 and len(set(f1.values())) > 3
    best = max(f1, key=lambda t: (f1[t], t))
    assert metric(found, actual).best_threshold(at) == pytest.approx((best, f1[best]), abs=1e-12)
    # a class without truths changes nothing, as it does not in AP
    assert metric(found, actual, classes=5).best_threshold(at) == pytest.approx((best, f1[best]), abs=1e-12)


def test_many_pairs_are_found_in_parts_and_boxes_of_other_images_stay_apart():
    x, y = (10. * axis.reshape(-1) for axis in torch.meshgrid(torch.arange(10), torch.arange(10), indexing="ij"))
    corners = torch.stack((x, y, x + 9, y + 9), 1)
    label = torch.zeros(100, 1)
    truth, found = torch.cat((corners, label), 1), torch.cat((corners, label + 0.5, label), 1)
    perfect = metric([found] * 210, [truth] * 210, classes=1, batch=210)
    assert perfect.compute()["ap"] == 1  # 21,000 detections: without any one of them the last recall is not reached


def test_result_does_not_depend_on_batches_order_or_dtype():
    found, actual = case(3, images=20, ties=False)
    expected = metric(found, actual).compute()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = metric([found[i].flip(0) for i in order], [actual[i].flip(0) for i in order], batch=7)
    assert shuffled.compute() == expected
    assert shuffled.best_threshold() == pytest.approx(metric(found, actual).best_threshold(), abs=1e-12)
    assert metric([rows.float() for rows in found], [rows.float() for rows in actual], batch=20).compute() == expected
    whole = [rows.round() for rows in actual]
    assert metric(found, [rows.long() for rows in whole]).compute() == metric(found, whole).compute()


def test_the_result_can_be_asked_for_in_between():
    found, actual = case(4)
    growing = metric(found[:4], actual[:4])
    assert growing.compute() == pytest.approx(metric(found[:4], actual[:4]).compute(), nan_ok=True)
    growing.update(found[4:], actual[4:])
    assert growing.compute() == pytest.approx(metric(found, actual).compute(), nan_ok=True)


def test_gradients_are_not_kept():
    found, actual = case(5, ties=False)
    assert metric([rows.requires_grad_() for rows in found], actual).compute()["ap"] > 0


def test_wrong_input_is_named():
    found, actual = [torch.zeros(2, 6)], [torch.zeros(2, 5)]
    with pytest.raises(ValueError, match="detections of 1 images, but gt_boxes of 2"):
        DetectionAP(3).update(found, actual * 2)
    for wrong in (torch.zeros(2, 5), torch.zeros(6), torch.zeros(0)):
        with pytest.raises(ValueError, match=r"detections \(.*\) must be \(n, 6\)"):
            DetectionAP(3).update([wrong], actual)
    with pytest.raises(ValueError, match=r"gt_boxes \(2, 6\) must be \(n, 5\)"):
        DetectionAP(3).update(found, found)
    for value in (-1, 3, 0.5, math.nan):
        with pytest.raises(ValueError, match=r"detections \(1, 6\) .* their classes 0 .. 2"):
            DetectionAP(3).update([torch.full((1, 6), float(value))], actual)
        with pytest.raises(ValueError, match="gt_boxes .* their classes 0 .. 2"):
            DetectionAP(3).update(found, [torch.full((1, 5), float(value))])


def overlap(a, b):
    width, height = (min(a[2 + i], b[2 + i]) - max(a[i], b[i]) for i in (0, 1))
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


@pytest.mark.parametrize("seed", range(12))
def test_scores_of_images_against_a_loop(seed):
    found, actual = case(seed, images=10, ties=False)
    result = metric(found, actual)
    threshold, _ = result.best_threshold()
    rows = result.samples([f"{i}.png" for i in range(10)])
    assert [row["name"] for row in rows] == [f"{i}.png" for i in range(10)]
    for row, some, truth in zip(rows, found, actual):
        some = sorted((d for d in some.tolist() if d[4] >= threshold), key=lambda d: -d[4])
        free, hits = truth.tolist(), 0
        for d in some:
            best = max((t for t in free if t[4] == d[5]), key=lambda t: overlap(d, t), default=None)
            if best and overlap(d, best) >= 0.5:
                free.remove(best)
                hits += 1
        assert (row["boxes"], row["detections"], row["hits"]) == (len(truth), len(some), hits)
        assert row["score"] == (2 * hits / (len(truth) + len(some)) if len(truth) + len(some) else 1)
