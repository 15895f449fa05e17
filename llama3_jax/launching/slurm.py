"""Slurm as the executor: array jobs, their dependencies, and what becomes of them.

Units that need the same and wait for the same become one array job. Jobs run
launching/slurm_job.py; they write what became of their unit into <experiment>/slurm/, and the queue
learns it from there and from squeue. The root folder must be on a file system that the nodes share
and that has POSIX locks (launching/database.py).
"""

import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llama3_jax.errors import UserError
from llama3_jax.launching.slurm_job import read_record, stop_file
from llama3_jax.launching.store import ENDED, Experiment, Store, Unit

SECONDS_TO_SAVE = 120
# Between two calls of squeue by a program that waits: the controller has other users.
SQUEUE_SECONDS = 30.0
ENDED_JOBS = (
    "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE",
    "BOOT_FAIL",
)  # fmt: skip


def require() -> None:
    """Raises UserError where there is no Slurm, or it doesn't answer."""
    if not shutil.which("sbatch"):
        raise UserError(
            "--executor=slurm: there is no Slurm here (no sbatch); use --executor=local"
        )
    _slurm("sinfo", "--noheader")


def submit(store: Store, experiment: Experiment) -> None:
    """Submits all queued units that have no job yet."""
    if not _submittable(store.units(experiment.xid)):
        return
    folder = store.directory(experiment.xid) / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "submit.lock", "a") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # two launchers would submit the same units
        size = array_limit(_slurm("scontrol", "show", "config"))
        # Those that wait for others come when these have their jobs.
        while chosen := _submittable(units := store.units(experiment.xid)):
            by_wid = {unit.wid: unit for unit in units}
            for _, group in itertools.groupby(sorted(chosen, key=_group_key), key=_group_key):
                members, previous = list(group), None
                for first in range(0, len(members), size):
                    part = members[first : first + size]
                    previous = _submit_array(store, experiment, folder, part, by_wid, previous)


def _submittable(units: Sequence[Unit]) -> list[Unit]:
    by_wid = {unit.wid: unit for unit in units}

    def may_follow(earlier: Unit) -> bool:
        return earlier.state == "done" or bool(earlier.job and earlier.state not in ENDED)

    return [
        unit for unit in units
        if unit.state == "queued" and unit.job is None
        and all(may_follow(by_wid[wid]) for wid in unit.after)
    ]  # fmt: skip


def array_limit(config: str) -> int:
    """How many tasks an array may have, by what `scontrol show config` prints.

    Raises:
      UserError: the cluster allows no arrays.
    """
    limits = [int(n) for n in re.findall(r"\b(?:MaxArraySize\s*|max_array_tasks)=\s*(\d+)", config)]
    if not limits or min(limits) < 1:
        raise UserError(
            "this cluster allows no array jobs (MaxArraySize of `scontrol show config`)"
        )
    return min(limits)


def unsubmitted(units: Sequence[Unit]) -> int:
    """How many wait for nothing but to be submitted: Slurm refused to queue their jobs again."""
    by_wid = {unit.wid: unit for unit in units}
    return sum(
        unit.state == "queued" and unit.job is None
        and all(by_wid[wid].state == "done" for wid in unit.after) for unit in units
    )  # fmt: skip


def _group_key(unit: Unit) -> str:
    return json.dumps([unit.requirements, unit.after], sort_keys=True)


def _submit_array(
    store: Store, experiment: Experiment, folder: Path, units: Sequence[Unit],
    by_wid: dict[int, Unit], previous: str | None,
) -> str:  # fmt: skip
    """The number of one array job, submitted here; where a launcher was killed between sbatch
    and its note, that job's.

    The name says which submission of which units it is, so each submission is made once.
    """
    said = [str(store.root), [(unit.id, unit.submissions) for unit in units]]
    name = "l3-" + hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
    number = _number_of(name, folder)
    if number is None:
        file = folder / f"{name}.units.json"
        file.write_text(json.dumps([_described(unit) for unit in units]))
        for unit in units:
            stop_file(folder, unit.wid).unlink(missing_ok=True)
        number = _sbatch(experiment, folder, name, file, units, by_wid, previous)
        (folder / f"{name}.job").write_text(number)
    store.submitted({unit.id: f"{number}_{index}" for index, unit in enumerate(units)})
    return number


