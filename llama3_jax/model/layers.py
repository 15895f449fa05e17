"""One transformer block in Flax NNX: RMSNorm, grouped-query attention, SwiGLU.

Every parameter is float32 and carries its logical axes; `parallel/sharding.py` maps those to mesh
axes. On a mesh a block computes one rank's part: its tensor rank's heads and FFN columns, for its
context rank's tokens, which between the products are split over the tensor ranks too.

Shapes: B batch, S length, s = S / tensor ranks, T length of a whole row, M model dim, H query
heads, K KV heads, D head dim, F FFN dim; H, K and F are one rank's.
"""

import dataclasses
import importlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from llama3_jax.errors import UserError
from llama3_jax.kernels.attention import (
    Places,
    Spans,
    attention,
    attention_logits,
    attention_weights,
    make_spans,
)
from llama3_jax.kernels.linear import linear_pieces
from llama3_jax.kernels.pointwise import add_norm, rotate, swiglu
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.products import gathered_products
from llama3_jax.model.sowing import Statistic, is_captured, moments, sow_statistic
from llama3_jax.parallel.ranks import SINGLE_DEVICE, Collectives

_SAMPLED = 64  # one query of so many gives statistics of the attention's logits


def parameter(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    std: float,
    mean: float = 0.0,
) -> nnx.Param:
    """A float32 parameter drawn from a normal distribution; `axes` are its dimensions' logical names
    (parallel/sharding.py), None for one that is never split."""
    value = jnp.full(shape, mean, jnp.float32)
    if std:
        value += std * jax.random.normal(rngs.params(), shape, jnp.float32)
    # Logical names, not those of a mesh in context: nothing is to be sharded here.
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


