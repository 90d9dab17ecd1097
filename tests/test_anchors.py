"""utils/ops/anchors.py against plain loops, known clusters and boxes that the given anchors do not fit."""
import numpy as np
import pytest

from nets.yolo import ANCHORS
from utils.ops.anchors import auto, kmeans, recall, side_ratios

ANCHORS_P5, ANCHORS_P6 = (np.array(ANCHORS[kind], np.float32) for kind in "56")


def sizes(n=500, middle=3., spread=0.8, seed=0):
    return np.exp(np.random.default_rng(seed).normal(middle, spread, (n, 2)))


def ratios(anchors, wh):
    """For each box the list over anchors of the worst of its two side ratios, small over large."""
    return [[min(min(w / a, a / w), min(h / b, b / h)) for a, b in anchors.reshape(-1, 2).tolist()]
            for w, h in wh.tolist()]


def test_the_published_anchors():
    assert ANCHORS_P5.shape == (3, 3, 2) and ANCHORS_P6.shape == (4, 3, 2)
    assert ANCHORS_P5.dtype == ANCHORS_P6.dtype == np.float32
    assert ANCHORS_P5.sum() == 10 + 13 + 16 + 30 + 33 + 23 + 30 + 61 + 62 + 45 + 59 + 119 + 116 + 90 + 156 + 198 + 699
    assert ANCHORS_P6.sum() == 19 + 27 + 44 + 40 + 38 + 94 + 96 + 68 + 86 + 152 + 180 + 137 + 140 + 301 + 303 + 264 + (
        238 + 542 + 436 + 615 + 739 + 380 + 925 + 792)
    for anchors in (ANCHORS_P5, ANCHORS_P6):
        assert (np.diff(anchors.prod(2).mean(1)) > 0).all()  # the finest level first


@pytest.mark.parametrize("threshold", [4.0, 2.91, 1.5])
def test_recall_box_by_box(threshold):
    wh = sizes(middle=2.5)
    fits = [[x > 1 / threshold for x in r] for r in ratios(ANCHORS_P5, wh)]
    expected = np.mean([any(f) for f in fits]), np.mean([sum(f) for f in fits])
    assert 0.1 < expected[0] < 0.99
    assert recall(ANCHORS_P5, wh, threshold) == pytest.approx(expected, rel=1e-9)


def test_recall_at_its_edges():
    anchors = np.array([[10., 20]])
    assert recall(anchors, [[10, 20]]) == (1, 1)
    assert recall(anchors, [[40, 20]]) == (0, 0) and recall(anchors, [[39, 20]])[0] == 1  # exclusive, as the loss
    assert side_ratios(anchors, [[40, 20], [10, 5]]).tolist() == [[0.25, 0.25]]
    assert recall(anchors, [[10, 5.1]])[0] == 1 and recall(anchors, [[10, 4.9]])[0] == 0
    assert recall(anchors, [[0, 20], [0, 0]]) == (0, 0)
    assert recall(anchors, np.zeros((0, 2))) == (0, 0)


def test_kmeans_finds_known_clusters():
    centres = np.array([[10., 40], [12, 400], [80, 60], [200, 50], [220, 500]])
    wh = (centres[:, None] * np.random.default_rng(0).normal(1, 0.02, (5, 60, 2))).reshape(-1, 2)
    for seed in range(5):
        found = kmeans(wh, 5, rng=np.random.default_rng(seed))
        found = found[np.lexsort((found[:, 1], found[:, 0].round(-1)))]
        expected = wh.reshape(5, 60, 2).mean(1)
        np.testing.assert_allclose(found, expected[np.lexsort((expected[:, 1], expected[:, 0].round(-1)))], rtol=1e-6)


def test_kmeans_weighs_both_sides_alike():
    # two clusters by height in steps of 1, while the width spreads over a thousand: only whitened data shows them
    rng = np.random.default_rng(0)
    wh = np.stack((rng.uniform(1000, 2000, 400), 1 + np.arange(400) % 2 * 1.0), 1)
    found = kmeans(wh, 2, rng=rng)
    assert sorted(found[:, 1].round(6)) == [1, 2] and np.ptp(found[:, 0]) < 100


def test_kmeans_is_a_fixed_point():
    wh = sizes()
    centres = kmeans(wh, 9, rng=np.random.default_rng(0), iterations=300)
    points, middles = wh / wh.std(0), centres / wh.std(0)
    member = np.array([min(range(9), key=lambda k: np.hypot(*(p - middles[k]))) for p in points])
    np.testing.assert_allclose(centres, [wh[member == k].mean(0) for k in range(9)], rtol=1e-9)


def test_a_cluster_of_one_box_moves_to_it():
    wh = np.array([[10., 5], [20, 5], [45, 5]])  # from 10 and 20, the second centre goes by 32.5
    for seed in range(100):
        assert sorted(kmeans(wh, 2, rng=np.random.default_rng(seed)).round(9).tolist()) == [[15, 5], [45, 5]]


