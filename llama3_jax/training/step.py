"""One training step and one validation step, as pure functions."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from llama3_jax.model import transformer
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.transformer import Params, logical_axes
from llama3_jax.parallel import sharding
from llama3_jax.parallel.mesh import Layout
from llama3_jax.parallel.saved import compile_from_stages, compile_to_stages, saved_sharding
from llama3_jax.parallel.stages import make_stages, to_stages
from llama3_jax.training.gradients import Batch, make_gradients, make_loss
from llama3_jax.training.optimizer import OptimizerConfig, make_optimizer
from llama3_jax.xla import DEFAULT, XlaConfig


class TrainState(NamedTuple):
    params: Params
    optimizer: Any


class Limits(NamedTuple):
    """What the loss, in nats, and the gradient norm of a step may be for it to be applied."""

    loss: float
    grad_norm: float


NO_LIMITS = Limits(math.inf, math.inf)


class StepMetrics(NamedTuple):
    """Sums and counts of one step; `loss` is the mean over the tokens of the loss mask, in nats.

    `document_pairs` counts (query, key) pairs inside documents. `applied` is False when loss or
    gradients were not finite or above their limits: then the state is what it was.
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


def train_step(
    state: TrainState,
    batch: Batch,
    learning_rate: Float[Array, ""],
    limits: Limits = NO_LIMITS,
    *,
    config: ModelConfig,
    optimizer: OptimizerConfig,
    layout: Layout,
    micro_batches: int,
    sources: int,
) -> tuple[TrainState, StepMetrics]:
    """One AdamW update; not applied when the loss or the gradients are not finite or over `limits`.

    Old or new is chosen element by element as the update is made, over the donated state: there is
    no second copy of it. Loss and gradients are means over all loss tokens of the batch, so the
    split in micro-batches changes nothing but rounding.
    """
    rows, length = batch["tokens"].shape
    sharding.check_batch(rows, length, micro_batches, layout)
    sums, grads = make_gradients(config, layout, micro_batches, sources)(state.params, batch)
    tokens = jnp.maximum(jnp.sum(batch["loss_mask"]), 1)
    loss, grads = sums.total / tokens, jax.tree.map(lambda g: g / tokens, grads)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    applied = finite & (loss <= limits.loss) & (grad_norm <= limits.grad_norm)
    updates, optimizer_state = make_optimizer(optimizer).update(
        grads, state.optimizer, state.params
    )
    params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
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
    )


# ---------------------------------------------------------------------- the state on a mesh


def abstract_params(config: ModelConfig, layout: Layout) -> Params:
    """Shapes and dtypes of the parameters as they lie on the mesh (see parallel/stages.py)."""
    return jax.eval_shape(lambda: arrange(transformer.abstract_params(config), config, layout))


def state_shardings(config: ModelConfig, optimizer: OptimizerConfig, layout: Layout) -> TrainState:
    """Shardings of the state: the optimizer's moments lie as their parameters do.

    Raises:
      UserError: the mesh does not divide the model.
    """
    axes = logical_axes(config)
    sharding.check_divisible(axes, transformer.abstract_params(config), layout)
    params = sharding.shardings(axes, layout)
    state = jax.eval_shape(make_optimizer(optimizer).init, abstract_params(config, layout))
    moments = optax.tree_map_params(
        make_optimizer(optimizer),
        lambda _, s: s,
        state,
        params,
        transform_non_params=lambda _: sharding.replicated(layout),
    )
    return TrainState(params, moments)


def init_state(
    config: ModelConfig, optimizer: OptimizerConfig, layout: Layout, seed: int
) -> TrainState:
    """A fresh state, created sharded."""
    return _compile_init(config, optimizer, layout, seed)()


@functools.cache
def _compile_init(config: ModelConfig, optimizer: OptimizerConfig, layout: Layout, seed: int):
    def create() -> TrainState:
        params = arrange(transformer.init_params(config, seed), config, layout)
        return TrainState(params, make_optimizer(optimizer).init(params))

    return jax.jit(create, out_shardings=state_shardings(config, optimizer, layout))


def abstract_state(config: ModelConfig, optimizer: OptimizerConfig, layout: Layout) -> TrainState:
    """Shapes, dtypes and shardings of the state, nothing allocated."""
    params = abstract_params(config, layout)
    shapes = TrainState(params, jax.eval_shape(make_optimizer(optimizer).init, params))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        state_shardings(config, optimizer, layout),
    )


def _is_stacked(path) -> bool:
    return any(getattr(key, "key", None) == "blocks" for key in path)


