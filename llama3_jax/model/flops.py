"""Floating-point operations of training, by three accountings of attention.

A matrix product of n parameters costs 6 n a token, forward and backward. Attention adds
12 x layers x heads x head_dim for each (query, key) pair that is counted: all pairs of a row
(full), those not in the future (causal), or those inside one document (document).
"""

from llama3_jax.model.config import ModelConfig

ACCOUNTINGS = ("full", "causal", "document")


def matmul_parameters(config: ModelConfig) -> int:
    """Parameters that multiply: no norms, the embedding only as the head."""
    norms = (2 * config.layers + 1) * config.dim
    blocks = config.parameter_count(embeddings=False) - norms
    return blocks + config.vocab_size * config.dim


def training_flops(
    config: ModelConfig, rows: int, length: int, document_pairs: int
) -> dict[str, float]:
    """FLOPs of one step on `rows` rows of `length`; `document_pairs` is the exact count of
    (query, key) pairs that the document mask lets through."""
    tokens = rows * length
    pairs = {
        "full": tokens * length,
        "causal": tokens * (length + 1) / 2,
        "document": document_pairs,
    }
    products = 6.0 * matmul_parameters(config) * tokens
    per_pair = 12 * config.layers * config.heads * config.head_dim
    return {name: products + per_pair * count for name, count in pairs.items()}
