"""Losses on raw logits, computed in fp32 whatever the autocast state: logits and labels in, a scalar out.

No loss loops over images, waits for the GPU (boolean indexing and `.item()` do), or lets an ignored element
touch the value or the gradient: ignored elements are masked to zero, and the gradient there is exactly 0.
Labels are not range-checked, because that too would wait for the GPU.

binary masks      lovasz_hinge    dice          bce            focal          top_k
several classes   lovasz_softmax  dice_softmax  cross_entropy  focal_softmax  top_k_softmax
"""
import functools

import torch
import torch.nn.functional as F


def _in_fp32(loss):
    """Runs a loss outside autocast with logits of at least fp32: a half-precision sum of 65,536 ones is inf."""
    @functools.wraps(loss)
    def wrapped(logits, labels, *args, **kwargs):
        with torch.autocast(logits.device.type, enabled=False):
            return loss(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, *args, **kwargs)
    return wrapped


def _pair(logits, labels):
    """Both without the channel axis of a (B,1,H,W) map, labels in the dtype of the logits; ValueError on other shapes.

    The labels become float before they meet `ignore`: torch wraps a scalar to uint8, where -1 would equal 255."""
    logits, labels = (t.squeeze(1) if t.dim() == 4 else t for t in (logits, labels))
    if logits.shape != labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} must have the same shape")
    return logits, labels.to(logits.dtype)


def _class_pair(logits, labels):
    """int64 labels for (B,C,...) logits; ValueError unless the labels are (B,...)."""
    if labels.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(f"logits {tuple(logits.shape)} (B,C,...) need labels (B,...), not {tuple(labels.shape)}")
    return labels.long()


def _valid(labels, ignore):
    """bool mask of the elements that count."""
    return torch.ones_like(labels, dtype=torch.bool) if ignore is None else labels != ignore


def _mask_rows(logits, labels, per_image):
    """(B,H,W) or (B,1,H,W) -> both (R,P): a row per image, or one for the batch; ValueError on other shapes."""
    logits, labels = _pair(logits, labels)
    if logits.dim() != 3:
        raise ValueError(f"logits must be (B,H,W) or (B,1,H,W), not {tuple(logits.shape)}")
    return (t.flatten(1) if per_image else t.reshape(1, -1) for t in (logits, labels))


def _class_rows(logits, labels, per_image, ignore):
    """(B,C,...) logits and labels (B,...) -> (R,C,P) probabilities and bool positives, (R,1,P) bool valid: a row per
    image, or one for the batch."""
    labels, logits = _class_pair(logits, labels).flatten(1), logits.flatten(2)
    if not per_image:
        labels, logits = labels.reshape(1, -1), logits.transpose(0, 1).flatten(1)[None]
    valid = _valid(labels, ignore)[:, None]
    positive = (labels[:, None] == torch.arange(logits.shape[1], device=labels.device)[:, None]) & valid
    # Masked before the softmax too, so that not even an infinite logit gets out of an ignored pixel.
    return logits.masked_fill(~valid, 0).softmax(1), positive, valid


# ---- Lovász: a convex surrogate of 1 - IoU, the measure itself rather than a mean over pixels ----------------------

@torch.no_grad()
def lovasz_grad(errors, positive):
    """(R,P) errors and bool positives -> (R,P): what each pixel adds to the Jaccard loss of its row.

    With the k worst pixels of a row wrong, m of its positives are still right and the union holds k + m pixels,
    so the loss is J_k = 1 - m / (k + m). Its differences J_k - J_(k-1) are written out here: 1 / union at a
    positive, m / (union * (union - 1)) at a negative; exact to 1e-7, where subtracting one fp32 J from the next
    leaves 2 digits at 65,536 pixels, and none over most of a nearly empty mask. A row without
    positives goes from 0 to 1 at its worst pixel: there alone the union of a negative is 1.
    """
    order = errors.argsort(dim=1, descending=True)
    hit = positive.gather(1, order)
    # Integer sums: exact at any size, and deterministic on CUDA, where a float cumsum is not.
    right = hit.sum(1, keepdim=True, dtype=torch.int32) - hit.cumsum(1, dtype=torch.int32)
    rank = torch.arange(1, errors.shape[1] + 1, dtype=torch.int32, device=errors.device)
    union, right = (rank + right).to(errors.dtype), right.to(errors.dtype)
    steps = torch.where(hit | (union == 1), 1 / union, right / (union * (union - 1)))
    return torch.empty_like(errors).scatter_(1, order, steps)


