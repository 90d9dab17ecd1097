"""predict.py --task seg --detector: detect, crop, segment. What is in a box must be what the segmenter says of that
crop alone, computed here from the file; what is in none must be 0.

The detector finds the boxes that a test names, or rectangles by their colour (test_predict_det.py); the segmenter is a
true one that has learned nothing but is of many minds.
"""
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.features import rasterize
from rasterio.transform import from_origin

import nets
import predict
from data.results.masks import MaskWriter
from nets.unet import UNet
from tests import test_bad_input_cls, test_predict_det
from tests.conftest import tile, write_tif
from tests.test_scripts_det import ranks
from tests.test_scripts_seg import masks_of
from utils.ops import boxes
from utils.train import checkpoint

CPU = ["--task", "seg", "--device", "cpu", "--amp", "off", "--workers", 0]
SIDE = 128  # of the detector's input
FLAGS = [*CPU, "--weights", "seg.pt", "--detector", "det.pt", "--out", "out"]


class Fixed(torch.nn.Module):
    """Finds in an image of `size` what `found` says of that size: [(box, score)], in the image's pixels."""
    stride, strides = 32, [8, 16, 32]
    found, seen = {}, []

    def __init__(self, num_classes=3, **_):
        super().__init__()
        self.classes = num_classes
        self.none = torch.nn.Parameter(torch.zeros(0))

    def forward(self, x):
        self.seen.append(x)
        rows = torch.zeros(len(x), 9, 5 + self.classes)
        for (height, width), found in self.found.items():  # the longer side becomes SIDE, amid the canvas
            factor = SIDE / max(height, width)
            canvas = [math.ceil(side * factor / 32 + 0.5) * 32 for side in (height, width)]
            if canvas == list(x.shape[2:]):
                shift = [(full - round(side * factor)) // 2 for full, side in zip(canvas, (height, width))][::-1]
                for row, (box, score) in enumerate(found):
                    corners = torch.tensor(box, dtype=torch.float64) * factor + torch.tensor(shift * 2)
                    rows[:, row, :4], rows[:, row, 4], rows[:, row, 5] = boxes.to_xywh(corners).float(), 1, score
        return rows


@pytest.fixture
def detector(monkeypatch):
    """detector(net): a class of nets in the place of the detector; the segmenter stays what it is."""
    def put(net):
        load, build = checkpoint.load_weights, nets.build
        monkeypatch.setattr(nets, "build", lambda arch: net(**arch["kwargs"]) if arch["name"] == "yolo.YOLOv5"
                            else build(arch))
        monkeypatch.setattr(checkpoint, "load_weights",
                            lambda of, *rest: of if isinstance(of, net) else load(of, *rest))
    return put


@pytest.fixture
def finds(detector, monkeypatch):
    """finds({(height, width): [(box, score)]}): what the detector finds in images of a size."""
    def put(found):
        detector(Fixed)
        monkeypatch.setattr(Fixed, "found", found)
        monkeypatch.setattr(Fixed, "seen", [])
    return put


def segmenter(path="seg.pt", *, classes=1, planes=True, bands=(7, 6, 5), seed=0, scale=65535.0, resize=False,
              **changes):
    """A checkpoint of a segmenter whose pixels are about half positive. -> the net"""
    torch.manual_seed(seed + classes)
    kwargs = dict(in_chans=len(bands) * (1 + planes), classes=classes, conv0=[8], decoder=[8, 8, 8, 8])
    net = UNet(**kwargs).eval()
    image = tile(0, 96, 128)[0][[band - 1 for band in bands]] / 65535
    with torch.no_grad():
        z = logits(net, image.astype(np.float32), planes)
        middle, spread = z.mean((1, 2)), z.std() / 3
        net.head.bias.sub_(middle).div_(spread)
        net.head.weight.div_(spread)
    checkpoint.save(path, {
        "task": "seg", "arch": {"name": "unet.UNet", "kwargs": kwargs}, "classes": classes, "args": {"data": "nowhere"},
        "input": {"bands": list(bands), "pixel_scale": scale, "imgsz": 32, "mean_planes": planes, "resize": resize},
        "model": net.state_dict(), "ema": None} | changes)
    return net


def logits(net, x, planes):
    """The net's answer to an image (C, H, W), filled up by reflection, with mean planes: numpy."""
    height, width = x.shape[1:]
    if planes:
        x = np.concatenate((x, [np.full((height, width), band[band > 0].mean() if (band > 0).any() else 0)
                                for band in x]), dtype=np.float32)
    x = np.pad(x, ((0, 0), (0, -height % net.stride), (0, -width % net.stride)), "reflect")
    with torch.no_grad():
        return net(torch.from_numpy(x)[None])[0, :, :height, :width]


def crop(box, height, width):
    """The box with a margin of a tenth at each side, outwards to whole pixels, within the image: rows, columns."""
    x1, y1, x2, y2 = box
    across, down = (x2 - x1) / 10, (y2 - y1) / 10
    return (slice(max(math.floor(y1 - down), 0), min(math.ceil(y2 + down), height)),
            slice(max(math.floor(x1 - across), 0), min(math.ceil(x2 + across), width)))


def by_hand(net, file, found, *, planes=True, bands=(7, 6, 5), least=2.0, scale=65535):
    """-> the mask, the pseudo labels, and which pixels no rounding can turn; found: [(box, score)]."""
    with rasterio.open(file) as source:
        image = source.read(list(bands)).astype(np.float32) / np.float32(scale)
    shape = image.shape[1:]
    mask, pseudo, certain = np.zeros(shape, int), np.full(shape, 255), np.ones(shape, bool)
    for box, _ in sorted(found, key=lambda item: -item[1]):  # the surest first: what it says stays
        place = crop(box, *shape)
        z = logits(net, image[(slice(None), *place)], planes)
        p = (torch.cat((-z, z)) if len(z) == 1 else z).double()
        p = (p.sigmoid() if len(z) == 1 else p.softmax(0)).numpy()
        said, own = p.argmax(0), p.max(0)
        sure = np.where(own < least, 255, said) if least <= 1 else said
        mask[place] = np.where(mask[place] > 0, mask[place], said)
        pseudo[place] = np.where(pseudo[place] < 255, pseudo[place], sure)
        certain[place] &= (np.diff(np.sort(p, 0)[-2:], axis=0)[0] > 1e-4) & (np.abs(own - least) > 1e-4)
    return mask, np.where((pseudo != mask) & (mask > 0), 255, pseudo), certain  # the parts disagree


def pixels(path):
    with rasterio.open(path) as file:
        return file.read(1)


def inside(found, height, width):
    there = np.zeros((height, width), bool)
    for box, _ in found:
        there[crop(box, height, width)] = True
    return there


APART = [((20.3, 10.7, 50.9, 40.2), 0.9), ((70.4, 0, 128, 33.3), 0.5), ((2.6, 60.1, 13.4, 90.8), 0.7),
         ((60.2, 55.5, 101.7, 92.4), 0.3)]
OVERLAPPING = [((10.3, 10.7, 70.9, 60.2), 0.5), ((40.4, 30.6, 100.2, 80.7), 0.9), ((30.3, 20.4, 60.8, 90.6), 0.7)]


# ---- boxes -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("found", [APART, OVERLAPPING], ids=["apart", "overlapping"])
@pytest.mark.parametrize("classes, planes", [(1, True), (4, False)])
def test_a_crop_is_segmented_alone(script, finds, found, classes, planes):
    """The margin goes beyond the image at two sides; mean planes are those of the crop; the surest box wins."""
    finds({(96, 128): found})
    net = segmenter(classes=classes, planes=planes)
    test_predict_det.weights("det.pt", imgsz=SIDE)
    file = write_tif("a.tif", tile(3, 96, 128)[0])
    least = 0.8 if classes == 1 else 0.5
    script(predict, *FLAGS, "--source", file, "--pseudo", least, "--tile", 128, "--iou", 1)
    want, labels, certain = by_hand(net, file, found, planes=planes, least=least)
    mask, pseudo = masks_of("out")["a.tif"], pixels("out/pseudo/train_mask/a.tif")
    assert certain.mean() > 0.98 and (mask == want)[certain].all() and (pseudo == labels)[certain].all()
    outside = ~inside(found, 96, 128)
    assert not mask[outside].any() and (pseudo[outside] == 255).all() and 0.3 < outside.mean() < 0.8
    assert set(np.unique(mask)) == set(range(max(classes, 2))) and 0.05 < (pseudo[~outside] == 255).mean() < 1
    assert found is OVERLAPPING or (pseudo == mask)[pseudo < 255].all()
    assert (pixels("out/masks/a.tif") == mask).all()
    if found is OVERLAPPING:  # another order is another mask
        turned = by_hand(net, file, [(box, -score) for box, score in found], planes=planes)[0]
        assert classes == 1 or (turned != want).mean() > 0.02
    whole = by_hand(net, file, [((0, 0, 128, 96), 1)], planes=planes)[0]
    assert ((whole != want) & ~outside).mean() > 0.005  # of the whole image the segmenter says something else


def test_no_boxes_are_empty_masks(script, finds):
    finds({})
    segmenter(classes=3)
    test_predict_det.weights("det.pt", imgsz=SIDE)
    write_tif("a.tif", tile(3, 96, 128)[0])
    Image.fromarray(np.full((40, 30, 3), 99, np.uint8)).save("b.png")
    segmenter(classes=3, bands=(3, 2, 1))
    script(predict, *FLAGS, "--source", "a.tif", "b.png", "--pseudo", 0.9, "--polygons")
    assert {name: (mask.shape, mask.dtype, mask.max()) for name, mask in masks_of("out").items()} == {
        "a.tif": ((96, 128), np.uint8, 0), "b.png": ((40, 30), np.uint8, 0)}
    for name, shape in (("a", (96, 128)), ("b", (40, 30))):
        for folder, value in (("masks", 0), ("pseudo/train_mask", 255)):
            assert pixels(f"out/{folder}/{name}.tif").tolist() == np.full(shape, value).tolist()
        assert json.loads(Path(f"out/polygons/{name}.geojson").read_text())["features"] == []
        assert Image.open(f"out/overlays/{name}.png").size == shape[::-1]


TINY_BOXES = [((10, 10, 11, 11), 0.9), ((0, 0, 1, 1), 0.8), ((20.3, 10.3, 20.6, 10.6), 0.7), ((30, 20, 32, 23), 0.6),
              ((127, 50, 128, 51), 0.5), ((50.5, 95.1, 52.5, 96), 0.45), ((60.4, 0, 60.8, 96), 0.4)]


def test_crops_of_a_few_pixels(script, finds):
    finds({(96, 128): TINY_BOXES})
    net = segmenter()
    test_predict_det.weights("det.pt", imgsz=SIDE)
    file = write_tif("a.tif", tile(3, 96, 128)[0])
    sizes = [tuple(part.stop - part.start for part in crop(box, 96, 128)) for box, _ in TINY_BOXES]
    assert sizes == [(3, 3), (2, 2), (1, 1), (5, 4), (3, 2), (1, 3), (96, 1)]
    script(predict, *FLAGS, "--source", file, "--pseudo", 0.6, "--tile", 128)
    want, labels, certain = by_hand(net, file, TINY_BOXES, least=0.6)
    mask = masks_of("out")["a.tif"]
    assert (mask == want)[certain].all() and (pixels("out/pseudo/train_mask/a.tif") == labels)[certain].all()
    assert 0 < mask.sum() < inside(TINY_BOXES, 96, 128).sum()


@pytest.mark.parametrize("height, width", [(5, 7), (1, 1), (3, 40)])
def test_images_smaller_than_a_stride(script, finds, height, width):
    found = [((0.2 * width, 0.1 * height, 0.75 * width, 0.8 * height), 0.9)]
    finds({(height, width): found})
    net = segmenter()
    test_predict_det.weights("det.pt", imgsz=SIDE)
    file = write_tif("a.tif", tile(3, 8 * height, 8 * width)[0][:, :height, :width])
    script(predict, *FLAGS, "--source", file)
    want, _, certain = by_hand(net, file, found)
    assert (masks_of("out")["a.tif"] == want)[certain].all() and len(Fixed.seen) == 1


# ---- windows, whole images, views, ensembles -------------------------------------------------------------------------
def crops_as_files(file, found, height, width):
    """Every crop as an image of its own: crops/0.tif, ..., the surest first."""
    Path("crops").mkdir()
    with rasterio.open(file) as source:
        image = source.read()
    for i, (box, _) in enumerate(sorted(found, key=lambda item: -item[1])):
        write_tif(f"crops/{i}.tif", image[(slice(None), *crop(box, height, width))])


def joined(folder, found, height, width):
    """The masks of `crops_as_files`, each in its place."""
    whole, masks = np.zeros((height, width), int), masks_of(folder)
    for i, (box, _) in enumerate(sorted(found, key=lambda item: -item[1])):
        place = crop(box, height, width)
        whole[place] = np.where(whole[place] > 0, whole[place], masks[f"{i}.tif"])
    return whole


@pytest.mark.parametrize("kind", ["windows", "resize", "views", "ensemble"])
def test_a_crop_is_as_an_image_of_its_own(script, finds, kind):
    """Windows of a crop larger than --tile; a crop at the size of a --resize training; views; checkpoints of two band
    lists and thresholds: all as predict.py does them for a file that holds the crop."""
    finds({(96, 128): OVERLAPPING})
    changes = dict(resize=True) if kind == "resize" else {}
    segmenter(**changes), test_predict_det.weights("det.pt", imgsz=SIDE)
    segmenter("more.pt", bands=(2, 4, 9), planes=False, seed=9, threshold=0.3)
    file = write_tif("a.tif", tile(3, 96, 128)[0])
    crops_as_files(file, OVERLAPPING, 96, 128)
    flags = {"windows": ["--tile", 32, "--overlap", 0.5, "--bs", 3], "resize": [], "ensemble": ["--tile", 128],
             "views": ["--tile", 128, "--tta", "rot90", "scale", "--tta-scales", 1, 2, "--merge", "gmean"]}[kind]
    paths = ["seg.pt", *["more.pt"] * (kind == "ensemble")]
    script(predict, *FLAGS, "--weights", *paths, "--source", file, *flags)
    assert len(Fixed.seen) == {"windows": 1 + 12, "views": 4}.get(kind, 1)  # of the detector
    script(predict, *CPU, "--weights", *paths, "--source", "crops", "--out", "alone", "--tile", 128, *flags)
    want = joined("alone", OVERLAPPING, 96, 128)
    mask = masks_of("out")["a.tif"]
    assert (mask == want).mean() > 0.999 and 0.05 < mask.mean() < 0.6
    segmenter()
    script(predict, *CPU, "--weights", "seg.pt", "--source", "crops", "--out", "plain", "--tile", 128)
    assert (joined("plain", OVERLAPPING, 96, 128) != want).mean() > 0.005


# ---- files -----------------------------------------------------------------------------------------------------------
def test_parts_that_disagree(tmp_path):
    """What one part takes for an object and the next one surely not is an object in the mask, and no label."""
    file = write_tif(tmp_path / "a.tif", np.zeros((4, 8), np.uint8))
    yes, no = np.ones((4, 4), np.uint8), np.zeros((4, 4), np.uint8)
    pieces = [(0, x, mask, mask) for x, mask in ((0, yes), (2, no))]
    pieces += [(0, x, yes[:, :1] * 2, yes[:, :1] * 255) for x in (7, 0)]  # of another class, and not sure of it
    MaskWriter(tmp_path, pseudo=True).write_parts(file, pieces)
    for folder, row in {"masks": [2, 1, 1, 1, 0, 0, 0, 2],
                        "pseudo/train_mask": [255, 1, 255, 255, 0, 0, 255, 255]}.items():
        with rasterio.open(tmp_path / folder / "a.tif") as written:
            assert (written.read(1) == row).all()


def test_masks_stay_on_their_place(script, finds):
    finds({(96, 128): APART})
    segmenter()
    test_predict_det.weights("det.pt", imgsz=SIDE)
    place = from_origin(512_345, 5_123_456, 10, 20)
    file = write_tif("a.tif", tile(3, 96, 128)[0], crs="EPSG:32633", transform=place)
    script(predict, *FLAGS, "--source", file, "--pseudo", 0.7, "--polygons")
    for folder in ("masks", "pseudo/train_mask"):
        with rasterio.open(f"out/{folder}/a.tif") as written:
            assert written.crs.to_epsg() == 32633 and written.transform == place and written.shape == (96, 128)
    assert Path("out/pseudo/train_img/a.tif").resolve() == file.resolve()
    collection = json.loads(Path("out/polygons/a.geojson").read_text())
    shapes = [(feature["geometry"], feature["properties"]["class"]) for feature in collection["features"]]
    drawn, mask = rasterize(shapes, (96, 128), transform=place), masks_of("out")["a.tif"]
    assert (drawn == mask).all() and mask.any() and "32633" in json.dumps(collection["crs"])
    assert Image.open("out/overlays/a.png").size == (128, 96)


def test_scenes_and_tiles_of_several_sizes(script, tmp_path, finds):
    """Each file has its own boxes, whether it is larger than --tile or not; with one process to load them, and two to
    predict."""
    sizes = {"a": (96, 128), "b": (40, 128), "c": (128, 50), "d": (30, 30), "e": (264, 180)}
    found = {sizes["a"]: APART, sizes["b"]: [((30.4, 5.3, 80.6, 30.8), 0.6)], sizes["d"]: [((3.3, 4.4, 19.9, 30), 0.4)],
             sizes["e"]: [((20.4, 30.3, 170.7, 230.6), 0.9), ((0, 190.3, 60.7, 264), 0.8)]}
    finds(found)
    net = segmenter()
    test_predict_det.weights("det.pt", imgsz=SIDE)
    Path("in").mkdir()
    for i, (name, size) in enumerate(sizes.items()):
        write_tif(f"in/{name}.tif", tile(i, *size)[0])
    flags = [*FLAGS, "--source", "in"]
    script(predict, *flags, "--workers", 1, "--pseudo", 0.7)
    masks = masks_of("out")
    assert list(masks) == [f"{name}.tif" for name in sizes]
    for name, size in sizes.items():
        mask, boxes_there = masks[f"{name}.tif"], found.get(size, [])
        assert mask.shape == size and not mask[~inside(boxes_there, *size)].any() and mask.any() == bool(boxes_there)
        if name in "bd":  # no crop is larger than two of the training's sides: 64
            want, _, certain = by_hand(net, f"in/{name}.tif", boxes_there)
            assert (mask == want)[certain].all()
    written = ranks(predict, *flags, "--out", "two", "--pseudo", 0.7, cwd=tmp_path)
    assert all((mask == masks[name]).all() for name, mask in masks_of("two").items()) and not written[1]
    for name in sizes:
        assert (pixels(f"two/pseudo/train_mask/{name}.tif") == pixels(f"out/pseudo/train_mask/{name}.tif")).all()


def test_rectangles_are_found_and_cut_out(script, detector):
    """A detector that looks, in pictures of several kinds beside each other: bright squares within coloured ones."""
    detector(test_predict_det.Finder)
    net = segmenter(bands=(2, 1, 3), scale=255.0)
    test_predict_det.weights("det.pt", imgsz=SIDE)
    Path("in").mkdir()
    truths, names = {}, ["a.tif", "b.png", "c.tif"]
    for i, name in enumerate(names):
        picture, truth = test_predict_det.scene(i, 96, 128)
        truths[name] = [(box, test_predict_det.Finder.scores[k]) for k, box in truth.items()]
        bands = picture.transpose(2, 0, 1)
        if name.endswith("tif"):
            write_tif(f"in/{name}", bands if i else bands.astype(np.uint16))
        else:
            Image.fromarray(picture).save(f"in/{name}")
    script(predict, *FLAGS, "--source", "in", "--tta", "hflip", "--no-overlays")
    script(predict, *FLAGS[:-1], "plain", "--source", "in", "--bs", 2)
    for name, found in truths.items():
        want, _, certain = by_hand(net, f"in/{name}", found, bands=(2, 1, 3), scale=255)
        assert (masks_of("plain")[name] == want)[certain].all() and want.any()
        assert not masks_of("out")[name][~inside(found, 96, 128)].any()
    assert not Path("out/overlays").exists() and len(list(Path("plain/overlays").iterdir())) == 3


# ---- flags -----------------------------------------------------------------------------------------------------------
def test_the_lowest_score_of_a_box(script, finds, monkeypatch):
    """0.25 for boxes to be cut out, 0.01 for a detector's own results."""
    scores = [0.9, 0.26, 0.24, 0.011]
    found = [(box, score) for (box, _), score in zip(APART, scores)]
    finds({(96, 128): found})
    segmenter()
    test_predict_det.weights("det.pt", imgsz=SIDE)
    write_tif("a.tif", tile(3, 96, 128)[0])
    cut, find = [], predict.find_parts
    monkeypatch.setattr(predict, "find_parts", lambda *args: cut.append(find(*args)) or cut[-1])
    places = [crop(box, 96, 128) for box, _ in found]
    places = [(y.start, x.start, y.stop - y.start, x.stop - x.start) for y, x in places]
    for flags, count in (([], 2), (["--conf", 0.5], 1), (["--conf", 0.01], 4), (["--max-det", 1], 1)):
        script(predict, *FLAGS, "--source", "a.tif", *flags)
        assert list(cut.pop().values()) == [places[:count][::-1]] and not cut  # the surest last
    script(predict, *CPU, "--task", "det", "--weights", "det.pt", "--source", "a.tif", "--out", "boxes")
    assert len(json.loads(Path("boxes/coco.json").read_text())) == 4
    script(predict, *FLAGS, "--source", "a.tif", "--imgsz", 64)  # of the detector, whose rows are for SIDE
    assert Fixed.seen[-1].shape[2:] == (64, 96)


def test_detectors_that_cannot_be_used(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    segmenter()
    segmenter("other.pt", bands=(2, 1, 3), planes=False)
    test_predict_det.weights("det.pt", bands=[1, 2, 12])
    test_bad_input_cls.weights("cls.pt")
    Path("text.pt").write_text("no checkpoint")
    write_tif("a.tif", tile(3, 40, 40)[0])
    flags = [*CPU, "--weights", "seg.pt", "--source", "a.tif", "--out", "out", "--detector"]
    for name, says in (("seg.pt", ["seg.pt: trained for --task seg;", "train_det.py"]),
                       ("cls.pt", ["cls.pt: trained for --task cls;", "train_det.py"]), ("none.pt", ["none.pt"]),
                       ("text.pt", ["text.pt"]), ("runs", ["runs"]),
                       ("det.pt", ["a.tif: has 10 bands", "band 12 is asked for"])):
        refused(predict, *flags, name, says=says)
    refused(predict, *flags, says=["--detector", "--help"])
    refused(predict, *CPU, "--weights", "det.pt", "--source", "a.tif", "--out", "out", "--detector", "det.pt",
            says="det.pt: trained for --task det")
    broken = torch.load("det.pt", weights_only=True)
    torch.save({k: v for k, v in broken.items() if k != "classes"}, "old.pt")
    refused(predict, *flags, "old.pt", says="old.pt")
    assert not [name for name in os.listdir() if name.startswith(("out", "predict"))]
