"""Loss and gradients of a batch on any mesh: one `shard_map` over all its axes.

Inside, everything is one rank's: its shards of the weights, its rows and columns of the batch. The
collectives stand in parallel/ranks.py and parallel/fsdp.py, the pipeline in parallel/pipeline.py.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from llama3_jax.model import transformer
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.definition import BLOCKS, Definition, ModelLike, Params, define
from llama3_jax.model.layers import Context
from llama3_jax.model.sowing import AuxiliaryLoss, LayerSums, Statistic, auxiliary, layer_sums
from llama3_jax.parallel import sharding
from llama3_jax.parallel.fsdp import NOT_SHARDED, Fsdp, Weights
from llama3_jax.parallel.mesh import Layout
from llama3_jax.parallel.pipeline import Parts, run_schedule
from llama3_jax.parallel.ranks import Collectives
from llama3_jax.parallel.schedule import forward_only, make_schedule
from llama3_jax.parallel.stages import make_stages

Batch = dict[str, Array]


class LossSums(NamedTuple):
    """Sums over the whole batch, in nats: what is differentiated (losses of the loss mask and
    auxiliary ones), the masked losses alone and by source; counts by source; what layers sowed."""

    objective: Float[Array, ""]
    total: Float[Array, ""]
    by_source: Float[Array, "sources"]
    tokens_by_source: Float[Array, "sources"]
    layers: LayerSums | None = None

    def combined(self, other: "LossSums") -> "LossSums":
        """Of further micro-batches."""
        sums = jax.tree.map(jnp.add, self._replace(layers=None), other._replace(layers=None))
        return sums._replace(layers=self.layers.combined(other.layers))


class Scores(NamedTuple):
    """Of each token of the loss mask its loss in nats, and whether it is the likeliest one."""

    losses: Float[Array, "rows length"]
    is_argmax: Array


class _Shared(NamedTuple):
    """What all layers need of one micro-batch."""

    batch: Batch
    context: Context


class _Model(NamedTuple):
    """The network on one rank."""

    definition: Definition
    layout: Layout
    ranks: Collectives
    fsdp: Fsdp
    dims: Params
    specs: Params
    sources: int
    statistics: bool

    @property
    def kinds(self) -> tuple[type, ...]:
        """What is kept of what blocks sow."""
        return (AuxiliaryLoss, Statistic) if self.statistics else (AuxiliaryLoss,)

    @property
    def config(self) -> ModelConfig:
        return self.definition.config

    @property
    def first_names(self) -> tuple[str, ...]:
        return self.definition.bind({}).first_names

    @property
    def last_names(self) -> tuple[str, ...]:
        return self.definition.bind({}).last_names

    def shared(self, batch: Batch) -> _Shared:
        context = self.definition.bind({}).context(
            batch["positions"], batch["segment_ids"], self.ranks
        )
        return _Shared(batch, context)

    def opened(self, weights: Weights) -> Any:
        """The module with these weights whole, of those at the network's ends."""
        dims = {name: self.dims[name] for name in weights.variables}
        return self.definition.bind(self.fsdp.unshard(weights, dims))

    def opened_block(self, weights: Weights) -> Any:
        # One layer's arrays have lost the leading dimension of the stack.
        dims = jax.tree.map(lambda d: d - 1 if d != NOT_SHARDED else d, self.dims[BLOCKS])
        return self.definition.bind_block(self.fsdp.unshard(weights, dims))

    def first(self, weights: Weights, shared: _Shared) -> Array:
        return self.opened(weights).embed(shared.batch["tokens"], self.ranks)

    def layer(self, constants: Any, variables: Any, x: Array, shared: _Shared):
        """((the block's output, its auxiliary loss), what it sowed)."""
        constants, number = constants
        block = self.opened_block(Weights(constants, variables))
        context = dataclasses.replace(shared.context, layer=number)
        x, _, sown = transformer.call_block(block, x, context, kinds=self.kinds)
        sums = layer_sums(*sown)
        return (x, auxiliary(sums)), sums

    def last(self, weights: Weights, x: Array, shared: _Shared) -> tuple[Array, LossSums]:
        batch, mask = shared.batch, shared.batch["loss_mask"]
        total, losses = self.opened(weights).losses(x, batch["targets"], mask, self.ranks)
        row_sums = jnp.sum(losses, axis=1)
        by_source = functools.partial(
            jax.ops.segment_sum, segment_ids=batch["source"], num_segments=self.sources
        )
        tokens = jnp.sum(mask, axis=1, dtype=jnp.float32)
        sums = LossSums(
            jax.lax.stop_gradient(total), jnp.sum(row_sums), by_source(row_sums), by_source(tokens)
        )
        return total, sums

    def scores(self, weights: Weights, x: Array, shared: _Shared) -> tuple[Array, Scores]:
        batch = shared.batch
        scores = self.opened(weights).scores(x, batch["targets"], batch["loss_mask"], self.ranks)
        return jnp.zeros(()), Scores(*scores)


