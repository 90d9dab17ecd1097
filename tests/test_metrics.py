"""utils/metrics against pixel-by-pixel counting, over batch splits and over processes."""
import json
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.harness import two_ranks
from tests.test_components import oracle
from utils.metrics.classification import Accuracy, average_precisions, fit_thresholds
from utils.metrics.segmentation import BinaryIoU, MeanIoU, SampleIoU
from utils.train import dist as ranks

VOID = 255


def binary(items=21, size=6, void=0.2):
    g = torch.Generator().manual_seed(0)
    probs = torch.rand(items, size, size, generator=g) ** 2
    labels = (torch.rand(probs.shape, generator=g) < 0.3).long()
    labels[torch.rand(probs.shape, generator=g) < void] = VOID
    probs[3], labels[4], labels[5] = 0.2 * probs[3], 0, VOID  # nothing predicted; no positives; all ignored
    return probs, labels


def multiclass(items=21, classes=5, size=6, void=0.2):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes - 1, (items, size, size), generator=g)
    noise = torch.randint(0, classes, labels.shape, generator=g)
    noise[noise == 2] = 1  # class 2 is never predicted wrongly, and the last one is only predicted
    pred = torch.where(torch.rand(labels.shape, generator=g) < 0.6, labels, noise)
    labels[torch.rand(labels.shape, generator=g) < void] = VOID
    return pred, labels


def measure(metric, first, labels, batch=4):
    for start in range(0, len(labels), batch):
        metric.update(first[start:start + batch], labels[start:start + batch])
    return metric.reduce().compute()


def jaccard(a, b):
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("ignore", [None, VOID])
def test_binary_iou_counted_by_hand(ignore):
    probs, labels = binary(void=0.2 if ignore else 0.)
    labels = labels if ignore else labels.clamp(max=1)
    predicted, actual, best = set(), set(), set()
    for i, (p, y) in enumerate(zip(probs.flatten(1).tolist(), labels.flatten(1).tolist())):
        pixels = [j for j in range(len(p)) if y[j] != ignore]
        predicted |= {(i, j) for j in pixels if p[j] > 0.5}
        actual |= {(i, j) for j in pixels if y[j] == 1}
        best |= {(i, max(pixels, key=lambda j: p[j]))} if pixels else set()
    assert not best <= predicted  # else the forced variant is not tested
    hits = len(predicted & actual)
    precision, recall = hits / len(predicted), hits / len(actual)
    assert measure(BinaryIoU(ignore), probs, labels) == pytest.approx({
        "iou": jaccard(predicted, actual), "f1": 2 * precision * recall / (precision + recall),
        "precision": precision, "recall": recall, "iou_forced": jaccard(predicted | best, actual)}, rel=1e-12)


def test_mean_iou_counted_by_hand():
    pred, labels = multiclass()
    pairs = [(p, y) for p, y in zip(pred.flatten().tolist(), labels.flatten().tolist()) if y != VOID]
    expected = {"acc": sum(p == y for p, y in pairs) / len(pairs)}
    for c in range(5):
        predicted, actual = ({k for k, pair in enumerate(pairs) if pair[side] == c} for side in (0, 1))
        expected[f"iou_{c}"] = jaccard(predicted, actual)
    expected["miou"] = sum(expected[f"iou_{c}"] for c in range(5)) / 5
    assert 0 < expected["acc"] < 1 and expected["iou_4"] == 0
    values = measure(MeanIoU(classes=5, ignore=VOID), pred, labels)
    assert values == pytest.approx(expected, rel=1e-12)
    # A class in neither labels nor predictions has no key and does not change the mean.
    assert measure(MeanIoU(classes=9, ignore=VOID), pred, labels) == values
    assert measure(BinaryIoU(ignore=VOID), (pred > 0).float(), labels.clamp(max=1).masked_fill(labels == VOID, VOID))[
        "iou"] == pytest.approx(measure(MeanIoU(2, VOID), pred.clamp(max=1), torch.where(
            labels == VOID, VOID, labels.clamp(max=1)))["iou_1"], rel=1e-12)


