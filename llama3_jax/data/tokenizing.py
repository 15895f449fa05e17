"""Text files to a tokenised corpus: parallel, restartable, nothing half-written.

Each input file is cut into pieces (byte ranges of jsonl, row groups of parquet); one piece gives
one shard of each split. A piece whose shards exist with the same signature is not done again.
"""

import concurrent.futures
import contextlib
import gzip
import hashlib
import json
import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
from array_record.python.array_record_module import ArrayRecordWriter
from rich.progress import Progress

from llama3_jax.data import tokenizer as tokenizers
from llama3_jax.data.corpus import (
    DATASET_FILE,
    FORMAT,
    LENGTHS_FILE,
    DatasetInfo,
    Document,
    Shard,
    encode_record,
)  # fmt: skip
from llama3_jax.errors import UserError
from llama3_jax.files import atomic_path, write_json

SPLITS = ("train", "validation")
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt")


class Options(NamedTuple):
    """`holdout`: share of documents, chosen by a hash of their id, that go to validation."""

    text_field: str = "text"
    id_field: str = "id"
    holdout: float = 0.0
    piece_bytes: int = 64 * 2**20


class Piece(NamedTuple):
    """Part of an input file: bytes of a jsonl (a line belongs where it starts), parquet groups."""

    path: Path
    start: int
    stop: int


def plan_pieces(inputs: list[Path], options: Options) -> list[Piece]:
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
        if path.suffix == ".jsonl":
            end, step = path.stat().st_size, options.piece_bytes
        elif path.suffix == ".parquet":
            end, step = _parquet(path).num_row_groups, 1
        else:
            end = step = 1
        pieces += [Piece(path, start, start + step) for start in range(0, end, step)]
    return pieces


def tokenize(
    inputs: list[Path], output: Path, tokenizer: Path, options: Options, workers: int = 1
) -> dict[str, DatasetInfo]:
    """Tokenises `inputs` into `output/train` and, with a holdout, `output/validation`.

    Raises:
      UserError: bad input, by file and line; nothing that looks complete is left behind.
    """
    if not 0 <= options.holdout < 1:
        raise UserError(f"--holdout={options.holdout}: must be at least 0 and below 1")
    loaded = tokenizers.load(tokenizer)
    pieces = plan_pieces(inputs, options)
    splits = SPLITS if options.holdout else SPLITS[:1]
    for split in splits:
        (output / split).mkdir(parents=True, exist_ok=True)
        # Until every shard is there, the directory must not pass for a corpus.
        (output / split / DATASET_FILE).unlink(missing_ok=True)
        loaded.save(output / split)

    jobs = [(number, piece, output, tokenizer, options) for number, piece in enumerate(pieces)]
    with Progress(transient=True, disable=not sys.stderr.isatty()) as progress:
        done = progress.track(_run(jobs, workers), total=len(jobs), description="tokenizing")
        reports = list(done)
    infos = {}
    for split in splits:
        info = _finish(output / split, [report[split] for report in reports], loaded)
        if split == "train" and info.documents == 0:
            raise UserError(f"{inputs[0]}: no document with text in the input")
        write_json(output / split / DATASET_FILE, info.model_dump())
        infos[split] = info
    return infos


def _run(jobs: list[tuple], workers: int) -> Iterator[dict]:
    if workers == 1:
        yield from map(_tokenize_piece, jobs)
        return
    # spawn: the parent may hold threads (jax, grain) that a fork would freeze.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            yield from pool.map(_tokenize_piece, jobs)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _tokenize_piece(job: tuple[int, Piece, Path, Path, Options]) -> dict[str, dict]:
    """Writes the shards of one piece; returns (or finds) their reports by split."""
    number, piece, output, tokenizer_path, options = job
    tokenizer = tokenizers.load(tokenizer_path)
    stat = piece.path.stat()
    signature = [str(piece.path), piece.start, piece.stop, stat.st_size, stat.st_mtime_ns,
                 tokenizer.fingerprint, *options]  # fmt: skip
    splits = SPLITS if options.holdout else SPLITS[:1]
    reports = {split: _existing(output / split, number, signature) for split in splits}
    if all(reports.values()):
        return reports

    names = {split: output / split / f"shard-{number:05d}.arrayrecord" for split in splits}
    lengths = {split: [] for split in splits}
    utf8_bytes = dict.fromkeys(splits, 0)
    with _writers(names) as writers:
        for identifier, text in read_piece(piece, options):
            split = SPLITS[in_holdout(identifier, options.holdout)]
            tokens = np.asarray(tokenizer.encode_document(text), np.uint32)
            writers[split].write(encode_record(Document(identifier, tokens)))
            lengths[split].append(len(tokens))
            utf8_bytes[split] += len(text.encode())
    for split in splits:
        with atomic_path(names[split].with_suffix(".npy")) as temporary, open(temporary, "wb") as f:
            np.save(f, np.asarray(lengths[split], np.uint32))
        reports[split] = {
            "signature": signature,
            "shard": {
                "file": names[split].name,
                "documents": len(lengths[split]),
                "tokens": sum(lengths[split]),
            },
            "utf8_bytes": utf8_bytes[split],
        }
        write_json(names[split].with_suffix(".json"), reports[split])
    return reports


