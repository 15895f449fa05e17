import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from llama3_jax.kernels import cross_entropy
from llama3_jax.kernels.cross_entropy import Plain, Whole, in_chunks, linear_cross_entropy
from llama3_jax.parallel.ranks import Collectives

MASKS = ["some", "all", "none", "one"]


def triton_tiles():
    pytest.importorskip("triton", reason="triton has wheels for Linux only")
    from llama3_jax.kernels.gpu.call import interpreted
    from llama3_jax.kernels.gpu.cross_entropy import InTiles
    from llama3_jax.kernels.gpu.tuning import Blocks

    # Blocks that divide neither tokens nor vocabulary, nor the model dim.
    return InTiles(Blocks(16, 32, 4, 1), depth=16, rows=32), interpreted


def make_inputs(random, mask: str, tokens: int, dim: int, vocab: int):
    hidden = random.normal(size=(tokens, dim))
    head = random.normal(size=(dim, vocab)) * 2 / dim**0.5
    targets = random.integers(0, vocab, tokens)
    counts = {
        "some": random.random(tokens) < 0.6,
        "all": np.ones(tokens, bool),
        "none": np.zeros(tokens, bool),
        "one": np.arange(tokens) == tokens // 2,
    }[mask]
    return hidden, head, targets, counts


def float64_loss(hidden, head, targets, counts, g):
    """An independent reference in numpy: sum, losses and gradients of g times the sum."""
    logits = hidden @ head
    logits = logits - logits.max(1, keepdims=True)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    at = np.arange(len(targets)), targets
    losses = -np.log(p[at]) * counts
    p[at] -= 1
    dlogits = p * counts[:, None] * g
    return losses.sum(), losses, dlogits @ head.T, hidden.T @ dlogits


def compare(compute, inputs, g: float, **tolerance):
    hidden, head, targets, counts = inputs

    def scaled(hidden, head):
        total, losses = compute(hidden, head, jnp.asarray(targets), jnp.asarray(counts))
        return total * g, (total, losses)

    single = np.float32(hidden), np.float32(head)
    run = jax.jit(jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True))
    (_, (total, losses)), gradients = run(*single)
    only, _ = jax.jit(compute)(*single, jnp.asarray(targets), jnp.asarray(counts))
    expected = float64_loss(*inputs, g)
    tolerance = tolerance or dict(atol=1e-5, rtol=1e-4)
    for ours, exact in zip((total, losses, *gradients), expected, strict=True):
        np.testing.assert_allclose(ours, exact, **tolerance)
    np.testing.assert_allclose(only, expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_equals_float64(implementation, mask):
    inputs = make_inputs(np.random.default_rng(), mask, 203, 24, 77)
    compute = functools.partial(linear_cross_entropy, implementation=implementation)
    compare(compute, inputs, 0.7)


@pytest.mark.parametrize("mask", MASKS)
def test_triton_equals_float64(mask):
    how, interpreted = triton_tiles()
    random = np.random.default_rng()
    inputs = make_inputs(random, mask, int(random.integers(40, 70)), 24, 77)

    def compute(*arrays):
        return in_chunks(how, *arrays, Whole())

    with interpreted():
        compare(compute, inputs, -1.3)


@pytest.mark.parametrize("implementation", ["reference", "chunked", "triton"])
def test_a_vocabulary_split_over_ranks(implementation):
    inputs = make_inputs(np.random.default_rng(), "some", 70, 16, 4 * 24)
    mesh = Mesh(np.array(jax.devices()[:4]), ("tensor",))
    ranks, whole = Collectives(tensor=4), PartitionSpec()
    if implementation == "triton":
        how, interpreted = triton_tiles()
        compute = functools.partial(in_chunks, how)
    else:
        compute = getattr(cross_entropy, implementation)

    def on_rank(hidden, head, targets, counts):
        def scaled(hidden, head):
            total, losses = compute(hidden, head, targets, counts, ranks)
            return total, losses

        run = jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True)
        (total, losses), (dhidden, dhead) = run(hidden, head)
        return total, losses, jax.lax.psum(dhidden, "tensor"), dhead

    split = PartitionSpec(None, "tensor")
    sharded = jax.jit(
        jax.shard_map(
            on_rank, mesh=mesh, in_specs=(whole, split, whole, whole),
            out_specs=(whole, whole, whole, split), check_vma=False,
        )
    )  # fmt: skip
    hidden, head, targets, counts = inputs
    arguments = np.float32(hidden), np.float32(head), jnp.asarray(targets), jnp.asarray(counts)
    if implementation == "triton":
        with interpreted():
            results = sharded(*arguments)
    else:
        results = sharded(*arguments)
    for ours, exact in zip(results, float64_loss(*inputs, 1.0), strict=True):
        np.testing.assert_allclose(ours, exact, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["chunked", "triton"])
def test_bfloat16_is_as_close_as_the_reference(implementation):
    random = np.random.default_rng()
    hidden, head, targets, counts = make_inputs(random, "some", 60, 32, 96)
    low = jnp.asarray(hidden, jnp.bfloat16), np.float32(head)
    how, interpreted = triton_tiles() if implementation == "triton" else (Plain(), None)

    def gradients(compute):
        def total(hidden, head):
            return compute(hidden, head, jnp.asarray(targets), jnp.asarray(counts), Whole())[0]

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(*low)

    value, expected = gradients(cross_entropy.reference)
    if interpreted:
        with interpreted():
            ours, own = gradients(functools.partial(in_chunks, how))
    else:
        ours, own = gradients(functools.partial(in_chunks, how))
    assert own[0].dtype == jnp.bfloat16 and own[1].dtype == jnp.float32
    assert float(ours) == pytest.approx(float(value), rel=1e-3)
    exact = float64_loss(
        np.float64(low[0]), np.float64(jnp.asarray(head, jnp.bfloat16)), targets, counts, 1.0
    )[2:]
    for a, b, e in zip(own, expected, exact, strict=True):
        ours, reference = (np.abs(np.float64(x) - e).max() for x in (a, b))
        assert ours <= 2 * reference + 1e-6


def test_masked_positions_cost_nothing():
    # A chunk that holds no position of the mask is not computed: its not-a-numbers stay unseen.
    hidden, head, targets, _ = make_inputs(np.random.default_rng(), "some", 96, 16, 40)
    counts = np.arange(96) % 3 == 0
    hidden[~counts] = np.nan

    def total(hidden, head):
        how = Plain(rows=32)  # exactly the positions that count
        return in_chunks(how, hidden, head, jnp.asarray(targets), jnp.asarray(counts), Whole())[0]

    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(
        np.float32(hidden), np.float32(head)
    )
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)
    assert (np.asarray(gradients[0])[~counts] == 0).all()


def test_logits_are_never_whole_in_memory():
    tokens, dim, vocab = 4096, 64, 4096
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in [
            ((tokens, dim), jnp.bfloat16), ((dim, vocab), jnp.float32),
            ((tokens,), jnp.int32), ((tokens,), jnp.bool_),
        ]
    ]  # fmt: skip

    def memory(compute):
        gradient = jax.jit(jax.grad(lambda *x: compute(*x)[0], argnums=(0, 1)))
        return gradient.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    def in_small_chunks(*arrays):
        return in_chunks(Plain(rows=128), *arrays, Whole())

    assert memory(cross_entropy.reference) >= tokens * vocab * 4
    assert memory(in_small_chunks) < tokens * vocab * 4 / 4
