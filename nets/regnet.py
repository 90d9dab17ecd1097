"""RegNetX (Radosavovic et al. 2020, "Designing Network Design Spaces", arXiv 2003.13678).

Parameter names are timm's, so that its weights load by name. RegNetX-200MF: 68.8 % ImageNet top-1 with
timm's `regnetx_002` weights (timm's results table), 2,684,792 parameters.
"""
from torch import nn

from nets.blocks import ConvNorm, init_fan_out, recompute, relu

# name: (group width, (width, blocks) of the four stages); the paper's linear rule, written out
VARIANTS = {
    "regnetx_002": (8, (24, 1), (56, 1), (152, 4), (368, 7)),
    "regnetx_004": (16, (32, 1), (64, 2), (160, 7), (384, 12)),
    "regnetx_004_tv": (16, (32, 1), (64, 2), (160, 7), (400, 12)),  # torchvision rounds 392 / 16 up
    "regnetx_006": (24, (48, 1), (96, 3), (240, 5), (528, 7)),
    "regnetx_008": (16, (64, 1), (128, 3), (288, 7), (672, 5)),
    "regnetx_016": (24, (72, 2), (168, 4), (408, 10), (912, 2)),
    "regnetx_032": (48, (96, 2), (192, 6), (432, 15), (1008, 2)),
}


class Block(nn.Module):
    """1x1 -> grouped 3x3 -> 1x1 with a residual; bottleneck ratio 1."""

    def __init__(self, cin, cout, stride, group):
        super().__init__()
        self.conv1 = ConvNorm(cin, cout)
        self.conv2 = ConvNorm(cout, cout, 3, stride, groups=cout // group)
        self.conv3 = ConvNorm(cout, cout, act=None)
        changes = stride > 1 or cin != cout
        self.downsample = ConvNorm(cin, cout, 1, stride, act=None) if changes else nn.Identity()

    def forward(self, x):
        return relu(self.conv3(self.conv2(self.conv1(x))) + self.downsample(x))


class Head(nn.Module):
    def __init__(self, cin, num_classes):
        super().__init__()
        self.fc = nn.Linear(cin, num_classes)
        nn.init.normal_(self.fc.weight, 0.0, 0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


class RegNetX(nn.Module):
    """`forward(x)`: (B, in_chans, H, W) -> (B, num_classes); num_classes=0 or None: the pooled features, an encoder.

    `features(x)` -> five maps with `channels` (32, 24, 56, 152, 368 for 200MF) at `strides` 2, 4, 8, 16, 32;
    halved when `stem_stride=1`.
    """

    def __init__(self, in_chans=3, variant="regnetx_002", num_classes=1000, stem_stride=2, grad_checkpoint=False):
        super().__init__()
        group, *widths = VARIANTS[variant]
        self.stem = ConvNorm(in_chans, 32, 3, stem_stride)
        self.channels, self.strides = [32], [stem_stride]
        for i, (width, blocks) in enumerate(widths, 1):
            stage = nn.Sequential()
            for j in range(blocks):
                cin, stride = (self.channels[-1], 2) if j == 0 else (width, 1)
                stage.add_module(f"b{j + 1}", Block(cin, width, stride, group))
            self.add_module(f"s{i}", stage)
            self.channels.append(width)
            self.strides.append(self.strides[-1] * 2)
        self.grad_checkpoint = grad_checkpoint
        init_fan_out(self)
        for m in self.modules():
            if isinstance(m, Block):  # every block starts as its shortcut (Goyal et al. 2017, 5.1)
                nn.init.zeros_(m.conv3.bn.weight)
        self.head = Head(width, num_classes) if num_classes else None

    def features(self, x):
        maps = [self.stem(x)]
        for stage in (self.s1, self.s2, self.s3, self.s4):
            keep = not (self.grad_checkpoint and self.training)
            maps.append(stage(maps[-1]) if keep else recompute(stage, maps[-1]))
        return maps

    def last_map(self, x):
        """(B, channels, h, w): what the head averages before its linear layer."""
        return self.features(x)[-1]

    def forward(self, x):
        x = self.last_map(x)
        return self.head(x) if self.head else x.mean((2, 3))