def _number_of(name: str, folder: Path) -> str | None:
    if (note := folder / f"{name}.job").exists():
        return note.read_text()
    mine = f"--user={os.getuid()}"
    found = _slurm("squeue", "--noheader", mine, f"--name={name}", "--format=%F").split()
    return found[0] if found else None


def _described(unit: Unit) -> dict:
    return {
        "xid": unit.xid, "wid": unit.wid, "command": unit.command, "workdir": unit.workdir,
        "log": str(unit.log), "environment": unit.environment, "retries": unit.retries,
        "failures": unit.failures, "checkpoint": unit.checkpoint, "requirements": unit.requirements,
    }  # fmt: skip


def sbatch_options(
    experiment: Experiment, folder: Path, name: str, units: Sequence[Unit],
    by_wid: dict[int, Unit], previous: str | None = None,
) -> list[str]:  # fmt: skip
    """What sbatch is told of an array of units that need, and wait for, the same.

    `previous` is the array before it of units that need the same and do not fit into one array.
    """
    needs = units[0].requirements
    at_once = needs.get("at_once")
    throttle = f"%{at_once}" if at_once else ""
    options = [
        "--parsable", f"--job-name={name}", f"--array=0-{len(units) - 1}{throttle}",
        f"--comment=experiment {experiment.xid} {experiment.title}", f"--chdir={experiment.cwd}",
        f"--output={folder}/%A_%a.out", "--open-mode=append", "--requeue",
        f"--signal=TERM@{SECONDS_TO_SAVE}", f"--nodes={needs['nodes']}",
        f"--ntasks-per-node={needs['tasks_per_node']}", f"--cpus-per-task={needs['cpus']}",
    ]  # fmt: skip
    if needs["gpus"]:
        options.append(f"--gpus-per-node={needs['gpus'] * needs['tasks_per_node']}")
    if needs["memory_gb"]:
        options.append(f"--mem={needs['memory_gb']}G")
    if needs["minutes"]:
        options.append(f"--time={needs['minutes']}")
    earlier = [by_wid[wid] for wid in units[0].after]
    dependencies = []
    if waiting := [unit.job for unit in earlier if unit.state != "done"]:
        dependencies.append(f"afterok:{':'.join(waiting)}")
    if at_once and previous:  # each array has its own throttle: one after the other keeps to it
        dependencies.append(f"afterany:{previous}")
    if dependencies:
        options += [f"--dependency={','.join(dependencies)}", "--kill-on-invalid-dep=yes"]
    return [*options, *needs["slurm"]]


def _sbatch(
    experiment: Experiment, folder: Path, name: str, file: Path, units: Sequence[Unit],
    by_wid: dict[int, Unit], previous: str | None,
) -> str:  # fmt: skip
    script = folder / f"{name}.sh"
    script.write_text(
        f"#!/bin/bash\nexec '{sys.executable}' -m llama3_jax.launching.slurm_job '{file}'\n"
    )
    # Variables of a job that the launcher itself may be in would be taken for options.
    environment = {
        key: value for key, value in experiment.environment.items()
        if not key.startswith(("SLURM_", "SBATCH_")) or key == "SLURM_CONF"
    }  # fmt: skip
    options = sbatch_options(experiment, folder, name, units, by_wid, previous)
    printed = _slurm("sbatch", *options, str(script), environment=environment)
    return printed.strip().partition(";")[0]


def refresh(store: Store, experiment: Experiment, ask: bool = True) -> None:
    """Brings the queue up to date with what the jobs wrote and, with `ask`, with squeue."""
    units = [u for u in store.units(experiment.xid) if u.job and u.state not in ENDED]
    if not units:
        return
    folder = store.directory(experiment.xid) / "slurm"
    present = _jobs({unit.job.partition("_")[0] for unit in units}) if ask else None
    for unit in units:
        record = _own_record(folder, unit)
        keys = ("started", "ended", "exit_code", "failures", "checkpoint")
        known = {key: record[key] for key in keys if key in record}
        if "starts" in record:
            known["attempt"] = record["starts"]
        if record.get("state") in ENDED:
            _observe(store, unit, state=record["state"], **known)
        elif present is None:  # only what the job has written since
            if record and record["started"] != unit.started:
                _observe(store, unit, state="running", **known)
        elif unit.job in present:
            running = present[unit.job] in ("RUNNING", "COMPLETING", "SUSPENDED", "PREEMPTED")
            _observe(store, unit, state="running" if running else "queued", **known)
        elif record.get("refused") and not unit.stop:
            store.observed(unit.id, state="queued", job=None, **known)  # saved: may be submitted
        elif _own_record(folder, unit).get("state") not in ENDED:  # else it ended just now
            _gone(store, unit, known)


