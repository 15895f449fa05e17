"""Files that are either whole or absent, and outputs that replace nothing unless told to."""

import contextlib
import glob
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llama3_jax.errors import UserError

OVERWRITE = (
    "overwrite"  # the option's name in every program that has an output (cli.define_overwrite)
)
# What this process was told to write, to name it where an error of the system does not.
outputs: list[Path] = []
_unfinished: set[Path] = set()


# ---- checks, before any work ----


def check_output_file(
    option: str, path: str | Path, overwrite: bool = False, inputs: Iterable[str | Path] = ()
) -> Path:
    """`path` as a Path, after making sure that a new file can be written there.

    `option` is what the user gave, such as "--output". Folders above it may be absent.

    Raises:
      UserError: it is one of `inputs`, a folder, there already (unless `overwrite`), or cannot be
        written.
    """
    path = Path(path)
    _check_no_input(option, path, inputs)
    if path.is_dir():
        raise UserError(f"{option}={path} is a folder; name a file")
    if not overwrite and os.path.lexists(path):
        raise UserError(f"{option}={path} exists; name another, or add --{OVERWRITE}")
    _check_writable(option, path, path.parent)
    outputs.append(path)
    return path


def check_output_folder(
    option: str, path: str | Path, overwrite: bool = False, inputs: Iterable[str | Path] = ()
) -> Path:
    """As `check_output_file`, for a folder: it must be absent or empty, unless `overwrite`."""
    path = Path(path)
    _check_no_input(option, path, inputs)
    check_folder(option, path)
    if not overwrite and path.is_dir() and any(path.iterdir()):
        raise UserError(
            f"{option}={path} exists and is not empty; name another, or add --{OVERWRITE}"
        )
    return path


def check_folder(option: str, path: str | Path) -> Path:
    """`path` as a Path, after making sure that it is, or can become, a folder to write in.

    Raises:
      UserError: it is a file or cannot be written in.
    """
    path = Path(path)
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"{option}={path} is not a folder")
    _check_writable(option, path, path)
    outputs.append(path)
    return path


def _check_no_input(option: str, path: Path, inputs: Iterable[str | Path]) -> None:
    real = path.resolve()
    for given in map(Path, inputs):
        if given.resolve() == real or real in given.resolve().parents:
            within = "" if given.resolve() == real else f" holds {given}, which"
            raise UserError(f"{option}={path}{within} is also an input; name another output")


def _check_writable(option: str, path: Path, folder: Path) -> None:
    """Writes and removes a file in `folder`, or in the nearest folder above it that exists."""
    while not os.path.lexists(folder):
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = f"{folder}: {error.strerror}"
        raise UserError(f"{option}={path} cannot be written: {reason}") from None


# ---- writing ----


@contextlib.contextmanager
def atomic_path(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside `path`, moved onto it when the block ends without error.

    The block makes a file, or a folder; a folder replaces one that is not empty only with
    `overwrite`.

    Raises:
      OSError: names `path`, whatever was being written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    _unfinished.add(temporary)
    try:
        yield temporary
        _sync(temporary)
        if overwrite and temporary.is_dir() and path.is_dir():
            _replace_folder(path, temporary)
        else:
            os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        # A write has no name in its error, and this file's own would tell nobody anything.
        if error.errno and error.filename in (None, str(temporary), temporary):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        _remove_all(temporary)
        _unfinished.discard(temporary)


def remove_unfinished() -> None:
    """Removes what `atomic_path` has under way: for a process that ends without unwinding."""
    for temporary in list(_unfinished):
        with contextlib.suppress(OSError):
            _remove_all(temporary)


def _remove_all(temporary: Path) -> None:
    """With what a library has beside it until it is whole, under a longer name."""
    for path in temporary.parent.glob(f"{glob.escape(temporary.name)}*"):
        remove(path)


def remove(path: Path) -> None:
    """Removes a file or a folder with all that it holds; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _replace_folder(path: Path, by: Path) -> None:
    old = path.with_name(f".{path.name}.{uuid.uuid4().hex}.old")
    os.rename(path, old)
    try:
        os.rename(by, path)
    except OSError:
        os.rename(old, path)
        raise
    remove(old)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json_lines(path: Path) -> list[Any]:
    """The values of a file of JSON lines; a last line that a crash cut off is left out."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
