"""data/samples/parking.py: layout, boxes against rendered pixels, occlusion against ray casting, class frequencies."""
import json
import os
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data.samples import models as models
from data.samples import parking as lots
from utils.errors import UserError

NAMES = ["sedan", "SUV", "van", "bus", "school bus", "truck", "taxi", "adult", "child", "motorcycle", "kickboard",
         "bicycle", "stroller", "cart"]
SMALL = (180, 320)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return lots.parking(tmp_path_factory.mktemp("parking"), train=48, test=3, size=SMALL, seed=0)


def _json(*path):
    with open(os.path.join(*path)) as file:
        return json.load(file)


def _rng(*seed):
    return np.random.default_rng(seed)


def _flat(thing, colour):
    """The same thing in one colour."""
    return thing._replace(parts=[[(points, colour, width) for points, _, width in part] for part in thing.parts])


def _changed(a, b):
    return (np.asarray(a) != np.asarray(b)).any(-1)


def _silhouettes(ground, things, k, view):
    """Pixels that are wholly or partly thing k: those which differ when it is painted in another colour."""
    light = lots.Light(np.ones(3), np.zeros(3), np.array((0, 0, 1.)))
    images = [lots.paint(ground, [*things[:k], _flat(things[k], c), *things[k + 1:]], view, light)[0]
              for c in ((0, 255, 0), (255, 0, 255))]
    return _changed(*images)


def _camera(size=SMALL):
    """12 m high, looking along y, 30 degrees down; the middle of the picture is at (0, 20.8)."""
    c, s = np.cos(np.pi / 6), np.sin(np.pi / 6)
    return lots.View(np.array([0, 0, 12.]), np.array([[1, 0, 0], [0, -s, -c], [0, c, -s]]), 1.78 * size[0], size)


DAY = lots.Light(np.ones(3), np.zeros(3), np.array((0, 0, 1.)))
GREY = Image.new("RGB", SMALL[::-1], (90, 90, 90))


# ---- the files -----------------------------------------------------------------------------------------------------
def test_layout(root):
    files = sorted(os.path.relpath(os.path.join(d, f), root) for d, _, names in os.walk(root) for f in names)
    images = [f"{split}/images/{split}_{i:04d}.jpg" for split, n in (("train", 48), ("test", 3)) for i in range(n)]
    assert files == sorted([*images, "train/label/Train.json", "test/label/Test.json", "Test_Images_Information.json"])
    train, test = _json(root, "train/label/Train.json"), _json(root, "test/label/Test.json")
    for split, labels, count in (("train", train, 48), ("test", test, 3)):
        assert set(labels) == {"images", "annotations", "categories"}
        assert labels["categories"] == [{"id": i + 1, "name": n} for i, n in enumerate(NAMES)]
        assert [i["file_name"] for i in labels["images"]] == [f"{split}_{i:04d}.jpg" for i in range(count)]
        ids = [i["id"] for i in labels["images"]]
        assert len(set(ids)) == count and {a["image_id"] for a in labels["annotations"]} <= set(ids)
        assert all(set(i) == {"id", "file_name"} for i in labels["images"])
        assert all(set(a) == {"image_id", "category_id", "bbox"} for a in labels["annotations"])
    assert _json(root, "Test_Images_Information.json") == {"images": test["images"]}
    for image in images:
        with Image.open(os.path.join(root, image)) as picture:
            assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", SMALL[::-1])


def test_classes_are_long_tailed_and_all_there(root):
    labels = _json(root, "train/label/Train.json")
    count = Counter(a["category_id"] for a in labels["annotations"])
    assert set(count) == set(range(1, 15)) and min(count.values()) >= 3
    assert count[1] == max(count.values()) and count[1] > 8 * count[5]
    per_image = Counter(a["image_id"] for a in labels["annotations"])
    of_scene = [per_image[image["id"]] for image in labels["images"]]
    assert [i for i, n in enumerate(of_scene) if n == 0] == [7, 19, 31, 43]
    assert max(of_scene) <= 15 and 5 < np.mean([n for n in of_scene if n]) < 12
    assert np.mean([n >= 3 for n in of_scene if n]) > .85


