"""utils/ops/tta.py against numpy and Pillow, and predict.py --tta for each task against views made by hand."""
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d

import nets
import predict
from data import det, images
from nets.unet import UNet
from nets.yolo import YOLOv5
from tests import test_bad_input_cls, test_predict_det
from tests.conftest import tile, warp_points, write_tif
from tests.test_predict_det import Finder, finder  # noqa: F401, a fixture
from tests.test_scripts_cls import results
from tests.test_scripts_seg import masks_of
from utils.ops import boxes, decide, geometry, tta
from utils.train import checkpoint

ALL = ("hflip", "vflip", "rot90", "scale")  # 24 views
CPU = ["--device", "cpu", "--amp", "off", "--workers", 0]


def image(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def smooth(height, width):
    """(1, 2, H, W) of slow waves, which survive resizing."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    return torch.tensor(np.stack((np.sin(3 * x + y), np.cos(2 * y - x)))[None] / 2 + 0.5).float()


def views_by_hand(names, height, width, *, scales=(0.83, 1, 1.2), stride=1):
    """-> [(there, back, canvas)]: functions on arrays (..., H, W) by numpy and Pillow, in the order of `tta_views`."""
    def resize(x, size):
        parts = [np.asarray(Image.fromarray(part).resize(size[::-1], Image.BILINEAR)) for part in x.reshape(
            -1, *x.shape[-2:])] if x.shape[-2:] != size else x
        return np.reshape(parts, (*x.shape[:-2], *size))

    def view(size, turns, axes):
        def there(x):
            return np.rot90(np.flip(resize(x, size), axes), turns, (-2, -1))

        def back(x):
            return resize(np.ascontiguousarray(np.flip(np.rot90(x, -turns, (-2, -1)), axes)), (height, width))
        return there, back, size[::-1] if turns % 2 else size

    return [view(tuple(-(-round(side * s) // stride) * stride for side in (height, width)), half + quarter, v + h)
            for s in (scales if "scale" in names else [1]) for half in ([0, 2] if "rot180" in names else [0])
            for quarter in ([0, 1] if "rot90" in names else [0]) for v in ([(), (-2,)] if "vflip" in names else [()])
            for h in ([(), (-1,)] if "hflip" in names else [()])]


# ---- views -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("names", [c for n in range(5) for c in itertools.combinations(
    ("hflip", "vflip", "rot90", "rot180"), n)], ids="-".join)
def test_flips_and_turns_are_numpys_and_exact(names):
    """All combinations, equal views once; a quarter turn swaps the sides of the canvas."""
    x = image(2, 3, 5, 8)
    want = {}
    for there, _, size in views_by_hand(names, 5, 8):
        want.setdefault(there(x.numpy()).tobytes(), (there(x.numpy()), size))
    for (matrix, size), (view, canvas) in zip(tta.tta_views(names, (5, 8)), want.values(), strict=True):
        moved = tta.warp_view(x, matrix, size)
        assert size == canvas and np.array_equal(moved, view)
        assert torch.equal(tta.warp_view(moved, np.linalg.inv(matrix), (5, 8)), x)
    assert len(want) == {(): 1, ("hflip", "vflip", "rot180"): 4}.get(names, min(2 ** len(names), 8))


@pytest.mark.parametrize("names, count", [(("hflip", "rot90", "scale"), 12), (ALL, 24), (tta.NAMES, 24), ((), 1),
                                          (("scale",), 3), (("rot90", "rot180"), 4), (("hflip", "hflip"), 2)])
def test_the_number_of_views(names, count):
    assert len(tta.tta_views(names, (64, 96), stride=8)) == count


def test_sizes_are_multiples_of_the_stride():
    sizes = lambda *args, **kwargs: [size for _, size in tta.tta_views(*args, **kwargs)]  # noqa: E731
    assert sizes(("scale",), (100, 200)) == [(83, 166), (100, 200), (120, 240)]
    assert sizes(("scale", "rot90"), (96, 160), stride=32) == [
        (96, 160), (160, 96), (128, 192), (192, 128)]  # 0.83 becomes 96 x 160 as well: equal views come once
    assert sizes(("scale",), (100, 200), scales=(2, 0.5), factor=0.5) == [(100, 200), (25, 50)]
    assert sizes((), (100, 200), stride=32, factor=0.5) == [(64, 128)]  # 50 x 100
    assert sizes(("scale",), (1, 9), scales=(0.1,)) == [(1, 1)]
    with pytest.raises(ValueError, match="flip"):
        tta.tta_views(("hflip", "flip"), (8, 8))


@pytest.mark.parametrize("stride", [1, 8])
def test_every_view_is_resized_then_flipped_and_turned(stride):
    """Pixels as Pillow resizes them, and the image's corners on the corners of the canvas."""
    x = image(2, 2, 64, 80)
    passes, by_hand = tta.tta_views(ALL, (64, 80), stride=stride), views_by_hand(ALL, 64, 80, stride=stride)
    for (matrix, size), (there, back, canvas) in zip(passes, by_hand, strict=True):
        view = tta.warp_view(x, matrix, size)
        assert size == canvas == tuple(view.shape[2:]) and size[0] % stride == size[1] % stride == 0
        assert np.allclose(view, there(x.numpy()), atol=1e-5)
        restored = tta.warp_view(view, np.linalg.inv(matrix), (64, 80))
        assert np.allclose(restored, back(view.numpy()), atol=1e-5)
        corners = np.array([(0, 0), (80, 0), (80, 64), (0, 64)])
        moved = warp_points(corners, matrix)
        assert sorted(moved.round(9).tolist()) == sorted([x, y] for x in (0, size[1]) for y in (0, size[0]))
        assert np.allclose(warp_points(moved, np.linalg.inv(matrix)), corners)


# ---- maps ------------------------------------------------------------------------------------------------------------
def test_maps_of_symmetric_predictors_come_back():
    """Predictors that do not depend on orientation and size: the maps of all views are equal."""
    for predict_maps in (lambda x: x, lambda x: (x > 0.5).float(), lambda x: x.square() + 1):
        x = smooth(48, 64)
        views = tta.tta_views(ALL, (48, 64), scales=(0.5, 1, 2))
        for (_, size), found in zip(views, tta.maps(predict_maps, x, views), strict=True):
            difference = (found - predict_maps(x)).abs()
            if sorted(size) == [48, 64]:
                assert torch.equal(found, predict_maps(x))
            else:
                assert difference.mean() < 0.02 and (difference > 0.1).float().mean() < 0.08
    x, views = image(2, 3, 6, 7), tta.tta_views(("hflip", "vflip", "rot90"), (6, 7))
    blurred = avg_pool2d(x, 3, 1, 1)
    assert torch.allclose(tta.merge(tta.maps(lambda x: avg_pool2d(x, 3, 1, 1), x, views)), blurred, atol=1e-6)


@pytest.mark.parametrize("names", [("hflip", "vflip"), ("hflip", "rot90", "scale"), tta.NAMES])
def test_mean_of_any_predictor_is_the_mean_over_the_views(names):
    """A predictor that depends on the orientation, with two maps for three bands."""
    def predict_maps(x):
        ramp = torch.arange(float(x.shape[2] * x.shape[3])).reshape(x.shape[2:]) / 60
        return (x[:, :2] * ramp + x[:, 1:].roll(1, -1)).sigmoid()

    x = image(2, 3, 12, 14)
    by_hand = [back(predict_maps(torch.from_numpy(there(x.numpy()).copy())).numpy())
               for there, back, _ in views_by_hand(names, 12, 14)]
    found = tta.merge(tta.maps(predict_maps, x, tta.tta_views(names, (12, 14))))
    assert np.allclose(found, np.mean(by_hand, 0), atol=1e-5)
    assert not np.allclose(predict_maps(x), found, atol=1e-2)
    assert torch.equal(tta.merge(tta.maps(predict_maps, x, tta.tta_views((), (12, 14)))), predict_maps(x))


# ---- boxes -----------------------------------------------------------------------------------------------------------
def test_rows_are_moved_as_the_matrix_says():
    truth = np.array([[10, 20, 40, 30], [0, 0, 100, 60], [97.5, 1, 100, 60]])
    for matrix, size in tta.tta_views(ALL, (60, 100), stride=4):
        moved = torch.tensor(geometry.warp_boxes(truth, matrix)).float()
        assert moved[1].tolist() == [0, 0, size[1], size[0]]
        given = torch.cat((boxes.to_xywh(moved), image(3, 4)), 1)[None]
        found, = tta.tta_boxes(lambda view: given.clone(), torch.zeros(1, 3, 60, 100), [(matrix, size)])
        assert np.allclose(boxes.to_xyxy(found[0, :, :4]), truth, atol=1e-4)
        assert torch.equal(found[..., 4:], given[..., 4:])


def test_every_view_finds_the_same_boxes():
    """Corners on even pixels, which are whole pixels at half and at twice the size."""
    x = torch.full((1, 3, 128, 192), 0.2)
    truth = torch.tensor([[20, 40, 80, 60], [100, 4, 120, 100], [150, 64, 190, 126.]])
    for k, (x1, y1, x2, y2) in enumerate(truth.int().tolist()):
        x[0, k, y1:y2, x1:x2] = 0.9
    views = tta.tta_views(ALL, (128, 192), stride=32, scales=(0.5, 1, 2))
    rows = torch.cat(list(tta.tta_boxes(Finder(), x, views)), 1)
    assert len(views) == 24 and rows.shape == (1, 24 * 3, 8)
    for (_, size), found in zip(views, rows[0].reshape(24, 3, 8)):
        difference = (boxes.to_xyxy(found[:, :4]) - truth).abs().max()
        assert difference == 0 if sorted(size) == [128, 192] else difference <= 2  # one pixel at half the size
        assert torch.equal(found[:, 4:], Finder()(x)[0, :, 4:])


# ---- merging ---------------------------------------------------------------------------------------------------------
FORMULAS = {"mean": lambda p: p.mean(0), "gmean": lambda p: p.prod(0) ** (1 / len(p)),
            "sum": lambda p: np.minimum(p.sum(0), 1), "max": lambda p: p.max(0), "min": lambda p: p.min(0),
            "tsharpen": lambda p: (p ** 0.5).mean(0)}


@pytest.mark.parametrize("count", [1, 2, 12])
@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (2, 3, 4, 5), (6, 26)])
def test_merges_are_numpys(count, shape):
    assert set(FORMULAS) <= set(tta.MERGES)
    probs = image(count, *shape) * (0.3 if count > 1 else 1)  # so that some sums are below 1
    probs[:, 0, 0] = 0
    for how, formula in FORMULAS.items():
        want = formula(probs.double().numpy())
        assert np.allclose(tta.merge(iter(probs), how), want, atol=1e-6), how
        if how == "sum" and count == 2:
            assert want.max() < 1
    assert torch.equal(tta.merge(probs), tta.merge(probs, "mean"))
    if count == 12:
        assert 0.1 < (tta.merge(probs, "sum") == 1).float().mean() < 1


