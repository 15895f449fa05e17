import numpy as np
import pytest
import scipy.stats

from llama3_jax.errors import UserError
from llama3_jax.scaling.probe import judge, read_probes


def write(path, effects, seeds=4, noise=0.01, seed=0, paired=True):
    rng = np.random.default_rng(seed)
    lines = ["arm,seed,benchmark,score"]
    for arm, effect in {"control": 0.0, **effects}.items():
        for number in range(seeds):
            name = number if paired else f"{arm}{number}"
            score = 0.5 + effect + noise * rng.normal()
            lines.append(f"{arm},{name},gsm8k,{score}")
    path.write_text("\n".join(lines))
    return path


def test_a_large_gain_is_seen_and_none_is_not(tmp_path):
    path = write(tmp_path / "p.csv", {"good": 0.1, "same": 0.0}, noise=0.005)
    rows = {row["candidate"]: row for row in judge(read_probes(path))["comparisons"]}
    assert rows["good"]["verdict"] == "better"
    assert rows["same"]["verdict"] != "better"
    assert rows["good"]["ci"][0] < 0.1 < rows["good"]["ci"][1]


def test_an_unpaired_comparison_is_welchs(tmp_path):
    path = write(tmp_path / "p.csv", {"good": 0.02}, paired=False)
    probes = read_probes(path)
    row = judge(probes)["comparisons"][0]
    a, b = (list(probes.scores[arm, "gsm8k"].values()) for arm in ("good", "control"))
    reference = scipy.stats.ttest_ind(a, b, equal_var=False)
    assert not row["paired"] and row["p"] == pytest.approx(reference.pvalue)
    assert row["ci"] == pytest.approx(list(reference.confidence_interval(0.9)))


def test_intervals_widen_with_the_number_of_candidates(tmp_path):
    few = judge(read_probes(write(tmp_path / "a.csv", {"x": 0.02})))["comparisons"][0]
    many = judge(read_probes(write(tmp_path / "b.csv", {c: 0.02 for c in "xabcde"})))
    row = many["comparisons"][0]
    assert row["difference"] == few["difference"]
    assert np.ptp(row["ci"]) > 1.5 * np.ptp(few["ci"])
    assert row["smallest_detectable"] > few["smallest_detectable"]


def test_the_family_is_wrong_as_rarely_as_it_says(tmp_path):
    """No candidate is better; with five of them some is called so or worse in 10% at most."""
    wrong = 0
    for seed in range(200):
        path = write(tmp_path / "p.csv", {c: 0.0 for c in "abcde"}, seed=seed, paired=False)
        rows = judge(read_probes(path))["comparisons"]
        wrong += any(row["verdict"] in ("better", "worse") for row in rows)
    assert wrong / 200 <= 0.16


def test_the_smallest_detectable_effect_is_found_four_times_in_five(tmp_path):
    """On average over the noise estimate, an effect of that size is called better."""
    freedom, level = 6, 0.9
    path = write(tmp_path / "p.csv", {"x": 0.0}, paired=False)
    row = judge(read_probes(path), level)["comparisons"][0]
    critical = scipy.stats.t.ppf(0.95, freedom)
    rng = np.random.default_rng(0)
    error = 0.01 * np.sqrt(2 / 4)
    effect = row["smallest_detectable"] / (np.ptp(row["ci"]) / 2 / critical) * error
    a = effect + 0.01 * rng.normal(size=(4000, 4))
    b = 0.01 * rng.normal(size=(4000, 4))
    found = scipy.stats.ttest_ind(a, b, axis=1)
    assert (found.statistic > critical).mean() == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda t: t.replace("control", "other"), "no runs of arm 'control'"),
        (lambda t: t.replace("score", "points"), "column 'score' is absent"),
        (lambda t: t + "\ncontrol,0,gsm8k,0.5", "row 10: control, seed 0, gsm8k is there twice"),
        (lambda t: t + "\nnew,0,gsm8k,0.5", "has one seed of arm 'new'"),
        (lambda t: t + "\nnew,0,gsm8k,nan", "row 10: score is nan"),
    ],
)
def test_bad_tables_are_refused(tmp_path, spoil, message):
    path = write(tmp_path / "p.csv", {"x": 0.0})
    path.write_text(spoil(path.read_text()))
    with pytest.raises(UserError, match=message):
        read_probes(path)
