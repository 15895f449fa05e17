"""A run's plots over consumed tokens.

Backgrounds are transparent and colours mid-toned, so that they read on a light and a dark page;
the page's stylesheet gives text and grid lines the ink of the mode.
"""

import dataclasses
import html
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io

from llama3_jax.reporting.records import RunRecords

# Points of a line in the page, at most: about two for each pixel of a wide screen.
POINTS = 2_000
# In a smoothed line a step counts half at this distance, as a share of the run's tokens.
HALF_LIFE = 0.005
# Share of the run's tokens whose loss may leave a plot at the top: the fall from the random start
# would press all that follows into a line at the bottom.
START_SHARE = 0.02
COLOURS = (
    "#3b82f6", "#d97706", "#059669", "#db2777", "#8b5cf6", "#0891b2", "#dc2626", "#65a30d",
)  # fmt: skip
NEUTRAL = "#808691"
DASHES = ("dash", "dot", "dashdot", "longdash")


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure with a heading and, where it needs one, a caption; `wide` spans the page."""

    title: str
    figure: go.Figure
    caption: str = ""
    wide: bool = False


def figure_html(figure: go.Figure, div_id: str | None = None) -> str:
    """The figure as a piece of a page which has plotly.js already.

    Figures of other sections pass through here too, to look like the rest of the page.
    """
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12, "color": NEUTRAL},
    )
    figure.update_xaxes(gridcolor="rgba(128,134,145,0.25)", zeroline=False)
    figure.update_yaxes(gridcolor="rgba(128,134,145,0.25)", zeroline=False)
    return plotly.io.to_html(
        figure,
        config={"displayModeBar": False, "responsive": True},
        full_html=False,
        include_plotlyjs=False,
        include_mathjax=False,
        div_id=div_id,
    )


# ------------------------------------------------------------------------------- what is plotted


def loss_plots(run: RunRecords) -> list[Plot]:
    """Training and held-out loss: all of it, then source by source beside the baselines."""
    colours = _colours(run.sources())
    overall = _Chart(run, "nats per token")
    overall.noisy("training", [r.loss for r in run.train], NEUTRAL)
    measured = [s for s in run.sources() if any(s in v.losses for v in run.validation)]
    for source in measured:
        overall.held_out(source, source, colours[source])
    caption = (
        "Thick: training loss, smoothed over steps; light: of each step. Dotted with diamonds: "
        "held-out loss of a source. The fall of the first steps may leave the plot at the top. "
        "Vertical lines, here and below: a new stage begins."
    )
    overall.cut_start()
    plots = [overall.plot("Training and held-out loss", caption, wide=True)]
    for source in run.sources():
        chart = _Chart(run, "nats per token")
        chart.noisy("training", [r.losses.get(source, np.nan) for r in run.train], colours[source])
        if source in measured:
            chart.held_out("held-out", source, colours[source])
        for (name, losses), dash in zip(run.baselines.items(), itertools.cycle(DASHES)):
            if source in losses:
                value = losses[source]
                ends = [run.start, run.train[-1].tokens]
                style = {"color": NEUTRAL, "dash": dash, "width": 1.5}
                chart.line(f"{name} {value:.3f}", ends, [value] * 2, line=style)
        chart.cut_start()
        plots.append(chart.plot(f"Loss on {source}"))
    return plots


def schedule_plots(run: RunRecords) -> list[Plot]:
    """What the timeline of the run prescribes."""
    rate = _Chart(run, exponentformat="e")
    rate.line("learning rate", run_tokens(run), [r.learning_rate for r in run.train])
    batch = _Chart(run, "tokens", rangemode="tozero")
    batch.steps({"batch": [r.batch_tokens for r in run.train]}, COLOURS)
    length = _Chart(run, "tokens", rangemode="tozero")
    length.steps({"length": [r.length for r in run.train]}, COLOURS)
    mix = _Chart(run, tickformat=".0%", hoverformat=".1%", range=[0, 1])
    weights = {s: [r.mix.get(s, 0.0) for r in run.train] for s in run.sources()}
    mix.steps(weights, list(_colours(weights).values()), stackgroup="mix", groupnorm="fraction")
    return [
        rate.plot("Learning rate"),
        batch.plot("Batch"),
        length.plot("Sequence length"),
        mix.plot("Mix of sources"),
    ]


def step_plots(run: RunRecords) -> list[Plot]:
    """How the steps went: gradients, speed, packing."""
    timed = [bool(r.seconds) for r in run.train]
    norm = _Chart(run, type="log", dtick="D2", tickformat=".3~g")
    norm.noisy("gradient norm", [r.grad_norm for r in run.train])
    speed = _Chart(run, rangemode="tozero")
    speeds = [r.tokens_per_second for r in run.train]
    speed.noisy("tokens per second", np.where(timed, speeds, np.nan))
    mfu = _Chart(run, tickformat=".3~p", hoverformat=".3p", rangemode="tozero")
    for name, colour in _colours(run.train[0].mfu).items():
        shares = [r.mfu.get(name, np.nan) for r in run.train]
        mfu.smoothed(name, np.where(timed, shares, np.nan), colour)
    packing = _Chart(run, tickformat=".0%", hoverformat=".2%", range=[0, 1.02])
    cut = [r.cut_documents / r.documents if r.documents else np.nan for r in run.train]
    packing.noisy("utilisation", [r.utilisation for r in run.train])
    packing.noisy("documents cut", cut, COLOURS[1])
    utilisation = mfu.plot(
        "Model FLOP/s utilisation",
        "Smoothed. By which attention pairs count: all (full), those not in the future "
        "(causal), those inside one document (document).",
    )
    return [
        norm.plot("Gradient norm", "Before clipping."),
        speed.plot(
            "Tokens per second", "A step's time holds compiling and saving where they fell."
        ),
        # Of devices whose peak is unknown there is none.
        *([utilisation] if run.train[0].mfu else []),
        packing.plot(
            "Packing", "Utilisation: share of a batch's positions that hold a token of a document."
        ),
    ]


def run_tokens(run: RunRecords) -> np.ndarray:
    return np.array([r.tokens for r in run.train], dtype=float)


def _colours(sources: Iterable[str]) -> dict[str, str]:
    return {source: COLOURS[i % len(COLOURS)] for i, source in enumerate(sources)}


# ------------------------------------------------------------------------------------- the points


def thin(values: np.ndarray, limit: int = POINTS) -> np.ndarray:
    """Indices of at most `limit` values: lowest and highest of equal stretches, and the ends."""
    if len(values) <= limit:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), (limit - 2) // 2 + 1).astype(int)
    kept = {0, len(values) - 1}
    for first, last in itertools.pairwise(edges):
        kept |= {first + int(values[first:last].argmin()), first + int(values[first:last].argmax())}
    return np.array(sorted(kept))


def changes(rows: np.ndarray) -> np.ndarray:
    """Indices that draw step lines without loss: both sides of each change, and the ends."""
    differs = (rows[1:] != rows[:-1]).any(axis=1)
    kept = np.ones(len(rows), dtype=bool)
    kept[1:-1] = differs[:-1] | differs[1:]
    return np.flatnonzero(kept)


def smooth(tokens: np.ndarray, values: np.ndarray, half_life: float) -> np.ndarray:
    """Mean of each value and those on both sides, which count less by their distance in tokens.

    Both sides, because a mean of the past alone lies above a falling loss.
    """
    if not len(values):
        return values
    decays = np.append(0.0, 0.5 ** (np.diff(tokens) / half_life))
    before, weight_before = _decayed_sums(values, decays)
    after, weight_after = _decayed_sums(values[::-1], np.append(0.0, decays[:0:-1]))
    return (before + after[::-1] - values) / (weight_before + weight_after[::-1] - 1)


def _decayed_sums(values: np.ndarray, decays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of each value and all before it, and of their weights."""
    sums, total, weight = np.empty((2, len(values))), 0.0, 0.0
    for i, (value, decay) in enumerate(zip(values, decays, strict=True)):
        total, weight = total * decay + value, weight * decay + 1
        sums[:, i] = total, weight
    return sums[0], sums[1]


