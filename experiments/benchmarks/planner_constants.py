"""The planner's constants, from what the kernels' benchmark measured on a chip.

    python -m experiments.benchmarks.kernel_speed
    python -m experiments.benchmarks.planner_constants          # of the newest results
    python -m llama3_jax.plan --config=experiments/production/llama3_8b.py --constants=FILE

Efficiencies are of the data sheet's peak: products of a layer forward and backward, and attention
over one document of 8,192 tokens (its backward pass is what both ways take beyond the forward one,
and counts 2.5 times its operations). They replace the published ones of planning/constants.py.
"""

import json
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console
from rich.table import Table

from experiments.benchmarks import gpu
from experiments.benchmarks.gpu import BOTH, FORWARD
from llama3_jax import cli
from llama3_jax.errors import UserError
from llama3_jax.files import write_json
from llama3_jax.planning.constants import TABLE

CASE = "8,192 tokens, 1 document"

FLAGS = flags.FLAGS


def newest(folder: Path) -> Path:
    """
    Raises:
      UserError: there are no results of the kernels' benchmark.
    """
    found = sorted(folder.glob("kernels_*.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(
            f"no kernels_*.json in {folder}: run python -m experiments.benchmarks.kernel_speed on a GPU"
        )
    return found[-1]


def constants_of(results: dict[str, Any], source: str) -> dict[str, dict[str, Any]]:
    """{name: {value, source}} as the planner's --constants takes it.

    Raises:
      UserError: the results lack a part that is needed.
    """
    products = _rows(results, "products", BOTH)
    attention = _rows(results, "attention", FORWARD), _rows(results, "attention", BOTH)
    case = "1 document" if results["rehearsal"] else CASE  # a rehearsal's row is shorter
    forward, both = (next((r for r in rows if case in r["case"]), None) for rows in attention)
    if not (products and forward and both):
        raise UserError(f"{source}: lacks products, or attention both ways over {case}")
    peak = TABLE["peak"].value
    backward = both["milliseconds"] - forward["milliseconds"]
    values = {
        "gemm_efficiency": _rate(products) / peak,
        "triton_forward_efficiency": _rate([forward]) / peak,
        "triton_backward_efficiency": 2.5 * forward["work"] / (backward / 1e3) / peak,
        "memory_bandwidth": results["ceilings"]["gb_per_s"] * 1e9,
    }
    measured = f"measured on {results['chip']}, {results['date'][:10]} ({source})"
    return {name: dict(value=value, source=measured) for name, value in values.items()}


def _rows(results: dict[str, Any], part: str, what: str) -> list[dict[str, Any]]:
    return [
        row
        for row in results["results"]
        if (row["part"], row["what"], row["implementation"]) == (part, what, "ours")
    ]


def _rate(rows: list[dict[str, Any]]) -> float:
    return sum(row["work"] for row in rows) / sum(row["milliseconds"] / 1e3 for row in rows)


def main(_) -> None:
    folder = Path(FLAGS.results or gpu.RESULTS)
    path = Path(FLAGS.kernels) if FLAGS.kernels else newest(folder)
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        constants = constants_of(results, path.name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not results of experiments.benchmarks.kernel_speed: {error}"
        ) from None
    table = Table(title=f"{results['chip']}")
    for column in ("constant", "published", "measured"):
        table.add_column(column, justify="left" if column == "constant" else "right")
    for name, constant in constants.items():
        table.add_row(name, f"{TABLE[name].value:.4g}", f"{constant['value']:.4g}")
    Console(width=100).print(table)
    written = path.with_name(path.name.replace("kernels_", "constants_"))
    write_json(written, constants)
    print(f"written: {written}")


if __name__ == "__main__":
    flags.DEFINE_string(
        "kernels", None, "Results of the kernels' benchmark; by default the newest."
    )
    flags.DEFINE_string("results", None, "Folder of the results; by default beside the benchmarks.")
    cli.run(main)
