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
from nets import pretrained
from nets.yolo import SPPF, Conv, YOLOv5
from tests.test_weights import foreign
from utils.errors import UserError

REAL = Path(__file__).parents[2] / "shared/data/weights"
PUBLISHED = REAL / "yolov5n.pt"
real = pytest.mark.skipif(not PUBLISHED.exists(), reason="needs the published yolov5n.pt")


def write(path, net, names=None, **more):
    """A checkpoint as YOLOv5's training writes it: a pickled module of unknown classes, in fp16."""
    net = net.half()
    if names is not None:
        net.names = names
    with foreign(net, "models.yolo") as theirs:
        torch.save({"epoch": -1, "ema": None, "model": theirs, "optimizer": None} | more, path)
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
@pytest.mark.parametrize("tta", [[], ["--tta"]])
def test_predict_finds_what_the_reference_finds(tta, tmp_path, monkeypatch):
    truth = json.loads((REAL / "yolov5n_reference.json").read_text())
    text = run(monkeypatch, "--task", "det", "--weights", PUBLISHED, "--source", REAL / "photos", "--out", tmp_path / "out",
               "--imgsz", 480, "--amp", "off", *tta)
    assert "person, bicycle" in text
    gaps = sorted(pretrained.COCO_GAPS)
    items = json.loads((tmp_path / "out/coco.json").read_text())
    for name, image in truth["images"].items():
        for x1, y1, x2, y2, score, label in image["detections_0.25_0.45"]:
            category = next(k for k in range(1, 91) if k not in gaps and k - sum(g < k for g in gaps) == label + 1)
            same = [i for i in items if i["image_id"] == Path(name).stem and i["category_id"] == category]
            boxes = torch.tensor([i["bbox"] for i in same]).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            overlap = torchvision.ops.box_iou(torch.tensor([[x1, y1, x2, y2]]), boxes)
            assert score < 0.4 or (overlap >= (0.8 if tta else 0.9)).any(), (name, label, score)
