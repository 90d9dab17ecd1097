"""utils/losses against its formulas, pixel by pixel in float64, and against torch and segmentation-models-pytorch."""
import math

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from timm.loss import SoftTargetCrossEntropy
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.ops import sigmoid_focal_loss

from utils import losses
from utils.losses import bce, cross_entropy, dice, dice_softmax, focal, focal_softmax, lovasz_hinge, lovasz_softmax
from utils.metrics.segmentation import BinaryIoU, MeanIoU

VOID = 255


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """With several threads on a busy machine, the small tensors of this file take three times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def maps(*shape, positive=0.3, void=0., seed=0, dtype=torch.float32):
    """Random logits and a 0/1 mask with some VOID pixels."""
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(shape, generator=g)
    labels = (torch.rand(shape, generator=g) < positive).long()
    labels[torch.rand(shape, generator=g) < void] = VOID
    return logits.to(dtype), labels


def class_maps(batch, classes, height, width, void=0., seed=0):
    """Random logits and a label map in which the last class never occurs, with some VOID pixels."""
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(batch, classes, height, width, generator=g)
    labels = torch.randint(0, classes - 1, (batch, height, width), generator=g)
    labels[torch.rand(labels.shape, generator=g) < void] = VOID
    return logits, labels


def with_grad(loss, logits, labels, **kwargs):
    """Value and gradient."""
    logits = logits.clone().requires_grad_()
    value = loss(logits, labels, **kwargs)
    return value.detach(), torch.autograd.grad(value, logits)[0]


# ---- the formulas, one pixel at a time ------------------------------------------------------------------------------

def naive_lovasz(errors, positive):
    """Lists of errors and 0/1 -> (weight of each error, their weighted sum): Lovász extension of |M| / |G u M|."""
    weights, before, wrong, union = [0.] * len(errors), 0., 0, sum(positive)
    for i in sorted(range(len(errors)), key=lambda i: -errors[i]):
        wrong, union = wrong + 1, union + (not positive[i])
        weights[i] = wrong / union - before
        before = wrong / union
    return weights, sum(w * e for w, e in zip(weights, errors))


def naive_hinge(logits, labels, elu, void):
    """One image as flat lists -> value, gradient."""
    keep = [i for i, y in enumerate(labels) if y != void]
    errors = [1 - logits[i] * (2 * labels[i] - 1) for i in keep]
    weights, _ = naive_lovasz(errors, [labels[i] for i in keep])
    value, grad = 0., [0.] * len(logits)
    for i, e, w in zip(keep, errors, weights):
        ramp, slope = (e, 1) if e > 0 else (math.expm1(e) if elu else 0., math.exp(e) if elu else 0)
        value += w * (ramp + elu)
        grad[i] = -w * slope * (2 * labels[i] - 1)
    return value, grad


def naive_softmax(logits, labels, void):
    """One image, logits (C,P) and labels (P) as lists -> value, gradient (C,P)."""
    count, keep = len(logits), [i for i, y in enumerate(labels) if y != void]
    total = {i: sum(math.exp(logits[c][i]) for c in range(count)) for i in keep}
    probs = [{i: math.exp(logits[c][i]) / total[i] for i in keep} for c in range(count)]
    used = [c for c in range(count) if any(labels[i] == c for i in keep)]
    value, slopes = 0., [{i: 0. for i in keep} for c in range(count)]
    for c in used:
        positive = [labels[i] == c for i in keep]
        weights, part = naive_lovasz([1 - probs[c][i] if y else probs[c][i] for i, y in zip(keep, positive)], positive)
        value += part / len(used)
        slopes[c] = {i: (-w if y else w) / len(used) for i, y, w in zip(keep, positive, weights)}
    grad = [[0.] * len(labels) for c in range(count)]
    for i in keep:
        mean = sum(probs[c][i] * slopes[c][i] for c in range(count))
        for c in range(count):
            grad[c][i] = probs[c][i] * (slopes[c][i] - mean)
    return value, grad


@pytest.mark.parametrize("void", [0., 0.3])
@pytest.mark.parametrize("elu", [False, True])
def test_hinge_is_its_formula(elu, void):
    logits, labels = maps(5, 6, 7, void=void)
    labels[1][labels[1] == 1] = 0  # no positives
    labels[2][labels[2] == 0] = 1  # no negatives
    labels[3] = VOID if void else labels[3]
    ignore = VOID if void else None
    value, grad = with_grad(lovasz_hinge, logits, labels, elu=elu, ignore=ignore)
    images = [naive_hinge(z.flatten().tolist(), y.flatten().tolist(), elu, VOID) for z, y in zip(logits, labels)]
    assert value.item() == pytest.approx(sum(v for v, _ in images) / 5, rel=1e-6)
    torch.testing.assert_close(grad.flatten(1), torch.tensor([g for _, g in images]) / 5, rtol=1e-5, atol=1e-8)

    value, grad = with_grad(lovasz_hinge, logits, labels, per_image=False, elu=elu, ignore=ignore)
    expected, slope = naive_hinge(logits.flatten().tolist(), labels.flatten().tolist(), elu, VOID)
    assert value.item() == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(grad.flatten(), torch.tensor(slope), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("void", [0., 0.3])
def test_softmax_is_its_formula(void):
    logits, labels = class_maps(4, 4, 5, 6, void=void)
    labels[1][labels[1] == 2] = 0
    labels[2] = VOID if void else labels[2]
    value, grad = with_grad(lovasz_softmax, logits, labels, ignore=VOID if void else None)
    flat = logits.transpose(0, 1).flatten(1)
    expected, slope = naive_softmax(flat.tolist(), labels.flatten().tolist(), VOID)
    assert value.item() == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(grad.transpose(0, 1).flatten(1), torch.tensor(slope), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("positive", [0.0005, 0.3])
def test_hinge_keeps_its_digits_at_full_size(positive):
    """1 - z and 1 + z are exact in fp32 and have no ties, so the order is the same in both precisions."""
    _, labels = maps(1, 257, 256, positive=positive)
    order = torch.randperm(257 * 256, generator=torch.Generator().manual_seed(1))
    logits = ((order - 32896 + 0.25) / 8192).view(1, 257, 256)
    value, grad = with_grad(lovasz_hinge, logits, labels, elu=True)
    expected, slope = naive_hinge(logits.flatten().tolist(), labels.flatten().tolist(), True, VOID)
    assert value.item() == pytest.approx(expected, rel=2e-6)
    torch.testing.assert_close(grad.flatten(), torch.tensor(slope), rtol=2e-6, atol=0)


# ---- exact values ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("positive", [0., 0.01, 0.5, 1.])
def test_hinge_at_zero_logits(positive):
    """All errors are 1 and the gradients sum to 1."""
    _, labels = maps(3, 100, 100, positive=positive)
    zeros = torch.zeros(3, 100, 100)
    assert lovasz_hinge(zeros, labels).item() == pytest.approx(1, abs=1e-5)
    assert lovasz_hinge(zeros, labels, elu=True).item() == pytest.approx(2, abs=2e-5)
    assert lovasz_hinge(zeros, labels, per_image=False).item() == pytest.approx(1, abs=1e-5)


def test_lovasz_gradients_sum_to_one():
    """Where all errors are above 0, the gradient with respect to the errors is lovasz_grad."""
    logits, labels = maps(3, 64, 64)
    _, grad = with_grad(lovasz_hinge, logits.clamp(-0.9, 0.9), labels)
    torch.testing.assert_close(-3 * (grad * (2 * labels - 1)).sum((1, 2)), torch.ones(3))


def test_hinge_of_an_empty_mask_has_a_gradient_at_the_top_pixel_only():
    logits, _ = maps(2, 8, 8)
    value, grad = with_grad(lovasz_hinge, logits[:1], torch.zeros(1, 8, 8))
    assert value.item() == pytest.approx(1 + logits[0].max().item())
    expected = torch.zeros(64)
    expected[logits[0].argmax()] = 1
    assert torch.equal(grad.flatten(), expected)
    assert lovasz_hinge(-2 - logits.abs(), torch.zeros(2, 8, 8)).item() == 0


def test_hinge_of_a_full_mask_is_uniform():
    logits, _ = maps(1, 8, 8)
    _, grad = with_grad(lovasz_hinge, logits.clamp(max=0.5), torch.ones(1, 8, 8))
    torch.testing.assert_close(grad, torch.full((1, 8, 8), -1 / 64))


def test_batched_rows_are_the_per_image_loop():
    logits, labels = maps(6, 32, 32, void=0.1)
    for elu in (False, True):
        loop = [lovasz_hinge(z[None], y[None], elu=elu, ignore=VOID) for z, y in zip(logits, labels)]
        batched = lovasz_hinge(logits, labels, elu=elu, ignore=VOID)
        torch.testing.assert_close(batched, torch.stack(loop).mean(), rtol=1e-6, atol=0)
        whole = lovasz_hinge(logits.reshape(1, 192, 32), labels.reshape(1, 192, 32), elu=elu, ignore=VOID)
        torch.testing.assert_close(lovasz_hinge(logits, labels, False, elu, VOID), whole, rtol=1e-6, atol=0)


def test_lovasz_of_hard_predictions_is_one_minus_iou():
    """The extension equals the set function at its corners; logits of +-1 make errors of 0 and 2."""
    logits, labels = maps(1, 30, 30)
    metric = BinaryIoU()
    metric.update((logits > 0).float(), labels)
    assert lovasz_hinge(logits.sign(), labels).item() == pytest.approx(2 * (1 - metric.compute()["iou"]), abs=1e-5)

    logits, labels = class_maps(2, 4, 20, 20)
    best = logits.argmax(1)
    metric = MeanIoU(classes=4)
    metric.update(best, labels)
    hard = 200. * F.one_hot(best, 4).permute(0, 3, 1, 2)
    ious = [metric.compute()[f"iou_{c}"] for c in labels.unique()]  # of the classes that are present
    assert lovasz_softmax(hard, labels).item() == pytest.approx(1 - np.mean(ious), abs=1e-5)


def test_cross_entropies_written_out():
    logits, labels = maps(4, 5, void=0.2)
    s, weights = 0.1, [0.5, 1., 2., 3., 4.]
    total, count = 0., 0
    for row, targets in zip(logits.tolist(), labels.tolist()):
        for z, y, w in zip(row, targets, weights):
            if y != VOID:
                y = {0: s / 2, 1: 1 - s / 2}[y]
                p = 1 / (1 + math.exp(-z))
                total, count = total - w * y * math.log(p) - (1 - y) * math.log(1 - p), count + (w if y > 0.5 else 1)
    value = bce(logits, labels, smoothing=s, weight=torch.tensor(weights), ignore=VOID)
    assert value.item() == pytest.approx(total / count, rel=1e-6)

    logits, labels = class_maps(3, 5, 2, 2, void=0.2)
    total, mass = 0., 0.
    for z, targets in zip(logits.flatten(2).transpose(1, 2).tolist(), labels.flatten(1).tolist()):
        for row, y in zip(z, targets):
            if y != VOID:
                norm = math.log(sum(map(math.exp, row)))
                for c in range(5):
                    total -= weights[c] * ((1 - s) * (c == y) + s / 5) * (row[c] - norm)
                mass += weights[y]
    value = cross_entropy(logits, labels, smoothing=s, weight=torch.tensor(weights), ignore=VOID)
    assert value.item() == pytest.approx(total / mass, rel=1e-6)


def test_cross_entropies_are_torchs_where_they_agree():
    logits, labels = maps(3, 1, 6, 6)
    for weight in (None, 3.5, torch.tensor([3.5])):
        same = None if weight is None else torch.tensor([3.5])
        mass = labels.numel() if weight is None else (labels * 3.5 + 1 - labels).sum()
        expected = with_grad(lambda z, y: F.binary_cross_entropy_with_logits(z, y, pos_weight=same, reduction="sum") / mass,
                             logits, labels.float())
        torch.testing.assert_close(with_grad(bce, logits, labels, weight=weight), expected)
    soft = torch.rand(3, 1, 6, 6)  # as mixup gives them
    torch.testing.assert_close(bce(logits, soft), F.binary_cross_entropy_with_logits(logits, soft))
    assert bce(torch.tensor([[1e4, -1e4]]), torch.tensor([[0, 1]])).item() == 1e4  # stable for large logits

    logits, labels = class_maps(3, 5, 6, 6, void=0.2)
    for kwargs in (dict(), dict(weight=torch.tensor([0.1, 0.2, 0.3, 0.1, 0.])), dict(weight=torch.full((5,), 1e-3))):
        expected = with_grad(F.cross_entropy, logits, labels, ignore_index=VOID, label_smoothing=0.1, **kwargs)
        torch.testing.assert_close(with_grad(cross_entropy, logits, labels, smoothing=0.1, ignore=VOID, **kwargs),
                                   expected)
    torch.testing.assert_close(cross_entropy(logits[:, :, 0, 0], torch.tensor([0, 1, 4])),
                               F.cross_entropy(logits[:, :, 0, 0], torch.tensor([0, 1, 4])))


def naive_dice(rows, smooth):
    """Rows of (probability, label) -> mean of their losses."""
    losses = [1 - (2 * sum(p * y for p, y in row) + smooth) / (sum(p for p, _ in row) + sum(y for _, y in row) + smooth)
              for row in rows]
    return sum(losses) / len(losses)


def probabilities(logits):
    """Lists -> the softmax."""
    return [math.exp(z) / sum(map(math.exp, logits)) for z in logits]


@pytest.mark.parametrize("smooth", [1., 7.])
def test_dice_is_its_formula(smooth):
    logits, labels = maps(4, 6, 7, void=0.2, dtype=torch.float64)
    labels[1][labels[1] == 1] = 0  # no positives
    labels[2] = VOID
    rows = [[(1 / (1 + math.exp(-z)), y) for z, y in zip(logits.flatten().tolist(), labels.flatten().tolist())
             if y != VOID]]
    assert dice(logits, labels, smooth, VOID).item() == pytest.approx(naive_dice(rows, smooth), rel=1e-12)

    logits, labels = class_maps(3, 4, 5, 6, void=0.2)  # the last class never occurs
    pixels = [(probabilities(z), y) for z, y in
              zip(logits.double().permute(0, 2, 3, 1).flatten(0, 2).tolist(), labels.flatten().tolist()) if y != VOID]
    rows = [[(p[c], c == y) for p, y in pixels] for c in range(4)]
    value = dice_softmax(logits.double(), labels, smooth, VOID)
    assert value.item() == pytest.approx(naive_dice(rows, smooth), rel=1e-12)


def test_dice_without_positives_is_lowest_when_nothing_is_found():
    """It is P / (P + 1) with a gradient; smp gives 0, and nnU-Net's smoothing gives no gradient."""
    empty = torch.zeros(1, 40, 50)
    for level in (0., -4., -8.):
        found = 2000 / (1 + math.exp(-level))
        value, grad = with_grad(dice, torch.full((1, 40, 50), level), empty)
        assert value.item() == pytest.approx(found / (found + 1), rel=1e-5)
        assert (grad > 0).all() and grad.sum() <= 0.25
    assert with_grad(dice, torch.full((1, 40, 50), math.log(1 / 1999)), empty)[1].sum() == pytest.approx(0.25, rel=1e-3)
    assert dice(torch.full((1, 40, 50), -1e4), empty).item() == 0
    assert dice(torch.full((1, 40, 50), 1e4), empty + 1).item() == 0


