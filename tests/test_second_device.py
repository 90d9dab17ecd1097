"""Every script on a second device, tests/second_device.py: nothing stays behind on the CPU, nothing is mixed."""
import pytest
import torch

import predict
import train_cls
import train_det
import train_seg
from data.samples.dirty_mnist import Synthetic
from tests import second_device
from tests.conftest import TINY, TINY_CLS, TINY_DET, write_dirty, write_parking, write_wildfire
from tests.test_data_cls import write_letters

OFF = ["--amp", "off"]


@pytest.fixture
def gpu(monkeypatch):
    with second_device.installed(monkeypatch):
        yield


def test_the_pretence_itself(gpu):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to("cuda")
    x = torch.randn(2, 3, 8, 8)
    y = net(x.to("cuda"))
    y.square().mean().backward()
    assert net[0].weight.grad.device.type == y.device.type == "cuda" and y.cpu().device.type == "cpu"
    with pytest.raises(RuntimeError, match="two devices"):
        net(x)
    with pytest.raises(RuntimeError, match="two devices"):
        y + torch.ones(6)
    with pytest.raises(TypeError, match="numpy"):
        y.detach().numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, device="cuda", generator=torch.Generator())
    assert torch.arange(3, device=y.device).add(1).tolist() == [1, 2, 3] and float(y.mean() * 0) == 0


def cases(flags):
    """One test per list of flags; each of them trains, resumes and predicts, for `make test-slow`."""
    return pytest.mark.parametrize("flags", [
        pytest.param(case, id=case[0] if case else "default", marks=pytest.mark.slow) for case in flags])


SEG = [
    [], ["--classes", 3, "--ignore", 255, "--loss", "lovasz", "ce", "dice", "focal", "--aux-cls", 0.5],
    ["--loss", "lovasz", "bce", "dice", "focal", "--ignore", 255, "--mixup", 0.5, "--cutmix", 0.5, "--gridmask", 1,
     "--cutout", 1, "--gain", 1, "--aux-cls", 1, "--p-object", 0.5],
    ["--swa", 0.5, "--epochs", 2, "--optimizer", "radam", "--clip", 1, "--accumulate", 2, "--bs", 2],
    ["--resize", "--optimizer", "radam", "--no-ema", "--schedule", "plateau"], ["--tile", 48, "--optimizer", "sgd"],
    ["--encoder", "hrnet_w18_small", "--decoder", "--grad-checkpoint", "--optimizer", "adam"],
    ["--encoder", "efficientnetv2_b0", "--label-smoothing", 0.1]]


@cases(SEG)
def test_segmentation(flags, script, tmp_path, gpu):
    data = write_wildfire(tmp_path / "Wildfire", classes=3 if "--classes" in flags else 1)
    script(train_seg, "--data", data, *TINY, *OFF, *flags)
    script(train_seg, "--resume", "--epochs", 3)
    script(predict, "--task", "seg", "--tta", "hflip", "rot90", "scale", "--pseudo", 0.9, "--polygons", *OFF)
    script(predict, "--task", "seg", "--tile", 32, "--out", "out", *OFF)


DET = [
    [], ["--head", "anchor", "--image-weights", "--label-smoothing", 0.1],
    ["--mixup", 1, "--gridmask", 1, "--cutout", 1],
    ["--swa", 0.5, "--epochs", 2, "--optimizer", "radam"], ["--tile", 64],
    ["--stages", "1,1", "--bs", 2, "--accumulate", 2], ["--no-ema", "--multi-scale", 0.5, "--grad-checkpoint"]]


@cases(DET)
def test_detection(flags, script, tmp_path, gpu):
    data = write_parking(tmp_path / "DATA")
    once = TINY_DET if "--stages" not in flags else [flag for flag in TINY_DET if flag not in ("--epochs", "1")]
    script(train_det, "--data", data, *once, *flags)
    script(predict, "--task", "det", "--tta", "--conf", 0.0001, "--pseudo", 0.5, *OFF)
    script(predict, "--task", "det", "--tta", "hflip", "--merge", "wbf", "--conf", 0.0001, "--tile", 64, "--out", "out",
           *OFF)


CLS = [
    [], ["--loss", "focal", "--label-smoothing", 0.1], ["--mixup", 0.5, "--cutmix", 0.5, "--gridmask", 1],
    ["--swa", 0.5, "--epochs", 2, "--optimizer", "radam"],
    ["--net", "efficientnetv2_b0", "--optimizer", "sgd", "--lr", 1e-3, "--clip", 1]]


@cases(CLS)
def test_classification(flags, script, tmp_path, gpu):
    data = write_dirty(tmp_path / "resources")
    script(train_cls, "--data", data, *TINY_CLS, *flags)
    script(train_cls, "--resume", "--epochs", 3)
    script(predict, "--task", "cls", "--tta", "--pseudo", 0.5, *OFF)
    pair = ["--weights", "runs/cls/exp/best.pt", "runs/cls/exp/last.pt"]
    script(predict, "--task", "cls", *pair, "--tta", "scale", "hflip", "--out", "out", *OFF)


@pytest.mark.slow
def test_synthesis_on_the_device(script, tmp_path, gpu):
    """Images are made where the net is, each by a generator of that device; labels and order are those of the CPU."""
    write_letters(tmp_path / "letters.csv")
    data = write_dirty(tmp_path / "resources", classes=26, side=96)
    script(train_cls, "--data", data, *TINY_CLS, "--synthesize", "letters.csv", "--synthesize-count", 8)
    script(predict, "--task", "cls", *OFF)
    here, there = (Synthetic("letters.csv", 6, seed=3, size=96, device=device) for device in ("cpu", "cuda"))
    made, again = ([data[1, i] for i in range(6)] for data in (there, there))
    assert {sample["image"].device.type for sample in made} == {"cuda"}
    for i, sample in enumerate(made):
        assert sample["label"].tolist() == here[1, i]["label"].tolist()
        assert sample["image"].tolist() == again[i]["image"].tolist()
