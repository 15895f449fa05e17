"""The network in float64 NumPy, one document at a time, nothing shared with the package."""

import numpy as np


def log_probabilities(config, params, tokens: np.ndarray) -> np.ndarray:
    """log p of every next token after each token of one document, [length, vocab]."""
    p = params
    x = _f64(p["embedding"])[tokens]
    blocks = p["blocks"]
    angles = np.arange(len(tokens))[:, None] * config.rope.theta ** (
        -np.arange(0, config.head_dim, 2) / config.head_dim
    )
    for layer in range(config.layers):
        w = _layer(blocks, layer)
        h = _norm(x, w["attention_norm"]["scale"], config.norm_eps)
        x = x + _attention(config, w["attention"], h, angles)
        h = _norm(x, w["ffn_norm"]["scale"], config.norm_eps)
        gate, up = h @ w["ffn"]["gate"], h @ w["ffn"]["up"]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w["ffn"]["down"]
    logits = _norm(x, _f64(p["final_norm"]["scale"]), config.norm_eps) @ _f64(p["head"])
    largest = logits.max(-1, keepdims=True)
    return logits - largest - np.log(np.exp(logits - largest).sum(-1, keepdims=True))


def _attention(config, w, h, angles):
    def heads(name):
        return np.einsum("td,dhk->thk", h, w[name])

    q, k, v = _rotate(heads("query"), angles), _rotate(heads("key"), angles), heads("value")
    group = config.heads // config.kv_heads
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    scores = np.einsum("thk,shk->hts", q, k) / np.sqrt(config.head_dim)
    scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("hts,shk->thk", weights, v)
    return np.einsum("thk,hkd->td", out, w["out"])


def _rotate(x, angles):
    a, b = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def _f64(x):
    return np.asarray(x, np.float64)


def _layer(tree, layer):
    if isinstance(tree, dict):
        return {key: _layer(value, layer) for key, value in tree.items()}
    return _f64(tree)[layer]
