"""What a run was asked beside its loss: scores, gates, needles, and what averaging gained."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from llama3_jax.files import read_json_lines
from llama3_jax.reporting.figures import COLOURS, Plot
from llama3_jax.reporting.page import Section, Table, plots_html, table_html
from llama3_jax.reporting.records import ValidationRecord
from llama3_jax.training.metrics import GATES_FILE

# Red, amber, green: of the shares of needles that were found.
_HEAT = [[0.0, "#dc2626"], [0.5, "#f59e0b"], [1.0, "#059669"]]
_YES_NO = {True: "yes", False: "no"}


def sections(workdir: Path, records: Sequence[dict[str, Any]]) -> list[Section]:
    """Sections on evaluation, as far as the run has any; `records` are those of its metrics.jsonl."""
    evaluations = [r for r in records if r["kind"] == "evaluation"]
    path = workdir / GATES_FILE
    gates = read_json_lines(path) if path.exists() else []
    made = []
    if any(r["kind"] == "verdict" for r in gates):
        made.append(gates_section([r for r in gates if r["kind"] == "verdict"]))
    if needles := _final_needles(evaluations) or _gate_needles(gates):
        plots = [plot for name, summary in needles.items() for plot in heat_maps(name, summary)]
        made.append(Section("Needle in a haystack", plots_html("needle", plots)))
    if evaluations:
        made.append(Section("Evaluation", plots_html("evaluation", score_plots(evaluations))))
    made += annealing_sections(records)
    return made


def gates_section(verdicts: Sequence[Mapping[str, Any]]) -> Section:
    """Every verdict, and by which numbers."""
    rows = [
        [
            r["stage"], f"{r['length']:,}", f"{r['tokens']:,}", r["verdict"],
            _YES_NO[r["recovered"]], f"{r['needles_found']:,} of {r['needles_asked']:,}",
            ", ".join(f"{length:,}" for length in r["lengths"]),
        ]
        for r in verdicts
    ]  # fmt: skip
    columns = ["stage", "length", "after tokens", "verdict", "recovered", "needles", "at lengths"]
    parts = [table_html(Table(columns, rows, words=["verdict", "recovered", "at lengths"]))]
    details = [
        [
            r["stage"], f"{r['tokens']:,}", row["metric"], f"{row['before']:.4f}",
            f"{row['after']:.4f}", f"{row['standard_error']:.4f}", f"{row['tolerance']:.4f}",
            _YES_NO[row["recovered"]],
        ]
        for r in verdicts
        for row in r["metrics"]
    ]  # fmt: skip
    columns = [
        "stage", "after tokens", "short-context metric", "before", "now", "standard error",
        "may be worse by", "recovered",
    ]  # fmt: skip
    parts.append(table_html(Table(columns, details, words=["short-context metric", "recovered"])))
    parts.append(
        '<p class="note">Before: at the end of the last stage without a gate. The standard error is '
        "that of the difference by a paired bootstrap over the metric's items.</p>"
    )
    return Section("Gates between context lengths", "".join(parts))


def _final_needles(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{r['model']} model": r["needle"] for r in evaluations if "needle" in r}


def _gate_needles(gates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the gate asked last, where the run has not come to its end."""
    parts = [r for r in gates if "cells" in r]
    last = [r for r in parts if r["step"] == parts[-1]["step"]]
    if not last:
        return {}
    return {f"after {last[0]['tokens']:,} tokens": {"cells": sum((r["cells"] for r in last), [])}}


def heat_maps(name: str, summary: Mapping[str, Any]) -> list[Plot]:
    """Shares of needles found by length and depth, a plot for each number of keys."""
    plots = []
    for keys in dict.fromkeys(cell["keys"] for cell in summary["cells"]):
        cells = [cell for cell in summary["cells"] if cell["keys"] == keys]
        lengths = sorted({cell["length"] for cell in cells})
        depths = sorted({cell["depth"] for cell in cells})
        share = {(c["length"], c["depth"]): c["found"] / c["asked"] for c in cells}
        text = {(c["length"], c["depth"]): f"{c['found']}/{c['asked']}" for c in cells}
        figure = go.Figure(
            go.Heatmap(
                x=[f"{length:,}" for length in lengths],
                y=[f"{depth:.0%}" for depth in depths],
                z=[[share.get((length, depth)) for length in lengths] for depth in depths],
                text=[[text.get((length, depth)) for length in lengths] for depth in depths],
                texttemplate="%{text}",
                hovertemplate="length %{x}, depth %{y}: %{text}<extra></extra>",
                colorscale=_HEAT, zmin=0, zmax=1, showscale=False, xgap=2, ygap=2,
            ),
            layout={
                "height": 360,
                "margin": {"l": 54, "r": 14, "t": 8, "b": 40},
                "xaxis": {"title": {"text": "length in tokens"}, "type": "category"},
                "yaxis": {
                    "title": {"text": "depth"}, "type": "category", "autorange": "reversed",
                },
            },
        )  # fmt: skip
        found, asked = (sum(cell[key] for cell in cells) for key in ("found", "asked"))
        needles = "1 needle" if keys == 1 else f"{keys} needles, one asked for"
        caption = f"{found:,} of {asked:,} found. Haystacks are held-out text, {needles}."
        plots.append(Plot(f"{html.escape(name)}, {needles}", figure, caption))
    return plots


