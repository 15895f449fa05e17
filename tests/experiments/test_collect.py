import json
import shutil
import subprocess
import sys

import pytest
from conftest import REPOSITORY

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


@pytest.fixture
def program_module():
    def run(*arguments):
        command = [sys.executable, "-m", "experiments.scaling_laws.collect", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)

    return run


def test_a_runs_record_holds_what_it_was_and_reached(tmp_path):
    (found,) = collect.weigh([collect.record(made_run(tmp_path, "6e18,124M"))], None)
    assert found["flops"] == 6e18
    assert found["flops_6nd"] == pytest.approx(6e18, rel=0.01)
    assert found["flops_6nd"] < found["flops_matmul"] < found["flops_causal"]
    assert found["params"] < found["params_with_embeddings"]
    # 50/25/17/8
    assert found["loss"] == pytest.approx(0.5 * 3 + 0.25 * 2 + 0.17 * 1 + 0.08 * 4)
    assert [tokens for tokens, _ in found["learning_curve"]] == [1000, found["tokens"]]
    assert (found["learning_rate"], found["seed"]) == (3e-4, 0)
    assert set(collect.COLUMNS) <= set(found)


def test_unfinished_runs_are_named_and_the_others_collected(tmp_path, program_module):
    made_run(tmp_path, "6e18,124M")
    made_run(tmp_path, "6e18,227M", finished=False)
    (tmp_path / "6e18,272M").mkdir()
    (tmp_path / "6e18,272M/config.json").write_text("{}")
    done = program_module(f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "left out, not finished: 6e18,227M (step" in done.stdout
    assert "; 6e18,272M (not begun)" in done.stdout
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 2
    shutil.rmtree(tmp_path / "6e18,124M")
    done = program_module(f"--workdir={tmp_path}")
    assert done.returncode == 2 and "no finished runs" in done.stderr


def test_all_runs_are_weighed_by_one_mix():
    run = dict(label="a", mix=dict(web=0.5, code=0.5, old=0.0), losses=dict(web=2.0, code=1.0))
    same = [run, run | dict(label="b", losses=dict(web=3.0, code=2.0, more=9.0))]
    assert [r["loss"] for r in collect.weigh(same, None)] == [1.5, 2.5]
    other = [run, run | dict(label="b", mix=dict(web=0.9, code=0.1))]
    with pytest.raises(UserError, match="mixes differ.*--mix=NAME=WEIGHT"):
        collect.weigh(other, None)
    assert [r["loss"] for r in collect.weigh(other, dict(web=3, code=1))] == [1.75, 1.75]
    with pytest.raises(UserError, match="a: no held-out loss of more; .*of web, code"):
        collect.weigh(same, dict(web=1, more=1))
    assert collect.read_mix(["web=3", "code=1"]) == dict(web=3, code=1)
    for wrong in (["web"], ["web=x"], ["web=0"], ["web=1=2"], ["web=nan"]):
        with pytest.raises(UserError, match="--mix=web.*NAME=WEIGHT,… is expected"):
            collect.read_mix(wrong)
