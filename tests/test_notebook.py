"""utils/notebook.py: the cells of a run's notebook, executed in an empty folder, train its weights."""
import json

import pytest
import torch

import train_cls
import train_det
import train_seg
from tests.conftest import TINY, TINY_CLS, TINY_DET, write_dirty, write_parking, write_wildfire
from utils import notebook
from utils.errors import UserError
from utils.train import checkpoint, runs

RUNS = {"seg": (train_seg, TINY, write_wildfire), "det": (train_det, TINY_DET, write_parking),
        "cls": (train_cls, TINY_CLS, write_dirty)}


def execute(path, until=None):
    """Runs the cells as Jupyter does, in the current folder."""
    names = {}
    for cell in json.loads(path.read_text())["cells"][:until]:
        assert cell["cell_type"] == "code" and cell["outputs"] == [] and cell["execution_count"] is None
        first, _, rest = cell["source"].partition("\n")
        if first.startswith("%%writefile "):
            assert rest.strip()  # Jupyter refuses an empty cell
            with open(first.split(maxsplit=1)[1], "w", encoding="utf-8") as file:
                file.write(rest + "\n")
        else:
            exec(cell["source"], names)


@pytest.mark.parametrize("task, until", [("seg", -1), *(pytest.param(task, None, marks=pytest.mark.slow)
                                                         for task in RUNS)])
def test_a_notebook_trains_the_weights_of_its_run(command, refused, tmp_path, monkeypatch, task, until):
    script, flags, write = RUNS[task]
    write(tmp_path / "my data", train=8)
    more = ["--folds", "0", "--bands", "2-8", "--gain", "0.3"] if task == "seg" else ["--folds", "0", "--gain", "0.3"]
    done = command(script, "--data", tmp_path / "my data", *flags, *more, "--seed", 7, "--name", "mine", seconds=300)
    assert done.code == 0, done.err
    made = command(notebook, f"runs/{task}/mine")
    assert made.code == 0, made.err
    refused(notebook, f"runs/{task}/mine", says=["mine.ipynb: exists"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in `command`
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    execute(tmp_path / f"runs/{task}/mine/mine.ipynb", until)
    first, second = (torch.load(path / f"runs/{task}/{name}/last.pt", weights_only=True)
                     for path, name in ((tmp_path, "mine"), (tmp_path / "empty", "mine")))
    for part in ("model", "ema"):
        assert first[part].keys() == second[part].keys()
        assert all(torch.equal(first[part][name], second[part][name]) for name in first[part])
    assert (tmp_path / f"empty/runs/{task}/mine/predict").exists() == (until is None)  # the last cell predicts


def test_what_a_notebook_has():
    found = notebook.sources("train_seg.py", "predict.py")
    assert {"train_seg.py", "predict.py", "nets/unet.py", "nets/hrnet.py", "utils/__init__.py", "data/augment/mix.py",
            "utils/train/engine.py"} <= found.keys() and "train_det.py" not in found
    assert found["train_seg.py"].startswith('"""Segmentation') and not any(name.startswith("/") for name in found)


def test_no_run(command, tmp_path):
    done = command(notebook, "runs/seg/none")
    assert done.code == 2 and "no such checkpoint" in done.lines[0]


def test_a_run_of_an_earlier_edition(tmp_path):
    """The flags with which it is resumed are not those with which it was started."""
    (tmp_path / "run.json").write_text('{"started": "2026-01-01 10:00"}')
    runs.record_start(tmp_path)
    checkpoint.save(tmp_path / "last.pt", {"task": "seg", "arch": {"name": "unet.UNet", "kwargs": {}}, "model": {},
                                           "input": {}})
    with pytest.raises(UserError, match="run.json: does not tell how the run was started; train"):
        next(notebook.cells(tmp_path))
