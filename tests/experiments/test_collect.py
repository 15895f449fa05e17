import json

import pytest

from experiments.scaling_laws import collect, isoflop
from llama3_jax.errors import UserError
from llama3_jax.recipe.config import RunConfig
from llama3_jax.recipe.timeline import Timeline
from llama3_jax.schema import parse


def made_run(workdir, argument, finished=True):
    config = parse(RunConfig, isoflop.get_config(argument))
    timeline = Timeline(config.stages, config.model.rope, config.mesh)
    run = workdir / argument
    run.mkdir()
    (run / "config.json").write_text(config.model_dump_json())
    step = timeline.steps if finished else timeline.steps - 1
    losses = dict(general=3.0, math=2.0, code=1.0, multilingual=4.0)
    records = [
        dict(kind="train", step=10, tokens=1000, learning_rate=3e-4),
        dict(kind="validation", step=10, tokens=1000, losses=dict.fromkeys(losses, 9.0)),
        dict(kind="train", step=step, tokens=timeline.consumed(step), learning_rate=1e-5),
        dict(kind="validation", step=step, tokens=timeline.consumed(step), losses=losses),
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return run


def test_a_runs_record_holds_what_it_was_and_reached(tmp_path):
    found = collect.record(made_run(tmp_path, "6e18,124M"))
    assert found["flops"] == 6e18
    assert found["flops_6nd"] == pytest.approx(6e18, rel=0.01)
    assert found["flops_6nd"] < found["flops_matmul"] < found["flops_causal"]
    assert found["params"] < found["params_with_embeddings"]
    # 50/25/17/8
    assert found["loss"] == pytest.approx(0.5 * 3 + 0.25 * 2 + 0.17 * 1 + 0.08 * 4)
    assert [tokens for tokens, _ in found["learning_curve"]] == [1000, found["tokens"]]
    assert (found["learning_rate"], found["seed"]) == (3e-4, 0)
    assert set(collect.COLUMNS) <= set(found)


def test_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="not finished"):
        collect.record(made_run(tmp_path, "6e18,124M", finished=False))
