"""--class-weights: the losses against torch's own and against loops in float64, and what a training gains by them."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_cls
import train_seg
from tests.conftest import TINY, TINY_CLS, write_dirty, write_tif
from utils import losses
from utils.train import checkpoint

VOID = 255
W = torch.tensor([0.2, 1., 5.])


@pytest.fixture
def maps():
    """Logits (2, 3, 5, 4) and labels (2, 5, 4) of three classes, some ignored; both for two classes, too."""
    torch.manual_seed(3)
    labels = torch.randint(0, 3, (2, 5, 4))
    labels[torch.rand(labels.shape) < 0.2] = VOID
    return torch.randn(2, 3, 5, 4) * 2, labels, torch.where(labels == VOID, VOID, labels.clamp(max=1))


@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_cross_entropies_are_torchs(maps, smoothing):
    logits, labels, binary = maps
    torch.testing.assert_close(
        losses.cross_entropy(logits, labels, smoothing, weight=W, ignore=VOID),
        F.cross_entropy(logits, labels, W, ignore_index=VOID, label_smoothing=smoothing))
    valid = binary != VOID
    y = binary[valid].float()
    soft = y * (1 - smoothing) + smoothing / 2
    theirs = F.binary_cross_entropy_with_logits(logits[:, 0][valid], soft, pos_weight=torch.tensor(7.), reduction="sum")
    torch.testing.assert_close(losses.bce(logits[:, :1], binary, smoothing, weight=7., ignore=VOID),
                               theirs / (7 * y + 1 - y).sum())


def test_several_labels_have_a_weight_each():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.rand(6, 3).round()
    loss = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=W, reduction="sum")
    torch.testing.assert_close(losses.bce(logits, labels, weight=W), loss / (W * labels + 1 - labels).sum())


def rows(maps, binary):
    """[(cross entropy, distance of p from the truth, weight)] of the valid pixels, in float64."""
    logits, labels, two = maps
    for z, y in zip(logits.permute(0, 2, 3, 1).reshape(-1, 3).tolist(), (two if binary else labels).flatten().tolist()):
        if y != VOID:
            p = 1 / (1 + math.exp(-z[0])) if binary else math.exp(z[y]) / sum(map(math.exp, z))
            p = 1 - p if binary and y == 0 else p
            yield -math.log(p), 1 - p, ([1, 7] if binary else W.tolist())[y]


@pytest.mark.parametrize("binary", [True, False])
def test_focal_written_out(maps, binary):
    found = list(rows(maps, binary))
    focal = losses.focal if binary else losses.focal_softmax
    call = (maps[0][:, :1], maps[2]) if binary else maps[:2]
    options = dict(weight=7. if binary else W, ignore=VOID)
    expected = sum(w * ce * d ** 2 for ce, d, w in found) / sum(w for *_, w in found)
    assert focal(*call, **options).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", [losses.dice_softmax, losses.lovasz_softmax])
def test_means_over_classes_are_weighted(maps, loss):
    """With all weight on one class the loss is that of this class; the rest follows from its linearity."""
    logits, labels, _ = maps
    options = dict(ignore=VOID)
    alone = [loss(logits, labels, weight=one, **options).item() for one in torch.eye(3)]
    assert np.mean(alone) == pytest.approx(loss(logits, labels, **options).item(), rel=1e-5) and len(set(alone)) == 3
    assert loss(logits, labels, weight=W, **options).item() == pytest.approx(np.average(alone, weights=W), rel=1e-5)


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.focal_softmax, losses.dice_softmax,
                                  losses.lovasz_softmax])
def test_equal_weights_change_nothing_and_nothing_valid_is_zero(maps, loss):
    logits, labels, _ = maps
    torch.testing.assert_close(loss(logits, labels, weight=torch.full((3,), 0.1), ignore=VOID),
                               loss(logits, labels, ignore=VOID))
    logits.requires_grad_()
    loss(logits, torch.full_like(labels, VOID), weight=W, ignore=VOID).backward()
    assert not logits.grad.any()


def test_balanced():
    """100 samples of class 0, none of class 1, 25 of class 2: the mean weight of a sample is 1."""
    assert losses.balanced([100, 0, 25]) == pytest.approx([125 / 200, 0, 125 / 50])
    assert losses.balanced([20, 50], negatives=[80, 50]) == pytest.approx([4, 1])


# ---- scripts ---------------------------------------------------------------------------------------------------------
def write_rare(root, count=8, side=32):
    """Tiles of noise in which an object, 1 pixel of 1,024, is brighter, by less than the noise hides for sure."""
    for folder in ("train_img", "train_mask"):
        (root / folder).mkdir(parents=True)
    for i in range(count):
        rng = np.random.default_rng(i)
        image, mask = rng.normal(20000, 3000, (2, side, side)), np.zeros((side, side), np.uint8)
        y, x = rng.integers(4, side - 4, 2)
        mask[y, x] = 1
        image[:, y, x] += 20000
        write_tif(root / f"train_img/{i}.tif", image.clip(0, 65535).astype(np.uint16))
        write_tif(root / f"train_mask/{i}.tif", mask)
    return root


def test_a_class_of_a_thousandth_is_found(script, tmp_path, capsys):
    flags = ["--data", write_rare(tmp_path / "DATA"), *TINY, "--bands", "1-2", "--folds", 0, "--loss", "bce", "--epochs", 4,
             "--repeat", 6, "--lr", 0.005, "--schedule", "constant", "--no-mean-planes", "--no-ema"]
    found = {}
    for name, more in (("plain", []), ("weighted", ["--class-weights", "balanced"])):
        script(train_seg, *flags, "--name", name, *more)
        out = capsys.readouterr().out
        assert "object 8" in out and ("background (8,184)" in out and "object (8) 512" in out) == bool(more)
        state = checkpoint.load(f"runs/seg/{name}/last.pt")
        found[name] = recall(state, tmp_path / "DATA")
    assert found["plain"] == 0 and found["weighted"] >= 6, found
    assert state["args"]["class_weights"] == pytest.approx([8192 / 8184 / 2, 512])


def recall(state, root):
    """How many of the tiles' objects the net finds."""
    import nets
    from data import seg
    net, inputs = nets.build(state["arch"]), seg.Input(**state["input"])
    checkpoint.load_weights(net, state, "last.pt")
    samples, found = seg.read(root), 0
    with torch.inference_mode():
        for item in (seg.SegData(samples.pairs, bands=samples.bands)[i] for i in range(8)):
            found += bool(net.eval()(inputs(item["image"][None]))[0, 0][item["mask"] > 0] > 0)
    return found