def test_the_score_comes_first():
    assert next(iter(BinaryIoU().compute())) == "iou"
    assert next(iter(MeanIoU(2).compute())) == "miou"


def values_of(probs, labels, **kwargs):
    metric = BinaryIoU(**kwargs)
    metric.update(torch.tensor(probs)[:, None], torch.tensor(labels)[:, None])
    return metric.compute()


def test_binary_iou_when_something_is_empty():
    none, some = [[0.1, 0.2]], [[0.1, 0.9]]
    everything_right = dict.fromkeys(("iou", "f1", "precision", "recall"), 1.)
    everything_wrong = dict.fromkeys(everything_right, 0.)
    assert values_of(none, [[0, 0]]) == {**everything_right, "iou_forced": 0.}
    assert values_of(none, [[0, 1]]) == {**everything_wrong, "iou_forced": 1.}
    assert values_of(some, [[0, 0]]) == {**everything_wrong, "iou_forced": 0.}
    assert values_of(some, [[VOID, VOID]], ignore=VOID) == {**everything_right, "iou_forced": 1.}
    assert BinaryIoU().compute() == {**everything_right, "iou_forced": 1.}
    assert MeanIoU(classes=2).compute() == {"miou": 1., "acc": 1.}


def test_the_forced_pixel():
    # Of ties one pixel only: with the positive itself or another, never all three.
    tie = values_of([[0.3, 0.3, 0.3]], [[1, 1, 1]])
    assert tie["iou_forced"] == pytest.approx(1 / 3) and tie["iou"] == 0
    # An ignored pixel is not the best one.
    assert values_of([[0.4, 0.3, 0.2]], [[VOID, 1, 0]], ignore=VOID)["iou_forced"] == 1
    assert values_of([[0.4, 0.3, 0.2]], [[0, 1, 0]])["iou_forced"] == 0
    # A pixel that is predicted anyway is not counted twice; each item has its own.
    assert values_of([[0.9, 0.1], [0.1, 0.3]], [[1, 0], [0, 1]])["iou_forced"] == 1


def test_threshold_is_exclusive_and_labels_are_positive_above_a_half():
    assert values_of([[0.5, 0.75]], [[1, 1]])["recall"] == 0.5
    assert values_of([[0.5, 0.75]], [[255, 255]])["recall"] == 0.5
    assert values_of([[0.5, 0.75]], [[0.4, 0.6]])["recall"] == 1


def test_a_negative_ignore_leaves_uint8_255_alone():
    metric = BinaryIoU(ignore=-1)
    metric.update(torch.ones(1, 2, 2), torch.full((1, 2, 2), 255, dtype=torch.uint8))
    assert metric.counts.max() == 4 and metric.compute()["recall"] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_counts_do_not_saturate_in_half_precision(dtype):
    metric = BinaryIoU()
    metric.update(torch.ones(1, 1, 300, 300, dtype=dtype), torch.ones(1, 300, 300, dtype=dtype))
    assert metric.counts.max() == 90000 and metric.compute() == dict.fromkeys(metric.compute(), 1.0)


@pytest.mark.parametrize("batch", [1, 4, 21])
def test_result_does_not_depend_on_the_batch_size(batch):
    probs, labels = binary()
    assert measure(BinaryIoU(ignore=VOID), probs, labels, batch) == measure(BinaryIoU(ignore=VOID), probs, labels, 8)
    pred, labels = multiclass()
    assert measure(MeanIoU(5, VOID), pred, labels, batch) == measure(MeanIoU(5, VOID), pred, labels, 8)


def test_wrong_input_is_named():
    probs, labels = torch.rand(2, 4, 6), torch.zeros(2, 4, 6, dtype=torch.long)
    for wrong in (labels.transpose(1, 2), labels[:1], labels[0]):
        with pytest.raises(ValueError, match=r"must both be \(B,H,W\)"):
            BinaryIoU().update(probs, wrong)
        with pytest.raises(ValueError, match="same shape"):
            MeanIoU(3).update(labels, wrong)
    with pytest.raises(ValueError, match=r"probs \(2, 3, 4, 6\)"):
        BinaryIoU().update(probs[:, None].expand(2, 3, 4, 6), labels[:, None])
    for value in (-1, 3, VOID):
        with pytest.raises(ValueError, match=f"labels reach from .*{value}.*outside 0 .. 2"):
            MeanIoU(3).update(labels, labels.index_fill(2, torch.tensor([1]), value))
        with pytest.raises(ValueError, match=f"predictions or labels reach from .*{value}"):
            MeanIoU(3).update(labels + value, labels)
        MeanIoU(3, ignore=value).update(labels, labels + value)


