"""The pairs of neighbouring tokens that merging chooses from."""

import numpy as np


class Growing:
    """A numpy array that can be appended to."""

    def __init__(self, dtype: type):
        self._data, self.length = np.zeros(1024, dtype), 0

    @property
    def filled(self) -> np.ndarray:
        return self._data[: self.length]

    def append(self, values: np.ndarray) -> None:
        length = self.length + len(values)
        if length > len(self._data):
            grown = np.zeros(max(length, 2 * len(self._data)), self._data.dtype)
            grown[: self.length] = self.filled
            self._data = grown
        self._data[self.length : length] = values
        self.length = length

    def __getitem__(self, index):
        return self._data[index]

    def __setitem__(self, index, value):
        self._data[index] = value


class Pairs:
    """All pairs of neighbours ever seen, by number: tokens, present count, and where they begin.

    The positions of a pair stay listed when it is gone from there: compare before use.
    """

    def __init__(self):
        self.left, self.right = Growing(np.int32), Growing(np.int32)
        self.count = Growing(np.int64)
        self._begin, self._end = Growing(np.int64), Growing(np.int64)
        self._positions = Growing(np.int32)
        self._more: dict[int, list[int]] = {}  # positions gained by pairs that were there before
        self._number: dict[int, int] = {}

    def find(self, left: int, right: int) -> int | None:
        return self._number.get(left << 32 | right)

    def add(
        self, keys: np.ndarray, counts: np.ndarray, positions: np.ndarray, begin: np.ndarray
    ) -> np.ndarray:
        """New pairs; those of `keys[i]` begin at `positions[begin[i]:begin[i + 1]]`."""
        first = self.count.length
        self._number.update(zip(keys.tolist(), range(first, first + len(keys)), strict=True))
        self.left.append(keys >> 32)
        self.right.append(keys & 0xFFFFFFFF)
        self.count.append(counts)
        offset = self._positions.length
        self._begin.append(begin + offset)
        self._end.append(np.append(begin[1:], len(positions)) + offset if len(keys) else begin)
        self._positions.append(positions)
        return np.arange(first, first + len(keys), dtype=np.int64)

    def add_empty(self, left: int, right: int) -> int:
        nothing = np.zeros(0, np.int32)
        key = np.array([left << 32 | right])
        return int(self.add(key, np.zeros(1, np.int64), nothing, np.zeros(1, np.int64))[0])

    def add_position(self, pair: int, position: int) -> None:
        self._more.setdefault(pair, []).append(position)

    def positions_of(self, pair: int) -> np.ndarray:
        listed = self._positions[self._begin[pair] : self._end[pair]]
        if pair in self._more:
            return np.unique(np.append(listed, np.array(self._more[pair], np.int32)))
        return listed
