"""The queue's file and its rules, without running anything."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from llama3_jax.errors import UserError
from llama3_jax.launching import database
from llama3_jax.launching.outcome import CHECKPOINTS
from llama3_jax.launching.store import DATABASE, Store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "root")


def added(store: Store, workdir: Path, **values):
    row = {
        "wid": 1, "name": "u", "command": ["true"], "workdir": str(workdir), "environment": {},
        "after": [], "requirements": {"cpus": 1, "gpus": 0}, "retries": 2, **values,
    }  # fmt: skip
    xid, _ = store.add("x", "", "local", "/", {}, lambda _: [row], False)
    return store.units(xid)[0]


def test_restarts_end_without_progress_however_long_they_take(store, tmp_path):
    unit = added(store, tmp_path)

    def attempt(code: int) -> str:
        """An attempt of an hour."""
        number = store.claim(store.unit(unit.id), [])
        assert store.begin(unit.id, number, 1)
        store._db.execute("UPDATE units SET started = started - 3600")
        return store.finish(unit.id, number, code)

    def save(step: int) -> None:
        (tmp_path / CHECKPOINTS / str(step)).mkdir(parents=True)

    assert [attempt(1) for _ in range(3)] == ["queued", "queued", "failed"]
    store.resume(1)
    assert attempt(1) == "queued"
    save(100)
    assert [attempt(1) for _ in range(2)] == ["queued", "queued"]  # the first of these progressed
    save(200)
    assert [attempt(1) for _ in range(3)] == ["queued", "queued", "failed"]
    assert store.unit(unit.id).checkpoint == 200


def test_the_file_holds_on_file_systems_without_shared_memory(store, tmp_path):
    added(store, tmp_path)
    assert store._db.execute("PRAGMA journal_mode").fetchone()[0] == "delete"
    assert sorted(path.name for path in store.root.iterdir()) == [DATABASE]
    assert (store.root / DATABASE).stat().st_mode & 0o777 == 0o600


def test_a_file_of_an_earlier_version_is_taken_over(tmp_path):
    path = tmp_path / DATABASE
    old = sqlite3.connect(path)
    old.execute("PRAGMA journal_mode=WAL")
    schema = database._SCHEMA
    for column in ("submissions", "checkpoint"):
        schema = schema.replace(f"  {column} INTEGER NOT NULL DEFAULT 0,\n", "")
    old.executescript(schema)
    # It is in use: nothing is changed.
    old.execute("BEGIN IMMEDIATE")
    database_wait, database.WAIT_SECONDS = database.WAIT_SECONDS, 0.1
    try:
        with pytest.raises(UserError, match="locked for 0.1 s by another program"):
            Store(tmp_path)
    finally:
        database.WAIT_SECONDS = database_wait
    old.execute("ROLLBACK")
    old.close()
    store = Store(tmp_path)
    assert added(store, tmp_path).submissions == 0
    assert store._db.execute("PRAGMA journal_mode").fetchone()[0] == "delete"


WRITER = """
import os, sys, time
from llama3_jax.launching import database
db = database.connect(sys.argv[1])
with database.transaction(db):
    db.execute("REPLACE INTO settings VALUES ('cpus', '1')")
    db.execute("PRAGMA cache_spill = 1")
    print("in it", flush=True)
    sys.stdin.read()
    os.kill(os.getpid(), 9)
"""


def test_a_writer_that_is_killed_changed_nothing_and_others_wait_for_it(store, monkeypatch):
    store.set_setting("cpus", 7)
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(store.root / DATABASE)], cwd=REPOSITORY, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert writer.stdout.readline() == "in it\n"
    assert store.setting("cpus", None) == 7  # reading does not wait
    monkeypatch.setattr(database, "WAIT_SECONDS", 0.1)
    second = Store(store.root)
    with pytest.raises(UserError, match="locked for 0.1 s"):
        second.set_setting("cpus", 3)
    writer.communicate()
    assert writer.returncode == -9
    assert store.setting("cpus", None) == 7
    second.set_setting("cpus", 3)
    assert store.setting("cpus", None) == 3


def test_opening_it_again_lets_go_of_no_lock(store):
    with store.transaction():
        Store(store.root).close()
        probe = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1], timeout=0); db.execute('BEGIN IMMEDIATE')"
        other = subprocess.run(
            [sys.executable, "-c", probe, str(store.root / DATABASE)],
            capture_output=True, text=True,
        )  # fmt: skip
        assert "database is locked" in other.stderr


def test_a_file_that_is_no_queue_is_one_line(tmp_path):
    (tmp_path / DATABASE).write_bytes(b"not a database, but long enough to be read as one" * 20)
    with pytest.raises(UserError, match="file is not a database; .* another --root"):
        Store(tmp_path)


def test_an_edited_config_is_an_error_that_says_so(store, tmp_path):
    def add(content: str, new: bool = False):
        row = {"wid": 1, "name": "u", "command": [], "workdir": "", "environment": {}, "after": [],
               "requirements": {}, "retries": 0}  # fmt: skip
        return store.add("x", "declared", "local", "/", {}, lambda _: [row], new, content)

    assert add("a") == (1, True) and add("a") == (1, False)
    with pytest.raises(
        UserError, match="edited since experiment 1 was launched: --new .*resume 1`"
    ):
        add("b")
    assert len(store.experiments()) == 1
    assert add("b", new=True) == (2, True)
    assert add("b") == (2, False) and add("a") == (1, False)


def test_each_launch_is_recorded_and_the_last_ones_environment_is_used(store):
    unit = added(store, Path("/w"))
    assert store.launched(unit.xid, ["--config=a.py"], {"A": "1"}, ["here at 01"]) == 1
    assert store.launched(unit.xid, ["resume", "1"], {"A": "2"}, []) == 2
    assert store.experiment(unit.xid).environment == {"A": "2"}
    first, second = store.launches(unit.xid)
    assert (first.environment, first.revisions) == ({"A": "1"}, ["here at 01"])
    assert second.command == ["resume", "1"] and second.revisions == []