@pytest.mark.parametrize("gamma", [0., 0.5, 2.])
def test_focal_softmax_is_its_formula(gamma):
    logits, labels = class_maps(2, 4, 5, 6, void=0.2)
    pixels = zip(logits.double().flatten(2).transpose(1, 2).flatten(0, 1).tolist(), labels.flatten().tolist())
    terms = [-(1 - probabilities(z)[y]) ** gamma * math.log(probabilities(z)[y]) for z, y in pixels if y != VOID]
    value = focal_softmax(logits.double(), labels, gamma, VOID)
    assert value.item() == pytest.approx(sum(terms) / len(terms), rel=1e-12)


def test_focal_softmax_without_its_factor_is_cross_entropy():
    logits, labels = class_maps(3, 4, 8, 8, void=0.2)
    torch.testing.assert_close(with_grad(focal_softmax, logits, labels, gamma=0., ignore=VOID),
                               with_grad(cross_entropy, logits, labels, ignore=VOID))


@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 4, 3)])
def test_soft_labels_of_cross_entropy(shape):
    g = torch.Generator().manual_seed(0)
    logits, soft = torch.randn(shape, generator=g), torch.rand(shape, generator=g).softmax(1)
    hard = torch.randint(0, 5, shape[:1] + shape[2:], generator=g)
    one_hot = F.one_hot(hard, 5).movedim(-1, 1)
    void = torch.rand(hard.shape, generator=g) < 0.3
    for weight in (None, torch.tensor([0.5, 1., 2., 3., 4.])):
        kwargs = dict(smoothing=0.1, weight=weight, ignore=VOID)
        for dtype in (torch.uint8, torch.float32):  # one-hot labels equal hard labels, also for ignored elements
            torch.testing.assert_close(
                with_grad(cross_entropy, logits, one_hot.masked_fill(void.unsqueeze(1), VOID).to(dtype), **kwargs),
                with_grad(cross_entropy, logits, hard.masked_fill(void, VOID), **kwargs))
    torch.testing.assert_close(with_grad(cross_entropy, logits, soft, smoothing=0.2),
                               with_grad(F.cross_entropy, logits, soft, label_smoothing=0.2))
    if len(shape) == 2:
        torch.testing.assert_close(cross_entropy(logits, soft), SoftTargetCrossEntropy()(logits, soft))
    # linear in the shares, also where they do not add up to 1
    both = 0.7 * cross_entropy(logits, soft) + 0.8 * cross_entropy(logits, one_hot)
    torch.testing.assert_close(cross_entropy(logits, 0.7 * soft + 0.8 * one_hot), both)
    alone = soft.clone()
    alone[1:] = 0  # no share at all, but not ignored
    torch.testing.assert_close(cross_entropy(logits, alone), cross_entropy(logits[:1], soft[:1]) / len(soft))
    value, grad = with_grad(cross_entropy, logits, torch.full(shape, 255.), smoothing=0.1, ignore=VOID)
    assert value == 0 and (grad == 0).all()


