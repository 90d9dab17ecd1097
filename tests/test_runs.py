"""utils/train/runs.py: run folders are never overwritten, belong to one process, and are found again."""
import json
import os
import time

import pytest

from tests.test_checkpoint import forked, one_line, small
from utils.train import checkpoint, runs
from utils.errors import UserError


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def give_locks_back():
    yield
    while runs._locks:
        runs._locks.pop().close()


def free():
    """As if the process that had the runs so far had ended."""
    while runs._locks:
        runs._locks.pop().close()


def written(folder, *files, age=0, step=1):
    """Puts checkpoints of a given age in seconds into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        checkpoint.save(folder / file, small(step) | {"args": {}})
        os.utime(folder / file, (time.time() - age,) * 2)


# ---- new folders -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["exp", "größe 火 with spaces", "-x", "a/b", "x.y", "7"])
def test_names_are_numbered(tmp_path, name):
    project = tmp_path / "new dir" / "ü"
    names = [name, f"{name}2", f"{name}3"]
    assert [runs.create(project, name) for _ in range(3)] == [project / n for n in names]


def test_an_existing_file_or_link_is_left_alone(tmp_path):
    (tmp_path / "exp").write_text("mine")
    (tmp_path / "exp2").symlink_to("nowhere")
    assert runs.create(tmp_path, "exp") == tmp_path / "exp3"
    assert (tmp_path / "exp").read_text() == "mine"


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    for project, name in ((tmp_path / "file", "exp"), (tmp_path / "file" / "below", "exp"), ("/proc/nowhere", "exp"),
                          ("/proc/self", "exp"), (tmp_path, "x" * 300)):
        with pytest.raises(UserError) as caught:
            runs.create(project, name)
        one_line(caught, project)
    assert (tmp_path / "file").read_text() == "mine" and os.listdir(tmp_path) == ["file"]


def test_processes_that_start_together_get_folders_of_their_own(tmp_path):
    begin = time.time() + 0.3

    def child():
        time.sleep(max(begin - time.time(), 0))
        os._exit(len(runs.create(tmp_path, "exp").name))

    pids = []
    for _ in range(8):
        pids.append(os.fork())
        if not pids[-1]:
            child()
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert sorted(codes) == [3] + [4] * 7
    assert sorted(os.listdir(tmp_path)) == ["exp", *(f"exp{n}" for n in range(2, 9))]


# ---- locks -----------------------------------------------------------------------------------------------------------
def test_a_folder_belongs_to_one_process(tmp_path):
    folder = runs.create(tmp_path, "exp")

    def other():
        try:
            runs.lock(folder)
        except UserError as error:
            os._exit(2 if "another process" in str(error) else 3)
        os._exit(0)

    assert forked(other) == 2
    free()
    assert forked(other) == 0


def test_workers_that_outlive_their_run_do_not_keep_its_lock(tmp_path):
    reader, writer = os.pipe()
    main = os.fork()
    if not main:
        runs.create(tmp_path, "exp")
        worker = os.fork()
        if not worker:
            time.sleep(30)
        os.write(writer, str(worker).encode())
        os.kill(os.getpid(), 9)
    os.waitpid(main, 0)
    worker = int(os.read(reader, 20))
    try:
        os.kill(worker, 0)
        runs.lock(tmp_path / "exp")  # raises UserError if not
    finally:
        os.kill(worker, 9)


def test_a_folder_that_cannot_be_written_is_said_to_be_so(tmp_path):
    (tmp_path / "exp" / "lock").mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        runs.lock(tmp_path / "exp")
    one_line(caught, tmp_path / "exp")


# ---- finding them again ----------------------------------------------------------------------------------------------
def test_newest(tmp_path):
    with pytest.raises(UserError) as caught:
        runs.newest(tmp_path / "none", "best.pt", "last.pt")
    one_line(caught, tmp_path / "none", "best.pt or last.pt")
    written(tmp_path / "exp", "best.pt", "last.pt", age=100)
    assert runs.newest(tmp_path, "best.pt", "last.pt") == tmp_path / "exp" / "best.pt"
    (tmp_path / "exp2").mkdir()  # a run that has not saved yet
    (tmp_path / "best.pt").touch()
    assert runs.newest(str(tmp_path), "best.pt", "last.pt") == tmp_path / "exp" / "best.pt"
    written(tmp_path / "exp3", "last.pt", age=50)  # one without validation
    assert runs.newest(tmp_path, "best.pt", "last.pt") == tmp_path / "exp3" / "last.pt"
    written(tmp_path / "exp", "last.pt", age=10)  # the older one was resumed, without becoming better
    assert runs.newest(tmp_path, "best.pt", "last.pt") == tmp_path / "exp" / "best.pt"
    assert runs.newest(tmp_path, "last.pt") == tmp_path / "exp" / "last.pt"


def test_what_resume_may_name(tmp_path):
    written(tmp_path / "old", "last.pt", age=100, step=1)
    written(tmp_path / "new", "last.pt", age=10, step=2)
    for resume, name, step in (("", "new", 2), (tmp_path / "old", "old", 1), (tmp_path / "old" / "last.pt", "old", 1)):
        folder, state = runs.open_run(tmp_path, "exp", resume and str(resume))
        assert (folder, state["step"]) == (tmp_path / name, step)
        free()
    folder, state = runs.open_run(str(tmp_path), "exp")
    assert folder == tmp_path / "exp" and state is None


def test_resume_takes_no_other_run_for_the_newest(tmp_path):
    written(tmp_path / "old", "last.pt", age=100)
    (tmp_path / "new").mkdir()
    (tmp_path / "new/args.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        runs.open_run(tmp_path, "exp", "")
    one_line(caught, tmp_path / "new", "has no checkpoint", "--resume RUN")
    written(tmp_path / "new", "last.pt", age=200, step=3)  # resumed, not yet saved again
    assert runs.open_run(tmp_path, "exp", "")[1]["step"] == 3


def test_a_run_killed_between_two_renames_is_found(tmp_path):
    written(tmp_path / "old", "last.pt", age=100, step=1)
    written(tmp_path / "new", "last.pt.prev", age=10, step=2)
    for resume in ("", str(tmp_path / "new")):
        folder, state = runs.open_run(tmp_path, "exp", resume)
        assert (folder, state["step"]) == (tmp_path / "new", 2)
        free()


def test_what_cannot_be_resumed(tmp_path):
    written(tmp_path / "run", "last.pt")
    state = small()
    del state["optimizer"]
    checkpoint.save(tmp_path / "run" / "best.pt", state)
    checkpoint.save(tmp_path / "run" / "foreign.pt", {key: small()[key] for key in ("task", "arch", "model")})
    (tmp_path / "empty").mkdir()
    for resume in ("run/best.pt", "run/foreign.pt", "empty", "missing", "missing/last.pt"):
        with pytest.raises(UserError) as caught:
            runs.open_run(tmp_path, "exp", str(tmp_path / resume))
        one_line(caught, resume)
    with pytest.raises(UserError):
        runs.open_run(tmp_path / "empty", "exp", "")


# ---- torchrun's restarts ---------------------------------------------------------------------------------------------
def test_restarted_workers_go_on_in_their_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    folder, state = runs.open_run(tmp_path, "exp")
    free()
    monkeypatch.setattr(os, "getppid", lambda: 123456789)  # another torchrun, later
    other, _ = runs.open_run(tmp_path, "exp")
    assert other != folder
    free()
    monkeypatch.undo()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert runs.open_run(tmp_path, "exp") == (folder, None)  # killed before its first checkpoint
    free()
    written(folder, "last.pt.prev", step=1)
    assert runs.open_run(tmp_path, "exp")[1]["step"] == 1  # killed between two renames
    free()
    written(folder, "last.pt", step=2)
    found, state = runs.open_run(tmp_path, "exp")
    assert (found, state["step"]) == (folder, 2)
    free()
    monkeypatch.setattr(os, "getppid", lambda: 987654321)
    assert runs.open_run(tmp_path, "exp") == (tmp_path / "exp3", None)  # killed before it had a folder


def test_restarted_workers_go_on_in_the_folder_of_this_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    folders = [runs.open_run(tmp_path, name)[0] for name in ("exp", "exp-second", "a/b", "a/b.c")]
    free()
    for folder in folders:
        name = str(folder.relative_to(tmp_path))
        assert runs.restarted(tmp_path, name) == folder and runs.open_run(tmp_path, name) == (folder, None)
        free()
    assert runs.restarted(tmp_path, "ex") is None and runs.restarted(tmp_path, "a/b.") is None
    assert runs.restarted(tmp_path) is None  # none has a checkpoint
    written(tmp_path / "exp", "last.pt")
    assert runs.restarted(tmp_path) == tmp_path / "exp"


def test_the_record_of_a_run(tmp_path):
    runs.add_record(tmp_path, score="iou")
    assert json.loads((tmp_path / "run.json").read_text()) == {"score": "iou"}
    (tmp_path / "run.json").write_text('{"started": "today", "score": "iou"}')
    before = (tmp_path / "run.json").stat().st_mtime_ns
    runs.add_record(tmp_path, score="iou")
    assert (tmp_path / "run.json").stat().st_mtime_ns == before
    runs.add_record(tmp_path, score="dice")
    assert json.loads((tmp_path / "run.json").read_text()) == {"started": "today", "score": "dice"}
    (tmp_path / "run.json").write_text("damaged")
    runs.add_record(tmp_path, score="iou")
    assert json.loads((tmp_path / "run.json").read_text()) == {"score": "iou"}


def test_runs_in_folders(tmp_path):
    """--name a/b is a folder of runs, in which they are found again."""
    written(tmp_path / "exp", "last.pt", age=100)
    written(tmp_path / "a" / "b", "last.pt", age=10)
    assert runs.newest(tmp_path, "best.pt", "last.pt") == tmp_path / "a/b/last.pt"


def test_results_that_find_no_place(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file.out: the folder cannot be made .Not a directory.; choose another one"):
        runs.new_folder(tmp_path / "file" / "out")
