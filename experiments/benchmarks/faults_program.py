"""The training program with a fault inside, for faults.py.

    FAULT=nan:STEP:… python -m experiments.benchmarks.faults_program <flags of llama3_jax.train>

`nan:K,…`: gradients of the fifth stage's batches K are NaN. `stuck:FILE:STAGE:K`: this process's loader
never returns batch K of a stage; FILE is made then, and where it is there already nothing happens.
`terminate:FILE:PLACE` sends SIGTERM to this process where a validation, an evaluation (or the one after the
last step: last_evaluation), a gate or a save (PLACE) begins; FILE as before. `read:memory` and `read:storage` let every read of a checkpoint's
arrays end with such an error. `none` is none. A needle always counts as found: no model of this size
would pass a gate.
"""

import errno
import os
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llama3_jax import cli, train
from llama3_jax.data.batches import Batches
from llama3_jax.evaluation.suite import Suite
from llama3_jax.recipe.gate import Gates
from llama3_jax.recipe.measure import Evaluate, Validate
from llama3_jax.training import checkpoint, step


def make_nan(numbers: list[int]) -> None:
    rows, make_gradients = Batches.rows, step.make_gradients

    def marked(self, stage, start, stop):
        bad = stage == 4 and start // self.stages[stage].batch_rows in numbers
        return rows(self, stage, start, stop) | {"bad": np.full(stop - start, bad)}

    def poisoned(*arguments):
        compute = make_gradients(*arguments)

        def gradients(params, batch):
            batch = dict(batch)
            bad = jnp.any(batch.pop("bad"))
            sums, grads = compute(params, batch)
            return sums, jax.tree.map(lambda g: jnp.where(bad, jnp.nan, g), grads)

        return gradients

    Batches.rows, step.make_gradients = marked, poisoned


def get_stuck(file: Path, stage: int, number: int) -> None:
    rows = Batches.rows

    def stuck(self, at, start, stop):
        if at == stage and start // self.stages[at].batch_rows == number and not file.exists():
            file.touch()
            time.sleep(3600)
        return rows(self, at, start, stop)

    Batches.rows = stuck


def terminate(file: Path, place: str) -> None:
    owner, name = {
        "validation": (Validate, "__call__"), "evaluation": (Evaluate, "__call__"),
        "last_evaluation": (Evaluate, "__call__"),
        "gate": (Gates, "run"), "save": (checkpoint.Checkpoints, "save"),
    }[place]  # fmt: skip
    begin = getattr(owner, name)

    def terminated(*arguments, **options):
        now = place != "last_evaluation" or arguments[1].step == arguments[1].run.timeline.steps
        if now and not file.exists():
            file.touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return begin(*arguments, **options)

    setattr(owner, name, terminated)


def fail_to_read(what: str) -> None:
    error = {
        "memory": jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory, by faults.py"),
        "storage": OSError(errno.EIO, "Input/output error, by faults.py"),
    }[what]

    def fail(*_, **__):
        raise error

    checkpoint.ocp.load_checkpointables = fail


def find_needles() -> None:
    look = Suite.needle
    Suite.needle = lambda *arguments: [r._replace(found=True) for r in look(*arguments)]


if __name__ == "__main__":
    find_needles()
    kind, *values = os.environ["FAULT"].split(":")
    if kind == "nan":
        make_nan([int(number) for number in values[0].split(",")])
    elif kind == "stuck":
        get_stuck(Path(values[0]), int(values[1]), int(values[2]))
    elif kind == "terminate":
        terminate(Path(values[0]), values[1])
    elif kind == "read":
        fail_to_read(values[0])
    train.define_flags()
    cli.run(train.main)
