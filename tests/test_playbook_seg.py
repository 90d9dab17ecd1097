"""What train_seg.py and predict.py offer beyond the recipe: averages, losses, presence, thresholds, records.

Mixing, pseudo labels, extra data and splits are in test_playbook.py.
"""
import csv
import functools
import json
from argparse import Namespace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch

import predict
import train_seg
from data import images, pairs, seg
from nets.unet import UNet
from tests.conftest import TINY, write_wildfire
from tests.test_scripts_seg import masks_of
from utils import losses
from utils.metrics.segmentation import BinaryIoU
from utils.pictures import table
from utils.train import checkpoint
from utils.errors import UserError
from utils.ops.decide import probabilities

TRAIN = [*TINY, "--amp", "off", "--folds", "3", "--lr", "0.01"]
PREDICT = ["--task", "seg", "--device", "cpu", "--amp", "off", "--workers", 0]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_wildfire(tmp_path_factory.mktemp("small") / "Wildfire", train=6, test=2, size=(32, 32))


@pytest.fixture(scope="module")
def averaged(small, tmp_path_factory):
    """A run of four epochs of one step each, of which SWA takes the last two; its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("averaged"))
        patch.setattr("sys.argv", [
            "train_seg.py", "--data", str(small), *TRAIN, "--epochs", "4", "--optimizer", "adam", "--swa", "0.5",
            "--no-ema", "--save-period", "1"])
        train_seg.main()
        return Path("runs/seg/exp").resolve()


def net_of(state):
    """A checkpoint's net, not fused."""
    return checkpoint.load_weights(UNet(**state["arch"]["kwargs"]).eval(), state, "")


def planes(path):
    """The net's input (1, 14, H, W), made with numpy."""
    x = images.read(path)[:7].numpy().astype(np.float64) / 65535
    means = [np.full_like(band, band[band > 0].mean()) for band in x]
    return torch.from_numpy(np.concatenate((x, means)).astype(np.float32))[None]


@torch.no_grad()
def said(state, path, flips=((),)):
    """Probabilities (K, H, W) float64, the mean over flips."""
    net, x = net_of(state), planes(path)
    return np.mean([probabilities(net(x.flip(axes))).flip(axes)[0].double().numpy() for axes in flips], 0)


def files_of(small):
    return sorted((small / "test_img").iterdir())


def agree(masks, probs, threshold):
    """Masks are the probabilities above the threshold, but for pixels that rounding may decide; and both occur."""
    sure = np.abs(probs - threshold) > 1e-5
    assert sure.mean() > 0.99 and 0 < masks[sure].mean() < 1 and (masks[sure] == (probs > threshold)[sure]).all()


def centred(averaged, small, name, **changes):
    """One of the run's checkpoints, surer of itself: logits of median 0 and deviation 1 on the test images. -> state"""
    state = checkpoint.load(averaged / name)
    probs = np.concatenate([said(state, path).ravel() for path in files_of(small)])
    logits = np.log(probs / (1 - probs))
    state["model"]["head.bias"] -= float(np.median(logits))
    for part in ("weight", "bias"):
        state["model"][f"head.{part}"] /= float(logits.std())
    return state | changes


# ---- optimizers and averages -----------------------------------------------------------------------------------------
def check_swa(run, taken):
    """swa.pt holds the mean of the weights at the ends of the epochs `taken`, and batch norms of its own."""
    swa, *ends = (checkpoint.load(run / name) for name in ("swa.pt", *(f"epoch_{epoch}.pt" for epoch in taken)))
    weights = {name for name, _ in net_of(swa).named_parameters()}
    for name, tensor in swa["model"].items():
        mean = torch.stack([end["model"][name].double() for end in ends]).mean(0)
        if name in weights:
            torch.testing.assert_close(tensor.double(), mean, atol=1e-6, rtol=1e-5)
        elif name.endswith(("running_mean", "running_var")):
            assert not torch.allclose(tensor.double(), mean) and not torch.equal(tensor, ends[-1]["model"][name])
    moved = [not torch.equal(ends[0]["model"][name], ends[-1]["model"][name]) for name in weights]
    assert sum(moved) > len(moved) / 2 or len(ends) == 1
    assert "optimizer" not in swa and ("iou" in swa["swa_scores"]) == (swa["args"]["folds"] != "0")
    return swa


