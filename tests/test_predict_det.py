"""predict.py --task det: formats, ids, sizes, windows, views, ensembles, kinds of images, several processes.

Most tests replace the net by one that finds rectangles by their colour, exactly: so what comes out must be where the
rectangles are in the file, whatever lies between.
"""
import contextlib
import io
import json
import os
import unicodedata
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import predict
from data import augment, det, labels
from data.results import pseudo, submissions
from nets.yolo import YOLOv5
from tests.conftest import lot
from tests.test_scripts_det import ranks
from utils.ops import boxes as box_tools
from utils.ops import decide, tta
from utils.train import checkpoint
from utils.errors import NumericalError, UserError
from utils.metrics.average_precision import DetectionAP

FLAGS = ["--task", "det", "--device", "cpu", "--amp", "off", "--workers", 0]
NAMES = ["sedan", "bus", "adult"]


class Finder(torch.nn.Module):
    """The box around all pixels in which band k outshines the others by 0.4, as a detection of class k with score
    0.9 - 0.2 k. Three bands are enough for it, the others are not looked at."""
    stride, strides = 32, [8, 16, 32]
    scores = (0.9, 0.7, 0.5)

    def __init__(self, num_classes=3, in_chans=3, **_):
        super().__init__()
        self.classes, self.bands = num_classes, in_chans
        self.none = torch.nn.Parameter(torch.zeros(0))  # whose precision is the net's

    def forward(self, x):
        assert x.shape[1] == self.bands and all(side % self.stride == 0 for side in x.shape[2:])
        rows = torch.zeros(len(x), self.classes, 5 + self.classes)
        for picture, found in zip(x[:, :3].float(), rows):
            for k in range(3):
                others = picture[[j for j in range(3) if j != k]].amax(0)
                ys, xs = torch.nonzero(picture[k] - others > 0.4, as_tuple=True)
                if len(ys) >= 4:
                    corners = torch.stack((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)).float()
                    found[k, :4] = box_tools.to_xywh(corners)
                    found[k, 4], found[k, 5 + k] = 1.0, self.scores[k]
        return rows


@pytest.fixture
def finder(monkeypatch):
    monkeypatch.setattr(predict, "nets", Namespace(build=lambda arch: Finder(**arch["kwargs"])))
    monkeypatch.setattr(checkpoint, "load_weights", lambda net, state, path: net)
    return Finder


def weights(path="net.pt", *, data="nowhere", imgsz=192, bands=(1, 2, 3), pixel_scale=255.0, **changes):
    """A checkpoint as train_det.py writes it, of a net that has not learned. -> its path"""
    kwargs = dict(variant="n", num_classes=3, in_chans=len(bands), head="free")
    torch.manual_seed(0)
    checkpoint.save(path, {
        "task": "det", "arch": {"name": "yolo.YOLOv5", "kwargs": kwargs}, "classes": NAMES, "category_ids": [1, 2, 7],
        "input": {"bands": list(bands), "pixel_scale": pixel_scale, "imgsz": imgsz}, "args": {"data": str(data)},
        "history": [], "model": YOLOv5(**kwargs).state_dict(), "ema": None} | changes)
    return Path(path)


def scene(seed, height=96, width=128, *, most=3):
    """`lot`, of at most one rectangle per class. -> picture, {class: box}"""
    for i in range(1000):
        picture, boxes, classes = lot((seed, i, 77), height, width, most=most)
        if len(set(classes)) == len(classes) >= min(most, 2):
            return picture, dict(zip(classes.tolist(), boxes.tolist()))


def save(path, picture, **options):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, **options)
    return Path(path)


def items_of(folder, name="submission.json"):
    return json.loads((Path(folder) / name).read_text())


def check(items, image_id, truth, tolerance=1.0, ids=(1, 2, 7)):
    """What was found in this image is the truth, each box once."""
    mine = [item for item in items if item["image_id"] == image_id]
    assert sorted(item["category_id"] for item in mine) == sorted(ids[k] for k in truth), (mine, truth)
    for item in mine:
        x, y, w, h = item["bbox"]
        error = np.abs(np.array((x, y, x + w, y + h)) - truth[ids.index(item["category_id"])]).max()
        assert error <= tolerance, (item, truth)


