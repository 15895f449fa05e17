"""Next-token cross-entropy, in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_losses(
    logits: Float[Array, "batch length vocab"], targets: Int[Array, "batch length"]
) -> Float[Array, "batch length"]:
    """-log p(target) in nats, for every position."""
    logits = logits.astype(jnp.float32)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - target_logits
