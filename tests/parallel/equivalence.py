"""A tiny model on any mesh of 8 devices against the same model on none."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from llama3_jax.kernels.cross_entropy import token_losses
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.definition import define, init_params
from llama3_jax.parallel.mesh import MeshConfig, make_mesh
from llama3_jax.parallel.sharding import put_batch
from llama3_jax.training.gradients import make_gradients
from llama3_jax.training.state import relayout, stack_stages

# Six layers: on eight stages the first and the last hold none.
MODEL = ModelConfig(
    vocab_size=64, dim=32, layers=6, heads=8, kv_heads=4, head_dim=4, ffn_dim=64,
    dtype="float32", init_std=0.2,
)  # fmt: skip
ROWS, LENGTH, MICRO_BATCHES, SOURCES = 32, 32, 4, 2
# Compiling is what takes time in these tests.
QUICK = {"xla_backend_optimization_level": 0}

FACTORISATIONS = [
    shape for shape in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(shape) == 8
]


def mesh_config(shape: tuple[int, ...], **options) -> MeshConfig:
    data, pipe, context, tensor = shape
    kv_heads = "replicated" if tensor > MODEL.kv_heads else "sharded"
    return MeshConfig(
        data=data, pipe=pipe, context=context, tensor=tensor, kv_heads=kv_heads, **options
    )


def packed_batch(seed: int = 0, rows: int = ROWS, length: int = LENGTH) -> dict[str, np.ndarray]:
    """Random tokens in random documents, the end of some rows padding."""
    random = np.random.default_rng(seed)
    starts = random.random((rows, length)) < 0.1
    starts[:, 0] = True
    segments = np.cumsum(starts, axis=1).astype(np.int32)
    first = np.maximum.accumulate(np.where(starts, np.arange(length), 0), axis=1)
    segments[random.random(rows) < 0.3, -5:] = 0
    return {
        "tokens": random.integers(0, MODEL.vocab_size, (rows, length), dtype=np.int32),
        "targets": random.integers(0, MODEL.vocab_size, (rows, length), dtype=np.int32),
        "positions": (np.arange(length) - first).astype(np.int32),
        "segment_ids": segments,
        "loss_mask": (random.random((rows, length)) < 0.8) & (segments > 0),
        "source": random.integers(0, SOURCES, rows, dtype=np.int32),
        "cut": np.zeros(rows, np.int32),
    }


def serial(model: ModelConfig, params, batch):
    """Summed loss and gradients by automatic differentiation, no mesh, no micro-batches."""

    def loss(params):
        logits = define(model).bind(params)(
            batch["tokens"], batch["positions"], batch["segment_ids"]
        )
        losses = token_losses(logits, batch["targets"])
        return jnp.sum(jnp.where(batch["loss_mask"], losses, 0))

    return jax.jit(jax.value_and_grad(loss)).lower(params).compile(compiler_options=QUICK)(params)


def on_mesh(model: ModelConfig, params, batch, config: MeshConfig, micro_batches=MICRO_BATCHES):
    """LossSums and gradients in the network's order, as the training step computes them."""
    layout = make_mesh(config)
    function = jax.jit(make_gradients(model, layout, micro_batches, SOURCES))
    arguments = stack_stages(params, model, layout), put_batch(batch, layout)
    sums, gradients = function.lower(*arguments).compile(compiler_options=QUICK)(*arguments)
    return sums, relayout(gradients, model, layout, None)


def relative_errors(gradients, expected) -> dict[str, float]:
    """Largest difference over largest value, for each parameter."""
    flat = jax.tree_util.tree_leaves_with_path(expected)
    return {
        jax.tree_util.keystr(path): float(
            np.abs(np.asarray(g) - np.asarray(e)).max() / np.abs(e).max()
        )
        for (path, e), g in zip(flat, jax.tree.leaves(gradients), strict=True)
    }


@functools.cache
def random_params(model: ModelConfig = MODEL, seed: int = 0):
    return jax.jit(lambda: init_params(model, seed))()
