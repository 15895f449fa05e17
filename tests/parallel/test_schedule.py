"""What every schedule must do, whatever its numbers, and what each promises."""

import numpy as np
import pytest

from llama3_jax.errors import UserError
from llama3_jax.parallel.mesh import MeshConfig
from llama3_jax.parallel.schedule import (
    IDLE,
    Schedule,
    chart,
    forward_only,
    in_flight,
    make_schedule,
    simulate,
)
from llama3_jax.schema import parse


def schedule_of(name: str, P: int, M: int, V: int = 1, N: int | None = None) -> Schedule:
    config = MeshConfig(pipe=P, schedule=name, virtual_stages=V, contiguous=N)
    return make_schedule(config, M)


def random_schedules(count: int):
    """Few and many stages, micro-batches and contiguous ones, dividing each other or not."""
    random = np.random.default_rng()
    for _ in range(count):
        P, M = int(random.integers(2, 9)), int(random.integers(1, 14))
        name = str(random.choice(["gpipe", "1f1b", "interleaved", "interleaved", "interleaved"]))
        V, N = 1, None
        if name == "interleaved":
            V = int(random.integers(1, 5))
            N = int(random.integers(1, M + 4)) if V > 1 and random.random() < 0.8 else None
        yield schedule_of(name, P, M, V, N), N


def runs(table: np.ndarray) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """(micro-batch, virtual stage) of each rank's slots: where in (tick, rank) they lie."""
    found: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for tick, rank in zip(*np.nonzero(table[..., 0] != IDLE), strict=True):
        m, v = map(int, table[tick, rank])
        found.setdefault((m, v * table.shape[1] + rank), []).append((int(tick), int(rank)))
    return found


def check(schedule: Schedule, backwards: bool = True) -> None:
    P, V, M = schedule.stages, schedule.virtual, schedule.micro_batches
    forward, backward = runs(schedule.forward), runs(schedule.backward)
    everything = {(m, chunk) for m in range(M) for chunk in range(P * V)}
    assert forward.keys() == everything
    assert backward.keys() == (everything if backwards else set())
    for places in (*forward.values(), *backward.values()):
        assert len(places) == 1
    for (m, chunk), [(tick, rank)] in forward.items():
        assert rank == chunk % P
        assert chunk == 0 or forward[m, chunk - 1][0][0] < tick
    for (m, chunk), [(tick, rank)] in backward.items():
        assert rank == chunk % P
        assert forward[m, chunk][0][0] <= tick
        assert chunk == P * V - 1 or backward[m, chunk + 1][0][0] < tick


def promised(schedule: Schedule, N: int | None) -> list[int]:
    """The most (micro-batch, virtual stage) pairs in flight on each rank."""
    P, V, M = schedule.stages, schedule.virtual, schedule.micro_batches
    if schedule.name == "gpipe":
        return [M] * P
    if schedule.name == "1f1b":
        return [P - rank for rank in range(P)]
    return [2 * (P - 1 - rank) + (V - 1) * min(N or P, M) + 1 for rank in range(P)]


def test_every_chunk_runs_once_on_its_rank_after_what_it_needs_and_few_are_in_flight():
    for schedule, N in random_schedules(300):
        check(schedule)
        most = promised(schedule, N)
        for held, bound in zip(in_flight(schedule), most, strict=True):
            assert held <= bound, (schedule, N)


@pytest.mark.parametrize("P, M, V", [(2, 1, 1), (4, 3, 1), (4, 6, 3), (8, 5, 2)])
def test_forward_only(P, M, V):
    schedule = forward_only(MeshConfig(pipe=P, virtual_stages=V), M)
    check(schedule, backwards=False)
    if M % P == 0 or V == 1:
        assert schedule.ticks == M * V + P - 1


@pytest.mark.parametrize("P, M", [(2, 2), (4, 8), (8, 8), (4, 9), (8, 3)])
def test_where_micro_batches_are_enough_the_bounds_are_reached(P, M):
    assert in_flight(schedule_of("gpipe", P, M)) == [M] * P
    assert in_flight(schedule_of("1f1b", P, M)) == [min(P - rank, M) for rank in range(P)]
    held = [min(2 * (P - 1 - rank) + 1, M) for rank in range(P)]
    assert in_flight(schedule_of("interleaved", P, M)) == held


