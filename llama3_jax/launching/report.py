"""An experiment's report.html from the queue and its units' folders."""

import html
import shlex
import time
from collections import Counter
from pathlib import Path

from llama3_jax.curation.layout import FUNNEL_FILE
from llama3_jax.errors import UserError
from llama3_jax.launching import look
from llama3_jax.launching.store import ENDED, STATES, Experiment, Store
from llama3_jax.reporting import curation
from llama3_jax.reporting.experiment import UnitEntry, write_experiment
from llama3_jax.reporting.page import REPORT_FILE, Section, Table, plots_html, table_html
from llama3_jax.scaling import isoflop
from llama3_jax.scaling.figures import isoflop_plots
from llama3_jax.scaling.runs import read_runs

RUNS_FILE, SECTIONS = "runs.csv", "sections"
# How far beyond its budgets a sweep's plots reach, and resamples for their bands.
REACH, RESAMPLES = 10.0, 200


def write_experiment_report(store: Store, experiment: Experiment) -> Path:
    """Writes the experiment's report; it links to those of units that have one.

    Raises:
      UserError: a unit's file is damaged, or a page can't be written.
    """
    units = store.units(experiment.xid)
    by_wid = {unit.wid: unit for unit in units}
    entries = []
    for unit in units:
        ended = unit.ended if unit.state in ENDED else time.time()
        seconds = None if unit.started is None or ended is None else ended - unit.started
        entries.append(UnitEntry(
            unit.wid, unit.name, look.shown_state(unit, by_wid), unit.attempt, seconds, Path(unit.workdir),
            look.last_lines(unit.log, look.LAST_LINES) if unit.state == "failed" else (),
        ))  # fmt: skip
    counts = Counter(unit.state for unit in units)
    states = ", ".join(f"{counts[s]} {s}" for s in STATES if counts[s])
    note = f"Launched {look.clock(experiment.created)} on {experiment.executor}; {len(units)} work units: {states}."
    path = store.directory(experiment.xid) / REPORT_FILE
    title = f"Experiment {experiment.xid}: {experiment.title}"
    more = [*own_sections(path.parent), *isoflop_sections(path.parent)]
    more += [section for entry in entries for section in curation_sections(entry)]
    more += launches_sections(store, experiment)
    write_experiment(path, title, note, entries, more)
    return path


def launches_sections(store: Store, experiment: Experiment) -> list[Section]:
    """When it was launched and resumed, and the code that this found."""
    if not (launches := store.launches(experiment.xid)):
        return []
    rows = [
        [str(launch.number), look.clock(launch.created), launch.host,
         ", ".join(launch.revisions) or "no git revision", shlex.join(launch.command)]
        for launch in launches
    ]  # fmt: skip
    columns = ["launch", "time", "host", "code", "arguments"]
    table = Table(columns, rows, words=columns[1:])
    return [Section("Launches", table_html(table))]


def own_sections(folder: Path) -> list[Section]:
    """What units wrote as <experiment>/sections/TITLE.html, as it is."""
    return [
        Section(path.stem, path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob(f"{SECTIONS}/*.html"))
    ]


def curation_sections(entry: UnitEntry) -> list[Section]:
    """The funnel of a unit that curated."""
    if not (entry.workdir / FUNNEL_FILE).exists():
        return []
    funnel = curation.section(curation.read(entry.workdir))
    own_ids = funnel.html.replace('"funnel-', f'"funnel-{entry.wid}-')
    return [Section(f"{funnel.title}: {entry.name}", own_ids)]


def isoflop_sections(folder: Path) -> list[Section]:
    """The fit of the table of runs that a unit left in the experiment's folder, if one did."""
    if not (path := folder / RUNS_FILE).exists():
        return []
    try:
        runs = read_runs(path)
        fit = isoflop.fit_isoflop(runs, isoflop.Options(REACH * runs.budgets.max(), RESAMPLES))
    except UserError as error:
        return [Section("IsoFLOP", f'<p class="note">{html.escape(str(error))}</p>')]
    if not fit.methods:
        reasons = html.escape("; ".join(fit.warnings))
        return [Section("IsoFLOP", f'<p class="note">No method fits: {reasons}</p>')]
    return [Section("IsoFLOP", plots_html("isoflop", isoflop_plots(fit)))]
