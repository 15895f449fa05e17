"""Starts one process of a work unit with the GPUs that are its own, on a node that holds several.

    python -m llama3_jax.launching.slurm_task GPUS COMMAND…      # by srun, GPUS for each task

A step of several tasks sees all GPUs of its job on the node. Here each takes its share by its rank
on the node, as CUDA_VISIBLE_DEVICES. Slurm's own binding (--gpus-per-task) hides the others from the
processes by cgroups, and then NCCL cannot copy between them directly. The standard library alone.
"""

import os
import sys
from collections.abc import Mapping


def device_environment(gpus: int, environment: Mapping[str, str]) -> dict[str, str]:
    """What the task's environment says of its devices.

    JAX would take one device a task under Slurm, unless JAX_LOCAL_DEVICE_IDS names more.

    Raises:
      ValueError: the node shows another number of GPUs than its tasks need.
    """
    tasks, rank = tasks_here(environment), int(environment["SLURM_LOCALID"])
    shown = environment.get("CUDA_VISIBLE_DEVICES")
    devices = shown.split(",") if shown else [str(index) for index in range(gpus * tasks)]
    if len(devices) == gpus * tasks:
        devices = devices[rank * gpus : (rank + 1) * gpus]
    elif len(devices) != gpus:  # else Slurm has bound them: "--slurm=--gpus-per-task=…"
        raise ValueError(f"{tasks} tasks of {gpus} GPUs are on this node, which shows {len(devices)} "
                         f"(CUDA_VISIBLE_DEVICES={shown})")  # fmt: skip
    local = ",".join(str(index) for index in range(gpus))
    return {"CUDA_VISIBLE_DEVICES": ",".join(devices), "JAX_LOCAL_DEVICE_IDS": local}


def tasks_here(environment: Mapping[str, str]) -> int:
    """Tasks of the step on this node, of SLURM_STEP_TASKS_PER_NODE such as "2(x3),1"."""
    counts = []
    for part in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts[int(environment["SLURM_NODEID"])]


def main(gpus: str, *command: str) -> None:
    try:
        os.environ.update(device_environment(int(gpus), os.environ))
    except ValueError as error:
        sys.exit(f"error: {error}")
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"error: {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main(*sys.argv[1:])
