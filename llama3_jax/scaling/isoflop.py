"""Compute-optimal fits of an IsoFLOP sweep by four methods side by side, with their uncertainty.

Llama 3 (paper, section 3.2.1) fits a parabola in log tokens to each budget and a power law to the
minima, and extrapolates four decades. Which curve is fitted matters as much there as the noise of
the runs, so nothing here is one number: each method has its bootstrap interval (residuals resampled
within budgets), its range when one budget is left out, and stands beside the others.

Shapes: B resamples (row 0 of "with_original" arrays is the data itself), C budgets, M runs.
"""

import dataclasses
import warnings as python_warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats

from llama3_jax.scaling import surface, warnings
from llama3_jax.scaling.audit import sweep_biases
from llama3_jax.scaling.minimize import Minimum
from llama3_jax.scaling.noise import Outlier, Smooth, find_outliers, resample, smooth
from llama3_jax.scaling.power_law import PowerLaw, fit_power_law
from llama3_jax.scaling.runs import Runs
from llama3_jax.scaling.surface import Points, Surface
from llama3_jax.scaling.vertices import Vertices, akima_vertices, parabola_vertices

METHODS = ("parabola", "akima", "surface", "varpro")
PER_BUDGET: dict[str, Callable[[Runs, np.ndarray], Vertices]] = {
    "parabola": parabola_vertices,
    "akima": akima_vertices,
}
ON_SURFACE = {
    "surface": (surface.fit_huber, surface.refit_huber),
    "varpro": (surface.fit_varpro, surface.refit_varpro),
}
SURFACE_COEFFICIENTS = 5
# A run that alone decides a coefficient has no residual to speak of.
MOST_LEVERAGE = 0.95


@dataclasses.dataclass(frozen=True)
class Options:
    """`level` is the intervals' coverage, `resamples` the bootstrap's size."""

    target_flops: float
    resamples: int = 1000
    level: float = 0.9
    seed: int = 0
    methods: tuple[str, ...] = METHODS


@dataclasses.dataclass
class MethodFit:
    """What one method says: laws of resamples, the data itself first.

    `freedom`: degrees of freedom of the residuals that were resampled. `vertices` of the data (per-budget methods), or `coefficients` and `minimum` (surfaces).
    """

    tokens: PowerLaw
    params: PowerLaw
    freedom: float
    left_out: PowerLaw | None = None
    left_out_params: PowerLaw | None = None
    vertices: Vertices | None = None
    surfaces: Surface | None = None
    minimum: Minimum | None = None


@dataclasses.dataclass
class IsoflopFit:
    runs: Runs
    options: Options
    smoothed: Smooth
    methods: dict[str, MethodFit]
    outliers: list[Outlier]
    without_outliers: dict[str, MethodFit]
    warnings: list[str]


def fit_isoflop(runs: Runs, options: Options) -> IsoflopFit:
    """Fits every method of `options`; one that cannot be fitted is left out with a warning."""
    smoothed = smooth(runs)
    outliers = find_outliers(runs)
    notes: list[str] = []
    methods = _fit_methods(runs, smoothed, options, notes)
    without = {}
    if outliers:
        kept = np.ones(len(runs), bool)
        kept[[o.run for o in outliers]] = False
        fewer = runs.only(kept)
        without = _fit_methods(fewer, smooth(fewer), options, [])
    fit = IsoflopFit(runs, options, smoothed, methods, outliers, without, notes)
    notes.extend(warnings.find(fit))
    return fit


def _fit_methods(
    runs: Runs, smoothed: Smooth, options: Options, notes: list[str]
) -> dict[str, MethodFit]:
    fits: dict[str, MethodFit] = {}
    for name in options.methods:
        if name in PER_BUDGET:
            fits[name] = _fit_per_budget(PER_BUDGET[name], runs, smoothed, options)
        elif len(runs) <= SURFACE_COEFFICIENTS + 1:
            notes.append(f"too-few-runs: {name} has {SURFACE_COEFFICIENTS} coefficients; "
                         f"{len(runs)} runs do not determine them")  # fmt: skip
        else:
            fits[name] = _fit_on_surface(*ON_SURFACE[name], runs, options)
    for name in list(fits):
        if not np.isfinite(fits[name].tokens.alpha[0]):
            del fits[name]
            notes.append(f"no-fit: {name} finds fewer than two budgets with a minimum inside")
    return fits


