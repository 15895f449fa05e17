"""Pipeline schedules on 8 CPU devices: time against the simulator's bubble, memory from the compiler.

    python -m experiments.benchmarks.pipeline --json=FILE

**Time.** Eight CPU devices share the machine's few cores: while one rank idles another computes, so
the time of a computing step shows no bubble. Here a layer therefore does not compute, it sleeps:
--layer_ms forward, and --backward_cost times that backward. Sleeping ranks overlap on any machine,
and all the rest is what a training step runs: `parallel/pipeline.py` executes the schedule on 8
ranks, with its buffers and exchanges, gradients included. Its peer, measured in turn
with it, has no pipeline: 8 data ranks with all layers each, the same sleeps in all. Measured over
the peer's time, minus one, is the measured bubble. Beside it stand the simulator's: of ranks that
wait for nothing but what they need ("free"), that meet their neighbours after every tick ("met", as
the executed program asks), and all of whom meet in both exchanges of a tick ("all met", which is
how XLA's CPU exchanges happen to work).

**Memory.** The training step of a small model, compiled for the same 8 ranks and as many
micro-batches under every schedule: temporary memory of a device as XLA's buffer assignment has it.
Nothing is run for that.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import PartitionSpec
from rich.console import Console
from rich.progress import track
from rich.table import Table

from llama3_jax import cli
from llama3_jax.files import write_json
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.sowing import LayerSums
from llama3_jax.parallel.mesh import MeshConfig, make_mesh
from llama3_jax.parallel.pipeline import Parts, run_schedule
from llama3_jax.parallel.schedule import IDLE, Schedule, make_schedule, simulate
from llama3_jax.parallel.stages import make_stages, to_stages
from llama3_jax.training.optimizer import OptimizerConfig
from llama3_jax.training.state import abstract_state
from llama3_jax.training.step import compile_step

RANKS = 8
SCHEDULES = {
    "gpipe": dict(schedule="gpipe"),
    "1f1b": dict(schedule="1f1b"),
    "interleaved V=1": dict(schedule="interleaved"),
    "interleaved V=2 N=4": dict(schedule="interleaved", virtual_stages=2, contiguous=4),
    "interleaved V=2 N=8": dict(schedule="interleaved", virtual_stages=2, contiguous=8),
    "interleaved V=2 N=16": dict(schedule="interleaved", virtual_stages=2, contiguous=16),
}
MODEL = ModelConfig(
    vocab_size=64, dim=64, layers=16, heads=4, kv_heads=2, head_dim=16, ffn_dim=128,
    dtype="float32",
)  # fmt: skip
LENGTH = 64

FLAGS = flags.FLAGS
console = Console(width=120, highlight=False)


def define_flags() -> None:
    flags.DEFINE_integer("micro_batches", 16, "Of a step.", lower_bound=RANKS)
    flags.DEFINE_float("layer_ms", 10.0, "Sleep of a layer's forward.")
    flags.DEFINE_float("backward_cost", 2.0, "Backward over forward.")
    flags.DEFINE_integer("rounds", 5, "Measured steps of each schedule.", lower_bound=2)
    flags.DEFINE_string("json", None, "File that takes every measurement.")


def mesh_of(name: str) -> MeshConfig:
    return MeshConfig(pipe=RANKS, **SCHEDULES[name])


# ---------------------------------------------------------------------- time


def sleeping_layer(forward: float, backward: float) -> Callable:
    """A layer that takes `forward` seconds, and its gradient `backward` seconds."""

    def wait(seconds: float, after: jax.Array) -> jax.Array:
        def sleep(_) -> np.ndarray:
            time.sleep(seconds)
            return np.zeros((), np.float32)

        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.pure_callback(sleep, shape, after.reshape(-1)[0])

    @jax.custom_vjp
    def slow(x):
        return x + wait(forward, x)

    slow.defvjp(lambda x: (slow(x), None), lambda _, g: (g + wait(backward, g),))

    def layer(constants, variables, x, shared):
        return slow(x * variables)

    return layer


def toy_parts(layer: Callable, batch: jax.Array) -> Parts:
    return Parts(
        inputs=lambda m: batch[m],
        first=lambda own, shared: shared * own["embedding"],
        layer=lambda *arguments: ((layer(*arguments), 0.0), LayerSums({}, {})),
        last=lambda own, x, shared: (jnp.sum(x * own["head"]), ()),
        first_keys=("embedding",),
        last_keys=("head",),
    )


def toy(micro_batches: int) -> tuple[jax.Array, dict, jax.Array]:
    """Weights of the layers and of both ends, and a batch."""
    ends = {"embedding": jnp.float32(1), "head": jnp.float32(1)}
    return jnp.ones(MODEL.layers), ends, jnp.ones((micro_batches, 4))


def pipelined(name: str, micro_batches: int, layer: Callable) -> Callable[[], jax.Array]:
    """A compiled step of the schedule on 8 ranks; returns the ticks that each rank ran."""
    config = mesh_of(name)
    schedule, stages = make_schedule(config, micro_batches), make_stages(MODEL.layers, config)
    blocks, ends, batch = toy(micro_batches)

    def on_rank(blocks, ends, batch):
        result = run_schedule(
            schedule, stages, toy_parts(layer, batch), ((), blocks), ends,
            (jnp.float32(0), ()), jax.ShapeDtypeStruct(batch.shape[1:], batch.dtype),
        )  # fmt: skip
        gradients = result.block_gradients, jax.lax.psum(result.end_gradients, "pipe")
        return result.ticks[None], gradients

    pipe, same = PartitionSpec("pipe"), PartitionSpec()
    step = jax.jit(
        jax.shard_map(
            on_rank, mesh=make_mesh(config).mesh, in_specs=(pipe, same, same),
            out_specs=(pipe, (pipe, same)), check_vma=False,
        )
    )  # fmt: skip
    arguments = to_stages(blocks, stages), ends, batch
    return lambda: step(*arguments)[0]


def unpipelined(micro_batches: int, layer: Callable) -> Callable[[], jax.Array]:
    """The same layers on 8 data ranks, each with its share of the micro-batches."""
    blocks, ends, batch = toy(micro_batches)

    def on_rank(blocks, ends, batch):
        parts = toy_parts(layer, batch)

        def loss(blocks, ends, m):
            shared = parts.inputs(m)
            x, _ = jax.lax.scan(
                lambda x, w: (layer((), w, x, shared), None), parts.first(ends, shared), blocks
            )
            return parts.last(ends, x, shared)[0]

        def add(total, m):
            gradients = jax.grad(loss, argnums=(0, 1))(blocks, ends, m)
            return jax.tree.map(jnp.add, total, gradients), None

        zeros = jax.tree.map(jnp.zeros_like, (blocks, ends))
        gradients, _ = jax.lax.scan(add, zeros, jnp.arange(len(batch)))
        return jax.lax.psum(gradients, "data")

    data, same = PartitionSpec("data"), PartitionSpec()
    step = jax.jit(
        jax.shard_map(
            on_rank, mesh=make_mesh(MeshConfig(data=RANKS)).mesh, in_specs=(same, same, data),
            out_specs=same, check_vma=False,
        )
    )  # fmt: skip
    return lambda: step(blocks, ends, batch)


def measure_times(micro_batches: int, layer_ms: float, cost: float, rounds: int) -> dict:
    """By schedule: ticks, and the step's seconds over those of the peer, one for each round."""
    layer = sleeping_layer(layer_ms / 1e3, cost * layer_ms / 1e3)
    steps = {name: pipelined(name, micro_batches, layer) for name in SCHEDULES}
    peer = unpipelined(micro_batches, layer)
    ticks = {name: np.asarray(step()).tolist() for name, step in steps.items()}
    jax.block_until_ready(peer())
    results = {name: dict(ticks=ticks[name], seconds=[], over_peer=[]) for name in SCHEDULES}
    for number in track(range(rounds), "time", console=console, transient=True):
        for name in list(SCHEDULES)[:: (-1) ** number]:
            without = seconds(peer)
            taken = seconds(steps[name])
            results[name]["seconds"].append(taken)
            results[name]["over_peer"].append(taken / without)
    return results


