"""data/samples/parking.py: layout, boxes against drawn pixels, class frequencies."""
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
    assert max(of_scene) <= 20 and 8 < np.mean([n for n in of_scene if n]) < 14
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
class Plain:
    """A random generator that draws a scene without noise and with one light."""
    def __init__(self, *seed):
        self.rng = _rng(*seed)

    def __getattr__(self, name):
        return getattr(self.rng, name)

    def normal(self, mean, deviation, shape=None):
        return self.rng.normal(mean, deviation) if shape is None else np.full(shape, mean if shape == 3 else 0.0)


@pytest.mark.parametrize("seed", range(6))
def test_boxes_fit_the_pixels(seed):
    """What is no ground lies in the boxes, and reaches all four sides of each."""
    size = (360, 640)
    image, found = lots.scene(Plain(seed), size, first=NAMES[2 * seed])
    empty, _ = lots.scene(Plain(seed), size)
    lit, dark = (np.asarray(picture, float) / np.median(np.asarray(picture)) for picture in (image, empty))
    differs = (abs(lit - dark) > .1).any(-1)
    assert len(found) > 3
    for _, (x1, y1, x2, y2) in found:
        inside = differs[y1:y2, x1:x2]
        assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
        differs[y1:y2, x1:x2] = False
    assert not differs.any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("degrees", [0, 90, 30])
def test_an_object_has_the_size_of_its_class(name, degrees):
    _, colours, length, width, *_ = lots.CLASSES[name]
    image = lots.draw(_rng(0), name, 100, degrees)
    left, top, right, bottom = image.getbbox()
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    assert right - left == pytest.approx(100 * (length * cos + width * sin), abs=4)
    assert bottom - top == pytest.approx(100 * (length * sin + width * cos), abs=4)
    opacity = np.asarray(image.getchannel("A"))
    assert set(np.unique(opacity)) <= {0, 255} and (opacity > 0).sum() == pytest.approx(1e4 * length * width, rel=.09)


def test_most_cars_stand_in_bays():
    upright = []
    for i in range(60):
        _, found = lots.scene(_rng(11, i), (720, 1280), first="sedan")
        upright += [abs((x2 - x1) / (y2 - y1) - 1.8 / 4.5) < .1 for category, (x1, y1, x2, y2) in found
                    if category == 1 and 2 < x1 and 2 < y1 and x2 < 1278 and y2 < 718]
    assert .75 < np.mean(upright) < .95


def test_nothing_overlaps_and_the_first_class_occurs():
    for i in range(5):
        _, found = lots.scene(_rng(12, i), (360, 640), first="taxi")
        assert 7 in [category for category, _ in found] and 3 <= len(found) <= 20
        boxes = np.array([box for _, box in found])
        for k, (x1, y1, x2, y2) in enumerate(boxes):
            for a1, b1, a2, b2 in boxes[:k]:
                assert x2 <= a1 or a2 <= x1 or y2 <= b1 or b2 <= y1


def test_sizes_and_colours_at_full_size():
    sizes = []
    for i in range(3):
        image, found = lots.scene(_rng(11, i), (720, 1280), first="school bus")
        assert image.size == (1280, 720)
        pixels = np.asarray(image, float)
        x1, y1, x2, y2 = np.array(dict(found)[5]).astype(int)
        bus, lot = pixels[y1:y2, x1:x2].mean((0, 1)), pixels.mean((0, 1))
        assert bus[0] - bus[2] > lot[0] - lot[2] + 20, "a school bus is yellow"
        boxes = np.array([box for _, box in found])
        sizes += np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]).tolist()
    assert min(sizes) < 50 and max(sizes) < 480 and max(sizes) / min(sizes) > 6


def test_classes_differ():
    """No two classes look the same, and objects of one class are seen in several colours."""
    assert len({str(look) for _, *look in lots.CLASSES.values()}) == 14
    assert len({lots.draw(_rng(i), "sedan", 20, 0).getpixel((2, 2)) for i in range(40)}) == 5


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
