"""nets/regnet.py, unet.py and blocks.py against timm, segmentation-models-pytorch, and the paper's rule."""
import copy
import math
import re

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from torch import nn

from nets import make as make_encoder
from nets.blocks import ConvNorm, fuse, recompute, relu
from nets.regnet import VARIANTS, Block, RegNetX
from nets.unet import DecoderBlock, UNet
from utils.ops.decide import probabilities


def count(module):
    return sum(p.numel() for p in module.parameters())


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_statistics(net, seed=0):
    """Random batch norms, as after training: fresh ones (gamma 0, mean 0, variance 1) would hide wrong blocks."""
    g = torch.Generator().manual_seed(seed)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.3, 0.9, generator=g)
            nn.init.normal_(m.bias, 0, 0.2, generator=g)
            nn.init.normal_(m.running_mean, 0, 0.2, generator=g)
            nn.init.uniform_(m.running_var, 0.5, 1.5, generator=g)
    return net


def assert_equal(ours, theirs, tolerance=1e-5):
    """Equal up to `tolerance` of the largest value."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max(), (ours - theirs).abs().max()


# ---- RegNetX --------------------------------------------------------------------------------------------------------

# name: (w0, wa, wm, group width, depth), as timm (pycls) and, for _tv, torchvision give them
RULES = {
    "regnetx_002": (24, 36.44, 2.49, 8, 13), "regnetx_004": (24, 24.48, 2.54, 16, 22),
    "regnetx_004_tv": (24, 24.48, 2.54, 16, 22), "regnetx_006": (48, 36.97, 2.24, 24, 16),
    "regnetx_008": (56, 35.73, 2.28, 16, 16), "regnetx_016": (80, 34.01, 2.25, 24, 18),
    "regnetx_032": (88, 26.31, 2.25, 48, 25),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_follow_the_papers_linear_rule(name):
    """u_j = w0 + wa j; s_j = log_wm(u_j / w0), rounded; w_j = w0 wm^s_j, rounded to 8, then to whole groups."""
    w0, wa, wm, group, depth = RULES[name]
    powers = [round(math.log((w0 + wa * j) / w0, wm)) for j in range(depth)]
    widths = [round(w0 * wm ** s / 8) * 8 for s in powers]
    group = min(group, *widths)
    to_group = (lambda w: int(w / group + 0.5)) if name.endswith("_tv") else (lambda w: round(w / group))
    widths = [group * to_group(w) for w in widths]
    assert VARIANTS[name] == (group, *((w, widths.count(w)) for w in sorted(set(widths))))


def test_regnetx_200mf_parameters():
    assert count(RegNetX()) == 2_684_792
    assert count(RegNetX(num_classes=0)) == 2_315_792
    assert len(RegNetX().state_dict()) == 266
    assert count(RegNetX(num_classes=10)) == 2_315_792 + 3_690


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_timms(name):
    """Names in order; maps, logits and running statistics equal in train and eval mode, even and odd sizes."""
    theirs = with_statistics(timm.create_model(name))
    ours = RegNetX(variant=name)
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == \
        [(k, v.shape) for k, v in theirs.state_dict().items()]
    ours.load_state_dict(theirs.state_dict())
    for training, size in ((True, (97, 65)), (False, (97, 65)), (False, (64, 96))):
        x = randn(2, 3, *size)
        ours.train(training), theirs.train(training)
        expected, y = [], x
        with torch.no_grad():
            maps = ours.features(x)
            for part in (theirs.stem, theirs.s1, theirs.s2, theirs.s3, theirs.s4):
                y = part(y)
                expected.append(y)
            for a, b, channels, stride in zip(maps, expected, ours.channels, ours.strides, strict=True):
                assert_equal(a, b)
                assert a.shape == (2, channels, -(-size[0] // stride), -(-size[1] // stride))
            if not training:  # in training this would count the batch twice
                assert_equal(ours(x), theirs(x))
        for (k, a), b in zip(ours.named_buffers(), theirs.buffers()):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), k
    assert ours.s1.b1.conv1.bn.num_batches_tracked == 1
    assert ours.strides == [2, 4, 8, 16, 32]


def test_gradients_are_timms():
    theirs = with_statistics(timm.create_model("regnetx_002", num_classes=7))
    ours = RegNetX(num_classes=7)
    ours.load_state_dict(theirs.state_dict())
    x, target = randn(3, 3, 65, 97), torch.tensor([1, 4, 6])
    for net in (ours, theirs):
        nn.functional.cross_entropy(net(x), target).backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        assert (a.grad - b.grad).abs().max() <= 1e-4 * b.grad.abs().max() + 1e-7, name


def test_stem_stride_1_keeps_the_resolution():
    net = RegNetX(5, stem_stride=1, num_classes=0)
    maps = net.features(randn(2, 5, 33, 50))
    assert net.channels == [32, 24, 56, 152, 368] and net.strides == [1, 2, 4, 8, 16]
    assert [tuple(m.shape) for m in maps] == [(2, 32, 33, 50), (2, 24, 17, 25), (2, 56, 9, 13), (2, 152, 5, 7),
                                             (2, 368, 3, 4)]


def test_initialisation_is_timms():
    """The deviation of every convolution's weights is fan-out's and timm's within 5 sigma; the same gammas are 0."""
    torch.manual_seed(0)
    ours, theirs = RegNetX().state_dict(), timm.create_model("regnetx_002").state_dict()
    groups = {k + ".weight": m.groups for k, m in RegNetX().named_modules() if isinstance(m, nn.Conv2d)}
    for name, a in ours.items():
        b = theirs[name]
        if a.ndim == 4:
            std = math.sqrt(2 / (a.shape[0] * a.shape[2] * a.shape[3] / groups[name]))
            chance = 5 / math.sqrt(2 * a.numel())
            for w in (a, b):
                assert abs(w.std() / std - 1) < chance and abs(w.mean()) < 5 * std / math.sqrt(w.numel()), name
        elif a.ndim == 2:
            assert a.std() == pytest.approx(0.01, rel=0.02) and b.std() == pytest.approx(0.01, rel=0.02)
        else:
            assert torch.equal(a, b), name
    assert sum(m.conv3.bn.weight.abs().sum() for m in RegNetX().modules() if isinstance(m, Block)) == 0


