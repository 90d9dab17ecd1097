"""What train_det.py and predict.py offer beyond the recipe: pseudo labels, extra data, --debug, averages,
windows of large images, boxes from masks.

Pseudo labels come from the finder of test_predict_det.py, whose boxes and scores (0.9, 0.7, 0.5 by class) are exact.
"""
import json
import os
from argparse import Namespace
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import nets
import predict
import train_det
from data import det, images, labels
from data.labels import masks
from nets.yolo import YOLOv5
from tests.conftest import TINY_DET, lot, tile, write_parking, write_tif, write_wildfire
from tests.test_predict_det import FLAGS, NAMES, Finder, finder, items_of, weights  # noqa: F401, finder is a fixture
from tests.test_scripts_det import STAGED, edit, ranks
from utils.ops import tiles
from utils.train import checkpoint
from utils.errors import Stopped, UserError


@pytest.fixture(scope="module")
def lots(tmp_path_factory):
    """Seven pictures with one rectangle each, of the classes 0, 1, 2, 0, 1, 2, 0; -> folder, {name: (class, box)}."""
    root, truth = tmp_path_factory.mktemp("lots"), {}
    for i in range(7):
        k, seed = i % 3, 0
        while True:
            picture, found, classes = lot((i, seed, 9), 96, 96, most=1)
            seed += 1
            if classes.tolist() == [k]:
                break
        Image.fromarray(picture).save(root / f"lot {i}.png")
        truth[f"lot {i}.png"] = k, found[0].tolist()
    return root, truth


def pseudo(script, lots, least, out="out"):
    weights(imgsz=96)  # of the category ids 1, 2, 7
    script(predict, *FLAGS, "--weights", "net.pt", "--source", lots[0], "--out", out, "--pseudo", least,
           "--no-overlays")


