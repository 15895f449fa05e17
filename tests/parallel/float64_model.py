"""The network's loss in float64, written anew from the paper: gradients by automatic differentiation.

Under `jax.enable_x64(True)`; nothing is shared with the package but the config's numbers.
"""

import jax
import jax.numpy as jnp


def summed_loss(config, params, batch):
    """-log p of the targets, summed over the loss mask, in nats."""
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
    segments, positions = batch["segment_ids"], batch["positions"]
    seen = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, :, None]
    seen &= jnp.tril(jnp.ones(seen.shape[-2:], bool))
    power = -jnp.arange(0, config.head_dim, 2) / config.head_dim
    angles = positions[..., None] * jnp.float64(config.rope.theta) ** power
    x = params["embedding"][batch["tokens"]]
    for number in range(config.layers):
        w = jax.tree.map(lambda p, number=number: p[number], params["blocks"])
        h = _norm(x, w["attention_norm"]["scale"], config.norm_eps)
        x = x + _attention(config, w["attention"], h, angles, seen)
        h = _norm(x, w["ffn_norm"]["scale"], config.norm_eps)
        gate, up = h @ w["ffn"]["gate"], h @ w["ffn"]["up"]
        x = x + (gate / (1 + jnp.exp(-gate)) * up) @ w["ffn"]["down"]
    head = params["embedding"].T if config.tied_head else params["head"]
    logits = _norm(x, params["final_norm"]["scale"], config.norm_eps) @ head
    log_p = logits - jax.scipy.special.logsumexp(logits, axis=-1, keepdims=True)
    of_targets = jnp.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
    return -jnp.sum(jnp.where(batch["loss_mask"], of_targets, 0.0))


def _attention(config, w, h, angles, seen):
    q, k, v = (jnp.einsum("btd,dhk->bthk", h, w[name]) for name in ("query", "key", "value"))
    group = config.heads // config.kv_heads
    q, k = _rotate(q, angles), _rotate(k, angles)
    k, v = (jnp.repeat(y, group, axis=2) for y in (k, v))
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / jnp.sqrt(1.0 * config.head_dim)
    sees = seen.any(-1)[:, None, :, None]
    scores = jnp.where(seen[:, None], scores, jnp.where(sees, -jnp.inf, 0.0))
    weights = jnp.where(sees, jax.nn.softmax(scores, axis=-1), 0.0)
    return jnp.einsum("bthk,hkd->btd", jnp.einsum("bhts,bshk->bthk", weights, v), w["out"])


def _rotate(x, angles):
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _norm(x, scale, eps):
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale
