"""The parts that every net here is made of."""
import contextlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint


def relu(x):
    """ReLU in place.

    bf16 without gradient on a CPU: the same bits as int16 are negative where the number is, and clamping
    those is four times as fast as torch's bf16 kernels (a quarter of the net's time in prediction). A NaN
    whose sign is set is negative as well.
    """
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and not (x.requires_grad or torch.compiler.is_compiling()):
        x.view(torch.int16).clamp_(min=0)
        return x
    return F.relu(x, inplace=True)


def silu(x):
    """x * sigmoid(x), in place where no gradient needs x."""
    return F.silu(x, inplace=not x.requires_grad)


class ConvNorm(nn.Module):
    """Convolution without bias -> batch norm -> activation (None: none); padding keeps H/stride, W/stride.

    The attributes are called `conv` and `bn` because that is what published state dicts call them.
    """

    def __init__(self, cin, cout, kernel=1, stride=1, groups=1, act=relu, eps=1e-5, momentum=0.1):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding=(kernel - 1) // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps, momentum)
        self.act = act

    def forward(self, x):
        x = self.bn(self.conv(x))
        return self.act(x) if self.act else x

    def fuse_(self):
        fuse_pair(self, ("conv", "bn"))


def init_fan_out(module):
    """Convolutions N(0, sqrt(2 / fan_out)) with fan_out = k*k*C_out/groups, as timm initialises its RegNets."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            fan_out = m.kernel_size[0] * m.kernel_size[1] * m.out_channels // m.groups
            nn.init.normal_(m.weight, 0.0, (2.0 / fan_out) ** 0.5)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def fuse(model):
    """Fold every batch norm into the convolution before it, in place, and return the model in eval mode.

    The result computes the same function up to rounding and about a third faster. For prediction only. A module with
    norms of its own says how: its method `fuse_()` changes it in place.
    """
    model.eval()
    for m in list(model.modules()):
        if hasattr(m, "fuse_"):
            m.fuse_()
    return model


def fuse_pair(module, *pairs):
    """Names (convolution, norm): the first takes in the second, in place. Fused before, or not there: nothing."""
    for conv, norm in pairs:
        if isinstance(getattr(module, norm, None), nn.BatchNorm2d):
            setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
            setattr(module, norm, nn.Identity())


@contextlib.contextmanager
def _keep_statistics(module):
    """Inside, batch norms update copies of their running statistics."""
    kept = [(m, dict(m.named_buffers())) for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m, buffers in kept:
        for name, buffer in buffers.items():
            setattr(m, name, buffer.clone())
    try:
        yield
    finally:
        for m, buffers in kept:
            for name, buffer in buffers.items():
                setattr(m, name, buffer)


def recompute(module, *inputs):
    """`module(*inputs)` without keeping its activations: every backward pass computes them again.

    Only the first forward pass updates the running statistics of batch norm; plain checkpointing would count each batch
    two times, or three times when a gradient penalty makes a second backward pass.
    """
    again = False

    def forward(*inputs):
        nonlocal again
        context = _keep_statistics(module) if again else contextlib.nullcontext()
        again = True
        with context:
            return module(*inputs)

    compiling = torch.compiler.is_compiling()  # compiled code updates no statistics when it computes them again
    return checkpoint(module if compiling else forward, *inputs, use_reentrant=False)
