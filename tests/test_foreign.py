"""nets/pretrained.py: weights of others as checkpoints. The truth: published files, the reference's detections, and modules
that the tests write out themselves."""
import contextlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from PIL import Image
from torch import nn

import nets
import predict
import train_det
from nets import pretrained
from nets.yolo import SPPF, Conv, YOLOv5
from tests.test_nets import with_statistics
from tests.test_weights import foreign
from utils.errors import UserError
from utils.train import checkpoint

REAL = Path(__file__).parents[2] / "shared/data/weights"
PUBLISHED = REAL / "yolov5n.pt"
real = pytest.mark.skipif(not PUBLISHED.exists(), reason="needs the published yolov5n.pt")


def write(path, net, names=None, ema=None, **more):
    """A checkpoint as YOLOv5's training writes it: pickled modules of unknown classes, in fp16. ema: (module, names)."""
    both = nn.ModuleList([net.half(), *([ema[0].half()] if ema else [])])
    for module, texts in zip(both, (names, ema and ema[1])):
        if texts is not None:
            module.names = texts
    with foreign(both, "models.yolo"):
        torch.save({"epoch": -1, "ema": ema and both[1], "model": both[0], "optimizer": None} | more, path)
    return str(path)


def build(state):
    net = nets.build(state["arch"])
    net.load_state_dict(state["model"])
    return net.eval()


@pytest.fixture
def photo(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "1.png")
    return folder


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, flags), "--device", "cpu", "--workers", "0"])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        predict.main()
    return out.getvalue()


# ---- the published file ----------------------------------------------------------------------------------------------
@real
def test_the_net_computes_what_the_reference_does():
    """Boxes to 1e-3 pixels, scores to 1e-5."""
    truth, net = json.loads((REAL / "yolov5n_reference.json").read_text()), None
    net = build(state := pretrained.checkpoint(PUBLISHED, "det"))
    assert state["classes"] == truth["names"] and state["input"]["imgsz"] == 640
    for name, image in truth["images"].items():
        pixels = np.asarray(Image.open(REAL / "photos" / name).convert("RGB"))
        with torch.no_grad():
            rows = net(torch.tensor(pixels).permute(2, 0, 1)[None] / 255)[0]
        assert len(rows) == image["rows"] and rows.double().sum() == pytest.approx(image["sum_of_decoded"], rel=1e-5)
        found = predict.boxes.nms(rows[None], conf=0.25, iou=0.45, max_det=300)[0].numpy()
        expected = np.array(image["detections_0.25_0.45"])
        assert found.shape == expected.shape
        assert np.abs(found[:, :4] - expected[:, :4]).max() < 1e-3 and np.abs(found[:, 4:] - expected[:, 4:]).max() < 1e-4


@real
def test_predict_finds_what_the_reference_finds(tmp_path, monkeypatch):
    truth = json.loads((REAL / "yolov5n_reference.json").read_text())
    text = run(monkeypatch, "--task", "det", "--weights", PUBLISHED, "--source", REAL / "photos", "--out", tmp_path / "out",
               "--amp", "off")
    assert "person, bicycle" in text
    items = json.loads((tmp_path / "out/coco.json").read_text())
    for name, image in truth["images"].items():
        for x1, y1, x2, y2, score, label in image["detections_0.25_0.45"]:
            boxes = [i["bbox"] for i in items if (i["image_id"], i["category_id"]) == (Path(name).stem, label)]
            overlap = torchvision.ops.box_iou(torch.tensor([[x1, y1, x2, y2]]), torchvision.ops.box_convert(
                torch.tensor(boxes).reshape(-1, 4), "xywh", "xyxy"))
            assert score < 0.4 or (overlap >= 0.9).any(), (name, label, score)


