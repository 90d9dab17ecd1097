"""Layouts of data as people have them: parts, names and classes that the data tells are obeyed, or refused."""
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train_seg
from data import cls, folds, labels, pairs, seg
from data.labels import data_yaml
from tests.conftest import TINY, write_wildfire
from utils.errors import UserError

LINE = "0 .5 .5 .5 .5\n"


def picture(path, size=(20, 20), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size[::-1], 9).save(path, **options)
    return path


def write(root, files):
    """Files by their names: text, or None for a picture."""
    for name, text in files.items():
        path = root / name
        if text is None:
            picture(path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode(("utf-8")))
    return root


def refused(call, *args, says, **options):
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    assert re.search(says, str(caught.value)) and "\n" not in str(caught.value), str(caught.value)


def split(data, root):
    """{name without suffix: held out}"""
    held_out = data.held_out or [False] * len(data.files)
    return {str(file.relative_to(root).with_suffix("")): out for file, out in zip(data.files, held_out)}


@pytest.mark.parametrize("name, part", [
    ("train2017", "train"), ("instances_val2017.json", "val"), ("train_img", "train"), ("Testing", "test"),
    ("DEV", "val"), ("ValidationSet", "val"), ("trainstation", None), ("contest", None), ("images/Train/a", "train")])
def test_parts_by_whole_words(name, part):
    assert folds.part_of(name) == part


# ---- classification --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("train, val, test", [("Training", None, "Testing"), ("train", "validation", "test"),
                                              ("TRAIN", "Dev", None), ("train", "valid", "testing")])
def test_class_folders_in_parts(tmp_path, train, val, test):
    for part in filter(None, (train, val, test)):
        write(tmp_path, {f"{part}/cats/{part}1.png": None, f"{part}/dogs/{part}2.png": None})
    data = cls.read(tmp_path)
    assert data.names == ["cats", "dogs"] and data.labels.argmax(1).tolist() == [0, 1] * (1 + bool(val))
    assert split(data, tmp_path) == {f"{part}/{kind}/{part}{i}": part == val for part in (train, val) if part
                                     for i, kind in ((1, "cats"), (2, "dogs"))}


def test_class_folders_without_the_training_part(tmp_path):
    refused(cls.read, write(tmp_path, {"val/a/1.png": None, "val/b/2.png": None}), says="val is no class")


def test_tables_of_two_parts(tmp_path):
    write(tmp_path, {"train/1.png": None, "train/2.png": None, "val/1.png": None, "test/3.png": None,
                     "train.csv": "id,label\n1,a\n2,b\n", "val.csv": "id,label\n1.png,b\n", "test.csv": "id\n3\n"})
    data = cls.read(tmp_path)
    assert split(data, tmp_path) == {"train/1": False, "train/2": False, "val/1": True}
    assert data.labels.argmax(1).tolist() == [0, 1, 1] and data.single_label
    write(tmp_path, {"val.csv": "id,kind\n1.png,b\n"})
    refused(cls.read, tmp_path, says="val.csv: has other columns than .*train.csv")


@pytest.mark.parametrize("table, names, rows, held_out", [
    ("image,labels\na,scab\nb,scab rust\nc,rust\n", ["rust", "scab"], [[0, 1], [1, 1], [1, 0]], ()),
    ("image,label\na,x\nb,x|y\nc,y\n", ["x", "y"], [[1, 0], [1, 1], [0, 1]], ()),
    ("image,tags\na,haze dry\nb,clear\nc,haze\n", ["clear", "dry", "haze"], [[0, 1, 1], [1, 0, 0], [0, 0, 1]], ()),
    ("image,label\na,hot dog\nb,dog\nc,cat\n", ["cat", "dog", "hot dog"], [[0, 0, 1], [0, 1, 0], [1, 0, 0]], ()),
    ("path,label,split\nd/a.png,x,train\nd/b.png,y,VALID\nd/c.png,x,test\n", ["x", "y"], [[1, 0], [0, 1]],
     [False, True]),
    ("file,x,y\n/data/k/d/a.png,1,0\n/data/k/d/b.png,True,1.0\n", ["x", "y"], [[1, 0], [1, 1]], ())])
