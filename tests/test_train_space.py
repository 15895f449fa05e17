"""The space that a run's checkpoints need, as it is asked for before the first step."""

import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from llama3_jax.errors import UserError
from llama3_jax.model.config import RopeConfig
from llama3_jax.parallel.mesh import MeshConfig
from llama3_jax.recipe.config import CheckpointConfig
from llama3_jax.recipe.space import check_space
from llama3_jax.recipe.timeline import Average, LearningRate, Stage, Timeline
from llama3_jax.training.state import TrainState

MEGABYTE = jax.ShapeDtypeStruct((250_000,), jnp.float32)
STATE = TrainState({"w": MEGABYTE}, [MEGABYTE, MEGABYTE])


def run(average=None, **policy):
    """100 steps."""
    stage = Stage(name="one", tokens=1000, length=10, batch_tokens=10, mix={"a": 1.0},
                  lr=LearningRate(shape="constant", peak=1e-3), average=average)  # fmt: skip
    timeline = Timeline((stage,), RopeConfig(), MeshConfig())
    checkpoint = CheckpointConfig(every_steps=4, **policy)
    return SimpleNamespace(config=SimpleNamespace(checkpoint=checkpoint), timeline=timeline)


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        (run(keep_last=2), 9),
        # 20, 40, 60, 80 and 100 for good, of which 100 is among the newest three: 92, 96, 100.
        (run(keep_last=2, keep_every=10), 21),
        # The average is in those of 25 and later, and alone at the end.
        (run(keep_last=2, average=Average(checkpoints=4)), 9 + 3 + 1),
        (run(keep_last=2, keep_every=10, average=Average(checkpoints=4)), 21 + 6 + 1),
    ],
)
def test_what_is_kept_for_good_and_the_average_count(tmp_path, monkeypatch, given, needed):
    usage = shutil.disk_usage(tmp_path)
    free = lambda megabytes: monkeypatch.setattr(  # noqa: E731
        shutil, "disk_usage", lambda _: usage._replace(free=int(megabytes * 1e6))
    )
    free(needed)
    check_space(tmp_path, STATE, given)
    free(needed - 0.1)
    with pytest.raises(UserError, match=f"checkpoints need {needed}.0 MB"):
        check_space(tmp_path, STATE, given)
    # What is there already counts.
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/file").write_bytes(bytes(100_000))
    check_space(tmp_path, STATE, given)


def test_one_process_looks_at_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: pytest.fail("it looked"))
    check_space(tmp_path, STATE, run())
