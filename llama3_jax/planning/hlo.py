"""The collectives of a compiled step: what, over which axes, how much, how often, over which link.

Read from the text of XLA's optimised program. A loop's body counts as often as the loop turns:
XLA writes down the turns of a scan; those of what a pipeline rank may skip follow from the schedule.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from llama3_jax.errors import UserError
from llama3_jax.parallel.mesh import AXES
from llama3_jax.parallel.pipeline import SCOPE
from llama3_jax.parallel.schedule import Schedule
from llama3_jax.parallel.stages import make_stages
from llama3_jax.planning.case import GPUS_PER_HOST, Case

NVLINK, NETWORK = "NVLink", "network"
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")
_BITS = {"pred": 8, "s8": 8, "u8": 8, "f16": 16, "bf16": 16, "s32": 32, "u32": 32, "f32": 32,
         "s64": 64, "u64": 64, "f64": 64}  # fmt: skip

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# The scope that a loop of unknown turns stands in: what a pipeline rank may skip, or a bound.
_LOOP = re.compile(rf"(?:{re.escape(SCOPE)}(\w+)|turns\.(\d+))\)*/while$")
_NO_CALLS = ("fusion", "all-reduce", "reduce-scatter", "async-start")
_CALLS = ("while", "call", "conditional")
_PRODUCT = re.compile(r"__cublas|_gemm|__cudnn\$|triton_kernel_call")


class Collective(NamedTuple):
    """One collective of a GPU's step.

    `bytes` are what the GPU receives each time, `turns` how often it runs in a step (the mean over
    the pipeline's ranks). `dtype` and `shape` are those of its (first) result. `hidden` tells
    whether products are scheduled between its start and its end. `where` is its place in the
    traced program.
    """

    kind: str
    axes: tuple[str, ...]
    link: str
    dtype: str
    shape: tuple[int, ...]
    bytes: float
    turns: float
    hidden: bool
    where: str

    @property
    def total(self) -> float:
        """Bytes in a step."""
        return self.bytes * self.turns


class _Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    rest: str

    @property
    def where(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


def collectives(hlo: str, case: Case) -> list[Collective]:
    """All collectives of the program's entry and of what it calls.

    Raises:
      UserError: the text has a collective of a form that is not known here.
    """
    computations = _parse(hlo)
    turns = _turns(computations, _entry(hlo), case)
    computing = _with_products(computations)
    shape = tuple(case.mesh.shape.values())
    found = []
    for name, instructions in computations.items():
        if not turns.get(name):
            continue
        for at, instruction in enumerate(instructions):
            hidden = _hidden(instructions, at, computing)
            if instruction.opcode == "async-start":
                instruction = computations[_called(instruction)[0]][-1]
            kind = "collective-permute" if instruction.opcode == "recv" else None
            kind = next((k for k in KINDS if instruction.opcode in (k, f"{k}-start")), kind)
            if kind is None:
                continue
            group = _first_group(instruction)
            axes = _axes(group, shape)
            if not axes:
                continue
            dtype, dims = _shapes(instruction.type)[-1]
            inside = len({device // GPUS_PER_HOST for device in group}) == 1
            found.append(
                Collective(
                    kind, axes, NVLINK if inside else NETWORK, dtype, dims,
                    _received(kind, instruction, len(group)), turns[name],
                    hidden, instruction.where,
                )
            )  # fmt: skip
    return found


def hidden_shares(found: list[Collective]) -> dict[tuple[str, tuple[str, ...]], float]:
    """By kind and axes, the share of the bytes of a step during which products run."""
    return {
        (kind, axes): sum(c.total for c in members if c.hidden) / sum(c.total for c in members)
        for kind, axes, members in by_axes(found)
    }


def overlap(found: list[Collective]) -> dict[str, dict[str, float]]:
    """`hidden_shares` under names for JSON."""
    named: dict = defaultdict(dict)
    for (kind, axes), share in hidden_shares(found).items():
        name = {"collective-permute": "permute"}.get(kind, kind).replace("-", "_")
        named[name][",".join(axes)] = share
    return dict(named)


def totals(found: list[Collective]) -> dict[tuple[str, tuple[str, ...], str], float]:
    """Bytes a GPU receives in a step, by kind, axes and link."""
    sums: dict = defaultdict(float)
    for collective in found:
        sums[collective.kind, collective.axes, collective.link] += collective.total
    return dict(sums)


# ------------------------------------------------------------------ the text


def _parse(hlo: str) -> dict[str, list[_Instruction]]:
    """Instructions by computation, in the order in which they are scheduled."""
    computations: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] = []
    for line in hlo.splitlines():
        if not line.startswith(" "):
            if started := _COMPUTATION.match(line):
                current = computations.setdefault(started[1], [])
        elif matched := _INSTRUCTION.match(line):
            current.append(_Instruction(*matched.groups()))
    return computations


def _entry(hlo: str) -> str:
    return re.search(r"^ENTRY %?([\w.\-]+)", hlo, re.MULTILINE)[1]


def _turns(computations, entry: str, case: Case) -> dict[str, float]:
    """How often each computation runs in a step."""
    turns: dict[str, float] = defaultdict(float)
    schedule = case.schedule

    def visit(name: str, times: float) -> None:
        turns[name] += times
        for instruction in computations[name]:
            called = _called(instruction)
            if not called or instruction.opcode in _NO_CALLS:
                continue
            each = times
            if instruction.opcode == "while":
                if known := _TURNS.search(instruction.rest):
                    each *= int(known[1])
                elif "known_induction_variable" in instruction.rest:
                    each *= _counted(computations, computations[name], instruction)
                else:
                    each *= _turns_of(instruction.where, case, schedule)
            for target in called:
                if target in computations:
                    visit(target, each)

    visit(entry, 1.0)
    return turns


def _called(instruction: _Instruction) -> list[str]:
    """The computations that an instruction runs."""
    called = _CALLED.findall(instruction.rest)
    if branches := _BRANCHES.search(instruction.rest):
        called += [b.strip().lstrip("%") for b in branches[1].split(",")]
    return called


def _counted(computations, around: list[_Instruction], loop: _Instruction) -> int:
    """Turns of a loop that counts by ones, of which XLA peeled some and wrote down no number."""
    here = {i.name: i for i in around}

    def first_operand(instruction: _Instruction) -> _Instruction:
        return here[re.match(r"%?([\w.\-]+)", instruction.rest)[1]]

    at = first_operand(first_operand(loop))
    while at.opcode == "copy":
        at = first_operand(at)
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]
    inside = list(computations[condition])
    inside += [i for x in computations[condition] for c in _called(x) for i in computations[c]]
    bounds = [int(i.rest.split(")")[0]) for i in inside if i.opcode == "constant"]
    if at.opcode != "constant" or len(bounds) != 1:
        raise UserError(f"a loop of unknown turns: {loop.name} in {loop.where}")
    return bounds[0] - int(at.rest.split(")")[0])


def _turns_of(where: str, case: Case, schedule: Schedule | None) -> float:
    """Turns of a loop whose number only its place in the traced program tells."""
    found = _LOOP.search(where)
    if found and found[2]:
        return int(found[2])
    if not found or schedule is None:
        raise UserError(f"a loop of unknown turns: {where}")
    return _share(found[1], case, schedule)


def _share(name: str, case: Case, schedule: Schedule) -> float:
    """How often, of its chances, a rank runs what is named, by the mean over ranks."""
    chunks = schedule.stages * schedule.virtual
    if name in ("forward", "backward"):
        return schedule.micro_batches * schedule.virtual / schedule.exchanges(name)
    if name == "layer":
        return case.model.layers / (chunks * make_stages(case.model.layers, case.mesh).most)
    return 1 / chunks  # embedding, head and what goes to it


def _shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    return [
        (dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in re.findall(r"([a-z]\w*)\[([\d,]*)\]", text)
        if dtype in _BITS
    ]


def _received(kind: str, instruction: _Instruction, ranks: int) -> float:
    sizes = [math.prod(dims) * _BITS[dtype] / 8 for dtype, dims in _shapes(instruction.type)]
    total, started = sum(sizes), instruction.opcode.endswith("-start")
    if kind == "all-gather":  # the type of a start holds operands and results
        return total * (ranks - 1) / (ranks + 1 if started else ranks)
    if kind == "reduce-scatter":
        return total * (ranks - 1) / (1 + 1 / ranks if started else 1) / (ranks if started else 1)
    if kind == "all-reduce":  # a start's type may be its results alone, or ((operands), results)
        total /= 2 if instruction.type.startswith("((") else 1
        return 2 * total * (ranks - 1) / ranks
    if instruction.opcode == "recv":
        return sizes[0]
    if kind == "collective-permute":  # a start's type may also hold scalars of its own
        return total / 2 if started else total
    return total * (ranks - 1) / ranks


def _first_group(instruction: _Instruction) -> list[int]:
    text = instruction.rest
    if pairs := re.search(r"source_target_pairs=\"?\{\{(\d+),(\d+)\}", text):
        return [int(pairs[1]), int(pairs[2])]
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return [int(n) for n in listed[1].split(",")]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        return _devices(iota[2], iota[3]).reshape([int(n) for n in iota[1].split(",")])[0].tolist()
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
        r"\s*\{([^}]*)\}",
        text,
    )
    if named:
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        chosen = set(re.findall(r"'(\w+)'", named[4]))
        devices = _devices(named[2] or ",".join(map(str, sizes.values())), named[3])
        devices = devices.reshape(list(sizes.values()))
        index = tuple(slice(None) if axis in chosen else 0 for axis in sizes)
        return devices[index].reshape(-1).tolist()
    raise UserError(f"replica groups of an unknown form: {text[:200]}")


def _devices(shape: str, order: str | None) -> np.ndarray:
    """All devices in the order of a transposed iota: `[16,8]T(1,0)`."""
    sizes = [int(n) for n in shape.split(",")]
    devices = np.arange(math.prod(sizes)).reshape(sizes)
    return devices.transpose([int(n) for n in order.split(",")]) if order else devices


def _axes(group: list[int], shape: tuple[int, ...]) -> tuple[str, ...]:
    """The mesh axes along which the group's ranks differ."""
    places = np.array(np.unravel_index(group, shape))
    return tuple(axis for axis, row in zip(AXES, places, strict=True) if len(set(row.tolist())) > 1)


def _hidden(instructions: list[_Instruction], at: int, computing: set[str]) -> bool:
    """Whether a product, or a loop that has one, is scheduled between a start and its end."""
    start = instructions[at]
    if not (start.opcode.endswith("-start") or start.opcode == "recv"):
        return False
    reference = re.compile(rf"%?{re.escape(start.name)}\b")
    for later in instructions[at + 1 :]:
        if later.opcode.endswith("-done") and reference.search(later.rest.split(")")[0]):
            return False
        if _is_product(later) or (
            later.opcode in _CALLS and any(c in computing for c in _called(later))
        ):
            return True
    return False


def _with_products(computations: dict[str, list[_Instruction]]) -> set[str]:
    """Names of the computations that have a product, or call one that has."""
    found: set[str] = set()
    for name, instructions in computations.items():  # what is called stands before its caller
        if any(
            _is_product(i) or (i.opcode in _CALLS and any(c in found for c in _called(i)))
            for i in instructions
        ):
            found.add(name)
    return found


def _is_product(instruction: _Instruction) -> bool:
    if instruction.opcode not in ("custom-call", "fusion"):
        return instruction.opcode == "dot"
    return bool(_PRODUCT.search(instruction.rest))


def by_axes(found: list[Collective]) -> Iterator[tuple[str, tuple[str, ...], list[Collective]]]:
    """Collectives grouped by kind and axes."""
    groups: dict = defaultdict(list)
    for collective in found:
        groups[collective.kind, collective.axes].append(collective)
    for (kind, axes), members in sorted(groups.items()):
        yield kind, axes, members