@pytest.mark.parametrize("least, kinds", [(0.5, (0, 1, 2)), (0.6, (0, 1)), (0.8, (0,))])
def test_boxes_that_are_sure(script, lots, finder, capsys, least, kinds):  # noqa: F811
    pseudo(script, lots, least)
    want = {name: (k, box) for name, (k, box) in lots[1].items() if k in kinds}
    assert f"pseudo labels of {len(want)} images, {len(want)} boxes: train_det.py --extra-data out/pseudo" in \
        capsys.readouterr().out
    assert {path.name: path.resolve() for path in Path("out/pseudo/train/images").iterdir()} == {
        name: lots[0].resolve() / name for name in want}
    found = json.loads(Path("out/pseudo/train/label/Train.json").read_text())
    assert found["categories"] == [{"id": key, "name": name} for key, name in zip((1, 2, 7), NAMES)]
    name_of = {image["id"]: image["file_name"] for image in found["images"]}
    assert all((image["height"], image["width"]) == (96, 96) for image in found["images"])
    for annotation in found["annotations"]:
        k, (x1, y1, x2, y2) = want.pop(name_of[annotation["image_id"]])
        assert annotation["category_id"] == (1, 2, 7)[k]
        assert annotation["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=1.5)
    assert not want and len(items_of("out", "coco.json")) == 7  # the prediction itself stays whole


def test_training_maps_classes_by_name_and_draws_by_weight(script, tmp_path, lots, finder, monkeypatch,  # noqa: F811
                                                           capsys):
    pseudo(script, lots, 0.6)  # sedan and bus are in it
    root = edit(write_parking(tmp_path / "DATA", train=6, test=0, size=(48, 48), most=1), lambda data: data.update(
        categories=[{"id": 1, "name": "adult"}, {"id": 2, "name": "sedan"}, {"id": 3, "name": "bus"}]))
    sources, loaders, DetData, make = [], [], train_det.det.DetData, train_det.train_loader
    monkeypatch.setattr(train_det.det, "DetData", lambda *args, **options: sources.append(args)
                        or DetData(*args, **options))
    monkeypatch.setattr(train_det, "train_loader", lambda *args, **options: loaders.append(make(*args, **options))
                        or loaders[-1])
    capsys.readouterr()
    flags = ["--data", root, *TINY_DET, "--folds", 3]
    script(train_det, *flags, "--extra-data", "out/pseudo:4")
    samples = sources[0][0]
    count = sum(len(sample.boxes) for sample in samples)
    assert f"9 images with {count} boxes to train, 2 to validate; 3 classes" in capsys.readouterr().out
    names = checkpoint.load("runs/det/exp/last.pt")["classes"]
    assert names == ["adult", "sedan", "bus"]
    for file, rows, size, _, weight in samples[4:]:
        label, box = lots[1][file.name]
        assert [names[int(i)] for i in rows[:, 0]] == [NAMES[label]] and rows[0, 1:] == pytest.approx(box, abs=1.5)
        assert size == (96, 96) and weight == 4
    assert [sample.file.parent.parent.parent.name for sample in samples] == ["DATA"] * 4 + ["pseudo"] * 5
    sampler, count = loaders[0].batch_sampler, Counter()
    for epoch in range(500):
        sampler.set_epoch(epoch)
        count.update((sampler.order() % 9).tolist())
    assert [count[i] / count.total() for i in range(9)] == pytest.approx([1 / 24] * 4 + [4 / 24] * 5, rel=0.12)
    monkeypatch.setattr(train_det, "train_loader", lambda *_, weights, **options: loaders.append(weights) or stop())
    with pytest.raises(Stopped):  # both together: their product
        script(train_det, *flags, "--extra-data", "out/pseudo:4", "--image-weights")
    classes = [sample.boxes[:, 0] for sample in sources[1][0]]
    balance = np.array([sum(1 / sum((other == k).sum() for other in classes) for k in c) for c in classes])
    balance += balance[balance > 0].min() / 10
    product = balance * ([1] * 4 + [4] * 5)
    assert loaders[1] / loaders[1].sum() == pytest.approx(product / product.sum())


def test_extra_boxes_of_unknown_classes(refused, script, tmp_path, lots, finder):  # noqa: F811
    pseudo(script, lots, 0.6)
    root = edit(write_parking(tmp_path / "DATA", train=4, test=0, size=(48, 48), most=1), lambda data: data.update(
        categories=[{"id": 1, "name": "sedan"}, {"id": 2, "name": "van"}, {"id": 3, "name": "adult"}]))
    refused(train_det, "--data", root, *TINY_DET, "--extra-data", "out/pseudo", says=["out/pseudo: ", "bus", "--data"])
    extra = labels.Labels(["x"], [(9, 9)], [np.zeros((2, 4))], [np.array([2, 0])], [False],
                          ["c", "unseen", "a"], [1, 2, 3])
    mapped = labels.with_names(extra, ["a", "b", "c"], "y")
    assert mapped.classes[0].tolist() == [0, 2] and mapped.names == ["a", "b", "c"]  # unseen has no boxes: no harm
    with pytest.raises(UserError, match="y: has boxes of c,"):
        labels.with_names(extra, ["a", "b"], "y")


def test_debug_runs_two_epochs_also_of_stages(script, tmp_path, monkeypatch):
    root, seen = write_parking(tmp_path / "DATA", train=20, test=0, size=(32, 32), most=1), []
    flags = ["--data", root, *TINY_DET, "--bs", 2, "--folds", 4, "--debug"]
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(train_det, "train_loader", lambda data, *_, **options: seen.append(len(data)) or stop())
        script(train_det, *flags)
    assert seen.pop() == 15  # of 20, five are held out: fewer than eight batches of two
    monkeypatch.setattr(train_det, "experiment", lambda args, *_: seen.append((args.preset, args.epochs)))
    script(train_det, *flags, "--epochs", 30)
    script(train_det, "--data", root, *STAGED, "--folds", 4, "--debug", "--stages", "30,20")
    assert seen == [("default", 2), ("scratch-low", 2), ("finetune", 2)]


def stop():
    raise Stopped(0)


def test_averages(script, parking):
    """swa.pt is the mean of the two epochs' weights, and predicts."""
    script(train_det, "--data", parking, *TINY_DET, "--bs", 5, "--epochs", 2, "--folds", 0, "--swa", 1, "--no-ema",
           "--save-period", 1, "--lr", 0.01, "--optimizer", "adam")
    ends = [checkpoint.load(f"runs/det/exp/epoch_{epoch}.pt") for epoch in (1, 2)]
    swa, mean = checkpoint.load("runs/det/exp/swa.pt"), {}
    parameters = {name for name, _ in YOLOv5(**swa["arch"]["kwargs"]).named_parameters()}
    for name, tensor in swa["model"].items():
        one, two = (end["model"][name] for end in ends)
        mean[name] = ((one.double() + two.double()) / 2).to(one.dtype)
        if name in parameters:
            torch.testing.assert_close(tensor, mean[name], atol=1e-6, rtol=1e-5)
    norms = [name for name in mean if name.endswith("running_mean")]
    assert norms and not any(torch.allclose(swa["model"][name], mean[name]) for name in norms[1:])
    script(predict, *FLAGS, "--conf", 0.001, "--no-overlays", "--weights", "runs/det/exp/swa.pt", "--out", "swa")
    args = Namespace(task="det", amp="off", compile=False)
    [member] = predict.load_members(args, "det", torch.device("cpu"), ["runs/det/exp/swa.pt"])
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        plain = checkpoint.load_weights(YOLOv5(**swa["arch"]["kwargs"]).eval(), swa, "")
        torch.testing.assert_close(member.net(x), plain(x), atol=0.1, rtol=1e-3)  # pixels, of folded norms


# ---- windows of large images -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("overlap", [0, 0.25, 0.6])
def test_windows_cover_larger_images_and_leave_the_others(overlap):
    rng = np.random.default_rng(0)
    for _ in range(200):
        size, side = tuple(rng.integers(1, 120, 2).tolist()), int(rng.integers(8, 70))
        found, count = tiles.cover(size, side, overlap), np.zeros(size, int)
        for y, x, height, width in found:
            assert (height, width) == (min(side, size[0]), min(side, size[1])) and min(x, y) >= 0
            assert y + height <= size[0] and x + width <= size[1]
            count[y:y + height, x:x + width] += 1
        assert (count > 0).all() if max(size) > side else found == []
        assert tiles.cover(size, None, overlap) == []


def plain_cut(boxes, window):
    """The indices of boxes that a window (y, x, height, width) keeps, and what it shows of them, one by one."""
    found = []
    for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        left, top, right, bottom = (min(max(v - window[1 - k % 2], 0), window[3 - k % 2])
                                    for k, v in enumerate((x1, y1, x2, y2)))
        w, h = right - left, bottom - top
        if min(w, h) > 2 and w * h > 0.1 * (x2 - x1) * (y2 - y1) and max(w, h) < 100 * min(w, h):
            found.append((i, (left, top, right, bottom)))
    return found


def test_cut_agrees_with_a_plain_loop():
    rng, sizes = np.random.default_rng(1), [(150, 90), (40, 64), (30, 200), (64, 65), (130, 130)]
    corners = [rng.random((n, 2, 2)) * size[::-1] for n, size in zip((40, 12, 25, 0, 60), sizes)]
    corners[4][:10, 1] = corners[4][:10, 0] + rng.random((10, 2)) * 15  # small ones, which a window shows whole
    boxes = [np.concatenate((c.min(1), c.max(1).clip(max=size[::-1])), 1) for c, size in zip(corners, sizes)]
    rows = [np.column_stack((np.arange(len(b)) + 1000 * i, b)) for i, b in enumerate(boxes)]
    samples = [det.Sample(f"{i}.png", r.copy(), size, weight=i) for i, (r, size) in enumerate(zip(rows, sizes))]
    got = det.cut(samples, tile=64, overlap=0.25)
    want = [(i, window) for i, size in enumerate(sizes) for window in tiles.cover(size, 64, 0.25) or [None]]
    assert [(sample.weight, sample.window) for sample in got] == want
    assert Counter(sample.file for sample in got) == {"0.png": 6, "1.png": 1, "2.png": 4, "3.png": 2, "4.png": 9}
    whole = set()
    for (i, window), sample in zip(want, got):
        assert sample.file == f"{i}.png" and sample.size == (window[2:] if window else sizes[i])
        if window is None:  # small boxes too, as in an image that was never cut
            assert (sample.boxes == rows[i]).all()
            continue
        kept, k = plain_cut(boxes[i], window), sample.boxes[:, 0].astype(int)
        assert k.tolist() == [1000 * i + j for j, _ in kept]
        assert sample.boxes[:, 1:] == pytest.approx(np.array([box for _, box in kept]).reshape(-1, 4))
        sides = [b[:, 2:] - b[:, :2] for b in (sample.boxes[:, 1:], boxes[i][k % 1000])]
        whole |= set(k[np.isclose(*sides).all(1)].tolist())
    small = {1000 * i + j for i in (0, 2, 3, 4) for j, (w, h) in enumerate(boxes[i][:, 2:] - boxes[i][:, :2])
             if 2 < min(w, h) and max(w, h) <= 0.25 * 64 and max(w, h) < 100 * min(w, h)}
    assert len(small) >= 8 and small <= whole  # what the overlap has room for is whole in some window
    assert all((sample.boxes == r).all() for sample, r in zip(samples, rows))
    assert det.cut(samples, tile=None, overlap=0.25) == samples


def scenes(folder):
    """Noise with boxes, larger than 64 pixels but for one -> samples, {file: pixels (H, W, C)}."""
    rng, pixels_of, samples = np.random.default_rng(2), {}, []
    for name, size, bands in (("a.png", (150, 150), 3), ("b.tif", (100, 170), 5), ("c.jpg", (90, 50), 3),
                              ("d.png", (40, 48), 3)):
        pixels = rng.integers(0, 256, (*size, bands)).astype(np.uint8)
        if bands == 5:
            pixels = pixels * np.uint16(257)
            write_tif(folder / name, pixels.transpose(2, 0, 1))
        else:
            Image.fromarray(pixels).save(folder / name)
        decoded = np.asarray(Image.open(folder / name)) if bands == 3 else pixels
        pixels_of[folder / name] = decoded
        low = rng.random((12, 2)) * np.subtract(size[::-1], 20)
        high = low + 5 + rng.random((12, 2)) * 15
        samples.append(det.Sample(folder / name, np.column_stack((rng.integers(0, 3, 12), low, high)), size))
    return samples, pixels_of


PLAIN = dict(imgsz=64, mosaic=0)


@pytest.mark.parametrize("cache", [None, "ram", "disk"])
def test_a_window_shows_the_files_pixels(tmp_path, monkeypatch, cache):
    """In the middle of the canvas; JPEG's decoders may differ by a little."""
    monkeypatch.chdir(tmp_path)
    samples, pixels_of = scenes(tmp_path)
    cut = det.cut(samples, tile=64, overlap=0.25)
    data, uncut = det.DetData(cut, cache=cache, **PLAIN), det.DetData(samples, **PLAIN)[3, 3]
    if cache:
        reads = []
        monkeypatch.setattr(images, "read_picture", lambda *args: reads.append(args))
    assert Counter(data.files) == dict(zip((sample.file for sample in samples), (9, 8, 2, 1)))
    for i, sample in enumerate(cut):
        found = data[3, i]
        assert found["index"] == i and (sample.window is None) == (sample.size == (40, 48))
        assert found["image"].shape == (64, 64, pixels_of[sample.file].shape[2])
        if sample.window is None:
            assert all(torch.equal(found[name], uncut[name]) for name in ("image", "boxes"))
            continue
        y, x, height, width = sample.window
        want = pixels_of[sample.file][y:y + height, x:x + width].astype(np.float32)
        dy, dx = (64 - height) // 2, (64 - width) // 2
        picture = found["image"][dy:dy + height, dx:dx + width].numpy().astype(np.float32)
        assert np.abs(picture - want).max() <= (2 if sample.file.suffix == ".jpg" else 0), sample
        assert found["boxes"].numpy() == pytest.approx(sample.boxes + [0, dx, dy, dx, dy], abs=1e-4)
    assert not cache or not reads


def test_other_windows_are_not_answered_from_the_old_cache(tmp_path, monkeypatch):
    """Windows of 60 pixels are as many as those of 64: the file is the same, what it holds is not."""
    monkeypatch.chdir(tmp_path)
    samples, _ = scenes(tmp_path)
    for side in (64, 60, 60, 64):
        cut = det.cut(samples[:1], tile=side, overlap=0.25)
        cached, plain = (det.DetData(cut, cache=cache, **PLAIN) for cache in ("disk", None))
        assert len(cut) == 9 and len(list(Path("runs/cache").glob("*.bin"))) == 1
        for i in range(9):
            assert torch.equal(cached[0, i]["image"], plain[0, i]["image"])
            assert torch.equal(cached[0, i]["boxes"], plain[0, i]["boxes"])


class Seeing(YOLOv5):
    """A net that learns as ever. Judged, it also says what the Finder does: boxes around all of a colour, each once
    more half as wide again (IoU 0.67), with scores that hardly two of them share. In views that are no squares, those
    of whole scenes, the first are half as wide again too: the windows' suppress them when all is merged."""
    def forward(self, x):
        rows = super().forward(x)
        if self.training:
            return rows
        boxed = Finder()(x.float())
        xywh = boxed[..., :4] * boxed.new_tensor([1, 1, 1 if x.shape[2] == x.shape[3] else 1.5, 1])
        score = 0.3 + 0.6 * ((xywh * xywh.new_tensor([0.317, 0.551, 0.618, 0.281])).sum(-1, keepdim=True) % 1)
        sure, label = boxed[..., 4:5], boxed[..., 5:] > 0
        once = torch.cat((xywh, sure, label * score), -1)
        wider = torch.cat((xywh * xywh.new_tensor([1, 1, 1.5, 1]), sure, label * score * 0.98), -1)
        return torch.cat((rows, once, wider), 1)


@pytest.fixture
def seeing(monkeypatch):
    monkeypatch.setattr(nets, "build", lambda arch, **options: Seeing(**arch["kwargs"]))


def wide_lots(root):
    """Lots of 96 x 160 pixels, and every fourth one of 40 x 56, which has no windows."""
    root = write_parking(root, train=9, test=0, size=(96, 160), most=6)
    data = json.loads((root / "train/label/Train.json").read_text())
    for i in range(0, 9, 4):
        picture, found, classes = lot((i, 5), 40, 56, most=2)
        Image.fromarray(picture).save(root / f"train/images/{i:03}.jpg", quality=95, subsampling=0)
        data["images"][i] |= {"height": 40, "width": 56}
        data["annotations"] = [a for a in data["annotations"] if a["image_id"] != i] + [
            {"id": 1000 + 10 * i + j, "image_id": i, "category_id": int(k) + 1, "iscrowd": 0,
             "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
            for j, ((x1, y1, x2, y2), k) in enumerate(zip(found.tolist(), classes))]
    folds = {f"train/images/{i:03}.jpg": int(i in (4, 8)) for i in range(9)}  # to learn is not the point
    (root / "folds.json").write_text(json.dumps(folds))
    return edit(root, lambda old: old.update(data))


def coco_ap(root, held_out, out):
    """pycocotools' AP and AP50 of coco.json, on the held-out images."""
    truth, ids = COCO(), [int(Path(name).stem) for name in held_out]
    truth.dataset = json.loads((root / "train/label/Train.json").read_text())
    truth.createIndex()
    judge = COCOeval(truth, truth.loadRes(str(Path(out) / "coco.json")), "bbox")
    judge.params.imgIds = ids
    judge.evaluate(), judge.accumulate(), judge.summarize()
    return judge.stats[:2].tolist()


TILED = ["--tile", 64, "--folds"]


def test_validation_in_windows_is_predicts(script, tmp_path, seeing):
    """Batch norms are folded away for prediction, which moves boxes by less than 1e-3 pixels: an AP of a few boxes
    changes by that only where an IoU is as close to a threshold, or two scores to each other; by far more (0.02) where
    one window, the size of the windows or a limit of the suppression differs."""
    root = wide_lots(tmp_path / "DATA")
    script(train_det, "--data", root, *TINY_DET, *TILED, root / "folds.json")
    held_out = [name for name, fold in json.loads(Path("runs/det/exp/folds.json").read_text()).items() if fold == 0]
    files, last = [root / name for name in held_out], json.loads(Path("runs/det/exp/results.json").read_text())["last"]
    assert {images.size(file)[1:] for file in files} == {(96, 160), (40, 56)}
    flags = [*FLAGS, "--weights", "runs/det/exp/last.pt", "--source", *files, "--no-overlays", "--conf", 0.001, "--iou",
             0.65, "--max-det", 300]
    found = {}
    for name, more in (("said", ["--tile", 64]), ("unsaid", []), ("whole", ["--tile", 65536])):
        script(predict, *flags, *more, "--out", name)
        found[name] = coco_ap(root, held_out, name)
    assert [last["ap"], last["ap50"]] == pytest.approx(found["said"], abs=1e-3) and last["ap"] > 0.2
    assert items_of("said", "coco.json") == items_of("unsaid", "coco.json")  # the tile is the training's
    assert abs(found["whole"][0] - last["ap"]) > 0.02


def test_validation_is_predicts(script, tmp_path, seeing):
    """Without windows too: boxes are clipped to the image in both, which an AP of objects at its border shows."""
    root = wide_lots(tmp_path / "DATA")
    script(train_det, "--data", root, *TINY_DET, "--folds", root / "folds.json")
    held_out = [name for name, fold in json.loads(Path("runs/det/exp/folds.json").read_text()).items() if fold == 0]
    script(predict, *FLAGS, "--weights", "runs/det/exp/last.pt", "--source", *(root / n for n in held_out), "--out",
           "out", "--no-overlays", "--conf", 0.001, "--iou", 0.65, "--max-det", 300)
    last = json.loads(Path("runs/det/exp/results.json").read_text())["last"]
    assert [last["ap"], last["ap50"]] == pytest.approx(coco_ap(root, held_out, "out"), abs=1e-3) and last["ap"] > 0.2


@pytest.mark.slow
def test_two_processes_validate_windows_as_one(script, tmp_path, seeing):
    """Of an image's windows each has some."""
    root = wide_lots(tmp_path / "DATA")
    flags = ["--data", root, *TINY_DET, *TILED, root / "folds.json", "--no-ema", "--lr", 1e-6]
    script(train_det, *flags, "--name", "one")
    ranks(train_det, *flags, "--name", "two", cwd=tmp_path)
    one, two = (json.loads(Path(f"runs/det/{name}/results.json").read_text()) for name in ("one", "two"))
    assert two["last"]["ap"] == pytest.approx(one["last"]["ap"], abs=1e-3) and one["last"]["ap"] > 0.2
    assert [c["truths"] for c in two["classes"].values()] == [c["truths"] for c in one["classes"].values()]
    rows = [Path(f"runs/det/{name}/samples.csv").read_text().splitlines() for name in ("one", "two")]
    assert [row.split(",")[0] for row in rows[0]] == [row.split(",")[0] for row in rows[1]] and len(rows[0]) == 8


def test_windows_have_their_images_weight(script, tmp_path, monkeypatch):
    """Of --extra-data and of --image-weights; anchors are fitted to boxes and sizes of windows."""
    root, seen = write_parking(tmp_path / "DATA", train=6, test=0, size=(96, 160)), []
    write_parking(tmp_path / "more", train=8, test=0, size=(40, 56), most=1)
    flags = ["--data", root, *TINY_DET, *TILED, 3, "--extra-data", "more:3"]
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(train_det, "fit_anchors", lambda head, samples, args: seen.append(samples) or stop())
        script(train_det, *flags, "--head", "anchor")
    samples = seen.pop()
    assert [sample.size for sample in samples] == [(64, 64)] * 24 + [(40, 56)] * 8
    assert all(((0 <= s.boxes[:, 1:]) & (s.boxes[:, 1:] <= [*s.size[::-1]] * 2)).all() for s in samples)
    monkeypatch.setattr(train_det, "train_loader", lambda data, *_, weights, **options: seen.append((data, weights))
                        or stop())
    for more in ([], ["--image-weights"]):
        with pytest.raises(Stopped):
            script(train_det, *flags, *more)
    (data, weights), (_, balanced) = seen
    assert weights.tolist() == [1.0] * 24 + [3.0] * 8 and len(data) == 32  # four images of six windows
    classes = [rows[:, 0] for rows in data.labels]
    assert balanced == pytest.approx(weights * train_det.class_balance(classes))


def test_scenes_too_large_to_be_read_whole(script, tmp_path, monkeypatch):
    """Neither training nor what is drawn after it needs more of them than a window, or a reduced view."""
    root = write_parking(tmp_path / "DATA", train=2, test=0, size=(64, 2800), most=8)
    truth = labels.read(root, cache=None)
    monkeypatch.setattr(images, "MAX_VALUES", 64 * 1400 * 3)
    drawn, draw = [], train_det.pictures.draw_boxes
    monkeypatch.setattr(train_det.pictures, "draw_boxes", lambda rgb, rows, names, zoom=1: drawn.append(
        (rgb.shape, torch.as_tensor(rows)[:, :4] * zoom)) or draw(rgb, rows, names, zoom))
    script(train_det, "--data", root, *TINY_DET, *TILED, 2, "--bs", 16)
    assert Path("runs/det/exp/review.png").exists()
    (shape, found), _ = drawn[-2:]  # of the one held-out image, its labels and what was found
    folds = json.loads(Path("runs/det/exp/folds.json").read_text())
    want = truth.boxes[list(folds.values()).index(0)]
    assert shape == (44, 1920, 3)
    assert np.sort(found.numpy(), 0) == pytest.approx(np.sort(want, 0) * 1920 / 2800, rel=1e-5)


# ---- boxes from masks ------------------------------------------------------------------------------------------------
def opencv(mask, skip=()):
    """[(value, box)] of the 8-connected parts of a mask by OpenCV, sorted."""
    found = []
    for value in set(np.unique(mask).tolist()) - {0, *skip}:
        stats = cv2.connectedComponentsWithStats((mask == value).astype(np.uint8), connectivity=8)[2]
        found += [(value, (x, y, x + w, y + h)) for x, y, w, h, _ in stats[1:].tolist()]
    return sorted(found)


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (30, 1), (24, 31), (50, 40)])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.8, 1.0])
def test_boxes_of_random_masks_are_opencvs(size, share):
    rng = np.random.default_rng((*size, int(share * 10)))
    for top in (2, 4, 256):
        mask = np.where(rng.random(size) < share, rng.integers(1, top, size), 0)
        found = masks.objects(torch.from_numpy(mask))
        assert sorted(found) == opencv(mask)
        assert all(type(value) is int and set(map(type, box)) == {float} for value, box in found)


