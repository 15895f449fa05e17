"""Joining, who holds which rows, and that nobody waits for a process that is gone."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import REPOSITORY, command_environment, free_port

from llama3_jax.errors import UserError
from llama3_jax.parallel.processes import Joining, initialize_arguments, local_rows

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
EXPLICIT = Joining("explicit", "host:1234", 1, 2)


@pytest.mark.parametrize(
    ("joining", "environment", "arguments"),
    [
        (Joining(), {}, None),
        (Joining(), {"SLURM_CONF": "/etc/slurm.conf"}, None),
        (Joining(), SLURM, {}),
        (Joining(), SLURM | {"SLURM_NTASKS": "1"}, None),
        (Joining("off"), SLURM, None),
    ],
)
def test_auto_joins_where_a_cluster_says_so(joining, environment, arguments):
    assert initialize_arguments(joining, environment) == arguments


def test_explicit_takes_the_flags_alone():
    arguments = initialize_arguments(EXPLICIT, SLURM)
    assert arguments["coordinator_address"] == "host:1234"
    assert (arguments["process_id"], arguments["num_processes"]) == (1, 2)
    assert arguments["cluster_detection_method"] == "deactivate"


@pytest.mark.parametrize(
    ("joining", "environment", "message"),
    [
        (Joining(), {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"},
         "Slurm is half set up: SLURM_JOB_ID, SLURM_NTASKS set, SLURM_STEP_NODELIST, SLURM_PROCID, "
         "SLURM_LOCALID not; start by srun"),
        (Joining(), {"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI is half set up"),
        (Joining(processes=2), {}, "--processes hold only with --distributed=explicit"),
        (Joining("explicit", processes=2), {}, "needs --coordinator, --process_id as well"),
        (EXPLICIT._replace(process_id=2), {}, "--process_id=2 is not between 0 and"),
        (EXPLICIT._replace(coordinator="host"), {}, "--coordinator=host: should be host:port"),
    ],
)  # fmt: skip
def test_what_is_half_set_is_named(joining, environment, message):
    with pytest.raises(UserError, match=message):
        initialize_arguments(joining, environment)


def mesh_of(data: int, others: int, devices_a_process: int | list[int]):
    """A stand-in for a mesh whose devices belong to processes in order, or as listed."""
    count = data * others
    owners = devices_a_process
    if isinstance(owners, int):
        owners = [device // devices_a_process for device in range(count)]
    devices = np.array([SimpleNamespace(process_index=owner) for owner in owners])
    return SimpleNamespace(shape={"data": data}, devices=devices.reshape(data, 1, 1, others))


@pytest.mark.parametrize(
    ("data", "others", "devices_a_process", "expected"),
    [
        (8, 1, 4, [(0, 2), (1, 2)]),  # processes along data
        (4, 2, 2, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        (1, 8, 4, [(0, 1), (0, 1)]),  # two processes share the one data rank
        (2, 4, 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # two processes to each of two data ranks
        (4, 1, 4, [(0, 1)]),
    ],
)
def test_a_process_takes_the_rows_of_its_data_ranks(data, others, devices_a_process, expected):
    mesh = mesh_of(data, others, devices_a_process)
    assert [local_rows(mesh, process) for process in range(len(expected))] == expected


@pytest.mark.parametrize(
    ("data", "others", "owners"), [(3, 2, [0, 0, 0, 1, 1, 1]), (4, 1, [0, 1, 0, 1])]
)
def test_rows_that_are_no_block_are_refused_on_every_process(data, others, owners):
    for process in (0, 1):
        with pytest.raises(UserError, match="process 0 holds ranks .* which is no equal block"):
            local_rows(mesh_of(data, others, owners), process)


@pytest.fixture
def start(compilation_cache):
    """Starts members of a run; those left at the end of the test are killed."""
    children = []

    def start(rounds: int, failing: int | None = None, processes: int = 3) -> list:
        member, port = Path(__file__).with_name("member.py"), str(free_port())
        for process in range(processes):
            command = [sys.executable, member, str(process), str(processes), port, str(rounds)]
            children.append(
                subprocess.Popen(
                    command + ["fails"] * (process == failing),
                    text=True,
                    cwd=REPOSITORY,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env=command_environment(compilation_cache) | {"PYTHONPATH": str(REPOSITORY)},
                )  # fmt: skip
            )
        return children

    yield start
    for child in children:
        child.kill()
        child.communicate()


def await_begin(children) -> None:
    for child in children:
        for line in child.stdout:  # gloo prints there, too
            if line == "begun\n":
                break
        else:
            raise AssertionError(child.communicate())


def ends(children, seconds: float) -> list[tuple[int, str]]:
    """Exit code and last line on standard error of each; all within the time."""
    limit = time.monotonic() + seconds
    results = []
    for child in children:
        _, error = child.communicate(timeout=max(limit - time.monotonic(), 0.1))
        results.append((child.returncode, (error.strip().splitlines() or [""])[-1]))
    return results


def test_processes_agree_and_end_together(start):
    assert ends(start(rounds=3), 60) == [(0, "")] * 3


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_lost_process_ends_the_others_and_is_named(start, victim, number):
    children = start(rounds=10_000)
    await_begin(children)
    children[victim].send_signal(number)
    others = [child for child in children if child is not children[victim]]
    for code, line in ends(others, 20):
        assert code == 3, line
        assert line.startswith(f"error: process {victim} (")
        assert f"pid {children[victim].pid}) is lost" in line
        assert line.endswith("; the same command goes on from the newest checkpoint")


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_process_ends_the_others_at_once(start, failing):
    results = ends(start(rounds=10_000, failing=failing), 60)
    for process, (code, line) in enumerate(results):
        if process == failing:
            name = "" if process == 0 else f"process {process}: "
            assert (code, line) == (2, f"error: {name}its disk is full")
        else:
            assert code == 3, line
            assert line.startswith(f"error: process {failing} stopped: its disk is full")
