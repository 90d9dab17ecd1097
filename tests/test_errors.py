"""utils/errors.py: how a script ends. Every case is a process of its own."""
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from utils.errors import NumericalError, Stopped, UserError, cli, one_line


class Ending:
    """cli(main) in a forked process with its output in files."""

    def __init__(self, folder, main, **env):
        self.folder, self.began = folder, time.monotonic()
        self.pid = os.fork()
        if not self.pid:
            try:
                for name, fd in (("out", 1), ("err", 2)):
                    os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), fd)
                sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
                os.environ.update(env)
                cli(main)
                os._exit(0)
            except SystemExit as error:
                os._exit(100 + error.code)
            except BaseException as error:
                os.write(2, f"escaped: {error!r}".encode())
            os._exit(99)

    def wait(self):
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.seconds = time.monotonic() - self.began
        self.out, self.err = ((self.folder / name).read_text() for name in ("out", "err"))
        return self

    def __iter__(self):
        return iter((self.code, self.err))


def raises(error):
    def main():
        print("said before")
        raise error
    return main


WORKER = ('Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File "x"\n'
          'utils.errors.UserError: a.tif: damaged (OSError: cut); remove it')
CASES = [
    (UserError("a.tif: damaged (OSError: cut); remove it"), 2, "error: a.tif: damaged (OSError: cut); remove it\n"),
    (UserError("two\nlines"), 2, "error: two lines\n"), (UserError(WORKER), 2, "error: " + WORKER[-40:] + "\n"),
    (UserError(""), 2, "error: UserError\n"), (NumericalError("no longer finite"), 3, "error: no longer finite\n"),
    (Stopped(signal.SIGTERM), 143, ""), (Stopped(signal.SIGINT), 130, ""),
    (BrokenPipeError(32, "Broken pipe"), 141, ""), (SystemExit(7), 107, ""),
    (MemoryError(), 2, "error: out of memory; lower --bs or --imgsz, try --grad-checkpoint, or --tile for "
     "large images\n"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), 2, "error: out of memory; lower --bs"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 2, "error: out of memory"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), 2,
     "error: DataLoader worker (pid 7) is killed by signal: Killed; lower --workers"),
    (KeyError("bug"), 1, "error: Traceback (most recent call last):\n")]


@pytest.mark.parametrize("error, code, text", CASES, ids=[f"{type(e).__name__}{i}" for i, (e, *_) in enumerate(CASES)])
def test_endings(tmp_path, error, code, text):
    found, err = end = Ending(tmp_path, raises(error)).wait()
    assert found == code and err.startswith(text)
    assert code == 1 or err.count("\n") == bool(text)
    assert "KeyError: 'bug'" in err or code != 1
    assert end.out == ("said before\n" if code < 100 or code > 128 else "")  # nothing printed is lost
    assert end.seconds < 1.5


def test_a_good_end(tmp_path):
    end = Ending(tmp_path, lambda: print("done")).wait()
    assert (end.code, end.out, end.err) == (0, "done\n", "")


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_a_script_anywhere(tmp_path, signum, code):
    end = Ending(tmp_path, lambda: (print("up", flush=True), time.sleep(60)))
    while "up" not in (tmp_path / "out").read_text() if (tmp_path / "out").exists() else True:
        time.sleep(0.005)
    os.kill(end.pid, signum)
    assert tuple(end.wait()) == (code, "") and end.seconds < 2


def test_its_children_are_killed_and_their_death_is_no_news(tmp_path):
    def main():
        # as torch does while a loader has workers
        signal.signal(signal.SIGCHLD, lambda *_: (_ for _ in ()).throw(RuntimeError("DataLoader worker is killed")))
        for _ in range(4):
            child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
            child.start()
            print(child.pid)
        raise UserError("the reason; the remedy")

    end = Ending(tmp_path, main).wait()
    assert tuple(end) == (2, "error: the reason; the remedy\n")
    time.sleep(0.2)
    for stat in (Path(f"/proc/{pid}/stat") for pid in end.out.split()):
        assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_more_of_its_workers_die_while_it_ends(tmp_path):
    """Each death raises, wherever the process is, until the handlers are off: what came first is told all the same."""
    def main():
        set_handler, deaths = signal.signal, iter(range(3))

        def late(signum, handler):
            if next(deaths, None) is not None:
                os.kill(os.getpid(), signal.SIGCHLD)
            return set_handler(signum, handler)

        signal.signal(signal.SIGCHLD, lambda *_: (_ for _ in ()).throw(RuntimeError("DataLoader worker is killed")))
        signal.signal = late
        raise UserError("the reason; the remedy")

    assert tuple(Ending(tmp_path, main).wait()) == (2, "error: the reason; the remedy\n")


def test_a_rank_lets_torchrun_end_it_before_it_repeats_the_others(tmp_path):
    """Rank 0 speaks at once, the others after 2 s; in them a SIGTERM ends the process silently."""
    group = {"WORLD_SIZE": "2"}
    lost = RuntimeError("[/x/pair.cc:553] Connection closed by peer [127.0.0.1]:25301")
    def ending(name, error, **env):
        (tmp_path / name).mkdir()
        return Ending(tmp_path / name, raises(error), **env)

    late = [ending("a", UserError("x"), RANK="1", **group), ending("b", lost, RANK="0", **group),
            ending("c", lost, RANK="1", **group)]
    early = [ending("d", UserError("x"), RANK="0", **group).wait(), ending("e", lost).wait()]
    stopped = ending("f", UserError("x"), RANK="1", **group)
    time.sleep(0.5)
    os.kill(stopped.pid, signal.SIGTERM)
    assert tuple(stopped.wait()) == (-signal.SIGTERM, "") and stopped.seconds < 2
    assert early[0].code == 2 and early[0].err == "error: x\n" and early[0].seconds < 1.5
    assert early[1].code == 1 and "Connection closed by peer" in early[1].err  # one process has no others to lose
    for end in late:
        assert end.wait().code == 2 and 2 < end.seconds < 5 and end.err.count("\n") == 1
        assert ("another process of this run has ended" in end.err) == (end is not late[0])


def test_one_line():
    assert one_line(UserError("  a  b ")) == "a  b" and one_line(ValueError()) == "ValueError"
    assert one_line(UserError("x (Error: y)")) == "x (Error: y)"


def test_messages_are_plain_wherever_they_are_written():
    """A name from the data in a list of failed files, which somebody shows in a terminal."""
    assert str(UserError("a.csv: \x1b[31m, \0 and \x9b have no image, größe has")) == \
        "a.csv: \\x1b[31m, \\x00 and \\x9b have no image, größe has"
