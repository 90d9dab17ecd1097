"""utils/ops/components.py against OpenCV."""
import cv2
import numpy as np
import pytest
import torch

from utils.ops.components import components


def spiral(side):
    """A path one pixel wide that winds from the corner to the middle."""
    mask, position, step = np.zeros((side, side), np.uint8), np.array([0, 0]), np.array([0, 1])

    def inside(p):
        return (p >= 0).all() and (p < side).all()

    for _ in range(4 * side):
        while inside(position + step) and not (inside(position + 2 * step) and mask[tuple(position + 2 * step)]):
            mask[tuple(position)] = 1
            position = position + step
        mask[tuple(position)] = 1
        step = np.array([step[1], -step[0]])
    return mask


def masks():
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (1, 9), (9, 1), (2, 2), (40, 33)):
        for density in (0, 0.1, 0.3, 0.4, 0.5, 0.9, 1):
            yield (rng.random((height, width)) < density).astype(np.uint8)
    yield spiral(61)
    yield spiral(61).T[::-1].copy()
    yield np.eye(30, dtype=np.uint8)[::-1].copy()


def in_order(numbers):
    """The same components, numbered in the order of their first pixels."""
    numbers = np.array(numbers)
    _, first, inverse = np.unique(numbers[numbers > 0], return_index=True, return_inverse=True)
    assert sorted(set(numbers[numbers > 0].tolist())) == list(range(1, len(first) + 1))
    numbers[numbers > 0] = first.argsort().argsort()[inverse] + 1
    return numbers


def oracle(labels):
    """Components of every label by OpenCV, numbered in the order of their first pixels."""
    joined, count = np.zeros(labels.shape, int), 0
    for label in np.unique(labels[labels > 0]):
        n, numbers = cv2.connectedComponents((labels == label).astype(np.uint8), connectivity=8)
        joined[numbers > 0] = numbers[numbers > 0] + count
        count += n - 1
    return in_order(joined)


@pytest.mark.parametrize("mask", list(masks()), ids=lambda m: f"{m.shape}-{m.mean():.2f}")
def test_components_are_opencvs(mask):
    assert in_order(components(torch.from_numpy(mask))).tolist() == oracle(mask).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_components_of_several_labels(seed):
    labels = np.random.default_rng(seed).integers(-1, 4, (24, 31)).repeat(2, 1)
    found = components(torch.from_numpy(labels))
    assert found.dtype == torch.int64 and in_order(found).tolist() == oracle(labels).tolist()
    turned = components(torch.from_numpy(labels).T.contiguous().T)  # another memory order
    assert torch.equal(turned, found)
    assert (in_order(components(torch.from_numpy(labels > 1))) == oracle((labels > 1).astype(np.uint8))).all()


def test_winding_components():
    for mask in (spiral(121), np.ones((200, 200)), np.random.default_rng(0).random((200, 200)) < 0.41):
        mask = mask.astype(np.uint8)
        assert np.array_equal(in_order(components(torch.from_numpy(mask))), oracle(mask))
