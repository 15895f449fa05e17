"""What a config file declares to be launched: work units, what they need, and what they wait for.

XManager's notions: an experiment (XID) is made of work units (WID), each with requirements; an
executor runs them. A config file's `sweep()` returns a list whose entries are

    "6e18,124M"                         an argument of the file's get_config
    {"config.optimizer.b2": 0.95}       overrides of its values (launching/sweeps.py combines them)
    WorkUnit(program="fit", …)             anything else: another program, with what it waits for
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import pydantic

from llama3_jax.errors import UserError
from llama3_jax.schema import Config

# Programs that are launched with --config=FILE[:ARGUMENT] and --workdir; others get `arguments` alone.
CONFIGURED = ("train", "curate")
PROGRAMS = (*CONFIGURED, "evaluate", "fit")
# Feeding a GPU, and what XLA compiles, take several cores; nodes have 12 and more for each GPU.
CPUS_PER_GPU = 8
# Folders of an experiment that are no unit's.
RESERVED = ("logs", "slurm", "sections", "launches")
# In `argument`, `arguments`, `command` and string overrides.
WORKDIR, EXPERIMENT, ROOT, XID = "{workdir}", "{experiment}", "{root}", "{xid}"


class Requirements(Config):
    """What a work unit needs. On this machine `cpus` and `gpus` are slots of the root folder.

    `cpus` are by default one, or CPUS_PER_GPU for each GPU (on this machine at most the GPU's share
    of the slots). For Slurm: `cpus` and `gpus` are those of a task; `nodes` x `tasks_per_node`
    processes make one run (by jax.distributed), `minutes` is the time limit, `at_once` how many
    units of one array run at once, and `slurm` holds further sbatch options, such as
    "--partition=h100".
    """

    cpus: pydantic.PositiveInt | None = None
    gpus: pydantic.NonNegativeInt = 0
    nodes: pydantic.PositiveInt = 1
    tasks_per_node: pydantic.PositiveInt = 1
    memory_gb: pydantic.PositiveInt | None = None
    minutes: pydantic.PositiveInt | None = None
    at_once: pydantic.PositiveInt | None = None
    slurm: tuple[str, ...] = ()

    def cpu_count(self, slots: dict[str, int] | None) -> int:
        """`cpus`, or their default beside `slots`, which are None where another machine runs it."""
        if self.cpus is not None or not self.gpus:
            return self.cpus or 1
        each = CPUS_PER_GPU
        if slots is not None:
            each = min(each, slots["cpus"] // max(slots["gpus"], 1))
        return max(each * self.gpus, 1)


class WorkUnit(Config):
    """One program with a workdir of its own, <experiment's directory>/<name>.

    `program` is one of PROGRAMS or a module (experiments.scaling_laws.collect); `command` is any program
    instead. `config` (by default the launched file), `argument` and `overrides` are for the programs
    with a config, `arguments` for all. In their strings {workdir}, {experiment} and {root}
    stand for the directories, {xid} for the experiment's number. `after` names the units that must be
    done before this one starts. `requirements` are by default the file's REQUIREMENTS, and where it
    has none those of Requirements(). A unit that crashes is started again up to `retries` times; a
    save-and-requeue (exit code 75) counts as none.
    """

    name: str = ""
    program: str = "train"
    command: tuple[str, ...] = ()
    config: str | None = None
    argument: str | None = None
    overrides: dict[str, Any] = {}
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    after: tuple[str, ...] = ()
    requirements: Requirements | None = None
    retries: pydantic.NonNegativeInt = 2

    def config_flags(self, file: str) -> list[str]:
        """The command line's part about the config; `file` where the unit names none."""
        where = self.config or file
        if self.argument is not None:
            where = f"{where}:{self.argument}"
        return [f"--config={where}", *(override(k, v) for k, v in self.overrides.items())]

    def command_line(self, python: str, file: str) -> list[str]:
        """What is run, placeholders still in it."""
        if self.command:
            return [*self.command, *self.arguments]
        module = self.program if "." in self.program else f"llama3_jax.{self.program}"
        configured = self.program in CONFIGURED
        own = [*self.config_flags(file), f"--workdir={WORKDIR}"] if configured else []
        return [python, "-m", module, *own, *self.arguments]


def override(key: str, value: Any) -> str:
    """`--config.key=value` for a program; `key` with or without the leading "config."."""
    return f"--config.{key.removeprefix('config.')}={value}"


def work_units(entries: Iterable[Any], argument: str | None = None) -> list[WorkUnit]:
    """The entries of a sweep as units with distinct names; `argument` is get_config's for overrides.

    Raises:
      UserError: an entry of another kind, two units of one name, an unknown program, or units that
        wait for an unknown one or for each other.
    """
    units = []
    for number, entry in enumerate(entries, start=1):
        if isinstance(entry, str):
            unit = WorkUnit(argument=entry)
        elif isinstance(entry, dict):
            unit = WorkUnit(argument=argument, overrides=entry)
        elif isinstance(entry, WorkUnit):
            unit = entry
        else:
            raise UserError(f"sweep(): entry {number} is a {type(entry).__name__}; entries are "
                            "arguments (str), overrides (dict) or WorkUnits")  # fmt: skip
        units.append(unit.model_copy(update={"name": unit.name or default_name(unit, number)}))
    _check(units)
    return units


def default_name(unit: WorkUnit, number: int) -> str:
    """A directory's name: the argument or the overrides as far as they fit, else the number."""
    parts = [unit.argument] if isinstance(unit.argument, str) and not unit.overrides else []
    parts += [f"{key.rpartition('.')[2]}={value}" for key, value in unit.overrides.items()]
    name = re.sub(r"[^\w.,=+-]+", "_", ",".join(parts)).strip("_.")
    return name if 0 < len(name) <= 80 else str(number)


def _check(units: Sequence[WorkUnit]) -> None:
    if not units:
        raise UserError("sweep() returned nothing: there is no work unit to launch")
    by_name: dict[str, WorkUnit] = {}
    for unit in units:
        if re.search(r"[/\s]", unit.name) or unit.name.startswith("."):
            raise UserError(f"work unit {unit.name!r}: a name is one directory's, without blanks")
        if unit.name in RESERVED:
            raise UserError(f"work unit {unit.name!r}: the experiment's own folder has that name")
        if unit.name in by_name:
            raise UserError(f"two work units are named {unit.name!r}")
        if not unit.command and "." not in unit.program and unit.program not in PROGRAMS:
            raise UserError(f"work unit {unit.name!r}: program {unit.program!r} is none of "
                            f"{', '.join(PROGRAMS)}, nor a module")  # fmt: skip
        by_name[unit.name] = unit
    for unit in units:
        if unknown := [name for name in unit.after if name not in by_name]:
            raise UserError(f"work unit {unit.name!r} waits for {unknown[0]!r}, which is none of "
                            "the experiment's")  # fmt: skip
    waiting = dict(by_name)
    while waiting:
        free = [u for u in waiting.values() if not any(name in waiting for name in u.after)]
        if not free:
            raise UserError(f"work units {', '.join(waiting)} wait for each other")
        for unit in free:
            del waiting[unit.name]