def test_single_label_probabilities_add_up_to_one():
    for shape in ((12, 4, 5, 3, 6), (12, 4, 5)):
        probs = (3 * image(*shape)).softmax(2)
        for how, formula in FORMULAS.items():
            want = formula(probs.double().numpy()) if how != "sum" else probs.double().numpy().sum(0)
            found = tta.merge(probs, how, single_label=True)
            assert np.allclose(found, want / want.sum(1, keepdims=True), atol=1e-6), how
        assert torch.allclose(tta.merge(probs, "sum", single_label=True), tta.merge(probs), atol=1e-6)
    disagreeing = torch.eye(2)[:, None]  # each view is sure of another class
    assert torch.equal(tta.merge(disagreeing, "min", single_label=True), torch.zeros(1, 2))
    torch.testing.assert_close(tta.merge(disagreeing, "gmean", single_label=True), torch.full((1, 2), 0.5))


# ---- predict.py ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("classes, how", [(1, "mean"), (3, "tsharpen")])
def test_segmentation(script, tmp_path, monkeypatch, classes, how):
    """A scene that is not square and no multiple of the stride."""
    torch.manual_seed(classes)
    arch = dict(in_chans=3, classes=classes, conv0=(8,), decoder=(8, 8, 8, 8))
    net = UNet(**arch).eval()
    torch.nn.init.normal_(net.head.weight, std=10)
    checkpoint.save(tmp_path / "net.pt", {
        "task": "seg", "arch": {"name": "unet.UNet", "kwargs": arch}, "classes": classes, "args": {"data": "nowhere"},
        "input": {"bands": [7, 6, 5], "pixel_scale": 65535.0, "imgsz": 64, "mean_planes": False, "resize": False},
        "model": net.state_dict(), "ema": None})
    scene = write_tif(tmp_path / "scene.tif", tile(3, 45, 92)[0])
    seen, masks = [], decide.masks
    monkeypatch.setattr(decide, "masks", lambda probs, *rest: seen.append(probs.clone()) or masks(probs, *rest))
    script(predict, "--task", "seg", *CPU, "--weights", "net.pt", "--source", scene, "--out", "out", "--tta", "hflip",
           "rot90", "scale", *(["--merge", how] if how != "mean" else []))
    x = images.read(scene, [7, 6, 5]).numpy().astype(np.float32) / 65535
    x = np.pad(x, ((0, 0), (0, 3), (0, 4)), "reflect")
    passes = []
    for there, back, size in views_by_hand(("hflip", "rot90", "scale"), 48, 96, stride=net.stride):
        with torch.no_grad():
            logits = net(torch.from_numpy(there(x).copy())[None])[0]
        assert logits.shape[1:] == size and size[0] % 16 == size[1] % 16 == 0
        passes.append(back((logits.sigmoid() if classes == 1 else logits.softmax(0)).numpy())[:, :45, :92])
    want = FORMULAS[how](np.array(passes, np.float64))
    want = want if classes == 1 else want / want.sum(0)
    assert len(seen) == 1 and np.abs(seen[0][0].numpy() - want).max() < 1e-4
    assert np.ptp(want[0]) > 0.1 and np.abs(np.array(passes) - want).max() > 0.02
    mask = masks_of("out")["scene.tif"]
    sure = np.abs(want - 0.5).min(0) > 1e-3 if classes == 1 else np.diff(np.sort(want, 0)[-2:], axis=0)[0] > 1e-3
    assert (mask == (want[0] > 0.5 if classes == 1 else want.argmax(0)))[sure].all() and sure.mean() > 0.9


