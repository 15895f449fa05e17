"""What lies in input files as rows of documents: WARC, HTML, parquet and JSON lines.

Each record ends in a row with html or text, in a row with a reason, or in a named stretch of damage;
`read_piece` writes the rows as parquet and returns the account. It runs in processes of its own, so
this file imports little.
"""

import datetime
import email.utils
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from llama3_jax.curation import http, warc
from llama3_jax.files import atomic_path

WARC = (".warc", ".warc.gz", ".warc.wet", ".warc.wet.gz")
HTML = (".html", ".htm", ".xhtml", ".html.gz")
PARQUET = (".parquet",)
JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
SUFFIXES = (*WARC, *HTML, *PARQUET, *JSONL)

# A row group ends at either: it is what a reader has in memory.
GROUP_BYTES, GROUP_ROWS = 16 << 20, 1_000
_KINDS = ("html", "xml", "text/plain")

SCHEMA = pa.schema([
    ("doc", pa.string()), ("url", pa.string()), ("time", pa.string()), ("source", pa.string()),
    ("title", pa.string()), ("language", pa.string()), ("language_hint", pa.string()),
    ("content_type", pa.string()), ("html", pa.large_binary()), ("text", pa.large_string()),
    ("bytes", pa.int64()),
])  # fmt: skip
_REJECTED = pa.schema([*SCHEMA, ("reason", pa.string()), ("read_detail", pa.string())])


class File(NamedTuple):
    """`name` tells the file from others of its source, wherever the folder of all lies."""

    path: str
    name: str
    size: int
    changed: int


class Piece(NamedTuple):
    source: str
    files: tuple[File, ...]


class Options(NamedTuple):
    """An Input's options, and at most how many documents to take of each file (0: all)."""

    url_prefix: str
    time: str
    fields: dict[str, str]
    max_bytes: int
    limit: int


class Damage(NamedTuple):
    """A part of a file that gave no row: where (byte, line or row), how large, and why."""

    where: str
    bytes: int
    what: str


def read_piece(piece: Piece, options: Options, kept: Path, rejected: Path) -> dict[str, Any]:
    """Writes the piece's rows; returns, for each file, records and damage."""
    account: dict[str, Any] = {}
    with _Writer(kept, SCHEMA) as keep, _Writer(rejected, _REJECTED) as reject:
        for file in piece.files:
            others: Counter[str] = Counter()
            damaged: list[dict] = []
            rows = 0
            for row in _rows(file, options, others):
                if isinstance(row, Damage):
                    damaged.append(row._asdict())
                    continue
                if options.limit and rows == options.limit:
                    break
                rows += 1
                row = _whole_row(row, piece.source, file, options)
                (keep if row["reason"] is None else reject).add(row)
            account[file.name] = {"path": file.path, "bytes": file.size, "rows": rows}
            if others:
                account[file.name]["other_records"] = dict(sorted(others.items()))
            if damaged:
                account[file.name]["damaged"] = damaged
    return account


def _whole_row(row: dict, source: str, file: File, options: Options) -> dict:
    """Identity, time and sizes; what is too large or no Unicode becomes a rejection."""
    identity = f"{source}\0{file.name}\0{row.pop('position')}"
    row["doc"] = hashlib.blake2b(identity.encode("utf-8", "replace"), digest_size=16).hexdigest()
    row["source"] = source
    row["time"] = iso_time(row.get("time") or options.time)
    row["language"] = ""
    for name in ("url", "title", "language_hint", "content_type"):
        value = row.get(name)
        row[name] = value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""
    for name in ("html", "text", "reason", "read_detail"):
        row.setdefault(name, None)
    if row["text"] is not None:
        try:
            row["bytes"] = len(row["text"].encode())
        except UnicodeEncodeError:
            row |= {"text": None, "bytes": 0, "reason": "not_unicode"}
    else:
        row["bytes"] = row.get("bytes", len(row["html"] or b""))
    if row["bytes"] > options.max_bytes and row["reason"] is None:
        row |= {"html": None, "text": None, "reason": "too_large"}
        row["read_detail"] = f"{row['bytes']} bytes, at most {options.max_bytes}"
    return row