@pytest.mark.parametrize("P, V, N, M", [(4, 2, 4, 8), (4, 2, 8, 16), (2, 4, 2, 8), (4, 3, 5, 20)])
def test_more_contiguous_micro_batches_hold_more(P, V, N, M):
    held = in_flight(schedule_of("interleaved", P, M, V, N))
    assert held == [2 * (P - 1 - rank) + (V - 1) * N + 1 for rank in range(P)]
    assert in_flight(schedule_of("interleaved", P, M, V, N - 1))[0] < held[0]
    # All micro-batches in a row: the memory of all-forward-all-backward.
    everything = in_flight(schedule_of("interleaved", P, M, V, M))
    assert everything[0] >= M * V - M + 1


@pytest.mark.parametrize("cost", [1.0, 2.0, 3.5])
def test_bubbles_of_the_closed_forms(cost):
    """(P - 1) / M, and a V-th of it with V virtual stages (Narayanan et al. 2021, section 2.2)."""
    for P in (2, 3, 4, 8):
        for M in (1, 2, 5, 8, 16):
            for name in ("gpipe", "1f1b", "interleaved"):
                bubble = simulate(schedule_of(name, P, M), cost).bubble_free_running
                assert bubble == pytest.approx((P - 1) / M), (name, P, M)
            # No rank of these is ever kept from its next chunk by the meetings after each tick.
            for name in ("gpipe", "interleaved"):
                meeting = simulate(schedule_of(name, P, M), cost).bubble
                assert meeting == pytest.approx((P - 1) / M), (name, P, M)
        for V in (2, 3):
            for groups, N in ((1, P), (3, P), (2, 2 * P)):
                result = simulate(schedule_of("interleaved", P, groups * N, V, N), cost)
                expected = (P - 1) / (V * groups * N)
                assert result.bubble == pytest.approx(expected)
                assert result.bubble_free_running == pytest.approx(expected)


def test_meeting_after_every_tick_never_saves_time():
    for schedule, N in random_schedules(100):
        result = simulate(schedule, 2.0)
        ideal = (schedule.stages - 1) / (schedule.virtual * schedule.micro_batches)
        assert result.bubble >= result.bubble_free_running - 1e-9 >= ideal - 2e-9, (schedule, N)


def test_ticks_of_gpipe():
    for P, M in ((2, 1), (4, 8), (8, 3)):
        # The last rank runs its last forward and its first backward in the same tick.
        assert schedule_of("gpipe", P, M).ticks == 2 * (M + P - 1) - 1


def test_charts_by_hand():
    # Rank 0 may hold two: its forward of 2 waits for its backward of 0, a tick after rank 1's.
    assert chart(schedule_of("1f1b", 2, 3)).splitlines() == [
        "rank 0   F 0 1 . 2 . .",
        "         B . . 0 1 . 2",
        "rank 1   F . 0 1 . 2 .",
        "         B . 0 1 . 2 .",
    ]
    assert chart(schedule_of("interleaved", 2, 2, V=2)).splitlines() == [
        "rank 0   F 0a 1a 0b 1b  .  .  .  .",
        "         B  .  .  .  . 0b 1b 0a 1a",
        "rank 1   F  . 0a 1a 0b 1b  .  .  .",
        "         B  .  .  . 0b 1b 0a 1a  .",
    ]
    narrow = chart(schedule_of("gpipe", 4, 12), width=40).splitlines()
    assert all(line.endswith(" ...") and len(line) <= 44 for line in narrow)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(pipe=2, schedule="1f1b", virtual_stages=2), "virtual_stages=2 needs schedule='int"),
        (dict(pipe=2, schedule="gpipe", contiguous=4), "contiguous=4 needs schedule='interleaved'"),
        (dict(pipe=2, contiguous=4), "contiguous=4 needs virtual_stages of 2 or more"),
        (dict(data=2, virtual_stages=2), "virtual_stages=2 needs pipe of 2 or more"),
        (dict(pipe=2, schedule="zero bubble"), "mesh.schedule: Input should be 'gpipe'"),
        (dict(pipe=2, virtual_stages=0), "mesh.virtual_stages: Input should be greater than 0"),
    ],
)
def test_options_that_would_do_nothing_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        parse(MeshConfig, values, "mesh")
