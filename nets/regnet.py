"""RegNetX (Radosavovic et al. 2020, "Designing Network Design Spaces", arXiv 2003.13678).

Parameter names are timm's, so that its weights load by name. RegNetX-200MF: 2,684,792 parameters, 68.8 % ImageNet top-1
with timm's weights `regnetx_002` (timm's results table).
"""
from torch import nn

from nets.blocks import Backbone, ConvNorm, Head, init_fan_out, relu, run

# name: (group width, (width, blocks) of the four stages). The numbers are the results of the paper's linear rule.
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

    def __init__(self, cin, cout, stride, group_width):
        super().__init__()
        self.conv1 = ConvNorm(cin, cout)
        self.conv2 = ConvNorm(cout, cout, 3, stride, groups=cout // group_width)
        self.conv3 = ConvNorm(cout, cout, act=None)
        nn.init.zeros_(self.conv3.bn.weight)  # a block starts as its shortcut (Goyal et al. 2017, section 5.1)
        same_shape = stride == 1 and cin == cout
        self.downsample = nn.Identity() if same_shape else ConvNorm(cin, cout, 1, stride, act=None)

    def forward(self, x):
        return relu(self.conv3(self.conv2(self.conv1(x))) + self.downsample(x))


class RegNetX(Backbone):
    """`forward(x)`: (B, in_chans, H, W) -> (B, num_classes); num_classes=0 or None: the pooled features.

    `features(x)` -> five maps with `channels` (32, 24, 56, 152, 368 for 200MF) at `strides` 2, 4, 8, 16, 32; half of
    these strides with `stem_stride=1`. grad_checkpoint: the stages are recomputed in the backward pass.
    Raises KeyError for an unknown variant.
    """

    def __init__(self, in_chans=3, variant="regnetx_002", num_classes=1000, stem_stride=2, grad_checkpoint=False):
        group_width, *stages = VARIANTS[variant]
        super().__init__([32, *(width for width, _ in stages)], grad_checkpoint, stem_stride)
        self.stem = ConvNorm(in_chans, 32, 3, stem_stride)
        for i, (width, depth) in enumerate(stages, 1):
            stage = nn.Sequential()
            for j in range(depth):
                cin, stride = (self.channels[i - 1], 2) if j == 0 else (width, 1)
                stage.add_module(f"b{j + 1}", Block(cin, width, stride, group_width))
            self.add_module(f"s{i}", stage)
        init_fan_out(self)
        self.head = Head(width, num_classes)

    def features(self, x):
        maps = [self.stem(x)]
        for stage in (self.s1, self.s2, self.s3, self.s4):
            maps.append(run(self, stage, maps[-1]))
        return maps
