"""train_det.py from files to files, on tiny lots: records, recipes, stages, resuming, several processes."""
import csv
import fcntl
import json
import math
import os
import re
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import nets
import predict
import train_det
from data import det, images
from data.loader import EpochBatches
from nets.yolo import YOLOv5
from tests.conftest import TINY_DET, _child, write_parking, write_tif
from tests.harness import differences, free_port, read
from utils.train import checkpoint, optim
from utils.errors import Stopped

STAGED = " ".join(TINY_DET).replace("--epochs 1", "").split()
# single pictures as they are: few steps teach something
PLAIN = "--mosaic 0 --translate 0 --zoom 1 1 --hue 0 --saturation 0 --value 0.1 --warmup-epochs 0.5 --no-ema --save-period 0".split()


def ranks(module, *flags, cwd, size=2, seconds=100, apart=False):
    """The script in `size` forked processes, as torchrun would start them; all must end well. -> their stdout.

    apart: on machines of their own, which share no files: each in a folder `cwd`/rank.
    """
    port, children, top = free_port(), [], Path(cwd)
    for rank in range(size):
        log = top / f"rank{rank}"
        cwd = top / str(rank) if apart else top
        cwd.mkdir(exist_ok=True)
        pid = os.fork()
        if pid == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
            signal.alarm(seconds)
            files = [os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for name in ("out", "err")]
            _child(module, flags, cwd, files)
        children.append((pid, log))
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid, _ in children]
    assert codes == [0] * size, [Path(f"{log}.err").read_text() for _, log in children]
    return [Path(f"{log}.out").read_text() for _, log in children]


def last(name):
    return checkpoint.load(f"runs/det/{name}/last.pt")


def settings(name):
    return json.loads(Path(f"runs/det/{name}/args.json").read_text())


def edit(root, change):
    """Changes the data's labels by a function."""
    path = root / "train/label/Train.json"
    labels = json.loads(path.read_text())
    change(labels)
    path.write_text(json.dumps(labels))
    return root


# ---- a run -----------------------------------------------------------------------------------------------------------
def test_a_run_finds_boxes_and_leaves_its_records(script, tmp_path):
    root = write_parking(tmp_path / "DATA", train=64, test=1, size=(48, 48), most=1)
    script(train_det, "--data", root, *TINY_DET, *PLAIN, "--epochs", 12, "--lr", "3e-3", "--folds", 4,
           "--save-period", 4)
    run = tmp_path / "runs/det/exp"
    assert {p.name for p in run.iterdir()} >= {
        "last.pt", "best.pt", "epoch_4.pt", "results.csv", "results.png", "results.json", "folds.json", "args.json",
        "train_batch.png", "val.png", "samples.csv", "review.png", "run.json"}
    rows = list(csv.DictReader(open(run / "results.csv")))
    assert [int(row["epoch"]) for row in rows] == list(range(1, 13))
    assert float(rows[-1]["loss"]) < 0.7 * float(rows[0]["loss"])
    results = json.loads((run / "results.json").read_text())
    assert results["last"]["ap50"] > 0.5 and list(results["classes"]) == ["sedan", "bus", "adult"]
    assert sum(c["truths"] for c in results["classes"].values()) == sum(
        fold == 0 for fold in json.loads((run / "folds.json").read_text()).values()) == 16
    assert results["last"]["ap50"] == pytest.approx(float(rows[-1]["ap50"]), abs=1e-6)
    best = checkpoint.load(run / "best.pt")
    assert best["history"][-1]["ap"] == max(row["ap"] for row in best["history"]) and "optimizer" not in best
    assert last("exp")["threshold"] == results["best F1"]["score threshold"]  # both of the last epoch


@pytest.mark.parametrize("head", ["free", "anchor"])
def test_the_checkpoint_says_what_prediction_needs(script, parking, head, capsys):
    script(train_det, "--data", parking, *TINY_DET, "--head", head,
           *(["--anchor-threshold", 1.5] if head == "anchor" else []))
    state = torch.load("runs/det/exp/last.pt", weights_only=True)
    assert (state["task"], state["arch"]["name"], state["score"]) == ("det", "yolo.YOLOv5", "ap")
    assert (state["classes"], state["category_ids"]) == (["sedan", "bus", "adult"], [1, 2, 3])
    assert state["input"].pop("seen")["dtype"] == "uint8"
    assert state["input"] == {"bands": [1, 2, 3], "pixel_scale": 255.0, "pixel_mean": [], "imgsz": 64, "mean": (0.0,),
                              "std": (1.0,)}
    kwargs, out = state["arch"]["kwargs"], capsys.readouterr().out
    assert kwargs["head"] == head and kwargs["num_classes"] == 3
    assert out.count("anchors changed: ") == (head == "anchor")
    if head == "anchor":
        assert finest_anchor(state) != [10, 13]
    net = nets.build(state["arch"])  # the weights bring the anchors
    net.load_state_dict(state["model"])


def finest_anchor(state):
    """Width and height in pixels of the first anchor."""
    return (state["model"]["model.24.anchors"][0, 0] * 8).tolist()


MINE = """
from torch import nn

from nets.yolo import BINS, AnchorFreeHead


class Mine(nn.Module):
    strides, stride = [8, 32], 32

    def __init__(self, num_classes, in_chans):
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(in_chans, 8, 8, 8), nn.Conv2d(8, 16, 4, 4)
        self.head = AnchorFreeHead([8, 16], self.strides, num_classes)

    def forward(self, x):
        x = self.fine(x).relu()
        return self.head([x, self.coarse(x).relu()])
"""