def arrange(tree: Any, config: ModelConfig, layout: Layout) -> Any:
    """Blocks stacked in the network's order to how they are stacked on the mesh."""
    if layout.config.pipe == 1:
        return tree
    stages = make_stages(config.layers, layout.config)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: to_stages(x, stages) if _is_stacked(path) else x, tree
    )


def to_canonical(tree: Any, config: ModelConfig, layout: Layout) -> Any:
    """Parameters or a state with blocks stacked in the network's order: what checkpoints hold.

    Each pipeline rank holds its part of every array (see parallel/saved.py), and none the whole.
    """
    if layout.config.pipe == 1:
        return tree
    stages = make_stages(config.layers, layout.config)

    def convert(path, x: jax.Array) -> jax.Array:
        if _is_stacked(path):
            shape = (config.layers, *x.shape[1:])
            return compile_from_stages(stages, shape, x.sharding)(x)
        return jax.device_put(x, saved_sharding(x.sharding, x.shape, stacked=False))

    return jax.tree_util.tree_map_with_path(convert, tree)


def from_canonical(
    state: TrainState, config: ModelConfig, optimizer: OptimizerConfig, layout: Layout
) -> TrainState:
    """A state in the network's order to how it lies on the mesh; `state` may lie on any mesh."""
    return _laid_out(state, state_shardings(config, optimizer, layout), config, layout)


def params_from_canonical(params: Params, config: ModelConfig, layout: Layout) -> Params:
    """As `from_canonical`, of the parameters alone."""
    axes = logical_axes(config)
    sharding.check_divisible(axes, transformer.abstract_params(config), layout)
    return _laid_out(params, sharding.shardings(axes, layout), config, layout)


def _laid_out(tree: Any, shardings: Any, config: ModelConfig, layout: Layout) -> Any:
    if layout.config.pipe == 1:
        return jax.device_put(tree, shardings)
    stages = make_stages(config.layers, layout.config)

    def convert(path, x: jax.Array, to: NamedSharding) -> jax.Array:
        if not _is_stacked(path):
            return jax.device_put(x, to)
        x = jax.device_put(x, saved_sharding(to, x.shape, stacked=True))
        return compile_to_stages(stages, x.shape, to)(x)

    return jax.tree_util.tree_map_with_path(convert, tree, shardings)


def abstract_canonical(
    config: ModelConfig, optimizer: OptimizerConfig, layout: Layout
) -> TrainState:
    """As `abstract_state`, of the state in the network's order: what to restore."""
    params = transformer.abstract_params(config)
    shapes = TrainState(params, jax.eval_shape(make_optimizer(optimizer).init, params))

    def place(path, x, s: NamedSharding) -> jax.ShapeDtypeStruct:
        to = saved_sharding(s, x.shape, _is_stacked(path)) if layout.config.pipe > 1 else s
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to)

    return jax.tree_util.tree_map_with_path(
        place, shapes, state_shardings(config, optimizer, layout)
    )


# ---------------------------------------------------------------------- compiled functions


@functools.cache
def compile_step(
    config: ModelConfig,
    optimizer: OptimizerConfig,
    layout: Layout,
    micro_batches: int,
    sources: int,
    xla: XlaConfig = DEFAULT,
):
    """The jitted train step for a mesh, compiled once a shape; the state is donated.

    The state comes as `state_shardings` lays it and goes so.
    """
    state = state_shardings(config, optimizer, layout)
    step = functools.partial(
        train_step,
        config=config,
        optimizer=optimizer,
        layout=layout,
        micro_batches=micro_batches,
        sources=sources,
    )
    return jax.jit(
        step,
        out_shardings=(state, sharding.replicated(layout)),
        donate_argnums=0,
        compiler_options=xla.compiler_options(layout.platform, layout.config.tensor_pieces),
    )


@functools.cache
def compile_validation(config: ModelConfig, layout: Layout, xla: XlaConfig = DEFAULT):
    """Jitted (params, batch) -> (sum of losses in nats, loss tokens)."""

    def validate(params: Params, batch: Batch):
        sums = make_loss(config, layout, sources=1)(params, batch)
        return sums.total, jnp.sum(batch["loss_mask"])

    params = sharding.shardings(logical_axes(config), layout)
    return jax.jit(
        validate,
        in_shardings=(params, None),
        out_shardings=sharding.replicated(layout),
        compiler_options=xla.compiler_options(layout.platform, layout.config.tensor_pieces),
    )