def blobs(seed, values, size=(40, 56)):
    """Rectangles and single pixels of these values, which touch and cover one another; (H, W) uint8."""
    rng, mask = np.random.default_rng(seed), np.zeros(size, np.uint8)
    for value in rng.permutation(np.repeat(values, 5)):
        h, w = rng.integers(1, 14, 2)
        y, x = rng.integers(0, size[0]), rng.integers(0, size[1])
        mask[y:y + h, x:x + w] = value
    return mask


def write_blobs(root, masks):
    for folder in ("train_img", "train_mask"):
        (root / folder).mkdir(parents=True)
    for i, mask in enumerate(masks):
        write_tif(root / f"train_img/train_img_{i}.tif", tile(i, *mask.shape, bands=4)[0])
        write_tif(root / f"train_mask/train_mask_{i}.tif", mask)
    return root


@pytest.mark.parametrize("values, names", [
    ([1], {1: "object"}), ([255], {255: "object"}), ([1, 255], {1: "object", 255: "object"}),
    ([1, 2, 5, 255], {1: "class 1", 2: "class 2", 5: "class 5"}), ([3], {3: "class 3"}),
    ([2, 255], {2: "class 2"})], ids=str)
def test_masks_are_labels(tmp_path, values, names):
    """255 is an object in binary masks, and void beside other classes; a mask without objects is background."""
    masks = [*(blobs(i, values) for i in range(12)), np.zeros((40, 56), np.uint8)]  # train_img_10 comes before _2
    data = labels.read(write_blobs(tmp_path / "blobs", masks), cache=None)
    assert data.names == sorted(set(names.values())) and data.category_ids == sorted({*names} - {255} or {1})
    assert [file.name for file in data.files] == sorted(f"train_img_{i}.tif" for i in range(13))
    assert set(data.sizes) == {(40, 56)} and not any(data.held_out)
    for file, rows, classes in zip(data.files, data.boxes, data.classes):
        mask = masks[int(file.stem.split("_")[-1])]
        want = sorted((names[value], box) for value, box in opencv(mask, skip={255} - {*names}))
        assert sorted((data.names[k], tuple(row)) for k, row in zip(classes, rows.tolist())) == want
    assert sum(map(len, data.boxes)) > 20


