"""Held-out documents as batches: each token once, in the corpus's order, padded at the end."""

from collections.abc import Iterator

import numpy as np

from llama3_jax.data.corpus import Corpus
from llama3_jax.data.packing import Span, build_row


def validation_batches(
    corpus: Corpus, length: int, rows: int, tokens: int, *, host: int = 0, hosts: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of [rows, length] over the first `tokens` tokens of the corpus, or all of it.

    With several hosts, `rows` is a multiple of their number, and host h gets its h-th contiguous
    part of each batch.
    """
    tokens = min(tokens, corpus.info.tokens)
    rows //= hosts
    ends = np.cumsum(corpus.lengths, dtype=np.int64)
    for batch_start in range(0, tokens, hosts * rows * length):
        first = batch_start + host * rows * length
        batch = [
            build_row(corpus, _spans(ends, start, min(start + length, tokens)), length)
            for start in range(first, first + rows * length, length)
        ]
        arrays = {key: np.stack([row[key] for row in batch]) for key in batch[0]}
        yield arrays | {"source": np.zeros(rows, np.int32)}


def _spans(ends: np.ndarray, start: int, stop: int) -> list[Span]:
    spans = []
    document = int(np.searchsorted(ends, start, side="right"))
    while start < stop:
        begin = int(ends[document - 1]) if document else 0
        end = min(int(ends[document]), stop)
        spans.append(Span(document, start - begin, end - begin))
        start, document = end, document + 1
    return spans
