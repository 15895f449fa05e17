"""One training step and one validation step, as pure functions."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from llama3_jax.model.config import ModelConfig
from llama3_jax.model.loss import token_losses
from llama3_jax.model.transformer import Params, abstract_params, forward, init_params, logical_axes
from llama3_jax.parallel import sharding
from llama3_jax.training.optimizer import OptimizerConfig, make_optimizer

Batch = dict[str, Array]


class TrainState(NamedTuple):
    params: Params
    optimizer: Any


class StepMetrics(NamedTuple):
    """Sums and counts of one step; `loss` is the mean over the tokens of the loss mask, in nats.

    `document_pairs` counts (query, key) pairs inside documents. `applied` is False when loss or
    gradients were not finite: then the state is what it was.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    applied: Array
    source_loss_sums: Float[Array, "sources"]
    source_tokens: Float[Array, "sources"]
    real_tokens: Array
    document_pairs: Float[Array, ""]
    documents: Array
    cut_documents: Array


def loss_sums(config: ModelConfig, params: Params, batch: Batch, sources: int):
    """Sum of the masked losses; and sums and counts by source, [sources] each."""
    logits = forward(config, params, batch["tokens"], batch["positions"], batch["segment_ids"])
    mask = batch["loss_mask"].astype(jnp.float32)
    row_sums = jnp.sum(token_losses(logits, batch["targets"]) * mask, axis=1)
    by_source = functools.partial(
        jax.ops.segment_sum, segment_ids=batch["source"], num_segments=sources
    )
    return jnp.sum(row_sums), (by_source(row_sums), by_source(jnp.sum(mask, axis=1)))


def gradients(config: ModelConfig, params: Params, batch: Batch, micro_batches: int, sources: int):
    """Mean loss over the whole batch and its float32 gradients, a micro-batch at a time.

    The mean is over all loss tokens of the batch, so the split in micro-batches changes nothing but
    rounding.
    """
    value_and_grad = jax.value_and_grad(lambda p, b: loss_sums(config, p, b, sources), has_aux=True)
    if micro_batches == 1:
        (total, by_source), grads = value_and_grad(params, batch)
    else:
        # Micro-batch i takes every n-th row from i on, so that each spans all data ranks.
        split = jax.tree.map(
            lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1), batch
        )

        def accumulate(carry, micro_batch):
            (loss, aux), grads = value_and_grad(params, micro_batch)
            return jax.tree.map(jnp.add, carry, (loss, aux, grads)), None

        zeros = (jnp.zeros(()), (jnp.zeros(sources), jnp.zeros(sources)),
                 jax.tree.map(jnp.zeros_like, params))  # fmt: skip
        (total, by_source, grads), _ = jax.lax.scan(accumulate, zeros, split)
    tokens = jnp.maximum(jnp.sum(batch["loss_mask"]), 1)
    return total / tokens, by_source, jax.tree.map(lambda g: g / tokens, grads)


def train_step(
    state: TrainState,
    batch: Batch,
    learning_rate: Float[Array, ""],
    *,
    config: ModelConfig,
    optimizer: OptimizerConfig,
    micro_batches: int,
    sources: int,
) -> tuple[TrainState, StepMetrics]:
    """One AdamW update; not applied when the loss or the gradients are not finite."""
    loss, (source_sums, source_tokens), grads = gradients(
        config, state.params, batch, micro_batches, sources
    )
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, optimizer_state = make_optimizer(optimizer).update(
        grads, state.optimizer, state.params
    )
    params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
    updated = TrainState(params, optimizer_state)
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
    positions, real = batch["positions"], batch["segment_ids"] > 0
    return state, StepMetrics(
        loss=loss,
        grad_norm=grad_norm,
        applied=finite,
        source_loss_sums=source_sums,
        source_tokens=source_tokens,
        real_tokens=jnp.sum(real),
        # Token p of a document sees p + 1 keys.
        document_pairs=jnp.sum(jnp.where(real, positions + 1, 0).astype(jnp.float32)),
        documents=jnp.sum(real & (positions == 0)),
        cut_documents=jnp.sum(batch["cut"]),
    )


def state_shardings(config: ModelConfig, optimizer: OptimizerConfig, mesh: Mesh) -> TrainState:
    """Shardings of the state: the optimizer's moments lie as their parameters do."""
    axes = logical_axes(config)
    sharding.check_divisible(axes, abstract_params(config), mesh)
    params = sharding.shardings(axes, mesh)
    state = jax.eval_shape(make_optimizer(optimizer).init, abstract_params(config))
    moments = optax.tree_map_params(
        make_optimizer(optimizer),
        lambda _, s: s,
        state,
        params,
        transform_non_params=lambda _: sharding.replicated(mesh),
    )
    return TrainState(params, moments)


def init_state(
    config: ModelConfig, optimizer: OptimizerConfig, mesh: Mesh, seed: int
) -> TrainState:
    """A fresh state, created sharded."""

    def create() -> TrainState:
        params = init_params(config, seed)
        return TrainState(params, make_optimizer(optimizer).init(params))

    return jax.jit(create, out_shardings=state_shardings(config, optimizer, mesh))()


def abstract_state(config: ModelConfig, optimizer: OptimizerConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, nothing allocated."""
    params = abstract_params(config)
    shapes = TrainState(params, jax.eval_shape(make_optimizer(optimizer).init, params))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        state_shardings(config, optimizer, mesh),
    )


@functools.cache
def compile_step(
    config: ModelConfig, optimizer: OptimizerConfig, mesh: Mesh, micro_batches: int, sources: int
):
    """The jitted train step for a mesh, compiled once a shape; the state is donated."""
    state = state_shardings(config, optimizer, mesh)
    step = functools.partial(
        train_step, config=config, optimizer=optimizer, micro_batches=micro_batches, sources=sources
    )
    return jax.jit(
        step,
        in_shardings=(state, sharding.batch_sharding(mesh), None),
        out_shardings=(state, sharding.replicated(mesh)),
        donate_argnums=0,
    )


@functools.cache
def compile_validation(config: ModelConfig, mesh: Mesh):
    """Jitted (params, batch) -> (sum of losses in nats, loss tokens)."""
    params = sharding.shardings(logical_axes(config), mesh)

    def validate(params: Params, batch: Batch):
        total, _ = loss_sums(config, params, batch, sources=1)
        return total, jnp.sum(batch["loss_mask"])

    return jax.jit(
        validate,
        in_shardings=(params, sharding.batch_sharding(mesh)),
        out_shardings=sharding.replicated(mesh),
    )
