"""The queue: one SQLite file in the root folder, which launchers, supervisor and runners share.

Every change is a transaction that names the attempt it is about. Who comes late (a runner whose
start was given up, a second supervisor) changes no row and learns so from the answer; that is what
makes a unit run once although anybody may be killed at any point.

The standard library alone: each unit's runner imports this.
"""

import dataclasses
import json
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DATABASE = "launch.sqlite3"
ENDED = ("done", "failed", "stopped")
STATES = ("queued", "starting", "running", *ENDED)
# Exit codes of the doors (llama3_jax/cli.py, which this file does not import: it brings JAX).
USER_ERROR, REQUEUE, INTERRUPTED = 2, 75, 130
LONG_RUN = 1_800.0
KILLED = 137  # what a shell says of a program that SIGKILL ended

_SCHEMA = """
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS experiments (
  xid INTEGER PRIMARY KEY AUTOINCREMENT,
  title TEXT NOT NULL,
  fingerprint TEXT NOT NULL,
  executor TEXT NOT NULL,
  cwd TEXT NOT NULL,
  environment TEXT NOT NULL,
  created REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS units (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  xid INTEGER NOT NULL REFERENCES experiments,
  wid INTEGER NOT NULL,
  name TEXT NOT NULL,
  command TEXT NOT NULL,
  workdir TEXT NOT NULL,
  environment TEXT NOT NULL,
  after TEXT NOT NULL,
  requirements TEXT NOT NULL,
  retries INTEGER NOT NULL,
  state TEXT NOT NULL,
  attempt INTEGER NOT NULL DEFAULT 0,
  failures INTEGER NOT NULL DEFAULT 0,
  stop REAL,
  signalled REAL,
  pid INTEGER,
  gpus TEXT NOT NULL DEFAULT '[]',
  job TEXT,
  submissions INTEGER NOT NULL DEFAULT 0,
  started REAL,
  ended REAL,
  exit_code INTEGER,
  UNIQUE (xid, wid),
  UNIQUE (xid, name)
);
CREATE INDEX IF NOT EXISTS units_of_state ON units (state);
"""

_ADDED_COLUMNS = {"submissions": "INTEGER NOT NULL DEFAULT 0"}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """`executor` is "local" or "slurm"; `cwd` and `environment` are those of the launch."""

    xid: int
    title: str
    fingerprint: str
    executor: str
    cwd: str
    environment: dict[str, str]
    created: float


@dataclasses.dataclass(frozen=True)
class Unit:
    """A row of the queue. `attempt` counts starts, `failures` those that ended in a crash,
    `submissions` the jobs that Slurm was given for it."""

    id: int
    xid: int
    wid: int
    name: str
    command: list[str]
    workdir: str
    environment: dict[str, str]
    after: list[int]
    requirements: dict[str, Any]
    retries: int
    state: str
    attempt: int
    failures: int
    stop: float | None
    signalled: float | None
    pid: int | None
    gpus: list[int]
    job: str | None
    submissions: int
    started: float | None
    ended: float | None
    exit_code: int | None

    @property
    def log(self) -> Path:
        """What the unit printed, all attempts one after the other."""
        return Path(self.workdir).parent / "logs" / f"{self.wid}.log"


_JSON = ("command", "environment", "after", "requirements", "gpus")


def outcome(
    code: int, stopping: bool, failures: int, retries: int, seconds: float = 0.0
) -> tuple[str, int]:
    """(state, failures) of a unit whose program ended with `code` after `seconds`.

    The same rule for all executors: 0 is done; after a stop, whatever else it is, stopped; 75 asks
    to be queued again; 2 needs a person; Ctrl-C was one; anything else (a lost process, a hang, a crash) is tried again, up
    to `retries` times in a row: who ran for LONG_RUN seconds starts to be counted anew, for on many
    machines a long run is interrupted again and again.
    """
    failures = 0 if seconds >= LONG_RUN else failures
    if code == 0:
        return "done", failures
    if stopping or code == INTERRUPTED:
        return "stopped", failures
    if code == REQUEUE:
        return "queued", failures
    if code == USER_ERROR:
        return "failed", failures + 1
    return ("queued" if failures < retries else "failed"), failures + 1


