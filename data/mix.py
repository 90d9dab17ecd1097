"""Augmentation of whole batches, on the device, by mixing images with one another or by dropping parts of them.

Each image is mixed with the one before it in the batch, its partner: batches come shuffled. Random numbers are torch's,
drawn on the device of the images; the training loop seeds them before every batch. `for_labels` and `for_masks` are for
a script's compute_loss; below are their parts.
"""
import math

import torch
import torch.nn.functional as F


def for_labels(images, labels, *, p_mixup=0.0, p_cutmix=0.0, p_snapmix=0.0, heat=None, p_gridmask=0.0):
    """What a classifier trains on: images (B,C,H,W), labels (B,K) -> images, soft labels, which losses.bce, focal and
    cross_entropy take.

    p_mixup, p_cutmix, p_snapmix: how often a batch is mixed so, at most one of them at a time. heat: a function that
    returns `cam` of the unmixed images, for snapmix. p_gridmask: how often an image loses a grid.
    """
    kind = _one_of(mixup=p_mixup, cutmix=p_cutmix, snapmix=p_snapmix)
    if kind:
        images, *mixed = {"mixup": mixup, "cutmix": cutmix, "snapmix": lambda x: snapmix(x, heat())}[kind](images)
        labels = mixed_labels(labels, *mixed)
    return random_erase(images, p_gridmask=p_gridmask), labels


def for_masks(images, masks, *, p_mixup=0.0, p_cutmix=0.0, p_gridmask=0.0, p_cutout=0.0, cutout_size=0.5):
    """What a segmenter trains on: images (B,C,H,W), masks (B,H,W) -> images, [(masks, share of the loss)].

    Masks stay hard, so that any loss can be taken: of a batch that `mixup` has blended, with one share for all, the
    loss is taken twice. p_mixup, p_cutmix as in `for_labels`; p_gridmask, p_cutout: how often an image loses parts; its
    mask keeps them, as in the papers.
    """
    kind, targets = _one_of(mixup=p_mixup, cutmix=p_cutmix), [(masks, 1.0)]
    if kind == "mixup":
        images, partner, own = mixup(images, per_image=False)
        targets = [(masks, own.squeeze()), (masks[partner], 1 - own.squeeze())]
    elif kind == "cutmix":
        images, partner, own = cutmix(images)
        targets = [(torch.where(own[:, 0] > 0, masks, masks[partner]), 1.0)]
    return random_erase(images, p_gridmask=p_gridmask, p_cutout=p_cutout, cutout_size=cutout_size), targets


def random_erase(images, *, p_gridmask=0.0, p_cutout=0.0, cutout_size=0.5):
    """images (B,C,H,W) -> the same, of which some have lost parts."""
    images = gridmask(images, p=p_gridmask)[0] if p_gridmask else images
    return cutout(images, cutout_size, p=p_cutout)[0] if p_cutout else images


def _one_of(**shares):
    """The name of one of several things that happen so often, or None."""
    left = float(torch.rand(())) if any(shares.values()) else math.inf  # the CPU's generator: nobody waits for the GPU
    for name, share in shares.items():
        left -= share
        if left < 0:
            return name
    return None


# ---- images mixed with one another ----------------------------------------------------------------------------------

def mixup(images, alpha=0.2, *, per_image=True):
    """Weighted means of two images (Zhang et al. 2018, arXiv 1710.09412).

    images     (B,C,H,W), float
    alpha      > 0: shares are drawn from Beta(alpha, alpha); the paper's 0.1 to 0.4 on ImageNet leave most images
               nearly as they are
    per_image  a share for every image; False: one for the batch, so that any loss can be weighted with it
    returns    images, partner (B,) int64, own (B,1,1,1) or (1,1,1,1) fp32: image i is own[i] of image i and
               1 - own[i] of image partner[i]
    """
    own = _beta(len(images) if per_image else 1, alpha, images.device)[:, None, None, None]
    partner = _partner(images)
    return torch.lerp(images[partner], images, own.to(images.dtype)), partner, own


def cutmix(images, alpha=1.0):
    """A box of every image is replaced by the same box of its partner (Yun et al. 2019, arXiv 1905.04899).

    The box has the image's aspect and 1 - lam of its area, lam from Beta(alpha, alpha), alpha > 0; its centre lies
    anywhere, and what reaches beyond the image is cut off. images (B,C,H,W) -> images, partner (B,) int64, own
    (B,1,H,W) fp32: 1 where a pixel is the image's own, 0 where it is the partner's.
    """
    height, width = images.shape[2:]
    kept = ~_inside(_lam_boxes(len(images), alpha, height, width, images.device), height, width)
    partner = _partner(images)
    return torch.where(kept, images, images[partner]), partner, kept.float()


