"""data/samples/glyphs.py: the sources of letters, written here byte by byte, and how they can be damaged."""
import gzip

import numpy as np
import pytest

from data.samples import glyphs
from utils.errors import UserError

NAMES = ",".join(["id", "digit", "letter", *map(str, range(784))])
BAD = r"line {} is not id, digit, letter \(from A to Z\) and 784 whole numbers from 0 to 255; correct or remove it"


def some(count=60, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 28, 28)) * (rng.random((count, 28, 28)) < .3)
    return pixels.astype(np.uint8), rng.permutation(np.arange(count) % 26)


def csv_text(pixels, letters, header=NAMES, front="{i},{i},{letter}"):
    rows = [front.format(i=i, letter=chr(65 + letter)) + "," + ",".join(map(str, values.ravel()))
            for i, (values, letter) in enumerate(zip(pixels, letters))]
    return "\n".join([header, *rows]) + "\n"


def same(result, pixels, letters):
    assert result[0].dtype == np.uint8 and result[1].dtype == np.int64
    assert np.array_equal(result[0], pixels) and np.array_equal(result[1], letters)


@pytest.mark.parametrize("change", [lambda t: t.encode(), lambda t: b"\xef\xbb\xbf" + t.encode(),
                                    lambda t: t.replace("\n", "\r\n").encode(), lambda t: t.rstrip().encode(),
                                    lambda t: (t + "\n\n").encode(), lambda t: gzip.compress(t.encode())],
                         ids=["plain", "bom", "crlf", "no newline", "blank lines", "gzip"])
def test_csv(tmp_path, change):
    pixels, letters = some()
    (tmp_path / "train.csv").write_bytes(change(csv_text(pixels, letters)))
    same(glyphs.read(tmp_path / "train.csv"), pixels, letters)


def test_csv_of_the_test_set_has_no_digit(tmp_path):
    pixels, letters = some()
    header = NAMES.replace("digit,", "")
    (tmp_path / "test.csv").write_text(csv_text(pixels, letters, header, "{i},{letter}"))
    same(glyphs.read(str(tmp_path / "test.csv")), pixels, letters)


def bad_row(old, new):
    def change(text):
        lines = text.split("\n")
        lines[3] = lines[3].replace(old, new, 1)
        return "\n".join(lines)
    return change


def ends(new):
    return lambda text: "\n".join(line.rpartition(",")[0] + new if i == 3 else line
                                  for i, line in enumerate(text.split("\n")))


@pytest.mark.parametrize("change, words", [
    (lambda t: "", "columns are not letter and"),
    (lambda t: t.split("\n")[0], "contains no letters"),
    (lambda t: t.split("\n", 1)[1], "columns are not letter and"),
    (lambda t: t.replace("letter", "label", 1), "columns are not letter and"),
    (lambda t: t.replace(",783", ",784", 1), "columns are not letter and"),
    (lambda t: t.replace(",5,6,", ",6,5,", 1), "columns are not letter and"),
    (lambda t: t.replace(",783", "", 1), "columns are not letter and"),
    (ends(""), BAD.format(4)),
    (ends(",1,2"), BAD.format(4)),
    (lambda t: t[:-1500], BAD.format(61)),
    (ends(",256"), BAD.format(4)),
    (ends(",-1"), BAD.format(4)),
    (ends(",1.5"), BAD.format(4)),
    (ends(",nan"), BAD.format(4)),
    (ends(","), BAD.format(4)),
    (ends(",x"), BAD.format(4)),
    (ends(",1 2"), BAD.format(4)),
    (ends(",99999999999999999999999"), BAD.format(4)),
    (bad_row(",2,", ",2,é"), BAD.format(4)),
    (lambda t: bad_row(t.split("\n")[3][:5], "2,2,a")(t), BAD.format(4)),
    (lambda t: bad_row(t.split("\n")[3][:5], "2,2,[")(t), BAD.format(4)),
    (lambda t: bad_row(t.split("\n")[3][:5], "2,2,")(t), BAD.format(4)),
    (bad_row("2,2,", "nonsense"), BAD.format(4)),
    (lambda t: "\n".join(["junk" if i == 3 else line for i, line in enumerate(t.split("\n"))]), BAD.format(4)),
])
def test_bad_csv(tmp_path, change, words):
    path = tmp_path / "train.csv"
    path.write_text(change(csv_text(*some())))
    with pytest.raises(UserError, match=words) as error:
        glyphs.read(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [lambda b: b[:-300], lambda b: b[:200] + b"\xff" * 50 + b[250:], lambda b: b[:5],
                                    lambda b: b[:-8] + bytes(8)])
def test_damaged_gzip(tmp_path, damage):
    path = tmp_path / "train.csv.gz"
    path.write_bytes(damage(gzip.compress(csv_text(*some()).encode())))
    with pytest.raises(UserError, match="train.csv.gz: damaged, or not a CSV"):
        glyphs.read(path)


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match="none.csv: cannot be read .No such file"):
        glyphs.read(tmp_path / "none.csv")
    with pytest.raises(UserError, match="cannot be read .Is a directory"):
        glyphs.read(tmp_path)


@pytest.mark.parametrize("content", [bytes(200_000), b"\0\0\x08\x03" + bytes(200_000)])
def test_other_files(tmp_path, content):
    (tmp_path / "images-idx3-ubyte").write_bytes(content)
    with pytest.raises(UserError, match="images-idx3-ubyte: damaged, or not a CSV"):
        glyphs.read(tmp_path / "images-idx3-ubyte")


def test_letters_of_a_font():
    pixels, letters = glyphs.render(12)
    assert pixels.shape == (312, 28, 28) and pixels.dtype == np.uint8
    assert (np.bincount(letters) == 12).all() and (np.diff(letters) < 0).mean() > .3, "not mixed"
    flat = pixels.reshape(312, -1).astype(float)
    assert len(np.unique(flat, axis=0)) == 312 and (flat.max(1) > 150).all()
    assert pixels[:, [0, -1]].mean() < 1 and pixels[:, :, [0, -1]].mean() < 1, "cut off at the edge"
    # each is most like the others of its letter, far more often than by chance
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    alike = unit @ unit.T - 2 * np.eye(312)
    assert (letters[alike.argmax(1)] == letters).mean() > .5
    # upright, not mirrored: an L has its mass low and left, a P high and left
    mean = {k: pixels[letters == k].mean(0) for k in (ord("L") - 65, ord("P") - 65)}
    (low, p) = mean.values()
    assert low[14:].sum() > 1.2 * low[:14].sum() and low[:, :14].sum() > 1.1 * low[:, 14:].sum()
    assert p[:14].sum() > 1.2 * p[14:].sum() and p[:, :14].sum() > p[:, 14:].sum()


def test_letters_of_a_font_depend_on_the_seed_alone():
    a, b, c = glyphs.render(2), glyphs.render(2), glyphs.render(2, seed=1)
    same(a, *b)
    assert not np.array_equal(a[0], c[0])
    assert {g.tobytes() for g in a[0]} < {g.tobytes() for g in glyphs.render(3)[0]}
    pixels, letters = glyphs.read()
    assert len(pixels) == 2600 and (np.bincount(letters) == 100).all()
