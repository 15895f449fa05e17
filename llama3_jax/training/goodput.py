"""Where the time of a job went: every second from its first start, over all its restarts.

The time of a process is booked to one category at a time, so that the sums are the wall time to the
end. goodput.json is written every second or so: what a killed process had not yet written counts
as `down`, with the time until the next one began.
"""

import collections
import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psutil

from llama3_jax.errors import UserError
from llama3_jax.files import write_json

GOODPUT_FILE = "goodput.json"
CATEGORIES = {
    "step": "training steps that the run still has",
    "data": "waiting for batches",
    "compile": "waiting for a stage's step to be compiled",
    "checkpoint": "saving, as far as training waited for it",
    "evaluation": "held-out losses and samples",
    "setup": "starting, restoring, changing stages",
    "lost_work": "steps after the checkpoint that a restart or rewind went back to",
    "down": "between a process's last sign of life and the next one's start",
}
# What has to be done again where steps are lost.
_REPEATED = ("step", "data", "evaluation")
_STEPS_REMEMBERED = 64
_MARKS_KEPT = 8
# The file is written this often in seconds, and so seldom that it takes less than this share.
_WRITE_SECONDS, _WRITE_SHARE = 1.0, 0.01

ItemT = TypeVar("ItemT")


class Position(NamedTuple):
    """What a process is at: `move` counts the changes of category."""

    step: int
    category: str
    move: int


class Ledger:
    """Books the seconds of this process; `path` None keeps them to itself."""

    def __init__(
        self, path: Path | None, clock: Callable[[], float] | None = None, born: float | None = None
    ):
        """`clock` gives seconds since the epoch and `born` when this process began.

        Raises:
          UserError: the file is damaged.
        """
        offset = time.time() - time.monotonic()  # a clock that never jumps
        self._clock = clock or (lambda: time.monotonic() + offset)
        self._path, self._sessions = path, _read(path)
        self.step_seconds: collections.deque[float] = collections.deque(maxlen=_STEPS_REMEMBERED)
        self._written, self._write_took = self._clock(), 0.0
        born = psutil.Process().create_time() if born is None else born
        # The system's boot time is known to a second only.
        earliest = self._sessions[-1]["end"] if self._sessions else 0.0
        self._since = min(max(born, earliest), self._clock())
        self._step, self._category, self._moves = 0, "setup", 0
        self._begun, self._booked_step = False, 0.0

    # ---- what training says

    def begin(self, step: int) -> None:
        """A run goes on after `step` steps: what was done beyond them is lost."""
        self._book()
        _lose_after(self._sessions, step)
        start = self._since
        self._sessions.append({
            "start": start, "end": start, "from_step": step, "to_step": step,
            "seconds": dict.fromkeys(CATEGORIES, 0.0), "marks": [],
        })  # fmt: skip
        self._begun, self._step, self._booked_step = True, step, 0.0
        self.enter("setup")
        self.write()

    def enter(self, category: str) -> None:
        """From now on, time goes to `category`."""
        self._book()
        self._category = category
        self._moves += 1

    @contextlib.contextmanager
    def booking(self, category: str) -> Iterator[None]:
        """Books a block to `category`."""
        before = self._category
        self.enter(category)
        try:
            yield
        finally:
            self.enter(before)

    def fetched(self, batches: Iterable[ItemT]) -> Iterator[ItemT]:
        """The batches; waiting for one is `data`, what is done with it `step`."""
        iterator = iter(batches)
        while True:
            self.enter("data")
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.enter("step")
            yield batch

    def stepped(self, step: int) -> None:
        """`step` steps are done."""
        self._book()
        seconds = self._session["seconds"]
        booked = seconds["step"] + seconds["data"]
        self.step_seconds.append(booked - self._booked_step)
        self._booked_step = booked
        self._step = self._session["to_step"] = step
        due = max(_WRITE_SECONDS, self._write_took / _WRITE_SHARE)
        if self._clock() - self._written > due:
            self.write()

    def mark(self, step: int) -> None:
        """A checkpoint of `step` begins to be saved: a restart from it loses only what follows."""
        self._book()
        if self._session is None:
            return
        marks = self._session["marks"]
        marks[:] = [mark for mark in marks if mark["after"] != step][1 - _MARKS_KEPT :]
        marks.append({"after": step, **{k: self._session["seconds"][k] for k in _REPEATED}})
        self.write()

    # ---- what others ask

    def position(self) -> Position:
        return Position(self._step, self._category, self._moves)

    def write(self) -> None:
        """Brings the file up to date; before `begin` there is nothing to say."""
        self._book()
        if self._path is None or self._session is None:
            return
        begun = self._clock()
        write_json(self._path, summary(self._sessions))
        self._written = self._clock()
        self._write_took = self._written - begun

    @property
    def _session(self) -> dict[str, Any] | None:
        return self._sessions[-1] if self._begun else None

    def _book(self) -> None:
        if self._session is None:
            return
        now = self._clock()
        self._session["seconds"][self._category] += now - self._since
        self._session["end"] = self._since = now


def _read(path: Path | None) -> list[dict[str, Any]]:
    if path is None or not path.exists():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))["sessions"]
    except (ValueError, KeyError):
        raise UserError(f"{path}: damaged; remove it to book time from now on") from None


def _lose_after(sessions: list[dict[str, Any]], step: int) -> None:
    """Turns what was done after the checkpoint of `step` into lost work."""
    for session in reversed(sessions):
        marks = [mark for mark in session["marks"] if mark["after"] <= step]
        session["marks"] = marks
        # Done in this session, on top of the last checkpoint that still counts.
        kept = marks[-1] if marks else dict.fromkeys(_REPEATED, 0.0)
        if session["to_step"] > step:
            for category in _REPEATED:
                lost = session["seconds"][category] - kept[category]
                session["seconds"][category] -= lost
                session["seconds"]["lost_work"] += lost
            session["to_step"] = max(step, session["from_step"])
        if marks or session["from_step"] <= step:
            return


def summary(sessions: list[dict[str, Any]]) -> dict[str, Any]:
    """What goodput.json says, all times in seconds (`start` and `end` since the epoch).

    `effective_training_time` is the share of the elapsed time that was spent on useful training
    (Llama 3 paper, section 3.3.4): on steps that the run still has.
    """
    totals = {key: sum(s["seconds"][key] for s in sessions) for key in CATEGORIES}
    for before, after in zip(sessions, sessions[1:], strict=False):
        totals["down"] += after["start"] - before["end"]
    elapsed = sessions[-1]["end"] - sessions[0]["start"] if sessions else 0.0
    return {
        "start": sessions[0]["start"] if sessions else None,
        "end": sessions[-1]["end"] if sessions else None,
        "elapsed": elapsed,
        "seconds": totals,
        "effective_training_time": totals["step"] / elapsed if elapsed else None,
        "sessions": sessions,
    }
