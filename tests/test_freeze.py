"""--freeze: frozen layers keep weights and running statistics bit by bit, in every average, also when the run is resumed."""
import pytest
import torch

import nets
from nets import pretrained
from nets.unet import UNet
from nets.yolo import YOLOv5
from tests.harness import differences
from tests.test_engine import no_plots  # noqa: F401, a fixture
from tests.test_swa import averaged
from tests.toy import Net
from utils.errors import UserError
from utils.train import args as flags
from utils.train import checkpoint


def frozen_net():
    torch.manual_seed(3)
    net = Net(dropout=0.3)
    for norm in (net.norm1, net.norm2):
        norm.running_mean.uniform_(-1, 1), norm.running_var.uniform_(0.5, 2)
    pretrained.freeze(net, 2)  # conv1, norm1
    return net


def test_a_run_with_frozen_layers(tmp_path):
    """Two of the layers stay, the others change; a resumed run ends with the same bits."""
    before = {name: tensor.clone() for name, tensor in frozen_net().state_dict().items()}
    state = averaged(tmp_path / "a", net=frozen_net(), epochs=4)
    written = [checkpoint.load(tmp_path / "a" / "swa.pt")["model"], state.model.state_dict(), state.ema.module.state_dict()]
    for found in written:
        for name, tensor in before.items():
            stays = name.startswith(("conv1", "norm1"))
            assert stays or tensor.ndim == 0 or not torch.equal(found[name], tensor), name
            assert not stays or torch.equal(found[name], tensor), name
    averaged(tmp_path / "b", net=frozen_net(), epochs=2, total=4)
    averaged(tmp_path / "b", net=frozen_net(), epochs=4, resume=True)
    found = differences(*(checkpoint.load(tmp_path / run / "last.pt") for run in "ab"))
    assert [name for name in found if not name.endswith("/seconds")] == []


def frozen(net):
    return {name.partition(".")[0] if name.startswith(("enc", "s", "h", "c", "b", "d")) else int(name.split(".")[1])
            for name, p in net.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("make, part, expected", [
    (lambda: YOLOv5("n"), 10, set(range(10))), (lambda: YOLOv5("n"), "backbone", set(range(10))),
    (lambda: YOLOv5("n6"), "backbone", set(range(12))), (lambda: YOLOv5("n"), 99, set(range(24))),
    (lambda: YOLOv5("n"), None, set()), (lambda: nets.make("regnetx_002", 3, 4), "backbone", {"stem", "s1", "s2", "s3", "s4"}),
    (lambda: nets.make("regnetx_002", 3, 4), 2, {"stem", "s1"}), (lambda: UNet(in_chans=3), "backbone", {"encoder"}),
    (lambda: nets.make("efficientnetv2_b0", 3, 4), "backbone", {"conv_stem", "bn1", "blocks"})])
def test_which_layers(make, part, expected):
    """Layers without weights (concatenation, upsampling) have nothing to freeze."""
    with torch.device("meta"):
        net = make()
    pretrained.freeze(net, part)
    weighted = {name for name in expected if not isinstance(name, int) or any(True for _ in net.model[name].parameters())}
    assert frozen(net) == weighted
    net.train()
    assert not any(m.training for m in net.modules() if (ps := list(m.parameters())) and not any(p.requires_grad for p in ps))


def test_the_flag(tmp_path):
    parser = flags.train_parser("Toy.", "det", data="x", epochs=1, bs=4, imgsz=64, lr=0.1)
    assert [parser.parse_args(["--freeze", text]).freeze for text in ("backbone", "10")] == ["backbone", 10]
    with pytest.raises(UserError, match="--freeze: does nothing without --weights"):
        flags.setup_run(parser, ["--freeze", "10", "--project", str(tmp_path)])
    assert "freeze" in flags.KEPT
