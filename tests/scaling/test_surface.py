import numpy as np
import pytest

from experiments.scaling_laws import published
from llama3_jax.scaling.surface import Points, Surface, fit_tied


def test_a_tied_surface_is_found_from_five_runs():
    truth = Surface(E=1.7, A=150.0, B=400.0, alpha=0.27, beta=0.27)
    params = np.array([1e7, 8e7, 1.5e8, 4e8, 1e7])
    tokens = params * np.array([20, 20, 20, 20, 320])
    fit, found = fit_tied(Points(params, tokens, truth.loss(params, tokens), np.ones(5)))
    assert found.certified
    for name, value in truth.coefficients().items():
        assert getattr(fit, name) == pytest.approx(value, rel=1e-4)


def test_gadre_et_al_over_trained_models_from_five_small_runs(public_data):
    """RedPajama, C4 validation (their headline): 1.4B at 640 tokens a parameter, 6.9B at 20."""
    points, targets = published.gadre("rpj")
    fit, found = fit_tied(points)
    assert found.certified
    assert set(targets) == {"open_lm_1b x32", "open_lm_7b x1"}
    for params, tokens, loss in targets.values():
        assert fit.loss(params, tokens) == pytest.approx(loss, rel=0.01)