class Cache(NamedTuple):
    """Keys and values of one layer, [B, slots, K, D]; slot i holds position i of its row."""

    keys: Float[Array, "B T K D"]
    values: Float[Array, "B T K D"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer gets beside its input: RoPE tables, positions and documents, the ranks.

    `rows` are the queries' indices among the keys where they are not simply all of them, `spans`
    the mask as attention="triton" takes it. With a cache, a new key goes to the slot of its
    position. `layer` is the layer's number, from 0.
    """

    rope: tuple[Array, Array]
    queries: Places
    keys: Places
    rows: Int[Array, "S"] | None = None
    spans: Spans | None = None
    layer: Int[Array, ""] | None = None
    ranks: Collectives = dataclasses.field(default=SINGLE_DEVICE, metadata={"static": True})


class RMSNorm(nnx.Module):
    """Root mean square norm (Zhang & Sennrich 2019), in float32, returned in the input's dtype."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dim: int | None = None):
        self.eps, self.implementation = config.norm_eps, config.norm
        self.scale = parameter(rngs, (dim or config.dim,), ("norm",), std=0.0, mean=1.0)

    def __call__(self, x: Float[Array, "B s M"]) -> Float[Array, "B s M"]:
        return add_norm(x, None, self.scale[...], self.eps, self.implementation)[1]

    def after_adding(
        self, x: Float[Array, "B s M"], update: Float[Array, "B s M"]
    ) -> tuple[Float[Array, "B s M"], Float[Array, "B s M"]]:
        """x + update, and its norm."""
        return add_norm(x, update, self.scale[...], self.eps, self.implementation)


class Attention(nnx.Module):
    """Grouped-query self-attention (Ainslie et al. 2023, arXiv 2305.13245) with RoPE."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        M, H, K, D = config.dim, config.heads, config.kv_heads, config.head_dim
        std = config.init_std
        # Residual outputs start smaller by sqrt(2 * layers), so that depth does not add variance.
        out_std = std / (2 * config.layers) ** 0.5
        self.query = parameter(rngs, (M, H, D), ("embed", "heads", "head_dim"), std)
        self.key = parameter(rngs, (M, K, D), ("embed", "kv_heads", "head_dim"), std)
        self.value = parameter(rngs, (M, K, D), ("embed", "kv_heads", "head_dim"), std)
        self.out = parameter(rngs, (H, D, M), ("heads", "head_dim", "embed"), out_std)
        self.implementation, self.rotary, self.kv_heads = config.attention, config.rotary, K

    def __call__(
        self, x_BsM: Float[Array, "B s M"], context: Context, cache: Cache | None = None
    ) -> tuple[Float[Array, "B s M"], Cache | None]:
        ranks = context.ranks
        query, *keys_values = self.weights()
        weights = query, *(ranks.own_kv_heads(w, self.kv_heads) for w in keys_values)
        flat = tuple(w.reshape(w.shape[0], -1) for w in weights)
        q_BSHD, k_BSKD, v_BSKD = (
            ranks.join_gathered([_kept(p).reshape(*p.shape[:2], *w.shape[1:]) for p in pieces])
            for pieces, w in zip(gathered_products(x_BsM, flat, ranks), weights, strict=True)
        )
        q_BSHD, k_BSKD = self.before_rope(q_BSHD, k_BSKD, context)
        q_BSHD, k_BSKD = rotate(q_BSHD, k_BSKD, context.rope, self.rotary)
        k_BTKD, v_BTKD = ranks.gather_keys(k_BSKD), ranks.gather_keys(v_BSKD)
        implementation = self.implementation
        if cache is not None:
            rows, slots = jnp.arange(q_BSHD.shape[0])[:, None], context.queries.positions
            cache = Cache(
                cache.keys.at[rows, slots].set(k_BTKD), cache.values.at[rows, slots].set(v_BTKD)
            )
            k_BTKD, v_BTKD = cache
            implementation = "reference"  # the others are made for whole rows
        context = self.visible(context)
        if is_captured(self, Statistic):
            # Of every 64th query: all of them would cost as much as a part of the attention.
            some = jax.tree.map(lambda x: x[:, ::_SAMPLED], (q_BSHD, context.queries))
            logits, mask = attention_logits(some[0], k_BTKD, some[1], context.keys)
            self.sow(Statistic, "logits", moments(logits, mask))
        if is_captured(self, nnx.Intermediate):
            weights_BHST = attention_weights(q_BSHD, k_BTKD, context.queries, context.keys)
            self.sow(nnx.Intermediate, "weights", weights_BHST)
        out_BSHD = attention(
            q_BSHD, k_BTKD, v_BTKD, context.queries, context.keys, implementation, context.rows,
            context.spans,
        )  # fmt: skip
        H, D, M = self.out.shape
        out_BSN = out_BSHD.reshape(*out_BSHD.shape[:2], H * D)
        parts = linear_pieces(ranks.split_gathered(out_BSN), self.out[...].reshape(H * D, M))
        return ranks.scatter_pieces(parts), cache

    def weights(self) -> tuple[Float[Array, "M H D"], Float[Array, "M K D"], Float[Array, "M K D"]]:
        """For subclasses: the projections to queries, keys and values."""
        return self.query[...], self.key[...], self.value[...]

    def before_rope(
        self, q: Float[Array, "B S H D"], k: Float[Array, "B S K D"], context: Context
    ) -> tuple[Float[Array, "B S H D"], Float[Array, "B S K D"]]:
        """For subclasses: what is done to queries and keys before they are rotated."""
        return q, k

    def visible(self, context: Context) -> Context:
        """For subclasses: the context with a restriction of what queries see (`see_from`)."""
        return context


def _kept(x: Array) -> Array:
    """The result of a product, which remat="save_dots" does not compute again."""
    return checkpoint_name(x, "product")


class FeedForward(nnx.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        M, F, std = config.dim, config.ffn_dim, config.init_std
        out_std = std / (2 * config.layers) ** 0.5
        self.gate = parameter(rngs, (M, F), ("embed", "mlp"), std)
        self.up = parameter(rngs, (M, F), ("embed", "mlp"), std)
        self.down = parameter(rngs, (F, M), ("mlp", "embed"), out_std)
        self.swiglu = config.swiglu

    def __call__(self, x_BsM: Float[Array, "B s M"], context: Context) -> Float[Array, "B s M"]:
        weights = self.gate[...], self.up[...]
        gates, ups = gathered_products(x_BsM, weights, context.ranks)
        inner_BPF = [
            swiglu(_kept(gate), _kept(up), self.swiglu) for gate, up in zip(gates, ups, strict=True)
        ]
        return context.ranks.scatter_pieces(linear_pieces(inner_BPF, self.down[...]))


class Block(nnx.Module):
    """Pre-norm residual block; its submodules are of the classes that the config names.

    They are made as `Class(config, rngs=rngs)` and called as `norm(x)`, `attention(x, context,
    cache) -> (y, cache)` and `ffn(x, context) -> y`.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        norm, attention, ffn = map(
            load_class, (config.norm_module, config.attention_module, config.ffn_module)
        )
        self.attention_norm = norm(config, rngs=rngs)
        self.attention = attention(config, rngs=rngs)
        self.ffn_norm = norm(config, rngs=rngs)
        self.ffn = ffn(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B s M"], context: Context, cache: Cache | None = None
    ) -> tuple[Float[Array, "B s M"], Cache | None]:
        x = checkpoint_name(x, "block_input")
        self.sow(nnx.Intermediate, "input", x)
        attended, cache = self.attention(self.attention_norm(x), context, cache)
        attended = checkpoint_name(attended, "product")
        if isinstance(self.ffn_norm, RMSNorm):
            x, normed = self.ffn_norm.after_adding(x, attended)
        else:
            x = x + attended
            normed = self.ffn_norm(x)
        output = x + self.ffn(normed, context)
        sow_statistic(self, "output", output)
        return output, cache


def see_from(context: Context, earliest: Int[Array, "B S"]) -> Context:
    """The context in which a query sees nothing before position `earliest` of its document."""
    queries = context.queries._replace(earliest=earliest)
    spans = context.spans and make_spans(queries, context.keys, context.rows)
    return dataclasses.replace(context, queries=queries, spans=spans)


def load_class(name: str) -> type[nnx.Module]:
    """The class `package.module:Class`.

    Raises:
      UserError: there is none of that name.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{name} cannot be loaded: {error}") from None
