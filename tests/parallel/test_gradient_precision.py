"""In bfloat16, on skewed tokens: every parameter's gradient against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama3_jax.kernels.embedding import lookup
from llama3_jax.model.config import ModelConfig
from llama3_jax.parallel.mesh import MeshConfig, make_mesh
from llama3_jax.parallel.sharding import put_batch
from llama3_jax.training.gradients import make_gradients
from llama3_jax.training.state import relayout, stack_stages
from tests.parallel.equivalence import QUICK, random_params
from tests.parallel.float64_model import summed_loss

MODEL = ModelConfig(
    vocab_size=512, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=64, init_std=0.1
)
ROWS, LENGTH = 16, 512


def test_the_gradient_of_8192_equal_tokens_is_their_sum():
    tokens = jnp.full(8192, 3)
    for dtype in ("bfloat16", "float32"):
        table = jnp.zeros((8, 4))
        gradient = jax.grad(lambda t, d=dtype: lookup(t, tokens, d).astype(jnp.float32).sum())(
            table
        )
        assert gradient.dtype == jnp.float32
        np.testing.assert_array_equal(gradient[3], np.full(4, 8192.0))
        np.testing.assert_array_equal(np.delete(gradient, 3, 0), 0)


def test_rows_are_those_of_the_table_and_zeros_beyond_it():
    random = np.random.default_rng()
    table = jnp.asarray(random.normal(size=(8, 4)), jnp.float32)
    tokens = random.integers(0, 9, (5, 7))
    expected = np.where((tokens < 8)[..., None], table[np.minimum(tokens, 7)], 0)
    np.testing.assert_array_equal(lookup(table, tokens, "float32"), expected)
    gradient = jax.grad(lambda t: (lookup(t, tokens, "float32") ** 2).sum())(table)
    counts = np.bincount(tokens.ravel(), minlength=9)[:8, None]
    np.testing.assert_allclose(gradient, 2 * counts * table, rtol=1e-5)


@functools.cache
def batch() -> dict[str, np.ndarray]:
    """Zipf-distributed tokens in random documents, as those of a text are."""
    random = np.random.default_rng(int(np.random.SeedSequence().entropy % 2**32))
    weights = 1 / np.arange(1, MODEL.vocab_size + 1) ** 1.2
    drawn = random.choice(MODEL.vocab_size, (ROWS, LENGTH + 1), p=weights / weights.sum())
    starts = random.random((ROWS, LENGTH)) < 0.02
    starts[:, 0] = True
    first = np.maximum.accumulate(np.where(starts, np.arange(LENGTH), 0), axis=1)
    arrays = {
        "tokens": drawn[:, :-1],
        "targets": drawn[:, 1:],
        "positions": np.arange(LENGTH) - first,
        "segment_ids": np.cumsum(starts, axis=1),
        "source": np.zeros(ROWS),
        "cut": np.zeros(ROWS),
    }
    arrays = {name: array.astype(np.int32) for name, array in arrays.items()}
    return arrays | {"loss_mask": random.random((ROWS, LENGTH)) < 0.9}


@functools.cache
def expected() -> dict[str, np.ndarray]:
    params = jax.device_get(random_params(MODEL))
    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(lambda p: summed_loss(MODEL, p, batch())))
        return jax.device_get(gradient(params))


MESHES = {
    "one": MeshConfig(),
    "resharded": MeshConfig(data=2, tensor=2),
    "whole": MeshConfig(data=4, reshard_after_forward=False),
    "pipe": MeshConfig(pipe=2, data=2),
}
SLOW = ("whole", "resharded")


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(mesh, id=name, marks=pytest.mark.slow if name in SLOW else ())
        for name, mesh in MESHES.items()
    ],
)
def test_no_gradient_is_off_by_more_than_bfloat16_products_are(config):
    layout = make_mesh(config, jax.devices()[: config.devices])
    function = jax.jit(make_gradients(MODEL, layout, 4, 1))
    arguments = stack_stages(random_params(MODEL), MODEL, layout), put_batch(batch(), layout)
    compiled = function.lower(*arguments).compile(compiler_options=QUICK)
    gradients = relayout(compiled(*arguments)[1], MODEL, layout, None)
    exact = jax.tree_util.tree_leaves_with_path(expected())
    for (path, right), ours in zip(exact, jax.tree.leaves(gradients), strict=True):
        error = np.linalg.norm(np.asarray(ours, np.float64) - right) / np.linalg.norm(right)
        assert error < 0.015, jax.tree_util.keystr(path)
