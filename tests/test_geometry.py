"""utils/ops/geometry.py and data/augment/__init__.py against numpy's pad, flip and rot90 and against a pixel loop."""
import math
from collections import Counter

import numpy as np
import pytest
import torch

from tests.conftest import WILDFIRE, Augmentation, warp_points
from utils.ops.geometry import flip_h, flip_v, rot90, rotate, scale, translate, warp, warp_boxes

BORDERS = ("constant", "reflect", "wrap")
DTYPES = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64, torch.bool, torch.float16,
          torch.bfloat16, torch.float32, torch.float64)


def image(*shape, seed=0, dtype=torch.float32):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype) if dtype.is_floating_point else (x * (2 if dtype == torch.bool else 100)).to(dtype)


def general(seed, height, width, shear=True):
    """A random rotation, zoom, shear and shift about the centre."""
    rng = np.random.default_rng(seed)
    matrix = rotate(rng.uniform(-180, 180)) @ scale(*rng.uniform(0.7, 1.4, 2)) @ translate(-width / 2, -height / 2)
    if shear:
        matrix = np.array([[1, rng.uniform(-0.3, 0.3), 0], [0, 1, 0], [0, 0, 1]]) @ matrix
    return translate(*(np.array([width, height]) / 2 + rng.uniform(-2, 2, 2))) @ matrix


# ---- matrices -------------------------------------------------------------------------------------------------------

def test_matrices_do_what_their_names_say():
    p = [(2.0, 3.0), (0.0, 0.0)]
    for matrix, expected in ((translate(5, -1), [(7, 2), (5, -1)]), (scale(2, 3), [(4, 9), (0, 0)]),
                             (rotate(90), [(3, -2), (0, 0)]), (rotate(-90), [(-3, 2), (0, 0)]),
                             (flip_h(10), [(8, 3), (10, 0)]), (flip_v(10), [(2, 7), (0, 10)]),
                             (rot90(1, 10, 20), [(3, 18), (0, 20)])):
        assert np.allclose(warp_points(p, matrix), expected) and matrix.dtype == np.float64
    assert warp_points((2, 3), translate(1, 1)).tolist() == [3, 4]


@pytest.mark.parametrize("k", range(-4, 8))
def test_flips_and_quarter_turns_are_torchs(k):
    x = image(2, 5, 8)
    assert torch.equal(warp(x, rot90(k, 5, 8), (5, 8) if k % 2 == 0 else (8, 5)), torch.rot90(x, k, (-2, -1)))
    assert torch.equal(warp(x, flip_h(8), (5, 8)), x.flip(-1))
    assert torch.equal(warp(x, flip_v(5), (5, 8)), x.flip(-2))


def test_a_product_is_the_sequence():
    x = image(3, 6, 9)
    steps = [(flip_h(9), (6, 9)), (rot90(1, 6, 9), (9, 6)), (flip_v(9), (9, 6)), (rot90(2, 9, 6), (9, 6)),
             (translate(2, 1), (12, 12)), (rot90(3, 12, 12), (12, 12))]
    moved, product = x, np.eye(3)
    for matrix, size in steps:
        moved, product = warp(moved, matrix, size), matrix @ product
    assert torch.equal(warp(x, product, (12, 12)), moved)
    a, b, points = general(0, 20, 30), general(1, 20, 30), np.random.default_rng(0).uniform(0, 20, (5, 4, 2))
    assert np.allclose(warp_points(warp_points(points, a), b), warp_points(points, b @ a))


def test_inverse_brings_everything_back():
    x, points = image(1, 7, 4), np.random.default_rng(0).uniform(0, 7, (9, 2))
    for k in range(4):
        matrix = rot90(k, 7, 4) @ flip_h(4)
        size = (7, 4) if k % 2 == 0 else (4, 7)
        assert torch.equal(warp(warp(x, matrix, size), np.linalg.inv(matrix), (7, 4)), x)
    matrix = general(2, 7, 4)
    assert np.allclose(warp_points(warp_points(points, matrix), np.linalg.inv(matrix)), points)


# ---- image, mask, points and boxes agree ----------------------------------------------------------------------------

LATTICE = [rot90(k, 9, 11) @ f @ translate(dx, dy) for k in range(4) for f in (np.eye(3), flip_h(11), flip_v(9))
           for dx, dy in ((0, 0), (2, -1))]