def test_boxes_lie_in_the_image(root):
    for annotation in _json(root, "train/label/Train.json")["annotations"]:
        x, y, w, h = annotation["bbox"]
        assert x >= 0 and y >= 0 and w >= 1 and h >= 1 and x + w <= SMALL[1] and y + h <= SMALL[0]


def test_the_files_are_the_scenes(root):
    labels = _json(root, "train/label/Train.json")
    for i in (0, 17):
        image, boxes, categories = lots.scene(_rng(0, 0, i), SMALL, first=NAMES[i % 14])
        with Image.open(f"{root}/train/images/train_{i:04d}.jpg") as picture:
            assert abs(np.asarray(picture, float) - np.asarray(image)).mean() < 6               # JPEG
        mine = [a for a in labels["annotations"] if a["image_id"] == labels["images"][i]["id"]]
        assert [a["category_id"] for a in mine] == categories.tolist()
        corners = np.array([a["bbox"] for a in mine]) @ [[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1]]
        assert np.array_equal(corners, boxes)


def test_a_scene_depends_on_seed_split_and_index_alone(tmp_path):
    def read(name, **options):
        folder = lots.parking(tmp_path / name, size=(128, 228), **options)
        return {p.relative_to(tmp_path / name / "DATA").as_posix(): p.read_bytes()
                for p in (tmp_path / name).rglob("*.jpg")}, _json(folder, "test/label/Test.json")["annotations"]

    (a, la), (b, lb), (c, _) = (read("a", train=2, test=2, seed=3), read("b", train=1, test=1, seed=3),
                                read("c", train=1, test=1, seed=4))
    assert len(a) == 4 and all(a[name] == b[name] != c[name] for name in b)
    assert a["train/images/train_0000.jpg"] != a["test/images/test_0000.jpg"]
    assert [x for x in la if x["image_id"] == 1] == lb and lb


# ---- boxes and pixels ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("i", range(3))
def test_boxes_fit_the_pixels(i):
    ground, things, view, light, _ = lots.plan(_rng(5, i), (216, 384), first=NAMES[9 + i])
    marks = lots.paint(ground, things, view, light)[1]
    assert len(marks) == len(things) > 3
    for k, (box, share) in enumerate(marks):
        pixels = _silhouettes(ground, things, k, view)
        assert (box is None) == (share == 0) == (not pixels.any())
        if box is None:
            continue
        rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
        assert np.array_equal(box * 2, np.rint(box * 2)), "half pixels"
        assert (np.floor(box[:2]) == (columns[0], rows[0])).all()
        assert (np.ceil(box[2:]) == (columns[-1] + 1, rows[-1] + 1)).all()
        alone = _silhouettes(ground, [things[k]], 0, view)
        assert not (pixels & ~alone).any()
        if 2 < columns[0] and columns[-1] < 381 and 2 < rows[0] and rows[-1] < 213:              # else: it is cut off
            assert share == pytest.approx(pixels.sum() / alone.sum(), abs=.12)


def test_a_thing_changes_nothing_elsewhere():
    ground, things, view, light, _ = lots.plan(_rng(6, 0), (216, 384), first="bus")
    whole = lots.paint(ground, things, view, light)[0]
    for k in range(len(things)):
        without = lots.paint(ground, things[:k] + things[k + 1:], view, light)[0]
        assert not (_changed(whole, without) & ~_silhouettes(ground, things, k, view)).any()


def _nearest(view, boxes, pixels):
    """Which axis-aligned box [low, high] the ray through each pixel meets first, -1 for none: the slab method."""
    x, y = (pixels[:, 0] - view.size[1] / 2) / view.focal, (pixels[:, 1] - view.size[0] / 2) / view.focal
    ray = view.axes[2] + x[:, None] * view.axes[0] + y[:, None] * view.axes[1]
    best, owner = np.full(len(pixels), np.inf), np.full(len(pixels), -1)
    for k, (low, high) in enumerate(boxes):
        with np.errstate(divide="ignore"):
            a, b = (low - view.eye) / ray, (high - view.eye) / ray
        enter, leave = np.minimum(a, b).max(1), np.maximum(a, b).min(1)
        hit = (enter < leave) & (enter < best)
        best[hit], owner[hit] = enter[hit], k
    return owner