# ---- the files that come out -----------------------------------------------------------------------------------------
def test_the_submission(script, tmp_path, finder, capsys):
    """By the competition's layout: ids of its list, its category ids, boxes in pixels of the file."""
    truths = {}
    for i, name in enumerate(("a.b.png", "17.png", "late.jpg")):
        picture, truths[500 + i] = scene(i)
        save(f"DATA/test/images/{name}", picture, quality=98, subsampling=0)
    entries = [{"id": 500 + i, "file_name": name} for i, name in enumerate(("a.b.png", "17.png", "late.jpg"))]
    Path("DATA/Test_Images_Information.json").write_text(json.dumps({"images": entries}))
    script(predict, *FLAGS, "--weights", weights(data="DATA"), "--out", "out")
    text = Path("out/submission.json").read_text()
    items = json.loads(text)
    assert text == json.dumps(items) and len(items) == sum(map(len, truths.values()))
    for item in items:
        assert list(item) == ["image_id", "category_id", "bbox", "score", "segmentation"] and item["segmentation"] == []
        assert item["bbox"] == [round(v, 1) for v in item["bbox"]] and item["score"] in (0.9, 0.7, 0.5)
        assert type(item["image_id"]) is type(item["category_id"]) is int
    for image_id, truth in truths.items():
        check(items, image_id, truth)
    assert [{k: v for k, v in item.items() if k in ("image_id", "category_id")} for item in items] == [
        {k: item[k] for k in ("image_id", "category_id")} for item in items_of("out", "coco.json")]
    assert f"3 images, {len(items)} detections: out" in capsys.readouterr().out
    for name in ("a.b", "17", "late"):
        assert Image.open(f"out/overlays/{name}.jpg").size == (128, 96)
        lines = Path(f"out/labels/{name}.txt").read_text().splitlines()
        image_id = {"a.b": 500, "17": 501, "late": 502}[name]
        assert len(lines) == len(truths[image_id])
        for line in lines:  # what labels in YOLO's format hold, and the score
            k, x, y, w, h, score = map(float, line.split())
            x1, y1, x2, y2 = (x - w / 2) * 128, (y - h / 2) * 96, (x + w / 2) * 128, (y + h / 2) * 96
            assert np.abs(np.array((x1, y1, x2, y2)) - truths[image_id][k]).max() <= 1.0
            assert score == pytest.approx(Finder.scores[int(k)])


def test_ids(tmp_path):
    names = [tmp_path / name for name in ("007.jpg", "b.c.jpg", "12", "x²3.jpg", "٣.jpg")]
    assert submissions.image_ids(names) == [7, "b.c", 12, "x²3", "٣"]
    listed = [{"id": f"id {p.name}", "file_name": p.name} for p in names]
    (tmp_path / "Test_Images_Information.json").write_text(json.dumps(listed))
    folder = tmp_path / "test/images"
    for near in (tmp_path, folder):
        names = [near / path.name for path in names]
        assert submissions.image_ids(names) == [entry["id"] for entry in listed]
        assert submissions.image_ids([near / "8.jpg"], others=True) == [8]  # training images, for a look
        with pytest.raises(UserError, match="9.jpg.*not in .*Test_Images_Information.json .1 in total."):
            submissions.image_ids([names[0], near / "9.jpg"], others=True)


def test_ids_of_equal_numbers_and_of_names_from_a_mac(tmp_path):
    names = [tmp_path / name for name in ("7.jpg", "007.jpg", "8.jpg")]
    assert submissions.image_ids(names) == ["7", "007", 8]
    listed, there = (unicodedata.normalize(form, "주차장.jpg") for form in ("NFC", "NFD"))
    for one, other in ((listed, there), (there, listed)):
        (tmp_path / "Test_Images_Information.json").write_text(json.dumps([{"id": 3, "file_name": one}]))
        assert submissions.image_ids([tmp_path / other]) == [3]


