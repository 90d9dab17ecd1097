"""Imports go down, nothing below a script sees `args`, and at run time six packages are enough."""
import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {"nets": {"nets"}, "data": {"data", "utils"}, "utils": {"utils"}}
PACKAGES = {"torch", "torchvision", "numpy", "rasterio", "PIL", "tqdm"}
FILES = sorted(p for folder in MAY_IMPORT for p in (ROOT / folder).glob("*.py"))
SCRIPTS = sorted(ROOT.glob("*.py"))


def imports(path):
    """Top-level names of all modules that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module.partition(".")[0]


def test_there_are_files():
    assert len(FILES) > 20 and {"train_seg.py", "train_det.py", "predict.py"} <= {p.name for p in SCRIPTS}


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_imports_go_down(path):
    own = {name for name in imports(path) if name in {*MAY_IMPORT, "tests", *(p.stem for p in SCRIPTS)}}
    assert own <= MAY_IMPORT[path.parent.name]


@pytest.mark.parametrize("path", FILES + SCRIPTS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_six_packages(path):
    own = {*MAY_IMPORT, *(p.stem for p in SCRIPTS)}
    assert set(imports(path)) - own <= PACKAGES | set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", [p for p in FILES if p.name not in ("args.py", "sample.py")],
                         ids=lambda p: f"{p.parent.name}/{p.name}")
def test_nothing_below_a_script_sees_args(path):
    seen = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    assert not [text for text in seen if text.startswith(("args.", "opt."))]