# ---- UNet -----------------------------------------------------------------------------------------------------------

def test_wildfire_unet_parameters():
    net = UNet()
    assert count(net) == 3_307_409
    assert count(net.conv0) + count(net.encoder) == 2_325_680
    assert count(net.decoder) == 981_440 and count(net.head) == 289
    assert all(isinstance(m, nn.Conv2d) for m in net.conv0) and len(net.conv0) == 2  # no batch norms
    assert net.stride == 16 and UNet(stem_stride=2).stride == 32
    for options in ({"stem_stride": 2}, {"encoder": "efficientnetv2_b0"}, {"encoder": "repvgg_a0"}):
        assert UNet(**options).coarse == 1  # the default decoder reaches the input's resolution


def test_conv0_is_two_layers_on_every_pixel_by_itself():
    whole = with_statistics(UNet(in_chans=5, conv0=(6, 4))).eval()
    rest = UNet(in_chans=4, conv0=()).eval()
    rest.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith("conv0.")})
    x = y = randn(1, 5, 20, 17)
    with torch.no_grad():
        for conv in whole.conv0:
            y = (torch.einsum("oi,bihw->bohw", conv.weight[..., 0, 0], y) + conv.bias[:, None, None]).clamp(min=0)
        assert (y == 0).any() and (y > 0).any()
        assert_equal(whole(x), rest(y))


