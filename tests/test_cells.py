"""utils/pictures/cells.py: tables as CSV files, text and pictures."""
import csv
import math

import numpy as np
import pytest

from utils.errors import UserError
from utils.pictures import sheets
from utils.pictures.cells import as_picture, as_text, write_csv


# ---- CSV -------------------------------------------------------------------------------------------------------------
def test_csv_has_the_union_of_keys_in_order_and_six_digits(tmp_path):
    path = tmp_path / "results.csv"
    rows = [{"epoch": 1, "loss": 0.123456789, "lr": 1e-7}, {"epoch": 2, "iou": 0.5, "loss": math.nan},
            {"epoch": 12345678, "loss": 1234567.8, "iou": None, "note": 'a "b", c'}]
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


# ---- text ------------------------------------------------------------------------------------------------------------
ROWS = [{"name": "a|b\n c", "iou": 0.123456, "n": 7}, {"name": "large", "n": 12345, "iou": None}, {"iou": math.nan}]


def test_text_is_aligned_numbers_on_the_right():
    assert as_text(ROWS) == ("name      iou      n\n"
                             "a|b c  0.1235      7\n"
                             "large          12345\n"
                             "          nan\n")


# ---- pictures --------------------------------------------------------------------------------------------------------
def test_cells_of_a_picture(monkeypatch):
    drawn, real = [], sheets.label

    def spy(text, width=None, **style):
        drawn.append((text, width, style.get("right", False)))
        return real(text, width, **style)

    monkeypatch.setattr("utils.pictures.cells.label", spy)
    picture = np.array(as_picture("Sizes", ROWS))
    assert [text for text, *_ in drawn] == ["name", "a|b c", "large", "", "iou", "0.1235", "", "nan", "n", "7", "12345",
                                            "", "Sizes"]
    assert {right for _, _, right in drawn[:4]} == {False} and {right for _, _, right in drawn[4:12]} == {True}
    assert len({width for _, width, _ in drawn[:4]}) == 1
    dark = (picture < 160).all(-1)
    lines = [dark[8 + 22 * r:30 + 22 * r] for r in range(5)]
    assert picture.shape[0] == 8 + 5 * 22 + 8 and all(line.any() for line in lines)
    ends = [np.flatnonzero(line.any(0)).max() for line in lines]  # the last column: n, 7, 12345
    assert max(ends[1:4]) - min(ends[1:4]) <= 2


def test_a_long_cell_does_not_make_a_picture_wide():
    assert as_picture("", [{"class": "x" * 500, "iou": 0.5}]).width < 450
