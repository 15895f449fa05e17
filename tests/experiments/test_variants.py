"""experiments/variants: each trains on a mesh as on one device, stops, and goes on."""

import importlib

import jax
import numpy as np
import pytest

from experiments.variants import lora
from llama3_jax.data.tokenizer import Tokenizer
from llama3_jax.errors import UserError
from llama3_jax.model import hf
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.definition import define, init_params
from llama3_jax.parallel.mesh import MeshConfig, make_mesh
from llama3_jax.parallel.sharding import put_batch
from llama3_jax.recipe.config import RunConfig
from llama3_jax.recipe.prepare import prepare
from llama3_jax.schema import parse
from llama3_jax.train import train
from llama3_jax.training.checkpoint import save_model
from llama3_jax.training.loading import load
from llama3_jax.training.metrics import read_metrics
from llama3_jax.training.optimizer import OptimizerConfig
from llama3_jax.training.state import init_state, relayout
from llama3_jax.training.step import compile_step
from tests.training.test_step import make_batch

VARIANTS = ("qk_norm", "sliding_window", "z_loss", "muon", "lora")
SHAPE = dict(
    vocab_size=272, dim=32, layers=4, heads=4, kv_heads=2, head_dim=8, ffn_dim=64, dtype="float32",
    init_std=0.1,
)  # fmt: skip
OWN = ("attention_module", "model_module", "options")


def changes(name: str) -> tuple[dict, dict]:
    """What the variant's config changes of model and optimizer."""
    config = importlib.import_module(f"experiments.variants.{name}").get_config()
    model = {key: config.model.to_dict()[key] for key in OWN}
    if name == "sliding_window":
        model["options"] = dict(window=5, period=2)  # rows are short here
    return model, dict(name=config.optimizer.name)


def three_steps(model: ModelConfig, optimizer: OptimizerConfig, mesh: MeshConfig, micro: int):
    layout = make_mesh(mesh, jax.devices()[: mesh.devices])
    state = init_state(model, optimizer, layout, 0)
    step = compile_step(model, optimizer, layout, micro, 2, statistics=True)
    for seed in range(3):
        batch = put_batch(make_batch(seed=seed), layout)
        state, metrics = step(state, batch, np.float32(1e-2))
    return jax.device_get(relayout(state.params, model, layout, None)), jax.device_get(metrics)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in ("muon", "lora") else ()) for n in VARIANTS],
)
def test_a_variant_is_the_same_on_a_mesh(name):
    own, of_optimizer = changes(name)
    model, optimizer = ModelConfig(**SHAPE | own), OptimizerConfig(**of_optimizer)
    one, one_metrics = three_steps(model, optimizer, MeshConfig(), 1)
    many, metrics = three_steps(model, optimizer, MeshConfig(data=2, pipe=2, tensor=2), 2)
    for key in ("loss", "auxiliary_loss", "grad_norm"):
        assert getattr(metrics, key) == pytest.approx(getattr(one_metrics, key), rel=1e-4), key
    assert (metrics.auxiliary_loss > 0) == (name == "z_loss")
    # Adam's first steps divide by gradients that may be as small as rounding: not one by one.
    for ours, expected in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        assert np.linalg.norm(ours - expected) <= 1e-3 * np.linalg.norm(expected)
    assert metrics.statistics.keys() == one_metrics.statistics.keys()
    for key, found in metrics.statistics.items():
        expected = one_metrics.statistics[key]
        assert found.rms.shape == (4,)
        scale = max(expected.largest.max(), 1e-9)
        np.testing.assert_allclose(found.rms / scale, expected.rms / scale, atol=1e-4, err_msg=key)


def run_config(corpora, own: dict, of_optimizer: dict, steps: int, **values) -> RunConfig:
    sources = {"a": dict(train=f"{corpora}/a/train")}
    stage = dict(
        name="only", tokens=steps * 256, length=32, batch_tokens=256, mix=dict(a=1.0),
        lr=dict(shape="constant", peak=3e-3),
    )  # fmt: skip
    return parse(RunConfig, dict(
        model=SHAPE | own, optimizer=of_optimizer, data=dict(sources=sources), stages=[stage],
        checkpoint=dict(every_steps=2), mesh=dict(data=2, pipe=2, tensor=2), **values,
    ))  # fmt: skip


def losses(workdir) -> list[float]:
    return [record["loss"] for record in read_metrics(workdir) if record["kind"] == "train"]


@pytest.mark.parametrize("name", ["qk_norm", "muon"])
def test_a_variant_stops_and_goes_on(name, corpora, tmp_path):
    own, of_optimizer = changes(name)
    for workdir, lengths in (("whole", (4,)), ("parts", (2, 4))):
        for steps in lengths:
            run = prepare(run_config(corpora, own, of_optimizer, steps))
            assert train(run, tmp_path / workdir) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole, parts = (load(tmp_path / workdir) for workdir in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, parts.params, whole.params)


def test_lora_starts_from_weights_and_leaves_them(corpora, tmp_path):
    base, own, of_optimizer = ModelConfig(**SHAPE), *changes("lora")
    tokenizer = Tokenizer({bytes([byte]): byte for byte in range(256)}, specials=16)
    params = init_params(base, 3)
    save_model(tmp_path / "base", base, params, tokenizer.fingerprint)
    hf.save(tmp_path / "hf", base, params, "float32")
    for source in ("base", "hf"):
        values = dict(init_from=str(tmp_path / source), init_anew=lora.NEW)
        run = prepare(run_config(corpora, own, of_optimizer, 2, **values))
        assert train(run, tmp_path / f"from {source}") == 0
        trained = load(tmp_path / f"from {source}").params
        attention = trained["blocks"]["attention"]
        new = {name: attention.pop(name) for name in lora.NEW}
        jax.tree.map(np.testing.assert_array_equal, trained, params)
        assert all(np.abs(new[name]).max() > 0 for name in lora.NEW)
    config = run_config(corpora, own, of_optimizer, 2, init_from=str(tmp_path / "base"))
    with pytest.raises(UserError, match=r"lacks the model's parameter .*config.init_anew"):
        train(prepare(config), tmp_path / "missing")


def test_what_cannot_be_converted_is_refused(tmp_path):
    model = ModelConfig(**SHAPE | changes("qk_norm")[0])
    with pytest.raises(UserError, match="attention_module=.* has no place in Hugging Face"):
        hf.save(tmp_path / "hf", model, init_params(model, 0))
    assert define(model).parameter_count() == define(ModelConfig(**SHAPE)).parameter_count() + 64