@pytest.mark.parametrize("smoothing", [0.02, 0.2])
def test_smoothed_bce_is_lowest_at_the_smoothed_label(smoothing):
    best = math.log((1 - smoothing / 2) / (smoothing / 2))
    _, grad = with_grad(bce, torch.tensor([[best, -best]]), torch.tensor([[1, 0]]), smoothing=smoothing)
    assert grad.abs().max() < 1e-7
    _, grad = with_grad(bce, torch.tensor([[best, -best]]), torch.tensor([[1, 0]]), smoothing=smoothing / 2)
    assert grad.abs().min() > 1e-3


def test_segmentation_models_pytorch_agrees():
    logits, labels = maps(3, 1, 16, 16, void=0.2)
    for per_image in (True, False):
        theirs = smp.losses.LovaszLoss("binary", per_image=per_image, ignore_index=VOID)
        torch.testing.assert_close(with_grad(lovasz_hinge, logits, labels, per_image=per_image, ignore=VOID),
                                   with_grad(theirs, logits, labels), rtol=1e-5, atol=1e-6)
    _, labels = maps(3, 1, 16, 16)
    theirs = smp.losses.SoftBCEWithLogitsLoss(smooth_factor=0.05, ignore_index=None)
    torch.testing.assert_close(bce(logits, labels, smoothing=0.1), theirs(logits, labels.float()))

    logits, labels = class_maps(3, 4, 16, 16, void=0.2)
    theirs = smp.losses.LovaszLoss("multiclass", per_image=False, ignore_index=VOID)
    torch.testing.assert_close(with_grad(lovasz_softmax, logits, labels, ignore=VOID),
                               with_grad(theirs, logits, labels), rtol=1e-5, atol=1e-6)


