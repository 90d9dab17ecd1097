"""train_seg.py and predict.py from files to files, on tiny tiles."""
import csv
import json
import pickle
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.features import rasterize

import predict
import train_seg
from data import images, pairs, seg
from nets.unet import UNet
from tests.conftest import TINY, tile, write_tif, write_wildfire
from utils import report
from utils.errors import UserError
from utils.ops import decide
from utils.train import checkpoint


def masks_of(folder):
    with open(Path(folder) / "y_pred.pkl", "rb") as file:
        return pickle.load(file)  # our own submission, as the competition's server loads it


@pytest.fixture(scope="module")
def trained(wildfire, tmp_path_factory):
    """A short run on the shared tiles; its folder."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["train_seg.py", "--data", str(wildfire), *TINY, "--epochs", "10", "--repeat", "4",
                                   "--folds", "4", "--lr", "3e-3", "--schedule", "cosine", "--save-period", "5"])
        train_seg.main()
    return folder / "runs/seg/exp"


def test_a_run_learns_and_leaves_its_records(trained):
    assert {p.name for p in trained.iterdir()} >= {
        "last.pt", "best.pt", "epoch_5.pt", "epoch_10.pt", "results.csv", "results.png", "results.json", "folds.json",
        "args.json", "train_batch.png", "val.png", "samples.csv", "review.png", "run.json"}
    rows = list(csv.DictReader(open(trained / "results.csv")))
    assert [int(row["epoch"]) for row in rows] == list(range(1, 11))
    assert float(rows[-1]["loss"]) < 0.7 * float(rows[0]["loss"])
    scores = json.loads((trained / "results.json").read_text())["last with flips"]
    assert "Classes" not in json.loads((trained / "results.json").read_text())  # there is one
    assert scores["iou"] > 0.5  # a ninth of every tile is positive: all-positive scores 0.11
    best = checkpoint.load(trained / "best.pt")
    assert best["history"][-1]["iou"] == max(row["iou"] for row in best["history"]) and "optimizer" not in best
    assert best["score"] == "iou" and 0 < best["threshold"] < 1


@pytest.mark.parametrize("flags", [
    ["--folds", "0"], ["--loss", "lovasz_elu", "bce=0.5", "--accumulate", "2"],
    ["--no-ema", "--clip", "1", "--gain", "1"], ["--cache", "disk", "--grad-checkpoint"],
    ["--cache", "ram", "--schedule", "plateau", "--bands", "all", "--no-mean-planes"],
    ["--optimizer", "sgd", "--schedule", "linear", "--warmup-epochs", "0.5", "--amp", "off"], ["--workers", "2"],
    ["--schedule", "step", "--epochs", "2", "--patience", "1", "--optimizer", "adam", "--conv0"]])
def test_flags(script, wildfire, flags):
    script(train_seg, "--data", wildfire, *TINY, *flags)
    state = checkpoint.load("runs/seg/exp/last.pt")
    assert state["step"] >= 1 and np.isfinite(state["history"][-1]["loss"])
    assert ("iou" in state["history"][-1]) == (flags != ["--folds", "0"])


def test_several_classes_and_ignored_pixels(script, tmp_path):
    root = write_wildfire(tmp_path / "data", classes=3)
    for path in (root / "train_mask").iterdir():
        with rasterio.open(path, "r+", driver="GTiff") as file:
            mask = file.read(1)
            mask[:8] = 255
            file.write(mask, 1)
    script(train_seg, "--data", root, *TINY, "--classes", 3, "--ignore", 255, "--loss", "ce", "lovasz", "--epochs", 2)
    assert {"miou", "iou_0"} <= checkpoint.load("runs/seg/exp/last.pt")["history"][-1].keys()
    found = json.loads(Path("runs/seg/exp/results.json").read_text())
    last, by_class = found["last with flips"], found["Classes"]
    assert [row["class"] for row in by_class] == [0, 1, 2] and [*found][2] == "Classes"
    assert [row["iou"] for row in by_class] == [last[f"iou_{k}"] for k in range(3)]
    script(predict, "--task", "seg", "--workers", 0)
    assert all(set(np.unique(mask)) <= {0, 1, 2} for mask in masks_of("runs/seg/exp/predict").values())


def test_resume_is_the_straight_run(script, wildfire):
    flags = ["--data", wildfire, *TINY, "--loss", "bce", "--accumulate", 2, "--repeat", 2]
    script(train_seg, *flags, "--epochs", 1, "--schedule", "constant", "--no-ema", "--name", "broken")
    script(train_seg, "--resume", "runs/seg/broken", "--epochs", 2)
    script(train_seg, *flags, "--epochs", 2, "--schedule", "constant", "--no-ema", "--name", "straight")
    broken, straight = (checkpoint.load(f"runs/seg/{name}/last.pt") for name in ("broken", "straight"))
    assert broken["step"] == straight["step"] > 2
    assert all(torch.equal(broken["model"][name], straight["model"][name]) for name in straight["model"])


def test_prediction_writes_the_submission_and_georeferenced_masks(script, wildfire, trained):
    script(predict, "--task", "seg", "--tta", "--polygons", "--workers", 0, "--weights", trained / "best.pt",
           "--out", "out")
    masks = masks_of("out")
    assert sorted(masks) == sorted(p.name for p in (wildfire / "test_img").iterdir())
    for name, mask in masks.items():
        assert mask.dtype == np.uint8 and mask.shape == (64, 64) and set(np.unique(mask)) <= {0, 1}
        with rasterio.open(wildfire / "test_img" / name) as source, rasterio.open(f"out/masks/{name}") as written:
            assert (written.crs, written.transform) == (source.crs, source.transform)
            assert (written.read(1) == mask).all()
            collection = json.loads(Path(f"out/polygons/{Path(name).stem}.geojson").read_text())
            shapes = [(f["geometry"], 1) for f in collection["features"]]
            drawn = rasterize(shapes, mask.shape, transform=source.transform) if shapes else np.zeros_like(mask)
            assert (drawn == mask).all() and collection["crs"]["properties"]["name"] == source.crs.to_string()
        assert Image.open(f"out/overlays/{Path(name).stem}.png").size == (64, 64)
        truth = tile((int(Path(name).stem.rsplit("_", 1)[1]), True))[1]  # how conftest made it
        assert (mask & truth).sum() / (mask | truth).sum() > 0.4


def test_tta_is_the_mean_over_flips_of_the_unfused_net(trained, wildfire):
    state = checkpoint.load(trained / "best.pt")
    args, cpu = Namespace(task="seg", amp="off", compile=False), torch.device("cpu")
    path = sorted((wildfire / "test_img").iterdir())[0]
    raw = images.read(path, state["input"]["bands"])[None]
    with torch.inference_mode():
        [member] = predict.load_members(args, "seg", cpu, [trained / "best.pt"])
        got = decide.segment(member.net, member.inputs(raw), decide.VIEWS["seg"])[0, 0].numpy()
        net = checkpoint.load_weights(UNet(**state["arch"]["kwargs"]).eval(), state, "x")
        x = raw[0, :7].numpy().astype(np.float64) / 65535
        planes = [np.full((64, 64), band[band > 0].mean() if (band > 0).any() else 0) for band in x]
        x = np.concatenate((x, planes)).astype(np.float32)
        want = 0
        for axes in ((), (2,), (1,), (1, 2)):
            logit = net(torch.from_numpy(np.flip(x, axes).copy())[None])[0].double().numpy()
            want = want + np.flip(1 / (1 + np.exp(-logit)), axes)[0] / 4
    assert np.abs(got - want).max() < 1e-4
    assert np.ptp(want) > 0.1


def test_an_ensemble_is_the_mean_of_its_members(script, trained, wildfire, monkeypatch):
    paths, seen, masks = [trained / name for name in ("best.pt", "epoch_5.pt")], [], decide.masks
    monkeypatch.setattr(decide, "masks", lambda probs, *rest: seen.append(probs.clone()) or masks(probs, *rest))
    for i, weights in enumerate((paths[:1], paths[1:], paths)):
        script(predict, "--task", "seg", "--device", "cpu", "--amp", "off", "--workers", 0, "--weights", *weights,
               "--source", sorted((wildfire / "test_img").iterdir())[1], "--out", f"out{i}")
    one, two, both = seen
    assert (one - two).abs().max() > 1e-3
    torch.testing.assert_close(both, (one + two) / 2)


def test_a_band_that_no_net_needs_may_be_damaged(script, tmp_path, trained):
    """As in training: of ten bands the nets see seven."""
    image, _ = tile(5, 80, 96)
    for name in ("good", "bad"):
        image = image.astype(np.float32)
        image[8, 3, 5] = np.nan if name == "bad" else 1
        write_tif(tmp_path / f"{name}.tif", image)
        for size in (512, 64):  # whole, in windows
            script(predict, "--task", "seg", "--weights", trained / "best.pt", "--source", f"{name}.tif", "--workers",
                   0, "--tile", size, "--out", f"{name}{size}")
    for size in (512, 64):
        assert (masks_of(f"good{size}")["good.tif"] == masks_of(f"bad{size}")["bad.tif"]).all()


@pytest.mark.parametrize("height, width", [(50, 70), (17, 33), (1, 5), (130, 300)])
def test_any_size_through_windows_or_whole(script, tmp_path, trained, height, width):
    image, _ = tile(5, max(height, 3), max(width, 3))
    write_tif(tmp_path / "scene.tif", image[:, :height, :width])
    flags = ["--task", "seg", "--weights", trained / "best.pt", "--source", tmp_path / "scene.tif",
             "--workers", 0, "--amp", "off"]
    script(predict, *flags, "--tile", 512, "--out", "whole")
    script(predict, *flags, "--tile", 64, "--overlap", 0.5, "--out", "windows")
    whole, windows = masks_of("whole")["scene.tif"], masks_of("windows")["scene.tif"]
    assert whole.shape == windows.shape == (height, width)
    if max(height, width) <= 64:
        assert (whole == windows).all()
    else:  # other surroundings and other mean planes at the windows' borders
        assert (whole == windows).mean() > 0.9


def test_pictures_without_a_place_on_earth(script, tmp_path):
    for folder in ("train_img", "train_mask", "test_img"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for i in range(6):
        image, mask = tile(i, bands=3)
        picture = (image >> 8).astype(np.uint8).transpose(1, 2, 0)
        Image.fromarray(picture).save(tmp_path / f"data/train_img/{i}.png")
        Image.fromarray(mask * 255).save(tmp_path / f"data/train_mask/{i}.png")
        Image.fromarray(picture).save(tmp_path / f"data/test_img/{i}.{'jpg' if i % 2 else 'png'}")
    script(train_seg, "--data", tmp_path / "data", *TINY, "--bands", "all")
    script(predict, "--task", "seg", "--workers", 0, "--polygons")
    assert sorted(masks_of("runs/seg/exp/predict")) == ["0.png", "1.jpg", "2.png", "3.jpg", "4.png", "5.jpg"]


@pytest.mark.slow
def test_the_newest_run_and_a_fresh_folder_are_found(script, wildfire):
    for _ in range(2):
        script(train_seg, "--data", wildfire, *TINY)
    script(predict, "--task", "seg", "--workers", 0)
    script(predict, "--task", "seg", "--workers", 0)
    assert Path("runs/seg/exp2/predict2/y_pred.pkl").exists() and not Path("runs/seg/exp/predict").exists()
    with pytest.raises(UserError, match="no run"):
        script(predict, "--task", "seg", "--project", "elsewhere")


def test_the_smallest_epoch_still_trains_on_every_tile(wildfire):
    data = seg.SegData(pairs.of_folders(wildfire / "train_img", wildfire / "train_mask"), repeat=3)
    assert len(data) == 24 and data[0, 9]["index"] == 1


def test_whole_tiles_resized_and_masks_resized_back(script, tmp_path):
    """Tiles of two shapes, which the net sees at one size; the masks have the tiles' sizes."""
    data = write_wildfire(tmp_path / "Wildfire", train=6, test=2, size=(40, 72))
    script(train_seg, "--data", data, *TINY, "--resize", "--folds", 3)
    write_tif(data / "test_img/test_img_9.tif", tile(9, 100, 30)[0])
    script(predict, "--task", "seg", "--tta", "--workers", 0, "--device", "cpu")
    shapes = {name: mask.shape for name, mask in masks_of("runs/seg/exp/predict").items()}
    assert shapes == {"test_img_0.tif": (40, 72), "test_img_1.tif": (40, 72), "test_img_9.tif": (100, 30)}


