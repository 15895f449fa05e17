"""Statistics of each layer over a run: heat maps of what modules sowed, gradients and updates."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from llama3_jax.reporting.figures import Plot
from llama3_jax.reporting.page import Section, plots_html

# Kinds that every parameter has: one picture of all of them.
_OF_PARAMETERS = {"gradient": "Gradients", "update": "Updates"}


def sections(records: Sequence[Mapping[str, Any]]) -> list[Section]:
    """A section where the run kept statistics; `records` are those of its metrics.jsonl."""
    found = [r for r in records if r["kind"] == "train" and r.get("layers")]
    if not found:
        return []
    tokens = [r["tokens"] for r in found]
    names = [n for n in found[-1]["layers"] if n.rpartition("/")[2] not in _OF_PARAMETERS]
    plots = [
        _plot(f"{name}, {measure}", tokens, [_values(r["layers"], [name], key) for r in found])
        for name in names
        for key, measure in (("rms", "root mean square"), ("largest", "largest absolute value"))
    ]
    for kind, title in _OF_PARAMETERS.items():
        own = [name for name in found[-1]["layers"] if name.endswith(f"/{kind}")]
        values = [_values(r["layers"], own, "rms") for r in found]
        plots.append(_plot(f"{title}, root mean square over a layer's parameters", tokens, values))
    return [Section("Layers", plots_html("layers", plots))]


def _values(layers: Mapping[str, Any], names: Sequence[str], key: str) -> np.ndarray:
    """[layers]; of several names the root of their squares' mean."""
    each = np.array([layers[name][key] for name in names if name in layers], float)
    return np.sqrt((each**2).mean(0))


def _plot(title: str, tokens: Sequence[int], values: Sequence[np.ndarray]) -> Plot:
    exact = np.stack(values, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        shown = np.log10(exact)
    shown[~np.isfinite(shown)] = np.nan
    figure = go.Figure(
        go.Heatmap(
            x=[f"{n:,}" for n in tokens], z=shown, text=exact, colorscale="Viridis",
            hovertemplate="after %{x} tokens, layer %{y}: %{text:.3g}<extra></extra>",
            colorbar={"title": {"text": "log10"}},
        ),
        layout={
            "height": 320,
            "margin": {"l": 54, "r": 14, "t": 8, "b": 40},
            "xaxis": {"title": {"text": "consumed tokens"}, "type": "category"},
            "yaxis": {"title": {"text": "layer"}},
        },
    )  # fmt: skip
    return Plot(html.escape(title), figure, "")
