"""Folders that nothing can be written in, whoever the user is, and folders on a disk that is full."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """An empty folder, or one with what is in it, that cannot be written in."""
    folder.mkdir(exist_ok=True)
    if os.getuid():
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)
    else:  # whom permissions do not stop
        with _mounted(["--bind", str(folder), str(folder)], folder):
            _mount(["-o", "remount,ro,bind", str(folder)])
            yield folder


@contextlib.contextmanager
def full_disk(folder: Path, kilobytes: int = 64) -> Iterator[Path]:
    """A folder on a disk of so many kilobytes."""
    folder.mkdir(exist_ok=True)
    if os.getuid():
        pytest.skip("a small disk can be mounted by root only")
    options = ["-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    with _mounted(options, folder):
        yield folder


@contextlib.contextmanager
def _mounted(options: list[str], folder: Path) -> Iterator[None]:
    _mount(options)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _mount(options: list[str]) -> None:
    done = subprocess.run(["mount", *options], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
