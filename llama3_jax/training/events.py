"""What went wrong in a run: one line of JSON an event in events.jsonl, which only grows.

An event that a resumed run meets again is the same to the digit, and is not written again: so its
number, which is its place in the file, stays.
"""

import json
import os
from pathlib import Path
from typing import Any

from llama3_jax.errors import UserError
from llama3_jax.parallel.processes import is_first, of_first

EVENTS_FILE = "events.jsonl"
_IDENTITY = ("stage", "step", "batch", "kinds", "action")


class Events:
    """The events of a run so far; all processes hold the same, one of them writes."""

    def __init__(self, workdir: Path, writes: bool):
        """All processes see what the first one reads; a last line that a crash cut off counts as
        never written.

        Raises:
          UserError: another line is damaged.
        """
        self._path, self._writes = workdir / EVENTS_FILE, writes
        self.events: list[dict[str, Any]] = []
        text = self._path.read_bytes() if is_first() and self._path.exists() else b""
        whole = 0  # bytes
        for number, line in enumerate(bytes(of_first(text)).splitlines(keepends=True)):
            if not line.endswith(b"\n"):
                break
            try:
                self.events.append(json.loads(line))
            except ValueError:
                raise UserError(f"{self._path}: line {number + 1} is not JSON") from None
            whole += len(line)
        if writes and self._path.exists():
            os.truncate(self._path, whole)

    def add(self, event: dict[str, Any]) -> int:
        """Adds an event unless it is there, on disk before this returns; returns its number."""
        for number, old in enumerate(self.events):
            if all(old[key] == event[key] for key in _IDENTITY):
                return number
        event = {"event": len(self.events), **event}
        self.events.append(event)
        if not self._writes:
            return event["event"]
        line = (json.dumps(event, ensure_ascii=False) + "\n").encode()
        with open(self._path, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        return event["event"]

    def left_out(self, before: int | None = None) -> dict[int, list[int]]:
        """Batches that rewinds left out, by stage; those of events before number `before` alone."""
        batches: dict[int, set[int]] = {}
        for event in self.events[:before]:
            for stage, numbers in event.get("left_out", {}).items():
                batches.setdefault(int(stage), set()).update(numbers)
        return {stage: sorted(numbers) for stage, numbers in batches.items()}

    def rewinds(self) -> int:
        return sum("left_out" in event for event in self.events)
