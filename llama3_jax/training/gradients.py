"""Loss and gradients of a batch on any mesh: one `shard_map` over all its axes.

Inside, everything is one rank's: its shards of the weights, its rows and columns of the batch. The
collectives stand in parallel/ranks.py and parallel/fsdp.py, the pipeline in parallel/pipeline.py.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from llama3_jax.model import transformer
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.layers import Context
from llama3_jax.model.transformer import Params, logical_axes
from llama3_jax.parallel import sharding
from llama3_jax.parallel.fsdp import NOT_SHARDED, Fsdp, Weights
from llama3_jax.parallel.mesh import Layout
from llama3_jax.parallel.pipeline import Parts, run_schedule
from llama3_jax.parallel.ranks import Ranks
from llama3_jax.parallel.schedule import forward_only, make_schedule
from llama3_jax.parallel.stages import make_stages

Batch = dict[str, Array]


class LossSums(NamedTuple):
    """Sums of masked losses in nats, over the whole batch and by source, and counts by source."""

    total: Float[Array, ""]
    by_source: Float[Array, "sources"]
    tokens_by_source: Float[Array, "sources"]


class Scores(NamedTuple):
    """Of each token of the loss mask its loss in nats, and whether it is the likeliest one."""

    losses: Float[Array, "rows length"]
    likeliest: Array


class _Shared(NamedTuple):
    """What all layers need of one micro-batch."""

    batch: Batch
    context: Context


class _Model(NamedTuple):
    """The network on one rank."""

    config: ModelConfig
    layout: Layout
    ranks: Ranks
    fsdp: Fsdp
    dims: Params
    specs: Params
    sources: int

    def shared(self, batch: Batch) -> _Shared:
        context = transformer.make_context(
            self.config, batch["positions"], batch["segment_ids"], self.ranks
        )
        return _Shared(batch, context)

    def first(self, weights: Weights, shared: _Shared) -> Array:
        table = self.fsdp.open(weights, {"embedding": self.dims["embedding"]})["embedding"]
        return transformer.embed(self.config, table, shared.batch["tokens"], self.ranks)

    def open_block(self, weights: Weights) -> Params:
        # One layer's arrays have lost the leading dimension of the stack.
        dims = jax.tree.map(lambda d: d - 1 if d != NOT_SHARDED else d, self.dims["blocks"])
        return self.fsdp.open(weights, dims)

    def layer(self, constants: Any, variables: Any, x: Array, shared: _Shared) -> Array:
        params = self.open_block(Weights(constants, variables))
        x, _ = transformer.apply_block(self.config, params, x, shared.context, None, self.ranks)
        return x

    def last(self, weights: Weights, x: Array, shared: _Shared) -> tuple[Array, LossSums]:
        params = self.fsdp.open(weights, {k: self.dims[k] for k in weights.variables})
        batch = shared.batch
        mask = batch["loss_mask"]
        total, losses = transformer.head_losses(
            self.config, params, x, batch["targets"], mask, self.ranks
        )
        row_sums = jnp.sum(losses, axis=1)
        by_source = functools.partial(
            jax.ops.segment_sum, segment_ids=batch["source"], num_segments=self.sources
        )
        tokens = jnp.sum(mask, axis=1, dtype=jnp.float32)
        return total, LossSums(total, by_source(row_sums), by_source(tokens))

    def scores(self, weights: Weights, x: Array, shared: _Shared) -> tuple[Array, Scores]:
        params = self.fsdp.open(weights, {k: self.dims[k] for k in weights.variables})
        batch = shared.batch
        scores = transformer.head_scores(
            self.config, params, x, batch["targets"], batch["loss_mask"], self.ranks
        )
        return jnp.zeros(()), Scores(*scores)

    @property
    def last_keys(self) -> tuple[str, ...]:
        return ("final_norm", "embedding" if self.config.tied_head else "head")


def make_gradients(config: ModelConfig, layout: Layout, micro_batches: int, sources: int):
    """(params, batch) -> (LossSums, gradients of the summed loss), float32, on global arrays.

    A micro-batch is an equal part of each data rank's rows.
    """
    model = _model(config, layout, sources)

    def on_rank(params: Params, batch: Batch):
        split = jax.tree.map(
            lambda x: x.reshape(micro_batches, len(x) // micro_batches, *x.shape[1:]), batch
        )
        weights = model.fsdp.start(params, model.dims)
        if layout.config.pipe == 1:
            sums, gradients = _accumulated(model, weights, split)
        else:
            schedule = make_schedule(layout.config, micro_batches)
            sums, gradients = _pipelined(
                model, schedule, weights, split, model.last, _zero_sums(model)
            )
        gradients = model.fsdp.finish(gradients, model.dims, model.specs)
        return jax.tree.map(model.ranks.token_sum, sums), gradients

    return _on_mesh(on_rank, model, (PartitionSpec(), model.specs))


def make_loss(config: ModelConfig, layout: Layout, sources: int):
    """(params, batch) -> LossSums, on global arrays; each row is a micro-batch of the pipeline."""
    model = _model(config, layout, sources)

    def on_rank(params: Params, batch: Batch):
        weights = model.fsdp.start(params, model.dims)
        if layout.config.pipe == 1:
            _, sums = _loss(model, weights, batch)
        else:
            rows = len(batch["tokens"])
            split = jax.tree.map(lambda x: x[:, None], batch)
            schedule = forward_only(layout.config, rows)
            sums, _ = _pipelined(model, schedule, weights, split, model.last, _zero_sums(model))
        return jax.tree.map(model.ranks.token_sum, sums)

    return _on_mesh(on_rank, model, PartitionSpec())


def make_scores(config: ModelConfig, layout: Layout):
    """(params, batch) -> Scores, on global arrays; columns lie as the batch's do."""
    model = _model(config, layout, sources=1)

    def on_rank(params: Params, batch: Batch):
        weights = model.fsdp.start(params, model.dims)
        if layout.config.pipe == 1:
            return _forward(model, weights, batch, model.scores)[1]
        rows, length = batch["tokens"].shape
        # The pipeline adds up what its micro-batches, a row each, return: each fills its own row.
        batch = batch | {"row": jnp.arange(rows)}

        def last(weights: Weights, x: Array, shared: _Shared):
            total, scores = model.scores(weights, x, shared)
            own = (jnp.arange(rows) == shared.batch["row"][0])[:, None]
            return total, jax.tree.map(lambda s: jnp.where(own, s, 0).astype(jnp.float32), scores)

        split = jax.tree.map(lambda x: x[:, None], batch)
        zero = jnp.zeros((rows, length))
        schedule = forward_only(layout.config, rows)
        scores, _ = _pipelined(model, schedule, weights, split, last, Scores(zero, zero))
        losses, likeliest = jax.tree.map(lambda x: jax.lax.psum(x, "pipe"), scores)
        return Scores(losses, likeliest > 0)

    of_tokens = sharding.spec(("rows", "length"), layout)
    return _on_mesh(on_rank, model, Scores(of_tokens, of_tokens))