def shard(folder, rank, port, world=2):
    """A rank's unpadded share of 21 samples, and everything again on rank 0 alone: the other ranks have none."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.set_num_threads(1)
    result = {}
    for name, step in (("dealt", slice(rank, None, world)), ("rank 0 only", slice(0, None if rank == 0 else 0))):
        probs, labels = binary()
        result[name] = [measure(BinaryIoU(ignore=VOID), probs[step], labels[step])]
        pred, labels = multiclass()
        result[name].append(measure(MeanIoU(5, VOID), pred[step], labels[step]))
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(result, file)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path):
    two_ranks(shard, tmp_path, 120)
    alone = [measure(BinaryIoU(ignore=VOID), *binary()), measure(MeanIoU(5, VOID), *multiclass())]
    for rank in range(2):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        assert result == {"dealt": alone, "rank 0 only": alone}
    half = measure(BinaryIoU(ignore=VOID), *(t[::2] for t in binary()))
    assert half != alone[0]  # else a reduce that does nothing would pass


# ---- scores of samples -----------------------------------------------------------------------------------------------
def scenes(count=13, classes=3, void=True):
    """Blobs of several sizes, and predictions that miss some and add some: truth, predicted (count, 40, 40)."""
    rng = np.random.default_rng(2)
    truth, predicted = np.zeros((2, count, 40, 40), np.int64)
    for t, p in zip(truth, predicted):
        for _ in range(rng.integers(1, 7)):
            (y, x), (h, w), label = rng.integers(0, 36, 2), rng.integers(1, 12, 2), rng.integers(1, classes)
            t[y:y + h, x:x + w] = label
            if rng.random() < 0.8:
                dy, dx = rng.integers(0, 4, 2)
                p[y + dy:y + dy + h, x + dx:x + dx + w] = label if rng.random() < 0.9 else 1
    truth[3] = predicted[3] = 0
    truth[4] = 0
    predicted[5] = 0
    if void:
        truth[rng.random(truth.shape) < 0.05] = VOID
    return torch.from_numpy(truth), torch.from_numpy(predicted)


def reviewed(truth, predicted, batch=4, **kwargs):
    metric = SampleIoU(**kwargs)
    for start in range(0, len(truth), batch):
        part = slice(start, start + batch)
        metric.update(torch.arange(len(truth))[part], predicted[part], truth[part])
    return metric


def by_hand(truth, predicted, ignore):
    """[(right, predicted, actual)] of images, [(pixels, found, image)] of objects, by sets of (pixel, class)."""
    images, objects = [], []
    for i, (t, p) in enumerate(zip(truth.numpy().copy(), predicted.numpy().copy())):
        t[t == ignore], p[truth[i].numpy() == ignore] = 0, 0
        actual, guess = ({(y, x, a[y, x]) for y, x in zip(*np.nonzero(a))} for a in (t, p))
        images.append((len(actual & guess), len(guess), len(actual)))
        numbers = oracle(t)
        for k in range(1, numbers.max() + 1):
            own = {(y, x, t[y, x]) for y, x in zip(*np.nonzero(numbers == k))}
            objects.append((len(own), len(own & guess) / len(own) >= 0.5, i))
    return images, objects


@pytest.mark.parametrize("classes, void", [(2, False), (2, True), (4, True)])
def test_the_rows_of_samples(classes, void):
    truth, predicted = scenes(classes=classes, void=void)
    images, objects = by_hand(truth, predicted, VOID if void else None)
    names = [f"i{i}.png" for i in range(len(truth))]
    expected = [{"name": name, "score": r / (p + a - r) if p + a else 1.0, "area": a, "predicted": p,
                 "objects": sum(o[2] == i for o in objects), "found": sum(o[1] for o in objects if o[2] == i)}
                for i, (name, (r, p, a)) in enumerate(zip(names, images))]
    assert expected[3]["score"] == 1 and expected[4]["score"] == expected[5]["score"] == 0
    assert 0 < sum(o[1] for o in objects) < len(objects)
    for batch in (1, 4, 13):
        metric = reviewed(truth, predicted, batch, ignore=VOID if void else None)
        assert metric.samples(names) == expected


def test_masks_of_other_types_and_half_of_an_object():
    truth = torch.tensor([[[1, 1, 0, 1, 1, 1]]], dtype=torch.uint8)
    predicted = torch.tensor([[[1, 0, 0, 1, 0, 0]]], dtype=torch.bool)
    row, = reviewed(truth, predicted, ignore=-1).samples(["a"])
    assert row == {"name": "a", "score": 2 / 5, "area": 5, "predicted": 2, "objects": 2, "found": 1}
    for wrong in (truth[:, 0], truth[..., :5]):
        with pytest.raises(ValueError, match="must both be"):
            SampleIoU().update([0], predicted, wrong)
    with pytest.raises(ValueError):
        SampleIoU().update([0, 1], predicted, truth)


def test_ranks_are_gathered(monkeypatch):
    truth, predicted = scenes()
    names = [str(i) for i in range(13)]
    other = SampleIoU(VOID)
    other.update(torch.arange(7, 13), predicted[7:], truth[7:])
    own = SampleIoU(VOID)
    own.update(torch.arange(7).flip(0), predicted[:7].flip(0), truth[:7].flip(0))
    monkeypatch.setattr(ranks, "gather", lambda value: [other.images, value])
    whole = reviewed(truth, predicted, ignore=VOID)
    own.reduce()
    assert own.samples(names) == whole.samples(names)


def test_nothing_to_review():
    assert SampleIoU().reduce().samples([]) == []
    empty = torch.zeros(2, 4, 4)
    assert [row["score"] for row in reviewed(empty, empty).samples("ab")] == [1, 1]


# ---- classification ------------------------------------------------------------------------------------------------

def test_average_precisions_is_scikit_learns():
    from sklearn.metrics import average_precision_score
    rng = np.random.default_rng(0)
    for n, digits in ((1, 3), (7, 1), (60, 1), (400, 4)):  # with and without ties
        scores, labels = rng.random((n, 5)).round(digits), rng.random((n, 5)) < 0.4
        labels[0, :4] = True
        labels[:, 4] = False
        found = average_precisions(scores, labels)
        want = [average_precision_score(labels[:, c], scores[:, c]) for c in range(4)]
        np.testing.assert_allclose(found[:4], want, rtol=1e-12)
        assert np.isnan(found[4])


def test_labels_by_hand():
    metric = Accuracy(3)
    metric.update(torch.tensor([[.9, .2, .6], [.1, .8, .4]]), torch.tensor([[1., 0, 0], [0, 1, 0]]), torch.arange(2))
    metric.update(torch.tensor([[.3, .7, .5]]), torch.tensor([[1., 1, 0]]), torch.arange(2, 3))
    scores = metric.reduce().compute()
    assert scores == pytest.approx({"acc": 7 / 9, "exact": 1 / 3, "map": 1.0})
    assert [c["images"] for c in metric.per_class()] == [2, 2, 0]
    assert metric.per_class()[0]["acc"] == pytest.approx(2 / 3)
    unsure = Accuracy(3, single_label=True)
    unsure.update(torch.tensor([[0.4, 0.3, 0.3]] * 4), torch.tensor([[1, 0, 0]] * 4), torch.arange(4))
    assert unsure.compute()["acc"] == 1 and [row["acc"] for row in unsure.per_class()] == [1, 1, 1]
    one = Accuracy(3, single_label=True)
    one.update(torch.tensor([[.4, .3, .3], [.2, .3, .5], [.1, .8, .1]]), torch.eye(3)[[0, 2, 2]], torch.arange(3))
    assert one.compute()["acc"] == pytest.approx(2 / 3)
    assert np.isnan(Accuracy(3).compute()["acc"])
    with pytest.raises(ValueError):
        Accuracy(3).update(torch.zeros(2, 3), torch.zeros(2, 4), torch.arange(2))


# ---- thresholds ------------------------------------------------------------------------------------------------------
def best_by_trial(scores, labels):
    """-> most hits of any threshold 0..1 (all scores, their neighbours and both ends are tried)."""
    tried = {0.0, 1.0, 0.5, *scores, *(float(np.nextafter(s, 0)) for s in scores if s > 0)}
    return max(sum((s > t) == (y == 1) for s, y in zip(scores, labels)) for t in tried)


@pytest.mark.parametrize("seed, digits", [(0, None), (1, 1), (2, 2), (3, 0), (4, 1)])
def test_thresholds_are_the_best_of_all(seed, digits):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (40, 6)) > 0
    probs = 1 / (1 + np.exp(-rng.normal(2 * labels - 1, 1.5)))
    probs = probs if digits is None else probs.round(digits)
    found = fit_thresholds(probs, labels)
    assert found.shape == (6,) and ((0 <= found) & (found <= 1)).all()
    for c, t in enumerate(found):
        most = best_by_trial(probs[:, c].tolist(), labels[:, c].tolist())
        assert ((probs[:, c] > t) == (labels[:, c])).sum() == most
        if ((probs[:, c] > 0.5) == (labels[:, c])).sum() == most:
            assert t == 0.5
    assert ((probs > found) == labels).sum() >= ((probs > 0.5) == labels).sum()


@pytest.mark.parametrize("scores, labels, threshold", [
    ([0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1], 0.25),
    ([0.4, 0.3, 0.2, 0.1], [1, 1, 0, 0], 0.25),
    ([0.6, 0.7, 0.8, 0.9], [0, 0, 0, 1], 0.85),
    ([0.6, 0.7, 0.8, 0.9], [0, 0, 0, 0], 0.95),  # none: between the highest and 1
    ([0.2, 0.3, 0.4, 0.3], [1, 1, 1, 1], 0.1),   # all: between 0 and the lowest
    ([0.3, 0.4, 0.6, 0.9], [0, 0, 1, 1], 0.5),   # the default, though not in the middle of (0.4, 0.6) alone
    ([0.1, 0.2, 0.7, 0.8], [0, 1, 1, 1], 0.15),
    ([0.1, 0.2, 0.3, 0.4], [0, 1, 0, 1], 0.35),  # 0.15 and 0.35 are as good: nearest to 0.5
    ([0.6, 0.7, 0.8, 0.9], [0, 1, 0, 1], 0.65),
    ([0.1, 0.2, 0.3, 0.4], [1, 0, 1, 0], 0.5),   # all, none and two others are as good as the default
    ([0.3, 0.3, 0.3, 0.4], [1, 0, 0, 1], 0.35),  # equal scores go together
    ([1.0, 1.0, 0.6], [1, 1, 0], 0.8),
    ([1.0, 1.0, 1.0, 0.9], [0, 0, 0, 0], 1.0),
    ([0.0, 0.0, 0.1, 0.2], [1, 1, 0, 0], 0.5)])
def test_thresholds_that_are_known(scores, labels, threshold):
    found = fit_thresholds(np.array(scores)[:, None], np.array(labels)[:, None] > 0)
    assert found == pytest.approx([threshold], abs=1e-12)


def test_neighbouring_numbers_are_kept_apart():
    for low in (0.3, 0.7, 1 - 2**-53):
        scores = np.array([low, np.nextafter(low, 2)])[:, None]
        for labels in ([[0], [1]], [[1], [1]], [[0], [0]]):
            found = fit_thresholds(scores, np.array(labels) > 0)
            assert ((scores > found) == labels).all() or labels == [[1], [1]] and low < 0.5


def test_thresholds_of_no_images():
    assert fit_thresholds(np.zeros((0, 3)), np.zeros((0, 3), bool)).tolist() == [0.5] * 3
