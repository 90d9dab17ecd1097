"""HRNet (Sun et al. 2019, arXiv 1902.09212; Wang et al. 2020, arXiv 1908.07919): four resolutions side by side.

Others shrink the map and, for masks, a decoder enlarges it again; here branches at strides 4, 8, 16 and 32 exchange
what they know every few blocks. Tensor names are timm's, so that its weights (hrnet_w18 ... hrnet_w64, and those of
hrnet_*_ssld, whose head has no biases) load by name. As a segmentation net, HRNetV2: UNet("hrnet_w18", decoder=()).
"""
import functools

import torch
import torch.nn.functional as F
from torch import nn

from nets.blocks import fuse_pair, init_fan_out, recompute, relu

# modules of stages 2, 3 and 4, which have 2, 3 and 4 branches; blocks and width of stage 1; blocks per branch; width of
# the finest branch, which doubles from one to the next
VARIANTS = {
    "w18_small": ((1, 1, 1), (1, 32), 2, 16),
    "w18_small_v2": ((1, 3, 2), (2, 64), 2, 18),
    **{f"w{width}": ((1, 4, 3), (4, 64), 4, width) for width in (18, 30, 32, 40, 44, 48, 64)},
}
HEAD = (128, 256, 512, 1024)  # widths of the branches in the classifier
POOLED = 2048


class ConvNorm(nn.Sequential):
    """nets.blocks.ConvNorm with its parts called 0 and 1, as in timm's state dicts."""

    def __init__(self, cin, cout, kernel=1, stride=1, *, act=relu, bias=False):
        super().__init__(nn.Conv2d(cin, cout, kernel, stride, padding=kernel // 2, bias=bias), nn.BatchNorm2d(cout))
        self.act = act

    def forward(self, x):
        x = self[1](self[0](x))
        return self.act(x) if self.act else x

    def fuse_(self):
        fuse_pair(self, ("0", "1"))


class BasicBlock(nn.Module):
    """ResNet's: 3x3 -> 3x3 with a residual."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x):
        return relu(self.bn2(self.conv2(relu(self.bn1(self.conv1(x))))) + x)

    def fuse_(self):
        fuse_pair(self, ("conv1", "bn1"), ("conv2", "bn2"))


class Bottleneck(nn.Module):
    """ResNet's: 1x1 that narrows to a quarter of `cout` -> 3x3 -> 1x1 with a residual."""

    def __init__(self, cin, cout):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout // 4, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout // 4)
        self.conv2 = nn.Conv2d(cout // 4, cout // 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout // 4)
        self.conv3 = nn.Conv2d(cout // 4, cout, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(cout)
        self.downsample = ConvNorm(cin, cout, act=None) if cin != cout else nn.Identity()

    def forward(self, x):
        y = relu(self.bn1(self.conv1(x)))
        y = relu(self.bn2(self.conv2(y)))
        return relu(self.bn3(self.conv3(y)) + self.downsample(x))

    def fuse_(self):
        fuse_pair(self, ("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))


def exchange(widths, source, target):
    """What one branch tells another: from a coarser one 1x1 (Module enlarges the result), to a coarser one a 3x3 of
    stride 2 per halving, of which only the last changes the width and has no ReLU."""
    if source == target:
        return nn.Identity()
    if source > target:
        return ConvNorm(widths[source], widths[target], act=None)
    chain = [ConvNorm(widths[source], widths[source], 3, 2) for _ in range(target - source - 1)]
    return nn.Sequential(*chain, ConvNorm(widths[source], widths[target], 3, 2, act=None))


class HighResolutionModule(nn.Module):
    """`blocks` blocks in every branch, then every branch becomes the sum of what all of them tell it.

    `forward(*maps)` -> list of maps of the same shapes, fine to coarse.
    """

    def __init__(self, widths, blocks):
        super().__init__()
        each = range(len(widths))
        self.branches = nn.ModuleList(nn.Sequential(*(BasicBlock(width) for _ in range(blocks))) for width in widths)
        self.fuse_layers = nn.ModuleList(nn.ModuleList(exchange(widths, j, i) for j in each) for i in each)

    def forward(self, *maps):
        maps = [branch(x) for branch, x in zip(self.branches, maps)]
        sums = []
        for i, layers in enumerate(self.fuse_layers):
            told = [layer(x) for layer, x in zip(layers, maps)]
            for j in range(i + 1, len(maps)):
                told[j] = enlarge(told[j], 2 ** (j - i), maps[i].shape[2:], "nearest")
            sums.append(relu(functools.reduce(torch.add, told)))
        return sums


def enlarge(x, factor, size, mode):
    """(B, C, h, w) -> (B, C, *size), enlarged `factor` times and then cut: odd sizes were rounded up on their way down,
    and stretching to `size` instead would shift what lies at the far end."""
    corners = None if mode == "nearest" else False
    return F.interpolate(x, scale_factor=factor, mode=mode, align_corners=corners)[..., :size[0], :size[1]]


class HRNet(nn.Module):
    """`forward(x)`: (B, in_chans, H, W), any H and W -> (B, num_classes); num_classes=0: the pooled features (2048).

    `features(x)` -> five maps with `channels` (64, 18, 36, 72, 144 for w18) at `strides` 2, 4, 8, 16, 32: the stem's
    first and the four branches. `num_classes=None` leaves out what `features` does not need: an encoder.
    timm computes the same where maps halve without a remainder (sides of the finest are multiples of 8), else it fails.
    Raises KeyError for another variant.
    """

    def __init__(self, variant="w18", in_chans=3, num_classes=1000, *, grad_checkpoint=False):
        super().__init__()
        modules, (depth, narrow), blocks, width = VARIANTS[variant]
        widths = [width * 2 ** i for i in range(4)]
        self.channels, self.strides = [64, *widths], [2, 4, 8, 16, 32]
        self.grad_checkpoint = grad_checkpoint
        self.conv1 = nn.Conv2d(in_chans, 64, 3, 2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, 64, 3, 2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        cin = 4 * narrow
        self.layer1 = nn.Sequential(Bottleneck(64, cin), *(Bottleneck(cin, cin) for _ in range(depth - 1)))
        # a transition adds the next coarser branch; the first one narrows the only branch, too
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

    def run(self, module, *maps):
        return recompute(module, *maps) if self.grad_checkpoint and self.training else module(*maps)

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
        """(B, 2048, h, w): what is averaged before the classifier."""
        first, *coarser = [self.run(layer, x) for layer, x in zip(self.incre_modules, self.features(x)[1:])]
        for down, x in zip(self.downsamp_modules, coarser):
            first = x + down(first)
        return self.final_layer(first)

    def forward(self, x):
        return self.classifier(self.last_map(x).mean((2, 3)))

    def fuse_(self):
        fuse_pair(self, ("conv1", "bn1"), ("conv2", "bn2"))
