import itertools

import pytest

from llama3_jax.data.workers import AHEAD, run_jobs
from llama3_jax.errors import UserError


def square(number: int) -> int:
    if number == 23:
        raise UserError("not 23")
    return number * number


class Jobs(list):
    """Counts how many were taken."""

    taken = 0

    def __iter__(self):
        for job in super().__iter__():
            self.taken += 1
            yield job


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_are_not_made_far_ahead(workers):
    jobs = Jobs(range(20))
    results = run_jobs(square, jobs, workers)
    assert list(itertools.islice(results, 3)) == [0, 1, 4]
    assert jobs.taken <= 3 + AHEAD * workers
    assert list(results) == [n * n for n in range(3, 20)]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_ends_all(workers):
    results = run_jobs(square, range(100), workers)
    with pytest.raises(UserError, match="not 23"):
        list(results)
