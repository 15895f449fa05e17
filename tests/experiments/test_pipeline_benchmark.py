"""Schedules that hold fewer activations need less memory, by the compiler's own count."""

import pytest

from experiments.benchmarks.pipeline import MODEL, bubble_where_all_meet, measure_memory, mesh_of
from llama3_jax.parallel.schedule import in_flight, make_schedule, simulate


@pytest.mark.slow
def test_interleaved_and_1f1b_need_less_memory_than_gpipe_at_equal_micro_batches():
    names = ("gpipe", "interleaved V=2 N=8", "1f1b")
    memory = dict(measure_memory(16, MODEL, names))
    gpipe, interleaved, one_f_one_b = (memory[name] for name in names)
    assert one_f_one_b < interleaved < gpipe
    # Most of it are activations: what goes is near what the schedule says.
    stages = [
        max(in_flight(make_schedule(mesh_of(name), 16))) / mesh_of(name).virtual_stages
        for name in names
    ]
    assert stages == [16, 11.5, 8]
    assert abs(interleaved / gpipe - 11.5 / 16) < 0.1
    assert abs(one_f_one_b / gpipe - 8 / 16) < 0.1


def test_bubbles_of_the_table():
    schedule = make_schedule(mesh_of("interleaved V=2 N=8"), 16)
    assert bubble_where_all_meet(schedule, 2.0) == simulate(schedule, 2.0).bubble == 7 / 32