# ---- files as users have them ----------------------------------------------------------------------------------------
def test_a_users_own_checkpoint(tmp_path, photo, monkeypatch):
    """Own anchors and classes; the EMA weights of an unstripped training checkpoint come first; names are a dict."""
    net, ema = (with_statistics(YOLOv5("n", 3, anchors=torch.arange(18.) + 5 + k)) for k in (0, 1))
    path = write(tmp_path / "best.pt", net, ema=(ema, ["car", "b\x1b[2Jus", "x" * 500]), epoch=7, best_fitness=0.3)
    state = pretrained.checkpoint(path, "det")
    assert state["classes"] == ["car", "b[2Jus", "x" * 100] and state["category_ids"] == [0, 1, 2]
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(build(state)(x), ema.float().eval()(x))
    text = run(monkeypatch, "--task", "det", "--weights", path, path, "--source", photo, "--out", tmp_path / "out",
               "--tta", "--pseudo", 0.9, "--imgsz", 64)
    assert "variant n, 3 classes: car" in text and (tmp_path / "out/coco.json").exists()
    with pytest.raises(UserError, match="--source"):
        run(monkeypatch, "--task", "det", "--weights", path)


@pytest.mark.parametrize("variant, classes, names", [("n", 1, {0: "kite"}), ("n6", 11, None), ("n", 2, ["a", None])])
def test_classes_and_their_names(variant, classes, names, tmp_path):
    state = pretrained.checkpoint(write(tmp_path / "m.pt", YOLOv5(variant, classes), names), "det")
    given = list(names.values()) if isinstance(names, dict) else names or [None] * classes
    assert state["classes"] == [name or str(k) for k, name in enumerate(given)]
    assert state["arch"]["kwargs"]["variant"] == variant and state["input"]["imgsz"] == (1280 if "6" in variant else 640)


@pytest.mark.parametrize("kind", ["state dict", "wrapped", "safetensors"])
def test_state_dicts_and_a_file_of_names(kind, tmp_path):
    net = with_statistics(YOLOv5("n", 2, in_chans=4))
    path, state = tmp_path / "weights", {f"{'model.' * (kind == 'wrapped')}{k}": v for k, v in net.state_dict().items()}
    safetensors.torch.save_file(state, path) if kind == "safetensors" else torch.save(state, path)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    found = pretrained.checkpoint(path, "det", tmp_path / "names.txt")
    assert found["classes"] == ["cat", "dog"] and found["input"]["bands"] == [1, 2, 3, 4]
    ours = build(found).state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in net.state_dict().items())
    assert pretrained.checkpoint(path, "det")["classes"] == ["0", "1"]
    (tmp_path / "names.txt").write_text("cat\n")
    with pytest.raises(UserError, match="1 lines for the 2 classes"):
        pretrained.checkpoint(path, "det", tmp_path / "names.txt")


# ---- releases 4.0 and 5.0, YOLOv5u -----------------------------------------------------------------------------------
class Focus(nn.Module):
    """The stem of release 5.0."""

    def __init__(self, width):
        super().__init__()
        self.conv = Conv(12, width, 3)

    def forward(self, x):
        return self.conv(torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1))


