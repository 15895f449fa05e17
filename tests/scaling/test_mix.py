import numpy as np
import pytest

from experiments.scaling_laws import published
from llama3_jax.errors import UserError
from llama3_jax.scaling.mix import (
    LAWS,
    MixLaw,
    MixRuns,
    cross_validate,
    fit_laws,
    fit_mix,
    rank_correlations,
    rank_transfer,
)
from llama3_jax.scaling.mix_optimum import epoch_caps, optimum, project
from llama3_jax.scaling.mix_tables import read_mix

T = np.array([[-1.2, 0.3, 0.1, -0.2], [0.4, -1.5, 0.2, 0.1]])
C = np.array([1.5, 2.0])


def made_runs(count=80, noise=0.0, seed=0, sizes=(1.0,)):
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(4), count)
    params = rng.choice(sizes, count)
    losses = C + np.exp(weights @ T.T) * (params[:, None] ** -0.2)
    losses = losses * np.exp(noise * rng.normal(size=losses.shape))
    return MixRuns(tuple("abcd"), ("x", "y"), weights, params, losses)


@pytest.mark.slow
def test_the_exponential_law_is_found_and_chosen():
    law = fit_mix(made_runs(noise=0.002))
    assert law.name == "exponential"
    fresh = made_runs(200, seed=1)
    np.testing.assert_allclose(law.losses(fresh.weights), fresh.losses, rtol=0.01)
    assert law.cross_validation["exponential"]["error"] < law.cross_validation["linear"]["error"]


def test_the_size_ladder_predicts_a_larger_models_loss():
    runs = made_runs(120, noise=0.001, sizes=(1e6, 4e6, 1.6e7))
    law = MixLaw("exponential", fit_laws(runs, "exponential"), {})
    larger = made_runs(50, seed=2, sizes=(6.4e7,))
    np.testing.assert_allclose(law.losses(larger.weights, 6.4e7), larger.losses, rtol=0.01)
    transfer = rank_transfer(law.losses(larger.weights, 6.4e7), larger.losses)
    assert transfer["spearman"] > 0.98 and transfer["ci"][0] > 0.9


@pytest.mark.slow
def test_cross_validation_keeps_a_mix_in_one_fold():
    """Pure noise repeated: a law that saw a twin of the left-out run would seem to predict it."""
    rng = np.random.default_rng(0)
    weights = np.repeat(rng.dirichlet(np.ones(4), 40), 3, axis=0)
    losses = np.repeat(rng.normal(3, 0.3, (40, 1)), 3, axis=0)
    runs = MixRuns(tuple("abcd"), ("x",), weights, np.ones(120), losses)
    for name in ("linear", "trees"):
        assert cross_validate(runs, (name,))[name]["error"] > 0.8


def test_too_few_mixes_are_refused():
    with pytest.raises(UserError, match="different mixes"):
        fit_mix(made_runs(8))


def test_the_optimum_is_that_of_a_fine_search():
    law = MixLaw("exponential", fit_laws(made_runs(), "exponential"), {})
    low, high = np.zeros(4), np.array([0.5, 0.4, 1.0, 0.3])

    def loss(mixes):
        return law.losses(mixes).mean(axis=1)

    best, value = optimum(loss, low, high, smooth=True)
    assert best.sum() == pytest.approx(1) and (best <= high + 1e-9).all() and (best >= 0).all()
    grid = np.array([
        (a, b, c, 1 - a - b - c)
        for a in np.linspace(0, 0.5, 26) for b in np.linspace(0, 0.4, 21)
        for c in np.linspace(0, 1, 51) if 0 <= 1 - a - b - c <= 0.3
    ])  # fmt: skip
    assert value <= loss(grid).min() + 1e-9
    stepped, _ = optimum(loss, low, high, smooth=False)
    assert loss(stepped[None])[0] == pytest.approx(value, abs=0.05)


def test_caps_come_from_the_tokens_at_hand():
    np.testing.assert_allclose(epoch_caps(np.array([10.0, 100.0]), 100, 4), [0.4, 1.0])
    with pytest.raises(UserError, match="no mix satisfies the bounds"):
        optimum(lambda w: w[:, 0], np.zeros(2), np.array([0.4, 0.5]), True)


def test_projection_is_the_nearest_feasible_mix():
    rng = np.random.default_rng(3)
    low, high = np.array([0.1, 0.0, 0.0]), np.array([0.6, 0.5, 0.4])
    given = rng.normal(0.3, 0.5, (5, 3))
    found = project(given, low, high)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    others = rng.dirichlet(np.ones(3), 20_000)
    others = others[((others >= low) & (others <= high)).all(axis=1)]
    for mix, near in zip(given, found, strict=True):
        distances = np.linalg.norm(others - mix, axis=1)
        assert np.linalg.norm(near - mix) <= distances.min() + 1e-9


def test_tables_that_do_not_fit_are_refused(tmp_path):
    weights, losses = tmp_path / "w.csv", tmp_path / "l.csv"
    losses.write_text("run,x\n1,3.0\n2,2.9\n")
    for text, message in (
        ("run,a,b\n1,0.5,0.5\n2,0.7,0.7\n", "row 3: weights sum to 1.400"),
        ("run,a,b\n1,0.5,0.5\n3,0.5,0.5\n", "run '3' is in one of"),
        ("run,a,b\n1,0.5,0.5\n1,0.5,0.5\n", "run '1' is there twice"),
        ("run,a,b\n1,1.5,-0.5\n2,0.5,0.5\n", "row 2: weight -0.5 is negative"),
        ("run,a,b\n1,nan,0.5\n2,0.5,0.5\n", "row 2: a is nan"),
    ):
        weights.write_text(text)
        with pytest.raises(UserError, match=message):
            read_mix(weights, losses)


def test_regmix_ranks_of_1b_models_from_1m_models(public_data):
    """The target that RegMix minimises, by the exponential law; test runs are read afterwards."""
    train = published.regmix("train_1m")
    column = train.targets.index(published.REGMIX_TARGET)
    law = LAWS["exponential"]().fit(train.weights, train.log_params(), train.losses[:, column])
    for part, least in (("test_1m", 0.95), ("test_60m", 0.95), ("test_1B", 0.98)):
        test = published.regmix(part)
        predicted = law.predict(test.weights, test.log_params())[:, None]
        assert rank_correlations(predicted, test.losses[:, [column]])[0] >= least, part
