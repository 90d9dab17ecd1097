"""utils/pictures/charts.py and plots.py: curves and heat maps pixel by pixel, and the texts that go with them."""
import errno
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw

from utils.errors import UserError
from utils.pictures.charts import confusion_matrix, label_statistics, plot_curves, pr_curves
from utils.pictures.plots import BEST, GRID, LINE, ticks
from utils.pictures.sheets import INK, PALETTE

pytestmark = pytest.mark.filterwarnings("error")
ODD = ["a name that is much longer than any picture is wide " * 4, "Müller", "飞机", "two\nlines", "", "50%"]
AXES, PANEL = (58, 48, 384, 240), (400, 270)  # left, top, right, bottom of a curve's axes; the size of its picture


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
    """(H, W) bool: pixels within `tolerance` of the colour in every channel."""
    return (np.abs(picture.astype(int) - np.array(colour, int)) <= tolerance).all(-1)


# ---- results.png -----------------------------------------------------------------------------------------------------
def place(xs, ys, i):
    """(column, row) where point i must be drawn: the data's range plus 6 % on each side, y upwards."""
    left, top, right, bottom = AXES
    (x0, x1), (y0, y1) = [(v.min() - 0.06 * np.ptp(v), v.max() + 0.06 * np.ptp(v)) for v in (xs, ys)]
    return left + (xs[i] - x0) / (x1 - x0) * (right - left), bottom - (ys[i] - y0) / (y1 - y0) * (bottom - top)


def test_curve_passes_where_the_values_demand(tmp_path):
    xs, ys = np.arange(1.0, 8), np.array([3.0, 9, 1, 4, 4, 8, 2])
    plot_curves(tmp_path / "a.png", [{"epoch": int(x), "loss": y} for x, y in zip(xs, ys)])
    picture = read(tmp_path / "a.png")
    assert picture.shape == (PANEL[1], PANEL[0], 3)
    blue = near(picture, LINE, 8)
    points = [place(xs, ys, i) for i in range(7)]
    for column, row in points:
        assert blue[round(row), round(column)]
    for (ax, ay), (bx, by) in zip(points, points[1:]):  # the line between them, at its middle
        column, row = round((ax + bx) / 2), round((ay + by) / 2)
        assert near(picture[row - 1:row + 2, column - 1:column + 2], LINE, 60).any()
    assert blue.sum() < 0.03 * blue.size  # and nothing is filled
    rows, columns = np.nonzero(blue)
    assert abs(columns[rows.argmin()] - points[1][0]) < 4  # the largest value is on top, the smallest at the bottom
    assert abs(columns[rows.argmax()] - points[2][0]) < 4


@pytest.mark.parametrize("hole", [math.nan, math.inf, -math.inf, "missing"])
def test_gaps_where_a_value_is_not_finite(tmp_path, hole):
    rows = [{"epoch": e, "loss": 1.0} for e in range(9)]
    rows[4]["loss"] = hole
    if hole == "missing":
        del rows[4]["loss"]
    plot_curves(tmp_path / "a.png", rows)
    columns = np.flatnonzero(near(read(tmp_path / "a.png"), LINE).any(0))
    left, _, right, _ = AXES
    step = (right - left) / 1.12 / 8
    holes = np.flatnonzero(np.diff(columns) > 1)
    assert len(holes) == 1 and 2 * step - 10 < np.diff(columns)[holes[0]] < 2 * step
    assert (columns[holes[0]] + columns[holes[0] + 1]) / 2 == pytest.approx((left + right) / 2, abs=1.5)


def test_an_isolated_value_is_a_dot(tmp_path):
    plot_curves(tmp_path / "a.png", [{"epoch": e, "loss": 1.0 if e in (0, 2, 3) else math.nan} for e in range(5)])
    columns = np.flatnonzero(near(read(tmp_path / "a.png"), LINE).any(0))
    runs = np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1)
    assert len(runs) == 2 and 2 <= len(runs[0]) <= 9 and len(runs[1]) > 50


