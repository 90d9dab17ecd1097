"""How every layer of every net starts: the deviation of its weights is smp's, timm's and the paper's formula's."""
import math

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from torch import nn

from nets import make
from nets.unet import UNet


def assert_starts_as(ours, theirs, name):
    """The same deviation and mean, both within 6 sigma of chance; constants are equal."""
    a, b = ours.detach().double(), theirs.detach().double()
    assert a.shape == b.shape, name
    if b.numel() > 1 and b.std() > 0:
        chance = 6 * math.sqrt(1 / a.numel())
        assert a.std() / b.std() == pytest.approx(1, abs=max(chance, 0.02)), name
        assert abs(a.mean() - b.mean()) < chance * b.std() * 2, name
    else:
        assert torch.equal(a, b), name


def renamed(name):
    """smp's name of a tensor -> ours."""
    name = name.replace("encoder.model.", "encoder.").replace("decoder.blocks.", "decoder.")
    name = name.replace("segmentation_head.0.", "head.").replace("classification_head.3.", "aux_cls.")
    for k in (1, 2):
        name = name.replace(f".conv{k}.0.", f".conv{k}.conv.").replace(f".conv{k}.1.", f".conv{k}.bn.") \
            if name.startswith("decoder.") else name
    return name


def test_a_unet_starts_as_smps():
    torch.manual_seed(0)
    theirs = smp.Unet("tu-regnetx_002", encoder_weights=None, in_channels=3, classes=11, aux_params={"classes": 11})
    ours = UNet(in_chans=3, classes=11, conv0=(), stem_stride=2, decoder=(256, 128, 64, 32, 16), aux_cls=True)
    wanted = {renamed(name): tensor for name, tensor in theirs.state_dict().items()}
    found = ours.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert_starts_as(tensor, wanted[name], name)


@pytest.mark.parametrize("options", [{}, {"encoder": "hrnet_w18_small", "decoder": ()},
                                     {"encoder": "efficientnetv2_b0"}], ids=str)
def test_decoders_and_heads_follow_the_papers(options):
    """Uniform: He et al. 2015 with fan-in and ReLU's gain before ReLU, Glorot and Bengio 2010 before the logits."""
    torch.manual_seed(0)
    net = UNet(aux_cls=True, **options)
    before_relu = [m for part in (net.conv0, net.decoder) for m in part.modules() if isinstance(m, nn.Conv2d)]
    assert len(before_relu) >= 3
    for m in (*before_relu, net.head, net.aux_cls):
        m.requires_grad_(False)
        fan_in, fan_out = m.weight[0].numel(), m.weight[:, 0].numel()
        bound = math.sqrt(6 / fan_in if m in before_relu else 6 / (fan_in + fan_out))
        assert 0.9 * bound < m.weight.abs().max() <= bound
        assert m.weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.02 + 3 / math.sqrt(m.weight.numel()))
        assert m.bias is None or not m.bias.any()


def test_the_signal_keeps_its_size_on_the_way_through_the_decoder():
    """Without norms, as the formula has it: the mean square of what a block gives is about that of its input."""
    torch.manual_seed(0)
    net = UNet(in_chans=3)
    x = torch.randn(2, 64, 64, 64)
    for conv in (net.decoder[1].conv2.conv, net.decoder[2].conv2.conv):
        before = x[:, :conv.in_channels].relu()
        with torch.no_grad():
            x = conv(before)
        assert x.relu().square().mean() / before.square().mean() == pytest.approx(1, rel=0.25)  # 1/6 with torch's


@pytest.mark.parametrize("name, theirs", [
    ("regnetx_002", "regnetx_002"), ("efficientnetv2_b0", "tf_efficientnetv2_b0"), ("repvgg_a0", "repvgg_a0"),
    ("hrnet_w18_small", "hrnet_w18_small")])
def test_a_classifier_starts_as_timms(name, theirs):
    torch.manual_seed(0)
    ours = make(name, num_classes=17).state_dict()
    theirs = timm.create_model(theirs, num_classes=17).state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        # biases before batch norms do nothing: HRNet's are torch's in timm, and 0 here. timm also draws RepVGG's batch
        # norms at random, in the paper's code they start as torch's
        if not (name.startswith("hrnet") and key.endswith("bias") and not tensor.any()
                or name.startswith("repvgg") and ".bn." in key or ".identity." in key):
            assert_starts_as(tensor, theirs[key], key)
