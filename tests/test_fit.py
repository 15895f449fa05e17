"""The fit door, run as a user runs it."""

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


def test_isoflop_writes_the_keys_and_the_plots(door, tmp_path, sweep):
    data = write_csv(tmp_path / "runs.csv", **sweep)
    out, page = tmp_path / "out.json", tmp_path / "plots.html"
    done = door("fit", "isoflop", "--data", str(data), "--target_flops", "3.8e25",
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
    "no rows": (lambda s: {k: v[:0] for k, v in s.items()}, "no rows under the header"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_tables_get_a_clear_line(door, tmp_path, sweep, case):
    spoil, message = CASES[case]
    data = write_csv(tmp_path / "runs.csv", **spoil(sweep))
    out = tmp_path / "out.json"
    done = door("fit", "isoflop", f"--data={data}", "--target_flops=1e24", f"--json={out}")
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "a command is missing; known: isoflop"),
        (("isoflops",), "'isoflops' is no command"),
        (("isoflop",), "--data is required"),
        (("isoflop", "--data=none.csv"), "--target_flops is required"),
        (("isoflop", "--data=none.csv", "--target_flops=-1"), "--target_flops is -1"),
        (("isoflop", "--data=none.csv", "--target_flops=1"), "none.csv: No such file"),
        (("isoflop", "--data=none.csv", "--target_flops=1", "--json=no/x"), "no directory"),
    ],
)
def test_bad_options_get_a_clear_line(door, arguments, message):
    done = door("fit", *arguments)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
