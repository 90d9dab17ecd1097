"""data/seg.py, data/cache.py and data/augment/__init__.py: pairs, masks, checks, samples and their caches."""
import os
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import images, pairs, seg
from data.cache import Cache
from tests.conftest import WILDFIRE, digest, tile, warp_points, write_tif
from utils.ops import geometry, tiles
from utils.errors import UserError


def folders(root, image_names, mask_names):
    """Two folders of empty files."""
    for folder, names in (("img", image_names), ("mask", mask_names)):
        (root / folder).mkdir()
        for name in names:
            (root / folder / name).write_text("")
    return root / "img", root / "mask"


# ---- pairs -----------------------------------------------------------------------------------------------------------
def test_pairs_by_equal_stems_or_img_for_mask(tmp_path):
    found = pairs.of_folders(*folders(tmp_path, ["train_img_2.tif", "b.png", "train_img_10.tif", "my_img.tif"],
                               ["b.tif", "train_mask_10.tif", "train_mask_2.png", "my_img.png"]))
    assert [(image.name, mask.name) for image, mask in found] == [
        ("b.png", "b.tif"), ("my_img.tif", "my_img.png"), ("train_img_10.tif", "train_mask_10.tif"),
        ("train_img_2.tif", "train_mask_2.png")]


@pytest.mark.parametrize("image_names, mask_names, named", [
    (["a.tif", "b.tif"], ["a.tif"], "img/b.tif"), (["a.tif"], ["a.tif", "c.tif"], "mask/c.tif"),
    (["a.tif"], ["b.tif"], "img/a.tif"), (["a.tif", "a.png"], ["a.tif"], "img/a.tif"),
    (["a.tif"], ["a.tif", "a.png"], "mask/a.tif")])
def test_files_without_a_partner_are_named(tmp_path, image_names, mask_names, named):
    with pytest.raises(UserError, match=f"{named}: .*;"):
        pairs.of_folders(*folders(tmp_path, image_names, mask_names))


# ---- masks -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "uint32", "float32", "float64"])
@pytest.mark.parametrize("values, classes, ignore, expected", [
    ([0, 1], 1, None, [0, 1]), ([0, 255], 1, None, [0, 1]),
    ([0, 1, 255], 1, 255, [0, 1, 255]), ([0, 1, 7], 1, 7, [0, 1, 255]), ([0, 1, 2], 3, None, [0, 1, 2]),
    ([0, 2, 255], 3, 255, [0, 2, 255]), ([0, 1], 2, None, [0, 1]), ([0, 254], 255, None, [0, 254]),
    ([0, 1, 2], 1, None, None), ([0, 3], 3, None, None), ([0, 255], 3, None, None), ([0, 254], 1, 255, None),
    ([0, 255], 1, 7, [0, 1])])
def test_mask_values(tmp_path, dtype, values, classes, ignore, expected):
    path = write_tif(tmp_path / "a.tif", np.array([values], dtype))
    if expected is None:
        with pytest.raises(UserError, match=f"a.tif: has the value {values[-1]};"):
            seg.read_mask(path, classes, ignore)
    else:
        mask = seg.read_mask(path, classes, ignore)
        assert mask.dtype == torch.uint8 and mask.tolist() == [expected]


def test_no_data_is_no_object(tmp_path):
    """GIS programs write 255 for no data; masks of 0 and 255 mean an object by it."""
    path = write_tif(tmp_path / "a.tif", np.array([[0, 1, 255]], np.uint8))
    with pytest.raises(UserError, match="a.tif: has the values 1 and 255; give --ignore 255"):
        seg.read_mask(path)
    assert seg.read_mask(write_tif(path, np.array([[0, 1, 255]], np.uint8), nodata=255)).tolist() == [[0, 1, 255]]


@pytest.mark.parametrize("value", [0.5, 0.999, 1.5, -0.25, -1, 1e30, 255.5, 256, 257])
@pytest.mark.parametrize("classes", [1, 3])
def test_masks_of_probabilities_are_no_masks(tmp_path, value, classes):
    path = write_tif(tmp_path / "a.tif", np.array([[0, 1, value]], np.float32))
    with pytest.raises(UserError, match="a.tif: has the value"):
        seg.read_mask(path, classes, None)


