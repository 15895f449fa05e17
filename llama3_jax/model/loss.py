"""Next-token cross-entropy, in float32, over a vocabulary that may be split over tensor ranks."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama3_jax.parallel.ranks import ALONE, Ranks


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def token_losses(
    logits: Float[Array, "batch length vocab"],
    targets: Int[Array, "batch length"],
    ranks: Ranks = ALONE,
) -> Float[Array, "batch length"]:
    """-log p(target) in nats, for every position.

    `logits` are this tensor rank's part of the vocabulary; the ranks exchange one maximum, one sum
    and one target logit a token, never logits (Shoeybi et al. 2019, arXiv 1909.08053, section 3).
    """
    return _forward(logits, targets, ranks)[0]


def _forward(logits, targets, ranks):
    dtype, logits = logits.dtype, logits.astype(jnp.float32)
    largest = ranks.vocabulary_max(jnp.max(logits, axis=-1))
    total = ranks.vocabulary_sum(jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1))
    logsumexp = largest + jnp.log(total)
    own = targets - ranks.vocabulary_offset(logits.shape[-1])
    inside = (own >= 0) & (own < logits.shape[-1])
    at = jnp.clip(own, 0, logits.shape[-1] - 1)
    target_logits = jnp.take_along_axis(logits, at[..., None], axis=-1)[..., 0]
    target_logits = ranks.vocabulary_sum(jnp.where(inside, target_logits, 0.0))
    return logsumexp - target_logits, (logits.astype(dtype), logsumexp, own)


def _backward(ranks, saved, g):
    logits, logsumexp, own = saved
    probabilities = jnp.exp(logits.astype(jnp.float32) - logsumexp[..., None])
    columns = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    gradient = (probabilities - (columns == own[..., None])) * g[..., None]
    return gradient.astype(logits.dtype), None


token_losses.defvjp(_forward, _backward)
