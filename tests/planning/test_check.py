"""`--check`: the production timelines, on a machine without GPU or data."""

import re

import pytest

from experiments.production import llama3_8b, llama3_70b, llama3_405b
from llama3_jax.errors import UserError
from llama3_jax.model.definition import define
from llama3_jax.planning.case import cases_of
from llama3_jax.planning.check import check_run
from llama3_jax.planning.constants import load_constants
from llama3_jax.planning.memory import forecast
from llama3_jax.recipe.config import RunConfig
from llama3_jax.recipe.prepare import lay_out
from llama3_jax.schema import parse


@pytest.mark.parametrize("file", [llama3_8b, llama3_70b, llama3_405b], ids=["8B", "70B", "405B"])
def test_three_stages_whole(file):
    config = parse(RunConfig, file.get_config())
    timeline = lay_out(config)
    stages = timeline.stages
    # Llama 3 paper, section 3.4.
    assert timeline.tokens == pytest.approx(15.6e12, rel=1e-4)
    assert (stages[0].length, stages[0].batch_tokens) == (4096, 2**22)
    assert timeline.consumed(stages[1].first_step) == pytest.approx(252e6, rel=0.02)
    assert (stages[1].length, stages[1].batch_tokens) == (8192, 2**23)
    assert timeline.consumed(stages[2].first_step) == pytest.approx(2.87e12, rel=1e-5)
    assert (stages[2].length, stages[2].batch_tokens) == (8192, 2**24)
    gated = [stage for stage in stages if stage.gate]
    assert [s.length for s in gated] == [12_288, 20_480, 32_768, 53_248, 81_920, 131_072]
    assert sum(s.tokens for s in gated) == pytest.approx(800e9, rel=1e-3)
    assert all(abs(s.batch_tokens / 2**24 - 1) < 0.07 for s in stages[2:])
    assert len({tuple(s.mix.items()) for s in stages}) == 5
    assert timeline.learning_rate(timeline.tokens) == 0
    assert stages[-1].average.checkpoints > 1 and stages[-1].length == 131_072
    devices = {stage.mesh.devices for stage in stages}
    assert len(devices) == 1  # one job crosses all
    memory = load_constants().memory
    assert all(forecast(case).total < memory for case in cases_of(config))


def test_the_405b_timeline_takes_the_papers_flops():
    config = parse(RunConfig, llama3_405b.get_config())
    tokens = lay_out(config).tokens
    assert 6 * define(config.model).parameter_count() * tokens == pytest.approx(3.8e25, rel=0.01)
    # Linear warm-up of 8,000 steps to 8e-5.
    timeline = lay_out(config)
    assert timeline.step_learning_rate(8_000) == pytest.approx(8e-5, rel=1e-3)
    assert timeline.step_learning_rate(4_000) == pytest.approx(4e-5, rel=0.02)


def test_the_table(capsys):
    check_run(parse(RunConfig, llama3_405b.get_config()), load_constants())
    out = capsys.readouterr().out
    for text in ("long 131,072", "gate, to", "averages 10", "code 0.17", "checked without data",
                 "3.8e+25 FLOPs", "days of H100s"):  # fmt: skip
        assert text in out
    days = re.findall(r"(\d+\.\d+) *│$", out, flags=re.M)
    total = float(re.search(r"([\d.]+) days of H100s", out)[1])
    assert len(days) == 13 and sum(map(float, days)) == pytest.approx(total, abs=0.1)


def test_a_stage_that_does_not_fit_is_named():
    values = llama3_8b.get_config()
    values.stages[1].micro_batch_tokens = 512 * 8 * 8192
    values.stages[1].batch_tokens = 512 * 8 * 8192
    with pytest.raises(UserError, match=r"stage 'initial 2' needs \d+\.\d GiB of a GPU's 72"):
        check_run(parse(RunConfig, values), load_constants())
