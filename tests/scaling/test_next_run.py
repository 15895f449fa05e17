import numpy as np
import pytest

from llama3_jax.errors import UserError
from llama3_jax.scaling.next_run import optimum_gradient, plan_next, sensitivities, width_ratios
from llama3_jax.scaling.surface import Points, Surface, fit_varpro, refit_varpro
from llama3_jax.scaling.synthetic import CHINCHILLA, isoflop_runs

BUDGETS, TARGET, NOISE = np.geomspace(6e18, 1e21, 4), 1e23, 0.002


def test_sensitivities_are_derivatives():
    params, tokens = np.array([1e8, 3e9]), np.array([2e10, 1e11])
    logs = np.log(list(CHINCHILLA.coefficients().values()))
    found = sensitivities(CHINCHILLA, params, tokens)
    for index, unit in enumerate(np.eye(5)):
        up, down = (Surface(*np.exp(logs + s * 1e-6 * unit)) for s in (1, -1))
        slope = np.log(up.loss(params, tokens) / down.loss(params, tokens)) / 2e-6
        np.testing.assert_allclose(found[:, index], slope, rtol=1e-5)


def test_the_interval_is_foreseen_as_refits_have_it():
    """Deviation of the target's log tokens, with and without a further run, over 600 sweeps."""
    runs = isoflop_runs(CHINCHILLA, BUDGETS)
    extra = (np.array([7e9]), np.array([1e11]))
    now, ratios = width_ratios(CHINCHILLA, runs, NOISE, TARGET, *extra)
    params = np.append(runs.params, extra[0])
    tokens = np.append(runs.tokens, extra[1])
    clean = CHINCHILLA.loss(params, tokens)
    rng = np.random.default_rng(0)
    losses = clean * np.exp(NOISE * rng.normal(size=(600, len(clean))))
    points = Points(params, tokens, clean, np.ones(len(clean)))
    _, found = fit_varpro(points)
    deviations = []
    for weight in (0.0, 1.0):
        weights = np.append(np.ones(len(runs)), weight)
        fits = refit_varpro(points, found, losses, np.broadcast_to(weights, losses.shape))
        alpha, coefficient = fits.tokens_law(6.0)
        deviations.append(np.std(np.log(coefficient) + alpha * np.log(TARGET)))
    # 600 draws know a deviation to 3%.
    assert deviations[0] == pytest.approx(now, rel=0.15)
    assert deviations[1] / deviations[0] == pytest.approx(ratios[0], rel=0.1)


def test_the_plan_is_within_the_budget_and_sorted():
    plan = plan_next(isoflop_runs(CHINCHILLA, BUDGETS, noise=NOISE), TARGET, 3e20)
    gains = [c.gain_per_flop for c in plan.candidates]
    assert gains == sorted(gains, reverse=True) and gains[-1] >= 0
    assert all(c.flops <= 3e20 and 0 < c.width_ratio <= 1 for c in plan.candidates)
    larger = plan_next(isoflop_runs(CHINCHILLA, BUDGETS, noise=NOISE), TARGET, 1e22)
    best, better = (min(c.width_ratio for c in p.candidates) for p in (plan, larger))
    assert better < best
    assert plan.noise == pytest.approx(NOISE, rel=0.4)


def test_the_optimums_gradient_is_that_of_its_law():
    gradient = optimum_gradient(CHINCHILLA, TARGET, 6.0)
    assert gradient[0] == pytest.approx(0, abs=1e-9)  # E moves no optimum
    total = float(CHINCHILLA.alpha + CHINCHILLA.beta)
    assert gradient[2] == pytest.approx(1 / total, rel=1e-5)  # more B, more tokens
    assert gradient[1] == pytest.approx(-1 / total, rel=1e-5)


def test_a_budget_that_buys_nothing_is_refused():
    with pytest.raises(UserError, match="buys no run of the ladder"):
        plan_next(isoflop_runs(CHINCHILLA, BUDGETS, noise=NOISE), TARGET, 1e15)
