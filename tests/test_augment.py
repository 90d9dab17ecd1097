"""data/augment: what it draws is what the competitions' systems drew, and moves and colours as torchvision's functions."""
import math
from collections import Counter

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv
from torchvision.tv_tensors import BoundingBoxes

import train_cls
import train_det
import train_seg
from data import seg
from data.augment import of_flags, recolour
from tests.conftest import DIRTY, PARKING, WILDFIRE, Augmentation, warp_points
from utils.train.args import setup_run
from utils.ops.geometry import flip_h, flip_v, rot90, rotate, scale, shear, shrunk, translate, warp, warp_boxes


# ---- the second edition's three functions, as they stood --------------------------------------------------------------
def crop_flip(rng, height, width, size):
    border = ("reflect", "wrap")[rng.integers(2)]
    matrix = np.eye(3)
    for axis, side in enumerate((width, height)):
        padded = max(side, 2 * size)
        matrix[axis, 2] = (padded - side) // 2 - rng.integers(0, padded - size + 1)
    flip = flip_h(size) if rng.integers(2) else np.eye(3)
    return rot90(rng.integers(4), size, size) @ flip @ matrix, border


def affine(rng, canvas, size, *, degrees=0.0, move=0.1, zoom=0.5, slant=0.0, flip_ud=0.0, flip_lr=0.5):
    factor, angle = 1 + rng.uniform(-zoom, zoom), rng.uniform(-degrees, degrees)
    matrix = rotate(angle) @ scale(factor, factor) @ translate(-canvas / 2, -canvas / 2)
    matrix = shear(*rng.uniform(-slant, slant, 2)) @ matrix
    matrix = translate(*(size * (0.5 + rng.uniform(-move, move, 2)))) @ matrix
    if rng.random() < flip_ud:
        matrix = flip_v(size) @ matrix
    if rng.random() < flip_lr:
        matrix = flip_h(size) @ matrix
    return matrix


def random_affine(rng, size):
    matrix = rot90(rng.integers(4), size, size)
    if rng.random() < 0.5:
        factor, angle = 1 + rng.uniform(-0.1, 0.1), rng.uniform(-15, 15)
        moved = rotate(angle) @ scale(factor, factor) @ translate(-size / 2, -size / 2)
        matrix = translate(*(size * (0.5 + rng.uniform(-0.0625, 0.0625, 2)))) @ moved @ matrix
    return matrix


def same_distribution(a, b, sigma=5):
    """Two-sample Kolmogorov-Smirnov: the largest distance of the distribution functions is chance's."""
    values = np.sort(np.concatenate((a, b)))
    distance = np.abs(np.searchsorted(np.sort(a), values, "right") / len(a)
                      - np.searchsorted(np.sort(b), values, "right") / len(b)).max()
    assert distance < sigma / 2 * math.sqrt(1 / len(a) + 1 / len(b)), distance


@pytest.mark.parametrize("module, name, expected", [
    (train_seg, "wildfire", WILDFIRE), (train_det, "parking-lots", PARKING), (train_cls, "dirty-mnist", DIRTY)])
def test_the_recipes_are_the_competitions(module, name, expected, tmp_path, monkeypatch):
    """Flag by flag, as the tests below have them."""
    monkeypatch.setattr("sys.argv", ["x", "--project", str(tmp_path), "--device", "cpu", "--recipe", name])
    args, *_ = setup_run(module.make_parser())
    assert list(module.RECIPES) == [name, "photos"] and args.recipe == name
    for kind, options in of_flags(vars(args)).items():
        for flag, value in options.items():
            wanted = expected.options[kind][flag]
            assert value == wanted or list(value) == list(wanted), (name, flag)


@pytest.mark.parametrize("options, changes", [
    ({}, {}), ({"degrees": 10, "slant": 5, "flip_ud": 0.3}, {"degrees": 10, "shear": 5, "vflip": 0.3}),
    ({"zoom": 0.9, "move": 0.3, "flip_lr": 0.2}, {"zoom": (0.1, 1.9), "translate": 0.3, "hflip": 0.2})], ids=str)
