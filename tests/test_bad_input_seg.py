"""What users do wrong in segmentation: exit code 2, one line that names the file and the remedy, nothing changed."""
import os
import resource
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image

import predict
import train_seg
from tests.conftest import TINY, tile, write_tif, write_wildfire


@pytest.fixture
def root(tmp_path):
    return write_wildfire(tmp_path / "Wildfire", train=4, test=2, size=(32, 32))


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """best.pt of a tiny run."""
    folder = tmp_path_factory.mktemp("model")
    data = write_wildfire(folder / "Wildfire", train=4, test=1, size=(32, 32))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["train_seg.py", "--data", str(data), *TINY])
        train_seg.main()
    return folder / "runs/seg/exp/best.pt"


def train(refused, *flags, says):
    return refused(train_seg, *TINY, *flags, says=says)


# ---- folders and pairs -----------------------------------------------------------------------------------------------
def test_folders_that_are_missing_or_empty(refused, tmp_path, root):
    train(refused, "--data", "nowhere", says=["nowhere/train_img: no such folder", "--data"])
    for path in (root / "train_img/train_img_0.tif", tmp_path / ("x" * 300)):
        train(refused, "--data", path, says=[path, "no such folder"])
    for folder in ("train_img", "train_mask"):
        broken = shutil.copytree(root, tmp_path / folder)
        for file in (broken / folder).iterdir():
            file.unlink()
        (broken / folder / "notes.txt").write_text("x")
        train(refused, "--data", broken, says=[f"{folder}: no images", ".tif"])


@pytest.mark.parametrize("gone, named", [("train_mask/train_mask_2.tif", "train_img_2.tif"),
                                         ("train_img/train_img_1.tif", "train_mask_1.tif")])
def test_files_without_a_partner(refused, root, gone, named):
    (root / gone).unlink()
    train(refused, "--data", root, says=[named, "no file of that name"])


def test_two_files_of_one_name(refused, root):
    shutil.copy(root / "train_img/train_img_0.tif", root / "train_img/train_img_0.png")
    train(refused, "--data", root, says=["train_img_0.", "has the same name"])


# ---- files -----------------------------------------------------------------------------------------------------------
def test_images_that_do_not_fit(refused, root):
    path = root / "train_img/train_img_1.tif"
    write_tif(path, tile(0, 32, 32, bands=5)[0])
    train(refused, "--data", root, says=["train_img_1.tif: has 5 bands", "7"])
    train(refused, "--data", root, "--bands", "all", says=["train_img_1.tif: has 5 bands", "10"])
    write_tif(root / "train_img/train_img_0.tif", tile(0, 32, 32, bands=4)[0])  # the first one rules no others
    write_tif(path, tile(0, 32, 32)[0])
    train(refused, "--data", root, says=["train_img_0.tif: has 4 bands", "7"])
    write_tif(root / "train_img/train_img_0.tif", tile(0, 32, 32)[0])
    train(refused, "--data", root, "--bands", "11", says=["has 10 bands", "11"])
    write_tif(path, tile(0, 32, 30)[0])
    train(refused, "--data", root, says=["train_mask_1.tif", "train_img_1.tif", "(32, 30)", "(32, 32)"])


@pytest.mark.parametrize("value, flags", [(2, []), (254, []), (255, ["--classes", "3", "--loss", "ce"]),
                                          (3, ["--classes", "3", "--ignore", "255", "--loss", "ce"])])
def test_mask_values_out_of_range(refused, root, value, flags):
    with rasterio.open(root / "train_mask/train_mask_3.tif", "r+", driver="GTiff") as file:
        mask = file.read(1)
        mask[5, 5] = value
        file.write(mask, 1)
    train(refused, "--data", root, *flags, says=["train_mask_3.tif", f"has the value {value}", "--classes"])


