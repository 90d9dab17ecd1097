"""utils/ops/tiles.py against full-size sums in float64, on many sizes of scene and window."""
import math

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from utils.ops import tiles

overlaps = st.floats(0, 0.9)


def thorough(count):
    return settings(max_examples=count, deadline=None, derandomize=True, database=None,
                    suppress_health_check=[HealthCheck.filter_too_much])


def cut(scene, swaths, tile):
    """The scene's windows, as a net would get them."""
    size = min(tile, scene.shape[1]), min(tile, scene.shape[2])
    for y, x in tiles.windows(swaths):
        window = scene[:, y:y + size[0], x:x + size[1]]
        assert window.shape[1:] == size  # no window reaches beyond the scene
        yield window.clone()


def assemble(blocks, shape):
    """The merged blocks in their places, and how often each pixel came."""
    scene, times = torch.full(shape, float("nan")), torch.zeros(shape[1:])
    for y, x, block in blocks:
        height, width = block.shape[1:]
        assert block.shape[0] == shape[0] and y + height <= shape[1] and x + width <= shape[2]
        scene[:, y:y + height, x:x + width] = block
        times[y:y + height, x:x + width] += 1
    return scene, times


@thorough(1000)
@given(st.integers(1, 3000), st.integers(1, 300), st.one_of(overlaps, st.sampled_from([0, 0.25, 0.5, 0.7])))
def test_starts(length, tile, overlap):
    first = tiles.starts(length, tile, overlap)
    if length <= tile:
        assert first == [0]
        return
    assert first[0] == 0 and first[-1] == length - tile
    gaps = [b - a for a, b in zip(first, first[1:])]
    assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1  # evenly spread
    shared = [min(math.ceil(tile * overlap + e), tile - 1) for e in (-1e-9, 1e-9)]
    assert tile - max(gaps) >= shared[0]  # and thereby everything is covered
    if len(first) > 2:  # one window fewer would not do
        assert math.ceil((length - tile) / (len(first) - 2)) > tile - shared[1]


@pytest.mark.parametrize("length, tile, overlap, expected", [
    (256, 256, 0.5, [0]), (100, 256, 0.5, [0]), (257, 256, 0, [0, 1]), (512, 256, 0, [0, 256]),
    (512, 256, 0.5, [0, 128, 256]), (600, 256, 0.25, [0, 172, 344]), (20, 10, 0.9, list(range(11))),
    (22, 20, 0.9, [0, 2]), (10, 3, 0.5, list(range(8)))])
def test_starts_by_hand(length, tile, overlap, expected):
    assert tiles.starts(length, tile, overlap) == expected


def test_weights():
    w = tiles.weights(5, 8).double()
    for i in range(5):
        for j in range(8):
            rows, columns = math.sin(math.pi * (i + 0.5) / 5) ** 2, math.sin(math.pi * (j + 0.5) / 8) ** 2
            assert w[i, j] == pytest.approx(max(rows, 1e-3) * max(columns, 1e-3), rel=1e-5)
    assert tiles.weights(1, 1).tolist() == [[1]] and tiles.weights(1024, 1024).min() == pytest.approx(1e-6)


SCENES = dict(height=st.integers(1, 200), width=st.integers(1, 200), tile=st.integers(16, 64), overlap=overlaps,
              swath=st.integers(1, 150))


@thorough(80)
@given(**SCENES)
@example(height=200, width=199, tile=16, overlap=0.5, swath=60)
@example(height=57, width=200, tile=37, overlap=0.9, swath=50)
def test_windows_of_a_scene_give_the_scene(height, width, tile, overlap, swath):
    swaths = tiles.plan(height, width, tile, overlap, swath)
    assume(len(tiles.windows(swaths)) < 1500)
    assert all(x < end and x + min(tile, width) > first for first, end, _, xs in swaths for x in xs)  # none in vain
    scene = torch.rand(2, height, width, generator=torch.Generator().manual_seed(0))
    scene[1] = 0.7  # a constant stays constant
    merged, times = assemble(tiles.stitch(swaths, cut(scene, swaths, tile), height), scene.shape)
    assert (times == 1).all()
    assert (merged - scene).abs().max() <= (2e-6 if overlap > 0.8 else 1e-6)  # float32 sums of 150 windows


@thorough(25)
@given(**SCENES)
@example(height=199, width=200, tile=37, overlap=0.7, swath=50)
def test_merge_is_the_weighted_mean(height, width, tile, overlap, swath):
    """Windows that contradict each other, against sums over the whole scene; cutting into swaths changes nothing."""
    swaths = tiles.plan(height, width, tile, overlap, swath)
    assume(len(tiles.windows(swaths)) < 800)
    h, w = min(tile, height), min(tile, width)
    places = sorted(set(tiles.windows(swaths)))
    assert places == [(y, x) for y in tiles.starts(height, tile, overlap) for x in tiles.starts(width, tile, overlap)]
    g = torch.Generator().manual_seed(0)
    maps = {place: torch.rand(1, h, w, generator=g) for place in places}
    total, weight = torch.zeros(2, height, width, dtype=torch.float64)
    for (y, x), values in maps.items():
        total[y:y + h, x:x + w] += values[0] * tiles.weights(h, w).double()
        weight[y:y + h, x:x + w] += tiles.weights(h, w)
    merged, times = assemble(tiles.stitch(swaths, (maps[p] for p in tiles.windows(swaths)), height), (1, height, width))
    assert (times == 1).all()
    assert (merged[0] - total / weight).abs().max() < 1e-5


def test_windows_are_asked_for_in_order_and_each_once():
    """A window in two swaths is made twice; none is made in advance."""
    asked = []

    def maps():
        for place in tiles.windows(swaths):
            asked.append(place)
            yield torch.ones(1, 16, 16)

    swaths = tiles.plan(40, 60, 16, 0.5, swath=20)
    assert [(first, end) for first, end, *_ in swaths] == [(0, 20), (20, 40), (40, 60)]
    blocks = tiles.stitch(swaths, maps(), 40)
    assert next(blocks)[:2] == (0, 0) and asked == [(0, x) for x in swaths[0][3]]
    list(blocks)
    assert asked == tiles.windows(swaths) and len(set(asked)) < len(asked)
    for first, end, ys, xs in swaths:
        assert all(x < end and x + 16 > first for x in xs) and ys == tiles.starts(40, 16, 0.5)


class Largest(TorchDispatchMode):
    """Remembers the most elements of any tensor made inside."""
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return result


def test_memory_does_not_grow_with_the_scene():
    bands, tile, swath = 3, 16, 40
    peaks = []
    for height, width in ((150, 150), (900, 150), (150, 900)):
        swaths = tiles.plan(height, width, tile, 0.25, swath)
        values = torch.ones(bands, tile, tile)
        with Largest() as largest:
            area = sum(block[0].numel() for _, _, block in tiles.stitch(swaths, (values for _ in tiles.windows(swaths)),
                                                                       height))
        assert area == height * width
        peaks.append(largest.elements)
    assert max(peaks) <= (bands + 1) * tile * (swath + 2 * tile) and max(peaks) < 1.3 * min(peaks)
