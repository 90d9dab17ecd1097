"""utils/pictures/table.py: rows counted by hand from the runs' own files, whatever state these are in."""
import csv
import json
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.harness import toy, toys
from tests.test_runs import free
from tests.test_runs import written as checkpoints
from utils import report
from utils.pictures import cells, table
from utils.train import checkpoint, runs
from utils.train.args import loss_term, setup_run, train_parser
from utils.errors import UserError

COLUMNS = ("run", "date", "metric", "best", "epoch", "minutes", "commit", "flags")


def make(path, scores=(), *, key="iou", command="--lr 0.01"):
    """A run's folder as a script leaves it, one epoch a score, two minutes each."""
    path.mkdir(parents=True)
    if scores:
        cells.write_csv(path / "results.csv", [
            {"epoch": i, "lr": 1e-3, "loss": 2 - i / 10, key: score, "f1": 1 - i / 100, "seconds": 120.0}
            for i, score in enumerate(scores, 1)])
    (path / "run.json").write_text(json.dumps({"started": "2026-01-02 03:04", "commit": "abc1234",
                                               "command": command, "score": key}))
    return path


def rows(*folders):
    """{run's name: row} of all projects, in their order"""
    return {Path(row["run"]).name: row for row in table.rows(folders)}


# ---- rows ------------------------------------------------------------------------------------------------------------
def test_a_row_by_hand(tmp_path):
    make(tmp_path / "seg/exp", [0.5, 0.75, 0.625], command="--no-ema --loss bce dice=0.5")
    assert table.rows([tmp_path]) == [{
        "run": str(tmp_path / "seg/exp"), "date": "2026-01-02 03:04", "metric": "iou", "best": 0.75, "epoch": 2,
        "minutes": 6.0, "commit": "abc1234", "flags": "--no-ema --loss bce dice=0.5"}]
    assert tuple(rows(tmp_path)["exp"]) == COLUMNS


def test_the_best_run_first_and_those_without_a_score_last(tmp_path):
    for name, scores in (("a", [0.2, 0.9]), ("b", [0.95, 0.1]), ("c", ()), ("d", [0.9]), ("e", [float("nan")])):
        make(tmp_path / "seg" / name, scores)
    make(tmp_path / "cls/x", [0.3], key="acc")
    make(tmp_path / "seg/m", [0.99], key="miou")  # another score: not compared with the others
    assert list(rows(tmp_path)) == ["x", "b", "a", "d", "m", "e"]  # and "c" has not trained an epoch yet
    last = rows(tmp_path)["e"]
    assert (last["best"], last["epoch"], last["minutes"]) == (None, None, 2)


def test_a_run_and_a_folder_above_it_are_the_same_runs(tmp_path):
    run = make(tmp_path / "seg/exp", [0.5])
    make(tmp_path / "seg/exp2", [0.25])
    assert [row["run"] for row in table.rows([run])] == [str(run)]
    assert len(table.rows([tmp_path, run, tmp_path / "seg"])) == 2 and table.rows([tmp_path / "missing"]) == []


def test_the_score_is_the_one_that_the_run_names(tmp_path):
    make(tmp_path / "seg/a", [0.5, 0.75], key="kappa")
    make(tmp_path / "seg/b", [0.25], key="iou")
    found = rows(tmp_path)
    assert {name: (row["metric"], row["best"]) for name, row in found.items()} == {"a": ("kappa", 0.75), "b": ("iou", 0.25)}
    note = json.loads((tmp_path / "seg/a/run.json").read_text())
    del note["score"]  # a run without validation
    (tmp_path / "seg/a/run.json").write_text(json.dumps(note))
    assert (rows(tmp_path)["a"]["metric"], rows(tmp_path)["a"]["best"]) == ("", None)


def test_a_resumed_run_has_one_row_and_it_is_the_new_one(tmp_path):
    run = make(tmp_path / "seg/exp", [0.5])
    cells.write_csv(run / "results.csv", [{"epoch": 1, "iou": 0.5, "seconds": 60}, {"epoch": 2, "iou": 0.75}])
    [row] = table.rows([tmp_path])
    assert (row["best"], row["epoch"], row["minutes"]) == (0.75, 2, 1)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe\0", b"[" * 100_000, b"\"a\"",
                                     b"epoch,iou\n1,x\n", b"epoch,iou\n,2\n", b"iou\n3\n", b"epoch,iou\n1,\"2\n"])
