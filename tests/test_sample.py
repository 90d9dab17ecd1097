"""data/samples/wildfire.py and the command: layout, what makes tiles easy or hard, what an interrupted run leaves."""
import os

import numpy as np
import pytest
import rasterio

from data.samples import __main__, wildfire
from utils.errors import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return wildfire.wildfire(tmp_path_factory.mktemp("sample"), train=24, test=6, seed=0)


def _read(path):
    with rasterio.open(path) as f:
        return f.read()


def _split(root, split):
    """-> images (N, 10, H, W) and masks (N, H, W)."""
    images = [_read(f"{root}/{split}_img/{p}") for p in sorted(os.listdir(f"{root}/{split}_img"))]
    masks = [_read(f"{root}/{split}_mask/{p}")[0] for p in sorted(os.listdir(f"{root}/{split}_mask"))]
    return np.stack(images), np.stack(masks)


@pytest.fixture(scope="module")
def train(root):
    return _split(root, "train")


def _best_iou(score, mask):
    """IoU of the one threshold that suits `score` best; both are flat."""
    hit = mask[np.argsort(-score)].astype(np.int64)
    return (np.cumsum(hit) / (np.cumsum(1 - hit) + hit.sum())).max()


def test_layout(root):
    assert sorted(os.listdir(root)) == ["test_img", "test_mask", "train_img", "train_mask"]
    for split, count in (("train", 24), ("test", 6)):
        for kind in ("img", "mask"):
            names = [f"{split}_{kind}_{i:04d}.tif" for i in range(count)]
            assert sorted(os.listdir(f"{root}/{split}_{kind}")) == names


def test_tiles_are_georeferenced_and_masks_lie_on_their_images(root):
    seen = set()
    for split, count in (("train", 24), ("test", 6)):
        for i in range(count):
            with rasterio.open(f"{root}/{split}_img/{split}_img_{i:04d}.tif") as image, \
                    rasterio.open(f"{root}/{split}_mask/{split}_mask_{i:04d}.tif") as mask:
                assert (image.count, image.shape, set(image.dtypes)) == (10, (256, 256), {"uint16"})
                assert (mask.count, mask.shape, mask.dtypes) == (1, (256, 256), ("uint8",))
                assert image.driver == mask.driver == "GTiff" and image.compression.name == "deflate"
                assert image.crs == mask.crs and image.crs.to_epsg() == 32652 and image.res == (30, 30)
                assert image.transform == mask.transform
                seen.add(image.bounds)
    assert len(seen) == 30
    assert all(a is b or a.right <= b.left or b.right <= a.left or a.top <= b.bottom or b.top <= a.bottom
               for a in seen for b in seen), "tiles overlap: a test pixel would be a training pixel"


def test_fire_is_rare_spread_over_sizes_and_sometimes_absent(train):
    images, masks = train
    assert set(np.unique(masks)) == {0, 1}
    part = masks.mean((1, 2))
    assert .005 < part.mean() < .05 and part.max() < .15
    assert .05 < (part == 0).mean() < .25
    assert part.max() / part[part > 0].min() > 20


def test_the_scale_differs_from_tile_to_tile(train):
    medians = np.median(train[0][:, :7], (1, 2, 3))
    assert medians.min() > 100, "a tile is black"
    assert medians.max() / medians.min() > 3
    assert (train[0][:, :7] == 65535).mean() < .01


def test_no_threshold_finds_the_fires(train):
    images, masks = (a[..., ::2, ::2] for a in train)
    bands = images.swapaxes(0, 1).reshape(10, -1).astype(np.float32) + 1
    mask = masks.ravel()
    assert max(_best_iou(band, mask) for band in bands) < .35
    assert max(_best_iou(bands[a] / bands[b], mask) for a in range(7) for b in range(7) if a != b) < .65
    # and yet they are there to be found: within a tile, two bands together set them apart
    for image, m in zip(images, masks):
        if m.sum() > 200:
            score = image[6] * (image[6] / (image[4] + 1.))
            assert score[m > 0].mean() > 2 * score[m == 0].mean()