def test_a_net_of_ones_own(script, parking, tmp_path, monkeypatch):
    """Class Mine in nets/mine.py is trained, resumed and predicted with by its name."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.setattr(nets, "__path__", [*nets.__path__, str(tmp_path)])
    script(train_det, "--data", parking, *TINY_DET[2:], "--net", "mine.Mine")
    assert last("exp")["arch"] == {"name": "mine.Mine", "kwargs": {"num_classes": 3, "in_chans": 3}}
    script(train_det, "--resume", "--epochs", 2)
    script(predict, "--task", "det", "--device", "cpu", "--amp", "off", "--conf", 0, "--max-det", 5, "--out", "out")
    assert len(last("exp")["history"]) == 2 and len(json.loads(Path("out/coco.json").read_text())) == 3 * 5
    sys.modules.pop("nets.mine")


FLAGS = [["--folds", "0"], ["--mixup", "1"], ["--degrees", "20", "--shear", "5"],
         ["--close-mosaic", "1", "--cache", "ram"],
         ["--image-weights", "--epoch-parts", "2"], ["--amp", "bf16", "--grad-checkpoint", "--workers", "1"],
         ["--head", "anchor", "--label-smoothing", "0.1", "--no-autoanchor",
          "--multi-scale", "0.5"],
         ["--variant", "n6", "--head", "anchor", "--bands", "3,1"]]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: flags[0] + flags[1])
def test_flags(script, parking, flags):
    script(train_det, "--data", parking, *TINY_DET, *flags)
    state = last("exp")
    assert state["step"] >= 1 and np.isfinite(state["history"][-1]["loss"])
    assert ("ap" in state["history"][-1]) == (flags != ["--folds", "0"])
    if "--no-autoanchor" in flags:
        assert finest_anchor(state) == [10, 13]
    if "--bands" in flags:
        assert state["input"]["bands"] == [3, 1] and state["arch"]["kwargs"]["in_chans"] == 2


def test_close_mosaic_ends_it_for_the_last_epochs(script, parking, monkeypatch):
    seen = []
    monkeypatch.setattr(train_det.det, "DetData", lambda *a, **options: seen.append(options) or stop())
    for flags, want in ((["--close-mosaic", 3], 7), ([], 10), (["--close-mosaic", 10], 0)):
        with pytest.raises(Stopped):
            script(train_det, "--data", parking, *TINY_DET, "--epochs", 10, *flags)
        assert seen[-1]["close_mosaic"] == want


def stop():
    raise Stopped(0)


def test_a_category_nobody_shows_is_still_a_class(script, tmp_path):
    root = edit(write_parking(tmp_path / "DATA"), lambda labels: labels["categories"].append({"id": 9, "name": "cart"}))
    script(train_det, "--data", root, *TINY_DET, "--image-weights", "--head", "anchor")
    assert last("exp")["classes"][-1] == "cart" and last("exp")["category_ids"] == [1, 2, 3, 9]


def test_pictures_of_16_bits_and_five_bands(script, tmp_path):
    import rasterio
    root = write_parking(tmp_path / "DATA", train=6)
    for path in sorted((root / "train/images").iterdir()):
        pixels = train_det.images.read(path).numpy().astype(np.uint16) * 257
        with rasterio.open(path, "w", driver="GTiff", count=5, height=64, width=96, dtype="uint16") as file:
            file.write(np.concatenate((pixels, pixels[:2])))
    script(train_det, "--data", root, *TINY_DET)
    state = last("exp")
    assert (state["input"]["bands"], state["input"]["pixel_scale"]) == ([1, 2, 3, 4, 5], 65535.0)
    assert np.isfinite(state["history"][-1]["loss"]) and state["model"]["model.0.conv.weight"].shape[1] == 5


def test_pixels_beyond_white(script, refused, tmp_path, monkeypatch):
    """What is seen in training ends at 1, and in the validation too; numbers of no known range are asked for."""
    import rasterio
    root = write_parking(tmp_path / "DATA", train=6)
    for path in sorted((root / "train/images").iterdir()):
        pixels = train_det.images.read(path).numpy().astype(np.int16) * 20
        with rasterio.open(path, "w", driver="GTiff", count=3, height=64, width=96, dtype="int16") as file:
            file.write(pixels)
    refused(train_det, "--data", root, *TINY_DET, says=["int16", "--pixel-scale"])
    seen, forward = [], YOLOv5.forward
    monkeypatch.setattr(YOLOv5, "forward", lambda net, x: seen.append((net.training, float(x.max()))) or
                        forward(net, x))
    script(train_det, "--data", root, *TINY_DET, "--pixel-scale", 2000, "--name", "scaled")
    assert {training for training, _ in seen} == {True, False} and {most for _, most in seen} == {1.0}


@pytest.mark.slow
def test_pixels_below_black(refused, script, tmp_path):
    """Decibels, all of them: training would see nothing. Moved up they are seen; a flag cuts off stray ones."""
    root = write_parking(tmp_path / "DATA", train=6)
    files = sorted((root / "train/images").iterdir())

    def write(low):
        for i, path in enumerate(files):
            write_tif(path, np.random.default_rng(i).random((1, 64, 96), np.float32) * 0.9 + np.float32(low))

    write(-20)
    flags = ["--data", root, *TINY_DET]
    refused(train_det, *flags, says=[".jpg: float32 pixels lie between -20 and -19.1", "--pixel-scale standard"])
    write(0)
    script(train_det, *flags, "--name", "moved")
    write(-0.001)
    refused(train_det, *flags, says=[".jpg: float32 pixels lie between -0.00"])
    script(train_det, *flags, "--pixel-scale", 1, "--name", "cut")
    assert last("moved")["input"]["pixel_scale"] == last("cut")["input"]["pixel_scale"] == 1


def test_names_that_are_no_text(command, tmp_path):
    """Bytes that are not UTF-8 in a file's name, half a character in a class's: all results of the run are written."""
    root = write_parking(tmp_path / "DATA", train=6, most=1)
    names = {f"{i:03}.jpg": os.fsdecode(b"\xe9\xff%d.jpg" % i) for i in range(6)}
    for old, new in names.items():
        (root / "train/images" / old).rename(root / "train/images" / new)
    edit(root, lambda labels: [image.update(file_name=names[image["file_name"]]) for image in labels["images"]]
         + [category.update(name=f"\ud800{category['id']}") for category in labels["categories"]])
    done = command(train_det, "--data", root, *TINY_DET, "--folds", 2)
    run = tmp_path / "runs/det/exp"
    assert done.code == 0, done.err
    with open(run / "samples.csv", newline="", encoding="utf-8") as file:
        found = [Path(row["name"]).name for row in csv.DictReader(file)]
    assert len(found) == 3 and all(re.fullmatch(r"\\udce9\\udcff[0-5]\.jpg", name) for name in found)
    assert all((run / name).exists() for name in ("review.png", "results.json"))
    assert done.out.count("\n  \\ud800") == 3 and list(json.loads((run / "results.json").read_text())["classes"]) == [
        "\ud8001", "\ud8002", "\ud8003"]


def test_review_has_tables(script, parking, monkeypatch):
    """Of the classes and of sizes, with what results.json has and counts of the held-out boxes."""
    written, write = [], train_det.review.write_review
    monkeypatch.setattr(train_det.review, "write_review", lambda *args, **options: written.append((args, options)) or
                        write(*args, **options))
    script(train_det, "--data", parking, *TINY_DET, "--folds", 2)
    [((folder, samples, _), options)] = written
    results = json.loads(Path("runs/det/exp/results.json").read_text())
    assert str(folder) == "runs/det/exp" and len(samples) == 5
    by_class, by_size = options["tables"].values()
    assert [row["class"] for row in by_class] == ["sedan", "bus", "adult"]
    for row, want in zip(by_class, results["classes"].values()):
        assert [row["AP"], row["AP50"], row["boxes"]] == [want["ap"], want["ap50"], want["truths"]]
    assert [row["size"] for row in by_size] == ["small", "medium", "large"]
    for row in by_size:
        want = results["last"][f"ap_{row['size']}"]
        assert row["AP"] == want if want is not None else math.isnan(row["AP"])
    with Image.open(folder / "review.png") as picture:
        assert picture.height > 5 * 64 + (3 + 2 + 3 + 2) * 22


def test_help_shows_the_recipes_values(monkeypatch, capsys):
    for flags, rate in (([], "0.002"), (["--preset", "finetune"], "0.0032"), (["--stages", "2,1"], "0.01")):
        monkeypatch.setattr("sys.argv", ["train_det.py", *flags, "--help"])
        with pytest.raises(SystemExit):
            train_det.make_parser().parse_args()
        assert f"initial learning rate (default: {rate})" in " ".join(capsys.readouterr().out.split())


# ---- splits ----------------------------------------------------------------------------------------------------------
def split_of(name):
    return json.loads(Path(f"runs/det/{name}/folds.json").read_text())


def test_splits(script, parking, tmp_path):
    script(train_det, "--data", parking, *TINY_DET, "--name", "default")
    folds = split_of("default")
    assert len(folds) == 10 and set(folds.values()) == set(range(5)) and max(Counter(folds.values()).values()) <= 3
    script(train_det, "--data", parking, *TINY_DET, "--folds", 0, "--name", "all")
    assert not Path("runs/det/all/folds.json").exists() and not Path("runs/det/all/val.png").exists()
    given = {name: int(i >= 4) for i, name in enumerate(sorted(folds))}
    Path("mine.json").write_text(json.dumps(given))
    script(train_det, "--data", parking, *TINY_DET, "--folds", "mine.json", "--name", "file")
    assert split_of("file") == given
    images = sum(c["truths"] for c in json.loads(Path("runs/det/file/results.json").read_text())["classes"].values())
    ids = [int(Path(name).stem) for name, fold in given.items() if fold == 0]
    labels = json.loads((parking / "train/label/Train.json").read_text())["annotations"]
    assert images == sum(a["image_id"] in ids for a in labels)


def test_a_split_fits_the_data_wherever_it_lies(script, parking, tmp_path):
    script(train_det, "--data", parking, *TINY_DET)
    (tmp_path / "moved").symlink_to(parking)
    script(train_det, "--data", "moved", *TINY_DET, "--folds", "runs/det/exp/folds.json")
    assert split_of("exp2") == split_of("exp") and not any(os.path.isabs(name) for name in split_of("exp"))


def test_the_datas_own_validation_images(script, parking, tmp_path):
    labels = json.loads((parking / "train/label/Train.json").read_text())
    (tmp_path / "coco/annotations").mkdir(parents=True)
    for part, ids in (("train", range(7)), ("val", range(7, 10))):
        (tmp_path / f"coco/{part}2017").mkdir()
        for i in ids:
            os.link(parking / f"train/images/{i:03}.jpg", tmp_path / f"coco/{part}2017/{i:03}.jpg")
        mine = labels | {"images": [im for im in labels["images"] if im["id"] in ids],
                         "annotations": [a for a in labels["annotations"] if a["image_id"] in ids]}
        (tmp_path / f"coco/annotations/instances_{part}2017.json").write_text(json.dumps(mine))
    script(train_det, "--data", "coco", *TINY_DET)
    held_out = {Path(name).name for name, fold in split_of("exp").items() if fold == 0}
    assert held_out == {"007.jpg", "008.jpg", "009.jpg"}
    script(train_det, "--data", "coco", *TINY_DET, "--folds", 2, "--name", "folds")
    assert Counter(split_of("folds").values()) == {0: 5, 1: 5}


# ---- recipes ---------------------------------------------------------------------------------------------------------
def test_presets_and_gains(script, parking):
    script(train_det, "--data", parking, *TINY_DET, "--preset", "finetune", "--name", "a")
    got = settings("a")
    want = dict(head="anchor", optimizer="sgd", lr=0.0032, momentum=0.843, box=0.0296, obj=0.301, cls=0.243,
                hue=0, saturation=0, value=0.4, anchor_threshold=2.91)
    assert {k: got[k] for k in want} == want
    script(train_det, "--data", parking, *TINY_DET, "--preset", "scratch-low", "--head", "free", "--box", 5,
           "--name", "b")
    got = settings("b")
    assert (got["head"], got["box"], got["cls"], got["optimizer"]) == ("free", 5.0, 0.5, "sgd")
    script(train_det, "--data", parking, *TINY_DET, "--preset", "scratch-low", "--head", "free", "--name", "c")
    assert settings("c")["box"] == 7.5  # the competition's 0.05 is for the anchor head


def test_the_table_of_runs_shows_the_head(script, parking):
    """As all flags that the run was given."""
    for name, flags in (("a", ["--head", "anchor"]), ("b", ["--preset", "finetune", "--head", "free", "--dfl", 1]),
                        ("c", ["--head", "free"])):
        script(train_det, "--data", parking, *TINY_DET, "--folds", 0, "--name", name, *flags)
    with open("runs/summary.csv", newline="") as file:
        found = {Path(row["run"]).name: row["flags"] for row in csv.DictReader(file)}
    assert [re.findall("--(?:head|preset|box|obj|dfl|lr)(?: [^-]+)?\\b", found[name]) for name in "abc"] == [
        ["--head anchor"], ["--preset finetune", "--head free", "--dfl 1"], ["--head free"]]


def test_two_stages(script, parking, capsys):
    script(train_det, "--data", parking, *STAGED, "--stages", "1,1", "--image-weights", "--value", 0.1, "--no-ema")
    first, second = settings("exp"), settings("exp-finetune")
    assert (first["preset"], first["lr"], first["zoom"], first["epochs"]) == (
        "scratch-low", 0.01, [0.5, 1.5], 1)
    want = dict(preset="finetune", lr=0.0032, momentum=0.843, zoom=[0.1, 1.9], hue=0, epochs=1, obj_pw=0.911)
    assert {k: second[k] for k in want} == want
    assert first["value"] == second["value"] == 0.1  # as the user said
    assert first["image_weights"] and not second["image_weights"]
    assert second["weights"] == "runs/det/exp/last.pt"
    assert "0 adapted to the input bands, not used: 0, left as initialised: 0" in capsys.readouterr().out
    assert last("exp-finetune")["args"] == second and len(last("exp-finetune")["history"]) == 1


def test_the_second_stage_keeps_the_loss_weights_of_the_free_head(script, parking):
    script(train_det, "--data", parking, *STAGED, "--stages", "1,1", "--head", "free")
    second = settings("exp-finetune")
    assert (second["head"], second["lr"]) == ("free", 0.0032)
    assert [second[k] for k in ("box", "dfl", "cls")] == [7.5, 1.5, 0.5]  # 0.243 is for the anchor head


@pytest.mark.parametrize("names, want", [
    ("a.jpg", 3), ("b.jpg", 3), ("c.png", 1), ("d.png", 3), ("a.jpg c.png", 3), ("c.png a.jpg", 1), ("c.png e.png", 1),
    ("c.png c.png a.jpg d.png", 3), ("c.png b.jpg", 3), ("e.png d.png", 3), ("d.png c.png", 3)])
def test_a_grey_first_image_does_not_make_all_images_grey(tmp_path, names, want):
    for name, mode in (("a.jpg", "L"), ("b.jpg", "CMYK"), ("c.png", "L"), ("d.png", "RGBA"), ("e.png", "LA")):
        Image.new(mode, (8, 8)).save(tmp_path / name)
    assert images.default_bands([tmp_path / name for name in names.split()]) == list(range(1, want + 1))


def test_a_grey_png_among_colours(script, tmp_path):
    """Which comes first: its boxes are learned as the others' are, from grey in three bands."""
    root = write_parking(tmp_path / "DATA", train=6)
    for path in sorted((root / "train/images").iterdir()):
        with Image.open(path) as image:  # by their first bytes they are PNGs
            image.convert("L" if path.name == "000.jpg" else "RGB").save(path, "PNG")
    script(train_det, "--data", root, *TINY_DET, "--folds", 3)
    assert last("exp")["input"]["bands"] == [1, 2, 3] and last("exp")["arch"]["kwargs"]["in_chans"] == 3


