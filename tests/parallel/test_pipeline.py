"""The executor: slots of its buffers, and a toy network on pipelines of every kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from llama3_jax.model.sowing import LayerSums, moments
from llama3_jax.parallel.mesh import MeshConfig, make_mesh
from llama3_jax.parallel.pipeline import Parts, make_plan, run_schedule
from llama3_jax.parallel.schedule import (
    IDLE,
    Schedule,
    forward_only,
    in_flight,
    make_schedule,
    simulate,
)
from llama3_jax.parallel.stages import from_stages, make_stages, to_stages
from tests.parallel.test_schedule import random_schedules

# ---------------------------------------------------------------------- slots


class Buffer(dict):
    """Slots with (micro-batch, chunk) in place of activations."""

    def __init__(self, size: int):
        self.size = size

    def write(self, slot: int, value: tuple[int, int]) -> None:
        assert 0 <= slot < self.size and value is not None
        self[slot] = value


def play(schedule: Schedule) -> None:
    """Does with names what the executor does with activations, and looks at what it reads."""
    plan, P = make_plan(schedule), schedule.stages
    last = P * schedule.virtual - 1
    buffers = [{name: Buffer(size) for name, size in plan.sizes.items()} for _ in range(P)]
    sent, sent_back = [None] * P, [None] * P
    backwards = (schedule.backward != IDLE).any()
    for tick in range(schedule.ticks):
        to_next, to_previous = [None] * P, [None] * P
        for rank, held in enumerate(buffers):
            row = {name: int(values[tick, rank]) for name, values in plan.table.items()}
            if row["arrive"] != IDLE:
                held["arrived"].write(row["arrive"], sent[rank])
            if row["arrive_back"] != IDLE:
                held["arrived_back"].write(row["arrive_back"], sent_back[rank])
            m, chunk = row["forward_m"], row["forward_v"] * P + rank
            assert (m, row["forward_v"]) == tuple(schedule.forward[tick, rank])
            if m != IDLE:
                assert chunk == 0 or held["arrived"][row["take"]] == (m, chunk - 1)
                if backwards:
                    held["kept"].write(row["keep"], (m, chunk))
                    if chunk == last:
                        held["finals"].write(row["final"], (m, chunk))
                to_next[(rank + 1) % P] = (m, chunk)
            m, chunk = row["backward_m"], row["backward_v"] * P + rank
            assert (m, row["backward_v"]) == tuple(schedule.backward[tick, rank])
            if m != IDLE:
                if chunk == last:
                    assert held["finals"][row["final_take"]] == (m, chunk)
                else:
                    assert held["arrived_back"][row["take_back"]] == (m, chunk + 1)
                assert held["kept"][row["release"]] == (m, chunk)
                to_previous[(rank - 1) % P] = (m, chunk)
        sent, sent_back = to_next, to_previous


def test_every_slot_still_holds_what_was_put_there_when_it_is_read():
    for schedule, _ in random_schedules(100):
        play(schedule)
    for P, M, V in ((2, 1, 1), (4, 6, 3), (8, 5, 2)):
        play(forward_only(MeshConfig(pipe=P, virtual_stages=V), M))


def test_no_more_is_kept_than_the_schedule_has_in_flight():
    for schedule, _ in random_schedules(100):
        assert make_plan(schedule).sizes["kept"] == max(in_flight(schedule))
    sizes = make_plan(forward_only(MeshConfig(pipe=4, virtual_stages=2), 8)).sizes
    assert sizes["kept"] == sizes["finals"] == sizes["arrived_back"] == 0


# ---------------------------------------------------------------------- execution

WIDTH, ROWS = 3, 2


def layer(constants, variables, x, shared):
    return x + jnp.tanh(x * variables["w"] + constants["b"]) * shared["scale"]


def toy(random: np.random.Generator, layers: int, micro_batches: int):
    """Blocks as (constants, variables), ends, and a batch with a leading micro-batch dimension."""

    def normal(*shape):
        return random.normal(size=shape).astype(np.float32)

    blocks = {"b": normal(layers, WIDTH)}, {"w": normal(layers, WIDTH)}
    ends = {"embedding": normal(WIDTH), "head": normal(WIDTH)}
    batch = {"x": normal(micro_batches, ROWS, WIDTH), "scale": normal(micro_batches, ROWS, 1)}
    return blocks, ends, batch


def own_loss(x):
    """What a layer adds to the loss."""
    return 0.1 * jnp.sum(x**2)


def serial(blocks, ends, batch):
    """Loss and gradients of the blocks' variables and the ends, one layer after the other."""
    constants, variables = blocks

    def loss(variables, ends):
        x, auxiliary = batch["x"] * ends["embedding"], 0.0
        for number in range(len(variables["w"])):
            here = [jax.tree.map(lambda a: a[number], tree) for tree in (constants, variables)]  # noqa: B023
            x = layer(*here, x, batch)
            auxiliary = auxiliary + own_loss(x)
        return jnp.sum((x * ends["head"]) ** 2) + auxiliary

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(variables, ends)


