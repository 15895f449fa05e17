"""`fit downstream`: accuracy of a larger model through the likelihood of the right answers."""

from absl import flags

from llama3_jax.errors import UserError
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
from llama3_jax.scaling.downstream import FORMS, Target
from llama3_jax.scaling.forecast import Options, forecast, read_task
from llama3_jax.scaling.runs import FLOPS_PER_PAIR

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("data", None, "CSV of checkpoints: run, params, tokens, nll, accuracy; "
                        "flops, task and role (external) optional.")  # fmt: skip
    flags.DEFINE_string("task", None, "Which task of the file.")
    flags.DEFINE_float("target_params", None, "Parameters of the model to forecast.")
    flags.DEFINE_float("target_tokens", None, "Its training tokens.")
    flags.DEFINE_float("target_flops", None, "Its FLOPs; 6 x params x tokens where not given.")
    flags.DEFINE_multi_enum("forms", list(FORMS), FORMS, "Laws of the NLL to fit.")
    flags.DEFINE_integer("average", 1, "Checkpoints whose mean is a run's end.", lower_bound=1)
    flags.DEFINE_float("skip", 0.1, "Share of a run's start that stage 2 omits.", 0.0, 0.9)
    define_bootstrap(500)
    define_output()


def main() -> None:
    path = required_path("data", "a CSV of checkpoints with columns run, params, tokens, nll, "
                         "accuracy")  # fmt: skip
    params = required_number("target_params", "parameters of the model to forecast")
    tokens = required_number("target_tokens", "its training tokens")
    flops = FLAGS.target_flops or FLOPS_PER_PAIR * params * tokens
    if flops <= 0:
        raise UserError(f"--target_flops is {flops:g}; it must be positive")
    check_outputs(path)
    options = Options(
        forms=tuple(dict.fromkeys(FLAGS.forms)), resamples=FLAGS.resamples, level=FLAGS.level,
        seed=FLAGS.seed, average=FLAGS.average, skip=FLAGS.skip,
    )  # fmt: skip
    ladder, checkpoints = read_task(path, FLAGS.task, options)
    result = forecast(ladder, checkpoints, Target(params, tokens, flops), options)
    print_result(result)
    write_result(result)


def print_result(result: dict) -> None:
    level = f"{result['level']:.0%}"
    shown = table(
        f"forecast at {result['target']['flops']:.3g} FLOPs", "form", "NLL", level, "accuracy",
        level, "covered", "back-test", "NLL error", "accuracy error",
    )  # fmt: skip
    for name, form in result["forms"].items():
        back = form["back_test"]
        tested = (
            [back["run"], f"{back['nll_error']:+.2%}", f"{back['accuracy_error']:+.4f}"]
            if back
            else ["too few", "", ""]
        )
        shown.add_row(
            name, f"{form['nll']:.4f}", between(form["nll_ci"], ".4f"), f"{form['accuracy']:.4f}",
            between(form["accuracy_ci"], ".4f"),
            "yes" if form["covered"] else "NO: extrapolated", *tested,
        )  # fmt: skip
    console.print(shown)
    say_warnings(result["warnings"])
