"""A tokenised corpus on disk: documents by number, their lengths without reading them.

A corpus is one directory: `dataset.json` (written last, so that a corpus without it is not
complete), `shard-*.arrayrecord` (one record a document), `lengths.npy` (tokens of each document,
uint32, memory-mapped) and the tokenizer that made it.
"""

import bisect
import errno
import functools
import hashlib
import itertools
import json
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import UInt32

from llama3_jax.data import tokenizer as tokenizers
from llama3_jax.errors import UserError
from llama3_jax.schema import Config, parse

DATASET_FILE, LENGTHS_FILE = "dataset.json", "lengths.npy"
FORMAT = 1
# Documents stay in memory for the other rows that they are cut into, which lie in the same window
# of the packing: as many as hold about this many tokens, but no more than the second number.
_KEPT_TOKENS, _MAX_KEPT = 2**20, 1024
# Shards stay open, those of all corpora together up to a quarter of the files a process may have.
_OPEN_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
_MAX_OPEN = (min(_OPEN_FILES, 4096) if _OPEN_FILES > 0 else 4096) // 4


class Shard(Config):
    """One ArrayRecord file and what it holds."""

    file: str
    documents: int
    tokens: int


class DatasetInfo(Config):
    """Content of dataset.json. `utf8_bytes` counts the text without begin and end of text."""

    format: int
    tokenizer: str
    vocab_size: int
    documents: int
    tokens: int
    utf8_bytes: int
    shards: tuple[Shard, ...]


class Document(NamedTuple):
    """A document's id and its tokens, begin and end of text included."""

    id: str
    tokens: UInt32[np.ndarray, "length"]


def encode_record(document: Document) -> bytes:
    """The bytes of one record: length of the id, the id in UTF-8, tokens in little-endian uint32."""
    identifier = document.id.encode()
    tokens = np.asarray(document.tokens, "<u4").tobytes()
    return struct.pack("<I", len(identifier)) + identifier + tokens


def decode_record(record: bytes) -> Document:
    (size,) = struct.unpack_from("<I", record)
    tokens = np.frombuffer(record, "<u4", offset=4 + size)
    return Document(record[4 : 4 + size].decode(), tokens)


@functools.lru_cache(max(_MAX_OPEN, 8))
def _open_reader(path: str, owner: object) -> ArrayRecordReader:
    """The reader of a shard; `owner` tells a corpus from an older one that lay at the same place."""
    # No read-ahead: documents are read in shuffled order. No threads: it is one at a time.
    return ArrayRecordReader(
        path, options="readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=2**15
    )


def _read_error(path: str, record: int, error: Exception) -> str:
    """ArrayRecord takes a file that cannot be opened for an empty one: asks the system first."""
    try:
        with open(path, "rb"):
            pass
    except OSError as system:
        if system.errno in (errno.EMFILE, errno.ENFILE):
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            return f"{path}: too many open files, the limit is {limit}; raise it by ulimit -n"
        return f"{path}: cannot be read ({system.strerror})"
    wrong = isinstance(error, IndexError | ValueError | struct.error)
    if not wrong and not any(word in str(error) for word in ("Corrupted", "DATA_LOSS")):
        return f"{path}: cannot be read at record {record} ({error})"
    return (
        f"{path}: damaged at record {record} ({error}); "
        "delete the file and run llama3_jax.tokenize again"
    )


class Corpus:
    """Random access to the documents of one tokenised corpus."""

    def __init__(self, directory: str | Path):
        """Opens a corpus without reading its documents.

        Raises:
          UserError: absent, incomplete, empty or inconsistent files, by name.
        """
        self.directory = Path(directory)
        path = self.directory / DATASET_FILE
        if not path.is_file():
            raise UserError(
                f"{self.directory}: not a tokenised corpus (no {DATASET_FILE}); "
                "make one with python -m llama3_jax.tokenize"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{path}: damaged, not JSON; run llama3_jax.tokenize again") from None
        self.info = parse(DatasetInfo, content, str(path))
        if self.info.format != FORMAT:
            raise UserError(f"{path}: format {self.info.format}, this version reads {FORMAT}")
        if self.info.tokens == 0:
            raise UserError(f"{self.directory}: the corpus is empty (no tokens)")
        self.lengths = self._open_lengths()
        for shard in self.info.shards:
            if not (self.directory / shard.file).is_file():
                raise UserError(f"{self.directory / shard.file}: shard is missing")

    def _open_lengths(self) -> np.ndarray:
        path = self.directory / LENGTHS_FILE
        try:
            lengths = np.load(path, mmap_mode="r")
        except (OSError, ValueError):
            raise UserError(f"{path}: missing or damaged; run llama3_jax.tokenize again") from None
        if len(lengths) != self.info.documents:
            raise UserError(f"{path}: {len(lengths)} documents, dataset.json says "
                            f"{self.info.documents}; run llama3_jax.tokenize again")  # fmt: skip
        return np.asarray(lengths)  # to index a memmap costs three times as much

    @functools.cached_property
    def _shard_ends(self) -> list[int]:
        return list(itertools.accumulate(shard.documents for shard in self.info.shards))

    @functools.cached_property
    def _owner(self) -> object:
        return object()

    def _path(self, shard: int) -> str:
        return str(self.directory / self.info.shards[shard].file)

    @functools.cached_property
    def _recent(self) -> Callable[[int], Document]:
        kept = min(_KEPT_TOKENS * len(self) // self.info.tokens + 1, _MAX_KEPT)
        return functools.lru_cache(kept)(self._read)

    def __len__(self) -> int:
        return self.info.documents

    def __getstate__(self) -> dict:
        # A worker process opens the files itself; pickled, a map's whole content would travel.
        opened = ("lengths", "_owner", "_recent")
        return {k: v for k, v in self.__dict__.items() if k not in opened}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        self.lengths = self._open_lengths()

    def document(self, index: int) -> Document:
        """Reads one document.

        Raises:
          UserError: the shard is damaged or cannot be read; names the file and the document.
        """
        return self._recent(index)

    def _read(self, index: int) -> Document:
        number = bisect.bisect_right(self._shard_ends, index)
        record = index + self.info.shards[number].documents - self._shard_ends[number]
        try:
            # A range, not a list of one: for a list ArrayRecord goes through the shard's whole
            # index, 0.3 ms in one of 125,000 documents, where this takes 6 us.
            (content,) = _open_reader(self._path(number), self._owner).read(record, record + 1)
            document = decode_record(content)
            if len(document.tokens) != self.lengths[index]:
                raise ValueError(f"{len(document.tokens)} tokens, not {self.lengths[index]}")
        except Exception as error:  # ArrayRecord raises bare RuntimeError, ValueError, …
            raise UserError(_read_error(self._path(number), record, error)) from None
        return document

    @property
    def fingerprint(self) -> str:
        """Changes when the documents do, as far as their shards and lengths tell."""
        digest = hashlib.blake2b(self.info.model_dump_json().encode(), digest_size=8)
        digest.update(np.ascontiguousarray(self.lengths[:: max(1, len(self) // 2**20)]))
        return digest.hexdigest()

    def tokenizer(self) -> tokenizers.Tokenizer:
        return tokenizers.load(self.directory)
