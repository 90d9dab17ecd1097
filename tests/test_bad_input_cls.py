"""What users do wrong in classification: exit code 2, one line that names what and the remedy, nothing changed."""
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import predict
import train_cls
from data.samples import glyphs
import nets
from nets.unet import UNet
from tests.conftest import TINY_CLS, write_dirty, write_tif

FLAGS = ["--task", "cls", "--device", "cpu", "--workers", 0]


@pytest.fixture
def root(tmp_path):
    return write_dirty(tmp_path / "resources", train=6, test=2)


def weights(path="net.pt", *, data="resources", in_chans=1, bands=(1,), scale=255.0, imgsz=32, single_label=False,
            classes=("a", "b", "c", "d"), seed=0):
    """A checkpoint of a net that has learned nothing."""
    torch.manual_seed(seed)
    arch = {"name": "regnetx_002", "kwargs": dict(in_chans=in_chans, num_classes=len(classes))}
    torch.save({"task": "cls", "arch": arch, "classes": list(classes), "single_label": single_label,
                "input": {"bands": list(bands), "pixel_scale": scale, "imgsz": imgsz, "mean": [0.5], "std": [0.5]},
                "args": {"data": str(data)}, "model": nets.build(arch).state_dict(), "ema": None}, path)
    return Path(path)


def train(refused, *flags, says):
    refused(train_cls, *TINY_CLS, *flags, says=says)


def predicts(refused, *flags, says):
    refused(predict, *FLAGS, *flags, says=says)


# ---- data ------------------------------------------------------------------------------------------------------------
def test_data_that_is_missing_or_does_not_fit(refused, tmp_path, root):
    train(refused, "--data", "nowhere", says=["nowhere: no such folder", "--data"])
    (tmp_path / "empty/cat").mkdir(parents=True)
    train(refused, "--data", "empty", says=["empty: neither a table", "two folders"])
    table = root / "dirty_mnist_2nd_answer.csv"
    good = table.read_text()
    for text, says in ((good.replace("\n3,", "\n3,1,"), "line 5 has another number of columns"), ("", "no header"),
                       (good.replace("\n3,", "\n2,"), "line 5: 2 stands in line 4"),
                       (good + "77,0,0,0,0\n", "77 has no image"), (good.replace("\n3,", "\n3,x")[:-1], "line 5")):
        table.write_text(text)
        train(refused, "--data", root, says=says)
    table.write_text(good)
    train(refused, "--data", root, "--labels", "no.csv", says="no.csv: not a readable CSV")
    train(refused, "--data", root, "--labels", table, "--images", "none", says="none: no such folder")
    (root / "test_dirty_mnist_2nd").mkdir(exist_ok=True)
    table.unlink()  # the two folders of images are no classes
    train(refused, "--data", root, says=["no *_answer.csv", "test_dirty_mnist_2nd is no class", "--labels"])


@pytest.mark.parametrize("flags, says", [
    (["--noise", 9], "--noise: does nothing without --synthesize"),
    (["--swa-lr", 0.5], "--swa-lr: does nothing without --swa"),
    (["--synthesize", "a.csv", "--subset", 2], "--subset: not with --synthesize"),
    (["--synthesize", "a.csv", "--drop-noisy", "noise.csv:2"], "--drop-noisy: not with --synthesize")])
def test_flags_that_would_do_nothing(refused, root, tmp_path, flags, says):
    (tmp_path / "noise.csv").write_text(f"rank,name,score\n1,{root}/dirty_mnist_2nd/00003.png,0\n")
    train(refused, "--data", root, *flags, says=says)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_pictures(refused, root, workers):
    path = root / "dirty_mnist_2nd/00003.png"
    good = path.read_bytes()
    path.write_bytes(good[:-200])
    train(refused, "--data", root, "--workers", workers, says="00003.png: truncated or damaged")
    path.write_bytes(b"")
    train(refused, "--data", root, "--workers", workers, says="00003.png: empty")