def test_dice_and_focal_of_others():
    """Dice without smoothing, where every class occurs, because smp ignores absent classes."""
    logits, labels = maps(3, 1, 16, 16, void=0.2)
    theirs = smp.losses.DiceLoss("binary", ignore_index=VOID)
    torch.testing.assert_close(with_grad(dice, logits, labels, smooth=1e-7, ignore=VOID),
                               with_grad(theirs, logits, labels), rtol=1e-5, atol=1e-7)
    for gamma in (0., 2., 3.):
        theirs = smp.losses.FocalLoss("binary", gamma=gamma, ignore_index=VOID)
        torch.testing.assert_close(with_grad(focal, logits, labels, gamma=gamma, ignore=VOID),
                                   with_grad(theirs, logits, labels), rtol=1e-5, atol=1e-7)
        labels = labels.clamp(max=1)
        ours = with_grad(focal, logits, labels, gamma=gamma)
        torch.testing.assert_close(ours, with_grad(sigmoid_focal_loss, logits, labels.float(), alpha=-1, gamma=gamma,
                                                   reduction="mean"), rtol=1e-5, atol=1e-7)

    logits, labels = class_maps(3, 5, 16, 16, void=0.2)
    theirs = smp.losses.DiceLoss("multiclass", ignore_index=VOID)
    torch.testing.assert_close(with_grad(dice_softmax, logits[:, :4], labels, smooth=1e-7, ignore=VOID),
                               with_grad(theirs, logits[:, :4], labels), rtol=1e-5, atol=1e-7)