def test_a_constant_rate_is_averaged_and_predicts(script, averaged, small):
    swa, rates = check_swa(averaged, (3, 4)), [row["lr"] for row in checkpoint.load(averaged / "last.pt")["history"]]
    assert rates[2:] == pytest.approx([0.002, 0.002]) and rates[0] == pytest.approx(0.01)
    script(predict, *PREDICT, "--weights", averaged / "swa.pt", "--out", "out")
    for path in files_of(small):
        probs = said(swa, path)[0]
        sure = np.abs(probs - swa["threshold"]) > 1e-5
        assert (masks_of("out")[path.name][sure] == (probs > swa["threshold"])[sure]).all() and sure.mean() > 0.9
        assert np.abs(probs - said(checkpoint.load(averaged / "epoch_4.pt"), path)[0]).max() > 1e-3


# ---- nets and losses -------------------------------------------------------------------------------------------------
def test_hrnetv2(script, refused, small):
    flags = ["--data", small, *TRAIN, "--encoder", "hrnet_w18_small", "--decoder"]
    script(train_seg, *flags)
    state = checkpoint.load("runs/seg/exp/last.pt")
    assert state["arch"]["kwargs"]["decoder"] == [] and np.isfinite(state["history"][-1]["loss"])
    script(predict, *PREDICT, "--threshold", 0.5, "--out", "out")
    best = checkpoint.load("runs/seg/exp/best.pt")
    for path in files_of(small):
        probs = said(best, path)[0]
        sure = np.abs(probs - 0.5) > 1e-5
        assert (masks_of("out")[path.name] == (probs > 0.5))[sure].all() and sure.mean() > 0.9
    refused(train_seg, *flags, 8, says=["--decoder", "1 blocks", "at least 3, or none"])


def binary_values(z, y, s):
    """Logits and labels (n,) that count -> {loss: float64}, written out."""
    p, soft = 1 / (1 + np.exp(-z)), y * (1 - s) + s / 2
    entropy = -(soft * np.log(p) + (1 - soft) * np.log(1 - p))
    return {"bce": entropy.mean(), "focal": (entropy * np.abs(soft - p) ** 2).mean(),
            "dice": 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)}


def several_values(z, y, s):
    """The same for logits (n, classes)."""
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    own, truth = -log_p[np.arange(len(y)), y.astype(int)], np.eye(z.shape[1])[y.astype(int)]
    dice = [1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1) for p, t in zip(np.exp(log_p).T, truth.T)]
    return {"ce": ((1 - s) * own - s * log_p.mean(1)).mean(), "focal": (own * (1 - np.exp(-own)) ** 2).mean(),
            "dice": np.mean(dice)}


@pytest.mark.parametrize("classes, known, values", [(1, train_seg.BINARY, binary_values),
                                                    (3, train_seg.MULTICLASS, several_values)])
def test_every_loss_by_its_name_ignores_and_smooths(classes, known, values):
    rng = np.random.default_rng(classes)
    z, y = rng.normal(size=(4, classes, 9, 11)), rng.integers(0, max(classes, 2), (4, 9, 11))
    y[rng.random(y.shape) < 0.3] = 255
    valid, mask = y != 255, torch.from_numpy(y.astype(np.uint8))
    for s in (0.0, 0.2):
        flat = z.transpose(0, 2, 3, 1)[valid]
        want = values(flat[:, 0] if classes == 1 else flat, y[valid].astype(float), s)
        assert want.keys() | {"lovasz", "lovasz_elu"} >= known.keys() and len(want) == 3
        for name, loss in known.items():
            loss = functools.partial(loss, ignore=255, **{"smoothing": s} if train_seg.takes(loss, "smoothing") else {})
            logits = torch.from_numpy(z.copy()).requires_grad_()
            value = loss(logits, mask)
            value.backward()
            outside = ~torch.from_numpy(valid)[:, None].expand_as(logits)
            assert (logits.grad[outside] == 0).all() and (logits.grad != 0).any(), name
            other = torch.where(outside, 40.0, logits.detach())
            assert float(loss(other, mask)) == pytest.approx(float(value), abs=1e-9), name
            if name in want:
                assert float(value) == pytest.approx(want[name], abs=1e-6), (name, s)


