"""A network without its arrays: the graph of its NNX module, and the shapes of its parameters.

What is compiled for a network is compiled for its definition, so a replaced submodule or an added
parameter is part of it. Parameters are a nested dict of arrays by the names of the module's
attributes; those of the blocks are stacked over layers, so that one scan compiles one block.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array

from llama3_jax.errors import UserError
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.layers import load_class

Params = dict[str, Any]
BLOCKS = "blocks"  # the stacked ones' attribute


@dataclasses.dataclass(frozen=True)
class Definition:
    """Hashable; equal where module graph and parameters' shapes are."""

    graph: nnx.GraphDef
    block_graph: nnx.GraphDef
    shapes: tuple[tuple[Any, ...], ...]
    config: ModelConfig
    _state: nnx.State = dataclasses.field(compare=False, repr=False)

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.config, self.shapes))

    def abstract_params(self) -> Params:
        """Shapes and dtypes of the parameters, nothing allocated."""
        return nnx.to_pure_dict(self._state)

    def axes(self) -> Params:
        """For each parameter the tuple of its dimensions' logical names (Flax's `out_sharding`).

        "layers" comes first for blocks; None stands for a dimension that is never split.
        """

        def names(path, variable: nnx.Variable) -> tuple[str | None, ...]:
            given = variable.get_metadata().get("out_sharding")
            if given is not None:
                return tuple(given)
            stacked = ("layers",) if path[0].key == BLOCKS else ()
            return stacked + (None,) * (len(variable.shape) - len(stacked))

        is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
        tree = jax.tree_util.tree_map_with_path(names, self._state, is_leaf=is_variable)
        return nnx.to_pure_dict(tree)

    def bind(self, params: Params) -> nnx.Module:
        """The module with `params` in place; made to be called inside jit.

        Parameters that are not given stay abstract: whoever uses one gets an error from JAX.
        """
        return nnx.merge(self.graph, _filled(self._state, params))

    def bind_block(self, params: Params) -> nnx.Module:
        """One block, with one layer's parameters."""
        return nnx.merge(self.block_graph, _filled(self._state[BLOCKS], params))

    def parameter_count(self, embeddings: bool = True) -> int:
        """Exact number of parameters; without those of the vocabulary when `embeddings` is False."""
        return sum(p.size for p in self.parameters if embeddings or "vocab" not in p.axes)

    def matmul_parameters(self) -> int:
        """Parameters that multiply: no norms, the embedding only as the head."""
        matrices = [p for p in self.parameters if p.is_matrix and "vocab" not in p.axes]
        return sum(p.size for p in matrices) + self.config.vocab_size * self.config.dim

    @functools.cached_property
    def parameters(self) -> list["Parameter"]:
        """Of each its path, shape and logical axes."""
        axes = jax.tree.leaves(self.axes(), is_leaf=lambda leaf: isinstance(leaf, tuple))
        shapes = jax.tree_util.tree_leaves_with_path(self.abstract_params())
        return [
            Parameter(jax.tree_util.keystr(path, simple=True, separator="."), x.shape, names)
            for (path, x), names in zip(shapes, axes, strict=True)
        ]


class Parameter(NamedTuple):
    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def in_blocks(self) -> bool:
        return self.name.startswith(f"{BLOCKS}.")

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) - self.in_blocks > 1


# A config, a module or its definition: what functions of a network take.
ModelLike = ModelConfig | nnx.Module | Definition


def define(model: ModelLike) -> Definition:
    """
    Raises:
      UserError: the module holds variables that are no parameters, or the config names a class
        that cannot be loaded.
    """
    if isinstance(model, Definition):
        return model
    return _of_config(model) if isinstance(model, ModelConfig) else _of_module(model)


@functools.cache
def _of_config(config: ModelConfig) -> Definition:
    return _of_module(nnx.eval_shape(lambda: make(config, nnx.Rngs(0))))


def _of_module(module: nnx.Module) -> Definition:
    graph, state, rest = nnx.split(module, nnx.Param, ...)
    if paths := [".".join(map(str, path)) for path, _ in nnx.to_flat_state(rest)]:
        raise UserError(
            f"the model holds variables that are not nnx.Param: {', '.join(paths)}; training and "
            "checkpoints know parameters alone"
        )
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    shapes = tuple((path, v.shape, str(v.dtype)) for path, v in nnx.to_flat_state(state))
    return Definition(graph, nnx.graphdef(module.blocks), shapes, module.config, state)


def make(config: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
    """The network of a config, with fresh parameters."""
    return load_class(config.model_module)(config, rngs=rngs)


def init_params(config: ModelConfig, seed: int | Array) -> Params:
    """Fresh parameters; call inside jit with output shardings to create them sharded."""
    return nnx.to_pure_dict(nnx.state(make(config, nnx.Rngs(seed)), nnx.Param))


def _filled(state: nnx.State, params: Params) -> nnx.State:
    state = jax.tree.map(lambda x: x, state)  # a copy: replace_by_pure_dict writes in place
    nnx.replace_by_pure_dict(state, params)
    return state


def forward(model: ModelLike, params: Params, *inputs: Array) -> Array:
    """The module's output with `params`: logits of (tokens, positions, segment ids)."""
    return define(model).bind(params)(*inputs)
