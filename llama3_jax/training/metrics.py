"""What is measured: one line of JSON each in metrics.jsonl, and TensorBoard beside it."""

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from llama3_jax.files import read_json_lines
from llama3_jax.training.json_log import JsonLog
from llama3_jax.training.sinks import Sink

METRICS_FILE, GATES_FILE = "metrics.jsonl", "gates.jsonl"


class Metrics:
    """Takes records and keeps none: for the processes that do not write."""

    of_step: Sequence[dict[str, Any]] = ()

    def write(self, kind: str, step: int, tokens: int, values: dict[str, Any]) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


class MetricsWriter(Metrics):
    """Appends records; a resumed run first forgets those after the checkpoint it goes on from."""

    def __init__(self, workdir: Path, step: int, sinks: Sequence[Sink] = ()):
        """Drops the records of steps after `step`; `of_step` are those after exactly `step` steps."""
        self._sinks = sinks
        (workdir / METRICS_FILE).touch()  # readers look for it also before the first step
        self._log = JsonLog(workdir / METRICS_FILE)
        self.of_step = self._log.cut_after(step)
        # In this thread: SummaryWriter's own dies of a full disk in silence, and its queue then blocks.
        (workdir / "tensorboard").mkdir(exist_ok=True)
        self._board = EventsWriter(str(workdir / "tensorboard" / "events"), f".{step}")
        start = SessionLog(status=SessionLog.START)  # what came after `step` before counts no more
        self._board.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, kind: str, step: int, tokens: int, values: dict[str, Any]) -> None:
        """Records `values` of a kind ("train", "validation", …) after `step` steps.

        Numbers, and numbers in dicts one level down, also go to TensorBoard and the sinks.
        """
        self._log.append({"kind": kind, "step": step, "tokens": tokens, **values})
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
        self._log.sync()

    def close(self) -> None:
        self._log.close()
        self._board.close()
        for sink in self._sinks:
            sink.close()


def _scalars(values: dict[str, Any], kind: str) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        within = value if isinstance(value, dict) else {"": value}
        for name, number in within.items():
            if isinstance(number, int | float):
                yield f"{kind}/{key}/{name}".rstrip("/"), number


class MemoryMetrics(Metrics):
    """Keeps what a MetricsWriter would write in `records`."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def write(self, kind: str, step: int, tokens: int, values: dict[str, Any]) -> None:
        self.records.append({"kind": kind, "step": step, "tokens": tokens, **values})


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """All records of a run; but not a last line that a crash cut off."""
    return read_json_lines(workdir / METRICS_FILE)


def json_number(value: float) -> float | str:
    """JSON has no NaN or infinity: those are written as strings."""
    return float(value) if math.isfinite(value) else str(value)
