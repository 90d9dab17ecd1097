"""predict.py for segmentation: batches of anything, scenes in pieces, several processes, and what it leaves alone."""
import json
import os
import resource
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.features import rasterize
from rasterio.transform import Affine, from_origin

import predict
import train_seg
from data import images, seg
from data.results.masks import MaskWriter
from tests.conftest import TINY, digest, tile, write_tif, write_wildfire
from tests.test_scripts_seg import masks_of
from utils.train import checkpoint
from utils.errors import NumericalError

CPU = ["--task", "seg", "--device", "cpu", "--workers", 0]


@pytest.fixture(scope="session")
def colour_model(tmp_path_factory):
    """best.pt of a net that learned from three bands of 8 bits, without mean planes; and four epochs."""
    folder = tmp_path_factory.mktemp("colour")
    root = write_wildfire(folder / "Wildfire", train=6, test=1)
    for path in (root / "train_img").iterdir():
        write_tif(path, (images.read(path, [5, 6, 7]).numpy() >> 8).astype(np.uint8))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["train_seg.py", "--data", str(root), *TINY, "--bands", "all", "--no-mean-planes",
                                   "--epochs", "8", "--repeat", "3", "--lr", "3e-3", "--schedule", "cosine"])
        train_seg.main()
    return folder / "runs/seg/exp/best.pt"


def colour(seed, height=64, width=64):
    """-> uint8 (3, H, W), mask; as the net above has learned."""
    image, mask = tile(seed, height, width)
    return (image[4:7] >> 8).astype(np.uint8), mask


def test_a_batch_may_mix_dtypes_band_counts_and_kinds_of_files(script, tmp_path, colour_model, capsys):
    image, mask = colour(3)
    (tmp_path / "in").mkdir()
    write_tif(tmp_path / "in/a.tif", image)
    write_tif(tmp_path / "in/b.tif", image.astype(np.float32))
    write_tif(tmp_path / "in/c.tiff", np.concatenate((image, image)).astype(np.uint16))
    Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "in/d.png")
    Image.fromarray(np.concatenate((image, image[:1])).transpose(1, 2, 0)).save(tmp_path / "in/e.PNG")
    Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "in/f.jpg", quality=95, subsampling=0)
    script(predict, *CPU, "--weights", colour_model, "--source", "in", "--out", "out", "--bs", 8, "--amp", "off")
    assert "in/c.tiff: has uint16 pixels up to" in capsys.readouterr().out
    masks = masks_of("out")
    assert sorted(masks) == ["a.tif", "b.tif", "c.tiff", "d.png", "e.PNG", "f.jpg"]
    assert 0 < masks["a.tif"].sum() < 64 * 64 / 2
    for name in "b.tif", "c.tiff", "d.png", "e.PNG":
        assert (masks[name] == masks["a.tif"]).all(), name
    assert (masks["f.jpg"] == masks["a.tif"]).mean() > 0.95


def test_a_turned_jpeg_is_predicted_upright(script, tmp_path, colour_model):
    image, _ = colour(3, 48, 64)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "up.jpg", quality=98, subsampling=0)
    Image.fromarray(np.rot90(image.transpose(1, 2, 0)).copy()).save(tmp_path / "turned.jpg", quality=98, subsampling=0,
                                                                    exif=exif)
    script(predict, *CPU, "--weights", colour_model, "--source", "up.jpg", "turned.jpg", "--out", "out", "--tile", 32)
    masks = masks_of("out")
    assert masks["up.jpg"].shape == masks["turned.jpg"].shape == (48, 64)
    assert (masks["up.jpg"] == masks["turned.jpg"]).mean() > 0.95
    assert Image.open("out/overlays/turned.png").size == (64, 48)


@pytest.mark.parametrize("kind", ["tif", "png"])
def test_a_scene_in_windows_is_nearly_the_whole(script, tmp_path, colour_model, kind):
    image, mask = colour(1, 150, 190)
    if kind == "tif":
        write_tif(tmp_path / "scene.tif", image)
    else:
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "scene.png")
    flags = [*CPU, "--weights", colour_model, "--source", f"scene.{kind}", "--amp", "off", "--no-overlays"]
    script(predict, *flags, "--tile", 190, "--out", "whole")
    script(predict, *flags, "--tile", 64, "--overlap", 0.5, "--bs", 3, "--out", "windows")
    whole, windows = masks_of("whole")[f"scene.{kind}"], masks_of("windows")[f"scene.{kind}"]
    assert (whole & mask).sum() / (whole | mask).sum() > 0.3
    assert (whole != windows).mean() < 0.05  # other surroundings, and other mean planes
    assert not Path("whole/overlays").exists()


