"""N-gram language models as baselines: what counting alone predicts of the same held-out tokens.

Interpolated Kneser-Ney smoothing with one discount an order (Chen & Goodman 1999, section 2.7).
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Int


class NgramModel:
    """p(token | the `order` - 1 tokens before it in the same document).

    Grams are numbered: a k-gram's key is (number of its first k-1 tokens' gram) * radix + token.
    """

    def __init__(self, documents: Iterable[Int[np.ndarray, "length"]], vocab_size: int, order: int):
        """Counts the grams of `documents`; memory is about 100 bytes a token and order."""
        self._order, self._vocab_size = order, vocab_size
        self._radix = vocab_size + 1  # one more for the padding before a document's first token
        tokens, _ = self._pad(documents)
        self._keys: list[np.ndarray] = []
        first_seen, ids = [], [np.zeros(len(tokens), np.int64)]
        for _ in range(order):
            key = _shift(ids[-1]) * self._radix + tokens
            unique, first, inverse = np.unique(key, return_index=True, return_inverse=True)
            self._keys.append(unique)
            first_seen.append(first)
            ids.append(inverse)
        counts = [np.bincount(ids[order])]
        for k in range(order - 1, 0, -1):
            # Lower orders count how many different tokens a gram was seen after.
            counts.insert(0, np.bincount(ids[k][first_seen[k]], minlength=len(self._keys[k - 1])))
        self._levels = [self._level(k, counts[k]) for k in range(order)]

    def _level(self, k: int, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Discounted counts of the grams; of each context the total and the share to back off."""
        scored = self._keys[k] % self._radix != self._vocab_size  # padding is never predicted
        counts = np.where(scored, counts, 0)
        contexts = self._keys[k] // self._radix
        size = len(self._keys[k - 1]) if k else 1
        once, twice = np.sum(counts == 1), np.sum(counts == 2)
        discount = once / (once + 2 * twice) if once and twice else 0.5
        total = np.bincount(contexts, counts, minlength=size)
        types = np.bincount(contexts, counts > 0, minlength=size)
        backoff = np.divide(discount * types, total, out=np.ones(size), where=total > 0)
        return np.maximum(counts - discount, 0), total, backoff

    def losses(self, documents: Iterable[Int[np.ndarray, "length"]]) -> Float[np.ndarray, "tokens"]:
        """-log p in nats of every token but each document's first, in order."""
        tokens, scored = self._pad(documents)
        ids = np.zeros(len(tokens), np.int64)
        probability = np.full(len(tokens), 1 / self._vocab_size)
        for keys, (discounted, total, backoff) in zip(self._keys, self._levels, strict=True):
            context = _shift(ids)
            key = np.where(context >= 0, context * self._radix + tokens, -1)
            place = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
            ids = np.where(keys[place] == key, place, -1)
            known = (context >= 0) & (total[context] > 0)
            direct = np.where(ids >= 0, discounted[ids], 0) / np.where(known, total[context], 1)
            probability = np.where(known, direct + backoff[context] * probability, probability)
        return -np.log(probability[scored])

    def _pad(self, documents: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """All documents in one array, each after order - 1 paddings; and which tokens are scored."""
        padding = np.full(max(self._order - 1, 1), self._vocab_size, np.int64)
        parts, scored = [], []
        for document in documents:
            parts += [padding, np.asarray(document, np.int64)]
            scored += [np.zeros(len(padding) + 1, bool), np.ones(len(document) - 1, bool)]
        return np.concatenate(parts), np.concatenate(scored)


def _shift(ids: np.ndarray) -> np.ndarray:
    """The value at the position before; 0 at the first."""
    return np.concatenate([ids[:1] * 0, ids[:-1]])
