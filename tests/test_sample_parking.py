"""data/samples/parking.py: layout, boxes against drawn pixels, occlusion against ray casting, class frequencies."""
import json
import os
from collections import Counter

import numpy as np
import pytest
from PIL import Image

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


def _grey(lot):
    return Image.new("RGB", lot.size[::-1], (90, 90, 90))


def _painted(things, lot):
    """-> the picture (H, W, 3) in subpixels, and what paint says of the things."""
    image = _grey(lot)
    marks = lots.paint(image, things, lot)
    return np.asarray(image), marks


def _silhouette(things, k, lot):
    """Subpixels (H, W) that show thing k: those that differ when it is painted in another colour."""
    flat = [[*things[:k], things[k]._replace(colours=np.full_like(things[k].colours, value)), *things[k + 1:]]
            for value in (50, 250)]
    return (_painted(flat[0], lot)[0] != _painted(flat[1], lot)[0]).any(-1)


def _block(low, high, colour=(200, 0, 0)):
    """A thing that is one box."""
    corners = np.array([(x, y, z) for z in (low[2], high[2]) for x in (low[0], high[0]) for y in (low[1], high[1])])
    return lots.Thing(1, corners[None].astype(float), np.array([colour]))


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
        image, found = lots.scene(_rng(0, 0, i), SMALL, first=NAMES[i % 14])
        with Image.open(f"{root}/train/images/train_{i:04d}.jpg") as picture:
            assert abs(np.asarray(picture, float) - np.asarray(image)).mean() < 6               # JPEG
        mine = [a for a in labels["annotations"] if a["image_id"] == labels["images"][i]["id"]]
        assert [a["category_id"] for a in mine] == [category for category, _ in found]
        corners = np.array([a["bbox"] for a in mine]) @ [[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1]]
        assert np.array_equal(corners, [box for _, box in found])


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
    lot = lots.make_lot(_rng(5, i), (216, 384))
    things = lots.populate(_rng(6, i), lot, NAMES[9 + i])
    marks = _painted(things, lot)[1]
    assert len(marks) == len(things) > 3
    for k, (box, share) in enumerate(marks):
        pixels, alone = _silhouette(things, k, lot), _silhouette([things[k]], 0, lot)
        assert (box is None) == (share == 0) == (not pixels.any())
        if box is None:
            continue
        rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
        assert np.array_equal(np.array(box) * 2, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
        assert not (pixels & ~alone).any() and share == pytest.approx(pixels.sum() / alone.sum())


def test_a_thing_changes_nothing_elsewhere():
    lot = lots.make_lot(_rng(5, 0), (216, 384))
    things = lots.populate(_rng(6, 0), lot, "bus")
    whole = _painted(things, lot)[0]
    for k in range(len(things)):
        without = _painted(things[:k] + things[k + 1:], lot)[0]
        assert not ((whole != without).any(-1) & ~_silhouette(things, k, lot)).any()


def _nearest(lot, boxes):
    """Which axis-aligned box (low, high) the parallel ray through each subpixel meets first, -1 for none (H, W).

    The slab method, from the centre of each subpixel, against the direction to the camera."""
    towards = lot.camera[2] / np.linalg.norm(lot.camera[2])
    v, u = (n + .5 - side / 2 for n, side in zip(np.indices(lot.size), lot.size))
    start = 100 * towards + np.stack((u, v), -1) @ (lot.camera[:2] / (lot.camera[0] ** 2).sum())
    best, owner = np.full(lot.size, np.inf), np.full(lot.size, -1)
    for k, (low, high) in enumerate(boxes):
        with np.errstate(divide="ignore", invalid="ignore"):
            a, b = (low - start) / -towards, (high - start) / -towards
        inside = (start[..., 0] > low[0]) & (start[..., 0] < high[0])                     # x is constant along a ray
        enter, leave = np.minimum(a, b)[..., 1:].max(-1), np.maximum(a, b)[..., 1:].min(-1)
        hit = inside & (enter < leave) & (enter < best)
        best[hit], owner[hit] = enter[hit], k
    return owner


@pytest.mark.parametrize("seed", range(8))
def test_what_is_nearer_hides_what_is_farther(seed):
    rng, lot, boxes = _rng(7, seed), lots.make_lot(_rng(8, seed), SMALL), []
    while len(boxes) < 14:                                # long ones and small ones, close together but disjoint
        low = np.array([*rng.uniform((-9, -9), (7, 9)), 0.])
        high = low + (*rng.uniform(.4, (9, 2.5) if rng.random() < .5 else (2.5, 9)), rng.uniform(.5, 3))
        if not any((low < b + .05).all() and (a < high + .05).all() for a, b in boxes):
            boxes.append((low, high))
    boxes.sort(key=lambda box: box[0][1])
    owner = _nearest(lot, boxes)
    inner = np.ones(lot.size, bool)                       # without the edges, where rounding decides
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        for sign in (-1, 1):
            inner &= np.roll(owner, (sign * dy, sign * dx), (0, 1)) == owner
    assert len(np.unique(owner)) > 8 and inner.mean() > .7
    things = [_block(*box) for box in boxes]
    for k in range(len(things)):
        assert (_silhouette(things, k, lot) == (owner == k))[inner].mean() > .999


def test_camera():
    for seed in range(5):
        lot = lots.make_lot(_rng(8, seed), (720, 1280))
        scale = np.linalg.norm(lot.camera[0])
        assert np.allclose(lot.camera @ lot.camera.T, scale ** 2 * np.eye(3)), "no shear: squares stay squares"
        right, away, up = lot.camera.T
        assert right[0] == scale and right[1] == 0 and up[1] < 0 and away[1] < 0, "up and away are drawn upwards"
        assert up[2] > 0 > away[2] and 720 / 30 <= scale / lots.FINE <= 720 / 18
        assert lot.size == (720 * lots.FINE, 1280 * lots.FINE)
    image = _grey(lot)                                    # 2 m to the right, 1 m away
    lot.fill(image, np.array([(0, 0, 0), (2, 0, 0), (2, 1, 0), (0, 1, 0)]), (255, 0, 0))
    red = np.argwhere(np.asarray(image)[..., 0] == 255)
    assert np.allclose(red.min(0), (720 + away[1], 1280), atol=1.5)
    assert np.allclose(red.max(0), (720, 1280 + 2 * scale), atol=1.5)


def test_lines_and_shadows():
    lot = lots.make_lot(_rng(9), SMALL)
    ground = np.asarray(lots._ground(_rng(1), lot, []))[..., 0]
    asphalt = np.median(ground)

    def tone(x, y):
        """Of the ground (x, y) metres from a corner of a bay, moved by whole bays into the image."""
        x, y = x + lot.bay[0] - lots.SLOT, y + lot.bay[1] - lots.PERIOD
        u, v, _ = lot.camera @ (x, y, 0)
        return ground[int(v + lot.size[0] / 2), int(u + lot.size[1] / 2)]

    assert set(np.unique(ground)) == {asphalt, 205} and asphalt < 150
    for column in range(3):
        assert tone(column * 2.6 + .07, 2) == tone(column * 2.6 + .07, 8) == tone(column * 2.6 + 1, 5.2) == 205
        assert tone(column * 2.6 + 1.3, 2) == tone(column * 2.6 + 1.3, 8) == tone(column * 2.6 + .07, -1) == asphalt
    # the shadow of a flat square at a height of 2 m is that square, shifted against the sun
    low, high = np.array([-1, -1, 2.]), np.array([1, 1, 2.01])
    dark = np.argwhere(np.asarray(lots._ground(_rng(1), lot, [_block(low, high)]))[..., 0] < ground)
    ends = [(lot.camera @ (point - 2 * lot.sun))[1::-1] + np.array(lot.size) / 2 for point in (low, high)]
    assert np.allclose(dark.min(0), np.min(ends, 0), atol=5) and np.allclose(dark.max(0), np.max(ends, 0), atol=5)


def test_most_cars_stand_in_bays_and_nothing_overlaps():
    lot = lots.make_lot(_rng(10), (720, 1280))
    places = np.array([lots._place(_rng(11, i), lot, "sedan") for i in range(400)])
    off = (places[:, :2] - lot.bay) % (lots.SLOT, lots.PERIOD) - (1.3, 0)
    parked = (abs(off[:, 0]) < .5) & (abs(abs(off[:, 1] - 5.2) - 2.6) < .5) & (abs(np.cos(places[:, 2])) < .15)
    assert .8 < parked.mean() < .9
    for i in range(5):
        things = lots.populate(_rng(12, i), lot, "taxi")
        assert any(thing.category == 7 for thing in things) and 4 <= len(things) <= 15
        spans = [(t.corners.min((0, 1))[:2], t.corners.max((0, 1))[:2]) for t in things]
        assert not any((a < d).all() and (c < b).all() for k, (a, b) in enumerate(spans) for c, d in spans[:k])
        assert spans == sorted(spans, key=lambda span: span[0][1]), "the nearest first"


def test_hidden_and_cut_off():
    lot = lots.Lot(20 * np.array([(1, 0, 0), (0, -.5, -.75 ** .5), (0, -.75 ** .5, .5)]), (360, 640), np.zeros(2),
                   np.array((0, 0, 1)))                   # 30 degrees above the horizon, 20 subpixels a metre
    wall, behind, beside = (_block((x0, y0, 0), (x1, y1, z1)) for x0, x1, y0, y1, z1 in (
        (-4, 4, 0, 1, 3), (-.5, .5, 2, 2.5, 1), (3, 5, 2, 2.5, 1)))
    (_, whole), (nothing, none), (seen, part) = _painted([wall, behind, beside], lot)[1]
    assert (whole, none, nothing) == (1, 0, None) and part == pytest.approx(.5, abs=.05)
    assert np.allclose(seen[::2], (200, 210), atol=1), "what is right of the wall"
    half, share = _painted([_block((-17, 0, 0), (-15, 1, 0.1))], lot)[1][0]
    assert half[0] == 0 and share == 1, "a silhouette ends at the edge of the image"
    assert _painted([_block((-20, 0, 0), (-17, 1, 1))], lot)[1] == [(None, 0)]


def test_what_is_hidden_by_more_than_four_fifths_has_no_box(monkeypatch):
    def marks(image, things, lot):
        shares.extend((.1, .19, .21, 1.)[k % 4] for k in range(len(things)))
        return [((0, 0, 1, 1), share) for share in shares]

    shares = []
    monkeypatch.setattr(lots, "paint", marks)
    _, found = lots.scene(_rng(10), SMALL, first="van")
    assert len(found) == sum(share > .2 for share in shares) < len(shares)


def test_sizes_and_colours_at_full_size():
    sizes = []
    for i in range(3):
        image, found = lots.scene(_rng(11, i), (720, 1280), first="school bus")
        assert image.size == (1280, 720)
        pixels = np.asarray(image, float)
        x1, y1, x2, y2 = np.array(dict(found)[5]).astype(int)
        bus, lot = pixels[y1:y2, x1:x2].mean((0, 1)), pixels.mean((0, 1))
        assert bus[0] - bus[2] > lot[0] - lot[2] + 30, "a school bus is yellow"
        boxes = np.array([box for _, box in found])
        sizes += np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]).tolist()
    assert min(sizes) < 50 and max(sizes) < 480 and max(sizes) / min(sizes) > 6