def test_cut_is_the_largest_file_below_the_limit():
    rng = np.random.default_rng(0)
    for count in (0, 1, 2, 7, 30):
        items = [{"image_id": "ü" * int(rng.integers(9)), "bbox": [1.5] * int(rng.integers(4)),
                  "score": float(rng.integers(4)) / 4} for _ in range(count)]
        ranked = sorted(range(count), key=lambda i: (-items[i]["score"], i))
        for limit in {2, 3, 10, 10 ** 6, *rng.integers(2, 2000, 30).tolist()}:
            text, dropped = submissions.cut(items, limit)
            kept = json.loads(text)
            fits = [k for k in range(count + 1) if len(json.dumps([items[i] for i in ranked[:k]]).encode()) < limit]
            best = max(fits, default=0)
            assert kept == [items[i] for i in sorted(ranked[:best])] and dropped == count - best
            assert text == json.dumps(kept)
    whole = len(json.dumps(items))  # to the byte
    assert submissions.cut(items, whole + 1)[1] == 0 and submissions.cut(items, whole)[1] == 1


def test_the_submission_of_many_detections_is_that_of_all(tmp_path):
    """Only what can be in it is made into items: the same bytes as if all were, with ties, in images with none."""
    rng, ids, files = np.random.default_rng(1), [3, 1, 2, 9], [Path(f"{k}.png") for k in range(4)]
    results = [torch.from_numpy(np.column_stack((rng.uniform(0, 90, (n, 4)), rng.integers(0, 30, n) / 29.00001,
                                                 rng.integers(0, 2, n)))).float() for n in (200, 0, 77, 1)]
    whole = submissions.coco_items(results, ids, [4, 7])
    for megabytes in (0.0001, 0.003, 0.01, 1):
        folder = tmp_path / str(megabytes)
        dropped = submissions.write_boxes(folder, files, [(100, 100)] * 4, results, ids=ids, category_ids=[4, 7],
                                          max_mb=megabytes)
        text, left_out = submissions.cut(submissions.parking_items(whole), megabytes * 1e6)
        assert ((folder / "submission.json").read_text(), dropped) == (text, left_out)
        assert json.loads((folder / "coco.json").read_text()) == whole
    tiny = submissions.parking_items(submissions.coco_items([torch.zeros(1, 6)], [0], [0]))
    assert len(json.dumps(tiny[0])) >= submissions.SHORTEST


def test_the_limit_of_the_submission(script, tmp_path, finder):
    picture, truth = scene(5)
    save("1.png", picture)
    script(predict, *FLAGS, "--weights", weights(), "--source", "1.png", "--out", "out", "--max-mb", 0.001)
    assert len(items_of("out")) == len(truth)
    assert 0 < Path("out/submission.json").stat().st_size < 1000
    results, ids = [torch.tensor([[1.0, 2, 3, 4, s / 100, 0]]) for s in range(1, 90)], list(range(89))
    text, dropped = submissions.cut(submissions.parking_items(submissions.coco_items(results, ids, [4])), 1000)
    assert len(text) < 1000 and {i["score"] for i in json.loads(text)} == {(89 - k) / 100 for k in range(89 - dropped)}