def test_the_second_stage_is_resumed_as_such(script, parking):
    script(train_det, "--data", parking, *STAGED, "--stages", "1,1")
    assert sorted(line.split(",")[0] for line in Path("runs/summary.csv").read_text().splitlines()) == [
        "det/exp", "det/exp-finetune", "run"]
    script(train_det, "--resume", "runs/det/exp-finetune", "--epochs", 2)
    assert [p.name for p in sorted(Path("runs/det").iterdir()) if p.is_dir()] == ["exp", "exp-finetune"]
    assert len(last("exp-finetune")["history"]) == 2 and settings("exp-finetune")["lr"] == 0.0032


def is_locked(folder):
    """Whether another process would find the run folder taken."""
    pid = os.fork()
    if pid == 0:
        try:
            fcntl.lockf(open(folder / "lock", "a+"), fcntl.LOCK_EX | fcntl.LOCK_NB)
            os._exit(0)
        except BlockingIOError:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def test_the_second_stage_restarted_before_its_first_checkpoint(script, parking, monkeypatch):
    """By torchrun, with the first stage's command line: it must not begin with the first stage again."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    fit = train_det.engine.fit

    def dies(*args, folder, **options):
        return fit(*args, folder=folder, **options) if folder.name == "exp" else stop()

    monkeypatch.setattr(train_det.engine, "fit", dies)
    flags = ["--data", parking, *STAGED, "--stages", "1,2"]
    with pytest.raises(Stopped):
        script(train_det, *flags)
    held = []
    monkeypatch.setattr(train_det.engine, "fit", lambda *args, folder, **options: (
        held.append(is_locked(folder)), fit(*args, folder=folder, **options))[1])
    script(train_det, *flags)
    assert held == [True]  # to read a lock that one holds would be to give it back
    assert [p.name for p in sorted(Path("runs/det").iterdir()) if p.is_dir()] == ["exp", "exp-finetune"]
    second = settings("exp-finetune")
    assert (second["preset"], second["lr"], second["weights"]) == ("finetune", 0.0032, "runs/det/exp/last.pt")
    assert len(last("exp-finetune")["history"]) == 2 and Path("runs/det/exp-finetune/run.json").exists()


@pytest.mark.slow
def test_the_second_stage_restarted_after_a_checkpoint(script, parking, monkeypatch):
    """By torchrun too: not the command line holds, which is the first stage's, but what the second one began with. A
    user's own --resume of it is another matter, also under torchrun."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    loss, count = train_det.losses.anchor_loss, iter(range(100))

    def dies(*args, **options):
        if next(count) == 10:  # of four steps per epoch: in the second stage's second one
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*args, **options)

    monkeypatch.setattr(train_det.losses, "anchor_loss", dies)
    flags = ["--data", parking, *STAGED, "--stages", "1,3", "--image-weights", "--extra-data", f"{parking}:2"]
    with pytest.raises(Stopped):
        script(train_det, *flags)
    begun = settings("exp-finetune")
    assert (begun["preset"], begun["epochs"], begun["image_weights"]) == ("finetune", 3, False)
    assert last("exp-finetune")["step"] == 7
    script(train_det, *flags)
    assert [p.name for p in sorted(Path("runs/det").iterdir()) if p.is_dir()] == ["exp", "exp-finetune"]
    assert settings("exp-finetune") == begun and len(last("exp-finetune")["history"]) == 3
    monkeypatch.setattr(os, "getppid", lambda: 1)  # another torchrun
    for _ in range(2):  # at first, and as it restarts it
        script(train_det, "--resume", "runs/det/exp-finetune", "--epochs", 4, "--device", "cpu")
    assert settings("exp-finetune") == begun | {"epochs": 4, "resume": "runs/det/exp-finetune"}
    assert len(last("exp-finetune")["history"]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("named", [["runs/det/exp"], []], ids=["by name", "the newest"])
def test_the_second_stage_of_a_resumed_first_one_is_restarted(script, parking, monkeypatch, named):
    """The command line then holds nothing but --resume: it names the first stage's folder, or the newest."""
    script(train_det, "--data", parking, *STAGED, "--stages", "1,2", "--imgsz", 96, "--image-weights")
    shutil.rmtree("runs/det/exp-finetune")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    fit = train_det.engine.fit
    monkeypatch.setattr(train_det.engine, "fit", lambda *args, folder, **options: fit(
        *args, folder=folder, **options) if folder.name == "exp" else stop())
    flags = ["--resume", *named, "--epochs", 2]
    with pytest.raises(Stopped):
        script(train_det, *flags)
    begun = settings("exp-finetune")
    monkeypatch.setattr(train_det.engine, "fit", fit)
    script(train_det, *flags)
    assert (begun["epochs"], begun["imgsz"], begun["image_weights"]) == (2, 96, False)
    assert settings("exp-finetune") == begun and len(last("exp-finetune")["history"]) == 2
    assert len(last("exp")["history"]) == 2


def test_both_stages_drop_the_same_samples(script, parking):
    files = sorted((parking / "train/images").iterdir())
    Path("noise.csv").write_text("rank,name,score\n" + "".join(f"{i},{file},0\n" for i, file in enumerate(files, 1)))
    script(train_det, "--data", parking, *STAGED, "--stages", "1,1", "--drop-noisy", "noise.csv:3", "--folds", 0)
    dropped = [json.loads(Path(f"runs/det/{run}/dropped.json").read_text()) for run in ("exp", "exp-finetune")]
    assert dropped[0] == dropped[1] == [f"train/images/{file.name}" for file in files[:3]]


@pytest.mark.slow
def test_a_first_stage_gets_more_epochs(script, parking):
    script(train_det, "--data", parking, *STAGED, "--stages", "1,1")
    script(train_det, "--resume", "runs/det/exp", "--epochs", 2)
    assert len(last("exp")["history"]) == 2


def test_own_weights_with_another_number_of_classes(script, parking, tmp_path, capsys):
    script(train_det, "--data", parking, *TINY_DET, "--head", "anchor")
    root = edit(write_parking(tmp_path / "DATA"), lambda labels: labels["categories"].append({"id": 9, "name": "cart"}))
    script(train_det, "--data", root, *TINY_DET, "--head", "anchor", "--weights", "runs/det/exp/last.pt", "--lr", 0,
           "--warmup-bias-lr", 0, "--weight-decay", 0, "--name", "more")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("weights: "))
    assert "not used: 6 (model.24)" in line and "left as initialised: 6 (model.24)" in line
    old, new = checkpoint.load("runs/det/exp/last.pt")["ema"], last("more")["model"]
    assert torch.equal(old["model.0.conv.weight"], new["model.0.conv.weight"])
    assert old["model.24.m.0.bias"].shape != new["model.24.m.0.bias"].shape


