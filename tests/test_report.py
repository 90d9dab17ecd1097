"""utils/pictures/charts.py: the cells, the pixels of the curves and the calls of the loggers."""
import csv
import math
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from utils.pictures import charts
from utils.errors import UserError
from utils.pictures.charts import AXES, BEST, GRID, LINE, PANEL, make_loggers, plot_curves, write_csv


def read(path):
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return np.array(image)


def near(picture, colour, tolerance=40):
    """(H, W) bool: pixels within `tolerance` of the colour in every channel."""
    return (np.abs(picture.astype(int) - colour) <= tolerance).all(-1)


# ---- results.csv -----------------------------------------------------------------------------------------------------
def test_csv_has_the_union_of_keys_in_order_and_six_digits(tmp_path):
    path = tmp_path / "results.csv"
    rows = [{"epoch": 1, "loss": 0.123456789, "lr": 1e-7}, {"epoch": 2, "iou": np.float32(0.5), "loss": math.nan},
            {"epoch": 12345678, "loss": torch.tensor(1234567.8), "iou": None, "note": 'a "b", c'}]
    write_csv(path, rows)
    assert path.read_text().splitlines() == [
        "epoch,loss,lr,iou,note", "1,0.123457,1e-07,,", "2,nan,,0.5,", '12345678,1.23457e+06,,,"a ""b"", c"']
    write_csv(path, rows[:1])  # rewritten, not appended to
    with open(path, newline="") as file:
        assert list(csv.DictReader(file)) == [{"epoch": "1", "loss": "0.123457", "lr": "1e-07"}]


def test_names_that_are_no_text(tmp_path):
    write_csv(tmp_path / "a.csv", [{"name": "\udce9é.jpg", "\ud800": 0.5}])
    assert (tmp_path / "a.csv").read_text(encoding="utf-8") == "name,\\ud800\n\\udce9é.jpg,0.5\n"


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    class Broken:
        def __str__(self):
            raise RuntimeError("broken cell")

    path = tmp_path / "results.csv"
    write_csv(path, [{"epoch": 1}])
    with pytest.raises(RuntimeError, match="broken cell"):
        write_csv(path, [{"epoch": 1}, {"epoch": Broken()}])
    assert path.read_text() == "epoch\n1\n"
    assert [file.name for file in tmp_path.iterdir()] == ["results.csv"]


def test_a_full_disk_is_a_user_error_and_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.csv"
    write_csv(path, [{"epoch": 1}])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match=r"results\.csv: cannot be written \(No space left"):
        write_csv(path, [{"epoch": 2}])
    assert path.read_text() == "epoch\n1\n"
    assert [file.name for file in tmp_path.iterdir()] == ["results.csv"]


def test_folder_is_made_and_a_file_in_its_place_is_a_user_error(tmp_path):
    write_csv(tmp_path / "new" / "results.csv", [{"epoch": 1}])
    assert (tmp_path / "new" / "results.csv").exists()
    with pytest.raises(UserError):
        write_csv(tmp_path / "new" / "results.csv" / "results.csv", [{"epoch": 1}])


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


@pytest.mark.parametrize("hole", [math.nan, math.inf, -math.inf, None, "missing"])
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
    assert len(runs) == 2 and 4 <= len(runs[0]) <= 9 and len(runs[1]) > 50


@pytest.mark.parametrize("key, index", [("val/iou", 2), ("mAP50", 2), ("val_loss", 1), ("val/dice_loss", 1)])
def test_best_value_is_marked(tmp_path, key, index):
    xs, ys = np.arange(5.0), np.array([5.0, 1, 9, 4, 6])
    plot_curves(tmp_path / "a.png", [{"epoch": x, key: y} for x, y in zip(xs, ys)] + [{"epoch": 4, key: math.nan}])
    rows, columns = np.nonzero(near(read(tmp_path / "a.png")[AXES[1]:AXES[3]], BEST, 10))
    column, row = place(xs, ys, index)
    assert (columns.mean(), rows.mean() + AXES[1]) == pytest.approx((column, row), abs=1)


@pytest.mark.parametrize("key", ["loss", "lr", "grad_norm"])
def test_nothing_is_marked_where_better_is_not_obvious(tmp_path, key):
    plot_curves(tmp_path / "a.png", [{"epoch": e, key: e * e} for e in range(5)])
    assert not near(read(tmp_path / "a.png"), BEST, 10).any()


def test_one_panel_per_number_at_most_four_abreast(tmp_path):
    row = {"epoch": 3, "loss": 1.0, "lr": torch.tensor(1e-3), "note": "text", "flag": True, "none": None,
           **{f"part{i}": i for i in range(4)}}
    plot_curves(tmp_path / "a.png", [row])
    picture = read(tmp_path / "a.png")
    assert picture.shape == (2 * PANEL[1], 4 * PANEL[0], 3)
    dots = [near(picture[PANEL[1] * r:PANEL[1] * (r + 1), PANEL[0] * c:PANEL[0] * (c + 1)], LINE).any()
            for r in range(2) for c in range(4)]
    assert dots == [True] * 6 + [False] * 2
    assert (picture[PANEL[1]:, 2 * PANEL[0]:] == 255).all()


