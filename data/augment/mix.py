"""Augmentation of batches on the device: images are mixed with one another (mixup, CutMix), or parts of them are
erased (cutout, GridMask).

Every image is mixed with the one before it in the batch, because batches come shuffled. Random numbers are torch's,
drawn on the device of the images; the training loop seeds them before every batch. A script's compute_loss calls
`for_labels` or `for_masks`; the functions below are their parts.
"""
import math

import torch


def for_labels(images, labels, *, p_mixup=0.0, p_cutmix=0.0, p_gridmask=0.0):
    """The batch that a classifier trains on: images (B,C,H,W), labels (B,K) -> images, soft labels (B,K), which bce,
    focal and cross_entropy of utils.losses take.

    p_mixup, p_cutmix: probabilities per batch; a batch gets at most one of the two. p_gridmask: probability, image by
    image.
    """
    if mix := _drawn(p_mixup, p_cutmix):
        images, perm, lam = mix(images)
        labels = mixed_labels(labels, perm, lam)
    return random_erase(images, p_gridmask=p_gridmask), labels


def for_masks(images, masks, *, p_mixup=0.0, p_cutmix=0.0, p_gridmask=0.0, p_cutout=0.0, cutout_size=0.5):
    """The batch that a segmentation net trains on: images (B,C,H,W), masks (B,H,W) -> images, [(masks, weight)]: the
    loss is the weighted sum of the losses for these masks.

    Masks stay hard, so that every loss can be used: `mixup` gives the batch two masks, with one lam for all images.
    p_mixup, p_cutmix: see `for_labels`. p_gridmask, p_cutout, cutout_size: see `random_erase`; masks are not erased, as
    in the papers.
    """
    mix, targets = _drawn(p_mixup, p_cutmix), [(masks, 1.0)]
    if mix is mixup:
        images, perm, lam = mixup(images, per_image=False)
        targets = [(masks, lam.squeeze()), (masks[perm], 1 - lam.squeeze())]
    elif mix is cutmix:
        images, perm, lam = cutmix(images)
        targets = [(torch.where(lam[:, 0] > 0, masks, masks[perm]), 1.0)]
    return random_erase(images, p_gridmask=p_gridmask, p_cutout=p_cutout, cutout_size=cutout_size), targets


def random_erase(images, *, p_gridmask=0.0, p_cutout=0.0, cutout_size=0.5):
    """images (B,C,H,W) -> the same after `gridmask` and `cutout`, with probabilities image by image. cutout_size: side
    of the square, share of the shorter side of the image."""
    images = gridmask(images, p=p_gridmask) if p_gridmask else images
    return cutout(images, cutout_size, p=p_cutout) if p_cutout else images


def _drawn(p_mixup, p_cutmix):
    """-> `mixup`, `cutmix` or None, with these probabilities."""
    # from the CPU's generator, so that nothing waits for the GPU
    draw = float(torch.rand(())) if p_mixup or p_cutmix else math.inf
    return mixup if draw < p_mixup else cutmix if draw - p_mixup < p_cutmix else None


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
    share = (1 - _beta(len(images), alpha, images.device)).sqrt()
    kept = ~_random_boxes([(share * side).round().long().clamp(min=1) for side in images.shape[:1:-1]], images)
    perm = _previous(images)
    return torch.where(kept, images, images[perm]), perm, kept.float()


def mixed_labels(labels, perm, lam):
    """labels (B,K) of 0 .. 1 and the other results of `mixup` or `cutmix` -> soft labels (B,K) fp32: lam * labels[i] +
    (1 - lam) * labels[perm[i]], where lam is the mean over an image's pixels."""
    labels, lam = labels.float(), lam.flatten(1).mean(1, keepdim=True)
    return lam * labels + (1 - lam) * labels[perm]


# ---- parts of images erased -----------------------------------------------------------------------------------------

def cutout(images, size=0.5, *, p=1.0):
    """Sets a square of every image to 0 (DeVries and Taylor 2017, arXiv 1708.04552), the mean of normalised images.

    size: its side, share of the shorter side of the image. Its centre lies anywhere, and it is clipped to the image.
    p: probability, image by image. images (B,C,H,W) -> images. Labels and masks stay, as in the paper: the net learns to
    infer what it does not see.
    """
    side = torch.full((len(images),), max(1, round(size * min(images.shape[2:]))), device=images.device)
    return _erase(images, _random_boxes([side, side], images), p)


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
    rows, columns = ((line + (uniform(0, 1) * pitch).floor()) % pitch < hole for line in (along, across))
    return _erase(images, (rows & columns)[:, None], p)


# ---- their parts ----------------------------------------------------------------------------------------------------

def _previous(images):
    """(B,) int64: the index of the image before each image; for the first image, of the last one."""
    return torch.arange(len(images), device=images.device).roll(1)


def _beta(count, alpha, device):
    """(count,) fp32 from Beta(alpha, alpha)."""
    alpha = torch.full((count,), float(alpha), device=device)
    return torch.distributions.Beta(alpha, alpha, validate_args=False).sample()  # validation would wait for the GPU


def _random_boxes(lengths, images):
    """Widths and heights, (B,) each, in pixels > 0 -> (B,1,H,W) bool, true inside a box of this size in each of the
    images (B,C,H,W); its centre lies anywhere in the image."""
    starts = [torch.randint(side, length.shape, device=length.device) - length // 2
              for length, side in zip(lengths, images.shape[:1:-1])]
    return inside(torch.stack([*starts, *map(torch.add, starts, lengths)], 1), *images.shape[2:])


def inside(boxes, height, width):
    """Boxes (B,4) of x1, y1, x2, y2 -> (B,1,H,W) bool, true inside the box."""
    x1, y1, x2, y2 = boxes.T[..., None]
    x, y = torch.arange(width, device=boxes.device), torch.arange(height, device=boxes.device)
    return ((y >= y1) & (y < y2))[:, None, :, None] & ((x >= x1) & (x < x2))[:, None, None, :]


def _erase(images, erased, p):
    """images (B,C,H,W) -> the same with the pixels `erased` (B,1,H,W) at 0, with probability p image by image."""
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < p
    return torch.where(erased & chosen, 0, images)  # masked_fill would not keep channels-last
