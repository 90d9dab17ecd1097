"""The changes of docs/modify.md: with each diff, a copy of the source trains, resumes bit by bit and predicts, and what
the diff changes is found in the training or in the prediction."""
import csv
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook
from torchvision.ops import generalized_box_iou_loss

import predict  # noqa: F401, like the scripts below: what they import is imported once, not in every fork
import train_cls  # noqa: F401
import train_det  # noqa: F401
import train_seg  # noqa: F401
from tests.conftest import (TINY, TINY_CLS, TINY_DET, tile, write_dirty, write_parking, write_tif,
                            write_wildfire)

ROOT = Path(__file__).parents[1]
OWN = ("data", "nets", "utils", "predict", "train_cls", "train_det", "train_seg")
TASK = {"train_seg": "seg", "train_det": "det", "train_cls": "cls"}
SMALL = {"train_seg": [*TINY, "--amp", "off", "--encoder", "tiny.Tiny", "--decoder", "8", "8"], "train_det": TINY_DET,
         "train_cls": [*TINY_CLS, "--net", "tiny.Tiny"]}
# nets/tiny.py of every copy: runs take half of the time that they take with the smallest published net
NET = """
from torch import nn
from nets.blocks import ConvNorm, recompute


class Tiny(nn.Module):
    channels, strides = [8, 16], [2, 4]

    def __init__(self, in_chans, num_classes=None, grad_checkpoint=False):
        super().__init__()
        self.fine, self.coarse = ConvNorm(in_chans, 8, 3, 2), ConvNorm(8, 16, 3, 2)
        self.head = nn.Linear(16, num_classes or 1)
        self.grad_checkpoint = grad_checkpoint

    def features(self, x):
        fine = self.fine(x)
        return [fine, recompute(self.coarse, fine) if self.grad_checkpoint and self.training else self.coarse(fine)]

    def forward(self, x):
        return self.head(self.features(x)[-1].mean((2, 3)))
"""


def read_recipes(text):
    """docs/modify.md -> {number: (title, commands as lists of words, diff)}"""
    found = {}
    for number, title, body in re.findall(r"^## (\d+)\. (.*)\n((?:(?!## ).*\n)*)", text, re.M):
        blocks = re.findall(r"^```(\w*)\n(.*?)^```$", body, re.M | re.S)
        [diff], [commands] = ([block for kind, block in blocks if kind == wanted] for wanted in ("diff", ""))
        found[int(number)] = title, [shlex.split(line) for line in commands.splitlines()], diff
    return found


MODIFY = (ROOT / "docs" / "modify.md").read_text(encoding="utf-8")
RECIPES = read_recipes(MODIFY)