def test_tables(tmp_path, table, names, rows, held_out):
    write(tmp_path, {f"d/{name}.png": None for name in "abc"} | {"train.csv": table})
    data = cls.read(tmp_path)
    assert (data.names, data.labels.tolist()) == (names, rows)
    assert data.held_out == list(held_out or [False] * len(rows))


@pytest.mark.parametrize("table, columns, says", [
    ("image,target,is_external\na,1,0\nb,0,0\n", None, "column target beside 1 others.*--columns image target"),
    ("image,x,age\na,1,31\nb,0,40\n", None, "line 2 has the value '31'.*--columns image LABEL"),
    ("image,x,age\na,1,31\nb,0,40\n", ["image", "y"], "no column y.* image, x, age"),
    ("image,x,age\na,1,31\nb,0,40\n", ["image"], "--columns")])
def test_columns_that_are_no_classes(tmp_path, table, columns, says):
    write(tmp_path, {"train/a.png": None, "train/b.png": None, "train.csv": table})
    refused(cls.read, tmp_path, columns=columns, says=says)


def test_named_columns(tmp_path):
    write(tmp_path, {"train/a.png": None, "train/b.png": None,
                     "train.csv": "n,image,target,sun,fog\n1,a,u,1,0\n2,b,v,1,1\n"})
    assert cls.read(tmp_path, columns=["image", "target"]).names == ["u", "v"]
    data = cls.read(tmp_path, columns=["image", "sun", "fog"])
    assert data.names == ["sun", "fog"] and data.labels.tolist() == [[1, 0], [1, 1]]


# ---- YAML ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text, expected", [
    ("names:\n  - \"\\uC790\\uB3D9\"\n  - 'lane #1'\n  - it's # no\nnc: 3",
     {"names": ["자동", "lane #1", "it's"], "nc": "3"}),
    ("names:\n  \"0\": car\n  1: bus", {"names": {"0": "car", "1": "bus"}}),
    ("{names: [car, 'b,us'], nc: 2}", {"names": ["car", "b,us"], "nc": "2"}),
    ("# c\nnames: {0: car,\n  1: \"bus\"}  # d\npath: C:/a b#c",
     {"names": {"0": "car", "1": "bus"}, "path": "C:/a b#c"}),
    ("train:\n- a\n- b\nextra:\n  deep:\n    - x\nval: ~", {"train": ["a", "b"], "extra": None, "val": None})])
def test_yaml(tmp_path, text, expected):
    assert data_yaml.read(write(tmp_path, {"data.yaml": text}) / "data.yaml") == expected


@pytest.mark.parametrize("text, line", [
    ("nc: 1\nnames: &n [a]", 2), ("names: !!seq [a]", 1), ("names:\n\t- a", 2), ("names: |\n  a", 1),
    ("names:\n  - a\n    b", 3), ("names:\n  - a\n   - b", 3), ("names: [a, b\nnc: 2", 1),
    ("names: [a]\nnames: [b]", 2),
    ("names: {0: a, 0: b}", 1), ("names: 'a\n  b'", 1), ("names: [a] b", 1), ("names:\n  - a: b", 2), ("names: *x", 1)])
def test_yaml_that_is_refused(tmp_path, text, line):
    refused(data_yaml.read, write(tmp_path, {"data.yaml": text}) / "data.yaml", says=f"data.yaml: line {line}: ")


def test_number_of_names(tmp_path):
    write(tmp_path, {"images/1.png": None, "labels/1.txt": LINE, "data.yaml": "names: [a, b]\nnc: 3"})
    refused(labels.read, tmp_path, cache=None, says="nc is '3' and there are 2 names")


# ---- detection -------------------------------------------------------------------------------------------------------
IN_FOLDERS = {f"images/{part}/{part}.png": None for part in "abc"} | {
    f"labels/{part}/{part}.txt": LINE for part in "abc"}
HALF = {"images/a/a": False, "images/b/b": True}
XML = ("<annotation><size><width>20</width><height>20</height></size><object><name>é</name><bndbox><xmin>1</xmin>"
       "<ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>")
COCO = {"images": [{"id": 1, "file_name": "1.png"}], "categories": [{"id": 1, "name": "x"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]}]}


