"""A bad item costs itself: images and masks that cannot be used, before training and in prediction."""
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image

import predict
import train_cls
import train_det
import train_seg
from data import bad, images, seg
from tests.conftest import TINY, TINY_CLS, TINY_DET, tile, write_dirty, write_parking, write_tif, write_wildfire
from utils.errors import UserError

TRAIN = {"seg": (train_seg, TINY), "det": (train_det, TINY_DET), "cls": (train_cls, TINY_CLS)}
WRITE = {"seg": lambda root: write_wildfire(root, train=6, test=4, size=(32, 32)),
         "det": lambda root: write_parking(root, train=6, test=4),
         "cls": lambda root: write_dirty(root, train=6, test=4)}
IMAGES = {"seg": "train_img", "det": "train/images", "cls": "dirty_mnist_2nd"}
TEST = {"seg": "test_img", "det": "test/images", "cls": "test_dirty_mnist_2nd"}
TASKS = pytest.mark.parametrize("task", TRAIN)


def cut(path):
    path.write_bytes(path.read_bytes()[:len(path.read_bytes()) * 2 // 3])
    return path


# ---- the policy ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("count, passes", [(1, True), (3, False)])
def test_one_percent(tmp_path, capsys, count, passes):
    files = [tmp_path / f"{i:03}.png" for i in range(100)]
    for file in files:
        Image.new("L", (8, 8)).save(file)
    for file in files[:count]:
        file.write_bytes(b"" if file.stem == "000" else b"text")
    options = dict(cache=tmp_path / "cache")
    if passes:
        assert bad.readable("DATA", [files, range(100)], **options) == [files[1:], list(range(1, 100))]
    else:
        with pytest.raises(UserError, match="DATA: 3 of 100 images cannot be used .1 empty, 2 not a .tif.*--allow-bad"):
            bad.readable("DATA", [files], **options)
    assert bad.readable("DATA", [files], allow_bad=True, **options) == [files[count:]]
    assert f"DATA: empty: 1 left out, first {files[0]}: empty; replace or remove it; all in" in capsys.readouterr().out
    [report] = (tmp_path / "cache").glob("*.txt")
    assert [line.split(": ")[1] for line in report.read_text().splitlines()] == list(map(str, files[:count]))


def test_what_was_found_is_kept_until_a_file_changes(tmp_path, monkeypatch):
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for file in files:
        Image.new("L", (64, 64)).save(file)
    read, real = [], images.read_picture
    monkeypatch.setattr(images, "read_picture", lambda path, *args, **more: read.append(path) or real(path, *args, **more))
    options = dict(cache=tmp_path / "cache", allow_bad=True)

    def check(*changed, left=(0, 1, 2), bands=(1,)):
        read.clear()
        assert bad.readable(tmp_path, [files], bands, **options) == [[files[i] for i in left]]
        assert sorted(read) == sorted(changed)
    check(*files)
    check()
    check(cut(files[1]), left=(0, 2))
    check(left=(0, 2))
    check(*files[:1], files[2], files[1], bands=(1, 2, 3), left=(0, 2))  # another question
    Image.new("L", (64, 64)).save(files[1])
    check(files[1])
    [file.write_bytes(b"damaged") for file in (tmp_path / "cache").glob("*.z")]
    check(*files)


def test_a_scene_is_decoded_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "STRIP", 64 * 10)
    path = write_tif(tmp_path / "a.tif", np.zeros((64, 64), np.float32))
    bad.decode(path, [1])
    with rasterio.open(path, "r+", driver="GTiff") as file:
        file.write(np.full((1, 1), np.inf, np.float32), 1, window=rasterio.windows.Window(63, 63, 1, 1))
    bad.decode(path, [1], longest=63)  # the header only
    with pytest.raises(UserError, match="a.tif: has infinite"):
        bad.decode(path, [1])


def test_masks_and_images_of_segmentation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = write_wildfire(tmp_path / "DATA", train=8, size=(32, 32))
    image, mask = tile(9, 32, 32)
    cut(root / "train_img/train_img_0.tif")
    write_tif(root / "train_img/train_img_1.tif", np.full((10, 32, 32), np.inf, np.float32))
    write_tif(root / "train_img/train_img_2.tif", image[:5])
    write_tif(root / "train_mask/train_mask_3.tif", mask[:30])
    write_tif(root / "train_mask/train_mask_4.tif", mask + 7)
    (root / "train_mask/train_mask_5.tif").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        seg.read(root, bands=[1, 7])
    for kind in ("6 of 8", "truncated or damaged", "1 has infinite pixels", "1 has 5 bands",
                 "1 has another size than its image", "1 has the value 7", "1 empty"):
        assert kind in str(caught.value)
    for _ in range(2):  # the second time of what is kept
        found = seg.read(root, bands=[1, 7], allow_bad=True)
        assert found.names == ["train_img_6", "train_img_7"] and found.sizes == [(32, 32)] * 2
        assert found.counts == [[1024 - 100, 100]] * 2 and found.areas == [100, 100]


# ---- training --------------------------------------------------------------------------------------------------------
@TASKS
def test_training_goes_on_without_a_truncated_image(command, refused, tmp_path, task):
    root = WRITE[task](tmp_path / "DATA")
    path = cut(sorted((root / IMAGES[task]).iterdir())[0])
    script, flags = TRAIN[task]
    flags = ["--data", root, *flags, "--folds", 0]
    refused(script, *flags, says=["1 of 6 images cannot be used", f"{path.name}: ", "replace or remove it", "--allow-bad"])
    done = command(script, *flags, "--allow-bad")
    assert done.code == 0 and "1 left out, first " in done.out and f"{path.name}: " in done.out, done.err
    assert ("5 images" if task != "seg" else "5 tiles") in done.out.replace("5 images with", "5 images"), done.out


def test_an_old_run_has_allowed_bad_labels(script, tmp_path, capsys):
    root = WRITE["det"](tmp_path / "DATA")
    cut(sorted((root / "train/images").iterdir())[0])
    script(train_det, "--data", root, *TINY_DET, "--allow-bad")
    path = Path("runs/det/exp/last.pt")
    from utils.train import checkpoint
    state = checkpoint.load(path)
    state["args"]["allow_bad_labels"] = state["args"].pop("allow_bad")
    checkpoint.save(path, state)
    script(train_det, "--resume", path, "--epochs", 2)


# ---- prediction ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{task: (data, best.pt of a tiny run)}"""
    folder, found = tmp_path_factory.mktemp("models"), {}
    for task, (script, flags) in TRAIN.items():
        root = WRITE[task](folder / task / "DATA")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder / task)
            patch.setattr("sys.argv", ["train.py", "--data", str(root), *flags])
            script.main()
        found[task] = root, folder / task / f"runs/{task}/exp/best.pt"
    return found


