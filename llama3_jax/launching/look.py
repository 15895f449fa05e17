"""What is told of experiments and their units: states, progress, last lines."""

import json
import os
import shlex
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from llama3_jax.launching.revision import LAUNCHES
from llama3_jax.launching.store import ENDED, STATES, Experiment, Store, Unit

METRICS_FILE = "metrics.jsonl"  # of training/metrics.py, which brings TensorBoard
_TAIL_BYTES = 65_536
LAST_LINES = 8


def shown_state(unit: Unit, by_wid: dict[int, Unit]) -> str:
    """The state; "blocked" for what waits for a unit that will not be done as things stand."""
    if unit.state == "queued":
        for wid in unit.after:
            earlier = by_wid[wid]
            if earlier.state in ("failed", "stopped") or shown_state(earlier, by_wid) == "blocked":
                return "blocked"
        if any(by_wid[wid].state != "done" for wid in unit.after):
            return "waiting"
    if unit.stop and unit.state == "running":
        return "stopping"
    return unit.state


def experiments_table(store: Store) -> Table:
    table = Table()
    for column in ("XID", "experiment", "launched", "on", "units", "states"):
        table.add_column(column, justify="right" if column in ("XID", "units") else "left")
    for experiment in store.experiments():
        units = store.units(experiment.xid)
        counts = Counter(unit.state for unit in units)
        table.add_row(
            str(experiment.xid), experiment.title, clock(experiment.created), experiment.executor,
            str(len(units)), ", ".join(f"{counts[s]} {s}" for s in STATES if counts[s]),
        )  # fmt: skip
    return table


def units_table(units: list[Unit], of: list[Unit]) -> Table:
    """A row for each of `units`; `of` are all units of the experiment."""
    by_wid, table = {unit.wid: unit for unit in of}, Table()
    for column in ("WID", "unit", "state", "starts", "time", "exit", "progress"):
        table.add_column(column, justify="right" if column in ("WID", "starts", "exit") else "left")
    for unit in units:
        table.add_row(
            str(unit.wid), unit.name, shown_state(unit, by_wid), str(unit.attempt or ""),
            duration(unit), "" if unit.exit_code is None else str(unit.exit_code),
            progress(Path(unit.workdir)),
        )  # fmt: skip
    return table


def launch_lines(store: Store, experiment: Experiment) -> list[str]:
    """A line for each launch and resume: when, with which code, and where its changes are."""
    folder = store.directory(experiment.xid) / LAUNCHES
    return [
        f"launch {launch.number}, {clock(launch.created)} on {launch.host}: "
        f"{', '.join(launch.revisions) or 'no git revision'} ({folder / str(launch.number)}): "
        f"{shlex.join(launch.command)}"
        for launch in store.launches(experiment.xid)
    ]


def duration(unit: Unit) -> str:
    """How long its last attempt has taken."""
    if unit.started is None or unit.state == "queued":
        return ""
    seconds = round((unit.ended or time.time()) - unit.started)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def progress(workdir: Path) -> str:
    """Step, tokens and loss of the last recorded step, for units that train."""
    for line in reversed(last_lines(workdir / METRICS_FILE, 20)):
        try:
            record: dict[str, Any] = json.loads(line)
        except ValueError:  # a line that is being written
            continue
        if record.get("kind") == "train":
            return (f"step {record['step']:,}, {record['tokens']:,} tokens, "
                    f"loss {float(record['loss']):.4f}")  # fmt: skip
    return ""


def last_lines(path: Path, count: int) -> list[str]:
    """The last whole lines of a file; none where it does not exist."""
    try:
        with open(path, "rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
            return file.read().decode(errors="replace").splitlines()[-count:]
    except FileNotFoundError:
        return []


def follow(store: Store, unit: Unit, refresh) -> Iterator[str]:
    """What the unit prints, as it comes, until it has ended; `refresh` looks at its executor."""
    position = 0
    while True:
        ended = store.unit(unit.id).state in ENDED
        if unit.log.exists():
            with open(unit.log, encoding="utf-8", errors="replace") as file:
                file.seek(position)
                if text := file.read():
                    yield text
                position = file.tell()
        if ended:
            return
        time.sleep(0.3)
        refresh()


def clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