@pytest.mark.parametrize("files, parts", [
    (IN_FOLDERS | {"data.yaml": "train: images/a\nval: images/b\ntest: images/c"}, HALF),
    (IN_FOLDERS | {"data.yaml": "train: [images/a, images/c]\nval: images/b"}, HALF | {"images/c/c": False}),
    (IN_FOLDERS | {"data.yaml": "path: /gone\ntrain: t.txt\nval: v.txt", "t.txt": "./images/a/a.png\n",
                   "v.txt": "images/b/b.png\n"}, HALF),
    (IN_FOLDERS | {"train.txt": "data/images/a/a.png\n", "val.txt": "data/images/b/b.png\n"}, HALF),
    ({"images/train/1.png": None, "images/val/2.png": None, "labels/train/1.txt": LINE, "labels/val/2.txt": LINE,
      "data.yaml": "train: images/val\nval: images/train"}, {"images/train/1": True, "images/val/2": False}),
    ({"train/images/1.png": None, "valid/images/2.png": None, "train/labels/1.txt": LINE, "valid/labels/2.txt": LINE,
      "data.yaml": "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnames: [a]"},
     {"train/images/1": False, "valid/images/2": True}),
    ({"Images/Train/1.png": None, "Images/Testing/2.png": None, "Labels/train/1.txt": LINE}, {"Images/Train/1": False}),
    ({"1.png": None, "1.txt": LINE, "classes.txt": "a"}, {"1": False}),
    ({"train/1.png": None, "train/1.xml": XML, "dev/2.png": None, "dev/2.xml": XML}, {"dev/2": True, "train/1": False}),
    ({"images/1.png": None, "Annotations/1.xml": XML}, {"images/1": False}),
    ({"JPEGImages/1.png": None, "JPEGImages/2.png": None, "Annotations/1.xml": XML, "Annotations/2.xml": XML,
      "ImageSets/Main/train.txt": "1\n", "ImageSets/Main/val.txt": "2\n"},
     {"JPEGImages/1": False, "JPEGImages/2": True}),
    ({"obj.names": "car\n", "obj.data": "classes = 1\ntrain = data/train.txt",
      "train.txt": "data/obj_train_data/1.png\n",
      "obj_train_data/1.png": None, "obj_train_data/1.txt": LINE}, {"obj_train_data/1": False}),
    ({"images/1.png": None, "labels/1.txt": LINE, "classes.txt": "a", "notes.json": "{}"}, {"images/1": False}),
    ({"images/1.png": None, "annotations/instances_default.json": json.dumps(COCO)}, {"images/1": False}),
    ({"images/1.png": None, "result.json": json.dumps(COCO)}, {"images/1": False}),
    ({"Images/Train/1.png": None, "Annotations/instances_Train.json": json.dumps(COCO)}, {"Images/Train/1": False})])
def test_detection(tmp_path, files, parts):
    root = tmp_path / "ds"
    data = labels.read(write(root, files), cache=None)
    assert split(data, root) == parts and all(len(boxes) == 1 for boxes in data.boxes)


def test_a_path_beside_the_yaml(tmp_path):
    write(tmp_path, {f"ds/{name}": text for name, text in IN_FOLDERS.items()}
          | {"my.yaml": "path: ./ds\ntrain: images/a\nval: images/b\nnames: {1: y, 0: x}"})
    data = labels.read(tmp_path / "my.yaml", cache=None)
    assert split(data, tmp_path / "ds") == HALF and data.names == ["x", "y"]


@pytest.mark.parametrize("yaml, says", [
    ("train: images/a\nval: images/a", "images/a/a.png is in the part val here and in train"),
    ("train: images/a\nval: images/z", "val: images/z: no such folder"), ("train: {a: b}", "not texts"),
    ("train: t.txt", "1 of 2 images cannot be used .*no image 'images/a/zz.png'")])
def test_parts_that_are_refused(tmp_path, yaml, says):
    write(tmp_path, IN_FOLDERS | {"data.yaml": yaml, "t.txt": "images/a/a.png\nimages/a/zz.png\n"})
    refused(labels.read, tmp_path, cache=None, says=says)


