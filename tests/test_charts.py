"""utils/pictures/charts.py: curves pixel by pixel, and the texts that go with them."""
import errno
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw

from utils.errors import UserError
from utils.pictures.charts import BEST, GRID, LINE, plot_curves

pytestmark = pytest.mark.filterwarnings("error")
AXES, PANEL = (68, 48, 384, 240), (400, 270)  # left, top, right, bottom of a curve's axes; the size of its picture


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
    assert near(picture, GRID, 8).any() and near(picture, BEST, 0).any() == np.isfinite(values).any()


def test_the_ends_of_the_axes_are_written(tmp_path, texts):
    rows = [{"epoch": 1, "iou": 0.5}, {"epoch": 2, "iou": math.nan}, {"epoch": 3, "iou": 0.71234}]
    plot_curves(tmp_path / "a.png", rows, "iou")
    assert [text for text in texts if text] == ["0.5", "0.712", "1", "3", "best 0.7123 at 3", "iou"]
    picture, (_, bottom), (_, top) = read(tmp_path / "a.png"), *(place(np.array([1.0, 3]), np.array([0.5, 0.71234]), i)
                                                                 for i in (0, 1))
    rows = np.flatnonzero(near(picture[:, AXES[0] + 2:AXES[2] - 2], GRID, 8).mean(1) > 0.5)
    assert {round(top), round(bottom)} <= {*rows, *(rows + 1)}


# ---- files -----------------------------------------------------------------------------------------------------------
def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path, rows = tmp_path / "new" / "a.png", [{"epoch": 1, "loss": 1}]
    plot_curves(path, rows)
    first = path.read_bytes()

    def full(self, where, *args, **options):
        with open(where, "wb") as file:
            file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="a.png: cannot be written"):
        plot_curves(path, rows)
    assert path.read_bytes() == first and [file.name for file in path.parent.iterdir()] == ["a.png"]
