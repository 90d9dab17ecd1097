"""nets/yolo.py against the published parameter counts, tensor names and formulas."""
import math

import pytest
import torch
from torch import nn

from nets import yolo
from nets.blocks import fuse
from nets.yolo import BINS, SIZES, VARIANTS, YOLOv5

# parameters with 80 classes and with 14, entries of the state dict; of the reference nets, counted by running them
PUBLISHED = {
    "n": (1_872_157, 1_782_859, 349), "s": (7_235_389, 7_057_387, 349), "m": (21_190_557, 20_923_851, 481),
    "l": (46_563_709, 46_208_299, 613), "x": (86_749_405, 86_305_291, 745),
    "n6": (3_246_940, 3_119_428, 459), "s6": (12_626_620, 12_372_388, 459), "m6": (35_731_932, 35_350_980, 627),
    "l6": (76_770_172, 76_262_500, 795), "x6": (140_794_780, 140_160_388, 963),
}


def published_names(variant):
    """The state dict's names, written down from the table of layers: independent of our loop that builds them."""
    deep = {"n": .33, "s": .33, "m": .67, "l": 1, "x": 1.33}[variant[0]]

    def conv(name):
        return [f"{name}.conv.weight"] + [f"{name}.bn.{t}" for t in ("weight", "bias", "running_mean", "running_var",
                                                                     "num_batches_tracked")]

    def c3(i, count):
        names = [n for k in (1, 2, 3) for n in conv(f"model.{i}.cv{k}")]
        for j in range(max(round(count * deep), 1)):
            names += conv(f"model.{i}.m.{j}.cv1") + conv(f"model.{i}.m.{j}.cv2")
        return names

    if variant.endswith("6"):
        convs, blocks = (0, 1, 3, 5, 7, 9, 12, 16, 20, 24, 27, 30), {2: 3, 4: 6, 6: 9, 8: 3, 10: 3, 15: 3, 19: 3, 23: 3,
                                                                     26: 3, 29: 3, 32: 3}
        sppf, head, levels = 11, 33, 4
    else:
        convs, blocks = (0, 1, 3, 5, 7, 10, 14, 18, 21), {2: 3, 4: 6, 6: 9, 8: 3, 13: 3, 17: 3, 20: 3, 23: 3}
        sppf, head, levels = 9, 24, 3
    names = [n for i in convs for n in conv(f"model.{i}")] + [n for i, count in blocks.items() for n in c3(i, count)]
    names += conv(f"model.{sppf}.cv1") + conv(f"model.{sppf}.cv2") + [f"model.{head}.anchors"]
    return set(names + [f"model.{head}.m.{i}.{t}" for i in range(levels) for t in ("weight", "bias")])


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_and_names(variant):
    with torch.device("meta"):
        nets = [YOLOv5(variant, classes, anchors=[[[1.0, 1.0]] * 3] * (4 if variant.endswith("6") else 3))
                for classes in (80, 14)]
    counts = [sum(p.numel() for p in net.parameters()) for net in nets]
    assert (*counts, len(nets[0].state_dict())) == PUBLISHED[variant]
    assert set(nets[0].state_dict()) == published_names(variant)


def test_the_head_is_the_last_layer_and_knows_its_tensors():
    for variant, last in (("n", 24), ("n6", 33)):
        assert YOLOv5(variant).task_prefixes == (f"model.{last}.",)
        assert YOLOv5(variant, head="free").task_prefixes == (f"model.{last}.",)
    assert not [n for n in YOLOv5("n", head="free").state_dict() if n.startswith("model.24.m.")]


def test_the_buffer_of_anchors_is_in_strides():
    net = YOLOv5("n")
    assert net.head.anchors[0, 0].tolist() == [10 / 8, 13 / 8]
    assert net.head.anchors[2, 2].tolist() == [373 / 32, 326 / 32]
    given = YOLOv5("n6", anchors=torch.arange(1, 25).float().view(4, 3, 2)).head.anchors
    assert given[3, 2].tolist() == [23 / 64, 24 / 64]


def test_biases_expect_few_objects():
    """log(8 objects / cells of a 640 px image), log(0.6 / classes), added to torch's small initial biases."""
    torch.manual_seed(0)
    net = YOLOv5("n", 14)
    for conv, stride in zip(net.head.m, net.strides):
        bias = conv.bias.view(3, 19)
        assert (bias[:, 4] - math.log(8 / (640 / stride) ** 2)).abs().max() < conv.in_channels ** -0.5
        assert (bias[:, 5:] - math.log(0.6 / 13)).abs().max() < conv.in_channels ** -0.5 + 1e-5
        assert bias[:, :4].abs().max() <= conv.in_channels ** -0.5


