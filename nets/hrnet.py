"""HRNet (Sun et al. 2019, arXiv 1902.09212; Wang et al. 2020, arXiv 1908.07919): four resolutions in parallel.

Instead of reducing the map and enlarging it again in a decoder, branches at strides 4, 8, 16 and 32 exchange their
features every few blocks. Tensor names are timm's, so that its weights load by name (hrnet_w18 ... hrnet_w64, and
hrnet_*_ssld, whose head has no biases). As a segmentation net, HRNetV2: UNet("hrnet_w18", decoder=()).
"""
import torch.nn.functional as F
from torch import nn

from nets.blocks import Backbone, conv2d, fold_norms, init_fan_out, relu

# modules of stages 2, 3 and 4, which have 2, 3 and 4 branches; (blocks, width) of stage 1; blocks per branch; width of
# the finest branch. Every coarser branch is twice as wide.
VARIANTS = {
    "w18_small": ((1, 1, 1), (1, 32), 2, 16),
    "w18_small_v2": ((1, 3, 2), (2, 64), 2, 18),
    **{f"w{width}": ((1, 4, 3), (4, 64), 4, width) for width in (18, 30, 32, 40, 44, 48, 64)},
}
HEAD = (128, 256, 512, 1024)  # widths of the branches in the classifier
POOLED = 2048


class ConvNorm(nn.Sequential):
    """nets.blocks.ConvNorm whose parts are called 0 and 1, as in timm's state dicts."""

    fuse_ = fold_norms

    def __init__(self, cin, cout, kernel=1, stride=1, *, act=relu, bias=False):
        super().__init__(conv2d(cin, cout, kernel, stride, bias=bias), nn.BatchNorm2d(cout))
        self.act = act

    def forward(self, x):
        x = super().forward(x)
        return self.act(x) if self.act else x


class BasicBlock(nn.Module):
    """ResNet's: 3x3 -> 3x3 with a residual."""

    fuse_ = fold_norms

    def __init__(self, width):
        super().__init__()
        self.conv1 = conv2d(width, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv2d(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x):
        return relu(self.bn2(self.conv2(relu(self.bn1(self.conv1(x))))) + x)


class Bottleneck(nn.Module):
    """ResNet's: 1x1 to a quarter of `cout` channels -> 3x3 -> 1x1 with a residual."""

    fuse_ = fold_norms

    def __init__(self, cin, cout):
        super().__init__()
        inner = cout // 4
        self.conv1 = conv2d(cin, inner)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = conv2d(inner, inner, 3)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = conv2d(inner, cout)
        self.bn3 = nn.BatchNorm2d(cout)
        self.downsample = ConvNorm(cin, cout, act=None) if cin != cout else nn.Identity()

    def forward(self, x):
        y = relu(self.bn1(self.conv1(x)))
        y = relu(self.bn2(self.conv2(y)))
        return relu(self.bn3(self.conv3(y)) + self.downsample(x))


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
    corners = None if mode == "nearest" else False
    return F.interpolate(x, scale_factor=factor, mode=mode, align_corners=corners)[..., :size[0], :size[1]]


class HighResolutionModule(nn.Module):
    """`blocks` blocks in every branch; then every branch becomes the sum of all branches, each through its fuse layer.

    `forward(*maps)` -> list of maps of the same shapes, fine to coarse.
    """

    def __init__(self, widths, blocks):
        super().__init__()
        each = range(len(widths))
        self.branches = nn.ModuleList(nn.Sequential(*(BasicBlock(width) for _ in range(blocks))) for width in widths)
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
        self.layer1 = nn.Sequential(Bottleneck(64, cin), *(Bottleneck(cin, cin) for _ in range(depth - 1)))
        # a transition adds the next coarser branch; the first transition also narrows the only branch
        self.transition1 = nn.ModuleList([ConvNorm(cin, width, 3), nn.Sequential(ConvNorm(cin, 2 * width, 3, 2))])
        for i, count in enumerate(modules, 2):
            if i > 2:
                kept, added = [nn.Identity()] * (i - 1), nn.Sequential(ConvNorm(*widths[i - 2:i], 3, 2))
                self.add_module(f"transition{i - 1}", nn.ModuleList([*kept, added]))
            stage = nn.Sequential(*(HighResolutionModule(widths[:i], blocks) for _ in range(count)))
            self.add_module(f"stage{i}", stage)
        if num_classes is not None:
            self.incre_modules = nn.ModuleList(nn.Sequential(Bottleneck(*w)) for w in zip(widths, HEAD))
            self.downsamp_modules = nn.ModuleList(ConvNorm(*HEAD[i:i + 2], 3, 2, bias=True) for i in range(3))
            self.final_layer = ConvNorm(HEAD[-1], POOLED, bias=True)
            self.classifier = nn.Linear(POOLED, num_classes) if num_classes else nn.Identity()
        init_fan_out(self)

    def features(self, x):
        stem = relu(self.bn1(self.conv1(x)))
        x = relu(self.bn2(self.conv2(stem)))
        for block in self.layer1:
            x = self.run(block, x)
        maps = [layer(x) for layer in self.transition1]
        for module in self.stage2:
            maps = self.run(module, *maps)
        for added, stage in ((self.transition2[-1], self.stage3), (self.transition3[-1], self.stage4)):
            maps = [*maps, added(maps[-1])]
            for module in stage:
                maps = self.run(module, *maps)
        return [stem, *maps]

    def last_map(self, x):
        first, *coarser = [self.run(layer, x) for layer, x in zip(self.incre_modules, self.features(x)[1:])]
        for down, x in zip(self.downsamp_modules, coarser):
            first = x + down(first)
        return self.final_layer(first)

    def forward(self, x):
        return self.classifier(self.last_map(x).mean((2, 3)))
