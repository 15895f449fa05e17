"""The ladder's fit, what the main model takes from it, and the report's section."""

import json

import numpy as np
import pytest

from experiments.demo import ladder
from experiments.demo.train import MIX, RECALL, RECALL_TOKENS, get_config, main_shape
from llama3_jax.model.definition import define
from llama3_jax.recipe.config import RunConfig
from llama3_jax.recipe.timeline import Timeline
from llama3_jax.scaling.surface import Surface
from llama3_jax.schema import parse

# Optimum of the ladder's budgets in the middle of its sizes.
TRUTH = Surface(E=2.0, A=400.0, B=900.0, alpha=0.5, beta=0.5)


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    made = []
    for size in ladder.SIZES:
        for budget in ladder.BUDGETS:
            params = define(main_shape(*size)).matmul_parameters()
            tokens = budget / 6 / params
            loss = TRUTH.loss(params, tokens) * np.exp(0.002 * rng.normal())
            made.append(dict(flops=budget, tokens=tokens, params=params, loss=loss,
                             label=f"{size} {budget}"))  # fmt: skip
    return made


def test_the_plan_forecasts_the_loss_of_what_it_chose(rows):
    made = ladder.plan(rows)
    low, high = made["loss_ci"]
    assert low < made["loss"] < high
    assert low <= TRUTH.loss(made["params"], made["tokens"]) <= high
    assert (made["layers"], made["dim"]) in ladder.MAIN_SIZES
    assert ladder.MAIN_TOKENS[0] <= made["tokens"] <= ladder.MAIN_TOKENS[1]
    assert made["params"] == define(main_shape(made["layers"], made["dim"])).matmul_parameters()


def test_the_main_run_takes_size_and_tokens_from_the_plan(tmp_path, rows):
    (tmp_path / "ladder").mkdir()
    plan = dict(layers=5, dim=160, tokens=1_500_000)
    (tmp_path / "ladder" / "plan.json").write_text(json.dumps(plan))
    config = parse(RunConfig, get_config(str(tmp_path)))
    assert (config.model.layers, config.model.dim) == (5, 160)
    timeline = Timeline(config.stages, config.model.rope, config.mesh)
    # The key-value documents come on top.
    expected = 1_500_000 / (1 - RECALL) + RECALL_TOKENS
    assert timeline.tokens == pytest.approx(expected, rel=0.01)


def test_the_report_shows_forecast_and_outcome(tmp_path, rows):
    folder = tmp_path / "ladder"
    folder.mkdir()
    lines = [",".join(ladder.COLUMNS), *(",".join(str(r[c]).replace(",", ";") for c in ladder.COLUMNS)
                                         for r in rows)]  # fmt: skip
    (folder / ladder.RUNS_FILE).write_text("\n".join(lines) + "\n")
    made = ladder.plan(rows)
    (folder / ladder.PLAN_FILE).write_text(json.dumps(made))
    record = {"kind": "validation", "losses": {name: made["loss"] for name in MIX}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    html = ladder.section(tmp_path).html
    assert f"{made['loss']:.3f} (inside)" in html
    (folder / ladder.PLAN_FILE).write_text(json.dumps(made | {"loss": None}))
    assert "supports no forecast" in ladder.section(tmp_path).html