def test_a_damaged_run_is_left_out(tmp_path, capsys, content):
    make(tmp_path / "seg/good", [0.5])
    run = make(tmp_path / "seg/bad", [0.25])
    good = rows(tmp_path)
    assert capsys.readouterr().err == ""
    for name in ("results.csv", "run.json"):
        before = (run / name).read_bytes()
        (run / name).write_bytes(content)
        found, said = rows(tmp_path), capsys.readouterr().err.splitlines()
        assert found["good"] == good["good"]
        if name != "results.csv" or content.strip().count(b"\n"):  # one line is a table without rows
            assert list(found) == ["good"] and len(said) == 1
            assert said[0].startswith(f"warning: {run}: damaged, left out (")
        (run / name).write_bytes(before)
    assert rows(tmp_path) == good


# ---- summary.csv -----------------------------------------------------------------------------------------------------
def written(project):
    """{run's name: row} of a summary.csv"""
    with open(project / "summary.csv", newline="", encoding="utf-8") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def test_the_file_is_the_table_of_the_projects_of_the_tasks(tmp_path):
    for name, scores in (("a", [0.25]), ("b", [0.5, 0.75]), ("größe, \"火\"", [0.125])):
        run = make(tmp_path / "seg" / name, scores)
    make(tmp_path / "cls/c", [0.9], key="acc")
    make(tmp_path / "seg/a/predict/below", [0.9])  # of no project here
    table.write(run)
    assert list(written(tmp_path)) == ["cls/c", "seg/b", "seg/a", "seg/größe, \"火\""]
    assert [p.name for p in tmp_path.rglob("summary.csv")] == ["summary.csv"]
    assert written(tmp_path)["seg/b"] == dict(
        run="seg/b", date="2026-01-02 03:04", metric="iou", best="0.75", epoch="2", minutes="4", commit="abc1234",
        flags="--lr 0.01")
    make(tmp_path / "cls/d", [0.5], key="acc")
    table.write(tmp_path / "cls/d")
    assert [*written(tmp_path)] == ["cls/c", "cls/d", "seg/b", "seg/a", "seg/größe, \"火\""]
    make(tmp_path / "other/e", [0.9])
    table.write(tmp_path / "other/e")
    assert [*written(tmp_path / "other")] == ["e"]


def test_the_file_follows_its_runs(tmp_path, monkeypatch):
    """Resumed, renamed, copied, deleted; and whatever stood in it."""
    for name in "abc":
        make(tmp_path / name, [0.5])
    table.write(tmp_path / "a")
    assert [*written(tmp_path)] == ["a", "b", "c"]
    cells.write_csv(tmp_path / "a/results.csv", [{"epoch": i, "iou": i / 8} for i in range(6)])
    (tmp_path / "b").rename(tmp_path / "x")
    shutil.rmtree(tmp_path / "c")
    shutil.copytree(tmp_path / "x", tmp_path / "y")
    (tmp_path / "summary.csv").write_text("by hand")
    monkeypatch.chdir(tmp_path / "x")
    table.write(Path("."))  # as --resume . has it
    assert {run: row["best"] for run, row in written(tmp_path).items()} == {"a": "0.625", "x": "0.5", "y": "0.5"}
    assert sorted(p.name for p in tmp_path.iterdir()) == [".summary.lock", "a", "summary.csv", "x", "y"]


def test_a_project_with_a_summary_is_a_project_as_before(tmp_path, capsys):
    checkpoints(make(tmp_path / "seg/exp", [0.5]), "last.pt")
    before = rows(tmp_path)
    table.write(tmp_path / "seg/exp")
    assert rows(tmp_path) == before and runs.newest(tmp_path / "seg", "last.pt") == tmp_path / "seg/exp/last.pt"
    assert runs.restarted(tmp_path / "seg") is None and runs.create(tmp_path / "seg", "exp").name == "exp2"
    assert runs.create(tmp_path, "summary.csv").name == "summary.csv2"
    free()
    table.write(tmp_path / "seg/exp")
    assert [*written(tmp_path)] == ["seg/exp"] and capsys.readouterr().err == ""  # the new ones have no records yet


