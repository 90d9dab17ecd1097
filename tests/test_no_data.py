"""Pixels without data, orientation, place on Earth and units: what files declare is obeyed, from reading to results."""
import io
import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.rpc import RPC
from rasterio.transform import from_origin

import predict
import train_seg
from data import det, images, seg, units
from data.augment import mix
from data.results import masks
from tests.conftest import TINY, write_tif, write_wildfire
from utils.errors import UserError
from utils.ops import decide

HOLE = np.zeros((6, 8), bool)
HOLE[:, :3] = True


def scene(path, kind):
    """A file of three bands, 50 everywhere, in which HOLE is declared to hold no data, in one of the usual ways."""
    value = {"nodata": 0, "negative": -9999, "nan": np.nan, "lowest": np.finfo(np.float32).min}.get(kind, 7)
    dtype = {"negative": "int16", "nan": "float32", "lowest": "float32"}.get(kind, "uint8")
    array = np.where(HOLE, value, 50).astype(dtype) * np.ones((3, 1, 1), dtype)
    if kind in ("png", "webp"):
        Image.fromarray(np.dstack([*array, np.where(HOLE, 0, 255).astype(np.uint8)])).save(path, kind, lossless=True)
    elif kind == "inside":
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
            with rasterio.open(path, "w", driver="GTiff", count=3, height=6, width=8, dtype=dtype) as file:
                file.write(array)
                file.write_mask(~HOLE)
    elif kind == "beside":
        write_tif(path, array)
        write_tif(f"{path}.msk", np.where(HOLE, 0, 255).astype(np.uint8))
    elif kind == "alpha":
        with rasterio.open(path, "w", driver="GTiff", count=4, height=6, width=8, dtype=dtype) as file:
            file.write(np.concatenate((array, np.where(HOLE, 0, 255).astype(np.uint8)[None])))
            file.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
    elif kind == "aux":
        write_tif(path, array)
        bands = "".join(f'<PAMRasterBand band="{i}"><NoDataValue>7</NoDataValue></PAMRasterBand>' for i in (1, 2, 3))
        with open(f"{path}.aux.xml", "w") as file:
            file.write(f"<PAMDataset>{bands}</PAMDataset>")
    else:
        write_tif(path, array, **({} if kind == "nan" else {"nodata": float(value)}))
    return path


@pytest.mark.parametrize("kind", ["nodata", "negative", "nan", "lowest", "inside", "beside", "alpha", "aux", "png", "webp"])
def test_no_data_is_nan_however_it_is_declared(tmp_path, kind):
    path = scene(tmp_path / "a.tif", kind)
    bands = images.default_bands([path])
    assert bands == [1, 2, 3] and images.header(path).gaps
    for options, hole in (({}, HOLE), ({"window": (1, 2, 4, 5)}, HOLE[1:5, 2:7]), ({"shape": (3, 4)}, HOLE[1::2, 1::2])):
        image = images.read_picture(path, bands, **options)
        assert (image.isnan().numpy() == hole).all() and (image.numpy()[:, ~hole] == 50).all(), options
        assert (images.void(image).numpy() == hole).all()
    assert images.read_picture(path, bands, window=(0, 3, 6, 5)).dtype != torch.float64


def test_a_mask_beside_does_not_open_what_it_points_to(tmp_path):
    secret = write_tif(tmp_path / "secret.tif", np.zeros((4, 4), np.uint8))
    path = write_tif(tmp_path / "a.tif", np.ones((4, 4), np.uint8))
    (tmp_path / "a.tif.msk").write_text(
        '<VRTDataset rasterXSize="4" rasterYSize="4"><Metadata><MDI key="INTERNAL_MASK_FLAGS_1">2</MDI></Metadata>'
        f'<VRTRasterBand dataType="Byte" band="1"><SimpleSource><SourceFilename>{secret}</SourceFilename></SimpleSource>'
        '</VRTRasterBand></VRTDataset>')
    with rasterio.open(path) as file:  # without our guard it does
        assert not file.read_masks(1).any()
    with pytest.raises(UserError, match="a.tif.msk: not a .tif"):
        images.read(path)


def test_bands_have_no_data_each_for_itself(tmp_path):
    array = np.arange(24).reshape(2, 3, 4).astype(np.float32)
    path = write_tif(tmp_path / "a.tif", array, nodata=13)
    image = images.read(path)
    assert image.isnan().sum() == 1 and images.void(image) is None and images.void(images.read(path, [2])).sum() == 1


