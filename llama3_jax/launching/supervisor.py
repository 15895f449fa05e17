"""Starts queued work units as slots become free, until there is nothing left to do.

    python -m llama3_jax.launching.supervisor ROOT

One for each root folder, whoever starts it: a second one sees the first's lock and ends. It keeps
nothing in memory that its successor could not find in the queue, and units outlive it.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from llama3_jax.launching.locks import SUPERVISOR, Locks
from llama3_jax.launching.outcome import KILLED
from llama3_jax.launching.runner import MARK
from llama3_jax.launching.store import Store, Unit

POLL_SECONDS = 0.05
IDLE_SECONDS = 0.5
# From the request to stop to the end by force: time to write a checkpoint.
GRACE_SECONDS = 120.0


def gpus_present() -> int:
    return sum(1 for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit())


def machine() -> dict[str, int]:
    """The slots that this machine has by itself."""
    return {"cpus": os.cpu_count() or 1, "gpus": gpus_present()}


def slots(store: Store) -> dict[str, int]:
    """How many CPU and GPU slots the root folder's units share."""
    return {name: store.setting(name, present) for name, present in machine().items()}


class Supervisor:
    def __init__(self, store: Store, locks: Locks):
        self._store, self._locks = store, locks
        self._runners: dict[tuple[int, int], subprocess.Popen] = {}

    def run(self) -> None:
        """Until no unit runs or could be started."""
        for unit in self._store.active():
            # Who was to start it is gone. If its runner lives, one of the two comes first.
            if unit.state == "starting":
                self._store.give_up_start(unit.id, unit.attempt, crashed=False)
        while self.step():
            time.sleep(POLL_SECONDS if self._runners else IDLE_SECONDS)

    def step(self) -> bool:
        """One look at everything; False when there is nothing left to do."""
        for key, runner in list(self._runners.items()):
            if runner.poll() is not None:
                del self._runners[key]
                self._store.give_up_start(*key, crashed=True)  # where it ended without beginning
        active = self._store.active()
        for unit in active:
            if unit.state == "running":
                self._watch(unit)
        ready = self._store.ready()
        for unit, gpus in startable(ready, active, slots(self._store)):
            self._start(unit, gpus)
        return bool(ready or active)

    def _start(self, unit: Unit, gpus: list[int]) -> None:
        attempt = self._store.claim(unit, gpus)
        if attempt is None:
            return
        arguments = [str(self._store.root), str(unit.id), str(attempt)]
        self._runners[unit.id, attempt] = subprocess.Popen(
            [sys.executable, "-m", "llama3_jax.launching.runner", *arguments],
            start_new_session=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def _watch(self, unit: Unit) -> None:
        """Counts an attempt as ended whose runner is gone, and stops what is to be stopped."""
        if not self._locks.held_by_another(unit.id):
            # Its runner may have written the end since `unit` was read; then this changes nothing.
            if self._store.unit(unit.id).pid == unit.pid:
                kill_all(unit)
                self._store.finish(unit.id, unit.attempt, KILLED)
        elif unit.stop and not unit.signalled:
            self._store.signalled(unit.id, unit.attempt)
            os.kill(unit.pid, signal.SIGTERM)
        elif unit.signalled and time.time() > unit.signalled + GRACE_SECONDS:
            os.killpg(unit.pid, signal.SIGKILL)


def startable(
    ready: list[Unit], active: list[Unit], total: dict[str, int]
) -> list[tuple[Unit, list[int]]]:
    """Ready units that fit beside the active ones, with the GPUs each gets.

    In their order: what does not fit keeps the slots that are free for it, and later units get
    only what is left, so a large one is not passed over for ever.
    """
    cpus = total["cpus"] - sum(unit.requirements["cpus"] for unit in active)
    taken = {gpu for unit in active for gpu in unit.gpus}
    gpus = [gpu for gpu in range(total["gpus"]) if gpu not in taken]
    chosen = []
    for unit in ready:
        need = unit.requirements
        if need["cpus"] <= cpus and need["gpus"] <= len(gpus):
            chosen.append((unit, gpus[: need["gpus"]]))
        cpus -= need["cpus"]
        gpus = gpus[need["gpus"] :]
        if cpus <= 0:
            break
    return chosen


def kill_all(unit: Unit) -> None:
    """Ends what a dead runner left behind: the processes of its session that carry the mark."""
    mark = f"{unit.xid}/{unit.wid}"
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == unit.pid and process.environ().get(MARK) == mark:
                process.kill()
                process.wait(10)
        except (psutil.Error, ProcessLookupError):
            continue


def main(root: Path) -> None:
    store, locks = Store(root), Locks(root)
    # After letting go of the lock it looks again: who queued in between found the lock taken.
    while (store.ready() or store.active()) and locks.take(SUPERVISOR):
        Supervisor(store, locks).run()
        locks.release(SUPERVISOR)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