def test_noisy_tiles_are_not_trained_on(script, tmp_path, capsys):
    data = write_wildfire(tmp_path / "Wildfire", train=9, test=1)
    for fold in range(3):
        script(train_seg, "--data", data, *TINY, "--folds", 3, "--fold", fold, "--name", f"fold{fold}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["report", "noise", *(f"runs/seg/fold{k}" for k in range(3))])
        report.main()
    ranked = [row["name"] for row in csv.DictReader(open("noise.csv"))]
    assert len(set(ranked)) == 9
    split = json.loads(Path("runs/seg/fold0/folds.json").read_text())
    lost = sum(split[Path(name).stem] != 0 for name in ranked[:4])
    capsys.readouterr()
    script(train_seg, "--data", data, *TINY, "--folds", "runs/seg/fold0/folds.json", "--drop-noisy", "noise.csv:4")
    assert lost and f"{6 - lost} tiles to train, 3 to validate" in capsys.readouterr().out


def test_show_augment_draws_and_does_not_train(script, wildfire):
    script(train_seg, "--data", wildfire, *TINY, "--show-augment", "--cutmix", 1, "--gridmask", 1)
    run = Path("runs/seg/exp")
    assert Image.open(run / "augment.png").size[0] > 6 * 32 and not (run / "last.pt").exists()