def test_detection_draws_the_same_numbers_as_before(options, changes):
    """The same matrix from the same generator, and the generator goes on alike."""
    for seed in range(200):
        before, now = np.random.default_rng(seed), np.random.default_rng(seed)
        wanted = affine(before, 1280, 640, **options)
        matrix, border = PARKING.but(**changes).view(now, 1280, 1280, 640)
        np.testing.assert_allclose(matrix, wanted, rtol=0, atol=1e-9)
        assert border == "constant" and before.random() == now.random()


@pytest.mark.parametrize("height, width, size", [(64, 64, 64), (300, 200, 64), (33, 90, 32)])
def test_segmentation_draws_from_the_same_distribution_as_before(height, width, size):
    """The numbers come in another order, so the draws are compared: orientation, border, and both coordinates."""
    rng, count = np.random.default_rng(0), 6000
    before = [crop_flip(rng, height, width, size) for _ in range(count)]
    now = [WILDFIRE.view(rng, height, width, size) for _ in range(count)]
    kinds = [Counter((*m[:2, :2].round().astype(int).ravel().tolist(), border) for m, border in draws)
             for draws in (before, now)]
    assert len(kinds[0]) == 16 and kinds[0].keys() == kinds[1].keys()
    assert max(abs(kinds[0][k] - kinds[1][k]) for k in kinds[0]) < 5 * math.sqrt(2 * count / 16)
    starts = [np.array([warp_boxes([(0, 0, size, size)], np.linalg.inv(m))[0, :2] for m, _ in draws])
              for draws in (before, now)]
    assert (starts[1] == starts[1].round()).all()
    for axis in (0, 1):
        same_distribution(starts[0][:, axis], starts[1][:, axis])


def test_classification_draws_from_the_same_distribution_as_before():
    """Quarter turns now come last: with ranges that are the same in all directions this changes nothing."""
    rng, count = np.random.default_rng(0), 6000
    before = np.array([random_affine(rng, 100) for _ in range(count)])
    now = np.array([DIRTY.view(rng, 100, 100, 100)[0] for _ in range(count)])
    for quantity in (lambda m: np.hypot(m[:, 0, 0], m[:, 0, 1]), lambda m: np.degrees(np.arctan2(m[:, 0, 1], m[:, 0, 0])),
                     lambda m: (m @ (50, 50, 1))[:, 0], lambda m: (m @ (50, 50, 1))[:, 1], lambda m: (m @ (9, 70, 1))[:, 0],
                     lambda m: (m @ (9, 70, 1))[:, 1]):
        same_distribution(*(quantity(m).round(9) for m in (before, now)))


# ---- ranges ----------------------------------------------------------------------------------------------------------
def draws(changes, count=3000, sides=(80, 100), size=60):
    rng = np.random.default_rng(0)
    return np.array([changes.view(rng, *sides, size)[0] for _ in range(count)])


def test_nothing_is_changed_unless_it_is_asked_for():
    assert (draws(Augmentation(), 5) == translate(30 - 50, 30 - 40)).all()
    np.testing.assert_allclose(Augmentation().colour(np.random.default_rng(0), 3), np.eye(3), atol=1e-7)


def test_zoom_is_log_uniform_and_aspect_too():
    """Half of the draws show more, half less; the area does not depend on the aspect."""
    found = draws(Augmentation(zoom=(0.5, 2.0), aspect=1.5))
    across, down = found[:, 0, 0], found[:, 1, 1]
    octaves, stretch = np.log2(across * down) / 2, np.log(across / down) / np.log(1.5)
    for values in (octaves, stretch):
        assert -1 <= values.min() < -0.97 and 0.97 < values.max() <= 1
        same_distribution(values, np.linspace(-1, 1, 3001))
    assert abs(np.corrcoef(octaves, stretch)[0, 1]) < 0.08


def test_a_random_resized_crop_lies_anywhere_in_the_picture():
    """As torchvision's: inside, where it fits; all places alike."""
    changes = Augmentation(zoom=(1.0, 1.7), aspect=4 / 3, crop_padding=1.0)
    rng, shown = np.random.default_rng(0), []
    for _ in range(3000):
        box, = warp_boxes([(0, 0, 90, 90)], np.linalg.inv(changes.view(rng, 90, 90, 90)[0]))
        x1, y1, x2, y2 = box
        for low, high in ((x1, x2), (y1, y2)):
            assert (low > -1e-9 and high < 90 + 1e-9) or high - low > 90 and low <= 0 and high >= 90
            if high - low < 80:
                shown.append(low / (90 - (high - low)))
    assert abs(np.mean(shown) - 0.5) < 0.02 and min(shown) < 0.05 and max(shown) > 0.95


