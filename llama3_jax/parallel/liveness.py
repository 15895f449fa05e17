"""A run of several processes ends on all of them when one is lost, and says which.

A collective in which one process is missing may wait for ever, so somebody else must notice.
Threads of each process show signs of life in the key-value store that process 0 keeps for JAX, and
read there whether the run is over. JAX's own heartbeat aborts, too, but names a number at most,
and does not see a process that stops by an error of its own.
"""

import contextlib
import ctypes
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from jax._src import distributed  # the store has no public name

from llama3_jax import exits
from llama3_jax.errors import UserError

EXIT_LOST, EXIT_HUNG = 3, 4
_ALIVE, _NAME, _SEEN, _VERDICT, _AT, _BUSY, _LOOKS = (
    f"llama3_jax/{key}" for key in ("alive", "name", "seen", "end", "at", "busy", "looks")
)
# For so long must process 0 be out of reach to count as lost, where the connection is refused.
# With `_beat`'s interval it is less than the delay of `_delay_aborts`.
_REFUSED_SECONDS = 2.0
Position = tuple[int, str, float]  # step, what goes on, seconds
_TOGETHER = ("step", "data")  # what all processes do at the same time
# What collectives and JAX's client say when a peer is gone, on CPUs and GPUs.
_LOST_PEER = re.compile("gloo|nccl|connection|unavailable|deadline|barrier|coordination", re.I)