@pytest.mark.parametrize("classes, terms", [(1, {"dice": 1, "focal": 2}), (3, {"dice": 1, "focal": 1, "ce": 0.5})])
def test_runs_with_sums_of_losses(script, tmp_path, monkeypatch, classes, terms):
    root = write_wildfire(tmp_path / "data", train=4, test=1, size=(32, 32), classes=classes)
    known, seen = train_seg.BINARY if classes == 1 else train_seg.MULTICLASS, {}
    for name in terms:
        @functools.wraps(known[name])
        def loss(*args, name=name, real=known[name], **options):
            seen[name] = options
            return real(*args, **options)
        monkeypatch.setitem(known, name, loss)
    script(train_seg, "--data", root, *TRAIN, "--folds", 0, "--classes", classes, "--ignore", 255, "--label-smoothing",
           0.1, "--loss", *(f"{name}={weight}" for name, weight in terms.items()))
    row = checkpoint.load("runs/seg/exp/last.pt")["history"][-1]
    assert row["loss"] == pytest.approx(sum(row[f"{name}_loss"] for name in terms), rel=1e-5)  # weighted
    assert all(0 < row[f"{name}_loss"] < 10 * weight for name, weight in terms.items())
    assert seen == {name: {"ignore": 255} | ({"smoothing": 0.1} if name == ("focal" if classes == 1 else "ce") else {})
                    | ({"weight": None} if (classes, name) != (1, "dice") else {}) for name in terms}


def test_smoothing_without_a_loss_that_smooths(script, refused, small):
    flags = ["--data", small, *TRAIN, "--label-smoothing", 0.1, "--loss"]
    refused(train_seg, *flags, "lovasz_elu", "dice", says=["--label-smoothing", "bce, focal"])
    refused(train_seg, *flags, "focal", "lovasz", "--classes", 3, says=["--label-smoothing", "--loss of ce"])
    script(train_seg, *flags, "focal", "--name", "kept")
    script(train_seg, "--resume", "--epochs", 2, "--loss", "dice")  # the run's own flags may become idle
    assert len(checkpoint.load("runs/seg/kept/last.pt")["history"]) == 2


# ---- which classes an image contains --------------------------------------------------------------------------------
def test_presence_of_classes_in_masks():
    rng = np.random.default_rng(0)
    for classes in (1, 4):
        masks = rng.choice([0, 1, 255] if classes == 1 else [0, 1, 2, 3, 255], (30, 2, 2)).astype(np.uint8)
        want = [[1.0 if (mask == k).any() else -1.0 if (mask == 255).any() else 0.0
                 for k in ([1] if classes == 1 else range(classes))] for mask in masks]
        got = seg.present(torch.from_numpy(masks), classes)
        assert got.dtype == torch.float32 and got.tolist() == want
        assert {value for row in want for value in row} == {1, 0, -1}
    masks = torch.tensor([[[0, 255]], [[255, 255]], [[1, 0]]], dtype=torch.uint8)
    # whether a class is among ignored pixels is not known
    assert seg.present(masks, 3).tolist() == [[1, -1, -1], [-1, -1, -1], [1, 1, 0]]
    assert seg.present(masks.clamp(max=2), 3).tolist() == [[1, 0, 1], [0, 0, 1], [1, 1, 0]]


