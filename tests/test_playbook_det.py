"""What train_det.py and predict.py offer beyond the recipe: pseudo labels, extra data, --debug, averages, soups.

Pseudo labels come from the finder of test_predict_det.py, whose boxes and scores (0.9, 0.7, 0.5 by class) are exact.
"""
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import predict
import train_det
from data import labels
from nets.yolo import YOLOv5
from tests.conftest import TINY_DET, lot, write_parking
from tests.test_predict_det import FLAGS, NAMES, finder, items_of, weights  # noqa: F401, finder is a fixture
from tests.test_scripts_det import edit
from utils import checkpoint
from utils.errors import Stopped, UserError


@pytest.fixture(scope="module")
def lots(tmp_path_factory):
    """Seven pictures with one rectangle each, of the classes 0, 1, 2, 0, 1, 2, 0; -> folder, {name: (class, box)}."""
    root, truth = tmp_path_factory.mktemp("lots"), {}
    for i in range(7):
        k, seed = i % 3, 0
        while True:
            picture, found, classes = lot((i, seed, 9), 96, 96, most=1)
            seed += 1
            if classes.tolist() == [k]:
                break
        Image.fromarray(picture).save(root / f"lot {i}.png")
        truth[f"lot {i}.png"] = k, found[0].tolist()
    return root, truth


def pseudo(script, lots, least, out="out"):
    weights(imgsz=96)  # of the category ids 1, 2, 7
    script(predict, *FLAGS, "--weights", "net.pt", "--source", lots[0], "--out", out, "--pseudo", least,
           "--no-overlays")