def test_detection_finds_the_rectangles(script, finder):  # noqa: F811
    for i in range(3):
        test_predict_det.save(f"in/{i}.png", test_predict_det.scene(i, 96, 130)[0])
    script(predict, "--task", "det", *CPU, "--weights", test_predict_det.weights(), "--source", "in", "--out", "out",
           "--tta", "hflip", "rot90", "scale", "--tta-scales", 0.7, 1, 1.5)
    for i in range(3):
        test_predict_det.check(test_predict_det.items_of("out"), i, test_predict_det.scene(i, 96, 130)[1], 1.5)


@pytest.mark.parametrize("merge", [[], ["--merge", "wbf"]], ids=["suppression", "fusion"])
def test_detection_of_the_true_net(script, monkeypatch, merge):
    path = test_predict_det.weights(imgsz=64)
    test_predict_det.save("1.png", test_predict_det.scene(1, 96, 64)[0])
    seen, nms = [], boxes.nms
    monkeypatch.setattr(boxes, "nms", lambda rows, **options: seen.append(rows.clone()) or nms(rows, **options))
    script(predict, "--task", "det", *CPU, "--weights", path, "--source", "1.png", "--out", "out", "--tta", "hflip",
           "rot90", "scale", "--tta-scales", 1, 2, *merge)
    state = checkpoint.load(path)
    net = YOLOv5(**state["arch"]["kwargs"]).eval()
    net.load_state_dict(state["model"])
    x = det.TiledImages([Path("1.png")], bands=[1, 2, 3], imgsz=64, stride=32)[0]["image"].permute(2, 0, 1).numpy()
    x, want, (height, width) = np.ascontiguousarray(x, np.float32) / 255, [], x.shape[1:]
    assert height > width
    for there, _, size in views_by_hand(("hflip", "rot90", "scale"), height, width, scales=(1, 2)):
        with torch.no_grad():
            rows = net(torch.from_numpy(there(x).copy())[None])[0]
        cx, cy, w, h = rows[:, :4].T / (max(size) / height)
        flipped, turned = len(want) % 2, size[0] < size[1]
        if turned:  # back from a quarter turn counter-clockwise
            cx, cy, w, h = width - cy, cx, h, w
        want.append(torch.cat((torch.stack((width - cx if flipped else cx, cy, w, h), 1), rows[:, 4:]), 1))
    assert len(want) == 8 and len(seen) == (8 if merge else 1)  # for fusion every view by itself
    torch.testing.assert_close(torch.cat([rows[0] for rows in seen]), torch.cat(want), rtol=1e-3, atol=2e-2)


