"""Runs the same experiment file under XManager, on this machine.

    pip install -e '.[xmanager]'
    python -m llama3_jax.launching.xmanager --config=experiments/scaling_laws/isoflop.py

XManager numbers the experiment and keeps its list (`xmanager` on the command line). What it does not
do: it starts all units that wait for nothing at once, its jobs end with this program, and what ended
in a crash is not started again; `llama3_jax.launch` does these. Requirements are checked, but
XManager's local executor takes no slots. Overrides as for `llama3_jax.launch`.
"""

import asyncio
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from llama3_jax import cli
from llama3_jax.errors import UserError
from llama3_jax.launching import prepare

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("root", "runs/xmanager", "Folder of the experiments' directories.")
    flags.DEFINE_string("config", None, "Config file, FILE[:ARGUMENT], with or without sweep().")
    flags.DEFINE_multi_string("sweep", [], "config.KEY=VALUE,VALUE,…; several give the product.")


def require():
    """XManager's modules.

    Raises:
      UserError: it is not installed.
    """
    try:
        from xmanager import xm, xm_local
    except ImportError:
        raise UserError("XManager is not installed: pip install -e '.[xmanager]'") from None
    return xm, xm_local


async def run(rows: Sequence[dict], experiment) -> dict[str, bool]:
    """Adds each unit when those it waits for are done; whether each was done, by name."""
    xm, xm_local = require()
    executor = xm_local.Local(experimental_stream_output=False)
    tasks: dict[int, asyncio.Task] = {}

    async def unit(row: dict) -> bool:
        if not all([await tasks[wid] for wid in row["after"]]):
            return False
        Path(row["workdir"]).mkdir(parents=True, exist_ok=True)
        program, *arguments = row["command"]
        (executable,) = experiment.package([xm.binary(executor.Spec(), shutil.which(program))])
        job = xm.Job(executable, executor, name=row["name"], args=xm.SequentialArgs.from_collection(
            arguments), env_vars=row["environment"])  # fmt: skip
        added = await experiment.add(job)
        try:
            await added.wait_until_complete()
        except xm.ExperimentUnitError:
            return False
        return True

    for row in rows:
        tasks[row["wid"]] = asyncio.ensure_future(_after_all_exist(unit, row))
    return dict(zip((r["name"] for r in rows), await asyncio.gather(*tasks.values()), strict=True))


async def _after_all_exist(unit, row: dict) -> bool:
    await asyncio.sleep(0)  # until every task stands in the table that units look others up in
    return await unit(row)


async def launch(config: str, sweeps: Sequence[str], overrides: Sequence[str], root: Path) -> int:
    _, xm_local = require()
    file = config.partition(":")[0]
    units = prepare.declared_units(config, sweeps, overrides)
    slots = {"cpus": os.cpu_count() or 1, "gpus": 0}
    for remark in prepare.check(units, file, slots):
        print(remark)
    done: dict[str, bool] = {}
    try:
        async with xm_local.create_experiment(Path(file).stem) as experiment:
            directory = root.absolute() / str(experiment.experiment_id)
            done = await run(prepare.rows(units, file, directory, slots), experiment)
    except RuntimeError:
        if not done:
            raise  # else XManager says once more, of all jobs together, that some failed
    print(f"XManager's experiment {directory.name}, in {directory}")
    for name, fine in done.items():
        print(f"{name}: {'done' if fine else 'failed, or waits for one that failed'}")
    return 0 if all(done.values()) else 1


def main(arguments: list[str]) -> None:
    overrides = [argument for argument in arguments if argument.startswith("--config.")]
    rest = [argument for argument in arguments if argument not in overrides]
    define_flags()

    def run_all(_) -> int:
        if not FLAGS.config:
            raise UserError("--config is required: a Python file with sweep() or get_config()")
        return asyncio.run(launch(FLAGS.config, FLAGS.sweep, overrides, Path(FLAGS.root)))

    cli.run(run_all, rest)


if __name__ == "__main__":
    main(sys.argv)