@pytest.mark.parametrize("least, kinds", [(0.5, (0, 1, 2)), (0.6, (0, 1)), (0.8, (0,))])
def test_boxes_that_are_sure(script, lots, finder, capsys, least, kinds):  # noqa: F811
    pseudo(script, lots, least)
    want = {name: (k, box) for name, (k, box) in lots[1].items() if k in kinds}
    assert f"pseudo labels of {len(want)} images, {len(want)} boxes: train_det.py --extra-data out/pseudo" in \
        capsys.readouterr().out
    assert {path.name: path.resolve() for path in Path("out/pseudo/train/images").iterdir()} == {
        name: lots[0].resolve() / name for name in want}
    found = json.loads(Path("out/pseudo/train/label/Train.json").read_text())
    assert found["categories"] == [{"id": key, "name": name} for key, name in zip((1, 2, 7), NAMES)]
    name_of = {image["id"]: image["file_name"] for image in found["images"]}
    assert all((image["height"], image["width"]) == (96, 96) for image in found["images"])
    for annotation in found["annotations"]:
        k, (x1, y1, x2, y2) = want.pop(name_of[annotation["image_id"]])
        assert annotation["category_id"] == (1, 2, 7)[k]
        assert annotation["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=1.5)
    assert not want and len(items_of("out", "coco.json")) == 7  # the prediction itself stays whole


def test_training_maps_classes_by_name_and_draws_by_weight(script, tmp_path, lots, finder, monkeypatch,  # noqa: F811
                                                           capsys):
    pseudo(script, lots, 0.6)  # sedan and bus are in it
    root = edit(write_parking(tmp_path / "DATA", train=6, test=0, size=(48, 48), most=1), lambda data: data.update(
        categories=[{"id": 1, "name": "adult"}, {"id": 2, "name": "sedan"}, {"id": 3, "name": "bus"}]))
    sources, loaders, DetData, make = [], [], train_det.det.DetData, train_det.train_loader
    monkeypatch.setattr(train_det.det, "DetData", lambda *args, **options: sources.append(args)
                        or DetData(*args, **options))
    monkeypatch.setattr(train_det, "train_loader", lambda *args, **options: loaders.append(make(*args, **options))
                        or loaders[-1])
    capsys.readouterr()
    flags = ["--data", root, *TINY_DET, "--folds", 3]
    script(train_det, *flags, "--extra-data", "out/pseudo:4")
    files, found, classes, sizes = sources[0]
    assert f"9 images with {sum(map(len, found))} boxes to train, 2 to validate; 3 classes" in capsys.readouterr().out
    names = checkpoint.load("runs/det/exp/last.pt")["classes"]
    assert names == ["adult", "sedan", "bus"]
    for file, rows, k, size in list(zip(files, found, classes, sizes))[4:]:
        label, box = lots[1][file.name]
        assert [names[i] for i in k] == [NAMES[label]] and rows[0] == pytest.approx(box, abs=1.5) and size == (96, 96)
    assert [file.parent.parent.parent.name for file in files] == ["DATA"] * 4 + ["pseudo"] * 5
    sampler, count = loaders[0].batch_sampler, Counter()
    for epoch in range(500):
        sampler.set_epoch(epoch)
        count.update((sampler.order() % 9).tolist())
    assert [count[i] / count.total() for i in range(9)] == pytest.approx([1 / 24] * 4 + [4 / 24] * 5, rel=0.12)
    monkeypatch.setattr(train_det, "train_loader", lambda *_, weights, **options: loaders.append(weights) or stop())
    with pytest.raises(Stopped):  # both together: their product
        script(train_det, *flags, "--extra-data", "out/pseudo:4", "--image-weights")
    classes = sources[2][2]
    balance = np.array([sum(1 / sum((other == k).sum() for other in classes) for k in c) for c in classes])
    balance += balance[balance > 0].min() / 10
    product = balance * ([1] * 4 + [4] * 5)
    assert loaders[1] / loaders[1].sum() == pytest.approx(product / product.sum())


def test_extra_boxes_of_unknown_classes(refused, script, tmp_path, lots, finder):  # noqa: F811
    pseudo(script, lots, 0.6)
    root = edit(write_parking(tmp_path / "DATA", train=4, test=0, size=(48, 48), most=1), lambda data: data.update(
        categories=[{"id": 1, "name": "sedan"}, {"id": 2, "name": "van"}, {"id": 3, "name": "adult"}]))
    refused(train_det, "--data", root, *TINY_DET, "--extra-data", "out/pseudo", says=["out/pseudo: ", "bus", "--data"])
    extra = labels.Labels(["x"], [(9, 9)], [np.zeros((2, 4))], [np.array([2, 0])], ["c", "unseen", "a"], [1, 2, 3],
                          [False])
    mapped = labels.with_names(extra, ["a", "b", "c"], "y")
    assert mapped.classes[0].tolist() == [0, 2] and mapped.names == ["a", "b", "c"]  # unseen has no boxes: no harm
    with pytest.raises(UserError, match="y: has boxes of c,"):
        labels.with_names(extra, ["a", "b"], "y")


def test_debug_runs_two_epochs_also_of_stages(script, tmp_path, monkeypatch):
    root, seen = write_parking(tmp_path / "DATA", train=20, test=0, size=(32, 32), most=1), []
    flags = ["--data", root, *TINY_DET, "--bs", 2, "--folds", 4, "--debug"]
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(train_det, "train_loader", lambda data, *_, **options: seen.append(len(data)) or stop())
        script(train_det, *flags)
    assert seen.pop() == 15  # of 20, five are held out: fewer than eight batches of two
    monkeypatch.setattr(train_det, "experiment", lambda args, *_: seen.append((args.preset, args.epochs)))
    script(train_det, *flags, "--stages", "30,20")
    script(train_det, *flags, "--epochs", 30)
    assert seen == [("scratch-low", 2), ("finetune", 2), ("default", 2)]


def stop():
    raise Stopped(0)


def test_averages_and_a_soup(script, parking, monkeypatch):
    """swa.pt is the mean of the two epochs' weights, and so is their soup; both predict."""
    script(train_det, "--data", parking, *TINY_DET, "--bs", 5, "--epochs", 2, "--folds", 0, "--swa", 1, "--no-ema",
           "--save-period", 1, "--lr", 0.01, "--optimizer", "adamp", "--lookahead", 2)
    ends = [checkpoint.load(f"runs/det/exp/epoch_{epoch}.pt") for epoch in (1, 2)]
    swa, mean = checkpoint.load("runs/det/exp/swa.pt"), {}
    parameters = {name for name, _ in YOLOv5(**swa["arch"]["kwargs"]).named_parameters()}
    for name, tensor in swa["model"].items():
        one, two = (end["model"][name] for end in ends)
        mean[name] = ((one.double() + two.double()) / 2).to(one.dtype)
        if name in parameters:
            torch.testing.assert_close(tensor, mean[name], atol=1e-6, rtol=1e-5)
    norms = [name for name in mean if name.endswith("running_mean")]
    assert norms and not any(torch.allclose(swa["model"][name], mean[name]) for name in norms[1:])
    nets, load = [], predict.load_nets
    monkeypatch.setattr(predict, "load_nets", lambda *args: nets.append(load(*args)) or nets[-1])
    flags = [*FLAGS, "--conf", 0.001, "--no-overlays"]
    script(predict, *flags, "--soup", "--weights", "runs/det/exp/epoch_1.pt", "runs/det/exp/epoch_2.pt", "--out", "out")
    script(predict, *flags, "--weights", "runs/det/exp/swa.pt", "--out", "swa")
    assert [len(each) for each in nets] == [1, 1]
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        for (net,), state in zip(nets, (swa | {"model": mean}, swa)):
            plain = checkpoint.load_weights(YOLOv5(**swa["arch"]["kwargs"]).eval(), state, "")
            torch.testing.assert_close(net(x), plain(x), atol=0.01, rtol=1e-3)  # pixels
        assert (nets[0][0](x) - nets[1][0](x)).abs().max() > 0.1
