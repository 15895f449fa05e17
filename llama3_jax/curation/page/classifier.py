"""Which blocks of a page are its content: boosted trees, and the cut of the best expected F1.

The trees (experiments/extraction/train.py makes them) give each block the probability that its words
belong to the content. What to keep then follows from the measure: keep blocks above the cut at
which twice the expected kept content over kept plus content is largest.
"""

import functools
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

_AT_ONCE = 4096  # blocks, so that a page of many takes no more memory
WEIGHTS = Path(__file__).with_name("extractor.npz")


class Forest:
    """Symmetric trees: all nodes of a level ask the same, so a leaf's number is a row of answers.

    Legend: T trees, D levels, N blocks, F features.
    """

    def __init__(self, arrays: dict[str, np.ndarray]):
        feature_TD, threshold_TD = arrays["feature"], arrays["threshold"]
        trees, self.depth = feature_TD.shape
        self.feature = np.ascontiguousarray(feature_TD.T, np.intp)
        self.threshold = np.ascontiguousarray(threshold_TD.T, np.float32)[:, :, None]
        self.leaves = arrays["value"].reshape(-1).astype(np.float32)  # T 2^D, flat
        self.first = (np.arange(trees, dtype=np.intp) << self.depth)[:, None]
        self.base = float(arrays["base"])

    def probability(self, features: Float[np.ndarray, "N F"]) -> Float[np.ndarray, " N"]:
        columns = np.ascontiguousarray(features.T)
        parts = [
            self._score(columns[:, at : at + _AT_ONCE]) for at in range(0, len(features), _AT_ONCE)
        ]
        return 1 / (1 + np.exp(-np.concatenate(parts)))

    def _score(self, columns: Float[np.ndarray, "F N"]) -> Float[np.ndarray, " N"]:
        leaf = np.zeros((len(self.first), columns.shape[1]), np.uint8)
        for level in range(self.depth):
            answers = columns[self.feature[level]] > self.threshold[level]
            leaf |= answers.view(np.uint8) << np.uint8(level)
        return self.base + self.leaves.take(leaf + self.first).sum(axis=0, dtype=np.float64)


@functools.cache
def content_forest() -> Forest:
    with np.load(WEIGHTS) as arrays:
        return Forest(dict(arrays))


def keep(
    probability: Float[np.ndarray, " N"], words: Float[np.ndarray, " N"]
) -> Bool[np.ndarray, " N"]:
    """The blocks above the cut whose expected F1 of words is largest."""
    order = np.argsort(-probability, kind="stable")
    weight = np.maximum(words[order], 1e-3)
    gain = np.cumsum(weight * probability[order])
    score = 2 * gain / (np.cumsum(weight) + gain[-1])
    kept = np.zeros(len(probability), bool)
    kept[order[: int(np.argmax(score)) + 1]] = True
    return kept
