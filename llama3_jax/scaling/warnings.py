"""What in a sweep's points or fits a reader must know before believing an extrapolation.

Each warning is a line that begins with its kind, such as "vertex-at-edge: …".
"""

from typing import TYPE_CHECKING

import numpy as np

from llama3_jax.scaling.runs import FLOPS_PER_PAIR

if TYPE_CHECKING:
    from llama3_jax.scaling.isoflop import IsoflopFit

FEW_POINTS = 5
# Two curves through a budget disagree when their minima are further apart than this, in logs.
WIDE_GRID_GAP = 0.2
DECADES = 1.0
METHODS_APART = 1.25
FAILED_RESAMPLES = 0.1


def find(fit: "IsoflopFit") -> list[str]:
    """All of them, in the order in which a reader should fix them."""
    return [
        *_points(fit),
        *_wide_grids(fit),
        *_fits(fit),
        *_counting(fit),
        *_outliers(fit),
        *_extrapolation(fit),
        *_disagreement(fit),
    ]


def _points(fit: "IsoflopFit") -> list[str]:
    notes = []
    runs = fit.runs
    parabola = fit.methods.get("parabola")
    if len(runs.budgets) == 2:
        notes.append("two-budgets: a law through two budgets has no residual: its interval holds "
                     "the runs' noise alone")  # fmt: skip
    for index, (budget, runs_m) in enumerate(zip(runs.budgets, runs.of_budgets(), strict=True)):
        sizes = np.unique(runs.tokens[runs_m])
        if len(sizes) < FEW_POINTS:
            notes.append(f"few-points: {budget:.3g} FLOPs has {len(sizes)} sizes; "
                         f"{FEW_POINTS} at least bracket a minimum")  # fmt: skip
        if parabola is None:
            continue
        vertex = parabola.vertices.tokens[0, index]
        if not np.isfinite(vertex):
            notes.append(f"no-minimum: the parabola of {budget:.3g} FLOPs opens downwards or has "
                         "too few sizes")  # fmt: skip
            continue
        below, above = (sizes < vertex).sum(), (sizes > vertex).sum()
        if len(sizes) >= 3 and not sizes[1] <= vertex <= sizes[-2]:
            notes.append(
                f"vertex-at-edge: {budget:.3g} FLOPs: the minimum, {vertex:.3g} tokens, lies at or "
                f"beyond the edge of its runs ({sizes[0]:.3g} to {sizes[-1]:.3g})"
            )
        elif min(below, above) < 2:
            notes.append(f"one-sided: {budget:.3g} FLOPs has {below} sizes below its minimum and "
                         f"{above} above")  # fmt: skip
    return notes


def _wide_grids(fit: "IsoflopFit") -> list[str]:
    """Where a parabola through all of a budget's runs is no local picture of its minimum."""
    if "parabola" not in fit.methods or "akima" not in fit.methods:
        return []
    runs, notes = fit.runs, []
    parabola = fit.methods["parabola"].vertices.tokens[0]
    akima = fit.methods["akima"].vertices.tokens[0]
    for index, runs_m in enumerate(runs.of_budgets()):
        gap = np.log(parabola[index] / akima[index])
        if not np.abs(gap) > WIDE_GRID_GAP:
            continue
        misfit = _parabola_misfit(fit, runs_m)
        if misfit > 2:
            width = runs.tokens[runs_m].max() / runs.tokens[runs_m].min()
            notes.append(
                f"wide-grid: {runs.budgets[index]:.3g} FLOPs: over a {width:.0f}-fold grid the "
                f"parabola's minimum is {np.exp(abs(gap)):.2f} times "
                f"{'above' if gap > 0 else 'below'} Akima's, and its residuals are {misfit:.1f} "
                "times those of a curve that fits: trust akima there, or fit nearer the minimum"
            )
    return notes


def _parabola_misfit(fit: "IsoflopFit", runs_m: np.ndarray) -> float:
    """Residual standard deviation of the parabola over that of the cross-validated smooth."""
    x, y = np.log(fit.runs.tokens[runs_m]), fit.runs.loss[runs_m]
    centred = x - x.mean()
    rest = y - np.polyval(np.polyfit(centred, y, 2), centred)
    parabola = np.sqrt((rest**2).sum() / max(len(y) - 3, 1)) / y.mean()
    smooth = np.sqrt((fit.smoothed.residual[runs_m] ** 2).mean())
    return float(parabola / max(smooth, 1e-4))


def _fits(fit: "IsoflopFit") -> list[str]:
    notes = []
    for name, method in fit.methods.items():
        if method.minimum is not None and not method.minimum.certified:
            notes.append(
                f"not-certified: {name}: {method.minimum.reached} of {method.minimum.starts} starts "
                "reached the best minimum: there may be a lower one"
            )
        failed = 1 - np.isfinite(method.tokens.alpha[1:]).mean()
        if failed > FAILED_RESAMPLES:
            notes.append(f"failed-resamples: {name} has no law in {failed:.0%} of the resamples: "
                         "its interval is too narrow")  # fmt: skip
    return notes


def _counting(fit: "IsoflopFit") -> list[str]:
    ratios = fit.runs.flops / fit.runs.params / fit.runs.tokens
    if ratios.max() / ratios.min() > 1.1 and {"surface", "varpro"} & set(fit.methods):
        return [
            f"counting: FLOPs per parameter and token range from {ratios.min():.2f} to "
            f"{ratios.max():.2f} (C = 6 N D has {FLOPS_PER_PAIR:g}); the surfaces' optimum takes "
            f"the median, {np.median(ratios):.2f}"
        ]
    return []


def _outliers(fit: "IsoflopFit") -> list[str]:
    if not fit.outliers:
        return []
    return [f"outliers: {len(fit.outliers)} of {len(fit.runs)} runs do not fit their budget; they "
            "count in the results, which stand beside those without them"]  # fmt: skip


def _extrapolation(fit: "IsoflopFit") -> list[str]:
    largest = fit.runs.budgets.max()
    decades = np.log10(fit.options.target_flops / largest)
    if decades <= DECADES:
        return []
    return [f"extrapolation: the target is {decades:.1f} decades beyond the largest budget "
            f"({largest:.3g} FLOPs)"]  # fmt: skip


def _disagreement(fit: "IsoflopFit") -> list[str]:
    tokens = {name: method.tokens(fit.options.target_flops)[0]
              for name, method in fit.methods.items()}  # fmt: skip
    if len(tokens) < 2:
        return []
    low, high = min(tokens, key=tokens.get), max(tokens, key=tokens.get)
    if tokens[high] / tokens[low] < METHODS_APART:
        return []
    return [f"methods-disagree: tokens at the target range from {tokens[low]:.3g} ({low}) to "
            f"{tokens[high]:.3g} ({high}): no single number is supported"]  # fmt: skip
