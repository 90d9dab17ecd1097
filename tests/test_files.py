"""utils/files.py: every file appears whole or not at all, and one process at a time holds a lock."""
import csv
import errno
import json
import os
import time
from pathlib import Path

import pytest

from utils import files
from utils.errors import UserError


def content(folder):
    """{name: bytes} of all files in a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("write, where", [
    (lambda path: files.write_text(path, "b"), Path), (lambda path: files.write_json(path, [1]), Path),
    (lambda path: files.write_csv(path, ["a"], [["b"]]), None)])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, write, where):
    path = tmp_path / "a.txt"
    path.write_text("old")
    for target, name in ((os, "replace"), (where, "write_text")) if where else ((os, "replace"),):
        with monkeypatch.context() as patch, pytest.raises(UserError) as caught:
            patch.setattr(target, name, full)
            write(path)
        assert str(caught.value) == (f"{path}: cannot be written (No space left on device); make room, or choose "
                                     f"another folder")
        assert content(tmp_path) == {"a.txt": b"old"}
    write(path)
    assert list(content(tmp_path)) == ["a.txt"] and path.read_text() != "old"


def test_an_error_in_the_block_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    for error in (KeyError("ours"), KeyboardInterrupt(), ConnectionResetError(104, "a worker died"),
                  UserError("a picture is damaged; remove it")):
        with pytest.raises(type(error)) as caught, files.whole_file(path) as temporary:
            temporary.write_text("half")
            raise error
        assert caught.value is error and content(tmp_path) == {"a.txt": b"old"}


def test_the_temporary_name_keeps_the_suffix_and_the_folder_is_made(tmp_path):
    with files.whole_file(tmp_path / "new/deep/a.png") as temporary:
        assert temporary.suffix == ".png" and temporary.parent == tmp_path / "new/deep"
        temporary.write_bytes(b"1")
    assert content(tmp_path / "new/deep") == {"a.png": b"1"}
    with pytest.raises(UserError, match="a.png/b.png: cannot be written .*; make room"):
        files.write_text(tmp_path / "new/deep/a.png/b.png", "")


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyError), files.whole_folder(tmp_path / "a") as scratch:
        Path(scratch, "half.txt").write_text("")
        raise KeyError
    assert content(tmp_path) == {}
    with files.whole_folder(tmp_path / "a") as scratch:
        Path(scratch, "b.txt").write_text("b")
        assert not (tmp_path / "a").exists()
    assert os.listdir(tmp_path) == ["a"] and content(tmp_path / "a") == {"b.txt": b"b"}
    with pytest.raises(UserError, match="a: exists already; move it away"), files.whole_folder(tmp_path / "a"):
        pytest.fail("it would be written over")


def test_json_is_strict(tmp_path):
    """A class without ground truth has no AP; readers in other languages refuse Python's NaN."""
    nan, path = float("nan"), tmp_path / "a.json"
    files.write_json(path, {"a": [nan, 1.5, {"b": -float("inf")}], "c": (1, "größe", None, True)})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "a": [None, 1.5, {"b": None}], "c": [1, "größe", None, True]}
    files.write_json(path, {"a": [1, 2]}, indent=None)
    assert path.read_text() == '{"a": [1, 2]}'


def test_a_long_list_is_written_part_by_part(tmp_path):
    path, made = tmp_path / "a.json", []

    def parts():
        for part in ([], [{"a": 1.5}, {"b": "ü"}], [], [[float("nan")]], [3]):
            made.append((tmp_path / ".new-a.json").exists())
            yield part
    files.write_json_list(path, parts())
    assert path.read_text() == json.dumps([{"a": 1.5}, {"b": "ü"}, [None], 3]) and made == [True] * 5
    files.write_json_list(path, [], '{"x": [', "]}")
    assert json.loads(path.read_text()) == {"x": []}


def test_tables_of_names_that_are_no_text(tmp_path):
    files.write_csv(tmp_path / "a.csv", ["name", "group"], [["a,b", 1], [os.fsdecode(b"\xff.jpg"), "x\ny"]])
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["name", "group"], ["a,b", "1"], [r"\udcff.jpg", "x\ny"]]


def test_one_process_at_a_time_holds_a_lock(tmp_path):
    pids = []
    for name in "abc":
        pid = os.fork()
        if pid == 0:
            with files.locked(tmp_path / "lock"), open(tmp_path / "log", "a", buffering=1) as log:
                log.write(name)
                time.sleep(0.05)
                log.write(name)
            os._exit(0)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 3
    log = (tmp_path / "log").read_text()
    assert sorted(log[::2]) == ["a", "b", "c"] and log[::2] == log[1::2]
