"""Augmentation of batches on the device: images are mixed with one another (mixup, CutMix, SnapMix), or parts of them
are erased (cutout, GridMask).

Every image is mixed with the one before it in the batch, because batches come shuffled. Random numbers are torch's,
drawn on the device of the images; the training loop seeds them before every batch. A script's compute_loss calls
`for_labels` or `for_masks`; the functions below are their parts.
"""
import math

import torch
import torch.nn.functional as F


def for_labels(images, labels, *, p_mixup=0.0, p_cutmix=0.0, p_snapmix=0.0, heat=None, p_gridmask=0.0):
    """The batch that a classifier trains on: images (B,C,H,W), labels (B,K) -> images, soft labels (B,K), which bce,
    focal and cross_entropy of utils.losses take.

    p_mixup, p_cutmix, p_snapmix: probabilities per batch; a batch gets at most one of the three. heat: a function that
    returns `cam` of the unmixed images, for snapmix. p_gridmask: probability, image by image.
    """
    kind = _one_of(mixup=p_mixup, cutmix=p_cutmix, snapmix=p_snapmix)
    if kind:
        images, *mixed = {"mixup": mixup, "cutmix": cutmix, "snapmix": lambda x: snapmix(x, heat())}[kind](images)
        labels = mixed_labels(labels, *mixed)
    return random_erase(images, p_gridmask=p_gridmask), labels


def for_masks(images, masks, *, p_mixup=0.0, p_cutmix=0.0, p_gridmask=0.0, p_cutout=0.0, cutout_size=0.5):
    """The batch that a segmentation net trains on: images (B,C,H,W), masks (B,H,W) -> images, [(masks, weight)]: the
    loss is the weighted sum of the losses for these masks.

    Masks stay hard, so that every loss can be used: `mixup` gives the batch two masks, with one lam for all images.
    p_mixup, p_cutmix: see `for_labels`. p_gridmask, p_cutout, cutout_size: see `random_erase`; masks are not erased, as
    in the papers.
    """
    kind, targets = _one_of(mixup=p_mixup, cutmix=p_cutmix), [(masks, 1.0)]
    if kind == "mixup":
        images, perm, lam = mixup(images, per_image=False)
        targets = [(masks, lam.squeeze()), (masks[perm], 1 - lam.squeeze())]
    elif kind == "cutmix":
        images, perm, lam = cutmix(images)
        targets = [(torch.where(lam[:, 0] > 0, masks, masks[perm]), 1.0)]
    return random_erase(images, p_gridmask=p_gridmask, p_cutout=p_cutout, cutout_size=cutout_size), targets


def random_erase(images, *, p_gridmask=0.0, p_cutout=0.0, cutout_size=0.5):
    """images (B,C,H,W) -> the same after `gridmask` and `cutout`, with probabilities image by image. cutout_size: side
    of the square, share of the shorter side of the image."""
    images = gridmask(images, p=p_gridmask) if p_gridmask else images
    return cutout(images, cutout_size, p=p_cutout) if p_cutout else images


def _one_of(**probabilities):
    """The name of one of several mutually exclusive events, or None."""
    # from the CPU's generator, so that nothing waits for the GPU
    left = float(torch.rand(())) if any(probabilities.values()) else math.inf
    for name, p in probabilities.items():
        left -= p
        if left < 0:
            return name
    return None


# ---- images mixed with one another ----------------------------------------------------------------------------------

def mixup(images, alpha=0.2, *, per_image=True):
    """Weighted means of two images (Zhang et al. 2018, arXiv 1710.09412).

    images     (B,C,H,W), float
    alpha      > 0: lam is drawn from Beta(alpha, alpha); with the paper's 0.1 to 0.4 for ImageNet most images stay
               nearly unchanged
    per_image  one lam for each image; False: one lam for the batch, so that any loss can be weighted with it
    returns    images, perm (B,) int64, lam (B,1,1,1) or (1,1,1,1) fp32: result i is lam[i] times image i plus
               1 - lam[i] times image perm[i]; where one of them holds no data (NaN), it is the other one
    """
    lam = _beta(len(images) if per_image else 1, alpha, images.device)[:, None, None, None]
    perm = _previous(images)
    other = images[perm]
    mixed = torch.lerp(other, images, lam.to(images.dtype))
    return torch.where(mixed.isnan(), torch.where(other.isnan(), images, other), mixed), perm, lam


