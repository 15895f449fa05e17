"""A function that may crash, hang or eat all memory, called in a process that may die of it.

    sandbox = Sandbox("llama3_jax.curation.page.extract:extract", seconds=10, memory=2 << 30)
    for outcome in sandbox.map([(page, url), …]): ...      # a Killed where the process died of that row

Only the row that did it is lost: the process is started again for the next one. Time is the
processor's, so that a busy machine changes no result. An error of the system, such as a full disk, is
no row's fault: it is raised.
"""

import contextlib
import dataclasses
import importlib
import multiprocessing.connection
import os
import pickle
import queue
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

# Seconds of the clock for each second of the processor, before a process that sleeps is killed.
_PATIENCE = 20
_PROGRAM = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN);"  # the parent decides
    "from llama3_jax.curation import sandbox; sandbox.serve(*sys.argv[1:])"
)
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


@dataclasses.dataclass(frozen=True)
class Killed:
    """Why there is no result: "timeout", "out_of_memory", "crashed", or "error" (it raised)."""

    reason: str
    detail: str


@dataclasses.dataclass(frozen=True)
class _SystemError:
    """An OSError with a number that a call raised."""

    number: int
    message: str
    filename: str | None


class Sandbox:
    """Calls of one function, each in one of as many processes as there are callers.

    `function` is "module:name". `seconds` of processor time and `memory` bytes, beyond what the
    process has when it starts, bound a call; 0 does not.
    """

    _pools: dict[tuple, queue.SimpleQueue] = {}  # idle processes, by what they were started for

    def __init__(self, function: str, seconds: float, memory: int):
        self._started_for = (function, seconds, memory)
        self._patience = seconds * _PATIENCE + 10 if seconds else None
        self._idle = self._pools.setdefault(self._started_for, queue.SimpleQueue())

    def map(self, arguments: Iterable[tuple]) -> Iterator[Any]:
        """Yields the results in order, a Killed for each call that did not end.

        Raises:
          OSError: a call met an error of the system.
        """
        child = None
        try:
            for each in arguments:
                child = child or self._taken()
                outcome, alive = child.call(each, self._patience)
                if not alive:
                    child = None
                if isinstance(outcome, _SystemError):
                    raise OSError(outcome.number, outcome.message, outcome.filename)
                yield outcome
        except BaseException:
            if child is not None:  # it may be in the middle of a call
                child.kill()
                child = None
            raise
        finally:
            if child is not None:
                self._idle.put(child)

    def _taken(self) -> "_Child":
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            return _Child(*self._started_for)


class _Child:
    def __init__(self, function: str, seconds: float, memory: int):
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(theirs.fileno()), function, str(seconds),
                 str(memory)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(sys.path)},
            )  # fmt: skip
        self._pipe = multiprocessing.connection.Connection(ours.detach())
        try:
            self._pipe.recv_bytes()
        except EOFError:  # no call's fault
            code = self._process.wait()
            raise RuntimeError(f"no process for {function}: exit code {code}") from None

    def call(self, arguments: tuple, seconds: float | None) -> tuple[Any, bool]:
        """The result, and whether the process lives."""
        try:
            self._pipe.send_bytes(pickle.dumps(arguments, pickle.HIGHEST_PROTOCOL))
            if not self._pipe.poll(seconds):
                self.kill()
                return Killed("timeout", f"no end after {seconds:.0f} s of the clock"), False
            outcome = pickle.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            code = self._process.wait()
            self._pipe.close()
            return _cause(code), False
        return outcome, True

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._pipe.close()


def _cause(code: int) -> Killed:
    if code == -signal.SIGPROF:
        return Killed("timeout", "too much processor time")
    if code == _OUT_OF_MEMORY or code == -signal.SIGKILL:
        return Killed("out_of_memory", "too much memory")
    return Killed("crashed", f"exit code {code}" if code >= 0 else signal.Signals(-code).name)


# ------------------------------------------------------------------------------- in the process

_OUT_OF_MEMORY = 77


def serve(descriptor: str, name: str, seconds: str, memory: str) -> None:
    """Answers calls until the parent is gone."""
    module, _, attribute = name.partition(":")
    function: Callable[[Any], Any] = getattr(importlib.import_module(module), attribute)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if int(memory) and sys.platform == "linux":
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + int(memory), size + int(memory)))
    pipe = multiprocessing.connection.Connection(int(descriptor))
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone
        _answer(pipe, function, float(seconds))


def _answer(
    pipe: multiprocessing.connection.Connection, function: Callable[..., Any], seconds: float
) -> None:
    pipe.send_bytes(b"ready")
    while True:
        message = pipe.recv_bytes()
        # The signal's default action ends the process wherever it is, in C, too.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            outcome = function(*pickle.loads(message))
            answer = pickle.dumps(outcome, pickle.HIGHEST_PROTOCOL)
        except MemoryError:
            os._exit(_OUT_OF_MEMORY)
        except Exception as error:
            answer = pickle.dumps(_failure(error))
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send_bytes(answer)


def _failure(error: Exception) -> Killed | _SystemError:
    if isinstance(error, OSError) and error.errno:
        name = None if error.filename is None else str(error.filename)
        return _SystemError(error.errno, error.strerror or str(error), name)
    return Killed("error", f"{type(error).__name__}: {error}")