@pytest.mark.parametrize("change, box", [
    ({"bbox": [], "segmentation": [[1, 2, 7, 2, 7, 9]]}, [1, 2, 7, 9]),
    ({"bbox": None, "segmentation": [[1, 2, 7, 2], [0, 5, 3, 9]]}, [0, 2, 7, 9]),
    ({"iscrowd": None, "image_id": "1", "category_id": 1.0}, [1, 1, 6, 6])])
def test_annotations_of_coco(tmp_path, change, box):
    entry = COCO["annotations"][0] | change
    write(tmp_path, {"1.png": None, "a.json": json.dumps(COCO | {"annotations": [entry]})})
    assert labels.read(tmp_path, cache=None).boxes[0].tolist() == [box]


@pytest.mark.parametrize("tag", range(1, 9))
def test_boxes_of_images_that_exif_turns(tmp_path, tag, capsys):
    """Boxes of the upright image are taken. Those of a file whose labels state its size before the turn are bad."""
    exif = Image.Exif()
    exif[0x0112] = tag
    Image.new("L", (96, 64)).save(tmp_path / "1.jpg", exif=exif)
    Image.new("L", (96, 64)).save(tmp_path / "2.jpg")
    sides = (64, 96) if tag > 4 else (96, 64)
    for width, height in (sides, (96, 64)):
        content = {"categories": COCO["categories"], "images": [
            {"id": 1, "file_name": "1.jpg", "width": width, "height": height}, {"id": 2, "file_name": "2.jpg"}],
            "annotations": [{"image_id": i, "category_id": 1, "bbox": [10, 8, 48, 16]} for i in (1, 2)]}
        write(tmp_path, {"a.json": json.dumps(content)})
        if (width, height) == sides:
            assert [boxes.tolist() for boxes in labels.read(tmp_path, cache=None).boxes] == 2 * [[[10, 8, 58, 24]]]
            assert capsys.readouterr().out == ""
        else:
            refused(labels.read, tmp_path, cache=None, says="1 of 2 boxes cannot be used .*EXIF .*1.jpg: .*--allow-bad")
            found = labels.read(tmp_path, cache=None, allow_bad=True)
            assert [boxes.tolist() for boxes in found.boxes] == [[], [[10, 8, 58, 24]]]


@pytest.mark.parametrize("files, says", [
    ({"labels/1.txt": "0 .5 .5 .9 .9\n0 .9 .9 .95 .95\n0 .2 .9 .5 .95\n", "images/1.png": None},
     "2 of 3 boxes lie to more"),
    ({"images/1.png": None, "images/2.png": None, "images/3.png": None, "labels/1.txt": LINE},
     "2 of 3 images have no label"),
    ({"images/train/1.png": None, "images/val/2.png": None, "labels/train/1.txt": LINE}, "none of the 1 validation")])
def test_labels_that_are_rather_misunderstood(tmp_path, files, says):
    refused(labels.read, write(tmp_path, files), cache=None, says=f"{says}.*--allow-bad")
    assert labels.read(tmp_path, cache=None, allow_bad=True).files


def cvat(shapes):
    return f'<annotations><image id="9" name="1.png" width="200" height="100">{shapes}</image></annotations>'


def region(x, y, width, height, kind="rectanglelabels", **more):
    return {"type": kind, "original_width": 200, "original_height": 100, "value": {
        "x": x, "y": y, "width": width, "height": height, kind: ["car"]} | more}


def tasks(*regions, image="/data/upload/1/0123abcd-1.png", **more):
    return json.dumps([{"data": {"image": image}, "annotations": [
        {"was_cancelled": True, "result": [region(1, 1, 9, 9)]}, {"result": [{"type": "relation"}, *regions]}]} | more])


