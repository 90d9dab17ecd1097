"""Imports go down, nothing below a script sees `args`, and at run time six packages are enough."""
import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {"nets": {"nets", "utils"}, "data": {"data", "utils"}, "utils": {"utils"}}
PACKAGES = {"torch", "torchvision", "numpy", "rasterio", "PIL", "tqdm"}
FILES = sorted(p.relative_to(ROOT) for folder in MAY_IMPORT for p in (ROOT / folder).rglob("*.py"))
SCRIPTS = sorted(p.relative_to(ROOT) for p in ROOT.glob("*.py"))
COMMANDS = {"__main__.py", "dirty_mnist.py", "report.py", "flags.py"}  # modules that are about a command line


def tree(path):
    return ast.parse((ROOT / path).read_text())


def imports(path):
    """Top-level names of all modules that a file imports, also inside functions."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module.partition(".")[0]


def is_command(path):
    """Whether a module of utils is started as `python -m utils.NAME`: then it is a script, which nothing imports."""
    return path.parent == Path("utils") and '\nif __name__ == "__main__":' in (ROOT / path).read_text()


def test_there_are_files():
    assert len(FILES) > 20 and {"train_seg.py", "train_det.py", "train_cls.py", "predict.py"} <= set(map(str, SCRIPTS))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_down(path):
    own = {name for name in imports(path) if name in {*MAY_IMPORT, "tests", *(p.stem for p in SCRIPTS)}}
    assert own <= MAY_IMPORT[path.parts[0]] or is_command(path)


def test_nothing_imports_a_command():
    names = {path.stem for path in FILES if is_command(path)}
    assert {"export", "notebook"} <= names
    for path in FILES + SCRIPTS:
        for node in ast.walk(tree(path)):
            found = {alias.name for alias in getattr(node, "names", ()) if isinstance(alias, ast.alias)}
            if isinstance(node, ast.ImportFrom):
                found = {node.module, *(f"{node.module}.{name}" for name in found)}
            assert not {f"utils.{name}" for name in names} & found, path


@pytest.mark.parametrize("path", FILES + SCRIPTS, ids=str)
def test_six_packages(path):
    own = {*MAY_IMPORT, *(p.stem for p in SCRIPTS)}
    assert set(imports(path)) - own <= PACKAGES | set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", [p for p in FILES if p.name not in COMMANDS and p.parent.name != "train"], ids=str)
def test_no_function_below_a_script_takes_args(path):
    """What a function needs are its parameters; flags are parsed in scripts, and in utils/train/args.py."""
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, (ast.FunctionDef, ast.Lambda))]
    names = {a.arg for f in functions for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)}
    assert not names & {"args", "opt"}