def iso_time(value: Any) -> str:
    """ISO 8601 in UTC, or "" for what is no time.

    Reads dates, ISO 8601, dates of HTTP, 14 digits (YYYYMMDDhhmmss), and seconds since 1970, or
    their thousandths, millionths or billionths, from 1990 to 2100.
    """
    try:
        if not isinstance(value, datetime.datetime):
            value = _time(str(value).strip())
        if value.tzinfo is None:
            value = value.replace(tzinfo=datetime.UTC)
        return value.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, TypeError, IndexError, OverflowError):
        return ""


def _time(text: str) -> datetime.datetime:
    if _DIGITS.fullmatch(text):
        if len(text) == 14:
            return datetime.datetime.strptime(text, "%Y%m%d%H%M%S")
        seconds = float(text)
        for unit in (1, 1e3, 1e6, 1e9):
            if _FIRST_SECOND <= seconds / unit < _LAST_SECOND:
                return datetime.datetime.fromtimestamp(seconds / unit, datetime.UTC)
    try:
        return datetime.datetime.fromisoformat(text)
    except ValueError:
        return email.utils.parsedate_to_datetime(text)


_DIGITS = re.compile(r"[0-9]{9,19}(?:\.[0-9]{0,9})?")
_FIRST_SECOND, _LAST_SECOND = 631_152_000, 4_102_444_800  # of 1990, and after 2099


class _Writer:
    """A parquet file, written a row group at a time; it appears when whole."""

    def __init__(self, path: Path, schema: pa.Schema):
        self._atomic, self._schema = atomic_path(path), schema
        self._rows: list[dict] = []
        self._bytes = 0

    def __enter__(self) -> "_Writer":
        self._writer = parquet_writer(self._atomic.__enter__(), self._schema)
        return self

    def add(self, row: dict) -> None:
        self._rows.append(row)
        self._bytes += row["bytes"] if row["html"] or row["text"] else 0
        if self._bytes >= GROUP_BYTES or len(self._rows) >= GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows, self._bytes = [], 0

    def __exit__(self, *error) -> None:
        if error[0] is None:
            self._flush()
        self._writer.close()
        self._atomic.__exit__(*error)


def parquet_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """As all curation writes parquet: quick compression, and no statistics.

    Daft 0.7 finds no rows for where(a != b) on files that carry them.
    """
    return pq.ParquetWriter(
        path, schema, compression="zstd", compression_level=1, write_statistics=False
    )


# ------------------------------------------------------------------------------------- the formats


def _rows(file: File, options: Options, others: Counter) -> Iterator[dict | Damage]:
    name = file.path.lower()
    if name.endswith(WARC):
        return _warc(file, options, others)
    if name.endswith(HTML):
        return _html(file, options)
    if name.endswith(PARQUET):
        return _parquet(file, options)
    return _jsonl(file, options)


def _warc(file: File, options: Options, others: Counter) -> Iterator[dict | Damage]:
    for record in warc.read(Path(file.path), options.max_bytes):
        if isinstance(record, warc.Damage):
            yield Damage(f"byte {record.offset}", record.bytes, record.what)
        elif record.type in ("response", "resource", "conversion"):
            row = {"position": record.offset, "url": record.url, "time": record.time}
            yield row | _of_record(record, options.max_bytes)
        else:
            others[record.type or "without type"] += 1


def _of_record(record: warc.Record, max_bytes: int) -> dict:
    if record.body is None:
        detail = f"{record.length} bytes, at most {max_bytes}"
        return {"bytes": record.length, "reason": "too_large", "read_detail": detail}
    if record.cut:
        detail = f"{len(record.body)} of {record.length} bytes"
        return {"reason": "cut_record", "read_detail": detail}
    if record.type != "response":
        kind, body = record.content_type, record.body
        if record.type == "conversion":
            return {"content_type": kind, "text": body.decode("utf-8", "replace")}
    else:
        response = http.parse(record.body)
        if response is None:
            return {"reason": "not_http", "read_detail": repr(record.body[:60])}
        kind = response.content_type
        if response.status != 200:
            return {"reason": "http_status", "read_detail": str(response.status)}
        try:
            body = http.decoded(response, max_bytes)
        except http.Undecodable as error:
            return {"reason": str(error), "read_detail": response.content_encoding}
    if kind and not any(known in kind.lower() for known in _KINDS):
        return {"content_type": kind, "reason": "content_type", "read_detail": kind}
    return {"content_type": kind, "html": body}