@pytest.mark.parametrize("name, text, boxes, says", [
    ("annotations.xml", cvat('<tag label="night"/><box label="car" xtl="1.5" ytl="2" xbr="30" ybr="40.25"/>'),
     [[1.5, 2, 30, 40.25]], ""),
    ("annotations.xml", cvat('<polygon label="car" points="9.5,8;1,20;30,2"/>'), [[1, 2, 30, 20]], ""),
    # a box of 20 x 10 around (20, 15), upright after a quarter turn
    ("annotations.xml", cvat('<box label="car" rotation="90.0" xtl="10" ytl="10" xbr="30" ybr="20"/>'),
     [[15, 5, 25, 25]], "rotated box, taken by its extent: 1 found"),
    ("annotations.xml", cvat('<points label="car" points="5,5"/><box label="car" xtl="1" ytl="1" xbr="9" ybr="9"/>'),
     [[1, 1, 9, 9]], "no box of 4 numbers, nor a polygon: 1 left out"),
    ("my.json", tasks(region(25, 10, 50, 20)), [[50, 10, 150, 30]], ""),
    ("my.json", tasks(region(25, 10, 50, 20), image="https://host/a%20b/1.png"), [[50, 10, 150, 30]], ""),
    # 40 x 10 pixels, turned clockwise around its first corner (100, 20): it hangs down from there, to the left
    ("my.json", tasks(region(50, 20, 20, 10, rotation=90)), [[90, 20, 100, 60]],
     "rotated box, taken by its extent: 1 found"),
    ("my.json", tasks(region(25, 10, 50, 20), region(1, 1, 1, 1, "ellipselabels")), [[50, 10, 150, 30]],
     "no box of 4 numbers, nor a polygon: 1 left out")])
def test_files_of_annotation_programs(tmp_path, capsys, name, text, boxes, says):
    write(tmp_path, {name: text})
    picture(tmp_path / "images/1.png", (100, 200))
    for path in (tmp_path, tmp_path / name):
        data = labels.read(path, cache=None, allow_bad=True)
        np.testing.assert_allclose(data.boxes[0], boxes, atol=1e-9)
        assert data.names == ["car"] and data.sizes == [(100, 200)] and says in capsys.readouterr().out


@pytest.mark.parametrize("name, text", [
    ("annotations.xml", cvat('<box label="car" xtl="a" ytl="2" xbr="30" ybr="40.25"/>')),
    ("annotations.xml", '<annotations><image name="1.png"/></annotations>'), ("annotations.xml", "<annotation/>"),
    ("annotations.xml", cvat('<box label="car" rotation="inf" xtl="1" ytl="2" xbr="30" ybr="40.25"/>')),
    ("my.json", json.dumps([{"image": "1.png", "label": [{"x": 1}]}])), ("my.json", "[1]"),
    ("my.json", tasks(region("a", 1, 1, 1))), ("my.json", tasks(region(1, 1, 1, 1, rectanglelabels=[])))])
def test_files_of_annotation_programs_that_are_refused(tmp_path, name, text):
    write(tmp_path, {name: text, "images/1.png": None})
    refused(labels.read, tmp_path, cache=None, says=f"{name}: .*(export it again|correct or replace it)")


def test_xml_in_its_encoding(tmp_path):
    write(tmp_path, {"images/1.png": None})
    (tmp_path / "annotations").mkdir()
    text = '<?xml version="1.0" encoding="iso-8859-1"?>' + XML
    (tmp_path / "annotations/1.xml").write_bytes(text.encode("latin-1"))
    assert labels.read(tmp_path, cache=None).names == ["é"]


# ---- segmentation ----------------------------------------------------------------------------------------------------
def masks(root, names):
    return write(root, dict.fromkeys(names))


@pytest.mark.parametrize("names, held_out", [
    (["train_img/train_img_1.png", "train_mask/train_mask_1.png", "val_img/1.png", "val_mask/1.png"],
     {"train_img_1": False, "1": True}),
    (["train/images/1.png", "train/masks/1.png", "val/images/2.png", "val/masks/2.png"], {"1": False, "2": True}),
    (["images/train/1.png", "masks/train/1.png", "images/val/1.png", "masks/val/1.png", "images/test/9.png"],
     {"images/train/1": False, "images/val/1": True}),
    (["images/1.png", "images/2.png", "Labels/1_gt.png", "Labels/2_gt.png"], {"1": False, "2": False}),
    (["x_sat.jpg", "y_sat.jpg", "x_mask.png", "y_mask.png"], {"x_sat": False, "y_sat": False}),
    (["imgs/scene7.png", "imgs/scene17.png", "annotations/m7_v.png", "annotations/m17_v.png"],
     {"scene7": False, "scene17": False})])
