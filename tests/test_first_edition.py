"""Checkpoints of the first edition (before "input" stood in them) are converted when they are read, and predict the
same numbers: those below were printed by the first edition's own predict.py for the same files."""
import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch

import nets
import predict
from tests.conftest import write_dirty, write_parking, write_wildfire
from utils.ops import tta
from utils.train import checkpoint

SEG = {"encoder": "regnetx_002", "in_chans": 14, "classes": 1, "conv0": [8], "decoder": [8, 8, 8, 8]}
STATES = {  # all that the first edition wrote beside weights: header, then "model" or "ema", or both
    "seg-ema": {"task": "seg", "arch": {"name": "UNet", "kwargs": SEG | {"presence": False}}, "classes": 1,
                "bands": [1, 2, 3, 4, 5, 6, 7], "scale": 65535.0, "mean_planes": True, "imgsz": 32, "resize": False,
                "args": {"data": "Wildfire", "ignore": None, "tile": None, "overlap": 0.25}, "threshold": 0.3},
    "seg-presence": {"task": "seg", "arch": {"name": "UNet", "kwargs": SEG | {"presence": True, "in_chans": 3}},
                     "classes": 1, "bands": [7, 5, 3], "scale": 10000.0, "mean_planes": False, "imgsz": 64,
                     "resize": True, "args": {"data": "Wildfire", "ignore": None}, "threshold": 0.51},
    "det-free": {"task": "det", "arch": {"name": "YOLOv5", "kwargs": {
        "variant": "n", "num_classes": 3, "in_chans": 3, "head": "free"}}, "classes": ["sedan", "bus", "adult"],
        "category_ids": [1, 2, 3], "bands": [1, 2, 3], "scale": 255.0, "imgsz": 64,
        "args": {"data": "DATA", "tile": None, "overlap": 0.25}, "threshold": 0.3},
    "det-anchor": {"task": "det", "arch": {"name": "YOLOv5", "kwargs": {
        "variant": "n", "num_classes": 3, "in_chans": 3, "head": "anchor",
        "anchors": [[[8.0, 8.0], [12.0, 20.0], [20.0, 12.0]], [[16.0, 16.0], [20.0, 30.0], [30.0, 20.0]],
                    [[40.0, 40.0], [50.0, 30.0], [30.0, 50.0]]]}}, "classes": ["sedan", "bus", "adult"],
        "category_ids": [1, 2, 3], "bands": [1, 2, 3], "scale": 255.0, "imgsz": 64, "args": {"data": "DATA"},
        "threshold": None},
    "cls-several": {"task": "cls", "arch": {"name": "backbones.make", "kwargs": {
        "name": "regnetx_002", "in_chans": 1, "num_classes": 4}}, "classes": ["a", "b", "c", "d"], "exclusive": False,
        "bands": [1], "scale": 255.0, "norm": [[0.5], [0.25]], "imgsz": 32, "args": {"data": "resources"},
        "threshold": [0.4, 0.45, 0.5, 0.55]},
    "cls-one": {"task": "cls", "arch": {"name": "backbones.make", "kwargs": {
        "name": "efficientnetv2_b0", "in_chans": 1, "num_classes": 4}}, "classes": ["a", "b", "c", "d"],
        "exclusive": True, "bands": [1], "scale": 255.0, "norm": [[0.0], [1.0]], "imgsz": 32,
        "args": {"data": "resources"}, "threshold": None},
}
KEPT = {"seg-ema": ("model", "ema"), "seg-presence": ("model",), "det-free": ("model", "ema"),
        "det-anchor": ("model",), "cls-several": ("model", "ema"), "cls-one": ("model",)}
EXPECTED = {
        "seg-ema": {"test_img_0": [3541, 31.53, 31.53], "test_img_1": [3569, 31.5, 31.53], "test_img_2": [3548, 31.49,
        31.52]},
        "seg-presence": {"test_img_0": [3641, 32.3, 33.29], "test_img_1": [3659, 33.2, 30.88], "test_img_2": [3630,
        32.5, 30.81]},
        "det-free": {"count": [347], "best scores": [0.5557, 0.5557, 0.5556, 0.5492, 0.5492], "mean": [0.506, 1.88,
        0.0, 92.112, 64.0]},
        "det-anchor": {"count": [713], "best scores": [0.3091, 0.3091, 0.3091, 0.3091, 0.309], "mean": [0.287, 33.648,
        23.599, 27.883, 21.916]},
        "cls-several": {"50000": [1.0, 0.0001, 0.9829, 1.0], "50001": [1.0, 0.0001, 0.9849, 1.0], "50002": [1.0, 0.0,
        0.9843, 1.0], "50003": [1.0, 0.0001, 0.9815, 1.0], "50004": [1.0, 0.0002, 0.9777, 1.0]},
        "cls-one": {"50000": [0.2137, 0.3814, 0.1285, 0.2763], "50001": [0.2249, 0.3677, 0.1299, 0.2775], "50002":
        [0.2255, 0.3665, 0.1297, 0.2783], "50003": [0.2178, 0.3782, 0.1288, 0.2752], "50004": [0.2218, 0.3704, 0.1293,
        0.2784]},
}