@pytest.mark.parametrize("where", ["train_img/train_img_0.tif", "train_mask/train_mask_0.tif"])
@pytest.mark.parametrize("how", ["truncated", "text", "empty", "fifo", "vrt"])
def test_files_that_cannot_be_read(refused, root, where, how):
    path = root / where
    content = path.read_bytes()
    path.unlink()
    if how == "fifo":
        os.mkfifo(path)
    else:
        path.write_bytes({"truncated": content[:len(content) * 2 // 3], "text": b"tile,fold\n" * 50, "empty": b"",
                          "vrt": b"<VRTDataset rasterXSize='1' rasterYSize='1'></VRTDataset>"}[how])
    train(refused, "--data", root, "--folds", "0", says=[path.name, "replace or remove it"])


@pytest.mark.parametrize("workers", [0, 2])
def test_pixels_that_are_no_numbers(refused, root, workers):
    image = tile(2, 32, 32)[0].astype(np.float32)
    write_tif(root / "train_img/train_img_2.tif", image)
    image[3, 4, 5] = np.inf
    write_tif(root / "train_img/train_img_2.tif", image)
    train(refused, "--data", root, "--workers", workers, says=["train_img_2.tif", "infinite", "--allow-bad"])
    image[3, 4, 5] = 0
    write_tif(root / "train_img/train_img_2.tif", image)
    train(refused, "--data", root, "--workers", workers, says=["train_img_2.tif", "float32", "uint16", "convert them"])


def test_a_single_pixel_for_the_batch_norms(refused, root):
    for encoder, size in (("regnetx_002", 16), ("repvgg_a0", 32)):
        train(refused, "--data", root, "--encoder", encoder, "--imgsz", size, "--bs", 1, says="see a single pixel")


def test_a_truncated_image_met_by_a_worker(refused, root):
    path = root / "train_img/train_img_1.tif"
    path.write_bytes(path.read_bytes()[:-9000])
    train(refused, "--data", root, "--workers", 1, says="train_img_1.tif: truncated or damaged")


# ---- flags -----------------------------------------------------------------------------------------------------------
WHOLE = {"epochs": 1, "bs": 1, "accumulate": 1, "imgsz": 16, "period": 1, "patience": 0, "seed": 0, "workers": 0,
         "fold": 0, "save-period": 0, "classes": 1, "repeat": 1}  # the smallest that is allowed
REAL = {"lr": 0, "warmup-epochs": 0, "weight-decay": 0, "clip": 0, "scale": 1e-9, "gain": 0}


@pytest.mark.parametrize("flag", [*WHOLE, *REAL])
def test_numbers_out_of_range(flag, monkeypatch, capsys):
    low = (WHOLE | REAL)[flag]
    for value in ["x", "", "nan", "inf", "-1", "1e400", "9" * 30] + ["0.5"] * (flag in WHOLE) + ["0"] * (low > 0):
        monkeypatch.setattr("sys.argv", ["train_seg.py", "--data", "nowhere", f"--{flag}={value}"])
        with pytest.raises(SystemExit) as ended:
            train_seg.main()
        out, err = capsys.readouterr()
        assert ended.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and f"--{flag}" in err


@pytest.mark.parametrize("flags", [
    ["--bands", "0-3"], ["--bands", "x"], ["--bands", ""], ["--loss", "hinge"], ["--loss", "bce=x"],
    ["--loss", "bce=-1"], ["--loss", "bce=nan"], ["--loss"], ["--optimizer", "lion"], ["--schedule", "x"],
    ["--cache", "tape"], ["--amp", "int8"], ["--encoder", "resnet18"], ["--encoder", ""], ["--conv0", "0"],
    ["--decoder", "8", "-1"], ["--no-such"], ["--device"], ["extra"]])
def test_words_that_are_not_known(refused, tmp_path, flags):
    train(refused, "--data", "nowhere", *flags, says=flags[0])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags, says", [
    (["--device", "cuda:99"], ["--device cuda:99", "--device cpu"]), (["--device", "toaster"], ["--device toaster"]),
    (["--imgsz", "16", "--bs", "1"], ["--imgsz 16 --bs 1"]),
    (["--ignore", "1"], ["--ignore 1", "--classes"]), (["--ignore", "0"], ["--ignore 0", "--classes"]),
    (["--classes", "3", "--loss", "lovasz_elu"], ["--loss lovasz_elu", "lovasz, ce"]),
    (["--classes", "3", "--loss", "ce", "bce=0.5"], ["--loss bce", "lovasz, ce"]),
    (["--loss", "ce"], ["--loss ce", "lovasz_elu", "bce"]),
    (["--folds", "1"], ["--folds 1"]), (["--folds", "nan"], ["--folds nan"]), (["--folds", "inf"], ["--folds inf"]),
    (["--folds", "-3"], ["--folds -3"]), (["--folds", "1.5"], ["--folds 1.5"]), (["--folds", "no.json"], ["no.json"]),
    (["--folds", "5", "--fold", "5"], ["--fold 5", "0, 1, 2, 3"]),
    (["--folds", "0.5", "--fold", "2"], ["--fold 2", "0, 1"]),
    (["--groups", "no.csv"], ["no.csv"]), (["--weights", "no.pt"], ["no.pt"]), (["--weights", "."], ["--weights ."]),
    (["--resume", "nowhere"], ["nowhere"]), (["--resume"], ["runs/seg", "train one first"])])
