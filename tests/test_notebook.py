"""utils/notebook.py: the cells of a run's notebook, executed in an empty folder, train its weights."""
import json
import shlex

import pytest
import torch

import train_cls
import train_det
import train_seg
from tests.conftest import TINY, TINY_CLS, TINY_DET, write_dirty, write_parking, write_wildfire
from utils import notebook
from utils.pictures import table

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
                     for path, name in ((tmp_path, "mine"), (tmp_path / "empty", "exp")))
    for part in ("model", "ema"):
        assert first[part].keys() == second[part].keys()
        assert all(torch.equal(first[part][name], second[part][name]) for name in first[part])
    assert (tmp_path / f"empty/runs/{task}/exp/predict").exists() == (until is None)  # the last cell predicts


def test_what_a_notebook_has():
    found = notebook.sources("train_seg.py", "predict.py")
    assert {"train_seg.py", "predict.py", "nets/unet.py", "nets/hrnet.py", "utils/__init__.py", "data/augment/mix.py",
            "utils/train/engine.py"} <= found.keys() and "train_det.py" not in found
    assert found["train_seg.py"].startswith('"""Segmentation') and not any(name.startswith("/") for name in found)


@pytest.mark.parametrize("script, argv", [
    (train_seg, "--bands 7,5,3 --class-weights 1,20.5 --pixel-scale 0.3,2500,1 --drop-noisy noise.csv:20 --decoder"),
    (train_seg, "--loss bce=0.5 dice --extra-data a:0.5 'b c' --border reflect wrap --conv0 8 8 --no-ema --lr 0.00123456"),
    (train_det, "--stages 50,15 --zoom 0.3 1.7 --weight-decay 1e-05 --pixel-scale standard --no-autoanchor"),
    (train_cls, "--columns image label --hflip 0.1 --class-weights balanced --weights 'my net.pt'")])
def test_flags_come_back(monkeypatch, script, argv):
    monkeypatch.setattr("sys.argv", ["x"])
    parser = script.make_parser()
    chosen, defaults = (json.loads(json.dumps(vars(parser.parse_args(words)))) for words in (shlex.split(argv), []))
    again = parser.parse_args(shlex.split(table.flags(chosen, defaults)))
    assert chosen != defaults and json.loads(json.dumps(vars(again))) == chosen


def test_no_run(command, tmp_path):
    done = command(notebook, "runs/seg/none")
    assert done.code == 2 and "no such checkpoint" in done.lines[0]
