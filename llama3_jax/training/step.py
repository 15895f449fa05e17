"""One training step and one validation step, as pure functions."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from llama3_jax.model.definition import BLOCKS, Definition, ModelLike, Params, define
from llama3_jax.model.sowing import Moments, moments
from llama3_jax.parallel import sharding
from llama3_jax.parallel.mesh import Layout
from llama3_jax.parallel.stages import make_stages, places_of_layers
from llama3_jax.training.gradients import Batch, make_gradients, make_loss
from llama3_jax.training.optimizer import OptimizerConfig, make_optimizer
from llama3_jax.training.state import TrainState, abstract_state, param_shardings, shardings
from llama3_jax.xla import DEFAULT, XlaConfig


class Limits(NamedTuple):
    """What the loss, in nats, and the gradient norm of a step may be for it to be applied."""

    loss: float
    grad_norm: float


NO_LIMITS = Limits(math.inf, math.inf)


class StepMetrics(NamedTuple):
    """Sums and counts of one step; `loss` is the mean over the tokens of the loss mask, in nats.

    `document_pairs` counts (query, key) pairs inside documents. `applied` is False when loss or
    gradients were not finite or above their limits: then the state is what it was.
    `auxiliary_loss` is the sum of what layers added to the loss, over the same tokens. `statistics`
    are of what layers sowed, and of the gradients and updates of their parameters, [layers] each.
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
    auxiliary_loss: Float[Array, ""]
    statistics: dict[str, Moments]


def train_step(
    state: TrainState,
    batch: Batch,
    learning_rate: Float[Array, ""],
    limits: Limits = NO_LIMITS,
    *,
    model: Definition,
    optimizer: OptimizerConfig,
    layout: Layout,
    micro_batches: int,
    sources: int,
    statistics: bool = False,
) -> tuple[TrainState, StepMetrics]:
    """One update; not applied when the loss or the gradients are not finite or over `limits`.

    Old or new is chosen element by element as the update is made, over the donated state: there is
    no second copy of it. Loss and gradients are means over all loss tokens of the batch, so the
    split in micro-batches changes nothing but rounding.
    """
    rows, length = batch["tokens"].shape
    sharding.check_batch(rows, length, micro_batches, layout)
    gradients = make_gradients(model, layout, micro_batches, sources, statistics)
    sums, grads = gradients(state.params, batch)
    tokens = jnp.maximum(jnp.sum(batch["loss_mask"]), 1)
    loss, grads = sums.total / tokens, jax.tree.map(lambda g: g / tokens, grads)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(sums.objective) & jnp.isfinite(grad_norm)
    applied = finite & (loss <= limits.loss) & (grad_norm <= limits.grad_norm)
    updates, optimizer_state = make_optimizer(optimizer).update(
        grads, state.optimizer, state.params
    )
    updates = jax.tree.map(lambda u: learning_rate * u, updates)
    params = optax.apply_updates(state.params, updates)
    updated = TrainState(params, optimizer_state)
    state = jax.tree.map(lambda new, old: jnp.where(applied, new, old), updated, state)
    positions, real = batch["positions"], batch["segment_ids"] > 0
    return state, StepMetrics(
        loss=loss,
        grad_norm=grad_norm,
        applied=applied,
        source_loss_sums=sums.by_source,
        source_tokens=sums.tokens_by_source,
        real_tokens=jnp.sum(real),
        # Token p of a document sees p + 1 keys.
        document_pairs=jnp.sum(jnp.where(real, positions + 1, 0).astype(jnp.float32)),
        documents=jnp.sum(real & (positions == 0)),
        cut_documents=jnp.sum(batch["cut"]),
        auxiliary_loss=(sums.objective - sums.total) / tokens,
        statistics=_statistics(sums, grads, updates, model, layout) if statistics else {},
    )


def _statistics(sums, grads: Params, updates: Params, model: Definition, layout: Layout):
    """By name, [layers] each in the network's order."""
    found = dict(sums.layers.statistics)
    for kind, tree in (("gradient", grads), ("update", updates)):
        for path, x in jax.tree_util.tree_leaves_with_path(tree[BLOCKS]):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            found[f"{name}/{kind}"] = jax.vmap(moments)(x)
    if layout.config.pipe > 1:
        places = places_of_layers(make_stages(model.config.layers, layout.config))
        found = jax.tree.map(lambda x: x[places], found)
    return found


# ---------------------------------------------------------------------- compiled functions


def compile_step(
    model: ModelLike,
    optimizer: OptimizerConfig,
    layout: Layout,
    micro_batches: int,
    sources: int,
    xla: XlaConfig = DEFAULT,
    statistics: bool = False,
):
    """The jitted train step for a mesh, compiled once a shape; the state is donated.

    The state comes as `abstract_state` shards it and goes so.
    """
    return _compile_step(define(model), optimizer, layout, micro_batches, sources, xla, statistics)


@functools.cache
def _compile_step(model, optimizer, layout, micro_batches, sources, xla, statistics):
    step = functools.partial(
        train_step,
        model=model,
        optimizer=optimizer,
        layout=layout,
        micro_batches=micro_batches,
        sources=sources,
        statistics=statistics,
    )
    state = shardings(abstract_state(model, optimizer, layout))
    return jax.jit(
        step,
        out_shardings=(state, sharding.replicated(layout)),
        donate_argnums=0,
        compiler_options=xla.compiler_options(layout.platform, layout.config.tensor_pieces),
    )


def compile_validation(model: ModelLike, layout: Layout, xla: XlaConfig = DEFAULT):
    """Jitted (params, batch) -> (sum of losses in nats, loss tokens)."""
    return _compile_validation(define(model), layout, xla)


@functools.cache
def _compile_validation(model: Definition, layout: Layout, xla: XlaConfig):
    def validate(params: Params, batch: Batch):
        sums = make_loss(model, layout, sources=1)(params, batch)
        return sums.total, jnp.sum(batch["loss_mask"])

    return jax.jit(
        validate,
        in_shardings=(param_shardings(model, layout), None),
        out_shardings=sharding.replicated(layout),
        compiler_options=xla.compiler_options(layout.platform, layout.config.tensor_pieces),
    )
