"""Executes a pipeline schedule as one SPMD program, inside the step's `shard_map`.

A `lax.scan` over ticks; in a tick each rank may run one forward and one backward, or skip it, so
that an idle slot costs nothing; a ring exchange follows each. The first and the last ticks, in
which no rank has a backward or a forward, are scans of their own that exchange in one direction
only. What arrives too
early and what waits for its backward lies in buffers, whose slots are laid out beforehand from the
schedule: they are as large as the schedule's in-flight activations and no larger.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from llama3_jax.parallel.residuals import SplitLayer
from llama3_jax.parallel.schedule import IDLE, Schedule
from llama3_jax.parallel.stages import Stages

SCOPE = "pipeline."  # before the name of what a rank may skip


class Parts(NamedTuple):
    """The network's pieces as functions of one rank's arrays.

    inputs(m): what all layers share of micro-batch m. first(variables, shared) -> x: the embedding.
    layer(constants, variables, x, shared) -> ((x, loss), sums): one block, its part of the loss, and
    a tree with `combined`. last(variables, x, shared) -> (loss, sums): the head; `sums` is a tree to
    be added up. `ends` are the variables of first and last by name, `first_keys` and `last_keys`
    those that each needs.
    """

    inputs: Callable[[Array], Any]
    first: Callable[[dict, Any], Array]
    layer: Callable[[Any, Any, Array, Any], tuple[tuple[Array, Array], Any]]
    last: Callable[[dict, Array, Any], tuple[Array, Any]]
    first_keys: tuple[str, ...]
    last_keys: tuple[str, ...]


class Result(NamedTuple):
    """Of this rank alone: other ranks hold the rest. `layers` is stacked as the blocks are."""

    loss: Array
    sums: Any
    layers: Any
    block_gradients: Any
    end_gradients: dict
    ticks: Array


# ---------------------------------------------------------------------- slots of the buffers


class Plan(NamedTuple):
    """Per tick and rank: what to compute and which slots to use (-1: none); and buffer sizes."""

    table: dict[str, Int[np.ndarray, "ticks ranks"]]
    sizes: dict[str, int]


def make_plan(schedule: Schedule) -> Plan:
    """Lays every activation that has to wait into a slot of one of four buffers."""
    P, V, ticks = schedule.stages, schedule.virtual, schedule.ticks
    names = ("forward_m", "forward_v", "backward_m", "backward_v", "arrive", "take", "keep",
             "release", "final", "final_take", "arrive_back", "take_back")  # fmt: skip
    table = {name: np.full((ticks + 1, P), IDLE, np.int32) for name in names}
    f_tick, b_tick = {}, {}
    for tick in range(ticks):
        for rank in range(P):
            for ticks_of, source, label in (
                (f_tick, schedule.forward, "forward"), (b_tick, schedule.backward, "backward")
            ):  # fmt: skip
                m, v = map(int, source[tick, rank])
                if m != IDLE:
                    ticks_of[m, v * P + rank] = tick
                    table[f"{label}_m"][tick, rank], table[f"{label}_v"][tick, rank] = m, v
    last = P * V - 1
    sizes = dict.fromkeys(("arrived", "kept", "finals", "arrived_back"), 0)
    for rank in range(P):
        arrived, kept, finals, back = [], [], [], []
        for (m, chunk), tick in f_tick.items():
            if chunk % P != rank:
                continue
            if chunk > 0:
                arrived.append((f_tick[m, chunk - 1] + 1, tick))
            if (m, chunk) in b_tick:
                end = b_tick[m, chunk]
                kept.append((tick, end))
                if chunk == last:
                    finals.append((tick, end))
                else:
                    back.append((b_tick[m, chunk + 1] + 1, end))
        for buffer, spans, write, read in (
            ("arrived", arrived, "arrive", "take"), ("kept", kept, "keep", "release"),
            ("finals", finals, "final", "final_take"),
            ("arrived_back", back, "arrive_back", "take_back"),
        ):  # fmt: skip
            sizes[buffer] = max(sizes[buffer], _assign(spans, table[write], table[read], rank))
    return Plan({name: array[:ticks] for name, array in table.items()}, sizes)


def _assign(spans, write, read, rank) -> int:
    """Gives each span of ticks (both ends included) a slot that is free; returns how many slots."""
    free_from: list[int] = []
    for start, end in sorted(spans):
        slot = next((i for i, tick in enumerate(free_from) if tick <= start), len(free_from))
        if slot == len(free_from):
            free_from.append(0)
        free_from[slot] = end + 1
        write[start, rank] = read[end, rank] = slot
    return len(free_from)


# ---------------------------------------------------------------------- execution


def run_schedule(
    schedule: Schedule,
    stages: Stages,
    parts: Parts,
    blocks: tuple[Any, Any],
    ends: dict,
    loss_sums: tuple[Array, Any],
    activation: jax.ShapeDtypeStruct,
) -> Result:
    """Runs the schedule on this rank's blocks (constants, variables), stacked as in stages.py.

    `loss_sums` are zeros of what `last` returns; `activation` is what goes from stage to stage.
    Without backward slots in the schedule no gradients are computed and they come back as None.
    """
    P, V, most = schedule.stages, schedule.virtual, stages.most
    plan = make_plan(schedule)
    training = bool((schedule.backward != IDLE).any())
    rank = lax.axis_index("pipe")
    counts = jnp.asarray(stages.counts, jnp.int32)[rank]
    constants, variables = blocks
    x_zero = jnp.zeros(activation.shape, activation.dtype)

    def weights(place):
        index = functools.partial(lax.dynamic_index_in_dim, index=place, keepdims=False)
        return jax.tree.map(index, constants), jax.tree.map(index, variables)

    example = (*weights(0), x_zero, parts.inputs(jnp.int32(0)))
    split = SplitLayer(parts.layer, example) if training else None

    def if_present(layer, v, function, *operands):
        """A place of the stack that holds no layer is skipped."""
        if stages.even:
            return function(*operands)
        return _when("layer", layer < counts[v], function, *operands)

    def forward(carry, row):
        shared = parts.inputs(row["forward_m"])
        v = row["forward_v"]
        first_chunk, last_chunk = (rank == 0) & (v == 0), (rank == P - 1) & (v == V - 1)

        def embedding(_):
            return (parts.first({k: ends[k] for k in parts.first_keys}, shared),)

        (x,) = _when("embedding", first_chunk, embedding, _read(carry["arrived"], row["take"]))

        def layer(state, number):
            def apply(x, kept, layers, loss):
                place = v * most + number
                ((y, own_loss), own), new = _apply_layer(split, parts, weights(place), x, shared)
                so_far = jax.tree.map(lambda s: s[place], layers)
                layers = jax.tree.map(
                    lambda s, value: s.at[place].set(value), layers, so_far.combined(own)
                )
                slot = row["keep"] * most + number
                kept = [_write(b, slot, n) for b, n in zip(kept, new, strict=True)]
                return y, kept, layers, loss + own_loss

            return if_present(number, v, apply, *state), None

        (head_loss, sums) = carry["loss"]
        (x, kept, layers, head_loss), _ = lax.scan(
            layer, (x, carry["kept"], carry["layers"], head_loss), jnp.arange(most)
        )
        carry = carry | {"kept": kept, "layers": layers, "loss": (head_loss, sums)}
        if training:
            (finals,) = _when(
                "head", last_chunk, lambda b: (_write(b, row["final"], x),), carry["finals"]
            )
            return carry | {"finals": finals, "sent": x}

        def head(loss):
            own = {k: ends[k] for k in parts.last_keys}
            return (_add(parts.last(own, x, shared), loss),)

        (loss,) = _when("head", last_chunk, head, carry["loss"])
        return carry | {"loss": loss, "sent": x}

    def backward(carry, row):
        shared = parts.inputs(row["backward_m"])
        v = row["backward_v"]
        first_chunk, last_chunk = (rank == 0) & (v == 0), (rank == P - 1) & (v == V - 1)

        def from_head(_, end_gradients, loss):
            own = {k: ends[k] for k in parts.last_keys}
            x = _read(carry["finals"], row["final_take"])
            value, vjp, sums = jax.vjp(
                lambda own, x: parts.last(own, x, shared), own, x, has_aux=True
            )
            gradients, dx = vjp(jnp.ones_like(value))
            return dx, _add_keys(end_gradients, gradients), _add((value, sums), loss)

        dx = _read(carry["arrived_back"], row["take_back"])
        dx, end_gradients, loss = _when(
            "head", last_chunk, from_head, dx, carry["end_gradients"], carry["loss"]
        )

        def layer(state, number):
            def apply(dx, accumulated):
                place = v * most + number
                slot = row["release"] * most + number
                kept = [_read(buffer, slot) for buffer in carry["kept"]]
                gradients, dx = split.backward(kept, *weights(place), x_zero, shared, dx)
                add = lambda a, g: a.at[place].add(g.astype(a.dtype))  # noqa: E731
                return dx, jax.tree.map(add, accumulated, gradients)

            return if_present(number, v, apply, *state), None

        (dx, block_gradients), _ = lax.scan(
            layer, (dx, carry["block_gradients"]), jnp.arange(most), reverse=True
        )

        def to_embedding(end_gradients):
            own = {k: ends[k] for k in parts.first_keys}
            _, vjp = jax.vjp(lambda own: parts.first(own, shared), own)
            return (_add_keys(end_gradients, vjp(dx)[0]),)

        (end_gradients,) = _when("embedding", first_chunk, to_embedding, end_gradients)
        return carry | {
            "block_gradients": block_gradients, "end_gradients": end_gradients, "loss": loss,
            "sent_back": dx,
        }  # fmt: skip

    def tick(directions: tuple[str, ...], carry, row):
        row = {name: values[rank] for name, values in row.items()}
        if "forward" in directions:
            arrived = _write_if(carry["arrived"], row["arrive"], carry["sent"])
            carry = carry | {"arrived": arrived}
        if "backward" in directions:
            arrived = _write_if(carry["arrived_back"], row["arrive_back"], carry["sent_back"])
            carry = carry | {"arrived_back": arrived}
        if "forward" in directions:
            (carry,) = _when(
                "forward", row["forward_m"] != IDLE, lambda c: (forward(c, row),), carry
            )
            sent = lax.ppermute(carry["sent"], "pipe", [(r, (r + 1) % P) for r in range(P)])
            carry = carry | {"sent": sent}
        if "backward" in directions:
            (carry,) = _when(
                "backward", row["backward_m"] != IDLE, lambda c: (backward(c, row),), carry
            )
            back = lax.ppermute(carry["sent_back"], "pipe", [(r, (r - 1) % P) for r in range(P)])
            carry = carry | {"sent_back": back}
        return carry | {"ticks": carry["ticks"] + 1}, None

    def buffer(size, shape, dtype):
        return jnp.zeros((size, *shape), dtype)

    kept = [] if split is None else split.shapes()
    _, own = jax.eval_shape(parts.layer, *example)
    layers = jax.tree.map(lambda s: buffer(V * most, s.shape, s.dtype), own)
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    carry = {
        "arrived": buffer(max(plan.sizes["arrived"], 1), x_zero.shape, x_zero.dtype),
        "arrived_back": buffer(max(plan.sizes["arrived_back"], 1), x_zero.shape, x_zero.dtype),
        "finals": buffer(max(plan.sizes["finals"], 1), x_zero.shape, x_zero.dtype),
        "kept": [buffer(plan.sizes["kept"] * most, s.shape, s.dtype) for s in kept],
        "sent": x_zero,
        "sent_back": x_zero,
        "loss": loss_sums,
        "layers": layers,
        "block_gradients": zeros(variables) if training else None,
        "end_gradients": zeros(ends) if training else None,
        "ticks": jnp.int32(0),
    }
    for directions, ticks in schedule.phases():
        rows = {name: jnp.asarray(values[ticks]) for name, values in plan.table.items()}
        carry, _ = lax.scan(functools.partial(tick, directions), carry, rows)
    loss, sums = carry["loss"]
    gradients = carry["block_gradients"], carry["end_gradients"]
    return Result(loss, sums, carry["layers"], *gradients, carry["ticks"])


def _when(name: str, condition: Array, function: Callable, *state: Any) -> Any:
    """`function(*state)` where the condition holds on this rank, else `state`.

    A loop of one turn or none, which works in place: XLA copies what passes through a conditional,
    and here that is every gradient accumulator, in every tick. The name stands in the compiled
    program, where planning/hlo.py reads it.
    """
    with jax.named_scope(f"{SCOPE}{name}"):
        return lax.while_loop(
            lambda loop: loop[0],
            lambda loop: (jnp.array(False), function(*loop[1])),
            (condition, state),
        )[1]


def _apply_layer(split, parts, weights, x, shared) -> tuple[Any, list[Array]]:
    if split is None:
        return parts.layer(*weights, x, shared), []
    return split.forward(*weights, x, shared)


def _read(buffer: Array, slot: Array) -> Array:
    return lax.dynamic_index_in_dim(buffer, slot, keepdims=False)


def _write(buffer: Array, slot: Array, value: Array) -> Array:
    return lax.dynamic_update_index_in_dim(buffer, value, slot, 0)


def _write_if(buffer: Array, slot: Array, value: Array) -> Array:
    """Writes where there is a slot; otherwise slot 0 keeps what it holds."""
    at = jnp.maximum(slot, 0)
    return _write(buffer, at, jnp.where(slot >= 0, value, _read(buffer, at)))


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def _add_keys(total: dict, part: dict) -> dict:
    return total | {key: _add(total[key], value) for key, value in part.items()}