def piped(schedule: Schedule, config: MeshConfig, blocks, ends, batch):
    """The same by the executor; and how many ticks each rank ran."""
    layout = make_mesh(config, jax.devices()[: config.pipe])
    stages = make_stages(len(blocks[1]["w"]), config)
    blocks = to_stages(blocks, stages)

    def layer_and_loss(*arguments):
        x = layer(*arguments)
        sums = LayerSums({"own": own_loss(x)}, {"x": moments(x)})
        return (x, own_loss(x)), sums

    def on_rank(blocks, ends, batch):
        parts = Parts(
            inputs=lambda m: jax.tree.map(lambda x: x[m], batch),
            first=lambda own, shared: shared["x"] * own["embedding"],
            layer=layer_and_loss,
            last=lambda own, x, shared: (jnp.sum((x * own["head"]) ** 2), jnp.int32(1)),
            first_keys=("embedding",),
            last_keys=("head",),
        )
        activation = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
        zeros = jnp.float32(0), jnp.int32(0)
        result = run_schedule(schedule, stages, parts, blocks, ends, zeros, activation)
        everywhere = (result.loss, result.sums, result.end_gradients)
        return jax.lax.psum(everywhere, "pipe"), result.block_gradients, result.ticks[None]

    pipe, all_ = PartitionSpec("pipe"), PartitionSpec()
    function = jax.shard_map(
        on_rank, mesh=layout.mesh, in_specs=(pipe, all_, all_),
        out_specs=(all_, pipe, pipe), check_vma=False,
    )  # fmt: skip
    (loss, count, end_gradients), gradients, ticks = jax.jit(function)(blocks, ends, batch)
    if gradients is not None:
        gradients = from_stages(gradients, stages)
    return loss, int(count), gradients, end_gradients, ticks.tolist()


def random_cases():
    """Each number of stages with each schedule once; the rest is drawn anew in every run."""
    random = np.random.default_rng()
    for P in (2, 4, 8):
        for name in ("gpipe", "1f1b", "interleaved"):
            V = int(random.integers(2, 4)) if name == "interleaved" else 1
            N = int(random.integers(1, 7)) if V > 1 else None
            M, layers = int(random.integers(1, 9)), int(random.integers(1, 2 * P * V))
            values = dict(pipe=P, schedule=name, virtual_stages=V, contiguous=N)
            # What was drawn stays out of the name: pytest's workers must agree on names.
            yield pytest.param(MeshConfig(**values), M, layers, id=f"{name}-P{P}")


@pytest.mark.parametrize("config, micro_batches, layers", list(random_cases()))
def test_loss_gradients_and_ticks_of_a_toy_network(config, micro_batches, layers):
    print(config, f"{micro_batches} micro-batches, {layers} layers")  # shown where it fails
    network = toy(np.random.default_rng(), layers, micro_batches)
    loss, (gradients, end_gradients) = serial(*network)
    schedule = make_schedule(config, micro_batches)
    ours, count, ours_blocks, ours_ends, ticks = piped(schedule, config, *network)
    assert count == micro_batches
    assert ticks == [simulate(schedule).ticks] * config.pipe
    np.testing.assert_allclose(ours, loss, rtol=1e-5)
    for own, reference in zip(
        jax.tree.leaves((ours_blocks, ours_ends)),
        jax.tree.leaves((gradients, end_gradients)),
        strict=True,
    ):
        np.testing.assert_allclose(own, reference, rtol=1e-4, atol=1e-5 * np.abs(reference).max())


def test_without_a_backward_the_loss_is_the_same():
    network = toy(np.random.default_rng(), 7, 5)
    config = MeshConfig(pipe=4, virtual_stages=2)
    schedule = forward_only(config, 5)
    loss, count, gradients, end_gradients, ticks = piped(schedule, config, *network)
    np.testing.assert_allclose(loss, serial(*network)[0], rtol=1e-5)
    assert (count, gradients, end_gradients) == (5, None, None)
    assert ticks == [schedule.ticks] * 4
