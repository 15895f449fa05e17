import json

import pytest

from experiments.data_mix import proxy, tables
from llama3_jax.errors import UserError
from llama3_jax.recipe.config import RunConfig
from llama3_jax.scaling.mix_tables import read_mix
from llama3_jax.schema import parse


@pytest.fixture
def folder(tmp_path):
    for name in ("general_arts", "general_science", "math", "code", "multilingual"):
        (tmp_path / name / "train").mkdir(parents=True)
    return tmp_path


def test_the_default_mix_keeps_its_shares_and_down_samples_classes(folder, monkeypatch):
    monkeypatch.setattr(proxy, "_tokens", lambda corpus: 100.0)
    weights = proxy.sources(folder)
    assert sum(weights.values()) == pytest.approx(1)
    assert weights["general_arts"] + weights["general_science"] == pytest.approx(0.5)
    assert weights["general_arts"] == pytest.approx(weights["general_science"] / 2)
    assert weights["math"] == pytest.approx(0.25)


def test_mixes_of_a_sweep_are_valid_configs_and_do_not_depend_on_its_size(folder, monkeypatch):
    monkeypatch.setattr(proxy, "_tokens", lambda corpus: 100.0)
    few, many = (proxy.mixes(proxy.sources(folder), count) for count in (5, 9))
    assert many[:5] == few
    for argument in proxy.sweep(str(folder), 3):
        config = parse(RunConfig, proxy.get_config(argument))
        assert sum(config.stages[0].mix.values()) == pytest.approx(1)


def test_a_corpus_without_a_default_weight_is_refused(folder, monkeypatch):
    monkeypatch.setattr(proxy, "_tokens", lambda corpus: 100.0)
    (folder / "videos" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="videos"):
        proxy.sources(folder)


def test_finished_runs_become_the_tables_that_are_fitted(tmp_path):
    for index, weight in enumerate((0.3, 0.6)):
        run = tmp_path / f"r{index}"
        run.mkdir()
        config = {"stages": [{"mix": {"a": weight, "b": 1 - weight}}],
                  "data": {"sources": {"a": {}, "b": {}, "c": {}}}}  # fmt: skip
        (run / "config.json").write_text(json.dumps(config))
        records = [{"kind": "validation", "losses": {"a": loss, "b": 2.0}} for loss in (9.0, 3.0)]
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    for name, rows in zip(("weights", "losses"), tables.collect(tmp_path), strict=True):
        tables.write_table(tmp_path / f"{name}.csv", rows)
    runs = read_mix(tmp_path / "weights.csv", tmp_path / "losses.csv")
    assert runs.sources == ("a", "b", "c") and runs.targets == ("a", "b")
    assert runs.weights[1].tolist() == pytest.approx([0.6, 0.4, 0.0])
    assert runs.losses[0].tolist() == [3.0, 2.0]
