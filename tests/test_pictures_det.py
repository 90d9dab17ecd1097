"""utils/pictures/detection.py: boxes, curves and heat maps pixel by pixel, and the texts that go with them."""
import errno
import math

import numpy as np
import pytest
import torch
from PIL import Image

from utils.pictures import detection as pictures_det
from utils.errors import UserError
from utils.pictures.sheets import INK, PALETTE, to_rgb
from utils.pictures.detection import confusion_matrix, detection_sheet, draw_boxes, label_statistics, pr_curves
from utils.pictures.charts import BEST, LINE

pytestmark = pytest.mark.filterwarnings("error")
ODD = ["a name that is much longer than any picture is wide " * 4, "Müller", "飞机", "two\nlines", "", "50%"]


@pytest.fixture
def texts(monkeypatch):
    """Every text that is drawn, in order."""
    drawn, real = [], pictures_det.text_line

    def spy(draw, xy, text, **options):
        drawn.append(text)
        real(draw, xy, text, **options)
    monkeypatch.setattr(pictures_det, "text_line", spy)
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
@pytest.mark.parametrize("side, line, tall", [(100, 1, 12), (1000, 3, 21)])
def test_a_box_is_its_outline_and_a_tag_above(side, line, tall, texts):
    rgb = grey(side, side)
    drawn = draw_boxes(rgb, [[10.2, 30.4, 70.6, 80.6]], [1], ["a", "b"], [0.987])
    expected = grey(side, side)
    outline(expected, 10, 30, 71, 81, PALETTE[1], line)
    assert drawn.dtype == np.uint8 and (rgb == 120).all() and texts == ["b 0.99"]
    np.testing.assert_array_equal(drawn[30:], expected[30:])
    rows, columns = np.nonzero((drawn[:30] != 120).any(-1))
    assert rows.min() == 30 - tall and rows.max() == 29 and columns.min() == 10
    tag = drawn[rows.min():30, 10:columns.max() + 1]
    assert near(tag, PALETTE[1], 0).mean() > 0.5 and near(tag, (255, 255, 255), 60).sum() > 5  # white on red
    assert (tag != 120).any(-1).all()


@pytest.mark.parametrize("box, frame", [
    ((-50, -60, 40, 45), (0, 0, 40, 45)), ((60, 70, 1e9, math.inf), (60, 70, 100, 100)),
    ((-1e9, -1e9, 1e9, 1e9), (0, 0, 100, 100)), ((20, 30, 20.1, 30.2), (20, 30, 21, 31)),
    ((99.9, 50, 120, 60), (99, 50, 100, 60))])
def test_boxes_are_cut_at_the_edge_and_their_tags_stay_inside(box, frame):
    drawn, x, y = draw_boxes(grey(), [box], [0], ["cat"]), *frame[:2]
    expected = grey()
    outline(expected, *frame, PALETTE[0])
    tag = (drawn != expected).any(-1)
    rows, columns = np.nonzero(tag)
    assert drawn.shape == (100, 100, 3) and len(np.unique(rows)) >= 11 and len(np.unique(columns)) >= 12
    assert near(drawn, INK, 40).sum() > 5  # dark on cyan
    assert abs(rows.min() - y) <= 12 and columns.min() <= x + 1 and columns.max() < 100


@pytest.mark.parametrize("box", [(100, 0, 120, 50), (-9, 5, 0, 50), (5, -9, 50, 0), (5, 100, 50, 120),
                                 (50, 5, 20, 30), (5, 50, 30, 20), (math.nan, 5, 30, 20), (5, 5, 30, math.nan)])
def test_boxes_beyond_the_picture_inverted_or_nan_are_not_drawn(box):
    np.testing.assert_array_equal(draw_boxes(grey(), [box], [0], ["cat"], [0.5]), grey())


@pytest.mark.parametrize("empty", [[], np.zeros((0, 4)), torch.zeros(0, 4)])
def test_no_boxes(empty):
    np.testing.assert_array_equal(draw_boxes(grey(), empty, [], []), grey())
    np.testing.assert_array_equal(draw_boxes(grey(), empty, [], [], []), grey())


def test_higher_scores_lie_on_top():
    boxes, names = torch.tensor([[20, 40, 60, 80], [30, 40, 70, 80.0]]), ["a", "b"]
    shared = (79, slice(31, 59))  # the lower edge of both
    for scores, top in (((0.9, 0.2), 0), ((0.2, 0.9), 1), (None, 1)):
        drawn = draw_boxes(grey(), boxes, torch.tensor([0, 1]), names, scores)
        assert (drawn[shared] == PALETTE[top]).all()
        assert (drawn[36, 40:50] != 120).any()