@pytest.mark.parametrize("training", [True, False])
def test_unet_is_smps_with_the_same_weights(training):
    theirs = with_statistics(smp.Unet("tu-regnetx_002", encoder_weights=None, in_channels=14, classes=3))
    ours = UNet(in_chans=14, classes=3, conv0=(), stem_stride=2, decoder=(256, 128, 64, 32, 16))
    renamed = {}
    for name, tensor in theirs.state_dict().items():
        name = name.replace("encoder.model.", "encoder.").replace("decoder.blocks.", "decoder.")
        name = name.replace("segmentation_head.0.", "head.")
        name = re.sub(r"(decoder\.\d\.conv\d)\.0\.", r"\1.conv.", name)
        name = re.sub(r"(decoder\.\d\.conv\d)\.1\.", r"\1.bn.", name)
        renamed[name] = tensor
    ours.load_state_dict(renamed)
    assert count(ours) == count(theirs)
    x = randn(2, 14, 64, 96)
    with torch.no_grad():
        assert_equal(ours.train(training)(x), theirs.train(training)(x))


def test_smps_parameter_count():
    assert count(UNet(conv0=(), stem_stride=2, decoder=(256, 128, 64, 32, 16))) == 4_784_065
    assert count(UNet(conv0=(), stem_stride=2)) == 4_784_065


@pytest.mark.parametrize("size", [(10, 8), (9, 7), None], ids=str)
def test_a_decoder_block_enlarges_concatenates_and_convolves(size):
    """Outputs and gradients, in float64; without a skip too. With an odd-sized skip the last two rows and columns are
    not compared: the block crops after the first convolution, not before it."""
    torch.manual_seed(0)
    block = DecoderBlock(5, 3 if size else 0, 4).double().eval()
    maps = [torch.randn(2, 5, 5, 4, dtype=torch.float64)]
    maps += [torch.randn(2, 3, *size, dtype=torch.float64)] if size else []
    height, width = size or (10, 8)
    inside = slice(None), slice(None), slice(height - 2 * (height % 2)), slice(width - 2 * (width % 2))

    def plain(x, *skips):
        x = torch.cat([F.interpolate(x, scale_factor=2)[..., :height, :width], *skips], 1)
        return block.conv2(relu(block.conv1.bn(block.conv1.conv(x))))

    results = []
    for forward in (block, plain):
        inputs = [x.clone().requires_grad_() for x in maps]
        y = forward(*inputs)
        assert y.shape == (2, 4, height, width)
        results.append((y[inside], *torch.autograd.grad(y[inside].square().sum(), (*inputs, *block.parameters()))))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


SIZES = [(1, 1), (1, 64), (64, 1), (2, 3), (17, 33), (65, 64), (64, 65), (31, 97)]


@pytest.mark.parametrize("options", [{}, {"stem_stride": 2}, {"stem_stride": 2, "decoder": (16,) * 5},
                                     {"decoder": (16, 16)}], ids=str)
def test_any_input_size_comes_back(options):
    net = UNet(in_chans=3, classes=4, **options).eval()
    with torch.no_grad():
        for size in SIZES:
            y = net(randn(1, 3, *size))
            assert y.shape == (1, 4, *size) and y.isfinite().all()


@pytest.mark.parametrize("options, factor", [({}, 1), ({"stem_stride": 2, "decoder": (16,) * 5}, 1),
                                             ({"stem_stride": 2}, 1), ({"decoder": (16, 16)}, 4),
                                             ({"stem_stride": 2, "decoder": (32, 16, 8, 8)}, 2)], ids=str)
def test_logits_lie_where_the_input_lies(options, factor):
    """Odd sizes are rounded up by the encoder: the surplus is cut off, the map is not squeezed."""
    net = UNet(in_chans=3, **options).eval()
    heads = []
    net.head.register_forward_hook(lambda module, inputs, output: heads.append(output))
    for size in SIZES:
        with torch.no_grad():
            y = net(randn(1, 3, *size))[0, 0].double().numpy()
        h = heads.pop()[0, 0].double().numpy()
        for axis, length in enumerate(size):  # logit i covers input pixels factor * i ... factor * (i + 1) - 1
            at = (np.arange(length) + 0.5) / factor - 0.5
            h = np.apply_along_axis(lambda line: np.interp(at, np.arange(len(line)), line), axis, h)
        assert np.allclose(y, h, rtol=1e-4, atol=1e-5 * abs(h).max())


def test_too_many_decoder_blocks_are_refused():
    with pytest.raises(ValueError, match="decoder"):
        UNet(decoder=(32,) * 5)  # twice the input's resolution