# ---- what the net and the loss are given -----------------------------------------------------------------------------
def given(script, monkeypatch, *flags):
    """-> what train_det.py gives to the loop: its State, a batch, and the loss."""
    seen = []
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(train_det.engine, "fit", lambda state, loader, compute_loss, *_, **options: seen.append(
            (state, next(iter(loader)), compute_loss)) or stop())
        script(train_det, *flags)
    return seen[0]


@pytest.mark.parametrize("head, variant, imgsz, levels", [
    ("anchor", "n", 96, 3), ("anchor", "n6", 128, 4), ("free", "n", 96, 3)])
def test_gains_are_for_640_pixels_80_classes_and_3_levels(script, parking, monkeypatch, head, variant, imgsz, levels):
    """The anchor head's gains. The loss is the mean over the batch."""
    own = {"anchor": ["--obj", 1.3, "--label-smoothing", 0.1], "free": ["--dfl", 1.1]}[head]
    state, batch, loss = given(script, monkeypatch, "--data", parking, *TINY_DET, "--variant", variant, "--imgsz",
                               imgsz, "--accumulate", 3, "--head", head, "--box", 0.07, "--cls", 0.6, *own)
    found, parts = loss(state.model, batch)
    assert float(found) == pytest.approx(float(sum(parts.values())))
    weights = []
    monkeypatch.setattr(train_det.losses, f"{head}_loss", lambda *_, **options: weights.append(options) or (
        torch.tensor(2.0), {}))
    assert loss(state.model, batch)[0] == 2
    want = dict(box=0.07, dfl=1.1, cls=0.6) if head == "free" else dict(
        box=0.07 * 3 / levels, obj=1.3 * (imgsz / 640) ** 2 * 3 / levels, cls=0.6 * 3 / 80 * 3 / levels, obj_pw=1,
        cls_pw=1, threshold=4, smoothing=0.1)
    assert weights == [pytest.approx(want)]


