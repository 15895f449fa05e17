"""A plan as tables for the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from llama3_jax.planning.hlo import by_axes
from llama3_jax.planning.plans import Plan
from llama3_jax.planning.search import Candidate

_GIB = 2**30


def console() -> Console:
    return Console(width=None if Console().is_terminal else 150)


def layout_text(case) -> str:
    mesh = case.mesh
    parts = [f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1] or ["1 GPU"]
    if mesh.pipe > 1:
        parts.append(
            f"{mesh.schedule} V={mesh.virtual_stages} N={mesh.contiguous_or(case.micro_batches)}"
        )
    return " x ".join(parts[:4]) + "".join(f", {p}" for p in parts[4:])


def memory_table(plan: Plan) -> Table:
    """Per GPU: the closed form beside what the compiler allocates."""
    table = Table(title=f"Memory of one GPU, GiB ({plan.memory_limit / _GIB:.1f} for JAX)")
    for column in ("", "forecast", "compiled"):
        table.add_column(column, justify="right" if column else "left")
    compiled = plan.compiled
    rows = dict(plan.forecast._asdict())
    known = {"parameters": rows["parameters"], "optimizer": rows["optimizer"]}
    for name, size in rows.items():
        shown = ""
        if compiled and name in known:
            shown = f"{compiled.arguments * size / (sum(known.values())) / _GIB:.2f}"
        table.add_row(name, f"{size / _GIB:.2f}", shown)
    if compiled:
        table.add_row("all but parameters and optimizer", "", f"{compiled.temporary / _GIB:.2f}")
    total = f"{compiled.peak / _GIB:.2f}" if compiled else ""
    table.add_section()
    table.add_row("total", f"{plan.forecast.total / _GIB:.2f}", total)
    return table


def collective_table(plan: Plan) -> Table:
    """What a GPU receives in a step, by kind and axes, from the compiled program."""
    table = Table(title="Collectives of the compiled step, per GPU")
    for column in ("kind", "axes", "link", "sites", "times a step", "GB a step", "under products"):
        table.add_column(column, justify="left" if column in ("kind", "axes", "link") else "right")
    for kind, axes, members in by_axes(plan.collectives):
        total = sum(c.total for c in members)
        if total < 1e-3 * max(c.total for c in plan.collectives):
            continue
        hidden = sum(c.total for c in members if c.hidden) / total
        table.add_row(
            kind, ", ".join(axes), members[0].link, f"{len(members)}",
            f"{sum(c.turns for c in members):,.0f}", f"{total / 1e9:,.2f}", f"{hidden:.0%}",
        )  # fmt: skip
    return table


def time_table(plan: Plan) -> Table:
    cost = plan.cost
    table = Table(title=f"A step of {cost.tokens:,} tokens: {cost.seconds:.2f} s predicted")
    for column in ("part", "seconds", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for name, seconds in cost.parts.items():
        if seconds > 1e-4 * cost.seconds:
            table.add_row(name, f"{seconds:.3f}", f"{seconds / cost.seconds:.1%}")
    return table


def accounting_table(plan: Plan) -> Table:
    table = Table(title="By the three accountings of attention")
    for column in ("", "FLOPs a step", "TFLOP/s a GPU", "MFU"):
        table.add_column(column, justify="right" if column else "left")
    for name, flops in plan.cost.flops.items():
        table.add_row(
            name, f"{flops:.3e}", f"{plan.cost.flops_per_gpu(name) / 1e12:.0f}",
            f"{plan.cost.mfu(name):.1%}",
        )  # fmt: skip
    return table


def range_table(plan: Plan) -> Table:
    """From the slow to the fast end of what the constants may be, by attention's kernel."""
    table = Table(title="Range, by the kernel of attention")
    for column in ("", "seconds a step", "TFLOP/s a GPU, causal"):
        table.add_column(column, justify="right" if column else "left")
    for kernel, (slow, _, fast) in plan.ranges.items():
        speeds = [cost.flops_per_gpu() / 1e12 for cost in (slow, fast)]
        table.add_row(
            kernel,
            f"{fast.seconds:.2f} to {slow.seconds:.2f}",
            f"{speeds[0]:.0f} to {speeds[1]:.0f}",
        )
    return table


def stages_table(plans: Sequence[Plan]) -> Table:
    """One line a stage of the timeline."""
    table = Table(title="Stages")
    left = ("stage", "layout", "remat")
    for column in (
        "stage", "layout", "remat", "length", "batch", "steps", "GiB", "bubble", "s/step",
        "TFLOP/s", "MFU", "days", "MWh",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column in left else "right")
    for plan in plans:
        case, cost = plan.case, plan.cost
        mark = "" if plan.fits else " (!)"
        table.add_row(
            case.name, layout_text(case), case.model.remat, f"{case.length:,}",
            f"{case.tokens / 1e6:.1f}M", f"{case.steps:,}", f"{plan.used / _GIB:.1f}{mark}",
            f"{cost.bubble:.1%}", f"{cost.seconds:.2f}", f"{cost.flops_per_gpu() / 1e12:.0f}",
            f"{cost.mfu():.1%}", f"{plan.days:.2f}", f"{plan.energy_mwh:,.0f}",
        )  # fmt: skip
    return table


def search_table(candidates: Sequence[Candidate], peaks: Sequence[float | None]) -> Table:
    table = Table(title="Layouts that fit, the quickest first")
    for column in ("layout", "reshard", "remat", "micro", "GiB forecast", "GiB compiled", "bubble",
                   "s/step", "TFLOP/s", "MFU"):  # fmt: skip
        table.add_column(
            column, justify="left" if column in ("layout", "reshard", "remat") else "right"
        )
    for candidate, peak in zip(candidates, peaks, strict=True):
        case, cost = candidate.case, candidate.cost
        table.add_row(
            layout_text(case), "yes" if case.mesh.reshard_after_forward else "no", case.model.remat, f"{case.micro_batches}",
            f"{candidate.memory.total / _GIB:.1f}", f"{peak / _GIB:.1f}" if peak else "",
            f"{cost.bubble:.1%}", f"{cost.seconds:.2f}", f"{cost.flops_per_gpu() / 1e12:.0f}",
            f"{cost.mfu():.1%}",
        )  # fmt: skip
    return table
