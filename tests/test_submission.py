"""predict.py --submission, --ids, and which images are read: samples of every shape, filled, read by other programs."""
import contextlib
import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

import predict
from data import images
from data.results import sample, submissions
from tests.test_predict_det import FLAGS as DET, Finder, check, finder, items_of, save, scene, weights  # noqa: F401
from tests.test_scripts_cls import FLAGS as CLS, results, weights as cls_weights
from utils.errors import PartialError, UserError
from utils.flags import RUNS
from tests.conftest import write_tif

NAMES = ["cat", "dog", "school bus"]
PROBS = np.array([[0.25, 0.5, 0.9], [0.8, 0.125, 0.1], [0.3, 0.6, 0.55]])
FILES = [Path("in/007.jpg"), Path("in/b c.png"), Path("in/7.jpg")]
ROWS = torch.tensor([[10.0, 20, 30.5, 60, 0.75, 2], [0, 0, 5, 6, 0.5, 0]])


def fill(tmp_path, text, task="cls", *, found=None, ids=None, name="s.csv", names=NAMES, numbers=(0, 1, 2), rle=None):
    """The sample's text -> the rows of texts of the CSV that comes out, or the JSON's content; {lost key: message}."""
    (tmp_path / name).write_text(text)
    ids = ids or dict(zip(["7", "b c", "8"], FILES))
    made = sample.read(tmp_path / name, list(ids.values()), list(ids), task=task, names=names,
                       numbers=numbers, rle=rle)
    found = found or {file: ((row >= 0.5).astype(int), row) for file, row in zip(FILES, PROBS)}
    sample.write(made, tmp_path / "out", found)
    text = (tmp_path / "out" / name).read_text()
    return (json.loads(text) if name.endswith("json") else list(csv.reader(io.StringIO(text)))), made.lost


CLASSES = {  # the sample, the rows that come out
    "0 and 1": ("id,dog,cat\n7,0,0\nb c,0,0\n", [["7", "1", "0"], ["b c", "0", "1"]]),
    "probabilities": ("id,dog,cat\n7,0.5,0\nb c,0.5,0\n", [["7", "0.5", "0.25"], ["b c", "0.125", "0.8"]]),
    "zeros as floats": ("id,dog\nb c,0.0\n", [["b c", "0.125"]]),
    "classes by number, another column": ("id,0,1,2,usage\n7,0,0,0,Public\n", [["7", "0", "1", "1", "Public"]]),
    "other order, files, paths, a lost image": (
        "file,cat\ntest/b c.png,0.1\nno.jpg,0.7\n8,0.5\n", [["test/b c.png", "0.8"], ["no.jpg", "0.7"], ["8", "0.3"]]),
    "labels by name": ("id,label\n7,cat\nb c,cat\n8,dog\n", [
        ["7", "dog school bus"], ["b c", "cat"], ["8", "dog school bus"]]),
    "labels by number, joined": ("id,label\n7,0|1\nb c,0\n", [["7", "1|2"], ["b c", "0"]]),
    "labels by name, joined": ('id,tags\n7,"cat,dog"\nb c,x\n', [["7", "dog,school bus"], ["b c", "cat"]]),
    "a row per image and class": ("id,score\n7_cat,0.5\n7_school bus,0.5\nq_dog,0.1\nb c_dog,0.5\n", [
        ["7_cat", "0.25"], ["7_school bus", "0.9"], ["q_dog", "0.1"], ["b c_dog", "0.125"]]),
    "a class column": ("image,class,there\n7,2,0\n7,0,0\n8,1,0\n8,0,0\n", [
        ["7", "2", "1"], ["7", "0", "0"], ["8", "1", "1"], ["8", "0", "0"]]),
}


@pytest.mark.parametrize("text, rows", CLASSES.values(), ids=CLASSES)
def test_classes(tmp_path, text, rows):
    (header, *made), lost = fill(tmp_path, text)
    assert header == text.partition("\n")[0].split(",") and made == rows
    assert list(lost) == [key for key in ("no.jpg", "q") if f"\n{key}" in text]


