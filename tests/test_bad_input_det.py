"""What users do wrong in detection: exit code 2, one line that names file or flag and the remedy, nothing changed."""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import predict
import train_det
from nets.unet import UNet
from tests.conftest import TINY_DET, write_parking, write_tif
from tests.test_predict_det import weights
from utils.train import checkpoint


@pytest.fixture
def root(tmp_path):
    return write_parking(tmp_path / "DATA", train=5, test=2)


def train(refused, *flags, says):
    refused(train_det, *TINY_DET, *flags, says=says)


def relabel(root, **changes):
    """Train.json with other values of its keys; of a function, what it makes of the old one."""
    path = root / "train/label/Train.json"
    labels = json.loads(path.read_text())
    labels |= {k: v(labels[k]) if callable(v) else v for k, v in changes.items()}
    path.write_text(json.dumps(labels))


# ---- data ------------------------------------------------------------------------------------------------------------
def test_folders_that_are_missing_or_empty(refused, tmp_path, root):
    train(refused, "--data", "nowhere", says=["nowhere: no such folder", "--data"])
    (tmp_path / "empty").mkdir()
    train(refused, "--data", "empty", says=["empty: no labels in it", "Train.json"])
    shutil.rmtree(root / "train/images")
    train(refused, "--data", root, says="Train.json: images[0]: no image")


def test_labels_that_make_no_sense(refused, root):
    good = (root / "train/label/Train.json").read_text()
    relabel(root, annotations=[])
    train(refused, "--data", root, says="no boxes in the labels of 5 images")
    relabel(root, images=[])
    train(refused, "--data", root, says="no images")
    (root / "train/label/Train.json").write_text(good[:-40])
    train(refused, "--data", root, says="Train.json: not valid JSON")
    (root / "train/label/Train.json").write_text(good)
    relabel(root, annotations=lambda boxes: [box | {"image_id": 99} for box in boxes])
    train(refused, "--data", root, says=["Train.json: annotations[0]", "99"])
    (root / "train/label/Train.json").write_text(good)
    relabel(root, annotations=lambda boxes: [box | {"bbox": [500, 500, 9, 9]} for box in boxes])
    train(refused, "--data", root, says=["boxes cannot be used", "--allow-bad"])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_picture(refused, root, workers):
    path = root / "train/images/002.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    train(refused, "--data", root, "--workers", workers, says="002.jpg: truncated or damaged")


def test_pictures_of_other_bands(refused, root):
    Image.fromarray(np.zeros((64, 96, 4), np.uint8)).save(root / "train/images/001.png")
    (root / "train/images/001.png").rename(root / "train/images/001.jpg")  # the first bytes tell what it is
    Image.fromarray(np.zeros((64, 96), np.uint8)).save(root / "train/images/003.jpg")
    train(refused, "--data", root, "--bands", "1-4", says=[".jpg: has ", "band 4", "--bands"])


