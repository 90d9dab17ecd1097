"""G5: damaged images and label files of all tasks, through the readers that a training script calls.

A file is read, or refused in one line that names it. Whatever happens, no file of the user's is changed, nothing else
is raised, and nothing takes longer than five seconds.
"""
import json
import re
import shutil

import numpy as np
import torch
from PIL import Image

from data import bad, cls, folds, images, labels, seg
from data.labels import coco
from tests.campaign import core, scripts
from tests.campaign.core import Failed, Goal, bounded, check
from tests.conftest import digest, write_dirty, write_tif, write_wildfire
from tests.test_checkpoint import mutated
from tests.test_labels import FORMATS
from utils.errors import UserError
from utils.pictures import review

SECONDS = 5
MEMORY = 6 << 30  # a small file may stand for a large image: images.MAX_VALUES numbers are read


# ---- images ----------------------------------------------------------------------------------------------------------
def whole_images(shared):
    """A folder of small images of every kind that is read, and a mask beside one of them."""
    def make(folder):
        folder.mkdir()
        noise = np.random.default_rng(0).integers(0, 256, (3, 40, 40), np.uint8)
        rgb, exif = Image.fromarray(noise.transpose(1, 2, 0)), Image.Exif()
        exif[0x0112] = 6
        write_tif(folder / "plain.tif", noise)
        write_tif(folder / "mask.tif", noise[0] % 3, nodata=2)
        write_tif(folder / "deflate.tif", noise.astype(np.uint16), compress="deflate", predictor=2)
        write_tif(folder / "float.tif", noise.astype(np.float32), compress="lzw", nodata=7)
        write_tif(folder / "tiled.tif", noise, compress="lzw", tiled=True, blockxsize=16, blockysize=16)
        write_tif(folder / "jpeg.tif", noise, compress="jpeg", photometric="ycbcr", tiled=True, blockxsize=16,
                  blockysize=16)
        rgb.save(folder / "a.jpg", quality=90, exif=exif)
        rgb.save(folder / "progressive.jpg", progressive=True)
        rgb.convert("CMYK").save(folder / "cmyk.jpg")
        rgb.save(folder / "a.png")
        rgb.convert("RGBA").save(folder / "alpha.png")
        Image.fromarray(noise[0] % 3).convert("P").save(folder / "palette.png")
        Image.fromarray(noise[0].astype(np.uint16) * 200).save(folder / "deep.png")
        rgb.convert("1").save(folder / "bit.png")
        for suffix in ("webp", "bmp"):
            rgb.save(folder / f"a.{suffix}")
        rgb.convert("P").save(folder / "a.gif")
    return scripts.made(shared / "images", make)


def image(place, rng, number):
    """One damaged image; in every 50th trial it lies in a data set on which a script trains."""
    if number % 50 == 49:
        return _end_to_end(place, rng)
    files = sorted(whole_images(place.shared).iterdir())
    source = files[number % len(files)]
    path, data = place.own / source.name, source.read_bytes()
    head = rng.choice((len(data), len(data), 300))
    path.write_bytes(mutated(data[:head], rng) + data[head:])
    before, outcomes = digest(place.own), set()
    for reader in (lambda: images.size(path), lambda: _finite(images.read(path), images.size(path)),
                   lambda: images.digest(path), lambda: bad.decode(path, None), lambda: seg.read_mask(path, 3),
                   lambda: images.read(path, [1], window=(3, 5, 20, 20), shape=(7, 7)),
                   lambda: images.thumbnail(path, [1, 2, 3], 16), lambda: images.default_bands([path])):
        outcomes.add(_answer(reader, path, source.name))
    check(digest(place.own) == before, "the file was changed", source.name)
    return {f"{path.suffix[1:]} {'refused' if outcomes == {'refused'} else 'read'}": 1}


def _finite(image, size):
    check(tuple(image.shape) == tuple(size), "another size than its header's", f"{image.shape} {size}")
    check(not torch.isinf(image.float()).any() if image.is_floating_point() else True, "infinite pixels")