def _lovasz_rows(errors, positive, valid, ramp):
    """(R,P) errors, bool positives, bool valid -> (R,): the Lovász extension of the Jaccard loss of each row."""
    # -inf sorts behind everything that counts, where no step is left to take, and every ramp makes it 0.
    errors = errors.masked_fill(~valid, -torch.inf)
    return (ramp(errors) * lovasz_grad(errors, positive & valid)).sum(1)


def _elu_ramp(errors):
    """elu(e) + 1: unlike relu it never stops pushing on pixels that are already right."""
    return F.elu(errors) + 1


@_in_fp32
def lovasz_hinge(logits, labels, per_image=True, elu=False, ignore=None):
    """Binary Lovász hinge loss (Berman, Triki, Blaschko 2018, arXiv 1705.08790, Alg. 1 and sec. 3.1).

    logits     (B,H,W) or (B,1,H,W), float, before the sigmoid; 0 is the decision boundary
    labels     (B,H,W) or (B,1,H,W), any dtype, positive where > 0.5
    per_image  mean over images of the loss of each image (one without valid pixels adds 0 to that mean);
               False: the batch is one large image
    elu        elu(e) + 1 in place of relu(e), as the wildfire competition's seed trains
    ignore     label value of pixels that count neither in the value nor in the gradient
    returns    scalar fp32: 1 (elu: 2) at all-zero logits; in an image without positives only the top-scoring
               pixel gets a gradient
    ValueError when the shapes differ or there are several channels.
    """
    logits, labels = _mask_rows(logits, labels, per_image)
    positive = labels > 0.5
    errors = 1 - torch.where(positive, logits, -logits)
    return _lovasz_rows(errors, positive, _valid(labels, ignore), _elu_ramp if elu else F.relu).mean()


@_in_fp32
def lovasz_softmax(logits, labels, per_image=False, classes="present", ignore=None):
    """Multi-class Lovász-softmax loss (Berman, Triki, Blaschko 2018, arXiv 1705.08790, sec. 3.2).

    logits     (B,C,H,W), float, C >= 2; the softmax is taken here
    labels     (B,H,W), any dtype, 0 .. C-1 or `ignore`
    per_image  mean over images of the loss of each image (one without valid pixels adds 0 to that mean);
               False: the batch is one large image
    classes    mean over the classes "present" in the labels, or over "all" C
    ignore     label value of pixels that count neither in the value nor in the gradient
    returns    scalar fp32
    ValueError on wrong shapes, on one class (use lovasz_hinge) and on another word for `classes`.
    """
    count = logits.shape[1]
    if classes not in ("present", "all") or count < 2:
        raise ValueError(f'classes is "present" or "all", not {classes!r}, of two or more channels, not {count}')
    probs, positive, valid = _class_rows(logits, labels, per_image, ignore)
    errors = torch.where(positive, 1 - probs, probs)
    rows = (t.flatten(0, 1) for t in (errors, positive, valid.expand_as(errors)))
    losses = _lovasz_rows(*rows, F.relu).view(-1, count)  # errors are >= 0: relu only turns -inf into 0
    used = positive.any(2) if classes == "present" else torch.ones_like(losses)
    return ((losses * used).sum(1) / used.sum(1).clamp(min=1)).mean()


# ---- Dice: 1 - F1 of probabilities ----------------------------------------------------------------------------------

def _dice_rows(probs, truth, smooth):
    """(R,P) probabilities and 0 .. 1 truth, both 0 where ignored -> (R,)."""
    return 1 - (2 * (probs * truth).sum(1) + smooth) / (probs.sum(1) + truth.sum(1) + smooth)