class Shifting(Finder):
    """Finds each rectangle twice, 2 and 3 pixels to the right of where it is in the view and less sure of the second,
    and a wide view's red ones not at all: what turned and mirrored views say differs."""

    def forward(self, x):
        rows = super().forward(x)
        rows[..., 0] += 2
        if x.shape[3] > x.shape[2]:
            rows[:, 0, 4] = 0
        again = rows.clone()
        again[..., 0] += 1
        again[..., 4] *= 0.9
        return torch.cat((rows, again), 1)


def detections_of(folder):
    """coco.json, of one image -> sorted rows of class, score, x1, y1, x2, y2."""
    ids = (1, 2, 7)
    return sorted([ids.index(item["category_id"]), item["score"], x, y, x + w, y + h] for item in
                  test_predict_det.items_of(folder, "coco.json") for x, y, w, h in [item["bbox"]])


def as_rows(found):
    """Detections (n, 6), in `detections_of`'s order and of its columns."""
    return sorted(torch.cat((found[:, [5, 4]], found[:, :4]), 1).tolist())


@pytest.mark.parametrize("flags", [[], ["--max-det", 2], ["--conf", 0.6]], ids=["plain", "max-det", "conf"])
def test_boxes_of_the_views_are_fused(script, finder, monkeypatch, flags):  # noqa: F811
    """Against boxes.wbf of the detections of every view after its own suppression; views moved by hand."""
    monkeypatch.setattr(predict.nets, "build", lambda arch: Shifting(**arch["kwargs"]))
    picture, truth = next(found for found in (test_predict_det.scene(i, 96, 128) for i in range(100))
                          if len(found[1]) == 3)
    test_predict_det.save("1.png", picture)
    path = test_predict_det.weights(imgsz=128)
    script(predict, "--task", "det", *CPU, "--weights", path, "--source", "1.png", "--out", "out", "--tta", "hflip",
           "rot90", "--merge", "wbf", *flags)
    limits = dict(conf=0.01, iou=0.7, max_det=300) | {
        flag[2:].replace("-", "_"): value for flag, value in zip(flags[::2], flags[1::2])}
    per_view = []
    for turned, mirrored in itertools.product((False, True), repeat=2):
        found = []
        for shift, share in ((2, 1), (3, 0.9)):  # a view's right, turned back, is the image's lower side
            move = np.array([0, shift] if turned else [-shift, 0] if mirrored else [shift, 0])
            found += [[*np.add(box, [*move, *move]), Finder.scores[k] * share, k] for k, box in truth.items()
                      if turned or k != 0]
        rows = torch.tensor(np.array(found)).float()
        per_view.append(boxes.suppress(rows[rows[:, 4] > limits["conf"]], iou=limits["iou"],
                                       max_det=limits["max_det"]))
    want = boxes.clip(boxes.wbf(per_view)[:limits["max_det"]], 96, 128)
    np.testing.assert_allclose(detections_of("out"), as_rows(want), atol=1e-3)
    joined = boxes.suppress(torch.cat(per_view), iou=limits["iou"], max_det=limits["max_det"])
    assert len(joined) != len(want) or np.abs(np.subtract(as_rows(joined), as_rows(want))).max() > 0.1


