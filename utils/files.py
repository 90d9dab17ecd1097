"""Files and folders that appear whole or not at all. Everything but checkpoints is written by these functions."""
import contextlib
import csv
import fcntl
import json
import math
import os
import tempfile
import unicodedata
from pathlib import Path

from utils.errors import UserError


def check_absent(target):
    """Raises UserError when something of that name exists."""
    if os.path.lexists(target):
        raise UserError(f"{target}: exists already; move it away or choose another --out")


@contextlib.contextmanager
def reading(path):
    """While the block runs, an OSError becomes a UserError which says that `path` cannot be read."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check path and permissions") from None


@contextlib.contextmanager
def writing(path, remedy="make room, or choose another folder"):
    """While the block runs, an OSError becomes a UserError which says that `path` cannot be written."""
    try:
        yield
    except ConnectionError:  # the connection to a loader worker or to another rank: not the fault of the file
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); {remedy}") from error


@contextlib.contextmanager
def whole_folder(target):
    """Yields a temporary folder that becomes `target` when the block ends without an error, else nothing is left.

    Raises UserError when `target` exists or cannot be written.
    """
    check_absent(target)
    parent, name = os.path.split(os.path.abspath(target))
    with writing(target):
        os.makedirs(parent, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=f".{name}-") as scratch:  # a sibling: rename is atomic
            os.mkdir(os.path.join(scratch, name))  # scratch itself is private
            yield os.path.join(scratch, name)
            os.rename(os.path.join(scratch, name), target)


@contextlib.contextmanager
def whole_file(path):
    """Yields a temporary name in the same folder, which becomes `path` only when the block ends without an error. Makes
    the folder. Raises UserError when the file cannot be written."""
    path = Path(path)
    temporary = path.with_name(f".new-{path.name}")  # same suffix: Pillow takes the format from it
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path, text):
    """Writes text as UTF-8. Names of files may be any bytes: what is not Unicode is written with a backslash."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path, value, indent=1):
    """Writes plain values as strict JSON: NaN, which JSON does not have, becomes null. indent: None for one line."""
    def strict(value):
        if isinstance(value, dict):
            return {key: strict(inside) for key, inside in value.items()}
        if isinstance(value, (list, tuple)):
            return [strict(inside) for inside in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    write_text(path, json.dumps(strict(value), indent=indent))


def write_csv(path, header, rows):
    """Writes a table: the header's row, then the rows."""
    with whole_file(path) as temporary:
        with open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])


@contextlib.contextmanager
def locked(path):
    """Waits for the lock file `path`, which only one process at a time holds, and holds it while the block runs."""
    with open(path, "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def same_name(name):
    """A file's name in one Unicode form: archives from a Mac store accents and Hangul in another form."""
    return unicodedata.normalize("NFC", name)
