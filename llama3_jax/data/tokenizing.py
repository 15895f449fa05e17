"""Text files to a tokenised corpus: parallel, restartable, nothing half-written.

Each input file is cut into pieces (byte ranges of jsonl, row groups of parquet); one piece gives
one shard of each split. A piece whose shards exist with the same signature is not done again.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import UInt32
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
from llama3_jax.data.documents import Fields, Piece, in_holdout, plan_pieces, read_piece
from llama3_jax.data.workers import run_jobs
from llama3_jax.errors import UserError
from llama3_jax.files import atomic_path, write_json
from llama3_jax.folder_lock import locked

SPLITS = ("train", "validation")


class Options(NamedTuple):
    """`holdout`: share of documents, chosen by a hash of their id, that go to validation."""

    text_field: str = "text"
    id_field: str = "id"
    holdout: float = 0.0
    piece_bytes: int = 64 * 2**20


def tokenize(
    inputs: list[Path], output: Path, tokenizer: Path, options: Options, workers: int = 1
) -> dict[str, DatasetInfo]:
    """Tokenises `inputs` into `output/train` and, with a holdout, `output/validation`.

    A corpus that is there is replaced, both of its splits.

    Raises:
      UserError: bad input, by file and line, or another process writes there; nothing that looks
        complete is left behind.
    """
    if not 0 <= options.holdout < 1:
        raise UserError(f"--holdout={options.holdout}: must be at least 0 and below 1")
    loaded = tokenizers.load(tokenizer)
    pieces = plan_pieces(inputs, options.piece_bytes)
    with locked(output, "--output"):
        # Until every shard is there, no directory must pass for a corpus.
        for path in existing(output):
            path.unlink()
        return _tokenize(pieces, output, tokenizer, loaded, options, workers)


def existing(output: Path) -> list[Path]:
    """The files that make a corpus of each split that is there."""
    return [path for split in SPLITS if (path := output / split / DATASET_FILE).is_file()]


def _tokenize(
    pieces: list[Piece],
    output: Path,
    tokenizer: Path,
    loaded: tokenizers.Tokenizer,
    options: Options,
    workers: int,
) -> dict[str, DatasetInfo]:
    splits = SPLITS if options.holdout else SPLITS[:1]
    for split in splits:
        (output / split).mkdir(parents=True, exist_ok=True)
        loaded.save(output / split)
    for split in set(SPLITS) - set(splits):
        _remove_split(output / split)

    jobs = [(number, piece, output, tokenizer, options) for number, piece in enumerate(pieces)]
    with Progress(transient=True, disable=not sys.stderr.isatty()) as progress:
        done = progress.track(
            run_jobs(_tokenize_piece, jobs, workers), total=len(jobs), description="tokenizing"
        )
        reports = list(done)
    infos = {}
    for split in splits:
        info = _finish(output / split, [report[split] for report in reports], loaded)
        if split == "train" and info.documents == 0:
            raise UserError(f"{output}: no document with text in the input")
        write_json(output / split / DATASET_FILE, info.model_dump())
        infos[split] = info
    return infos


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
        fields = Fields(options.text_field, options.id_field)
        for document in read_piece(piece, fields):
            split = SPLITS[in_holdout(document.id, options.holdout)]
            try:
                tokens = np.asarray(tokenizer.encode_document(document.text), np.uint32)
            except ValueError as error:
                raise UserError(f"{piece.path}: document {document.id!r}: {error}") from None
            writers[split].write(encode_record(Document(document.id, tokens)))
            lengths[split].append(len(tokens))
            utf8_bytes[split] += len(document.text.encode())
    for split in splits:
        _save_lengths(names[split].with_suffix(".npy"), np.asarray(lengths[split], np.uint32))
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


def _remove_split(directory: Path) -> None:
    """What an earlier run with another holdout left; files of others stay."""
    own = (LENGTHS_FILE, tokenizers.RANKS_FILE, tokenizers.CONFIG_FILE)
    for path in [*directory.glob("shard-*"), *(directory / name for name in own)]:
        path.unlink(missing_ok=True)
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def _existing(directory: Path, number: int, signature: list) -> dict | None:
    path = directory / f"shard-{number:05d}.json"
    if not path.is_file() or not path.with_suffix(".arrayrecord").is_file():
        return None
    report = json.loads(path.read_text())
    return report if report["signature"] == signature else None


def _save_lengths(path: Path, lengths: UInt32[np.ndarray, "documents"]) -> None:
    """As np.save does, which leaves out why the disk takes no more."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        header = np.lib.format.header_data_from_array_1_0(lengths)
        np.lib.format.write_array_header_1_0(file, header)
        file.write(lengths.data)


def _finish(directory: Path, reports: list[dict], tokenizer: tokenizers.Tokenizer) -> DatasetInfo:
    """Joins the lengths of all shards and removes what an earlier, different run left."""
    shards = [Shard(**report["shard"]) for report in reports if report["shard"]["documents"]]
    lengths = [np.load((directory / shard.file).with_suffix(".npy")) for shard in shards]
    whole = np.concatenate([np.zeros(0, np.uint32), *lengths])
    _save_lengths(directory / LENGTHS_FILE, whole)
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