@pytest.mark.parametrize("key", ["val/iou", "kappa", "minus_loss"])
def test_the_best_value_of_the_score_is_marked(tmp_path, key, texts):
    xs, ys = np.arange(5.0), np.array([5.0, 1, 9, 4, 6])
    rows = [{"epoch": x, key: y} for x, y in zip(xs, ys)] + [{"epoch": 4, key: math.nan}]
    plot_curves(tmp_path / "a.png", rows, key)
    rows_, columns = np.nonzero(near(read(tmp_path / "a.png")[AXES[1]:AXES[3]], BEST, 10))
    column, row = place(xs, ys, 2)
    assert (columns.mean(), rows_.mean() + AXES[1]) == pytest.approx((column, row), abs=1)
    assert "best 9 at 2" in texts and not any("last" in text for text in texts)
    plot_curves(tmp_path / "b.png", rows, "another")
    assert not near(read(tmp_path / "b.png"), BEST, 10).any() and texts[-2:] == ["last 6", key]


def test_one_plot_per_column_at_most_four_abreast(tmp_path):
    plot_curves(tmp_path / "a.png", [{"epoch": 3, "loss": 1.0, "lr": 1e-3, **{f"part{i}": i for i in range(4)}}])
    picture = read(tmp_path / "a.png")
    assert picture.shape == (2 * PANEL[1], 4 * PANEL[0], 3)
    dots = [near(picture[PANEL[1] * r:PANEL[1] * (r + 1), PANEL[0] * c:PANEL[0] * (c + 1)], LINE).any()
            for r in range(2) for c in range(4)]
    assert dots == [True] * 6 + [False] * 2
    assert (picture[PANEL[1]:, 2 * PANEL[0]:] == 255).all()


@pytest.mark.parametrize("values", [[math.nan], [math.inf, -math.inf], [0.0], [1e-300] * 2, [1e30, -1e30],
                                    [5] * 3, [1e9, 1e9 + 1], [0.1 + 1e-12, 0.1], [-1e-8, 1e-8]])
def test_odd_values_are_drawn(tmp_path, values):
    plot_curves(tmp_path / "a.png", [{"epoch": 1 + i, "iou": value} for i, value in enumerate(values)], "iou")
    picture = read(tmp_path / "a.png")
    assert near(picture, GRID, 0).any() and near(picture, BEST, 0).any() == np.isfinite(values).any()


@pytest.mark.parametrize("low, high", [(0, 1), (-0.06, 1.06), (0.123, 0.129), (-5e-5, 1e-3), (1e6, 9e6), (-3, -1),
                                       (0.9, 0.90013), (41.3, 97.2), (1e-12, 2e-12)])
def test_ticks_are_three_to_five_round_numbers(low, high):
    for scale in (1, 1.3, 1.7, 2.9, 4.1, 7.3):
        found = ticks(low * scale, high * scale)
        values = np.array([float(label) for _, label in found])
        assert 3 <= len(found) <= 5
        assert values == pytest.approx([value for value, _ in found], rel=1e-6, abs=1e-9 * high)
        assert np.all(values >= low * scale - 1e-15) and np.all(values <= high * scale + 1e-15)
        steps = np.diff(values)
        assert steps == pytest.approx(steps[0], rel=1e-3)
        assert f"{steps[0]:.3e}"[:5] in ("1.000", "2.000", "2.500", "5.000")


def test_epoch_ticks_are_whole(tmp_path, texts):
    plot_curves(tmp_path / "a.png", [{"epoch": 1, "iou": 0.5}, {"epoch": 2, "iou": 0.7}], "iou")
    assert [text for text in texts if text] == ["0.5", "0.6", "0.7", "1", "2", "best 0.7 at 2", "iou"]
    assert [label for _, label in ticks(0.94, 2.06, whole=True)] == ["1", "2"]
    assert [label for _, label in ticks(-8.0, 159.0, whole=True)] == ["0", "50", "100", "150"]


# ---- pr_curves -------------------------------------------------------------------------------------------------------
RECALL = np.linspace(0, 1, 101)
AREA = 58, 48, 578, 468