def test_pictures_of_other_bands(refused, root):
    train(refused, "--data", root, "--bands", 2, says=["00000.png: has 1 bands", "band 2", "--bands"])
    Image.fromarray(np.zeros((40, 40, 4), np.uint8)).save(root / "dirty_mnist_2nd/00000.png")
    train(refused, "--data", root, "--bands", "1-4", says=["00001.png: has 1 bands", "band 4"])


def test_pictures_of_several_depths(refused, root, tmp_path):
    image = np.asarray(Image.open(root / "dirty_mnist_2nd/00001.png"))
    Image.fromarray(image.astype(np.uint16) * 257).save(root / "dirty_mnist_2nd/00001.png")
    train(refused, "--data", root, says=["00001.png: has uint16 pixels", "uint8", "convert it"])
    more = write_dirty(tmp_path / "more", train=2, test=0)
    shutil.copy(root / "dirty_mnist_2nd/00001.png", more / "dirty_mnist_2nd/00000.png")
    image = Image.fromarray(image)
    image.save(root / "dirty_mnist_2nd/00001.png")
    train(refused, "--data", root, "--extra-data", more, says=["more/dirty_mnist_2nd/00000.png", "uint16"])


def test_a_refused_resume_leaves_the_run_as_it_was(refused, command, root):
    assert command(train_cls, *TINY_CLS, "--data", root, "--folds", 2).code == 0
    run = root.parent / "runs/cls/exp"
    before = (run / "args.json").read_text()
    train(refused, "--resume", run, "--net", "regnetx_004", "--epochs", 9, says="--resume")
    assert (run / "args.json").read_text() == before


def test_shares_of_what_happens_instead_of_one_another(refused, root):
    train(refused, "--data", root, "--mixup", 0.7, "--cutmix", 0.4, says=["--mixup, --cutmix", "exceed 1"])


# ---- flags -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags, says", [
    (["--loss", "ce"], ["--loss ce", "bce"]), (["--loss", "bce", "ce=0.5"], ["--loss ce"]),
    (["--drop", "0.2"], ["--drop", "regnetx_002"]), (["--drop-path", "0"], ["--drop-path", "regnetx_002"]),
    (["--net", "repvgg_a0", "--drop", "0.2"], ["--drop", "repvgg_a0", "EfficientNetV2"]),
    (["--weights", "no.pt"], ["--weights no.pt", "no such file"]), (["--weights", "."], ["--weights ."]),
    (["--synthesize", "letters.csv"], ["--synthesize letters.csv", "a to z", "--data"]),
    (["--folds", "no.json"], ["no.json: cannot be read"]), (["--folds", "1"], ["--folds 1"]),
    (["--fold", "7"], ["--fold 7"]),
    (["--device", "cuda:99"], ["--device cuda:99"]), (["--resume", "nowhere"], ["nowhere"]),
    (["--resume"], ["runs/cls", "train one first"])])
def test_flags_that_do_not_fit(refused, root, flags, says):
    train(refused, "--data", root, *flags, says=says)


def test_letters_that_cannot_be_used(refused, tmp_path):
    root = write_dirty(tmp_path / "resources", train=6, test=0, side=80, classes=26)
    flags = ["--data", root, "--synthesize"]
    train(refused, *flags, "no.csv", says="no.csv: cannot be read")
    train(refused, *flags, root / "dirty_mnist_2nd_answer.csv", says=["_answer.csv: the columns are not letter"])
    pixels, letters = glyphs.render(1)
    rows = [",".join([chr(65 + k), *map(str, row)]) for k, row in zip(letters, pixels.reshape(26, -1)) if k != 7]
    (tmp_path / "letters.csv").write_text("\n".join([",".join(["letter", *glyphs.COLUMNS]), *rows, ""]))
    train(refused, *flags, "letters.csv", says="no glyph of H")
    small = write_dirty(tmp_path / "small", train=6, test=0, side=40, classes=26)
    train(refused, "--data", small, "--synthesize", "letters.csv", says=["00000.png: is 40 pixels high", "79"])
    colours = write_dirty(tmp_path / "colours", train=6, test=0, side=80, classes=26)
    for path in (colours / "dirty_mnist_2nd").iterdir():
        Image.open(path).convert("RGB").save(path)
    train(refused, "--data", colours, "--synthesize", "letters.csv", says=["--synthesize letters.csv", "--bands"])


