"""Bootstrap fits of the loss surface: all at once in JAX, beside a loop over scipy's optimiser.

    python -m experiments.benchmarks.scaling_fit --fits=4000 --points=240

Both fit L(N, D) = E + A/N^alpha + B/D^beta to the same resampled losses by the same objective
(summed log-Huber loss, delta 1e-3, log-sum-exp) and start each resample at the original fit's
minimum; ours adds a random start. scipy's side is L-BFGS-B with a gradient by hand in numpy, one
fit after another, on the first --scipy_fits of the resamples. What both reach is compared: a lower
objective is better. Times hold for a quiet machine; the ratio also for a loaded one, since the
sides take turns in the same minute.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import time
from pathlib import Path

import numpy as np
import scipy.optimize
from absl import flags
from rich.console import Console
from rich.table import Table

from llama3_jax import cli
from llama3_jax.files import write_json
from llama3_jax.scaling import surface
from llama3_jax.scaling.minimize import minimize_batch
from llama3_jax.scaling.surface import DELTA, Points
from llama3_jax.scaling.synthetic import CHINCHILLA, isoflop_runs

BUDGETS, NOISE = np.geomspace(6e18, 1e22, 10), 0.01

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_integer("fits", 4000, "Resamples that our side fits.", lower_bound=64)
    flags.DEFINE_integer("points", 240, "Runs of a sweep.", lower_bound=60)
    flags.DEFINE_integer("scipy_fits", 100, "Resamples that scipy's side fits.", lower_bound=4)
    flags.DEFINE_string("json", None, "File that takes the figures.")


def huber(params: np.ndarray, n: np.ndarray, d: np.ndarray, log_loss: np.ndarray):
    """Objective and gradient, as surface.huber_objective has them."""
    a, b, e, log_alpha, log_beta = params
    alpha, beta = np.exp(log_alpha), np.exp(log_beta)
    terms = np.stack([a - alpha * n, b - beta * d, np.full_like(n, e)])
    top = terms.max(axis=0)
    shares = np.exp(terms - top)
    total = shares.sum(axis=0)
    shares /= total
    residual = top + np.log(total) - log_loss
    size = np.abs(residual)
    value = np.where(size <= DELTA, residual**2 / 2, DELTA * (size - DELTA / 2)).sum()
    slope = np.clip(residual, -DELTA, DELTA)
    gradient = np.array([
        slope @ shares[0], slope @ shares[1], slope @ shares[2],
        -alpha * (slope @ (shares[0] * n)), -beta * (slope @ (shares[1] * d)),
    ])  # fmt: skip
    return value, gradient


def scipy_loop(starts: np.ndarray, data: dict, losses: np.ndarray) -> np.ndarray:
    """The best objective over the starts, resample by resample."""
    options = dict(maxiter=10_000, maxfun=100_000, ftol=1e-15, gtol=1e-10)
    best = np.full(len(losses), np.inf)
    for row, loss in enumerate(losses):
        arguments = (data["n"], data["d"], np.log(loss))
        for start in starts:
            found = scipy.optimize.minimize(
                huber, start, arguments, jac=True, method="L-BFGS-B", options=options
            )
            best[row] = min(best[row], found.fun)
    return best


def main(_) -> None:
    runs = isoflop_runs(CHINCHILLA, BUDGETS, FLAGS.points // len(BUDGETS), noise=NOISE)
    points = Points(runs.params, runs.tokens, runs.loss, np.ones(len(runs)))
    _, minimum = surface.fit_huber(points)
    rng = np.random.default_rng(0)
    losses = runs.loss * np.exp(NOISE * rng.normal(size=(FLAGS.fits, len(runs))))
    weights = np.ones_like(losses)

    begun = time.perf_counter()
    surface.refit_huber(points, minimum, losses, weights)
    with_compiling = time.perf_counter() - begun
    starts = np.concatenate([minimum.distinct[:1], surface.huber_starts(points, 1, seed=1)])
    ours_s, scipy_s, scipy_best = [], [], []
    for part in np.array_split(np.arange(FLAGS.scipy_fits), 4):
        begun = time.perf_counter()
        surface.refit_huber(points, minimum, losses, weights)
        ours_s.append((time.perf_counter() - begun) / FLAGS.fits)
        begun = time.perf_counter()
        scipy_best.append(scipy_loop(minimum.distinct[:1], points.data(), losses[part]))
        scipy_s.append((time.perf_counter() - begun) / len(part))
    few = slice(0, FLAGS.scipy_fits)
    _, best = minimize_batch(
        surface.HUBER, starts, points.data(), dict(loss=losses[few], weights=weights[few]),
        surface.RESAMPLE_SHARPNESS,
    )  # fmt: skip
    gap = np.concatenate(scipy_best) / best - 1
    ratios = np.divide(scipy_s, ours_s)
    table = Table(title=f"{FLAGS.fits:,} bootstrap fits of {len(runs)} points, "
                        f"{os.cpu_count()} cores", title_justify="left")  # fmt: skip
    for column in ("side", "fits", "starts a fit", "ms a fit", "all fits, s", "scipy / ours"):
        table.add_column(column, justify="left" if column == "side" else "right")
    ours, theirs = np.median(ours_s), np.median(scipy_s)
    table.add_row("JAX, all at once", f"{FLAGS.fits:,}", "2", f"{1e3 * ours:.2f}",
                  f"{FLAGS.fits * ours:.1f} ({with_compiling:.1f} with compiling)", "")  # fmt: skip
    table.add_row("scipy loop", f"{FLAGS.scipy_fits:,}", "1", f"{1e3 * theirs:.2f}",
                  f"{FLAGS.fits * theirs:.1f} (extrapolated)",
                  f"{np.median(ratios):.1f} ({ratios.min():.1f} to {ratios.max():.1f})")  # fmt: skip
    Console(width=120).print(table)
    print(f"scipy's objective lies above ours by {np.median(gap):.1e} (median), {gap.max():.1e} "
          f"(worst); below it by {max(-gap.min(), 0):.1e} at most")  # fmt: skip
    if FLAGS.json:
        write_json(Path(FLAGS.json), dict(
            fits=FLAGS.fits, points=len(runs), cores=os.cpu_count(), with_compiling=with_compiling,
            ours_s=ours_s, scipy_s=scipy_s, gap=gap.tolist(),
        ))  # fmt: skip


if __name__ == "__main__":
    define_flags()
    cli.run(main)