class SPP(nn.Module):
    """The pooling of release 5.0: three windows side by side."""

    def __init__(self, width, windows):
        super().__init__()
        self.cv1, self.cv2 = Conv(width, width // 2), Conv(width * 2, width)
        self.m = nn.ModuleList(nn.MaxPool2d(k, 1, k // 2) for k in windows)

    def forward(self, x):
        x = self.cv1(x)
        return self.cv2(torch.cat([x] + [m(x) for m in self.m], 1))


@pytest.mark.parametrize("flags, head, box", [([], "anchor", 0.05), (["--head", "free"], "free", 7.5),
                                              (["--variant", "n"], "anchor", 0.05)])
def test_training_keeps_the_head_of_yolov5s_weights(flags, head, box, tmp_path, monkeypatch):
    """The other default flags follow the head. A checkpoint of ours gets the usual default head."""
    path = write(tmp_path / "m.pt", YOLOv5("n", 2))
    ours = tmp_path / "ours.pt"
    checkpoint.save(ours, pretrained.checkpoint(path, "det") | {"arch": {"name": "yolo.YOLOv5", "kwargs": {
        "in_chans": 3, "num_classes": 2, "variant": "n", "head": "anchor"}}})
    for weights, expected in ((path, (head, box)), (ours, ("free", 7.5))):
        monkeypatch.setattr("sys.argv", ["train_det.py", "--weights", str(weights), *flags])
        args = train_det.make_parser().parse_args()
        assert (args.variant, args.head, args.box) == ("n", *expected)


@pytest.mark.parametrize("variant, windows", [("n", (5, 9, 13)), ("n6", (3, 5, 7))])
def test_release_5(variant, windows, tmp_path):
    """The old modules in the old order compute what the converted net computes."""
    theirs = YOLOv5(f"{variant}_v5", 4)
    assert len(theirs.model[4].m) == len(theirs.model[6].m) == 3
    at = 10 if "6" in variant else 8
    assert isinstance(theirs.model[at], SPPF) and not theirs.model[at + 1].m[0].shortcut
    theirs.model[0] = Focus(theirs.model[1].conv.in_channels)
    theirs.model[at] = SPP(theirs.model[at].cv1.conv.in_channels, windows)
    theirs = with_statistics(theirs)
    theirs.head.register_buffer("anchor_grid", torch.ones(len(theirs.strides), 1, 3, 1, 1, 2))
    state = pretrained.checkpoint(write(tmp_path / "old.pt", theirs), "det")
    x = torch.rand(1, 3, 128, 192)
    with torch.no_grad():
        ours, expected = build(state)(x), theirs.float().eval()(x)
    assert state["arch"]["kwargs"]["variant"] == f"{variant}_v5" and torch.allclose(ours, expected, rtol=1e-4, atol=1e-4)


def yolov5u(classes=3):
    """A YOLOv5u with the module names of its release."""
    net = with_statistics(YOLOv5("n", classes, head="dense"))
    net.head.cv2 = net.head.box
    del net.head.box
    net.head.dfl = nn.Module()
    net.head.dfl.conv = nn.Conv2d(16, 1, 1, bias=False)
    return net


def test_yolov5u(tmp_path):
    """Its decoded boxes are the expectations over the bins of the distances to the four sides."""
    path = write(tmp_path / "u.pt", net := yolov5u(), {0: "a", 1: "b", 2: "c"})
    ours, x, maps = build(pretrained.checkpoint(path, "det")), torch.rand(1, 3, 64, 64), []
    hook = ours.head.register_forward_pre_hook(lambda _, inputs: maps.extend(inputs[0]))
    with torch.no_grad():
        rows, expected = ours(x)[0], []
        hook.remove()
        for branch, classes, x, stride in zip(net.float().eval().head.cv2, net.head.cv3, maps, (8, 16, 32)):
            distance = branch(x)[0].unflatten(0, (4, 16)).softmax(1).mul(torch.arange(16.)[:, None, None]).sum(1) * stride
            at_y, at_x = (torch.arange(float(side)) * stride + stride / 2 for side in x.shape[2:])
            left, up, right, down = distance
            box = torch.stack([at_x + (right - left) / 2, at_y[:, None] + (down - up) / 2, left + right, up + down])
            expected.append(torch.cat([box, torch.ones_like(box[:1]), classes(x)[0].sigmoid()]).flatten(1).T)
    assert torch.allclose(rows, torch.cat(expected), atol=1e-3)
    free = YOLOv5("n", 3, head="free")
    report = pretrained.load(free, path)
    assert {name for name in report["loaded"] if name.startswith("model.24.")} == {
        name for name in free.state_dict() if name.startswith("model.24.box.")}


# ---- ImageNet classifiers --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, theirs, side, std", [
    ("regnetx_002", lambda: nets.make("regnetx_002", 3, 10), 224, 0.229),
    ("regnetx_004_tv", lambda: torchvision.models.regnet_x_400mf(num_classes=10), 224, 0.229),
    ("efficientnetv2_s", lambda: nets.make("efficientnetv2_s", 3, 10), 384, 0.5),
    ("efficientnetv2_s_tv", lambda: torchvision.models.efficientnet_v2_s(num_classes=10), 384, 0.229),
    ("repvgg_a0", lambda: nets.make("repvgg_a0", 3, 10), 224, 0.229),
    ("hrnet_w18_small", lambda: nets.make("hrnet_w18_small", 3, 10), 224, 0.229)])
def test_classifiers(name, theirs, side, std, tmp_path):
    theirs = theirs().eval()
    torch.save(theirs.state_dict(), tmp_path / "net.pth")
    state = pretrained.checkpoint(tmp_path / "net.pth", "cls")
    assert (state["arch"]["name"], state["input"]["imgsz"], state["single_label"]) == (name, side, True)
    assert state["input"]["std"][0] == std and state["classes"] == [str(k) for k in range(10)]
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(build(state)(x), theirs(x), atol=1e-4)


def test_a_classifier_through_predict(tmp_path, photo, monkeypatch):
    torch.save({"state_dict": nets.make("regnetx_002", 3, 3).state_dict()}, tmp_path / "net.pth")
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    run(monkeypatch, "--task", "cls", "--weights", tmp_path / "net.pth", "--source", photo, "--out", tmp_path / "out",
        "--names", tmp_path / "names.txt", "--tta", "--pseudo", 0.5)
    assert (tmp_path / "out/probabilities.csv").read_text().splitlines()[0].split(",")[1:] == ["a", "b", "c"]


# ---- what is refused -------------------------------------------------------------------------------------------------
def fused(net):
    net.model[0].conv.bias = nn.Parameter(torch.zeros(16))
    net.model[0].bn = nn.Identity()


def with_part(name):
    def change(net):
        setattr(net.head, name, nn.ModuleList([nn.Sequential(Conv(8, 8))]))
    return change


def narrower(net):
    net.model[2].cv3 = Conv(net.model[2].cv1.conv.out_channels * 2, 24)


def version8(net):
    del net.model[22:]
    net.model.append(net.model[21])
    net.model[22].cv3 = nn.ModuleList([nn.Conv2d(8, 8, 1)])


@pytest.mark.parametrize("change, task, words", [
    (fused, "det", "fused"), (with_part("proto"), "det", "segmentation"), (with_part("cv4"), "det", "poses"),
    (with_part("one2one_cv2"), "det", "YOLO26"), (narrower, "det", "pruned"), (version8, "det", "YOLOv8"),
    (lambda net: None, "cls", "another net; give .* RegNetX")])
def test_other_nets_are_named(change, task, words, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "SIZES", ["n"])  # the others are not tried, which takes seconds
    net = YOLOv5("n", 2)
    change(net)
    with pytest.raises(UserError, match=words) as error:
        pretrained.checkpoint(write(tmp_path / "m.pt", net), task)
    assert str(tmp_path / "m.pt") in str(error.value) and "give" in str(error.value)


def test_other_files_are_named(tmp_path):
    torch.jit.trace(nn.Conv2d(3, 4, 1), torch.ones(1, 3, 4, 4)).save(tmp_path / "script.pt")
    path = write(tmp_path / "whole.pt", YOLOv5("n", 2))
    (tmp_path / "half.pt").write_bytes(Path(path).read_bytes()[:10**6])
    torch.save({"model.0.conv.weight": torch.ones(3), "model.24.anchors": torch.ones(2, 2)}, tmp_path / "odd.pt")
    for name, words in {"script.pt": "TorchScript", "half.pt": "cut off", "odd.pt": "another net", "no.pt": "no such checkpoint"
                        }.items():
        with pytest.raises(UserError, match=words):
            pretrained.checkpoint(tmp_path / name, "det")
    for task, known, unknown in (("det", "yolov5:yolov5n,", "timm:"), ("cls", "timm:regnetx_002", "yolov5:")):
        with pytest.raises(UserError, match="yolov5n: no such checkpoint") as error:
            pretrained.checkpoint("yolov5n", task)
        assert known in str(error.value) and unknown not in str(error.value)
