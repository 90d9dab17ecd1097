"""data/labels: one data set in every format gives the same boxes; every bad file is named in one line; what is kept
is never out of date."""
import contextlib
import copy
import io
import json
import os
import re
import shutil
import time
import unicodedata
import zlib
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from data import labels
from data.labels import coco
from tests.conftest import digest
from utils.errors import UserError

BCCD = Path(__file__).parents[2] / "shared/data/bccd"

# image -> (height, width), boxes as (class, x, y, width, height). Dotted, numeric, Korean; the last is background
DATA = {"a.b.c.jpg": ((50, 100), [(0, 10, 5, 20, 30), (2, 0, 0, 100, 50), (0, 99, 49, 1, 1)]),
        "007.png": ((64, 32), [(1, 1, 2, 3, 4)]),
        "주차장.jpg": ((20, 20), [(1, 3, 3, 10, 10), (0, 3, 3, 10, 10)]),
        "empty.jpg": ((30, 40), [])}
NAMES = ["bus", "car", "van"]
VALID = ("007.png", "empty.jpg")


def picture(path, height=20, width=20, mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (width, height)).save(path, **options)
    return path


def dump(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def as_json(data, first_id=1, categories=True):
    """COCO's content, with images numbered from 10 and categories from first_id, listed backwards."""
    entries = [{"id": 10 + i, "file_name": name} for i, name in enumerate(data)]
    boxes = [{"image_id": 10 + i, "category_id": c + first_id, "bbox": box}
             for i, (_, found) in enumerate(data.values()) for c, *box in found]
    named = [{"id": i + first_id, "name": name} for i, name in enumerate(NAMES)][::-1]
    return {"images": entries, "annotations": boxes, **({"categories": named} if categories else {})}


def write_competition(root, data=DATA, **options):
    for name, (size, _) in data.items():
        picture(root / "train/images" / name, *size)
    dump(root / "train/label/Train.json", as_json(data, **options))


def write_coco(root):
    for part in ("train", "val"):
        data = {name: item for name, item in DATA.items() if (name in VALID) == (part == "val")}
        for name, (size, _) in data.items():
            picture(root / f"{part}2017" / name, *size)
        dump(root / f"annotations/instances_{part}2017.json", as_json(data, first_id=3))
        dump(root / f"annotations/captions_{part}2017.json", {"images": "no labels"})


def write_alone(root):
    for name, (size, _) in DATA.items():
        picture(root / "images" / name, *size)
    dump(root / "mine.json", as_json(DATA, first_id=3))


def yolo_line(size, box):
    c, x, y, w, h = box
    return f"{c} {(x + w / 2) / size[1]:.17g} {(y + h / 2) / size[0]:.17g} {w / size[1]:.17g} {h / size[0]:.17g}\n"


def write_yolo(root, parts=True):
    for name, (size, boxes) in DATA.items():
        part = ("val" if name in VALID else "train") if parts else "."
        picture(root / "images" / part / name, *size)
        if boxes:  # a background has no file
            dump(root / "labels" / part / f"{name.rpartition('.')[0]}.txt", "".join(yolo_line(size, b) for b in boxes))
    dump(root / "classes.txt", "\n".join(NAMES) + "\n\n")


def voc(boxes):
    part = "<part><bndbox><xmin>1</xmin></bndbox></part>"
    items = "".join(f"<object><name>{NAMES[c]}</name><difficult>1</difficult>{part}<bndbox><ymax>{y + h}</ymax>"
                    f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax></bndbox></object>"
                    for c, x, y, w, h in boxes)
    return f"<annotation><size><width>0</width></size>{items}</annotation>"


def write_voc(root):
    for name, (size, boxes) in DATA.items():
        picture(root / "JPEGImages" / name, *size)
        dump(root / "Annotations" / f"{name.rpartition('.')[0]}.xml", voc(boxes))
    picture(root / "JPEGImages/secret.jpg")
    dump(root / "Annotations/secret.xml", voc([(0, 1, 1, 5, 5)]))
    dump(root / "ImageSets/Main/val.txt", "007\nempty  -1\r\n\n")
    dump(root / "ImageSets/Main/test.txt", "secret\nnot_even_there\n")


def write_roboflow(root):
    write_yolo(root)
    for part, name in (("train", "train"), ("val", "valid")):
        for kind in ("images", "labels"):
            (root / name).mkdir(exist_ok=True)
            (root / kind / part).rename(root / name / kind)
    (root / "images").rmdir(), (root / "labels").rmdir()
    picture(root / "test/images/t.jpg")
    dump(root / "test/labels/t.txt", "0 .5 .5 .1 .1")


def write_cvat(root):
    images = []
    for i, (name, (size, boxes)) in enumerate(DATA.items()):
        picture(root / "images" / name, *size)
        shapes = "".join(f'<box label="{NAMES[c]}" occluded="0" xtl="{x}" ytl="{y}" xbr="{x + w}" ybr="{y + h}"/>'
                         for c, x, y, w, h in boxes)
        images.append(f'<image id="{i}" name="{name}" width="{size[1]}" height="{size[0]}">{shapes}</image>')
    dump(root / "annotations.xml", f"<annotations><version>1.1</version>{''.join(images)}</annotations>")


def write_label_studio(root):
    tasks = []
    for i, (name, ((height, width), boxes)) in enumerate(DATA.items()):
        picture(root / "photos" / name, height, width)
        regions = [{"type": "rectanglelabels", "original_width": width, "original_height": height, "value": {
            "x": 100 * x / width, "y": 100 * y / height, "width": 100 * w / width, "height": 100 * h / height,
            "rotation": 0, "rectanglelabels": [NAMES[c]]}} for c, x, y, w, h in boxes]
        tasks.append({"id": i, "data": {"image": f"/data/local-files/?d=photos/{quote(name)}"},
                      "annotations": [{"result": regions}]})
    dump(root / "project.json", tasks)


FORMATS = {"cvat": (write_cvat, [0, 1, 2], False), "label studio": (write_label_studio, [0, 1, 2], False),
           "competition": (write_competition, [1, 2, 3], False), "coco": (write_coco, [3, 4, 5], True),
           "alone": (write_alone, [3, 4, 5], False), "yolo": (write_yolo, [0, 1, 2], True),
           "yolo_roboflow": (write_roboflow, [0, 1, 2], True),
           "yolo_flat": (lambda root: write_yolo(root, parts=False), [0, 1, 2], False),
           "voc": (write_voc, [0, 1, 2], True)}


def same(a, b):
    """Whether two Labels are equal, bit for bit."""
    arrays = all(len(x) == len(y) and all(p.dtype == q.dtype and np.array_equal(p, q) for p, q in zip(x, y))
                 for x, y in ((a.boxes, b.boxes), (a.classes, b.classes)))
    return arrays and a._replace(boxes=0, classes=0) == b._replace(boxes=0, classes=0)


def read(root, **options):
    return labels.read(root, **{"cache": None, **options})


def refused(path, *says, call=read, **options):
    """The message, which is one line with the words and a remedy."""
    with pytest.raises(UserError) as caught:
        call(path, **options)
    text = str(caught.value)
    assert text.splitlines() == [text] and len(text) < 700, text
    assert all(str(word) in text for word in says) and re.search("; .", text), text
    return text


@pytest.fixture
def lot(tmp_path):
    """The data set in the competition's layout."""
    write_competition(tmp_path / "DATA")
    return tmp_path / "DATA"


@pytest.fixture
def yolo(tmp_path):
    write_yolo(tmp_path / "DATA")
    return tmp_path / "DATA"


# ---- what is read ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", FORMATS)
def test_one_data_set_in_every_format(tmp_path, kind, capsys):
    write, category_ids, has_parts = FORMATS[kind]
    write(tmp_path)
    before = digest(tmp_path)
    found = read(str(tmp_path))
    assert digest(tmp_path) == before and capsys.readouterr().out == ""
    assert found.names == NAMES and found.category_ids == category_ids
    assert sorted(file.name for file in found.files) == sorted(DATA)
    assert len({len(values) for values in found[:4] + (found.held_out,)}) == 1
    for file, size, boxes, classes, held_out in zip(*found[:4], found.held_out):
        expected = DATA[file.name]
        assert isinstance(file, Path) and file.is_file() and tmp_path in file.parents
        assert size == expected[0] and type(size) is tuple and held_out is (has_parts and file.name in VALID)
        assert boxes.dtype == np.float64 and boxes.shape == (len(expected[1]), 4) and classes.dtype == np.int64
        assert classes.tolist() == [c for c, *_ in expected[1]]
        corners = [(x, y, x + w, y + h) for _, x, y, w, h in expected[1]]
        assert boxes.tolist() == [pytest.approx(b, abs=1e-9 if kind[:4] in ("yolo", "labe") else 0) for b in corners]


def test_a_json_by_its_name(tmp_path):
    write_competition(tmp_path / "A")
    write_coco(tmp_path / "B")
    assert same(read(tmp_path / "A/train/label/Train.json"), read(tmp_path / "A"))
    found = read(tmp_path / "B/annotations/instances_val2017.json")  # then it is the whole, and not held out
    assert {f.name for f in found.files} == set(VALID) and found.held_out == [False, False]


def test_the_format_is_told_by_what_is_there(tmp_path):
    """Folders that fit several formats: the more specific one wins."""
    write_yolo(tmp_path)
    dump(tmp_path / "annotations/instances_val2017.json", {})  # as in the COCO folder that comes with YOLO's labels
    dump(tmp_path / "more.json", {})
    assert read(tmp_path).category_ids == [0, 1, 2]
    write_coco(tmp_path)
    assert read(tmp_path).category_ids == [3, 4, 5]
    write_competition(tmp_path)
    assert read(tmp_path).category_ids == [1, 2, 3]


def test_of_equal_names_the_part_decides(tmp_path):
    for part, side in (("train", 20), ("val", 30)):
        picture(tmp_path / f"{part}2017/1.jpg", side, side)
        dump(tmp_path / f"annotations/{part}.json", as_json({"1.jpg": (None, [(0, 1, 1, 8, 8)])}))
    assert read(tmp_path).sizes == [(20, 20), (30, 30)]


@pytest.mark.parametrize("ids, names", [
    (range(1, 15), ["sedan", "SUV", "van", "bus", "school bus", "truck", "taxi", "adult", "child", "motorcycle",
                    "kickboard", "bicycle", "stroller", "cart"]),
    (range(1, 14), [f"class {i}" for i in range(1, 14)]), (range(14), [f"class {i}" for i in range(14)]),
    ([9, 3], ["class 3", "class 9"])])
def test_names_of_classes_without_categories(tmp_path, ids, names):
    write_competition(tmp_path, {"a.jpg": ((20, 20), [(i, i, 2, 4, 4) for i in ids])}, first_id=0, categories=False)
    found = read(tmp_path)
    assert found.names == names and found.category_ids == sorted(ids)
    assert [names[c] for c in found.classes[0]] == [names[sorted(ids).index(i)] for i in ids]


def test_categories_that_no_box_has_are_classes_too(lot):
    content = json.loads((lot / "train/label/Train.json").read_text())
    content["categories"] += [{"id": 0, "name": "all"}, {"id": 90, "name": "cart"}]
    dump(lot / "train/label/Train.json", content)
    found = read(lot)
    assert found.names == ["all", *NAMES, "cart"] and found.category_ids == [0, 1, 2, 3, 90]
    assert found.classes[0].tolist() == [1, 3, 1]


def test_yolo_without_names_and_with_names_elsewhere(yolo):
    (yolo / "classes.txt").rename(yolo / "labels/classes.txt")
    assert read(yolo).names == NAMES
    (yolo / "labels/classes.txt").rename(yolo / "obj.names")
    assert read(yolo).names == NAMES
    (yolo / "obj.names").unlink()
    dump(yolo / "labels/val/007.txt", "7 .5 .5 .5 .5")
    found = read(yolo)
    assert found.names == [f"class {i}" for i in range(8)] and found.category_ids == list(range(8))
    assert found.classes[[f.name for f in found.files].index("007.png")].tolist() == [7]


@pytest.mark.parametrize("text", [
    "names: ['a car', bus, \"it's\"]\nnc: 3", "train: x\nnames: {0: 'a car', 1: bus, 2: it's}",
    "names: [a car,\n  bus,\n  it's,\n]",
    "names:\n- a car\n- bus # large\n# none\n- it's\nval: y",
    "names:\n  0: a car\n\n  1: 'bus'\n  2: \"it's\"\nnc: 3\n"])
def test_names_of_a_data_yaml(yolo, text):
    (yolo / "classes.txt").unlink()
    dump(yolo / "data.yaml", text)
    dump(yolo / "other.yml", "names: [x, y, z]")
    assert read(yolo).names == read(yolo / "data.yaml").names == ["a car", "bus", "it's"]
    found = read(yolo / "other.yml")
    assert found.names == ["x", "y", "z"] and same(found._replace(names=NAMES), read(yolo)._replace(names=NAMES))


@pytest.mark.parametrize("text", ["names:", "names: 7\nnc: 1", "names: [a, , b]", "names: {0: a, 2: b}", "names: [",
                                  "names:\nnc: 3", "names:\n  1: a", "names: {"])
def test_names_of_a_data_yaml_that_is_not_understood(yolo, text):
    (yolo / "classes.txt").unlink()
    dump(yolo / "data.yaml", text)
    with pytest.raises(UserError, match="data.yaml: (its names are not|line 1: .* is not) understood.*; .*classes.txt"):
        read(yolo)
    dump(yolo / "data.yaml", "nc: 3\ntrain: x")
    assert read(yolo).names == ["class 0", "class 1", "class 2"]


def test_yolo_in_folders_and_in_capitals(yolo):
    flat = read(yolo)
    for top in ("images", "labels"):
        (yolo / top / "train/cam 1/b").mkdir(parents=True)
        for path in (yolo / top / "train").glob("*.*"):
            path.rename(yolo / top / "train/cam 1/b" / path.name.replace(".txt", ".TXT"))
    deep = read(yolo)
    assert {p.name: (c.tolist(), b.tolist()) for p, c, b in zip(deep.files, deep.classes, deep.boxes)} == {
        p.name: (c.tolist(), b.tolist()) for p, c, b in zip(flat.files, flat.classes, flat.boxes)}
    assert {p.parent.name for p in deep.files} == {"b", "val"} and sum(deep.held_out) == sum(flat.held_out) > 0
    path = next((yolo / "labels/train").rglob("*.TXT"))
    dump(path.with_suffix(".txt"), path.read_text())
    with pytest.raises(UserError, match="same name; rename"):
        read(yolo)


def test_yolo_polygons(yolo):
    path = sorted((yolo / "labels/train").glob("*.txt"))[0]
    dump(path, "1 .1 .5 .3 .2 .4 .6 .2 .8")
    found = read(yolo)
    i = [p.stem for p in found.files].index(path.stem)
    height, width = found.sizes[i]
    np.testing.assert_allclose(found.boxes[i], [[.1 * width, .2 * height, .4 * width, .8 * height]], atol=1e-9)
    dump(path, "1 .1 .5 .3 .2 .4")  # five numbers: a box and its score
    with pytest.raises(UserError, match="polygon"):
        read(yolo)


def test_images_of_other_formats_are_named(yolo):
    dump(yolo / "labels/train/w.txt", "0 .5 .5 .2 .2")
    (yolo / "images/train/w.heic").write_bytes(b"ftyp")
    with pytest.raises(UserError, match="w.txt: no image of that name in .*; add it as PNG, JPEG"):
        read(yolo)


def test_json_amid_the_images(tmp_path):
    """Roboflow's folders: its first category is the project."""
    for part, side in (("train", 20), ("valid", 30), ("test", 40)):
        picture(tmp_path / part / "1_jpg.rf.0.jpg", side, side)
        content = as_json({"1_jpg.rf.0.jpg": (None, [(0, 1, 1, 8, 8)])})
        content["categories"] = [{"id": 0, "name": "car"}, {"id": 1, "name": "car"}]
        dump(tmp_path / part / "_annotations.coco.json", content)
    found = read(tmp_path)
    assert found.sizes == [(20, 20), (30, 30)] and found.held_out == [False, True]
    assert found.names == ["car"] and found.category_ids == [1] and [c.tolist() for c in found.classes] == [[0], [0]]


def test_json_of_subsets_and_of_windows(tmp_path):
    """CVAT's subsets have names of any kind, Label Studio's file names backslashes."""
    for part, side in (("Train", 20), ("Validation", 30)):
        picture(tmp_path / f"images/{part}/1.jpg", side, side)
        dump(tmp_path / f"annotations/instances_{part}.json", as_json({"1.jpg": (None, [(0, 1, 1, 8, 8)])}))
    found = read(tmp_path)
    assert found.sizes == [(20, 20), (30, 30)] and found.held_out == [False, True]
    dump(tmp_path / "alone.json", as_json({"images\\Train\\1.jpg": (None, [(0, 1, 1, 8, 8)])}))
    assert read(tmp_path / "alone.json").files == [tmp_path / "images/Train/1.jpg"]


def test_yolo_with_byte_order_mark_and_line_ends_of_windows(yolo):
    straight = read(yolo)
    for path in [*yolo.rglob("*.txt")]:
        end = b" \r\n" if path.parent == yolo else b"\r\n\r\n"
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", end))
    assert same(read(yolo), straight)


def test_images_for_testing_have_no_labels(yolo):
    picture(yolo / "images/test/t.jpg")
    dump(yolo / "labels/test/other.txt", "nonsense")
    assert sorted(f.name for f in read(yolo).files) == sorted(DATA)


def test_all_sorts_of_images(tmp_path):
    """Sizes are of the picture as displayed, whatever the file."""
    turned = Image.Exif()
    turned[0x0112] = 6
    folder = tmp_path / "images"
    picture(folder / "exif.jpg", 10, 30, exif=turned)
    picture(folder / "grey.jpg", 10, 30, "L")
    picture(folder / "cmyk.jpg", 10, 30, "CMYK")
    picture(folder / "deep.png", 10, 30, "I;16")
    cut = picture(folder / "cut.jpg", 10, 30)
    data = cut.read_bytes()
    cut.write_bytes(data[:data.index(b"\xff\xda") + 20])  # its header is whole
    for name in ("exif", "grey"):
        dump(tmp_path / f"labels/{name}.txt", "0 0.5 0.5 0.2 0.4")
    refused(tmp_path, "3 of 5 images have no label file", "--allow-bad")
    found = read(tmp_path, allow_bad=True)
    assert dict(zip((f.stem for f in found.files), found.sizes)) == {
        "exif": (30, 10), "grey": (10, 30), "cmyk": (10, 30), "deep": (10, 30), "cut": (10, 30)}
    boxes = dict(zip((f.stem for f in found.files), found.boxes))
    assert boxes["exif"].tolist() == [pytest.approx([4, 9, 6, 21])]
    assert boxes["grey"].tolist() == [pytest.approx([12, 3, 18, 7])]


@pytest.mark.parametrize("name", ["c.jpg", "images/sub/../c.jpg", "../images/c.jpg", "sub/c.jpg", "é.jpg",
                                  "ABSOLUTE"])
def test_places_of_images(tmp_path, name):
    places = {"c.jpg": "train/images/c.jpg", "é.jpg": f"train/images/{unicodedata.normalize('NFD', 'é.jpg')}",
              "sub/c.jpg": "train/images/sub/c.jpg"}
    place = picture(tmp_path / places.get(name, "train/images/c.jpg"))
    name = str(place) if name == "ABSOLUTE" else name
    dump(tmp_path / "train/label/t.json", as_json({name: (None, [(0, 1, 1, 5, 5)])}))
    assert [f.resolve() for f in read(tmp_path / "train/label/t.json").files] == [place.resolve()]


def test_folders_are_listed_once(tmp_path, monkeypatch):
    write_competition(tmp_path, {f"{i}.jpg": ((9, 9), [(0, 1, 1, 5, 5)]) for i in range(40)})
    calls = []
    monkeypatch.setattr(os, "listdir", lambda path=".", real=os.listdir: calls.append(path) or real(path))
    assert len(read(tmp_path).files) == 40
    assert len(calls) <= 5


def test_folder_of_the_test_images(tmp_path):
    label_file = dump(tmp_path / "mine.json", "")
    assert labels.test_folder(str(tmp_path)) == labels.test_folder(label_file) == tmp_path / "test/images"


def test_ids_of_the_test_images(tmp_path):
    entries = [{"id": 3, "file_name": "x.y.jpg"}, {"id": "k", "file_name": "test/images/9.jpg", "width": 4}]
    for content in (entries, {"images": entries, "annotations": []}):
        assert coco.test_ids(dump(tmp_path / "Test_Images_Information.json", content)) == {"x.y.jpg": 3, "9.jpg": "k"}


# ---- boxes that make no sense ----------------------------------------------------------------------------------------
def boxes_of(tmp_path, boxes, capsys, size=(50, 100), **options):
    """The boxes of one image (class 0, x, y, width, height) that are left, and what is printed; they are dropped
    whatever their share."""
    shutil.rmtree(tmp_path / "DATA", ignore_errors=True)
    write_competition(tmp_path / "DATA", {"a.jpg": (size, boxes)})
    found = read(tmp_path / "DATA", allow_bad=True, **options)
    return found.boxes[0].tolist(), capsys.readouterr().out.splitlines()


GOOD = (0, 10, 10, 20, 20)
KEPT = [10., 10., 30., 30.]


@pytest.mark.parametrize("box, left, says", [
    ((0, -0.5, 0, 10.5, 10), [0, 0, 10, 10], None),  # rounding
    ((0, 90, 40, 11, 11), [90, 40, 100, 50], None),
    ((0, 90, 40, 11.01, 5), [90, 40, 100, 45], "clipped"),
    ((0, -5, -6, 500, 600), [0, 0, 100, 50], "clipped"),
    ((0, 5, 5, 0, 10), None, "less than a pixel"), ((0, 5, 5, 10, 0.89), None, "less than a pixel"),
    ((0, 5, 5, 10, 0.91), [5, 5, 15, 5.91], None),
    ((0, 5, 5, -10, 10), None, "less than a pixel"),
    ((0, 99.5, 5, 10, 10), None, "less than a pixel"), ((0, -90, -90, 10, 10), None, "less than a pixel"),
    ((0, 0, 60, 10, 10), None, "less than a pixel"),
    ((0, 1e308, 5, 1e308, 10), None, "not finite"),
    ((3, 5, 5, 10, 10), None, "unknown category"), ((-9, 5, 5, 10, 10), None, "unknown category"),
    ((0, 10, 10.0, 20, 20), None, "duplicate"), ((1, 10, 10, 20, 20), [10, 10, 30, 30], None),
    ((0, 10, 10, 20, 20.001), [10, 10, 30, 30.001], None)])
def test_each_box_is_judged_by_itself(tmp_path, capsys, box, left, says):
    boxes, lines = boxes_of(tmp_path, [GOOD, box, (0, 50, 20, 10, 10)], capsys)
    assert boxes == [KEPT, *([left] if left else []), [50, 20, 60, 30]]
    assert len(lines) == (says is not None)
    if says:
        assert says in lines[0] and ": 1 " in lines[0] and "Train.json: annotations[1], train/images/a.jpg" in lines[0]


@pytest.mark.parametrize("number", ["1e999", "NaN", "-Infinity"])
def test_numbers_that_python_writes_into_json(lot, number):
    path = lot / "train/label/Train.json"
    path.write_text(path.read_text().replace('"bbox": [1, 2, 3, 4]', f'"bbox": [1, {number}, 3, 4]'))
    assert "1 not finite" in refused(lot)
    assert [len(b) for b in read(lot, allow_bad=True).boxes] == [3, 0, 2, 0]


def test_numbers_of_categories_beyond_all_bounds(lot):
    path = lot / "train/label/Train.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["category_id"] = 2**60
    dump(path, content)
    assert "1 unknown category" in refused(lot) and len(read(lot, allow_bad=True).boxes[0]) == 2
    content["categories"].append({"id": 2**60, "name": "late"})
    dump(path, content)
    found = read(lot)
    assert found.category_ids == [1, 2, 3, 2**60] and found.classes[0].tolist() == [3, 2, 0]


def test_not_finite_and_unknown_in_yolo(yolo):
    dump(yolo / "labels/val/007.txt", "0 nan .5 .5 .5\n0 inf .5 .1 .1\n3 .5 .5 .5 .5\n1 .5 .5 .5 .5\n")
    text = refused(yolo)
    assert "3 of 9 boxes" in text and "2 not finite" in text and "1 unknown category" in text
    found = read(yolo, allow_bad=True)
    assert found.boxes[[f.name for f in found.files].index("007.png")].tolist() == [[8, 16, 24, 48]]


def test_one_coordinate_out_of_bounds_does_not_cost_the_image(yolo, capsys):
    dump(yolo / "labels/val/007.txt", "1 0.75 0.5 0.5042 0.5\n0 0.5 0.5 1.2 0.5\n")  # 1.0021 of 32 pixels: rounding
    boxes = {f.name: b for f, b in zip(*read(yolo)[0:3:2])}["007.png"]
    assert np.allclose(boxes, [[15.9328, 16, 32, 48], [0, 16, 32, 48]])
    [line] = capsys.readouterr().out.splitlines()
    assert "clipped" in line and "1 found" in line and "labels/val/007.txt: line 2" in line


def test_duplicates_are_of_one_image_and_class(tmp_path, capsys):
    boxes = [(c, 1, 2, 30, 40) for c in (0, 1, 0, 2, 0)]
    write_competition(tmp_path, {"0.jpg": ((50, 50), boxes), "1.jpg": ((50, 50), boxes)})
    found = read(tmp_path, allow_bad=True)
    assert [c.tolist() for c in found.classes] == [[0, 1, 2]] * 2
    assert "duplicate: 4 left out, first train/label/Train.json: annotations[2]" in capsys.readouterr().out


def test_boxes_keep_the_order_of_the_file(tmp_path):
    """Of an image's annotations that do not stand together, too."""
    write_competition(tmp_path, {f"{i}.jpg": ((50, 50), [(0, j, i, 9, 9) for j in range(12)]) for i in range(5)})
    content = json.loads((tmp_path / "train/label/Train.json").read_text())
    np.random.default_rng(0).shuffle(content["annotations"])
    dump(tmp_path / "train/label/Train.json", content)
    for i, boxes in enumerate(read(tmp_path).boxes):
        mine = [a["bbox"][0] for a in content["annotations"] if a["image_id"] == 10 + i]
        assert boxes[:, 0].tolist() == mine and mine != sorted(mine) and (boxes[:, 1] == i).all()


def test_crowds_are_left_out_and_are_no_fault(lot, capsys):
    content = json.loads((lot / "train/label/Train.json").read_text())
    for entry in content["annotations"][:2]:
        entry["iscrowd"] = 1
    content["annotations"][2]["iscrowd"] = 0
    dump(lot / "train/label/Train.json", content)
    assert [len(b) for b in read(lot).boxes] == [1, 1, 2, 0]  # without allow_bad
    assert "crowd: 2 left out, first train/label/Train.json: annotations[0]" in capsys.readouterr().out


def test_an_image_that_has_changed_since_it_was_labelled(lot, capsys):
    content = json.loads((lot / "train/label/Train.json").read_text())
    for entry, size in zip(content["images"], [(50, 100), (32, 64), (None, 20), ([], 20)]):
        entry["height"], entry["width"] = size
    dump(lot / "train/label/Train.json", content)
    read(lot)
    [line] = capsys.readouterr().out.splitlines()
    assert "of another size" in line and "1 found, first train/images/007.png: 64 x 32, not (32, 64)" in line


@pytest.mark.parametrize("bad", [1, 2])
def test_more_than_one_percent(tmp_path, capsys, bad):
    boxes = [(0, i % 10 * 5, i // 10 * 5, 5, 5) for i in range(100)]
    boxes[-1:] = [(0, 0, 0, 0, 5)]
    boxes[:bad - 1] = [boxes[50]][:bad - 1]
    write_competition(tmp_path / "DATA", {"a.jpg": ((50, 50), boxes)})
    root, cache = tmp_path / "DATA", tmp_path / "cache"
    for again in range(2):  # the second time from the cache
        if bad == 1:
            assert len(read(root, cache=cache).boxes[0]) == 99
        else:
            text = refused(root, root, "2 of 100", "1 duplicate", "1 less than a pixel", "--allow-bad",
                           cache=cache)
            [report] = cache.glob("*.txt")
            assert str(report) in text
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == bad and all(str(root) in line and str(next(cache.glob("*.txt"))) in line for line in lines)
    assert len(read(root, cache=cache, allow_bad=True).boxes[0]) == 100 - bad
    assert "annotations[99]" in next(cache.glob("*.txt")).read_text()


def test_the_report_has_every_case_and_only_rank_0_speaks(tmp_path, capsys, monkeypatch):
    boxes = [GOOD] + [(0, 5, 5, 0, i) for i in range(1, 30)]
    cache = tmp_path / "cache"
    assert len(boxes_of(tmp_path, boxes, capsys, cache=cache)[1]) == 1
    [report] = cache.glob("*.txt")
    assert [*map(int, re.findall(r"annotations\[(\d+)\]", report.read_text()))] == [*range(1, 30)]
    report.unlink()
    monkeypatch.setenv("RANK", "1")
    assert boxes_of(tmp_path, boxes, capsys, cache=cache) == ([KEPT], []) and not report.exists()


def test_nothing_to_learn(lot):
    path = lot / "train/label/Train.json"
    content = json.loads(path.read_text())
    dump(path, content | {"annotations": []})
    refused(lot, lot, "no boxes", "4 images")
    dump(path, content | {"annotations": [{"image_id": 10, "category_id": 1, "bbox": [0, 0, 0, 0]}]})
    refused(lot, lot, "no boxes", allow_bad=True)
    dump(path, content | {"annotations": [], "images": []})
    refused(lot, lot, "no images")


# ---- bad files -------------------------------------------------------------------------------------------------------
def put(*keys):
    """put("images", 0, "id", 5): a change of the content that sets content["images"][0]["id"] = 5."""
    *keys, last, value = keys

    def change(content):
        for key in keys:
            content = content[key]
        content[last] = value
    return change


def drop(*keys):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]
    return change


WRONG = [None, True, 1.0, "1", "", [], {}, [[]], 1e400, 10**400]
BAD_JSON = [(drop("images"), "images is missing"), (drop("annotations"), "annotations is missing")]
BAD_JSON += [(put(key, value), key) for key in ("images", "annotations", "categories") for value in WRONG
             if type(value) is not list]
BAD_JSON += [(put(key, 1, value), f"{key}[1]") for key in ("images", "annotations", "categories") for value in WRONG]
BAD_JSON += [(change(key, 1, name, *rest), f"{key}[1]: {name} is")
             for key, name in (("images", "id"), ("images", "file_name"), ("annotations", "image_id"),
                               ("annotations", "category_id"), ("categories", "id"),
                               ("categories", "name")) for change, rest in ((drop, ()), (put, [None]), (put, [1.5]),
                                                                            (put, [{}]), (put, [True]))]
BAD_JSON += [(put("annotations", 1, "iscrowd", value), "annotations[1]: iscrowd") for value in ("0", 0.5)]
BAD_JSON += [
    (put("annotations", 1, "image_id", 99), "annotations[1]: there is no image with the id 99"),
    (put("annotations", 1, "image_id", "x\ny" * 9999), "annotations[1]: there is no image"),
    (put("images", 1, "id", 10), "images[1]: the id 10 stands there twice"),
    (put("categories", 1, "id", 1), "the id 1 is another category's"),
    (put("images", 1, "file_name", "a.b.c.jpg"), "'a.b.c.jpg' is listed already"),
    (put("images", 1, "file_name", "../images/a.b.c.jpg"), "is listed already")]
# cases that cost themselves; more than 1 % of them are an error
BAD_CASES = [(put("annotations", 1, "bbox", value), "annotations[1]", "1 no box")
             for value in (None, "1 2 3 4", [], [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, None], [1, 2, 3, "4"],
                           [1, 2, 3, True], [1, 2, 3, [4]], [[1, 2, 3, 4]], [1, 2, 3, 10**400], {"x": 1})]
BAD_CASES += [(drop("annotations", 1, "bbox"), "annotations[1]", "1 no box")]
BAD_CASES += [(put("images", 1, "file_name", name), "images[1]: no image", "1 of 4 images")
              for name in ("gone.jpg", "", "x\0/y\n.jpg", "\ud800", "a/" * 9999, "../../../secret.jpg",
                           "../../../DATA2/secret.jpg", "../../..", "/etc/hostname")]


def test_bad_content_of_a_json(lot):
    picture(lot.parent / "secret.jpg")
    picture(lot.parent / "DATA2/secret.jpg")
    path = lot / "train/label/Train.json"
    good = json.loads(path.read_text())
    for change, says in BAD_JSON:
        content = copy.deepcopy(good)
        change(content)
        dump(path, content)
        text = refused(lot, path, allow_bad=True)
        assert says in text, text
    for change, *says in BAD_CASES:
        content = copy.deepcopy(good)
        change(content)
        dump(path, content)
        refused(lot, *says, "--allow-bad")
        found = read(lot, allow_bad=True)
        left = [3, 0, 2, 0] if "annotations" in says[0] else [3, 2, 0]
        assert [len(boxes) for boxes in found.boxes] in (left, [2, 1, 2, 0])


def listed_ids(root):
    return coco.test_ids(Path(root) / "Test_Images_Information.json")


@pytest.mark.parametrize("content, says", [
    (b"", "not valid JSON"), (b"{", "not valid JSON"), (b"\xff\xfe", "not valid JSON"), (b"\xff{}", "not valid JSON"),
    (b'{"images": [NaN]}', "images[0]"), (b'{"images": [{"id": -Infinity}]}', "id is -inf"), (b'{"images": 1, "images": 2}', "twice"),
    (b'{"a\\n\\u2028b": 1, "a\\n\\u2028b": 2}', "twice"), (b'{"images": [{"id": 1, "id": 1}]}', "'id' stands twice"),
    (b"[" * 200_000, "not valid JSON"), (b'{"a":' * 200_000, "not valid JSON"),
    (b'{"images": ' + b"9" * 5000 + b"}", "not valid JSON"), (b"[]", "images"), (b"null", "images"), (b"1", "images")])
def test_a_json_that_is_none(lot, content, says):
    for path, call in ((lot / "train/label/Train.json", read), (lot / "Test_Images_Information.json", listed_ids)):
        path.write_bytes(content)
        if call is read or content != b"[]":
            refused(lot, path, says, call=call)


def test_a_json_cut_anywhere(lot):
    path = lot / "train/label/Train.json"
    data = path.read_bytes()
    for end in range(0, len(data), 17):
        path.write_bytes(data[:end])
        refused(lot, path, "not valid JSON")


@pytest.mark.parametrize("content, says", [
    ([{"id": 1}], "images[0]: file_name is missing"), ([{"file_name": "a"}], "images[0]: id is missing"),
    ({"images": [{"id": 1.5, "file_name": "a"}]}, "images[0]: id is 1.5"), ({"images": {}}, "images is {}"),
    ([3], "images[0]"),
    ([{"id": 1, "file_name": "a"}, {"id": 2, "file_name": "b/a"}], "the file_name 'a' stands there 2 times"),
    ([{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], "the id 1 stands there 2 times")])
def test_bad_test_ids(tmp_path, content, says):
    refused(tmp_path, dump(tmp_path / "Test_Images_Information.json", content), says, call=listed_ids)


def test_two_categories_of_one_name(lot, tmp_path):
    path = lot / "train/label/Train.json"
    content = json.loads(path.read_text())
    dump(path, content | {"categories": content["categories"] + [{"id": 7, "name": "bus"}]})
    assert read(lot).names == NAMES  # no box has it
    content["annotations"].append(content["annotations"][0] | {"category_id": 7})
    dump(path, content | {"categories": content["categories"] + [{"id": 7, "name": "bus"}]})
    refused(lot, path, "the categories 1 and 7 are both named 'bus'; rename one")
    write_yolo(tmp_path / "yolo")
    names = dump(tmp_path / "yolo/classes.txt", "car\nbus\nbus\n")
    refused(tmp_path / "yolo", names, "the categories 1 and 2 are both named 'bus'")


def test_files_of_one_set_that_disagree(tmp_path):
    write_coco(tmp_path)
    path = tmp_path / "annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    dump(path, content | {"categories": [{"id": 3, "name": "bicycle"}]})
    refused(tmp_path, path, "the id 3 is another category's too")
    shutil.copy(tmp_path / "annotations/instances_train2017.json", path)  # validation on what was trained on
    refused(tmp_path, path, "is listed already, in annotations/instances_train2017.json")


@pytest.mark.parametrize("line", [
    "0 .5 .5 .5", "0 .5 .5 .5 .5 .9", "0 .1 .1 .2 .2 .3 .1 .4",
    "x .5 .5 .5 .5", "-1 .5 .5 .5 .5", "7",
    "1.5 .5 .5 .5 .5", "100001 .5 .5 .5 .5", "9" * 5000 + " .5 .5 .5 .5", "0 .5 .5 .5 a", "0,.5,.5,.5,.5",
    "0 .5 .5 .5 .5\0", "nan .5 .5 .5 .5", "x" * 9999])
def test_bad_lines_of_yolo(yolo, line):
    dump(yolo / "labels/val/007.txt", f"0 .5 .5 .5 .5\n\n{line}\n1.000e+00 .5 .5 .5 .5\n")
    refused(yolo, "1 of 8 boxes", "labels/val/007.txt: line 3: '", "polygon", "--allow-bad")
    found = read(yolo, allow_bad=True)
    assert found.classes[[f.name for f in found.files].index("007.png")].tolist() == [0, 1]


def test_bad_files_of_yolo(yolo):
    path = yolo / "labels/val/007.txt"
    path.write_bytes(b"\xff\xfe0\0")
    refused(yolo, path, "UTF-8")
    path.unlink()
    os.mkfifo(path)
    refused(yolo, path, "not a regular file")
    path.unlink()
    os.symlink("nowhere", path)
    refused(yolo, path, "cannot be read")
    path.unlink()
    for content in ("", "\n\n", "bus\n\nvan\n"):
        refused(yolo, dump(yolo / "classes.txt", content), "empty line")
    (yolo / "classes.txt").unlink()
    lone = dump(yolo / "labels/lone.txt", "")  # its image may be in train: then its boxes would be lost
    refused(yolo, lone, "no image of that name")
    lone.unlink()
    picture(yolo / "images/val/007.jpg")
    refused(yolo, yolo / "images/val/007", "same name; rename or remove one")
    shutil.rmtree(yolo / "images")
    (yolo / "images").mkdir()
    refused(yolo, yolo / "labels/train", "no image of that name")
    shutil.rmtree(yolo / "labels")
    (yolo / "labels").mkdir()
    refused(yolo, yolo, "no images")


XML = voc([(0, 1, 2, 3, 4)])
BOMB = '<!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c "&b;&b;">]>'


@pytest.mark.parametrize("content, says", [
    ("", "not a valid XML"), (XML[:-5], "not a valid XML"), (XML + "<x/>", "not a valid XML"),
    ("<html/>", "<annotation>"), (b"\xff\xfe\xfa", "not a valid XML"),
    ('<?xml version="1.0" encoding="no-such"?>' + XML, "not a valid XML"),
    ('<?xml version="1.0" encoding="utf-7"?>' + XML, "not a valid XML"), (XML.replace("bus", "&c;"), "not a valid XML"),
    (BOMB + XML.replace("bus", "&c;"), "DOCTYPE"), ((BOMB + XML).encode("utf-16"), "DOCTYPE"),
    ("<!DOCTYPE annotation SYSTEM 'file:///etc/hostname'>" + XML, "DOCTYPE"),
    (XML.replace("<bndbox><ymax>", "<box><ymax>").replace("</bndbox></object>", "</box></object>"), "object 1"),
    (XML.replace("<name>bus</name>", ""), "object 1"), (XML.replace("bus", " "), "object 1"),
    (XML.replace("<ymax>6</ymax>", ""), "object 1"), (XML.replace("<ymax>6", "<ymax>six"), "object 1"),
    (XML.replace("<ymax>6</ymax>", "<ymax/>"), "object 1")])
def test_bad_xml(tmp_path, content, says):
    write_voc(tmp_path)
    path = tmp_path / "Annotations/007.xml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(tmp_path, path, says, allow_bad=True)


def test_good_but_unusual_voc(tmp_path):
    write_voc(tmp_path)
    path = tmp_path / "Annotations/007.xml"
    path.write_bytes(XML.replace("<ymax>6<", "<ymax> 6.5\n<").replace("bus", "\n grüner\tBus ").encode("utf-16"))
    (tmp_path / "Annotations/empty.xml").unlink()  # an image without a file is background
    found = read(tmp_path)
    assert found.names == ["bus", "car", "grüner Bus", "van"]
    assert found.boxes[[f.stem for f in found.files].index("007")].tolist() == [[1, 2, 4, 6.5]]
    dump(tmp_path / "Annotations/empty.xml", XML.replace("<xmin>2<", "<xmin>nan<"))
    refused(tmp_path, "1 not finite")
    path.rename(path.with_name("other.xml"))
    refused(tmp_path, path.with_name("other.xml"), "no image of that name")
    path.with_name("other.xml").unlink()
    refused(tmp_path, dump(tmp_path / "ImageSets/Main/val.txt", "008.png\n"), "no image '008.png'")


def test_folders_without_labels(tmp_path):
    refused(tmp_path, tmp_path, "no labels")
    for path in (tmp_path / "nowhere", tmp_path / "nowhere.json", tmp_path / ("x" * 300), picture(tmp_path / "a.jpg")):
        refused(path, path, "no such folder")
    for name in ("a.json", "b.json"):
        dump(tmp_path / name, as_json({"a.jpg": (None, [(0, 1, 1, 5, 5)])}))
    refused(tmp_path, tmp_path, "2 JSON files (a.json, b.json")
    dump(tmp_path / "b.json", "").rename(tmp_path / "Test_Images_Information.json")
    assert len(read(tmp_path).files) == 1


def test_images_without_a_readable_header_have_no_size(lot):
    """They and their boxes are left out by `usable`, see test_bad_items.py."""
    path = lot / "train/images/007.png"
    path.write_bytes(b"GIF89a")
    found = read(lot)
    i = found.files.index(path)
    assert found.sizes[i] is None and not len(found.boxes[i]) and None not in found.sizes[:i] + found.sizes[i + 1:]


# ---- what is kept ----------------------------------------------------------------------------------------------------
@pytest.fixture
def reading(tmp_path, monkeypatch):
    """reading(root) -> (Labels, whether the files were read for it); what is kept equals what is read."""
    calls = []
    for module in (labels.coco, labels.voc, labels.yolo):
        monkeypatch.setattr(module, "read", lambda *args, real=module.read: calls.append(args) or real(*args))

    def call(root, cache=tmp_path / "cache"):
        calls.clear()
        found, count = labels.read(root, cache=cache), len(calls)
        assert same(found, labels.read(root, cache=None))
        assert count in (0, 1)
        return found, count > 0
    return call


@pytest.mark.parametrize("kind", FORMATS)
def test_files_are_read_once(tmp_path, kind, reading, monkeypatch):
    FORMATS[kind][0](tmp_path / "DATA")
    first, fresh = reading(tmp_path / "DATA")
    again, fresh_again = reading(tmp_path / "DATA")
    assert fresh and not fresh_again and same(first, again) and first.files == again.files
    monkeypatch.chdir(tmp_path / "DATA")
    again, fresh = reading(Path("."))  # the same place by another name
    assert not fresh and not again.files[0].is_absolute() and again.files[0].exists()
    monkeypatch.setattr(labels, "VERSION", labels.VERSION + 1)
    assert reading(tmp_path / "DATA")[1] and not reading(tmp_path / "DATA")[1]


def later(path, write, *args):
    """Changes a file; its time changes by no more than a nanosecond."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    write(*args)
    os.utime(path, ns=(before + 1, before + 1))


def test_every_change_of_a_file_is_seen(yolo, reading):
    text, image, names = yolo / "labels/val/007.txt", yolo / "images/val/007.png", yolo / "obj.names"
    changes = [
        lambda: later(text, text.write_text, "1 .5 .5 .25 .5\n"),
        lambda: later(text, text.write_text, "1 .5 .5 .50 .5\n"),  # of the same size
        lambda: later(image, picture, image, 32, 32),
        lambda: picture(yolo / "images/val/new.jpg"), lambda: dump(yolo / "labels/val/new.txt", "0 .5 .5 .5 .5"),
        (yolo / "labels/val/new.txt").unlink, (yolo / "images/val/new.jpg").unlink, (yolo / "classes.txt").unlink,
        lambda: dump(names, "A\nB\nC"), lambda: later(names, names.write_text, "a\nB\nC"),
        lambda: [(yolo / top / "val").rename(yolo / top / "train9") for top in ("images", "labels")]]
    seen = [reading(yolo)[0]]
    for number, change in enumerate(changes):
        change()
        found, fresh = reading(yolo)
        assert fresh and not same(found, seen[-1]), number
        assert not reading(yolo)[1]
        seen.append(found)
    widths = [next(b[0, 2] - b[0, 0] for f, b in zip(found.files, found.boxes) if f.name == "007.png")
              for found in seen[1:4]]
    assert widths == [8, 16, 16] and not any(seen[-1].held_out) and seen[-1].names == ["a", "B", "C"]


def test_a_json_and_its_images_are_watched(lot, reading):
    path = lot / "train/label/Train.json"
    reading(lot)
    later(path, path.touch)
    assert reading(lot)[1] and not reading(lot)[1]
    picture(lot / "train/images/unlisted.jpg")
    assert not reading(lot)[1]
    image = lot / "train/images/empty.jpg"
    later(image, picture, image, 31, 40)
    found, fresh = reading(lot)
    assert fresh and found.sizes[-1] == (31, 40)
    image.unlink()
    refused(lot, path, "no image 'empty.jpg'", "1 of 4 images", cache=lot.parent / "cache")


def test_val_lists_are_watched(tmp_path, reading):
    write_voc(tmp_path / "DATA")
    assert sum(reading(tmp_path / "DATA")[0].held_out) == 2
    dump(tmp_path / "DATA/ImageSets/Main/val.txt", "007\n")
    assert sum(reading(tmp_path / "DATA")[0].held_out) == 1
    (tmp_path / "DATA/ImageSets/Main/val.txt").unlink()
    assert sum(reading(tmp_path / "DATA")[0].held_out) == 0


def test_data_sets_do_not_share_what_is_kept(tmp_path, reading):
    for name, format in (("A", "coco"), ("B", "voc")):
        FORMATS[format][0](tmp_path / name)
    assert [reading(tmp_path / name)[1] for name in "ABAB"] == [True, True, False, False]


def test_a_damaged_cache_is_made_again(lot, reading, tmp_path):
    reading(lot)
    [store] = (tmp_path / "cache").glob("labels-*.z")
    whole = store.read_bytes()
    flipped = [bytearray(whole) for _ in range(40)]
    for data, spot in zip(flipped, np.random.default_rng(0).integers(2, len(whole), 40)):
        data[spot] ^= 16
    for data in [b"", b"\n", whole[:-1], whole[:len(whole) // 2], whole[9:], b"\xff" * 99, b"[" * 200_000, *flipped]:
        with contextlib.suppress(zlib.error):
            if zlib.decompress(data) == zlib.decompress(whole):  # another way of writing the same
                continue
        store.write_bytes(data)
        assert reading(lot)[1], data[:99]
        assert store.read_bytes() == whole and not reading(lot)[1]
    store.unlink()
    store.mkdir()
    assert reading(lot)[1] and reading(lot)[1]  # cannot be replaced, and need not


def test_a_cache_of_valid_content_of_another_kind(lot, reading, tmp_path):
    reading(lot)
    [store] = (tmp_path / "cache").glob("labels-*.z")
    for content in (b"{}", b"[]", b"null", b'{"key": %d}' % labels.VERSION, b"no JSON"):
        store.write_bytes(zlib.compress(content))
        assert reading(lot)[1]


def test_a_place_that_cannot_be_written(lot, tmp_path, reading, monkeypatch, capsys):
    file = dump(tmp_path / "file", "")
    assert reading(lot, cache=file)[1] and reading(lot, cache=file / "deeper")[1]
    assert file.read_text() == ""
    boxes_of(tmp_path, [GOOD, GOOD], capsys)
    text = refused(lot, "1 of 2 boxes", cache=file)
    assert "all in" not in text and "all in" not in capsys.readouterr().out

    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    assert len(read(lot, cache=tmp_path / "cache", allow_bad=True).files) == 1
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]


def test_several_processes_read_once(lot, tmp_path, monkeypatch):
    """They start together; one reads, all have the same, nothing is left over."""
    expected, log = read(lot), tmp_path / "log"
    real = coco.read

    def slowly(layout):
        with open(log, "a") as file:
            file.write("read\n")
        time.sleep(0.2)
        return real(layout)
    monkeypatch.setattr(coco, "read", slowly)
    children = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                if same(labels.read(lot, cache=tmp_path / "cache"), expected):
                    os._exit(0)
            os._exit(1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
    assert log.read_text() == "read\n"
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == [".lock", ".z"]


def test_names_that_are_no_text(tmp_path, reading, monkeypatch):
    """Bytes that are not UTF-8: in names of images, in the cache, in the report (stdout as utils.errors.cli sets it)."""
    said = []
    monkeypatch.setattr(labels.bad.dist, "print0", said.append)
    folder = os.fsencode(tmp_path / "D")
    for part in (b"images", b"labels"):
        os.makedirs(os.path.join(folder, part))
    picture(tmp_path / "x.jpg").rename(os.fsdecode(os.path.join(folder, b"images/\xe9\xff.jpg")))
    with open(os.path.join(folder, b"labels/\xe9\xff.txt"), "w") as file:
        file.write("0 .5 .5 .5 .5\n1 .5 .5 2 2\n")
    first = reading(tmp_path / "D")
    assert first[0].files[0].exists() and first[1] and not reading(tmp_path / "D")[1]
    assert "clipped" in said[0]


# ---- real data -------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not BCCD.exists(), reason="without the blood cells")
def test_blood_cells_against_pycocotools(tmp_path, capsys):
    found = labels.read(BCCD, cache=tmp_path)
    out = capsys.readouterr().out
    assert len(found.files) == 292 and out.count("\n") == 1 and "less than a pixel inside the image: 2 left out" in out
    assert found.names == ["RBC", "WBC", "Platelets"] and found.category_ids == [1, 2, 3] and not any(found.held_out)
    assert sum(map(len, found.boxes)) == 3941
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(BCCD / "train/label/Train.json"))
    for i, entry in enumerate(truth.loadImgs(truth.getImgIds())):
        boxes = [(a["category_id"], a["bbox"]) for a in truth.imgToAnns[entry["id"]] if min(a["bbox"][2:]) > 0]
        assert found.files[i] == BCCD / "train/images" / entry["file_name"]
        assert found.sizes[i] == (entry["height"], entry["width"])
        assert [found.category_ids[c] for c in found.classes[i]] == [c for c, _ in boxes]
        assert found.boxes[i].tolist() == [[x, y, x + w, y + h] for _, (x, y, w, h) in boxes]
    ids = coco.test_ids(BCCD / "Test_Images_Information.json")
    assert len(ids) == 72 and set(ids) == {p.name for p in (BCCD / "test/images").iterdir()}
