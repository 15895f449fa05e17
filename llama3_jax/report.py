"""Writes a run's report.html: tables, plots and samples, in one file that opens offline.

    python -m llama3_jax.report --workdir=runs/demo

Works on a finished run, an interrupted one, or one that is still training. Losses of simpler
models on the same held-out text are shown beside the run's where <workdir>/baselines.json has
them: {"unigram": {source: nats per token}, …}.
"""

from pathlib import Path

from absl import flags

from llama3_jax import cli
from llama3_jax.errors import UserError
from llama3_jax.files import check_output_file
from llama3_jax.reporting.page import REPORT_FILE
from llama3_jax.reporting.records import require_run
from llama3_jax.reporting.run import write_run_report

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Directory of the run; report.html is written there.")


def main(_) -> None:
    if not FLAGS.workdir:
        raise UserError("--workdir is required: the directory of a run")
    workdir = Path(FLAGS.workdir)
    require_run(workdir)
    check_output_file("--workdir", workdir / REPORT_FILE, overwrite=True)
    path = write_run_report(workdir)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