def test_unknown_encoder():
    with pytest.raises(ValueError, match="regnetx_002") as error:
        make_encoder("resnet50", 3)
    assert "resnet50" in str(error.value)


def test_probabilities():
    logits = randn(2, 1, 4, 5).bfloat16()
    p = probabilities(logits)
    assert p.dtype == torch.float32 and torch.allclose(p, 1 / (1 + torch.exp(-logits.float())))
    logits = randn(2, 3, 4, 5)
    assert torch.allclose(probabilities(logits), logits.exp() / logits.exp().sum(1, keepdim=True))


# ---- relu, recompute, fuse ------------------------------------------------------------------------------------------

def test_relu_of_every_bf16_number():
    x = torch.arange(-2 ** 15, 2 ** 15).short().view(torch.bfloat16)
    x = x[~x.isnan()]
    expected = torch.tensor([max(v, 0.) for v in x.tolist()])
    with torch.no_grad():
        assert torch.equal(relu(x.clone()).float(), expected)
        assert torch.equal(relu(x.clone()[None, :, None].transpose(0, 1))[:, 0, 0].float(), expected)
    leaf = torch.tensor([-2., -0., 3.], dtype=torch.bfloat16, requires_grad=True)
    relu(leaf * 1).sum().backward()
    assert leaf.grad.tolist() == [0, 0, 1]


def test_checkpointing_changes_nothing_but_memory():
    """Two steps: loss, gradients and running statistics are bit-equal; each stage and decoder block runs twice."""
    plain = with_statistics(UNet(in_chans=3, decoder=(16, 16, 16, 16)))
    saving = UNet(in_chans=3, decoder=(16, 16, 16, 16), grad_checkpoint=True)
    saving.load_state_dict(plain.state_dict())
    runs = []
    for name in ("encoder.s1", "encoder.s4", "decoder.0", "decoder.3"):
        saving.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: runs.append(name))
    for step in range(2):
        x, runs[:] = randn(2, 3, 33, 48, seed=step), []
        losses = [net(x).square().mean() for net in (plain, saving)]
        assert losses[0] == losses[1] and len(runs) == 4
        for loss in losses:
            loss.backward()
        assert sorted(runs) == sorted(2 * ["encoder.s1", "encoder.s4", "decoder.0", "decoder.3"])
    for (name, a), b in zip(plain.named_parameters(), saving.parameters()):
        assert torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(plain.named_buffers(), saving.named_buffers()):
        assert torch.equal(a, b[1]), name
    assert plain.encoder.s4.b7.conv1.bn.num_batches_tracked == 2
    runs.clear()
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), saving.eval()(x)) and len(runs) == 4


def test_a_regnet_without_a_head_pools():
    net, x = RegNetX(num_classes=0).eval(), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(net(x), net.features(x)[-1].mean((2, 3)))


@pytest.mark.slow
def test_checkpointing_compiles():
    plain = nn.Sequential(ConvNorm(3, 4, 3), ConvNorm(4, 4))
    saving, x = copy.deepcopy(plain), randn(2, 3, 8, 8)
    step = torch.compile(lambda x: recompute(saving, x).square().mean(), backend="aot_eager", fullgraph=True)
    step(x).backward()
    plain(x).square().mean().backward()
    for a, b in zip(saving.parameters(), plain.parameters()):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)
    for a, b in zip(saving.buffers(), plain.buffers()):
        assert torch.allclose(a, b)


def test_fuse():
    net = with_statistics(UNet(in_chans=3, classes=2)).train()
    x = randn(2, 3, 48, 65)
    fused = fuse(copy.deepcopy(net))
    assert not fused.training and not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    with torch.no_grad():
        expected = net.eval()(x)
        assert_equal(fused(x), expected, 1e-4)
        halved = fused.bfloat16()(x.bfloat16())
    assert halved.dtype == torch.bfloat16
    assert (probabilities(halved) - probabilities(expected)).abs().mean() < 0.01
    assert (halved - expected).std() < 0.05 * expected.std()
