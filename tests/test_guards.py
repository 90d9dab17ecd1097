"""Guards that the mutants of tests/mutants.py showed to have no test of their own."""
import os
import signal

import pytest
import torch
from torch import nn

from data.loader import Loader
from utils.errors import NumericalError, UserError
from utils.train import checkpoint
from utils.train.state import State


@pytest.mark.parametrize("content", [{"w": torch.zeros(2)}, {"task": "toy", "model": {}}])
def test_foreign_files_are_told_from_damaged_ones(tmp_path, content):
    """Who gives published weights where a checkpoint belongs learns where they go."""
    path = tmp_path / "foreign.pt"
    torch.save(content, path)
    with pytest.raises(UserError, match="holds no net of this project; published weights go to"):
        checkpoint.load(path)


def test_gradients_whose_norm_overflows_stop_the_run():
    """Finite loss, finite gradients, finite weights: clipping would make these gradients zero, and the net would learn
    nothing from then on."""
    torch.manual_seed(0)
    net = nn.Linear(4, 2)
    state = State(net, torch.optim.SGD(net.parameters(), lr=1e-30), lambda step, scores: 1.0,
                  device=torch.device("cpu"), amp="off", clip=1.0)
    for group in state.optimizer.param_groups:
        group["initial_lr"] = 1e-30
    state.train_batch(lambda model, batch: (model(batch["x"]).sum() * 1e25, {}), {"x": torch.ones(3, 4)}, 0, 1)
    assert all(p.isfinite().all() for p in net.parameters()) and not state.finite
    with pytest.raises(NumericalError, match="no longer finite"):
        state.check()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_fork_of_workers_is_heard_after_it(monkeypatch, signum):
    heard = []
    before = signal.signal(signum, lambda number, frame: heard.append(number))

    def forks(self):
        os.kill(os.getpid(), signum)
        assert heard == []
        return "workers"
    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", forks)
    try:
        assert iter_of(Loader([1, 2], [[0], [1]], 0, "cpu", None)) == "workers"
        assert heard == [signum]
    finally:
        signal.signal(signum, before)


def iter_of(loader):
    """Loader.__iter__, whose result need not be an iterator here."""
    return type(loader).__iter__(loader)