def _answer(reader, path, name):
    """-> "read" or "refused". Fails for every other error."""
    try:
        with bounded(MEMORY, SECONDS):
            reader()
        return "read"
    except UserError as error:
        text = str(error)
        check("\n" not in text and len(text) < 3000, "a message of several lines, or a long one", text[:2000])
        check("\x1b" not in text and "\0" not in text, "control characters in a message", repr(text[:2000]))
        check(path is None or path.name in text, "a message that does not name the file", text)
        return "refused"
    except Failed:
        raise
    except BaseException as error:
        raise Failed(f"{type(error).__name__} in {core.where(error)}", f"{name}: {error!r}") from error


# ---- labels ----------------------------------------------------------------------------------------------------------
TOKENS = (b"nan", b"NaN", b"inf", b"-Infinity", b"1e400", b"-1", b"99999999999999999999", b"0.5", b"null", b"true",
          b"{}", b"[]", b'"x"', b"\0", b"\xff\xfe", b"=1+1", b"\x1b[31m", b"../../../etc/passwd", b"/dev/zero",
          b"1" * 5000, b"", b" ", b"\xc3\xa9", b"&lol;", b"!!python/object", b"\xef\xbb\xbf", b"http://127.0.0.1:9/x",
          b"1_000",
          "٣".encode(), b"0x10", b"1e308", b"-0.0", b"2", b"car")


def damaged_text(data, rng):
    """A copy of a text file with a token, a line or some bytes exchanged."""
    kind = rng.randrange(9)
    words = [match.span() for match in re.finditer(rb"[-\w.]+", data)]
    lines = data.splitlines(keepends=True)
    if kind <= 2 and words:
        for start, end in sorted(rng.sample(words, min(len(words), rng.choice((1, 1, 3)))), reverse=True):
            data = data[:start] + rng.choice(TOKENS) + data[end:]
    elif kind == 3 and lines:
        line = rng.choice(lines)
        lines.insert(rng.randrange(len(lines) + 1), line)
        data = b"".join(lines)
    elif kind == 4 and lines:
        del lines[rng.randrange(len(lines))]
        data = b"".join(lines)
    elif kind == 5:
        at = rng.randrange(len(data) + 1)
        data = data[:at] + rng.choice((b"[", b"{\"a\":", b"<a>", b"- ", b"(", b",", b"\n", b" ")) * 100_000 + data[at:]
    elif kind == 6:
        data = rng.choice((b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n"), data.replace(b"\n", b"\r"),
                           data.decode(errors="replace").encode("utf-16"), data.replace(b",", b";"), data * 50))
    else:
        data = mutated(data, rng)
    return data


def _boxes(folder):
    def read(path):
        found = labels.read(path, cache=None, allow_bad=True)
        for size, boxes, classes in zip(found.sizes, found.boxes, found.classes):
            check(np.isfinite(boxes).all(), "a box that is not finite")
            check(len(boxes) == 0 or (boxes >= 0).all() and (boxes[:, 2::2] <= size[1]).all()
                  and (boxes[:, 3::2] <= size[0]).all(), "a box outside its image", boxes)
            known = len(classes) == 0 or 0 <= classes.min() and classes.max() < len(found.names)
            check(known, "a class beyond the names")
    return lambda: read(folder)


def _numbers(found):
    check(np.isfinite(np.asarray(found, np.float64)).all(), "a label that is not finite")


def _write_tables(folder):
    """Tables and JSON files of all kinds, and the images that they speak of."""
    write_dirty(folder / "cls", train=6, test=2, side=16)
    write_wildfire(folder / "seg", train=4, test=1, size=(32, 32))
    names = [f"train_img_{i}" for i in range(4)]
    (folder / "pairs.csv").write_text("image,mask,group,part,weight\n" + "".join(
        f"seg/train_img/{name}.tif,seg/train_mask/{name.replace('img', 'mask')}.tif,g{i},train,1.5\n"
        for i, name in enumerate(names)))
    (folder / "groups.csv").write_text("name,group\n" + "".join(f"{name},{i % 2}\n" for i, name in enumerate(names)))
    (folder / "folds.json").write_text(json.dumps({name: i % 2 for i, name in enumerate(names)}))
    (folder / "noise.csv").write_text("rank,name,score\n" + "".join(
        f"{i + 1},seg/train_img/{name}.tif,0.{i}\n" for i, name in enumerate(names)))
    (folder / "Test_Images_Information.json").write_text(json.dumps(
        {"images": [{"id": i, "file_name": f"{name}.png"} for i, name in enumerate(names)]}))
    (folder / "one.csv").write_text("name,label\n" + "".join(f"{i:05},{'ab'[i % 2]}\n" for i in range(6)))


