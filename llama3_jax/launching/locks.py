"""Who is alive: a byte of one file, locked for as long as its process lives.

Byte 0 is the supervisor's, byte N that of the runner of unit id N. The kernel lets go of a lock
when its process ends, however it ends; a process id could be another's by then.
"""

import fcntl
import os
from pathlib import Path

LOCKS = "alive.lock"
SUPERVISOR = 0


class Locks:
    """Open once in a process: closing any handle of the file lets go of all its locks."""

    def __init__(self, root: Path):
        self._file = os.open(root / LOCKS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def take(self, byte: int, wait: bool = False) -> bool:
        """Locks a byte for this process; False where another has it and `wait` is not set."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, byte)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def release(self, byte: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, byte)

    def held_by_another(self, byte: int) -> bool:
        if not self.take(byte):
            return True
        self.release(byte)
        return False
