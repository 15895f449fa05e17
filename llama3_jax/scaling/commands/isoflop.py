"""`fit isoflop`: compute-optimal tokens and size at a budget, by four methods with their spread."""

from pathlib import Path

from absl import flags

from llama3_jax.errors import UserError
from llama3_jax.reporting.page import Section, plots_html, write_page
from llama3_jax.scaling import isoflop
from llama3_jax.scaling.commands.common import (
    between,
    check_outputs,
    console,
    define_bootstrap,
    define_output,
    required_number,
    required_path,
    say_warnings,
    table,
    write_result,
)
from llama3_jax.scaling.figures import isoflop_plots
from llama3_jax.scaling.runs import read_runs

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("data", None, "CSV of runs: flops, tokens, loss; params, label optional.")
    flags.DEFINE_float("target_flops", None, "Budget to extrapolate to.")
    flags.DEFINE_multi_enum("methods", list(isoflop.METHODS), isoflop.METHODS, "Methods to fit.")
    flags.DEFINE_string("report", None, "HTML file that takes the plots.")
    define_bootstrap(1000)
    define_output()


def main() -> None:
    path = required_path("data", "a CSV of runs with columns flops, tokens, loss")
    target = required_number("target_flops", "the budget to extrapolate to")
    check_outputs(path)
    options = isoflop.Options(
        target, FLAGS.resamples, FLAGS.level, FLAGS.seed, tuple(dict.fromkeys(FLAGS.methods))
    )
    fit = isoflop.fit_isoflop(read_runs(path), options)
    if not fit.methods:
        raise UserError(f"{path}: no method fits these runs: {'; '.join(fit.warnings)}")
    result = isoflop.result(fit)
    print_result(result)
    write_result(result)
    if FLAGS.report:
        section = Section("Plots", plots_html("isoflop", isoflop_plots(fit)))
        write_page(Path(FLAGS.report), f"Compute-optimal fit of {path.name}", [section])


def print_result(result: dict) -> None:
    level = f"{result['level']:.0%}"
    shown = table(
        f"tokens = A C^alpha, at {result['target_flops']:.3g} FLOPs ({level} intervals)",
        "method", "alpha", level, "A", "tokens", level, "leave one out", "params", level,
    )  # fmt: skip
    for name, fit in result["methods"].items():
        shown.add_row(*_cells(name, fit), end_section="without_outliers" not in fit)
        if "without_outliers" in fit:
            shown.add_row(*_cells("  no outliers", fit["without_outliers"]), end_section=True)
    console.print(shown)
    if spread := result["spread"]:
        console.print(
            f"over all methods and their intervals: alpha {between(spread['alpha'])}, "
            f"tokens {between(spread['tokens'])}, params {between(spread['params'])}"
        )
    if (curve := result["curvature"]) and curve["exponent"] is not None:
        flat = "the IsoFLOPs flatten" if curve["flattening"] else "no clear flattening"
        console.print(
            f"curvature of the IsoFLOPs goes as C^{curve['exponent']:.3f} "
            f"({level}: {between(curve['ci'])}): {flat}"
        )
    for outlier in result["outliers"]:
        console.print(f"outlier: {outlier['label']}: {outlier['reason']}", markup=False)
    say_warnings(result["warnings"])


def _cells(name: str, fit: dict) -> list[str]:
    left = [v for v in fit.get("leave_one_budget_out", {}).get("tokens", []) if v is not None]
    ci = fit["ci"]
    return [
        name, f"{fit['alpha']:.4f}", between(ci["alpha"], ".3f"), f"{fit['A']:.3g}",
        f"{fit['tokens']:.3g}", between(ci["tokens"]),
        between([min(left), max(left)]) if left else "", f"{fit['params']:.3g}",
        between(ci["params"]),
    ]  # fmt: skip