def _fit_per_budget(
    find: Callable[[Runs, np.ndarray], Vertices], runs: Runs, smoothed: Smooth, options: Options
) -> MethodFit:
    own = find(runs, runs.loss[None])
    drawn = resample(
        runs, smoothed.loss, smoothed.residual, smoothed.free, options.resamples, options.seed
    )
    again, centre = find(runs, drawn), find(runs, smoothed.loss[None])
    # A budget without a minimum in the data takes no part in the resamples either.
    there = np.isfinite(own.tokens)
    left = np.where(np.eye(len(runs.budgets), dtype=bool), np.nan, own.tokens)
    left_params = np.where(np.eye(len(runs.budgets), dtype=bool), np.nan, own.params)
    return MethodFit(
        tokens=_centred_law(
            runs.budgets, *(np.where(there, v.tokens, np.nan) for v in (own, centre, again))
        ),
        params=_centred_law(
            runs.budgets, *(np.where(there, v.params, np.nan) for v in (own, centre, again))
        ),
        freedom=sum(float(smoothed.free[runs_m[0]]) for runs_m in runs.of_budgets()),
        left_out=fit_power_law(runs.budgets, left),
        left_out_params=fit_power_law(runs.budgets, left_params),
        vertices=dataclasses.replace(
            own, curvature=np.concatenate([own.curvature, again.curvature])
        ),
    )


def _centred_law(
    budgets: np.ndarray, own_1C: np.ndarray, centre_1C: np.ndarray, again_BC: np.ndarray
) -> PowerLaw:
    """The data's law, then the resamples' laws moved by the data's difference from the smooth.

    Resamples scatter around the law of the smoothed losses, which for a method that follows each
    point is not that of the data.
    """
    own, centre, again = (fit_power_law(budgets, v) for v in (own_1C, centre_1C, again_BC))
    return PowerLaw(
        np.concatenate([own.alpha, again.alpha + own.alpha - centre.alpha]),
        np.concatenate([own.log_A, again.log_A + own.log_A - centre.log_A]),
    )


def _fit_on_surface(fit: Callable, refit: Callable, runs: Runs, options: Options) -> MethodFit:
    points = Points(runs.params, runs.tokens, runs.loss, np.ones(len(runs)))
    own, minimum = fit(points)
    fitted = own.loss(runs.params, runs.tokens)
    # A run at the design's edge pulls the surface to itself. Its distance from the surface of the
    # other runs (the jackknife's, HC3 of MacKinnon & White 1985) errs on the safe side: intervals of
    # residuals that only have the right mean square held the truth in 84.5% for 90%.
    away = 1 - np.minimum(surface.leverage(own, points), MOST_LEVERAGE)
    residual = (runs.loss - fitted) / fitted / away
    free = np.full(len(runs), float(len(runs)))
    drawn = resample(runs, fitted, residual, free, options.resamples, options.seed)
    others = 1.0 - (runs.budget == np.arange(len(runs.budgets))[:, None])
    losses = np.concatenate([np.broadcast_to(runs.loss, others.shape), drawn])
    weights = np.concatenate([others, np.ones_like(drawn)])
    again = refit(points, minimum, losses, weights)
    left = again.rows(slice(None, len(others)))
    surfaces = own.rows(None).joined(again.rows(slice(len(others), None)))
    k = runs.flops_per_pair
    return MethodFit(
        tokens=_law(*surfaces.tokens_law(k)),
        params=_params_law(surfaces, k),
        freedom=float(len(runs) - SURFACE_COEFFICIENTS),
        left_out=_law(*left.tokens_law(k)),
        left_out_params=_params_law(left, k),
        surfaces=surfaces,
        minimum=minimum,
    )


def _law(alpha: np.ndarray, coefficient: np.ndarray) -> PowerLaw:
    """NaN where a term of the surface vanished: more of the other is then always better."""
    with np.errstate(divide="ignore", invalid="ignore"):
        log_A = np.log(coefficient)
    there = np.isfinite(log_A) & np.isfinite(alpha)
    return PowerLaw(np.where(there, alpha, np.nan), np.where(there, log_A, np.nan))


def _params_law(surfaces: Surface, flops_per_pair: float) -> PowerLaw:
    law = _law(*surfaces.tokens_law(flops_per_pair))
    return PowerLaw(1 - law.alpha, -law.log_A - np.log(flops_per_pair))


# -------------------------------------------------------------------------------- as plain values


def interval(values: np.ndarray, level: float, freedom: float = np.inf) -> list[float] | None:
    """Central share `level` of the finite values; None where fewer than half are finite.

    Residuals with few degrees of freedom know their own size badly, and plain percentiles are too
    narrow then: the percentiles taken lie as far out as Student's t asks (the expanded percentile
    interval of Hesterberg 2015, arXiv 1411.5279).
    """
    finite = values[np.isfinite(values)]
    if len(finite) < max(len(values) / 2, 2):
        return None
    below = stats.norm.cdf(stats.t.ppf((1 - level) / 2, max(freedom, 1.0)))
    return [float(v) for v in np.quantile(finite, [below, 1 - below])]


