"""Losses on raw logits, computed in fp32 whatever the autocast state: logits and labels in, a scalar out.

No loss loops over images or synchronises with the GPU (as boolean indexing and `.item()` do). Ignored elements are set
to zero before they are computed with, so that they change neither the value nor the gradient, which is exactly 0 there.
Labels are not range-checked, because that would synchronise, too.

weight: of the loss's elements, a tensor with a number per class (C,), such as those of `balanced`; in binary losses it
is the weight of positives, whose negatives weigh 1: a number, or a tensor that broadcasts against the logits, (K,) for
(B,K). The mean is divided by the weights of the labels, as in torch's cross_entropy; in losses that are a mean over
classes each class has its weight there. None: all weigh the same.

binary masks      lovasz_hinge    dice          bce            focal
several classes   lovasz_softmax  dice_softmax  cross_entropy  focal_softmax
"""
import functools

import torch
import torch.nn.functional as F


def _in_fp32(loss):
    """Computes a loss outside autocast from logits of at least fp32: a half-precision sum of 65,536 ones is inf."""
    @functools.wraps(loss)
    def wrapped(logits, labels, *args, **kwargs):
        with torch.autocast(logits.device.type, enabled=False):
            return loss(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, *args, **kwargs)
    return wrapped


def balanced(counts, negatives=None):
    """Numbers of samples or pixels per class -> [weight per class], in inverse proportion to them, so that the mean
    over the samples is 1. A class without samples has 0. negatives: for several classes per image, how many samples do not
    have the class: the weights then are of its positives, whose sum equals that of its negatives."""
    counts = torch.tensor(counts, dtype=torch.float64)
    others = counts.sum() / (counts > 0).sum() if negatives is None else torch.tensor(negatives)
    return (others / counts).nan_to_num(posinf=0.).tolist()


def _valid(labels, ignore):
    """The bool mask of the elements that count."""
    return torch.ones_like(labels, dtype=torch.bool) if ignore is None else labels != ignore


def _binary(logits, labels, ignore):
    """-> logits and labels in one dtype, both 0 where ignored, and the bool mask of what counts, all without the
    channel axis of a (B,1,H,W) map. ValueError when the shapes differ."""
    logits, labels = (t.squeeze(1) if t.dim() == 4 else t for t in (logits, labels))
    if logits.shape != labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} must have the same shape")
    labels = labels.to(logits.dtype)  # before they are compared: torch wraps `ignore` to uint8, where -1 equals 255
    valid = _valid(labels, ignore)
    return logits.masked_fill(~valid, 0), labels.masked_fill(~valid, 0), valid


def _multiclass(logits, labels, ignore):
    """(B,C,...) logits and labels (B,...) -> logits and int64 labels, both 0 where ignored, and the bool mask (B,...)
    of what counts. ValueError for other shapes."""
    if labels.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(f"logits {tuple(logits.shape)} (B,C,...) need labels (B,...), not {tuple(labels.shape)}")
    labels = labels.long()
    valid = _valid(labels, ignore)
    return logits.masked_fill(~valid.unsqueeze(1), 0), labels.masked_fill(~valid, 0), valid


def _binary_rows(logits, labels, per_image, ignore):
    """`_binary` of (B,H,W) or (B,1,H,W) -> the same as rows (R,P): one per image, or one for the batch."""
    tensors = _binary(logits, labels, ignore)
    if tensors[0].dim() != 3:
        raise ValueError(f"logits must be (B,H,W) or (B,1,H,W), not {tuple(tensors[0].shape)}")
    return (t.flatten(1) if per_image else t.reshape(1, -1) for t in tensors)


def _class_rows(logits, labels, ignore):
    """(B,C,...) logits and labels (B,...) -> probabilities, bool positives and bool valid, each (C,P): a row per class,
    over all pixels of the batch."""
    logits, labels, valid = _multiclass(logits, labels, ignore)
    probs = logits.transpose(0, 1).flatten(1).softmax(0)
    valid = valid.flatten().expand_as(probs)
    positive = (labels.flatten() == torch.arange(len(probs), device=labels.device)[:, None]) & valid
    return probs, positive, valid


# ---- Lovász losses: convex surrogates of 1 - IoU -------------------------------------------------------------------

