"""`fit plan`: the next run that would narrow the interval of the target's optimum most."""

import dataclasses

from absl import flags

from llama3_jax.scaling.commands.common import (
    check_outputs,
    console,
    define_output,
    required_number,
    required_path,
    table,
    write_result,
)
from llama3_jax.scaling.next_run import Candidate, plan_next
from llama3_jax.scaling.profiles import PROFILES
from llama3_jax.scaling.runs import read_runs

FLAGS = flags.FLAGS
SHOWN = 8


def define_flags() -> None:
    flags.DEFINE_string("data", None, "CSV of the runs there are: flops, tokens, loss.")
    flags.DEFINE_float("target_flops", None, "Budget whose optimum is wanted.")
    flags.DEFINE_float("budget", None, "FLOPs that the next run may cost.")
    flags.DEFINE_enum("profile", "llama3", list(PROFILES), "Where LR and batch come from.")
    define_output()


def main() -> None:
    path = required_path("data", "a CSV of the runs there are")
    target = required_number("target_flops", "the budget whose optimum is wanted")
    budget = required_number("budget", "FLOPs that the next run may cost")
    check_outputs(path)
    plan = plan_next(read_runs(path), target, budget, FLAGS.profile)
    console.print(
        f"now: {plan.target_tokens:.3g} tokens at {target:.3g} FLOPs, standard deviation "
        f"{plan.deviation:.1%}; noise of a run's loss {plan.noise:.2%}"
    )
    largest = min(plan.candidates, key=lambda c: c.width_ratio)
    _print(f"best per FLOP, of {len(plan.candidates)} runs within {budget:.3g} FLOPs",
           plan.candidates[:SHOWN])  # fmt: skip
    _print("narrowest interval within the budget", [largest])
    write_result({
        "target_flops": target, "budget": budget, "tokens": plan.target_tokens,
        "deviation": plan.deviation, "noise": plan.noise,
        "candidates": [dataclasses.asdict(c) for c in plan.candidates],
        "narrowest": dataclasses.asdict(largest),
    })  # fmt: skip


def _print(title: str, candidates: list[Candidate]) -> None:
    shown = table(title, "shape", "tokens", "batch", "peak LR", "FLOPs", "interval becomes",
                  "share gone per 1e18 FLOPs")  # fmt: skip
    for c in candidates:
        shown.add_row(
            c.shape, f"{c.tokens:.3g}", f"{c.batch_tokens:,.0f}", f"{c.learning_rate:.3g}",
            f"{c.flops:.3g}", f"{c.width_ratio:.1%}", f"{c.gain_per_flop * 1e18:.2%}",
        )  # fmt: skip
    console.print(shown)
