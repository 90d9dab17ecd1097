"""Layers that the nets share, and the folding of batch norms into convolutions for prediction."""
import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint


def relu(x):
    """ReLU, in place.

    On a CPU, bf16 without gradient is clamped as int16: both have the same sign bit, and torch's bf16 kernel takes four
    times as long, a quarter of the net's time in prediction. A NaN with the sign bit set becomes 0.
    """
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and not (x.requires_grad or torch.compiler.is_compiling()):
        x.view(torch.int16).clamp_(min=0)
        return x
    return F.relu(x, inplace=True)


def silu(x):
    """x * sigmoid(x), in place where no gradient needs x."""
    return F.silu(x, inplace=not x.requires_grad)


def conv2d(cin, cout, kernel=1, stride=1, groups=1, bias=False):
    """A convolution whose padding keeps H / stride and W / stride."""
    return nn.Conv2d(cin, cout, kernel, stride, padding=(kernel - 1) // 2, groups=groups, bias=bias)


def fuse(model):
    """Folds every batch norm into the convolution before it, in place, and returns the model in eval mode.

    The fused model computes the same function up to rounding, about a third faster. It is for prediction only. A module
    that owns batch norms takes part by a method `fuse_()`, which changes the module in place.
    """
    model.eval()
    for m in list(model.modules()):
        if hasattr(m, "fuse_"):
            m.fuse_()
    return model


def fold_norms(module):
    """Folds each nn.BatchNorm2d of a module into the nn.Conv2d that was registered just before it, in place.

    For modules that apply their layers in the order of registration: `fuse_ = fold_norms`.
    """
    children = list(module.named_children())
    for (conv_name, conv), (norm_name, norm) in zip(children, children[1:]):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
            setattr(module, norm_name, nn.Identity())


class ConvNorm(nn.Module):
    """Convolution -> batch norm -> activation (None: no activation); see `conv2d`. The attributes of the two layers are
    called by the `names` that published state dicts use."""

    fuse_ = fold_norms
    names = "conv", "bn"

    def __init__(self, cin, cout, kernel=1, stride=1, groups=1, act=relu, eps=1e-5, momentum=0.1, bias=False):
        super().__init__()
        self.add_module(self.names[0], conv2d(cin, cout, kernel, stride, groups, bias))
        self.add_module(self.names[1], nn.BatchNorm2d(cout, eps, momentum))
        self.act = act

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return self.act(x) if self.act else x


class Head(nn.Module):
    """Maps (B, cin, H, W) -> logits (B, num_classes): global average pooling, a linear layer. num_classes 0 or None:
    only the pooling. Weights start as timm's RegNets and RepVGGs, N(0, 0.01), biases 0."""

    def __init__(self, cin, num_classes):
        super().__init__()
        self.fc = nn.Linear(cin, num_classes) if num_classes else nn.Identity()
        init_layers(functools.partial(nn.init.normal_, std=0.01), self.fc)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


class Backbone(nn.Module):
    """A classifier that can also be the encoder of another net.

    Subclasses set `head`, and define `features(x)`: (B, in_chans, H, W) -> a list of maps, fine to coarse, with these
    channels and with strides of which each is twice the one before.
    """

    def __init__(self, channels, grad_checkpoint, stem_stride=2):
        super().__init__()
        self.channels, self.grad_checkpoint = channels, grad_checkpoint
        self.strides = [stem_stride * 2 ** i for i in range(len(channels))]

    def forward(self, x):
        return self.head(self.features(x)[-1])


def init_layers(function, *modules):
    """Initialises all convolutions and linear layers: function(weight), biases 0. With nn.init.kaiming_uniform_ weights
    are U(-sqrt(6 / fan_in), sqrt(6 / fan_in)), as ReLU needs it (He et al. 2015, arXiv 1502.01852; with the `a` of
    torch's layers the variance would be a sixth of that), with nn.init.xavier_uniform_
    U(-sqrt(6 / (fan_in + fan_out)), ...) (Glorot and Bengio 2010)."""
    for m in (m for module in modules for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))):
        function(m.weight)
        if m.bias is not None:
            nn.init.zeros_(m.bias)


def init_fan_out(module):
    """Initialises all convolutions as timm's classifiers (He et al. 2015): weights N(0, sqrt(2 / fan_out)) with
    fan_out = k * k * C_out / groups, biases 0."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            fan_out = m.weight[:, 0].numel() // m.groups
            init_layers(functools.partial(nn.init.normal_, std=(2.0 / fan_out) ** 0.5), m)


def run(net, module, *inputs):
    """`module(*inputs)`, a part of the net; with net.grad_checkpoint, the backward pass computes its activations again.
    """
    return recompute(module, *inputs) if net.grad_checkpoint and net.training else module(*inputs)


def recompute(module, *inputs):
    """`module(*inputs)` without keeping its activations: every backward pass computes them again.

    Only the first forward pass updates the running statistics of batch norms, later ones update copies. Plain
    checkpointing would count each batch two times, or three times when a gradient penalty makes a second backward pass.
    """
    again = False

    def forward(*inputs):
        nonlocal again
        copies = {name: buffer.clone() for name, buffer in module.named_buffers()} if again else {}
        again = True
        return functional_call(module, copies, inputs, tie_weights=False)

    compiling = torch.compiler.is_compiling()  # compiled code updates no statistics when it computes them again
    return checkpoint(module if compiling else forward, *inputs, use_reentrant=False)
