"""Files and folders that appear whole or not at all."""
import contextlib
import os
import tempfile
from pathlib import Path

from utils.errors import UserError


def check_absent(target):
    """Raises UserError when there is something of that name."""
    if os.path.lexists(target):
        raise UserError(f"{target}: exists already; move it away or choose another --out")


@contextlib.contextmanager
def whole_folder(target):
    """Yields a temporary folder that becomes `target` if the block ends without an error, else nothing is left.

    Raises UserError when `target` exists or cannot be written.
    """
    check_absent(target)
    parent, name = os.path.split(os.path.abspath(target))
    try:
        os.makedirs(parent, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=f".{name}-") as scratch:     # sibling: rename is atomic
            os.mkdir(os.path.join(scratch, name))                                        # scratch itself is private
            yield os.path.join(scratch, name)
            os.rename(os.path.join(scratch, name), target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error}); check folder and space") from error


@contextlib.contextmanager
def whole_file(path):
    """Yields a temporary name in the same folder, which becomes `path` only if the block ends without an error."""
    path = Path(path)
    temporary = path.with_name(f".new-{path.name}")  # same suffix: Pillow takes the format from it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); check folder and space") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
