"""Which layouts a number of GPUs allows, and which are worth compiling."""

import itertools
from typing import NamedTuple

from llama3_jax.errors import UserError
from llama3_jax.parallel.mesh import MeshConfig
from llama3_jax.planning.case import GPUS_PER_HOST, Case
from llama3_jax.planning.constants import Constants
from llama3_jax.planning.cost import Cost, predict
from llama3_jax.planning.memory import Memory, forecast, usable

REMATS = ("none", "save_dots", "full")
# So many of the quickest are ranked again with their schedules simulated.
_SIMULATED = 50


class Candidate(NamedTuple):
    case: Case
    memory: Memory
    cost: Cost


def enumerate_cases(case: Case, gpus: int) -> list[Case]:
    """Every layout of `gpus` that divides the model and the batch of `case`.

    Tensor ranks stay inside a host; context ranks come only with rows longer than 8K tokens.
    """
    model, found = case.model, []
    for tensor, context, pipe in itertools.product(
        _divisors(min(gpus, GPUS_PER_HOST)), _divisors(gpus), _divisors(gpus)
    ):
        if gpus % (tensor * context * pipe) or model.kv_heads % tensor or model.heads % tensor:
            continue
        if model.vocab_size % tensor or model.ffn_dim % tensor or pipe > model.layers:
            continue
        data = gpus // (tensor * context * pipe)
        if case.rows % data or (context > 1 and case.length // context < 4096):
            continue
        if model.dim % (data * context) or case.length % (2 * context * tensor):
            continue
        rows = case.rows // data
        for micro in _divisors(rows):
            for virtual in _virtual_stages(model.layers, pipe) if pipe > 1 else (1,):
                if pipe > 1 and micro < pipe:
                    continue
                for reshard, remat in itertools.product((True, False), REMATS):
                    if data * context == 1 and not reshard:
                        continue
                    mesh = MeshConfig(
                        data=data, pipe=pipe, context=context, tensor=tensor, reshard_after_forward=reshard,
                        virtual_stages=virtual,
                    )  # fmt: skip
                    found.append(
                        case._replace(
                            mesh=mesh, micro_batches=micro,
                            model=model.model_copy(update={"remat": remat}),
                        )
                    )  # fmt: skip
    return found


def search(case: Case, gpus: int, constants: Constants) -> tuple[list[Candidate], int]:
    """Layouts that fit, the quickest first, by the closed forms; and how many were looked at.

    Raises:
      UserError: none is legal, or none fits.
    """
    cases = enumerate_cases(case, gpus)
    if not cases:
        raise UserError(
            f"--gpus={gpus}: no layout divides {case.rows} rows of {case.length} tokens, "
            f"{case.model.heads}/{case.model.kv_heads} heads and dim {case.model.dim}"
        )
    fitting = []
    least = None
    for candidate in cases:
        memory = forecast(candidate)
        least = memory.total if least is None else min(least, memory.total)
        if memory.total <= usable(case, constants.memory):
            cost = predict(candidate, constants, simulated=False)
            fitting.append(Candidate(candidate, memory, cost))
    if not fitting:
        raise UserError(
            f"--gpus={gpus}: none of {len(cases)} layouts fits; the smallest needs "
            f"{least / 2**30:.1f} GiB of {usable(case, constants.memory) / 2**30:.1f}"
        )
    fitting.sort(key=lambda c: c.cost.seconds)
    simulated = [c._replace(cost=predict(c.case, constants)) for c in fitting[:_SIMULATED]]
    return sorted(simulated, key=lambda c: c.cost.seconds) + fitting[_SIMULATED:], len(cases)


def _virtual_stages(layers: int, pipe: int) -> list[int]:
    """Numbers of virtual stages with at least about a layer in each chunk."""
    most = -(-layers // pipe)
    return [v for v in _divisors(most) if pipe * v <= layers + 2]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
