"""nets/hrnet.py against timm and against its formulas; as the encoder of a UNet, and as HRNetV2 (decoder=())."""
import copy
import math

import numpy as np
import pytest
import timm
import torch
from torch import nn

from nets import pretrained
from nets import NAMES as ENCODERS
from nets import make as make_encoder
from nets.blocks import fuse
from nets.hrnet import VARIANTS, HighResolutionModule, HRNet, enlarge
from nets.unet import Concatenation, UNet
from tests.test_efficientnet import bare, filled
from tests.test_nets import assert_equal, count, with_statistics, randn

# variant: parameters with 1000 classes (timm's results table has them in millions); without the classifier
PUBLISHED = {
    "w18_small": (13_187_464, 1_477_920), "w18_small_v2": (15_597_464, 3_860_720), "w18": (21_299_004, 9_562_260),
    "w30": (37_712_220, 25_812_276), "w32": (41_232_680, 29_305_536), "w40": (57_557_160, 45_521_216),
    "w44": (67_064_984, 54_974_640), "w48": (77_469_864, 65_325_120), "w64": (128_059_944, 115_697_600),
}
CLASSIFIER = ("incre_modules.", "downsamp_modules.", "final_layer.", "classifier.")
SMALL = "hrnet_w18_small"


def timms(variant, **options):
    """timm's net and ours with the same random weights, in the same memory."""
    theirs = filled(bare(lambda: timm.create_model(f"hrnet_{variant}", **options)))
    ours = bare(lambda: HRNet(variant, **options))
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return ours, theirs


def stretched(x, factor, size):
    """Bilinear, in float64: pixel i lies at (i + 1/2) / factor - 1/2 of x, (B, C, h, w) -> (B, C, *size)."""
    for axis, n in zip("hw", size):
        length = x.shape["bchw".index(axis)]
        at = (np.arange(n) + 0.5) / factor - 0.5
        weights = torch.from_numpy(np.stack([np.interp(at, np.arange(length), row) for row in np.eye(length)]))
        x = torch.einsum("bchw,hn->bcnw" if axis == "h" else "bchw,wn->bchn", x, weights)
    return x


# ---- the published nets ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters(variant):
    net = bare(lambda: HRNet(variant))
    alone = sum(p.numel() for name, p in net.named_parameters() if not name.startswith(CLASSIFIER))
    assert (count(net), alone) == PUBLISHED[variant] and f"hrnet_{variant}" in ENCODERS


@pytest.mark.parametrize("variant", ["w18", "w64"])
def test_names_are_timms(variant):
    ours, theirs = bare(lambda: HRNet(variant)), bare(lambda: timm.create_model(f"hrnet_{variant}"))
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == \
        [(k, v.shape) for k, v in theirs.state_dict().items()]


# 61 and 93: the sides of the maps are 31, 16, 8, ... and 47, 24, 12, ...
@pytest.mark.parametrize("variant, sizes", [("w18_small", [(61, 93), (32, 160)]), ("w18_small_v2", [(29, 64)])])
def test_logits_and_maps_are_timms(variant, sizes):
    ours, theirs = timms(variant, num_classes=7)
    ours, theirs = ours.eval(), theirs.eval()
    maps = bare(lambda: timm.create_model(f"hrnet_{variant}", features_only=True, feature_location="")).eval()
    alone = bare(lambda: make_encoder(f"hrnet_{variant}")).state_dict()
    assert [(k, v.shape) for k, v in alone.items()] == [(k, v.shape) for k, v in maps.state_dict().items()]
    maps.load_state_dict({k: v for k, v in ours.state_dict().items() if k in alone}, assign=True)
    assert (ours.channels, ours.strides) == (maps.feature_info.channels(), maps.feature_info.reduction())
    with torch.no_grad():
        for size in sizes:
            x = randn(2, 3, *size)
            for a, b, channels, stride in zip(ours.features(x), maps(x), ours.channels, ours.strides, strict=True):
                assert a.shape == (2, channels, -(-size[0] // stride), -(-size[1] // stride))
                assert_equal(a, b)
            assert_equal(ours(x), theirs(x), 1e-4)


@pytest.mark.parametrize("bands", [1, 5])
def test_bands_and_pooled_features(bands):
    ours, theirs = timms("w18_small", in_chans=bands, num_classes=0)
    with torch.no_grad():
        y = ours.eval()(randn(2, bands, 64, 32))
        assert y.shape == (2, 2048)
        assert_equal(y, theirs.eval()(randn(2, bands, 64, 32)), 1e-4)


def test_training_is_timms():
    """Logits, gradients and running statistics."""
    ours, theirs = timms("w18_small", in_chans=2, num_classes=7)
    ours, outputs = copy.deepcopy(ours), []
    for net in (ours, theirs):
        outputs.append(net.train()(randn(4, 2, 61, 64)))
        nn.functional.cross_entropy(outputs[-1], torch.tensor([1, 4, 6, 0])).backward()
    assert_equal(*(y.detach() for y in outputs), 1e-4)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        if name.startswith(("downsamp", "final")) and name.endswith(".0.bias"):
            continue  # a batch norm cancels it: only rounding errors
        assert (a.grad - b.grad).abs().max() <= 1e-3 * b.grad.abs().max() + 1e-6, name
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers()):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), name
    assert ours.stage4[0].fuse_layers[3][0][2].get_submodule("1").num_batches_tracked == 1