@pytest.mark.parametrize("known", [[True, False, True], [False] * 3], ids=["some", "none"])
def test_the_head_learns_nothing_of_what_is_not_known(script, monkeypatch, tmp_path, known):
    """Masks without an object but with unsure pixels, as pseudo labels have them."""
    root, heard = write_wildfire(tmp_path / "data", train=3, test=0, size=(32, 32)), []
    for file, sure in zip(sorted((root / "train_mask").iterdir()), known):
        with rasterio.open(file, "r+", driver="GTiff") as target:
            mask = target.read(1)
            target.write(mask if sure else np.where(mask == 1, 255, mask), 1)

    def bce(logits, labels, ignore=None, **options):
        value = losses.bce(logits, labels, ignore=ignore, **options)
        if logits.ndim == 2:
            logits.register_hook(lambda grad: heard.append((labels.clone(), grad.clone(), float(value))))
        return value

    monkeypatch.setattr(train_seg, "losses", Namespace(**vars(losses) | {"bce": bce}))
    script(train_seg, "--data", root, *TRAIN, "--folds", 0, "--ignore", 255, "--aux-cls", 1, "--bs", 3, "--resize",
           "--loss", "dice")
    [(labels, grad, value)] = heard
    assert sorted(labels[:, 0].tolist()) == sorted(1.0 if sure else -1.0 for sure in known)
    assert ((grad != 0) == (labels == 1)).all() and np.isfinite(value) and (value > 0) == any(known)
    row = checkpoint.load("runs/seg/exp/last.pt")["history"][-1]
    assert row["aux_cls_loss"] == pytest.approx(value)
    assert row["loss"] == pytest.approx(row["dice_loss"] + value, rel=1e-5)


@pytest.mark.parametrize("classes", [1, 4])
def test_absent_classes_get_no_pixels(classes):
    torch.manual_seed(classes)
    net = UNet(in_chans=3, classes=classes, conv0=(), decoder=(8, 8, 8, 8), aux_cls=True)
    with torch.no_grad():
        x, heard = torch.randn(12, 3, 32, 32), []
        logits, present = net.train()(x)
        assert logits.shape == (12, classes, 32, 32) and present.shape == (12, classes)
        net.aux_cls.register_forward_hook(lambda module, inputs, output: heard.append(output.clone()))
        net.eval()(x)
        net.aux_cls.bias.sub_(heard.pop().mean(0))  # now some images have a class, others not
        got = net(x)
        net.aux_cls.bias.fill_(1e6)  # all are there: the decoder's logits as they are
        plain = net(x)
    told = heard[0]
    assert (told < 0).any(0).all() and (told > 0).any(0).all() and plain.abs().max() < 30
    for image in range(len(x)):
        for k in range(classes):
            absent = torch.full((32, 32), -30.0) if told[image, k] < 0 and k > 0 else plain[image, k]
            # of one class doubt about the image is doubt about its pixels: pseudo labels must not be sure of them
            assert torch.equal(got[image, k], plain[image, k].clamp(max=told[image, k]) if classes == 1 else absent)


def test_masks_are_empty_where_the_head_says_so(script, averaged, small, tmp_path):
    one, two = files_of(small)
    state = centred(averaged, small, "epoch_4.pt", threshold=0.4)
    features = [net_of(state).encoder.features(_conv0(state, path))[-1].mean((2, 3))[0].detach() for path in (one, two)]
    weight = (features[1] - features[0]) / (features[1] - features[0]).square().sum()
    bias = -float(weight @ (features[0] + features[1])) / 2  # -0.5 for the first image, 0.5 for the second, times 40
    head = {"aux_cls.weight": 40 * weight[None], "aux_cls.bias": torch.tensor([40 * bias])}
    arch = {"name": "unet.UNet", "kwargs": state["arch"]["kwargs"] | {"aux_cls": True}}
    checkpoint.save(tmp_path / "net.pt", state | {"arch": arch, "model": state["model"] | head})
    script(predict, *PREDICT, "--weights", "net.pt", "--out", "out")
    assert not masks_of("out")[one.name].any() and said(state, one).max() > 0.4
    agree(masks_of("out")[two.name], said(state, two)[0], 0.4)