def test_classification(script, tmp_path, capsys, refused):
    root = write_dirty(tmp_path / "resources", train=12)
    answers = np.loadtxt(root / "dirty_mnist_2nd_answer.csv", delimiter=",", skiprows=1)[:, 1:]
    script(train_cls, "--data", root, *TINY_CLS, "--folds", 0, "--class-weights", "balanced", "--mixup", 1)
    count = answers.sum(0)
    weights = checkpoint.load("runs/cls/exp/last.pt")["args"]["class_weights"]
    assert weights == pytest.approx((12 - count) / count)
    assert f"a ({int(count[0])}) {weights[0]:.4g}" in capsys.readouterr().out
    losses_of = {}
    for loss in ("bce", "focal"):
        for weights in ("1,1,1,1", "9,1,1,1"):
            name = f"{loss}{weights[0]}"
            script(train_cls, "--data", root, *TINY_CLS, "--folds", 0, "--loss", loss, "--class-weights", weights,
                   "--name", name)
            losses_of[name] = checkpoint.load(f"runs/cls/{name}/last.pt")["history"][0]["loss"]
    assert len(set(losses_of.values())) == 4  # the weights have come to the losses
    refused(train_cls, "--data", root, *TINY_CLS, "--class-weights", "1,2", says=["--class-weights", "2 numbers for 4"])


@pytest.mark.parametrize("flags, says", [
    (["--class-weights", "1,2,3"], "3 numbers for 2 classes"), (["--class-weights", "1,x"], "--class-weights"),
    (["--class-weights", "0,1"], "--class-weights"),
    (["--class-weights", "1,2", "--loss", "dice"], "--class-weights: does nothing without a --loss of bce, focal; leave")])
def test_weights_that_do_not_fit(refused, wildfire, flags, says):
    refused(train_seg, "--data", wildfire, *TINY, *flags, says=says)