def test_colours_wrap_and_odd_names_are_drawn(texts):
    for k in (0, 19, 20, 45):
        assert (draw_boxes(grey(), [[5, 20, 95, 90]], [k], ["x"] * 80)[89, 20:80] == PALETTE[k % 20]).all()
    texts.clear()
    for k in range(8):
        drawn = draw_boxes(grey(), [[5, 20, 95, 90]], [k], ODD, [0.5])
        assert (drawn[89, 20:80] == PALETTE[k]).all() and (drawn[:20] != 120).any()
    assert texts[1:] == ["Muller 0.50", "class 2 0.50", "two lines 0.50", " 0.50", "50% 0.50", "class 6 0.50",
                         "class 7 0.50"]


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (200, 3), (8, 8)])
def test_tiny_pictures(shape):
    assert draw_boxes(grey(*shape), [[0, 0, 300, 300]], [0], ["cat"], [0.5]).shape == (*shape, 3)


def test_tags_of_a_few_neighbours_are_all_there_and_of_a_crowd_some(texts):
    stack = np.array([[100, 100, 300, 300]] * 4)
    draw_boxes(grey(400, 400), stack, range(4), list("abcd"), [0.1, 0.2, 0.3, 0.4])
    assert texts == ["d 0.40", "c 0.30", "b 0.20", "a 0.10"]  # above, inside, below, inside at the bottom
    texts.clear()
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 380, (400, 2))
    boxes, classes = np.concatenate([corner, corner + 8], 1), rng.integers(0, 20, 400)
    scores = rng.permutation(400) / 400
    drawn = draw_boxes(grey(400, 400), boxes, classes, ["some name"] * 20, scores)
    assert 5 < len(texts) < 60 and texts[0] == "some name 1.00"
    plain = grey(400, 400)
    for i in np.argsort(scores):
        x1, y1, x2, y2 = np.rint(boxes[i]).astype(int)
        outline(plain, x1, y1, x2, y2, PALETTE[classes[i]])
    assert 0.1 < (drawn != plain).any(-1).mean() < 0.2


def test_tags_do_not_cover_each_other(monkeypatch):
    spans, real = [], pictures_det.ImageDraw.Draw

    def draw(*args):
        canvas = real(*args)
        inner = canvas.rectangle

        def rectangle(xy, fill=None, **options):
            if fill is not None:  # a tag; outlines have none
                spans.append(xy)
            inner(xy, fill, **options)
        canvas.rectangle = rectangle
        return canvas
    monkeypatch.setattr(pictures_det.ImageDraw, "Draw", draw)
    corner = np.random.default_rng(1).uniform(-30, 400, (60, 2))
    draw_boxes(grey(400, 400), np.concatenate([corner, corner + 60], 1), np.arange(60), ["cat"] * 60)
    cover = np.zeros((400, 400), int)
    for x1, y1, x2, y2 in spans:
        assert 0 <= x1 < x2 < 400 and 0 <= y1 < y2 < 400
        cover[y1:y2 + 1, x1:x2 + 1] += 1
    assert len(spans) > 20 and cover.max() == 1


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
    assert swatches == [121, 121, 0]  # class 2 was below the score
    detection_sheet(tmp_path / "b.png", images, truths, predictions, names=["a", "b", "c"], max_side=100, score=0.125)
    assert near(read(tmp_path / "b.png")[-22:], PALETTE[2], 0).sum() == 121


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
    nothing = [torch.zeros(0, 5), []], [[], torch.zeros(0, 6)]
    detection_sheet(tmp_path / "a.png", images, *nothing, names=[], max_side=32)
    np.testing.assert_array_equal(read(tmp_path / "a.png")[30:62, 8:40], to_rgb(images[0]))
    boxes = torch.cat([torch.rand(80, 2) * 10, torch.rand(80, 2) * 10 + 15, torch.arange(80.0)[:, None]], 1)
    detection_sheet(tmp_path / "b.png", images.bfloat16(), [boxes, boxes], names=["x"] * 80, max_side=64)
    assert read(tmp_path / "b.png").shape[0] == 2 * (64 + 8) + 8  # colours repeat: no legend


