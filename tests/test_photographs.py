"""Recipes: what the data decide, what stands in the checkpoint, how prediction follows it, and weights' normalisation."""
import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import predict
import train_cls
import train_det
import train_seg
from data import seg, units
from data.augment import of_flags
from nets import pretrained
from nets.regnet import RegNetX
from tests.conftest import TINY_CLS, TINY_DET, write_dirty, write_parking, write_tif, write_wildfire
from tests.test_runs import free, give_locks_back  # noqa: F401 (a fixture)
from utils.ops import decide
from utils.train import checkpoint
from utils.train.args import _given, setup_run

SCRIPTS = {"seg": (train_seg, "wildfire"), "det": (train_det, "parking-lots"), "cls": (train_cls, "dirty-mnist")}
SMALL = "--imgsz 32 --bs 4 --epochs 1 --workers 0 --device cpu --amp off --decoder 8 8 8 8 8".split()


def write_streets(root, count=6, mode="RGB", suffix="png"):
    """Photographs and masks of three classes: the lower half is class 1, a square in it class 2; pixels of 3 are ignored."""
    for folder in ("train_img", "train_mask", "test_img"):
        (root / folder).mkdir(parents=True)
    for i in range(count):
        rng = np.random.default_rng(i)
        mask = np.zeros((40, 48), np.uint8)
        mask[20:], mask[0, 0] = 1, 3
        y, x = rng.integers(20, 30), rng.integers(0, 38)
        mask[y:y + 8, x:x + 8] = 2
        image = np.stack([mask * 60 + 40, 200 - mask * 50, mask * 20 + 80], -1) + rng.integers(0, 20, (40, 48, 3))
        image = Image.fromarray(image.astype(np.uint8)).convert(mode)
        image.save(root / f"train_img/{i}.{suffix}")
        image.save(root / f"test_img/{i}.{suffix}")
        Image.fromarray(mask).save(root / f"train_mask/{i}.png")
    return root


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    return write_streets(tmp_path_factory.mktemp("photographs") / "streets")


# ---- what the data say of themselves ---------------------------------------------------------------------------------
@pytest.mark.parametrize("mode, suffix, expected", [
    ("RGB", "png", True), ("RGB", "jpg", True), ("RGBA", "png", True), ("L", "png", False), ("L", "jpg", False),
    ("CMYK", "jpg", False), ("RGB", "webp", True)])
def test_photographs_have_three_bands_of_8_bits(tmp_path, mode, suffix, expected):
    root = write_streets(tmp_path / "data", mode=mode, suffix=suffix)
    assert units.photographs(root) is expected
    (root / "pairs.csv").write_text("image,mask\n")
    assert units.photographs(str(root / "pairs.csv")) is expected
    (root / "train_img" / f"0.{suffix}").write_bytes(b"x")  # a damaged file does not count
    assert units.photographs(root) is expected


def test_satellite_images_are_no_photographs(tmp_path):
    rgb = np.zeros((3, 8, 8), np.uint8)
    for name, array, place in (("a", rgb, {}), ("b", rgb.astype(np.uint16), {"crs": None, "transform": None}),
                               ("c", np.zeros((5, 8, 8), np.uint8), {"crs": None, "transform": None})):
        (tmp_path / name).mkdir()
        write_tif(tmp_path / name / "x.tif", array, **place)
        assert units.photographs(tmp_path / name) is False
    (tmp_path / "d").mkdir()
    write_tif(tmp_path / "d/x.tif", rgb, crs=None, transform=None)
    assert units.photographs(tmp_path / "d") is True
    for nothing in (tmp_path / "none", tmp_path / "none.csv", tmp_path):
        assert units.photographs(nothing) in (False, True)


def test_the_competitions_data_are_none_but_the_parking_lots(tmp_path):
    assert not units.photographs(write_wildfire(tmp_path / "Wildfire")) and not units.photographs(
        write_dirty(tmp_path / "resources"))
    assert units.photographs(write_parking(tmp_path / "DATA"))


# ---- recipes ---------------------------------------------------------------------------------------------------------
def started(module, tmp_path, monkeypatch, *flags):
    free()
    monkeypatch.setattr("sys.argv", ["x", "--project", str(tmp_path / "runs"), "--device", "cpu", *map(str, flags)])
    args, _, folder, resume = setup_run(module.make_parser(), photographs=units.photographs)
    return args, folder, resume


