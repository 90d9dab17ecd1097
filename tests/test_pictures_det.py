"""utils/pictures/detection.py: boxes pixel by pixel, and the texts that go with them."""
import errno
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from utils.pictures import detection as pictures_det
from utils.errors import UserError
from utils.pictures.sheets import PALETTE, to_rgb
from utils.pictures.detection import detection_sheet

pytestmark = pytest.mark.filterwarnings("error")
ODD = ["a name that is much longer than any picture is wide " * 4, "Müller", "飞机", "two\nlines", "", "50%"]


@pytest.fixture
def texts(monkeypatch):
    """Every text that is drawn, in order."""
    drawn, real = [], ImageDraw.ImageDraw.text

    def spy(self, xy, text, *args, **options):
        drawn.append(text)
        real(self, xy, text, *args, **options)
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", spy)
    return drawn


def read(path):
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return np.array(image)


def near(picture, colour, tolerance=40):
    return (np.abs(picture.astype(int) - np.array(colour, int)) <= tolerance).all(-1)


def grey(height=100, width=100):
    return np.full((height, width, 3), 120, np.uint8)


def outline(picture, x1, y1, x2, y2, colour, line=1):
    """A frame of whole pixels: columns x1 ... x2 - 1, rows y1 ... y2 - 1."""
    for k in range(line):
        picture[[y1 + k, y2 - 1 - k], x1:x2] = colour
        picture[y1:y2, [x1 + k, x2 - 1 - k]] = colour


# ---- draw_boxes ------------------------------------------------------------------------------------------------------
def draw_boxes(rgb, boxes, classes, names, scores=None):
    columns = [boxes, classes] if scores is None else [boxes, scores, classes]
    return pictures_det.draw_boxes(rgb, np.column_stack([np.asarray(column) for column in columns]), names)


@pytest.mark.parametrize("side, line", [(100, 1), (1000, 3)])
def test_a_box_is_its_outline_and_a_tag_in_its_corner(side, line, texts):
    rgb = grey(side, side)
    drawn = draw_boxes(rgb, [[10.2, 30.4, 70.6, 80.6]], [1], ["a", "b"], [0.987])
    expected = grey(side, side)
    outline(expected, 10, 30, 71, 81, PALETTE[1], line)
    assert drawn.dtype == np.uint8 and (rgb == 120).all() and texts == ["b 0.99"]
    rows, columns = np.nonzero((drawn != expected).any(-1))  # the tag
    assert 30 < rows.min() < rows.max() < 60 and 10 < columns.min() < columns.max() < 71
    tag = drawn[rows.min():rows.max() + 1, columns.min():columns.max() + 1]
    assert near(tag, PALETTE[1], 0).mean() > 0.5 and near(tag, (255, 255, 255), 60).sum() > 5  # white on red


@pytest.mark.parametrize("box, frame", [
    ((-50, -60, 40, 45), (0, 0, 40, 45)), ((60, 70, 1e9, math.inf), (60, 70, 100, 100)),
    ((-1e9, -1e9, 1e9, 1e9), (0, 0, 100, 100)), ((20, 30, 20.1, 30.2), (20, 30, 21, 31)),
    ((99.9, 50, 120, 60), (99, 50, 100, 60))])
def test_boxes_are_cut_at_the_edge(box, frame):
    drawn, expected = draw_boxes(grey(), [box], [0], [""]), grey()
    outline(expected, *frame, PALETTE[0])
    changed, (x1, y1, _, y2) = (drawn != expected).any(-1), frame
    assert drawn.shape == (100, 100, 3) and (drawn[y1:y2, x1] == PALETTE[0]).all()
    changed[y1:y1 + 20, x1:x1 + 45] = False  # the tag
    assert not changed.any()


@pytest.mark.parametrize("box", [(100, 0, 120, 50), (-9, 5, 0, 50), (5, -9, 50, 0), (5, 100, 50, 120),
                                 (50, 5, 20, 30), (5, 50, 30, 20), (math.nan, 5, 30, 20), (5, 5, 30, math.nan)])
def test_boxes_beyond_the_picture_inverted_or_nan_are_not_drawn(box):
    np.testing.assert_array_equal(draw_boxes(grey(), [box], [0], ["cat"], [0.5]), grey())


@pytest.mark.parametrize("empty", [np.zeros((0, 4)), torch.zeros(0, 4)])
def test_no_boxes(empty):
    np.testing.assert_array_equal(draw_boxes(grey(), empty, [], []), grey())
    np.testing.assert_array_equal(draw_boxes(grey(), empty, [], [], []), grey())


def test_higher_scores_lie_on_top(texts):
    boxes, names = torch.tensor([[20, 40, 60, 80], [30, 40, 70, 80.0]]), ["a", "b"]
    shared = (79, slice(31, 59))  # the lower edge of both
    for scores, top in (((0.9, 0.2), 0), ((0.2, 0.9), 1), (None, 1)):
        drawn = draw_boxes(grey(), boxes, torch.tensor([0, 1]), names, scores)
        assert (drawn[shared] == PALETTE[top]).all()
    assert texts == ["b 0.20", "a 0.90", "a 0.20", "b 0.90", "a", "b"]