class Watch:
    """Shows that this process lives, and ends it when another one does not.

    Within `timeout` and some ten seconds after a process was killed, froze or lost its network, and
    within some five seconds after it failed with an error, every other one exits with a code that
    is not zero; its last line on standard error names the one.
    """

    def __init__(self, timeout: float):
        state = distributed.global_state
        self._store, self._process, self._processes = (
            state.client, state.process_id, state.num_processes
        )  # fmt: skip
        self._timeout, self._interval = timeout, min(2.0, timeout / 10)
        self._done, self._ending = threading.Event(), threading.Lock()
        # What this process is at: step, what it does, for how many seconds; and what to do when one
        # of them hangs. Training sets both.
        self.position: Callable[[], Position] = lambda: (0, "", 0.0)
        self.on_hang: Callable[[], object] = lambda: None
        me = f"process {self._process} ({socket.gethostname()}, pid {os.getpid()})"
        self._store.key_value_set(f"{_NAME}/{self._process}", me)
        self._first = self._store.blocking_key_value_get(f"{_NAME}/0", int(timeout * 1000))
        self._heard, self._refused = time.monotonic(), False
        _delay_aborts()
        for work in (self._beat, self._judge):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()

    def finish(self) -> None:
        """Waits until all processes have come here, and watches no longer."""
        # Waiting is right as long as all live: one that does not is noticed meanwhile.
        self._store.wait_at_barrier("llama3_jax/finish", 7 * 24 * 3600 * 1000)
        self._done.set()

    def leave(self, error: BaseException) -> NoReturn:
        """Ends this process by its own error, and thereby the others."""
        if not isinstance(error, UserError) and _LOST_PEER.search(str(error)):
            # Most likely a collective that lost a peer: the verdict on that one ends this process.
            time.sleep(self._timeout + 4 * self._interval)
        self._ending.acquire()  # for ever, where a verdict is ending this process already
        code, message = 1, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        if described := exits.described(error):
            code, message = described[0], " ".join(described[1].split())
        elif isinstance(error, KeyboardInterrupt):
            code, message = exits.EXIT_INTERRUPTED, "interrupted"
        else:
            traceback.print_exception(error)
        _say(message if self._process == 0 else f"process {self._process}: {message}")
        self._announce(f"process {self._process} stopped: {message}")
        self._exit(code)

    def hang(self, message: str) -> None:
        """Ends all processes because this one, or one that it waits for, hangs.

        Returns only where another verdict is ending the process already.
        """
        with contextlib.suppress(Exception):
            self._show_position()
            if not self._looks_alone():
                # Its verdict ends this process, too; and without one, the process's own words do.
                time.sleep(4 * self._interval + 10)
            before = dict(self._store.key_value_dir_get(_ALIVE))
            time.sleep(3 * self._interval)
            silent = {
                key
                for key, beat in self._store.key_value_dir_get(_ALIVE)
                if before.get(key) == beat
            }
            positions = self._store.key_value_dir_get(_AT)
            names = dict(self._store.key_value_dir_get(_NAME))
            message += "; " + missing({
                names[f"{_NAME}/{process}"]: (f"{_ALIVE}/{process}" not in silent, *json.loads(at))
                for process, at in ((key.rsplit("/", 1)[1], at) for key, at in positions)
            })  # fmt: skip
        self._announce(message, EXIT_HUNG)
        if self._ending.acquire(blocking=False):
            _say(message if self._process == 0 else f"process {self._process}: {message}")
            self._exit(EXIT_HUNG)

    def _looks_alone(self) -> bool:
        """Whether this process is the first that hangs: one lists what all are at, not each."""
        try:
            self._store.key_value_set(f"{_LOOKS}/0", str(self._process))
        except Exception:  # jaxlib's error for a key that is there has no narrower class
            return False
        return True

    def someone_is_busy(self) -> bool:
        """Whether a process does what the others wait for, and what its own watchdog times:
        compiling, saving, evaluating. Process 0 looks at all, and the others at what it found."""
        with contextlib.suppress(Exception):
            return dict(self._store.key_value_dir_get(_BUSY)).get(f"{_BUSY}/0") == "1"
        return False

    def _show_position(self) -> None:
        at = json.dumps(self.position())
        self._store.key_value_set(f"{_AT}/{self._process}", at, True)

    def _beat(self) -> None:
        """Shows a sign of life and reads those of others, until the run is over."""
        beats, lives = 0, {}
        while not self._done.wait(self._interval if not self._refused else 0.2):
            beats += 1
            try:
                self._store.key_value_set(f"{_ALIVE}/{self._process}", str(beats), True)
                self._show_position()
                if self._process == 0:
                    self._find_lost(lives)
                    self._find_busy()
                verdict = self._store.key_value_dir_get(_VERDICT)
            except Exception:  # jaxlib's errors have no narrower class
                self._refused = True
                continue
            self._heard, self._refused = time.monotonic(), False
            if verdict:
                code, text = verdict[0][1].split(" ", 1)
                self._end(text, int(code))

    def _find_lost(self, lives: dict[str, tuple[str, float]]) -> None:
        now, beats = time.monotonic(), dict(self._store.key_value_dir_get(_ALIVE))
        for process in map(str, range(1, self._processes)):
            beat = beats.get(f"{_ALIVE}/{process}", "")
            if process not in lives or lives[process][0] != beat:
                lives[process] = (beat, now)
            elif now - lives[process][1] > self._timeout:
                names = dict(self._store.key_value_dir_get(_NAME))
                name = names.get(f"{_NAME}/{process}", f"process {process}")
                self._announce(f"{name} is lost: no sign of life for {self._timeout:g} s")

    def _find_busy(self) -> None:
        positions = self._store.key_value_dir_get(_AT)
        busy = any(json.loads(at)[1] not in _TOGETHER for _, at in positions)
        self._store.key_value_set(f"{_BUSY}/0", str(int(busy)), True)

    def _judge(self) -> None:
        """Looks whether process 0, which keeps the store, still answers."""
        while not self._done.wait(0.2):
            limit = _REFUSED_SECONDS if self._refused else self._timeout
            if time.monotonic() - self._heard > limit + self._interval:
                self._end(f"{self._first} is lost: it does not answer", store_answers=False)

    def _announce(self, verdict: str, code: int = EXIT_LOST) -> None:
        # It fails where there is a verdict, or no process 0: then _judge finds so.
        with contextlib.suppress(Exception):
            self._store.key_value_set(f"{_VERDICT}/0", f"{code} {verdict}")

    def _end(self, verdict: str, code: int = EXIT_LOST, store_answers: bool = True) -> None:
        if self._ending.acquire(blocking=False) and not self._done.is_set():
            if code == EXIT_HUNG:
                with contextlib.suppress(OSError):
                    self.on_hang()
            _say(f"{verdict}; the same command goes on from the newest checkpoint")
            self._exit(code, store_answers)

    def _exit(self, code: int, store_answers: bool = True) -> NoReturn:
        for child in multiprocessing.active_children():
            child.kill()
        if store_answers:
            self._await_others()
        # Not sys.exit: JAX would wait at its exit for those who will not come.
        os._exit(code)

    def _await_others(self) -> None:
        """With process 0 goes the store: it waits until the others have read there why."""
        with contextlib.suppress(Exception):
            self._store.key_value_set(f"{_SEEN}/{self._process}", "")
            end = time.monotonic() + 3 * self._interval + 1
            while self._process == 0 and time.monotonic() < end:
                if len(self._store.key_value_dir_get(_SEEN)) == self._processes:
                    break
                time.sleep(0.1)


def missing(processes: dict[str, tuple[bool, int, str, float]]) -> str:
    """Says whom the others wait for: of each process, whether it lives, and its position.

    Those that show no sign of life; or else those at the least step, busy with something of their
    own.
    """
    if silent := [name for name, (lives, *_) in processes.items() if not lives]:
        return f"missing: {', '.join(silent)}: no sign of life"
    first = min(step for _, step, _, _ in processes.values())
    behind = {name: at for name, at in processes.items() if at[1] == first}
    # One that is in a step waits for the others' part of it; one that is not, does not.
    behind = {name: at for name, at in behind.items() if at[2] != "step"} or behind
    if len(behind) == len(processes) > 1:
        return f"all processes are at the same place, after step {first}"
    whom = ", ".join(
        f"{name} (after step {step}: {what} for {seconds:.0f} s)"
        for name, (_, step, what, seconds) in sorted(behind.items())
    )
    return f"missing: {whom}"


def _say(message: str) -> None:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)


def _delay_aborts() -> None:
    """Makes abort() wait six seconds, so that `_judge` may say why.

    When process 0 is gone, JAX's client aborts at once, and nothing in Python runs after that. The
    handler is the C library's sleep() itself, called with the signal's number: 6.
    """
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = (ctypes.c_int, ctypes.c_void_p), None
    library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))
