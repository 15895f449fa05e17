"""Several processes as one run: joining them, what each holds, and how they agree.

Each process sees its own devices; a mesh spans those of all. Collectives go by NCCL on GPUs and by
gloo on CPUs.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama3_jax import exits
from llama3_jax.errors import UserError
from llama3_jax.parallel.liveness import Watch

MODES = ("auto", "off", "explicit")

# What JAX reads of each cluster; a part of it alone would make it guess.
_CLUSTERS = {
    "Slurm": (
        "SLURM_JOB_ID",
        "SLURM_STEP_NODELIST",
        "SLURM_NTASKS",
        "SLURM_PROCID",
        "SLURM_LOCALID",
    ),
    "Open MPI": (
        "OMPI_MCA_orte_hnp_uri",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ),
}
_PROCESS_COUNT = {"Slurm": "SLURM_NTASKS", "Open MPI": "OMPI_COMM_WORLD_SIZE"}


class Joining(NamedTuple):
    """How the processes of a run find each other; the middle three for mode "explicit" only."""

    mode: str = "auto"
    coordinator: str | None = None
    process_id: int | None = None
    processes: int | None = None
    heartbeat_timeout: int = 100


def define_flags() -> None:
    flags.DEFINE_enum(
        "distributed", "auto", MODES,
        "auto: as Slurm or Open MPI says, one process where there is neither; off: one process; "
        "explicit: as --coordinator, --process_id and --processes say.",
    )  # fmt: skip
    flags.DEFINE_string("coordinator", None, "host:port of process 0, where all others reach it.")
    flags.DEFINE_integer("process_id", None, "This process: 0 to --processes - 1.")
    flags.DEFINE_integer("processes", None, "How many processes make the run.")
    flags.DEFINE_integer(
        "heartbeat_timeout", 100, "Seconds without a sign of life after which a process is lost.",
        lower_bound=1,
    )  # fmt: skip


def from_flags() -> Joining:
    return Joining(*(getattr(flags.FLAGS, name) for name in ("distributed", *Joining._fields[1:])))


@contextlib.contextmanager
def joined(joining: Joining) -> Iterator[Watch | None]:
    """Joins the processes for the length of the block; must come before any use of devices.

    Yields the watch over them, or None for a single process.

    While the block runs, a process that is lost or fails ends all others with an error that names
    it (see `Watch`).

    Raises:
      UserError: the flags or the cluster's variables are incomplete, or others did not come.
    """
    arguments = initialize_arguments(joining, os.environ)
    if arguments is None:
        yield None
        return
    watch = _initialize(arguments, joining.heartbeat_timeout)
    exits.before_interrupt.append(lambda: watch.leave(KeyboardInterrupt()))
    try:
        yield watch
        watch.finish()
    except BaseException as error:
        watch.leave(error)  # the others would wait
    exits.before_interrupt.clear()
    jax.distributed.shutdown()


def initialize_arguments(joining: Joining, environment: Mapping[str, str]) -> dict | None:
    """Arguments of `jax.distributed.initialize`, or None for a single process.

    Raises:
      UserError: names the flags or variables that are missing or in the way.
    """
    explicit = {
        "--coordinator": joining.coordinator,
        "--process_id": joining.process_id,
        "--processes": joining.processes,
    }
    given = [name for name, value in explicit.items() if value is not None]
    if joining.mode == "explicit":
        if missing := [name for name in explicit if name not in given]:
            raise UserError(f"--distributed=explicit needs {', '.join(missing)} as well")
        if not 0 <= joining.process_id < joining.processes:
            raise UserError(
                f"--process_id={joining.process_id} is not between 0 and --processes - 1 "
                f"({joining.processes - 1})"
            )
        host, _, port = joining.coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"--coordinator={joining.coordinator}: should be host:port")
        return {
            "coordinator_address": joining.coordinator,
            "num_processes": joining.processes,
            "process_id": joining.process_id,
            # Else a cluster's variables would restrict this process to one device.
            "cluster_detection_method": "deactivate",
        }
    if given:
        raise UserError(f"{', '.join(given)} hold only with --distributed=explicit")
    if joining.mode == "off":
        return None
    for cluster, names in _CLUSTERS.items():
        present = [name for name in names if name in environment]
        if missing := [name for name in names if name not in environment]:
            if present:
                raise UserError(
                    f"{cluster} is half set up: {', '.join(present)} set, {', '.join(missing)} "
                    "not; start by srun or mpirun, or say --distributed=off or explicit"
                )
        elif int(environment[_PROCESS_COUNT[cluster]]) > 1:
            return {}
    return None


def _initialize(arguments: dict, heartbeat_timeout: int) -> Watch:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # JAX's own notifier would take SIGTERM, of which the run wants to know itself.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        # JAX's heartbeat is the second line: it aborts without a word of which run this was. It may
        # do so after half its timeout, and then process 0's store answers nobody any more.
        jax.distributed.initialize(
            **arguments, heartbeat_timeout_seconds=4 * heartbeat_timeout + 10
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes did not come together: {error}") from None
    if not arguments and "JAX_LOCAL_DEVICE_IDS" not in os.environ and _one_task_a_node():
        # JAX takes one device a task under Slurm, which here would leave the others idle.
        jax.config.update("jax_cuda_visible_devices", "all")
    return Watch(heartbeat_timeout)


def _one_task_a_node() -> bool:
    return os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0] == "1" and (
        "," not in os.environ["SLURM_STEP_TASKS_PER_NODE"]
    )


def local_rows(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """This (or another) process's part of a batch as (host, hosts): the host-th of `hosts` equal parts.

    A batch's rows are split along the mesh's data axis, so a process needs the rows of those data ranks
    of which it has a device. Processes that share a data rank (its devices being those of several)
    get the same rows.

    Raises:
      UserError: some process's data ranks are not one of equal blocks; the same on all processes.
    """
    ranks: dict[int, set[int]] = {}
    for rank, devices in enumerate(mesh.devices.reshape(mesh.shape["data"], -1)):
        for device in devices:
            ranks.setdefault(device.process_index, set()).add(rank)
    for holder, held in sorted(ranks.items()):
        block = range(min(held), max(held) + 1)
        aligned = len(held) == len(block) and block.start % len(block) == 0
        if not aligned or mesh.shape["data"] % len(block):
            raise UserError(
                f"process {holder} holds ranks {sorted(held)} of the mesh's {mesh.shape['data']} "
                "along data, which is no equal block of them: let pipe x context x tensor divide, "
                "or be a multiple of, the devices of a process"
            )
    held = ranks[jax.process_index() if process is None else process]
    return min(held) // len(held), mesh.shape["data"] // len(held)


def is_first() -> bool:
    """Whether this is the process that writes what only one may write."""
    return jax.process_index() == 0


def all_agree(value: bool) -> bool:
    """Whether `value` holds on every process; all must call it."""
    if jax.process_count() == 1:
        return value
    return bool(np.all(multihost_utils.process_allgather(np.array(value))))


def check_same(what: str, text: str) -> None:
    """Refuses to go on where processes were given different texts; all must call it.

    Raises:
      UserError: names the processes that differ from process 0; the same on all.
    """
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), np.int32)
    digests = multihost_utils.process_allgather(digest)
    if others := np.flatnonzero((digests != digests[0]).any(axis=1)).tolist():
        raise UserError(
            f"process {', '.join(map(str, others))} has another {what} than process 0: start all "
            "with the same one"
        )


def largest(number: int) -> int:
    """The largest of the processes' numbers, on every process; all must call it."""
    if jax.process_count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.array(number))))


def of_first(numbers: Sequence[int]) -> list[int]:
    """Process 0's numbers, on every process; all must call it."""
    if jax.process_count() == 1:
        return list(numbers)
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    # Others may have seen another number of them: only the first's shape counts.
    mine = np.resize(np.array([*numbers, 0], np.int32), count)
    return multihost_utils.broadcast_one_to_all(mine).tolist()


class SharedNumber:
    """The largest of the processes' numbers, learnt by all at the same step, one call late.

    A tiny collective goes out with each step and is read when the next one is: nobody waits for
    it, and all processes read the same. With a single process nothing is late.
    """

    def __init__(self) -> None:
        devices = np.array(jax.devices())
        mesh = Mesh(devices, ("all",))
        self._shape = devices.shape
        self._sharding = NamedSharding(mesh, PartitionSpec("all"))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._pending: jax.Array | None = None

    def exchange(self, number: int) -> int:
        """Sends `number`; returns the largest of those sent a call ago (0 at the first)."""
        if jax.process_count() == 1:
            return number
        before, mine = self._pending, np.full(1, number, np.int32)
        self._pending = self._largest(
            jax.make_array_from_callback(self._shape, self._sharding, lambda _: mine)
        )
        return 0 if before is None else int(before)