def score_plots(evaluations: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """Scores over consumed tokens, a plot for each kind of score; the averaged model as a star."""
    kinds: dict[str, dict[str, list[tuple[int, float, str]]]] = {}
    for record in evaluations:
        for name, value in record["scores"].items():
            first, second = name.split("/", 1)
            kind, line = (first, second) if first == "held_out" else (second, first)
            point = (record["tokens"], value, record["model"])
            kinds.setdefault(kind, {}).setdefault(line, []).append(point)
    units = {
        "acc": "accuracy", "acc_norm": "accuracy by likelihood a character",
        "nll_per_char": "nats per character of the right answer", "held_out": "nats per token",
    }  # fmt: skip
    return [_score_plot(kind, units.get(kind, kind), lines) for kind, lines in kinds.items()]


def _score_plot(kind: str, unit: str, lines: Mapping[str, list]) -> Plot:
    figure = go.Figure(
        layout={
            "height": 280,
            "margin": {"l": 54, "r": 14, "t": 8, "b": 40},
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
            "xaxis": {"title": {"text": "consumed tokens"}, "exponentformat": "B"},
            "yaxis": {"title": {"text": unit}},
        }
    )
    for number, (line, points) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        for model in dict.fromkeys(point[2] for point in points):
            own = [point for point in points if point[2] == model]
            name = line if model == "last" else f"{line}, {model}"
            figure.add_trace(
                go.Scatter(
                    name=html.escape(name), x=[p[0] for p in own], y=[p[1] for p in own],
                    mode="lines+markers", line={"color": colour},
                    marker={"symbol": "circle" if model == "last" else "star", "size": 7},
                )
            )  # fmt: skip
    title = "Held-out loss, short context" if kind == "held_out" else kind
    return Plot(title, figure, "Stars: the averaged model." if "averaged" in str(lines) else "")


# ------------------------------------------------------------------------------------ annealing


def annealing_sections(records: Sequence[Mapping[str, Any]]) -> list[Section]:
    """What the last stage did where its rate falls to 0, and what averaging gained."""
    train = [r for r in records if r["kind"] == "train"]
    parts = []
    if train and train[-1]["learning_rate"] < 0.05 * max(r["learning_rate"] for r in train):
        parts += _annealing(records, train)
    final = [r for r in records if r["kind"] == "evaluation" and r["step"] == train[-1]["step"]]
    by_model = {r["model"]: r for r in final}
    if {"last", "averaged"} <= set(by_model):
        parts.append(table_html(averaging_table(by_model["last"], by_model["averaged"])))
        parts.append(
            '<p class="note">The averaged model is the mean of the parameters at several places of '
            "the last stage; it lies in the folder averaged.</p>"
        )
    return [Section("Annealing and averaging", "".join(parts))] if parts else []


def _annealing(records: Sequence[Mapping[str, Any]], train: Sequence[Mapping[str, Any]]):
    """Held-out losses before and after the last stage beside its up-sampling."""
    stage = train[-1]["stage"]
    first = next(r["step"] for r in train if r["stage"] == stage)
    earlier = [r for r in train if r["step"] < first]
    measured = [ValidationRecord.model_validate(r) for r in records if r["kind"] == "validation"]
    before = [r for r in measured if r.step < first]
    if not earlier or not before or measured[-1].step < first:
        return []
    old, new = before[-1], measured[-1]
    mixes = [_shares(mix) for mix in (earlier[-1]["mix"], train[-1]["mix"])]
    rows = [
        [
            source, *(f"{mix.get(source, 0.0):.0%}" for mix in mixes), f"{old.losses[source]:.4f}",
            f"{new.losses[source]:.4f}", f"{new.losses[source] - old.losses[source]:+.4f}",
        ]
        for source in new.losses
    ]  # fmt: skip
    columns = [
        "source", "share before", f"share in {stage}",
        f"held-out loss at {old.tokens:,} tokens", f"at {new.tokens:,}", "change",
    ]  # fmt: skip
    return [table_html(Table(columns, rows))]


def _shares(mix: Mapping[str, float]) -> dict[str, float]:
    return {source: weight / sum(mix.values()) for source, weight in mix.items()}


def averaging_table(last: Mapping[str, Any], averaged: Mapping[str, Any]) -> Table:
    rows = []
    for name, value in last["scores"].items():
        other = averaged["scores"][name]
        rows.append([name, f"{value:.4f}", f"{other:.4f}", f"{other - value:+.4f}"])
    if "needle" in last:
        found = [f"{r['needle']['found']} of {r['needle']['asked']}" for r in (last, averaged)]
        rows.append(
            ["needles", *found, f"{averaged['needle']['found'] - last['needle']['found']:+d}"]
        )
    return Table(["metric", "last model", "averaged model", "difference"], rows)