@_in_fp32
def dice(logits, labels, per_image=False, smooth=1., ignore=None):
    """Binary soft Dice loss (Milletari et al. 2016, arXiv 1606.04797, with the plain sums of Drozdzal et al. 2016):
    1 - (2 sum(p y) + s) / (sum(p) + sum(y) + s), p the sigmoid of the logits.

    logits     (B,H,W) or (B,1,H,W), float, before the sigmoid
    labels     (B,H,W) or (B,1,H,W), any dtype, 0 .. 1
    per_image  mean over images of the loss of each image; False: the batch is one large image, as the IoU of a
               competition counts (and nnU-Net's 2D nets and segmentation-models-pytorch train), so that an image with
               little in it cannot outweigh the others
    smooth     s, in pixels, > 0: without positives the loss is P / (P + s), P the sum of the probabilities: 0 only
               when nothing is found, where segmentation-models-pytorch returns 0 whatever is found, and nnU-Net's
               s of 1e-5 gives a constant 1 with no gradient. On the logits, that gradient adds up to 1/4 at most
    ignore     label value of pixels that count neither in the value nor in the gradient
    returns    scalar fp32; 0 when nothing is valid
    ValueError when the shapes differ or there are several channels.
    """
    logits, labels = _mask_rows(logits, labels, per_image)
    valid = _valid(labels, ignore)
    return _dice_rows(logits.masked_fill(~valid, 0).sigmoid() * valid, labels.masked_fill(~valid, 0), smooth).mean()


@_in_fp32
def dice_softmax(logits, labels, per_image=False, smooth=1., ignore=None):
    """Soft Dice loss of several classes: the mean over all C classes, background and absent ones too, of `dice` of each
    against the rest, p the softmax of the logits. per_image, smooth as there.

    logits     (B,C,...), float; the softmax is taken here
    labels     (B,...), any dtype, 0 .. C-1 or `ignore`
    ignore     label value of pixels that count neither in the value nor in the gradient
    returns    scalar fp32; 0 when nothing is valid
    ValueError on wrong shapes.
    """
    probs, positive, valid = _class_rows(logits, labels, per_image, ignore)
    rows = (t.flatten(0, 1) for t in (probs * valid, positive.to(probs.dtype)))
    return _dice_rows(*rows, smooth).mean()


# ---- Cross entropies ------------------------------------------------------------------------------------------------

def _masked_pair(logits, labels, ignore):
    """`_pair`, both 0 where ignored, and the bool mask of what counts."""
    logits, labels = _pair(logits, labels)
    valid = _valid(labels, ignore)
    return logits.masked_fill(~valid, 0), labels.masked_fill(~valid, 0), valid


def _masked_classes(logits, labels, ignore):
    """`_class_pair`, both 0 where ignored, and the bool mask (B,...) of what counts."""
    labels = _class_pair(logits, labels)
    valid = _valid(labels, ignore)
    return logits.masked_fill(~valid.unsqueeze(1), 0), labels.masked_fill(~valid, 0), valid


def _mean(loss, valid):
    """Over the valid elements; 0 when there are none."""
    return (loss * valid).sum() / valid.sum().clamp(min=1)


@_in_fp32
def bce(logits, labels, smoothing=0., pos_weight=None, ignore=None):
    """Binary cross entropy, for masks and for multi-label classification: mean over the valid elements.

    logits      (B,K), (B,H,W), (B,1,H,W) or any other shape, float, before the sigmoid
    labels      the same shape (the 1 of (B,1,H,W) may be missing on either side), any dtype, 0 .. 1
    smoothing   s pulls labels towards 1/2: y (1 - s) + s/2, so {0,1} become {s/2, 1 - s/2} (Szegedy et al. 2016,
                arXiv 1512.00567, with two classes; segmentation-models-pytorch calls s/2 the smooth factor)
    pos_weight  factor on the positive term: a float, or a tensor that broadcasts against the logits, (K,) for (B,K)
    ignore      label value of elements that count neither in the value nor in the gradient
    returns     scalar fp32; 0 when nothing is valid
    ValueError when the shapes differ.
    """
    logits, labels, valid = _masked_pair(logits, labels, ignore)
    if isinstance(pos_weight, (int, float)):
        pos_weight = logits.new_full((), pos_weight)
    soft = labels * (1 - smoothing) + smoothing / 2
    loss = F.binary_cross_entropy_with_logits(logits, soft, reduction="none", pos_weight=pos_weight)
    return _mean(loss, valid)


