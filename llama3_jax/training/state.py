"""The training state on a mesh: how it is sharded, made, and moved between meshes and checkpoints.

On a pipelined mesh the blocks are stacked by stage (parallel/stages.py); checkpoints hold them in the
network's order, each pipeline rank its part of every array (parallel/saved.py).
"""

import functools
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding

from llama3_jax.model import definition
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.definition import BLOCKS, Definition, ModelLike, Params, define
from llama3_jax.parallel import sharding
from llama3_jax.parallel.mesh import Layout
from llama3_jax.parallel.saved import compile_from_stages, compile_to_stages, saved_sharding
from llama3_jax.parallel.stages import make_stages, to_stages
from llama3_jax.training.optimizer import OptimizerConfig, make_optimizer


class TrainState(NamedTuple):
    params: Params
    optimizer: Any


def abstract_state(
    model: ModelLike, optimizer: OptimizerConfig, layout: Layout, saved: bool = False
) -> TrainState:
    """Shapes, dtypes and shardings of the state, nothing allocated; `saved`: as checkpoints hold it.

    Raises:
      UserError: the mesh does not divide the model.
    """
    return _abstract_state(define(model), optimizer, layout, saved)


@functools.cache
def _abstract_state(
    model: Definition, optimizer: OptimizerConfig, layout: Layout, saved: bool
) -> TrainState:
    params, to = model.abstract_params(), param_shardings(model, layout)
    pipelined = layout.config.pipe > 1
    if not saved:
        params = jax.eval_shape(lambda p: stack_stages(p, model, layout), params)
    state = jax.eval_shape(make_optimizer(optimizer).init, params)
    own = dict(jax.tree_util.tree_leaves_with_path(params))
    shardings_of = dict(jax.tree_util.tree_leaves_with_path(to))

    def as_parameter(path, x) -> NamedSharding:
        """A moment is sharded as the parameter whose path ends its own and whose shape it has."""
        for start in range(len(path)):
            if (name := path[start:]) in own and own[name].shape == x.shape:
                return shardings_of[name]
        return sharding.replicated(layout)

    moments = jax.tree_util.tree_map_with_path(as_parameter, state)

    def place(path, x, s: NamedSharding) -> jax.ShapeDtypeStruct:
        s = saved_sharding(s, x.shape, _is_stacked(path)) if saved and pipelined else s
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)

    return jax.tree_util.tree_map_with_path(
        place, TrainState(params, state), TrainState(to, moments)
    )


def shardings(tree: Any) -> Any:
    """Of a tree of abstract or real arrays."""
    return jax.tree.map(lambda x: x.sharding, tree)


def param_shardings(model: ModelLike, layout: Layout) -> Params:
    """
    Raises:
      UserError: the mesh does not divide the model.
    """
    model = define(model)
    sharding.check_divisible(model.axes(), model.abstract_params(), layout)
    return sharding.shardings(model.axes(), layout)


def init_state(
    config: ModelConfig, optimizer: OptimizerConfig, layout: Layout, seed: int
) -> TrainState:
    """A fresh state, created sharded."""
    return _compile_init(config, optimizer, layout, seed)()


@functools.cache
def _compile_init(config: ModelConfig, optimizer: OptimizerConfig, layout: Layout, seed: int):
    def create() -> TrainState:
        params = definition.init_params(config, seed)
        params = stack_stages(params, config, layout)
        return TrainState(params, make_optimizer(optimizer).init(params))

    return jax.jit(create, out_shardings=shardings(abstract_state(config, optimizer, layout)))


def relayout(
    tree: Any,
    model: ModelLike,
    before: Layout | None,
    after: Layout | None,
    optimizer: OptimizerConfig | None = None,
) -> Any:
    """Parameters, or with `optimizer` a state, moved from one mesh to another.

    None stands for the network's order, as in checkpoints: as `before` of arrays that may be
    anywhere, as `after` on the mesh where they are.
    """
    if before == after:
        return tree
    model = define(model)
    if before is not None and before.config.pipe > 1:
        stages = make_stages(model.config.layers, before.config)

        def unstack(path, x: jax.Array) -> jax.Array:
            if _is_stacked(path):
                shape = (model.config.layers, *x.shape[1:])
                return compile_from_stages(stages, shape, x.sharding)(x)
            return jax.device_put(x, saved_sharding(x.sharding, x.shape, stacked=False))

        tree = jax.tree_util.tree_map_with_path(unstack, tree)
    if after is None:
        return tree
    to = param_shardings(model, after)
    if optimizer is not None:
        to = shardings(abstract_state(model, optimizer, after))
    if after.config.pipe == 1:
        return jax.device_put(tree, to)
    stages = make_stages(model.config.layers, after.config)

    def stack(path, x: jax.Array, s: NamedSharding) -> jax.Array:
        if not _is_stacked(path):
            return jax.device_put(x, s)
        x = jax.device_put(x, saved_sharding(s, x.shape, stacked=True))
        return compile_to_stages(stages, x.shape, s)(x)

    return jax.tree_util.tree_map_with_path(stack, tree, to)


def abstract_params(model: ModelLike, layout: Layout, saved: bool = False) -> Params:
    """As `abstract_state`, of the parameters alone."""
    return abstract_state(model, OptimizerConfig(), layout, saved).params


def _is_stacked(path) -> bool:
    return any(getattr(key, "key", None) == BLOCKS for key in path)


def stack_stages(params: Params, model: ModelLike, layout: Layout) -> Params:
    """Blocks stacked in the network's order to how they are stacked on the mesh."""
    if layout.config.pipe == 1:
        return params
    stages = make_stages(define(model).config.layers, layout.config)
    return params | {BLOCKS: to_stages(params[BLOCKS], stages)}
