"""An append-only log: one line of JSON a record, which a resumed run cuts back to its checkpoint."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from llama3_jax.errors import UserError
from llama3_jax.files import write_text
from llama3_jax.parallel.processes import is_first, of_first

Record = dict[str, Any]
_BLOCK = 1 << 16  # bytes


class JsonLog:
    """The records of a file; a last line that a crash cut off counts as never written."""

    def __init__(self, path: Path):
        self.path = path
        self._file = None

    def read(self) -> list[Record]:
        """All records: on every process those that the first one reads.

        Raises:
          UserError: a line is damaged.
        """
        text = self.path.read_bytes() if is_first() and self.path.exists() else b""
        records = []
        for number, line in enumerate(bytes(of_first(text)).splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                break
            try:
                records.append(json.loads(line))
            except ValueError:
                raise UserError(f"{self.path}: line {number} is not JSON") from None
        return records

    def append(self, record: Mapping[str, Any], sync: bool = False) -> None:
        """Writes a record; with `sync` it is on disk before this returns."""
        if self._file is None:
            self._file = open(self.path, "a", encoding="utf-8")
        self._file.write(_line(record))
        self._file.flush()
        if sync:
            self.sync()

    def cut_after(self, step: float) -> list[Record]:
        """Ends the file before the first record after `step` steps; returns those of `step` itself.

        Records are in the order of their steps: so the file is read from its end, and no more of it
        than what is removed.

        Raises:
          UserError: a line that counts is not a record.
        """
        self.close()
        if not self.path.exists():
            return []
        found: list[Record] = []
        with open(self.path, "rb+") as file:
            end = file.seek(0, os.SEEK_END)
            for start, line in _lines_from_end(file):
                if not line.endswith(b"\n"):
                    end = start
                    continue
                try:
                    record = json.loads(line)
                    at = record["step"]
                except (ValueError, KeyError, TypeError):
                    message = f"{self.path}: byte {start}: not a record of {self.path.stem}"
                    raise UserError(message) from None
                if at < step:
                    break
                if at == step:
                    found.append(record)
                else:
                    end = start
            file.truncate(end)
            os.fsync(file.fileno())
        return found[::-1]

    def replace(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Writes the file anew."""
        self.close()
        write_text(self.path, "".join(map(_line, records)))

    def sync(self) -> None:
        """Makes sure that all records are on disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


def _lines_from_end(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Lines with the places where they begin, the last one first, a block read at a time."""
    at, rest = file.seek(0, os.SEEK_END), b""
    while at > 0:
        size = min(_BLOCK, at)
        at = file.seek(at - size)
        lines = (file.read(size) + rest).splitlines(keepends=True)
        place = at + sum(map(len, lines))
        first = 1 if at else 0  # what may begin in the block before
        for line in reversed(lines[first:]):
            place -= len(line)
            yield place, line
        rest = lines[0] if first else b""


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