def test_a_tile_depends_on_seed_split_and_index_alone(tmp_path):
    size = dict(train=2, size=64)
    a = wildfire.wildfire(tmp_path / "a", test=2, seed=3, **size)
    b = wildfire.wildfire(tmp_path / "b", test=1, seed=3, **size)
    c = wildfire.wildfire(tmp_path / "c", test=1, seed=4, **size)
    (xa, ya), (xb, yb), (xc, _) = (_split(r, "train") for r in (a, b, c))
    assert np.array_equal(xa, xb) and np.array_equal(ya, yb)
    assert not np.array_equal(xa, xc)
    (ta, _), (tb, _) = _split(a, "test"), _split(b, "test")
    assert np.array_equal(ta[:1], tb) and not np.array_equal(ta[0], xa[0])


@pytest.mark.parametrize("size", [65, 100])
def test_any_size(tmp_path, size):
    images, masks = _split(wildfire.wildfire(tmp_path, train=2, test=0, size=size), "train")
    assert images.shape == (2, 10, size, size) and masks.shape == (2, size, size)


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "Wildfire").mkdir()
    (tmp_path / "Wildfire" / "precious.tif").write_text("years of work")
    with pytest.raises(UserError, match="Wildfire: exists already") as error:
        wildfire.wildfire(tmp_path, train=1, test=0, size=64)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["Wildfire", "Wildfire/precious.tif"]


@pytest.mark.parametrize("wrong", [("--train", 0), ("--test", -1), ("--size", 32), ("--seed", -1), ("--train", "x")])
def test_numbers_out_of_range(refused, tmp_path, wrong):
    refused(__main__, *wrong, says=wrong[0])
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError("No space left on device")])
def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, stop):
    write, calls = wildfire._write_tif, []

    def fails_on_third(*args):
        calls.append(args)
        if len(calls) == 3:
            raise stop
        write(*args)

    monkeypatch.setattr(wildfire, "_write_tif", fails_on_third)
    with pytest.raises((KeyboardInterrupt, UserError)):
        wildfire.wildfire(tmp_path, train=2, test=1, size=64)
    assert len(calls) == 3 and not os.listdir(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written .*; make room"):
        wildfire.wildfire(tmp_path / "file", train=1, test=0, size=64)


def _command(monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["sample", *map(str, flags)])
    __main__.main()


def test_the_command(tmp_path, monkeypatch, capsys):
    new = tmp_path / "new"
    _command(monkeypatch, "--out", new, "--train", 1, "--test", 1, "--size", 64)
    assert capsys.readouterr().out.split()[-2:] == [str(new / "Wildfire"), str(new / "DATA")]
    assert len(list((new / "Wildfire").rglob("*.tif"))) == 4 and len(list((new / "DATA").rglob("*.jpg"))) == 2


@pytest.mark.parametrize("task, folder", [("wildfire", "Wildfire"), ("parking", "DATA")])
def test_the_command_writes_one_of_them(tmp_path, monkeypatch, capsys, task, folder):
    _command(monkeypatch, "--out", tmp_path, "--train", 1, "--test", 0, "--size", 64, "--only", task)
    assert capsys.readouterr().out.split()[-1] == str(tmp_path / folder) and os.listdir(tmp_path) == [folder]


def test_the_command_looks_before_it_writes(tmp_path, monkeypatch):
    (tmp_path / "DATA").touch()
    with pytest.raises(UserError, match="DATA: exists already"):
        _command(monkeypatch, "--out", tmp_path, "--train", 1, "--test", 1, "--size", 64)
    assert os.listdir(tmp_path) == ["DATA"]
    _command(monkeypatch, "--out", tmp_path, "--train", 1, "--test", 0, "--size", 64, "--only", "wildfire")
    assert sorted(os.listdir(tmp_path)) == ["DATA", "Wildfire"]
