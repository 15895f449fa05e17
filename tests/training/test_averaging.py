"""Averages against the plain float64 mean."""

import jax
import numpy as np
import pytest

from llama3_jax.errors import UserError
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.definition import init_params
from llama3_jax.training.averaging import RunningAverage, average_models
from llama3_jax.training.checkpoint import load_model, save_model

MODEL = ModelConfig(
    vocab_size=40, dim=8, layers=1, heads=2, kv_heads=1, head_dim=4, ffn_dim=8, dtype="float32"
)


def random_params(count: int):
    seeds = np.random.default_rng().integers(0, 2**30, count)
    return [init_params(MODEL, int(seed)) for seed in seeds]


def check(found, models, weights):
    for leaf, *leaves in zip(*map(jax.tree.leaves, (found, *models)), strict=True):
        stacked = np.stack([np.asarray(x, np.float64) for x in leaves])
        expected = np.average(stacked, axis=0, weights=weights)
        np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weights", [(1.0,) * 5, (1.0, 2.0, 0.0, 4.0, 0.5)], ids=["equal", "other"])
def test_the_running_average_is_the_weighted_mean(weights):
    models = random_params(5)
    average = RunningAverage(weights)
    for number, params in enumerate(models):
        if number == 2:  # as a resume does
            average = RunningAverage(weights, average.seen, average.params)
        average.add(params)
    check(average.params, models, weights)


def test_it_keeps_a_copy_of_what_the_step_donates():
    (params,) = random_params(1)
    kept = jax.tree.map(np.array, params)
    average = RunningAverage((1.0, 1.0))
    average.add(params)
    jax.jit(lambda p: jax.tree.map(lambda x: x * 0, p), donate_argnums=0)(params)
    check(average.params, [kept], [1.0])


def test_the_average_of_model_folders(tmp_path, command):
    models = random_params(3)
    for number, params in enumerate(models):
        save_model(tmp_path / str(number), MODEL, params, "t")
    paths = [tmp_path / str(number) for number in range(3)]
    check(average_models(paths, None).params, models, [1, 1, 1])
    where = [f"--from={path}" for path in paths]
    made = command("convert", "average", *where, "--weights=1,0,3", f"--to={tmp_path}/mean")
    assert made.returncode == 0, made.stderr
    loaded = load_model(tmp_path / "mean")
    check(loaded.params, models, [1, 0, 3])
    assert loaded.tokenizer == "t"
    again = command("convert", "average", *where, f"--to={tmp_path}/mean")
    assert again.returncode == 2 and "--overwrite" in again.stderr
    save_model(tmp_path / "other", MODEL.model_copy(update={"layers": 1}), models[0], "u")
    with pytest.raises(UserError, match="of another tokenizer"):
        average_models([*paths, tmp_path / "other"], None)
    with pytest.raises(UserError, match="2 weights for 3"):
        average_models(paths, [1.0, 2.0])