def test_colours_wrap_and_odd_names_are_drawn(texts):
    for k in (0, 19, 20, 45):
        assert (draw_boxes(grey(), [[5, 20, 95, 90]], [k], ["x"] * 80)[89, 20:80] == PALETTE[k % 20]).all()
    texts.clear()
    for k in range(8):
        assert (draw_boxes(grey(), [[5, 20, 95, 90]], [k], ODD, [0.5])[89, 20:80] == PALETTE[k]).all()
    assert texts[1:] == ["Muller 0.50", "class 2 0.50", "two lines 0.50", "class 4 0.50", "50% 0.50", "class 6 0.50",
                         "class 7 0.50"]


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (200, 3), (8, 8)])
def test_tiny_pictures(shape):
    assert draw_boxes(grey(*shape), [[0, 0, 300, 300]], [0], ["cat"], [0.5]).shape == (*shape, 3)


# ---- detection_sheet -------------------------------------------------------------------------------------------------
def scene(count=2, height=100, width=200):
    images = torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(0)).byte()
    truths = [torch.tensor([[20.0, 40, 80, 80, 0]])] * count
    predictions = [torch.tensor([[24.0, 40, 80, 80, 0.9, 1], [100, 40, 160, 80, 0.125, 2]])] * count
    return images, truths, predictions


def test_pairs_of_truth_and_prediction_scaled_to_the_sheet(tmp_path):
    images, truths, predictions = scene()
    detection_sheet(tmp_path / "a.png", images, truths, predictions, names=["a", "b", "c"], max_side=100)
    sheet = read(tmp_path / "a.png")
    assert sheet.shape == (30 + 2 * 58 + 22, 8 + 2 * 108, 3)  # titles, two rows of 100 x 50 pictures, legend
    for i in range(2):
        top = 30 + 58 * i
        small = Image.fromarray(images[i].permute(1, 2, 0).numpy())
        small = np.array(small.resize((100, 50), Image.Resampling.LANCZOS))
        truth, found = sheet[top:top + 50, 8:108], sheet[top:top + 50, 116:216]
        np.testing.assert_array_equal(truth, draw_boxes(small, [[10, 20, 40, 40]], [0], ["a"]))
        np.testing.assert_array_equal(found, draw_boxes(small, [[12, 20, 40, 40]], [1], ["a", "b"], [0.9]))
    swatches = [near(sheet[-22:], PALETTE[k], 0).sum() for k in range(3)]
    assert swatches == [121, 121, 121]
    detection_sheet(tmp_path / "b.png", images, truths, predictions, names=["a", "b", "c"], max_side=100, score=0.125)
    assert near(read(tmp_path / "b.png")[:-22], PALETTE[2], 0).any() and not near(sheet[:-22], PALETTE[2], 0).any()


def test_a_grid_without_predictions(tmp_path):
    images, truths, _ = scene(9, 20, 20)
    detection_sheet(tmp_path / "a.png", images, [t / 5 for t in truths], names=["a"], limit=9, max_side=45)
    sheet = read(tmp_path / "a.png")
    assert sheet.shape == (8 + 3 * 48 + 22, 8 + 3 * 48, 3)  # 20 pixels doubled; boxes are drawn after that
    for i in range(9):
        top, left = 8 + i // 3 * 48, 8 + i % 3 * 48
        double = images[i].permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1)
        expected = draw_boxes(double, [[8, 16, 32, 32]], [0], ["a"])
        np.testing.assert_array_equal(sheet[top:top + 40, left:left + 40], expected)
    detection_sheet(tmp_path / "b.png", images, truths, names=["a"], limit=4, max_side=45)
    assert read(tmp_path / "b.png").shape == (8 + 2 * 48 + 22, 8 + 2 * 48, 3)


def test_eight_pairs_make_a_squarish_sheet(tmp_path):
    images, truths, predictions = scene(8, 50, 50)
    detection_sheet(tmp_path / "a.png", images, truths, predictions, names=["a", "b", "c"], max_side=50)
    assert read(tmp_path / "a.png").shape == (30 + 4 * 58 + 22, 8 + 4 * 58, 3)


def test_images_without_boxes_many_bands_and_many_classes(tmp_path):
    images = torch.rand(2, 7, 32, 32)
    nothing = [torch.zeros(0, 5)] * 2, [torch.zeros(0, 6)] * 2
    detection_sheet(tmp_path / "a.png", images, *nothing, names=[], max_side=32)
    np.testing.assert_array_equal(read(tmp_path / "a.png")[30:62, 8:40], to_rgb(images[0]))
    boxes = torch.cat([torch.rand(80, 2) * 10, torch.rand(80, 2) * 10 + 15, torch.arange(80.0)[:, None]], 1)
    detection_sheet(tmp_path / "b.png", images.bfloat16(), [boxes, boxes], names=["x"] * 80, max_side=64)
    assert read(tmp_path / "b.png").shape[0] == 2 * (64 + 8) + 8  # colours repeat: no legend


def test_a_failed_sheet_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.png"
    detection_sheet(path, *scene(), names=["a", "b", "c"])
    first = path.read_bytes()

    def full(self, where, *args, **options):
        with open(where, "wb") as file:
            file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="a.png: cannot be written"):
        detection_sheet(path, *scene(), names=["a", "b", "c"])
    assert path.read_bytes() == first and [file.name for file in path.parent.iterdir()] == ["a.png"]
