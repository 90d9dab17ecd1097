"""YOLOv5 (v6.0 nets: Conv-BN-SiLU, C3, SPPF, PAN), with its anchor head or with an anchor-free one.

Ten variants from one table; parameter counts and tensor names are those of the published checkpoints. CSP blocks:
Wang et al. 2020; path aggregation: Liu et al. 2018; anchor-free head: FCOS (Tian et al. 2019) with the decoupled
branches of YOLOX (Ge et al. 2021) and the distances' distribution of GFL (Li et al. 2020).
"""
import math

import torch
from torch import nn

from nets.blocks import ConvNorm, recompute, silu

SIZES = {  # depth, width
    "n": (1 / 3, 1 / 4), "s": (1 / 3, 1 / 2), "m": (2 / 3, 3 / 4), "l": (1, 1), "x": (4 / 3, 5 / 4)}
STAGES = {  # per variant's last letter: (channels, blocks) of the stages with strides 4, 8, 16, ...
    "5": [(128, 3), (256, 6), (512, 9), (1024, 3)],
    "6": [(128, 3), (256, 6), (512, 9), (768, 3), (1024, 3)],
}
VARIANTS = (*SIZES, *(f"{size}6" for size in SIZES))
ANCHORS = {  # (width, height) in pixels per level, for training at 640 and at 1280; from COCO
    "5": [[(10, 13), (16, 30), (33, 23)], [(30, 61), (62, 45), (59, 119)], [(116, 90), (156, 198), (373, 326)]],
    "6": [[(19, 27), (44, 40), (38, 94)], [(96, 68), (86, 152), (180, 137)], [(140, 301), (303, 264), (238, 542)],
          [(436, 615), (739, 380), (925, 792)]],
}
BINS = 16  # of the anchor-free head: distances from 0 to 15 strides


class Conv(ConvNorm):
    # momentum: the published nets were trained with 0.03. In a run of a few hundred steps statistics that slow are
    # those of weights long gone: AP 0.005 instead of 0.28 after seven epochs on small data
    def __init__(self, cin, cout, kernel=1, stride=1, groups=1):
        super().__init__(cin, cout, kernel, stride, groups, act=silu, eps=1e-3, momentum=0.1)


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
    """Maxima over windows of 5, 9 and 13 cells, as three poolings in a row."""

    def __init__(self, channels):
        super().__init__()
        self.cv1 = Conv(channels, channels // 2)
        self.cv2 = Conv(channels * 2, channels)
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)

    def forward(self, x):
        maps = [self.cv1(x)]
        for _ in range(3):
            maps.append(self.pool(maps[-1]))
        return self.cv2(torch.cat(maps, 1))


class Concat(nn.Module):
    def forward(self, x, skip):
        return torch.cat((x, skip), 1)


class AnchorHead(nn.Module):
    """Per level a 1x1 convolution: for every cell and anchor 4 numbers of the box, objectness, classes.

    train(): maps (B, anchors, rows, columns, 5 + classes), raw. eval(): see YOLOv5.
    """

    def __init__(self, channels, strides, num_classes, anchors):
        super().__init__()
        self.strides = strides
        anchors = torch.as_tensor(anchors, dtype=torch.float32).reshape(len(strides), -1, 2)
        self.register_buffer("anchors", anchors / torch.tensor(strides)[:, None, None])  # in strides, as published
        self.outputs = 5 + num_classes
        self.m = nn.ModuleList(nn.Conv2d(c, anchors.shape[1] * self.outputs, 1) for c in channels)
        for conv, stride in zip(self.m, strides):  # few objects per image, all classes equally frequent
            bias = conv.bias.data.view(-1, self.outputs)
            bias[:, 4] += math.log(8 / (640 / stride) ** 2)
            bias[:, 5:] += math.log(0.6 / (num_classes - 0.999999))

    def _apply(self, fn, recurse=True):
        """Half precision is too coarse for anchors, which are numbers of pixels."""
        anchors = self.anchors
        super()._apply(fn, recurse)
        self.anchors = anchors.to(self.anchors.device)
        return self

    def forward(self, maps):
        raw = [conv(x).unflatten(1, (-1, self.outputs)).permute(0, 1, 3, 4, 2) for conv, x in zip(self.m, maps)]
        if self.training:
            return raw
        return torch.cat([self.decode(*level) for level in zip(raw, self.anchors, self.strides)], 1)

    def decode(self, raw, anchors, stride):
        y = raw.float().sigmoid()
        xy = (2 * y[..., :2] - 0.5 + cells(*y.shape[2:4], y.device)) * stride
        wh = (2 * y[..., 2:4]) ** 2 * (anchors * stride)[:, None, None]
        return torch.cat((xy, wh, y[..., 4:]), -1).flatten(1, 3)