def _model(config: ModelConfig, layout: Layout, sources: int) -> _Model:
    ranks = Ranks(**layout.shape, pieces=layout.config.tensor_pieces)
    axes = logical_axes(config)
    is_axes = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    dims = jax.tree.map(
        lambda names: names.index("embed") if "embed" in names else NOT_SHARDED,
        axes, is_leaf=is_axes,
    )  # fmt: skip
    fsdp = Fsdp(ranks, layout.config.fsdp, jnp.dtype(config.dtype))
    return _Model(config, layout, ranks, fsdp, dims, sharding.specs(axes, layout), sources)


def _on_mesh(on_rank, model: _Model, out_specs):
    def call(params: Params, batch: Batch):
        batch_specs = jax.tree.map(lambda x: sharding.batch_spec(x, model.layout), batch)
        return jax.shard_map(
            on_rank, mesh=model.layout.mesh, in_specs=(model.specs, batch_specs),
            out_specs=out_specs, check_vma=False,
        )(params, batch)  # fmt: skip

    return call


def _part(weights: Weights, keys: tuple[str, ...]) -> Weights:
    return Weights(*({key: tree[key] for key in keys} for tree in weights))


def _loss(model: _Model, weights: Weights, batch: Batch) -> tuple[Array, LossSums]:
    """Loss of one micro-batch, all layers on this rank."""
    return _forward(model, weights, batch, model.last)


def _forward(model: _Model, weights: Weights, batch: Batch, last) -> tuple[Array, Any]:
    shared = model.shared(batch)
    x = model.first(_part(weights, ("embedding",)), shared)
    blocks = Weights(weights.constants["blocks"], weights.variables["blocks"])
    x, _ = transformer.run_blocks(
        model.config, blocks, x, shared.context, ranks=model.ranks,
        open_block=model.open_block, keeps_weights=not model.ranks.fsdp_axes,
    )  # fmt: skip
    return last(_part(weights, model.last_keys), x, shared)


def _accumulated(model: _Model, weights: Weights, split: Batch) -> tuple[LossSums, Params]:
    """Gradients by automatic differentiation, added up over micro-batches."""

    def loss(variables, batch):
        return _loss(model, Weights(weights.constants, variables), batch)

    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    first = jax.tree.map(lambda x: x[0], split)
    if len(split["tokens"]) == 1:
        (_, sums), gradients = value_and_grad(weights.variables, first)
        return sums, gradients

    def accumulate(carry, batch):
        (_, sums), gradients = value_and_grad(weights.variables, batch)
        return jax.tree.map(jnp.add, carry, (sums, gradients)), None

    zeros = (_zero_sums(model), jax.tree.map(jnp.zeros_like, weights.variables))
    (sums, gradients), _ = jax.lax.scan(accumulate, zeros, split)
    return sums, gradients


def _pipelined(model: _Model, schedule, weights: Weights, split: Batch, last, zero: Any):
    """Gradients by the pipeline's schedule, or the forward alone; `zero` is what `last` adds to."""
    config, ranks = model.config, model.ranks
    constants = {k: v for k, v in weights.constants.items() if k != "blocks"}
    ends = {k: v for k, v in weights.variables.items() if k != "blocks"}

    def with_constants(function):
        def call(variables, *arguments):
            own = {key: constants[key] for key in variables}
            return function(Weights(own, variables), *arguments)

        return call

    parts = Parts(
        inputs=lambda m: model.shared(
            jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, m, keepdims=False), split)
        ),
        first=with_constants(model.first),
        layer=transformer.rematerialized(config, model.layer),
        last=with_constants(last),
        first_keys=("embedding",),
        last_keys=model.last_keys,
    )
    _, rows, length = split["tokens"].shape
    activation = jax.ShapeDtypeStruct((rows, length // ranks.tensor, config.dim), config.dtype)
    result = run_schedule(
        schedule,
        make_stages(config.layers, model.layout.config),
        parts,
        (weights.constants["blocks"], weights.variables["blocks"]),
        ends,
        (jnp.zeros(()), zero),
        activation,
    )
    gradients = None
    if result.end_gradients is not None:
        gradients = {**result.end_gradients, "blocks": result.block_gradients}
    return result.sums, gradients


def _zero_sums(model: _Model) -> LossSums:
    return LossSums(jnp.zeros(()), jnp.zeros(model.sources), jnp.zeros(model.sources))