def test_mask_pictures(tmp_path):
    binary = np.eye(5, dtype=np.uint8)
    classes = np.arange(25, dtype=np.uint8).reshape(5, 5) % 3
    Image.fromarray(binary.astype(bool)).save(tmp_path / "bits.png")
    Image.fromarray(binary * 255).save(tmp_path / "grey.png")
    palette = Image.fromarray(classes, mode="P")
    palette.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    palette.save(tmp_path / "voc.png")  # Pillow stores two bits per pixel
    Image.fromarray(np.stack([binary * 255] * 3, -1)).save(tmp_path / "grey_as_rgb.png")
    Image.fromarray(np.stack([binary, binary, 0 * binary], -1)).save(tmp_path / "colour.png")
    assert (seg.read_mask(tmp_path / "grey_as_rgb.png").numpy() == binary).all()
    assert (seg.read_mask(tmp_path / "bits.png").numpy() == binary).all()
    assert (seg.read_mask(tmp_path / "grey.png").numpy() == binary).all()
    assert (seg.read_mask(tmp_path / "voc.png", 3).numpy() == classes).all()
    with pytest.raises(UserError, match="colour.png: has 3 bands, and a mask has one"):
        seg.read_mask(tmp_path / "colour.png")


# ---- pairs of image and mask -----------------------------------------------------------------------------------------
def test_check_mask_tells_size_and_pixels_per_class(tmp_path):
    paired = []
    for i, (h, w, bands) in enumerate([(5, 9, 2), (9, 5, 3), (1, 1, 1)]):
        mask = np.zeros((h, w), np.uint8)
        mask.flat[:i] = 1
        mask.flat[-1] = 255
        paired.append((write_tif(tmp_path / f"i{i}.tif", np.ones((bands, h, w), np.uint16)),
                       write_tif(tmp_path / f"m{i}.tif", mask)))
    assert [seg.check_mask(*pair, ignore=255) for pair in paired] == [((5, 9), [44, 0]), ((9, 5), [43, 1]),
                                                                      ((1, 1), [0, 0])]


def test_check_mask_names_both_files_of_different_size(tmp_path):
    ones = np.ones((5, 9), np.uint8)
    pair = write_tif(tmp_path / "i.tif", ones), write_tif(tmp_path / "m.tif", ones.T.copy())
    with pytest.raises(UserError) as caught:
        seg.check_mask(*pair)
    assert all(text in str(caught.value) for text in ("m.tif", "i.tif", "(9, 5)", "(5, 9)", ";"))


@pytest.mark.parametrize("dtype, empty", [
    ("float32", -9999.0), ("float32", float(np.finfo(np.float32).min)), ("float32", float("nan")), ("int16", -32768),
    ("uint16", 65535), ("uint8", 0)])
def test_declared_holes_are_nan_and_labels_stay(tmp_path, dtype, empty):
    array = np.full((2, 4, 4), 7, dtype)
    array[0, 1] = empty
    path = write_tif(tmp_path / "a.tif", array, nodata=empty)
    want = np.where(np.arange(4)[:, None] == 1, np.nan, 7).repeat(4, 1)
    found = images.read(path)
    np.testing.assert_array_equal(found[0].numpy(), want)
    assert (found[1] == 7).all() and images.void(found) is None
    assert images.read(path, [1], window=(1, 0, 1, 4)).isnan().all()
    assert (images.read(path, [2]) == 7).all() and images.read(path, [2]).dtype == torch.from_numpy(array).dtype
    mask = write_tif(tmp_path / "m.tif", np.array([[0, 1, 255, 255]], np.uint8), nodata=255)
    assert seg.read_mask(mask, ignore=255).tolist() == [[0, 1, 255, 255]]


# ---- mean planes -----------------------------------------------------------------------------------------------------
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.booleans(), st.floats(0, 1))
def test_mean_planes_are_means_over_pixels_other_than_0(seed, batched, zeros):
    rng = np.random.default_rng(seed)
    image = rng.uniform(-0.2, 1, (2, 3, 6, 5)).astype(np.float32) * (rng.random((2, 3, 6, 5)) >= zeros)
    image[0, 1] = 0
    got = seg.add_mean_planes(torch.from_numpy(image if batched else image[0])).numpy()
    for b, tile_planes in enumerate(got if batched else got[None]):
        assert tile_planes.shape == (6, 6, 5) and (tile_planes[:3] == image[b]).all()
        for band, plane in zip(image[b], tile_planes[3:]):
            values = [float(v) for v in band.ravel() if v != 0]
            np.testing.assert_allclose(plane, sum(values) / len(values) if values else 0, rtol=1e-5)