def filled(shapes, seed):
    """{name: shape} -> weights that do not depend on torch's random numbers, of a size that keeps signals alive."""
    weights = {}
    for name, shape in sorted(shapes.items()):
        rng = np.random.default_rng((seed, *name.encode()))
        kind = name.rpartition(".")[2]
        if kind == "num_batches_tracked":
            weights[name] = torch.tensor(7)
            continue
        values = rng.standard_normal(shape)
        if kind == "running_var":
            values = 1 + 0.1 * np.abs(values)
        elif kind == "running_mean":
            values = 0.1 * values
        elif len(shape) > 1:
            values = values * (2 / np.prod(shape[1:])) ** 0.5
        elif kind == "weight":
            values = 1 + 0.1 * values
        else:
            values = 0.1 * values
        weights[name] = torch.from_numpy(values).float()
    return weights


def write_state(path, name, shapes):
    """A checkpoint of the first edition; shapes: of its tensors, under its names."""
    anchors = {n: t for n, t in shapes.items() if n.endswith(".anchors")}
    sets = {"model": filled(shapes, 1), "ema": None} | ({"ema": filled(shapes, 2)} if "ema" in KEPT[name] else {})
    for weights in sets.values():
        for n in anchors if weights else ():  # a buffer that the net computes
            strides = torch.tensor([8.0, 16.0, 32.0])[:, None, None]
            weights[n] = torch.tensor(STATES[name]["arch"]["kwargs"]["anchors"]) / strides
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(STATES[name] | sets | {"ema_steps": 3, "step": 5, "steps_per_epoch": 5, "history": [], "scores": [],
                                      "sums": {}}, path)


def results(folder):
    """What a prediction has written, as a few numbers."""
    found = {}
    for file in sorted(Path(folder).glob("masks/*.tif")):
        with rasterio.open(file) as mask:
            pixels = mask.read(1)
        found[file.stem] = [int(pixels.sum()), *np.argwhere(pixels).mean(0).round(2).tolist()] if pixels.any() else [0]
    if (Path(folder) / "coco.json").exists():
        rows = json.loads((Path(folder) / "coco.json").read_text())
        scores, boxes = np.array([row["score"] for row in rows]), np.array([row["bbox"] for row in rows])
        found |= {"count": [len(rows)], "best scores": np.sort(scores)[:-6:-1].round(4).tolist(),
                  "mean": [round(float(v), 3) for v in (scores.mean(), *boxes.mean(0))]}
    if (Path(folder) / "probabilities.csv").exists():
        for line in (Path(folder) / "probabilities.csv").read_text().splitlines()[1:]:
            key, *values = line.split(",")
            found[key] = [round(float(v), 4) for v in values]
    return found


def shapes_of(name):
    """The tensors' names in the first edition and their shapes, by today's net."""
    state = checkpoint.convert(STATES[name] | {"model": {}, "ema": None}, name)
    return {n.replace("aux_cls.", "presence."): t.shape for n, t in nets.build(state["arch"]).state_dict().items()}


@pytest.mark.parametrize("name", STATES)
def test_it_predicts_the_same_numbers(script, tmp_path, monkeypatch, name):
    views = tta.yolov5  # all levels of its views counted then
    monkeypatch.setattr(tta, "yolov5", lambda *size, **options: [view[:2] for view in views(*size, **options)])
    write_wildfire(tmp_path / "Wildfire", train=1)
    write_parking(tmp_path / "DATA", train=1)
    write_dirty(tmp_path / "resources", train=1)
    write_state(tmp_path / "old/best.pt", name, shapes_of(name))
    script(predict, "--task", name[:3], "--weights", "old/best.pt", "--tta", "--device", "cpu", "--amp", "off",
           "--workers", 0, "--out", "out")
    found, expected = results(tmp_path / "out"), EXPECTED[name]
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=0.01, atol=2e-3, err_msg=key)