def test_a_changed_mask_is_read_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root, reads, parse = write_blobs(Path("blobs"), [blobs(i, [1]) for i in range(3)]), [], masks.read
    monkeypatch.setattr(masks, "read", lambda layout: reads.append(layout) or parse(layout))
    first, again = labels.read(root), labels.read(root)
    assert len(reads) == 1 and all((a == b).all() for a, b in zip(first.boxes, again.boxes))
    write_tif(root / "train_mask/train_mask_1.tif", mask := blobs(77, [1]))  # of the same size in bytes
    os.utime(root / "train_mask/train_mask_1.tif", ns=(1, 1))
    changed = labels.read(root)
    assert len(reads) == 2 and sorted(map(tuple, changed.boxes[1].tolist())) == [box for _, box in opencv(mask)]
    write_tif(root / "train_img/train_img_7.tif", tile(7, 40, 56, bands=4)[0])
    write_tif(root / "train_mask/train_mask_7.tif", blobs(7, [1]))
    assert len(labels.read(root).files) == 4


def test_masks_that_do_not_fit(refused, tmp_path):
    root = write_blobs(tmp_path / "blobs", [blobs(i, [1]) for i in range(3)])
    write_tif(root / "train_mask/train_mask_1.tif", blobs(1, [1], (40, 40)))
    flags = [*TINY_DET, "--data", root]
    refused(train_det, *flags, says=["train_mask_1.tif: is (40, 40) pixels", "train_img_1.tif is (40, 56)"])
    write_tif(root / "train_mask/train_mask_1.tif", np.full((40, 56), 300, np.uint16))
    refused(train_det, *flags, says="train_mask_1.tif: has the value 300")
    (root / "train_mask/train_mask_1.tif").unlink()
    refused(train_det, *flags, says="train_img_1.tif: no file of that name")
    for i in range(3):
        write_tif(root / f"train_mask/train_mask_{i}.tif", np.zeros((40, 56), np.uint8))
    refused(train_det, *flags, says=[root, "box"])


def test_training_on_masks(script, tmp_path, capsys):
    root = write_wildfire(tmp_path / "Wildfire", train=4, test=0, size=(48, 48))
    script(train_det, "--data", root, *TINY_DET, "--folds", 2, "--tile", 32)
    assert "to train, 2 to validate; 1 classes" in capsys.readouterr().out
    state = checkpoint.load("runs/det/exp/last.pt")
    assert (state["classes"], state["category_ids"]) == (["object"], [1])
    assert state["input"]["bands"] == list(range(1, 11))
    assert np.isfinite(state["history"][-1]["loss"])
    results = json.loads(Path("runs/det/exp/results.json").read_text())["classes"]
    assert {name: c["truths"] for name, c in results.items()} == {"object": 2}