def test_labels_in_json(tmp_path):
    found = {file: ([np.array([0, 1, 0]), np.array([1, 0, 1])][i % 2], None) for i, file in enumerate(FILES)}
    rows = [{"image": "8", "label": 0}, {"image": "b c", "label": 0}]
    items, _ = fill(tmp_path, json.dumps(rows), found=found, name="s.json")
    assert items == [{"image": "8", "label": 1}, {"image": "b c", "label": "0 2"}]
    rows = [{"image": "8", "labels": ["cat", "dog"]}, {"image": "b c", "labels": []}]
    items, _ = fill(tmp_path, json.dumps(rows), found=found, name="s.json")
    assert items == [{"image": "8", "labels": ["dog"]}, {"image": "b c", "labels": ["cat", "school bus"]}]


@pytest.mark.parametrize("value, filled", [("cat", "school bus"), (0, 2), ([], ["school bus"]), ([0, 1], [2])])
def test_an_object_of_images_in_json(tmp_path, value, filled):
    found = {file: (np.array([0, 0, 1]), None) for file in FILES}
    content = {"b c.png": value, "no": value, "7.jpg": value}
    made, lost = fill(tmp_path, json.dumps(content), found=found, ids={file.stem: file for file in FILES},
                      name="s.json")
    assert made == {"b c.png": filled, "no": value, "7.jpg": filled} and list(lost) == ["no"]
    assert list(made) == list(content)


def test_one_probability_of_two_classes(tmp_path):
    pairs = {file: (np.array([1, 0]), np.array([0.75, 0.25])) for file in FILES}
    rows, _ = fill(tmp_path, "id,label\n7,0.5\n", names=["cat", "dog"], numbers=(0, 1), found=pairs)
    assert rows[1:] == [["7", "0.25"]]


def test_two_images_of_one_number(tmp_path):
    files = {"7.png": Path("7.png"), "007.png": Path("007.png")}
    text = "id,cat\n007,0.5\n7,0.5\n"
    found = {file: (None, np.array([p, 0, 0])) for file, p in zip(files.values(), (0.125, 0.75))}
    assert fill(tmp_path, text, ids=files, found=found)[0][1:] == [["007", "0.75"], ["7", "0.125"]]
    del files["007.png"]
    rows, lost = fill(tmp_path, text, ids=files, found=found)
    assert rows[1:] == [["007", "0.5"], ["7", "0.125"]] and list(lost) == ["007"]