@pytest.mark.parametrize("seed", range(8))
def test_what_is_nearer_hides_what_is_farther(seed):
    rng, view, boxes = _rng(7, seed), _camera(), []
    while len(boxes) < 14:                                # long ones and small ones, close together but disjoint
        low = np.array([*rng.uniform((-9, 14), (7, 36)), 0.])
        high = low + (*rng.uniform(.4, (9, 2.5) if rng.random() < .5 else (2.5, 9)), rng.uniform(.5, 3))
        if not any((low < b + .05).all() and (a < high + .05).all() for a, b in boxes):
            boxes.append((low, high))
    colours = rng.permutation(np.stack(np.meshgrid(*[(0, 127, 255)] * 3), -1).reshape(-1, 3))[:14]
    things = [lots.Thing(1, [models._box(a[0], b[0], (b[1] - a[1]) / 2, 0, b[2], tuple(c.tolist()), (a[1] + b[1]) / 2)],
                         np.zeros(3), 0.) for (a, b), c in zip(boxes, colours)]
    image = np.asarray(lots.paint(GREY, [_flat(t, t.parts[0][0][1]) for t in things], view, _Even())[0])
    y, x = np.mgrid[:SMALL[0], :SMALL[1]]
    owner = _nearest(view, boxes, np.stack((x.ravel() + .5, y.ravel() + .5), 1)).reshape(SMALL)
    expected = np.where(owner[..., None] >= 0, colours[owner], 90)
    inner = np.ones(SMALL, bool)                          # pixels at edges are mixtures
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        for sign in (-1, 1):
            inner &= np.roll(owner, (sign * dy, sign * dx), (0, 1)) == owner
    assert len(np.unique(owner)) > 10 and inner.mean() > .7
    assert (abs(image.astype(int) - expected).max(-1)[inner] <= 1).mean() > .999


class _Even:
    """Light that shows colours as they are."""
    def on(self, normal):
        return np.ones((*normal.shape[:-1], 3))


def test_camera_against_ground_and_scale():
    for seed in range(5):
        view = lots._view(_rng(8, seed), (720, 1280))
        assert np.allclose(view.axes @ view.axes.T, np.eye(3)) and np.isclose(np.linalg.det(view.axes), 1)
        pixels = _rng(9, seed).uniform(0, (1280, 720), (50, 2))
        ground = np.pad(view.ground(pixels), ((0, 0), (0, 1)))
        again, scale = view.project(ground)
        assert np.allclose(again, pixels) and (scale > 0).all()
        aside = view.project(ground + .5 * view.axes[0])[0] - pixels          # half a metre to the right
        assert np.allclose(aside, np.stack((.5 * scale, 0 * scale), 1))
        up = view.project(ground + (0, 0, 1))[0] - pixels
        assert (up[:, 1] < 0).all(), "what stands is drawn upwards"
        assert scale[pixels[:, 1].argmax()] > 1.8 * scale[pixels[:, 1].argmin()], "no perspective"


def test_hidden_and_cut_off():
    view, box = _camera(), lambda x, y, w, d, h: [models._box(-w / 2, w / 2, d / 2, 0, h, (200, 0, 0))]
    at = lambda x, y, *size: lots.Thing(1, box(x, y, *size), np.array([x, y, 0.]), 0.)
    wall, behind, beside = at(0, 20, 8, 1, 3), at(0, 21.5, .5, .5, 1), at(4, 21.5, 2, .5, 1)
    (_, all_), (nothing, none), (seen, part) = lots.paint(GREY, [wall, behind, beside], view, DAY)[1]
    assert (all_, none, nothing) == (1, 0, None) and .3 < part < .7
    assert view.project(np.array([4, 19.5, 0]))[0][0] - 1 < seen[0] < view.project(np.array([4, 19.5, 3]))[0][0] + 1
    left = view.ground(np.array([0., 90.]))
    half, share = lots.paint(GREY, [at(*left, 2, 2, .1)], view, DAY)[1][0]
    assert half[0] == 0 and .4 < share < .6
    assert lots.paint(GREY, [at(*(left - (5, 0)), 2, 2, 1)], view, DAY)[1] == [(None, 0)]