@pytest.mark.parametrize("values", [[], [math.nan], [math.inf, -math.inf], [0.0], [1e-300] * 2, [1e30, -1e30],
                                    [5] * 3, [1e9, 1e9 + 1], [0.1 + 1e-12, 0.1], [-1e-8, 1e-8]])
def test_odd_values_are_drawn(tmp_path, values):
    plot_curves(tmp_path / "a.png", [{"epoch": 1 + i, "iou": value} for i, value in enumerate(values)])
    assert near(read(tmp_path / "a.png"), GRID, 0).any() == bool(values)


@pytest.mark.parametrize("low, high", [(0, 1), (-0.06, 1.06), (0.123, 0.129), (-5e-5, 1e-3), (1e6, 9e6), (-3, -1),
                                       (0.9, 0.90013), (41.3, 97.2), (1e-12, 2e-12)])
def test_ticks_are_three_to_five_round_numbers(low, high):
    for scale in (1, 1.3, 1.7, 2.9, 4.1, 7.3):
        ticks = charts._ticks(low * scale, high * scale)
        values = np.array([float(label) for _, label in ticks])
        assert 3 <= len(ticks) <= 5
        assert values == pytest.approx([value for value, _ in ticks], rel=1e-6, abs=1e-9 * high)
        assert np.all(values >= low * scale - 1e-15) and np.all(values <= high * scale + 1e-15)
        steps = np.diff(values)
        assert steps == pytest.approx(steps[0], rel=1e-3)
        assert f"{steps[0]:.3e}"[:5] in ("1.000", "2.000", "2.500", "5.000")


def test_epoch_ticks_are_whole(tmp_path, monkeypatch):
    texts = []
    monkeypatch.setattr(charts, "text_line", lambda draw, xy, text, **_: texts.append(text))
    plot_curves(tmp_path / "a.png", [{"epoch": 1, "iou": 0.5}, {"epoch": 2, "iou": 0.7}])
    assert texts == ["1", "2", "0.5", "0.6", "0.7", "best 0.7 at 2", "iou"]
    assert [label for _, label in charts._ticks(0.94, 2.06, whole=True)] == ["1", "2"]
    assert [label for _, label in charts._ticks(-8.0, 159.0, whole=True)] == ["0", "50", "100", "150"]


# ---- loggers ---------------------------------------------------------------------------------------------------------
class Fake:
    """Stands for tensorboard's SummaryWriter and for wandb: remembers every call."""
    id = "abc123"

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


@pytest.fixture
def fake(monkeypatch):
    """Both packages, replaced."""
    fake = Fake()

    def start(name):
        def call(*args, **kwargs):
            fake.calls.append((name, args, kwargs))
            return fake
        return call

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=start("writer")))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=start("init")))
    return fake


def test_boards_that_nobody_asked_for_do_nothing(tmp_path, fake):
    loggers = make_loggers(tmp_path)
    loggers.log({"loss": 1.0}, 1)
    loggers.close()
    assert fake.calls == [] and list(tmp_path.iterdir()) == []


def test_tensorboard_gets_every_number(tmp_path, fake):
    loggers = make_loggers(tmp_path, tensorboard=True)
    loggers.log({"loss": torch.tensor(0.5), "note": "text", "flag": True, "none": None, "epoch": 3}, 3)
    loggers.close()
    assert fake.calls == [("writer", (str(tmp_path),), {}), ("add_scalar", ("loss", 0.5, 3), {}),
                          ("add_scalar", ("epoch", 3.0, 3), {}), ("close", (), {})]


def test_wandb_resumes_its_own_run(tmp_path, fake, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    folder = tmp_path / "seg" / "exp3"
    folder.mkdir(parents=True)
    loggers = make_loggers(folder, wandb=True, config={"lr": 1e-3})
    loggers.log({"iou": np.float32(0.5), "note": "text"}, 7)
    loggers.close()
    (start, _, given), log, finish = fake.calls
    assert start == "init" and given == {"project": "seg", "name": "exp3", "dir": str(folder), "id": None,
                                         "resume": "allow", "config": {"lr": 1e-3}}
    assert log == ("log", ({"iou": 0.5},), {"step": 7}) and finish == ("finish", (), {})
    assert (folder / "wandb_id.txt").read_text() == "abc123"
    fake.calls.clear()
    monkeypatch.setenv("WANDB_PROJECT", "other")
    make_loggers(folder, wandb=True, name="mine")
    given = fake.calls[0][2]
    assert (given["id"], given["name"], given["project"]) == ("abc123", "mine", "other")


def test_wandb_that_cannot_start_is_one_line(tmp_path, fake, monkeypatch):
    def no_account(**_):
        raise ValueError("api_key\nnot configured")

    monkeypatch.setattr(sys.modules["wandb"], "init", no_account)
    with pytest.raises(UserError, match=r"api_key not configured.*WANDB_MODE=offline") as error:
        make_loggers(tmp_path, wandb=True)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_missing_package_is_a_user_error(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(package, package), None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        make_loggers(tmp_path, **{package: True})
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))  # a stray folder of that name
    if package == "wandb":
        with pytest.raises(UserError, match="pip install wandb"):
            make_loggers(tmp_path, wandb=True)
