"""YOLOv5 (v6.0 nets: Conv-BN-SiLU, C3, SPPF, PAN), with its anchor head or with an anchor-free one.

Ten variants from one table; parameter counts and tensor names are those of the published checkpoints. CSP blocks:
Wang et al. 2020; path aggregation: Liu et al. 2018; anchor-free head: FCOS (Tian et al. 2019) with the decoupled
branches of YOLOX (Ge et al. 2021) and the distance distributions of GFL (Li et al. 2020). The nets of releases 4.0 and
5.0, and YOLOv5u with its dense class branch, are there for the checkpoints of others: see `nets.weights.our_names`.

Another net for train_det.py, class Mine in nets/mine.py, is called with num_classes and in_chans and offers
    strides, stride     pixels per cell of its maps, fine to coarse; the largest, of which image sides are multiples
    forward, train()    maps as AnchorFreeHead or AnchorHead returns them, for the losses in utils/losses/detection.py
    forward, eval()     rows as YOLOv5 returns them, for utils/ops/decide.py
    head.anchors        only for --head anchor: a buffer as in AnchorHead
or it comes with a loss of its own in train_det.py. The heads below may be used by any net.
"""
import functools
import math

import torch
from torch import nn

from nets.blocks import ConvNorm, recompute, silu
from utils.ops.anchors import cells, decode_points
from utils.ops.boxes import to_xywh

SIZES = {  # depth, width
    "n": (1 / 3, 1 / 4), "s": (1 / 3, 1 / 2), "m": (2 / 3, 3 / 4), "l": (1, 1), "x": (4 / 3, 5 / 4)}
STAGES = {  # by the last level, P5 or P6: (channels, blocks) of the stages with strides 4, 8, 16, ...
    "5": [(128, 3), (256, 6), (512, 9), (1024, 3)],
    "6": [(128, 3), (256, 6), (512, 9), (768, 3), (1024, 3)],
}
VARIANTS = (*SIZES, *(f"{size}6" for size in SIZES))
ANCHORS = {  # by the last level: (width, height) in pixels per level, for training at 640 and at 1280; from COCO
    "5": [[(10, 13), (16, 30), (33, 23)], [(30, 61), (62, 45), (59, 119)], [(116, 90), (156, 198), (373, 326)]],
    "6": [[(19, 27), (44, 40), (38, 94)], [(96, 68), (86, 152), (180, 137)], [(140, 301), (303, 264), (238, 542)],
          [(436, 615), (739, 380), (925, 792)]],
}
BINS = 16  # of the anchor-free head: distances from 0 to 15 strides


# momentum: the published nets were trained with 0.03. In a run of a few hundred steps such running statistics lag behind
# the weights: AP 0.005 instead of 0.28 after seven epochs on small data
Conv = functools.partial(ConvNorm, act=silu, eps=1e-3, momentum=0.1)


class Bottleneck(nn.Module):
    def __init__(self, channels, shortcut):
        super().__init__()
        self.cv1 = Conv(channels, channels)
        self.cv2 = Conv(channels, channels, 3)
        self.shortcut = shortcut

    def forward(self, x):
        y = self.cv2(self.cv1(x))
        return x + y if self.shortcut else y