def test_what_is_hidden_by_more_than_four_fifths_has_no_box(monkeypatch):
    paint, shares = lots.paint, []

    def counts(*args):
        image, marks = paint(*args)
        marks = [(np.zeros(4) if box is None else box, (.1, .19, .21, 1.)[k % 4]) for k, (box, _) in enumerate(marks)]
        shares.extend(share for thing, (_, share) in zip(args[1], marks) if thing.category)
        return image, marks

    monkeypatch.setattr(lots, "paint", counts)
    _, boxes, categories = lots.scene(_rng(10), SMALL, first="van")
    assert len(boxes) == len(categories) == sum(share > .2 for share in shares) < len(shares)


def test_sizes_and_colours_at_full_size():
    sizes = []
    for i in range(3):
        image, boxes, categories = lots.scene(_rng(11, i), (720, 1280), first="school bus")
        assert image.size == (1280, 720)
        pixels = np.asarray(image, float)
        x1, y1, x2, y2 = boxes[categories.tolist().index(5)].astype(int)
        bus, lot = pixels[y1:y2, x1:x2].mean((0, 1)), pixels.mean((0, 1))
        assert bus[0] - bus[2] > lot[0] - lot[2] + 40, "a school bus is yellow"
        sizes += np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]).tolist()
    assert min(sizes) < 50 and max(sizes) < 480 and max(sizes) / min(sizes) > 6


@pytest.mark.parametrize("name, model", list(zip(NAMES, models.MODELS)))
def test_models_stand_on_the_ground_and_are_closed(name, model):
    tall = {"adult": (1.5, 1.9), "child": (1., 1.35), "bus": (3, 3.5), "sedan": (1.4, 1.5), "SUV": (1.7, 1.9)}
    for seed in range(3):
        points = lots.Thing(1, model(_rng(seed)), np.zeros(3), 0.).points()
        low, high = points.min(0), points.max(0)
        assert -.01 < low[2] < .06 and abs(low[1] + high[1]) < .1, "on its wheels, and symmetric"
        assert tall.get(name, (.8, 3.3))[0] <= high[2] <= tall.get(name, (.8, 3.3))[1]
    # seen from around, each polygon of a box shows its outside: the silhouette is that of the points' hull
    box = lots.Thing(1, [models._box(-1, 1, .5, 0, 1, (9, 9, 9))], np.array([0, 20., 0]), .7)
    pixels, _ = _camera().project(box.points())
    mark = lots.paint(GREY, [box], _camera(), DAY)[1][0][0]
    assert np.allclose(mark, (*pixels.min(0), *pixels.max(0)), atol=1)


# ---- what goes wrong -----------------------------------------------------------------------------------------------
def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "DATA").mkdir()
    (tmp_path / "DATA" / "precious.jpg").write_text("years of work")
    with pytest.raises(UserError, match="DATA: exists already") as error:
        lots.parking(tmp_path, train=1, test=0, size=SMALL)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["DATA", "DATA/precious.jpg"]


@pytest.mark.parametrize("size", [(128, 512), (512, 128), (131, 257)])
def test_any_size(tmp_path, size):
    root = lots.parking(tmp_path, train=4, test=0, size=size)
    for i in range(4):
        with Image.open(f"{root}/train/images/train_{i:04d}.jpg") as picture:
            assert picture.size == size[::-1]
    assert _json(root, "train/label/Train.json")["annotations"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, stop):
    scene, calls = lots.scene, []

    def fails_on_third(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise stop
        return scene(*args, **options)

    monkeypatch.setattr(lots, "scene", fails_on_third)
    with pytest.raises((KeyboardInterrupt, UserError)):
        lots.parking(tmp_path, train=2, test=1, size=(128, 128))
    assert len(calls) == 3 and not os.listdir(tmp_path)