def cutmix(images, alpha=1.0):
    """A box of every image is replaced by the same box of another image (Yun et al. 2019, arXiv 1905.04899).

    The box has the image's aspect ratio and a share 1 - b of its area, with b from Beta(alpha, alpha), alpha > 0; its
    centre lies anywhere, and it is clipped to the image. images (B,C,H,W) -> images, perm (B,) int64, lam (B,1,H,W)
    fp32: 1 where a pixel comes from image i, 0 where it comes from image perm[i].
    """
    kept = ~inside(_random_boxes(images, alpha), *images.shape[2:])
    perm = _previous(images)
    return torch.where(kept, images, images[perm]), perm, kept.float()


def snapmix(images, heat, alpha=5.0):
    """A box of every image is replaced by another box of another image, resized, and labels are weighted by the content
    of the boxes instead of their areas (Huang et al. 2021, "SnapMix", arXiv 2012.04846).

    images   (B,C,H,W), float
    heat     (B,H,W) of `cam`
    alpha    > 0: both boxes are drawn as in `cutmix`, independently
    returns  images, perm (B,) int64, lam_a (B,1) fp32: the share of image i's heat outside of its box, lam_b (B,1): the
             share of image perm[i]'s heat inside the box that is copied. They need not add up to 1: the sum is above 1
             where an object is pasted onto background, below 1 where background is pasted onto an object
    """
    target, source = (_random_boxes(images, alpha) for _ in range(2))
    perm = _previous(images)
    kept = ~inside(target, *images.shape[2:])
    mixed = torch.where(kept, images, _resized(images[perm], source, target))
    lam_a = (heat * kept[:, 0]).sum((1, 2))
    lam_b = (heat[perm] * inside(source, *images.shape[2:])[:, 0]).sum((1, 2))
    return mixed, perm, lam_a[:, None], lam_b[:, None]


@torch.no_grad()
def cam(maps, weight, labels, size):
    """Where the evidence for an image's labels lies: a class activation map (Zhou et al. 2016, arXiv 1512.04150) with
    the sum 1, which SnapMix calls semantic percent map.

    maps     (B,F,h,w), the net's `last_map` of the unmixed images, best in eval mode
    weight   (K,F) of the linear classifier that follows
    labels   (B,K), 0 .. 1; if an image has several classes, their maps are averaged
    size     (height, width) of the images
    returns  (B,height,width) fp32, >= 0; uniform for an image without a class or with a constant map
    """
    with torch.autocast(maps.device.type, enabled=False):
        # the sum over the classes serves as their mean, because the result is divided by its own sum
        heat = torch.einsum("bfhw,bf->bhw", maps.float(), labels.float() @ weight.float())
    heat = F.interpolate(heat[:, None], size, mode="bilinear")[:, 0]
    low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    flat = high - low <= 1e-5 * torch.maximum(high.abs(), low.abs())  # the differences are rounding errors
    heat = torch.where(flat, 1, heat - low)  # activations may be negative, shares may not
    return heat / heat.sum((1, 2), keepdim=True)


@torch.no_grad()
def heat(net, weight, images, labels):
    """`cam` of a net that has `last_map`, with its present weights and in eval mode."""
    training = net.training
    maps = net.eval().last_map(images)
    net.train(training)
    # autocast would keep the casts of the weights for the training step: their gradients would come last there, and
    # DDP would sum in another order than on a rank without this call
    torch.clear_autocast_cache()
    return cam(maps, weight, labels, images.shape[2:])


def mixed_labels(labels, perm, lam_a, lam_b=None):
    """labels (B,K) of 0 .. 1 and the other results of a mixing function -> soft labels (B,K) fp32.

    Target i is lam_a * labels[i] + lam_b * labels[perm[i]], at most 1: two images of one class do not make more than
    this class. lam_b: 1 - lam_a by default. Of a map of pixels the mean is taken, which is
    CutMix's lam.
    """
    labels, lam_a = labels.float(), lam_a.flatten(1).mean(1, keepdim=True)
    lam_b = 1 - lam_a if lam_b is None else lam_b
    return (lam_a * labels + lam_b * labels[perm]).clamp(max=1)


# ---- parts of images erased -----------------------------------------------------------------------------------------