@pytest.mark.parametrize("head", ["anchor", "free"])
@pytest.mark.parametrize("variant", ["n", "n6"])
def test_shapes(variant, head):
    net = YOLOv5(variant, 3, in_chans=5, head=head)
    x = torch.rand(2, 5, 64, 192)
    strides = [8, 16, 32, 64][:3 + variant.endswith("6")]
    assert net.strides == strides and net.stride == strides[-1]
    cells = [(64 // s, 192 // s) for s in strides]
    maps = net.train()(x)
    want = [(2, 3, h, w, 8) if head == "anchor" else (2, h, w, 4 * BINS + 3) for h, w in cells]
    assert [tuple(m.shape) for m in maps] == want
    rows = net.eval()(x)
    assert rows.shape == (2, sum(h * w for h, w in cells) * (3 if head == "anchor" else 1), 8)
    assert rows.dtype == torch.float32 and (rows[..., 4:] >= 0).all() and (rows[..., 4:] <= 1).all()
    assert head == "anchor" or (rows[..., 4] == 1).all()


def test_a_256_pixel_image_has_4032_rows():  # 3 x (32 x 32 + 16 x 16 + 8 x 8)
    assert YOLOv5("n", 3).eval()(torch.zeros(1, 3, 256, 256)).shape == (1, 4032, 8)


def test_anchor_boxes_by_the_formula():
    """Every row in float64, cell by cell: x = (2 s(tx) - .5 + column) stride, w = (2 s(tw))^2 anchor."""
    torch.manual_seed(1)
    net = YOLOv5("n", 2).eval()
    x = torch.randn(1, 3, 64, 96)
    net.head.train()  # raw maps of the net in eval mode
    maps, rows = net(x), net.head.eval() and net(x)
    at = 0
    for m, stride, pixels in zip(maps, net.strides, yolo.ANCHORS["5"]):
        for a in range(3):
            for i in range(m.shape[2]):
                for j in range(m.shape[3]):
                    t = m[0, a, i, j].double().sigmoid()
                    want = [(2 * t[0] - .5 + j) * stride, (2 * t[1] - .5 + i) * stride, (2 * t[2]) ** 2 * pixels[a][0],
                            (2 * t[3]) ** 2 * pixels[a][1], t[4], t[5], t[6]]
                    assert rows[0, at].tolist() == pytest.approx([float(v) for v in want], rel=1e-4, abs=1e-4)
                    at += 1
    assert at == rows.shape[1]


def test_the_free_head_has_a_depthwise_class_branch():
    """Per level, with norms of two numbers a channel: 3x3, 3x3, 1x1 for the box; twice 3x3 depthwise and 1x1, and 1x1
    for the classes."""
    wide, deep, box, width, classes = (64, 128, 256), 4 * BINS, 64, 64, 5
    want = sum(9 * c * box + 9 * box * box + 4 * box + (box + 1) * deep
               + 9 * c + 2 * c + c * width + 2 * width + 9 * width + 2 * width + width * width + 2 * width
               + (width + 1) * classes for c in wide)
    head = YOLOv5("n", classes, head="free").head
    assert sum(p.numel() for p in head.parameters()) == want
    for conv in (module for module in head.cls.modules() if isinstance(module, nn.Conv2d) and module.groups > 1):
        off = conv.weight.flatten(1)[:, [0, 1, 2, 3, 5, 6, 7, 8]]
        assert off.abs().max() <= 1 / 3 < 2 / 3 <= conv.weight[..., 1, 1].min()  # a cell looks at itself first


def test_free_boxes_by_the_formula():
    """Distances are the means of their distributions, times the stride, from the cell's centre."""
    torch.manual_seed(1)
    net = YOLOv5("n", 2, head="free").eval()
    for branch in net.head.box:
        nn.init.normal_(branch[-1].weight, 0, 0.5)
    x = torch.randn(1, 3, 64, 96)
    net.head.training = True
    maps = net(x)
    net.head.training = False
    rows, at = net(x), 0
    for m, stride in zip(maps, net.strides):
        for i in range(m.shape[1]):
            for j in range(m.shape[2]):
                p = m[0, i, j, :64].double().view(4, 16).softmax(1)
                left, top, right, bottom = [float(sum(k * q for k, q in enumerate(side))) * stride for side in p]
                cx, cy = (j + .5) * stride, (i + .5) * stride
                want = [cx + (right - left) / 2, cy + (bottom - top) / 2, left + right, top + bottom, 1,
                        *m[0, i, j, 64:].double().sigmoid().tolist()]
                assert rows[0, at].tolist() == pytest.approx(want, rel=1e-4, abs=1e-3)
                at += 1
    assert at == rows.shape[1]


@pytest.mark.parametrize("head", ["anchor", "free"])
def test_folding_batch_norms_changes_nothing(head):
    torch.manual_seed(0)
    net = YOLOv5("n", 3, head=head)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -.1, .1), nn.init.uniform_(m.running_var, .5, 2)
            nn.init.uniform_(m.weight, .5, 1.5)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = net.eval()(x)
        after = fuse(net)(x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-3)


def test_recomputing_gives_the_same_gradients():
    nets = []
    for recompute in (False, True):
        torch.manual_seed(0)
        net = YOLOv5("n", 2, head="free", grad_checkpoint=recompute)
        sum(m.square().mean() for m in net(torch.rand(2, 3, 64, 64))).backward()
        nets.append(net)
    for (name, p), q in zip(nets[0].named_parameters(), nets[1].parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7, msg=name)
    for (name, b), c in zip(nets[0].named_buffers(), nets[1].buffers()):
        torch.testing.assert_close(b, c, msg=name)


def test_fp16_and_channels_last_work():
    net = YOLOv5("n", 3, head="free").eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        plain = net(x)
        last = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(last, plain, rtol=1e-4, atol=1e-3)
        with torch.autocast("cpu", torch.bfloat16):
            assert net(x).dtype == torch.float32


def test_all_variants_have_a_size():
    assert {v[0] for v in VARIANTS} == set(SIZES) and len(VARIANTS) == 10


@pytest.mark.parametrize("head", ["anchor", "free"])
def test_boxes_are_decoded_in_fp32(head):
    """What bf16 leaves of 373 pixels, or of a mean of distances, is 372 and a pixel's error."""
    torch.manual_seed(0)
    net = YOLOv5("n", 2, head=head).head
    shapes = [(1, 4 * BINS + 2, 2, 2)] * 3 if head == "free" else [(1, 3, 2, 2, 7)] * 3
    raw = [10 * torch.randn(shape).movedim(1, -1) if head == "free" else torch.randn(shape) for shape in shapes]
    exact = net.decode(raw)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net.decode(raw), exact)
    assert torch.equal(net.to(torch.bfloat16).decode(raw), exact)