def test_flags_that_do_not_fit(refused, root, flags, says):
    train(refused, "--data", root, *flags, says=says)


def test_split_and_group_files_that_do_not_fit(refused, root, tmp_path):
    (tmp_path / "a.json").write_text('{"train_img_0": 0, "train_img_1": 1}')
    train(refused, "--data", root, "--folds", "a.json", says=["a.json: has no fold for train_img_2", "2 in total"])
    (tmp_path / "a.csv").write_text("name,group\ntrain_img_0,x\n")
    train(refused, "--data", root, "--groups", "a.csv", says=["a.csv: has no group for train_img_1", "3 in total"])
    (tmp_path / "b.csv").write_bytes(b"\x00\xff\xfe" * 9)
    train(refused, "--data", root, "--groups", "b.csv", says=["b.csv: not a readable CSV", "name and group"])
    (tmp_path / "c.csv").write_text("name,group\n" + "".join(f"train_img_{i},one place\n" for i in range(4)))
    train(refused, "--data", root, "--groups", "c.csv", says=["--fold 0", "0 samples to train and 4 to validate"])


# ---- runs and checkpoints --------------------------------------------------------------------------------------------
def test_run_folders_that_cannot_be_made(refused, root, tmp_path):
    (tmp_path / "taken").write_text("x")
    train(refused, "--data", root, "--project", "taken", says="taken")
    train(refused, "--data", root, "--project", "taken/deeper", says="taken/deeper")
    train(refused, "--data", root, "--name", "n" * 300, says="too long")
    train(refused, "--data", root, "--project", "/proc", says="/proc/exp")


