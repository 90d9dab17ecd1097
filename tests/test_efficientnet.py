"""nets/efficientnet.py against timm and torchvision, and as the encoder of a UNet."""
import copy
import math
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn

import predict
import train_seg
from nets import pretrained
from nets import NAMES as ENCODERS
from nets import make as make_encoder
from nets.blocks import fuse
from nets.efficientnet import VARIANTS, Block, EfficientNetV2, SameConv
from nets.unet import UNet
from tests.conftest import TINY
from tests.test_nets import assert_equal, count, with_statistics, randn
from utils.train import checkpoint

# variant: parameters with 1000 classes; widths of the maps at strides 2, 4, 8, 16, 32 (published)
PUBLISHED = {
    "s": (21_458_488, [24, 48, 64, 160, 256]), "m": (54_139_356, [24, 48, 80, 176, 512]),
    "l": (118_515_272, [32, 64, 96, 224, 640]), "b0": (7_139_704, [16, 32, 48, 112, 192]),
    "b1": (8_141_052, [16, 32, 48, 112, 192]), "b2": (10_096_086, [16, 32, 56, 120, 208]),
    "b3": (14_358_406, [16, 40, 56, 136, 232]),
}


def bare(make):
    """The net of `make` on the meta device, without initialisation, which takes seconds for L even there."""
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        for name in ("normal_", "uniform_", "kaiming_uniform_", "kaiming_normal_", "trunc_normal_"):
            patch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)
        return make()