def bubble_where_all_meet(schedule: Schedule, cost: float) -> float:
    """As the simulator's, where each exchange waits for all ranks."""
    forward, backward = schedule.forward[..., 0] != IDLE, schedule.backward[..., 0] != IDLE
    busy = forward[:, 0].sum() + cost * backward[:, 0].sum()
    return float((forward.any(1) + cost * backward.any(1)).sum() / busy - 1)


def seconds(step: Callable) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(step())
    return time.perf_counter() - begun


# ---------------------------------------------------------------------- memory


def measure_memory(
    micro_batches: int, model: ModelConfig = MODEL, names: tuple[str, ...] = tuple(SCHEDULES)
) -> Iterator[tuple[str, int]]:
    """By schedule: bytes of temporary memory a device in the compiled training step."""
    optimizer = OptimizerConfig()
    for name in names:
        layout = make_mesh(mesh_of(name))
        step = compile_step(model, optimizer, layout, micro_batches, 1)
        state = abstract_state(model, optimizer, layout)
        lowered = step.lower(state, abstract_batch(micro_batches), jnp.float32(0))
        # LLVM's optimisations change no buffer.
        compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
        yield name, compiled.memory_analysis().temp_size_in_bytes


def abstract_batch(rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    names = ("tokens", "targets", "positions", "segment_ids")
    batch = {name: jax.ShapeDtypeStruct((rows, LENGTH), jnp.int32) for name in names}
    batch["loss_mask"] = jax.ShapeDtypeStruct((rows, LENGTH), jnp.bool_)
    return batch | {name: jax.ShapeDtypeStruct((rows,), jnp.int32) for name in ("source", "cut")}


# ---------------------------------------------------------------------- output


def table_of(results: dict[str, dict]) -> Table:
    table = Table(
        title=f"{RANKS} ranks, {FLAGS.micro_batches} micro-batches, {MODEL.layers} layers"
    )
    for column in ("schedule", "ticks", "free", "met", "all met", "measured bubble", "time/gpipe",
                   "in flight", "MB", "MB/gpipe"):  # fmt: skip
        table.add_column(column, justify="left" if column == "schedule" else "right")
    gpipe = results["gpipe"]
    for name, result in results.items():
        bubbles = np.percentile(np.array(result["over_peer"]) - 1, (25, 50, 75))
        ratio = statistics.median(np.divide(result["seconds"], gpipe["seconds"]))
        table.add_row(
            name, str(result["ticks"][0]), f"{result['free_running']:.2f}",
            f"{result['met']:.2f}", f"{result['all_met']:.2f}", "{1:.2f} ({0:.2f}..{2:.2f})".format(*bubbles),
            f"{ratio:.2f}", f"{result['in_flight']:g}", f"{result['bytes'] / 1e6:.1f}",
            f"{result['bytes'] / gpipe['bytes']:.2f}",
        )  # fmt: skip
    return table


def main(_) -> None:
    results = measure_times(FLAGS.micro_batches, FLAGS.layer_ms, FLAGS.backward_cost, FLAGS.rounds)
    for name, size in measure_memory(FLAGS.micro_batches):
        config = mesh_of(name)
        schedule = make_schedule(config, FLAGS.micro_batches)
        simulation = simulate(schedule, FLAGS.backward_cost)
        assert results[name]["ticks"] == [simulation.ticks] * RANKS
        results[name] |= dict(
            bytes=size, free_running=simulation.bubble_free_running, met=simulation.bubble,
            all_met=bubble_where_all_meet(schedule, FLAGS.backward_cost),
            in_flight=max(simulation.in_flight) / config.virtual_stages,
        )  # fmt: skip
    console.print(table_of(results))
    console.print(
        "Layers sleep instead of computing. Bubble: idle over busy time; simulated where ranks wait "
        "for their input only, meet neighbours after a tick, all meet twice a tick; measured as "
        "time over that of 8 data ranks that sleep as much, minus 1 (median, quartiles).\nIn flight: "
        "activations of so many whole stages, at most. MB: temporary memory a device of the compiled "
        "training step (nothing computed)."
    )
    if FLAGS.json:
        write_json(Path(FLAGS.json), results)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
