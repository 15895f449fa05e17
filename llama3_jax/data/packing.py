"""Rows of fixed length cut from an endless, shuffled stream of documents, by random access.

Everything is a pure function of (corpus, seed, position): row i can be built without having built
row i - 1, so a resume costs the same at 10% and at 90% of a corpus.
"""

import functools
import hashlib
from typing import Literal, NamedTuple

import numpy as np

from llama3_jax.data.corpus import Corpus

# The shuffle permutes at most this many blocks of neighbouring documents (32 MB of order).
_MAX_BLOCKS = 2**22
# best_fit fills this many rows at a time, leaving this share of their tokens free to fit.
_WINDOW_ROWS, _SLACK = 64, 1 / 64

Packing = Literal["concat", "best_fit"]


class Span(NamedTuple):
    """Tokens [start, stop) of a document, by its number in the corpus."""

    document: int
    start: int
    stop: int


class Stream:
    """The documents of a corpus one after another, in a new order each epoch, without end.

    Corpora of up to 4M documents are shuffled document by document; larger ones by blocks of
    neighbours, documents shuffled inside their block, so that the order stays small in memory.
    """

    def __init__(self, corpus: Corpus, name: str, seed: int, max_blocks: int = _MAX_BLOCKS):
        self.corpus = corpus
        self.epoch_tokens = corpus.info.tokens
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
        self._key = int.from_bytes(digest, "little")
        self._per_block = -(-len(corpus) // max_blocks)
        starts = np.arange(0, len(corpus), self._per_block)
        self._block_tokens = np.add.reduceat(corpus.lengths, starts, dtype=np.int64)
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffled_blocks)
        self._block = functools.lru_cache(maxsize=256)(self._shuffled_documents)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_epoch", "_block")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffled_blocks)
        self._block = functools.lru_cache(maxsize=256)(self._shuffled_documents)

    def _random(self, *stream: int) -> np.random.Generator:
        """A generator of its own for (seed, name, *stream)."""
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self._key, *stream])))

    def _shuffled_blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks of an epoch in order, and the tokens up to the end of each."""
        order = self._random(0, epoch).permutation(len(self._block_tokens))
        return order, np.cumsum(self._block_tokens[order])

    def _shuffled_documents(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of a block in order, and the tokens up to the end of each."""
        first = block * self._per_block
        documents = np.arange(first, min(first + self._per_block, len(self.corpus)))
        if len(documents) > 1:
            documents = self._random(1, epoch, block).permutation(documents)
        return documents, np.cumsum(self.corpus.lengths[documents], dtype=np.int64)

    def spans(self, start: int, stop: int) -> list[Span]:
        """The pieces of documents that fill stream positions [start, stop), in order."""
        spans = []
        while start < stop:
            epoch, offset = divmod(start, self.epoch_tokens)
            order, block_ends = self._epoch(epoch)
            place = int(np.searchsorted(block_ends, offset, side="right"))
            block = int(order[place])
            offset -= int(block_ends[place]) - int(self._block_tokens[block])
            documents, ends = self._block(epoch, block)
            for i in range(int(np.searchsorted(ends, offset, side="right")), len(documents)):
                document, end = int(documents[i]), int(ends[i])
                length = int(self.corpus.lengths[document])
                begin = offset - (end - length)
                take = min(length - begin, stop - start)
                if take:
                    spans.append(Span(document, begin, begin + take))
                offset, start = offset + take, start + take
                if start == stop:
                    return spans
        return spans