def test_pairs_in_folders(tmp_path, names, held_out):
    found = pairs.find(masks(tmp_path, names))
    assert {name: out for name, _, out, *_ in found} == held_out
    numbers = [[re.sub(r"\D", "", path.stem) or path.stem[0] for path in pair] for _, pair, *_ in found]
    assert all(image == mask for image, mask in numbers)


def test_pairs_that_do_not_fit(tmp_path):
    refused(pairs.find, masks(tmp_path / "a", ["images/1.png", "images/2.png", "masks/1.png", "masks/4.png"]),
            says="images/2.png: no file of that name.*masks/4.png.*pairs.csv")
    refused(pairs.find, masks(tmp_path / "b", ["one/1.png", "two/1.png"]), says="no masks found.*pairs.csv")


def test_a_table_of_pairs(tmp_path):
    for name, value in (("a", 0), ("b", 0), ("t", 0), ("m1", 1), ("m2", 1)):
        Image.fromarray(np.full((8, 9), value, np.uint8)).save(tmp_path / f"{name}.png")
    table = tmp_path / "pairs.csv"
    table.write_text("image,mask,group,part,weight\na.png,m1.png,p,train,2\nb.png,,q,val,\nt.png,m2.png,q,test,1\n")
    refused(seg.read, tmp_path, says="row 3: .*weight")
    table.write_text(table.read_text().replace("val,\n", "val,1\n"))
    for root in (tmp_path, table):
        data = seg.read(root)
        assert data[2:5] == ([False, True], ["p", "q"], [2, 1]) and data.names == ["a.png", "b.png"]
        assert data.areas == [72, 0] and seg.test_folder(root) == tmp_path / "test_img"
    assert seg.SegData(data.pairs)[1]["mask"].tolist() == [[0] * 9] * 8
    table.write_text("image,mask\na.png,m1.png\na.png,gone.png\n")
    refused(seg.read, tmp_path, says="pairs.csv: row 3: 'a.png,gone.png'")


def test_what_is_printed(capsys):
    folds.describe("DATA", "labels in .txt files", ["a", *map(str, range(24))], np.ones((5, 25)), ([0, 1, 2], [3]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "DATA: labels in .txt files; 5 samples, 25 classes"
    assert lines[1].startswith("  training: 3 samples, 0 without a label: a 3, 0 3") and lines[1].endswith("and 5 more")


def test_segmentation_holds_out_its_own_part(script, tmp_path, capsys):
    root = write_wildfire(tmp_path / "W", train=4)
    for kind in ("img", "mask"):
        (root / f"val_{kind}").mkdir()
        (root / f"train_{kind}/train_{kind}_3.tif").rename(root / f"val_{kind}/train_{kind}_3.tif")
    script(train_seg, "--data", root, *TINY)
    assert json.loads(Path("runs/seg/exp/folds.json").read_text()) == {
        "train_img_0": 1, "train_img_1": 1, "train_img_2": 1, "train_img_3": 0}
    shown = capsys.readouterr().out
    assert "training: 3 samples, 0 without a label: object" in shown and "validation: 1 samples" in shown


def test_missing_images_and_bad_boxes_have_a_list_each(tmp_path):
    write(tmp_path / "D", {"a.jpg": None, "b.jpg": None})
    entries = [{"id": i, "file_name": name} for i, name in enumerate(("a.jpg", "b.jpg", "gone.jpg"))]
    notes = [{"image_id": 0, "category_id": 1, "bbox": box} for box in ([1, 1, 9, 9], None)]
    (tmp_path / "D/labels.json").write_text(json.dumps({"images": entries, "annotations": notes}))
    labels.read(tmp_path / "D", allow_bad=True, cache=tmp_path / "kept")
    lists = {path.name.split("-")[0]: path.read_text() for path in (tmp_path / "kept").glob("*.txt")}
    assert lists.keys() == {"missing", "labels"} and "gone.jpg" in lists["missing"] and "annotations[1]" in lists["labels"]