# ---- pr_curves -------------------------------------------------------------------------------------------------------
RECALL = np.linspace(0, 1, 101)
AREA = 68, 48, 588, 468


def at(picture, recall, precision):
    """The pixels around a place of the plot: (5, 5, 3)."""
    x, y = AREA[0] + recall * (AREA[2] - AREA[0]), AREA[3] - precision * (AREA[3] - AREA[1])
    return picture[round(y) - 2:round(y) + 3, round(x) - 2:round(x) + 3]


def test_curves_stand_where_they_must(tmp_path, texts):
    precision = np.stack([np.full(101, 0.9), 1 - RECALL, np.full(101, np.nan), np.full(101, 0.1)])
    pr_curves(tmp_path / "a.png", torch.from_numpy(RECALL), precision, ["a", "b", "c", "d"], [0.9, 0.5, math.nan, 0.1])
    picture = read(tmp_path / "a.png")
    for recall in (0.11, 0.33, 0.71, 0.93):
        assert near(at(picture, recall, 0.9), np.array(PALETTE[0]) * 0.89, 60).any()
        assert near(at(picture, recall, 1 - recall), PALETTE[1], 60).any()
        assert near(at(picture, recall, 0.1), np.array(PALETTE[3]) * 0.83, 60).any()
        assert near(at(picture, recall, (2 - recall) / 3), INK, 30).sum() >= 8  # the mean of three, bold
        assert (at(picture, recall, 0.95) == 255).all()
    assert not near(picture, PALETTE[2], 40).any()
    legend = texts[texts.index("AP50") + 1:]
    assert legend == ["mean of 3 classes", "0.500", "a", "0.900", "b", "0.500", "d", "0.100"]


def test_one_class_has_no_mean_and_none_says_so(tmp_path, texts):
    pr_curves(tmp_path / "a.png", RECALL, np.full((1, 101), 0.5), ["ship"], [0.5])
    assert texts[-2:] == ["ship", "0.500"] and not any("mean" in text for text in texts)
    for precision, names, ap50 in (([], [], []), (np.full((2, 101), np.nan), ["a", "b"], [math.nan] * 2)):
        pr_curves(tmp_path / "b.png", RECALL, precision, names, ap50)
        assert texts[-1] == "no class has truth"
        assert not near(read(tmp_path / "b.png"), LINE).any()


def test_of_many_classes_the_lowest_are_named(tmp_path, texts):
    ap50 = np.random.default_rng(0).permutation(80) / 100
    names = [f"class-{round(100 * v)}" for v in ap50]
    pr_curves(tmp_path / "a.png", RECALL, np.repeat(ap50[:, None], 101, 1), names, torch.tensor(ap50).float())
    legend = texts[texts.index("AP50") + 1:]
    assert legend[::2] == ["mean of 80 classes"] + [f"class-{k}" for k in range(19, -1, -1)]
    assert legend[1] == f"{np.mean(ap50):.3f}"
    picture = read(tmp_path / "a.png")
    assert near(at(picture, 0.5, 0.7), (205, 210, 217), 12).any()  # one of the others
    assert not near(at(picture, 0.5, 0.9), (205, 210, 217), 12).any()
    assert picture[:, 610].min() < 230 and (picture[:, -15:] == 255).all() and (picture[-8:] == 255).all()


def test_gaps_and_odd_names_in_curves(tmp_path, texts):
    precision = np.full((6, 101), 0.5)
    precision[0, :50], precision[1, 50:] = np.nan, np.nan
    precision[2, 1:] = np.nan  # one point is no line
    pr_curves(tmp_path / "a.png", RECALL, precision, ODD, [0.1] * 6)
    picture = read(tmp_path / "a.png")
    assert "Muller" in texts and "class 2" in texts and (picture[:, -15:] == 255).all()
    for recall in (0.25, 0.75):  # the mean of those that are there
        assert near(at(picture, recall, 0.5), INK, 30).sum() >= 8