@pytest.mark.parametrize("matrix", LATTICE)
def test_points_and_boxes_follow_the_pixels_exactly(matrix):
    """A marked pixel and a filled rectangle are moved, bilinear and nearest, and searched in the result."""
    marked, filled = torch.zeros(1, 9, 11), torch.zeros(1, 9, 11)
    marked[0, 3, 5], filled[0, 2:6, 3:8] = 1, 1
    for mode in ("bilinear", "nearest"):
        row, column = np.unravel_index(int(warp(marked, matrix, (12, 12), mode=mode).argmax()), (12, 12))
        assert np.allclose(warp_points((5.5, 3.5), matrix), (column + 0.5, row + 0.5))
        rows, columns = np.nonzero(warp(filled, matrix, (12, 12), mode=mode)[0].numpy())
        seen = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        assert np.allclose(warp_boxes([(3, 2, 8, 6)], matrix), [seen])


@pytest.mark.parametrize("seed", range(8))
def test_points_and_boxes_follow_the_pixels_of_any_matrix(seed):
    """Enlarged eight times; the marked pixel's centre of mass agrees to 0.02, the rectangle's edges to one pixel."""
    matrix = translate(80, 80) @ scale(8, 8) @ translate(-6, -5) @ general(seed, 9, 11)
    marked, filled = torch.zeros(1, 9, 11), torch.zeros(1, 9, 11)
    marked[0, 3, 5], filled[0, 3:6, 4:7] = 1, 1
    weight = warp(marked, matrix, (160, 160))[0].double().numpy()
    y, x = np.mgrid[:160, :160] + 0.5
    centre = (weight * x).sum() / weight.sum(), (weight * y).sum() / weight.sum()
    assert np.allclose(warp_points((5.5, 3.5), matrix), centre, atol=0.02)
    rows, columns = np.nonzero(warp(filled, matrix, (160, 160), mode="nearest")[0].numpy())
    seen = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    box = warp_boxes([(4, 3, 7, 6)], matrix)
    assert np.allclose(box, [seen], atol=1)
    corners = warp_points([(4, 3), (7, 3), (7, 6), (4, 6)], matrix)
    assert np.allclose(box[0], (*corners.min(0), *corners.max(0)))


def test_no_boxes():
    assert warp_boxes(np.zeros((0, 4)), rotate(30)).shape == (0, 4) == warp_boxes([], rotate(30)).shape
    assert warp_points(np.zeros((0, 2)), rotate(30)).shape == (0, 2)


# ---- exact moves ----------------------------------------------------------------------------------------------------

