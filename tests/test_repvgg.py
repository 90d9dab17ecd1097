"""nets/repvgg.py against timm, before and after the branches are added up, and as the encoder of a UNet."""
import copy

import pytest
import timm
import torch
from torch import nn

from nets import pretrained
from nets import NAMES as ENCODERS
from nets import make as make_encoder
from nets.blocks import fuse
from nets.repvgg import VARIANTS, Block, RepVGG
from nets.unet import UNet
from tests.test_efficientnet import bare, filled
from tests.test_nets import assert_equal, count, with_statistics, randn

# variant: parameters of the net that is trained, and of the one that predicts (in millions, table 4 of the paper)
PUBLISHED = {
    "a0": (9_108_968, 8.30), "a1": (14_092_264, 12.78), "a2": (28_210_600, 25.49), "b0": (15_817_960, 14.33),
    "b1": (57_415_016, 51.82), "b1g4": (39_966_056, 36.12), "b2": (89_022_376, 80.31), "b2g4": (61_758_376, 55.77),
    "b3": (123_085_288, 110.96), "b3g4": (83_825_128, 75.62),
}


def timms(variant, **options):
    """timm's net and ours with the same random weights, in the same memory."""
    theirs = filled(bare(lambda: timm.create_model(f"repvgg_{variant}", **options)))
    ours = bare(lambda: RepVGG(variant, **options))
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return ours, theirs


def convolutions(net):
    return [m for m in net.modules() if isinstance(m, nn.Conv2d)]


