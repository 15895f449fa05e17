"""Rows of fixed length cut from an endless, shuffled stream of documents, by random access.

Everything is a pure function of (corpus, seed, position): row i can be built without having built
row i - 1, so a resume costs the same at 10% and at 90% of a corpus.
"""

import bisect
import functools
import hashlib
import itertools
from typing import Literal, NamedTuple

import numpy as np

from llama3_jax.data.corpus import Corpus

# The shuffle permutes at most this many blocks of neighbouring documents (32 MB of order).
_MAX_BLOCKS = 2**22
# Rows are shuffled inside windows of at most this many tokens (less where the corpus is small, but
# never fewer rows than the second number); best_fit leaves a share of their tokens free.
_WINDOW_TOKENS, _MIN_WINDOW_ROWS, _SLACK = 2**18, 64, 1 / 64

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

    def random(self, *stream: int) -> np.random.Generator:
        """A generator of its own for (seed, name, *stream)."""
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self._key, *stream])))

    def _shuffled_blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks of an epoch in order, and the tokens up to the end of each."""
        order = self.random(0, epoch).permutation(len(self._block_tokens))
        return order, np.cumsum(self._block_tokens[order])

    def _shuffled_documents(self, epoch: int, block: int) -> np.ndarray:
        """The documents of a block in order."""
        first = block * self._per_block
        documents = np.arange(first, min(first + self._per_block, len(self.corpus)))
        if len(documents) > 1:
            documents = self.random(1, epoch, block).permutation(documents)
        return documents

    def spans(self, start: int, stop: int) -> list[Span]:
        """The pieces of documents that fill stream positions [start, stop), in order."""
        spans = []
        while start < stop:
            epoch, offset = divmod(start, self.epoch_tokens)
            size = min(stop - start, self.epoch_tokens - offset)
            spans += self._epoch_spans(epoch, offset, offset + size)
            start += size
        return spans

    def _epoch_spans(self, epoch: int, start: int, stop: int) -> list[Span]:
        """As `spans`, from the start of an epoch and within it."""
        order, block_ends = self._epoch(epoch)
        first, last = np.searchsorted(block_ends, (start, stop - 1), side="right").tolist()
        blocks = documents = order[first : last + 1]
        if self._per_block > 1:
            documents = np.concatenate([self._block(epoch, block) for block in blocks.tolist()])
        lengths = self.corpus.lengths[documents].astype(np.int64)
        ends = block_ends[first] - self._block_tokens[order[first]] + np.cumsum(lengths)
        begins = np.maximum(start - ends + lengths, 0)
        finishes = np.minimum(stop - ends + lengths, lengths)
        inside = begins < finishes
        columns = (column[inside].tolist() for column in (documents, begins, finishes))
        return list(map(Span, *columns))


class PackedRows:
    """Rows of one source for one stage: from `origin` in the stream, each `length` long.

    The stream is cut in windows of equally many rows, which are shuffled inside their window: the
    rows of a batch come from many documents even where documents are much longer than rows.

    concat: rows are cut every `length` tokens; no padding, a document is cut at each row end.
    best_fit: a window is packed whole-document-first with 1/64 of its tokens free, the longest
    document first into the fullest row that holds it (Ding et al. 2024, arXiv 2404.10830); only a
    document longer than a row, at a window's edge, or that fits nowhere whole is cut.
    """

    def __init__(self, stream: Stream, origin: int, length: int, packing: Packing):
        self.stream, self.origin, self.length, self.packing = stream, origin, length, packing
        window_tokens = min(_WINDOW_TOKENS, stream.epoch_tokens // 4)
        self.window_rows = max(_MIN_WINDOW_ROWS, window_tokens // length)
        slack = _SLACK if packing == "best_fit" else 0
        self._window_tokens = int(self.window_rows * length * (1 - slack))
        self._window = functools.lru_cache(maxsize=4)(self._pack_window)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "_window"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        self._window = functools.lru_cache(maxsize=4)(self._pack_window)

    def end(self, rows: int) -> int:
        """Stream position after the first `rows` rows; a window once begun counts as used."""
        return self.origin + -(-rows // self.window_rows) * self._window_tokens

    def tokens(self, rows: int) -> int:
        """Tokens in the first `rows` rows, on average over a window."""
        return rows * self._window_tokens // self.window_rows

    def row(self, index: int) -> list[Span]:
        """The spans of row `index`."""
        window, row = divmod(index, self.window_rows)
        return self._window(window)[row]

    def _pack_window(self, window: int) -> list[list[Span]]:
        start = self.origin + window * self._window_tokens
        stop = start + self._window_tokens
        spans = self.stream.spans(start, stop)
        if self.packing == "best_fit":
            rows = best_fit(spans, self.length, self.window_rows)
        else:
            rows = concat(spans, self.length)
        order = self.stream.random(2, start).permutation(len(rows))
        return [rows[i] for i in order]


def concat(spans: list[Span], length: int) -> list[list[Span]]:
    """Cuts spans, one after another, into rows of `length`; the last may be shorter."""
    rows: list[list[Span]] = []
    free = 0
    for document, start, stop in spans:
        while start < stop:
            if not free:
                rows.append([])
                free = length
            size = min(free, stop - start)
            rows[-1].append(Span(document, start, start + size))
            start, free = start + size, free - size
    return rows


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
    # (free space, tie-break, row), sorted: of rows with equal space the one used last comes first.
    space = [(length, row, row) for row in range(rows)]
    turn = itertools.count(-1, -1)

    def place(at: int, piece: Span) -> None:
        free, _, row = space.pop(at)
        packed[row].append(piece)
        bisect.insort(space, (free - (piece.stop - piece.start), next(turn), row))

    homeless = []
    for piece in pieces:
        at = bisect.bisect_left(space, (piece.stop - piece.start,))
        if at < rows:
            place(at, piece)
        else:
            homeless.append(piece)
    for document, start, stop in homeless:
        while start < stop:  # cut over the emptiest rows
            free = space[-1][0]
            size = min(free, stop - start)
            place(bisect.bisect_left(space, (free,)), Span(document, start, start + size))
            start += size
    return packed


def build_rows(rows: list[tuple[Corpus, list[Span]]], length: int) -> dict[str, np.ndarray]:
    """The arrays of rows, each [rows, length] except the counts.

    tokens, targets: int32. segment_ids: 1.. for each span, 0 for padding. positions: from 0 in each
    span. loss_mask: where the target is the next token of the same document (a cut document's last
    token before the cut has one too, so that every token is predicted once). cut: how many of the
    spans end before their document does.
    """
    shape = (len(rows), length)
    names = ("tokens", "targets", "segment_ids", "positions")
    arrays = {name: np.zeros(shape, np.int32) for name in names}
    arrays |= {"loss_mask": np.zeros(shape, bool), "cut": np.zeros(len(rows), np.int32)}
    counting = np.arange(length)
    for row, (corpus, spans) in enumerate(rows):
        tokens, targets, segment_ids, positions = (arrays[name][row] for name in names)
        loss_mask = arrays["loss_mask"][row]
        at = 0
        for segment, (document, start, stop) in enumerate(spans, start=1):
            text = corpus.document(document).tokens
            end = at + stop - start
            tokens[at:end] = text[start:stop]
            following = text[start + 1 : stop + 1]
            predicted = slice(at, at + len(following))
            targets[predicted] = following
            loss_mask[predicted] = True
            segment_ids[at:end] = segment
            positions[at:end] = counting[: end - at]
            arrays["cut"][row] += stop < len(text)
            at = end
    return arrays


def build_row(corpus: Corpus, spans: list[Span], length: int) -> dict[str, np.ndarray]:
    """The arrays of one row, each [length] except the counts; see `build_rows`."""
    return {name: array[0] for name, array in build_rows([(corpus, spans)], length).items()}