# ---- flags -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags, says", [
    (["--imgsz", "80"], ["--imgsz 80", "stride 32", "take 96"]),
    (["--variant", "n6", "--imgsz", "96"], ["--imgsz 96", "64", "take 128"]),
    (["--label-smoothing", "0.1"], ["--label-smoothing", "--head free"]), (["--obj", "2"], ["--obj", "--head free"]),
    (["--anchor-threshold", "3"], ["--anchor-threshold: ", "--head free"]),
    (["--no-autoanchor"], ["--autoanchor: ", "--head free"]),
    (["--overlap", "0.5"], ["--overlap", "--tile"]), (["--mosaic", "0", "--mixup", "1"], ["--mixup", "--mosaic"]),
    (["--mosaic", "0", "--close-mosaic", "9"], ["--close-mosaic", "--mosaic"]),
    (["--mosaic", "0", "--close-mosaic", "1"], ["--close-mosaic", "--mosaic"]),
    (["--warmup-epochs", "0", "--warmup-bias-lr", "0.1"], ["--warmup-bias-lr", "warmup"]),
    (["--warmup-epochs", "0", "--warmup-momentum", "0.5"], ["--warmup-momentum", "warmup"]),
    (["--stages", "2,1"], ["--epochs", "--stages"]),  # TINY_DET has --epochs 1
    (["--stages", "1,1", "--epochs", "50", "--preset", "finetune"], ["--preset", "--stages"]),
    (["--imgsz", "32", "--bs", "1"], ["--bs 1", "--imgsz 32"]),
    (["--imgsz", "64", "--bs", "1", "--multi-scale", "0.5"], ["--bs 1", "--imgsz 64"]),
    (["--head", "anchor", "--dfl", "1"], ["--dfl", "--head anchor"]),
    (["--net", "yolo.None"], ["--net", "yolo.None", "mine.Mine"]), (["--net", "os.path"], ["--net", "os.path"]),
    (["--cutout-size", "0.2"], ["--cutout-size", "--cutout"]),
    (["--weights", "no.pt"], ["--weights no.pt", "no such file"]), (["--weights", "."], ["--weights ."]),
    (["--folds", "no.json"], ["no.json: cannot be read"]), (["--folds", "1"], ["--folds 1"]),
    (["--fold", "7"], ["--fold 7"]), (["--device", "cuda:99"], ["--device cuda:99"]),
    (["--resume", "nowhere"], ["nowhere"]), (["--resume"], ["runs/det", "train one first"])])
def test_flags_that_do_not_fit(refused, root, flags, says):
    train(refused, "--data", root, *flags, says=says)


def test_flags_of_a_resumed_run(refused, script, root):
    """Its own are not given again; those that are given are checked beside them."""
    script(train_det, *TINY_DET, "--data", root, "--head", "anchor", "--obj", 2)
    script(train_det, "--resume", "runs/det/exp", "--epochs", 2, "--anchor-threshold", 3)
    args = checkpoint.load("runs/det/exp/last.pt")["args"]
    assert (args["obj"], args["anchor_threshold"], args["head"], args["epochs"]) == (2, 3, "anchor", 2)
    train(refused, "--resume", "runs/det/exp", "--epochs", 3, "--dfl", 3, says=["--dfl: ", "--head anchor"])


def test_refused_flags_leave_no_run_folder(refused, root, tmp_path):
    """They are refused before the data is read."""
    for flags in (["--imgsz", 80], ["--obj", 2], ["--stages", "3,1"], ["--net", "no.Net"]):
        train(refused, "--data", "nowhere", *flags, says=flags[0])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flag, values", [
    ("stages", ["50", "50,", "1,2,3", "a,b", "0,5", "5,-1", "1.5,2", ""]), ("variant", ["xl", "s7", ""]),
    ("head", ["x"]), ("preset", ["best"]), ("mosaic", ["1.1", "-0.1", "nan"]), ("mixup", ["2"]),
     ("epoch-parts", ["0", "x"]), ("multi-scale", ["1", "-1"]), ("degrees", ["181"]),
    ("close-mosaic", ["-1"]), ("pixel-scale", ["0", "nan"]), ("cutout-size", ["0"]), ("bands", ["0-3", "x"]),
    ("anchor-threshold", ["0.5"]),
    ("label-smoothing", ["1"]), ("box", ["-1", "inf"]), ("warmup-momentum", ["1"]),
    ("hue", ["2"]), ("zoom", ["1", "0 1"])])
