"""The queue's SQLite file: its tables, and how processes share it.

A rollback journal, not write-ahead logging: that one keeps its index in memory which the processes
share, so it holds on one machine alone, and the root folder may be on a file system of many
(https://sqlite.org/wal.html, "disadvantages"). The journal needs POSIX locks, no more: NFSv4 has
them, Lustre with `flock`, GPFS. Transactions are a few rows; who finds the file locked waits.

The standard library alone: each unit's runner imports this.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama3_jax.errors import UserError

WAIT_SECONDS = 60
VERSION = 1  # of the tables, in the file's user_version

_SCHEMA = """
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS experiments (
  xid INTEGER PRIMARY KEY AUTOINCREMENT,
  title TEXT NOT NULL,
  fingerprint TEXT NOT NULL,
  content TEXT NOT NULL DEFAULT '',
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
  checkpoint INTEGER NOT NULL DEFAULT 0,
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
CREATE TABLE IF NOT EXISTS launches (
  xid INTEGER NOT NULL REFERENCES experiments,
  number INTEGER NOT NULL,
  created REAL NOT NULL,
  command TEXT NOT NULL,
  host TEXT NOT NULL,
  environment TEXT NOT NULL,
  revisions TEXT NOT NULL,
  PRIMARY KEY (xid, number)
);
CREATE INDEX IF NOT EXISTS units_of_state ON units (state);
"""
# What tables of earlier versions lack.
_COUNT = "INTEGER NOT NULL DEFAULT 0"
_ADDED = {
    "experiments": {"content": "TEXT NOT NULL DEFAULT ''"},
    "units": {"submissions": _COUNT, "checkpoint": _COUNT},
}


def connect(path: Path) -> sqlite3.Connection:
    """Opens the file, which is made where there is none, and brings its tables up to date.

    Raises:
      UserError: the file is no database, is locked, or its file system has no locks.
    """
    try:
        # The environment of a launch is kept: nobody else's business. Opened only to be made: closing
        # it would let go of the locks that other connections of this process hold.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except FileExistsError:
        pass
    db = sqlite3.connect(path, timeout=WAIT_SECONDS, isolation_level=None)
    db.row_factory = sqlite3.Row
    try:
        (mode,) = db.execute("PRAGMA journal_mode").fetchone()
        if mode == "wal":  # of an earlier version
            db.execute("PRAGMA journal_mode=DELETE")
        (version,) = db.execute("PRAGMA user_version").fetchone()
    except sqlite3.DatabaseError as error:
        db.close()
        raise UserError(_explained(path, error)) from None
    if version < VERSION:
        with transaction(db):
            _create(db)
    return db


def _create(db: sqlite3.Connection) -> None:
    for statement in _SCHEMA.split(";"):
        db.execute(statement)
    for table, columns in _ADDED.items():
        there = {row["name"] for row in db.execute(f"PRAGMA table_info({table})")}
        for name, kind in columns.items():
            if name not in there:
                db.execute(f"ALTER TABLE {table} ADD COLUMN {name} {kind}")
    db.execute(f"PRAGMA user_version={VERSION}")


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All of the block's changes, or none.

    Raises:
      UserError: the file is locked for longer than WAIT_SECONDS, or cannot be locked or written.
    """
    try:
        db.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError as error:
        (_, _, path) = db.execute("PRAGMA database_list").fetchone()
        raise UserError(_explained(path, error)) from None
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def _explained(path: Path | str, error: sqlite3.Error) -> str:
    if "locked" in str(error):
        return f"{path}: locked for {WAIT_SECONDS} s by another program; try again"
    if isinstance(error, sqlite3.OperationalError):  # disk I/O error, locking protocol, read-only
        return f"{path}: {error}; the file system must be writable and have POSIX locks"
    return f"{path}: {error}; it is not the launcher's, or damaged: another --root is needed"
