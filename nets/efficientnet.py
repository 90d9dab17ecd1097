"""EfficientNetV2 (Tan and Le 2021, "EfficientNetV2: Smaller Models and Faster Training", arXiv 2104.00298).

Tensor names are timm's. Published weights were trained with one of two paddings of the convolutions with stride 2. The
paddings differ for even sides, that is almost always:
  padding="same"       TensorFlow's: one row below and one column to the right. timm's tf_efficientnetv2_*
  padding="symmetric"  PyTorch's: one row and one column on all four sides. torchvision's efficientnet_v2_*
nets.pretrained.EXPECTS lists the padding of every published file, and the mean and standard deviation of its images.
"""
import functools

import torch
import torch.nn.functional as F
from torch import nn

from nets.blocks import Backbone, conv2d, fold_norms, init_fan_out, run, silu

norm = functools.partial(nn.BatchNorm2d, eps=1e-3)  # as in the TensorFlow implementation


class SameConv(nn.Conv2d):
    """3x3, stride 2, with TensorFlow's padding: 1 at both ends of an odd side, 1 at the far end of an even side."""

    def forward(self, x):
        height, width = x.shape[2:]
        x = F.pad(x, (width % 2, 1, height % 2, 1))
        return F.conv2d(x, self.weight, self.bias, self.stride, groups=self.groups)


class DepthwiseConv(nn.Conv2d):
    """3x3, stride 1, one filter per channel. Maps smaller than 3x3 are padded to 3x3 for the backward pass on a CPU:
    oneDNN has none for maps smaller than the kernel, and torch's own is 30 times as slow (a quarter to 40 % of a
    training step with 64 pixels)."""

    def forward(self, x):
        height, width = x.shape[2:]
        if min(height, width) > 2 or not x.requires_grad or x.device.type != "cpu":
            return super().forward(x)
        x = super().forward(F.pad(x, (0, max(3 - width, 0), 0, max(3 - height, 0))))[:, :, :height, :width]
        return x.contiguous(memory_format=torch.channels_last)  # batch norm is slow on a slice


def conv3x3(cin, cout, stride=1, *, groups=1, same=True):
    """A 3x3 convolution without bias. same: TensorFlow's padding; with stride 1 both paddings are equal."""
    kind = SameConv if same and stride == 2 else DepthwiseConv if stride == 1 and groups > 1 else nn.Conv2d
    return kind(cin, cout, 3, stride, padding=1, groups=groups, bias=False)


class Block(nn.Module):
    """Adds the input to `body(x)` where the shape stays; in training whole samples of the body are dropped (stochastic
    depth, Huang et al. 2016). Subclasses make their layers in `add_layers`, with `inner` channels between the first and
    the last convolution."""

    fuse_ = fold_norms

    def __init__(self, cin, cout, expansion, stride, drop, same):
        super().__init__()
        self.residual = stride == 1 and cin == cout
        self.drop = drop
        self.add_layers(cin, cin * expansion, cout, stride, same)

    def forward(self, x):
        from torchvision.ops import stochastic_depth  # here, as its import takes as long as torch's

        y = self.body(x)
        return x + stochastic_depth(y, self.drop, "row", self.training) if self.residual else y


class ConvBnAct(Block):
    """One 3x3 (expansion 1): the only block with an activation before the sum."""

    def add_layers(self, cin, inner, cout, stride, same):
        self.conv = conv3x3(cin, cout, stride, same=same)
        self.bn1 = norm(cout)

    def body(self, x):
        return silu(self.bn1(self.conv(x)))


class FusedMBConv(Block):
    """Expanding 3x3 -> 1x1: faster than MBConv where maps are large and have few channels (section 3.2)."""

    def add_layers(self, cin, inner, cout, stride, same):
        self.conv_exp = conv3x3(cin, inner, stride, same=same)
        self.bn1 = norm(inner)
        self.conv_pwl = conv2d(inner, cout)
        self.bn2 = norm(cout)

    def body(self, x):
        return self.bn2(self.conv_pwl(silu(self.bn1(self.conv_exp(x)))))


