"""utils/train/loggers.py: the calls that TensorBoard and Weights & Biases get."""
import sys
import types

import pytest

from utils.errors import UserError
from utils.train.loggers import make_loggers


class Fake:
    """Stands for tensorboard's SummaryWriter and for wandb: remembers every call."""
    id = "abc123"

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


@pytest.fixture
def fake(monkeypatch):
    """Both packages, replaced."""
    fake = Fake()

    def start(name):
        def call(*args, **kwargs):
            fake.calls.append((name, args, kwargs))
            return fake
        return call

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=start("writer")))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=start("init")))
    return fake


def test_loggers_that_nobody_asked_for_do_nothing(tmp_path, fake):
    assert make_loggers(tmp_path) == [] and fake.calls == [] and list(tmp_path.iterdir()) == []


def test_tensorboard_gets_every_number(tmp_path, fake):
    ((log, close),) = make_loggers(tmp_path, tensorboard=True)
    log({"loss": 0.5, "epoch": 3}, 3)
    close()
    assert fake.calls == [("writer", (str(tmp_path),), {}), ("add_scalar", ("loss", 0.5, 3), {}),
                          ("add_scalar", ("epoch", 3, 3), {}), ("close", (), {})]


def test_wandb_resumes_its_own_run(tmp_path, fake, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    folder = tmp_path / "seg" / "exp3"
    folder.mkdir(parents=True)
    ((log, close),) = make_loggers(folder, wandb=True, config={"lr": 1e-3})
    log({"iou": 0.5}, 7)
    close()
    (start, _, given), log, finish = fake.calls
    assert start == "init" and given == {"project": "seg", "name": "exp3", "dir": str(folder), "id": None,
                                         "resume": "allow", "config": {"lr": 1e-3}}
    assert log == ("log", ({"iou": 0.5},), {"step": 7}) and finish == ("finish", (), {})
    assert (folder / "wandb_id.txt").read_text() == "abc123"
    fake.calls.clear()
    monkeypatch.setenv("WANDB_PROJECT", "other")
    make_loggers(folder, wandb=True)
    given = fake.calls[0][2]
    assert (given["id"], given["name"], given["project"]) == ("abc123", "exp3", "other")


def test_wandb_that_cannot_start_is_one_line(tmp_path, fake, monkeypatch):
    def no_account(**_):
        raise ValueError("api_key\nnot configured")

    monkeypatch.setattr(sys.modules["wandb"], "init", no_account)
    with pytest.raises(UserError, match=r"api_key not configured.*WANDB_MODE=offline") as error:
        make_loggers(tmp_path, wandb=True)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_missing_package_is_a_user_error(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(package, package), None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        make_loggers(tmp_path, **{package: True})
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))  # a stray folder of that name
    if package == "wandb":
        with pytest.raises(UserError, match="pip install wandb"):
            make_loggers(tmp_path, wandb=True)
