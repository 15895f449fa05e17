"""One process at a time in a folder, on whatever host of a shared file system.

The lock is the kernel's (flock), which lets go when the process ends, however it ends; NFS passes
it on to its server. A file system that has none (Lustre, unless mounted with -o flock) gets a file
that its holder touches every few seconds: one that nobody touches is of a dead process.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from llama3_jax.errors import UserError

LOCK_FILE = ".lock"
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
TOUCH_SECONDS, DEAD_SECONDS = 5.0, 60.0


@contextlib.contextmanager
def locked(folder: Path, option: str = "--workdir") -> Iterator[None]:
    """Makes `folder`, if need be, and keeps others out of it for the length of the block.

    A folder that it made, and that is empty in the end, is removed.

    Raises:
      UserError: another process works in it; names that one, its host and since when.
    """
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _held(folder, option):
            yield
    finally:
        with contextlib.suppress(OSError):
            for path in absent:
                path.rmdir()


@contextlib.contextmanager
def _held(folder: Path, option: str) -> Iterator[None]:
    path = folder / LOCK_FILE
    while True:
        with open(path, "a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _refusal(folder, option, file.seek(0) or file.read()) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                with _touched(folder, option):
                    yield
                return
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue  # the one before removed it meanwhile
            file.truncate(0)
            file.write(_record())
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


@contextlib.contextmanager
def _touched(folder: Path, option: str) -> Iterator[None]:
    path, record = folder / f"{LOCK_FILE}.held", _record()
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            break
        except FileExistsError:
            if (holder := _living_holder(path)) is not None:
                raise _refusal(folder, option, holder) from None
            with contextlib.suppress(FileNotFoundError):
                # Only one of several that wait may take the dead one's away.
                os.rename(path, stale := path.with_name(f"{path.name}.{os.getpid()}"))
                stale.unlink()
    os.write(descriptor, record)
    os.close(descriptor)
    done = threading.Event()

    def touch() -> None:
        while not done.wait(TOUCH_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(path)

    threading.Thread(target=touch, name="folder lock", daemon=True).start()
    try:
        yield
    finally:
        done.set()
        with contextlib.suppress(OSError):
            if path.read_bytes() == record:
                path.unlink()


def _living_holder(path: Path) -> bytes | None:
    """What the file says of its process; None once it is known to have ended."""
    with contextlib.suppress(FileNotFoundError):
        record, touched = path.read_bytes(), path.stat().st_mtime_ns
        with contextlib.suppress(ValueError, KeyError):
            holder = json.loads(record)
            if holder["host"] == socket.gethostname():
                return record if _runs(holder["pid"]) else None
        end = time.monotonic() + DEAD_SECONDS
        while time.monotonic() < end:  # hosts' clocks differ: what counts is whether it changes
            time.sleep(min(1.0, DEAD_SECONDS / 10))
            if path.stat().st_mtime_ns != touched:
                return record
    return None


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return pid != os.getpid()  # from before this host, or container, was started anew


def _record() -> bytes:
    program = " ".join([Path(sys.argv[0]).stem, *sys.argv[1:2]])
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    values = dict(host=socket.gethostname(), pid=os.getpid(), since=now, program=program)
    return json.dumps(values).encode() + b"\n"


def _refusal(folder: Path, option: str, record: bytes) -> UserError:
    who = ""
    with contextlib.suppress(ValueError, KeyError):
        holder = json.loads(record)
        who = f" (process {holder['pid']} on {holder['host']}, since {holder['since']})"
    return UserError(f"{option}={folder}: another process works in it{who}; wait, or stop that one")
