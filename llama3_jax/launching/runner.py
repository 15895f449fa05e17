"""Runs one attempt of a work unit on this machine, and writes down how it ended.

    python -m llama3_jax.launching.runner ROOT UNIT_ID ATTEMPT

Started by the supervisor, in a session of its own, so that neither's end is the other's. The
standard library alone, since there is one of these beside each unit.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from llama3_jax.launching.locks import SUPERVISOR, Locks
from llama3_jax.launching.store import Experiment, Store, Unit

# In the environment of all that belongs to a unit.
MARK = "LLAMA3_JAX_UNIT"


def main(root: str, unit_id: int, attempt: int) -> None:
    child, terminated = None, False

    def terminate(*_) -> None:
        nonlocal terminated
        terminated = True
        if child is not None:
            child.send_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, terminate)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is meant for the launcher
    store, locks = Store(root), Locks(Path(root))
    locks.take(unit_id, wait=True)
    if not store.begin(unit_id, attempt, os.getpid()):
        return
    unit = store.unit(unit_id)
    experiment = store.experiment(unit.xid)
    Path(unit.workdir).mkdir(parents=True, exist_ok=True)
    unit.log.parent.mkdir(exist_ok=True)
    with open(unit.log, "ab") as log:
        log.write(header(unit))
        log.flush()
        try:
            child = subprocess.Popen(
                unit.command, cwd=experiment.cwd, env=environment(experiment, unit), stdout=log,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except OSError as error:
            log.write(f"error: {unit.command[0]}: {error.strerror}\n".encode())
            store.finish(unit_id, attempt, 2)
        else:
            if terminated:
                terminate()
            code = child.wait()
            store.finish(unit_id, attempt, 128 - code if code < 0 else code)
    locks.release(unit_id)
    wake_supervisor(store, locks)


def header(unit: Unit) -> bytes:
    when = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"--- attempt {unit.attempt}, {when}: {' '.join(unit.command)}\n".encode()


def environment(experiment: Experiment, unit: Unit) -> dict[str, str]:
    own = {MARK: f"{unit.xid}/{unit.wid}", "PYTHONUNBUFFERED": "1"}
    if unit.requirements.get("gpus"):
        own["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, unit.gpus))
    return experiment.environment | own | unit.environment


def wake_supervisor(store: Store, locks: Locks) -> None:
    """Starts a supervisor where there is work and none lives: it may have been killed."""
    if (store.ready() or store.active()) and locks.take(SUPERVISOR):
        locks.release(SUPERVISOR)
        start_supervisor(store.root)


def start_supervisor(root: Path) -> None:
    with open(root / "supervisor.log", "ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", "llama3_jax.launching.supervisor", str(root)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
