"""Anchors, the box sizes from which an anchor-based detector starts: how good they are for a data set, better ones.

Sizes are width, height in pixels as the net sees them (k-means anchors: Redmon & Farhadi 2017, YOLO9000).
"""
import numpy as np


def recall(anchors, wh, threshold=4.0):
    """How well anchors (..., 2) suit boxes wh (N, 2): what a loss that matches by side ratios can learn from.

    -> (best possible recall: the share of boxes with an anchor within the factor `threshold` in both sides, the mean
    number of such anchors per box, the mean ratio 0 .. 1 of a box to its best anchor). No boxes: all 0.
    """
    anchors, wh = np.asarray(anchors, np.float64).reshape(-1, 2), np.asarray(wh, np.float64).reshape(-1, 2)
    if not len(wh):
        return 0.0, 0.0, 0.0
    ratios = (np.minimum(wh[:, None], anchors) / np.maximum(wh[:, None], anchors)).min(2)
    fits, best = ratios > 1 / threshold, ratios.max(1)
    return float(fits.any(1).mean()), float(fits.sum(1).mean()), float(best.mean())


def kmeans(wh, n, *, rng, iterations=30):
    """n cluster centres (n, 2) of boxes wh (N, 2), N > 0, by k-means on sizes divided by their standard deviation.

    Starts from k-means++ (Arthur & Vassilvitskii 2007). With fewer than n different boxes some centres are equal.
    """
    wh = np.asarray(wh, np.float64).reshape(-1, 2)
    std = wh.std(0)
    std[std == 0] = 1
    points = wh / std
    centres = points[rng.integers(len(points), size=1)]
    nearest = np.full(len(points), np.inf)  # squared distance to the nearest centre so far
    while len(centres) < n:
        nearest = np.minimum(nearest, ((points - centres[-1]) ** 2).sum(1))
        total = nearest.sum()
        pick = rng.choice(len(points), p=nearest / total if total else None)
        centres = np.concatenate((centres, points[pick, None]))
    for _ in range(iterations):
        # |p - c|^2 without |p|^2, which is the same for all centres
        member = ((centres ** 2).sum(1) - 2 * points @ centres.T).argmin(1)
        counts = np.bincount(member, minlength=n)
        sums = np.stack([np.bincount(member, points[:, side], minlength=n) for side in (0, 1)], 1)
        centres = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centres)
    return centres * std


def fitness(anchors, wh, threshold=4.0):
    """The mean over boxes wh (N, 2) of the ratio to the best anchor (..., 2), 0 where not even that one fits."""
    return _fitness(*_logs(anchors, wh), threshold)


def _logs(*sizes):
    return [np.log(np.asarray(s, np.float32).reshape(-1, 2)).T[..., None] for s in sizes]


def _fitness(anchors, wh, threshold):
    """In logarithms (2, n, 1), where ratios are differences: 1,000 generations then take a second, not ten."""
    width, height = (np.abs(wh[side, :, 0] - anchors[side]) for side in (0, 1))
    best = np.exp(-np.maximum(width, height).min(0))
    return float((best * (best > 1 / threshold)).mean(dtype=np.float64))


def evolve(anchors, wh, *, rng, generations=1000, threshold=4.0, sample=10000):
    """Anchors (..., 2) improved for boxes wh (N, 2), N > 0, sides > 0: random changes that raise the fitness stay.

    Each side is changed with probability 0.9, by a factor 1 + 0.1 x normal within 0.3 .. 3. Of more than `sample` boxes
    so many are drawn; the result is never worse than the given anchors on all of them.
    """
    anchors, wh = np.asarray(anchors, np.float64), np.asarray(wh, np.float64).reshape(-1, 2)
    few = wh if len(wh) <= sample else wh[rng.choice(len(wh), sample, replace=False)]
    new, (logs, few) = anchors, _logs(anchors, few)
    best = _fitness(logs, few, threshold)
    for _ in range(generations):
        change = rng.standard_normal(anchors.shape) * (rng.random(anchors.shape) < 0.9)
        changed = new * (1 + 0.1 * change).clip(0.3, 3)
        value = _fitness(_logs(changed)[0], few, threshold)
        if value > best:
            new, best = changed, value
    return new if fitness(new, wh, threshold) >= fitness(anchors, wh, threshold) else anchors


def auto(wh, anchors, *, threshold=4.0, seed=0, enough=0.98):
    """-> (anchors (levels, 3, 2) float32, a line that tells what was done and why).

    wh (N, 2): box sizes in pixels as the net sees them (scaled to its image size); those below 2 px in both sides, and
    those without area, are left out. anchors (levels, 3, 2) are kept if their best possible recall is above `enough`,
    or if k-means and evolution find none with a higher one. New ones are sorted by area: the small to the fine levels.
    """
    anchors, wh = np.array(anchors, np.float32), np.asarray(wh, np.float64).reshape(-1, 2)
    wh = wh[np.isfinite(wh).all(1) & (wh.max(1) >= 2) & (wh.min(1) > 0)]
    if not len(wh):
        return anchors, "anchors kept: there are no boxes to compare them with"
    share, per_box, _ = recall(anchors, wh, threshold)
    before = f"best possible recall {share:.4f}, {per_box:.2f} anchors per box"
    if share > enough:
        return anchors, f"anchors kept: {before}; {_text(anchors)}"
    rng = np.random.default_rng(seed)
    new = evolve(kmeans(wh, anchors.size // 2, rng=rng), wh, rng=rng, threshold=threshold)
    new = new[np.argsort(new.prod(1), kind="stable")].reshape(anchors.shape).astype(np.float32)
    new_share, new_per_box, _ = recall(new, wh, threshold)
    if new_share <= share:
        return anchors, f"anchors kept: {before}, and new ones reach only {new_share:.4f}; {_text(anchors)}"
    return new, (f"anchors changed: best possible recall {share:.4f} -> {new_share:.4f}, {per_box:.2f} -> "
                 f"{new_per_box:.2f} anchors per box; {_text(new)}")


def _text(anchors):
    return " / ".join(" ".join(f"{w:.4g},{h:.4g}" for w, h in level) for level in anchors)
