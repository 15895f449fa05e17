"""Which blocks of a page are its content: boosted trees, and the cut of the best expected F1.

The trees (experiments/extraction/train.py makes them) give each block the probability that its words
belong to the content. What to keep then follows from the measure: keep blocks above the cut at
which twice the expected kept content over kept plus content is largest.
"""

import functools
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

WEIGHTS = Path(__file__).with_name("extractor.npz")


class Forest:
    """Binary trees on features, in arrays: a leaf is a node that is its own child.

    Legend: T trees, M nodes of a tree, N blocks, F features.
    """

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.feature = arrays["feature"].astype(np.int32)  # T M
        self.threshold = arrays["threshold"]  # T M, go left at or below
        self.left = arrays["left"].astype(np.int32)
        self.right = arrays["right"].astype(np.int32)
        self.value = arrays["value"].astype(np.float64)
        self.depth = int(arrays["depth"])
        self.base = float(arrays["base"])
        trees, nodes = self.feature.shape
        offset = (np.arange(trees) * nodes)[:, None]
        # Children as indices into the flattened nodes; [left, right] interleaved.
        children = np.stack([self.left + offset, self.right + offset], axis=-1)
        self.children = children.reshape(-1).astype(np.int32)
        self.roots = offset[:, 0].astype(np.int32)
        self.flat_feature = self.feature.reshape(-1)
        self.flat_threshold = self.threshold.reshape(-1)
        self.flat_value = self.value.reshape(-1)

    def probability(self, features: Float[np.ndarray, "N F"]) -> Float[np.ndarray, " N"]:
        count, width = features.shape
        flat = np.ascontiguousarray(features, np.float32).reshape(-1)
        rows = (np.arange(count, dtype=np.int32) * width)[:, None]
        node = np.broadcast_to(self.roots, (count, len(self.roots)))
        for _ in range(self.depth):
            looked_at = flat.take(rows + self.flat_feature.take(node))
            right = looked_at > self.flat_threshold.take(node)
            node = self.children.take(2 * node + right)
        score = self.base + self.flat_value.take(node).sum(axis=1)
        return 1 / (1 + np.exp(-score))


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
