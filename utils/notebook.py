"""A run as one notebook that needs no network: the source files that it uses, its training and its prediction.

    python -m utils.notebook runs/seg/exp              # runs/seg/exp/exp.ipynb

Its first cell has the place of the data and the flags, to be edited where data and weights are mounted elsewhere.
Executed in an empty folder, it trains the same weights, bit by bit on the same machine, and predicts the test images.
"""
import platform
from importlib.metadata import version
from modulefinder import ModuleFinder
from pathlib import Path

from utils.errors import Parser, UserError, cli
from utils.files import check_absent, write_json
from utils.train import checkpoint, runs

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "torchvision", "numpy", "rasterio", "pillow", "tqdm")
FIRST = '''# {folder}, commit {commit}, seed {seed}, with {versions}
DATA = {data!r}
TRAIN = {flags!r}  # flags, as the run was started; of published weights, name the file
PREDICT = ""  # flags, such as --tta; with --weights best.pt, the training below can be left out'''
FILES = '''from pathlib import Path

for name in {names}:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).touch()'''
RUN = '''import shlex
import subprocess
import sys

subprocess.run([sys.executable, {words}], check=True)'''


def sources(*scripts):
    """{name: text} of the scripts and all that they import of the project; of nets/ all, which are found by name."""
    finder, found = ModuleFinder([str(ROOT)]), set()
    for path in (*(ROOT / script for script in scripts), *ROOT.glob("nets/*.py")):
        finder.run_script(str(path))
        found |= {Path(module.__file__) for module in finder.modules.values() if module.__file__}
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(found)}


def cells(folder):
    """Yields the cells of the notebook of a run's folder. Raises UserError for a folder without its records."""
    state, record = checkpoint.load(folder / "last.pt"), runs.read_record(folder)
    if record.get("command") is None:
        raise UserError(f"{folder / 'run.json'}: does not tell how the run was started; train it again")
    task, args = state["task"], state["args"]
    files = sources(f"train_{task}.py", "predict.py")
    versions = [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)]
    yield FIRST.format(folder=folder, commit=record.get("commit"), seed=args["seed"], versions=", ".join(versions),
                       data=args["data"], flags=record["command"])
    yield FILES.format(names=list(files))
    yield from (f"%%writefile {name}\n{text}".rstrip("\n") for name, text in files.items() if text)
    yield RUN.format(words=f'"train_{task}.py", *shlex.split(TRAIN), "--data", DATA, "--project", "runs/{task}"')
    yield RUN.format(words=f'"predict.py", "--task", "{task}", *shlex.split(PREDICT)')


def main():
    parser = Parser(prog="python -m utils.notebook", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--out", metavar="FILE", help="without: in the run's folder")
    args = parser.parse_args()
    out = args.out or args.run / f"{args.run.resolve().name}.ipynb"
    check_absent(out)
    code = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []}
    write_json(out, {"nbformat": 4, "nbformat_minor": 4, "metadata": {}, "cells": [
        code | {"source": source} for source in cells(args.run)]})
    print(f"{out}: edit its first cell where data and weights lie elsewhere")


if __name__ == "__main__":
    cli(main)