@pytest.mark.parametrize("optimizer, share", [("sgd", 1 / 64), ("adam", 1 / 12), ("adamw", 1)])
def test_weight_decay_is_for_a_loss_that_is_a_mean(script, parking, monkeypatch, optimizer, share):
    state, _, _ = given(script, monkeypatch, "--data", parking, *TINY_DET, "--accumulate", 3, "--optimizer",
                        optimizer, "--weight-decay", 0.02)
    found = {group["name"]: group["weight_decay"] for group in state.optimizer.param_groups}
    assert found == {"weights": pytest.approx(0.02 * share), "scales": 0, "biases": 0}


def test_boxes_are_resized_with_the_batch(script, parking, monkeypatch):
    state, batch, loss = given(script, monkeypatch, "--data", parking, *TINY_DET, "--multi-scale", 0.5)
    seen, sides = [], set()
    monkeypatch.setattr(train_det.losses, "free_loss", lambda maps, targets, *_, **options: seen.append(
        (maps[0].shape[1] * 8, targets)) or (torch.tensor(0.0), {}))
    assert len(batch["boxes"]) > 3
    for seed in range(12):
        torch.manual_seed(seed)
        loss(state.model, batch)
        side, targets = seen[-1]
        sides.add(side)
        assert torch.equal(targets[:, :2], batch["boxes"][:, :2])
        torch.testing.assert_close(targets[:, 2:], batch["boxes"][:, 2:] * (side / 64))
    assert sides == {32, 64, 96}


