"""Files: reading them, with one answer for those that cannot be read, and writing them whole or not at all. Everything
is written by these functions."""
import csv
import fcntl
import gc
import hashlib
import io
import json
import os
import reprlib
import stat
import tempfile
import unicodedata
import zlib
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from utils.errors import UserError


short = reprlib.Repr()
short.maxstring = short.maxother = 200
show = short.repr  # a value in a message stays short, and in one line


LARGEST_TEXT = 4 * 10**9  # bytes; COCO's own files have 0.5 * 10**9


# ---- reading ---------------------------------------------------------------------------------------------------------
@contextmanager
def reading(path):
    """While the block runs, an OSError becomes a UserError which says that `path` cannot be read."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check path and permissions") from None


def read_bytes(path):
    """The content of a regular file of text, at most LARGEST_TEXT bytes. Raises UserError."""
    with reading(path):
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):  # a pipe would block
            raise UserError(f"{path}: not a regular file; replace or remove it")
        if found.st_size > LARGEST_TEXT:
            raise UserError(f"{path}: has {found.st_size:,} bytes, at most {LARGEST_TEXT:,} are read; divide it")
        return Path(path).read_bytes()


def unique(pairs):
    """[(key, value)] -> dict. Raises ValueError for a key that stands twice."""
    entry = dict(pairs)
    if len(entry) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {show(twice)} stands twice in one object")
    return entry


@contextmanager
def many_objects():
    """While the block runs, Python does not search for garbage: with millions of new objects, this takes most of the
    time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def read_json(path):
    """A JSON file's content. Raises UserError for what is not JSON, and for a key that stands twice in one object."""
    try:
        with many_objects():
            return json.loads(read_bytes(path), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); correct or replace it") from None


def read_csv(path, remedy="replace it"):
    """The rows of a CSV file in UTF-8, with or without byte order mark, also the empty ones. Raises UserError."""
    try:
        return list(csv.reader(io.StringIO(read_bytes(path).decode("utf-8-sig"), newline=""), strict=True))
    except (UserError, UnicodeDecodeError, csv.Error) as error:
        reason = str(error).removeprefix(f"{path}: ").partition(";")[0]
        raise UserError(f"{path}: not a readable CSV ({reason}); {remedy}") from None


def same_name(name):
    """A file's name in one Unicode form: archives from a Mac store accents and Hangul in another form."""
    return unicodedata.normalize("NFC", name)


def by_name(files, name_of, root=""):
    """{name_of(file): file} of files in `root`. UserError for two files of one name."""
    found = {}
    for file in files:
        other = found.setdefault(name_of(file), file)
        if other != file:
            raise UserError(f"{os.path.join(root, file)}: {other} has the same name; rename or remove one")
    return found


def folder_of(path):
    """The folder of a data set whose path is that folder or a file in it."""
    return os.path.dirname(path) if os.path.isfile(path) else path


def list_tree(root):
    """The files in a folder and in all folders in it: paths relative to it, a folder's files before its folders. Raises
    UserError for the root of the file system."""
    if os.path.abspath(root) == os.path.abspath(os.sep):
        raise UserError(f"{root}: is the whole file system; name the folder of the data")
    found = []
    for top, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.normpath(os.path.join(os.path.relpath(top, root), name)) for name in sorted(names)
                  if not name.startswith(".")]
    return found


def finder(paths):
    """{path: value} -> function(name) -> the value of the one path that ends with the name, which may lack the suffix;
    None where there is none or are several. Folders at the start of the name that no path has are ignored."""
    found, folders = {}, {word for path in paths for word in path.split("/")[:-1]}
    for path, value in paths.items():
        for whole in {path, os.path.splitext(path)[0]}:
            words = same_name(whole).split("/")
            for i in range(len(words)):
                tail = "/".join(words[i:])
                found[tail] = value if found.get(tail, value) == value else None

    def find(name):
        words = os.path.normpath(same_name(name).replace("\\", "/")).split("/")
        while len(words) > 1 and "/".join(words) not in found and words[0] not in folders:
            words = words[1:]
        return found.get("/".join(words))
    return find