def _own_record(folder: Path, unit: Unit) -> dict[str, Any]:
    """What the unit's present job wrote; empty before it began."""
    record = read_record(folder, unit.wid)
    return record if record.get("job") == unit.job else {}


def _observe(store: Store, unit: Unit, **values: Any) -> None:
    if any(getattr(unit, name) != value for name, value in values.items()):
        store.observed(unit.id, **values)


def watcher(store: Store, experiment: Experiment) -> Callable[[], None]:
    """`refresh` for a loop: it reads what jobs wrote, and asks squeue every SQUEUE_SECONDS.

    Where a job has ended it asks sooner: Slurm cancels those that waited for a failed one. A squeue
    that fails is a warning and asked again: the controller may be restarting.
    """
    asked, ended = -math.inf, 0

    def look() -> None:
        nonlocal asked, ended
        refresh(store, experiment, ask=False)
        now = sum(unit.state in ENDED for unit in store.units(experiment.xid))
        pause = SQUEUE_SECONDS if now == ended else SQUEUE_SECONDS / 6
        if time.monotonic() < asked + pause:
            return
        asked, ended = time.monotonic(), now
        try:
            refresh(store, experiment)
        except UserError as error:
            print(f"warning: {error}; asked again in {SQUEUE_SECONDS:.0f} s", file=sys.stderr)

    return look


def _gone(store: Store, unit: Unit, known: dict) -> None:
    """A job that Slurm has no more and that wrote no end: cancelled, out of time, or killed."""
    if unit.stop:
        store.observed(unit.id, state="stopped", **known)
        return
    earlier = {u.wid: u for u in store.units(unit.xid)}
    if any(earlier[wid].state != "done" for wid in unit.after):
        store.observed(unit.id, state="queued", job=None, **known)  # never began: waits on
        return
    with open(unit.log, "a", encoding="utf-8") as log:
        log.write(f"error: Slurm ended job {unit.job} ({_reason(unit.job)})\n")
    store.observed(unit.id, state="failed", **known)


def _reason(job: str) -> str:
    try:
        shown = _slurm("scontrol", "--oneliner", "show", "job", job)
    except UserError:
        return "it is known no more"
    fields = dict(field.split("=", 1) for field in shown.split() if "=" in field)
    return ", ".join(fields[key] for key in ("JobState", "Reason") if key in fields)


def stop(store: Store, experiment: Experiment) -> None:
    """Ends the jobs of units that are to stop: those that run save first."""
    folder = store.directory(experiment.xid) / "slurm"
    units = [u for u in store.units(experiment.xid) if u.job and u.stop and u.state not in ENDED]
    if not units:
        return
    for unit in units:
        stop_file(folder, unit.wid).touch()
    present = _jobs({unit.job.partition("_")[0] for unit in units})
    for unit in units:
        if present.get(unit.job) == "PENDING":
            _slurm("scancel", unit.job)
        elif unit.job in present:
            _slurm("scancel", "--signal=TERM", unit.job)  # to the steps alone


def _jobs(numbers: set[str]) -> dict[str, str]:
    """State of each job of these arrays that Slurm still has, as "12_3": "RUNNING"."""
    # The controller answers with the jobs of one user or one number; squeue picks from these.
    only = (f"--user={os.getuid()}", f"--jobs={','.join(sorted(numbers))}")
    asked = ("squeue", "--noheader", "--array", "--format=%F_%K %T", "--states=all")
    try:
        listed = _slurm(*asked, *only)
    except UserError as error:
        if "Invalid job id" not in str(error):  # which is said where it has none of them any more
            raise
        listed = ""
    jobs = dict(line.split() for line in listed.splitlines() if line.split("_")[0] in numbers)
    return {job: state for job, state in jobs.items() if state not in ENDED_JOBS}


def _slurm(*command: str, environment: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    except FileNotFoundError:
        raise UserError(f"there is no Slurm here (no {command[0]})") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"Slurm does not answer: {command[0]} took over 60 s") from None
    if done.returncode:
        raise UserError(f"{command[0]}: {done.stderr.strip() or done.returncode}")
    return done.stdout
