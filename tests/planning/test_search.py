"""The layouts that a search looks at, and in which order it returns them."""

import numpy as np
import pytest

from llama3_jax.errors import UserError
from llama3_jax.model.config import preset
from llama3_jax.model.definition import define
from llama3_jax.parallel.mesh import MeshConfig
from llama3_jax.parallel.schedule import in_flight, in_flight_limits
from llama3_jax.parallel.sharding import check_batch, check_divisible
from llama3_jax.planning.case import Case
from llama3_jax.planning.constants import load_constants
from llama3_jax.planning.search import enumerate_cases, search
from llama3_jax.training.optimizer import OptimizerConfig


def case(model: str, rows: int, length: int) -> Case:
    model = preset(model, attention="chunked")
    return Case("x", model, OptimizerConfig(), MeshConfig(), rows, length, 1, 100)


class Layout:
    """What the checks of a layout read, without devices."""

    def __init__(self, config: MeshConfig):
        self.config, self.shape = config, config.shape


def test_every_layout_is_one_that_training_would_take():
    found = enumerate_cases(case("8B", 64, 16_384), 32)
    assert len({(c.mesh, c.micro_batches, c.model.remat) for c in found}) == len(found)
    axes, shapes = define(found[0].model).axes(), define(found[0].model).abstract_params()
    for mesh in {c.mesh for c in found}:
        assert mesh.devices == 32
        check_divisible(axes, shapes, Layout(mesh))
    for c in found:
        check_batch(c.rows, c.length, c.micro_batches, c.mesh)
    for axis in ("data", "pipe", "context", "tensor"):
        assert any(getattr(c.mesh, axis) > 1 for c in found)


def test_what_fits_comes_quickest_first():
    constants = load_constants()
    fitting, looked_at = search(case("8B", 64, 8192), 16, constants)
    seconds = [candidate.cost.seconds for candidate in fitting]
    assert seconds[:50] == sorted(seconds[:50]) and len(fitting) < looked_at
    assert seconds[50:] == sorted(seconds[50:])
    assert max(candidate.memory.total for candidate in fitting) < constants.memory


def test_too_few_gpus_and_no_layout_are_refused():
    constants = load_constants()
    with pytest.raises(UserError, match="none of .* layouts fits; the smallest needs .* GiB"):
        search(case("405B", 8, 8192), 8, constants)
    with pytest.raises(UserError, match="--gpus=35: no layout divides"):
        search(case("8B", 8, 8192), 35, constants)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved"])
def test_chunks_in_flight_are_the_schedules(schedule):
    random = np.random.default_rng(0)
    for _ in range(20):
        pipe, micro = int(random.integers(2, 7)), int(random.integers(1, 17))
        virtual = int(random.integers(1, 4)) if schedule == "interleaved" else 1
        contiguous = int(random.integers(1, 9)) if virtual > 1 else None
        mesh = MeshConfig(
            pipe=pipe, schedule=schedule, virtual_stages=virtual, contiguous=contiguous
        )
        planned = case("8B", micro, 8192)._replace(mesh=mesh, micro_batches=micro)
        # The forecast is the schedule's limit; the ranks may stay below it.
        assert max(in_flight(planned.schedule)) <= max(in_flight_limits(mesh, micro))