# ---- what holds for every loss --------------------------------------------------------------------------------------

EVERY = [(lovasz_hinge, dict(), 0), (lovasz_hinge, dict(elu=True), 0), (lovasz_hinge, dict(per_image=False), 0),
         (lovasz_softmax, dict(), 4),
         (bce, dict(smoothing=0.1, weight=2.), 0), (cross_entropy, dict(smoothing=0.1), 4),
         (dice, dict(), 0), (dice_softmax, dict(), 4), (focal, dict(smoothing=0.1), 0), (focal_softmax, dict(), 4)]
every_loss = pytest.mark.parametrize("loss, kwargs, classes", EVERY, ids=[f"{f.__name__}-{k}" for f, k, _ in EVERY])


def sample(classes, size, void=0.2):
    return class_maps(3, classes, size, size, void=void) if classes else maps(3, size, size, void=void)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_fp32(loss, kwargs, classes, dtype):
    """150x150x3 = 67,500 pixels, more than fp16 can count; also with half labels, inside and outside autocast."""
    logits, labels = sample(classes, 150)
    logits, labels = logits.to(dtype), labels.to(dtype)
    expected, slope = with_grad(loss, logits.float(), labels.long(), ignore=VOID, **kwargs)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype, enabled=enabled):
            value, grad = with_grad(loss, logits, labels, ignore=VOID, **kwargs)
        assert value.dtype == torch.float32 and value == expected
        assert grad.dtype == dtype and grad.isfinite().all()
        assert torch.equal(grad, slope.to(dtype))
    assert with_grad(loss, logits.double(), labels, ignore=VOID, **kwargs)[0].dtype == torch.float64


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extreme_logits_have_finite_gradients(loss, kwargs, classes, dtype):
    logits, labels = sample(classes, 8)
    for ignore in (VOID, None):
        labels = labels if ignore else labels.clamp(max=1)
        for far in (1e4 * logits.sign(), torch.full_like(logits, 1e4), torch.full_like(logits, -1e4)):
            value, grad = with_grad(loss, far.to(dtype), labels, ignore=ignore, **kwargs)
            assert value.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("gamma", [0., 0.5, 1., 2.])