def at(picture, recall, precision):
    """The pixels around a place of the plot: (5, 5, 3)."""
    x, y = AREA[0] + recall * (AREA[2] - AREA[0]), AREA[3] - precision * (AREA[3] - AREA[1])
    return picture[round(y) - 2:round(y) + 3, round(x) - 2:round(x) + 3]


def legend(texts):
    """{class: AP50}"""
    names, values = texts.index("class") + 1, texts.index("AP50") + 1
    return dict(zip(texts[names:values - 1], texts[values:]))


def test_curves_stand_where_they_must(tmp_path, texts):
    precision = np.stack([np.full(101, 0.9), 1 - RECALL, np.full(101, np.nan), np.full(101, 0.1)])
    pr_curves(tmp_path / "a.png", RECALL, precision, ["a", "b", "c", "d"], [0.9, 0.5, math.nan, 0.1])
    picture = read(tmp_path / "a.png")
    for recall in (0.11, 0.33, 0.71, 0.93):
        for k, value in enumerate((0.9, 1 - recall, 0.1)):
            assert near(at(picture, recall, value), PALETTE[k] * 0.75, 40).any()
        assert near(at(picture, recall, (2 - recall) / 3), INK, 30).sum() >= 8  # the mean of three, bold
        assert (at(picture, recall, 0.95) == 255).all()
    assert not near(picture, PALETTE[3] * 0.75, 20).any()  # there are three
    assert legend(texts) == {"a": "0.9", "b": "0.5", "d": "0.1", "mean of 3 classes": "0.5"}


def test_one_class_has_no_mean_and_none_says_so(tmp_path, texts):
    pr_curves(tmp_path / "a.png", RECALL, np.full((1, 101), 0.5), ["ship"], [0.5])
    assert legend(texts) == {"ship": "0.5"}
    texts.clear()
    pr_curves(tmp_path / "b.png", RECALL, np.full((2, 101), np.nan), ["a", "b"], [math.nan] * 2)
    assert "class" not in texts


def test_of_many_classes_the_lowest_are_named(tmp_path, texts):
    ap50 = np.random.default_rng(0).permutation(80) / 100
    names = [f"class-{round(100 * v)}" for v in ap50]
    pr_curves(tmp_path / "a.png", RECALL, np.repeat(ap50[:, None], 101, 1), names, list(ap50))
    shown = legend(texts)
    assert list(shown) == [f"class-{k}" for k in range(19, -1, -1)] + ["mean of 80 classes"]
    assert shown["mean of 80 classes"] == f"{np.mean(ap50):.4g}"
    picture = read(tmp_path / "a.png")
    assert near(at(picture, 0.5, 0.7), (205, 210, 217), 12).any()  # one of the others
    assert not near(at(picture, 0.5, 0.9), (205, 210, 217), 12).any()
    assert (picture[:, -8:] == 255).all() and (picture[-5:] == 255).all()


def test_odd_names_of_curves(tmp_path, texts):
    pr_curves(tmp_path / "a.png", RECALL, np.full((6, 101), 0.5), ODD, [0.1] * 6)
    picture = read(tmp_path / "a.png")
    assert "Muller" in texts and "class 2" in texts and (picture[:, -8:] == 255).all() and picture.shape[1] < 1100


