"""data/cache.py, facts: what is kept of files, and when it is found anew."""
import contextlib
import os
import time

import numpy as np
import pytest

from data import images
from data.cache import facts
from tests.conftest import write_tif


@pytest.fixture
def look(tmp_path):
    """look() -> (the facts about three files, which of them were read for it)"""
    files = [tmp_path / f"{i}.txt" for i in range(3)]
    for i, file in enumerate(files):
        file.write_text(str(i))

    def call(question="content", cache=tmp_path / "cache", **options):
        read = []
        found = facts(question, lambda path, _: read.append(path.stem) or path.read_text(), [(f, "x") for f in files],
                      cache=cache, **options)
        return "".join(found), "".join(sorted(read))
    return call


def test_facts_are_found_once(look, tmp_path):
    assert look() == ("012", "012") and look() == ("012", "")
    assert look(variant=2) == ("012", "012") == look("another") and look(variant=2) == ("012", "")
    (tmp_path / "1.txt").write_text("77")
    assert look() == ("0772", "1") and look() == ("0772", "")
    os.utime(tmp_path / "2.txt", ns=(1, 1))
    assert look()[1] == "2"
    (tmp_path / "0.txt.msk").write_text("a mask beside the file")
    assert look()[1] == "0" and look()[1] == ""
    assert look(cache=None)[1] == "012"


@pytest.mark.parametrize("content", [b"", b"damaged", b"cut"])
def test_damaged_facts_are_found_anew(look, tmp_path, content):
    look()
    [store] = (tmp_path / "cache").glob("*.z")
    store.write_bytes(content if content != b"cut" else store.read_bytes()[:-3])
    assert look() == ("012", "012") and look() == ("012", "")


def test_facts_of_another_version_are_found_anew(look, monkeypatch):
    look()
    monkeypatch.setattr("data.cache.VERSION", 99)
    assert look()[1] == "012"


def test_a_place_that_cannot_be_written(look, tmp_path):
    (tmp_path / "file").write_text("")
    assert look(cache=tmp_path / "file") == look(cache=tmp_path / "file/deeper") == ("012", "012")


def test_processes_that_start_together_look_once(tmp_path):
    path, log = tmp_path / "a.txt", tmp_path / "log"
    path.write_text("a")

    def slow(path):
        with open(log, "a") as file:
            file.write("x")
        time.sleep(0.2)
        return 7

    children = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                os._exit(facts("slow", slow, [(path,)], cache=tmp_path / "cache") != [7])
            os._exit(1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 3 and log.read_text() == "x"


def test_headers_are_kept(tmp_path, monkeypatch):
    array = np.ones((2, 8, 9), np.float32)
    files = [write_tif(tmp_path / f"{i}.tif", array, nodata=np.nan) for i in range(2)] + [tmp_path / "missing.tif"]
    images.read_headers(files, cache=tmp_path / "cache")
    first = [images.header(file) for file in files[:2]]
    monkeypatch.setattr(images, "_headers", {})
    monkeypatch.setattr(images, "_header", None)
    images.read_headers(files[:2], cache=tmp_path / "cache")
    assert str([images.header(file) for file in files[:2]]) == str(first) and first[0] is first[1]
    assert first[0].size == (2, 8, 9) and first[0].place[0] and np.isnan(first[0].nodata[0])
