"""Jobs on several processes, or ahead in a thread; results in the jobs' order."""

import collections
import concurrent.futures
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
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


def ahead(items: Iterable[ResultT], count: int = 2) -> Iterator[ResultT]:
    """The items, made in a thread, up to `count` of them before they are taken."""
    end, iterator = object(), iter(items)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = collections.deque(pool.submit(next, iterator, end) for _ in range(count))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, iterator, end))
            yield item
