"""From a config file and options to the rows of the queue, everything checked before."""

import hashlib
import importlib.util
import inspect
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from llama3_jax import cli
from llama3_jax.errors import UserError
from llama3_jax.launching import sweeps
from llama3_jax.launching.experiment import (
    CONFIGURED,
    EXPERIMENT,
    ROOT,
    WORKDIR,
    XID,
    Requirements,
    WorkUnit,
    work_units,
)

Row = dict[str, Any]


def declared_units(
    config: str, sweep_options: Sequence[str], overrides: Sequence[str]
) -> list[WorkUnit]:
    """The work units of `FILE[:ARGUMENT]`.

    With `sweep_options` (config.KEY=VALUE,…), the product of these; else the file's `sweep()`, which
    gets the argument if it takes one; else one unit. A unit without requirements has the file's
    REQUIREMENTS. `overrides` (--config.KEY=VALUE) hold for every
    unit that has a config.

    Raises:
      UserError: the file or a sweep is wrong.
    """
    file, colon, argument = config.partition(":")
    module = _module(file)
    declared = getattr(module, "sweep", None)
    if sweep_options:
        options = sweeps.product(*map(sweeps.parse, sweep_options))
        units = work_units(options, argument if colon else None)
    elif declared is not None:
        units = work_units(_call(declared, [argument] if colon else []))
    else:
        units = work_units([WorkUnit(argument=argument if colon else None)])
    needs = getattr(module, "REQUIREMENTS", Requirements())
    if not isinstance(needs, Requirements):
        raise UserError(f"{file}: REQUIREMENTS is no launching.experiment.Requirements")
    units = [
        unit if unit.requirements else unit.model_copy(update={"requirements": needs})
        for unit in units
    ]
    for option in overrides:
        if "=" not in option:
            raise UserError(f"{option}: a value is missing; {option}=VALUE is expected")
    more = dict(option.removeprefix("--").split("=", 1) for option in overrides)
    return [
        unit.model_copy(update={"overrides": unit.overrides | more})
        if unit.program in CONFIGURED and not unit.command else unit
        for unit in units
    ]  # fmt: skip


def _module(file: str) -> ModuleType:
    if not Path(file).is_file():
        raise UserError(f"--config={file}: there is no such file")
    spec = importlib.util.spec_from_file_location(f"launched_{Path(file).stem}", file)
    if spec is None:
        raise UserError(f"--config={file}: a Python file is expected")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--config={file}: {type(error).__name__}: {error}") from None
    return module


def _call(declared: Callable, arguments: list[str]) -> Any:
    """`sweep()`, or `sweep(ARGUMENT)` where one is given."""
    try:
        inspect.signature(declared).bind(*arguments)
    except TypeError as error:
        raise UserError(
            f"sweep(): {error}; an argument is given as --config=FILE:ARGUMENT"
        ) from None
    return declared(*arguments)


def check(units: Sequence[WorkUnit], file: str, slots: dict[str, int] | None) -> list[str]:
    """Refuses what could not run; `slots` are this machine's, None elsewhere. Returns remarks.

    The config of a unit that waits for others may read what these write: it is checked when it
    starts.

    Raises:
      UserError: names the unit and what is wrong with it.
    """
    later = []
    for unit in units:
        try:
            _check_requirements(unit.requirements or Requirements(), slots)
            if unit.command:
                if WORKDIR not in unit.command[0] and not shutil.which(unit.command[0]):
                    raise UserError(f"there is no program {unit.command[0]!r}")
            elif "." in unit.program:
                if not _findable(unit.program):
                    raise UserError(f"there is no module {unit.program}")
            elif unit.program in CONFIGURED and unit.after:
                later.append(unit.name)
            elif unit.program == "train":
                _check_training(unit.config_flags(file))
            elif unit.program == "curate":
                _check_curation(unit.config_flags(file))
        except UserError as error:
            where = f"work unit {unit.name}: " if len(units) > 1 else ""
            raise UserError(f"{where}{error}; nothing was queued") from None
    return [f"checked when they start, since they wait for others: {', '.join(later)}"] * bool(
        later
    )


def _check_requirements(needs: Requirements, slots: dict[str, int] | None) -> None:
    if slots is None:
        return
    for name, needed in (("cpus", needs.cpu_count(slots)), ("gpus", needs.gpus)):
        if needed > slots[name]:
            raise UserError(f"needs {needed} {name}, --{name} says {slots[name]}")
    if needs.nodes * needs.tasks_per_node > 1:
        raise UserError("nodes x tasks_per_node is above 1: that needs --executor=slurm")


def _findable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _check_training(flags: Sequence[str]) -> None:
    # JAX comes with these, and takes seconds: other commands of the launcher need it not.
    from llama3_jax.recipe.config import RunConfig
    from llama3_jax.recipe.prepare import prepare
    from llama3_jax.schema import parse

    prepare(parse(RunConfig, cli.load_config(flags)))


def _check_curation(flags: Sequence[str]) -> None:
    from llama3_jax.curation import config as configs  # brings Daft

    configs.parse(cli.load_config(flags))


def fingerprint(units: Sequence[WorkUnit], file: str, executor: str) -> str:
    """The same for the same command on the same declaration."""
    said = [str(Path(file).absolute()), executor, [unit.model_dump() for unit in units]]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def content(units: Sequence[WorkUnit], file: str) -> str:
    """The same for configs of the same values, whichever file they come from.

    Of units that wait for others, whose configs may read what these write, it is the file.

    Raises:
      UserError: a config is wrong.
    """
    said = []
    for unit in units:
        if unit.command or unit.program not in CONFIGURED:
            continue
        if unit.after:
            said.append(Path(unit.config or file).read_text(encoding="utf-8"))
        else:
            said.append(cli.load_config(unit.config_flags(file)).to_dict())
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def config_files(commands: Iterable[Sequence[str]], folder: Path) -> list[Path]:
    """The config files that command lines name, relative ones in `folder`."""
    named = (part for command in commands for part in command if part.startswith("--config="))
    files = dict.fromkeys(part.removeprefix("--config=").partition(":")[0] for part in named)
    return [folder / file for file in files if (folder / file).is_file()]


def rows(
    units: Sequence[WorkUnit], file: str, directory: Path, slots: dict[str, int] | None
) -> list[Row]:
    """Rows of the queue, in the units' order; `directory` is the experiment's, ROOT/XID.

    `slots` as for `check`.
    """
    wids = {unit.name: wid for wid, unit in enumerate(units, start=1)}
    shared = {EXPERIMENT: str(directory), ROOT: str(directory.parent), XID: directory.name}

    def filled(part: str, unit: WorkUnit) -> str:
        for mark, value in (shared | {WORKDIR: str(directory / unit.name)}).items():
            part = part.replace(mark, value)
        return part

    def needed(unit: WorkUnit) -> dict[str, Any]:
        needs = unit.requirements or Requirements()
        return needs.model_dump() | {"cpus": needs.cpu_count(slots)}

    return [
        {
            "wid": wids[unit.name],
            "name": unit.name,
            "command": [filled(part, unit) for part in unit.command_line(sys.executable, file)],
            "workdir": str(directory / unit.name),
            "environment": unit.environment,
            "after": [wids[name] for name in unit.after],
            "requirements": needed(unit),
            "retries": unit.retries,
        }
        for unit in units
    ]
