"""Every collective of the model, written by hand, with its gradient.

The step runs as one `jax.shard_map` over all axes of the mesh, so model code sees the arrays of one
rank and says where ranks talk. On an axis of one rank every method is the identity (or a cast), so
the same model code runs on one device outside of any mesh.

The gradient of a gather is a reduce-scatter and the reverse: what each rank holds as the cotangent
of a shared value is its own part of the sum (Korthikanti et al. 2022, arXiv 2205.05198, section
4.2.2, for the tensor axis).
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from llama3_jax.parallel.context import natural_order, rank_chunks
from llama3_jax.parallel.mesh import FSDP_AXES

# Names for checkpoint policies. Weights are never saved: they are gathered, or cast, again.
GATHERED = "gathered_weights"
GATHERED_ACTIVATIONS = "gathered_activations"


class Collectives(NamedTuple):
    """How many ranks each axis has, and the collectives of the model's code.

    Sequences are split over context in chunks (parallel/context.py), and between the products of a
    block each rank's part is split once more over tensor.
    """

    data: int = 1
    pipe: int = 1
    context: int = 1
    tensor: int = 1
    pieces: int = 1

    # ------------------------------------------------------------------ tensor: activations

    def gather_sequence(self, x: Float[Array, "B s M"]) -> Float[Array, "B S M"]:
        """All of the context rank's tokens, from every tensor rank."""
        return x if self.tensor == 1 else all_gather(x, "tensor", 1)

    def scatter_sequence(self, x: Float[Array, "B S M"]) -> Float[Array, "B s M"]:
        """Sums the tensor ranks' partial results; each keeps its part of the tokens."""
        return x if self.tensor == 1 else reduce_scatter(x, "tensor", 1)

    def gather_pieces(self, x: Float[Array, "B s M"]) -> list[Float[Array, "B P M"]]:
        """As `gather_sequence`, in at most `pieces` exchanges: as many as divide the tokens.

        XLA runs the exchange of one piece under the products of the others.
        """
        return [self.gather_sequence(p) for p in jnp.split(x, self._pieces(x.shape[1]), axis=1)]

    def scatter_pieces(self, parts: Sequence[Float[Array, "B P M"]]) -> Float[Array, "B s M"]:
        """As `scatter_sequence`, of pieces in the order of `gather_pieces`."""
        return jnp.concatenate([self.scatter_sequence(part) for part in parts], axis=1)

    def join_gathered(self, parts: Sequence[Float[Array, "B P ..."]]) -> Float[Array, "B S ..."]:
        """What was computed of gathered pieces, in the order of the tokens."""
        if len(parts) == 1:
            return parts[0]
        B, P, *rest = parts[0].shape
        split = [part.reshape(B, self.tensor, P // self.tensor, *rest) for part in parts]
        return jnp.stack(split, 2).reshape(B, -1, *rest)

    def split_gathered(self, x: Float[Array, "B S ..."]) -> list[Float[Array, "B P ..."]]:
        """The reverse of `join_gathered`, for `scatter_pieces`."""
        B, S, *rest = x.shape
        pieces = self._pieces(S // self.tensor)
        if pieces == 1:
            return [x]
        split = x.reshape(B, self.tensor, pieces, -1, *rest)
        return [split[:, :, i].reshape(B, -1, *rest) for i in range(pieces)]

    def _pieces(self, tokens: int) -> int:
        return 1 if self.tensor == 1 else math.gcd(self.pieces, tokens)

    def vocabulary_offset(self, local_size: int) -> Int[Array, ""] | int:
        """The first vocabulary entry of this tensor rank's `local_size` ones."""
        return 0 if self.tensor == 1 else lax.axis_index("tensor") * local_size

    def vocabulary_sum(self, x: Array) -> Array:
        """Sum over tensor ranks, outside of differentiation."""
        return x if self.tensor == 1 else lax.psum(x, "tensor")

    def vocabulary_max(self, x: Array) -> Array:
        """Maximum over tensor ranks, outside of differentiation."""
        return x if self.tensor == 1 else lax.pmax(x, "tensor")

    def own_kv_heads(self, weight: Float[Array, "M K D"], kv_heads: int) -> Float[Array, "M k D"]:
        """This tensor rank's KV heads, from a weight that is sharded already or replicated."""
        if self.tensor == 1 or weight.shape[1] * self.tensor == kv_heads:
            return weight
        rank = lax.axis_index("tensor")
        return lax.dynamic_slice_in_dim(weight, rank * kv_heads // self.tensor, 1, axis=1)

    # ------------------------------------------------------------------ context: keys and values

    def gather_keys(self, x: Float[Array, "B S K D"]) -> Float[Array, "B T K D"]:
        """Keys or values of the whole row in natural order (Llama 3 paper, section 3.3.2)."""
        if self.context == 1:
            return x
        return natural_order(all_gather(x, "context", 1), self.context)

    def gather_places(self, x: Int[Array, "B S"]) -> Int[Array, "B T"]:
        """As `gather_keys`, for integers that go with the keys."""
        if self.context == 1:
            return x
        return natural_order(lax.all_gather(x, "context", axis=1, tiled=True), self.context)

    def row_indices(self, local_length: int) -> Int[Array, "S"] | None:
        """The indices of this rank's tokens in the whole row; None where they are the whole row."""
        if self.context == 1:
            return None
        chunks = jnp.asarray(rank_chunks(self.context))[lax.axis_index("context")]
        size = local_length // 2
        return (chunks[:, None] * size + jnp.arange(size)).reshape(-1)

    # ------------------------------------------------------------------ data: weights

    def gather_weight(self, shard: Array, dim: int, dtype: jnp.dtype) -> Array:
        """The whole weight from its FSDP shards; sent as `dtype`, gradient reduced in float32."""
        return _gather_weight(shard, self.fsdp_axes, dim, dtype)

    def scatter_gradient(self, gradient: Float[Array, "..."], dim: int) -> Float[Array, "..."]:
        """Sums a whole weight's gradient over the FSDP ranks; each keeps its shard."""
        return lax.psum_scatter(gradient, self.fsdp_axes, scatter_dimension=dim, tiled=True)

    @property
    def fsdp_axes(self) -> tuple[str, ...]:
        """The axes of more than one rank that hold shards of the same weight."""
        return tuple(axis for axis in FSDP_AXES if getattr(self, axis) > 1)

    @property
    def token_axes(self) -> tuple[str, ...]:
        """The axes of more than one rank over which ranks see other tokens."""
        return self.fsdp_axes

    def token_sum(self, x: Array) -> Array:
        """Sum over all ranks that see other tokens or hold other stages."""
        axes = self.token_axes + (("pipe",) if self.pipe > 1 else ())
        return lax.psum(x, axes) if axes else x


# ---------------------------------------------------------------------- collectives with gradients


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def all_gather(x: Array, axis: str, dim: int) -> Array:
    """The ranks' parts put together along `dim`; gradient: `reduce_scatter`."""
    gathered = lax.all_gather(x, axis, axis=dim, tiled=True)
    return checkpoint_name(gathered, GATHERED_ACTIVATIONS)


all_gather.defvjp(
    lambda x, axis, dim: (all_gather(x, axis, dim), None),
    lambda axis, dim, _, g: (lax.psum_scatter(g, axis, scatter_dimension=dim, tiled=True),),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def reduce_scatter(x: Array, axis: str, dim: int) -> Array:
    """The ranks' values added up, each rank keeping its part of `dim`; gradient: `all_gather`."""
    return lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)


reduce_scatter.defvjp(
    lambda x, axis, dim: (reduce_scatter(x, axis, dim), None),
    lambda axis, dim, _, g: (lax.all_gather(g, axis, axis=dim, tiled=True),),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather_weight(shard: Array, axes: tuple[str, ...], dim: int, dtype) -> Array:
    # Back to float32 in name only: the product that reads it casts to `dtype` again, and XLA
    # drops the pair. What it buys is a float32 cotangent.
    gathered = lax.all_gather(shard.astype(dtype), axes, axis=dim, tiled=True)
    return checkpoint_name(gathered, GATHERED).astype(shard.dtype)


_gather_weight.defvjp(
    lambda shard, axes, dim, dtype: (_gather_weight(shard, axes, dim, dtype), None),
    lambda axes, dim, dtype, _, g: (lax.psum_scatter(g, axes, scatter_dimension=dim, tiled=True),),
)


@jax.custom_vjp
def widen(kept: Array, gradient: Float[Array, "..."]) -> Float[Array, "..."]:
    """A kept weight as float32 (in name only); its gradient goes to `gradient`, never to `kept`."""
    return kept.astype(gradient.dtype)


widen.defvjp(
    lambda kept, gradient: (widen(kept, gradient), None),
    lambda _, g: (None, g),
)

SINGLE_DEVICE = Collectives()