@torch.no_grad()
def lovasz_grad(errors, positive):
    """Gradient of the Lovász extension of each row's Jaccard loss: errors (R,P) and bool positives (R,P) -> (R,P).

    With the k worst pixels of a row wrong, m of its positives are still right and the union holds k + m pixels, so the
    loss is J_k = 1 - m / (k + m). The gradient is the difference J_k - J_(k-1), in closed form: 1 / union at a
    positive, m / (union * (union - 1)) at a negative. This is exact to 1e-7; subtracting fp32 values of J leaves 2
    digits at 65,536 pixels, and none over most of a nearly empty mask. In a row without positives J goes from 0 to 1 at
    the worst pixel: only there the union of a negative is 1.
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
    # -inf sorts behind all valid pixels, where all differences are 0, and both ramps map it to 0
    errors = errors.masked_fill(~valid, -torch.inf)
    return (ramp(errors) * lovasz_grad(errors, positive & valid)).sum(1)


@_in_fp32
def lovasz_hinge(logits, labels, per_image=True, elu=False, ignore=None):
    """Binary Lovász hinge loss (Berman, Triki, Blaschko 2018, arXiv 1705.08790, Alg. 1 and sec. 3.1).

    logits     (B,H,W) or (B,1,H,W), float, before the sigmoid
    labels     (B,H,W) or (B,1,H,W), any dtype, positive where > 0.5
    per_image  mean over images of the loss of each image (0 for an image without valid pixels);
               False: the batch is one large image
    elu        elu(e) + 1 in place of relu(e), as in the wildfire competition's code
    ignore     label value of pixels without influence on value and gradient
    returns    scalar fp32: 1 (elu: 2) if all logits are 0; in an image without positives only the pixel with the
               highest logit gets a gradient
    ValueError when the shapes differ or there are several channels.
    """
    logits, labels, valid = _binary_rows(logits, labels, per_image, ignore)
    positive = labels > 0.5
    errors = 1 - torch.where(positive, logits, -logits)
    # unlike relu, elu has a gradient at pixels that are already right
    return _lovasz_rows(errors, positive, valid, (lambda e: F.elu(e) + 1) if elu else F.relu).mean()


@_in_fp32
def lovasz_softmax(logits, labels, ignore=None, weight=None):
    """Multi-class Lovász-softmax loss (Berman, Triki, Blaschko 2018, arXiv 1705.08790, sec. 3.2).

    logits     (B,C,H,W), float, C >= 2; the softmax is taken here
    labels     (B,H,W), any dtype, 0 .. C-1 or `ignore`
    ignore     label value of pixels without influence on value and gradient
    weight     (C,), of the classes in the mean
    returns    scalar fp32: the mean over the classes that are present in the labels; the batch is one large image
    ValueError for wrong shapes and for a single class (use lovasz_hinge).
    """
    if logits.shape[1] < 2:
        raise ValueError(f"the softmax is of two or more channels, not {logits.shape[1]}")
    probs, positive, valid = _class_rows(logits, labels, ignore)
    errors = torch.where(positive, 1 - probs, probs)
    losses = _lovasz_rows(errors, positive, valid, F.relu)  # errors are >= 0: relu only maps -inf to 0
    used = positive.any(1) * (1 if weight is None else weight)
    return _ratio((losses * used).sum(), used.sum())


# ---- Dice losses: 1 - F1 of probabilities ---------------------------------------------------------------------------

def _dice_rows(probs, labels, smooth):
    """(R,P) probabilities and labels 0 .. 1, both 0 where ignored -> (R,)."""
    return 1 - (2 * (probs * labels).sum(1) + smooth) / (probs.sum(1) + labels.sum(1) + smooth)


@_in_fp32
def dice(logits, labels, smooth=1., ignore=None):
    """Binary soft Dice loss (Milletari et al. 2016, arXiv 1606.04797, with the sums of Drozdzal et al. 2016):
    1 - (2 sum(p y) + s) / (sum(p) + sum(y) + s), where p is the sigmoid of the logits.

    logits     (B,H,W) or (B,1,H,W), float, before the sigmoid
    labels     (B,H,W) or (B,1,H,W), any dtype, 0 .. 1
    smooth     s, in pixels, > 0. Without positives the loss is P / (P + s), where P is the sum of the probabilities;
               the gradients of all logits then add up to 1/4 at most. (In segmentation-models-pytorch it is 0 then,
               whatever was found; nnU-Net's s = 1e-5 gives a constant 1 without gradient.)
    ignore     label value of pixels without influence on value and gradient
    returns    scalar fp32; 0 when nothing is valid. The batch is one large image, as in the IoU of a competition (and
               in the training of nnU-Net's 2D nets and segmentation-models-pytorch), so that an image with few
               positives does not outweigh the others
    ValueError when the shapes differ or there are several channels.
    """
    logits, labels, valid = _binary_rows(logits, labels, False, ignore)
    return _dice_rows(logits.sigmoid() * valid, labels, smooth).mean()


@_in_fp32
def dice_softmax(logits, labels, smooth=1., ignore=None, weight=None):
    """Soft Dice loss of several classes: `dice` of each class against the rest, averaged over all C classes (also the
    background and absent classes), where p is the softmax of the logits. smooth: see `dice`.

    logits     (B,C,...), float; the softmax is taken here
    labels     (B,...), any dtype, 0 .. C-1 or `ignore`
    weight     (C,), of the classes in the average
    ignore     label value of pixels without influence on value and gradient
    returns    scalar fp32; 0 when nothing is valid
    ValueError on wrong shapes.
    """
    probs, positive, valid = _class_rows(logits, labels, ignore)
    losses = _dice_rows(probs * valid, positive.to(probs.dtype), smooth)
    return losses.mean() if weight is None else (losses * weight).sum() / weight.sum()


# ---- Cross entropies ------------------------------------------------------------------------------------------------

def _ratio(value, total):
    """value / total; where nothing counts, so that the total is 0, the value."""
    return value / torch.where(total > 0, total, 1)


def _binary_cross_entropy(logits, labels, smoothing, weight, ignore):
    """-> cross entropy of every element, and the weight of the element in the mean, both 0 where ignored; |y - p|."""
    logits, labels, valid = _binary(logits, labels, ignore)
    soft, mass = labels * (1 - smoothing) + smoothing / 2, valid
    if weight is not None:
        weight = torch.as_tensor(weight, dtype=logits.dtype, device=logits.device)
        mass = valid * (1 + (weight - 1) * labels)
    loss = F.binary_cross_entropy_with_logits(logits, soft, reduction="none", pos_weight=weight)
    return loss * valid, mass, lambda: (soft - logits.sigmoid()).abs()


@_in_fp32
def bce(logits, labels, smoothing=0., weight=None, ignore=None):
    """Binary cross entropy, for masks and for multi-label classification: mean over the valid elements.

    logits      (B,K), (B,H,W), (B,1,H,W) or any other shape, float, before the sigmoid
    labels      the same shape (one of both may be (B,1,H,W), the other (B,H,W)), any dtype, 0 .. 1
    smoothing   s: labels y become y (1 - s) + s/2, so 0 and 1 become s/2 and 1 - s/2 (Szegedy et al. 2016,
                arXiv 1512.00567, with two classes; segmentation-models-pytorch calls s/2 the smooth factor)
    weight      factor w on the positive term; the sum is divided by that of w y + 1 - y
    ignore      label value of elements without influence on value and gradient
    returns     scalar fp32; 0 when nothing is valid
    ValueError when the shapes differ.
    """
    loss, mass, _ = _binary_cross_entropy(logits, labels, smoothing, weight, ignore)
    return _ratio(loss.sum(), mass.sum())


@_in_fp32
def cross_entropy(logits, labels, smoothing=0., weight=None, ignore=None):
    """Softmax cross entropy: mean over the valid elements.

    logits     (B,C) or (B,C,...), float
    labels     (B) or (B,...), any dtype, 0 .. C-1 or `ignore`; or soft labels in the shape of the logits, such as those
               of data/augment/mix.py: a share per class, ignored where any of them is `ignore`. The loss is
               -sum(share * log p), also for shares that do not add up to 1
    smoothing  s is spread over all C classes: 1 - s + s/C at the label, s/C elsewhere (Szegedy et al. 2016,
               arXiv 1512.00567)
    weight     (C,) tensor of class weights; the mean is then divided by the weights of the labels, as in torch
    ignore     label value of elements without influence on value and gradient; torch's default of -100 is not set here
    returns    scalar fp32; 0 when nothing is valid
    ValueError when the shapes do not fit.
    """
    weight = None if weight is None else weight.to(logits.dtype)
    if labels.shape == logits.shape:
        valid = _valid(labels, ignore).all(1)
        logits, labels = (t.masked_fill(~valid.unsqueeze(1), 0) for t in (logits, labels.to(logits.dtype)))
        mass = 1 if weight is None else torch.tensordot(labels, weight, ([1], [0]))
    else:
        logits, labels, valid = _multiclass(logits, labels, ignore)
        mass = 1 if weight is None else weight[labels]
    loss = F.cross_entropy(logits, labels, weight, ignore_index=-1, reduction="none", label_smoothing=smoothing)
    return _ratio((loss * valid).sum(), (mass * valid).sum())


# ---- Focal losses ----------------------------------------------------------------------------------------------------

def focus(loss, distance, gamma):
    """The focal factor: loss x distance^gamma. The distance is clamped because the slope of x^gamma with gamma < 1 is
    infinite at 0."""
    return loss * distance.clamp(min=1e-6) ** gamma


@_in_fp32
def focal(logits, labels, smoothing=0., gamma=2., ignore=None, weight=None):
    """Binary focal loss (Lin et al. 2017, arXiv 1708.02002; its alpha is the weight): cross entropy times
    |y - p|^gamma, mean over the valid elements. Shapes, smoothing, weight, ignore and errors: see `bce`."""
    loss, mass, distance = _binary_cross_entropy(logits, labels, smoothing, weight, ignore)
    return _ratio(focus(loss, distance(), gamma).sum(), mass.sum())


@_in_fp32
def focal_softmax(logits, labels, gamma=2., ignore=None, weight=None):
    """Focal loss of several classes: cross entropy times (1 - p)^gamma, where p is the softmax at the label, mean over
    the valid elements. Weight: see `cross_entropy`. Shapes, ignore and errors: see `dice_softmax`.
    (segmentation-models-pytorch instead averages binary focal losses of the classes.)"""
    logits, labels, valid = _multiclass(logits, labels, ignore)
    loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="none")
    mass = valid if weight is None else valid * weight.to(loss.dtype)[labels]
    return _ratio((focus(loss, -torch.expm1(-loss), gamma) * mass).sum(), mass.sum())  # loss is -log p
