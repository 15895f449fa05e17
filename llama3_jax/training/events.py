"""What went wrong in a run: one line of JSON an event in events.jsonl, which only grows.

An event that a resumed run meets again is the same to the digit, and is not written again: so its
number, which is its place in the file, stays.
"""

import math
from pathlib import Path
from typing import Any

from llama3_jax.training.json_log import JsonLog

EVENTS_FILE = "events.jsonl"
_IDENTITY = ("stage", "step", "batch", "kinds", "action")


class Events:
    """The events of a run so far; all processes hold the same, one of them writes."""

    def __init__(self, workdir: Path | None, writes: bool):
        """Without a workdir they are in memory alone.

        Raises:
          UserError: a line of the file is damaged.
        """
        log = JsonLog(workdir / EVENTS_FILE) if workdir else None
        self.events: list[dict[str, Any]] = log.read() if log else []
        self._log = log if writes else None
        if self._log:
            self._log.cut_after(math.inf)  # a last line that a crash cut off

    def add(self, event: dict[str, Any]) -> int:
        """Adds an event unless it is there, on disk before this returns; returns its number."""
        for number, old in enumerate(self.events):
            if all(old[key] == event[key] for key in _IDENTITY):
                return number
        event = {"event": len(self.events), **event}
        self.events.append(event)
        if self._log:
            self._log.append(event, sync=True)
        return event["event"]

    def left_out(self, before: int | None = None) -> dict[int, list[int]]:
        """Batches that rewinds skip, by stage; those of events before number `before` alone."""
        batches: dict[int, set[int]] = {}
        for event in self.events[:before]:
            for stage, numbers in event.get("left_out", {}).items():
                batches.setdefault(int(stage), set()).update(numbers)
        return {stage: sorted(numbers) for stage, numbers in batches.items()}

    def rewinds(self) -> int:
        return sum("left_out" in event for event in self.events)