def pieces(file, size, bands, net, **windows):
    """What predict_seg has written of an image of `size` (height, width), of masks alone."""
    for y, x, probs in seg.predict_windows(file, (0, 0, *size), bands, net, **windows):
        yield y, x, (probs[0] > 0.5).numpy().astype(np.uint8)


def test_windows_are_put_where_they_belong(tmp_path):
    """With a net that looks at single pixels only, the scene comes back exactly, whatever the windows."""
    scene = np.random.default_rng(0).integers(0, 2, (1, 101, 333)).astype(np.uint8)
    file = write_tif(tmp_path / "a.tif", scene)
    for size, overlap, batch in ((16, 0.0, 7), (64, 0.25, 2), (100, 0.9, 5), (32, 0.5, 1)):
        MaskWriter(tmp_path).write(file, pieces(file, (101, 333), [1], lambda raw: raw.float() * 0.9, tile=size,
                                                overlap=overlap, bs=batch))
        with rasterio.open(tmp_path / "masks/a.tif") as written:
            assert (written.read(1) == scene[0]).all()


def test_a_threshold_is_a_probability(script, tmp_path, colour_model):
    write_tif(tmp_path / "a.tif", colour(2)[0])
    areas = []
    for threshold in (0, 0.2, 0.5, 0.9, 1):
        script(predict, *CPU, "--weights", colour_model, "--source", "a.tif", "--out", "out", "--threshold", threshold)
        areas.append(int(masks_of(sorted(Path().glob("out*"), key=os.path.getmtime)[-1])["a.tif"].sum()))
    assert areas == sorted(areas, reverse=True) and areas[0] == 64 * 64 and areas[-1] == 0 and areas[1] > areas[3]


def test_polygons_of_several_classes_in_a_turned_system(tmp_path):
    mask = np.zeros((40, 60), np.uint8)
    mask[5:20, 5:20], mask[8:12, 8:12], mask[12:16, 12:16], mask[15:35, 30:55] = 1, 0, 2, 3  # a hole, and a corner
    place = from_origin(500_000, 5_000_000, 10, 20) @ Affine.rotation(30)
    ours = ('PROJCS["a plane of ours",GEOGCS["WGS 84",DATUM["WGS_1984",SPHEROID["WGS 84",6378137,298.257223563]],'
            'PRIMEM["Greenwich",0],UNIT["degree",0.0174532925199433]],PROJECTION["Transverse_Mercator"],'
            'PARAMETER["central_meridian",7],PARAMETER["scale_factor",0.9],UNIT["metre",1]]')
    for crs in ("EPSG:32633", ours, None):
        source = write_tif(tmp_path / "a.tif", mask, crs=crs, transform=place)
        MaskWriter(tmp_path, polygons=True).write(source, [(0, 0, mask)])
        collection = json.loads((tmp_path / "polygons/a.geojson").read_text())
        drawn = rasterize([(f["geometry"], f["properties"]["class"]) for f in collection["features"]], mask.shape,
                          transform=place)
        assert (drawn == mask).all() and {f["properties"]["class"] for f in collection["features"]} == {1, 2, 3}
        with rasterio.open(source) as file, rasterio.open(tmp_path / "masks/a.tif") as written:
            assert written.crs == file.crs and written.transform.almost_equals(place)
            assert (collection["crs"] is not None) == bool(crs)
            if crs:
                assert rasterio.crs.CRS.from_user_input(collection["crs"]["properties"]["name"]) == file.crs


def test_sources_are_files_folders_and_globs(script, tmp_path, colour_model):
    for folder in ("x", "x/y", "z[1]"):
        (tmp_path / folder).mkdir()
    for i, name in enumerate(("x/b.tif", "x/a.tif", "x/y/c.tif", "z[1]/d e.tif")):
        write_tif(tmp_path / name, colour(i, 16, 16)[0])
    script(predict, *CPU, "--weights", colour_model, "--source", "x", "x/a.tif", "x/*/c.tif", "z[1]", "--out", "out")
    assert list(masks_of("out")) == ["a.tif", "b.tif", "c.tif", "d e.tif"]


