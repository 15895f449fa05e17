"""Pipeline schedules as data: which rank computes what, tick by tick, and what that costs.

The network is cut in P x V chunks of layers; chunk c is on rank c mod P as its virtual stage
c // P (interleaving: Narayanan et al. 2021, arXiv 2104.04473, section 2.2). In one tick a rank runs
at most one forward and then at most one backward, each for one micro-batch through one chunk, and
passes the results to its neighbours. `make_schedule` plays the ranks' orders against each other;
what comes out is a table that parallel/pipeline.py executes as it stands.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from llama3_jax.parallel.mesh import MeshConfig

IDLE = -1


class Schedule(NamedTuple):
    """`forward[t, r]` and `backward[t, r]` are the (micro-batch, virtual stage) of rank r in tick
    t, or (IDLE, IDLE)."""

    name: str
    stages: int
    virtual: int
    micro_batches: int
    forward: Int[np.ndarray, "ticks ranks 2"]
    backward: Int[np.ndarray, "ticks ranks 2"]

    @property
    def ticks(self) -> int:
        return len(self.forward)

    def phases(self) -> list[tuple[tuple[str, ...], slice]]:
        """Ranges of ticks, and whether any rank runs a forward or a backward in them."""
        forward = np.flatnonzero((self.forward[..., 0] != IDLE).any(1))
        backward = np.flatnonzero((self.backward[..., 0] != IDLE).any(1))
        first_backward = backward[0] if len(backward) else self.ticks
        both = min(first_backward, forward[-1] + 1), forward[-1] + 1
        phases = [
            (("forward",), slice(0, both[0])), (("forward", "backward"), slice(*both)),
            (("backward",), slice(both[1], self.ticks)),
        ]  # fmt: skip
        return [(what, ticks) for what, ticks in phases if ticks.start < ticks.stop]

    def exchanges(self, direction: str) -> int:
        """Ticks that end in a ring exchange of this direction."""
        return sum(t.stop - t.start for what, t in self.phases() if direction in what)


def make_schedule(config: MeshConfig, micro_batches: int) -> Schedule:
    """The schedule that the config names.

    - gpipe (Huang et al. 2019): all forwards, then all backwards.
    - 1f1b (Narayanan et al. 2021): rank r holds at most P - r micro-batches.
    - interleaved: virtual stages, `contiguous` (N) micro-batches in a row on each. N = P holds the
      fewest activations, N = all micro-batches is all-forward-all-backward in memory; it need not
      divide the number of micro-batches (Llama 3 paper, section 3.3.2, figure 6).
    """
    P, V, M = config.pipe, config.virtual_stages, micro_batches
    N = config.contiguous_or(M)
    forwards = _order(M, V, N, reverse=False)
    backwards = _order(M, V, N, reverse=True)
    return _play(config.schedule, P, V, M, forwards, backwards, in_flight_limits(config, M))


def in_flight_limits(config: MeshConfig, micro_batches: int) -> list[int]:
    """For each rank how many (micro-batch, virtual stage) pairs it may hold at once."""
    P, V, M = config.pipe, config.virtual_stages, micro_batches
    if config.schedule == "gpipe":
        return [M * V] * P
    if config.schedule == "1f1b":
        return [min(P - rank, M) for rank in range(P)]
    N = config.contiguous_or(M)
    return [min(2 * (P - 1 - rank) + (V - 1) * N + 1, M * V) for rank in range(P)]


def forward_only(config: MeshConfig, micro_batches: int) -> Schedule:
    """For validation: no backward, nothing kept."""
    P, V, M = config.pipe, config.virtual_stages, micro_batches
    order = _order(M, V, min(P, M), reverse=False)
    return _play("forward", P, V, M, order, [], [M * V] * P)


def _order(M: int, V: int, N: int, reverse: bool) -> list[tuple[int, int]]:
    """(micro-batch, virtual stage) in the order in which a rank takes them."""
    stages = range(V - 1, -1, -1) if reverse else range(V)
    return [
        (m, v) for start in range(0, M, N) for v in stages for m in range(start, min(start + N, M))
    ]


def _play(name, P, V, M, forwards, backwards, limits) -> Schedule:
    """Ticks until every rank has done its list; each takes the next item as soon as it may."""
    forward_tick: dict[tuple[int, int], int] = {}  # (micro-batch, chunk) -> tick
    backward_tick: dict[tuple[int, int], int] = {}
    done = np.zeros((2, P), int)
    table: list[np.ndarray] = []
    while (done[0] < len(forwards)).any() or (done[1] < len(backwards)).any():
        tick, row = len(table), np.full((2, P, 2), IDLE)
        for rank in range(P):
            if done[0, rank] < len(forwards) and done[0, rank] - done[1, rank] < limits[rank]:
                m, v = forwards[done[0, rank]]
                chunk = v * P + rank
                if chunk == 0 or forward_tick.get((m, chunk - 1), tick) < tick:
                    forward_tick[m, chunk], row[0, rank] = tick, (m, v)
                    done[0, rank] += 1
            # GPipe flushes: no backward before the last forward.
            waits = name == "gpipe" and done[0, rank] < len(forwards)
            if done[1, rank] < len(backwards) and not waits:
                m, v = backwards[done[1, rank]]
                chunk = v * P + rank
                if chunk == P * V - 1:
                    ready = forward_tick.get((m, chunk), tick + 1) <= tick
                else:
                    ready = backward_tick.get((m, chunk + 1), tick) < tick
                if ready:
                    backward_tick[m, chunk], row[1, rank] = tick, (m, v)
                    done[1, rank] += 1
        # Never: the limits let each group through all of its virtual stages to its first backward.
        assert (row != IDLE).any(), f"schedule {name} of {P} x {V} stages stands still"
        table.append(row)
    ticks = np.array(table, np.int32)
    return Schedule(name, P, V, M, ticks[:, 0], ticks[:, 1])


# ---------------------------------------------------------------------- what a schedule costs


class Simulation(NamedTuple):
    """Times are in units of one chunk's forward.

    `bubble` is idle time over busy time of the schedule as executed, where neighbours meet after
    every tick; `bubble_free_running` the same when each rank waits only for what it needs.
    `in_flight` is the most (micro-batch, chunk) pairs whose activations a rank holds, by rank.
    """

    ticks: int
    time: float
    bubble: float
    bubble_free_running: float
    in_flight: tuple[int, ...]


def simulate(schedule: Schedule, backward_cost: float = 2.0) -> Simulation:
    """What `schedule` takes when a backward costs `backward_cost` forwards and sending nothing."""
    ones = np.ones((schedule.stages, schedule.virtual))
    busy = _busy_time(schedule, backward_cost)
    time = simulate_times(schedule, ones, backward_cost * ones)
    free = _time_free_running(schedule, backward_cost)
    return Simulation(
        schedule.ticks, time, time / busy - 1, free / busy - 1, tuple(in_flight(schedule))
    )


def _busy_time(schedule: Schedule, backward_cost: float) -> float:
    """Of one rank; every rank has the same amount of work."""
    forwards = int((schedule.forward[:, 0, 0] != IDLE).sum())
    return forwards + backward_cost * int((schedule.backward[:, 0, 0] != IDLE).sum())


def simulate_times(
    schedule: Schedule,
    forward: Float[np.ndarray, "ranks virtual"],
    backward: Float[np.ndarray, "ranks virtual"],
) -> float:
    """The time of `schedule` as executed, where each chunk takes a time of its own.

    Neighbours meet after every tick: the ring exchange waits for both.
    """
    clock = np.zeros(schedule.stages)
    work = np.zeros((schedule.ticks, schedule.stages))
    ranks = np.arange(schedule.stages)
    for items, times in ((schedule.forward, forward), (schedule.backward, backward)):
        work += np.where(items[..., 0] != IDLE, times[ranks, items[..., 1]], 0.0)
    for tick in work:
        clock = clock + tick
        clock = np.maximum(clock, np.maximum(np.roll(clock, 1), np.roll(clock, -1)))
    return float(clock.max())


def _time_free_running(schedule: Schedule, backward_cost: float) -> float:
    P, last = schedule.stages, schedule.stages * schedule.virtual - 1
    clock, forward_end, backward_end = np.zeros(P), {}, {}
    for tick in range(schedule.ticks):
        # Within a tick what comes in was made in earlier ticks, so ranks may be taken in any order.
        for rank in range(P):
            m, v = map(int, schedule.forward[tick, rank])
            if m != IDLE:
                chunk = v * P + rank
                ready = forward_end[m, chunk - 1] if chunk else 0.0
                clock[rank] = forward_end[m, chunk] = max(clock[rank], ready) + 1
            m, v = map(int, schedule.backward[tick, rank])
            if m != IDLE:
                chunk = v * P + rank
                ready = forward_end[m, chunk] if chunk == last else backward_end[m, chunk + 1]
                clock[rank] = backward_end[m, chunk] = max(clock[rank], ready) + backward_cost
    return float(clock.max())


def in_flight(schedule: Schedule) -> list[int]:
    """For each rank the most (micro-batch, virtual stage) pairs between forward and backward."""
    started = np.cumsum(schedule.forward[..., 0] != IDLE, axis=0)
    ended = np.cumsum(schedule.backward[..., 0] != IDLE, axis=0)
    before = np.vstack([np.zeros((1, schedule.stages), int), ended[:-1]])
    return (started - before).max(0).tolist()


def chart(schedule: Schedule, width: int | None = None) -> str:
    """One line a rank, one column a tick: forward over backward, micro-batch number and, with
    virtual stages, a letter for the stage; `.` is idle."""

    def cell(item: np.ndarray) -> str:
        m, v = map(int, item)
        return "." if m == IDLE else f"{m}{chr(ord('a') + v) if schedule.virtual > 1 else ''}"

    lines = []
    size = max(len(str(schedule.micro_batches - 1)) + (schedule.virtual > 1), 1) + 1
    shown = schedule.ticks if width is None else min(schedule.ticks, max((width - 11) // size, 1))
    for rank in range(schedule.stages):
        for label, table in (("F", schedule.forward), ("B", schedule.backward)):
            cells = "".join(cell(table[tick, rank]).rjust(size) for tick in range(shown))
            name = f"rank {rank:<3}" if label == "F" else " " * 8
            lines.append(f"{name} {label}{cells}{' ...' if shown < schedule.ticks else ''}")
    return "\n".join(lines)