# ---- confusion_matrix ------------------------------------------------------------------------------------------------
def cells(picture, count, left):
    """The colour in the upper left corner of each cell, below its text: (count, count, 3)."""
    cell = max(3, min(96, 880 // count))
    places = np.arange(count) * cell + min(3, cell // 2)
    return picture[48 + places][:, left + places].astype(int)


def left_edge(picture):
    """The matrix's first column: a line of the grid's colour from row 48 on."""
    return int(np.argmax((near(picture, (232, 235, 239), 0)[48:140]).all(0)))


def test_matrix_colours_are_shares_of_the_row(tmp_path, texts):
    matrix = np.array([[90, 10, 0, 0], [200, 200, 200, 200], [0, 0, 0, 0], [0, 0, 5, 0]])
    confusion_matrix(tmp_path / "a.png", torch.from_numpy(matrix), ["a", "b", "c"])
    picture = read(tmp_path / "a.png")
    colour = cells(picture, 4, left_edge(picture))
    white = (colour == 255).all(-1)
    np.testing.assert_array_equal(white, matrix == 0)
    assert (colour[3, 2] == BEST).all() and near(colour[0, 0], LINE, 25)  # all of the row; nine tenths of it
    assert (colour[1, 0] == colour[1, 2]).all() and (colour[1, 0] == colour[1, 3]).all()
    assert colour[1, 1, 2] > colour[1, 1, 0] and colour[1, 0, 0] > colour[1, 0, 2]  # right: blue; wrong: orange
    assert colour[0, 1].sum() > colour[1, 0].sum() > colour[3, 2].sum()  # the larger the share, the darker
    bar = picture[48:348, left_edge(picture) + 4 * 96 + 24:][:, :20]  # 100 % at the top
    assert (bar[0, :10] == LINE).all() and (bar[0, 10:] == BEST).all() and (bar[-1] == 255).all()
    assert [t for t in texts if t.isdigit()] == ["90", "10", "200", "200", "200", "200", "5"]
    assert [t for t in texts[:14] if "%" in t] == ["90%", "10%", "25%", "25%", "25%", "25%", "100%"]
    for name in ("a", "b", "c", "background"):
        assert texts.count(name) == 2
    assert "truth" in texts and "prediction" in texts
    texts.clear()
    confusion_matrix(tmp_path / "b.png", matrix * 7, ["a", "b", "c"])
    np.testing.assert_array_equal(cells(read(tmp_path / "b.png"), 4, left_edge(picture)), colour)


@pytest.mark.parametrize("classes", [0, 1, 2, 14, 30, 80, 400])
def test_matrices_of_any_size(tmp_path, texts, classes):
    matrix = np.random.default_rng(0).integers(0, 100, (classes + 1, classes + 1))
    matrix[0, 0] = 0
    names = [f"n{k}" for k in range(classes)]
    confusion_matrix(tmp_path / "a.png", matrix, names)
    picture = read(tmp_path / "a.png")
    assert 200 < picture.shape[1] < 1500 and picture.shape[0] < 1500
    assert sum(texts.count(name) for name in names) == 2 * (classes if classes <= 80 else 100)  # every fourth of 400
    assert len([text for text in texts if text.isdigit()]) == (np.count_nonzero(matrix) if classes <= 30 else 0)
    if 0 < classes <= 80:
        colour = cells(picture, classes + 1, left_edge(picture))
        assert ((colour == 255).all(-1) == (matrix == 0)).all()


def test_counts_that_do_not_fit_are_left_out(tmp_path, texts):
    matrix = np.full((41, 41), 7)
    matrix[3, 4] = 123456
    confusion_matrix(tmp_path / "a.png", matrix, ["x"] * 40)
    assert texts.count("7") == 41 * 41 - 1 and "123456" not in texts


def test_long_and_odd_names_of_a_matrix(tmp_path, texts):
    confusion_matrix(tmp_path / "a.png", np.ones((7, 7)), ODD)
    assert read(tmp_path / "a.png").shape[1] < 1300 and texts.count("Muller") == 2 and texts.count("class 2") == 2


# ---- label_statistics ------------------------------------------------------------------------------------------------
def blue(picture):
    return near(picture, LINE, 0)


def test_statistics_of_known_labels(tmp_path, texts):
    # 40 boxes of 10 x 20 % around (0.9, 0.1) of wide images, three images without any
    box = [[850.0, 0, 950, 40]] * 10
    boxes, classes = [torch.tensor(box)] * 4 + [[]] * 3, [torch.tensor([0] * 7 + [2] * 3)] * 4 + [[]] * 3
    label_statistics(tmp_path / "a.png", boxes, classes, [(200, 1000)] * 7, ["a", "b", "c"])
    picture = read(tmp_path / "a.png")
    centres, sizes, images = picture[48:349, 500:801], picture[48:349, 900:1201], picture[448:648, 500:1201]
    rows, columns = np.nonzero(blue(centres))
    assert 0.85 < columns.min() / 300 < 0.9 <= columns.max() / 300 < 1
    assert rows.min() <= 0.1 * 300 <= rows.max() < 0.26 * 300
    rows, columns = np.nonzero(blue(sizes))  # the axes begin at 10 %: width 10 -> 0, height 20 -> 0.30 from below
    assert columns.min() <= 1 and columns.max() < 45 and rows.min() <= (1 - 0.301) * 300 <= rows.max()
    bars = [blue(images)[:, x].sum() for x in (round((n + 0.5) / 11 * 700) for n in range(11))]
    assert bars[1:10] == [0] * 9 and bars[0] / bars[10] == pytest.approx(3 / 4, abs=0.02)
    lengths = [blue(picture[:, 150:400])[48 + 34 * i + 17].sum() for i in range(3)]
    assert lengths[1] / lengths[0] == pytest.approx(12 / 28, abs=0.02) and lengths[2] == 0
    shown = [text for text in texts if text in ("a", "b", "c", "28", "12")]
    assert shown[:5] == ["a", "28", "c", "12", "b"]  # most frequent first; class b never
    assert {"2 of 3 classes", "40 boxes", "median 10 x 20 %", "mean 5.71, most 10, none in 3"} <= set(texts)


def test_statistics_of_small_and_empty_boxes(tmp_path, texts):
    tiny = np.array([[500, 500, 502, 505]] * 99 + [[3, 3, 3, 9]], float)  # 0.2 x 0.5 %, and one without area
    label_statistics(tmp_path / "a.png", [tiny], [np.zeros(100, int)], [(1000, 1000)], ["a"])
    assert "median 0.2 x 0.5 %, 1 empty" in texts and "0.1" in texts and "0.01" not in texts
    rows, columns = np.nonzero(blue(read(tmp_path / "a.png")[48:349, 900:1201]))  # decades 0.1 ... 100
    x, y = (math.log10(v / 0.1) / 3 * 300 for v in (0.2, 0.5))
    assert columns.min() <= x <= columns.max() and 300 - rows.max() <= y <= 301 - rows.min() and len(rows) < 45 ** 2


@pytest.mark.parametrize("classes, images", [(0, 0), (3, 0), (1, 5), (80, 50), (400, 50)])
def test_statistics_of_any_size(tmp_path, texts, classes, images):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 900 if classes == 80 else 3, images) if classes > 1 else [0] * images
    boxes = [rng.uniform(-50, 700, (n, 2)).repeat(2, 1)[:, [0, 2, 1, 3]] + (-9, -9, 9, 9) for n in counts]
    names = [f"n{k}" for k in range(classes)]
    label_statistics(tmp_path / "a.png", boxes, [rng.integers(0, max(1, classes), n) for n in counts],
                     [(640, 640)] * images, names)
    picture = read(tmp_path / "a.png")
    assert picture.shape[1] == 1240 and 700 <= picture.shape[0] <= 860
    assert sum(name in texts for name in names) == (classes if classes <= 80 else 80)  # of 400 every fifth
    if classes == 80:
        assert any("in steps of" in text for text in texts)


def test_statistics_of_odd_names_and_numbers(tmp_path, texts):
    label_statistics(tmp_path / "a.png", [[[0, 0, 9, 9]] * 2], [[1, 7]], [(10, 10)], ODD)
    assert "Muller" in texts and "class 2" in texts and "class 7" in texts  # a class beyond the names is shown too
    assert (read(tmp_path / "a.png")[:, :8] == 255).all()


# ---- files -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("write", [
    lambda path: detection_sheet(path, *scene(), names=["a", "b", "c"]),
    lambda path: pr_curves(path, RECALL, np.full((1, 101), 0.5), ["a"], [0.5]),
    lambda path: confusion_matrix(path, np.eye(3), ["a", "b"]),
    lambda path: label_statistics(path, [[[0, 0, 9, 9]]], [[0]], [(10, 10)], ["a"])],
    ids=["sheet", "curves", "matrix", "labels"])
def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch, write):
    path = tmp_path / "new" / "a.png"
    write(path)
    first = path.read_bytes()

    def full(self, where, *args, **options):
        with open(where, "wb") as file:
            file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="a.png: cannot be written"):
        write(path)
    assert path.read_bytes() == first and [file.name for file in path.parent.iterdir()] == ["a.png"]