def test_focal_gradients_are_finite_where_everything_is_right(gamma):
    """The slope of x^0.5 at 0 is infinite."""
    labels = torch.tensor([[1, 0, 1, 0]])
    for far in (0., 20., 1e4):
        value, grad = with_grad(focal, far * (2. * labels - 1), labels, gamma=gamma)
        assert value.isfinite() and grad.isfinite().all()
        value, grad = with_grad(focal_softmax, far * F.one_hot(labels, 3).movedim(-1, 1).float(), labels, gamma=gamma)
        assert value.isfinite() and grad.isfinite().all()


def test_losses_run_outside_autocast():
    """Autocast would round matrix products; today's losses have none, a new one may."""
    a = torch.tensor([[1 + 2 ** -12]])
    with torch.autocast("cpu", torch.bfloat16):
        assert a @ a == 1
        assert losses._in_fp32(torch.matmul)(a, a) == (1 + 2 ** -12) ** 2


@every_loss
@pytest.mark.parametrize("junk", [-7., 1e30, math.inf, math.nan])
def test_ignored_pixels_have_no_influence(loss, kwargs, classes, junk):
    logits, labels = sample(classes, 9)
    value, grad = with_grad(loss, logits, labels, ignore=VOID, **kwargs)
    void = (labels == VOID).unsqueeze(1) if classes else labels == VOID
    changed, slope = with_grad(loss, logits.masked_fill(void, junk), labels, ignore=VOID, **kwargs)
    assert changed == value and torch.equal(grad, slope)
    assert (grad.masked_select(void.expand_as(grad)) == 0).all()
    assert (grad.masked_select(~void.expand_as(grad)) != 0).any()
    other, slope = with_grad(loss, logits, labels.masked_fill(labels == VOID, -3), ignore=-3, **kwargs)
    assert other == value and torch.equal(grad, slope)


