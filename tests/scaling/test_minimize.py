"""Fits in JAX against scipy's optimisers on fresh random input."""

import numpy as np
import pytest
import scipy.optimize

from llama3_jax.scaling import surface
from llama3_jax.scaling.minimize import Problem, minimize, minimize_batch
from llama3_jax.scaling.surface import Points
from llama3_jax.scaling.synthetic import CHINCHILLA, isoflop_runs

SURFACES = {
    "huber": (surface.fit_huber, surface.refit_huber),
    "squares": (surface.fit_varpro, surface.refit_varpro),
}


def objective(kind, points, coefficients):
    """What a surface is fitted by, written once more in numpy."""
    E, A, B, alpha, beta = coefficients
    fitted = E + A * points.params**-alpha + B * points.tokens**-beta
    if kind == "squares":
        return (points.weights * (points.loss - fitted) ** 2).sum()
    residual = np.abs(np.log(fitted) - np.log(points.loss))
    delta = surface.DELTA
    huber = np.where(residual <= delta, residual**2 / 2, delta * (residual - delta / 2))
    return (points.weights * huber).sum()


@pytest.fixture(scope="module")
def points():
    rng = np.random.default_rng(np.random.SeedSequence())
    runs = isoflop_runs(CHINCHILLA, np.geomspace(6e18, 1e22, 5), noise=0.01,
                        seed=int(rng.integers(2**31)))  # fmt: skip
    weights = rng.integers(0, 3, len(runs)).astype(float)
    return Points(runs.params, runs.tokens, runs.loss, weights)


@pytest.mark.parametrize("kind", SURFACES)
def test_no_optimiser_of_scipy_finds_a_lower_objective(points, kind):
    fit, minimum = SURFACES[kind][0](points)
    own = np.array(list(fit.coefficients().values()), dtype=float)
    ours = objective(kind, points, own)
    assert minimum.certified

    def scaled(logs):
        return objective(kind, points, own * np.exp(logs))

    options = dict(xatol=1e-12, fatol=1e-16, maxiter=20_000, maxfev=20_000)
    for start in (np.zeros(5), np.array([0.02, 0.3, -0.3, 0.03, -0.03])):
        found = scipy.optimize.minimize(scaled, start, method="Nelder-Mead", options=options)
        assert ours <= found.fun * (1 + 1e-6)


@pytest.mark.parametrize("kind", SURFACES)
def test_a_refit_of_resamples_is_the_fit_of_each(points, kind):
    fit, refit = SURFACES[kind]
    rng = np.random.default_rng(0)
    losses = points.loss * np.exp(0.01 * rng.normal(size=(3, len(points.loss))))
    again = refit(points, fit(points)[1], losses, np.broadcast_to(points.weights, losses.shape))
    for row, loss in enumerate(losses):
        alone, _ = fit(Points(points.params, points.tokens, loss, points.weights))
        assert again.alpha[row] == pytest.approx(alone.alpha, rel=1e-4)
        assert again.E[row] == pytest.approx(alone.E, rel=1e-4)


def test_the_certificate_counts_starts_at_the_best_of_two_minima():
    def two_wells(x, data, _):
        return (x[0] ** 2 - 1) ** 2 + 0.3 * x[0] + data["shift"]

    starts = np.array([[-2.0], [-0.9], [-1.5], [0.8], [1.2]])
    problem = Problem(two_wells)
    found = minimize(problem, starts, {"shift": 1.0}, np.ones(40))
    assert (found.starts, found.reached, found.certified) == (5, 3, True)
    assert len(found.distinct) == 2
    again, _ = minimize_batch(problem, starts, {}, {"shift": np.linspace(0, 1, 130)}, np.ones(40))
    np.testing.assert_allclose(again[:, 0], found.params[0], rtol=1e-9)