def test_small_kernels_take_every_second_pixel():
    """With stride 2 oneDNN writes beyond the stem's gradient. The tests below compare the results with timm's."""
    strides = {conv.kernel_size: {c.stride for c in convolutions(RepVGG("a0")) if c.kernel_size == conv.kernel_size}
               for conv in convolutions(RepVGG("a0"))}
    assert strides == {(3, 3): {(1, 1), (2, 2)}, (1, 1): {(1, 1)}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_names_and_groups(variant):
    ours, theirs = bare(lambda: RepVGG(variant)), bare(lambda: timm.create_model(f"repvgg_{variant}"))
    assert count(ours) == PUBLISHED[variant][0]
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == \
        [(k, v.shape) for k, v in theirs.state_dict().items()]
    assert ours.channels == [info["num_chs"] for info in theirs.feature_info] and ours.strides == [2, 4, 8, 16, 32]
    # one 3x3 convolution with bias per block remains
    plain = sum(m.weight.numel() + len(m.weight) for m in convolutions(ours) if m.kernel_size == (3, 3))
    plain += sum(p.numel() for p in ours.head.parameters())
    assert plain / 1e6 == pytest.approx(PUBLISHED[variant][1], abs=0.02)


@pytest.mark.parametrize("variant, size", [("a0", (64, 97)), ("a2", (33, 64)), ("b0", (1, 2)), ("b1g4", (34, 32))])
def test_logits_and_maps_are_timms(variant, size):
    ours, theirs = timms(variant, num_classes=7)
    x, expected = randn(2, 3, *size), []
    with torch.no_grad():
        ours.eval(), theirs.eval()
        expected.append(theirs.stem(x))
        for stage in theirs.stages:
            expected.append(stage(expected[-1]))
        for a, b, channels, stride in zip(ours.features(x), expected, ours.channels, ours.strides, strict=True):
            assert a.shape == (2, channels, -(-size[0] // stride), -(-size[1] // stride))
            assert_equal(a, b)
        assert_equal(ours(x), theirs(x))


def test_training_is_timms():
    """Logits, gradients and running statistics."""
    ours, theirs = timms("a0", in_chans=2, num_classes=7)
    ours, outputs = copy.deepcopy(ours), []
    for net in (ours, theirs):
        outputs.append(net.train()(randn(4, 2, 65, 64)))
        nn.functional.cross_entropy(outputs[-1], torch.tensor([1, 4, 6, 0])).backward()
    assert_equal(*(y.detach() for y in outputs), 1e-4)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        assert (a.grad - b.grad).abs().max() <= 1e-3 * b.grad.abs().max() + 1e-6, name
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers()):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), name
    assert ours.stages[2][13].identity.num_batches_tracked == 1


@pytest.mark.parametrize("options", [dict(cin=6, cout=6), dict(cin=6, cout=8), dict(cin=6, cout=6, stride=2),
                                     dict(cin=8, cout=8, groups=4)], ids=str)
def test_fused_block_is_the_sum_of_its_branches(options):
    """Equal up to float64's rounding, also at the borders, and equal to timm's reparameterize()."""
    block = with_statistics(Block(**options)).double().eval()
    if block.identity is not None:
        nn.init.uniform_(block.identity.weight, -1, 1)
    x = randn(2, options["cin"], 7, 8).double()
    with torch.no_grad():
        expected = block(x)
        fused = fuse(copy.deepcopy(block))
        assert_equal(fused(x), expected, 1e-14)
        assert_equal(fuse(fused)(x), expected, 1e-14)  # a second time changes nothing
    conv, = fused.children()
    assert conv.kernel_size == (3, 3) and conv.bias is not None and conv.weight.is_leaf
    theirs = timm.models.byobnet.RepVggBlock(options["cin"], options["cout"], stride=options.get("stride", 1),
                                             group_size=options["cin"] // options.get("groups", 1)).double()
    theirs.load_state_dict(block.state_dict())
    theirs.eval().reparameterize()
    assert torch.allclose(conv.weight, theirs.reparam_conv.weight, rtol=1e-12, atol=1e-15)
    assert torch.allclose(conv.bias, theirs.reparam_conv.bias, rtol=1e-12, atol=1e-15)


def test_fuse():
    net = filled(bare(lambda: RepVGG("a0", num_classes=5)))
    x = randn(2, 3, 33, 64)
    fused = fuse(copy.deepcopy(net))
    assert len(convolutions(fused)) == 22 and not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    with torch.no_grad():
        expected = net.eval()(x)
        assert_equal(fused(x), expected, 1e-5)
        assert_equal(fuse(net.double())(x.double()), expected.double(), 1e-5)
        assert_equal(fused.bfloat16()(x.bfloat16()).float(), expected, 0.1)


def test_checkpointing_changes_nothing_but_memory():
    """Loss, gradients and running statistics are bit-equal; every block runs twice."""
    plain, saving = with_statistics(RepVGG("a0", num_classes=5)), RepVGG("a0", num_classes=5, grad_checkpoint=True)
    saving.load_state_dict(plain.state_dict())
    runs = []
    saving.stages[2][3].register_forward_pre_hook(lambda *_: runs.append(1))
    losses = [net(randn(2, 3, 33, 48)).square().mean() for net in (plain, saving)]
    for loss in losses:
        loss.backward()
    assert losses[0] == losses[1] and len(runs) == 2
    for (name, a), b in zip(plain.named_parameters(), saving.parameters()):
        assert torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(plain.named_buffers(), saving.buffers()):
        assert torch.equal(a, b), name


def test_grey_gives_what_it_gave_as_rgb(tmp_path):
    """The stem has two convolutions; both are adapted, also in a UNet's encoder."""
    theirs = filled(bare(lambda: timm.create_model("repvgg_a0"))).eval()
    torch.save(theirs.state_dict(), tmp_path / "a0.pth")
    net, x = RepVGG("a0", 1).eval(), randn(1, 1, 64, 50)
    report = pretrained.load(net, str(tmp_path / "a0.pth"))
    stem = ["stem.conv_kxk.conv.weight", "stem.conv_1x1.conv.weight"]
    assert report == {"loaded": list(net.state_dict()), "adapted": stem, "unused": [], "missing": [], "sha256": None}
    with torch.no_grad():
        assert_equal(net(x), theirs(x.expand(-1, 3, -1, -1)))
    unet = UNet("repvgg_a0", in_chans=10, conv0=(), decoder=(8, 8, 8, 8))
    report = pretrained.load(unet, str(tmp_path / "a0.pth"))
    assert report["adapted"] == ["encoder." + name for name in stem]
    assert report["unused"] == ["head.fc.weight", "head.fc.bias"]
    assert all(name.startswith(("decoder.", "head.")) for name in report["missing"])


def test_pooled_features():
    net = RepVGG("a0", num_classes=0).eval()
    with torch.no_grad():
        assert_equal(net(randn(2, 3, 64, 64)), net.features(randn(2, 3, 64, 64))[-1].mean((2, 3)))


def test_encoders_by_name():
    nets = {name: bare(lambda: make_encoder(name, 4)) for name in ENCODERS if name.startswith("repvgg")}
    assert list(nets) == [f"repvgg_{v}" for v in VARIANTS]
    for name, net in nets.items():
        assert net.channels[1:] == list(VARIANTS[name.removeprefix("repvgg_")][1]) and not list(net.head.parameters())


def test_unet_of_any_input_size_and_fused():
    net = with_statistics(UNet("repvgg_a0", in_chans=4, classes=2, decoder=(8, 8, 8, 8))).eval()
    assert net.stride == 32 and net.coarse == 2
    fused = fuse(copy.deepcopy(net))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    with torch.no_grad():
        for size in ((1, 1), (2, 3), (33, 17), (64, 96)):
            y = net(randn(1, 4, *size))
            assert y.shape == (1, 2, *size) and y.isfinite().all()
            assert_equal(fused(randn(1, 4, *size)), y, 1e-4)


def test_every_parameter_of_an_encoder_gets_a_gradient():
    """Otherwise DDP waits forever."""
    net = UNet("repvgg_a0", in_chans=3, conv0=(), decoder=(8, 8, 8, 8))
    net(randn(2, 3, 64, 64)).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())
