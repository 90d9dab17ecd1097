"""HRNet (Sun et al. 2019, arXiv 1902.09212; Wang et al. 2020, arXiv 1908.07919): four resolutions in parallel.

Instead of reducing the map and enlarging it again in a decoder, branches at strides 4, 8, 16 and 32 exchange their
features every few blocks. Tensor names are timm's, so that its weights load by name (hrnet_w18 ... hrnet_w64, and
hrnet_*_ssld, whose head has no biases). As a segmentation net, HRNetV2: UNet("hrnet_w18", decoder=()).
"""
import torch.nn.functional as F
from torch import nn

from nets.blocks import Backbone, ConvNorm as NamedConvNorm, conv2d, fold_norms, init_fan_out, relu, run

# modules of stages 2, 3 and 4, which have 2, 3 and 4 branches; (blocks, width) of stage 1; blocks per branch; width of
# the finest branch. Every coarser branch is twice as wide.
VARIANTS = {
    "w18_small": ((1, 1, 1), (1, 32), 2, 16),
    "w18_small_v2": ((1, 3, 2), (2, 64), 2, 18),
    **{f"w{width}": ((1, 4, 3), (4, 64), 4, width) for width in (18, 30, 32, 40, 44, 48, 64)},
}
HEAD = (128, 256, 512, 1024)  # widths of the branches in the classifier
POOLED = 2048


class ConvNorm(NamedConvNorm):
    """With the names of timm's state dicts."""

    names = "0", "1"


class Block(nn.Module):
    """ResNet's block with a residual: convolutions of these kernels, the first from widths[0] to widths[1] channels."""

    fuse_ = fold_norms

    def __init__(self, kernels, widths):
        super().__init__()
        for i, (kernel, *sides) in enumerate(zip(kernels, widths, widths[1:]), 1):
            self.add_module(f"conv{i}", conv2d(*sides, kernel))
            self.add_module(f"bn{i}", nn.BatchNorm2d(sides[1]))
        cin, *_, cout = widths
        self.downsample = ConvNorm(cin, cout, act=None) if cin != cout else nn.Identity()

    def forward(self, x):
        conv, norm, *others, downsample = self.children()
        y = norm(conv(x))
        for conv, norm in zip(others[::2], others[1::2]):
            y = norm(conv(relu(y)))
        return relu(y + downsample(x))