NAMES = [f"train_img_{i}" for i in range(4)]
TABLES = {  # file: reader(folder with a damaged copy of it)
    "cls/dirty_mnist_2nd_answer.csv": lambda root: _numbers(cls.read(root / "cls").labels),
    "one.csv": lambda root: _numbers(cls.read(root / "cls", table=root / "one.csv",
                                              folder=root / "cls/dirty_mnist_2nd").labels),
    "pairs.csv": lambda root: seg.read(root / "pairs.csv", bands=[1], allow_bad=True),
    "groups.csv": lambda root: folds.read_groups(root / "groups.csv", NAMES),
    "folds.json": lambda root: folds.read_split(root / "folds.json", NAMES),
    "noise.csv": lambda root: review.read_noise(root / "noise.csv", 2),
    "Test_Images_Information.json": lambda root: coco.test_ids(root / "Test_Images_Information.json"),
}


def whole_labels(shared):
    """A folder with a data set of every format of boxes, and one with tables."""
    def make(folder):
        for name, (write, *_) in FORMATS.items():
            write(folder / name)
        _write_tables(folder / "tables")
    return scripts.made(shared / "labels", make)


def label(place, rng, number):
    """One damaged label file, or one that is no regular file; every 50th trial trains on it."""
    if number % 50 == 49:
        return _end_to_end(place, rng, with_labels=True)
    root = whole_labels(place.shared)
    kinds = [*FORMATS, *TABLES]
    name = kinds[number % len(kinds)]
    if name in FORMATS:
        folder = shutil.copytree(root / name, place.own / name)
        files = [path for path in folder.rglob("*") if path.suffix in (".json", ".txt", ".xml", ".yaml", ".names")]
        path, reader = rng.choice(sorted(files)), _boxes(folder)
    else:
        folder = shutil.copytree(root / "tables", place.own / "tables")
        path = folder / name
        reader = (lambda: TABLES[name](folder))
    path.write_bytes(damaged_text(path.read_bytes(), rng))
    before = digest(place.own)
    outcome = _answer(reader, None, f"{name}: {path.name}")
    now = {file: content for file, content in digest(place.own).items() if "/runs/" not in file}
    check(now == before, "a file was changed", name)
    return {f"{path.suffix[1:]} {outcome}": 1}


# ---- whole scripts ---------------------------------------------------------------------------------------------------
def _end_to_end(place, rng, with_labels=False):
    """Some images, or a label file, of a data set are damaged, and a script trains on it for an epoch."""
    task = rng.choice(list(scripts.TASKS))
    root = shutil.copytree(scripts.data(place.shared, task), place.own / "DATA")
    if with_labels:
        chosen = [path for path in root.rglob("*") if path.suffix in (".json", ".csv")] or \
            list((root / "train_mask").iterdir())
        path = rng.choice(sorted(chosen))
        path.write_bytes(damaged_text(path.read_bytes(), rng))
    else:
        for path in rng.sample(sorted((root / scripts.TASKS[task].images).iterdir()), rng.choice((1, 3))):
            path.write_bytes(mutated(path.read_bytes(), rng))
    before = digest(root)
    flags = ["--allow-bad"] * (rng.random() < 0.7)
    run = scripts.start(task, place, "--data", root, "--epochs", 1, "--workers", rng.choice((0, 2)), *flags)
    code = run.wait(scripts.WAIT)
    lines = "\n".join(run.err)
    check("Traceback" not in lines and code != 1, "whole script: traceback", f"{task}\n{lines[-3000:]}")
    check(code in (0, 2, 3), f"whole script: exit {code}", f"{task}\n{lines[-3000:]}")
    check(code != 2 or sum(line.startswith("error: ") for line in run.err) == 1, "whole script: no single line", lines)
    check(digest(root) == before, "whole script: a file was changed", task)
    return {f"whole script {'trained' if code == 0 else 'refused'}": 1}


IMAGES = Goal("G5a", "damaged images through the readers: read, or refused in one line", image, cap=10_000, seconds=60,
              share=2, short=tuple(range(40)))
LABELS = Goal("G5b", "damaged label files and tables: read, or refused in one line", label, cap=10_000, seconds=60,
              share=2, short=tuple(range(40)))