# ---- samples ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Pairs of several sizes and dtypes. The last band of each image is 1000 times its mask plus 7."""
    root, paired = tmp_path_factory.mktemp("mixed"), []
    kinds = [(64, 64, np.uint16), (40, 90, np.uint16), (20, 20, np.int16), (70, 33, np.float32)]
    for i, (h, w, dtype) in enumerate(kinds):
        image, mask = tile(i, h, w, bands=3)
        image[2] = 1000 * mask.astype(int) + 7
        image = np.minimum(image, 30_000).astype(dtype)
        paired.append((write_tif(root / f"i{i}.tif", image), write_tif(root / f"m{i}.tif", mask)))
    return paired


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


def test_evaluation_gives_whole_tiles_as_they_are(mixed):
    data = seg.SegData(mixed, **WILDFIRE.options, bands=[3, 1], imgsz=32, repeat=5)
    for i, (image, mask) in enumerate(mixed):
        sample = data[i]
        assert sample["index"] == i and sample["image"].dtype == torch.float32
        torch.testing.assert_close(sample["image"], images.read(image)[[2, 0]].float())
        assert torch.equal(sample["mask"], seg.read_mask(mask))
    assert equal(data[6], data[2])


def test_training_samples_depend_on_seed_epoch_and_index_only(mixed):
    def make(seed=0):
        return seg.SegData(mixed, **WILDFIRE.but(gain=1.0).options, imgsz=32, repeat=3, seed=seed)
    keys = [(e, i) for e in range(3) for i in range(12)]
    first, again = make(), make()
    samples = {key: first[key] for key in keys}
    torch.manual_seed(5), np.random.seed(5)
    assert all(equal(again[key], samples[key]) for key in reversed(keys))
    assert len(first) == 12
    other = make(seed=1)
    crops = {data[key]["image"].numpy().tobytes() for key in keys for data in (first, other)}
    assert len(crops) == 72  # another epoch, repetition or seed: another crop


def test_masks_stay_on_their_images(mixed):
    data = seg.SegData(mixed, **WILDFIRE.options, imgsz=32, repeat=50)
    seen = Counter()
    for index in range(200):
        sample = data[index % 3, index]
        assert sample["image"].shape == (3, 32, 32) and sample["mask"].shape == (32, 32)
        assert torch.equal(sample["image"][2], 1000.0 * sample["mask"] + 7)
        seen[sample["index"]] += int(sample["mask"].sum())
    assert min(seen[i] for i in range(4)) > 0


