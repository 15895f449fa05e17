"""Plots of a compute-optimal fit: IsoFLOP curves, power laws with bands, residuals, contours."""

import html

import numpy as np
import plotly.graph_objects as go

from llama3_jax.reporting.figures import COLOURS, NEUTRAL, Plot
from llama3_jax.scaling.isoflop import IsoflopFit, MethodFit, interval

BAND_POINTS = 60


def isoflop_plots(fit: IsoflopFit) -> list[Plot]:
    """All plots of a fit, for a page of the reporting package."""
    plots = [_isoflops(fit)]
    for quantity, of in (("tokens", "Compute-optimal tokens"), ("params", "Compute-optimal size")):
        plots.append(_laws(fit, quantity, of))
    plots.append(_residuals(fit))
    for name in ("surface", "varpro"):
        if name in fit.methods:
            plots.append(_contours(fit, name))
            break
    return plots


def log_figure(x: str, y: str, log_y: bool = False) -> go.Figure:
    axis = {"exponentformat": "e", "hoverformat": ".4g"}
    return go.Figure(
        layout={
            "height": 380,
            "margin": {"l": 64, "r": 14, "t": 8, "b": 44},
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
            "xaxis": {"type": "log", "title": {"text": x}, "dtick": 1, **axis},
            "yaxis": {"type": "log" if log_y else "linear", "title": {"text": y}, **axis},
        }
    )


def band(figure: go.Figure, name: str, x, low, middle, high, colour: str) -> None:
    """A line with its interval as a lighter area."""
    area = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    if low is not None:
        figure.add_scatter(x=x, y=high, **area)
        figure.add_scatter(x=x, y=low, fill="tonexty", fillcolor=_light(colour), **area)
    figure.add_scatter(x=x, y=middle, mode="lines", name=html.escape(name), line={"color": colour})


def _light(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"


def _isoflops(fit: IsoflopFit) -> Plot:
    figure, runs = log_figure("tokens", "loss, nats per token"), fit.runs
    out = {outlier.run: outlier.reason for outlier in fit.outliers}
    for index, runs_m in enumerate(runs.of_budgets()):
        colour = COLOURS[index % len(COLOURS)]
        name = f"{runs.budgets[index]:.2g} FLOPs"
        figure.add_scatter(
            x=runs.tokens[runs_m], y=runs.loss[runs_m], mode="markers", name=name,
            marker={"color": colour, "size": 7,
                    "symbol": ["x" if i in out else "circle" for i in runs_m]},
            text=[html.escape(f"{runs.name(i)} {out.get(i, '')}") for i in runs_m],
        )  # fmt: skip
        x = np.log(runs.tokens[runs_m])
        if len(np.unique(x)) >= 3:
            at = np.linspace(x.min(), x.max(), BAND_POINTS)
            curve = np.polyval(np.polyfit(x - x.mean(), runs.loss[runs_m], 2), at - x.mean())
            line = {"color": colour, "width": 1}
            figure.add_scatter(x=np.exp(at), y=curve, mode="lines", line=line, showlegend=False)
    if "parabola" in fit.methods:
        vertices = fit.methods["parabola"].vertices
        figure.add_scatter(
            x=vertices.tokens[0], y=vertices.loss[0], mode="markers", name="minimum",
            marker={"color": NEUTRAL, "symbol": "diamond-open", "size": 10},
        )  # fmt: skip
    return Plot("IsoFLOPs", figure, "Lines: parabolas in log tokens. Crosses: outliers.", wide=True)


def _laws(fit: IsoflopFit, quantity: str, title: str) -> Plot:
    figure = log_figure("FLOPs", quantity, log_y=True)
    target, budgets = fit.options.target_flops, fit.runs.budgets
    flops = np.geomspace(budgets.min() / 2, max(target, budgets.max()) * 2, BAND_POINTS)
    for (name, method), colour in zip(fit.methods.items(), COLOURS, strict=False):
        law = getattr(method, quantity)
        values = np.array([law(c) for c in flops])  # [points, 1 + resamples]
        bounds = [interval(row[1:], fit.options.level, method.freedom) for row in values]
        whole = all(bounds)
        low, high = np.array(bounds).T if whole else (None, None)
        band(figure, name, flops, low, values[:, 0], high, colour)
        if method.vertices is not None:
            figure.add_scatter(
                x=budgets, y=getattr(method.vertices, quantity)[0], mode="markers",
                marker={"color": colour}, showlegend=False,
            )  # fmt: skip
    figure.add_vline(x=target, line={"color": NEUTRAL, "dash": "dot"})
    return Plot(title, figure, f"Areas: {fit.options.level:.0%} intervals. Dotted: the target.")


def _residuals(fit: IsoflopFit) -> Plot:
    figure, runs = log_figure("tokens", "residual, % of the loss"), fit.runs
    fitted = {
        name: method.surfaces.rows(0).loss(runs.params, runs.tokens)
        for name, method in fit.methods.items()
        if method.surfaces is not None
    } | {"each budget's smooth": fit.smoothed.loss}
    for (name, losses), colour in zip(fitted.items(), COLOURS, strict=False):
        figure.add_scatter(
            x=runs.tokens, y=100 * (runs.loss / losses - 1), mode="markers", name=name,
            marker={"color": colour}, text=[html.escape(runs.name(i)) for i in range(len(runs))],
        )  # fmt: skip
    return Plot("Residuals", figure, "A pattern over tokens means that the form does not fit.")


def _contours(fit: IsoflopFit, name: str) -> Plot:
    method: MethodFit = fit.methods[name]
    runs, figure = fit.runs, log_figure("tokens", "parameters", log_y=True)
    tokens = np.geomspace(runs.tokens.min() / 2, runs.tokens.max() * 2, BAND_POINTS)
    params = np.geomspace(runs.params.min() / 2, runs.params.max() * 2, BAND_POINTS)
    loss = method.surfaces.rows(0).loss(params[:, None], tokens[None])
    figure.add_contour(
        x=tokens, y=params, z=loss, ncontours=20, colorscale="Blues", reversescale=True,
        colorbar={"title": {"text": "loss"}}, line={"width": 0.5},
    )  # fmt: skip
    figure.add_scatter(x=runs.tokens, y=runs.params, mode="markers", name="runs",
                       marker={"color": NEUTRAL, "size": 5}, showlegend=False)  # fmt: skip
    flops = np.geomspace(runs.budgets.min(), runs.budgets.max(), 20)
    figure.add_scatter(
        x=[method.tokens(c)[0] for c in flops], y=[method.params(c)[0] for c in flops],
        mode="lines", line={"color": COLOURS[1]}, showlegend=False,
    )  # fmt: skip
    axis = {"range": np.log10([tokens[0], tokens[-1]])}
    figure.update_xaxes(axis)
    figure.update_yaxes(range=np.log10([params[0], params[-1]]))
    return Plot(f"Loss over size and tokens ({name})", figure, "Line: the compute-optimal path.")