def _conv0(state, path):
    x, net = planes(path), net_of(state)
    for conv in net.conv0:
        x = conv(x).relu()
    return x


# ---- thresholds ------------------------------------------------------------------------------------------------------
def best_level(probs, masks, ignore=None):
    """The level among 0.05 ... 0.95 with the highest IoU, counted in whole numbers; of equal ones nearest to 0.5."""
    counted, found = np.ones_like(masks, bool) if ignore is None else masks != ignore, {}
    for k in range(1, 20):
        there, true = (probs > np.float32(k) / np.float32(20))[counted], masks[counted] == 1
        union = int((there | true).sum())
        found[k] = Fraction(int((there & true).sum()), union) if union else Fraction(0)
    return max(found, key=lambda k: (found[k], -abs(k - 10))) / 20


@pytest.mark.parametrize("ignore", [None, 255])
def test_the_best_threshold_by_brute_force(ignore):
    rng, chosen = np.random.default_rng(0), set()
    values = (np.arange(41) / 40).astype(np.float32)  # every second one is a level itself
    for case in range(60):
        metric = BinaryIoU(ignore=ignore)
        probs = rng.choice(values[rng.integers(20):][:rng.integers(1, 21)], (6, 3, 4)).astype(np.float32)
        if case % 2:  # many ties
            probs = probs.round(1)
        masks = (rng.random(probs.shape) < probs * rng.choice([0, 0.7, 1.5])).astype(np.uint8)
        if ignore:
            masks[rng.random(masks.shape) < 0.3] = ignore
        for part in (slice(0, 4), slice(4, 6)):
            metric.update(torch.from_numpy(probs[part])[:, None], torch.from_numpy(masks[part]))
        assert metric.best_threshold() == pytest.approx(best_level(probs, masks, ignore), abs=1e-6), case
        chosen.add(round(metric.best_threshold(), 2))
    assert len(chosen) > 6
    nothing = BinaryIoU(ignore=ignore)
    nothing.update(torch.rand(2, 3, 3), torch.zeros(2, 3, 3))
    assert nothing.best_threshold() == BinaryIoU().best_threshold() == 0.5


def test_checkpoints_keep_the_threshold_of_their_own_evaluation(averaged, small):
    names = [name for name, fold in json.loads((averaged / "folds.json").read_text()).items() if fold == 0]
    paired = {pair[0].stem: pair for pair in pairs.of_folders(small / "train_img", small / "train_mask")}
    data, stored = seg.SegData([paired[name] for name in names], bands=list(range(1, 8))), {}
    batch = {key: torch.stack([data[i][key] for i in range(len(data))]) for key in ("image", "mask")}
    for name in ("epoch_1.pt", "epoch_2.pt", "epoch_3.pt", "epoch_4.pt", "last.pt", "best.pt", "swa.pt"):
        state = checkpoint.load(averaged / name)
        with torch.inference_mode():
            x = seg.Input(**state["input"])(batch["image"].contiguous(memory_format=torch.channels_last))
            probs = probabilities(net_of(state).to(memory_format=torch.channels_last)(x))[:, 0]
        stored[name] = state["threshold"]
        assert stored[name] == pytest.approx(best_level(probs.numpy(), batch["mask"].numpy()), abs=1e-6), name
    assert stored["last.pt"] == stored["epoch_4.pt"] and len(set(stored.values())) > 1