def test_one_view_is_fused_with_itself_only(script, finder, monkeypatch):  # noqa: F811
    """Only boxes change that suppression keeps and that overlap by more than the fusion's 0.55."""
    monkeypatch.setattr(predict.nets, "build", lambda arch: Shifting(**arch["kwargs"]))
    picture, truth = test_predict_det.scene(3, 96, 128)
    test_predict_det.save("1.png", picture)
    path = test_predict_det.weights(imgsz=128)
    for iou, fused in ((0.5, 0), (0.99, 0.9)):
        flags = ["--task", "det", *CPU, "--weights", path, "--source", "1.png", "--iou", iou]
        script(predict, *flags, "--out", f"plain{iou}")
        script(predict, *flags, "--out", f"wbf{iou}", "--tta", "scale", "--tta-scales", 1, "--merge", "wbf")
        right = (2 + 3 * fused) / (1 + fused)  # the mean, weighted by the scores
        want = sorted([k, Finder.scores[k], x1 + right, y1, x2 + right, y2]  # the best score that the view has
                      for k, (x1, y1, x2, y2) in truth.items() if k != 0)
        np.testing.assert_allclose(detections_of(f"wbf{iou}"), want, atol=1e-3)
        assert len(detections_of(f"plain{iou}")) == len(want) * (2 if fused else 1)
    np.testing.assert_allclose(detections_of("plain0.5"), detections_of("wbf0.5"), atol=1e-4)


