"""An experiment's report.html: its work units as a table, their losses overlaid, how they differ."""

import dataclasses
import html
import math
import os
import urllib.parse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup

from llama3_jax.reporting.figures import COLOURS, HALF_LIFE, START_SHARE, Plot, smooth, thin
from llama3_jax.reporting.page import (
    NONE,
    REPORT_FILE,
    Section,
    Table,
    plots_html,
    table_html,
    write_page,
)
from llama3_jax.reporting.records import RunRecords, load_if_trained, read_config

# Columns of config values in the table of units, and curves in a plot, at most.
SHOWN_KEYS, SHOWN_CURVES = 8, 60
CURVE_POINTS = 300
# The speed of a run is the median of this many last steps.
SPEED_STEPS = 50


@dataclasses.dataclass(frozen=True)
class UnitEntry:
    """A work unit as its executor knows it; `seconds` of its last attempt, `last_lines` of its log."""

    wid: int
    name: str
    state: str
    starts: int
    seconds: float | None
    workdir: Path
    last_lines: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class _Unit:
    entry: UnitEntry
    run: RunRecords | None
    config: dict[str, Any]


def write_experiment(
    path: Path, title: str, note: str, entries: Sequence[UnitEntry],
    more: Sequence[Section] = (),
) -> None:  # fmt: skip
    """Writes the report; `more` sections stand between the plots and the config differences.

    Raises:
      UserError: a unit's file is damaged, or the page can't be written.
    """
    units = [_read(entry) for entry in entries]
    sections = [Section("Work units", table_html(units_table(units, path.parent)))]
    if failed := [u.entry for u in units if u.entry.state == "failed"]:
        sections.append(Section("Failures", "".join(map(_failure, failed))))
    if plots := loss_plots(units):
        sections.append(Section("Loss", plots_html("loss", plots)))
    if plots := mix_plots(units):
        sections.append(Section("Mix", plots_html("mix", plots)))
    sections += more
    if differing := differences([u.config for u in units if u.config]):
        sections.append(Section("Config differences", table_html(difference_table(differing))))
    write_page(path, title, sections, note)


def _read(entry: UnitEntry) -> _Unit:
    run = load_if_trained(entry.workdir)
    # A run's config has been read with it; other programs leave one, too.
    config = run.config if run else read_config(entry.workdir)
    return _Unit(entry, run, flat(config) if config is not None else {})


# ------------------------------------------------------------------------------------ the tables


def units_table(units: Sequence[_Unit], folder: Path) -> Table:
    """A row a unit: what became of it, where it stands, and the swept values of its config.

    Held-out losses are weighted alike in all rows, so that the rows can be compared.
    """
    mix = units_mix(units)
    keys = list(differences([u.config for u in units if u.config]))[:SHOWN_KEYS]
    columns = ["WID", "unit", "state", "starts", "time", "tokens", "loss",
               "held-out, by mix" if mix else "held-out, mean", "tokens/s", *keys]  # fmt: skip
    rows, sort_keys = [], []
    for unit in units:
        entry, run = unit.entry, unit.run
        values: list[float | None] = [None] * 4
        if run is not None:
            held_out = weighted(run.validation[-1].losses, mix) if run.validation else None
            speeds = [r.tokens_per_second for r in run.train[-SPEED_STEPS:] if r.seconds]
            values = [run.train[-1].tokens, smoothed_end(run), held_out,
                      float(np.median(speeds)) if speeds else None]  # fmt: skip
        forms = (",", ".4f", ".4f", ",.0f")
        own = [unit.config.get(key, "") for key in keys]
        rows.append([
            str(entry.wid), _linked(entry, folder), entry.state, str(entry.starts),
            _clock(entry.seconds),
            *(NONE if v is None else f"{v:{f}}" for v, f in zip(values, forms, strict=True)),
            *map(shown, own),
        ])  # fmt: skip
        sort_keys.append([
            entry.wid, entry.name, entry.state, entry.starts,
            *("" if v is None or not math.isfinite(v) else v for v in (entry.seconds, *values)),
            *(v if isinstance(v, int | float) else str(v) for v in own),
        ])  # fmt: skip
    return Table(columns, rows, words=["unit", "state"], sort_keys=sort_keys)


def difference_table(differing: dict[str, list[Any]]) -> Table:
    """Each key whose value is not the same in all units, with its values and how often each is."""
    rows = []
    for key, values in differing.items():
        counts: dict[str, int] = {}
        for value in map(shown, values):
            counts[value] = counts.get(value, 0) + 1
        each = [f"{v} ({n} units)" if n > 1 else v for v, n in list(counts.items())[:20]]
        if len(counts) > 20:
            each.append(f"and {len(counts) - 20} more")
        rows.append([key, ", ".join(each)])
    return Table(["key", "values"], rows, words=["values"])


