"""RMSNorm, RoPE and SwiGLU: both implementations against automatic differentiation in float64."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama3_jax.kernels.pointwise import add_norm, rotate, swiglu

IMPLEMENTATIONS = ["reference", "triton"]
EPS = 1e-5


def interpreter(implementation: str):
    if implementation == "reference":
        return contextlib.nullcontext()
    pytest.importorskip("triton", reason="triton has wheels for Linux only")
    from llama3_jax.kernels.gpu.call import interpreted

    return interpreted()


def compare(
    implementation, compute, definition, inputs, cotangents, dtype="float32", tolerance=1e-5
):
    """Results and gradients of `compute(*inputs, implementation)` in `dtype`."""
    rounded = [np.asarray(jnp.asarray(x, dtype), np.float64) for x in (*inputs, *cotangents)]
    inputs, cotangents = rounded[: len(inputs)], rounded[len(inputs) :]

    def both(function, inputs, cotangents):
        results, pullback = jax.vjp(function, *inputs)
        return jax.tree.leaves((results, pullback(jax.tree.unflatten(
            jax.tree.structure(results), cotangents
        ))))  # fmt: skip

    with interpreter(implementation):
        cast = [[jnp.asarray(x, dtype) for x in arrays] for arrays in (inputs, cotangents)]
        ours = jax.jit(lambda a, b: both(lambda *x: compute(*x, implementation), a, b))(*cast)
    with jax.enable_x64(True):
        expected = both(definition, inputs, cotangents)
    for array, exact in zip(ours, expected, strict=True):
        scale = max(1.0, np.abs(exact).max())
        np.testing.assert_allclose(np.float64(array), exact, rtol=tolerance, atol=tolerance * scale)
    return ours


@pytest.mark.parametrize("width", [24, 64])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_norm_after_a_sum(implementation, width):
    random = np.random.default_rng()
    x, update, dtotal, dnormed = random.normal(size=(4, 2, 5, width))
    scale = random.normal(size=width)

    def definition(x, update, scale):
        total = x + update
        return total, total / jnp.sqrt(jnp.mean(total**2, -1, keepdims=True) + EPS) * scale

    def compute(x, update, scale, implementation):
        return add_norm(x, update, scale, EPS, implementation)

    compare(implementation, compute, definition, (x, update, scale), (dtotal, dnormed))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_norm_alone_also_passes_on_what_comes_to_its_input(implementation):
    random = np.random.default_rng()
    x, dx, dnormed = random.normal(size=(3, 601, 8)) if implementation == "triton" else (
        random.normal(size=(3, 7, 8))
    )  # fmt: skip
    scale = random.normal(size=8)

    def definition(x, scale):
        return x, x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + EPS) * scale

    def compute(x, scale, implementation):
        return add_norm(x, None, scale, EPS, implementation)

    # 601 rows: some programs of the gradient's kernel have two rows, others one.
    compare(implementation, compute, definition, (x, scale), (dx, dnormed))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_norm_in_bfloat16(implementation):
    random = np.random.default_rng()
    x, update = (jnp.asarray(random.normal(size=(3, 32)), jnp.bfloat16) for _ in range(2))
    scale = jnp.ones(32)
    with interpreter(implementation):
        total, normed = jax.jit(lambda *a: add_norm(*a, EPS, implementation))(x, update, scale)
    assert total.dtype == normed.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(total), np.float32(x + update))
    exact = np.float64(total)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + EPS)
    # XLA may keep the sum unrounded on its way to the norm.
    np.testing.assert_allclose(np.float64(normed), exact, rtol=2**-7)


@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 2, 16), (3, 1, 12)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rope_turns_queries_and_keys(implementation, heads, kv_heads, head_dim):
    random = np.random.default_rng()
    q, dq = random.normal(size=(2, 2, 5, heads, head_dim))
    k, dk = random.normal(size=(2, 2, 5, kv_heads, head_dim))
    angles = random.normal(size=(2, 5, head_dim // 2)) * 3

    def definition(q, k):
        turn = jnp.exp(1j * angles)[:, :, None]

        def turned(x):
            first, second = jnp.split(x, 2, -1)
            z = (first + 1j * second) * turn
            return jnp.concatenate([z.real, z.imag], -1)

        return turned(q), turned(k)

    def compute(q, k, implementation):
        tables = jnp.float32(np.cos(angles)), jnp.float32(np.sin(angles))
        return rotate(q, k, tables, implementation)

    compare(implementation, compute, definition, (q, k), (dq, dk))


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.05)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_swiglu(implementation, dtype, tolerance):
    random = np.random.default_rng()
    shape = (3, 5, 407) if implementation == "triton" else (3, 5, 7)  # blocks are of 2048
    gate, up, g = 3 * random.normal(size=(3, *shape))
    results = compare(
        implementation, swiglu, lambda gate, up: jax.nn.silu(gate) * up, (gate, up), (g,),
        dtype, tolerance,
    )  # fmt: skip
    assert all(x.dtype == dtype for x in results)
