"""Jobs on several processes, results in the jobs' order."""

import collections
import concurrent.futures
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")

AHEAD = 4  # jobs a process under way or waiting to be taken: bounds the results in memory


def run_jobs(
    function: Callable[[JobT], ResultT], jobs: Sequence[JobT], workers: int
) -> Iterator[ResultT]:
    """Yields `function(job)` for each job; the first error ends all."""
    if workers == 1:
        yield from map(function, jobs)
        return
    # spawn: the parent may hold threads (jax, grain) that a fork would freeze.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            pending = collections.deque()
            for job in jobs:
                if len(pending) == AHEAD * workers:
                    yield pending.popleft().result()
                pending.append(pool.submit(function, job))
            while pending:
                yield pending.popleft().result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