@pytest.mark.parametrize("task", SCRIPTS)
def test_photos_names_every_flag_of_the_competitions_recipe(task):
    """Else the competition's value would stay."""
    module, name = SCRIPTS[task]
    first, second = (set(_given(module.make_parser(), text.split())) for text in module.RECIPES.values())
    assert list(module.RECIPES) == [name, "photos"] and first <= second


def test_the_data_decide_unless_a_recipe_is_given(tmp_path, monkeypatch, capsys, streets):
    args, *_ = started(train_seg, tmp_path, monkeypatch, "--data", streets)
    assert (args.recipe, args.bs, args.rot90, args.conv0, args.bands) == ("photos", 8, False, [], None)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("recipe photos (in use): --bands all") for line in lines)
    assert any(line.startswith("recipe wildfire: --bands 1-7") for line in lines)
    args, *_ = started(train_seg, tmp_path, monkeypatch, "--data", streets, "--recipe", "wildfire", "--bs", 8)
    assert (args.recipe, args.bs, args.rot90, args.border) == ("wildfire", 8, True, ["reflect", "wrap"])
    args, *_ = started(train_seg, tmp_path, monkeypatch, "--data", tmp_path / "nothing")
    assert args.recipe == "wildfire"
    args, *_ = started(train_seg, tmp_path, monkeypatch, "--data", streets, "--rot90", "--zoom", 0.5, 2, "--bs", 4)
    assert args.recipe == "photos" and (args.rot90, args.zoom, args.bs) == (True, [0.5, 2], 4)  # each flag stays free


@pytest.mark.parametrize("task", ["det", "cls"])
def test_recipes_of_the_other_tasks(tmp_path, monkeypatch, task):
    module, name = SCRIPTS[task]
    given, chosen = (vars(started(module, tmp_path, monkeypatch, "--recipe", recipe)[0]) for recipe in (name, "photos"))
    differ = {flag for flag in given if given[flag] != chosen[flag]} - {"recipe"}
    assert differ == set() if task == "det" else {"rot90", "cutout", "zoom", "optimizer", "hflip"} <= differ


def test_a_resumed_run_keeps_its_recipe(tmp_path, monkeypatch, streets):
    """Also one of an earlier edition, which had none: it is the competition's."""
    state = {"task": "seg", "arch": {}, "model": {}, "optimizer": {}, "step": 5, "input": {}}
    args, folder, _ = started(train_seg, tmp_path, monkeypatch, "--data", streets, "--degrees", 7)
    checkpoint.save(folder / "last.pt", state | {"args": vars(args)})
    again, *_ = started(train_seg, tmp_path, monkeypatch, "--resume", folder)
    assert vars(again) == vars(args) | {"resume": str(folder)} and again.recipe == "photos"
    gone = {"recipe", "hflip", "rot90", "crop_padding", "border", "zoom", "stem_stride", "hue"}
    old = {flag: value for flag, value in vars(args).items() if flag not in gone}
    checkpoint.save(folder / "last.pt", state | {"args": old})
    again, *_ = started(train_seg, tmp_path, monkeypatch, "--resume", folder)
    assert (again.recipe, again.hflip, again.rot90, again.crop_padding, again.stem_stride, again.zoom) == (
        "wildfire", 0.5, True, 2.0, 1, [1, 1]) and again.degrees == 7


# ---- training and prediction -----------------------------------------------------------------------------------------
def test_photographs_are_segmented_by_their_recipe(script, streets, capsys):
    """The net, the input and the views that follow from it, in training and in prediction."""
    script(train_seg, "--data", streets, *SMALL, "--classes", 3, "--ignore", 3, "--folds", 3)
    state = checkpoint.load("runs/seg/exp/last.pt")
    assert state["arch"]["kwargs"]["stem_stride"] == 2 and state["arch"]["kwargs"]["conv0"] == []
    assert state["input"]["mean_planes"] is False and state["input"]["bands"] == [1, 2, 3]
    assert state["args"]["recipe"] == "photos" and decide.drawn_views("seg", state["args"]) == ("hflip",)
    capsys.readouterr()
    common = ["--task", "seg", "--device", "cpu", "--amp", "off", "--workers", 0, "--no-overlays"]
    script(predict, *common, "--tta", "--out", "all")
    assert "--tta hflip: the flips and turns that training drew" in capsys.readouterr().out
    script(predict, *common, "--tta", "hflip", "--out", "one")
    masks = [[np.asarray(Image.open(path)) for path in sorted(Path(out, "masks").iterdir())] for out in ("all", "one")]
    assert len(masks[0]) == 6 and all((a == b).all() for a, b in zip(*masks))