def method_record(fit: MethodFit, options: Options) -> dict[str, Any]:
    """tokens = A C^alpha of one method, its value at the target, and its uncertainty."""
    target = options.target_flops
    tokens, params = fit.tokens(target), fit.params(target)
    with np.errstate(over="ignore"):
        bounds = {"alpha": fit.tokens.alpha, "A": np.exp(fit.tokens.log_A), "tokens": tokens,
                  "params": params, "params_alpha": fit.params.alpha}  # fmt: skip
    record: dict[str, Any] = {
        "alpha": float(fit.tokens.alpha[0]),
        "A": float(np.exp(fit.tokens.log_A[0])),
        "tokens": float(tokens[0]),
        "params": float(params[0]),
        "params_alpha": float(fit.params.alpha[0]),
        "params_A": float(np.exp(fit.params.log_A[0])),
        "ci": {
            name: interval(values[1:], options.level, fit.freedom)
            for name, values in bounds.items()
        },
        "leave_one_budget_out": {
            "alpha": _finite(fit.left_out.alpha),
            "tokens": _finite(fit.left_out(target)),
            "params": _finite(fit.left_out_params(target)),
        },
        "resamples_fitted": int(np.isfinite(fit.tokens.alpha[1:]).sum()),
    }
    if fit.surfaces is not None:
        values = fit.surfaces.coefficients()
        record["coefficients"] = {name: float(value[0]) for name, value in values.items()}
        record["coefficients_ci"] = {
            name: interval(value[1:], options.level, fit.freedom) for name, value in values.items()
        }
        record["certificate"] = fit.minimum.certificate()
    return record


def result(fit: IsoflopFit) -> dict[str, Any]:
    """Everything as JSON can hold it; numbers that do not exist are None."""
    options = fit.options
    methods = {name: method_record(method, options) for name, method in fit.methods.items()}
    for name, method in fit.without_outliers.items():
        if name in methods:
            record = method_record(method, options)
            keys = ("alpha", "A", "tokens", "params", "ci")
            methods[name]["without_outliers"] = {key: record[key] for key in keys}
    return {
        "target_flops": options.target_flops,
        "level": options.level,
        "resamples": options.resamples,
        "flops_per_param_token": fit.runs.flops_per_pair,
        "methods": methods,
        "spread": spread(methods),
        "vertices": {
            name: _vertex_records(fit.runs, method)
            for name, method in fit.methods.items()
            if method.vertices is not None
        },
        "vertex_bias": _vertex_bias(fit),
        "curvature": curvature(fit),
        "outliers": [outlier.record(fit.runs) for outlier in fit.outliers],
        "warnings": fit.warnings,
    }


def spread(methods: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
    """Least and greatest value over all methods and their intervals, with and without outliers."""
    ranges = {}
    for key in ("alpha", "tokens", "params"):
        values = []
        for method in methods.values():
            for record in (method, method.get("without_outliers")):
                if record:
                    values += [record[key], *(record["ci"][key] or [])]
        if values:
            ranges[key] = [min(values), max(values)]
    return ranges


def curvature(fit: IsoflopFit) -> dict[str, Any] | None:
    """Second derivative of the loss by log tokens in each budget, and its trend over budgets.

    Llama 3's IsoFLOPs flatten as budgets grow, which makes the flagship's size a matter of taste.
    """
    if "parabola" not in fit.methods:
        return None
    parabola = fit.methods["parabola"]
    values = parabola.vertices.curvature
    with python_warnings.catch_warnings():
        python_warnings.simplefilter("ignore", RuntimeWarning)
        law = fit_power_law(fit.runs.budgets, values)
    bounds = interval(law.alpha[1:], fit.options.level, parabola.freedom)
    return {
        "by_budget": _finite(values[0]),
        "exponent": _finite(law.alpha[:1])[0],
        "ci": bounds,
        "flattening": bool(bounds and bounds[1] < 0),
    }


def _vertex_bias(fit: IsoflopFit) -> list[float | None] | None:
    """log(parabola's vertex / optimum) of each budget that a fitted surface leads to expect."""
    for name in ("surface", "varpro"):
        if name in fit.methods:
            own = fit.methods[name].surfaces.rows(0)
            return _finite(np.array(sweep_biases(fit.runs, own)))
    return None


def _vertex_records(runs: Runs, fit: MethodFit) -> list[dict[str, Any]]:
    columns = {n: _finite(getattr(fit.vertices, n)[0]) for n in ("tokens", "params", "loss")}
    return [
        {"flops": float(c), **{name: values[i] for name, values in columns.items()}}
        for i, c in enumerate(runs.budgets)
    ]


def _finite(values: np.ndarray) -> list[float | None]:
    return [float(v) if np.isfinite(v) else None for v in values]
