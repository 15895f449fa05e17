"""Documents in jsonl(.gz), parquet and text files, read in pieces that processes can share."""

import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

from llama3_jax.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt")


class Fields(NamedTuple):
    """Names of a document's fields or columns."""

    text: str = "text"
    id: str = "id"
    language: str = "lang"


DEFAULT_FIELDS = Fields()


class TextDocument(NamedTuple):
    id: str
    text: str
    language: str


class Piece(NamedTuple):
    """Part of an input file: bytes of a jsonl (a line belongs where it starts), parquet groups."""

    path: Path
    start: int
    stop: int


def plan_pieces(inputs: list[Path], piece_bytes: int) -> list[Piece]:
    """Cuts the inputs into pieces, in order.

    Raises:
      UserError: no input, a missing file, or a suffix that is not read.
    """
    if not inputs:
        raise UserError("no input files: nothing matches --input")
    pieces = []
    for path in inputs:
        if not path.is_file():
            raise UserError(f"{path}: input file not found")
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"{path}: unknown format; known: {', '.join(SUFFIXES)}")
        if path.suffix == ".parquet":
            pieces += _pack_groups(path, piece_bytes)
            continue
        zipped_or_text = path.suffix != ".jsonl"
        end, step = (1, 1) if zipped_or_text else (path.stat().st_size, piece_bytes)
        pieces += [Piece(path, start, start + step) for start in range(0, end, step)]
    return pieces


def _pack_groups(path: Path, piece_bytes: int) -> Iterator[Piece]:
    """Successive row groups together, up to `piece_bytes` as they are in memory."""
    with _parquet(path) as file:
        sizes = [
            file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)
        ]
    start = packed = 0
    for group, size in enumerate(sizes):
        if packed and packed + size > piece_bytes:
            yield Piece(path, start, group)
            start, packed = group, 0
        packed += size
    if sizes:
        yield Piece(path, start, len(sizes))


def in_holdout(identifier: str, holdout: float) -> bool:
    """Whether a document belongs to validation: by its id alone, so that more data changes nothing."""
    digest = hashlib.blake2b(identifier.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < holdout * 2**64


def read_piece(piece: Piece, fields: Fields = DEFAULT_FIELDS) -> Iterator[TextDocument]:
    """Yields the documents of a piece; those without text are left out.

    A document without an id is named by its file and line (or row); one without a language is of
    language "".

    Raises:
      UserError: what is not JSON, not Unicode or has no text field, by file and line.
    """
    if piece.path.suffix == ".txt":
        text = _utf8(piece.path.read_bytes(), piece.path)
        documents = iter([TextDocument(piece.path.name, text, "")])
    elif piece.path.suffix == ".parquet":
        documents = _read_parquet(piece, fields)
    else:
        documents = _read_jsonl(piece, fields)
    return (document for document in documents if document.text.strip())


def _read_jsonl(piece: Piece, fields: Fields) -> Iterator[TextDocument]:
    zipped = piece.path.suffix == ".gz"
    with gzip.open(piece.path) if zipped else open(piece.path, "rb") as file:
        if piece.start and not zipped:
            file.seek(piece.start - 1)
            file.readline()  # the line that began in the piece before
        while zipped or file.tell() < piece.stop:
            offset = file.tell()
            try:
                line = file.readline()
            except (OSError, EOFError) as error:
                raise UserError(f"{piece.path}: damaged gzip file ({error})") from None
            if not line:
                return
            if not line.strip():
                continue
            where = f"{piece.path} at byte {offset}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: not a line of JSON ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f"{where}: a {type(row).__name__}, not a JSON object")
            text = row.get(fields.text)
            if not isinstance(text, str):
                raise UserError(f"{where}: no text in field {fields.text!r}; "
                                f"fields: {', '.join(row)}")  # fmt: skip
            if b"\\u" in line and any("\ud800" <= character <= "\udfff" for character in text):
                raise UserError(f"{where}: not Unicode: half of a surrogate pair")
            identifier = str(row.get(fields.id, f"{piece.path.name}@{offset}"))
            yield TextDocument(identifier, text, str(row.get(fields.language) or ""))


def _read_parquet(piece: Piece, fields: Fields) -> Iterator[TextDocument]:
    file = _parquet(piece.path)
    names = file.schema_arrow.names
    if fields.text not in names:
        raise UserError(f"{piece.path}: no column {fields.text!r}; columns: {', '.join(names)}")
    columns = [name for name in dict.fromkeys(fields) if name in names]
    for group in range(piece.start, piece.stop):
        where, row = f"{piece.path}: row group {group}", 0
        for batch in _batches(file, group, columns, where):
            try:
                values = {name: batch.column(name).to_pylist() for name in columns}
            except UnicodeDecodeError:
                rows = f"rows {row} to {row + batch.num_rows}"
                raise UserError(f"{where}, {rows}: not UTF-8") from None
            for i, text in enumerate(values[fields.text]):
                identifier = f"{piece.path.name}#{group}.{row + i}"
                if fields.id in values:
                    identifier = str(values[fields.id][i])
                language = values[fields.language][i] if fields.language in values else None
                yield TextDocument(identifier, text or "", str(language or ""))
            row += batch.num_rows


def _batches(
    file: pyarrow.parquet.ParquetFile, group: int, columns: list[str], where: str
) -> Iterator[pyarrow.RecordBatch]:
    try:
        yield from file.iter_batches(1024, [group], columns)
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None):  # the system's, not the file's
            raise
        raise UserError(f"{where}: damaged parquet ({error})") from None


def _parquet(path: Path) -> pyarrow.parquet.ParquetFile:
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a whole parquet file ({error})") from None


def _utf8(content: bytes, path: Path) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None
