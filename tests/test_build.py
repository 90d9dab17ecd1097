"""nets.build: classes are found by name inside the package nets, and nowhere else; parameter counts are those of the
papers' nets and of the systems that this project follows."""
import importlib
import sys

import pytest
import torch

import nets


def count(arch):
    with torch.device("meta"):
        return sum(p.numel() for p in nets.build(arch).parameters())


@pytest.mark.parametrize("name, kwargs, parameters", [
    ("unet.UNet", {}, 3_307_409), ("regnetx_002", {"num_classes": 1000}, 2_684_792),
    ("efficientnet.EfficientNetV2", {"variant": "m"}, 54_139_356), ("efficientnetv2_l_tv", {}, 118_515_272),
    ("efficientnetv2_s", {"in_chans": 1, "num_classes": 26}, 20_210_362),
    ("yolo.YOLOv5", {"variant": "n", "num_classes": 80, "in_chans": 3}, 1_872_157)])
def test_nets_by_name(name, kwargs, parameters):
    assert count({"name": name, "kwargs": kwargs}) == parameters


def test_options_are_not_part_of_the_arch():
    arch = {"name": "regnetx_002", "kwargs": {"in_chans": 2, "num_classes": 5}}
    assert nets.build(arch, grad_checkpoint=True).grad_checkpoint and not nets.build(arch).grad_checkpoint
    assert arch == {"name": "regnetx_002", "kwargs": {"in_chans": 2, "num_classes": 5}}
    with pytest.raises(TypeError):
        nets.build(arch, no_such_option=1)


@pytest.mark.parametrize("name", [
    "mine.Mine", "os.path", "os.system", "subprocess.Popen", "blocks.relu", "regnet.nn", "hrnet.F", "unet.HRNet",
    "..train_seg.main", "nets.unet.UNet", "unet", "UNet", "", ".", "unet.", "unet.__class__", "pretrained.load",
    "utils.losses"])
def test_a_name_never_leads_out_of_the_package(name, monkeypatch):
    asked = []
    monkeypatch.setattr(nets.importlib, "import_module", lambda module, load=importlib.import_module: (
        asked.append(module), load(module))[1])
    with pytest.raises(ValueError, match="no such net"):
        nets.build({"name": name, "kwargs": {}})
    assert all(module.startswith("nets.") for module in asked)


def test_a_new_file_is_a_new_net(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("from torch import nn\nclass Mine(nn.Linear):\n    pass\n")
    (tmp_path / "broken.py").write_text("import no_such_package\n")
    monkeypatch.setattr(nets, "__path__", [*nets.__path__, str(tmp_path)])
    assert nets.build({"name": "mine.Mine", "kwargs": {"in_features": 2, "out_features": 3}}).weight.shape == (3, 2)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):  # the user's own mistake is not hidden
        nets.build({"name": "broken.Net", "kwargs": {}})
    for name in ("nets.mine", "nets.broken"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["regnetx_004", "efficientnetv2_b1", "efficientnetv2_s_tv", "repvgg_a1",
                                  "hrnet_w18_small"])
def test_short_names_are_classifiers_and_encoders(name):
    with torch.device("meta"):
        encoder, classifier = nets.make(name, 4), nets.make(name, 4, 7)
        maps = encoder.features(torch.zeros(1, 4, 64, 64))
        assert classifier(torch.zeros(2, 4, 64, 64)).shape == (2, 7)
    assert [m.shape[1] for m in maps] == list(encoder.channels)
    assert [64 // m.shape[2] for m in maps] == list(encoder.strides)
