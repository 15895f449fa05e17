"""Fully sharded data parallelism: where whole weights come from, and where gradients go.

Each rank stores one shard of a weight along its `embed` dimension (dims trees below hold that
dimension's index, or -1 for what is not sharded). Two ways to compute with it:

- reshard_after_forward (ZeRO-3): what is differentiated are the shards; a weight is gathered where it is used, and the
  gradient of the gather is a float32 reduce-scatter (Rajbhandari et al. 2020, arXiv 1910.02054).
- without it: all weights are gathered once a step, in the dtype of the products; what is differentiated
  is a float32 zero of each weight's whole shape, so that gradients add up in float32 over
  micro-batches and are reduce-scattered once (the Llama 3 paper's choice, section 3.3.2).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from llama3_jax.parallel.mesh import AXES
from llama3_jax.parallel.ranks import GATHERED, Collectives, widen

NOT_SHARDED = -1


class Weights(NamedTuple):
    """What a function of the weights closes over, and what it is differentiated in."""

    constants: Any
    variables: Any


class Fsdp(NamedTuple):
    """How weights are stored and opened; `dtype` is that of the products."""

    ranks: Collectives
    reshard_after_forward: bool
    dtype: Any

    def prefetch(self, shards: Any, dims: Any) -> Weights:
        """Before the first micro-batch: the stored shards as weights."""
        if not self.ranks.fsdp_axes or self.reshard_after_forward:
            return Weights(jax.tree.map(lambda _: (), shards), shards)

        def gather(shard, dim):
            if dim == NOT_SHARDED:
                return shard
            return lax.all_gather(
                shard.astype(self.dtype), self.ranks.fsdp_axes, axis=dim, tiled=True
            )

        kept = jax.tree.map(gather, shards, dims)
        return Weights(kept, jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), kept))

    def unshard(self, weights: Weights, dims: Any) -> Any:
        """Where they are used: whole float32 weights (in name; see ranks.py)."""
        constants, variables = weights
        if not self.ranks.fsdp_axes:
            return variables
        if not self.reshard_after_forward:
            return jax.tree.map(
                lambda kept, zero: checkpoint_name(widen(kept, zero), GATHERED),
                constants, variables,
            )  # fmt: skip

        def gather(shard, dim):
            if dim == NOT_SHARDED:
                return shard
            return self.ranks.gather_weight(shard, dim, self.dtype)

        return jax.tree.map(gather, variables, dims)

    def reduce_gradients(self, gradients: Any, dims: Any, specs: Any) -> Any:
        """After the last micro-batch: gradients of the variables to gradients of the shards.

        A weight that several ranks hold whole gets the sum of their gradients.
        """

        def reduce(gradient, dim, spec: PartitionSpec):
            held = {
                a for entry in spec for a in ((entry,) if isinstance(entry, str) else entry or ())
            }
            if not self.reshard_after_forward and dim != NOT_SHARDED and self.ranks.fsdp_axes:
                gradient = self.ranks.scatter_gradient(gradient, dim)
            missing = tuple(a for a in AXES if getattr(self.ranks, a) > 1 and a not in held)
            return lax.psum(gradient, missing) if missing else gradient

        return jax.tree.map(reduce, gradients, dims, specs)