def cutout(images, size=0.5, *, p=1.0):
    """Sets a square of every image to 0 (DeVries and Taylor 2017, arXiv 1708.04552), the mean of normalised images.

    size: its side, share of the shorter side of the image. Its centre lies anywhere, and it is clipped to the image.
    p: probability, image by image. images (B,C,H,W) -> images. Labels and masks stay, as in the paper: the net learns to
    infer what it does not see.
    """
    shape = images.shape[2:]
    side = torch.full((len(images),), max(1, round(size * min(shape))), device=images.device)
    return _erase(images, inside(_boxes([side, side], shape[::-1]), *shape), p)


def gridmask(images, *, period=(0.4, 1.0), ratio=(0.5, 0.7), degrees=180.0, p=1.0):
    """Sets a rotated grid of squares of every image to 0 (Chen et al. 2020, "GridMask", arXiv 2001.04086).

    period   range of the distance between squares, share of the image's shorter side (the paper: 96 to 224 of 224
             pixels), rounded to pixels
    ratio    range of the kept share of a period along both axes; the side of a square is the rest, in whole pixels:
             1 - (1 - ratio)^2 of the image is kept (the paper: 0.6, which keeps 84 %)
    degrees  the grid is rotated by up to this angle either way, about the image's centre
    p        probability, image by image; the paper lets it grow to 0.8 during training
    images (B,C,H,W) -> images. Labels and masks stay, as in `cutout`.
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
    # shifts by whole pixels, so that the squares of a grid that is not rotated are whole pixels
    inside = [(line + (uniform(0, 1) * pitch).floor()) % pitch < hole for line in (along, across)]
    return _erase(images, (inside[0] & inside[1])[:, None], p)


# ---- their parts ----------------------------------------------------------------------------------------------------

def _previous(images):
    """(B,) int64: the index of the image before each image; for the first image, of the last one."""
    return torch.arange(len(images), device=images.device).roll(1)


def _beta(count, alpha, device):
    """(count,) fp32 from Beta(alpha, alpha)."""
    if not alpha > 0:
        raise ValueError(f"alpha must be above 0, not {alpha}")
    alpha = torch.full((count,), float(alpha), device=device)
    return torch.distributions.Beta(alpha, alpha, validate_args=False).sample()  # validation would wait for the GPU


def _random_boxes(images, alpha):
    """Boxes (B,4) with a share 1 - b of the images' area, b from Beta(alpha, alpha), with at least one pixel."""
    share, sides = (1 - _beta(len(images), alpha, images.device)).sqrt(), images.shape[:1:-1]
    return _boxes([(share * side).round().long().clamp(min=1) for side in sides], sides)


def _boxes(lengths, sides):
    """Widths and heights, (B,) each, in pixels -> boxes (B,4) int64 of x1, y1, x2, y2 with random centres, clipped to
    images of `sides` (width, height); none is empty."""
    edges = []
    for length, side in zip(lengths, sides):
        start = torch.randint(side, length.shape, device=length.device) - length // 2
        edges.append((start.clamp(min=0), (start + length).clamp(max=side)))
    return torch.stack([edge for pair in zip(*edges) for edge in pair], 1)


def inside(boxes, height, width):
    """Boxes (B,4) of x1, y1, x2, y2 -> (B,1,H,W) bool, true inside the box."""
    x1, y1, x2, y2 = boxes.T[..., None]
    x, y = torch.arange(width, device=boxes.device), torch.arange(height, device=boxes.device)
    return ((y >= y1) & (y < y2))[:, None, :, None] & ((x >= x1) & (x < x2))[:, None, None, :]


def _resized(images, source, target):
    """(B,C,H,W) whose target boxes (B,4) show the content of the source boxes, bilinear; undefined outside of them."""
    lines = []
    for axis, side in enumerate((images.shape[3], images.shape[2])):
        (s1, s2), (t1, t2) = (boxes[:, axis::2].float().T[..., None] for boxes in (source, target))
        place = s1 + (torch.arange(side, device=images.device) + 0.5 - t1) * (s2 - s1) / (t2 - t1)
        # clamped to the centres of the box's outermost pixels: pixels beside the box have no influence
        lines.append(place.maximum(s1 + 0.5).minimum(s2 - 0.5) * 2 / side - 1)
    grid = torch.stack(torch.broadcast_tensors(lines[0][:, None, :], lines[1][:, :, None]), -1)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False).to(images.dtype)


def _erase(images, erased, p):
    """images (B,C,H,W) -> the same with the pixels `erased` (B,1,H,W) at 0, with probability p image by image."""
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < p
    return torch.where(erased & chosen, 0, images)  # masked_fill would not keep channels-last