def test_results_never_go_into_a_folder_that_exists(script, tmp_path, colour_model, monkeypatch):
    write_tif(tmp_path / "a.tif", colour(0, 16, 16)[0])
    (tmp_path / "in").mkdir()
    flags = [*CPU, "--weights", colour_model, "--source", tmp_path / "a.tif"]
    for out, made in (("new", "new"), ("new", "new2"), ("in", "in2"), ("deep/er", "deep/er")):
        script(predict, *flags, "--out", out)
        assert list(masks_of(tmp_path / made)) == ["a.tif"]
    monkeypatch.chdir(tmp_path / "in")
    monkeypatch.setattr("sys.argv", ["predict.py", *map(str, flags), "--out", "."])
    predict.main()
    assert list(masks_of(tmp_path / "in3")) == ["a.tif"] and not list((tmp_path / "in").iterdir())


def test_nothing_of_the_users_is_changed(script, tmp_path):
    """From data to results, with every cache and picture: what was there stays as it was."""
    root = write_wildfire(tmp_path / "Wildfire", train=4, test=2, size=(40, 40))
    before = digest(root)
    script(train_seg, *TINY, "--cache", "disk", "--workers", 1)
    script(predict, *CPU, "--tta", "--polygons", "--tile", 32)
    assert digest(root) == before
    assert {p.name for p in tmp_path.iterdir()} == {"Wildfire", "runs"}
    assert {p.name for p in Path("runs").iterdir()} == {"seg", "cache", "summary.csv", ".summary.lock"}