class Store:
    """The experiments of a root folder."""

    def __init__(self, root: Path | str):
        self.root = Path(root).absolute()
        self.root.mkdir(parents=True, exist_ok=True)
        path = self.root / DATABASE
        # The environment of a launch is kept: nobody else's business.
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        self._db = sqlite3.connect(path, timeout=60, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        self._write_ahead()
        with self.transaction():
            for statement in _SCHEMA.split(";"):
                self._db.execute(statement)
            there = {row["name"] for row in self._db.execute("PRAGMA table_info(units)")}
            for name, kind in _ADDED_COLUMNS.items():  # to the table of an earlier version
                if name not in there:
                    self._db.execute(f"ALTER TABLE units ADD COLUMN {name} {kind}")

    def _write_ahead(self) -> None:
        """Readers don't wait for a writer. Two that switch at once may refuse each other."""
        for attempt in range(100):
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError:
                if attempt == 99:
                    raise
                time.sleep(0.05)

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def transaction(self):
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    # ------------------------------------------------------------------------------- launchers

    def add(
        self, title: str, fingerprint: str, executor: str, cwd: str, environment: dict[str, str],
        units: Callable[[Path], Sequence[dict[str, Any]]], new: bool,
    ) -> tuple[int, bool]:  # fmt: skip
        """(XID, whether it is new): all of an experiment is queued at once, or nothing.

        `units(directory)` gives the rows. An experiment of the same fingerprint is that experiment,
        unless `new`: so the same command after a crash goes on with the same XID.
        """
        with self.transaction():
            query = "SELECT xid FROM experiments WHERE fingerprint = ? ORDER BY xid DESC"
            if not new and (row := self._db.execute(query, (fingerprint,)).fetchone()):
                return row["xid"], False
            xid = self._db.execute(
                "INSERT INTO experiments (title, fingerprint, executor, cwd, environment, created)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (title, fingerprint, executor, cwd, json.dumps(environment), time.time()),
            ).lastrowid
            for row in units(self.directory(xid)):
                values = {k: json.dumps(v) if k in _JSON else v for k, v in row.items()}
                names = ", ".join(("xid", "state", *values))
                marks = ", ".join("?" * (len(values) + 2))
                self._db.execute(
                    f"INSERT INTO units ({names}) VALUES ({marks})",
                    (xid, "queued", *values.values()),
                )
        return xid, True

    def resume(self, xid: int, wid: int | None = None) -> int:
        """Queues again what failed or was stopped; returns how many units."""
        with self.transaction():
            return self._db.execute(
                "UPDATE units SET state = 'queued', failures = 0, stop = NULL, signalled = NULL,"
                " job = NULL WHERE xid = ? AND wid = IFNULL(?, wid)"
                " AND state IN ('failed', 'stopped')",
                (xid, wid),
            ).rowcount

    def stop(self, xid: int, wid: int | None = None) -> int:
        """What has not begun is stopped now, what runs is asked to; returns how many units.

        Units of Slurm that Slurm has are only asked: it may start them at any moment.
        """
        with self.transaction():
            of = "xid = ? AND wid = IFNULL(?, wid)"
            changed = self._db.execute(
                "UPDATE units SET state = 'stopped', attempt = attempt + 1, ended = ?"
                f" WHERE {of} AND state IN ('queued', 'starting') AND job IS NULL",
                (time.time(), xid, wid),
            ).rowcount
            return (
                changed
                + self._db.execute(
                    "UPDATE units SET stop = ?, signalled = NULL"
                    f" WHERE {of} AND state IN ('queued', 'starting', 'running') AND stop IS NULL",
                    (time.time(), xid, wid),
                ).rowcount
            )

    def set_setting(self, name: str, value: Any) -> None:
        with self.transaction():
            self._db.execute("REPLACE INTO settings VALUES (?, ?)", (name, json.dumps(value)))

    def setting(self, name: str, default: Any) -> Any:
        row = self._db.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
        return json.loads(row["value"]) if row else default

    # --------------------------------------------------------------------------------- readers

    def directory(self, xid: int) -> Path:
        return self.root / str(xid)

    def experiments(self) -> list[Experiment]:
        rows = self._db.execute("SELECT * FROM experiments ORDER BY xid")
        return [Experiment(**_decoded(row)) for row in rows]

    def experiment(self, xid: int) -> Experiment | None:
        row = self._db.execute("SELECT * FROM experiments WHERE xid = ?", (xid,)).fetchone()
        return Experiment(**_decoded(row)) if row else None

    def units(self, xid: int) -> list[Unit]:
        return self._units("WHERE xid = ? ORDER BY wid", xid)

    def unit(self, unit_id: int) -> Unit:
        return self._units("WHERE id = ?", unit_id)[0]

    def _units(self, rest: str, *values: Any) -> list[Unit]:
        rows = self._db.execute(f"SELECT units.* FROM units {rest}", values)
        return [Unit(**_decoded(row)) for row in rows]

    # ----------------------------------------------------------- the supervisor and its runners

    def ready(self) -> list[Unit]:
        """Queued units of this machine whose predecessors are done, first come first."""
        return self._units(
            "JOIN experiments USING (xid) WHERE state = 'queued' AND executor = 'local'"
            " AND NOT EXISTS (SELECT 1 FROM json_each(units.after) AS a JOIN units AS earlier"
            " ON earlier.xid = units.xid AND earlier.wid = a.value WHERE earlier.state != 'done')"
            " ORDER BY units.id"
        )

    def active(self) -> list[Unit]:
        """Units of this machine that were started and have not ended."""
        return self._units(
            "JOIN experiments USING (xid) WHERE state IN ('starting', 'running')"
            " AND executor = 'local' ORDER BY units.id"
        )

    def claim(self, unit: Unit, gpus: Sequence[int]) -> int | None:
        """Takes a queued unit for its next attempt; None where it is queued no more."""
        with self.transaction():
            changed = self._db.execute(
                "UPDATE units SET state = 'starting', attempt = attempt + 1, gpus = ?"
                " WHERE id = ? AND state = 'queued' AND attempt = ?",
                (json.dumps(list(gpus)), unit.id, unit.attempt),
            ).rowcount
        return unit.attempt + 1 if changed else None

    def begin(self, unit_id: int, attempt: int, pid: int) -> bool:
        """The runner's right to run: only for the attempt it was started for."""
        with self.transaction():
            return bool(self._db.execute(
                "UPDATE units SET state = 'running', pid = ?, started = ?, ended = NULL,"
                " exit_code = NULL WHERE id = ? AND attempt = ? AND state = 'starting'",
                (pid, time.time(), unit_id, attempt),
            ).rowcount)  # fmt: skip

    def give_up_start(self, unit_id: int, attempt: int, crashed: bool) -> None:
        """Queues a unit again that nobody began; its runner, should it come yet, may not run."""
        with self.transaction():
            unit = self.unit(unit_id)
            if unit.state != "starting" or unit.attempt != attempt:
                return
            state, failures = ("queued", unit.failures)
            if crashed:
                state, failures = outcome(KILLED, False, unit.failures, unit.retries)
            self._db.execute(
                "UPDATE units SET state = ?, failures = ?, attempt = attempt + 1 WHERE id = ?",
                (state, failures, unit_id),
            )

    def finish(self, unit_id: int, attempt: int, code: int) -> str | None:
        """Records how an attempt ended; the unit's state then, None if it is not that attempt's."""
        with self.transaction():
            unit = self.unit(unit_id)
            if unit.state != "running" or unit.attempt != attempt:
                return None
            seconds = time.time() - unit.started
            state, failures = outcome(
                code, unit.stop is not None, unit.failures, unit.retries, seconds
            )
            self._db.execute(
                "UPDATE units SET state = ?, failures = ?, ended = ?, exit_code = ?, pid = NULL"
                " WHERE id = ?",
                (state, failures, time.time(), code, unit_id),
            )
        return state

    def signalled(self, unit_id: int, attempt: int) -> None:
        with self.transaction():
            self._db.execute(
                "UPDATE units SET signalled = ? WHERE id = ? AND attempt = ?",
                (time.time(), unit_id, attempt),
            )

    # ----------------------------------------------------------------------------------- Slurm

    def submitted(self, jobs: dict[int, str]) -> None:
        """Which job (12 or 12_3) has a unit, by unit id."""
        with self.transaction():
            for unit_id, job in jobs.items():
                self._db.execute(
                    "UPDATE units SET job = ?, attempt = attempt + 1,"
                    " submissions = submissions + 1 WHERE id = ? AND job IS NULL",
                    (job, unit_id),
                )

    def observed(self, unit_id: int, **values: Any) -> None:
        """What Slurm or a job's own record says of a unit: state, exit_code, started, …"""
        with self.transaction():
            names = ", ".join(f"{name} = ?" for name in values)
            self._db.execute(f"UPDATE units SET {names} WHERE id = ?", (*values.values(), unit_id))


def _decoded(row: sqlite3.Row) -> dict[str, Any]:
    return {key: json.loads(row[key]) if key in _JSON else row[key] for key in row.keys()}