def test_initialisation_is_timms():
    """The deviation of every convolution's weights is fan-out's and timm's within 5 sigma; equal batch norms."""
    torch.manual_seed(0)
    ours, theirs = HRNet("w18_small", num_classes=5), timm.create_model(SMALL, num_classes=5)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        if a.ndim == 4:
            std, chance = math.sqrt(2 / (a.shape[0] * a.shape[2] * a.shape[3])), 5 / math.sqrt(2 * a.numel())
            for w in (a, b):
                assert abs(w.std() / std - 1) < chance and abs(w.mean()) < 5 * std / math.sqrt(w.numel()), name
        elif name == "classifier.weight":
            assert float(a.std()) == pytest.approx(float(b.std()), rel=0.05)
        elif name.endswith(".0.bias"):
            assert not a.any()  # timm's are random; the following batch norm cancels them
        elif name != "classifier.bias":
            assert torch.equal(a, b), name


# ---- sizes that timm cannot compute ---------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(1, 1), (2, 9), (9, 5), (17, 3)], ids=str)
def test_enlarged_maps_lie_where_the_finer_ones_lie(size):
    """Pixel i of the finer map is in pixel i // factor of the coarser one."""
    for k in (1, 2, 3):
        x = randn(2, 3, *(-(-n // 2 ** k) for n in size)).double()
        rows, columns = (torch.arange(n) // 2 ** k for n in size)
        assert torch.equal(enlarge(x, 2 ** k, size, "nearest"), x[:, :, rows][..., columns])
        assert_equal(enlarge(x, 2 ** k, size, "bilinear"), stretched(x, 2 ** k, size), 1e-12)


def test_a_module_fuses_all_branches():
    """The formula in float64: branch i becomes relu(sum over j of fuse_layers[i][j](branch j)), on odd sizes."""
    net = with_statistics(HighResolutionModule((4, 6, 8), 1)).double().eval()
    maps = [randn(2, 4, 13, 9).double(), randn(2, 6, 7, 5).double(), randn(2, 8, 4, 3).double()]

    def convolve(x, layer, stride=1):
        conv, norm = layer.children()
        y = nn.functional.conv2d(x, conv.weight, stride=stride, padding=conv.weight.shape[-1] // 2)
        mean, spread = norm.running_mean[:, None, None], (norm.running_var + 1e-5).sqrt()[:, None, None]
        return (y - mean) / spread * norm.weight[:, None, None] + norm.bias[:, None, None]

    def up(x, factor, like):
        return x.repeat_interleave(factor, 2).repeat_interleave(factor, 3)[..., :like.shape[2], :like.shape[3]]

    with torch.no_grad():
        a, b, c = (branch(x) for branch, x in zip(net.branches, maps))
        to = net.fuse_layers
        expected = [a + up(convolve(b, to[0][1]), 2, a) + up(convolve(c, to[0][2]), 4, a),
                    convolve(a, to[1][0][0], 2) + b + up(convolve(c, to[1][2]), 2, b),
                    convolve(convolve(a, to[2][0][0], 2).relu(), to[2][0][1], 2) + convolve(b, to[2][1][0], 2) + c]
        for x, y in zip(net(*maps), expected, strict=True):
            assert_equal(x, y.relu(), 1e-12)
            assert (x == 0).any() and (x > 0).any()


def test_any_input_size():
    net = with_statistics(HRNet("w18_small", num_classes=5)).eval()
    for size in ((1, 1), (2, 3), (33, 17), (66, 100)):
        with torch.no_grad():
            maps, logits = net.features(randn(1, 3, *size)), net(randn(1, 3, *size))
        assert logits.shape == (1, 5) and logits.isfinite().all()
        assert [tuple(m.shape) for m in maps] == [(1, c, -(-size[0] // s), -(-size[1] // s))
                                                  for c, s in zip(net.channels, net.strides)]


# ---- weights --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """timm's w18_small and a file of its weights."""
    net = filled(bare(lambda: timm.create_model(SMALL))).eval()
    path = str(tmp_path_factory.mktemp("hrnet") / "w18_small.pth")
    torch.save(net.state_dict(), path)
    return net, path


def test_grey_gives_what_it_gave_as_rgb(published):
    theirs, path = published
    net, x = HRNet("w18_small", 1).eval(), randn(1, 1, 64, 32)
    assert pretrained.load(net, path) == {"loaded": list(net.state_dict()), "adapted": ["conv1.weight"],
                                          "unused": [], "missing": [], "sha256": None}
    with torch.no_grad():
        assert_equal(net(x), theirs(x.expand(-1, 3, -1, -1)), 1e-4)


@pytest.mark.parametrize("decoder", [(8, 8, 8, 8), ()])
def test_a_classifiers_weights_into_a_segmentation_net(decoder, published):
    theirs, path = published
    net = UNet(SMALL, in_chans=10, conv0=(), decoder=decoder)
    report = pretrained.load(net, path)
    assert report["adapted"] == ["encoder.conv1.weight"]
    assert report["unused"] == [name for name in theirs.state_dict() if name.startswith(CLASSIFIER)]
    assert all(name.startswith(("decoder.", "head.")) for name in report["missing"])
    source = theirs.state_dict()
    for name, tensor in net.encoder.state_dict().items():
        assert name == "conv1.weight" or torch.equal(tensor, source[name]), name


def test_other_classes_and_other_nets(published):
    theirs, path = published
    report = pretrained.load(HRNet("w18_small", 3, 5), path)
    assert report["unused"] == report["missing"] == ["classifier.weight", "classifier.bias"]
    for wrong in ("hrnet_w18_small_v2", "regnetx_002"):
        with pytest.raises(ValueError, match="no match"):
            pretrained.load(bare(lambda: make_encoder(wrong)), path)


def test_weights_of_ssld(tmp_path):
    """hrnet_w18_ssld and w48_ssld have no biases in the head: ours stay 0, and the logits are timm's."""
    theirs = filled(bare(lambda: timm.create_model(SMALL, num_classes=7, head_conv_bias=False))).eval()
    torch.save(theirs.state_dict(), tmp_path / "ssld.pth")
    net = HRNet("w18_small", num_classes=7).eval()
    report = pretrained.load(net, str(tmp_path / "ssld.pth"))
    assert report["missing"] == [*(f"downsamp_modules.{i}.0.bias" for i in range(3)), "final_layer.0.bias"]
    with torch.no_grad():
        assert_equal(net(randn(1, 3, 32, 64)), theirs(randn(1, 3, 32, 64)), 1e-4)


# ---- training and prediction ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("make", [lambda **o: HRNet("w18_small", num_classes=5, **o),
                                  lambda **o: UNet(SMALL, 3, 2, conv0=(), decoder=(), **o)], ids=["cls", "HRNetV2"])
def test_checkpointing_changes_nothing_but_memory(make):
    """Loss, gradients and running statistics are bit-equal; every module runs twice."""
    plain, saving = with_statistics(make()), make(grad_checkpoint=True)
    saving.load_state_dict(plain.state_dict())
    runs = []
    for name, module in saving.named_modules():
        if isinstance(module, HighResolutionModule) or name.endswith("layer1.0") or isinstance(module, Concatenation):
            module.register_forward_pre_hook(lambda *_, name=name: runs.append(name))
    losses = [net(randn(2, 3, 33, 48)).square().mean() for net in (plain, saving)]
    for loss in losses:
        loss.backward()
    assert losses[0] == losses[1] and len(set(runs)) >= 4 and all(runs.count(name) == 2 for name in runs)
    for (name, a), b in zip(plain.named_parameters(), saving.parameters()):
        assert torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(plain.named_buffers(), saving.buffers()):
        assert torch.equal(a, b), name


def test_fuse(published):
    net = HRNet("w18_small")
    net.load_state_dict(published[0].state_dict())
    x = randn(2, 3, 33, 64)
    fused = fuse(copy.deepcopy(net))
    assert not fused.training and not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    convolutions = [m for m in fused.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.bias is not None for m in convolutions)
    with torch.no_grad():
        expected = net.eval()(x)
        assert_equal(fused(x), expected, 1e-4)
        assert_equal(fuse(net.double())(x.double()), expected.double(), 1e-4)
        assert_equal(fused.bfloat16()(x.bfloat16()).float(), expected, 0.1)


# ---- segmentation ---------------------------------------------------------------------------------------------------

def test_encoders_by_name():
    assert [name for name in ENCODERS if name.startswith("hrnet")] == [f"hrnet_{v}" for v in VARIANTS]
    assert count(bare(lambda: make_encoder("hrnet_w32"))) == PUBLISHED["w32"][1]
    net = bare(lambda: make_encoder(SMALL, 4, num_classes=6, grad_checkpoint=True))
    assert (net.conv1.in_channels, net.classifier.out_features, net.grad_checkpoint) == (4, 6, True)


def concatenated(net, x):
    """HRNetV2's logits by the paper's order: the encoder's maps are enlarged, concatenated, then convolved."""
    maps, size = net.encoder.features(x)[1:], x.shape[2:]
    y = torch.cat([stretched(m, 2 ** i, maps[0].shape[2:]) for i, m in enumerate(maps)], 1)
    conv, bn = net.decoder[0].conv1.conv, net.decoder[0].conv1.bn
    y = bn(torch.einsum("oi,bihw->bohw", conv.weight[..., 0, 0], y)).clamp(min=0)
    assert (y == 0).any() and (y > 0).any()
    y = torch.einsum("oi,bihw->bohw", net.head.weight[..., 0, 0], y) + net.head.bias[:, None, None]
    return stretched(y, net.encoder.strides[1], size)


@pytest.mark.parametrize("encoder, options", [(SMALL, {}), ("regnetx_002", {}), ("regnetx_002", {"stem_stride": 2})])
def test_hrnetv2_is_the_papers(encoder, options):
    """In float64, for sizes that halve exactly and sizes that do not, with several encoders."""
    net = filled(bare(lambda: UNet(encoder, 3, 4, conv0=(), decoder=(), **options))).double().eval()
    channels = net.encoder.channels[1:]
    assert net.decoder[0].conv1.conv.weight.shape[:2] == (sum(channels), sum(channels)) and len(channels) == 4
    with torch.no_grad():
        for size in ((64, 32), (33, 50), (1, 70)):
            x = randn(1, 3, *size).double()
            y = net(x)
            assert y.shape == (1, 4, *size)
            assert_equal(y, concatenated(net, x), 1e-10)


@pytest.mark.parametrize("decoder, coarse", [((8, 8, 8, 8), 2), ((8, 8, 8), 4), ((), 4)], ids=str)
def test_segmentation_nets_of_any_input_size_and_fused(decoder, coarse):
    net = filled(bare(lambda: UNet(SMALL, in_chans=4, classes=2, decoder=decoder))).eval()
    assert net.stride == 32 and net.coarse == coarse
    fused = fuse(copy.deepcopy(net))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    with torch.no_grad():
        for size in ((1, 1), (2, 3), (1, 64), (33, 17), (31, 97), (64, 96)):
            y = net(randn(1, 4, *size))
            assert y.shape == (1, 2, *size) and y.isfinite().all()
            assert_equal(fused(randn(1, 4, *size)), y, 1e-4)


@pytest.mark.parametrize("decoder", [(8, 8, 8, 8), (8, 8, 8), ()], ids=str)
def test_every_parameter_gets_a_gradient(decoder):
    """Otherwise DDP fails in the second step."""
    net = UNet(SMALL, in_chans=5, classes=3, conv0=(8,), decoder=decoder)
    net(randn(2, 5, 64, 64)).square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


@pytest.mark.parametrize("blocks", [1, 2, 6])
def test_decoders_that_leave_branches_out(blocks):
    with pytest.raises(ValueError, match=f"decoder of {blocks} blocks .*give it at (least 3|most 5)"):
        bare(lambda: UNet(SMALL, decoder=(8,) * blocks))
