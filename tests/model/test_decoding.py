"""Generation equals the full forward pass, row by row, and samples what it says it samples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama3_jax.errors import UserError
from llama3_jax.model import decoding
from llama3_jax.model.config import ModelConfig, RopeConfig, RopeScaling
from llama3_jax.model.definition import define, init_params
from llama3_jax.model.layers import Cache

VOCAB = 61
CONFIG = ModelConfig(
    vocab_size=VOCAB, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=48,
    init_std=0.3, dtype="float32", rope=RopeConfig(scaling=RopeScaling(original_length=16)),
)  # fmt: skip
PROMPTS = [[5, 9, 2, 44, 7, 31, 8], [3], list(range(20)), [60, 1]]


@functools.cache
def params(tied=False):
    return init_params(CONFIG.model_copy(update={"tied_head": tied}), 0)


@functools.partial(jax.jit, static_argnums=0)
def full_logits(config, weights, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return define(config).bind(weights)(tokens, positions, jnp.ones_like(tokens))


def reference_greedy(prompt, steps, config=CONFIG, weights=None):
    """Without cache, batch or padding of consequence: the whole text again for each token."""
    weights = params() if weights is None else weights
    text = list(prompt)
    for _ in range(steps):
        tokens = np.zeros((1, 64), np.int32)  # causal: what follows the text cannot matter
        tokens[0, : len(text)] = text
        text.append(int(full_logits(config, weights, tokens)[0, len(text) - 1].argmax()))
    return text[len(prompt) :]


def test_cached_logits_equal_the_full_forward_pass():
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 24)).astype(np.int32)
    expected = full_logits(CONFIG, params(), tokens)
    shape = (CONFIG.layers, 2, 32, CONFIG.kv_heads, CONFIG.head_dim)
    # Rubbish in slots that are not written yet must never be seen.
    cache = Cache(jnp.full(shape, 1e3), jnp.full(shape, 1e3))

    @jax.jit
    def run(chunk, begin, cache):
        model = define(CONFIG).bind(params())
        positions = jnp.broadcast_to(begin + jnp.arange(chunk.shape[1]), chunk.shape)
        hidden, cache = model.hidden(chunk, positions, jnp.ones_like(chunk), cache)
        return model.logits(hidden), cache

    logits = []
    for begin, end in [(0, 11), (11, 12), (12, 13), (13, 24)]:
        chunk, cache = run(tokens[:, begin:end], begin, cache)
        logits.append(chunk)
    np.testing.assert_allclose(jnp.concatenate(logits, 1), expected, atol=2e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_greedy_ragged_batch_equals_each_prompt_alone(tied):
    config = CONFIG.model_copy(update={"tied_head": tied})
    got = decoding.generate(config, params(tied), PROMPTS, max_new_tokens=30)
    expected = [reference_greedy(prompt, 30, config, params(tied)) for prompt in PROMPTS]
    assert got == expected
    assert len({tuple(row) for row in got}) == len(PROMPTS)  # the prompts do matter


def test_long_generation_passes_the_bucket():
    (got,) = decoding.generate(CONFIG, params(), [PROMPTS[2]], max_new_tokens=44)
    assert got == reference_greedy(PROMPTS[2], 44)  # 20 + 44 fills the 64 slots to the last
    (more,) = decoding.generate(CONFIG, params(), [PROMPTS[2]], max_new_tokens=50)
    assert more[:44] == got and len(more) == 50


def test_bfloat16_model_generates_what_its_forward_pass_says():
    config = CONFIG.model_copy(update={"dtype": "bfloat16"})
    (got,) = decoding.generate(config, params(), [PROMPTS[0]], max_new_tokens=8)
    text = np.array([PROMPTS[0] + got], np.int32)
    logits = full_logits(config, params(), text)[0, len(PROMPTS[0]) - 1 : -1]
    chosen = np.take_along_axis(np.asarray(logits), np.array(got)[:, None], 1)[:, 0]
    np.testing.assert_allclose(chosen, logits.max(-1), rtol=0.02)  # near-ties may fall either way


def test_sampling_depends_on_seed_row_and_position_only():
    sampled = functools.partial(
        decoding.generate, CONFIG, params(), max_new_tokens=12, temperature=1.0, top_p=0.9
    )
    batch = sampled(PROMPTS, seed=3)
    assert sampled(PROMPTS, seed=3) == batch
    assert sampled(PROMPTS, seed=4) != batch
    neighbours = sampled([PROMPTS[0], [11] * 40, [12], [13]], seed=3)
    assert neighbours[0] == batch[0]
    same = sampled([PROMPTS[0]] * 4, seed=3)
    assert same[0] == batch[0] and len(set(map(tuple, same))) == 4  # rows draw independently
    # Alone and from a prefix it goes on with the same draws: they belong to positions.
    assert sampled([PROMPTS[0] + batch[0][:5]], seed=3)[0][:7] == batch[0][5:]


def test_stop_tokens_end_rows_one_by_one():
    free = decoding.generate(CONFIG, params(), PROMPTS, max_new_tokens=30)
    stop = free[0][4]
    got = decoding.generate(CONFIG, params(), PROMPTS, max_new_tokens=30, stop_tokens=[stop])
    for row, unstopped in zip(got, free, strict=True):
        end = unstopped.index(stop) if stop in unstopped else 30
        assert row == unstopped[:end]
    assert len(got[0]) <= 4
    assert len({len(row) for row in got}) > 1  # some went on


def test_stops_computing_when_every_row_has_stopped(monkeypatch):
    calls = []
    step = decoding._step
    monkeypatch.setattr(decoding, "_step", lambda *a, **k: calls.append(1) or step(*a, **k))
    free = decoding.generate(CONFIG, params(), [[3]], max_new_tokens=6)
    calls.clear()
    decoding.generate(CONFIG, params(), [[3]], max_new_tokens=1000, stop_tokens=[free[0][2]])
    assert len(calls) <= 3


def test_nothing_asked_nothing_given():
    assert decoding.generate(CONFIG, params(), [], max_new_tokens=5) == []
    assert decoding.generate(CONFIG, params(), [[1], [2]], max_new_tokens=0) == [[], []]


def nucleus(logits, temperature, top_p):
    """The reference distribution, in float64 and by the definition."""
    scaled = np.asarray(logits, np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    kept, total = [], 0.0
    for token in np.argsort(-probabilities, kind="stable"):
        kept.append(token)
        total += probabilities[token]
        if total >= top_p:
            break
    result = np.zeros_like(probabilities)
    result[kept] = probabilities[kept] / probabilities[kept].sum()
    return result


@functools.partial(jax.jit, static_argnums=4)
def draws(logits, seed, temperature, top_p, count):
    keys = jax.random.split(jax.random.key(seed), count)
    return jax.vmap(lambda key: decoding.sample(logits, key, temperature, top_p))(keys)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    temperature=st.floats(0.3, 3.0),
    top_p=st.floats(0.05, 0.999),
)
def test_nucleus_is_the_smallest_set_of_enough_probability(seed, temperature, top_p):
    logits = np.random.default_rng(seed).normal(size=12).astype(np.float32) * 2
    expected = nucleus(logits, temperature, top_p)
    tokens = np.asarray(draws(logits, seed, temperature, top_p, 4000))
    frequency = np.bincount(tokens, minlength=12) / 4000
    # A set whose sum is within rounding of top_p may be either; hypothesis does not find one here.
    assert not frequency[expected == 0].any()
    deviation = np.sqrt(expected * (1 - expected) / 4000)
    assert (np.abs(frequency - expected) <= 5 * deviation + 1e-9).all()


def test_top_p_of_one_keeps_every_token():
    logits = np.zeros(VOCAB, np.float32)
    logits[0] = 3.0
    tokens = np.asarray(
        jax.vmap(lambda key: decoding.sample(logits, key, 1.0))(
            jax.random.split(jax.random.key(0), 8000)
        )
    )
    assert set(tokens.tolist()) == set(range(VOCAB))


@pytest.mark.parametrize("temperature", [1e-30, 1e-3])
def test_tiny_temperature_is_greedy(temperature):
    got = decoding.generate(
        CONFIG, params(), PROMPTS, max_new_tokens=5, temperature=temperature, top_p=0.5
    )
    assert got == decoding.generate(CONFIG, params(), PROMPTS, max_new_tokens=5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1], [2, VOCAB]]}, f"prompt 1: token {VOCAB} is outside 0 to {VOCAB - 1}"),
        ({"prompts": [[-1]]}, "prompt 0: token -1 is outside"),
        ({"stop_tokens": [VOCAB]}, f"stop_tokens: token {VOCAB} is outside"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.01}, "top_p=1.01"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
    ],
)
def test_errors_name_the_value(change, message):
    arguments = {"prompts": [[1, 2]], "max_new_tokens": 2} | change
    with pytest.raises(UserError, match=message):
        decoding.generate(CONFIG, params(), **arguments)
