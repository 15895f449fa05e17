"""How layers are assigned to the pipeline: chunks, and the stacked arrays that hold them.

Outside of the step the blocks' parameters are stacked [layers, ...] in the network's order, which
is also how checkpoints hold them. On a pipelined mesh they are stacked [ranks x virtual x most
layers of a chunk, ...], rank by rank, with zeros where a chunk has fewer layers: then each rank's
part is one slice.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from llama3_jax.errors import UserError
from llama3_jax.parallel.mesh import MeshConfig


class Stages(NamedTuple):
    """`counts[r][v]` layers are in virtual stage v of rank r; `order[i]` is the layer at place i of
    the pipelined stack, or -1."""

    counts: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]

    @property
    def most(self) -> int:
        """Layers of the largest chunk."""
        return max(map(max, self.counts))

    @property
    def even(self) -> bool:
        return len(set(sum(self.counts, ()))) == 1


@functools.cache
def make_stages(layers: int, config: MeshConfig) -> Stages:
    """Spreads `layers` over pipe x virtual chunks.

    Where they do not divide evenly, the first and the last chunk are one layer lighter before any
    other is: the first also holds the embedding, the last the head (Llama 3 paper, section 3.3.2).
    """
    P, V = config.pipe, config.virtual_stages
    chunks = P * V
    most = -(-layers // chunks)
    sizes = np.full(chunks, most)
    lighter = chunks * most - layers
    ends = [0, chunks - 1][: min(lighter, 2)] if chunks > 1 else []
    # The others that are lighter are spread evenly between the ends.
    rest = lighter - len(ends)
    between = 1 + np.floor((np.arange(rest) + 0.5) * (chunks - 2) / max(rest, 1)).astype(int)
    sizes[[*ends, *between]] -= 1
    starts = np.concatenate([[0], np.cumsum(sizes)])
    order = [
        starts[v * P + r] + place if place < sizes[v * P + r] else -1
        for r in range(P) for v in range(V) for place in range(most)
    ]  # fmt: skip
    counts = tuple(tuple(int(sizes[v * P + r]) for v in range(V)) for r in range(P))
    return Stages(counts, tuple(map(int, order)))


def check_stages(layers: int, config: MeshConfig) -> None:
    """Refuses a pipeline with more stages than the layers can be spread over.

    Raises:
      UserError: names the axes. Only the first and the last virtual stage may hold no layer.
    """
    chunks = config.pipe * config.virtual_stages
    if config.pipe > layers or chunks > layers + 2:
        virtual = f" x mesh.virtual_stages={config.virtual_stages}" * (config.virtual_stages > 1)
        raise UserError(f"mesh.pipe={config.pipe}{virtual} is too many for {layers} layers")


def to_stages(stacked: Any, stages: Stages) -> Any:
    """[layers, ...] arrays to pipelined stacks."""
    order = np.array(stages.order)

    def place(x: jax.Array) -> jax.Array:
        held = jnp.take(x, np.maximum(order, 0), axis=0)
        return jnp.where((order >= 0).reshape(-1, *[1] * (x.ndim - 1)), held, 0)

    return jax.tree.map(place, stacked)


def from_stages(stacked: Any, stages: Stages) -> Any:
    """Pipelined stacks to [layers, ...] arrays."""
    return jax.tree.map(lambda x: jnp.take(x, places_of_layers(stages), axis=0), stacked)


def places_of_layers(stages: Stages) -> Int[np.ndarray, "layers"]:
    """Each layer's place in the pipelined stack."""
    order = np.array(stages.order)
    return np.argsort(np.where(order < 0, len(order), order), kind="stable")[: (order >= 0).sum()]
