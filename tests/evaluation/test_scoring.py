"""Scores against a float64 reference that sees one request at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import log_probabilities

from llama3_jax.errors import UserError
from llama3_jax.evaluation.scoring import Request, Scorer
from llama3_jax.kernels import cross_entropy
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.definition import init_params
from llama3_jax.parallel.mesh import MeshConfig, make_mesh
from llama3_jax.training.state import stack_stages

MODEL = ModelConfig(
    vocab_size=272, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=64,
    dtype="float32", init_std=0.2,
)  # fmt: skip
LENGTH = 64


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: init_params(MODEL, 3))()


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Ragged: from one token to more than two rows."""
    random = np.random.default_rng()
    sizes = [(1, 1), (1, 5), (40, 25), (60, 1), (3, 2), (100, 30), (17, 9), (1, 128)]
    sizes += [(int(a), int(b)) for a, b in random.integers(1, 24, (20, 2))]
    draw = lambda n: random.integers(0, MODEL.vocab_size, n).astype(np.int32)  # noqa: E731
    return [Request(draw(a), draw(b)) for a, b in sizes]


@pytest.fixture(scope="module")
def expected(params, requests) -> list[tuple[float, bool]]:
    host = jax.tree.map(np.asarray, params)
    results = []
    for context, continuation in requests:
        text = np.concatenate([context, continuation])
        found = log_probabilities(MODEL, host, text[:-1])[-len(continuation) :]
        nll = -found[np.arange(len(continuation)), continuation].sum()
        results.append((nll, bool((found.argmax(-1) == continuation).all())))
    return results


@pytest.mark.parametrize(
    "mesh",
    [
        dict(context=2, tensor=2),
        dict(data=2, pipe=2),
    ],
    ids=["context-tensor", "data-pipe"],
)
def test_ragged_requests_score_as_alone_in_float64(params, requests, expected, mesh):
    config = MeshConfig(**mesh)
    layout = make_mesh(config, jax.devices()[: config.devices])
    on_mesh = jax.jit(lambda p: stack_stages(p, MODEL, layout))(params)
    scores = Scorer(MODEL, on_mesh, layout, batch_tokens=4 * LENGTH).score(requests, LENGTH)
    np.testing.assert_allclose([s.nll for s in scores], [e[0] for e in expected], rtol=2e-5)
    assert [s.greedy for s in scores] == [e[1] for e in expected]


def test_greedy_is_seen_where_it_is_so(params):
    """Continuations that greedy decoding gives, and the same with the last token changed."""
    host = jax.tree.map(np.asarray, params)
    text = [7, 8, 9]
    for _ in range(4):
        text.append(int(log_probabilities(MODEL, host, np.array(text))[-1].argmax()))
    context, right = np.array(text[:3]), np.array(text[3:])
    wrong = np.append(right[:-1], (right[-1] + 1) % MODEL.vocab_size)
    layout = make_mesh(MeshConfig(), jax.devices()[:1])
    found = Scorer(MODEL, params, layout, 128).score(
        [Request(context, right), Request(context, wrong)], LENGTH
    )
    assert [score.greedy for score in found] == [True, False]


def test_chunks_of_logits_change_nothing(monkeypatch):
    random = np.random.default_rng()
    hidden, head = random.normal(size=(3, 50, 16)), random.normal(size=(16, 90))
    hidden, head = hidden.astype(np.float32), head.astype(np.float32)
    targets = random.integers(0, 90, (3, 50))
    mask = random.random((3, 50)) < 0.4
    logits = hidden.astype(np.float64) @ head
    targets = np.where(random.random((3, 50)) < 0.5, logits.argmax(-1), targets)
    normal = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = -np.take_along_axis(normal, targets[..., None], -1)[..., 0]
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * 90 * 7)
    arguments = map(jnp.asarray, (hidden, head, targets, mask))
    found, is_argmax = cross_entropy.linear_scores(*arguments)
    np.testing.assert_allclose(found, np.where(mask, losses, 0), rtol=1e-5, atol=1e-5)
    assert ((logits.argmax(-1) == targets) & mask).tolist() == is_argmax.tolist()


def test_an_empty_context_is_refused(params):
    layout = make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.raises(UserError, match="request 0"):
        Scorer(MODEL, params, layout, 128).score([Request(np.array([]), np.array([1]))], LENGTH)


def test_rows_that_the_memory_does_not_hold_are_refused_before_any_is_made(params, monkeypatch):
    layout = make_mesh(MeshConfig(), jax.devices()[:1])
    scorer = Scorer(MODEL, params, layout, 1)
    scorer.check_memory(LENGTH)
    # 4 heads x 4,194,304 x 4,194,304 scores in float32 are 256 TiB.
    with pytest.raises(
        UserError, match="length 4,194,304: 1 row.* of it take .* GiB of a device wi"
    ):
        scorer.check_memory(1 << 22)


def test_what_is_called_between_batches_may_end_the_scoring(params):
    layout = make_mesh(MeshConfig(), jax.devices()[:1])
    calls = []

    def between():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    requests = [Request(np.array([1, 2]), np.full(LENGTH - 2, 3)) for _ in range(5)]
    with pytest.raises(KeyboardInterrupt):
        Scorer(MODEL, params, layout, LENGTH, between=between).score(requests, LENGTH)
    assert len(calls) == 3
