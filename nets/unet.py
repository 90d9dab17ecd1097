"""UNet (Ronneberger et al. 2015) on a classification encoder, as it took 2nd place in AI SPARK 2024 (wildfire).

The defaults are that system: two 1x1 convolutions that let every pixel find its own scale, a RegNetX-200MF
whose stem keeps the full resolution, and a slim decoder. 14 input planes -> 1 logit: 3,307,409 parameters.
"""
import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

import nets
from nets.blocks import ConvNorm, init_layers, relu, run
from nets.hrnet import HRNet, enlarge


def conv_parts(conv, maps, first=F.conv2d):
    """-> the summands of `conv(torch.cat(maps, 1))`, one per map (B, C, H, W), that of the first map by `first`.
    Without making the concatenation, a training step takes a tenth less."""
    weights = conv.weight.split([x.shape[1] for x in maps], 1)
    return [(F.conv2d if i else first)(x, weight, None if i else conv.bias, padding=conv.padding)
            for i, (x, weight) in enumerate(zip(maps, weights))]


def conv_enlarged(x, weight, bias, padding):
    """A 3x3 convolution of x (B, C, H, W) after it was enlarged to twice its size (nearest) -> (B, C_out, 2H, 2W).

    The enlarged map has every pixel four times. Instead of each copy times a weight, the pixel times the sum of these
    weights is taken: a transposed convolution with a 4x4 kernel. It gives the same up to rounding, with 4 in place of 9
    multiplications."""
    kernel = 4 * F.avg_pool2d(weight.transpose(0, 1).flip(2, 3), 2, 1, 1)  # sums of 2x2 weights; zeros beyond the edge
    return F.conv_transpose2d(x, kernel, bias, stride=2, padding=padding)


class DecoderBlock(nn.Module):
    """Upsample to twice the size (nearest), concatenate the skip, two 3x3 convolutions."""

    def __init__(self, cin, skip, cout):
        super().__init__()
        self.conv1 = ConvNorm(cin + skip, cout, 3)
        self.conv2 = ConvNorm(cout, cout, 3)

    def forward(self, x, *skips):
        y, *parts = conv_parts(self.conv1.conv, (x, *skips), conv_enlarged)
        for part in parts:  # the map below an odd-sized skip was rounded up: its twofold is cropped
            y = y[..., :part.shape[2], :part.shape[3]] + part
        return self.conv2(relu(self.conv1.bn(y)))


class Concatenation(nn.Module):
    """HRNetV2's decoder (Sun et al. 2019, arXiv 1904.04514): all maps enlarged (bilinear) to the finest's size and
    concatenated, a 1x1 convolution. `forward(*maps)`: fine to coarse, each twice as coarse as the one before."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = ConvNorm(sum(channels), sum(channels))

    def forward(self, *maps):
        # the 1x1 convolution comes before the upsampling: the same sum in less than half the time
        y, *others = conv_parts(self.conv1.conv, maps)
        for i, part in enumerate(others, 1):
            y = y + enlarge(part, 2 ** i, y.shape[2:], "bilinear")
        return relu(self.conv1.bn(y))


class UNet(nn.Module):
    """(B, in_chans, H, W) -> logits (B, classes, H, W), for any H and W of at least 1.

    `encoder`: a name of `nets.NAMES`, or "mine.Mine". `stem_stride`: stride of a RegNetX's stem. All other encoders
    have a stem of stride 2: their finest skip has half of the input's resolution.
    `conv0`: widths of the 1x1 convolutions before the encoder; () leaves them out.
    `decoder`: width of every block, coarse to fine; blocks beyond the encoder's skips only upsample. If the last block
    is coarser than the input, the logits are upsampled (bilinear). None: as many blocks as reach the input's resolution,
    those of the wildfire system where four do, else segmentation-models-pytorch's.
    `decoder=()`: the decoder of HRNetV2. All maps of the encoder but the stem's (the four branches of an HRNet) are
    concatenated, the head is a 1x1 convolution, and its logits are upsampled.
    `aux_cls`: an auxiliary head, a linear layer on the encoder's coarsest map, predicts which classes the image
    contains. In training the output is then (logits, class logits (B, classes)). In prediction it clears masks: with
    one class, pixel logits are capped by the image-level logit of the class; with several classes (class 0 is the
    background, which every image contains), the pixel logits of absent classes are set to -30.
    Weights start as in segmentation-models-pytorch: conv0 and the decoder as He et al. 2015, the head and aux_cls as
    Glorot and Bengio 2010, see `init_layers`; the encoder as its own docstring says.
    Raises ValueError when the blocks would go beyond the input's resolution, or leave branches of an HRNet unused.
    """

    def __init__(self, encoder="regnetx_002", in_chans=14, classes=1, conv0=(32, 32), decoder=None,
                 aux_cls=False, stem_stride=1, grad_checkpoint=False):
        super().__init__()
        widths = [in_chans, *conv0]  # no norm: batch statistics would mix the scales that these layers compensate
        self.conv0 = nn.ModuleList(nn.Conv2d(*pair, 1) for pair in itertools.pairwise(widths))
        options = {"stem_stride": stem_stride} if encoder.startswith("regnetx") else {}
        self.encoder = nets.make(encoder, widths[-1], grad_checkpoint=grad_checkpoint, **options)
        *skips, cin = self.encoder.channels
        blocks = int(math.log2(self.stride))
        if decoder is None:
            decoder = (128, 64, 48, 32)[-blocks:] if blocks < 5 else (256, 128, 64, 32, 16)
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
                             f"give it at most {blocks}")
        if isinstance(self.encoder, HRNet) and len(decoder) in (1, 2):  # DDP fails for parameters without gradients
            raise ValueError(f"a decoder of {len(decoder)} blocks leaves {encoder}'s finer branches unused; "
                             f"give it at least 3, or none")
        self.aux_cls = nn.Linear(self.encoder.channels[-1], classes) if aux_cls else None
        init_layers(nn.init.kaiming_uniform_, self.conv0, self.decoder)
        init_layers(nn.init.xavier_uniform_, self.head, *filter(None, [self.aux_cls]))
        self.grad_checkpoint = grad_checkpoint

    @property
    def stride(self):
        """The stride of the coarsest map: inputs whose sides are multiples of it need no cropping."""
        return self.encoder.strides[-1]

    def forward(self, x):
        for conv in self.conv0:
            x = relu(conv(x))
        *skips, y = self.encoder.features(x)
        present = self.aux_cls(y.mean((2, 3))) if self.aux_cls else None
        for block in self.decoder:
            if isinstance(block, Concatenation):
                inputs = (*skips[1:], y)
            else:
                inputs = (y, skips.pop()) if skips else (y,)
            y = run(self, block, *inputs)
        y = enlarge(self.head(y), self.coarse, x.shape[2:], "bilinear")
        if present is None:
            return y
        if self.training:
            return y, present
        if y.shape[1] == 1:
            return torch.minimum(y, present[:, :, None, None])
        absent = (present < 0) & (torch.arange(y.shape[1], device=y.device) > 0)
        return y.masked_fill(absent[:, :, None, None], -30)