def test_a_cache_folder_that_cannot_be_made(refused, root, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/cache").write_text("x")
    train(refused, "--data", root, "--cache", "disk", says=["runs/cache: cannot be written", "--cache"])


def test_checkpoints_of_other_nets(refused, root, tmp_path, model):
    run = tmp_path / "runs/seg/old"
    run.parent.mkdir(parents=True)
    shutil.copytree(model.parent, run)
    flags = ["--data", root, "--resume", run, "--epochs", "2"]
    train(refused, *flags, "--decoder", "8", "8", "8", "16", says="weights of another net")
    train(refused, *flags, "--bs", "2", says="steps per epoch")
    train(refused, *flags, "--optimizer", "sgd", says="--optimizer")
    train(refused, "--data", root, "--resume", run / "best.pt", says=["best.pt: holds weights only", "last.pt"])
    torch.save({"a": torch.ones(3)}, tmp_path / "foreign.pt")
    train(refused, "--data", root, "--weights", "foreign.pt", says=["foreign.pt", "tensors fit this net"])


# ---- prediction ------------------------------------------------------------------------------------------------------
def test_prediction_without_a_run(refused, root):
    refused(predict, "--task", "seg", says=["runs/seg: no run", "train one first"])
    refused(predict, says="--task")
    refused(predict, "--task", "xyz", says="--task")


@pytest.mark.parametrize("flag, values", [
    ("threshold", ["x", "-0.1", "1.1", "nan", "inf", ""]), ("tile", ["0", "15", "x", "-1", "nan", "1e3"]),
    ("overlap", ["-0.1", "0.95", "1", "nan", "x"]), ("bs", ["0", "-1", "x", "nan", "1.5"]), ("workers", ["-1", "x"]),
    ("amp", ["half"])])
def test_prediction_flags_out_of_range(flag, values, monkeypatch, capsys):
    for value in values:
        monkeypatch.setattr("sys.argv", ["predict.py", "--task", "seg", f"--{flag}={value}"])
        with pytest.raises(SystemExit) as ended:
            predict.main()
        out, err = capsys.readouterr()
        assert ended.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and f"--{flag}" in err


def test_checkpoints_that_cannot_be_used(refused, root, tmp_path, model):
    whole, source = model.read_bytes(), ["--source", root / "test_img", "--workers", 0, "--device", "cpu"]

    def fails(name, says):
        says = [says] if isinstance(says, str) else says
        refused(predict, "--task", "seg", "--weights", name, *source, says=[name, *says])

    def saved(name, **changes):
        state = torch.load(model, weights_only=True)
        torch.save(state | changes, tmp_path / name)
        fails(name, {"task.pt": "--task det", "arch.pt": "another version", "bands.pt": "another version"}.get(
            name, "weights of another net"))

    arch = torch.load(model, weights_only=True)["arch"]
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    fails("cut.pt", "damaged")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    (tmp_path / "flipped.pt").write_bytes(flipped)
    fails("flipped.pt", "damaged")
    (tmp_path / "text.pt").write_text("hello")
    fails("text.pt", "damaged")
    fails("nowhere.pt", "no such checkpoint")
    torch.save({"weight": torch.ones(3)}, tmp_path / "foreign.pt")
    fails("foreign.pt", "--weights")
    saved("task.pt", task="det")
    saved("decoder.pt", arch={"name": "unet.UNet", "kwargs": arch["kwargs"] | {"decoder": [8, 8, 8, 16]}})
    saved("arch.pt", arch={"name": "unet.UNet", "kwargs": arch["kwargs"] | {"encoder": "vit_giant"}})
    saved("arch.pt", arch={"name": "unet.UNet", "kwargs": arch["kwargs"] | {"unheard": 1}})
    saved("arch.pt", arch={"name": "unet.UNet"})
    assert not list(tmp_path.glob("predict*"))


def test_ensembles_of_different_classes(refused, root, tmp_path, model):
    three = write_wildfire(tmp_path / "three", train=4, test=1, size=(32, 32), classes=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr("sys.argv", ["train_seg.py", "--data", str(three), *TINY, "--classes", "3"])
        train_seg.main()
    refused(predict, "--task", "seg", "--weights", model, "runs/seg/exp/last.pt", "--source", root / "test_img",
            "--device", "cpu", says=["runs/seg/exp/last.pt: has classes 3", "best.pt has 1; predict them apart"])


def test_sources_that_cannot_be_used(refused, root, tmp_path, model):
    def fails(*source, says):
        refused(predict, "--task", "seg", "--weights", model, "--workers", 0, "--device", "cpu", "--out", "out",
                "--source", *source, says=says)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)

    good = root / "test_img"
    fails("nowhere", says="nowhere: no such file")
    fails("*.xyz", says="*.xyz: no such file")
    fails("x" * 300, says="x" * 300)
    fails("http://127.0.0.1:9/x.tif", says="no such file")
    (tmp_path / "empty").mkdir()
    fails("empty", says="empty: no images")
    fails(good, "Wildfire", says=["test_img_0.tif", "same name"])  # two paths of one image
    (tmp_path / "twins").mkdir()
    shutil.copy(good / "test_img_0.tif", tmp_path / "twins")
    fails(good, "twins", says=["test_img_0.tif", "same name"])
    few = write_tif(tmp_path / "few.tif", tile(0, 32, 32, bands=3)[0])
    fails(few, says=["few.tif: has 3 bands", "band 7"])
    (tmp_path / "cut.tif").write_bytes((good / "test_img_0.tif").read_bytes()[:-9000])
    fails("cut.tif", says="cut.tif: truncated or damaged")
    fails("cut.tif", "--tile", 16, says="cut.tif: truncated or damaged")
    (tmp_path / "notes.txt").write_text("hello")
    fails("notes.txt", says="notes.txt: not a .tif")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg")
    fails("photo.jpg", says="photo.jpg: has 3 bands")
    write_tif(tmp_path / "inf.tif", np.full((10, 32, 32), np.inf, np.float32))
    fails("inf.tif", says="inf.tif: has infinite pixels")


def test_results_that_cannot_be_written(refused, root, tmp_path, model):
    (tmp_path / "taken").write_text("x")
    flags = ["--task", "seg", "--weights", model, "--source", root / "test_img", "--device", "cpu"]
    refused(predict, *flags, "--out", "taken/deeper", says="taken/deeper")
    refused(predict, *flags, "--out", "/proc/x", says="/proc/x")


@pytest.mark.parametrize("limit", [0, 300, 2000])
def test_a_full_disk(command, root, model, limit):
    """A limit on the size of files stops masks, pictures and the submission in turn."""
    def main():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        predict.main()
    done = command(SimpleNamespace(main=main, __name__="predict"), "--task", "seg", "--weights", model, "--source",
                   root / "test_img", "--device", "cpu", "--workers", 0, "--out", "out")
    lines = [line for line in done.lines if not line.startswith("_tiff")]  # libtiff speaks for itself
    assert done.code == 2 and len(lines) == 1 and "cannot be written" in lines[0] and "make room" in lines[0], done.err