def test_anchors_are_fitted_to_boxes_as_the_net_sees_them(monkeypatch):
    """The longer side of an image at --imgsz."""
    seen, head = [], SimpleNamespace(anchors=torch.ones(3, 3, 2), strides=[8, 16, 32])
    new = np.arange(18, dtype=np.float32).reshape(3, 3, 2)
    monkeypatch.setattr(train_det.anchors, "auto", lambda *args, **options: seen.append((args, options)) or (new, ""))
    args = SimpleNamespace(imgsz=320, anchor_threshold=2.91, seed=5)
    boxes = [np.array([[1, 0, 0, 10, 20.0], [0, 3, 4, 8, 5]]), np.zeros((0, 5)), np.array([[2, 5, 5, 105, 25.0]])]
    samples = [det.Sample("", rows, size) for rows, size in zip(boxes, [(40, 80), (9, 9), (200, 100)])]
    train_det.fit_anchors(head, samples, args)
    [((wh, old), options)] = seen
    assert wh.tolist() == [[40, 80], [20, 4], [160, 32]] and options == dict(threshold=2.91, seed=5)
    assert old.tolist() == [[[stride] * 2] * 3 for stride in (8, 16, 32)]
    assert torch.equal(head.anchors, torch.tensor(new) / torch.tensor([8, 16, 32.0])[:, None, None])