# ---- writing ---------------------------------------------------------------------------------------------------------
def check_absent(target):
    """Raises UserError when something of that name exists."""
    if os.path.lexists(target):
        raise UserError(f"{target}: exists already; move it away or choose another --out")


ROOM = "make room, or choose another folder"


@contextmanager
def writing(path, remedy=ROOM):
    """While the block runs, an OSError becomes a UserError which says that `path` cannot be written."""
    try:
        yield
    except ConnectionError:  # the connection to a loader worker or to another rank: not the fault of the file
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); {remedy}") from error


@contextmanager
def whole_folder(target):
    """Yields a temporary folder that becomes `target` when the block ends without an error, else nothing is left.

    Raises UserError when `target` exists or cannot be written.
    """
    check_absent(target)
    parent, name = os.path.split(os.path.abspath(target))
    with writing(target):
        os.makedirs(parent, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=f".{name}-") as scratch:  # a sibling: rename is atomic
            whole = os.path.join(scratch, name)  # in it, because scratch itself has private permissions
            os.mkdir(whole)
            yield whole
            os.rename(whole, target)


@contextmanager
def whole_file(path, remedy=ROOM):
    """Yields a temporary name in the same folder, which becomes `path` only when the block ends without an error. Makes
    the folder. Raises UserError when the file cannot be written."""
    path = Path(path)
    temporary = path.with_name(f".new-{path.name}")  # same suffix: Pillow takes the format from it
    try:
        with writing(path, remedy):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path, text):
    """Writes text as UTF-8. Names of files may be any bytes: what is not Unicode is written with a backslash."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def _json(value, indent=None):
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(json.loads(json.dumps(value), parse_constant=lambda name: None), indent=indent)


def write_json(path, value, indent=1):
    """Writes plain values as strict JSON: NaN and infinity, which JSON does not have, become null. indent: None for one
    line."""
    write_text(path, _json(value, indent))


def write_json_list(path, parts, head="[", tail="]"):
    """Writes the items of the lists `parts`, an iterable, as one JSON list between head and tail. Only one of the parts
    is in memory at a time."""
    with whole_file(path) as temporary, open(temporary, "w", encoding="ascii") as file:
        file.write(head)
        comma = ""
        for items in filter(None, parts):
            file.write(comma + _json(items)[1:-1])
            comma = ", "
        file.write(tail)


def write_csv(path, header, rows):
    """Writes a table: the header's row, then the rows."""
    with whole_file(path) as temporary:
        with open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])


@contextmanager
def locked(path):
    """Waits for the lock file `path`, which only one process at a time holds, and holds it while the block runs."""
    with open(path, "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


# ---- keeping what was found ------------------------------------------------------------------------------------------
def store_of(cache, what, root, variant=None):
    """The file in the folder `cache` for what is kept of a data set. None: a name at which nothing can be written."""
    key = hashlib.sha256(repr((os.path.realpath(root), variant)).encode()).hexdigest()[:16]
    return Path(cache or os.devnull) / f"{what}-{key}.z"


@contextmanager
def kept_values(store):
    """Yields the dict in the file `store`, {} where there is none or it is damaged; the block's changes are written.

    One process at a time is in the block; the others, of other runs too, then find its results. Where the file cannot
    be written or locked, every process works for itself.
    """
    known = {}
    with ExitStack() as stack:
        with suppress(OSError):
            store.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(store.with_suffix(".lock")))
        with suppress(OSError, ValueError, TypeError, zlib.error), many_objects():
            known = dict(json.loads(zlib.decompress(store.read_bytes())))
        before = dict(known)
        yield known
        if known != before:
            with suppress(UserError), whole_file(store) as temporary:
                temporary.write_bytes(zlib.compress(json.dumps(known).encode(), 1))


def stamps_of(files):
    """Per file [bytes, time of the last change], or None when it cannot be read, which its reader will tell."""
    def stamp(file):
        with suppress(OSError):
            found = os.stat(file)
            return [found.st_size, found.st_mtime_ns]
    return list(map(stamp, files))
