"""RepVGG (Ding et al. 2021, "RepVGG: Making VGG-style ConvNets Great Again", arXiv 2101.03697).

A block has three branches in training and one 3x3 convolution in prediction: nets.blocks.fuse adds the branches up.
Tensor names are timm's, so that its weights (repvgg_a0 ... repvgg_b3g4) load by name.
"""
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from nets.blocks import Backbone, ConvNorm, Head, init_fan_out, relu, run

# blocks of the four stages after the stem's one (table 2 of the paper)
A, B = (2, 4, 14, 1), (4, 6, 16, 1)
VARIANTS = {  # blocks, widths of the stages, groups of every second convolution
    "a0": (A, (48, 96, 192, 1280), 1),
    "a1": (A, (64, 128, 256, 1280), 1),
    "a2": (A, (96, 192, 384, 1408), 1),
    "b0": (B, (64, 128, 256, 1280), 1),
    "b1": (B, (128, 256, 512, 2048), 1),
    "b1g4": (B, (128, 256, 512, 2048), 4),
    "b2": (B, (160, 320, 640, 2560), 1),
    "b2g4": (B, (160, 320, 640, 2560), 4),
    "b3": (B, (192, 384, 768, 2560), 1),
    "b3g4": (B, (192, 384, 768, 2560), 4),
}


class Block(nn.Module):
    """Three branches, 3x3, 1x1 and (where the shape stays) identity, each with its own batch norm; sum -> ReLU."""

    def __init__(self, cin, cout, stride=1, groups=1):
        super().__init__()
        self.identity = nn.BatchNorm2d(cout) if stride == 1 and cin == cout else None
        self.conv_kxk = ConvNorm(cin, cout, 3, stride, groups, act=None)
        # stride 1 on every second pixel in place of stride 2: with fewer than 16 input channels, as in the stem, oneDNN
        # writes beyond the gradient of such weights and may crash (torch 2.14, a CPU with AVX512 and bf16)
        self.conv_1x1 = ConvNorm(cin, cout, 1, 1, groups, act=None)
        self.stride = stride
        self.reparam_conv = None

    def forward(self, x):
        if self.reparam_conv is not None:
            return relu(self.reparam_conv(x))
        y = self.conv_kxk(x) + self.conv_1x1(x[:, :, ::self.stride, ::self.stride])
        return relu(y if self.identity is None else y + self.identity(x))

    @torch.no_grad()
    def fuse_(self):
        """Replaces the branches by one convolution: all are linear, and smaller kernels are 3x3 kernels with zeros.

        The sum is computed in float64 because branches may nearly cancel each other.
        """
        if self.reparam_conv is not None:
            return
        dtype = self.conv_kxk.conv.weight.dtype
        self.double()  # in place, as the branches are deleted below
        for branch in (self.conv_kxk, self.conv_1x1):
            branch.fuse_()
        conv, small, norm = self.conv_kxk.conv, self.conv_1x1.conv, self.identity
        branches = [(F.pad(small.weight, (1, 1, 1, 1)), small.bias)]
        if norm is not None:
            kernel = nn.init.dirac_(torch.empty_like(conv.weight), conv.groups)
            branches.append(fuse_conv_bn_weights(kernel, None, norm.running_mean, norm.running_var, norm.eps,
                                                 norm.weight, norm.bias))
        for weight, bias in branches:
            conv.weight += weight
            conv.bias += bias
        self.reparam_conv = conv.to(dtype)
        del self.identity, self.conv_kxk, self.conv_1x1


class RepVGG(Backbone):
    """`forward(x)`: (B, in_chans, H, W), any H and W -> (B, num_classes); num_classes=0 or None: the pooled features.

    `features(x)` -> five maps with `channels` (64, 96, 192, 384, 1408 for A2) at `strides` 2, 4, 8, 16, 32.
    Weights start as `init_fan_out` and `Head`, batch norms as in the paper's code (1 and 0). grad_checkpoint: the blocks
    are recomputed in the backward pass. Raises KeyError for an unknown variant.
    """

    def __init__(self, variant="a2", in_chans=3, num_classes=1000, *, grad_checkpoint=False):
        depths, widths, groups = VARIANTS[variant]
        super().__init__([min(64, widths[0]), *widths], grad_checkpoint)
        self.stem = Block(in_chans, self.channels[0], 2)
        self.stages = nn.Sequential()
        for depth, cin, width in zip(depths, self.channels, widths):
            rest = (Block(width, width, groups=groups if i % 2 else 1) for i in range(1, depth))
            self.stages.append(nn.Sequential(Block(cin, width, 2), *rest))
        init_fan_out(self)
        self.head = Head(width, num_classes)

    def features(self, x):
        maps = [self.stem(x)]
        for stage in self.stages:
            x = maps[-1]
            for block in stage:
                x = run(self, block, x)
            maps.append(x)
        return maps