@pytest.mark.parametrize("flag, most", [
    (["--gridmask"], 96), (["--cutout-size", 0.5, "--cutout"], 48),
    pytest.param(["--cutout-size", 0.3, "--cutout"], 29, marks=pytest.mark.slow)], ids=str)
def test_pixels_are_dropped_in_training_and_in_nothing_else(script, parking, monkeypatch, flag, most):
    """most: extent of what is dropped from a picture of 96 x 96."""
    seen, forward = {False: [], True: []}, YOLOv5.forward
    monkeypatch.setattr(YOLOv5, "forward", lambda net, x: seen[net.training].append(x.clone()) or forward(
        net, x))
    found = []
    for flags in ([], [*flag, 1], [*flag, 0.5]):
        script(train_det, "--data", parking, *TINY_DET, "--imgsz", 96, *flags)
        found.append({training: torch.cat(inputs) for training, inputs in seen.items()})
        for inputs in seen.values():
            inputs.clear()
    plain, masked, half = found
    assert len(plain[True]) == 8 and len(plain[False]) > 0
    assert torch.equal(plain[False], masked[False]) and torch.equal(plain[False], half[False])
    for some, count in ((masked[True], [8]), (half[True], range(1, 8))):
        dropped = (some != plain[True]).any(1)
        assert (some.movedim(1, -1)[dropped] == 0).all()
        assert sum(bool(mask.any()) for mask in dropped) in count
    for mask in (masked[True] != plain[True]).any(1):
        rows, columns = mask.nonzero(as_tuple=True)
        assert 0.02 < mask.float().mean() < 0.3 and max(rows.max() - rows.min(), columns.max() - columns.min()) < most


# ---- samplers and warmup ---------------------------------------------------------------------------------------------
def drawn(epochs, *args, **options):
    sampler, out = EpochBatches(*args, **options), []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        out.append([index for batch in sampler for _, index in batch])
        assert len(out[-1]) == len(sampler) * sampler.batch_size
    return out


@pytest.mark.parametrize("size, bs, parts", [(60, 4, 5), (61, 4, 5), (7, 4, 3), (100, 8, 15), (5, 8, 2)])
def test_parts_of_an_epoch_see_everything_once(size, bs, parts):
    for first in (0, 4 * parts):
        keys = sum(drawn(range(first, first + parts), size, bs, 1, parts=parts), [])
        assert {key % size for key in keys} == set(range(size)) and len(set(keys)) == len(keys)
        assert sorted(key % size for key in keys[:size]) == list(range(size))  # again only when all were there
    assert drawn([2], size, bs, 1, parts=parts) == drawn([2], size, bs, 1, parts=parts)
    assert drawn([0], 60, 4, 1, parts=5) != drawn([5], 60, 4, 1, parts=5) != drawn([5], 60, 4, 2, parts=5)


def test_weights_of_images(monkeypatch):
    weights = np.array([1, 1, 2, 4, 0, 8.0])
    keys = sum(drawn(range(400), 6, 3, 5, weights=weights), [])
    share = np.bincount(np.array(keys) % 6, minlength=6) / len(keys)
    assert np.abs(share - weights / 16).max() < 0.03 and share[4] == 0
    for epoch in drawn(range(20), 6, 3, 5, weights=weights):
        assert len(set(epoch)) == len(epoch)  # an image that comes twice is augmented twice
    parts = drawn(range(4), 40, 4, 5, weights=np.arange(40.0), parts=4)
    assert len(set(sum(parts, []))) == 4 * 3 * 4
    assert parts == drawn(range(4), 40, 4, 5, weights=np.arange(40.0), parts=4)
    whole = EpochBatches(6, 4, 5, weights=weights)
    want, shards = list(whole), []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank)), monkeypatch.setenv("WORLD_SIZE", "2")
        shards.append(list(whole))
    assert [a + b for a, b in zip(*shards)] == want