def test_a_transparent_colour_is_no_value_of_a_band(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 3, (6, 8, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", transparency=(1, 1, 1))
    assert (images.read(tmp_path / "a.png").numpy() == pixels.transpose(2, 0, 1)).all()


def test_opacity_that_is_asked_for_is_a_band(tmp_path):
    image = images.read(scene(tmp_path / "a.tif", "alpha"), [1, 4])
    assert image.dtype == torch.uint8 and (image[1].numpy() == np.where(HOLE, 0, 255)).all()


@pytest.mark.parametrize("merge", ["mean", "gmean", "max", "sum"])
@pytest.mark.parametrize("classes", [1, 3])
def test_predictions_without_data_are_background(merge, classes):
    probs = torch.rand(2, classes, 6, 8)
    probs = probs / probs.sum(1, keepdim=True) if classes > 1 else probs + (merge == "sum")
    empty = torch.from_numpy(HOLE).expand(2, -1, -1)
    found = decide.masks(decide.background(probs, empty), 0.3)
    assert not found[empty].any() and torch.equal(found[~empty], decide.masks(probs, 0.3)[~empty])


def test_pixels_without_data_count_nowhere(tmp_path):
    pair = scene(tmp_path / "a.tif", "nodata"), write_tif(tmp_path / "m.tif", np.ones((6, 8), np.uint8))
    data = seg.SegData([pair], bands=[1, 2, 3], imgsz=4)
    assert (data[0]["mask"].numpy() == np.where(HOLE, seg.IGNORE, 1)).all()
    for epoch in range(20):
        sample = data[epoch, 0]
        assert torch.equal(sample["mask"] == seg.IGNORE, sample["image"].isnan().all(0))
    x = seg.Input([1, 2, 3], 100.0, 4)(data[0]["image"][None])
    assert (x[0, :3].numpy()[:, HOLE] == 0).all() and (x[0, 3:] == 0.5).all()  # the mean plane: of the valid pixels
    assert seg.hold_data([pair[0]] * 3, [None, (0, 0, 6, 3), (0, 0, 6, 4)], [1, 2, 3]) == [True, False, True]


@pytest.mark.parametrize("empty, nodata", [(0, 0), (-9999, -9999), (np.nan, None)])
def test_predictions_are_empty_where_there_is_no_data(script, tmp_path, empty, nodata):
    """At a threshold of 0 all other pixels are an object, in images and in windows of images, and in what is made of
    them."""
    root = write_wildfire(tmp_path / "W", train=4, test=1)
    for path in [*(root / "train_img").iterdir(), *(root / "test_img").iterdir()]:
        image = images.read(path).float().numpy()
        image[:, :, :20] = empty
        write_tif(path, image, nodata=nodata)
    script(train_seg, "--data", root, *TINY, "--pixel-scale", "standard")
    predict_all = ["--task", "seg", "--device", "cpu", "--workers", 0, "--threshold", 0, "--tta", "--pseudo", 0.5]
    script(predict, *predict_all, "--polygons", "--out", "whole")
    script(predict, *predict_all, "--tile", 32, "--out", "windows")
    for out in ("whole", "windows"):
        with rasterio.open(f"{out}/masks/test_img_0.tif") as file:
            assert not file.read(1)[:, :20].any() and file.read(1)[:, 20:].all()
    outlines = json.loads(Path("whole/polygons/test_img_0.geojson").read_text())["features"]
    xs = np.array(outlines[0]["geometry"]["coordinates"][0])[:, 0]
    assert len(outlines) == 1 and (xs.min(), xs.max()) == (300_000 + 20 * 30, 300_000 + 64 * 30)


def test_mixup_takes_the_image_that_holds_data():
    a, b = torch.full((1, 1, 2), 4.0), torch.tensor([[[8.0, torch.nan]]])
    mixed, _, lam = mix.mixup(torch.stack((a, b)), per_image=False)
    share = float(lam)
    torch.testing.assert_close(mixed[:, 0, 0], torch.tensor([[4 * share + 8 * (1 - share), 4.0],
                                                             [8 * share + 4 * (1 - share), 4.0]]))


@pytest.mark.parametrize("dtype, values, nodata, ignore, expected", [
    ("int16", [-1, 0, 1], None, -1, [255, 0, 1]), ("int16", [-9999, 0, 1], -9999, None, [255, 0, 1]),
    ("float32", [np.nan, 0, 1], None, None, [255, 0, 1]), ("uint8", [9, 0, 1], 9, None, [255, 0, 1]),
    ("uint8", [0, 1, 1], 0, None, [0, 1, 1])])  # a class, whatever the file says
def test_masks_obey_their_own_no_data(tmp_path, dtype, values, nodata, ignore, expected):
    path = write_tif(tmp_path / "m.tif", np.array([values], dtype), nodata=nodata)
    assert seg.read_mask(path, 1, ignore).tolist() == [expected]


def test_a_class_that_is_declared_as_no_data_is_told(tmp_path, capsys):
    pair = write_tif(tmp_path / "i.tif", np.ones((4, 4), np.uint8)), write_tif(
        tmp_path / "m.tif", np.eye(4, dtype=np.uint8), nodata=0)
    for folder, path in zip(("train_img", "train_mask"), pair):
        (tmp_path / folder).mkdir()
        path.rename(tmp_path / folder / "a.tif")
    assert seg.read(tmp_path).areas == [4]
    assert "a.tif: declares 0 as no data, which is a class" in capsys.readouterr().out


def test_detections_without_data_are_dropped(tmp_path):
    path = scene(tmp_path / "a.tif", "nodata")
    found = [det.in_void(path, [1, 2, 3], box) for box in ([0, 0, 2, 6], [0, 0, 5, 6], [0, 0, 7, 6], [4, 1, 8, 5])]
    assert found == [True, True, False, False]


# ---- orientation and pages -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_in_every_format(tmp_path, suffix, orientation):
    stored = np.kron(np.arange(1, 7, dtype=np.uint8).reshape(2, 3) * 40, np.ones((16, 16), np.uint8))
    tags = Image.Exif()
    tags[0x0112] = orientation
    picture = Image.fromarray(stored if suffix == "tif" else np.dstack([stored] * 3))
    path = tmp_path / f"a.{suffix}"
    picture.save(path, **({"tiffinfo": {274: orientation}} if suffix == "tif" else {"exif": tags}),
                 **({"lossless": True} if suffix == "webp" else {"quality": 100} if suffix == "jpg" else {}))
    turn = {2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 5: lambda a: a.T,
            6: lambda a: np.rot90(a, -1), 7: lambda a: a.T[::-1, ::-1], 8: np.rot90}.get(orientation, lambda a: a)
    wanted = turn(stored)
    assert images.size(path)[1:] == wanted.shape
    assert np.abs(images.read(path).numpy()[0].astype(int) - wanted).max() <= 3
    assert np.abs(images.read(path, window=(2, 4, 9, 7)).numpy()[0].astype(int) - wanted[2:11, 4:11]).max() <= 3


def test_pages_are_refused(tmp_path):
    pages = [Image.new("L", (8, 8), k * 50) for k in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "a.gif", save_all=True, append_images=pages[1:])
    for name in ("a.tif", "a.gif"):
        with pytest.raises(UserError, match=f"{name}: has 3 (pages|frames); save them"):
            images.read(tmp_path / name)


@pytest.mark.parametrize("suffix, mode", [*(("bmp", mode) for mode in ("1", "L", "P", "RGB")),
                                          *(("gif", mode) for mode in ("1", "L", "P"))])  # GIF has palettes only
def test_formats_of_pillow(tmp_path, suffix, mode):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 3, (5, 7, 3), np.uint8) * 100).convert(mode)
    picture.save(tmp_path / f"a.{suffix}")
    wanted = np.asarray(Image.open(tmp_path / f"a.{suffix}").convert("RGB")).transpose(2, 0, 1)
    assert (images.read_picture(tmp_path / f"a.{suffix}", [1, 2, 3]).numpy() == wanted).all()


