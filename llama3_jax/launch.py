"""Launches experiments of many work units, and looks after them.

    python -m llama3_jax.launch --config=experiments/scaling_laws/isoflop.py           # its sweep()
    python -m llama3_jax.launch --config=my_run.py --sweep=config.seed=0,1,2 --sweep=config.model.dim=64,128
    python -m llama3_jax.launch --config=… --executor=slurm            # as Slurm's array jobs
    python -m llama3_jax.launch list                                   # all experiments
    python -m llama3_jax.launch status 7                               # an experiment's units
    python -m llama3_jax.launch logs 7/3 -f                            # what unit 3 prints
    python -m llama3_jax.launch stop 7/3                               # save and stop; 7 for all
    python -m llama3_jax.launch resume 7                               # what failed or was stopped
    python -m llama3_jax.launch report 7                               # report.html

A file's sweep(), or the product of --sweep options, gives the work units (launching/experiment.py);
--config.key=value sets a value in all. Everything is checked before anything is queued. Units run
on this machine as its slots (--cpus, --gpus) become free and outlive this program; one that crashes
is started again and goes on from its checkpoint, one that fails does not stop the others. The same
command again is the same experiment: it queues what failed or was stopped. --new makes another.
"""

import functools
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags
from rich.console import Console

from llama3_jax import cli
from llama3_jax.errors import UserError
from llama3_jax.files import check_folder
from llama3_jax.launching import look, prepare, revision, slurm
from llama3_jax.launching.locks import Locks
from llama3_jax.launching.runner import wake_supervisor
from llama3_jax.launching.store import DATABASE, ENDED, Experiment, Store, Unit
from llama3_jax.launching.supervisor import machine, slots

FLAGS = flags.FLAGS
console = Console(soft_wrap=True, highlight=False)
EXECUTORS = ("local", "slurm")
SHOWN_LAUNCHES = 3


def define_flags() -> None:
    flags.DEFINE_string("root", "runs/experiments", "Folder of the queue and all experiments.")
    flags.DEFINE_string("config", None, "Config file, FILE[:ARGUMENT], with or without sweep().")
    flags.DEFINE_multi_string("sweep", [], "config.KEY=VALUE,VALUE,…; several give the product.")
    flags.DEFINE_enum("executor", "local", EXECUTORS, "Where the units run.")
    flags.DEFINE_integer("cpus", None, "CPU slots of the root folder on this machine.", 1)
    flags.DEFINE_integer("gpus", None, "GPU slots; by default those present.", 0)
    flags.DEFINE_multi_string(
        "slurm", [], "An option for sbatch, such as --slurm=--partition=h100."
    )
    flags.DEFINE_bool("new", False, "A new experiment even where the same one exists.")
    flags.DEFINE_bool("wait", False, "Return when all units have ended: 0 if all are done.")
    flags.DEFINE_bool("follow", False, "logs: until the unit has ended.", short_name="f")


# ------------------------------------------------------------------------------------- commands


def launch(overrides: list[str]) -> int:
    if not FLAGS.config:
        raise UserError(f"--config=FILE, or one of the commands {', '.join(COMMANDS)}, is required")
    units = prepare.declared_units(FLAGS.config, FLAGS.sweep, overrides)
    if FLAGS.slurm and FLAGS.executor != "slurm":
        raise UserError("--slurm holds only with --executor=slurm")
    units = [unit.model_copy(update={"requirements": unit.requirements.model_copy(
        update={"slurm": (*unit.requirements.slurm, *FLAGS.slurm)})}) for unit in units]  # fmt: skip
    file = FLAGS.config.partition(":")[0]
    check_folder("--root", FLAGS.root)
    local = FLAGS.executor == "local"
    if not local:
        slurm.require()
    present = None
    if local:
        asked = {name: FLAGS[name].value for name in ("cpus", "gpus")}
        known = slots(Store(FLAGS.root)) if Path(FLAGS.root).exists() else machine()
        present = known | {name: value for name, value in asked.items() if value is not None}
    remarks = prepare.check(units, file, present)
    store = Store(FLAGS.root)
    for name in ("cpus", "gpus"):
        if FLAGS[name].value is not None:
            store.set_setting(name, FLAGS[name].value)
    xid, is_new = store.add(
        Path(file).stem,
        prepare.fingerprint(units, file, FLAGS.executor),
        FLAGS.executor,
        os.getcwd(),
        dict(os.environ),
        lambda directory: prepare.rows(units, file, directory, present),
        FLAGS.new,
        prepare.content(units, file),
    )
    for remark in remarks:
        console.print(remark, markup=False)
    _record_launch(store, store.experiment(xid), [Path(file)])
    again = 0 if is_new else _queue_again(store, store.experiment(xid))
    said = f"{len(units)} work units" if is_new else f"known already; {again} units queued again"
    console.print(f"experiment {xid}: {said}, in {store.directory(xid)}", markup=False)
    if not FLAGS.wait:
        default = FLAGS["root"].value == FLAGS["root"].default
        root = "" if default else f" --root={shlex.quote(FLAGS.root)}"
        console.print(f"look: python -m llama3_jax.launch status {xid}{root} (or logs {xid}/1 -f, "
                      f"stop {xid}, resume {xid}, report {xid})", markup=False)  # fmt: skip
    return _run(store, xid)


