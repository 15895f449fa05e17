"""The queue: one SQLite file in the root folder, which launchers, supervisor and runners share.

Every change is a transaction that names the attempt it is about. Who comes late (a runner whose
start was given up, a second supervisor) changes no row and learns so from the answer; that is what
makes a unit run once although anybody may be killed at any point.

The standard library alone: each unit's runner imports this.
"""

import dataclasses
import json
import socket
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from llama3_jax.errors import UserError
from llama3_jax.launching import database
from llama3_jax.launching.outcome import KILLED, newest_checkpoint, outcome

DATABASE = "launch.sqlite3"
ENDED = ("done", "failed", "stopped")
STATES = ("queued", "starting", "running", *ENDED)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """`executor` is "local" or "slurm"; `environment` is that of the last launch or resume.

    `fingerprint` stands for what was declared, `content` for what the config files said then.
    """

    xid: int
    title: str
    fingerprint: str
    content: str
    executor: str
    cwd: str
    environment: dict[str, str]
    created: float


@dataclasses.dataclass(frozen=True)
class Launch:
    """One `launch` or `resume` of an experiment: its arguments, and the code that it found."""

    xid: int
    number: int
    created: float
    command: list[str]
    host: str
    environment: dict[str, str]
    revisions: list[str]


@dataclasses.dataclass(frozen=True)
class Unit:
    """A row of the queue. `attempt` counts starts, `failures` those that ended in a crash without a
    new checkpoint, `submissions` the jobs that Slurm was given for it; `checkpoint` is the newest
    step that an attempt left."""

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
    checkpoint: int
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


_JSON = ("command", "environment", "after", "requirements", "gpus", "revisions")


class Store:
    """The experiments of a root folder."""

    def __init__(self, root: Path | str):
        self.root = Path(root).absolute()
        self.root.mkdir(parents=True, exist_ok=True)
        self._db = database.connect(self.root / DATABASE)

    def close(self) -> None:
        self._db.close()

    def transaction(self) -> AbstractContextManager[None]:
        return database.transaction(self._db)

    # ------------------------------------------------------------------------------- launchers

    def add(
        self, title: str, fingerprint: str, executor: str, cwd: str, environment: dict[str, str],
        units: Callable[[Path], Sequence[dict[str, Any]]], new: bool, content: str = "",
    ) -> tuple[int, bool]:  # fmt: skip
        """(XID, whether it is new): all of an experiment is queued at once, or nothing.

        `units(directory)` gives the rows. An experiment of the same fingerprint and content is that
        experiment, unless `new`: so the same command after a crash goes on with the same XID.

        Raises:
          UserError: the declaration is known, but its config files have been edited since.
        """
        with self.transaction():
            query = "SELECT xid, content FROM experiments WHERE fingerprint = ? ORDER BY xid DESC"
            known = [] if new else self._db.execute(query, (fingerprint,)).fetchall()
            for row in known:
                if row["content"] == content:
                    return row["xid"], False
            if known:
                raise UserError(
                    f"the config has been edited since experiment {known[0]['xid']} was launched: "
                    "--new launches another experiment with it, and `launch resume "
                    f"{known[0]['xid']}` goes on with that one, whose units that have not begun "
                    "read the edited files"
                )
            xid = self._db.execute(
                "INSERT INTO experiments"
                " (title, fingerprint, content, executor, cwd, environment, created)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (title, fingerprint, content, executor, cwd, json.dumps(environment), time.time()),
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

    def launched(
        self, xid: int, command: Sequence[str], environment: dict[str, str],
        revisions: Sequence[str],
    ) -> int:  # fmt: skip
        """Records a launch or resume, whose environment units get from now on; its number."""
        said = json.dumps(environment)
        with self.transaction():
            query = "SELECT COUNT(*) FROM launches WHERE xid = ?"
            number = self._db.execute(query, (xid,)).fetchone()[0] + 1
            self._db.execute(
                "INSERT INTO launches VALUES (?, ?, ?, ?, ?, ?, ?)",
                (xid, number, time.time(), json.dumps(list(command)), socket.gethostname(), said,
                 json.dumps(list(revisions))),
            )  # fmt: skip
            self._db.execute("UPDATE experiments SET environment = ? WHERE xid = ?", (said, xid))
        return number

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

    def launches(self, xid: int) -> list[Launch]:
        rows = self._db.execute("SELECT * FROM launches WHERE xid = ? ORDER BY number", (xid,))
        return [Launch(**_decoded(row)) for row in rows]

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
            reached = newest_checkpoint(unit.workdir)
            state, failures = outcome(
                code, unit.stop is not None, unit.failures, unit.retries, reached > unit.checkpoint
            )
            self._db.execute(
                "UPDATE units SET state = ?, failures = ?, ended = ?, exit_code = ?, pid = NULL,"
                " checkpoint = ? WHERE id = ?",
                (state, failures, time.time(), code, max(reached, unit.checkpoint), unit_id),
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
