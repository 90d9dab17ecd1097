"""What a user can cause is answered in one line: the file, what is wrong with it, and the remedy."""
import argparse
import errno
import multiprocessing
import os
import signal
import sys
import time
import traceback
from contextlib import contextmanager, suppress

# words in the messages of collectives whose other side is gone
LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "DistNetworkError",
        "DistStoreError", "DistBackendError")


STEERING = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\r\t"}


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage text
        self.exit(2, f"error: {' '.join(message.split())} (--help lists the flags)\n")


class UserError(Exception):
    """Bad input, bad flags, a full disk: exit code 2. The text is one line naming the file and the remedy."""
    code = 2

    def __str__(self):
        return super().__str__().translate(STEERING)


class NumericalError(UserError):
    """The run stopped because its numbers are no longer finite: exit code 3."""
    code = 3


class PartialError(UserError):
    """Some of the files could not be read; the results are of the others: exit code 4."""
    code = 4


class Stopped(BaseException):
    """SIGTERM or Ctrl-C, raised where it is safe to stop: exit code 143 or 130."""

    def __init__(self, signum):
        self.code = 128 + signum


@contextmanager
def answers_for(flag):
    """While the block runs, an OSError, ValueError or TypeError becomes a UserError about the value of this flag."""
    try:
        yield
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{flag} {error}") from None


def one_line(error):
    """The message of an error in one line, without the traceback of a loader worker that has passed it on."""
    text = str(error).strip()
    if text.startswith("Caught "):
        text = text.splitlines()[-1].partition("Error: ")[2]
    return " ".join(text.splitlines()) or type(error).__name__


def cli(main):
    """Runs a script's `main()` and ends the process with an exit code: 0; 2, 3 or 4 with one line on stderr for a
    UserError, a NumericalError or a PartialError; 130 or 143 after a signal; 141 when nobody reads the output any more;
    1 with a traceback for every other error, which is a bug."""
    def stop(signum, frame):
        raise Stopped(signum)

    for name in ("stdout", "stderr"):  # None: closed by the shell (>&-), and the next open file would get its number
        stream = getattr(sys, name) or open(os.devnull, "w")
        setattr(sys, name, stream)
        _write_plainly(stream)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        main()
        print(end="", flush=True)
        return
    except SystemExit:  # argparse has printed its message
        raise
    except BaseException as caught:
        error = caught
    # nothing is left to save: another signal may end the process, and exits of workers are ignored from here on
    signums = [signal.SIGCHLD, signal.SIGTERM, signal.SIGINT]
    while signums:
        try:
            signal.signal(signums[-1], signal.SIG_DFL)
            signums.pop()
        except BaseException:  # raised by a handler that is still set, such as torch's for the next dead worker
            pass
    end(error)


def _write_plainly(stream):
    """Names of files may be any bytes: what is no text, and what would steer a terminal, is written with a backslash."""
    with suppress(AttributeError):  # the stream may have been replaced
        stream.reconfigure(errors="backslashreplace")
        write = stream.write
        stream.write = lambda text: write(text.translate(STEERING))


def end(error):
    """Ends a failed process at once: the usual shutdown would wait for loader workers and for other ranks."""
    text, code = _verdict(error)
    children = multiprocessing.active_children()
    with suppress(OSError):  # nobody reads the output
        print(end="", flush=True)
        if text:
            print(f"error: {text}", file=sys.stderr, flush=True)
    for child in children:
        child.kill()
    os._exit(code)


def _verdict(error):
    """-> (the line to print, or "", exit code); for a bug (the traceback, 1)."""
    text, trace = str(error), "".join(traceback.format_exception(error))
    if isinstance(error, Stopped):
        return "", error.code
    if isinstance(error, BrokenPipeError) and "_data_queue" not in trace:  # `| head` has closed our output
        return "", 141
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text \
            or "can't start new thread" in text:
        error = UserError("out of memory; lower --bs or --imgsz, try --grad-checkpoint, or --tile for large images")
    elif isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        error = UserError(f"{str(error.filename)[:80]}...: too long for a name; shorten it")
    elif text.startswith("DataLoader worker") or "Too many open files" in text or "shared memory" in text:
        error = UserError(f"{text.splitlines()[0].rstrip('. ')}; lower --workers, 0 loads in the main process")
    elif isinstance(error, (EOFError, OSError)) and "_data_queue.get(" in trace:  # it died while passing on a batch
        error = UserError("DataLoader worker exited unexpectedly; lower --workers, 0 loads in the main process")
    elif int(os.environ.get("WORLD_SIZE", 1)) > 1 and any(word in trace for word in LOST):
        error = UserError(f"another process of this run has ended or hangs ({text.splitlines()[0]}); see its message, "
                          f"then go on with --resume")
        time.sleep(2)  # torchrun ends this process before, if it can, so that one line is printed and not one per rank
    elif int(os.environ.get("RANK", 0)) > 0:
        time.sleep(2)  # the same: rank 0 prints this error too
    if isinstance(error, UserError):
        return one_line(error), error.code
    return trace, 1
