"""Outputs are checked before any work, replace nothing unless told to, and are whole or absent."""

import contextlib
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama3_jax import folder_lock
from llama3_jax.errors import UserError
from llama3_jax.files import (
    atomic_path,
    check_folder,
    check_output_file,
    check_output_folder,
    remove_unfinished,
    write_text,
)
from llama3_jax.folder_lock import LOCK_FILE, locked
from tests.file_systems import full_disk, read_only


def test_an_output_that_exists_is_refused_unless_told_to_replace_it(tmp_path):
    file, folder = tmp_path / "a.json", tmp_path / "folder"
    assert check_output_file("--json", file) == file
    assert check_output_file("--json", tmp_path / "new" / "deep" / "a.json")
    assert not (tmp_path / "new").exists()
    file.write_text("precious")
    with pytest.raises(UserError, match=r"--json=.*a.json exists; .*--overwrite"):
        check_output_file("--json", file)
    check_output_file("--json", file, overwrite=True)
    os.symlink(tmp_path / "nowhere", tmp_path / "link")
    with pytest.raises(UserError, match="--json=.*link exists"):
        check_output_file("--json", tmp_path / "link")

    check_output_folder("--output", folder)
    folder.mkdir()
    check_output_folder("--output", folder)
    with pytest.raises(UserError, match="--json=.*folder is a folder; name a file"):
        check_output_file("--json", folder, overwrite=True)
    (folder / "x").write_text("precious")
    with pytest.raises(UserError, match="--output=.*folder exists and is not empty"):
        check_output_folder("--output", folder)
    check_output_folder("--output", folder, overwrite=True)
    check_folder("--workdir", folder)
    for check in (check_output_folder, check_folder):
        with pytest.raises(UserError, match="--output=.*a.json is not a folder"):
            check("--output", file)
    assert file.read_text() == "precious" and sorted(p.name for p in tmp_path.iterdir()) == [
        "a.json", "folder", "link",
    ]  # fmt: skip


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_input_is_no_output(tmp_path, overwrite, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "folder" / "labels.parquet"
    source.parent.mkdir()
    source.write_text("precious")
    os.symlink(source, tmp_path / "link")
    for name in (source, tmp_path / "link", "folder/../folder/labels.parquet"):
        with pytest.raises(UserError, match="is also an input"):
            check_output_file("--output", name, overwrite, inputs=["other", source])
    with pytest.raises(UserError, match="folder holds .*labels.parquet, which is also an input"):
        check_output_folder("--output", source.parent, overwrite, inputs=[source])
    check_output_folder("--output", source.parent / "new", overwrite, inputs=[source.parent])


def test_what_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--json=.*/file/a.json cannot be written: .*/file: Not a"):
        check_output_file("--json", tmp_path / "file" / "a.json")
    with read_only(tmp_path / "locked") as folder:
        for check in (check_output_file, check_output_folder, check_folder):
            with pytest.raises(
                UserError, match="--to=.*/locked/a/b cannot be written: .*/locked: "
            ):
                check("--to", folder / "a" / "b")
        with pytest.raises(UserError, match="--workdir=.*/locked cannot be written"):
            check_folder("--workdir", folder)


def test_a_full_disk_is_named_by_the_output(tmp_path):
    with full_disk(tmp_path / "full") as folder, pytest.raises(OSError) as raised:
        write_text(folder / "a.json", "x" * 2**21)
    assert raised.value.errno == errno.ENOSPC
    assert raised.value.filename == str(folder / "a.json")


def test_a_folder_is_whole_or_absent(tmp_path):
    target = tmp_path / "target"

    def fill(name: str, overwrite: bool) -> None:
        with atomic_path(target, overwrite) as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)

    fill("first", False)
    with pytest.raises(OSError, match="target") as raised:
        fill("second", False)
    assert raised.value.errno == errno.ENOTEMPTY
    assert [p.name for p in target.iterdir()] == ["first"]
    fill("second", True)
    assert [p.name for p in target.iterdir()] == ["second"]
    with pytest.raises(KeyError), atomic_path(target, True) as temporary:
        temporary.mkdir()
        (temporary / "third").write_text("")
        raise KeyError
    unfinished = atomic_path(tmp_path / "unfinished")
    unfinished.__enter__().mkdir()
    remove_unfinished()
    assert [p.name for p in target.iterdir()] == ["second"]
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


HOLD = """
import contextlib, errno, fcntl, pathlib, sys
from llama3_jax import folder_lock
def no_locks(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")
if sys.argv[2] == "none":
    fcntl.flock = no_locks
with folder_lock.locked(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def holder(folder: Path, kind: str):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), kind], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close(), process.stdout.close()


def _no_locks(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")


@pytest.mark.parametrize("kind", ["flock", "none"])
def test_one_process_at_a_time_in_a_folder(tmp_path, kind, monkeypatch):
    if kind == "none":
        monkeypatch.setattr(folder_lock.fcntl, "flock", _no_locks)
    with holder(tmp_path / "run", kind) as process:
        with pytest.raises(UserError, match=f"--workdir=.*process {process.pid} on .*, since 20"):
            with locked(tmp_path / "run"):
                pass
    with locked(tmp_path / "run"):  # that one was killed
        pass
        (tmp_path / "run" / "result").write_text("")
    # The lock's file of a file system without locks stays there, and is empty.
    assert sum(path.stat().st_size for path in (tmp_path / "run").iterdir()) == 0
    with pytest.raises(KeyError), locked(tmp_path / "new" / "run"):
        raise KeyError
    assert (tmp_path / "new").exists() == (kind == "none")


def test_without_locks_a_host_that_died_is_told_by_its_silence(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock.fcntl, "flock", _no_locks)
    monkeypatch.setattr(folder_lock, "DEAD_SECONDS", 1.0)
    held = tmp_path / f"{LOCK_FILE}.held"
    held.write_text('{"host": "elsewhere", "pid": 1, "since": "2026-01-01"}\n')
    with locked(tmp_path):
        assert "elsewhere" not in held.read_text()
    assert not held.exists()
    held.write_text('{"host": "elsewhere", "pid": 1, "since": "2026-01-01"}\n')
    monkeypatch.setattr(folder_lock.time, "sleep", lambda _: os.utime(held))
    with pytest.raises(UserError, match="process 1 on elsewhere, since 2026-01-01"):
        with locked(tmp_path):
            pass