def make_gradients(
    model: ModelLike, layout: Layout, micro_batches: int, sources: int, statistics: bool = False
):
    """(params, batch) -> (LossSums, gradients of the summed loss), float32, on global arrays.

    A micro-batch is an equal part of each data rank's rows. With `statistics` the sums hold those
    that layers sow.
    """
    model = _model(model, layout, sources, statistics)

    def on_rank(params: Params, batch: Batch):
        split = jax.tree.map(
            lambda x: x.reshape(micro_batches, len(x) // micro_batches, *x.shape[1:]), batch
        )
        weights = model.fsdp.prefetch(params, model.dims)
        if layout.config.pipe == 1:
            sums, gradients = _accumulated(model, weights, split)
        else:
            schedule = make_schedule(layout.config, micro_batches)
            zero = _zero_sums(model)
            sums, gradients = _pipelined(model, schedule, weights, split, model.last, zero)
        gradients = model.fsdp.reduce_gradients(gradients, model.dims, model.specs)
        return _over_ranks(model, sums), gradients

    return _on_mesh(on_rank, model, (_sums_spec(layout), model.specs))


def make_loss(model: ModelLike, layout: Layout, sources: int):
    """(params, batch) -> LossSums, on global arrays; each row is a micro-batch of the pipeline."""
    model = _model(model, layout, sources)

    def on_rank(params: Params, batch: Batch):
        weights = model.fsdp.prefetch(params, model.dims)
        if layout.config.pipe == 1:
            _, sums = _loss(model, weights, batch)
        else:
            rows = len(batch["tokens"])
            split = jax.tree.map(lambda x: x[:, None], batch)
            schedule = forward_only(layout.config, rows)
            sums, _ = _pipelined(model, schedule, weights, split, model.last, _zero_sums(model))
        return _over_ranks(model, sums)

    return _on_mesh(on_rank, model, _sums_spec(layout))


def _sums_spec(layout: Layout) -> LossSums:
    """Layers are stacked as the blocks are; the rest is the same on all ranks."""
    stacked = PartitionSpec("pipe") if layout.config.pipe > 1 else PartitionSpec()
    return LossSums(*[PartitionSpec()] * 4, layers=stacked)


def _over_ranks(model: _Model, sums: LossSums) -> LossSums:
    """Sums of this rank's tokens and layers to those of the batch."""
    ranks, layers = model.ranks, sums.layers
    axes = ranks.token_axes + (("tensor",) if ranks.tensor > 1 else ())
    losses = {k: jax.lax.psum(v, axes) if axes else v for k, v in layers.losses.items()}
    statistics = {name: m.over_ranks(axes) for name, m in layers.statistics.items()}
    rest = jax.tree.map(ranks.token_sum, sums._replace(layers=None))
    sums = rest._replace(layers=LayerSums(losses, statistics))
    own = auxiliary(sums.layers)
    if ranks.pipe > 1:
        own = jax.lax.psum(own, "pipe")
    return sums._replace(objective=sums.objective + own)


def make_scores(model: ModelLike, layout: Layout):
    """(params, batch) -> Scores, on global arrays; columns are in the batch's order."""
    model = _model(model, layout, sources=1)

    def on_rank(params: Params, batch: Batch):
        weights = model.fsdp.prefetch(params, model.dims)
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
        losses, is_argmax = jax.tree.map(lambda x: jax.lax.psum(x, "pipe"), scores)
        return Scores(losses, is_argmax > 0)

    of_tokens = sharding.spec(("rows", "length"), layout)
    return _on_mesh(on_rank, model, Scores(of_tokens, of_tokens))


def _model(model: ModelLike, layout: Layout, sources: int, statistics: bool = False) -> _Model:
    definition = define(model)
    ranks = Collectives(**layout.shape, pieces=layout.config.tensor_pieces)
    axes = definition.axes()
    dims = jax.tree.map(
        lambda names: names.index("embed") if "embed" in names else NOT_SHARDED,
        axes, is_leaf=sharding.is_axes,
    )  # fmt: skip
    fsdp = Fsdp(ranks, layout.config.reshard_after_forward, jnp.dtype(definition.config.dtype))
    specs = sharding.specs(axes, layout)
    return _Model(definition, layout, ranks, fsdp, dims, specs, sources, statistics)


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
    x = model.first(_part(weights, model.first_names), shared)
    x, _, sown = transformer.scan_blocks(
        model.config, model.opened_block, Weights(weights.constants[BLOCKS],
        weights.variables[BLOCKS]), x, shared.context, kinds=model.kinds,
        keeps_weights=not model.ranks.fsdp_axes,
    )  # fmt: skip
    layers = layer_sums(*sown)
    total, sums = last(_part(weights, model.last_names), x, shared)
    if isinstance(sums, LossSums):
        sums = sums._replace(layers=layers)
    return total + auxiliary(layers), sums


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
        so_far, gradients = carry
        (_, sums), new = value_and_grad(weights.variables, batch)
        return (so_far.combined(sums), jax.tree.map(jnp.add, gradients, new)), None

    (_, sums), _ = jax.eval_shape(value_and_grad, weights.variables, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (sums, weights.variables))
    (sums, gradients), _ = jax.lax.scan(accumulate, zeros, split)
    return sums, gradients


def _pipelined(model: _Model, schedule, weights: Weights, split: Batch, last, zero: Any):
    """Gradients by the pipeline's schedule, or the forward alone; `zero` is what `last` adds to."""
    config, ranks = model.config, model.ranks
    stages = make_stages(config.layers, model.layout.config)
    constants = {k: v for k, v in weights.constants.items() if k != BLOCKS}
    ends = {k: v for k, v in weights.variables.items() if k != BLOCKS}

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
        first_keys=model.first_names,
        last_keys=model.last_names,
    )
    _, rows, length = split["tokens"].shape
    activation = jax.ShapeDtypeStruct((rows, length // ranks.tensor, config.dim), config.dtype)
    order = jnp.asarray(stages.order).reshape(ranks.pipe, -1)[jax.lax.axis_index("pipe")]
    result = run_schedule(
        schedule,
        stages,
        parts,
        ((weights.constants[BLOCKS], order), weights.variables[BLOCKS]),
        ends,
        (jnp.zeros(()), zero),
        activation,
    )
    gradients, sums = None, result.sums
    if result.end_gradients is not None:
        gradients = {**result.end_gradients, BLOCKS: result.block_gradients}
    if isinstance(sums, LossSums):
        sums = sums._replace(layers=result.layers)
    return sums, gradients


def _zero_sums(model: _Model) -> LossSums:
    by_source = jnp.zeros(model.sources)
    return LossSums(jnp.zeros(()), jnp.zeros(()), by_source, by_source)
