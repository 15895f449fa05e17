"""Reports in a real browser: no error, plots drawn, sorting by a click, no sideways scrolling."""

import json
import time
from urllib.parse import unquote

import numpy as np
import pytest
from browser import Browser, find
from test_report import measured, train_records

from llama3_jax.launching import report
from llama3_jax.launching.store import Store
from llama3_jax.reporting.page import write_report
from llama3_jax.scaling.surface import Surface

SEEDS = range(6)
# Ids of the plots in which no line, marker or bar takes up space.
EMPTY_PLOTS = """
[...document.querySelectorAll(".plotly-graph-div")].filter(plot =>
  ![...plot.querySelectorAll(".trace path, .contour path")].some(e => e.getBoundingClientRect().width > 0)
).map(plot => plot.id)
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find()
    if program is None:
        pytest.skip("no Chromium here; .ci/run installs it")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def write_run(workdir, records, config):
    workdir.mkdir(parents=True)
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (workdir / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """The report of six runs on different mixes, one unit that failed, and a table of runs."""
    store = Store(tmp_path_factory.mktemp("root"))
    store.add("sweep <1>", "", "local", "/", {}, lambda folder: [row(folder, wid) for wid in
                                                                range(1, 8)], False)  # fmt: skip
    folder, random = store.directory(1), np.random.default_rng(0)
    for seed in SEEDS:
        weight = 0.2 + seed / 10
        records = [r | {"mix": {"web": weight, "code": 1 - weight}} for r in train_records()]
        loss = 2 + float(random.normal())
        records += measured(20, 10_240, loss + 1, "a") + measured(40, 30_720, loss, "b")
        config = {"seed": seed, "stages": [{"mix": {"web": weight}}], "same": 1}
        write_run(folder / f"seed={seed}", records, config)
    for unit in store.units(1):
        state, code = ("failed", 2) if unit.wid == 7 else ("done", 0)
        store.observed(unit.id, state=state, exit_code=code, attempt=1, started=1.0, ended=5.0)
    failed = store.units(1)[-1]
    failed.log.parent.mkdir()
    failed.log.write_text("error: </pre><script>throw 1</script>\n")
    truth = Surface(E=2.0, A=400.0, B=900.0, alpha=0.5, beta=0.5)
    lines = ["flops,tokens,params,loss"]
    for flops in (1e17, 4e17, 1.6e18):
        for params in np.geomspace(0.2, 5, 5) * (flops / 6 / 5) ** 0.5:
            tokens = flops / 6 / params
            loss = truth.loss(params, tokens) * np.exp(0.001 * random.normal())
            lines.append(f"{flops},{tokens},{params},{loss}")
    (folder / "runs.csv").write_text("\n".join(lines) + "\n")
    (folder / "sections").mkdir()
    (folder / "sections" / "Forecast.html").write_text("<p>as foreseen</p>")
    write_report(folder / "seed=0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "RESAMPLES", 10)
        return report.write_experiment_report(store, store.experiment(1))


def row(folder, wid):
    name = f"seed={wid - 1}" if wid <= len(SEEDS) else "broken"
    return {
        "wid": wid, "name": name, "command": ["true"], "workdir": str(folder / name),
        "environment": {}, "after": [], "requirements": {}, "retries": 0,
    }  # fmt: skip


def check(browser, path, **options) -> None:
    """No error on the console, every plot drawn, nothing wider than the page."""
    browser.errors.clear()
    browser.open(path, **options)
    end = time.monotonic() + 20
    while empty := browser.evaluate(EMPTY_PLOTS):
        assert time.monotonic() < end, empty
        time.sleep(0.1)
    drawn = browser.evaluate("document.querySelectorAll('.js-plotly-plot').length")
    assert drawn and not browser.errors
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")


VIEWS = {"light": {}, "dark": {"dark": True}, "phone": {"width": 390, "touch": True}}


@pytest.mark.parametrize("view", VIEWS)
def test_an_experiments_report(browser, experiment, view, tmp_path):
    check(browser, experiment, **VIEWS[view])
    titles = browser.evaluate("[...document.querySelectorAll('h2')].map(e => e.innerText)")
    assert titles == [
        "Work units", "Failures", "Loss", "Mix", "Forecast", "IsoFLOP", "Config differences",
    ]  # fmt: skip
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 128) == (view == "dark")


def test_a_click_on_a_heading_sorts(browser, experiment):
    browser.open(experiment)
    column = (
        "[...document.querySelectorAll('table.sortable tbody tr')].map(r => r.cells[{}].innerText)"
    )
    names = browser.evaluate("[...document.querySelectorAll('table.sortable th button')]"
                             ".map(e => e.innerText)")  # fmt: skip
    assert "seed" in names and "same" not in names and "stages.0.mix.web" in names
    place = names.index("held-out, mean")
    heading = f"table.sortable thead th:nth-child({place + 1}) button"
    browser.click(heading)
    up = browser.evaluate(column.format(place))
    assert up[-1] == "–" and [float(v) for v in up[:-1]] == sorted(map(float, up[:-1]))
    browser.click(heading)
    down = browser.evaluate(column.format(place))
    assert down == [*up[-2::-1], "–"]
    browser.click("table.sortable thead th:nth-child(1) button")
    assert browser.evaluate(column.format(0)) == [str(wid) for wid in range(1, 8)]
    state = browser.evaluate("document.querySelector('table.sortable thead th').ariaSort")
    assert state == "ascending"


def test_a_units_name_leads_to_its_report(browser, experiment):
    browser.open(experiment)
    where = browser.evaluate("document.querySelector('table.sortable a').href")
    assert unquote(where) == f"file://{experiment.parent}/seed=0/report.html"


@pytest.mark.parametrize("view", VIEWS)
def test_a_runs_report(browser, tmp_path, view):
    write_run(tmp_path / "run", [*train_records(), *measured(40, 30_720, 2.0, "x")], {"seed": 1})
    check(browser, write_report(tmp_path / "run"), **VIEWS[view])