@pytest.mark.parametrize("name", NAMES)
def test_things_stand_on_the_ground_and_turn(name):
    height = {"adult": (1.5, 1.9), "child": (1., 1.35), "bus": (3, 3.5), "sedan": (1.4, 1.5), "SUV": (1.7, 1.9)}
    thing = lots.make_thing(_rng(1), name, 0, 0, 0)
    assert thing.category == 1 + NAMES.index(name) and len(thing.colours) == len(thing.corners)
    (back, right, low), (front, left, high) = thing.corners.min((0, 1)), thing.corners.max((0, 1))
    assert 0 <= low < .5 and left == -right, "near the ground, and symmetric"
    assert height.get(name, (.8, 3.3))[0] <= high <= height.get(name, (.8, 3.3))[1]
    turned = lots.make_thing(_rng(1), name, 3, 4, np.pi / 2)                            # forward is now away
    assert np.allclose(turned.corners.min((0, 1)), (3 + right, 4 + back, low))
    assert np.allclose(turned.corners.max((0, 1)), (3 + left, 4 + front, high))


def test_classes_differ():
    """No two classes have the same boxes, and objects of one class are seen in several colours."""
    assert len({str(parts) for _, _, parts in lots.CLASSES.values()}) == 14
    colours = {tuple(lots.make_thing(_rng(i), "sedan", 0, 0, 0).colours[0]) for i in range(40)}
    assert len(colours) >= 5


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
