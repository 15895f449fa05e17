"""What a word is, for all stages that count or compare words; hashes of runs of words, and of lines.

A run without white space; and each character of the scripts that put none between words (Chinese,
Japanese, Thai, Lao, Khmer, Burmese), so that near-duplicates and repetitions are found there too.

Shapes: B bytes, D documents, W words of all documents of a batch, one after the other.
"""

import functools
from collections.abc import Iterator

import daft
import numpy as np
import pyarrow as pa
from daft import functions as F
from jaxtyping import Int, UInt64

from llama3_jax.curation import lexing

UNSPACED = f"[{lexing.UNSPACED}]"
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_INVERSE = pow(_BASE, -1, 2**64)
_KEPT = 1 << 21  # powers that are kept from batch to batch


def spaced(text: daft.Expression) -> daft.Expression:
    """The words, each with its punctuation, between single spaces."""
    return F.strip(F.regexp_replace(F.regexp_replace(text, f"({UNSPACED})", " $1 "), r"\s+", " "))


def normalized(text: daft.Expression) -> daft.Expression:
    """The words in lower case between single spaces; all but letters, marks and digits left out."""
    words = F.regexp_replace(F.lower(text), r"[^\p{L}\p{M}\p{N}]+", " ")
    words = F.regexp_replace(words, f"({UNSPACED})", " $1 ")
    return F.strip(F.normalize(words, white_space=True))


class Pieces:
    """A batch of texts cut at a separator, as NumPy arrays: at spaces `spaced` and `normalized` ones

    into words, at line breaks into lines. An empty text has no piece.

    Attributes:
      data: UInt8[B], the texts' UTF-8, one after the other.
      bounds: Int[D + 1], where each document lies in `data`.
      starts, ends: Int[W], where each word lies in the batch's bytes.
      offsets: Int[D + 1], where each document's words lie in `starts`.
    """

    def __init__(self, texts: pa.Array, separator: str = " "):
        data, bounds = string_bytes(texts)
        spaces = np.flatnonzero(data == ord(separator))
        full = bounds[1:] > bounds[:-1]
        self.starts = np.sort(np.concatenate([bounds[:-1][full], spaces + 1]), kind="stable")
        self.ends = np.sort(np.concatenate([spaces, bounds[1:][full]]), kind="stable")
        counts = np.diff(np.searchsorted(spaces, bounds)) + full
        self.offsets = np.concatenate([[0], np.cumsum(counts)])
        self.data, self.bounds = data, bounds

    @property
    def documents(self) -> Int[np.ndarray, "W"]:
        """Each word's document."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def runs(self, length: int) -> Int[np.ndarray, "runs"]:
        """The first words of all runs of `length` words in one document."""
        last = np.repeat(self.offsets[1:], np.diff(self.offsets)) - length
        return np.flatnonzero(np.arange(len(self.starts)) <= last)

    def hashes(
        self, first: Int[np.ndarray, "n"], length: int | Int[np.ndarray, "n"]
    ) -> UInt64[np.ndarray, "n"]:
        """64-bit hashes of the runs of `length` words that begin at `first`.

        Polynomial in the bytes, modulo 2^64: a run's is a difference of prefix sums, whatever its
        length. Equal for equal runs in any batch.
        """
        start, end = self.starts[first], self.ends[first + length - 1]
        sums, inverse = self._prefix_sums
        return _mixed((sums[end] - sums[start]) * inverse[start])

    @functools.cached_property
    def lengths(self) -> Int[np.ndarray, "W"]:
        """Characters of each word."""
        more = np.flatnonzero((self.data & 0xC0) == 0x80)  # a character's second byte and later
        more = np.searchsorted(self.starts, more, side="right") - 1
        return self.ends - self.starts - np.bincount(more, minlength=len(self.starts))

    @functools.cached_property
    def _prefix_sums(self) -> tuple[UInt64[np.ndarray, "B+1"], UInt64[np.ndarray, "B+1"]]:
        sums = np.zeros(len(self.data) + 1, np.uint64)
        np.cumsum((self.data + np.uint64(1)) * powers(_BASE, len(self.data)), out=sums[1:])
        return sums, powers(_INVERSE, len(sums))


def slices(texts: pa.Array, size: int = 1 << 18) -> Iterator[slice]:
    """Cuts a batch into runs of documents of about `size` bytes: arrays that stay in the cache.

    At least one, so of an empty batch an empty one.
    """
    if not len(texts):
        yield slice(0, 0)
    bounds = string_bytes(texts)[1]
    start = 0
    while start < len(texts):
        stop = max(start + 1, int(np.searchsorted(bounds, bounds[start] + size, side="right")) - 1)
        yield slice(start, stop)
        start = stop


def within(
    hashes: UInt64[np.ndarray, "n"], document: Int[np.ndarray, "n"]
) -> UInt64[np.ndarray, "n"]:
    """Hashes that are equal only within a document of the batch."""
    return hashes ^ (document.astype(np.uint64) * np.uint64(0xD1342543DE82EF95))


def string_bytes(texts: pa.Array) -> tuple[np.ndarray, Int[np.ndarray, "D+1"]]:
    """The UTF-8 bytes of an array of strings, and where each string lies in them; null is empty."""
    texts = texts.cast(pa.large_string()).fill_null("")
    bounds = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset :][: len(texts) + 1]
    if not len(texts) or bounds[-1] == bounds[0]:
        return np.zeros(0, np.uint8), np.zeros(len(texts) + 1, np.int64)
    data = np.frombuffer(texts.buffers()[2], np.uint8)[bounds[0] : bounds[-1]]
    return data, bounds - bounds[0]


def powers(base: int, count: int) -> UInt64[np.ndarray, "count"]:
    """base^0, base^1, ... modulo 2^64."""
    size = 1 << max(count - 1, 0).bit_length()
    return (_kept_powers(base, size) if size <= _KEPT else _powers(base, count))[:count]


@functools.lru_cache(maxsize=2 * _KEPT.bit_length())
def _kept_powers(base: int, size: int) -> UInt64[np.ndarray, "size"]:
    return _powers(base, size)


def _powers(base: int, count: int) -> UInt64[np.ndarray, "count"]:
    factors = np.full(count, base, np.uint64)
    factors[:1] = 1
    return np.cumprod(factors)


def _mixed(hashes: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    """Every bit of the input in every bit of the output (splitmix64)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))
