"""The whole network, as an NNX module and as pure functions over a dictionary of parameters.

Training, checkpoints and conversion see parameters as a nested dict of float32 arrays; those of
the blocks are stacked over layers, so that one scan compiles one block.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from llama3_jax.kernels.attention import Places, make_spans
from llama3_jax.kernels.cross_entropy import linear_cross_entropy, linear_scores
from llama3_jax.kernels.embedding import lookup
from llama3_jax.kernels.linear import linear
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.layers import Block, Cache, Context, RMSNorm, parameter
from llama3_jax.model.rope import rope_tables
from llama3_jax.parallel.ranks import ALONE, GATHERED, Ranks

Params = dict[str, Any]

_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "save_attention": jax.checkpoint_policies.save_only_these_names("attention_out"),
    "save_products": jax.checkpoint_policies.save_only_these_names("attention_out", "product"),
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
        context = make_context(self.config, positions, segment_ids)
        if cache is not None:
            slots = jnp.broadcast_to(
                jnp.arange(cache.keys.shape[2]), (len(tokens), cache.keys.shape[2])
            )
            context = context._replace(
                queries=Places(positions, jnp.ones_like(positions)),
                keys=Places(slots, jnp.ones_like(slots)),
            )
        x = embed(self.config, self.embedding[...], tokens)
        blocks = nnx.to_pure_dict(nnx.state(self.blocks, nnx.Param))
        x, cache = run_blocks(self.config, blocks, x, context, cache)
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


# ------------------------------------------------------------ the pieces, as pure functions
# On a mesh they see the arrays of one rank: its part of the vocabulary, the heads, the tokens.


def make_context(
    config: ModelConfig,
    positions: Int[Array, "batch length"],
    segment_ids: Int[Array, "batch length"],
    ranks: Ranks = ALONE,
) -> Context:
    """What all layers share, for this context rank's tokens."""
    queries = Places(positions, segment_ids)
    keys = Places(*map(ranks.gather_places, queries))
    rows = ranks.row_indices(positions.shape[1])
    spans = make_spans(queries, keys, rows) if config.attention == "triton" else None
    tables = rope_tables(positions, config.rope, config.head_dim)
    return Context(tables, queries, keys, rows, spans)


def embed(
    config: ModelConfig,
    table: Float[Array, "vocab dim"],
    tokens: Int[Array, "batch length"],
    ranks: Ranks = ALONE,
) -> Float[Array, "batch part dim"]:
    """Token embeddings, from a table that may be split over tensor ranks by vocabulary."""
    if ranks.tensor == 1:
        return lookup(table, tokens, config.dtype)
    # A token lies in one rank's part; the others add zeros.
    own = tokens - ranks.vocabulary_offset(len(table))
    inside = (own >= 0) & (own < len(table))
    x = lookup(table, jnp.where(inside, own, len(table)), config.dtype)
    return ranks.scatter_sequence(x)


def apply_block(
    config: ModelConfig, params: Params, x: Array, context: Context, cache=None, ranks=ALONE
) -> tuple[Float[Array, "batch part dim"], Cache | None]:
    """One block with its parameters as a dict."""
    graph, state = _abstract_block(config)
    return nnx.merge(graph, _filled(state, params))(x, context, cache, ranks)


def rematerialized(config: ModelConfig, function: Callable) -> Callable:
    """`function` so that its backward computes again what `config.remat` says."""
    if config.remat == "none":
        return function
    return jax.checkpoint(function, policy=_REMAT_POLICIES[config.remat], prevent_cse=False)


def run_blocks(
    config: ModelConfig,
    blocks: Any,
    x: Float[Array, "batch part dim"],
    context: Context,
    cache: Cache | None = None,
    ranks: Ranks = ALONE,
    open_block: Callable[[Any], Params] = lambda params: params,
    keeps_weights: bool = True,
) -> tuple[Float[Array, "batch part dim"], Cache | None]:
    """All blocks in turn. `open_block` makes one block's parameters of its part of `blocks`.

    Without `keeps_weights` the backward pass opens them again.
    """

    def apply(x, layer):
        params, layer_cache = layer
        return apply_block(config, open_block(params), x, context, layer_cache, ranks)

    if config.remat == "none" and not keeps_weights:
        apply = jax.checkpoint(apply, policy=_all_but_weights, prevent_cse=False)
    else:
        apply = rematerialized(config, apply)
    unroll = min(config.layer_unroll, config.layers)
    return jax.lax.scan(apply, x, (blocks, cache), unroll=unroll)


def _all_but_weights(primitive, *_, **options) -> bool:
    """Keeps all but gathered weights and what is free to make from them: decided by names.

    What is gathered is kept by the name that it has after its gather (parallel/ranks.py), or not.
    """
    if primitive.name == "name":
        return options["name"] != GATHERED
    if primitive.name == "custom_vjp_call":  # one operation here: its body has the name
        body = options["call_jaxpr"].eqns
        names = {e.params["name"] for e in body if e.primitive.name == "name"}
        casts = all(e.primitive.name == "convert_element_type" for e in body)
        return GATHERED not in names and not casts
    return primitive.name not in ("all_gather", "reshape", "convert_element_type")


def head_losses(
    config: ModelConfig,
    params: Params,
    x: Float[Array, "batch part dim"],
    targets: Int[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    ranks: Ranks = ALONE,
) -> tuple[Float[Array, ""], Float[Array, "batch length"]]:
    """The sum of the masked losses in nats, which has a gradient, and each token's part of it.

    `params` hold final_norm, and head or (tied) embedding.
    """
    hidden, head = _at_head(config, params, x, ranks)
    return linear_cross_entropy(hidden, head, targets, mask, config.loss, ranks)


def head_scores(
    config: ModelConfig,
    params: Params,
    x: Float[Array, "batch part dim"],
    targets: Int[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    ranks: Ranks = ALONE,
) -> tuple[Float[Array, "batch length"], Bool[Array, "batch length"]]:
    """Of each masked token its loss in nats, and whether it is the likeliest. See `head_losses`."""
    return linear_scores(*_at_head(config, params, x, ranks), targets, mask, ranks)


def _at_head(config: ModelConfig, params: Params, x: Array, ranks: Ranks) -> tuple[Array, Array]:
    norm = nnx.merge(*_abstract_norm(config, params["final_norm"]))
    head = params["embedding"].T if config.tied_head else params["head"]
    return ranks.gather_sequence(norm(x)), head


def project(
    hidden: Float[Array, "batch length dim"], head: Float[Array, "dim vocab"]
) -> Float[Array, "batch length vocab"]:
    """Logits: product in the activations' dtype, accumulated and returned in float32."""
    return linear(hidden, head, jnp.float32)


# ------------------------------------------------------------ modules <-> dicts


@functools.cache
def _abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))


@functools.cache
def _abstract_block(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0))))


def _abstract_norm(config: ModelConfig, params: Params) -> tuple[nnx.GraphDef, nnx.State]:
    graph, state = nnx.split(nnx.eval_shape(lambda: RMSNorm(config, rngs=nnx.Rngs(0))))
    return graph, _filled(state, params)


def _filled(state: nnx.State, params: Params) -> nnx.State:
    state = jax.tree.map(lambda x: x, state)  # a copy: replace_by_pure_dict writes in place
    nnx.replace_by_pure_dict(state, params)
    return state


def bind(config: ModelConfig, params: Params) -> Transformer:
    """The module with `params` in place; cheap, made to be called inside jit."""
    graph, state = _abstract(config)
    return nnx.merge(graph, _filled(state, params))


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