class SqueezeExcite(nn.Module):
    """Multiplies every channel by a gate in (0, 1), computed from the means of all channels (Hu et al. 2018)."""

    def __init__(self, channels, width):
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, width, 1)
        self.conv_expand = nn.Conv2d(width, channels, 1)

    def forward(self, x):
        return x * self.conv_expand(silu(self.conv_reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


class MBConv(Block):
    """Expanding 1x1 -> depthwise 3x3 -> squeeze and excite -> 1x1 (the block of MobileNetV2 and MnasNet)."""

    def add_layers(self, cin, inner, cout, stride, same):
        self.conv_pw = conv2d(cin, inner)
        self.bn1 = norm(inner)
        self.conv_dw = conv3x3(inner, inner, stride, groups=inner, same=same)
        self.bn2 = norm(inner)
        self.se = SqueezeExcite(inner, cin // 4)
        self.conv_pwl = conv2d(inner, cout)
        self.bn3 = norm(cout)

    def body(self, x):
        x = silu(self.bn1(self.conv_pw(x)))
        x = self.se(silu(self.bn2(self.conv_dw(x))))
        return self.bn3(self.conv_pwl(x))


# block, expansion and stride of the stages, the same in every variant (only M and L have the seventh stage)
STAGES = ((ConvBnAct, 1, 1), (FusedMBConv, 4, 2), (FusedMBConv, 4, 2), (MBConv, 4, 2), (MBConv, 6, 1), (MBConv, 6, 2),
          (MBConv, 6, 1))
VARIANTS = {  # width of the stem, width of the last 1x1, then (blocks, width) of every stage
    "s": (24, 1280, (2, 24), (4, 48), (4, 64), (6, 128), (9, 160), (15, 256)),
    "m": (24, 1280, (3, 24), (5, 48), (5, 80), (7, 160), (14, 176), (18, 304), (5, 512)),
    "l": (32, 1280, (4, 32), (7, 64), (7, 96), (10, 192), (19, 224), (25, 384), (7, 640)),
    "b0": (32, 1280, (1, 16), (2, 32), (2, 48), (3, 96), (5, 112), (8, 192)),
    "b1": (32, 1280, (2, 16), (3, 32), (3, 48), (4, 96), (6, 112), (9, 192)),
    "b2": (32, 1408, (2, 16), (3, 32), (3, 56), (4, 104), (6, 120), (10, 208)),
    "b3": (40, 1536, (2, 16), (3, 40), (3, 56), (5, 112), (7, 136), (12, 232)),
}


class EfficientNetV2(Backbone):
    """`forward(x)`: (B, in_chans, H, W), any H and W -> (B, num_classes); num_classes=0: the pooled features.

    `features(x)` -> five maps with `channels` (24, 48, 64, 160, 256 for S) at `strides` 2, 4, 8, 16, 32.
    `num_classes=None`: an encoder, without the layers that `features` does not need (the last 1x1 convolution, the
    classifier). drop_rate: dropout before the classifier (the paper: S 0.2, M 0.3, L 0.4 on ImageNet). drop_path_rate:
    stochastic depth; the rate of a block grows linearly from 0 at the first block to nearly this value at the last (the
    paper: 0.2). grad_checkpoint: the blocks are recomputed in the backward pass.
    Weights start as timm's: `init_fan_out`, the classifier as U(-1 / sqrt(num_classes), ...).
    Raises KeyError for an unknown variant, ValueError for an unknown padding.
    """

    fuse_ = fold_norms

    def __init__(self, variant="s", in_chans=3, num_classes=1000, *, drop_rate=0.0, drop_path_rate=0.0,
                 padding="same", grad_checkpoint=False):
        if padding not in ("same", "symmetric"):
            raise ValueError(f"unknown padding {padding!r}; choose same or symmetric")
        stem, head, *stages = VARIANTS[variant]
        # a map is the last one of its resolution
        super().__init__([stages[i][1] for i in (0, 1, 2, 4, -1)], grad_checkpoint)
        self.padding, self.drop_rate = padding, drop_rate
        same, total = padding == "same", sum(depth for depth, _ in stages)
        self.conv_stem = conv3x3(in_chans, stem, 2, same=same)
        self.bn1 = norm(stem)
        self.blocks, cin, index = nn.Sequential(), stem, 0
        for (block, expansion, first_stride), (depth, width) in zip(STAGES, stages):
            stage = nn.Sequential()
            for stride in (first_stride, *[1] * (depth - 1)):
                stage.append(block(cin, width, expansion, stride, drop_path_rate * index / total, same))
                cin, index = width, index + 1
            self.blocks.append(stage)
        if num_classes is not None:
            self.conv_head = conv2d(cin, head)
            self.bn2 = norm(head)
            self.classifier = nn.Linear(head, num_classes) if num_classes else nn.Identity()
        init_fan_out(self)
        if num_classes:
            nn.init.uniform_(self.classifier.weight, -num_classes ** -0.5, num_classes ** -0.5)
            nn.init.zeros_(self.classifier.bias)

    def features(self, x):
        x, maps = silu(self.bn1(self.conv_stem(x))), []
        for stage, (_, _, stride) in zip(self.blocks, STAGES):
            if stride == 2:
                maps.append(x)
            for block in stage:  # recomputed one by one: maps inside a block are up to six times as wide as its output
                x = run(self, block, x)
        return maps + [x]

    def forward(self, x):
        x = silu(self.bn2(self.conv_head(self.features(x)[-1]))).mean((2, 3))
        return self.classifier(F.dropout(x, self.drop_rate, self.training))
