import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import float64
from llama3_jax.kernels.attention import Places, attention

# Length, heads, KV heads: one chunk of queries, several, and chunks longer than the shortest.
SHAPES = [
    (37, 4, 4), (150, 6, 2), (256, 8, 1), pytest.param(1100, 2, 1, marks=pytest.mark.slow),
]  # fmt: skip


def packed_places(random: np.random.Generator, rows: int, length: int) -> Places:
    """Random documents in order, some of one token, padding (segment 0) at the end."""
    positions, segments = np.zeros((2, rows, length), np.int32)
    for row in range(rows):
        at, segment = 0, 1
        end = length - random.integers(0, length // 4)
        while at < end:
            size = min(int(random.choice([1, 2, 7, 40, length])), end - at)
            positions[row, at : at + size] = np.arange(size)
            segments[row, at : at + size] = segment
            at, segment = at + size, segment + 1
    return Places(jnp.asarray(positions), jnp.asarray(segments))


def float64_attention(q, k, v, places: Places) -> np.ndarray:
    """A loop over queries and heads, which the tests' and checks' yardstick is held to as well."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    positions, segments = np.asarray(places.positions), np.asarray(places.segments)
    earliest = 0 * positions if places.earliest is None else np.asarray(places.earliest)
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b, s, h in np.ndindex(q.shape[:3]):
        seen = (segments[b] == segments[b, s]) & (positions[b] <= positions[b, s])
        seen &= positions[b] >= earliest[b, s]
        scores = k[b, seen, h // group] @ q[b, s, h] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, s, h] = weights @ v[b, seen, h // group] / weights.sum()
    return out


def test_the_yardstick_is_the_loop_to_float64s_last_digits():
    random = np.random.default_rng()
    q = random.normal(size=(2, 50, 6, 16))
    k, v = random.normal(size=(2, 2, 50, 2, 16))
    places = packed_places(random, 2, 50)
    with jax.enable_x64(True):
        out = np.asarray(float64.attention(q, k, v, places, places))
    real, expected = np.asarray(places.segments) > 0, float64_attention(q, k, v, places)
    np.testing.assert_allclose(out[real], expected[real], atol=1e-13, rtol=1e-12)
    assert (out[~real] == 0).all()
    with pytest.raises(TypeError, match="float64 is off"):
        float64.attention(q, k, v, places, places)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize(("length", "heads", "kv_heads"), SHAPES)
def test_equals_a_float64_loop(implementation, length, heads, kv_heads):
    random = np.random.default_rng()
    q = random.normal(size=(2, length, heads, 16)).astype(np.float32)
    k, v = random.normal(size=(2, 2, length, kv_heads, 16)).astype(np.float32)
    places = packed_places(random, 2, length)
    out = attention(q, k, v, places, places, implementation)
    assert np.isfinite(out).all()
    real, expected = np.asarray(places.segments) > 0, float64_attention(q, k, v, places)
    np.testing.assert_allclose(out[real], expected[real], atol=4e-6, rtol=1e-4)


def windows(random: np.random.Generator, places: Places) -> Places:
    """Queries that see a random number of tokens back, each its own."""
    back = random.integers(0, 30, places.positions.shape)
    return places._replace(earliest=places.positions - jnp.asarray(back))


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_a_window_hides_what_lies_before_it(implementation):
    random = np.random.default_rng()
    q = random.normal(size=(2, 150, 4, 16)).astype(np.float32)
    k, v = random.normal(size=(2, 2, 150, 2, 16)).astype(np.float32)
    places = windows(random, packed_places(random, 2, 150))
    keys = places._replace(earliest=None)
    real, expected = np.asarray(places.segments) > 0, float64_attention(q, k, v, places)
    out = attention(q, k, v, places, keys, implementation)
    np.testing.assert_allclose(out[real], expected[real], atol=4e-6, rtol=1e-4)
    rows = jnp.asarray(random.permutation(150)[:60])  # as a context rank has them
    some = jax.tree.map(lambda x: x[:, rows], places)
    out = attention(q[:, rows], k, v, some, keys, implementation, rows)
    real = np.asarray(some.segments) > 0
    np.testing.assert_allclose(out[real], expected[:, rows][real], atol=4e-6, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize(("length", "heads", "kv_heads"), SHAPES)
def test_gradients_equal_those_in_float64(implementation, length, heads, kv_heads):
    random = np.random.default_rng()
    q, cotangent = random.normal(size=(2, 2, length, heads, 16))
    k, v = random.normal(size=(2, 2, length, kv_heads, 16))
    places = packed_places(random, 2, length)
    cotangent = cotangent * (np.asarray(places.segments) > 0)[:, :, None, None]

    def gradients(compute, dtype):
        def scalar(q, k, v):
            return jnp.sum(compute(q, k, v, places, places) * cotangent.astype(dtype))

        return jax.jit(jax.grad(scalar, argnums=(0, 1, 2)))(*(x.astype(dtype) for x in (q, k, v)))

    with jax.enable_x64(True):
        expected = gradients(float64.attention, np.float64)
    compute = functools.partial(attention, implementation=implementation)
    for ours, reference in zip(gradients(compute, np.float32), expected, strict=True):
        np.testing.assert_allclose(ours, reference, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_bfloat16_stays_close_to_float32(implementation):
    random = np.random.default_rng(0)
    q = random.normal(size=(1, 64, 4, 32)).astype(np.float32)
    k, v = random.normal(size=(2, 1, 64, 2, 32)).astype(np.float32)
    places = packed_places(random, 1, 64)
    low = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    out = attention(*low, places, places, implementation)
    assert out.dtype == jnp.bfloat16
    real, expected = np.asarray(places.segments) > 0, float64_attention(q, k, v, places)
    np.testing.assert_allclose(out.astype(np.float32)[real], expected[real], atol=0.06)
