"""What is measured: one line of JSON each in metrics.jsonl, and TensorBoard beside it."""

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from llama3_jax.errors import UserError
from llama3_jax.files import read_json_lines
from llama3_jax.training.sinks import Sink

_BLOCK = 1 << 16  # bytes
METRICS_FILE, GATES_FILE = "metrics.jsonl", "gates.jsonl"


class MetricsWriter:
    """Appends records; a resumed run first forgets those after the checkpoint it goes on from."""

    def __init__(self, workdir: Path, step: int, sinks: Sequence[Sink] = ()):
        """Drops the records of steps after `step`, and a line cut off by a crash.

        Records are in the order of their steps: so the file is read from its end, and no more of it
        than what goes. `of_step` are then those after exactly `step` steps.
        """
        self._sinks = sinks
        self._path = workdir / METRICS_FILE
        self.of_step: list[dict[str, Any]] = []
        if self._path.exists():
            self.of_step = _cut_after(self._path, step)
        self._file = open(self._path, "a", encoding="utf-8")
        # In this thread: SummaryWriter's own dies of a full disk in silence, and its queue then blocks.
        (workdir / "tensorboard").mkdir(exist_ok=True)
        self._board = EventsWriter(str(workdir / "tensorboard" / "events"), f".{step}")
        start = SessionLog(status=SessionLog.START)  # what came after `step` before counts no more
        self._board.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, kind: str, step: int, tokens: int, values: dict[str, Any]) -> None:
        """Records `values` of a kind ("train", "validation", …) after `step` steps.

        Numbers, and numbers in dicts one level down, also go to TensorBoard and the sinks.
        """
        record = {"kind": kind, "step": step, "tokens": tokens, **values}
        self._file.write(_line(record))
        self._file.flush()
        scalars = dict(_scalars(values, kind))
        shown = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        if shown:
            event = Event(wall_time=time.time(), step=step, summary=Summary(value=shown))
            self._board.write_event(event)
            self._board.flush()
        for sink in self._sinks:
            sink.write(scalars | {"tokens": tokens}, step)

    def sync(self) -> None:
        """Makes sure that all records are on disk: before a checkpoint counts on them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        self._board.close()
        for sink in self._sinks:
            sink.close()


def _cut_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Ends a file of records before the first one after `step`; returns those of `step` itself.

    Raises:
      UserError: a line that counts is not a record.
    """
    found: list[dict[str, Any]] = []
    with open(path, "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        for start, line in _lines_from_end(file):
            if not line.endswith(b"\n"):
                end = start
                continue
            try:
                record = json.loads(line)
                at = record["step"]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}: byte {start}: not a record of metrics") from None
            if at < step:
                break
            if at == step:
                found.append(record)
            else:
                end = start
        file.truncate(end)
        os.fsync(file.fileno())
    return found[::-1]


def _lines_from_end(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Lines with the places where they begin, the last one first, a block read at a time."""
    at, rest = file.seek(0, os.SEEK_END), b""
    while at > 0:
        size = min(_BLOCK, at)
        at = file.seek(at - size)
        lines = (file.read(size) + rest).splitlines(keepends=True)
        place = at + sum(map(len, lines))
        first = 1 if at else 0  # what may begin in the block before
        for line in reversed(lines[first:]):
            place -= len(line)
            yield place, line
        rest = lines[0] if first else b""


def _scalars(values: dict[str, Any], kind: str) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        within = value if isinstance(value, dict) else {"": value}
        for name, number in within.items():
            if isinstance(number, int | float):
                yield f"{kind}/{key}/{name}".rstrip("/"), number


class NoMetrics:
    """Stands for a MetricsWriter on the processes that do not write."""

    of_step: tuple[dict[str, Any], ...] = ()

    def write(self, kind: str, step: int, tokens: int, values: dict[str, Any]) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """All records of a run; a last line that a crash cut off is left out."""
    return read_json_lines(workdir / METRICS_FILE)


def json_number(value: float) -> float | str:
    """JSON has no NaN or infinity: those are written as strings."""
    return float(value) if math.isfinite(value) else str(value)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