def test_coco_results_give_our_ap():
    """coco.json as pycocotools reads it, judged there, against DetectionAP on the same tensors."""
    rng = np.random.default_rng(3)
    truths, found, ids = [], [], [f"img {i}" for i in range(12)]
    for _ in ids:
        corner, side = rng.uniform(0, 80, (6, 2)), rng.uniform(8, 40, (6, 2))
        boxes, labels = np.concatenate((corner, corner + side), 1), rng.integers(0, 3, (6, 1))
        truths.append(torch.tensor(np.concatenate((boxes, labels), 1)))
        moved = boxes + rng.normal(0, 2.5, boxes.shape)
        found.append(torch.tensor(np.concatenate((moved, rng.random((6, 1)), labels), 1), dtype=torch.float32))
    items = json.loads(json.dumps(submissions.coco_items(found, ids, [1, 2, 7])))
    coco = COCO()
    coco.dataset = {"info": {}, "images": [{"id": i} for i in ids], "categories": [{"id": c} for c in (1, 2, 7)],
                    "annotations": [{"id": n + 1, "image_id": i, "category_id": [1, 2, 7][int(k)], "iscrowd": 0,
                                     "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
                                    for n, (i, (x1, y1, x2, y2, k)) in enumerate(
                                        (i, row) for i, rows in zip(ids, truths) for row in rows.tolist())]}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        judge = COCOeval(coco, coco.loadRes(items), "bbox")
        judge.evaluate(), judge.accumulate(), judge.summarize()
    metric = DetectionAP(3)
    metric.update(found, truths)
    ours = metric.compute()
    assert 0.1 < ours["ap"] < 0.9
    np.testing.assert_allclose([ours["ap"], ours["ap50"], ours["ap75"]], judge.stats[:3], atol=1e-6)


def test_conf_and_max_det(script, tmp_path, finder):
    picture, truth = next(found for found in map(scene, range(100)) if len(found[1]) == 3)
    save("1.png", picture)
    for flags, want in ((["--conf", 0.6], {1, 2}), (["--conf", 0.95], set()), (["--max-det", 1], {1})):
        script(predict, *FLAGS, "--weights", weights(), "--source", "1.png", "--out", "out", *flags)
        newest = max(Path().glob("out*"), key=os.path.getmtime)
        assert {item["category_id"] for item in items_of(newest)} == want
        assert Path(newest, "labels/1.txt").read_text().count("\n") == len(want)


# ---- sizes, views, windows -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags", [[], ["--imgsz", 256], ["--imgsz", 300], ["--tta"], ["--tta", "--amp", "bf16"]])
@pytest.mark.parametrize("height, width", [(96, 128), (101, 77)])
def test_boxes_are_in_pixels_of_the_file(script, tmp_path, finder, flags, height, width):
    for i in range(3):
        picture, truth = scene(i, height, width)
        save(f"in/{i}.png", picture)
    script(predict, *FLAGS, "--weights", weights(), "--source", "in", "--out", "out", *flags)
    for i in range(3):
        check(items_of("out"), i, scene(i, height, width)[1], tolerance=1.5 if flags else 1.0)


def test_boxes_do_not_leave_the_image(script, tmp_path, finder):
    picture = np.full((70, 100, 3), 50, np.uint8)
    picture[:, :40], picture[40:, 60:] = (230, 30, 30), (30, 230, 30)
    save("1.png", picture)
    script(predict, *FLAGS, "--weights", weights(imgsz=64), "--source", "1.png", "--out", "out")
    for x, y, w, h in (item["bbox"] for item in items_of("out")):
        assert 0 <= x and x + w <= 100 and 0 <= y and y + h <= 70
    check(items_of("out"), 1, {0: [0, 0, 40, 70], 1: [60, 40, 100, 70]}, tolerance=1.6)


@pytest.mark.parametrize("height, width", [(192, 160), (96, 256)])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_every_pass_says_the_same(height, width, factor):
    picture, truth = scene(9, height, width, most=2)
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    passes = tta.yolov5((height, width), stride=32, factor=factor)
    assert [size for _, size, _ in passes] == [
        tuple(-(-round(side * share * factor) // 32) * 32 for side in (height, width)) for share in (1, 0.83, 0.67)]
    assert [matrix[0, 0] < 0 for matrix, *_ in passes] == [False, True, False]
    for matrix, size, _ in passes:  # each by itself, back in the image's pixels
        found = box_tools.to_xyxy(next(tta.tta_boxes(Finder(), x, [(matrix, size)]))[0, :, :4])
        for k, box in truth.items():
            assert (found[k] - torch.tensor(box)).abs().max() < max(1.0, width / size[1] + 0.5)
    plain, = tta.tta_boxes(Finder(), x, tta.tta_views((), (height, width), stride=32))
    assert torch.equal(plain, Finder()(x))


@pytest.mark.parametrize("stride", [32, 64])
def test_the_levels_of_yolov5s_passes(stride):
    """The first pass leaves out the rows of the coarsest level, the last pass the rows of the finest level."""
    strides = [8 * 2 ** k for k in range(9) if 8 * 2 ** k <= stride]

    def levels(x):  # the net's rows, each with its stride in place of the score
        cells = [x.shape[2] // s * (x.shape[3] // s) for s in strides]
        return F.pad(torch.cat([torch.full((count,), float(s)) for s, count in zip(strides, cells)])[None, :, None], (4, 1))

    def count(x, chosen):
        return sum(x[0] // s * (x[1] // s) for s in chosen)
    passes = tta.yolov5((256, 448), stride=stride)
    found = [rows[0, :, 4] for rows in tta.tta_boxes(levels, torch.zeros(1, 3, 256, 448), passes)]
    for rows, (_, size, _), chosen in zip(found, passes, (strides[:-1], strides, strides[1:])):
        assert rows.unique().tolist() == chosen and len(rows) == count(size, chosen)


def test_windows_find_every_object_once(script, tmp_path, finder):
    """Rectangles amid windows, across their borders and larger than they are; the last only the whole image shows."""
    for i, box in enumerate([(10, 10, 40, 40), (60, 20, 90, 50), (150, 100, 180, 130), (20, 10, 180, 130),
                             (0, 0, 25, 140), (94, 62, 130, 98)]):
        x1, y1, x2, y2 = box
        picture = np.full((140, 200, 3), 50, np.uint8)
        picture[y1:y2, x1:x2] = 230, 30, 30
        save(f"in/{i}.png", picture)
        script(predict, *FLAGS, "--weights", weights(), "--source", f"in/{i}.png", "--tile", 80, "--out", f"out{i}")
        check(items_of(f"out{i}"), i, {0: list(box)}, tolerance=1.2)


def test_windows_see_what_the_whole_image_does_not(script, tmp_path, finder):
    """An object of 3 x 3 pixels in a large scene, of which the whole view has a tenth of the size."""
    picture = np.full((640, 960, 3), 50, np.uint8)
    picture[301:304, 655:658] = 30, 30, 230
    save("1.png", picture)
    flags = ["--weights", weights(imgsz=96), "--source", "1.png"]
    script(predict, *FLAGS, *flags, "--out", "whole")
    script(predict, *FLAGS, *flags, "--out", "windows", "--tile", 96)
    assert items_of("whole") == []
    check(items_of("windows"), 1, {2: [655, 301, 658, 304]})


def test_views_read_no_more_than_they_show(tmp_path):
    """Of a long strip every 15th pixel; boxes still fit, and no side vanishes."""
    picture = np.full((9, 6000, 3), 50, np.uint8)
    picture[:, 3000:4200] = 230, 30, 30
    views = det.TiledImages([save(tmp_path / "1.png", picture)], bands=[1, 2, 3], imgsz=96, stride=32)
    view = views[0]
    rows = Finder()(view["image"].permute(2, 0, 1)[None] / 255)
    box = det.move(box_tools.to_xyxy(rows[0, :1, :4]), np.linalg.inv(view["matrix"]))[0]
    assert np.abs(box[[0, 2]].numpy() - (3000, 4200)).max() < 6000 / 96


def test_uncut():
    rows = torch.tensor([[10.0, 10, 20, 20, 1, 0], [5, 10, 20, 20, 1, 0], [10, 10, 64, 20, 1, 0],
                         [10, 10, 20, 63, 1, 0]])
    shifted = rows + torch.tensor([100.0, 50, 100, 50, 0, 0])
    inner = box_tools.drop_border_boxes(shifted, (50, 105, 64, 59), 500, 500)
    assert inner.tolist() == shifted[:1].tolist()
    assert len(box_tools.drop_border_boxes(rows, (0, 5, 63, 59), 63, 64)) == 3  # the image's own borders cut nothing
    assert len(box_tools.drop_border_boxes(rows, (0, 0, 63, 64), 63, 64)) == 4


# ---- ensembles -------------------------------------------------------------------------------------------------------
def test_two_checkpoints_are_fused(script, tmp_path, finder):
    """Of different image sizes and bands; the first finds all, the second, whose bands are turned, other classes."""
    picture, truth = next(found for found in map(scene, range(100)) if len(found[1]) == 3)
    save("1.png", picture)
    one, two = weights("one.pt"), weights("two.pt", imgsz=96)
    script(predict, *FLAGS, "--weights", one, two, "--source", "1.png", "--out", "out")
    check(items_of("out"), 1, truth, tolerance=1.5)
    assert {item["score"] for item in items_of("out")} == {0.9, 0.7, 0.5}
    turned = weights("turned.pt", bands=[3, 1, 2])  # band 3 is its first: blue rectangles are its class 0
    script(predict, *FLAGS, "--weights", one, turned, "--source", "1.png", "--out", "mixed", "--ensemble-weights", 3, 1)
    found = sorted((item["category_id"], item["score"], *map(round, item["bbox"][:2])) for item in items_of("mixed"))
    want = [((1, 2, 7)[k], round(Finder.scores[k] * share / 4, 4), *map(round, truth[colour][:2]))
            for share, colours in ((3, (0, 1, 2)), (1, (2, 0, 1))) for k, colour in enumerate(colours)]
    for got, expected in zip(found, sorted(want), strict=True):
        assert got[:2] == pytest.approx(expected[:2], abs=2e-4) and np.abs(np.subtract(got, expected)).max() <= 1.0


def test_the_order_of_checkpoints_does_not_matter(script, refused, tmp_path, finder):
    save("1.png", scene(0, 96, 128)[0])
    whole, windows = weights("whole.pt"), weights("windows.pt", args={"data": "nowhere", "tile": 64, "overlap": 0.5})
    for pair in ((whole, windows), (windows, whole)):
        refused(predict, *FLAGS, "--weights", *pair, "--source", "1.png", "--out", "no", says="--tile")
    for i, pair in enumerate(((whole, windows), (windows, whole))):
        script(predict, *FLAGS, "--weights", *pair, "--source", "1.png", "--out", f"out{i}", "--tile", 64)
    assert items_of("out0") == items_of("out1") != []
    refused(predict, *FLAGS, "--weights", whole, "--source", "1.png", "--overlap", 0.5, "--out", "no",
            says="--overlap: is of windows")


def test_pseudo_labels_are_read_back_whole(tmp_path):
    """Less than a pixel, and what clipping has made one box: reading drops these, and more than 1 % is an error."""
    file = save(tmp_path / "a.png", np.zeros((64, 96, 3), np.uint8))
    rows = torch.tensor([[0, 0, 96, 64, .95, 0], [0, 0, 96, 64, .93, 0], [0, 0, 96, 64, .92, 1], [5, 5, 5.5, 40, .9, 1],
                         [5, 5, 30, 40, .9, 1], [5, 5, 30, 40, .4, 0]])
    assert pseudo.write_boxes(tmp_path / "out", [file], [(64, 96)], [rows], NAMES, [1, 2, 7], 0.5) == (1, 3)
    found = labels.read(tmp_path / "out", cache=None)
    assert found.boxes[0].tolist() == [[0, 0, 96, 64], [0, 0, 96, 64], [5, 5, 30, 40]]
    assert found.classes[0].tolist() == [0, 1, 1]


# ---- kinds of images -------------------------------------------------------------------------------------------------
def test_kinds_of_images(script, tmp_path, finder):
    """Grey, CMYK, turned by EXIF, beside each other in one batch, with one process to load them."""
    picture, truth = scene(4)
    save("in/1.png", picture)
    save("in/2.png", np.full((96, 128), 120, np.uint8))
    Image.fromarray(picture).convert("CMYK").save("in/3.jpg", quality=98)
    exif = Image.Exif()
    exif[0x0112] = 6
    save("in/4.jpg", np.rot90(picture).copy(), quality=98, subsampling=0, exif=exif)
    for workers in (0, 1):
        script(predict, *FLAGS, "--workers", workers, "--weights", weights(), "--source", "in", "--out",
               f"out{workers}")
        items = items_of(f"out{workers}")
        for i, boxes in ((1, truth), (2, {}), (3, truth), (4, truth)):
            check(items, i, boxes, tolerance=1.5)
        assert Image.open(f"out{workers}/overlays/4.jpg").size == (128, 96)


@pytest.mark.parametrize("workers", [0, 1])
def test_five_bands_of_16_bits(script, tmp_path, finder, workers):
    truths = {}
    for i in range(2):
        picture, truths[i] = scene(i)
        bands = picture.transpose(2, 0, 1).astype(np.uint16) * 257
        with rasterio.open(f"{i}.tif", "w", driver="GTiff", count=5, height=96, width=128, dtype="uint16") as file:
            file.write(np.concatenate((bands[:1] * 0, bands[2:], bands[:1], bands[:1] * 0, bands[1:2])))
    path = weights(bands=[3, 5, 2], pixel_scale=65535.0)
    script(predict, *FLAGS, "--workers", workers, "--weights", path, "--source", "*.tif", "--out", "out", "--tile", 96)
    for i in range(2):
        check(items_of("out"), i, truths[i], tolerance=1.2)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_may_mix_8_and_16_bits(script, tmp_path, finder, workers):
    picture, truth = scene(4)
    save("1.png", picture)
    with rasterio.open("2.tif", "w", driver="GTiff", count=3, height=96, width=128, dtype="uint16") as file:
        file.write(picture.transpose(2, 0, 1).astype(np.uint16))
    script(predict, *FLAGS, "--workers", workers, "--weights", weights(), "--source", "1.png", "2.tif", "--out", "out")
    check(items_of("out"), 1, truth)
    check(items_of("out"), 2, truth)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite(value):
    """They are no empty result: not of a single view, nor of one among several."""
    def broken(x):
        rows = Finder()(x)
        return rows if x.shape[2] < 96 else rows + value

    broken.parameters = Finder().parameters
    limits, x = dict(conf=0.1, iou=0.5, max_det=9), torch.rand(1, 3, 96, 64)
    for views in (None, tta.yolov5((96, 64), stride=32)):
        with pytest.raises(NumericalError, match="not finite; .*--amp off"):
            decide.detect(broken, x, views, **limits)
    assert decide.detect(broken, x[..., :64, :], **limits)[0].shape[1] == 6


# ---- the true net ----------------------------------------------------------------------------------------------------
def test_the_true_net_on_training_images(script, tmp_path, parking):
    """A net that has learned nothing, on all its flags: the numbers that come out are its own."""
    path = weights(imgsz=64, data=parking)
    state, limits = checkpoint.load(path), dict(conf=0.001, iou=0.7, max_det=20)
    net = YOLOv5(**state["arch"]["kwargs"]).eval()
    net.load_state_dict(state["model"])
    file = parking / "train/images/003.jpg"
    with torch.inference_mode():
        args = Namespace(task="det", amp="off", compile=False)
        [member] = predict.load_members(args, "det", torch.device("cpu"), [path])
        view = det.TiledImages([file], bands=[1, 2, 3], imgsz=64, stride=member.net.stride)[0]
        raw = view["image"].permute(2, 0, 1)[None]
        want = box_tools.nms(net(raw.float() / 255), **limits)
        got = decide.detect(member.net, member.inputs(raw), **limits)
    matrix = augment.letterbox(64, 96, 64, det.rect((64, 96), 64, 32))
    assert (member.net.stride, len(got)) == (32, 1) and np.allclose(view["matrix"], matrix)
    torch.testing.assert_close(got[0], want[0], rtol=1e-3, atol=1e-3)
    script(predict, *FLAGS, "--weights", path, "--source", parking / "train/images", "--out", "out", "--no-overlays",
           "--tta", "--conf", 0, "--max-det", 5)
    assert len(items_of("out")) == 50 and {item["image_id"] for item in items_of("out")} == set(range(10))
    assert not Path("out/overlays").exists()


@pytest.mark.parametrize("flags, stored, drawn", [
    ((), 0.6, 2), ((), 0.8, 1), ((), None, 3), (("--threshold", 0), 0.8, 3), (("--threshold", 0.6), 0.8, 2)])
def test_boxes_are_drawn_from_the_trainings_best_score_on(script, finder, monkeypatch, flags, stored, drawn):
    """The three colours' scores are 0.9, 0.7 and 0.5; the files keep what is drawn and what is not."""
    picture, truth = next(found for found in (scene(i) for i in range(100)) if len(found[1]) == 3)
    save("in/1.png", picture)
    path, seen = weights(), []
    state = torch.load(path, weights_only=True)
    checkpoint.save(path, state | {"threshold": stored})
    monkeypatch.setattr(predict.submissions.pictures_det, "draw_boxes",
                        lambda rgb, corners, *rest: seen.append(len(corners)) or rgb)
    script(predict, *FLAGS, "--weights", path, "--source", "in", "--out", "out", *flags)
    assert seen == [drawn] and len(items_of("out")) == 3


def test_two_processes_predict_what_one_does(script, tmp_path, finder, parking):
    for i in range(5):
        save(f"in/{i}.png", scene(i, *((96, 128), (70, 90))[i % 2])[0])
    flags = [*FLAGS, "--weights", weights(), "--source", "in", "--tile", 80, "--bs", 2]
    script(predict, *flags, "--out", "one")
    out = ranks(predict, *flags, "--out", "two", cwd=tmp_path)
    for name in ("submission.json", "coco.json", *(f"labels/{i}.txt" for i in range(5))):
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes()
    assert len(items_of("two")) >= 10 and sorted(p.name for p in Path("two/overlays").iterdir()) == [
        f"{i}.jpg" for i in range(5)]
    assert out[0].count("5 images") == 1 and not out[1]