def test_prediction_takes_the_stored_threshold(script, averaged, small, tmp_path):
    one, two = (centred(averaged, small, name) for name in ("epoch_2.pt", "epoch_4.pt"))
    probs = [np.stack([said(state, path)[0] for path in files_of(small)]) for state in (one, two)]
    low, high = float(np.quantile(probs[0], 0.3)), float(np.quantile(probs[1], 0.6))
    for name, state, threshold in (("one", one, low), ("two", two, high), ("none", two, None)):
        checkpoint.save(tmp_path / f"{name}.pt", state | {"threshold": threshold})
    checkpoint.save(tmp_path / "old.pt", {k: v for k, v in one.items() if k != "threshold"})
    mean = (probs[0] + probs[1]) / 2
    for names, flags, want, threshold in (
            (["one"], [], probs[0], low), (["two"], [], probs[1], high),
            (["one"], ["--threshold", high], probs[0], high), (["one", "two"], [], mean, (low + high) / 2),
            (["old"], [], probs[0], 0.5), (["none"], [], probs[1], 0.5), (["old", "two"], [], mean, high)):
        out = f"out-{'-'.join(names)}{len(flags)}"
        script(predict, *PREDICT, "--weights", *(f"{name}.pt" for name in names), *flags, "--out", out, "--no-overlays")
        agree(np.stack([masks_of(out)[path.name] for path in files_of(small)]), want, threshold)


def test_stored_thresholds_are_of_plain_probabilities(script, refused, averaged, small, tmp_path):
    """tsharpen is a mean of square roots, so that with a single view the masks stay as they are."""
    state = centred(averaged, small, "epoch_4.pt")
    probs = np.stack([said(state, path)[0] for path in files_of(small)])
    threshold = float(np.quantile(probs, 0.4))
    for name, stored in (("net", threshold), ("none", None)):
        checkpoint.save(tmp_path / f"{name}.pt", state | {"threshold": stored})
    one_view = ["--tta", "scale", "--tta-scales", 1, "--no-overlays", "--merge"]
    for name, how, flags, want in (("net", "tsharpen", [], threshold), ("none", "tsharpen", [], 0.5),
                                   ("net", "tsharpen", ["--threshold", threshold], threshold ** 2),
                                   ("net", "max", [], threshold), ("net", "sum", ["--threshold", 0.6], 0.6)):
        out = f"{name}-{how}{len(flags)}"
        script(predict, *PREDICT, "--weights", f"{name}.pt", *one_view, how, *flags, "--out", out)
        agree(np.stack([masks_of(out)[path.name] for path in files_of(small)]), probs, want)
    refused(predict, *PREDICT, "--weights", "net.pt", *one_view, "sum", "--out", "out", says=["--merge sum",
                                                                                              "--threshold"])
    assert not Path("out").exists()


@pytest.mark.parametrize("task, classes", [("seg", 1), ("seg", 3), ("cls", ["a", "b"])])
def test_the_threshold_of_each_merge(task, classes):
    def found(how, single_label=classes == 3, stored=([0.25, 0.36], [0.49, 0.36]), **flags):
        args = Namespace(**dict(task=task, merge=how, threshold=None) | flags)
        members = [predict.Member("net.pt", {"threshold": t}, None, None) for t in stored]
        return np.asarray(predict.best_threshold(args, members, single_label)).tolist()

    assert found(None) == found("mean") == found("max") == found("min") == pytest.approx([0.37, 0.36])
    assert found("tsharpen") == pytest.approx([0.37 ** 0.5, 0.6])
    assert found("tsharpen", stored=(None, None)) == pytest.approx(0.5 ** 0.5)
    # five folds and a run on everything, which has none: the folds' counts
    assert found(None, stored=(None, [0.2, 0.3], [0.4, 0.3])) == pytest.approx([0.3, 0.3])
    if classes == 3:
        return found("sum")  # the mean: there is no threshold
    with pytest.raises(UserError, match="--merge sum: .*; give --threshold"):
        found("sum")
    assert found("sum", threshold=0.8) == 0.8 == found("tsharpen", threshold=0.8)
    if task == "cls":
        found("sum", single_label=True)


