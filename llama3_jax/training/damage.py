"""Whether an error in reading a checkpoint proves that its files are damaged.

Only what was read and found wrong counts: bytes that do not decode or fail their checksum, files
that are missing or too short. Out of memory, a storage that answers with an error, another mesh or
another tree of arrays say nothing about the files: those must stay where they are.
"""

import json
import re
import traceback
from collections.abc import Iterator

import jax

# How tensorstore speaks of bytes that are wrong, missing, or beyond a file's end; and orbax of a tree
# that its own file describes otherwise than the sealed metadata (training/checkpoint.py) do.
_PROOFS = re.compile(
    "^(DATA_LOSS|NOT_FOUND|OUT_OF_RANGE):|Error decoding|tree structures do not match"
)


class DamagedCheckpoint(Exception):
    """The checkpoint cannot be trusted; the message says why."""


def proof_of_damage(error: BaseException) -> str | None:
    """What in a chain of errors proves damage, in words; None where nothing does."""
    for one in _chain(error):
        if isinstance(one, FileNotFoundError | json.JSONDecodeError | UnicodeDecodeError):
            return brief(one)
        if isinstance(one, OSError | MemoryError | jax.errors.JaxRuntimeError):
            return None
        if isinstance(one, ValueError) and _PROOFS.search(str(one)):
            return brief(one)
        # Names in orbax's small JSON files, which have no checksum.
        if isinstance(one, KeyError | TypeError | AttributeError) and _in_orbax(one):
            return brief(one)
    return None


def brief(error: BaseException) -> str:
    """An error as one line of some 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def deepest(error: BaseException) -> BaseException:
    """The error that led to the others."""
    *_, last = _chain(error)
    return last


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _in_orbax(error: BaseException) -> bool:
    """Whether orbax's own code raised it, other than to report an error before it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = frames[-1].f_globals.get("__name__", "") if frames else ""
    return module.startswith("orbax.") and error.__cause__ is None