class PackedRows:
    """Rows of one source for one stage: from `origin` in the stream, each `length` long.

    concat: the stream is cut every `length` tokens; no padding, a document is cut at each row end.
    best_fit: windows of the stream are packed whole-document-first into 64 rows with 1/64 of their
    tokens free, the longest document first into the fullest row that holds it (Ding et al. 2024,
    arXiv 2404.10830); only a document longer than a row, at a window's edge, or that fits nowhere
    whole is cut.
    """

    def __init__(self, stream: Stream, origin: int, length: int, packing: Packing):
        self.stream, self.origin, self.length, self.packing = stream, origin, length, packing
        self._window_tokens = int(_WINDOW_ROWS * length * (1 - _SLACK))
        self._window = functools.lru_cache(maxsize=4)(self._pack_window)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "_window"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        self._window = functools.lru_cache(maxsize=4)(self._pack_window)

    def end(self, rows: int) -> int:
        """Stream position after the first `rows` rows; a window once begun counts as used."""
        if self.packing == "concat":
            return self.origin + rows * self.length
        return self.origin + -(-rows // _WINDOW_ROWS) * self._window_tokens

    def row(self, index: int) -> list[Span]:
        """The spans of row `index`."""
        if self.packing == "concat":
            start = self.origin + index * self.length
            return self.stream.spans(start, start + self.length)
        return self._window(index // _WINDOW_ROWS)[index % _WINDOW_ROWS]

    def _pack_window(self, window: int) -> list[list[Span]]:
        start = self.origin + window * self._window_tokens
        spans = self.stream.spans(start, start + self._window_tokens)
        return best_fit(spans, self.length, _WINDOW_ROWS)


def best_fit(spans: list[Span], length: int, rows: int) -> list[list[Span]]:
    """Packs spans into `rows` rows of `length`; cuts only what fits nowhere whole.

    The spans' tokens must not exceed rows * length.
    """
    pieces = []
    for document, start, stop in spans:
        starts = range(start, stop, length)
        pieces += [Span(document, s, min(s + length, stop)) for s in starts]
    pieces.sort(key=lambda piece: (piece.start - piece.stop, piece))  # longest first
    packed: list[list[Span]] = [[] for _ in range(rows)]
    # Rows by free space: filling the fullest row that holds a piece is a scan upwards from its size.
    by_free: list[list[int]] = [[] for _ in range(length + 1)]
    by_free[length] = list(range(rows))[::-1]
    occupied = np.zeros(length + 1, bool)
    occupied[length] = True

    def place(row: int, free: int, piece: Span) -> None:
        packed[row].append(piece)
        left = free - (piece.stop - piece.start)
        by_free[left].append(row)
        occupied[left] = True

    def take(free: int) -> int:
        row = by_free[free].pop()
        occupied[free] = bool(by_free[free])
        return row

    homeless = []
    for piece in pieces:
        size = piece.stop - piece.start
        free = size + int(np.argmax(occupied[size:]))
        if occupied[free]:
            place(take(free), free, piece)
        else:
            homeless.append(piece)
    for document, start, stop in homeless:
        while start < stop:  # cut over the emptiest rows
            free = length - int(np.argmax(occupied[::-1]))
            size = min(free, stop - start)
            place(take(free), free, Span(document, start, start + size))
            start += size
    return packed


def build_row(corpus: Corpus, spans: list[Span], length: int) -> dict[str, np.ndarray]:
    """The arrays of one row, each [length] except the counts.

    tokens, targets: int32. segment_ids: 1.. for each span, 0 for padding. positions: from 0 in each
    span. loss_mask: where the target is the next token of the same document (a cut document's last
    token before the cut has one too, so that every token is predicted once). cut: how many of the
    spans end before their document does.
    """
    tokens = np.zeros(length, np.int32)
    targets = np.zeros(length, np.int32)
    segment_ids = np.zeros(length, np.int32)
    positions = np.zeros(length, np.int32)
    loss_mask = np.zeros(length, bool)
    cut, at = 0, 0
    for segment, (document, start, stop) in enumerate(spans, start=1):
        text = corpus.document(document).tokens
        size, end = stop - start, at + stop - start
        tokens[at:end] = text[start:stop]
        following = text[start + 1 : stop + 1]
        targets[at : at + len(following)] = following
        loss_mask[at : at + len(following)] = True
        segment_ids[at:end] = segment
        positions[at:end] = np.arange(size)
        cut += stop < len(text)
        at = end
    return {
        "tokens": tokens,
        "targets": targets,
        "segment_ids": segment_ids,
        "positions": positions,
        "loss_mask": loss_mask,
        "cut": np.int32(cut),
    }
