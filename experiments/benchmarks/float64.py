"""What the kernels compute, once more and in float64: the yardstick of checks and tests.

Written from the formulas, without a line of the implementations, whose "reference" accumulates in
float32 whatever it is given. Under `jax.enable_x64(True)`; gradients by automatic differentiation.

Shapes as in the implementations: B batch, S queries, T keys, H query heads, K KV heads, D head dim.
"""

import jax
import jax.numpy as jnp

from llama3_jax.kernels.attention import Places


def _wide(*arrays):
    if not jax.config.jax_enable_x64:
        raise TypeError("float64 is off: use this inside of jax.enable_x64(True)")
    return [jnp.asarray(x, jnp.float64) for x in arrays]


def attention_scores(q_BSHD, k_BTKD, queries: Places, keys: Places):
    """Scaled scores [B, H, S, T]; minus infinity where a query may not see a key."""
    q_BSHD, k_BTKD = _wide(q_BSHD, k_BTKD)
    H, D = q_BSHD.shape[2:]
    k_BTHD = jnp.repeat(k_BTKD, H // k_BTKD.shape[2], axis=2)
    scores = jnp.einsum("bshd,bthd->bhst", q_BSHD, k_BTHD) / jnp.sqrt(1.0 * D)
    seen = queries.segments[:, :, None] == keys.segments[:, None, :]
    seen &= queries.positions[:, :, None] >= keys.positions[:, None, :]
    seen &= queries.segments[:, :, None] > 0
    if queries.earliest is not None:
        seen &= keys.positions[:, None, :] >= queries.earliest[:, :, None]
    return jnp.where(seen[:, None], scores, -jnp.inf)


def attention(q_BSHD, k_BTKD, v_BTKD, queries: Places, keys: Places):
    """Zero for a query that sees nothing (padding)."""
    (v_BTKD,) = _wide(v_BTKD)
    scores_BHST = attention_scores(q_BSHD, k_BTKD, queries, keys)
    sees = jnp.isfinite(scores_BHST).any(-1, keepdims=True)
    # A row of nothing but minus infinities has no softmax, nor a gradient.
    scores_BHST = jnp.where(sees, scores_BHST, 0.0)
    weights_BHST = jnp.where(sees, jax.nn.softmax(scores_BHST, axis=-1), 0.0)
    v_BTHD = jnp.repeat(v_BTKD, scores_BHST.shape[1] // v_BTKD.shape[2], axis=2)
    return jnp.einsum("bhst,bthd->bshd", weights_BHST, v_BTHD)


def linear_cross_entropy(hidden, head, targets, mask):
    """The sum over the mask of -log p(target)."""
    hidden, head = _wide(hidden, head)
    log_p = jax.nn.log_softmax(hidden @ head, axis=-1)
    return -jnp.where(mask, jnp.take_along_axis(log_p, targets[:, None], axis=-1)[:, 0], 0.0).sum()


def add_norm(x, update, scale, eps: float):
    x, scale = _wide(x, scale)
    if update is not None:
        x += _wide(update)[0]
    return x, x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def rotate(q, k, tables):
    cos, sin = (table[:, :, None, :] for table in _wide(*tables))

    def turn(x):
        first, second = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    return tuple(turn(x) for x in _wide(q, k))


def swiglu(gate, up):
    gate, up = _wide(gate, up)
    return gate / (1 + jnp.exp(-gate)) * up