def list_experiments(_: str) -> int:
    store = _existing_store()
    for experiment in store.experiments():
        _refresh(store, experiment)
    console.print(look.experiments_table(store))
    return 0


def status(where: str) -> int:
    store, experiment, units = _find(where)
    _refresh(store, experiment)
    of = store.units(experiment.xid)
    wids = {unit.wid for unit in units}
    units = [unit for unit in of if unit.wid in wids]
    console.print(look.units_table(units, of))
    for line in look.launch_lines(store, experiment)[-SHOWN_LAUNCHES:]:
        console.print(line, markup=False)
    for unit in units:
        if unit.state == "failed":
            console.print(f"unit {unit.xid}/{unit.wid} ({unit.name}) ended with code "
                          f"{unit.exit_code}; {unit.log} ends with", markup=False)  # fmt: skip
            for line in look.last_lines(unit.log, look.LAST_LINES):
                console.print(f"  {line}", markup=False)
    return 0


def logs(where: str) -> int:
    store, experiment, units = _find(where)
    if len(units) != 1:
        raise UserError(f"{where} has {len(units)} units; name one, as {where}/1")
    (unit,) = units
    if FLAGS.follow:
        for text in look.follow(store, unit, _watcher(store, experiment)):
            sys.stdout.write(text)
            sys.stdout.flush()
    elif unit.log.exists():
        sys.stdout.write(unit.log.read_text(encoding="utf-8", errors="replace"))
    else:
        console.print(f"unit {where} is {unit.state} and has printed nothing yet", markup=False)
    return 0


def stop(where: str) -> int:
    store, experiment, units = _find(where)
    count = store.stop(experiment.xid, units[0].wid if "/" in where else None)
    if experiment.executor == "slurm":
        slurm.stop(store, experiment)
    else:
        wake_supervisor(store, _locks(store.root))
    console.print(f"{count} units stopped, or told to save and stop")
    return 0


def resume(where: str) -> int:
    store, experiment, units = _find(where)
    _record_launch(store, experiment)
    count = _queue_again(store, experiment, units[0].wid if "/" in where else None)
    console.print(f"{count} units queued again")
    return _run(store, experiment.xid)


def report(where: str) -> int:
    # Plots need a second to be imported, and no other command draws any.
    from llama3_jax.launching.report import write_experiment_report
    from llama3_jax.reporting.run import write_run_report

    store, experiment, units = _find(where)
    _refresh(store, experiment)
    if "/" in where:
        path = write_run_report(Path(units[0].workdir))
    else:
        path = write_experiment_report(store, experiment)
    console.print(f"{path}: {path.stat().st_size / 1e6:.1f} MB", markup=False)
    return 0


COMMANDS = {
    "list": list_experiments,
    "status": status,
    "logs": logs,
    "stop": stop,
    "resume": resume,
    "report": report,
}


# -------------------------------------------------------------------------------------- helpers


def _record_launch(store: Store, experiment: Experiment, files: Sequence[Path] = ()) -> None:
    """Notes the command, its environment and the code, and copies the config files."""
    commands = [unit.command for unit in store.units(experiment.xid)]
    files = [*files, *prepare.config_files(commands, Path(experiment.cwd))]
    files = list({path.resolve(): path for path in files}.values())
    found = revision.revisions(files)
    number = store.launched(experiment.xid, sys.argv[1:], dict(os.environ), [*map(str, found)])
    folder = store.directory(experiment.xid) / revision.LAUNCHES / str(number)
    revision.save(folder, found, files)


