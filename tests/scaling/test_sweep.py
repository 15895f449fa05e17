import numpy as np
import pytest

from experiments.scaling_laws import isoflop as experiment
from llama3_jax.errors import UserError
from llama3_jax.planning.case import cases_of
from llama3_jax.planning.constants import load_constants
from llama3_jax.planning.memory import forecast
from llama3_jax.recipe.config import RunConfig
from llama3_jax.scaling import sweep
from llama3_jax.scaling.audit import audit, sweep_biases, vertex_bias
from llama3_jax.scaling.isoflop import Options, fit_isoflop, result
from llama3_jax.scaling.profiles import PROFILES
from llama3_jax.scaling.surface import Surface
from llama3_jax.scaling.synthetic import isoflop_runs, optimal_tokens
from llama3_jax.schema import parse

HOFFMANN = (0.34, 0.28)


def test_every_budget_has_seven_sizes_that_spend_it():
    runs = sweep.isoflop_sweep()
    assert len(runs) == 7 * len(sweep.BUDGETS)
    for run in runs:
        assert run.flops_6nd == pytest.approx(run.budget, rel=0.05)
        assert run.tokens == run.steps * run.batch_tokens
        assert run.flops_6nd < run.flops_matmul < run.flops_causal
        assert run.params < run.params_with_embeddings
    for budget in sweep.BUDGETS:
        assert len({run.batch_tokens for run in runs if run.budget == budget}) == 1


def test_the_head_undercounts_the_smallest_model_nearly_fourfold():
    run = sweep.plan_run(6e18, "42M")
    assert run.flops_causal / run.flops_6nd == pytest.approx(3.7, abs=0.1)


def test_the_llama3_profile_keeps_the_papers_ranges():
    rule = PROFILES["llama3"]
    assert rule.learning_rate(40e6, 1, 1) == 4e-4
    assert rule.learning_rate(16.2e9, 1, 1) == pytest.approx(2e-4, rel=0.01)
    assert rule.batch_tokens(1, 1, 6e18) == 250e3
    assert rule.batch_tokens(1, 1, 1e22) == pytest.approx(4e6, rel=0.01)


def test_other_profiles_give_their_papers_figures():
    assert PROFILES["steplaw"].learning_rate(1e9, 1e11, 1) == pytest.approx(
        1.79 * 10 ** (-0.713 * 9 + 0.307 * 11)
    )
    assert PROFILES["deepseek"].batch_tokens(1, 1, 1e20) == pytest.approx(0.292 * 10**6.542)
    assert PROFILES["porian"].learning_rate(108e6, 1, 1) == 0.0047


@pytest.mark.parametrize("profile", PROFILES)
def test_every_run_of_the_sweep_is_a_valid_config(profile):
    arguments = experiment.sweep(profile)
    assert len(set(arguments)) == len(arguments)
    for argument in arguments[:: len(arguments) // 3]:
        config = parse(RunConfig, experiment.get_config(argument))
        assert config.stages[0].lr.end == pytest.approx(config.stages[0].lr.peak / 10)


@pytest.mark.parametrize("argument", ["6e18", "x,42M", "-1,42M", "6e18,41M", "6e18,42M,none"])
def test_bad_arguments_are_refused(argument):
    with pytest.raises(UserError):
        experiment.get_config(argument)


def test_the_audit_flags_what_is_wrong():
    def kinds(runs, **options):
        return {note.split(":")[0] for note in audit(runs, **options)}

    runs = sweep.isoflop_sweep(budgets=[1e20])
    assert kinds(runs) <= {"long-warm-up"}
    assert "few-points" in kinds(runs[:4])
    assert "not-bracketed" in kinds(runs[:3])
    assert "small-batch" in kinds(runs, ranks=1024)
    assert "long-warm-up" in kinds(sweep.isoflop_sweep(budgets=[6e18]))
    lopsided = [sweep.plan_run(1e20, shape) for shape in sweep.LADDER[:5]]
    assert "vertex-bias" in kinds(lopsided)


@pytest.mark.parametrize("width", [2.0, 4.0, 16.0])
def test_the_bias_of_the_vertex_is_foreseen(width):
    """Within 10% of the true one, on surfaces drawn anew; and by the fit of noise-free runs."""
    rng = np.random.default_rng(np.random.SeedSequence())
    for _ in range(10):
        alpha, beta = rng.uniform(0.2, 0.5, 2)
        surface = Surface(
            E=rng.uniform(1, 2), A=rng.uniform(100, 500), B=rng.uniform(100, 500), alpha=alpha,
            beta=beta,
        )  # fmt: skip
        runs = isoflop_runs(surface, [1e19, 1e20, 1e21], width=width, shift=rng.uniform(0.7, 1.4))
        options = Options(1e22, resamples=50, methods=("parabola",))
        vertices = fit_isoflop(runs, options).methods["parabola"].vertices.tokens[0]
        true = np.log(vertices / optimal_tokens(surface, runs.budgets))
        np.testing.assert_allclose(sweep_biases(runs, surface), true, rtol=0.1, atol=1e-9)
    foreseen = result(fit_isoflop(runs, Options(1e22, resamples=50)))["vertex_bias"]
    np.testing.assert_allclose(foreseen, true, rtol=0.1, atol=1e-6)


def test_a_symmetric_curve_has_no_bias():
    assert vertex_bias(0.3, 0.3, np.linspace(-1, 1, 7)) == pytest.approx(0, abs=1e-12)
    assert abs(vertex_bias(*HOFFMANN, np.linspace(-1.4, 1.4, 7))) > 1e-3


def test_every_run_of_the_sweep_fits_its_gpus():
    memory = 0.75 * load_constants().memory  # what JAX takes of a GPU
    arguments = experiment.sweep()
    assert len(arguments) == 70
    for argument in arguments:
        config = parse(RunConfig, experiment.get_config(argument))
        for case in cases_of(config):
            assert case.mesh.devices == experiment.REQUIREMENTS.gpus
            assert forecast(case).total < memory, argument