def test_a_jpeg_that_lacks_only_its_end_marker_is_read(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    for options in ({}, {"progressive": True}, {"quality": 30}):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", **options)
        (tmp_path / "whole.jpg").write_bytes(file.getvalue())
        (tmp_path / "cut.jpg").write_bytes(file.getvalue()[:-2])
        assert torch.equal(images.read(tmp_path / "cut.jpg"), images.read(tmp_path / "whole.jpg"))
        for missing in (12, 60, 400):
            (tmp_path / f"short{missing}.jpg").write_bytes(file.getvalue()[:-missing])
            with pytest.raises(UserError, match="truncated or damaged"):
                images.read(tmp_path / f"short{missing}.jpg")


# ---- place on Earth --------------------------------------------------------------------------------------------------
def written_mask(tmp_path, file, polygons=False):
    writer = masks.MaskWriter(tmp_path / "out", polygons=polygons)
    writer.write(file, [(0, 0, np.pad(np.ones((2, 3), np.uint8), ((1, 3), (2, 3))))])
    outlines = tmp_path / f"out/polygons/{file.stem}.geojson"
    return rasterio.open(tmp_path / f"out/masks/{file.stem}.tif"), polygons and json.loads(outlines.read_text())


def test_a_file_without_a_place_gives_none(tmp_path):
    Image.fromarray(np.zeros((6, 8), np.uint8)).save(tmp_path / "a.tif")
    mask, found = written_mask(tmp_path, tmp_path / "a.tif", polygons=True)
    assert mask.transform.is_identity and mask.crs is None and found["crs"] is None


def test_world_files_and_rpcs_are_kept(tmp_path):
    Image.fromarray(np.zeros((6, 8), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "a.pgw").write_text("2\n0\n0\n-2\n101\n199\n")
    assert written_mask(tmp_path, tmp_path / "a.png")[0].transform == from_origin(100, 200, 2, 2)
    rpcs = RPC(10.0, 5.0, 47.0, 0.1, [1.0] * 20, [2.0] * 20, 300.0, 30.0, 8.0, 0.1, [3.0] * 20, [4.0] * 20, 400.0, 40.0)
    with rasterio.open(tmp_path / "b.tif", "w", driver="GTiff", count=1, height=6, width=8, dtype="uint8") as file:
        file.rpcs = rpcs
    mask = written_mask(tmp_path, tmp_path / "b.tif")[0]
    assert rpcs.to_gdal().items() <= mask.rpcs.to_gdal().items() and mask.transform.is_identity


def test_polygons_use_ground_control_points(tmp_path):
    points = [GroundControlPoint(row, col, 10 + col * 0.5, 50 - row * 0.5) for row in (0, 6) for col in (0, 8)]
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", count=1, height=6, width=8, dtype="uint8", gcps=points,
                       crs="EPSG:4326") as file:
        file.write(np.zeros((1, 6, 8), np.uint8))
    mask, found = written_mask(tmp_path, tmp_path / "a.tif", polygons=True)
    x, y = np.array(found["features"][0]["geometry"]["coordinates"][0]).T
    assert (x.min(), x.max(), y.min(), y.max()) == pytest.approx((11, 12.5, 48.5, 49.5))
    assert "4326" in found["crs"]["properties"]["name"] and len(mask.gcps[0]) == 4


@pytest.mark.parametrize("south_up", [False, True])
def test_outer_rings_run_counter_clockwise(tmp_path, south_up):
    transform = from_origin(0, 100, 1, 1) if not south_up else rasterio.Affine(1, 0, 0, 0, 1, 94)
    path = write_tif(tmp_path / "a.tif", np.zeros((6, 8), np.uint8), transform=transform)
    values = np.ones((6, 8), np.uint8)
    values[2:4, 3:5] = 0  # a hole, whose ring runs clockwise
    writer = masks.MaskWriter(tmp_path / "out", polygons=True)
    writer.write(path, [(0, 0, values)])
    rings = json.loads((tmp_path / "out/polygons/a.geojson").read_text())["features"][0]["geometry"]["coordinates"]
    areas = [sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in zip(ring, ring[1:])) / 2 for ring in rings]
    assert areas == [48, -4]


