"""Runs one work unit inside a Slurm job, and queues the job again where the unit asks for it.

    python -m llama3_jax.launching.slurm_job UNITS.json      # a task of an array job

`srun` starts the unit's processes on all nodes of the job, and the trainer finds them by
jax.distributed. Before a time limit, or when the job is preempted, Slurm sends SIGTERM to these;
the trainer saves and exits with 75, and this program requeues the job, which goes on from there.
What became of the unit is written beside UNITS.json, for the launcher to read. The standard library
alone.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from llama3_jax.launching.outcome import newest_checkpoint, outcome
from llama3_jax.launching.runner import MARK

# The controller may be restarting. A time limit leaves SECONDS_TO_SAVE (slurm.py) for all of this.
REQUEUE_TRIES, SECONDS_BETWEEN_TRIES = 4, 10


def main(units_file: Path) -> int:
    unit = json.loads(units_file.read_text())[int(os.environ["SLURM_ARRAY_TASK_ID"])]
    folder = units_file.parent
    job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    before = read_record(folder, unit["wid"])
    record = before
    if before.get("job") != job:
        record = {"job": job, "starts": 0}
        record |= {name: unit[name] for name in ("failures", "checkpoint")}
    # The processes have their own SIGTERM from Slurm; a second one would end them at once.
    signal.signal(signal.SIGTERM, lambda *_: None)
    record |= {"state": "running", "starts": record["starts"] + 1, "started": time.time()}
    record.pop("refused", None)
    write_record(folder, unit["wid"], record)
    note_job(units_file, os.environ["SLURM_ARRAY_JOB_ID"])
    code = run(unit, record["starts"])
    stopping = stop_file(folder, unit["wid"]).exists()
    reached = newest_checkpoint(unit["workdir"])
    progressed = reached > record["checkpoint"]
    state, failures = outcome(code, stopping, record["failures"], unit["retries"], progressed)
    record |= {"state": state, "failures": failures, "exit_code": code, "ended": time.time(),
               "checkpoint": max(reached, record["checkpoint"])}  # fmt: skip
    write_record(folder, unit["wid"], record)
    if state != "queued":
        return 0 if state == "done" else 1
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if refusal := requeue(job):
        record["refused"] = refusal
        write_record(folder, unit["wid"], record)
        with open(unit["log"], "a", encoding="utf-8") as log:
            log.write(f"Slurm did not queue job {job} again ({refusal}); its state is saved, and "
                      f"`launch resume {unit['xid']}/{unit['wid']}` submits it anew\n")  # fmt: skip
    return 1


def requeue(job: str) -> str:
    """Has Slurm queue this task again, which ends it; returns Slurm's message where it does not.

    `job` is ARRAY_TASK. SLURM_JOB_ID would not do: an array's last task has the array's own id,
    and with it Slurm requeues every task.
    """
    command = ["scontrol", "requeue", job]
    for attempt in range(REQUEUE_TRIES):
        if attempt:
            time.sleep(SECONDS_BETWEEN_TRIES)
        done = subprocess.run(command, capture_output=True, text=True)
        if not done.returncode:
            time.sleep(60)  # Slurm ends this program meanwhile
            return ""
    return " ".join(done.stderr.split()) or f"scontrol ended with {done.returncode}"


def run(unit: dict[str, Any], start: int) -> int:
    """Runs the unit's processes; returns the largest of their exit codes."""
    needs = unit["requirements"]
    command = [
        "srun", f"--nodes={needs['nodes']}", f"--ntasks-per-node={needs['tasks_per_node']}",
        f"--ntasks={needs['nodes'] * needs['tasks_per_node']}",
        f"--cpus-per-task={needs['cpus']}", "--kill-on-bad-exit=0",
    ]  # fmt: skip
    if needs["gpus"]:
        command += [sys.executable, "-m", "llama3_jax.launching.slurm_task", str(needs["gpus"])]
    command += unit["command"]
    own = {MARK: f"{unit['xid']}/{unit['wid']}", "PYTHONUNBUFFERED": "1"}
    Path(unit["workdir"]).mkdir(parents=True, exist_ok=True)
    log_path = Path(unit["log"])
    log_path.parent.mkdir(exist_ok=True)
    with open(log_path, "ab") as log:
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        log.write(f"--- start {start}, {when}: {' '.join(command)}\n".encode())
        log.flush()
        code = subprocess.call(
            command, env=os.environ | own | unit["environment"], stdout=log,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    return 128 - code if code < 0 else code


# ------------------------------------------------------------------------- files of a job's units


def job_note(units_file: Path) -> Path:
    """Holds the number of the array job that was submitted with UNITS.json."""
    return units_file.with_name(units_file.name.replace(".units.json", ".job"))


def note_job(units_file: Path, number: str) -> None:
    """The launcher does this, too; but it may have been killed after sbatch."""
    temporary = job_note(units_file).with_suffix(f".job.{os.environ['SLURM_ARRAY_TASK_ID']}")
    temporary.write_text(number)
    os.replace(temporary, job_note(units_file))


def read_record(folder: Path, wid: int) -> dict[str, Any]:
    """What a unit's job last wrote; empty before it began."""
    path = folder / f"{wid}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write_record(folder: Path, wid: int, record: dict[str, Any]) -> None:
    temporary = folder / f".{wid}.json.{os.getpid()}"
    temporary.write_text(json.dumps(record))
    os.replace(temporary, folder / f"{wid}.json")


def stop_file(folder: Path, wid: int) -> Path:
    """Exists where a person asked to stop the unit: then it is not queued again."""
    return folder / f"{wid}.stop"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