@every_loss
def test_nothing_valid_is_zero(loss, kwargs, classes):
    logits, labels = sample(classes, 5)
    value, grad = with_grad(loss, logits, torch.full_like(labels, VOID), ignore=VOID, **kwargs)
    assert value == 0 and (grad == 0).all()


@pytest.mark.parametrize("loss, kwargs, classes", [e for e in EVERY if e[0] in (lovasz_hinge, lovasz_softmax)
                                                   or "per_image" in e[1]])
def test_image_without_valid_pixels_counts_as_zero(loss, kwargs, classes):
    logits, labels = sample(classes, 7)
    labels[1] = VOID
    rest = loss(logits[::2], labels[::2], ignore=VOID, **kwargs)
    per_image = kwargs.get("per_image", loss is lovasz_hinge)
    expected = rest * 2 / 3 if per_image else rest
    torch.testing.assert_close(loss(logits, labels, ignore=VOID, **kwargs), expected, rtol=1e-6, atol=0)


@every_loss
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32, torch.bool])
def test_labels_of_any_dtype(loss, kwargs, classes, dtype):
    logits, labels = sample(classes, 8, void=0.2)
    if dtype == torch.bool:
        labels, ignore = labels.clamp(max=1), None
    else:
        ignore = VOID
    assert loss(logits, labels.to(dtype), ignore=ignore, **kwargs) == loss(logits, labels, ignore=ignore, **kwargs)