def test_every_class_is_seen_as_often():
    """A rare class, a frequent one, an image without boxes: of each class as many boxes are to be seen."""
    classes = [np.array([0] * 5), np.array([0]), np.array([0, 0]), np.array([1]), np.array([], int)]
    weights = train_det.class_balance(classes)
    assert weights.argmax() == 3 and 0 < weights[4] < weights[1]
    assert (weights - weights[4])[:3] == pytest.approx([5 / 8, 1 / 8, 2 / 8])
    assert weights[3] - weights[4] == pytest.approx(1)
    assert (train_det.class_balance([np.array([], int)] * 3) > 0).all()  # a fold without boxes


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_warm_up(name):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))

    def make():
        optimizer = optim.make_optimizer(name, optim.param_groups(model, 0.1), lr=0.01, momentum=0.9)
        return optim.warm_up(optimizer, 10, bias_lr=0.1, momentum=0.5)

    def follow(optimizer, steps):
        schedule, rows = optim.make_schedule("constant", steps_per_epoch=5, epochs=9, warmup_epochs=2), []
        for step in steps:
            optim.set_lr(optimizer, schedule(step), step)
            rows.append([(g["lr"], g["betas"][0] if "betas" in g else g["momentum"]) for g in optimizer.param_groups])
        return np.array(rows)

    optimizer = make()
    assert [group["name"] for group in optimizer.param_groups] == ["weights", "scales", "biases"]
    found = follow(optimizer, range(15))
    share = np.minimum((np.arange(15) + 1) / 10, 1)
    np.testing.assert_allclose(found[:, 0, 0], 0.01 * share)
    np.testing.assert_allclose(found[:, 1, 0], 0.01 * share)
    np.testing.assert_allclose(found[:, 2, 0], 0.1 + (0.01 - 0.1) * share)
    np.testing.assert_allclose(found[..., 1], np.tile(0.5 + 0.4 * share[:, None], (1, 3)))
    half, resumed = make(), make()
    follow(half, range(4))
    resumed.load_state_dict(half.state_dict())
    np.testing.assert_array_equal(follow(resumed, range(4, 15)), found[4:])


# ---- stopped, and several processes ----------------------------------------------------------------------------------
@pytest.mark.parametrize("head", ["free", pytest.param("anchor", marks=pytest.mark.slow)])
def test_stopped_amid_an_epoch_and_resumed_to_the_same_bits(script, parking, monkeypatch, head):
    flags = ["--data", parking, *TINY_DET, "--bs", 2, "--epochs", 2, "--multi-scale", 0.5, "--mixup", 0.5,
             "--image-weights", "--close-mosaic", 1, "--head", head]
    script(train_det, *flags, "--name", "straight")
    loss, count = getattr(train_det.losses, f"{head}_loss"), iter(range(100))

    def stopping(*args, **options):
        if next(count) in (2, 5):
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*args, **options)

    monkeypatch.setattr(train_det.losses, f"{head}_loss", stopping)
    with pytest.raises(Stopped):
        script(train_det, *flags, "--name", "broken")
    assert last("broken")["step"] == 3
    with pytest.raises(Stopped):
        script(train_det, "--resume", "runs/det/broken")
    assert last("broken")["step"] == 6
    script(train_det, "--resume", "runs/det/broken")
    straight, broken = (read(f"runs/det/{name}/last.pt") for name in ("straight", "broken"))
    for state in (straight, broken):
        state["history"] = [{k: v for k, v in row.items() if k != "val_seconds"} for row in state["history"]]
    assert straight["step"] == 8 and differences(straight, broken) == []


@pytest.mark.parametrize("head, flags", [
    ("free", ["--lr", 2e-5]),
    pytest.param("anchor", ["--lr", 0.01, "--image-weights"],
                 marks=pytest.mark.slow)])  # larger steps let rounding grow
def test_two_processes_train_what_one_does(script, tmp_path, parking, head, flags):
    flags = ["--data", parking, *TINY_DET, "--head", head, "--sync-bn", *flags, "--no-ema", "--folds", 2, "--optimizer",
             "sgd", "--bs", 10, "--epochs", 2]
    script(train_det, *flags, "--name", "one")
    out = ranks(train_det, *flags, "--name", "two", cwd=tmp_path)
    assert "run: runs/det/two" in out[0] and not out[1]
    one, two = last("one"), last("two")
    assert one["step"] == two["step"] == 2
    for a, b in zip(one["history"], two["history"]):
        assert [b[k] for k in ("loss", "box", "cls")] == pytest.approx([a[k] for k in ("loss", "box", "cls")], rel=1e-3)
    counts = [[c["truths"] for c in json.loads(Path(f"runs/det/{name}/results.json").read_text())["classes"].values()]
              for name in ("one", "two")]
    assert counts[0] == counts[1] and sum(counts[0]) > 3  # the two together judge every image once
    torch.manual_seed(0)  # as the run's --seed
    start = YOLOv5("n", 3, head=head)
    nets = start.state_dict(), one["model"], two["model"]
    weights = [[net[name] for name, _ in start.named_parameters()] for net in nets]
    before, one, two = (torch.cat([t.flatten().double() for t in tensors]) for tensors in weights)
    step = (one - before).norm()
    assert (one - two).norm() < 2e-3 * step and step > 0.01  # rounding, and a true step


@pytest.mark.slow
def test_two_stages_on_two_machines(tmp_path, parking):
    """Only the first one's first process has a run folder, and the first stage's weights in it."""
    ranks(train_det, "--data", parking, *STAGED, "--stages", "1,1", cwd=tmp_path, apart=True)
    assert (tmp_path / "0/runs/det/exp-finetune/last.pt").exists() and not (tmp_path / "1/runs/det").exists()


def test_show_augment_draws_and_does_not_train(script, parking):
    script(train_det, "--data", parking, *TINY_DET, "--show-augment", "--gridmask", 1, "--cutout", 1)
    run = Path("runs/det/exp")
    assert Image.open(run / "augment.png").size[0] > 4 * 64 and not (run / "last.pt").exists()
