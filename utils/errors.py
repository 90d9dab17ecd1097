"""What a user can cause is answered in one line: the file, what is wrong with it, and the remedy."""
import argparse
import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback

# in the messages of collectives that lost their other side
LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "DistNetworkError",
        "DistStoreError", "DistBackendError")


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage text
        self.exit(2, f"error: {' '.join(message.split())} (--help lists the flags)\n")


class UserError(Exception):
    """Bad input, bad flags, a full disk: exit code 2. The text is one line naming the file and the remedy."""
    code = 2


class NumericalError(UserError):
    """The run stopped because its numbers are no longer finite: exit code 3."""
    code = 3


class Stopped(BaseException):
    """SIGTERM or Ctrl-C, raised where it is safe to stop: exit code 143 or 130."""

    def __init__(self, signum):
        self.code = 128 + signum


@contextlib.contextmanager
def answers_for(flag):
    """While it is entered, an OSError or ValueError is the fault of what the user gave to this flag."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {error}") from None


def one_line(error):
    """The message of an error; of one that a loader worker passed on, without the worker's traceback."""
    text = str(error).strip()
    if text.startswith("Caught "):
        text = text.splitlines()[-1].partition("Error: ")[2]
    return " ".join(text.splitlines()) or type(error).__name__


def cli(main):
    """Runs a script's `main()` and ends the process: 0; 2 or 3 with one line on stderr; 130, 143 after a signal; 141
    when nobody reads its output any more; 1 with a traceback for what is our fault."""
    def stop(signum, frame):
        raise Stopped(signum)

    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell (>&-): the next file opened would get its number
            setattr(sys, name, open(os.devnull, "w"))
    with contextlib.suppress(AttributeError):  # a stream of somebody else's
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files are any bytes
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        main()
        print(end="", flush=True)
        return
    except SystemExit:  # argparse has said what there is to say
        raise
    except BaseException as caught:
        error = caught
    # nothing is left to be saved: another signal may end the process, and the death of workers is no news
    deaf = False
    while not deaf:
        try:
            for signum in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
                signal.signal(signum, signal.SIG_DFL)
            deaf = True
        except BaseException:  # a handler's, that of torch for the next dead worker: it still came first
            pass
    # a failed process goes at once: the usual shutdown would wait for loader workers and for other ranks
    for child in multiprocessing.active_children():
        child.kill()
    text, code = _verdict(error)
    try:
        print(end="", flush=True)
        if text:
            print(f"error: {text}", file=sys.stderr, flush=True)
    except OSError:
        pass  # nobody listens
    os._exit(code)


def _verdict(error):
    """-> (one line or nothing, exit code); for a fault of ours the traceback, and 1."""
    text, trace = str(error), "".join(traceback.format_exception(error))
    if isinstance(error, Stopped):
        return "", error.code
    if isinstance(error, BrokenPipeError) and "_data_queue" not in trace:  # `| head` has closed our output
        return "", 141
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        error = UserError("out of memory; lower --bs or --imgsz, try --grad-checkpoint, or --tile for large images")
    elif text.startswith(("DataLoader worker", "DataLoader timed out")):
        error = UserError(f"{text.splitlines()[0].rstrip('. ')}; lower --workers, 0 loads in the main process")
    elif isinstance(error, (EOFError, OSError)) and "_data_queue.get(" in trace:  # it died while handing over a batch
        error = UserError("DataLoader worker exited unexpectedly; lower --workers, 0 loads in the main process")
    elif int(os.environ.get("WORLD_SIZE", 1)) > 1 and any(word in trace for word in LOST):
        error = UserError(f"another process of this run has ended or hangs ({text.splitlines()[0]}); see its message, "
                          f"then go on with --resume")
        time.sleep(2)  # torchrun ends this process first where it can: one line, not one per rank
    elif int(os.environ.get("RANK", 0)) > 0:
        time.sleep(2)  # the same, for what rank 0 has to say too
    if isinstance(error, UserError):
        return one_line(error), error.code
    return trace, 1
