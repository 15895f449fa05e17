"""Which source each row comes from: weights kept to within a row, by random access.

Rows are awarded as the Sainte-Lague method awards seats: row after row to the source with the
smallest (rows so far + 1/2) / weight. Unlike random draws the shares never drift, unlike a fixed
cycle the weights are not rounded, and a source of weight zero is simply never drawn.
"""

import heapq

import numpy as np

from llama3_jax.errors import UserError

_CHUNK_ROWS = 1024


class Mix:
    """The order of sources for a fixed set of weights."""

    def __init__(self, weights: dict[str, float]):
        """`weights` need not sum to 1.

        Raises:
          UserError: a negative or non-finite weight, or no positive one.
        """
        for name, weight in weights.items():
            if not (np.isfinite(weight) and weight >= 0):
                raise UserError(f"mix weight of {name!r} is {weight}: must be finite and >= 0")
        total = sum(weights.values())
        if not total > 0:
            raise UserError("mix has no source with a positive weight")
        self.sources = tuple(name for name, weight in weights.items() if weight > 0)
        self._weights = [weights[name] / total for name in self.sources]
        self._chunk: tuple[int, list[tuple[str, int]]] = (0, [])

    def counts(self, rows: int) -> dict[str, int]:
        """How many of the first `rows` rows come from each source."""
        return dict(zip(self.sources, self._counts(rows), strict=True))

    def row(self, row: int) -> tuple[str, int]:
        """`draw` for one row, cheap where the rows asked for lie near each other."""
        first, drawn = self._chunk
        if not first <= row < first + len(drawn):
            first = row - row % _CHUNK_ROWS
            drawn = self.draw(first, first + _CHUNK_ROWS)
            self._chunk = first, drawn
        return drawn[row - first]

    def draw(self, start: int, stop: int) -> list[tuple[str, int]]:
        """For rows [start, stop): the source, and the row's number within that source."""
        counts = self._counts(start)
        heap = [(self._quotient(s, counts[s]), s) for s in range(len(counts))]
        heapq.heapify(heap)
        drawn = []
        for _ in range(stop - start):
            _, s = heap[0]
            drawn.append((self.sources[s], counts[s]))
            counts[s] += 1
            heapq.heapreplace(heap, (self._quotient(s, counts[s]), s))
        return drawn

    def _quotient(self, source: int, count: int) -> float:
        return (count + 0.5) / self._weights[source]

    def _counts(self, rows: int) -> list[int]:
        """The state after `rows` awards: those with the smallest quotients, ties to the first."""
        counts = [int(weight * rows + 0.5) for weight in self._weights]
        sources = range(len(counts))
        while True:
            following = min((self._quotient(s, counts[s]), s) for s in sources)
            last = max((self._quotient(s, counts[s] - 1), s) for s in sources if counts[s])\
                if any(counts) else (-1.0, 0)  # fmt: skip
            missing = rows - sum(counts)
            if missing <= 0 and (missing < 0 or last > following):
                counts[last[1]] -= 1
            elif missing > 0:
                counts[following[1]] += 1
            else:
                return counts
