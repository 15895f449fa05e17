"""What a run will hold and take on H100s: compiles its training step for them, without one.

    python -m llama3_jax.plan --config=experiments/production/llama3_405b.py:8k_16384
    python -m llama3_jax.plan --config=… --all_stages --nocompile      # the whole timeline, at once
    python -m llama3_jax.plan --config=… --search --gpus=128           # other layouts, ranked
    python -m llama3_jax.plan --config=… --show_schedule               # the pipeline as a chart

Values of the config can be set as for training: --config.mesh.tensor=4. `--json=FILE` keeps all
numbers. Every constant stands in planning/constants.py; `--constants=FILE` puts measured ones in
their place.
"""

import llama3_jax.planning.environment  # noqa: F401, I001  # before jax

from pathlib import Path

from absl import flags

from llama3_jax.model.definition import define
from llama3_jax import cli
from llama3_jax.errors import UserError
from llama3_jax.files import check_output_file, write_json
from llama3_jax.parallel.schedule import chart, make_schedule, simulate
from llama3_jax.planning import tables
from llama3_jax.planning.case import Case, cases_of, named
from llama3_jax.planning.compiler import compile_case
from llama3_jax.planning.constants import Constants, load_constants
from llama3_jax.planning.memory import usable
from llama3_jax.planning.plans import Plan, as_json, make_plan
from llama3_jax.planning.search import search
from llama3_jax.recipe.config import RunConfig
from llama3_jax.schema import parse

FLAGS = flags.FLAGS
# A backward pass is about two forwards, and three where the layer is computed again.
_BACKWARD_COST = {"none": 2.0, "save_dots": 2.0}


def define_flags() -> None:
    cli.define_config()
    flags.DEFINE_string("stage", None, "The stage to plan; by default the last one.")
    flags.DEFINE_bool("all_stages", False, "Every stage of the timeline, a line each.")
    flags.DEFINE_bool("compile", True, "Compile the step for H100s; else closed forms alone.")
    flags.DEFINE_bool("search", False, "Rank all layouts of --gpus for the stage.")
    flags.DEFINE_integer("gpus", None, "GPUs for --search; by default those of the config.")
    flags.DEFINE_integer("best", 3, "How many layouts --search compiles and shows.", lower_bound=1)
    flags.DEFINE_bool("show_schedule", False, "Print the stage's pipeline schedule, and stop.")
    flags.DEFINE_integer("document_length", None, "Mean tokens of a document; by default a row's.")
    flags.DEFINE_string("json", None, "File for all numbers.")
    cli.define_overwrite()
    flags.DEFINE_string("constants", None, "JSON of measured constants {name: {value, source}}.")


def main(_) -> int:
    for flag in ("gpus", "best"):
        if FLAGS[flag].present and not FLAGS.search:
            raise UserError(f"--{flag} is for --search")
    if FLAGS.search and FLAGS.all_stages:
        raise UserError("--all_stages and --search: one or the other")
    cases = cases_of(parse(RunConfig, cli.require_config(FLAGS.config)))
    constants = load_constants(FLAGS.constants)
    if FLAGS.json:
        inputs = [FLAGS.constants] if FLAGS.constants else []
        check_output_file("--json", FLAGS.json, FLAGS.overwrite, inputs)
    if FLAGS.show_schedule:
        show_schedule(named(cases, FLAGS.stage))
        return 0
    if FLAGS.search:
        return show_search(named(cases, FLAGS.stage), constants)
    if FLAGS.all_stages:
        plans = [make_plan(c, constants, FLAGS.compile, FLAGS.document_length) for c in cases]
        tables.console().print(tables.stages_table(plans))
        print_sum(plans)
    else:
        case = named(cases, FLAGS.stage)
        plans = [make_plan(case, constants, FLAGS.compile, FLAGS.document_length)]
        show(plans[0])
    if FLAGS.json:
        sources = {
            n: {"value": constants.values[n], "source": s} for n, s in constants.sources.items()
        }
        write_json(Path(FLAGS.json), {"constants": sources, "stages": [*map(as_json, plans)]})
    return report_fit(plans)


