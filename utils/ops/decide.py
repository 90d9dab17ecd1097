"""Decisions: what a net says about its input -> probabilities, masks, boxes. Validation and prediction share them.

The nets' outputs are merged over the views of test-time augmentation (utils/ops/tta.py) and are checked to be finite.
A net in half precision gets its input in half precision.
"""
import itertools

import torch
import torch.nn.functional as F

from utils.errors import NumericalError
from utils.ops import boxes, geometry, tta

# what --tta means without names, as far as training drew such views
VIEWS = {"seg": ("hflip", "vflip"), "cls": ("hflip", "vflip", "rot90", "rot180")}
THRESHOLD = {"seg": 0.5, "det": 0.25, "cls": 0.5}  # where a checkpoint stores none


def drawn_views(task, flags):
    """Of the VIEWS of a task, the names of those that training drew. flags: {flag: value} of the run; one that it does
    not have was the competition's."""
    hflip, turns = flags.get("hflip", task == "seg"), flags.get("rot90", True)
    drawn = {"hflip": hflip, "vflip": flags.get("vflip") or hflip and turns, "rot90": turns, "rot180": turns}
    return tuple(name for name in VIEWS[task] if drawn[name])


def run(net, x):
    """The output of the net for x (B, C, H, W), in the net's precision and memory format."""
    return net(x.to(next(net.parameters()).dtype, memory_format=torch.channels_last))


def finite(output):
    """The output itself. Raises NumericalError where it has NaN or infinity: it would be read as an empty result."""
    if not output.isfinite().all():
        raise NumericalError("the net's output is not finite; predict with --amp off")
    return output


# ---- segmentation ----------------------------------------------------------------------------------------------------
def probabilities(logits, single_label=True):
    """Logits (B, K, ...) -> fp32 probabilities: softmax where the K classes exclude each other, sigmoid for one class
    and for several labels per image."""
    return logits.float().softmax(1) if single_label and logits.shape[1] > 1 else logits.float().sigmoid()


def segment(net, x, names=(), *, side=None, scales=tta.SCALES, merge="mean"):
    """The net's input x (B, C, H, W) fp32, of any H and W, -> probabilities (B, K, H, W) fp32.

    names, scales: of `tta.tta_views`; merge: of `tta.MERGES`. side: the whole image is resized to side x side for the
    net, and the probabilities are resized back. Other sides are padded by reflection to multiples of `net.stride`.
    """
    height, width = x.shape[2:]
    if side:
        small = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
        found = segment(net, small, names, scales=scales, merge=merge)
        return F.interpolate(found, (height, width), mode="bilinear", antialias=True)
    padded = [-(-length // net.stride) * net.stride for length in (height, width)]
    if padded != [height, width]:
        x = geometry.warp(x, geometry.translate(0, 0), padded, border="reflect")
    views = tta.tta_views(names, padded, stride=net.stride, scales=scales)
    maps = tta.maps(lambda view: probabilities(run(net, view)), x, views)
    first = next(maps)
    merged = tta.merge(itertools.chain([first], maps), merge, single_label=first.shape[1] > 1)
    return finite(merged)[..., :height, :width]


def background(probs, empty):
    """Probabilities (B, K, H, W) -> the same, but certain of the background at the pixels `empty` (B, H, W), which hold
    no data; None: there are none."""
    if empty is None:
        return probs
    certain = torch.zeros_like(probs)
    if probs.shape[1] > 1:
        certain[:, 0] = 1
    return torch.where(empty[:, None], certain, probs)


def masks(probs, threshold=0.5):
    """Probabilities (B, K, H, W) -> class indices (B, H, W) uint8; with one class, 1 above the threshold."""
    return (probs[:, 0] > threshold if probs.shape[1] == 1 else probs.argmax(1)).to(torch.uint8)


# ---- classification --------------------------------------------------------------------------------------------------
def classify(net, inputs, batch, names=(), *, single_label=False, scales=tta.SCALES, merge="mean"):
    """A batch of `data.cls.collate` -> probabilities (B, K) fp32; single_label: softmax, else sigmoid.

    inputs: `data.cls.Input`, which is called with each view's matrix. names, scales, merge: as in `segment`.
    """
    views = tta.tta_views(names, (inputs.imgsz, inputs.imgsz), scales=scales)
    probs = (probabilities(run(net, inputs(batch, matrix, side)), single_label) for matrix, (side, _) in views)
    return finite(tta.merge(probs, merge, single_label=single_label))


# ---- detection -------------------------------------------------------------------------------------------------------
def detect(net, x, views=None, *, conf, iou, max_det, merge=None):
    """The net's input x (B, C, H, W) fp32 -> per image detections (n, 6) of x1 y1 x2 y2 score class in pixels of x, the
    best score first.

    views: [(matrix, size)] of `tta.tta_views` or `tta.yolov5`; None: x as it is. conf, iou, max_det: of `boxes.nms`.
    merge: "wbf" fuses the detections of the views (`boxes.wbf`); None: the boxes of all views suppress each other.
    """
    views = views or tta.tta_views((), x.shape[2:])
    found = [finite(rows) for rows in tta.tta_boxes(lambda view: run(net, view), x, views)]
    if merge == "wbf":
        by_view = [boxes.nms(rows, conf=conf, iou=iou, max_det=max_det) for rows in found]
        return [boxes.wbf(members)[:max_det] for members in zip(*by_view)]
    return boxes.nms(torch.cat(found, 1), conf=conf, iou=iou, max_det=max_det)
