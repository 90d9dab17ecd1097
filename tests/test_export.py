"""utils/export.py: the exported graphs compute what predict.py computes, also for sizes that they were not traced with."""
import dataclasses
import importlib
import json

import numpy as np
import pytest
import torch

import nets
from data import cls, det, seg
from nets.blocks import fuse
from utils import export
from utils.ops import decide
from utils.train import checkpoint

UNET = dict(in_chans=6, classes=1)
SCALES = dict(pixel_scale=255.0, imgsz=96)
CASES = {  # net, input, classes; the first is small, the others are the defaults of their tasks
    "small": ("unet.UNet", UNET | dict(conv0=[8], decoder=[8, 8, 8, 8]), seg.Input([3, 1, 2], **SCALES), 1),
    "seg": ("unet.UNet", UNET | dict(stem_stride=1), seg.Input([1, 2, 3], **SCALES), 1),
    "seg, 4 classes": ("unet.UNet", dict(in_chans=3, classes=4, conv0=[], stem_stride=2, aux_cls=True), seg.Input(
        [1, 2, 3], [255.0, 200.0, 9.0], 96, mean_planes=False, pixel_mean=[100.0, 90.0, 5.0]), 4),
    "det free": ("yolo.YOLOv5", dict(num_classes=3, variant="s", head="free"), det.Input([1, 2, 3], **SCALES),
                 list("abc")),
    "det anchor": ("yolo.YOLOv5", dict(num_classes=3, variant="s", head="anchor"), det.Input([1, 2, 3], **SCALES),
                   list("abc")),
    "cls": ("efficientnetv2_s", dict(in_chans=3, num_classes=5), cls.Input(
        [1, 2, 3], **SCALES, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.2]), list("abcde")),
}


@pytest.fixture(params=["small", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != "small")])
def exported(request, tmp_path):
    """-> a checkpoint's path, the net, its Input, whether images have single labels."""
    name, kwargs, inputs, classes = CASES[request.param]
    torch.manual_seed(0)
    net = nets.build({"name": name, "kwargs": kwargs})
    for module in net.modules():  # batch norms that do something
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 2), torch.nn.init.normal_(module.running_mean, 0, 0.1)
    task = type(inputs).__module__.rpartition(".")[2]
    state = {"task": task, "arch": {"name": name, "kwargs": kwargs}, "classes": classes, "model": net.state_dict(),
             "input": dataclasses.asdict(inputs), "args": {"data": "DATA"}}
    state |= {"det": {"category_ids": [1, 2, 3]}, "cls": {"single_label": False, "threshold": [0.5] * 5}}.get(task, {})
    checkpoint.save(tmp_path / "best.pt", state)
    return tmp_path / "best.pt", fuse(net), inputs


def predicted(net, inputs, raw):
    """What predict.py computes of images (B, C, H, W) in the numbers of their files."""
    if isinstance(inputs, seg.Input):
        return decide.segment(net, inputs(raw), side=inputs.side)
    if isinstance(inputs, det.Input):
        return net(inputs(raw))
    placed = cls.AugmentedImages([{"image": image, "label": torch.zeros(5)} for image in raw], inputs.imgsz)
    return decide.classify(net, inputs, cls.collate([placed[i] for i in range(len(raw))]))


def images(inputs, count, height, width):
    sides = (96, 96) if isinstance(inputs, cls.Input) else (height, width)
    raw = torch.from_numpy(np.random.default_rng(count).integers(0, 255, (count, 3, *sides))).float()
    if not isinstance(inputs, cls.Input):
        raw[0, :, :5] = torch.nan  # no data
    return raw


@pytest.mark.parametrize("form", ["pt2", "onnx"])
def test_outputs_are_those_of_the_prediction(script, exported, form):
    path, net, inputs = exported
    if form == "onnx":
        for package in ("onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    script(export, path, "--format", form)
    if form == "pt2":
        metadata = dict.fromkeys(("task", "classes", "input", "stride"))
        program = torch.export.load(path.with_suffix(".pt2"), extra_files=metadata).module()
    else:
        session = importlib.import_module("onnxruntime").InferenceSession(str(path.with_suffix(".onnx")))
        metadata = session.get_modelmeta().custom_metadata_map
        def program(raw):
            return torch.from_numpy(session.run(["output"], {"image": raw.numpy()})[0])
    metadata = {name: json.loads(text) for name, text in metadata.items()}
    assert metadata["input"] == json.loads(json.dumps(dataclasses.asdict(inputs))) and metadata["stride"] in (16, 32)
    for size in ((3, 64, 160), (1, 192, 96)):
        raw = images(inputs, *size)
        with torch.inference_mode():
            found, expected = program(raw), predicted(net, inputs, raw)
            assert found.shape == expected.shape and found.dtype == torch.float32
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
            assert expected.std() > 1e-3


def test_refused(refused, tmp_path, monkeypatch):
    (tmp_path / "best.onnx").write_text("")
    refused(export, "best.pt", says="best.onnx: exists already")
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    refused(export, "none.pt", says="--format onnx: needs two packages; pip install onnx onnxscript")
    refused(export, "none.pt", "--format", "pt2", says="no such checkpoint")
