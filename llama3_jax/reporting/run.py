"""A run's whole report: training, and every part of the run's folder that has a section."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llama3_jax.reporting import curation, evaluation, layers, survival, tokenizers
from llama3_jax.reporting.page import Section, write_report
from llama3_jax.reporting.records import load, read_records, require_run

# Each gives sections where the run's folder holds what it shows, and none where it does not.
Part = Callable[[Path, Sequence[dict[str, Any]]], list[Section]]
PARTS: tuple[Part, ...] = (
    lambda workdir, _: curation.sections(workdir),
    evaluation.sections,
    lambda _, records: layers.sections(records),
    lambda workdir, _: survival.sections(workdir),
    lambda workdir, _: tokenizers.sections(workdir),
)


def write_run_report(workdir: Path, first: Sequence[Section] = ()) -> Path:
    """Writes the report of the run in `workdir`, with `first` before its other parts' sections.

    Raises:
      UserError: it is not a run's, a file in it is damaged, or the report can't be written.
    """
    require_run(workdir)
    records = read_records(workdir)
    run = load(workdir, records)
    parts = [section for part in PARTS for section in part(workdir, records)]
    return write_report(workdir, [*first, *parts], run)