@pytest.mark.parametrize("change, words", [
    (dict(transform=from_origin(300_960, 4_000_000, 30, 30)), "lies up to 32 pixels beside"),
    (dict(transform=rasterio.Affine(30, 0, 300_000, 0, 30, 3_999_820)), "lies up to 6 pixels beside"),
    (dict(crs="EPSG:32633"), "another coordinate system"),
    (dict(transform=from_origin(300_014, 4_000_000, 30, 30)), None), (dict(crs=None, transform=None), None)])
def test_masks_lie_where_their_images_lie(tmp_path, change, words):
    image = write_tif(tmp_path / "i.tif", np.ones((6, 8), np.uint8))
    mask = write_tif(tmp_path / "m.tif", np.ones((6, 8), np.uint8), **change)
    if words is None:
        seg.check_mask(image, mask)
    else:
        with pytest.raises(UserError, match=f"m.tif: .*{words}.*i.tif; "):
            seg.check_mask(image, mask)


# ---- units -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def stack(tmp_path):
    """Four files with bands of reflectance, of height in metres and of decibels, with holes of -9999."""
    rng, files = np.random.default_rng(0), []
    for k in range(4):
        array = np.stack((rng.uniform(0.15, 0.32, (9, 9)), rng.uniform(100, 2500, (9, 9)), rng.uniform(-25, -5, (9, 9))))
        array[:, :k] = -9999
        files.append(write_tif(tmp_path / f"{k}.tif", array.astype(np.float32), nodata=-9999))
    return files


