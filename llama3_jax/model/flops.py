"""Floating-point operations of training, by three accountings of attention.

A matrix product of n parameters costs 6 n a token, forward and backward. Attention adds
12 x layers x heads x head_dim for each (query, key) pair that is counted: all pairs of a row
(full), those not in the future (causal), or those inside one document (document).
"""

from llama3_jax.model.definition import ModelLike, define

ACCOUNTINGS = ("full", "causal", "document")


def training_flops(
    model: ModelLike, rows: int, length: int, document_pairs: int
) -> dict[str, float]:
    """FLOPs of one step on `rows` rows of `length`; `document_pairs` is the exact count of
    (query, key) pairs that the document mask lets through."""
    model = define(model)
    config, tokens = model.config, rows * length
    pairs = {
        "full": tokens * length,
        "causal": tokens * (length + 1) / 2,
        "document": document_pairs,
    }
    products = 6.0 * model.matmul_parameters() * tokens
    per_pair = 12 * config.layers * config.heads * config.head_dim
    return {name: products + per_pair * count for name, count in pairs.items()}
