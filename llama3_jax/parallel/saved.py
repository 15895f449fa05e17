"""How the arrays of a pipelined mesh are sharded in its checkpoints.

A checkpoint holds blocks stacked in the network's order, which no mesh's stages need share. There
another dimension of each array is split over pipe, so that every pipeline rank reads and writes its
part, and none holds the whole. The way between the two is one all-to-all over pipe.
"""

import functools

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from llama3_jax.parallel.stages import Stages, from_stages, to_stages


def saved_sharding(s: NamedSharding, shape: tuple[int, ...], stacked: bool) -> NamedSharding:
    """The sharding in the network's order of an array with sharding `s` on the pipelined mesh.

    `shape` is that in the network's order; `stacked` says that its first dimension are the layers.
    """
    entries = [*s.spec, *[None] * (len(shape) - len(s.spec))]
    if stacked:
        entries[0] = None
    if (dim := _saved_dim(s, shape, stacked)) is not None:
        own = entries[dim]
        entries[dim] = (*((own,) if isinstance(own, str) else own or ()), "pipe")
    return NamedSharding(s.mesh, PartitionSpec(*entries))


def _saved_dim(s: NamedSharding, shape: tuple[int, ...], stacked: bool) -> int | None:
    """The dimension that is split over pipe, inside of the axes that split it already.

    The one whose local size is the largest of those that pipe divides; None where there is none,
    and then each pipeline rank holds all that its data and tensor ranks do.
    """
    first = 1 if stacked else 0
    inner = NamedSharding(s.mesh, PartitionSpec(*s.spec[first:]))
    local = inner.shard_shape(shape[first:])
    divided = [(n, -d) for d, n in enumerate(local, first) if n % s.mesh.shape["pipe"] == 0]
    return -max(divided)[1] if divided else None


@functools.cache
def compile_from_stages(stages: Stages, shape: tuple[int, ...], s: NamedSharding):
    """Jitted: a pipelined stack with sharding `s`, to `saved_sharding` of `shape`."""
    to, dim = saved_sharding(s, shape, stacked=True), _saved_dim(s, shape, stacked=True)
    if dim is None:
        return jax.jit(lambda x: from_stages(x, stages), out_shardings=to)

    def on_rank(x: jax.Array) -> jax.Array:
        return from_stages(lax.all_to_all(x, "pipe", dim, 0, tiled=True), stages)

    return _jitted(on_rank, s, to)


@functools.cache
def compile_to_stages(stages: Stages, shape: tuple[int, ...], to: NamedSharding):
    """Jitted: the reverse of `compile_from_stages`."""
    s, dim = saved_sharding(to, shape, stacked=True), _saved_dim(to, shape, stacked=True)
    if dim is None:
        return jax.jit(lambda x: to_stages(x, stages), out_shardings=to)

    def on_rank(x: jax.Array) -> jax.Array:
        return lax.all_to_all(to_stages(x, stages), "pipe", 0, dim, tiled=True)

    return _jitted(on_rank, s, to)


def _jitted(on_rank, before: NamedSharding, after: NamedSharding):
    return jax.jit(
        jax.shard_map(
            on_rank,
            mesh=before.mesh,
            in_specs=before.spec,
            out_specs=after.spec,
            check_vma=False,
        )
    )
