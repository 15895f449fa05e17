"""What the end of a unit's program means: done, to be tried again, or over.

The standard library alone: each unit's runner imports this.
"""

from pathlib import Path

# Exit codes of the programs (llama3_jax/cli.py, which this file does not import: it brings JAX).
USER_ERROR, REQUEUE, INTERRUPTED = 2, 75, 130
KILLED = 137  # what a shell says of a program that SIGKILL ended
CHECKPOINTS = "checkpoints"  # of training/checkpoint.py: a folder for each step


def outcome(
    code: int, stopping: bool, failures: int, retries: int, progressed: bool = False
) -> tuple[str, int]:
    """(state, failures) of a unit whose program ended with `code`.

    The same rule for all executors: 0 is done; after a stop, whatever else it is, stopped; 75 asks
    to be queued again; exit 2 is not retried; Ctrl-C stops; anything else (a lost process, a hang, a
    crash) is tried again, up to `retries` times without progress. The retry count resets only where
    the attempt `progressed`, that is, left a newer checkpoint: a crash that always comes back at the
    same step ends, however long it takes to get there.
    """
    failures = 0 if progressed else failures
    if code == 0:
        return "done", failures
    if stopping or code == INTERRUPTED:
        return "stopped", failures
    if code == REQUEUE:
        return "queued", failures
    if code == USER_ERROR:
        return "failed", failures + 1
    return ("queued" if failures < retries else "failed"), failures + 1


def newest_checkpoint(workdir: Path | str) -> int:
    """The step of the newest checkpoint in a unit's workdir; 0 where there is none."""
    try:
        names = [path.name for path in (Path(workdir) / CHECKPOINTS).iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return 0
    return max((int(name) for name in names if name.isdecimal()), default=0)
