"""UNet (Ronneberger et al. 2015) on a classification encoder, as it took 2nd place in AI SPARK 2024 (wildfire).

The defaults are that system: two 1x1 convolutions that let every pixel find its own scale, a RegNetX-200MF
whose stem keeps the full resolution, and a slim decoder. 14 input planes -> 1 logit: 3,307,409 parameters.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from nets import backbones
from nets.blocks import ConvNorm, recompute, relu
from nets.hrnet import HRNet, enlarge


class DecoderBlock(nn.Module):
    """Upsample to the skip's size (x2 when there is none), concatenate, two 3x3 convolutions."""

    def __init__(self, cin, skip, cout):
        super().__init__()
        self.conv1 = ConvNorm(cin + skip, cout, 3)
        self.conv2 = ConvNorm(cout, cout, 3)

    def forward(self, x, skip=None):
        # to the skip's exact size, not x2: an odd-sized map was rounded up on its way down
        size = skip.shape[2:] if skip is not None else [2 * s for s in x.shape[2:]]
        x = F.interpolate(x, size=size, mode="nearest")
        conv, n = self.conv1.conv, x.shape[1]
        y = F.conv2d(x, conv.weight[:, :n], conv.bias, padding=1)
        if skip is not None:  # conv1 of cat(x, skip), without writing that: a tenth of a training step's time
            y = y + F.conv2d(skip, conv.weight[:, n:], padding=1)
        return self.conv2(relu(self.conv1.bn(y)))


class Concatenation(nn.Module):
    """HRNetV2's decoder (Sun et al. 2019, arXiv 1904.04514): all maps enlarged (bilinear) to the finest's size and
    concatenated, a 1x1 convolution. `forward(*maps)`: fine to coarse, each twice as coarse as the one before."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = ConvNorm(sum(channels), sum(channels))

    def forward(self, *maps):
        # a 1x1 convolution may as well come before the enlargement: the same sum, in less than half the time
        conv = self.conv1.conv
        first, *others = conv.weight.split([x.shape[1] for x in maps], 1)
        y = F.conv2d(maps[0], first, conv.bias)
        for i, (x, weight) in enumerate(zip(maps[1:], others), 1):
            y = y + enlarge(F.conv2d(x, weight), 2 ** i, y.shape[2:], "bilinear")
        return relu(self.conv1.bn(y))


class UNet(nn.Module):
    """(B, in_chans, H, W) -> logits (B, classes, H, W), for any H and W of at least 1.

    `encoder`: of backbones.NAMES. `stem_stride`: of a RegNetX; the others have 2, so that their finest skip has half of
    the input's resolution, and the default decoder's logits are upsampled (a fifth block would reach the input's).
    `conv0`: widths of the 1x1 convolutions before the encoder; () leaves them out.
    `decoder`: width per block, coarse to fine; blocks beyond the encoder's skips only upsample. Where the
    last block is still coarser than the input, the logits are upsampled (bilinear).
    `decoder=()`: HRNetV2 when the encoder is an HRNet: its four branches concatenated (of another encoder all maps but
    the stem's), a 1x1 convolution as head, logits of the finest branch's resolution, upsampled.
    `presence`: a linear layer on the encoder's coarsest map also tells which classes are in the image at all. In
    training the output is then (logits, presence logits (B, classes)); else masks without objects come out empty: of
    one class, no pixel is surer to be of it than it is to be there; of several (the first is background, which always
    is there), those that are not get a logit of -30.
    Raises ValueError when the blocks would go beyond the input's resolution, or leave branches of an HRNet unused.
    """

    def __init__(self, encoder="regnetx_002", in_chans=14, classes=1, conv0=(32, 32), decoder=(128, 64, 48, 32),
                 presence=False, stem_stride=1, grad_checkpoint=False):
        super().__init__()
        self.conv0 = nn.ModuleList()
        for width in conv0:  # no norm: a batch statistic would mix the scales that these layers are to undo
            self.conv0.append(nn.Conv2d(in_chans, width, 1))
            in_chans = width
        self.encoder = backbones.make(encoder, in_chans, stem_stride=stem_stride, grad_checkpoint=grad_checkpoint)
        *skips, cin = self.encoder.channels
        self.decoder = nn.ModuleList()
        for width in decoder:
            self.decoder.append(DecoderBlock(cin, skips.pop() if skips else 0, width))
            cin = width
        kernel, self.coarse = 3, self.stride / 2 ** len(decoder)  # input pixels per logit, along each side
        if not decoder:
            kernel, self.coarse, cin = 1, self.encoder.strides[1], sum(self.encoder.channels[1:])
            self.decoder.append(Concatenation(self.encoder.channels[1:]))
        self.head = nn.Conv2d(cin, classes, kernel, padding=kernel // 2)
        if self.coarse < 1:
            raise ValueError(f"a decoder of {len(decoder)} blocks gives more pixels than the input has; "
                             f"give it at most {int(math.log2(self.stride))}")
        if isinstance(self.encoder, HRNet) and len(decoder) in (1, 2):  # without gradients there, DDP would fail
            raise ValueError(f"a decoder of {len(decoder)} blocks leaves {encoder}'s finer branches unused; "
                             f"give it at least 3, or none")
        self.presence = nn.Linear(self.encoder.channels[-1], classes) if presence else None
        self.grad_checkpoint = grad_checkpoint

    @property
    def stride(self):
        """Inputs whose sides are multiples of this come through without rounding."""
        return self.encoder.strides[-1]

    def forward(self, x):
        size = x.shape[2:]
        for conv in self.conv0:
            x = relu(conv(x))
        *skips, y = self.encoder.features(x)
        present = self.presence(y.mean((2, 3))) if self.presence else None
        for block in self.decoder:
            if isinstance(block, Concatenation):
                inputs = (*skips[1:], y)
            else:
                inputs = (y, skips.pop()) if skips else (y,)
            y = recompute(block, *inputs) if self.grad_checkpoint and self.training else block(*inputs)
        y = self.head(y)
        if self.coarse > 1:
            y = F.interpolate(y, scale_factor=self.coarse, mode="bilinear", align_corners=False)
        y = y[..., :size[0], :size[1]]  # odd sizes were rounded up on their way down
        if present is None or self.training:
            return y if present is None else (y, present)
        if y.shape[1] == 1:
            return torch.minimum(y, present[:, :, None, None])
        absent = (present < 0) & (torch.arange(y.shape[1], device=y.device) > 0)
        return y.masked_fill(absent[:, :, None, None], -30)


def probabilities(logits):
    """Logits (B, C, H, W) -> fp32 probabilities: sigmoid for one class, else softmax."""
    return logits.float().sigmoid() if logits.shape[1] == 1 else logits.float().softmax(1)
