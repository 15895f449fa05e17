"""Four ways to shard the 8B model over data ranks, by the planner's constants: which of them pays.

    python -m experiments.benchmarks.fsdp_layouts

- resharded: ZeRO-3, gathers and reductions in every micro-batch (`reshard_after_forward=True`);
- whole: gathers and reductions once a step (`reshard_after_forward=False`);
- one reduction: gathers as ZeRO-3, gradients added up whole in float32 and reduced once a step;
- HSDP: sharded inside hosts of 8, and gradients summed over hosts once a step.

The last two are not in the trainer. Shares of bytes under products are those of the compiled step of
`llama3_8b.py:kernels`; what runs once a step is hidden by nothing. Seconds are of a step of 8,192-token
rows, two to a micro-batch, and GiB the forecast of the peak.
"""

from rich.console import Console
from rich.table import Table

from experiments.production.llama3_8b import get_config
from llama3_jax import cli
from llama3_jax.model.definition import define
from llama3_jax.planning.case import GPUS_PER_HOST, Case, cases_of
from llama3_jax.planning.constants import Constants, load_constants
from llama3_jax.planning.cost import predict
from llama3_jax.planning.memory import forecast, usable
from llama3_jax.planning.traffic import bandwidth, in_step
from llama3_jax.recipe.config import RunConfig
from llama3_jax.schema import parse

GATHER, REDUCE = ("all-gather", ("data",)), ("reduce-scatter", ("data",))
SHARES = {GATHER: 0.78, REDUCE: 0.84}
MICRO_ROWS = 2


def case(gpus: int, micro_batches: int, **mesh) -> Case:
    (made,) = cases_of(parse(RunConfig, get_config("kernels")))
    layout = made.mesh.model_copy(update=dict(data=gpus) | mesh)
    rows = gpus * MICRO_ROWS * micro_batches
    return made._replace(mesh=layout, rows=rows, micro_batches=micro_batches)


def exposed(made: Case, constants: Constants, shares: dict, bytes_of: dict) -> float:
    """Seconds of a step's collectives that nothing hides."""
    speed = bandwidth(("data",), made.mesh, constants)
    return sum(
        (1 - constants.overlap * shares.get(k, 0.0)) * n / speed for k, n in bytes_of.items()
    )


def ways(gpus: int, micro_batches: int, constants: Constants) -> dict[str, tuple[float, float]]:
    """Seconds of FSDP that nothing hides, and GiB, of each way."""
    resharded = case(gpus, micro_batches)
    whole = case(gpus, micro_batches, reshard_after_forward=False)
    inside = case(GPUS_PER_HOST, micro_batches)
    parameters = define(resharded.model).parameter_count()
    sent = in_step(resharded)
    once = {GATHER: sent[GATHER], REDUCE: sent[REDUCE] / micro_batches}
    hosts = gpus // GPUS_PER_HOST
    # Each GPU sums its shard with those of its like on other hosts, over its own network link.
    over_hosts = 2 * (hosts - 1) / hosts * 4 * parameters / GPUS_PER_HOST / constants.network
    memory = {name: forecast(c).total for name, c in
              (("resharded", resharded), ("whole", whole), ("HSDP", inside))}  # fmt: skip
    memory["one reduction"] = memory["resharded"] + 4 * parameters * (1 - 1 / gpus)
    seconds = {
        "resharded": exposed(resharded, constants, SHARES, sent),
        "whole": exposed(whole, constants, {}, in_step(whole)),
        "one reduction": exposed(resharded, constants, SHARES, once),
        "HSDP": exposed(inside, constants, SHARES, in_step(inside)) + over_hosts,
    }
    return {name: (seconds[name], memory[name] / 2**30) for name in seconds}


def main(_) -> None:
    constants = load_constants()
    limit = usable(case(8, 1), constants.memory) / 2**30
    table = Table(title=f"Seconds of FSDP that nothing hides (peak GiB; {limit:.1f} are usable)")
    columns = ("resharded", "whole", "one reduction", "HSDP")
    for name in ("GPUs", "micro-batches", "step", *columns):
        table.add_column(name, justify="right")
    for gpus in (128, 512, 1024):
        for micro_batches in (1, 2, 4, 8, 16):
            step = predict(case(gpus, micro_batches), constants, overlap=SHARES).seconds
            found = ways(gpus, micro_batches, constants)
            cells = (f"{found[name][0]:.2f} ({found[name][1]:.0f})" for name in columns)
            table.add_row(f"{gpus:,}", str(micro_batches), f"{step:.2f}", *cells)
    Console(width=None if Console().is_terminal else 110).print(table)


if __name__ == "__main__":
    cli.run(main)