def test_a_negative_ignore_leaves_uint8_255_alone():
    """For torch a uint8 255 equals -1."""
    logits, labels = maps(2, 6, 6)
    mask = (255 * labels).to(torch.uint8)
    assert lovasz_hinge(logits, mask, ignore=-1) == lovasz_hinge(logits, labels)


@every_loss
def test_no_loss_reads_values_back_from_the_gpu(loss, kwargs, classes):
    """Fake tensors have no values: whatever would read them back from a GPU (.item(), boolean indexing) raises."""
    with FakeTensorMode() as mode:
        logits, labels = (mode.from_tensor(t) for t in sample(classes, 8))
        loss(logits.requires_grad_(), labels, ignore=VOID, **kwargs).backward()
        with pytest.raises(Exception, match="(?i)data.?dependent|unbacked|dynamic|_local_scalar_dense|nonzero"):
            float(logits.detach().sum())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_loss
def test_gpu_gives_the_same_and_never_syncs(loss, kwargs, classes):
    logits, labels = sample(classes, 64)
    expected = with_grad(loss, logits, labels, ignore=VOID, **kwargs)
    logits, labels = logits.cuda(), labels.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value, grad = with_grad(loss, logits, labels, ignore=VOID, **kwargs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close((value.cpu(), grad.cpu()), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss", [lovasz_hinge, bce, dice, focal])
def test_the_channel_axis_of_a_mask_is_optional(loss):
    logits, labels = maps(3, 6, 5)
    expected = loss(logits, labels)
    assert loss(logits[:, None], labels[:, None]) == expected
    assert loss(logits[:, None], labels) == expected
    assert loss(logits, labels[:, None]) == expected


def test_wrong_shapes_are_named():
    logits, labels = maps(2, 4, 6)
    for wrong in (labels.transpose(1, 2), labels[:1], labels[None], labels[:, None].expand(2, 3, 4, 6)):
        for loss in (lovasz_hinge, bce, dice, focal):
            with pytest.raises(ValueError, match="shape"):
                loss(logits, wrong)
    for several in (torch.zeros(2, 3, 4, 6), torch.zeros(2, 26)):
        with pytest.raises(ValueError, match=r"must be \(B,H,W\)"):
            lovasz_hinge(several, several)
        with pytest.raises(ValueError, match=r"must be \(B,H,W\)"):
            dice(several, several)
    many = torch.zeros(2, 3, 4, 6)
    for wrong in (labels.transpose(1, 2), labels[:, None], many):
        for loss in (lovasz_softmax, dice_softmax, focal_softmax, cross_entropy):
            if loss is cross_entropy and wrong is many:
                continue  # soft labels
            with pytest.raises(ValueError, match=r"need labels \(B,\.\.\.\)"):
                loss(many, wrong)
    with pytest.raises(ValueError, match="not 1"):
        lovasz_softmax(many[:, :1], labels)


@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
def test_focal_is_the_papers_formula(gamma):
    z, y = torch.randn(4, 7, dtype=torch.float64), (torch.rand(4, 7) < 0.5).double()
    p = z.sigmoid()
    of_truth = torch.where(y > 0, p, 1 - p)
    want = -((1 - of_truth) ** gamma * of_truth.log()).mean()
    assert float(losses.focal(z, y, gamma=gamma)) == pytest.approx(float(want), rel=1e-5)
    half = torch.where(torch.arange(7) < 3, y, 255.0)
    want = -((1 - of_truth) ** gamma * of_truth.log())[:, :3].mean()
    assert float(losses.focal(z, half, gamma=gamma, ignore=255)) == pytest.approx(float(want), rel=1e-5)
    assert float(losses.focal(z, y, smoothing=0.2, gamma=0.0)) == pytest.approx(float(losses.bce(z, y, smoothing=0.2)))