def bottleneck(cin, cout):
    """1x1 to a quarter of `cout` channels -> 3x3 -> 1x1."""
    return Block((1, 3, 1), (cin, cout // 4, cout // 4, cout))


def fuse_layer(widths, source, target):
    """The layers from branch `source` to branch `target`. To a finer branch: 1x1 (HighResolutionModule enlarges the
    result). To a coarser branch: a 3x3 of stride 2 per halving; only the last one changes the width and has no ReLU."""
    if source == target:
        return nn.Identity()
    if source > target:
        return ConvNorm(widths[source], widths[target], act=None)
    chain = [ConvNorm(widths[source], widths[source], 3, 2) for _ in range(target - source - 1)]
    return nn.Sequential(*chain, ConvNorm(widths[source], widths[target], 3, 2, act=None))


def enlarge(x, factor, size, mode):
    """(B, C, h, w) -> (B, C, *size): enlarged `factor` times, then cropped to size (height, width).

    Odd sides were rounded up when they were halved; interpolating to `size` instead would shift the far end of the map.
    """
    return F.interpolate(x, scale_factor=factor, mode=mode)[..., :size[0], :size[1]]


class HighResolutionModule(nn.Module):
    """`blocks` blocks in every branch; then every branch becomes the sum of all branches, each through its fuse layer.

    `forward(*maps)` -> list of maps of the same shapes, fine to coarse.
    """

    def __init__(self, widths, blocks):
        super().__init__()
        each = range(len(widths))
        self.branches = nn.ModuleList(nn.Sequential(*(Block((3, 3), [width] * 3) for _ in range(blocks)))
                                      for width in widths)
        self.fuse_layers = nn.ModuleList(nn.ModuleList(fuse_layer(widths, j, i) for j in each) for i in each)

    def forward(self, *maps):
        maps = [branch(x) for branch, x in zip(self.branches, maps)]
        sums = []
        for i, layers in enumerate(self.fuse_layers):
            first, *rest = [layer(x) if j <= i else enlarge(layer(x), 2 ** (j - i), maps[i].shape[2:], "nearest")
                            for j, (layer, x) in enumerate(zip(layers, maps))]
            sums.append(relu(sum(rest, first)))
        return sums


class HRNet(Backbone):
    """`forward(x)`: (B, in_chans, H, W), any H and W -> (B, num_classes); num_classes=0: the pooled features (2048).

    `features(x)` -> five maps with `channels` (64, 18, 36, 72, 144 for w18) at `strides` 2, 4, 8, 16, 32: the first map
    of the stem and the four branches. `num_classes=None`: an encoder, without the layers that `features` does not need.
    grad_checkpoint: blocks and modules are recomputed in the backward pass. Convolutions start as `init_fan_out` and the
    classifier as torch's linear layer, both as timm's. The results are timm's where all maps halve
    without a remainder (the sides of the finest branch are multiples of 8); timm fails for other sizes.
    Raises KeyError for an unknown variant.
    """

    fuse_ = fold_norms

    def __init__(self, variant="w18", in_chans=3, num_classes=1000, *, grad_checkpoint=False):
        modules, (depth, narrow), blocks, width = VARIANTS[variant]
        widths = [width * 2 ** i for i in range(4)]
        super().__init__([64, *widths], grad_checkpoint)
        self.conv1 = conv2d(in_chans, 64, 3, 2)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = conv2d(64, 64, 3, 2)
        self.bn2 = nn.BatchNorm2d(64)
        cin = 4 * narrow
        self.layer1 = nn.Sequential(bottleneck(64, cin), *(bottleneck(cin, cin) for _ in range(depth - 1)))
        kept = [ConvNorm(cin, width, 3)]  # the first transition also narrows the only branch
        for i, count in enumerate(modules, 2):
            added = nn.Sequential(ConvNorm(cin, widths[i - 1], 3, 2))  # a transition adds the next coarser branch
            self.add_module(f"transition{i - 1}", nn.ModuleList([*kept, added]))
            stage = nn.Sequential(*(HighResolutionModule(widths[:i], blocks) for _ in range(count)))
            self.add_module(f"stage{i}", stage)
            kept, cin = [nn.Identity()] * i, widths[i - 1]
        if num_classes is not None:
            self.incre_modules = nn.ModuleList(nn.Sequential(bottleneck(*w)) for w in zip(widths, HEAD))
            self.downsamp_modules = nn.ModuleList(ConvNorm(*HEAD[i:i + 2], 3, 2, bias=True) for i in range(3))
            self.final_layer = ConvNorm(HEAD[-1], POOLED, bias=True)
            self.classifier = nn.Linear(POOLED, num_classes) if num_classes else nn.Identity()
        init_fan_out(self)

    def features(self, x):
        stem = relu(self.bn1(self.conv1(x)))
        x = relu(self.bn2(self.conv2(stem)))
        for block in self.layer1:
            x = run(self, block, x)
        maps = [x]
        for transition, stage in ((self.transition1, self.stage2), (self.transition2, self.stage3),
                                  (self.transition3, self.stage4)):
            maps = [layer(x) for layer, x in zip(transition, [*maps, maps[-1]])]
            for module in stage:
                maps = run(self, module, *maps)
        return [stem, *maps]

    def forward(self, x):
        first, *coarser = [run(self, layer, x) for layer, x in zip(self.incre_modules, self.features(x)[1:])]
        for down, x in zip(self.downsamp_modules, coarser):
            first = x + down(first)
        return self.classifier(self.final_layer(first).mean((2, 3)))
