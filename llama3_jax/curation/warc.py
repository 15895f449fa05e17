"""Records of a WARC file, with every damaged stretch of bytes named and passed over.

fastwarc raises at a corrupt gzip member and stops in silence at a truncation. Here it is started
again behind each damage, and the bytes are accounted for: they end in a record or in a Damage.
"""

import dataclasses
import io
import mmap
import zlib
from collections.abc import Iterator
from pathlib import Path

from fastwarc.warc import ArchiveIterator, WarcRecord

_GZIP = b"\x1f\x8b\x08"
_CHUNK = 1 << 16


@dataclasses.dataclass(frozen=True)
class Record:
    """A record; `body` is None where it is longer than asked for, and cut where the file ends."""

    offset: int
    type: str
    url: str
    time: str
    content_type: str
    length: int
    body: bytes | None

    @property
    def cut(self) -> bool:
        return self.body is not None and len(self.body) < self.length


@dataclasses.dataclass(frozen=True)
class Damage:
    """`bytes` of the file, from `offset` on, in which no whole record could be read."""

    offset: int
    bytes: int
    what: str


def read(path: Path, max_bytes: int) -> Iterator[Record | Damage]:
    """Yields what the file holds, in its order. Bodies longer than `max_bytes` are not read."""
    with open(path, "rb") as file:
        if not path.stat().st_size:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield from _read(data, max_bytes)


def _read(data: mmap.mmap, max_bytes: int) -> Iterator[Record | Damage]:
    zipped = data[:2] == _GZIP[:2] or data.find(_GZIP, 0, _CHUNK) >= 0 and data[:5] != b"WARC/"
    position = 0
    while position < len(data):
        last, error = None, ""
        try:
            for record in ArchiveIterator(_Window(data, position), parse_http=False):
                last = _taken(record, position, max_bytes)
                yield last
        except OSError as raised:
            error = str(raised)
        end, torn = position, ""
        if last is not None and zipped:
            end, torn = _member_end(data, last.offset, error)
        elif last is not None:
            end, torn = _plain_end(data, last)
        if last is not None and last.cut:
            end, torn = last.offset, torn or "ends inside a record"
        if end == len(data) and not torn:
            return
        if end > position and not torn and _starts_record(data, end, zipped):
            position = end
            continue
        if not torn and zipped:
            _, torn = _member_end(data, end, error)
        position = _next_record(data, end + 1, zipped)
        yield Damage(end, position - end, torn or error or "no WARC record")


def _taken(record: WarcRecord, start: int, max_bytes: int) -> Record:
    length = record.content_length
    return Record(
        start + record.stream_pos,
        record.headers.get("WARC-Type", ""),
        record.headers.get("WARC-Target-URI", "").strip("<>"),
        record.headers.get("WARC-Date", ""),
        record.headers.get("Content-Type", ""),
        length,
        None if length > max_bytes else record.reader.read(length),
    )


class _Window(io.RawIOBase):
    """The file from one position on, as the stream that fastwarc reads."""

    def __init__(self, data: mmap.mmap, start: int):
        self._data, self._start, self._at = data, start, start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at - self._start

    def read(self, size: int = -1) -> bytes:
        stop = len(self._data) if size is None or size < 0 else self._at + size
        part = self._data[self._at : stop]
        self._at += len(part)
        return part


# ------------------------------------------------------------------------------ where to go on


def _member_end(data: mmap.mmap, offset: int, error: str) -> tuple[int, str]:
    """Where the intact gzip member of the record at `offset` ends, and what is wrong behind it.

    One record is one member, as the format wants. In a file that is one long member, records have
    offsets inside it: then nothing can be read behind an `error`.
    """
    if data[offset : offset + 3] != _GZIP:
        return (offset, error) if error else (len(data), "")
    unzip = zlib.decompressobj(31)
    position = offset
    while position < len(data) and not unzip.eof:
        part = data[position : position + _CHUNK]
        position += len(part)
        while part and not unzip.eof:
            try:
                unzip.decompress(part, _CHUNK)
            except zlib.error as torn:
                return offset, str(torn)
            part = unzip.unconsumed_tail
    return (
        (position - len(unzip.unused_data), "") if unzip.eof else (offset, "ends inside a member")
    )


def _plain_end(data: mmap.mmap, record: Record) -> tuple[int, str]:
    """Where an uncompressed record ends."""
    header = data.find(b"\r\n\r\n", record.offset)
    end = header + 4 + record.length
    if header < 0 or end > len(data):
        return record.offset, "ends inside a record"
    while data[end : end + 2] == b"\r\n":
        end += 2
    return end, ""


def _starts_record(data: mmap.mmap, offset: int, zipped: bool) -> bool:
    if not zipped:
        return data[offset : offset + 5] == b"WARC/"
    try:
        return zlib.decompressobj(31).decompress(data[offset : offset + 512], 5) == b"WARC/"
    except zlib.error:
        return False


def _next_record(data: mmap.mmap, offset: int, zipped: bool) -> int:
    """Where the next record starts, or the end of the file."""
    magic = _GZIP if zipped else b"WARC/"
    while True:
        offset = data.find(magic, offset)
        if offset < 0:
            return len(data)
        if _starts_record(data, offset, zipped):
            return offset
        offset += 1
