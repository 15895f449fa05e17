"""Ends a process that hangs: with the stacks of all its threads in a file, and a code of its own.

What hangs may be this process or one that it waits for. With several, all exit, and the last line
of each says which ones the others were waiting for (`parallel/liveness.py`).
"""

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pydantic

from llama3_jax.parallel.liveness import EXIT_HUNG, Watch
from llama3_jax.schema import Config
from llama3_jax.training.goodput import Ledger

STACKS = "hangs"
_LEAST_STEPS = 5


class WatchdogConfig(Config):
    """A step, or the wait for its batch, hangs when it takes longer than `multiple` medians of the
    last 64 steps and than `floor_seconds`; whatever else goes on, after `other_seconds`: compiling,
    saving, evaluating, starting, and the first five steps.
    """

    multiple: pydantic.PositiveFloat = 20.0
    floor_seconds: pydantic.PositiveFloat = 300.0
    other_seconds: pydantic.PositiveFloat = 3600.0


def limit(config: WatchdogConfig, category: str, step_seconds: Sequence[float]) -> float:
    """Seconds that what is booked as `category` may take."""
    if category not in ("step", "data") or len(step_seconds) < _LEAST_STEPS:
        return config.other_seconds
    return max(config.floor_seconds, config.multiple * statistics.median(step_seconds))


class Watchdog:
    """A thread that looks at a ledger's position."""

    def __init__(
        self,
        config: WatchdogConfig,
        ledger: Ledger,
        workdir: Path,
        process: int,
        watch: Watch | None,
    ):
        self._config, self._ledger, self._watch = config, ledger, watch
        self._path = workdir / STACKS / f"process-{process}.txt"
        self._interval = min(config.floor_seconds / 10, 1.0)
        self._move, self._waited, self._looked = -1, 0.0, 0.0
        self._done = threading.Event()
        if watch is not None:
            watch.position, watch.on_hang = self.position, self.write_stacks
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends the watch; what the process does from now on may take its time."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def position(self) -> tuple[int, str, float]:
        """Step, what goes on, and for how many seconds."""
        step, category, _ = self._ledger.position()
        return step, category, self._waited

    def look(self, now: float) -> str | None:
        """What hangs at time `now`, in seconds of any clock; called again and again."""
        step, category, move = self._ledger.position()
        # In ticks of its own: a process that was stopped and goes on did not hang meanwhile.
        tick = min(now - self._looked, 2 * self._interval)
        self._waited = self._waited + tick if move == self._move else 0.0
        self._move, self._looked = move, now
        allowed = limit(self._config, category, list(self._ledger.step_seconds))
        if self._waited <= allowed:
            return None
        usual = statistics.median(self._ledger.step_seconds or [0.0])
        return (
            f"hang after step {step}: {category} has taken {self._waited:.0f} s, "
            f"allowed are {allowed:.0f} s, a step takes {usual:.3g} s"
        )

    def write_stacks(self) -> Path | str:
        """Adds the stacks of all threads to the process's file, or writes them to standard error."""
        step, category, waited = self.position()
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        title = f"{now} after step {step}: {category} for {waited:.0f} s"
        try:
            self._path.parent.mkdir(exist_ok=True)
            with open(self._path, "a", encoding="utf-8") as file:
                print(title, file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
                print(file=file)
            return self._path
        except OSError as error:  # a full disk may be what hangs: the process must end all the same
            print(f"{self._path}: {error}; {title}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            return "standard error"

    def _waits_for_another(self) -> bool:
        """Whether this process is in a step, for which another one is not ready for good reasons."""
        _, category, _ = self.position()
        return category == "step" and self._watch is not None and self._watch.someone_is_busy()

    def _run(self, clock: Callable[[], float] = time.monotonic) -> None:
        while not self._done.wait(self._interval):
            if message := self.look(clock()):
                if self._waits_for_another():
                    continue
                message += f"; stacks are in {self.write_stacks()}"
                if self._watch is not None:
                    self._watch.hang(message)
                    return
                sys.stdout.flush()
                print(f"error: {message}", file=sys.stderr, flush=True)
                os._exit(EXIT_HUNG)