# ---- records ---------------------------------------------------------------------------------------------------------
def test_samples_are_the_ious_of_the_last_weights_with_flips(script, averaged, small, tmp_path):
    """Of weights that say yes to about half of the pixels, and stay as they are."""
    checkpoint.save(tmp_path / "half.pt", centred(averaged, small, "epoch_4.pt"))
    script(train_seg, "--data", small, *TRAIN, "--weights", "half.pt", "--lr", 0, "--weight-decay", 0, "--no-ema")
    with open("runs/seg/exp/samples.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name, fold in json.loads(Path("runs/seg/exp/folds.json").read_text()).items() if fold == 0]
    assert [Path(row["name"]).stem for row in rows] == names and len(rows) == 2
    state = checkpoint.load("runs/seg/exp/last.pt")
    for row in rows:
        mask = images.read(str(row["name"]).replace("img", "mask"))[0].numpy() == 1
        there = said(state, row["name"], flips=((), (2,), (3,), (2, 3)))[0] > 0.5
        assert 0.05 < there.mean() < 0.95
        assert float(row["score"]) == pytest.approx((mask & there).sum() / (mask | there).sum(), abs=1e-6)
        assert (int(row["area"]), int(row["predicted"])) == (mask.sum(), there.sum())


def test_the_table_of_runs_shows_what_differs_from_the_defaults(averaged):
    row, = table.rows([averaged.parent])
    assert {"--swa 0.5", "--optimizer adam", "--no-ema", "--epochs 4"} <= {
        " ".join(part.split()) if part.startswith("--") else "" for part in _flags(row["flags"])}
    assert not {"--swa-lr 0.2", "--momentum 0.9", "--ema"} & set(_flags(row["flags"])) and row["metric"] == "iou"


def _flags(text):
    return [f"--{part}".strip() for part in f" {text}".split(" --")[1:]]


def test_debug(script, small):
    script(train_seg, "--data", small, *TRAIN, "--loss", "bce", "--debug", "--epochs", 50, "--repeat", 50, "--swa", 0.5,
           "--patience", 1, "--warmup-epochs", 9, "--lr", 0.02)
    state = checkpoint.load("runs/seg/exp/last.pt")
    assert state["step"] == 2  # an epoch of each tile once: four tiles, four a batch
    assert len(state["history"]) == 2 and not Path("runs/seg/exp/swa.pt").exists()


# ---- large images ----------------------------------------------------------------------------------------------------
def test_large_images_are_learned_and_judged_in_windows(script, refused, tmp_path, monkeypatch):
    root, read, sides = write_wildfire(tmp_path / "Wildfire", train=3, test=1, size=(80, 100)), images.read_picture, []

    def spy(path, *args, **options):
        pixels = read(path, *args, **options)
        sides.append(0 if "shape" in options else max(pixels.shape[1:]))  # reduced pictures show the units of pixels
        return pixels

    monkeypatch.setattr(images, "read_picture", spy)
    flags = ["--data", root, *TRAIN, "--tile", 48]
    script(train_seg, *flags, "--overlap", 0.5)
    assert max(sides) == 48  # never a whole image
    with open("runs/seg/exp/samples.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    [held_out] = {row["name"] for row in rows}
    mask = images.read(held_out.replace("img", "mask")).numpy()[0]
    assert len(rows) == 2 * 3 and sum(int(row["area"]) for row in rows) == mask.sum() > 0
    scores = [[int(row[name]) for name in ("area", "predicted")] + [float(row["score"])] for row in rows]
    right = sum(score * (area + predicted) / (1 + score) for area, predicted, score in scores)
    whole = right / (sum(area + predicted for area, predicted, _ in scores) - right)
    results = json.loads(Path("runs/seg/exp/results.json").read_text())
    assert results["last with flips"]["iou"] == pytest.approx(whole, abs=1e-6)
    for more, says in ((["--imgsz", 64], ["--tile 48", "--imgsz 64"]), (["--resize"], ["--tile 48", "--resize"])):
        refused(train_seg, *flags, *more, says=says)
    refused(train_seg, *flags[:-2], "--resize", "--p-object", 0.5, says=["--p-object", "--resize"])
    refused(train_seg, *flags[:-2], "--overlap", 0.5, says=["--overlap: does nothing without --tile"])
    script(train_seg, "--resume", "runs/seg/exp", "--epochs", 2)
