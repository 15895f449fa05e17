"""Generation with a KV cache: ragged prompts in one batch, greedy or sampled.

A prompt is padded on the right, so a row's slot i holds its position i. What padding writes into
the cache is at positions after the prompt, each overwritten by the generated token of that
position before any query may see it.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llama3_jax.errors import UserError
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.definition import Definition, ModelLike, Params, define
from llama3_jax.model.layers import Cache

# Lengths are rounded up to a multiple of it, so that similar calls share compiled programs.
_BUCKET = 64


def generate(
    model: ModelLike,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_tokens: Sequence[int] = (),
) -> list[list[int]]:
    """Continues every prompt; returns the new tokens alone, without the stop token that ended them.

    `temperature` 0 takes the likeliest token; otherwise tokens are drawn from the `top_p` nucleus
    (Holtzman et al. 2020, arXiv 1904.09751). A draw depends on (seed, row, position) and the row's
    own text, never on the other rows.

    Raises:
      UserError: an empty prompt, a token outside the vocabulary, a temperature that is negative or
        not finite, a top_p outside (0, 1], or a negative max_new_tokens.
    """
    model = define(model)
    config = model.config
    _check(config, prompts, max_new_tokens, temperature, top_p, stop_tokens)
    if not prompts or not max_new_tokens:
        return [[] for _ in prompts]
    batch, lengths = len(prompts), np.array([len(prompt) for prompt in prompts])
    padded = _round_up(lengths.max())
    tokens = np.zeros((batch, padded), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    positions = np.broadcast_to(np.arange(padded, dtype=np.int32), tokens.shape)
    slots = max(padded, _round_up(lengths.max() + max_new_tokens))
    shape = (config.layers, batch, slots, config.kv_heads, config.head_dim)
    cache = Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))

    params = compute_params(model, params)
    key, stop = jax.random.key(seed), set(stop_tokens)
    sampling = (jnp.float32(temperature), jnp.float32(top_p))
    modes = dict(greedy=temperature == 0, nucleus=top_p < 1)
    output: list[list[int]] = [[] for _ in prompts]
    running = np.ones(batch, bool)
    last = lengths - 1
    for step in range(max_new_tokens):
        chosen, cache = _step(
            model, params, cache, tokens, positions, last, key, sampling, **modes
        )  # fmt: skip
        for row, token in enumerate(np.asarray(chosen).tolist()):
            running[row] &= token not in stop
            if running[row]:
                output[row].append(token)
        if not running.any():
            break
        # Finished rows go on unseen: their slots are their own, and there are enough.
        tokens, positions = chosen[:, None], (lengths + step).astype(np.int32)[:, None]
        last = np.zeros_like(lengths)
    return output


def compute_params(model: ModelLike, params: Params) -> Params:
    """On device and, but for the norms, in the dtype in which the forward pass uses them."""
    dtype = define(model).config.dtype

    def convert(path, leaf):
        is_norm = path[-1].key == "scale"
        return jnp.asarray(leaf, jnp.float32 if is_norm else dtype)

    return jax.tree_util.tree_map_with_path(convert, params)


@functools.partial(
    jax.jit, static_argnames=("definition", "greedy", "nucleus"), donate_argnames="cache"
)
def _step(
    definition: Definition,
    params: Params,
    cache: Cache,
    tokens: Int[Array, "batch length"],
    positions: Int[Array, "batch length"],
    last: Int[Array, " batch"],
    key: Array,
    sampling: tuple[Array, Array],
    *,
    greedy: bool,
    nucleus: bool,
) -> tuple[Int[Array, " batch"], Cache]:
    """Runs `tokens` (a prompt or one token) and chooses what follows index `last` of each row."""
    model = definition.bind(params)
    hidden, cache = model.hidden(tokens, positions, jnp.ones_like(tokens), cache)
    rows = jnp.arange(len(tokens))
    logits = model.logits(hidden[rows, last])
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache
    next_position = positions[rows, last] + 1
    keys = jax.vmap(lambda row, at: jax.random.fold_in(jax.random.fold_in(key, row), at))(
        rows, next_position
    )
    temperature, top_p = sampling
    draw = functools.partial(sample, temperature=temperature, top_p=top_p if nucleus else None)
    return jax.vmap(draw)(logits, keys), cache


def sample(
    logits: Float[Array, " vocab"],
    key: Array,
    temperature: float | Array,
    top_p: float | Array | None = None,
) -> Int[Array, ""]:
    """Draws one token from the smallest set of likeliest tokens with probability >= `top_p`."""
    logits = (logits - logits.max()) / temperature  # shifted first: a tiny temperature is greedy
    if top_p is None:
        return jax.random.categorical(key, logits).astype(jnp.int32)
    ranked, tokens = jax.lax.top_k(logits, logits.size)
    probabilities = jax.nn.softmax(ranked)
    before = jnp.cumsum(probabilities) - probabilities
    ranked = jnp.where(before < top_p, ranked, -jnp.inf)
    return tokens[jax.random.categorical(key, ranked)].astype(jnp.int32)


def _round_up(length: int) -> int:
    return -(-int(length) // _BUCKET) * _BUCKET


def _check(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    stop_tokens: Sequence[int],
) -> None:
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens={max_new_tokens}; it must be 0 or more")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise UserError(f"temperature={temperature}; it must be 0 (greedy) or a positive number")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}; it must be above 0 and at most 1")
    named = {f"prompt {number}": prompt for number, prompt in enumerate(prompts)}
    for name, tokens in (named | {"stop_tokens": stop_tokens}).items():
        if not len(tokens) and name != "stop_tokens":
            raise UserError(f"{name} is empty; begin of text alone is the shortest prompt")
        if wrong := [token for token in tokens if not 0 <= token < config.vocab_size]:
            raise UserError(f"{name}: token {wrong[0]} is outside 0 to {config.vocab_size - 1}")