@pytest.mark.parametrize("single_label, how", [(False, "gmean"), (True, "mean")])
def test_classification(script, single_label, how):
    path = test_bad_input_cls.weights(imgsz=64, single_label=single_label)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8)).astype(np.uint8).repeat(8, 1).repeat(8, 2)
    for i, picture in enumerate(pixels):
        test_predict_det.save(f"in/{i}.png", picture)
    state = torch.load(path, weights_only=True)
    for name, values in state["model"].items():
        if values.ndim == 2:  # the head's: a more decided net
            values *= 30
    torch.save(state, path)
    net = nets.build(state["arch"]).eval()
    net.load_state_dict(state["model"])
    passes = []
    for size, flip, turn in itertools.product((53, 64, 77), (False, True), (0, 1)):
        source = 63 - abs(((np.arange(size) + 0.5) * 64 / size - 0.5) % 126 - 63)  # bilinear, reflected at the border
        line = np.maximum(0, 1 - np.abs(source[:, None] - np.arange(64)))
        x = line @ (pixels / 255) @ line.T
        x = np.rot90(x[..., ::-1] if flip else x, turn, (1, 2)).astype(np.float32)
        with torch.no_grad():
            logits = net((torch.from_numpy(x.copy())[:, None] - 0.5) / 0.5)
        passes.append((logits.softmax(1) if single_label else logits.sigmoid()).double().numpy())
    want = FORMULAS[how](np.array(passes))
    want = want / want.sum(1, keepdims=True) if single_label else want
    script(predict, "--task", "cls", *CPU, "--weights", path, "--source", "in", "--out", "out", "--tta", "hflip",
           "rot90", "scale", "--merge", how)
    np.testing.assert_allclose(results("out")[1], want, atol=2e-5)
    assert np.abs(np.array(passes) - want).max() > 0.01


def test_flags_that_do_not_fit(refused):
    refused(predict, "--task", "seg", "--tta", "hflip", "flip", says=["--tta", "'flip'", "hflip", "--help"])
    refused(predict, "--task", "cls", "--tta", "--tta-scales", 1, 2, says=["--tta-scales", "--tta scale"])
    refused(predict, "--task", "det", "--tta-scales", 1, 2, says=["--tta-scales", "--tta scale"])
    refused(predict, "--task", "seg", "--tta", "scale", "--tta-scales", 0, says=["--tta-scales", "between"])
    for merge in tta.MERGES:
        refused(predict, "--task", "det", "--tta", "--merge", merge, says=[f"--merge {merge}: not for", "det", "wbf"])
    for task in ("seg", "cls"):
        refused(predict, "--task", task, "--tta", "--merge", "wbf", says=["--merge wbf: not for", task, "boxes"])
    refused(predict, "--task", "det", "--merge", "wbf", says=["--merge", "--tta"])
    refused(predict, "--task", "seg", "--tta", "--merge", "median", says=["--merge", "'median'"])
    refused(predict, "--task", "cls", "--merge", "mean", says=["--merge", "--tta"])
    for task, merge in itertools.product(("seg", "cls"), set(tta.MERGES) - {"mean", "gmean"}):
        refused(predict, "--task", task, "--tta", "--merge", merge, "--pseudo", 0.75,
                says=["--pseudo", f"--merge {merge}", "mean or gmean"])
    for merge in ("mean", "gmean"):  # accepted: the command ends later, because there is no run
        refused(predict, "--task", "seg", "--tta", "--merge", merge, "--pseudo", 0.75, says="no run")


class Halved(torch.nn.Module):
    """A net whose probabilities are half of the first band, and which remembers the shapes of its inputs."""
    stride = 8

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.ones(1)), []

    def forward(self, x):
        self.seen.append(x.shape)
        return (x[:, :1] / 2).logit(1e-6)


def test_at_another_size_maps_come_back():
    """The net sees the size that it was trained for; a ramp comes back except at its ends."""
    ramp, net = torch.linspace(0, 1, 60)[None, None, None].expand(2, 3, 40, 60), Halved()
    with torch.no_grad():
        got = decide.segment(net, ramp, side=32)
    assert net.seen == [(2, 3, 32, 32)] and got.shape == (2, 1, 40, 60)
    assert (got[..., 4:-4] - 0.5 * ramp[:, :1, :, 4:-4]).abs().max() < 0.01


def test_unknown_merges_are_refused():
    with pytest.raises(ValueError, match="median"):
        tta.merge([torch.ones(1, 2)], "median")