def differences(configs: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Keys whose values differ, with the value of each config ("" where it has no such key)."""
    keys = dict.fromkeys(key for config in configs for key in config)
    values = {key: [config.get(key, "") for config in configs] for key in keys}
    return {key: column for key, column in values.items() if any(v != column[0] for v in column)}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A nested config as {"stages.0.lr.peak": 0.001}."""
    if isinstance(value, dict):
        items: Iterable = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {prefix: value}
    joined: dict[str, Any] = {}
    for key, item in items:
        joined |= flat(item, f"{prefix}.{key}" if prefix else str(key))
    return joined


def shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def common_mix(mixes: Sequence[dict[str, float]]) -> dict[str, float] | None:
    """The mix that all have, without sources of weight 0; None where they differ."""
    own = [{name: weight for name, weight in mix.items() if weight > 0} for mix in mixes]
    return own[0] if own and all(mix == own[0] for mix in own) else None


def weighted(losses: dict[str, float], mix: dict[str, float] | None) -> float:
    """Mean of the losses by the mix, or, where None is given, of all alike."""
    mix = mix or dict.fromkeys(losses, 1.0)
    return sum(mix[name] * losses[name] for name in mix) / sum(mix.values())


def units_mix(units: Sequence[_Unit]) -> dict[str, float] | None:
    """The mix at the end of all units, where it is one and all have its held-out losses."""
    runs = [u.run for u in units if u.run is not None and u.run.validation]
    mix = common_mix([run.train[-1].mix for run in runs])
    if mix and all(name in v.losses for run in runs for v in run.validation for name in mix):
        return mix
    return None


def smoothed_end(run: RunRecords) -> float:
    return float(_smoothed(run)[1][-1])


def _linked(entry: UnitEntry, folder: Path) -> str:
    """The unit's name, as a link to its own report where it has one."""
    if not (report := entry.workdir / REPORT_FILE).exists():
        return entry.name
    return Markup('<a href="{}">{}</a>').format(
        urllib.parse.quote(os.path.relpath(report, folder)), entry.name
    )


def _failure(entry: UnitEntry) -> str:
    lines = html.escape("\n".join(entry.last_lines))
    return (f'<div class="card stacked"><h3>{html.escape(entry.name)}</h3>'
            f"<pre>{lines}</pre></div>")  # fmt: skip


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


# ------------------------------------------------------------------------------------- the plots


def loss_plots(units: Sequence[_Unit]) -> list[Plot]:
    """Training losses of all units over tokens, and their held-out losses."""
    trained = [unit for unit in units if unit.run is not None]
    if not trained:
        return []
    left_out = len(trained) - SHOWN_CURVES
    caption = f" The first {SHOWN_CURVES}; {left_out} more are left out." if left_out > 0 else ""
    trained, mix = trained[:SHOWN_CURVES], units_mix(units)
    training, held_out = _figure(), _figure()
    for unit, colour in zip(trained, colours(len(trained)), strict=True):
        name = html.escape(unit.entry.name)
        tokens, losses = _smoothed(unit.run)
        chosen = thin(losses, CURVE_POINTS)
        training.add_scatter(x=tokens[chosen], y=losses[chosen], name=name, mode="lines",
                             line={"color": colour, "width": 1.5})  # fmt: skip
        if unit.run.validation:
            held_out.add_scatter(
                x=[v.tokens for v in unit.run.validation],
                y=[weighted(v.losses, mix) for v in unit.run.validation],
                name=name, mode="lines+markers", line={"color": colour, "width": 1.5},
            )  # fmt: skip
    after_start = np.concatenate([t.y[t.x > START_SHARE * max(t.x)] for t in training.data])
    if len(after_start):
        low, high = float(after_start.min()), float(after_start.max())
        training.update_yaxes(range=[low - 0.05 * (high - low), high + 0.05 * (high - low)])
    plots = [Plot("Training loss", training, "Smoothed over steps." + caption, wide=True)]
    if held_out.data:
        how = "Weighted by the mix." if mix else "Mean over sources, whose mixes differ."
        plots.append(Plot("Held-out loss", held_out, how + caption, wide=True))
    return plots


def mix_plots(units: Sequence[_Unit]) -> list[Plot]:
    """Held-out loss of each source against its weight in the mix, where the units' mixes differ."""
    runs = [u for u in units if u.run is not None and u.run.validation]
    mixes = [u.run.train[-1].mix for u in runs]
    if len(runs) < 3 or all(mix == mixes[0] for mix in mixes):
        return []
    figure = _figure("share of the mix", "held-out loss, nats per token")
    figure.update_xaxes(tickformat=".0%")
    figure.update_layout(hovermode="closest")
    sources = list(dict.fromkeys(name for mix in mixes for name in mix))
    for source, colour in zip(sources, colours(len(sources)), strict=True):
        points = [
            (mix.get(source, 0.0) / sum(mix.values()), u.run.validation[-1].losses[source],
             html.escape(u.entry.name))
            for u, mix in zip(runs, mixes, strict=True) if source in u.run.validation[-1].losses
        ]  # fmt: skip
        if points:
            x, y, text = zip(*sorted(points), strict=True)
            figure.add_scatter(x=x, y=y, text=text, name=html.escape(source), mode="markers",
                               marker={"color": colour, "size": 8})  # fmt: skip
    return [Plot("Loss on a source by its share", figure, "A point is a unit's last held-out "
                 "loss on one source.", wide=True)]  # fmt: skip


def colours(count: int) -> list[str]:
    """Distinct colours for few lines; for many, from blue to red in their order."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return [f"hsl({230 + 130 * i / (count - 1):.0f}, 65%, 55%)" for i in range(count)]


def _smoothed(run: RunRecords) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.array([r.tokens for r in run.train], float)
    losses = np.array([r.loss for r in run.train], float)
    finite = np.isfinite(losses)
    if not finite.any():
        return tokens[:1], np.array([math.nan])
    tokens, losses = tokens[finite], losses[finite]
    return tokens, smooth(tokens, losses, HALF_LIFE * max(tokens[-1] - run.start, 1))


def _figure(x: str = "consumed tokens", y: str = "nats per token") -> go.Figure:
    return go.Figure(
        layout={
            "height": 400,
            "margin": {"l": 54, "r": 14, "t": 8, "b": 40},
            "showlegend": True,
            "legend": {"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"},
            "hoverlabel": {"namelength": -1},
            "xaxis": {"title": {"text": x, "standoff": 6}, "exponentformat": "B"},
            "yaxis": {"title": {"text": y, "standoff": 6}, "automargin": True},
        }
    )
