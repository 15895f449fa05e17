"""Where the loss of one budget is least: by a parabola, and by Akima's interpolation.

The parabola in log tokens is Llama 3's (paper, section 3.2.1). Akima's piecewise cubic follows each
point (Porian et al. 2024, arXiv 2406.19146): better on wide grids, where a budget's curve is no
parabola, and noisier on narrow ones.

Shapes: B resamples of the losses, C budgets, M runs, m runs of one budget.
"""

import dataclasses

import numpy as np
from jaxtyping import Float
from scipy.interpolate import Akima1DInterpolator

from llama3_jax.scaling.runs import Runs

GRID = 100  # points between two runs
# A parabola's minimum further outside its runs than their whole range is none.
OUTSIDE = 1.0


@dataclasses.dataclass(frozen=True)
class Vertices:
    """Compute-optimal points of each budget; NaN where a curve has no minimum.

    `curvature` is the second derivative of the loss by log tokens, parabola only.
    """

    tokens: Float[np.ndarray, "B C"]
    params: Float[np.ndarray, "B C"]
    loss: Float[np.ndarray, "B C"]
    curvature: Float[np.ndarray, "B C"]


def parabola_vertices(runs: Runs, loss_BM: np.ndarray) -> Vertices:
    """Minima of least-squares parabolas; NaN where there is none near the runs, or under 3 sizes."""
    columns = []
    for runs_m in runs.of_budgets():
        loss_Bm = loss_BM[:, runs_m]
        tokens, loss, curvature = _parabola(np.log(runs.tokens[runs_m]), loss_Bm)
        params, _, _ = _parabola(np.log(runs.params[runs_m]), loss_Bm)
        columns.append((np.exp(tokens), np.exp(params), loss, curvature))
    return Vertices(*(np.stack(c, axis=1) for c in zip(*columns, strict=True)))


def _parabola(x_m: np.ndarray, loss_Bm: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(vertex, loss there, second derivative) of each resample."""
    nothing = np.full(len(loss_Bm), np.nan)
    if len(np.unique(x_m)) < 3:
        return nothing, nothing, nothing
    centre = x_m.mean()
    c, b, a = np.linalg.pinv(np.vander(x_m - centre, 3, increasing=True)) @ loss_Bm.T
    a = np.where(a > 0, a, np.nan)
    vertex = centre - b / (2 * a)
    reach = (0.5 + OUTSIDE) * (x_m.max() - x_m.min())
    near = np.abs(vertex - (x_m.max() + x_m.min()) / 2) <= reach
    return tuple(np.where(near, v, np.nan) for v in (vertex, c - b**2 / (4 * a), 2 * a))


def akima_vertices(runs: Runs, loss_BM: np.ndarray) -> Vertices:
    """Minima of Akima interpolants of log loss; NaN where the best run is an outermost one.

    Runs of the same size and budget (seeds) count as their mean.
    """
    columns = []
    for runs_m in runs.of_budgets():
        log_loss_Bm = np.log(loss_BM[:, runs_m])
        tokens, loss = _akima(np.log(runs.tokens[runs_m]), log_loss_Bm)
        params, _ = _akima(np.log(runs.params[runs_m]), log_loss_Bm)
        columns.append((np.exp(tokens), np.exp(params), np.exp(loss), np.full(len(loss), np.nan)))
    return Vertices(*(np.stack(c, axis=1) for c in zip(*columns, strict=True)))


def _akima(x_m: np.ndarray, y_Bm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(position, value) of the minimum of each resample."""
    x, which = np.unique(x_m, return_inverse=True)
    nothing = np.full(len(y_Bm), np.nan)
    if len(x) < 3:
        return nothing, nothing
    y_xB = np.stack([y_Bm[:, which == i].mean(axis=1) for i in range(len(x))])
    # Equal steps inside each gap, so that the runs themselves are on the grid.
    parts = [np.linspace(a, b, GRID, endpoint=False) for a, b in zip(x[:-1], x[1:], strict=True)]
    grid = np.concatenate([*parts, x[-1:]])
    values = Akima1DInterpolator(x, y_xB)(grid)
    at = values.argmin(axis=0)
    inside = (at > 0) & (at < len(grid) - 1)
    at = np.clip(at, 1, len(grid) - 2)
    # The least of the cubic lies between grid points: the vertex through three of them.
    three = np.stack([values[at + i, np.arange(len(at))] for i in (-1, 0, 1)])
    left, right = grid[at] - grid[at - 1], grid[at + 1] - grid[at]
    slope_left, slope_right = (three[1] - three[0]) / left, (three[2] - three[1]) / right
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(slope_right > slope_left, -slope_left / (slope_right - slope_left), 0.5)
    position = grid[at] - left / 2 + share * (left + right) / 2
    return np.where(inside, position, np.nan), np.where(inside, three[1], np.nan)