def snapmix(images, heat, alpha=5.0):
    """A box of every image is replaced by another box of its partner, resized, and the labels count by what the boxes
    show, not by their area (Huang et al. 2021, "SnapMix", arXiv 2012.04846).

    images   (B,C,H,W), float
    heat     (B,H,W) of `cam`
    alpha    > 0: both boxes are drawn as in `cutmix`, independently
    returns  images, partner (B,) int64, own (B,1) fp32: the share of the image's heat outside its box, other (B,1): the
             share of the partner's heat inside the partner's box. They need not add up to 1: an object pasted
             onto background makes more of it, background pasted onto an object less.
    """
    count, (height, width) = len(images), images.shape[2:]
    target, source = (_lam_boxes(count, alpha, height, width, images.device) for _ in range(2))
    partner = _partner(images)
    kept = ~_inside(target, height, width)
    mixed = torch.where(kept, images, _resized(images[partner], source, target))
    own = (heat * kept[:, 0]).sum((1, 2))
    other = (heat[partner] * _inside(source, height, width)[:, 0]).sum((1, 2))
    return mixed, partner, own[:, None], other[:, None]


@torch.no_grad()
def cam(maps, weight, labels, size):
    """Where the evidence for an image's labels lies: SnapMix's semantic percent map, a class activation map (Zhou et
    al. 2016, arXiv 1512.04150) that adds up to 1.

    maps     (B,F,h,w), the net's `last_map` of the unmixed images, best in eval mode
    weight   (K,F) of the linear classifier behind it
    labels   (B,K), 0 .. 1. Of several classes in an image, the mean of their maps counts
    size     (height, width) of the images
    returns  (B,height,width) fp32, >= 0. Uniform for an image without a class, or whose map is flat: boxes then count
             by their area, as in `cutmix`
    """
    with torch.autocast(maps.device.type, enabled=False):
        # the sum over the classes will do for the mean: in the end everything is divided by its sum
        heat = torch.einsum("bfhw,bf->bhw", maps.float(), labels.float() @ weight.float())
    heat = F.interpolate(heat[:, None], size, mode="bilinear")[:, 0]
    low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    flat = high - low <= 1e-5 * torch.maximum(high.abs(), low.abs())  # or what is left is rounding
    heat = torch.where(flat, 1, heat - low)  # activations may be negative, shares not
    return heat / heat.sum((1, 2), keepdim=True)


@torch.no_grad()
def heat(net, weight, images, labels):
    """`cam` of the net (with `last_map`) as it is now, batch norms as in prediction."""
    training = net.training
    maps = net.eval().last_map(images)
    net.train(training)
    # autocast would keep the casts of the weights for the step itself: their gradients would come last there, and DDP's
    # sums in another order than on a rank that has not looked
    torch.clear_autocast_cache()
    return cam(maps, weight, labels, images.shape[2:])


def mixed_labels(labels, partner, own, other=None):
    """labels (B,K) of 0 .. 1 and what the mixing function returned besides the images -> soft labels (B,K) fp32.

    Each is its own share of the image's label plus the other share of its partner's, 1 at most: two images of one class
    do not make more than that class. other: without, 1 - own. Of a map of pixels the mean counts, that is cutmix's lam.
    """
    labels, own = labels.float(), own.flatten(1).mean(1, keepdim=True)
    other = 1 - own if other is None else other
    return (own * labels + other * labels[partner]).clamp(max=1)


# ---- parts of images dropped ----------------------------------------------------------------------------------------

def cutout(images, size=0.5, *, p=1.0):
    """A square of every image set to 0 (DeVries and Taylor 2017, arXiv 1708.04552): of normalised ones, their mean.

    size: its side, share of the shorter side of the image. Its centre lies anywhere, and what reaches beyond the image
    is cut off. p: probability, image by image. images (B,C,H,W) -> images, dropped (B,1,H,W) bool. The paper drops from
    images only: labels stay, as do masks, which makes the net infer what it does not see.
    """
    height, width = images.shape[2:]
    side = torch.full((len(images),), max(1, round(size * min(height, width))), device=images.device)
    return _drop(images, _inside(_boxes(side, side, height, width), height, width), p)


