"""Daft's two runners: inside this process, or on a Ray cluster."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import daft

from llama3_jax.errors import UserError

ATTEMPTS = 4
ResultT = TypeVar("ResultT")


def start(runner: str = "native", address: str | None = None) -> None:
    """Chooses the runner, once in a process. `address`: of a Ray cluster; None starts one here.

    Raises:
      UserError: an address without Ray, Ray that is not installed, or a cluster that is not there.
    """
    # It logs each error that it then raises.
    logging.getLogger("daft_local_execution").setLevel(logging.CRITICAL)
    if runner == "native":
        if address:
            raise UserError(f"--address={address} is of a Ray cluster; add --runner=ray")
        if daft.get_or_infer_runner_type() != "native":  # Daft refuses to be told twice
            daft.set_runner_native()
        return
    try:
        import ray
    except ImportError:
        raise UserError("--runner=ray needs Ray: pip install -e '.[ray]'") from None
    try:
        ray.init(address=address, ignore_reinit_error=True, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"--address={address}: no Ray cluster there ({error})") from None
    daft.set_runner_ray(address=address)


def spread(jobs: daft.DataFrame, number: int) -> daft.DataFrame:
    """A frame of few, long jobs so that a cluster's workers share them."""
    if daft.get_or_infer_runner_type() != "ray":
        return jobs  # this process's threads take single rows anyway
    return jobs.into_partitions(max(number, 1))


def patient(attempt: Callable[[], ResultT]) -> ResultT:
    """`attempt()`, again where a cluster lost a worker on the way: it must bear what is half done."""
    for number in range(1, ATTEMPTS):
        try:
            return attempt()
        except Exception as error:
            if not _lost_worker(error):
                raise
            logging.warning("a worker was lost, attempt %d follows: %s", number + 1, error)
            time.sleep(2 * number)
    return attempt()


def _lost_worker(error: BaseException) -> bool:
    if daft.get_or_infer_runner_type() != "ray":
        return False
    words = ("ActorDied", "ActorUnavailable", "WorkerCrashed", "NodeDied", "ObjectLost",
             "OwnerDied", "actor died", "actor is unavailable", "node died", "worker died")  # fmt: skip
    return any(word in f"{type(error).__name__}: {error}" for word in words)
