import math

import pytest

from llama3_jax.errors import UserError
from llama3_jax.model.config import RopeConfig
from llama3_jax.parallel.mesh import MeshConfig
from llama3_jax.recipe.timeline import LearningRate, Stage, Timeline
from llama3_jax.schema import parse

FIRST = dict(
    name="first", tokens=1_000, length=10, batch_tokens=100, mix={"a": 1.0},
    lr=dict(shape="cosine", peak=1.0, end=0.1, warmup_tokens=200),
)  # fmt: skip


def timeline(*stages: dict) -> Timeline:
    parsed = tuple(parse(Stage, stage, "config.stages") for stage in stages)
    return Timeline(parsed, RopeConfig(), MeshConfig())


def test_stages_go_on_from_one_another():
    run = timeline(
        FIRST,
        dict(name="longer", tokens=250, length=50),
        dict(name="wider", tokens=400, batch_tokens=200, mix={"a": 0.5, "b": 0.5}),
        dict(name="scaled", tokens=200, rope=dict(theta=1e6)),
    )
    assert [s.first_step for s in run.stages] == [0, 10, 13, 15]
    assert [s.start_tokens for s in run.stages] == [0, 1000, 1300, 1700]
    assert [(s.length, s.batch_rows) for s in run.stages] == [(10, 10), (50, 2), (50, 4), (50, 4)]
    assert run.stages[1].mix == {"a": 1.0} and run.stages[3].mix == {"a": 0.5, "b": 0.5}
    assert [s.rope.theta for s in run.stages] == [500_000.0] * 3 + [1e6]
    assert (run.steps, run.tokens) == (16, 1900)
    for step in range(run.steps):
        stage = run.stage(step)
        assert stage.first_step <= step < stage.first_step + stage.steps
        assert run.consumed(step + 1) - run.consumed(step) == stage.batch_tokens


def test_cosine_with_warm_up():
    run = timeline(FIRST)
    assert run.learning_rate(0) == 0
    assert run.learning_rate(100) == pytest.approx(0.5)
    assert run.learning_rate(200) == pytest.approx(1.0)
    for tokens in (200, 350, 600, 999):
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * (tokens - 200) / 800)) / 2
        assert run.learning_rate(tokens) == pytest.approx(expected)


def test_a_piece_spans_stages_until_the_next_is_declared():
    run = timeline(
        FIRST,
        dict(name="same piece", tokens=1_000),
        dict(name="annealing", tokens=1_000, lr=dict(shape="linear", end=0.0)),
    )
    assert run.learning_rate(1_100) == pytest.approx(0.55)  # half of the 1,800 after the warm-up
    assert run.learning_rate(2_000) == pytest.approx(0.1)  # goes on where the cosine ended
    assert run.learning_rate(2_500) == pytest.approx(0.05)
    assert run.learning_rate(3_000) == 0


def test_a_cosine_longer_than_its_stages_is_cut_off():
    lr = dict(shape="cosine", peak=1.0, end=0.0, tokens=2_000)
    run = timeline(FIRST | dict(lr=lr), dict(name="hold", tokens=500, lr=dict(shape="constant")))
    assert run.learning_rate(1_000) == pytest.approx(0.5)
    assert run.learning_rate(1_400) == pytest.approx(0.5)


def test_the_rate_of_a_step_is_the_mean_over_its_tokens_on_a_line():
    line = dict(lr=dict(shape="linear", peak=1.0, end=0.0))
    run = timeline(FIRST | line)
    for step in range(run.steps):
        start = run.consumed(step)
        mean = sum(run.learning_rate(start + i + 0.5) for i in range(100)) / 100
        assert run.step_learning_rate(step) == pytest.approx(mean)
    assert run.step_learning_rate(run.steps - 1) > 0


def test_the_405b_schedule_by_tokens():
    """Batch 4M, 8M, 16M at 252M and 2.87T tokens (Llama 3 paper, section 3.4.1)."""
    m = 2**20
    run = timeline(
        dict(name="4M", tokens=252 * 10**6, length=4096, batch_tokens=4 * m, mix={"web": 1.0},
             lr=dict(shape="cosine", peak=8e-5, end=8e-7, warmup_tokens=8000 * 8 * m)),
        dict(name="8M", tokens=2_870 * 10**9 - 252 * 10**6, length=8192, batch_tokens=8 * m),
        dict(name="16M", tokens=12_000 * 10**9, batch_tokens=16 * m),
    )  # fmt: skip
    assert [s.batch_rows for s in run.stages] == [1024, 1024, 2048]
    assert run.tokens == pytest.approx(14.87e12, rel=1e-4)
    assert run.step_learning_rate(run.steps - 1) == pytest.approx(8e-7, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_tokens": 105}, r"stages.0.batch_tokens: 105 is not a multiple of length \(10\)"),
        ({"micro_batch_tokens": 30}, r"100 is not a multiple of micro_batch_tokens \(30\)"),
        ({"length": None}, r"stages.0.length: the first stage must set it"),
        ({"mix": None}, r"stages.0.mix: the first stage must set it"),
        ({"lr": None}, r"stages.0.lr: the first stage must set it"),
        ({"lr": dict(shape="linear", end=0.0)}, r"stages.0.lr.peak: the first"),
        (
            {"lr": dict(shape="constant", peak=1.0, warmup_tokens=5_000)},
            r"lr.warmup_tokens: 5000 is longer than the piece \(1000 tokens\)",
        ),
        ({"mesh": dict(data=3)}, r"10 rows at a time are not divisible by mesh.data \(3\)"),
        ({"lenght": 10}, r"config.stages.lenght: unknown key; nearest valid key: length"),
        ({"lr": dict(shape="cosine", peak=1.0)}, r"config.stages.lr: shape='cosine' needs end"),
        ({"tokens": 0}, r"config.stages.tokens: Input should be greater than 0, got 0"),
    ],
)
def test_what_cannot_be_is_refused_by_key(changes, message):
    with pytest.raises(UserError, match=message):
        timeline(FIRST | changes)


def test_no_stage_and_late_gaps():
    with pytest.raises(UserError, match="at least one stage"):
        timeline()
    with pytest.raises(ValueError, match="no end"):
        LearningRate(shape="constant", peak=1.0, end=0.5)


def test_a_ramp_without_a_micro_batch_takes_whole_batches():
    run = timeline(
        FIRST | dict(micro_batch_tokens=50),
        dict(name="same batch", tokens=100),
        dict(name="bigger", tokens=400, batch_tokens=400),
    )
    assert [s.micro_batches for s in run.stages] == [2, 2, 1]