# ---- confusion_matrix ------------------------------------------------------------------------------------------------
def cells(picture, count, left):
    """The colour in the upper left corner of each cell, below its text: (count, count, 3)."""
    cell = max(3, min(96, 880 // count))
    places = np.arange(count) * cell + min(3, cell // 2)
    return picture[48 + places][:, left + places].astype(int)


def test_matrix_colours_are_shares_of_the_row(tmp_path, texts):
    matrix = np.array([[90, 10, 0, 0], [200, 200, 200, 200], [0, 0, 0, 0], [0, 0, 5, 0]])
    confusion_matrix(tmp_path / "a.png", matrix, ["a", "b", "c"])
    picture = read(tmp_path / "a.png")
    colour = cells(picture, 4, 170)
    white = (colour == 255).all(-1)
    np.testing.assert_array_equal(white, matrix == 0)
    assert (colour[3, 2] == BEST).all() and near(colour[0, 0], LINE, 25)  # all of the row; nine tenths of it
    assert (colour[1, 0] == colour[1, 2]).all() and (colour[1, 0] == colour[1, 3]).all()
    assert colour[1, 1, 2] > colour[1, 1, 0] and colour[1, 0, 0] > colour[1, 0, 2]  # right: blue; wrong: orange
    assert colour[0, 1].sum() > colour[1, 0].sum() > colour[3, 2].sum()  # the larger the share, the darker
    assert [t for t in texts if t in ("90", "10", "200", "5")] == ["90", "10"] + ["200"] * 4 + ["5"]
    assert [text for text in texts if text in ("a  0", "b  1", "c  2", "background  3", *"0123")] == [
        "a  0", "b  1", "c  2", "background  3", *"0123"]
    texts.clear()
    confusion_matrix(tmp_path / "b.png", matrix * 7, ["a", "b", "c"])
    np.testing.assert_array_equal(cells(read(tmp_path / "b.png"), 4, 170), colour)


@pytest.mark.parametrize("classes", [1, 2, 14, 30, 80, 400])
def test_matrices_of_any_size(tmp_path, texts, classes):
    matrix = np.random.default_rng(0).integers(0, 100, (classes + 1, classes + 1))
    matrix[0, 0] = 0
    names = [f"n{k}" for k in range(classes)]
    confusion_matrix(tmp_path / "a.png", matrix, names)
    picture = read(tmp_path / "a.png")
    assert 200 < picture.shape[1] < 1500 and picture.shape[0] < 1500
    shown = [k for k in range(classes + 1) if classes <= 80 or k % 3 == 0]  # every third of 400
    assert [text for text in texts if text.split("  ")[0] in (*names, "background")] == [
        f"{name}  {k}" for k, name in enumerate([*names, "background"]) if k in shown]
    counts = [text for text in texts if text.isdigit()]
    assert len(counts) == len(shown) + (np.count_nonzero(matrix) if classes <= 30 else 0)
    if 0 < classes <= 80:
        colour = cells(picture, classes + 1, 170)
        assert ((colour == 255).all(-1) == (matrix == 0)).all()


def test_counts_that_do_not_fit_are_left_out(tmp_path, texts):
    matrix = np.full((41, 41), 7)
    matrix[3, 4] = 123456
    confusion_matrix(tmp_path / "a.png", matrix, ["x"] * 40)
    assert texts.count("7") == 41 * 41 - 1 + 1 and "123456" not in texts  # and the column of class 7


def test_long_and_odd_names_of_a_matrix(tmp_path, texts):
    confusion_matrix(tmp_path / "a.png", np.ones((7, 7)), ODD)
    assert read(tmp_path / "a.png").shape[1] < 1300 and "Muller  1" in texts and "class 2  2" in texts


# ---- label_statistics ------------------------------------------------------------------------------------------------
def blue(picture):
    return near(picture, LINE, 0)


def inside(picture, left, top, width, height):
    """The part of the statistics inside the axes of one plot."""
    return picture[top:top + height + 1, left:left + width + 1]


def test_statistics_of_known_labels(tmp_path, texts):
    # 40 boxes of 10 x 20 % around (0.9, 0.1) of wide images, three images without any
    box = [[850.0, 0, 950, 40]] * 10
    boxes, classes = [np.array(box)] * 4 + [np.zeros((0, 4))] * 3, [np.array([0] * 7 + [2] * 3)] * 4 + [np.zeros(0)] * 3
    label_statistics(tmp_path / "a.png", boxes, classes, [(200, 1000)] * 7, ["a", "b", "c"])
    picture = read(tmp_path / "a.png")
    left = picture.shape[1] - 2 * (58 + 300 + 16) + 58  # of the centres: behind the table of classes
    centres, sizes = inside(picture, left, 48, 300, 300), inside(picture, left + 300 + 16 + 58, 48, 300, 300)
    rows, columns = np.nonzero(blue(centres))
    assert 0.85 < columns.min() / 300 < 0.9 <= columns.max() / 300 < 1
    assert rows.min() <= 0.1 * 300 <= rows.max() < 0.26 * 300
    rows, columns = np.nonzero(blue(sizes))  # four decades, 0.01 to 100 %: width 10 -> 0.75, height 20 -> 0.83
    assert columns.min() <= 0.75 * 300 <= columns.max() + 1 and len(columns) < 40 ** 2
    assert rows.min() <= (1 - 0.825) * 300 <= rows.max()
    assert "2 of 3 classes occur" in texts
    assert [text for text in texts if text in ("a", "c", "b")] == ["a", "c", "b"]  # most frequent first
    place = texts.index("boxes")
    assert texts[place + 1:place + 4] == ["28", "12", "0"]
    squares = [tuple(picture[8 + 22 * (2 + r) + 11, 8 + 5].tolist()) for r in range(3)]  # the more, the darker
    assert squares[0] == LINE and sum(squares[0]) < sum(squares[1]) < sum(squares[2]) == 3 * 255
    assert {"40 boxes, 7 images", "median 10 x 20, 0 empty"} <= set(texts)


def test_statistics_of_small_and_empty_boxes(tmp_path, texts):
    tiny = np.array([[500, 500, 502, 505]] * 99 + [[3, 3, 3, 9]], float)  # 0.2 x 0.5 %, and one without area
    label_statistics(tmp_path / "a.png", [tiny], [np.zeros(100, int)], [(1000, 1000)], ["a"])
    assert "median 0.2 x 0.5, 1 empty" in texts and "0.1" in texts and "0.01" in texts
    picture = read(tmp_path / "a.png")
    rows, columns = np.nonzero(blue(inside(picture, picture.shape[1] - 316, 48, 300, 300)))
    x, y = (math.log10(v / 0.01) / 4 * 300 for v in (0.2, 0.5))
    assert columns.min() <= x <= columns.max() and 300 - rows.max() <= y <= 301 - rows.min() and len(rows) < 45 ** 2


@pytest.mark.parametrize("classes, images", [(1, 1), (3, 2), (1, 5), (80, 50), (400, 50)])
def test_statistics_of_any_size(tmp_path, texts, classes, images):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 900 if classes == 80 else 3, images) if classes > 1 else [0] * images  # no box at all
    boxes = [rng.uniform(-50, 700, (n, 2)).repeat(2, 1)[:, [0, 2, 1, 3]] + (-9, -9, 9, 9) for n in counts]
    names = [f"n{k}" for k in range(classes)]
    label_statistics(tmp_path / "a.png", boxes, [rng.integers(0, classes, n) for n in counts], [(640, 640)] * images,
                     names)
    picture = read(tmp_path / "a.png")
    assert 800 < picture.shape[1] < 1000 and 370 <= picture.shape[0] <= 740
    assert sum(text in names for text in texts) == min(classes, 30)


def test_statistics_of_odd_names_and_numbers(tmp_path, texts):
    label_statistics(tmp_path / "a.png", [[[0, 0, 9, 9]] * 2], [[1, 7]], [(10, 10)], ODD)
    assert {"Muller", "class 2", "class 7"} <= set(texts)  # a class beyond the names is shown too
    assert (read(tmp_path / "a.png")[:, :3] == 255).all()


# ---- files -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("write", [
    lambda path: plot_curves(path, [{"epoch": 1, "loss": 1}]),
    lambda path: pr_curves(path, RECALL, np.full((1, 101), 0.5), ["a"], [0.5]),
    lambda path: confusion_matrix(path, np.eye(3), ["a", "b"]),
    lambda path: label_statistics(path, [[[0, 0, 9, 9]]], [[0]], [(10, 10)], ["a"])],
    ids=["curves", "precision", "matrix", "labels"])
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