@pytest.mark.parametrize("flag, values", [
    ("bands", ["0-3", "x"]), ("pixel-scale", ["0", "-1", "nan"]), ("cutout-size", ["0", "1", "nan"]),
    ("synthesize-count", ["0", "x"]), ("subset", ["1", "-5", "0.5"]), ("val-interval", ["0", "1.1", "nan"]),
    ("loss", ["x", "bce=-1", "bce=x", ""]), ("label-smoothing", ["1"]), ("drop", ["1", "-0.1"]), ("drop-path", ["1"]),
    ("hflip", ["1.1"]), ("degrees", ["181", "-1"]), ("p-affine", ["2"]), ("cutout", ["1.1", "-0.1"]), ("imgsz", ["15"]),
    ("bs", ["0"]), ("accumulate", ["0"])])
def test_values_out_of_range(flag, values, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for value in values:
        monkeypatch.setattr("sys.argv", ["train_cls.py", "--data", "nowhere", f"--{flag}={value}"])
        with pytest.raises(SystemExit) as ended:
            train_cls.main()
        out, err = capsys.readouterr()
        assert ended.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and f"--{flag}" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("net", ["efficientnetv2_x", "resnet50", "", "os.system", "blocks.relu", "mine.Mine"])
def test_nets_that_are_not_there(refused, root, tmp_path, net):
    """Refused before data is read and before there is a run folder."""
    train(refused, "--data", "nowhere", f"--net={net}", says=["--net", "no such net"])
    assert not (tmp_path / "runs").exists()


def test_weights_and_runs_of_other_nets(refused, root, tmp_path, script):
    flags = ["--data", root]
    torch.save({"a": torch.ones(3)}, tmp_path / "foreign.pt")
    train(refused, *flags, "--weights", "foreign.pt", says=["foreign.pt", "tensors fit this net"])
    (tmp_path / "text.pt").write_text("hello")
    train(refused, *flags, "--weights", "text.pt", says=["--weights text.pt"])
    script(train_cls, *TINY_CLS, *flags, "--name", "old", "--save-period", 1)
    again = [*flags, "--resume", "runs/cls/old", "--epochs", 2]
    train(refused, *again, "--bs", 2, says="steps per epoch")
    train(refused, *again, "--net", "regnetx_004", says="weights of another net")
    train(refused, *again, "--optimizer", "sgd", says=["the optimizer Adam", "--optimizer"])
    train(refused, *flags, "--resume", "runs/cls/old/epoch_1.pt", says=["epoch_1.pt: holds weights only", "last.pt"])


def test_run_folders_that_cannot_be_made(refused, root, tmp_path):
    (tmp_path / "taken").write_text("x")
    train(refused, "--data", root, "--project", "taken", says="taken")
    train(refused, "--data", root, "--project", "/proc", says="/proc/exp")


# ---- prediction ------------------------------------------------------------------------------------------------------
def test_checkpoints_that_cannot_be_used(refused, root, tmp_path):
    good = weights(tmp_path / "good.pt", data=root)
    whole, state = good.read_bytes(), torch.load(good, weights_only=True)
    arch = state["arch"]["kwargs"]

    def fails(name, says):
        predicts(refused, "--weights", name, says=[name, says])
        (tmp_path / name).unlink(missing_ok=True)  # the comparison before and after reads all files

    predicts(refused, says=["runs/cls: no run", "train one first"])
    fails("nowhere.pt", "no such checkpoint")
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    fails("cut.pt", "damaged")
    net = UNet(in_chans=14, conv0=(8,), decoder=(8, 8, 8, 8))
    torch.save({"task": "seg", "arch": {"name": "unet.UNet", "kwargs": {}}, "input": {}, "model": net.state_dict()}, tmp_path / "seg.pt")
    fails("seg.pt", "trained for --task seg")
    for name, changes, says in (
            ("net.pt", {"arch": {"name": "regnetx_004", "kwargs": arch}}, "weights of another net"),
            ("classes.pt", {"arch": {"name": "regnetx_002", "kwargs": arch | {"num_classes": 7}}}, "another net"),
            ("name.pt", {"arch": {"name": "resnet", "kwargs": arch}}, "another version"),
            ("path.pt", {"arch": {"name": "os.system", "kwargs": {"command": "touch it"}}}, "another version"),
            ("word.pt", {"arch": {"name": "regnetx_002", "kwargs": arch | {"unheard": 1}}}, "another version"),
            ("none.pt", {"arch": {"name": "regnetx_002"}}, "another version"),
            ("input.pt", {"input": {"bands": [1]}}, "another version"),
            ("words.pt", {"threshold": "half"}, "another version"),
            ("few.pt", {"threshold": [0.5] * 3}, "another version")):
        torch.save(state | changes, tmp_path / name)
        fails(name, says)
    for key in ("input", "classes", "args", "single_label"):
        torch.save({k: v for k, v in state.items() if k != key}, tmp_path / f"{key}.pt")
        fails(f"{key}.pt", "another version")


def test_ensembles_that_do_not_fit(refused, root, tmp_path):
    one = weights(tmp_path / "one.pt", data=root)
    two = weights(tmp_path / "two.pt", data=root, classes="abce")
    predicts(refused, "--weights", one, two, says=["two.pt", "'a', 'b', 'c', 'e'", "one.pt"])
    predicts(refused, "--weights", one, one, "--ensemble-weights", 1, says=["--ensemble-weights: 1 for 2 checkpoints"])
    predicts(refused, "--weights", one, "--ensemble-weights", 1, says=["1 for 1 checkpoints", "one weight each"])
    softmax = weights(tmp_path / "softmax.pt", data=root, single_label=True)
    predicts(refused, "--weights", one, softmax, says=["softmax.pt: has single_label True", "one.pt has False"])
    predicts(refused, "--weights", softmax, one, says=["one.pt: has single_label False", "predict them apart"])


def test_sources_that_cannot_be_used(refused, root, tmp_path):
    net = weights(tmp_path / "net.pt", data=root)

    def fails(*source, says):
        predicts(refused, "--weights", net, "--out", "out", "--source", *source, says=says)

    good = root / "test_dirty_mnist_2nd"
    fails("nowhere", says="nowhere: no such file")
    (tmp_path / "empty").mkdir()
    fails("empty", says="empty: no images")
    shutil.copy(good / "50000.png", good / "50000.jpg")
    fails(good, says=["50000.jpg", "the same name"])
    (good / "50000.jpg").unlink()
    two = weights(tmp_path / "two.pt", data=root, in_chans=2, bands=(1, 3))
    predicts(refused, "--weights", two, "--source", good, says=["50000.png: has 1 bands", "band 3"])
    (tmp_path / "cut.png").write_bytes((good / "50000.png").read_bytes()[:-300])
    fails("cut.png", says="cut.png: truncated or damaged")
    fails("cut.png", "--workers", 1, says="cut.png: truncated or damaged")
    write_tif(tmp_path / "inf.tif", np.full((1, 32, 32), np.inf, np.float32))
    fails("inf.tif", says="inf.tif: has infinite pixels")
    shutil.rmtree(good)
    predicts(refused, "--weights", net, says=["resources/test: no such f", "--source"])


def test_results_that_cannot_be_written(refused, root, tmp_path):
    net = weights(tmp_path / "net.pt", data=root)
    (tmp_path / "taken").write_text("x")
    predicts(refused, "--weights", net, "--out", "taken/deeper", says="taken/deeper")
    predicts(refused, "--weights", net, "--out", "/proc/x", says="/proc/x")


@pytest.mark.parametrize("flag, values", [
    ("threshold", ["x", "-0.1", "1.1", "nan"]), ("imgsz", ["16", "x"]), ("ensemble-weights", ["0", "-1", "x"]),
    ("bs", ["0"])])
def test_prediction_values_out_of_range(flag, values, monkeypatch, capsys):
    for value in values:
        monkeypatch.setattr("sys.argv", ["predict.py", "--task", "cls", f"--{flag}={value}"])
        with pytest.raises(SystemExit) as ended:
            predict.main()
        out, err = capsys.readouterr()
        assert ended.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and f"--{flag}" in err
