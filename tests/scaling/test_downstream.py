import numpy as np
import pytest

from experiments.scaling_laws import published
from llama3_jax.errors import UserError
from llama3_jax.scaling import surface
from llama3_jax.scaling.downstream import (
    Checkpoints,
    Ladder,
    Target,
    accuracy_at,
    fit_sigmoid,
    predict_nll,
)
from llama3_jax.scaling.forecast import Options, forecast, read_task
from llama3_jax.scaling.isoflop import interval
from llama3_jax.scaling.surface import Surface

TASK = Surface(E=0.3, A=30.0, B=80.0, alpha=0.25, beta=0.24)


def accuracy_of(nll):
    return 0.98 - 0.7 / (1 + np.exp(-6.0 * (nll - 0.9)))


def made_ladder(noise=0.0, seed=0):
    """Four sizes at four token ratios, three checkpoints each, and the truth."""
    rng = np.random.default_rng(seed)
    runs, pairs = [], []
    for params in (2e8, 4e8, 8e8, 1.6e9):
        for ratio in (20, 40, 100, 200):
            name = f"{params:g}-{ratio}"
            for share in (0.3, 0.6, 1.0):
                nll = TASK.loss(params, params * ratio * share) * np.exp(noise * rng.normal())
                pairs.append((name, nll, accuracy_of(nll) + 0.3 * noise * rng.normal()))
            runs.append((name, params, params * ratio, 6 * params**2 * ratio, nll))
    name, *columns = zip(*runs, strict=True)
    of, x, y = zip(*pairs, strict=True)
    return Ladder(name, *map(np.array, columns)), Checkpoints(of, np.array(x), np.array(y))


TARGET = Target(7e9, 7e9 * 100, 6 * 7e9**2 * 100)
TRUE_NLL = TASK.loss(TARGET.params, TARGET.tokens)


def test_noise_free_stages_give_the_truth():
    ladder, checkpoints = made_ladder()
    nll, _ = predict_nll("surface", ladder, TARGET, 50, 0)
    assert nll[0] == pytest.approx(TRUE_NLL, rel=1e-6)
    sigmoids, fitted = fit_sigmoid(checkpoints, 50, 0, at_zero_loss=None)
    assert accuracy_at(sigmoids[:1], nll[:1])[0] == pytest.approx(accuracy_of(TRUE_NLL), abs=1e-3)
    assert fitted["certificate"]["certified"]


def test_the_linear_and_power_forms_give_their_own_truth():
    flops = np.geomspace(1e18, 1e21, 8)
    empty = np.ones(8)
    runs = tuple(map(str, range(8)))
    straight = Ladder(runs, empty, empty, flops, 5 - 0.08 * np.log(flops))
    target = Target(1, 1, 1e24)
    assert predict_nll("linear", straight, target, 50, 0)[0][0] == pytest.approx(
        5 - 0.08 * np.log(1e24)
    )
    curved = Ladder(runs, empty, empty, flops, 0.4 + 900 * flops**-0.16)
    nll, fitted = predict_nll("power", curved, target, 50, 0)
    assert nll[0] == pytest.approx(0.4 + 900 * 1e24**-0.16, rel=1e-6)
    assert fitted["alpha"] == pytest.approx(0.16, rel=1e-5)


def test_an_interval_holds_the_outcome_of_a_run_as_often_as_it_says():
    """Six runs and a straight line: resamples alone, with plain percentiles, hold 82% for 90%."""
    rng, inside, noise, flops = np.random.default_rng(0), [], 0.02, np.geomspace(1e18, 1e21, 6)
    unused, names = np.ones(6), tuple(map(str, range(6)))

    def outcome(flops):
        return (5 - 0.08 * np.log(flops)) * (1 + noise * rng.normal(size=np.shape(flops)))

    for seed in range(500):
        ladder = Ladder(names, unused, unused, flops, outcome(flops))
        nll, _ = predict_nll("linear", ladder, Target(1, 1, 1e22), 400, seed)
        low, high = interval(nll[1:], 0.9)
        inside.append(low <= outcome(1e22) <= high)
    assert 0.87 < np.mean(inside) < 0.94  # of 500: a standard error of 1.3%


