"""The next stage, made ready while the one before it trains: its compiled step and its loader.

Neither changes what is computed: the step is the same program, and the batches are a function of
the timeline. Where a gate's verdict changed the timeline, the loader is closed and another opened.
"""

import functools
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.sharding import NamedSharding

from llama3_jax.model.config import ModelConfig
from llama3_jax.parallel.mesh import Layout
from llama3_jax.parallel.processes import local_rows
from llama3_jax.parallel.sharding import batch_spec
from llama3_jax.recipe.prepare import Run, stage_model
from llama3_jax.training.optimizer import OptimizerConfig
from llama3_jax.training.step import NO_LIMITS, abstract_state, compile_step
from llama3_jax.xla import XlaConfig

# Steps before a stage's end: hours of a large model's, and enough to fill a loader's buffer.
COMPILE_STEPS, LOADER_STEPS = 1_000, 20

# Of each array of a batch its name, dimensions (rows, or rows and length) and dtype.
Fields = tuple[tuple[str, int, Any], ...]


def fields_of(batch: Mapping[str, np.ndarray]) -> Fields:
    return tuple((name, array.ndim, array.dtype) for name, array in batch.items())


class StepKey(NamedTuple):
    """All that a stage's compiled step depends on."""

    model: ModelConfig
    optimizer: OptimizerConfig
    layout: Layout
    rows: int
    length: int
    micro_batches: int
    sources: int
    xla: XlaConfig
    fields: Fields


def step_key(run: Run, index: int, layout: Layout, fields: Fields) -> StepKey:
    config, stage = run.config, run.timeline.stages[index]
    return StepKey(
        stage_model(config, stage), config.optimizer, layout, stage.batch_rows, stage.length,
        stage.micro_batches, len(run.batches.sources), config.xla, fields,
    )  # fmt: skip


@functools.cache
def compiled_step(key: StepKey) -> jax.stages.Compiled:
    """A stage's train step as an executable, compiled once a process, nothing allocated.

    It takes what the function of `compile_step` takes.
    """

    def abstract(dimensions: int, dtype: Any) -> jax.ShapeDtypeStruct:
        array = jax.ShapeDtypeStruct((key.rows, key.length)[:dimensions], dtype)
        return array.update(sharding=NamedSharding(layout.mesh, batch_spec(array, layout)))

    layout = key.layout
    batch = {name: abstract(dimensions, dtype) for name, dimensions, dtype in key.fields}
    state = abstract_state(key.model, key.optimizer, layout)
    step = compile_step(
        key.model, key.optimizer, layout, key.micro_batches, key.sources, key.xla
    )  # fmt: skip
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

    def prepare(self, run: Run, layouts: list[Layout], step: int, fields: Fields) -> None:
        """Called after each step: begins what it is time for."""
        stages = run.timeline.stages
        index = run.timeline.stage_index(step - 1) + 1
        if index == len(stages):
            return
        left = stages[index].first_step - step
        if left <= COMPILE_STEPS and (self._compiling is None or self._compiling[0] != index):
            key = step_key(run, index, layouts[index], fields)
            self._compiling = index, self._pool.submit(compiled_step, key)
        if 0 < left <= LOADER_STEPS and self._loader is None:
            loader = open_loader(run, index, 0, layouts[index])
            loader.start_prefetch()
            self._loader = run.batches.stages[: index + 1], loader

    def compiled_step(self, key: StepKey) -> jax.stages.Compiled:
        """As the function of that name, after waiting for the thread."""
        if self._compiling is not None and (error := self._compiling[1].exception()):
            # It need not fail again: beside a step, a device may have been short of memory.
            logging.warning("compiling the next stage failed, and is tried again: %s", error)
        return compiled_step(key)

    def loader(self, run: Run, index: int, first_step: int, layout: Layout):
        """As `open_loader`; the one that is open if its batches are the same."""
        found, self._loader = self._loader, None
        if found is not None:
            shapes, loader = found
            # What a stage reads follows from its shape and from those of the stages before it.
            if first_step == 0 and shapes == run.batches.stages[: index + 1]:
                return loader
            loader.close()
        return open_loader(run, index, first_step, layout)

    def close(self) -> None:
        if self._loader is not None:
            self._loader[1].close()
        self._pool.shutdown(wait=False, cancel_futures=True)
