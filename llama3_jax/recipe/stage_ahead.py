"""The next stage, made ready while the one before it trains: its compiled step and its loader.

Neither changes what is computed: the step is the same program, and the batches are a function of
the timeline. Where a gate's verdict changed the timeline, the loader is closed and another opened.
"""

import functools
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import NamedSharding

from llama3_jax.parallel.mesh import Layout
from llama3_jax.parallel.processes import local_rows
from llama3_jax.parallel.sharding import batch_spec
from llama3_jax.recipe.prepare import Run, stage_model
from llama3_jax.training.state import abstract_state
from llama3_jax.training.step import NO_LIMITS, compile_step

# Steps before a stage's end: hours of a large model's, and enough to fill a loader's buffer.
COMPILE_STEPS, LOADER_STEPS = 1_000, 20


def step_arguments(
    run: Run, index: int, layout: Layout, batch: Mapping[str, np.ndarray], statistics: bool = False
) -> tuple:
    """Of `compiled_step`, for a stage; `batch` is one of any stage."""
    config, stage = run.config, run.timeline.stages[index]
    shape = stage.batch_rows, stage.length
    shapes = tuple((name, shape[: array.ndim], array.dtype) for name, array in batch.items())
    model, sources = stage_model(config, stage), len(run.batches.sources)
    own = config.optimizer, layout, stage.micro_batches, sources, config.xla
    return model, *own, shapes, statistics


@functools.cache
def compiled_step(model, optimizer, layout, micro_batches, sources, xla, shapes, statistics):
    """The train step (see `compile_step`) as an executable for batches of `shapes`: of each array
    name, shape and dtype. Compiled once a process; allocates no arrays."""
    step = compile_step(model, optimizer, layout, micro_batches, sources, xla, statistics)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape, dtype in shapes}
    batch = {
        name: x.update(sharding=NamedSharding(layout.mesh, batch_spec(x, layout)))
        for name, x in batch.items()
    }
    state = abstract_state(model, optimizer, layout)
    return step.lower(state, batch, np.float32(0), NO_LIMITS).compile()


def open_loader(run: Run, index: int, first_step: int, layout: Layout):
    """This process's batches of a stage, from its step `first_step` on."""
    host, hosts = local_rows(layout.mesh)
    workers = run.config.data.workers
    return run.batches.load(index, first_step, host=host, hosts=hosts, workers=workers)


class StageAhead:
    """What is ready of the stage after the one that trains."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "next-stage")
        self._compiling: tuple[int, Future] | None = None
        self._loader: tuple[list, Any] | None = None

    def prepare(self, run: Run, layouts: list[Layout], step: int, batch: Mapping) -> None:
        """Called after each step: begins what it is time for."""
        stages = run.timeline.stages
        index = run.timeline.stage_index(step - 1) + 1
        if index == len(stages):
            return
        left = stages[index].first_step - step
        begun = self._compiling is not None and self._compiling[0] == index
        if left <= COMPILE_STEPS and not begun and run.config.xla.compile_ahead:
            for statistics in (False, True) if run.config.statistics.every_steps else (False,):
                arguments = step_arguments(run, index, layouts[index], batch, statistics)
                future = self._pool.submit(compiled_step, *arguments)
                self._compiling = index, self._compiling[1] if statistics else future
        if 0 < left <= LOADER_STEPS and self._loader is None:
            loader = open_loader(run, index, 0, layouts[index])
            loader.start_prefetch()
            self._loader = run.batches.stages[: index + 1], loader

    def compiled_step(self, *arguments) -> jax.stages.Compiled:
        """As the function of that name, after waiting for the thread."""
        if self._compiling is not None and (error := self._compiling[1].exception()):
            # It need not fail again: beside a step, a device may have been short of memory.
            logging.warning("compiling the next stage failed, and is tried again: %s", error)
        return compiled_step(*arguments)

    def loader(self, run: Run, index: int, first_step: int, layout: Layout):
        """As `open_loader`; the one that is open if its batches are the same."""
        found, self._loader = self._loader, None
        if found is not None:
            shapes, loader = found
            # What a stage reads depends on its shape and on those of the stages before it.
            if first_step == 0 and shapes == run.batches.stages[: index + 1]:
                return loader
            loader.close()
        return open_loader(run, index, first_step, layout)

    def close(self) -> None:
        if self._loader is not None:
            self._loader[1].close()
        self._pool.shutdown(wait=False, cancel_futures=True)