@contextlib.contextmanager
def _writers(paths: dict[str, Path]) -> Iterator[dict[str, ArrayRecordWriter]]:
    """One ArrayRecord writer a split; the files appear under their names only when whole."""
    with contextlib.ExitStack() as stack:
        writers = {}
        for split, path in paths.items():
            temporary = stack.enter_context(atomic_path(path))
            # One record a group: documents are read one by one, in shuffled order.
            writers[split] = ArrayRecordWriter(str(temporary), "group_size:1")
            stack.callback(_close, writers[split])
        yield writers


def _close(writer: ArrayRecordWriter) -> None:
    if writer.is_open():
        writer.close()


def _existing(directory: Path, number: int, signature: list) -> dict | None:
    path = directory / f"shard-{number:05d}.json"
    if not path.is_file() or not path.with_suffix(".arrayrecord").is_file():
        return None
    report = json.loads(path.read_text())
    return report if report["signature"] == signature else None


def _finish(directory: Path, reports: list[dict], tokenizer: tokenizers.Tokenizer) -> DatasetInfo:
    """Joins the lengths of all shards and removes what an earlier, different run left."""
    shards = [Shard(**report["shard"]) for report in reports if report["shard"]["documents"]]
    lengths = [np.load((directory / shard.file).with_suffix(".npy")) for shard in shards]
    with atomic_path(directory / LENGTHS_FILE) as temporary, open(temporary, "wb") as file:
        np.save(file, np.concatenate([np.zeros(0, np.uint32), *lengths]))
    known = {f"shard-{number:05d}" for number in range(len(reports))}
    for path in directory.glob("shard-*"):
        if path.name.split(".")[0] not in known:
            path.unlink()
    return DatasetInfo(
        format=FORMAT,
        tokenizer=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        utf8_bytes=sum(report["utf8_bytes"] for report in reports),
        shards=tuple(shards),
    )


def in_holdout(identifier: str, holdout: float) -> bool:
    """Whether a document belongs to validation: by its id alone, so that more data changes nothing."""
    digest = hashlib.blake2b(identifier.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < holdout * 2**64


def read_piece(piece: Piece, options: Options) -> Iterator[tuple[str, str]]:
    """Yields (id, text) of the documents of a piece; documents without text are left out.

    A document without an id field is named by its file and line (or row).

    Raises:
      UserError: a line that is not JSON, or no text field, by file and line.
    """
    if piece.path.suffix == ".txt":
        documents = iter([(piece.path.name, _utf8(piece.path.read_bytes(), piece.path))])
    elif piece.path.suffix == ".parquet":
        documents = _read_parquet(piece, options)
    else:
        documents = _read_jsonl(piece, options)
    return ((identifier, text) for identifier, text in documents if text.strip())


def _read_jsonl(piece: Piece, options: Options) -> Iterator[tuple[str, str]]:
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
            except ValueError as error:
                raise UserError(f"{where}: not a line of JSON ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f"{where}: a {type(row).__name__}, not a JSON object")
            text = row.get(options.text_field)
            if not isinstance(text, str):
                raise UserError(f"{where}: no text in field {options.text_field!r}; "
                                f"fields: {', '.join(row)}")  # fmt: skip
            yield str(row.get(options.id_field, f"{piece.path.name}@{offset}")), text


def _read_parquet(piece: Piece, options: Options) -> Iterator[tuple[str, str]]:
    file = _parquet(piece.path)
    names = file.schema_arrow.names
    if options.text_field not in names:
        raise UserError(
            f"{piece.path}: no column {options.text_field!r}; columns: {', '.join(names)}"
        )
    columns = [name for name in (options.text_field, options.id_field) if name in names]
    row = 0
    for batch in file.iter_batches(1024, list(range(piece.start, piece.stop)), columns):
        texts = batch.column(options.text_field).to_pylist()
        unnamed = [f"{piece.path.name}#{piece.start}.{row + i}" for i in range(len(texts))]
        has_ids = options.id_field in columns
        ids = batch.column(options.id_field).to_pylist() if has_ids else unnamed
        row += len(texts)
        yield from ((str(i), text or "") for i, text in zip(ids, texts, strict=True))


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
