"""Context parallelism: how a row's tokens are split over the ranks, and how even that is.

A row is cut in 2·CP chunks and rank i takes chunks i and 2·CP-1-i, so that under a causal mask
every rank sees as many (query, key) pairs (Llama 3 paper, section 3.3.2).
"""

import numpy as np
from jaxtyping import Array, Int, Shaped


def rank_chunks(context: int) -> Int[np.ndarray, "context 2"]:
    """The two chunks of each rank."""
    ranks = np.arange(context)
    return np.stack([ranks, 2 * context - 1 - ranks], axis=1)


def balanced_columns(length: int, context: int) -> Int[np.ndarray, "length"]:
    """Columns of a row in the order in which the ranks hold them."""
    if context == 1:
        return np.arange(length)
    return np.arange(length).reshape(2 * context, -1)[rank_chunks(context).reshape(-1)].reshape(-1)


def natural_order(x: Shaped[Array, "B T ..."], context: int) -> Shaped[Array, "B T ..."]:
    """Undoes `balanced_columns` along axis 1."""
    chunks = x.reshape(x.shape[0], 2 * context, -1, *x.shape[2:])
    inverse = np.argsort(rank_chunks(context).reshape(-1))
    return chunks[:, inverse].reshape(x.shape)


def imbalance(positions: Int[np.ndarray, "rows length"], context: int) -> float:
    """Attention FLOPs of the busiest rank over the mean: 1 is even.

    `positions` are those of tokens in their documents, -1 for padding. FLOPs go with the (query,
    key) pairs inside documents: token p of a document sees p + 1 keys, padding none. Rows are
    computed one after the other, so the busiest rank of each row is what counts.
    """
    pairs = positions.astype(np.float64) + 1
    columns = balanced_columns(pairs.shape[1], context)
    by_rank = pairs[:, columns].reshape(len(pairs), context, -1).sum(-1)
    return float(by_rank.max(1).sum() / by_rank.mean(1).sum())
