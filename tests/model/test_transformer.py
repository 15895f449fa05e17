import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama3_jax.errors import UserError
from llama3_jax.kernels.cross_entropy import token_losses
from llama3_jax.kernels.pointwise import rotate
from llama3_jax.model.config import PRESETS, ModelConfig, RopeConfig, RopeScaling, preset
from llama3_jax.model.definition import define, init_params
from llama3_jax.model.rope import inverse_frequencies, rope_tables

TINY = ModelConfig(
    vocab_size=61, dim=32, layers=3, heads=4, kv_heads=2, head_dim=8, ffn_dim=48, dtype="float32",
    init_std=0.2,
)  # fmt: skip


def test_exact_parameter_counts():
    # The published models' counts (Llama 3 paper, table 3, and the released checkpoints).
    published = {"8B": 8_030_261_248, "70B": 70_553_706_496, "405B": 405_853_388_800,
                 "3.2-1B": 1_235_814_400, "3.2-3B": 3_212_749_824}  # fmt: skip
    for name, config in PRESETS.items():
        shapes = jax.tree.leaves(define(config).abstract_params())
        count = sum(int(np.prod(x.shape)) for x in shapes)
        assert count == define(config).parameter_count()
        assert count == published.get(name, count)
        assert all(x.dtype == jnp.float32 for x in shapes)


@pytest.mark.parametrize("name", [n for n in PRESETS if n[-1] in "MB" and "-" not in n][3:])
def test_the_ladder_is_named_by_parameters_without_embeddings(name):
    size = float(name[:-1]) * {"M": 1e6, "B": 1e9}[name[-1]]
    assert define(PRESETS[name]).parameter_count(embeddings=False) == pytest.approx(size, rel=0.02)


def test_every_parameter_has_an_axis_name_for_each_dimension():
    axes = jax.tree.leaves(define(TINY).axes(), is_leaf=lambda x: isinstance(x, tuple))
    shapes = jax.tree.leaves(define(TINY).abstract_params())
    assert [len(a) for a in axes] == [len(x.shape) for x in shapes]


def pack(documents: list[np.ndarray], length: int) -> tuple[np.ndarray, ...]:
    tokens, positions, segments = np.zeros((3, 1, length), np.int32)
    at = 0
    for segment, document in enumerate(documents, start=1):
        end = at + len(document)
        tokens[0, at:end] = document
        positions[0, at:end] = np.arange(len(document))
        segments[0, at:end] = segment
        at = end
    return tokens, positions, segments


def document_loss(config, params, tokens, positions, segments):
    """Sum of next-token losses inside documents, and the logits."""
    logits = define(config).bind(params)(tokens, positions, segments)
    inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    losses = token_losses(logits[:, :-1], tokens[:, 1:])
    return jnp.sum(losses * inside), logits


@pytest.mark.parametrize("attention", ["reference", "chunked"])
@given(lengths=st.lists(st.integers(1, 40), min_size=2, max_size=6), seed=st.integers(0, 2**30))
@settings(max_examples=3, deadline=None)
def test_packed_documents_give_the_logits_and_gradients_of_each_alone(attention, lengths, seed):
    config = TINY.model_copy(update={"attention": attention})
    random = np.random.default_rng(seed)
    documents = [random.integers(0, config.vocab_size, n) for n in lengths]
    params = init_params(config, 1)
    value_and_grad = jax.jit(
        jax.value_and_grad(document_loss, argnums=1, has_aux=True), static_argnums=0
    )
    (_, logits), packed_grads = value_and_grad(config, params, *pack(documents, 250))
    total = jax.tree.map(jnp.zeros_like, params)
    at = 0
    for document in documents:
        (_, alone), grads = value_and_grad(config, params, *pack([document], 250))
        size = len(document)
        np.testing.assert_allclose(logits[0, at : at + size], alone[0, :size], atol=2e-5, rtol=1e-4)
        total = jax.tree.map(jnp.add, total, grads)
        at += size
    for packed, summed in zip(jax.tree.leaves(packed_grads), jax.tree.leaves(total), strict=True):
        scale = 1e-6 + float(jnp.max(jnp.abs(summed)))
        np.testing.assert_allclose(packed / scale, summed / scale, atol=2e-5)


