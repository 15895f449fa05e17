"""The demo's mix sweep and probe: their tables and configs. The runs themselves take minutes."""

import pytest

from experiments.annealing.probe import CONTROL
from experiments.demo import mix, probe
from experiments.demo.train import MIX, SOURCES
from llama3_jax.errors import UserError
from llama3_jax.recipe.config import RunConfig
from llama3_jax.scaling.mix_tables import read_mix
from llama3_jax.schema import parse


def test_a_quarter_of_the_runs_is_kept_apart_and_read_back(tmp_path):
    rows = [
        dict(
            run=i, weights={"code": i / 8, "math": 1 - i / 8}, losses={"code": 9.0 - i, "math": 1.0}
        )
        for i in range(8)
    ]
    mix.write_tables(tmp_path, rows)
    fitted = read_mix(tmp_path / "weights.csv", tmp_path / "losses.csv")
    test = read_mix(tmp_path / "test_weights.csv", tmp_path / "test_losses.csv")
    assert (len(fitted.weights), len(test.weights)) == (6, 2)
    assert test.losses[:, test.targets.index("code")].tolist() == [3.0, 2.0]


def test_a_mix_without_a_source_trains_on_the_others(monkeypatch):
    seen = []
    monkeypatch.setattr(mix, "prepare", lambda config: config)
    monkeypatch.setattr(mix, "train_small", lambda config: seen.append(config) or {})
    mix.run_mix("runs/demo", MIX | {"code": 0.0})
    (stage,) = seen[0].stages
    assert set(stage.mix) == {*SOURCES} - {"code"}
    assert stage.tokens <= mix.TOKENS


def test_the_base_ends_at_a_rate_that_can_be_annealed():
    config = parse(RunConfig, probe.get_config("runs/demo,base,0"))
    assert config.stages[0].lr.shape == "constant"
    assert {arm for arm, _ in probe.arms()} == {CONTROL, *SOURCES}


def test_without_a_base_the_arms_say_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="probe_base.*holds no checkpoint"):
        probe.get_config(f"{tmp_path},code,0")
