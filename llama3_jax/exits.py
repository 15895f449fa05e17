"""How a program ends: its exit code, its one line, and that it ends at once.

Compilers, readers and writers leave threads behind that cannot be told to stop. A process that
fails or is interrupted therefore does not unwind them: it stops its children, removes what is half
written and ends.
"""

import atexit
import contextlib
import errno
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from llama3_jax import files
from llama3_jax.errors import UserError

EXIT_USER_ERROR = 2
# BSD's EX_TEMPFAIL: the run saved its state on SIGTERM and asks to be queued again.
EXIT_REQUEUE = 75
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# What a person has to change. Others, such as a file server that is away, may pass by themselves.
_USER_ERRORS = {
    *_DISK_FULL, errno.EACCES, errno.EEXIST, errno.EFBIG, errno.EISDIR, errno.ELOOP, errno.EMFILE,
    errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY, errno.EPERM, errno.EROFS,
    errno.EINVAL,
}  # fmt: skip
# How tensorstore and Rust's libraries name an error of the system.
_NATIVE = re.compile(r"os[ _]error(?:_code=.)? ?(\d+)", re.IGNORECASE)
# Called instead of ending, by an interrupt: by those whom other processes wait for.
before_interrupt: list[Callable[[], Any]] = []
_FLUSH_SECONDS = 2.0
_leaving = threading.Lock()


def fail(message: Any) -> int:
    """Prints an error as one line; returns the exit code for it."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr, flush=True)
    return EXIT_USER_ERROR


def described(error: BaseException) -> tuple[int, str] | None:
    """Exit code and line of an error that a person can do something about; None for others."""
    if isinstance(error, UserError):
        return EXIT_USER_ERROR, str(error)
    if is_disk_full(error):
        return EXIT_USER_ERROR, f"no space left on the disk that holds {_full(error)}"
    number = error_number(error)
    if number is None:
        return None
    reason = os.strerror(number)
    if filename := getattr(error, "filename", None):
        message = f"{filename}: {reason}"
    else:
        message = f"{reason} ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
    return (EXIT_USER_ERROR if number in _USER_ERRORS else 1), message


def error_number(error: BaseException) -> int | None:
    """The errno of an error of the system, also where a native library raised it."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = _NATIVE.search(str(error))
    return int(found[1]) if found else None


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that a disk or quota is full."""
    while error is not None:
        if error_number(error) in _DISK_FULL:
            return True
        if "No space left on device" in str(error) or "RESOURCE_EXHAUSTED: ENOSPC" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _full(error: BaseException | None) -> str:
    """The file that the error names, else the output whose disk has least left."""
    while error is not None:
        if isinstance(error, OSError) and error.filename:
            return str(error.filename)
        error = error.__cause__ or error.__context__
    outputs = [(_free(path), str(path)) for path in files.outputs]
    return min(outputs)[1] if outputs else os.getcwd()


def _free(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


# ---- the end ----


def leave(code: int, line: str = "") -> NoReturn:
    """Ends the process now: children stopped, nothing half written, output printed.

    `line` is the last on standard error. After a success what libraries registered for the end is
    called first, as Python does itself.
    """
    if code == 0:
        threading._shutdown()
        atexit._run_exitfuncs()
    _leaving.acquire()  # for ever, where another thread ends the process
    flush = threading.Thread(target=_flush, daemon=True)
    flush.start()
    flush.join(_FLUSH_SECONDS)  # whoever is to read it may be stopped
    if line:
        os.write(2, line.encode() + b"\n")
    # What other threads, or children, say of being ended is of no interest.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    _kill_children()
    files.remove_unfinished()
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if stream.isatty():
                stream.write("\x1b[?25h")  # the cursor, which a progress bar hides
            stream.flush()


def _kill_children() -> None:
    """All that this process started, and they, in turn; not what it started in a new session.

    Python's tracker of shared memory stays: it removes what is left, and ends by itself.
    """
    import psutil  # not for each program's start

    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error, OSError):
                tracker = "multiprocessing.resource_tracker" in " ".join(child.cmdline())
                if os.getsid(child.pid) == os.getsid(0) and not tracker:
                    child.kill()


# ---- Ctrl-C ----


def listen() -> None:
    """From now on Ctrl-C ends this process with one line, whatever its main thread is doing.

    A handler of Python's own runs only when the main thread comes back from native code, and would
    raise an error in the middle of anything. Who has a handler of its own keeps it, as does a
    process that was started with the signal ignored.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _heard)
    threading.Thread(target=_watch, args=(readable,), name="Ctrl-C", daemon=True).start()
    os.register_at_fork(after_in_child=_forget)


def ignore() -> None:
    """For a process that works for another one, which ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _heard(*_) -> None:
    """Says that `_watch` is to act."""


def _forget() -> None:
    """In a forked child, which has the parent's pipe but not its thread."""
    if signal.getsignal(signal.SIGINT) is _heard:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _watch(readable: int) -> None:
    while numbers := os.read(readable, 64):
        if signal.SIGINT in numbers and signal.getsignal(signal.SIGINT) is _heard:
            for call in before_interrupt:
                call()
            leave(EXIT_INTERRUPTED, "interrupted")