class C3(nn.Module):
    """Half of the channels through `depth` bottlenecks, half around them."""

    def __init__(self, cin, cout, depth, shortcut=True):
        super().__init__()
        self.cv1 = Conv(cin, cout // 2)
        self.cv2 = Conv(cin, cout // 2)
        self.cv3 = Conv(cout, cout)
        self.m = nn.Sequential(*[Bottleneck(cout // 2, shortcut) for _ in range(depth)])

    def forward(self, x):
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class SPPF(nn.Module):
    """Maxima over windows of 5, 9 and 13 cells (kernel 3: of 3, 5 and 7), as three poolings in a row."""

    def __init__(self, channels, kernel=5):
        super().__init__()
        self.cv1 = Conv(channels, channels // 2)
        self.cv2 = Conv(channels * 2, channels)
        self.pool = nn.MaxPool2d(kernel, stride=1, padding=kernel // 2)

    def forward(self, x):
        x = self.cv1(x)
        y = self.pool(x)
        z = self.pool(y)
        return self.cv2(torch.cat((x, y, z, self.pool(z)), 1))


class Concat(nn.Module):
    """The maps of the layer before and of the layer with the index `skip`, along the channels."""

    def __init__(self, skip):
        super().__init__()
        self.skip = skip

    def forward(self, x, skipped):
        return torch.cat((x, skipped), 1)


class AnchorHead(nn.Module):
    """YOLOv5's head: per level a 1x1 convolution, which gives every cell and anchor 4 numbers for the box, objectness
    and class logits.

    train(): maps (B, anchors, rows, columns, 5 + classes), raw. eval(): see YOLOv5.
    """

    def __init__(self, channels, strides, num_classes, anchors):
        super().__init__()
        self.strides = strides
        anchors = torch.as_tensor(anchors, dtype=torch.float32).reshape(len(strides), -1, 2)
        self.register_buffer("anchors", anchors / torch.tensor(strides)[:, None, None])  # in strides, as published
        self.outputs = 5 + num_classes
        self.m = nn.ModuleList(nn.Conv2d(c, anchors.shape[1] * self.outputs, 1) for c in channels)
        for conv, stride in zip(self.m, strides):  # prior: few objects per image, all classes equally frequent
            bias = conv.bias.data.view(-1, self.outputs)
            bias[:, 4] += math.log(8 / (640 / stride) ** 2)
            bias[:, 5:] += math.log(0.6 / (num_classes - 0.999999))

    def _apply(self, fn, recurse=True):
        """Anchors stay in fp32: half precision is too coarse for sizes in pixels."""
        anchors = self.anchors
        super()._apply(fn, recurse)
        self.anchors = anchors.to(self.anchors.device)
        return self

    def forward(self, maps):
        raw = [conv(x).unflatten(1, (-1, self.outputs)).permute(0, 1, 3, 4, 2) for conv, x in zip(self.m, maps)]
        return raw if self.training else self.decode(raw)

    def decode(self, maps):
        """Raw maps -> rows (B, N, 5 + classes) as in YOLOv5, fp32."""
        rows = []
        for raw, anchors, stride in zip(maps, self.anchors, self.strides):
            y = raw.float().sigmoid().flatten(2, 3)
            xy = (2 * y[..., :2] - 0.5 + cells(*raw.shape[2:4], y.device)) * stride
            wh = (2 * y[..., 2:4]) ** 2 * (anchors * stride)[:, None]
            rows.append(torch.cat((xy, wh, y[..., 4:]), -1).flatten(1, 2))
        return torch.cat(rows, 1)


class AnchorFreeHead(nn.Module):
    """Per level two branches of two 3x3 convolutions, one for the box and a depthwise one for the classes.

    A cell's box is given by the distances from its centre to the four sides, each a distribution over BINS
    multiples of the stride. train(): maps (B, rows, columns, 4 * BINS + classes), raw. eval(): see YOLOv5.
    dense: the class branch is like the box branch, as in YOLOv5u.
    """

    def __init__(self, channels, strides, num_classes, dense=False):
        super().__init__()
        self.strides = strides
        box, cls = max(channels[0] // 4, 4 * BINS), max(channels[0], min(num_classes, 100))
        self.box = nn.ModuleList(nn.Sequential(
            Conv(c, box, 3), Conv(box, box, 3), nn.Conv2d(box, 4 * BINS, 1)) for c in channels)
        if dense:  # under its published name, so that no tensor of it is loaded into the other branch
            self.cv3 = nn.ModuleList(nn.Sequential(
                Conv(c, cls, 3), Conv(cls, cls, 3), nn.Conv2d(cls, num_classes, 1)) for c in channels)
            return
        self.cls = nn.ModuleList(nn.Sequential(
            Conv(c, c, 3, groups=c), Conv(c, cls), Conv(cls, cls, 3, groups=cls), Conv(cls, cls),
            nn.Conv2d(cls, num_classes, 1)) for c in channels)
        # the depthwise kernels start near the identity: with torch's random kernels some short trainings never start
        for box, cls, stride in zip(self.box, self.cls, strides):
            cls[0].conv.weight.data[..., 1, 1] += 1
            cls[2].conv.weight.data[..., 1, 1] += 1
            nn.init.constant_(cls[-1].bias, math.log(5 / num_classes / (640 / stride) ** 2))
            nn.init.constant_(box[-1].bias, 1.0)

    def forward(self, maps):
        _, classes = self.children()
        raw = [torch.cat((box(x), cls(x)), 1).permute(0, 2, 3, 1) for box, cls, x in zip(self.box, classes, maps)]
        return raw if self.training else self.decode(raw)

    def decode(self, maps):
        """Raw maps -> rows (B, N, 5 + classes) as in YOLOv5, fp32."""
        points = decode_points(maps, self.strides, BINS)
        objectness = torch.ones_like(points.boxes[..., :1])  # this head predicts none
        return torch.cat((to_xywh(points.boxes), objectness, points.classes.sigmoid()), -1)


class YOLOv5(nn.Module):
    """(B, in_chans, H, W), H and W multiples of `stride`.

    train(): a list of raw maps per level, fine to coarse, as the head gives them.
    eval(): decoded rows (B, N, 5 + num_classes) fp32: x, y of the centre, width, height in pixels, objectness (1 for
    head="free"), class probabilities.

    variant: "n" "s" "m" "l" "x" (strides 8, 16, 32) or "n6" ... "x6" (and 64); with "_v5" behind it, the nets of
    releases 4.0 and 5.0. anchors: (levels, anchors, 2) pixels. head: "anchor", "free", or "dense" for YOLOv5u's.
    """

    def __init__(self, variant="s", num_classes=80, in_chans=3, anchors=None, head="anchor", grad_checkpoint=False):
        super().__init__()
        deep, wide = SIZES[variant[0]]
        kind, old = "6" if "6" in variant else "5", variant.endswith("_v5")
        self.grad_checkpoint = grad_checkpoint

        def width(channels):
            return math.ceil(channels * wide / 8) * 8

        def c3(cin, cout, count, shortcut=True):
            return C3(cin, cout, max(round(count * deep), 1), shortcut)

        cin, layers = width(64), [Conv(in_chans, width(64), 6, 2)]
        for cout, count in STAGES[kind]:
            count += 3 * (old and count == 6)
            layers += [Conv(cin, width(cout), 3, 2), c3(cin := width(cout), cin, count)]
        layers += [SPPF(cin)]
        if old:  # there the pooling precedes the last blocks, which have no shortcuts
            layers[-2:] = [SPPF(cin, 3 if kind == "6" else 5), c3(cin, cin, count, False)]
        self.backbone = len(layers)  # for --freeze backbone
        channels = [width(cout) for cout, _ in STAGES[kind][1:]]  # of the maps with strides 8, 16, ...
        laterals = []
        for i in reversed(range(len(channels) - 1)):  # coarse to fine; layer 4 + 2i ends the stage of stride 8 * 2^i
            laterals.append(len(layers))
            layers += [Conv(cin, channels[i]), nn.Upsample(scale_factor=2), Concat(4 + 2 * i)]
            layers += [c3(2 * channels[i], cin := channels[i], 3, False)]
        self.outputs = [len(layers) - 1 + 3 * i for i in range(len(channels))]
        for cout in channels[1:]:  # and back
            layers += [Conv(cin, cin, 3, 2), Concat(laterals.pop()), c3(2 * cin, cin := cout, 3, False)]
        self.stored = {*self.outputs, *(layer.skip for layer in layers if isinstance(layer, Concat))}
        self.strides = [8 * 2 ** i for i in range(len(channels))]
        self.stride = self.strides[-1]
        if head == "anchor":
            layers += [AnchorHead(channels, self.strides, num_classes, ANCHORS[kind] if anchors is None else anchors)]
        else:
            layers += [AnchorFreeHead(channels, self.strides, num_classes, dense=head == "dense")]
        self.model = nn.ModuleList(layers)
        self.task_prefixes = (f"model.{len(layers) - 1}.",)  # the head may differ from the published weights' head

    @property
    def head(self):
        return self.model[-1]

    def forward(self, x):
        *layers, head = self.model
        stored = {}  # the maps that later layers need
        for i, layer in enumerate(layers):
            if isinstance(layer, Concat):
                x = layer(x, stored[layer.skip])
            elif isinstance(layer, C3) and self.grad_checkpoint and self.training:
                x = recompute(layer, x)
            else:
                x = layer(x)
            if i in self.stored:
                stored[i] = x
        return head([stored[i] for i in self.outputs])