def test_damaged_runs_do_not_keep_the_file_from_being_written(tmp_path, capsys):
    make(tmp_path / "good", [0.5])
    contents = (b"", b"[" * 100_000, b"\xff\xfe\0", b"{\"lr\": \"\\ud800\"}", b"{\"started\": {}, \"defaults\": 3}",
                b"epoch,iou\n1,2,3\n", None)
    for i, content in enumerate(contents):
        for name in ("results.csv", "run.json"):
            path = make(tmp_path / f"{i}{name}", [0.25]) / name
            path.unlink()
            path.write_bytes(content) if content is not None else path.mkdir()
    (tmp_path / "loop").symlink_to("loop")
    undecodable = make(tmp_path / os.fsdecode(b"\xff"), [0.25], command="--name \ud800")
    table.write(tmp_path / "good")
    found = written(tmp_path)
    assert found["\\udcff"]["flags"] == "--name \\ud800" and undecodable.is_dir()
    assert found["good"]["best"] == "0.5" and "0run.json" not in found
    assert "0run.json: damaged, left out" in capsys.readouterr().err


def test_a_run_that_is_deleted_meanwhile(tmp_path, monkeypatch):
    make(tmp_path / "exp", [0.5])
    make(tmp_path / "gone", [0.75])
    read = table.read_csv
    monkeypatch.setattr(table, "read_csv", lambda path: shutil.rmtree(tmp_path / "gone", True) or read(path))
    table.write(tmp_path / "exp")
    assert list(written(tmp_path)) == ["exp"]


def test_runs_that_end_together(tmp_path):
    """Each writes what it knows; the last one knows all."""
    for i in range(12):
        make(tmp_path / f"run{i}")
    begin = time.time() + 0.3

    def child(run):
        code = 1
        try:
            time.sleep(max(begin - time.time(), 0))
            for epoch in (1, 2, 3):
                cells.write_csv(run / "results.csv", [{"epoch": epoch, "iou": 0.5}])
                table.write(run)
            code = 0
        finally:
            os._exit(code)

    pids = [os.fork() or child(tmp_path / f"run{i}") for i in range(12)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * 12
    assert {run: row["epoch"] for run, row in written(tmp_path).items()} == {f"run{i}": "3" for i in range(12)}
    assert not list(tmp_path.glob(".new-*"))


def test_places_where_it_cannot_be_written(tmp_path):
    make(tmp_path / "a/exp")
    (tmp_path / "a/summary.csv").mkdir()
    make(tmp_path / "b/exp")
    (tmp_path / "b/.summary.lock").mkdir()
    for project in ("a", "b", "missing"):
        with pytest.raises(UserError, match=f"{project}/summary.csv: cannot be written .*;"):
            table.write(tmp_path / project / "exp")
    assert not (tmp_path / "missing").exists()


@pytest.mark.slow
def test_every_training_that_ends_writes_it(tmp_path):
    toy(tmp_path, "--epochs", 2)
    toy(tmp_path, "--epochs", 1, "--lr", 0.01, "--val", 0)
    toy(tmp_path, "--epochs", 9, "--fault", "term@batch:3", code=143)
    found = written(tmp_path)
    assert {run: row["flags"].replace("--device cpu", "").split() for run, row in found.items()} == {
        "exp": ["--epochs", "2"], "exp2": "--epochs 1 --lr 0.01 --val 0".split()}
    history = checkpoint.load(tmp_path / "exp/last.pt")["history"]
    assert (found["exp"]["metric"], found["exp2"]["metric"]) == ("score", "")
    assert float(found["exp"]["best"]) == pytest.approx(max(row["score"] for row in history), rel=1e-5)
    assert float(found["exp"]["minutes"]) == pytest.approx(sum(row["seconds"] for row in history) / 60, rel=1e-3)
    (tmp_path / "exp2/run.json").write_text("{")
    both = toys(tmp_path, "--resume", tmp_path / "exp3", "--epochs", 1)
    assert [sum("damaged" in line for line in run.err) for run in both] == [1, 0]  # of two processes, the first writes
    assert written(tmp_path)["exp3"]["epoch"] == "1" and len(written(tmp_path)) == 2


def test_a_training_ends_well_without_it(tmp_path):
    (tmp_path / "summary.csv").mkdir()
    run = toy(tmp_path, "--epochs", 1, "--fault", "error@end:1", code=2)  # what comes behind the loop is reached
    assert len(run.err) == 2 and run.err[0].startswith(f"warning: {tmp_path}/summary.csv: cannot be written (Is a dir")
    toy(tmp_path, "--resume")
    assert not list((tmp_path / "summary.csv").iterdir())


# ---- flags -----------------------------------------------------------------------------------------------------------
def test_what_a_run_was_started_with_comes_back(tmp_path, monkeypatch):
    parser = train_parser("x", "seg", data="x", epochs=3, bs=8, imgsz=64, lr=1e-3)
    parser.add_argument("--loss", nargs="+", type=loss_term(("bce", "dice")))
    typed = ["--project", str(tmp_path), "--device", "cpu", "--loss", "bce=0.5", "dice=2", "--weights", "my net.pt"]
    monkeypatch.setattr("sys.argv", ["train_seg.py", *typed])
    free()
    _, _, folder, _ = setup_run(parser, typed)
    cells.write_csv(folder / "results.csv", [{"epoch": 1}])
    assert parser.parse_args(shlex.split(rows(tmp_path)["exp"]["flags"])) == parser.parse_args(typed)


# ---- run.json --------------------------------------------------------------------------------------------------------
def git(folder, *words):
    done = subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=folder, check=True,
                          capture_output=True, text=True)
    return done.stdout.strip()


