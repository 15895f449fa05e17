"""Executes a pipeline schedule as one SPMD program, inside the step's `shard_map`.

A `lax.scan` over ticks; in a tick each rank may run one forward and one backward, or skip it, so
that an idle slot costs nothing; a ring exchange follows each. The first and the last ticks, in
which no rank has a backward or a forward, are scans of their own that exchange in one direction
only. What arrives too
early and what waits for its backward is in buffers, whose slots are laid out beforehand from the
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
    plan = make_plan(schedule)
    run = _Rank(schedule, stages, parts, blocks, ends, activation)
    carry = run.start(plan.sizes, loss_sums)
    for directions, ticks in schedule.phases():
        rows = {name: jnp.asarray(values[ticks]) for name, values in plan.table.items()}
        carry, _ = lax.scan(functools.partial(run.tick, directions), carry, rows)
    loss, sums = carry["loss"]
    gradients = carry["block_gradients"], carry["end_gradients"]
    return Result(loss, sums, carry["layers"], *gradients, carry["ticks"])


class _Rank:
    """What a rank does in a tick. What goes from tick to tick is `carry`, a dict: the buffers, what
    is sent, and the sums. A tick's `row` says which micro-batch and slots (`make_plan`)."""

    def __init__(self, schedule: Schedule, stages: Stages, parts: Parts, blocks, ends, activation):
        self.P, self.V, self.most = schedule.stages, schedule.virtual, stages.most
        self.parts, self.blocks, self.ends = parts, blocks, ends
        self.number = lax.axis_index("pipe")
        self.even = stages.even
        self.counts = jnp.asarray(stages.counts, jnp.int32)[self.number]
        self.x_zero = jnp.zeros(activation.shape, activation.dtype)
        self.example = (*self.weights(0), self.x_zero, parts.inputs(jnp.int32(0)))
        self.training = bool((schedule.backward != IDLE).any())
        self.split = SplitLayer(parts.layer, self.example) if self.training else None

    def start(self, sizes: dict[str, int], loss_sums: tuple[Array, Any]) -> dict[str, Any]:
        """The carry before the first tick."""

        def buffer(size, s):
            return jnp.zeros((size, *s.shape), s.dtype)

        _, sown = jax.eval_shape(self.parts.layer, *self.example)
        kept = self.split.shapes() if self.split else []
        zeros = functools.partial(jax.tree.map, jnp.zeros_like)
        waiting = ("arrived", "arrived_back", "finals")
        return {name: buffer(max(sizes[name], 1), self.x_zero) for name in waiting} | {
            "kept": [buffer(sizes["kept"] * self.most, s) for s in kept],
            "sent": self.x_zero,
            "sent_back": self.x_zero,
            "loss": loss_sums,
            "layers": jax.tree.map(functools.partial(buffer, self.V * self.most), sown),
            "block_gradients": zeros(self.blocks[1]) if self.training else None,
            "end_gradients": zeros(self.ends) if self.training else None,
            "ticks": jnp.int32(0),
        }

    def tick(self, directions: tuple[str, ...], carry: dict, row: dict) -> tuple[dict, None]:
        """What arrived is stored; then a forward and its exchange, a backward and its exchange."""
        row = {name: values[self.number] for name, values in row.items()}
        if "forward" in directions:
            arrived = _write_if(carry["arrived"], row["arrive"], carry["sent"])
            carry = carry | {"arrived": arrived}
        if "backward" in directions:
            arrived = _write_if(carry["arrived_back"], row["arrive_back"], carry["sent_back"])
            carry = carry | {"arrived_back": arrived}
        if "forward" in directions:
            busy = row["forward_m"] != IDLE
            (carry,) = _when("forward", busy, lambda c: (self.forward(c, row),), carry)
            carry = carry | {"sent": self.exchange(carry["sent"], 1)}
        if "backward" in directions:
            busy = row["backward_m"] != IDLE
            (carry,) = _when("backward", busy, lambda c: (self.backward(c, row),), carry)
            carry = carry | {"sent_back": self.exchange(carry["sent_back"], -1)}
        return carry | {"ticks": carry["ticks"] + 1}, None

    def forward(self, carry: dict, row: dict) -> dict:
        """One micro-batch through one virtual stage."""
        parts, shared, v = self.parts, self.parts.inputs(row["forward_m"]), row["forward_v"]

        def embedding(_):
            return (parts.first(self.own_ends(parts.first_keys), shared),)

        x = _read(carry["arrived"], row["take"])
        (x,) = _when("embedding", self.is_first(v), embedding, x)

        def layer(state, number):
            def apply(x, kept, layers, loss):
                place, slot = v * self.most + number, row["keep"] * self.most + number
                ((y, own_loss), own), new = self.apply_layer(place, x, shared)
                so_far = jax.tree.map(lambda s: s[place], layers)
                layers = jax.tree.map(
                    lambda s, value: s.at[place].set(value), layers, so_far.combined(own)
                )
                kept = [_write(b, slot, n) for b, n in zip(kept, new, strict=True)]
                return y, kept, layers, loss + own_loss

            return self.if_present(number, v, apply, *state), None

        loss, sums = carry["loss"]
        state = (x, carry["kept"], carry["layers"], loss)
        (x, kept, layers, loss), _ = lax.scan(layer, state, jnp.arange(self.most))
        carry = carry | {"kept": kept, "layers": layers, "loss": (loss, sums), "sent": x}
        if self.training:  # the head runs where the backward begins
            store = lambda finals: (_write(finals, row["final"], x),)  # noqa: E731
            (finals,) = _when("head", self.is_last(v), store, carry["finals"])
            return carry | {"finals": finals}

        def head(loss):
            return (_add(parts.last(self.own_ends(parts.last_keys), x, shared), loss),)

        (loss,) = _when("head", self.is_last(v), head, carry["loss"])
        return carry | {"loss": loss}

    def backward(self, carry: dict, row: dict) -> dict:
        """One micro-batch back through one virtual stage."""
        parts, shared, v = self.parts, self.parts.inputs(row["backward_m"]), row["backward_v"]

        def from_head(_, end_gradients, loss):
            x = _read(carry["finals"], row["final_take"])
            value, vjp, sums = jax.vjp(
                lambda own, x: parts.last(own, x, shared), self.own_ends(parts.last_keys), x,
                has_aux=True,
            )  # fmt: skip
            gradients, dx = vjp(jnp.ones_like(value))
            return dx, _add_keys(end_gradients, gradients), _add((value, sums), loss)

        dx = _read(carry["arrived_back"], row["take_back"])
        dx, end_gradients, loss = _when(
            "head", self.is_last(v), from_head, dx, carry["end_gradients"], carry["loss"]
        )

        def layer(state, number):
            def apply(dx, accumulated):
                place, slot = v * self.most + number, row["release"] * self.most + number
                kept = [_read(buffer, slot) for buffer in carry["kept"]]
                gradients, dx = self.split.backward(
                    kept, *self.weights(place), self.x_zero, shared, dx
                )
                add = lambda a, g: a.at[place].add(g.astype(a.dtype))  # noqa: E731
                return dx, jax.tree.map(add, accumulated, gradients)

            return self.if_present(number, v, apply, *state), None

        state = (dx, carry["block_gradients"])
        (dx, block_gradients), _ = lax.scan(layer, state, jnp.arange(self.most), reverse=True)

        def to_embedding(end_gradients):
            own = self.own_ends(parts.first_keys)
            _, vjp = jax.vjp(lambda own: parts.first(own, shared), own)
            return (_add_keys(end_gradients, vjp(dx)[0]),)

        (end_gradients,) = _when("embedding", self.is_first(v), to_embedding, end_gradients)
        return carry | {
            "block_gradients": block_gradients, "end_gradients": end_gradients, "loss": loss,
            "sent_back": dx,
        }  # fmt: skip

    def apply_layer(self, place: Array, x: Array, shared: Any) -> tuple[Any, list[Array]]:
        """What `Parts.layer` returns, and what its backward needs."""
        if self.split is None:
            return self.parts.layer(*self.weights(place), x, shared), []
        return self.split.forward(*self.weights(place), x, shared)

    def weights(self, place: Array | int) -> tuple[Any, Any]:
        """Constants and variables of the layer at a place of the stack."""
        index = functools.partial(lax.dynamic_index_in_dim, index=place, keepdims=False)
        return jax.tree.map(index, self.blocks)

    def own_ends(self, names: tuple[str, ...]) -> dict:
        return {name: self.ends[name] for name in names}

    def is_first(self, v: Array) -> Array:
        return (self.number == 0) & (v == 0)

    def is_last(self, v: Array) -> Array:
        return (self.number == self.P - 1) & (v == self.V - 1)

    def if_present(self, layer: Array, v: Array, function: Callable, *operands: Any) -> Any:
        """A place of the stack that holds no layer is skipped."""
        if self.even:
            return function(*operands)
        return _when("layer", layer < self.counts[v], function, *operands)

    def exchange(self, x: Array, step: int) -> Array:
        ring = [(rank, (rank + step) % self.P) for rank in range(self.P)]
        return lax.ppermute(x, "pipe", ring)


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