def test_a_view_is_laid_over_its_point():
    changes = Augmentation(zoom=(0.4, 3.0), aspect=2, hflip=0.5, rot90=True, crop_padding=1.0)
    rng = np.random.default_rng(0)
    for _ in range(500):
        height, width, size = (int(n) for n in rng.integers(2, 90, 3))
        row, column = int(rng.integers(height)), int(rng.integers(width))
        matrix, _ = changes.view(rng, height, width, size, (row, column))
        margin = np.abs(matrix[:2, :2]).max()  # a pixel of the picture
        assert (np.abs(warp_points([column + 0.5, row + 0.5], matrix) - size / 2) < size / 2 + margin).all()


# ---- torchvision -----------------------------------------------------------------------------------------------------
def smooth(height, width, bands=3, seed=0):
    """A picture without sharp edges, so that two ways to interpolate agree."""
    small = torch.rand(1, bands, 9, 9, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(small, (height, width), mode="bicubic", align_corners=True)[0].clamp(0, 1)


def test_geometry_is_torchvisions():
    """tv.affine turns, shears and zooms about the middle, then shifts; images, masks and boxes alike."""
    x, rng = smooth(64, 64), np.random.default_rng(0)
    mask = (x[:1] > 0.5).to(torch.uint8)
    boxes = np.array([[10, 20, 30, 44], [40, 5, 60, 30.0]])
    for _ in range(10):
        angle, zoom, dx, dy = rng.uniform(-30, 30), rng.uniform(0.95, 1.5), *rng.integers(-6, 7, 2).tolist()
        options = dict(angle=-angle, translate=[dx, dy], scale=zoom, shear=[0.0, 0.0])  # tv turns clockwise
        matrix = translate(32 + dx, 32 + dy) @ rotate(angle) @ scale(zoom, zoom) @ translate(-32, -32)
        inside = tv.affine(torch.ones(1, 64, 64), **options, interpolation=InterpolationMode.BILINEAR)[0] == 1
        wanted = tv.affine(x, **options, interpolation=InterpolationMode.BILINEAR)
        assert (warp(x, matrix, (64, 64)) - wanted)[:, inside].abs().max() < 1e-4
        wanted = tv.affine(mask, **options, interpolation=InterpolationMode.NEAREST)
        assert (warp(mask, matrix, (64, 64), mode="nearest") == wanted).float().mean() > 0.995
        wanted = tv.affine(BoundingBoxes(boxes, format="XYXY", canvas_size=(64, 64), clamping_mode=None), **options)
        assert np.abs(warp_boxes(boxes, matrix) - np.asarray(wanted)).max() < 1.1  # torchvision rounds to pixels
    for ours, theirs in ((flip_h(64), tv.horizontal_flip), (flip_v(64), tv.vertical_flip)):
        assert torch.equal(warp(x, ours, (64, 64)), theirs(x)) and torch.equal(warp(mask, ours, (64, 64)), theirs(mask))


@pytest.mark.parametrize("height, width, size", [(60, 90, 30), (100, 64, 20)])
def test_a_view_that_shows_more_is_torchvisions_resized_crop(height, width, size):
    """A zoom below 1 is antialiased: of noise, tv.resized_crop's pixels, which are means and no single pixels."""
    x = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0)) * 255
    factor = 0.5
    side = round(size / factor)
    changes = Augmentation(zoom=(factor, factor), crop_padding=1.0, border=("reflect",))
    rng, seen = np.random.default_rng(1), set()
    for _ in range(20):
        matrix, border = changes.view(rng, height, width, size)
        left, top = (-matrix[:2, 2] / factor).round().astype(int).tolist()
        if min(left, top) < 0 or left + side > width or top + side > height:
            continue
        got = warp(*shrunk(x, matrix), (size, size), border=border)
        wanted = tv.resized_crop(x, top, left, side, side, [size, size], antialias=True)
        even = left % 2 == top % 2 == 0  # else the grids lie half a pixel apart
        assert got.std() < 0.62 * x.std() and (not even or (got - wanted)[:, 2:-2, 2:-2].abs().max() < 0.1)
        seen.add(even)
        assert warp(x, matrix, (size, size), border=border).std() > got.std()
    assert True in seen