# ---- masks -----------------------------------------------------------------------------------------------------------
def decoded(text, shape, order, first):
    """Run lengths -> mask, pixel by pixel."""
    mask, numbers = np.zeros(shape, int), list(map(int, text.split()))
    for start, length in zip(numbers[::2], numbers[1::2]):
        for i in range(start - first, start - first + length):
            mask[(i // shape[1], i % shape[1]) if order == "row" else (i % shape[0], i // shape[0])] += 1
    return mask


@pytest.mark.parametrize("rle", RUNS)
@pytest.mark.parametrize("empty", ["", "-1", "1 0"])
def test_run_lengths(tmp_path, rle, empty):
    rng, (order, first) = np.random.default_rng(0), rle.split(",")
    masks = {Path(f"{i}.tif"): (rng.random((9, 13)) < share).astype(np.uint8) * 2 for i, share in enumerate((.5, 0, 1))}
    files = {file: write_tif(tmp_path / file, mask) for file, mask in masks.items()}
    ids = {file.stem: file for file in masks}
    text = f"id,rle\n2,{empty}\nno,9 9\n0,1 1\n1,1 1\n"
    rows, lost = fill(tmp_path, text, "seg", ids=ids, found=files, names=[], numbers=[1, 2], rle=rle)
    assert [row[0] for row in rows[1:]] == ["2", "no", "0", "1"] and list(lost) == ["no"] and rows[2][1] == "9 9"
    for key, written in [rows[1], rows[3]]:
        assert np.array_equal(decoded(written, (9, 13), order, int(first)), masks[ids[key]] > 0)
    assert rows[4] == ["1", empty]
    if rle == "column,0":  # as COCO counts: zeros, ones, zeros ...
        starts_and_lengths = np.array(rows[3][1].split(), int).reshape(-1, 2)
        counts = np.diff([0, *np.add.accumulate(starts_and_lengths, 1).ravel(), 117]).tolist()
        coded = coco_mask.frPyObjects({"size": [9, 13], "counts": counts}, 9, 13)
        assert np.array_equal(coco_mask.decode(coded), masks[ids["0"]] > 0)
        assert fill(tmp_path, text + "3,0 4\n", "seg", ids=ids, found=files, names=[], numbers=[1])[0][3] == rows[3]
    pairs = "img,class,rle\n0,1,\n0,2,\n2,2,\n", "img_class,rle\n0.tif_1,\n0.tif_2,\n2.tif_2,\n"
    for text in pairs:
        rows, _ = fill(tmp_path, text, "seg", ids=ids, found=files, names=[], numbers=[1, 2], rle=rle)
        assert [row[-1] != "" for row in rows[1:]] == [False, True, True], text


# ---- detections ------------------------------------------------------------------------------------------------------
BOXES = {
    "corners": (
        "image_id,class,score,xmin,ymin,xmax,ymax\n7,cat,0.5,0,0,1,1\nb c,cat,0.5,0,0,1,1\nno,dog,1,2,3,4,5\n", [
        ["7", "school bus", "0.75", "10.0", "20.0", "30.5", "60.0"], ["7", "cat", "0.5", "0.0", "0.0", "5.0", "6.0"],
        ["no", "dog", "1", "2", "3", "4", "5"]]),
    "sides": ("ImageID,x,y,w,h,Confidence,LabelId\n7,0,0,1,1,1,1\n7,0,0,1,1,1,1\n", [
        ["7", "10.0", "20.0", "20.5", "40.0", "0.75", "7"], ["7", "0.0", "0.0", "5.0", "6.0", "0.5", "1"]]),
    "six in a text": ("image_id,PredictionString\nb c,1 0.5 0 0 1 1\n7,\n", [
        ["b c", ""], ["7", "7 0.75 10.0 20.0 30.5 60.0 1 0.5 0.0 0.0 5.0 6.0"]]),
    "five in a text": ("image_id,PredictionString\n7,0.5 0 0 100 100\nno,1 2 3 4 5\n", [
        ["7", "0.75 10.0 20.0 20.5 40.0 0.5 0.0 0.0 5.0 6.0"], ["no", "1 2 3 4 5"]]),
}


@pytest.mark.parametrize("text, rows", BOXES.values(), ids=BOXES)
def test_boxes(tmp_path, text, rows):
    made, lost = fill(tmp_path, text, "det", numbers=(1, 2, 7), found={FILES[0]: ROWS, FILES[1]: ROWS[:0]})
    assert made == [text.partition("\n")[0].split(","), *rows] and list(lost) == ["no"] * ("no," in text)


SHARES = {  # of an image of 40 x 80 pixels
    "corners": ("id,class,score,xmin,ymin,xmax,ymax\n7,1,0.5,0.25,0,1,1\n", [
        ["7", "7", "0.75", "0.125", "0.5", "0.38125", "1.5"], ["7", "1", "0.5", "0.0", "0.0", "0.0625", "0.15"]]),
    "six in a text": ("id,PredictionString\n7,cat 0.9 0.46 0.08 0.93 0.5\n", [
        ["7", "school bus 0.75 0.125 0.5 0.38125 1.5 cat 0.5 0.0 0.0 0.0625 0.15"]]),
    "five in a text": ("id,PredictionString\n7,0.9 0 0 0.5 0.5\n", [
        ["7", "0.75 0.125 0.5 0.25625 1.0 0.5 0.0 0.0 0.0625 0.15"]]),
    "bbox": ('id,label,conf,bbox\n7,cat,0.9,"[0.1, 0.2, 0.3, 0.4]"\n', [
        ["7", "school bus", "0.75", "[0.125, 0.5, 0.25625, 1.0]"], ["7", "cat", "0.5", "[0.0, 0.0, 0.0625, 0.15]"]]),
}


@pytest.mark.parametrize("text, rows", SHARES.values(), ids=SHARES)
def test_boxes_as_shares_of_the_image(tmp_path, text, rows):
    """Told by the sample: a coordinate lies between 0 and 1, and none beyond."""
    file = save(tmp_path / "7.png", np.zeros((40, 80, 3), np.uint8))
    made, _ = fill(tmp_path, text, "det", numbers=(1, 2, 7), ids={"7": file}, found={file: ROWS})
    assert made[1:] == rows


@pytest.mark.parametrize("nothing", ["14 1 0 0 1 1", "14 1.0 0 0 1 1", "none 1 0 0 1 1"])
def test_the_sample_tells_what_stands_for_no_detections(tmp_path, nothing):
    """A text of no class of the net, as in the chest X-rays' competitions; the boxes are still in pixels."""
    text = f"image_id,PredictionString\n7,{nothing}\nb c,{nothing}\nno,{nothing}\n"
    made, _ = fill(tmp_path, text, "det", numbers=(1, 2, 7), found={FILES[0]: ROWS[:1], FILES[1]: ROWS[:0]})
    label = 7 if nothing.startswith("14") else "school bus"
    assert made[1:] == [["7", f"{label} 0.75 10.0 20.0 30.5 60.0"], ["b c", nothing], ["no", nothing]]


@pytest.mark.parametrize("more", [{}, {"segmentation": []}])
def test_coco_results(tmp_path, more):
    text = json.dumps([{"image_id": 9, "category_id": 1, "bbox": [0, 0, 1, 1], **more, "score": 0.5}])
    ids = {4: FILES[0], 9: FILES[1]}
    found, large, small = dict(zip(FILES, (ROWS, ROWS[:1]))), [10.0, 20.0, 20.5, 40.0], [0.0, 0.0, 5.0, 6.0]
    items, _ = fill(tmp_path, text, "det", numbers=(1, 2, 7), ids=ids, found=found, name="s.json")
    assert items == [{"image_id": i, "category_id": c, "bbox": box, **more, "score": score} for i, c, box, score in (
        (9, 7, large, 0.75), (4, 7, large, 0.75), (4, 1, small, 0.5))]
    truth = COCO()
    truth.dataset = {key: [] for key in ("images", "annotations", "categories", "info")}
    truth.dataset |= {"images": [{"id": 4}, {"id": 9}], "categories": [{"id": 1}, {"id": 7}]}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        assert len(truth.loadRes(str(tmp_path / "out/s.json")).anns) == 3


@pytest.mark.parametrize("task, text", [
    ("cls", ""), ("cls", "id,cat\n"), ("cls", "id,cat\n7,0,1\n"), ("cls", "id,x,y\n7,0,1\n"), ("cls", "id,cat\nq,0\n"),
    ("cls", "id,p\n7_cat,0\n7_cow,0\n"), ("det", "id,a,b\n7,0,1\n")])
def test_what_is_not_understood(tmp_path, task, text):
    with pytest.raises(UserError, match="not understood for --task|not a readable"):
        fill(tmp_path, text, task)
    with pytest.raises(UserError, match="not understood for --task"):
        fill(tmp_path, "[1]", task, name="s.json")


# ---- the scripts -----------------------------------------------------------------------------------------------------
def test_classification_with_missing_and_damaged_images(script, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("7.png", "007.png", "cat/1.webp", "dog/1.bmp", "dog/bad.png"):
        save(tmp_path / "in" / name, rng.integers(0, 256, (40, 40, 3)).astype(np.uint8))
    for name in ("in/dog/bad.png", "in/notes.txt"):
        (tmp_path / name).write_bytes(b"no image")
    text = "index,b,a\nlost,0.3,0.4\n007,0.5,0.5\ndog/1,0.5,0.5\nbad,0.1,0.2\n7,0.5,0.5\ncat/1.webp,0.5,0.5\n"
    (tmp_path / "sample.csv").write_text(text)
    for source in ("in", "in/*"):
        with pytest.raises(PartialError, match="2 of 6 images"):
            script(predict, *CLS, "--weights", cls_weights(), "--source", source, "--out", "out", "--submission",
                   "sample.csv")
        assert f"{source}: 1 files are no images and are left out, such as in/notes.txt" in capsys.readouterr().out
        keys, probs, _ = results("out")
        assert sorted(keys) == ["007", "7", "cat/1", "dog/1", "dog/bad"]
        rows = [line.split(",") for line in Path("out/sample.csv").read_text().splitlines()]
        assert [row[0] for row in rows] == [line.split(",")[0] for line in text.splitlines()]
        assert rows[1] == ["lost", "0.3", "0.4"] and rows[4] == ["bad", "0.1", "0.2"]
        for key, b, a in rows[2:4] + rows[5:]:
            found = probs[keys.index(key.removesuffix(".webp"))]
            np.testing.assert_allclose([float(a), float(b)], found[:2], atol=1e-6)
        assert "there is no image 'lost'" in Path("out/failed.txt").read_text()
        Path("out").rename(f"out{source.count('*')}")


def test_detection_with_ids_of_the_training_data(script, tmp_path, finder, parking):  # noqa: F811
    """Images that Train.json lists have its ids, others the ids of --ids; COCO's own tools accept both."""
    truths, entries = {}, []
    for i, folder in enumerate(("train/images", "train/images", "new")):
        picture, truths[70 + i] = scene(i)
        save(f"DATA/{folder}/{i}.png", picture)
        entries.append({"id": 70 + i, "file_name": f"{i}.png"})
    content = {"images": entries, "annotations": [], "categories": [{"id": k, "name": f"{k}"} for k in (1, 2, 7)]}
    for name, listed in (("DATA/train/label/Train.json", entries[:2]), ("ids.json", entries),
                         ("DATA/image_info_x.json", entries[2:])):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(json.dumps(content | {"images": listed}))
    (tmp_path / "bad.png").write_bytes(b"no image")
    Path("s.json").write_text(json.dumps([{"image_id": 72, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}]))
    net = weights(data="DATA")
    for out, wanted, *flags in (("train", [70, 71], "--source", "DATA/train/images"),
                                ("new", [72], "--source", "DATA/new"),
                                ("all", [70, 71, 72], "--source", "DATA/*/*.png", "DATA/train", "--ids", "ids.json",
                                 "--submission", "s.json")):
        script(predict, *DET, "--weights", net, "--out", out, *flags)
        for name in ("coco.json", "s.json")[:1 + (out == "all")]:
            with contextlib.redirect_stdout(io.StringIO()):
                assert sorted(COCO("ids.json").loadRes(f"{out}/{name}").getImgIds()) == [70, 71, 72]
            items = items_of(out, name)
            assert {item["image_id"] for item in items} == set(wanted)
            for image_id in wanted:
                check(items, image_id, truths[image_id])
    with pytest.raises(UserError, match="bad.png: not in ids.json .1 in total"):
        script(predict, *DET, "--weights", net, "--source", "DATA/new", "bad.png", "--ids", "ids.json")


def test_flags_without_a_sample(refused):
    for flags in (["--task", "seg", "--rle", "row,1"], ["--task", "cls", "--ids", "a.json"]):
        refused(predict, *flags, says="--rle, --ids: are for --submission")


def test_lists_of_coco(tmp_path):
    """annotations/image_info_test-dev2017.json has some of the images, image_info_test2017.json has all."""
    files = [tmp_path / f"test2017/{i}.jpg" for i in range(3)]
    (tmp_path / "annotations").mkdir()
    for name, count in (("test-dev2017", 2), ("test2017", 3)):
        listed = [{"id": 40 + i, "file_name": f"{i}.jpg"} for i in range(count)]
        (tmp_path / f"annotations/image_info_{name}.json").write_text(json.dumps({"images": listed}))
    assert submissions.image_ids(files) == [40, 41, 42]


def test_segmentation(script, tmp_path, wildfire, monkeypatch):
    from tests.test_predict_seg import CPU
    from tests.conftest import TINY
    import train_seg
    script(train_seg, "--data", wildfire, *TINY)
    names = [path.name for path in sorted((wildfire / "test_img").iterdir())]
    text = "id,rle\nlost,5 5\n" + "".join(f"{name},\n" for name in names[::-1])
    Path("sample.csv").write_text(text)
    with pytest.raises(PartialError, match="1 of 4 images"):
        script(predict, *CPU, "--submission", "sample.csv", "--rle", "row,1", "--out", "out", "--threshold", 0.3)
    rows = [line.split(",") for line in Path("out/sample.csv").read_text().splitlines()]
    assert [row[0] for row in rows] == ["id", "lost", *names[::-1]] and rows[1][1] == "5 5"
    for name, coded in rows[2:]:
        mask = images.read(Path("out/masks") / name)[0].numpy()
        assert np.array_equal(decoded(coded, mask.shape, "row", 1), mask)


def test_an_animation_among_photographs(script, tmp_path, finder):  # noqa: F811
    frames = [Image.fromarray(scene(i)[0]) for i in range(2)]
    save("in/a.jpg", scene(0)[0])
    save("in/sub/b.webp", scene(1)[0])
    save("in/.hidden/c.jpg", scene(1)[0])
    frames[0].save("in/c.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(PartialError, match="1 of 3 images"):
        script(predict, *DET, "--weights", weights(), "--source", "in", "--out", "out")
    assert {item["image_id"] for item in items_of("out", "coco.json")} == {"a", "b"}
    frames[0].save("in/c.gif")
    script(predict, *DET, "--weights", weights(), "--source", "in", "--out", "out2")
    assert {item["image_id"] for item in items_of("out2", "coco.json")} == {"a", "b", "c"}