class Repository:
    """A copy of the source with a diff. Its scripts and functions run in forks of this process, in its folder."""

    def __init__(self, folder, command, diff=""):
        self.folder, self.command = folder, command
        for name in ("data", "nets", "utils"):
            shutil.copytree(ROOT / name, folder / name)
        for script in ROOT.glob("*.py"):
            shutil.copy2(script, folder)
        (folder / "nets/tiny.py").write_text(NET)
        if diff:
            subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=folder, check=True,
                           env=os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)})

    def _fork(self, name, main, flags=(), code=0):
        def with_own_modules():
            for module in [key for key in sys.modules if key.split(".")[0] in OWN]:
                del sys.modules[module]
            sys.path.insert(0, str(self.folder))
            main()

        done = self.command(SimpleNamespace(__name__=name, main=with_own_modules), *flags, cwd=self.folder)
        assert done.code == code, f"{name} {flags}\n{done.out}\n{done.err}"
        return done

    def run(self, script, *flags, code=0, first=lambda: None):
        """A script, which must end with this code. first: what is done before, in the same fork."""
        def main():
            first()
            importlib.import_module("utils.errors").cli(importlib.import_module(script).main)

        return self._fork(script, main, flags, code)

    def ask(self, question, *args):
        """-> what question(*args) returns in a fork, in which all modules are the copy's."""
        self._fork("ask", lambda: torch.save(question(*args), "answer.pt"))
        return torch.load(self.folder / "answer.pt", weights_only=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_wildfire(root / "Wildfire", train=8, test=1, size=(32, 32))
    write_parking(root / "DATA", train=8, test=1, size=(48, 64))
    write_dirty(root / "resources", train=12, test=2)
    return root


@pytest.fixture
def recipe(tmp_path, command, data):
    """recipe(number) -> the Repository with that change (0: none), and the data where the commands expect it."""
    def make(number):
        folder = tmp_path / f"recipe{number}"
        folder.mkdir()
        for source in data.iterdir():
            (folder / source.name).symlink_to(source)
        return Repository(folder, command, RECIPES[number][2] if number else "")
    return make


def command_of(number):
    """-> (script, flags): the training that the recipe shows, made small."""
    [_, script, *flags], *_ = RECIPES[number][1]
    script = script.removesuffix(".py")
    return script, [*SMALL[script], "--epochs", 2, *flags]


def train(code, number, *flags, resume=True):
    """-> (the run's folder, its last checkpoint). resume: another run, which is stopped within its second epoch and
    resumed, must end with the same bits."""
    script, shown = command_of(number)
    code.run(script, *shown, *flags, "--name", "straight")
    runs = code.folder / "runs" / TASK[script]
    last = load(runs / "straight/last.pt")
    if resume:
        code.run(script, *shown, *flags, "--name", "stopped", code=143, first=stop_after_three_steps)
        assert len(load(runs / "stopped/last.pt")["history"]) == 1
        code.run(script, "--resume", runs / "stopped", "--device", "cpu")
        assert_same(timeless(last), timeless(load(runs / "stopped/last.pt")))
    return runs / "straight", last


def stop_after_three_steps():
    steps = itertools.count(1)
    register_optimizer_step_post_hook(lambda *_: next(steps) == 3 and os.kill(os.getpid(), signal.SIGTERM))


def load(path):
    return torch.load(path, weights_only=True)


def timeless(state):
    """A checkpoint without the run's name and without what a clock has measured."""
    history = [{k: v for k, v in row.items() if "seconds" not in k} for row in state["history"]]
    return {k: v for k, v in state.items() if k != "args"} | {"history": history}


def assert_same(a, b, where="checkpoint"):
    """Nested dicts and lists of tensors and plain values that are equal bit by bit."""
    assert type(a) is type(b), where
    if isinstance(a, (dict, list, tuple)):
        assert len(a) == len(b) and (not isinstance(a, dict) or a.keys() == b.keys()), where
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_same(a[key], b[key], f"{where}.{key}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else repr(a) == repr(b), where  # NaN too


def assert_trained_otherwise(number, last, unchanged):
    """The unchanged source, with the same flags, ends with other weights."""
    _, plain = train(unchanged, number, resume=False)
    for name, tensor in last["model"].items():
        assert tensor.shape == plain["model"][name].shape
    assert any(not torch.equal(tensor, plain["model"][name]) for name, tensor in last["model"].items())


def predicted(code, run, *flags):
    """predict.py with the run's last weights and the flags that the recipe shows -> the folder of results."""
    code.run("predict", "--task", run.parent.name, "--weights", run / "last.pt", "--device", "cpu", "--amp", "off",
             "--workers", 0, "--out", run / "predict", *flags)
    return run / "predict"


def tile_to_predict(code):
    return next((code.folder / "Wildfire/test_img").iterdir())


def by_hand(checkpoint, image, root=False):
    """Asked of a copy: (where the net's class stands, where its encoder's class stands, the probabilities (H, W) for
    an image), by numpy from the file to the net's input, without data/ and predict.py."""
    import nets
    state = load(checkpoint)
    net = nets.build(state["arch"]).eval()
    net.load_state_dict(state["ema"])
    with rasterio.open(image) as file:
        x = file.read(list(range(1, 8))).astype(np.float64) / 65535
    x = np.sqrt(x) if root else x
    x = np.concatenate((x, [np.full_like(band, band[band > 0].mean()) for band in x]))
    with torch.inference_mode():
        probs = net(torch.from_numpy(x).float()[None]).sigmoid()[0, 0].double().numpy()
    return type(net).__module__, type(getattr(net, "encoder", None)).__module__, probs


def agreement(code, run, probs):
    """The share of pixels at which predict.py's mask is `probs` above their median: half of the mask is positive."""
    threshold, image = float(np.median(probs)), tile_to_predict(code)
    out = predicted(code, run, "--threshold", threshold, "--source", image)
    with rasterio.open(out / f"masks/{image.stem}.tif") as file:
        mask = file.read(1)
    sure = np.abs(probs - threshold) > 1e-3 * probs.std()
    assert sure.mean() > 0.9
    return (mask == (probs > threshold))[sure].mean()


def grabbed(number):
    """Asked of a copy: what the script hands to engine.fit, which trains nothing. -> namespace of state, loader,
    compute_loss, evaluate, header"""
    from utils.train import engine
    script, flags = command_of(number)
    found = {}

    def fit(state, loader, compute_loss, evaluate=None, *, header, **_):
        found.update(state=state, loader=loader, compute_loss=compute_loss, evaluate=evaluate, header=header)
        raise InterruptedError

    engine.fit, sys.argv = fit, [f"{script}.py", *map(str, flags)]
    with pytest.raises(InterruptedError):
        importlib.import_module(script).main()
    return SimpleNamespace(**found)


# ---- the document ----------------------------------------------------------------------------------------------------
def test_the_table_is_true():
    """The table lists every change with the files and the numbers of lines of its diff; none touches more than two."""
    rows = re.findall(r"^\| \[(\d+)\. (.*)\]\(#.*\) \| (.*) \| \+(\d+) -(\d+) \|$", MODIFY, re.M)
    assert [int(number) for number, *_ in rows] == [*RECIPES] and len(rows) >= 12
    for number, title, files, added, removed in rows:
        its_title, commands, diff = RECIPES[int(number)]
        touched = re.findall(r"^diff --git a/(\S+) b/\1$", diff, re.M)
        assert title == its_title and files == ", ".join(f"`{file}`" for file in touched) and len(touched) <= 2
        lines = [line[0] for line in diff.splitlines() if not line.startswith(("+++ ", "--- "))]
        assert (lines.count("+"), lines.count("-")) == (int(added), int(removed)), title
        assert all(words[0] == "python" and (ROOT / words[1]).exists() for words in commands)


# ---- the changes -----------------------------------------------------------------------------------------------------
def test_loss(recipe):
    code = recipe(1)
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(3, 8, 8)), rng.choice([0, 1, 255], size=(3, 8, 8), p=[0.6, 0.3, 0.1])

    def question():
        import train_seg
        return float(train_seg.BINARY["tversky"](torch.tensor(logits), torch.tensor(labels), ignore=255))

    hit = missed = false = 0.0
    for z, y in zip(logits.ravel(), labels.ravel()):
        p = 1 / (1 + np.exp(-z))
        hit += p * (y == 1)
        missed += (1 - p) * (y == 1)
        false += p * (y == 0)
    assert code.ask(question) == pytest.approx(1 - (hit + 1) / (hit + 1 + 0.7 * missed + 0.3 * false), rel=1e-12)

    run, last = train(code, 1)
    for row in last["history"]:
        assert 0 < row["tversky_loss"] < 1 and row["loss"] == pytest.approx(row["tversky_loss"] + row["bce_loss"])
    predicted(code, run)


def test_encoder(recipe):
    code = recipe(2)
    run, last = train(code, 2)
    net, encoder, probs = code.ask(by_hand, run / "last.pt", tile_to_predict(code))
    assert (net, encoder) == ("nets.unet", "nets.mine") and agreement(code, run, probs) == 1
    script, flags = command_of(2)
    code.run(script, *flags, "--grad-checkpoint", "--name", "recomputed")
    again = load(run.parent / "recomputed/last.pt")
    torch.testing.assert_close(again["model"], last["model"])


def test_net(recipe):
    code = recipe(3)
    run, _ = train(code, 3)
    net, _, probs = code.ask(by_hand, run / "last.pt", tile_to_predict(code))
    assert net == "nets.mine" and agreement(code, run, probs) == 1


def test_normalisation(recipe):
    """predict.py's masks are those of the square roots, and not those of the input that is only scaled. A checkpoint
    of the unchanged source predicts as before."""
    code, plain = recipe(4), recipe(0)
    run, last = train(code, 4)
    assert last["input"]["root"] is True
    *_, probs = code.ask(by_hand, run / "last.pt", tile_to_predict(code), True)
    *_, scaled = code.ask(by_hand, run / "last.pt", tile_to_predict(code))
    assert agreement(code, run, probs) == 1
    assert ((probs > np.median(probs)) == (scaled > np.median(scaled))).mean() < 0.9
    assert_trained_otherwise(4, last, plain)

    older = plain.folder / "runs/seg/straight"
    *_, probs = plain.ask(by_hand, older / "last.pt", tile_to_predict(code))
    assert agreement(code, older, probs) == 1


def test_layout(recipe):
    code = recipe(5)
    pairs = [(f"scenes/{i}.tif", f"drawn/{(i + 1) % 8}.tif") for i in range(8)]  # the names do not tell the pairs
    for i, names in enumerate(pairs):
        for name, array in zip(names, tile(i, 32, 32)):
            (code.folder / name).parent.mkdir(exist_ok=True)
            write_tif(code.folder / name, array)
    (code.folder / "pairs.json").write_text(json.dumps(dict(pairs)))
    (code.folder / "test_img").symlink_to(code.folder / "Wildfire/test_img")

    def question():
        from data import seg
        samples = seg.read("pairs.json")
        return [(str(image), str(mask)) for image, mask in samples.pairs]

    assert code.ask(question) == pairs
    run, last = train(code, 5)
    assert sorted(json.loads((run / "folds.json").read_text())) == sorted(image for image, _ in pairs)
    [mask] = (predicted(code, run) / "masks").iterdir()
    assert mask.stem == tile_to_predict(code).stem


def crops():
    """Asked of a copy: three samples of training, the second like the first, and one of validation. -> arrays"""
    from data import seg
    data = seg.SegData(seg.read("Wildfire").pairs, view=dict(rot90=True, crop_padding=2.0, border=["reflect"]), bands=[1, 2], imgsz=32, seed=5)
    return [[data[key][name].numpy() for name in ("image", "mask")] for key in ((0, 1), (0, 1), (1, 1), 1)]


def test_photometric_augmentation(recipe):
    code, plain = recipe(6), recipe(0)
    (image, mask), again, other, whole = code.ask(crops)
    (clean, its_mask), *_, its_whole = plain.ask(crops)
    factors = image / clean
    assert factors.mean() == pytest.approx(1, abs=0.02) and factors.var() == pytest.approx(1 / 16, rel=0.15)
    assert (mask == its_mask).all() and (image == again[0]).all() and (image != other[0]).any()
    assert (whole[0] == its_whole[0]).all()
    run, last = train(code, 6)
    assert_trained_otherwise(6, last, plain)
    predicted(code, run)


def views():
    """Asked of a copy: a white square in black, as both kinds of training data show it in eight epochs. -> lists of
    (picture (H, W), mask or box)"""
    from data import det, seg
    image = np.zeros((1, 96, 96), np.uint8)
    image[:, 40:60, 40:60] = 255
    write_tif("image.tif", image)
    write_tif("mask.tif", image // 255)
    masks = seg.SegData([("image.tif", "mask.tif")], view=dict(crop_padding=2.0, border=["reflect"]), imgsz=64,
                        p_object=1.0)
    sample = det.Sample(Path("image.tif"), np.array([[0, 40, 40, 60, 60.]]), (96, 96))
    boxes = det.DetData([sample], imgsz=96, mosaic=0.0)
    masked, boxed = ([data[epoch, 0] for epoch in range(8)] for data in (masks, boxes))
    return ([(sample["image"][0].numpy(), sample["mask"].numpy()) for sample in masked],
            [(sample["image"][..., 0].numpy(), sample["boxes"][:, 1:].numpy()) for sample in boxed])


def extent(bright):
    """bool (H, W) -> x1, y1, x2, y2"""
    rows, columns = (np.flatnonzero(bright.any(axis)) for axis in (1, 0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def test_geometric_augmentation(recipe):
    code = recipe(7)
    masked, boxed = code.ask(views)
    for picture, mask in masked:
        assert mask.any() and (mask == (picture > 127)).mean() > 0.98
    for picture, boxes in boxed:  # grey is around the image
        assert len(boxes) == 1 and np.abs(extent(picture > 160) - boxes).max() < 1.5
    for kind in ([extent(mask > 0) for _, mask in masked], [boxes[0] for _, boxes in boxed]):
        assert np.ptp([(y2 - y1) / (x2 - x1) for x1, y1, x2, y2 in kind]) > 0.2  # the square has become a rectangle
    run, _ = train(code, 7)
    predicted(code, run)


def test_score(recipe):
    """best.pt and the table of runs follow the new score where the old one has its best epoch elsewhere."""
    code = recipe(8)
    run, last = train(code, 8)
    predicted(code, run)
    found = [dict(zip(("iou", "precision", "recall"), values))
             for values in ((0.47, 0.9, 0.5), (0.44, 0.5, 0.8), (0.38, 0.5, 0.6))]

    def scripted():
        from utils.metrics import segmentation
        values = itertools.chain(found, itertools.repeat(found[0]))
        segmentation.BinaryIoU.compute = lambda self: next(values)

    script, flags = command_of(8)
    code.run(script, *flags, "--epochs", 3, "--name", "scripted", first=scripted)
    history = load(run.parent / "scripted/last.pt")["history"]
    assert [row["f2"] for row in history] == pytest.approx([4.5 / 8.2, 2 / 2.8, 1.5 / 2.6])
    assert len(load(run.parent / "scripted/best.pt")["history"]) == 2
    best = {"scripted": 2 / 2.8, "straight": max(row["f2"] for row in last["history"])}
    for row in csv.DictReader((code.folder / "runs/summary.csv").open()):
        name = Path(row["run"]).name
        assert row["metric"] == "f2" and float(row["best"]) == pytest.approx(best.get(name, best["straight"]), rel=1e-5)


def outputs(checkpoint, picture):
    """Asked of a copy: the rows of a detector for a picture (48, 64, 3), on a canvas like predict.py's."""
    import nets
    state = load(checkpoint)
    net = nets.build(state["arch"]).eval()
    net.load_state_dict(state["ema"])
    canvas = torch.full((1, 3, 64, 96), 114 / 255)
    canvas[0, :, 8:56, 16:80] = torch.from_numpy(picture).permute(2, 0, 1) / 255
    with torch.inference_mode():
        return net(canvas)[0].numpy()


def test_head_with_one_more_output(recipe):
    """The scores of the predicted boxes are class probabilities times the new output, which is taught centre-ness."""
    code = recipe(9)
    rng = np.random.default_rng(0)
    sides = rng.uniform(1, 9, 4)  # of one cell's centre (20, 12) to the left, top, right, bottom
    logit = rng.normal()

    def question():
        from utils.losses import detection
        raw = torch.full((1, 4, 4, 4 * 16 + 3 + 1), -9.0)
        raw[0, 1, 2, 64], raw[0, 1, 2, -1] = 9.0, logit
        box = np.concatenate(((20, 12) - sides[:2], (20, 12) + sides[2:]))
        boxes = torch.tensor([[0, 0, *box]], dtype=torch.float32)
        _, parts = detection.free_loss([raw], boxes, [8], 16, topk=1)
        points = detection.decode_points([raw[..., :-1]], [8], 16)
        _, score = detection.assign(points.classes.sigmoid(), points.boxes, points.centres, points.strides,
                                    *detection.pad(boxes, 1), topk=1)
        return float(parts["centre"]), score

    centre, score = code.ask(question)
    assert score.nonzero().tolist() == [[0, 6]]  # the cell's is the only target
    target = np.sqrt(np.prod(np.minimum(sides[:2], sides[2:]) / np.maximum(sides[:2], sides[2:])))
    p = 1 / (1 + np.exp(-logit))
    cross_entropy = -target * np.log(p) - (1 - target) * np.log(1 - p)
    assert centre == pytest.approx(cross_entropy * min(float(score.sum()), 1), rel=1e-4)

    run, last = train(code, 9)
    assert all(row["loss"] == pytest.approx(row["box"] + row["dfl"] + row["cls"] + row["centre"])
               for row in last["history"])
    rows = code.ask(outputs, run / "last.pt", np.asarray(Image.open(code.folder / "DATA/test/images/lot.0.png")))
    scores = rows[:, 4:5] * rows[:, 5:]
    found = json.loads((predicted(code, run, "--conf", 0) / "coco.json").read_text())
    assert max(item["score"] for item in found) == pytest.approx(scores.max(), rel=1e-3)
    assert scores.max() < 0.95 * rows[:, 5:].max()


def test_iou_loss(recipe):
    code = recipe(10)

    def question():
        from utils.losses import detection
        torch.manual_seed(0)
        maps, strides = [torch.randn(2, 8 // s, 8 // s, 4 * 16 + 3) for s in (1, 2)], (8, 16)
        corners = torch.rand(5, 2) * 40
        boxes = torch.cat((torch.tensor([[0.0], [0], [0], [1], [1]]), torch.arange(5)[:, None] % 3, corners,
                           corners + 4 + torch.rand(5, 2) * 20), 1)
        _, parts = detection.free_loss(maps, boxes, strides, 16, box=1.0)
        points = detection.decode_points(maps, strides, 16)
        gt_boxes, classes, mask = detection.pad(boxes, 2)
        which, score = detection.assign(points.classes.sigmoid(), points.boxes, points.centres, points.strides,
                                        gt_boxes, classes, mask, topk=10)
        taught = score > 0
        wanted = gt_boxes.gather(1, which[..., None].expand(-1, -1, 4))
        each = generalized_box_iou_loss(points.boxes[taught].double(), wanted[taught].double())
        return float(parts["box"]), float((each * score[taught]).sum() / score.sum().clamp(min=1))

    assert np.diff(code.ask(question)) == pytest.approx(0, abs=1e-5)
    run, _ = train(code, 10)
    predicted(code, run)


def test_file_format(recipe):
    code = recipe(11)
    run, _ = train(code, 11)
    *_, probs = code.ask(by_hand, run / "last.pt", tile_to_predict(code))
    assert agreement(code, run, probs) == 1
    header, [name, runs] = csv.reader((run / "predict/submission.csv").open())
    mask = np.zeros(32 * 32, bool)
    numbers = list(map(int, runs.split()))
    for start, length in zip(numbers[::2], numbers[1::2]):
        mask[start - 1:start - 1 + length] = True
    with rasterio.open(run / f"predict/masks/{name}.tif") as file:
        assert (mask.reshape(32, 32).T == file.read(1)).all()
    assert header == ["id", "rle_mask"] and 0 < mask.sum() < mask.size


def test_optimizer(recipe):
    code = recipe(12)
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=(5, 4)), rng.normal(size=(4, 5, 4))

    def question():
        from utils.train import optim
        layer = torch.nn.Linear(4, 5, bias=False, dtype=torch.float64)
        layer.weight.data = torch.tensor(start)
        optimizer = optim.make_optimizer("lion", optim.param_groups(layer, 0.1), lr=0.01, momentum=0.9)
        for grad in grads:
            layer.weight.grad = torch.tensor(grad)
            optimizer.step()
        return layer.weight.detach().numpy()

    weight, momentum = start.copy(), np.zeros_like(start)
    for grad in grads:
        weight -= 0.01 * (np.sign(0.9 * momentum + 0.1 * grad) + 0.1 * weight)
        momentum = 0.99 * momentum + 0.01 * grad
    np.testing.assert_allclose(code.ask(question), weight, rtol=1e-12)
    run, last = train(code, 12)
    assert last["optimizer"]["name"] == "Lion" and last["optimizer"]["state"]
    predicted(code, run)


def test_gradient_penalty(recipe):
    code = recipe(13)

    def question():
        """The loss of a batch, its parts, and the penalty by one backward pass per image."""
        from data import cls
        run = grabbed(13)
        net, inputs, batch = run.state.model.eval(), cls.Input(**run.header["input"]), next(iter(run.loader))
        loss, parts = run.compute_loss(net, batch)
        squares = []
        for x, label in zip(inputs(batch), batch["label"]):
            x = x.clone().requires_grad_()
            torch.nn.functional.binary_cross_entropy_with_logits(net(x[None])[0], label.float()).backward()
            squares.append(float(x.grad.square().sum()))
        return float(loss), {name: float(value) for name, value in parts.items()}, 0.1 * np.mean(squares)

    loss, parts, penalty = code.ask(question)
    assert penalty > 0 and parts["grad_penalty"] == pytest.approx(penalty, rel=1e-3)
    assert loss == pytest.approx(sum(parts.values()))

    run, _ = train(code, 13)
    assert {"--swa", "--grad-checkpoint", "--accumulate"} <= {*command_of(13)[1]} and (run / "swa.pt").exists()
    script, flags = command_of(13)
    flags.remove("--grad-checkpoint")
    for name, more in {"recomputed": [100, "--grad-checkpoint"], "kept": [100], "without": [0]}.items():
        code.run(script, *flags, "--grad-penalty", *more, "--name", name)
    recomputed, kept, without = (load(run.parent / name / "last.pt")["model"] for name in ("recomputed", "kept",
                                                                                           "without"))
    torch.testing.assert_close(kept, recomputed, rtol=1e-3, atol=1e-5)
    assert any((kept[name] - without[name]).abs().max() > 3e-4 for name in kept)
    predicted(code, run)


def test_mean_teacher(recipe):
    code = recipe(14)

    def question():
        """Crops of the same epoch, and the loss of a batch, which two functions compute."""
        from data import seg
        run = grabbed(14)
        batch, again = next(iter(run.loader)), next(iter(run.loader))
        run.loader.batch_sampler.set_epoch(1)
        other = next(iter(run.loader))
        state, x = run.state, seg.Input(**run.header["input"])(batch["unlabelled"])
        state.step, state.steps_per_epoch = 5, 2  # half of the ramp
        state.model.eval()
        for p in state.ema.module.parameters():
            p.data.mul_(2)  # a teacher that is not the student
        torch.manual_seed(3)
        _, parts = run.compute_loss(state.model, batch)
        torch.manual_seed(3)
        gain = torch.rand(4, 14, 1, 1) * 0.7 + 0.7
        with torch.no_grad():
            difference = state.model(x * gain).sigmoid() - state.ema.module(x).sigmoid()
        return [part["unlabelled"] for part in (batch, again, other)], parts, 0.5 * difference.square().mean()

    (batch, again, other), parts, expected = code.ask(question)
    assert torch.equal(batch, again) and not torch.equal(batch, other)
    assert float(expected) > 1e-4 and float(parts["teacher_loss"]) == pytest.approx(float(expected), rel=1e-3)

    run, last = train(code, 14)
    assert last["history"][-1]["teacher_loss"] > 0
    predicted(code, run)
    script, flags = command_of(14)
    done = code.run(script, *flags, "--no-ema", code=2)
    assert done.lines == ["error: --unlabelled: the EMA weights are the teacher; leave --no-ema out"]
