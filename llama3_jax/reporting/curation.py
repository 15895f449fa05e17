"""What became of the pages of a curation run: funnel, reasons, and examples to judge them by."""

import html
import itertools
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pyarrow.parquet as pq

from llama3_jax.curation.layout import COUNTS, FUNNEL_FILE, STAGES, TIMES_FILE, files
from llama3_jax.errors import UserError
from llama3_jax.reporting import figures
from llama3_jax.reporting.page import NONE, Section, Table, plots_html, table_html
from llama3_jax.reporting.page import write_page as write_sections

FOLDER = "curation"
PAGE_FILE = "curation.html"
EXAMPLES, EXAMPLE_CHARACTERS = 10, 600
# Languages, sources or reasons with a colour of their own; the rest are one.
NAMED = 7

Rows = list[dict[str, Any]]


def sections(workdir: Path) -> list[Section]:
    """The report's section on curation, if the run's folder has one.

    Raises:
      UserError: its funnel is damaged.
    """
    folder = workdir / FOLDER
    return [section(read(folder))] if (folder / FUNNEL_FILE).exists() else []


def read(workdir: Path) -> dict[str, Any]:
    try:
        return json.loads((workdir / FUNNEL_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{workdir / FUNNEL_FILE}: damaged funnel ({error})") from None


def section(funnel: dict[str, Any]) -> Section:
    """Funnel plots and tables."""
    parts = [
        plots_html("funnel", funnel_plots(funnel)),
        f"<h3>Stages</h3>{table_html(stage_table(funnel))}",
        f"<h3>Reasons</h3>{table_html(reason_table(funnel))}",
        f"<h3>Input</h3>{table_html(input_table(funnel))}",
    ]
    return Section("Curation", "\n".join(parts))


def write_page(workdir: Path) -> Path:
    """Writes the run's curation.html: the section, and examples of every stage's decisions."""
    funnel = read(workdir)
    times = json.loads((workdir / TIMES_FILE).read_bytes())
    path = workdir / PAGE_FILE
    shown = [section(funnel), Section("Seconds", table_html(time_table(times)))]
    shown += [_examples(folder) for folder in sorted((workdir / STAGES).glob("[0-9]*"))]
    write_sections(path, "Curation", shown)
    return path


# ---------------------------------------------------------------------------------------- figures


def funnel_plots(funnel: dict[str, Any]) -> list[figures.Plot]:
    """What is left after each stage, by source and by language, and why the rest is not."""
    stages = [stage["stage"] for stage in funnel["stages"]]
    kept = [_kept(stage["counts"]) for stage in funnel["stages"]]
    plots = []
    for measure in COUNTS:
        if not any(measure in row for rows in kept for row in rows):
            continue
        for key in ("source", "language"):
            if len({row[key] for rows in kept for row in rows}) < 2 and key == "language":
                continue
            bars = _bars(stages, [_sums(rows, key, measure) for rows in kept], "unknown")
            plots.append(figures.Plot(f"{measure.capitalize()} kept, by {key}", bars))
    gone = [[r for r in stage["counts"] if r["reason"]] for stage in funnel["stages"]]
    bars = _bars(stages, [_sums(rows, "reason", "documents") for rows in gone], "")
    plots.append(figures.Plot("Documents rejected, by reason", bars, wide=True))
    return plots


def _bars(stages: list[str], counts: list[Counter], unnamed: str) -> go.Figure:
    """Stacked bars, a stage each, the largest names first."""
    total = Counter[str]()
    for each in counts:
        for name, number in each.items():
            total[name] = max(total[name], number)
    names = [name for name, _ in sorted(total.items(), key=lambda item: (-item[1], item[0]))]
    groups = [(name or unnamed, [name]) for name in names[:NAMED]]
    if rest := names[NAMED:]:
        groups.append((f"{len(rest)} others", rest))
    bars = [
        go.Bar(
            name=html.escape(label),
            x=[sum(each[name] for name in members) for each in counts],
            y=stages,
            orientation="h",
            marker={"color": colour},
            hovertemplate="%{x:,}",
        )
        for (label, members), colour in zip(
            groups, itertools.cycle([*figures.COLOURS, figures.NEUTRAL])
        )
    ]
    return go.Figure(
        bars,
        {
            "barmode": "stack",
            "height": 90 + 28 * len(stages),
            "margin": {"l": 110, "r": 14, "t": 8, "b": 40},
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
            "yaxis": {"autorange": "reversed"},
            "showlegend": True,
        },
    )


def _kept(rows: Rows) -> Rows:
    return [row for row in rows if not row["reason"]]


def _sums(rows: Rows, key: str, measure: str) -> Counter:
    sums = Counter[str]()
    for row in rows:
        sums[row[key]] += row.get(measure, 0)
    return sums


# ----------------------------------------------------------------------------------------- tables


def stage_table(funnel: dict[str, Any]) -> Table:
    """Documents in and out of each stage, and what of it is kept."""
    rows = []
    for stage in funnel["stages"]:
        kept = _kept(stage["counts"])
        documents = sum(row["documents"] for row in stage["counts"])
        left = sum(row["documents"] for row in kept)
        sizes = [sum(row.get(name, 0) for row in kept) or None for name in COUNTS[1:]]
        share = left / documents if documents else 0.0
        shown = [NONE if size is None else f"{size:,}" for size in sizes]
        rows.append([stage["stage"], f"{documents:,}", f"{left:,}", f"{share:.2%}", *shown])
    return Table(["stage", "documents", "kept", "share", *COUNTS[1:]], rows)


def reason_table(funnel: dict[str, Any]) -> Table:
    rows = []
    for stage in funnel["stages"]:
        gone = _sums([row for row in stage["counts"] if row["reason"]], "reason", "documents")
        whole = sum(row["documents"] for row in stage["counts"])
        for reason, number in sorted(gone.items(), key=lambda item: (-item[1], item[0])):
            rows.append([stage["stage"], reason, f"{number:,}", f"{number / whole:.2%}"])
    return Table(["stage", "reason", "documents", "of the stage's"], rows, words=["reason"])


def input_table(funnel: dict[str, Any]) -> Table:
    """What was read of each source, and what of its files is damaged."""
    rows = []
    for source, account in funnel["inputs"].items():
        others = ", ".join(f"{kind} {n:,}" for kind, n in account["other_records"].items())
        lost = sum(each["bytes"] for each in account["damaged"])
        damaged = f"{len(account['damaged']):,} ({lost:,} bytes)" if account["damaged"] else "0"
        rows.append([
            source, f"{account['files']:,}", f"{account['bytes']:,}", f"{account['rows']:,}",
            damaged, others or NONE,
        ])  # fmt: skip
    columns = ["source", "files", "bytes", "records", "damaged stretches", "other records"]
    return Table(columns, rows, words=["other records"])


def time_table(times: dict[str, float]) -> Table:
    return Table(["stage", "seconds"], [[name, f"{value:,.1f}"] for name, value in times.items()])


# --------------------------------------------------------------------------------------- examples


def _examples(folder: Path) -> Section:
    """Some of what a stage kept and rejected, the same at each look: `doc` is a hash."""
    name = folder.name.split("_", 1)[1]
    kept = itertools.islice(_documents(folder / "kept"), EXAMPLES)
    of_reason: dict[str, Rows] = {}
    for row in _documents(folder / "rejected"):
        found = of_reason.setdefault(row["reason"], [])
        if len(found) < EXAMPLES:
            found.append(row)
    # Of each reason one, then of each a second, …
    rounds = itertools.chain(*itertools.zip_longest(*of_reason.values()))
    rejected = list(itertools.islice((row for row in rounds if row), EXAMPLES))
    parts = [_cards("kept", kept), _cards("rejected", rejected)]
    return Section(f"{name}: examples", "".join(parts))


def _documents(folder: Path) -> Iterable[dict[str, Any]]:
    for path in files(folder):
        file = pq.ParquetFile(path)
        names = [name for name in file.schema_arrow.names if name != "html"]
        for batch in file.iter_batches(EXAMPLES, columns=names):
            yield from batch.to_pylist()


def _cards(kind: str, rows: Iterable[dict[str, Any]]) -> str:
    cards = []
    for row in rows:
        reason = f"<strong>{html.escape(row['reason'])}</strong> " if row.get("reason") else ""
        scores = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in row.items()
            if "_" in key and value not in (None, "") and key not in ("content_type",)
        )
        text = row.get("text") or ""
        cut = text[:EXAMPLE_CHARACTERS] + ("…" if len(text) > EXAMPLE_CHARACTERS else "")
        cards.append(
            f"<details><summary>{kind}: {reason}{html.escape(row['url'] or row['doc'])} "
            f"<small>{html.escape(row['title'][:100])}</small></summary>"
            f'<p class="note">{html.escape(scores)}</p>'
            f'<pre style="white-space:pre-wrap">{html.escape(cut)}</pre></details>'
        )
    return "\n".join(cards) or f'<p class="note">none {kind}</p>'