class _Chart:
    """One figure over consumed tokens, with the stages' boundaries."""

    def __init__(self, run: RunRecords, unit: str = "", **yaxis: Any):
        self._run, self._shown, self._all = run, 0, 0
        end = run.train[-1].tokens
        self.figure = go.Figure(
            layout={
                "height": 280,
                "margin": {"l": 54, "r": 14, "t": 8, "b": 40},
                "hovermode": "x unified",
                "hoverlabel": {"namelength": -1},
                "legend": {
                    "orientation": "h", "traceorder": "normal", "x": 0, "y": 1.02,
                    "yanchor": "bottom",
                },
                "xaxis": {
                    "title": {"text": "consumed tokens", "standoff": 6},
                    "range": [run.start, end],
                    "exponentformat": "B",
                    "hoverformat": ",.0f",
                    "nticks": 6,
                },
                "yaxis": {
                    "title": {"text": unit, "standoff": 6},
                    "exponentformat": "B",
                    "hoverformat": ".4~g",
                    "automargin": True,
                    **yaxis,
                },
                "shapes": [
                    {
                        "type": "line", "x0": steps[-1].tokens, "x1": steps[-1].tokens,
                        "yref": "paper", "y0": 0, "y1": 1, "layer": "below",
                        "line": {"color": NEUTRAL, "width": 1, "dash": "dot"}, "opacity": 0.6,
                    }
                    for steps in run.stages()[:-1]
                ],
            }
        )  # fmt: skip

    def line(self, name: str, tokens: Sequence, values: Sequence, **style: Any) -> None:
        """A line through the finite values, thinned."""
        tokens, values = np.asarray(tokens, float), np.asarray(values, float)
        finite = np.isfinite(values)
        tokens, values = tokens[finite], values[finite]
        chosen = thin(values)
        if len(chosen) < len(values) and len(values) > self._all:
            self._shown, self._all = len(chosen), len(values)
        self._trace(name, tokens[chosen], values[chosen], **style)

    def steps(self, lines: dict[str, list], colours: Sequence[str], **style: Any) -> None:
        """Lines that hold each step's value from the step's first token to its last."""
        rows = np.array(list(lines.values()), dtype=float).T
        chosen = changes(rows)
        if len(chosen) > POINTS:
            self._shown, self._all = POINTS, len(chosen)
            chosen = chosen[np.linspace(0, len(chosen) - 1, POINTS).astype(int)]
        tokens = np.concatenate([[self._run.start], run_tokens(self._run)[chosen]])
        for index, name in enumerate(lines):
            colour = colours[index % len(colours)]
            values = np.concatenate([rows[:1, index], rows[chosen, index]])
            line = {"color": colour, "width": 1.5, "shape": "vh"}
            self._trace(name, tokens, values, line=line, **style)

    def noisy(self, name: str, values: Sequence[float], colour: str = COLOURS[0]) -> None:
        """What is measured each step: the steps in a light line, a smoothed one over it."""
        self.line(
            f"{name}, one step",
            run_tokens(self._run),
            values,
            line={"color": colour, "width": 1},
            opacity=0.35,
            showlegend=False,
        )
        self.smoothed(name, values, colour)

    def smoothed(self, name: str, values: Sequence[float], colour: str) -> None:
        tokens, values = run_tokens(self._run), np.asarray(values, float)
        finite = np.isfinite(values)
        tokens, values = tokens[finite], values[finite]
        half_life = HALF_LIFE * (self._run.train[-1].tokens - self._run.start)
        line = {"color": colour, "width": 2}
        self.line(name, tokens, smooth(tokens, values, half_life), line=line)

    def held_out(self, name: str, source: str, colour: str) -> None:
        measured = [v for v in self._run.validation if source in v.losses]
        self.line(
            name,
            [v.tokens for v in measured],
            [v.losses[source] for v in measured],
            mode="lines+markers" if len(measured) <= 50 else "lines",
            line={"color": colour, "width": 1.5, "dash": "dot"},
            marker={"size": 6, "symbol": "diamond"},
        )

    def cut_start(self) -> None:
        """Fits the y axis to what comes after the first steps; a double-click shows all."""
        first, last = self._run.start, self._run.train[-1].tokens
        start = first + START_SHARE * (last - first)
        values = np.concatenate([trace.y[trace.x > start] for trace in self.figure.data])
        if not len(values):
            return
        low, high = values.min(), values.max()
        margin = 0.05 * (high - low) or 0.1
        self.figure.update_yaxes(range=[low - margin, high + margin])

    def plot(self, title: str, caption: str = "", wide: bool = False) -> Plot:
        if self._all:
            caption += (
                f" Thinned: {self._shown:,} of {self._all:,} points, the lowest and highest of "
                "each stretch."
            )
        named = [trace for trace in self.figure.data if trace.showlegend is not False]
        self.figure.update_layout(showlegend=len(named) > 1)
        if wide:
            self.figure.update_layout(height=400)
        return Plot(title, self.figure, caption.strip(), wide)

    def _trace(self, name: str, x: np.ndarray, y: np.ndarray, **style: Any) -> None:
        style = {"mode": "lines", "line": {"color": COLOURS[0], "width": 1.5}} | style
        # Names come from the config and plotly reads markup in them.
        self.figure.add_trace(
            go.Scatter(name=html.escape(name), x=x, y=y, hovertemplate="%{y}", **style)
        )