def filled(net):
    """A bare net with random weights of variance 1 / fan-in (100,003 numbers in turn) and fitting batch norms.

    With statistics of chance the signal would fade from block to block, and wrong blocks not show at the end.
    """
    net.to_empty(device="cpu")
    noise = 2 * torch.rand(100_003, generator=torch.Generator().manual_seed(0)) - 1
    for tensor in net.state_dict().values():
        fan_in = tensor[0].numel() if tensor.ndim > 1 else 100
        repeated = (noise * (3 / fan_in) ** 0.5).repeat(-(-tensor.numel() // len(noise)))
        tensor.copy_(repeated[:tensor.numel()].view(tensor.shape)) if tensor.ndim else tensor.zero_()
    norms = [m for m in with_statistics(net).modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        m.momentum = 0.9  # not 1: channels with almost no variance would explode on another image
    with torch.no_grad():
        net.train()(randn(2, next(net.parameters()).shape[1], 64, 64, seed=9))
    for m in norms:
        m.momentum = 0.1
        m.num_batches_tracked.zero_()
    return net


def timms(variant, **options):
    """timm's net and ours with the same random weights, in the same memory."""
    theirs = filled(bare(lambda: timm.create_model(f"tf_efficientnetv2_{variant}", **options)))
    options["in_chans"], options["num_classes"] = options.get("in_chans", 3), options.get("num_classes", 1000)
    ours = bare(lambda: EfficientNetV2(variant, **options))
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return ours, theirs


@pytest.fixture(scope="module")
def pair():
    ours, theirs = timms("s")
    return ours.eval(), theirs.eval()


@pytest.fixture(scope="module")
def small():
    return with_statistics(EfficientNetV2("b0", num_classes=5)).eval()


# ---- the published nets ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_names_and_widths(variant):
    ours = bare(lambda: EfficientNetV2(variant))
    theirs = bare(lambda: timm.create_model(f"tf_efficientnetv2_{variant}"))
    assert (count(ours), ours.channels) == PUBLISHED[variant] and ours.strides == [2, 4, 8, 16, 32]
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == \
        [(k, v.shape) for k, v in theirs.state_dict().items()]


@pytest.mark.parametrize("variant, parameters", [("s", 20_210_362), ("m", 52_891_230), ("l", 117_267_002)])
def test_grey_images_and_26_letters(variant, parameters):
    assert count(bare(lambda: EfficientNetV2(variant, 1, 26))) == parameters


@pytest.mark.parametrize("size", [(256, 256), (331, 331), (384, 384), (65, 98), (1, 2)], ids=str)
def test_s_is_timms(size, pair):
    """331: the padding changes from stage to stage (2, 1, 2, 1, 2)."""
    ours, theirs = pair
    with torch.no_grad():
        x = randn(1, 3, *size)
        assert_equal(ours(x), theirs(x), 1e-4)


def test_maps_are_timms():
    theirs = filled(bare(lambda: timm.create_model("tf_efficientnetv2_s", features_only=True))).eval()
    ours = EfficientNetV2("s", num_classes=None).eval()
    ours.load_state_dict(theirs.state_dict())  # strict: the encoder has the same tensors as timm's
    for size in ((64, 96), (67, 33)):
        with torch.no_grad():
            for a, b, channels, stride in zip(ours.features(randn(2, 3, *size)), theirs(randn(2, 3, *size)),
                                              ours.channels, ours.strides, strict=True):
                assert a.shape == (2, channels, -(-size[0] // stride), -(-size[1] // stride))
                assert_equal(a, b, 1e-4)


@pytest.mark.parametrize("variant, size", [("m", 64), ("l", 64), ("b0", 128), ("b1", 101), ("b2", 96), ("b3", 75)])
def test_the_others_are_timms(variant, size):
    ours, theirs = timms(variant)
    with torch.no_grad():
        assert_equal(ours.eval()(randn(1, 3, size, size + 3)), theirs.eval()(randn(1, 3, size, size + 3)), 1e-4)


@pytest.mark.parametrize("bands", [1, 5])
def test_bands_classes_and_pooled_features(bands):
    ours, theirs = timms("b0", in_chans=bands, num_classes=0)
    with torch.no_grad():
        y = ours.eval()(randn(2, bands, 64, 50))
        assert y.shape == (2, 1280)
        assert_equal(y, theirs.eval()(randn(2, bands, 64, 50)), 1e-4)
    assert EfficientNetV2("b0", bands, 7)(randn(2, bands, 33, 32)).shape == (2, 7)


def test_torchvisions_by_its_own_names(tmp_path):
    """Random weights from torchvision through a file give the same logits, for even and odd sizes."""
    theirs = filled(bare(torchvision.models.efficientnet_v2_s)).eval()
    torch.save(theirs.state_dict(), tmp_path / "tv.pth")
    ours = EfficientNetV2("s", padding="symmetric").eval()
    report = pretrained.load(ours, str(tmp_path / "tv.pth"))
    assert report == {"loaded": list(ours.state_dict()), "adapted": [], "unused": [], "missing": [], "sha256": None}
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        for size in ((96, 96), (75, 64)):
            assert_equal(ours(randn(1, 3, *size)), theirs(randn(1, 3, *size)), 1e-4)


@pytest.mark.parametrize("variant", ["s", "m", "l"])
def test_every_torchvision_name_is_converted(variant):
    """Both list their tensors in the order of the computation."""
    theirs = bare(getattr(torchvision.models, f"efficientnet_v2_{variant}")).state_dict()
    ours = bare(lambda: EfficientNetV2(variant)).state_dict()
    renamed = pretrained.to_timm_names(theirs)
    assert [(k, v.shape) for k, v in renamed.items()] == [(k, v.shape) for k, v in ours.items()]
    assert all(a is b for a, b in zip(renamed.values(), theirs.values()))


def test_paddings_differ_where_a_side_is_even():
    ours, other = (EfficientNetV2("b0", num_classes=None, padding=p).eval() for p in ("same", "symmetric"))
    other.load_state_dict(ours.state_dict())
    with torch.no_grad():
        for size, equal in ((65, True), (64, False)):  # 65 33 17 9 5 3: odd all the way
            a, b = (net.features(randn(1, 3, size, size))[-1] for net in (ours, other))
            assert a.shape == b.shape and torch.equal(a, b) == equal
    with pytest.raises(ValueError, match="valid"):
        EfficientNetV2(padding="valid")


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (2, 3), (5, 8), (8, 6)], ids=str)
def test_same_padding_is_tensorflows(size):
    """Output i sees rows from 2i - before, where before + after = max((ceil(n / 2) - 1) * 2 + 3 - n, 0)."""
    conv = SameConv(1, 1, 3, 2, padding=1, bias=False)
    x, total = randn(1, 1, *size), [max((math.ceil(n / 2) - 1) * 2 + 3 - n, 0) for n in size]
    padded = torch.zeros(1, 1, size[0] + total[0], size[1] + total[1])
    top, left = total[0] // 2, total[1] // 2
    padded[..., top:top + size[0], left:left + size[1]] = x
    windows = padded.unfold(2, 3, 2).unfold(3, 3, 2)
    assert torch.allclose(conv(x), (windows * conv.weight[0, 0]).sum((-1, -2)), atol=1e-6)


# ---- training -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("drops", [{}, {"drop_rate": 0.3, "drop_path_rate": 0.4}], ids=["plain", "drops"])
def test_training_is_timms(drops):
    """Logits, gradients and running statistics, also with dropout from the same state of torch's generator."""
    ours, theirs = timms("b0", num_classes=7, **drops)
    ours, outputs = copy.deepcopy(ours), []
    for net in (ours, theirs):
        torch.manual_seed(1)
        outputs.append(net.train()(randn(4, 3, 64, 65)))
        nn.functional.cross_entropy(outputs[-1], torch.tensor([1, 4, 6, 0])).backward()
    assert_equal(*(y.detach() for y in outputs), 1e-4)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        assert (a.grad - b.grad).abs().max() <= 1e-3 * b.grad.abs().max() + 1e-6, name
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers()):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), name
    assert ours.blocks[5][7].bn3.num_batches_tracked == 1


def test_drop_path_rates():
    net = EfficientNetV2("b0", drop_path_rate=0.25)
    rates = [m.drop for m in net.modules() if isinstance(m, Block)]
    assert rates == [0.25 * i / 21 for i in range(21)]
    torch.manual_seed(0)
    block = next(m for m in net.modules() if isinstance(m, Block) and m.residual)
    block.drop, block.body = 0.25, lambda x: x
    y = block(torch.full((4000, 1, 2, 1), 3.0)) - 3.0
    per_sample = y[:, 0, 0, 0]
    assert torch.equal(y, per_sample[:, None, None, None].expand_as(y)) and set(per_sample.tolist()) == {0.0, 4.0}
    assert float((per_sample == 0).float().mean()) == pytest.approx(0.25, abs=0.03)


def test_drops_are_off_in_evaluation(small):
    net = EfficientNetV2("b0", num_classes=5, drop_rate=0.5, drop_path_rate=0.5).eval()
    net.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert torch.equal(net(randn(2, 3, 32, 32)), small(randn(2, 3, 32, 32)))


def test_initialisation_is_timms():
    """The deviations of all weights are equal within 5 sigma; batch norms and biases are equal."""
    torch.manual_seed(0)
    net = EfficientNetV2("b0")
    ours, theirs = net.state_dict(), timm.create_model("tf_efficientnetv2_b0").state_dict()
    groups = {k + ".weight": m.groups for k, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    for name, a in ours.items():
        b = theirs[name]
        if a.ndim == 4:
            std = math.sqrt(2 / (a.shape[0] * a.shape[2] * a.shape[3] / groups[name]))
            for w in (a, b):
                assert abs(w.std() / std - 1) < 5 / math.sqrt(2 * a.numel()), name
        elif a.ndim == 2:
            for w in (a, b):
                assert w.abs().max() <= 1000 ** -0.5 and w.std() == pytest.approx((3 * 1000) ** -0.5, rel=0.01)
        else:
            assert torch.equal(a, b), name


def test_checkpointing_changes_nothing_but_memory():
    """Loss, gradients and running statistics are bit-equal, also with stochastic depth; every block runs twice."""
    options = dict(num_classes=5, drop_rate=0.2, drop_path_rate=0.5)
    plain, saving = EfficientNetV2("b0", **options), EfficientNetV2("b0", **options, grad_checkpoint=True)
    saving.load_state_dict(with_statistics(plain).state_dict())
    runs, random = [], []
    saving.blocks[5][3].register_forward_pre_hook(lambda *_: runs.append(1))
    for net in (plain, saving):
        torch.manual_seed(3)
        loss = net(randn(4, 3, 33, 48)).square().mean()
        loss.backward()
        random.append((loss.detach(), torch.rand(1)))  # the second forward pass does not advance the generator
    assert random[0] == random[1] and len(runs) == 2
    for (name, a), b in zip(plain.named_parameters(), saving.named_parameters()):
        assert torch.equal(a.grad, b[1].grad), name
    for (name, a), b in zip(plain.named_buffers(), saving.buffers()):
        assert torch.equal(a, b), name


def test_every_parameter_of_an_encoder_gets_a_gradient():
    """Otherwise DDP waits forever."""
    net = UNet("efficientnetv2_b0", in_chans=3, conv0=(), decoder=(8, 8, 8, 8))
    net(randn(2, 3, 64, 64)).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())


# ---- prediction -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("padding", ["same", "symmetric"])
def test_fuse(padding):
    net = filled(bare(lambda: EfficientNetV2("b0", num_classes=5, padding=padding))).double()
    fused = fuse(copy.deepcopy(net))
    assert not fused.training and not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    x = randn(1, 3, 34, 17).double()
    with torch.no_grad():
        expected = net.eval()(x)
        assert_equal(fused(x), expected, 1e-12)
        assert_equal(fuse(fused)(x), expected, 1e-12)  # a second time changes nothing
        assert_equal(fused.float()(x.float()), expected.float(), 1e-4)
        assert_equal(fused.bfloat16()(x.bfloat16()).float(), expected.float(), 0.1)


def test_the_input_stays_as_it_was(small):
    x = randn(1, 3, 32, 40)
    with torch.no_grad():
        small(x), fuse(copy.deepcopy(small))(x)
    assert torch.equal(x, randn(1, 3, 32, 40))


# ---- as the encoder of a UNet ---------------------------------------------------------------------------------------

def test_encoders_by_name():
    nets = {name: bare(lambda: make_encoder(name, 4)) for name in ENCODERS if name.startswith("efficientnetv2")}
    assert list(nets) == [f"efficientnetv2_{v}" for v in VARIANTS] + [f"efficientnetv2_{v}_tv" for v in "sml"]
    for name, net in nets.items():
        assert net.padding == ("symmetric" if name.endswith("_tv") else "same")
        assert net.channels == PUBLISHED[name.split("_")[1]][1] and net.conv_stem.in_channels == 4
    for name in ("efficientnetv2_xxl", "efficientnetv2_b0_tv", "efficientnetv2"):
        with pytest.raises(ValueError, match="efficientnetv2_s"):
            make_encoder(name, 3)


@pytest.mark.parametrize("decoder, factor", [((8, 8, 8, 8), 2), ((8,) * 5, 1)])
def test_unet_of_any_input_size(decoder, factor):
    net = UNet("efficientnetv2_b0", in_chans=4, classes=2, decoder=decoder).eval()
    assert net.stride == 32 and net.coarse == factor
    with torch.no_grad():
        for size in ((1, 1), (2, 3), (33, 17), (64, 96)):
            y = net(randn(1, 4, *size))
            assert y.shape == (1, 2, *size) and y.isfinite().all()
    with pytest.raises(ValueError, match="at most 5"):
        UNet("efficientnetv2_b0", decoder=(8,) * 6)


@pytest.mark.slow
def test_train_and_predict_with_this_encoder(script, wildfire):
    script(train_seg, "--data", wildfire, *TINY, "--encoder", "efficientnetv2_b0", "--amp", "off")
    assert checkpoint.load("runs/seg/exp/last.pt")["arch"]["kwargs"]["encoder"] == "efficientnetv2_b0"
    script(predict, "--task", "seg", "--weights", "runs/seg/exp/last.pt", "--source", wildfire / "test_img",
           "--out", "out", "--device", "cpu", "--amp", "off")
    assert len(list(Path("out").rglob("*.tif"))) == 3