class AnchorFreeHead(nn.Module):
    """Anchor-free: per level two branches of two 3x3 convolutions, for the box and, depthwise, for the classes.

    A cell's box is given by the distances from its centre to the four sides, each a distribution over BINS
    multiples of the stride. train(): maps (B, rows, columns, 4 * BINS + classes), raw. eval(): see YOLOv5.
    """

    def __init__(self, channels, strides, num_classes):
        super().__init__()
        self.strides = strides
        box, cls = max(16, channels[0] // 4, 4 * BINS), max(channels[0], min(num_classes, 100))
        self.box = nn.ModuleList(nn.Sequential(
            Conv(c, box, 3), Conv(box, box, 3), nn.Conv2d(box, 4 * BINS, 1)) for c in channels)
        self.cls = nn.ModuleList(nn.Sequential(
            Conv(c, c, 3, groups=c), Conv(c, cls), Conv(cls, cls, 3, groups=cls), Conv(cls, cls),
            nn.Conv2d(cls, num_classes, 1)) for c in channels)
        # depthwise, a cell looks at itself first: from torch's random numbers alone some short trainings never start
        for branch, stride in zip(self.cls, strides):
            branch[0].conv.weight.data[..., 1, 1] += 1
            branch[2].conv.weight.data[..., 1, 1] += 1
            nn.init.constant_(branch[-1].bias, math.log(5 / num_classes / (640 / stride) ** 2))
        for branch in self.box:
            nn.init.constant_(branch[-1].bias, 1.0)

    def forward(self, maps):
        raw = [torch.cat((box(x), cls(x)), 1).permute(0, 2, 3, 1) for box, cls, x in zip(self.box, self.cls, maps)]
        return raw if self.training else torch.cat([self.decode(*level) for level in zip(raw, self.strides)], 1)

    def decode(self, raw, stride):
        raw = raw.float()
        distances = expected(raw[..., :4 * BINS]) * stride  # left, top, right, bottom
        centres = (cells(*raw.shape[1:3], raw.device) + 0.5) * stride
        first, last = centres - distances[..., :2], centres + distances[..., 2:]
        sure = raw.new_ones(*raw.shape[:3], 1)  # no objectness of its own
        return torch.cat(((first + last) / 2, last - first, sure, raw[..., 4 * BINS:].sigmoid()), -1).flatten(1, 2)


def cells(rows, columns, device):
    """(rows, columns, 2): every cell's column and row."""
    y, x = torch.arange(rows, device=device), torch.arange(columns, device=device)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).float()


def expected(logits):
    """Logits (..., 4 * BINS) of four distributions -> their means (..., 4), in bins."""
    logits = logits.unflatten(-1, (4, -1))
    bins = torch.arange(logits.shape[-1], device=logits.device, dtype=logits.dtype)
    return (logits.softmax(-1) * bins).sum(-1)  # autocast would round the terms of a matrix product


class YOLOv5(nn.Module):
    """(B, in_chans, H, W), H and W multiples of `stride`.

    train(): a list of raw maps per level, fine to coarse, as the head gives them.
    eval(): decoded rows (B, N, 5 + num_classes) fp32: x, y of the centre, width, height in pixels, objectness (1 for
    head="free"), class probabilities.

    variant: "n" "s" "m" "l" "x" (strides 8, 16, 32) or "n6" ... "x6" (and 64). anchors: (levels, anchors, 2) pixels.
    """

    def __init__(self, variant="s", num_classes=80, in_chans=3, anchors=None, head="anchor", grad_checkpoint=False):
        super().__init__()
        deep, wide = SIZES[variant[0]]
        kind = variant[1:] or "5"
        self.grad_checkpoint = grad_checkpoint

        def width(channels):
            return math.ceil(channels * wide / 8) * 8

        def c3(cin, cout, count, shortcut=True):
            return C3(cin, cout, max(round(count * deep), 1), shortcut)

        cin, stages = width(64), [(width(channels), count) for channels, count in STAGES[kind]]
        layers = [Conv(in_chans, cin, 6, 2)]
        for cout, count in stages:
            layers += [Conv(cin, cout, 3, 2), c3(cin := cout, cout, count)]
        layers += [SPPF(cin)]
        channels = [cout for cout, _ in stages[1:]]  # of the maps with strides 8, 16, ...
        for skip in reversed(channels[:-1]):  # coarse to fine
            layers += [Conv(cin, skip), nn.Upsample(scale_factor=2), Concat(), c3(2 * skip, skip, 3, False)]
            cin = skip
        for cout in channels[1:]:  # and back
            layers += [Conv(cin, cin, 3, 2), Concat(), c3(2 * cin, cout, 3, False)]
            cin = cout
        self.strides = [8 * 2 ** i for i in range(len(channels))]
        if head == "anchor":
            layers += [AnchorHead(channels, self.strides, num_classes, ANCHORS[kind] if anchors is None else anchors)]
        else:
            layers += [AnchorFreeHead(channels, self.strides, num_classes)]
        self.model = nn.ModuleList(layers)
        self.task_prefixes = (f"model.{len(layers) - 1}.",)  # the head may differ from that of published weights

    @property
    def stride(self):
        return self.strides[-1]

    @property
    def head(self):
        return self.model[-1]

    def forward(self, x):
        layers = iter(self.model)

        def run(*inputs):
            layer = next(layers)
            if self.grad_checkpoint and self.training and isinstance(layer, C3):
                return recompute(layer, *inputs)
            return layer(*inputs)

        x, skips = run(x), []
        for _ in range(len(self.strides) + 1):
            x = run(run(x))
            skips.append(x)
        x, laterals = run(x), []
        for skip in skips[-2:0:-1]:
            x = run(x)
            laterals.append(x)
            x = run(run(run(x), skip))
        maps = [x]
        while laterals:
            x = run(run(run(x), laterals.pop()))
            maps.append(x)
        return run(maps)