def test_gain_scales_bands_within_its_octaves(mixed):
    plain, bright = (seg.SegData(mixed[:1], **WILDFIRE.but(gain=gain).options, imgsz=64, seed=3)
                     for gain in (0, 2))
    octaves = []
    for epoch in range(50):
        ratio = (bright[epoch, 0]["image"] / plain[epoch, 0]["image"]).flatten(1).log2()
        assert (ratio.std(1) < 1e-4).all()  # one factor per band
        octaves.append(ratio.mean(1))
        assert torch.equal(bright[epoch, 0]["mask"], plain[epoch, 0]["mask"])
    octaves = torch.stack(octaves)
    assert octaves.abs().max() <= 2.5 and octaves.min() < -1.5 < 1.5 < octaves.max()
    assert 0.05 < octaves.std(1).mean() < 0.5  # the bands differ by less than the tiles
    assert torch.equal(bright[0]["image"], plain[0]["image"])  # not in validation


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 16, 33]))
def test_crops_lie_in_the_padded_tile_and_move_whole_pixels(seed, height, width, size):
    matrix, border = WILDFIRE.view(np.random.default_rng(seed), height, width, size)
    assert border in ("reflect", "wrap")
    corners = warp_points([[0, 0], [size, size]], np.linalg.inv(matrix))
    low, high = np.sort(np.round(corners, 6), 0)
    assert (high - low == size).all() and (low == np.rint(low)).all()
    for axis, side in enumerate((width, height)):
        pad = max(side, 2 * size) - side
        assert -(pad // 2) <= low[axis] and high[axis] <= side + pad - pad // 2


def test_crops_reach_every_place_and_all_eight_orientations():
    places, turns = set(), Counter()
    for seed in range(2000):
        matrix, border = WILDFIRE.view(np.random.default_rng(seed), 8, 8, 4)
        low = np.round(warp_points([[0, 0], [4, 4]], np.linalg.inv(matrix))).min(0)
        places.add(tuple(low.astype(int)))
        turns[tuple(np.round(matrix[:2, :2]).astype(int).ravel()), border] += 1
    assert places == {(x, y) for x in range(5) for y in range(5)}
    assert len(turns) == 16 and max(turns.values()) < 2 * min(turns.values())


# ---- caches ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("where", ["ram", "disk"])
def test_a_cache_changes_nothing(mixed, where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = digest(mixed[0][0].parent)
    options = dict(**WILDFIRE.options, bands=[3, 2], imgsz=32, repeat=2)
    plain, cached, second = (seg.SegData(mixed, cache=c, **options) for c in (None, where, where))
    monkeypatch.setattr(images, "read", None)  # the files are not needed any more
    samples = [cached[key] for key in (0, 3, (2, 5), (0, 3))]
    again = [second[key] for key in (0, 3, (2, 5), (0, 3))]
    monkeypatch.undo()
    assert all(equal(a, plain[key]) and equal(b, a) for a, b, key in zip(samples, again, (0, 3, (2, 5), (0, 3))))
    samples[0]["image"].zero_()
    assert equal(cached[0], plain[0])
    assert digest(mixed[0][0].parent) == before


def test_the_disk_cache_is_built_once(tmp_path):
    files, reads = write_numbers(tmp_path, 3), []
    for _ in range(2):
        cache = Cache(files, reader(files, reads), "disk", folder=tmp_path / "cache")
        assert [int(cache[i][0]) for i in range(3)] == [0, 1, 2]
    assert len(reads) == 3
    assert not list((tmp_path / "cache").glob("*.tmp*"))


@pytest.mark.parametrize("where", ["ram", "disk"])
def test_the_cache_is_filled_by_several_threads(tmp_path, where):
    files, together = write_numbers(tmp_path, 80), threading.Barrier(4)

    def read(i):
        if i < 8:  # one thread alone would wait in vain
            together.wait(30)
        return torch.tensor([i])
    cache = Cache(files, read, where, folder=tmp_path / "cache")
    assert [int(cache[i]) for i in range(80)] == list(range(80))


def write_numbers(folder, count):
    for i in range(count):
        (folder / f"{i}.txt").write_text(str(i))
    return [folder / f"{i}.txt" for i in range(count)]


def reader(files, log):
    """A file of one number -> that number as many times as the file has digits; what was read goes to the log."""
    def read(i):
        path = files[i]
        log.append(path)
        return torch.full((len(path.read_text()),), int(path.read_text()), dtype=torch.int16)
    return read


@pytest.mark.parametrize("change", ["content", "time", "file", "variant"])
def test_the_disk_cache_is_rebuilt_when_its_source_changes(tmp_path, change):
    files, reads = write_numbers(tmp_path, 3), []
    Cache(files, reader(files, reads), "disk", folder=tmp_path / "cache")
    if change == "content":  # another size at the old time
        old = files[1].stat()
        files[1].write_text("77")
        os.utime(files[1], ns=(old.st_atime_ns, old.st_mtime_ns))
    elif change == "time":
        files[1].write_text("8")
        os.utime(files[1], ns=(1, 1))
    elif change == "file":
        (tmp_path / "9.txt").write_text("9")
        files = [files[0], tmp_path / "9.txt", files[2]]
    variant = "x" if change == "variant" else ""
    cache = Cache(files, reader(files, reads), "disk", folder=tmp_path / "cache", variant=variant)
    assert int(cache[1][0]) == dict(content=77, time=8, file=9, variant=1)[change]
    assert [int(cache[i][0]) for i in (0, 2)] == [0, 2] and len(reads) == 6


@pytest.mark.parametrize("damage", [
    ("json", b""), ("json", b"{}"), ("json", b"[]"), ("json", b"null"), ("json", b"{\"stamp\": 1"),
    ("json", b"\xff\xfe"),
    ("json", None), ("bin", b""), ("bin", b"x"), ("bin", None), ("json", b"[" * 100_000)])
def test_a_damaged_disk_cache_is_rebuilt(tmp_path, damage):
    suffix, content = damage
    files, reads = write_numbers(tmp_path, 3), []
    Cache(files, reader(files, reads), "disk", folder=tmp_path / "cache")
    target, = (tmp_path / "cache").glob(f"*.{suffix}")
    target.write_bytes(content) if content is not None else target.unlink()
    cache = Cache(files, reader(files, reads), "disk", folder=tmp_path / "cache")
    assert [int(cache[i][0]) for i in range(3)] == [0, 1, 2] and len(reads) == 6


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file in its place")
    with pytest.raises(UserError, match="cache: cannot be written .*; make room"):
        files = write_numbers(tmp_path, 1)
        Cache(files, reader(files, []), "disk", folder=tmp_path / "cache")


def test_processes_that_start_together_build_one_cache(tmp_path):
    files, pids = write_numbers(tmp_path, 20), []

    def slow(i):
        time.sleep(0.01)
        return reader(files, [])(i)

    for first in range(3):
        pid = os.fork()
        if pid == 0:
            try:
                time.sleep(0.05 * first)
                cache = Cache(files, slow, "disk", folder=tmp_path / "cache")
                os._exit(0 if [int(cache[i][0]) for i in range(20)] == list(range(20)) else 1)
            except BaseException:
                os._exit(2)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]


def test_a_resized_sample_is_the_whole_tile_turned(tmp_path):
    """Image and mask alike, in all eight ways and no other."""
    image, mask = tile(3, 50, 80)
    paired = [(write_tif(tmp_path / "a.tif", image), write_tif(tmp_path / "m.tif", mask))]
    data = seg.SegData(paired, **WILDFIRE.options, bands=[1, 2], imgsz=32, resize=True, repeat=40)
    small = geometry.resize(torch.from_numpy(image[:2]), (32, 32))
    labels = images.nearest(torch.from_numpy(mask), (32, 32))
    ways = [(torch.rot90(x, k, (-2, -1)), torch.rot90(y, k, (-2, -1)))
            for x, y in ((small, labels), (small.flip(-1), labels.flip(-1))) for k in range(4)]
    seen = set()
    for i in range(40):
        sample = data[0, i]
        [way] = [w for w, (x, y) in enumerate(ways) if torch.equal(sample["mask"], y)
                 and torch.allclose(sample["image"], x, atol=1e-3)]
        seen.add(way)
    assert seen == set(range(8))
    assert data[0]["image"].shape == (2, 50, 80)


def test_a_crop_holds_its_point():
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width, size = (int(n) for n in rng.integers(1, 90, 3))
        point = (int(rng.integers(height)), int(rng.integers(width)))
        matrix, _ = WILDFIRE.view(rng, height, width, size, point)
        x, y = warp_points([point[1] + 0.5, point[0] + 0.5], matrix)
        assert 0 < x < size and 0 < y < size


# ---- windows ---------------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(16, 90))
def test_a_partition_has_every_pixel_once(height, width, tile):
    count, places = np.zeros((height, width), int), tiles.partition((height, width), tile)
    for y, x, h, w in places:
        count[y:y + h, x:x + w] += 1
        assert 0 < h <= tile and 0 < w <= tile
    assert (count == (1 if max(height, width) > tile else 0)).all() and len(places) in (
        0, -(-height // tile) * -(-width // tile))
    for sides in zip(*(place[2:] for place in places)):
        assert max(sides) - min(sides) <= 1


@pytest.mark.parametrize("cache", [None, "ram", "disk"])
def test_a_window_is_a_tile_of_its_own(mixed, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paired, windows = [mixed[1], mixed[0], mixed[1]], [(0, 50, 40, 40), None, (5, 0, 32, 33)]
    data = seg.SegData(paired, windows, **WILDFIRE.options, imgsz=16, repeat=2, cache=cache)
    for i, (y, x, h, w) in enumerate([windows[0], (0, 0, 64, 64), windows[2]]):
        whole, mask = images.read(paired[i][0]).float(), seg.read_mask(paired[i][1])
        assert torch.equal(data[i]["image"], whole[:, y:y + h, x:x + w])
        assert torch.equal(data[i]["mask"], mask[y:y + h, x:x + w])
        inside = set(whole[0, y:y + h, x:x + w].unique().tolist())
        for epoch in range(4):
            crop = data[epoch, i + 3]
            assert set(crop["image"][0].unique().tolist()) <= inside and crop["image"].shape == (3, 16, 16)
            assert torch.equal(crop["image"][2] > 500, crop["mask"] > 0)
    other = seg.SegData(paired, [None] * 3, imgsz=16, cache=cache)  # the cache of windows is not that of images
    assert other[0]["mask"].shape == (40, 90)