def batch(config, length=48):
    random = np.random.default_rng(0)
    documents = [random.integers(0, config.vocab_size, n) for n in (20, 3, 17)]
    return pack(documents, length)


def test_remat_and_unrolling_change_nothing():
    params = init_params(TINY, 0)

    def gradients(**update):
        config = TINY.model_copy(update=update)
        return jax.jit(jax.grad(lambda p: document_loss(config, p, *batch(config))[0]))(params)

    expected = gradients()
    variants = [{"remat": name} for name in ("full", "save_attention", "save_dots", "offload")]
    variants += [{"layer_unroll": 2}, {"layer_unroll": 3}, {"attention": "chunked"}]
    for update in variants:
        for ours, reference in zip(
            jax.tree.leaves(gradients(**update)), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_allclose(ours, reference, atol=1e-4, rtol=1e-4, err_msg=str(update))


def saved_bytes(**update) -> int:
    config = TINY.model_copy(update=update)
    params = init_params(config, 0)
    _, pullback = jax.vjp(lambda p: document_loss(config, p, *batch(config))[0], params)
    return sum(x.nbytes for x in jax.tree.leaves(pullback))


def test_remat_keeps_less_for_the_backward_pass():
    names = ("full", "save_attention", "save_dots", "none")
    full, attention, products, none = (saved_bytes(remat=name) for name in names)
    assert full < attention < products < none


def test_tied_head_shares_the_embedding():
    config = TINY.model_copy(update={"tied_head": True})
    params = init_params(config, 0)
    assert "head" not in params
    tokens, positions, segments = batch(config)
    untied = params | {"head": params["embedding"].T}
    np.testing.assert_array_equal(
        define(config).bind(params)(tokens, positions, segments),
        define(TINY).bind(untied)(tokens, positions, segments),
    )


def test_bfloat16_compute_is_close_and_returns_float32():
    low = TINY.model_copy(update={"dtype": "bfloat16", "init_std": 0.02})
    params = init_params(low, 0)
    logits = define(low).bind(params)(*batch(low))
    high = low.model_copy(update={"dtype": "float32"})
    expected = define(high).bind(params)(*batch(low))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=0.05 * float(jnp.std(expected)) + 1e-3)


def test_loss_is_the_float64_cross_entropy():
    random = np.random.default_rng()
    logits, targets = 30 * random.normal(size=(2, 5, 61)), random.integers(0, 61, (2, 5))
    exact = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1))
    exact += logits.max(-1) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    ours = token_losses(jnp.float32(logits), targets)
    # A loss near 0 is the difference of two numbers near 100.
    np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=3e-5)


class TestRope:
    def test_rotation_by_complex_numbers(self):
        rope, random = RopeConfig(theta=10_000.0), np.random.default_rng()
        x, positions = random.normal(size=(2, 6, 3, 16)), random.integers(0, 5000, (2, 6))
        angles = positions[..., None, None] * inverse_frequencies(rope, 16)
        turned = (x[..., :8] + 1j * x[..., 8:]) * np.exp(1j * angles)
        tables = rope_tables(jnp.asarray(positions), rope, 16)
        ours, _ = rotate(jnp.float32(x), jnp.float32(x), tables)
        np.testing.assert_allclose(ours[..., :8], turned.real, atol=2e-3)
        np.testing.assert_allclose(ours[..., 8:], turned.imag, atol=2e-3)

    def test_scaling_slows_only_what_turns_seldom(self):
        scaling = RopeScaling()
        plain = inverse_frequencies(RopeConfig(), 128)
        scaled = inverse_frequencies(RopeConfig(scaling=scaling), 128)
        turns = scaling.original_length * plain / (2 * np.pi)
        np.testing.assert_array_equal(scaled[turns > 4], plain[turns > 4])
        np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8)
        between = (turns > 1) & (turns < 4)
        assert between.any()
        assert np.all((scaled < plain) & (scaled > plain / 8), where=between)


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match=r"heads \(3\) must be a multiple of kv_heads \(2\)"):
        preset("42M", heads=3, kv_heads=2)
    with pytest.raises(ValueError, match="head_dim"):
        preset("42M", head_dim=7)
    with pytest.raises(UserError, match="model preset '9B' is unknown; known: 8B"):
        preset("9B")
