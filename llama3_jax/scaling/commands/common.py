"""Flags and output that the commands share."""

from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console
from rich.table import Table

from llama3_jax import cli
from llama3_jax.errors import UserError
from llama3_jax.files import check_output_file, write_json

FLAGS = flags.FLAGS
# Where the output is no terminal there is no width to fit into.
console = Console(soft_wrap=True, highlight=False, width=None if Console().is_terminal else 160)


def define_output() -> None:
    flags.DEFINE_string("json", None, "File that takes all results.")
    cli.define_overwrite()


def define_bootstrap(resamples: int) -> None:
    flags.DEFINE_integer("resamples", resamples, "Size of the bootstrap.", lower_bound=50)
    flags.DEFINE_float("level", 0.9, "Coverage of the intervals.", 0.01, 0.999)
    flags.DEFINE_integer("seed", 0, "Seed of everything random.")


def required_path(flag: str, what: str) -> Path:
    """
    Raises:
      UserError: the flag is not given.
    """
    if not FLAGS[flag].value:
        raise UserError(f"--{flag} is required: {what}")
    return Path(FLAGS[flag].value)


def required_number(flag: str, what: str) -> float:
    """
    Raises:
      UserError: the flag is not given or not positive.
    """
    value = FLAGS[flag].value
    if value is None:
        raise UserError(f"--{flag} is required: {what}")
    if not value > 0 or value == float("inf"):
        raise UserError(f"--{flag} is {value:g}; it must be positive")
    return value


def check_outputs(*inputs: str | Path) -> None:
    """
    Raises:
      UserError: a file to be written is there, is one of `inputs` or cannot be written; before
        anything is computed.
    """
    for flag in ("json", "report"):
        if flag in FLAGS and FLAGS[flag].value:
            check_output_file(f"--{flag}", FLAGS[flag].value, FLAGS.overwrite, inputs)


def write_result(result: dict[str, Any]) -> None:
    if FLAGS.json:
        write_json(Path(FLAGS.json), result)


def table(title: str, *columns: str, left: int = 1) -> Table:
    """A console table whose first `left` columns are set to the left."""
    made = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index < left else "right")
    return made


def between(bounds: list[float] | None, form: str = ".3g") -> str:
    return "none" if bounds is None else f"{bounds[0]:{form}} to {bounds[1]:{form}}"


def say_warnings(warnings: list[str]) -> None:
    for line in warnings:
        console.print(f"warning: {line}", markup=False)
