"""Run folders: runs/<task>/<name>, one per experiment, never overwritten. Only rank 0 reads and writes them."""
import fcntl
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from utils.errors import UserError
from utils.files import write_json
from utils.train import checkpoint, dist

_locks = []  # open until the process ends: closing the file would release the lock


def create(project, name):
    """Makes and locks the folder `project/name`; the name gets a number if it exists. Returns its path. Raises
    UserError when it cannot be made."""
    for number in itertools.count(1):
        path = Path(project) / (name if number == 1 else f"{name}{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            if path.parent.is_dir():
                continue
            raise UserError(f"{path.parent}: not a folder; choose another one") from None
        except OSError as error:
            raise UserError(f"{path}: the folder cannot be made ({error.strerror}); choose another one") from None
        lock(path)
        return path


def lock(path):
    """Locks the run folder for this process. Raises UserError when another process trains in it."""
    try:
        file = open(path / "lock", "a+")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(launcher())
        file.flush()
    except BlockingIOError:
        raise UserError(f"{path}: another process trains in this run folder; stop it first") from None
    except OSError as error:
        raise UserError(f"{path}: the run folder cannot be written ({error.strerror}); mend its permissions") from None
    _locks.append(file)


def launcher():
    """Identifies this process's torchrun agent, which outlives the workers that it restarts: host, process id, start
    time. Empty without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    agent = os.getppid()
    try:
        since = Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[19]  # process ids are used again
    except OSError:
        since = "?"  # not Linux
    return f"{os.uname().nodename} {agent} {since}"


def restarted(project, name=None):
    """The newest run folder that this torchrun used before it restarted its workers, or None.

    name: the folder's name without its number, because a script may begin several runs. None: any that has saved.
    """
    if not launcher():
        return None
    for path in sorted(project.glob("*/**/lock"), key=_age):
        folder = path.parent
        right = re.fullmatch(re.escape(str(project / name)) + r"\d*", str(folder)) if name else _has_saved(folder)
        if right and path.read_text() == launcher():
            return folder
    return None


def _has_saved(folder):
    return any((folder / file).exists() for file in ("last.pt", "last.pt.prev"))


def newest(project, *files):
    """The first of `files` (such as "best.pt", "last.pt") that exists in the newest run with one of them.

    Raises UserError when there is no such run.
    """
    found = [path for file in files for path in Path(project).glob(f"*/**/{file}")]
    if not found:
        raise UserError(f"{project}: no run with {' or '.join(files)} in it yet; train one first, or give a path")
    folder = min(found, key=_age).parent
    return next(folder / file for file in files if (folder / file).exists())


def _age(path):
    return -path.stat().st_mtime_ns


def open_run(project, name, resume=None):
    """-> (run folder, the checkpoint to go on from or None), the same on every rank.

    resume: None for a new run, "" for the project's newest run, or the path of a checkpoint or a run folder.
    Workers that torchrun has restarted go on in the folder of this name that they used before.
    """
    found = None
    if dist.is_main():
        try:
            found = _open(Path(project), name, resume)
        except UserError as error:
            found = str(error)
    found = dist.broadcast(found)
    if isinstance(found, str):  # rank 0's error, on every rank at once
        raise UserError(found)
    return found


def _open(project, name, resume):
    folder = None if resume else restarted(project, name if resume is None else None)
    if not folder and resume is None:
        return create(project, name), None
    path = folder or Path(resume or newest(project, "last.pt", "last.pt.prev", "args.json"))
    if path.name == "args.json":
        raise UserError(f"{path.parent}: is the newest run, and has no checkpoint; start it again, or name the run to "
                        f"go on with (--resume RUN)")
    path = path / "last.pt" if path.is_dir() else path
    saved = None
    if not folder or _has_saved(folder):  # else it was killed before its first save
        saved = checkpoint.load(path)
        if not {"optimizer", "args"} <= saved.keys():
            raise UserError(f"{path}: holds weights only; resume from the run's last.pt, or start anew with --weights")
    lock(path.parent)
    return path.parent, saved


def new_folder(path):
    """Makes a new folder; its name gets a number if it exists. Returns its path on every rank."""
    path = Path(path)
    if path.name in ("", ".."):  # there is no name to put a number behind
        path = path.resolve()
    return Path(dist.broadcast(str(dist.is_main() and create(path.parent, path.name))))


# ---- run.json, the record of a run, for the table of runs (utils/pictures/table.py) ----------------------------------
def read_record(folder):
    """The values in a run's run.json; {} where there is none yet, or where it is damaged."""
    try:
        return json.loads((folder / "run.json").read_text(encoding="utf-8")) | {}
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def add_record(folder, **values):
    """Adds values to run.json: here the name of the run's score. Raises UserError when it cannot be written."""
    record = read_record(folder)
    if not record.items() >= values.items():
        write_json(folder / "run.json", record | values)


def record_start(folder):
    """Adds {"started", "command", "commit"} to run.json. A resumed run keeps all but the commit. command: the flags as
    they were typed; None if they are not known."""
    old = read_record(folder)
    add_record(folder, started=old.get("started") or time.strftime("%Y-%m-%d %H:%M"),
               command=old.get("command") if old else shlex.join(sys.argv[1:]), commit=commit(Path(__file__).parent))


def commit(folder):
    """The short hash of the git commit in `folder`, with "-dirty" behind it when files differ from it; "" without one.
    """
    # nothing is written: `git describe --dirty` would lock the index, and killed then, stop the user's next commit
    command = ["git", "--no-optional-locks", "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    found = re.match(r"# branch\.oid ([0-9a-f]{7})", done.stdout)
    changed = any(not line.startswith("#") for line in done.stdout.splitlines())
    return found[1] + "-dirty" * changed if found else ""
