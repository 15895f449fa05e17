"""A run's report.html: one file that holds its plots, tables and samples."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import plotly.offline
from markupsafe import Markup

from llama3_jax.errors import UserError
from llama3_jax.files import write_text
from llama3_jax.reporting import figures
from llama3_jax.reporting.records import RunRecords, TrainRecord, load

REPORT_FILE = "report.html"
# Not-applied steps that are listed one by one.
LISTED_STEPS = 200
NONE = "–"


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page that something else than training adds, between samples and config.

    `html` goes into the page as it is: escape what is not markup. `figures.figure_html` gives
    that of a plot, `table_html` that of a table.
    """

    title: str
    html: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Headings and rows of text; the first column and those of `words` are set to the left.

    With `sort_keys`, a number or text for each cell ("" for none), a click on a heading sorts.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[str] = ()
    sort_keys: Sequence[Sequence[float | str]] = ()


def write_report(
    workdir: Path, extra_sections: Sequence[Section] = (), run: RunRecords | None = None
) -> Path:
    """Writes the report of the run in `workdir` and returns its path; `run` where it is loaded.

    Raises:
      UserError: `workdir` is not a run's, a file in it is damaged, or it can't be written.
    """
    run = run or load(workdir)
    summary, summary_note = summary_table(run)
    dropped = [record for record in run.train if not record.applied]
    page = _environment().get_template("report.html").render(
        run=run,
        last=run.train[-1],
        plotly_js=Markup(plotly.offline.get_plotlyjs()),
        summary=summary,
        summary_note=summary_note,
        plot_groups={
            "Loss": list(_numbered("loss", figures.loss_plots(run))),
            "Schedule": list(_numbered("schedule", figures.schedule_plots(run))),
            "Steps": list(_numbered("steps", figures.step_plots(run))),
        },
        stages=stage_table(run),
        prompts=samples_of_prompts(run),
        dropped=len(dropped),
        dropped_listed=dropped_table(dropped[:LISTED_STEPS]),
        extra_sections=[dataclasses.replace(s, html=Markup(s.html)) for s in extra_sections],
        config=json.dumps(run.config, indent=2, ensure_ascii=False) if run.config else None,
    )  # fmt: skip
    path = workdir / REPORT_FILE
    _write(path, page)
    return path


def write_page(path: Path, title: str, sections: Sequence[Section], note: str = "") -> None:
    """Writes a page of sections alone, for what is not about one run; `note` under its title.

    Raises:
      UserError: it can't be written.
    """
    page = _environment().get_template("page.html").render(
        title=title,
        note=note,
        plotly_js=Markup(plotly.offline.get_plotlyjs()),
        sections=[dataclasses.replace(s, html=Markup(s.html)) for s in sections],
    )  # fmt: skip
    _write(path, page)


def plots_html(group: str, plots: Sequence[figures.Plot]) -> str:
    """Plots as cards side by side, for the html of a Section."""
    template = _environment().get_template("plots.html")
    return str(template.module.plots(list(_numbered(group, plots))))


def table_html(table: Table) -> str:
    """A table in the page's style, for the html of a Section."""
    return str(_environment().get_template("table.html").module.table(table))


# ------------------------------------------------------------------------------------- the tables


def summary_table(run: RunRecords) -> tuple[Table | None, str]:
    """The last held-out losses beside the baselines; in bold the best where several compare."""
    if not run.validation:
        return None, "No held-out loss was measured."
    final = run.validation[-1]
    columns = ["source", "this run", *run.baselines, "bits per byte"]
    models = [final.losses, *run.baselines.values()]
    rows = []
    for source in final.losses:
        losses = [model.get(source) for model in models]
        rows.append([source, *_best_bold(losses), _loss(final.bits_per_byte.get(source))])
    if len(rows) > 1:
        means = [_mean(model, final.losses) for model in models]
        rows.append(["mean", *_best_bold(means), _loss(_mean(final.bits_per_byte, final.losses))])
    note = (
        f"Held-out loss after {final.tokens:,} tokens, in nats per token and, for this run, bits "
        f"per byte; rows of {final.length:,} tokens."
    )
    return Table(columns, rows), note


def stage_table(run: RunRecords) -> Table:
    columns = [
        "stage", "tokens", "steps", "length", "batch", "learning rate", "tokens/s", "mix",
    ]  # fmt: skip
    rows = []
    for steps in run.stages():
        timed = [record for record in steps if record.seconds]
        seconds = sum(record.seconds for record in timed)
        speed = sum(record.batch_tokens for record in timed) / seconds if timed else None
        mixes = list(dict.fromkeys(", ".join(_weights(record.mix)) for record in steps))
        mix = mixes[0] if len(mixes) == 1 else f"{mixes[0]} to {mixes[-1]}"
        rows.append([
            steps[0].stage,
            f"{sum(record.batch_tokens for record in steps):,}",
            f"{len(steps):,}",
            _ends(steps[0].length, steps[-1].length, ","),
            _ends(steps[0].batch_tokens, steps[-1].batch_tokens, ","),
            _ends(steps[0].learning_rate, steps[-1].learning_rate, ".3g"),
            NONE if speed is None else f"{speed:,.0f}",
            mix,
        ])  # fmt: skip
    return Table(columns, rows, words=["mix"])


def dropped_table(records: Sequence[TrainRecord]) -> Table:
    rows = [
        [f"{r.step:,}", f"{r.tokens:,}", r.stage, f"{r.loss:.4g}", f"{r.grad_norm:.4g}"]
        for r in records
    ]
    return Table(["step", "tokens", "stage", "loss", "gradient norm"], rows, words=["stage"])


def samples_of_prompts(run: RunRecords) -> dict[str, list[dict[str, Any]]]:
    """What each prompt was continued with, newest first."""
    prompts: dict[str, list[dict[str, Any]]] = {}
    for record in run.samples:
        for sample in record.samples:
            entry = {"step": record.step, "tokens": record.tokens, "text": sample.text}
            prompts.setdefault(sample.prompt, []).insert(0, entry)
    return prompts


def _best_bold(losses: Sequence[float | None]) -> list[str]:
    finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    best = min(finite) if len(finite) > 1 else None
    bold = Markup("<strong>{}</strong>")
    return [
        bold.format(_loss(loss)) if best is not None and loss == best else _loss(loss)
        for loss in losses
    ]


def _mean(values: Mapping[str, float], sources: Sequence[str]) -> float | None:
    """None where a source is missing: a mean over fewer could not be compared."""
    if any(source not in values for source in sources):
        return None
    return sum(values[source] for source in sources) / len(sources)


def _loss(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def _weights(mix: Mapping[str, float]) -> list[str]:
    return [f"{source} {weight:g}" for source, weight in mix.items()]


def _ends(first: float, last: float, form: str) -> str:
    first, last = f"{first:{form}}", f"{last:{form}}"
    return first if first == last else f"{first} to {last}"


# --------------------------------------------------------------------------------------- the page


def _write(path: Path, page: str) -> None:
    try:
        write_text(path, page)
    except PermissionError:
        raise UserError(f"{path}: no permission to write it") from None


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("llama3_jax"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _numbered(group: str, plots: Sequence[figures.Plot]) -> Iterator[tuple[figures.Plot, Markup]]:
    """Plots with their markup; ids that don't change keep two reports of a run identical."""
    for number, plot in enumerate(plots):
        yield plot, Markup(figures.figure_html(plot.figure, f"{group}-{number}"))