def test_standard_scales_valid_pixels(stack, capsys):
    inputs = seg.Input([1, 2, 3], imgsz=9, mean_planes=False, **units.choose(stack, [1, 2, 3], "standard"))
    values = torch.cat([images.read(file).flatten(1) for file in stack], 1)
    valid = values[:, ~values.isnan().any(0)].double()
    assert inputs.pixel_mean == pytest.approx(valid.mean(1).tolist(), rel=1e-6)
    assert inputs.pixel_scale == pytest.approx(valid.std(1, correction=0).tolist(), rel=1e-6)
    x = torch.stack([inputs(images.read(file)[None])[0] for file in stack]).transpose(0, 1).flatten(1)
    kept = x[:, (x != 0).any(0)]
    torch.testing.assert_close(kept.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(kept.std(1, correction=0), torch.ones(3), atol=1e-5, rtol=0)
    assert "warning" not in capsys.readouterr().out


def test_bands_of_other_magnitudes_are_told(stack, capsys):
    units.choose(stack, [1, 2, 3], None)
    assert "give --pixel-scale standard, or one number per band" in capsys.readouterr().out
    scaled = units.choose(stack, [1, 2, 3], [0.3, 2500.0, 25.0])
    assert "warning" not in capsys.readouterr().out and scaled["pixel_scale"] == [0.3, 2500.0, 25.0]
    with pytest.raises(UserError, match="2 numbers for the 3 bands"):
        units.choose(stack, [1, 2, 3], [0.3, 2500.0])


@pytest.mark.parametrize("scale", [[2.0, 4.0], 2.0])
def test_each_band_has_its_scale(scale):
    x = torch.rand(2, 2, 4, 4)
    wanted = torch.stack((x[:, 0] / 2, x[:, 1] / (4 if scale == [2.0, 4.0] else 2)), 1)
    torch.testing.assert_close(seg.Input([1, 2], scale, 4, mean_planes=False)(x), wanted)
    colour = torch.tensor([[1.0, 0.5], [0.0, 1.0]]).expand(2, 2, 2)
    mixed = det.Input([1, 2], scale, 4)(x, colour=colour)
    torch.testing.assert_close(mixed, torch.stack((wanted[:, 0] + wanted[:, 1] / 2, wanted[:, 1]), 1).clamp(0, 1))


@pytest.mark.parametrize("dtype, factor, said", [
    ("uint16", 1, ""), ("int16", 1, "has int16 pixels up to 9999, and the training had uint16 up to 9999"),
    ("uint16", 1 / 5000, "has uint16 pixels up to 2, and the training had uint16 up to 9999"),
    ("float32", 1 / 10000, None)])
def test_files_in_other_units_are_told(tmp_path, capsys, dtype, factor, said):
    array = np.linspace(0, 9999, 64).reshape(8, 8)
    trained = write_tif(tmp_path / "a.tif", array.astype(np.uint16))
    inputs = seg.Input([1], imgsz=8, **units.choose([trained], [1], None))
    capsys.readouterr()
    file = write_tif(tmp_path / "b.tif", (array * factor + 0.4).astype(dtype))
    if said is None:
        with pytest.raises(UserError, match="b.tif: has float32 pixels up to 1.3999, .* uint16 up to 9999; convert"):
            units.check([file], inputs)
    else:
        units.check([file], inputs)
        shown = capsys.readouterr().out
        assert f"b.tif: {said}" in shown if said else not shown