def show(plan: Plan) -> None:
    case, console = plan.case, tables.console()
    console.print(
        f"{define(case.model).parameter_count():,} parameters, {tables.layout_text(case)}: "
        f"{case.mesh.devices:,} H100s; {case.rows:,} rows of {case.length:,} tokens in "
        f"{case.micro_batches} micro-batches; remat {case.model.remat}, reshard_after_forward {case.mesh.reshard_after_forward}, "
        f"attention {case.model.attention}"
    )
    console.print(tables.memory_table(plan))
    if plan.compiled:
        console.print(tables.collective_table(plan))
        console.print(
            f"compiled in {plan.compiled.seconds:.0f} s and "
            f"{plan.compiled.process_bytes / 1e9:.1f} GB"
        )
    if case.schedule:
        result = simulate(case.schedule, _BACKWARD_COST.get(case.model.remat, 3.0))
        console.print(
            f"pipeline: {result.ticks} ticks, bubble {result.bubble:.1%} of busy time, at most "
            f"{max(result.in_flight)} chunks in flight"
        )
    of = plan.checkpoint
    line = f"checkpoint: {of.size / 1e12:.2f} TB; a restore reads {of.read / 1e12:.2f} TB in all"
    if case.mesh.pipe > 1:
        line += (
            f"; like a save it takes {of.held / 1e9:.2f} GB more of each GPU, which exchanges "
            f"{of.exchanged / 1e9:.2f} GB with its pipeline's"
        )
    console.print(line)
    console.print(tables.time_table(plan))
    console.print(tables.accounting_table(plan))
    console.print(tables.range_table(plan))
    print_sum([plan])


def print_sum(plans: list[Plan]) -> None:
    days, energy = sum(p.days for p in plans), sum(p.energy_mwh for p in plans)
    tokens = sum(p.case.steps * p.case.tokens for p in plans)
    hours = sum(p.days * 24 * p.cost.gpus for p in plans)
    print(
        f"{tokens:.3e} tokens, {tokens / days / 1e9:,.2f}B tokens/day: {days:,.2f} days, "
        f"{hours / 1e6:,.2f}M GPU-hours, {energy:,.0f} MWh, without interruptions"
    )


def show_search(case: Case, constants: Constants) -> int:
    gpus = FLAGS.gpus or case.mesh.devices
    fitting, looked_at = search(case, gpus, constants)
    best, peaks = [], []
    for candidate in fitting:
        peak = compile_case(candidate.case).peak if FLAGS.compile else None
        if peak is None or peak <= usable(case, constants.memory):
            best.append(candidate)
            peaks.append(peak)
        if len(best) == FLAGS.best:
            break
    print(f"{looked_at} layouts of {gpus} GPUs, {len(fitting)} fit by the closed form")
    tables.console().print(tables.search_table(best, peaks))
    if FLAGS.json:
        plans = [make_plan(c.case, constants, False) for c in best]
        stages = [
            as_json(p) | {"compiled_peak": peak} for p, peak in zip(plans, peaks, strict=True)
        ]
        write_json(Path(FLAGS.json), {"looked_at": looked_at, "fit": len(fitting), "best": stages})
    return 0


def show_schedule(case: Case) -> None:
    if case.mesh.pipe == 1:
        raise UserError(f"stage {case.name} has no pipeline: mesh.pipe is 1")
    schedule = make_schedule(case.mesh, case.micro_batches)
    console = tables.console()
    print(chart(schedule, console.width))
    result = simulate(schedule, _BACKWARD_COST.get(case.model.remat, 3.0))
    print(
        f"{schedule.name}: {result.ticks} ticks; bubble {result.bubble:.1%} of busy time as "
        f"executed, {result.bubble_free_running:.1%} if ranks met only when they must; in flight "
        f"{max(result.in_flight)} of {schedule.micro_batches * schedule.virtual} chunks"
    )


def report_fit(plans: list[Plan]) -> int:
    for plan in plans:
        if not plan.fits:
            raise UserError(
                f"stage {plan.case.name} needs {plan.used / 2**30:.1f} GiB of a GPU's "
                f"{plan.memory_limit / 2**30:.1f}: more ranks, a smaller micro_batch_tokens, "
                "or model.remat='full'"
            )
    return 0


if __name__ == "__main__":
    define_flags()
    cli.run(main)