def _html(file: File, options: Options) -> Iterator[dict | Damage]:
    prefix, path = options.url_prefix, file.name.split("/", 1)[1]
    row = {"position": 0, "url": prefix + path if prefix else Path(file.path).as_uri()}
    try:
        with pa.input_stream(file.path, compression="detect") as stream:
            body = stream.read(options.max_bytes + 1)
    except (OSError, pa.ArrowException) as error:
        _raise_if_system(error)
        yield row | {"reason": "bad_encoding", "read_detail": str(error)}
        return
    yield row | {"html": body}


def _jsonl(file: File, options: Options) -> Iterator[dict | Damage]:
    for number, line in _lines(file.path, 8 * options.max_bytes):
        if isinstance(line, Damage):
            yield line
            continue
        row = {"position": number, "bytes": len(line)}
        if len(line) > 8 * options.max_bytes:
            yield row | {"reason": "too_large", "read_detail": f"line {number}"}
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield row | {"reason": "not_json", "read_detail": f"line {number}: {error}"}
            continue
        if not isinstance(values, dict):
            kind = type(values).__name__
            yield row | {"reason": "not_json", "read_detail": f"line {number}: a {kind}"}
            continue
        yield _of_fields(values, number, options)


def _lines(path: str, limit: int) -> Iterator[tuple[int, bytes | Damage]]:
    """Numbered lines that are not blank; of a longer one than `limit`, its beginning."""
    number, parts, size, cut = 0, [], 0, False
    with pa.input_stream(path, compression="detect") as stream:
        while True:
            try:
                part = stream.read(1 << 16)  # all of it is lost with the damage that it ends in
            except (OSError, pa.ArrowException) as error:
                _raise_if_system(error)
                yield number, Damage(f"line {number + 1}", 0, str(error))
                return
            *lines, last = part.split(b"\n")
            for line in lines:
                number += 1
                whole = b"".join([*parts, line])
                if whole.strip() and not cut:
                    yield number, whole
                parts, size, cut = [], 0, False
            if not cut:
                parts.append(last)
                size += len(last)
            if (size > limit or not part) and not cut:
                whole = b"".join(parts)
                if whole.strip():
                    yield number + 1, whole
                parts, size, cut = [], 0, True
            if not part:
                return


def _raise_if_system(error: Exception) -> None:
    """An error with a number is the system's (no right, no disk): it proves no damage of the file."""
    if isinstance(error, OSError) and error.errno:
        raise error


def _parquet(file: File, options: Options) -> Iterator[dict | Damage]:
    try:
        parquet = pq.ParquetFile(file.path)
    except (OSError, pa.ArrowException) as error:
        _raise_if_system(error)
        yield Damage("whole file", file.size, str(error))
        return
    wanted = {options.fields.get(name, name) for name in ("url", "time", "html", "text", "title",
                                                          "language")}  # fmt: skip
    columns = [name for name in parquet.schema_arrow.names if name in wanted]
    number = 0
    for group in range(parquet.num_row_groups):
        start, number = number, number + parquet.metadata.row_group(group).num_rows
        row = start
        try:
            for batch in parquet.iter_batches(64, [group], columns):
                for values in batch.to_pylist():
                    yield _of_fields(values, row, options)
                    row += 1
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            _raise_if_system(error)
            size = parquet.metadata.row_group(group).total_byte_size
            yield Damage(f"rows {row} to {number - 1}", size, str(error))


def _of_fields(values: dict, position: int, options: Options) -> dict:
    def value(name: str) -> Any:
        return values.get(options.fields.get(name, name))

    html, text = value("html"), value("text")
    row = {
        "position": position, "url": value("url"), "time": value("time"),
        "title": value("title"), "language_hint": value("language"),
    }  # fmt: skip
    if isinstance(html, str):
        html = html.encode("utf-8", "replace")
        row["content_type"] = "text/html; charset=utf-8"
    if isinstance(html, bytes):
        return row | {"html": html}
    if isinstance(text, str):
        return row | {"text": text}
    return row | {"reason": "no_content", "read_detail": "neither html nor text"}
