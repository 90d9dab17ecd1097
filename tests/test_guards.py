"""Guards that the mutants of tests/mutants.py showed to have no test of their own."""
import contextlib
import os
import signal
import types
import time

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from torch import nn

from data import images
from data.loader import Loader
from tests.conftest import write_tif
from tests.test_images import VRT
from utils import files
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
        return types.SimpleNamespace(_workers=())
    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", forks)
    try:
        iter(Loader([1, 2], [[0], [1]], 1, "cpu", None))
        assert heard == [signum]
    finally:
        signal.signal(signum, before)


def test_a_lock_is_waited_for(tmp_path):
    """However slow the machine is: nobody enters while another process is inside."""
    with files.locked(tmp_path / "lock"):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException), files.locked(tmp_path / "lock"):
                (tmp_path / "entered").touch()
            os._exit(0)
        time.sleep(0.5)
        assert not (tmp_path / "entered").exists()
    os.waitpid(child, 0)
    assert (tmp_path / "entered").exists()


@pytest.mark.parametrize("head", [b"\x89PNG\r\n\x1a\n", b"II*", b"MM*", b"BM", b"GIF8"])
def test_a_vrt_behind_the_first_bytes_of_another_format(tmp_path, head):
    """The first bytes tell the kind, and GDAL may open the file with the driver of this kind only."""
    secret = write_tif(tmp_path / "secret.tif", np.full((1, 6, 8), 77, np.uint8))
    path = tmp_path / "a.png"
    path.write_bytes(head + VRT.format(secret).encode())
    with rasterio.open(path) as file:  # without our guard it does
        assert (file.read() == 77).all()
    with pytest.raises(UserError, match="a.png: not a"):
        images.read(path)


@pytest.mark.parametrize("name", ["GTIFF_DIR:1:secret.tif", "GTIFF_RAW:secret.tif"])
def test_a_file_whose_name_gdal_takes_for_another_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_tif("secret.tif", np.full((1, 6, 8), 77, np.uint8))
    write_tif(tmp_path / "x.tif", np.zeros((1, 6, 8), np.uint8)).rename(name)
    assert not images.read(name).any() and images.size(name) == (1, 6, 8)


def test_a_jpeg_that_lacks_its_end_marker_only_is_whole(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(path)
    whole, data = images.read(path), path.read_bytes()
    assert data.endswith(b"\xff\xd9")
    path.write_bytes(data[:-2])
    assert torch.equal(images.read(path), whole)
    path.write_bytes(data[:-60])
    with pytest.raises(UserError, match="a.jpg: truncated or damaged"):
        images.read(path)


def test_pixels_of_another_size_than_the_header_says(tmp_path, monkeypatch):
    path = tmp_path / "a.bmp"
    Image.new("RGB", (8, 6)).save(path)
    monkeypatch.setattr(images, "_decode", lambda path, changed: np.zeros((3, 5, 8), np.uint8))
    with pytest.raises(UserError, match="a.bmp: truncated or damaged"):
        images.read(path)
