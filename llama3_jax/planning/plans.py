"""A plan: what one stage will hold, send and take; as numbers that can be saved."""

import typing
from typing import Any, NamedTuple

from llama3_jax.planning.case import Case
from llama3_jax.planning.checkpointing import CheckpointBytes, checkpoint_bytes
from llama3_jax.planning.compiler import Compiled, compile_case
from llama3_jax.planning.constants import Constants
from llama3_jax.planning.cost import AttentionKernel, Cost, predict
from llama3_jax.planning.hlo import Collective, by_axes, collectives, hidden_shares, overlap
from llama3_jax.planning.memory import Memory, forecast, usable


class Plan(NamedTuple):
    """`compiled` and `collectives` are None and empty where the step was not compiled.

    `ranges` are the slow end, the cost and the fast end by the kernel that attention is computed
    with: the planned one's speed, and cuDNN's.
    """

    case: Case
    forecast: Memory
    cost: Cost
    compiled: Compiled | None
    collectives: list[Collective]
    ranges: dict[str, tuple[Cost, Cost, Cost]]
    memory_limit: float
    power: float
    checkpoint: CheckpointBytes

    @property
    def used(self) -> float:
        """Bytes of a GPU, by the compiler's figure where there is one."""
        return self.compiled.peak if self.compiled else self.forecast.total

    @property
    def fits(self) -> bool:
        return self.used <= self.memory_limit

    @property
    def days(self) -> float:
        """Of the whole stage."""
        return self.case.steps * self.cost.seconds / 86_400

    @property
    def energy_mwh(self) -> float:
        """Of the whole stage."""
        return self.days * 24 * self.cost.gpus * self.power / 1e6


def make_plan(
    case: Case, constants: Constants, compiles: bool, document_length: int | None = None
) -> Plan:
    compiled = compile_case(case) if compiles else None
    found = collectives(compiled.hlo, case) if compiled else []
    shares = hidden_shares(found) if compiled else None

    def cost(kernel: AttentionKernel) -> tuple[Cost, Cost, Cost]:
        slow, fast = constants.end(0), constants.end(1)
        slow, middle, fast = (
            predict(case, c, document_length, overlap=shares, attention=kernel)
            for c in (slow, constants, fast)
        )
        return slow, middle, fast

    ranges = {kernel: cost(kernel) for kernel in typing.get_args(AttentionKernel)}
    return Plan(
        case, forecast(case), ranges["triton"][1], compiled, found, ranges,
        usable(case, constants.memory), constants.power, checkpoint_bytes(case),
    )  # fmt: skip


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything the tables show, in bytes, seconds and FLOP/s."""
    case, cost, compiled = plan.case, plan.cost, plan.compiled
    return {
        "stage": case.name,
        "model": case.model.model_dump(),
        "mesh": case.mesh.model_dump(),
        "rows": case.rows,
        "length": case.length,
        "micro_batches": case.micro_batches,
        "steps": case.steps,
        "fits": plan.fits,
        "memory_forecast": plan.forecast._asdict() | {"total": plan.forecast.total},
        "memory_compiled": compiled
        and {
            "arguments": compiled.arguments,
            "temporary": compiled.temporary,
            "peak": compiled.peak,
            "compile_seconds": compiled.seconds,
            "compile_process_bytes": compiled.process_bytes,
        },
        "checkpoint": plan.checkpoint._asdict(),
        "collectives": [
            {
                "kind": kind,
                "axes": axes,
                "link": members[0].link,
                "sites": len(members),
                "shapes": sorted({(c.dtype, *c.shape) for c in members}, key=str),
                "times": sum(c.turns for c in members),
                "bytes": sum(c.total for c in members),
                "bytes_under_products": sum(c.total for c in members if c.hidden),
            }
            for kind, axes, members in by_axes(plan.collectives)
        ],
        "overlap": overlap(plan.collectives),
        "ranges": {
            kernel: {
                "seconds": [c.seconds for c in ends],
                "flops_per_gpu": {
                    name: [c.flops_per_gpu(name) for c in ends] for name in cost.flops
                },
            }
            for kernel, ends in plan.ranges.items()
        },
        "bubble": cost.bubble,
        "seconds": cost.seconds,
        "parts": {name: float(seconds) for name, seconds in cost.parts.items()},
        "flops": cost.flops,
        "flops_per_gpu": {name: cost.flops_per_gpu(name) for name in cost.flops},
        "mfu": {name: cost.mfu(name) for name in cost.flops},
        "tokens_per_day": cost.tokens_per_day,
        "days": plan.days,
        "energy_mwh": plan.energy_mwh,
    }