@_in_fp32
def cross_entropy(logits, labels, smoothing=0., weight=None, ignore=None):
    """Softmax cross entropy: mean over the valid elements.

    logits     (B,C) or (B,C,...), float
    labels     (B) or (B,...), any dtype, 0 .. C-1 or `ignore`; or soft ones, as mixing makes them, in the shape of the
               logits: a share per class, ignored where any of them is `ignore`. Shares need not add up to 1: the loss
               is -sum(share * log p), as if hard labels were weighted so
    smoothing  s spreads over all C classes: 1 - s + s/C at the label, s/C elsewhere (Szegedy et al. 2016,
               arXiv 1512.00567)
    weight     (C,) tensor of class weights; the mean is then divided by the weights of the labels, as in torch
    ignore     label value of elements that count neither in the value nor in the gradient; no default, unlike the
               -100 of torch
    returns    scalar fp32; 0 when nothing is valid
    ValueError when the shapes do not fit.
    """
    weight = None if weight is None else weight.to(logits.dtype)
    if labels.shape == logits.shape:
        valid = _valid(labels, ignore).all(1)
        logits, labels = (t.masked_fill(~valid.unsqueeze(1), 0) for t in (logits, labels.to(logits.dtype)))
        mass = 1 if weight is None else torch.tensordot(labels, weight, ([1], [0]))
    else:
        logits, labels, valid = _masked_classes(logits, labels, ignore)
        mass = 1 if weight is None else weight[labels]
    loss = F.cross_entropy(logits, labels, weight, ignore_index=-1, reduction="none", label_smoothing=smoothing)
    total = (mass * valid).sum()
    return (loss * valid).sum() / torch.where(total > 0, total, 1)


# ---- Cross entropies of what is hard --------------------------------------------------------------------------------

def focus(loss, distance, gamma):
    """A loss times distance^gamma. The slope of x^gamma with gamma < 1 is infinite at 0, hence a least distance."""
    return loss * distance.clamp(min=1e-6) ** gamma


@_in_fp32
def focal(logits, labels, smoothing=0., gamma=2., ignore=None):
    """Binary focal loss (Lin et al. 2017, arXiv 1708.02002, without alpha): cross entropy times |y - p|^gamma, mean
    over the valid elements. Shapes, smoothing, ignore and errors as in `bce`."""
    logits, labels, valid = _masked_pair(logits, labels, ignore)
    soft = labels * (1 - smoothing) + smoothing / 2
    loss = F.binary_cross_entropy_with_logits(logits, soft, reduction="none")
    return _mean(focus(loss, (soft - logits.sigmoid()).abs(), gamma), valid)


@_in_fp32
def focal_softmax(logits, labels, gamma=2., ignore=None):
    """Focal loss of several classes: cross entropy times (1 - p)^gamma, p the softmax at the label, mean over the valid
    elements. Logits (B,C,...), labels (B,...), ignore and errors as in `dice_softmax`. (That of
    segmentation-models-pytorch is another: the mean of binary focal losses of the classes.)"""
    logits, labels, valid = _masked_classes(logits, labels, ignore)
    loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="none")
    return _mean(focus(loss, -torch.expm1(-loss), gamma), valid)  # loss is -log p


def _top_mean(loss, valid, share):
    """Mean of the largest `share` of the valid elements of `loss`, one at least.

    Their number k depends on the labels, and to read it would wait for the GPU: as many are taken as there would be
    without ignored elements, and those beyond rank k do not count.
    """
    largest = (loss * valid).flatten().topk(max(1, int(share * loss.numel()))).values
    k = (share * valid.sum()).long().clamp(1, len(largest))
    return (largest * (torch.arange(len(largest), device=k.device) < k)).sum() / k


@_in_fp32
def top_k(logits, labels, share=0.1, ignore=None):
    """Binary cross entropy of the hardest pixels: mean of the largest `share` (0 .. 1, one pixel at least) of all valid
    pixels of the batch. nnU-Net's TopK loss (Isensee et al. 2021), for masks. Shapes, ignore, errors as in `bce`."""
    logits, labels, valid = _masked_pair(logits, labels, ignore)
    return _top_mean(F.binary_cross_entropy_with_logits(logits, labels, reduction="none"), valid, share)


@_in_fp32
def top_k_softmax(logits, labels, share=0.1, ignore=None):
    """`top_k` of softmax cross entropies, as nnU-Net has it. Logits (B,C,...), labels (B,...), ignore and errors as in
    `dice_softmax`."""
    logits, labels, valid = _masked_classes(logits, labels, ignore)
    return _top_mean(F.cross_entropy(logits, labels, ignore_index=-1, reduction="none"), valid, share)