@pytest.mark.parametrize("task, flags, expected", [
    ("seg", {"hflip": 0.5, "rot90": True}, ("hflip", "vflip")), ("seg", {"hflip": 0.5, "rot90": False}, ("hflip",)),
    ("seg", {"hflip": 0.0, "vflip": 0.5, "rot90": False}, ("vflip",)), ("seg", {}, ("hflip", "vflip")),
    ("cls", {"hflip": 0.0, "rot90": True}, ("rot90", "rot180")), ("cls", {}, ("rot90", "rot180")),
    ("cls", {"hflip": 0.5, "rot90": False}, ("hflip",)), ("cls", {"hflip": 0.0, "rot90": False}, ()),
    ("cls", {"hflip": 0.5, "rot90": True}, ("hflip", "vflip", "rot90", "rot180"))], ids=str)
def test_views_are_those_that_training_drew(task, flags, expected):
    assert decide.drawn_views(task, flags) == expected


def test_stem_stride_reaches_the_net(script, streets):
    for stride, flags in ((1, ["--decoder", 8, 8, 8, 8]), (2, [])):
        script(train_seg, "--data", streets, *SMALL, "--classes", 3, "--ignore", 3, "--folds", 0, "--stem-stride", stride,
               *flags, "--name", stride)
        kwargs = checkpoint.load(f"runs/seg/{stride}/last.pt")["arch"]["kwargs"]
        assert kwargs["stem_stride"] == stride


# ---- normalisation ---------------------------------------------------------------------------------------------------
def test_segmentation_feeds_what_the_weights_expect(script, streets, tmp_path, command):
    """ImageNet's mean and deviation, in training and after it; not where --pixel-scale says otherwise, nor in a resumed
    run that began without."""
    torch.save(RegNetX(3).state_dict(), tmp_path / "timm.pth")
    flags = ["--data", streets, *SMALL, "--classes", 3, "--ignore", 3, "--folds", 0, "--weights", tmp_path / "timm.pth"]
    for name, more in (("norm", []), ("scale", ["--pixel-scale", 255]), ("own", ["--weights", "runs/seg/norm/last.pt"])):
        script(train_seg, *flags, "--name", name, *more)
    found = {name: checkpoint.load(f"runs/seg/{name}/last.pt")["input"] for name in ("norm", "scale", "own")}
    expected = list(pretrained.IMAGENET["mean"]), list(pretrained.IMAGENET["std"])
    assert (list(found["norm"]["mean"]), list(found["norm"]["std"])) == expected
    assert (list(found["own"]["mean"]), list(found["own"]["std"])) == expected  # as that checkpoint was trained
    assert (list(found["scale"]["mean"]), list(found["scale"]["std"])) == ([0.0], [1.0])
    pixels = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in expected)
    torch.testing.assert_close(seg.Input(**found["norm"])(pixels), (pixels / 255 - mean) / std)

    state = torch.load("runs/seg/norm/last.pt", weights_only=True)
    state["input"] = {key: value for key, value in state["input"].items() if key not in ("mean", "std")}
    torch.save(state, "runs/seg/norm/last.pt")
    script(train_seg, "--resume", "runs/seg/norm", "--epochs", 2, "--device", "cpu")
    assert list(checkpoint.load("runs/seg/norm/last.pt")["input"]["mean"]) == [0.0]


# ---- --show-augment --------------------------------------------------------------------------------------------------
def test_show_augment_shows_the_original_and_prints_the_ranges(script, streets, tmp_path, capsys):
    write_parking(tmp_path / "DATA"), write_dirty(tmp_path / "resources")
    for module, flags in ((train_seg, ["--data", streets, *SMALL, "--classes", 3, "--ignore", 3]),
                          (train_det, ["--data", "DATA", *TINY_DET]), (train_cls, ["--data", "resources", *TINY_CLS])):
        capsys.readouterr()
        script(module, *flags, "--show-augment", "--zoom", 0.6, 0.9, "--border", "constant")
        out = capsys.readouterr().out
        assert "'zoom': [0.6, 0.9]" in out and "'border': ['constant']" in out and "augment.png" in out
        assert all(name in out for names in of_flags(vars(module.make_parser().parse_args([]))).values() for name in names)
    sheets = list(Path("runs").rglob("augment.png"))
    assert len(sheets) == 3 and all(Image.open(path).width > 6 * 32 for path in sheets)


def test_unknown_recipes_are_refused(refused, monkeypatch):
    with pytest.raises(argparse.ArgumentError, match="invalid choice"):
        parser = train_seg.make_parser()
        parser.exit_on_error = False
        parser.parse_args(["--recipe", "cats"])
