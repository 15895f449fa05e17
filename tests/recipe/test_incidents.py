"""A rewind, carried out on checkpoints of a few numbers."""

import numpy as np
import pytest

from llama3_jax.errors import UserError
from llama3_jax.recipe.config import RunConfig
from llama3_jax.recipe.incidents import Incidents
from llama3_jax.recipe.prepare import prepare
from llama3_jax.schema import parse
from llama3_jax.training.checkpoint import Checkpoints
from llama3_jax.training.events import Events


@pytest.fixture
def run(corpora):
    return prepare(parse(RunConfig, dict(
        model=dict(dim=8, layers=1, heads=2, kv_heads=1, head_dim=4, ffn_dim=16, vocab_size=272),
        data=dict(sources=dict(a=dict(train=str(corpora / "a" / "train")))),
        stages=[dict(name="one", tokens=150 * 128, length=32, batch_tokens=128, mix={"a": 1.0},
                     lr=dict(shape="constant", peak=1e-3))],
        checkpoint=dict(every_steps=10, keep_last=2),
        health=dict(loss_spike="rewind", rewind_steps=2),
    )))  # fmt: skip


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        tree = {"w": np.full(3, step, np.float32)}
        checkpoints.save(step, tree, tree, {"step": step})
    checkpoints.close()


def spike(step: int) -> dict:
    return {"kinds": ["loss_spike"], "action": "rewind", "stage": "one", "step": step, "batch": step,
            "loss": 9.0, "grad_norm": 1.0, "loss_band": None, "grad_norm_band": None}  # fmt: skip


def test_a_second_spike_right_after_a_rewind_never_takes_the_last_checkpoint(run, tmp_path):
    """Two checkpoints are kept: the first rewind leaves one, which is too young for the second."""
    checkpoints, events = Checkpoints(tmp_path / "checkpoints", 2, None), Events(tmp_path, True)
    save(checkpoints, 80, 90, 100)
    incidents = Incidents(run, events)
    incidents.rewind_from = spike(101)
    assert incidents.rewind(checkpoints) == 90 and checkpoints.steps() == [90]
    assert events.left_out() == {0: list(range(90, 102))}
    assert (tmp_path / "rewound_checkpoints/100-0/params").is_dir()

    incidents = Incidents(run, events)
    incidents.rewind_from = spike(91)
    message = (
        "step 91: loss spike: rewinding; .*, but .*/checkpoints: no checkpoint of step 89 or before, "
        r"the oldest is of step 90: lower config.health.rewind_steps \(2\) or keep more checkpoints"
    )
    with pytest.raises(UserError, match=message):
        incidents.rewind(checkpoints)
    assert checkpoints.steps() == [90] and len(events.events) == 1