@pytest.fixture
def source(models, tmp_path):
    """source(task) -> a copy of its test images, of which the second is truncated; that file; the common flags."""
    def make(task):
        root, model = models[task]
        folder = shutil.copytree(root / TEST[task], tmp_path / "source")
        if task == "det":
            shutil.copy(root / "Test_Images_Information.json", tmp_path)
        broken = cut(sorted(folder.iterdir())[1])
        return folder, broken, ["--task", task, "--weights", model, "--source", folder, "--device", "cpu", "--workers", 0,
                                "--out", "out"]
    return make


EXTRA = [[], ["--tta"], ["--pseudo", 0.5, "--threshold", 0.5], ["--tile", 32]]


@pytest.mark.parametrize("task, extra", [(task, extra) for task in TRAIN for extra in EXTRA[:4 if task == "det" else 3]])
def test_the_others_are_predicted(command, tmp_path, source, task, extra):
    folder, broken, flags = source(task)
    extra = extra[:2] if task == "cls" or "--threshold" not in extra else extra
    done = command(predict, *flags, *extra)
    assert done.code == 4 and len(done.lines) == 1 and "1 of 4 images" in done.lines[0], done.err
    assert f"\n{broken}: " in done.out and "3 images" in done.out
    out = tmp_path / "out"
    assert (out / "failed.txt").read_text().startswith(f"{broken}: ")
    stems = [path.stem for path in sorted(folder.iterdir())]
    good = [stem for stem in stems if stem != broken.stem]
    if task == "seg":
        masks = pickle.loads((out / "y_pred.pkl").read_bytes())
        assert [path.stem for path in sorted((out / "masks").iterdir())] == good
        assert masks.keys() - {broken.name} == {f"{stem}.tif" for stem in good}
        assert broken.name not in masks or masks[broken.name].shape == (32, 32) and not masks[broken.name].any()
    elif task == "det":
        assert [path.stem for path in sorted((out / "labels").iterdir())] == stems
        assert (out / "labels" / f"{broken.stem}.txt").read_text() == ""
        assert 501 not in {item["image_id"] for item in json.loads((out / "submission.json").read_text())}
    else:
        for name in ("submission.csv", "probabilities.csv"):
            rows = [line.split(",") for line in (out / name).read_text().splitlines()[1:]]
            assert [int(row[0]) for row in rows] == [50000, 50001, 50002, 50003] and set(map(float, rows[1][1:])) == {0}
    pseudo = {path.stem for path in (out / "pseudo").rglob("*") if path.is_file()}
    assert broken.stem not in pseudo


def test_nothing_that_can_be_read(command, source):
    folder, broken, flags = source("seg")
    for path in folder.iterdir():
        path.write_bytes(b"")
    done = command(predict, *flags)
    assert done.code == 2 and len(done.lines) == 1 and "empty; replace or remove it" in done.lines[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_scene_that_breaks_off(command, tmp_path, source, workers):
    """Its header is whole: the failure is met in the middle of the scene, which leaves no mask behind."""
    folder, broken, flags = source("seg")
    image = np.tile(tile(1, 32, 32)[0], (1, 8, 8))
    for name in ("scene", "whole"):
        write_tif(folder / f"{name}.tif", image)
    scene = folder / "scene.tif"
    scene.write_bytes(scene.read_bytes()[:-300_000])
    done = command(predict, *flags, "--tile", 64, "--workers", workers)
    assert done.code == 4 and "2 of 6 images" in done.lines[-1] and f"\n{scene}: truncated" in done.out, done.err
    assert sorted(path.name for path in (tmp_path / "out/masks").iterdir() if broken.stem not in path.name) == [
        "test_img_0.tif", "test_img_2.tif", "test_img_3.tif", "whole.tif"]
    assert not pickle.loads((tmp_path / "out/y_pred.pkl").read_bytes())["scene.tif"].any()


@pytest.mark.slow
@TASKS
def test_two_ranks_agree(tmp_path, source, task):
    folder, broken, flags = source(task)
    flags = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, predict.__file__, *flags]
    done = subprocess.run(list(map(str, flags)), cwd=tmp_path, capture_output=True, text=True, timeout=200,
                          env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"})
    assert "exitcode  : 4" in done.stderr and done.stderr.count("error: 1 of 4 images") == 1, done.stderr
    assert done.stdout.count(f"{broken}: ") == 1
