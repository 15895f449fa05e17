"""`fit probe`: what candidates gained over the control arm, and what the design could have seen."""

from absl import flags

from llama3_jax.scaling.commands.common import (
    between,
    check_outputs,
    console,
    define_output,
    required_path,
    table,
    write_result,
)
from llama3_jax.scaling.probe import judge, read_probes

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("data", None, "CSV of annealed runs: arm, seed, benchmark, score.")
    flags.DEFINE_float("level", 0.9, "Coverage of the intervals.", 0.01, 0.999)
    define_output()


def main() -> None:
    path = required_path("data", "a CSV with columns arm, seed, benchmark, score")
    check_outputs(path)
    result = judge(read_probes(path), FLAGS.level)
    level = f"{result['level']:.0%}"
    shown = table(
        f"candidate minus control ({result['candidates']} candidates, corrected)", "candidate",
        "benchmark", "verdict", "difference", level, "smallest detectable", "p (Holm)", "seeds",
        left=3,
    )  # fmt: skip
    for row in result["comparisons"]:
        shown.add_row(
            row["candidate"], row["benchmark"], row["verdict"], f"{row['difference']:+.4f}",
            between(row["ci"], "+.4f"), f"{row['smallest_detectable']:.4f}",
            f"{row['p_corrected']:.3f}",
            f"{row['seeds'][0]} / {row['seeds'][1]}{' paired' if row['paired'] else ''}",
        )  # fmt: skip
    console.print(shown)
    console.print(f"smallest detectable: the difference that this many seeds find {result['power']:.0%} "
                  "of the time")  # fmt: skip
    write_result(result)