def test_the_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert runs.commit(tmp_path) == "" and runs.commit(tmp_path / "missing") == ""
    git(tmp_path, "init", "-q")
    assert runs.commit(tmp_path) == ""  # a repository without any
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", "-A"), git(tmp_path, "commit", "-q", "-m", "x"), git(tmp_path, "tag", "-a", "v1", "-m", "x")
    assert runs.commit(tmp_path) == git(tmp_path, "rev-parse", "--short", "HEAD") != ""
    (tmp_path / "code.py").write_text("2")
    assert runs.commit(tmp_path) == git(tmp_path, "rev-parse", "--short", "HEAD") + "-dirty"


def test_git_that_is_missing_or_hangs(tmp_path, monkeypatch):
    def run(*_, **__):
        raise subprocess.TimeoutExpired("git", 10)

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", run)
        assert runs.commit(tmp_path) == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runs.commit(tmp_path) == ""


def test_a_resumed_run_keeps_its_date_and_command(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "commit", lambda folder: "abc")
    monkeypatch.setattr("sys.argv", ["train_seg.py", "--name", "my run"])
    runs.record_start(tmp_path)
    first = json.loads((tmp_path / "run.json").read_text())
    assert first == {"started": first["started"], "commit": "abc", "command": "--name 'my run'"}
    assert abs(time.mktime(time.strptime(first["started"], "%Y-%m-%d %H:%M")) - time.time()) < 200
    (tmp_path / "run.json").write_text(json.dumps(first | {"started": "2020-01-01 00:00"}))
    monkeypatch.setattr(runs, "commit", lambda folder: "def")
    monkeypatch.setattr("sys.argv", ["train_seg.py", "--resume"])
    runs.record_start(tmp_path)
    again = json.loads((tmp_path / "run.json").read_text())
    assert again == {"started": "2020-01-01 00:00", "commit": "def", "command": "--name 'my run'"}
    with pytest.raises(UserError, match="run.json: cannot be written"):
        (tmp_path / "file").write_text("")
        runs.record_start(tmp_path / "file")


# ---- command ---------------------------------------------------------------------------------------------------------
def test_the_command(command, refused, tmp_path):
    make(tmp_path / "runs/seg/exp", [0.5])
    make(tmp_path / "runs/cls/exp", [0.25], key="acc")
    make(tmp_path / "old/cls/exp", [0.25], key="acc")
    done = command(report)  # ./runs
    head, *lines = done.out.splitlines()
    assert done.code == 0 and head.split() == list(COLUMNS) and done.err == ""
    assert [line.split()[0] for line in lines] == ["runs/cls/exp", "runs/seg/exp"]
    assert command(report, "runs/seg", "old").out.count("\n") == 3
    refused(report, "elsewhere", says="elsewhere: no runs below")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_it_runs_as_a_module(tmp_path, monkeypatch, capsys):
    make(tmp_path / "runs/seg/exp", [0.5])
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    runpy.run_module("utils.report", run_name="__main__")
    for name, handler in before.items():
        signal.signal(name, handler)
    assert capsys.readouterr().out.splitlines()[1].startswith(str(tmp_path / "runs/seg/exp"))