def gridmask(images, *, period=(0.4, 1.0), ratio=(0.5, 0.7), degrees=180.0, p=1.0):
    """A turned grid of squares of every image set to 0 (Chen et al. 2020, "GridMask", arXiv 2001.04086).

    period   range of the distance between squares, share of the image's shorter side (the paper: 96 to 224 of 224
             pixels), rounded to pixels
    ratio    range of what is kept of a period, along both axes; squares have the rest as their side, in whole pixels:
             1 - (1 - ratio)^2 of the image is kept (the paper: 0.6, so 84 %)
    degrees  the grid is turned by up to this angle either way, about the image's middle
    p        probability, image by image; the paper lets it grow to 0.8 over the run
    images (B,C,H,W) -> images, dropped (B,1,H,W) bool. Labels and masks stay as in `cutout`.
    """
    height, width = images.shape[2:]

    def uniform(low, high):  # (B,1,1)
        return low + (high - low) * torch.rand(len(images), 1, 1, device=images.device)

    low, high = (max(2, round(share * min(height, width))) for share in period)
    pitch = torch.randint(low, high + 1, (len(images), 1, 1), device=images.device)
    hole = (pitch * (1 - uniform(*ratio))).round().clamp(min=1)
    angle = uniform(-degrees, degrees) * (math.pi / 180)
    x = torch.arange(width, device=images.device) + 0.5 - width / 2
    y = torch.arange(height, device=images.device)[:, None] + 0.5 - height / 2
    along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    # offsets in whole pixels: a grid that is not turned then has squares of whole pixels
    inside = [(line + (uniform(0, 1) * pitch).floor()) % pitch < hole for line in (along, across)]
    return _drop(images, (inside[0] & inside[1])[:, None], p)


# ---- their parts ----------------------------------------------------------------------------------------------------

def _partner(images):
    """(B,) int64: the image before, of the first one the last."""
    return torch.arange(len(images), device=images.device).roll(1)


def _beta(count, alpha, device):
    """(count,) fp32 from Beta(alpha, alpha)."""
    if not alpha > 0:
        raise ValueError(f"alpha must be above 0, not {alpha}")
    alpha = torch.full((count,), float(alpha), device=device)
    return torch.distributions.Beta(alpha, alpha, validate_args=False).sample()  # to validate would wait for the GPU


def _lam_boxes(count, alpha, height, width, device):
    """Boxes (count,4) of 1 - Beta(alpha, alpha) of the area, one pixel at least."""
    share = (1 - _beta(count, alpha, device)).sqrt()
    return _boxes(*((share * side).round().long().clamp(min=1) for side in (width, height)), height, width)


def _boxes(across, down, height, width):
    """Widths, heights (B,) in pixels -> boxes (B,4) int64 of x1, y1, x2, y2, centred anywhere, clipped; none empty."""
    edges = []
    for length, side in ((across, width), (down, height)):
        start = torch.randint(side, length.shape, device=length.device) - length // 2
        edges.append((start.clamp(min=0), (start + length).clamp(max=side)))
    return torch.stack([edge for pair in zip(*edges) for edge in pair], 1)


def _inside(boxes, height, width):
    """(B,4) x1, y1, x2, y2 -> (B,1,H,W) bool."""
    x1, y1, x2, y2 = boxes.T[..., None]
    x, y = torch.arange(width, device=boxes.device), torch.arange(height, device=boxes.device)
    return ((y >= y1) & (y < y2))[:, None, :, None] & ((x >= x1) & (x < x2))[:, None, None, :]


def _resized(images, source, target):
    """(B,C,H,W) whose target boxes (B,4) show what is in the source boxes, bilinear; of no use outside of them."""
    lines = []
    for axis, side in enumerate((images.shape[3], images.shape[2])):
        (s1, s2), (t1, t2) = (boxes[:, axis::2].float().T[..., None] for boxes in (source, target))
        place = s1 + (torch.arange(side, device=images.device) + 0.5 - t1) * (s2 - s1) / (t2 - t1)
        # to the centres of the box's outermost pixels: nothing beside it gets in
        lines.append(place.maximum(s1 + 0.5).minimum(s2 - 0.5) * 2 / side - 1)
    grid = torch.stack(torch.broadcast_tensors(lines[0][:, None, :], lines[1][:, :, None]), -1)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False).to(images.dtype)


def _drop(images, dropped, p):
    dropped = dropped & (torch.rand(len(images), 1, 1, 1, device=images.device) < p)
    return torch.where(dropped, 0, images), dropped  # masked_fill would not keep channels-last
