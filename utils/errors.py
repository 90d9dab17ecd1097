"""What a user can cause is answered in one line: the file, what is wrong with it, and the remedy."""
import multiprocessing
import os
import signal
import sys
import time
import traceback


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


def one_line(error):
    """The message of an error; of one that a loader worker passed on, without the worker's traceback."""
    return str(error).strip().splitlines()[-1].split("Error: ")[-1] if str(error).strip() else type(error).__name__


def cli(main):
    """Runs a script's `main()` and ends the process: 0, 2 or 3 with one line on stderr, 130, 143."""
    def stop(signum, frame):
        raise Stopped(signum)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        main()
        sys.stdout.flush()
        return
    except UserError as error:
        code = _report(one_line(error), error.code)
    except Stopped as stopped:
        code = stopped.code
    except BrokenPipeError:  # `| head` has closed our output; there is nobody to tell
        code = 141
    except Exception as error:
        code = _report(*_cause(error))
    # a failed process goes at once: the usual shutdown would wait for loader workers and for other ranks
    for child in multiprocessing.active_children():
        child.kill()
    sys.stderr.flush()
    os._exit(code)


def _cause(error):
    """-> (one line, 2) for what users do cause, (the traceback, 1) for what is a fault of ours."""
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return "out of memory; lower --bs or --imgsz, or try --grad-checkpoint", 2
    if text.startswith(("DataLoader worker", "DataLoader timed out")):
        return f"{text.splitlines()[0]} Lower --workers; 0 loads in the main process.", 2
    return traceback.format_exc(), 1


def _report(text, code):
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(2)  # when rank 0 has the same to say, torchrun ends this rank first: one line, not one per rank
    print(f"error: {text}", file=sys.stderr, flush=True)
    return code
