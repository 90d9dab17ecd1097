"""data/augment/mix.py: the source of every pixel, and labels that agree with it."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from data.augment import mix
from utils import losses

SIZE = (18, 23)
EVERY = {"mixup": mix.mixup, "mixup_batch": lambda x: mix.mixup(x, per_image=False), "cutmix": mix.cutmix,
         "cutout": lambda x: (mix.cutout(x),), "gridmask": lambda x: (mix.gridmask(x),)}
every = pytest.mark.parametrize("function", EVERY.values(), ids=EVERY)


@pytest.fixture(autouse=True)
def seeded():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def batch(count=16, size=SIZE):
    """Images (count,2,H,W): number of the image and number of the pixel, both above 0."""
    pixels = 1 + torch.arange(size[0] * size[1]).view(1, *size)
    return torch.stack((torch.arange(1, count + 1).view(-1, 1, 1).expand(-1, *size),
                        pixels.expand(count, -1, -1)), 1).float()


def erased_of(images):
    """(B,C,H,W) that had no zeros -> (B,1,H,W) bool: the pixels that are 0 in all channels."""
    return (images == 0).all(1, keepdim=True)


def boxes_of(replaced):
    """(B,H,W) bool -> [(x1, y1, x2, y2)]; checks that each is a filled rectangle."""
    found = []
    for one in replaced:
        y, x = one.nonzero().T
        found.append((int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1))
        x1, y1, x2, y2 = found[-1]
        assert one[y1:y2, x1:x2].all() and one.sum() == (y2 - y1) * (x2 - x1)
    return found


# ---- mixup ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("per_image", [True, False])
def test_mixup_is_a_mean_of_two(per_image):
    x = torch.rand(6, 3, *SIZE)
    mixed, perm, lams = mix.mixup(x, alpha=1.0, per_image=per_image)
    assert lams.shape == (6 if per_image else 1, 1, 1, 1) and len(lams.unique()) == len(lams)
    assert sorted(perm.tolist()) == list(range(6)) and (perm != torch.arange(6)).all()
    for i in range(6):
        lam = float(lams[i if per_image else 0])
        expected = lam * x[i].double() + (1 - lam) * x[perm[i]].double()
        torch.testing.assert_close(mixed[i].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0, 5.0])
def test_lam_is_beta_distributed(alpha):
    """The fourth moment of Beta(a, a), by its recurrence, and the symmetry."""
    lam = mix.mixup(torch.zeros(40000, 1, 1, 1), alpha)[2].flatten().double()
    assert lam.min() >= 0 and lam.max() <= 1
    moment = math.prod((alpha + k) / (2 * alpha + k) for k in range(4))
    assert float((lam ** 4).mean()) == pytest.approx(moment, abs=0.01)
    assert float(((1 - lam) ** 4).mean()) == pytest.approx(moment, abs=0.01)


def test_one_lam_weights_any_loss():
    """For a mean over pixels the weighted losses equal the loss of soft labels."""
    masks = (torch.rand(4, *SIZE) < 0.3).float()
    _, perm, lam = mix.mixup(torch.rand(4, 3, *SIZE), alpha=1.0, per_image=False)
    logits, lam = torch.randn(4, 1, *SIZE), lam.squeeze()
    loss = lam * losses.bce(logits, masks) + (1 - lam) * losses.bce(logits, masks[perm])
    assert loss.shape == ()
    torch.testing.assert_close(loss, losses.bce(logits, lam * masks + (1 - lam) * masks[perm]))


# ---- cutmix ---------------------------------------------------------------------------------------------------------

def test_cutmix_pixel_by_pixel():
    x = batch(200)
    mixed, perm, lam = mix.cutmix(x)
    assert torch.equal(mixed[:, 1], x[:, 1])  # every pixel stays in its place
    kept = lam[:, 0] == 1
    assert torch.equal(kept | (lam[:, 0] == 0), torch.ones_like(kept))
    assert torch.equal(mixed[:, 0], torch.where(kept, x[:, 0], x[perm, 0]))
    assert (perm != torch.arange(200)).all()
    boxes = boxes_of(~kept)
    inner = [b for b in boxes if b[0] > 0 and b[1] > 0 and b[2] < SIZE[1] and b[3] < SIZE[0]]
    assert len(inner) > 20 and len(set(boxes)) > 150
    for x1, y1, x2, y2 in inner:  # the image's aspect
        assert abs((x2 - x1) / SIZE[1] - (y2 - y1) / SIZE[0]) <= 0.5 / SIZE[1] + 0.5 / SIZE[0]
    share = [1 - (x2 - x1) * (y2 - y1) / (SIZE[0] * SIZE[1]) for x1, y1, x2, y2 in boxes]
    labels = mix.mixed_labels(torch.eye(200), perm, lam)
    for i in range(200):
        assert labels[i, i].item() == pytest.approx(share[i], abs=1e-6)
        assert labels[i, perm[i]].item() == pytest.approx(1 - share[i], abs=1e-6)


def test_cutmix_boxes_are_the_papers():
    """Mean of the replaced area, of its square, and how often a border is touched, against a simulation."""
    rng = np.random.default_rng(1)
    side = np.sqrt(1 - rng.beta(0.7, 0.7, 200_000))
    edges = [(np.maximum(centre - side / 2, 0), np.minimum(centre + side / 2, 1)) for centre in
             rng.uniform(0, 1, (2, len(side)))]
    area = np.prod([high - low for low, high in edges], axis=0)
    lam = mix.cutmix(torch.zeros(4000, 1, 60, 80), alpha=0.7)[2]
    ours = 1 - lam.mean((1, 2, 3)).numpy()
    assert ours.mean() == pytest.approx(area.mean(), abs=0.015)
    assert (ours ** 2).mean() == pytest.approx((area ** 2).mean(), abs=0.015)
    for name, part in (("left", lam[..., 0]), ("right", lam[..., -1]), ("top", lam[:, :, 0]), ("low", lam[:, :, -1])):
        touched = (part == 0).any(2).float().mean()
        assert float(touched) == pytest.approx(np.mean(edges[0][0] == 0), abs=0.03), name


def test_boxes_are_never_empty():
    """With small and large alpha, and on one row of pixels; every border is reached."""
    for alpha, (height, width) in ((0.1, SIZE), (5.0, SIZE), (1.0, (1, 9))):
        kept = mix.cutmix(torch.zeros(3000, 1, height, width), alpha)[2][:, 0] == 1
        boxes = np.array(boxes_of(~kept))
        assert boxes.min(0)[:2].tolist() == [0, 0] and boxes.max(0)[2:].tolist() == [width, height]


def test_masks_are_cut_like_images():
    masks = torch.randint(0, 5, (16, *SIZE))
    x = torch.stack((masks, masks * 2), 1).float()
    mixed, perm, lam = mix.cutmix(x)
    cut = torch.where(lam[:, 0] > 0, masks, masks[perm])
    assert cut.dtype == masks.dtype and torch.equal(mixed[:, 0], cut.float()) and not torch.equal(cut, masks)


# ---- labels ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["mixup", "mixup_batch", "cutmix"])
def test_label_sums_stay(name):
    labels = (torch.rand(16, 7) < 0.4).int()
    _, *mixed = EVERY[name](torch.rand(16, 3, *SIZE))
    soft = mix.mixed_labels(labels, *mixed)
    assert soft.dtype == torch.float32 and soft.shape == (16, 7) and 0 <= soft.min() and soft.max() <= 1
    if name == "mixup_batch":
        torch.testing.assert_close(soft.sum(0), labels.sum(0).float())
    lam, perm = mixed[1].mean((1, 2, 3)).expand(16), mixed[0]
    torch.testing.assert_close(soft.sum(1), lam * labels.sum(1) + (1 - lam) * labels[perm].sum(1))
    torch.testing.assert_close(mix.mixed_labels(torch.eye(16), *mixed).sum(1), torch.ones(16))


def test_soft_labels_are_weighted_losses():
    hard = torch.arange(16) % 5
    logits, labels = torch.randn(16, 5), F.one_hot(hard, 5)
    each = F.cross_entropy(logits, hard, reduction="none")
    for name in ("mixup", "cutmix"):
        _, perm, kept = EVERY[name](torch.rand(16, 3, *SIZE))
        lam, soft = kept.mean((1, 2, 3)), mix.mixed_labels(labels, perm, kept)
        of_other = F.cross_entropy(logits, hard[perm], reduction="none")
        torch.testing.assert_close(losses.cross_entropy(logits, soft), (lam * each + (1 - lam) * of_other).mean())
        bits = F.binary_cross_entropy_with_logits
        torch.testing.assert_close(losses.bce(logits, soft), (
            lam * bits(logits, labels.float(), reduction="none").mean(1)
            + (1 - lam) * bits(logits, labels[perm].float(), reduction="none").mean(1)).mean())


# ---- parts erased --------------------------------------------------------------------------------------------------

def test_cutout_erases_a_square():
    x = batch(300, (30, 40))
    cut = mix.cutout(x, size=0.4)
    erased = erased_of(cut)
    assert torch.equal(cut, x * ~erased)
    boxes = np.array(boxes_of(erased[:, 0]))
    sides = boxes[:, 2:] - boxes[:, :2]
    assert sides.max() == 12 and ((boxes[:, 0] == 0) | (boxes[:, 2] == 40) | (sides[:, 0] == 12)).all()
    assert ((boxes[:, 1] == 0) | (boxes[:, 3] == 30) | (sides[:, 1] == 12)).all()
    inner = (boxes[:, :2] > 0).all(1) & (boxes[:, 2] < 40) & (boxes[:, 3] < 30)
    assert (sides[inner] == 12).all() and 80 < inner.sum() < 150  # 17 / 30 * 27 / 40 of 300 are 115
    assert erased.float().mean(0).min() > 0  # also in the corners


@pytest.mark.parametrize("size", [(48, 60), (61, 45)])
def test_a_straight_gridmask_is_periodic(size):
    x = batch(60, size)
    masked = mix.gridmask(x, period=(0.2, 0.3), ratio=(0.4, 0.8), degrees=0.0)
    erased = erased_of(masked)
    assert torch.equal(masked, x * ~erased)
    pitches, phases, low, high = set(), set(), round(0.2 * min(size)), round(0.3 * min(size))
    for one in erased[:, 0].numpy():
        rows, columns = one.any(1), one.any(0)
        assert np.array_equal(one, rows[:, None] & columns)  # a grid of rectangles
        starts = [np.flatnonzero(line & ~np.roll(line, 1))[1:] for line in (rows, columns)]
        pitch = np.diff(starts[1])[0]
        assert low <= pitch <= high
        hole = int(columns[starts[1][0]:starts[1][0] + pitch].sum())
        assert 0.2 * pitch - 0.5 <= hole <= 0.6 * pitch + 0.5
        for line, start in zip((rows, columns), starts):
            # the same period and the same squares along both axes
            assert np.array_equal(line, (np.arange(len(line)) - start[0]) % pitch < hole)
            phases.add(start[0] % pitch)
        pitches.add(pitch)
    assert pitches == set(range(low, high + 1)) and len(phases) > 8


@pytest.mark.parametrize("degrees", [0.0, 180.0])
def test_gridmask_keeps_its_share(degrees):
    """1 - (1 - ratio)^2; offsets are uniform, so that no pixel is erased more often than others."""
    erased = erased_of(mix.gridmask(torch.ones(1500, 1, 40, 40), period=(0.5, 0.5), ratio=(0.6, 0.6), degrees=degrees))
    assert float(erased.float().mean()) == pytest.approx(0.16, abs=0.005)
    assert (erased.float().mean(0) - 0.16).abs().max() < 0.05  # 1500 images: 4 standard deviations are 0.04


def test_gridmask_rotates():
    """The strongest wave of the grid has the direction of the rotation and the length of the period."""
    angles = []
    for degrees in (180.0, 10.0):
        erased = erased_of(mix.gridmask(torch.ones(60, 1, 128, 128), period=(0.125, 0.125), ratio=(0.5, 0.5),
                                        degrees=degrees))
        waves = torch.fft.fftshift(torch.fft.fft2(erased[:, 0].float() * torch.hann_window(128).outer(
            torch.hann_window(128))).abs(), dim=(1, 2))
        waves[:, 62:67, 62:67] = 0  # the mean
        y, x = np.unravel_index(waves.flatten(1).argmax(1).numpy(), (128, 128)) - np.array([[64], [64]])
        assert (abs(np.hypot(x, y) - 128 / 16) < 1.1).all()
        angles.append(np.degrees(np.arctan2(y, x)) % 90)  # two waves at right angles, each with two signs
    assert np.histogram(angles[0], 3, (0, 90))[0].min() > 8
    near = np.minimum(angles[1], 90 - angles[1])
    assert near.max() < 15 and near.max() > 4


@pytest.mark.parametrize("function", [mix.cutout, mix.gridmask])
def test_the_probability_is_per_image(function):
    x = torch.rand(1000, 1, 12, 12) + 1
    for p in (0.0, 0.3, 1.0):
        out = function(x, p=p)
        touched = erased_of(out).flatten(1).any(1)
        assert float(touched.float().mean()) == pytest.approx(p, abs=0.05 if 0 < p < 1 else 0)
        assert torch.equal(out[~touched], x[~touched])


# ---- what holds for all of them -------------------------------------------------------------------------------------

@every
def test_results_depend_on_torchs_seed(function):
    x = torch.rand(8, 3, *SIZE)
    torch.manual_seed(5)
    first, second = function(x), function(x)
    torch.manual_seed(5)
    again = function(x)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], second[0])


@every
def test_inputs_and_memory_format_stay(function):
    x = torch.rand(8, 3, *SIZE)
    nhwc = x.contiguous(memory_format=torch.channels_last)
    torch.manual_seed(5)
    plain = function(x)
    torch.manual_seed(5)
    last = function(nhwc)
    assert last[0].is_contiguous(memory_format=torch.channels_last) and torch.equal(x, nhwc)
    assert all(torch.allclose(a.float(), b.float(), atol=1e-6) for a, b in zip(plain, last))


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_stays(function, dtype):
    out = function(torch.rand(4, 3, *SIZE).to(dtype))
    assert out[0].dtype == dtype and out[0].isfinite().all()
    assert all(share.dtype == torch.float32 for share in out[2:])


@every
def test_one_image_or_one_pixel(function):
    for shape in ((1, 3, *SIZE), (4, 3, 1, 1), (3, 1, 1, 50)):
        x = torch.rand(shape)
        out = function(x)
        assert out[0].shape == x.shape and out[0].isfinite().all()
    x = torch.rand(1, 3, *SIZE)
    for name in ("mixup", "cutmix"):
        torch.testing.assert_close(EVERY[name](x)[0], x)


@every
def test_nothing_reads_values_back_from_the_gpu(function):
    """Fake tensors have no values: whatever would read them back from a GPU raises."""
    with FakeTensorMode() as mode:
        x = mode.from_tensor(torch.rand(4, 3, *SIZE))
        function(x)
        mix.mixed_labels(torch.rand(4, 7), *mix.cutmix(x)[1:])