def test_shrunk_keeps_places():
    """A gradient is where it was, in any dtype."""
    y, x = torch.meshgrid(torch.arange(90.0), torch.arange(120.0), indexing="ij")
    for dtype in (torch.float32, torch.uint8, torch.uint16):
        image = torch.stack((x, y)).to(dtype)
        matrix = translate(3, 5) @ rotate(10) @ scale(0.4, 0.6)
        small, there = shrunk(image, matrix)
        factor = math.sqrt(0.4 * 0.6)
        assert small.shape == (2, round(90 * factor), round(120 * factor))
        for point in ((40.0, 50.0), (100.0, 20.0)):
            before = there @ scale(small.shape[2] / 120, small.shape[1] / 90)
            np.testing.assert_allclose(warp_points(point, before), warp_points(point, matrix))
        wanted, got = warp(image.float(), matrix, (40, 40)), warp(small, there, (40, 40)).float()
        assert (wanted - got)[:, 15:30, 20:35].abs().max() < 1.1
    same, matrix = shrunk(image, scale(0.9, 1.5))
    assert same is image and (matrix == scale(0.9, 1.5)).all()


def one(matrix, picture):
    """A picture (3, H, W), recoloured."""
    return recolour(picture[None], torch.as_tensor(matrix, dtype=torch.float32)[None])[0]


def test_colours_are_torchvisions():
    """Brightness and a whole turn of a third exactly; saturation where torchvision's grey is ours."""
    x, rng = smooth(20, 30) * 0.6, np.random.default_rng(0)
    for _ in range(10):
        matrix = Augmentation(value=0.5).colour(rng, 3)
        torch.testing.assert_close(one(matrix, x), tv.adjust_brightness(x, float(matrix[0, 0])), atol=1e-5, rtol=1e-4)
        matrix = Augmentation(gain=0.5).colour(rng, 1)
        torch.testing.assert_close(one(matrix, x[:1]), tv.adjust_brightness(x[:1], float(matrix[0, 0])), atol=1e-5,
                                   rtol=1e-4)
    third = fixed(hue=1 / 3)
    torch.testing.assert_close(one(third, x), tv.adjust_hue(x, 1 / 3), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one(third, x), x.roll(1, 0), atol=1e-5, rtol=1e-4)
    equal_greys = torch.stack((x[0], x[0], x[0] * 0.587 / 0.587))  # where all weights give the same grey
    torch.testing.assert_close(one(fixed(saturation=0.7), equal_greys), tv.adjust_saturation(equal_greys, 1.7), atol=1e-5,
                               rtol=1e-4)
    grey = x.mean(0, keepdim=True)
    torch.testing.assert_close(one(fixed(saturation=-0.6), x), grey + 0.4 * (x - grey), atol=1e-5, rtol=1e-4)


def fixed(**changes):
    """The matrix at the end of the ranges."""
    class Ends:
        def uniform(self, low, high, size=None):
            return np.ones(size)
    return Augmentation(**changes).colour(Ends(), 3)


def test_no_data_stays_no_data():
    x = torch.rand(1, 4, 5, 5)
    x[0, 1, 2, 2] = math.nan
    mixed = recolour(x, torch.rand(1, 4, 4))
    assert mixed.isnan().nonzero().tolist() == [[0, 1, 2, 2]]


# ---- in the data of segmentation -------------------------------------------------------------------------------------
def test_beyond_a_constant_border_a_mask_says_nothing(tmp_path):
    data = seg.SegData([("i", "m")], **Augmentation(crop_padding=2.0).options, imgsz=16)
    rng, seen = np.random.default_rng(0), set()
    for _ in range(50):
        image, mask = data.augmented(rng, torch.full((1, 12, 12), 7.0), torch.ones(12, 12, dtype=torch.uint8))
        assert torch.equal(mask == 1, image[0] == 7) and torch.equal(mask == seg.IGNORE, image[0] == 0)
        seen |= set(mask.unique().tolist())
    assert seen == {1, seg.IGNORE}
