"""The whole network, as an NNX module and as pure functions over a dictionary of parameters.

Training, checkpoints and conversion see parameters as a nested dict of float32 arrays; those of
the blocks are stacked over layers, so that one scan compiles one block.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llama3_jax.kernels.attention import Places
from llama3_jax.kernels.linear import linear
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.layers import Block, Cache, Context, RMSNorm, parameter
from llama3_jax.model.rope import rope_tables

Params = dict[str, Any]

_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "save_attention": jax.checkpoint_policies.save_only_these_names("attention_out"),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["block_input", "attention_out"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class Transformer(nnx.Module):
    """Llama 3 (Llama 3 paper, section 3.2): logits for every position of packed documents."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        table = (config.vocab_size, config.dim)
        self.embedding = parameter(rngs, table, ("vocab", "embed"), config.init_std)
        make_blocks = nnx.vmap(lambda rngs: Block(config, rngs=rngs), in_axes=0, out_axes=0)
        self.blocks = nnx.split_rngs(splits=config.layers)(make_blocks)(rngs)
        self.final_norm = RMSNorm(config, rngs=rngs)
        if not config.tied_head:
            self.head = parameter(rngs, table[::-1], ("embed", "vocab"), config.init_std)

    def hidden(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"],
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "batch length dim"], Cache | None]:
        """Final normed activations; with a cache (stacked over layers) also the updated cache.

        A cached row is one document: its queries see every slot up to their own position.
        """
        config = self.config
        queries = keys = Places(positions, segment_ids)
        if cache is not None:
            slots = jnp.broadcast_to(
                jnp.arange(cache.keys.shape[2]), (len(tokens), cache.keys.shape[2])
            )
            queries = Places(positions, jnp.ones_like(positions))
            keys = Places(slots, jnp.ones_like(slots))
        context = Context(rope_tables(positions, config.rope, config.head_dim), queries, keys)
        x = self.embedding[...].astype(config.dtype)[tokens]

        block_graph, block_params = nnx.split(self.blocks)

        def apply_block(x, layer):
            params, layer_cache = layer
            return nnx.merge(block_graph, params)(x, context, layer_cache)

        if config.remat != "none":
            apply_block = jax.checkpoint(
                apply_block, policy=_REMAT_POLICIES[config.remat], prevent_cse=False
            )
        x, cache = jax.lax.scan(
            apply_block, x, (block_params, cache), unroll=min(config.layer_unroll, config.layers)
        )
        return self.final_norm(x), cache

    def head_matrix(self) -> Float[Array, "dim vocab"]:
        """The output projection, the embedding's transpose when tied."""
        return self.embedding[...].T if self.config.tied_head else self.head[...]

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"],
    ) -> Float[Array, "batch length vocab"]:
        """Logits in float32."""
        hidden, _ = self.hidden(tokens, positions, segment_ids)
        return project(hidden, self.head_matrix())


def project(
    hidden: Float[Array, "batch length dim"], head: Float[Array, "dim vocab"]
) -> Float[Array, "batch length vocab"]:
    """Logits: product in the activations' dtype, accumulated and returned in float32."""
    return linear(hidden, head, jnp.float32)


@functools.cache
def _abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))


def bind(config: ModelConfig, params: Params) -> Transformer:
    """The module with `params` in place; cheap, made to be called inside jit."""
    graph, state = _abstract(config)
    state = jax.tree.map(lambda x: x, state)  # a copy: replace_by_pure_dict writes in place
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def abstract_params(config: ModelConfig) -> Params:
    """Shapes and dtypes of the parameters, nothing allocated."""
    return nnx.to_pure_dict(_abstract(config)[1])


def init_params(config: ModelConfig, seed: int | Array) -> Params:
    """Fresh parameters; call inside jit with output shardings to create them sharded."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(seed)), nnx.Param))


def logical_axes(config: ModelConfig) -> Params:
    """For each parameter the tuple of its logical axis names, "layers" first for blocks."""

    def axes(path, variable):
        prefix = ("layers",) if path[0].key == "blocks" else ()
        return prefix + tuple(variable.get_metadata()["axes"])

    is_param = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    tree = jax.tree_util.tree_map_with_path(axes, _abstract(config)[1], is_leaf=is_param)
    return nnx.to_pure_dict(tree)


def forward(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "batch length"],
    positions: Int[Array, "batch length"],
    segment_ids: Int[Array, "batch length"],
) -> Float[Array, "batch length vocab"]:
    """Logits of `params` on packed rows, float32."""
    return bind(config, params)(tokens, positions, segment_ids)
