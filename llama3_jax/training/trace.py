"""A trace of some steps of a run (`train --profile=STEP:COUNT`), and where their time went.

The trace is JAX's own: TensorBoard's profile plugin and Perfetto (ui.perfetto.dev) open it.
"""

import gzip
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from llama3_jax.errors import UserError
from llama3_jax.files import write_json

FOLDER, SUMMARY_FILE = "profile", "profile.json"
# By the names of HLO operations and of GPU kernels; the first that matches.
_PARTS = (
    ("collective", r"nccl|all-gather|all-reduce|reduce-scatter|collective|all-to-all|send|recv"),
    ("attention", r"flash|attention|cudnn|fmha"),
    ("product", r"gemm|dot|cublas|cutlass|matmul|nvjet|ynn_fusion"),
)
Interval = tuple[float, float]


class Trace:
    """Records steps `first` to `first + count - 1` of this start into `workdir`/profile."""

    def __init__(self, steps: tuple[int, int] | None, workdir: Path, say: Callable[[str], Any]):
        """`steps` are the first one and how many, or None: no trace."""
        self._first, self._count = steps or (-1, 0)
        self._folder, self._say, self._running = workdir / FOLDER, say, False

    def before(self, step: int) -> None:
        """Called before each step, counted from 0."""
        if self._count and step == self._first:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """Called after each step was begun; `results` are what it computes."""
        if self._running and step == self._first + self._count - 1:
            jax.block_until_ready(results)
            self.close()
            summary = summarize(self._folder, self._count)
            write_json(self._folder / SUMMARY_FILE, summary)
            shares = ", ".join(
                f"{name} {seconds / summary['seconds']:.0%}"
                for name, seconds in summary["parts"].items()
            )
            self._say(
                f"profile of {self._count} steps in {self._folder}: "
                f"{summary['seconds'] / self._count:.4g} s a step: {shares}"
            )

    def close(self) -> None:
        """Ends a trace that runs; what it holds so far is written."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


def parse_steps(text: str) -> tuple[int, int]:
    """STEP:COUNT, the step counted from 0.

    Raises:
      UserError: it is not that.
    """
    found = re.fullmatch(r"(\d+):([1-9]\d*)", text)
    if not found:
        raise UserError(f"--profile={text}: should be STEP:COUNT, for example 100:5")
    return int(found[1]), int(found[2])


def summarize(folder: Path, steps: int) -> dict[str, Any]:
    """Seconds of one device by part, from the newest trace in `folder`.

    A moment counts for one part alone: product or attention before anything else that computes, and
    a collective only where nothing computes ("exposed"); `idle` is the rest of the time.

    Raises:
      UserError: the trace holds no operation of a device.
    """
    newest = max(folder.glob("plugins/profile/*/*.trace.json.gz"), key=lambda p: p.stat().st_mtime)
    with gzip.open(newest) as file:
        events = json.load(file)["traceEvents"]
    work = [e for e in events if e.get("ph") == "X" and "hlo_op" in e.get("args", {})]
    if not work:
        raise UserError(f"{newest}: holds no operation of a device")
    device = min(e["pid"] for e in work)
    parts: dict[str, list[Interval]] = {
        name: [] for name in ("product", "attention", "other", "collective")
    }
    for e in (e for e in work if e["pid"] == device):
        parts[_part(e)].append((e["ts"], e["ts"] + e["dur"]))
    covered: list[Interval] = []
    seconds = {}
    for name, intervals in parts.items():
        union = _union([*covered, *intervals])
        label = "exposed collective" if name == "collective" else name
        seconds[label] = (_length(union) - _length(covered)) / 1e6
        covered = union
    whole = (covered[-1][1] - covered[0][0]) / 1e6
    return {
        "steps": steps,
        "seconds": whole,
        "parts": seconds | {"idle": whole - _length(covered) / 1e6},
        "collective": _length(_union(parts["collective"])) / 1e6,
        "trace": str(newest),
    }


def _part(event: dict[str, Any]) -> str:
    text = f"{event['name']} {event['args']['hlo_op']}".lower()
    return next((part for part, pattern in _PARTS if re.search(pattern, text)), "other")


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time as intervals that do not overlap, in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def _length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)
