"""utils/metrics against pixel-by-pixel counting, over batch splits and over processes."""
import json
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from utils.metrics import Accuracy, BinaryIoU, MeanIoU, average_precisions

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


@pytest.mark.parametrize("threshold", [0.25, 0.5])
@pytest.mark.parametrize("ignore", [None, VOID])
def test_binary_iou_counted_by_hand(threshold, ignore):
    probs, labels = binary(void=0.2 if ignore else 0.)
    labels = labels if ignore else labels.clamp(max=1)
    predicted, actual, best = set(), set(), set()
    for i, (p, y) in enumerate(zip(probs.flatten(1).tolist(), labels.flatten(1).tolist())):
        pixels = [j for j in range(len(p)) if y[j] != ignore]
        predicted |= {(i, j) for j in pixels if p[j] > threshold}
        actual |= {(i, j) for j in pixels if y[j] == 1}
        best |= {(i, max(pixels, key=lambda j: p[j]))} if pixels else set()
    assert not best <= predicted  # else the forced variant is not tested
    hits = len(predicted & actual)
    precision, recall = hits / len(predicted), hits / len(actual)
    assert measure(BinaryIoU(threshold, ignore), probs, labels) == pytest.approx({
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


def test_the_fitness_comes_first():
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
    assert metric.counts[:3].tolist() == [4, 4, 4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_counts_do_not_saturate_in_half_precision(dtype):
    metric = BinaryIoU()
    metric.update(torch.ones(1, 1, 300, 300, dtype=dtype), torch.ones(1, 300, 300, dtype=dtype))
    assert metric.counts[:5].tolist() == [90000] * 5 and metric.counts.max() == 90000


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
        BinaryIoU().update(probs[:, None].expand(2, 3, 4, 6), labels[:, None].expand(2, 3, 4, 6))
    for value in (-1, 3, VOID):
        with pytest.raises(ValueError, match=f"labels reach from .*{value}.*outside 0 .. 2"):
            MeanIoU(3).update(labels, labels.index_fill(2, torch.tensor([1]), value))
        with pytest.raises(ValueError, match="predictions reach"):
            MeanIoU(3).update(labels + value, labels)
        MeanIoU(3, ignore=value).update(labels, labels + value)


def shard(rank, world, folder):
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


def test_two_ranks_equal_one_process(tmp_path):
    mp.spawn(shard, (2, str(tmp_path)), nprocs=2)
    alone = [measure(BinaryIoU(ignore=VOID), *binary()), measure(MeanIoU(5, VOID), *multiclass())]
    for rank in range(2):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        assert result == {"dealt": alone, "rank 0 only": alone}
    half = measure(BinaryIoU(ignore=VOID), *(t[::2] for t in binary()))
    assert half != alone[0]  # else a reduce that does nothing would pass


# ---- classification ----

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
    metric.update(torch.tensor([[.9, .2, .6], [.1, .8, .4]]), torch.tensor([[1., 0, 0], [0, 1, 0]]))
    metric.update(torch.tensor([[.3, .7, .5]]), torch.tensor([[1., 1, 0]]))
    scores = metric.reduce().compute()
    assert scores == pytest.approx({"acc": 7 / 9, "exact": 1 / 3, "map": 1.0})
    assert [c["images"] for c in metric.per_class()] == [2, 2, 0]
    assert metric.per_class()[0]["acc"] == pytest.approx(2 / 3)
    unsure = Accuracy(3, exclusive=True)
    unsure.update(torch.tensor([[0.4, 0.3, 0.3]] * 4), torch.tensor([[1, 0, 0]] * 4))
    assert unsure.compute()["acc"] == 1 and [row["acc"] for row in unsure.per_class()] == [1, 1, 1]
    one = Accuracy(3, exclusive=True)
    one.update(torch.tensor([[.4, .3, .3], [.2, .3, .5], [.1, .8, .1]]), torch.eye(3)[[0, 2, 2]])
    assert one.compute()["acc"] == pytest.approx(2 / 3)
    assert np.isnan(Accuracy(3).compute()["acc"])
    with pytest.raises(ValueError):
        Accuracy(3).update(torch.zeros(2, 3), torch.zeros(2, 4))