def test_the_memory_does_not_grow_with_the_scene(tmp_path):
    """In a fork, whose peak begins where this process stands: a scene of nine times the pixels."""
    block = np.random.default_rng(0).integers(0, 9000, (4, 300, 300)).astype(np.uint16)
    for side in (1200, 3600):
        write_tif(tmp_path / f"{side}.tif", np.tile(block, (1, side // 300, side // 300)), tiled=True)
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            peaks = []
            for side in (1200, 3600):
                file, writer = tmp_path / f"{side}.tif", MaskWriter(tmp_path, overlays=[1, 2, 3, 4], polygons=True)
                writer.write(file, pieces(
                    file, (side, side), [1, 2, 3, 4], lambda raw: (raw[:, :1].float() > 8995).float(), tile=256,
                    overlap=0.25, bs=4))
                writer.finish([file])
                peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
            (tmp_path / "peaks").write_text(json.dumps(peaks))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    small, large = json.loads((tmp_path / "peaks").read_text())
    print(large - small)
    assert large - small < 60, (small, large)  # MiB; the scene has 99, 198 in float32


@pytest.mark.slow
def test_two_processes_predict_what_one_does(script, tmp_path, colour_model):
    (tmp_path / "in").mkdir()
    for i, (height, width) in enumerate([(64, 64), (64, 64), (30, 50), (64, 64), (100, 70)]):
        write_tif(tmp_path / f"in/{i}.tif", colour(i, height, width)[0])
    flags = [*CPU, "--weights", colour_model, "--source", "in", "--tile", 64, "--amp", "off"]
    script(predict, *flags, "--out", "one")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", predict.__file__,
         *map(str, flags), "--out", "two"], capture_output=True, text=True, timeout=100,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    one, two = masks_of("one"), masks_of("two")
    assert list(one) == list(two) and all((one[name] == two[name]).all() for name in one)
    assert sorted(p.name for p in Path("two/overlays").iterdir()) == [f"{i}.png" for i in range(5)]
    assert done.stdout.count("5 images: two") == 1


@pytest.mark.slow
def test_the_script_as_a_process_of_its_own(tmp_path, colour_model):
    """The true exit code and the one line, without any help of this process."""
    (tmp_path / "cut.tif").write_bytes(write_tif(tmp_path / "whole.tif", colour(0)[0]).read_bytes()[:-3000])
    done = subprocess.run([sys.executable, predict.__file__, *map(str, CPU), "--weights", str(colour_model), "--source",
                           "cut.tif", "--out", "out"], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    lines = [line for line in done.stderr.splitlines() if "img/s" not in line and line.strip()]
    assert done.returncode == 2 and lines == ["error: cut.tif: truncated or damaged; replace or remove it"], done.stderr


@pytest.mark.slow
def test_compiled_prediction_is_the_same(script, tmp_path, colour_model):
    for i in range(5):
        write_tif(tmp_path / f"{i}.tif", colour(i)[0])
    flags = [*CPU, "--weights", colour_model, "--source", "*.tif", "--bs", 2, "--amp", "off"]
    script(predict, *flags, "--out", "plain")
    script(predict, *flags, "--compile", "--out", "compiled")
    plain, compiled = masks_of("plain"), masks_of("compiled")
    assert all((plain[name] != compiled[name]).mean() < 0.001 for name in plain)


@pytest.mark.slow
def test_compiled_training(script, wildfire):
    script(train_seg, "--data", wildfire, *TINY, "--compile", "--repeat", 2)
    assert np.isfinite(checkpoint.load("runs/seg/exp/last.pt")["history"][-1]["loss"])


def test_what_overflows_is_no_empty_mask(script, tmp_path, colour_model):
    """Numbers above 65504 are infinite in fp16, and what follows is no number: not a mask without objects."""
    write_tif(tmp_path / "a.tif", colour(3)[0])
    state = checkpoint.load(colour_model)
    state["input"]["pixel_scale"] = 255e-6
    checkpoint.save("net.pt", state)
    flags = [*CPU, "--weights", "net.pt", "--source", "a.tif"]
    with pytest.raises(NumericalError, match="not finite; predict with --amp off"):
        script(predict, *flags, "--out", "half", "--amp", "fp16")
    script(predict, *flags, "--out", "whole", "--amp", "off")
    assert "a.tif" in masks_of("whole")


def test_ground_control_points_stay(script, tmp_path, colour_model):
    """Radar scenes come without a transform: points tell where they are."""
    image, _ = colour(3)
    points = [GroundControlPoint(row, col, 10 + col / 64, 50 - row / 64) for row, col in ((0, 0), (0, 64), (64, 0))]
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", count=3, height=64, width=64, dtype="uint8",
                       gcps=points, crs="EPSG:4326") as file:
        file.write(image)
    script(predict, *CPU, "--weights", colour_model, "--source", "a.tif", "--out", "out")
    with rasterio.open("out/masks/a.tif") as mask:
        found, crs = mask.gcps
    found, points = ([(p.row, p.col, p.x, p.y) for p in each] for each in (found, points))
    assert found == points and crs == "EPSG:4326"


def test_the_pickle_is_written_mask_by_mask(tmp_path, monkeypatch):
    (tmp_path / "masks").mkdir()
    masks = [np.random.default_rng(k).integers(0, 2, (200, 300), np.uint8) for k in range(40)]
    files = [write_tif(tmp_path / "masks" / f"{k:02}.tif", mask) for k, mask in enumerate(masks)]
    writer = MaskWriter(tmp_path)
    tracemalloc.start()
    writer.finish(files, failed=files[:1])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    found = masks_of(tmp_path)
    assert list(found) == [file.name for file in files] and not found.pop("00.tif").any()
    assert all(np.array_equal(a, b) and a.dtype == np.uint8 for a, b in zip(found.values(), masks[1:]))
    assert peak < 10 * masks[0].nbytes


def test_the_pickle_holds_what_memory_does(tmp_path, capsys, monkeypatch):
    """Large scenes are left out; of more small ones than memory may hold there is none. Sizes are as the headers say.
    """
    (tmp_path / "masks").mkdir()
    files = [write_tif(tmp_path / "masks" / f"{name}.tif", np.full((4, 5), k, np.uint8)) for k, name in enumerate("ab")]
    sizes = {files[0]: (1, 4, 5), files[1]: (1, 9000, 9000)}
    monkeypatch.setattr(images, "size", lambda file: sizes[file])
    MaskWriter(tmp_path).finish(files)
    assert [*masks_of(tmp_path)] == ["a.tif"] and "1 scenes are too large" in capsys.readouterr().out
    (tmp_path / "y_pred.pkl").unlink()
    sizes = dict.fromkeys(files, (1, 8192, 8192))
    monkeypatch.setattr("data.results.masks.MAX_PICKLED", (2**26, 2**27 - 1))
    MaskWriter(tmp_path).finish(files)
    assert not (tmp_path / "y_pred.pkl").exists() and "no y_pred.pkl" in capsys.readouterr().out