@pytest.mark.parametrize("wh", [[[7., 9]], [[7., 9]] * 20, [[7., 9], [70, 90]], [[7., 9], [7, 90], [7, 9]]])
def test_kmeans_of_few_different_boxes(wh):
    centres = kmeans(np.array(wh), 9, rng=np.random.default_rng(0))
    assert centres.shape == (9, 2)
    assert {tuple(c) for c in centres.round(6).tolist()} == {tuple(b) for b in wh}


@pytest.mark.parametrize("anchors", [ANCHORS_P5, ANCHORS_P6])
@pytest.mark.parametrize("factor", [0.1, 150])
def test_auto_for_tiny_and_for_huge_objects(anchors, factor):
    wh = sizes(2000, spread=0.5) * factor
    wh = wh[wh.max(1) >= 2]
    new, line = auto(wh, anchors)
    old_recall, new_recall = recall(anchors, wh), recall(new, wh)
    assert old_recall[0] < 0.7 and new_recall[0] > 0.98
    assert new.shape == anchors.shape and new.dtype == np.float32
    assert (np.diff(new.reshape(-1, 2).prod(1)) >= 0).all()
    assert line.startswith("anchors changed") and "\n" not in line
    for share, per_box in (old_recall, new_recall):
        assert f"{share:.4f}" in line and f"{per_box:.2f} anchors per box" in line
    again, same_line = auto(wh, anchors)
    assert np.array_equal(new, again) and line == same_line
    assert not np.array_equal(new, auto(wh, anchors, seed=1)[0])


@pytest.mark.parametrize("spread", [0.8, 1.0])
def test_auto_fits_sizes_of_all_magnitudes(spread):
    wh = sizes(3000, spread=spread) * 0.1
    plain = kmeans(wh[wh.max(1) >= 2], 9, rng=np.random.default_rng(0))
    new = recall(auto(wh, ANCHORS_P5)[0], wh[wh.max(1) >= 2])[0]
    assert new > 0.97 and new > recall(plain, wh[wh.max(1) >= 2])[0] + 0.01


def test_auto_keeps_what_fits():
    wh = sizes(1000, middle=4., spread=0.4)
    kept, line = auto(wh, ANCHORS_P5)
    assert np.array_equal(kept, ANCHORS_P5) and line.startswith("anchors kept: best possible recall 1.0000, ")
    assert kept is not ANCHORS_P5
    wh = sizes(1000, middle=6., spread=0.6)
    share = recall(ANCHORS_P5, wh)[0]
    assert 0.9 < share < 0.98
    for enough, word in ((share - 0.001, "kept"), (share + 0.001, "changed")):
        assert auto(wh, ANCHORS_P5, enough=enough)[1].startswith(f"anchors {word}")


def test_auto_keeps_what_it_cannot_better():
    wh = np.tile([[2., 1000], [1000, 2], [20, 20]], (10, 1))
    good = np.array([[[2., 1000], [20, 20], [1000, 2]]] * 3)  # a recall of 1 that is not yet enough
    kept, line = auto(wh, good, enough=1.0)
    assert np.array_equal(kept, good) and line.startswith("anchors kept: best possible recall 1.0000")


def test_auto_uses_the_threshold():
    wh = ANCHORS_P5.reshape(-1, 2) * 1.9
    assert auto(wh, ANCHORS_P5, threshold=2.)[1].startswith("anchors kept")
    assert auto(wh, ANCHORS_P5, threshold=1.2)[1].startswith("anchors changed")


def test_auto_without_boxes_and_with_strange_ones():
    for wh in (np.zeros((0, 2)), np.zeros((5, 2)), [[1.9, 1.9]], [[np.nan, 5], [np.inf, 5], [-3, -3], [0, 50]]):
        kept, line = auto(wh, ANCHORS_P6)
        assert np.array_equal(kept, ANCHORS_P6) and line == "anchors kept: best possible recall 0.0000, 0.00 anchors per box (0 boxes)"
    specks = np.full((500, 2), 1.5)  # they would drown the rest
    wh = sizes(100, middle=4., spread=0.4)
    assert auto(np.concatenate((specks, wh)), ANCHORS_P5)[1] == auto(wh, ANCHORS_P5)[1]
    assert auto([[1.9, 2.1]], ANCHORS_P5)[1].startswith("anchors changed")  # 2 px in one side is enough
    for wh in ([[2000., 3]], [[2000., 3]] * 50, [[2000., 3], [3, 2000]]):  # one box, the same one often, two
        new, _ = auto(wh, ANCHORS_P5)
        assert recall(new, wh) == pytest.approx((1, 9 / len(set(map(tuple, wh)))), abs=0.6)
        assert recall(new, wh)[0] == 1 and np.isfinite(new).all()
