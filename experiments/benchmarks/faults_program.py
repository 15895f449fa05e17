"""The training door with a fault inside, for faults.py.

    FAULT=nan:STEP:… python -m experiments.benchmarks.faults_program <flags of llama3_jax.train>

`nan:K`: gradients of the fifth stage's batch K are NaN. `stuck:FILE:STAGE:K`: this process's loader
never returns batch K of a stage; FILE is made then, and where it is there already nothing happens.
"""

import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llama3_jax import cli, train
from llama3_jax.data.batches import Batches
from llama3_jax.training import step


def make_nan(number: int) -> None:
    rows, make_gradients = Batches.rows, step.make_gradients

    def marked(self, stage, start, stop):
        bad = stage == 4 and start // self.stages[stage].batch_rows == number
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


if __name__ == "__main__":
    kind, *values = os.environ["FAULT"].split(":")
    if kind == "nan":
        make_nan(int(values[0]))
    elif kind == "stuck":
        get_stuck(Path(values[0]), int(values[1]), int(values[2]))
    train.define_flags()
    cli.run(train.main)