def numpy_move(height, width, pads, border, k, flip):
    """The source pixel (flat index, -1: none) of every output pixel by np.pad, slices and rot90. Pads may be < 0."""
    index = np.arange(height * width).reshape(height, width)
    positive = [(max(a, 0), max(b, 0)) for a, b in pads]
    index = np.pad(index, positive, border, **({"constant_values": -1} if border == "constant" else {}))
    (top, bottom), (left, right) = [(max(-a, 0), max(-b, 0)) for a, b in pads]
    index = index[top:index.shape[0] - bottom, left:index.shape[1] - right]
    return np.rot90(index[:, ::-1] if flip else index, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("border", BORDERS)
def test_exact_moves_are_numpys(border, dtype):
    """Crops, pads far beyond the image, flips and quarter turns are bit-equal, for one image and for a batch."""
    batch = image(3, 2, 5, 7, dtype=dtype)
    for pads in ([(0, 0), (0, 0)], [(3, 2), (4, 4)], [(-1, 2), (3, -2)], [(13, 9), (20, 1)], [(-2, -1), (-3, -3)]):
        for k in range(4):
            for flip in (False, True):
                index = numpy_move(5, 7, pads, border, k, flip)
                height, width = 5 + sum(pads[0]), 7 + sum(pads[1])
                matrix = translate(pads[1][0], pads[0][0])
                matrix = rot90(k, height, width) @ (flip_h(width) if flip else np.eye(3)) @ matrix
                where = torch.from_numpy(np.maximum(index, 0).copy())
                bits = batch.view(torch.int16) if dtype == torch.uint16 else batch
                expected = bits.flatten(-2)[..., where].view(dtype)
                expected = torch.where(torch.from_numpy(index < 0), torch.tensor(0, dtype=dtype), expected)
                for mode in ("bilinear", "nearest"):
                    moved = warp(batch, matrix, index.shape, mode=mode, border=border)
                    assert moved.dtype == dtype and moved.tolist() == expected.tolist()
                one = warp(batch[1], matrix, index.shape, border=border)
                assert one.shape == (2, *index.shape) and one.tolist() == expected[1].tolist()


def test_large_values_survive():
    for dtype, value in ((torch.uint16, 65535), (torch.int32, 2 ** 31 - 1), (torch.int64, 2 ** 53 + 1)):
        x = torch.tensor([[[value, value - 1], [1, 0]]], dtype=dtype)
        assert warp(x, flip_h(2), (2, 2)).tolist() == [[[value - 1, value], [0, 1]]]
        assert warp(x, translate(1, 0), (1, 3)).tolist() == [[[0, value, value - 1]]]
    x = torch.tensor([[[float("nan"), -0.0, float("inf")]]])
    assert str(warp(x, flip_h(3), (1, 3)).tolist()) == "[[[inf, -0.0, nan]]]"


def test_the_source_is_not_written_to():
    x = image(1, 4, 4)
    before = x.clone()
    for matrix in (flip_h(4), translate(1, 1), rotate(10)):
        warp(x, matrix, (4, 4)).fill_(9)
        assert torch.equal(x, before)


# ---- everything else ------------------------------------------------------------------------------------------------

def fold(i, length, border):
    """Index -> index inside the image, or None."""
    if border == "wrap":
        return i % length
    while border == "reflect" and not 0 <= i < length:
        i = 0 if length == 1 else -i if i < 0 else 2 * (length - 1) - i
    return i if 0 <= i < length else None


def loop_warp(x, matrix, size, mode, border):
    """The definition of `warp`, pixel by pixel in float64. x: one channel as nested lists."""
    inverse, height, width = np.linalg.inv(matrix), len(x), len(x[0])

    def at(row, column):
        row, column = fold(row, height, border), fold(column, width, border)
        return 0 if row is None or column is None else x[row][column]

    out = np.zeros(size)
    for v in range(size[0]):
        for u in range(size[1]):
            column, row, _ = inverse @ (u + 0.5, v + 0.5, 1)
            column, row = column - 0.5, row - 0.5
            if mode == "nearest":
                out[v, u] = at(round(row), round(column))
                continue
            j, i = math.floor(column), math.floor(row)
            a, b = column - j, row - i
            out[v, u] = ((1 - b) * ((1 - a) * at(i, j) + a * at(i, j + 1))
                         + b * ((1 - a) * at(i + 1, j) + a * at(i + 1, j + 1)))
    return out


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("shape", [(6, 7), (1, 5), (4, 1), (1, 1)])
def test_resampling_is_the_definition(shape, border, mode):
    """On a canvas that shows several periods of the border; in float64 to its precision."""
    for seed in range(2):
        matrix = translate(6, 5) @ general(seed, *shape)
        x = image(2, *shape, seed=seed, dtype=torch.float64)
        expected = np.stack([loop_warp(c, matrix, (12, 14), mode, border) for c in x.tolist()])
        moved = warp(x, matrix, (12, 14), mode=mode, border=border)
        assert moved.dtype == torch.float64 and np.allclose(moved.numpy(), expected, atol=1e-9)
        assert np.allclose(warp(x.float(), matrix, (12, 14), mode=mode, border=border), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("border", BORDERS)
def test_resampling_in_every_dtype(border, dtype):
    """All dtypes are interpolated as float32 and rounded once: half precision is too coarse for coordinates."""
    x, matrix = image(2, 40, 300, dtype=dtype), general(3, 40, 300)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for mode in ("bilinear", "nearest"):
        expected = warp(x.to(wide), matrix, (50, 280), mode=mode, border=border)
        expected = expected if dtype.is_floating_point else expected.round()
        moved = warp(x, matrix, (50, 280), mode=mode, border=border)
        assert moved.dtype == dtype and torch.equal(moved.to(wide), expected.to(dtype).to(wide))


def test_masks_keep_their_labels():
    x = torch.tensor([0, 1, 5, 255], dtype=torch.uint8)[torch.arange(200) % 4].reshape(1, 10, 20)
    moved = warp(x, general(1, 10, 20), (30, 30), mode="nearest")
    assert set(moved.flatten().tolist()) == {0, 1, 5, 255} and moved.dtype == torch.uint8


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("border", BORDERS)
def test_one_matrix_per_image(border, mode):
    x, matrices = image(4, 2, 8, 9), np.stack([general(0, 8, 9), np.eye(3), flip_h(9), general(5, 8, 9)])
    moved = warp(x, matrices, (7, 10), mode=mode, border=border)
    for a, b, matrix in zip(moved, x, matrices):
        assert torch.allclose(a, warp(b, matrix, (7, 10), mode=mode, border=border), atol=1e-5)
    same = warp(x, general(0, 8, 9), (7, 10), mode=mode, border=border)
    assert torch.equal(same[2], warp(x[2], general(0, 8, 9), (7, 10), mode=mode, border=border))


@pytest.mark.parametrize("border", BORDERS)
def test_exact_and_interpolated_moves_are_continuous(border):
    x = image(1, 20, 30)
    for matrix in (np.eye(3), translate(3, -2), flip_h(30), rot90(1, 20, 30), rot90(3, 20, 30) @ flip_v(20)):
        exact = warp(x, matrix, (25, 25), border=border)
        for epsilon in (1e-9, 1e-6, 1e-4):
            for shifted in (matrix + epsilon * np.array([[0, 0, 1], [0, 0, -1], [0, 0, 0]]),
                            matrix + epsilon / 30 * np.array([[1, 1, 0], [-1, 1, 0], [0, 0, 0]])):
                assert (warp(x, shifted, (25, 25), border=border) - exact).abs().max() < 4 * epsilon + 2e-5


def test_fractions_of_pixels_far_from_the_origin():
    """A shift by a tenth of a pixel and a zoom of 5e-6 are exact also far from the origin."""
    x = torch.zeros(1, 1, 20)
    x[..., 10] = 1
    there = warp(x, translate(40_000.1, 0) @ translate(-40_000, 0), (1, 20))
    assert torch.allclose(there[0, 0, 10:12], torch.tensor([0.9, 0.1]), atol=1e-3)
    far = warp(x, translate(-3000, 0) @ translate(3000.1, 0), (1, 20))
    assert torch.allclose(far[0, 0, 10:12], torch.tensor([0.9, 0.1]), atol=1e-3)
    large = torch.arange(30_000.)[None, None] % 2
    crop = warp(large, translate(-20_000.1, 0), (1, 4))
    assert torch.allclose(crop[0, 0], torch.tensor([0.1, 0.9, 0.1, 0.9]), atol=0.02)
    for shift in (0.01, 0.001):
        assert warp(x, translate(shift, 0), (1, 20))[0, 0, 11] == pytest.approx(shift, rel=0.02)
    zoom = translate(0.5, 0) @ scale(1 + 5e-6, 1) @ translate(-0.5, 0)  # the first pixel stays where it is
    zoomed = warp(large, zoom, (1, 30_000), border="reflect")
    assert zoomed[0, 0, 20_000] == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("matrix", [rot90(1, 3, 4) @ translate(1, -1), general(0, 3, 4)], ids=["exact", "general"])
def test_gradients(matrix, border):
    x = image(2, 3, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: warp(x, matrix, (5, 5), border=border), x)
    y = image(2, 1, 3, 4, dtype=torch.bfloat16).requires_grad_()
    warp(y, matrix, (5, 5), border=border).sum().backward()
    assert y.grad.dtype == torch.bfloat16 and y.grad.abs().sum() > 0


# ---- random crops ---------------------------------------------------------------------------------------------------

def numpy_crop_flip(rng, x, size):
    """The wildfire system's crop with numpy's pad, slices, flip and rot90; draws random numbers in the same order."""
    height, width = x.shape[-2:]
    mirrored = rng.random(8)[7] < 0.5
    missing = [max(2 * size - side, 0) for side in (height, width)]
    left, top = rng.integers([max(width, 2 * size) - size + 1, max(height, 2 * size) - size + 1])
    turns, border = rng.integers(4), "wrap" if rng.integers(2) else "reflect"
    x = np.pad(x, [(0, 0)] + [(m // 2, m - m // 2) for m in missing], border)
    x = x[:, top:top + size, left:left + size]
    return np.rot90(x[:, :, ::-1] if mirrored else x, turns, (1, 2)), border


@pytest.mark.parametrize("height, width", [(8, 8), (16, 16), (16, 8), (5, 12), (3, 2), (1, 1), (21, 40), (1, 30)])
def test_crop_flip_is_numpys(height, width):
    """For tiles smaller and larger than the crop of 8, larger than twice the crop, and not square."""
    x = image(2, height, width, dtype=torch.uint16)
    for seed in range(40):
        matrix, border = WILDFIRE.view(np.random.default_rng(seed), height, width, 8)
        expected, expected_border = numpy_crop_flip(np.random.default_rng(seed), x.numpy(), 8)
        assert border == expected_border
        assert np.array_equal(warp(x, matrix, (8, 8), border=border).numpy(), expected)


def test_crop_flip_draws_everything_equally_often():
    """All eight orientations with both borders, and all positions, occur equally often within 5 sigma."""
    rng, draws = np.random.default_rng(0), 4000
    kinds, places = Counter(), Counter()
    for _ in range(draws):
        matrix, border = WILDFIRE.view(rng, 6, 11, 4)  # rows padded to 8, columns not: 5 x 8 places
        kinds[tuple(np.rint(matrix[:2, :2]).astype(int).ravel()), border] += 1
        source = warp_boxes([(0, 0, 4, 4)], np.linalg.inv(matrix))[0]
        assert np.allclose(source[2:] - source[:2], 4)
        places[round(source[0]), round(source[1])] += 1
    assert set(places) == {(x, y) for x in range(8) for y in range(-1, 4)}
    for counts in (kinds, places):
        chance = draws / len(counts)
        assert max(abs(n - chance) for n in counts.values()) < 5 * chance ** 0.5
    assert len(kinds) == 16


def test_crop_flip_moves_boxes_with_the_pixels():
    for seed in range(20):
        matrix, border = WILDFIRE.view(np.random.default_rng(seed), 16, 16, 8)
        x = torch.zeros(1, 16, 16)
        x[0, 6:9, 5:11] = 1
        seen = np.nonzero(warp(x, matrix, (8, 8), border=border)[0].numpy())
        x1, y1, x2, y2 = warp_boxes([(5, 6, 11, 9)], matrix)[0].clip(0, 8)
        if len(seen[0]):
            assert (x1, y1, x2, y2) == (seen[1].min(), seen[0].min(), seen[1].max() + 1, seen[0].max() + 1)
        else:
            assert x1 == x2 or y1 == y2


def test_gain():
    """Uniform in octaves: a factor for the tile and a smaller factor for each band; all 1 for a spread of 0."""
    def gain(seed, bands, spread):
        matrix = Augmentation(gain=spread).colour(np.random.default_rng(seed), bands)
        assert matrix.dtype == np.float32 and np.count_nonzero(matrix - np.diag(np.diag(matrix))) == 0
        return np.diag(matrix)

    draws = np.log2([gain(seed, 5, 0.8) for seed in range(2000)]).astype(np.float64)
    assert abs(draws).max() <= 1.25 * 0.8 and abs(draws).max() > 1.1 * 0.8
    between = draws - draws.mean(1, keepdims=True)  # var U(-a, a) = a^2 / 3, 1/5 of it in the mean
    assert between.var() == pytest.approx(0.2 ** 2 / 3 * 4 / 5, rel=0.05)
    assert draws.mean(1).var() == pytest.approx(0.8 ** 2 / 3 + 0.2 ** 2 / 3 / 5, rel=0.1)
    assert abs(draws.mean()) < 0.05
    assert (gain(0, 4, 0) == 1).all()


@pytest.mark.parametrize("border", ["constant", "reflect", "wrap"])
def test_coordinates_are_computed_on_the_images_device(border):
    """On the CPU they would take longer than the rest of a GPU's step, and have to be copied."""
    from torch.utils._python_dispatch import TorchDispatchMode
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(t for t in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(t, torch.Tensor))
            return out

    with Watch():
        warp(torch.empty(2, 1, 32, 32, device="meta"), np.stack([rotate(7)] * 2), (32, 32),
                      border=border)
    assert max((t.numel() for t in made if t.device.type == "cpu"), default=0) < 100
    assert max(t.numel() for t in made) >= 2 * 32 * 32 * 2