def test_values_out_of_range(flag, values, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for value in values:
        monkeypatch.setattr("sys.argv", ["train_det.py", "--data", "nowhere", f"--{flag}={value}"])
        with pytest.raises(SystemExit) as ended:
            train_det.main()
        out, err = capsys.readouterr()
        assert ended.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and f"--{flag}" in err
    assert not (tmp_path / "runs").exists()


def test_a_batch_that_the_processes_cannot_share(refused, root, monkeypatch):
    def main():  # in the forked process: one of three, whose group is never joined
        monkeypatch.setattr("utils.train.dist.setup", lambda device, timeout: torch.device("cpu"))
        monkeypatch.setattr("utils.train.dist.broadcast", lambda value: value)
        monkeypatch.setenv("WORLD_SIZE", "3"), monkeypatch.setenv("RANK", "0")
        train_det.main()
    refused(SimpleNamespace(main=main, __name__="train_det"), *TINY_DET, "--data", root, says=["--bs 4", "3 processes"])


def test_weights_and_runs_of_other_nets(refused, root, tmp_path, script):
    flags = ["--data", root]
    weights(tmp_path / "n.pt", imgsz=64)
    train(refused, *flags, "--variant", "s", "--weights", "n.pt", says=["--weights n.pt", "tensors fit this net"])
    torch.save({"a": torch.ones(3)}, tmp_path / "foreign.pt")
    train(refused, *flags, "--weights", "foreign.pt", says=["foreign.pt", "tensors fit this net"])
    (tmp_path / "text.pt").write_text("hello")
    train(refused, *flags, "--weights", "text.pt", says=["--weights text.pt"])
    script(train_det, *TINY_DET, *flags, "--name", "old", "--save-period", 1)
    again = [*flags, "--resume", "runs/det/old", "--epochs", 2]
    train(refused, *again, "--bs", 2, says="steps per epoch")
    train(refused, *again, "--head", "anchor", says="weights of another net")
    train(refused, *again, "--variant", "s", says="weights of another net")
    train(refused, *flags, "--resume", "runs/det/old/epoch_1.pt", says=["epoch_1.pt: holds weights only", "last.pt"])


def test_run_folders_that_cannot_be_made(refused, root, tmp_path):
    (tmp_path / "taken").write_text("x")
    train(refused, "--data", root, "--project", "taken", says="taken")
    train(refused, "--data", root, "--project", "/proc", says="/proc/exp")


# ---- prediction ------------------------------------------------------------------------------------------------------
def predicts(refused, *flags, says):
    refused(predict, "--task", "det", "--device", "cpu", "--workers", 0, *flags, says=says)


def test_checkpoints_that_cannot_be_used(refused, root, tmp_path):
    good = weights(tmp_path / "good.pt", data=root)
    whole, state = good.read_bytes(), torch.load(good, weights_only=True)

    def named(**kwargs):
        return {"name": "yolo.YOLOv5", "kwargs": state["arch"]["kwargs"] | kwargs}

    def fails(name, says):
        predicts(refused, "--weights", name, says=[name, says])
        (tmp_path / name).unlink(missing_ok=True)  # the comparison before and after reads all files

    predicts(refused, says=["runs/det: no run", "train one first"])
    fails("nowhere.pt", "no such checkpoint")
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    fails("cut.pt", "damaged")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    (tmp_path / "flipped.pt").write_bytes(flipped)
    fails("flipped.pt", "damaged")
    net = UNet(in_chans=14, conv0=(8,), decoder=(8, 8, 8, 8))
    torch.save({"task": "seg", "arch": {"name": "unet.UNet", "kwargs": {}}, "input": {}, "model": net.state_dict()},
               tmp_path / "seg.pt")
    fails("seg.pt", "trained for --task seg")
    for name, changes, says in (
            ("wider.pt", {"arch": named(variant="s")}, "weights of another net"),
            ("head.pt", {"arch": named(head="anchor")}, "weights of another net"),
            ("variant.pt", {"arch": named(variant="q")}, "another version"),
            ("word.pt", {"arch": named(unheard=1)}, "another version"),
            ("none.pt", {"arch": {"name": "yolo.YOLOv5"}}, "another version"),
            ("foreign.pt", {"arch": {"name": "os.path", "kwargs": {}}}, "another version"),
            ("input.pt", {"input": {"bands": [1]}}, "another version")):
        torch.save(state | changes, tmp_path / name)
        fails(name, says)
    for key in ("input", "classes"):
        torch.save({k: v for k, v in state.items() if k != key}, tmp_path / f"{key}.pt")
        fails(f"{key}.pt", "another version")


def test_ensembles_that_do_not_fit(refused, root, tmp_path):
    one = weights(tmp_path / "one.pt", data=root)
    two = weights(tmp_path / "two.pt", data=root, classes=["sedan", "bus", "child"])
    predicts(refused, "--weights", one, two, says=["two.pt", "'sedan', 'bus', 'child'", "one.pt"])
    predicts(refused, "--weights", one, one, "--ensemble-weights", 1, says="--ensemble-weights: 1 for 2 check")
    predicts(refused, "--weights", one, "--ensemble-weights", 1, 2, says="--ensemble-weights: 2 for 1 check")


def test_sources_that_cannot_be_used(refused, root, tmp_path):
    net = weights(tmp_path / "net.pt", data=root, imgsz=64)

    def fails(*source, says):
        predicts(refused, "--weights", net, "--out", "out", "--source", *source, says=says)

    good = root / "test/images"
    fails("nowhere", says="nowhere: no such file")
    fails("*.xyz", says="*.xyz: no such file")
    (tmp_path / "empty").mkdir()
    fails("empty", says="empty: no images")
    two = write_tif(tmp_path / "two.tif", np.zeros((2, 32, 32), np.uint8))
    fails(two, says=["two.tif: has 2 bands", "band 3", "leave it out"])
    (tmp_path / "cut.png").write_bytes((good / "lot.0.png").read_bytes()[:-900])
    fails("cut.png", says="cut.png: truncated or damaged")
    fails("cut.png", "--tile", 32, says="cut.png: truncated or damaged")
    shutil.copy(good / "lot.0.png", good / "stray.png")
    fails(good, says=["stray.png: not in", "Test_Images_Information.json (1 in total)", "add it"])
    predicts(refused, "--weights", net, says=["stray.png: not in", "Test_Images_Information.json (1 in total)"])
    (good / "stray.png").unlink()
    (root / "Test_Images_Information.json").write_text("{")
    predicts(refused, "--weights", net, says="Test_Images_Information.json: not valid JSON")
    shutil.rmtree(good)
    predicts(refused, "--weights", net, says=["DATA/test/images: no such f", "--source"])


def test_results_that_cannot_be_written(refused, root, tmp_path):
    net = weights(tmp_path / "net.pt", data=root, imgsz=64)
    (tmp_path / "taken").write_text("x")
    predicts(refused, "--weights", net, "--out", "taken/deeper", says="taken/deeper")
    predicts(refused, "--weights", net, "--out", "/proc/x", says="/proc/x")


@pytest.mark.parametrize("flag, values", [
    ("conf", ["x", "-0.1", "1.1", "nan"]), ("iou", ["2", ""]), ("max-det", ["0", "-1", "1.5"]), ("imgsz", ["16", "x"]),
    ("max-mb", ["0", "nan"]), ("ensemble-weights", ["0", "-1", "x"]), ("tile", ["15"]), ("overlap", ["1"])])
def test_prediction_values_out_of_range(flag, values, monkeypatch, capsys):
    for value in values:
        monkeypatch.setattr("sys.argv", ["predict.py", "--task", "det", f"--{flag}={value}"])
        with pytest.raises(SystemExit) as ended:
            predict.main()
        out, err = capsys.readouterr()
        assert ended.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and f"--{flag}" in err


def test_folds_of_data_that_has_its_own(refused, tmp_path):
    for part in ("train", "val"):
        for folder in ("images", "labels"):
            (tmp_path / "DATA" / folder / part).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(tmp_path / f"DATA/images/{part}/{part}.png")
        (tmp_path / f"DATA/labels/{part}/{part}.txt").write_text("0 .5 .5 .5 .5")
    train(refused, "--data", "DATA", "--fold", 1, says=["--fold: ", "validation images of its own", "--folds 5"])
