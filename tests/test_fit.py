"""The fit program, run as a user runs it."""

import csv
import json

import numpy as np
import pytest

from llama3_jax.scaling.synthetic import CHINCHILLA, isoflop_runs


def write_csv(path, **columns):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


@pytest.fixture(scope="module")
def sweep():
    runs = isoflop_runs(CHINCHILLA, np.geomspace(6e18, 1e21, 4), noise=0.003)
    return {"flops": runs.flops, "tokens": runs.tokens, "loss": runs.loss}


def test_isoflop_writes_the_keys_and_the_plots(command, tmp_path, sweep):
    data = write_csv(tmp_path / "runs.csv", **sweep)
    out, page = tmp_path / "out.json", tmp_path / "plots.html"
    done = command("fit", "isoflop", "--data", str(data), "--target_flops", "3.8e25",
                "--json", str(out), "--report", str(page), "--resamples=100")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert set(found["methods"]) == {"parabola", "akima", "surface", "varpro"}
    for name, fit in found["methods"].items():
        assert {"alpha", "A", "tokens", "params", "ci"} <= set(fit)
        assert fit["ci"]["tokens"][0] <= fit["tokens"] <= fit["ci"]["tokens"][1]
        assert name in done.stdout
    assert {"vertices", "warnings", "outliers"} <= set(found)
    assert "extrapolation" in done.stdout
    assert page.read_text().count("js-plotly-plot") or "Plotly.newPlot" in page.read_text()


def bad(sweep, name, row, value):
    column = list(sweep[name])
    column[row] = value
    return {**sweep, name: column}


CASES = {
    "nan": (lambda s: bad(s, "loss", 3, "nan"), "row 5: loss is nan"),
    "empty cell": (lambda s: bad(s, "tokens", 0, ""), "row 2: tokens is ''"),
    "negative loss": (lambda s: bad(s, "loss", 1, -2.5), "row 3: loss is -2.5"),
    "one budget": (lambda s: {k: v[:9] for k, v in s.items()}, "one budget only (6e+18 FLOPs)"),
    "budgets that nearly coincide": (
        lambda s: {k: np.append(v, v[0] * (1.04 if k == "flops" else 1)) for k, v in s.items()},
        "are 4.0% apart",
    ),
    "the same run twice": (
        lambda s: {k: np.append(v, v[3]) for k, v in s.items()},
        "rows 5 and 38 are the same run",
    ),
    "absent column": (
        lambda s: {("tokns" if k == "tokens" else k): v for k, v in s.items()},
        "column 'tokens' is absent; there: flops, tokns, loss; is it 'tokns'?",
    ),
    "one size a budget": (
        lambda s: {k: v[::9] for k, v in s.items()},
        "no method fits these runs",
    ),
    "no rows": (lambda s: {k: v[:0] for k, v in s.items()}, "no rows under the header"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_tables_get_a_clear_line(command, tmp_path, sweep, case):
    spoil, message = CASES[case]
    data = write_csv(tmp_path / "runs.csv", **spoil(sweep))
    out = tmp_path / "out.json"
    done = command("fit", "isoflop", f"--data={data}", "--target_flops=1e24", f"--json={out}")
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "a command is missing; known: isoflop, downstream, mix, probe, plan"),
        (("isoflops",), "'isoflops' is no command"),
        (("isoflop",), "--data is required"),
        (("isoflop", "--data=none.csv"), "--target_flops is required"),
        (("isoflop", "--data=none.csv", "--target_flops=-1"), "--target_flops is -1"),
        (("isoflop", "--data=none.csv", "--target_flops=1"), "none.csv: No such file"),
        (
            ("isoflop", "--data=none.csv", "--target_flops=1", "--json=setup.py/x"),
            "--json=setup.py/x cannot be written: setup.py: Not a directory",
        ),
    ],
)
def test_bad_options_get_a_clear_line(command, arguments, message):
    done = command("fit", *arguments)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_plan_names_the_next_run(command, tmp_path, sweep):
    data, out = write_csv(tmp_path / "runs.csv", **sweep), tmp_path / "plan.json"
    done = command("fit", "plan", f"--data={data}", "--target_flops=1e24", "--budget=1e20",
                f"--json={out}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    best = json.loads(out.read_text())["candidates"][0]
    assert best["shape"] in done.stdout and best["flops"] <= 1e20
    assert {"shape", "tokens", "batch_tokens", "width_ratio"} <= set(best)


def test_mix_prints_the_best_mix(command, tmp_path):
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(3), 60)
    loss = 1.5 + np.exp(weights @ [-1.0, 0.5, 0.2])
    names = np.arange(60)
    write_csv(tmp_path / "w.csv", run=names, **dict(zip("abc", weights.T, strict=True)))
    write_csv(tmp_path / "l.csv", run=names, x=loss)
    common = (f"--weights={tmp_path / 'w.csv'}", f"--losses={tmp_path / 'l.csv'}",
              "--laws=exponential", "--laws=linear")  # fmt: skip
    out = tmp_path / "mix.json"
    done = command("fit", "mix", *common, "--available=a=10", "--total_tokens=100", f"--json={out}")
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["law"] == "exponential"
    assert found["optimum"]["a"] == pytest.approx(0.4, abs=1e-6)  # four epochs of it
    done = command("fit", "mix", *common, "--available=d=10", "--total_tokens=100")
    assert done.returncode == 2 and "source 'd' is unknown; known: a, b, c" in done.stderr


@pytest.mark.slow
def test_downstream_and_probe_print_their_tables(command, tmp_path):
    params = np.repeat([1e8, 2e8, 4e8, 8e8], 2)
    tokens = params * np.tile([20, 80], 4)
    nll = 0.4 + 30 * params**-0.25 + 60 * tokens**-0.25
    data = write_csv(
        tmp_path / "d.csv", run=[f"r{i}" for i in range(8)], params=params, tokens=tokens, nll=nll,
        accuracy=0.9 - 0.5 / (1 + np.exp(-5 * (nll - 0.8))),
    )  # fmt: skip
    done = command("fit", "downstream", f"--data={data}", "--target_params=1e10",
                "--target_tokens=1e12", "--resamples=50")  # fmt: skip
    assert done.returncode == 0, done.stderr
    for text in ("linear", "power", "surface", "extrapolated", "back-test"):
        assert text in done.stdout
    data = write_csv(tmp_path / "p.csv", arm=["control"] * 3 + ["new"] * 3, seed=[0, 1, 2] * 2,
                     benchmark=["gsm8k"] * 6, score=[0.1, 0.11, 0.12, 0.3, 0.31, 0.32])  # fmt: skip
    done = command("fit", "probe", f"--data={data}")
    assert done.returncode == 0, done.stderr
    assert "better" in done.stdout and "smallest detectable" in done.stdout