def _queue_again(store: Store, experiment: Experiment, wid: int | None = None) -> int:
    """Queues what failed or was stopped; returns how many units the executor gets again."""
    _refresh(store, experiment)
    on_slurm = experiment.executor == "slurm"
    refused = slurm.unsubmitted(store.units(experiment.xid)) if on_slurm else 0
    return refused + store.resume(experiment.xid, wid)


def _run(store: Store, xid: int) -> int:
    """Hands the queued units to the executor; with --wait, sees them through."""
    experiment = store.experiment(xid)
    if experiment.executor == "slurm":
        slurm.submit(store, experiment)
    else:
        wake_supervisor(store, _locks(store.root))
    if not FLAGS.wait:
        return 0
    look_again = _watcher(store, experiment)
    while True:
        units = store.units(xid)
        by_wid = {unit.wid: unit for unit in units}
        open_units = [u for u in units if u.state not in ENDED]
        if all(look.shown_state(unit, by_wid) == "blocked" for unit in open_units):
            break
        time.sleep(0.5)
        look_again()
        if experiment.executor == "slurm":
            slurm.submit(store, experiment)  # what Slurm refused to queue again
    status(str(xid))
    return 0 if all(unit.state == "done" for unit in store.units(xid)) else 1


def _refresh(store: Store, experiment: Experiment) -> None:
    """What the executor knows: Slurm is asked; here, a supervisor that was killed is replaced."""
    if experiment.executor == "slurm":
        slurm.refresh(store, experiment)
    else:
        wake_supervisor(store, _locks(store.root))


def _watcher(store: Store, experiment: Experiment) -> Callable[[], None]:
    """`_refresh` for a loop."""
    if experiment.executor == "slurm":
        return slurm.watcher(store, experiment)
    return lambda: _refresh(store, experiment)


_locks = functools.cache(Locks)


def _existing_store() -> Store:
    if not (Path(FLAGS.root) / DATABASE).exists():
        raise UserError(f"--root={FLAGS.root}: no experiment was launched there")
    return Store(FLAGS.root)


def _find(where: str) -> tuple[Store, Experiment, list[Unit]]:
    """The experiment and the units that XID or XID/WID names."""
    store = _existing_store()
    xid, slash, wid = where.partition("/")
    if not xid.isdigit() or (slash and not wid.isdigit()):
        raise UserError(f"{where!r}: XID or XID/WID is expected, such as 7 or 7/3")
    experiment = store.experiment(int(xid))
    if experiment is None:
        raise UserError(f"there is no experiment {xid} in {store.root}")
    units = [u for u in store.units(int(xid)) if not slash or u.wid == int(wid)]
    if not units:
        raise UserError(f"experiment {xid} has no work unit {wid}")
    return store, experiment, units


def main(arguments: list[str]) -> None:
    """Options and words (COMMAND, XID/WID) may come in any order."""
    program, *rest = arguments
    overrides = [argument for argument in rest if argument.startswith("--config.")]
    options = [program, *(argument for argument in rest if argument not in overrides)]
    define_flags()
    FLAGS.set_gnu_getopt(True)
    try:
        _, *words = FLAGS(options)
        options = [program]  # they are parsed
    except flags.Error:  # cli.run meets it again, and says so; or it is --help
        words = []

    def run(_) -> int:
        command, where, *more = [*words, "", ""][: max(len(words), 2)]
        if more:
            raise UserError(f"unexpected argument {more[0]!r} after {command} {where}")
        if not command:
            return launch(overrides)
        if command not in COMMANDS:
            raise UserError(f"{command!r} is no command; known: {', '.join(COMMANDS)}")
        if overrides:
            raise UserError(f"{overrides[0]}: {command} takes no config")
        if not where and command != "list":
            raise UserError(f"{command}: XID or XID/WID is required; see `launch list`")
        if where and command == "list":
            raise UserError(f"list: unexpected argument {where!r}")
        return COMMANDS[command](where)

    cli.run(run, options)


if __name__ == "__main__":
    main(sys.argv)