def test_intervals_go_through_both_stages_and_hold_the_truth():
    inside = []
    for seed in range(8):
        ladder, checkpoints = made_ladder(noise=0.01, seed=seed)
        options = Options(forms=("surface",), resamples=100, seed=seed, at_zero_loss=None)
        form = forecast(ladder, checkpoints, TARGET, options)["forms"]["surface"]
        low, high = form["accuracy_ci"]
        inside.append(low <= accuracy_of(TRUE_NLL) <= high)
    assert np.mean(inside) >= 0.6  # 0.9 of them on average


def test_a_target_beyond_the_sigmoids_data_is_said_to_be():
    ladder, checkpoints = made_ladder(noise=0.005)
    options = Options(forms=("surface",), resamples=50)
    found = forecast(ladder, checkpoints, TARGET, options)
    assert not found["forms"]["surface"]["covered"]
    assert any(line.startswith("not-covered: surface") for line in found["warnings"])
    better = Checkpoints(
        (*checkpoints.run, "external"), np.append(checkpoints.nll, 0.5 * TRUE_NLL),
        np.append(checkpoints.accuracy, 0.95),
    )  # fmt: skip
    found = forecast(ladder, better, TARGET, options)
    assert found["forms"]["surface"]["covered"]


def test_the_back_test_leaves_the_largest_model_out():
    ladder, checkpoints = made_ladder(noise=0.002)
    options = Options(forms=("surface", "linear"), resamples=50)
    forms = forecast(ladder, checkpoints, TARGET, options)["forms"]
    assert forms["surface"]["back_test"]["run"] == "1.6e+09-200"
    assert abs(forms["surface"]["back_test"]["nll_error"]) < 0.03
    assert "back_test" in forms["linear"]


def test_a_table_is_read_as_the_runs_it_holds(tmp_path):
    path = tmp_path / "ladder.csv"
    lines = ["run,params,tokens,nll,accuracy,task,role"]
    for i, params in enumerate((1e8, 2e8, 4e8)):
        for tokens in (2e9, 1e9):  # out of order
            lines.append(f"r{i},{params},{tokens},{1 - 0.1 * i + 1e8 / tokens},0.4,arc,")
    lines.append("other,,,0.5,0.8,arc,external")
    path.write_text("\n".join(lines))
    ladder, checkpoints = read_task(path, "arc", Options(skip=0.5))
    assert ladder.run == ("r0", "r1", "r2")
    np.testing.assert_allclose(ladder.nll, [1.05, 0.95, 0.85])
    np.testing.assert_allclose(ladder.flops, 6 * ladder.params * 2e9)
    assert checkpoints.run == ("r0", "r1", "r2", "other")
    for spoilt, message in (
        (path.read_text().replace("0.8,arc", "1.8,arc"), "row 8: accuracy is 1.8"),
        (path.read_text().replace("0.5,0.8", "nan,0.8"), "row 8: nll is nan"),
        (path.read_text().replace("nll", "loss"), "column 'nll' is absent"),
    ):
        path.write_text(spoilt)
        with pytest.raises(UserError, match=message):
            read_task(path, None, Options())
        path.write_text("\n".join(lines))
    with pytest.raises(UserError, match="no task 'mmlu'"):
        read_task(path, "mmlu", Options())


@pytest.mark.parametrize("task", published.OLMO_TASKS)
def test_the_published_chain_of_the_olmo_ladder(public_data, task):
    """13B-5T within 0.002 of the published prediction, at an objective that is not higher."""
    ladder, checkpoints, targets = published.olmo(task)
    target = targets["13B-5T"]
    nll, fitted = predict_nll("surface", ladder, target, 50, 0)
    sigmoids, stage2 = fit_sigmoid(checkpoints, 50, 0)
    predicted = accuracy_at(sigmoids[:1], nll[:1])[0]
    assert predicted == pytest.approx(published.olmo_predictions()[task][0], abs=0.002)
    one_start, objective = published.one_start_surface(ladder)
    assert fitted["certificate"]["objective"] <= objective * (1 + 1e-4)
    assert fitted["certificate"]["certified"] and stage2["certificate"]["certified"]


def test_one_start_finds_nothing_lower():
    for seed in range(3):
        ladder, _ = made_ladder(noise=0.05, seed=seed)
        _, objective = published.one_start_surface(ladder)
        points = surface.Points(ladder.params, ladder.tokens, ladder.nll, np.ones(16))
        assert surface.fit_huber(points)[1].objective <= objective * (1 + 1e-4)
