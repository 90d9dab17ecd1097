"""Mixing, crops on objects, pseudo labels and extra data for segmentation; leaks and groups in the splits of all tasks.

Averages, losses, thresholds: test_playbook_seg.py. The other tasks: test_playbook_cls.py, test_playbook_det.py.
"""
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image

import predict
import train_cls
import train_det
import train_seg
from data import images, seg
from nets.unet import UNet
from tests.conftest import (TINY, TINY_CLS, TINY_DET, WILDFIRE, tile, warp_points, write_dirty, write_parking, write_tif,
                            write_wildfire)
from tests.harness import differences, read
from utils.ops import geometry
from utils.train import checkpoint
from utils.errors import Stopped
from utils.ops.decide import probabilities

TRAIN = [*TINY, "--amp", "off"]
PREDICT = ["--task", "seg", "--device", "cpu", "--amp", "off", "--workers", 0, "--no-overlays"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_wildfire(tmp_path_factory.mktemp("small") / "Wildfire", train=6, test=2, size=(32, 32))


# ---- crops on objects ------------------------------------------------------------------------------------------------
def test_a_crop_over_a_point_shows_it():
    """The canvas pixel that the matrix sends the point to has the point's own number, and lies within the canvas."""
    rng = np.random.default_rng(0)
    for case in range(500):
        height, width = rng.integers(1, (70, 9)[case % 2], 2)
        size, point = int(rng.integers(1, 25)), (int(rng.integers(height)), int(rng.integers(width)))
        matrix, border = WILDFIRE.view(rng, height, width, size, point)
        (x, y), = warp_points([(point[1] + 0.5, point[0] + 0.5)], matrix)
        assert 0 < x < size and 0 < y < size, (height, width, size, point)
        numbers = torch.arange(height * width).view(1, height, width)
        crop = geometry.warp(numbers, matrix, (size, size), border=border, mode="nearest")[0]
        assert crop[int(y), int(x)] == numbers[0][point]


@pytest.mark.parametrize("side, at, places", [(90, 45, 10), (7, 3, 10), (90, 2, 3)])
def test_it_may_lie_anywhere_in_the_crop(side, at, places):
    """All offsets are equally likely, in all eight orientations: close to the tile's corner only those within it."""
    rng, size, count = np.random.default_rng(1), 10, 4000
    draws = [WILDFIRE.view(rng, side, side, size, (at, at))[0] for _ in range(count)]
    turned = [tuple(matrix[:2, :2].round().astype(int).ravel()) for matrix in draws]
    seen = np.unique(turned, axis=0, return_counts=True)[1]
    assert len(seen) == 8 and seen.min() > 0.8 * count / 8
    # turned back: where the point lies in the crop as it was cut
    back = [np.linalg.inv(matrix) @ (size / 2, size / 2, 1) - (at + 0.5, at + 0.5, 0) for matrix in draws]
    cells = np.unique(np.round(back, 6)[:, :2], axis=0, return_counts=True)[1]
    assert len(cells) == places ** 2 and ((cells - count / len(cells)) ** 2).sum() / (count / len(cells)) < 1.6 * len(
        cells) + 15


def test_object_pixels_are_positive_and_count():
    rng, mask = np.random.default_rng(0), torch.zeros(9, 7, dtype=torch.uint8)
    mask[2:4, 1:3], mask[5, 5], mask[8] = 1, 3, 255
    data = seg.SegData([("i", "m")], p_object=1.0, ignore=255)
    drawn = [tuple(data.object_pixel(rng, mask)) for _ in range(400)]
    counts = {pixel: drawn.count(pixel) for pixel in drawn}
    assert counts.keys() == {(2, 1), (2, 2), (3, 1), (3, 2), (5, 5)} and min(counts.values()) > 50
    assert data.object_pixel(rng, mask.masked_fill(mask < 255, 0)) is data.object_pixel(rng, mask * 0) is None
    assert seg.SegData([("i", "m")]).object_pixel(rng, mask) is None
    some = seg.SegData([("i", "m")], p_object=0.3, ignore=255)
    assert 0.2 < np.mean([some.object_pixel(rng, mask) is not None for _ in range(400)]) < 0.4


# ---- mixing ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def dots(tmp_path_factory):
    """Eight tiles of 64 x 64 with an object of four pixels: crops of 16 x 16 hardly ever meet it."""
    root = tmp_path_factory.mktemp("dots")
    for folder in ("train_img", "train_mask"):
        (root / folder).mkdir()
    for i in range(8):
        image, mask = tile((i, 5))[0], np.zeros((64, 64), np.uint8)
        mask[9 + 5 * i:11 + 5 * i, 50 - 3 * i:52 - 3 * i] = 1
        write_tif(root / f"train_img/{i}.tif", image)
        write_tif(root / f"train_mask/{i}.tif", mask)
    return root


MIXES = [["--mixup", 1, "--gridmask", 1, "--p-object", 1, "--swa", 0.5, "--optimizer", "radam"],
         ["--cutmix", 1, "--cutout", 1, "--aux-cls", 1, "--optimizer", "adam"]]


@pytest.mark.parametrize("flags", MIXES, ids=["mixup", "cutmix"])
def test_mixed_runs_are_what_they_say_and_resume_to_the_same_bits(script, dots, monkeypatch, flags):
    flags = ["--data", dots, *TRAIN, "--imgsz", 16, "--epochs", 2, "--folds", 0, "--no-ema", "--loss", "bce", *flags]
    mixed, mix, stop = [], train_seg.mix.for_masks, iter(())

    def watched(x, masks, **options):
        if next(stop, False):
            os.kill(os.getpid(), signal.SIGTERM)
        found = mix(x, masks, **options)
        mixed.append((x, masks, *found, {k[2:] for k, p in options.items() if p == 1}))
        return found

    monkeypatch.setattr(train_seg.mix, "for_masks", watched)
    script(train_seg, *flags, "--name", "straight")
    for x, masks, changed, targets, kinds in mixed:
        assert kinds == {flag[2:] for flag in flags if flag in ("--mixup", "--cutmix", "--gridmask", "--cutout")}
        assert (x != changed).flatten(1).any(1).all()
        assert sum(float(share) for _, share in targets) == pytest.approx(1) and len(targets) == 1 + ("mixup" in kinds)
        assert "--p-object" not in flags or masks.flatten(1).any(1).all()
    assert len(mixed) == 4 + 2 * ("--swa" in flags)
    stop = iter([False, False, True])  # amid the second epoch
    with pytest.raises(Stopped):
        script(train_seg, *flags, "--name", "broken")
    assert checkpoint.load("runs/seg/broken/last.pt")["step"] == 3
    script(train_seg, "--resume", "runs/seg/broken")
    for name in ("last.pt", *(("swa.pt",) if "--swa" in flags else ())):
        straight, broken = (read(f"runs/seg/{run}/{name}") for run in ("straight", "broken"))
        assert differences(straight, broken) == [] and straight["step"] == 4
    rows = straight["history"]
    assert all(np.isfinite(row["loss"]) for row in rows) and ("aux_cls_loss" in rows[0]) == ("--aux-cls" in flags)
    if "--aux-cls" in flags:
        assert all(row["loss"] == pytest.approx(row["bce_loss"] + row["aux_cls_loss"], rel=1e-5) for row in rows)


# ---- pseudo labels and extra data ------------------------------------------------------------------------------------
def checkpoint_of(root, path="net.pt", *, classes=1, **changes):
    """A checkpoint of a net that has learned nothing but is of many minds: logits of mean 0 that differ much between
    the pixels of the test images. -> the probabilities {file: (K, H, W)}"""
    torch.manual_seed(classes)
    kwargs = dict(in_chans=7, classes=classes, conv0=[8], decoder=[8, 8, 8, 8])
    net, files = UNet(**kwargs).eval(), sorted((root / "test_img").iterdir())
    with torch.no_grad():
        logits = {file: net(images.read(file)[None, :7].float() / 65535)[0] for file in files}
        every = torch.cat([z.flatten(1) for z in logits.values()], 1)
        mean, spread = every.mean(1), every.std() / (1.5 if classes == 1 else 6)
        net.head.bias.sub_(mean).div_(spread)
        net.head.weight.div_(spread)
    checkpoint.save(path, {
        "task": "seg", "arch": {"name": "unet.UNet", "kwargs": kwargs}, "classes": classes, "args": {"data": str(root)},
        "input": {"bands": list(range(1, 8)), "pixel_scale": 65535.0, "imgsz": 32, "mean_planes": False, "resize": False},
        "model": net.state_dict(), "ema": None} | changes)
    return {file: probabilities((z - mean[:, None, None])[None] / spread)[0].numpy() for file, z in logits.items()}


def pixels(path):
    with rasterio.open(path, driver="GTiff") as file:
        return file.read(1)


@pytest.mark.parametrize("classes", [1, 3])
def test_unsure_pixels_are_left_out(script, small, classes):
    probs = checkpoint_of(small, classes=classes)
    own = {file: np.maximum(p, 1 - p)[0] if classes == 1 else p.max(0) for file, p in probs.items()}
    least = max(float(np.median(list(own.values()))), 0.5)
    script(predict, *PREDICT, "--weights", "net.pt", "--out", "out", "--pseudo", least)
    for file, p in probs.items():
        sure = np.abs(own[file] - least) > 1e-5
        labels = np.where(own[file] < least, 255, (p[0] > 0.5) if classes == 1 else p.argmax(0))
        found = pixels(f"out/pseudo/train_mask/{file.stem}.tif")
        assert (found == labels)[sure].all() and sure.mean() > 0.99 and 0.1 < (found == 255).mean() < 0.9
        assert Path(f"out/pseudo/train_img/{file.name}").resolve() == file.resolve()
        plain = pixels(f"out/masks/{file.stem}.tif")  # the prediction itself stays whole
        assert set(np.unique(plain)) <= set(range(max(classes, 2))) and (plain == found)[found < 255].all()


def test_unsure_pixels_of_windows(script, small):
    """p > 1 - P and p > P, asked for as masks, leave out the same pixels."""
    checkpoint_of(small)
    flags = [*PREDICT, "--weights", "net.pt", "--tile", 16, "--overlap", 0.5]
    script(predict, *flags, "--pseudo", 0.75, "--out", "half")
    script(predict, *flags, "--threshold", 0.25, "--out", "low")
    script(predict, *flags, "--threshold", 0.75, "--out", "high")
    for file in sorted((small / "test_img").iterdir()):
        half, low, high = (pixels(f"{out}/masks/{file.stem}.tif") for out in ("half", "low", "high"))
        found = pixels(f"half/pseudo/train_mask/{file.stem}.tif")
        assert (found == np.where(low > high, 255, half)).all() and 0.1 < (found == 255).mean() < 0.9


@pytest.mark.parametrize("threshold", [0.1, 0.9])
def test_a_pseudo_label_is_the_class_that_the_net_is_sure_of(script, small, threshold):
    """Whatever the threshold of the mask: at 0.9, a pixel of probability 0.8 is no sure background."""
    probs = checkpoint_of(small, threshold=threshold)
    script(predict, *PREDICT, "--weights", "net.pt", "--out", "out", "--pseudo", 0.75)
    for file, p in probs.items():
        found = pixels(f"out/pseudo/train_mask/{file.stem}.tif")
        assert not (found[p[0] > 0.7501] == 0).any() and not (found[p[0] < 0.2499] == 1).any()
        assert (found[np.abs(p[0] - 0.5) < 0.2499] == 255).all()


def test_training_reads_pseudo_labels_and_draws_them_by_weight(script, small, monkeypatch, capsys):
    checkpoint_of(small)
    script(predict, *PREDICT, "--weights", "net.pt", "--out", "out", "--pseudo", 0.7)
    assert "pseudo labels: train_seg.py --extra-data out/pseudo" in capsys.readouterr().out
    loaders, make = [], train_seg.train_loader
    monkeypatch.setattr(train_seg, "train_loader", lambda *args, **options: loaders.append(make(*args, **options))
                        or loaders[-1])
    flags = ["--data", small, *TRAIN, "--bs", 8, "--folds", 3, "--repeat", 2]
    script(train_seg, *flags, "--extra-data", "out/pseudo:2.5", small)
    assert "10 tiles to train, 2 to validate" in capsys.readouterr().out  # its own held-out ones are not seen again
    data, sampler = loaders[0].dataset, loaders[0].batch_sampler
    sources = [Path(image).parent.parent for image, _ in data.paired]
    assert sources == [small] * 4 + [Path("out/pseudo")] * 2 + [small] * 4 and len(data) == 20
    count = np.zeros(10)
    for epoch in range(500):
        sampler.set_epoch(epoch)
        np.add.at(count, sampler.order() % 20 % 10, 1)
    assert count / count.sum() == pytest.approx(np.where(np.array(sources) == small, 1, 2.5) / 13, rel=0.1)
    assert any((data[0, i]["mask"] == 255).any() for i in (4, 5))
    assert np.isfinite(checkpoint.load("runs/seg/exp/last.pt")["history"][-1]["loss"])
    monkeypatch.setattr(train_seg, "train_loader", lambda *args, weights, **options: loaders.append(weights) or stop())
    with pytest.raises(Stopped):
        script(train_seg, *flags, "--extra-data", "out/pseudo")
    assert set(loaders[-1]) == {1.0}  # all alike: every tile once in an epoch


def stop(*_, **options):
    raise Stopped(0)


def test_extra_masks_that_do_not_fit(refused, tmp_path, small):
    write_wildfire(tmp_path / "more", train=2, test=0, size=(32, 32), classes=3)
    flags = ["--data", small, *TRAIN, "--extra-data"]
    refused(train_seg, *flags, "more:0.5", says=["train_mask_0.tif: has the value 2", "--classes"])
    shutil.rmtree(tmp_path / "more/train_mask")
    refused(train_seg, *flags, "more", says="more/train_mask")
    refused(train_seg, *flags, "more:0", says="--extra-data")


# ---- splits ----------------------------------------------------------------------------------------------------------
def seg_names(root):
    write_wildfire(root, train=6, test=0, size=(32, 32))
    return {f"train_img_{i}": root / f"train_img/train_img_{i}.tif" for i in range(6)}


def det_names(root):
    write_parking(root, train=6, test=0, size=(48, 48), most=1)
    return {f"train/images/{i:03}.jpg": root / f"train/images/{i:03}.jpg" for i in range(6)}


def cls_names(root):
    write_dirty(root, train=6, test=0)
    return {f"dirty_mnist_2nd/{i:05}.png": root / f"dirty_mnist_2nd/{i:05}.png" for i in range(6)}


TASKS = pytest.mark.parametrize("module, flags, make", [
    (train_seg, TRAIN, seg_names), (train_det, TINY_DET, det_names), (train_cls, TINY_CLS, cls_names)],
    ids=["seg", "det", "cls"])


@TASKS
def test_a_copy_on_the_other_side_is_told_once(script, tmp_path, monkeypatch, capsys, module, flags, make):
    file_of = make(tmp_path / "data")
    names = list(file_of)
    shutil.copy(file_of[names[0]], file_of[names[4]])
    (tmp_path / "folds.json").write_text(json.dumps({name: int(i >= 2) for i, name in enumerate(names)}))
    (tmp_path / "groups.csv").write_text("name,group\n" + "".join(f"{name},{i // 2}\n" for i, name in enumerate(names)))
    flags = ["--data", tmp_path / "data", *flags]
    if module is train_cls:
        script(module, *flags, "--folds", "folds.json", "--name", "whole")
        assert capsys.readouterr().out.count("warning: ") == 1
        script(module, "--resume", "runs/cls/whole", "--epochs", 2)
        assert "warning" not in capsys.readouterr().out
    monkeypatch.setattr(module, "train_loader", stop)  # all has been said by then
    with pytest.raises(Stopped):
        script(module, *flags, "--folds", "folds.json")
    out = capsys.readouterr().out
    assert out.count("warning: ") == 1 and "warning: 1 of 2 validation files are copies of training files" in out
    assert f"such as {file_of[names[0]]} = {file_of[names[4]]};" in out
    with pytest.raises(Stopped):  # the folds are those of the groups, which keep what belongs together
        script(module, *flags, "--folds", 3, "--groups", "groups.csv", "--name", "grouped")
    fold_of = json.loads(next(tmp_path.glob("runs/*/grouped/folds.json")).read_text())
    assert [fold_of[names[i]] == fold_of[names[i + 1]] for i in (0, 2, 4)] == [True] * 3
    assert sorted(fold_of.values()) == [0, 0, 1, 1, 2, 2] and "groups are on both" not in capsys.readouterr().out
    (tmp_path / "apart.json").write_text(json.dumps({name: i % 2 for i, name in enumerate(names)}))
    with pytest.raises(Stopped):
        script(module, *flags, "--folds", "apart.json", "--groups", "groups.csv")
    assert "warning: 3 groups are on both sides of the split" in capsys.readouterr().out


def training_set(module, data):
    """-> [(image file, its label, as what can be compared)] of the data set that a loader is made for."""
    if module is train_seg:
        return [(image, Path(mask).read_bytes()) for image, mask in data.paired]
    if module is train_det:
        return [(file, rows.tolist()) for file, rows in zip(data.files, data.labels)]
    return [(file, row.tolist()) for file, row in zip(data.source.files, data.source.labels)]


@TASKS
def test_copies_of_validation_images_in_extra_data(script, tmp_path, monkeypatch, capsys, module, flags, make):
    """Under other names, in other bytes, through links; of what stays, each image keeps its labels and weight."""
    file_of, more, other = make(tmp_path / "data"), make(tmp_path / "more"), make(tmp_path / "other")
    files, theirs, others = (list(found.values()) for found in (file_of, more, other))
    (tmp_path / "folds.json").write_text(json.dumps({name: int(i >= 2) for i, name in enumerate(file_of)}))
    contents = [file.read_bytes() for file in files]  # those of `more` and `other` are the same: the seeds are
    for target, content in ((theirs[0], contents[2]), (theirs[1], contents[3] + b"0"), (theirs[2], contents[0] + b"0"),
                            (others[0], contents[4] + b"0"), (others[1], contents[5])):
        target.write_bytes(content)
    theirs[3].unlink()
    theirs[3].symlink_to(files[1])
    seen = []
    monkeypatch.setattr(module, "train_loader", lambda data, *_, weights, **options: seen.append((data, weights))
                        or stop())
    flags = ["--data", tmp_path / "data", *flags, "--folds", "folds.json", "--extra-data"]
    for extra in (["more:3", "other:5"], ["more"], ["other"], [tmp_path / "data"]):
        with pytest.raises(Stopped):
            script(module, *flags, *extra)
    lines = [line for line in capsys.readouterr().out.splitlines() if "copies of validation images" in line]
    assert len(lines) == 3 and lines[0] == lines[1]
    assert lines[0].startswith("more: 2 of 6 images are ") and lines[0].endswith(str(theirs[2].relative_to(tmp_path)))
    assert lines[2].startswith(f"{tmp_path / 'data'}: 2 of 6 images are ")
    (data, weights), *rest = seen
    found, stay = training_set(module, data), [theirs[i] for i in (0, 1, 4, 5)]
    assert [(tmp_path / file) for file, _ in found] == files[2:] + stay + others
    assert list(weights) == [1.0] * 4 + [3.0] * 4 + [5.0] * 6
    with monkeypatch.context() as patch:  # the labels that the same files have without the copies
        patch.setattr(module.folds, "without_copies", lambda files, *_: list(range(len(files))))
        with pytest.raises(Stopped):
            script(module, *flags, "more", "other")
    label_of = {tmp_path / file: label for file, label in training_set(module, seen[-1][0])}
    assert len(label_of) == 16 and len({str(label) for label in label_of.values()}) >= 4
    assert all(label == label_of[tmp_path / file] for file, label in found)
    assert [len(training_set(module, data)) for data, _ in rest[:3]] == [8, 10, 8]
    assert all(set(weights) == {1.0} for _, weights in rest[:3])


@TASKS
def test_extra_data_of_nothing_new(script, tmp_path, monkeypatch, capsys, module, flags, make):
    """All images are copies of the one that is validated: what is left is trained on."""
    file_of, more, seen = make(tmp_path / "data"), make(tmp_path / "more"), []
    first = next(iter(file_of.values()))
    for file in more.values():
        shutil.copy(first, file)
    (tmp_path / "folds.json").write_text(json.dumps({name: int(i > 0) for i, name in enumerate(file_of)}))
    monkeypatch.setattr(module, "train_loader", lambda data, *_, weights, **options: seen.append((data, weights))
                        or stop())
    with pytest.raises(Stopped):
        script(module, "--data", tmp_path / "data", *flags, "--folds", "folds.json", "--extra-data", "more:3")
    assert "more: 6 of 6 images are copies" in capsys.readouterr().out
    assert len(training_set(module, seen[0][0])) == 5 and set(seen[0][1]) == {1.0}


@pytest.mark.parametrize("ignore", [None, 9])
def test_unsure_pixels_fit_the_masks_that_there_are(script, small, tmp_path, ignore):
    """In other masks 255 may be an object, or another value may be ignored: the files declare their own."""
    checkpoint_of(small)
    script(predict, *PREDICT, "--weights", "net.pt", "--out", "out", "--pseudo", 0.9)
    for path in Path("out/pseudo/train_mask").iterdir():
        found = pixels(path)
        assert set(np.unique(found)) <= {0, 1, 255} and (found == 255).any()
        assert (seg.read_mask(path, 1, ignore).numpy() == found).all()
    Image.fromarray(np.array([[0, 255]], np.uint8)).save("base.png")
    assert seg.read_mask("base.png", 1, ignore).tolist() == [[0, 1]]
